"""The rewritten and the converted module against the original."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_compile.report import Verification
from mla_compile.runtime.module import LatentModel, cache_dtype
from mla_compile.runtime.torch_decoder import TorchDecoder
from mla_compile.text.evaluate import Scorer, relative_error
from mla_compile.verification.agreement import (
    cache_bytes,
    equal_share,
    greedy,
    greedy_original,
    greedy_tokens,
    in_chunks,
    in_float32,
    require_bytes,
    require_equal,
    require_rounding,
    rounding_error,
)

__all__ = ["check_module"]


def check_module(
    original: Scorer,
    exact: LatentModel,
    converted: LatentModel,
    ids: Tensor,
    text: bool,
    *,
    wide_original: Scorer | None = None,
) -> Verification:
    """Run the first two links and measure the price of the conversion.

    Where numbers have fewer bits than float32, both links are of the same models computing in float32, so that they
    are as tight as ever, and one more compares what the type's roundings do to either model.

    Args:
        original: The unconverted model.
        exact: The same rewrite with nothing left out, computing in float32.
        converted: The conversion.
        ids: ``[batch, length]`` token ids, at least 2 long; up to half of the length is continued greedily.
        text: Whether they are the user's text.
        wide_original: The unconverted model, computing in float32, if it does not by itself.

    Raises:
        VerificationError: A link is broken.
    """
    wide = in_float32(converted)
    with torch.inference_mode():
        expected = (wide_original or original)(ids).float()
        rewrite_error = relative_error(exact(ids).logits, expected)
        whole = wide(ids).logits
        decode_error = relative_error(in_chunks(wide, ids), whole)
    require_equal("The rewritten graph at full rank", "the original model", rewrite_error)
    require_equal("Decoding with the latent cache", "the same model on the whole sequence", decode_error)
    rounding = None
    if wide is not converted:
        with torch.inference_mode():
            rounding = (
                rounding_error(original(ids).float(), expected),
                rounding_error(in_chunks(converted, ids).float(), whole),
            )
        require_rounding("The converted model", rounding[1], rounding[0], cache_dtype(converted.graph))
    prompt = ids[0, : ids.shape[1] - ids.shape[1] // 2]
    count = greedy_tokens(converted, ids)
    ours = greedy(TorchDecoder(converted), prompt, count)
    with torch.inference_mode():
        one, all_of_them = ([c.nbytes for c in converted(part).cache] for part in (ids[:, :1], ids))
    require_bytes(sum(all_of_them), len(ids) * cache_bytes(converted, ids.shape[1]), ids)
    return Verification(
        rewrite_error=rewrite_error,
        decode_error=decode_error,
        lowering_error=None,
        lowering_greedy=None,
        conversion_error=relative_error(whole, expected),
        conversion_greedy=equal_share(ours, greedy_original(original, prompt, count, converted.known_tokens)),
        rounding=rounding,
        cache_bytes_per_token=sum(one) // len(ids),
        tokens=ids.numel(),
        text=text,
    )
