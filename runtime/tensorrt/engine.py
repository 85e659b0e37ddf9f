"""Run an engine: caches are written in place on the GPU, and steps of one token are replayed from a CUDA graph.

Beside an engine ``X.plan`` lies ``X.plan.json``, which says what it was built by and for, and what its inputs mean.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from mla_compile.errors import LoadError
from mla_compile.runtime.fixed_cache import FixedCache, FixedCacheDecoder, Limits
from mla_compile.runtime.generate import Ids
from mla_compile.runtime.onnx_cache import PAST, PRESENT, cached_layers
from mla_compile.runtime.tensorrt.engine_builder import DECODE, PREFILL
from mla_compile.runtime.tensorrt.installed import messages, require_device, require_tensorrt, start

__all__ = ["EngineCache", "TensorRTDecoder", "facts_path"]

_INPUTS = {"input_ids": torch.int64, "lengths": torch.int32, "position_ids": torch.int64}


@dataclass
class EngineCache(FixedCache):
    """Rows of all sequences, and how the next token of them all is run.

    Attributes:
        step: The step of one token, once there was one.
    """

    step: _Step | None = None


class _Step:
    """A step of a fixed number of sequences and new tokens, whose inputs and logits have addresses of their own.

    Args:
        decoder: What runs it.
        profile: Under which profile.
        shape: ``(batch, new)``.
        cache: The caches.
    """

    def __init__(self, decoder: TensorRTDecoder, profile: int, shape: tuple[int, int], cache: EngineCache) -> None:
        self._decoder, self._profile = decoder, profile
        sizes = {"input_ids": shape, "lengths": shape[:1], "position_ids": shape}
        self._given = {
            name: torch.zeros(size, dtype=_INPUTS[name], device=decoder.device)
            for name, size in sizes.items()
            if name in decoder.inputs
        }
        self._logits = torch.zeros(*shape, decoder.vocabulary, dtype=decoder.logits_dtype, device=decoder.device)
        pasts = {PAST.format(i): rows for i, rows in enumerate(cache.rows)}
        presents = {PRESENT.format(i): rows for i, rows in enumerate(cache.rows)}  # the same: written in place
        self._inputs = {**self._given, **pasts}
        self._tensors = {**self._inputs, **presents, "logits": self._logits}
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, given: Mapping[str, Ids], repeated: bool) -> NDArray[Any]:
        """Run on these inputs; a step that will be repeated is captured once it has run."""
        for name, tensor in self._given.items():
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(given[name])))  # to the tensor's own type
        if self._decoder.bound.get(self._profile) is not self:
            self._graph = None  # what another step did to the context, a graph that was captured before does not know
            self._bind()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._enqueue()
        logits: NDArray[Any] = self._logits.float().cpu().numpy()
        if repeated and self._graph is None and self._decoder.stream is not None and self._decoder.captures:
            self._capture(self._decoder.stream)
        return logits

    def _bind(self) -> None:
        context = self._decoder.contexts[self._profile]
        for name, tensor in self._tensors.items():
            if name in self._inputs:
                self._must(context.set_input_shape(name, tuple(tensor.shape)), f"takes no {name} of this shape")
            self._must(context.set_tensor_address(name, tensor.data_ptr()), f"takes no memory for {name}")
        self._decoder.bound[self._profile] = self

    def _enqueue(self) -> None:
        stream = self._decoder.stream
        handle = 0 if stream is None else stream.cuda_stream
        self._must(self._decoder.contexts[self._profile].execute_async_v3(handle), "cannot be run")

    def _capture(self, stream: torch.cuda.Stream) -> None:
        """Keep the launches of the step that has just run; capturing runs nothing.

        An engine that cannot be captured is run launch by launch: its answers are the same.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls are watched: what TensorRT does elsewhere is none of the graph's business.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._enqueue()
        except (RuntimeError, LoadError):
            self._decoder.captures = False
        else:
            self._graph = graph

    @staticmethod
    def _must(done: bool, what: str) -> None:
        if not done:
            raise LoadError(f"The engine {what}.", "Build it again with this version of mla-compile.")


class TensorRTDecoder(FixedCacheDecoder):
    """A converted model as an engine.

    Args:
        path: The ``.plan`` file, with ``.plan.json`` beside it.
        device: Where its memory is; other than a CUDA device only where something else stands in for TensorRT.

    Attributes:
        contexts: One for each profile, so that none is ever switched.
        bound: Which step every context was last prepared for, by profile, while somebody has its caches.
        stream: The CUDA stream that everything runs in; None without CUDA.
        device: Where memory is.
        captures: Whether steps of one token are kept as CUDA graphs; not where that was tried in vain, nor where
            weights are streamed.
        inputs: Names of the inputs it has.
        logits_dtype: Type of its logits.

    Raises:
        LoadError: A file is missing or damaged, or the engine is for another TensorRT or GPU.
        UsageError: TensorRT is not installed, or there is no GPU.
    """

    def __init__(self, path: str | Path, *, device: str = "cuda") -> None:
        path = Path(path)
        facts = _read_facts(path)
        trt = require_tensorrt()
        if device == "cuda":
            require_device()
        said = messages(trt)
        runtime = start(trt.Runtime, said)
        runtime.engine_host_code_allowed = bool(facts["version_compatible"])
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise LoadError(
                f"TensorRT {trt.__version__} cannot load '{path}', which TensorRT {facts['tensorrt']} built for "
                f"{facts['device']} ({said.reason}).",
                f"Build it again here: mla-compile tensorrt {path.with_name(facts['onnx'])} --out {path} --force.",
            )
        self._runtime, self._engine = runtime, engine  # contexts refer to them
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        layers = range(cached_layers(names))
        dtypes = {trt.float32: torch.float32, trt.float16: torch.float16, trt.bfloat16: torch.bfloat16}
        self._cache_dtype = dtypes[engine.get_tensor_dtype(PAST.format(0))]
        self._caches = [tuple(engine.get_tensor_shape(PAST.format(i)))[1:] for i in layers]
        self.logits_dtype = dtypes[engine.get_tensor_dtype("logits")]
        self.inputs = frozenset(names) & _INPUTS.keys()
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.bound: MutableMapping[int, _Step] = WeakValueDictionary()
        self.captures = not facts.get("weight_streaming")
        self._lock = threading.Lock()
        if facts.get("weight_streaming"):
            self._stream_weights()
        self.contexts = [self._context(trt, profile) for profile in (DECODE, PREFILL)]
        batch, new = engine.get_tensor_profile_shape("input_ids", PREFILL)[2]
        super().__init__(
            str(path),
            Limits(room=self._caches[0][1], batch=batch, new=new),
            [shape[-1] for shape in self._caches],
            self._cache_dtype.itemsize,
            int(engine.get_tensor_shape("logits")[-1]),
            facts,
        )

    def _stream_weights(self) -> None:
        """Give weights the GPU's free memory but for the caches of the largest batch, before a context exists."""
        batch = self._engine.get_tensor_profile_shape("input_ids", PREFILL)[2][0]
        caches = batch * sum(math.prod(shape) for shape in self._caches) * self._cache_dtype.itemsize
        budget = self._engine.get_weight_streaming_automatic_budget() - caches
        self._engine.weight_streaming_budget_v2 = max(0, min(budget, self._engine.streamable_weights_size))

    def _context(self, trt: Any, profile: int) -> Any:  # noqa: ANN401
        """A context of one profile, with the memory that this profile needs and no more."""
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
        stream = 0 if self.stream is None else self.stream.cuda_stream
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise LoadError(
                "There is not enough memory on the GPU to run the engine.", "Build it with a smaller --max-batch."
            )
        return context

    def memory(self, batch: int) -> EngineCache:
        """See :meth:`FixedCacheDecoder.memory`."""
        with torch.cuda.stream(self.stream):
            made = [torch.zeros(batch, *shape, dtype=self._cache_dtype, device=self.device) for shape in self._caches]
        return EngineCache(tuple(made))

    def run(self, ids: Ids, lengths: Ids, positions: Ids, cache: EngineCache) -> NDArray[Any]:
        """Run new tokens; see :meth:`FixedCacheDecoder.run`."""
        batch, new = ids.shape
        given = {"input_ids": ids, "lengths": lengths, "position_ids": positions}
        with self._lock, torch.cuda.stream(self.stream):  # contexts and the stream are those of all threads
            if new > 1:
                return _Step(self, PREFILL, (batch, new), cache)(given, repeated=False)
            cache.step = cache.step or _Step(self, DECODE, (batch, 1), cache)
            return cache.step(given, repeated=True)

    @staticmethod
    def measured_bytes(cache: EngineCache) -> int:
        """Bytes that a cache actually holds, from its tensors."""
        return sum(rows.nbytes for rows in cache.rows)


def facts_path(path: Path) -> Path:
    """Where it is written what an engine is."""
    return path.with_name(f"{path.name}.json")


def _read_facts(path: Path) -> Mapping[str, Any]:
    for file in (path, facts_path(path)):
        if not file.is_file():
            raise LoadError(f"There is no file '{file}'.", "Build an engine first: mla-compile MODEL --out FILE.plan.")
    try:
        facts: Mapping[str, Any] = json.loads(facts_path(path).read_text("utf-8"))
        _ = facts["tensorrt"], facts["device"], facts["onnx"], facts["version_compatible"]
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"'{facts_path(path)}' does not describe an engine.", "Build the engine again.") from error
    return facts
