"""The folded form of ``LatentAttention``: up-projections are in queries and outputs, and the rows are attended to.

Text of ONNX operators over the names of :mod:`mla_compile.runtime.onnx_function`, which says what its suffixes are.
"""

from __future__ import annotations

from mla_compile.runtime.onnx_logits import logit_weights
from mla_compile.runtime.onnx_quantised import QUANTISED_CONTEXT, quantised_scores
from mla_compile.runtime.onnx_queries import folded_queries
from mla_compile.runtime.onnx_variant import Variant

__all__ = [
    "APPENDED_SCALES",
    "JOINED_HALVES",
    "folded_attention",
    "joins_halves",
    "latent_context",
    "latent_output",
    "latent_scores",
    "scale_sizes",
]

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

JOINED_HALVES = """
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


def folded_attention(variant: Variant) -> str:
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
    keys, values = variant.key_scales, variant.value_scales
    if variant.quantised:
        return quantised_scores(key_norms=keys, value_norms=values, normed_rope=variant.scaled_rope)
    if variant.halves and not joins_halves(variant):
        return _LATENT_SCORES_HALVES
    scores = _LATENT_SCORES_VALUE_SCALES if values else _LATENT_SCORES
    if keys:
        scores = _LATENT_SCORES_SCALED_ROPE if variant.scaled_rope else _LATENT_SCORES_KEY_SCALES
    if keys or values:
        scores = scores.replace("SCALES", "scale_width" if keys and values else "m" if keys else "w")
    return scores


def latent_context(variant: Variant) -> str:
    """From ``weights_BSHT`` to the weighted sums of latents ``context_BMr``, value scales included."""
    weights = _WEIGHTS_VALUE_SCALES if variant.value_scales else _WEIGHTS
    if variant.quantised:
        return weights.replace("ROWS", "ROW_SCALES") + QUANTISED_CONTEXT
    if variant.halves and not joins_halves(variant):
        return weights + _LATENT_CONTEXT_HALVES
    apart = variant.key_scales and not variant.scaled_rope
    return weights + (_LATENT_CONTEXT_KEY_SCALES if apart else _LATENT_CONTEXT)


def latent_output() -> str:
    """From ``context_BMr`` to ``output_BSHV``."""
    return _LATENT_OUTPUT


def joins_halves(variant: Variant) -> bool:
    """Whether halves are joined for the folded form too, because parts of rows are looked at."""
    return variant.halves and (variant.key_scales or variant.value_scales)
