"""How long recognition takes on a 7B-shaped model, and how much memory: no weights, as they are not needed.

Usage: python benchmarks/recognition.py [--layers 32] [--kind llama]

The model has the shape of a 7B model; its parameters are fake (shapes only), its buffers real. Times are for one run on
the machine at hand; peak memory is the process's own.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_compile.passes.evaluate import GraphEvaluator
from mla_compile.passes.kinds import kind_of
from mla_compile.passes.recognise import recognise
from mla_compile.passes.trace import Anchor, DataFlow, find_anchors
from mla_compile.sources.capture import capture

SHAPES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 32, "max_position_embeddings": 4096}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 8, "head_dim": 128}),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 8, "head_dim": 128, "sliding_window": 4096}),
}


def without_weights(kind: str, layers: int) -> nn.Module:
    """A 7B-shaped model whose parameters have shapes only."""
    import transformers

    name, changes = SHAPES[kind]
    config = getattr(transformers, name)(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        use_cache=False,
        **{"max_position_embeddings": 8192, **changes},
    )
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(self, name, parameter)
        if parameter is not None:
            self._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        eager = "eager" if kind == "gemma2" else "sdpa"
        with torch.device("cpu"):
            module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=eager)
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
    return module.eval()


def main() -> None:
    """Export, recognise, and print a line per stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kind", choices=SHAPES, default="llama")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()

    def tell(what: str) -> None:
        nonlocal start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{what:<40} {time.perf_counter() - start:6.1f} s   peak {peak:.2f} GiB", flush=True)
        start = time.perf_counter()

    module = without_weights(arguments.kind, arguments.layers)
    tell(f"build {arguments.kind}, {arguments.layers} layers")
    program = capture(module, None)
    tell("export")
    found = recognise(program)
    tell(f"recognise: {len(found.sites)} layers")
    flow, evaluator = DataFlow(program), GraphEvaluator(program)
    anchors = [a for a in find_anchors(flow, program) if isinstance(a, Anchor)]
    print(f"kinds of layers: {len({kind_of(a, flow, evaluator) for a in anchors})}")
    for rejection in found.rejections:
        print(f"{rejection.path}: {rejection.reason} [{rejection.code}]")
    sys.exit(1 if found.rejections or len(found.sites) != arguments.layers else 0)


if __name__ == "__main__":
    main()
