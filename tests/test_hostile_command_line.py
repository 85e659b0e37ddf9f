"""What a careless or hostile user types: absurd numbers, files that may not be read, a pipe that nobody reads."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest

from mla_compile.cli import main, program
from mla_compile.config import make_config
from mla_compile.errors import UsageError
from mla_compile.runtime.generate import Sampling, _choose


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small model as transformers saves it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "modèle 模型"
    models.llama(num_hidden_layers=1).save_pretrained(folder)
    return folder


def told(*words: object, code: int = 2) -> str:
    """What one command says on standard error; it prints nothing else."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([str(w) for w in words]) == code, err.getvalue()
    assert not out.getvalue()
    (line,) = err.getvalue().splitlines()
    assert line.startswith("mla-compile: ")
    assert line.endswith(".")
    return line


def process(*words: object, **more: object) -> subprocess.Popen[str]:
    """The program in a process of its own."""
    command = [sys.executable, "-m", "mla_compile", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.usefixtures("binding_permissions")
@pytest.mark.parametrize("name", ["model", "model.pt2", "text.txt"])
def test_a_file_that_may_not_be_read_is_said_to_be(name, model, tmp_path):
    path = tmp_path / name
    path.write_text("secret")
    path.chmod(0)
    words = {"text.txt": ("plan", model, "--calibration", path)}
    assert f"'{path}' cannot be read (Permission denied)." in told(*words.get(name, ("inspect", path)))


def test_what_the_system_refuses_is_called_so(tmp_path):
    """Errors of the system that nothing else has explained: no talk of writing where something was read."""
    for number, phrase in [(13, "cannot be opened"), (2, "cannot be used"), (36, "cannot be used"), (28, "Free some")]:
        assert phrase in program._explained(OSError(number, os.strerror(number), str(tmp_path)))
        assert str(tmp_path) in program._explained(OSError(number, os.strerror(number), str(tmp_path)))
    assert program._explained(OSError("odd")).startswith("A file could not be read or written (odd).")


def test_a_name_that_is_too_long(model):
    assert "File name too long" in told("inspect", "a" * 300 + "/b")


@pytest.mark.parametrize("setting", [{"seed": 2**63}, {"polish_steps": 10**20}, {"seed": -1}])
def test_numbers_that_nothing_could_hold(setting):
    with pytest.raises(UsageError, match="is not allowed: input should be"):
        make_config(method="mha2mla", **setting)


@pytest.mark.parametrize("words", [("--threads", 10**17), ("--temperature", "nan"), ("--top-p", "nan")])
def test_absurd_options_are_refused_when_they_are_read(words, tmp_path):
    (tmp_path / "model.onnx").write_text("")
    assert f"Invalid value for '{words[0]}'" in told("run", tmp_path / "model.onnx", "--prompt", "x", *words)


def test_choices_are_told_without_words_of_a_library(model):
    line = told("plan", model, "--method", "mha2mla", "--machine", "tpu")
    assert "Value error" not in line
    assert "'tpu' is not one of 'cpu', 'gpu'" in line


@pytest.mark.parametrize("temperature", [1e-320, 1e-300, 1e300, float("inf")])
def test_any_temperature_chooses_a_token(temperature):
    """Next to 0 it is the most likely one; far above, any."""
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.5)):
        (token,) = _choose(logits, Sampling(temperature, top_k, top_p), np.random.default_rng(0)).tolist()
        assert token == 1 if temperature < 1 else token in (0, 1, 2)


@pytest.mark.parametrize(("word", "meant"), [("inspct", "inspect"), ("convret", "convert"), ("exprot", "export")])
def test_a_mistyped_command_is_no_model(word, meant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([word, "model"]) == 2
    assert capsys.readouterr().err.endswith(
        f"There is no command '{word}', and no such file. Did you mean '{meant}'?\n"
    )
    (tmp_path / word).mkdir()
    assert main([word, "--out", str(tmp_path / "out.onnx"), "--method", "mha2mla"]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_nobody_reads_the_result(model):
    """As in ``mla-compile ... | head``: the program ends as others do, and says nothing."""
    child = process("inspect", model / "config.json", "--json")
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait() == 141
    child.stderr.close()


ENDS = {signal.SIGINT: (130, "mla-compile: Interrupted."), signal.SIGTERM: (143, None)}


@pytest.mark.parametrize("sent", ENDS)
def test_an_interrupt_of_the_real_program_leaves_no_result(sent, model, tmp_path):
    def interruptible() -> None:  # programs that a shell starts in the background are not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    words = (model, "--out", tmp_path / "new" / "out.onnx", "--method", "mha2mla")
    child = process(*words, preexec_fn=interruptible)
    first = child.stderr.readline()  # a stage is done: it is in the middle
    child.send_signal(sent)
    _, rest = child.communicate(timeout=300)
    code, sentence = ENDS[sent]
    assert child.returncode == code, first
    assert sentence is None or rest.splitlines()[-1] == sentence
    assert "Traceback" not in rest
    left = {p.name for p in (tmp_path / "new").iterdir()} if (tmp_path / "new").exists() else set()
    assert left <= ({".out.onnx.layers"} if sent == signal.SIGTERM else set())  # finished layers, for the next try


@pytest.mark.parametrize("name", ["out.onnx", "folder"])
def test_a_real_limit_of_file_sizes_leaves_nothing(name, model, tmp_path):
    """A limit of the system, not a stand-in for one: a disk that is full says the same in other words."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    words = (model, "--out", tmp_path / "new" / name, "--method", "mha2mla", "--no-verify", "-q")
    child = process(*words, preexec_fn=limited)
    out, err = child.communicate(timeout=300)
    assert (child.returncode, out) == (2, ""), err
    assert err.startswith("mla-compile: ")
    assert "could not be written" in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["", ".", "/"])
def test_a_name_that_is_none(out, model):
    assert "names no file. Name a .onnx file, or a folder." in told(model, "--out", out, "--method", "mha2mla")


def test_a_folder_that_does_not_run_says_what_does(model, tmp_path):
    assert "runs here. A DeepSeek checkpoint runs in transformers" in told("run", model, "--prompt", "x")
    (tmp_path / "b.onnx").touch()
    assert f"Name a file in it, such as '{tmp_path / 'b.onnx'}'." in told("run", tmp_path, "--prompt", "x")


def test_names_in_any_script(model, tmp_path):
    out = tmp_path / "выход 出力" / "модель.onnx"
    assert main([str(model), "--out", str(out), "--method", "mha2mla", "--no-verify", "-q"]) == 0
    assert out.is_file()
    shutil.rmtree(out.parent)
