"""Our nodes in an ONNX file: their names, and what each has beyond plain attention."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = [
    "CACHED",
    "DOMAIN",
    "FUSED_DOMAIN",
    "LATENT",
    "PLAIN",
    "VERSION",
    "Variant",
    "fused_operator",
    "variant_named",
]

DOMAIN, FUSED_DOMAIN = "mla_compile", "mla_compile.cpu"
"""Of our nodes, and of the operators of :mod:`mla_compile.runtime.cpu`, which are in a library."""
LATENT = "LatentAttention"
CACHED = "CachedAttention"
VERSION = 1


@dataclass(frozen=True)
class Variant:
    """What a node has beyond plain attention.

    Attributes:
        key_scales: Rows hold key scales (``LatentAttention`` only); attribute ``key_scales``, how many.
        softcap: Logits are bounded; attribute ``softcap``.
        window: Queries see the last real tokens only, and later rows are all the cache keeps; attribute ``window``.
        sinks: The softmax has a further logit per head; an input, and the attribute ``has_sinks``.
        slopes: Logits fall with distance; an input after ``sinks``, and the attribute ``has_slopes``.
        value_scales: Rows end in value scales (``LatentAttention`` only); attribute ``value_scales``, how many.
        bidirectional: Every real key is seen, and there may be more or fewer new rows than queries
            (``LatentAttention`` only, without slopes); attribute ``bidirectional``, 1.
        scaled_rope: Key scales multiply the product of rope keys too (only beside ``key_scales``); attribute
            ``scaled_rope``, 1.
        static: The cache has the size that the caller gives it, of which a layer with a window makes a ring
            (not beside ``bidirectional``, and from operator set 24 on); attribute ``static``, 1.
        quantised: The cache holds codes of rows; two scales per token, and the key and value scales behind them, are an
            input behind all others, and an output (``LatentAttention`` only, not ``bidirectional``); attribute
            ``quantised``, 1.
        halves: The cache is two tensors ``[B, 1, P, W]``, named key and value: halves of rows of ``2 W`` numbers, of
            which those behind the row's own are zeros. A window hides rows and drops none (``LatentAttention`` only,
            neither ``bidirectional`` nor ``quantised``); attribute ``halves``, 1.
        chunked: Queries see the tokens of their own chunk, of which ``window`` says the length (only beside
            ``window``); attribute ``chunked``, 1.
        coded_up: Up-projections are int8, and their scales, one per latent channel of a group, are two inputs behind
            all others: ``[G, 1, r]`` and ``[G', r, 1]`` (``LatentAttention`` only, not ``bidirectional``); attribute
            ``coded_up``, 1.
    """

    key_scales: bool = False
    softcap: bool = False
    window: bool = False
    sinks: bool = False
    slopes: bool = False
    value_scales: bool = False
    bidirectional: bool = False
    scaled_rope: bool = False
    static: bool = False
    quantised: bool = False
    halves: bool = False
    chunked: bool = False
    coded_up: bool = False

    def named(self, op_type: str) -> str:
        """Name of a function's variant: the function's own, and behind it the features that the variant has."""
        return "_".join([op_type, *(field.name for field in fields(self) if getattr(self, field.name))])


PLAIN = Variant()
"""Plain attention."""


def fused_operator(name: str, variant: Variant, *, float16: bool) -> str:
    """The operator of :mod:`mla_compile.runtime.cpu` for a variant's cache; there is one per type of cache and name.

    Args:
        name: Its own, which that for rows in float32 has alone.
        variant: What the node has.
        float16: Whether the model's numbers are float16.
    """
    cache = "OfPairs" if variant.halves else "OfCodes" if variant.quantised else "OfHalves" if float16 else ""
    return f"{FUSED_DOMAIN}.{name}{cache}"


def variant_named(op_type: str, name: str) -> Variant | None:
    """Which variant a function is that has such a name; None: it is none of this type."""
    rest = name.removeprefix(op_type)
    found = {}
    for field in fields(Variant):
        found[field.name] = rest.startswith(f"_{field.name}")  # no name begins with another
        rest = rest.removeprefix(f"_{field.name}")
    variant = Variant(**found)
    return variant if variant.named(op_type) == name else None
