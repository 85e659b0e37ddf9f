"""An unconverted model with explicit caches: what a conversion is measured beside, and whether there can be one."""

from __future__ import annotations

import torch

from mla_compile.errors import RefusedError
from mla_compile.passes.insert_latent import LatentGraph, insert_latent
from mla_compile.passes.recognise import plain_layers
from mla_compile.program import Program

__all__ = ["with_plain_caches"]


def with_plain_caches(program: Program) -> LatentGraph:
    """The model with an explicit ordinary cache in every layer.

    Raises:
        RefusedError: A layer is not understood, or something else depends on the sequence starting at 0.
    """
    layers = plain_layers(program)
    unknown = next((layer for layer in layers if layer.plain is None), None)
    if unknown is not None or not layers:
        what = "it has no attention" if unknown is None else f"{unknown.path}: {unknown.reason}"
        raise RefusedError(
            f"'{program.source}' cannot be given an ordinary cache: {what}.",
            "Run 'mla-compile inspect' for the whole table.",
        )
    return insert_latent(program, (), (), torch.float32, layers)
