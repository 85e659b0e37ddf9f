"""The bundled trained model through the command line and the Python API, from folder to generated text."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import math
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

import mla_compile
from mla_compile.cli import main
from mla_compile.errors import LoadError, UsageError
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.text.corpus import load_tokenizer, read_documents, token_windows, tokenize

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-llama"
ROUNDING = 1e-5  # of the largest logit; float32 through four layers in another order of operations
REPORTS = {"report.json", "report.html"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}

pytestmark = pytest.mark.usefixtures("read_once")


def command(*words: object) -> str:
    """Run the command line in this process, which must succeed, and return its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(w) for w in words])
    assert code == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def documents():
    return list(runpy.run_path(str(ROOT / "examples" / "story_grammar.py"))["stories"](range(1_000_000, 1_000_060)))


@pytest.fixture(scope="module")
def text(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture(scope="module")
def calibrated(text):
    return ("--calibration", text, "--calibration-tokens", 1024, "--seq-len", 128, "--quiet")


@pytest.fixture(scope="module")
def original():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY))


@pytest.fixture(scope="module")
def converted(tmp_path_factory, calibrated):
    """Conversions at half of the cache by selection, factorisation and name."""

    @functools.cache
    def convert(selection: str = "2-norm", svd: str = "joint", name: str = "tiny.onnx") -> Path:
        path = tmp_path_factory.mktemp(f"{selection}-{svd}") / name
        settings = ("--cache-ratio", 0.5, "--selection", selection, "--svd", svd)
        printed = command("convert", TINY, "--out", path, *settings, *calibrated)
        assert "cache bytes per token\t2048 -> 1024 (50.00%)" in printed
        return path

    return convert


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    path = tmp_path_factory.mktemp("exact") / "tiny.onnx"
    command(TINY, "--out", path, "--exact", "--quiet")
    return path


@pytest.fixture(scope="module")
def compiled(original, documents, tokenizer):
    """As in the README: a module, example inputs, texts and a tokenizer."""
    ids = torch.zeros(1, 8, dtype=torch.long)
    settings = {"cache_ratio": 0.5, "method": "mha2mla", "seq_len": 128}
    return mla_compile.compile(original, (ids,), calibration=documents, tokenizer=tokenizer, **settings)


def perplexity(score, windows) -> float:
    """Oracle: the definition, spelled out."""
    with torch.no_grad():
        losses = [F.cross_entropy(score(w[None])[0, :-1].double(), w[1:], reduction="sum") for w in windows]
    return math.exp(sum(losses) / (windows.numel() - len(windows)))


# ---- every way to factorise


ONNX, FOLDER = ("tiny.onnx", {"tiny.onnx"}), ("tiny", {"model.pt2", "mla_config.yaml"})


@pytest.mark.parametrize(
    ("selection", "svd", "name", "files"),
    [
        ("high", "split", *FOLDER),
        ("low", "split", *ONNX),
        ("uniform", "joint", *FOLDER),
        ("2-norm", "joint", *ONNX),
    ],
)
def test_conversion_with_every_selection_and_factorisation(converted, selection, svd, name, files):
    path = converted(selection, svd, name)
    folder = path if path.is_dir() else path.parent
    written = {p.name: p.stat().st_size for p in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert written.keys() == {*REPORTS, "config.json", "generation_config.json", *TOKENIZER_FILES, *files}
    assert report["artifacts"] == {name: size for name, size in written.items() if name not in REPORTS}

    assert report["schema_version"] == 1
    assert (report["config"]["selection"], report["config"]["svd"]) == (selection, svd)
    assert report["selection"] == selection
    cache = {"bytes_per_token_before": 2048, "bytes_per_token_after": 1024, "ratio": 0.5, "layers_with_window": {}}
    assert report["cache"] == cache
    assert len(report["layers"]) == 4
    for layer in report["layers"]:
        assert (layer["rope_groups"], layer["rope_dims"], layer["kv_rank"]) == (2, 4, 56)  # 56 + 2 x 4 = 64 of 128
        assert layer["elements_after"] == 64
    assert report["stages"][0]["name"] == "load"
    assert all(s["seconds"] >= 0 and s["peak_mib"] > 0 for s in report["stages"])

    checks = report["verification"]
    assert checks["text"] is True
    assert checks["cache_bytes_per_token"] == 1024  # counted from the tensors of a run
    for link in ("rewrite_error", "decode_error", *(["lowering_error"] if path.is_file() else [])):
        assert 0 <= checks[link] < ROUNDING
    assert checks["lowering_greedy"] == (1.0 if path.is_file() else None)
    quality = report["quality"]
    assert 1 < quality["original"] < quality["converted"]
    assert quality["ratio"] == pytest.approx(quality["converted"] / quality["original"])


def test_what_the_file_says_of_itself(converted):
    model = onnx.load(converted())
    onnx.checker.check_model(model)
    said = json.loads({p.key: p.value for p in model.metadata_props}["mla_compile"])
    assert said["schema_version"] == 1
    assert said["source"] == "tiny-llama"  # never the path on the user's machine
    assert str(ROOT) not in json.dumps(said)
    assert (said["cache_bytes_per_token"], said["original_cache_bytes_per_token"]) == (1024, 2048)
    assert (said["bos_token_id"], said["eos_token_id"], said["max_position_embeddings"]) == (0, 0, 512)
    assert said["config"]["cache_ratio"] == 0.5
    assert [layer["kv_rank"] for layer in said["layers"]] == [56] * 4
    assert model.producer_name == "mla-compile"
    assert {o.domain: o.version for o in model.opset_import} == {"": 23, "mla_compile": 1}
    assert [n.op_type for n in model.graph.node].count("LatentAttention") == 4

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    assert shapes(model.graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{i}.latent": ["batch_size", "past_sequence_length", 64] for i in range(4)},
        "logits_to_keep": [],
    }
    assert shapes(model.graph.output) == {
        "logits": ["batch_size", "logits_length", 1024],
        **{f"present.{i}.latent": ["batch_size", "total_sequence_length", 64] for i in range(4)},
    }


def test_nothing_beside_the_file_names_a_place_on_this_machine(converted):
    """The files are made to be passed on; only the report, which is about this run, says where the model lay."""
    folder = converted().parent
    for name in {p.name for p in folder.iterdir()} - {"report.json"}:
        assert str(TINY).encode() not in (folder / name).read_bytes(), name


def test_converting_twice_gives_the_same_bytes(converted, calibrated, tmp_path):
    settings = ("--cache-ratio", 0.5, "--selection", "2-norm", "--svd", "joint")
    command("convert", TINY, "--out", tmp_path / "tiny.onnx", *settings, *calibrated)
    assert (tmp_path / "tiny.onnx").read_bytes() == converted().read_bytes()


def test_inlined_conversion_computes_the_same(converted, calibrated, tmp_path):
    settings = ("--cache-ratio", 0.5, "--method", "mha2mla", "--inline", "--opset", 24)
    command(TINY, "--out", tmp_path / "inline.onnx", *settings, *calibrated)
    model = onnx.load(tmp_path / "inline.onnx")
    assert {n.domain for n in model.graph.node} == {""}
    assert {o.domain: o.version for o in model.opset_import}[""] == 24
    ids = np.arange(40, dtype=np.int64).reshape(2, 20) + 5
    ours, theirs = OnnxDecoder(tmp_path / "inline.onnx").logits(ids), OnnxDecoder(converted()).logits(ids)
    assert np.abs(ours - theirs).max() < ROUNDING * np.abs(theirs).max()


def test_force_replaces_a_file(converted, tmp_path):
    """Without text and checks, so that the report says what was not measured."""
    path = tmp_path / "tiny.onnx"
    shutil.copytree(converted().parent, tmp_path, dirs_exist_ok=True)
    printed = command(TINY, "--out", path, "--method", "mha2mla", "--kv-rank", 8, "--force", "--no-verify", "--json")
    report = json.loads(printed)
    assert OnnxDecoder(path).cache_bytes_per_token == 4 * 4 * (8 + 8)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["config"]["kv_rank"] == 8
    assert (report["verification"], report["quality"], report["selection"]) == (None, None, "uniform")
    assert any("selected uniformly" in warning for warning in report["warnings"])
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in converted().parent.iterdir()}
    assert not any("report.json" in warning for warning in report["warnings"])


def test_a_second_file_in_a_folder_says_that_the_report_is_its_own(converted, tmp_path):
    shutil.copytree(converted().parent, tmp_path, dirs_exist_ok=True)
    words = ["--method", "mha2mla", "--kv-rank", 8, "--no-verify", "--json"]
    report = json.loads(command(TINY, "--out", tmp_path / "second.onnx", *words))
    assert (
        "report.json and report.html were those of tiny.onnx, and are of this conversion now; what they were is kept "
        "in tiny.onnx.report.json and tiny.onnx.report.html"
    ) in report["warnings"]
    for name in ("report.json", "report.html"):
        assert (tmp_path / f"tiny.onnx.{name}").read_bytes() == (converted().parent / name).read_bytes()
    third = json.loads(command(TINY, "--out", tmp_path / "tiny.onnx", "--force", *words))
    assert any("those of second.onnx" in warning for warning in third["warnings"])
    assert json.loads((tmp_path / "second.onnx.report.json").read_text()) == report
    assert json.loads((tmp_path / "tiny.onnx.report.json").read_text()) == third


# ---- measuring


def test_eval_prints_one_object_about_both_models(converted, text, original, tokenizer):
    """Oracle: transformers and the definition of perplexity for the original."""
    words = ("--text", text, "--max-tokens", 1024, "--seq-len", 128, "--json")
    printed = command("eval", converted(), "--original", TINY, *words)
    assert printed.count("\n") == 1
    found = json.loads(printed)
    figures = {"perplexity", "loss", "cache_bytes_per_token"}
    assert found.keys() == {"text", "tokens", "seq_len", *figures, "original", "models", "warnings"}
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (found["tokens"], found["seq_len"], found["cache_bytes_per_token"]) == (8 * 127, 128, 1024)
    assert found["original"].keys() == {"model", "runtime", "seconds", *figures}
    (row,) = found["models"]
    assert {key: found[key] for key in figures} == {key: row[key] for key in figures}
    assert (row["cache_kept"], row["method"], row["cache_ratio"]) == (0.5, "mha2mla", 0.5)
    assert found["original"]["cache_bytes_per_token"] == 2048
    windows = token_windows(tokenize(read_documents(text), tokenizer), 128, 1024)
    expected = perplexity(lambda ids: original(ids, use_cache=False).logits, windows)
    assert found["original"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] > found["original"]["perplexity"]


def test_eval_reads_every_form_of_the_same_conversion(compiled, text, tmp_path, tokenizer):
    """ONNX file, saved folder and module in memory: the same perplexity to four digits."""
    compiled.to_onnx(tmp_path / "tiny.onnx")
    compiled.save(tmp_path / "folder")
    words = ("--text", text, "--max-tokens", 1024, "--seq-len", 128, "--json")
    file, folder = (json.loads(command("eval", tmp_path / name, *words)) for name in ("tiny.onnx", "folder"))
    windows = token_windows(tokenize(read_documents(text), tokenizer), 128, 1024)
    module = perplexity(lambda ids: compiled.module(ids).logits, windows)
    assert file["perplexity"] == pytest.approx(folder["perplexity"], rel=1e-5)
    assert file["perplexity"] == pytest.approx(module, rel=1e-5)
    assert file["cache_bytes_per_token"] == folder["cache_bytes_per_token"] == 1024
    assert file["tokens"] == folder["tokens"] == 8 * 127


def test_eval_prints_a_table(converted, text):
    words = ("--text", text, "--max-tokens", 256, "--seq-len", 128, "-q")
    head, theirs, ours = (
        line.split("\t") for line in command("eval", converted(), "--original", TINY, *words).splitlines()
    )
    assert head == ["", "runtime", "tokens", "cache bytes/token", "cache kept", "perplexity", "ratio", "KL", "top-1"]
    assert theirs[:5] == ["original", "torch", "254", "2048", "100.00%"]
    assert ours[:5] == [str(converted()), "onnxruntime", "254", "1024", "50.00%"]


# ---- nothing left out


def test_exact_conversion_keeps_the_perplexity(exact, text):
    words = ("--text", text, "--max-tokens", 2048, "--json")
    found = json.loads(command("eval", exact, "--original", TINY, *words))
    assert found["perplexity"] == pytest.approx(found["original"]["perplexity"], rel=1e-4)


def test_exact_conversion_writes_what_the_original_writes(exact, original, tokenizer):
    """200 greedy tokens, as transformers generates them with its own cache."""
    from transformers import GenerationConfig

    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    greedy = GenerationConfig(do_sample=False, max_new_tokens=200, eos_token_id=-1, pad_token_id=0)
    expected = original.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)
    assert expected.shape[1] == prompt.shape[1] + 200
    ours = OnnxDecoder(exact).generate(prompt.tolist(), 200)[0]
    assert ours == expected[0, prompt.shape[1] :].tolist()


def test_exact_conversion_of_one_layer_reports_no_loss(exact):
    report = json.loads((exact.parent / "report.json").read_text())
    assert report["verification"]["conversion_error"] < ROUNDING
    assert report["verification"]["conversion_greedy"] == 1.0
    assert report["warnings"] == []
    assert report["quality"] is None


# ---- generating


def run(path: Path, *words: object) -> dict:
    printed = command("run", path, "--json", *words)
    assert printed.count("\n") == 1
    return json.loads(printed)


PROMPTS = ("Once upon a time, there was a little girl", "Tom", "One day, a big dog went to the park and")


def test_run_continues_the_prompt(converted):
    found = run(converted(), "--prompt", PROMPTS[0], "--max-new-tokens", 12)
    assert found.keys() == {
        "texts",
        "new_tokens",
        "tokens_per_second",
        "cache_bytes_per_token",
        "cache_bytes",
        "warnings",
    }
    assert found["texts"][0].startswith(PROMPTS[0])
    assert len(found["texts"][0]) > len(PROMPTS[0])
    assert 0 < found["new_tokens"][0] <= 12
    assert found["cache_bytes_per_token"] == 1024
    streamed = command("run", converted(), "--prompt", PROMPTS[0], "--max-new-tokens", 12)
    assert streamed == found["texts"][0] + "\n"


def test_run_reads_prompts_from_files_and_ends_in_front_of_texts(converted, tmp_path):
    (tmp_path / "prompt.txt").write_text(f"{PROMPTS[0]}\n")
    words = ("--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 12)
    (text,) = run(converted(), *words)["texts"]
    assert text == run(converted(), "--prompt", PROMPTS[0], "--max-new-tokens", 12)["texts"][0]
    new = text.removeprefix(PROMPTS[0])
    stop = new[4:7]
    expected = PROMPTS[0] + new[: new.index(stop)]
    found = run(converted(), *words, "--stop", "no such words", "--stop", stop)
    assert found["texts"] == [expected]
    assert found["new_tokens"][0] < 12
    assert command("run", converted(), *words, "--stop", stop) == f"{expected}\n"


def test_run_with_a_static_cache_says_the_same(exact, tokenizer, tmp_path):
    """The memory is that of the longest prompt, with its begin token, and all new tokens but the last."""
    command(TINY, "--out", tmp_path / "static.onnx", "--exact", "--cache", "static", "--quiet")
    words = [w for p in PROMPTS for w in ("--prompt", p)] + ["--max-new-tokens", 140]
    static, dynamic = (run(path, *words, "--max-length", 200) for path in (tmp_path / "static.onnx", exact))
    assert static["texts"] == dynamic["texts"]
    begin = tokenizer.bos_token_id is not None
    longest = max(begin + len(tokenizer(p, add_special_tokens=False).input_ids) for p in PROMPTS)
    assert static["cache_bytes"] == 3 * (longest + 139) * static["cache_bytes_per_token"]
    assert dynamic["cache_bytes"] == 3 * (longest + max(dynamic["new_tokens"]) - 1) * dynamic["cache_bytes_per_token"]
    said = json.loads({p.key: p.value for p in onnx.load(tmp_path / "static.onnx").metadata_props}["mla_compile"])
    assert (said["config"]["cache"], said["config"]["opset"]) == ("static", 24)


def test_a_batch_of_prompts_equals_each_alone(converted):
    words = ("--max-new-tokens", 24)
    alone = [run(converted(), "--prompt", p, *words) for p in PROMPTS]
    flags = [w for p in PROMPTS for w in ("--prompt", p)]
    together = run(converted(), *flags, *words)
    assert together["texts"] == [a["texts"][0] for a in alone]
    assert together["new_tokens"] == [a["new_tokens"][0] for a in alone]
    assert command("run", converted(), *flags, *words) == "\n\n".join(together["texts"]) + "\n"


def test_ragged_prompts_have_the_logits_of_each_alone(converted):
    """Left padding is invisible: the last logits of every row equal the row's own."""
    decoder = OnnxDecoder(converted())
    rows = [[5, 9, 40, 7, 3, 77, 12], [8, 100], [31]]
    longest = max(map(len, rows))
    ids = np.array([[0] * (longest - len(r)) + r for r in rows])
    mask = np.array([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    together, _ = decoder.step(ids, mask, positions, decoder.empty_cache(3))
    for row, got in zip(rows, together, strict=True):
        alone = decoder.logits(np.array([row]))[0, -1]
        assert np.abs(got[-1] - alone).max() < ROUNDING * np.abs(alone).max()


def test_sampling_follows_its_seed(converted):
    words = ("--prompt", PROMPTS[0], "--max-new-tokens", 24, "--temperature", 1.5)
    first, again, other = (run(converted(), *words, "--seed", s)["texts"] for s in (1, 1, 2))
    assert first == again
    assert first != other
    greedy = run(converted(), *words[:-2])["texts"]
    assert run(converted(), *words, "--top-k", 1)["texts"] == greedy
    assert run(converted(), *words, "--top-p", 0)["texts"] == greedy


@pytest.mark.parametrize("listed", [False, True])
def test_run_stops_at_the_end_token(converted, tokenizer, tmp_path, listed):
    """The file names its end token; here one that greedy decoding is known to meet."""
    path = tmp_path / "tiny.onnx"
    shutil.copytree(converted().parent, tmp_path, dirs_exist_ok=True)
    prompt = tokenizer(PROMPTS[0]).input_ids
    greedy = OnnxDecoder(path).generate([prompt], 16)[0]
    end = greedy[9]
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == "mla_compile":
            entry.value = json.dumps({**json.loads(entry.value), "eos_token_id": [0, end] if listed else end})
    onnx.save(model, path)
    found = run(path, "--prompt", PROMPTS[0], "--max-new-tokens", 16)
    kept = greedy[: greedy.index(end)]
    assert found["new_tokens"] == [len(kept)]
    assert found["texts"] == [PROMPTS[0] + tokenizer.decode(kept)]


def test_run_keeps_the_space_after_the_prompt(converted, tmp_path):
    """Tokenizers of the SentencePiece kind lose a leading space when a continuation is decoded by itself."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"▁w{i}": i for i in range(1024)}, unk_token="▁w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words)
    fast.save_pretrained(tmp_path)
    assert fast("w5 w9").input_ids == [5, 9]
    flags = ("--prompt", "w5 w9", "--max-new-tokens", 4, "--tokenizer", tmp_path)
    greedy = OnnxDecoder(converted()).generate([[5, 9]], 4, stop=[0])[0]
    expected = " ".join(f"w{i}" for i in [5, 9, *greedy])
    assert run(converted(), *flags)["texts"] == [expected]
    assert command("run", converted(), *flags) == expected + "\n"


# ---- looking without converting


def test_inspect_describes_every_layer(original):
    config = original.config
    found = json.loads(command("inspect", TINY, "--json"))
    assert found["model"] == str(TINY)
    assert len(found["layers"]) == config.num_hidden_layers
    for index, layer in enumerate(found["layers"]):
        path = f"model.layers.{index}.self_attn"
        assert (layer["index"], layer["path"]) == (index, path)
        assert (layer["heads"], layer["kv_heads"]) == (config.num_attention_heads, config.num_key_value_heads)
        assert layer["qk_dim"] == layer["v_dim"] == layer["rotary_dim"] == config.head_dim
        assert [layer[r] for r in ("query", "key", "value")] == [f"{path}.{r}_proj.weight" for r in "qkv"]
        assert (layer["rope"], layer["mask"], layer["bias"]) == ("half", "causal", False)
        assert layer["scale"] == pytest.approx(config.head_dim**-0.5)
        assert layer["rope_max_freq"] == pytest.approx(1.0)
        slowest = config.rope_parameters["rope_theta"] ** (2 / config.head_dim - 1)
        assert layer["rope_min_freq"] == pytest.approx(slowest)
        assert layer["elements_per_token"] == 2 * config.num_key_value_heads * config.head_dim
        assert layer["error"] < 1e-12
    lines = command("inspect", TINY).splitlines()
    assert len(lines) == 1 + config.num_hidden_layers
    assert lines[1].split("\t")[1:6] == [
        "model.layers.0.self_attn",
        "yes",
        "6 q / 2 kv of 32",
        "half:32, theta 10000",
        "causal",
    ]


def test_plan_says_what_convert_does(converted):
    found = json.loads(command("plan", TINY, "--method", "mha2mla", "--cache-ratio", 0.5, "--json"))
    assert (found["bytes_per_token_before"], found["bytes_per_token_after"]) == (2048, 1024)
    assert found["cache_ratio"] == 0.5
    report = json.loads((converted().parent / "report.json").read_text())
    for planned, done in zip(found["layers"], report["layers"], strict=True):
        assert planned.items() <= done.items()
    int8 = json.loads(
        command("plan", TINY, "--method", "mha2mla", "--cache-ratio", 0.5, "--cache-type", "int8", "--json")
    )
    assert int8["bytes_per_token_after"] == found["bytes_per_token_after"] // 4 + 8 * len(found["layers"])
    assert int8["bytes_per_token_before"] == found["bytes_per_token_before"]
    lines = command("plan", TINY, "--method", "mha2mla", "--cache-ratio", 0.5).splitlines()
    assert len(lines) == 1 + 4 + 1
    assert lines[-1].split("\t")[1:] == ["all", "", "", "", "2048", "1024 (50.00%)", "", "", ""]


def test_plan_estimates_a_decoding_step():
    """Layers keep 2 x 64 numbers per token, of 2 bytes on this machine, and a quarter of that afterwards."""
    step = ("--context", 1000, "--batch", 2, "--machine", "gpu")
    given = ("plan", TINY, "--method", "mha2mla", "--cache-ratio", 0.25)
    found = json.loads(command(*given, *step, "--json"))["decode_step"]
    assert (found["context"], found["batch"], found["machine"]["itemsize"]) == (1000, 2, 2)
    assert len(found["layers"]) == 4
    assert [found["layers"][0][when]["cache_bytes"] for when in ("before", "after")] == [256_000, 64_000]
    speeds = [line.split("\t")[-1] for line in command(*given, *step).splitlines()]
    assert speeds == ["speed", *(f"x{layer['speedup']:.2f}" for layer in found["layers"]), ""]


@pytest.mark.parametrize("source", [TINY, TINY / "config.json"], ids=["checkpoint", "configuration"])
def test_plan_estimates_what_a_text_would_take(source):
    """Nothing is read of a text here: how much there would be is a setting like any other."""
    given = ("plan", source, "--method", "mha2mla", "--json")
    text = ("--calibration-tokens", 4096, "--seq-len", 64)
    with_gradients, without = (
        json.loads(command(*given, *text, *more))["conversion"]["fisher"] for more in ((), ("--no-gradients",))
    )
    assert with_gradients["tokens"] == without["tokens"] == 4096
    assert without["text_operations"] < with_gradients["text_operations"]


def test_plan_at_the_default_ratio():
    found = json.loads(command("plan", TINY, "--method", "mha2mla", "--json"))
    assert found["cache_ratio"] == 0.3125
    assert found["layers"][0]["kv_rank"] == 32


# ---- from Python


def test_report_of_a_conversion_in_python(compiled):
    lines = str(compiled.report).splitlines()
    assert lines[0] == "LlamaForCausalLM: 4 attention layers converted"
    assert lines[1] == "cache: 2048 -> 1024 bytes per token (50.00%)"
    assert lines[2].startswith("perplexity: ")
    assert compiled.report.cache_ratio == 0.5
    assert compiled.report.config["seq_len"] == 128
    assert json.loads(compiled.report.to_json()) == compiled.report.to_dict()


def test_python_and_command_line_convert_alike(compiled, converted, documents):
    """The same text, so the same components: equal up to the calibration tokens the command line was limited to."""
    settings = json.loads((converted().parent / "report.json").read_text())["config"]
    ours = compiled.report.config
    assert {k for k in settings if settings[k] != ours[k]} == {"calibration_tokens"}


def test_ragged_batch_in_python(compiled):
    rows = [[5, 9, 40, 7], [8, 100]]
    ids = torch.tensor([rows[0], [0, 0, *rows[1]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.no_grad():
        together = compiled.module(ids, mask).logits
        alone = compiled.module(torch.tensor([rows[1]])).logits
        assert (together[1, -1] - alone[0, -1]).abs().max() < ROUNDING * alone.abs().max()


def test_a_module_read_back_and_saved_again_is_the_same_bytes(compiled, tmp_path):
    """And nothing in it says where it was made."""
    compiled.save(tmp_path / "first")
    mla_compile.save(mla_compile.load(tmp_path / "first"), tmp_path / "second", like=tmp_path / "first")
    names = {f.name for f in (tmp_path / "first").iterdir()}
    assert names == {f.name for f in (tmp_path / "second").iterdir()}
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    assert b"modeling_llama.py" not in (tmp_path / "first" / "model.pt2").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        mla_compile.save(compiled.module, tmp_path / "second", like=tmp_path / "first")
    with pytest.raises(LoadError, match="holds no converted model"):
        mla_compile.save(compiled.module, tmp_path / "third", like=tmp_path)


def test_a_converted_module_is_pickled_as_any_other(compiled):
    again = pickle.loads(pickle.dumps(compiled.module))
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, compiled.module(ids).logits)


def test_a_module_is_saved_to_a_folder_only(compiled, tmp_path):
    compiled.save(tmp_path / "own")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("model.onnx", "file", "link"):
        with pytest.raises(UsageError, match="a model in PyTorch is a folder"):
            compiled.save(tmp_path / name, force=True)
        with pytest.raises(UsageError, match="a model in PyTorch is a folder"):
            mla_compile.save(compiled.module, tmp_path / name, like=tmp_path / "own", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "own"]


def test_a_model_saved_beside_a_file_leaves_the_report_of_that(compiled, tmp_path):
    compiled.save(tmp_path / "own")
    place, of_file = tmp_path / "place", json.dumps({"artifacts": {"tiny.onnx": 4}})
    place.mkdir()
    (place / "tiny.onnx").write_text("mine")
    (place / "report.json").write_text(of_file)
    mla_compile.save(mla_compile.load(tmp_path / "own"), place, like=tmp_path / "own", force=True)
    assert (place / "tiny.onnx.report.json").read_text() == of_file
    assert (place / "report.json").read_bytes() == (tmp_path / "own" / "report.json").read_bytes()


def test_what_is_no_converted_model_is_not_saved(compiled, tmp_path):
    for other in (torch.nn.Linear(2, 2), compiled, None):
        with pytest.raises(UsageError, match=f"of type {type(other).__name__}, and no model that mla_compile.load"):
            mla_compile.save(other, tmp_path / "out", like=tmp_path, force=True)
    assert not any(tmp_path.iterdir())


def test_format_hf_is_that_folder(tmp_path, capsys):
    words = ["--format", "hf", "--method", "mha2mla", "--kv-rank", "8", "--no-verify", "--quiet"]
    command(TINY, "--out", tmp_path / "out", *words)
    assert mla_compile.load(tmp_path / "out").rows == (16,) * 4
    assert main([str(TINY), "--out", str(tmp_path / "x.onnx"), *words]) == 2
    assert "the format hf is a folder" in capsys.readouterr().err


def test_saved_module_is_read_back(compiled, tmp_path):
    compiled.save(tmp_path / "folder")
    expected = {"model.pt2", "mla_config.yaml", *REPORTS, "config.json", "generation_config.json"}
    assert {p.name for p in (tmp_path / "folder").iterdir()} == expected | TOKENIZER_FILES
    back = mla_compile.load(tmp_path / "folder")
    ids = torch.randint(0, 1024, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = compiled.module(ids), back(ids)
        assert torch.equal(first.logits, second.logits)
        assert all(map(torch.equal, first.cache, second.cache))
        step = torch.tensor([[4], [5], [6]])
        assert torch.equal(compiled.module(step, past=first.cache).logits, back(step, past=second.cache).logits)
    assert back.rows == compiled.module.rows == (64,) * 4


@pytest.fixture(scope="module")
def chosen_by_loss(documents):
    """A quarter of the cache; what is trained must be a copy, because weights are shared with the original."""
    settings = {"method": "fisher", "cache_ratio": 0.25, "seq_len": 64, "calibration_tokens": 2048}
    return mla_compile.compile(TINY, calibration=documents, check=False, **settings)


def test_converted_module_can_be_trained(chosen_by_loss, documents, tokenizer, tmp_path):
    """One step lowers the loss, reaches every latent weight, and what is written afterwards is the trained model."""
    module = copy.deepcopy(chosen_by_loss.module)
    compiled = dataclasses.replace(chosen_by_loss, module=module)
    windows = token_windows(tokenize(documents, tokenizer), 64, 512)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)

    def loss() -> torch.Tensor:
        logits = module(windows).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    before = loss()
    before.backward()
    latent = {n: p for n, p in module.named_parameters() if "latent" in n}
    assert len(latent) >= 4 * 4  # query, row, key_up and value_up of every layer
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in latent.values())
    optimiser.step()
    with torch.no_grad():
        after = loss()
        assert after < before
        compiled.to_onnx(tmp_path / "trained.onnx")
        logits = OnnxDecoder(tmp_path / "trained.onnx").logits(windows[:2].numpy())
        expected = module(windows[:2]).logits
        assert np.abs(logits - expected.numpy()).max() < ROUNDING * expected.abs().max()


def test_adam_trains_what_fisher_chose(chosen_by_loss, documents, tokenizer):
    """Steps of one size for all numbers, which tear a latent whose entries and up-projections differ in size."""
    module = copy.deepcopy(chosen_by_loss.module)
    windows = token_windows(tokenize(documents, tokenizer), 64, 512)
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        output = module(windows)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert max(losses) == losses[0]
    assert losses[-1] < 0.9 * losses[0]
    for cache in output.cache:  # numbers that half precision holds: 6e-5 to 6e4 without loss
        sizes = cache.detach().square().mean((0, 1)).sqrt()
        assert sizes.min() > 1e-3
        assert cache.abs().max() < 1e3


def test_a_tokenizer_object_is_written_beside_the_file(tokenizer, documents, tmp_path):
    """A module that knows no folder, with a tokenizer in memory: the file must run on its own."""
    import models

    nano = models.handwritten(models.NanoGPT)
    nano.tokens, nano.head = torch.nn.Embedding(1024, 64), torch.nn.Linear(64, 1024, bias=False)
    compiled = mla_compile.compile(nano, (models.tokens(2, 5),), calibration=documents, tokenizer=tokenizer)
    compiled.to_onnx(tmp_path / "nano.onnx")
    assert {p.name for p in tmp_path.iterdir()} >= TOKENIZER_FILES
    assert run(tmp_path / "nano.onnx", "--prompt", "Tom", "--max-new-tokens", 2)["texts"][0].startswith("Tom")


def test_text_of_one_window_is_not_called_held_out(tokenizer, documents):
    """There is nothing to hold back from calibration: the perplexity is that of the calibration text."""
    windows = token_windows(tokenize(documents, tokenizer), 64, 64)
    report = mla_compile.compile(TINY, cache_ratio=0.5, calibration=windows, check=False).report
    assert any("calibrat" in w and "measured" in w for w in report.warnings)
    assert "held-out" not in str(report)


BAD_CALLS = {
    "config and settings": ({"config": mla_compile.CompileConfig(), "cache_ratio": 0.5}, "Both config and single"),
    "unknown setting": ({"cash_ratio": 0.5}, "cash_ratio"),
    "float ids": ({"calibration": torch.zeros(3, 4)}, "float32"),
    "flat ids": ({"calibration": torch.zeros(12, dtype=torch.long)}, "[windows, length]"),
    "no ids": ({"calibration": torch.zeros(0, 4, dtype=torch.long)}, "window"),
    "single ids": ({"calibration": torch.zeros(4, 1, dtype=torch.long)}, "window"),
    "ids out of range": ({"calibration": torch.full((4, 8), 1024)}, "1024"),
    "no documents": ({"calibration": []}, "text"),
    "blank documents": ({"calibration": ["", " "]}, "text"),
    "missing file": ({"calibration": "Once upon a time"}, "There is no text file"),
    "limit without text": ({"method": "mha2mla", "max_perplexity_ratio": 1.5}, "needs text"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_that_cannot_work_are_refused(case, tokenizer):
    settings, phrase = BAD_CALLS[case]
    with pytest.raises(mla_compile.MlaCompileError) as caught:
        mla_compile.compile(TINY, **settings)
    assert phrase in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_cannot_be_written_are_refused(compiled, tmp_path):
    (tmp_path / "taken.onnx").write_text("mine")
    for path, phrase in {"taken.onnx": "exists already", "model.bin": "not known", "folder": ".onnx"}.items():
        with pytest.raises(mla_compile.MlaCompileError) as caught:
            compiled.to_onnx(tmp_path / path)
        assert phrase in str(caught.value)
    with pytest.raises(mla_compile.MlaCompileError, match=r"holds a model as a file, 'taken\.onnx', and this takes"):
        mla_compile.load(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(mla_compile.MlaCompileError, match="holds no converted model"):
        mla_compile.load(tmp_path / "folder")


# ---- as a program


def test_the_program_converts_and_evaluates(text, tmp_path):
    """In processes of their own: standard output is the result, standard error the progress, and nothing else."""

    def program(*words: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "mla_compile", *map(str, words)]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    done = program(TINY, "--out", "out/tiny.onnx", "--cache-ratio", 0.75, "--calibration", text, "--seq-len", 64)
    stages = [line.split("  ")[0] for line in done.stderr.splitlines() if " s   peak " in line]
    assert stages[0] == "load"
    assert stages[-2:] == ["lower to ONNX", "verify ONNX"]
    assert all(" s   peak " in line or line.startswith("warning: ") for line in done.stderr.splitlines())
    assert "cache bytes per token\t2048 -> 1536 (75.00%)" in done.stdout
    done = program("eval", "out/tiny.onnx", "--text", text, "--max-tokens", 512, "--json")
    assert done.stderr == ""
    assert json.loads(done.stdout)["cache_bytes_per_token"] == 1536


def test_a_module_of_a_type_that_is_not_known_is_refused():
    import models

    with pytest.raises(mla_compile.MlaCompileError, match="only float32, float16 and bfloat16 are converted") as caught:
        mla_compile.compile(models.llama(num_hidden_layers=1).double(), exact=True)
    assert "float64" in caught.value.message
    assert "model.float()" in caught.value.remedy


# ---- methods that choose by text


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, calibrated):
    """A report by method, of a conversion at half of the cache."""

    @functools.cache
    def convert(method: str) -> dict:
        path = tmp_path_factory.mktemp(method) / "tiny.onnx"
        return json.loads(command(TINY, "--out", path, "--cache-ratio", 0.5, "--method", method, *calibrated, "--json"))

    return convert


@pytest.mark.parametrize("method", ["fisher", "transmla"])
def test_methods_that_choose_by_text(chosen, method):
    report = chosen(method)
    assert report["config"]["method"] == report["selection"] == method
    assert 0.9 * 1024 < report["cache"]["bytes_per_token_after"] <= 1024
    assert report["verification"]["cache_bytes_per_token"] == report["cache"]["bytes_per_token_after"]
    assert all(layer["rope_groups"] == 1 for layer in report["layers"])
    assert {"statistics", "sizes"} <= {stage["name"] for stage in report["stages"]}
    for layer in report["layers"]:
        assert 2 * len(layer["rope_frequencies"]) == 2 * len(layer["rope_own"]) == layer["rope_dims"]
        assert (layer["predicted_loss"] is None) == (method == "transmla")
    for link in ("rewrite_error", "decode_error", "lowering_error"):
        assert 0 <= report["verification"][link] < ROUNDING


def test_fisher_loses_the_least(chosen, converted):
    """Of the log-perplexity that the better of the others costs, less than a third."""
    others = [chosen("transmla"), json.loads((converted().parent / "report.json").read_text())]
    least = min(math.log(report["quality"]["ratio"]) for report in others)
    assert math.log(chosen("fisher")["quality"]["ratio"]) < least / 3


def test_without_gradients_the_loss_is_nearly_as_small(chosen, calibrated, tmp_path):
    """Less than twice the log-perplexity that gradients leave; other methods leave more than three times as much."""
    words = ("--cache-ratio", 0.5, "--no-gradients", *calibrated, "--json")
    report = json.loads(command(TINY, "--out", tmp_path / "a.onnx", *words))
    assert report["config"]["gradients"] is False
    least = math.log(chosen("fisher")["quality"]["ratio"])
    assert 0 < math.log(report["quality"]["ratio"]) < 2 * least


def test_text_alone_chooses_fisher(chosen, calibrated, tmp_path):
    report = json.loads(command(TINY, "--out", tmp_path / "a.onnx", "--cache-ratio", 0.5, *calibrated, "--json"))
    assert report["layers"] == chosen("fisher")["layers"]


def test_plan_by_text_says_what_convert_does(chosen, text):
    given = ("--calibration", text, "--calibration-tokens", 1024, "--seq-len", 128, "--quiet")
    found = json.loads(command("plan", TINY, "--cache-ratio", 0.5, "--json", *given))
    for planned, done in zip(found["layers"], chosen("fisher")["layers"], strict=True):
        assert planned.items() <= done.items()


def test_the_user_may_pin_rope_and_rank(calibrated, tmp_path):
    settings = ("--method", "fisher", "--rope-dims", 12, "--kv-rank", 20)
    report = json.loads(command(TINY, "--out", tmp_path / "a.onnx", *settings, *calibrated, "--json"))
    assert {(layer["rope_dims"], layer["kv_rank"]) for layer in report["layers"]} == {(12, 20)}


def test_polish_comes_closer_to_the_original(calibrated, tmp_path):
    """By its own account on text kept out of training, and by the perplexity on text nothing was chosen by."""
    settings = ("--method", "fisher", "--rope-dims", 4, "--kv-rank", 8, "--no-verify")
    plain, polished = (
        json.loads(command(TINY, "--out", tmp_path / str(n), *settings, "--polish-steps", n, *calibrated, "--json"))
        for n in (0, 10)
    )
    assert plain["polish"] is None
    assert polished["layers"][0]["kv_rank"] == plain["layers"][0]["kv_rank"]
    assert polished["polish"]["steps"] == polished["config"]["polish_steps"] == 10
    assert polished["polish"]["after"] < polished["polish"]["before"]
    assert polished["quality"]["converted"] < plain["quality"]["converted"]
    assert "polish" in {stage["name"] for stage in polished["stages"]}
