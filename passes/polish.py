"""A short training of the converted layers: their new matrices learn to predict what the original predicts.

A method chooses every layer's weights for a loss to second order, and on the original's activations. What is lost
beyond that, and what one layer could make up for another, is found by gradients of the divergence from the original,
through the whole converted model. Everything that the conversion left as it was stays as it is.

All layers are trained together: one loss, and a step that is shortened by the length of all gradients. What is trained
is in memory with its gradient, two means and the last that was good, and so are activations of all layers.

Adam moves every number by about as much. That suits weights whose two halves are balanced
(:mod:`~mla_compile.passes.gauge`) and steps in proportion to the size of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.emit import holder_name
from mla_compile.passes.gauge import balanced
from mla_compile.passes.moved import moved_graph, moved_model
from mla_compile.passes.retype import widened
from mla_compile.passes.search import Divergence
from mla_compile.passes.task import Task
from mla_compile.report import Polish
from mla_compile.site import AttentionSite
from mla_compile.text.evaluate import divergence, original_scorer

__all__ = ["PolishedWeights", "polish"]

_TRAINED = ("query", "query_bias", "row", "row_bias", "key_up", "value_up", "output_bias")
_BATCH = 8
"""Windows per step."""
_LOGITS = 2**26
"""Logits of a pass, at most: a step over a large vocabulary takes several passes."""
_RATE = 0.03
"""Step size, relative to a matrix's root mean square."""
_BETAS = (0.9, 0.99)
_WARM_UP = 10
"""Steps until the step size is reached, at most; a tenth of all steps if that is less. It then falls as a cosine."""
_LONGEST_GRADIENT = 1.0
_ASIDE = 16
"""Windows kept out of training to compare on, at most; an eighth of them if that is less."""


@dataclass(frozen=True)
class PolishedWeights:
    """What training made of a choice.

    Attributes:
        weights: Latent weights of every layer: trained, or as they were where that was no better.
        report: How far the model was from the original before and after.
        notes: What the user should know.
    """

    weights: tuple[LatentWeights, ...]
    report: Polish
    notes: tuple[str, ...] = ()


def polish(task: Task, weights: Sequence[LatentWeights], steps: int) -> PolishedWeights:
    """Train a choice's matrices by KL(original || converted) on the calibration text.

    Nothing that is given is changed. The same task, weights and steps give the same result.

    Args:
        task: The model and its text, a part of which is kept out of training to compare on.
        weights: Latent weights of every layer.
        steps: Optimiser steps.
    """
    windows = task.require_windows()
    aside = max(1, min(_ASIDE, len(windows) // 8))
    measure = Divergence(task.program, windows[-aside:], task.sites, task.resources)
    before = measure(task.rewrite(weights))  # checked before anything takes long
    trained, done = _train(task, weights, windows[:-aside] if len(windows) > 1 else windows, steps)
    after = measure(task.rewrite(trained, check=False))
    notes = [] if done == steps else [f"polishing stopped after {done} of {steps} steps: the loss was not finite"]
    if not after < before:
        unseen = "text it had not seen" if len(windows) > 1 else "its text, which is one window"
        notes.append(f"polishing did not come closer to the original on {unseen}, and was undone")
        trained, after = tuple(weights), before
    return PolishedWeights(trained, Polish(done, before, after), tuple(notes))


def _train(
    task: Task, weights: Sequence[LatentWeights], windows: Tensor, steps: int
) -> tuple[tuple[LatentWeights, ...], int]:
    """Train for so many steps; the weights, and the steps they are from: fewer where the loss became not finite."""
    start = [task.held(balanced(w)) for w in weights]
    device = task.resources.device
    model = moved_model(task.rewrite(start, check=False), device)
    frozen = {name: p.detach() for name, p in model.named_parameters()}
    layers = [_Layer.of(site, w, frozen) for site, w in zip(task.sites, start, strict=True)]
    parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
    optimiser = torch.optim.Adam([group for layer in layers for group in layer.groups()], betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share(step, steps))
    teacher = original_scorer(task.program, moved_graph(widened(task.program.flat_module()), device))
    # The last weights that are known to have a finite loss.
    good, done = {name: p.detach().clone() for name, p in parameters.items()}, 0
    with task.stages.stage("polish", steps) as advance:
        for ids in _batches(windows, steps, task.config.seed):
            optimiser.zero_grad()
            loss = 0.0
            for part in ids.to(device).split(max(1, _LOGITS // (ids.shape[1] * task.program.vocabulary))):
                with torch.no_grad():
                    expected = teacher(part).log_softmax(-1)
                got = functional_call(model, frozen | parameters, (part,)).logits.log_softmax(-1)
                error = divergence(expected, got) / ids.numel()
                error.backward(inputs=[*parameters.values()])
                loss += float(error.detach())
            length = float(nn.utils.clip_grad_norm_(parameters.values(), _LONGEST_GRADIENT))
            if not (math.isfinite(loss) and math.isfinite(length)):
                return tuple(layer.weights(good) for layer in layers), max(0, done - 1)
            for name, p in parameters.items():
                good[name].copy_(p.detach())
            optimiser.step()
            schedule.step()
            done += 1
            advance()
    return tuple(layer.weights(parameters) for layer in layers), steps


def _share(step: int, steps: int) -> float:
    """What step number ``step`` takes of the full step size."""
    warm_up = max(1, min(_WARM_UP, steps // 10))
    return min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2


def _batches(windows: Tensor, steps: int, seed: int) -> list[Tensor]:
    """Windows in random order, all of them once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(steps * _BATCH / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(rounds)])
    return [windows[places] for places in order[: steps * _BATCH].split(_BATCH)]


@dataclass(frozen=True)
class _Layer:
    """A converted layer in training.

    Attributes:
        start: Its weights before.
        fields: Names of the weights that are trained, by their parameters' names in the model.
        parameters: Copies of the parameters that are trained.
    """

    start: LatentWeights
    fields: Mapping[str, str]
    parameters: Mapping[str, nn.Parameter]

    @classmethod
    def of(cls, site: AttentionSite, start: LatentWeights, stored: Mapping[str, Tensor]) -> _Layer:
        """Prepare a layer whose parameters are stored in the model; the constant latent entry stays what it is."""
        prefix = f"graph.{holder_name(site.path, site.index)}."
        fields = {prefix + field: field for field in _TRAINED if stored.get(prefix + field, torch.empty(0)).numel()}
        parameters = {name: nn.Parameter(stored[name].clone()) for name in fields}
        if site.needs_constant(start.key_up.shape[1]):
            constant = start.key_up.shape[2] - 1
            for name in (prefix + "row", prefix + "row_bias"):
                parameters[name].register_hook(lambda g: g.index_fill(0, torch.tensor(constant, device=g.device), 0))
        return cls(start, fields, parameters)

    def groups(self) -> list[dict[str, object]]:
        """Every parameter with its own step size.

        A bias counts as a weight of an input that is always 1; that of outputs has no matrix, and counts by itself.
        """
        sizes = {field: float(self.parameters[n].detach().square().mean().sqrt()) for n, field in self.fields.items()}
        return [
            {"params": [self.parameters[name]], "lr": _RATE * sizes.get(field.removesuffix("_bias"), sizes[field])}
            for name, field in self.fields.items()
        ]

    def weights(self, values: Mapping[str, Tensor]) -> LatentWeights:
        """The layer with trained values, by their parameters' names."""
        found: dict[str, Any] = {
            field: values[name].detach().cpu().double().reshape(getattr(self.start, field).shape)
            for name, field in self.fields.items()
        }
        return replace(self.start, **found)
