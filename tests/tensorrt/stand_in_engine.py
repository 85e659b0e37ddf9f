"""``tensorrt`` whose engines are ONNX Runtime: a plan is the file it was built of, and memory is the CPU's.

It holds a program to what TensorRT asks of it: shapes within a profile, an address for every tensor that memory of the
right size lies at, a cache's input and output at one address, and a profile for every context.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import importlib.machinery
import types

import numpy as np
import onnxruntime

SIZES = {"batch": 3, "prompt": 6}
VERSION = "11.4.0"
_TYPES = {"tensor(float)": ("float32", np.float32), "tensor(int64)": ("int64", np.int64)}
_TYPES |= {"tensor(int32)": ("int32", np.int32)}


class Severity(enum.IntEnum):
    ERROR = 1
    WARNING = 2


class Logger:
    Severity = Severity


class Graph:
    """In place of a CUDA graph: keeps launches with the shapes and addresses of their capture."""

    capturing = None

    def __init__(self):
        self.launches, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for launch in self.launches:
            launch()

    @classmethod
    @contextlib.contextmanager
    def capture(cls, graph, stream, capture_error_mode):
        cls.capturing = graph
        yield
        cls.capturing = None


class Context:
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses = engine, {}, {}
        self.profile = None

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        return True

    def set_input_shape(self, name, shape):
        least, _, most = self._engine.get_tensor_profile_shape(name, self.profile)
        self._shapes[name] = shape
        return all(a <= x <= b for a, x, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        launch = functools.partial(self._launch, {**self._shapes}, {**self._addresses})
        if Graph.capturing is None:
            launch()
        else:
            Graph.capturing.launches.append(launch)
        return True

    def _launch(self, shapes, addresses):
        engine = self._engine
        engine.steps.append((self.profile, shapes["input_ids"]))

        def memory_of(name, shape):
            kind = _TYPES[engine.types[name]][1]
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            return np.frombuffer((ctypes.c_char * size).from_address(addresses[name]), kind).reshape(shape)

        memory = {name: memory_of(name, shape) for name, shape in shapes.items()}
        results = engine.session.run(None, {name: x.copy() for name, x in memory.items()})
        for value, result in zip(engine.session.get_outputs(), results, strict=True):
            past = value.name.replace("present.", "past_key_values.")
            assert value.name == "logits" or addresses[value.name] == addresses[past]
            memory_of(value.name, result.shape)[...] = result


class Engine:
    def __init__(self, plan):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self.session = onnxruntime.InferenceSession(plan, options, ["CPUExecutionProvider"])
        values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.types = {v.name: v.type for v in values}
        self._shapes = {v.name: tuple(x if isinstance(x, int) else -1 for x in v.shape) for v in values}
        self._names = [v.name for v in values]
        self.num_io_tensors = len(values)
        self.steps = []
        self.streamable_weights_size = self.weight_streaming_budget_v2 = 5_000_000

    def get_weight_streaming_automatic_budget(self):
        return 4_000_000

    def get_tensor_name(self, index):
        return self._names[index]

    def get_tensor_shape(self, name):
        return self._shapes[name]

    def get_tensor_dtype(self, name):
        return _TYPES[self.types[name]][0]

    def get_tensor_profile_shape(self, name, profile):
        most = {0: SIZES["batch"], 1: (1, SIZES["prompt"])[profile]}
        shape = self._shapes[name]
        largest = tuple(most[axis] if extent < 0 else extent for axis, extent in enumerate(shape))
        return tuple(abs(extent) for extent in shape), largest, largest

    def create_execution_context(self, strategy):
        self.budget_of_contexts = self.weight_streaming_budget_v2
        return Context(self)


class Runtime:
    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, plan):
        if plan.startswith(b"another"):
            self._logger.log(Severity.ERROR, "The engine plan file is not compatible with this version.")
            return None
        return Engine(plan)


def module():
    """What ``import tensorrt`` gives."""
    made = types.ModuleType("tensorrt")
    made.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)  # torch asks whether it is installed
    made.__version__, made.ILogger, made.Runtime = VERSION, Logger, Runtime
    made.float32, made.float16, made.bfloat16 = "float32", "float16", "bfloat16"
    made.ExecutionContextAllocationStrategy = types.SimpleNamespace(ON_PROFILE_CHANGE=1)
    return made
