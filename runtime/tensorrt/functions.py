"""The nodes of a file for TensorRT: attention in two parts to a cache of fixed memory, and appending to it.

Where a plugin of a node's name is registered in :data:`NAMESPACE` TensorRT takes it, elsewhere the body, and so does
every other runtime. What TensorRT's parser (that of 11 and of RTX 1.7) does not do decides their form:

* It knows a function by its name alone and takes no notice of overloads: one function per name, so that a variant (see
  :class:`~mla_compile.runtime.onnx_variant.Variant`) has a name of its own.
* An attribute that a function hands on to a function within is 0 there, without a word: no function calls another.
* It takes a plugin for a node that has a function only if the node itself says so, by ``plugin_namespace``.
* ``TensorScatter`` writes in place (a KV-cache update layer) if the cache is an input of the whole network with four
  axes, of which that of the tokens has a fixed length; nothing may stand between.

Suffixes name the axes: B sequences, S or N new tokens, H query heads, T rows that a cache has room for, n rope groups,
h heads of a group, d rope channels, r rank, m key scales, w value scales, R numbers of a row ``[latent | rope keys |
key scales | value scales]``, P splits of the keys, 1 the one "head" of rows that all heads share.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product

import onnx
import onnx.parser

from mla_compile.runtime.onnx_folded import APPENDED_SCALES, latent_context, latent_scores, scale_sizes
from mla_compile.runtime.onnx_queries import PLACED_QUERIES, TURNED_KEYS
from mla_compile.runtime.onnx_variant import DOMAIN, Variant

__all__ = ["APPEND", "COMBINE", "DECODE", "NAMESPACE", "OPSET", "PARTIAL", "PLUGIN", "SPLITS", "function", "variants"]

NAMESPACE = DOMAIN
"""Where plugins register; ``mla_compile::LatentAttentionPartial`` and so on."""
PLUGIN = {"plugin_namespace": NAMESPACE, "plugin_version": "1"}
"""Attributes by which TensorRT's parser looks for a plugin."""
OPSET = 24
"""Standard operators that the bodies are written in: the first set with ``TensorScatter``."""
SPLITS = 16
"""Pieces that kernels cut a cache into: with 8 sequences of one block of rows they keep an H200's processors busy."""
APPEND = "LatentAppend"
PARTIAL = "LatentAttentionPartial"
COMBINE = "LatentAttentionCombine"
DECODE = "LatentAttentionDecode"
_PLAIN = Variant()

_SIGNATURES = {
    APPEND: ("latent_rank", "row_BNR, cos_BSn, sin_BSn, cache_B1TR, lengths_B", "present_B1TR"),
    PARTIAL: (
        "rope_groups, scale, softcap, window, chunked, key_scales, value_scales, scaled_rope, splits",
        "latent_query_BSHr, rope_query_BSHd, rows_B1TR, lengths_B",
        "partial_BSHPr, lse_BSHP",
    ),
    COMBINE: ("to", "partial_BSHPr, lse_BSHP", "context_BSHr"),
    DECODE: (
        "rope_groups, scale, softcap, window, chunked, key_scales, value_scales, scaled_rope, has_slopes, has_sinks",
        "latent_query_BSHr, rope_query_BSHd, rows_B1TR, lengths_B",
        "context_BSHr",
    ),
}
"""Attributes, inputs and outputs. Slopes are one more input of ``PARTIAL`` and ``DECODE``, and behind them sinks of
``COMBINE`` and ``DECODE``, which says by attributes what it has."""

_APPEND_SIZES = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  axis3 = Constant <value_ints = [3]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  rank = Constant <value_int: int = @latent_rank> ()
  r = Reshape (rank, one)
  BN = Shape <start = 0, end = 2> (row_BNR)
  N = Shape <start = 1, end = 2> (row_BNR)
  n = Shape <start = 2, end = 3> (cos_BSn)
  half = Shape <start = 3, end = 4> (cos_BSn)
  d = Mul (half, two)
  rope_width = Mul (n, d)
  row_rest = Add (r, rope_width)
"""

_WRITE = """
  # ---- the first token that is no padding comes first, and the last one again for those that padding leaves
  zero_scalar = Constant <value_int = 0> ()
  one_scalar = Constant <value_int = 1> ()
  N_scalar = Squeeze (N, zero)
  lengths = Cast <to = 7> (lengths_B)
  first_B = Sub (lengths, N)
  start_B = Max (first_B, zero)
  padding_B = Sub (start_B, first_B)
  padding_B1 = Unsqueeze (padding_B, one)
  token_N = Range (zero_scalar, N_scalar, one_scalar)
  behind_BN = Add (token_N, padding_B1)
  last = Sub (N, one)
  token_BN = Min (behind_BN, last)
  token_BN1 = Unsqueeze (token_BN, two)
  moved_BNR = GatherND <batch_dims = 1> (new_BNR, token_BN1)
  moved_B1NR = Unsqueeze (moved_BNR, one)
  present_B1TR = TensorScatter <axis = -2, mode = "linear"> (cache_B1TR, moved_B1NR, start_B)
"""

_PARTIAL_SIZES = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  axis3 = Constant <value_ints = [3]> ()
  axis4 = Constant <value_ints = [4]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  zero_scalar = Constant <value_int = 0> ()
  one_scalar = Constant <value_int = 1> ()
  groups = Constant <value_int: int = @rope_groups> ()
  n = Reshape (groups, one)
  rows_BTR = Squeeze (rows_B1TR, one)
  BS = Shape <start = 0, end = 2> (latent_query_BSHr)
  B = Shape <start = 0, end = 1> (latent_query_BSHr)
  S = Shape <start = 1, end = 2> (latent_query_BSHr)
  H = Shape <start = 2, end = 3> (latent_query_BSHr)
  r = Shape <start = 3, end = 4> (latent_query_BSHr)
  d = Shape <start = 3, end = 4> (rope_query_BSHd)
  T = Shape <start = 1, end = 2> (rows_BTR)
  h = Div (H, n)
  SH = Mul (S, H)
  rope_width = Mul (n, d)
  row_rest = Add (r, rope_width)
  by_group = Concat <axis = 0> (BS, n, h, d)
  turned_BSnhd = Reshape <allowzero = 1> (rope_query_BSHd, by_group)
"""

_SEEN = """
  # ---- a query sees the rows up to its own; one before its sequence's first row sees none
  reach = Constant <value_int: int = @window> ()
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
"""

_WITHIN = """
  near_BST = Less (distance_BST, reach)
  unbounded = Equal (reach, zero_scalar)
  within_BST = Or (near_BST, unbounded)
"""

_WITHIN_CHUNK = """
  inside_BS1 = Mod (own_BS1, reach)
  within_BST = LessOrEqual (distance_BST, inside_BS1)
"""

_SEEN_WITHIN = """
  seen_BST = And (behind_BST, within_BST)
  seen_BS1T = Unsqueeze (seen_BST, two)
"""

_LOGITS = """
  # ---- from scores to logits, in float32
  factor = Constant <value_float: float = @scale> ()
  exact_BSHT = Cast <to = 1> (scores_BSHT)
  scaled_BSHT = Mul (exact_BSHT, factor)
"""

_CAPPED = """
  bound = Constant <value_float: float = @softcap> ()
  ratio_BSHT = Div (scaled_BSHT, bound)
  within_one_BSHT = Tanh (ratio_BSHT)
  logits_BSHT = Mul (within_one_BSHT, bound)
"""

_UNCAPPED = """
  logits_BSHT = Identity (scaled_BSHT)
"""

_SLOPED = """
  distance_BS1T = Unsqueeze (distance_BST, two)
  distance_float_BS1T = Cast <to = 1> (distance_BS1T)
  slopes_H1 = Unsqueeze (slopes_H, one)
  loss_BSHT = Mul (distance_float_BS1T, slopes_H1)
  level_BSHT = Sub (logits_BSHT, loss_BSHT)
"""

_LEVEL = """
  level_BSHT = Identity (logits_BSHT)
"""

_MASKED = """
  # ---- softmax
  lowest = Constant <value_float = -3.0e38> ()
  none = Constant <value_float = 0.0> ()
  unit = Constant <value_float = 1.0> ()
  masked_BSHT = Where (seen_BS1T, level_BSHT, lowest)
  own_BSH1 = ReduceMax <keepdims = 1> (masked_BSHT, axis3)
"""

_POWERS = """
  origin_BSH1 = Identity (largest_BSH1)
  below_BSHT = Sub (masked_BSHT, origin_BSH1)
  power_BSHT = Exp (below_BSHT)
  kept_BSHT = Where (seen_BS1T, power_BSHT, none)
  sum_BSH1 = ReduceSum <keepdims = 1> (kept_BSHT, axis3)
"""

_WEIGHTS = """
  some_BSH1 = Greater (total_BSH1, none)
  divisor_BSH1 = Where (some_BSH1, total_BSH1, unit)
  share_BSHT = Div (kept_BSHT, divisor_BSH1)
  weights_BSHT = CastLike (share_BSHT, rows_BTR)
"""

_ONE_SPLIT = """
  # ---- the only split, and its denominator
  infinity = Constant <value_float = -inf> ()
  log_BSH1 = Log (divisor_BSH1)
  denominator_BSH1 = Add (log_BSH1, largest_BSH1)
  lse_BSHP = Where (some_BSH1, denominator_BSH1, infinity)
  context_wide_BMr = Cast <to = 1> (context_BMr)
  partial_shape = Concat <axis = 0> (BS, H, one, r)
  partial_BSHPr = Reshape <allowzero = 1> (context_wide_BMr, partial_shape)
"""

_NO_SPLITS = """
  decoded_shape = Concat <axis = 0> (BS, H, r)
  context_BSHr = Reshape <allowzero = 1> (context_BMr, decoded_shape)
"""

_LARGEST = """
  axis3 = Constant <value_ints = [3]> ()
  axis4 = Constant <value_ints = [4]> ()
  lowest = Constant <value_float = -3.0e38> ()
  nothing = Constant <value_float = 0.0> ()
  unit = Constant <value_float = 1.0> ()
  own_BSH1 = ReduceMax <keepdims = 1> (lse_BSHP, axis3)
"""

_LARGEST_SINKS = """
  sink_axis = Constant <value_ints = [1]> ()
  sinks_H1 = Unsqueeze (sinks_H, sink_axis)
  largest_BSH1 = Max (own_BSH1, sinks_H1)
"""

_LARGEST_OWN = """
  largest_BSH1 = Identity (own_BSH1)
"""

_TOTAL = """
  found_BSH1 = Greater (largest_BSH1, lowest)
  origin_BSH1 = Where (found_BSH1, largest_BSH1, nothing)
  below_BSHP = Sub (lse_BSHP, origin_BSH1)
  weights_BSHP = Exp (below_BSHP)
  sum_BSH1 = ReduceSum <keepdims = 1> (weights_BSHP, axis3)
"""

_TOTAL_SINKS = """
  sink_below_BSH1 = Sub (sinks_H1, origin_BSH1)
  sink_BSH1 = Exp (sink_below_BSH1)
  total_BSH1 = Add (sum_BSH1, sink_BSH1)
"""

_TOTAL_OWN = """
  total_BSH1 = Identity (sum_BSH1)
"""

_CONTEXT = """
  divisor_BSH1 = Where (found_BSH1, total_BSH1, unit)
  share_BSHP = Div (weights_BSHP, divisor_BSH1)
  share_BSHP1 = Unsqueeze (share_BSHP, axis4)

  # ---- what a split that saw nothing left in its part is not read: it may be NaN
  counts_BSHP1 = Greater (share_BSHP1, nothing)
  part_BSHPr = Mul (partial_BSHPr, share_BSHP1)
  kept_BSHPr = Where (counts_BSHP1, part_BSHPr, nothing)
  context_wide_BSHr = ReduceSum <keepdims = 0> (kept_BSHPr, axis3)
  context_BSHr = Cast <to: int = @to> (context_wide_BSHr)
"""


def variants() -> Iterator[tuple[str, Variant]]:
    """Every operator of quickly deployable plugins with every combination of features that it can have."""
    yield APPEND, _PLAIN
    yield COMBINE, _PLAIN
    yield COMBINE, Variant(sinks=True)
    either = (False, True)
    for keys, rope, values, softcap, slopes, chunked in product(*[either] * 6):
        if keys or not rope:
            scales = {"key_scales": keys, "scaled_rope": rope, "value_scales": values}
            yield PARTIAL, Variant(**scales, softcap=softcap, slopes=slopes, chunked=chunked)


@functools.cache
def function(op_type: str, variant: Variant = _PLAIN) -> onnx.FunctionProto:
    """Build the function of a node; its name is the variant's.

    ``LatentAppend`` is :func:`mla_compile.runtime.kernels.append_latent` on a contiguous cache, but for the memory
    right behind a sequence that is shorter than the new tokens, which it overwrites. ``LatentAttentionPartial`` and
    ``LatentAttentionCombine`` in a row are :func:`mla_compile.runtime.kernels.latent_attention`, causal, with
    ``window`` 0 for none, or the length of chunks where the variant has some; of the ``splits`` that a kernel cuts the
    keys into the body makes one.
    ``LatentAttentionDecode`` is both in one, for a plugin that launches two kernels and cuts the keys as it sees fit.
    Unlike the kernels the body reads what lies behind a sequence's last row, so that it must be numbers.

    Args:
        op_type: ``APPEND``, ``PARTIAL``, ``COMBINE`` or ``DECODE``.
        variant: What the node has; a window is no variant here, but chunks are. ``LatentAppend`` is one for all.
    """
    attributes, inputs, outputs = _SIGNATURES[op_type]
    inputs += ", slopes_H" * variant.slopes + ", sinks_H" * variant.sinks
    text = f"""
<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
{variant.named(op_type)} <{attributes}, {", ".join(PLUGIN)}> ({inputs}) => ({outputs}) {{
{_BODIES[op_type](variant)}
}}
"""
    lines = [line.split("#")[0].rstrip() for line in text.splitlines()]
    return onnx.parser.parse_function("\n".join(line for line in lines if line))


def _append_body(variant: Variant) -> str:
    return _APPEND_SIZES + TURNED_KEYS + APPENDED_SCALES + _WRITE


def _partial_body(variant: Variant) -> str:
    return _attention(variant) + _ONE_SPLIT


def _decode_body(variant: Variant) -> str:
    return _attention(variant) + _NO_SPLITS


def _attention(variant: Variant) -> str:
    """The contexts ``[B, S H, r]`` of all rows at once."""
    return "".join(
        [
            _PARTIAL_SIZES,
            PLACED_QUERIES,
            scale_sizes(variant),
            latent_scores(variant).replace("ROWS", "rows_BTR"),
            _SEEN,
            _WITHIN_CHUNK if variant.chunked else _WITHIN,
            _SEEN_WITHIN,
            _LOGITS,
            _CAPPED if variant.softcap else _UNCAPPED,
            _SLOPED if variant.slopes else _LEVEL,
            _MASKED,
            _LARGEST_SINKS if variant.sinks else _LARGEST_OWN,
            _POWERS,
            _TOTAL_SINKS if variant.sinks else _TOTAL_OWN,
            _WEIGHTS,
            latent_context(variant).replace("ROWS", "rows_BTR"),
        ]
    )


def _combine_body(variant: Variant) -> str:
    largest, total = (_LARGEST_SINKS, _TOTAL_SINKS) if variant.sinks else (_LARGEST_OWN, _TOTAL_OWN)
    return _LARGEST + largest + _TOTAL + total + _CONTEXT


_BODIES = {APPEND: _append_body, PARTIAL: _partial_body, COMBINE: _combine_body, DECODE: _decode_body}
