"""Signals: when they stop a run, also a multi-process one. tests/faults tests what a run saves."""

import os
import signal
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from diffusion.runtime.preemption import EXIT_CODE, Preempted, Preemption, point


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def handlers() -> tuple:
    return tuple(map(signal.getsignal, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))


@pytest.fixture(autouse=True)
def hangup():
    """As in a terminal, also where `nohup` started the tests: then SIGHUP is ignored, and stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def two_processes(monkeypatch) -> list[int]:
    """The counts with which one of two processes asks JAX, which says to stop at the third time."""
    counts = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda count: counts.append(count) or len(counts) == 3
    )
    return counts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_outside_the_loop_stops_at_once_and_the_old_handlers_come_back(number):
    before = handlers()
    with pytest.raises(Preempted, match="75") as stop, Preemption():
        send(number)
        time.sleep(10)
        pytest.fail("it did not stop")
    assert stop.value.code == EXIT_CODE == 75
    assert stop.value.reason == f"stopped by {number.name}; the same command goes on"
    assert handlers() == before


def test_inside_the_loop_a_signal_waits_for_the_step_to_end():
    was_due = []
    with pytest.raises(Preempted, match="75"), Preemption() as preemption, preemption.deferred():
        was_due.append(preemption.is_due())
        send(signal.SIGTERM)
        time.sleep(0.1)
        was_due.append(preemption.is_due())
    assert was_due == [False, True]


def test_a_loop_without_a_signal_ends_as_any_other():
    with Preemption() as preemption:
        with preemption.deferred():
            assert not preemption.is_due()
        preemption.check()


def test_a_second_interrupt_from_the_keyboard_does_not_wait():
    with Preemption() as preemption, pytest.raises(Preempted):
        with preemption.deferred():
            send(signal.SIGTERM)
            send(signal.SIGTERM)
            assert preemption.is_due()
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
                time.sleep(10)


def test_under_nohup_a_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption():
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_the_background_of_a_script_an_interrupt_saves_too():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(Preempted), Preemption():
            send(signal.SIGINT)
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_where_python_drops_exceptions_stops_between_two_parts():
    class Dying:
        def __del__(self):
            send(signal.SIGTERM)

    with Preemption() as preemption:
        preemption.check()
        Dying()
        with pytest.raises(Preempted, match="75") as stop:
            preemption.check()
    assert stop.value.reason == "stopped by SIGTERM; the same command goes on"


def test_several_processes_leave_the_signals_to_jax(two_processes):
    before = handlers()
    with Preemption():
        assert handlers()[:2] == before[:2]
    assert handlers() == before


def test_several_processes_pass_a_hangup_on_to_jax_as_the_signal_that_it_handles(two_processes):
    received, before = [], signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with Preemption():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_several_processes_are_stopped_after_the_last_step_if_jax_said_so_with_it(two_processes):
    """JAX says so once: what follows the loop would not hear of it, and would be killed."""
    with pytest.raises(Preempted, match="75") as stop, Preemption() as preemption:
        with preemption.deferred():
            assert [preemption.is_due() for _ in range(3)] == [False, False, True]
        pytest.fail("it went on")
    assert stop.value.reason == "stopped by a signal; the same command goes on"


def test_several_processes_ask_for_the_signal_with_a_count_that_goes_up_by_one(two_processes):
    # JAX answers true where the count equals one past the furthest process's: a count that skips never gets there.
    preemption = Preemption()
    assert [preemption.is_due() for _ in range(3)] == [False, False, True]
    assert np.diff(two_processes).tolist() == [1, 1]


def test_several_processes_stop_between_parts_of_work_where_jax_says_so(two_processes):
    preemption = Preemption()
    preemption.check()
    assert not preemption.is_due()  # both are one sequence of questions
    with pytest.raises(Preempted, match="75"):
        preemption.check()


def test_at_points_a_signal_is_raised_where_it_is_asked_for_and_nowhere_else():
    """Some libraries take whatever is raised inside them for an error of their own, and go on."""
    point()
    with pytest.raises(Preempted, match="75"), Preemption() as preemption:
        with preemption.deferred():
            point()
        with preemption.at_points():
            point()
            send(signal.SIGTERM)
            passed = True
            point()
            pytest.fail("it went on")
    assert passed
    point()
