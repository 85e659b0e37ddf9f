"""Statistics that are kept: they come back as they were, under a name that everything they follow from is part of."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

from mla_compile import api
from mla_compile.disk.statistics_cache import StatisticsCache, open_cache, statistics_key
from mla_compile.passes import layers
from mla_compile.passes.recognise import recognise
from mla_compile.program import Program
from mla_compile.runtime.user_cache import default_folder
from mla_compile.site_statistics import SiteStatistics
from mla_compile.sources.capture import capture

WINDOWS = models.tokens(12, 16)


def made_up(norms: bool) -> SiteStatistics:
    """Statistics of a layer, with what norms of keys add or without."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"mean": (7,), "moment": (7, 7), "query": (4, 2, 2), "distance": (4, 5), "output": (4, 3, 3)}
    shapes |= {"attended": (4,)} | ({"key_squares": (2,), "key_moment": (7, 7), "key_mean": (7,)} if norms else {})
    return SiteStatistics(
        tokens=60, **{n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in shapes.items()}
    )


STATISTICS = (made_up(True), made_up(False))


class Measuring:
    """Measures the above, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> tuple[SiteStatistics, ...]:
        self.times += 1
        return STATISTICS


def equal(got: tuple[SiteStatistics, ...], wanted: tuple[SiteStatistics, ...]) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for a, b in zip(got, wanted, strict=True) for f in fields(a)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)


@pytest.fixture
def cache(tmp_path):
    return StatisticsCache(tmp_path / "not" / "yet")


def test_what_was_measured_comes_back_bit_by_bit(cache):
    measure = Measuring()
    first, second = (cache.recall("key", measure) for _ in range(2))
    assert measure.times == 1
    assert equal(first.value, STATISTICS)
    assert equal(second.value, STATISTICS)
    path = cache.folder / "key.safetensors"
    assert (first.origin, second.origin) == (f"computed, saved to {path}", f"reused from {path}")
    assert not first.warnings
    assert not second.warnings
    assert [*cache.folder.iterdir()] == [path]  # and nothing that was written on the way


def flipped(content: bytes) -> bytes:
    return content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]


@pytest.mark.parametrize(
    "spoil",
    [lambda c: c[: len(c) // 2], lambda c: c[:5], lambda c: b"", lambda c: b"garbage" * 99, flipped],
    ids=["cut", "cut early", "empty", "garbage", "one bit"],
)
def test_a_spoilt_file_is_told_and_replaced(cache, spoil):
    measure = Measuring()
    cache.recall("key", measure)
    path = cache.folder / "key.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    found = cache.recall("key", measure)
    assert measure.times == 2
    assert equal(found.value, STATISTICS)
    (warning,) = found.warnings
    assert str(path) in warning
    assert "\n" not in warning
    assert cache.recall("key", measure).origin == f"reused from {path}"


def test_a_file_of_something_else_is_told_and_replaced(cache):
    from safetensors.torch import save_file

    cache.folder.mkdir(parents=True)
    save_file({"x": torch.zeros(3)}, cache.folder / "key.safetensors")
    found = cache.recall("key", Measuring())
    assert found.warnings
    assert equal(found.value, STATISTICS)


def test_a_folder_that_cannot_be_made_is_told_and_nothing_more(tmp_path):
    (tmp_path / "file").write_text("mine")
    found = StatisticsCache(tmp_path / "file" / "below").recall("key", Measuring())
    assert equal(found.value, STATISTICS)
    assert found.origin == "computed"
    assert any("could not be saved" in w for w in found.warnings)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_COMPILE_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_folder() == Path("/own")
    monkeypatch.delenv("MLA_COMPILE_CACHE")
    assert default_folder() == Path("/xdg/mla-compile")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "mla-compile"
    assert open_cache(True).folder == default_folder()
    assert open_cache(False) is None
    assert open_cache("/other") == StatisticsCache(Path("/other"))


# ---- the name


@pytest.fixture(scope="module")
def llama(programs):
    return programs["llama-gqa"]


def captured(**changes: object) -> Program:
    module = models.llama(**changes)
    return capture(module, models.example(module))


def test_the_same_model_and_text_have_the_same_name(llama):
    again = captured()
    name = statistics_key(llama.program, llama.sites, WINDOWS, gradients=True)
    assert statistics_key(again, recognise(again).sites, WINDOWS, gradients=True) == name


def test_everything_that_statistics_follow_from_is_part_of_the_name(llama, monkeypatch):
    program, sites = llama.program, llama.sites
    names = [statistics_key(program, sites, WINDOWS, gradients=True)]
    other = WINDOWS.clone()
    other[-1, -1] = (other[-1, -1] + 1) % models.VOCABULARY
    names += [
        statistics_key(program, sites, other, gradients=True),
        statistics_key(program, sites, WINDOWS.reshape(6, 32), gradients=True),
        statistics_key(program, sites, WINDOWS, gradients=False),
        statistics_key(program, sites[:1], WINDOWS, gradients=True),
    ]
    weight = program.exported.state_dict["model.norm.weight"]  # far behind the last layer, but before the loss
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[-1] += 1e-6
        names.append(statistics_key(program, sites, WINDOWS, gradients=True))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    epsilon = captured(rms_norm_eps=1e-3)
    names.append(statistics_key(epsilon, sites, WINDOWS, gradients=True))  # the same weights, another graph
    monkeypatch.setattr(torch, "__version__", "0.0")
    names.append(statistics_key(program, sites, WINDOWS, gradients=True))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.float64])
def test_constants_of_any_type_are_part_of_the_name(llama, dtype):
    state = llama.program.exported.state_dict
    names = []
    for value in (0, 1):
        state["extra"] = torch.full((), value).to(dtype)
        names.append(statistics_key(llama.program, llama.sites, WINDOWS, gradients=True))
        del state["extra"]
    assert names[0] != names[1]


# ---- conversions


def test_a_second_conversion_at_another_ratio_does_not_run_the_model_again(llama, tmp_path, monkeypatch):
    measure, runs = layers.collect_statistics, []

    def counted(*arguments, **keywords):
        runs.append(keywords["metrics"] is None)
        return measure(*arguments, **keywords)

    monkeypatch.setattr(layers, "collect_statistics", counted)

    def convert(ratio: float, cache: Path | bool = tmp_path, **settings: object) -> api.CompiledModel:
        settings = {"method": "fisher", "cache_ratio": ratio, "check": False, **settings}
        return api.compile(llama.program.exported, calibration=WINDOWS, statistics_cache=cache, **settings)

    def origin(compiled: api.CompiledModel) -> str:
        (note,) = (s["note"] for s in compiled.report.to_dict()["stages"] if s["name"] == "statistics")
        return note.removeprefix(f"{11 * 16} tokens, ").split(" /")[0]

    first, second = convert(0.5), convert(0.25)
    assert runs == [True]
    assert (origin(first), origin(second)) == ("computed, saved to", "reused from")
    without = convert(0.25, cache=False)
    assert len(runs) == 2
    assert origin(without) == "computed"
    assert without.report.plans == second.report.plans
    state = without.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in second.module.state_dict().items())
    assert origin(convert(0.25, gradients=False)) == "computed, saved to"  # other statistics, and another name
    assert runs[2:] == [False]
    assert len([*tmp_path.iterdir()]) == 2
    assert replace(second.report, stages=()) == replace(without.report, stages=())


def test_the_usual_folder_stays_small(tmp_path):
    """What was not used for longest goes first; what is new stays, and so does what is none of ours."""
    names = [digit * 32 for digit in "abcd"]
    StatisticsCache(tmp_path).recall(names[0], Measuring())
    size = (tmp_path / f"{names[0]}.safetensors").stat().st_size
    cache = StatisticsCache(tmp_path, most=2 * size)
    (tmp_path / "other.safetensors").write_bytes(bytes(size))
    cache.recall(names[1], Measuring())
    for age, name in enumerate(names[:2]):
        os.utime(tmp_path / f"{name}.safetensors", (1000 + age, 1000 + age))
    cache.recall(names[0], Measuring())  # used now
    cache.recall(names[2], Measuring())
    assert sorted(f.stem for f in tmp_path.iterdir()) == [names[0], names[2], "other"]
    StatisticsCache(tmp_path, most=0).recall(names[3], Measuring())
    assert sorted(f.stem for f in tmp_path.iterdir()) == [names[3], "other"]
    (tmp_path / f"{'e' * 32}.safetensors").mkdir()  # cannot be removed as files are
    found = StatisticsCache(tmp_path, most=0).recall(names[2], Measuring())
    assert (found.origin.partition(" to ")[0], found.warnings) == ("computed, saved", ())
    assert open_cache(True).most < 2**40
    assert open_cache(tmp_path).most is None
