"""Text of datasets: a stub of the library for what it may do, and the library itself on a folder."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mla_compile.config import make_config
from mla_compile.errors import LoadError, UsageError
from mla_compile.text.calibration import cut_windows, read_text
from mla_compile.text.corpus import open_documents
from mla_compile.text.dataset import is_dataset, stream_documents


@pytest.fixture
def library(monkeypatch):
    """Stand in for ``datasets``: give it rows, or a function of the call's arguments."""

    def install(rows):
        def load_dataset(*names, **settings):
            return rows(*names, **settings) if callable(rows) else rows

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    return install


@pytest.mark.parametrize(
    ("source", "names", "split"),
    [
        ("hf:stories", ("stories",), "train"),
        ("hf:me/stories:test", ("me/stories",), "test"),
        ("hf:me/stories:small:train[:10%]", None, None),
        ("hf:me/stories:small:validation", ("me/stories", "small"), "validation"),
        ("hf:./folder:train", ("./folder",), "train"),
    ],
)
def test_a_source_names_dataset_configuration_and_split(library, source, names, split):
    calls = []

    def load_dataset(*given, **settings):
        calls.append((given, settings))
        return [{"text": "one"}]

    library(load_dataset)
    if names is None:
        with pytest.raises(UsageError, match="hf:NAME:CONFIG:SPLIT"):
            stream_documents(source)
        return
    assert [*stream_documents(source)] == ["one"]
    assert calls == [(names, {"split": split, "streaming": True})]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_parquet_file_is_read_by_the_library(library, kind):
    calls = []

    def load_dataset(*given, **settings):
        calls.append((given, settings))
        return [{"text": "one"}]

    library(load_dataset)
    assert [*read_text(kind("folder/part-0.parquet"))] == ["one"]
    assert calls == [(("parquet",), {"data_files": "folder/part-0.parquet", "split": "train", "streaming": True})]


@pytest.mark.parametrize("source", ["hf:", "hf::train", "hf:a:", "hf:a:b:c:d"])
def test_a_source_that_names_nothing_is_refused(library, source):
    library([])
    with pytest.raises(UsageError, match="does not name a dataset"):
        stream_documents(source)


def test_files_are_no_datasets():
    assert is_dataset("hf:x")
    assert not any(map(is_dataset, ("x.txt", "hf", "./hf:x", "C:/hf:x")))


def test_the_column_is_the_one_called_text_or_the_only_string(library):
    library([{"id": "7", "text": "one"}, {"id": "8", "text": None}, {"id": "9", "text": " "}, {"id": "9", "text": "2"}])
    assert [*stream_documents("hf:a")] == ["one", "2"]
    library([{"id": 7, "story": "one"}, {"id": 8, "story": "two"}])
    assert [*stream_documents("hf:a")] == ["one", "two"]


def test_a_row_without_the_column_is_passed_over(library):
    library([{"text": "one"}, {"other": "two"}, {"text": "three"}])
    assert [*stream_documents("hf:a")] == ["one", "three"]


@pytest.mark.parametrize("row", [{"question": "a", "answer": "b", "id": 1}, {"id": 1, "tokens": [1, 2]}])
def test_columns_that_leave_a_doubt_are_named(library, row):
    library([row])
    with pytest.raises(LoadError) as caught:
        stream_documents("hf:a")
    assert ", ".join(sorted(row)) in caught.value.message


def test_an_empty_dataset_is_refused(library):
    library([])
    with pytest.raises(LoadError, match="holds no text"):
        stream_documents("hf:a")


def test_what_the_library_says_is_told_in_one_sentence(library):
    def missing(*names, **settings):
        raise ValueError("Bad split: tset. Available splits: ['train']\nand a page more")

    library(missing)
    with pytest.raises(LoadError) as caught:
        stream_documents("hf:a:tset")
    assert "'hf:a:tset' cannot be read (Bad split: tset. Available splits: ['train'])." in caught.value.message
    assert "\n" not in str(caught.value)


def test_a_connection_that_breaks_later_is_told_as_well(library):
    def rows():
        yield {"text": "one"}
        raise ConnectionError

    library(rows())
    documents = iter(stream_documents("hf:a"))
    assert next(documents) == "one"
    with pytest.raises(LoadError, match=r"cannot be read \(ConnectionError\)"):
        next(documents)


def test_asked_again_a_dataset_begins_again(library, tmp_path):
    """Whoever compares it, or has read of it, takes nothing of those who read it next."""
    library([{"text": "one"}, {"text": "two"}])
    documents = read_text("hf:a")
    (tmp_path / "a.txt").write_text("three")
    file = open_documents(tmp_path / "a.txt")
    assert (file == documents, documents == file, file == ["three"]) == (False, False, False)
    assert next(iter(documents)) == "one"
    assert [*documents] == [*documents] == ["one", "two"]


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LoadError, match=r"pip install 'mla-compile\[data\]'"):
        stream_documents("hf:a")


class Letters:
    """A tokenizer of one token per character."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [ord(c) % 97 for c in text]}


def test_no_more_is_read_than_is_needed(library, programs):
    """Of a dataset without end: 4 windows to calibrate on and 16 to hold out, of 8 tokens, a document having 10."""
    read = []

    def rows():
        for number in itertools.count():
            read.append(number)
            yield {"text": f"{number:010d}"}

    library(rows())
    config = make_config(calibration_tokens=32, seq_len=8)
    text = cut_windows(programs["llama-gqa"].program, read_text("hf:endless"), Letters(), config)
    assert text.calibration.shape == (4, 8)
    assert text.separate
    assert len(read) == (4 + 16) * 8 // 10


def test_a_folder_through_the_library_itself(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [{"text": f"story {n}"} for n in range(5)]
    (tmp_path / "tales").mkdir()
    for name in ("train", "test"):
        content = "\n".join(json.dumps(line) for line in (lines if name == "train" else lines[:2]))
        (tmp_path / "tales" / f"{name}.jsonl").write_text(content)
    assert [*read_text(f"hf:{tmp_path / 'tales'}")] == [line["text"] for line in lines]
    assert [*read_text(f"hf:{tmp_path / 'tales'}:test")] == ["story 0", "story 1"]
    with pytest.raises(LoadError, match="cannot be read"):
        read_text(f"hf:{tmp_path / 'tales'}:validation")
    with pytest.raises(LoadError, match="cannot be read"):
        read_text(f"hf:{tmp_path / 'none'}")
