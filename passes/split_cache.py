"""Give every attention node of an ONNX model a cache of two tensors, ``[batch, heads, tokens, channels]`` each."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence

import onnx_ir as ir

from mla_compile.runtime.onnx_cache import KEY_VALUE, PAST, PRESENT

__all__ = ["split_caches"]


def split_caches(
    model: ir.Model,
    sizes: Callable[[ir.Node], tuple[tuple[int, int], tuple[int, int]]],
    dtype: ir.DataType,
    tokens: tuple[str, str],
) -> list[ir.Node]:
    """Replace every layer's cache input and output by two, named as keys and values are.

    Nodes keep their attributes and other inputs; where ``past`` was, the
    two inputs stand, and where ``present`` was, the two outputs.

    Args:
        model: From :func:`~mla_compile.passes.lower_onnx.rewritten_to_onnx`; it is changed.
        sizes: Heads and channels of a node's two tensors.
        dtype: Their type.
        tokens: Names of the dimension of tokens, before and after.

    Returns:
        The new nodes, in the order of the layers.
    """
    graph, nodes, layer = model.graph, [], 0
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    while (name := PAST.format(layer)) in inputs:
        past, present = inputs[name], outputs[PRESENT.format(layer)]
        node = present.producer()
        assert node is not None
        pairs = list(zip(KEY_VALUE, sizes(node), strict=True))
        pasts, presents = (
            [_value(names[i].format(layer), like, size, dtype, tokens[i]) for names, size in pairs]
            for i, like in enumerate((past, present))
        )
        place = list(node.inputs).index(past)
        given = [*node.inputs[:place], *pasts, *node.inputs[place + 1 :]]
        attended = node.outputs[0]
        results = [ir.Value(name=attended.name, type=attended.type, shape=attended.shape), *presents]
        new = ir.Node(node.domain, node.op_type, given, list(node.attributes.values()), outputs=results, name=node.name)
        graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(attended, results[0])
        _replace(graph.inputs, past, pasts)
        _replace(graph.outputs, present, presents)
        graph.remove(node, safe=False)
        nodes.append(new)
        layer += 1
    return nodes


def _value(name: str, like: ir.Value, size: tuple[int, int], dtype: ir.DataType, tokens: str) -> ir.Value:
    assert like.shape is not None
    batch = like.shape[0]
    heads, channels = size
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([batch, heads, tokens, channels]))


def _replace(values: MutableSequence[ir.Value], old: ir.Value, new: list[ir.Value]) -> None:
    place = values.index(old)
    values[place : place + 1] = new
