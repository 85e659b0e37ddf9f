"""Tensors that lie on disk while they are not used: mapped from files, so that the system may drop them from memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mla_compile.disk.writing import explained, own_folder

__all__ = ["Shelf", "spilled"]

_Record = TypeVar("_Record")


def spilled(record: _Record, folder: Path | None) -> _Record:
    """The same dataclass with its tensors mapped from a file that has no name any more, and goes when they go.

    What is written to them later stays in memory.

    Args:
        record: A dataclass; only tensors that are fields of its own are written.
        folder: Where the file is; None to leave everything in memory.

    Raises:
        UsageError: It cannot be written.
    """
    if folder is None:
        return record
    values = {f.name: getattr(record, f.name) for f in fields(record)}  # type: ignore[arg-type]
    tensors = {name: value.detach().contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with own_folder(folder) as own:
            path = own / "tensors"
            save_file(tensors, path)
            with safe_open(path, "pt") as file:
                mapped: dict[str, Any] = {name: file.get_tensor(name) for name in tensors}
    return replace(record, **mapped)  # type: ignore[type-var]


class Shelf(Generic[_Record]):
    """Records of many layers that grow one at a time: only the one that was asked for last is in memory.

    Args:
        make: Makes the record of a layer when it is asked for first.
        folder: Where the others are; None for memory.
    """

    def __init__(self, make: Callable[[int], _Record], folder: Path | None) -> None:
        self._make, self._folder = make, folder
        self._held: dict[int, _Record] = {}
        self._open: int | None = None

    def at(self, number: int) -> _Record:
        """The record of a layer, to be changed in place until another is asked for."""
        if self._open not in (None, number):
            assert self._open is not None
            self._held[self._open] = spilled(self._held[self._open], self._folder)
        if number not in self._held:
            self._held[number] = self._make(number)
        self._open = number
        return self._held[number]

    def take(self, number: int) -> _Record:
        """The record of a layer, which is not kept any more."""
        found = self.at(number)
        self._open = None
        del self._held[number]
        return found
