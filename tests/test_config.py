import pytest

from evoprune.config import Config, keywords, options
from evoprune.errors import EvopruneError


def test_every_setting_has_help():
    assert all(len(about.help) > 10 for about in options().values())


def test_settings_go_through_json_types_and_back():
    config = Config(population=8, mean="0.5", max_seconds=2)
    assert Config(**config.settings()) == config


@pytest.mark.parametrize(("settings", "said"), [
    ({"population": 7}, "population: found 7, expected an even number of at least 4; try 8"),
    ({"population": 2}, "population: found 2, expected 4 to 1000000"),
    ({"population": 8.0}, "population: found 8.0, expected int"),
    ({"generations": True}, "generations: found True, expected int"),
    ({"generations": -1}, "generations: found -1, expected 0 to 10000000"),
    ({"accuracy_floor": 98}, "accuracy_floor: found 98, expected 0 to 1"),
    ({"accuracy_floor": float("nan")}, "accuracy_floor: found nan, expected 0 to 1"),
    ({"accuracy_floor": "high"}, "accuracy_floor: found 'high', expected a number"),
    ({"device": "tpu"}, "device: found 'tpu', expected one of auto, cpu, cuda"),
    ({"seed": None}, "seed: found None, expected int"),
])
def test_a_wrong_setting_says_what_was_expected(settings, said):
    with pytest.raises(EvopruneError) as error:
        Config(**settings)
    assert str(error.value) == said


@pytest.mark.parametrize(("flags", "words"), [
    ("go on with --resume runs/my-run, or choose another --out", "go on with resume='runs/my-run', or choose another out="),
    ("has 8; --resume may change engine", "has 8; resume= may change engine"),
    ("found with --plan a/b, lower --batch-size", "found with plan='a/b', lower batch_size="),
    ("give --knowledge data, --engine local or --no-such flag", "give knowledge='data', engine='local' or --no-such flag"),
])
def test_advice_for_the_command_line_as_advice_for_python(flags, words):
    assert keywords(flags) == words
