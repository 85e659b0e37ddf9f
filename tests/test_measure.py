"""``mla-compile eval`` on a pico model whose vocabulary is words: tables, objects, plots, conversions on the spot."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch

import mla_compile
from mla_compile.artifacts.runnable import RunnableModel, open_model
from mla_compile.cli import main
from mla_compile.errors import LoadError, UsageError
from mla_compile.evaluation import measure as measuring
from mla_compile.evaluation import plot, trial
from mla_compile.evaluation.measure import Measurement, ModelScore
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.text.evaluate import Comparison, Perplexity

LENGTH = 16
ROUNDING = 1e-5  # of a perplexity: float32 through two layers in another order of operations
SIZES = ("--seq-len", LENGTH)

pytestmark = pytest.mark.usefixtures("read_once")


def command(*words: object) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


def measured(*words: object) -> dict:
    code, out, err = command("eval", *words, *SIZES, "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    return json.loads(out)


def write_tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and two texts."""
    place = tmp_path_factory.mktemp("place")
    model = models.llama(num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # so that some tokens are likelier than others
    model.save_pretrained(place / "model")
    write_tokenizer(place / "model", [f"w{i}" for i in range(models.VOCABULARY)])
    for name, seed in (("text", 0), ("calibration", 1)):
        words = random.Random(seed).choices(range(models.VOCABULARY), k=20 * LENGTH)
        (place / f"{name}.txt").write_text(" ".join(f"w{i}" for i in words))
    return place


def convert(place: Path, method: str) -> mla_compile.CompiledModel:
    settings = {"cache_ratio": 0.75, "seq_len": LENGTH, "calibration_tokens": 8 * LENGTH}
    calibration = place / "calibration.txt"
    return mla_compile.compile(place / "model", calibration=calibration, check=False, method=method, **settings)


@pytest.fixture(scope="module")
def converted(place, read_once):
    """A folder with a conversion as a file, the same as a folder, and that with other words."""
    compiled = convert(place, "mha2mla")
    compiled.to_onnx(place / "converted" / "model.onnx")
    compiled.save(place / "converted" / "folder")
    shutil.copytree(place / "converted" / "folder", place / "converted" / "other")
    write_tokenizer(place / "converted" / "other", [f"v{i}" for i in range(models.VOCABULARY)])
    return place / "converted"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: [", "is damaged"),
        ("[1]", "holds no settings"),
        ("", "holds no settings"),
        ("method: [1]", "names no method"),
        ("cache_ratio: half", "names no method or cache ratio"),
    ],
)
def test_damaged_settings_of_a_folder_are_told(converted, tmp_path, content, reason):
    folder = shutil.copytree(converted / "folder", tmp_path / "folder")
    (folder / "mla_config.yaml").write_text(content)
    with pytest.raises(LoadError, match=reason):
        open_model(str(folder))


@pytest.fixture(scope="module")
def windows(place):
    ids = [int(word[1:]) for word in (place / "text.txt").read_text().split()]
    return torch.tensor(ids).view(-1, LENGTH)


@pytest.fixture(scope="module")
def original(place, windows):
    """Log-probabilities of the original, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)


def loss(predicted: torch.Tensor, windows: torch.Tensor) -> float:
    return -float(predicted.gather(-1, windows[:, 1:, None]).mean())


# ---- several models


def test_models_of_every_kind_in_one_object(place, converted, windows, original):
    """Oracle: the definitions, on all logits of the text at once."""
    names = [converted / "model.onnx", converted / "folder", place / "model"]
    found = measured(*names, "--original", place / "model", "--text", place / "text.txt")
    assert found.keys() == {"text", "tokens", "seq_len", "original", "models", "warnings"}
    assert (found["text"], found["tokens"], found["seq_len"]) == (str(place / "text.txt"), 20 * (LENGTH - 1), LENGTH)
    base = found["original"]
    assert base["loss"] == pytest.approx(loss(original, windows), rel=ROUNDING)
    assert (base["model"], base["runtime"]) == (str(place / "model"), "torch")

    file, folder, same = found["models"]
    assert [row["model"] for row in found["models"]] == list(map(str, names))
    assert [row["runtime"] for row in found["models"]] == ["onnxruntime", "torch", "torch"]
    logits = torch.from_numpy(OnnxDecoder(names[0]).logits(windows.numpy()))[:, :-1]
    predicted = logits.double().log_softmax(-1)
    divergence = float((original.exp() * (original - predicted)).sum(-1).mean())
    agreement = float((original.argmax(-1) == predicted.argmax(-1)).double().mean())
    for row in (file, folder):
        assert row["loss"] == pytest.approx(loss(predicted, windows), rel=ROUNDING)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / base["perplexity"])
        assert row["kl"] == pytest.approx(divergence, rel=1e-3)  # a small difference of float32 logits
        assert row["top1"] == pytest.approx(agreement, abs=0.01)  # of 300 tokens, three may be near ties
        assert row["cache_kept"] == row["cache_bytes_per_token"] / base["cache_bytes_per_token"] == 0.75
        assert (row["method"], row["cache_ratio"]) == ("mha2mla", 0.75)
        assert row["seconds"] > 0
    assert divergence > 0.01
    assert (same["kl"], same["top1"], same["perplexity_ratio"], same["cache_kept"]) == (0.0, 1.0, 1.0, 1.0)
    assert same["method"] is None


def test_without_an_original_nothing_is_compared(place, converted):
    found = measured(converted / "folder", converted / "model.onnx", "--text", place / "text.txt")
    assert found["original"] is None
    for row in found["models"]:
        assert [row[key] for key in ("kl", "top1", "perplexity_ratio", "cache_kept")] == [None] * 4
    _, out, _ = command("eval", converted / "folder", "--text", place / "text.txt", *SIZES, "-q")
    assert out.splitlines()[0].split("\t") == ["", "runtime", "tokens", "cache bytes/token", "perplexity"]


def test_words_of_another_model_are_refused(place, converted):
    """As many words, but others: every id would mean something else."""
    code, out, err = command("eval", converted / "folder", converted / "other", "--text", place / "text.txt", "-q")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "have different vocabularies, so that figures per token cannot be compared. Measure each by" in err


def test_no_more_is_measured_than_was_asked_for(place, converted):
    words = (converted / "folder", "--text", place / "text.txt", "--json", "-q")
    code, out, err = command("eval", *words, "--max-tokens", LENGTH // 2)
    assert (code, err) == (0, "")
    assert (json.loads(out)["tokens"], json.loads(out)["seq_len"]) == (LENGTH // 2 - 1, LENGTH // 2)
    code, out, err = command("eval", *words, "--max-tokens", LENGTH - 1, "--seq-len", LENGTH)
    assert (code, out) == (2, "")
    assert f"One window of --seq-len {LENGTH} is more than --max-tokens {LENGTH - 1}." in err


# ---- conversions on the spot


@pytest.mark.parametrize(
    "words",
    [("--cache-ratios", ""), ("--calibration", ""), ("--calibration-tokens", 9), ("--no-cache",), ("--onnxruntime",)],
)
def test_options_of_conversions_need_methods(place, words):
    code, out, err = command("eval", place / "model", "--text", place / "text.txt", *words)
    assert (code, out) == (2, "")
    assert f"{words[0]} is about conversions made on the spot, and no --methods were given" in err


def test_conversions_on_the_spot_are_those_of_convert(place, converted, windows, monkeypatch, tmp_path):
    """Oracle: each converted by itself; and the model is looked at once, and nothing is written."""
    recognised = []
    right = trial.recognise
    monkeypatch.setattr(trial, "recognise", lambda program: recognised.append(program) or right(program))
    monkeypatch.chdir(tmp_path)
    before = sorted(place.rglob("*"))
    chosen_by = ("--calibration", place / "calibration.txt", "--calibration-tokens", 8 * LENGTH)
    words = ("--methods", "mha2mla,fisher", "--cache-ratios", 0.75, "--onnxruntime")
    found = measured(place / "model", "--text", place / "text.txt", *chosen_by, *words)
    assert len(recognised) == 1
    assert sorted(place.rglob("*")) == before
    assert not list(tmp_path.iterdir())
    assert [(row["method"], row["runtime"]) for row in found["models"]] == [
        (method, runtime) for method in ("mha2mla", "fisher") for runtime in ("torch", "onnxruntime")
    ]
    modules = {"mha2mla": mla_compile.load(converted / "folder"), "fisher": convert(place, "fisher").module}
    for row in found["models"]:
        module = modules[row["method"]]
        with torch.no_grad():
            predicted = module(windows).logits[:, :-1].double().log_softmax(-1)
        assert row["loss"] == pytest.approx(loss(predicted, windows), rel=ROUNDING)
        assert row["cache_bytes_per_token"] == 4 * sum(module.rows)
        assert row["cache_kept"] == row["cache_bytes_per_token"] / found["original"]["cache_bytes_per_token"]
        assert row["cache_ratio"] == 0.75


def test_conversions_are_shown_as_a_table(place):
    words = ("--text", place / "text.txt", "--methods", "mha2mla", "--cache-ratios", "0.75,0.5", *SIZES, "-q")
    code, out, err = command("eval", place / "model", *words)
    assert (code, err) == (0, "")
    head, *rows = [line.split("\t") for line in out.splitlines()]
    assert head == ["", "runtime", "tokens", "cache bytes/token", "cache kept", "perplexity", "ratio", "KL", "top-1"]
    assert [row[0] for row in rows] == ["original", "mha2mla 0.75", "mha2mla 0.5"]
    assert [row[4] for row in rows] == ["100.00%", "75.00%", "50.00%"]
    assert rows[0][6:] == ["1.0000", "", ""]
    for row in rows[1:]:
        assert float(row[6]) == pytest.approx(float(row[5]) / float(rows[0][5]), abs=1e-4)  # as many digits are shown
        assert float(row[7]) > 0


def test_calibrating_on_the_text_itself_is_told(place, tmp_path):
    shutil.copy(place / "text.txt", tmp_path / "copy.txt")
    words = ("--methods", "mha2mla", "--cache-ratios", 0.75, "--calibration", tmp_path / "copy.txt")
    _, _, err = command("eval", place / "model", "--text", place / "text.txt", *words, *SIZES, "-q")
    assert err == "warning: the conversions were calibrated on the text they are measured on\n"


def test_a_dataset_is_calibrated_on_as_a_file_of_its_text(place, monkeypatch):
    """What is read to compare it with the other text is not lost."""
    document = (place / "calibration.txt").read_text()
    library = SimpleNamespace(load_dataset=lambda *_, **__: iter([{"text": document}]))
    monkeypatch.setitem(sys.modules, "datasets", library)
    words = ("--text", place / "text.txt", "--methods", "mha2mla", "--cache-ratios", 0.75, "--no-cache")
    file, dataset = (
        measured(place / "model", *words, "--calibration", calibration)["models"][0]["loss"]
        for calibration in (place / "calibration.txt", "hf:stories")
    )
    assert dataset == file


def test_what_does_not_fit_is_left_out_and_told(place):
    words = ("--text", place / "text.txt", "--methods", "mha2mla", "--cache-ratios", "0.01,0.75")
    found = measured(place / "model", *words)
    assert [row["cache_ratio"] for row in found["models"]] == [0.75]
    (warning,) = found["warnings"]
    assert warning.startswith("mha2mla 0.01 was left out: A cache ratio of 0.01 leaves no room for a latent in ")
    code, out, err = command("eval", place / "model", *words[:-1], 0.01, *SIZES, "-q")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "leaves no room for a latent" in err


# ---- plots


def point(method: str | None, kept: int, ratio: float, runtime: str = "torch", name: str = "m") -> ModelScore:
    opened = RunnableModel(name, runtime, lambda ids: ids, kept, None, 1, 1, None, method=method)
    return ModelScore(opened, Comparison(Perplexity(10 * ratio, math.log(10 * ratio), 9), 0.0, 1.0, 0.0))


def figures(*models: ModelScore) -> Measurement:
    return Measurement("text.txt", 9, 10, point(None, 100, 1.0, name="original"), models)


RESULT = figures(point("fisher", 50, 1.1), point("fisher", 25, 1.5), point("mha2mla", 50, 3.0), point(None, 40, 2.0))


def test_a_line_per_method_and_the_original_at_one():
    assert plot.curves(RESULT) == {
        "fisher": [(0.25, pytest.approx(1.5)), (0.5, pytest.approx(1.1))],
        "mha2mla": [(0.5, pytest.approx(3.0))],
        "m": [(0.4, pytest.approx(2.0))],
    }
    (axes,) = plot.figure(RESULT).axes
    assert axes.get_yscale() == "log"
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert list(lines) == ["original", "fisher", "mha2mla", "m"]
    assert np.allclose(lines["original"][:, 1], 1.0)
    assert np.allclose(lines["fisher"], [(0.25, 1.5), (0.5, 1.1)])


def test_runtimes_are_told_apart_where_there_are_several():
    both = figures(point("fisher", 50, 1.1), point("fisher", 50, 1.1, "onnxruntime"))
    assert list(plot.curves(both)) == ["fisher, torch", "fisher, onnxruntime"]


@pytest.mark.parametrize(("name", "start"), [("new/a.svg", b"<?xml"), ("new/a.png", b"\x89PNG")])
def test_the_same_figures_give_the_same_file(name, start, tmp_path):
    contents = []
    for _ in range(2):
        plot.draw(RESULT, tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0].startswith(start)
    assert contents[0] == contents[1]
    assert len(list(tmp_path.rglob("*"))) == 2  # the folder and the file


def test_a_plot_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(UsageError, match=r"could not be written \(No space left on device\)\. Free some room"):
        plot.draw(RESULT, tmp_path / "new" / "a.svg")
    assert not list(tmp_path.iterdir())


def test_eval_draws_and_replaces_only_when_told(place, converted, tmp_path):
    words = ("--original", place / "model", "--text", place / "text.txt", *SIZES, "-q", "--plot", tmp_path / "a.svg")
    assert command("eval", converted / "folder", *words)[0] == 0
    (tmp_path / "a.svg").write_text("mine")
    code, out, err = command("eval", converted / "folder", *words)
    assert (code, out) == (2, "")
    assert "exists already. Choose another name, or pass --force to replace it." in err
    assert (tmp_path / "a.svg").read_text() == "mine"
    assert command("eval", converted / "folder", *words, "--force")[0] == 0
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")


def test_without_matplotlib_the_error_says_how_to_get_it(place, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ("--original", place / "model", "--text", place / "text.txt", "--plot", tmp_path / "a.svg")
    code, _, err = command("eval", place / "model", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "Run: pip install 'mla-compile[plot]'." in err


def test_a_missing_tokenizer_is_noticed_before_the_other_models_are_read(monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("one two")
    read = []
    monkeypatch.setattr(measuring, "require_there", lambda _: None)
    monkeypatch.setattr(measuring, "open_model", lambda name, *_: read.append(name) or SimpleNamespace(tokenizer=None))
    with pytest.raises(LoadError, match="comes without a tokenizer"):
        measuring.measure(["small.onnx"], measuring.Sample(tmp_path / "text.txt"), original="large")
    assert read == ["small.onnx"]
