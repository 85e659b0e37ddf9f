"""Finished layers on disk: what is read back is what was made, of the very same things, and a killed run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

from mla_compile.cli import main
from mla_compile.config import make_config
from mla_compile.disk.layer_store import LayerStore, store_beside, store_folder
from mla_compile.disk.writing import held, moved_into, own_folder, whole_file
from mla_compile.errors import ShareDone, UsageError
from mla_compile.passes import factorise
from mla_compile.passes.kept import kept_values
from mla_compile.passes.methods import mha2mla
from mla_compile.passes.task import Task
from mla_compile.plan import plan_layers
from mla_compile.progress import Stages

CONFIG = make_config(method="mha2mla", selection="uniform")


def factorised(captured, store: LayerStore, dtype: torch.dtype = torch.float32, **changes):
    config = CONFIG.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    task = Task(captured.program, captured.sites, (), config, None, store=store)
    return mha2mla(dataclasses.replace(task, **changes)).weights


def tensors(weights) -> dict[str, Tensor]:
    return {f.name: v for f in dataclasses.fields(weights) if isinstance(v := getattr(weights, f.name), Tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-attention-bias"])
def test_layers_come_back_as_they_were_but_for_the_type_of_their_matrices(programs, tmp_path, name, dtype):
    kept = factorised(programs[name], LayerStore(tmp_path), dtype)
    for got, made in zip(kept, factorised(programs[name], None), strict=True):
        for key, value in tensors(made).items():
            wanted = value.to(dtype) if key in ("query", "row", "key_up", "value_up") else value
            assert torch.equal(tensors(got)[key], wanted)
        assert tensors(got).keys() == tensors(made).keys()


def test_a_finished_layer_is_not_made_again(programs, tmp_path, monkeypatch):
    first = factorised(programs["llama-gqa"], LayerStore(tmp_path))
    monkeypatch.setattr(factorise, "factorise_mha2mla", None)
    again = factorised(programs["llama-gqa"], LayerStore(tmp_path))
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(value, tensors(other)[key]) for key, value in tensors(one).items())


def test_whatever_a_layer_follows_from_is_part_of_its_name(programs, tmp_path):
    store, captured = LayerStore(tmp_path), programs["llama-gqa"]
    count = models.LAYERS
    factorised(captured, store)
    assert len([*tmp_path.iterdir()]) == count
    factorised(captured, store, torch.bfloat16)
    factorised(captured, store, torch.bfloat16, wide=True)
    assert len([*tmp_path.iterdir()]) == 2 * count
    factorised(captured, store, config=CONFIG.model_copy(update={"cache_ratio": 0.5}))
    factorised(captured, store, config=CONFIG.model_copy(update={"polish_steps": 1}))  # not balanced
    assert len([*tmp_path.iterdir()]) == 4 * count
    weight = captured.module.model.layers[1].self_attn.v_proj.weight
    with torch.no_grad():
        before = weight[0, 0].item()
        weight[0, 0] += 1
    factorised(captured, store)
    with torch.no_grad():
        weight[0, 0] = before
    assert len([*tmp_path.iterdir()]) == 4 * count + 1


def test_a_damaged_layer_is_made_again(programs, tmp_path):
    store = LayerStore(tmp_path)
    whole = factorised(programs["llama-gqa"], store)
    whole = [{key: value.clone() for key, value in tensors(weights).items()} for weights in whole]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    for one, other in zip(whole, factorised(programs["llama-gqa"], store), strict=True):
        assert all(torch.equal(value, tensors(other)[key]) for key, value in one.items())


def test_layers_are_mapped_from_their_files(programs, tmp_path):
    """No copy is held: pages of a file can be dropped."""
    (first, *_) = factorised(programs["llama-gqa"], LayerStore(tmp_path))
    if not Path("/proc/self/maps").exists():
        pytest.skip("there is no /proc to read what is mapped")
    address = first.query.data_ptr()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    assert any(begin <= address < end for begin, end in spans)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UsageError("No.", "Try."), ZeroDivisionError(), None])
def test_layers_go_when_a_conversion_ends_in_whatever_way(error, tmp_path):
    out = tmp_path / "new" / "model.onnx"
    outcome = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with outcome, store_beside(out) as store:
        store.folder.mkdir(parents=True)
        if error is not None:
            raise error
    assert not store_folder(out).exists()
    assert out.parent.exists() == (error is None)


@pytest.mark.parametrize("finished", [True, False])
def test_layers_stay_when_a_conversion_is_asked_to_end(finished, tmp_path):
    """As schedulers do before they kill: what took hours is there for the next try, and nothing else is."""
    out = tmp_path / "new" / "model.onnx"

    def convert(store):
        store.folder.mkdir(parents=True)
        if finished:
            (store.folder / "layer.safetensors").touch()
        raise SystemExit(143)

    with pytest.raises(SystemExit), store_beside(out) as store:
        convert(store)
    left = [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))]
    assert left == (["new", "new/.model.onnx.layers", "new/.model.onnx.layers/layer.safetensors"] if finished else [])


def test_layers_stay_when_another_process_has_done_its_share(tmp_path):
    """All processes of a launcher name the same folder, and the first goes on in it."""
    out = tmp_path / "new" / "model.onnx"
    with store_beside(out) as first:
        first.folder.mkdir(parents=True)
        (kept := first.folder / "layer.safetensors").touch()
        with pytest.raises(ShareDone), store_beside(out):
            raise ShareDone
        assert kept.exists()
    assert not first.folder.exists()


@pytest.mark.skipif(not hasattr(os, "setsid"), reason="limits of file sizes are those of POSIX")
def test_a_full_disk_is_a_sentence_and_leaves_nothing(programs, tmp_path):
    import resource

    out = tmp_path / "new" / "folder" / "model.onnx"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with (
            pytest.raises(UsageError, match=r"could not be written \(.*\)\. Free some room"),
            store_beside(out) as store,
        ):
            factorised(programs["llama-gqa"], store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not [*tmp_path.iterdir()]


SOURCE = Path(__file__).parents[1] / "examples" / "tiny-llama"
_KILLED = """
import os, signal, sys
from mla_compile.disk.writing import moved_into
from mla_compile.cli import main
from mla_compile.passes import factorise
made, layers = factorise.factorise_mha2mla, []
def killed_behind_the_first(site, *rest):
    if layers:
        os.kill(os.getpid(), signal.SIGKILL)
    layers.append(site.index)
    return made(site, *rest)
factorise.factorise_mha2mla = killed_behind_the_first
main([sys.argv[1], "--method", "mha2mla", "--no-verify", "--quiet", "--out", sys.argv[2]])
"""


def convert(out: Path, threads: int, *more: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert main([str(SOURCE), "--method", "mha2mla", "--no-verify", "--quiet", "--out", str(out), *more]) == 0
    finally:
        torch.set_num_threads(before)


def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    """With one thread until it is killed and two behind, and by one thread at once."""
    resumed, whole = tmp_path / "resumed" / "model.onnx", tmp_path / "whole" / "model.onnx"
    words = [sys.executable, "-c", _KILLED, SOURCE, resumed]
    killed = subprocess.run([str(w) for w in words], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert not resumed.exists()
    assert len([*store_folder(resumed).glob("*.safetensors")]) == 1
    layers, made = [], factorise.factorise_mha2mla

    def counted(site, *rest):
        layers.append(site.index)
        return made(site, *rest)

    monkeypatch.setattr(factorise, "factorise_mha2mla", counted)
    convert(resumed, 2)
    count = len(layers)
    convert(whole, 1)
    assert layers[0] == 1  # the first was read
    assert len(layers) == 2 * count + 1
    assert resumed.read_bytes() == whole.read_bytes()
    assert not store_folder(resumed).exists()


def test_several_layers_at_a_time_give_the_same_bytes(tmp_path):
    one, three = tmp_path / "one" / "model.onnx", tmp_path / "three" / "model.onnx"
    convert(one, 2)
    convert(three, 1, "--jobs", "3")
    assert one.read_bytes() == three.read_bytes()


def test_progress_tells_the_layer_and_the_peak_of_memory(programs):
    class Notes:
        def __init__(self) -> None:
            self.lines: list[str] = []

        def started(self, name, total) -> None:
            assert (name, total) == ("factorise", models.LAYERS)

        def advanced(self, note) -> None:
            self.lines.append(note)

        def told(self, line) -> None: ...

        def finished(self, timing) -> None:
            assert not timing.note

        def abandoned(self) -> None: ...

    notes, captured = Notes(), programs["llama-gqa"]
    plans = plan_layers(captured.sites, [models.WIDTH] * models.LAYERS, CONFIG)
    factorise.factorise_layers(captured.program, captured.sites, plans, CONFIG, Stages(notes))
    assert [line.split(",")[0] for line in notes.lines] == [site.path for site in captured.sites]
    assert all("peak" in line and line.endswith("GiB") for line in notes.lines)


def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    left, held_by_another = tmp_path / ".mla-compile-left", tmp_path / ".mla-compile-held"
    for folder in (left, held_by_another):
        folder.mkdir()
        (folder / "model.onnx.data").write_bytes(bytes(10))
    with held(held_by_another) as ours, moved_into(tmp_path) as hidden:
        assert ours
        (hidden / "model.onnx").write_bytes(b"x")
        assert not left.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mla-compile-held", "model.onnx"]


@contextlib.contextmanager
def _whole_file(folder):
    with whole_file(folder / "new") as file:
        file.touch()
        yield


@pytest.mark.parametrize("written", [kept_values, _whole_file, own_folder])
def test_every_folder_of_a_killed_process_is_removed_by_the_next(tmp_path, written):
    """Activations and statistics too; a living process's folder stays, and the user's own."""
    left = tmp_path / ".mla-compile-left"
    with written(tmp_path):
        for folder in (left, tmp_path / "mla-compile-experiments"):
            folder.mkdir()
        with written(tmp_path):
            hidden = [p for p in tmp_path.iterdir() if p.name.startswith(".")]
            assert len(hidden) == 2
            assert left not in hidden
    assert {p.name for p in tmp_path.iterdir()} - {"new"} == {"mla-compile-experiments"}


def _taken(folder, stack):
    assert stack.enter_context(held(folder))


@pytest.mark.parametrize("lost", [_taken, lambda folder, _: folder.rmdir()])
def test_a_folder_that_is_taken_for_a_leftover_before_it_is_held_is_made_anew(tmp_path, monkeypatch, lost):
    made, make = [], tempfile.mkdtemp

    def mkdtemp(**where):
        made.append(Path(make(**where)))
        if len(made) == 1:
            lost(made[0], stack)
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with contextlib.ExitStack() as stack, moved_into(tmp_path) as hidden:
        assert hidden == made[1]
        (hidden / "model.onnx").write_bytes(b"x")
    assert (tmp_path / "model.onnx").read_bytes() == b"x"


def test_a_new_graph_never_stands_beside_old_weights(tmp_path, monkeypatch):
    """Killed after any of the moves: there is no graph, or all of it is new."""
    move = Path.replace
    for survived in range(3):
        for name in ("model.onnx", "model.onnx.data", "report.json"):
            (tmp_path / name).write_text("old")
        moves = []

        def replace(self, to, moves=moves, survived=survived):
            if len(moves) == survived:
                raise KeyboardInterrupt
            moves.append(to)
            return move(self, to)

        monkeypatch.setattr(Path, "replace", replace)
        with contextlib.suppress(KeyboardInterrupt), moved_into(tmp_path) as hidden:
            for name in ("model.onnx", "model.onnx.data", "report.json"):
                (hidden / name).write_text("new")
        assert len(moves) == survived
        assert not (tmp_path / "model.onnx").exists()


def test_a_folder_in_the_place_of_a_file_stops_all_of_them(tmp_path):
    (tmp_path / "report.json").mkdir()
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(UsageError, match=r"report.json' is a folder"), moved_into(tmp_path) as hidden:
        [(hidden / name).write_text("new") for name in ("config.json", "model.onnx", "model.onnx.data", "report.json")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "report.json"]
    assert (tmp_path / "model.onnx").read_text() == "old"


def test_weights_of_an_earlier_file_do_not_stay_beside_a_smaller_one(tmp_path):
    for name in ("model.onnx", "model.onnx.data", "other.onnx", "other.onnx.data", "report.json.data"):
        (tmp_path / name).write_text("earlier")
    with moved_into(tmp_path) as hidden:
        (hidden / "model.onnx").write_text("new")
        (hidden / "report.json").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.onnx", "other.onnx", "other.onnx.data", "report.json", "report.json.data"
    ]  # fmt: skip
