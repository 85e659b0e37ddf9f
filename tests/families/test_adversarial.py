"""Models made to deceive: each converts exactly, keeps an ordinary cache for what is not understood, or is refused.

Whatever comes out of a conversion without an error is compared with the original in pieces and with padding. What is
expected of each model is one line in :data:`CASES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from zoo import DIM, HEADS, SCALE, WIDTH, Attention, HalfRope, Masked, SpelledOut, TinyLM, rotate

import mla_compile
from families import PIECES, assert_equal, assert_equal_in_onnx, difference, in_pieces, logits, tokens
from mla_compile.errors import LoadError, RefusedError
from mla_compile.passes.recognise import Recognition, recognise
from mla_compile.site import Mask, RejectCode
from mla_compile.sources.capture import capture

CONVERTS, KEPT, REFUSED = "converts", "kept", "refused"


@dataclass(frozen=True)
class Case:
    """What becomes of a model.

    Attributes:
        build: Makes the model.
        outcome: What happens.
        codes: Reasons that layers are rejected for; empty when any will do.
        pieces: Lengths the converted model is fed.
        batch: Sequences at a time.
        inputs: Inputs to export with; token ids by default.
        check: Looks at what was recognised.
        onnx: Whether a file is written and run as well.
    """

    build: Callable[[], nn.Module]
    outcome: str
    codes: frozenset[RejectCode] = frozenset()
    pieces: tuple[int, ...] = PIECES
    batch: int = 3
    inputs: Callable[[], tuple[Tensor, ...]] | None = None
    check: Callable[[Recognition], None] | None = None
    onnx: bool = True


# ---- beside attention


class ExpertsLM(TinyLM):
    """A mixture of experts after attention; its softmax, too, weighs activations in a product."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        super().__init__(*layers)
        self.router = nn.Linear(WIDTH, 4)
        self.up, self.down = (nn.Parameter(0.2 * torch.randn(4, *s)) for s in ((WIDTH, 32), (32, WIDTH)))

    def mixed(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        weights, chosen = p.topk(2, -1)
        p = torch.zeros_like(p).scatter(-1, chosen, weights)
        each = torch.einsum("bsef,efd->bsed", F.gelu(torch.einsum("bsd,edf->bsef", x, self.up)), self.down)
        return (p[..., None, :] @ each).squeeze(-2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), ids)
            x = x + self.mixed(x)
        return self.head(x)


class PoolingLM(TinyLM):
    """A softmax over all positions pools the sequence, later tokens included."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        super().__init__(*layers)
        self.score = nn.Linear(WIDTH, 1)

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return x + (self.score(x).softmax(1) * x).sum(1, keepdim=True)


class CausalPooling(SpelledOut):
    """Attention weights that depend on keys only: the query is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, HEADS)

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return self.score(x).transpose(1, 2)[:, :, None].expand(-1, -1, x.shape[1], -1)


class BatchMixingLM(TinyLM):
    """The average over the batch is added."""

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return x + x.mean(0, keepdim=True)


class AveragingLM(TinyLM):
    """The average over the whole sequence is added."""

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return x + x.mean(1, keepdim=True)


class RunningAverageLM(TinyLM):
    """The average of what came before is added: causal, but no attention and without a cache."""

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class ShiftingLM(TinyLM):
    """Half of the channels come from the token before (RWKV's token shift)."""

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return torch.cat([x[..., : WIDTH // 2], before[..., WIDTH // 2 :]], -1)


class ConvolvingLM(TinyLM):
    """A causal convolution stands before attention."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        super().__init__(*layers)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return x + self.mix(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


# ---- one token among thousands, which random text never has


SEPARATOR = 4321


def behind_separators(ids: Tensor) -> Tensor:
    """How many separators there were."""
    return (ids == SEPARATOR).long().cumsum(1)


class SegmentsLM(TinyLM):
    """Embedded segments, which separators divide."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        super().__init__(*layers)
        self.segments = nn.Embedding(8, WIDTH)

    def count(self, ids: Tensor) -> Tensor:
        return behind_separators(ids)

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) + self.segments(self.count(ids).clamp(max=7))


class TabulatedSegmentsLM(SegmentsLM):
    """Which ids are separators stands in a table."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        super().__init__(*layers)
        self.register_buffer("separates", torch.arange(zoo.VOCABULARY) == SEPARATOR)

    def count(self, ids: Tensor) -> Tensor:
        return self.separates[ids].long().cumsum(1)


class RestartingLM(TinyLM):
    """Learned positions are counted from the last separator (packed documents)."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        super().__init__(*layers)
        self.places = nn.Embedding(4096, WIDTH)

    def embed(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1])[None].expand(ids.shape)
        start = torch.where(ids == SEPARATOR, place, torch.zeros_like(place)).cummax(1).values
        return super().embed(ids) + self.places(place - start)


class RepeatingLM(TinyLM):
    """A token that equals the one before is told so."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        super().__init__(*layers)
        self.repeated = nn.Embedding(2, WIDTH)

    def embed(self, ids: Tensor) -> Tensor:
        before = F.pad(ids, (1, 0), value=-1)[:, :-1]
        return super().embed(ids) + self.repeated((before == ids).long())


class SwitchedOutput(HalfRope):
    """Attention counts twice behind a separator."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = super().forward(x, ids)
        return torch.where((behind_separators(ids) > 0)[..., None], 2 * y, y)


class SwitchedQueries(HalfRope):
    """Queries count twice behind a separator."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        self.ids = ids
        return super().forward(x, ids)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return torch.where((behind_separators(self.ids) > 0)[..., None], 2 * q, q), k, v


# ---- positions


class PlacedLM(TinyLM):
    """Has an embedding and a table of positions."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        super().__init__(*layers)
        self.wpe, self.table = nn.Embedding(128, WIDTH), nn.Parameter(torch.randn(128, WIDTH))


class PlacedByEmbedding(PlacedLM):
    """A batch axis is put in front of embedded positions."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.wpe(torch.arange(ids.shape[1]))[None]


class PlacedByTable(PlacedLM):
    """A batch axis is put in front of a sliced table."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.table[: ids.shape[1]].unsqueeze(0)


class PlacedFromTheEnd(PlacedLM):
    """Positions count down to the last token."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.wpe(torch.arange(ids.shape[1]).flip(0))


class PlacedByCount(PlacedLM):
    """Padding, known by its token, has no position (RoBERTa)."""

    def embed(self, ids: Tensor) -> Tensor:
        real = (ids != zoo.PADDING).long()
        return self.tokens(ids) + self.wpe(real.cumsum(1) * real)


class PlacedBySinusoids(TinyLM):
    """Sines and cosines of the position are computed, not looked up."""

    def embed(self, ids: Tensor) -> Tensor:
        frequency = 50.0 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2))
        angle = torch.arange(ids.shape[1]).float()[:, None] * frequency
        return self.tokens(ids) + torch.cat([angle.sin(), angle.cos()], -1)


class ScaledByLengthLM(TinyLM):
    """Activations are divided by the length of the sequence."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) / math.sqrt(2.0) * (8.0 / torch.ones(ids.shape[1]).sum())


# ---- rotation and norms


class RopeLikeGate(Attention):
    """Written as a rotation, by angles that are computed from the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Linear(WIDTH, HEADS * DIM // 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        self.angle = self.turn(x).view(x.shape[0], x.shape[1], HEADS, DIM // 2).transpose(1, 2)
        return super().forward(x, ids)

    def queries(self, q: Tensor) -> Tensor:
        cos, sin = self.angle.cos(), self.angle.sin()
        a, b = q.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    keys = queries


class LearnedRope(Attention):
    """Frequencies are a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inv_freq = nn.Parameter(torch.tensor([1.1, 0.3, 0.07]))

    def queries(self, q: Tensor) -> Tensor:
        angle = torch.arange(q.shape[2])[:, None] * self.inv_freq
        cos, sin = angle.cos(), angle.sin()
        a, b = q.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    keys = queries


class NormAfterRope(Attention):
    """The norm follows the rotation, which does not change it; without weights the two commute (Llama 4)."""

    def weighed(self, x: Tensor) -> Tensor:
        return x

    def queries(self, q: Tensor) -> Tensor:
        q = rotate(q)
        return self.weighed(q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-5))

    keys = queries


class WeighedNormAfterRope(NormAfterRope):
    """With weights per channel they do not commute."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + torch.randn(DIM))

    def weighed(self, x: Tensor) -> Tensor:
        return x * self.gain


class GrowingValues(Attention):
    """Values grow with the position."""

    def values(self, v: Tensor) -> Tensor:
        return v * (1 + 0.1 * torch.arange(v.shape[2]))[:, None]


class SteppedQueries(Attention):
    """Queries are scaled by position, from token 64 on (Llama 4's temperature has 8192)."""

    def queries(self, q: Tensor) -> Tensor:
        place = torch.arange(q.shape[2]).float()
        return rotate(q) * (1 + torch.log1p(((place + 1) / 64).floor()))[:, None]

    def keys(self, k: Tensor) -> Tensor:
        return rotate(k)


# ---- scores


class BucketBias(SpelledOut):
    """A learned bias per head and bucket of the distance (T5)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(8, HEADS)

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        distance = (place[:, None] - place).clamp(min=0)
        far = (4 + (torch.log(distance.clamp(min=1) / 4) / math.log(8) * 4).long()).clamp(max=7)
        bucket = torch.where(distance < 4, distance, far)
        return super().scores(q, k, x) + self.bias(bucket).permute(2, 0, 1)


class DifferentialProbabilities(SpelledOut):
    """The difference of two softmaxes weighs the values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        seen = self.seen(ids.shape[1], ids)
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        first, second = (F.softmax(self.hide(self.scores(*o, x), seen), -1) for o in ((q1, k1), (q2, k2)))
        return (first - 0.4 * second) @ v


class DifferentialOutputs(Attention):
    """The same with the fused operator, twice over the same values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        first, second = (
            F.scaled_dot_product_attention(*o, v, is_causal=True, scale=SCALE) for o in ((q1, k1), (q2, k2))
        )
        return first - 0.4 * second


class LikedKeys(SpelledOut):
    """Every key has a score of its own, from its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.liked = nn.Linear(WIDTH, HEADS)

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return super().scores(q, k, x) + self.liked(x).transpose(1, 2)[:, :, None]


class SinkOfZero(SpelledOut):
    """The denominator has one more term of 1, which is no parameter."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids))
        return F.softmax(F.pad(scores, (0, 1)), -1)[..., :-1] @ v


class WatchedProbabilities(SpelledOut):
    """Attention weights are used twice: for values, and for how sharp they are."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        p = F.softmax(self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids)), -1)
        return p @ v * p.amax(-1, keepdim=True)


class SigmoidAttention(SpelledOut):
    """No softmax: every key is weighed by itself."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        return self.hide(self.scores(q, k, x), self.seen(ids.shape[1], ids)).sigmoid() @ v


class LinearAttention(SpelledOut):
    """No softmax either; a running sum would do for a cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2) * self.seen(ids.shape[1], ids)
        return scores @ v / scores.sum(-1, keepdim=True)


# ---- masks


class HiddenByValues(Masked):
    """Keys whose values are small are hidden."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1])
        seen = self.seen(ids.shape[1], ids) & ((v.sum(-1) > 0)[:, :, None] | (place == place[:, None]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE)


class Documents(Masked):
    """A separator token ends what can be seen."""

    def seen(self, length: int, ids: Tensor) -> Tensor:
        document = (ids == zoo.PADDING).cumsum(1)
        return super().seen(length, ids) & (document[:, None, :, None] == document[:, None, None])


class FarFloatWindow(Masked):
    """A window as a floating point number, longer than any probe."""

    def seen(self, length: int, ids: Tensor) -> Tensor:
        place = torch.arange(length)
        distance = place[:, None] - place
        return (distance >= 0) & (distance.float() < 4096.0)


class FarFloatDiscount(SpelledOut):
    """A discount that begins beyond any probe."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        return super().scores(q, k, x) - 0.5 * ((place[:, None] - place).float() - 4000.0).clamp(min=0)


class LargeWholeNumber(SpelledOut):
    """Hidden by adding a large whole number, which is no window."""

    def hide(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores + torch.where(seen, 0, -(10**9))


# ---- between layers


class SharedKeysLM(TinyLM):
    """The second layer attends to the keys and values of the first."""

    def forward(self, ids: Tensor) -> Tensor:
        x, memory = self.embed(ids), None
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = norm(x)
            q = rotate(layer.split(layer.q(y), HEADS))
            if memory is None:
                memory = rotate(layer.split(layer.k(y), HEADS)), layer.split(layer.v(y), HEADS)
            attended = F.scaled_dot_product_attention(q, *memory, is_causal=True, scale=SCALE)
            x = x + layer.out(attended.transpose(1, 2).reshape(*x.shape[:2], -1))
        return self.head(x)


class ValueResidualLM(TinyLM):
    """The second layer adds the first layer's values to its own."""

    def forward(self, ids: Tensor) -> Tensor:
        x, values = self.embed(ids), 0.0
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = norm(x)
            q, k = (rotate(layer.split(p(y), HEADS)) for p in (layer.q, layer.k))
            values = layer.split(layer.v(y), HEADS) + 0.5 * values
            attended = F.scaled_dot_product_attention(q, k, values, is_causal=True, scale=SCALE)
            x = x + layer.out(attended.transpose(1, 2).reshape(*x.shape[:2], -1))
        return self.head(x)


class MemoryKeys(SpelledOut):
    """Two learned keys and values stand before all others (prefix tuning)."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.ParameterList(torch.randn(1, HEADS, 2, DIM) for _ in range(2))

    def keys(self, k: Tensor) -> Tensor:
        return torch.cat([self.memory[0].expand(k.shape[0], -1, -1, -1), k], 2)

    def values(self, v: Tensor) -> Tensor:
        return torch.cat([self.memory[1].expand(v.shape[0], -1, -1, -1), v], 2)

    def seen(self, length: int, ids: Tensor) -> Tensor:
        return torch.ones(length, length + 2, dtype=torch.bool).tril(2)


class CrossLM(TinyLM):
    """Attends to another text: two inputs hold token ids."""

    def forward(self, ids: Tensor, source: Tensor) -> Tensor:
        x, memory = self.embed(ids), self.embed(source)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), ids)
            q = layer.split(layer.q(norm(x)), HEADS)
            k, v = (layer.split(p(memory), HEADS) for p in (layer.k, layer.v))
            y = F.scaled_dot_product_attention(q, k, v)
            x = x + layer.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))
        return self.head(x)


class TrainableDropout(SpelledOut):
    """Dropout of attention weights as a module: alive in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def probabilities(self, p: Tensor) -> Tensor:
        return self.dropout(p)


# ---- the table


def attention(*layers: Callable[[], nn.Module], kind: type[TinyLM] = TinyLM) -> Callable[[], nn.Module]:
    """A model whose scores matter: with small weights, attention would be an average whatever is wrong with it."""

    def build() -> nn.Module:
        module = zoo.model(*layers, kind=kind)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith(("q.weight", "k.weight")):
                    parameter.mul_(2.5)
        return module

    return build


def beside(kind: type[Attention]) -> Callable[[], nn.Module]:
    """The layer in question, and one that converts without question."""
    return attention(kind, HalfRope)


def within(kind: type[TinyLM]) -> Callable[[], nn.Module]:
    """Two ordinary layers in a model that is not."""
    return attention(HalfRope, HalfRope, kind=kind)


def codes(*names: str) -> frozenset[RejectCode]:
    return frozenset(RejectCode[n] for n in names)


def window(size: int) -> Callable[[Recognition], None]:
    """Recognised as a window of that size, not as an endless one."""

    def check(found: Recognition) -> None:
        assert [s.mask for s in found.sites] == [Mask(size)]

    return check


def no_window(found: Recognition) -> None:
    assert [s.mask for s in found.sites] == [Mask(None), Mask(None)]


LATE = (60, 1, 3, 1, 10, 1)
FAR = (4096, 2, 1, 20, 1)

CASES: dict[str, Case] = {
    # what is no attention, and what surrounds it
    "router of experts": Case(within(ExpertsLM), CONVERTS),
    "pooling over all positions": Case(within(PoolingLM), REFUSED),
    "pooling over earlier positions": Case(beside(CausalPooling), REFUSED),
    "mean over the batch": Case(within(BatchMixingLM), REFUSED),
    "mean over the sequence": Case(within(AveragingLM), REFUSED),
    "running mean": Case(within(RunningAverageLM), REFUSED),
    "token shift": Case(within(ShiftingLM), REFUSED),
    "convolution": Case(within(ConvolvingLM), REFUSED),
    "segments": Case(within(SegmentsLM), REFUSED),
    "segments by a table": Case(within(TabulatedSegmentsLM), REFUSED),
    "positions from the last separator": Case(within(RestartingLM), REFUSED),
    "repeated tokens": Case(within(RepeatingLM), REFUSED),
    "outputs behind a separator": Case(beside(SwitchedOutput), REFUSED),
    "queries behind a separator": Case(beside(SwitchedQueries), REFUSED),
    "sigmoid attention": Case(beside(SigmoidAttention), REFUSED),
    "linear attention": Case(beside(LinearAttention), REFUSED),
    # positions outside attention
    "embedded positions with a batch axis": Case(within(PlacedByEmbedding), CONVERTS),
    "sliced table with a batch axis": Case(within(PlacedByTable), CONVERTS),
    "positions from the end": Case(within(PlacedFromTheEnd), REFUSED),
    "positions of real tokens": Case(within(PlacedByCount), REFUSED),
    "computed sinusoids": Case(within(PlacedBySinusoids), CONVERTS),
    "scaled by the length": Case(within(ScaledByLengthLM), REFUSED),
    # positions inside attention
    "gate that looks like rope": Case(beside(RopeLikeGate), KEPT, codes("PROJECTION")),
    "learned frequencies": Case(beside(LearnedRope), CONVERTS),
    "norm after rope": Case(beside(NormAfterRope), CONVERTS),
    "rope of keys from three": Case(beside(zoo.KeysAhead), CONVERTS),
    "weighed norm after rope": Case(beside(WeighedNormAfterRope), CONVERTS),
    "values grow with the position": Case(beside(GrowingValues), KEPT, codes("ROPE")),
    "queries scaled from token 64": Case(beside(SteppedQueries), CONVERTS, pieces=LATE),
    "queries scaled from token 64, smoothly": Case(beside(zoo.LateScale), CONVERTS, pieces=LATE),
    "decaying rope": Case(beside(zoo.DecayingRope), REFUSED, codes("ROPE")),
    "rope stretched by the length": Case(beside(zoo.StretchedRope), REFUSED, codes("VERIFY")),
    # scores
    "bucketed bias": Case(beside(BucketBias), REFUSED, codes("SCORES")),
    "difference of probabilities": Case(beside(DifferentialProbabilities), REFUSED, codes("SCORES")),
    "difference of outputs": Case(beside(DifferentialOutputs), CONVERTS),
    "talking heads": Case(beside(zoo.MixedScores), REFUSED, codes("ANCHOR")),
    "scores of keys alone": Case(beside(LikedKeys), REFUSED),
    "temperature per head": Case(attention(zoo.LearnedTemperature, zoo.CosineAttention), CONVERTS),
    "sink of zero": Case(beside(SinkOfZero), CONVERTS),
    "probabilities used twice": Case(beside(WatchedProbabilities), REFUSED),
    "living dropout": Case(beside(zoo.LivingDropout), REFUSED, codes("SCORES")),
    # masks
    "mask that reads activations": Case(beside(zoo.HiddenByActivation), REFUSED, codes("MASK")),
    "mask that reads values": Case(beside(HiddenByValues), REFUSED, codes("MASK")),
    "mask that reads tokens": Case(beside(Documents), REFUSED, codes("MASK")),
    "prefix": Case(beside(zoo.Prefix), REFUSED, codes("MASK")),
    "window of 4096.0": Case(attention(FarFloatWindow), CONVERTS, pieces=FAR, batch=1, check=window(4096)),
    "discount from 4000.0": Case(attention(FarFloatDiscount), REFUSED, codes("SCORES"), FAR, 1),
    "large whole number": Case(beside(LargeWholeNumber), CONVERTS, check=no_window),
    "bidirectional": Case(beside(zoo.Bidirectional), REFUSED, codes("MASK")),
    # other activations
    "keys of the first layer": Case(within(SharedKeysLM), CONVERTS),
    "values of the first layer": Case(within(ValueResidualLM), KEPT, codes("PROJECTION")),
    "learned keys": Case(beside(MemoryKeys), REFUSED),
    "two texts": Case(within(CrossLM), REFUSED, inputs=lambda: (zoo_tokens(2, 5), zoo_tokens(2, 6, seed=1))),
}
"""Name to model, and what becomes of it."""


def zoo_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return tokens(batch, length, seed, zoo.VOCABULARY)


def assert_never_wrong(case: Case, folder: object) -> tuple[str, Recognition | None]:
    """Convert a model, and compare whatever comes out with the original.

    Returns:
        What became of the model, and what was recognised in it.
    """
    module = case.build()
    found = compiled = refusal = None
    try:
        program = capture(module, case.inputs() if case.inputs else (zoo_tokens(2, 5),))
        found = recognise(program)
        compiled = mla_compile.compile(program.exported, exact=True)
    except (RefusedError, LoadError) as error:  # a VerificationError would be a defect: nobody refused in time
        refusal = error
    if refusal is not None:
        assert refusal.remedy, "what can the user do?"
        assert "\n" not in str(refusal), "one sentence"
        return REFUSED, found
    ids = zoo_tokens(case.batch, sum(case.pieces), seed=11)
    assert_equal(compiled, module, ids, case.pieces)
    if case.onnx:
        assert_equal_in_onnx(compiled, module, ids, folder, case.pieces)
    return KEPT if found.rejections else CONVERTS, found


@pytest.mark.parametrize("name", CASES)
def test_never_wrong(name, tmp_path):
    case = CASES[name]
    outcome, found = assert_never_wrong(case, tmp_path)
    rejected = {r.code for r in found.rejections} if found else set()
    assert outcome == case.outcome, f"{outcome}; rejected for {sorted(rejected)}"
    if case.codes:
        assert rejected == case.codes
    if case.check:
        case.check(found)


KEPT_BESIDE = {
    "keys of two projections",
    "latent attention",
    "keys without a projection",
    "an activation as bias",
    "a product with factors",
    "a weight per position",
    "every head its own channels",
    "weights per head on the left",
    "a small projection per head",
    "rectified keys",
    "clamped values",
    "values normed by halves",
    "values normed in pairs",
    "values normed across heads",
    "rotated normed values",
    "squashed values",
    "mixed channels",
    "heads that count from different positions",
    "channels turned everywhere alike",
    "norm behind a rotation from one",
    "rotated values and a temperature",
    "rotated values",
    "rotated queries only",
    "a frequency per head",
    "queries faster than keys",
    "keys scaled by position",
    "uneven groups",
    "layer norm behind the rotation",
    "norm of half a head behind the rotation",
    "shift behind the rotation",
    "chosen keys",
    "padding emptied by its token",
    "other source",
}
"""Layers of :data:`zoo.REFUSED` that keep an ordinary cache; a model with one of the others is refused."""


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_a_layer_that_is_not_read_is_never_wrong(name, tmp_path):
    """All variants of one step of attention, beside a layer that converts: whatever is made of them is right."""
    kind, _ = zoo.REFUSED[name]
    expected = KEPT if name in KEPT_BESIDE else REFUSED
    outcome, _ = assert_never_wrong(Case(beside(kind), expected, onnx=False), tmp_path)
    assert outcome == expected


def test_layers_that_are_kept_are_among_those_that_are_not_read():
    assert {*zoo.REFUSED} > KEPT_BESIDE


# ---- what needs more than a line


def test_a_router_is_left_as_it_is():
    module = CASES["router of experts"].build()
    program = capture(module, (zoo_tokens(2, 5),))
    found = recognise(program)
    assert [s.path for s in found.sites] == ["layers.0", "layers.1"]
    assert not found.rejections
    state = mla_compile.compile(program.exported, exact=True).module.state_dict()
    for name in ("router.weight", "router.bias", "up", "down"):
        assert torch.equal(state[f"graph.{name}"], module.state_dict()[name])


def test_a_module_in_training_mode_is_converted_as_it_evaluates():
    module = beside(TrainableDropout)().train()
    compiled = mla_compile.compile(module, (zoo_tokens(2, 5),), exact=True)
    assert module.training
    assert_equal(compiled, module.eval(), zoo_tokens(3, sum(PIECES)))


def test_a_program_exported_in_training_mode_is_refused():
    """Its dropout is part of the graph, and would fall on every token."""
    module = beside(TrainableDropout)().train()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(module, (zoo_tokens(2, 5),), dynamic_shapes=(dynamic,))
    said = r"layers\.0: attention weights are dropped out at random: call model\.eval\(\) before exporting \[scores\]"
    with pytest.raises(RefusedError, match=said):
        mla_compile.compile(exported, exact=True)


def test_a_kept_layer_beside_a_converted_one_decodes_for_long():
    """Token by token for longer than any piece elsewhere, with the positions of both kinds of cache."""
    module = beside(GrowingValues)()
    compiled = mla_compile.compile(module, (zoo_tokens(2, 5),), exact=True)
    assert [site.path for site in compiled.report.sites] == ["layers.1"]
    assert [rejection.path for rejection in compiled.report.kept] == ["layers.0"]
    ids = zoo_tokens(2, 40)
    assert difference(in_pieces(compiled.module, ids, (1,) * 40), logits(module, ids)) <= 1e-4
