"""The rewritten graph computes what the original does, in one go and token by token, and leaves the original alone."""

from __future__ import annotations

import hashlib
import math
import operator

import models
import pytest
import torch
import zoo
from conversion import convert, difference, in_chunks
from torch import nn

from mla_compile.config import make_config
from mla_compile.errors import RefusedError
from mla_compile.passes.incremental import check_incremental
from mla_compile.passes.insert_latent import INPUT_NAMES, past_name
from mla_compile.passes.methods import METHODS
from mla_compile.passes.recognise import recognise
from mla_compile.passes.search import Divergence
from mla_compile.passes.task import Task
from mla_compile.runtime.module import LatentModel

# Both sides are float32 models of two layers with other orders of products: 1e-7 to 1e-6 was observed.
LOGITS = 1e-5
LENGTH = 20
SVDS = ("joint", "split")


class Conversions:
    """Converted pico models by name and settings, converted at first use."""

    def __init__(self, programs):
        self._programs, self._converted = programs, {}

    def __call__(self, name, **settings) -> LatentModel:
        key = (name, *sorted(settings.items()))
        if key not in self._converted:
            captured = self._programs[name]
            self._converted[key] = convert(captured.program, captured.sites, **settings)
        return self._converted[key]


@pytest.fixture(scope="module")
def converted(programs):
    return Conversions(programs)


def digest(state):
    """Names and bytes of all tensors."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(name.encode() + value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ---- the same numbers


@pytest.mark.parametrize("svd", SVDS)
@pytest.mark.parametrize("name", models.CONVERTIBLE)
def test_exact_plan_keeps_the_logits(programs, converted, name, svd):
    ids = models.tokens(3, LENGTH)
    with torch.no_grad():
        got = converted(name, svd=svd)(ids).logits
    assert difference(got, models.logits(programs[name].module, ids)) <= LOGITS


@pytest.mark.parametrize("sizes", [(LENGTH - 5, 4, 1), (1,) * LENGTH], ids=["chunks", "tokens"])
@pytest.mark.parametrize("name", models.CONVERTIBLE)
def test_decoding_is_the_whole_sequence(programs, converted, name, sizes):
    ids = models.tokens(2, LENGTH)
    with torch.no_grad():
        got = in_chunks(converted(name, svd="joint"), ids, sizes)
    assert difference(got, models.logits(programs[name].module, ids)) <= LOGITS


@pytest.mark.parametrize("svd", SVDS)
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "nanogpt", "complex-llama"])
def test_lossy_model_decodes_to_what_it_prints_at_once(converted, name, svd):
    model, ids = converted(name, svd=svd, exact=False, cache_ratio=0.5), models.tokens(2, LENGTH)
    with torch.no_grad():
        assert difference(in_chunks(model, ids, (7, 12, 1)), model(ids).logits) <= LOGITS


def padded(prompts, side):
    """Prompts of any lengths as one batch, and its mask; padding is a token like any other."""
    longest = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), 3), torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", models.CONVERTIBLE)
def test_padded_prompts_and_their_next_token_are_those_of_each_alone(programs, converted, name, side):
    prompts = [models.tokens(1, n, seed=n)[0] for n in (5, 12, 9)]
    following = models.tokens(len(prompts), 1, seed=99)
    model, original = converted(name, svd="joint"), programs[name].module
    ids, mask = padded(prompts, side)
    longer = torch.cat([mask, torch.ones_like(following)], 1)
    with torch.no_grad():
        first = model(ids, mask)
        if side == "right" and any(model.windows):  # padding would take up room in the window's cache
            with pytest.raises(ValueError, match="stands behind real ones, and layers have windows"):
                model(following, longer, past=first.cache)
            return
        second = model(following, longer, past=first.cache)
    for row, prompt in enumerate(prompts):
        expected = models.logits(original, torch.cat([prompt, following[row]])[None])[0]
        got = torch.cat([first.logits[row, mask[row] != 0], second.logits[row]])
        assert difference(got, expected) <= LOGITS


@pytest.mark.parametrize("kind", zoo.ACCEPTED.values(), ids=zoo.ACCEPTED)
def test_every_accepted_spelling_converts_and_decodes(zoo_programs, kind):
    program, original = zoo_programs[kind], zoo.model(kind)
    model = convert(program, recognise(program).sites)
    ids = torch.randint(0, zoo.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert difference(in_chunks(model, ids, (LENGTH - 3, 2, 1)), original(ids)) <= LOGITS


def test_queries_scaled_far_beyond_any_probe_are_scaled_there():
    """From position 20000 on the original multiplies queries by 1 + log 2; attention itself sees distances only."""

    class Scaled(zoo.HalfRope):
        def queries(self, q):
            return super().queries(q) * (1 + math.log(2))

    program = zoo.program_of(zoo.model(zoo.FarScale))
    model = convert(program, recognise(program).sites)
    far, ids = 20_000, torch.randint(0, zoo.VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(1))
    past = tuple(torch.zeros(1, far, row) for row in model.rows)
    mask = torch.cat([torch.zeros(1, far, dtype=torch.long), torch.ones_like(ids)], 1)
    places = torch.arange(far, far + 6)[None]
    with torch.no_grad():
        got = model(ids, mask, places, past).logits
        scaled, unscaled = (zoo.model(kind)(ids) for kind in (Scaled, zoo.HalfRope))
    # Angles of 20000 radians are off by 1e-3 in float32.
    assert difference(got, scaled) < 1e-3
    assert difference(got, unscaled) > 5e-3


# ---- the same model


@pytest.mark.parametrize("name", ["llama-attention-bias", "nanogpt", "complex-llama"])
def test_original_is_untouched_and_unchanged_weights_are_shared(programs, name):
    captured = programs[name]
    states = captured.module.state_dict(), captured.program.exported.state_dict
    before, text = [digest(s) for s in states], str(captured.program.exported)
    model = convert(captured.program, captured.sites)
    assert [digest(s) for s in states] == before
    assert str(captured.program.exported) == text
    original = {p.data_ptr() for p in captured.module.parameters()}
    for parameter_name, parameter in model.named_parameters():
        assert (".latent_" in parameter_name) is not (parameter.data_ptr() in original)


@pytest.mark.parametrize("name", ["llama-gqa", "nanogpt", "complex-llama"])
def test_replaced_projections_are_gone(programs, converted, name):
    replaced = {p.weight for s in programs[name].sites for p in (s.query, s.key, s.value)}
    kept = {n.removeprefix("graph.") for n in converted(name, svd="joint").state_dict()}
    assert not replaced & kept
    assert {n for n in kept if ".latent_" not in n} < programs[name].module.state_dict().keys()


@pytest.mark.parametrize("name", ["llama-gqa", "llama-attention-bias", "nanogpt", "mistral-window"])
def test_latent_weights_are_trainable(programs, name):
    captured, ids = programs[name], models.tokens(2, LENGTH)
    model = convert(captured.program, captured.sites, exact=False, cache_ratio=0.5)
    logits = model(ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    latent = {n: p for n, p in model.named_parameters() if ".latent_" in n}
    expected = {"query", "row", "key_up", "value_up"}
    if "bias" in name or name == "nanogpt":
        expected |= {"query_bias", "output_bias"}
    assert expected <= {n.rpartition(".")[2] for n in latent}
    for parameter in latent.values():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()
    for parameter in captured.module.parameters():  # shared weights must not carry gradients to other tests
        parameter.grad = None


def test_weights_are_stored_in_the_wanted_type():
    """A model in half precision stays one: products of its activations with the latent weights need one type."""
    original = zoo.model(zoo.Attention).to(torch.bfloat16)
    program = zoo.program_of(original)
    model = convert(program, recognise(program).sites, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = torch.randint(0, zoo.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result = model(ids)
        assert {c.dtype for c in result.cache} == {torch.bfloat16}
        # bfloat16 keeps 8 bits, 4e-3 per rounding, and some ten roundings follow each other.
        assert difference(result.logits, original(ids)) <= 5e-2


# ---- the graph


def text_of(graph):
    """A graph as one numbered line per node: what it is, and what it reads. The exporter's own names change often."""
    number, lines = {}, []
    for node in graph.nodes:
        number[node] = f"%{len(number)}"
        target = "getitem" if node.target is operator.getitem else str(node.target)
        reads = ", ".join(number[i] for i in node.all_input_nodes)
        lines.append(f"{number[node]} = {node.op} {target}({reads})")
    return "\n".join(lines) + "\n"


def test_rewritten_llama_is_the_known_graph(converted, golden):
    golden("llama_rewritten.txt", text_of(converted("llama-gqa", svd="joint").graph.graph))


@pytest.mark.parametrize("name", models.CONVERTIBLE)
def test_nothing_of_the_old_attention_is_alive(programs, converted, name):
    graph = converted(name, svd="joint").graph.graph
    targets = [str(n.target) for n in graph.nodes]
    assert not [t for t in targets if "arange" in t], "something still counts from zero"
    assert not [t for t in targets if "softmax" in t or "scaled_dot_product" in t]
    assert targets.count("mla.latent_attention.default") == models.LAYERS
    placeholders = [n.name for n in graph.nodes if n.op == "placeholder"]
    assert placeholders == [*INPUT_NAMES, *(past_name(i) for i in range(models.LAYERS))]
    inserted = [
        n.meta["mla_compile"]["site"] for n in graph.nodes if n.target is torch.ops.mla.latent_attention.default
    ]
    assert inserted == [s.path for s in programs[name].sites]


# ---- positions and other leftovers


class Positioned(zoo.TinyLM):
    """Has a table of positions; what it does with it is the question."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.table = nn.Parameter(torch.randn(130, zoo.WIDTH))
        self.steps = nn.Parameter(torch.randn(zoo.WIDTH))

    def place(self, length):
        return torch.arange(length)


class ByIndex(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + nn.functional.embedding(self.place(ids.shape[1]), self.table)


class ByIndexOfOneRow(ByIndex):
    def place(self, length):
        return torch.arange(length).unsqueeze(0)


class ByIndexOfAllRows(Positioned):
    def embed(self, ids):
        place = torch.arange(ids.shape[1]).unsqueeze(0).expand_as(ids)
        return self.tokens(ids) + nn.functional.embedding(place, self.table)


class ByShiftedIndex(ByIndex):
    def place(self, length):
        return torch.arange(2, length + 2)


class ByCount(Positioned):
    def embed(self, ids):
        place = torch.ones_like(ids).cumsum(1) + 1
        return self.tokens(ids) + nn.functional.embedding(place, self.table)


class BySlice(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + self.table[: ids.shape[1]]


class BySliceOfOneRow(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + self.table[None, : ids.shape[1]]


class ByNarrow(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + self.table.narrow(0, 0, ids.shape[1])


class ByIndexThenRow(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + nn.functional.embedding(torch.arange(ids.shape[1]), self.table)[None]


class BySliceThenRow(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + self.table[: ids.shape[1]].unsqueeze(0)


class ByShiftedSlice(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + self.table[2 : ids.shape[1] + 2]


class ByTransposedSlice(Positioned):
    def embed(self, ids):
        return (self.tokens(ids).mT + self.table.T[:, : ids.shape[1]]).mT


class BySelection(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + self.table.index_select(0, torch.arange(ids.shape[1]))


class ByClampedIndex(ByIndex):
    def place(self, length):
        return torch.arange(length).clamp(max=LENGTH)


class ByRepeatingIndex(ByIndex):
    def place(self, length):
        return torch.arange(length) % LENGTH


class ByIndexFromTheEnd(ByIndex):
    def place(self, length):
        return torch.arange(length).flip(0)


class BySine(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + (torch.arange(ids.shape[1])[:, None] * self.steps).sin()


class BySineOfFloats(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + (torch.arange(ids.shape[1], dtype=torch.float32)[:, None] * self.steps).sin()


class ByFirst(Positioned):
    def embed(self, ids):
        return self.tokens(ids) + (torch.arange(ids.shape[1]) == 0)[:, None]


class ByLength(Positioned):
    def embed(self, ids):
        return self.tokens(ids) * torch.ones(ids.shape[1]).sum().sqrt()


class ByConvolution(Positioned):
    def embed(self, ids):
        x = nn.functional.pad(self.tokens(ids).mT, (2, 0))
        return nn.functional.conv1d(x, self.table[: zoo.WIDTH, None, :3], groups=zoo.WIDTH).mT


class ByRunningSum(Positioned):
    def embed(self, ids):
        return self.tokens(ids).cumsum(1)


class ByPrevious(Positioned):
    def embed(self, ids):
        x = self.tokens(ids)
        return x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


UNDERSTOOD = [
    ByIndex,
    ByIndexOfOneRow,
    ByIndexOfAllRows,
    ByShiftedIndex,
    ByCount,
    BySlice,
    BySliceOfOneRow,
    ByNarrow,
    ByIndexThenRow,
    BySliceThenRow,
    ByShiftedSlice,
    ByTransposedSlice,
    BySelection,
    BySine,
    BySineOfFloats,
    ByClampedIndex,
    ByRepeatingIndex,
    ByFirst,
]
REFUSED = {
    ByIndexFromTheEnd: "Positions are counted at .* and used at .* in a way that is not understood",
    ByLength: "depends on the length or on other tokens",
    ByConvolution: "depends on the length or on other tokens",
    ByRunningSum: "depends on the length or on other tokens",
    ByPrevious: "depends on the length or on other tokens",
}
assert {*UNDERSTOOD, *REFUSED} == {c for k in (Positioned, ByIndex) for c in k.__subclasses__()}


def check_positions(kind):
    """Convert, and feed a sequence in parts: every part but the first starts elsewhere than at zero."""
    original = zoo.model(zoo.Attention, kind=kind)
    program = zoo.program_of(original)
    model = convert(program, recognise(program).sites)
    ids = torch.randint(0, zoo.VOCABULARY, (3, 2 * LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = difference(in_chunks(model, ids, (LENGTH + 4, LENGTH - 6, 1, 1)), original(ids))
    assert error <= LOGITS


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_positions_are_taken_from_the_input(kind):
    check_positions(kind)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_knows_the_length_or_another_position_is_refused(kind):
    with pytest.raises(RefusedError, match=REFUSED[kind]):
        check_positions(kind)


class ByFarPrevious(zoo.TinyLM):
    def embed(self, ids):
        x = self.tokens(ids)
        return x + nn.functional.pad(x, (0, 0, 24, 0))[:, :-24]


class ByFarConvolution(zoo.TinyLM):
    """Looks further back than random tokens to verify on are long."""

    def embed(self, ids):
        x = nn.functional.pad(self.tokens(ids).mT, (64, 0))
        return nn.functional.conv1d(x, torch.ones(zoo.WIDTH, 1, 2), dilation=64, groups=zoo.WIDTH).mT


class ByLateLength(zoo.TinyLM):
    def embed(self, ids):
        return self.tokens(ids) / (torch.ones(ids.shape[1]).sum() / 600).clamp(min=1)


@pytest.mark.parametrize("kind", [ByFarPrevious, ByFarConvolution, ByLateLength])
def test_what_looks_far_back_or_at_a_late_length_is_refused(kind):
    program = zoo.program_of(zoo.model(zoo.Attention, kind=kind))
    with pytest.raises(RefusedError, match=r"depends on the length or on tokens far back: .* differs by"):
        convert(program, recognise(program).sites)


@pytest.mark.parametrize("method", ["fisher", "transmla"])
def test_a_search_runs_the_graph_in_pieces_once_and_the_result_again(programs, method, monkeypatch):
    """Before anything is tried, so that what cannot be converted is refused at once."""
    checked, tried, measure = [], [], Divergence.__call__
    monkeypatch.setattr(Divergence, "__call__", lambda self, model: tried.append(model) or measure(self, model))
    monkeypatch.setattr(
        "mla_compile.passes.insert_latent.check_incremental",
        lambda *arguments: checked.append(len(tried)) or check_incremental(*arguments),
    )
    captured, config = programs["llama-gqa"], make_config(method=method, cache_ratio=0.5, gradients=False)
    task = Task(captured.program, captured.sites, (), config, models.tokens(4, 16))
    weights = METHODS[method](task).weights
    assert len(tried) > 1
    assert checked == [0]
    task.result(weights)
    assert checked == [0, len(tried)]


class ProbabilitiesUsedTwice(zoo.SpelledOut):
    def attend(self, q, k, v, x, ids):
        p = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids)).softmax(-1)
        return p @ v + p.amax(-1, keepdim=True)


class ValuesTwice(zoo.SpelledOut):
    def attend(self, q, k, v, x, ids):
        p = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids)).softmax(-1)
        return p @ v + p @ (2 * v)


@pytest.mark.parametrize("kind", [ProbabilitiesUsedTwice, ValuesTwice])
def test_scores_that_something_else_reads_are_refused(kind):
    program = zoo.program_of(zoo.model(kind))
    with pytest.raises(RefusedError, match=r"scores of layers\.0 are used besides"):
        convert(program, recognise(program).sites)


def test_padding_mask_that_something_else_reads_is_that_of_the_new_tokens():
    class MaskedLM(zoo.TinyLM):
        def forward(self, ids, attention_mask):
            return super().forward(ids) * attention_mask[..., None]

    from mla_compile.sources.capture import capture

    ids = torch.zeros(2, 5, dtype=torch.long)
    program = capture(zoo.model(zoo.Attention, kind=MaskedLM), (ids, torch.ones_like(ids)))
    model = convert(program, recognise(program).sites)
    ids = torch.randint(0, zoo.VOCABULARY, (2, 2 * LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, mask, positions)
        first = model(ids[:, :LENGTH], mask[:, :LENGTH], positions[:, :LENGTH])
        second = model(ids[:, LENGTH:], mask, positions[:, LENGTH:], past=first.cache)
    assert not whole.logits[0, :3].any()
    assert whole.logits[0, 3:].any()
    assert difference(torch.cat([first.logits, second.logits], 1), whole.logits) <= LOGITS
