"""Real trained models and texts beside the checkout: whoever has none skips what needs them."""

from __future__ import annotations

from pathlib import Path

import pytest

__all__ = ["shared_model", "shared_text"]

SHARED = Path(__file__).parents[1].parent / "shared"


def shared_model(name: str) -> Path:
    """The folder of a trained model; without it the test is skipped."""
    return _at_hand(SHARED / "models" / name)


def shared_text(name: str) -> Path:
    """A text file; without it the test is skipped."""
    return _at_hand(SHARED / "text" / name)


def _at_hand(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path
