"""``mla-compile bench``: the original's files compute what the original does, and figures fit each other.

No time is asserted, only what follows from times by arithmetic.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import models
import numpy as np
import onnx
import pytest
import torch
from conversion import convert, difference

from mla_compile import cli
from mla_compile.errors import LoadError, RefusedError, UsageError
from mla_compile.evaluation import bench as module
from mla_compile.evaluation.bench import bench
from mla_compile.evaluation.benchmark import Spread, Step, Workload, slower
from mla_compile.evaluation.turns import spread, turns
from mla_compile.passes.lower_onnx import CacheForm, lower_to_onnx
from mla_compile.passes.lower_original import original_to_onnx, write_original
from mla_compile.passes.original_attention import OriginalForm, form_problem
from mla_compile.passes.plain_caches import with_plain_caches
from mla_compile.passes.recognise import recognise
from mla_compile.runtime.cpu.library import compiler
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.onnx_variant import Variant
from mla_compile.text.evaluate import original_scorer

LOGITS = 1e-4  # as in tests/passes/test_lower_onnx.py: 1e-6 was observed
BYTES = 0.2  # int8 keys and values of random models, over the largest logit: 0.06 was observed
NAMES = ("llama-gqa", "mistral-window", "nanogpt")  # grouped keys, a window, no rotation


@pytest.fixture(scope="module")
def translated(programs):
    made = {}

    def get(name):
        if name not in made:
            made[name] = original_to_onnx(with_plain_caches(programs[name].program))
        return made[name]

    return get


def steps(decoder, ids, sizes):
    cache, parts, done = decoder.empty_cache(*ids.shape), [], 0
    for size in sizes:
        mask = np.ones((len(ids), done + size), np.int64)
        positions = np.broadcast_to(np.arange(done, done + size), (len(ids), size))
        logits, cache = decoder.step(ids[:, done : done + size], mask, positions, cache)
        parts.append(logits)
        done += size
    return torch.from_numpy(np.concatenate(parts, 1))


@pytest.mark.parametrize("form", OriginalForm)
@pytest.mark.parametrize("name", NAMES)
def test_every_form_is_the_original(programs, translated, tmp_path, name, form):
    check_form(programs, translated, tmp_path, name, form)


@pytest.mark.parametrize("form", [OriginalForm.PRODUCTS, OriginalForm.ATTENTION])
def test_chunks_of_the_original(programs, translated, tmp_path, form):
    check_form(programs, translated, tmp_path, "chunks", form)


def check_form(programs, translated, tmp_path, name, form):
    """Whole, and token by token behind a prompt; oracle: the original in PyTorch, without a cache."""
    ids = models.tokens(2, 14)
    with torch.no_grad():
        expected = original_scorer(programs[name].program)(ids)
    scales = [(4 / 127, 4 / 127)] * models.LAYERS if form == OriginalForm.GROUPED_INT8 else ()
    write_original(translated(name), tmp_path / "original.onnx", form, metadata={}, scales=scales)
    decoder = OnnxDecoder(tmp_path / "original.onnx", threads=1)
    for sizes in ((14,), (9, 1, 1, 1, 1, 1)):
        error = difference(steps(decoder, ids.numpy(), sizes), expected)
        assert error <= (BYTES if form == OriginalForm.GROUPED_INT8 else LOGITS)


def test_forms_that_a_layer_has_not_are_named(programs, translated, tmp_path):
    assert form_problem(OriginalForm.PRODUCTS, Variant(slopes=True, sinks=True), 7, 5) is None
    assert "ALiBi" in form_problem(OriginalForm.GROUPED, Variant(slopes=True), 16, 16)
    assert "own chunk" in form_problem(OriginalForm.GROUPED, Variant(window=True, chunked=True), 16, 16)
    assert "sinks" in form_problem(OriginalForm.ATTENTION, Variant(sinks=True), 16, 16)
    assert "multiple of 8" in form_problem(OriginalForm.GROUPED, Variant(), 12, 12)
    assert "values 8" in form_problem(OriginalForm.GROUPED_INT8, Variant(), 16, 8)
    with pytest.raises(RefusedError, match="ordinary cache"):
        with_plain_caches(programs["bidirectional"].program)


@pytest.fixture(scope="module")
def files(programs, tmp_path_factory):
    """A converted model in two files, whose report names no original that can be read."""
    case, folder = programs["llama-gqa"], tmp_path_factory.mktemp("bench")
    model = convert(case.program, case.sites, exact=False, cache_ratio=0.5)
    metadata = {"config": {"cache_type": "float32"}, "max_position_embeddings": 64, "source": "llama"}
    written = {}
    for kind in ("dynamic", "static"):
        written[kind] = folder / f"{kind}.onnx"
        settings = {"opset": 24, "inline": False, "metadata": metadata, "caches": CacheForm(static=kind == "static")}
        lower_to_onnx(model.graph, model.rows, written[kind], **settings)
    (folder / "report.json").write_text(json.dumps({"source": "absent/llama"}))
    return written, model, case.program


@pytest.fixture(scope="module")
def found(files):
    written, _, program = files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.frontend, "load_any", lambda name, dtype: program)
        return bench([written["static"], written["dynamic"]], "llama", Workload((6, 20), (1, 3), rounds=2))


def test_figures_fit_each_other(files, found):
    _, model, program = files
    floats = ["GroupQueryAttention", "MatMul", "Attention"]
    kernels = ["", ", fused kernel"] if compiler() else [""]
    converted = [f"{name}{kernel}" for kernel in kernels for name in ("static", "dynamic")]
    assert [f.name for f in found.files] == [*floats, *converted]
    plain = sum(s.elements_per_token for s in recognise(program).sites)
    for file in found.files:
        # Oracle: what the plan counts, for the original and for the converted model.
        assert file.cache_bytes_per_token == 4 * (plain if file.original else sum(model.rows))
        assert file.load_seconds > 0
        assert file.peak_bytes > 0
    assert len(found.steps) == 2 * 2 * len(found.files)
    for step in found.steps:
        file = next(f for f in found.files if f.name == step.file)
        assert step.cache_bytes == step.batch * step.context * file.cache_bytes_per_token
        assert step.tokens_per_second == pytest.approx(step.batch / step.seconds)
        assert step.speedup.low <= step.speedup.median <= step.speedup.high
    for context, batch in ((6, 1), (20, 3)):
        originals = [s for s in found.steps if (s.context, s.batch) == (context, batch) and s.file in floats]
        assert min(originals, key=lambda s: s.seconds).speedup.median == 1
    assert {(p.file, p.tokens) for p in found.prefills} == {(f.name, c - 1) for f in found.files for c in (6, 20)}
    assert json.loads(json.dumps(found.to_dict()))["steps"][0]["tokens_per_second"] > 0


def test_turns_and_ratios():
    """Oracle: a clock that every call moves by what it is to take."""
    now = [0.0]

    def takes(seconds):
        def run():
            now[0] += seconds

        return run

    times = turns({"slow": takes(0.03), "fast": takes(0.01)}, 3, lambda: now[0])
    assert times["slow"] == pytest.approx([0.03] * 3)
    assert times["fast"] == pytest.approx([0.01] * 3)
    found = spread([3.0, 4.0, 8.0], [1.0, 2.0, 2.0])
    assert (found.low, found.median, found.high) == (2.5, 3.0, 3.5)


def test_threads_of_a_session_rest_while_others_are_timed(files):
    written, *_ = files
    for kernel in ("standard", "auto"):
        options = module._open(written["static"], 2, kernel)._session.get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_the_first_run_of_a_prompt_is_not_counted(monkeypatch):
    runs = []

    def filled(decoder, ids, room, clock):
        runs.append(decoder)
        return decoder, 100.0 if runs.count(decoder) == 1 else decoder.seconds

    monkeypatch.setattr(module, "filled", filled)
    opened = {
        "one": SimpleNamespace(known_tokens=9, seconds=2.0),
        "other": SimpleNamespace(known_tokens=9, seconds=1.0),
    }
    caches, found = module._prompts(opened, ("one",), 5, 1)
    assert caches == opened
    assert [(p.file, p.seconds, p.speedup.median) for p in found] == [("one", 2.0, 1.0), ("other", 1.0, 2.0)]


def test_where_the_original_is_faster_is_said():
    def step(file, context, speedup):
        return Step(file, context, 1, 0.01, 100, Spread(speedup, speedup, speedup))

    steps = [step("MatMul", 512, 1.0), step("a", 512, 0.7), step("b", 512, 0.9), step("a", 4096, 1.5)]
    assert "in 1 of 2 settings" in slower(steps, {"MatMul"})[0]
    assert slower(steps[3:], {"MatMul"}) == ()


def test_contexts_follow_the_longest_sequence():
    assert Workload().within(None) == (512, 4096)
    assert Workload().within(2048) == (512, 2048)
    assert Workload().within(128) == (128,)
    with pytest.raises(UsageError, match="longest sequence has 128 tokens"):
        Workload((64, 256)).within(128)


def test_what_cannot_be_measured_is_said(files, tmp_path, capsys, monkeypatch):
    written, _, program = files
    with pytest.raises(LoadError, match="names 'absent/llama' as the original"):
        bench([written["dynamic"]])
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(written["dynamic"].read_bytes())
    with pytest.raises(LoadError, match=r"no report of a conversion beside .*--against MODEL"):
        bench([alone])
    (tmp_path / "report.json").write_text(json.dumps({"source": "models/other"}))
    with pytest.raises(LoadError, match=r"of 'other' converted, and the file of 'llama'"):
        bench([alone])
    with pytest.raises(UsageError, match="not named like an ONNX file"):
        bench([tmp_path])
    assert cli.main(["bench", str(alone), "--contexts", "5,x"]) == 2
    assert "--contexts 5,x is no list of numbers" in capsys.readouterr().err
    assert cli.main(["bench", str(tmp_path / "none.onnx")]) == 2
    assert "There is no file" in capsys.readouterr().err
    monkeypatch.setattr(module.frontend, "load_any", lambda name, dtype: program)
    monkeypatch.setattr(module, "_open", lambda path, threads: OtherVocabulary())
    with pytest.raises(UsageError, match="vocabulary of 5 tokens"):
        bench([alone], "llama")


class OtherVocabulary:
    vocabulary = 5
    metadata = {"config": {}}  # noqa: RUF012 - it is read only


def test_the_command_prints_and_draws(found, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "bench", lambda *given, **_: asked.append(given) or found)
    plot = tmp_path / "speed.svg"
    words = ["bench", "a.onnx", "b.onnx", "--against", "the model", "--contexts", "20,6,20", "--batches", "3"]
    assert cli.main([*words, "--rounds", "4", "--threads", "2", "--plot", str(plot)]) == 0
    ((given, against, workload),) = asked
    assert ([str(path) for path in given], against) == (["a.onnx", "b.onnx"], "the model")
    assert workload == Workload((6, 20), (3,), rounds=4, threads=2)
    printed = capsys.readouterr().out
    assert "original, GroupQueryAttention\t" in printed
    assert "context\tbatch\tfile\tms\ttokens/s\tcache bytes\tspeed" in printed
    assert "<svg" in plot.read_text()
    assert cli.main([*words, "--plot", str(plot)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))


def test_a_fused_file_is_sent_back_to_the_one_it_was_made_from(files, tmp_path):
    """``bench`` has no --kernel, and measures the fused kernel with any file."""
    model = onnx.load(files[0]["dynamic"])
    model.opset_import.append(onnx.helper.make_opsetid("mla_compile.cpu", 1))
    onnx.save(model, tmp_path / "fused.onnx")
    with pytest.raises(
        UsageError, match=r"written by mla-compile fuse.* Give the file that it was made from"
    ) as caught:
        bench([tmp_path / "fused.onnx"])
    assert "--kernel" not in str(caught.value)
