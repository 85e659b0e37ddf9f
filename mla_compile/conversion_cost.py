"""What a conversion takes: operations, bytes read and written, memory and time. Pure arithmetic on shapes.

Rates are those of one core of a server CPU with AVX-512, in float64: a layer is factorised by one thread, so that the
result is the same everywhere. ``eigh`` costs as much time as so many operations of products as stand below.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mla_compile.config import CompileConfig
from mla_compile.plan import LatentPlan, latent_budget
from mla_compile.site import AttentionSite
from mla_compile.text.amounts import sampled_count, used_count

__all__ = ["ConversionCost", "PolishCost", "SamplingCost", "TextCost", "conversion_cost", "polish_cost"]

_OPERATIONS = 45e9
"""Per second, of products of large matrices."""
_EIGH, _QR = 13, 8 / 3
"""Operations per cube of the size: by time for the first, by count for the second with its orthogonal factor."""
_NARROW_OPERATIONS = 90e9
"""Per second, of products in float32, in which models are run."""
_DISK = 0.2e9
"""Bytes per second of an ordinary disk, for what is read and written once."""
_BASE = 10**9
"""Bytes of memory that libraries and graphs take."""
_MATRICES = 3
"""Square matrices of the smaller side that ``eigh`` has at a time, its input and result included."""
_WINDOW, _BATCH = 512, 4
"""Tokens per window of calibration text where nothing is given, and windows of a pass."""
_KEPT = 2**31
"""Bytes of activations between layers that are kept in memory."""
_PROBE, _PROBE_LOGITS = 4096, 2**27
"""Tokens that tries are compared on, and logits of them, at most."""
_KEY_MATRICES, _SIDES = 4, 5
"""Matrices of its rows of keys by themselves, and of keys and values by its width, that a layer has at a time."""
_COMPONENTS = 170
"""Operations per cube of the rotary pairs of all key heads that choosing components takes, by time."""
_GRAM_BLOCK = 256
"""Rows of a symmetric sum of products that are computed together: what lies above the diagonal is left out."""
_TRIES = 14
"""Splits of the cache between rope and latent that fisher tries, about."""
_STEPS, _STEP_WINDOWS, _STEP_LOGITS = 128, 8, 2**26
"""Steps of polishing where none are asked for, windows of a step, and logits of a pass, at most."""
_TRAINED = 4 * 5
"""Bytes per trained number: itself, its gradient, two means of Adam's, and the last that was good."""
_ACTIVATIONS, _ONE_LAYER = 2, 12
"""Activations per input of a layer's products that a backward pass keeps of every layer, and takes in one."""


@dataclass(frozen=True, slots=True)
class ConversionCost:
    """What a conversion takes, estimated.

    Attributes:
        operations: Multiplications and additions of all factorisations.
        weight_bytes: Bytes of the original's weights, which are read, mapped from their files.
        written_bytes: Bytes of the result.
        memory_bytes: Memory that cannot be dropped: the largest layer's factorisation, and the libraries. Running the
            model to verify it takes its activations besides.
        seconds: Factorising by one core, and reading and writing once each; verification comes on top.
        fisher: What the method fisher takes, which is not that of the figures above.
        transmla: What the method transmla takes, likewise.
        polish: What polishing takes on top of any of them.
        sampling: What it takes that the model writes the text itself.
    """

    operations: float
    weight_bytes: int
    written_bytes: int
    memory_bytes: int
    seconds: float
    fisher: TextCost
    transmla: TextCost
    polish: PolishCost
    sampling: SamplingCost


@dataclass(frozen=True, slots=True)
class TextCost:
    """What statistics on text and the search for sizes take, estimated, of a model that is run layer by layer.

    Attributes:
        tries: Conversions that are compared on a part of the text: of fisher about, of transmla at most.
        tokens: Tokens of calibration text.
        text_operations: Of running the model over them and over the probe that tries are compared on, in float32.
        operations: Of statistics and factorisations, in float64.
        memory_bytes: Memory that cannot be dropped.
        offload_memory_bytes: The same with ``--offload``.
        disk_bytes: Files beside the output while it is made.
        offload_bytes: Files of ``--offload``.
        seconds: By one core, without verification, reading and writing.
    """

    tries: int
    tokens: int
    text_operations: float
    operations: float
    memory_bytes: int
    offload_memory_bytes: int
    disk_bytes: int
    offload_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PolishCost:
    """What training the new matrices takes, estimated: the whole model at once, forward and backward.

    Attributes:
        steps: Optimiser steps.
        operations: Of both models, in float32.
        memory_bytes: Memory that cannot be dropped.
        least_memory_bytes: What matrices take of it, however little text passes at a time.
        seconds: By one core.
    """

    steps: int
    operations: float
    memory_bytes: int
    least_memory_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SamplingCost:
    """What writing calibration text takes, estimated: the whole model decodes, many windows together.

    Attributes:
        tokens: Tokens that are written, those that are held back included.
        operations: Of the model, in float32.
        memory_bytes: Its weights and the libraries; caches take up to an eighth of the machine's memory besides.
        seconds: By one core, at least: with few windows together, reading the weights takes longer.
    """

    tokens: int
    operations: float
    memory_bytes: int
    seconds: float


def conversion_cost(
    sites: Sequence[AttentionSite],
    plans: Sequence[LatentPlan],
    widths: Sequence[int],
    config: CompileConfig,
    parameters: int,
    itemsize: int,
    vocabulary: int,
) -> ConversionCost:
    """Estimate a conversion by the method mha2mla, and what the methods that need text take, and polishing.

    Args:
        sites: The layers.
        plans: Shape of each one's latent.
        widths: Input width of each one's projections.
        config: Settings.
        parameters: Numbers in all weights of the model.
        itemsize: Bytes of each, before and after.
        vocabulary: Tokens that the model predicts.
    """
    operations, largest, written = 0.0, 0, parameters
    for site, plan, width in zip(sites, plans, widths, strict=True):
        keys = site.kv_heads * (site.qk_dim - plan.rope_dims)
        for rows in (keys + site.value_rows,) if config.svd == "joint" else (keys, site.value_rows):
            operations += _operations(rows, width, plan.kv_rank)
        old = width * (site.heads * site.qk_dim + site.elements_per_token)
        row = plan.kv_rank + plan.rope_groups * plan.rope_dims
        new = width * (site.heads * site.qk_dim + row) + plan.kv_rank * (keys + site.value_rows)
        written += new - old
        smaller = min(keys + site.value_rows, width)
        # The original's heads, queries and keys in their new order, and what is factorised or the new layer twice.
        numbers = old + width * (site.heads + site.kv_heads) * site.qk_dim
        numbers += max((keys + site.value_rows) * width + _MATRICES * smaller**2, 2 * new)
        largest = max(largest, 8 * numbers)
    read, wrote = parameters * itemsize, written * itemsize
    seconds = operations / _OPERATIONS + (read + wrote) / _DISK
    model = _Model(tuple(sites), tuple(plans), tuple(widths), config, parameters, itemsize, vocabulary)
    return ConversionCost(
        operations,
        read,
        wrote,
        largest + _BASE,
        seconds,
        model.fisher(),
        model.transmla(),
        model.polish(),
        model.sampling(),
    )


def polish_cost(
    sites: Sequence[AttentionSite],
    plans: Sequence[LatentPlan],
    widths: Sequence[int],
    config: CompileConfig,
    parameters: int,
    itemsize: int,
    vocabulary: int,
) -> PolishCost:
    """Estimate polishing alone; see :func:`conversion_cost`."""
    return _Model(tuple(sites), tuple(plans), tuple(widths), config, parameters, itemsize, vocabulary).polish()


def _operations(rows: int, width: int, rank: int) -> float:
    """Of one truncated factorisation: the Gram matrix, its eigenvectors, the other factor."""
    smaller = min(rows, width)
    if rank >= smaller:
        return 2 * _QR * smaller**3 + 2 * rows * width * smaller
    orthogonal = 2 * _QR * width * rank**2 if rows < width else 0
    return 2 * rows * width * smaller + _EIGH * smaller**3 + 2 * rows * width * rank + orthogonal


@dataclass(frozen=True, slots=True)
class _Model:
    """A model that is run over text, with sizes of layers that mha2mla has at the same budget.

    Numbers of matrices that are held at a time, and of products, are read off the methods; measurements of models of
    two layers agree within a factor of two (``docs/large_models.md``).
    """

    sites: tuple[AttentionSite, ...]
    plans: tuple[LatentPlan, ...]
    widths: tuple[int, ...]
    config: CompileConfig
    parameters: int
    itemsize: int
    vocabulary: int

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.config.seq_len or _WINDOW

    @property
    def tokens(self) -> int:
        """Tokens of text."""
        return used_count(self.config, self.length) * self.length

    @property
    def weights(self) -> int:
        """Numbers that are multiplied with; rows of a table are read, and not multiplied."""
        return self.parameters - self.vocabulary * max(self.widths)

    @property
    def attended(self) -> int:
        """Operations of the attention itself, per token."""
        return sum(2 * self.length * site.heads * (site.qk_dim + site.v_dim) for site in self.sites)

    @property
    def forward(self) -> int:
        """Operations of the original per token."""
        return 2 * self.weights + self.attended

    @property
    def layer(self) -> int:
        """Numbers in the weights of a layer, about."""
        return self.weights // max(1, len(self.sites))

    def fisher(self) -> TextCost:
        """What the method fisher takes."""
        exact, running = 0.0, 2 * self.tokens * self.forward  # the refit runs both models
        for site, plan, width in zip(self.sites, self.plans, self.widths, strict=True):
            pairs = site.kv_heads * len(site.rope.pairs)
            exact += _TRIES * (_channels(site, width) + _COMPONENTS * pairs**3 + _principal(site, width))
            rank = plan.kv_rank
            refit = self.tokens * rank * (rank + _GRAM_BLOCK + 2 * site.v_dim) + 2 * rank**3 / 3
            exact += site.heads * refit
        refitted = max(8 * 2 * site.heads * p.kv_rank**2 for site, p in zip(self.sites, self.plans, strict=True))
        return self._by_text(_TRIES, running, exact, refitted)

    def transmla(self) -> TextCost:
        """What the method transmla takes, if folding more frequencies always helps it."""
        exact, tries = 0.0, _folds(self.sites[0], self.config)
        for site, width in zip(self.sites, self.widths, strict=True):
            for collapse, fold in tries:
                pairs = len(site.rope.pairs)
                blocks = pairs / fold * _EIGH * (fold * site.kv_heads) ** 3
                rest = 8 * (site.kv_heads * pairs) ** 2 * pairs / collapse
                exact += _channels(site, width) + blocks + rest + _principal(site, width)
        return self._by_text(len(tries), 0.0, exact, 0)

    def _by_text(self, tries: int, running: float, exact: float, held: int) -> TextCost:
        """Statistics and tries, beside what only one of the methods does and holds."""
        probe = min(_PROBE, self.tokens, _PROBE_LOGITS // self.vocabulary)
        # Statistics: forward, and once more and backward with gradients; the attention itself once or twice more. Then
        # the original and every try on the probe.
        passes = 3 if self.config.gradients else 1
        running += self.tokens * (passes * self.forward + 2 * self.attended) + (1 + tries) * probe * self.forward
        stored, kept, written, largest = 0, 0, 0, held
        for site, plan, width in zip(self.sites, self.plans, self.widths, strict=True):
            rows, keys = site.kv_heads * site.qk_dim + site.value_rows, site.kv_heads * site.qk_dim
            squares = width**2 * (2 if site.key.norm else 1) + site.heads * (site.qk_dim**2 + site.v_dim**2)
            exact += 2 * self.tokens * squares
            stored += 8 * squares
            kept += 4 * self.tokens * width
            new = width * (site.heads * site.qk_dim + plan.elements_after) + site.heads * plan.kv_rank * site.v_dim
            new += site.kv_heads * plan.kv_rank * site.qk_dim
            written += (2 * 8 + 4) * new  # what is chosen, what is refitted or tried next, and a try
            old = width * (site.heads * site.qk_dim + site.elements_per_token)
            solved = _KEY_MATRICES * keys**2 + _SIDES * rows * width + _MATRICES * min(rows, width) ** 2
            largest = max(largest, 8 * (2 * old + 2 * squares + solved))
        memory = _BASE + max(largest, self._pass_bytes(_BATCH * self.length)) + 4 * probe * self.vocabulary
        return TextCost(
            tries=tries,
            tokens=self.tokens,
            text_operations=running,
            operations=exact,
            memory_bytes=memory + min(kept, _KEPT),
            offload_memory_bytes=memory,
            disk_bytes=stored + written,
            offload_bytes=kept,
            seconds=running / _NARROW_OPERATIONS + exact / _OPERATIONS,
        )

    def _pass_bytes(self, tokens: int) -> int:
        """A layer's weights and what its backward pass keeps, and the head's logits and their derivatives."""
        return self._head_bytes(tokens) + 4 * tokens * (_ONE_LAYER * self.layer // max(self.widths))

    def _head_bytes(self, tokens: int) -> int:
        """A layer's weights, and the head's logits and their derivatives."""
        return 4 * (self.layer + 3 * tokens * self.vocabulary)

    def polish(self) -> PolishCost:
        """What polishing takes."""
        steps = self.config.polish_steps or _STEPS
        trained, products, latent = 0, self.weights, 0
        for site, plan, width in zip(self.sites, self.plans, self.widths, strict=True):
            read = width * (site.heads * site.qk_dim + plan.elements_after)
            up = plan.kv_rank * (site.kv_heads * site.qk_dim + site.heads * site.v_dim)
            trained += read + up
            products += read - width * (site.heads * site.qk_dim + site.elements_per_token)
            latent += 2 * self.length * site.heads * (2 * plan.kv_rank + plan.rope_dims)
            latent += 2 * site.heads * plan.kv_rank * (site.qk_dim + site.v_dim)
        # The original; its conversion forward, backward to activations, and to what is trained; attention is computed
        # twice, as nothing of it is kept.
        token = self.forward + 4 * products + 2 * trained + 4 * latent
        operations = float(steps * _STEP_WINDOWS * self.length * token)
        windows = min(_STEP_WINDOWS, max(1, _STEP_LOGITS // (self.length * self.vocabulary)))
        passed = windows * self.length
        kept = 4 * passed * len(self.sites) * _ACTIVATIONS * self.layer // max(self.widths)
        wide = 4 * products if self.itemsize < 4 else 0  # which a backward pass keeps of all weights
        least = _TRAINED * trained + wide
        memory = _BASE + least + kept + self._head_bytes(passed)
        return PolishCost(steps, operations, memory, least, operations / _NARROW_OPERATIONS)

    def sampling(self) -> SamplingCost:
        """What writing the text takes; a token attends to half a window in the mean."""
        tokens = sampled_count(self.config, self.length) * self.length
        operations = float(tokens * (2 * self.weights + self.attended // 2))
        return SamplingCost(
            tokens, operations, _BASE + self.parameters * self.itemsize, operations / _NARROW_OPERATIONS
        )


def _folds(site: AttentionSite, config: CompileConfig) -> list[tuple[int, int]]:
    """By how much transmla divides a head's pairs to be the rope key, and over how many it folds, at most.

    It doubles the second while that helps.
    """
    pairs, budget = len(site.rope.pairs), latent_budget(site, config)
    wanted = None if config.rope_dims is None else config.rope_dims // 2
    found = []
    for collapse in (c for c in range(1, pairs + 1) if pairs % c == 0):
        fits = 2 * pairs // collapse < budget or config.kv_rank is not None
        if (wanted is None and fits) or pairs // collapse == wanted:
            doubled = (collapse << times for times in range(pairs.bit_length()))
            found += [(collapse, fold) for fold in itertools.takewhile(lambda fold: pairs % fold == 0, doubled)]
    return found or [(1, 1)]


def _channels(site: AttentionSite, width: int) -> float:
    """Of the second moment of all key heads' rotary pairs."""
    keys = 2 * site.kv_heads * len(site.rope.pairs)
    return 2 * keys * width**2 + 2 * keys**2 * width


def _principal(site: AttentionSite, width: int) -> float:
    """Of the principal components of keys that do not rotate, and values: an orthonormal basis first, if it is shorter.

    The rest of the keys, the metrics of heads and their inverses; then moments, eigenvectors, and these by the rows.
    """
    keys = site.kv_heads * site.qk_dim
    rows, dim = keys + site.value_rows, max(site.qk_dim, site.v_dim)
    smaller = min(rows, width)
    made = 2 * keys**2 * width + 2 * rows * dim * (width + smaller)
    basis = 4 * rows * width**2 - 4 * width**3 / 3 + 2 * rows * width * smaller if rows > width else 0
    return made + basis + 2 * smaller * width**2 + 4 * smaller**2 * width + _EIGH * smaller**3
