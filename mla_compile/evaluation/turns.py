"""Functions timed in turns, so that what disturbs a machine disturbs all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mla_compile.evaluation.benchmark import Spread

__all__ = ["spread", "turns"]

_TURN, _MOST = 0.02, 20
"""Seconds that a file's turn is to last, and steps of it at most; one more before them is not counted."""


def turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds that each of some functions takes, in every round.

    A turn is one call that is not counted, which meets what the others left in the processor's caches, and as many
    behind it as take about 20 ms.

    Args:
        runs: The functions.
        rounds: Turns of each.
        clock: Seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = clock()
            run()
            first = clock() - begin
            count = max(1, min(_MOST, math.ceil(_TURN / max(first, 1e-6))))
            begin = clock()
            for _ in range(count):
                run()
            times[name].append((clock() - begin) / count)
    return times


def spread(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Ratios of the times of equal rounds."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))
