"""Train the bundled example: a tiny grouped-query Llama that tells children's stories.

The script trains a byte-level BPE tokenizer and a transformers LlamaForCausalLM (or a Qwen3ForCausalLM, which
has norms of queries and keys) on a mix of your text files and the stories of `story_grammar.py`, on a CPU, in
the time you give it:

    python examples/train_tiny.py --text stories.txt plays.txt --shares 0.45 0.08 --out examples/tiny-llama

Documents in a text file are separated by `<|endoftext|>`. The grammar gets what the shares leave. The
weights are rounded to float16 before the last evaluation, so the stored model is the measured one.
"""

import argparse
import json
import math
import random
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from story_grammar import HELD_OUT_SEEDS, SEPARATOR, TRAIN_SEEDS, stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

CONTEXT: Final = 512
LONG_DOCUMENT: Final = 4000
EXCERPT: Final = 1500
TOKENIZER_CHARACTERS: Final = 4_000_000
WARM_UP: Final = 0.03


@dataclass(frozen=True)
class Source:
    """One part of the mix: a name, its share of the training tokens and its documents."""

    name: str
    share: float
    documents: list[str]


class Mixture:
    """An endless stream of training tokens that keeps every source at its share.

    Each document is preceded by the beginning-of-text token. The documents of a source come in a new
    random order on every pass over them.
    """

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, rng: random.Random) -> None:
        """Encode the documents of every source."""
        self.encoded = [encode(source.documents, tokenizer) for source in sources]
        self.shares = [source.share for source in sources]
        self.served = [0 for _ in sources]
        self.queues: list[list[list[int]]] = [[] for _ in sources]
        self.buffer: list[int] = []
        self.rng = rng

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """The next rows x length tokens."""
        while len(self.buffer) < rows * length:
            self.buffer += self._next_document()
        taken, self.buffer = self.buffer[: rows * length], self.buffer[rows * length :]
        return torch.tensor(taken).view(rows, length)

    def _next_document(self) -> list[int]:
        behind = min(range(len(self.shares)), key=lambda i: self.served[i] / self.shares[i])
        if not self.queues[behind]:
            self.queues[behind] = self.rng.sample(self.encoded[behind], len(self.encoded[behind]))
        document = self.queues[behind].pop()
        self.served[behind] += len(document)
        return document


def encode(documents: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each document; the tokenizer adds the beginning-of-text token."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(documents))]


def read_documents(path: Path) -> list[str]:
    """The documents of a text file. A very long one is cut into excerpts at its blank lines."""
    documents: list[str] = []
    for document in map(str.strip, path.read_text(encoding="utf-8").split(SEPARATOR)):
        if len(document) <= LONG_DOCUMENT:
            documents += [document] if document else []
            continue
        excerpt = ""
        for paragraph in re.split(r"\n\s*\n", document):
            if excerpt and len(excerpt) + len(paragraph) > EXCERPT:
                documents.append(excerpt)
                excerpt = ""
            excerpt = f"{excerpt}\n\n{paragraph}" if excerpt else paragraph
        documents.append(excerpt)
    return documents


def train_tokenizer(sources: Sequence[Source], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on the sources in their shares."""
    sample: list[str] = []
    for source in sources:
        room = int(TOKENIZER_CHARACTERS * source.share)
        for document in source.documents:
            if room <= 0:
                break
            sample.append(document)
            room -= len(document)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", pair=f"{SEPARATOR} $A {SEPARATOR} $B", special_tokens=[(SEPARATOR, 0)]
    )
    return tokenizer


ARCHITECTURES: Final = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def build_model(vocab_size: int, architecture: str) -> PreTrainedModel:
    """About 1.8 million parameters: 4 layers, 6 query heads that share 2 key-value heads."""
    describe, build = ARCHITECTURES[architecture]
    config = describe(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    return build(config)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, documents: Sequence[str], tokenizer: Tokenizer) -> float:
    """Mean loss per token, each document read alone (one longer than the context in windows of it)."""
    model.eval()
    total, count = 0.0, 0
    windows = [ids[at : at + CONTEXT + 1] for ids in encode(documents, tokenizer) for at in range(0, len(ids), CONTEXT)]
    windows = sorted((window for window in windows if len(window) > 1), key=len)
    for start in range(0, len(windows), 16):
        group = windows[start : start + 16]
        width = len(group[-1])
        ids = torch.tensor([window + [0] * (width - len(window)) for window in group])
        labels = torch.tensor([window[1:] + [-100] * (width - len(window)) for window in group])
        logits = model(input_ids=ids[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total += loss.item()
        count += int((labels >= 0).sum())
    model.train()
    return total / count


def learning_rate(done: float, peak: float) -> float:
    """Linear warm-up, then a cosine to zero, by the fraction of the run that is done."""
    if done < WARM_UP:
        return peak * (done + 0.001) / (WARM_UP + 0.001)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))


def make_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(model: PreTrainedModel, mixture: Mixture, held_out: Sequence[str], tokenizer: Tokenizer, args: Any) -> int:
    """Train until the time or the steps are used up, with a progress line now and then; the steps done."""
    optimizer = make_optimizer(model)
    started = shown = time.monotonic()
    seen = step = seen_at_shown = 0
    mean_loss = float("nan")
    checked = -1
    while True:
        elapsed = time.monotonic() - started
        done = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if done >= 1:
            return step
        long = step % 4 == 3
        length = CONTEXT if long else CONTEXT // 2
        ids = mixture.batch(args.batch_tokens // length, length)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        seen += ids.numel()
        mean_loss = loss.item() if step == 1 else 0.98 * mean_loss + 0.02 * loss.item()
        now = time.monotonic()
        if now - shown < 15:
            continue
        line = f"step {step}  loss {mean_loss:.3f}  {(seen - seen_at_shown) / (now - shown):.0f} tokens/s"
        if int(10 * done) != checked:
            checked = int(10 * done)
            line += f"  held-out loss {held_out_loss(model, held_out, tokenizer):.3f}"
        print(f"{line}  {(now - started) * (1 - done) / max(done, 1e-9) / 60:.1f} min left", flush=True)
        shown, seen_at_shown = time.monotonic(), seen


@torch.no_grad()
def round_to_half(model: PreTrainedModel) -> None:
    """Round every weight to float16 in place; the model itself stays float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())


def save(model: PreTrainedModel, tokenizer: Tokenizer, info: dict[str, Any], out: Path) -> None:
    """Write the folder that `from_pretrained` reads; a half-written file is never seen in it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        model.config.use_cache = True
        model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
        model.half().save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SEPARATOR,
            "eos_token": SEPARATOR,
            "pad_token": SEPARATOR,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        write_json(folder / "tokenizer_config.json", tokenizer_config)
        write_json(folder / "train_info.json", info)
        for file in folder.iterdir():
            file.chmod(0o644)
            file.replace(out / file.name)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write indented JSON with a last newline."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a tiny grouped-query Llama on a CPU.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files to learn from")
    parser.add_argument("--shares", type=float, nargs="+", help="share of the tokens of each text file")
    parser.add_argument("--valid", type=Path, nargs="*", default=[], help="text files to measure at the end")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time of the training")
    parser.add_argument("--steps", type=int, help="number of steps, instead of a time")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--architecture", choices=[*ARCHITECTURES], default="llama", help="qwen3 has QK-norm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads for torch")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products, faster where the CPU has them")
    args = parser.parse_args(argv)
    args.shares = args.shares or [0.5 / len(args.text)] * len(args.text)
    if len(args.shares) != len(args.text) or min(args.shares) <= 0 or sum(args.shares) >= 1:
        parser.error("--shares needs one positive number a text file, with a sum below 1")
    if args.batch_tokens <= 0 or args.batch_tokens % CONTEXT:
        parser.error(f"--batch-tokens must be a multiple of {CONTEXT}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and save."""
    args = parse_arguments(argv)
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    grammar = Source("grammar", 1 - sum(args.shares), list(stories(TRAIN_SEEDS)))
    texts = [Source(path.stem, share, read_documents(path)) for path, share in zip(args.text, args.shares, strict=True)]
    sources = [*texts, grammar]
    held_out = list(stories(HELD_OUT_SEEDS))
    tokenizer = train_tokenizer(sources, args.vocab_size)
    mixture = Mixture(sources, tokenizer, random.Random(args.seed))
    model = build_model(tokenizer.get_vocab_size(), args.architecture)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters} parameters, {tokenizer.get_vocab_size()} tokens, {torch.get_num_threads()} threads", flush=True
    )

    started = time.monotonic()
    steps = train(model, mixture, held_out, tokenizer, args)
    minutes = (time.monotonic() - started) / 60
    round_to_half(model)
    measured = {"grammar (held-out seeds)": held_out} | {path.stem: read_documents(path) for path in args.valid}
    perplexity = {name: round(math.exp(held_out_loss(model, text, tokenizer)), 3) for name, text in measured.items()}
    served = sum(mixture.served)
    info = {
        "architecture": args.architecture,
        "parameters": parameters,
        "steps": steps,
        "tokens_seen": steps * args.batch_tokens,
        "minutes": round(minutes, 1),
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "mix": {source.name: round(count / served, 4) for source, count in zip(sources, mixture.served, strict=True)},
        "perplexity": perplexity,
    }
    save(model, tokenizer, info, args.out)
    print(json.dumps(info, indent=2))


if __name__ == "__main__":
    main()
