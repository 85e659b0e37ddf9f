"""Converts a model on the processor and on a pretended device: ``pretend_worker.py CASE OUT``."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pretend_device
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn

import mla_compile
from mla_compile.artifacts.runnable import module_scorer
from mla_compile.conversion import causal
from mla_compile.errors import LoadError
from mla_compile.passes.layerwise import Resources
from mla_compile.text.evaluate import perplexity
from mla_compile.training.checkpoints import Checkpoints

_IDS = models.tokens(24, 32, seed=3)


def _sharp() -> nn.Module:
    """A model that predicts something, so that there is something to lose, and to win back."""
    model = models.llama(attention_bias=True)
    with torch.no_grad():
        model.lm_head.weight *= 30
    return model


_CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "fisher, polished": (_sharp, {"polish_steps": 12, "cache_ratio": 0.2}),
    "fisher without gradients, layer by layer": (models.qwen3, {"gradients": False, "segments": True}),
    "transmla on its own text": (models.llama, {"method": "transmla", "calibration": "sampled"}),
    "mha2mla": (models.llama, {"method": "mha2mla"}),
    "fine-tuned": (models.llama, {"method": "mha2mla", "finetune": _IDS, "finetune_tokens": 2048}),
}


def _converted(case: str, device: str | None) -> mla_compile.CompiledModel:
    make, settings = _CASES[case]
    text = {} if "finetune" in settings else {"calibration": _IDS, "seq_len": 32, "calibration_tokens": _IDS.numel()}
    given = {"cache_ratio": 0.5, "statistics_cache": False} | text | settings
    if "finetune" in given:
        _train_on(device or "cpu")
    segments = given.pop("segments", False)
    causal.Resources = functools.partial(Resources, whole=0) if segments else Resources  # type: ignore[misc]
    model = make()
    return mla_compile.compile(model, models.example(model), device=device, **given)


def _train_on(device: str) -> None:
    """Let accelerate find a device, which it does not know; and keep no checkpoints, which are read from memory."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState()
    PartialState._shared_state["device"] = torch.device(device)
    Checkpoints.save = Checkpoints.load = lambda *_: None  # type: ignore[method-assign]


def _logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(_IDS.to(next(module.parameters()).device)).logits
    return found.cpu()


if __name__ == "__main__":
    case, out = sys.argv[1:]
    torch.set_num_threads(1)
    here = _converted(case, None)
    before = _logits(here.module)
    pretend_device.SEEN.clear()
    there = _converted(case, pretend_device.NAME)
    seen = Counter(pretend_device.SEEN)
    after = _logits(there.module)
    try:
        mla_compile.compile(models.llama().to(pretend_device.NAME), method="mha2mla")
        refusal = None
    except LoadError as error:
        refusal = str(error)
    devices = sorted({str(p.device) for p in there.module.parameters()})
    on_it = _logits(there.module.to(pretend_device.NAME))
    scores = [perplexity(module_scorer(here.module, device), _IDS).value for device in ("cpu", pretend_device.NAME)]
    found = {
        "perplexity": [[value] for value in scores],
        "logits": float((after - before).abs().max() / before.abs().max()),
        "logits there": float((on_it - after).abs().max() / after.abs().max()),
        "devices": devices,
        "quality": [m.report.quality and dataclasses.astuple(m.report.quality)[:3] for m in (here, there)],
        "layers": [[dataclasses.astuple(e) for e in m.report.layer_errors] for m in (here, there)],
        "polish": [m.report.polish and dataclasses.astuple(m.report.polish) for m in (here, there)],
        "training": [m.report.training and (m.report.training.before, m.report.training.after) for m in (here, there)],
        "seen": seen,
        "refusal": refusal,
    }
    Path(out).write_text(json.dumps(found))
