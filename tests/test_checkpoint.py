"""DeepSeek checkpoints: stock transformers computes what the converted module does, or the export refuses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math
import shutil
import weakref

import models
import numpy as np
import pytest
import torch
from converted import write
from safetensors.torch import load_file
from trained import shared_model, shared_text

from mla_compile import api
from mla_compile.artifacts.blueprint import read_blueprint
from mla_compile.artifacts.checkpoint import Checkpoint, require_blocks, stock_checkpoint
from mla_compile.artifacts.checkpoint_folder import _write_weights, check_folder, verify_folder
from mla_compile.cli import main
from mla_compile.config import make_config
from mla_compile.deepseek import with_preset
from mla_compile.errors import LoadError, RefusedError, UsageError, VerificationError
from mla_compile.passes.methods import METHODS
from mla_compile.passes.task import Task
from mla_compile.runtime.generate import generate
from mla_compile.runtime.torch_decoder import TorchDecoder

TOLERANCE = 1e-5
"""Of the largest logit: float32 through two layers, with other matrices between the same numbers, stays below 1e-6."""


def stock(folder):
    """The folder as anybody reads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__module__ == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    return model.eval()


MODELS = {
    "wide": {"rope_dims": 6},
    "smollm": {"rope_dims": 8},
    "mistral": {"rope_dims": 8},
    "llama-llama3-rope": {},
    "llama-yarn": {},
    "qwen2": {"rope_dims": 8},
    "llama-attention-bias": {"rope_dims": 8},
}


@pytest.mark.parametrize("name", MODELS)
def test_stock_transformers_computes_the_same(conversions, name, tmp_path):
    """All logits of a batch, and 64 tokens as it generates them with its own cache."""
    module, _, _ = conversion = conversions(name, **MODELS[name])
    report = write(conversion, tmp_path / "out")
    model = stock(tmp_path / "out")
    ids = models.tokens(3, 40, seed=7)
    with torch.no_grad():
        expected, got = module(ids).logits, model(ids).logits
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()
        prompt = ids[:1, :8]
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=64, max_new_tokens=64
        )
    ours = generate(TorchDecoder(module), [prompt[0].tolist()], 64)[0]
    if 0 not in ours:  # the end of text, which generate suppresses to go on
        assert written[0, 8:].tolist() == ours
    assert report.checkpoint.error <= TOLERANCE
    assert report.checkpoint.greedy == 1
    assert model.config.head_dim == report.deepseek.rope_dims == 2 * len(report.forecasts[0].rope_frequencies)


def test_only_biases_and_scaled_rotations_are_for_transformers_only(conversions):
    found = {}
    for name, settings in MODELS.items():
        module, report, assets = conversions(name, **settings)
        found[name] = stock_checkpoint(module, read_blueprint(report.to_dict()), assets.config).caveats
    assert [name for name, caveats in found.items() if not caveats] == ["wide", "smollm", "mistral"]
    assert "biases" in found["qwen2"][0]
    assert "'llama3'" in found["llama-llama3-rope"][0]


def test_a_model_without_biases_converts_to_one_without(programs):
    """Centred latents would bring biases, which serving engines leave out."""
    captured = programs["llama-mha"]
    settings = {"layout": "deepseek", "kv_rank": 20, "rope_dims": 8, "gradients": False}
    task = Task(captured.program, captured.sites, (), make_config(**settings), models.tokens(4, 24))
    for layer in METHODS["fisher"](task).weights:
        assert (layer.query_bias, layer.row_bias, layer.output_bias) == (None, None, None)


def test_every_norm_has_the_epsilon_that_engines_read_from_the_configuration(conversions, tmp_path):
    """transformers gives norms of latents its own; engines that give them the model's must compute the same."""
    write(conversions("wide", **MODELS["wide"]), tmp_path / "out")
    model = stock(tmp_path / "out")
    found = {m.variance_epsilon for m in model.modules() if hasattr(m, "variance_epsilon")}
    assert found == {model.config.rms_norm_eps}


@pytest.mark.parametrize("name", ["wide", "qwen2"])
def test_norms_of_latents_do_nothing(conversions, name, tmp_path):
    """The measured error of every latent norm is below the bound that is reported, but for rounding."""
    report = write(conversions(name, **MODELS[name]), tmp_path / "out")
    model = stock(tmp_path / "out").double()
    worst = []

    def compare(norm, inputs, output):
        plain = norm.weight * inputs[0] / math.sqrt(norm.variance_epsilon)
        worst.append(float(((output - plain).abs() / plain.abs().clamp(min=1e-300)).max()))

    for path, part in model.named_modules():
        if path.endswith("a_layernorm"):
            part.register_forward_hook(compare)
    with torch.no_grad():
        model(models.tokens(2, 30))
    assert len(worst) == (4 if name == "qwen2" else 2)
    rounding = 3e-7  # the norm itself is computed in float32
    assert max(worst) <= report.checkpoint.norm_error + rounding
    assert report.checkpoint.norm_error < 1e-9
    assert 0 < report.checkpoint.norm_error_measured < report.checkpoint.norm_error


def test_the_cache_of_transformers_holds_latents_and_rope_keys(conversions, tmp_path):
    """Counted from the tensors it holds."""
    report = write(conversions("smollm", **MODELS["smollm"]), tmp_path / "out")
    ids = models.tokens(2, 9)
    with torch.no_grad():
        cache = stock(tmp_path / "out")(ids, use_cache=True).past_key_values
    held = [tuple(x.shape) for layer in cache.layers for x in (layer.keys, layer.values)]
    assert held == [(2, 1, 9, 20), (2, 1, 9, 8)] * 2
    assert report.checkpoint.cache_bytes_measured == report.checkpoint.cache_bytes_per_token == 2 * 28 * 4


def test_what_leaving_out_biases_costs_is_measured(conversions, tmp_path):
    """Oracle: the checkpoint without them, loaded again, on the tokens that were compared."""
    report = write(conversions("qwen2", **MODELS["qwen2"]), tmp_path / "out")
    model, plain = stock(tmp_path / "out"), stock(tmp_path / "out")
    for part in plain.modules():
        if isinstance(part, torch.nn.Linear) and part.bias is not None:
            part.bias.data.zero_()
    ids = torch.from_numpy(np.load(tmp_path / "out" / "expected.npz")["ids"])[None]
    with torch.no_grad():
        right, wrong = (m(ids).logits[0].double().log_softmax(-1) for m in (model, plain))
    expected = float(torch.nn.functional.kl_div(wrong, right, reduction="batchmean", log_target=True))
    assert report.checkpoint.without_biases == pytest.approx(expected, rel=1e-4)  # logits are float32
    assert expected > 1e-4
    assert f"costs {expected:.2g} nats per token" in report.checkpoint.caveats[0]


def test_writing_holds_a_file_and_a_block_of_weights(tmp_path):
    """Weights of blocks are counted while they live: never two copies of the model, nor one beside the module's own."""
    blocks, size, limit = 12, 1000, 8_500
    alive, most = weakref.WeakSet(), []

    def block(number):
        made = {name: torch.full((size,), float(number)) for name in ("a", "b")}
        alive.update(made.values())
        most.append(len(alive) * size * 4)
        return made

    names = sorted(f"model.layers.{i:02}.{part}" for i in range(blocks) for part in ("a", "b"))
    shapes = dict.fromkeys(names, torch.Size([size]))
    (tmp_path / "config.json").write_text("{}")
    _write_weights(Checkpoint({}, shapes, torch.zeros, block, 0.0, ()), tmp_path, limit, torch.float32)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == blocks
    assert load_file(files[7])["model.layers.07.b"].tolist() == [7.0] * size
    assert max(most) <= limit + 2 * size * 4 < blocks * 2 * size * 4 / 5


@pytest.mark.parametrize(
    ("name", "asked", "length", "full"),
    [
        ("smollm", 1000, 48, True),
        ("smollm", 12, 12, False),
        ("qwen2", 30, 31, False),
        ("wide", 64, 64, True),  # no more numbers than inputs, though heads have 96
    ],
)
def test_queries_have_a_latent_of_the_length_that_is_asked_for(conversions, name, asked, length, full, tmp_path):
    """Biases take one entry more; at the full rank the module is that of a conversion without."""
    settings = {**MODELS[name], "q_rank": asked}
    module, _, _ = conversion = conversions(name, **settings)
    report = write(conversion, tmp_path / "out")
    model = stock(tmp_path / "out")
    assert model.config.q_lora_rank == length
    ids = models.tokens(3, 40, seed=7)
    with torch.no_grad():
        expected, got = module(ids).logits, model(ids).logits
        whole = conversions(name, **MODELS[name])[0](ids).logits
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert report.checkpoint.error <= TOLERANCE
    assert report.checkpoint.norm_error < 1e-9
    change = (whole - expected).abs().max() / whole.abs().max()
    assert change == 0 if full else change > TOLERANCE


def test_queries_of_more_than_the_rank_that_was_asked_for_are_refused(conversions):
    module, report, assets = conversions("smollm", **MODELS["smollm"])
    report = dataclasses.replace(report, config={**report.config, "q_rank": 12})
    with pytest.raises(RefusedError, match="of more than rank 12: training gave them more"):
        dict(stock_checkpoint(module, read_blueprint(report.to_dict()), assets.config).tensors())
    with pytest.raises(UsageError, match="q_rank belongs to the format deepseek"):
        make_config(q_rank=12)


def test_large_latents_are_refused(conversions):
    module, report, assets = conversions("wide", **MODELS["wide"])
    module = copy.deepcopy(module)
    holder = module.graph.get_submodule(f"{report.sites[0].path}.latent_0")
    with torch.no_grad():
        holder.row.mul_(1e5)
    with pytest.raises(RefusedError, match=r"might change them by 9.*e-02"):
        stock_checkpoint(module, read_blueprint(report.to_dict()), assets.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_become_checkpoints_of_their_type(conversions, dtype, tmp_path):
    """In float32 they compute what the widened module does; bfloat16 is written as such, and float16 cannot be."""
    module, report, assets = conversions("smollm", **MODELS["smollm"], dtype=dtype)
    facts = write((module, report, assets), tmp_path / "out").checkpoint
    assert facts.error <= TOLERANCE
    narrow = dtype == torch.bfloat16
    kinds = {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16 if narrow else torch.float32}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == facts.dtype == ("bfloat16" if narrow else "float32")
    assert facts.cache_bytes_measured == facts.cache_bytes_per_token == 2 * 28 * (2 if narrow else 4)
    if narrow:  # every weight is rounded once more, by half of 2^-8
        assert TOLERANCE < facts.rounding_error < 0.05
        assert verify_folder(tmp_path / "out").error == pytest.approx(facts.rounding_error)


def test_written_again_by_transformers_it_is_the_same(conversions, tmp_path):
    """Files, names and bytes of the weights, in one file and in several; and our own bytes are reproducible."""
    conversion = conversions("smollm", **MODELS["smollm"])
    for shard in (10**9, 40_000):
        write(conversion, tmp_path / "first", shard=shard, force=True)
        write(conversion, tmp_path / "second", shard=shard, force=True)
        stock(tmp_path / "first").save_pretrained(tmp_path / "again", max_shard_size=shard)
        names = {f.name for f in (tmp_path / "first").glob("model*")}
        assert names == {f.name for f in (tmp_path / "again").glob("model*")}
        assert len(names) > 3 if shard == 40_000 else names == {"model.safetensors"}
        for file in (tmp_path / "first").iterdir():
            if file.stem != "report":  # times
                assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
            if file.name in names:
                assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
        shutil.rmtree(tmp_path / "again")


def test_an_earlier_checkpoint_leaves_nothing_behind(conversions, tmp_path):
    conversion = conversions("smollm", **MODELS["smollm"])
    write(conversion, tmp_path / "out", shard=40_000)
    with pytest.raises(UsageError, match="exists already"):
        write(conversion, tmp_path / "out")
    others = ("model-lora.safetensors", "model.safetensors.bak", "model-00001-of-00002.safetensors.orig")
    for name in others:
        (tmp_path / "out" / name).write_text("somebody else's")
    write(conversion, tmp_path / "out", force=True)
    assert {f.name for f in (tmp_path / "out").glob("model*")} == {"model.safetensors", *others}


def test_flashmla_sizes_are_filled_up_with_zeros(conversions, tmp_path):
    report = write(conversions("smollm", **MODELS["smollm"]), tmp_path / "out", preset="flashmla")
    assert (report.checkpoint.latent, report.checkpoint.rope) == (512, 64)
    assert report.checkpoint.cache_bytes_per_token == 2 * 576 * 4
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert int(weight.any(1).sum()) == 20 + 8
    assert report.checkpoint.error <= TOLERANCE


def test_flashmla_sizes_are_asked_for(programs):
    site = programs["llama-gqa"].sites[0]
    settings = {"format": "deepseek", "layout": "deepseek", "preset": "flashmla"}
    for given, expected in (({}, (512, 16)), ({"cache_ratio": 1.0}, (None, 64)), ({"rope_dims": 32}, (512, 32))):
        asked = with_preset(make_config(**settings, **given), site)
        assert (asked.kv_rank, asked.rope_dims) == expected
    assert with_preset(make_config(**settings), programs["llama-llama3-rope"].sites[0]).rope_dims == 16
    for wrong in ({"kv_rank": 513}, {"rope_dims": 24}, {"rope_dims": 128}):
        with pytest.raises(UsageError, match="512 latent entries and 64 rotating channels"):
            with_preset(make_config(**settings, **wrong), site)
    with pytest.raises(UsageError, match="belongs to the format deepseek"):
        make_config(preset="flashmla")


def test_sizes_above_those_of_the_preset_are_refused(conversions):
    module, report, assets = conversions("smollm", **MODELS["smollm"])
    shape = dataclasses.replace(report.deepseek, kv_rank=513)
    report = dataclasses.replace(report, deepseek=shape, config={**report.config, "preset": "flashmla"})
    with pytest.raises(RefusedError, match="this model has 513 and 8"):
        stock_checkpoint(module, read_blueprint(report.to_dict()), assets.config)


def test_a_wrong_tensor_is_found_and_leaves_no_folder(conversions, tmp_path, monkeypatch):
    from mla_compile.artifacts import checkpoint_tensors

    monkeypatch.setattr(
        checkpoint_tensors, "_output_bias", lambda layer: layer.rest["self_attn.o_proj.weight"][:, 0] * 0
    )
    with pytest.raises(VerificationError, match="differs from the converted PyTorch module"):
        write(conversions("qwen2", **MODELS["qwen2"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_folder_is_found(conversions, tmp_path):
    write(conversions("smollm", **MODELS["smollm"]), tmp_path / "out")
    found = verify_folder(tmp_path / "out")
    assert (found.error, found.greedy, found.without_biases) == (pytest.approx(0, abs=TOLERANCE), 1, None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError):
        verify_folder(tmp_path / "out")
    answers = tmp_path / "out" / "expected.npz"
    for content in (answers.read_bytes()[:-100], b""):
        answers.write_bytes(content)
        with pytest.raises(LoadError, match=r"expected.npz', with the answers to compare with, is damaged"):
            verify_folder(tmp_path / "out")
    answers.unlink()
    with pytest.raises(LoadError, match=r"holds no 'expected.npz'"):
        verify_folder(tmp_path / "out")


def test_other_blocks_are_refused_with_the_first_reason(programs):
    captured = programs["llama-gqa"]
    require_blocks(captured.program, captured.sites)
    weights, norm = captured.program.exported.state_dict, "model.layers.1.input_layernorm"

    def refused(changed):
        exported = dataclasses.make_dataclass("Exported", ["state_dict"])(changed)
        with pytest.raises(RefusedError) as caught:
            require_blocks(dataclasses.replace(captured.program, exported=exported), captured.sites)
        return caught.value.message

    assert f"has no place for '{norm}.bias'" in refused({**weights, f"{norm}.bias": weights[f"{norm}.weight"]})
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert "weigh experts by sigmoids" in refused({**weights, experts: weights[f"{norm}.weight"]})
    lacking = {name: value for name, value in weights.items() if name != "model.layers.0.mlp.gate_proj.weight"}
    assert "a 'model.layers.0.mlp.gate_proj.weight', which it lacks" in refused(lacking)
    with pytest.raises(LoadError, match="has no rms_norm_eps"):
        require_blocks(programs["complex-llama"].program, programs["complex-llama"].sites)
    config = {**captured.program.assets.config, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}
    assets = dataclasses.replace(captured.program.assets, config=config)
    with pytest.raises(RefusedError, match="scaled by 'dynamic'"):
        require_blocks(dataclasses.replace(captured.program, assets=assets), captured.sites)


def test_another_layout_and_other_places_are_refused(conversions, tmp_path):
    _, report, _ = conversions("smollm", **MODELS["smollm"])
    with pytest.raises(UsageError, match="layout free"):
        read_blueprint(dataclasses.replace(report, deepseek=None).to_dict())
    assert make_config(format="deepseek").layout == make_config(format="gguf").layout == "deepseek"
    with pytest.raises(UsageError, match="names a file"):
        check_folder(tmp_path / "model.onnx", force=False)
    check_folder(tmp_path / "Llama-3.2-1B-mla", force=False)


@pytest.mark.parametrize(
    ("name", "reason"), [("qwen3", "norm"), ("gemma2", "soft-cap|window|norm"), ("mistral-window", "window")]
)
def test_attention_without_a_place_is_refused_before_any_work(programs, name, reason, tmp_path):
    captured = programs[name]
    with pytest.raises(RefusedError, match=reason):
        api.compile(
            captured.program.exported,
            calibration=models.tokens(4, 24),
            layout="deepseek",
            format="deepseek",
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def run(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260k", "gqa4m", "mha4m"])
def test_trained_model_through_the_command_line(name, tmp_path):
    from transformers import AutoTokenizer

    model, text = shared_model(name), shared_text("tinystories_train_head.txt")
    (tmp_path / "text.txt").write_text(text.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    sizes = ["--kv-rank", 32, "--rope-dims", 8, "--method", "transmla"]
    words = [model, "--out", tmp_path / "out", "--format", "deepseek", "--calibration", tmp_path / "text.txt", *sizes]
    code, out, err = run(*words, "--json", "--quiet")
    assert code == 0, err
    facts = json.loads(out)["checkpoint"]
    assert facts["error"] <= TOLERANCE
    assert facts["greedy"] == 1
    assert not facts["caveats"]
    code, out, err = run("verify", tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(out)["error"] <= TOLERANCE
    same = [AutoTokenizer.from_pretrained(folder)("Once upon a time").input_ids for folder in (model, tmp_path / "out")]
    assert same[0] == same[1]
    assert run(*words)[0] == 2  # it is there already
