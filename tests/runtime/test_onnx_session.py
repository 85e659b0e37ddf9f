"""Whole models in ONNX Runtime: both kinds of cache give equal tokens, and what cannot work is said."""

from __future__ import annotations

import copy
import hashlib
import shutil
import signal
import subprocess
import sys

import models
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from conversion import convert, difference
from onnx import numpy_helper

from mla_compile.errors import LoadError, RefusedError, UsageError
from mla_compile.passes import onnx_export
from mla_compile.passes.lower_onnx import CacheForm, lower_to_onnx
from mla_compile.runtime import onnx_cache
from mla_compile.runtime.generate import generate
from mla_compile.runtime.onnx_checksum import require_unchanged
from mla_compile.runtime.onnx_session import PROVIDERS, OnnxDecoder
from mla_compile.runtime.torch_decoder import TorchDecoder

LOGITS = 1e-4  # as in tests/passes/test_lower_onnx.py: 1e-6 was observed
NAMES = ("llama-gqa", "mistral-window")
FIRST = NAMES[0]
PROMPTS = [[5, 9, 40, 7, 3], [8], [11, 12, 13]]


class Files:
    """A converted model, and its two files."""

    def __init__(self, captured, folder):
        self.windows = [site.mask.window or 0 for site in captured.sites]
        self.model = convert(captured.program, captured.sites, exact=False, cache_ratio=0.5)
        self.paths = {kind: folder / f"{kind}.onnx" for kind in ("dynamic", "static")}
        for kind, path in self.paths.items():
            self.write(path, static=kind == "static")

    def write(self, path, static):
        settings = {"opset": 24, "inline": False, "metadata": {}, "caches": CacheForm(static=static)}
        lower_to_onnx(self.model.graph, self.model.rows, path, **settings)

    def open(self, kind, **settings):
        return OnnxDecoder(self.paths[kind], threads=1, **settings)


@pytest.fixture(scope="module")
def files(programs, tmp_path_factory):
    written = {}

    def get(name=FIRST):
        if name not in written:
            written[name] = Files(programs[name], tmp_path_factory.mktemp(name))
        return written[name]

    return get


@pytest.fixture
def small_blocks(monkeypatch):
    """A static cache is shown in blocks of 4 rows: rows move after a few tokens."""
    monkeypatch.setattr(onnx_cache, "_BLOCK", 4)


def in_pieces(decoder, ids, mask, sizes, room=None):
    """Logits of whole sequences fed part by part, and the cache in the end."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    cache, parts, done = decoder.empty_cache(len(ids), room or ids.shape[1]), [], 0
    for size in sizes:
        own = slice(done, done + size)
        logits, cache = decoder.step(ids[:, own], mask[:, : done + size], positions[:, own], cache)
        parts.append(logits)
        done += size
    return np.concatenate(parts, 1), cache


@pytest.mark.parametrize("sizes", [(14,), (5, 1, 1, 3, 1, 3), (1,) * 14], ids=["whole", "pieces", "tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_both_caches_give_the_logits_of_the_module(files, small_blocks, name, sizes):
    """Of sequences of different lengths, padded on the left; the window is 6 tokens long."""
    case, ids = files(name), models.tokens(3, 14)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    with torch.no_grad():
        expected = case.model(ids, mask).logits
    for kind in case.paths:
        logits, _ = in_pieces(case.open(kind), ids.numpy(), mask.numpy(), sizes)
        assert difference(torch.from_numpy(logits)[mask != 0], expected[mask != 0]) <= LOGITS


@pytest.mark.parametrize("tokens", [1, 3, 14])
@pytest.mark.parametrize("name", NAMES)
def test_caches_hold_what_the_plan_says(files, name, tokens):
    """Oracle: the rows of every layer, of which a window leaves one less than it is long."""
    case, ids = files(name), models.tokens(2, tokens).numpy()
    kept = [min(tokens, window - 1) if window else tokens for window in case.windows]
    expected = 2 * 4 * sum(row * count for row, count in zip(case.model.rows, kept, strict=True))
    for kind in case.paths:
        decoder = case.open(kind)
        _, cache = in_pieces(decoder, ids, np.ones_like(ids), (tokens,))
        assert decoder.measured_bytes(cache) == decoder.cache_bytes(2, tokens) == expected


def test_a_static_cache_stays_where_it_is(files):
    decoder = files().open("static")
    ids = models.tokens(2, 9).numpy()
    first = decoder.empty_cache(2, 9)
    _, last = in_pieces(decoder, ids, np.ones_like(ids), (4, 5))
    positions = np.broadcast_to(np.arange(9), ids.shape)
    _, cache = decoder.step(ids, np.ones_like(ids), positions, first)
    assert [m.pointer for m in cache.memory] == [m.pointer for m in first.memory]
    for written, same in zip(cache.memory, last.memory, strict=True):
        np.testing.assert_allclose(written.numbers, same.numbers, rtol=1e-4, atol=1e-5)
        assert (written.numbers != 0).all()  # nothing was written elsewhere


@pytest.mark.parametrize("name", NAMES)
def test_both_caches_continue_64_prompts_of_any_length(files, small_blocks, name):
    """Oracle: each by itself, where nothing is padded."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, models.VOCABULARY, 1 + place % 11).tolist() for place in range(64)]
    case = files(name)
    static = case.open("static").generate(prompts, 9)
    assert static == case.open("dynamic").generate(prompts, 9)
    alone = case.open("dynamic")
    assert static[::13] == [alone.generate([prompt], 9)[0] for prompt in prompts[::13]]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_sequence_grows_beyond_the_longest_that_is_allowed(files, kind):
    """The last new token is not run, and takes no room."""
    decoder = files().open(kind, max_length=8)
    assert [len(row) for row in decoder.generate(PROMPTS, 4)] == [4, 4, 4]
    for prompts, new in ((PROMPTS, 5), ([[1] * 9], 1)):
        with pytest.raises(UsageError, match=r"take 9 tokens of cache.*has 8.*--max-length"):
            decoder.generate(prompts, new)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_step_goes_beyond_the_longest_that_is_allowed(files, kind):
    """Whatever room its cache was asked for."""
    decoder, ids = files().open(kind, max_length=4), models.tokens(2, 5).numpy()
    mask, positions = np.ones_like(ids), np.broadcast_to(np.arange(5), ids.shape)
    for tokens in (None, 3):
        with pytest.raises(UsageError, match=r"5.*--max-length"):
            decoder.step(ids, mask, positions, decoder.empty_cache(2, tokens))
    _, cache = decoder.step(ids[:, :4], mask[:, :4], positions[:, :4], decoder.empty_cache(2))
    with pytest.raises(UsageError, match=r"5.*--max-length"):
        decoder.step(ids[:, 4:], mask, positions[:, 4:], cache)


@pytest.mark.parametrize("kind", ["dynamic", "torch"])
def test_lists_are_as_good_as_arrays(files, kind):
    decoder = TorchDecoder(files().model) if kind == "torch" else files().open(kind)
    ids, mask, positions = [[5, 6, 7]], [[1, 1, 1]], [[0, 1, 2]]
    expected, _ = decoder.step(*map(np.array, (ids, mask, positions)), decoder.empty_cache(1))
    found, _ = decoder.step(ids, mask, positions, decoder.empty_cache(1))
    np.testing.assert_array_equal(found, expected)
    for wrong, said in (([5, 6, 7], "no new tokens"), ([[5, 6], [7]], "no array"), ([[5.5, 6, 7]], "are float64")):
        with pytest.raises(UsageError, match=said):
            decoder.step(wrong, mask, positions, decoder.empty_cache(1))
    with pytest.raises(UsageError, match="are float64"):
        decoder.step(ids, mask, [[0.5, 1, 2]], decoder.empty_cache(1))
    if kind == "dynamic":
        np.testing.assert_array_equal(decoder.logits(ids), expected)
        for wrong, said in ((5, "no new tokens"), ([5, 6], "no new tokens"), ([[[5]]], "no new"), (["a"], "integers")):
            with pytest.raises(UsageError, match=said):
                decoder.logits(wrong)


@pytest.mark.parametrize("kind", ["dynamic", "static", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_long_prompts_run_in_parts(files, kind, name, monkeypatch):
    """A part may hold nothing but padding of the shorter prompts. Files that compute few logits have parts too."""
    prompts = [[*range(1, 24)], [5, 6], [7]]

    def written():
        case = files(name)
        return generate(TorchDecoder(case.model) if kind == "torch" else case.open(kind), prompts, 6)

    expected, steps = written(), []
    monkeypatch.setattr("mla_compile.runtime.generate._LOGITS", 1)
    monkeypatch.setattr("mla_compile.runtime.generate._SCORES", 1)
    monkeypatch.setattr("mla_compile.runtime.generate._TOGETHER", 5)
    kinds = {OnnxDecoder: OnnxDecoder.step, TorchDecoder: TorchDecoder.step}
    for decoder in kinds:
        monkeypatch.setattr(
            decoder,
            "step",
            lambda self, ids, *others, **named: (
                steps.append(ids.shape[1]) or kinds[type(self)](self, ids, *others, **named)
            ),
        )
    assert written() == expected
    assert steps == [5, 5, 5, 5, 3, 1, 1, 1, 1, 1]


def test_a_full_static_cache_takes_no_more(files):
    decoder = files().open("static")
    ids = models.tokens(1, 5).numpy()
    _, cache = in_pieces(decoder, ids, np.ones_like(ids), (4, 1))
    with pytest.raises(UsageError, match="room for 5 tokens, and these are 6"):
        decoder.step(ids[:, :1], np.ones((1, 6), np.int64), np.full((1, 1), 5), cache)


@pytest.mark.parametrize("kind", ["dynamic", "static", "torch"])
@pytest.mark.parametrize("token", [-1, models.VOCABULARY])
def test_a_token_that_is_none_is_refused(files, kind, token):
    """ONNX Runtime counts negative ones from the end of the table."""
    decoder = TorchDecoder(files().model) if kind == "torch" else files().open(kind)
    with pytest.raises(UsageError, match=f"Token {token} is none of the {models.VOCABULARY}"):
        generate(decoder, [[5, token]], 3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_other_sizes_is_refused(files, kind, name):
    """ONNX Runtime would stretch a mask of one sequence, or of the new token alone, and so make padding real."""
    decoder, ids = files(name).open(kind), models.tokens(2, 9).numpy()
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    _, cache = in_pieces(decoder, ids[:, :8], mask[:, :8], (8,), room=9)
    last, positions = ids[:, 8:], np.array([[8], [4]])
    for wrong in (mask[:1], mask[:, 8:], mask[:, 5:], mask[:, :0], mask[0]):
        with pytest.raises(UsageError, match=r"mask"):
            decoder.step(last, wrong, positions, cache)
    with pytest.raises(UsageError, match="positions of shape"):
        decoder.step(last, mask, positions[:1], cache)
    with pytest.raises(UsageError, match=r"of 1 sequences|these are 1"):
        decoder.step(last[:1], mask[:1], positions[:1], cache)
    with pytest.raises(UsageError, match="no new tokens"):
        decoder.step(last[:, :0], mask[:, :8], positions[:, :0], cache)
    expected = in_pieces(decoder, ids, mask, (8, 1))[0][:, 8:]
    np.testing.assert_array_equal(decoder.step(last, mask, positions, cache)[0], expected)


def test_a_spent_cache_is_recognised(files):
    decoder = files().open("static")
    ids = models.tokens(1, 3).numpy()
    first = decoder.empty_cache(1, 9)
    decoder.step(ids, np.ones_like(ids), np.arange(3)[None], first)
    with pytest.raises(UsageError, match="mask is of 3 earlier tokens, but the cache of 0"):
        decoder.step(ids[:, :1], np.ones((1, 4), np.int64), np.full((1, 1), 3), first)


@pytest.mark.parametrize("between", ["a step that fails", "a repeatable one"])
def test_a_step_that_spends_nothing_leaves_a_static_cache_as_it_is(files, between):
    """At the token with which the rows of the second sequence move; oracle: a cache that nothing happened to."""
    decoder, ids = files().open("static"), models.tokens(2, 129).numpy()
    mask, positions = np.ones_like(ids), np.broadcast_to(np.arange(129), ids.shape)
    last = (ids[:, 128:], mask, positions[:, 128:])
    kept, tried = (in_pieces(decoder, ids[:, :128], mask[:, :128], (128,), room=129)[1] for _ in range(2))
    expected, _ = decoder.step(*last, kept)
    for _ in range(2):
        if between == "a repeatable one":
            decoder.repeatable(*last, tried)()
        else:
            with pytest.raises(UsageError):
                decoder.step(np.full_like(last[0], 5000), *last[1:], tried)
    np.testing.assert_array_equal(decoder.step(*last, tried)[0], expected)


def test_a_cache_that_nothing_can_hold_is_refused(files):
    with pytest.raises(UsageError, match="no memory"):
        files().open("static").empty_cache(1 << 20, 1 << 30)


def test_room_where_nobody_says_how_many_tokens(files):
    case = files()
    per_token = case.open("static").cache_bytes_per_token
    assert case.open("static").empty_cache(2).nbytes == 2 * 2048 * per_token
    assert case.open("static", max_length=10).empty_cache(2).nbytes == 2 * 10 * per_token


def test_a_window_of_one_token_has_no_static_cache(files, tmp_path):
    model = files("mistral-window").model
    graph = copy.copy(model.graph)
    graph.graph = copy.deepcopy(model.graph.graph)
    for node in graph.graph.nodes:
        if node.target is torch.ops.mla.latent_attention.default:
            node.update_arg([a.name for a in node.target._schema.arguments].index("window"), 1)
    settings = {"opset": 24, "inline": False, "metadata": {}, "caches": CacheForm(static=True)}
    with pytest.raises(RefusedError, match="Layer 0 sees one token only"):
        lower_to_onnx(graph, model.rows, tmp_path / "model.onnx", **settings)
    assert not any(tmp_path.iterdir())


# ---- faults


def test_a_missing_provider_is_not_replaced(files):
    """No run is silently slow: on a machine without CUDA it ends."""
    if PROVIDERS["cuda"] in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(UsageError, match=r"has no CUDAExecutionProvider.*mla-compile\[gpu\]"):
        files().open("dynamic", providers=[PROVIDERS["cuda"]])
    with pytest.raises(UsageError, match=r"has no Other.*CPUExecutionProvider"):
        files().open("dynamic", providers=[PROVIDERS["cpu"], "Other"])


def test_a_provider_that_does_not_start_is_not_replaced(files, monkeypatch):
    """As with a CUDA build without a driver: ONNX Runtime lists the provider and quietly takes the CPU."""
    listed = [PROVIDERS["cuda"], PROVIDERS["cpu"]]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, _: session(path, options, listed[1:]))
    with pytest.raises(UsageError, match="cannot start the CUDAExecutionProvider"):
        files().open("dynamic", providers=[PROVIDERS["cuda"]])


def test_providers_are_given_as_onnxruntime_takes_them(files):
    cpu = PROVIDERS["cpu"]
    for given in (cpu, [cpu], (cpu,), [(cpu, {})], [(cpu, {"use_arena": "0"})]):
        assert files().open("dynamic", providers=given).generate([[5, 6]], 1)
    for wrong in ([7], [cpu, ("Other",)], [(cpu, 1)], (cpu, {"use_arena": "0"})):
        with pytest.raises(UsageError, match="is no execution provider of ONNX Runtime"):
            files().open("dynamic", providers=wrong)
    with pytest.raises(UsageError, match="has no Other"):
        files().open("dynamic", providers=[("Other", {})])


def test_options_that_a_provider_does_not_take_are_not_said_of_the_file(files, monkeypatch):
    def refuse(*_):
        raise ValueError('provider_options_utils.h:151 Parse Unknown provider option: "memory".')

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(UsageError, match=r"does not take the options it was given .*memory.* Correct"):
        files().open("dynamic", providers=[(PROVIDERS["cpu"], {"memory": "1"})])


def test_what_is_wrong_with_us_is_not_said_of_the_file(files, pair, tmp_path, monkeypatch):
    """Only what no reader of ONNX can read is damaged."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match=r"model\.onnx.*Convert the model again"):
        OnnxDecoder(tmp_path / "model.onnx", kernel="fused")

    def broken(_):
        raise KeyError("a defect")

    monkeypatch.setattr("mla_compile.runtime.cpu.fused.fused_model", broken)
    with pytest.raises(KeyError, match="a defect"):
        files().open("dynamic", kernel="fused")


@pytest.fixture(scope="module")
def pair(files, tmp_path_factory):
    """A folder with a file and its weights beside it."""
    folder, whole = tmp_path_factory.mktemp("pair"), files().paths["static"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "EXTERNAL_DATA_BYTES", 1)
        onnx_export.save(onnx_ir.load(whole), folder / "model.onnx", {})
    return folder


@pytest.mark.parametrize("damaged", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_truncated_file_is_refused(pair, tmp_path, damaged, left):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(LoadError, match=r"model\.onnx.*Convert the model again"):
        OnnxDecoder(tmp_path / "model.onnx")


def test_what_is_no_file_is_said_once(tmp_path, caplog):
    (tmp_path / "model.onnx").write_bytes(b"garbage" * 100)
    with pytest.raises(LoadError, match="Convert the model again"):
        OnnxDecoder(tmp_path / "model.onnx", kernel="auto")
    assert not [r for r in caplog.records if r.name.startswith("mla_compile")]


@pytest.mark.parametrize("damaged", ["model.onnx.data", "static.onnx"])
def test_weights_that_changed_are_noticed(files, pair, tmp_path, damaged):
    """One bit of the largest weight; ONNX Runtime itself loads the file."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    shutil.copy(files().paths["static"], tmp_path)
    file = tmp_path / damaged.removesuffix(".data")
    require_unchanged(file)
    weights = [
        numpy_helper.to_array(w, str(tmp_path)) for w in onnx.load(file, load_external_data=False).graph.initializer
    ]
    whole = bytearray((tmp_path / damaged).read_bytes())
    place = whole.index(max(weights, key=lambda w: w.nbytes).tobytes())
    whole[place + 5] ^= 1
    (tmp_path / damaged).write_bytes(whole)
    OnnxDecoder(file)
    with pytest.raises(LoadError, match="not those that were written"):
        require_unchanged(file)


def test_data_that_is_gone_is_said(pair, tmp_path):
    shutil.copyfile(pair / "model.onnx", tmp_path / "model.onnx")
    with pytest.raises(LoadError, match=r"weights .* in 'model\.onnx\.data', which is not beside it"):
        OnnxDecoder(tmp_path / "model.onnx")


GENERATE = """
import sys
from mla_compile.runtime.onnx_session import OnnxDecoder
OnnxDecoder(sys.argv[1], threads=1).generate([[5, 9]], 100_000, on_tokens=lambda t: print(t[0], flush=True))
"""


def test_a_killed_run_leaves_everything_as_it_was(files):
    path = files().paths["static"]
    before = hashlib.sha256(path.read_bytes()).digest()
    with subprocess.Popen([sys.executable, "-c", GENERATE, path], stdout=subprocess.PIPE, text=True) as running:
        seen = [int(running.stdout.readline()) for _ in range(20)]
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert files().open("static").generate([[5, 9]], 20)[0] == seen
    assert [p.name for p in sorted(path.parent.iterdir())] == ["dynamic.onnx", "static.onnx"]


MEMORY = """
import resource, sys
from mla_compile.runtime.onnx_session import OnnxDecoder
peaks = []
def seen(tokens):
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
decoder = OnnxDecoder(sys.argv[1], threads=1)
(found,) = decoder.generate([[5, 9]], 10_000, on_tokens=seen)
print(len(found), peaks[999], peaks[-1], decoder.cache_bytes(1, 10_001))
"""


def test_memory_is_flat_over_10000_tokens(files):
    """The peak grows by the cache's own pages, touched as tokens come, and by what one step needs for 10,000 rows.

    That is the scores of 4 heads and masks, less than 1 MiB; 16 MiB are allowed. A leak of 2 KB per step would show.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, files().paths["static"]], capture_output=True, text=True, check=True
    )
    count, early, late, cache = map(int, done.stdout.split())
    assert count == 10_000
    assert 1024 * (late - early) < cache + (16 << 20)
