"""Read a model from wherever the user has it, and bring it to the one form every pass reads.

Nothing here runs code that came with a model: archives are read where nothing in them is code, checkpoints through
safetensors. A pickled module is only opened when the user says so.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mla_compile.errors import LoadError
from mla_compile.program import AnyProgram, Program
from mla_compile.sources import huggingface
from mla_compile.sources.capture import capture_any
from mla_compile.sources.exported import language_model
from mla_compile.sources.given import require_named, require_unconverted
from mla_compile.sources.model_files import load_file

__all__ = ["load_any", "load_program", "tell_notes"]

_log = logging.getLogger(__name__)


def load_program(
    source: str | Path, *, tokenizer: str | None = None, attention: str = "auto", unsafe: bool = False
) -> Program:
    """Load a causal language model by name; see :func:`load_any`.

    Raises:
        LoadError: The source does not exist, cannot be exported, or is no causal language model.
    """
    return language_model(load_any(source, tokenizer=tokenizer, attention=attention, unsafe=unsafe))


def load_any(
    source: str | Path,
    *,
    tokenizer: str | None = None,
    attention: str = "auto",
    unsafe: bool = False,
    dtype: torch.dtype | None = None,
    tell: bool = True,
) -> AnyProgram:
    """Load a model of any kind by name.

    Args:
        source: A ``torch.export`` archive (``.pt2`` or ``.pt``), a Hugging Face folder, or a hub id.
        tokenizer: Folder or hub id of the tokenizer, when the model does not bring one.
        attention: How a transformers model is to spell its attention: ``sdpa``, ``eager``, or ``auto`` for the first of
            the two that it has.
        unsafe: Unpickle a module saved by ``torch.save``; this runs whatever code the file holds.
        dtype: Type to load it in, where it is not exported yet; its own by default.
        tell: Log what the user should know of how it was read; a report says it too.

    Returns:
        The program, exported without a cache, with dynamic batch and length.

    Raises:
        LoadError: The source does not exist, is not a model, or cannot be exported.
    """
    program = _load(source, tokenizer, attention, unsafe, dtype)
    if tell:
        tell_notes(program)
    return program


def tell_notes(program: AnyProgram) -> None:
    """Log what the user should know of how a model was read."""
    for note in program.notes if isinstance(program, Program) else ():
        _log.warning("%s: %s.", program.source, note)


def _load(
    source: str | Path, tokenizer: str | None, attention: str, unsafe: bool, dtype: torch.dtype | None
) -> AnyProgram:
    path = Path(source)
    require_unconverted(source)
    if path.is_dir():
        return _load_huggingface(str(path), tokenizer, attention, dtype)
    if path.is_file():
        return load_file(path, tokenizer, unsafe, dtype)
    require_named(source)
    return _load_huggingface(str(source), tokenizer, attention, dtype)


def _load_huggingface(name: str, tokenizer: str | None, attention: str, dtype: torch.dtype | None) -> AnyProgram:
    model = huggingface.read_checkpoint(name, attention, dtype)
    try:
        return capture_any(model, None, source=name, tokenizer=tokenizer or name)
    except LoadError as error:
        if attention == "eager" or getattr(model.config, "_attn_implementation", None) == "eager":
            raise
        raise LoadError(error.message, f"{error.remedy} Or try --attn-implementation eager.") from error
