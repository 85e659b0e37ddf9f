"""Files that tokenizers are read from, by the names that transformers gives them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["holds_tokenizer", "tokenizer_files"]

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",  # some have their version behind it
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "vocab-src.json",
    "source.spm",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "prophetnet.tokenizer",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
)
"""One of them is where a tokenizer is."""
_BESIDE = (
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "vocab-tgt.json",
    "target.spm",
    "target_vocab.json",
    "normalizer.json",
    "emoji.json",
    "byte_maps.json",
    "entity_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""What tokenizers of some kinds read as well."""


def holds_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in a folder."""
    return any(path.is_file() for name in _VOCABULARIES for path in folder.glob(name))


def tokenizer_files(folder: Path) -> list[Path]:
    """Paths of all that a tokenizer is read from, as they are in its folder."""
    found = {path for name in (*_VOCABULARIES, *_BESIDE) for path in folder.glob(name) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found)
