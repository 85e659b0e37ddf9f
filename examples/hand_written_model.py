"""A model of one's own: attention is found by what it computes, whatever the classes are called.

The model below is ordinary PyTorch, but its attention is an operator of its own, as a fused kernel is. A few lines teach
what that computes; everything else is recognised. Nothing is trained here, so the conversion leaves nothing out
(``exact``) and must answer as the original does.

    python examples/hand_written_model.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, export, save
from torch.nn.functional import scaled_dot_product_attention, silu

import mla_compile

VOCABULARY, WIDTH, HEADS, GROUPS, CHANNELS = 128, 64, 4, 2, 16


@torch.library.custom_op("examples::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a library of kernels would bring, ``[batch, heads, length, channels]``; the compiler cannot look into it."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


class Block(nn.Module):
    """Grouped-query attention with rotary embeddings, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(WIDTH, 1e-5), nn.RMSNorm(WIDTH, 1e-5)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * CHANNELS, bias=False)  # fused: which rows are what is probed
        self.out = nn.Linear(HEADS * CHANNELS, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Run the block on ``[batch, length, width]``; the tables are ``[length, channels / 2]``."""
        heads = self.qkv(self.before(x)).unflatten(-1, (-1, CHANNELS)).transpose(1, 2)
        q, k, v = heads.split([HEADS, GROUPS, GROUPS], dim=1)
        attended = torch.ops.examples.attention(rotated(q, cos, sin), rotated(k, cos, sin), v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, value = self.up(self.between(x)).chunk(2, dim=-1)
        return x + self.down(silu(gate) * value)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels by an angle that grows with the position."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Model(nn.Module):
    """Token ids ``[batch, length]`` to logits ``[batch, length, vocabulary]``, without any cache."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(WIDTH, 1e-5), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("frequencies", 10000.0 ** -(torch.arange(0, CHANNELS, 2) / CHANNELS))

    def forward(self, ids: Tensor) -> Tensor:
        """Run the model."""
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * self.frequencies
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.head(self.norm(x))


def main() -> None:
    """Teach the operator, export with free sizes, convert, decode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Model(options.layers).eval()
    ids = torch.randint(0, VOCABULARY, (2, 12))

    # 1. What the operator means, in ordinary operators, for any batch and length. Without this it is refused.
    mla_compile.register_pattern(
        "examples::attention", lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )

    # 2. Export with a free batch and length. `compile(model, (ids,))` does the same; an archive can travel.
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "model.pt2"
        save(export(model, (ids,), dynamic_shapes=shapes), archive)
        _, found = mla_compile.inspect(archive)
        for site in found.sites:
            print(f"layer {site.index}: {site.heads} query heads, {site.key.heads} key/value heads")
        mla = mla_compile.compile(archive, exact=True)

    # 3. The original had no cache at all. The conversion decodes with one, and answers the same.
    with torch.no_grad():
        expected = model(ids)
        step = mla.module(ids[:, :5])
        logits = [step.logits]
        for column in range(5, ids.shape[1]):
            step = mla.module(ids[:, column : column + 1], past=step.cache)
            logits.append(step.logits)
    error = (torch.cat(logits, 1) - expected).abs().max() / expected.abs().max()
    print(f"one token at a time, against the original: {error:.1e} of the largest logit")
    # With text, cache_ratio=0.25 and calibration=... in place of exact=True make the cache small.


if __name__ == "__main__":
    main()
