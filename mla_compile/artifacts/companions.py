"""What lies beside every result (configuration, tokenizer, report and its page), and by which a folder is told."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mla_compile.config import REPORT, SETTINGS, holds_conversion
from mla_compile.disk.writing import sizes_in
from mla_compile.errors import LoadError, first_line
from mla_compile.program import Assets
from mla_compile.progress import Stages
from mla_compile.report import Report
from mla_compile.reporting.encoder_report import EncoderReport
from mla_compile.reporting.report_page import PAGE, write_report
from mla_compile.reporting.seq2seq_report import Seq2SeqReport
from mla_compile.text.tokenizer_files import tokenizer_files

__all__ = [
    "CHECKPOINT",
    "GENAI_CONFIG",
    "MODEL",
    "MODEL_FILES",
    "OPENED_HERE",
    "completed",
    "copy_assets",
    "displaced",
    "finished",
    "is_converted_folder",
    "keep_reports",
    "read_assets",
    "read_settings",
    "report_of",
    "stored_report",
    "write_settings",
    "written_files",
]

MODEL, GENAI_CONFIG = "model.pt2", "genai_config.json"
"""The model in a converted folder, and what onnxruntime-genai is told beside a file."""
OPENED_HERE = (".onnx", ".plan")
"""Suffixes of files that are run here."""
MODEL_FILES = (".gguf", *OPENED_HERE)
"""Suffixes of files that are a model."""
CHECKPOINT = "model.safetensors"
"""What the weights of a checkpoint are called here, be they in one file or in several."""
_AnyReport = TypeVar("_AnyReport", Report, EncoderReport, Seq2SeqReport)


def is_converted_folder(path: Path) -> bool:
    """Whether a folder was written by :func:`~mla_compile.artifacts.archives.write_folder`."""
    return holds_conversion(path) and (path / MODEL).is_file()


def written_files(folder: Path) -> list[Path]:
    """Files in a folder that are opened by their own names: converted models as ONNX, and engines."""
    return sorted(p for p in folder.glob("*.*") if p.suffix in OPENED_HERE)


def copy_assets(assets: Assets, folder: Path) -> None:
    """Write configuration, generation settings and tokenizer into a folder."""
    for name, content in (("config.json", assets.config), ("generation_config.json", assets.generation)):
        if content:
            (folder / name).write_text(
                json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
            )
    local = assets.local_folder
    if local is not None:
        for file in tokenizer_files(local):
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(local / file, folder / file)
    elif assets.folder is not None:
        from mla_compile.text.corpus import load_tokenizer

        load_tokenizer(assets.folder).save_pretrained(folder)
    elif assets.tokenizer is not None:
        assets.tokenizer.save_pretrained(folder)


def read_assets(folder: Path) -> Assets:
    """Read back what :func:`copy_assets` wrote.

    Raises:
        LoadError: A file is damaged.
    """
    stored = {}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        try:
            stored[name] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise LoadError(f"'{path}' is damaged ({error}).", "Convert the model again.") from error
        if not isinstance(stored[name], dict):
            raise LoadError(f"'{path}' holds no settings.", "Convert the model again.")
    tokenizer = str(folder) if tokenizer_files(folder) else None
    return Assets(tokenizer, stored["config.json"], stored["generation_config.json"])


def write_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Write the settings of a conversion into its folder."""
    (folder / SETTINGS).write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")


def read_settings(folder: Path) -> Mapping[str, Any]:
    """Read back what :func:`write_settings` wrote.

    Raises:
        LoadError: The file is damaged.
    """
    path, reason = folder / SETTINGS, "it holds no settings"
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        found, reason = None, first_line(error)
    if not isinstance(found, dict):
        raise LoadError(f"'{path}' is damaged ({reason}).", "Convert the model again.")
    return found


def finished(report: _AnyReport, folder: Path, stages: Stages) -> _AnyReport:
    """Complete a report with the sizes of what lies in its folder, and write it there.

    Args:
        report: What was done so far.
        folder: A hidden one, in the folder that its files go to.
        stages: What was timed.
    """
    sizes: dict[str, int] = sizes_in(folder)
    report = dataclasses.replace(
        report,
        artifacts=sizes,
        stages=(*report.stages, *stages.timings),
        warnings=(*report.warnings, *displaced(folder.parent, sizes)),
    )
    _write_reports(report.to_dict(), folder)
    return report


def completed(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Complete a report that was stored, as :func:`finished` does one that is new, and write it there.

    Args:
        report: What was done so far.
        folder: A hidden one, in the folder that its files go to.
    """
    sizes = sizes_in(folder)
    warnings = [*report["warnings"], *displaced(folder.parent, sizes)]
    found = {**report, "artifacts": sizes, "warnings": warnings}
    _write_reports(found, folder)
    return found


def _files_of_report(folder: Path) -> Sequence[str]:
    """Names of the models' files that the ``report.json`` of a folder is of, as far as they are still there.

    A checkpoint's are one: :data:`CHECKPOINT`.
    """
    try:
        report: Mapping[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        names = sorted(report["artifacts"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return _models(n for n in names if (folder / n).is_file())


def _models(names: Iterable[str]) -> list[str]:
    """Those of some files that are models, each once."""
    called = (CHECKPOINT if Path(name).suffix == ".safetensors" else name for name in names)
    return sorted({n for n in called if n in (MODEL, CHECKPOINT) or Path(n).suffix in MODEL_FILES})


def displaced(folder: Path, new: Mapping[str, int]) -> Sequence[str]:
    """What to say where new files bring a report to a folder whose report is of others, which stay.

    Args:
        folder: Where the new files go.
        new: Their names, with their sizes.
    """
    others = [name for name in _files_of_report(folder) if name not in _models(new)]
    if not others:
        return ()
    kept = report_of(folder / _first(others))
    return (
        f"report.json and report.html were those of {', '.join(others)}, and are of this conversion now; what they "
        f"were is kept in {kept.name} and {kept.with_suffix('.html').name}",
    )


def report_of(file: Path) -> Path:
    """Where the report of a model's file is kept, when that of a later one took its place beside it."""
    return file.with_name(f"{file.name}.{REPORT}")


def stored_report(file: Path) -> Path:
    """Where the report of a file is, also when another was written beside it since.

    Of a folder it is that of :data:`MODEL`, of a checkpoint that of :data:`CHECKPOINT`.
    """
    kept = report_of(file)
    return kept if kept.is_file() else file.with_name(REPORT)


def _first(files: Sequence[str]) -> str:
    """The one of a conversion's files that the others are named after."""
    return min(files, key=len)


def _write_reports(report: Mapping[str, Any], folder: Path) -> None:
    """Write a report and its page, and what they take the place of under the name of the file that it is of.

    Args:
        report: What was done.
        folder: A hidden one, with the files that the report is of, in the folder that they go to.
    """
    write_report(report, folder)
    keep_reports(folder)


def keep_reports(folder: Path) -> None:
    """Keep what a new report takes the place of, under the name of the file that it is of; and replace what was kept.

    Args:
        folder: A hidden one, with a report and the files that it is of, in the folder that they go to.
    """
    target, new = folder.parent, _models(path.name for path in folder.iterdir())
    others = [name for name in _files_of_report(target) if name not in new]
    pairs = [(target, report_of(folder / _first(others)))] if others else []
    pairs += [(folder, report_of(folder / name)) for name in new if report_of(target / name).is_file()]
    for source, kept in pairs:
        for name, copy in ((REPORT, kept), (PAGE, kept.with_suffix(".html"))):
            if (source / name).is_file():
                shutil.copyfile(source / name, copy)
