"""What an ONNX file with a cache costs to load, to hold and to run: parts of ``mla-compile bench``.

As a program, ``python -m mla_compile.runtime.onnx_timing FILE ...`` does so in a process of its own, whose memory is
that of this file alone, and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mla_compile.runtime.generate import Ids
from mla_compile.runtime.onnx_cache import OnnxCache
from mla_compile.runtime.onnx_session import OnnxDecoder

__all__ = ["PIECE", "filled", "last_token", "peak_bytes", "random_ids"]

PIECE = 512
"""Tokens of a prompt that run together; their scores with a long context would fill the memory otherwise."""


def random_ids(vocabulary: int, tokens: int) -> Ids:
    """One sequence ``[1, tokens]``, always the same."""
    return np.random.default_rng(0).integers(0, vocabulary, (1, tokens))


def filled(decoder: OnnxDecoder, ids: Ids, room: int, clock: Callable[[], float]) -> tuple[OnnxCache, float]:
    """Run a prompt in pieces; of each no logits but the last token's are computed, if the file can leave others out.

    Args:
        decoder: The model.
        ids: ``[1, tokens]``.
        room: Tokens that the cache will have to hold.
        clock: Seconds.

    Returns:
        The cache, and the time it took.
    """
    cache, begin = decoder.empty_cache(1, room), clock()
    for start in range(0, ids.shape[1], PIECE):
        part = ids[:, start : start + PIECE]
        end = start + part.shape[1]
        _, cache = decoder.step(part, np.ones((1, end), np.int64), np.arange(start, end)[None], cache, 1)
    return cache, clock() - begin


def last_token(ids: Ids, batch: int) -> tuple[Ids, Ids, Ids]:
    """Arguments of a step of the last token of ``[1, tokens]``, for so many sequences that are all alike."""
    tokens = ids.shape[1]
    new = np.repeat(ids[:, -1:], batch, 0)
    return new, np.ones((batch, tokens), np.int64), np.full((batch, 1), tokens - 1)


def peak_bytes() -> int:
    """Largest resident memory of this process so far.

    Where there is Linux's own count, it is that: what ``getrusage`` says includes the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines() if ":" in line)
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Load a file, run a prompt and a step, and print what that took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--kernel", default="standard")
    given = parser.parse_args()
    import onnxruntime  # noqa: F401 - is not part of what the file costs

    before, begin = peak_bytes(), time.perf_counter()
    decoder = OnnxDecoder(given.file, threads=given.threads, kernel=given.kernel)
    loaded = time.perf_counter() - begin
    ids = random_ids(decoder.known_tokens, given.context)
    cache, _ = filled(decoder, ids[:, :-1], given.context, time.perf_counter)
    if given.batch > 1:
        cache = cache.repeated(given.batch)
    decoder.step(*last_token(ids, given.batch), cache)
    found = {"load_seconds": loaded, "peak_bytes": peak_bytes() - before}
    print(json.dumps(found))  # noqa: T201 - this is the output


if __name__ == "__main__":
    main()
