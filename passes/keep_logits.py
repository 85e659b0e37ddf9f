"""Let an ONNX file compute logits of a prompt's last tokens only: whoever generates reads no others.

Before::

    hidden -> norm -> product with the vocabulary -> cap -> logits [batch, sequence_length, vocabulary]

After, with the optional input ``logits_to_keep``, whose default 0 keeps all::

    hidden -> Slice(-logits_to_keep:) -> norm -> product -> cap -> logits [batch, logits_length, vocabulary]

The input has a default because an initializer has its name (an *overridable initializer* of the ONNX specification), so
that whoever does not know of it runs the file as before.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mla_compile.runtime.onnx_session import LOGITS_TO_KEEP

__all__ = ["LOGITS_LENGTH", "add_logits_to_keep"]

LOGITS_LENGTH = "logits_length"
"""The dimension of logits that are kept."""
_ELEMENTWISE = frozenset(
    {"Add", "Cast", "Clip", "Div", "Erf", "Gelu", "Identity", "Max", "Min", "Mul", "Neg", "Pow", "Relu", "Sigmoid"}
    | {"Sub", "Tanh"}
)
"""What acts on every number alone, if the other operands are the same for all tokens."""
_LAST_AXIS = frozenset({"LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax"})
"""What mixes the channels of a token, if their axis is the last."""
_TOKENS = 1
"""The axis of tokens."""


def add_logits_to_keep(model: ir.Model) -> bool:
    """Give a model the input ``logits_to_keep``, if its logits are made of hidden states token by token.

    What makes them is found by walking back from the logits through operators that act on every token alone. It must
    have a product with a weight, without which there is nothing to save.

    Args:
        model: With the output ``logits [batch, sequence_length, vocabulary]`` first; it is changed.

    Returns:
        Whether it has the input now: an int64 scalar, ``k`` for the last ``k`` tokens and 0 for all. More than there
        are keep all. The logits' second dimension is then :data:`LOGITS_LENGTH`.
    """
    graph = model.graph
    tail = _tail(graph.outputs[0])
    if not any(node.op_type == "MatMul" for node, _ in tail):
        return False
    first, hidden = tail[-1]
    keep = _register(graph, LOGITS_TO_KEEP, np.array(0))
    graph.inputs.append(keep)
    # With 0 the slice begins at -0, which is the first token: transformers writes it in the same way.
    negated = ir.node("Neg", [keep])
    start = ir.node("Unsqueeze", [negated.outputs[0], _register(graph, f"{LOGITS_TO_KEEP}_axis", np.array([0]))])
    end, tokens = (
        _register(graph, f"{LOGITS_TO_KEEP}_{name}", np.array([number]))
        for name, number in (("end", np.iinfo(np.int64).max), ("tokens", _TOKENS))
    )
    kept = ir.node("Slice", [hidden, start.outputs[0], end, tokens])
    kept.outputs[0].type, kept.outputs[0].shape = hidden.type, hidden.shape
    graph.insert_before(first, [negated, start, kept])
    first.replace_input_with(first.inputs.index(hidden), kept.outputs[0])
    for node in (kept, *(node for node, _ in tail)):
        value = node.outputs[0]
        assert value.shape is not None
        # A dimension of its own: tensors whose dimensions have the same names may share memory.
        value.shape = ir.Shape([value.shape[0], LOGITS_LENGTH, value.shape[2]])
    return True


def _register(graph: ir.Graph, name: str, numbers: NDArray[np.int64]) -> ir.Value:
    tensor = ir.tensor(numbers, ir.DataType.INT64, name=name)
    shape = ir.Shape(numbers.shape)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _tail(logits: ir.Value) -> list[tuple[ir.Node, ir.Value]]:
    """Nodes between hidden states and logits that act on every token alone, each with what it reads of the tokens.

    The last one is first.
    """
    tail: list[tuple[ir.Node, ir.Value]] = []
    value = logits
    while len(value.uses()) == bool(tail) and value.is_graph_output() == (not tail):  # nothing else reads it
        node = value.producer()
        read = None if node is None else _read_per_token(node)
        if node is None or read is None or not _has_tokens_of(read, logits):
            break
        tail.append((node, read))
        value = read
    return tail


def _read_per_token(node: ir.Node) -> ir.Value | None:
    """What a node reads, if it makes of it, token by token, its only result; None if that is not certain."""
    free = [i for i, value in enumerate(node.inputs) if value is not None and not _is_fixed(value)]
    if node.domain or len(free) != 1 or any(output.uses() for output in node.outputs[1:]):
        return None
    shapes = [value.shape for value in node.inputs if value is not None and _is_fixed(value)]
    axis = node.attributes.get("axis")
    acts = (
        (node.op_type in _ELEMENTWISE and all(map(_is_same_for_all, shapes)))
        or (node.op_type == "MatMul" and free == [0] and all(s is not None and len(s) == 2 for s in shapes))
        or (node.op_type in _LAST_AXIS and free == [0] and (axis is None or axis.as_int() in (-1, 2)))
    )
    return node.inputs[free[0]] if acts else None


def _has_tokens_of(value: ir.Value, logits: ir.Value) -> bool:
    """Whether a tensor is ``[batch, tokens, channels]`` of the tokens that logits are of."""
    if value.shape is None or logits.shape is None or not len(value.shape) == len(logits.shape) == 3:
        return False
    named = not logits.shape.is_static(_TOKENS) and not logits.shape.is_unknown_dim(_TOKENS)
    return named and value.shape[_TOKENS] == logits.shape[_TOKENS]


def _is_same_for_all(shape: ir.Shape | None) -> bool:
    """Whether an operand beside ``[batch, tokens, channels]`` is stretched over all tokens."""
    return shape is not None and (len(shape) <= 1 or (len(shape) <= 3 and shape[-2] == 1))


def _is_fixed(value: ir.Value) -> bool:
    """Whether a tensor depends on no input."""
    node = value.producer()
    if node is None:
        return value.is_initializer() and not value.is_graph_input()
    return all(v is None or _is_fixed(v) for v in node.inputs)
