"""Up-projections as codes of eight bits: ``code * scale``, with a scale per latent channel of a group.

Text of ONNX operators over the names of :mod:`mla_compile.runtime.onnx_function`, which says what its suffixes are.

Latent channels are ordered by what they explain, and so are very unequal: one scale for all that an output adds up
would leave the later ones few levels. A channel's scale belongs to the folded query, or to the sum of latents, as well
as to the weights: the fused kernel never decodes these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DECODED_IN_BRANCH", "DECODED_UP", "KEY_AXIS", "LEVELS", "VALUE_AXIS", "codes_and_scales", "of_codes"]

LEVELS = 127
"""Codes on either side of zero."""
KEY_AXIS, VALUE_AXIS = 1, 2
"""Axes of ``[G, D, r]`` and ``[G, r, V]`` whose channels share a scale."""
_SMALLEST = 1e-20
"""What the largest number of a latent channel counts for at least: zeros have a scale too."""

# ONNX Runtime folds these while it loads a file: standard operators multiply with numbers.
DECODED_UP = """
  # ---- the up-projections that codes and scales stand for
  key_number_GDr = CastLike (key_code_GDr, key_scale_G1r)
  key_up_GDr = Mul (key_number_GDr, key_scale_G1r)
  value_number_GrV = CastLike (value_code_GrV, value_scale_Gr1)
  value_up_GrV = Mul (value_number_GrV, value_scale_Gr1)
"""
"""Up-projections, in front of all other text."""

# It does not fold ``DequantizeLinear``: numbers are there while a long prompt needs them, and codes else.
DECODED_IN_BRANCH = """
  # ---- the up-projections that codes and scales stand for
  unit = Constant <value_float = 1.0> ()
  key_float_GDr = DequantizeLinear (key_code_GDr, unit)
  key_number_GDr = CastLike (key_float_GDr, key_scale_G1r)
  key_up_GDr = Mul (key_number_GDr, key_scale_G1r)
  value_float_GrV = DequantizeLinear (value_code_GrV, unit)
  value_number_GrV = CastLike (value_float_GrV, value_scale_Gr1)
  value_up_GrV = Mul (value_number_GrV, value_scale_Gr1)
"""
"""The same, for one of several branches only."""


def of_codes(text: str) -> str:
    """Text that takes up-projections as they are, or their sizes, as text over codes."""
    return text.replace("key_up_GDr", "key_code_GDr").replace("value_up_GrV", "value_code_GrV")


def codes_and_scales(up: NDArray[Any], axis: int) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Codes of an up-projection.

    Args:
        up: Key's ``[G, D, r]`` or value's ``[G, r, V]``.
        axis: ``KEY_AXIS`` or ``VALUE_AXIS``.

    Returns:
        Codes of the same size, and their scales, of size 1 on that axis and of the type of the given numbers.
    """
    largest = np.abs(up).max(axis, keepdims=True, initial=0).astype(np.float32)
    scales = (np.maximum(largest, _SMALLEST) / LEVELS).astype(up.dtype)
    scales[scales == 0] = np.finfo(up.dtype).tiny  # of float16
    codes = np.rint(up.astype(np.float32) / scales.astype(np.float32))
    return np.clip(codes, -LEVELS, LEVELS).astype(np.int8), scales
