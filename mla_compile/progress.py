"""Stages of a conversion: what is running, how long it took, and the memory peak, for the display and the report."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

__all__ = ["Display", "Stage", "StageTiming", "Stages", "machine_memory", "peak_memory_mib"]

T = TypeVar("T")


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def machine_memory() -> int | None:
    """Bytes of memory that this process can have at most: the machine's, or a container's; None where nobody says."""
    limits = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min((limit for limit in limits if limit > 0), default=None)


@dataclass(frozen=True, slots=True)
class StageTiming:
    """One finished stage.

    Attributes:
        name: What was done.
        seconds: Wall-clock time.
        peak_mib: Peak resident memory of the process when it ended, in MiB.
        note: What else there is to say of it.
    """

    name: str
    seconds: float
    peak_mib: float
    note: str = ""


class Display(Protocol):
    """Shows stages to a person."""

    def started(self, name: str, total: int | None) -> None:
        """A stage of ``total`` steps begins."""

    def advanced(self, note: str) -> None:
        """One step of the current stage is done, of which ``note`` tells."""

    def told(self, line: str) -> None:
        """There is something to say while the stage goes on."""

    def finished(self, timing: StageTiming) -> None:
        """The current stage is done."""

    def abandoned(self) -> None:
        """The current stage ended by an error."""


class Stage:
    """A stage that is running: call it after each of its steps.

    Args:
        display: Shows its steps, if given.

    Attributes:
        note: What is told beside its steps, and with its time.
    """

    def __init__(self, display: Display | None) -> None:
        self._display = display
        self.note = ""

    def __call__(self) -> None:
        """One step is done."""
        if self._display:
            self._display.advanced(self.note)

    def noted(self, note: str) -> None:
        """Change what is told beside the steps to come."""
        self.note = note

    def tell(self, line: str) -> None:
        """Say something while it goes on."""
        if self._display:
            self._display.told(line)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Iterate over items with one step per item."""
        for item in items:
            yield item
            self()


class Stages:
    """Runs stages one after another, times them, and tells a display.

    Args:
        display: Where to show progress; nowhere by default.
    """

    def __init__(self, display: Display | None = None) -> None:
        self._display = display
        self.timings: list[StageTiming] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Run the body as a stage of ``total`` steps."""
        if self._display:
            self._display.started(name, total)
        begin = time.perf_counter()
        stage = Stage(self._display)
        try:
            yield stage
        except BaseException:
            if self._display:
                self._display.abandoned()
            raise
        timing = StageTiming(name, time.perf_counter() - begin, peak_memory_mib(), stage.note)
        self.timings.append(timing)
        if self._display:
            self._display.finished(timing)

    def each(self, name: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Iterate over items as a stage with one step per item."""
        with self.stage(name, total) as stage:
            yield from stage.each(items)
