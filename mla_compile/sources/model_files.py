"""Models in files: ``torch.export`` archives, and pickled modules where the user says so."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from mla_compile.errors import LoadError, reason_of
from mla_compile.program import AnyProgram
from mla_compile.sources import huggingface
from mla_compile.sources.archive_guard import load_data_only
from mla_compile.sources.capture import capture_any
from mla_compile.sources.checkpoint_files import has_weights
from mla_compile.sources.exported import HOW_TO_EXPORT, assets_of, read_export
from mla_compile.sources.given import require_values

__all__ = ["load_file"]

_WEIGHTS = (".safetensors", ".bin", ".pth", ".index.json")
"""What names of files with a checkpoint's weights, or with their places, end in."""


def load_file(path: Path, tokenizer: str | None, unsafe: bool, dtype: torch.dtype | None) -> AnyProgram:
    """Load a model from a file; see :func:`~mla_compile.sources.frontend.load_any`.

    Raises:
        LoadError: It holds no model, is damaged, or is a pickled module and ``unsafe`` was not given.
    """
    if not unsafe and path.name.endswith(_WEIGHTS) and (path.parent / "config.json").is_file():
        raise LoadError(
            f"'{path}' holds weights alone, and the model is the folder it is in.", f"Give the folder: {path.parent}."
        )
    if path.suffix == ".json" and (path.parent / "config.json").is_file():
        raise _no_weights(path)
    try:
        path.open("rb").close()
    except OSError as error:
        raise LoadError(f"'{path}' cannot be read ({error.strerror}).", "Give yourself access to it.") from error
    if not zipfile.is_zipfile(path):
        kind = "is truncated or not a torch.export archive" if path.suffix in (".pt", ".pt2") else "is not a model"
        raise LoadError(f"'{path}' {kind}.", HOW_TO_EXPORT)
    try:
        with zipfile.ZipFile(path) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except Exception as error:  # of a name, a size, a method or a flag that is none: each is another error
        reason = reason_of(error)
        raise LoadError(f"'{path}' is a damaged archive ({reason}).", "Copy or export it again.") from error
    if damaged is not None:
        raise LoadError(f"'{path}' is a damaged archive ('{damaged}' in it).", "Copy or export it again.")
    if any(n.endswith("archive_format") or n.endswith("serialized_exported_program.json") for n in names):
        exported = _read_archive(path, unsafe)
        return read_export(exported, source=str(path), assets=assets_of(tokenizer, path.parent))
    if any("/code/" in n for n in names):
        raise LoadError(f"'{path}' is a TorchScript file, whose graph cannot be rewritten.", HOW_TO_EXPORT)
    if any(n.endswith("data.pkl") for n in names):
        return _load_pickle(path, tokenizer, unsafe, dtype)
    raise LoadError(f"'{path}' is an archive but holds no model.", HOW_TO_EXPORT)


def _no_weights(path: Path) -> LoadError:
    """What to say of a configuration, or of another of a model's small files."""
    if has_weights(path.parent):
        return LoadError(
            f"'{path}' holds no weights; the model is the folder it is in.", f"Give the folder: {path.parent}."
        )
    return LoadError(
        f"'{path}' holds no weights, and there are none beside it.",
        "Give a folder with weights; mla-compile plan and inspect need none.",
    )


def _read_archive(path: Path, unsafe: bool) -> ExportedProgram:
    """Read a ``torch.export`` archive; the reason for a failure is found only in torch's log."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                # A transformers model returns its own classes, which torch knows once their module is imported.
                content = archive.read(name)
                for module in set(re.findall(rb'"(transformers\.[a-z0-9_.]+)\.[A-Z]', content)):
                    with contextlib.suppress(ImportError):  # then the archive does not load, and says why
                        importlib.import_module(module.decode())
                if b"transformers.cache_utils." in content:
                    raise LoadError(
                        f"'{path}' takes or returns a transformers cache object, which cannot be read back.",
                        "Export the model again with model.config.use_cache = False.",
                    )
    reasons: list[BaseException] = []
    keep = logging.Handler()
    keep.emit = lambda record: reasons.extend(filter(None, (record.exc_info or ())[1:2]))  # type: ignore[method-assign]
    logger = logging.getLogger("torch.export")
    propagate, logger.propagate = logger.propagate, False
    handlers, logger.handlers = logger.handlers, [keep]
    try:
        return torch.export.load(path) if unsafe else load_data_only(path, str(path))
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"'{path}' could not be read as a torch.export archive ({reason_of((reasons or [error])[-1])}).",
            f"Export it again with torch {torch.__version__.split('+')[0]}.",
        ) from error
    finally:
        logger.propagate, logger.handlers = propagate, handlers


def _load_pickle(path: Path, tokenizer: str | None, unsafe: bool, dtype: torch.dtype | None) -> AnyProgram:
    try:
        weights = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        if not unsafe:
            raise LoadError(
                f"'{path}' is a pickled module, and unpickling runs whatever code the file holds.",
                f"{HOW_TO_EXPORT} Or pass --unsafe-load if you trust the file.",
            ) from error
        try:
            weights = torch.load(path, weights_only=False, map_location="cpu")
        except Exception as failure:
            raise LoadError(
                f"'{path}' could not be unpickled ({reason_of(failure)}).",
                "Run it where the model's own code can be imported, or copy the file again.",
            ) from failure
    if not isinstance(weights, nn.Module):
        raise LoadError(f"'{path}' holds weights but no model that uses them.", HOW_TO_EXPORT)
    require_values(weights, f"'{path}'")
    inputs = None if huggingface.is_transformers_model(weights) else (torch.zeros(2, 5, dtype=torch.long),)
    return capture_any(weights, inputs, source=str(path), tokenizer=tokenizer, dtype=dtype)
