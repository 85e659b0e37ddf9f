"""Keep what exporters say about their own internals from the user; what fails is raised, and told once."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["quiet_exporter"]


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence warnings, logs and the graph that ``torch.export`` prints when it fails."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
