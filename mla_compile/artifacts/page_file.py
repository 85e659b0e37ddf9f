"""``mla-compile report``: the page of a report, drawn again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla_compile.artifacts.places import check_place
from mla_compile.disk.writing import moved_into
from mla_compile.errors import UsageError
from mla_compile.reporting.report_page import damage_explained, render_page

__all__ = ["write_page"]


def write_page(report: Mapping[str, Any], out: Path, measurement: Mapping[str, Any] | None, force: bool) -> None:
    """Write the page of a report.

    Args:
        report: What was read of a ``report.json``.
        out: The ``.html`` file.
        measurement: What ``mla-compile eval --json`` printed, or None.
        force: Replace an existing file.

    Raises:
        UsageError: The name is not that of a page, exists already, or its folder cannot be written.
        LoadError: The report is damaged.
    """
    if out.suffix != ".html":
        raise UsageError(f"'{out}' is not named like a page.", "Name it with the suffix .html.")
    if out.is_dir():
        raise UsageError(f"'{out}' is a folder.", "Name a .html file.")
    check_place(out, force)
    with damage_explained(out):
        page = render_page(report, measurement)
    with moved_into(out.parent) as folder:
        (folder / out.name).write_text(page, encoding="utf-8")
