"""A tokenizer in the fields of a GGUF file, if llama.cpp has one that cuts text the same way.

llama.cpp has two that models with the blocks of Llama need. ``gpt2`` joins bytes by a list of merges, within pieces of
text that one of its own expressions cuts; which one is told by its name. ``llama`` (SentencePiece) joins any two
neighbours whose text is a token, the one with the best score first; merges become such scores where their order allows.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_compile.errors import LoadError, MlaCompileError, RefusedError, reason_of
from mla_compile.quiet import quiet_exporter
from mla_compile.text.corpus import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["Vocabulary", "read_vocabulary"]

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_EXPRESSIONS = {
    rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_REST}": "qwen2",
}
"""llama.cpp's names of expressions that cut text into pieces."""
_WHOLE_WORDS = ("llama-bpe",)
"""Those that take a piece which is a token as one, without merges."""


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp reads of a tokenizer.

    Attributes:
        model: Which of its tokenizers: ``gpt2``, ``llama``, or ``none`` for token ids alone.
        pre: Name of the expression that cuts text for ``gpt2``.
        tokens: Text of every token.
        kinds: What every token is, as ``gguf.TokenType`` counts it.
        scores: Of every token, for ``llama``: the higher, the sooner it is made.
        prefixed: Whether text gets a space in front, for ``llama``.
        folder: Where merges, special tokens and the chat template are.
        begins: Whether text begins with the token for it.
        ends: Whether text ends with the token for it.
    """

    model: str
    pre: str | None = None
    tokens: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    scores: tuple[float, ...] | None = None
    prefixed: bool = False
    folder: Path | None = None
    begins: bool = False
    ends: bool = False

    def write(self, writer: GGUFWriter) -> None:
        """Give it to a file."""
        import gguf

        writer.add_tokenizer_model(self.model)
        if self.folder is None:
            return
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_tokenizer_pre(self.pre or "default")
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.prefixed)
        with quiet_exporter():  # it warns of templates for pairs of texts
            special = gguf.SpecialVocab(self.folder, load_merges=self.scores is None, n_vocab=len(self.tokens))
        special.add_special_token |= {"bos": self.begins, "eos": self.ends}
        special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read a tokenizer.

    Args:
        folder: A model's; one without a tokenizer gives a vocabulary of ids alone.
        size: Tokens that the model knows; those without a text get one that stands for nothing.

    Raises:
        LoadError: The tokenizer cannot be read.
        RefusedError: llama.cpp has none that cuts text the same way.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        if (folder / "tokenizer_config.json").is_file():
            raise _refused("it has no tokenizer.json")
        return Vocabulary("none")
    try:
        return _read(json.loads(file.read_text(encoding="utf-8")), folder, size)
    except MlaCompileError:
        raise
    except Exception as error:  # whatever reading something else ends in
        raise LoadError(
            f"'{file}' is no tokenizer, or a damaged one ({reason_of(error)}).", "Copy the folder again."
        ) from error


def _read(stored: Mapping[str, Any], folder: Path, size: int) -> Vocabulary:
    model = stored["model"]
    if model.get("type") != "BPE":
        raise _refused(f"its type is {model.get('type')}, and only BPE is known")
    added = {token["id"]: token for token in stored.get("added_tokens", [])}
    by_id = {number: text for text, number in model["vocab"].items()}
    by_id |= {number: token["content"] for number, token in added.items()}
    if by_id and max(by_id) >= size:
        raise _refused(f"it has a token {max(by_id)}, and the model knows {size}")
    tokens = tuple(by_id.get(i, f"[PAD{i}]") for i in range(size))
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    kinds = tuple(_kind(i, by_id.get(i), added.get(i), model) for i in range(size))
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer("a").input_ids
    marks = {"begins": ids[0] == tokenizer.bos_token_id, "ends": ids[-1] == tokenizer.eos_token_id}
    if model.get("byte_fallback"):
        scores, prefixed = _scores(tokens, kinds, merges), _prefixed(stored)
        return Vocabulary("llama", None, tokens, kinds, scores, prefixed, folder, **marks)
    return Vocabulary("gpt2", _expression(stored), tokens, kinds, folder=folder, **marks)


def _refused(reason: str) -> RefusedError:
    return RefusedError(
        f"llama.cpp has no tokenizer like that of this model: {reason}.", "Write --format deepseek instead."
    )


def _kind(number: int, text: str | None, added: Mapping[str, Any] | None, model: Mapping[str, Any]) -> int:
    from gguf import TokenType

    if text is None:
        return TokenType.UNUSED
    if text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    byte = model.get("byte_fallback") and _BYTE.fullmatch(text)
    return TokenType.BYTE if byte else TokenType.NORMAL


def _expression(stored: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts text into pieces.

    Raises:
        RefusedError: It has none.
    """
    if (stored.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise _refused("it changes text before it cuts it")
    cut = stored.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refused("it does not work on bytes as they are")
    found = None
    if last.get("use_regex", True):
        if len(steps) == 1:
            found = "gpt-2"
        elif len(steps) == 2 and steps[0].get("type") == "Digits" and steps[0].get("individual_digits"):
            found = "smollm"
    elif len(steps) == 2 and steps[0].get("type") == "Split" and steps[0].get("behavior") == "Isolated":
        found = _EXPRESSIONS.get(steps[0]["pattern"].get("Regex"))
    whole = bool(stored["model"].get("ignore_merges"))
    if found is None or whole != (found in _WHOLE_WORDS):
        raise _refused("the expression that cuts text into pieces is none that this version knows there")
    return found


def _scores(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """Scores by which the same pairs are joined in the same order.

    Raises:
        RefusedError: There are none.
    """
    from gguf import TokenType

    order = [text for text, _ in itertools.groupby("".join(pair) for pair in merges)]
    if len({*order}) < len(order):
        raise _refused("its merges are not in the order of the tokens that they make")
    normal = {text for text, kind in zip(tokens, kinds, strict=True) if kind == TokenType.NORMAL}
    listed = {tuple(pair) for pair in merges}
    for text in normal:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in normal and pair[1] in normal and pair not in listed:
                raise _refused(f"it never joins '{pair[0]}' and '{pair[1]}', which llama.cpp would")
    rank = {text: -float(i) for i, text in enumerate(order)}
    return tuple(rank.get(text, -float(len(order))) for text in tokens)


def _prefixed(stored: Mapping[str, Any]) -> bool:
    """Whether text gets a space in front; spaces become ``_SPACE``, and nothing else may change.

    Raises:
        RefusedError: Something else does.
    """
    found = stored.get("normalizer")
    steps = [] if found is None else found.get("normalizers", [found])
    kinds = [step["type"] for step in steps]
    spaces = [s for s in steps if s["type"] == "Replace"]
    pre = stored.get("pre_tokenizer")
    if pre is not None and pre["type"] == "Metaspace" and not steps and pre.get("replacement") == _SPACE:
        if pre.get("split"):
            raise _refused("it cuts text at spaces before it joins tokens")
        return bool(pre.get("prepend_scheme", "always") != "never")
    known = kinds in (["Prepend", "Replace"], ["Replace"])
    replaced = [(s["pattern"].get("String"), s["content"]) for s in spaces] == [(" ", _SPACE)]
    if pre is not None or not known or not replaced:
        raise _refused("it changes text in another way than putting a mark for spaces")
    return "Prepend" in kinds
