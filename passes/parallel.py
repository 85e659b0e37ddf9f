"""Layers side by side: what is computed of one layer by itself, for several at a time.

Factorising is eigenvalue problems, from which a second core gains little inside one layer and everything in another.
The libraries leave Python's lock while they compute, so that threads are enough, and weights stay mapped once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["parallel_map"]

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def parallel_map(make: Callable[[_Item], _Made], items: Sequence[_Item], jobs: int) -> Iterator[_Made]:
    """Make something of every item, in their order.

    With one job, ``make`` runs in this thread with all of torch's threads. With several, each has one: sums come out
    the same in their last bits however many jobs there are. At most ``jobs`` results are unfinished or not taken yet,
    which bounds memory; between them, whoever takes one computes with one thread as well.

    Args:
        make: Makes one; several at a time, so it must not change anything that others read.
        items: What they are made of.
        jobs: How many at a time, from 1.
    """
    if jobs == 1:
        yield from map(make, items)
        return
    before, graded = torch.get_num_threads(), torch.is_grad_enabled()

    def one(item: _Item) -> _Made:
        torch.set_num_threads(1)  # OpenMP asks every thread for its own number
        with torch.set_grad_enabled(graded):
            return make(item)

    pool, waiting = ThreadPoolExecutor(jobs), deque[Future[_Made]]()
    try:
        torch.set_num_threads(1)
        for item in items:
            waiting.append(pool.submit(one, item))
            if len(waiting) == jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
