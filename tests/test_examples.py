"""Every example runs as it stands, but for a smaller model where that is an option, and its result is looked at."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from pages import ROOT
from small_folder import model_folder

from mla_compile.runtime.cpu.library import compiler
from mla_compile.sources.patterns import patterns

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "model"
    model_folder(folder)
    return folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run an example with arguments and perhaps input, in this process; what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *words: object, typed: str = "") -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_all_examples_are_tested_and_listed():
    index = (EXAMPLES / "README.md").read_text()
    here = (ROOT / "tests/test_examples.py").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name in index
        if path.name not in ("demo.py", "story_grammar.py", "train_tiny.py"):  # below; text; half an hour
            assert f'run("{path.name}"' in here


@pytest.mark.slow
def test_demo(tmp_path):
    """`make demo`, with conversions that are quick: they are equal, which is not what it promises of its own three."""
    source = (
        "import sys, demo; demo.NEW_TOKENS = 4; demo.PROMPTS = demo.PROMPTS[:1]; "
        "demo.CONVERSIONS = {name: {'method': 'mha2mla'} for name in demo.CONVERSIONS}; sys.exit(demo.main())"
    )
    command = [sys.executable, "-c", source, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 1, done.stderr
    assert "mha2mla │ ONNX Runtime │ 512 (25%)" in re.sub(" +", " ", done.stdout)
    assert "Try it:" in done.stdout


@pytest.mark.slow
def test_hugging_face_model(run, model, tmp_path):
    printed = run("hugging_face_model.py", "--model", model, "--out", tmp_path / "converted")
    before, after = map(int, re.search(r"cache: (\d+) -> (\d+) bytes", printed).groups())
    assert after <= before * 0.3125
    tokens, held = re.search(r"the cache of (\d+) tokens: ([\d,]+) bytes", printed).groups()
    assert int(held.replace(",", "")) == int(tokens) * after
    assert "In a little house" in printed
    assert "the same logits" in printed
    assert (tmp_path / "converted" / "report.html").is_file()


@pytest.mark.slow
def test_hand_written_model(run):
    known = set(patterns())
    try:
        printed = run("hand_written_model.py", "--layers", 1)
    finally:
        from mla_compile.sources import patterns as module

        for operator in set(patterns()) - known:
            del module._MEANINGS[operator]
    assert "layer 0: 4 query heads, 2 key/value heads" in printed
    # Both are sums of float32 in another order; logits are of the order of one.
    assert float(re.search(r"original: (\S+) of", printed)[1]) < 1e-4


@pytest.mark.slow
def test_fine_tune(run, model):
    printed = run("fine_tune.py", "--model", model, "--steps", 12, "--rate", 1e-3)
    before, after = (float(x) for x in re.findall(r"([\d.]+) nats per token", printed))
    assert after < before


@pytest.mark.slow
def test_chat_onnxruntime(run, model, tmp_path):
    from mla_compile.cli import main

    path = tmp_path / "chat" / "model.onnx"
    assert main(["convert", str(model), "--out", str(path), "--method", "mha2mla", "--quiet"]) == 0
    settings = ("--onnx", path, "--max-new-tokens", 5)
    both = run("chat_onnxruntime.py", *settings, typed="Once there was.\nThen it rained.\n")
    first, second = (int(n) for n in re.findall(r"\[(\d+) tokens", both))
    assert second > first, "the cache goes on where it was"
    alone = run("chat_onnxruntime.py", *settings, typed="Once there was.\n")
    assert both.startswith(alone.rstrip("\n")), "a later turn does not change an earlier one"


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_check_fused(run, tmp_path):
    printed = run("check_fused.py")
    assert float(re.search(r"over the largest: (\S+) \(", printed)[1]) < 1e-5
    assert re.search(r"a step: \S+ ms with standard operators, \S+ ms with the fused kernel", printed)
    with pytest.raises(SystemExit, match="2"):
        run("check_fused.py", "one.onnx")


class Template:
    """A tokenizer that begins whatever is said with token 1."""

    bos_token_id, eos_token_id, chat_template = 1, 2, "of some kind"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [10, 11]}

    def apply_chat_template(self, said, **_):
        return [1, 10, 11]


class Ending:
    """A decoder whose every answer is the end token; it writes down what it was given."""

    known_tokens = vocabulary = 3

    def __init__(self):
        self.given = []

    def empty_cache(self, batch):
        return None

    def step(self, ids, mask, positions, cache):
        self.given.append(ids.tolist())
        return np.eye(3)[[[2]] * ids.shape[1]].reshape(1, ids.shape[1], 3), cache


@pytest.mark.parametrize("template", [None, "of some kind"])
def test_a_chat_begins_once(monkeypatch, template):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tokenizer, decoder = Template(), Ending()
    tokenizer.chat_template = template
    chat = runpy.run_path(str(EXAMPLES / "chat_onnxruntime.py"))["Chat"](decoder, tokenizer, 0.0, 0)
    for _ in range(2):
        assert "".join(chat.reply("something", 3)) == ""
    assert decoder.given == [[[1, 10, 11]], [[2, 10, 11]]]


@pytest.mark.slow
def test_tensorrt_engine(run, model, tmp_path):
    printed = run("tensorrt_engine.py", "--model", model, "--out", tmp_path / "out", "--room", 64)
    assert "1 caches of 64 rows" in printed
    assert "1 LatentAppend" in printed
    assert "engine: " in printed
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.slow
def test_quality_curve(run, model, tmp_path):
    drawn = tmp_path / "quality.svg"
    words = ("--model", model, "--ratios", "0.5", "--methods", "mha2mla", "--tokens", 1024, "--plot", drawn)
    printed = run("quality_curve.py", *words)
    assert re.search(r"^mha2mla +\d\d\.\d% +[\d.]+ +[\d.]+", printed, re.MULTILINE)
    assert drawn.read_text().rstrip().endswith("</svg>")
