"""Run the command line as ``python -m mla_compile``."""

from __future__ import annotations

import sys

from mla_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
