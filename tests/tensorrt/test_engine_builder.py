"""The builder of engines, with the real builder of TensorRT for RTX, which does without a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mla_compile.errors import LoadError, RefusedError
from mla_compile.runtime.tensorrt import engine_builder
from mla_compile.runtime.tensorrt.engine_builder import EngineSettings, build_engine

SETTINGS = EngineSettings(batch=4, room=32, prompt=6)


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: .[tensorrt-test]")


def build(rtx, path, settings=SETTINGS, advance=lambda: None):
    return build_engine(rtx, path, settings, plugins=False, advance=advance, target=80)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_builds_with_two_profiles_and_tells_progress(rtx, lowered, tmp_path, monkeypatch):
    """A hundred steps whatever TensorRT's phases are, shapes of both profiles, and times that a second build takes.

    Which may stream its weights: it builds so, too.
    """
    profiles, flags, steps, times = [], [], [], tmp_path / "new" / "times"
    create = rtx.Builder.create_optimization_profile
    monkeypatch.setattr(
        rtx.Builder, "create_optimization_profile", lambda builder: profiles.append(create(builder)) or profiles[-1]
    )
    network = rtx.Builder.create_network
    monkeypatch.setattr(
        rtx.Builder, "create_network", lambda builder, flag: flags.append(flag) or network(builder, flag)
    )
    settings = EngineSettings(batch=4, room=32, prompt=6, timing_cache=times)
    engine, plugins = build(rtx, lowered("llama-gqa").path, settings, lambda: steps.append(1))
    assert len(engine) > 10_000
    assert plugins == 0
    assert len(steps) == 100
    assert flags == [1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)]
    shapes = [[tuple(s) for s in p.get_shape("input_ids")] for p in profiles]
    assert shapes == [[(1, 1), (4, 1), (4, 1)], [(1, 1), (4, 6), (4, 6)]]
    row = lowered("llama-gqa").model.rows[0]
    assert [tuple(s) for s in profiles[1].get_shape("past_key_values.0.latent")][::2] == [
        (1, 1, 32, row),
        (4, 1, 32, row),
    ]
    first = times.read_bytes()
    assert first
    assert [p.name for p in times.parent.iterdir()] == ["times"]
    build(rtx, lowered("llama-gqa").path, replace(settings, weight_streaming=True))


def test_times_of_something_else_are_refused(tmp_path):
    """TensorRT for RTX takes any: it keeps no times, and only pretends to."""
    config = SimpleNamespace(create_timing_cache=lambda _: object(), set_timing_cache=lambda _, ignore: ignore)
    with pytest.raises(LoadError, match=r"times' holds no times of this TensorRT on this GPU"):
        engine_builder._take_times(config, tmp_path / "times")


def test_what_tensorrt_does_not_read_is_one_sentence(rtx, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no file at all")
    with pytest.raises(RefusedError, match=r"^TensorRT cannot read 'model\.onnx' \(.+\)\. Give it less"):
        build(rtx, tmp_path / "model.onnx")


def test_what_tensorrt_does_not_build_is_one_sentence_with_its_reason(rtx, lowered):
    """This edition's library for version-compatible engines is not in its package."""
    settings = EngineSettings(batch=4, room=32, prompt=6, version_compatible=True)
    with pytest.raises(RefusedError, match=r"TensorRT cannot build 'model\.onnx' \(.*libnvinfer_lean"):
        build(rtx, lowered("llama-gqa").path, settings)


@pytest.mark.parametrize("asked", ["weight_streaming", "refit", "version_compatible"])
def test_flags_are_those_asked_for(rtx, lowered, monkeypatch, asked):
    """This edition refits nothing without a GPU, so nothing is built."""
    told = []
    monkeypatch.setattr(rtx.Builder, "build_serialized_network", lambda builder, network, config: told.append(config))
    settings = EngineSettings(batch=4, room=32, prompt=6, **{asked: True})
    with pytest.raises(RefusedError, match=r"TensorRT cannot build 'model\.onnx' \(it does not say why"):
        build(rtx, lowered("llama-gqa").path, settings)
    optional = ("VERSION_COMPATIBLE", "WEIGHT_STREAMING", "REFIT")
    assert [n for n in optional if told[0].get_flag(rtx.BuilderFlag.__members__[n])] == [asked.upper()]


def test_an_interrupt_ends_the_build(rtx, lowered):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(rtx, lowered("llama-gqa").path, advance=interrupt)
