"""``LatentAttention`` for ONNX Runtime's CUDA provider: its operator ``PagedAttention`` with one latent cache.

The function folds up-projections into queries and outputs, as in decoding, and gives the rows to the operator, which
reads keys and values from one memory of blocks. Only real tokens are given to it, packed one sequence behind another,
so that padding may be anywhere and takes no room: a token's place in the cache is the number of real ones before it.
Every sequence has equally many blocks, one behind another.

Experimental: there is no kernel but for CUDA, and this has not been run on one.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser

from mla_compile.runtime.onnx_folded import latent_output
from mla_compile.runtime.onnx_queries import TURNED_KEYS, folded_queries, turned_queries
from mla_compile.runtime.onnx_variant import DOMAIN, LATENT, Variant

__all__ = ["BLOCK", "MICROSOFT", "paged_function", "paged_problem"]

BLOCK = 16
"""Tokens per block: the operator takes powers of two from 16 on."""
MICROSOFT = "com.microsoft"

_PACKED = """
  new_BNR = Concat <axis = -1> (latent_BNr, key_turned_BNR)
  rows_query_BSHR = Concat <axis = -1> (latent_query_BSHr, placed_BSHR)

  # ---- real tokens, one behind another
  total = Shape <start = 1, end = 2> (attention_mask_BT)
  earlier = Sub (total, S)
  mask_int = Cast <to = 7> (attention_mask_BT)
  zero_scalar = Constant <value_int = 0> ()
  real_BT = Greater (mask_int, zero_scalar)
  real_int_BT = Cast <to = 6> (real_BT)
  real_new_BS = Slice (real_int_BT, earlier, total, one)
  real_past_BP = Slice (real_int_BT, zero, earlier, one)
  new_count_B = ReduceSum <keepdims = 0> (real_new_BS, one)
  past_seqlens = ReduceSum <keepdims = 0> (real_past_BP, one)
  batch_axis = Constant <value_int = 0> ()
  ends_B = CumSum (new_count_B, batch_axis)
  begin = Constant <value = int32[1] {0}> ()
  cumulative = Concat <axis = 0> (begin, ends_B)
  everything = Constant <value_ints = [-1]> ()
  real_new_flat = Reshape (real_new_BS, everything)
  places_1N = NonZero (real_new_flat)
  places_N = Squeeze (places_1N, zero)
  query_shape = Concat <axis = 0> (M, everything)
  flat_query = Reshape (rows_query_BSHR, query_shape)
  flat_rows = Reshape (new_BNR, query_shape)
  own_query = Gather (flat_query, places_N)
  own_rows = Gather (flat_rows, places_N)
  packed_query = CastLike (own_query, past_blocks)
  packed_rows = CastLike (own_rows, past_blocks)

  # ---- every sequence's blocks
  blocks = Shape <start = 0, end = 1> (past_blocks)
  blocks_scalar = Squeeze (blocks)
  one_scalar = Constant <value_int = 1> ()
  numbers = Range (zero_scalar, blocks_scalar, one_scalar)
  numbers_int = Cast <to = 6> (numbers)
  table_shape = Concat <axis = 0> (B, everything)
  block_table = Reshape (numbers_int, table_shape)
BEFORE
  attended, present_blocks = com.microsoft.PagedAttention
    <num_heads: int = @num_heads, kv_num_heads = 1, kv_cache_layout = "LATENT", v_head_size: int = @latent_rank,
     scale = 1.0, do_rotary = 0 ATTRIBUTES>
    (packed_query, packed_rows, , past_blocks, , cumulative, past_seqlens, block_table INPUTS)

  # ---- back to where the tokens stood; padding gets zeros
  attended_like = CastLike (attended, query_BSHD)
  width = Mul (H, r)
  spread_shape = Concat <axis = 0> (M, width)
  nothing = CastLike (zero_scalar, query_BSHD)
  empty = Expand (nothing, spread_shape)
  places_N1 = Unsqueeze (places_N, one)
  spread_MR = ScatterND (empty, places_N1, attended_like)
  context_shape_BMr = Concat <axis = 0> (B, SH, r)
  context_BMr = Reshape (spread_MR, context_shape_BMr)
"""


def paged_problem(variant: Variant) -> str | None:
    """Why a layer cannot be given to the operator; None if it can."""
    if variant.chunked:
        return "a token sees its own chunk only, for which the operator has no mask"
    if variant.slopes:
        return "its scores fall with distance (ALiBi)"
    if variant.key_scales or variant.value_scales:
        return "its rows hold norms of keys or values, which the operator does not multiply with"
    return None


@functools.cache
def paged_function(opset: int, variant: Variant) -> onnx.FunctionProto:
    """Build the function of a node.

    Args:
        opset: Version of the standard operators, 23 or later.
        variant: What the node has: soft-cap, window, sinks.
    """
    attributes = {"softcap": variant.softcap, "window": variant.window, "has_sinks": variant.sinks}
    given = [
        "num_heads",
        "rope_groups",
        "rope_dim",
        "latent_rank",
        "scale",
        *(n for n, has in attributes.items() if has),
    ]
    taken = [
        "query_BSHD",
        "row_BNR",
        "past_blocks",
        "attention_mask_BT",
        "cos_BSn",
        "sin_BSn",
        "key_up_GDr",
        "value_up_GrV",
    ]
    taken += ["sinks_H"] if variant.sinks else []
    further = ", softcap: float = @softcap" if variant.softcap else ""
    further += ", local_window_size: int = @window" if variant.window else ""
    attend = _PACKED.replace("ATTRIBUTES", further)
    attend = attend.replace("BEFORE", "  sinks_like = CastLike (sinks_H, past_blocks)" if variant.sinks else "")
    attend = attend.replace(" INPUTS", ", , , , sinks_like" if variant.sinks else "")
    parts = [turned_queries("past_blocks"), TURNED_KEYS, folded_queries(), attend, latent_output()]
    text = f"""
<opset_import: ["" : {opset}, "{MICROSOFT}" : 1], domain: "{DOMAIN}">
{variant.named(LATENT)}_paged <{", ".join(given)}> ({", ".join(taken)}) => (output_BSHV, present_blocks)
{{{"".join(parts)}}}
"""
    lines = [line.split("#")[0].rstrip() for line in text.splitlines()]
    return onnx.parser.parse_function("\n".join(line for line in lines if line))
