"""Random latent-attention problems: sizes drawn by hypothesis, numbers from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mla_compile.runtime import ops


@dataclass(frozen=True)
class Case:
    """Sizes of one problem; ``padding`` is what surrounds the real tokens of every sequence."""

    batch: int = 2
    new: int = 4
    past: int = 3
    heads: int = 4
    rope_groups: int = 2
    up_groups: int = 2
    nope: int = 3
    half: int = 2
    rank: int = 5
    v_dim: int = 3
    window: int = 0
    padding: tuple[tuple[int, int], ...] = ((0, 0), (2, 1))
    seed: int = 0
    scale: float = 0.4

    def mask(self, total: int) -> Tensor:
        """``[batch, total]``: any non-zero number marks a real token."""
        place = torch.arange(total)
        left, right = (torch.tensor([p[i] for p in self.padding])[:, None] for i in (0, 1))
        return ((place >= left) & (place < total - right)) * (1 + place % 3)

    def tensors(self, dtype: torch.dtype = torch.float64, *, real: bool = False, **sizes: int) -> dict[str, Tensor]:
        """Tensor arguments of the operator; ``real`` leaves padding out, ``sizes`` replace those of the case."""
        new, past = (sizes.get(name, getattr(self, name)) for name in ("new", "past"))
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        width = self.rank + self.rope_groups * 2 * self.half
        angle = 5 * draw(self.batch, new, self.rope_groups, self.half)
        floats = {
            "query": draw(self.batch, new, self.heads, self.nope + 2 * self.half),
            "row": draw(self.batch, new, width),
            "past": draw(self.batch, past, width),
            "cos": angle.cos(),
            "sin": angle.sin(),
            "key_up": draw(self.up_groups, self.nope, self.rank),
            "value_up": draw(self.up_groups, self.rank, self.v_dim),
        }
        mask = torch.ones(self.batch, past + new, dtype=torch.long) if real else self.mask(past + new)
        return {name: value.to(dtype) for name, value in floats.items()} | {"attention_mask": mask}

    def settings(self, implementation: str = "op") -> dict[str, Any]:
        """The other arguments; the reference writes "no window" as None."""
        return {"scale": self.scale, "window": self.window or (None if implementation == "reference" else 0)}

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
    ) -> tuple[Tensor, Tensor]:
        """``mla::latent_attention``, which takes its tensors by position."""
        return ops.latent_attention(query, row, past, attention_mask, cos, sin, key_up, value_up, scale, window)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any sizes a model may have, head channels present: rope or no rope, grouped or not, padded anywhere."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    divisors = st.sampled_from([d for d in range(1, heads + 1) if heads % d == 0])
    nope = draw(st.integers(0, 4))
    batch, total = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    new = draw(st.integers(1, total))
    padding = st.tuples(st.integers(0, total), st.integers(0, total))
    return Case(
        batch=batch,
        new=new,
        past=total - new,
        heads=heads,
        rope_groups=draw(divisors),
        up_groups=draw(divisors),
        nope=nope,
        half=draw(st.integers(0 if nope else 1, 3)),
        rank=draw(st.integers(1, 6)),
        v_dim=draw(st.integers(1, 4)),
        window=draw(st.integers(0, 5)),
        padding=tuple(draw(st.lists(padding, min_size=batch, max_size=batch))),
        seed=draw(st.integers(0, 2**16)),
    )
