"""A float32 copy of an ONNX file in float16 or bfloat16: the same nodes, without the type's roundings.

ONNX Runtime's CPU provider has no kernels for most of bfloat16 (products, sums), and rounds float16 where it likes: it
computes in float32 and leaves out conversions between neighbours. The copy tells whether the file computes what it is
to compute, on any machine and as tightly as a file that was float32 from the beginning.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mla_compile.disk.mapped import drop_pages

__all__ = ["is_narrow_file", "widened_file", "write_float32_copy"]

_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_TYPES = ("to", "dtype")
"""Attributes that name a type, of ``Cast`` and of what creates tensors."""


def is_narrow_file(path: Path) -> bool:
    """Whether a file's caches are float16 or bfloat16."""
    model = ir.load(path)
    return any(value.dtype in _NARROW for value in model.graph.inputs)


def write_float32_copy(source: Path, target: Path) -> None:
    """Write a file's float32 copy; weights go to ``<target>.data``.

    Args:
        source: An ONNX file.
        target: Where the copy goes.
    """
    ir.save(widened_file(source), target, external_data=f"{target.name}.data")


def widened_file(source: Path) -> ir.Model:
    """A file's float32 copy, whose weights are made when they are read and not kept."""
    model = ir.load(source)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _widen_value(value)
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for part in parts:
        for node in ir.traversal.RecursiveGraphIterator(part):
            _widen_node(node)
    return model


def _widen_value(value: ir.Value) -> None:
    if value.const_value is not None and value.const_value.dtype in _NARROW:
        narrow = value.const_value
        make = functools.partial(_float32, narrow)
        value.const_value = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape(narrow.shape.numpy()), name=narrow.name)
    if value.dtype in _NARROW:
        value.dtype = ir.DataType.FLOAT


def _widen_node(node: ir.Node) -> None:
    """The types of what a node returns, and those that its attributes name."""
    for value in node.outputs:
        _widen_value(value)
    for graph in _graphs(node):
        for value in (*graph.inputs, *graph.initializers.values()):
            _widen_value(value)
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if name in _TYPES and attribute.type == ir.AttributeType.INT and attribute.as_int() in _NARROW:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _NARROW:
            node.attributes[name] = ir.AttrTensor(name, _float32(attribute.as_tensor()))


def _graphs(node: ir.Node) -> Iterable[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()


def _float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    narrow = tensor.numpy()
    wide = ir.tensor(narrow.astype(np.float32), name=tensor.name)
    drop_pages([narrow])
    return wide
