"""Value up-projections by least squares, against a solver of its own and the errors they are to make small."""

from __future__ import annotations

import models
import pytest
import torch
import zoo
from conversion import difference, latent_weights
from observed import observe_outputs

from mla_compile.passes import refit
from mla_compile.passes.insert_latent import insert_latent
from mla_compile.passes.refit import _RIDGE, refit_values
from mla_compile.runtime.module import LatentModel, positions_from_mask

LENGTH = 12
IDS = torch.randint(0, zoo.VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(3))


def model_of(program, sites, weights):
    graph = insert_latent(program, sites, weights, torch.float32)
    return LatentModel(graph.module, graph.rows)


class Latents(torch.fx.Interpreter):
    """What every latent attention of a rewritten graph averages ``[B, S, H, r]``, and its outputs, in float64."""

    def __init__(self, model, ids):
        super().__init__(model.graph)
        self.averaged, self.outputs = [], []
        mask = torch.ones_like(ids)
        with torch.no_grad():
            self.run(ids, mask, positions_from_mask(mask, ids.shape[1]), *model.empty_cache(len(ids)))

    def run_node(self, n):
        value = super().run_node(n)
        if n.target is torch.ops.mla.latent_attention.default:
            arguments = list(self.fetch_args_kwargs_from_env(n)[0])
            rank = arguments[7].shape[1]
            columns = []
            for entry in range(rank):  # a value of one channel, which is one entry of the latent
                arguments[7] = torch.zeros(1, rank, 1)
                arguments[7][0, entry] = 1.0
                columns.append(n.target(*arguments)[0])
            self.averaged.append(torch.cat(columns, -1).double())
            self.outputs.append(value[0].double())
        return value


def targets(program, sites, weights, ids):
    """What the averaged latents are to become: the original's attention outputs without their bias, in float64."""
    with torch.no_grad():
        outputs = observe_outputs(program, sites)(ids)
    biases = [0.0 if w.output_bias is None else w.output_bias for w in weights]
    return [output.double() - bias for output, bias in zip(outputs, biases, strict=True)]


def per_head(value_up, heads):
    return value_up.repeat_interleave(heads // len(value_up), 0)


def squared_error(averaged, value_up, target):
    return float((torch.einsum("bshr,hrv->bshv", averaged, value_up) - target).square().sum())


class Cut:
    """A model of every kind of attention whose layers have lost all rotation and much of their rank, and its refit."""

    def __init__(self, mixed):
        self.sites = mixed.sites
        settings = {"exact": False, "rope_dims": 0, "kv_rank": 8}
        self.weights = [w for s in mixed.sites for w in latent_weights(mixed.program, [s], **settings)]
        model = model_of(mixed.program, mixed.sites, self.weights)
        self.seen = Latents(model, IDS)
        self.targets = targets(mixed.program, mixed.sites, self.weights, IDS)
        self.found = refit_values(mixed.program, mixed.sites, self.weights, model, IDS)
        self.by_ones = refit_values(mixed.program, mixed.sites, self.weights, model, IDS, batch=1)


@pytest.fixture(scope="module")
def cut(mixed):
    return Cut(mixed)


KINDS = pytest.mark.parametrize("index", range(len(zoo.MIXED)), ids=zoo.MIXED)


@KINDS
def test_refit_solves_the_least_squares_problem(cut, index):
    """Head by head, rows of outputs above rows that pull every latent entry towards its weights."""
    heads, averaged = cut.sites[index].heads, cut.seen.averaged[index]
    before = per_head(cut.weights[index].value_up, heads)
    for head in range(heads):
        design, wanted = averaged[:, :, head].flatten(0, 1), cut.targets[index][:, :, head].flatten(0, 1)
        variance = design.square().sum(0)
        pull = torch.diag(_RIDGE * variance + 1e-9 * variance.mean()).sqrt()
        stacked = torch.cat([design, pull]), torch.cat([wanted, pull @ before[head]])
        expected = torch.linalg.lstsq(*stacked).solution
        # Latents are float32, rounded by 6e-8, and the ridge lets their smallest directions count 1e4 times as much.
        assert difference(cut.found[index].value_up[head], expected) < 1e-3


@KINDS
def test_outputs_come_closer_to_the_originals(cut, index):
    heads, averaged, target = cut.sites[index].heads, cut.seen.averaged[index], cut.targets[index]
    before = per_head(cut.weights[index].value_up, heads)
    outputs = torch.einsum("bshr,hrv->bshv", averaged, before)
    assert difference(outputs, cut.seen.outputs[index]) < 1e-5, "latents and up-projections make the outputs"
    after = squared_error(averaged, cut.found[index].value_up, target)
    assert after < 0.9 * squared_error(averaged, before, target)


@KINDS
def test_no_neighbour_is_closer(cut, index):
    """Steps that are large against the ridge, in random directions and back to where it came from."""
    averaged, target, found = cut.seen.averaged[index], cut.targets[index], cut.found[index].value_up
    best = squared_error(averaged, found, target)
    generator = torch.Generator().manual_seed(index)
    noise = [torch.randn(found.shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    back = per_head(cut.weights[index].value_up, len(found)) - found
    for step in (*noise, back):
        for size in (0.1, -0.1):
            assert squared_error(averaged, found + size * step / step.std() * found.std(), target) > best


@KINDS
def test_batches_of_any_size_give_the_same(cut, index):
    assert difference(cut.by_ones[index].value_up, cut.found[index].value_up) < 1e-3


def test_only_values_change(cut):
    for before, after, site in zip(cut.weights, cut.found, cut.sites, strict=True):
        assert after.value_up.shape == (site.heads, *before.value_up.shape[1:])
        assert all(getattr(after, f) is getattr(before, f) for f in vars(before) if f != "value_up")


def test_exact_weights_stay_what_they_compute(mixed):
    """Every kind of attention: values of every query head of its own give the logits that shared ones gave."""
    weights = latent_weights(mixed.program, mixed.sites)
    found = refit_values(mixed.program, mixed.sites, weights, model_of(mixed.program, mixed.sites, weights), IDS)
    for before, after, site in zip(weights, found, mixed.sites, strict=True):
        # Outputs are rounded by 6e-8, and directions that text shows little of are held by the ridge of 1e-4.
        assert difference(after.value_up, per_head(before.value_up, site.heads)) < 1e-2
    with torch.no_grad():
        expected = mixed.program.flat_module()(*mixed.program.inputs(IDS))
        assert difference(model_of(mixed.program, mixed.sites, found)(IDS).logits, expected) < 1e-4


def test_a_cut_model_predicts_better_on_its_text(programs):
    """What all layers together are for; the later ones see what the earlier ones made of the text."""
    captured, ids = programs["llama-gqa"], models.tokens(6, LENGTH)
    weights = latent_weights(captured.program, captured.sites, exact=False, rope_dims=2, kv_rank=4)
    model = model_of(captured.program, captured.sites, weights)
    found = refit_values(captured.program, captured.sites, weights, model, ids)
    expected = models.logits(captured.module, ids)
    with torch.no_grad():
        before, after = (
            float((m(ids).logits - expected).square().sum())
            for m in (model, model_of(captured.program, captured.sites, found))
        )
    assert after < before


def test_progress_sees_every_batch_once(programs):
    captured, sizes = programs["llama-gqa"], []

    def count(batches):
        for ids in batches:
            sizes.append(tuple(ids.shape))
            yield ids

    weights = latent_weights(captured.program, captured.sites)
    model = model_of(captured.program, captured.sites, weights)
    text = models.tokens(5, LENGTH)
    refit_values(captured.program, captured.sites, weights, model, text, batch=2, progress=count)
    assert sizes == [(2, LENGTH), (2, LENGTH), (1, LENGTH)]


@pytest.mark.parametrize("rank", [1, 3, 4, 7, 8])
def test_half_of_a_gram_matrix_is_all_of_it(rank, monkeypatch):
    """Whatever its size is to the blocks', and in several parts of the text."""
    monkeypatch.setattr(refit, "_BLOCK", 4)
    seen = torch.randn(3, 10, rank, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gram = sum(refit._gram(part) for part in seen.split(6, 1))
    torch.testing.assert_close(refit._mirrored(gram), seen.mT @ seen, rtol=1e-13, atol=1e-13)
