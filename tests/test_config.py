"""Settings: defaults, what is accepted, and one sentence for everything that is not."""

from __future__ import annotations

import copy
import math
import pickle

import models
import pytest
import yaml
from pydantic import ValidationError

import mla_compile
from mla_compile.cli import main
from mla_compile.config import DEFAULT_CACHE_RATIO, CompileConfig, make_config
from mla_compile.errors import MlaCompileError, UsageError


def test_default_size_is_the_mildest_of_the_paper():
    assert DEFAULT_CACHE_RATIO == 1 - 0.6875  # MHA2MLA, table 1: "-68.75%"


def test_defaults_choose_no_size_themselves():
    config = make_config()
    assert (config.cache_ratio, config.kv_rank, config.rope_dims, config.exact) == (None, None, None, False)
    assert (config.method, config.selection, config.svd) == ("auto", "auto", "joint")


@pytest.mark.parametrize(
    ("settings", "method", "needs_text"),
    [
        ({}, "fisher", True),
        ({"method": "transmla"}, "transmla", True),
        ({"method": "mha2mla"}, "mha2mla", False),
        ({"selection": "low"}, "mha2mla", False),
        ({"selection": "2-norm"}, "mha2mla", True),
        ({"svd": "split"}, "mha2mla", False),
        ({"encoders": True}, "mha2mla", False),
        ({"exact": True}, "fisher", False),
    ],
    ids=str,
)
def test_what_is_given_settles_the_method_and_whether_it_needs_text(settings, method, needs_text):
    config = make_config(**settings)
    assert (config.chosen_method, config.needs_text) == (method, needs_text)


ALLOWED = [
    *({"selection": s} for s in ("auto", "high", "low", "uniform", "2-norm")),
    *({"svd": s} for s in ("joint", "split")),
    *({"opset": o} for o in (23, 24)),
    *({"cache_ratio": r} for r in (1e-6, 0.5, 1.0)),
    {"kv_rank": 1},
    {"kv_rank": 4, "rope_dims": 0},
    {"cache_ratio": 0.5, "rope_dims": 2},
    {"exact": True},
    {"seq_len": 2},
    {"calibration_tokens": 1},
    {"polish_steps": 0},
    {"polish_steps": 200, "method": "fisher"},
    {"exact": True, "polish_steps": 0},
    {"seed": 0},
    {"inline": True},
    *({"cache": kind} for kind in ("dynamic", "static")),
    *({"cache_type": kind} for kind in ("float32", "int8")),
    {"uniform_rank": True},
    {"layout": "deepseek"},
    {"layout": "deepseek", "method": "transmla", "rope_dims": 8},
    {"gradients": False},
]


@pytest.mark.parametrize("settings", ALLOWED, ids=str)
def test_allowed_settings_are_kept(settings):
    config = make_config(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


REFUSED = [
    ({"method": "palu"}, "method='palu'", "'mha2mla'"),
    ({"selection": "best"}, "selection='best'", "'auto', 'high', 'low', 'uniform' or '2-norm'"),
    ({"svd": "both"}, "svd='both'", "'joint' or 'split'"),
    ({"opset": 22}, "opset=22", "23 or 24"),
    ({"cache": "ring"}, "cache='ring'", "'dynamic' or 'static'"),
    ({"cache": "static", "opset": 23}, "static cache", "opset 24"),
    ({"cache_type": "int4"}, "cache_type='int4'", "'float32' or 'int8'"),
    ({"cache_type": "int8", "layout": "deepseek", "format": "deepseek"}, "int8 caches", "is a checkpoint"),
    ({"cache_ratio": 0.0}, "cache_ratio=0.0", "greater than 0"),
    ({"cache_ratio": -0.5}, "cache_ratio=-0.5", "greater than 0"),
    ({"cache_ratio": 1.5}, "cache_ratio=1.5", "less than or equal to 1"),
    ({"cache_ratio": math.nan}, "cache_ratio=nan", "finite number"),
    ({"cache_ratio": math.inf}, "cache_ratio=inf", "finite number"),
    ({"kv_rank": 0}, "kv_rank=0", "greater than or equal to 1"),
    ({"kv_rank": 2.5}, "kv_rank=2.5", "integer"),
    ({"rope_dims": -2}, "rope_dims=-2", "greater than or equal to 0"),
    ({"calibration_tokens": 0}, "calibration_tokens=0", "greater than or equal to 1"),
    ({"polish_steps": -1}, "polish_steps=-1", "greater than or equal to 0"),
    ({"exact": True, "polish_steps": 1}, "polish_steps", "nothing to polish"),
    ({"seq_len": 1}, "seq_len=1", "greater than or equal to 2"),
    ({"seed": -1}, "seed=-1", "greater than or equal to 0"),
    ({"cash_ratio": 0.5}, "cash_ratio", "no setting"),
    ({"schema_version": 2}, "schema_version=2", "1"),
    ({"exact": True, "kv_rank": 3}, "exact and kv_rank", "exclude each other"),
    ({"exact": True, "cache_ratio": 1.0}, "exact and cache_ratio", "exclude each other"),
    ({"cache_ratio": 0.5, "kv_rank": 3}, "cache_ratio and kv_rank", "exclude each other"),
    ({"exact": True, "cache_ratio": 0.5, "kv_rank": 3}, "exact and cache_ratio and kv_rank", "exclude each other"),
    ({"layout": "flashmla"}, "layout='flashmla'", "'free' or 'deepseek'"),
    ({"layout": "deepseek", "method": "mha2mla"}, "layout deepseek", "one rope key for all heads"),
    ({"layout": "deepseek", "selection": "high"}, "layout deepseek", "mha2mla one for every head"),
    ({"layout": "deepseek", "encoders": True}, "layout deepseek", "mha2mla one for every head"),
    ({"layout": "deepseek", "exact": True}, "layout deepseek", "exact keeps a rope key for every head"),
    ({"exact": True, "uniform_rank": True}, "exact", "full rank of every layer"),
    (
        {"layout": "deepseek", "format": "deepseek", "cache": "static"},
        "--cache static",
        "ONNX files, and the format deepseek",
    ),
    ({"exact": True, "rope_dims": 4}, "rope_dims", "exact keeps every rotating channel"),
    ({"opset": 0}, "opset=0", "23 or 24"),
    ({"layout": "free", "format": "deepseek"}, "layout free", "format deepseek is a checkpoint"),
    ({"layout": "free", "format": "gguf"}, "layout free", "format gguf is a checkpoint"),
]


@pytest.mark.parametrize(("cache", "opset"), [("dynamic", 23), ("static", 24)])
def test_the_cache_settles_the_operator_set(cache, opset):
    assert make_config(cache=cache).opset == make_config(cache=cache, opset=None).opset == opset


def test_where_a_python_caller_writes_no_file_options_of_files_are_refused(tmp_path):
    for settings in ({"cache": "static"}, {"opset": 24}, {"inline": True}):
        with pytest.raises(UsageError, match=r"^--.*: only an ONNX file for ONNX Runtime is written so"):
            mla_compile.compile(models.llama(), method="mha2mla", out=tmp_path / "folder", **settings)


def test_a_place_is_a_string_too_and_what_is_checked_against_one_needs_it():
    with pytest.raises(UsageError, match=r"^--inline: only an ONNX file .* 'folder' is none"):
        mla_compile.compile(models.llama(), method="mha2mla", out="folder", inline=True)
    with pytest.raises(UsageError, match="engine and force are about what is written to out"):
        mla_compile.compile("no-model", method="mha2mla", force=True)


def test_tokens_to_train_on_need_a_text():
    with pytest.raises(UsageError, match="--finetune-tokens counts tokens of --finetune TEXT"):
        mla_compile.compile("no-model", method="mha2mla", finetune_tokens=8)


@pytest.mark.parametrize(("settings", "subject", "problem"), REFUSED, ids=str)
def test_refused_settings_are_named_in_one_sentence(settings, subject, problem):
    with pytest.raises(UsageError) as caught:
        make_config(**settings)
    error = caught.value
    assert subject in error.message
    assert problem in error.message
    assert error.message.endswith(".")
    assert error.remedy.endswith(".")
    assert "\n" not in str(error)
    assert isinstance(error, MlaCompileError)
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "problem"), [({"cache_ratio": 3}, "cache_ratio=3"), ({"preset": "flashmla"}, "preset")]
)
def test_the_public_name_refuses_in_the_same_sentence(settings, problem):
    said = []
    for make in (make_config, CompileConfig, CompileConfig.of, CompileConfig.model_validate):
        with pytest.raises(UsageError, match=problem) as caught:
            make(**settings) if make in (make_config, CompileConfig) else make(settings)
        said.append(str(caught.value))
    assert len({*said}) == 1


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"cache": "static", "opset": 23}, "Give opset 24, or leave opset out."),
        ({"preset": "flashmla"}, "Give the format deepseek or gguf, or leave preset out."),
        ({"q_rank": 8}, "Give the format deepseek or gguf, or leave q_rank out."),
        ({"layout": "free", "format": "gguf"}, "Leave layout out, or choose another format."),
    ],
    ids=str,
)
def test_a_remedy_is_of_the_contradiction(settings, remedy):
    with pytest.raises(UsageError) as caught:
        make_config(**settings)
    assert caught.value.remedy == remedy


@pytest.mark.parametrize("given", [None, "deepseek"])
def test_a_format_has_its_layout_where_none_was_given(given):
    assert make_config(format="deepseek", layout=given).layout == "deepseek"
    assert make_config(layout=None).layout == "free"


def test_the_command_line_refuses_a_layout_that_the_format_does_not_have(tmp_path, capsys):
    words = ["no-model", "--out", str(tmp_path / "out"), "--format", "deepseek"]
    assert main([*words, "--layout", "free"]) == 2
    assert "the layout free was given" in capsys.readouterr().err
    assert main([*words, "--method", "transmla"]) == 2
    assert "layout" not in capsys.readouterr().err  # but that there is no such model


def test_settings_are_taken_as_a_dictionary_too():
    config = CompileConfig(cache_ratio=0.5)
    assert CompileConfig.of(config) is config
    assert CompileConfig.of({"cache_ratio": 0.5}) == config
    for given, said in (({"cache_ratio": 3}, "cache_ratio=3"), ({7: 1}, "no setting '7'"), (0.5, "of type float")):
        with pytest.raises(UsageError, match=said):
            mla_compile.compile("no-model", config=given)
    with pytest.raises(UsageError, match="none was given"):
        mla_compile.compile(models.llama(), config={"method": "fisher", "encoders": True})


def test_settings_are_copied_and_pickled_as_they_are():
    config = make_config(format="gguf", cache_ratio=0.25)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert config.model_copy(update={"seed": 3}).seed == 3


def test_settings_cannot_be_changed_afterwards():
    config = make_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_settings_survive_yaml():
    config = make_config(cache_ratio=0.25, svd="split", seq_len=64, inline=True)
    assert CompileConfig(**yaml.safe_load(yaml.safe_dump(config.model_dump()))) == config
