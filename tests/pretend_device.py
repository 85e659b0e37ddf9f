"""A device ``pretend``: it computes on the processor, but refuses tensors that are there, as accelerators do.

Importing this registers the device in the whole process, for good: do so in one of its own. A tensor of the device
wraps one of the processor. Whatever meets it must be on the device too, but for numbers without axes, sources of copies
and indices, which accelerators take as well; results are the processor's own, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

__all__ = ["NAME", "SEEN", "Pretended"]

NAME = "pretend"
_FROM_ANYWHERE = frozenset({"_to_copy", "copy_", "index", "index_put_", "index_put", "_index_put_impl_"})
"""Operators that take a tensor of the processor beside those of an accelerator."""
SEEN: Counter[str] = Counter()
"""How often each operator ran on the device."""


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, _Backend())


class Pretended(Tensor):
    """A tensor of the device.

    Attributes:
        held: The same numbers on the processor.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        found: Pretended = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            requires_grad=held.requires_grad,
        )
        found.held = held
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, given)) if isinstance(value, Tensor)]
        name = operator.overloadpacket.__name__
        strangers = [value for value in tensors if not isinstance(value, Pretended) and value.dim()]
        if strangers and name not in _FROM_ANYWHERE:
            raise RuntimeError(f"{operator} got tensors on the processor and on the device '{NAME}'")
        here = torch.device(given["device"]).type == NAME if given.get("device") is not None else True
        here = here and not (name == "copy_" and not isinstance(args[0], Pretended))
        if "device" in given:
            given["device"] = "cpu"
        own_args, own_given = tree_map_only(Pretended, lambda value: value.held, (args, given))
        made = operator(*own_args, **own_given)
        SEEN[name] += 1
        written = [a for a, about in zip(args, operator._schema.arguments, strict=False) if _is_written(about)]
        written += [
            v for n, v in (kwargs or {}).items() if any(a.name == n and _is_written(a) for a in _arguments(operator))
        ]
        if written and isinstance(made, Tensor):
            return written[0]
        # What a conjugate is of is the wrapped tensor's secret.
        return (
            tree_map_only(Tensor, lambda value: Pretended(value.resolve_conj().resolve_neg()), made) if here else made
        )


def _arguments(operator: Any) -> Sequence[Any]:
    found: Sequence[Any] = operator._schema.arguments
    return found


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _empty(size: Sequence[int], *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return Pretended(torch.empty(size, dtype=dtype, device="cpu"))


def _empty_strided(size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **_: Any) -> Tensor:
    return Pretended(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    held = [value.held if isinstance(value, Pretended) else value for value in (source, to)]
    held[1].copy_(held[0])
    return to


def _creator(operator: Any) -> Callable[..., Tensor]:
    """A kernel that creates what the processor does: those that grow what they write to cannot here."""

    def created(*args: Any, **kwargs: Any) -> Tensor:
        return Pretended(operator(*args, **{**kwargs, "device": "cpu"}))

    return created


_aten = torch.ops.aten
_LIBRARY = torch.library.Library("aten", "IMPL")  # kept: its kernels go with it
for _operator in (_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.eye.default, _aten.eye.m):
    _LIBRARY.impl(_operator.name().removeprefix("aten::"), _creator(_operator), "PrivateUse1")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
