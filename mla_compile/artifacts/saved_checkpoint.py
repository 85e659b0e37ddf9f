"""A converted model that was saved, and perhaps fine-tuned since, as a DeepSeek checkpoint or a file for llama.cpp."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla_compile.artifacts.blueprint import read_blueprint
from mla_compile.artifacts.checkpoint_folder import DEFAULT_SHARD, new_checkpoint
from mla_compile.artifacts.companions import completed
from mla_compile.artifacts.gguf_file import UNCHECKED, check_gguf, write_and_check
from mla_compile.artifacts.places import check_neighbours
from mla_compile.artifacts.saved import Saved
from mla_compile.disk.writing import moved_into
from mla_compile.errors import UsageError
from mla_compile.program import Assets
from mla_compile.progress import Stages
from mla_compile.reporting.report_page import damage_explained

__all__ = ["write_saved_checkpoint", "write_saved_gguf"]


def write_saved_checkpoint(
    saved: Saved, path: Path, *, preset: str = "none", shard: int = DEFAULT_SHARD, force: bool = False, stages: Stages
) -> dict[str, Any]:
    """Write a saved model as a stock DeepSeek-V3 checkpoint; the folder is there only when the check passed.

    Args:
        saved: The model, which was converted with ``layout="deepseek"``.
        path: The folder.
        preset: ``flashmla`` fills latent and rope key up with zeros to the sizes of its kernels.
        shard: Bytes per file of weights, at most; a larger tensor has a file of its own.
        force: Replace existing files.
        stages: Times and shows what runs.

    Returns:
        Its report, completed with what was measured on the checkpoint.

    Raises:
        UsageError: The folder cannot be written, is the model's own, or the model was converted with another layout.
        LoadError: The model has no configuration, or its report is damaged.
        RefusedError: Its blocks are not those of such a checkpoint, or it is larger than the preset.
        VerificationError: Stock transformers computes something else.
    """
    if path.exists() and path.samefile(saved.folder):
        raise UsageError(f"'{path}' is the folder of the converted model.", "Choose another folder.")
    report = _settled(saved, "deepseek", preset)
    with damage_explained(saved.folder):
        blueprint = read_blueprint(report)
    with new_checkpoint(
        saved.module, blueprint, report, saved.assets, path, None, shard=shard, force=force, stages=stages
    ) as made:
        facts = dataclasses.asdict(made.facts)
        return completed({**report, "checkpoint": facts, "warnings": [*report["warnings"], *made.notes]}, made.folder)


def write_saved_gguf(
    saved: Saved, path: Path, *, preset: str = "none", force: bool = False, stages: Stages
) -> dict[str, Any]:
    """Write a saved model as a file for llama.cpp; it is there only when the checks passed.

    Args:
        saved: The model, which was converted with ``layout="deepseek"``.
        path: The ``.gguf`` file.
        preset: As for :func:`write_saved_checkpoint`.
        force: Replace an existing file.
        stages: Times and shows what runs.

    Returns:
        Its report, completed with what was measured on the file.

    Raises:
        UsageError: The file cannot be written, or the model was converted with another layout.
        LoadError: The model has no configuration, or its report is damaged.
        RefusedError: Its blocks are not those of such a checkpoint, or llama.cpp would compute something else.
        VerificationError: Stock transformers or llama.cpp computes something else.
    """
    check_gguf(path, force)
    source = str(saved.report["source"])
    check_neighbours(path, source, Assets(), force)
    with moved_into(path.parent) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            checkpoint = Path(scratch) / "checkpoint"
            facts = write_saved_checkpoint(saved, checkpoint, preset=preset, stages=stages)["checkpoint"]
            error = write_and_check(checkpoint, folder / path.name, Path(source).name, stages)
        facts = {**facts, "llama_cpp_error": error, "caveats": []}
        report = _settled(saved, "gguf", preset)
        warnings = [*report["warnings"], *(() if error is not None else (UNCHECKED,))]
        return completed({**report, "checkpoint": facts, "warnings": warnings}, folder)


def _settled(saved: Saved, form: str, preset: str) -> Mapping[str, Any]:
    """The report of a saved model, with what its new form was asked for."""
    return {**saved.report, "config": {**saved.report["config"], "format": form, "preset": preset}}
