"""Random attention problems with a cache: sizes drawn by hypothesis, numbers from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from mla_compile.runtime import ops, reference
from mla_compile.runtime.masks import kept_rows


@dataclass(frozen=True)
class _Problem:
    """What both operators have; ``padding`` is what surrounds the real tokens of every sequence."""

    batch: int = 2
    new: int = 4
    past: int = 3
    heads: int = 4
    v_dim: int = 3
    window: int = 0
    chunked: bool = False
    softcap: float = 0.0
    sinks: bool = False
    slopes: bool = False
    padding: tuple[tuple[int, int], ...] = ((0, 0), (2, 1))
    seed: int = 0
    scale: float = 0.4

    PER_TOKEN: ClassVar[tuple[str, ...]] = ("query", "row")

    @property
    def floats(self) -> tuple[str, ...]:
        """Names of the tensors that may have a gradient, in the operator's order."""
        return tuple(name for name, value in self.tensors().items() if value.is_floating_point())

    def mask(self, total: int) -> Tensor:
        """``[batch, total]``: any non-zero number marks a real token."""
        place = torch.arange(total)
        left, right = (torch.tensor([p[i] for p in self.padding])[:, None] for i in (0, 1))
        return ((place >= left) & (place < total - right)) * (1 + place % 3)

    def shapes(self, new: int, past: int) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def tensors(self, dtype: torch.dtype = torch.float64, *, real: bool = False, **sizes: int) -> dict[str, Tensor]:
        """Tensor arguments of the operator; ``real`` leaves padding out, ``sizes`` replace those of the case."""
        new, past = (sizes.get(name, getattr(self, name)) for name in ("new", "past"))
        generator = torch.Generator().manual_seed(self.seed)
        mask = torch.ones(self.batch, past + new, dtype=torch.long) if real else self.mask(past + new)
        tensors = {"attention_mask": mask}
        for name, shape in self.shapes(new, past).items():
            tensors[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        for name in ("sinks", "slopes"):
            if getattr(self, name):
                tensors[name] = torch.randn(self.heads, generator=generator, dtype=torch.float64)
        tensors["past"] = tensors["past"][:, past - kept_rows(past, self.window) :]
        return {name: x if name == "attention_mask" else x.to(dtype) for name, x in self.adapt(tensors).items()}

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def settings(self, implementation: str = "op") -> dict[str, Any]:
        """The other arguments; the reference writes "no window" as None."""
        window = self.window or (None if implementation == "reference" else 0)
        chunked = self.chunked and self.window > 0  # tests change the window alone
        return {"scale": self.scale, "window": window, "softcap": self.softcap, "chunked": chunked}


@dataclass(frozen=True)
class Case(_Problem):
    """Sizes of one problem of ``latent_attention``."""

    rope_groups: int = 2
    up_groups: int = 2
    nope: int = 3
    half: int = 2
    rank: int = 5
    key_scales: int = 0
    value_scales: int = 0
    scaled_rope: bool = False

    PER_TOKEN: ClassVar[tuple[str, ...]] = ("query", "row", "cos", "sin")

    @property
    def width(self) -> int:
        return self.rank + self.rope_groups * 2 * self.half + self.key_scales + self.value_scales

    def settings(self, implementation: str = "op") -> dict[str, Any]:
        features = {"value_scales": self.value_scales, "scaled_rope": self.scaled_rope}
        return super().settings(implementation) | features

    def shapes(self, new: int, past: int) -> dict[str, tuple[int, ...]]:
        angles = (self.batch, new, self.rope_groups, self.half)
        return {
            "query": (self.batch, new, self.heads, self.nope + 2 * self.half),
            "row": (self.batch, new, self.width),
            "past": (self.batch, past, self.width),
            "cos": angles,
            "sin": angles,
            "key_up": (self.up_groups, self.nope, self.rank),
            "value_up": (self.up_groups, self.rank, self.v_dim),
        }

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        angle = 5 * tensors["cos"]
        return tensors | {"cos": angle.cos(), "sin": angle.sin()}

    @staticmethod
    def operator(
        query: Tensor,
        row: Tensor,
        past: Tensor,
        attention_mask: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_up: Tensor,
        value_up: Tensor,
        scale: float,
        window: int,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
        value_scales: int = 0,
        scaled_rope: bool = False,
        chunked: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``mla::latent_attention``, which takes its tensors by position."""
        return ops.latent_attention(
            query,
            row,
            past,
            attention_mask,
            cos,
            sin,
            key_up,
            value_up,
            sinks,
            slopes,
            scale,
            window,
            softcap,
            value_scales,
            scaled_rope=scaled_rope,
            chunked=chunked,
        )

    def expected(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the reference."""
        return reference.latent_attention(**x, **self.settings("reference"))


@dataclass(frozen=True)
class CachedCase(_Problem):
    """Sizes of one problem of ``cached_attention``."""

    kv_heads: int = 2
    head_dim: int = 5

    def shapes(self, new: int, past: int) -> dict[str, tuple[int, ...]]:
        width = self.kv_heads * (self.head_dim + self.v_dim)
        return {
            "query": (self.batch, new, self.heads, self.head_dim),
            "row": (self.batch, new, width),
            "past": (self.batch, past, width),
        }

    def settings(self, implementation: str = "op") -> dict[str, Any]:
        return super().settings(implementation) | {"kv_heads": self.kv_heads}

    @staticmethod
    def operator(
        query: Tensor,
        row: Tensor,
        past: Tensor,
        attention_mask: Tensor,
        kv_heads: int,
        scale: float,
        window: int,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
        chunked: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``mla::cached_attention``, which takes its tensors by position."""
        settings = (kv_heads, scale, window, softcap, chunked)
        return ops.cached_attention(query, row, past, attention_mask, sinks, slopes, *settings)

    def expected(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the reference."""
        return reference.cached_attention(**x, **self.settings("reference"))


def _problem(draw: st.DrawFn) -> tuple[dict[str, Any], st.SearchStrategy[int]]:
    """Sizes and features of any problem, and the divisors of its heads."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    batch, total = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    new = draw(st.integers(1, total))
    padding = st.tuples(st.integers(0, total), st.integers(0, total))
    window = draw(st.integers(0, 5))
    problem = {
        "batch": batch,
        "new": new,
        "past": total - new,
        "heads": heads,
        "v_dim": draw(st.integers(1, 4)),
        "window": window,
        "chunked": window > 0 and draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.7, 3.0])),
        "sinks": draw(st.booleans()),
        "slopes": draw(st.booleans()),
        "padding": tuple(draw(st.lists(padding, min_size=batch, max_size=batch))),
        "seed": draw(st.integers(0, 2**16)),
    }
    return problem, st.sampled_from([d for d in range(1, heads + 1) if heads % d == 0])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any sizes a model may have, head channels present: rope or no rope, grouped or not, padded anywhere."""
    problem, divisors = _problem(draw)
    nope, key_scales = draw(st.integers(0, 4)), draw(st.just(0) | divisors)
    return Case(
        **problem,
        rope_groups=draw(divisors),
        up_groups=draw(divisors),
        nope=nope,
        half=draw(st.integers(0 if nope else 1, 3)),
        rank=draw(st.integers(1, 6)),
        key_scales=key_scales,
        value_scales=draw(st.just(0) | divisors),
        scaled_rope=key_scales > 0 and draw(st.booleans()),
    )


@st.composite
def cached_cases(draw: st.DrawFn) -> CachedCase:
    """Any sizes a model may have: grouped or not, padded anywhere."""
    problem, divisors = _problem(draw)
    return CachedCase(**problem, kv_heads=draw(divisors), head_dim=draw(st.integers(1, 5)))


problems = cases() | cached_cases()
"""Of either operator."""
