"""Cut an encoder-decoder in two: what makes the encoder's states, and the decoder as a language model that reads them.

The decoder is exported anew with the states as an input, so that every pass for causal language models applies to it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import Node

from mla_compile.errors import RefusedError
from mla_compile.passes.evaluate import example_inputs
from mla_compile.passes.insert_latent import erase_dead, finished
from mla_compile.passes.insert_low_rank import read_sizes_from
from mla_compile.passes.layout import Sizes
from mla_compile.passes.operands import root
from mla_compile.passes.trace import Anchor, DataFlow, find_anchors, upstream
from mla_compile.program import AnyProgram, DecoderProgram, Role
from mla_compile.quiet import quiet_exporter
from mla_compile.site import AttentionSite

__all__ = ["encoder_inputs", "encoder_layers", "split_decoder"]

_aten = torch.ops.aten
_STATES = "encoder_states"


def split_decoder(program: AnyProgram, cross: Sequence[AttentionSite], sizes: Sizes) -> DecoderProgram:
    """Export the decoder of a model by itself.

    Args:
        program: The whole model.
        cross: Its cross attention layers.
        sizes: Of one of them.

    Raises:
        RefusedError: The layers read different states, or the decoder needs more of the encoder than its states.
    """
    originals = {n.name: n for n in program.exported.graph.nodes}
    sources = {root(originals[site.key.origin]).name for site in cross}
    if len(sources) != 1:
        raise _not_split(program, f"its decoder reads {len(sources)} different encoder states")
    masks = {site.padding for site in cross if site.padding is not None}
    if len(masks) > 1:
        raise _not_split(program, "its cross attention layers have different padding masks")
    states, mask = originals[sources.pop()], next(iter(masks), None)
    mine = [name for name in program.user_inputs if name not in encoder_inputs(program, cross)]
    named = {role: [n for n in mine if program.user_inputs[n][0] == role] for role in Role}
    if len(named[Role.TOKENS]) != 1 or named[Role.VALUES] or any(len(names) > 1 for names in named.values()):
        raise _not_split(
            program, f"its decoder takes {', '.join(mine) or 'nothing'}; which one holds the ids is unclear"
        )
    (tokens,) = named[Role.TOKENS]
    logits = _logits(program, program.user_inputs[tokens][1], originals)

    module = program.whole_module()
    nodes = {n.name: n for n in module.graph.nodes}
    with module.graph.inserting_before(nodes[next(iter(program.user_inputs))]):
        given = module.graph.placeholder(_STATES)
    nodes[states.name].replace_all_uses_with(given)
    nodes["output"].args = ((nodes[logits],),)
    kept = {given: states.meta["val"]} | {nodes[n]: program.user_inputs[n][1] for n in (*mine, mask) if n is not None}
    read_sizes_from(kept, module.graph, originals)
    erase_dead(module.graph)
    for node in [n for n in module.graph.nodes if n.op == "placeholder" and n not in kept]:
        if node.users:
            raise _not_split(program, f"its decoder reads '{node.name}', which is an input of the encoder")
        module.graph.erase_node(node)
    if mask is not None and not nodes[mask].users:
        raise _not_split(program, f"the padding mask '{mask}' does not reach its decoder")
    order = [n for n in module.graph.nodes if n.op == "placeholder"]
    made = example_inputs(program, 2, sizes.short, sizes=sizes)
    bound = {node: sizes.bind(value.shape, 2, sizes.short) for node, value in kept.items()}
    example = tuple(made[n.name] if n.name in made else torch.randn(bound[n]) for n in order)
    # Sizes that are equal in the whole model stay equal, though nothing in the decoder may compare them.
    sizes_of = {str(d): None for value in kept.values() for d in value.shape if not isinstance(d, int)}
    dims = {size: Dim(f"size_{number}") for number, size in enumerate(sizes_of)}
    shapes = tuple({i: dims[str(d)] for i, d in enumerate(kept[n].shape) if not isinstance(d, int)} for n in order)
    try:
        with torch.no_grad(), quiet_exporter():
            exported = torch.export.export(finished(module), example, dynamic_shapes=shapes, strict=False)
            exported = exported.run_decompositions({})
    except Exception as error:  # of torch's exporter: a size that it fixes, or relates to another
        reason = textwrap.shorten(str(error).strip(), 120, placeholder=" ...") or type(error).__name__
        raise _not_split(program, f"its decoder cannot be exported by itself ({reason})") from error
    return DecoderProgram(
        exported=exported,
        source=program.source,
        assets=program.assets,
        max_positions=program.max_positions,
        in_memory=program.in_memory,
        tokens=tokens,
        attention_mask=next(iter(named[Role.MASK]), None),
        position_ids=next(iter(named[Role.POSITIONS]), None),
        logits=str(exported.graph_signature.user_outputs[0]),
        states=_STATES,
        encoder_mask=mask,
    )


def encoder_inputs(program: AnyProgram, cross: Sequence[AttentionSite]) -> tuple[str, ...]:
    """The inputs of a model that its encoder's states, or the padding masks over them, are made from."""
    seen = _behind(program, [s.key.origin for s in cross] + [s.padding for s in cross if s.padding])
    return tuple(name for name in program.user_inputs if name in seen)


def encoder_layers(program: AnyProgram, cross: Sequence[AttentionSite]) -> frozenset[int]:
    """Indices of the attention layers that the encoder's states are made with, understood or not."""
    seen = _behind(program, [s.key.origin for s in cross])
    found = enumerate(find_anchors(DataFlow(program), program))
    return frozenset(i for i, a in found if (a.softmax if isinstance(a, Anchor) else a[0]).name in seen)


def _behind(program: AnyProgram, names: Sequence[str]) -> set[str]:
    """Names of everything that values are made from, sizes excepted."""
    originals = {n.name: n for n in program.exported.graph.nodes}
    seen = upstream((originals[name] for name in names), lambda node: node.target is _aten.sym_size.int)
    return {node.name for node in seen}


def _logits(program: AnyProgram, tokens: Tensor, originals: Mapping[str, Node]) -> str:
    for name in program.outputs.values():
        value = originals[name].meta["val"]
        if value.is_floating_point() and [*map(str, value.shape[:-1])] == [*map(str, tokens.shape)]:
            return name
    raise _not_split(program, "no output is shaped [batch, decoder length, vocabulary]")


def _not_split(program: AnyProgram, reason: str) -> RefusedError:
    return RefusedError(
        f"'{program.source}' cannot be cut into an encoder and a decoder: {reason}.",
        "Export a model whose decoder reads nothing but its own tokens and the encoder's last states.",
    )
