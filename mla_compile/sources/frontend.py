"""Read a model from wherever the user has it, and bring it to the one form every pass reads.

Nothing here runs code that came with a model: archives are read by ``torch.export.load``, checkpoints through
safetensors. A pickled module is only opened when the user says so.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mla_compile.errors import LoadError, MlaCompileError
from mla_compile.program import AnyProgram, Assets, OtherProgram, Program
from mla_compile.quiet import quiet_exporter
from mla_compile.sources import huggingface
from mla_compile.sources.exporting import export_module
from mla_compile.sources.patterns import patterns

__all__ = [
    "capture",
    "capture_any",
    "language_model",
    "load_any",
    "load_program",
    "program_from_export",
    "read_export",
]

_log = logging.getLogger(__name__)
_ASSERTION = torch.ops.aten._assert_tensor_metadata.default
_RESPELLED = {torch.ops.aten.type_as.default: lambda value, other: value.to(other.dtype)}
"""Operators that read a value for its type only: what attention scores are read for is looked at closely."""
_HOW_TO_EXPORT = (
    "Export it with torch.export.save(torch.export.export(model.eval(), (ids,), dynamic_shapes="
    "({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)), 'model.pt2'), ids being a batch of at least 2 by 3 token ids."
)


def load_program(
    source: str | Path, *, tokenizer: str | None = None, attention: str = "auto", unsafe: bool = False
) -> Program:
    """Load a causal language model by name; see :func:`load_any`.

    Raises:
        LoadError: The source does not exist, cannot be exported, or is no causal language model.
    """
    return language_model(load_any(source, tokenizer=tokenizer, attention=attention, unsafe=unsafe))


def language_model(program: AnyProgram) -> Program:
    """Return the program as a causal language model.

    Raises:
        LoadError: It is none.
    """
    if isinstance(program, OtherProgram):
        raise program.why
    assert isinstance(program, Program)
    return program


def load_any(
    source: str | Path,
    *,
    tokenizer: str | None = None,
    attention: str = "auto",
    unsafe: bool = False,
    dtype: torch.dtype | None = None,
) -> AnyProgram:
    """Load a model of any kind by name.

    Args:
        source: A ``torch.export`` archive (``.pt2`` or ``.pt``), a Hugging Face folder, or a hub id.
        tokenizer: Folder or hub id of the tokenizer, when the model does not bring one.
        attention: How a transformers model is to spell its attention: ``sdpa``, ``eager``, or ``auto`` for the first of
            the two that it has.
        unsafe: Unpickle a module saved by ``torch.save``; this runs whatever code the file holds.
        dtype: Type to load it in, where it is not exported yet; its own by default.

    Returns:
        The program, exported without a cache, with dynamic batch and length.

    Raises:
        LoadError: The source does not exist, is not a model, or cannot be exported.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "mla_config.yaml").is_file():
            raise LoadError(
                f"'{source}' is a model that was converted already.", "Give the model it was converted from instead."
            )
        return _load_huggingface(str(path), tokenizer, attention, dtype)
    if path.is_file():
        return _load_file(path, tokenizer, unsafe, dtype)
    name = str(source)
    if path.suffix or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise LoadError(
            f"There is no file or folder '{source}'.", "Give a .pt2 archive, a Hugging Face folder or a hub id."
        )
    return _load_huggingface(name, tokenizer, attention, dtype)


def _load_file(path: Path, tokenizer: str | None, unsafe: bool, dtype: torch.dtype | None) -> AnyProgram:
    if path.suffix == ".onnx":
        raise LoadError(
            f"'{path}' is an ONNX file, which cannot be converted.", "Give the model it was exported from instead."
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise LoadError(f"'{path}' cannot be read ({error.strerror}).", "Give yourself access to it.") from error
    if not zipfile.is_zipfile(path):
        kind = "is truncated or not a torch.export archive" if path.suffix in (".pt", ".pt2") else "is not a model"
        raise LoadError(f"'{path}' {kind}.", _HOW_TO_EXPORT)
    try:
        with zipfile.ZipFile(path) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except Exception as error:  # of a name, a size, a method or a flag that is none: each is another error
        reason = _first_line(error)
        raise LoadError(f"'{path}' is a damaged archive ({reason}).", "Copy or export it again.") from error
    if damaged is not None:
        raise LoadError(f"'{path}' is a damaged archive ('{damaged}' in it).", "Copy or export it again.")
    if any(n.endswith("archive_format") or n.endswith("serialized_exported_program.json") for n in names):
        exported = _read_archive(path)
        return read_export(exported, source=str(path), kind="pt2", assets=_assets(tokenizer, path.parent))
    if any("/code/" in n for n in names):
        raise LoadError(f"'{path}' is a TorchScript file, whose graph cannot be rewritten.", _HOW_TO_EXPORT)
    if any(n.endswith("data.pkl") for n in names):
        return _load_pickle(path, tokenizer, unsafe, dtype)
    raise LoadError(f"'{path}' is an archive but holds no model.", _HOW_TO_EXPORT)


def _read_archive(path: Path) -> ExportedProgram:
    """Read a ``torch.export`` archive; the reason for a failure is found only in torch's log."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                # A transformers model returns its own classes, which torch knows once their module is imported.
                content = archive.read(name)
                for module in set(re.findall(rb'"(transformers\.[a-z0-9_.]+)\.[A-Z]', content)):
                    with contextlib.suppress(ImportError):  # then the archive does not load, and says why
                        importlib.import_module(module.decode())
                if b"transformers.cache_utils." in content:
                    raise LoadError(
                        f"'{path}' takes or returns a transformers cache object, which cannot be read back.",
                        "Export the model again with model.config.use_cache = False.",
                    )
    reasons: list[BaseException] = []
    keep = logging.Handler()
    keep.emit = lambda record: reasons.extend(filter(None, (record.exc_info or ())[1:2]))  # type: ignore[method-assign]
    logger = logging.getLogger("torch.export")
    propagate, logger.propagate = logger.propagate, False
    handlers, logger.handlers = logger.handlers, [keep]
    try:
        return torch.export.load(path)
    except Exception as error:
        raise LoadError(
            f"'{path}' could not be read as a torch.export archive ({_first_line((reasons or [error])[-1])}).",
            f"Export it again with torch {torch.__version__.split('+')[0]}.",
        ) from error
    finally:
        logger.propagate, logger.handlers = propagate, handlers


def _load_pickle(path: Path, tokenizer: str | None, unsafe: bool, dtype: torch.dtype | None) -> AnyProgram:
    try:
        weights = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        if not unsafe:
            raise LoadError(
                f"'{path}' is a pickled module, and unpickling runs whatever code the file holds.",
                f"{_HOW_TO_EXPORT} Or pass --unsafe-load if you trust the file.",
            ) from error
        try:
            weights = torch.load(path, weights_only=False, map_location="cpu")
        except Exception as failure:
            raise LoadError(
                f"'{path}' could not be unpickled ({_first_line(failure)}).",
                "Run it where the model's own code can be imported, or copy the file again.",
            ) from failure
    if not isinstance(weights, nn.Module):
        raise LoadError(f"'{path}' holds weights but no model that uses them.", _HOW_TO_EXPORT)
    inputs = None if huggingface.is_transformers_model(weights) else (torch.zeros(2, 5, dtype=torch.long),)
    return capture_any(weights, inputs, source=str(path), tokenizer=tokenizer, dtype=dtype)


def _load_huggingface(name: str, tokenizer: str | None, attention: str, dtype: torch.dtype | None) -> AnyProgram:
    model = huggingface.read_checkpoint(name, attention, dtype)
    try:
        return capture_any(model, None, source=name, kind="huggingface", tokenizer=tokenizer or name)
    except LoadError as error:
        if attention == "eager" or getattr(model.config, "_attn_implementation", None) == "eager":
            raise
        raise LoadError(error.message, f"{error.remedy} Or try --attn-implementation eager.") from error


def _assets(tokenizer: str | None, beside: Path | None) -> Assets:
    """Tokenizer and configuration given by the user, or lying beside an archive."""
    if tokenizer is None and beside is not None and (beside / "tokenizer_config.json").is_file():
        tokenizer = str(beside)
    if tokenizer is None:
        return Assets()
    from mla_compile.text.corpus import special_tokens

    return Assets(folder=tokenizer, generation=special_tokens(tokenizer))


def capture(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    *,
    source: str | None = None,
    kind: str = "module",
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
) -> Program:
    """Export a causal language model with dynamic batch and length.

    Args:
        module: Token ids ``[batch, length]`` in, logits ``[batch, length, vocabulary]`` out. It is exported in
            evaluation mode without a cache, and left as it was.
        example_inputs: Positional or keyword inputs; a batch of one is repeated, because an exporter takes a size of
            one for a constant. None is enough for a transformers model.
        source: What to call the model in reports.
        kind: Where it came from.
        tokenizer: Folder or hub id of the tokenizer, if the module does not know it.
        dtype: A narrower type to export a copy of it in.

    Raises:
        LoadError: The module cannot be exported with dynamic shapes, or is no causal language model.
    """
    if example_inputs is not None:
        _require_ids(module, example_inputs, source or type(module).__name__)
    return language_model(
        capture_any(module, example_inputs, source=source, kind=kind, tokenizer=tokenizer, dtype=dtype)
    )


def capture_any(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    *,
    source: str | None = None,
    kind: str = "module",
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
) -> AnyProgram:
    """Export a module of any kind: the batch becomes dynamic, and so do the lengths of integer inputs.

    Of float inputs, the second axis of three is dynamic where the module allows it, and all others are fixed.

    Arguments are those of :func:`capture`; ``dtype`` is a narrower type to export a copy of the module in.

    Raises:
        LoadError: The module cannot be exported with dynamic shapes.
    """
    source = source or type(module).__name__
    if example_inputs is None:
        if not huggingface.is_transformers_model(module):
            raise LoadError(
                f"{source} was given without example_inputs.",
                "Pass token ids to export it with, e.g. (torch.zeros(2, 8, dtype=torch.long),).",
            )
        example_inputs = huggingface.plain_inputs(module)
    if dtype in (torch.float16, torch.bfloat16):
        module = _narrowed(module, dtype)
    config = getattr(module, "config", None)
    training = module.training
    module.eval()
    keyword = isinstance(example_inputs, Mapping)
    values = {k: _enlarge(v) for k, v in example_inputs.items()} if keyword else tuple(map(_enlarge, example_inputs))  # type: ignore[union-attr]
    shapes = {k: _dynamic(v) for k, v in values.items()} if isinstance(values, dict) else tuple(map(_dynamic, values))
    try:
        with huggingface.without_cache(module):
            exported = export_module(module, values, shapes, source)
    finally:
        module.train(training)
    positions = getattr(config, "max_position_embeddings", None)
    known = huggingface.is_transformers_model(module)
    assets = huggingface.assets_of(module, tokenizer) if known else _assets(tokenizer, None)
    return read_export(exported, source=source, kind=kind, assets=assets, max_positions=positions)


def _narrowed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another type, or the module itself if it is of that already.

    Of transformers' models only what is saved with a model is rounded, as when it is loaded in that type: rotary
    frequencies are not, and stay what they are.
    """
    if {value.dtype for value in module.parameters() if value.is_floating_point()} <= {dtype}:
        return module
    module = copy.deepcopy(module)
    if not huggingface.is_transformers_model(module):
        return module.to(dtype)
    for value in module.state_dict(keep_vars=True).values():
        if value.is_floating_point():
            value.data = value.data.to(dtype)
    return module


def _require_ids(module: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any], source: str) -> None:
    """Refuse inputs that are not token ids, a padding mask or positions before torch stumbles over them."""
    if isinstance(example_inputs, Mapping):
        named = dict(example_inputs)
    else:
        parameters = list(inspect.signature(module.forward).parameters)
        named = dict(zip([*parameters, *map(str, range(len(example_inputs)))], example_inputs, strict=False))
    for name, value in named.items():
        if isinstance(value, Tensor):
            _require_integers(name, value, source)


def _require_integers(name: str, value: Tensor, source: str) -> None:
    if value.is_floating_point() or value.dim() != 2:
        raise LoadError(
            f"Input '{name}' of '{source}' is {str(value.dtype).removeprefix('torch.')} of rank {value.dim()}.",
            "Give example_inputs, or export a model, of token ids [batch, length], and optionally attention_mask and "
            "position_ids.",
        )


def _enlarge(value: Any) -> Any:  # noqa: ANN401 - any model input
    """Make an example big enough that no dynamic size is mistaken for a constant 0 or 1."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    for dim, least in ((0, 2), (1, 3)):
        if (dim == 0 or not value.is_floating_point()) and value.shape[dim] < least:
            value = torch.cat([value] * least, dim)
    return value.clone()  # a view would be exported with guards on the tensor it views


def _dynamic(value: Any) -> Any:  # noqa: ANN401 - mirrors any model input
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None
    if not value.is_floating_point():
        return {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return {0: Dim.DYNAMIC, 1: Dim.AUTO} if value.dim() == 3 else {0: Dim.DYNAMIC}


def program_from_export(
    exported: ExportedProgram,
    *,
    source: str,
    kind: str = "pt2",
    assets: Assets | None = None,
    max_positions: int | None = None,
) -> Program:
    """Read an exported causal language model; see :func:`read_export`.

    Raises:
        LoadError: Batch or length is static, an input is not understood, or no output looks like logits.
    """
    return language_model(read_export(exported, source=source, kind=kind, assets=assets, max_positions=max_positions))


def read_export(
    exported: ExportedProgram,
    *,
    source: str,
    kind: str = "pt2",
    assets: Assets | None = None,
    max_positions: int | None = None,
) -> AnyProgram:
    """Normalise an exported program and find out what its inputs and outputs mean.

    Returns:
        A :class:`Program` where it is a causal language model, else an :class:`OtherProgram` that says why not.

    Raises:
        LoadError: The graph cannot be normalised, or its batch is static.
    """
    try:
        with quiet_exporter():
            if _has_compositions(exported):
                exported = exported.run_decompositions({**_RESPELLED, **patterns()})
                _drop_type_assertions(exported)
    except Exception as error:
        raise LoadError(
            f"The graph of '{source}' could not be normalised ({_first_line(error)}).", _HOW_TO_EXPORT
        ) from error
    common: dict[str, Any] = {"exported": exported, "source": source, "kind": kind, "assets": assets or Assets()}
    try:
        return _as_language_model(common, max_positions)
    except LoadError as why:
        found = OtherProgram(**common, max_positions=max_positions, why=why)
        inputs = [value for _, value in found.user_inputs.values() if value.dim() >= 2]
        if not inputs or not all(_is_symbolic(value.shape[0]) for value in inputs):
            raise
        return found


def _as_language_model(common: Mapping[str, Any], max_positions: int | None) -> Program:
    exported: ExportedProgram = common["exported"]
    source: str = common["source"]
    signature = exported.graph_signature
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    tensors = {
        name: placeholders[name].meta["val"]
        for name in signature.user_inputs
        if isinstance(name, str) and isinstance(placeholders[name].meta.get("val"), Tensor)
    }
    roles: dict[str, list[str]] = {"mask": [], "position": [], "tokens": []}
    for name, value in tensors.items():
        role = "mask" if "mask" in name else "position" if "pos" in name else "tokens"
        _require_integers(name, value, source)
        roles[role].append(name)
    if len(roles["tokens"]) != 1 or len(roles["mask"]) > 1 or len(roles["position"]) > 1:
        raise LoadError(
            f"The inputs of '{source}' are {', '.join(tensors) or 'none'}; which one holds the token ids is unclear.",
            "Export a model whose only other inputs are attention_mask and position_ids.",
        )
    tokens = roles["tokens"][0]
    for dim, name in enumerate(("batch", "length")):
        if not _is_symbolic(tensors[tokens].shape[dim]):
            raise LoadError(
                f"'{source}' was exported with a static {name} of {tensors[tokens].shape[dim]}.", _HOW_TO_EXPORT
            )
    return Program(
        **common,
        tokens=tokens,
        attention_mask=next(iter(roles["mask"]), None),
        position_ids=next(iter(roles["position"]), None),
        logits=_logits(exported, tensors[tokens], source),
        max_positions=max_positions or _length_limit(exported, tensors[tokens]),
    )


def _is_symbolic(size: Any) -> bool:  # noqa: ANN401 - int or SymInt
    """Whether a size is a free symbol; a guard may have made a constant of one."""
    return not isinstance(size, int) and not size.node.expr.is_number


def _length_limit(exported: ExportedProgram, tokens: Tensor) -> int | None:
    """Longest sequence the exporting user allowed, if a bound was given."""
    bounds = exported.range_constraints.get(tokens.shape[1].node.expr)  # type: ignore[attr-defined]
    return int(bounds.upper) if bounds is not None and bounds.upper < 2**24 else None  # else it is "no bound"


def _logits(exported: ExportedProgram, tokens: Tensor, source: str) -> str:
    """Name the first float output shaped ``[batch, length, vocabulary]``."""
    nodes = {n.name: n for n in exported.graph.nodes}
    for name in exported.graph_signature.user_outputs:
        value = nodes[name].meta.get("val") if isinstance(name, str) else None
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dim() == 3
            and [str(d) for d in value.shape[:2]] == [str(d) for d in tokens.shape]
        ):
            extra = len(exported.graph_signature.user_outputs) - 1
            if extra:
                _log.warning("%s has %d outputs besides the logits; they are dropped.", source, extra)
            return str(name)
    raise LoadError(
        f"No output of '{source}' is shaped [batch, length, vocabulary].",
        "Export a causal language model that returns the logits of every position.",
    )


def _has_compositions(exported: ExportedProgram) -> bool:
    """Whether a graph was never decomposed, asserts types, or calls an operator that is spelled in another way."""
    unwanted = {_ASSERTION, *_RESPELLED, *patterns()}
    return exported.dialect != "ATEN" or any(n.target in unwanted for n in exported.graph.nodes)


def _drop_type_assertions(exported: ExportedProgram) -> None:
    """Take away what torch.export adds to conversions of types: reading a value there is no use of it."""
    for node in [*exported.graph.nodes]:
        if node.target is _ASSERTION:
            exported.graph.erase_node(node)
    exported.graph_module.recompile()


def _first_line(error: BaseException) -> str:
    if isinstance(error, MlaCompileError):
        return error.message
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
