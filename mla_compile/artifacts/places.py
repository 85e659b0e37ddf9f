"""Where results may be written: what cannot be is refused before any work is done."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mla_compile.artifacts.companions import GENAI_CONFIG, MODEL_FILES, copy_assets
from mla_compile.config import REPORT
from mla_compile.disk.writing import is_occupied, require_possible, sizes_in
from mla_compile.errors import LoadError, UsageError
from mla_compile.program import Assets
from mla_compile.reporting.report_page import PAGE

__all__ = [
    "check_cache_layout",
    "check_cache_type",
    "check_folder",
    "check_neighbours",
    "check_onnx_options",
    "check_onnx_suffix",
    "check_onnx_target",
    "check_original",
    "check_pair",
    "check_place",
    "check_target",
    "is_named_file",
    "require_file",
]

_SUFFIXES_WITH_DIGITS = ("7z", "bz2", "h5", "mp4", "pt2")
"""Suffixes of files that are not letters alone."""


def check_target(path: Path, force: bool) -> None:
    """Refuse a target that cannot be written, before any work is done.

    Raises:
        UsageError: The name is not one this version writes, exists already, or its folder cannot be written.
    """
    require_possible(path)
    if not path.name:
        raise UsageError(f"'{path}' names no file.", "Name a .onnx file, or a folder.")
    if path.name == ".onnx":
        raise UsageError(f"'{path}' is only a suffix.", "Name a file, such as model.onnx.")
    if is_named_file(path) and path.suffix != ".onnx":
        raise UsageError(
            f"'{path}' does not say what to write: '{path.suffix}' is not known.",
            "Name a .onnx, .plan or .gguf file, or a folder without a suffix.",
        )
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is None:
        raise UsageError(
            "ONNX Runtime, which every ONNX file is checked with, is not installed.",
            "Run: pip install 'mla-compile[cpu]'.",
        )
    if path.suffix == ".onnx" and path.is_dir():
        raise UsageError(f"'{path}' is a folder.", "Name a .onnx file.")
    if path.suffix != ".onnx" and path.exists() and not path.is_dir():
        raise UsageError(f"'{path}' is no folder.", "Name a .onnx file, or a folder.")
    _check_free(path.with_name(f"{path.name}.data"), force)
    check_place(path, force)


def is_named_file(path: Path) -> bool:
    """Whether a name ends like that of a file: in letters after a dot, and not in a version (``llama-3.2-1b``)."""
    ending = path.suffix.removeprefix(".").lower()
    return ending.isalpha() or ending in _SUFFIXES_WITH_DIGITS


def check_cache_type(path: Path, cache_type: str, *, tensorrt: bool = False) -> None:
    """Refuse a quantised cache where caches hold floats: anywhere but in an ONNX file that is not for TensorRT.

    Raises:
        UsageError: It cannot be quantised there.
    """
    if cache_type == "int8" and (tensorrt or path.suffix != ".onnx"):
        raise UsageError(
            f"Only an ONNX file for ONNX Runtime has an int8 cache, and '{path}' is none.",
            "Name a .onnx file without --target tensorrt, or leave --cache-type int8 out; "
            "mla-compile export writes such a file of a folder.",
        )


def check_cache_layout(path: Path, layout: str, *, tensorrt: bool = False) -> None:
    """Refuse another layout than rows anywhere but in an ONNX file that is not for TensorRT.

    Raises:
        UsageError: There is no such layout there.
    """
    if layout != "rows" and (tensorrt or path.suffix != ".onnx"):
        raise UsageError(
            f"Only an ONNX file for ONNX Runtime has the cache layout {layout}, and '{path}' is none.",
            "Name a .onnx file, without --target tensorrt, or leave --cache-layout and --target out.",
        )


def check_onnx_options(path: Path, options: Sequence[str], *, tensorrt: bool = False) -> None:
    """Refuse options of an ONNX file for ONNX Runtime, named as the command line does, where none is written.

    Raises:
        UsageError: There are some.
    """
    if options and (tensorrt or path.suffix != ".onnx"):
        raise UsageError(
            f"{', '.join(options)}: only an ONNX file for ONNX Runtime is written so, and '{path}' is none.",
            "Name a .onnx file without --target tensorrt, or leave it out; mla-compile export writes such a file of a "
            "folder.",
        )


def check_place(path: Path, force: bool) -> None:
    """Refuse a file or folder that cannot be made.

    Raises:
        UsageError: Something exists there already, or its folder cannot be written.
    """
    _check_free(path, force)
    parent = path if path.is_dir() else path.parent
    existing = next((p for p in (parent, *parent.absolute().parents) if p.exists()), None)
    if existing is None or not existing.is_dir():
        raise UsageError(f"The folder of '{path}' cannot be created.", "Choose another folder.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(f"'{existing}' cannot be written ({error.strerror}).", "Choose another folder.") from error


def check_folder(path: Path, force: bool) -> None:
    """Refuse a folder for a model in PyTorch that cannot be made.

    Raises:
        UsageError: It is named like a file, is a file or a link to nothing, is not empty, or cannot be written.
    """
    require_possible(path)
    if is_named_file(path) or path.is_file() or (path.is_symlink() and not path.exists()):
        raise UsageError(f"'{path}' names a file, and a model in PyTorch is a folder.", "Name a folder.")
    check_place(path, force)


def _check_free(path: Path, force: bool) -> None:
    require_possible(path)
    if is_occupied(path) and not force:
        raise UsageError(f"'{path}' exists already.", "Choose another name, or pass --force to replace it.")


def check_pair(path: Path, force: bool) -> None:
    """Refuse targets of an encoder-decoder that cannot be written, before any work is done.

    Raises:
        UsageError: The name is not that of an ONNX file, or one of the two files cannot be written.
    """
    if path.suffix != ".onnx":
        raise UsageError(
            f"'{path}' is not named like an ONNX file, and an encoder-decoder is written as two of them.",
            "Name it with the suffix .onnx.",
        )
    for target in (path, path.with_suffix(".encoder.onnx")):
        check_target(target, force)


def check_original(path: Path, source: str) -> None:
    """Refuse to write into the folder of the original, whatever may be replaced.

    Args:
        path: The file or folder that is written.
        source: Where the original is.

    Raises:
        UsageError: It is that folder.
    """
    require_possible(path)
    folder = _folder_of(path)
    if Path(source).is_dir() and folder.exists() and folder.samefile(source):
        raise UsageError(f"'{folder}' is the folder of the original model.", "Choose another folder.")


def _folder_of(path: Path) -> Path:
    """The folder that a model's files are written to."""
    return path.parent if path.suffix in MODEL_FILES else path


def check_neighbours(path: Path, source: str, assets: Assets, force: bool, layout: str = "rows") -> None:
    """Refuse to put a model's files beside those of another, before any work is done.

    Args:
        path: The file or folder that is written.
        source: Where the original is.
        assets: Configuration and tokenizer that go beside it.
        force: Replace what is there.
        layout: Of its caches: with genai, onnxruntime-genai is told of the file in another beside it.

    Raises:
        UsageError: Configuration, tokenizer or report of something else lies where this model's would go, or it is the
            folder of the original, which is never written to.
    """
    check_original(path, source)
    folder = _folder_of(path)
    if force:
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy_assets(assets, Path(scratch))
        for name in sizes_in(Path(scratch)):
            old = folder / name
            if old.is_file() and old.read_bytes() != (Path(scratch) / name).read_bytes():
                raise _belongs_to_another(old)
    if layout == "genai" and (folder / GENAI_CONFIG).exists():  # of another file, or of one that is gone
        raise _belongs_to_another(folder / GENAI_CONFIG)
    report, page = folder / REPORT, folder / PAGE
    if report.is_file() and not _is_report(report):
        raise _belongs_to_another(report)
    if page.is_file() and not report.is_file():
        raise _belongs_to_another(page)


def check_onnx_suffix(path: Path) -> None:
    """Refuse another name than that of an ONNX file.

    Raises:
        UsageError: It has another suffix.
    """
    if path.suffix != ".onnx":
        raise UsageError(f"'{path}' is not named like an ONNX file.", "Name it with the suffix .onnx.")


def require_file(model: Path) -> None:
    """Refuse a file that is not there, of which another is to be made.

    Raises:
        LoadError: It is not.
    """
    if not model.is_file():
        raise LoadError(f"There is no file '{model}'.", "Convert a model first: mla-compile MODEL --out FILE.onnx.")


def check_onnx_target(path: Path, source: str, assets: Assets, force: bool, layout: str = "rows") -> None:
    """Refuse an ONNX file that cannot be written where it is to go.

    Raises:
        UsageError: As :func:`check_target` and :func:`check_neighbours`, or for another suffix.
    """
    check_target(path, force)
    check_onnx_suffix(path)
    check_neighbours(path, source, assets, force, layout)


def _is_report(path: Path) -> bool:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored.get("kind") == "encoder" or "bytes_per_token_after" in stored["cache"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _belongs_to_another(path: Path) -> UsageError:
    return UsageError(
        f"'{path}' exists already and belongs to something else.",
        "Choose a folder of its own, or pass --force to replace it.",
    )
