"""Start-up stays cheap: the package and its help text load none of the heavy libraries."""

from __future__ import annotations

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
