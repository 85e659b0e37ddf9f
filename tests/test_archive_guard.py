"""Archives that would run code of theirs, by every way that torch's reader has for it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doors import Hostile, knock
from torch import nn
from torch.export import Dim

import mla_compile
from mla_compile.errors import LoadError
from mla_compile.sources.archive_guard import _is_operator, _is_size, load_data_only
from mla_compile.sources.model_files import _read_archive

Change = Callable[[str, bytes], bytes]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("archives") / "good.pt2"
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    torch.export.save(torch.export.export(Table().eval(), (torch.zeros(2, 5).long(),), dynamic_shapes=shapes), path)
    return path


def changed(good: Path, path: Path, change: Change, more: dict[str, bytes] | None = None) -> Path:
    """An archive with records changed, and others added."""
    with zipfile.ZipFile(good) as real, zipfile.ZipFile(path, "w") as written:
        for info in real.infolist():
            written.writestr(info.filename, change(info.filename, real.read(info)))
        for name, content in (more or {}).items():
            written.writestr(f"good/{name}", content)
    return path


def torch_pickle(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def in_model(edit: Callable[[dict], None]) -> Change:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        model = json.loads(content)
        edit(model)
        return json.dumps(model).encode()

    return change


def in_records(part: str, content: Callable[[bytes], bytes]) -> Change:
    return lambda name, old: content(old) if part in name else old


def hostile(way: str, mark: Path) -> tuple[Change, dict[str, bytes]]:
    """A change that makes an archive run something, and records it takes."""
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"

    def sizes(model: dict) -> None:
        model["graph_module"]["graph"]["tensor_values"]["ids"]["sizes"][0]["as_expr"]["expr_str"] = code

    def function(model: dict) -> None:
        node = model["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.os.system"
        node["inputs"] = [{"name": "", "arg": {"as_string": f"touch {mark}"}, "kind": 1}]

    def weights(old: bytes) -> bytes:
        listed = json.loads(old)
        for entry in listed["config"].values():
            entry["use_pickle"] = True
        return json.dumps(listed).encode()

    constants = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    pickled = torch_pickle(Hostile(mark))
    match way:
        case "inputs":
            return in_records("sample_inputs", lambda _: torch_pickle(((Hostile(mark),), {}))), {}
        case "weights":
            return (
                lambda name, old: weights(old) if "weights_config" in name else pickled if "weight_" in name else old,
                {},
            )
        case "constants":
            listed = json.dumps({"config": {"thing": constants}}).encode()
            change = in_records("constants_config", lambda _: listed)
            return change, {"data/constants/opaque_obj_0": pickle.dumps(Hostile(mark))}
        case "size":
            return in_model(sizes), {}
        case "function":
            return in_model(function), {}
    return lambda _, old: old, {"data/aotinductor/model/model.so": b"\x7fELF"}


WAYS = {
    "inputs": "a pickled object",
    "weights": "a pickled object",
    "constants": "the object 'opaque_obj_0'",
    "size": "the size",
    "function": "the function 'torch.os.system'",
    "library": "a compiled library",
}


@pytest.mark.parametrize(("way", "told"), WAYS.items())
def test_nothing_in_an_archive_is_run(way, told, good, tmp_path, capsys):
    mark, path = tmp_path / "mark", tmp_path / "model.pt2"
    changed(good, path, *hostile(way, mark))
    with pytest.raises(LoadError, match=rf"holds {told}.* would run code"):
        _read_archive(path, unsafe=False)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(path, folder / "model.pt2")
    (folder / "mla_config.yaml").write_text("{}")
    with pytest.raises(LoadError, match=r"would run code|could not be read"):
        mla_compile.load(folder)
    assert knock("inspect", path, codes={2})
    assert not mark.exists()


@pytest.mark.parametrize("way", ["inputs", "size"])
def test_torch_alone_would_run_it(way, good, tmp_path, monkeypatch):
    """Else the test above shows nothing."""
    mark = tmp_path / "mark"
    path = changed(good, tmp_path / "model.pt2", *hostile(way, mark))
    monkeypatch.setattr(logging, "raiseExceptions", False)  # its own line about that cannot be formatted
    with contextlib.suppress(Exception):  # which comes afterwards
        torch.export.load(path)
    assert mark.exists()


def test_what_torch_writes_is_read(good, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    read = load_data_only(good, "good")
    ids = torch.arange(6).view(2, 3)
    assert torch.equal(read.module()(ids), torch.export.load(good).module()(ids))
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    "words",
    [
        "Symbol('s23', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))",
        "Max(Integer(1), FloorDiv(Symbol('s1', integer=True), Integer(64)))",
        "Float('0.5', precision=53)",
        "floor(Rational(1, 3))",
        "s0*2 - 1",
    ],
)
def test_sizes_are_arithmetic(words):
    assert _is_size(words)


@pytest.mark.parametrize(
    "words",
    [
        "eval('1')",
        "exec('1')",
        "open('file', 'w')",
        "S('eval(1)')",
        "Max('eval(1)', 1)",
        "Symbol(S('eval(1)'))",
        "Symbol('x', **dict(a='b'))",
        "Symbol('x').func",
        "[x for x in 'ab']",
        "(lambda: 1)()",
        "Integer(1)(2)",
        "__import__",
        "x[0]",
        "f'{x}'",
        "a = 1",
        "",
    ],
)
def test_sizes_are_nothing_else(words):
    assert not _is_size(words)


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.linear.default",
        "torch.ops.aten.__and__.Tensor",
        "torch.ops.higher_order.cond",
        "_operator.add",
        "math.trunc",
        "torch.sym_max",
    ],
)
def test_operators_are_known(target):
    assert _is_operator(target)


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.hub.load",
        "torch.load",
        "torch.ops.load_library",
        "torch.ops.import_module",
        "torch.ops.__class__",
        "torchvision.os.system",
        "_operator.methodcaller",
        "_operator.attrgetter",
        "_operator.call",
        "math.__class__",
    ],
)
def test_functions_are_no_operators(target):
    assert not _is_operator(target)
