"""Ways to choose latent weights, by the names users know them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mla_compile.config import CompileConfig
from mla_compile.passes.calibrate import PairNorms, pair_norms
from mla_compile.passes.factorise import factorise_layers
from mla_compile.passes.fisher import fisher
from mla_compile.passes.gauge import balanced
from mla_compile.passes.task import BATCH, Choice, Method, Task, unpredicted
from mla_compile.passes.transmla import transmla
from mla_compile.plan import LatentPlan, plan_layers

__all__ = ["METHODS", "mha2mla", "nothing_left_out"]


def mha2mla(task: Task) -> Choice:
    """Partial RoPE by pair norms and weight-only SVD (MHA2MLA, arXiv 2502.14837)."""
    plans = plan_layers(task.sites, task.widths, task.config)
    norms: Sequence[PairNorms | None] = [None] * len(task.sites)
    if task.config.selection == "2-norm" and any(p.rope_dims for p in plans):
        windows, run = task.require_windows(), task.site_run(BATCH, gradients=False)
        with task.stages.stage("calibrate", task.shared_steps(run, BATCH)) as stage:
            norms = pair_norms(
                task.program, task.sites, windows, BATCH, run=run, processes=task.processes, progress=stage.each
            )
    task.processes.leave_unless_first()
    return _factorised(task, plans, task.config, norms)


def nothing_left_out(task: Task) -> Choice:
    """Every rotation and the full rank: what comes out computes what the original does."""
    config = task.config.lossless()
    plans = plan_layers(task.sites, task.widths, config)
    return _factorised(task, plans, config)


def _factorised(
    task: Task, plans: tuple[LatentPlan, ...], config: CompileConfig, norms: Sequence[PairNorms | None] | None = None
) -> Choice:
    """Factorise layer by layer; balanced at once, unless the layers are trained before that."""
    done = not task.config.polish_steps
    weights = factorise_layers(
        task.program,
        task.sites,
        plans,
        config,
        task.stages,
        norms,
        finish=balanced if done else None,
        keep=None if task.store is None else task.store.recall,
        dtype=torch.float32 if task.wide else task.dtype,
        jobs=task.jobs,
        device=task.resources.device,
    )
    return Choice(plans, tuple(weights), unpredicted(weights, own=True), balanced=done)


METHODS: Mapping[str, Method] = {"fisher": fisher, "transmla": transmla, "mha2mla": mha2mla}
"""Methods by their configuration name."""
