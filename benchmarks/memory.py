"""Memory of the steps that a conversion of a large model may have besides: checks, a folder, and evaluation.

    python benchmarks/memory.py --layers 2 --json memory.json

A checkpoint of the shape of Llama 2 7B with random bfloat16 weights is converted by mha2mla with all checks, and
written as a folder and as an ONNX file; then the original and the folder are evaluated on a text, each in a process of
its own (ONNX Runtime has no kernels for files in bfloat16 on processors). Of every stage the most resident memory is
told, and the most of it that is anonymous.

    python benchmarks/memory.py --prompts 1024 4096

A random model with a vocabulary of 128,256 tokens, in float32, reads prompts in ONNX Runtime with one thread, each in a
process of its own: with logits of the last token alone, and with those of all, as files had to before they had the
input ``logits_to_keep``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import scale

from mla_compile import api
from mla_compile.disk.layer_store import store_beside
from mla_compile.evaluation.measure import Sample, measure
from mla_compile.progress import Stages
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.onnx_timing import peak_bytes

WORDS, TOKENS, WINDOW = 200, 512, 128
LARGE_VOCABULARY = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""With 8 layers the table of tokens is half of the weights."""


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of a few words, so that there is something to evaluate on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="w1", unk_token="w0").save_pretrained(folder)


def convert(source: Path, out: Path) -> dict[str, Any]:
    """Convert, check and write in this process."""
    memory = scale.Memory()
    file = out / "onnx" / "model.onnx"
    with store_beside(file) as store:
        compiled = api.compile(source, method="mha2mla", out=file, store=store, display=memory)
        assert isinstance(compiled, api.CompiledModel)
        with Stages(memory).stage("write the folder"):
            compiled.save(out / "folder")
        compiled.to_onnx(file, display=memory)
    return {"stages": memory.stages}


def evaluate(name: str, text: Path, tokenizer: str) -> dict[str, Any]:
    """Evaluate a model in this process."""
    memory = scale.Memory()
    sample = Sample(text, seq_len=WINDOW, max_tokens=TOKENS, tokenizer=tokenizer)
    found = measure([name], sample, display=memory)
    return {"stages": memory.stages, "loss": found.models[0].found.perplexity.loss}


def prefill(file: str, tokens: int, last: bool) -> dict[str, Any]:
    """Read a prompt and choose one token in this process."""
    decoder = OnnxDecoder(file, threads=1)
    assert decoder.prunes_logits
    decoder.prunes_logits = last
    prompt = np.random.default_rng(0).integers(0, decoder.known_tokens, tokens).tolist()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, without what loading took
    before, begin = peak_bytes(), time.process_time()
    chosen = decoder.generate([prompt], 1)
    return {"seconds": time.process_time() - begin, "before": before, "peak": peak_bytes(), "chosen": chosen}


def prefills(prompts: list[int], layers: int, folder: Path) -> list[dict[str, Any]]:
    """Read prompts of a random model with and without the logits of all tokens, in turns."""
    scale.write_checkpoint(LARGE_VOCABULARY, layers, folder / "source")
    file, rows = folder / "model.onnx", []
    compiled = api.compile(folder / "source", method="mha2mla", dtype="float32", check=False)
    assert isinstance(compiled, api.CompiledModel)
    compiled.to_onnx(file)
    for tokens in prompts:
        for last in (False, True):
            rows.append({"tokens": tokens, "last": last, **in_a_process("prefill", file, tokens, int(last))})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def in_a_process(*words: object) -> dict[str, Any]:
    """Run a function of this file in a process of its own."""
    command = [sys.executable, __file__, "--task", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="2 by default, and 8 with --prompts")
    parser.add_argument("--prompts", type=int, nargs="+", metavar="TOKENS", help="measure prompts instead")
    parser.add_argument("--folder", type=Path, help="where checkpoints and files are written, and removed")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        kind, *words = given.task
        if kind == "prefill":
            run = prefill(words[0], int(words[1]), bool(int(words[2])))
        else:
            run = convert(*map(Path, words)) if kind == "convert" else evaluate(words[0], Path(words[1]), words[2])
        print(json.dumps(run))
        return
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="memory-") as name:
        if given.prompts:
            found: Any = prefills(given.prompts, given.layers or 8, Path(name))
            if given.json:
                scale.write(given.json, json.dumps(found, indent=2))
            return
        layers = given.layers or 2
        source, out, text = Path(name, "source"), Path(name, "out"), Path(name, "text.txt")
        size = scale.write_checkpoint(scale.SHAPES["llama-2-7b"], layers, source)
        write_tokenizer(source)
        text.write_text(" ".join(f"w{(7 * n * n + n) % WORDS}" for n in range(2 * TOKENS)))
        found = {
            "layers": layers,
            "weight_bytes": size,
            "convert": in_a_process("convert", source, out),
        }
        for what, place in (("original", source), ("folder", out / "folder")):
            found[f"eval {what}"] = in_a_process("evaluate", place, text, source)
            print(what, json.dumps(found[f"eval {what}"]), flush=True)
    if given.json:
        scale.write(given.json, json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
