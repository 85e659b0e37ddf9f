"""Any model the compiler reads or writes, ready to be run on text: originals, converted files and converted folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_compile.artifacts.archives import read_folder
from mla_compile.artifacts.companions import OPENED_HERE, is_converted_folder, read_assets, read_settings, written_files
from mla_compile.config import REPORT
from mla_compile.disk.mapped import DroppingInterpreter
from mla_compile.errors import LoadError
from mla_compile.passes.moved import moved_graph, moved_model
from mla_compile.passes.recognise import Recognition, recognise
from mla_compile.program import Program
from mla_compile.runtime.generate import Decoder
from mla_compile.runtime.module import LatentModel, cache_dtype, positions_from_mask
from mla_compile.runtime.onnx_checksum import require_unchanged
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.tensorrt.engine import TensorRTDecoder
from mla_compile.runtime.torch_decoder import TorchDecoder
from mla_compile.sources import frontend
from mla_compile.sources.given import require_named
from mla_compile.text.evaluate import Scorer, longest_window, original_scorer

__all__ = [
    "RunnableModel",
    "Runtime",
    "decoder_scorer",
    "latent_bytes",
    "mapped_scorer",
    "module_scorer",
    "open_model",
    "open_program",
    "require_there",
]


class Runtime(StrEnum):
    """What runs a model."""

    ONNX_RUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    TORCH = "torch"


@dataclass(frozen=True)
class RunnableModel:
    """A model that can be run.

    Attributes:
        name: What the user called it.
        runtime: What runs it.
        score: Token ids to logits.
        cache_bytes: Cache bytes per token; None where some attention was not understood.
        longest: Longest sequence, if the model says.
        known_tokens: How many token ids it reads.
        vocabulary: How many logits it returns.
        tokenizer: Folder or hub id where its tokenizer may be.
        decoder: The model step by step; None for an original, which is run without a cache.
        method: How it was converted, as far as it says: a method's name, or ``exact``.
        cache_ratio: The cache ratio that was asked for, likewise.
    """

    name: str
    runtime: Runtime
    score: Scorer
    cache_bytes: int | None
    longest: int | None
    known_tokens: int
    vocabulary: int
    tokenizer: str | None
    decoder: Decoder | None = None
    method: str | None = None
    cache_ratio: float | None = None


def open_model(name: str, tokenizer: str | None = None, device: str = "cpu") -> RunnableModel:
    """Open a model of any kind.

    Args:
        name: An ONNX file, engine or folder made by this compiler, an archive, a Hugging Face folder or a hub id.
        tokenizer: Folder of the tokenizer, if the model does not bring one.
        device: Where a model in PyTorch runs.

    Raises:
        LoadError: It cannot be read.
    """
    path = Path(name)
    if path.suffix in OPENED_HERE:
        return _open_decoder(path, name)
    if is_converted_folder(path):
        return _open_folder(path, name, device)
    if (path / REPORT).is_file() and (files := written_files(path)):
        raise LoadError(f"'{name}' holds no model in PyTorch, but {files[0].name}.", f"Name the file: {files[0]}.")
    program = frontend.load_program(name, tokenizer=tokenizer)
    return open_program(name, program, recognise(program), device)


def require_there(names: Iterable[str]) -> None:
    """Refuse a name of nothing, in the words of what would open it, before any model is read: that may take minutes.

    Args:
        names: What :func:`open_model` takes.

    Raises:
        LoadError: There is no such file or folder on this machine, and it is no hub id either.
    """
    for name in names:
        if Path(name).suffix not in OPENED_HERE:
            require_named(name)
        elif not Path(name).exists():
            open_model(name)


def open_program(name: str, program: Program, found: Recognition, device: str = "cpu") -> RunnableModel:
    """Open an original that was read and recognised already, and let it run on a device."""
    score, longest = original_scorer(program, moved_graph(program.flat_module(), device)), program.max_positions
    if longest is None and torch.device(device).type != "cpu":  # there, what is too long may end more than this run
        longest = longest_window(original_scorer(program), None)
    return RunnableModel(
        name=name,
        runtime=Runtime.TORCH,
        score=lambda ids: score(ids.to(device)),
        cache_bytes=_plain_bytes(found, program.dtype),
        longest=longest,
        known_tokens=program.known_tokens,
        vocabulary=program.vocabulary,
        tokenizer=program.assets.folder,
    )


def latent_bytes(model: LatentModel) -> int:
    """Bytes the cache of a converted model keeps per token."""
    return sum(model.rows) * cache_dtype(model.graph).itemsize


def _plain_bytes(found: Recognition, dtype: torch.dtype) -> int | None:
    """Bytes an ordinary cache keeps per token; None where some attention was not understood."""
    plain = [r.plain for r in found.rejections if r.plain is not None]
    if len(plain) < len(found.rejections) or not (plain or found.sites):
        return None
    elements = sum(s.elements_per_token for s in found.sites) + sum(p.elements_per_token for p in plain)
    return elements * dtype.itemsize


def decoder_scorer(decoder: OnnxDecoder | TensorRTDecoder) -> Scorer:
    """A converted model in ONNX Runtime or TensorRT as a function of whole sequences."""
    return lambda ids: torch.from_numpy(decoder.logits(ids.numpy()))


def module_scorer(model: LatentModel, device: str = "cpu") -> Scorer:
    """A converted model in PyTorch as a function of whole sequences, on a device; on the processor as it is."""
    there = moved_model(model, device)
    return lambda ids: there(ids.to(device)).logits


def mapped_scorer(model: LatentModel) -> Scorer:
    """The same for a model whose weights are mapped: their pages leave memory as soon as they have been read."""

    def score(ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        inputs = (ids, mask, positions_from_mask(mask, ids.shape[1]), *model.empty_cache(len(ids)))
        logits: Tensor = DroppingInterpreter(model.graph).run(*inputs)[0]
        return logits

    return score


def _open_decoder(path: Path, name: str) -> RunnableModel:
    if path.suffix == ".plan":
        engine = TensorRTDecoder(path)  # whose room is no more than the model's longest sequence
        return dataclasses.replace(_opened(path, name, Runtime.TENSORRT, engine), longest=engine.limits.room)
    decoder = OnnxDecoder(path)
    require_unchanged(path)
    return _opened(path, name, Runtime.ONNX_RUNTIME, decoder)


def _opened(path: Path, name: str, runtime: Runtime, decoder: OnnxDecoder | TensorRTDecoder) -> RunnableModel:
    method, ratio = _asked_for(decoder.metadata.get("config", {}), path)
    return RunnableModel(
        name=name,
        runtime=runtime,
        score=decoder_scorer(decoder),
        cache_bytes=decoder.cache_bytes_per_token,
        longest=decoder.metadata.get("max_position_embeddings"),
        known_tokens=decoder.known_tokens,
        vocabulary=decoder.vocabulary,
        tokenizer=str(path.absolute().parent),
        decoder=decoder,
        method=method,
        cache_ratio=ratio,
    )


def _open_folder(path: Path, name: str, device: str) -> RunnableModel:
    model = read_folder(path)
    mapped = torch.device(device).type == "cpu"
    method, ratio = _asked_for(read_settings(path), path)
    return RunnableModel(
        name=name,
        runtime=Runtime.TORCH,
        score=mapped_scorer(model) if mapped else module_scorer(model, device),
        cache_bytes=latent_bytes(model),
        longest=read_assets(path).longest,
        known_tokens=model.known_tokens,
        vocabulary=model.vocabulary,
        tokenizer=name,
        decoder=TorchDecoder(model),
        method=method,
        cache_ratio=ratio,
    )


def _asked_for(config: Mapping[str, Any], path: Path) -> tuple[str | None, float | None]:
    """Method and cache ratio of a stored configuration.

    Raises:
        LoadError: They are none.
    """
    method, ratio = "exact" if config.get("exact") else config.get("method"), config.get("cache_ratio")
    if not isinstance(method, str | None) or not isinstance(ratio, float | int | None):
        raise LoadError(f"'{path}' names no method or cache ratio of its conversion.", "Convert the model again.")
    return method, ratio
