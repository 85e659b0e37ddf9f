"""Plans and descriptions from a configuration alone: those of the model with its weights."""

from __future__ import annotations

import dataclasses
import json

import models
import pytest
from transformers import Gemma2Config, LlamaConfig

from mla_compile import api
from mla_compile import conversion_cost as estimate
from mla_compile.config import make_config
from mla_compile.conversion import weightless
from mla_compile.conversion_cost import conversion_cost
from mla_compile.errors import LoadError, UsageError
from mla_compile.passes import polish, search, task
from mla_compile.passes.layerwise import Resources
from mla_compile.passes.search import Divergence
from mla_compile.passes.task import Task
from mla_compile.passes.transmla import transmla
from mla_compile.plan import plan_layers
from mla_compile.text import evaluate

SIZES = {**models._COMMON, "head_dim": 16, "num_hidden_layers": 5}


@pytest.fixture(scope="module")
def alternating(tmp_path_factory):
    """Five layers of two kinds: every other one sees six tokens only."""
    folder = tmp_path_factory.mktemp("alternating")
    Gemma2Config(**SIZES, sliding_window=6, architectures=["Gemma2ForCausalLM"]).save_pretrained(folder)
    return weightless.draw(folder / "config.json", "eager")


def test_two_of_five_layers_are_exported_and_all_are_described(alternating):
    assert (alternating.layers, alternating.exported) == (5, 2)
    found = alternating.found
    layers = sorted([*found.sites, *found.rejections], key=lambda layer: layer.index)
    assert [layer.path for layer in layers] == [f"model.layers.{i}.self_attn" for i in range(5)]
    assert [s.mask.window for s in found.sites] == [6, None, 6, None, 6]
    assert [s.key.weight for s in found.sites] == [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(5)]


def test_a_layer_is_described_as_it_is_where_all_are_exported(alternating, monkeypatch, tmp_path):
    """Kinds are told apart by what layers are, so that the description of the first holds for all."""
    Gemma2Config(**{**SIZES, "num_hidden_layers": 3}, sliding_window=6).save_pretrained(tmp_path)
    monkeypatch.setattr(weightless, "_of_few_layers", lambda *_: None)
    whole = weightless.draw(tmp_path, "eager")
    assert (whole.layers, whole.exported) == (3, 3)
    for one, other in zip(alternating.found.sites, whole.found.sites, strict=False):
        one, other = (
            dataclasses.replace(
                site,
                error=0.0,
                output="",
                softmax="",
                **{r: dataclasses.replace(getattr(site, r), node="", source="") for r in ("query", "key", "value")},
            )
            for site in (one, other)
        )
        assert one == other


def test_weights_are_counted_whole(alternating):
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES))
    assert alternating.parameters == sum(p.numel() for p in module.parameters())


def test_what_says_which_layer_it_is_makes_no_other_kind_and_what_it_is_does():
    module = models.llama(num_hidden_layers=3)
    kinds = weightless._kinds(module, module.config, "model.layers", ())
    assert len(set(kinds)) == 1
    module.model.layers[1].self_attn.scaling *= 2
    kinds = weightless._kinds(module, module.config, "model.layers", ())
    assert kinds[0] == kinds[2] != kinds[1]


def test_plan_of_a_configuration_is_that_of_the_model(programs, tmp_path):
    captured = programs["llama-gqa"]
    captured.module.config.save_pretrained(tmp_path)
    config = make_config(method="mha2mla")
    planned = api.plan(tmp_path, config)
    assert planned.plans == plan_layers(captured.sites, [models.WIDTH] * models.LAYERS, config)
    assert planned.alike == (models.LAYERS, 1)
    parameters = sum(p.numel() for p in captured.module.parameters())
    assert planned.conversion == conversion_cost(
        captured.sites, planned.plans, planned.widths, config, parameters, 4, captured.program.vocabulary
    )
    assert api.plan(tmp_path, make_config()).plans == planned.plans


def test_what_a_conversion_writes_is_what_it_has(programs):
    captured, config = programs["llama-gqa"], make_config(method="mha2mla")
    parameters = sum(p.numel() for p in captured.module.parameters())
    plans = plan_layers(captured.sites, [models.WIDTH] * models.LAYERS, config)
    cost = conversion_cost(
        captured.sites, plans, [models.WIDTH] * models.LAYERS, config, parameters, 4, captured.program.vocabulary
    )
    assert cost.weight_bytes == 4 * parameters
    converted = api.compile(captured.module, models.example(captured.module), config=config, check=False)
    assert cost.written_bytes == 4 * sum(p.numel() for p in converted.module.parameters())


def test_estimates_count_with_what_conversions_run_with():
    """The constants of modules that the estimate may not import."""
    estimated = {name: getattr(estimate, name) for name in ("_WINDOW", "_BATCH", "_KEPT", "_PROBE", "_PROBE_LOGITS")}
    assert estimated == {
        "_WINDOW": evaluate.DEFAULT_WINDOW,
        "_BATCH": task.BATCH,
        "_KEPT": Resources().kept,
        "_PROBE": search._PROBE_TOKENS,
        "_PROBE_LOGITS": search._PROBE_LOGITS,
    }
    assert (estimate._STEP_WINDOWS, estimate._STEP_LOGITS) == (polish._BATCH, polish._LOGITS)


def cost_of(captured, layers=1, itemsize=4, **settings):
    """What converting a model takes whose layers are those of another, several times over."""
    config = make_config(method="mha2mla", seq_len=16, **settings)
    sites = captured.sites * layers
    widths = [models.WIDTH] * len(sites)
    plans = plan_layers(sites, widths, config)
    parameters = sum(p.numel() for p in captured.module.parameters()) * layers
    return conversion_cost(sites, plans, widths, config, parameters, itemsize, captured.program.vocabulary)


@pytest.mark.parametrize("method", ["fisher", "transmla"])
def test_what_text_costs_follows_from_how_much_there_is(programs, method):
    def cost(**settings):
        return getattr(cost_of(programs["llama-gqa"], **settings), method)

    sites = programs["llama-gqa"].sites
    one = cost(calibration_tokens=2**14)
    more = cost(calibration_tokens=2**15)
    forward = cost(calibration_tokens=2**14, gradients=False)
    deep = cost(calibration_tokens=2**14, layers=3)
    assert one.tokens == 2**14
    assert more.offload_bytes == 2 * one.offload_bytes == 2 * 4 * 2**14 * models.WIDTH * len(sites)
    assert one.memory_bytes == one.offload_memory_bytes + one.offload_bytes
    assert more.offload_memory_bytes == one.offload_memory_bytes
    assert deep.offload_memory_bytes == pytest.approx(one.offload_memory_bytes, rel=0.01)  # tables count as layers
    assert one.seconds < more.seconds < 2 * one.seconds
    assert forward.text_operations < one.text_operations
    assert deep.disk_bytes == 3 * one.disk_bytes


def test_what_writing_a_text_costs_follows_from_how_much_there_is(programs):
    captured = programs["llama-gqa"]
    one, more = (cost_of(captured, calibration_tokens=tokens).sampling for tokens in (2**14, 2**15))
    assert one.tokens == 2**14 + 16 * 16  # sixteen windows are held back
    assert more.operations / one.operations == pytest.approx(more.tokens / one.tokens)
    forward = cost_of(captured, calibration_tokens=2**14, gradients=False).fisher.text_operations / 2**14
    assert one.operations / one.tokens < forward  # which runs the refit, too
    whole = cost_of(captured, layers=3).sampling.memory_bytes - cost_of(captured, layers=2).sampling.memory_bytes
    assert whole == 4 * sum(p.numel() for p in captured.module.parameters())


def test_transmla_refits_nothing(programs):
    cost = cost_of(programs["llama-gqa"], calibration_tokens=2**14)
    assert cost.transmla.text_operations < cost.fisher.text_operations
    assert cost.transmla.offload_bytes == cost.fisher.offload_bytes


def test_transmla_tries_what_its_search_would(programs, monkeypatch):
    """At most: it leaves a length of the rope key as soon as more folding does not help."""
    captured, tried = programs["llama-gqa"], []
    config = make_config(method="transmla", cache_ratio=0.5)
    call = Divergence.__call__
    monkeypatch.setattr(Divergence, "__call__", lambda self, model: tried.append(0) or call(self, model))
    transmla(Task(captured.program, captured.sites, (), config, models.tokens(8, 16, seed=3)))
    estimated = cost_of(captured, cache_ratio=0.5).transmla.tries
    assert len(tried) <= estimated <= 2 * len(tried)


def test_what_polishing_costs_follows_from_steps_and_layers(programs):
    captured = programs["llama-gqa"]
    one, twice, deep, narrow = (
        cost_of(captured, **settings).polish for settings in ({}, {"polish_steps": 256}, {"layers": 3}, {"itemsize": 2})
    )
    assert (one.steps, twice.steps) == (128, 256)
    assert twice.operations == 2 * one.operations
    assert twice.memory_bytes == one.memory_bytes
    assert deep.operations == pytest.approx(3 * one.operations, rel=0.1)  # tables count as layers
    assert deep.least_memory_bytes == 3 * one.least_memory_bytes
    assert deep.memory_bytes - one.memory_bytes > deep.least_memory_bytes - one.least_memory_bytes  # activations too
    assert narrow.memory_bytes > one.memory_bytes  # weights in float32 beside those that are stored


def test_text_is_of_no_use_without_weights(tmp_path):
    LlamaConfig(**models._COMMON).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no weights"):
        api.plan(tmp_path, make_config(method="fisher"))
    with pytest.raises(UsageError, match="has no weights"):
        api.plan(tmp_path, make_config(), calibration=["some text"])


def test_a_configuration_of_nothing_known_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(LoadError, match="could not be loaded"):
        api.plan(tmp_path, make_config())
