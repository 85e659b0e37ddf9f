"""``LatentAttention`` and ``CachedAttention`` as ONNX functions: our nodes, with bodies of standard operators.

A runtime that has a kernel for the node (a TensorRT plugin) uses the node; any other inlines the body. The body of
``LatentAttention`` has two forms, of which the number of queries chooses one. The folded form is for few of them, as in
decoding: up-projections are folded into queries and outputs, and the cached rows themselves are attended to, so that
the cache is read twice per step and never expanded. The unfolded form is for many, as in prefill: keys and values are
made from the rows, which are longer than both, and attended to.

Inputs, outputs and their shapes are those of :func:`mla_compile.runtime.ops.latent_attention` and
:func:`~mla_compile.runtime.ops.cached_attention`. A node names only what it has: without sinks and slopes it has no
inputs for them, without a soft-cap no attribute, and only attention that is not causal says so. Each such variant is a
function with a name of its own, so that what is not used costs nothing. (Overloads of one name would say the same, but
TensorRT's parser takes no notice of them: two nodes of equally many inputs get the same body, without a word.)

A cache either grows (``present`` is ``past`` and the new rows) or is static: both have as many rows as the caller makes
room for, and new rows are written where those of earlier tokens end. A runtime that is given one memory for both writes
nothing else. A quantised one holds codes and scales (:mod:`mla_compile.runtime.onnx_quantised`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import onnx
import onnx.parser

from mla_compile.runtime.onnx_quantised import (
    QUANTISED_APPEND,
    QUANTISED_CONTEXT,
    QUANTISED_SCORES,
    dequantised,
    with_scales,
)
from mla_compile.runtime.onnx_rows import rows_and_masks
from mla_compile.runtime.onnx_unfolded import MANY_QUERIES, unfolded_attention

__all__ = [
    "APPENDED_SCALES",
    "CACHED",
    "DOMAIN",
    "FUSED",
    "FUSED_DOMAIN",
    "LATENT",
    "PLACED_QUERIES",
    "TURNED_KEYS",
    "VERSION",
    "Variant",
    "attention_function",
    "folded_queries",
    "has_fused_form",
    "latent_context",
    "latent_output",
    "latent_scores",
    "logit_weights",
    "scale_sizes",
    "turned_queries",
]

DOMAIN = "mla_compile"
LATENT = "LatentAttention"
CACHED = "CachedAttention"
VERSION = 1
FUSED_DOMAIN = "mla_compile.cpu"
FUSED = {False: "FoldedAttention", True: "FoldedAttentionOfCodes"}
"""Operators of :mod:`mla_compile.runtime.cpu`, for rows and for their codes: the folded form in one."""


@dataclass(frozen=True)
class Variant:
    """What a node has beyond plain attention.

    Attributes:
        key_scales: Rows hold key scales (``LatentAttention`` only); attribute ``key_scales``, how many.
        softcap: Logits are bounded; attribute ``softcap``.
        window: Queries see the last real tokens only, and later rows are all the cache keeps; attribute ``window``.
        sinks: The softmax has a further logit per head; an input, and the attribute ``has_sinks``.
        slopes: Logits fall with distance; an input after ``sinks``, and the attribute ``has_slopes``.
        value_scales: Rows end in value scales (``LatentAttention`` only); attribute ``value_scales``, how many.
        bidirectional: Every real key is seen, and there may be more or fewer new rows than queries
            (``LatentAttention`` only, without slopes); attribute ``bidirectional``, 1.
        scaled_rope: Key scales multiply the product of rope keys too (only beside ``key_scales``); attribute
            ``scaled_rope``, 1.
        static: The cache has the size that the caller gives it, of which a layer with a window makes a ring
            (not beside ``bidirectional``, and from operator set 24 on); attribute ``static``, 1.
        quantised: The cache holds codes of rows, and two scales per token: an input behind all others, and an output
            (``LatentAttention`` only, neither ``bidirectional`` nor with scales of norms); attribute ``quantised``, 1.
        halves: The cache is two tensors ``[B, 1, P, W]``, named key and value: halves of rows of ``2 W`` numbers, of
            which those behind the row's own are zeros. A window hides rows and drops none (``LatentAttention`` only,
            neither ``bidirectional`` nor ``quantised``); attribute ``halves``, 1.
    """

    key_scales: bool = False
    softcap: bool = False
    window: bool = False
    sinks: bool = False
    slopes: bool = False
    value_scales: bool = False
    bidirectional: bool = False
    scaled_rope: bool = False
    static: bool = False
    quantised: bool = False
    halves: bool = False

    def named(self, op_type: str) -> str:
        """Name of a function's variant: the function's own, and behind it the features that the variant has."""
        return "_".join([op_type, *(field.name for field in fields(self) if getattr(self, field.name))])


# Suffixes name the axes: B batch, S new tokens, N new rows (as many, if attention is causal), T all tokens, H query
# heads, n rope groups or key/value heads, h heads per group, G up-projection groups, D head channels, r latent rank, m
# key scales, w value scales, R row, V value channels, M merged axes.
_SIZES = """
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

_TURNED_QUERIES = """
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

_APPEND = """
  new_BNR = Concat <axis = -1> (latent_BNr, key_turned_BNR)
"""

_KEY_SCALES = """
  key_scale_count = Constant <value_int: int = @key_scales> ()
  m = Reshape (key_scale_count, one)
"""

_VALUE_SCALES = """
  value_scale_count = Constant <value_int: int = @value_scales> ()
  w = Reshape (value_scale_count, one)
"""

_BOTH_SCALES = """
  scale_width = Add (m, w)
"""

APPENDED_SCALES = """
  scales_BNx = Slice (row_BNR, row_rest, end, two)
  new_BNR = Concat <axis = -1> (latent_BNr, key_turned_BNR, scales_BNx)
"""

_LATENT_SCORES = """
  # ---- attend to the rows: the cache is the left operand, read once for all heads
  rows_query_BSHR = Concat <axis = -1> (latent_query_BSHr, placed_BSHR)
  heads_shape = Concat <axis = 0> (B, SH, row_rest)
  rows_query_BMR = Reshape (rows_query_BSHR, heads_shape)
  rows_query_BRM = Transpose <perm = [0, 2, 1]> (rows_query_BMR)
  scores_BTM = MatMul (ROWS, rows_query_BRM)
  scores_BMT = Transpose <perm = [0, 2, 1]> (scores_BTM)
  scores_shape = Concat <axis = 0> (BS, H, T)
  scores_BSHT = Reshape (scores_BMT, scores_shape)
"""

_LATENT_SCORES_KEY_SCALES = """
  # ---- attend to latent and rope keys apart: a key's scale belongs to the former's product only
  latent_BTr = Slice (ROWS, zero, r, two)
  rest_BTR = Slice (ROWS, r, end, two)
  scales_end = Add (row_rest, m)
  scales_BTm = Slice (ROWS, row_rest, scales_end, two)
  plain_heads_shape = Concat <axis = 0> (B, SH, r)
  plain_query_BMr = Reshape (latent_query_BSHr, plain_heads_shape)
  plain_query_BrM = Transpose <perm = [0, 2, 1]> (plain_query_BMr)
  plain_BTM = MatMul (latent_BTr, plain_query_BrM)
  per_scale = Div (H, m)
  by_scale_shape = Concat <axis = 0> (B, T, S, m, per_scale)
  plain_BTSmh = Reshape (plain_BTM, by_scale_shape)
  scale_axes = Constant <value_ints = [2, 4]> ()
  scales_BT1m1 = Unsqueeze (scales_BTm, scale_axes)
  scaled_BTSmh = Mul (plain_BTSmh, scales_BT1m1)
  merged_heads_shape = Concat <axis = 0> (B, T, SH)
  scaled_BTM = Reshape (scaled_BTSmh, merged_heads_shape)
  # Zeros meet the scales: without rope, a product over no channels at all would be undefined in ONNX Runtime 1.31.
  nothing = CastLike (zero_scalar, latent_query_BSHr)
  unscaled_shape = Concat <axis = 0> (BS, H, SCALES)
  unscaled_BSHx = Expand (nothing, unscaled_shape)
  rest_query_BSHR = Concat <axis = -1> (placed_BSHR, unscaled_BSHx)
  rest_width = Add (rope_width, SCALES)
  rest_heads_shape = Concat <axis = 0> (B, SH, rest_width)
  rest_query_BMR = Reshape (rest_query_BSHR, rest_heads_shape)
  rest_query_BRM = Transpose <perm = [0, 2, 1]> (rest_query_BMR)
  rope_BTM = MatMul (rest_BTR, rest_query_BRM)
  scores_BTM = Add (scaled_BTM, rope_BTM)
  scores_BMT = Transpose <perm = [0, 2, 1]> (scores_BTM)
  scores_shape = Concat <axis = 0> (BS, H, T)
  scores_BSHT = Reshape (scores_BMT, scores_shape)
"""

_ROWS_AND_SCALES_PRODUCT = """
  # ---- attend to the rows: the cache is the left operand, read once for all heads; zeros meet the scales
  nothing = CastLike (zero_scalar, latent_query_BSHr)
  unscaled_shape = Concat <axis = 0> (BS, H, SCALES)
  unscaled_BSHx = Expand (nothing, unscaled_shape)
  rows_query_BSHR = Concat <axis = -1> (latent_query_BSHr, placed_BSHR, unscaled_BSHx)
  row_width = Add (row_rest, SCALES)
  heads_shape = Concat <axis = 0> (B, SH, row_width)
  rows_query_BMR = Reshape (rows_query_BSHR, heads_shape)
  rows_query_BRM = Transpose <perm = [0, 2, 1]> (rows_query_BMR)
  product_BTM = MatMul (ROWS, rows_query_BRM)
"""

_LATENT_SCORES_VALUE_SCALES = (
    _ROWS_AND_SCALES_PRODUCT
    + """
  scores_BMT = Transpose <perm = [0, 2, 1]> (product_BTM)
  scores_shape = Concat <axis = 0> (BS, H, T)
  scores_BSHT = Reshape (scores_BMT, scores_shape)
"""
)

_LATENT_SCORES_SCALED_ROPE = (
    _ROWS_AND_SCALES_PRODUCT
    + """
  # ---- a key's scale belongs to its whole product
  scales_end = Add (row_rest, m)
  scales_BTm = Slice (ROWS, row_rest, scales_end, two)
  scales_BmT = Transpose <perm = [0, 2, 1]> (scales_BTm)
  scale_axes = Constant <value_ints = [1, 3]> ()
  scales_B1m1T = Unsqueeze (scales_BmT, scale_axes)
  per_scale = Div (H, m)
  product_BMT = Transpose <perm = [0, 2, 1]> (product_BTM)
  by_scale_shape = Concat <axis = 0> (BS, m, per_scale, T)
  product_BSmhT = Reshape (product_BMT, by_scale_shape)
  scores_BSmhT = Mul (product_BSmhT, scales_B1m1T)
  scores_shape = Concat <axis = 0> (BS, H, T)
  scores_BSHT = Reshape (scores_BSmhT, scores_shape)
"""
)

_CACHED_SCORES = """
  # ---- attend to keys: heads that share a key are queries of one product
  groups = Constant <value_int: int = @kv_heads> ()
  n = Reshape (groups, one)
  h = Div (H, n)
  Sh = Mul (S, h)
  D = Shape <start = 3, end = 4> (query_BSHD)
  keys_width = Mul (n, D)
  key_BTR = Slice (ROWS, zero, keys_width, two)
  key_shape = Concat <axis = 0> (B, T, n, D)
  key_BTnD = Reshape (key_BTR, key_shape)
  key_BnDT = Transpose <perm = [0, 2, 3, 1]> (key_BTnD)
  query_shape = Concat <axis = 0> (BS, n, h, D)
  query_BSnhD = Reshape (scaled_BSHD, query_shape)
  query_BnShD = Transpose <perm = [0, 2, 1, 3, 4]> (query_BSnhD)
  query_merged = Concat <axis = 0> (B, n, Sh, D)
  query_BnMD = Reshape (query_BnShD, query_merged)
  scores_BnMT = MatMul (query_BnMD, key_BnDT)
  scores_split = Concat <axis = 0> (B, n, S, h, T)
  scores_BnShT = Reshape (scores_BnMT, scores_split)
  scores_BSnhT = Transpose <perm = [0, 2, 1, 3, 4]> (scores_BnShT)
  scores_shape = Concat <axis = 0> (BS, H, T)
  scores_BSHT = Reshape (scores_BSnhT, scores_shape)
"""

# ---- from scores to weights: every part reads the logits of the part before it
_SOFTCAP = """
  bound = Constant <value_float: float = @softcap> ()
  bound_like = CastLike (bound, query_BSHD)
  ratio_BSHT = Div (LOGITS, bound_like)
  within_one_BSHT = Tanh (ratio_BSHT)
  capped_BSHT = Mul (within_one_BSHT, bound_like)
"""

_SLOPES = """
  distance_BS1T = Unsqueeze (distance_BST, two)
  distance_float_BS1T = CastLike (distance_BS1T, slopes_H)
  slopes_H1 = Unsqueeze (slopes_H, one)
  loss_own_BSHT = Mul (distance_float_BS1T, slopes_H1)
  loss_BSHT = CastLike (loss_own_BSHT, query_BSHD)
  sloped_BSHT = Sub (LOGITS, loss_BSHT)
"""

# Added, not chosen by ``Where``: the same numbers, with half the time for all heads' scores.
_MASK = """
  nothing_lost = Constant <value_float = 0.0> ()
  visible = CastLike (nothing_lost, query_BSHD)
  infinity = Constant <value_float = -inf> ()
  hidden = CastLike (infinity, query_BSHD)
  loss_BS1T = Where (seen_BS1T, visible, hidden)
  masked_BSHT = Add (LOGITS, loss_BS1T)
"""

_SOFTMAX = """
  weights_BSHT = Softmax <axis = -1> (LOGITS)
"""

_SOFTMAX_SINKS = """
  sinks_like = CastLike (sinks_H, query_BSHD)
  sinks_H1 = Unsqueeze (sinks_like, one)
  column_shape = Concat <axis = 0> (BS, H, one)
  column_BSH1 = Expand (sinks_H1, column_shape)
  with_sinks = Concat <axis = -1> (LOGITS, column_BSH1)
  weights_with_sinks = Softmax <axis = -1> (with_sinks)
  last_axis = Constant <value_ints = [3]> ()
  weights_BSHT = Slice (weights_with_sinks, zero, T, last_axis)
"""

_WEIGHTS = """
  weights_shape = Concat <axis = 0> (B, SH, T)
  weights_BMT = Reshape (weights_BSHT, weights_shape)
"""

_WEIGHTS_VALUE_SCALES = """
  # ---- a value's scale multiplies its weight
  weights_shape = Concat <axis = 0> (B, SH, T)
  value_scales_start = Neg (w)
  value_scales_BTw = Slice (ROWS, value_scales_start, end, two)
  value_scales_BwT = Transpose <perm = [0, 2, 1]> (value_scales_BTw)
  value_scale_axes = Constant <value_ints = [1, 3]> ()
  value_scales_B1w1T = Unsqueeze (value_scales_BwT, value_scale_axes)
  per_value_scale = Div (H, w)
  by_value_scale_shape = Concat <axis = 0> (BS, w, per_value_scale, T)
  weights_BSwhT = Reshape (weights_BSHT, by_value_scale_shape)
  scaled_weights_BSwhT = Mul (weights_BSwhT, value_scales_B1w1T)
  weights_BMT = Reshape (scaled_weights_BSwhT, weights_shape)
"""

_LATENT_CONTEXT = """
  context_BMR = MatMul (weights_BMT, ROWS)
  context_BMr = Slice (context_BMR, zero, r, two)
"""

_LATENT_CONTEXT_KEY_SCALES = """
  context_BMr = MatMul (weights_BMT, latent_BTr)
"""

_LATENT_SCORES_HALVES = """
  # ---- attend to both halves of the rows: the cache is the left operand, read once for all heads
  rows_query_BSHR = Concat <axis = -1> (latent_query_BSHr, placed_BSHR)
  heads_shape = Concat <axis = 0> (B, SH, row_rest)
  rows_query_BMR = Reshape (rows_query_BSHR, heads_shape)
  wide_query_BMR = Pad (rows_query_BMR, filling)
  wide_query_BRM = Transpose <perm = [0, 2, 1]> (wide_query_BMR)
  wide_query_B1RM = Unsqueeze (wide_query_BRM, one)
  first_query, second_query = Split <axis = 2, num_outputs = 2> (wide_query_B1RM)
  first_scores = MatMul (present_key_B1TW, first_query)
  second_scores = MatMul (present_value_B1TW, second_query)
  scores_B1TM = Add (first_scores, second_scores)
  scores_B1MT = Transpose <perm = [0, 1, 3, 2]> (scores_B1TM)
  scores_shape = Concat <axis = 0> (BS, H, T)
  scores_BSHT = Reshape (scores_B1MT, scores_shape)
"""

_LATENT_CONTEXT_HALVES = """
  weights_B1MT = Unsqueeze (weights_BMT, one)
  first_context = MatMul (weights_B1MT, present_key_B1TW)
  second_context = MatMul (weights_B1MT, present_value_B1TW)
  context_B1MR = Concat <axis = -1> (first_context, second_context)
  context_BMR = Squeeze (context_B1MR, one)
  context_BMr = Slice (context_BMR, zero, r, two)
"""

_JOINED_HALVES = """
  # ---- rows of both halves
  joined_B1TR = Concat <axis = -1> (present_key_B1TW, present_value_B1TW)
  joined_BTR = Squeeze (joined_B1TR, one)
  whole_BTR = Slice (joined_BTR, zero, row_length, two)
"""

_LATENT_OUTPUT = """
  # ---- fold the value up-projection into the outputs
  context_shape = Concat <axis = 0> (M, GV, per_value, r)
  context_MGhr = Reshape (context_BMr, context_shape)
  context_GMhr = Transpose <perm = [1, 0, 2, 3]> (context_MGhr)
  context_flat = Concat <axis = 0> (GV, M_per_value, r)
  context_GMr = Reshape (context_GMhr, context_flat)
  output_GMV = MatMul (context_GMr, value_up_GrV)
  output_shape = Concat <axis = 0> (GV, M, per_value, v)
  output_GMhV = Reshape (output_GMV, output_shape)
  output_MGhV = Transpose <perm = [1, 0, 2, 3]> (output_GMhV)
  final_shape = Concat <axis = 0> (BS, H, v)
  output_BSHV = Reshape (output_MGhV, final_shape)
"""

_CACHED_OUTPUT = """
  weights_split = Concat <axis = 0> (BS, n, h, T)
  weights_BSnhT = Reshape (weights_BSHT, weights_split)
  weights_BnShT = Transpose <perm = [0, 2, 1, 3, 4]> (weights_BSnhT)
  weights_merged = Concat <axis = 0> (B, n, Sh, T)
  weights_BnMT = Reshape (weights_BnShT, weights_merged)
  R = Shape <start = 2, end = 3> (row_BNR)
  values_width = Sub (R, keys_width)
  V = Div (values_width, n)
  value_BTR = Slice (ROWS, keys_width, end, two)
  value_shape = Concat <axis = 0> (B, T, n, V)
  value_BTnV = Reshape (value_BTR, value_shape)
  value_BnTV = Transpose <perm = [0, 2, 1, 3]> (value_BTnV)
  context_BnMV = MatMul (weights_BnMT, value_BnTV)
  context_split = Concat <axis = 0> (B, n, S, h, V)
  context_BnShV = Reshape (context_BnMV, context_split)
  context_BSnhV = Transpose <perm = [0, 2, 1, 3, 4]> (context_BnShV)
  final_shape = Concat <axis = 0> (BS, H, V)
  output_BSHV = Reshape (context_BSnhV, final_shape)
"""

# A branch must say of what type its result is, and the types of operators that ONNX does not know are not inferred.
_FUSED_ATTENTION = f"""
  fused_BSHV = {FUSED_DOMAIN}.OPERATOR (plain_BSHD, turned_BSnhd, ROWS, seen_BST, key_up_GDr, value_up_GrV SCALES)
  output_BSHV = Cast <to = 1> (fused_BSHV)
"""

_INPUTS = {
    LATENT: "query_BSHD row_BNR past_BPR attention_mask_BT cos_BSn sin_BSn key_up_GDr value_up_GrV",
    CACHED: "query_BSHD row_BNR past_BPR attention_mask_BT",
}
_ATTRIBUTES = {
    LATENT: "num_heads rope_groups rope_dim latent_rank scale",
    CACHED: "num_heads kv_heads scale",
}


@functools.cache
def attention_function(
    op_type: str, opset: int, variant: Variant = Variant(), *, fused: bool = False
) -> onnx.FunctionProto:
    """Build the function of a node.

    Args:
        op_type: ``LATENT`` or ``CACHED``.
        opset: Version of the standard operators, 23 or later.
        variant: What the node has.
        fused: Whether the folded form is an operator of :mod:`mla_compile.runtime.cpu`, for float32.

    Returns:
        The function; its name is the variant's.

    Raises:
        ValueError: The variant scales rope keys without key scales, or its cache is static where keys of another
            sequence are seen or the operator that writes to one is missing, it is quantised where that cannot be, or
            there is no fused operator for it.
    """
    if variant.scaled_rope and not variant.key_scales:
        raise ValueError("scaled_rope needs key_scales: there is nothing to scale rope keys by.")
    if variant.static and (variant.bidirectional or opset < 24):
        raise ValueError("A static cache needs causal attention and operator set 24.")
    exact = op_type == CACHED or variant.bidirectional or variant.key_scales or variant.value_scales
    if variant.quantised and exact:
        raise ValueError("A quantised cache is of causal latent attention without scales of norms.")
    if variant.halves and (op_type == CACHED or variant.bidirectional or variant.quantised):
        raise ValueError("Two halves are of causal latent attention whose cache is not quantised.")
    if fused and not (op_type == LATENT and has_fused_form(variant)):
        raise ValueError("The fused operator is for causal latent attention without scales, caps, sinks and slopes.")
    # A flag for every optional input: which inputs a node has cannot be told from their number.
    attributes = {
        "key_scales": variant.key_scales,
        "value_scales": variant.value_scales,
        "softcap": variant.softcap,
        "window": variant.window,
        "has_sinks": variant.sinks,
        "has_slopes": variant.slopes,
        "bidirectional": variant.bidirectional,
        "scaled_rope": variant.scaled_rope,
        "static": variant.static,
        "quantised": variant.quantised,
        "halves": variant.halves,
    }
    inputs = {"sinks_H": variant.sinks, "slopes_H": variant.slopes, "past_BP2": variant.quantised}
    outputs = {"present_BT2": variant.quantised}
    taken, returned = _INPUTS[op_type], "output_BSHV present_BTR"
    if variant.halves:
        taken = taken.replace("past_BPR", "past_key_B1PW past_value_B1PW")
        returned = returned.replace("present_BTR", "present_key_B1TW present_value_B1TW")
    text = f"""
<opset_import: ["" : {opset}{f', "{FUSED_DOMAIN}" : 1' if fused else ""}], domain: "{DOMAIN}">
{variant.named(op_type)}
  <{_listing(_ATTRIBUTES[op_type], attributes)}>
  ({_listing(taken, inputs)})
  => ({_listing(returned, outputs)})
{{{_latent_body(variant, fused) if op_type == LATENT else _cached_body(variant)}}}
"""
    lines = [line.split("#")[0].rstrip() for line in text.splitlines()]
    return onnx.parser.parse_function("\n".join(line for line in lines if line))


def _listing(always: str, sometimes: dict[str, bool]) -> str:
    return ", ".join([*always.split(), *(name for name, present in sometimes.items() if present)])


def has_fused_form(variant: Variant) -> bool:
    """Whether :mod:`mla_compile.runtime.cpu` has an operator for the folded form of ``LatentAttention``."""
    return _has_two_forms(variant) and not (variant.key_scales or variant.value_scales or variant.halves)


def _fused_attention(variant: Variant) -> str:
    text = _FUSED_ATTENTION.replace("OPERATOR", FUSED[variant.quantised])
    return text.replace(" SCALES", ", ROW_SCALES" if variant.quantised else "")


def _latent_body(variant: Variant, fused: bool) -> str:
    keys, values = variant.key_scales, variant.value_scales
    attention = _fused_attention(variant) if fused else _folded_attention(variant)
    if _has_two_forms(variant):
        unfolded = unfolded_attention(key_scales=keys, value_scales=values, scaled_rope=variant.scaled_rope)
        unfolded = dequantised(unfolded) if variant.quantised else unfolded
        unfolded = _JOINED_HALVES + unfolded if variant.halves and not _joins(variant) else unfolded
        attention = MANY_QUERIES + _branches(unfolded, attention)
    sizes = _SIZES
    if variant.halves:
        old = "P = Shape <start = 1, end = 2> (past_BPR)"
        sizes = sizes.replace(old, "P = Shape <start = 2, end = 3> (past_key_B1PW)")
    return _over_rows(
        variant,
        [
            sizes,
            _TURNED_QUERIES,
            TURNED_KEYS,
            scale_sizes(variant),
            QUANTISED_APPEND if variant.quantised else APPENDED_SCALES if keys or values else _APPEND,
            *_masks(variant),
            _JOINED_HALVES if _joins(variant) else "",
            attention,
        ],
    )


def _joins(variant: Variant) -> bool:
    """Whether halves are joined for the folded form too, because parts of rows are looked at."""
    return variant.halves and (variant.key_scales or variant.value_scales)


def _has_two_forms(variant: Variant) -> bool:
    """Whether there is an unfolded form: for the features that are rare there is none.

    Nor for a cache that grows within a window: TensorRT 1.7 for RTX, which reads such a file, builds neither of its two
    parts, a branch and a cumulative sum, when it has both.
    """
    rare = variant.softcap or variant.sinks or variant.slopes or variant.bidirectional
    return not rare and (variant.static or not variant.window)


def _branches(unfolded: str, folded: str) -> str:
    """One result of two forms, of which only one is computed."""
    folded = folded.replace("output_BSHV", "folded_BSHV")
    return f"""
  output_BSHV = If (many) <
    then_branch = unfolded () => (unfolded_BSHV) {{{unfolded}}},
    else_branch = folded () => (folded_BSHV) {{{folded}}}
  >
"""


def turned_queries(past: str) -> str:
    """Sizes, and rotated queries ``turned_BSnhd``; ``past`` is what the cache is called, if it is no ``past_BPR``."""
    return _SIZES.replace("past_BPR", past) + _TURNED_QUERIES


def folded_queries() -> str:
    """From ``plain_BSHD`` and ``turned_BSnhd`` to ``latent_query_BSHr`` and ``placed_BSHR``."""
    return _FOLDED_SIZES + PLACED_QUERIES + _FOLDED_QUERIES


def latent_output() -> str:
    """From ``context_BMr`` to ``output_BSHV``."""
    return _LATENT_OUTPUT


def _folded_attention(variant: Variant) -> str:
    """From queries, rows and ``seen_BS1T`` to ``output_BSHV``."""
    return "".join(
        [
            folded_queries(),
            latent_scores(variant),
            logit_weights(variant),
            latent_context(variant),
            _LATENT_OUTPUT,
        ]
    )


def scale_sizes(variant: Variant) -> str:
    """How many scales a row has, of those that the variant has: ``m``, ``w`` and ``scale_width``."""
    keys, values = variant.key_scales, variant.value_scales
    return "".join([_KEY_SCALES * keys, _VALUE_SCALES * values, _BOTH_SCALES * (keys and values)])


def latent_scores(variant: Variant) -> str:
    """From ``latent_query_BSHr`` and ``placed_BSHR`` to ``scores_BSHT``, their products with ``ROWS``, with scales."""
    if variant.quantised:
        return QUANTISED_SCORES
    keys, values = variant.key_scales, variant.value_scales
    if variant.halves and not _joins(variant):
        return _LATENT_SCORES_HALVES
    scores = _LATENT_SCORES_VALUE_SCALES if values else _LATENT_SCORES
    if keys:
        scores = _LATENT_SCORES_SCALED_ROPE if variant.scaled_rope else _LATENT_SCORES_KEY_SCALES
    if keys or values:
        scores = scores.replace("SCALES", "scale_width" if keys and values else "m" if keys else "w")
    return scores


def latent_context(variant: Variant) -> str:
    """From ``weights_BSHT`` to the weighted sums of latents ``context_BMr``, value scales included."""
    if variant.quantised:
        return QUANTISED_CONTEXT
    weights = _WEIGHTS_VALUE_SCALES if variant.value_scales else _WEIGHTS
    if variant.halves and not _joins(variant):
        return weights + _LATENT_CONTEXT_HALVES
    apart = variant.key_scales and not variant.scaled_rope
    return weights + (_LATENT_CONTEXT_KEY_SCALES if apart else _LATENT_CONTEXT)


def _cached_body(variant: Variant) -> str:
    append = "  new_BNR = Identity (row_BNR)\n"
    return _over_rows(
        variant, [_SIZES, append, *_masks(variant), _CACHED_SCORES, logit_weights(variant), _CACHED_OUTPUT]
    )


def _masks(variant: Variant) -> list[str]:
    features = {name: getattr(variant, name) for name in ("static", "window", "slopes", "bidirectional", "halves")}
    parts = rows_and_masks(**features)
    return [with_scales(part) for part in parts] if variant.quantised else parts


def _over_rows(variant: Variant, parts: list[str]) -> str:
    rows = "whole" if variant.halves else "rows" if variant.window else "present"
    return "".join(parts).replace("ROWS", f"{rows}_BTR").replace("ROW_SCALES", f"{rows}_BT2")


def logit_weights(variant: Variant) -> str:
    """From ``scores_BSHT`` to ``weights_BSHT``, with ``seen_BS1T`` (and ``distance_BST`` for slopes)."""
    parts, logits = [], "scores_BSHT"
    for wanted, part, result in (
        (variant.softcap, _SOFTCAP, "capped_BSHT"),
        (variant.slopes, _SLOPES, "sloped_BSHT"),
        (True, _MASK, "masked_BSHT"),
        (True, _SOFTMAX_SINKS if variant.sinks else _SOFTMAX, "weights_BSHT"),
    ):
        if wanted:
            parts.append(part.replace("LOGITS", logits))
            logits = result
    return "".join(parts)
