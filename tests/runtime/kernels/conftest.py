"""The kernels themselves run only under Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
