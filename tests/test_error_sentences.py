"""Every sentence that an error can say, found in the sources: all of them are listed in one file, and obey rules.

``tests/golden/error_sentences.txt`` is that list, to be read as a stranger would. It is ordered by what is said and
names no module, so that code may move. A new sentence is added to it by
``python -m pytest tests/test_error_sentences.py --update-golden``, once somebody has read it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from mla_compile import errors

ROOT = Path(__file__).parents[1]
LIST = "error_sentences.txt"
HOW = "Read what changed as a stranger would, then: python -m pytest tests/test_error_sentences.py --update-golden"

OWN = {name: getattr(errors, name) for name in errors.__all__ if hasattr(getattr(errors, name), "exit_code")}
"""Errors of a message and a remedy, which the command line prints."""
PLAIN = {"ValueError", "TypeError"}
"""What functions of Python raise: one text, remedy included."""
PIECES = "Pieces that are put into a sentence: why a layer is no such layer, or a setting none"
SILENT = {"AttributeError", "KeyError", "KeyboardInterrupt", "ShareDone", "SystemExit", "Exit", "ImportError"}
"""Protocols of Python and of this program; nobody is told their text as an error's."""
CAUGHT = {"MismatchError", "BadParameter", "RuntimeError"}
"""What is said of a layer, an option, or a loss, by somebody who catches it."""

LOWER_CASE_NAMES = ("accelerate", "g++", "llama.cpp", "matplotlib", "cos has", "window is")
REMEDIES = re.findall(
    r"\w+",
    """
    Add Begin Build Calibrate Call Check Choose Compile Compute Convert Copy Correct Download Export Free Generate
    Get Give Go Import Index Install Keep Leave Make Match Measure Name Pad Pass Plan Put Raise Read Remove Report
    Resume Rewrite Run Save See Set Start Stay Take Train Try Use Wait Write
    """,
)
"""Words that tell somebody to do something."""
LONGEST = {"message": 260, "remedy": 260, "piece": 160}
"""Letters, placeholders included: what is longer is not one thought."""


@dataclass(frozen=True, order=True)
class Said:
    """What one place in the sources says.

    Attributes:
        kind: The class of the error, or :data:`PIECES`.
        message: What failed and where, expressions as ``{name}`` and alternatives as ``[one|other]``.
        remedy: What to do; empty where the message has it, or none.
    """

    kind: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


def text_of(node: ast.expr, constants: dict[str, str]) -> str:
    """An expression as the reader of an error sees it."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(text_of(v, constants) for v in values)
        case ast.FormattedValue(value=value):
            return text_of(value, constants)
        case ast.IfExp(body=body, orelse=other):
            return f"[{text_of(body, constants)}|{text_of(other, constants)}]"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left, constants) + text_of(right, constants)
        case ast.Name(id=name):
            return constants.get(name, f"{{{name.strip('_')}}}")
        case ast.Attribute(attr=name):
            return f"{{{name.strip('_')}}}"
        case ast.Call(func=ast.Name(id="str"), args=[inner]):
            return text_of(inner, constants)
    names = [
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)
    ]
    return f"{{{names[-1].strip('_')}}}" if names else "{...}"


def is_text(node: ast.expr) -> bool:
    return any(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in ast.walk(node))


def name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def validators(tree: ast.AST) -> set[ast.AST]:
    """Everything inside functions that pydantic calls: what they raise is put into a sentence."""
    decorated = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("validator" in ast.unparse(d) for d in node.decorator_list)
    ]
    return {inner for node in decorated for inner in ast.walk(node)}


def constants_of(tree: ast.Module) -> dict[str, str]:
    """Texts that a module gives names to."""
    constants: dict[str, str] = {}
    for statement in (n for n in tree.body if isinstance(n, ast.Assign)):
        names, values = statement.targets[0], statement.value
        pairs = (
            zip(names.elts, values.elts, strict=False)
            if isinstance(names, ast.Tuple) and isinstance(values, ast.Tuple)
            else [(names, values)]
        )
        constants |= {
            n.id: text_of(v, {})
            for n, v in pairs
            if isinstance(n, ast.Name) and isinstance(v, ast.Constant | ast.JoinedStr | ast.BinOp) and is_text(v)
        }
    return constants


def imported(tree: ast.Module) -> dict[str, str]:
    """Texts that a module takes from others of ours."""
    found: dict[str, str] = {}
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("mla_compile."):
            parts = str(statement.module).split(".")
            folder = ROOT.joinpath(*(parts if parts[1] not in ("passes", "runtime") else parts[1:]))
            home = sources().get(folder.with_suffix(".py"))
            known = {} if home is None else constants_of(home)
            found |= {name.name: known[name.name] for name in statement.names if name.name in known}
    return found


def said_in(tree: ast.Module) -> Iterator[tuple[Said, ast.Call]]:
    """What a module says."""
    constants = imported(tree) | constants_of(tree)
    inside = validators(tree)
    raised = {node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, texts = name_of(node.func), [text_of(a, constants) for a in node.args]
        if name in OWN:
            yield Said(name, *texts), node
        elif node in raised and name in PLAIN:
            yield (Said(PIECES if node in inside else name, *texts)), node
        elif node in raised and name in CAUGHT:
            yield Said(PIECES, texts[-1]), node
        elif node in raised and name not in SILENT:  # a function that makes a sentence of a piece
            for argument, text in zip(node.args, texts, strict=True):
                if is_text(argument) and " " in text.strip():
                    yield Said(PIECES, text.strip()), node


@cache
def sources() -> dict[Path, ast.Module]:
    found = [p for folder in ("mla_compile", "passes", "runtime") for p in sorted((ROOT / folder).rglob("*.py"))]
    links = (ROOT / "mla_compile" / "passes", ROOT / "mla_compile" / "runtime")  # for type checkers
    return {p: ast.parse(p.read_text()) for p in found if not any(link in p.parents for link in links)}


@cache
def places() -> tuple[tuple[Said, ast.Call], ...]:
    return tuple(found for tree in sources().values() for found in said_in(tree))


@cache
def everything() -> tuple[Said, ...]:
    return tuple(sorted({said for said, _ in places()}))


def wrong_with(sentence: str, ends: str) -> list[str]:
    """What is wrong with any text, whatever it is of."""
    found = []
    if not sentence:
        return ["says nothing"]
    if sentence != sentence.strip() or "  " in sentence or "\n" in sentence:
        found.append("has spaces too many")
    if re.search(
        r"\b(traceback|exception|errno|nonetype|assert\w*|invalid|illegal|please|sorry|oops)\b|!", sentence, re.I
    ):
        found.append("speaks as programs do")
    if not re.search(ends, sentence):
        found.append("does not end as it should")
    return found


def starts_as_a_sentence(text: str) -> bool:
    return bool(re.match(r"[A-Z'{\[]|--[a-z]|\d|[a-z]+_[a-z_]+ ", text)) or text.startswith(LOWER_CASE_NAMES)


def wrong(said: Said) -> list[str]:
    """Rules that a sentence breaks."""
    if said.kind == PIECES:
        found = wrong_with(said.message, r"[^.\s]$")
        return found + (["is too long"] if len(said.message) > LONGEST["piece"] else [])
    found = wrong_with(said.message, r"(\.|\{message\}|\{error\}|\{subject\})$")
    if not starts_as_a_sentence(said.message):
        found.append("does not start as a sentence does")
    if len(said.message) > LONGEST["message"]:
        found.append("is too long")
    remedy = said.remedy
    if said.kind in PLAIN:
        parts = re.split(r"(?<=[.:]) ", said.message)
        remedy = parts[-1] if len(parts) > 1 else ""
        needed = re.search(r"\b(needs|must|is for|is of|are of)\b", said.message)
        if not needed and not re.match("|".join(REMEDIES), remedy):
            found.append("says not what to do")
        return found
    if not re.match("|".join((*REMEDIES, r"[\[{]", "No output was kept\\. ", "Or")), remedy):
        found.append("says not what to do")
    found += [f"its remedy {fault}" for fault in wrong_with(remedy, r"(\.|\]|\}|\))\.?$")]
    if len(remedy) > LONGEST["remedy"]:
        found.append("its remedy is too long")
    return found


def listed(all_said: Sequence[Said]) -> str:
    """The list as it is kept."""
    lines = ["Every sentence that an error of mla-compile can say; see tests/test_error_sentences.py."]
    for kind in (*(k for k in OWN if k != "MlaCompileError"), *sorted(PLAIN), PIECES):
        code = f" (exit code {OWN[kind].exit_code})" if kind in OWN else ""
        lines += ["", f"{kind}{code}", "", *sorted({f"- {said}" for said in all_said if said.kind == kind})]
    return "\n".join(lines) + "\n"


def test_every_sentence_is_listed(golden, request):
    path = Path(__file__).parent / "golden" / LIST
    now = listed(everything())
    if not request.config.getoption("--update-golden") and path.is_file():
        before = {*path.read_text().splitlines()}
        new, gone = sorted({*now.splitlines()} - before), sorted(before - {*now.splitlines()})
        assert not new, HOW
        assert not gone, HOW
    golden(LIST, now)


def test_every_sentence_obeys_the_rules():
    broken = [f"{said.kind}: {said}: it {' and '.join(faults)}" for said in everything() if (faults := wrong(said))]
    assert not broken, "\n".join(broken)


def test_the_rules_are_rules():
    """A check that nothing can fail is none."""
    good = Said("UsageError", "'{path}' is a folder.", "Name a file.")
    assert not wrong(good)
    for message, remedy in [
        ("", "Name a file."),
        ("'{path}' is a folder", "Name a file."),
        ("'{path}' is a folder. ", "Name a file."),
        ("'{path}'  is a folder.", "Name a file."),
        ("it is a folder.", "Name a file."),
        ("Invalid path '{path}'.", "Name a file."),
        ("'{path}' is a folder!", "Name a file."),
        ("'{path}' raised an exception.", "Name a file."),
        (f"'{{path}}' is {'very ' * 60}long.", "Name a file."),
        ("'{path}' is a folder.", ""),
        ("'{path}' is a folder.", "Name a file"),
        ("'{path}' is a folder.", "A file is needed."),
    ]:
        assert wrong(Said("UsageError", message, remedy)), (message, remedy)
    assert not wrong(Said("ValueError", "Ranks are negative. Pass a rank of at least 1."))
    assert wrong(Said("ValueError", "Ranks are negative."))
    assert not wrong(Said(PIECES, "the mask is not causal"))
    assert wrong(Said(PIECES, "The mask is not causal."))


def test_every_error_is_of_a_known_kind():
    """Whatever else is raised would reach a user without a sentence."""
    known = {*OWN, *PLAIN, *CAUGHT, *SILENT}
    strange = []
    for path, tree in sources().items():
        functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        functions |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = name_of(node.exc.func)
                if name not in known | {f for f in functions if not f[0].isupper()}:
                    strange.append(f"{path.relative_to(ROOT)}: {name}")
    assert not strange


@pytest.mark.parametrize("name", OWN)
def test_every_error_says_what_and_what_to_do(name):
    calls = [call for said, call in places() if said.kind == name]
    assert all(len(call.args) == 2 for call in calls)
