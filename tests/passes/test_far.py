"""What scores do only beyond the lengths that are looked at is found, or the layer is refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn

from mla_compile.passes.recognise import recognise
from mla_compile.site import Mask, RejectCode

LONGEST = 2048


def distance(length: int) -> Tensor:
    place = torch.arange(length)
    return place[:, None] - place


def masked(seen: Callable[[Tensor], Tensor]) -> type[zoo.Masked]:
    """Keys are seen by a rule of their distance, on top of being causal."""

    class ByDistance(zoo.Masked):
        def seen(self, length: int, ids: Tensor) -> Tensor:
            d = distance(length)
            return (d >= 0) & seen(d)

    return ByDistance


def tabled(rule: Callable[[Tensor], Tensor]) -> type[zoo.Masked]:
    """A table of what is seen, as GPT-Neo keeps one."""

    class Tabled(zoo.Masked):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", (distance(LONGEST) >= 0) & rule(distance(LONGEST)))

        def seen(self, length: int, ids: Tensor) -> Tensor:
            return self.table[:length, :length]

    return Tabled


def discounted(rule: Callable[[Tensor], Tensor], window: int | None = None) -> type[zoo.SpelledOut]:
    """Something made of the distance is taken from the scores."""

    class Discounted(zoo.SpelledOut):
        def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
            return super().scores(q, k, x) - rule(distance(q.shape[2]))

        def seen(self, length: int, ids: Tensor) -> Tensor:
            d = distance(length)
            return (d >= 0) & (d < window) if window else d >= 0

    return Discounted


class TabledSlopes(zoo.SpelledOut):
    """ALiBi that stops at 1024, as a table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", -0.004 * distance(LONGEST).clamp(min=0, max=1024).float())

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return super().scores(q, k, x) + self.table[: q.shape[2], : q.shape[2]]


class ByDiagonal(zoo.Masked):
    """A window without a node that counts tokens."""

    def seen(self, length: int, ids: Tensor) -> Tensor:
        ones = torch.ones(length, length, dtype=torch.bool)
        return ones.tril() & ones.triu(-1023) & ones.triu(-2999)


class BlockLocal(zoo.Masked):
    """Blocks of 64 tokens see themselves and 15 before (Phi-3-small)."""

    def seen(self, length: int, ids: Tensor) -> Tensor:
        place = torch.arange(length)
        return (place <= place[:, None]) & (place[:, None] // 64 - place // 64 < 16)


class LearnedWindow(zoo.Masked):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = nn.Parameter(torch.tensor(float(window)), requires_grad=False)

    def seen(self, length: int, ids: Tensor) -> Tensor:
        d = distance(length)
        return (d >= 0) & (d < self.window)


class Multiplied(zoo.SpelledOut):
    """Hidden as GPT-1 does it: scores times a table of ones and zeros, less much where it is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(LONGEST, LONGEST).tril())

    def hide(self, scores: Tensor, seen: Tensor) -> Tensor:
        seen = self.table[: scores.shape[-1], : scores.shape[-1]]
        return scores * seen - 1e4 * (1 - seen)


class LateTemperature(zoo.SpelledOut):
    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        place = torch.arange(q.shape[2]).float()
        return super().scores(q, k, x) * (1 + torch.log1p(torch.floor((place + 1) / 200)))[:, None]


class LogN(zoo.SpelledOut):
    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        count = torch.ones(q.shape[2]).sum()
        return super().scores(q, k, x) * (count.log() / math.log(512)).clamp(min=1.0)


class LateProbabilities(zoo.SpelledOut):
    def probabilities(self, p: Tensor) -> Tensor:
        return p * (1 + torch.floor(torch.arange(p.shape[-2]).float() / 200))[:, None]


class Largest(zoo.SpelledOut):
    """Only the 200 largest scores of a query count."""

    def hide(self, scores: Tensor, seen: Tensor) -> Tensor:
        scores = super().hide(scores, seen)
        least = scores.sort(-1, descending=True).values[..., :200][..., -1:]
        return scores.masked_fill(scores < least, -math.inf)


class FarZero(zoo.SpelledOut):
    """Scores of keys 1000 tokens back are zero, which does not show in scores that are zero anyway."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return torch.where(distance(q.shape[2]) < 1000, super().scores(q, k, x), 0.0)


class LargestSubtracted(zoo.SpelledOut):
    """What many write in front of a softmax, and which does nothing."""

    def hide(self, scores: Tensor, seen: Tensor) -> Tensor:
        scores = super().hide(scores, seen)
        return scores - scores.max(-1, keepdim=True).values


READ: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "two windows": (masked(lambda d: (d < 1024) & (d < 8192)), 1024),
    "two windows, the smaller last": (masked(lambda d: (d < 8192) & (d < 1024)), 1024),
    "twice the distance": (masked(lambda d: 2 * d < 2048), 1024),
    "half a token": (masked(lambda d: d < 1024.5), 1025),
    "a filled tensor": (masked(lambda d: d < torch.full([], 4096)), 4096),
    "a table": (tabled(lambda d: d < 1024), 1024),
    "a table that hides nothing": (tabled(lambda d: d >= 0), None),
    "by the diagonal": (ByDiagonal, 1024),
    "learned": (functools.partial(LearnedWindow, 2048), 2048),
    "learned by another layer": (functools.partial(LearnedWindow, 700), 700),
    "multiplied": (Multiplied, None),
    "the largest is subtracted": (LargestSubtracted, None),
    "slopes": (discounted(lambda d: 0.25 * d), None),
}
NOT_READ: dict[str, tuple[Callable[[], nn.Module], RejectCode]] = {
    "temperature": (LateTemperature, RejectCode.SCORES),
    "log n": (LogN, RejectCode.SCORES),
    "probabilities": (LateProbabilities, RejectCode.SCORES),
    "zero from 1000 on": (FarZero, RejectCode.SCORES),
    "blocks": (BlockLocal, RejectCode.MASK),
    "a table of strides": (tabled(lambda d: (d < 1024) | (d % 2 == 0)), RejectCode.MASK),
    "discount by blocks": (discounted(lambda d: 0.5 * (d // 256 - 4).clamp(min=0)), RejectCode.SCORES),
    "discount by a ramp": (discounted(lambda d: 0.5 * torch.relu(d / 256.0 - 3.0)), RejectCode.SCORES),
    "discount within a window": (discounted(lambda d: 0.5 * (d - 1000).clamp(min=0), 4096), RejectCode.SCORES),
    "slopes that stop": (discounted(lambda d: 0.05 * d.clamp(max=1024)), RejectCode.SCORES),
    "slopes that stop, as a table": (TabledSlopes, RejectCode.SCORES),
}


@pytest.fixture(scope="module")
def found():
    """What was recognised in one model whose layers are all the others."""
    kinds = [kind for kind, _ in (*READ.values(), *NOT_READ.values())]
    recognition = recognise(zoo.program_of(zoo.model(*kinds)))
    return {r.index: r for r in (*recognition.sites, *recognition.rejections)}


@pytest.mark.parametrize("name", READ)
def test_windows_longer_than_any_probe_are_read(found, name):
    site = found[[*READ].index(name)]
    assert getattr(site, "mask", site) == Mask(READ[name][1])


@pytest.mark.parametrize("name", NOT_READ)
def test_what_begins_far_out_is_refused(found, name):
    rejection = found[len(READ) + [*NOT_READ].index(name)]
    assert getattr(rejection, "code", rejection) == NOT_READ[name][1]
    assert rejection.plain is None  # an ordinary cache would not make it right


def test_scores_that_are_compared_with_one_another_are_refused(zoo_programs):
    """In a model of its own: a slice of 200 scores bounds the length of its program."""
    (rejection,) = recognise(zoo_programs[Largest]).rejections
    assert (rejection.code, rejection.plain) == (RejectCode.SCORES, None)
    assert "top-k" in rejection.reason
