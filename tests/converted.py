"""Pico models converted for stock DeepSeek code, and how they are written."""

from __future__ import annotations

import dataclasses

import models

from mla_compile.checkpoint_folder import write_checkpoint
from mla_compile.config import make_config
from mla_compile.frontend import capture
from mla_compile.passes.methods import METHODS
from mla_compile.passes.recognise import recognise
from mla_compile.passes.task import Task
from mla_compile.progress import Stages
from mla_compile.report import Report

OWN = {
    # heads that are wider than the model, and an epsilon that is not the stock code's
    "wide": lambda: models.llama(num_key_value_heads=4, head_dim=24, rms_norm_eps=1e-5),
    "llama-linear": lambda: models.llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
}


class Conversions:
    """Converted modules by the name of the original, made at first use."""

    def __init__(self, programs):
        self._programs, self._found = programs, {}

    def __call__(self, name, **settings):
        if name not in self._found:
            self._found[name] = self._convert(name, settings)
        return self._found[name]

    def _convert(self, name, settings):
        if name in OWN:
            program = capture(OWN[name](), None)
            sites = recognise(program).sites
        else:
            program, sites = self._programs[name].program, self._programs[name].sites
        config = make_config(
            method="transmla", layout="deepseek", format="deepseek", kv_rank=20, gradients=False, **settings
        )
        task = Task(program, sites, (), config, models.tokens(4, 24))
        choice = METHODS[config.method](task)
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
        return task.rewrite(choice.weights), report, program.assets


def write(conversion, folder, *, shard=10**9, force=False, checks=None, **changes):
    module, report, assets = conversion
    report = dataclasses.replace(report, config={**report.config, **changes})
    return write_checkpoint(module, report, assets, folder, checks, shard=shard, force=force, stages=Stages())
