"""Queries and new rope keys, rotated; and queries as the folded form takes them.

Text of ONNX operators over the names of :mod:`mla_compile.runtime.onnx_function`, which says what its suffixes are.
"""

from __future__ import annotations

__all__ = ["PLACED_QUERIES", "SIZES", "TURNED_KEYS", "TURNED_QUERIES", "folded_queries", "turned_queries"]

SIZES = """
  # ---- sizes
  heads = Constant <value_int: int = @num_heads> ()
  factor = Constant <value_float: float = @scale> ()
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  H = Reshape (heads, one)
  BS = Shape <start = 0, end = 2> (query_BSHD)
  B = Shape <start = 0, end = 1> (query_BSHD)
  S = Shape <start = 1, end = 2> (query_BSHD)
  N = Shape <start = 1, end = 2> (row_BNR)
  P = Shape <start = 1, end = 2> (past_BPR)

  # ---- the factor before softmax, on the few numbers of the queries
  factor_like = CastLike (factor, query_BSHD)
  scaled_BSHD = Mul (query_BSHD, factor_like)
"""

TURNED_QUERIES = """
  BN = Shape <start = 0, end = 2> (row_BNR)
  axis3 = Constant <value_ints = [3]> ()
  axis4 = Constant <value_ints = [4]> ()
  groups = Constant <value_int: int = @rope_groups> ()
  rope = Constant <value_int: int = @rope_dim> ()
  rank = Constant <value_int: int = @latent_rank> ()
  n = Reshape (groups, one)
  d = Reshape (rope, one)
  r = Reshape (rank, one)
  half = Div (d, two)
  h = Div (H, n)
  rope_width = Mul (n, d)
  row_rest = Add (r, rope_width)
  G = Shape <start = 0, end = 1> (key_up_GDr)
  GV = Shape <start = 0, end = 1> (value_up_GrV)
  nope = Shape <start = 1, end = 2> (key_up_GDr)
  v = Shape <start = 2, end = 3> (value_up_GrV)

  # ---- rotate queries, per group: [B, S, n, h, d]
  plain_BSHD = Slice (scaled_BSHD, zero, nope, axis3)
  turning_own_BSHd = Slice (scaled_BSHD, nope, end, axis3)
  turning_BSHd = CastLike (turning_own_BSHd, cos_BSn)
  grouped_shape = Concat <axis = 0> (BS, n, h, d)
  turning_BSnhd = Reshape <allowzero = 1> (turning_BSHd, grouped_shape)
  cos_BSnh = Unsqueeze (cos_BSn, axis3)
  sin_BSnh = Unsqueeze (sin_BSn, axis3)
  q_real = Slice (turning_BSnhd, zero, half, axis4)
  q_imaginary = Slice (turning_BSnhd, half, end, axis4)
  q_rc = Mul (q_real, cos_BSnh)
  q_is = Mul (q_imaginary, sin_BSnh)
  q_ic = Mul (q_imaginary, cos_BSnh)
  q_rs = Mul (q_real, sin_BSnh)
  q_new_real = Sub (q_rc, q_is)
  q_new_imaginary = Add (q_ic, q_rs)
  turned_wide_BSnhd = Concat <axis = -1> (q_new_real, q_new_imaginary)
  turned_BSnhd = CastLike (turned_wide_BSnhd, query_BSHD)
"""

TURNED_KEYS = """
  # ---- rotate the new rope keys
  latent_BNr = Slice (row_BNR, zero, r, two)
  key_own_BNR = Slice (row_BNR, r, row_rest, two)
  key_BNR = CastLike (key_own_BNR, cos_BSn)
  key_shape = Concat <axis = 0> (BN, n, d)
  key_BNnd = Reshape <allowzero = 1> (key_BNR, key_shape)
  k_real = Slice (key_BNnd, zero, half, axis3)
  k_imaginary = Slice (key_BNnd, half, end, axis3)
  k_rc = Mul (k_real, cos_BSn)
  k_is = Mul (k_imaginary, sin_BSn)
  k_ic = Mul (k_imaginary, cos_BSn)
  k_rs = Mul (k_real, sin_BSn)
  k_new_real = Sub (k_rc, k_is)
  k_new_imaginary = Add (k_ic, k_rs)
  key_turned_BNnd = Concat <axis = -1> (k_new_real, k_new_imaginary)
  flat_shape = Concat <axis = 0> (BN, rope_width)
  key_wide_BNR = Reshape <allowzero = 1> (key_turned_BNnd, flat_shape)
  key_turned_BNR = CastLike (key_wide_BNR, row_BNR)
"""

_FOLDED_SIZES = """
  SH = Mul (S, H)
  M = Mul (B, S)
  per_up = Div (H, G)
  per_value = Div (H, GV)
  M_per_up = Mul (M, per_up)
  M_per_value = Mul (M, per_value)
"""

PLACED_QUERIES = """
  # ---- place every head's rotating channels in its group's slot of the row: [B, S, n, h, n, d] -> [B, S, H, n d]
  square = Concat <axis = 0> (n, n)
  blank = ConstantOfShape (square)
  slots_float = EyeLike <dtype = 1> (blank)
  slots_nn = CastLike (slots_float, turned_BSnhd)
  slot_axes = Constant <value_ints = [1, 3]> ()
  slots_n1n1 = Unsqueeze (slots_nn, slot_axes)
  turned_BSnh1d = Unsqueeze (turned_BSnhd, axis4)
  placed_BSnhnd = Mul (turned_BSnh1d, slots_n1n1)
  placed_shape = Concat <axis = 0> (BS, H, rope_width)
  placed_BSHR = Reshape <allowzero = 1> (placed_BSnhnd, placed_shape)
"""

_FOLDED_QUERIES = """
  # ---- fold the key up-projection into the queries, group by group
  plain_shape = Concat <axis = 0> (M, G, per_up, nope)
  plain_MGhD = Reshape <allowzero = 1> (plain_BSHD, plain_shape)
  plain_GMhD = Transpose <perm = [1, 0, 2, 3]> (plain_MGhD)
  merged_shape = Concat <axis = 0> (G, M_per_up, nope)
  plain_GMD = Reshape <allowzero = 1> (plain_GMhD, merged_shape)
  folded_GMr = MatMul (plain_GMD, key_up_GDr)
  folded_shape = Concat <axis = 0> (G, M, per_up, r)
  folded_GMhr = Reshape (folded_GMr, folded_shape)
  folded_MGhr = Transpose <perm = [1, 0, 2, 3]> (folded_GMhr)
  latent_shape = Concat <axis = 0> (BS, H, r)
  latent_query_BSHr = Reshape (folded_MGhr, latent_shape)
"""


def turned_queries(past: str) -> str:
    """Sizes, and rotated queries ``turned_BSnhd``; ``past`` is what the cache is called, if it is no ``past_BPR``."""
    return SIZES.replace("past_BPR", past) + TURNED_QUERIES


def folded_queries() -> str:
    """From ``plain_BSHD`` and ``turned_BSnhd`` to ``latent_query_BSHr`` and ``placed_BSHR``."""
    return _FOLDED_SIZES + PLACED_QUERIES + _FOLDED_QUERIES
