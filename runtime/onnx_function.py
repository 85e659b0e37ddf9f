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
nothing else. A quantised one holds codes and scales (:mod:`mla_compile.runtime.onnx_quantised`); up-projections may be
codes too (:mod:`mla_compile.runtime.onnx_up_codes`).

Bodies are put together here from parts, which are text over the same names, each in a module of its own. Suffixes name
the axes: B batch, S new tokens, N new rows (as many, if attention is causal), T all tokens, H query heads, n rope
groups or key/value heads, h heads per group, G up-projection groups, D head channels, r latent rank, m key scales,
w value scales, R row, V value channels, M merged axes.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser

from mla_compile.runtime.onnx_cached import cached_attention
from mla_compile.runtime.onnx_folded import APPENDED_SCALES, JOINED_HALVES, folded_attention, joins_halves, scale_sizes
from mla_compile.runtime.onnx_prepared import prepared, unfolded_of_prepared
from mla_compile.runtime.onnx_quantised import dequantised, quantised_append, with_scales
from mla_compile.runtime.onnx_queries import SIZES, TURNED_KEYS, TURNED_QUERIES
from mla_compile.runtime.onnx_rows import rows_and_masks
from mla_compile.runtime.onnx_unfolded import MANY_QUERIES, unfolded_attention
from mla_compile.runtime.onnx_up_codes import DECODED_IN_BRANCH, DECODED_UP, of_codes
from mla_compile.runtime.onnx_variant import CACHED, DOMAIN, FUSED_DOMAIN, LATENT, PLAIN, Variant, fused_operator

__all__ = [
    "attention_function",
    "has_fused_form",
]

_APPEND = """
  new_BNR = Concat <axis = -1> (latent_BNr, key_turned_BNR)
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
    op_type: str, opset: int, variant: Variant = PLAIN, *, fused: bool = False, float16: bool = False
) -> onnx.FunctionProto:
    """Build the function of a node.

    Args:
        op_type: ``LATENT`` or ``CACHED``.
        opset: Version of the standard operators, 23 or later.
        variant: What the node has.
        fused: Whether the folded form is an operator of :mod:`mla_compile.runtime.cpu`, and one more all before it.
        float16: Of what type the numbers are then: float16, else float32. Standard operators take either.

    Returns:
        The function; its name is the variant's.

    Raises:
        ValueError: The variant scales rope keys without key scales, has chunks without their length, or its cache is
            static where keys of another sequence are seen or the operator that writes to one is missing, it is
            quantised where that cannot be, or there is no fused operator for it.
    """
    if variant.scaled_rope and not variant.key_scales:
        raise ValueError("scaled_rope needs key_scales: there is nothing to scale rope keys by.")
    if variant.static and (variant.bidirectional or opset < 24):
        raise ValueError("A static cache needs causal attention and operator set 24.")
    if variant.quantised and (op_type == CACHED or variant.bidirectional):
        raise ValueError("A quantised cache is of causal latent attention.")
    if variant.halves and (op_type == CACHED or variant.bidirectional or variant.quantised):
        raise ValueError("Two halves are of causal latent attention whose cache is not quantised.")
    if variant.coded_up and (op_type == CACHED or variant.bidirectional):
        raise ValueError("Codes of up-projections are of causal latent attention.")
    if variant.chunked and not variant.window:
        raise ValueError("Chunks have no length. Pass window too.")
    if fused and not (op_type == LATENT and has_fused_form(variant)):
        raise ValueError("The fused operator is for causal latent attention.")
    if fused and variant.halves and float16:
        raise ValueError("The fused operator of two halves is for float32.")
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
        "chunked": variant.chunked,
        "coded_up": variant.coded_up,
    }
    inputs = {"sinks_H": variant.sinks, "slopes_H": variant.slopes, "past_BP2": variant.quantised}
    inputs |= dict.fromkeys(("key_scale_G1r", "value_scale_Gr1"), variant.coded_up)
    outputs = {"present_BT2": variant.quantised}
    taken, returned = _INPUTS[op_type], "output_BSHV present_BTR"
    if variant.halves:
        taken = taken.replace("past_BPR", "past_key_B1PW past_value_B1PW")
        returned = returned.replace("present_BTR", "present_key_B1TW present_value_B1TW")
    if variant.coded_up:
        taken = taken.replace("key_up_GDr value_up_GrV", "key_code_GDr value_code_GrV")
    body = _cached_body(variant) if op_type == CACHED else _latent_body(variant)
    body = _fused_body(variant, float16) if fused else body
    text = f"""
<opset_import: ["" : {opset}{f', "{FUSED_DOMAIN}" : 1' if fused else ""}], domain: "{DOMAIN}">
{variant.named(op_type)}
  <{_listing(_ATTRIBUTES[op_type], attributes)}>
  ({_listing(taken, inputs)})
  => ({_listing(returned, outputs)})
{{{body}}}
"""
    lines = [line.split("#")[0].rstrip() for line in text.splitlines()]
    return onnx.parser.parse_function("\n".join(line for line in lines if line))


def _listing(always: str, sometimes: dict[str, bool]) -> str:
    return ", ".join([*always.split(), *(name for name, present in sometimes.items() if present)])


def has_fused_form(variant: Variant) -> bool:
    """Whether :mod:`mla_compile.runtime.cpu` has an operator for the folded form of ``LatentAttention``."""
    return not variant.bidirectional


def _fused_attention(variant: Variant, float16: bool) -> str:
    numbers = {"key_scales": "int", "value_scales": "int", "scaled_rope": "int", "softcap": "float"}
    features = ", ".join(f"{name}: {kind} = @{name}" for name, kind in numbers.items() if getattr(variant, name))
    rows, beside = ("present_key_B1TW", "present_value_B1TW") if variant.halves else ("ROWS", "ROW_SCALES")
    optional = {
        beside: variant.quantised or variant.halves,
        "sinks_H": variant.sinks,
        "slopes_H": variant.slopes,
        "distance_BST": variant.slopes,
        "key_scale_G1r": variant.coded_up,
        "value_scale_Gr1": variant.coded_up,
    }
    given = ["plain_BSHD", "turned_BSnhd", rows, "seen_BST", "key_up_GDr", "value_up_GrV"]
    given += [name if present else "" for name, present in optional.items()]
    as_float32 = {"sinks_H", "slopes_H", "key_scale_G1r", "value_scale_Gr1"} if float16 else set()
    casts = "".join(f"  float32_{name} = Cast <to = 1> ({name})\n" for name in given if name in as_float32)
    inputs = ", ".join(f"float32_{name}" if name in as_float32 else name for name in given).rstrip(", ")
    operator = fused_operator("FoldedAttention", variant, float16=float16)
    # A branch must say of what type its result is, and the types of operators that ONNX does not know are not inferred.
    return f"""
{casts}
  fused_BSHV = {operator} {f"<{features}>" if features else ""} ({inputs})
  output_BSHV = Cast <to = {10 if float16 else 1}> (fused_BSHV)
"""


def _latent_body(variant: Variant) -> str:
    joined = JOINED_HALVES if joins_halves(variant) else ""  # for both forms
    attention = folded_attention(variant)
    if _has_two_forms(variant):
        attention = MANY_QUERIES + _branches(_unfolded(variant, joined=bool(joined)), attention)
    decoded = DECODED_UP if variant.coded_up else ""
    return _over_rows(variant, [decoded, *_before_attention(variant), joined, attention])


def _fused_body(variant: Variant, float16: bool) -> str:
    """One operator before attention, and one for its folded form; in the unfolded one, what is needed of the rest."""
    before = _over_rows(variant, [*_before_attention(variant), MANY_QUERIES])
    unfolded = _over_rows(variant, [_unfolded(variant, joined=False)])
    folded = _over_rows(variant, [_fused_attention(variant, float16)])
    operator = _over_rows(variant, [prepared(variant, float16)])
    if variant.coded_up:
        operator, before, folded = of_codes(operator), of_codes(before), of_codes(folded)
        unfolded = DECODED_IN_BRANCH + unfolded
    return operator + _branches(unfolded_of_prepared(before, unfolded, float16), folded)


def _before_attention(variant: Variant) -> list[str]:
    norms = variant.key_scales or variant.value_scales
    sizes = SIZES
    if variant.halves:
        old = "P = Shape <start = 1, end = 2> (past_BPR)"
        sizes = sizes.replace(old, "P = Shape <start = 2, end = 3> (past_key_B1PW)")
    append = quantised_append(norms) if variant.quantised else APPENDED_SCALES if norms else _APPEND
    return [sizes, TURNED_QUERIES, TURNED_KEYS, scale_sizes(variant), append, *_masks(variant)]


def _unfolded(variant: Variant, *, joined: bool) -> str:
    """The unfolded form; ``joined`` says whether rows in halves are whole before it."""
    text = unfolded_attention(variant)
    if variant.quantised:
        return dequantised(text, norms=variant.key_scales or variant.value_scales)
    return JOINED_HALVES + text if variant.halves and not joined else text


def _has_two_forms(variant: Variant) -> bool:
    """Whether there is an unfolded form of standard operators alone: for the features that are rare there is none.

    Nor for a cache that grows within a window: TensorRT 1.7 for RTX, which reads such a file, builds neither of its two
    parts, a branch and a cumulative sum, when it has both. No such file has fused operators: beside them there is one.
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


def _cached_body(variant: Variant) -> str:
    append = "  new_BNR = Identity (row_BNR)\n"
    return _over_rows(variant, [SIZES, append, *_masks(variant), cached_attention(variant)])


def _masks(variant: Variant) -> list[str]:
    names = ("static", "window", "chunked", "slopes", "bidirectional", "halves")
    features = {name: getattr(variant, name) for name in names}
    parts = rows_and_masks(**features)
    return [with_scales(part) for part in parts] if variant.quantised else parts


def _over_rows(variant: Variant, parts: list[str]) -> str:
    rows = "whole" if variant.halves else "rows" if variant.window else "present"
    return "".join(parts).replace("ROWS", f"{rows}_BTR").replace("ROW_SCALES", f"{rows}_BT2")
