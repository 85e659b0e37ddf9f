"""``LatentAttention`` as an ONNX function: our node, with a body of standard operators for every runtime without it.

A runtime that has a kernel for the node (a TensorRT plugin) uses the node; any other inlines the body. The body is the
folded form: up-projections are folded into queries and outputs, and the cached rows themselves are attended to, so that
the cache is read twice per step and never expanded.

Inputs, outputs and their shapes are those of :func:`mla_compile.runtime.ops.latent_attention`.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser

__all__ = ["DOMAIN", "OP_TYPE", "VERSION", "latent_attention_function"]

DOMAIN = "mla_compile"
OP_TYPE = "LatentAttention"
VERSION = 1

# Suffixes name the axes: B batch, S new tokens, T all tokens, H query heads, n rope groups, h heads per group, G
# up-projection groups, D head channels, r latent rank, R row, V value channels, M merged axes.
_BODY = """
<opset_import: ["" : OPSET], domain: "mla_compile">
LatentAttention
  <num_heads, rope_groups, rope_dim, latent_rank, scale, window>
  (query_BSHD, row_BSR, past_BPR, attention_mask_BT, cos_BSn, sin_BSn, key_up_GDr, value_up_GrV)
  => (output_BSHV, present_BTR)
{
  # ---- sizes
  heads = Constant <value_int: int = @num_heads> ()
  groups = Constant <value_int: int = @rope_groups> ()
  rope = Constant <value_int: int = @rope_dim> ()
  rank = Constant <value_int: int = @latent_rank> ()
  factor = Constant <value_float: float = @scale> ()
  reach = Constant <value_int: int = @window> ()
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  axis0 = Constant <value_ints = [0]> ()
  axis3 = Constant <value_ints = [3]> ()
  axis4 = Constant <value_ints = [4]> ()
  H = Reshape (heads, one)
  n = Reshape (groups, one)
  d = Reshape (rope, one)
  r = Reshape (rank, one)
  half = Div (d, two)
  h = Div (H, n)
  BS = Shape <start = 0, end = 2> (row_BSR)
  B = Shape <start = 0, end = 1> (row_BSR)
  S = Shape <start = 1, end = 2> (row_BSR)
  M = Mul (B, S)
  SH = Mul (S, H)
  G = Shape <start = 0, end = 1> (key_up_GDr)
  per_up = Div (H, G)
  GV = Shape <start = 0, end = 1> (value_up_GrV)
  per_value = Div (H, GV)
  nope = Shape <start = 1, end = 2> (key_up_GDr)
  M_per_up = Mul (M, per_up)
  M_per_value = Mul (M, per_value)

  # ---- rotate queries, per group: [B, S, n, h, d]
  plain_BSHD = Slice (query_BSHD, zero, nope, axis3)
  turning_own_BSHd = Slice (query_BSHD, nope, end, axis3)
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

  # ---- place every head's rotating channels in its group's slot of the row: [B, S, n, h, n, d] -> [B, S, H, n d]
  square = Concat <axis = 0> (n, n)
  blank = ConstantOfShape (square)
  slots_float = EyeLike <dtype = 1> (blank)
  slots_nn = CastLike (slots_float, query_BSHD)
  slot_axes = Constant <value_ints = [1, 3]> ()
  slots_n1n1 = Unsqueeze (slots_nn, slot_axes)
  turned_BSnh1d = Unsqueeze (turned_BSnhd, axis4)
  placed_BSnhnd = Mul (turned_BSnh1d, slots_n1n1)
  rope_width = Mul (n, d)
  placed_shape = Concat <axis = 0> (BS, H, rope_width)
  placed_BSHR = Reshape <allowzero = 1> (placed_BSnhnd, placed_shape)

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
  rows_query_BSHR = Concat <axis = -1> (latent_query_BSHr, placed_BSHR)
  row_width = Add (r, rope_width)
  heads_shape = Concat <axis = 0> (B, SH, row_width)

  # ---- rotate the new rope keys and append the new rows
  latent_BSr = Slice (row_BSR, zero, r, two)
  key_own_BSR = Slice (row_BSR, r, end, two)
  key_BSR = CastLike (key_own_BSR, cos_BSn)
  key_shape = Concat <axis = 0> (BS, n, d)
  key_BSnd = Reshape <allowzero = 1> (key_BSR, key_shape)
  k_real = Slice (key_BSnd, zero, half, axis3)
  k_imaginary = Slice (key_BSnd, half, end, axis3)
  k_rc = Mul (k_real, cos_BSn)
  k_is = Mul (k_imaginary, sin_BSn)
  k_ic = Mul (k_imaginary, cos_BSn)
  k_rs = Mul (k_real, sin_BSn)
  k_new_real = Sub (k_rc, k_is)
  k_new_imaginary = Add (k_ic, k_rs)
  key_turned_BSnd = Concat <axis = -1> (k_new_real, k_new_imaginary)
  flat_shape = Concat <axis = 0> (BS, rope_width)
  key_wide_BSR = Reshape <allowzero = 1> (key_turned_BSnd, flat_shape)
  key_turned_BSR = CastLike (key_wide_BSR, row_BSR)
  new_BSR = Concat <axis = -1> (latent_BSr, key_turned_BSR)
  present_BTR = Concat <axis = 1> (past_BPR, new_BSR)

  # ---- which keys each query sees: real ones before it, within the window, and always itself
  T = Shape <start = 1, end = 2> (present_BTR)
  P = Sub (T, S)
  zero_scalar = Constant <value_int = 0> ()
  one_scalar = Constant <value_int = 1> ()
  T_scalar = Squeeze (T)
  place_T = Range (zero_scalar, T_scalar, one_scalar)
  own_S = Slice (place_T, P, end, axis0)
  own_S1 = Unsqueeze (own_S, one)
  before_ST = LessOrEqual (place_T, own_S1)
  itself_ST = Equal (place_T, own_S1)
  mask_int = Cast <to = 7> (attention_mask_BT)
  real_BT = Greater (mask_int, zero_scalar)
  real_int_BT = Cast <to = 7> (real_BT)
  order_BT = CumSum (real_int_BT, one_scalar)
  own_order_BS = Slice (order_BT, P, end, one)
  own_order_BS1 = Unsqueeze (own_order_BS, two)
  order_B1T = Unsqueeze (order_BT, one)
  distance_BST = Sub (own_order_BS1, order_B1T)
  within = Less (distance_BST, reach)
  unlimited = Equal (reach, zero_scalar)
  near_BST = Or (within, unlimited)
  real_B1T = Unsqueeze (real_BT, one)
  real_before_BST = And (real_B1T, before_ST)
  allowed_BST = And (real_before_BST, near_BST)
  seen_BST = Or (allowed_BST, itself_ST)
  seen_BS1T = Unsqueeze (seen_BST, two)

  # ---- attend to the rows: the cache is the left operand, read once for all heads
  rows_query_BMR = Reshape (rows_query_BSHR, heads_shape)
  rows_query_BRM = Transpose <perm = [0, 2, 1]> (rows_query_BMR)
  scores_BTM = MatMul (present_BTR, rows_query_BRM)
  scores_BMT = Transpose <perm = [0, 2, 1]> (scores_BTM)
  scores_shape = Concat <axis = 0> (BS, H, T)
  scores_BSHT = Reshape (scores_BMT, scores_shape)
  factor_like = CastLike (factor, query_BSHD)
  logits_BSHT = Mul (scores_BSHT, factor_like)
  infinity = Constant <value_float = -inf> ()
  hidden = CastLike (infinity, query_BSHD)
  masked_BSHT = Where (seen_BS1T, logits_BSHT, hidden)
  weights_BSHT = Softmax <axis = -1> (masked_BSHT)
  weights_shape = Concat <axis = 0> (B, SH, T)
  weights_BMT = Reshape (weights_BSHT, weights_shape)
  context_BMR = MatMul (weights_BMT, present_BTR)
  context_BMr = Slice (context_BMR, zero, r, two)

  # ---- fold the value up-projection into the outputs
  context_shape = Concat <axis = 0> (M, GV, per_value, r)
  context_MGhr = Reshape (context_BMr, context_shape)
  context_GMhr = Transpose <perm = [1, 0, 2, 3]> (context_MGhr)
  context_flat = Concat <axis = 0> (GV, M_per_value, r)
  context_GMr = Reshape (context_GMhr, context_flat)
  output_GMV = MatMul (context_GMr, value_up_GrV)
  v = Shape <start = 2, end = 3> (value_up_GrV)
  output_shape = Concat <axis = 0> (GV, M, per_value, v)
  output_GMhV = Reshape (output_GMV, output_shape)
  output_MGhV = Transpose <perm = [1, 0, 2, 3]> (output_GMhV)
  final_shape = Concat <axis = 0> (BS, H, v)
  output_BSHV = Reshape (output_MGhV, final_shape)
}
"""


@functools.cache
def latent_attention_function(opset: int) -> onnx.FunctionProto:
    """Parse the function for a standard operator set.

    Args:
        opset: Version of the standard operators, 23 or later.

    Returns:
        The function.
    """
    lines = [line.split("#")[0].rstrip() for line in _BODY.replace("OPSET", str(opset)).splitlines()]
    return onnx.parser.parse_function("\n".join(line for line in lines if line))
