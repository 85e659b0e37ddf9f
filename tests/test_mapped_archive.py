"""A saved module's weights are mapped from its archive: the same numbers, in memory only while they are used."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import models
import pytest
import torch
from torch import nn

from mla_compile import api
from mla_compile.artifacts.mapped_archive import load_mapped
from mla_compile.artifacts.runnable import mapped_scorer, module_scorer
from mla_compile.errors import LoadError

WIDTH, DEEP = 1024, 8
"""32 MiB of weights, and as many again in a table that is tied to the head."""


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8 * WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEEP))
        self.head = nn.Linear(WIDTH, 8 * WIDTH, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))

    def forward(self, x):
        x = self.table(x) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def memory(kind: str) -> float:
    """Of this process, in MiB."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "model.pt2"
    torch.export.save(torch.export.export(Deep().eval(), (torch.zeros(2, 8, dtype=torch.long),)), path)
    return path


def test_it_is_what_torch_reads(archive):
    got, expected = load_mapped(archive), torch.export.load(archive)
    assert got.state_dict.keys() == expected.state_dict.keys()
    for name, value in expected.state_dict.items():
        assert torch.equal(got.state_dict[name], value)
        assert type(got.state_dict[name]) is type(value)
        assert got.state_dict[name].requires_grad == value.requires_grad
    assert got.state_dict["head.weight"].data_ptr() == got.state_dict["table.weight"].data_ptr()
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(got.module()(ids), expected.module()(ids))


def test_a_model_that_is_written_again_is_as_long(archive, tmp_path):
    """Tied weights included, whose record is one."""
    again = tmp_path / "model.pt2"
    torch.export.save(load_mapped(archive), again)
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(again) as new:
        weights = [
            {info.filename: (info.file_size, info.CRC) for info in file.infolist() if "/weights/" in info.filename}
            for file in (old, new)
        ]
    assert weights[0] == weights[1]
    assert all(value.nbytes == value.untyped_storage().nbytes() for value in load_mapped(archive).state_dict.values())


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="pages are told by Linux")
def test_reading_it_takes_no_memory(archive):
    load_mapped(archive)  # what torch imports to read one stays
    anonymous, of_files = memory("RssAnon"), memory("RssFile")
    kept = load_mapped(archive)
    size = archive.stat().st_size / 2**20
    assert size > 60
    assert memory("RssAnon") - anonymous < size / 8
    assert memory("RssFile") - of_files < size / 8
    assert kept.state_dict["table.weight"].numel() == 8 * WIDTH**2


def test_what_is_written_to_a_weight_is_not_written_to_the_file(archive):
    before = archive.read_bytes()
    weight = load_mapped(archive).state_dict["layers.0.weight"]
    with torch.no_grad():
        weight.add_(1)
    assert archive.read_bytes() == before
    again = load_mapped(archive).state_dict["layers.0.weight"]
    assert torch.equal(again + 1, weight)


def test_a_damaged_weight_is_told(archive, tmp_path):
    damaged = tmp_path / "model.pt2"
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(LoadError, match="is damaged: model/data/weights/"):
        load_mapped(damaged)


def test_an_archive_that_is_laid_out_otherwise_is_read_by_torch(archive, tmp_path):
    packed = tmp_path / "model.pt2"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    got, expected = load_mapped(packed), load_mapped(archive)
    assert all(torch.equal(value, got.state_dict[name]) for name, value in expected.state_dict.items())


def test_logits_are_the_same_with_a_weight_at_a_time(programs, tmp_path):
    captured = programs["llama-gqa"]
    api.compile(captured.module, models.example(captured.module), method="mha2mla", check=False).save(
        tmp_path / "saved"
    )
    model, ids = api.load(tmp_path / "saved"), models.tokens(2, 12, seed=1)
    with torch.inference_mode():
        assert torch.equal(mapped_scorer(model)(ids), module_scorer(model)(ids))
