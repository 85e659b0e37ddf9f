"""The Hugging Face hub: what is a name there, and whether it can be reached."""

from __future__ import annotations

import functools
import re
from pathlib import Path

__all__ = ["hub_answers", "is_hub_id"]

_SECONDS = 10
"""How long the hub may take to answer."""
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = (
    *(".bin", ".ckpt", ".engine", ".gguf", ".h5", ".json", ".onnx", ".pb", ".pkl", ".plan", ".pt", ".pt2", ".pth"),
    *(".safetensors", ".tflite", ".txt", ".yaml", ".zip"),
)
"""Suffixes of files; others are parts of names, as in ``Qwen2.5-0.5B``."""


def is_hub_id(name: str) -> bool:
    """Whether a name may be a model's, mostly behind its organisation's, and is no path of anything on this machine."""
    return _ID.fullmatch(name) is not None and not name.endswith(_FILES) and not Path(name).exists()


@functools.cache
def hub_answers(name: str) -> bool:
    """Whether the hub says anything of a model, be it that it has none; asked once in a process.

    Its own library asks again and again for half a minute before it says that there is no network.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # its versions reach the network by libraries whose errors share no base
        return False
    return True
