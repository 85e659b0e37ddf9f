"""One process of a calibration: ``calibration_worker.py ARCHIVE TEXT OUT CACHE``; the first writes what it found."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.export import load

from mla_compile.config import make_config
from mla_compile.disk.statistics_cache import StatisticsCache
from mla_compile.errors import ShareDone
from mla_compile.passes.layers import measure_layers
from mla_compile.passes.methods import mha2mla
from mla_compile.passes.recognise import recognise
from mla_compile.passes.task import Task
from mla_compile.progress import Stages
from mla_compile.sources.exported import language_model, read_export
from mla_compile.text.processes import end_share, join_processes

if __name__ == "__main__":
    archive, text, out, cache = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    processes = join_processes()
    program = language_model(read_export(load(archive), source="archive"))
    windows, sites = torch.load(text), recognise(program).sites
    done = []
    for settings in ({}, {}, {"gradients": False}, {"method": "mha2mla", "selection": "2-norm"}):
        # Only the first has the cache, as on another machine.
        kept = StatisticsCache(cache) if processes.first else StatisticsCache(cache / "nothing")
        task = Task(program, sites, (), make_config(**settings), windows, Stages(), kept, processes=processes)
        try:
            if settings.get("method"):
                done.append([w.row for w in mha2mla(task).weights])
            else:
                done.append([vars(layer.statistics()) for layer in measure_layers(task).layers])
        except ShareDone:
            assert not processes.first
            done.append(None)
        else:
            assert processes.first
    torch.save(done, out / f"{processes.index}.pt")
    if not processes.first:
        end_share()
