"""``mla-compile quantize``: an ONNX file with weights of eight or four bits, compared with the one it is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mla_compile.artifacts.companions import copy_assets
from mla_compile.artifacts.fuse import is_fused
from mla_compile.artifacts.genai import assets_beside, genai_config_of, with_file, write_config
from mla_compile.artifacts.places import check_onnx_suffix, check_target, require_file
from mla_compile.disk.writing import moved_into
from mla_compile.errors import RefusedError, UsageError, VerificationError
from mla_compile.passes.onnx_export import METADATA_KEY, save
from mla_compile.passes.onnx_pieces import PiecewiseSession
from mla_compile.passes.quantise_weights import WeightType, quantise_weights
from mla_compile.progress import Stages
from mla_compile.runtime.onnx_checksum import require_unchanged
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.text.evaluate import relative_error
from mla_compile.verification.agreement import WHOLE

__all__ = ["QuantisedFile", "write_quantised"]

_SEQUENCES, _TOKENS = 2, 64
"""Random tokens that both files are compared on."""
_BROKEN = 1.0
"""Change of a logit, over the largest, which is that between models that have nothing in common: 0.07 was seen with
four bits, 0.01 with eight; of random weights 0.44 and 0.04."""


@dataclass(frozen=True)
class QuantisedFile:
    """What became of a file.

    Attributes:
        operators: Products, and the look-up of tokens, whose weights are codes now.
        bytes_before: Size of the file, with its ``.data`` file.
        bytes_after: The same of the new one.
        error: Largest change of a logit on random tokens, over the largest logit.
        greedy: Share of the tokens where both have the same most likely next one.
    """

    operators: int
    bytes_before: int
    bytes_after: int
    error: float
    greedy: float


def write_quantised(
    model: Path, out: Path, weights: WeightType, *, force: bool = False, stages: Stages
) -> QuantisedFile:
    """Write a file whose products have weights of fewer bits, by :mod:`mla_compile.passes.quantise_weights`.

    In another folder it gets a copy of the tokenizer and configuration. If onnxruntime-genai is told of the given file,
    another ``genai_config.json`` tells it of the new one.

    Args:
        model: An ONNX file made by this compiler.
        out: The ``.onnx`` file to write.
        weights: Their type.
        force: Replace existing files.
        stages: Times and shows what runs.

    Returns:
        What was measured.

    Raises:
        LoadError: The file is missing or damaged, or is none that :class:`OnnxDecoder` runs.
        RefusedError: It has no products with constant weights.
        UsageError: It cannot be written there, or this ONNX Runtime cannot run the file.
        VerificationError: The new file computes something else.
    """
    check_onnx_suffix(out)
    require_file(model)
    if out.exists() and out.samefile(model):
        raise UsageError(f"'{out}' is the file that is to be read.", "Choose another name.")
    check_target(out, force)
    require_unchanged(model)
    if is_fused(model):
        raise RefusedError(
            f"'{model}' was written by mla-compile fuse.",
            "Give the file that it was made of, and fuse the result.",
        )
    config = genai_config_of(model)
    assets = assets_beside(model, out, force, told=config is not None)
    before = _size(model)
    with stages.stage("run the file"):
        decoder = OnnxDecoder(model, session=PiecewiseSession(model) if before > WHOLE else None)
        generator = torch.Generator().manual_seed(0)
        length = min(_TOKENS, decoder.metadata.get("max_position_embeddings") or _TOKENS)
        ids = torch.randint(decoder.known_tokens, (_SEQUENCES, length), generator=generator)
        expected = _logits(decoder, ids)
        del decoder  # and its memory
    with moved_into(out.parent) as folder:
        with stages.stage("quantise weights"):
            changed = ir.load(model)
            operators = quantise_weights(changed, weights)
            if not operators:
                raise RefusedError(
                    f"'{model}' has no products with weights in float32 or float16: they may be codes already.",
                    "Run the file as it is.",
                )
            kept = json.loads(changed.metadata_props[METADATA_KEY])
            save(changed, folder / out.name, {**kept, "weights": weights})
            del changed
        with stages.stage("compare"):
            got = _logits(OnnxDecoder(folder / out.name), ids)
        error = relative_error(got, expected)
        if not error <= _BROKEN:
            raise VerificationError(
                f"With {weights} weights the logits of '{model}' change by {error:.0%} of the largest.",
                "Keep more bits (--weights int8), or report this with the model's config.json.",
            )
        after = _size(folder / out.name)
        copy_assets(assets, folder)
        if config is not None:
            write_config(with_file(config, out), folder)
    greedy = (got.argmax(-1) == expected.argmax(-1)).double().mean().item()
    return QuantisedFile(operators, before, after, error, greedy)


def _logits(decoder: OnnxDecoder, ids: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(decoder.logits(ids.numpy())))


def _size(file: Path) -> int:
    """Bytes of a file and of its weights beside it."""
    return sum(p.stat().st_size for p in (file, file.with_name(f"{file.name}.data")) if p.is_file())
