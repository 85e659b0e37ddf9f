"""Verification: a right conversion passes, and every kind of wrong one is caught by the link that is there for it."""

from __future__ import annotations

import re

import models
import numpy as np
import pytest
import torch

from mla_compile import api
from mla_compile.artifacts.folder_decoder import FolderDecoder
from mla_compile.artifacts.saved import open_saved, write_saved_onnx
from mla_compile.config import make_config
from mla_compile.errors import RefusedError, UsageError, VerificationError
from mla_compile.passes.quantise_cache import check_quantisable
from mla_compile.runtime.generate import generate
from mla_compile.runtime.module import LatentModel, LatentOutput, known_tokens
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.torch_decoder import TorchDecoder
from mla_compile.text.evaluate import original_scorer
from mla_compile.verification import agreement
from mla_compile.verification.agreement import QUANTISED_TOLERANCE, chunks, equal_share, greedy_original
from mla_compile.verification.module import check_module
from mla_compile.verification.onnx import check_onnx

ROUNDING = 1e-5  # float32 through two layers; ten times below what is allowed


@pytest.fixture(scope="module")
def program(programs):
    return programs["complex-llama"].program


@pytest.fixture(scope="module")
def original(program):
    return original_scorer(program)


@pytest.fixture(scope="module")
def exact(program):
    return api.compile(program.exported, exact=True).module


@pytest.fixture(scope="module")
def compiled(program):
    return api.compile(program.exported, method="mha2mla", cache_ratio=0.5)


@pytest.fixture(scope="module")
def decoder(compiled, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    compiled.to_onnx(path)
    return OnnxDecoder(path)


class Changed(LatentModel):
    """A converted model whose logits or cache are spoilt."""

    def __init__(self, model, logits=lambda x, step: x, cache=lambda x: x):
        super().__init__(model.graph, model.rows)
        self.change_logits, self.change_cache = logits, cache

    def forward(self, input_ids, attention_mask=None, position_ids=None, past=None):
        result = super().forward(input_ids, attention_mask, position_ids, past)
        step = past is not None and past[0].shape[1] > 0
        return LatentOutput(self.change_logits(result.logits, step), tuple(map(self.change_cache, result.cache)))


def check(original, exact, converted, ids=None):
    return check_module(original, exact, converted, models.tokens(2, 24) if ids is None else ids, False)


def test_a_right_conversion_passes(original, exact, compiled):
    found = check(original, exact, compiled.module)
    assert 0 <= found.rewrite_error < ROUNDING
    assert 0 <= found.decode_error < ROUNDING
    assert (found.lowering_error, found.lowering_greedy) == (None, None)
    assert (found.tokens, found.text) == (48, False)
    assert found.cache_bytes_per_token == compiled.report.cache_bytes_after == 4 * sum(compiled.module.rows)


def test_the_price_of_the_conversion_is_measured_against_the_original(original, exact, compiled):
    """Oracle: the two models' logits, compared here."""
    ids = models.tokens(2, 24)
    with torch.no_grad():
        ours, theirs = compiled.module(ids).logits, original(ids)
    found = check(original, exact, compiled.module)
    assert found.conversion_error == pytest.approx(float((ours - theirs).abs().max() / theirs.abs().max()))
    assert found.conversion_error > 100 * ROUNDING  # half of the cache costs something on random weights


def test_an_exact_conversion_costs_nothing(original, exact):
    found = check(original, exact, exact)
    assert found.conversion_error < ROUNDING
    assert found.conversion_greedy == 1.0


@pytest.mark.parametrize("length", [2, 3, 4, 5, 9, 64])
def test_any_length_from_two_can_be_verified(original, exact, compiled, decoder, length):
    ids = models.tokens(2, length)
    assert check(original, exact, compiled.module, ids).tokens == 2 * length
    error, greedy, _ = check_onnx(compiled.module, decoder, ids, compiled.report.cache_bytes_after)
    assert error < ROUNDING
    assert greedy == 1.0


@pytest.mark.parametrize("length", range(1, 40))
def test_chunks_add_up(length):
    sizes = chunks(length)
    assert sum(sizes) == length
    assert min(sizes) >= 1
    assert sizes[-1] == 1  # the step that decoding consists of


def refuses(message):
    return pytest.raises(VerificationError, match=message)


def test_a_wrong_rewrite_is_caught(original, exact, compiled):
    wrong = Changed(exact, logits=lambda x, step: x * (1 + 3e-4))
    with refuses("The rewritten graph at full rank differs from the original model by 3.0e-04 ") as caught:
        check(original, wrong, compiled.module)
    error = caught.value
    assert error.exit_code == 5
    assert "(allowed: 1e-04)" in error.message
    assert error.remedy.startswith("No output was kept.")
    assert "\n" not in str(error)


def test_a_rewrite_of_something_else_is_caught(original, compiled):
    with refuses("The rewritten graph at full rank differs from the original model"):
        check(original, compiled.module, compiled.module)


def test_decoding_that_differs_from_the_whole_sequence_is_caught(original, exact, compiled):
    wrong = Changed(compiled.module, logits=lambda x, step: x + 0.01 * step)
    with refuses("Decoding with the latent cache differs from the same model on the whole sequence"):
        check(original, exact, wrong)


def test_a_cache_that_forgets_is_caught(original, exact, compiled):
    wrong = Changed(compiled.module, cache=torch.zeros_like)
    with refuses("Decoding with the latent cache"):
        check(original, exact, wrong)


def test_not_a_number_is_caught(original, exact, compiled):
    with refuses("by nan of"):
        check(original, exact, Changed(compiled.module, logits=lambda x, step: x * float("nan")))
    with refuses("by nan of"):
        check(original, Changed(exact, logits=lambda x, step: x * float("nan")), compiled.module)


def test_the_tolerance_is_the_one_of_the_module(original, exact, compiled, monkeypatch):
    monkeypatch.setattr(agreement, "TOLERANCE", 0.0)
    with refuses("The rewritten graph"):
        check(original, exact, compiled.module)


def test_a_right_file_passes(compiled, decoder):
    error, greedy, measured = check_onnx(
        compiled.module, decoder, models.tokens(3, 20), compiled.report.cache_bytes_after
    )
    assert error < ROUNDING
    assert greedy == 1.0
    assert measured == compiled.report.cache_bytes_after


def test_an_int8_file_says_what_it_costs(program, compiled, tmp_path):
    """Its cache takes a byte per number and two scales per layer; no other form has one."""
    int8 = api.compile(program.exported, method="mha2mla", cache_ratio=0.5, cache_type="int8")
    report = int8.to_onnx(tmp_path / "model.onnx")
    found = report.verification
    assert found.cache_bytes_per_token == report.cache_bytes_after == sum(row + 8 for row in int8.module.rows)
    assert report.cache_bytes_after < compiled.report.cache_bytes_after / 2
    assert found.lowering_error <= QUANTISED_TOLERANCE * found.quantisation_error
    assert 1e-4 < found.quantisation_error < 0.1
    refused = pytest.raises(UsageError, match="Only an ONNX file for ONNX Runtime has an int8 cache")
    with refused:
        int8.save(tmp_path / "folder")
    with refused:
        int8.to_tensorrt(tmp_path / "engine.onnx")


def test_a_wrong_file_is_caught(compiled, decoder, monkeypatch):
    right = OnnxDecoder.step

    def step(self, ids, mask, positions, cache):
        logits, cache = right(self, ids, mask, positions, cache)
        return logits + np.float32(0.01) * (ids.shape[1] == 1), cache

    monkeypatch.setattr(OnnxDecoder, "step", step)  # only single tokens are wrong
    with refuses("ONNX Runtime differs from the converted PyTorch module"):
        check_onnx(compiled.module, decoder, models.tokens(2, 20), compiled.report.cache_bytes_after)


def test_a_cache_of_another_size_than_planned_is_caught(compiled, decoder):
    planned = compiled.report.cache_bytes_after
    with refuses(re.escape(f"A token takes {planned} bytes of cache, but the plan says {planned - 4}.")):
        check_onnx(compiled.module, decoder, models.tokens(2, 20), planned - 4)


def test_greedy_continuation_of_the_original_equals_the_models_own(programs, original):
    """Oracle: the pico module itself, called directly."""
    module, prompt = programs["complex-llama"].module, models.tokens(1, 7)[0]
    ids = prompt.tolist()
    for _ in range(12):
        ids.append(int(models.logits(module, torch.tensor([ids]))[0, -1].argmax()))
    assert greedy_original(original, prompt, 12) == ids[7:]


def test_the_torch_decoder_continues_like_the_onnx_one(compiled, decoder):
    prompts = [[3, 5, 8], [1], [4, 4, 9, 2, 7]]
    assert generate(TorchDecoder(compiled.module), prompts, 16) == decoder.generate(prompts, 16)


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [([1, 2, 3, 4], [1, 2, 3, 4], 1.0), ([1, 2, 9, 4], [1, 2, 3, 4], 0.5), ([9, 2], [1, 2], 0.0), ([], [], 1.0)],
)
def test_agreement_is_the_share_before_the_first_difference(ours, theirs, share):
    assert equal_share(ours, theirs) == share


# ---- models that rule tokens out


class RuledOut(models.NanoGPT):
    """Some tokens cannot be predicted; tokens may see the one before without attention, which a cache would forget."""

    def __init__(self, mask, mixed):
        super().__init__()
        self.mask, self.mixed = mask, mixed
        self.register_buffer("out", torch.arange(models.VOCABULARY) >= models.VOCABULARY - 9)

    def forward(self, ids):
        x = self.tokens(ids)
        x = x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1] if self.mixed else x
        return self.head(x + self.attentions[0](x)).masked_fill(self.out, self.mask)


def ruled_out(mask, mixed):
    torch.manual_seed(0)
    return RuledOut(mask, mixed).eval()


@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, -1e9])
def test_a_hidden_logit_hides_no_wrong_conversion(mask):
    with pytest.raises(RefusedError, match="depends on the length or on other tokens: in pieces"):
        api.compile(ruled_out(mask, mixed=True), (models.tokens(2, 8),), exact=True)


def test_tokens_ruled_out_by_infinity_are_no_difference():
    found = api.compile(ruled_out(-torch.inf, mixed=False), (models.tokens(2, 8),), exact=True).report.verification
    assert 0 < found.rewrite_error < ROUNDING
    assert 0 < found.decode_error < ROUNDING


# ---- models that predict more tokens than they read


class WideHead(RuledOut):
    """The head is padded, or ends in tokens that are never given."""

    def __init__(self):
        super().__init__(-1e9, False)
        self.tokens = torch.nn.Embedding(20, models.WIDTH)
        self.out = torch.arange(models.VOCABULARY) < 20  # every prediction is one that cannot be read


def test_a_head_may_be_wider_than_the_table(tmp_path):
    torch.manual_seed(0)
    compiled = api.compile(WideHead().eval(), (torch.zeros(2, 8, dtype=torch.long),), exact=True)
    found = compiled.to_onnx(tmp_path / "model.onnx").verification
    assert known_tokens(compiled.module.graph) == 20
    assert (found.conversion_greedy, found.lowering_greedy) == (1.0, 1.0)
    check_quantisable(compiled.module.graph, compiled.module.rows)
    compiled.save(tmp_path / "folder")
    write_saved_onnx(open_saved(tmp_path / "folder"), tmp_path / "again.onnx", make_config(), force=True)
    files = [OnnxDecoder(tmp_path / name) for name in ("model.onnx", "again.onnx")]
    for runs in (*files, FolderDecoder(tmp_path / "folder")):
        assert (runs.vocabulary, runs.known_tokens) == (models.VOCABULARY, 20)
        (new,) = generate(runs, [[5, 19]], 4)
        assert len(new) == 4
        assert max(new) < 20
        with pytest.raises(UsageError, match="Token 20 is none of the 20"):
            generate(runs, [[5, 20]], 4)
