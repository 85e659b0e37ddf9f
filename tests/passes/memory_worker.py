"""Peak anonymous memory of statistics with gradients, layer by layer and whole: ``memory_worker.py FOLDER``.

The weights are files that are mapped, so that they count only where something copies them.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode

from mla_compile.passes.activations import SiteRun
from mla_compile.passes.layerwise import Resources
from mla_compile.passes.recognise import recognise
from mla_compile.passes.statistics import collect_statistics
from mla_compile.sources.exported import language_model, read_export

LAYERS, WIDTH, HEADS, VOCABULARY = 24, 512, 8, 101
BATCH, LENGTH = 4, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        y = self.norms[0](x)
        heads = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Deep(nn.Module):
    def __init__(self, layers=LAYERS):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mapped_weights(module, folder):
    """A file of random weights per tensor, mapped."""
    generator, found = torch.Generator().manual_seed(0), {}
    for number, (name, like) in enumerate(module.state_dict().items()):
        value = torch.ones(like.shape) if like.dim() == 1 else torch.randn(like.shape, generator=generator) / 40
        save_file({"value": value}, folder / f"{number}.safetensors")
        with safe_open(folder / f"{number}.safetensors", "pt") as file:
            found[name] = file.get_tensor("value")
    return found


def memory(kind):
    """Memory of this process of some kind, in MiB."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


class Watch(TorchDispatchMode):
    """The highest that memory of some kind gets.

    It is looked at behind every operator of torch, when its inputs and its result are there, so that nothing is missed
    on a busy machine; and every 2 ms, for what lives within one operator or is no tensor of torch. The kernel's own
    high-water mark is of no use, because it counts pages of files.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind, self.highest, self._done = kind, 0.0, threading.Event()
        self._watcher = threading.Thread(target=self._look_on)

    def __enter__(self):
        self._watcher.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._done.set()
        self._watcher.join()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.look()
        return result

    def _look_on(self):
        while not self._done.is_set():
            self.look()
            time.sleep(0.002)

    def look(self):
        self.highest = max(self.highest, memory(self.kind))


def peak(work, kind="RssAnon"):
    """How far anonymous memory, or that of another kind, grows."""
    gc.collect()
    begin = memory(kind)
    with Watch(kind) as watch:
        found = work()
    return watch.highest - begin, found


def main(folder):
    torch.set_num_threads(1)
    with torch.device("meta"):
        module = Deep().eval()
    ids = torch.randint(0, VOCABULARY, (2 * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    exported = export(module, (torch.zeros(2, 8, dtype=torch.long, device="meta"),), dynamic_shapes=shapes)
    program = language_model(read_export(exported, source="deep"))
    for name, value in mapped_weights(module, folder).items():
        program.exported.state_dict[name] = nn.Parameter(value, requires_grad=False)
    sites = recognise(program).sites
    assert len(sites) == LAYERS

    def measure(resources):
        run = SiteRun(program, sites, (BATCH, LENGTH), gradients=True, resources=resources)
        return collect_statistics(program, sites, ids, batch=BATCH, run=run)

    layers, first = peak(lambda: measure(Resources(whole=0, folder=folder / "kept")))
    whole, second = peak(lambda: measure(Resources(whole=2**40)))
    for got, expected in zip(first, second, strict=True):
        torch.testing.assert_close(got.query, expected.query, rtol=1e-4, atol=1e-6 * float(expected.query.max()))
    weights = sum(v.nbytes for v in program.exported.state_dict.values()) / 2**20
    sys.stdout.write(json.dumps({"layers": layers, "whole": whole, "weights": weights}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
