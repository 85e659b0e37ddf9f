"""Peak anonymous memory of a conversion by text, of few layers and of many: ``bounded_worker.py FOLDER METHOD``.

The model's weights are files that are mapped, and layers are run one at a time, so that only what the method itself
holds of all layers grows with their number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from memory_worker import VOCABULARY, Deep, mapped_weights, peak
from torch import nn
from torch.export import Dim, export

from mla_compile.config import make_config
from mla_compile.disk.layer_store import LayerStore
from mla_compile.passes import fisher
from mla_compile.passes.layerwise import Resources
from mla_compile.passes.methods import METHODS
from mla_compile.passes.recognise import recognise
from mla_compile.passes.task import Task
from mla_compile.site import AttentionSite
from mla_compile.sources.exported import language_model, read_export

FEW, MANY = 2, 6
WINDOWS, LENGTH = 24, 24


def task_of(folder: Path, layers: int, method: str) -> Task:
    """A model of so many layers, to be converted with everything but one layer on disk."""
    with torch.device("meta"):
        module = Deep(layers).eval()
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    exported = export(module, (torch.zeros(2, 8, dtype=torch.long, device="meta"),), dynamic_shapes=shapes)
    program = language_model(read_export(exported, source="deep"))
    folder.mkdir()
    for name, value in mapped_weights(module, folder).items():
        program.exported.state_dict[name] = nn.Parameter(value, requires_grad=False)
    ids = torch.randint(0, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    # Sizes that are given leave little to try: four shares of components by fisher, one fold by transmla.
    config = make_config(method=method, kv_rank=64, rope_dims=64)
    if method == "mha2mla":
        config = config.model_copy(update={"selection": "uniform"})
    sites: tuple[AttentionSite, ...] = recognise(program).sites
    return Task(program, sites, (), config, ids, store=LayerStore(folder / "store"), resources=Resources(whole=0))


def main(folder: Path, method: str) -> None:
    torch.set_num_threads(1)
    fisher._KEPT = 0
    found = {}
    for name, layers in (("warm", 1), ("few", FEW), ("many", MANY)):
        task = task_of(folder / name, layers, method)
        found[name], choice = peak(lambda task=task: METHODS[method](task))
        assert len(choice.weights) == layers
    width = task.widths[0]
    found["layer"] = 3 * width * width * torch.float64.itemsize / 2**20  # queries, keys and values
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
