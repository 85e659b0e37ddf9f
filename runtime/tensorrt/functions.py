"""The nodes of a file for TensorRT: attention in two parts to a cache of fixed memory, and appending to it.

Where a plugin of a node's name is registered in :data:`NAMESPACE` TensorRT takes it, elsewhere the body, and so does
every other runtime. What TensorRT's parser (that of 11 and of RTX 1.7) does not do decides their form:

* It knows a function by its name alone and takes no notice of overloads: one function per name.
* An attribute that a function hands on to a function within is 0 there, without a word: no function calls another.
* It takes a plugin for a node that has a function only if the node itself says so, by ``plugin_namespace``.

Suffixes name the axes: B sequences, S new tokens, H query heads, T rows that a cache has room for, n rope groups, h
heads of a group, d rope channels, r rank, R numbers of a row ``[latent | rope keys]``, P splits of the keys.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser

from mla_compile.runtime.onnx_function import DOMAIN

__all__ = ["APPEND", "COMBINE", "DECODE", "NAMESPACE", "PARTIAL", "PLUGIN", "function"]

NAMESPACE = DOMAIN
"""Where plugins register; ``mla_compile::LatentAttentionPartial`` and so on."""
PLUGIN = {"plugin_namespace": NAMESPACE, "plugin_version": "1"}
"""Attributes by which TensorRT's parser looks for a plugin."""
APPEND = "LatentAppend"
PARTIAL = "LatentAttentionPartial"
COMBINE = "LatentAttentionCombine"
DECODE = "LatentAttentionDecode"

_PLUGIN = ", ".join(PLUGIN)

_APPEND = f"""
{APPEND} <latent_rank, {_PLUGIN}> (row_BSR, cos_BSnd, sin_BSnd, cache_BTR, lengths_B) => (present_BTR) {{
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  axis3 = Constant <value_ints = [3]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  zero_scalar = Constant <value_int = 0> ()
  one_scalar = Constant <value_int = 1> ()
  rank = Constant <value_int: int = @latent_rank> ()
  r = Reshape (rank, one)
  BS = Shape <start = 0, end = 2> (row_BSR)
  S = Shape <start = 1, end = 2> (row_BSR)
  T = Shape <start = 1, end = 2> (cache_BTR)
  n = Shape <start = 2, end = 3> (cos_BSnd)
  half = Shape <start = 3, end = 4> (cos_BSnd)
  d = Mul (half, two)
  rope_width = Mul (n, d)

  # ---- rotate the rope keys
  latent_BSr = Slice (row_BSR, zero, r, two)
  key_own_BSR = Slice (row_BSR, r, end, two)
  key_BSR = CastLike (key_own_BSR, cos_BSnd)
  key_shape = Concat <axis = 0> (BS, n, d)
  key_BSnd = Reshape <allowzero = 1> (key_BSR, key_shape)
  real = Slice (key_BSnd, zero, half, axis3)
  imaginary = Slice (key_BSnd, half, end, axis3)
  rc = Mul (real, cos_BSnd)
  is = Mul (imaginary, sin_BSnd)
  ic = Mul (imaginary, cos_BSnd)
  rs = Mul (real, sin_BSnd)
  new_real = Sub (rc, is)
  new_imaginary = Add (ic, rs)
  turned_BSnd = Concat <axis = -1> (new_real, new_imaginary)
  flat_shape = Concat <axis = 0> (BS, rope_width)
  turned_wide_BSR = Reshape <allowzero = 1> (turned_BSnd, flat_shape)
  turned_BSR = CastLike (turned_wide_BSR, row_BSR)
  new_BSR = Concat <axis = -1> (latent_BSr, turned_BSR)

  # ---- each of the cache's rows is what it was, or the new token whose place it is
  T_scalar = Squeeze (T, zero)
  place_T = Range (zero_scalar, T_scalar, one_scalar)
  lengths = Cast <to = 7> (lengths_B)
  first_B = Sub (lengths, S)
  first_B1 = Unsqueeze (first_B, one)
  token_BT = Sub (place_T, first_B1)
  behind_first_BT = GreaterOrEqual (token_BT, zero_scalar)
  before_last_BT = Less (token_BT, S)
  written_BT = And (behind_first_BT, before_last_BT)
  any_BT = Where (written_BT, token_BT, zero_scalar)
  index_BT1 = Unsqueeze (any_BT, two)
  spread_BTR = GatherND <batch_dims = 1> (new_BSR, index_BT1)
  written_BT1 = Unsqueeze (written_BT, two)
  present_BTR = Where (written_BT1, spread_BTR, cache_BTR)
}}
"""

_ATTENTION = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  axis3 = Constant <value_ints = [3]> ()
  axis4 = Constant <value_ints = [4]> ()
  zero_scalar = Constant <value_int = 0> ()
  one_scalar = Constant <value_int = 1> ()
  lowest = Constant <value_float = -3.0e38> ()
  nothing = Constant <value_float = 0.0> ()
  unit = Constant <value_float = 1.0> ()
  factor = Constant <value_float: float = @scale> ()
  groups = Constant <value_int: int = @rope_groups> ()
  reach = Constant <value_int: int = @window> ()
  n = Reshape (groups, one)
  B = Shape <start = 0, end = 1> (latent_query_BSHr)
  S = Shape <start = 1, end = 2> (latent_query_BSHr)
  H = Shape <start = 2, end = 3> (latent_query_BSHr)
  r = Shape <start = 3, end = 4> (latent_query_BSHr)
  d = Shape <start = 3, end = 4> (rope_query_BSHd)
  R = Shape <start = 2, end = 3> (rows_BTR)
  T = Shape <start = 1, end = 2> (rows_BTR)
  h = Div (H, n)
  SH = Mul (S, H)
  rope_width = Mul (n, d)

  # ---- place every head's rotating channels in its group's slot of the row
  by_group = Concat <axis = 0> (B, S, n, h, d)
  turned_BSnhd = Reshape <allowzero = 1> (rope_query_BSHd, by_group)
  square = Concat <axis = 0> (n, n)
  blank = ConstantOfShape (square)
  slots_float = EyeLike <dtype = 1> (blank)
  slots_nn = CastLike (slots_float, latent_query_BSHr)
  slot_axes = Constant <value_ints = [1, 3]> ()
  slots_n1n1 = Unsqueeze (slots_nn, slot_axes)
  turned_BSnh1d = Unsqueeze (turned_BSnhd, axis4)
  placed_BSnhnd = Mul (turned_BSnh1d, slots_n1n1)
  placed_shape = Concat <axis = 0> (B, S, H, rope_width)
  placed_BSHR = Reshape <allowzero = 1> (placed_BSnhnd, placed_shape)

  # ---- logits of all heads to all rows
  query_BSHR = Concat <axis = -1> (latent_query_BSHr, placed_BSHR)
  merged = Concat <axis = 0> (B, SH, R)
  query_BMR = Reshape <allowzero = 1> (query_BSHR, merged)
  rows_BRT = Transpose <perm = [0, 2, 1]> (rows_BTR)
  product_BMT = MatMul (query_BMR, rows_BRT)
  product_shape = Concat <axis = 0> (B, S, H, T)
  product_BSHT = Reshape <allowzero = 1> (product_BMT, product_shape)
  exact_BSHT = Cast <to = 1> (product_BSHT)
  logits_BSHT = Mul (exact_BSHT, factor)

  # ---- a query sees the rows up to its own; one before its sequence's first row sees none
  S_scalar = Squeeze (S, zero)
  T_scalar = Squeeze (T, zero)
  token_S = Range (zero_scalar, S_scalar, one_scalar)
  place_T = Range (zero_scalar, T_scalar, one_scalar)
  lengths = Cast <to = 7> (lengths_B)
  first_B = Sub (lengths, S)
  first_B1 = Unsqueeze (first_B, one)
  own_BS = Add (token_S, first_B1)
  own_BS1 = Unsqueeze (own_BS, two)
  distance_BST = Sub (own_BS1, place_T)
  behind_BST = GreaterOrEqual (distance_BST, zero_scalar)
  near_BST = Less (distance_BST, reach)
  unbounded = Equal (reach, zero_scalar)
  within_BST = Or (near_BST, unbounded)
  seen_BST = And (behind_BST, within_BST)
  seen_BS1T = Unsqueeze (seen_BST, two)

  # ---- softmax
  masked_BSHT = Where (seen_BS1T, logits_BSHT, lowest)
  largest_BSH1 = ReduceMax <keepdims = 1> (masked_BSHT, axis3)
  below_BSHT = Sub (masked_BSHT, largest_BSH1)
  power_BSHT = Exp (below_BSHT)
  weights_BSHT = Where (seen_BS1T, power_BSHT, nothing)
  total_BSH1 = ReduceSum <keepdims = 1> (weights_BSHT, axis3)
  some_BSH1 = Greater (total_BSH1, nothing)
  divisor_BSH1 = Where (some_BSH1, total_BSH1, unit)
  share_BSHT = Div (weights_BSHT, divisor_BSH1)

  # ---- the weighted sum of latents
  share_like_BSHT = CastLike (share_BSHT, rows_BTR)
  weights_shape = Concat <axis = 0> (B, SH, T)
  share_BMT = Reshape <allowzero = 1> (share_like_BSHT, weights_shape)
  latent_BTr = Slice (rows_BTR, zero, r, two)
  context_BMr = MatMul (share_BMT, latent_BTr)
"""

_PARTIAL = f"""
{PARTIAL} <rope_groups, scale, window, splits, {_PLUGIN}>
  (latent_query_BSHr, rope_query_BSHd, rows_BTR, lengths_B) => (partial_BSHPr, lse_BSHP) {{{_ATTENTION}
  # ---- the only split, and its denominator
  infinity = Constant <value_float = -inf> ()
  log_BSH1 = Log (divisor_BSH1)
  denominator_BSH1 = Add (log_BSH1, largest_BSH1)
  lse_BSHP = Where (some_BSH1, denominator_BSH1, infinity)
  context_wide_BMr = Cast <to = 1> (context_BMr)
  context_shape = Concat <axis = 0> (B, S, H, one, r)
  partial_BSHPr = Reshape <allowzero = 1> (context_wide_BMr, context_shape)
}}
"""

_DECODE = f"""
{DECODE} <rope_groups, scale, window, {_PLUGIN}>
  (latent_query_BSHr, rope_query_BSHd, rows_BTR, lengths_B) => (context_BSHr) {{{_ATTENTION}
  context_shape = Concat <axis = 0> (B, S, H, r)
  context_BSHr = Reshape <allowzero = 1> (context_BMr, context_shape)
}}
"""

_COMBINE = f"""
{COMBINE} <to, {_PLUGIN}> (partial_BSHPr, lse_BSHP) => (context_BSHr) {{
  axis3 = Constant <value_ints = [3]> ()
  axis4 = Constant <value_ints = [4]> ()
  lowest = Constant <value_float = -3.0e38> ()
  nothing = Constant <value_float = 0.0> ()
  unit = Constant <value_float = 1.0> ()
  largest_BSH1 = ReduceMax <keepdims = 1> (lse_BSHP, axis3)
  found_BSH1 = Greater (largest_BSH1, lowest)
  origin_BSH1 = Where (found_BSH1, largest_BSH1, nothing)
  below_BSHP = Sub (lse_BSHP, origin_BSH1)
  weights_BSHP = Exp (below_BSHP)
  total_BSH1 = ReduceSum <keepdims = 1> (weights_BSHP, axis3)
  divisor_BSH1 = Where (found_BSH1, total_BSH1, unit)
  share_BSHP = Div (weights_BSHP, divisor_BSH1)
  share_BSHP1 = Unsqueeze (share_BSHP, axis4)

  # ---- what a split that saw nothing left in its part is not read: it may be NaN
  counts_BSHP1 = Greater (share_BSHP1, nothing)
  part_BSHPr = Mul (partial_BSHPr, share_BSHP1)
  kept_BSHPr = Where (counts_BSHP1, part_BSHPr, nothing)
  context_wide_BSHr = ReduceSum <keepdims = 0> (kept_BSHPr, axis3)
  context_BSHr = Cast <to: int = @to> (context_wide_BSHr)
}}
"""

_TEXTS = {APPEND: _APPEND, PARTIAL: _PARTIAL, COMBINE: _COMBINE, DECODE: _DECODE}


@functools.cache
def function(op_type: str, opset: int) -> onnx.FunctionProto:
    """Build the function of a node.

    ``LatentAppend`` is :func:`mla_compile.runtime.kernels.append_latent` on a contiguous cache.
    ``LatentAttentionPartial`` and ``LatentAttentionCombine`` in a row are
    :func:`mla_compile.runtime.kernels.latent_attention`, causal, with ``window`` 0 for none; of the ``splits`` that a
    kernel cuts the keys into the body makes one. ``LatentAttentionDecode`` is both in one, for a plugin that
    launches two kernels and cuts the keys as it sees fit. Unlike the kernels the body reads what lies behind a
    sequence's last row, so that it must be numbers.

    Args:
        op_type: ``APPEND``, ``PARTIAL``, ``COMBINE`` or ``DECODE``.
        opset: Version of the standard operators, 23 or later.
    """
    text = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">{_TEXTS[op_type]}'
    lines = [line.split("#")[0].rstrip() for line in text.splitlines()]
    return onnx.parser.parse_function("\n".join(line for line in lines if line))
