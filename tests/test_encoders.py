"""Encoders behind ``--encoders``: low-rank projections, the model's own inputs and outputs, nothing wrong in silence.

Oracles are the original modules themselves, on inputs of lengths and paddings the compiler has not seen.
"""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
from families import DIM, HEADS, LAYERS, WIDTH
from families.encoders import ENCODERS, Encoder, RotaryEncoder, by_hand
from torch import nn

import mla_compile
from mla_compile.cli import main
from mla_compile.conversion.encoders import CompiledEncoder
from mla_compile.errors import LoadError, MlaCompileError, RefusedError, UsageError, VerificationError
from mla_compile.site import RejectCode

TOLERANCE = 1e-4
"""Of the largest output; float32 through two layers stays below 1e-6."""
CONVERTIBLE = ["bert", "bert-eager", "roberta", "distilbert", "vit", "vit-eager", "own-torch-encoder"]
CONVERTIBLE += ["own-einsum", "own-rotary", "own-rotary-places", "esm-rotary", "modernbert-rotary"]
KEPT_RANK = 40


def convert(family: Encoder, module: nn.Module, **settings) -> CompiledEncoder:
    given = family.inputs(2, 7) if family.given else None
    return mla_compile.compile(module, given, encoders=True, **settings)


@pytest.fixture(scope="module")
def exact():
    """Models and their conversions with nothing left out."""
    made: dict[str, tuple[nn.Module, CompiledEncoder]] = {}

    def convert_once(name: str) -> tuple[nn.Module, CompiledEncoder]:
        if name not in made:
            module = ENCODERS[name].build()
            made[name] = module, convert(ENCODERS[name], module, exact=True)
        return made[name]

    return convert_once


def outputs(module: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        result = module(**inputs)
    return [result] if isinstance(result, torch.Tensor) else [v for v in result.values() if v is not None]


def difference(got, expected) -> float:
    assert got.shape == expected.shape
    return float((torch.as_tensor(got) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_nothing_is_lost_at_full_rank(exact, name):
    module, compiled = exact(name)
    for batch, length in ((1, 1), (2, 17), (4, 6)):
        inputs = ENCODERS[name].inputs(batch, length)
        with torch.no_grad():
            got = compiled.module(**inputs)
        for mine, theirs in zip(got.values(), outputs(module, inputs), strict=True):
            assert difference(mine, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", ["bert", "vit", "own-torch-encoder", "own-rotary-places"])
def test_the_file_computes_the_same_under_the_same_names(exact, tmp_path, name):
    module, compiled = exact(name)
    report = compiled.to_onnx(tmp_path / "model.onnx")
    assert report.verification.lowering_error <= TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == {*ENCODERS[name].inputs(1, 5)}
    named = [o.name for o in session.get_outputs()]
    assert named == (["output"] if name.startswith("own") else ["logits"])
    for batch, length in ((1, 1), (2, 17), (4, 6)):
        inputs = ENCODERS[name].inputs(batch, length)
        got = session.run(named, {k: v.numpy() for k, v in inputs.items()})
        for mine, theirs in zip(got, outputs(module, inputs), strict=True):
            assert difference(mine, theirs) <= TOLERANCE
    stored = json.loads((tmp_path / "report.json").read_text())
    assert (stored["kind"], stored["cache"]) == ("encoder", None)
    assert [layer["cache"] for layer in stored["layers"]] == ["no cache"] * LAYERS


def test_padding_is_hidden_from_keys(exact):
    """What stands in padded places changes nothing at the others."""
    _, compiled = exact("distilbert")
    inputs = ENCODERS["distilbert"].inputs(3, 9)
    mask = inputs["attention_mask"] != 0
    assert not mask.all()
    other = {**inputs, "input_ids": torch.where(mask, inputs["input_ids"], 50)}
    with torch.no_grad():
        first, second = (compiled.module(**x)["logits"] for x in (inputs, other))
        open_to_all = compiled.module(**{**other, "attention_mask": torch.ones_like(mask).long()})
    torch.testing.assert_close(first[mask], second[mask], rtol=0, atol=1e-6)
    assert difference(open_to_all["logits"][mask], first[mask]) > 1e-2


def test_fewer_numbers_are_counted_as_they_are():
    family, module = ENCODERS["bert"], ENCODERS["bert"].build()
    compiled = convert(family, module, kv_rank=KEPT_RANK)
    before, after = compiled.report.parameters
    assert before == sum(p.numel() for p in module.parameters())
    assert after == sum(p.numel() for p in compiled.module.parameters())
    # Per layer: keys and values of all heads become a latent and its two up-projections; the bias of keys goes.
    assert before - after == LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH - KEPT_RANK * (WIDTH + 2 * WIDTH) - WIDTH)
    assert compiled.report.multiplications == (LAYERS * 2 * WIDTH * WIDTH, LAYERS * KEPT_RANK * 3 * WIDTH)
    verification = compiled.report.verification
    assert verification.rewrite_error <= TOLERANCE < verification.conversion_error
    inputs = family.inputs(2, 11)
    with torch.no_grad():
        error = difference(compiled.module(**inputs)["logits"], outputs(module, inputs)[0])
    assert TOLERANCE < error < 0.9
    assert "no cache" in str(compiled.report)


def test_more_rank_is_nearer_to_the_original():
    family, module = ENCODERS["vit"], ENCODERS["vit"].build()
    errors = [convert(family, module, kv_rank=r).report.verification.conversion_error for r in (8, 32, 56)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1]


def test_the_module_can_be_trained():
    family = ENCODERS["bert"]
    compiled = convert(family, family.build(), kv_rank=KEPT_RANK, check=False)
    compiled.module(**family.inputs(2, 7))["logits"].square().mean().backward()
    missing = [name for name, p in compiled.module.named_parameters() if p.grad is None]
    assert not missing
    assert any("latent" in name for name, _ in compiled.module.named_parameters())


def test_inputs_are_given_by_place_or_by_name(exact):
    _, compiled = exact("vit")
    (pixels,) = ENCODERS["vit"].inputs(1, 0).values()
    with torch.no_grad():
        assert torch.equal(compiled.module(pixels)["logits"], compiled.module(pixel_values=pixels)["logits"])
    for wrong in ({}, {"pixels": pixels}):
        with pytest.raises(TypeError, match="The inputs are pixel_values"):
            compiled.module(**wrong)


class MaskedPlaces(nn.Module):
    """Rotation by the number of real tokens before a token: a padding mask that does more than hide keys."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = RotaryEncoder(True)

    def forward(self, input_ids, attention_mask):
        return self.rotary(input_ids, attention_mask, attention_mask.cumsum(1))


def test_places_that_depend_on_the_padding_are_not_overlooked():
    family = ENCODERS["own-rotary"]
    with pytest.raises(MlaCompileError):
        mla_compile.compile(by_hand(MaskedPlaces)(), family.inputs(2, 7), encoders=True, exact=True)


class TwoKinds(nn.Module):
    """One layer with a bias that falls with distance, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, x):
        place = torch.arange(x.shape[1])
        bias = -((place[:, None] - place).abs().float()).sqrt()
        for added, qkv in zip((bias, None), self.qkv, strict=True):
            q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in qkv(x).chunk(3, -1))
            scores = q @ k.mT / 4
            weights = (scores if added is None else scores + added).softmax(-1)
            x = x + (weights @ v).transpose(1, 2).flatten(2)
        return x


def test_layers_that_are_not_understood_stay_as_they_are():
    module = by_hand(TwoKinds)()
    inputs = {"x": torch.randn(2, 7, WIDTH)}
    compiled = mla_compile.compile(module, inputs, encoders=True, exact=True)
    assert [r.code for r in compiled.report.kept] == [RejectCode.SCORES]
    assert any("stay as they are" in w for w in compiled.report.warnings)
    other = {"x": torch.randn(3, 19, WIDTH)}
    with torch.no_grad():
        assert difference(compiled.module(**other)["output"], module(**other)) <= TOLERANCE


def test_what_is_not_a_number_is_refused(tmp_path):
    compiled = mla_compile.compile(ENCODERS["bert"].build(), encoders=True, kv_rank=8)
    for name, parameter in compiled.module.named_parameters():
        if name.endswith("value_up"):
            parameter.data.fill_(torch.nan)
    with pytest.raises(VerificationError, match="differs from the converted PyTorch module by nan"):
        compiled.to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_wrong_rewrite_leaves_no_result(monkeypatch):
    """The check must notice weights that are off in one layer."""
    from mla_compile.passes import factorise

    def spoiled(program, site):
        weights = read(program, site)
        weights.value.weight.mul_(1.01)
        return weights

    read = factorise.read_site
    monkeypatch.setattr(factorise, "read_site", spoiled)
    with pytest.raises(VerificationError, match="differs from the original model"):
        convert(ENCODERS["vit"], ENCODERS["vit"].build(), exact=True)


@pytest.mark.parametrize("name", ["own-perceiver"])
def test_other_kinds_are_refused(name):
    with pytest.raises(RefusedError, match="--encoders converts models whose attention is all bidirectional"):
        convert(ENCODERS[name], ENCODERS[name].build())


def test_text_is_not_for_encoders():
    for given in ({"calibration": ["a text"]}, {"finetune": ["a text"]}):
        with pytest.raises(UsageError, match="Leave --calibration and --finetune out"):
            convert(ENCODERS["distilbert"], ENCODERS["distilbert"].build(), **given)
    with pytest.raises(UsageError, match="2-norm"):
        convert(ENCODERS["distilbert"], ENCODERS["distilbert"].build(), selection="2-norm", calibration=None)


def test_causal_models_are_converted_as_ever(programs):
    import models

    module = models.handwritten(models.NanoGPT)
    ids = models.tokens(2, 9)
    compiled = mla_compile.compile(module, (ids,), exact=True, encoders=True)
    with torch.no_grad():
        assert difference(compiled.module(ids).logits, models.logits(module, ids)) <= TOLERANCE
    assert compiled.module.rows


def test_command_line(tmp_path, capsys):
    folder, out = tmp_path / "bert", tmp_path / "out" / "bert.onnx"
    ENCODERS["bert"].build().save_pretrained(folder)
    assert main(["convert", str(folder), "--out", str(out), "--exact"]) == 3
    told = capsys.readouterr().err
    assert "nothing is cached, so there is no cache to shrink" in told
    assert "Pass --encoders" in told
    assert not out.exists()
    assert main(["inspect", str(folder), "--encoders"]) == 0
    assert capsys.readouterr().out.count("no cache") == LAYERS
    assert main(["convert", str(folder), "--out", str(out), "--encoders", "--kv-rank", str(KEPT_RANK), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "multiplications per token" in shown
    assert "parameters" in shown
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    fed = {k: v.numpy() for k, v in ENCODERS["bert"].inputs(2, 5).items()}
    assert np.isfinite(session.run(None, fed)[0]).all()


def test_a_saved_folder_is_a_torch_archive(exact, tmp_path):
    _, compiled = exact("vit")
    compiled.save(tmp_path / "vit")
    inputs = ENCODERS["vit"].inputs(3, 0)
    read = torch.export.load(tmp_path / "vit" / "model.pt2").module()
    with torch.no_grad():
        (got,) = read(*inputs.values())
        torch.testing.assert_close(got, compiled.module(**inputs)["logits"])
    with pytest.raises(LoadError, match="holds an encoder, which has no cache"):
        mla_compile.load(tmp_path / "vit")
