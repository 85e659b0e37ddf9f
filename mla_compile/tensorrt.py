"""From a converted model to a file for TensorRT, checked in ONNX Runtime, and the command that builds an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mla_compile.artifacts import check_target, moved_into, read_folder
from mla_compile.errors import UsageError
from mla_compile.evaluate import relative_error
from mla_compile.passes.lower_tensorrt import lower_to_tensorrt_onnx
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_session import open_session
from mla_compile.verify import require_equal

__all__ = ["engine_command", "write_tensorrt_onnx"]

_OPSET = 23
_CHECKED = (5, 1, 1)
"""Tokens of the steps that are compared: a prompt, and decoding."""


def write_tensorrt_onnx(folder: Path, path: Path, *, splits: int | None, force: bool) -> tuple[tuple[int, ...], float]:
    """Lower a converted model for TensorRT, compare it with the PyTorch module, and only then give the file its name.

    Args:
        folder: Written by ``mla-compile convert MODEL --out FOLDER``.
        path: The ``.onnx`` file.
        splits: Pieces that kernels cut every cache into; None for nodes whose plugin chooses that itself.
        force: Replace existing files.

    Returns:
        Cache row length per layer, and the largest relative difference of logits.

    Raises:
        LoadError: The folder holds no converted model.
        RefusedError: A layer has something that this target does not cover.
        UsageError: The file cannot be written.
        VerificationError: ONNX Runtime computes something else.
    """
    if path.suffix != ".onnx":
        raise UsageError(f"'{path}' is not named like an ONNX file.", "Name it with the suffix .onnx.")
    check_target(path, force)
    model = read_folder(folder)
    with moved_into(path.parent) as hidden:
        target = hidden / path.name
        metadata = {"schema_version": 1, "source": folder.name, "target": "tensorrt"}
        lower_to_tensorrt_onnx(model.graph, model.rows, target, opset=_OPSET, metadata=metadata, splits=splits)  # type: ignore[arg-type]
        error = _difference(model, target)
        require_equal("ONNX Runtime", "the converted PyTorch module", error)
    return model.rows, error


def _difference(model: LatentModel, path: Path) -> float:
    """Largest relative difference of logits between a prompt's and some steps' in ONNX Runtime and in PyTorch."""
    tokens = sum(_CHECKED)
    ids = torch.arange(2 * tokens).view(2, tokens)  # small ids: every vocabulary has them
    with torch.inference_mode():
        expected = model(ids).logits.float()
    session = open_session(path)
    names = [i.name for i in session.get_inputs()]
    caches = [np.zeros((2, tokens + 2, row), np.float32) for row in model.rows]
    done, parts = 0, []
    for part in ids.split(_CHECKED, 1):
        positions = np.tile(np.arange(done, done + part.shape[1]), (2, 1))
        done += part.shape[1]
        fed = {"input_ids": part.numpy(), "lengths": np.full(2, done, np.int32), "position_ids": positions}
        fed |= {f"past_key_values.{i}.latent": cache for i, cache in enumerate(caches)}
        logits, *caches = session.run(None, {name: fed[name] for name in names})
        parts.append(torch.from_numpy(logits))
    return relative_error(torch.cat(parts, 1), expected)


def engine_command(
    path: Path, rows: Sequence[int], batch: int, prompt: int, room: int, library: Path | None = None
) -> str:
    """The command by which TensorRT builds an engine of the file.

    Args:
        path: The file.
        rows: Cache row length per layer.
        batch: Sequences at most.
        prompt: New tokens at most.
        room: Tokens that a cache has room for, always.
        library: Library of plugins; without one the engine has standard operators only.
    """

    def shapes(batch: int, new: int) -> str:
        first = [f"input_ids:{batch}x{new}", f"lengths:{batch}", f"position_ids:{batch}x{new}"]
        return ",".join(first + [f"past_key_values.{i}.latent:{batch}x{room}x{row}" for i, row in enumerate(rows)])

    return (
        f"trtexec --onnx={path} --saveEngine={path.with_suffix('.plan')} --minShapes={shapes(1, 1)} "
        f"--optShapes={shapes(batch, 1)} --maxShapes={shapes(batch, prompt)}"
        + (f" --dynamicPlugins={library}" if library else "")
    )
