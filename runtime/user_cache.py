"""Where this package keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["default_folder"]


def default_folder() -> Path:
    """``$MLA_COMPILE_CACHE``, else ``mla-compile`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("MLA_COMPILE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "mla-compile"
