"""Help on a narrow terminal: every option in a line of its own, with what it does below, instead of columns."""

from __future__ import annotations

import functools
import shutil
from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["NarrowCommand", "NarrowGroup", "narrow_width"]

_TABLE = 60
"""Characters of the narrowest terminal in which the columns of the usual help can be read."""
_INDENT = 4
"""Characters that descriptions are indented by."""
_SENTENCE = 1000
"""Characters of what is said of a command in one sentence, at most."""


def narrow_width() -> int | None:
    """Characters of a line of the terminal, where it is too narrow for columns; else None."""
    columns = shutil.get_terminal_size().columns
    return columns if columns < _TABLE else None


def _stacked(formatter: Any) -> Any:  # noqa: ANN401 - typer keeps the class to itself
    """A formatter of plain help that writes descriptions below their terms."""
    formatter.write_dl = functools.partial(formatter.write_dl, col_max=0, col_spacing=_INDENT)
    return formatter


class NarrowCommand(TyperCommand):
    """A command whose plain help is a list."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - see _stacked
        """Write the help."""
        super().format_help(ctx, _stacked(formatter))


class NarrowGroup(TyperGroup):
    """A group of commands whose plain help is a list."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - see _stacked
        """Write the help."""
        super().format_help(ctx, _stacked(formatter))

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - see _stacked
        """Write all commands, each with its whole first sentence."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, command.get_short_help_str(_SENTENCE)) for name, command in commands.items() if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
