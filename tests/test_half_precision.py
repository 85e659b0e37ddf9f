"""Models in float16 and bfloat16, whole: oracles are the same weights in float32, and the original's own roundings.

A narrow conversion must be exactly right where it is computed in float32, and its own roundings no larger than a few
times the original's (``ROUNDING_FACTOR``).
"""

from __future__ import annotations

import copy
import functools
import json

import models
import numpy as np
import onnx
import pytest
import test_onnx_session
import torch
from torch import nn
from trained import shared_model, shared_text

import mla_compile
from mla_compile.config import make_config
from mla_compile.errors import UsageError, VerificationError
from mla_compile.passes.insert_latent import insert_latent
from mla_compile.passes.methods import nothing_left_out
from mla_compile.passes.recognise import recognise
from mla_compile.passes.retype import widened
from mla_compile.passes.task import Task
from mla_compile.runtime.cpu.library import compiler
from mla_compile.runtime.generate import generate
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_cache import CacheLayer, GrowingCache
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.torch_decoder import TorchDecoder
from mla_compile.sources.capture import capture
from mla_compile.text.evaluate import original_scorer
from mla_compile.verification.agreement import ROUNDING_FACTOR, require_rounding, rounding_error
from mla_compile.verification.module import check_module

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
TEXT = torch.randint(0, models.VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(3))


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig

    config = {k: v for k, v in models._COMMON.items() if k != "num_key_value_heads"}
    return models._hf(GPTNeoXConfig(**config))


def loud_keys() -> nn.Module:
    """Squares of its keys are beyond float16's largest number, which their norm does not mind."""
    model = models.qwen3()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("k_proj.weight"):
                value.mul_(2000)
    return model


MODELS = {
    "llama": models.llama,
    "qwen3": models.qwen3,
    "neox": neox,
    "nano": models.NanoGPT,
    "loud": loud_keys,
}
CASES = [
    ("llama", BFLOAT16),
    ("llama", FLOAT16),
    ("qwen3", BFLOAT16),
    ("neox", FLOAT16),
    ("nano", BFLOAT16),
    ("loud", FLOAT16),
]


@functools.cache
def original(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval().to(dtype)


@functools.cache
def converted(name: str, dtype: torch.dtype) -> mla_compile.CompiledModel:
    model = original(name, dtype)
    return mla_compile.compile(model, models.example(model), exact=True)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_narrow_model_is_converted_in_its_type(name, dtype):
    result = converted(name, dtype)
    checks = result.report.verification
    assert {p.dtype for p in result.module.parameters()} == {dtype}
    assert {c.dtype for c in result.module(models.tokens(1, 3)).cache} == {dtype}
    assert result.report.config["dtype"] == str(dtype).removeprefix("torch.")
    # In float32 both links are as tight as those of float32 models: below 1e-6 was observed.
    assert checks.rewrite_error < 1e-5
    assert checks.decode_error < 1e-5
    before, after = checks.rounding
    assert 0 < after <= ROUNDING_FACTOR * before
    elements = sum(p.elements_after for p in result.report.plans)
    assert checks.cache_bytes_per_token == result.report.cache_bytes_after == 2 * elements
    assert result.report.cache_bytes_before == 2 * sum(p.elements_before for p in result.report.plans)


@pytest.mark.parametrize(("name", "dtype"), CASES[:3])
def test_a_narrow_model_loses_no_more_than_it_loses_itself(name, dtype):
    """Oracle: the same weights, in float64."""
    ids = models.tokens(2, 16)
    module, result = original(name, dtype), converted(name, dtype)
    with torch.no_grad():
        # Frequencies that were rounded with the model are the model's own.
        exact = copy.deepcopy(module).double()(ids).logits
        errors = [(x.double() - exact).abs().max() for x in (result.module(ids).logits, module(ids).logits)]
    assert errors[0] <= ROUNDING_FACTOR * errors[1]


def test_a_lossy_conversion_is_chosen_by_float32_statistics():
    """The ranks and losses of a narrow model are those of the same weights in float32."""
    narrow = original("llama", BFLOAT16)
    settings = {"cache_ratio": 0.5, "calibration": TEXT, "statistics_cache": False}
    one, other = (mla_compile.compile(m, **settings).report for m in (narrow, copy.deepcopy(narrow).float()))
    assert [p.kv_rank for p in one.plans] == [p.kv_rank for p in other.plans]
    for ours, theirs in zip(one.layer_errors, other.layer_errors, strict=True):
        assert ours.output == pytest.approx(theirs.output, rel=0.01)
    assert one.quality.converted == pytest.approx(other.quality.converted, rel=0.01)  # measured in the type itself


def test_an_error_below_the_types_rounding_is_found():
    """A thousandth is less than bfloat16 rounds, and yet no rounding."""
    module = original("llama", BFLOAT16)
    program = capture(module, None)
    sites = recognise(program).sites
    good = converted("llama", BFLOAT16)
    config = make_config(exact=True)
    weights = nothing_left_out(Task(program, sites, (), config, None)).weights
    wrong = [weights[0], copy.copy(weights[1])]
    object.__setattr__(wrong[1], "value_up", weights[1].value_up * 1.003)
    rewritten = insert_latent(program, sites, wrong, torch.float32)
    exact = LatentModel(rewritten.module, rewritten.rows)
    scorers = original_scorer(program), original_scorer(program, widened(program.flat_module()))
    with pytest.raises(VerificationError, match="rewritten graph at full rank"):
        check_module(scorers[0], exact, good.module, TEXT[:2], text=True, wide_original=scorers[1])


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_roundings_that_are_none_are_refused(error):
    with pytest.raises(VerificationError, match=r"float16 differs from itself in float32") as caught:
        require_rounding("The converted model", error, 1e-3, FLOAT16)
    assert "--dtype bfloat16" in caught.value.remedy
    require_rounding("The converted model", 3e-3, 1e-3, FLOAT16)


def test_what_roundings_do_is_that_of_most_tokens():
    """Routers choose another expert by a rounding; an overflow is none, anywhere."""
    exact = torch.ones(2, 3, 5)
    got = exact + 0.01
    got[0, 1] = 7
    assert rounding_error(got, exact) == pytest.approx(0.01, rel=1e-3)
    for value in (torch.inf, torch.nan):
        got[1, 2, 3] = value
        assert rounding_error(got, exact) == torch.inf


# ---- the type of the result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("half")
    models.llama().save_pretrained(place / "float32")
    models.llama().to(BFLOAT16).save_pretrained(place / "bfloat16")
    return place


def test_a_folder_is_read_in_the_type_that_is_asked_for(folders):
    result = mla_compile.compile(folders / "float32", exact=True, dtype="float16")
    assert {p.dtype for p in result.module.parameters()} == {FLOAT16}
    assert result.assets.config["dtype"] == "float16"
    frequencies = [b for n, b in result.module.named_buffers() if n.endswith("inv_freq")]
    assert {b.dtype for b in frequencies} == {torch.float32}
    # Rotary frequencies are no weights, and are not rounded.
    expected = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(frequencies[0][0].sort(descending=True).values, expected)


def test_a_module_is_converted_in_another_type_and_left_as_it_is():
    module = models.llama(num_hidden_layers=1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = mla_compile.compile(module, exact=True, dtype="bfloat16", check=False)
    assert {p.dtype for p in result.module.parameters()} == {BFLOAT16}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("exact", [True, False])
def test_a_float32_model_with_a_narrow_part_is_compared_in_float32(exact):
    class NarrowHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = models.llama(num_hidden_layers=1).model
            self.head = nn.Linear(models.WIDTH, models.VOCABULARY, bias=False, dtype=BFLOAT16)

        def forward(self, ids):
            return self.head(self.body(ids).last_hidden_state.to(BFLOAT16)).float()

    settings = {"exact": True} if exact else {"method": "mha2mla", "cache_ratio": 0.5}
    result = mla_compile.compile(NarrowHead().eval(), models.tokens(2, 8), **settings)
    assert result.report.verification.rewrite_error < 1e-5


def test_a_narrow_graph_becomes_float32():
    """Oracle: the module itself made float32, which is the same numbers."""
    module = original("llama", BFLOAT16)
    exported = capture(module, None).exported
    result = mla_compile.compile(exported, exact=True, dtype="float32")
    assert {p.dtype for p in result.module.parameters()} == {torch.float32}
    assert result.report.cache_bytes_after == 2 * result.report.cache_bytes_before  # as many numbers of twice the size
    ids = models.tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            result.module(ids).logits, copy.deepcopy(module).float()(ids).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("dtype", "settings", "message"),
    [
        ("float32", {"dtype": "bfloat16"}, "does not say what bfloat16 must not round"),
        ("bfloat16", {"dtype": "float16"}, "does not say what float16 must not round"),
        ("bfloat16", {"cache_type": "int8"}, "int8 caches are of float32"),
        ("bfloat16", {"cache_type": "float32"}, "float32 caches are of float32"),
        ("bfloat16", {"finetune": TEXT}, "fine-tuned in float32 only"),
    ],
)
def test_what_cannot_be_had_in_a_type_is_refused(dtype, settings, message):
    if "finetune" in settings:
        pytest.importorskip("accelerate")
    exported = capture(original("llama", getattr(torch, dtype)), None).exported
    with pytest.raises(UsageError, match=message) as caught:
        mla_compile.compile(exported, exact=True, **settings)
    assert caught.value.remedy


def test_an_encoder_is_float32_only():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=models.VOCABULARY, **sizes)).eval().to(BFLOAT16)
    with pytest.raises(UsageError, match="encoder is converted in float32 only"):
        mla_compile.compile(model, encoders=True, kv_rank=4)


def test_plans_count_bytes_of_the_type(folders, capsys):
    from mla_compile.cli import main

    counted = {}
    for name, more in (("float32", []), ("bfloat16", []), ("bfloat16", ["--dtype", "float32"])):
        assert main(["plan", str(folders / name), "--method", "mha2mla", "--json", *more]) == 0
        plan = json.loads(capsys.readouterr().out)
        counted[name, *more] = (plan["bytes_per_token_before"], plan["bytes_per_token_after"])
    before, after = counted["float32",]
    assert counted["bfloat16",] == (before / 2, after / 2)
    assert counted["bfloat16", "--dtype", "float32"] == (before, after)


def test_a_saved_folder_keeps_its_type(tmp_path):
    result = converted("qwen3", BFLOAT16)
    result.save(tmp_path / "saved")
    back = mla_compile.load(tmp_path / "saved")
    ids = models.tokens(2, 5)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, result.module(ids).logits)
    assert {c.dtype for c in back.empty_cache(1)} == {BFLOAT16}


def test_a_saved_folder_is_trained_in_float32_and_keeps_its_type(tmp_path):
    pytest.importorskip("accelerate")
    saved, tuned = tmp_path / "saved", tmp_path / "tuned"
    converted("qwen3", BFLOAT16).save(saved)
    text = (TEXT[:, :1] + 3 * torch.arange(16)) % models.VOCABULARY
    recipe = mla_compile.Recipe(batch=4, tokens=2048, rate=0.02, train="latent", tracker="none")
    training = mla_compile.finetune(saved, text, tuned, recipe)["training"]
    assert training["after"] < training["before"]
    before, after = (mla_compile.load(folder).state_dict() for folder in (saved, tuned))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"query", "row", "value_up"} <= {name.rpartition(".")[2] for name in changed}
    assert all(".latent_" in name for name in changed)
    assert {n: v.dtype for n, v in before.items()} == {n: v.dtype for n, v in after.items()}
    with torch.no_grad():
        logits = mla_compile.load(tuned)(text[-1:]).logits.float()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[-1:, 1:].flatten())  # held out
    # Sums of the same logits in float64: the report tells of weights as they were written.
    assert float(loss) == pytest.approx(training["after"], rel=1e-5)
    assert training["after"] != min(p["held_out"] for p in training["curve"])


# ---- ONNX


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("half-onnx")

    @functools.cache
    def write(name: str, dtype: torch.dtype):
        path = place / f"{name}-{str(dtype).removeprefix('torch.')}.onnx"
        return path, converted(name, dtype).to_onnx(path, force=True)

    return write


@pytest.mark.parametrize(("name", "dtype"), [("llama", FLOAT16), ("qwen3", BFLOAT16)])
def test_an_onnx_file_holds_the_type_and_is_verified(files, name, dtype):
    path, report = files(name, dtype)
    checks = report.verification
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    kind = onnx.TensorProto.FLOAT16 if dtype == FLOAT16 else onnx.TensorProto.BFLOAT16
    values = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert {t for n, t in values.items() if "latent" in n} == {kind}
    assert values["logits"] == onnx.TensorProto.FLOAT
    weights = {i.data_type for i in model.graph.initializer if len(i.dims) > 1 and "inv_freq" not in i.name}
    assert weights == {kind}
    assert checks.lowering_copy
    assert checks.lowering_error < 1e-5  # the copy computes in float32, as the module does that it is compared with
    assert checks.lowering_greedy == 1
    assert checks.cache_bytes_per_token == report.cache_bytes_after
    assert (checks.lowering_rounding is None) is (dtype == BFLOAT16)
    assert not [p for p in path.parent.iterdir() if p.is_dir()]  # the copy is gone


@pytest.mark.parametrize("kernel", ["standard", "auto"])
def test_float16_runs_in_onnx_runtime(files, kernel):
    """A prompt, and tokens after it, for which there is a fused kernel."""
    path, report = files("llama", FLOAT16)
    decoder = OnnxDecoder(path, kernel=kernel)
    assert decoder.fused is (kernel == "auto" and compiler() is not None)
    ids = models.tokens(2, 12)
    with torch.no_grad():
        exact = copy.deepcopy(original("llama", FLOAT16)).double()(ids).logits
    pieces, _ = test_onnx_session.in_pieces(decoder, ids.numpy(), np.ones_like(ids), (5, *[1] * 7))
    for got in (decoder.logits(ids.numpy()), pieces):
        assert got.dtype == np.float32
        error = rounding_error(torch.from_numpy(got), exact)
        assert error <= ROUNDING_FACTOR * report.verification.rounding[0]
    assert decoder.cache_bytes_per_token == report.cache_bytes_after
    assert len(decoder.generate([[1, 2, 3], [4]], 5)[1]) == 5


def test_bfloat16_is_for_other_providers(files):
    path, _ = files("qwen3", BFLOAT16)
    with pytest.raises(UsageError, match="is bfloat16, for which ONNX Runtime's CPUExecutionProvider") as caught:
        OnnxDecoder(path)
    assert "--provider cuda" in caught.value.remedy


def test_a_static_float16_cache_is_written_in_place(tmp_path):
    result = mla_compile.compile(original("llama", FLOAT16), exact=True, cache="static")
    report = result.to_onnx(tmp_path / "static.onnx")
    decoder = OnnxDecoder(tmp_path / "static.onnx")
    cache = decoder.empty_cache(2, 64)
    assert decoder.static
    assert decoder.measured_bytes(cache) == 2 * 64 * report.cache_bytes_after
    growing = converted("llama", FLOAT16).module
    assert decoder.generate([[1, 2, 3]], 6) == generate(TorchDecoder(growing), [[1, 2, 3]], 6)


def test_a_growing_bfloat16_cache_needs_no_numpy_type():
    """A file that only keeps rows, which the CPU provider can run in bfloat16."""
    import onnxruntime

    row, kind = 4, onnx.TensorProto.BFLOAT16
    inputs = [
        onnx.helper.make_tensor_value_info("past_key_values.0.latent", kind, ["batch", "past", row]),
        onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["batch", "new", row]),
    ]
    outputs = [onnx.helper.make_tensor_value_info("present.0.latent", kind, ["batch", "total", row])]
    nodes = [
        onnx.helper.make_node("Cast", ["rows"], ["narrow"], to=kind),
        onnx.helper.make_node("Concat", ["past_key_values.0.latent", "narrow"], ["present.0.latent"], axis=1),
    ]
    graph = onnx.helper.make_graph(nodes, "rows", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    layer = CacheLayer.of(session.get_inputs()[0])
    cache = GrowingCache.empty([layer], 2, onnxruntime, "cpu")
    assert layer.row_bytes == 2 * row
    for tokens in (3, 1):
        binding = session.io_binding()
        binding.bind_cpu_input("rows", np.ones((2, tokens, row), np.float32))
        cache.bind(binding)
        session.run_with_iobinding(binding)
        cache = cache.after(binding.get_outputs())
    assert cache.nbytes == 2 * 4 * row * 2
    assert cache.values[0].shape() == [2, 4, row]


@pytest.mark.parametrize(("name", "dtype"), [("llama", FLOAT16), ("qwen3", BFLOAT16)])
def test_a_file_for_tensorrt_holds_the_type(tmp_path, name, dtype):
    """Compared with the module through a float32 copy; that TensorRT builds it was not tried."""
    from mla_compile.runtime.tensorrt.engine_builder import EngineSettings

    path = tmp_path / "model.onnx"
    report = converted(name, dtype).to_tensorrt(path, EngineSettings(room=64, prompt=16))
    assert report.verification.lowering_error < 1e-5
    graph = onnx.load(path).graph
    kind = onnx.TensorProto.FLOAT16 if dtype == FLOAT16 else onnx.TensorProto.BFLOAT16
    values = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert {t for n, t in values.items() if "latent" in n} == {kind}
    assert values["logits"] == onnx.TensorProto.FLOAT


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_trained_model_keeps_its_perplexity(dtype):
    """Nothing is left out, so that all there is to lose is rounded away."""
    folder, text = shared_model("stories260k"), shared_text("tinystories_valid_a.txt")
    documents = [text.read_text(encoding="utf-8")[:12_000]]
    settings = {"calibration": documents, "calibration_tokens": 2048, "gradients": False}
    result = mla_compile.compile(folder, exact=True, dtype=dtype, **settings)
    quality = result.report.quality
    assert quality.ratio == pytest.approx(1, abs=0.005)  # bfloat16 moved the losses of single tokens by 1e-2
    before, after = result.report.verification.rounding
    assert after <= 2 * before
