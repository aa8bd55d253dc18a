import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import bad_input


def test_a_part_of_the_bad_input_is_one_line_and_costs_nothing():
    """All of it, by `scripts/bad_input.py`, takes half an hour."""
    rows = bad_input.run(list(bad_input.GROUPS), every=100)
    assert len(rows) > 18 and {row["how"] for row in rows} == {"cli", "api"}
    assert not [bad_input.told(row) for row in rows if bad_input.wrong(row)]
