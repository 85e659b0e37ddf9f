"""Logits of a prompt's last tokens: the same numbers, computed for no other tokens."""

from __future__ import annotations

import models
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conversion import convert

from mla_compile.artifacts.fuse import write_fused
from mla_compile.errors import UsageError
from mla_compile.passes import lower_onnx
from mla_compile.passes.keep_logits import LOGITS_LENGTH, add_logits_to_keep
from mla_compile.passes.lower_onnx import CacheForm, lower_to_onnx
from mla_compile.passes.onnx_pieces import PiecewiseSession
from mla_compile.passes.recognise import recognise
from mla_compile.runtime import generate as generation
from mla_compile.runtime.cpu.library import compiler
from mla_compile.runtime.onnx_session import LOGITS_TO_KEEP, OnnxDecoder
from mla_compile.sources.capture import capture

# Products of one row and of many are added up in another order: 1e-6 was observed; float16 rounds by 1e-3.
SAME, SAME_FLOAT16 = 1e-5, 5e-3
LENGTH = 14


class Capped(models.NanoGPT):
    """Logits that are scaled and bounded, as those of Cohere and Gemma 2."""

    def forward(self, idx):
        return 30.0 * torch.tanh(0.7 * super().forward(idx) / 30.0)


class Gated(models.NanoGPT):
    """Every token scales its own logits: too long a way for what looks for the tail, though there is one."""

    def forward(self, idx):
        logits = super().forward(idx)
        return logits * (1 + logits[..., :1].sigmoid())


MODELS = {
    "capped": lambda: models.handwritten(Capped),
    "gated": lambda: models.handwritten(Gated),
    "float16": lambda: models.llama().half(),
}
FORMS = {
    "dynamic": ("llama-gqa", CacheForm()),
    "static": ("llama-gqa", CacheForm(static=True)),
    "int8": ("llama-gqa", CacheForm(static=True, quantised=True)),
    "halves": ("llama-gqa", CacheForm(halves=True)),
    "float16": ("float16", CacheForm()),
    "window": ("mistral-window", CacheForm()),
    "tied": ("smollm", CacheForm()),
    "capped": ("capped", CacheForm()),
}
"""A model, and how its file has its caches."""
EVERY = {**FORMS, "gated": ("gated", CacheForm())}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A form's file as it is, and as it was before there was the input."""
    written, converted = {}, {}

    def get(form):
        if form in written:
            return written[form]
        name, caches = EVERY[form]
        if name not in converted:
            module = (models.CONVERTIBLE | MODELS)[name]()
            program = capture(module, models.example(module))
            sites, dtype = recognise(program).sites, program.dtype
            converted[name] = convert(program, sites, dtype, exact=False, cache_ratio=0.5)
        model, folder = converted[name], tmp_path_factory.mktemp(form)
        settings = {"opset": 24, "inline": False, "metadata": {}, "caches": caches}
        lower_to_onnx(model.graph, model.rows, folder / "now.onnx", **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lower_onnx, "add_logits_to_keep", lambda _: False)
            lower_to_onnx(model.graph, model.rows, folder / "before.onnx", **settings)
        written[form] = folder / "now.onnx", folder / "before.onnx"
        return written[form]

    return get


def computed(decoder, monkeypatch):
    """How many tokens' logits every step of a decoder computes, from now on."""
    counts, session = [], decoder._session

    def run(binding):
        type(session).run_with_iobinding(session, binding)
        counts.append(binding.get_outputs()[0].shape()[1])

    monkeypatch.setattr(session, "run_with_iobinding", run)
    return counts


@pytest.mark.parametrize("keep", [-1, 1.0, None])
def test_a_number_of_logits_that_is_none_is_refused(files, keep):
    """The file and the array that it returns would both leave tokens out for a negative one."""
    ids = models.tokens(1, 4).numpy()
    for path in files("dynamic"):
        decoder = OnnxDecoder(path, threads=1)
        with pytest.raises(UsageError, match=f"logits_to_keep is {keep}"):
            decoder.step(ids, np.ones_like(ids), np.arange(4)[None], decoder.empty_cache(1, 4), keep)


@pytest.mark.parametrize("form", FORMS)
def test_kept_logits_are_those_of_all_tokens(files, form, monkeypatch):
    """Prompts of different lengths, padded on the left. Oracle: the file of before."""
    now, before = (OnnxDecoder(path, threads=1) for path in files(form))
    assert (now.prunes_logits, before.prunes_logits) == (True, False)
    ids = models.tokens(2, LENGTH).numpy()
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    counts = {decoder: computed(decoder, monkeypatch) for decoder in (now, before)}
    expected, _ = before.step(ids, mask, positions, before.empty_cache(2, LENGTH))
    bound = (SAME_FLOAT16 if form == "float16" else SAME) * np.abs(expected).max()
    for keep in (0, 1, 3, LENGTH, 99):
        for decoder in (now, before):
            got, _ = decoder.step(ids, mask, positions, decoder.empty_cache(2, LENGTH), keep)
            wanted = expected[:, -keep:]
            assert got.shape == wanted.shape
            assert np.abs(got - wanted).max() <= bound
    assert counts == {now: [14, 1, 3, 14, 14], before: [14] * 6}


@pytest.mark.parametrize("form", FORMS)
def test_generation_is_as_before(files, form, monkeypatch):
    now, before = (OnnxDecoder(path, threads=1) for path in files(form))
    counts = computed(now, monkeypatch)
    prompts = [[5, 9, 40, 7, 3], [8], [11, 12, 13]]
    assert now.generate(prompts, 6) == before.generate(prompts, 6)
    assert counts == [1] * 6


@pytest.mark.parametrize("form", FORMS)
def test_the_file_is_valid_and_its_input_has_a_default(files, form):
    path, _ = files(form)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    (keep,) = session.get_overridable_initializers()
    assert (keep.name, keep.type, keep.shape) == (LOGITS_TO_KEEP, "tensor(int64)", [])
    assert LOGITS_TO_KEEP not in {value.name for value in session.get_inputs()}
    (logits,) = (v for v in session.get_outputs() if v.name == "logits")
    assert logits.shape == ["batch_size", LOGITS_LENGTH, models.VOCABULARY]


def test_whoever_does_not_know_the_input_gets_all_logits(files):
    session = onnxruntime.InferenceSession(files("dynamic")[0])
    ids = models.tokens(2, LENGTH).numpy()
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.ones_like(ids).cumsum(1) - 1}
    caches = [value for value in session.get_inputs() if value.name not in given]
    given |= {value.name: np.zeros((2, 0, value.shape[2]), np.float32) for value in caches}
    every = session.run(["logits"], given)[0]
    last = session.run(["logits"], {**given, LOGITS_TO_KEEP: np.array(2)})[0]
    assert every.shape == (2, LENGTH, models.VOCABULARY)
    assert np.abs(last - every[:, -2:]).max() <= SAME * np.abs(every).max()


def test_a_large_vocabulary_needs_no_parts(files, monkeypatch):
    """The prompt's logits would be too many; its scores are not. A file of before runs in parts, to the same tokens."""
    monkeypatch.setattr(generation, "_LOGITS", 1)
    monkeypatch.setattr(generation, "_TOGETHER", 5)
    steps, step, found = [], OnnxDecoder.step, []
    monkeypatch.setattr(
        OnnxDecoder,
        "step",
        lambda self, ids, *others, **named: steps.append(ids.shape[1]) or step(self, ids, *others, **named),
    )
    for path, expected in zip(files("dynamic"), ([23, 1, 1], [5, 5, 5, 5, 3, 1, 1]), strict=True):
        steps.clear()
        found.append(OnnxDecoder(path, threads=1).generate([[*range(1, 24)], [5, 6]], 3))
        assert steps == expected
    assert found[0] == found[1]


def test_a_long_prompt_has_parts_that_scores_fit_into(files, monkeypatch):
    """Of two sequences of 23 tokens, 46 pairs each token: 8 tokens have 368."""
    monkeypatch.setattr(generation, "_LOGITS", 1)
    monkeypatch.setattr(generation, "_TOGETHER", 5)
    monkeypatch.setattr(generation, "_SCORES", 400)
    decoder = OnnxDecoder(files("dynamic")[0], threads=1)
    counts = computed(decoder, monkeypatch)
    whole = OnnxDecoder(files("dynamic")[1], threads=1)
    prompts = [[*range(1, 24)], [5, 6]]
    found = decoder.generate(prompts, 3)
    assert counts == [1] * 5
    monkeypatch.undo()
    assert found == whole.generate(prompts, 3)


def test_logits_that_are_not_made_token_by_token_for_certain_keep_their_file(files):
    now, before = files("gated")
    assert now.read_bytes() == before.read_bytes()
    prompts = [[5, 9, 40, 7, 3], [8]]
    found = [OnnxDecoder(path, threads=1) for path in (now, before)]
    assert not any(decoder.prunes_logits for decoder in found)
    assert found[0].generate(prompts, 6) == found[1].generate(prompts, 6)
    shape = onnx.load(now).graph.output[0].type.tensor_type.shape
    assert [d.dim_param for d in shape.dim[:2]] == ["batch_size", "sequence_length"]


def test_pieces_run_a_file_with_the_input(files):
    path, _ = files("dynamic")
    whole, pieces = OnnxDecoder(path, threads=1), OnnxDecoder(path, session=PiecewiseSession(path, piece_bytes=4000))
    ids = models.tokens(2, LENGTH).numpy()
    expected, got = whole.logits(ids), pieces.logits(ids)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= SAME * np.abs(expected).max()
    assert whole.generate([ids[0].tolist()], 4) == pieces.generate([ids[0].tolist()], 4)


@pytest.mark.skipif(not compiler(), reason="a C++ compiler")
def test_the_fused_kernel_leaves_the_input(files, tmp_path):
    path, before = files("dynamic")
    write_fused(path, tmp_path / "fused.onnx")
    decoder = OnnxDecoder(tmp_path / "fused.onnx", threads=1, kernel="fused")
    assert decoder.prunes_logits
    prompts = [[5, 9, 40, 7, 3], [8], [11, 12, 13]]
    assert decoder.generate(prompts, 6) == OnnxDecoder(before, threads=1).generate(prompts, 6)


HEAD = """
<ir_version: 10, opset_import: ["": 23]>
head (float[batch, tokens, 4] x, float[batch, 1, 6] given) => (float[batch, tokens, 6] logits%s)
<float[4, 6] weight = {%s}, float[1, 4, 6] weights = {%s}, float[6] shift = {1, 2, 3, 4, 5, 6},
 float[1, 1, 6] channels = {1, 2, 3, 4, 5, 6}, float[5, 6] places = {%s}, float[4] norm = {1, 2, 3, 4}, float two = {2}>
{ %s }
"""
"""What makes logits of hidden states ``x``."""


def head(body, outputs=""):
    numbers = [", ".join(map(str, range(count))) for count in (24, 24, 30)]
    proto = onnx.parser.parse_model(HEAD % (outputs, *numbers, body))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True))


@pytest.mark.parametrize(
    ("body", "nodes"),
    [
        ("logits = MatMul (x, weight)", 1),
        ("y = MatMul (x, weight) z = Add (shift, y) logits = Mul (z, channels)", 3),
        ("y = MatMul (x, weight) z = Div (y, two) c = Tanh (z) logits = Mul (c, two)", 4),
        ("w = Identity (weight) y = MatMul (x, w) logits = LogSoftmax <axis = 2> (y)", 2),
        ("n = RMSNormalization <axis = -1> (x, norm) logits = MatMul (n, weight)", 2),
        ("n = LayerNormalization (x, norm) logits = MatMul (n, weight)", 2),
        ("n = Relu (x) g = Sub (two, n) h = MatMul (g, weight) i = Softmax (h) logits = Identity (i)", 5),
        # From here on the way back ends early, behind the product or before it.
        ("n = RMSNormalization <axis = 1> (x, norm) logits = MatMul (n, weight)", 1),
        ("y = Relu (x) z = Mul (x, y) logits = MatMul (z, weight)", 1),
        ("y = MatMul (x, weight) logits = Add (y, given)", 0),
        ("y = MatMul (x, weight) logits = Softmax <axis = 1> (y)", 0),
        ("y = MatMul (x, weight) logits = Mul (y, y)", 0),
        ("y = MatMul (x, weights) logits = Identity (y)", 0),
        ("y = MatMul (x, weight) z = CumSum (y, one) logits = Identity (z)", 0),
    ],
)
def test_the_tail_is_what_acts_on_every_token_alone(body, nodes):
    """Oracle: how many nodes have the dimension of kept tokens, and the numbers of the same without the input."""
    body = f"one = Constant <value_int = 1> () {body}"
    model = head(body)
    assert add_logits_to_keep(model) is (nodes > 0)
    kept = [n for n in model.graph if n.op_type != "Slice" and LOGITS_LENGTH in map(str, n.outputs[0].shape or ())]
    assert len(kept) == nodes
    before = ir.to_proto(head(body)).SerializeToString()
    if not nodes:
        assert ir.to_proto(model).SerializeToString() == before
        return
    x = np.random.default_rng(0).normal(size=(2, 7, 4)).astype(np.float32)
    given = {"x": x, "given": np.zeros((2, 1, 6), np.float32)}
    whole = onnxruntime.InferenceSession(before).run(None, given)[0]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for keep in (0, 1, 3, 9):
        got = session.run(None, {**given, LOGITS_TO_KEEP: np.array(keep)})[0]
        np.testing.assert_allclose(got, whole[:, -keep:], rtol=1e-5)


def test_hidden_states_that_are_read_twice_are_cut_behind_the_other_reader():
    """What is returned besides is of all tokens."""
    model = head("n = Relu (x) h = Identity (n) logits = MatMul (h, weight) other = Neg (n)", ", float[b, t, 4] other")
    assert add_logits_to_keep(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    given = {"x": np.ones((2, 7, 4), np.float32), "given": np.zeros((2, 1, 6), np.float32)}
    logits, other = session.run(None, {**given, LOGITS_TO_KEEP: np.array(2)})
    assert (logits.shape, other.shape) == ((2, 2, 6), (2, 7, 4))
    model = head("n = Relu (x) logits = MatMul (n, weight) other = Neg (logits)", ", float[b, t, 6] other")
    assert not add_logits_to_keep(model)
