"""The pages of the documentation as tests read them: fenced blocks, commands, links and headings, by a Markdown parser."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = tuple(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "examples").glob("*.md")),
    )
)
"""Every page whose blocks are run."""
LINKED = (*PAGES, "CHANGELOG.md", *(p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("benchmarks/*.md"))))
"""Every page whose links are followed."""
OURS = "mla-compile"

_MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Where it stands.
        line: Its first line there.
        language: What its fence says; empty if nothing, or if it has no fence but an indent.
        text: What is in it.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """The lines behind a prompt, in order, and what is shown behind each of them."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found += [(part.strip(), []) for part in line[2:].split(" && ")]
            elif found:
                found[-1][1].append(line)
        return tuple(Command(self, line, tuple(shown)) for line, shown in found)


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        block: Where it stands.
        line: What is typed, its comment included.
        shown: What the page shows that it prints.
    """

    block: Block
    line: str
    shown: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)

    @property
    def ours(self) -> list[str] | None:
        """What this project's command line gets, whoever starts it."""
        words = self.words
        if words[0] == OURS:
            return words[1:]
        return words[words.index("mla_compile") + 1 :] if "mla_compile" in words else None


def _tokens(page: str) -> list[Any]:
    return _MARKDOWN.parse((ROOT / page).read_text())


def blocks(page: str) -> tuple[Block, ...]:
    """All blocks of code of a page, indented ones too."""
    return tuple(
        Block(page, token.map[0] + 1, token.info.strip(), token.content)
        for token in _tokens(page)
        if token.type in ("fence", "code_block")
    )


def spans(page: str) -> tuple[str, ...]:
    """What stands between single backticks."""
    inline = [child for token in _tokens(page) for child in token.children or ()]
    return tuple(child.content for child in inline if child.type == "code_inline")


def links(page: str) -> tuple[str, ...]:
    """Where links and images lead."""
    inline = [child for token in _tokens(page) for child in token.children or ()]
    found = [child.attrGet("href") or child.attrGet("src") for child in inline if child.type in ("link_open", "image")]
    sources = re.findall(r'(?:srcset|src|href)="([^"]+)"', (ROOT / page).read_text())  # HTML, such as <picture>
    return (*found, *sources)


def anchors(page: str) -> frozenset[str]:
    """What headings are called in links: lower case, no punctuation, hyphens for spaces, as code hosts do it."""
    tokens = _tokens(page)
    titles = [
        "".join(c.content for c in b.children)
        for a, b in zip(tokens, tokens[1:], strict=False)
        if a.type == "heading_open"
    ]
    return frozenset(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)
