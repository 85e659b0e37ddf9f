r"""Check the fused kernel on the machine where it is to run, with nothing installed but ONNX Runtime and NumPy.

Copy this script, a converted file, and what `mla-compile fuse` made of it: both files read the same tokens, a prompt
and then a few at a time, and their logits are compared. Without arguments the bundled model is converted for it, which
needs mla-compile and a C++ compiler. A library for another processor is made by its compiler:

    CXX=aarch64-linux-gnu-g++ mla-compile fuse model_mla.onnx --out fused.onnx --march armv8-a
    python check_fused.py model_mla.onnx fused.onnx fused.so      # over there
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

PROMPT, STEPS = 24, (1, 3, *[1] * 12)
ROOM = PROMPT + sum(STEPS)
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
CLOSE = {"tensor(float)": 1e-4, "tensor(float16)": 2e-2, "tensor(uint8)": 5e-2}
"""What rounding may change, over the largest logit: with int8 codes the kernel has one digit less than operators do."""


def open_session(path: str, library: str | None) -> onnxruntime.InferenceSession:
    """One thread, and the library's operators if there is one."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if library:
        options.register_custom_ops_library(str(Path(library).absolute()))
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def empty_cache(value: onnxruntime.NodeArg) -> np.ndarray:
    """Room for all tokens where it is static, else nothing yet; ring buffers and rows are as long as they say."""
    lengths = {"batch_size": 1, "past_sequence_length": 0, "cache_length": ROOM}
    sizes = []
    for size in value.shape:
        name, _, window = str(size).partition("_of_window_")
        static = name == "cache_length"
        sizes.append(size if isinstance(size, int) else int(window) - 1 if window and static else lengths[name])
    return np.zeros(sizes, TYPES[value.type])


def read(session: onnxruntime.InferenceSession) -> tuple[np.ndarray, float]:
    """Logits of all tokens, and seconds per step after the prompt."""
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    caches = {value.name: empty_cache(value) for value in pasts}
    results = [value.name for value in session.get_outputs()]
    taken, vocabulary = {value.name for value in session.get_inputs()}, session.get_outputs()[0].shape[-1]
    parts, done, seconds = [], 0, 0.0
    for count in (PROMPT, *STEPS):
        places = np.arange(done, done + count)[None]
        given = {"input_ids": places * 37 % vocabulary, "position_ids": places}
        given["attention_mask"] = np.ones((1, done + count), np.int64)
        begin = time.perf_counter()
        logits, *presents = session.run(None, {n: v for n, v in {**given, **caches}.items() if n in taken})
        seconds += (time.perf_counter() - begin) * (done > 0)
        names = (name.replace("present", "past_key_values") for name in results[1:])
        caches = dict(zip(names, presents, strict=True))
        parts.append(logits)
        done += count
    return np.concatenate(parts, 1), seconds / len(STEPS)


def convert_bundled(folder: Path) -> list[str]:
    """The bundled model, converted, and with the fused kernel."""
    from mla_compile.cli import main

    model, fused = folder / "model.onnx", folder / "fused.onnx"
    bundled = str(Path(__file__).parent / "tiny-llama")
    for words in (
        ["convert", bundled, "--out", str(model), "--method", "mha2mla", "--quiet"],
        ["fuse", str(model), "--out", str(fused), "--quiet"],
    ):
        if code := main(words):
            sys.exit(code)
    return [str(model), str(fused), str(fused.with_suffix(".so"))]


def main() -> None:
    """Compare, and say what was found; the exit status is 1 if the files differ."""
    parser = argparse.ArgumentParser(description="Compare a fused file with the one it was made of.")
    parser.add_argument("files", nargs="*", help="the converted file, the fused one, and its library")
    given = parser.parse_args().files
    if len(given) not in (0, 3):
        parser.error("give three files: the converted one, the fused one, and its library")
    with tempfile.TemporaryDirectory() as folder:
        plain, fused, library = given or convert_bundled(Path(folder))
        session = open_session(plain, None)
        kind = next(v.type for v in session.get_inputs() if v.name.startswith("past_key_values"))
        (expected, standard), (got, own) = read(session), read(open_session(fused, library))
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    print(f"{platform.machine()}, ONNX Runtime {onnxruntime.__version__}, caches of {kind}")
    print(f"largest difference of a logit, over the largest: {error:.1e} (at most {CLOSE[kind]:g} is rounding)")
    print(f"a step: {1e3 * standard:.2f} ms with standard operators, {1e3 * own:.2f} ms with the fused kernel")
    if not error <= CLOSE[kind]:
        sys.exit("the files do not compute the same")


if __name__ == "__main__":
    main()
