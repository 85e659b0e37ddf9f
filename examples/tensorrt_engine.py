"""The bundled model for TensorRT: what can be made without a GPU is made, and the rest is named.

python examples/tensorrt_engine.py
python examples/tensorrt_engine.py --model FOLDER --text FILE.txt --out folder
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import torch
from story_grammar import TRAIN_SEEDS, stories

import mla_compile
from mla_compile.errors import MlaCompileError
from mla_compile.runtime.tensorrt.engine_builder import EngineSettings

HERE = Path(__file__).parent


def main() -> None:
    """Convert; write the file that engines are built of; build what this machine can."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HERE / "tiny-llama", help="a folder or a hub id")
    parser.add_argument("--text", help="a .txt or .jsonl file to calibrate on; seeded stories by default")
    parser.add_argument("--out", type=Path, help="folder to write to; a temporary one by default")
    parser.add_argument("--room", type=int, default=512, help="tokens that a cache has room for")
    options = parser.parse_args()
    text = options.text or list(stories(TRAIN_SEEDS[:60]))
    mla = mla_compile.compile(str(options.model), calibration=text, cache_ratio=0.3125)
    settings = EngineSettings(batch=4, room=options.room, prompt=64)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)

        # 1. The file, on any machine: caches of fixed memory, checked in ONNX Runtime. TensorRT's parser takes it.
        path = folder / "model.onnx"
        mla.to_tensorrt(path, settings)
        graph = onnx.load(path, load_external_data=False).graph
        ours = Counter(node.op_type for node in graph.node if node.domain == "mla_compile")
        caches = [value.name for value in graph.input if value.name.startswith("past_key_values")]
        print(f"{path.name}: {path.stat().st_size:,} bytes, {len(caches)} caches of {options.room} rows")
        print("nodes that plugins can take:", ", ".join(f"{count} {name}" for name, count in ours.items()))

        # 2. A library of plugins in C++, with TensorRT's headers, Triton and g++, still without a GPU.
        missing = [name for name in ("g++",) if shutil.which(name) is None]
        missing += [name for name in ("triton",) if importlib.util.find_spec(name) is None]
        print("plugins: " + (f"not here, without {' and '.join(missing)}" if missing else "can be compiled here with"))
        print("  mla-compile tensorrt FOLDER --out model.onnx --plugin cpp")
        print("  mla-compile build-plugin model.onnx --tensorrt-include DIR --architecture 90 --out libmla_plugin.so")

        # 3. An engine, where there is a GPU and TensorRT.
        if not torch.cuda.is_available() or importlib.util.find_spec("tensorrt") is None:
            print("engine: not built, which takes TensorRT and a GPU; there it is")
            print("  mla-compile tensorrt model.onnx --out model.plan")
            return
        try:
            mla.to_tensorrt(folder / "model.plan", settings)
        except MlaCompileError as error:
            print(f"engine: {error}")
        else:
            print(f"engine: built, {(folder / 'model.plan').stat().st_size:,} bytes, and compared with the file")


if __name__ == "__main__":
    main()
