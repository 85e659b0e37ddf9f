"""A Hugging Face model in Python: convert it, generate with it token by token, save it and read it back.

python examples/hugging_face_model.py
python examples/hugging_face_model.py --model FOLDER --text FILE.txt --prompt "Once upon a time" --cache-ratio 0.5
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from story_grammar import HELD_OUT_SEEDS, TRAIN_SEEDS, stories
from transformers import AutoTokenizer

import mla_compile
from mla_compile.artifacts.runnable import module_scorer
from mla_compile.text.corpus import token_windows, tokenize
from mla_compile.text.evaluate import perplexity

HERE = Path(__file__).parent


def generate(model: torch.nn.Module, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy decoding, as one writes it for any model with a cache: the prompt once, then one token at a time."""
    step = model(ids)  # logits [batch, new, vocabulary], and the cache: one tensor [batch, tokens, row] per layer
    for _ in range(new_tokens):
        chosen = step.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, chosen], dim=1)
        step = model(chosen, past=step.cache)
    print(f"the cache of {step.cache[0].shape[1]} tokens: {sum(c.nbytes for c in step.cache):,} bytes")
    return ids


def main() -> None:
    """Convert, generate, save, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HERE / "tiny-llama", help="a folder or a hub id")
    parser.add_argument("--text", help="a .txt or .jsonl file to calibrate on; seeded stories by default")
    parser.add_argument("--prompt", default="In a little house by the hill lived a")
    parser.add_argument("--cache-ratio", type=float, default=0.3125)
    parser.add_argument("--out", type=Path, help="folder to save to; a temporary one by default")
    options = parser.parse_args()

    # 1. Convert. The text tells what is worth keeping; a part of it is held back to measure on.
    text = options.text or list(stories(TRAIN_SEEDS[:100]))
    mla = mla_compile.compile(str(options.model), calibration=text, cache_ratio=options.cache_ratio)
    report = mla.report
    print(f"cache: {report.cache_bytes_before} -> {report.cache_bytes_after} bytes per token")
    print(f"perplexity on text held back: {report.quality.original:.4f} -> {report.quality.converted:.4f}")

    # 2. Generate. The module is a torch module whose cache goes in and comes out.
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([begin + tokenizer(options.prompt, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        written = generate(mla.module, ids, 40)
    print(tokenizer.decode(written[0], skip_special_tokens=True))

    # 3. Save, and read back: the same answers, without the original or its code.
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch) / "converted"
        mla.save(folder)
        again = mla_compile.load(folder)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, mla.module(ids).logits)
        print(f"read back from {folder.name}: the same logits")

        # 4. Measure on stories that neither the model nor the conversion has seen.
        if options.text is None:
            windows = token_windows(tokenize(list(stories(HELD_OUT_SEEDS[:20])), tokenizer), 256, 2048)
            print(f"perplexity on unseen stories: {perplexity(module_scorer(again), windows).value:.4f}")


if __name__ == "__main__":
    main()
