"""A model from wherever it is, given in Python or named; and what has to be known of it before it is converted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from mla_compile.artifacts.places import check_neighbours
from mla_compile.conversion.number_types import require_known_types, result_type, wanted_type
from mla_compile.conversion.request import ModelSource, Session
from mla_compile.passes.retype import type_name
from mla_compile.program import AnyProgram
from mla_compile.sources import frontend
from mla_compile.sources.capture import capture, capture_any
from mla_compile.sources.checkpoint_files import require_finite
from mla_compile.sources.exported import assets_of, read_export
from mla_compile.text.corpus import special_tokens

__all__ = ["load_original", "load_source"]


def load_source(source: ModelSource, *, any_kind: bool, dtype: torch.dtype | None = None) -> AnyProgram:
    """Read a model; what the user should know of how it was read is in its notes, and was not told.

    Args:
        source: The model.
        any_kind: Whether it may be other than a causal language model. A module whose inputs are given is taken with
            other inputs than token ids only then.
        dtype: Type to read it in; its own by default.

    Raises:
        LoadError: The model cannot be read.
    """
    tokenizer = source.tokenizer
    folder = str(tokenizer) if isinstance(tokenizer, str | Path) else None
    program = _read(source, folder, any_kind=any_kind, dtype=dtype)
    if folder is not None or tokenizer is None:
        return program
    ends = {name: value for name, value in program.assets.generation.items() if value is not None}
    assets = dataclasses.replace(
        program.assets, folder=None, tokenizer=tokenizer, generation=special_tokens(tokenizer) | ends
    )
    return dataclasses.replace(program, assets=assets)


def _read(source: ModelSource, tokenizer: str | None, *, any_kind: bool, dtype: torch.dtype | None) -> AnyProgram:
    """Read a model whose tokenizer, if one was given, lies in a folder."""
    model, example = source.model, source.example_inputs
    example = (example,) if isinstance(example, Tensor) else example
    if isinstance(model, str | Path):
        return frontend.load_any(
            model, tokenizer=tokenizer, attention=source.attention, unsafe=source.unsafe, dtype=dtype, tell=False
        )
    if isinstance(model, ExportedProgram):
        return read_export(model, source="ExportedProgram", assets=assets_of(tokenizer, None), in_memory=True)
    taken = capture_any if any_kind or example is None else capture
    return taken(model, example, tokenizer=tokenizer, dtype=dtype)


def load_original(session: Session) -> tuple[AnyProgram, Session]:
    """Read the model of a conversion, and settle the type of the result.

    Returns:
        The model, whose configuration names the type of the result; and the conversion, whose setting does.

    Raises:
        LoadError: The model cannot be read, or has weights that are no numbers.
        UsageError: It cannot be had in the type that was asked for, or the result cannot lie where it is to go.
    """
    request = session.request
    config, to = request.config, request.destination
    with session.stages.stage("load"):
        loaded = load_source(request.source, any_kind=config.encoders, dtype=wanted_type(config))
    require_known_types(loaded)
    # Of buffers, masks hold infinities by intent.
    require_finite(dict(loaded.exported.named_parameters()), loaded.source)
    config = config.model_copy(update={"dtype": type_name(result_type(loaded, config))})
    if "dtype" in loaded.assets.config:  # what lies beside the result says what that is in
        stored = {**loaded.assets.config, "dtype": config.dtype}
        loaded = dataclasses.replace(loaded, assets=dataclasses.replace(loaded.assets, config=stored))
    if to is not None:
        check_neighbours(to.path, loaded.source, loaded.assets, to.force, config.cache_layout)
    return loaded, dataclasses.replace(session, request=dataclasses.replace(request, config=config))
