"""Making the next items in a thread of their own while the present one is used."""

import collections
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
AHEAD = 2  # items that are made before they are asked for
_END = object()


def prefetched(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items in the same order, `AHEAD` of them made in advance.

    What making an item raises is raised where that item is asked for. Closing the iterator waits for the items that
    are being made.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        pending = collections.deque(pool.submit(next, items, _END) for _ in range(AHEAD))
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, items, _END))
            yield item
