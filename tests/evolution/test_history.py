"""What was measured and logged: shared, bounded, and exact however a search is continued."""

import hashlib
import itertools

import numpy as np
import pytest
from test_generations import CONFIG, LAYOUT, Counting, digest, start

from evoprune.evolution import checkpoint, history
from evoprune.evolution.checkpoint import load, save
from evoprune.evolution.generations import evolve
from evoprune.evolution.history import Log, Seen
from evoprune.objectives import USUAL


@pytest.fixture
def small(monkeypatch):
    """Few masks are remembered, in small segments."""
    for module in (history, checkpoint):
        monkeypatch.setattr(module, "SEGMENT", 8)
    monkeypatch.setattr(history, "NEWEST", 50)


def masks_measured(rng, seen, keys=400):
    """Up to 30 masks that `seen` does not know, each with a number of its own."""
    drawn = dict.fromkeys(int(k).to_bytes(16, "big") for k in rng.integers(0, keys, rng.integers(0, 30)))
    return {key: (float(rng.random()), 1.0) for key in drawn if key not in seen}


def test_the_newest_masks_are_remembered_oldest_out_first(small, rng):
    """Against a plain list."""
    seen, plain, states = Seen(), [], []
    for _ in range(80):
        more = masks_measured(rng, seen)
        plain += more.items()
        seen = seen.and_then(more)
        states.append((seen, len(plain)))
        assert dict(seen) == dict(plain[-50:]) and len(seen) == len(dict(plain[-50:])) and seen.count == len(plain)
    assert len(plain) > 500 and len(seen.store.order) < 50 + 30 + 8 and len(seen.store.entries) <= len(seen.store.order)
    seen, count = states[-2]  # that before the last still knows what it knew
    assert dict(seen) == dict(plain[count - 50:count]) and seen.count == count


def test_whoever_goes_on_from_an_older_state_shares_nothing_with_the_others(small, rng):
    one = Seen().and_then({bytes([i] * 16): (0.0, float(i)) for i in range(9)})
    left, right = one.and_then({b"l" * 16: (1.0, 1.0)}), one.and_then({b"r" * 16: (2.0, 2.0)})
    assert b"r" * 16 not in left and b"l" * 16 not in right and one.count == 9 and left.count == right.count == 10
    assert dict(left.and_then({b"r" * 16: (3.0, 3.0)})) == {**dict(one), b"l" * 16: (1.0, 1.0), b"r" * 16: (3.0, 3.0)}
    log = Log().and_then({"a": 1, "b": 0.5})
    assert [dict(row) for row in log.and_then({"a": 2, "b": 1.0})] == [{"a": 1, "b": 0.5}, {"a": 2, "b": 1.0}]
    assert [*log.and_then({"a": 3, "b": 2.0})][-1] == {"a": 3, "b": 2.0} and len(log) == 1


def test_rows_of_the_log_come_back_with_their_types(small):
    rows = [{"generation": i, "hvlog": i / 3, "epochs": 0 if i % 2 else float(i)} for i in range(20)]
    log = Log()
    for row in rows:
        log = log.and_then(row)
    assert list(log) == rows and log[-1] == rows[-1] and log[3:5] == rows[3:5] and len(log) == 20
    assert [[type(v) for v in row.values()] for row in log] == [[type(v) for v in row.values()] for row in rows]
    with pytest.raises(IndexError):
        log[20]


def test_a_mask_measured_again_keeps_its_place_and_its_values(small):
    seen = Seen().and_then({b"a" * 16: (1.0, 1.0)}).and_then({b"a" * 16: (2.0, 2.0), b"b" * 16: (3.0, 3.0)})
    assert dict(seen) == {b"a" * 16: (1.0, 1.0), b"b" * 16: (3.0, 3.0)} and seen.count == 2


def states_of(generations=30):
    """The states of a search, each whole until the one after the next has come."""
    toolbox, state = start(Counting())
    yield state
    yield from evolve(state, toolbox, config_of(generations))


def config_of(generations=30):
    return CONFIG.__class__(**{**CONFIG.settings(), "generations": generations})


def all_of(state):
    return *digest(state)[:-1], dict(state.seen), state.evaluations


@pytest.mark.parametrize("stop", [0, 7, 15, 16, 29])
def test_a_search_that_forgets_masks_goes_on_exactly_from_any_checkpoint(stop, small, tmp_path):
    states = states_of()
    for state in itertools.islice(states, stop + 1):
        save(tmp_path, state, "run")
    expected = all_of(state)
    *_, undisturbed = [state, *states]
    again = load(tmp_path, LAYOUT, USUAL, "run")
    assert all_of(again) == expected and undisturbed.evaluations > 50 + 3 * 8
    *_, last = [again, *evolve(again, start(Counting())[0], config_of())]
    assert all_of(last) == all_of(undisturbed)


def test_a_state_is_saved_exactly_though_the_next_has_been_made(small, tmp_path):
    """As where a signal comes between a generation and its end."""
    states = states_of()
    *_, state = itertools.islice(states, 20)
    expected = all_of(state)
    next(states)
    save(tmp_path, state, "run")
    assert all_of(load(tmp_path, LAYOUT, USUAL, "run")) == expected


def test_a_checkpoint_writes_each_segment_once_and_removes_those_that_no_state_needs(small, tmp_path):
    born, sizes = {}, []
    for state in states_of():
        path = save(tmp_path, state, "run")
        sizes.append(path.stat().st_size)
        for segment in tmp_path.glob("*.segment"):
            assert born.setdefault(segment.name, segment.stat().st_mtime_ns) == segment.stat().st_mtime_ns
            assert hashlib.sha256(segment.read_bytes()).hexdigest() in segment.name
    there = {path.name for path in tmp_path.glob("*.segment")}
    assert len([name for name in there if name.startswith("seen-")]) <= 50 // 8 + 4 < len(
        [name for name in born if name.startswith("seen-")])
    assert len([name for name in there if name.startswith("log-")]) == len(state.log) // 8
    assert max(sizes[10:]) < sizes[0] + 20_000


def test_a_damaged_segment_is_a_damaged_checkpoint(small, tmp_path, caplog):
    states = states_of()
    *_, state = itertools.islice(states, 18)
    save(tmp_path, state, "run")
    expected, older = all_of(state), {path.name for path in tmp_path.glob("*.segment")}
    *_, state = itertools.islice(states, 2)
    save(tmp_path, state, "run")
    newer = next(path for path in sorted(tmp_path.glob("seen-*")) if path.name not in older)
    newer.write_bytes(newer.read_bytes()[:-1] + b"\0\0")
    assert all_of(load(tmp_path, LAYOUT, USUAL, "run")) == expected
    assert f"{newer.name} is not whole" in caplog.text


def test_one_generation_may_measure_more_than_is_remembered(small, tmp_path):
    seen = Seen().and_then({i.to_bytes(16, "big"): (float(i), 1.0) for i in range(333)})
    assert seen.count == 333 and list(seen) == [i.to_bytes(16, "big") for i in range(283, 333)]
    parts = np.concatenate([seen.part(280, 288), seen.part(288, 333)])
    assert dict(Seen(history.read_seen(parts, 333, 2))) == dict(seen)
    for content, count in ((parts, 332), (parts[1:], 333), (parts[:, :-8], 333), (parts | 255, 333), (parts[:0], 333)):
        with pytest.raises(ValueError, match="found masks"):
            history.read_seen(content, count, 2)


def test_a_log_that_no_search_wrote_is_refused():
    log = Log()
    for i in range(3):
        log = log.and_then({name: i for name in history.COLUMNS})
    part = log.part(0, 3)
    assert list(Log(history.read_log(part, history.COLUMNS))) == list(log)
    for content, columns in ((part[:, :-1], history.COLUMNS), (np.full_like(part, 255), history.COLUMNS),
                             (part, history.COLUMNS[1:]), (part, "x")):
        with pytest.raises(ValueError, match="found a log"):
            history.read_log(content, columns)
