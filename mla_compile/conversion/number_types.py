"""Of what type the numbers of a model and of its conversion are, and which cannot be."""

from __future__ import annotations

import torch

from mla_compile.config import CompileConfig
from mla_compile.errors import UsageError
from mla_compile.passes.retype import NARROW, type_name
from mla_compile.program import AnyProgram

__all__ = ["require_float32", "require_known_types", "result_type", "wanted_type"]

_TYPES = (torch.float32, *NARROW)


def require_known_types(program: AnyProgram) -> None:
    """Refuse weights of types that the rewrite, its checks and the cache do not know.

    Raises:
        UsageError: There are some; the first is named.
    """
    for name, value in program.exported.state_dict.items():
        if value.is_floating_point() and value.dtype not in _TYPES:
            kind = type_name(value.dtype)
            raise UsageError(
                f"'{name}' of '{program.source}' is {kind}; only float32, float16 and bfloat16 are converted.",
                "Call model.float() before exporting or converting it.",
            )


def wanted_type(config: CompileConfig) -> torch.dtype | None:
    """The type of the result that was asked for, if any."""
    return None if config.dtype == "auto" else getattr(torch, config.dtype)


def result_type(program: AnyProgram, config: CompileConfig) -> torch.dtype:
    """Type of the result.

    Raises:
        UsageError: The model cannot be had in that type, or its cache not in another.
    """
    # What stock code reads is made of several matrices each: rounded once, by whoever loads it in another type.
    wanted = wanted_type(config) or (torch.float32 if config.for_stock_code else program.dtype)
    own, name = map(type_name, (program.dtype, wanted))
    if wanted not in (program.dtype, torch.float32):
        raise UsageError(
            f"'{program.source}' was exported in {own}, and its graph does not say what {name} must not round.",
            f"Export it in {name} (model.to(torch.{name}) before torch.export.export), or leave --dtype {name} out.",
        )
    if config.for_stock_code and wanted == torch.float16:
        raise UsageError(
            f"The format {config.format} is written in float32 or bfloat16: float16 cannot hold its small latents.",
            "Leave --dtype float16 out.",
        )
    if config.q_rank is not None and wanted != torch.float32:
        raise UsageError(
            f"Rounding queries to {name} gives them more rank than --q-rank {config.q_rank}.",
            f"Leave --dtype {name} or --q-rank out.",
        )
    if config.cache_type != "auto" and wanted != torch.float32:
        raise UsageError(
            f"The cache of a model in {name} holds that type, and {config.cache_type} caches are of float32.",
            f"Leave --cache-type {config.cache_type} out, or pass --dtype float32.",
        )
    if config.cache_layout == "genai" and wanted != torch.float32:
        raise UsageError(
            f"The cache layout genai holds float32, and the model is {name}.",
            "Leave --cache-layout genai out, or pass --dtype float32.",
        )
    return wanted


def require_float32(program: AnyProgram, dtype: torch.dtype, what: str, done: str) -> None:
    """Refuse another type where only float32 will do.

    Raises:
        UsageError: It is of another type.
    """
    if dtype != torch.float32:
        kind = type_name(dtype)
        raise UsageError(
            f"{what} is {done} in float32 only, and '{program.source}' is {kind}.",
            "Pass --dtype float32 (dtype='float32' in Python), or call model.float() before exporting it.",
        )
