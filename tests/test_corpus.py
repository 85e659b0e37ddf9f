"""Text to windows: one definition, the one every published number of this project uses."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tokenizers
import transformers
from hypothesis import given
from tokenizers import normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer

from mla_compile.errors import LoadError, UsageError
from mla_compile.text import corpus
from mla_compile.text.corpus import (
    LEAST_WINDOW,
    load_tokenizer,
    open_documents,
    read_documents,
    special_tokens,
    token_windows,
    tokenize,
)

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY))


@pytest.fixture
def file(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


class Letters:
    """A tokenizer of one token per character."""

    def __init__(self, begin: int | None) -> None:
        self.bos_token_id = begin

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


def test_documents_of_a_text_file_are_separated_and_stripped(file):
    path = file("a.txt", "one\nline two\n<|endoftext|>\n\n two <|endoftext|><|endoftext|> \n<|endoftext|>three")
    assert read_documents(path) == ["one\nline two", "two", "three"]


def test_a_text_file_without_separators_is_one_document(file):
    assert read_documents(str(file("a.md", "one\n\ntwo\n"))) == ["one\n\ntwo"]


def test_jsonl_documents_are_the_text_fields(file):
    lines = [{"text": "one\ntwo"}, {"text": " <|endoftext|> stays ", "id": 3}, {"text": ""}]
    path = file("a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_documents(path) == ["one\ntwo", "<|endoftext|> stays"]


def test_jsonl_lines_end_at_newlines_only(file):
    """U+2028 and U+0085 are line breaks to `str.splitlines`, but ordinary characters inside a JSON string."""
    text = "one\N{LINE SEPARATOR}two\N{NEXT LINE}three"
    path = file("a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert read_documents(path) == [text]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "one"), ("a.jsonl", '{"text": "one"}')])
def test_a_byte_order_mark_is_not_text(file, name, content):
    assert read_documents(file(name, content.encode("utf-8-sig"))) == ["one"]


@pytest.mark.parametrize(
    "line",
    ['{"txt": "one"}', '["text"]', '"text"', "3", "null", '{"text": "one"', "one", '{"text": 1}', '{"text": null}'],
)
def test_a_bad_jsonl_line_is_named(file, line):
    path = file("a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(LoadError, match=r"^Line 3 of '.*a\.jsonl' is not a JSON object with a 'text' field\. "):
        read_documents(path)


def test_half_a_character_in_a_jsonl_file_is_named(file):
    path = file("a.jsonl", '{"text": "fine \\ud83d\\ude00"}\n{"text": "hello \\ud83d world"}\n')
    with pytest.raises(LoadError, match=r"^Line 2 of '.*a\.jsonl' holds half a character"):
        read_documents(path)


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n<|endoftext|>\n\t", "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.jsonl", '{"text": " "}\n', "holds no text"),
        ("a.txt", "café".encode("latin-1"), "is not UTF-8 text"),
        ("a.txt", "text".encode("utf-16"), "is not UTF-8 text"),
        ("a.jsonl", b"\xff\xfe{}", "is not UTF-8 text"),
    ],
)
def test_a_file_without_readable_text_is_refused(file, name, content, phrase):
    path = file(name, content)
    with pytest.raises(LoadError, match=phrase) as caught:
        read_documents(path)
    assert str(path) in caught.value.message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 13, 14, 2**20])
def test_documents_do_not_depend_on_how_a_file_is_read(file, size, monkeypatch):
    monkeypatch.setattr(corpus, "_PIECE", size)
    documents = ["naïve 🙂\r\nand\rlines", "<|endof", "text|>", "<<|endoftext|", "end"]
    plain = file("a.txt", "<|endoftext|>\r\n".join(documents).encode("utf-8-sig"))
    assert read_documents(plain) == ["naïve 🙂\nand\nlines", "<|endof", "text|>", "<<|endoftext|", "end"]
    lines = file("a.jsonl", "\r\n".join(json.dumps({"text": d}, ensure_ascii=False) for d in documents) + "\n")
    assert read_documents(lines) == documents


def test_a_file_is_read_as_far_as_it_is_needed(file, monkeypatch):
    """What is wrong behind that is said when it is reached."""
    monkeypatch.setattr(corpus, "_PIECE", 4)
    for name, content, phrase in (
        ("a.txt", b"one<|endoftext|>two<|endoftext|>   caf\xe9 ", r"is not UTF-8 text \(.* at byte 38\)"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n{"txt": "three"}', "^Line 3 of"),
    ):
        documents = open_documents(file(name, content))
        assert list(itertools.islice(documents, 2)) == ["one", "two"]
        assert tokenize(documents, Letters(None), 4) == [ord(c) for c in "onetwo"]
        with pytest.raises(LoadError, match=phrase):
            list(documents)


def test_files_of_the_same_documents_are_equal(file):
    documents = open_documents(file("a.txt", "one<|endoftext|>two"))
    assert [*documents] == [*documents] == ["one", "two"]
    assert documents == open_documents(file("a.jsonl", '{"text": "one"}\n{"text": "two"}'))
    for others in (["one"], ["one", "two", "three"], ["one", "three"], None):
        assert documents != others


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path, said in (
        (tmp_path / "none.txt", r"There is no text file '.*'"),
        (tmp_path, "'.*' is a folder, not a text file"),
    ):
        with pytest.raises(LoadError, match=rf"^{said}\. Give a \.txt or \.jsonl file\.$"):
            read_documents(path)


def test_every_document_is_led_by_the_begin_token():
    assert tokenize(["ab", "c"], Letters(1)) == [1, ord("a"), ord("b"), 1, ord("c")]


def test_a_tokenizer_without_begin_token_adds_none():
    assert tokenize(["ab", "c"], Letters(None)) == [ord("a"), ord("b"), ord("c")]


def test_tokens_of_the_bundled_tokenizer(tokenizer):
    """Begin token once per document, although this tokenizer also adds it by itself."""
    begin, texts = tokenizer.bos_token_id, ["Once upon a time", "Tom"]
    stream = tokenize(texts, tokenizer)
    assert stream.count(begin) == 2
    ends = [i for i, t in enumerate(stream) if t == begin]
    assert ends[0] == 0
    assert tokenizer.decode(stream[1 : ends[1]]) == texts[0]
    assert tokenizer.decode(stream[ends[1] + 1 :]) == texts[1]


def trained(model, normalizer, words):
    """A tokenizer of some kind, trained on stories."""
    tokenizer = tokenizers.Tokenizer(model())
    tokenizer.normalizer = normalizer
    if words is not None:
        tokenizer.pre_tokenizer = words
    trainer = TRAINERS[model]
    known = {"vocab_size": 400, "special_tokens": ["[UNK]"], "show_progress": False}
    known |= {"unk_token": "[UNK]"} if model is Unigram else {}
    tokenizer.train_from_iterator(STORIES[:40], trainer(**known))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


STORIES = list(runpy.run_path(str(ROOT / "examples" / "story_grammar.py"))["stories"](range(120)))
TRAINERS = {BPE: BpeTrainer, Unigram: UnigramTrainer, WordPiece: WordPieceTrainer}
LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KINDS = {
    "bytes": None,
    "letters": lambda: Letters(1),
    "BPE across words": lambda: trained(BPE, LLAMA, None),
    "unigram": lambda: trained(Unigram, normalizers.NFKC(), pre_tokenizers.Metaspace()),
    "unigram across words": lambda: trained(Unigram, normalizers.NFKC(), None),
    "word pieces": lambda: trained(WordPiece, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
}
LONG = {
    "stories": "\n\n".join(STORIES),
    "one word": "".join(STORIES).replace(" ", ""),
    "one word late": "Once " + "".join(STORIES).replace(" ", ""),
    "one letter": "a" * 30_000,
    "blanks": "a" + " " * 30_000 + "a",
    "accents": "e\N{COMBINING ACUTE ACCENT}ﬁ🙂 naïve\N{IDEOGRAPHIC SPACE}" * 3000,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_tokens_of_a_long_document_are_those_of_the_whole(tokenizer, kind):
    """Byte-level and character-level ones, and ones that merge, or look for the best path, across words."""
    given, whole = [], tokenizer if kind == "bytes" else KINDS[kind]()

    class Counting:
        bos_token_id = 1

        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            given.append(len(text))
            return whole(text, **options)

    for name, document in LONG.items():
        expected = tokenize(["One.", document, "None."], Counting())
        for most in (8, 65, 130, 301):
            given.clear()
            got = tokenize(["One.", document, "None."], Counting(), most)
            assert got[:most] == expected[:most], (name, most)
            if name == "stories":
                assert max(given) < len(document) / 2
                assert len(got) == most


def test_a_document_gives_all_tokens_unless_it_is_much_longer_than_they_take():
    document = "word " * 400
    assert len(tokenize([document], Letters(None), 10)) == len(document)
    assert len(tokenize([document * 9], Letters(None), 10)) == 10


def test_long_documents_warn_of_nothing(tokenizer, caplog):
    assert len(tokenize(["a story " * 600], tokenizer)) > tokenizer.model_max_length
    assert not caplog.records


@given(st.integers(1, 300), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 400)))
def test_windows_are_consecutive_and_whole(count, length, limit):
    ids = list(range(count))
    if count < length:
        with pytest.raises(UsageError):
            token_windows(ids, length, limit)
        return
    windows = token_windows(ids, length, limit)
    assert windows.shape[1] == length
    assert windows.flatten().tolist() == ids[: windows.numel()]
    most = count if limit is None else min(count, max(limit, length))
    assert most - length < windows.numel() <= most


@pytest.mark.parametrize("count", [LEAST_WINDOW, 63])
def test_text_shorter_than_one_window_is_refused_with_a_length_that_works(count):
    with pytest.raises(UsageError) as caught:
        token_windows(range(count), 64)
    assert caught.value.message == f"The text has {count} tokens, fewer than one window of 64."
    assert caught.value.remedy == f"Give more text, or a shorter window with --seq-len {count}."
    assert token_windows(range(count), count).shape == (1, count)


@pytest.mark.parametrize("count", [0, 1, 2, 5, LEAST_WINDOW - 1])
def test_text_too_short_for_a_window_of_any_use_is_not_sent_to_a_shorter_one(count):
    with pytest.raises(UsageError) as caught:
        token_windows(range(count), 64, longest=lambda tokens: tokens)
    assert caught.value.remedy == "Give more text."


def test_no_window_is_advised_that_the_model_cannot_run():
    with pytest.raises(UsageError, match="--seq-len 40\\."):
        token_windows(range(60), 64, longest=lambda tokens: min(tokens, 40))


@pytest.mark.parametrize("limit", [None, 600, 512, 5000])
@pytest.mark.parametrize("length", [64, 512])
def test_windows_equal_the_definition_of_the_reference_tool(tokenizer, file, length, limit):
    """The stream and windows of `shared/tools/ppl.py`, spelled out again."""
    stories = list(runpy.run_path(str(ROOT / "examples" / "story_grammar.py"))["stories"](range(1_000_000, 1_000_020)))
    path = file("stories.txt", "\n<|endoftext|>\n".join(stories))
    ids = []
    for document in path.read_text(encoding="utf-8").split("<|endoftext|>"):
        document = document.strip()
        if document:
            ids += [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False).input_ids]
    ids = ids[:limit] if limit else ids
    expected = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    assert token_windows(tokenize(read_documents(path), tokenizer), length, limit).tolist() == expected


def test_no_tokenizer_at_all_is_refused():
    with pytest.raises(LoadError) as caught:
        load_tokenizer(None)
    assert str(caught.value) == "The model comes without a tokenizer. Give one with --tokenizer FOLDER."


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_tokenizer_is_said_to_have_none(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError) as caught:
        load_tokenizer(str(tmp_path / name))
    error = caught.value
    assert str(tmp_path / name) in error.message
    assert error.remedy == "Give one with --tokenizer FOLDER."
    assert "\n" not in str(error)
    for jargon in ("one of: )", "Repo id", "repo_type", "backend"):
        assert jargon not in error.message


def test_special_tokens_of_the_bundled_tokenizer(tokenizer):
    found = special_tokens(load_tokenizer(str(TINY)))
    assert found == {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    assert tokenizer.decode([found["eos_token_id"]]) == "<|endoftext|>"
