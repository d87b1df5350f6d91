"""Streams of work: in background threads, in order and with bounded memory; and in full batches."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T, R, K = TypeVar("T"), TypeVar("R"), TypeVar("K", bound=Hashable)


def in_background(function: Callable[[T], R], items: Iterable[T], num_workers: int, ahead: int) -> Iterator[R]:
    """Yield `function(item)` of every item, in the items' order, computed in `num_workers` threads.

    The items are read in the caller's thread, at most `ahead` (at least 2: with 1 nothing would overlap) before their
    results are used, so an iterator that runs a network stays in one thread. num_workers: with 0 the function is called
    in the caller's thread, too. An exception of the function or of the items ends the iteration; work that has not
    begun is dropped.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(num_workers)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_groups(items: Iterable[T], key: Callable[[T], K], size: Callable[[K], int]) -> Iterator[list[T]]:
    """Yield lists of items with the same key, each when it has `size(key)` items, and the shorter rests at the end."""
    groups: dict[K, list[T]] = {}
    for item in items:
        kind = key(item)
        groups.setdefault(kind, []).append(item)
        if len(groups[kind]) >= size(kind):
            yield groups.pop(kind)
    yield from groups.values()
