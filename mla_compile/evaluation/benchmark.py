"""What speed is measured of: the workload, and the figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mla_compile.errors import UsageError
from mla_compile.report import environment

__all__ = ["USUAL", "Benchmark", "File", "Prefill", "Spread", "Step", "Workload", "slower"]

_CONTEXTS, _BATCHES = (512, 4096), (1, 8)


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        contexts: Tokens in the cache, the new one among them; 512 and 4096 by default, within the longest sequence.
        batches: Sequences decoded together.
        rounds: Turns of every file.
        threads: Threads per operator.
    """

    contexts: tuple[int, ...] | None = None
    batches: tuple[int, ...] = _BATCHES
    rounds: int = 15
    threads: int = 1

    def within(self, longest: int | None) -> tuple[int, ...]:
        """The contexts, for a model whose longest sequence is known or not.

        Raises:
            UsageError: One is longer.
        """
        if self.contexts is None:
            return tuple(sorted({min(c, longest or c) for c in _CONTEXTS}))
        beyond = [c for c in self.contexts if longest is not None and c > longest]
        if beyond:
            raise UsageError(
                f"The model's longest sequence has {longest} tokens, and --contexts asks for {beyond[0]}.",
                "Give smaller contexts.",
            )
        return self.contexts


USUAL = Workload()
"""Two contexts, one sequence and eight, one thread."""


@dataclass(frozen=True)
class Spread:
    """Ratios of many turns: the median, and what a quarter of them is below and above."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class File:
    """A file that was measured.

    Attributes:
        name: What it is: the name of a converted file, or the form of the original.
        original: Whether it is the original.
        load_seconds: To load it, in a process of its own.
        peak_bytes: Memory that process took for it at most, at the largest context and batch.
        cache_bytes_per_token: Bytes a token of one sequence takes in the cache.
    """

    name: str
    original: bool
    load_seconds: float
    peak_bytes: int
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Prefill:
    """A prompt of one sequence, run in pieces of 512 tokens.

    Attributes:
        file: Name of the file.
        tokens: Its length.
        seconds: Median time.
        speedup: Time of the fastest float32 original over this one's.
    """

    file: str
    tokens: int
    seconds: float
    speedup: Spread


@dataclass(frozen=True)
class Step:
    """One new token of every sequence.

    Attributes:
        file: Name of the file.
        context: Tokens of every sequence, the new one among them.
        batch: Sequences.
        seconds: Median time.
        cache_bytes: Measured on the cache.
        speedup: Time of the fastest original over this one's; an int8 original counts only for int8 files.
    """

    file: str
    context: int
    batch: int
    seconds: float
    cache_bytes: int
    speedup: Spread

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences."""
        return self.batch / self.seconds


@dataclass(frozen=True)
class Benchmark:
    """What was found.

    Attributes:
        original: What the user called the original.
        files: All files, originals first.
        prefills: Prompts.
        steps: Steps.
        threads: Threads per operator.
        clock: What times are of: the process's CPU time with one thread, the clock's otherwise.
        notes: What to know of the figures: forms of the original that there are not, and where it is faster.
        environment: Versions.
    """

    original: str
    files: tuple[File, ...]
    prefills: tuple[Prefill, ...]
    steps: tuple[Step, ...]
    threads: int
    clock: str
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=environment)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        found = dataclasses.asdict(self)
        for row, step in zip(found["steps"], self.steps, strict=True):
            row["tokens_per_second"] = step.tokens_per_second
        return found


def slower(steps: Sequence[Step], originals: Container[str]) -> tuple[str, ...]:
    """What to know where even the fastest converted file takes longer than the original.

    Args:
        steps: What was measured.
        originals: Names of the original's files.
    """
    best: dict[tuple[int, int], float] = {}
    for step in steps:
        if step.file not in originals:
            place = (step.context, step.batch)
            best[place] = max(best.get(place, 0.0), step.speedup.median)
    lost = sum(speedup < 1 for speedup in best.values())
    if not lost:
        return ()
    return (
        f"slower than the original in {lost} of {len(best)} settings: a smaller cache takes less time to read, and its "
        "longer rows more multiplications; small models and short contexts have little to read ('mla-compile plan' "
        "counts both)",
    )
