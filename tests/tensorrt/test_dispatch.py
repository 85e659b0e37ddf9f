"""A TensorRT parser takes a registered plugin for a node of ours, with the node's attributes, and else its body.

TensorRT for RTX ends the process where a plugin comes into being, so that is watched from outside, and no further.
"""

from __future__ import annotations

import json
import subprocess
import sys

import onnx
import pytest

from mla_compile.runtime.onnx_variant import DOMAIN, Variant
from mla_compile.runtime.tensorrt.functions import APPEND, COMBINE, DECODE, NAMESPACE, PARTIAL, SPLITS, function

PARSE = """
import json, sys
import tensorrt_rtx as trt

path, name, namespace, fields = sys.argv[1:]


class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        super().__init__()
        self.name, self.plugin_namespace, self.plugin_version = name, namespace, "1"
        kind = trt.PluginFieldType.UNKNOWN
        self.field_names = trt.PluginFieldCollection([trt.PluginField(f, b"", kind) for f in json.loads(fields)])

    def create_plugin(self, name, fields, phase):
        print(json.dumps({f.name: f.data.tolist() for f in fields}), flush=True)


creator, log = Creator(), trt.Logger(trt.Logger.ERROR)
assert trt.get_plugin_registry().register_creator(creator, namespace)
network = trt.Builder(log).create_network(0)
parser = trt.OnnxParser(network, log)
print(json.dumps(parser.parse_from_file(path)), flush=True)
"""


def parse(path, op_type, namespace, name=None):
    """What the first plugin that was asked for would be made of, or whether all nodes got bodies."""
    fields = [field for field in function(op_type).attribute if not field.startswith("plugin_")]
    command = [sys.executable, "-c", PARSE, str(path), name or op_type, namespace, json.dumps(fields)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[0])


@pytest.mark.parametrize("op_type", [APPEND, PARTIAL, COMBINE, DECODE])
def test_a_registered_plugin_is_asked_for(lowered, parser, op_type):
    case = lowered("llama-gqa", splits=None if op_type == DECODE else SPLITS)
    node = next(n for n in case.proto.graph.node if n.domain == DOMAIN and n.op_type == op_type)
    found = parse(case.path, op_type, NAMESPACE)
    expected = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if "plugin" not in a.name}
    assert found == {name: [pytest.approx(value)] for name, value in expected.items()}


@pytest.mark.parametrize("op_type", [PARTIAL, DECODE])
def test_chunks_ask_for_a_plugin_of_their_own(lowered, parser, op_type):
    """One for windows, which chunks would be to it, is not: without their own the body is taken."""
    case = lowered("chunks", splits=None if op_type == DECODE else SPLITS)
    found = parse(case.path, op_type, NAMESPACE, Variant(chunked=True).named(op_type))
    assert (found["window"], found["chunked"]) == ([5], [1])
    assert parse(case.path, op_type, NAMESPACE) is True


def test_a_plugin_in_another_namespace_is_not(lowered, parser):
    assert parse(lowered("llama-gqa").path, PARTIAL, "another") is True
