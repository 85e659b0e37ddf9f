"""``mla-compile tensorrt --plugin cpp``: the file that a library of plugins is built from, and how to go on."""

from __future__ import annotations

import onnx
import pytest

from mla_compile.cli import main
from mla_compile.runtime.tensorrt.functions import APPEND, DECODE


def test_writes_a_checked_file_and_names_the_commands(lowered, folder, tmp_path, capsys):
    model, out = lowered("llama-gqa").model, tmp_path / "model.onnx"
    sizes = "--max-length", "64", "--max-prompt", "8", "--quiet"
    assert main(["tensorrt", str(folder), "--out", str(out), "--plugin", "cpp", *sizes]) == 0
    said, library = capsys.readouterr().out, out.with_name("libmla_plugin.so")
    assert "in ONNX Runtime it equals the PyTorch module" in said
    assert f"mla-compile build-plugin {out} --tensorrt-include DIR --out {library}\n" in said
    assert said.splitlines()[-1].startswith(f"trtexec --onnx={out} ")
    assert said.splitlines()[-1].endswith(f" --dynamicPlugins={library} --preview=+aliasedPluginIO1003")
    nodes = [node.op_type for node in onnx.load(out).graph.node if node.domain]
    assert nodes == [APPEND, DECODE] * len(model.rows)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--out", "model.plan", "--plugin", "cpp"), "Engines of this command have quick plugins. Name a .onnx file"),
        (("--out", "model.onnx", "--plugin", "java"), "'java' is not one of quick, cpp"),
    ],
)
def test_other_plugins_are_refused(options, sentence, tmp_path, capsys):
    assert main(["tensorrt", str(tmp_path), *options]) == 2
    assert sentence in capsys.readouterr().err
