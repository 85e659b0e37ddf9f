"""What the pages say is so: every option they name exists and every option is named, every link leads somewhere."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from typing import Any

import pages
import pytest
import typer.main
from pages import ROOT, Block, Command

from mla_compile.cli import app

LANGUAGES = {"console", "python", "text", "cpp", "yaml"}
ELSEWHERE = {"--dynamicPlugins", "--preview", "--onnx", "--tensor-type", "--doctest-modules"}
"""Options of other programs that texts name."""

ALL_BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
ALL_COMMANDS = [command for block in ALL_BLOCKS if block.language == "console" for command in block.commands]


@cache
def parsers() -> dict[str, Any]:
    """The parser of every command."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def options(command: str) -> set[str]:
    return {name for p in parsers()[command].params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}


EVERY_OPTION = sorted({o for command in parsers() for o in options(command) if o.startswith("--")} - {"--help"})


def parsed(words: list[str]) -> dict[str, Any]:
    """The settings that our command line reads from these words, without doing anything."""
    verb, *rest = words if words[0] in parsers() else ["convert", *words]
    return dict(parsers()[verb].make_context(verb, rest).params) | {"verb": verb}


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=lambda b: b.name)
def test_a_block_says_its_language(block: Block):
    assert block.language in LANGUAGES
    if block.language == "console":
        assert block.commands, "a console block has lines that begin with '$ '"
    if block.language == "python":
        ast.parse(block.text)


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if c.ours is not None], ids=lambda c: c.line)
def test_a_command_of_ours_is_parsed(command: Command):
    """Also those that cannot be run here: every option exists and takes this value."""
    words = command.ours
    assert words
    if words == ["--install-completion"]:
        return
    settings = parsed(words)
    if settings["verb"] == "plan":
        quick = settings["exact"] or settings["encoders"] or settings["method"] == "mha2mla"
        weightless = settings["model"].endswith(".json")
        assert settings["calibration"] is not None or quick or weightless, "a plan by text without text is refused"


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if c.words[0] == "make"], ids=lambda c: c.line)
def test_make_has_what_pages_make(command: Command):
    target = next(word for word in command.words[1:] if "=" not in word and not word.startswith("-"))
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", pages.PAGES)
def test_extras_that_pages_install_exist(page):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"(?:mla-compile|'\.|\s\.)\[([\w,-]+)\]", (ROOT / page).read_text())
    assert {extra for group in named for extra in group.split(",")} <= known.keys()


@pytest.mark.parametrize("page", pages.PAGES)
def test_options_that_texts_name_exist(page):
    named = {option for span in pages.spans(page) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    others = re.findall(r"--[a-z][\w-]*", " ".join((ROOT / "examples").joinpath(f).read_text() for f in SCRIPTS))
    benchmarks = re.findall(r'"(--[a-z][\w-]*)"', "".join(p.read_text() for p in (ROOT / "benchmarks").glob("*.py")))
    root = {"--version", "--install-completion", "--show-completion", "--help"}
    assert named <= {*EVERY_OPTION, *root, *ELSEWHERE, *others, *benchmarks, "--self-registering"}


SCRIPTS = [path.name for path in (ROOT / "examples").glob("*.py")]


@pytest.mark.parametrize("option", EVERY_OPTION)
def test_every_option_is_on_a_page(option):
    text = "\n".join((ROOT / page).read_text() for page in pages.PAGES)
    assert re.search(rf"(?<![\w-]){option}(?![\w-])", text)


@pytest.mark.parametrize("page", pages.LINKED)
def test_links_lead_somewhere(page):
    for link in pages.links(page):
        if re.match(r"[a-z]+:", link):
            assert link.startswith(("https://", "mailto:"))
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in pages.anchors(target.resolve().relative_to(ROOT).as_posix()), link


def test_every_page_is_linked_from_another():
    linked = {
        ((ROOT / page).parent / link.partition("#")[0]).resolve()
        for page in pages.PAGES
        for link in pages.links(page)
        if not re.match(r"[a-z]+:", link) and not link.startswith("#")
    }
    assert {ROOT / page for page in pages.PAGES} - {ROOT / "README.md"} <= linked


def test_the_architecture_page_names_every_file_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = (ROOT / "mla_compile", ROOT / "passes", ROOT / "runtime")
    files = {str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py")}
    elsewhere = ("runtime/kernels/", "runtime/tensorrt/", "runtime/cpu/")  # these have pages of their own
    told = {name for name in files if "__" not in name and not name.startswith(elsewhere)}
    named = re.findall(r"`([\w/]+\.py)`", page)
    assert not {name for name in told if name.rpartition("/")[2] not in {n.rpartition("/")[2] for n in named}}
    assert not {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)}
