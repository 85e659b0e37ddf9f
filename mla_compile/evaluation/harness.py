"""Converted models in EleutherAI's lm-evaluation-harness, as its model ``mla-compile``.

The harness learns of models from modules that were imported, and has no entry points for them. So either import this
one before calling it from Python, or run its command line through this module::

    python -m mla_compile.evaluation.harness --model mla-compile --model_args path=model_mla.onnx --tasks lambada_openai

Besides ``path``, a file or folder made by this compiler, ``model_args`` may give ``tokenizer``, a folder of it, and
``max_length``, tokens given at once. ``--batch_size`` counts sequences, 8 for ``auto``.

Figures are those of the harness's model ``hf`` on the same weights, but for whole texts where a tokenizer puts a begin
token by itself: ``hf`` then scores that token too, unless it is given ``add_bos_token=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mla_compile.artifacts.runnable import open_model
from mla_compile.errors import UsageError
from mla_compile.evaluation.textgen import continuation, cut_at
from mla_compile.runtime.generate import Sampling, generate
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.text.corpus import load_tokenizer
from mla_compile.text.evaluate import longest_window
from mla_compile.text.likelihood import log_likelihoods

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    missing = UsageError("The lm-evaluation-harness is not installed.", "Run: pip install 'mla-compile[lm-eval]'.")
    raise (SystemExit(f"mla-compile: {missing}") if __name__ == "__main__" else missing) from error

__all__ = ["MlaCompileLM"]

_LONGEST = 2048
"""Tokens given at once to a model that can take any number."""
_BATCH = 8


@register_model("mla-compile")
class MlaCompileLM(TemplateLM):
    """A converted model, on the CPU; how texts become tokens is the harness's own way.

    Args:
        path: A ``.onnx`` file or a folder made by this compiler.
        tokenizer: Folder of the tokenizer, if it is not beside the model.
        max_length: Tokens given at once; what the model can run, at most 2048 if it does not say, by default.
        batch_size: Sequences run together; a number or ``auto``.
        max_batch_size: Ignored, as ``auto`` does not search.
        device: Ignored, for the harness gives ``cuda:0`` where nothing was asked for.

    Raises:
        LoadError: The model or its tokenizer cannot be read.
        UsageError: The model was not converted, or an argument cannot be used.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = _BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        model = open_model(path, tokenizer)
        if model.decoder is None:
            raise UsageError(
                f"'{path}' was not converted by this compiler.", "Use the harness's own model 'hf' for originals."
            )
        self._decoder, self._score = model.decoder, model.score
        self.tokenizer: Any = load_tokenizer(tokenizer or model.tokenizer)
        self.max_length = max_length or longest_window(model.score, model.longest, model.longest or _LONGEST)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else _BATCH
        if self.eot_token_id is None and self.tokenizer.bos_token_id is None:
            raise UsageError(
                f"The tokenizer of '{path}' has neither a begin nor an end token to put before a text.",
                "Give another with tokenizer=FOLDER.",
            )

    @property
    def eot_token_id(self) -> Any:  # noqa: ANN401 - the tokenizer's own, or None
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:  # noqa: ANN401 - as above
        """The token that stands for an empty context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps tokenized requests under."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokenize, with the tokenizer's own special tokens unless told otherwise or the text brings its begin."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as one text, by the tokenizer's template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **options: object
    ) -> list[tuple[float, bool]]:
        """Score pairs that the harness has tokenized."""
        found = self._likelihoods([(context, continued) for _, context, continued in requests])
        for (texts, _, _), result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each behind the begin token."""
        texts = [request.args[0] for request in requests]
        nothing: list[int] = []
        pairs = [(nothing, self.tok_encode(text, add_special_tokens=False)) for text in texts]
        found = [value for value, _ in self._likelihoods(pairs)]
        for text, value in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return found

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        return log_likelihoods(
            self._score,
            pairs,
            prefix=self.prefix_token_id,
            longest=self.max_length,
            batch=self.batch_size,
            last=_last_logits(self._decoder) if isinstance(self._decoder, OnnxDecoder) else None,
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until one of the strings of each request."""
        found = []
        for request in requests:
            context, asked = request.args
            found.append(self._generate(context, normalize_gen_kwargs(asked)))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _generate(self, context: str, asked: Mapping[str, Any]) -> str:
        """Continue a text; it is cut off in front of the first string to stop at.

        Half of what the model can run is kept for the context, the end of which counts.
        """
        new = min(asked["max_gen_toks"], self.max_length // 2)
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[new - self.max_length :]
        temperature = float(asked.get("temperature", asked["do_sample"]))
        sampling = Sampling(temperature, int(asked.get("top_k", 0)), float(asked.get("top_p", 1.0)))
        strings = [string for string in asked["until"] if string]

        def ends(_: int, ids: list[int]) -> bool:
            text = continuation(self.tokenizer, prompt, ids)
            return any(string in text for string in strings)

        stop = [] if self.eot_token_id is None else [self.eot_token_id]
        ids = generate(self._decoder, [prompt], new, sampling=sampling, stop=stop, until=ends)[0]
        text = continuation(self.tokenizer, prompt, ids)
        return cut_at(text, strings)


def _last_logits(decoder: OnnxDecoder) -> Callable[[Tensor, int], Tensor]:
    """A file as a function of whole sequences and of how many last tokens it is to compute the logits."""
    return lambda ids, tokens: torch.from_numpy(decoder.logits(ids.numpy(), tokens))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
