"""How much text a conversion uses. Arithmetic alone, so that estimates import no more than that."""

from __future__ import annotations

from mla_compile.config import CompileConfig

__all__ = ["HELD_OUT", "sampled_count", "used_count"]

HELD_OUT = 16
"""Windows kept for measuring, at most; a tenth of the text if that is less."""


def used_count(config: CompileConfig, length: int) -> int:
    """Windows of ``length`` tokens to calibrate on, at most."""
    return max(1, config.calibration_tokens // length)


def sampled_count(config: CompileConfig, length: int) -> int:
    """Windows of ``length`` tokens that a model writes: to calibrate on, and those that are held back from them."""
    used = used_count(config, length)
    return used + min(HELD_OUT, max(1, used // 9))
