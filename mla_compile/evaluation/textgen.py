"""``mla-compile run``: text in, text out, with a converted model in ONNX Runtime, TensorRT or PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_compile.artifacts.companions import MODEL, is_converted_folder, written_files
from mla_compile.errors import LoadError, UsageError
from mla_compile.runtime.generate import Sampling, generate
from mla_compile.runtime.onnx_checksum import require_unchanged
from mla_compile.runtime.onnx_session import PROVIDERS, OnnxDecoder
from mla_compile.text.corpus import check_vocabulary, is_text, load_tokenizer

if TYPE_CHECKING:
    from mla_compile.artifacts.folder_decoder import FolderDecoder
    from mla_compile.runtime.tensorrt.engine import TensorRTDecoder

__all__ = ["Generation", "continuation", "cut_at", "generate_text"]

_OF_OTHERS = (".bin", ".gguf", ".json", ".pt", ".pt2", ".pth", ".safetensors")
"""Suffixes of models' files that are not run here, or not as files."""
_FOREIGN = 0.75
"""Of the tokens that a model reads, a tokenizer of its own has as many at least: tables are filled up by a few."""


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        texts: Every prompt with its continuation.
        new_tokens: Tokens added to each.
        seconds: Wall-clock time, prompts included.
        cache_bytes_per_token: Bytes one token of one sequence takes in the cache.
        cache_bytes: Bytes of the whole cache in the end, or of the memory that was allocated for it.
        warnings: What the user should know of it.
    """

    texts: tuple[str, ...]
    new_tokens: tuple[int, ...]
    seconds: float
    cache_bytes_per_token: int
    cache_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences over the time."""
        return sum(self.new_tokens) / self.seconds


def generate_text(
    model: Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    tokenizer: str | None = None,
    threads: int | None = None,
    provider: str | None = None,
    max_length: int | None = None,
    kernel: str | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue texts.

    Args:
        model: The ONNX file, the engine, or a converted folder.
        prompts: Texts to continue, together.
        max_new_tokens: Tokens to add to each, at most.
        sampling: How tokens are chosen.
        tokenizer: Folder of the tokenizer, if it is not beside the file, or in the folder.
        threads: Threads per operator.
        provider: Where to run an ONNX file: ``cpu``, the default, or ``cuda``.
        max_length: Tokens of a sequence at most, prompt and continuation; as many as are asked for by default.
        kernel: What computes attention of an ONNX file: ``auto``, the default, ``fused`` or ``standard``; see
            :data:`mla_compile.runtime.onnx_session.KERNELS`.
        stop: Texts in front of which a continuation ends.
        on_text: Called with the first prompt and then each new piece of it, never half a character.

    Raises:
        LoadError: The file or its tokenizer cannot be read.
        UsageError: A prompt is not text or has no tokens, there would be more than ``max_length``, the device is
            missing, or an engine or a folder was given what belongs to ONNX files.
        VerificationError: The model's logits are not numbers.
    """
    if not all(map(is_text, prompts)):
        raise UsageError("A prompt is not UTF-8 text.", "Give it in UTF-8.")
    if not all(stop):
        raise UsageError("A text to stop at is empty.", "Give at least one character.")
    decoder = _open(model, threads, provider, max_length, kernel)
    words = load_tokenizer(tokenizer or str(model if model.is_dir() else model.absolute().parent))
    begin = [] if words.bos_token_id is None else [words.bos_token_id]
    ids = [begin + list(words(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    if not all(ids):
        raise UsageError("A prompt is empty, and this tokenizer has no begin token.", "Give at least one word.")
    check_vocabulary(max(map(max, ids)), decoder.known_tokens, str(model))
    longest = max(map(len, ids))
    decoder.require_length(longest + max_new_tokens - 1)
    end = decoder.metadata.get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    stream = None
    if on_text:
        on_text(prompts[0])
        stream = _Stream(words, ids[0], on_text, stop)

    def stops(row: int, so_far: list[int]) -> bool:
        text = continuation(words, ids[row], so_far)
        return any(string in text for string in stop)

    start = time.perf_counter()
    new = generate(
        decoder,
        ids,
        max_new_tokens,
        sampling=sampling,
        stop=ends,
        until=stops if stop else None,
        on_tokens=stream,
    )
    seconds = time.perf_counter() - start
    if stream is not None:
        stream.finish()
    texts = [p + cut_at(continuation(words, i, n), stop) for p, i, n in zip(prompts, ids, new, strict=True)]
    grows = not decoder.static if isinstance(decoder, OnnxDecoder) else model.is_dir()
    added = max(map(len, new)) if grows else max_new_tokens
    held = decoder.cache_bytes(len(ids), longest + max(added - 1, 0))
    counts = tuple(map(len, new))
    reached = max(len(before) + count for before, count in zip(ids, counts, strict=True))
    warnings = _warnings(len(words), decoder.known_tokens, reached, decoder.metadata.get("max_position_embeddings"))
    return Generation(tuple(texts), counts, seconds, decoder.cache_bytes_per_token, held, warnings)


def _warnings(words: int, known: int, reached: int, longest: int | None) -> tuple[str, ...]:
    """What may be wrong with a text that was generated without an error."""
    found = []
    if words < _FOREIGN * known:
        found.append(f"the tokenizer has {words} tokens and the model {known}: it may belong to another model")
    if longest is not None and reached > longest:
        found.append(f"the model was made for {longest} tokens at most, and the text has {reached}")
    return tuple(found)


def _open(
    model: Path, threads: int | None, provider: str | None, max_length: int | None, kernel: str | None
) -> OnnxDecoder | TensorRTDecoder | FolderDecoder:
    if is_converted_folder(model):
        if provider is not None or kernel is not None or threads is not None:
            raise UsageError(
                f"'{model}' is a folder, which runs in PyTorch: without providers and kernels, and with as many "
                "threads as OMP_NUM_THREADS says.",
                "Leave --provider, --kernel and --threads out, or export the folder to an ONNX file.",
            )
        from mla_compile.artifacts.folder_decoder import FolderDecoder

        return FolderDecoder(model, max_length)
    if model.is_dir():
        held = "models as files" if written_files(model) else "no converted model that runs here"
        raise LoadError(f"'{model}' holds {held}.", _what_to_run(model))
    if model.suffix in _OF_OTHERS and model.is_file():
        raise LoadError(f"'{model}' is no file that runs here.", _what_to_run_of(model))
    if model.suffix != ".plan":
        decoder = OnnxDecoder(model, [PROVIDERS[provider or "cpu"]], threads, max_length, kernel or "auto")
        require_unchanged(model)
        return decoder
    if max_length is not None:
        raise UsageError("An engine's longest sequence was settled when it was built.", "Leave --max-length out.")
    if threads is not None:
        raise UsageError("An engine runs on a GPU, which has no such threads.", "Leave --threads out.")
    if provider is not None:
        raise UsageError("An engine runs in TensorRT, which has no providers.", "Leave --provider out.")
    if kernel is not None:
        raise UsageError("An engine has its kernels built in.", "Leave --kernel out.")
    from mla_compile.runtime.tensorrt.engine import TensorRTDecoder

    return TensorRTDecoder(model)


def _what_to_run(folder: Path) -> str:
    """What to do about a folder that is not one of ours."""
    if files := written_files(folder):
        return f"Name a file in it, such as '{files[0]}'."
    return (
        "A DeepSeek checkpoint runs in transformers, vLLM or SGLang; anything else is first converted: "
        "mla-compile MODEL --out FILE.onnx."
    )


def _what_to_run_of(file: Path) -> str:
    """What to do about a file that is neither ONNX nor an engine."""
    if file.name == MODEL and is_converted_folder(file.parent):
        return f"Give the folder that it is in: {file.absolute().parent}."
    if file.suffix == ".gguf":
        return f"Run it in llama.cpp: llama-cli -m {file}."
    return "Convert it first: mla-compile MODEL --out FILE.onnx."


def continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:  # noqa: ANN401 - see load_tokenizer
    """Text that new tokens add to a prompt; decoded by themselves they may lose their leading space."""
    before: str = tokenizer.decode(prompt, skip_special_tokens=True)
    after: str = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    return after[len(before) :]


def cut_at(text: str, strings: Sequence[str]) -> str:
    """A text up to the first of some strings, which are no part of it."""
    return text[: min((place for string in strings if (place := text.find(string)) >= 0), default=None)]


def _begun(text: str, strings: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of one of some strings."""
    longest = max(map(len, strings), default=1)
    sizes = range(min(longest - 1, len(text)), 0, -1)
    return next((size for size in sizes if any(s.startswith(text[-size:]) for s in strings)), 0)


class _Stream:
    """Turns the first sequence's tokens into pieces of text as they arrive."""

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - see load_tokenizer
        prompt: list[int],
        on_text: Callable[[str], None],
        stop: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._prompt = prompt
        self._on_text = on_text
        self._ids: list[int] = []
        self._text = ""
        self._shown = 0

    def __call__(self, tokens: list[int | None]) -> None:
        if tokens[0] is None:
            return
        self._ids.append(tokens[0])
        self._text = cut_at(continuation(self._tokenizer, self._prompt, self._ids), self._stop)
        if not self._text.endswith("\N{REPLACEMENT CHARACTER}"):  # the character goes on in the next token
            self._show(len(self._text) - _begun(self._text, self._stop))

    def finish(self) -> None:
        """Show what is left: no token is to come."""
        self._show(len(self._text))

    def _show(self, end: int) -> None:
        if end > self._shown:
            self._on_text(self._text[self._shown : end])
            self._shown = end
