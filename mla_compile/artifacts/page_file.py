"""``mla-compile report``: the page of a report, drawn again."""

from __future__ import annotations

from pathlib import Path

from mla_compile.artifacts.places import check_place
from mla_compile.disk.writing import moved_into
from mla_compile.errors import UsageError
from mla_compile.reporting.report_page import damage_explained, read_measurement, read_report, render_page

__all__ = ["write_page"]


def write_page(source: Path, out: Path, measurement: Path | None, force: bool) -> None:
    """Write the page of a report.

    Args:
        source: A ``report.json``, or the folder that it is in.
        out: The ``.html`` file.
        measurement: A file of what ``mla-compile eval --json`` printed, or None.
        force: Replace an existing file.

    Raises:
        UsageError: The name is not that of a page, exists already, or its folder cannot be written.
        LoadError: The report or the measurement cannot be read, or is damaged.
    """
    if out.suffix != ".html":
        raise UsageError(f"'{out}' is not named like a page.", "Name it with the suffix .html.")
    if out.is_dir():
        raise UsageError(f"'{out}' is a folder.", "Name a .html file.")
    report = read_report(source)
    measured = None if measurement is None else read_measurement(measurement)
    with damage_explained(source):
        page = render_page(report, measured)
    check_place(out, force)
    with moved_into(out.parent) as folder:
        (folder / out.name).write_text(page, encoding="utf-8")
