"""What a person sees and a program reads: every command has the same options, one JSON object, tables that fit."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import models
import pytest

from mla_compile import display
from mla_compile.cli import main
from mla_compile.cli.program import COMMANDS, app
from mla_compile.display.layers import _duration

DURATIONS = {
    59: "less than a minute",
    80: "about a minute",
    7199: "about 120 minutes",
    108_000: "about 30 hours",
    640_000: "about 7 days",
}
TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-7]|4[0-7]|9[0-7]|10[0-7]|38|48)(?:;[0-9;]*)?m")


@pytest.mark.parametrize("seconds", DURATIONS)
def test_long_times_are_told_in_large_units(seconds):
    assert _duration(seconds) == DURATIONS[seconds]


def command(*words: object, code: int = 0) -> tuple[str, str]:
    """Run the command line in this process: standard output and standard error."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([str(w) for w in words]) == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def test_the_command_tree_is_the_table_of_commands():
    assert [c.name for c in app.registered_commands] == [*COMMANDS]
    assert not app.registered_groups


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options(name):
    out, err = command(name, "--help")
    words = {*out.replace("│", " ").replace(",", " ").split()}
    assert {"--json", "--quiet", "-q", "--verbose", "-v", "--help"} <= words
    assert not err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    from typer.main import get_command

    parameters = get_command(app).commands[name].params
    assert not [p.name for p in parameters if not p.help]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Everything that commands are given below; what ``convert --json`` printed is in ``converted.json``."""
    place = tmp_path_factory.mktemp("terminal")
    models.llama(num_hidden_layers=1, vocab_size=1024).save_pretrained(place / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "model" / name).write_bytes((TINY / name).read_bytes())
    (place / "text.txt").write_text("One day a cat saw a big red ball and ran to it. " * 60)
    out, _ = command(place / "model", "--out", place / "folder", "--exact", "--no-verify", "--json")
    (place / "converted.json").write_text(out)
    command("export", place / "folder", "--out", place / "model.onnx", "-q")
    return place


RESULTS = {
    "convert": ("{place}/model --out {out}/folder --method mha2mla --no-verify", {"layers", "config"}),
    "inspect": ("inspect {place}/model", {"model", "layers"}),
    "plan": ("plan {place}/model --method mha2mla", {"layers", "cache_ratio", "conversion"}),
    "run": ("run {place}/model.onnx --prompt One --max-new-tokens 2", {"texts", "cache_bytes"}),
    "eval": ("eval {place}/model.onnx --text {place}/text.txt --seq-len 16 --max-tokens 64", {"models"}),
    "bench": ("bench {place}/model.onnx --contexts 8 --batches 1 --rounds 1", {"files", "steps"}),
    "finetune": (
        "finetune {place}/folder --data {place}/text.txt --out {out}/tuned --seq-len 16 --tokens 64 --batch 2 "
        "--tracker none --eval-windows 1",
        {"training"},
    ),
    "export": ("export {place}/folder --out {out}/model.onnx", {"verification"}),
    "quantize": ("quantize {place}/model.onnx --out {out}/small.onnx", {"onnx", "weights", "error"}),
    "tensorrt": (
        "tensorrt {place}/folder --out {out}/rt.onnx --max-length 32 --max-prompt 8 --max-batch 1",
        {"onnx", "build_command"},
    ),
    "report": ("report {place}/folder --out {out}/page.html", {"page"}),
}
ELSEWHERE = {"build-plugin", "fuse", "verify"}
"""Need a compiler, for which see tests/tensorrt/test_plugin_library.py and tests/runtime/test_fused_cpu.py, and a
DeepSeek checkpoint, which tests/test_checkpoint.py has."""


def test_every_command_is_run():
    assert RESULTS.keys() | ELSEWHERE == COMMANDS.keys()


@pytest.mark.parametrize("name", RESULTS)
def test_json_is_one_object_and_nothing_else(name, place, tmp_path):
    words, keys = RESULTS[name]
    out, err = command(*words.format(place=place, out=tmp_path).split(), "--json")
    result = json.loads(out)
    assert keys <= result.keys(), sorted(result)
    assert "Traceback" not in err


def test_more_is_told_on_standard_error_when_asked_for(place):
    out, err = command("plan", place / "model", "--method", "mha2mla", "--json", "-v")
    assert json.loads(out)
    assert "versions: python " in err
    assert re.search(r"self_attn is converted: \d+ query and \d+ key/value heads\.", err)
    assert re.search(r"self_attn: a latent of \d+ numbers \(\d+ lose nothing\)", err)
    assert "versions" not in command("plan", place / "model", "--method", "mha2mla")[1]  # and it ends with the command


def test_quiet_commands_say_nothing_beside_their_result(place):
    for words in (("plan", place / "model", "--method", "mha2mla"), ("run", place / "model.onnx", "--prompt", "One")):
        out, err = command(*words, "-q")
        assert out
        assert err == ""


def test_where_an_error_happened_is_shown_when_asked_for(place):
    words = ("inspect", place / "none")
    assert "Traceback" not in command(*words, "-v", code=2)[1]
    told = command(*words, "-vv", code=2)[1]
    assert "Traceback" in told
    assert told.splitlines()[-1].startswith("mla-compile: There is no file or folder")


def test_a_folder_is_run_as_the_file_made_of_it(place):
    words = ("--prompt", "One day", "--prompt", "A", "--max-new-tokens", 12, "--json")
    of_folder, of_file = (json.loads(command("run", place / name, *words)[0]) for name in ("folder", "model.onnx"))
    assert of_folder["texts"] == of_file["texts"]
    for key in ("new_tokens", "cache_bytes_per_token", "cache_bytes"):
        assert of_folder[key] == of_file[key]
    for option in (("--threads", 1), ("--provider", "cpu"), ("--kernel", "auto")):
        assert "runs in PyTorch" in command("run", place / "folder", *words, *option, code=2)[1]
    assert "Raise --max-length" in command("run", place / "folder", *words, "--max-length", 4, code=2)[1]


def test_what_comes_next_is_told_beside_the_result(place):
    out, err = command("inspect", place / "model")
    assert "sizes:" not in out
    assert f"1 of 1 attention layers convert; sizes: mla-compile plan {place / 'model'} --calibration TEXT" in err
    assert "convert" not in command("inspect", place / "model", "-q")[1]
    out, err = command("plan", place / "model", "--method", "mha2mla", "--context", 64)
    assert "speed is estimated: a step after 64 tokens, batch 1" in err
    told = command("plan", place / "model" / "config.json")[1]
    assert re.search(r"takes less than a minute besides verification \([0-9.]+ [MG]FLOP in float64, one core\)", told)
    converted = command(place / "model", "--out", place / "seen", "--method", "mha2mla", "--no-verify")[0]
    assert f"to look at\t{place / 'seen' / 'report.html'}" in converted


def test_less_and_more_exclude_each_other(place):
    assert "exclude each other" in command("inspect", place / "model", "-q", "-v", code=2)[1]


def on_a_terminal(words: str, columns: int, **more: str) -> str:
    """Run some Python in a process whose three streams are a terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    environment = kept | {"TERM": "xterm-256color"} | more
    child = subprocess.Popen([sys.executable, "-c", words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal closes with the process
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert child.wait() == 0
    return shown.decode()


TABLE = """
from mla_compile import display
from mla_compile.progress import Stages
from mla_compile.display.console import print_table
with display.make_display(False, False, 0) as shown:
    for _ in Stages(shown).each("recognise", range(3), 3):
        pass
names = ["#", "layer", "converts", "heads", "rope", "cached/token", "weights"]
row = [0, "model.layers.0.self_attn", "yes", "6 q / 2 kv of 32", "half:32", 128, "k_proj.weight"]
print_table("Layers", names, [row])
"""


def test_a_terminal_shows_bars_and_tables():
    shown = on_a_terminal(TABLE, 120)
    assert "━" in shown
    assert "│" in shown
    assert COLOUR.search(shown)


def test_a_stage_that_failed_is_shown_no_longer():
    script = """
from mla_compile import display
from mla_compile.progress import Stages
with display.make_display(False, False, 0) as shown:
    try:
        with Stages(shown).stage("doomed", 3):
            raise KeyError
    except KeyError:
        assert not shown._bars.tasks
"""
    assert "Error" not in on_a_terminal(script, 80)


def test_a_text_is_streamed_in_one_piece():
    """Bars would begin a new line before every piece."""
    script = """
from mla_compile import display
with display.make_display(False, False, 0):
    for piece in ("Once", " upon", " a", " time"):
        display.stream_text(piece)
"""
    assert on_a_terminal(script, 80) == "Once upon a time"


def test_no_colours_where_they_are_not_wanted():
    shown = on_a_terminal(TABLE, 120, NO_COLOR="1")
    assert "│" in shown
    assert not COLOUR.search(shown)


@pytest.mark.parametrize("columns", [40, 60])
def test_a_narrow_terminal_shows_whole_words(columns):
    shown = on_a_terminal(TABLE, columns, NO_COLOR="1")
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown[shown.index("Layers") :]).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= columns
    for words in ("cached/token", "model.layers.0.self_attn", "6 q / 2 kv of 32", "k_proj.weight"):
        assert sum(words in line for line in lines) == 1


def test_a_pipe_shows_plain_lines():
    done = subprocess.run([sys.executable, "-c", TABLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[1].split("\t")[:3] == ["0", "model.layers.0.self_attn", "yes"]
    assert re.fullmatch(r"recognise +[0-9.]+ s   peak [0-9,]+ MiB\n", done.stderr)


def test_every_picture_of_a_result_is_public():
    assert all(callable(getattr(display, name)) for name in display.__all__)


@pytest.mark.parametrize("columns", [40, 59])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_on_a_narrow_terminal_is_a_list(monkeypatch, name, columns):
    """Whole names of options, each followed by its description in lines of nearly the whole width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    out, _ = command(*([name] if name else []), "--help")
    lines = out.splitlines()
    assert not {*out} & {*"│╭…"}
    assert max(len(line) for line in lines if " " in line.strip()) <= columns
    flag, description = ("-q, --quiet", "Hide progress.") if name else ("--help", "Show this message and exit.")
    assert " ".join(out.split(f"\n  {flag}\n      ")[1].split()).startswith(description)
    assert max(len(line) for line in lines if line.startswith("      ")) > 0.75 * columns


def test_a_wider_terminal_has_columns_again(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    command("plan", "--help")
    monkeypatch.setenv("COLUMNS", "100")
    assert "╭─ Options" in command("plan", "--help")[0]


def test_a_context_beyond_the_models_limit_is_warned_of():
    words = ("plan", TINY / "config.json", "--cache-ratio", 0.5)
    warning = "warning: --context 100000 is more than the 512 tokens of the model's longest sequence"
    assert warning in command(*words, "--context", 100000)[1].splitlines()
    assert "--context" not in command(*words, "--context", 512)[1]
