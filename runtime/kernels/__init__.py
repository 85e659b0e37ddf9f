"""Attention to a latent cache by fused kernels, and the cache they read: contiguous or paged, plain or of few bits."""

from mla_compile.runtime.kernels.cache import LatentCache, RowLayout
from mla_compile.runtime.kernels.codes import Codes
from mla_compile.runtime.kernels.op import append_latent, latent_attention

__all__ = ["Codes", "LatentCache", "RowLayout", "append_latent", "latent_attention"]
