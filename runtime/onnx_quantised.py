"""Parts of ``LatentAttention`` with a quantised cache: codes of rows, two scales per token, and products of integers.

Text of ONNX operators over the names of :mod:`mla_compile.runtime.onnx_function`, which says what its suffixes are.

A latent is ``(code - 64) * scale`` with codes of seven bits, and a rope key ``(code - 128) * scale`` with codes of
eight bits and a scale of its own. Seven, because the latent is the right operand of the second product too, whose bytes
are signed: a code below 128 is the same byte there. What the rows are multiplied with is quantised for one product
only, in two digits, a high and a low one side by side, which leaves an error below 1e-4 of the largest. No product of
two bytes, and no sum of two of them, needs more than 16 bits: processors without dot products of bytes have no more.

Inverse norms, which products of keys and weights of values are multiplied with, are no codes: they stand behind the two
scales, as they are. They are positive, and so are weights of values that were multiplied with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "LATENT_LEVELS",
    "QUANTISED_CONTEXT",
    "ROPE_LEVELS",
    "SCALES",
    "SMALLEST",
    "dequantised",
    "quantised_append",
    "quantised_bytes",
    "quantised_scores",
    "with_scales",
]

LATENT_LEVELS = 63
"""Codes of a latent on either side of zero."""
ROPE_LEVELS = 127
"""Codes of rope keys on either side of zero."""
SCALES = 2
"""Scales per token: the latent's and the rope keys'; inverse norms are behind them."""
SMALLEST = 1e-20
"""What the largest number of a row counts for at least: zeros have a scale too."""


def quantised_bytes(rows: Sequence[int], norms: Sequence[int]) -> int:
    """Bytes a token takes in quantised caches: a byte per number, and scales and inverse norms in float32.

    Args:
        rows: Row length per layer, inverse norms included.
        norms: How many of these are inverse norms.
    """
    return sum(row - norm + 4 * (SCALES + norm) for row, norm in zip(rows, norms, strict=True))


def _codes(exact: str, name: str, levels: int) -> str:
    """Codes ``{name}_code_BNR``, numbers still, and their scale ``{name}_scale_BN1``."""
    return f"""
  {name}_sizes = Abs ({exact})
  {name}_any = Pad ({name}_sizes, one_before)
  {name}_largest = ReduceMax <keepdims = 1> ({name}_any, two)
  {name}_reached = Max ({name}_largest, smallest)
  {name}_levels = Constant <value_float = {levels}.0> ()
  {name}_scale_BN1 = Div ({name}_reached, {name}_levels)
  {name}_steps = Div ({exact}, {name}_scale_BN1)
  {name}_nearest = Round ({name}_steps)
  {name}_middle = Constant <value_float = {levels + 1}.0> ()
  {name}_code_BNR = Add ({name}_nearest, {name}_middle)
"""


def _digits(exact: str, name: str, levels: int) -> str:
    """Columns in two digits ``{name}_digits`` and their scales ``{name}_scale_B1M``."""
    return f"""
  {name}_sizes = Abs ({exact})
  {name}_largest = ReduceMax <keepdims = 1> ({name}_sizes, one)
  {name}_reached = Max ({name}_largest, smallest)
  {name}_levels = Constant <value_float = {levels}.0> ()
  {name}_scale_B1M = Div ({name}_reached, {name}_levels)
  {name}_steps = Div ({exact}, {name}_scale_B1M)
  {name}_high = Round ({name}_steps)
  {name}_rest = Sub ({name}_steps, {name}_high)
  {name}_finer = Constant <value_float = {2 * levels}.0> ()
  {name}_rest_steps = Mul ({name}_rest, {name}_finer)
  {name}_low = Round ({name}_rest_steps)
  {name}_both = Concat <axis = -1> ({name}_high, {name}_low)
  {name}_digits = Cast <to = 3> ({name}_both)
"""


def _product(rows: str, name: str, middle: int, scales: str) -> str:
    """What rows of codes and columns in digits make: ``{name}_BTM``."""
    return f"""
  {name}_zero = Constant <value = uint8 {{{middle}}}> ()
  {name}_integers = MatMulInteger ({rows}, {name}_digits, {name}_zero)
  {name}_numbers = Cast <to = 1> ({name}_integers)
  {name}_of_high, {name}_of_low = Split <axis = -1, num_outputs = 2> ({name}_numbers)
  {name}_share = Div ({name}_of_low, {name}_finer)
  {name}_sum = Add ({name}_of_high, {name}_share)
  {name}_of_token = Mul ({name}_sum, {scales})
  {name}_BTM = Mul ({name}_of_token, {name}_scale_B1M)
"""


_APPEND = (
    f"""
  # ---- the new rows' codes and scales; a zero before them, as without rope keys there is nothing to compare
  smallest = Constant <value_float = {SMALLEST}> ()
  one_before = Constant <value_ints = [0, 0, 1, 0, 0, 0]> ()
"""
    + _codes("latent_BNr", "new_latent", LATENT_LEVELS)
    + _codes("key_turned_BNR", "new_rope", ROPE_LEVELS)
    + """
  new_codes_BNR = Concat <axis = -1> (new_latent_code_BNR, new_rope_code_BNR)
  new_BNR = Cast <to = 2> (new_codes_BNR)
"""
)
_SCALES = """
  new_BN2 = Concat <axis = -1> (new_latent_scale_BN1, new_rope_scale_BN1)
"""
_SCALES_AND_NORMS = """
  norms_BNx = Slice (row_BNR, row_rest, end, two)
  new_BN2 = Concat <axis = -1> (new_latent_scale_BN1, new_rope_scale_BN1, norms_BNx)
"""

_TWO_SCALES = """
  USE_latent_scale_BT1, USE_rope_scale_BT1 = Split <axis = -1, num_outputs = 2> (ROW_SCALES)
"""
_TWO_SCALES_OF_MORE = """
  USE_scales_BT2 = Slice (ROW_SCALES, zero, two, two)
  USE_latent_scale_BT1, USE_rope_scale_BT1 = Split <axis = -1, num_outputs = 2> (USE_scales_BT2)
"""
_PRODUCTS = (
    """
  # ---- attend to the codes: the cache is the left operand, read once for all heads; zeros meet the rope keys
  latent_heads_shape = Concat <axis = 0> (B, SH, r)
  latent_query_BMr = Reshape (latent_query_BSHr, latent_heads_shape)
  latent_query_BrM = Transpose <perm = [0, 2, 1]> (latent_query_BMr)
  unmet = Concat <axis = 0> (zero, zero, zero, zero, rope_width, zero)
  latent_query_BRM = Pad (latent_query_BrM, unmet)
"""
    + _digits("latent_query_BRM", "latent_product", 127)
    + _product("ROWS", "latent_product", LATENT_LEVELS + 1, "scores_latent_scale_BT1")
    + """
  # ---- and to rope keys, and a zero that meets the last of the latent: there may be no others
  rope_heads_shape = Concat <axis = 0> (B, SH, rope_width)
  rope_query_BMR = Reshape <allowzero = 1> (placed_BSHR, rope_heads_shape)
  rope_query_met_BMR = Pad (rope_query_BMR, one_before)
  rope_query_BRM = Transpose <perm = [0, 2, 1]> (rope_query_met_BMR)
  last_latent = Sub (r, one)
  rope_codes_BTR = Slice (ROWS, last_latent, end, two)
"""
    + _digits("rope_query_BRM", "rope_product", 64)
    + _product("rope_codes_BTR", "rope_product", ROPE_LEVELS + 1, "scores_rope_scale_BT1")
)

# A key's norm belongs to its whole product, or to the latent's only: the product that it belongs to is `NORMED`.
_NORMED = """
  per_scale = Div (H, m)
  norms_end = Add (two, m)
  norms_BTm = Slice (ROW_SCALES, two, norms_end, two)
  norm_axes = Constant <value_ints = [2, 4]> ()
  norms_BT1m1 = Unsqueeze (norms_BTm, norm_axes)
  by_norm_shape = Concat <axis = 0> (B, T, S, m, per_scale)
  by_norm_BTSmh = Reshape (NORMED, by_norm_shape)
  normed_BTSmh = Mul (by_norm_BTSmh, norms_BT1m1)
  merged_heads_shape = Concat <axis = 0> (B, T, SH)
  normed_BTM = Reshape (normed_BTSmh, merged_heads_shape)
"""
_SUM = """
  scores_BTM = Add (latent_product_BTM, rope_product_BTM)
"""
_SUM_OF_NORMED = """
  scores_BTM = Add (normed_BTM, rope_product_BTM)
"""
_SUM_NORMED = """
  product_BTM = Add (latent_product_BTM, rope_product_BTM)
""" + _NORMED.replace("NORMED", "product_BTM").replace("normed_BTM", "scores_BTM")
_SCORES = """
  scores_BMT = Transpose <perm = [0, 2, 1]> (scores_BTM)
  scores_shape = Concat <axis = 0> (BS, H, T)
  scores_BSHT = Reshape (scores_BMT, scores_shape)
"""

QUANTISED_CONTEXT = f"""
  # ---- weights times the scales of their latents in two digits of seven bits
  scales_B1T = Transpose <perm = [0, 2, 1]> (scores_latent_scale_BT1)
  weights_of_codes = Mul (weights_BMT, scales_B1T)
  weight_largest = ReduceMax <keepdims = 1> (weights_of_codes, two)
  weight_reached = Max (weight_largest, smallest)
  weight_levels = Constant <value_float = 127.0> ()
  weight_scale_BM1 = Div (weight_reached, weight_levels)
  weight_steps = Div (weights_of_codes, weight_scale_BM1)
  weight_high = Floor (weight_steps)
  weight_rest = Sub (weight_steps, weight_high)
  weight_rest_steps = Mul (weight_rest, weight_levels)
  weight_low = Round (weight_rest_steps)
  weight_both = Concat <axis = 1> (weight_high, weight_low)
  weight_digits = Cast <to = 2> (weight_both)

  # ---- the sum of latents; what becomes of rope keys, whose bytes are others when they are signed, is left out
  signed_codes = Cast <to = 3> (ROWS)
  no_shift = Constant <value = uint8 {{0}}> ()
  signed_middle = Constant <value = int8 {{{LATENT_LEVELS + 1}}}> ()
  sums_int = MatMulInteger (weight_digits, signed_codes, no_shift, signed_middle)
  sums = Cast <to = 1> (sums_int)
  high_BMR, low_BMR = Split <axis = 1, num_outputs = 2> (sums)
  low_own_BMR = Div (low_BMR, weight_levels)
  steps_BMR = Add (high_BMR, low_own_BMR)
  context_BMR = Mul (steps_BMR, weight_scale_BM1)
  context_BMr = Slice (context_BMR, zero, r, two)
"""
"""From ``weights_BMT`` to ``context_BMr``, with names of :func:`quantised_scores`."""

_DEQUANTISED = """
  # ---- the rows that codes and scales stand for
TWO_SCALES
  latent_codes_u8 = Slice (ROWS, zero, r, two)
  latent_codes_BTr = Cast <to = 1> (latent_codes_u8)
  latent_centred_BTr = Sub (latent_codes_BTr, new_latent_middle)
  latent_decoded_BTr = Mul (latent_centred_BTr, decoding_latent_scale_BT1)
  rope_codes_u8 = Slice (ROWS, r, end, two)
  rope_codes_float_BTR = Cast <to = 1> (rope_codes_u8)
  rope_centred_BTR = Sub (rope_codes_float_BTR, new_rope_middle)
  rope_decoded_BTR = Mul (rope_centred_BTR, decoding_rope_scale_BT1)
"""
_DECODED = """
  decoded_BTR = Concat <axis = -1> (latent_decoded_BTr, rope_decoded_BTR)
"""
_DECODED_AND_NORMS = """
  decoding_norms_BTx = Slice (ROW_SCALES, two, end, two)
  decoded_BTR = Concat <axis = -1> (latent_decoded_BTr, rope_decoded_BTR, decoding_norms_BTx)
"""


def quantised_append(norms: bool) -> str:
    """From ``latent_BNr``, ``key_turned_BNR`` and norms of ``row_BNR`` to codes ``new_BNR`` and scales ``new_BN2``."""
    return _APPEND + (_SCALES_AND_NORMS if norms else _SCALES)


def quantised_scores(*, key_norms: bool, value_norms: bool, normed_rope: bool) -> str:
    """From ``latent_query_BSHr`` and ``placed_BSHR`` to ``scores_BSHT``, norms of keys included.

    Args:
        key_norms: Whether there are norms of keys.
        value_norms: Whether there are norms of values.
        normed_rope: Whether the former belong to rope keys too.
    """
    total = _SUM
    if key_norms:
        of_latent = _NORMED.replace("NORMED", "latent_product_BTM") + _SUM_OF_NORMED
        total = _SUM_NORMED if normed_rope else of_latent
    return _two_scales("scores", norms=key_norms or value_norms) + _PRODUCTS + total + _SCORES


def _two_scales(use: str, *, norms: bool) -> str:
    """``{use}_latent_scale_BT1`` and ``{use}_rope_scale_BT1``."""
    return (_TWO_SCALES_OF_MORE if norms else _TWO_SCALES).replace("USE", use)


def dequantised(text: str, *, norms: bool) -> str:
    """Text over rows as text over codes and scales, behind :func:`quantised_append`."""
    decoded = _DEQUANTISED.replace("TWO_SCALES\n", _two_scales("decoding", norms=norms))
    return decoded + (_DECODED_AND_NORMS if norms else _DECODED) + text.replace("ROWS", "decoded_BTR")


def with_scales(text: str) -> str:
    """Text that keeps rows, keeping their scales too: they go where their rows go."""
    return re.sub(r"^ *\w+_B[PNT]R = .*$", lambda line: f"{line[0]}\n{_of_scales(line[0])}", text, flags=re.MULTILINE)


def _of_scales(line: str) -> str:
    return re.sub(r"_B([PNT])R\b", r"_B\g<1>2", line)
