"""The coverage benchmark: shrunk configs build, rows tell what happened, and nothing that happens escapes a row."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str, alias: str) -> ModuleType:
    """Import a benchmark script under a name that hides no installed package (there is one called coverage)."""
    spec = importlib.util.spec_from_file_location(alias, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


tiny_configs = load("tiny_configs", "tiny_configs")
coverage = load("coverage", "coverage_benchmark")


@pytest.mark.parametrize(("name", "implementation"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt2", "sdpa")])
def test_shrunk_configs_build_small_models_without_trivial_parameters(name: str, implementation: str) -> None:
    tiny = tiny_configs.build(name)
    assert tiny.implementation == implementation
    ids = tiny_configs.random_ids(2, tiny_configs.LENGTH, seed=0)
    assert coverage.count_attention(tiny.module, ids) == 2
    with torch.no_grad():
        logits = tiny.module(input_ids=ids).logits
    assert logits.shape == (2, tiny_configs.LENGTH, tiny_configs.TINY["vocab_size"])
    assert all(p.std() > 0 for p in tiny.module.parameters() if p.numel() > 1)
    swapped = ids.clone()
    swapped[:, [0, 1]] = ids[:, [1, 0]]
    with torch.no_grad():  # the order of tokens matters
        assert not torch.allclose(tiny.module(input_ids=swapped).logits[:, -1], logits[:, -1], atol=1e-4)


def test_layers_of_every_kind_are_kept() -> None:
    config = tiny_configs.tiny_config("gemma3_text")
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.num_hidden_layers == 2
    assert config.sliding_window < tiny_configs.LENGTH


def test_every_architecture_is_known_and_overrides_name_model_types() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert len(tiny_configs.architectures()) > 100
    nested = {"dots3_note_vision_encoder", "dots3_note_audio_encoder", "musicgen_decoder", "musicgen_melody_decoder"}
    assert set(tiny_configs.OVERRIDES) - nested <= set(CONFIG_MAPPING_NAMES)


def test_a_row_of_llama_is_converted_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.md"
    options = ["--json", str(out), "--markdown", str(page), "--only", "llama", "--until", "compare"]
    assert coverage.main(options) == 0
    (stored,) = json.loads(out.read_text())["rows"]
    row = coverage.Row.read(stored)
    assert row.complete
    assert row.converted == row.expected == 2
    assert set(row.errors) == {"whole", "pieces", "padded"}
    assert not row.code
    assert not row.wrong
    assert "| llama | sdpa | yes | 2/2 | 2/2 |" in page.read_text()
    assert "fully converted" in capsys.readouterr().out
    assert coverage.main([*options, "--resume"]) == 0  # nothing is run again
    assert "[1/" not in capsys.readouterr().out


def test_a_hang_is_a_row() -> None:
    row = coverage.run_row("llama", limit_s=0.2, limit_gb=12.0)
    assert row.code == "timeout"
    assert not row.complete
    assert not row.wrong


def test_a_crash_is_a_row() -> None:
    row = coverage.run_row("llama", limit_s=60.0, limit_gb=0.05)
    assert row.code == "crash"
    assert not row.done


def test_what_cannot_be_built_is_a_row() -> None:
    row = coverage.run_row("no-such-type", limit_s=60.0, limit_gb=12.0)
    assert row.code == "build"
    assert row.done


def test_a_wrong_conversion_is_counted_and_fails_the_run() -> None:
    wrong = coverage.Row("x", exported=True, expected=2, converted=2, errors={"whole": 1e-7, "padded": 0.3})
    nan = coverage.Row("y", exported=True, expected=2, converted=2, errors={"padded": float("nan")})
    assert wrong.wrong
    assert nan.wrong
    assert not wrong.complete
    assert coverage.summary([wrong, nan])["wrong"] == 2
