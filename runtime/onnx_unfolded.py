"""The unfolded form of ``LatentAttention``: keys and values are made from the rows and attended to.

Text of ONNX operators over the names of :mod:`mla_compile.runtime.onnx_function`, which says what its suffixes are.
"""

from __future__ import annotations

import re

from mla_compile.runtime.onnx_logits import heads_first_weights
from mla_compile.runtime.onnx_variant import Variant

__all__ = ["MANY_QUERIES", "unfolded_attention"]

MANY_QUERIES = """
  # ---- whether there are so many queries that making keys and values pays
  R = Shape <start = 2, end = 3> (row_BNR)
  D = Shape <start = 3, end = 4> (query_BSHD)
  row_twice = Mul (R, two)
  key_and_value = Add (D, v)
  saved = Sub (row_twice, key_and_value)
  saved_by_heads = Mul (saved, H)
  saved_in_all = Mul (saved_by_heads, S)
  key_rows = Mul (G, nope)
  value_rows = Mul (GV, v)
  made_rows = Add (key_rows, value_rows)
  making = Mul (made_rows, r)
  many_1 = Greater (saved_in_all, making)
  many = Squeeze (many_1)
"""
"""Whether making keys and values of all rows is less work than it saves.

A query and a row take two rows' numbers per head where folded, and a key's and a value's where not.
"""

# The operator ``Attention`` would do the end of it a few percent faster, but TensorRT's wants values as long as keys.
_LATENT_UNFOLDED = """
  # ---- make keys of all rows
  latent_BTr = Slice (ROWS, zero, r, two)
  latent_B1Tr = Unsqueeze (latent_BTr, one)
  key_up_GrD = Transpose <perm = [0, 2, 1]> (key_up_GDr)
  plain_key_BGTD = MatMul (latent_B1Tr, key_up_GrD)
EXPAND plain_key_BGTD G nope plain_key_BHTD
  rope_BTR = Slice (ROWS, r, row_rest, two)
  BT = Shape <start = 0, end = 2> (ROWS)
  rope_shape = Concat <axis = 0> (BT, n, d)
  rope_BTnd = Reshape <allowzero = 1> (rope_BTR, rope_shape)
  rope_BnTd = Transpose <perm = [0, 2, 1, 3]> (rope_BTnd)
EXPAND rope_BnTd n d rope_BHTd
KEYS
  # ---- make values of all rows
  value_BGTV = MatMul (latent_B1Tr, value_up_GrV)
EXPAND value_BGTV GV v value_BHTV
VALUES
  # ---- attend
  flat_turned_shape = Concat <axis = 0> (BS, H, d)
  turned_BSHd = Reshape <allowzero = 1> (turned_BSnhd, flat_turned_shape)
  whole_query_BSHD = Concat <axis = -1> (plain_BSHD, turned_BSHd)
  whole_query_BHSD = Transpose <perm = [0, 2, 1, 3]> (whole_query_BSHD)
  seen_B1ST = Unsqueeze (seen_BST, one)
  key_BHDT = Transpose <perm = [0, 1, 3, 2]> (key_BHTD)
  scores_BHST = MatMul (whole_query_BHSD, key_BHDT)
WEIGHTS
  attended_BHSV = MatMul (weights_BHST, VALUES_OF_HEADS)
  unfolded_BSHV = Transpose <perm = [0, 2, 1, 3]> (attended_BHSV)
"""

_UNFOLDED_KEYS = """
  key_BHTD = Concat <axis = -1> (plain_key_BHTD, rope_BHTd)
"""

_UNFOLDED_SCALES = """
  key_scales_end = Add (row_rest, m)
  key_scales_BTm = Slice (ROWS, row_rest, key_scales_end, two)
  key_scales_BmT = Transpose <perm = [0, 2, 1]> (key_scales_BTm)
  key_scales_BmT1 = Unsqueeze (key_scales_BmT, axis3)
EXPAND key_scales_BmT1 m one key_scales_BHT1
"""

_UNFOLDED_KEYS_SCALED = """
  scaled_key_BHTD = Mul (plain_key_BHTD, key_scales_BHT1)
  key_BHTD = Concat <axis = -1> (scaled_key_BHTD, rope_BHTd)
"""

_UNFOLDED_KEYS_SCALED_ROPE = """
  unscaled_key_BHTD = Concat <axis = -1> (plain_key_BHTD, rope_BHTd)
  key_BHTD = Mul (unscaled_key_BHTD, key_scales_BHT1)
"""

_UNFOLDED_VALUES_SCALED = """
  values_start = Neg (w)
  value_factors_BTw = Slice (ROWS, values_start, end, two)
  value_factors_BwT = Transpose <perm = [0, 2, 1]> (value_factors_BTw)
  value_factors_BwT1 = Unsqueeze (value_factors_BwT, axis3)
EXPAND value_factors_BwT1 w one value_factors_BHT1
  scaled_value_BHTV = Mul (value_BHTV, value_factors_BHT1)
"""


def unfolded_attention(variant: Variant) -> str:
    """From queries, rows and ``seen_BST`` (and ``distance_BST`` for slopes) to ``unfolded_BSHV``.

    ``ROWS`` is what the caller calls the rows to attend to.
    """
    keys = _UNFOLDED_KEYS
    if variant.key_scales:
        keys = _UNFOLDED_SCALES + (_UNFOLDED_KEYS_SCALED_ROPE if variant.scaled_rope else _UNFOLDED_KEYS_SCALED)
    values = "scaled_value_BHTV" if variant.value_scales else "value_BHTV"
    text = _LATENT_UNFOLDED.replace("VALUES_OF_HEADS", values).replace("KEYS\n", keys)
    text = text.replace("VALUES\n", _UNFOLDED_VALUES_SCALED if variant.value_scales else "")
    text = text.replace("WEIGHTS\n", heads_first_weights(variant))
    return re.sub(r"EXPAND (\w+) (\w+) (\w+) (\w+)", _expanded, text)


def _expanded(match: re.Match[str]) -> str:
    """Give every head what its group has: ``[B, g, T, c]`` to ``[B, H, T, c]``."""
    given, groups, channels, result = match.groups()
    return f"""
  {result}_heads = Div (H, {groups})
  {result}_by_group = Unsqueeze ({given}, two)
  {result}_times = Concat <axis = 0> (one, one, {result}_heads, one, one)
  {result}_repeated = Expand ({result}_by_group, {result}_times)
  {result}_T = Shape <start = 2, end = 3> ({given})
  {result}_shape = Concat <axis = 0> (B, H, {result}_T, {channels})
  {result} = Reshape <allowzero = 1> ({result}_repeated, {result}_shape)
"""
