"""``CachedAttention``: rows are keys and values, and heads that share a key are queries of one product.

Text of ONNX operators over the names of :mod:`mla_compile.runtime.onnx_function`, which says what its suffixes are.
"""

from __future__ import annotations

from mla_compile.runtime.onnx_logits import logit_weights
from mla_compile.runtime.onnx_variant import Variant

__all__ = ["cached_attention"]

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


def cached_attention(variant: Variant) -> str:
    """From queries, rows and ``seen_BS1T`` to ``output_BSHV``."""
    return _CACHED_SCORES + logit_weights(variant) + _CACHED_OUTPUT
