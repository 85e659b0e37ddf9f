"""Export a module with dynamic batch and length."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from mla_compile.errors import LoadError
from mla_compile.program import AnyProgram, Program
from mla_compile.sources import huggingface
from mla_compile.sources.exported import assets_of, language_model, read_export, require_integers
from mla_compile.sources.exporting import export_module

__all__ = ["capture", "capture_any"]


def capture(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    *,
    source: str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
) -> Program:
    """Export a causal language model with dynamic batch and length.

    Args:
        module: Token ids ``[batch, length]`` in, logits ``[batch, length, vocabulary]`` out. It is exported in
            evaluation mode without a cache, and left as it was.
        example_inputs: Positional or keyword inputs; a batch of one is repeated, because an exporter takes a size of
            one for a constant. None is enough for a transformers model.
        source: The path or hub id that it was read from, which reports call it by; None for its class.
        tokenizer: Folder or hub id of the tokenizer, if the module does not know it.
        dtype: A narrower type to export a copy of it in.

    Raises:
        LoadError: The module cannot be exported with dynamic shapes, or is no causal language model.
    """
    if example_inputs is not None:
        _require_ids(module, example_inputs, source or type(module).__name__)
    return language_model(capture_any(module, example_inputs, source=source, tokenizer=tokenizer, dtype=dtype))


def capture_any(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    *,
    source: str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
) -> AnyProgram:
    """Export a module of any kind: the batch becomes dynamic, and so do the lengths of integer inputs.

    Of float inputs, the second axis of three is dynamic where the module allows it, and all others are fixed.

    Arguments are those of :func:`capture`; ``dtype`` is a narrower type to export a copy of the module in.

    Raises:
        LoadError: The module cannot be exported with dynamic shapes.
    """
    in_memory, source = source is None, source or type(module).__name__
    if example_inputs is None:
        if not huggingface.is_transformers_model(module):
            raise LoadError(
                f"{source} was given without example_inputs.",
                "Pass token ids to export it with, e.g. (torch.zeros(2, 8, dtype=torch.long),).",
            )
        example_inputs = huggingface.plain_inputs(module)
    if dtype in (torch.float16, torch.bfloat16):
        module = _narrowed(module, dtype)
    config = getattr(module, "config", None)
    known = huggingface.is_transformers_model(module)
    if known and getattr(config, "_attn_implementation", None) == "flex_attention":
        raise LoadError(
            f"{source} attends by flex_attention, whose mask and scores are functions, which are not read.",
            "Call model.set_attn_implementation('sdpa') first.",
        )
    keyword = isinstance(example_inputs, Mapping)
    values = {k: _enlarge(v) for k, v in example_inputs.items()} if keyword else tuple(map(_enlarge, example_inputs))  # type: ignore[union-attr]
    shapes = {k: _dynamic(v) for k, v in values.items()} if isinstance(values, dict) else tuple(map(_dynamic, values))
    with _evaluating(module), huggingface.without_cache(module):
        exported = export_module(module, values, shapes, source)
    positions = getattr(config, "max_position_embeddings", None)
    assets = huggingface.assets_of(module, tokenizer) if known else assets_of(tokenizer, None)
    return read_export(exported, source=source, assets=assets, max_positions=positions, in_memory=in_memory)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and every part of it back into its own."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


def _narrowed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another type, or the module itself if it is of that already.

    Of transformers' models only what is saved with a model is rounded, as when it is loaded in that type: rotary
    frequencies are not, and stay what they are.
    """
    if {value.dtype for value in module.parameters() if value.is_floating_point()} <= {dtype}:
        return module
    module = copy.deepcopy(module)
    if not huggingface.is_transformers_model(module):
        return module.to(dtype)
    for value in module.state_dict(keep_vars=True).values():
        if value.is_floating_point():
            value.data = value.data.to(dtype)
    return module


def _require_ids(module: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any], source: str) -> None:
    """Refuse inputs that are not token ids, a padding mask or positions before torch stumbles over them."""
    if isinstance(example_inputs, Mapping):
        named = dict(example_inputs)
    else:
        parameters = list(inspect.signature(module.forward).parameters)
        named = dict(zip([*parameters, *map(str, range(len(example_inputs)))], example_inputs, strict=False))
    for name, value in named.items():
        if isinstance(value, Tensor):
            require_integers(name, value, source)


def _enlarge(value: Any) -> Any:  # noqa: ANN401 - any model input
    """Make an example big enough that no dynamic size is mistaken for a constant 0 or 1."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    for dim, least in ((0, 2), (1, 3)):
        if (dim == 0 or not value.is_floating_point()) and value.shape[dim] < least:
            value = torch.cat([value] * least, dim)
    return value.clone()  # a view would be exported with guards on the tensor it views


def _dynamic(value: Any) -> Any:  # noqa: ANN401 - mirrors any model input
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None
    if not value.is_floating_point():
        return {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return {0: Dim.DYNAMIC, 1: Dim.AUTO} if value.dim() == 3 else {0: Dim.DYNAMIC}
