r"""Chat with a converted model in ONNX Runtime, without any server: one cache grows over all turns, text is streamed.

Every turn runs only its new tokens; what was said before is in the cache. The bundled model tells stories and knows no
conversation: it goes on where you stop. A model with a chat template in its tokenizer gets its turns in that form.

    python examples/chat_onnxruntime.py
    printf 'Once there was a cat.\nThen it rained.\n' | python examples/chat_onnxruntime.py
    python examples/chat_onnxruntime.py --onnx model_mla.onnx --temperature 0.8
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from mla_compile.errors import MlaCompileError
from mla_compile.runtime import OnnxDecoder

HERE = Path(__file__).parent


class Chat:
    """A conversation with one growing cache."""

    def __init__(self, decoder: OnnxDecoder, tokenizer, temperature: float, seed: int) -> None:
        self.decoder, self.tokenizer, self.temperature = decoder, tokenizer, temperature
        self.random = np.random.default_rng(seed)
        self.past = 0
        self.cache = decoder.empty_cache(1)
        self.begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.pending: list[int] = []

    def turn(self, text: str) -> list[int]:
        """Token ids of what the user says; the begin token is in front of the first turn alone."""
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids if self.past else [*self.begin, *ids]
        said = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        return ids[1:] if self.past and ids[:1] == self.begin else ids

    def reply(self, text: str, most: int) -> Iterator[str]:
        """Answer, piece by piece: whole characters as soon as they are known."""
        ids, shown, whole = [*self.pending, *self.turn(text)], "", ""
        answer: list[int] = []
        while len(answer) < most:
            new = np.array([ids])
            mask = np.ones((1, self.past + len(ids)), dtype=np.int64)
            positions = np.arange(self.past, self.past + len(ids))[None]
            logits, self.cache = self.decoder.step(new, mask, positions, self.cache)
            self.past += len(ids)
            ids = [self.choose(logits[0, -1, : self.decoder.known_tokens])]
            if ids[0] == self.tokenizer.eos_token_id:
                break
            answer += ids
            whole = self.tokenizer.decode(answer)
            if not whole.endswith("\ufffd"):  # half a character waits for the other half
                yield whole[len(shown) :]
                shown = whole
        yield whole[len(shown) :]
        self.pending = ids  # chosen, but not yet run: the next turn begins with it

    def choose(self, logits: np.ndarray) -> int:
        """The most likely token, or one by its probability."""
        if self.temperature == 0:
            return int(logits.argmax())
        noise = self.random.gumbel(size=logits.shape)
        return int((logits / self.temperature + noise).argmax())


def converted(folder: Path) -> Path:
    """The bundled model as an ONNX file; about twenty seconds."""
    from story_grammar import TRAIN_SEEDS, stories

    import mla_compile

    mla = mla_compile.compile(HERE / "tiny-llama", calibration=list(stories(TRAIN_SEEDS[:60])), cache_ratio=0.5)
    mla.to_onnx(folder / "model_mla.onnx")
    return folder / "model_mla.onnx"


def main() -> None:
    """Read a line, stream the answer, until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, help="a file of mla-compile with its tokenizer beside it")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.onnx or converted(Path(folder))
        chat = Chat(OnnxDecoder(path), AutoTokenizer.from_pretrained(path.parent), options.temperature, options.seed)
        asked = sys.stdin.isatty()
        print("Say something; an empty line ends." if asked else "", end="\n> " if asked else "", flush=True)
        for line in sys.stdin:
            if not line.strip():
                break
            try:
                for piece in chat.reply(line.strip(), options.max_new_tokens):
                    print(piece, end="", flush=True)
            except MlaCompileError as error:  # such as a sequence longer than the model's longest
                raise SystemExit(f"\n{error}") from error
            print(f"\n[{chat.past} tokens, {chat.decoder.cache_bytes(1, chat.past):,} bytes of cache]")
            print("> " if asked else "", end="", flush=True)


if __name__ == "__main__":
    main()
