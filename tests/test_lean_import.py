"""Start-up stays cheap: the package and its help text load none of the heavy libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = {"onnx", "onnxruntime", "torch", "transformers"}
COMPILER = {"onnxscript", "onnx_ir", "mla_compile.passes"}


def imported_by(arguments, folder):
    """Names of the modules that a process loads."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rsplit("|", 1)[1].strip() for line in report}
    assert "mla_compile" in imported  # the report was read correctly
    return imported


@pytest.mark.parametrize("arguments", [("-c", "import mla_compile"), ("-m", "mla_compile", "--help")], ids=" ".join)
def test_start_up_imports_nothing_heavy(arguments, tmp_path):
    assert not imported_by(arguments, tmp_path) & HEAVY


def test_a_file_runs_without_the_compiler(tmp_path):
    assert not imported_by(("-c", "import mla_compile.evaluation.textgen"), tmp_path) & COMPILER


@pytest.mark.parametrize(
    ("words", "expected"), [("mla-compile pl", "plan"), ("mla-compile convert --polish-", "--polish-steps")]
)
def test_a_shell_completes_commands_and_options(words, expected, tmp_path):
    asked = {"_MLA_COMPILE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-m", "mla_compile"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected]
