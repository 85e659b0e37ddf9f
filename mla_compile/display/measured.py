"""What was measured of models: quality, speed; and text that one made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mla_compile.display.console import print_table, say, tell, warn

if TYPE_CHECKING:
    from mla_compile.evaluation.benchmark import Benchmark, Spread
    from mla_compile.evaluation.measure import Measurement
    from mla_compile.evaluation.textgen import Generation


__all__ = ["generation_row", "show_benchmark", "show_generation", "show_measurement", "stream_text"]


def show_measurement(result: Measurement) -> None:
    """One row per model, the original first; columns that nothing is known of are left out."""
    original = result.original
    columns = ["", "runtime", "tokens", "cache bytes/token", "cache kept", "perplexity", "ratio", "KL", "top-1"]
    rows = [
        [
            "original" if m is original else m.model.name,
            m.model.runtime,
            str(result.tokens),
            "unknown" if (cached := m.model.cache_bytes) is None else str(cached),
            _percent(m.kept(original)),
            f"{m.found.perplexity.value:.4f}",
            "" if (ratio := m.ratio(original)) is None else f"{ratio:.4f}",
            "" if original in (None, m) else f"{m.found.kl:.5f}",
            "" if original in (None, m) else _percent(m.found.top1),
        ]
        for m in ([] if original is None else [original]) + [*result.models]
    ]
    told = [place for place, cells in enumerate(zip(*rows, strict=True)) if any(cells)]
    print_table(None, [columns[place] for place in told], [[row[place] for place in told] for row in rows])
    warn(*result.warnings)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def show_benchmark(result: Benchmark) -> None:
    """Files, prompts and steps: a table of each."""

    def ratio(found: Spread) -> str:
        return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"

    print_table(
        f"{result.original}, {result.threads} thread(s)",
        ["file", "load, s", "peak memory, MiB", "cache bytes/token"],
        [
            [
                _benched(f.name, f.original),
                f"{f.load_seconds:.2f}",
                f"{f.peak_bytes / 2**20:,.0f}",
                f.cache_bytes_per_token,
            ]
            for f in result.files
        ],
    )
    originals = {f.name: f.original for f in result.files}
    print_table(
        f"A prompt ({result.clock}), and how many times as fast as the fastest original (quartiles)",
        ["prompt", "file", "seconds", "tokens/s", "speed"],
        [
            [
                p.tokens,
                _benched(p.file, originals[p.file]),
                f"{p.seconds:.3f}",
                f"{p.tokens / p.seconds:,.0f}",
                ratio(p.speedup),
            ]
            for p in result.prefills
        ],
    )
    print_table(
        f"A new token ({result.clock}), and how many times as fast as the fastest original (quartiles)",
        ["context", "batch", "file", "ms", "tokens/s", "cache bytes", "speed"],
        [
            [
                s.context,
                s.batch,
                _benched(s.file, originals[s.file]),
                f"{1e3 * s.seconds:.2f}",
                f"{s.tokens_per_second:,.1f}",
                s.cache_bytes,
                ratio(s.speedup),
            ]
            for s in result.steps
        ],
    )
    tell(*(f"note: {line}" for line in result.notes))


def _benched(name: str, original: bool) -> str:
    return f"original, {name}" if original else name


def generation_row(result: Generation) -> dict[str, Any]:
    """Generated texts as data."""
    return {
        "texts": list(result.texts),
        "new_tokens": list(result.new_tokens),
        "tokens_per_second": result.tokens_per_second,
        "cache_bytes_per_token": result.cache_bytes_per_token,
        "cache_bytes": result.cache_bytes,
        "warnings": list(result.warnings),
    }


def stream_text(piece: str) -> None:
    """Show a piece of text as it arrives."""
    say(piece, end="")


def show_generation(result: Generation, streamed: bool, quiet: bool) -> None:
    """The texts, unless they were streamed, and the speed, unless ``quiet``."""
    say("" if streamed else "\n\n".join(result.texts))
    warn(*result.warnings)
    if not quiet:
        tell(
            f"{sum(result.new_tokens)} tokens, {result.tokens_per_second:.0f} tokens/s, "
            f"{result.cache_bytes_per_token} cache bytes per token, {result.cache_bytes} in all"
        )
