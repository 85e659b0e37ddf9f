"""What a body with fused operators has in place of all that standard operators do before attention: one operator.

Text of ONNX operators over the names of :mod:`mla_compile.runtime.onnx_function`, which says what its suffixes are.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mla_compile.runtime.onnx_variant import Variant, fused_operator

__all__ = ["prepared", "unfolded_of_prepared"]

_MADE = ("plain_BSHD", "turned_BSnhd", "many", "seen_BST")
_NUMBERS = ("query_BSHD", "row_BNR", "cos_BSn", "sin_BSn")
_ASSIGNED = re.compile(r" *(?P<results>\w+(?:, \w+)*) = .*\((?P<inputs>[^()]*)\)")


def prepared(variant: Variant, float16: bool) -> str:
    """From the inputs to queries, the new cache, masks, and whether there are many queries: see ``prepare.h``.

    Args:
        variant: What the node has.
        float16: Whether its numbers are float16. The operator takes float32, and writes rows of the cache's type.
    """
    features = ["rope_groups", "rope_dim", "latent_rank"]
    features += [n for n in ("key_scales", "value_scales", "window", "chunked", "static") if getattr(variant, n)]
    features += ["has_slopes"] if variant.slopes else []
    attributes = ", ".join(["scale: float = @scale", *(f"{name}: int = @{name}" for name in features)])
    inputs = ["query_BSHD", "row_BNR", "past_BPR", "mask_BT", "cos_BSn", "sin_BSn", "key_up_GDr", "value_up_GrV"]
    made = [*_MADE, "present_BTR", ""]
    if variant.quantised:
        inputs.append("past_BP2")
        made[-1] = "present_BT2"
    if variant.halves:
        inputs = ["past_key_B1PW" if name == "past_BPR" else name for name in inputs] + ["past_value_B1PW"]
        made[-2:] = ["present_key_B1TW", "present_value_B1TW"]
    apart = variant.window and not variant.halves
    made.append("distance_BST" if variant.slopes else "")
    made += ["ROWS" if apart else "", "ROW_SCALES" if apart and variant.quantised else ""]
    casts = "".join(f"  float32_{name} = Cast <to = 1> ({name})\n" for name in _NUMBERS if float16)
    given = ", ".join(f"float32_{name}" if float16 and name in _NUMBERS else name for name in inputs)
    operator = fused_operator("PrepareAttention", variant, float16=float16)
    return f"""
  # ---- queries, the new cache, and which of its rows each query sees
  mask_BT = Cast <to = 7> (attention_mask_BT)
{casts}
  {", ".join(made).rstrip(", ")} = {operator} <{attributes}> ({given})
"""


def unfolded_of_prepared(before: str, unfolded: str, float16: bool) -> str:
    """The unfolded form behind :func:`prepared`, with what it needs of the text ``before`` it besides.

    Args:
        before: What standard operators do before either form, which says what rows are called, as the form does.
        unfolded: The form.
        float16: Whether its numbers are float16, which those of the operator never are.
    """
    made = {f"{rows}_{axes}" for rows in ("rows", "present") for axes in ("BTR", "BT2")}
    made |= {"distance_BST", "present_key_B1TW", "present_value_B1TW", *_MADE}
    # A row that is not quantised is as long as the new one.
    text = _leading_to("unfolded_BSHV", before + unfolded.replace("row_length", "R"), made)
    if not float16:
        return text
    for name in _MADE[:2]:
        text = f"  own_{name} = CastLike ({name}, query_BSHD)\n" + re.sub(rf"\b{name}\b", f"own_{name}", text)
    return text


def _leading_to(result: str, text: str, given: Collection[str]) -> str:
    """Those lines of a text that lead to a result from the given names, and are not what makes these."""
    needed, kept = {result}, []
    for line in reversed(text.splitlines()):
        match = _ASSIGNED.match(line.partition("#")[0])
        if match and needed & {*match["results"].split(", ")} - {*given}:
            needed |= {*match["inputs"].split(", ")}
            kept.append(line)
    return "\n" + "".join(f"{line}\n" for line in reversed(kept))
