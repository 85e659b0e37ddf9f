"""What is given for a model, a text and a place: all of it is looked at before the model is read, and inputs first."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import models
import pytest
import torch
from torch import fx, nn

import mla_compile
from mla_compile import api
from mla_compile.cli import main
from mla_compile.config import CompileConfig
from mla_compile.errors import LoadError, MlaCompileError
from mla_compile.runtime.module import LatentModel
from mla_compile.sources import frontend

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
IDS = (torch.zeros(2, 8, dtype=torch.long),)


class Bag(nn.Module):
    """A language model without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(models.VOCABULARY, 8), nn.Linear(8, models.VOCABULARY)

    def forward(self, ids):
        return self.head(self.table(ids))


def empty() -> nn.Module:
    with torch.device("meta"):
        return Bag()


def traced() -> nn.Module:
    return torch.jit.trace(Bag(), IDS[0])


@pytest.mark.filterwarnings("ignore")  # torch says that TorchScript is old
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: lambda ids: ids, "is a function or another callable ('<lambda>')"),
        (lambda: Bag, "Bag is a class, not a model. Pass an instance of it"),
        (
            lambda: Bag().state_dict(),
            "is a mapping of 3 tensors: weights, but nothing that uses them. Pass the nn.Module",
        ),
        (traced, "is TorchScript, or has some in it (TopLevelTracedModule), whose graph cannot be rewritten."),
        (lambda: nn.Sequential(traced()), "or has some in it (TopLevelTracedModule), whose graph cannot"),
        (lambda: torch.compile(Bag()), "went through torch.compile, or a part of it did"),
        (lambda: None, "is of type NoneType, which is none that can be read. Pass an nn.Module"),
        (empty, "3 of 3 parameters and buffers of Bag have no values, 'table.weight' among them"),
    ],
    ids=["function", "class", "weights", "TorchScript", "with TorchScript", "compiled", "nothing", "meta"],
)
def test_what_is_no_model(make, told):
    model = make()
    for command in (api.compile, api.inspect):
        with pytest.raises(LoadError) as refused:
            command(model, IDS)
        assert told in str(refused.value)


@pytest.fixture
def unread(monkeypatch):
    """Nothing that fails in the test may have read a model."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr(frontend, "load_any", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def said(*words: object) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([str(w) for w in words]) == 2
    return err.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with texts and a target that exists."""
    monkeypatch.chdir(tmp_path)
    for name, content in {"text.txt": "One day.", "empty.txt": "", "taken.onnx": "mine"}.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nosuch --out x.onnx", "There is no file or folder 'nosuch', and none of that name came from the hub"),
        ("./nosuch --out x.onnx", "There is no file or folder './nosuch'."),
        ("plan ./nosuch", "There is no file or folder './nosuch'."),
        ("./nosuch --out taken.onnx --exact", "There is no file or folder './nosuch'."),
        ("{tiny} --out taken.onnx --calibration none.txt", "There is no text file 'none.txt'."),
        ("{tiny} --out taken.onnx --calibration text.txt", "'taken.onnx' exists already."),
        ("{tiny} --out x.onnx --exact --finetune none.txt", "There is no text file 'none.txt'."),
        ("{tiny} --out x.onnx --exact --finetune empty.txt", "'empty.txt' holds no text."),
        ("{tiny} --out x.onnx --exact --finetune .", "'.' is a folder, not a text file."),
        ("{tiny} --out x.onnx --exact --tokenizer nosuch", "No tokenizer could be loaded from 'nosuch'"),
        ("plan {tiny} --exact --tokenizer nosuch", "No tokenizer could be loaded from 'nosuch'"),
        ("{tiny} --out {tiny} --exact", "is the folder of the original model. Choose another folder."),
        ("{tiny} --out {tiny} --exact --force", "is the folder of the original model. Choose another folder."),
        ("eval {tiny} ./nosuch --text text.txt", "There is no file or folder './nosuch'."),
        ("eval {tiny} nosuch.plan --text text.txt", "There is no file 'nosuch.plan'. Build an engine first"),
        ("eval {tiny} nosuch.onnx --text text.txt", "There is no file 'nosuch.onnx'. Convert a model first"),
        ("eval {tiny} --original ./nosuch --text text.txt", "There is no file or folder './nosuch'."),
        ("bench taken.onnx --against ./nosuch", "There is no file or folder './nosuch'."),
        ("finetune . --teacher ./nosuch --data text.txt --out out", "There is no file or folder './nosuch'."),
        ("{tiny} --out x.onnx --calibration /dev/null", "'/dev/null' is no regular file but a pipe or a device"),
    ],
)
def test_what_is_missing_is_noticed_before_the_model_is_read(words, told, place):
    before = sorted(place.iterdir())
    assert told in said(*words.format(tiny=TINY).split(), "-q")
    assert sorted(place.iterdir()) == before


@pytest.mark.usefixtures("unread")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_no_text(place):
    os.mkfifo(place / "pipe.txt")
    assert "is no regular file but a pipe" in said(TINY, "--out", "x.onnx", "--calibration", "pipe.txt", "-q")


@pytest.mark.parametrize("weights", [True, False], ids=["with weights", "without"])
def test_a_configuration_is_no_model(place, weights):
    for name in ("config.json", "tokenizer_config.json"):
        (place / name).write_text("{}")
        if weights:
            (place / "model.safetensors").write_bytes(b"")
        with pytest.raises(MlaCompileError) as refused:
            api.compile(place / name, exact=True)
        assert refused.value.message.startswith(f"'{place / name}' holds no weights")
        assert refused.value.remedy.startswith(
            f"Give the folder: {place}." if weights else "Give a folder with weights"
        )


LONG = "n" * 300


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    "call",
    [
        lambda: api.compile(LONG),
        lambda: api.compile(TINY, exact=True, out=LONG),
        lambda: api.compile(TINY, exact=True, out=f"{LONG}/x.onnx"),
        lambda: api.compile(TINY, calibration=LONG),
        lambda: api.compile(TINY, exact=True, tokenizer=LONG),
        lambda: api.inspect(LONG),
        lambda: api.plan(LONG, CompileConfig(exact=True)),
        lambda: api.load(LONG),
        lambda: mla_compile.save(LatentModel(fx.GraphModule({}, fx.Graph()), []), "x", like=LONG),
    ],
    ids=["model", "out", "out in", "calibration", "tokenizer", "inspect", "plan", "load", "save"],
)
def test_a_name_that_is_too_long_is_refused(call, place):
    with pytest.raises(MlaCompileError, match=f"^'{LONG}.*' cannot be used .*too long.*Give another path"):
        call()


@pytest.mark.usefixtures("unread")
def test_the_tokenizer_of_an_archive_is_missed_before_it_is_read(place):
    (place / "model.pt2").write_bytes(b"")
    for call in (api.compile, api.plan):
        with pytest.raises(LoadError, match="The model comes without a tokenizer"):
            call("model.pt2", config=CompileConfig(), calibration="text.txt")
