"""Every block of the pages is run: commands in this process, Python as it stands, on a model of one layer.

A page is one test. Its blocks run in order in a folder of their own, where names such as ``MODEL`` and ``text.txt`` are
real files, made when the first line names them. What cannot run everywhere is in ``EXCLUDED``, with the reason; its
options are still parsed (``test_documents.py``).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from pages import ROOT, Block, Command
from small_folder import model_folder, texts
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from mla_compile.cli import main

EXCLUDED = {
    r"^(pip install |python3\.11 -m venv |\. \.venv/)": "makes an environment; that the extras exist is tested",
    r"^make ": "makes an environment, or runs this very suite; that the targets exist is tested",
    r"\bhf:": "needs the network",
    r"\S+\.plan\b": "needs TensorRT and a GPU; tests/tensorrt runs it with stand-ins",
    r"^mla-compile build-plugin ": "needs TensorRT's headers; tests/tensorrt/test_plugin_library.py",
    r"^python -m pytest tests/tensorrt/": "needs TensorRT and a GPU",
    r"^accelerate launch ": "several processes; tests/test_processes.py and tests/training/test_processes.py",
    r"^python -m mla_compile\.evaluation\.harness ": "needs lm_eval and the network; tests/test_harness.py",
    r"^(vllm|trtexec|llama-cli|llama-quantize) |^python -m sglang": "other programs",
    r"^mla-compile verify \S+\.gguf": "needs llama-cpp-python, which is built from source; tests/test_gguf.py",
    r"import register\n": "needs TensorRT; tests/tensorrt/test_plugins.py",
    r"TensorrtExecutionProvider": "needs a GPU",
    r"^CXX=|^python check_fused\.py ": "needs a compiler for another processor, and that; tests/test_examples.py",
}
"""What is not run, by what it matches, and why."""

QUICKER = {
    "bench": ["--contexts", "32", "--batches", "1"],
    "eval": ["--max-tokens", "1024"],
    "finetune": ["--tracker", "none"],
}
"""Options that are added, so that the last of each counts."""


def excluded(text: str) -> str | None:
    return next((reason for pattern, reason in EXCLUDED.items() if re.search(pattern, text, re.MULTILINE)), None)


def convert(*words: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        assert main(["convert", "MODEL", "--out", str(path), "--method", "mha2mla", "--quiet", *words]) == 0

    return make


def archive(path: Path) -> None:
    from torch.export import Dim, export, save

    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    save(export(GIVEN["model"](), GIVEN["example_inputs"](), dynamic_shapes=shapes), path)


def written(first: int) -> Callable[[Path], None]:
    return lambda path: void(path.write_text("<|endoftext|>".join(texts(first, 60))))


def void(_: object) -> None:
    """Nothing is returned."""


def lines(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(100, 60)))


PREPARED: Mapping[str, Callable[[Path], None]] = {
    "MODEL": model_folder,
    "FOLDER": model_folder,
    "./hf-folder-or-hub-id": model_folder,
    "examples/tiny-llama": model_folder,  # the bundled one is converted by the examples
    "config.json": lambda path: void(shutil.copy("MODEL/config.json", path)),
    "text.txt": written(0),
    "other.txt": written(200),
    "stories.txt": written(300),
    "text.jsonl": lines,
    "model.pt2": archive,
    "model_mla.onnx": convert(),
    "model.onnx": convert(),
    "static.onnx": convert("--cache", "static"),
    "int8.onnx": convert("--cache-type", "int8"),
    "converted": convert(),
    "folder": convert("--format", "deepseek"),
}
"""Names that pages use as given, and how each is made where no earlier line of the page made it."""

GIVEN: Mapping[str, Callable[[], Any]] = {
    "model": lambda: Logits(AutoModelForCausalLM.from_pretrained("MODEL")).eval(),
    "example_inputs": lambda: (torch.zeros(2, 8, dtype=torch.long),),
    "texts": lambda: texts(0, 20),
    "mylib": lambda: torch.library.custom_op("mylib::flash_attention", flash, mutates_args=()),
}
"""Names that Python blocks use as given."""


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


class Logits(torch.nn.Module):
    """Token ids to logits, as a model of one's own."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


class Folder:
    """Where a page's blocks run.

    Attributes:
        names: What its Python blocks have defined so far.
    """

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}

    def prepare(self, words: list[str]) -> None:
        for word in words:
            if word in PREPARED and not Path(word).exists():
                if word != "MODEL":
                    self.prepare(["MODEL"])
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                PREPARED[word](Path(word))

    def run(self, command: Command) -> None:
        if command.line.startswith("python examples/"):
            self.tell(command)
            return
        words = command.ours
        assert words, f"{command.line!r} is run by nobody: name it in EXCLUDED, with a reason"
        result = words[words.index("--out") + 1] if "--out" in words else None
        self.prepare([word for word in words if word != result])
        words = [*words, *QUICKER.get(words[0], [])]
        if result is not None and words[0] != "report":
            words.append("--force")  # an earlier line of the page may have written it
        assert main(words) == 0, command.line
        assert result is None or Path(result).exists()

    def tell(self, command: Command) -> None:
        """Run an example whose output goes to a file."""
        _, script, *options, arrow, file = command.words
        assert arrow == ">"
        told = subprocess.run([sys.executable, ROOT / script, *options], check=True, capture_output=True)
        Path(file).write_bytes(told.stdout)

    def execute(self, block: Block) -> None:
        """Run Python; what it names in quotes is prepared, unless it is what it writes."""
        used = set(re.findall(r"\w+", block.text)) - self.names.keys()
        self.prepare(["MODEL", *re.findall(r'(?<!save\()(?<!to_deepseek\()(?<!to_onnx\()"([\w./-]+)"', block.text)])
        self.names |= {name: make() for name, make in GIVEN.items() if name in used}
        exec(compile(block.text, block.name, "exec"), self.names)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Folder()


RUN = [page for page in pages.PAGES if any(b.language in ("console", "python") for b in pages.blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page, folder, capfd):
    for block in pages.blocks(page):
        if block.language == "console":
            for command in block.commands:
                if excluded(command.line) is None:
                    capfd.readouterr()
                    folder.run(command)
                    printed = capfd.readouterr()
                    shows(command, printed.out + printed.err)
        elif block.language == "python" and excluded(block.text) is None:
            folder.execute(block)


def shows(command: Command, printed: str) -> None:
    """Of what a page shows, all words are printed; numbers and texts depend on the model."""
    known = set(re.findall(r"[^\W\d_]{3,}", printed))
    assert {word for line in command.shown for word in re.findall(r"[^\W\d_]{3,}", line)} <= known, command.line


def test_exclusions_are_of_use():
    texts = [c.line for page in pages.PAGES for b in pages.blocks(page) for c in b.commands]
    texts += [b.text for page in pages.PAGES for b in pages.blocks(page) if b.language == "python"]
    for pattern in EXCLUDED:
        assert any(re.search(pattern, text, re.MULTILINE) for text in texts), f"nothing matches {pattern!r} any more"
