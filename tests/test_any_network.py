"""Networks unlike the plain classifier, through every way to prune them; all of `scripts/any_network.py` takes an hour or two."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import any_network


@pytest.mark.parametrize("name", any_network.OWN)
def test_every_way_to_prune_takes_every_network_of_our_own(name):
    row = any_network.one(name)  # holds the share that is not searched against the parameters
    assert [row[way] for way in (*any_network.WAYS, "reload")] == ["yes"] * (len(any_network.WAYS) + 1)
    assert row["layers"] > 0 and float(row["not_searched_percent"]) < 80
