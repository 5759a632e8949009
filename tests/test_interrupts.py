"""Signals: the first may wait for the end of a step, the next ends at once, and none becomes an error."""

# ruff: noqa: PT012 (a signal is sent from within)

from __future__ import annotations

import os
import signal

import pytest

from rlhf.errors import TrainingError
from rlhf.interrupts import Interrupted, Interrupts


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_outside_a_step_a_signal_ends_at_once() -> None:
    with pytest.raises(Interrupted) as caught, Interrupts():
        send(signal.SIGINT)
    assert caught.value.exit_code == 130


def test_within_a_step_it_waits_for_the_end_and_is_said() -> None:
    said, done = [], []
    with pytest.raises(Interrupted) as caught, Interrupts(said.append) as interrupts, interrupts.deferred():
        send()
        done.append(True)
    assert (done, len(said), caught.value.exit_code) == ([True], 1, 143)


def test_a_second_signal_does_not_wait() -> None:
    done = []
    with pytest.raises(Interrupted), Interrupts() as interrupts, interrupts.deferred():
        send()
        send()
        done.append(True)
    assert not done


@pytest.mark.parametrize("became", [SystemError("returned a result with an exception set"), TrainingError("stage")])
def test_what_compiled_code_made_of_an_interrupt_is_one_again(became: Exception) -> None:
    with pytest.raises(Interrupted) as caught, Interrupts():
        try:
            send()
        except Interrupted as stop:
            raise became from stop
    assert caught.value.exit_code == 143


def test_an_error_while_a_signal_waits_stays_an_error() -> None:
    with pytest.raises(TrainingError), Interrupts() as interrupts, interrupts.deferred():
        send()
        raise TrainingError("the step failed")


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
