"""Who watches the processes of a run: which verdict falls when, and on whom."""

import contextlib
import json

import jax
import pytest

from tinyllama_jax.errors import UserError
from tinyllama_jax.runtime import watch as watching
from tinyllama_jax.runtime.watch import PATIENCE, STANDSTILL, TIMED, Watch


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """What process 0 of three thinks of them; the other two are files that a test writes."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    (tmp_path / "processes").mkdir()
    return Watch(tmp_path)


def tell(watch, process, beat, moves, phase="step", left=None):
    state = {"host": "h", "beat": beat, "moves": moves, "phase": phase, "step": 7, "left": left}
    (watch._folder / f"{process}.json").write_text(json.dumps(state))


def verdicts(watch, seconds, moves, beats=True, phase="step", every=4):
    """The first verdict, at which second of those that pass; None: there is none."""
    watch._place = (moves[0], phase, 7)
    for second in range(0, seconds, every):
        for process in (1, 2):
            tell(watch, process, second if beats or process == 1 else 0, moves[process], phase)
        watch._look(every)
        if (verdict := watch._verdict()) is not None:
            return second, *verdict
    return None


def test_a_slow_run_is_left_alone(watch):
    # All in the same place, or one alive and behind in what may take long.
    assert verdicts(watch, STANDSTILL, [3, 3, 3], every=60) is None
    assert verdicts(watch, PATIENCE["step"], [5, 5, 4], every=60) is None
    hours = PATIENCE["validation"]
    assert verdicts(watch, hours, [7, 8, 8], phase="validation", every=600) is None
    # All in what may take longer than a standstill.
    assert hours > STANDSTILL
    assert verdicts(watch, hours, [9, 9, 9], phase="validation", every=600) is None


def test_who_is_behind_or_silent_is_named(watch):
    second, code, line = verdicts(watch, 60, [5, 5, 4], phase="data")
    assert code == 124 and line.startswith("process 2 on h has not gone on for 40 s (step 7, data)")
    assert 40 <= second < 50
    second, code, line = verdicts(watch, 60, [6, 6, 6], beats=False)
    assert code == 124 and line.startswith("process 2 on h has not been heard of for 30 s")
    assert 30 <= second < 40


def test_an_error_of_another_process_is_told_after_a_moment(watch):
    """Time for this process to come to the same error, which it would tell itself."""
    found = []
    for beat in range(6):
        tell(watch, 1, beat, 1, left={"code": 2, "reason": "process 1 has no tokenizer"})
        tell(watch, 2, beat, 1, left={"code": 0, "reason": ""})
        watch._look(2.0)
        found.append(watch._verdict())
    assert found[0] is None and found[-1] == (2, "process 1 has no tokenizer")


def test_a_process_that_left_at_the_end_may_be_silent(watch):
    """It writes nothing any more, while another still closes its files."""
    for beat in range(30):
        tell(watch, 1, 0, 9, left={"code": 0, "reason": ""})
        tell(watch, 2, beat, 9)
        watch._look(2.0)
        assert watch._verdict() is None


def test_steps_that_were_timed_shorten_the_patience_with_one(watch):
    for step in range(8, 8 + TIMED):
        watch.at("step", step)
        watch._since -= 2.0
        watch.at("data", step + 1)
    second, code, line = verdicts(watch, 90, [6, 6, 6])
    assert code == 124 and line.startswith("no process has gone on for 45 s (step 7, step)")
    assert 45 <= second < 55
    watch.at("step", 20)
    watch._since -= 20.0
    watch.at("data", 21)
    assert verdicts(watch, 180, [8, 8, 8]) is None
    assert verdicts(watch, 90, [9, 9, 9], phase="compile") is None


def test_a_standstill_ends_a_run_in_one_process(tmp_path):
    watch = Watch(tmp_path)
    watch.at("step", 7)
    for _ in range(STANDSTILL // 4 + 1):
        watch._look(4.0)
        assert watch._verdict() is None
    watch._look(4.0)
    assert watch._verdict()[0] == 124
    watch.at("data", 8)
    watch._look(4.0)
    assert watch._verdict() is None


def test_a_folder_that_is_not_shared_is_refused(watch, monkeypatch):
    monkeypatch.setattr(watching, "SILENCE", 0.2)
    monkeypatch.setattr(watching, "every", lambda text: [text])
    monkeypatch.setattr(watching, "together", contextlib.nullcontext)
    with pytest.raises(UserError, match=r"nothing of process \[1, 2\]: --run-folder must lie on"):
        watch.start()
