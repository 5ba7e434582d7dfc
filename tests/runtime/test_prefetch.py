"""Items that are made in advance are the same items, and their errors come with them."""

import threading
from contextlib import closing

import pytest

from diffusion.runtime import prefetch


def test_the_items_come_in_order_and_from_another_thread():
    makers = set()

    def items():
        for number in range(50):
            makers.add(threading.current_thread())
            yield number

    assert list(prefetch.prefetched(items())) == list(range(50))
    assert len(makers) == 1 and threading.current_thread() not in makers
    assert list(prefetch.prefetched(iter([]))) == []


def test_so_many_are_made_before_they_are_asked_for_and_no_more():
    made = threading.Semaphore(0)

    def items():
        while True:
            made.release()
            yield None

    with closing(prefetch.prefetched(items())) as ahead:
        next(ahead)
        for _ in range(1 + prefetch.AHEAD):
            assert made.acquire(timeout=10)
        assert not made.acquire(timeout=0.2)


def test_an_error_comes_where_its_item_would_have_come():
    def items():
        yield 1
        yield 2
        raise OSError("no such batch")

    ahead = prefetch.prefetched(items())
    assert (next(ahead), next(ahead)) == (1, 2)
    with pytest.raises(OSError, match="no such batch"):
        next(ahead)


def test_closing_ends_the_thread():
    ahead = prefetch.prefetched(iter(range(10**9)))
    next(ahead)
    running = [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    ahead.close()
    assert running and not any(thread.is_alive() for thread in running)
