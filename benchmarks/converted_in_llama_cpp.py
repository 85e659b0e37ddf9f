"""Converted models in llama.cpp: are they what they are in PyTorch, what do they cache, and what does quantising do?

Needs the extra `gguf` and llama-cpp-python, which is built from source:

    pip install '.[cpu,gguf]' llama-cpp-python
    python benchmarks/converted_in_llama_cpp.py MODEL [MODEL ...] --text TEXT --out benchmarks/converted_in_llama_cpp.md

Every model is converted with --format deepseek; the folder is exported to GGUF, and llama.cpp is compared with what the
converted module answered, and with transformers on the folder: logits, greedy tokens, tokens of a text. Nothing here is
a time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from mla_compile.artifacts.checkpoint_folder import read_expected
from mla_compile.artifacts.gguf_check import verify_gguf
from mla_compile.cli import main as mla_compile

CHARACTERS = 30_000
"""Of the text: the first to calibrate on, the next to compare tokens on."""
PROMPT, NEW = "Once upon a time", 64


def command(*words: object) -> Any:  # noqa: ANN401 - JSON
    """Run mla-compile, which must succeed, and read what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = mla_compile([str(word) for word in words])
    if code:
        raise SystemExit(err.getvalue())
    return json.loads(out.getvalue())


def opened(file: Path, context: int = 256) -> llama_cpp.Llama:
    """A file in llama.cpp with a float32 cache."""
    kind = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(str(file), n_ctx=context, type_k=kind, type_v=kind, logits_all=True, verbose=False)


def cache_bytes(file: Path) -> float:
    """Bytes per token of llama.cpp's cache, by what the state of a context grows by."""
    model = opened(file)
    sizes = []
    for token in range(1, 34):
        model.eval([token])
        sizes.append(llama_cpp.llama_state_seq_get_size(model.ctx, 0))
    model.close()
    return (sizes[-1] - sizes[0]) / (len(sizes) - 1)


def divergence(file: Path, folder: Path) -> float:
    """What predictions of a file lose against the converted module's, in nats per token, on its check text."""
    expected = read_expected(folder)
    assert expected is not None
    model = opened(file, len(expected.ids))
    model.eval(expected.ids.tolist())
    got = torch.from_numpy(model.scores[: len(expected.ids)].copy()).double().log_softmax(-1)[-len(expected.logits) :]
    model.close()
    right = expected.logits.double().log_softmax(-1)
    return float((right.exp() * (right - got)).sum(-1).mean())


def quantised(file: Path, to: Path, kind: int) -> Path:
    """The file by llama.cpp's own quantisation."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = kind
    if llama_cpp.llama_model_quantize(str(file).encode(), str(to).encode(), settings):
        raise SystemExit("llama.cpp did not quantise the file.")
    return to


def measure(model: Path, text: str, place: Path) -> dict[str, object]:
    """One row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    calibration, folder, file = place / "text.txt", place / "folder", place / "model.gguf"
    calibration.write_text(text[:CHARACTERS], encoding="utf-8")
    words = (model, "--out", folder, "--calibration", calibration, "--format", "deepseek", "--cache-ratio", 0.5)
    report = command(*words, "--json", "--quiet")
    command("export", folder, "--out", file, "--json")
    error, greedy = verify_gguf(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = opened(file)
    lines = text[CHARACTERS : 2 * CHARACTERS].split("\n")
    alike = [theirs.tokenize(line.encode(), special=True) == tokenizer(line).input_ids for line in lines]
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    written = stock.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    ours = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    got = theirs(PROMPT, max_tokens=NEW, temperature=0.0, repeat_penalty=1.0)["choices"][0]["text"]
    theirs.close()
    row: dict[str, object] = {
        "model": model.name,
        "cache bytes per token, original": report["cache"]["bytes_per_token_before"],
        "transformers, measured": f"{report['checkpoint']['cache_bytes_measured']:g}",
        "llama.cpp, measured": f"{cache_bytes(file):g}",
        "logits against PyTorch": f"{error:.1e}",
        "greedy tokens equal": f"{greedy:.0%}",
        f"text of {NEW} tokens equal": got.strip() == ours.strip(),
        "lines cut alike": f"{np.mean(alike):.1%} of {len(alike)}",
    }
    for name, kind in (("bfloat16", llama_cpp.LLAMA_FTYPE_MOSTLY_BF16), ("Q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)):
        lost = divergence(quantised(file, place / f"{name}.gguf", kind), folder)
        row[f"{name} by llama.cpp, nats lost"] = f"{lost:.2g}"
    return row


def main() -> None:
    """Measure, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")
    rows = []
    for model in given.models:
        with tempfile.TemporaryDirectory() as place:
            rows.append(measure(model, text, Path(place)))
    names = list(rows[0])
    table = ["| |" + "".join(f" {row['model']} |" for row in rows), "|---|" + "---|" * len(rows)]
    table += [f"| {name} |" + "".join(f" {row[name]} |" for row in rows) for name in names[1:]]
    title = f"# Converted models in llama.cpp (llama-cpp-python {llama_cpp.__version__})"
    written = "\n".join(
        [title, "", "Float32, half of the cache, by `python benchmarks/converted_in_llama_cpp.py`.", "", *table, ""]
    )
    print(written)
    if given.out is not None:
        given.out.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
