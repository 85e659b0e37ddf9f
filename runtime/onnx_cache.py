"""Where the cache of an ONNX file lives between steps: in tensors that grow, or in memory that is written in place."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mla_compile.errors import UsageError
from mla_compile.runtime.generate import SAME_CACHE

__all__ = [
    "BLOCKS",
    "CROSS",
    "KEY_VALUE",
    "PAST",
    "PAST_SCALE",
    "PRESENT",
    "PRESENT_SCALE",
    "ROOM",
    "WINDOW",
    "CacheLayer",
    "GrowingCache",
    "OnnxCache",
    "StaticCache",
    "cached_layers",
]

PAST, PRESENT = "past_key_values.{}.latent", "present.{}.latent"
"""A layer's cache as input and output of a file."""
PAST_SCALE, PRESENT_SCALE = "past_key_values.{}.scale", "present.{}.scale"
"""What the numbers of a quantised one are to be multiplied with."""
CROSS = "cross.{}.latent"
"""What a decoder's layer reads of the encoder: an input of the decoder, and an output of the encoder."""
KEY_VALUE = (("past_key_values.{}.key", "present.{}.key"), ("past_key_values.{}.value", "present.{}.value"))
"""The same where it is two tensors ``[batch, heads, tokens, channels]``: two halves of a row, or keys and values."""
ROOM = "cache_length"
"""The dimension of a static cache by which a file is known to have one."""
BLOCKS = "cache_blocks"
"""The first dimension of a static cache that lies in blocks of tokens ``[blocks, tokens, 1, row]``."""
WINDOW = "_of_window_"
"""What stands between a dimension's name and the window of its layer, if that has one."""
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,  # which numpy does not have: its bits
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}
_BFLOAT16 = 16
"""ONNX's number of the type."""
_BLOCK = 128
"""Rows by which the part of a static cache that is shown to the model grows: it attends to all it is shown."""


@dataclass(frozen=True)
class CacheLayer:
    """One layer's cache, or a part of it that is a tensor of its own, as a file declares it.

    Attributes:
        past: Its name as an input.
        present: Its name as an output.
        dtype: Type of its numbers.
        element: The same as ONNX Runtime takes it: a number of ONNX, for what numpy does not have.
        row: Numbers a token adds to every head.
        window: Tokens its queries see, 0 for all.
        static: Whether it has a size of its own.
        heads: How many heads have rows of their own; None where there is no such dimension.
        block: Tokens of a block, where the cache lies in blocks.
    """

    past: str
    present: str
    dtype: type
    element: Any
    row: int
    window: int
    static: bool
    heads: int | None = None
    block: int | None = None

    @classmethod
    def of(cls, value: Any) -> CacheLayer:  # noqa: ANN401 - onnxruntime has no types
        """Read from a session's input ``[batch, tokens, row]``, with heads behind the batch or in blocks."""
        batch, *heads, tokens, row = value.shape
        kind, _, window = str(tokens).partition(WINDOW)
        present = value.name.replace("past_key_values", "present", 1)
        dtype = _NUMPY_TYPES[value.type]
        element = _BFLOAT16 if dtype == np.uint16 else dtype
        if batch == BLOCKS:
            return cls(value.name, present, dtype, element, int(row), 0, static=True, block=int(heads[0]))
        return cls(value.name, present, dtype, element, int(row), int(window or 0), kind == ROOM, *map(int, heads))

    def empty(self, batch: int, runtime: Any, device: str) -> Any:  # noqa: ANN401
        """An ``OrtValue`` of no tokens."""
        numbers: NDArray[Any] = np.zeros(self.shape(batch, 0), self.dtype)
        if self.element == _BFLOAT16:
            return runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(numbers, self.element)
        return runtime.OrtValue.ortvalue_from_numpy(numbers, device, 0)

    @property
    def row_bytes(self) -> int:
        """Bytes a token adds."""
        return (self.heads or 1) * self.row * np.dtype(self.dtype).itemsize

    def shape(self, batch: int, rows: int) -> tuple[int, ...]:
        """Of so many rows of every sequence."""
        if self.block is not None:
            return (batch * rows // self.block, self.block, 1, self.row)
        return (batch, rows, self.row) if self.heads is None else (batch, self.heads, rows, self.row)

    def rows(self, tokens: int) -> int:
        """Rows kept of so many tokens: no more than later ones can see, of which a static cache makes a ring."""
        if self.block is not None:
            return -(-tokens // self.block) * self.block
        return min(tokens, self.window - 1) if self.window else tokens


class OnnxCache(Protocol):
    """A cache between two steps."""

    @property
    def nbytes(self) -> int:
        """Bytes it holds, from its memory."""
        ...

    def extended(self, batch: int, past: int, new: int) -> OnnxCache:
        """The same before a step of so many sequences, each of so many new tokens after so many earlier ones.

        Raises:
            UsageError: There is no room for them, or the cache is not of so many sequences or tokens.
        """
        ...

    def bind(self, binding: Any) -> None:  # noqa: ANN401
        """Make it the input and output of a step, as the last outputs."""
        ...

    def repeated(self, times: int) -> OnnxCache:
        """One of so many sequences that are all alike, of a cache of one sequence in the processor's memory."""
        ...

    def after(self, presents: Sequence[Any]) -> OnnxCache:
        """The cache after the step, whose outputs these are."""
        ...


@dataclass(frozen=True)
class GrowingCache:
    """A cache that is made anew by every step.

    Attributes:
        layers: What the file says of them.
        values: One ``OrtValue`` ``[batch, tokens, row]`` each.
        device: Where they are.
    """

    layers: tuple[CacheLayer, ...]
    values: tuple[Any, ...]
    device: str

    @classmethod
    def empty(cls, layers: Sequence[CacheLayer], batch: int, runtime: Any, device: str) -> GrowingCache:  # noqa: ANN401
        """Of no tokens."""
        return cls(tuple(layers), tuple(layer.empty(batch, runtime, device) for layer in layers), device)

    @property
    def nbytes(self) -> int:
        """See :class:`OnnxCache`."""
        return sum(value.tensor_size_in_bytes() for value in self.values)

    def extended(self, batch: int, past: int, new: int) -> GrowingCache:
        """See :class:`OnnxCache`; ONNX Runtime itself would stretch what is of one token or sequence over all."""
        for layer, value in zip(self.layers, self.values, strict=True):
            shape, expected = value.shape(), layer.shape(batch, layer.rows(past))
            if tuple(shape) != expected:
                raise UsageError(
                    f"The mask is of {batch} sequences of {past} earlier tokens, of which a cache has shape "
                    f"{list(expected)}, but '{layer.past}' has {shape}.",
                    SAME_CACHE,
                )
        return self

    def bind(self, binding: Any) -> None:  # noqa: ANN401
        """See :class:`OnnxCache`."""
        for layer, value in zip(self.layers, self.values, strict=True):
            binding.bind_ortvalue_input(layer.past, value)
            binding.bind_output(layer.present, self.device)

    def repeated(self, times: int) -> GrowingCache:
        """See :class:`OnnxCache`."""
        values = (type(v).ortvalue_from_numpy(np.repeat(v.numpy(), times, 0)) for v in self.values)
        return replace(self, values=tuple(values))

    def after(self, presents: Sequence[Any]) -> GrowingCache:
        """See :class:`OnnxCache`."""
        return replace(self, values=tuple(presents))


@dataclass(frozen=True)
class _Memory:
    """One layer's memory.

    Attributes:
        owner: What keeps it alive.
        pointer: Where it begins.
        numbers: The same as an array of one dimension; None where the processor cannot reach it.
    """

    owner: Any
    pointer: int
    numbers: NDArray[Any] | None


@dataclass
class _Layout:
    """How rows lie in memory that several caches share; it changes with the memory, whoever of them moves rows.

    Attributes:
        shown: Tokens of each sequence that the model is shown the room of.
    """

    shown: int


@dataclass(frozen=True)
class StaticCache:
    """A cache that is written in place: one allocation per layer, which is the input and the output of every step.

    A step spends the cache it is given: what was written is seen through both, and only the new one knows of it. A step
    that fails spends nothing, unless it came as far as to write over a window's oldest row.

    Of the memory the model is shown the rows of every sequence up to the next multiple of 128, since it attends to all
    it is shown. When they are more, those of later sequences and heads move up; a device of its own, where that
    would take a kernel, is shown everything from the beginning.

    Attributes:
        layers: What the file says of them.
        memory: Theirs.
        layout: How rows lie in it.
        batch: Sequences.
        capacity: Tokens of each that there is room for.
        device: Where the memory is.
        tokens: Tokens of each so far.
    """

    layers: tuple[CacheLayer, ...]
    memory: tuple[_Memory, ...]
    layout: _Layout
    batch: int
    capacity: int
    device: str
    tokens: int

    @classmethod
    def empty(
        cls,
        layers: Sequence[CacheLayer],
        batch: int,
        capacity: int,
        runtime: Any,  # noqa: ANN401
        device: str,
    ) -> StaticCache:
        """Of no tokens, filled with zeros: what is hidden from a query is multiplied with zero, and must be a number.

        Raises:
            UsageError: There is not as much memory.
        """

        def allocate(layer: CacheLayer) -> _Memory:
            numbers: NDArray[Any] = np.zeros(layer.shape(batch, layer.rows(capacity)), layer.dtype).reshape(-1)
            if device == "cpu":
                return _Memory(numbers, numbers.ctypes.data, numbers)
            value = runtime.OrtValue.ortvalue_from_numpy(numbers, device, 0)
            return _Memory(value, value.data_ptr(), None)

        try:
            memory = tuple(map(allocate, layers))
        except (MemoryError, RuntimeError) as error:
            raise UsageError(
                f"There is no memory for the cache of {batch} sequences of {capacity} tokens.",
                "Give a smaller --max-length or fewer prompts.",
            ) from error
        layout = _Layout(0 if device == "cpu" else capacity)
        return cls(tuple(layers), memory, layout, batch, capacity, device, 0)

    @property
    def nbytes(self) -> int:
        """See :class:`OnnxCache`: all the memory, used or not."""
        return self.batch * sum(layer.rows(self.capacity) * layer.row_bytes for layer in self.layers)

    def extended(self, batch: int, past: int, new: int) -> StaticCache:
        """See :class:`OnnxCache`."""
        total = past + new
        if batch != self.batch:
            raise UsageError(f"The cache is of {self.batch} sequences, and these are {batch}.", SAME_CACHE)
        if past != self.tokens:
            raise UsageError(
                f"The mask is of {past} earlier tokens, but the cache of {self.tokens}.",
                SAME_CACHE,
            )
        if total > self.capacity:
            raise UsageError(
                f"The cache has room for {self.capacity} tokens, and these are {total}.", "Raise --max-length."
            )
        before = self.layout.shown
        self.layout.shown = max(before, min(self.capacity, -(-total // _BLOCK) * _BLOCK))
        for layer, memory in zip(self.layers, self.memory, strict=True):
            if memory.numbers is not None:
                blocks = self.batch * (layer.heads or 1)
                _spread(memory.numbers, layer, blocks, (layer.rows(before), layer.rows(self.layout.shown)))
        return replace(self, tokens=total)

    def bind(self, binding: Any) -> None:  # noqa: ANN401
        """See :class:`OnnxCache`."""
        for layer, memory in zip(self.layers, self.memory, strict=True):
            shape = layer.shape(self.batch, layer.rows(self.layout.shown))
            for bind, name in ((binding.bind_input, layer.past), (binding.bind_output, layer.present)):
                bind(name, self.device, 0, layer.element, shape, memory.pointer)

    def repeated(self, times: int) -> StaticCache:
        """See :class:`OnnxCache`."""
        memory = []
        for layer, one in zip(self.layers, self.memory, strict=True):
            assert one.numbers is not None
            shown = one.numbers[: (layer.heads or 1) * layer.rows(self.layout.shown) * layer.row]
            numbers: NDArray[Any] = np.zeros(times * len(one.numbers), layer.dtype)
            numbers[: times * len(shown)] = np.tile(shown, times)
            memory.append(_Memory(numbers, numbers.ctypes.data, numbers))
        return replace(self, memory=tuple(memory), layout=replace(self.layout), batch=times)

    def after(self, presents: Sequence[Any]) -> StaticCache:
        """See :class:`OnnxCache`: the outputs are its own memory."""
        return self


def _spread(numbers: NDArray[Any], layer: CacheLayer, blocks: int, rows: tuple[int, int]) -> None:
    """Move the rows of every sequence and head to where they lie when each has room for more, from the last on."""
    before, after = (count * layer.row for count in rows)
    if before == after:
        return
    for place in range(blocks - 1, 0, -1):
        numbers[place * after : place * after + before] = numbers[place * before : (place + 1) * before]


def cached_layers(inputs: Container[str]) -> int:
    """How many layers a file has whose caches are one tensor each, by the names of its inputs."""
    return sum(1 for _ in takewhile(lambda layer: PAST.format(layer) in inputs, count()))
