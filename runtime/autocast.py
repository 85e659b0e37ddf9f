"""Autocast of our operators: beside products in a narrow type, all that an operator reads is of that type too.

torch's own ``register_autocast`` fixes the type when an operator is registered; this one follows the user's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["register_autocast"]

_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
"""Devices, and the dispatch keys that ``torch.autocast`` switches on for them."""


def register_autocast(name: str, operator: Callable[..., Any]) -> None:
    """Have an operator computed in the type of the ``torch.autocast`` that it is called under.

    Args:
        name: Its qualified name.
        operator: The operator.
    """
    for device, key in _DEVICES.items():
        torch.library.impl(name, key, _autocast(operator, device))


def _autocast(operator: Callable[..., Any], device: str) -> Callable[..., Any]:
    def kernel(*given: Any) -> Any:  # noqa: ANN401 - whatever an operator reads
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return operator(*(x.to(dtype) if _is_cast(x, device) else x for x in given))

    return kernel


def _is_cast(value: object, device: str) -> bool:
    """Whether autocast is about a value: torch leaves float64 as it is, and products of it."""
    if not isinstance(value, Tensor) or value.device.type != device:
        return False
    return value.is_floating_point() and value.dtype != torch.float64
