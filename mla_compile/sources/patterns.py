"""New spellings of attention, taught by the user: what an operator means, in ordinary PyTorch.

Recognition reads any mixture of ordinary operators, so all it needs to know of an operator it has never seen (a fused
kernel of one's own, a call into another library) is a function that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mla_compile.errors import UsageError

__all__ = ["patterns", "register_pattern"]

_MEANINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


def register_pattern(operator: torch._ops.OpOverload | str, meaning: Callable[..., Any]) -> Callable[[], None]:
    """Teach the compiler what an operator means, for every model loaded from then on.

    Args:
        operator: A dispatcher operator, ``torch.ops.mylib.attention.default``, or its name, ``"mylib::attention"``.
        meaning: Takes the operator's arguments and returns its results, written with ordinary PyTorch operations
            (``torch.nn.functional.scaled_dot_product_attention``, matmul, softmax, ...) for any batch and length.

    Returns:
        A function that undoes this.

    Raises:
        UsageError: There is no such operator, or ``meaning`` cannot be called.

    Example::

        import mla_compile
        from torch.nn.functional import scaled_dot_product_attention


        def meaning(q, k, v):
            return scaled_dot_product_attention(q, k, v, is_causal=True)


        mla_compile.register_pattern("mylib::flash_attention", meaning)
    """
    if not callable(meaning):
        raise UsageError(
            f"The meaning of '{operator}' is a {type(meaning).__name__}, which cannot be called.",
            "Give a function of the operator's arguments.",
        )
    found = _resolve(operator)
    _MEANINGS[found] = meaning
    return lambda: _forget(found, meaning)


def patterns() -> Mapping[torch._ops.OpOverload, Callable[..., Any]]:
    """What is registered at present, in the form of a decomposition table."""
    return dict(_MEANINGS)


def _forget(operator: torch._ops.OpOverload, meaning: Callable[..., Any]) -> None:
    if _MEANINGS.get(operator) is meaning:
        del _MEANINGS[operator]


def _resolve(operator: torch._ops.OpOverload | str) -> torch._ops.OpOverload:
    found: Any = operator
    if isinstance(operator, str):
        namespace, _, name = operator.partition("::")
        name, _, overload = name.partition(".")
        found = getattr(getattr(torch.ops, namespace), name, None) if namespace and name else None
        found = getattr(found, overload or "default", None) if found is not None else None
    if isinstance(found, torch._ops.OpOverloadPacket):
        found = getattr(found, "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        raise UsageError(
            f"There is no operator '{operator}'.",
            'Import the package that defines it first, and name it "namespace::operator" or '
            '"namespace::operator.overload".',
        )
    return found
