"""The watchdog dumps the stacks of a step that hangs, and of no other."""

import time

import pytest

from diffusion.runtime.watchdog import FACTOR, WARM_UP, Watchdog


@pytest.fixture
def dump(tmp_path):
    """A file to dump to, and a function that returns what is in it."""
    path = tmp_path / "stacks"
    with path.open("w") as file:
        yield file, path.read_text


def take(watchdog: Watchdog, *seconds: float) -> None:
    """Steps that take so long."""
    for duration in seconds:
        with watchdog.step():
            time.sleep(duration)


def test_a_step_that_takes_ten_times_its_median_dumps_the_stacks_once(dump):
    file, read = dump
    take(Watchdog(at_least=0.0, file=file), *(0.02,) * 8, 0.5, 0.02)
    assert read().count("Timeout") == 1 and "in take" in read()


def test_the_dump_comes_while_the_step_still_hangs(dump):
    file, read = dump
    watchdog = Watchdog(at_least=0.1, file=file)
    take(watchdog, *(0.001,) * WARM_UP)
    with watchdog.step():
        deadline = time.monotonic() + 30
        while "test_the_dump_comes_while_the_step_still_hangs" not in read():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_pauses_below_the_least_are_not_dumped(dump):
    file, read = dump
    take(Watchdog(at_least=10.0, file=file), *(0.001,) * 9, 0.2)
    assert read() == ""


def test_the_first_steps_which_compile_are_not_watched(dump):
    file, read = dump
    take(Watchdog(at_least=0.0, file=file), *(0.001,) * (WARM_UP - 1), 0.2)
    assert read() == ""


def test_what_comes_between_steps_is_not_watched_even_after_a_step_that_failed(dump):
    file, read = dump
    watchdog = Watchdog(at_least=0.1, file=file)
    take(watchdog, *(0.001,) * WARM_UP)
    with pytest.raises(ZeroDivisionError), watchdog.step():
        raise ZeroDivisionError
    time.sleep(0.1 + FACTOR * 0.01 + 0.1)
    assert read() == ""


def test_the_limit_follows_the_median_of_the_steps_so_far(dump):
    file, read = dump
    take(Watchdog(at_least=0.0, file=file), *(0.05,) * 7, 0.2)  # four times the usual
    assert read() == ""
