"""Training of a pico model: the text, the settings, and how results are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import models
import torch
from torch import Tensor

import mla_compile

LENGTH = 16
SETTINGS = {
    "batch": 4,
    "tokens": 8 * 4 * LENGTH,
    "every": 2,
    "tracker": "none",
    "train": "all",
    "rate": 0.1,
    "eval_windows": 4,
}
MATCHING = {"match_steps": 4, "objective": "kl=1,attention=0.5"}
"""Every objective with a teacher: alone, and beside another."""


@dataclass(frozen=True)
class Trained:
    """A folder, and the report of what made it."""

    folder: Path
    report: dict

    @property
    def curve(self) -> list[dict]:
        return self.report["training"]["curve"]

    @property
    def weights(self) -> dict[str, Tensor]:
        return mla_compile.load(self.folder).state_dict()


def counting(windows: int, seed: int = 0) -> Tensor:
    """Every token follows from the one before it."""
    start = torch.randint(0, models.VOCABULARY, (windows, 1), generator=torch.Generator().manual_seed(seed))
    return (start + 3 * torch.arange(LENGTH)) % models.VOCABULARY


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Weights differ by no more than a share of the largest number of each tensor."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_curve(got: Sequence[Mapping], expected: Sequence[Mapping]) -> None:
    """Everything measured is the same but for sums of float32 numbers in another order."""
    for one, other in zip(got, expected, strict=True):
        for name in ("loss", "held_out", "objective"):
            if other[name] is not None:
                assert abs(one[name] - other[name]) < 1e-4, (name, one, other)
