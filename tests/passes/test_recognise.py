"""Every attention layer is described as it is, or refused with its reason; never described as something else."""

from __future__ import annotations

import math

import models
import pytest
import torch
import zoo
from torch import Tensor, nn

from mla_compile.passes.recognise import VERIFY_TOLERANCE, recognise
from mla_compile.program import Program
from mla_compile.site import AttentionSite, Mask, RejectCode

# The models hold frequencies, or sines and cosines, in float32, which rounds by 6e-8.
FREQUENCY = {"rtol": 1e-6, "atol": 1e-8}
HEADS, DIM = models.HEADS, models.WIDTH // models.HEADS
LLAMA = {
    "heads": HEADS,
    "kv_heads": 2,
    "qk_dim": DIM,
    "layout": "half",
    "window": None,
    "weights": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "biased": False,
    "path": "model.layers.{}.self_attn",
}
NANO = {
    "heads": HEADS,
    "kv_heads": HEADS,
    "qk_dim": DIM,
    "layout": "none",
    "window": None,
    "weights": ("attentions.{}.qkv",) * 3,
    "biased": True,
    "path": "attentions.{}",
}
EXPECTED = {
    "llama-gqa": LLAMA,
    "llama-mha": LLAMA | {"kv_heads": HEADS},
    "llama-mqa": LLAMA | {"kv_heads": 1},
    "llama-attention-bias": LLAMA | {"biased": True},
    "llama-llama3-rope": LLAMA,
    "llama-yarn": LLAMA,
    "smollm": LLAMA | {"heads": 3, "kv_heads": 1},
    "mistral-window": LLAMA | {"window": 6},
    "mistral-full": LLAMA,
    "qwen2": LLAMA | {"biased": True},
    "nanogpt": NANO,
    "nanogpt-spelled-out": NANO,
    "nanogpt-table": NANO,
    "complex-llama": LLAMA
    | {
        "layout": "interleaved",
        "weights": ("attentions.{}.wq", "attentions.{}.wk", "attentions.{}.wv"),
        "path": "attentions.{}",
    },
}


def only(program: Program) -> AttentionSite:
    """The one site of a program with one attention layer."""
    (site,) = zoo.sites_of(program)
    return site


def frequencies(name: str, module: nn.Module) -> Tensor:
    """Radians per position from the highest: ``theta ** (-2 l / d)`` (Su 2021), or what scaled rope modules hold."""
    if name in ("llama-llama3-rope", "llama-yarn"):
        return module.model.rotary_emb.inv_freq.double()
    return 10000.0 ** (-2 * torch.arange(DIM // 2).double() / DIM)


def test_every_convertible_model_has_an_expectation():
    assert EXPECTED.keys() == models.CONVERTIBLE.keys()


@pytest.mark.parametrize("name", models.CONVERTIBLE)
def test_description_of_a_whole_model(programs, name):
    captured, expected = programs[name], EXPECTED[name]
    assert len(captured.sites) == models.LAYERS
    for layer, site in enumerate(captured.sites):
        assert (site.index, site.path) == (layer, expected["path"].format(layer))
        assert (site.heads, site.kv_heads) == (expected["heads"], expected["kv_heads"])
        assert (site.qk_dim, site.v_dim) == (expected["qk_dim"], expected["qk_dim"])
        assert site.mask == Mask(expected["window"])
        for projection, weight in zip((site.query, site.key, site.value), expected["weights"], strict=True):
            module = weight.format(layer)
            assert projection.weight == f"{module}.weight"
            assert projection.bias == (f"{module}.bias" if expected["biased"] else None)
            assert projection.offset is None
        # Both sides of the comparison are float64; only float32 rotation tables inside a model are rounded.
        assert site.error < VERIFY_TOLERANCE


@pytest.mark.parametrize("name", models.CONVERTIBLE)
def test_rotation_of_a_whole_model(programs, name):
    captured, layout = programs[name], EXPECTED[name]["layout"]
    half = DIM // 2
    pairs = {
        "none": (),
        "half": tuple((i, i + half) for i in range(half)),
        "interleaved": tuple((2 * i, 2 * i + 1) for i in range(half)),
    }[layout]
    for site in captured.sites:
        assert site.rope.pairs == pairs
        assert site.rope.layout == layout
        assert site.rope.rotary_dim == 2 * len(pairs)
        if pairs:
            found = torch.tensor(site.rope.inv_freq, dtype=torch.float64)
            torch.testing.assert_close(found, frequencies(name, captured.module), **FREQUENCY)


@pytest.mark.parametrize("name", models.CONVERTIBLE)
def test_scale_and_gains_of_a_whole_model(programs, name):
    """YaRN multiplies queries and keys by ``0.1 ln(factor) + 1`` (Peng 2023, eq. 22); all else is ``1 / sqrt(d)``."""
    gain = 0.1 * math.log(4.0) + 1 if name == "llama-yarn" else 1.0
    for site in programs[name].sites:
        # The factor is a Python number or a float32 constant.
        assert site.scale == pytest.approx(DIM**-0.5, rel=1e-6)
        for projection, expected in ((site.query, gain), (site.key, gain), (site.value, 1.0)):
            gains = torch.tensor(projection.gain, dtype=torch.float64)
            torch.testing.assert_close(gains, torch.full_like(gains, expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["nanogpt", "nanogpt-spelled-out"])
def test_rows_of_a_fused_projection(programs, name):
    for site in programs[name].sites:
        rows = torch.tensor([site.query.rows, site.key.rows, site.value.rows])
        assert torch.equal(rows, torch.arange(3 * models.WIDTH).view(3, HEADS, DIM))


def test_rows_of_grouped_keys(programs):
    site = programs["llama-gqa"].sites[0]
    assert torch.equal(torch.tensor(site.key.rows), torch.arange(2 * DIM).view(2, DIM))


@pytest.mark.parametrize(
    ("name", "code"),
    [("bidirectional", RejectCode.MASK)],
)
def test_refusal_of_a_whole_model(programs, name, code):
    found = programs[name].recognition
    assert not found.sites
    assert [r.index for r in found.rejections] == list(range(models.LAYERS))
    assert {r.code for r in found.rejections} == {code}


@pytest.mark.parametrize("name", zoo.ACCEPTED)
def test_spelling_does_not_matter(zoo_programs, name):
    kind = zoo.ACCEPTED[name]
    site = only(zoo_programs[kind])
    layout = {
        "interleaved rope": "interleaved",
        "interleaved keys behind": "interleaved",
        "backward rope": "custom",
        "positions from one": "half",
    }.get(name, "half" if issubclass(kind, zoo.HalfRope | zoo.PartialRope) else "none")
    assert (site.heads, site.kv_heads, site.qk_dim) == (zoo.HEADS, kind.kv_heads, zoo.DIM)
    assert site.rope.layout == layout
    assert site.mask == Mask(5 if name.endswith(("window", "chunks")) else None, chunked=name.endswith("chunks"))
    assert site.error < VERIFY_TOLERANCE


def test_partial_and_backward_rotations(zoo_programs):
    partial = only(zoo_programs[zoo.PartialRope]).rope
    assert partial.pairs == ((2, 4), (3, 5))
    assert partial.inv_freq == pytest.approx([1.0, 50.0**-0.5], rel=FREQUENCY["rtol"])
    backward = only(zoo_programs[zoo.BackwardRope]).rope
    speeds = dict(zip(backward.pairs, backward.inv_freq, strict=True))
    expected = {(5 - i, 2 - i): 50.0 ** (-i / 3) for i in range(3)}
    assert speeds == pytest.approx(expected, rel=FREQUENCY["rtol"])


def test_factors_on_queries_and_values_are_gains():
    module = zoo.model(zoo.ScaledQueries)
    site, gain = only(zoo.program_of(module)), module.layers[0].gain.detach().double()
    assert site.scale == pytest.approx(1.0)
    for projection, factor in ((site.query, 0.25), (site.key, None), (site.value, 1.0)):
        expected = torch.ones(zoo.DIM).double() if factor is None else factor * gain
        found = torch.tensor(projection.gain, dtype=torch.float64)
        torch.testing.assert_close(found, expected.expand(zoo.HEADS, -1), rtol=1e-6, atol=0)


def test_what_is_added_after_a_projection_is_an_offset():
    module = zoo.model(zoo.ParameterProduct)
    site, bias = only(zoo.program_of(module)), module.layers[0].bias.detach().double().view(zoo.HEADS, zoo.DIM)
    assert (site.query.weight, site.value.weight) == ("layers.0.w.0", "layers.0.w.2")
    assert site.key.offset is None
    for projection, sign in ((site.query, 1), (site.value, -1)):
        assert projection.bias is None
        torch.testing.assert_close(torch.tensor(projection.offset, dtype=torch.float64), sign * bias)


@pytest.mark.parametrize("window", [1, 2, 12, 13, 14, 64, 600, 4096])
@pytest.mark.parametrize("base", [zoo.Masked, zoo.SpelledOut], ids=["fused", "spelled out"])
def test_window_of_any_size_is_seen(window, base):
    """Also those longer than the probes, of which only a number in the graph tells."""
    assert only(zoo.program_of(zoo.model(zoo.windowed(window, base)))).mask == Mask(window)


@pytest.mark.parametrize("size", [2, 12, 13, 14, 64, 600, 4096])
@pytest.mark.parametrize("base", [zoo.Masked, zoo.SpelledOut], ids=["fused", "spelled out"])
def test_chunks_of_any_size_are_seen(size, base):
    assert only(zoo.program_of(zoo.model(zoo.chunked(size, base)))).mask == Mask(size, chunked=True)


@pytest.mark.parametrize("kind", [zoo.FarBand, zoo.FarBandByTensor])
def test_window_that_is_no_number_in_the_graph_is_not_overlooked(kind):
    assert only(zoo.program_of(zoo.model(kind))).mask == Mask(64)


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_another_mechanism_is_refused_with_its_reason(zoo_programs, name):
    kind, codes = zoo.REFUSED[name]
    found = recognise(zoo_programs[kind])
    assert not found.sites
    (rejection,) = found.rejections
    assert rejection.code in codes
    assert rejection.path == "layers.0"


def test_every_reachable_code_is_shown():
    """VERIFY is the net under the others, and nobody asks for a layer as it is here."""
    shown = {next(iter(codes)) for _, codes in zoo.REFUSED.values() if len(codes) == 1}
    assert shown == {*RejectCode} - {RejectCode.VERIFY, RejectCode.AS_ASKED}


@pytest.mark.parametrize("other", [zoo.SquaredBias, zoo.MixedScores], ids=["squared bias", "talking heads"])
def test_layers_are_counted_and_named_in_order(other):
    found = recognise(zoo.program_of(zoo.model(zoo.Attention, other, zoo.HalfRope)))
    assert [(s.index, s.path) for s in found.sites] == [(0, "layers.0"), (2, "layers.2")]
    assert [(r.index, r.path) for r in found.rejections] == [(1, "layers.1")]


class Router(zoo.Attention):
    """Mixture-of-experts weights: a softmax that is not attention."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(zoo.WIDTH, 3)

    def forward(self, x, ids):
        return super().forward(x, ids) * self.gate(x).softmax(-1)[..., :1]


def test_softmax_over_a_projection_is_not_attention():
    found = recognise(zoo.program_of(zoo.model(Router)))
    assert len(found.sites) == 1
    assert not found.rejections


@pytest.mark.parametrize("longest", [8, 13, 32, 40])
def test_models_shorter_than_the_probes(longest):
    """A table of the mask ends after few tokens: describe the layer with what there is, or refuse it."""

    class Short(zoo.Masked):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(longest, longest, dtype=torch.bool).tril())

        def seen(self, length, ids):
            return self.table[:length, :length]

    found = recognise(zoo.program_of(zoo.model(Short)))
    assert len(found.sites) + len(found.rejections) == 1


class FixedTable(zoo.TinyLM):
    """The table of tokens is a buffer."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("table", self.tokens.weight.detach().clone())

    def embed(self, ids):
        return nn.functional.embedding(ids, self.table)


def test_tokens_of_a_table_that_is_no_parameter_are_activations():
    assert only(zoo.program_of(zoo.model(zoo.HalfRope, kind=FixedTable))).rope.layout == "half"


class TablesOfAngles(zoo.Attention):
    def __init__(self):
        super().__init__()
        angles = torch.arange(512)[:, None] * 50.0 ** (-torch.arange(zoo.DIM // 2) / (zoo.DIM // 2))
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1))

    def queries(self, q):
        a, b = q.chunk(2, -1)
        return q * self.cos[: q.shape[2]] + torch.cat([-b, a], -1) * self.sin[: q.shape[2]]

    keys = queries


def test_a_rotation_table_that_is_rounded_is_named():
    (rejection,) = recognise(zoo.program_of(zoo.model(TablesOfAngles).bfloat16())).rejections
    assert rejection.code == RejectCode.ROPE
    assert "rotates by the table 'b_layers_0_" in rejection.reason
    assert rejection.reason.endswith("which is rounded to bfloat16")


def hidden(layer, q, k, v, seen, mask):
    return zoo.SpelledOut.hide(layer, zoo.SpelledOut.scores(layer, q, k, None), seen & mask), v


def hidden_and_zeroed(layer, q, k, v, seen, mask):
    return hidden(layer, q, k, v * mask.transpose(-1, -2), seen, mask)


def discounted(layer, q, k, v, seen, mask):
    return zoo.SpelledOut.hide(layer, zoo.SpelledOut.scores(layer, q, k, None), seen) - (~mask).float(), v


def zeroed(layer, q, k, v, seen, mask):
    return zoo.SpelledOut.hide(layer, zoo.SpelledOut.scores(layer, q, k, None), seen), v * mask.transpose(-1, -2)


@pytest.mark.parametrize("use", [hidden, hidden_and_zeroed, discounted, zeroed])
def test_a_mask_input_that_does_anything_else_than_hide_keys_is_refused(use):
    """The compiler puts its own padding mask in the place of a causal layer's."""
    from mla_compile.sources.capture import capture

    class MaskedLM(zoo.TinyLM):
        def forward(self, ids, attention_mask):
            x, layer = self.embed(ids), self.layers[0]
            q, k, v = map(layer.split, layer.project(x), (zoo.HEADS,) * 3)
            scores, v = use(layer, q, k, v, layer.seen(ids.shape[1], ids), attention_mask[:, None, None] > 0)
            return self.head(layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))

    inputs = {"ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    found = recognise(capture(zoo.model(zoo.SpelledOut, kind=MaskedLM), inputs))
    if use in (hidden, hidden_and_zeroed):
        assert [s.mask for s in found.sites] == [Mask()]
    else:
        (rejection,) = found.rejections
        assert rejection.plain is None
        assert "'attention_mask' does more than hide the keys" in rejection.reason


def slower_beyond(length):
    """Frequencies of sequences longer than 16384 tokens."""
    return 50.0 * (length / 16_384).clamp(min=1)[None]


class SlowerBeyond(zoo.Attention):
    def queries(self, q):
        return zoo.rotate(q, slower_beyond(torch.ones(q.shape[2]).sum()))

    keys = queries


class SlowerByBranch(zoo.Attention):
    def queries(self, q):
        length = torch.ones(q.shape[2]).sum()
        theta = torch.cond(length > 16_384, slower_beyond, lambda n: torch.full((1,), 50.0), (length,))
        return zoo.rotate(q, theta)

    keys = queries


class QueriesByLength(zoo.NormBehindRotation):
    def queries(self, q):
        return super().queries(q) * (torch.ones(q.shape[2]).sum().log() / math.log(16_384)).clamp(min=1)


def far(x):
    return x * (1 + torch.floor(torch.arange(x.shape[2], dtype=torch.float32) / 10_000))[:, None]


class FarKeys(zoo.HalfRope):
    def keys(self, k):
        return far(super().keys(k))


class FarValues(zoo.HalfRope):
    def values(self, v):
        return far(v)


@pytest.mark.parametrize("kind", [SlowerBeyond, SlowerByBranch, QueriesByLength, FarKeys, FarValues])
def test_what_changes_beyond_every_probe_is_refused(kind):
    found = recognise(zoo.program_of(zoo.model(kind, zoo.FarScale)))
    assert [s.path for s in found.sites] == ["layers.1"]  # whose queries are made anew with their position
    (rejection,) = found.rejections
    by_position = kind in (FarKeys, FarValues)
    assert rejection.code == (RejectCode.ROPE if by_position else RejectCode.POSITION_MIXING)
    assert "between 8192 and" in rejection.reason
    assert (rejection.plain is None) != by_position  # which an ordinary cache holds as it was


def test_program_is_only_read(programs):
    program = programs["llama-gqa"].program
    before = str(program.exported)
    recognise(program)
    assert str(program.exported) == before
