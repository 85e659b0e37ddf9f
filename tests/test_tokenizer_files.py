"""Every file that some tokenizer is read from is found, and goes beside a result."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from mla_compile.artifacts.companions import copy_assets, read_assets
from mla_compile.disk.writing import moved_into, sizes_in
from mla_compile.errors import LoadError
from mla_compile.program import Assets
from mla_compile.text.corpus import load_tokenizer
from mla_compile.text.tokenizer_files import tokenizer_files

NAMED = re.compile(r'^VOCAB_FILES_NAMES = \{(.*?)\}|^(?:\w+_FILE) = ("[^"]*")', re.MULTILINE | re.DOTALL)


def names_of_transformers() -> set[str]:
    """What its modules call the files of their tokenizers."""
    root = Path(importlib.util.find_spec("transformers").origin).parent
    said = [m[1] or m[2] for file in root.rglob("tokenization_*.py") for m in NAMED.finditer(file.read_text("utf-8"))]
    return {name for part in said for name in re.findall(r'"([^"]+\.\w+)"', part)}


def test_what_transformers_calls_its_files_is_known(tmp_path):
    names = names_of_transformers()
    assert {"source.spm", "spiece.model", "tokenizer.json", "normalizer.json", "special_tokens_map.json"} <= names
    for name in names:
        (tmp_path / name).touch()
    assert {path.name for path in tokenizer_files(tmp_path)} == names


def test_all_of_a_tokenizer_goes_beside_a_result(tmp_path):
    """Again where there was one before, with templates of its own."""
    source, target = tmp_path / "source", tmp_path / "target"
    templates = "additional_chat_templates"
    kept = ["source.spm", "target.spm", "tokenizer.model.v3", "vocab.json", f"{templates}/tools.jinja"]
    for name in (*kept, "model.safetensors", "README.md", "training_args.json", f"{templates}/notes.md"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (target / templates).mkdir(parents=True)
    (target / templates / "own.jinja").touch()
    for _ in range(2):
        with moved_into(target) as hidden:
            copy_assets(Assets(str(source)), hidden)
            assert [*sizes_in(hidden)] == sorted(kept)
    assert [*sizes_in(target)] == sorted([*kept, f"{templates}/own.jinja"])
    assert all((target / name).read_text() == name for name in kept)
    assert read_assets(target).local_folder == target


def test_a_folder_with_a_file_beside_a_tokenizer_only_holds_none(tmp_path):
    (tmp_path / "chat_template.jinja").touch()
    with pytest.raises(LoadError, match="There is no tokenizer in the folder"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "spiece.model").touch()
    with pytest.raises(LoadError, match="No tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
