"""The files of a checkpoint, looked at before and after a model is made of them: what is missing or wrong, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from os import fspath
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mla_compile.config import REPORT
from mla_compile.disk.mapped import drop_pages
from mla_compile.errors import LoadError, first_line

__all__ = ["has_weights", "holds_result", "require_files", "require_finite", "require_fitting_weights"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_COPY = "Copy or download the checkpoint again."
_TOGETHER = "Get the complete checkpoint; config.json and weights must belong together."
_CHUNK = 2**24
"""Numbers looked at together."""


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights of any kind, or says that it does."""
    kinds = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")
    return any(next(folder.glob(kind), None) for kind in kinds)


def holds_result(folder: Path) -> bool:
    """Whether a folder holds what a conversion wrote beside a file, and no weights of an original."""
    return (folder / REPORT).is_file() and not has_weights(folder)


def require_files(folder: Path) -> None:
    """Refuse a folder whose safetensors files are not all there, or are damaged; reads their headers only.

    Raises:
        LoadError: One is missing or cut short, or lacks a tensor that the index says it has.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(map(fspath, places.values())))  # a TypeError where one is no string
            files = {name: [t for t, at in places.items() if at == name] for name in names}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise LoadError(f"'{index}' is damaged ({type(error).__name__}).", _COPY) from error
    else:
        files = {_SINGLE: []} if (folder / _SINGLE).is_file() else {}
    for name, tensors in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise LoadError(f"'{index}' leads out of its folder, to '{name}'.", _COPY)
        if not path.is_file():
            raise LoadError(f"The checkpoint '{folder}' lacks the file '{name}', which its index names.", _COPY)
        try:
            with safe_open(path, "pt") as file:
                there = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise LoadError(f"'{path}' is damaged or was cut short ({first_line(error)}).", _COPY) from error
        if lost := [tensor for tensor in tensors if tensor not in there]:
            raise LoadError(f"'{path}' lacks the tensor '{lost[0]}', which the index says it has.", _COPY)


def require_fitting_weights(name: str, info: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse weights that do not belong to their configuration.

    Tensors that a model has no use for are nothing to refuse it for (tables that are computed, heads of other tasks),
    but further layers are: the configuration has fewer than the weights.

    Args:
        name: The checkpoint.
        info: What ``from_pretrained`` says of its loading.
        known: Names of all tensors that the model has.

    Raises:
        LoadError: A tensor is missing, of another shape, or of a layer that the model does not have.
    """
    if missing := sorted(info["missing_keys"]):  # transformers fills these with random numbers
        raise LoadError(f"The weights of '{name}' lack {len(missing)} tensors, '{missing[0]}' among them.", _TOGETHER)
    wrong: Sequence[tuple[str, Any, Any]] = sorted(info["mismatched_keys"])
    if wrong:
        tensor, found, wanted = wrong[0]
        raise LoadError(
            f"The tensor '{tensor}' of '{name}' is of shape {[*found]}, and its configuration asks for {[*wanted]}.",
            _TOGETHER,
        )
    numbered = {re.sub(r"\d+", "#", tensor) for tensor in known}
    further = sorted(t for t in info["unexpected_keys"] if "#" in (n := re.sub(r"\d+", "#", t)) and n in numbered)
    if further:
        raise LoadError(
            f"The weights of '{name}' have {len(further)} tensors of layers that its configuration does not have, "
            f"'{further[0]}' among them.",
            _TOGETHER,
        )


def require_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights with NaN or infinity; mapped ones are read piece by piece.

    Raises:
        LoadError: The first such tensor.
    """
    for name in sorted(weights):
        value = weights[name].detach()
        if not value.is_floating_point() or value.is_meta:
            continue
        for part in value.reshape(-1).split(_CHUNK):
            if not bool(torch.isfinite(part).all()):
                count = int((~torch.isfinite(value)).sum())
                raise LoadError(
                    f"The tensor '{name}' of '{source}' has {count} numbers that are NaN or infinite.",
                    "Get a whole checkpoint, or repair that tensor.",
                )
        drop_pages([value])
