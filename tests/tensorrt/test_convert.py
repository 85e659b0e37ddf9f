"""From the bundled model to an engine and to text, with ONNX Runtime in TensorRT's place."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import sys
from pathlib import Path

import models
import pytest
import stand_in_engine

import mla_compile
from mla_compile.artifacts import runnable
from mla_compile.artifacts import tensorrt as tensorrt_command
from mla_compile.artifacts.tensorrt import write_for_tensorrt
from mla_compile.cli import main
from mla_compile.runtime.tensorrt import engine
from mla_compile.runtime.tensorrt.engine_builder import EngineSettings
from mla_compile.runtime.tensorrt.reference import OnnxFixedDecoder
from mla_compile.text.corpus import load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
PROMPTS = ("Once upon a time there was", "Lily")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The model as an engine, and what was said of it; the stand-in stays for whoever runs it."""
    path = tmp_path_factory.mktemp("plan") / "tiny.plan"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", stand_in_engine.module())
        decoder = functools.partial(engine.TensorRTDecoder, device="cpu")
        for module in (engine, tensorrt_command, runnable):
            patch.setattr(module, "TensorRTDecoder", decoder)
        patch.setattr(tensorrt_command, "require_device", lambda: None)
        patch.setattr(tensorrt_command, "architecture", lambda: 90)
        patch.setattr(tensorrt_command, "use_plugins", lambda: "Triton is not installed")
        patch.setattr(tensorrt_command.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        patch.setattr(tensorrt_command, "build_engine", lambda _, onnx, *__, **___: (onnx.read_bytes(), 0))
        words = ("--exact", "--max-length", "4096", "--max-batch", "3", "--max-prompt", "6", "--quiet")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main([str(TINY), "--out", str(path), *words]) == 0
        yield path, said.getvalue()


@pytest.fixture(scope="module")
def plan(converted):
    return converted[0]


def test_the_commands_of_other_tools_are_named(converted):
    path, said = converted
    onnx = path.with_suffix(".onnx")
    assert f"polygraphy inspect capability {onnx}\n" in said
    assert f"trtexec --onnx={onnx} --saveEngine={path.with_suffix('.trtexec.plan')} --skipInference" in said
    row = OnnxFixedDecoder(onnx).rows[0]
    assert re.search(
        rf"--maxShapes=input_ids:3x6,lengths:3,position_ids:3x6,past_key_values.0.latent:3x1x512x{row},", said
    )


def test_an_engine_lies_beside_its_file_and_its_report(plan):
    names = {p.name for p in plan.parent.iterdir()}
    assert {"tiny.plan", "tiny.plan.json", "tiny.onnx", "report.json", "tokenizer.json", "config.json"} <= names
    report = json.loads((plan.parent / "report.json").read_text())
    assert 0 < report["verification"]["lowering_error"] < 1e-4
    assert report["verification"]["engine_error"] < 1e-4
    assert report["artifacts"]["tiny.plan"] == plan.stat().st_size
    assert report["target"] == "tensorrt"
    facts = json.loads(engine.facts_path(plan).read_text())
    assert facts["cache_bytes_per_token"] == report["cache"]["bytes_per_token_after"]


def test_run_says_what_the_original_says(plan, capsys):
    from transformers import AutoModelForCausalLM

    model, words = AutoModelForCausalLM.from_pretrained(TINY).eval(), load_tokenizer(str(TINY))
    capsys.readouterr()
    flags = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["run", str(plan), "--json", "--max-new-tokens", "10", *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    for prompt, text in zip(PROMPTS, said["texts"], strict=True):
        given = words(prompt, return_tensors="pt").input_ids
        expected = model.generate(given, max_new_tokens=10, do_sample=False)[0]
        assert text == words.decode(expected, skip_special_tokens=True)
    assert main(["run", str(plan), "--prompt", "Lily", "--threads", "2"]) == 2
    assert "which has no such threads" in capsys.readouterr().err
    assert main(["run", str(plan), "--prompt", "Lily", "--provider", "cpu"]) == 2
    assert "Leave --provider out" in capsys.readouterr().err


def test_there_is_no_more_room_than_the_model_has_places(plan):
    places = json.loads((TINY / "config.json").read_text())["max_position_embeddings"]
    assert OnnxFixedDecoder(plan.with_suffix(".onnx")).limits.room == places < 4096


def test_a_very_small_model_is_compared_on_tokens_and_places_that_it_has(tmp_path):
    model = models.llama(vocab_size=12, max_position_embeddings=8, eos_token_id=1)
    mla_compile.compile(model, method="mha2mla", check=False).save(tmp_path / "saved")
    written = write_for_tensorrt(tmp_path / "saved", tmp_path / "small" / "small.onnx", EngineSettings())
    decoder = OnnxFixedDecoder(written.onnx)
    assert (decoder.vocabulary, decoder.limits.room) == (12, 8)
    assert written.error < 1e-4


def test_a_text_that_does_not_fit_is_one_sentence(plan, capsys):
    assert main(["run", str(plan), "--prompt", "Lily had a dog. " * 150]) == 2
    said = capsys.readouterr().err
    assert "which have room for 512. Generate fewer tokens, or build it with a larger --max-length." in said


def test_eval_measures_an_engine(plan, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Once upon a time there was a little girl. She had a dog. " * 20)
    words = ["--text", str(tmp_path / "text.txt"), "--seq-len", "24", "--max-tokens", "48", "--quiet", "--json"]
    assert main(["eval", str(plan), "--original", str(TINY), *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["models"][0]["runtime"] == "tensorrt"
    # float32 through four layers in another order: the logarithm of a perplexity is a mean of such differences.
    assert result["models"][0]["perplexity_ratio"] == pytest.approx(1.0, abs=1e-4)
