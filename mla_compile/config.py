"""What the user asks for: one frozen, validated object behind the command line, YAML and Python alike."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mla_compile.errors import UsageError

__all__ = ["DEFAULT_CACHE_RATIO", "REPORT", "SETTINGS", "CompileConfig", "holds_conversion", "make_config", "validated"]

_STOCK = ("deepseek", "gguf")
"""Formats that hold a stock DeepSeek-V3 checkpoint."""
_Settings = TypeVar("_Settings", bound=BaseModel)

DEFAULT_CACHE_RATIO = 0.3125
"""Cache kept when nothing is asked for: the mildest setting of the MHA2MLA paper (its -68.75 %)."""
SETTINGS, REPORT = "mla_config.yaml", "report.json"
"""What the settings of a conversion are called in the folder that it wrote, and its report beside any result."""


class CompileConfig(BaseModel):
    """Settings of one conversion.

    Attributes:
        method: How sizes and weights are chosen: ``fisher`` (by the effect of errors on the loss), ``transmla`` or
            ``mha2mla`` (as in the papers). ``auto`` is ``mha2mla`` if one of its own settings is given, else
            ``fisher``. Only ``mha2mla`` needs no calibration text.
        selection: Which rotary pairs keep rotating (``mha2mla``); ``auto`` is ``2-norm`` with calibration text, else
            ``uniform``.
        rope_dims: Rotating channels to keep (even): in ``mha2mla`` of every key/value head, an eighth of the head by
            default, as in the paper; in the other methods, which choose by default, of the rope key shared by all
            heads.
        svd: Factorise keys and values into one latent (``joint``) or into two halves of it (``split``; ``mha2mla``).
        cache_ratio: Largest cache size, as a fraction of the original.
        kv_rank: Latent rank of every layer, instead of a ratio.
        uniform_rank: The same latent rank in all layers: the smallest that any of them would get.
        layout: Cache layout (``fisher``, ``transmla``): ``free``, or ``deepseek`` for what a stock DeepSeek-V3
            checkpoint can express: one rank, and one geometric table of frequencies with one component each.
        format: Output format: ``auto`` follows the name of the file or folder, ``hf`` is a folder for
            :func:`mla_compile.load`, ``deepseek`` a folder with a DeepSeek-V3 checkpoint, ``gguf`` a file for llama.cpp
            made from one.
        preset: ``flashmla`` pads such a checkpoint with zeros to FlashMLA's sizes, and requests these sizes if no
            others are given.
        q_rank: Rank of the queries' own latent in such a checkpoint; None for a full-rank query projection.
        exact: Keep every rotating channel and the full rank: the result must equal the original.
        gradients: Whether ``fisher`` runs a backward pass; without one, the output projection gives the cost of an
            attention output's error.
        calibration_tokens: Tokens of calibration text to use, from its beginning.
        polish_steps: Steps of training the new matrices on calibration text to match the original's predictions.
        seq_len: Window length for calibration and evaluation; the model's limit, at most 512, by default.
        seed: Seed of random ids to verify on; it does not choose text.
        opset: ONNX operator set; by default 23, or 24 for a static cache.
        cache: Caches of the ONNX file: ``dynamic`` ones grow by a row per token, and any caller of ONNX Runtime can run
            them; a ``static`` one is a buffer of the caller, written in place.
        dtype: Type of the result's weights and caches; ``auto`` keeps the model's own.
        cache_type: Cache type of the ONNX file: the result's type (``auto``; or ``float32``, if it is that), or
            ``int8`` codes with two scales per token.
        cache_layout: Cache layout of the ONNX file: ``rows``, one tensor per layer; ``genai``, halves of rows named key
            and value, equally long in all layers, for onnxruntime-genai; or ``paged``, blocks of 16 tokens in half
            precision for an operator of ONNX Runtime's CUDA provider (``--target cuda``).
        inline: Use standard operators only, without ``LatentAttention`` nodes.
        encoders: Convert bidirectional attention too, which has no cache: its projections become low-rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    method: Literal["auto", "fisher", "transmla", "mha2mla"] = "auto"
    selection: Literal["auto", "high", "low", "uniform", "2-norm"] = "auto"
    rope_dims: int | None = Field(default=None, ge=0, multiple_of=2)
    svd: Literal["joint", "split"] = "joint"
    cache_ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    kv_rank: int | None = Field(default=None, ge=1)
    uniform_rank: bool = False
    layout: Literal["free", "deepseek"] = "free"
    format: Literal["auto", "hf", "deepseek", "gguf"] = "auto"
    preset: Literal["none", "flashmla"] = "none"
    q_rank: int | None = Field(default=None, ge=1)
    exact: bool = False
    gradients: bool = True
    calibration_tokens: int = Field(default=65536, ge=1)
    polish_steps: int = Field(default=0, ge=0, le=1_000_000)
    seq_len: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**63)
    opset: Literal[23, 24] = 23
    cache: Literal["dynamic", "static"] = "dynamic"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    cache_type: Literal["auto", "float32", "int8"] = "auto"
    cache_layout: Literal["rows", "genai", "paged"] = "rows"
    inline: bool = False
    encoders: bool = False

    @model_validator(mode="before")
    @classmethod
    def _what_follows(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The operator set that the kind of cache needs, and the one layout that a format has."""
        opset = given.get("opset") or (24 if given.get("cache") == "static" else 23)
        layout = {"layout": "deepseek"} if given.get("format") in _STOCK else {}
        return {**given, "opset": opset, **layout}

    @property
    def onnx_options(self) -> tuple[str, ...]:
        """Options that say how an ONNX file is written, as far as they are not the defaults."""
        given = {
            "--cache static": self.cache == "static",
            f"--opset {self.opset}": self.cache != "static" and self.opset != 23,
            "--inline": self.inline,
        }
        return tuple(option for option, there in given.items() if there)

    @property
    def for_stock_code(self) -> bool:
        """Whether a DeepSeek-V3 checkpoint will be written, as a folder or as a file."""
        return self.format in _STOCK

    def lossless(self) -> CompileConfig:
        """The same settings with nothing left out: every rotation, and the full rank."""
        sizes = {"cache_ratio": None, "kv_rank": None, "uniform_rank": False, "rope_dims": None}
        return self.model_copy(update={"exact": True, "selection": "uniform", **sizes})

    @property
    def chosen_method(self) -> str:
        """The method, ``auto`` resolved."""
        own = self.selection != "auto" or self.svd != "joint" or self.encoders
        return self.method if self.method != "auto" else "mha2mla" if own else "fisher"

    @property
    def needs_text(self) -> bool:
        """Whether something is chosen, or trained, by what the model does on text."""
        measured = self.chosen_method != "mha2mla" or self.selection == "2-norm" or self.polish_steps > 0
        return measured and not self.exact

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> CompileConfig:
        own = {"selection": self.selection != "auto", "svd": self.svd != "joint"}
        foreign = [name for name, given in own.items() if given]
        if foreign and self.method in ("fisher", "transmla"):
            verb = "belongs" if len(foreign) == 1 else "belong"
            raise ValueError(f"{' and '.join(foreign)} {verb} to the method mha2mla, not to {self.method}")
        return self

    @model_validator(mode="after")
    def _settings_of_the_layout(self) -> CompileConfig:
        if self.preset != "none" and not self.for_stock_code:
            raise ValueError(f"the preset {self.preset} belongs to the format deepseek")
        if self.q_rank is not None and not self.for_stock_code:
            raise ValueError("q_rank belongs to the format deepseek, whose queries may have a latent of their own")
        if self.layout == "free":
            return self
        if self.exact:
            raise ValueError("exact keeps a rope key for every head, and the layout deepseek has one for all")
        if self.chosen_method == "mha2mla":
            raise ValueError(
                f"the layout deepseek{f' of the format {self.format}' if self.for_stock_code else ''} has one rope key "
                "for all heads, as fisher and transmla make it, and mha2mla one for every head"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_file(self) -> CompileConfig:
        if self.cache == "static" and self.opset < 24:
            raise ValueError("a static cache needs opset 24, whose TensorScatter writes it")
        if self.cache_type != "auto" and self.dtype in ("float16", "bfloat16"):
            raise ValueError(
                f"the cache of a model in {self.dtype} holds that type, and {self.cache_type} ones are of float32"
            )
        if self.cache_layout == "genai" and self.cache_type == "int8":
            raise ValueError(
                "the cache layout genai holds float32, for onnxruntime-genai gives a layer one tensor of keys and one "
                "of values, and int8 codes need a third for their scales"
            )
        if self.cache_layout == "paged" and self.cache_type == "int8":
            raise ValueError("a file for CUDA has a cache in half precision, which int8 is not")
        if self.cache_layout != "rows" and self.for_stock_code:
            raise ValueError(
                f"the cache layout {self.cache_layout} is of ONNX files, and the format {self.format} is a checkpoint"
            )
        if self.cache_type == "int8" and self.for_stock_code:
            raise ValueError(f"int8 caches are of ONNX files, and the format {self.format} is a checkpoint")
        options = self.onnx_options
        if options and self.for_stock_code:
            raise ValueError(f"{options[0]} is of ONNX files, and the format {self.format} is a checkpoint")
        return self

    @model_validator(mode="after")
    def _one_size(self) -> CompileConfig:
        chosen = [
            name
            for name, given in (
                ("exact", self.exact),
                ("cache_ratio", self.cache_ratio is not None),
                ("kv_rank", self.kv_rank is not None),
            )
            if given
        ]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other")
        if self.exact and self.rope_dims is not None:
            raise ValueError("exact keeps every rotating channel, so rope_dims cannot be chosen")
        if self.exact and self.uniform_rank:
            raise ValueError("exact keeps the full rank of every layer, so it cannot be the same in all")
        if self.exact and self.polish_steps:
            raise ValueError("exact leaves nothing out, so there is nothing to polish (polish_steps)")
        return self


def make_config(**settings: Any) -> CompileConfig:  # noqa: ANN401 - validated by pydantic
    """Validate settings.

    Raises:
        UsageError: A name is unknown or a value is out of range; the sentence names it.
    """
    return validated(CompileConfig, "convert", settings)


def validated(kind: type[_Settings], command: str, settings: Mapping[str, Any]) -> _Settings:
    """Make a settings object, or say in a sentence which of the settings of a command cannot be.

    Raises:
        UsageError: A name is unknown or a value is out of range.
    """
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ").rstrip(".")
        problem = problem[0].lower() + problem[1:]
        if first["type"] == "extra_forbidden":
            meant = difflib.get_close_matches(name, kind.model_fields, 1) or [*kind.model_fields]
            raise UsageError(f"There is no setting '{name}'.", f"Use {', '.join(meant)}.") from error
        if name == "cache_ratio":
            problem += " (a quarter is 0.25)"
        if not name:
            raise UsageError(
                f"Settings: {problem}.", f"Leave one of them out; 'mla-compile {command} --help' tells of each."
            ) from error
        raise UsageError(
            f"The setting {name}={first['input']!r} is not allowed: {problem}.",
            f"See 'mla-compile {command} --help' for the allowed values.",
        ) from error


def holds_conversion(folder: Path) -> bool:
    """Whether a folder was written by a conversion, as an archive or as a checkpoint: it is told by its settings."""
    return (folder / SETTINGS).is_file()
