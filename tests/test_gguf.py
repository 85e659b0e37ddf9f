"""GGUF files: llama.cpp computes what the converted module does and cuts text alike, or the export refuses."""

from __future__ import annotations

import json
import shutil

import models
import numpy as np
import pytest
import torch
from converted import write
from gguf import GGUFReader, TokenType
from llama_cpp_graph import Graph
from safetensors.torch import load_file, save_file
from trained import shared_model, shared_text

from mla_compile.artifacts.gguf_check import has_llama_cpp, verify_gguf
from mla_compile.artifacts.gguf_file import check_gguf, export_gguf, write_gguf
from mla_compile.artifacts.gguf_vocabulary import read_vocabulary
from mla_compile.cli import main
from mla_compile.errors import LoadError, RefusedError, UsageError
from mla_compile.progress import Stages

TOLERANCE = 1e-5
"""Of the largest logit: the module computes in float32, the oracle in float64."""

MODELS = {
    "wide": {"rope_dims": 6},
    "smollm": {"rope_dims": 8},
    "llama-yarn": {},
    "llama-linear": {},
    "smollm:q": {"rope_dims": 8, "q_rank": 12},
    "smollm:b": {"rope_dims": 8, "dtype": torch.bfloat16},
}


@pytest.fixture(scope="session")
def files(conversions, tmp_path_factory):
    """A GGUF file of a conversion, by its name, made at first use."""
    found = {}

    def call(name, **settings):
        name, key = name.split(":")[0], name
        if key not in found:
            module, report, assets = conversions(name, **settings)
            path = tmp_path_factory.mktemp("gguf") / "model.gguf"
            report = write_gguf(module, report, assets, path, None, force=False, stages=Stages())
            found[key] = path, report
        return found[key]

    return call


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_of_llama_cpp_computes_the_same(conversions, files, name):
    module, _, _ = conversions(name.split(":")[0], **MODELS[name])
    path, report = files(name, **MODELS[name])
    ids = models.tokens(1, 40, seed=7)
    with torch.no_grad():
        expected = module(ids).logits[0].double().numpy()
    got = Graph(path).logits(ids[0].numpy())
    narrow = "dtype" in MODELS[name]  # weights are rounded to 2^-9, and so is what the module computes
    assert np.abs(got - expected).max() <= (0.05 if narrow else TOLERANCE) * np.abs(expected).max()
    kinds = {t.tensor_type.name for t in GGUFReader(path).tensors if len(t.shape) > 1}
    assert kinds == {"BF16" if narrow else "F32"}
    assert report.checkpoint.error <= TOLERANCE
    assert {f.name for f in path.parent.iterdir()} == {"model.gguf", "report.html", "report.json"}


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(files, name):
    path, report = files(name, **MODELS[name])
    error, greedy = verify_gguf(path)
    narrow = "dtype" in MODELS[name]
    assert report.checkpoint.llama_cpp_error == error <= (0.05 if narrow else TOLERANCE)
    assert greedy == 1  # also in bfloat16: here the second best token is behind by more than half of the largest logit


def test_without_llama_cpp_it_is_said_that_nothing_was_checked(files):
    path, report = files("smollm", **MODELS["smollm"])
    if has_llama_cpp():
        assert report.checkpoint.llama_cpp_error is not None
        return
    assert any("not checked in llama.cpp" in warning for warning in report.warnings)
    with pytest.raises(LoadError, match="not installed"):
        verify_gguf(path)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("qwen2", {"rope_dims": 8}, "biases.*wrong number of tensors"),
        ("llama-llama3-rope", {}, "'llama3'.*no table of factors"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(conversions, tmp_path, name, settings, reason):
    module, report, assets = conversions(name, **settings)
    with pytest.raises(RefusedError, match=reason):
        write_gguf(module, report, assets, tmp_path / "x" / "model.gguf", None, force=False, stages=Stages())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 27, "q_lora_rank": 8}, "DeepSeek-V2-Lite"),
        ({"qk_nope_head_dim": 0}, "n_embd_head_qk_nope >= 1"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"num_hidden_layers": 513}, "at most 512 layers"),
    ],
)
def test_checks_of_llama_cpp(conversions, tmp_path, change, reason):
    write(conversions("smollm", **MODELS["smollm"]), tmp_path / "folder")
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(RefusedError, match=reason):
        export_gguf(tmp_path / "folder", tmp_path / "model.gguf", force=False, stages=Stages())
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]


def _settings(**changes):
    def damage(folder):
        file = folder / "config.json"
        stored = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in stored.items() if value is not ...}, default=str))

    return damage


def _weights(change):
    def damage(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def _text(name, text):
    return lambda folder: (folder / name).write_text(text)


def _cut_short(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


DAMAGES = {
    "lacks the weight 'model.norm.weight'": _weights(lambda tensors: tensors.pop("model.norm.weight")),
    "has a weight 'foreign'": _weights(lambda tensors: tensors.update(foreign=torch.zeros(3))),
    "is of the type I64": _weights(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].long()})),
    "holds no DeepSeek checkpoint .*incomplete": _cut_short("model.safetensors"),
    "holds no DeepSeek checkpoint .*'list'": _text("config.json", "[1]"),
    "holds no DeepSeek checkpoint .*Expecting": _text("config.json", "{"),
    "has the shape .97, 48., and its config.json asks for .129280, 48.": _settings(vocab_size=...),
    r"self_attn.kv_b_proj.weight' of .* has the shape": _settings(num_attention_heads=5),
    "has a weight 'model.layers.1": _settings(num_hidden_layers=1, first_k_dense_replace=1),
    "describes no DeepSeek model": _settings(num_attention_heads="many"),
    "describes no DeepSeek model .*factor": _settings(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
    "Weights of .* cannot be read": _text(
        "model.safetensors.index.json", json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}})
    ),
    "tokenizer.json' is no tokenizer, or a damaged one .*JSONDecodeError": _text("tokenizer.json", "{"),
    "tokenizer.json' is no tokenizer, or a damaged one .*TypeError": _text("tokenizer.json", "[]"),
    "expected.npz', with the answers to compare with, is damaged .*BadZipFile": _cut_short("expected.npz"),
    "expected.npz', with the answers to compare with, is damaged .*EOFError": _text("expected.npz", ""),
}


@pytest.fixture(scope="module")
def folder(conversions, tmp_path_factory):
    found = tmp_path_factory.mktemp("checkpoint") / "folder"
    write(conversions("smollm", **MODELS["smollm"]), found)
    return found


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_no_file(folder, tmp_path, reason):
    """No tensor is left out in silence, and nothing ends in a traceback."""
    shutil.copytree(folder, tmp_path / "folder")
    DAMAGES[reason](tmp_path / "folder")
    with pytest.raises(LoadError, match=reason):
        export_gguf(tmp_path / "folder", tmp_path / "model.gguf", force=False, stages=Stages())
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]


def test_experts_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "folder")
    _settings(first_k_dense_replace=1)(tmp_path / "folder")
    with pytest.raises(RefusedError, match="layers with experts"):
        export_gguf(tmp_path / "folder", tmp_path / "model.gguf", force=False, stages=Stages())


def test_a_configuration_of_before_is_read(folder, tmp_path):
    """transformers before version 5 had the rope in two settings."""
    shutil.copytree(folder, tmp_path / "folder")
    _settings(rope_parameters=...)(tmp_path / "folder")
    for source, name in ((folder, "new"), (tmp_path / "folder", "old")):
        export_gguf(source, tmp_path / f"{name}.gguf", force=False, stages=Stages())
    new, old = (Graph(tmp_path / f"{name}.gguf") for name in ("new", "old"))
    ids = models.tokens(1, 12, seed=7)[0].numpy()
    assert (new.logits(ids) == old.logits(ids)).all()


def test_a_folder_becomes_the_same_file(conversions, files, tmp_path, capsys):
    """In one file of weights and in several, by the command."""
    expected = Graph(files("smollm", **MODELS["smollm"])[0])
    for shard in (10**9, 40_000):
        write(conversions("smollm", **MODELS["smollm"]), tmp_path / "folder", shard=shard, force=True)
        assert main(["export", str(tmp_path / "folder"), "--out", str(tmp_path / "model.gguf"), "--force"]) == 0
        got = Graph(tmp_path / "model.gguf")
        assert got.weights.keys() == expected.weights.keys()
        assert all((got.weights[name] == value).all() for name, value in expected.weights.items())
    assert main(["export", str(tmp_path / "folder"), "--out", str(tmp_path / "model.gguf")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "other.gguf")]) == 2
    assert "holds no DeepSeek checkpoint" in capsys.readouterr().err


def test_other_names_are_refused(tmp_path):
    for name in ("model.bin", ".gguf", "folder"):
        with pytest.raises(UsageError, match="not named like a GGUF file"):
            check_gguf(tmp_path / name, force=False)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="exists already"):
        check_gguf(tmp_path / "model.gguf", force=False)
    if has_llama_cpp():
        with pytest.raises(LoadError, match="holds no answers"):
            verify_gguf(tmp_path / "model.gguf")


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
LLAMA = rf"{_WORDS}\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def cut(regex):
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**BYTES, "use_regex": False}]}


def byte_level(folder, pre_tokenizer, **model):
    """A tokenizer of 256 bytes and three merges."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from tokenizers.pre_tokenizers import ByteLevel

    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(["<s>", *letters, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(kinds.BPE(vocabulary, merges))
    tokenizer.add_special_tokens(["<s>"])
    stored = json.loads(tokenizer.to_str())
    stored["pre_tokenizer"] = pre_tokenizer
    stored["model"] |= model
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("pre_tokenizer", "model", "expected"),
    [
        (BYTES, {}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, {}, "smollm"),
        (cut(LLAMA), {"ignore_merges": True}, "llama-bpe"),
        (cut(LLAMA.replace("{1,3}", "")), {}, "qwen2"),
    ],
)
def test_expressions_that_cut_text_have_llama_cpps_names(tmp_path, pre_tokenizer, model, expected):
    found = read_vocabulary(byte_level(tmp_path / "t", pre_tokenizer, **model), 270)
    assert (found.model, found.pre, found.begins) == ("gpt2", expected, False)
    assert found.kinds[0] == TokenType.CONTROL
    assert found.tokens[260:] == tuple(f"[PAD{i}]" for i in range(260, 270))
    assert {*found.kinds[260:]} == {TokenType.UNUSED}


@pytest.mark.parametrize(
    ("pre_tokenizer", "model", "reason"),
    [
        (cut(r"\p{L}+"), {}, "none that this version knows"),
        (cut(LLAMA), {}, "none that this version knows"),
        ({**BYTES, "add_prefix_space": True}, {}, "bytes as they are"),
        (None, {}, "bytes as they are"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path, pre_tokenizer, model, reason):
    with pytest.raises(RefusedError, match=reason):
        read_vocabulary(byte_level(tmp_path / "t", pre_tokenizer, **model), 270)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="a token 259, and the model knows 97"):
        read_vocabulary(byte_level(tmp_path / "t", BYTES), 97)


def sentencepiece(folder, merges, tokens, **changes):
    stored = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *tokens])},
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def test_merges_become_scores(tmp_path):
    """llama.cpp joins the two neighbours whose text has the best score."""
    merges = [["▁", "a"], ["a", "b"], ["▁a", "b"], ["▁", "ab"]]
    folder = sentencepiece(tmp_path / "t", merges, ["▁", "a", "b", "▁a", "ab", "▁ab"])
    found = read_vocabulary(folder, 263)
    assert (found.model, found.prefixed) == ("llama", True)
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert scores["▁a"] > scores["ab"] > scores["▁ab"]
    assert found.kinds[:2] == (TokenType.UNKNOWN, TokenType.BYTE)


@pytest.mark.parametrize(
    ("merges", "changes", "reason"),
    [
        ([["▁", "a"], ["a", "b"], ["▁a", "b"]], {}, "never joins '▁' and 'ab'"),
        ([["▁a", "b"], ["▁", "a"], ["a", "b"], ["▁", "ab"]], {}, "not in the order"),
        ([["▁", "a"], ["a", "b"], ["▁a", "b"], ["▁", "ab"]], {"normalizer": {"type": "Lowercase"}}, "another way"),
    ],
)
def test_merges_that_are_no_scores_are_refused(tmp_path, merges, changes, reason):
    folder = sentencepiece(tmp_path / "t", merges, ["▁", "a", "b", "▁a", "ab", "▁ab"], **changes)
    with pytest.raises(RefusedError, match=reason):
        read_vocabulary(folder, 263)


@pytest.mark.slow
@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("name", ["stories260k", "gqa4m"])
def test_trained_model_in_llama_cpp(name, tmp_path):
    """Text goes in and comes out of llama.cpp as it does of the checkpoint in transformers, with its own tokenizers."""
    import llama_cpp
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, text = shared_model(name), shared_text("tinystories_train_head.txt")
    (tmp_path / "text.txt").write_text(text.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    words = [model, "--out", tmp_path / "folder", "--format", "deepseek", "--calibration", tmp_path / "text.txt"]
    words += ["--kv-rank", 32, "--rope-dims", 8, "--method", "transmla", "--quiet"]
    assert main([str(w) for w in words]) == 0
    file = tmp_path / "model.gguf"
    assert main(["export", str(tmp_path / "folder"), "--out", str(file)]) == 0
    assert main(["verify", str(file)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    theirs = llama_cpp.Llama(
        str(file), n_ctx=256, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False
    )
    sample = text.read_text(encoding="utf-8")[30_000:60_000] + " 12 345\n\n  naïve “quoted”\t…  🙂 "
    for line in sample.split("\n"):
        assert theirs.tokenize(line.encode(), special=True) == tokenizer(line).input_ids
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    prompt = "Once upon a time"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = stock.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, pad_token_id=0
    )
    expected = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    got = theirs(prompt, max_tokens=64, temperature=0.0, repeat_penalty=1.0)["choices"][0]["text"]
    assert got.strip() == expected.strip()
