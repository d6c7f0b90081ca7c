"""The time left of a run, the progress of an evaluation, and the classes of a checkpoint."""

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest

from core.description import check_same_classes
from core.meters import EpochMeter, show_progress
from core.run import Run
from utils import UserError

OPTIONS = {"output_dir": None, "keep": 2, "resume": None, "auto_resume": False, "seed": 0}
OPTIONS |= {"on_nonfinite": "stop", "tensorboard": False}


@pytest.mark.parametrize(
    ("epoch", "step", "expected"),
    [(2, 5, 10 / 5 * 75), (3, 0, 10 / 10 * 70), (9, 9, 10 / 79 * 1), (2, 0, 10 * 80)],
)
def test_the_time_left_follows_the_steps_of_this_session(epoch, step, expected, monkeypatch):
    """Ten epochs of ten steps, started anew at the third, ten seconds ago."""
    run = Run(OPTIONS)
    run.state = SimpleNamespace(epoch=epoch, meter=EpochMeter(step=step))
    run.total_epochs, run.first_epoch, run.first_step, run.start = 10, 2, 0, 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: 110.0)
    assert run.remaining_time(10) == timedelta(seconds=int(expected))


def test_progress_is_logged_now_and_then(monkeypatch, caplog):
    times = iter([0.0, 8.0, 16.0, 24.0, 32.0, 40.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    with caplog.at_level("INFO", "twins"):
        assert list(show_progress(["a", "b", "c", "d", "e"], "evaluation", seconds=15)) == ["a", "b", "c", "d", "e"]
    assert caplog.messages == ["evaluation [2/5]  eta 0:00:24", "evaluation [4/5]  eta 0:00:08"]


def test_classes_in_another_order_are_refused():
    check_same_classes("x.pth", [], ["a", "b"])
    check_same_classes("x.pth", ["a", "b"], ["a", "b"])
    with pytest.raises(UserError, match="but the same in another order: class 0 is 'b'"):
        check_same_classes("x.pth", ["b", "a"], ["a", "b"])
