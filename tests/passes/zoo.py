"""Attention in every spelling: one tiny language model, and variants that each change a single step of it.

``ACCEPTED`` means the same as some latent attention and must be read; ``REFUSED`` does not, and must never be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_compile.program import Program
from mla_compile.runtime.module import LatentModel
from mla_compile.site import AttentionSite, RejectCode

VOCABULARY, WIDTH, HEADS, DIM = 5003, 24, 4, 6
PADDING = 1  # one of thousands of tokens: random inputs hardly contain it
SCALE = 0.3


def rotate(x: Tensor, theta: float | list[float] | Tensor = 50.0, first: int = 0, layout: str = "half") -> Tensor:
    """Rotate ``[batch, heads, length, dim]``; ``theta`` may be one number per head, or computed."""
    half = x.shape[-1] // 2
    if isinstance(theta, Tensor):
        frequency = theta ** (-torch.arange(half) / half)
    else:
        bases = theta if isinstance(theta, list) else [theta]
        frequency = torch.tensor([[[base ** (-i / half) for i in range(half)]] for base in bases])
    angle = torch.arange(first, x.shape[2] + first)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    if layout == "half":
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class Attention(nn.Module):
    """Causal attention with biases, through torch's operator; every step can be overridden."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k = nn.Linear(WIDTH, self.kv_heads * DIM)
        self.v = nn.Linear(WIDTH, self.kv_heads * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[batch, length, heads * dim]`` each."""
        return self.q(x), self.k(x), self.v(x)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """``[batch, heads, length, dim]``."""
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def queries(self, q: Tensor) -> Tensor:
        return q

    def keys(self, k: Tensor) -> Tensor:
        return k

    def values(self, v: Tensor) -> Tensor:
        return v

    def repeat(self, x: Tensor) -> Tensor:
        return x if self.kv_heads == HEADS else x.repeat_interleave(HEADS // self.kv_heads, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        """``[batch, heads, length, dim]``."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        q, k, v = map(self.split, self.project(x), (HEADS, self.kv_heads, self.kv_heads))
        k, v = self.repeat(self.keys(k)), self.repeat(self.values(v))
        y = self.attend(self.queries(q), k, v, x, ids)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Masked(Attention):
    """The same with a mask that is an operand of the operator."""

    def seen(self, length: int, ids: Tensor) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool).tril()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen(ids.shape[1], ids), scale=SCALE)


class SpelledOut(Masked):
    """The same as two products and a softmax."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) * SCALE

    def hide(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores.masked_fill(~seen, -math.inf)

    def probabilities(self, p: Tensor) -> Tensor:
        return p

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        return self.probabilities(F.softmax(scores, -1)) @ v


class TinyLM(nn.Module):
    """Embedding, attention layers, head. Sums of position embeddings have their own tests."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(layer() for layer in layers)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in layers)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), ids)
        return self.head(x)


def model(*layers: Callable[[], nn.Module], kind: type[TinyLM] = TinyLM) -> nn.Module:
    """A tiny language model with fixed weights."""
    torch.manual_seed(0)
    return kind(*layers).eval()


def program_of(module: nn.Module) -> Program:
    """Capture a tiny language model."""
    from mla_compile.sources.capture import capture

    return capture(module, (torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0)),))


def error_in_two_pieces(converted: LatentModel, original: nn.Module) -> float:
    """How far a converted model is from its original over 7 tokens and then 5, as a share of the largest logit."""
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        first = converted(ids[:, :7])
        second = converted(ids[:, 7:], past=first.cache)
        got, expected = torch.cat([first.logits, second.logits], 1), original(ids)
    return float((got - expected).abs().max() / expected.abs().max())


def sites_of(program: Program) -> tuple[AttentionSite, ...]:
    """The attention layers of a program that must all convert."""
    from mla_compile.passes.recognise import recognise

    found = recognise(program)
    assert not found.rejections
    assert found.sites
    return found.sites


# ---- the same attention, written otherwise


class HalfRope(Attention):
    def queries(self, q: Tensor) -> Tensor:
        return rotate(q)

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k)


class InterleavedRope(Attention):
    def queries(self, q: Tensor) -> Tensor:
        return rotate(q, layout="interleaved")

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k, layout="interleaved")


class RopeByMatrices(HalfRope):
    """One matrix per position turns the channels."""

    def turned(self, x: Tensor) -> Tensor:
        columns = rotate(torch.eye(DIM)[:, None].expand(-1, x.shape[2], -1)[None], layout="half")[0]
        return torch.einsum("jtd,bhtj->bhtd", columns, x)

    def queries(self, q: Tensor) -> Tensor:
        return self.turned(q)

    def keys(self, k: Tensor) -> Tensor:
        return self.turned(k)


class RopeByHalves(RopeByMatrices):
    """A constant matrix takes the place of ``rotate_half``."""

    def __init__(self) -> None:
        super().__init__()
        half, nothing = torch.eye(DIM // 2), torch.zeros(DIM // 2, DIM // 2)
        self.register_buffer("exchange", torch.cat([torch.cat([nothing, half], 1), torch.cat([-half, nothing], 1)]))

    def turned(self, x: Tensor) -> Tensor:
        angle = (torch.arange(x.shape[2])[:, None] * 50.0 ** (-torch.arange(DIM // 2) / (DIM // 2))).repeat(1, 2)
        return x * angle.cos() + (x @ self.exchange) * angle.sin()


class PartialRope(Attention):
    """The last four channels rotate."""

    def queries(self, q: Tensor) -> Tensor:
        return torch.cat([q[..., :2], rotate(q[..., 2:])], -1)

    def keys(self, k: Tensor) -> Tensor:
        return torch.cat([k[..., :2], rotate(k[..., 2:])], -1)


class BackwardRope(Attention):
    """Rotates the other way round."""

    def queries(self, q: Tensor) -> Tensor:
        return rotate(q.flip(-1)).flip(-1)

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k.flip(-1)).flip(-1)


class DefaultScale(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class GroupedInOperator(HalfRope):
    kv_heads = 2

    def repeat(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class GroupedByRepetition(HalfRope):
    kv_heads = 2


class GroupedByExpansion(HalfRope):
    kv_heads = 2

    def repeat(self, x: Tensor) -> Tensor:
        batch, heads, length, dim = x.shape
        return x[:, :, None].expand(batch, heads, HEADS // heads, length, dim).reshape(batch, HEADS, length, dim)


class OneKeyHead(SpelledOut, HalfRope):
    """Broadcast by the products themselves."""

    kv_heads = 1

    def repeat(self, x: Tensor) -> Tensor:
        return x


class FusedProjection(HalfRope):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).chunk(3, -1)


class InterleavedProjection(FusedProjection):
    """Every head's query, key and value lie beside each other."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = self.qkv(x).view(x.shape[0], x.shape[1], HEADS, 3, DIM)
        return tuple(parts[:, :, :, i].flatten(2) for i in range(3))


class SharedQueriesAndKeys(HalfRope):
    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.q(x), self.v(x)


class ParameterProduct(HalfRope):
    """Projections by bare parameters, stored input-first, biases added later; one weight is an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(0.2 * torch.randn(WIDTH, HEADS * DIM) for _ in range(3))
        self.low = nn.ParameterList([0.2 * torch.randn(WIDTH, 2), 0.2 * torch.randn(2, HEADS * DIM)])
        self.bias = nn.Parameter(torch.randn(HEADS * DIM))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return x @ self.w[0] + self.bias, x @ (self.w[1] + self.low[0] @ self.low[1]), x @ self.w[2] - self.bias


class WeightsOnTheLeft(HalfRope):
    """Projections with channels before positions, by square weights and by one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.out = nn.Linear(WIDTH, HEADS * 9), nn.Linear(HEADS * 9, WIDTH)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        turned = x.transpose(1, 2)
        return tuple((p.weight @ turned + p.bias[:, None]).transpose(1, 2) for p in (self.q, self.k, self.v))


class FlatProduct(HalfRope):
    """Projections of ``[batch * length, width]``, as ``addmm``."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.addmm(p.bias, x.flatten(0, 1), p.weight.T).view(*x.shape[:2], -1) for p in (self.q, self.k, self.v)
        )


class ScaledQueries(HalfRope):
    """The score scale, and a factor per channel, sit on the operands."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + torch.rand(DIM))

    def queries(self, q: Tensor) -> Tensor:
        return super().queries(q * self.gain * 0.25)

    def values(self, v: Tensor) -> Tensor:
        return v * self.gain

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


class WideValues(HalfRope):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.out = nn.Linear(WIDTH, HEADS * 9), nn.Linear(HEADS * 9, WIDTH)


class LargeNegativeMask(SpelledOut):
    def hide(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores + torch.where(seen, 0.0, torch.finfo(torch.float32).min)


class IntegerMask(SpelledOut):
    """The mask's value is a large whole number, which is no window."""

    def hide(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores.masked_fill(~seen, -(10**9))


class DoublePrecisionSoftmax(SpelledOut):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        return F.softmax(scores, -1, dtype=torch.float64).to(v.dtype) @ v


class SinglePrecisionSoftmax(SpelledOut):
    """The conversions do nothing here, but torch.export asserts what they read, and so does the second one itself."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        return F.softmax(scores.float(), -1).type_as(scores) @ v


def windowed(window: int, base: type[Masked] = Masked) -> type[Attention]:
    """A sliding window written as a comparison with a number."""

    class Windowed(base):
        def seen(self, length: int, ids: Tensor) -> Tensor:
            place = torch.arange(length)
            return (place <= place[:, None]) & (place > place[:, None] - window)

    return Windowed


# ---- something else that looks much like it


class MixedScores(SpelledOut):
    """Talking heads: a matrix mixes the heads' scores (Shazeer 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(HEADS, HEADS))

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bhst,hg->bgst", super().scores(q, k, x), self.mix)


class MixedScoresByLinear(MixedScores):
    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return F.linear(SpelledOut.scores(self, q, k, x).permute(0, 2, 3, 1), self.mix).permute(0, 3, 1, 2)


class MixedProbabilities(MixedScores):
    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return SpelledOut.scores(self, q, k, x)

    def probabilities(self, p: Tensor) -> Tensor:
        return torch.einsum("bhst,hg->bgst", p, self.mix)


class TwoProducts(SpelledOut):
    """Content and position scores are added (Transformer-XL, DeBERTa)."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return super().scores(q, k, x) + k @ q.transpose(-1, -2)


class WithoutValues(SpelledOut):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        p = F.softmax(self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids)), -1)
        return p.sum(-1, keepdim=True) * v


class OwnSoftmax(SpelledOut):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True) @ v


class ShiftedSoftmax(SpelledOut):
    """The maximum is of what is seen and what is not; the sum loses its axis and gets it back; one over it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.scores(q, k, x)
        weights = self.hide(scores - scores.detach().max(-1, keepdim=True).values, self.seen(ids.shape[1], ids)).exp()
        return weights * weights.sum(-1)[..., None].reciprocal() @ v


class HiddenExponentials(SpelledOut):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        weights = self.scores(q, k, x).exp().masked_fill(~self.seen(ids.shape[1], ids), 0)
        return weights / weights.sum(-1, keepdim=True) @ v


class DividedLate(SpelledOut):
    """As in descriptions of flash attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return (weights @ v) / weights.sum(-1, keepdim=True)


class ExponentialOfLogSoftmax(SpelledOut):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        return self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids)).log_softmax(-1).exp() @ v


class LessLogSumExp(SpelledOut):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


class MaskShapedLikeScores(SpelledOut):
    """A part of the scores is read, but for its shape only."""

    def hide(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores.masked_fill(torch.ones_like(scores[0, 0]).tril() == 0, -math.inf)


class HeadsBeforeTheBatch(Attention):
    """Heads are pieces of the channels, joined along the batch, as in TensorFlow's early transformers."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        q, k, v = (torch.cat(part.split(DIM, 2), 0) for part in self.project(x))
        scores = q @ k.transpose(1, 2) * SCALE
        scores = scores.masked_fill(scores.new_ones(scores.shape[1:]).tril() == 0, scores.detach().min() - 1e4)
        return self.out(torch.cat((scores.softmax(-1) @ v).chunk(HEADS, 0), 2))


class TwoBases(SpelledOut):
    """Exponentials over the sum of others."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        return scores.exp() / scores.exp2().sum(-1, keepdim=True) @ v


class MoreThanTheSum(SpelledOut):
    """A softmax with room for nothing, whose room depends on the largest score."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return weights / (1 + weights.sum(-1, keepdim=True)) @ v


class SumOfQueries(SpelledOut):
    """The sum is of another row than the one that is divided by it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        weights = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids)).exp()
        return weights / weights.sum(-1)[..., None, :] @ v


class TwoProjections(Attention):
    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x) + self.v(x), self.v(x)


class AlreadyLatent(Attention):
    """Keys are partly projected from a latent, partly the latent's own channels (DeepSeek-V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        latent = self.k(x)
        return self.q(x), self.up(latent) + latent, self.v(x)


class NoProjection(Attention):
    """The activations themselves are the keys."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), x, self.v(x)


class ActivationAsBias(Attention):
    """``x + W x`` in one operator."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.flatten(0, 1)
        return self.q(x), torch.addmm(flat, flat, self.k.weight.T).view(x.shape), self.v(x)


class ScaledProduct(Attention):
    """``addmm`` with factors, which are not part of the weight."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        k = torch.addmm(self.k.bias, x.flatten(0, 1), self.k.weight.T, beta=0.5, alpha=3.0)
        return self.q(x), k.view(*x.shape[:2], -1), self.v(x)


class WeightOfThreeDimensions(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(0.2 * torch.randn(HEADS, WIDTH, DIM) for _ in range(3))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x[:, :, None, None]
        return tuple((x @ w).flatten(2) for w in self.w)


class WeightPerHead(HalfRope):
    """Weights ``[heads, width, head_dim]`` make heads that stand before positions; keys have a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(0.2 * torch.randn(HEADS, WIDTH, DIM) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(HEADS, 1, DIM))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        wq, wk, wv = self.w
        return x[:, None] @ wq, x.unsqueeze(1) @ wk + self.bias, torch.matmul(x[:, None, :, :], wv[None])

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x


class WeightPerHeadRepeated(WeightPerHead):
    """The activation is repeated for every head first."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        repeated = x[:, None].expand(-1, HEADS, -1, -1)
        return tuple(repeated @ w for w in self.w)


class ChannelsPerHead(WeightPerHead):
    """Every head's keys are made of its own part of the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.w[1] = nn.Parameter(0.2 * torch.randn(HEADS, WIDTH // HEADS, DIM))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, _, v = (x[:, None] @ w for w in (self.w[0], self.w[0], self.w[2]))
        return q, x.unflatten(2, (HEADS, -1)).transpose(1, 2) @ self.w[1], v


class WeightPerHeadOnTheLeft(WeightPerHead):
    """Channels before positions; the weight, which is square for that to be mistaken, is on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(0.2 * torch.randn(HEADS, WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(HEADS * WIDTH, WIDTH)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple((w @ x.mT[:, None]).mT for w in self.w)


class WeightPerPosition(Attention):
    """The axis of the weight that is no part of a matrix lies along the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.2 * torch.randn(512, WIDTH, HEADS * DIM))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), (x[:, :, None] @ self.w[: x.shape[1]]).squeeze(2), self.v(x)


class ProjectionPerHead(Attention):
    """One small matrix is applied to every head's part of the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(DIM, DIM)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.small(x.view(*x.shape[:2], HEADS, DIM)).flatten(2) for _ in range(3))


class ByEinsum(SpelledOut):
    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bhsd,bhtd->bhst", q, k) * SCALE


class UnnamedAxes(SpelledOut):
    """Leading axes are an ellipsis."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        layers = (self.q, self.k, self.v)
        return tuple(torch.einsum("...i,oi->...o", x, layer.weight) + layer.bias for layer in layers)

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("...sd,...td->...st", q, k) * SCALE

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        return torch.einsum("...qt,...td->...qd", F.softmax(scores, -1), v)


class UnwrittenOutputs(SpelledOut):
    """Projections by einsums that leave to torch what their outputs are."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.einsum("abc,cd", x, layer.weight.mT) + layer.bias for layer in (self.q, self.k, self.v))


class SummedScores(SpelledOut):
    """Batch and heads, which occur twice, are summed: as an output that is not written is understood."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("abik,abjk", q, k) * SCALE


class TransposedScores(SpelledOut):
    """Values to the left of the attention weights."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        p = F.softmax(self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids)), -1)
        return (v.mT @ p.mT).mT


class MergedHeads(SpelledOut):
    """Batch and heads are one dimension."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        q, k, v = (y.reshape(-1, y.shape[2], DIM) for y in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)) * SCALE
        y = torch.bmm(F.softmax(self.hide(scores, self.seen(ids.shape[1], ids)), -1), v)
        return y.view(x.shape[0], HEADS, x.shape[1], DIM)


class ConvolvedKeys(Attention):
    """Causal convolution over positions (Primer, So 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(WIDTH, 1, 3))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        k = F.conv1d(F.pad(self.k(x).mT, (2, 0)), self.kernel, groups=WIDTH).mT
        return self.q(x), k, self.v(x)


class ShiftedValues(Attention):
    def values(self, v: Tensor) -> Tensor:
        return F.pad(v, (0, 0, 1, 0))[:, :, :-1]


class AveragedValues(Attention):
    """A value contains those of the whole batch."""

    def values(self, v: Tensor) -> Tensor:
        return v + v.mean(0, keepdim=True)


class RectifiedQueries(Attention):
    def queries(self, q: Tensor) -> Tensor:
        return F.relu(q)


class RectifiedKeys(Attention):
    def keys(self, k: Tensor) -> Tensor:
        return F.relu(k)


class NormedKeys(Attention):
    def keys(self, k: Tensor) -> Tensor:
        return F.normalize(k, dim=-1)


def rms(x: Tensor, axes: tuple[int, ...] = (-1,), eps: float = 1e-3) -> Tensor:
    """Divide by the root of the mean square."""
    return x * (x.square().mean(axes, keepdim=True) + eps).rsqrt()


class NormedValues(HalfRope):
    """Values of every head have a norm without a gain (Gemma 4)."""

    kv_heads = 2

    def values(self, v: Tensor) -> Tensor:
        return rms(v)


class NormedKeysAndValues(NormedValues):
    """Keys too, before their rotation; the values have gains."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(DIM) + 0.5)

    def keys(self, k: Tensor) -> Tensor:
        return super().keys(rms(k) * self.gain.flip(0))

    def values(self, v: Tensor) -> Tensor:
        return super().values(v) * self.gain


class KeysThatAreValues(NormedValues):
    """One projection makes keys and values, which are normed apart and of which only keys turn."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        k = self.k(x)
        return self.q(x), k, k

    def keys(self, k: Tensor) -> Tensor:
        return super().keys(rms(k, eps=1e-2))


class CentredValues(Attention):
    """A layer norm of every value head, with gain and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def values(self, v: Tensor) -> Tensor:
        return self.norm(v)


class ValuesNormedTogether(Attention):
    """One norm over the whole width of the values."""

    def values(self, v: Tensor) -> Tensor:
        return rms(v, (1, 3))


class ValuesNormedOverPositions(Attention):
    """A norm that looks at other positions."""

    def values(self, v: Tensor) -> Tensor:
        return rms(v, (-2, -1))


class ValuesNormedByHalves(Attention):
    """Two norms per head."""

    def values(self, v: Tensor) -> Tensor:
        return rms(v.unflatten(-1, (2, -1))).flatten(-2)


class ValuesNormedInPairs(Attention):
    """A norm of two heads at a time."""

    def values(self, v: Tensor) -> Tensor:
        return rms(v.unflatten(1, (2, -1)), (2, 4)).flatten(1, 2)


class ValuesNormedAcrossHeads(Attention):
    """A norm over the heads, channel by channel."""

    def values(self, v: Tensor) -> Tensor:
        return rms(v, (1,))


class RotatedNormedValues(NormedValues):
    def values(self, v: Tensor) -> Tensor:
        return rotate(super().values(v))


class SquashedValues(Attention):
    """Not linear, and no norm."""

    def values(self, v: Tensor) -> Tensor:
        return v / (1 + v.square().sum(-1, keepdim=True))


class NormBehindRotation(HalfRope):
    """RMS norms without gains, which commute with the rotation (nanochat, Llama 4)."""

    kv_heads = 2

    def queries(self, q: Tensor) -> Tensor:
        return rms(super().queries(q))

    def keys(self, k: Tensor) -> Tensor:
        return rms(super().keys(k), eps=1e-2)


class WideNormBehindRotation(NormBehindRotation):
    """One norm for all heads."""

    def keys(self, k: Tensor) -> Tensor:
        return rms(HalfRope.keys(self, k), (1, 3))


class GainsBehindRotation(NormBehindRotation):
    """Norms with gains, which differ within rotating pairs (HunYuan)."""

    def __init__(self) -> None:
        super().__init__()
        self.query_gain, self.key_gain = (nn.Parameter(torch.rand(DIM) + 0.5) for _ in range(2))

    def queries(self, q: Tensor) -> Tensor:
        return super().queries(q) * self.query_gain

    def keys(self, k: Tensor) -> Tensor:
        return super().keys(k) * self.key_gain


class KeyNormBehindRotation(PartialRope):
    """Queries are plain, and some channels stand still."""

    def keys(self, k: Tensor) -> Tensor:
        return rms(super().keys(k)) * 1.5


class LayerNormBehindRotation(HalfRope):
    """Centring does not commute with a rotation."""

    def keys(self, k: Tensor) -> Tensor:
        return F.layer_norm(super().keys(k), (DIM,))


class HalfNormBehindRotation(HalfRope):
    """A norm of three channels, which turn with three others."""

    def keys(self, k: Tensor) -> Tensor:
        return rms(super().keys(k).unflatten(-1, (2, -1))).flatten(-2)


class ShiftBehindRotation(NormBehindRotation):
    """What is added to turned keys stays where it is while they turn."""

    def keys(self, k: Tensor) -> Tensor:
        return super().keys(k) + torch.arange(DIM)


class FarScale(HalfRope):
    """Queries grow from a position on that no probe comes near (Ministral 3)."""

    def queries(self, q: Tensor) -> Tensor:
        place = torch.arange(q.shape[2], dtype=torch.float32)
        return super().queries(q) * (1 + torch.log(1 + torch.floor(place / 20_000)))[:, None]


class KeysScaledByPlace(HalfRope):
    def keys(self, k: Tensor) -> Tensor:
        return super().keys(k) * (1 + torch.arange(k.shape[2], dtype=torch.float32) / 64)[:, None]


class ScaledByLateLength(NormBehindRotation):
    """Queries are divided by the length of the sequence, but only from 64 tokens on."""

    def queries(self, q: Tensor) -> Tensor:
        return super().queries(q) / (torch.ones(q.shape[2]).sum() / 64).clamp(min=1.0)


class RectifiedByLateLength(RectifiedQueries):
    """The same without a rotation."""

    def queries(self, q: Tensor) -> Tensor:
        return F.relu(q / (torch.ones(q.shape[2]).sum() / 64).clamp(min=1.0))


class ChosenQueries(HalfRope):
    """Every token chooses which of two projections makes its queries (a mixture of attention heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.router = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(WIDTH, 2)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().project(x)
        chosen = self.router(x).argmax(-1, keepdim=True)
        return torch.where(chosen == 1, q, self.other(x)), k, v


class ChosenKeys(ChosenQueries):
    """The same for keys, which are cached."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        chosen, k, v = super().project(x)
        return k, chosen, v


class ClampedValues(Attention):
    """Linear within a range that random numbers hardly leave."""

    def values(self, v: Tensor) -> Tensor:
        return v.clamp(-3.0, 3.0)


class MixedChannels(Attention):
    """Every channel is a sum of two."""

    def keys(self, k: Tensor) -> Tensor:
        return k + k.flip(-1)


class RopeFromOne(Attention):
    def queries(self, q: Tensor) -> Tensor:
        return rotate(q, first=1)

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k, first=1)


class KeysAhead(HalfRope):
    """Positions of keys are counted from three."""

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k, first=3)


class QueriesAhead(PartialRope):
    """Positions of queries are counted from five; some channels stand still."""

    kv_heads = 2

    def queries(self, q: Tensor) -> Tensor:
        return torch.cat([q[..., :2], rotate(q[..., 2:], first=5)], -1)


class InterleavedKeysBehind(ParameterProduct):
    """Positions of keys are counted from minus two, biases are added before, and channels have gains of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(HEADS, 1, DIM))

    def queries(self, q: Tensor) -> Tensor:
        return rotate(q * 0.5, layout="interleaved")

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k * self.gain, first=-2, layout="interleaved")


class NormedKeysAhead(NormedKeysAndValues):
    """Queries and keys are normed before their rotation, and keys are turned further."""

    def queries(self, q: Tensor) -> Tensor:
        return rotate(rms(q))

    def keys(self, k: Tensor) -> Tensor:
        return rotate(rms(k) * self.gain, first=4)


class NormedQueriesBehindRotation(KeysAhead):
    """Queries are read behind their rotation, by a norm with gains."""

    def queries(self, q: Tensor) -> Tensor:
        return rms(super().queries(q)) * torch.linspace(0.5, 2.0, DIM)


class NormBehindOffsetRotation(RopeFromOne):
    """Keys are normed behind a rotation that has begun at position 0."""

    def keys(self, k: Tensor) -> Tensor:
        return rms(super().keys(k))


class HeadsAhead(HalfRope):
    """Every head of the keys counts positions from another number."""

    def keys(self, k: Tensor) -> Tensor:
        return torch.cat([rotate(k[:, h : h + 1], first=h + 1) for h in range(HEADS)], 1)


class TurnedChannels(HalfRope):
    """Pairs of channels are turned by the same angle at every position, before the rotation of others."""

    def values(self, v: Tensor) -> Tensor:
        a, b = v.chunk(2, -1)
        return torch.cat([0.6 * a - 0.8 * b, 0.8 * a + 0.6 * b], -1)


class RotatedValues(HalfRope):
    def values(self, v: Tensor) -> Tensor:
        return rotate(v)


class RotatedQueriesOnly(Attention):
    def queries(self, q: Tensor) -> Tensor:
        return rotate(q)


class RopePerHead(Attention):
    def queries(self, q: Tensor) -> Tensor:
        return rotate(q, theta=[50.0, 60.0, 70.0, 80.0])

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k, theta=[50.0, 60.0, 70.0, 80.0])


class TwoFrequencies(Attention):
    def queries(self, q: Tensor) -> Tensor:
        return rotate(q, theta=50.0)

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k, theta=51.0)


class DecayingRope(Attention):
    """xPos: rotation and growth by position (Sun 2022)."""

    def queries(self, q: Tensor) -> Tensor:
        return rotate(q) * (1.02 ** torch.arange(q.shape[2]))[:, None]

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k) * (1.02 ** -torch.arange(k.shape[2]))[:, None]


class StretchedRope(Attention):
    """Frequencies depend on the length of the sequence (dynamic NTK)."""

    def queries(self, q: Tensor) -> Tensor:
        return rotate(q, theta=torch.tensor([50.0]) + q.shape[2])

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k, theta=torch.tensor([50.0]) + k.shape[2])


class LateScale(Attention):
    """Queries grow with the logarithm of the position, but only from position 64 on."""

    def queries(self, q: Tensor) -> Tensor:
        place = torch.arange(q.shape[2]) + 1
        return q * (place / 64).clamp(min=1.0).log1p()[:, None]


class AlternatingGroups(Attention):
    """Query head h uses key head h mod 2."""

    kv_heads = 2

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat(1, HEADS // self.kv_heads, 1, 1)


class AlternatingValueHeads(HalfRope):
    """Query head h uses value head h mod 2, and key head h // 2 (differential attention)."""

    kv_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        return super().attend(q, k, v[:, ::2].repeat(1, 2, 1, 1), x, ids)


class AlternatingGroupsWithSlopes(SpelledOut):
    """Query head h uses key head h mod 2, and every head has a slope and a sink of its own."""

    kv_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(1, HEADS, 1, 1))

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat(1, HEADS // self.kv_heads, 1, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        slope = 2.0 ** -torch.arange(1, HEADS + 1)
        scores = self.scores(q, k, x) - slope[:, None, None] * (place[:, None] - place)
        scores = self.hide(scores, self.seen(ids.shape[1], ids))
        return F.softmax(torch.cat([scores, self.sink.expand(*scores.shape[:3], 1)], -1), -1)[..., :-1] @ v


class UnevenGroups(Attention):
    """One key head for a single query head, the other for three."""

    kv_heads = 2

    def repeat(self, x: Tensor) -> Tensor:
        return x[:, [0, 1, 1, 1]]


class FewerValueHeads(Attention):
    def values(self, v: Tensor) -> Tensor:
        return v[:, :2].repeat_interleave(2, 1)


class SoftCapped(SpelledOut):
    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return 5 * torch.tanh(super().scores(q, k, x) / 5)


class LinearBias(SpelledOut):
    """ALiBi (Press 2021)."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        slope = 2.0 ** -torch.arange(1, HEADS + 1)
        return super().scores(q, k, x) - slope[:, None, None] * (place[:, None] - place)


class SquaredBias(SpelledOut):
    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        return super().scores(q, k, x) - 0.01 * (place[:, None] - place).square()


def discounted_from(distance: int) -> type[SpelledOut]:
    """Keys are discounted, but only those so many positions back and more."""

    class Discounted(SpelledOut):
        def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
            place = torch.arange(q.shape[2])
            return super().scores(q, k, x) - 0.5 * (place[:, None] - place - distance).clamp(min=0)

    return Discounted


class Sink(SpelledOut):
    """A column without a key takes part of the probability."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(1, HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        p = F.softmax(torch.cat([scores, self.sink.expand(*scores.shape[:3], 1)], -1), -1)
        return p[..., :-1] @ v


class SoftCappedWithSink(SoftCapped, Sink):
    """The sink is not capped."""


class SinkAsFactor(Sink):
    """The same sink, as what is left of the output."""

    def left(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores.logsumexp(-1, keepdim=True) - self.sink)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        return F.softmax(scores, -1) @ v * self.left(scores)


class SquaredSinkAsFactor(SinkAsFactor):
    """A factor made from the scores that takes too much for a sink."""

    def left(self, scores: Tensor) -> Tensor:
        return super().left(scores).square()


class SinkOfRawScores(SinkAsFactor):
    """A factor that looks at hidden scores too."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.scores(q, k, x)
        return F.softmax(self.hide(scores, self.seen(ids.shape[1], ids)), -1) @ v * self.left(scores)


class ScoresBehindTheOutput(SpelledOut):
    """The largest score of every head is added to the layer's output."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = super().forward(x, ids)
        return y + self.largest.amax(-1).sum(1).unsqueeze(-1)

    def hide(self, scores: Tensor, seen: Tensor) -> Tensor:
        self.largest = super().hide(scores, seen)
        return self.largest


class TwoSinks(Sink):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        p = F.softmax(torch.cat([scores, self.sink.expand(*scores.shape[:3], 2)], -1), -1)
        return p[..., :-2] @ v


class ScaledProbabilities(SpelledOut):
    """What is left of a dropout: its factor."""

    def probabilities(self, p: Tensor) -> Tensor:
        return p / 0.9


class LivingDropout(SpelledOut):
    def probabilities(self, p: Tensor) -> Tensor:
        return F.dropout(p, 0.1, training=True)


class TemperaturePerHead(SpelledOut):
    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return super().scores(q, k, x) * torch.arange(1.0, 1.0 + HEADS)[:, None, None]


class LearnedTemperature(SpelledOut, HalfRope):
    """A clamped exponential of a parameter per head multiplies the scores (Swin v2, CLIP)."""

    kv_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(3 * torch.rand(1, HEADS, 1, 1))

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return super().scores(q, k, x) * self.logit_scale.exp().clamp(max=10.0)


class CosineAttention(LearnedTemperature):
    """Queries and keys have unit length, so that the temperature is all that there is of scale."""

    def queries(self, q: Tensor) -> Tensor:
        return super().queries(F.normalize(q, dim=-1))

    def keys(self, k: Tensor) -> Tensor:
        return super().keys(F.normalize(k, dim=-1))


class TemperatureBelowCap(SoftCapped):
    """Scores are multiplied per head, and capped then; some factors are negative."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        factor = torch.tensor([0.5, -1.0, 2.0, 0.25])[:, None, None]
        return 5 * torch.tanh(SpelledOut.scores(self, q, k, x) * factor / 5)


class TemperatureOfAlternatingGroups(AlternatingGroupsWithSlopes):
    """Per head: a temperature, a slope and a sink, of heads that share keys with others than their neighbours."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return super().scores(q, k, x) * torch.arange(1.0, 1.0 + HEADS)[:, None, None]


class TemperatureBehindRotation(LearnedTemperature, GainsBehindRotation):
    """With queries that are read behind their rotation."""


class TemperatureOfRotatedValues(LearnedTemperature):
    """A layer that keeps an ordinary cache, because its values rotate."""

    def values(self, v: Tensor) -> Tensor:
        return rotate(v)


class TemperatureBehindCap(SoftCapped):
    """Every head has a cap of its own."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return super().scores(q, k, x) * torch.arange(1.0, 1.0 + HEADS)[:, None, None]


class TemperatureByDistance(SpelledOut):
    """The factor of a head depends on the position, too."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        place = torch.arange(q.shape[2], dtype=torch.float32)[:, None]
        return super().scores(q, k, x) * (1 + place * torch.arange(HEADS)[:, None, None] / 100)


class AbsoluteScores(SpelledOut):
    """Looks like a constant factor to positive scores."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return super().scores(q, k, x).abs()


class ScaledByLength(SpelledOut):
    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) / (torch.ones(q.shape[2]).sum().sqrt())


class ScaledByActivation(SpelledOut):
    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return super().scores(q, k, x) * x[:, None, :, :1].exp()


class OtherAxis(SpelledOut):
    """Every key's probabilities over queries sum to one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        seen = self.seen(ids.shape[1], ids)
        return F.softmax(self.hide(self.scores(q, k, x), seen), -2).masked_fill(~seen, 0.0) @ v


class Bidirectional(Masked):
    def seen(self, length: int, ids: Tensor) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool)


class Prefix(Masked):
    """The first four tokens see each other."""

    def seen(self, length: int, ids: Tensor) -> Tensor:
        place = torch.arange(length)
        return (place <= place[:, None]) | (place < 4)


class Dilated(Masked):
    def seen(self, length: int, ids: Tensor) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        return (distance >= 0) & (distance % 2 == 0)


class LocalAndGlobalHeads(Masked):
    def seen(self, length: int, ids: Tensor) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        return (distance >= 0) & (distance < torch.tensor([3, 3, 99, 99])[:, None, None])


class WindowWithFirstToken(Masked):
    """Streaming attention keeps the first token in view (Xiao 2023)."""

    def seen(self, length: int, ids: Tensor) -> Tensor:
        place = torch.arange(length)
        return (place <= place[:, None]) & ((place > place[:, None] - 5) | (place == 0))


class HiddenPadding(Masked):
    """Padding is known by its token: the mask depends on the data."""

    def seen(self, length: int, ids: Tensor) -> Tensor:
        return super().seen(length, ids) & (ids != PADDING)[:, None, None, :] | torch.eye(length, dtype=torch.bool)


class EmptyPadding(Attention):
    """The values of padding, which is known by its token, are zero."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        self.real = (ids != PADDING)[:, None, :, None]
        return super().forward(x, ids)

    def values(self, v: Tensor) -> Tensor:
        return v * self.real


class HiddenByActivation(Masked):
    """Keys with a low score of their own are hidden."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        seen = self.seen(ids.shape[1], ids) & (x.sum(-1) > -9)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE)


def chunked(size: int, base: type[Masked] = Masked, window: int = 10**9) -> type[Masked]:
    """Tokens see their own chunk only, which looks causal within the first; and of that the last ``window``."""

    class Chunked(base):  # type: ignore[misc, valid-type]
        def seen(self, length: int, ids: Tensor) -> Tensor:
            place = torch.arange(length)
            distance = place[:, None] - place
            return (distance >= 0) & (distance < window) & (place // size == place[:, None] // size)

    return Chunked


class FarBand(Masked):
    """A window of 64, as a table."""

    def __init__(self) -> None:
        super().__init__()
        distance = torch.arange(128)[:, None] - torch.arange(128)
        self.register_buffer("table", (distance >= 0) & (distance < 64))

    def seen(self, length: int, ids: Tensor) -> Tensor:
        return self.table[:length, :length]


class FarBandByTensor(Masked):
    """A window of 64, which is a tensor and not a number in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.tensor(64))

    def seen(self, length: int, ids: Tensor) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        return (distance >= 0) & (distance < self.window)


class OtherSource(Attention):
    """Values come from another activation than keys."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x * 2)


class OtherQuerySource(Attention):
    """Queries come from another activation than keys and values."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x * 2), self.k(x), self.v(x)


MIXED: dict[str, type[Attention]] = {
    "half": HalfRope,
    "interleaved": InterleavedRope,
    "partial": PartialRope,
    "one key head": OneKeyHead,
    "grouped": GroupedInOperator,
    "merged": MergedHeads,
    "fused": InterleavedProjection,
    "flat product": FlatProduct,
    "weights on the left": WeightsOnTheLeft,
    "scaled queries": ScaledQueries,
    "wide values": WideValues,
    "soft-cap": SoftCapped,
    "slopes": LinearBias,
    "sink": Sink,
    "soft-cap and sink": SoftCappedWithSink,
    "window": windowed(5, SpelledOut),
    "alternating groups": AlternatingGroups,
    "alternating groups with slopes and sinks": AlternatingGroupsWithSlopes,
    "fewer value heads": FewerValueHeads,
    "alternating value heads": AlternatingValueHeads,
    "rectified queries": RectifiedQueries,
    "normed keys": NormedKeys,
    "normed keys and values": NormedKeysAndValues,
    "centred values": CentredValues,
    "wide norm behind the rotation": WideNormBehindRotation,
    "gains behind the rotation": GainsBehindRotation,
    "keys ahead": KeysAhead,
    "interleaved keys behind": InterleavedKeysBehind,
    "normed keys ahead": NormedKeysAhead,
    "normed queries behind the rotation": NormedQueriesBehindRotation,
    "learned temperature": LearnedTemperature,
    "cosine attention": CosineAttention,
    "temperature of alternating groups": TemperatureOfAlternatingGroups,
}
"""Layers of one model in which every layer is another attention: captured once for all of them."""

ACCEPTED: dict[str, type[Attention]] = {
    "fused": Attention,
    "scores by einsum": ByEinsum,
    "axes that are not named": UnnamedAxes,
    "outputs that are not written": UnwrittenOutputs,
    "batch and heads merged": MergedHeads,
    "rectified queries": RectifiedQueries,
    "normed keys": NormedKeys,
    "normed values": NormedValues,
    "normed keys and values": NormedKeysAndValues,
    "keys that are values": KeysThatAreValues,
    "centred values": CentredValues,
    "values normed together": ValuesNormedTogether,
    "norm behind the rotation": NormBehindRotation,
    "norm of all heads behind the rotation": WideNormBehindRotation,
    "gains behind the rotation": GainsBehindRotation,
    "norm of keys behind the rotation": KeyNormBehindRotation,
    "queries scaled from position 64": LateScale,
    "queries scaled from position 20000": FarScale,
    "chosen queries": ChosenQueries,
    "alternating groups": AlternatingGroups,
    "alternating groups with slopes and sinks": AlternatingGroupsWithSlopes,
    "fewer value heads": FewerValueHeads,
    "alternating value heads": AlternatingValueHeads,
    "soft-capped scores": SoftCapped,
    "linear bias": LinearBias,
    "sink": Sink,
    "sink as a factor": SinkAsFactor,
    "other query source": OtherQuerySource,
    "default scale": DefaultScale,
    "with a mask": Masked,
    "spelled out": SpelledOut,
    "half rope": HalfRope,
    "interleaved rope": InterleavedRope,
    "partial rope": PartialRope,
    "backward rope": BackwardRope,
    "grouped in the operator": GroupedInOperator,
    "grouped by repetition": GroupedByRepetition,
    "grouped by expansion": GroupedByExpansion,
    "one key head": OneKeyHead,
    "fused projection": FusedProjection,
    "interleaved projection": InterleavedProjection,
    "shared queries and keys": SharedQueriesAndKeys,
    "parameter product": ParameterProduct,
    "flat product": FlatProduct,
    "weights on the left": WeightsOnTheLeft,
    "a weight of three dimensions": WeightOfThreeDimensions,
    "a weight per head": WeightPerHead,
    "a weight per head, by repeated activations": WeightPerHeadRepeated,
    "scaled queries": ScaledQueries,
    "wide values": WideValues,
    "large negative mask": LargeNegativeMask,
    "integer mask": IntegerMask,
    "double precision softmax": DoublePrecisionSoftmax,
    "single precision softmax": SinglePrecisionSoftmax,
    "a softmax by hand": OwnSoftmax,
    "a softmax by hand, shifted late": ShiftedSoftmax,
    "exponentials set to zero": HiddenExponentials,
    "divided behind the values": DividedLate,
    "the exponential of a log-softmax": ExponentialOfLogSoftmax,
    "the exponential less a logsumexp": LessLogSumExp,
    "a mask shaped like scores": MaskShapedLikeScores,
    "rope by matrices": RopeByMatrices,
    "rope by a matrix of halves": RopeByHalves,
    "window": windowed(5),
    "spelled-out window": windowed(5, SpelledOut),
    "chunks": chunked(5),
    "spelled-out chunks": chunked(5, SpelledOut),
    "positions from one": RopeFromOne,
    "keys ahead": KeysAhead,
    "queries ahead": QueriesAhead,
    "interleaved keys behind": InterleavedKeysBehind,
    "normed keys ahead": NormedKeysAhead,
    "normed queries behind the rotation": NormedQueriesBehindRotation,
    "a temperature per head": TemperaturePerHead,
    "learned temperature": LearnedTemperature,
    "cosine attention": CosineAttention,
    "temperature below a soft-cap": TemperatureBelowCap,
    "temperature of alternating groups": TemperatureOfAlternatingGroups,
    "temperature behind the rotation": TemperatureBehindRotation,
}

REFUSED: dict[str, tuple[type[Attention], frozenset[RejectCode]]] = {
    name: (kind, frozenset(codes))
    for name, kind, *codes in (
        ("talking heads before the softmax", MixedScores, RejectCode.ANCHOR),
        ("talking heads by a linear layer", MixedScoresByLinear, RejectCode.ANCHOR),
        ("talking heads after the softmax", MixedProbabilities, RejectCode.ANCHOR),
        ("two products", TwoProducts, RejectCode.ANCHOR),
        ("no values", WithoutValues, RejectCode.ANCHOR),
        ("a softmax of two bases", TwoBases, RejectCode.ANCHOR),
        ("heads before the batch", HeadsBeforeTheBatch, RejectCode.POSITION_MIXING, RejectCode.SCORES),
        ("weights over a sum and more", MoreThanTheSum, RejectCode.ANCHOR),
        ("weights over another row's sum", SumOfQueries, RejectCode.ANCHOR),
        ("keys of two projections", TwoProjections, RejectCode.PROJECTION),
        ("latent attention", AlreadyLatent, RejectCode.LATENT),
        ("keys without a projection", NoProjection, RejectCode.PROJECTION),
        ("an activation as bias", ActivationAsBias, RejectCode.PROJECTION),
        ("a product with factors", ScaledProduct, RejectCode.PROJECTION),
        ("every head its own channels", ChannelsPerHead, RejectCode.PROJECTION),
        ("weights per head on the left", WeightPerHeadOnTheLeft, RejectCode.PROJECTION),
        ("a weight per position", WeightPerPosition, RejectCode.PROJECTION, RejectCode.LAYOUT),
        ("a small projection per head", ProjectionPerHead, RejectCode.PROJECTION, RejectCode.LAYOUT),
        ("scores summed over heads", SummedScores, RejectCode.LAYOUT),
        ("channels before positions", TransposedScores, RejectCode.LAYOUT),
        ("convolved keys", ConvolvedKeys, RejectCode.POSITION_MIXING),
        ("shifted values", ShiftedValues, RejectCode.POSITION_MIXING),
        ("values mixed over the batch", AveragedValues, RejectCode.POSITION_MIXING),
        ("rectified keys", RectifiedKeys, RejectCode.NONLINEAR),
        ("clamped values", ClampedValues, RejectCode.NONLINEAR),
        ("values normed over positions", ValuesNormedOverPositions, RejectCode.POSITION_MIXING),
        ("values normed by halves", ValuesNormedByHalves, RejectCode.NONLINEAR),
        ("values normed in pairs", ValuesNormedInPairs, RejectCode.NONLINEAR),
        ("values normed across heads", ValuesNormedAcrossHeads, RejectCode.NONLINEAR),
        ("rotated normed values", RotatedNormedValues, RejectCode.ROPE),
        ("squashed values", SquashedValues, RejectCode.NONLINEAR),
        ("mixed channels", MixedChannels, RejectCode.ROW_MAP),
        ("heads that count from different positions", HeadsAhead, RejectCode.ROPE),
        ("channels turned everywhere alike", TurnedChannels, RejectCode.ROW_MAP),
        ("norm behind a rotation from one", NormBehindOffsetRotation, RejectCode.NONLINEAR),
        ("rotated values", RotatedValues, RejectCode.ROPE),
        ("rotated queries only", RotatedQueriesOnly, RejectCode.ROPE),
        ("a frequency per head", RopePerHead, RejectCode.ROPE),
        ("queries faster than keys", TwoFrequencies, RejectCode.ROPE),
        ("decaying rotation", DecayingRope, RejectCode.ROPE),
        ("rotation stretched by length", StretchedRope, RejectCode.ROPE, RejectCode.VERIFY),
        ("keys scaled by position", KeysScaledByPlace, RejectCode.ROPE),
        ("uneven groups", UnevenGroups, RejectCode.GROUPING),
        ("layer norm behind the rotation", LayerNormBehindRotation, RejectCode.NONLINEAR),
        ("norm of half a head behind the rotation", HalfNormBehindRotation, RejectCode.NONLINEAR),
        ("shift behind the rotation", ShiftBehindRotation, RejectCode.NONLINEAR, RejectCode.ROW_MAP),
        ("normed queries scaled by length", ScaledByLateLength, RejectCode.POSITION_MIXING),
        ("rectified queries scaled by length", RectifiedByLateLength, RejectCode.POSITION_MIXING),
        ("chosen keys", ChosenKeys, RejectCode.PROJECTION),
        ("squared bias", SquaredBias, RejectCode.SCORES),
        ("bias from distance 40", discounted_from(40), RejectCode.SCORES, RejectCode.VERIFY),
        ("bias from distance 4000", discounted_from(4000), RejectCode.SCORES, RejectCode.VERIFY),
        ("two sinks", TwoSinks, RejectCode.SCORES),
        ("squared sink as a factor", SquaredSinkAsFactor, RejectCode.SCORES),
        ("sink of raw scores", SinkOfRawScores, RejectCode.SCORES),
        ("scores behind the output", ScoresBehindTheOutput, RejectCode.ORPHAN),
        ("scaled probabilities", ScaledProbabilities, RejectCode.SCORES),
        ("living dropout", LivingDropout, RejectCode.SCORES, RejectCode.VERIFY),
        ("a temperature behind the soft-cap", TemperatureBehindCap, RejectCode.SCORES),
        ("a temperature that depends on position", TemperatureByDistance, RejectCode.SCORES),
        ("rotated values and a temperature", TemperatureOfRotatedValues, RejectCode.ROPE),
        ("absolute scores", AbsoluteScores, RejectCode.SCORES, RejectCode.VERIFY),
        ("scores scaled by length", ScaledByLength, RejectCode.SCORES, RejectCode.VERIFY),
        ("scores scaled by activations", ScaledByActivation, RejectCode.SCORES, RejectCode.VERIFY),
        ("softmax over queries", OtherAxis, RejectCode.SCORES, RejectCode.VERIFY),
        ("bidirectional", Bidirectional, RejectCode.MASK),
        ("prefix", Prefix, RejectCode.MASK),
        ("dilated", Dilated, RejectCode.MASK),
        ("local and global heads", LocalAndGlobalHeads, RejectCode.MASK),
        ("window with the first token", WindowWithFirstToken, RejectCode.MASK),
        ("padding hidden by its token", HiddenPadding, RejectCode.MASK),
        ("padding emptied by its token", EmptyPadding, *RejectCode),
        ("hidden by activations", HiddenByActivation, RejectCode.MASK),
        ("a window within chunks", chunked(6, window=4), RejectCode.MASK),
        ("a window within long chunks", chunked(4096, window=700), RejectCode.MASK),
        ("other source", OtherSource, RejectCode.CROSS),
    )
}
"""Name to variant, and the codes that may explain its refusal."""
