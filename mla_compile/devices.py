"""Where a conversion computes: on the processor, or on an accelerator that torch knows.

What a conversion makes, and all that it keeps, is on the processor. One batch of text, one segment of the model, or one
layer that is factorised is on the device while it is computed, so that a device needs room for no whole model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from mla_compile.errors import UsageError, first_line
from mla_compile.progress import machine_memory

__all__ = ["free_memory", "memory_explained", "moved", "on_device", "require_device"]

_Record = TypeVar("_Record")
_Made = TypeVar("_Made")


def require_device(name: str) -> None:
    """Refuse a device that cannot compute what a conversion does.

    Args:
        name: As torch writes it: ``cpu``, ``cuda``, ``cuda:1``, ``xpu``.

    Raises:
        UsageError: torch knows no such device, does not find it, or has no float64 there.
    """
    try:
        torch.ones(1, device=name, dtype=torch.float64).sum().item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise UsageError(
            f"The device '{name}' cannot compute in float64 here ({first_line(error)}).",
            "Name another with --device, such as cuda or cuda:1, or leave it out to compute on the CPU.",
        ) from error


def moved(record: _Record, device: str | torch.device) -> _Record:
    """The same dataclass with its tensors on a device, and those of dataclasses and tuples in it.

    Args:
        record: A dataclass, a tuple or a tensor; anything else is returned as it is.
        device: Where to; what is there already is not copied.
    """
    value: Any = record
    if isinstance(value, Tensor):
        value = value.to(device)
    elif type(value) is tuple:
        parts = tuple(moved(part, device) for part in value)
        value = parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        new_ones = {name: new for name, old in fields.items() if (new := moved(old, device)) is not old}
        value = dataclasses.replace(value, **new_ones) if new_ones else value
    found: _Record = value
    return found


def on_device(device: str, make: Callable[..., _Made], *given: object) -> _Made:
    """Call a function on a device: with what it is given, and what it creates, there.

    Args:
        device: Where to compute.
        make: The function; tensors that it creates without naming a device are on this one.
        *given: Its arguments, moved as :func:`moved` does.

    Returns:
        What it returns, on the processor.
    """
    if torch.device(device).type == "cpu":
        return make(*given)
    with torch.device(device):
        return moved(make(*(moved(value, device) for value in given)), "cpu")


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device, and of the processor's memory all that there can be; None where nobody says."""
    if torch.device(device).type == "cpu":
        return machine_memory()
    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except (RuntimeError, AssertionError, ValueError, AttributeError):
        return None
    return int(free)


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """Say in a sentence that a device has too little memory; also a decorator.

    Raises:
        UsageError: It has.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"The device has too little memory ({first_line(error)}).",
            "Give shorter windows with --seq-len, leave --polish-steps out, or compute on the CPU, without --device.",
        ) from error
