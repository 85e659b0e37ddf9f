"""Weights of an ONNX file as codes, which ONNX Runtime multiplies with as they are: a quarter of the bytes, or less.

A step of decoding reads every weight once, and is as fast as they are short. ``com.microsoft.MatMulNBits`` takes codes
of eight or four bits, with a scale and a middle for every 32 channels that an output adds up. They are made by ONNX
Runtime's own quantiser, which takes the range of each block and no text. The table of tokens, which
``com.microsoft.GatherBlockQuantized`` looks up, and what makes logits have eight bits in either case. So do the
up-projections of latent attention (:mod:`mla_compile.runtime.onnx_up_codes`). Norms and biases stay as they are.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from mla_compile.disk.mapped import drop_pages
from mla_compile.passes.onnx_nodes import name_function, node_variant
from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_up_codes import KEY_AXIS, VALUE_AXIS, codes_and_scales
from mla_compile.runtime.onnx_variant import DOMAIN, LATENT, variant_named

__all__ = ["BITS", "WeightType", "quantise_weights"]

WeightType = Literal["int8", "int4"]
BITS: dict[WeightType, int] = {"int8": 8, "int4": 4}
_BLOCK = 32
"""Channels that share a scale and a middle."""
_DOMAIN = "com.microsoft"
_COMPUTE_INT8 = 4
"""``accuracy_level``: activations become bytes too, so that products are of integers."""
_SMALLEST = 1024
"""Numbers of a matrix, below which it is not worth it."""
_NUMBERS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})


@dataclass(frozen=True)
class _Weight:
    """A constant matrix in a file.

    Attributes:
        name: Its initializer's.
        stored: Its numbers.
        transposed: Whether ``[inner, columns]`` is its transpose.
    """

    name: str
    stored: ir.TensorProtocol
    transposed: bool

    @property
    def columns(self) -> int:
        """Channels of what is multiplied with it."""
        return self.stored.shape.numpy()[0 if self.transposed else 1]

    def matrix(self) -> NDArray[Any]:
        """A copy ``[inner, columns]``."""
        stored = self.stored.numpy()
        found = np.array(stored.T if self.transposed else stored, order="C")
        drop_pages([stored])
        return found


@dataclass(frozen=True)
class _Codes:
    """A weight ``[inner, columns]`` as codes.

    Attributes:
        bits: Of a code.
        inner: Channels that are added up.
        columns: Channels of the result.
        inputs: Codes, scales and middles, as inputs of the node.
    """

    bits: int
    inner: int
    columns: int
    inputs: tuple[ir.Value, ir.Value, ir.Value]


def quantise_weights(model: ir.Model, weights: WeightType) -> int:
    """Replace products with constant weights by products with codes; the table of tokens and up-projections likewise.

    Args:
        model: It is changed. Codes are in memory; weights that lie in a file are read one after another.
        weights: Of what type they are to be.

    Returns:
        How many operators have codes now.
    """
    made: dict[tuple[str, bool], _Codes] = {}
    count = 0
    logits = model.graph.outputs[0].shape
    vocabulary = None if logits is None else logits[-1]
    for node in list(model.graph):
        if node.domain == DOMAIN:
            count += _encode_up(model, node)
            continue
        weight = _table_of(node, vocabulary) or _weight_of(node)
        if weight is None:
            continue
        key = (weight.name, weight.transposed)
        if key not in made:  # a table that makes logits too is quantised once
            bits = BITS["int8" if weight.columns == vocabulary else weights]
            made[key] = _codes_of(model.graph, weight, bits)
        if node.op_type == "Gather":
            _look_codes_up(model.graph, node, made[key])
        else:
            _multiply_codes(node, made[key])
        count += 1
    if count:
        model.graph.opset_imports[_DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
        RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return count


def _encode_up(model: ir.Model, node: ir.Node) -> bool:
    """Give a node of latent attention codes for its up-projections; False: it is another, or they are not constant."""
    variant = variant_named(LATENT, node.op_type)
    if variant is None or variant.bidirectional or variant.coded_up:
        return False
    opset = model.opset_imports[""]
    names = list(attention_function(LATENT, opset, variant).input)
    axes = {names.index("key_up_GDr"): KEY_AXIS, names.index("value_up_GrV"): VALUE_AXIS}
    if any(_stored(node.inputs[place], 3) is None for place in axes):
        return False
    last = len(node.inputs)
    node.resize_inputs(last + len(axes))
    for behind, (place, axis) in enumerate(axes.items(), last):
        codes, scales = _up_codes(model.graph, node.inputs[place], axis)
        node.replace_input_with(place, codes)
        node.replace_input_with(behind, scales)
    node.attributes.add(ir.AttrInt64("coded_up", 1))
    name_function(model, node, attention_function(LATENT, opset, node_variant(node)))
    return True


def _up_codes(graph: ir.Graph, up: ir.Value | None, axis: int) -> tuple[ir.Value, ir.Value]:
    """An up-projection's codes and scales; of one that several nodes have they are made once."""
    assert up is not None
    assert up.const_value is not None
    names = f"{up.name}_codes_{axis}", f"{up.name}_scales_{axis}"
    if names[0] not in graph.initializers:
        numbers = up.const_value.numpy()
        for name, array in zip(names, codes_and_scales(numbers, axis), strict=True):
            _register(graph, name, array)
        drop_pages([numbers])
    return graph.initializers[names[0]], graph.initializers[names[1]]


def _weight_of(node: ir.Node) -> _Weight | None:
    """The constant matrix that a node multiplies with; None: it is no such product.

    A table of tokens that makes logits as well is transposed by a node of its own.
    """
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    right, transposed = node.inputs[1], False
    if node.op_type == "Gemm":
        numbers = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        if numbers != [1, 1] or node.attributes.get_int("transA", False):
            return None
        transposed = bool(node.attributes.get_int("transB", False))
    turned = None if right is None else right.producer()
    if turned is not None and (turned.domain, turned.op_type) == ("", "Transpose"):
        right, transposed = turned.inputs[0], not transposed
    return _constant(right, transposed)


def _table_of(node: ir.Node, vocabulary: int | ir.SymbolicDim | None) -> _Weight | None:
    """The table of tokens that a node looks up, transposed as where it makes logits; None: it looks up another."""
    if (node.domain, node.op_type) != ("", "Gather") or node.attributes.get_int("axis", False):
        return None
    table = _constant(node.inputs[0], transposed=True)
    return table if table is not None and table.columns == vocabulary else None


def _constant(value: ir.Value | None, transposed: bool) -> _Weight | None:
    """A constant matrix that is large enough; None: it is none."""
    stored = _stored(value, 2)
    if value is None or stored is None or stored.size < _SMALLEST:
        return None
    return _Weight(value.name or "", stored, transposed)


def _stored(value: ir.Value | None, axes: int) -> ir.TensorProtocol | None:
    """The numbers of a constant with so many axes; None: it is none."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    stored = value.const_value
    if stored is None or stored.dtype not in _NUMBERS or len(stored.shape) != axes:
        return None
    return stored


def _codes_of(graph: ir.Graph, weight: _Weight, bits: int) -> _Codes:
    """Make a weight's codes, and initializers of them."""
    matrix = weight.matrix()
    inner, columns = matrix.shape
    codes, scales, middles = _quantiser(bits).qbits_block_quant(matrix)
    name = f"{weight.name}_transposed" if weight.transposed else weight.name
    inputs = (
        _register(graph, f"{name}_codes", codes),
        _register(graph, f"{name}_scales", scales),
        _register(graph, f"{name}_middles", middles),
    )
    return _Codes(bits, inner, columns, inputs)


def _register(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _multiply_codes(node: ir.Node, codes: _Codes) -> None:
    """Make a node the product with codes; a bias stays what it is."""
    bias = node.inputs[2:]  # of a Gemm, where there is one
    sizes = {"K": codes.inner, "N": codes.columns, "accuracy_level": _COMPUTE_INT8}
    _become(node, "MatMulNBits", codes, sizes, [node.inputs[0], *codes.inputs, *([None, *bias] if bias else [])])


def _look_codes_up(graph: ir.Graph, node: ir.Node, codes: _Codes) -> None:
    """Make a node look codes of rows up, which are those of the transposed matrix's columns."""
    stored, scales, middles = codes.inputs
    assert stored.const_value is not None
    rows = np.ascontiguousarray(stored.const_value.numpy().reshape(codes.columns, -1)[:, : codes.inner])
    inputs = [_register(graph, f"{stored.name}_of_rows", rows), node.inputs[1], scales, middles]
    _become(node, "GatherBlockQuantized", codes, {"gather_axis": 0, "quantize_axis": 1}, inputs)


def _become(
    node: ir.Node, op_type: str, codes: _Codes, numbers: Mapping[str, int], inputs: Sequence[ir.Value | None]
) -> None:
    """Make a node one of ONNX Runtime's operators on codes, with the same output."""
    node.domain, node.op_type = _DOMAIN, op_type
    node.attributes.clear()
    for name, number in {**numbers, "bits": codes.bits, "block_size": _BLOCK}.items():
        node.attributes[name] = ir.AttrInt64(name, number)
    node.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)


def _quantiser(bits: int) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """ONNX Runtime's, whose module would have the whole program log on the console."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    module = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    root.handlers[:] = handlers
    root.setLevel(level)
    config = module.DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=False, bits=bits)
    return module.DefaultWeightOnlyQuantizer(config)
