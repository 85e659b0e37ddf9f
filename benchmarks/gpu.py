"""A conversion and the decode kernels on a GPU: are they right, and how close to the memory's speed.

Usage: python benchmarks/gpu.py [--quick] --json OUT

In order: the bundled model converted with ``--device cuda``, against the CPU's conversion; without ``--quick`` also the
stages of converting one layer of Llama-2-7B's shape; every kernel path against the CPU's form in float64, which the
tests hold to the reference; what TensorRT's plugins launch, launched by the driver, likewise; a captured CUDA graph
against the plain launch; where TensorRT is installed, engines of the bundled model with our kernels and without,
against ONNX Runtime; the speed of a copy; and a table of decode attention: bytes of cache read per second as a share of
the copy's, and the speed-up over the fastest of torch's attentions on the original model's heads, or for latents of
fewer bits over the same with 16. Lengths are equal; caches are larger than the L2 cache or take turns so that nothing
is found there; times are medians of replayed CUDA graphs.

A wrong number ends the command with an error; a slow one is a row that misses its goal.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import plugin_launches
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import mla_compile
from mla_compile.runtime.kernels import Codes, LatentCache, RowLayout, append_latent, folded, latent_attention
from mla_compile.runtime.tensorrt.engine import TensorRTDecoder, facts_path
from mla_compile.runtime.tensorrt.engine_builder import EngineSettings

PAGE = 64
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Relative to the largest result: weights and results are rounded to the type; float32 products come in three parts."""
SAME_PERPLEXITY = 1e-3
"""How far perplexities may be apart, relatively: the search for sizes may take another of two that are alike."""
HALVES = torch.bfloat16
BUNDLED = Path(__file__).parents[1] / "examples" / "tiny-llama"


@dataclass(frozen=True)
class Shape:
    """A conversion and what it replaces: an original's heads, or for codes latents of 16 bits.

    At 128k cached tokens and more ``goal`` is the share of the copy's speed, and ``speedup`` how many times as fast as
    what it replaces it should be; 0 where nothing was set.
    """

    name: str
    layout: RowLayout
    heads: int
    goal: float
    kv_heads: int = 0
    head_dim: int = 128
    codes: Codes | None = None
    speedup: float = 0.0


SHAPES = (
    Shape("Llama-2-7B 512+64", RowLayout(512, 1, 64), 32, 0.78, 32, speedup=10),
    Shape("Llama-2-7B 256+32x8", RowLayout(256, 32, 8), 32, 0.72, 32, speedup=11),
    Shape("Llama-3-8B 512+64", RowLayout(512, 1, 64), 32, 0.78, 8, speedup=2.7),
    Shape("Llama-3-8B 512+8x16", RowLayout(512, 8, 16), 32, 0.72, 8),
    Shape("512+64 int8", RowLayout(512, 1, 64), 32, 0.65, codes=Codes.INT8, speedup=1.35),
    Shape("512+64 fp8", RowLayout(512, 1, 64), 32, 0.65, codes=Codes.FP8, speedup=1.35),
    Shape("512+64 int4", RowLayout(512, 1, 64), 32, 0.45, codes=Codes.INT4, speedup=1.6),
    Shape("SmolLM-135M 48+3x8", RowLayout(48, 3, 8), 9, 0.55, 3, 64),
    Shape("SmolLM-135M 96+3x8", RowLayout(96, 3, 8), 9, 0.55, 3, 64),
    Shape("SmolLM-360M 160+5x8", RowLayout(160, 5, 8), 15, 0.55, 5, 64),
)
SIZES = ((1, 4096), (1, 65536), (8, 16384), (32, 4096), (128, 4096))
QUICK = ((1, 65536), (32, 4096))


@dataclass(frozen=True)
class Problem:
    """One correctness check."""

    layout: RowLayout
    heads: int = 8
    new: int = 1
    lengths: tuple[int, ...] = (700, 1, 0, 333)
    page: int = PAGE
    dtype: torch.dtype = HALVES
    codes: Codes | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    slopes: bool = False
    causal: bool = True
    chunked: bool = False


def problems() -> Iterator[Problem]:
    """Every path of the kernels, and every type with every kind of row."""
    shared, scaled = RowLayout(512, 1, 64), RowLayout(128, 8, 16, key_scales=8, value_scales=2)
    layouts = [shape.layout for shape in SHAPES] + [RowLayout(576, 1, 64), RowLayout(100, 1, 32), RowLayout(64)]
    for layout, dtype in itertools.product(layouts, TOLERANCE):
        heads = layout.rope_groups if layout.rope_groups > 1 else 16
        yield Problem(layout, heads, dtype=dtype)
        yield Problem(layout, heads, dtype=dtype, new=4, page=0, lengths=(700, 5, 4, 333))
    for dtype, codes in itertools.product(TOLERANCE, Codes):
        for layout in (shared, RowLayout(96, 1, 32), RowLayout(33, 1, 16), scaled):
            yield Problem(layout, 32, dtype=dtype, codes=codes)
    for codes in Codes:
        yield Problem(
            RowLayout(576, 1, 64), 16, dtype=torch.float16, new=4, page=0, lengths=(700, 5, 4, 333), codes=codes
        )
    yield Problem(shared, 128, new=1)
    yield Problem(shared, 32, new=64, lengths=(2000, 64, 100, 333))
    yield Problem(shared, 32, lengths=(20_000, 1, 300, 0))
    yield Problem(RowLayout(64, 1, 16, key_scales=1), 16)
    yield Problem(scaled, 32, new=3, lengths=(700, 3, 9, 333))
    yield Problem(RowLayout(128, 1, 16, key_scales=32, scaled_rope=True), 32)
    for feature in ({"window": 100}, {"softcap": 5.0}, {"sinks": True}, {"slopes": True}, {"causal": False}):
        yield Problem(RowLayout(256, 1, 64), 16, new=2, lengths=(700, 2, 9, 20_000), **feature)
    for new, lengths in ((1, (700, 1, 512, 20_000)), (4, (700, 4, 514, 20_000))):
        yield Problem(RowLayout(256, 1, 64), 16, new=new, lengths=lengths, window=256, chunked=True)
    everything = {"window": 250, "softcap": 5.0, "sinks": True, "slopes": True, "new": 4}
    yield Problem(scaled, 16, lengths=(700, 4, 9, 5000), **everything)


def random_cache(
    layout: RowLayout, lengths: tuple[int, ...], page: int, dtype: torch.dtype, codes: Codes | None
) -> LatentCache:
    """A cache of NaN on the GPU, in shuffled pages or contiguous, that new rows are appended to."""
    batch, longest = len(lengths), max(*lengths, 1)
    pages = -(-longest // page) if page else 0
    table = None
    if page:
        table = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages)
    blocks, tokens = (batch * pages, page) if page else (batch, longest)
    kinds = {"dtype": dtype, "device": "cuda", "codes": codes, "page_table": table}
    cache = LatentCache.empty(layout, blocks, tokens, **kinds)
    for part in (cache.latent, cache.rest, cache.token_scales):
        if part is not None:
            part.copy_(torch.full((), torch.nan if part.is_floating_point() else 127, device="cuda").to(part.dtype))
    return cache


def error_of(problem: Problem) -> tuple[float, float]:
    """Append rows and attend; the largest error of the results relative to the largest, and of the logarithms."""
    layout, batch = problem.layout, len(problem.lengths)
    lengths = torch.tensor(problem.lengths, device="cuda", dtype=torch.int32)
    cache = random_cache(layout, problem.lengths, problem.page, problem.dtype, problem.codes)
    rows = torch.randn(batch, max(problem.lengths), layout.rank + layout.rest_width, device="cuda")
    angles = torch.randn(batch, rows.shape[1], layout.rope_groups, layout.rope_dim // 2, device="cuda")
    append_latent(rows.to(problem.dtype), angles.cos(), angles.sin(), cache, lengths)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(problem.dtype)

    shape = batch, problem.new, problem.heads
    q_latent = numbers(*shape, layout.rank) / layout.rank**0.5
    q_rope = numbers(*shape, layout.rope_dim) / max(layout.rope_dim, 1) ** 0.5
    sinks = numbers(problem.heads) if problem.sinks else None
    slopes = numbers(problem.heads).abs() / 8 if problem.slopes else None
    settings = {"window": problem.window, "softcap": problem.softcap}
    settings |= {"causal": problem.causal, "chunked": problem.chunked}
    given = {"sinks": sinks, "slopes": slopes, "scale": 2.0, "return_lse": True, **settings}
    context, lse = latent_attention(q_latent, q_rope, cache, lengths, **given)
    torch.cuda.synchronize()

    # On what the cache holds after rounding.
    exact = [None if x is None else x.cpu().double() for x in (q_latent, q_rope, sinks, slopes)]
    there = LatentCache(
        layout,
        cache.latent.cpu() if problem.codes else cache.latent.cpu().double(),
        cache.rest.cpu().double(),
        None if cache.token_scales is None else cache.token_scales.cpu(),
        None if cache.page_table is None else cache.page_table.cpu(),
    )
    given |= {"sinks": exact[2], "slopes": exact[3]}
    wanted, wanted_lse = latent_attention(exact[0], exact[1], there, lengths.cpu(), **given)
    seen = wanted_lse > -torch.inf
    assert torch.equal(seen, lse.cpu() > -torch.inf)
    off = (context.cpu().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    return float(off), float((lse.cpu() - wanted_lse)[seen].abs().max())


def appended_is_right() -> bool:
    """Whether the append kernel writes what the CPU's form writes: to the last bit but one, codes to one step."""
    good = True
    for codes, page in itertools.product((None, *Codes), (0, PAGE)):
        layout = RowLayout(100, 3, 8, key_scales=3)
        cache = random_cache(layout, (70, 3), page, torch.float16, codes)
        copies = (cache.latent, cache.rest, cache.token_scales, cache.page_table)
        other = LatentCache(layout, *(None if part is None else part.cpu() for part in copies))
        row = torch.randn(2, 5, layout.rank + layout.rest_width, device="cuda").half()
        angle = torch.randn(2, 5, 3, 4, device="cuda")
        lengths = torch.tensor([70, 3], device="cuda", dtype=torch.int32)
        append_latent(row, angle.cos(), angle.sin(), cache, lengths)
        folded.append(row.cpu(), angle.cos().cpu(), angle.sin().cpu(), other, lengths.cpu())
        good &= torch.allclose(cache.rest.cpu().float(), other.rest.float(), rtol=2e-3, equal_nan=True)
        written = cache.parts(torch.float32, 70)[0].cpu(), other.parts(torch.float32, 70)[0]
        largest = row[..., :100].float().abs().max().item()
        step = {None: 0.0, Codes.INT8: largest / 127, Codes.FP8: largest / 14, Codes.INT4: largest / 7}[codes]
        good &= torch.allclose(*written, rtol=2e-3, atol=1.01 * step, equal_nan=True)
        if codes:  # a quotient may lie on the other side of a half: rarely
            bytes_of = (c.latent.cpu().view(torch.uint8) for c in (cache, other))
            good &= bool((next(bytes_of) != next(bytes_of)).float().mean() < 1e-2)
    return good


def captured_is_right() -> bool:
    """Whether a captured graph gives, for lengths changed after the capture, what a plain launch gives."""
    layout = RowLayout(512, 1, 64)
    cache = random_cache(layout, (3000, 3000), PAGE, HALVES, None)
    cache.latent.normal_()
    cache.rest.normal_()
    lengths = torch.tensor([3000, 3000], device="cuda", dtype=torch.int32)
    queries = (torch.randn(2, 1, 32, width, device="cuda", dtype=HALVES) for width in (512, 64))
    q_latent, q_rope = queries

    def attend() -> Tensor:
        return latent_attention(q_latent, q_rope, cache, lengths, scale=0.05)[0]

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    lengths.copy_(torch.tensor([17, 2222]))
    graph.replay()
    torch.cuda.synchronize()
    return torch.equal(captured, attend())


def plugins() -> list[dict[str, object]]:
    """What TensorRT's plugins launch, against the CPU's form."""
    major, minor = torch.cuda.get_device_capability()
    rows = []
    for name, dtype, error in plugin_launches.errors(plugin_launches.Driver(), 10 * major + minor):
        rows.append({"launch": name, "type": str(dtype), "error": error, "good": error <= TOLERANCE[dtype]})
        if not rows[-1]["good"]:
            print(f"WRONG by {error:.1e}: {name}, {dtype}")
    print(f"{sum(bool(row['good']) for row in rows)} of {len(rows)} launches of plugins right")
    return rows


def engines() -> list[dict[str, object]]:
    """Engines of the bundled model, by plugins and by standard operators; none where TensorRT is missing.

    Each is compared with its file in ONNX Runtime where it is built; what fails there is told, and is a wrong result.
    """
    if importlib.util.find_spec("tensorrt") is None:
        print("TensorRT is not installed: no engines")
        return []
    model = mla_compile.compile(BUNDLED, exact=True)
    assert isinstance(model, mla_compile.CompiledModel)
    rows = []
    for plugins in (True, False):
        row: dict[str, object] = {"plugins": plugins, "good": False}
        with tempfile.TemporaryDirectory() as folder:
            plan = Path(folder, "tiny.plan")
            try:
                settings = EngineSettings(batch=8, room=128, prompt=32, plugins=plugins)
                report = model.to_tensorrt(plan, settings)
                layers = json.loads(facts_path(plan).read_text())["plugin_layers"]
                decoder = TensorRTDecoder(plan)
                begin = time.perf_counter()
                decoder.generate([[1, 2, 3]] * 8, 100)
                tokens = 800 / (time.perf_counter() - begin)
                row |= {"error": report.verification and report.verification.engine_error, "plugin_layers": layers}
                row |= {"tokens_per_second": tokens, "good": bool(layers) == plugins}
            except Exception as error:  # TensorRT fails in any of its ways
                row["reason"] = str(error).splitlines()[0]
        rows.append(row)
        print(f"engine: {row}", flush=True)
    return rows


def conversions() -> list[dict[str, object]]:
    """The bundled model, converted on the CPU and on the GPU: equally good, or the GPU's is wrong."""
    sys.path.append(str(BUNDLED.parent))
    from story_grammar import story

    stories = [story(seed) for seed in range(60)]
    rows: list[dict[str, object]] = []
    for device in ("cpu", "cuda"):
        begin = time.perf_counter()
        made = mla_compile.compile(BUNDLED, calibration=stories, statistics_cache=False, polish_steps=8, device=device)
        assert isinstance(made, mla_compile.CompiledModel)
        assert made.report.quality is not None
        seconds = time.perf_counter() - begin
        rows.append({"device": device, "seconds": seconds, "perplexity": made.report.quality.converted})
    here, there = (float(str(row["perplexity"])) for row in rows)
    rows[-1]["good"] = abs(there / here - 1) <= SAME_PERPLEXITY
    print(f"conversions: {rows}", flush=True)
    return rows


def wide_layer() -> dict[str, float]:
    """Seconds of every stage of converting a random layer of Llama-2-7B's shape on the GPU, on 8192 random tokens."""
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=1, max_position_embeddings=512)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 1024, (17, 512), generator=torch.Generator().manual_seed(0))
    settings = {"calibration_tokens": 8192, "statistics_cache": False, "check": False}
    made = mla_compile.compile(model, calibration=ids, device="cuda", **settings)
    found = {timing.name: timing.seconds for timing in made.report.stages}
    print(f"one layer, 4096 wide: {found}", flush=True)
    return found


def microseconds(step: Callable[[int], object], turns: int) -> float:
    """Median time of ``step(i)``, of which a captured graph makes one for every ``i`` below ``turns``."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(turns):
                step(i)
        times = []
        for _ in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / turns)
    return statistics.median(times[5:])


def copy_speed() -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda _: target.copy_(source), 2) * 1e6


def turns_of(bytes_read: int) -> int:
    """How many caches take turns, so that each is out of the L2 cache when its turn comes again."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(16, -(-3 * l2 // bytes_read)))


def latent_time(shape: Shape, batch: int, tokens: int) -> tuple[float, int]:
    """Microseconds of latent attention, and bytes of cache that it reads."""
    layout, dtype = shape.layout, torch.float16 if shape.codes else HALVES
    per_token = (shape.codes.stored(layout.rank) + 4 if shape.codes else 2 * layout.rank) + 2 * layout.rest_width
    size = per_token * batch * tokens
    caches = [random_cache(layout, (tokens,) * batch, PAGE, dtype, shape.codes) for _ in range(turns_of(size))]
    for cache in caches:
        for part in (cache.latent, cache.rest, cache.token_scales):
            if part is not None and part.is_floating_point():
                part.copy_(torch.randn(part.shape, device="cuda"))  # there is no normal_ for fp8
    lengths = torch.full((batch,), tokens, device="cuda", dtype=torch.int32)
    q_latent = torch.randn(batch, 1, shape.heads, layout.rank, device="cuda", dtype=dtype)
    q_rope = torch.randn(batch, 1, shape.heads, layout.rope_dim, device="cuda", dtype=dtype)
    return (
        microseconds(lambda i: latent_attention(q_latent, q_rope, caches[i], lengths, scale=0.05), len(caches)),
        size,
    )


def original_time(shape: Shape, batch: int, tokens: int) -> tuple[float, str]:
    """Microseconds of the fastest of torch's attentions on the original heads, or of 16 bits for codes; and which."""
    if shape.codes:
        return latent_time(replace(shape, codes=None), batch, tokens)[0], "16 bits"
    if not shape.kv_heads:
        return float("nan"), ""
    size = 4 * shape.kv_heads * shape.head_dim * batch * tokens
    memory = torch.cuda.get_device_properties(0).total_memory
    turns = min(turns_of(size), max(1, int(0.5 * memory // size)))
    if size > 0.8 * memory:
        return float("nan"), "does not fit"
    heads = (batch, shape.kv_heads, tokens, shape.head_dim)
    caches = [[torch.randn(heads, device="cuda", dtype=HALVES) for _ in range(2)] for _ in range(turns)]
    query = torch.randn(batch, shape.heads, 1, shape.head_dim, device="cuda", dtype=HALVES)
    # Heads that share keys as queries of one head: the form in which fused kernels read those keys once.
    grouped = query.view(batch, shape.kv_heads, -1, shape.head_dim)
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def attend(i: int, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(grouped, *caches[i])

        try:
            found[backend.name] = microseconds(attend, turns)
        except RuntimeError as error:  # a backend that does not take the shape says so
            print(f"  {backend.name}: {str(error).splitlines()[0]}")
    try:
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention, dynamic=False)
        enable = shape.kv_heads != shape.heads
        found["FlexAttention"] = microseconds(lambda i: flex(query, *caches[i], enable_gqa=enable), turns)
    except Exception as error:  # it is compiled here, and may fail in any of the compiler's ways
        print(f"  FlexAttention: {str(error).splitlines()[0]}")
    if not found:
        return float("nan"), "none runs"
    name = min(found, key=lambda name: found[name])
    return found[name], name


@dataclass(frozen=True)
class Row:
    """One shape and size.

    Attributes:
        shape: Of :data:`SHAPES`.
        batch: Sequences.
        tokens: Of each.
        microseconds: Of latent attention.
        share: Bytes of cache per second, relative to the copy's.
        goal: What the share should be; 0 below 128k tokens, where launches take most of the time.
        original_microseconds: Of the original attention, or of latents of 16 bits.
        original: Which it was.
        speedup_goal: How many times as fast this should be; 0 like ``goal``.
    """

    shape: str
    batch: int
    tokens: int
    microseconds: float
    share: float
    goal: float
    original_microseconds: float
    original: str
    speedup_goal: float

    def line(self) -> str:
        """As text."""
        mark = "" if not self.goal else "  meets" if self.share >= self.goal else "  MISSES"
        mark += f" {self.goal:.0%}" if self.goal else ""
        ratio = self.original_microseconds / self.microseconds
        against = f"{ratio:5.2f}x {self.original}"
        if self.speedup_goal:
            against += f" {'meets' if ratio >= self.speedup_goal else 'MISSES'} {self.speedup_goal}x"
        return (
            f"{self.shape:22} {self.batch:4} x {self.tokens:6} {self.microseconds:8.1f} us {self.share:6.1%} of copy"
            f"{mark:13} {against}"
        )


def main() -> None:
    """Check, then measure, then write."""
    parser = argparse.ArgumentParser(description="Correctness and speed of the decode kernels on a GPU.")
    parser.add_argument("--quick", action="store_true", help="fewer sizes in the table")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and torch finds none. Run it where torch.cuda.is_available().")
    torch.manual_seed(0)
    torch.cuda.manual_seed(0)
    errors = []
    for problem in problems():
        error, lse_error = error_of(problem)
        good = error <= TOLERANCE[problem.dtype] and lse_error <= 1e-2
        errors.append({"problem": str(problem), "error": error, "lse_error": lse_error, "good": good})
        if not good:
            print(f"WRONG by {error:.1e}, denominators by {lse_error:.1e}: {problem}")
    converted = conversions()
    wide = {} if arguments.quick else wide_layer()
    checks = {"append": appended_is_right(), "captured graph": captured_is_right()}
    print(f"{sum(e['good'] for e in errors)} of {len(errors)} problems right; {checks}")
    launched = plugins()
    built = engines()
    speed = copy_speed()
    print(f"copy: {speed / 1e12:.2f} TB/s")
    rows = []
    for shape, (batch, tokens) in itertools.product(SHAPES, QUICK if arguments.quick else SIZES):
        time, size = latent_time(shape, batch, tokens)
        original = original_time(shape, batch, tokens)
        goal, speedup = (shape.goal, shape.speedup) if batch * tokens >= 131_072 else (0.0, 0.0)
        rows.append(Row(shape.name, batch, tokens, time, size / time * 1e6 / speed, goal, *original, speedup))
        print(rows[-1].line(), flush=True)
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_properties(0)
    report = {
        "device": device.name,
        "torch": torch.__version__,
        "conversions": converted,
        "wide_layer_seconds": wide,
        "copy_bytes_per_second": speed,
        "correctness": errors,
        "checks": checks,
        "plugin_launches": launched,
        "engines": built,
        "rows": [asdict(row) for row in rows],
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if not (all(e["good"] for e in (*errors, *launched, *built, converted[-1])) and all(checks.values())):
        sys.exit("Some results are wrong: see above.")


if __name__ == "__main__":
    main()
