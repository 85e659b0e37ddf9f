"""Pico models converted for stock DeepSeek code, and how they are written."""

from __future__ import annotations

import dataclasses

import models
import torch

from mla_compile.artifacts.checkpoint_folder import write_checkpoint
from mla_compile.config import make_config
from mla_compile.passes.methods import METHODS
from mla_compile.passes.query_rank import with_query_rank
from mla_compile.passes.recognise import recognise
from mla_compile.passes.task import Task
from mla_compile.progress import Stages
from mla_compile.report import Report
from mla_compile.sources.capture import capture

OWN = {
    # heads that are wider than the model, and an epsilon that is not the stock code's
    "wide": lambda: models.llama(num_key_value_heads=4, head_dim=24, rms_norm_eps=1e-5),
    "mistral": lambda: models.mistral(window=None),
    "llama-linear": lambda: models.llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
}


def _narrow(module, dtype):
    """A model as it is read in such a type: frequencies stay float32."""
    kept = {name: value.clone() for name, value in module.named_buffers()}
    module.to(dtype)
    for name, value in kept.items():
        module.get_buffer(name).data = value
    return module


class Conversions:
    """Converted modules by the name of the original, made at first use."""

    def __init__(self, programs):
        self._programs, self._found = programs, {}

    def __call__(self, name, dtype=torch.float32, **settings):
        key = (name, dtype, *settings.items())
        if key not in self._found:
            self._found[key] = self._convert(name, dtype, settings)
        return self._found[key]

    def _convert(self, name, dtype, settings):
        if name in OWN:
            program = capture(OWN[name](), None)
            sites = recognise(program).sites
        elif dtype != torch.float32:
            program = capture(_narrow(models.CONVERTIBLE[name](), dtype), None)
            sites = recognise(program).sites
        else:
            program, sites = self._programs[name].program, self._programs[name].sites
        config = make_config(
            method="transmla", layout="deepseek", format="deepseek", kv_rank=20, gradients=False, **settings
        )
        task = Task(program, sites, (), config, models.tokens(4, 24))
        choice = METHODS[config.method](task)
        weights = choice.weights
        if config.q_rank is not None:
            weights = with_query_rank(weights, choice.moments, config.q_rank)
        report = Report(
            source=program.source,
            config=config.model_dump(),
            sites=sites,
            plans=choice.plans,
            bytes_per_element=4,
            selection=config.method,
            forecasts=choice.forecasts,
            deepseek=choice.deepseek,
        )
        return task.result(weights), report, program.assets


def write(conversion, folder, *, shard=10**9, force=False, checks=None, **changes):
    module, report, assets = conversion
    report = dataclasses.replace(report, config={**report.config, **changes})
    return write_checkpoint(module, report, assets, folder, checks, shard=shard, force=force, stages=Stages())
