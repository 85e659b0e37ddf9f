"""The two streams: results go to standard output, progress and everything else to standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mla_compile.errors import MlaCompileError, UsageError

if TYPE_CHECKING:
    from mla_compile.progress import StageTiming

__all__ = ["StageDisplay", "make_display", "print_json", "print_table", "say", "tell", "warn"]

_LOG = logging.getLogger("mla_compile")
_ALWAYS_A_TABLE = 2
"""Columns that any terminal has room for."""


class _LogLines(logging.Handler):
    """Log records as lines of a console, above its bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        self._console.print(self.format(record), highlight=False, markup=False, soft_wrap=True)


class StageDisplay:
    """Shows stages on standard error: bars on a terminal, one line per finished stage otherwise.

    While it is entered, it also shows what the compiler logs, from the level that ``verbose`` asks for.

    Args:
        quiet: Show no stages.
        verbose: 0 for stages, 1 for versions and decisions too (``INFO``), 2 for ``DEBUG`` and the traceback of an
            error.
    """

    def __init__(self, quiet: bool, verbose: int = 0) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._verbose = verbose
        self._lines = _LogLines(Console(stderr=True) if quiet else self._console)
        self._bars = (
            Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<16}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[steps]:>9}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            if self._console.is_terminal and not quiet
            else None
        )
        self._task: Any = None

    def __enter__(self) -> StageDisplay:
        if self._verbose:
            from mla_compile.report import environment

            _LOG.addHandler(self._lines)
            _LOG.setLevel(logging.INFO if self._verbose == 1 else logging.DEBUG)
            _LOG.propagate = False
            _LOG.info("versions: %s", ", ".join(f"{name} {found}" for name, found in environment().items()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()
        if self._verbose:
            if isinstance(error, MlaCompileError):  # of which a person sees one sentence else
                _LOG.debug("where it happened:", exc_info=error)
            _LOG.removeHandler(self._lines)
            _LOG.setLevel(logging.NOTSET)
            _LOG.propagate = True

    def started(self, name: str, total: int | None) -> None:
        """A stage begins."""
        if self._bars:
            self._bars.start()  # not before: while there are bars, what others write begins new lines
            self._task = self._bars.add_task(name, total=total, steps=f"0/{total}" if total else "", note="")

    def advanced(self, note: str) -> None:
        """One step is done."""
        if self._bars:
            task = self._bars.tasks[-1]
            steps = f"{int(task.completed) + 1}/{int(task.total or 0)}"
            self._bars.update(self._task, advance=1, steps=steps, note=note)

    def told(self, line: str) -> None:
        """Something is said while the stage goes on."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def abandoned(self) -> None:
        """A stage ended by an error."""
        if self._bars:
            self._bars.remove_task(self._task)
            if not self._bars.tasks:
                self._bars.stop()

    def finished(self, timing: StageTiming) -> None:
        """A stage is done."""
        self.abandoned()
        line = f"{timing.name:<16} {timing.seconds:7.1f} s   peak {timing.peak_mib:,.0f} MiB   {timing.note}".rstrip()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def make_display(quiet: bool, as_json: bool = False, verbose: int = 0) -> StageDisplay:
    """Choose how to show progress; beside a JSON object there is none, unless it is asked for.

    Raises:
        UsageError: Both less and more are asked for.
    """
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other.", "Leave one of them out.")
    return StageDisplay(quiet or (as_json and not verbose), verbose)


def say(line: str, end: str = "\n") -> None:
    """Print a part of the result."""
    print(line, end=end, flush=not end)  # noqa: T201


def tell(*lines: str) -> None:
    """Print something beside the result, to standard error."""
    for line in lines:
        print(line, file=sys.stderr)  # noqa: T201


def warn(*warnings: str) -> None:
    """Print warnings, to standard error."""
    tell(*(f"warning: {warning}" for warning in warnings))


def print_json(data: Any, *, one_line: bool = False) -> None:  # noqa: ANN401 - whatever JSON holds
    """Print a result as the one JSON object on standard output."""
    say(json.dumps(data, indent=None if one_line else 2))


def print_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on a terminal, or where that is too narrow for its words a list per row; else tab-separated lines."""
    console = Console()
    cells = [["" if c is None else str(c) for c in row] for row in rows]
    if not console.is_terminal:
        for line in ([*columns], *cells):
            say("\t".join(line))
        return
    if len(columns) > _ALWAYS_A_TABLE and _least_width(columns, cells) > console.width:
        _print_lists(console, title, columns, cells)
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in cells:
        table.add_row(*line)
    console.print(table)


def _least_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Width of a table that breaks lines between words only, with its frame."""
    longest = [
        max(len(word) for cell in column for word in [*cell.split(), ""]) for column in zip(columns, *rows, strict=True)
    ]
    return sum(longest) + 3 * len(columns) + 1


def _print_lists(console: Console, title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Every row by itself, a line per column that says something."""
    if title:
        console.print(title, style="italic", highlight=False, markup=False)
    for row in rows:
        lines = Table(box=None, show_header=False, padding=(0, 1))
        lines.add_column(style="bold", overflow="fold", max_width=console.width // 2)
        lines.add_column(overflow="fold")
        for column, cell in zip(columns, row, strict=True):
            if cell:
                lines.add_row(column, cell)
        console.print(lines)
        console.print()
