"""The ordinary file in TensorRT's parser: every layer gets its own body."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from mla_compile.passes.lower_onnx import lower_to_onnx
from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_variant import CACHED, DOMAIN, VERSION, Variant


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "chunks"])
def test_parses_and_builds_with_a_growing_cache(lowered, parser, tmp_path, name):
    model = lowered(name).model
    path = tmp_path / "model.onnx"
    lower_to_onnx(model.graph, model.rows, path, opset=23, inline=False, metadata={})

    def extents(tensor):
        # New, earlier and all tokens; nothing is cached at first.
        lengths = {"attention_mask": (1, 12, 80)} | dict.fromkeys(("input_ids", "position_ids"), (1, 3, 16))
        length = lengths.get(tensor.name, (0, 9, 64))
        shape = tuple(tensor.shape)[2:]
        return [(batch, length[i], *shape) for i, batch in enumerate((1, 2, 4))]

    assert parser.build(parser.parse(path), extents) > 0


def test_variants_with_equally_many_inputs_keep_their_bodies(parser, tmp_path):
    """Only distances are cumulative sums, and only slopes need them here: were names ignored, both would have one."""
    variants = {"a": Variant(sinks=True), "b": Variant(slopes=True)}
    nodes, inputs, outputs, functions = [], [], [], []
    for name, variant in variants.items():
        shapes = {"q": ["B", "S", 4, 6], "row": ["B", "S", 24], "past": ["B", "P", 24], "mask": ["B", "T"], "per": [4]}
        kind = {"mask": TensorProto.INT64}
        inputs += [
            helper.make_tensor_value_info(f"{i}_{name}", kind.get(i, TensorProto.FLOAT), d) for i, d in shapes.items()
        ]
        results = {"y": ["B", "S", 4, 6], "present": ["B", "T", 24]}
        outputs += [helper.make_tensor_value_info(f"{i}_{name}", TensorProto.FLOAT, d) for i, d in results.items()]
        functions.append(attention_function(CACHED, 23, variant))
        flag = "has_sinks" if variant.sinks else "has_slopes"
        named = [f"{i}_{name}" for i in shapes], [f"{i}_{name}" for i in results]
        attributes = {"num_heads": 4, "kv_heads": 2, "scale": 0.4, flag: 1}
        nodes.append(helper.make_node(variant.named(CACHED), *named, domain=DOMAIN, **attributes))
    graph = helper.make_graph(nodes, "two", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "two.onnx")
    network = parser.parse(tmp_path / "two.onnx")
    kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
    assert kinds.count("CUMULATIVE") == 1
