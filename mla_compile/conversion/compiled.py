"""A converted causal language model, and every form in which it can be written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mla_compile.artifacts.archives import write_folder
from mla_compile.artifacts.checkpoint_folder import DEFAULT_SHARD, write_checkpoint
from mla_compile.artifacts.gguf_file import write_gguf
from mla_compile.artifacts.onnx_files import write_onnx
from mla_compile.artifacts.tensorrt import write_compiled
from mla_compile.program import Assets
from mla_compile.progress import Display, Stages
from mla_compile.report import Report
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.tensorrt.engine_builder import EngineSettings

__all__ = ["CompiledModel"]


@dataclass(frozen=True)
class CompiledModel:
    """A converted model.

    Attributes:
        module: The model in PyTorch: callable and trainable, with an explicit latent cache.
        report: What was done.
        assets: Configuration and tokenizer of the original.
        checks: Token ids the ONNX file is checked on, ``[batch, length]``; None when verification was switched off.
    """

    module: LatentModel
    report: Report
    assets: Assets = field(default_factory=Assets)
    checks: Tensor | None = None

    def to_onnx(self, path: str | Path, *, force: bool = False, display: Display | None = None) -> Report:
        """Write the model as ONNX, with configuration, tokenizer and ``report.json`` beside it.

        The file appears under its name only after ONNX Runtime reproduced the PyTorch module with it.

        Args:
            path: A ``.onnx`` file.
            force: Replace existing files.
            display: Shows progress.

        Returns:
            The report, completed with what was measured on the file.

        Raises:
            UsageError: The path cannot be written, or something exists there.
            RefusedError: Something in the model has no ONNX form, or not with the cache that was asked for.
            VerificationError: ONNX Runtime computes something else.
        """
        return write_onnx(self.module, self.report, self.assets, Path(path), self.checks, force, Stages(display))

    def save(self, folder: str | Path, *, force: bool = False) -> Report:
        """Write the PyTorch module (a ``torch.export`` archive) with configuration, tokenizer and report.

        Read it back with :func:`mla_compile.load`.

        Args:
            folder: A folder that does not exist yet, or an empty one.
            force: Replace existing files.

        Raises:
            UsageError: The folder cannot be written, or is not empty.
        """
        return write_folder(self.module, self.report, self.assets, Path(folder), force)

    def to_tensorrt(
        self,
        path: str | Path,
        settings: EngineSettings | None = None,
        *,
        force: bool = False,
        display: Display | None = None,
    ) -> Report:
        """Write the model for TensorRT: an ONNX file whose caches are fixed memory, or an engine with that file beside.

        The file appears under its name only after ONNX Runtime reproduced the PyTorch module with it, and the engine
        only after it reproduced the file.

        Args:
            path: A ``.onnx`` or ``.plan`` file. For a ``.plan`` TensorRT and a GPU are needed.
            settings: Sizes, and how an engine is built.
            force: Replace existing files.
            display: Shows progress.

        Returns:
            The report, completed with what was measured on the files.

        Raises:
            UsageError: Nothing can be written there, or TensorRT or a GPU is missing.
            RefusedError: A layer has something that this target does not cover, or TensorRT does not build an engine.
            VerificationError: ONNX Runtime or the engine computes something else.
        """
        given = settings or EngineSettings()
        return write_compiled(self.module, self.report, self.assets, Path(path), given, force, Stages(display))

    def to_deepseek(
        self,
        folder: str | Path,
        *,
        shard_bytes: int = DEFAULT_SHARD,
        force: bool = False,
        display: Display | None = None,
    ) -> Report:
        """Write the model as a DeepSeek-V3 checkpoint, which stock transformers loads without any code of ours.

        The model must have been converted with ``layout="deepseek"``. The folder appears under its name only after
        stock transformers reproduced the PyTorch module with it.

        Args:
            folder: A folder that does not exist yet, or an empty one.
            shard_bytes: Size of a file of weights, at most.
            force: Replace existing files.
            display: Shows progress.

        Raises:
            UsageError: The folder cannot be written, or is not empty, or the layout is another.
            LoadError: The model has no configuration.
            RefusedError: The model's blocks are not those of such a checkpoint.
            VerificationError: Stock transformers computes something else.
        """
        return write_checkpoint(
            self.module,
            self.report,
            self.assets,
            Path(folder),
            self.checks,
            shard=shard_bytes,
            force=force,
            stages=Stages(display),
        )

    def to_gguf(self, path: str | Path, *, force: bool = False, display: Display | None = None) -> Report:
        """Write the model as a file for llama.cpp, with ``report.json`` beside it.

        The model must have been converted with ``layout="deepseek"``. The file appears under its name only after stock
        transformers, and llama.cpp where llama-cpp-python is installed, reproduced the PyTorch module with it.

        Args:
            path: A ``.gguf`` file.
            force: Replace an existing file.
            display: Shows progress.

        Raises:
            UsageError: The path cannot be written, something exists there, or the layout is another.
            LoadError: The model has no configuration.
            RefusedError: llama.cpp has no place for something in it, or no such tokenizer.
            VerificationError: Stock transformers or llama.cpp computes something else.
        """
        return write_gguf(
            self.module, self.report, self.assets, Path(path), self.checks, force=force, stages=Stages(display)
        )
