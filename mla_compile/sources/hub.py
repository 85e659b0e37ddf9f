"""Names of models on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["is_hub_id"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = (".bin", ".gguf", ".json", ".onnx", ".plan", ".pt", ".pt2", ".pth", ".safetensors")
"""Suffixes of files; others are parts of names, as in ``Qwen2.5-0.5B``."""


def is_hub_id(name: str) -> bool:
    """Whether a name is an organisation's and a model's, and no path of anything on this machine."""
    return _ID.fullmatch(name) is not None and not name.endswith(_FILES) and not Path(name).exists()
