"""Parts of ``LatentAttention`` and ``CachedAttention``: the rows attended to, the new cache, and what each query sees.

Text of ONNX operators over the names of :mod:`mla_compile.runtime.onnx_function`, which says what its suffixes are.
"""

from __future__ import annotations

__all__ = ["rows_and_masks"]

_SCALARS = """
  zero_scalar = Constant <value_int = 0> ()
  one_scalar = Constant <value_int = 1> ()
"""

# Every one says what the rows to attend to are, how many, and which mask is theirs. Without a window all rows are the
# new cache: the name of the output is the only one they have.
_ROWS = """
  T = Add (P, N)
  present_BTR = Concat <axis = 1> (past_BPR, new_BNR)
  own_mask_BT = Identity (attention_mask_BT)
"""

_ROWS_WINDOW = """
  # ---- all rows, those of them that later tokens can see, and the mask over them
  T = Add (P, N)
  rows_BTR = Concat <axis = 1> (past_BPR, new_BNR)
  reach_1 = Reshape (reach, one)
  seen_later = Sub (reach_1, one)
  surplus = Sub (T, seen_later)
  first_kept = Max (surplus, zero)
  present_BTR = Slice (rows_BTR, first_kept, end, one)
  minus_T = Neg (T)
  own_mask_BT = Slice (attention_mask_BT, minus_T, end, one)
"""

_ROWS_STATIC = """
  # ---- write the new rows behind those of all earlier tokens; nothing is real behind them
  T = Identity (P)
  total = Shape <start = 1, end = 2> (attention_mask_BT)
  earlier = Sub (total, N)
  earlier_B = Expand (earlier, B)
  present_BTR = TensorScatter <axis = 1> (past_BPR, new_BNR, earlier_B)
  room_left = Sub (P, total)
  pads = Concat <axis = 0> (zero, zero, zero, room_left)
  own_mask_BT = Pad (attention_mask_BT, pads)
"""

# What is written is read from the rows to attend to: it must not be written before they are.
_ROWS_RING = """
  # ---- the ring's rows and the new ones, and the ring with as many of these as it has room for
  T = Add (P, N)
  rows_BTR = Concat <axis = 1> (past_BPR, new_BNR)
  written = Min (P, N)
  first_written = Sub (T, written)
  written_BNR = Slice (rows_BTR, first_written, end, one)
  total = Shape <start = 1, end = 2> (attention_mask_BT)
  before_written = Sub (total, written)
  slot = Mod (before_written, P)
  slot_B = Expand (slot, B)
  present_BTR = TensorScatter <axis = 1, mode = "circular"> (past_BPR, written_BNR, slot_B)

  # ---- the mask over them: slots are filled in order and then over again, the last token's behind the one before it
  P_scalar = Squeeze (P)
  N_scalar = Squeeze (N)
  earlier = Sub (total, N)
  last_earlier = Sub (earlier, one)
  slot_P = Range (zero_scalar, P_scalar, one_scalar)
  behind_P = Sub (last_earlier, slot_P)
  ago_P = Mod (behind_P, P)
  token_P = Sub (last_earlier, ago_P)
  count_N = Range (zero_scalar, N_scalar, one_scalar)
  token_N = Add (count_N, earlier)
  token_T = Concat <axis = 0> (token_P, token_N)
  filled_T = GreaterOrEqual (token_T, zero_scalar)
  column_T = Max (token_T, zero)
  any_mask_BT = Gather <axis = 1> (attention_mask_BT, column_T)
  empty_mask = CastLike (zero_scalar, attention_mask_BT)
  own_mask_BT = Where (filled_T, any_mask_BT, empty_mask)
"""

# The cache is two halves of rows, the second of which may end in zeros. Rows that a window hides are kept.
_ROWS_HALVES = """
  # ---- the new rows in two halves
  T = Add (P, N)
  W = Shape <start = 3, end = 4> (past_key_B1PW)
  twice = Mul (W, two)
  row_length = Shape <start = 2, end = 3> (new_BNR)
  missing = Sub (twice, row_length)
  filling = Concat <axis = 0> (zero, zero, zero, zero, zero, missing)
  wide_BNR = Pad (new_BNR, filling)
  first_BNW, second_BNW = Split <axis = -1, num_outputs = 2> (wide_BNR)
  first_B1NW = Unsqueeze (first_BNW, one)
  second_B1NW = Unsqueeze (second_BNW, one)
"""

_HALVES_GROW = """
  present_key_B1TW = Concat <axis = 2> (past_key_B1PW, first_B1NW)
  present_value_B1TW = Concat <axis = 2> (past_value_B1PW, second_B1NW)
  own_mask_BT = Identity (attention_mask_BT)
"""

_HALVES_STATIC = """
  total = Shape <start = 1, end = 2> (attention_mask_BT)
  earlier = Sub (total, N)
  earlier_B = Expand (earlier, B)
  present_key_B1TW = TensorScatter <axis = 2> (past_key_B1PW, first_B1NW, earlier_B)
  present_value_B1TW = TensorScatter <axis = 2> (past_value_B1PW, second_B1NW, earlier_B)
  room_left = Sub (P, total)
  pads = Concat <axis = 0> (zero, zero, zero, room_left)
  own_mask_BT = Pad (attention_mask_BT, pads)
"""

_REACH = """
  reach = Constant <value_int: int = @window> ()
"""

_SEEN = """
  # ---- which keys each query sees: real ones before it, and always itself
  T_scalar = Squeeze (T)
  place_T = Range (zero_scalar, T_scalar, one_scalar)
  own_S = Slice (place_T, OWN, zero)
  own_S1 = Unsqueeze (own_S, one)
  before_ST = LessOrEqual (place_T, own_S1)
  itself_ST = Equal (place_T, own_S1)
  mask_int = Cast <to = 7> (own_mask_BT)
  real_BT = Greater (mask_int, zero_scalar)
  real_B1T = Unsqueeze (real_BT, one)
  real_before_BST = And (real_B1T, before_ST)
"""

_ORDER = """
  # ---- distances count real tokens
  real_int_BT = Cast <to = 7> (real_BT)
  order_BT = CumSum (real_int_BT, one_scalar)
"""

# The rows attended to may have others before them, or lie in another order.
_ALL_ORDER = """
  # ---- distances count real tokens, in the order in which they came
  all_mask_int = Cast <to = 7> (attention_mask_BT)
  all_real = Greater (all_mask_int, zero_scalar)
  all_real_int = Cast <to = 7> (all_real)
  all_order = CumSum (all_real_int, one_scalar)
"""

_ORDER_RING = (
    _ALL_ORDER
    + """
  order_BT = Gather <axis = 1> (all_order, column_T)
"""
)

# A chunk may begin before the first of the rows that are kept.
_ORDER_LAST = (
    _ALL_ORDER
    + """
  order_BT = Slice (all_order, minus_T, end, one)
"""
)

_DISTANCES = """
  own_order_BS = Slice (order_BT, OWN, one)
  own_order_BS1 = Unsqueeze (own_order_BS, two)
  order_B1T = Unsqueeze (order_BT, one)
  distance_BST = Sub (own_order_BS1, order_B1T)
"""

_ALLOWED = """
  seen_BST = Or (real_before_BST, itself_ST)
  seen_BS1T = Unsqueeze (seen_BST, two)
"""

_ALLOWED_WINDOW = """
  within_BST = Less (distance_BST, reach)
  allowed_BST = And (real_before_BST, within_BST)
  seen_BST = Or (allowed_BST, itself_ST)
  seen_BS1T = Unsqueeze (seen_BST, two)
"""

_ALLOWED_CHUNK = """
  # ---- how far a query sees: to where its chunk begins
  behind_first_BS1 = Sub (own_order_BS1, one_scalar)
  inside_BS1 = Mod (behind_first_BS1, reach)
  within_BST = LessOrEqual (distance_BST, inside_BS1)
  allowed_BST = And (real_before_BST, within_BST)
  seen_BST = Or (allowed_BST, itself_ST)
  seen_BS1T = Unsqueeze (seen_BST, two)
"""

_SEEN_OPEN = """
  # ---- which keys every query sees: the real ones, or all if none is real
  zero_scalar = Constant <value_int = 0> ()
  mask_int = Cast <to = 7> (own_mask_BT)
  real_BT = Greater (mask_int, zero_scalar)
  real_int_BT = Cast <to = 7> (real_BT)
  any_B1 = ReduceMax <keepdims = 1> (real_int_BT, one)
  none_B1 = Equal (any_B1, zero_scalar)
  seen_BT = Or (real_BT, none_B1)
  seen_axes = Constant <value_ints = [1, 2]> ()
  seen_BS1T = Unsqueeze (seen_BT, seen_axes)
"""


def rows_and_masks(
    *, static: bool, window: bool, slopes: bool, bidirectional: bool, halves: bool = False, chunked: bool = False
) -> list[str]:
    """From ``new_BNR`` to the rows to attend to, the new cache, and which of the rows each query sees.

    Arguments are the features of :class:`~mla_compile.runtime.onnx_variant.Variant`. ``ROWS`` is what the caller calls
    the rows to attend to.
    """
    if bidirectional:
        return [_ROWS, _SEEN_OPEN]
    allowed = (_ALLOWED_CHUNK if chunked else _ALLOWED_WINDOW) if window else _ALLOWED
    if halves:
        slots = "earlier, total" if static else "P, T"
        rows = _ROWS_HALVES.replace("T = Add (P, N)", "T = Identity (P)" if static else "T = Add (P, N)")
        apart = [_ORDER, _DISTANCES.replace("OWN", slots)] if window or slopes else []
        return [
            _SCALARS,
            *([_REACH] if window else []),
            rows,
            _HALVES_STATIC if static else _HALVES_GROW,
            _SEEN.replace("OWN", slots),
            *apart,
            allowed,
        ]
    seen = _SEEN.replace("OWN", "earlier, total" if static and not window else "P, T")
    distances = _DISTANCES.replace("OWN", "earlier, total" if static and not window else "P, T")
    if window:
        order = _ORDER_RING if static else _ORDER_LAST if chunked else _ORDER
        return [_SCALARS, _REACH, _ROWS_RING if static else _ROWS_WINDOW, seen, order, distances, allowed]
    counted = [_ORDER, distances] if slopes else []
    return [_SCALARS, _ROWS_STATIC if static else _ROWS, seen, *counted, allowed]
