"""The reference pages are what docstrings and the command line say now, and public docstrings are whole."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
from pages import ROOT
from pydantic import BaseModel

import mla_compile
from mla_compile import runtime

_SPEC = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

PUBLIC = [(name, value) for _, name, value in reference.public()]
CALLABLES = [(name, value) for name, value in PUBLIC if not isinstance(value, type)]
CLASSES = [(name, value) for name, value in PUBLIC if isinstance(value, type) and not issubclass(value, Exception)]
METHODS = [
    (f"{name}.{method}", function)
    for name, kind in CLASSES
    for method, function in reference.methods(kind)
    if not issubclass(kind, BaseModel) or method != "model_post_init"
]


@pytest.mark.parametrize("page", reference.PAGES)
def test_a_page_is_up_to_date(page):
    written = (ROOT / "docs" / page).read_text()
    assert written == reference.PAGES[page](), "run: python docs/make_reference.py"


def test_every_public_name_is_in_it():
    found = [value for _, value in PUBLIC]
    for module in (mla_compile, runtime):
        for name in module.__all__:
            assert any(getattr(module, name) is value for value in found), name


def parameters(value) -> set[str]:
    signature = inspect.signature(value)
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return {stars.get(p.kind, "") + name for name, p in signature.parameters.items() if name not in ("self", "cls")}


def listed(value, *names: str) -> set[str]:
    parts = reference.sections(value.__doc__)
    return {entry for name in names for entry in reference.entries(parts.get(name, ""))}


@pytest.mark.parametrize(("name", "value"), CALLABLES, ids=[n for n, _ in CALLABLES])
def test_a_function_describes_its_parameters(name, value):
    assert listed(value, "Args") == parameters(value)
    assert "Returns" in value.__doc__ or inspect.signature(value).return_annotation in ("None", None) or one_line(value)


@pytest.mark.parametrize(("name", "value"), METHODS, ids=[n for n, _ in METHODS])
def test_a_method_is_described(name, value):
    """With few parameters a sentence may be enough; where some are listed, all are."""
    assert value.__doc__
    if callable(value) and (given := listed(value, "Args")):
        assert given == parameters(value)


@pytest.mark.parametrize(("name", "kind"), CLASSES, ids=[n for n, _ in CLASSES])
def test_a_class_describes_its_fields(name, kind):
    if issubclass(kind, BaseModel):
        assert listed(kind, "Attributes") == kind.model_fields.keys() - {"schema_version"}
    elif hasattr(kind, "__dataclass_fields__"):
        assert listed(kind, "Attributes") == kind.__dataclass_fields__.keys()
    elif not getattr(kind, "_is_protocol", False):
        assert listed(kind, "Args") == parameters(kind)


def one_line(value) -> bool:
    """Whether the summary says what is returned."""
    return len(reference.sections(value.__doc__)[""].splitlines()) == 1


def test_docstrings_are_read_as_google_writes_them():
    parts = reference.sections(
        """Do it.

        Args:
            one: The first,
                in two lines.
            **others: The rest.

        Returns:
            Nothing.
        """
    )
    assert reference.entries(parts["Args"]) == {"one": "The first, in two lines.", "**others": "The rest."}
    assert parts["Returns"] == "Nothing."
