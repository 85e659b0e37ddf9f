"""Pages of mapped files leave this process's memory when a step is done with them, and are read again when needed.

The system drops such pages by itself when memory is short, but until then they count as resident: of a large model, all
of it. What is dropped here stays in the system's cache of files.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

__all__ = ["DroppingInterpreter", "Passing", "drop_pages"]

_Stored = TypeVar("_Stored")

_SMALLEST = 2**16
"""Bytes below which nothing is gained."""
_PAGEMAP = "/proc/self/pagemap"
_ENTRY = 8
"""Bytes of an entry of that file, one per page."""
_PRESENT, _SWAPPED, _OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_DONT_NEED = getattr(mmap, "MADV_DONTNEED", 4)


def drop_pages(values: Iterable[Tensor | NDArray[Any]]) -> None:
    """Drop what is resident of values that are mapped from files and were not written to; others are left alone.

    Nothing is lost: whoever reads them next finds the same numbers. Where the system is not Linux, nothing is done.

    Args:
        values: Tensors and arrays, of any kind and on any device.
    """
    advise = _madvise()
    if advise is None:
        return
    for value in values:
        begin, length = _place(value)
        first, last = -(-begin // mmap.PAGESIZE), (begin + length) // mmap.PAGESIZE
        if length >= _SMALLEST and _is_clean(first, last - first):
            advise(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, _DONT_NEED)


class DroppingInterpreter(fx.Interpreter):
    """Runs a graph node by node, and drops the pages of a weight when a node has read it."""

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - the value of any node
        """See ``torch.fx.Interpreter``."""
        found = super().run_node(n)
        read = (self.env[node] for node in n.all_input_nodes if node.op == "get_attr")
        drop_pages(value for value in read if isinstance(value, Tensor))
        return found


class Passing:
    """Told of one stored value after another, it drops the pages of the one before."""

    def __init__(self) -> None:
        self._last: list[Tensor | NDArray[Any]] = []

    def __call__(self, value: _Stored) -> _Stored:
        """Take note of a value: a tensor, an array, or what holds one as its ``raw``."""
        self.see(value)
        return value

    def see(self, value: object, _: object = None) -> None:
        """The same as a callback of who stores."""
        drop_pages(self._last)
        raw = getattr(value, "raw", value)
        self._last = [raw] if isinstance(raw, Tensor | np.ndarray) else []


def _place(value: Tensor | NDArray[Any]) -> tuple[int, int]:
    """Where a value begins in this process's memory, and bytes until its end; of one that lies elsewhere, nothing.

    What lies between the rows of a view counts as its own: dropping that loses nothing either.
    """
    if isinstance(value, np.ndarray):
        begin, end = np.lib.array_utils.byte_bounds(value)
        return begin, end - begin
    if value.layout != torch.strided or value.device.type != "cpu" or not value.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), (last + 1) * value.itemsize


def _is_clean(first: int, count: int) -> bool:
    """Whether all that is resident of some pages is a file's own: not memory, nor copies that were written to."""
    try:
        with open(_PAGEMAP, "rb", buffering=0) as file:
            file.seek(first * _ENTRY)
            entries = np.frombuffer(file.read(count * _ENTRY), np.uint64)
    except OSError:
        return False
    own = (entries & _SWAPPED != 0) | ((entries & _PRESENT != 0) & (entries & _OF_A_FILE == 0))
    return len(entries) == count and not own.any()


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    with contextlib.suppress(OSError, AttributeError, TypeError), open(_PAGEMAP, "rb"):
        found = ctypes.CDLL(None).madvise
        found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        found.restype = ctypes.c_int
        return found
    return None
