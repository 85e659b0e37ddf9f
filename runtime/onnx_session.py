"""Run a converted model in ONNX Runtime: cache stays in runtime-owned memory between steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_compile.errors import LoadError, UsageError
from mla_compile.runtime.generate import Ids, Sampling, generate

__all__ = ["OnnxCache", "OnnxDecoder", "open_session"]

_PAST, _PRESENT = "past_key_values.{}.latent", "present.{}.latent"
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
OnnxCache = tuple[Any, ...]
"""One ``OrtValue`` ``[batch, tokens, row]`` per layer."""


def open_session(path: str | Path, providers: Sequence[str] | None = None, threads: int | None = None) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """Open an ONNX file in ONNX Runtime.

    Args:
        path: The ``.onnx`` file.
        providers: Execution providers in order of preference; the CPU by default.
        threads: Threads per operator; ONNX Runtime's choice by default.

    Raises:
        LoadError: The file is missing or damaged.
        UsageError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("ONNX Runtime is not installed.", "Run: pip install 'mla-compile[cpu]'.") from error
    if not Path(path).is_file():
        raise LoadError(f"There is no file '{path}'.", "Convert a model first: mla-compile MODEL --out FILE.onnx.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and told once
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, list(providers or ["CPUExecutionProvider"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise LoadError(f"ONNX Runtime cannot load '{path}' ({reason}).", "Convert the model again.") from error


class OnnxDecoder:
    """A converted model in ONNX Runtime.

    Args:
        path: The ``.onnx`` file.
        providers: Execution providers in order of preference; the CPU by default.
        threads: Threads per operator; ONNX Runtime's choice by default.

    Attributes:
        metadata: What the compiler stored in the file.
        rows: Numbers one token adds to the cache, per layer.
        vocabulary: How many token ids the model knows.

    Raises:
        LoadError: The file is missing, damaged, or was not made by this compiler.
        UsageError: ONNX Runtime is not installed.
    """

    def __init__(self, path: str | Path, providers: Sequence[str] | None = None, threads: int | None = None) -> None:
        self._session = open_session(path, providers, threads)
        import onnxruntime

        self._runtime = onnxruntime
        self._path = path
        inputs = {i.name: i for i in self._session.get_inputs()}
        if any(name.startswith("cross.") for name in inputs):
            raise LoadError(
                f"'{path}' is the decoder of an encoder-decoder, which needs its encoder's rows.",
                "Run it with ONNX Runtime itself, together with the .encoder.onnx file beside it.",
            )
        if "lengths" in inputs:
            raise LoadError(
                f"'{path}' is a file for TensorRT, whose caches are fixed memory.",
                f"Build an engine of it where there is a GPU: mla-compile tensorrt {path} --out FILE.plan.",
            )
        caches = [inputs[name] for i in range(len(inputs)) if (name := _PAST.format(i)) in inputs]
        stored = self._session.get_modelmeta().custom_metadata_map.get("mla_compile")
        if not caches or stored is None:
            raise LoadError(f"'{path}' has no latent cache inputs.", "Give a file made by mla-compile.")
        self.metadata: Mapping[str, Any] = json.loads(stored)
        self.rows = tuple(int(c.shape[-1]) for c in caches)
        self._dtype = _NUMPY_TYPES[caches[0].type]
        self._inputs = frozenset(inputs)
        self._windows = any("window" in str(c.shape[1]) for c in caches)
        self.vocabulary = int(self._session.get_outputs()[0].shape[-1])

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes one token of one sequence adds to the cache."""
        return sum(self.rows) * np.dtype(self._dtype).itemsize

    def empty_cache(self, batch: int) -> OnnxCache:
        """A cache of no tokens for ``batch`` sequences."""
        empty = self._runtime.OrtValue.ortvalue_from_numpy
        return tuple(empty(np.zeros((batch, 0, row), self._dtype)) for row in self.rows)

    def step(
        self, ids: Ids, attention_mask: Ids, position_ids: Ids, cache: OnnxCache
    ) -> tuple[NDArray[Any], OnnxCache]:
        """Run new tokens; the cache is bound as it lies, not copied through numpy.

        Args:
            ids: ``[batch, new]``.
            attention_mask: ``[batch, past + new]``.
            position_ids: ``[batch, new]``.
            cache: From :meth:`empty_cache` or the previous step.

        Returns:
            Logits ``[batch, new, vocabulary]`` and the grown cache.

        Raises:
            UsageError: The model cannot run these tokens, or earlier padding stands behind real tokens, where it takes
                up room in a window's cache.
        """
        earlier = attention_mask[:, : -ids.shape[1]] != 0
        if self._windows and (earlier[:, :-1] & ~earlier[:, 1:]).any():
            raise UsageError(
                f"'{self._path}' has sliding windows, and padding stands behind earlier tokens.",
                "Pad prompts on the left.",
            )
        binding = self._session.io_binding()
        given = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": position_ids}
        for name, value in given.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(value, dtype=np.int64))
        binding.bind_output("logits")
        for layer, past in enumerate(cache):
            binding.bind_ortvalue_input(_PAST.format(layer), past)
            binding.bind_output(_PRESENT.format(layer))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            reason = str(error).strip().splitlines()[0].rpartition("Status Message: ")[2][:200]
            new, total = ids.shape[1], attention_mask.shape[1]
            raise UsageError(
                f"'{self._path}' cannot run {new} tokens after {total - new} ({reason}).",
                "Stay within the model's longest sequence and its vocabulary.",
            ) from error
        logits, *present = binding.get_outputs()
        return logits.numpy(), tuple(present)

    def logits(self, ids: Ids) -> NDArray[Any]:
        """Logits ``[batch, length, vocabulary]`` of whole, unpadded sequences."""
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        return self.step(ids, np.ones_like(ids), positions, self.empty_cache(len(ids)))[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        on_tokens: Callable[[list[int | None]], None] | None = None,
    ) -> list[list[int]]:
        """Continue prompts; see :func:`mla_compile.runtime.generate.generate`."""
        return generate(self, prompts, max_new_tokens, sampling=sampling, stop=stop, on_tokens=on_tokens)

    @staticmethod
    def measured_bytes(cache: OnnxCache) -> int:
        """Bytes a cache really holds, from its tensors."""
        return sum(value.numpy().nbytes for value in cache)
