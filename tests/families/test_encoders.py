"""Encoders and encoder-decoders: every attention layer is told for what it is, and none is taken for another."""

from __future__ import annotations

import json

import pytest
import torch

import mla_compile
from families import DIM, HEADS
from families.encoders import ENCODERS, Encoder
from mla_compile.cli import main
from mla_compile.errors import MlaCompileError, RefusedError
from mla_compile.passes.recognise import Recognition
from mla_compile.report import summarise_site
from mla_compile.site import AttentionSite, Rejection


@pytest.fixture(scope="module")
def looked_at():
    """What is found in each model, which is exported once."""
    found: dict[str, Recognition] = {}

    def look(name: str) -> Recognition:
        if name not in found:
            family = ENCODERS[name]
            given = family.inputs(2, 7) if family.given else None
            found[name] = mla_compile.inspect(family.build(), given)[1]
        return found[name]

    return look


def in_order(found: Recognition) -> list[AttentionSite | Rejection]:
    return sorted((*found.sites, *found.rejections), key=lambda layer: layer.index)


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_are_what_the_configuration_says(looked_at, name):
    expected, layers = ENCODERS[name].layers, in_order(looked_at(name))
    assert [layer.index for layer in layers] == list(range(len(expected)))
    for layer, wanted in zip(layers, expected, strict=True):
        assert layer.path == wanted.path
        if wanted.code is not None:
            assert (layer.code.value, layer.site) == (wanted.code, None)
            continue
        site = layer if isinstance(layer, AttentionSite) else layer.site
        assert isinstance(layer, AttentionSite) == (wanted.mask == "causal")
        assert (site.kind.value, site.padding) == (wanted.mask, wanted.padding)
        assert (site.heads, site.kv_heads, site.qk_dim, site.v_dim) == (HEADS, HEADS, DIM, DIM)
        assert site.rope.layout == ("half" if "rotary" in name else "none")
        gains = torch.tensor(site.query.gain).double() * torch.tensor(site.key.gain).double() * site.scale
        torch.testing.assert_close(gains, torch.full_like(gains, wanted.scale), rtol=1e-6, atol=0)
        assert site.error < 1e-6


@pytest.mark.parametrize("name", ["bart", "whisper", "own-perceiver"])
def test_cross_attention_reads_two_sequences(looked_at, name):
    """Keys and values of every layer come from one activation, queries from one of their own each."""
    cross = [r.site for r in looked_at(name).rejections if r.site is not None and r.site.cross]
    assert len({site.key.source for site in cross}) == 1
    assert all(site.key.source == site.value.source != site.query.source for site in cross)
    assert len({site.query.source for site in cross}) == len(cross)


def test_reasons_and_caches_are_told(looked_at):
    rows = [summarise_site(layer) for layer in in_order(looked_at("bart"))]
    encoder, decoder, cross, *_ = rows
    numbers = 2 * HEADS * DIM
    assert (encoder["kind"], encoder["cache"], encoder["elements_per_token"]) == ("bidirectional", "no cache", 0)
    assert "nothing is cached" in encoder["reason"]
    assert (decoder["kind"], decoder["cache"]) == ("causal", f"{numbers} numbers per token")
    assert "rejected" not in decoder
    assert (cross["kind"], cross["cache"]) == ("cross", f"cross cache {numbers} numbers per encoder token")
    assert (cross["elements_per_token"], cross["elements_per_encoder_token"]) == (0, numbers)


def saved(family: Encoder, folder) -> str:
    family.build().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["bert", "vit", "whisper", "t5"])
def test_a_folder_is_read_as_what_it_is(tmp_path, capsys, name):
    assert main(["inspect", saved(ENCODERS[name], tmp_path / name), "--json"]) == 3
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert [(row["path"], row.get("mask", ""), row.get("rejected")) for row in rows] == [
        (
            layer.path,
            layer.mask,
            {"causal": None, "bidirectional": "mask", "cross": "cross"}.get(layer.mask, layer.code),
        )
        for layer in ENCODERS[name].layers
    ]


def test_an_archive_of_an_encoder_is_inspected(tmp_path, capsys):
    family = ENCODERS["bert"]
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    given = family.inputs(2, 7)
    exported = torch.export.export(family.build(), (), given, dynamic_shapes=dict.fromkeys(given, dynamic))
    torch.export.save(exported, tmp_path / "bert.pt2")
    assert main(["inspect", str(tmp_path / "bert.pt2")]) == 3
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(family.layers)
    for line, layer in zip(table[1:], family.layers, strict=True):
        assert all(word in line for word in (layer.path, "bidirectional", "no cache", f"{HEADS} q / {HEADS} kv of"))


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "whisper", "bart"])
def test_without_being_asked_nothing_but_causal_models_is_converted(name):
    with pytest.raises(RefusedError) as caught:
        mla_compile.compile(ENCODERS[name].build(), method="mha2mla")
    kinds = {layer.mask for layer in ENCODERS[name].layers} - {"causal"}
    assert all(kind in caught.value.message for kind in kinds)


def test_a_module_that_takes_no_ids_is_refused_in_a_sentence():
    family = ENCODERS["own-torch-encoder"]
    with pytest.raises(MlaCompileError, match="float32 of rank 3"):
        mla_compile.compile(family.build(), family.inputs(2, 7), method="mha2mla")
