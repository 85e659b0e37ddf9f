"""The page for people: what it says, what it refers to, and how it looks in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from families.encoders import ENCODERS
from hypothesis import given
from hypothesis import strategies as st

import mla_compile
from mla_compile.cli import main
from mla_compile.reporting.charts import Axis, Bar, Series, bar_chart, dot_rows, line_chart
from mla_compile.reporting.report_page import render_page
from mla_compile.reporting.reproduction import reproducing

SECTIONS = ["warnings", "architecture", "layers", "choices", "quality", "speed", "checks", "reproduce", "environment"]


class Outline(HTMLParser):
    """Open elements, in order, and everything that a page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.sections: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.references += [found[name] or "" for name in ("src", "href", "xlink:href") if name in found]
        if tag == "section":
            self.sections.append(found["id"] or "")
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """Windows of random ids."""
    return torch.randint(5, 90, (24, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def report(text) -> dict[str, Any]:
    """A conversion by the default method of a tiny model with two layers."""
    compiled = mla_compile.compile(
        models.llama(), cache_ratio=0.5, calibration=text, calibration_tokens=256, seq_len=32, statistics_cache=False
    )
    return json.loads(compiled.report.to_json())


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    rows = [("fisher", 0.5, 1.01), ("fisher", 0.25, 1.1), ("mha2mla", 0.5, 1.2), ("mha2mla", 0.25, 2.5)]
    rows += [("transmla", 0.5, 1.1), ("transmla", 0.25, 1.3)]
    found = [{"model": m, "method": m, "cache_kept": kept, "perplexity_ratio": ratio} for m, kept, ratio in rows]
    return {"tokens": 8160, "models": found}


def test_a_page_has_every_section_and_refers_to_nothing_outside(report, measurement):
    report = report | {"warnings": ["A <b>warning</b> & more"]}
    page = render_page(report, measurement)
    outline = Outline(page)
    assert outline.sections == SECTIONS
    assert outline.references == ["data:,"]
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert "A &lt;b&gt;warning&lt;/b&gt; &amp; more" in page
    for told in ("Rotary components, by frequency", "What a latent leaves out", "Loss of each layer by itself"):
        assert told in page
    assert f"{report['cache']['ratio']:.1%}" in page
    assert f"{report['quality']['ratio']:.4f}" in page


def test_numbers_of_the_drawings_are_those_of_the_report(report):
    """Tooltips tell the numbers that are drawn."""
    page = render_page(report)
    for layer in report["layers"]:
        assert f"<title>{layer['path']}: {layer['kv_rank']:g}</title>" in page
        assert all(f"<title>{layer['path']}: {f:g}</title>" in page for f in layer["rope_frequencies"])
        ranks, shares = zip(*layer["spectrum"], strict=True)
        assert ranks[0] == 0
        assert shares[0] == 1.0
        assert shares[-1] == 0.0
        assert list(shares) == sorted(shares, reverse=True)
        assert layer["exact_rank"] - 1 <= ranks[-1] <= layer["exact_rank"]
        assert len(layer["rope_frequencies_before"]) == layer["rotary_dim"] // 2


def test_estimated_steps_grow_with_the_context(report):
    steps = [s for s in report["decode_steps"] if s["machine"]["itemsize"] == 4]
    contexts = [s["context"] for s in steps]
    assert contexts == sorted(contexts)
    assert len(contexts) == 3
    for step in steps:
        sizes = (sum(x[f"elements_{side}"] for x in report["layers"]) for side in ("before", "after"))
        assert [step[s]["cache_bytes"] for s in ("before", "after")] == [4 * step["context"] * n for n in sizes]


def test_a_model_given_in_python_is_made_again_in_python(report, text, tmp_path, monkeypatch):
    """The lines are run, and make the same choices."""
    assert report["in_memory"]
    assert "# model: the LlamaForCausalLM that was given" in render_page(report)
    assert reproducing(report)[-1] == "compiled.save('converted')"
    written = report | {"artifacts": {"model.onnx": 1}}
    *lines, run = reproducing(written)
    assert run.startswith("mla-compile run model.onnx")
    assert "cache_ratio=0.5" in lines[2]
    monkeypatch.chdir(tmp_path)
    code = "\n".join(lines).replace("calibration='TEXT'", "calibration=text, statistics_cache=False")
    exec(code, {"model": models.llama(), "text": text})
    again = json.loads(Path("report.json").read_text())
    assert again["layers"] == report["layers"]
    assert again["config"] == report["config"]


def test_commands_to_make_it_again_are_ones_that_the_command_line_takes(report, tmp_path, monkeypatch, capsys):
    """With a model that does not exist, that is all that is left to refuse."""
    report = report | {"in_memory": False}
    settings = report["config"] | {"cache_layout": "paged", "gradients": False}
    paged = report | {"config": settings, "artifacts": {"model.onnx": 1}}
    assert all(f" {words}" in reproducing(paged)[0] for words in ("--target cuda", "--no-gradients"))
    assert reproducing(report | {"artifacts": {"model.gguf": 1}})[0].split()[3] == "model.gguf"
    convert, *others = reproducing(report | {"source": "nowhere/absent.pt2", "artifacts": {"model.onnx": 1}})
    assert convert.startswith("mla-compile absent.pt2 --out model.onnx")
    assert "--cache-ratio 0.5" in convert
    assert [line.split()[1] for line in others] == ["run", "eval"]
    lines = reproducing(report | {"source": "org/Name-2.5-0.5B", "artifacts": {"model.onnx": 1}})
    assert lines[0].startswith("mla-compile org/Name-2.5-0.5B --out model.onnx")
    assert lines[-1].endswith(" --original org/Name-2.5-0.5B")
    monkeypatch.chdir(tmp_path)
    Path("org/Name-2.5-0.5B").mkdir(parents=True)
    lines = reproducing(report | {"source": "org/Name-2.5-0.5B", "artifacts": {"model.onnx": 1}})
    assert lines[0].startswith("mla-compile Name-2.5-0.5B --out model.onnx")
    Path("TEXT.txt").write_text("text " * 100)
    assert main(convert.replace("TEXT", "TEXT.txt").split()[1:]) == 2
    assert "'absent.pt2'" in capsys.readouterr().err


def test_an_operator_set_that_was_asked_for_is_asked_for_again(report):
    config, file = report["config"], {"in_memory": False, "artifacts": {"model.onnx": 1}}
    assert "--opset 24" in reproducing(report | file | {"config": config | {"opset": 24}})[0]
    assert "--opset" not in reproducing(report | file | {"config": config | {"opset": 24, "cache": "static"}})[0]


def test_what_was_trained_is_trained_again(report):
    given = report | {"in_memory": False, "training": {"tokens": 640}, "artifacts": {"model.onnx": 1}}
    assert reproducing(given)[0].endswith(" --finetune TEXT --finetune-tokens 640")
    assert "finetune='TEXT', finetune_tokens=640" in reproducing(given | {"in_memory": True})[2]
    later = given | {"before_training": {"quality": None}}
    convert, train, export, *_ = reproducing(later)
    assert convert.startswith("mla-compile LlamaForCausalLM --out converted ")
    assert "--finetune" not in convert
    assert train.startswith("mla-compile finetune converted --data TEXT --out finetuned")
    assert export == "mla-compile export finetuned --out model.onnx"
    assert len(reproducing(later | {"artifacts": {"model.pt2": 1}})) == 2


def test_files_for_tensorrt_are_made_again_for_tensorrt(report):
    made = report | {"target": "tensorrt", "artifacts": {"model.onnx": 1}}
    assert reproducing(made)[-1] == "compiled.to_tensorrt('model.onnx')"
    (line,) = reproducing(made | {"in_memory": False})  # which 'run' and 'eval' do not take
    assert line.startswith("mla-compile LlamaForCausalLM --out model.onnx --target tensorrt ")
    engine = made | {"in_memory": False, "artifacts": {"model.onnx": 1, "model.plan": 1, "model.plan.json": 1}}
    assert reproducing(engine)[0].startswith("mla-compile LlamaForCausalLM --out model.plan --")
    assert "--target" not in reproducing(engine)[0]


def test_a_folder_is_made_again_without_what_only_files_take(report):
    static = report | {"in_memory": False, "config": report["config"] | {"cache": "static"}}
    assert "--cache static" in reproducing(static | {"artifacts": {"model.onnx": 1}})[0]
    assert "--cache static" not in reproducing(static | {"artifacts": {"model.pt2": 1}})[0]


def test_without_text_a_page_says_what_is_not_known():
    compiled = mla_compile.compile(models.llama(), cache_ratio=0.5, method="mha2mla", check=False)
    page = render_page(compiled.report.to_dict())
    assert "What a latent leaves out, over its rank" in page
    assert "a share of the squares of the weights" in page
    assert "Nothing was checked." in page
    assert "not verified" in page
    assert Outline(page).sections == [s for s in SECTIONS if s != "quality"]


def test_where_nothing_is_left_out_no_spectrum_is_drawn():
    compiled = mla_compile.compile(models.llama(), exact=True, check=False)
    page = render_page(compiled.report.to_dict())
    assert "What a latent leaves out" not in page
    assert "What latents of other ranks would leave out was not found out." in page


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_encoders_and_encoder_decoders_have_a_page_too(name):
    family = ENCODERS[name]
    settings = {"encoders": True, "kv_rank": 16, "check": False}
    given = () if name == "bart" else (family.inputs(2, 7),)
    page = render_page(mla_compile.compile(family.build(), *given, **settings).report.to_dict())
    assert {"architecture", "layers", "checks", "environment"} <= set(Outline(page).sections)


def test_the_command_draws_a_report_again(report, measurement, tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "eval.json").write_text(json.dumps(measurement))
    assert main(["report", str(tmp_path), "--eval", str(tmp_path / "eval.json")]) == 0
    page = tmp_path / "report.html"
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text("utf-8") == render_page(report, measurement)
    assert main(["report", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "report.json"), "--out", str(tmp_path / "other.html")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.json", "other.html", "report.html", "report.json"]


def test_a_terminal_that_lacks_a_character_shows_what_it_is(report, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report))
    words = [sys.executable, "-m", "mla_compile", "report", "report.json", "--out", "\N{GREEK SMALL LETTER ALPHA}.html"]
    plain = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\\u03b1.html\n"), done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["absent"], "There is no report"),
        (["list.json"], "is not a report of a conversion"),
        (["report.json", "--out", "page.txt"], "is not named like a page"),
        (["report.json", "--eval", "list.json"], "is not a measurement"),
        (["report.json", "--eval", "absent"], "could not be read as a measurement"),
        (["report.json", "--eval", "part.json"], "'part.json' is not a measurement"),
        (["damaged.json"], "The report of 'damaged.json' is damaged"),
    ],
)
def test_what_cannot_be_drawn_is_refused(words, sentence, report, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("report.json").write_text(json.dumps(report))
    Path("list.json").write_text("[]")
    Path("part.json").write_text(json.dumps({"tokens": 1, "models": [{"perplexity_ratio": 1.0}]}))
    Path("damaged.json").write_text(json.dumps({**report, "cache": {"bytes_per_token_after": 1}}))
    for page_there in (False, True):  # what is wrong with the source is said first
        if page_there:
            Path("report.html").write_text("mine")
        assert main(["report", *words, *([] if page_there else ["--force"])]) == 2
        assert sentence in capsys.readouterr().err
        assert not page_there or Path("report.html").read_text() == "mine"
        Path("report.html").unlink(missing_ok=True)
    assert not list(tmp_path.glob("*.html"))


numbers = st.floats(1e-9, 1e12)


@given(st.lists(numbers, min_size=1), st.booleans())
def test_places_and_ticks_lie_between_the_ends(values, log):
    axis = Axis("x", log=log).fitted(values)
    places = [axis.place(v) for v in sorted(values)]
    assert all(0 <= p <= 1 for p in places)
    assert places == sorted(places)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * (axis.most - axis.least)  # no pixel
    assert axis.least - slack <= ticks[0]
    assert ticks[-1] <= axis.most * (1 + 1e-3) + slack


def test_an_axis_that_was_never_fitted_says_so():
    with pytest.raises(ValueError, match="'x' has no ends yet"):
        Axis("x").place(1.0)


def test_names_in_drawings_are_escaped():
    evil = "<script>alert(1)</script>"
    drawn = [
        line_chart(evil, Axis(evil), Axis(evil), [Series(evil, [(1, 1), (2, 2)], dots=True)]),
        bar_chart(evil, Axis(evil), [Bar(evil, [(1, "after")], evil)], {evil: "after"}),
        dot_rows(evil, Axis(evil), [(evil, [(1, "after")])], {evil: "after"}),
    ]
    assert not any("<script" in d for d in drawn)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["model.layers.0.self_attn", "model.layers.31.self_attn"], ["layers.0", "layers.31"]),
        (["a.layers_of_the_decoder.3.attention", "a.layers_of_the_decoder.4.attention"], ["3", "4"]),
        (["e.layers.0.self_attn", "d.layers.0.self_attn", "d.layers.0.cross_attn"], 3),
        (["h.0.attn", "h.1.mixer.attn"], ["0.attn", "1.mixer.attn"]),
        (["a", "a.b"], ["a", "b"]),
        (["only.layers.of.a.long.path.0.self_attn"], ["…th.0.self_attn"]),
        (["twice", "twice"], ["twice", "twice"]),
    ],
)
def test_rows_are_named_by_what_tells_them_apart(names, shown):
    """And by all of it where a pointer rests."""
    drawn = str(dot_rows("t", Axis("x"), [(name, [(1, "after")]) for name in names], {}))
    found = re.findall(r'<text class="tick"[^>]*text-anchor="end">([^<]*)</text>', drawn)
    assert all(len(name) <= 15 for name in found)
    assert len({*found}) == shown if isinstance(shown, int) else found == shown
    assert all(f"<title>{name}: 1</title>" in drawn for name in names)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by chromedriver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: .[dev]")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("Chromium and chromedriver are not installed (Debian: chromium, chromium-driver).")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    quiet = ["disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"]
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", *quiet):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver, log_output=subprocess.DEVNULL)
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


def crowded(report: dict[str, Any]) -> dict[str, Any]:
    """The same of a model with long names, forty layers of many shapes, and some that are kept."""
    path = "language_model.transformer.decoder.blocks.{}.attention.self_attention"
    layers = [report["layers"][0] | {"index": i, "path": path.format(i), "kv_rank": 1 + i % 8} for i in range(40)]
    kept = [{"index": i, "path": path.format(i), "reason": f"the mask of {path.format(i)} is odd"} for i in (40, 41)]
    return report | {"source": "a-model-with-a-very-long-name" * 4, "layers": layers, "kept": kept}


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_has_room_for_long_names_and_many_layers(browser, report, tmp_path, width):
    page = tmp_path / "report.html"
    full = crowded(report) | {"warnings": [f"{'language_model.transformer.decoder.blocks' * 3} is sensitive"]}
    page.write_text(render_page(full), encoding="utf-8")
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    shown = browser.execute_script("return document.body.innerText")
    assert "The four most frequent of 8 shapes" in shown
    assert "2 stay as they are" in shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_section(browser, report, measurement, tmp_path, width, scheme):
    page = tmp_path / "report.html"
    page.write_text(render_page(report | {"warnings": ["A warning."]}, measurement), encoding="utf-8")
    emulate = browser.execute_cdp_cmd
    emulate("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    emulate("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    seen = browser.execute_script(
        """
        const box = e => e.getBoundingClientRect();
        const light = c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 765;
        const style = getComputedStyle(document.body);
        return {
          sections: [...document.querySelectorAll("section")].map(s => [s.id, box(s).height, box(s).width]),
          drawings: [...document.querySelectorAll("svg")].map(s => [box(s).height, box(s).width]),
          wide: document.documentElement.scrollWidth, inner: window.innerWidth,
          ground: light(style.backgroundColor), ink: light(style.color),
          strokes: [...document.querySelectorAll("svg .line")].map(s => getComputedStyle(s).stroke),
          small: Math.min(...[...document.querySelectorAll("svg text")].map(t => box(t).height)),
        };
        """
    )
    assert [name for name, *_ in seen["sections"]] == SECTIONS
    assert all(height > 40 and wide > 300 for _, height, wide in seen["sections"])
    assert len(seen["drawings"]) >= 7
    assert all(height > 50 and wide > 250 for height, wide in seen["drawings"])
    assert seen["inner"] == width
    assert seen["wide"] <= width
    assert (
        (seen["ground"] > 0.9 and seen["ink"] < 0.2)
        if scheme == "light"
        else (seen["ground"] < 0.15 and seen["ink"] > 0.8)
    )
    assert len(seen["strokes"]) >= 5
    assert "none" not in seen["strokes"]
    assert seen["small"] >= 8  # pixels: text of a drawing can be read on a phone
