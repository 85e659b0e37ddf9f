"""One process of a training: ``worker.py FOLDER OUT DATA SETTINGS [--kill STEP] [--resume] [--shard|--deepspeed]``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from mla_compile import Recipe, finetune


def kill_in_the_middle_of(step: str) -> None:
    """End this process without a word when everything of a checkpoint is written but its name."""
    rename = Path.rename

    def killed(path, target):
        if Path(target).name == f"step-{int(step):08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = killed


def shard() -> None:
    """Have accelerate shard weights (FSDP2), which it does on accelerators only, on a CPU all the same."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from mla_compile.training import trainer

    start = trainer.start_engine

    def sharding(recipe, out):
        engine = start(recipe, out)
        # Every new state takes the type from the partial one.
        PartialState._shared_state["distributed_type"] = engine.state.distributed_type = DistributedType.FSDP
        engine.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        return engine

    trainer.start_engine = sharding


def with_deepspeed() -> None:
    """Have accelerate train with DeepSpeed, which it does on accelerators only, on a CPU all the same."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
    os.environ.pop("ACCELERATE_USE_CPU")
    torch.accelerator.is_available = lambda: True
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


if __name__ == "__main__":
    folder, out, data, settings, *options = sys.argv[1:]
    torch.set_num_threads(1)
    if "--kill" in options:
        kill_in_the_middle_of(options[options.index("--kill") + 1])
    if "--shard" in options:
        shard()
    if "--deepspeed" in options:
        with_deepspeed()
    changes = json.loads(settings)
    teacher = changes.pop("teacher", None)
    finetune(folder, torch.load(data), out, Recipe(**changes), teacher=teacher, resume="--resume" in options)
