import math
import os
import signal

import pytest

from gptjax.errors import RunError
from gptjax.training.stopping import DivergenceGuard, EarlyStopping, StopSignals


def first_alarm(losses, **options) -> int | None:
    guard = DivergenceGuard(**options)
    for step, loss in enumerate(losses):
        try:
            guard.check(step, loss, "Try this.")
        except RunError as error:
            assert f"step {step}" in str(error) and str(error).endswith("Try this.")
            return step
    return None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_at_once(loss):
    assert first_alarm([5.0, 4.0, loss], threshold=1e9) == 2


@pytest.mark.parametrize(
    ("losses", "alarm"),
    [
        ([5, 4, 3, 2], None),
        ([2, 6, 6, 6, 6], None),  # four lines above: not yet
        ([2, 6, 6, 6, 6, 6], 5),
        ([2, 6, 6, 6, 6, 4.9, 6, 6, 6, 6], None),  # it came back within 3 nats
        ([9, 2, *[5.0] * 20], None),  # exactly the threshold is allowed
        ([9, 2, *[5.1] * 20], 6),
    ],
)
def test_a_loss_that_stays_high_stops_after_five_lines(losses, alarm):
    assert first_alarm(map(float, losses), threshold=3.0, patience=5) == alarm


def test_the_message_has_the_numbers():
    guard = DivergenceGuard(3.0, patience=1)
    guard.check(10, 2.0, "")
    with pytest.raises(RunError, match=r"diverged: 5\.500 at step 20, 3\.50 nats above .*divergence_threshold=3\.0"):
        guard.check(20, 5.5, "")


def test_a_run_that_continues_remembers_its_lowest_loss():
    guard = DivergenceGuard(3.0, patience=1, lowest=1.0)
    with pytest.raises(RunError, match="diverged"):
        guard.check(20, 4.5, "")
    DivergenceGuard(3.0, patience=1, lowest=None).check(20, 4.5, "")


def test_early_stopping_counts_from_the_best():
    stopper = EarlyStopping(2, [])
    assert [stopper.update(loss) for loss in (3.0, 2.0, 2.5)] == [True, True, False]
    assert not stopper.exhausted
    assert not stopper.update(2.0)  # as good is not better
    assert stopper.exhausted and stopper.best == 2.0


def test_early_stopping_remembers_an_earlier_part_of_the_run():
    stopper = EarlyStopping(2, [2.0, 2.1])
    stopper.update(2.2)
    assert stopper.exhausted


def test_what_rounding_changes_is_no_improvement():
    stopper = EarlyStopping(3, [], min_delta=1e-5)
    losses = [2.0, 2.0 - 4e-9, 2.0 - 8e-9, 2.0 - 12e-9]
    assert [stopper.update(loss) for loss in losses] == [True] * 4, "each is the best so far"
    assert stopper.exhausted and stopper.best == losses[-1]


def test_many_small_improvements_add_up():
    stopper = EarlyStopping(3, [], min_delta=1e-5)
    for i in range(20):
        stopper.update(2.0 - 4e-6 * i)
        assert not stopper.exhausted


def test_what_is_no_number_is_never_the_best():
    stopper = EarlyStopping(2, [])
    assert [stopper.update(value) for value in (math.nan, 2.0, math.nan)] == [False, True, False]
    assert stopper.best == 2.0


def test_a_metric_of_which_more_is_better():
    stopper = EarlyStopping(2, [0.5], lower_is_better=False)
    assert [stopper.update(value) for value in (0.7, 0.6, 0.65)] == [True, False, False]
    assert stopper.exhausted and stopper.best == 0.7


def test_without_patience_nothing_stops():
    stopper = EarlyStopping(0, [])
    for _ in range(9):
        stopper.update(1.0)
    assert not stopper.exhausted


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_is_noted_and_the_old_handler_comes_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    signals = StopSignals()
    os.kill(os.getpid(), number)
    assert signals.received == name
    os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
    assert signals.received == name
    signals.restore()
    assert signal.getsignal(number) is before


def test_what_is_ignored_at_the_start_stays_ignored():
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = StopSignals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.received
        signals.restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
