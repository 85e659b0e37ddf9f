"""Which decoder architectures convert: every causal language model that transformers builds from a tiny config.

Usage: python benchmarks/coverage.py --json benchmarks/coverage.json --markdown benchmarks/coverage.md
       [--only TYPE ...] [--until STAGE] [--skip-onnx] [--limit-s 240] [--limit-gb 12] [--jobs 1] [--resume]

Every model type runs in a process of its own with limits of time and memory, so that a hang or a crash is a row of the
table and not its end. The stages of a row, in order:

1. build: shrink the config (see tiny_configs.py), draw weights, run once, and count softmax attention;
2. export: ``torch.export`` through the compiler's own frontend;
3. recognise: the attention layers found, and the reason for each that was not understood;
4. convert: ``mla_compile.compile(model, exact=True)``, which checks itself;
5. compare: the result against the *transformers* model on fresh tokens: whole, in pieces with the cache, left-padded;
6. onnx: ``to_onnx``, and ONNX Runtime in pieces against the transformers model;
7. lossy: the conversion at half the cache runs.

A conversion is *wrong* when the compiler reported success and one of the comparisons is off: the goal is none.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGES = ("build", "export", "recognise", "convert", "compare", "onnx", "lossy")
TOLERANCE = 1e-4
"""Allowed difference, relative to the largest logit: float32 rounding through a few layers stays below 1e-5."""
_PIECES = (7, 1, 3, 1)
_PADDING = 3


@dataclass
class Row:
    """What became of one architecture.

    Attributes:
        name: Model type.
        model_class: The transformers class.
        implementation: ``attn_implementation``.
        reached: The last stage that was begun.
        done: Whether the row came to its own end.
        built: Whether the tiny model could be built and run.
        exported: Whether it could be exported.
        expected: Softmax attentions in one run of the original: calls of scaled-dot-product attention, and softmaxes
            over an axis of positions.
        sites: Attention layers that were recognised.
        rejected: ``code: reason`` of every layer that was not, with its path.
        converted: Layers that were converted exactly.
        kept: Layers that keep an ordinary cache.
        errors: Differences from the original relative to its largest logit: whole, pieces, padded, onnx.
        lossy: ``ok``, or why the conversion at half the cache failed.
        code: Why the row stopped; empty for success.
        reason: The same in words.
        notes: Remarks.
        seconds: Wall time per stage.
    """

    name: str
    model_class: str = ""
    implementation: str = ""
    reached: str = "start"
    done: bool = False
    built: bool = False
    exported: bool = False
    expected: int = 0
    sites: int | None = None
    rejected: list[dict[str, str]] = field(default_factory=list)
    converted: int = 0
    kept: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    lossy: str = ""
    code: str = ""
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """Whether the compiler called a conversion fine that is not."""
        return any(not error <= TOLERANCE for error in self.errors.values())

    @property
    def complete(self) -> bool:
        """Whether every softmax attention of the model was converted, and the result is equal."""
        return self.expected > 0 and self.converted >= self.expected and not self.kept and self.equal

    @property
    def equal(self) -> bool:
        """Whether the converted model was compared with the original and is equal."""
        return "padded" in self.errors and not self.wrong

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Row:
        """A row from its JSON form."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON-able data."""
        return {**asdict(self), "wrong": self.wrong, "complete": self.complete}


class Stop(Exception):
    """A row ends here, for a reason that is part of the result."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


# Worker: one architecture, in its own process.


def work(name: str, path: Path, until: str, skip_onnx: bool) -> None:
    """Run the stages of one architecture, writing the row to ``path`` at every step."""
    from tiny_configs import architectures

    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    row = Row(name, model_class=architectures().get(name, ""))
    try:
        _run_stages(row, path, STAGES[: STAGES.index(until) + 1], skip_onnx)
    except Stop as stop:
        row.code, row.reason = stop.code, stop.reason
    except MemoryError as error:
        row.code, row.reason = "memory", _first_line(error)
    except Exception as error:  # every failure is a result
        row.code, row.reason = _code_of(error), _first_line(error)
    row.done = True
    _write(path, row)


def _run_stages(row: Row, path: Path, stages: Sequence[str], skip_onnx: bool) -> None:
    import torch
    from tiny_configs import LENGTH, build, random_ids

    import mla_compile
    from mla_compile.errors import MlaCompileError, RefusedError, VerificationError
    from mla_compile.passes.recognise import recognise
    from mla_compile.sources.capture import capture

    torch.set_num_threads(1)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        row.reached = name
        _write(path, row)
        start = time.perf_counter()
        try:
            yield
        finally:
            row.seconds[name] = round(time.perf_counter() - start, 2)

    with stage("build"):
        try:
            tiny = build(row.name)
            row.implementation = tiny.implementation
            row.expected = count_attention(tiny.module, random_ids(2, LENGTH, seed=0))
        except Exception as error:
            raise Stop("build", _first_line(error)) from error
        row.built = True
    model = tiny.module
    if "export" not in stages:
        return
    with stage("export"):
        try:
            program = capture(model, None)
        except MlaCompileError as error:
            raise Stop("export", error.message) from error
        row.exported = True
    if "recognise" not in stages:
        return
    with stage("recognise"):
        found = recognise(program)
        row.sites = len(found.sites)
        row.rejected = [{"path": r.path, "code": r.code.value, "reason": r.reason} for r in found.rejections]
    if not row.expected and not found.sites and not found.rejections:
        raise Stop("no-attention", "the model has no softmax attention")
    if "convert" not in stages:
        if found.rejections:
            raise Stop(found.rejections[0].code.value, found.rejections[0].reason)
        return
    with stage("convert"):
        try:
            compiled = mla_compile.compile(model, exact=True, check=True)
        except RefusedError as error:
            if found.rejections:
                raise Stop(found.rejections[0].code.value, found.rejections[0].reason) from error
            raise Stop("rewrite" if found.sites else "anchor", error.message) from error
        except VerificationError as error:
            raise Stop("verification", error.message) from error
        row.converted = len(compiled.report.plans)
        row.kept = len(found.sites) + len(found.rejections) - row.converted
    if "compare" not in stages:
        return
    with stage("compare"):
        reference = Reference(model)
        row.errors |= compare(compiled.module, reference, row.notes)
    if "onnx" in stages and not skip_onnx:
        with stage("onnx"), tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            try:
                compiled.to_onnx(file)
            except VerificationError as error:
                raise Stop("onnx-verification", error.message) from error
            except Exception as error:
                raise Stop("onnx", _first_line(error)) from error
            row.errors["onnx"] = compare_onnx(file, reference)
    if "lossy" in stages:
        with stage("lossy"):
            row.lossy = _try_lossy(model, found.sites)
    if row.wrong:
        raise Stop("wrong", "the converted model differs from the original")
    if row.kept:
        first = row.rejected[0] if row.rejected else {"code": "partly", "reason": "some layers keep their cache"}
        raise Stop(first["code"], first["reason"])


def _try_lossy(model: nn.Module, sites: Sequence[Any]) -> str:
    import mla_compile

    rotating = 2 if all(s.rope.rotary_dim for s in sites) else 0
    try:
        mla_compile.compile(model, method="mha2mla", cache_ratio=0.5, rope_dims=rotating, check=True)
    except Exception as error:
        return f"{_code_of(error)}: {_first_line(error)}"
    return "ok"


def _code_of(error: BaseException) -> str:
    from mla_compile.errors import MlaCompileError

    codes = {"LoadError": "load", "RefusedError": "refused", "UsageError": "usage", "VerificationError": "verification"}
    if isinstance(error, MlaCompileError):
        return codes.get(type(error).__name__, type(error).__name__)
    return f"defect:{type(error).__name__}"


def _first_line(error: BaseException) -> str:
    message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
    return " ".join(str(message).split())[:300]


def _write(path: Path, row: Row) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(row.to_dict()))
    partial.replace(path)


def count_attention(model: nn.Module, ids: Tensor) -> int:
    """Count softmax attention in one run of a model, independently of any graph.

    Args:
        model: A causal language model.
        ids: ``[batch, length]`` tokens; the length must equal no size of the model.

    Returns:
        Calls of scaled-dot-product attention, plus softmaxes over at least as many entries as there are positions, of
        tensors that have another axis of positions (the entries may be more: sinks, prompts, compressed keys).
    """
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    length = ids.shape[1]

    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(
            self,
            func: Any,  # noqa: ANN401 - any torch function
            types: Any,  # noqa: ANN401
            args: Any = (),  # noqa: ANN401
            kwargs: Any = None,  # noqa: ANN401
        ) -> Any:  # noqa: ANN401
            result = func(*args, **(kwargs or {}))
            if func is functional.scaled_dot_product_attention:
                self.calls += 1
            elif func in (torch.softmax, torch.Tensor.softmax, functional.softmax) and result.dim() > 2:
                axis = (kwargs or {}).get("dim", args[1] if len(args) > 1 else -1)
                sizes = list(result.shape)
                entries = sizes.pop(axis)
                self.calls += entries >= length and not {length, entries, entries - 1}.isdisjoint(sizes)
            return result

    # functional.softmax calls Tensor.softmax: a mode is off while it handles a call, so each counts once.
    with torch.no_grad(), Counting() as counting:
        model(input_ids=ids)
    return counting.calls


class Reference:
    """The original transformers model, called with whatever it accepts of mask and positions."""

    def __init__(self, model: nn.Module) -> None:
        import inspect

        self._model = model
        self._accepted = inspect.signature(model.forward).parameters

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[batch, length, vocabulary]``."""
        import torch

        from mla_compile.runtime.module import positions_from_mask

        mask = torch.ones_like(ids) if mask is None else mask
        given = {"attention_mask": mask, "position_ids": positions_from_mask(mask, ids.shape[1])}
        with torch.no_grad():
            output = self._model(input_ids=ids, **{k: v for k, v in given.items() if k in self._accepted})
        logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
        return logits.float()


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where it is not a number."""
    error = float((got - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")


def compare(module: nn.Module, reference: Reference, notes: list[str]) -> dict[str, float]:
    """Compare a converted module with the original: whole, in pieces, and left-padded."""
    import torch
    from tiny_configs import random_ids

    long = random_ids(2, 29, seed=11)
    ids = random_ids(2, sum(_PIECES), seed=12)
    with torch.no_grad():
        errors = {"whole": relative(module(long).logits, reference(long))}
        past, parts, done = None, [], 0
        for part in ids.split(_PIECES, 1):
            done += part.shape[1]
            result = module(part, attention_mask=torch.ones_like(ids[:, :done]), past=past)
            past = result.cache
            parts.append(result.logits)
        errors["pieces"] = relative(torch.cat(parts, 1), reference(ids))
        mask = torch.ones_like(ids)
        mask[1, :_PADDING] = 0
        padded = ids.masked_fill(mask == 0, 0)
        real = mask.bool()
        got = module(padded, attention_mask=mask).logits[real]
        errors["padded"] = relative(got, reference(padded, mask)[real])
        if not errors["padded"] <= TOLERANCE:
            # Some originals count positions through the padding; then a padded row must equal the row without padding.
            alone = torch.cat([reference(row[None, -int(m.sum()) :])[0] for row, m in zip(ids, mask, strict=True)])
            unpadded = relative(got, alone)
            notes.append(f"left padding changes the original itself by {errors['padded']:.1e}")
            errors["padded"] = unpadded
    return errors


def compare_onnx(file: Path, reference: Reference) -> float:
    """Compare ONNX Runtime, in pieces with its cache, with the original."""
    import numpy as np
    import torch
    from tiny_configs import random_ids

    from mla_compile.runtime.onnx_session import OnnxDecoder

    decoder = OnnxDecoder(file, threads=1)
    ids = random_ids(2, sum(_PIECES), seed=13)
    cache, parts, done = decoder.empty_cache(len(ids)), [], 0
    for part in ids.split(_PIECES, 1):
        size = part.shape[1]
        positions = np.broadcast_to(np.arange(done, done + size), part.shape)
        logits, cache = decoder.step(part.numpy(), np.ones((len(ids), done + size), np.int64), positions, cache)
        parts.append(torch.from_numpy(logits))
        done += size
    return relative(torch.cat(parts, 1), reference(ids))


# Parent: one process per architecture, and the table.


def run_row(name: str, *, until: str = STAGES[-1], skip_onnx: bool = False, limit_s: float, limit_gb: float) -> Row:
    """Run one architecture in a process of its own; whatever happens there is a row.

    Args:
        name: Model type.
        until: Last stage.
        skip_onnx: Leave out the onnx stage.
        limit_s: Wall-clock limit.
        limit_gb: Limit of address space.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--json", str(path)]
        command += ["--until", until, "--limit-gb", str(limit_gb), *(["--skip-onnx"] if skip_onnx else [])]
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        late = False
        try:
            _, complaint = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
            _, complaint = process.communicate()
        row = Row.read(json.loads(path.read_text())) if path.is_file() else Row(name)
    if not row.done:
        last = (complaint or "").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        row.code = "timeout" if late else "crash"
        row.reason = f"in {row.reached}: " + (f"more than {limit_s:g} s" if late else last[0][:200])
    return row


def run_all(names: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """Run architectures, printing a line and storing all rows after each."""
    from tiny_configs import architectures

    kept: dict[str, Row] = {}
    if options.resume and options.json.is_file():
        stored = json.loads(options.json.read_text())["rows"]
        kept = {r["name"]: Row.read(r) for r in stored}
    wanted = [n for n in names if n not in kept]
    order = list(architectures())

    def one(name: str) -> Row:
        return run_row(
            name,
            until=options.until,
            skip_onnx=options.skip_onnx,
            limit_s=options.limit_s,
            limit_gb=options.limit_gb,
        )

    with ThreadPoolExecutor(options.jobs) as pool:
        for done, row in enumerate(pool.map(one, wanted), 1):
            kept[row.name] = row
            print(f"[{done}/{len(wanted)}] {progress(row)}", flush=True)
            ordered = sorted(kept.values(), key=lambda r: order.index(r.name) if r.name in order else len(order))
            write_json(options.json, ordered, options)
    return [kept[n] for n in order if n in kept]


def write_json(path: Path, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Store rows and how they were made."""
    from mla_compile.report import environment

    made = {"until": options.until, "skip_onnx": options.skip_onnx, "limit_s": options.limit_s}
    found = {"environment": environment(), "made": made, "summary": summary(rows), "codes": codes(rows)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**found, "rows": [r.to_dict() for r in rows]}, indent=1) + "\n")
    partial.replace(path)


def progress(row: Row) -> str:
    """One line about a row."""
    state = "WRONG" if row.wrong else "complete" if row.complete else row.code or row.reached
    found = "-" if row.sites is None else str(row.sites)
    worst = f" {max(row.errors.values()):.0e}" if row.errors else ""
    return (
        f"{row.name} {row.implementation or '-'}: {state}{worst}, sites {found}/{row.expected}, "
        f"{sum(row.seconds.values()):.0f} s {row.reason}"
    )


def summary(rows: Sequence[Row]) -> dict[str, int]:
    """Counts over all rows."""
    with_attention = [r for r in rows if r.exported and r.expected]
    return {
        "types": len(rows),
        "built": sum(r.built for r in rows),
        "exported": sum(r.exported for r in rows),
        "exported with softmax attention": len(with_attention),
        "fully recognised": sum(
            r.sites is not None and r.sites >= r.expected and not r.rejected for r in with_attention
        ),
        "fully converted": sum(r.complete for r in rows),
        "partly converted": sum(r.equal and not r.complete for r in rows),
        "equal in ONNX Runtime": sum(r.equal and "onnx" in r.errors for r in rows),
        "at half the cache too": sum(r.lossy == "ok" for r in rows),
        "wrong": sum(r.wrong for r in rows),
    }


def codes(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Reason code to model types, most frequent first."""
    found = Counter(r.code for r in rows if r.code)
    return {code: [r.name for r in rows if r.code == code] for code, _ in found.most_common()}


def markdown(rows: Sequence[Row]) -> str:
    """The table as a page."""
    from mla_compile.report import environment

    versions = environment()
    named = ", ".join(
        f"{k} {versions[k]}" for k in ("mla-compile", "torch", "transformers", "onnxruntime") if k in versions
    )
    counts = "\n".join(f"| {name} | {count} |" for name, count in summary(rows).items())
    reasons = "\n".join(f"| {code} | {len(names)} | {', '.join(names)} |" for code, names in codes(rows).items())
    table = "\n".join(map(_line, rows))
    return f"""# Which architectures convert

Every model type in transformers' causal-LM mapping, as a tiny model with random weights: {named}.
Made with `python benchmarks/coverage.py --json benchmarks/coverage.json --markdown benchmarks/coverage.md`.

- *sites*: attention layers recognised, of the softmax attentions counted in a run of the original model.
- *converted*: layers converted with nothing left out (`exact=True`), of those.
- *torch*: largest difference from the transformers model's logits, relative to the largest logit, over three runs:
  29 tokens at once, 7 + 1 + 3 + 1 tokens with the cache, and a left-padded batch. Equal means at most {TOLERANCE:.0e}.
- *ORT*: the same for ONNX Runtime in pieces with the cache.
- *half*: a conversion by `mha2mla` at half the cache passes its own checks. `fisher` was not run on all types.

| | count |
|---|---|
{counts}

| reason | count | model types |
|---|---|---|
{reasons}

| model type | attention | exported | sites | converted | torch | ORT | half | reason |
|---|---|---|---|---|---|---|---|---|
{table}
"""


def _line(row: Row) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"**{value:.0e}**" if not value <= TOLERANCE else f"{value:.0e}"

    torch_error = max((row.errors[k] for k in ("whole", "pieces", "padded") if k in row.errors), default=None)
    cells = [
        row.name,
        row.implementation,
        "yes" if row.exported else "no",
        "" if row.sites is None else f"{row.sites}/{row.expected}",
        f"{row.converted}/{row.expected}" if row.errors or row.converted else "",
        number(torch_error),
        number(row.errors.get("onnx")),
        {"ok": "yes", "": ""}.get(row.lossy, "no"),
        f"{row.code}: {row.reason}" if row.code else "",
    ]
    return "| " + " | ".join(c.replace("|", "/") for c in cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types; all by default")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="written after every row")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage")
    parser.add_argument("--skip-onnx", action="store_true")
    parser.add_argument("--limit-s", type=float, default=240.0, help="seconds per architecture")
    parser.add_argument("--limit-gb", type=float, default=12.0, help="address space per architecture")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in OUT")
    parser.add_argument("--worker", metavar="TYPE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        import resource

        limit = int(options.limit_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        work(options.worker, options.json, options.until, options.skip_onnx)
        return 0
    from tiny_configs import architectures

    rows = run_all(options.only or list(architectures()), options)
    for name, count in summary(rows).items():
        print(f"{name:34}{count:5}")
    for code, names in codes(rows).items():
        print(f"{code:24}{len(names):4}  {' '.join(names)}")
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    return 1 if any(r.wrong for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
