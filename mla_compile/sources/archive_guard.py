"""``torch.export`` archives from anybody: what would run code of theirs is refused before torch reads it.

``torch.export.load`` is for archives that are trusted. Where reading something as plain data fails it unpickles it; it
evaluates sizes as Python, takes any function below ``torch`` by its name for an operator, and loads compiled libraries.
Nothing of that is in what ``torch.export.save`` writes of a model.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from mla_compile.errors import LoadError

__all__ = ["load_data_only"]

_FORCED, _LIFTED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_OBJECTS = ("custom_obj_", "opaque_obj_")
"""How records begin that hold objects of TorchScript and Python."""
_LIBRARIES = "data/aotinductor/"
_CLASS = re.compile(r"[A-Z]\w*|floor|ceiling|sqrt|exp|log")
"""What sizes are calls of: classes of sympy and torch."""
_WRAPPER = re.compile(r"torch\._functorch\.predispatch\._\w+")
_PLAIN = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.Tuple),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def load_data_only(file: Path | io.BytesIO, name: str) -> ExportedProgram:
    """Read an archive in which nothing is code.

    Args:
        file: The archive.
        name: What to call it in an error.

    Raises:
        LoadError: Something in it would run.
        Exception: Whatever torch raises for a file that it cannot read.
    """
    if found := next(_code(file), None):
        raise _refusal(name, found)
    if isinstance(file, io.BytesIO):
        file.seek(0)
    try:
        with _without_unpickling():
            return torch.export.load(file)
    except pickle.UnpicklingError as error:
        raise _refusal(name, "a pickled object") from error


def _refusal(name: str, found: str) -> LoadError:
    return LoadError(
        f"'{name}' holds {found}, which would run code when it is read.",
        "Export the model again, or pass --unsafe-load if you trust the file.",
    )


def _code(file: Path | io.BytesIO) -> Iterator[str]:
    """What in an archive would run code."""
    plain: set[str] = set()  # a size or an operator occurs many times
    for record, content in _records(file):
        if _LIBRARIES in record:
            yield f"a compiled library ('{record}')"
        elif record.lower().endswith(".json"):
            for kind, words in _words(json.loads(content)):
                if words not in plain and not _HARMLESS[kind](words):
                    yield f"{_KINDS[kind]} {words[:80]!r}"
                plain.add(words)


def _records(file: Path | io.BytesIO) -> Iterator[tuple[str, bytes]]:
    """Records as Python's reader sees them, and then as torch's own does, which need not be the same ones."""
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            yield info.filename, archive.read(info) if info.filename.lower().endswith(".json") else b""
    if isinstance(file, io.BytesIO):
        file.seek(0)
    try:
        reader = torch._C.PyTorchFileReader(str(file) if isinstance(file, Path) else file)
    except RuntimeError:  # of another form: older archives, which torch reads by Python's reader
        return
    for name in reader.get_all_records():
        yield name, reader.get_record(name) if name.lower().endswith(".json") else b""


def _words(content: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - JSON
    """Every operator, size and record that is named in JSON, however deep."""
    stack = [content]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from ((k, v) for k, v in item.items() if k in _KINDS and isinstance(v, str))
            stack += item.values()
        elif isinstance(item, list):
            stack += item


def _is_operator(target: str) -> bool:
    """Whether a target is an operator, or nothing that torch knows: it refuses that itself."""
    from torch._export.serde.serialize import _SYM_OPS

    if target.startswith("#") or _WRAPPER.fullmatch(target):  # of a registered extension; transforms' own
        return True
    root, *names = target.split(".")
    if root.startswith("torch"):
        found: Any = torch
    elif root.startswith("_operator"):
        import operator as found
    elif root.startswith("math"):
        import math as found
    else:
        return True
    for name in names:
        if not hasattr(found, name):
            return True
        found = getattr(found, name)
    return isinstance(found, torch._ops.OpOverload | torch._ops.HigherOrderOperator) or (
        getattr(found, "__hash__", None) is not None and found in _SYM_OPS
    )


def _is_size(words: str) -> bool:
    """Whether a size is arithmetic of symbols and numbers, as sympy prints it."""
    try:
        tree = ast.parse(words.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    named = set()
    for node in ast.walk(tree):
        if not isinstance(node, _PLAIN) or (isinstance(node, ast.Name) and node.id.startswith("_")):
            return False
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not _CLASS.fullmatch(node.func.id):
                return False
            if node.func.id in ("Symbol", "Float"):  # whose strings are names and digits, and nothing to evaluate
                named |= {id(argument) for argument in node.args}
    return all(
        id(node) in named
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def _is_tensor(record: str) -> bool:
    return not record.startswith(_OBJECTS)


_HARMLESS = {"target": _is_operator, "expr_str": _is_size, "path_name": _is_tensor}
_KINDS = {"target": "the function", "expr_str": "the size", "path_name": "the object"}


@contextlib.contextmanager
def _without_unpickling() -> Iterator[None]:
    """Let torch read pickles as plain data only, also where it is told to unpickle them."""
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _LIFTED)}
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})
