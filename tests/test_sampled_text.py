"""Calibration text that a model writes itself: it follows the model's own probabilities, and converts as any text."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass, field

import models
import numpy as np
import pytest
import torch
from small_folder import model_folder, texts

from mla_compile import api, cli
from mla_compile.conversion import request, sampled_text
from mla_compile.conversion.sampled_text import sample_windows
from mla_compile.disk.statistics_cache import StatisticsCache
from mla_compile.errors import LoadError, QualityGateError, UsageError
from mla_compile.progress import Stages, StageTiming
from mla_compile.reporting.reproduction import reproducing
from mla_compile.text.amounts import sampled_count
from mla_compile.text.calibration import cut_windows
from mla_compile.text.processes import Processes

COUNT, LENGTH, SEED = 7, 12, 3
BEGIN = 1


@dataclass
class Shown:
    """Stages as they would be shown."""

    totals: dict[str, int | None] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def started(self, name: str, total: int | None) -> None:
        self.totals[name], self.steps[name] = total, 0
        self._name = name

    def advanced(self, note: str) -> None:
        self.steps[self._name] += 1

    def told(self, line: str) -> None: ...

    def finished(self, timing: StageTiming) -> None:
        self.notes[timing.name] = timing.note

    def abandoned(self) -> None: ...


def sample(program, cache=None, seed=SEED, display=None):
    return sample_windows(program, COUNT, LENGTH, seed, cache, Stages(display))


@pytest.fixture(scope="module")
def likely(programs):
    """A model that finds some tokens much likelier than others, and names the one that begins a text."""
    module = models.llama(num_hidden_layers=1, bos_token_id=BEGIN)
    with torch.no_grad():
        module.lm_head.weight.mul_(40)
    return module, api.inspect(module)[0]


@pytest.fixture(scope="module")
def nameless():
    """Such a model that names no such token."""
    module = models.handwritten(models.NanoGPT)
    with torch.no_grad():
        module.head.weight.mul_(40)
    return module, api.inspect(module, models.example(module))[0]


# ---- what is written


@pytest.mark.parametrize("name", ["likely", "nameless", "mistral-window", "qwen3"])
def test_every_token_is_drawn_by_the_probabilities_that_the_original_gives(name, likely, nameless, programs):
    """Oracle: the same draws by the original's logits of the whole sequence so far, without any cache.

    Rounding moves a probability by some 1e-7, so that a draw that falls between the two is not to be expected. What
    follows the token that begins a text is drawn from the square roots of the probabilities.
    """
    own = {"likely": likely, "nameless": nameless}
    module, program = own.get(name) or (programs[name].module, programs[name].program)
    windows, notes = sample(program)
    assert (windows.shape, windows.dtype, notes) == ((COUNT, LENGTH), torch.int64, ())
    named = program.assets.generation.get("bos_token_id") is not None
    first, rest = (np.random.default_rng(2 * SEED + part) for part in (0, 1))
    with torch.no_grad():
        for place in range(1, LENGTH):
            exact = models.logits(module, windows[:, :place])[:, -1].double().softmax(-1).numpy()
            begins = named and place == 1
            exact, random = (exact**0.5, first) if begins else (exact, rest)
            assert windows[:, place].tolist() == [random.choice(len(row), p=row / row.sum()) for row in exact]


def test_windows_begin_as_texts_do_and_then_differ(likely, nameless):
    windows, _ = sample(likely[1])
    assert set(windows[:, 0].tolist()) == {BEGIN}
    assert len(set(windows[:, 2].tolist())) > 1
    windows, _ = sample(nameless[1])
    assert len(set(windows[:, 0].tolist())) > COUNT // 2


def test_a_seed_gives_the_same_text_and_another_one_another(likely):
    first, again, other = (sample(likely[1], seed=seed)[0] for seed in (SEED, SEED, SEED + 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_window_may_be_no_longer_than_its_first_tokens(likely):
    windows, _ = sample_windows(likely[1], COUNT, 2, SEED, None, Stages())
    assert windows.shape == (COUNT, 2)


def test_caches_take_no_more_than_a_part_of_the_memory(likely, monkeypatch):
    """Rows of 2 * 16 keys and values of 2 heads in float32, the old and the new cache: three windows at a time."""
    batches = []
    right = sampled_text.generate
    monkeypatch.setattr(
        sampled_text,
        "generate",
        lambda decoder, prompts, *a, **k: batches.append(len(prompts)) or right(decoder, prompts, *a, **k),
    )
    row = 2 * 2 * models.WIDTH // models.HEADS * 4
    monkeypatch.setattr(sampled_text, "free_memory", lambda _: 8 * (3 * 2 * LENGTH * row) + 1)
    shown = Shown()
    windows, _ = sample(likely[1], display=shown)
    assert batches == [3, 3, 3, 3, 1, 1]  # first the first token
    assert windows.shape == (COUNT, LENGTH)
    assert shown.totals == shown.steps == {"sample text": LENGTH - 1}
    monkeypatch.setattr(sampled_text, "free_memory", lambda _: 1)
    batches.clear()
    sample(likely[1])
    assert batches == [1] * 2 * COUNT


@pytest.mark.parametrize("tokens", [1, 16, 100, 16 * 9, 16 * 17, 16 * 143, 16 * 160, 16 * 1000])
def test_as_much_is_written_as_is_used(tokens, likely):
    config = api.make_config(calibration_tokens=tokens, seq_len=16)
    text = cut_windows(likely[1], models.tokens(sampled_count(config, 16), 16), None, config)
    assert text.separate
    assert len(text.calibration) == max(1, tokens // 16)
    assert len(text.calibration) + len(text.held_out) == sampled_count(config, 16)


# ---- what was written once


def test_what_was_written_is_read_the_next_time(likely, tmp_path, monkeypatch):
    cache, shown = StatisticsCache(tmp_path), Shown()
    first, _ = sample(likely[1], cache, display=shown)
    (file,) = tmp_path.iterdir()
    assert shown.notes == {"sample text": f"{COUNT * LENGTH} tokens, computed, saved to {file}"}
    with monkeypatch.context() as patch:
        patch.setattr(sampled_text, "with_plain_caches", lambda program: pytest.fail("it was written again"))
        again, notes = sample(likely[1], cache, display=shown)
    assert torch.equal(first, again)
    assert notes == ()
    assert shown.notes == {"sample text": f"{COUNT * LENGTH} tokens, reused from {file}"}
    sample(likely[1], cache, seed=SEED + 1)
    assert len([*tmp_path.iterdir()]) == 2


def test_a_damaged_file_is_told_and_written_anew(likely, tmp_path):
    cache = StatisticsCache(tmp_path)
    first, _ = sample(likely[1], cache)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again, (note,) = sample(likely[1], cache)
    assert torch.equal(first, again)
    assert note.startswith(f"saved windows of text could not be read and were made anew ({file}: ")
    assert sample(likely[1], cache)[1] == ()


# ---- conversions


def test_a_conversion_by_it_is_that_by_the_same_windows(likely):
    program = likely[1]
    how = {"seq_len": LENGTH, "calibration_tokens": 8 * LENGTH, "cache_ratio": 0.5, "statistics_cache": False}
    sampled = api.compile(program.exported, calibration="sampled", **how)
    count = sampled_count(api.make_config(**{k: how[k] for k in ("seq_len", "calibration_tokens")}), LENGTH)
    program = api.inspect(program.exported)[0]  # as the conversion reads it: an archive names no first token
    given = api.compile(
        program.exported, calibration=sample_windows(program, count, LENGTH, 0, None, Stages())[0], **how
    )
    assert sampled.report.config["method"] == "fisher"
    for name, value in given.module.state_dict().items():
        assert torch.equal(sampled.module.state_dict()[name], value), name
    assert (sampled.report.quality.sampled, given.report.quality.sampled) == (True, False)
    assert sampled.report.quality.ratio == given.report.quality.ratio
    assert f"{LENGTH - 1} held-out sampled tokens)" in str(sampled.report)
    assert f"{LENGTH - 1} held-out tokens)" in str(given.report)


NO_TEXT = "no calibration text was given, and the model wrote its own"


@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "transmla"}, {"selection": "2-norm"}, {"polish_steps": 1}, {"layout": "deepseek"}],
    ids=str,
)
def test_it_is_written_where_text_is_needed_and_none_is_given(likely, settings):
    how = {"seq_len": LENGTH, "calibration_tokens": 8 * LENGTH, "check": False, **settings}
    report = api.compile(likely[0], **how).report
    assert report.quality.sampled
    assert sum(warning.startswith(NO_TEXT) for warning in report.warnings) == 1
    asked = api.compile(likely[0], calibration="sampled", **how).report
    assert asked.plans == report.plans
    assert not any(warning.startswith(NO_TEXT) for warning in asked.warnings)


@pytest.mark.parametrize("settings", [{"method": "mha2mla"}, {"exact": True}, {"svd": "split"}], ids=str)
def test_it_is_not_written_where_none_is_needed(likely, settings, monkeypatch):
    monkeypatch.setattr(sampled_text, "with_plain_caches", lambda program: pytest.fail("text was written"))
    report = api.compile(likely[0], check=False, **settings).report
    assert report.quality is None
    assert not any(warning.startswith(NO_TEXT) for warning in report.warnings)


def test_a_limit_of_perplexity_holds_on_it(likely):
    how = {"seq_len": LENGTH, "calibration_tokens": 8 * LENGTH, "check": False, "cache_ratio": 0.2}
    with pytest.raises(QualityGateError):
        api.compile(likely[0], max_perplexity_ratio=0.5, **how)


def test_what_may_be_an_encoder_is_refused_before_it_is_read():
    with pytest.raises(UsageError, match="The method 'fisher' chooses by what the model does on text"):
        api.compile(models.llama(), encoders=True, method="fisher")


def test_what_turns_out_to_be_no_encoder_writes_alone(likely, monkeypatch):
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    monkeypatch.setattr(request, "join_processes", lambda: Processes(0, 2))
    with pytest.raises(UsageError, match="each of them would write the same one"):
        api.compile(likely[1].exported, encoders=True, share=True)


@pytest.mark.parametrize("method", ["transmla", "mha2mla"])
def test_other_methods_take_it_too(likely, method):
    how = {"seq_len": LENGTH, "calibration_tokens": 8 * LENGTH, "cache_ratio": 0.75, "check": False}
    report = api.compile(likely[0], calibration="sampled", method=method, **how).report
    assert report.quality.sampled
    assert not any("without calibration text" in warning for warning in report.warnings)


def test_a_model_in_bfloat16_writes_too():
    module = models.llama(num_hidden_layers=1).to(torch.bfloat16)
    how = {"seq_len": LENGTH, "calibration_tokens": 8 * LENGTH, "cache_ratio": 0.5, "check": False}
    assert api.compile(module, calibration="sampled", **how).report.quality.sampled


def test_longer_windows_than_a_model_runs_are_refused(programs):
    with pytest.raises(UsageError, match="Windows of 400 tokens are longer than"):
        api.compile(programs["nanogpt-table"].program.exported, calibration="sampled", seq_len=400)


def test_processes_that_share_a_text_are_refused(likely, monkeypatch):
    monkeypatch.setattr(request, "join_processes", lambda: Processes(0, 2))
    with pytest.raises(UsageError, match="each of them would write the same one"):
        api.compile(likely[1].exported, calibration="sampled", share=True)


def test_only_a_calibration_is_written_by_the_model(likely):
    with pytest.raises(LoadError, match="There is no text file 'sampled'"):
        api.compile(likely[1].exported, calibration="sampled", finetune="sampled", tokenizer="examples/tiny-llama")


# ---- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sampled") / "model"
    model_folder(path)
    return path


def said(*words: object) -> tuple[str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert cli.main([str(w) for w in words]) == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


SIZES = ("--calibration-tokens", 8 * LENGTH, "--cache-ratio", 0.75)


@pytest.mark.usefixtures("read_once")
def test_the_command_line_says_whose_text_it_was(folder, tmp_path):
    words = ("--calibration", "sampled", "--seq-len", LENGTH, *SIZES)
    out, err = said("convert", folder, "--out", tmp_path / "model.onnx", *words, "--no-verify")
    assert "perplexity, held-out sampled text\t" in out
    assert "sample text" in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["quality"]["sampled"], report["quality"]["tokens"]) == (True, LENGTH - 1)
    line = reproducing(report)[0]
    assert line.startswith("mla-compile model --out model.onnx ")
    assert line.endswith("--calibration sampled")
    page = (tmp_path / "report.html").read_text()
    assert f"{LENGTH - 1} held-out sampled tokens" in page
    planned = json.loads(said("plan", folder, *words, "--json")[0])
    assert [row["kv_rank"] for row in planned["layers"]] == [row["kv_rank"] for row in report["layers"]]


@pytest.mark.usefixtures("read_once")
def test_conversions_on_the_spot_are_calibrated_by_it_too(folder, tmp_path):
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts(0, 8)))
    words = ("--methods", "fisher", "--cache-ratios", 0.75, "--calibration", "sampled", "--seq-len", LENGTH)
    given = (folder, "--text", tmp_path / "text.txt", *words, "--calibration-tokens", 8 * LENGTH, "--json")
    found = json.loads(said("eval", *given)[0])
    assert [row["method"] for row in found["models"]] == ["fisher"]
    assert found["warnings"] == []
