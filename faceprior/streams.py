"""Streams of work: in threads beside the network, in order and with a bound on what waits, and in full batches."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T, R, K = TypeVar("T"), TypeVar("R"), TypeVar("K", bound=Hashable)


def in_background(function: Callable[[T], R], items: Iterable[T], num_workers: int, ahead: int) -> Iterator[R]:
    """Yield `function(item)` of every item, in the items' order, computed in `num_workers` threads.

    The items are drawn in the caller's thread, at most `ahead` (2 or more: with 1 nothing would overlap) before their
    results are taken, so an iterator that runs a network stays in one thread. num_workers: 0 calls the function there,
    too. An exception of the function or of the items ends the iteration; work that has not begun is dropped.
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
    """Yield lists of items of one key, each as soon as it has `size(key)` of them, and the shorter rest at the end."""
    groups: dict[K, list[T]] = {}
    for item in items:
        kind = key(item)
        groups.setdefault(kind, []).append(item)
        if len(groups[kind]) >= size(kind):
            yield groups.pop(kind)
    yield from groups.values()
