"""A converted model in a folder of its own: read back to be trained, written again, and lowered to ONNX."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mla_compile.artifacts.archives import read_folder, write_archive
from mla_compile.artifacts.companions import (
    MODEL,
    completed,
    copy_assets,
    is_converted_folder,
    keep_reports,
    read_assets,
    stored_report,
)
from mla_compile.artifacts.onnx_files import lower_and_check, stored_metadata
from mla_compile.artifacts.places import check_folder, check_neighbours, check_target
from mla_compile.config import REPORT, SETTINGS, CompileConfig
from mla_compile.disk.writing import moved_into, require_possible
from mla_compile.errors import LoadError, UsageError
from mla_compile.passes.quantise_cache import check_quantisable
from mla_compile.plan import LatentPlan
from mla_compile.program import Assets
from mla_compile.progress import Stages
from mla_compile.report import NO_GAIN, Training
from mla_compile.reporting.report_page import (
    PAGE,
    damage_explained,
    read_report,
    render_page,
)
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_halves import halves_bytes
from mla_compile.runtime.onnx_quantised import quantised_bytes

__all__ = ["RECIPE", "Saved", "open_saved", "save", "write_saved_onnx", "write_trained"]

_MEASURED = ("quality", "polish", "verification")
"""What a report says of weights as they were."""
_BEFORE = "before fine-tuning: "
RECIPE = "recipe.yaml"
"""What the settings of a training are called in the folder that it wrote."""
_CHECKED = 24
"""Random tokens per sequence that an ONNX file is compared on."""


@dataclass(frozen=True)
class Saved:
    """What a folder written by ``mla-compile convert`` holds.

    Attributes:
        folder: The folder.
        module: The model.
        assets: Configuration, and where the tokenizer is.
        report: What its conversion did, as stored.
    """

    folder: Path
    module: LatentModel
    assets: Assets
    report: Mapping[str, Any]

    @property
    def longest(self) -> int | None:
        """Longest sequence, if the model says."""
        return self.assets.longest


def open_saved(folder: Path) -> Saved:
    """Read a folder.

    Raises:
        LoadError: It holds no converted model, or something in it is damaged.
    """
    module = read_folder(folder)
    stored = stored_report(folder / MODEL)
    report = read_report(stored) if stored.is_file() else {}
    if "cache" not in report:
        raise LoadError(f"'{folder}' has no report.json of its conversion.", "Convert the model again.")
    with damage_explained(folder):
        render_page(report)  # which reads all of it
        for layer in report["layers"]:
            _plan_of(layer)
    return Saved(folder, module, read_assets(folder), report)


def _plan_of(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The latent shape in what a report says of a layer."""
    return {field.name: layer[field.name] for field in dataclasses.fields(LatentPlan)}


def save(model: LatentModel, folder: str | Path, *, like: str | Path, force: bool = False) -> None:
    """Write a model that was read back with :func:`mla_compile.load`, perhaps after training it.

    Anything unchanged is written to the same bytes.

    Args:
        model: The model.
        folder: A folder that does not exist yet, or an empty one.
        like: The folder that it was read from, whose configuration, tokenizer and report it keeps.
        force: Replace existing files.

    Raises:
        LoadError: ``like`` holds no converted model.
        UsageError: It is no such model; or the folder cannot be written, is not empty, or is the original's.
    """
    if not isinstance(model, LatentModel):
        raise UsageError(
            f"What is to be saved is of type {type(model).__name__}, and no model that mla_compile.load returns.",
            "Pass such a model, or call the method save of what mla_compile.compile returned.",
        )
    source, path = Path(like), Path(folder)
    require_possible(source)
    if not is_converted_folder(source):
        raise LoadError(f"'{source}' holds no converted model.", "Give the folder that the model was read from.")
    check_folder(path, force)
    assets = read_assets(source)
    stored = stored_report(source / MODEL)
    original = read_report(stored).get("source", "") if stored.is_file() else ""
    check_neighbours(path, str(original), assets, force)
    with moved_into(path) as hidden:
        write_archive(model, hidden)
        copy_assets(assets, hidden)
        copies = [(source / SETTINGS, SETTINGS), (stored, REPORT), (stored.with_suffix(".html"), PAGE)]
        for file, name in copies:
            if file.is_file():
                shutil.copyfile(file, hidden / name)
        keep_reports(hidden)


def write_trained(
    saved: Saved, module: LatentModel, training: Training, recipe: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Write a model that was fine-tuned: a folder as the one it came from, with the training in its report.

    Args:
        saved: The model before.
        module: The model now.
        training: What was done.
        recipe: The settings.
        path: The folder; what it holds of the same name is replaced.

    Returns:
        The report.
    """
    earlier = [warning for warning in saved.report["warnings"] if warning != NO_GAIN]  # of a training before this one
    before = _of_weights_before({**saved.report, "warnings": earlier})
    report = {
        **before,
        "training": dataclasses.asdict(training),
        "warnings": [*before["warnings"], *training.warnings],
    }
    with moved_into(path) as folder:
        write_archive(module, folder)
        copy_assets(saved.assets, folder)
        shutil.copyfile(saved.folder / SETTINGS, folder / SETTINGS)
        (folder / RECIPE).write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
        return completed(report, folder)


def _of_weights_before(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report in which nothing that was measured is told of weights that were trained since; it is kept apart."""
    before = report.get("before_training") or {
        **{name: report.get(name) for name in _MEASURED},
        "layers": [layer.get("measured") for layer in report["layers"]],
    }
    told = [f"{_BEFORE}{str(warning).removeprefix(_BEFORE)}" for warning in report["warnings"]]
    layers = [{**layer, "measured": None} for layer in report["layers"]]
    return {**report, **dict.fromkeys(_MEASURED), "layers": layers, "warnings": told, "before_training": before}


def write_saved_onnx(saved: Saved, path: Path, form: CompileConfig, *, force: bool) -> dict[str, Any]:
    """Lower a saved model, verify it in ONNX Runtime, and only then give the file its name.

    Args:
        saved: The model.
        path: The ``.onnx`` file.
        form: What the file is to be: its operator set, its kind and type of cache, and whether it has nodes of ours.
        force: Replace existing files.

    Returns:
        Its report, completed with what was measured on the file.

    Raises:
        RefusedError: A layer's cache cannot be quantised, or has no ONNX form.
        UsageError: The path cannot be written, or what lies beside it is another model's.
        VerificationError: ONNX Runtime computes something else.
    """
    if path.suffix != ".onnx":
        raise UsageError(
            f"'{path}' is not named like an ONNX file.",
            "Name it with the suffix .onnx, or .gguf, or add --format deepseek for the folder of a checkpoint.",
        )
    check_target(path, force)
    check_neighbours(path, saved.report["source"], saved.assets, force, form.cache_layout)
    cache = saved.report["cache"]
    int8 = form.cache_type == "int8"
    halves = form.cache_layout == "genai"
    if int8 or halves:
        graph, rows = saved.module.graph, saved.module.rows
        after = halves_bytes(rows) if halves else quantised_bytes(rows, check_quantisable(graph, rows))
        cache = {**cache, "bytes_per_token_after": after, "ratio": after / cache["bytes_per_token_before"]}
    own = {name: getattr(form, name) for name in ("opset", "cache", "cache_type", "cache_layout", "inline")}
    config = {**saved.report["config"], **own}
    layers = [_plan_of(layer) for layer in saved.report["layers"]]
    sizes = (cache["bytes_per_token_before"], cache["bytes_per_token_after"])
    metadata = stored_metadata(saved.report["source"], config, layers, sizes, saved.assets)
    with moved_into(path.parent) as folder:
        ids = torch.randint(0, saved.module.known_tokens, (2, _CHECKED), generator=torch.Generator().manual_seed(0))
        found, warnings = lower_and_check(
            saved.module, folder / path.name, config, metadata, saved.assets, ids, sizes[1], Stages()
        )
        report = {
            **saved.report,
            "config": config,
            "cache": cache,
            "verification": {**(saved.report["verification"] or {}), **found},
            "warnings": [*saved.report["warnings"], *warnings],
        }
        copy_assets(saved.assets, folder)
        return completed(report, folder)
