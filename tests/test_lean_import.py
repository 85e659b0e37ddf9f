"""Start-up stays cheap: the package and its help text load none of the heavy libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = {"onnx", "onnxruntime", "torch", "transformers"}


@pytest.mark.parametrize("arguments", [("-c", "import mla_compile"), ("-m", "mla_compile", "--help")], ids=" ".join)
def test_start_up_imports_nothing_heavy(arguments, tmp_path):
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rsplit("|", 1)[1].strip() for line in report}
    assert "mla_compile" in imported  # the report was read correctly
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("words", "expected"), [("mla-compile pl", "plan"), ("mla-compile convert --polish-", "--polish-steps")]
)
def test_a_shell_completes_commands_and_options(words, expected, tmp_path):
    asked = {"_MLA_COMPILE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-m", "mla_compile"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected]
