"""Run a converted model in ONNX Runtime: the cache stays where it is between steps."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_compile.errors import LoadError, UsageError, first_line
from mla_compile.runtime.generate import Ids, Sampling, as_ids, check_length, checked_step, generate
from mla_compile.runtime.onnx_cache import (
    CROSS,
    KEY_VALUE,
    PAST,
    PAST_SCALE,
    CacheLayer,
    GrowingCache,
    OnnxCache,
    StaticCache,
)
from mla_compile.runtime.onnx_variant import FUSED_DOMAIN

__all__ = ["KERNELS", "LOGITS_TO_KEEP", "PROVIDERS", "OnnxDecoder", "open_session"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's names of the devices that users name."""
KERNELS = ("auto", "fused", "standard")
"""What computes latent attention: the kernel of :mod:`mla_compile.runtime.cpu` (``fused``), the operators in the file
(``standard``), or the former where the file, the provider and a compiler allow it."""
LOGITS_TO_KEEP = "logits_to_keep"
"""The optional input of a file that says of how many last tokens it computes logits: 0, its default, of all."""
Provider = str | tuple[str, Mapping[str, Any]]
"""An execution provider as ONNX Runtime takes it: its name, or with options."""
_DEFAULT_ROOM = 2048
"""Tokens that a static cache has room for where nobody says how many there will be."""


def open_session(
    path: str | Path,
    providers: str | Sequence[Provider] | None = None,
    threads: int | None = None,
    kernel: str = "standard",
    in_turns: bool = False,
) -> tuple[Any, bool]:
    """Open an ONNX file in ONNX Runtime.

    Args:
        path: The ``.onnx`` file.
        providers: Execution providers in order of preference, by name or with their options, as ONNX Runtime takes
            them; the CPU by default.
        threads: Threads per operator; ONNX Runtime's choice by default.
        kernel: One of :data:`KERNELS`.
        in_turns: Whether its threads sleep between runs, because other sessions run then; by default they spin.

    Returns:
        The session, and whether it uses the fused kernel.

    Raises:
        LoadError: The file is missing or damaged.
        UsageError: ONNX Runtime is not installed, a provider is missing or does not start (no other takes its place),
            or there is no fused kernel for this file or here.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("ONNX Runtime is not installed.", "Run: pip install 'mla-compile[cpu]'.") from error
    _require_readable(Path(path))
    wanted = [providers] if isinstance(providers, str) else list(providers or [PROVIDERS["cpu"]])
    names = [_name(provider) for provider in wanted]
    _require_providers(names, onnxruntime.get_available_providers(), "has no")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and told once
    if threads is not None:
        options.intra_op_num_threads = threads
    if in_turns:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    fused = _fused(Path(path), names, kernel, options)
    try:
        session = onnxruntime.InferenceSession(fused or str(path), options, wanted)
    except Exception as error:
        raise _explained(error, Path(path), names[0], fused=fused is not None) from error
    _require_providers(names, session.get_providers(), "cannot start the")
    return session, fused is not None


def _require_readable(path: Path) -> None:
    if not path.is_file():
        raise LoadError(f"There is no file '{path}'.", "Convert a model first: mla-compile MODEL --out FILE.onnx.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise LoadError(f"'{path}' cannot be read ({error.strerror}).", "Give yourself access to it.") from error


def _name(provider: Provider) -> str:
    """The name of an execution provider that may come with options."""
    match provider:
        case str(name) | (str(name), Mapping()):
            return name
    raise UsageError(
        f"{provider!r} is no execution provider of ONNX Runtime.",
        "Give names such as CPUExecutionProvider, or pairs of a name and a dictionary of its options.",
    )


def _explained(error: Exception, path: Path, provider: str, *, fused: bool) -> UsageError:
    """Why ONNX Runtime, on an execution provider, with the fused kernel or without, made no session of a file."""
    told, reason, data = str(error), first_line(error), Path(f"{path}.data")
    if "External data" in told and not data.exists():
        return LoadError(
            f"The weights of '{path}' are in '{data.name}', which is not beside it.", "Keep both files together."
        )
    if "NOT_IMPLEMENTED" in reason and _is_bfloat16(path):
        return UsageError(
            f"'{path}' is bfloat16, for which ONNX Runtime's {provider} has no kernels.",
            "Run it with --provider cuda, or convert the model with --dtype float16 or float32.",
        )
    if "PagedAttention" in told:
        return UsageError(
            f"'{path}' was made with --target cuda, and ONNX Runtime's {provider} has no kernel for it.",
            "Run it with --provider cuda, or convert the model without --target cuda.",
        )
    if not fused and FUSED_DOMAIN in told:
        return UsageError(
            f"'{path}' was written by mla-compile fuse, and runs with the library of the fused kernel only.",
            "Run it on the CPU with --kernel auto or fused, which needs a C++ compiler.",
        )
    if "provider option" in told:
        return UsageError(
            f"ONNX Runtime's {provider} does not take the options it was given ({reason}).", "Correct them."
        )
    return LoadError(f"ONNX Runtime cannot load '{path}' ({reason}).", "Convert the model again.")


def _fused(path: Path, providers: Sequence[str], kernel: str, options: Any) -> bytes | None:  # noqa: ANN401
    """A model whose nodes use the fused kernel, which the options then know; None, where it is to run as it is."""
    if kernel not in KERNELS:
        raise UsageError(f"There is no kernel '{kernel}'.", f"Choose one of {', '.join(KERNELS)}.")
    if kernel == "standard":
        return None
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from mla_compile.runtime.cpu.fused import FUSED_CACHES, fused_model
    from mla_compile.runtime.cpu.library import compiler, library

    on_cpu = list(providers) == [PROVIDERS["cpu"]]
    try:
        if kernel == "auto" and not (on_cpu and compiler()):
            return None
        try:
            model = fused_model(path) if on_cpu else None
        except DecodeError as error:
            if kernel == "auto":
                return None  # ONNX Runtime says it
            raise LoadError(f"'{path}' is no ONNX file ({first_line(error)}).", "Convert the model again.") from error
        if model is None and kernel == "auto":
            return None
        if model is None:
            raise UsageError(
                f"'{path}' has no attention that the fused kernel computes: "
                f"{FUSED_CACHES if on_cpu else 'it is for the CPU'}.",
                "Run it with --kernel standard.",
            )
        _register(options, library())
    except UsageError as error:
        if kernel == "fused":
            raise
        logging.getLogger(__name__).warning("standard operators run '%s': %s", path, error.message)
        return None
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.absolute())
    )
    serialised: bytes = model.SerializeToString()
    return serialised


def _register(options: Any, library: Path) -> None:  # noqa: ANN401
    """Load the library of the fused kernel's operators."""
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise UsageError(
            f"'{library}', the library of the fused kernel, cannot be loaded ({first_line(error)}).",
            "Remove it, so that it is compiled again, or run files without it: --kernel standard.",
        ) from error


def _is_bfloat16(path: Path) -> bool:
    """Whether a file's caches are."""
    import onnx

    inputs = onnx.load(path, load_external_data=False).graph.input
    return any(value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for value in inputs)


def _require_providers(wanted: Sequence[str], found: Sequence[str], verb: str) -> None:
    missing = next((name for name in wanted if name not in found), None)
    if missing is not None:
        install = "pip uninstall onnxruntime, then pip install 'mla-compile[gpu]'"
        remedy = f"For CUDA run: {install}." if missing == PROVIDERS["cuda"] else f"There are: {', '.join(found)}."
        raise UsageError(f"ONNX Runtime {verb} {missing} here.", remedy)


class OnnxDecoder:
    """A converted model in ONNX Runtime.

    Args:
        path: The ``.onnx`` file.
        providers: Execution providers in order of preference, by name or with their options, as ONNX Runtime takes
            them; the CPU by default.
        threads: Threads per operator; ONNX Runtime's choice by default.
        max_length: Tokens of a sequence, prompt and continuation, at most; by default as many as are asked for.
        kernel: One of :data:`KERNELS`.
        session: What runs the file in place of a session of ONNX Runtime of its own.
        in_turns: Whether its threads rest between steps, for other decoders run then: as where several are timed.

    Attributes:
        metadata: What the compiler stored in the file.
        rows: Numbers one token adds to the cache, per layer; codes, if it is quantised, without their scales.
        halves: Whether the cache of a layer is two tensors with a dimension of heads.
        static: Whether the cache is one allocation, written in place.
        fused: Whether the fused kernel computes attention.
        vocabulary: How many logits a token has.
        known_tokens: How many token ids the model reads; by files that do not say, as many as it predicts.
        prunes_logits: Whether the file computes the logits of no more tokens than are asked for.

    Raises:
        LoadError: The file is missing, damaged, or was not made by this compiler.
        UsageError: ONNX Runtime is not installed, or has no such provider, or there is no fused kernel.
    """

    def __init__(
        self,
        path: str | Path,
        providers: str | Sequence[Provider] | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        kernel: str = "standard",
        session: Any = None,  # noqa: ANN401 - onnxruntime has no types
        in_turns: bool = False,
    ) -> None:
        if session is None:
            self._session, self.fused = open_session(path, providers, threads, kernel, in_turns)
        else:
            self._session, self.fused = session, False
        import onnxruntime

        self._runtime = onnxruntime
        self._path = path
        inputs = {i.name: i for i in self._session.get_inputs()}
        if any(name.startswith(CROSS.split("{")[0]) for name in inputs):
            raise LoadError(
                f"'{path}' is the decoder of an encoder-decoder, which needs its encoder's rows.",
                "Run it with ONNX Runtime itself, together with the .encoder.onnx file beside it.",
            )
        if "lengths" in inputs:
            raise LoadError(
                f"'{path}' is a file for TensorRT, whose caches are fixed memory.",
                f"Build an engine of it where there is a GPU: mla-compile tensorrt {path} --out FILE.plan.",
            )
        keys, values = KEY_VALUE
        caches, scales, halves = (
            [inputs[p] for i in range(len(inputs)) for n in names if (p := n.format(i)) in inputs]
            for names in ([PAST], [PAST_SCALE], [keys[0], values[0]])
        )
        stored = self._session.get_modelmeta().custom_metadata_map.get("mla_compile")
        if stored is None:
            raise LoadError(
                f"'{path}' was not made by mla-compile.", "Convert a model: mla-compile MODEL --out FILE.onnx."
            )
        if not (caches or halves):
            raise LoadError(
                f"'{path}' has no caches: it is an encoder.",
                "Run it with ONNX Runtime itself, or give a causal model's file.",
            )
        self.metadata: Mapping[str, Any] = json.loads(stored)
        self._layers = tuple(map(CacheLayer.of, (*caches, *scales, *halves)))
        rows = [layer.row * (layer.heads or 1) for layer in self._layers[: len(caches)]]
        pairs = [layer.row * (layer.heads or 1) for layer in self._layers[len(caches) + len(scales) :]]
        self.rows = (*rows, *(a + b for a, b in zip(pairs[::2], pairs[1::2], strict=True)))
        self.halves = bool(halves)
        self.static = any(layer.static for layer in self._layers)
        self._inputs = frozenset(inputs)
        self.prunes_logits = any(i.name == LOGITS_TO_KEEP for i in self._session.get_overridable_initializers())
        self._device = "cuda" if self._session.get_providers()[0] == PROVIDERS["cuda"] else "cpu"
        self._max_length = max_length
        self.vocabulary = int(self._session.get_outputs()[0].shape[-1])
        self.known_tokens = int(self.metadata.get("known_tokens") or self.vocabulary)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes one token of one sequence adds to the cache, scales included."""
        return sum(layer.row_bytes for layer in self._layers)

    def cache_bytes(self, batch: int, tokens: int) -> int:
        """Bytes that the cache of so many tokens of each sequence takes: fewer per token beyond a layer's window."""
        return batch * sum(layer.row_bytes * layer.rows(tokens) for layer in self._layers)

    def require_length(self, tokens: int) -> None:
        """Refuse sequences with this many cached tokens if that is too many.

        Raises:
            UsageError: These are more than ``max_length``.
        """
        check_length(tokens, self._max_length)

    def empty_cache(self, batch: int, tokens: int | None = None) -> OnnxCache:
        """A cache of no tokens.

        Args:
            batch: Sequences.
            tokens: Most tokens that each will have; ``max_length`` by default, else the model's limit or 2048,
                whichever is less. A growing cache may exceed it.

        Raises:
            UsageError: These are more than ``max_length``, or more than there is memory for.
        """
        if tokens is not None:
            self.require_length(tokens)
        if not self.static:
            return GrowingCache.empty(self._layers, batch, self._runtime, self._device)
        limit = min(self.metadata.get("max_position_embeddings") or _DEFAULT_ROOM, _DEFAULT_ROOM)
        room = tokens or self._max_length or limit
        return StaticCache.empty(self._layers, batch, room, self._runtime, self._device)

    def step(
        self, ids: Ids, attention_mask: Ids, position_ids: Ids, cache: OnnxCache, logits_to_keep: int = 0
    ) -> tuple[NDArray[Any], OnnxCache]:
        """Run new tokens; the cache is bound in place, not copied through numpy.

        Args:
            ids: ``[batch, new]``, as an array or lists; so the others.
            attention_mask: ``[batch, past + new]``.
            position_ids: ``[batch, new]``.
            cache: From :meth:`empty_cache` or the previous step.
            logits_to_keep: How many of the last tokens to return logits of; 0 for all. A file that has no such input
                computes the others too.

        Returns:
            Logits ``[batch, new, vocabulary]`` (or of the tokens to keep) and the cache with the new rows; a static one
            that went in is spent.

        Raises:
            UsageError: The model cannot run these tokens, sizes do not fit, the cache has no room for them or they are
                more than ``max_length``, or earlier padding stands behind real tokens, where it takes up room in a
                window's cache; or the number of logits to keep is none.
        """
        if not isinstance(logits_to_keep, int | np.integer) or logits_to_keep < 0:
            raise UsageError(
                f"logits_to_keep is {logits_to_keep!r}.", "Give 0 for all tokens, or how many of the last ones."
            )
        binding, cache = self._bound(ids, attention_mask, position_ids, cache)
        if self.prunes_logits and logits_to_keep:  # not by bind_cpu_input, which looks for it among the other inputs
            number = self._runtime.OrtValue.ortvalue_from_numpy(np.array(logits_to_keep, np.int64))
            binding.bind_ortvalue_input(LOGITS_TO_KEEP, number)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0].rpartition("Status Message: ")[2]
            reason = re.sub(r"^/\S+:\d+ ", "", reason)[:200]  # without a place in ONNX Runtime's sources
            new = np.shape(ids)[1]
            earlier = np.shape(attention_mask)[1] - new
            raise UsageError(
                f"'{self._path}' cannot run {new} tokens after {earlier} ({reason}).",
                "Stay within the model's longest sequence and its vocabulary.",
            ) from error
        logits, *presents = binding.get_outputs()
        return logits.numpy()[:, -logits_to_keep:], cache.after(presents)

    def repeatable(self, ids: Ids, attention_mask: Ids, position_ids: Ids, cache: OnnxCache) -> Callable[[], None]:
        """A step that runs as often as it is called, always after the same tokens, and returns nothing: to time it.

        Arguments and errors are those of :meth:`step`; a static cache keeps the tokens it has, except the oldest row of
        a full window, whose place the new one takes.
        """
        binding, bound = self._bound(ids, attention_mask, position_ids, cache)

        def run() -> None:
            _ = bound  # the binding has addresses only
            self._session.run_with_iobinding(binding)

        return run

    def _bound(self, ids: Ids, attention_mask: Ids, position_ids: Ids, cache: OnnxCache) -> tuple[Any, OnnxCache]:
        """A step's inputs and outputs, and the cache it writes to."""
        step = (ids, attention_mask, position_ids)
        ids, attention_mask, position_ids = checked_step(f"'{self._path}'", self.known_tokens, *step)
        earlier = attention_mask[:, : -ids.shape[1]] != 0
        if any(layer.window for layer in self._layers) and (earlier[:, :-1] & ~earlier[:, 1:]).any():
            raise UsageError(
                f"'{self._path}' has sliding windows, and padding stands behind earlier tokens.",
                "Pad prompts on the left.",
            )
        (batch, new), total = ids.shape, attention_mask.shape[1]
        if not self.static:  # whose memory ends where the longest sequence does
            self.require_length(total)
        cache = cache.extended(batch, total - new, new)
        binding = self._session.io_binding()
        given = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": position_ids}
        for name, value in given.items():
            if name in self._inputs:  # which ONNX Runtime keeps alive itself
                binding.bind_cpu_input(name, np.ascontiguousarray(value, dtype=np.int64))
        binding.bind_output("logits")
        cache.bind(binding)
        return binding, cache

    def logits(self, ids: Ids, logits_to_keep: int = 0) -> NDArray[Any]:
        """Logits ``[batch, length, vocabulary]`` of whole, unpadded sequences, or of their last tokens as in `step`."""
        ids = as_ids(f"'{self._path}'", ids)
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        return self.step(ids, np.ones_like(ids), positions, self.empty_cache(*ids.shape), logits_to_keep)[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        attention_mask: Ids | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        on_tokens: Callable[[list[int | None]], None] | None = None,
    ) -> list[list[int]]:
        """Continue prompts; see :func:`mla_compile.runtime.generate.generate`."""
        return generate(
            self,
            prompts,
            max_new_tokens,
            attention_mask=attention_mask,
            sampling=sampling,
            stop=stop,
            on_tokens=on_tokens,
        )

    @staticmethod
    def measured_bytes(cache: OnnxCache) -> int:
        """Bytes that a cache actually holds, from its memory; all of it, if it is static."""
        return cache.nbytes
