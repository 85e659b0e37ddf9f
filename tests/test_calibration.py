"""Conversions by little, odd or too much: what comes out is finite, and what was not done is told."""

from __future__ import annotations

import re

import models
import numpy as np
import pytest
import torch

from mla_compile import api
from mla_compile.config import make_config
from mla_compile.conversion import causal
from mla_compile.errors import UsageError
from mla_compile.passes.layers import certain, measure_layers
from mla_compile.passes.task import Task
from mla_compile.site_statistics import SiteStatistics
from mla_compile.text.calibration import has_windows, read_text

WINDOWS = models.tokens(12, 16)


@pytest.fixture(scope="module")
def llama(programs):
    return programs["llama-gqa"]


@pytest.fixture(scope="module")
def convert(llama):
    def convert(windows=WINDOWS, **settings):
        settings = {"method": "fisher", "check": False, **settings}
        return api.compile(llama.program.exported, calibration=windows, **settings)

    return convert


def assert_finite(compiled):
    assert all(value.isfinite().all() for value in compiled.module.state_dict().values())
    assert compiled.module(WINDOWS[:2]).logits.isfinite().all()


# ---- windows of ids


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integers_of_any_type_are_token_ids(dtype):
    found = read_text(WINDOWS.to(dtype))
    assert found.dtype == torch.int64
    assert torch.equal(found, WINDOWS)


@pytest.mark.parametrize(
    ("windows", "told"),
    [
        (torch.ones(4, 8, dtype=torch.bool), "Calibration ids are torch.bool of shape (4, 8)."),
        (torch.ones(4, 8), "Calibration ids are torch.float32 of shape (4, 8)."),
        (torch.ones(4, 8, dtype=torch.complex64), "Calibration ids are torch.complex64 of shape (4, 8)."),
        (WINDOWS.to(torch.int32) - 100, f"Calibration ids go down to {int(WINDOWS.min()) - 100}, which is no token."),
    ],
)
def test_what_are_no_token_ids_are_refused(windows, told):
    with pytest.raises(UsageError) as caught:
        read_text(windows)
    assert caught.value.message == told


def test_an_array_of_integers_is_windows_too():
    for array in (WINDOWS.numpy(), WINDOWS.numpy().astype("uint16"), WINDOWS.numpy().astype(">i4")):
        found = read_text(array)
        assert found.dtype == torch.int64
        assert torch.equal(found, WINDOWS)
    assert torch.equal(read_text(WINDOWS.numpy()[::-1]), WINDOWS.flip(0))
    assert all(map(has_windows, (WINDOWS, WINDOWS.numpy())))
    assert not any(map(has_windows, (["a"], np.array(["a"]), None, "a.txt")))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ([[1, 2, 3]], "Document 1 of the text is of type list"),
        (["a", 3], "Document 2 of the text is of type int"),
        (("a", None), "Document 2 of the text is of type NoneType"),
        (b"text", "Document 1 of the text is of type int"),
        (np.arange(6), "Calibration ids are int64 of shape"),
        (np.ones((2, 3)), "Calibration ids are float64 of shape"),
        (np.array(7), "Calibration ids are int64 of shape"),
        ({"text": ["a"]}, "A text of type dict cannot be read"),
        (7, "A text of type int cannot be read"),
    ],
    ids=str,
)
def test_what_is_no_text_is_told(text, told):
    with pytest.raises(UsageError, match=re.escape(told)) as caught:
        [*read_text(text)]
    assert caught.value.remedy.startswith("Pass ")
    assert "token ids" in caught.value.remedy or "[windows, length]" in caught.value.remedy


def test_documents_that_are_not_there_yet_are_checked_when_they_are_read():
    documents = iter(read_text(word for word in ("one", 2)))
    assert next(documents) == "one"
    with pytest.raises(UsageError, match="Document 2"):
        next(documents)
    array = read_text(np.array(["one", "two"]))
    assert [*array] == [*array] == ["one", "two"]


def test_a_conversion_with_what_is_no_text_is_refused_before_the_model_is_read():
    with pytest.raises(UsageError, match="Document 1"):
        api.compile("no-model", calibration=[[1, 2, 3]])


# ---- too few tokens


def test_fewer_tokens_than_inputs_are_told_and_do(convert):
    compiled = convert(models.tokens(2, 9), cache_ratio=0.5)
    (warning,) = (w for w in compiled.report.warnings if "covariance" in w)
    assert warning.startswith(f"9 tokens of calibration text are fewer than the {models.WIDTH} inputs of ")
    assert_finite(compiled)


@pytest.mark.parametrize("method", ["fisher", "transmla"])
def test_text_that_always_says_the_same_does(convert, method):
    """Every input is one of few vectors: the covariance is nearly empty."""
    compiled = convert(torch.full((8, 16), 5), cache_ratio=0.5, method=method)
    assert not any("covariance" in w for w in compiled.report.warnings)  # there are tokens enough
    assert_finite(compiled)


def test_an_input_that_is_always_zero_does(llama, convert):
    weight = llama.program.exported.state_dict["model.layers.0.input_layernorm.weight"]
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3] = 0
        assert_finite(convert(cache_ratio=0.5))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def statistics(tokens: int) -> SiteStatistics:
    inputs = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment, none = inputs.T @ inputs / tokens, torch.zeros(0)
    return SiteStatistics(tokens, inputs.mean(0), moment, none, none, none, none, 2 * torch.ones(2), 2 * moment)


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_moments_of_few_tokens_are_positive_definite_and_as_large(tokens):
    before, after = statistics(tokens), certain(statistics(tokens))
    assert torch.linalg.eigvalsh(before.moment)[0] < 1e-12
    assert torch.linalg.eigvalsh(after.moment)[0] > (1 - tokens / 8) * before.moment.trace() / 8 - 1e-12
    assert after.moment.trace() == pytest.approx(float(before.moment.trace()), rel=1e-12)
    torch.testing.assert_close(after.key_moment, 2 * after.moment, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tokens", [8, 100])
def test_moments_of_enough_tokens_stay_as_they_are(tokens):
    before = statistics(tokens)
    assert certain(before) is before


# ---- sizes


def test_more_than_there_is_is_kept_whole_and_told(convert):
    with pytest.raises(UsageError, match=f"cache of all {models.LAYERS} layers grows"):
        convert(kv_rank=1000, rope_dims=500)
    compiled = convert(kv_rank=1000, rope_dims=500, cache_type="int8")  # fewer bytes, if more numbers
    plan = compiled.report.plans[0]
    told = "\n".join(compiled.report.warnings)
    where = f"is more than there is in {models.LAYERS} of {models.LAYERS} layers ({plan.path}: "
    assert f"--kv-rank 1000 {where}{plan.kv_rank})" in told
    assert f"--rope-dims 500 {where}{plan.rope_dims})" in told
    assert plan.kv_rank == plan.exact_rank < 1000
    rotating = 2 * 16  # two key heads of 16 channels
    assert plan.rope_dims == rotating


@pytest.mark.parametrize("settings", [{}, {"rope_dims": 12}, {"method": "transmla"}], ids=str)
def test_a_ratio_that_nothing_fits_in_names_a_layer_and_one_that_works(convert, settings):
    with pytest.raises(UsageError, match=r"leaves no room for a latent in model\.layers\.\d") as caught:
        convert(cache_ratio=0.02, **settings)
    ratio = float(re.search(r"--cache-ratio (0\.\d+) or more", caught.value.remedy)[1])
    compiled = convert(cache_ratio=ratio, **settings)
    assert compiled.report.cache_ratio <= ratio
    with pytest.raises(UsageError, match="leaves no room"):
        convert(cache_ratio=ratio - 1 / 64, **settings)  # a layer caches 64 numbers: one less


# ---- without gradients


def test_a_model_that_cannot_be_differentiated_is_converted(convert, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the model was differentiated")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with pytest.raises(AssertionError, match="differentiated"):
        convert(cache_ratio=0.5, statistics_cache=False)
    compiled = convert(cache_ratio=0.5, gradients=False)
    assert not any("gradients" in w for w in compiled.report.warnings)
    assert_finite(compiled)


def test_layers_whose_outputs_go_nowhere_linear_are_named(llama, monkeypatch):
    monkeypatch.setattr("mla_compile.passes.layers.output_metrics", lambda program, sites: (None,) * len(sites))
    task = Task(llama.program, llama.sites, (), make_config(gradients=False), WINDOWS)
    measured = measure_layers(task)
    (note,) = measured.notes
    assert all(site.path in note for site in llama.sites)
    for layer in measured.layers:
        eye = torch.eye(layer.site.v_dim).double().expand(layer.site.heads, -1, -1)
        torch.testing.assert_close(layer.statistics().output, eye, rtol=1e-12, atol=1e-12)


# ---- settings of another kind of model


def test_asking_for_encoders_changes_nothing_for_a_causal_model(llama, monkeypatch):
    given = {"check": False, "cache_ratio": 0.5, "encoders": True, "statistics_cache": False}
    compiled = api.compile(llama.program.exported, calibration=WINDOWS, **given)
    assert (compiled.report.config["method"], compiled.report.config["encoders"]) == ("fisher", False)
    monkeypatch.setattr(causal, "sample_text", lambda *_: (WINDOWS, ()))  # a model that writes it: test_sampled_text.py
    written = [api.compile(llama.program.exported, **given | {"encoders": flag}) for flag in (True, False)]
    assert written[0].report.quality == written[1].report.quality
    assert written[0].report.quality.sampled
