"""A checksum of a file's weights, which ONNX Runtime does not have: bytes that changed give other tokens, no error."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import numpy_helper

from mla_compile.errors import LoadError

__all__ = ["CHECKSUM_KEY", "require_unchanged", "weights_checksum"]

CHECKSUM_KEY = "mla_compile_weights"
"""Where a file's metadata has it."""


def weights_checksum(weights: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 of weights, by their names, and of the names."""
    found = hashlib.sha256()
    for name, content in weights:
        found.update(name.encode())
        found.update(content)
    return found.hexdigest()


def require_unchanged(path: Path) -> None:
    """Refuse a file whose weights are not those that were written, or not there; one that has no checksum passes.

    Args:
        path: The ``.onnx`` file, with its ``.data`` file beside it if it has one.

    Raises:
        LoadError: They changed.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:
        return  # ONNX Runtime says so
    written = {entry.key: entry.value for entry in model.metadata_props}.get(CHECKSUM_KEY)
    if written is None:
        return
    weights = sorted(model.graph.initializer, key=lambda weight: weight.name)
    folder = str(path.parent)
    try:
        found = weights_checksum((w.name, numpy_helper.to_array(w, folder).tobytes()) for w in weights)
    except Exception:  # of a place or a size: ONNX Runtime reads some that are none
        found = None
    if found != written:
        raise LoadError(
            f"The weights of '{path}' are not those that were written: the file was damaged or changed.",
            "Copy it again, or convert the model again.",
        )
