"""Makes the next items in a separate thread while the current one is used."""

import collections
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
AHEAD = 2  # items that are made before they are asked for
_END = object()


def prefetched(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items in the same order, `AHEAD` of them made in advance.

    An error in making an item is raised when that item is asked for. Closing the iterator waits for the items in the
    making.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        pending = collections.deque(pool.submit(next, items, _END) for _ in range(AHEAD))
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, items, _END))
            yield item
