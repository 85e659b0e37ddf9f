"""What a conversion can be written as: every target by name, with the place it needs and how it gets there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mla_compile.artifacts.checkpoint_folder import DEFAULT_SHARD, check_folder
from mla_compile.artifacts.gguf_file import check_gguf
from mla_compile.artifacts.places import check_target, is_named_file
from mla_compile.artifacts.tensorrt import check_tensorrt
from mla_compile.conversion.compiled import CompiledModel
from mla_compile.conversion.encoders import CompiledEncoder
from mla_compile.conversion.seq2seq import CompiledSeq2Seq
from mla_compile.errors import UsageError
from mla_compile.progress import Display
from mla_compile.report import Report
from mla_compile.reporting.encoder_report import EncoderReport
from mla_compile.reporting.seq2seq_report import Seq2SeqReport
from mla_compile.runtime.tensorrt.engine_builder import EngineSettings

__all__ = ["TARGETS", "Destination", "Target", "target_of", "write"]


@dataclass(frozen=True)
class Destination:
    """Where a conversion goes.

    Attributes:
        path: A file or folder.
        format: The setting ``format``: ``auto`` is what the name says.
        engine: What it is built for, if it is for TensorRT.
        shard_bytes: Size of a file of weights in a checkpoint, at most.
        force: Whether existing files may be replaced.
    """

    path: Path
    format: str = "auto"
    engine: EngineSettings | None = None
    shard_bytes: int = DEFAULT_SHARD
    force: bool = False


@dataclass(frozen=True)
class Target:
    """One thing that a causal language model can be written as.

    Attributes:
        check: Refuses, before any work is done, a path where it cannot be written; the flag lets it replace files.
        write: Writes it, checks it, and completes its report.
    """

    check: Callable[[Path, bool], None]
    write: Callable[[CompiledModel, Destination, Display | None], Report]


def _check_named_folder(path: Path, force: bool) -> None:
    if is_named_file(path):
        raise UsageError(f"'{path}' names a file, and the format hf is a folder.", "Name a folder without a suffix.")
    check_target(path, force)


def _write_onnx(compiled: CompiledModel, to: Destination, display: Display | None) -> Report:
    return compiled.to_onnx(to.path, force=to.force, display=display)


def _write_folder(compiled: CompiledModel, to: Destination, display: Display | None) -> Report:
    return compiled.save(to.path, force=to.force)


def _write_deepseek(compiled: CompiledModel, to: Destination, display: Display | None) -> Report:
    return compiled.to_deepseek(to.path, shard_bytes=to.shard_bytes, force=to.force, display=display)


def _write_gguf(compiled: CompiledModel, to: Destination, display: Display | None) -> Report:
    return compiled.to_gguf(to.path, force=to.force, display=display)


def _write_tensorrt(compiled: CompiledModel, to: Destination, display: Display | None) -> Report:
    return compiled.to_tensorrt(to.path, to.engine, force=to.force, display=display)


TARGETS: Mapping[str, Target] = {
    "onnx": Target(check_target, _write_onnx),
    "folder": Target(check_target, _write_folder),
    "hf": Target(_check_named_folder, _write_folder),
    "deepseek": Target(check_folder, _write_deepseek),
    "gguf": Target(check_gguf, _write_gguf),
    "tensorrt": Target(check_tensorrt, _write_tensorrt),
}


def target_of(to: Destination) -> Target:
    """What is written at a destination."""
    if to.engine is not None:
        return TARGETS["tensorrt"]
    if to.format != "auto":
        return TARGETS[to.format]
    return TARGETS["onnx" if to.path.suffix == ".onnx" else "folder"]


def write(
    compiled: CompiledModel | CompiledEncoder | CompiledSeq2Seq, to: Destination, display: Display | None = None
) -> Report | EncoderReport | Seq2SeqReport:
    """Write a conversion.

    Args:
        compiled: The converted model.
        to: Where it goes.
        display: Shows progress.

    Returns:
        Its report, completed with what was measured on the files.

    Raises:
        UsageError: Nothing can be written there.
        RefusedError: The target has no place for something in the model.
        VerificationError: What was written computes something else.
    """
    if isinstance(compiled, CompiledModel):
        return target_of(to).write(compiled, to, display)
    if to.path.suffix == ".onnx":
        return compiled.to_onnx(to.path, force=to.force, display=display)
    return compiled.save(to.path, force=to.force)
