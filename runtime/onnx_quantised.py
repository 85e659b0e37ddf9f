"""Parts of ``LatentAttention`` with a quantised cache: codes of rows, two scales per token, and products of integers.

Text of ONNX operators over the names of :mod:`mla_compile.runtime.onnx_function`, which says what its suffixes are.

A latent is ``(code - 64) * scale`` with codes of seven bits, and a rope key ``(code - 128) * scale`` with codes of
eight bits and a scale of its own. Seven, because the latent is the right operand of the second product too, whose bytes
are signed: a code below 128 is the same byte there. What the rows are multiplied with is quantised for one product
only, in two digits, a high and a low one side by side, which leaves an error below 1e-4 of the largest. No product of
two bytes, and no sum of two of them, needs more than 16 bits: processors without dot products of bytes have no more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "LATENT_LEVELS",
    "QUANTISED_APPEND",
    "QUANTISED_CONTEXT",
    "QUANTISED_SCORES",
    "ROPE_LEVELS",
    "SCALES",
    "SMALLEST",
    "dequantised",
    "quantised_bytes",
    "with_scales",
]

LATENT_LEVELS = 63
"""Codes of a latent on either side of zero."""
ROPE_LEVELS = 127
"""Codes of rope keys on either side of zero."""
SCALES = 2
"""Scales per token: the latent's and the rope keys'."""
SMALLEST = 1e-20
"""What the largest number of a row counts for at least: zeros have a scale too."""


def quantised_bytes(rows: Sequence[int]) -> int:
    """Bytes a token takes in quantised caches of these row lengths: a byte per number, and float32 scales per layer."""
    return sum(row + 4 * SCALES for row in rows)


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


QUANTISED_APPEND = (
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
  new_BN2 = Concat <axis = -1> (new_latent_scale_BN1, new_rope_scale_BN1)
"""
)
"""From ``latent_BNr`` and ``key_turned_BNR`` to codes ``new_BNR`` and scales ``new_BN2``."""

QUANTISED_SCORES = (
    """
  # ---- attend to the codes: the cache is the left operand, read once for all heads; zeros meet the rope keys
  latent_heads_shape = Concat <axis = 0> (B, SH, r)
  latent_query_BMr = Reshape (latent_query_BSHr, latent_heads_shape)
  latent_query_BrM = Transpose <perm = [0, 2, 1]> (latent_query_BMr)
  unmet = Concat <axis = 0> (zero, zero, zero, zero, rope_width, zero)
  latent_query_BRM = Pad (latent_query_BrM, unmet)
  latent_scale_BT1, rope_scale_BT1 = Split <axis = -1, num_outputs = 2> (ROW_SCALES)
"""
    + _digits("latent_query_BRM", "latent_product", 127)
    + _product("ROWS", "latent_product", LATENT_LEVELS + 1, "latent_scale_BT1")
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
    + _product("rope_codes_BTR", "rope_product", ROPE_LEVELS + 1, "rope_scale_BT1")
    + """
  scores_BTM = Add (latent_product_BTM, rope_product_BTM)
  scores_BMT = Transpose <perm = [0, 2, 1]> (scores_BTM)
  scores_shape = Concat <axis = 0> (BS, H, T)
  scores_BSHT = Reshape (scores_BMT, scores_shape)
"""
)
"""From ``latent_query_BSHr`` and ``placed_BSHR`` to ``scores_BSHT``."""

QUANTISED_CONTEXT = f"""
  # ---- weights times the scales of their latents in two digits of seven bits
  weights_shape = Concat <axis = 0> (B, SH, T)
  weights_BMT = Reshape (weights_BSHT, weights_shape)
  scales_B1T = Transpose <perm = [0, 2, 1]> (latent_scale_BT1)
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
"""From ``weights_BSHT`` to ``context_BMr``, with names of :data:`QUANTISED_SCORES`."""

_DEQUANTISED = """
  # ---- the rows that codes and scales stand for
  decoding_latent_BT1, decoding_rope_BT1 = Split <axis = -1, num_outputs = 2> (ROW_SCALES)
  latent_codes_u8 = Slice (ROWS, zero, r, two)
  latent_codes_BTr = Cast <to = 1> (latent_codes_u8)
  latent_centred_BTr = Sub (latent_codes_BTr, new_latent_middle)
  latent_decoded_BTr = Mul (latent_centred_BTr, decoding_latent_BT1)
  rope_codes_u8 = Slice (ROWS, r, end, two)
  rope_codes_float_BTR = Cast <to = 1> (rope_codes_u8)
  rope_centred_BTR = Sub (rope_codes_float_BTR, new_rope_middle)
  rope_decoded_BTR = Mul (rope_centred_BTR, decoding_rope_BT1)
  decoded_BTR = Concat <axis = -1> (latent_decoded_BTr, rope_decoded_BTR)
"""


def dequantised(text: str) -> str:
    """Text over rows as text over codes and scales, behind :data:`QUANTISED_APPEND`."""
    return _DEQUANTISED + text.replace("ROWS", "decoded_BTR")


def with_scales(text: str) -> str:
    """Text that keeps rows, keeping their scales too: they go where their rows go."""
    return re.sub(r"^ *\w+_B[PNT]R = .*$", lambda line: f"{line[0]}\n{_of_scales(line[0])}", text, flags=re.MULTILINE)


def _of_scales(line: str) -> str:
    return re.sub(r"_B([PNT])R\b", r"_B\g<1>2", line)
