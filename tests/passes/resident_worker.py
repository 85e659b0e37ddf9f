"""Peak resident pages of files in a conversion, of few layers and of many: ``resident_worker.py FOLDER``.

The model's weights are files that are mapped, and so are finished layers and the file that is written and run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from bounded_worker import FEW, MANY, task_of
from memory_worker import VOCABULARY, peak

from mla_compile.passes import lower_onnx, onnx_export
from mla_compile.passes.methods import METHODS
from mla_compile.passes.onnx_pieces import PiecewiseSession
from mla_compile.passes.task import Task
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.sources.checkpoint_files import require_finite

PIECE = 2**22


def convert(task: Task, path: Path) -> None:
    """Everything between loading a model and trying the file that is made of it."""
    require_finite(dict(task.program.exported.state_dict), "deep")
    model = task.result(METHODS["mha2mla"](task).weights)
    lower_onnx.lower_to_onnx(model.graph, model.rows, path, opset=23, inline=False, metadata={})
    decoder = OnnxDecoder(path, session=PiecewiseSession(path, piece_bytes=PIECE))
    ids = np.arange(4)[None] % VOCABULARY
    decoder.step(ids, np.ones_like(ids), ids, decoder.empty_cache(1))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    onnx_export.EXTERNAL_DATA_BYTES = 0
    found = {}
    for name, layers in (("warm", 1), ("few", FEW), ("many", MANY)):
        task = task_of(folder / name, layers, "mha2mla")
        found[name], _ = peak(lambda task=task, name=name: convert(task, folder / name / "model.onnx"), "RssFile")
        values = task.program.exported.state_dict.values()
        found[f"{name} weights"] = sum(value.nbytes for value in values) / 2**20
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
