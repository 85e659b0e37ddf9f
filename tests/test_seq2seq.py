"""Encoder-decoders behind ``--encoders``: the encoder runs once, the decoder caches latents of both sequences.

Oracles are the original modules themselves, run on whole sequences the compiler has not seen.
"""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
from families import DIM, HEADS, LAYERS, WIDTH
from families.encoders import BART, ENCODERS, transformers_model
from torch import Tensor, nn

import mla_compile
from mla_compile.cli import main
from mla_compile.conversion.seq2seq import CompiledSeq2Seq
from mla_compile.errors import RefusedError, UsageError, VerificationError
from mla_compile.sources.capture import capture_any

TOLERANCE = 1e-4
"""Of the largest logit; float32 through a few layers stays below 1e-6."""
CONVERTIBLE = ["bart", "marian", "whisper"]
PIECES = (4, 1, 3, 1)
NUMBERS = 2 * HEADS * DIM


@pytest.fixture(scope="module")
def exact():
    """Models and their conversions with nothing left out."""
    made: dict[str, tuple[nn.Module, CompiledSeq2Seq]] = {}

    def convert_once(name: str) -> tuple[nn.Module, CompiledSeq2Seq]:
        if name not in made:
            module = ENCODERS[name].build()
            made[name] = module, mla_compile.compile(module, encoders=True, exact=True)
        return made[name]

    return convert_once


def logits(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return module(**inputs, use_cache=False).logits


def difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def halves(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """What the encoder is given, and the decoder's ids."""
    return {k: v for k, v in inputs.items() if not k.startswith("decoder")}, inputs["decoder_input_ids"]


def in_pieces(compiled: CompiledSeq2Seq, inputs: dict[str, Tensor], sizes: tuple[int, ...]) -> Tensor:
    given, ids = halves(inputs)
    past, parts = None, []
    with torch.no_grad():
        context = compiled.module.encode(**given)
        for part in ids.split(list(sizes), 1):
            result = compiled.module(part, context, past=past)
            past = result.cache
            parts.append(result.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", CONVERTIBLE)
@pytest.mark.parametrize("sizes", [(9,), PIECES, (1,) * 9], ids=["at once", "in pieces", "token by token"])
def test_nothing_is_lost_at_full_rank(exact, name, sizes):
    """The encoder's sequences are padded, each to another length."""
    module, compiled = exact(name)
    for batch in (1, 3):
        inputs = ENCODERS[name].inputs(batch, 9)
        assert difference(in_pieces(compiled, inputs, sizes), logits(module, inputs)) <= TOLERANCE


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_both_files_together_are_the_original(exact, tmp_path, name):
    module, compiled = exact(name)
    report = compiled.to_onnx(tmp_path / "model.onnx")
    assert report.verification.lowering_error <= TOLERANCE
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / file, providers=["CPUExecutionProvider"])
        for file in ("model.encoder.onnx", "model.onnx")
    )
    inputs = ENCODERS[name].inputs(3, 9)
    given, ids = halves(inputs)
    rows = [f"cross.{i}.latent" for i in range(LAYERS)]
    assert [o.name for o in encoder.get_outputs()] == rows
    assert {i.name for i in encoder.get_inputs()} <= {*given}
    taken = {i.name: i for i in decoder.get_inputs()}
    assert {*rows} < {*taken}
    fed = {i.name: given[i.name].numpy() for i in encoder.get_inputs()}
    context = dict(zip(rows, encoder.run(rows, fed), strict=True))
    if "attention_mask" in given:
        context["encoder_attention_mask"] = given["attention_mask"].numpy()
    cache = [np.zeros((3, 0, row), np.float32) for row in compiled.module.decoder.rows]
    parts, done = [], 0
    for size in PIECES:
        step = {
            "input_ids": ids[:, done : done + size].numpy(),
            "attention_mask": np.ones((3, done + size), np.int64),
            "position_ids": np.tile(np.arange(done, done + size), (3, 1)),
            **{f"past_key_values.{i}.latent": x for i, x in enumerate(cache)},
            **context,
        }
        step = {k: v for k, v in step.items() if k in taken}
        part, *cache = decoder.run(["logits", *(f"present.{i}.latent" for i in range(LAYERS))], step)
        parts.append(torch.from_numpy(part))
        done += size
    assert difference(torch.cat(parts, 1), logits(module, inputs)) <= TOLERANCE
    assert [c.shape[1] for c in cache] == [9] * LAYERS
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["kind"] == "encoder-decoder"
    assert {layer["kind"] for layer in stored["layers"]} == {"causal", "cross"}


def test_caches_are_as_small_as_is_told():
    module = ENCODERS["bart"].build()
    compiled = mla_compile.compile(module, encoders=True, kv_rank=24)
    assert compiled.report.cache_bytes == (4 * LAYERS * NUMBERS, 4 * LAYERS * 24)
    assert compiled.report.cross_cache_bytes == (4 * LAYERS * NUMBERS, 4 * LAYERS * 24)
    inputs = ENCODERS["bart"].inputs(2, 9)
    given, ids = halves(inputs)
    with torch.no_grad():
        context = compiled.module.encode(**given)
        output = compiled.module(ids, context)
    encoded = given["input_ids"].shape[1]
    assert [c.shape for c in context] == [(2, encoded, 24)] * LAYERS + [(2, encoded)]
    assert [c.shape for c in output.cache] == [(2, 9, 24)] * LAYERS
    verification = compiled.report.verification
    assert verification.rewrite_error <= TOLERANCE
    assert verification.decode_error <= TOLERANCE
    assert TOLERANCE < difference(output.logits, logits(module, inputs)) < 1.0
    assert "bytes per token of the encoder" in str(compiled.report)


def test_the_encoder_stays_as_it_is(exact):
    _, compiled = exact("bart")
    assert [r.path for r in compiled.report.kept] == ["model.encoder.layers.0.self_attn"]
    names = [name for name, _ in compiled.module.encoder.named_parameters()]
    assert any("encoder.layers.0.self_attn.k_proj" in name for name in names)
    assert not any("decoder" in name and "latent" not in name for name in names)
    inside = [name for name, _ in compiled.module.decoder.named_parameters()]
    assert not any("model.encoder" in name or "k_proj" in name for name in inside)


def test_the_encoders_padding_is_hidden(exact):
    _, compiled = exact("marian")
    given, ids = halves(ENCODERS["marian"].inputs(3, 6))
    real = given["attention_mask"] != 0
    assert not real.all()
    other = {**given, "input_ids": torch.where(real, given["input_ids"], 50)}
    with torch.no_grad():
        first, second = (compiled.module(ids, compiled.module.encode(**g)).logits for g in (given, other))
        open_to_all = {**other, "attention_mask": torch.ones_like(given["attention_mask"])}
        third = compiled.module(ids, compiled.module.encode(**open_to_all)).logits
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert difference(third, first) > 1e-3


def test_padding_of_the_decoder(exact):
    """A left-padded sequence of the decoder is that sequence alone."""
    module, compiled = exact("bart")
    inputs = ENCODERS["bart"].inputs(2, 8)
    given, ids = halves(inputs)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        got = compiled.module(ids, compiled.module.encode(**given), mask).logits
    alone = {k: v[:1] for k, v in given.items()} | {"decoder_input_ids": ids[:1, 3:]}
    assert difference(got[:1, 3:], logits(module, alone)) <= TOLERANCE


def test_gradients_reach_every_weight():
    compiled = mla_compile.compile(ENCODERS["bart"].build(), encoders=True, kv_rank=24, check=False)
    given, ids = halves(ENCODERS["bart"].inputs(2, 5))
    compiled.module(ids, compiled.module.encode(**given)).logits.square().mean().backward()
    missing = [name for name, p in compiled.module.named_parameters() if p.grad is None]
    assert not missing


def test_relative_biases_of_the_decoder_are_refused_with_their_reason():
    with pytest.raises(RefusedError) as caught:
        mla_compile.compile(ENCODERS["t5"].build(), encoders=True)
    assert "1 attention layers of the decoder" in caught.value.message
    assert "decoder.block.0.layer.0.SelfAttention" in caught.value.message
    assert "encoder.block" not in caught.value.message
    assert caught.value.message.endswith("[scores].")


def test_a_wrong_rewrite_leaves_no_result(monkeypatch):
    from mla_compile.passes import factorise

    def spoiled(program, site):
        weights = read(program, site)
        if site.cross:
            weights.value.weight.mul_(1.01)
        return weights

    read = factorise.read_site
    monkeypatch.setattr(factorise, "read_site", spoiled)
    with pytest.raises(VerificationError, match="differs from the original model"):
        mla_compile.compile(ENCODERS["bart"].build(), encoders=True, exact=True)


class TwoEncoders(nn.Module):
    """A decoder whose layers read different states."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transformers_model("BartForConditionalGeneration", "BartConfig", **BART)
        self.more = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        states = self.model.model.encoder(input_ids).last_hidden_state
        x = self.model.model.decoder.embed_tokens(decoder_input_ids)
        for i, layer in enumerate(self.model.model.decoder.layers):
            x = layer(x, encoder_hidden_states=states if i else torch.tanh(self.more(states)))
            x = x[0] if isinstance(x, tuple) else x
        return self.model.lm_head(x)


def test_a_decoder_that_reads_two_kinds_of_states_is_refused():
    given = {"input_ids": torch.randint(3, 90, (2, 6)), "decoder_input_ids": torch.randint(3, 90, (2, 5))}
    module = TwoEncoders().eval()
    with pytest.raises(RefusedError) as caught:
        mla_compile.compile(module, given, encoders=True, exact=True)
    assert caught.value.remedy


def test_command_line(tmp_path, capsys):
    folder, out = tmp_path / "whisper", tmp_path / "out" / "whisper.onnx"
    ENCODERS["whisper"].build().save_pretrained(folder)
    assert main(["convert", str(folder), "--out", str(out), "--method", "mha2mla"]) == 3
    assert "Pass --encoders to convert what its decoder caches" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--encoders"]) == 0
    table = capsys.readouterr().out
    assert table.count(f"cross cache {NUMBERS} numbers per encoder token") == LAYERS
    assert main(["convert", str(folder), "--out", str(out), "--encoders", "--cache-ratio", "0.25", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "cross cache bytes per encoder token" in shown
    assert "(25.00%)" in shown
    assert {p.name for p in out.parent.iterdir()} >= {"whisper.onnx", "whisper.encoder.onnx", "report.json"}
    assert main(["run", str(out), "--prompt", "x"]) == 2
    assert "is the decoder of an encoder-decoder" in capsys.readouterr().err
    assert main(["convert", str(folder), "--out", str(out), "--encoders", "--quiet"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_it_is_written_as_onnx_only(exact, tmp_path):
    _, compiled = exact("bart")
    with pytest.raises(UsageError, match="cannot be saved as a folder yet"):
        compiled.save(tmp_path / "folder")
    with pytest.raises(UsageError, match="not named like an ONNX file"):
        compiled.to_onnx(tmp_path / "model")


# ---- encoders that subsample


class _Heads(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.causal = causal

    def forward(self, x: Tensor, states: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(y).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, states), (self.v, states))
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Subsampling(nn.Module):
    """A convolution makes every second spectrum a token, so that lengths of states are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, WIDTH, 3, stride=2, padding=1)
        self.encoder, self.own, self.cross = _Heads(False), _Heads(True), _Heads(False)
        self.tokens, self.head = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, 40)

    def forward(self, features: Tensor, decoder_ids: Tensor) -> Tensor:
        states = self.conv(features.mT).mT
        states = states + self.encoder(states, states)
        x = self.tokens(decoder_ids)
        x = x + self.own(x, x)
        return self.head(x + self.cross(x, states))


def subsampling():
    torch.manual_seed(0)
    return Subsampling().eval(), (torch.randn(2, 10, 8), torch.zeros(2, 7, dtype=torch.long))


def test_an_encoder_may_subsample(tmp_path):
    """Lengths that are even and odd, and were not exported with."""
    module, example = subsampling()
    compiled = mla_compile.compile(module, example, encoders=True, exact=True)
    for length in (3, 9, 16):
        features, ids = torch.randn(2, length, 8), torch.randint(0, 40, (2, 5))
        with torch.no_grad():
            got = compiled.module(ids, compiled.module.encode(features=features)).logits
            assert difference(got, module(features, ids)) <= TOLERANCE
    compiled.to_onnx(tmp_path / "model.onnx")


class SubsamplingWithMask(Subsampling):
    """The mask of the spectra tells how many tokens are made of those that are no padding."""

    def forward(self, features: Tensor, attention_mask: Tensor, decoder_ids: Tensor) -> Tensor:
        states = self.conv((features * attention_mask[..., None]).mT).mT
        length = (attention_mask.sum(-1) + 1) // 2
        seen = (torch.arange(states.shape[1]) < length[:, None])[:, None, None]
        states = states + self.encoder(states, states, seen)
        x = self.tokens(decoder_ids)
        x = x + self.own(x, x)
        return self.head(x + self.cross(x, states, seen))


def test_a_mask_that_is_subsampled_is_named_with_what_can_be_done():
    torch.manual_seed(0)
    example = torch.randn(2, 10, 8), torch.ones(2, 10, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    with pytest.raises(RefusedError) as caught:
        mla_compile.compile(SubsamplingWithMask().eval(), example, encoders=True, exact=True)
    said = (
        "cross: the mask input 'attention_mask' has 7 numbers for 4 keys, which are subsampled; no mask made of it is "
        "read: export without it, for inputs without padding [mask]"
    )
    assert said in caught.value.message
    assert "is causal, and of some layers not understood (encoder: the mask input" in caught.value.message


class MaskOfStates(Subsampling):
    """The mask of the encoder's states is an input, of which everything reads the batch size."""

    def forward(self, features: Tensor, states_mask: Tensor, decoder_ids: Tensor) -> Tensor:
        states = self.conv(features.mT).mT
        states = states + self.encoder(states, states, states_mask[:, None, None].bool())
        x = self.tokens(decoder_ids)
        return self.head(x + self.own(x, x) + self.cross(x, states))


def test_a_mask_whose_size_alone_is_read_hides_nothing():
    torch.manual_seed(0)
    example = torch.randn(2, 10, 8), torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    _, found = mla_compile.inspect(MaskOfStates().eval(), example)
    assert [site.path for site in found.sites] == ["own"]


def test_a_decoder_that_cannot_be_exported_by_itself_is_refused(monkeypatch):
    module, example = subsampling()
    program = capture_any(module, example)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a size is another")

    monkeypatch.setattr("torch.export.export", fails)
    with pytest.raises(RefusedError, match=r"decoder cannot be exported by itself \(a size is another\)"):
        mla_compile.compile(program.exported, encoders=True, exact=True)
