"""From the nodes of a file to the machine code that a library of plugins holds for them: no TensorRT, no GPU.

Unlike quickly deployable plugins (:mod:`mla_compile.runtime.tensorrt.kernels`) a library chooses the number of splits
when shapes are known, launches two kernels, and gives them floating-point arguments and all shared memory there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mla_compile.runtime.kernels.aot import Compiled, compile_kernel
from mla_compile.runtime.kernels.cache import RowLayout
from mla_compile.runtime.kernels.decode import combine_kernel
from mla_compile.runtime.kernels.schedule import DecodeSpec, Tiles, choose_tiles, combine_constants, shared_bytes
from mla_compile.runtime.onnx_variant import Variant
from mla_compile.runtime.tensorrt.entries import decode_entry
from mla_compile.runtime.tensorrt.functions import DECODE

__all__ = ["SPLITS", "Combination", "Decode"]

SPLITS = (4, 16, 64, 256)
"""Splits that there are kernels to combine; the next of them takes what lies between. No GPU has 256 processors."""


@dataclass(frozen=True, slots=True)
class Decode:
    """One kind of ``LatentAttentionDecode``; axes are named as in :mod:`mla_compile.runtime.tensorrt.functions`.

    Attributes:
        layout: What a row holds.
        heads: ``H``.
        dtype: Triton's name for the type of queries and rows: ``fp16``, ``bf16`` or ``fp32``.
        windowed: Whether there is a window.
        capped: Whether there is a soft-cap.
        slopes: Whether logits fall with distance.
        sinks: Whether the softmax has a further logit per head.
        chunked: Whether the window does not slide (only beside ``windowed``).
    """

    layout: RowLayout
    heads: int
    dtype: str
    windowed: bool = False
    capped: bool = False
    slopes: bool = False
    sinks: bool = False
    chunked: bool = False

    @property
    def name(self) -> str:
        """The node's operator, which is the plugin's name."""
        layout = self.layout
        return Variant(
            key_scales=layout.key_scales > 0,
            value_scales=layout.value_scales > 0,
            scaled_rope=layout.scaled_rope,
            softcap=self.capped,
            slopes=self.slopes,
            sinks=self.sinks,
            chunked=self.chunked,
        ).named(DECODE)

    @property
    def combination(self) -> Combination:
        """What combines its splits."""
        return Combination(self.layout.rank, self.dtype, self.sinks)

    def spec(self, new: int) -> DecodeSpec:
        """What the decode kernel is compiled for; two new tokens stand for any number."""
        itemsize = 4 if self.dtype == "fp32" else 2
        return DecodeSpec(
            self.layout, self.heads, new, itemsize, windowed=self.windowed, capped=self.capped, chunked=self.chunked
        )

    def tactics(self, architecture: int) -> tuple[Tiles, ...]:
        """Tiles for one new token to choose among by time: the schedule's own, and smaller ones.

        Args:
            architecture: Compute capability, as 90 for 9.0.

        Raises:
            ValueError: A row is too wide for any tile.
        """
        spec = self.spec(1)
        best = choose_tiles(spec, architecture)
        smaller = (replace(best, rows=16, keys=keys, warps=4, stages=stages) for keys in (32, 16) for stages in (3, 2))
        room = shared_bytes(spec, best)
        return tuple(dict.fromkeys((best, *(t for t in smaller if shared_bytes(spec, t) <= room))))

    def constants(self, new: int, tiles: Tiles) -> dict[str, object]:
        """The kernel's compile-time arguments."""
        made = self.spec(new).constants(tiles)
        return {name: made[name] for name in decode_entry.arg_names if name in made}

    def compile(self, new: int, tiles: Tiles, architecture: int, *, direct: bool) -> Compiled:
        """Compile the decode kernel.

        Args:
            new: New tokens: 1, or 2 for any number.
            tiles: What one program works on.
            architecture: Compute capability.
            direct: Whether the result itself is written, by one split, and not parts of it.
        """
        types = dict.fromkeys(("q_latent", "q_rope", "rows"), f"*{self.dtype}")
        types["output"] = f"*{self.dtype}" if direct else "*fp32"
        # Sinks count once: the combination adds them where there is one.
        given = {"slopes": self.slopes, "sinks": self.sinks and direct}
        constants = self.constants(new, tiles) | {name: None for name, present in given.items() if not present}
        return compile_kernel(decode_entry, types, constants, architecture, tiles.warps, tiles.stages)


@dataclass(frozen=True, slots=True)
class Combination:
    """The combination of splits.

    Attributes:
        rank: ``r``.
        dtype: Triton's name for the type of the result.
        sinks: Whether the softmax has a further logit per head.
    """

    rank: int
    dtype: str
    sinks: bool = False

    def compile(self, splits: int, architecture: int) -> Compiled:
        """Compile for up to so many splits."""
        constants: dict[str, object] = {**combine_constants(self.rank, splits), "lse": None}
        constants |= {} if self.sinks else {"sinks": None}
        return compile_kernel(combine_kernel, {"output": f"*{self.dtype}"}, constants, architecture, 4, 1)
