"""Attention of an unconverted layer as an ONNX function, in the forms in which ONNX Runtime's CPU provider is fastest.

They are what a converted model is compared with. Keys and values have a memory each, ``[batch, heads, P, channels]``
with room for ``P`` tokens, which is written in place if a runtime is given one memory for input and output. There is no
padding, as the fastest form (the operator ``GroupQueryAttention``) knows none on the left: tokens of all sequences are
equally many, and ``attention_mask`` says by its length how many.

The other forms make the query heads that share a key rows of one product, so that the cache is read once for all of
them.
"""

from __future__ import annotations

import functools
from enum import StrEnum

import onnx
import onnx.parser

from mla_compile.runtime.onnx_logits import logit_weights
from mla_compile.runtime.onnx_variant import DOMAIN, Variant

__all__ = ["MICROSOFT", "ORIGINAL", "ORIGINAL_OPSET", "OriginalForm", "form_problem", "original_function"]

MICROSOFT = "com.microsoft"
ORIGINAL = "OriginalAttention"
ORIGINAL_OPSET = 24
"""The first operator set with ``TensorScatter``."""


class OriginalForm(StrEnum):
    """How the original attends."""

    GROUPED = "GroupQueryAttention"
    """ONNX Runtime's own operator."""
    PRODUCTS = "MatMul"
    """Two products and a softmax."""
    ATTENTION = "Attention"
    """The standard operator."""
    GROUPED_INT8 = "GroupQueryAttention int8"
    """ONNX Runtime's own operator with caches of bytes: one scale for all keys of a layer, and one for all values."""


# Suffixes as in runtime/onnx_function.py: B batch, S new tokens, T tokens attended to, H query heads, n key/value
# heads, h heads per key, D key channels, V value channels, M = S h.
_SIZES = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  flat_shape = Constant <value_ints = [0, 0, -1]> ()
  head_count = Constant <value_int: int = @num_heads> ()
  H = Reshape (head_count, one)
  BS = Shape <start = 0, end = 2> (query_BSHD)
  B = Shape <start = 0, end = 1> (query_BSHD)
  S = Shape <start = 1, end = 2> (query_BSHD)
  n = Shape <start = 1, end = 2> (past_key_BnPD)
  D = Shape <start = 3, end = 4> (past_key_BnPD)
  V = Shape <start = 3, end = 4> (past_value_BnPV)
  total = Shape <start = 1, end = 2> (attention_mask_BT)
  earlier = Sub (total, S)
  key_width = Mul (n, D)
  key_row_BSD = Slice (row_BSR, zero, key_width, two)
  value_row_BSV = Slice (row_BSR, key_width, end, two)
  final_shape = Concat <axis = 0> (BS, H, V)
"""

_GROUPED = """
  flat_query = Reshape (query_BSHD, flat_shape)
  last = Sub (total, one)
  last_32 = Cast <to = 6> (last)
  seqlens_k = Expand (last_32, B)
  total_scalar = Squeeze (total)
  total_32 = Cast <to = 6> (total_scalar)
  flat_output, present_key_BnPD, present_value_BnPV = com.microsoft.GroupQueryAttention
    <num_heads: int = @num_heads, kv_num_heads: int = @kv_heads, scale: float = @scale ATTRIBUTES>
    (flat_query, key_row_BSD, value_row_BSV, past_key_BnPD, past_value_BnPV, seqlens_k, total_32 INPUTS)
  output_BSHV = Reshape (flat_output, final_shape)
"""

_IN_PLACE = """
  earlier_B = Expand (earlier, B)
  key_shape = Concat <axis = 0> (BS, n, D)
  value_shape = Concat <axis = 0> (BS, n, V)
  key_BSnD = Reshape (key_row_BSD, key_shape)
  value_BSnV = Reshape (value_row_BSV, value_shape)
  key_BnSD = Transpose <perm = [0, 2, 1, 3]> (key_BSnD)
  value_BnSV = Transpose <perm = [0, 2, 1, 3]> (value_BSnV)
  present_key_BnPD = TensorScatter <axis = 2> (past_key_BnPD, key_BnSD, earlier_B)
  present_value_BnPV = TensorScatter <axis = 2> (past_value_BnPV, value_BnSV, earlier_B)
"""

_ALL_ROWS = """
  T = Shape <start = 2, end = 3> (past_key_BnPD)
  first = Identity (zero)
"""

_WINDOW_ROWS = """
  reach = Constant <value_int: int = @window> ()
  reach_1 = Reshape (reach, one)
  behind_window = Sub (total, reach_1)
  first_query = Sub (behind_window, S)
  first_seen = Add (first_query, one)
  first = Max (first_seen, zero)
  T = Sub (total, first)
  key_BnTD = Slice (present_key_BnPD, first, total, two)
  value_BnTV = Slice (present_value_BnPV, first, total, two)
"""

_SEEN = """
  zero_scalar = Constant <value_int = 0> ()
  one_scalar = Constant <value_int = 1> ()
  T_scalar = Squeeze (T)
  count_T = Range (zero_scalar, T_scalar, one_scalar)
  place_T = Add (count_T, first)
  S_scalar = Squeeze (S)
  count_S = Range (zero_scalar, S_scalar, one_scalar)
  own_S = Add (count_S, earlier)
  own_S1 = Unsqueeze (own_S, one)
  distance_ST = Sub (own_S1, place_T)
  before_ST = LessOrEqual (place_T, own_S1)
"""

_SEEN_ALL = """
  seen_ST = Identity (before_ST)
"""

_SEEN_WINDOW = """
  near_ST = Less (distance_ST, reach)
  seen_ST = And (before_ST, near_ST)
"""

_SEEN_CHUNK = """
  inside_S1 = Mod (own_S1, reach)
  near_ST = LessOrEqual (distance_ST, inside_S1)
  seen_ST = And (before_ST, near_ST)
"""

_QUERIES = """
  h = Div (H, n)
  M = Mul (S, h)
  grouped_shape = Concat <axis = 0> (BS, n, h, D)
  query_BSnhD = Reshape (QUERY, grouped_shape)
  query_BnShD = Transpose <perm = [0, 2, 1, 3, 4]> (query_BSnhD)
  merged_shape = Concat <axis = 0> (B, n, M, D)
  query_BnMD = Reshape (query_BnShD, merged_shape)
"""

_PRODUCTS = (
    """
  factor = Constant <value_float: float = @scale> ()
  factor_like = CastLike (factor, query_BSHD)
  scaled_BSHD = Mul (query_BSHD, factor_like)
"""
    + _QUERIES.replace("QUERY", "scaled_BSHD")
    + """
  # ---- the cache is the left operand, which is read as it lies
  query_BnDM = Transpose <perm = [0, 1, 3, 2]> (query_BnMD)
  scores_BnTM = MatMul (KEYS, query_BnDM)
  scores_BnMT = Transpose <perm = [0, 1, 3, 2]> (scores_BnTM)
  scores_split = Concat <axis = 0> (B, n, S, h, T)
  scores_BnShT = Reshape (scores_BnMT, scores_split)
  scores_BSnhT = Transpose <perm = [0, 2, 1, 3, 4]> (scores_BnShT)
  scores_shape = Concat <axis = 0> (BS, H, T)
  scores_BSHT = Reshape (scores_BSnhT, scores_shape)
  seen_S1T = Unsqueeze (seen_ST, one)
  seen_BS1T = Unsqueeze (seen_S1T, zero)
  distance_BST = Unsqueeze (distance_ST, zero)
WEIGHTS
  weights_split = Concat <axis = 0> (BS, n, h, T)
  weights_BSnhT = Reshape (weights_BSHT, weights_split)
  weights_BnShT = Transpose <perm = [0, 2, 1, 3, 4]> (weights_BSnhT)
  weights_merged = Concat <axis = 0> (B, n, M, T)
  weights_BnMT = Reshape (weights_BnShT, weights_merged)
  context_BnMV = MatMul (weights_BnMT, VALUES)
"""
)

_ATTENTION = (
    _QUERIES.replace("QUERY", "query_BSHD")
    + """
  seen_S1T = Unsqueeze (seen_ST, one)
  seen_shape = Concat <axis = 0> (S, h, T)
  seen_ShT = Expand (seen_S1T, seen_shape)
  seen_rows_shape = Concat <axis = 0> (one, one, M, T)
  seen_11MT = Reshape (seen_ShT, seen_rows_shape)
  context_BnMV = Attention <scale: float = @scale SOFTCAP> (query_BnMD, KEYS, VALUES, seen_11MT)
"""
)

_OUTPUT = """
  context_split = Concat <axis = 0> (B, n, S, h, V)
  context_BnShV = Reshape (context_BnMV, context_split)
  context_BSnhV = Transpose <perm = [0, 2, 1, 3, 4]> (context_BnShV)
  output_BSHV = Reshape (context_BSnhV, final_shape)
"""

_SCALES = """
  key_factor = Constant <value_float: float = @key_scale> ()
  value_factor = Constant <value_float: float = @value_scale> ()
  key_scale_1 = Reshape (key_factor, one)
  value_scale_1 = Reshape (value_factor, one)
"""


def form_problem(form: OriginalForm, variant: Variant, qk_dim: int, v_dim: int) -> str | None:
    """Why a layer has no such form; None if it has."""
    if form == OriginalForm.PRODUCTS:
        return None
    if variant.slopes:
        return "its scores fall with distance (ALiBi)"
    if form == OriginalForm.ATTENTION:
        return "it has attention sinks" if variant.sinks else None
    if variant.chunked:
        return "its tokens see their own chunk only"
    if qk_dim != v_dim:
        return f"its keys have {qk_dim} channels and its values {v_dim}"
    if qk_dim % 8:
        return f"its heads have {qk_dim} channels, which is no multiple of 8"
    return None


@functools.cache
def original_function(form: OriginalForm, variant: Variant) -> onnx.FunctionProto:
    """Build the function of a layer.

    It maps ``query [B, S, H, D]``, ``row [B, S, n D + n V]``, ``past_key [B, n, P, D]``, ``past_value [B, n, P, V]``,
    ``attention_mask [B, total]`` and, where the layer has them, ``sinks [H]`` and ``slopes [H]`` to ``output [B, S, H,
    V]`` and both caches with the new rows.

    Args:
        form: How it attends; :func:`form_problem` says which layers have it.
        variant: What the layer has: soft-cap, window, chunks, sinks, slopes.
    """
    int8 = form == OriginalForm.GROUPED_INT8
    attributes = {
        "softcap": variant.softcap,
        "window": variant.window,
        "has_sinks": variant.sinks,
        "has_slopes": variant.slopes,
        "chunked": variant.chunked,
        "key_scale": int8,
        "value_scale": int8,
    }
    inputs = {"sinks_H": variant.sinks, "slopes_H": variant.slopes}
    taken = ["num_heads", "kv_heads", "scale"] + [name for name, present in attributes.items() if present]
    given = ["query_BSHD", "row_BSR", "past_key_BnPD", "past_value_BnPV", "attention_mask_BT"]
    given += [name for name, present in inputs.items() if present]
    name = variant.named(f"{ORIGINAL}_{form.name.lower()}")
    text = f"""
<opset_import: ["" : {ORIGINAL_OPSET}, "{MICROSOFT}" : 1], domain: "{DOMAIN}">
{name} <{", ".join(taken)}> ({", ".join(given)}) => (output_BSHV, present_key_BnPD, present_value_BnPV)
{{{_body(form, variant)}}}
"""
    lines = [line.split("#")[0].rstrip() for line in text.splitlines()]
    return onnx.parser.parse_function("\n".join(line for line in lines if line))


def _body(form: OriginalForm, variant: Variant) -> str:
    if form in (OriginalForm.GROUPED, OriginalForm.GROUPED_INT8):
        return _SIZES + _grouped(variant, form == OriginalForm.GROUPED_INT8)
    attend = _PRODUCTS.replace("WEIGHTS", logit_weights(variant)) if form == OriginalForm.PRODUCTS else _ATTENTION
    attend = attend.replace("SOFTCAP", ", softcap: float = @softcap" if variant.softcap else "")
    keys, values = ("key_BnTD", "value_BnTV") if variant.window else ("present_key_BnPD", "present_value_BnPV")
    parts = [
        _SIZES,
        _IN_PLACE,
        _WINDOW_ROWS if variant.window else _ALL_ROWS,
        _SEEN,
        (_SEEN_CHUNK if variant.chunked else _SEEN_WINDOW) if variant.window else _SEEN_ALL,
        attend.replace("KEYS", keys).replace("VALUES", values),
        _OUTPUT,
    ]
    return "".join(parts)


def _grouped(variant: Variant, int8: bool) -> str:
    attributes, inputs, before = "", "", ""
    attributes += ", softcap: float = @softcap" if variant.softcap else ""
    attributes += ", local_window_size: int = @window" if variant.window else ""
    optional = ["", "", "", "", "sinks_H" if variant.sinks else ""]  # cos, sin, positions, bias, sinks
    if int8:
        attributes += ', kv_cache_bit_width = 8, k_quant_type = "PER_TENSOR", v_quant_type = "PER_TENSOR"'
        before, optional = _SCALES, [*optional, "key_scale_1", "value_scale_1"]
    if any(optional):
        inputs = ", " + ", ".join(optional)
    return before + _GROUPED.replace("ATTRIBUTES", attributes).replace("INPUTS", inputs)
