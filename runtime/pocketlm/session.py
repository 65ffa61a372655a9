"""ONNX Runtime: options, buffers bound once, and `forward(ids, cache) → logits`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import BundleError, ContextOverflowError
from pocketlm.kv_cache import KVCache
from pocketlm.manifest import Dimensions, GraphIO

# Its wheels report usage over the network by default; this is read once, when the library is loaded.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

ort.disable_telemetry_events()


class Session:
    """One graph on the CPU. Safe for several threads, each with a cache of its own."""

    def __init__(self, graph: Path, dimensions: Dimensions, io: GraphIO, *, threads: int) -> None:
        """Maps the weights beside `graph` into memory.

        Raises BundleError if ONNX Runtime refuses the graph.
        """
        self.dimensions = dimensions
        self.threads = threads
        self._io = io
        self._session = open_graph(graph, threads)
        self._bindings: WeakKeyDictionary[KVCache, _Binding] = WeakKeyDictionary()

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.dimensions, capacity)

    def forward(
        self, ids: Sequence[int], cache: KVCache, rows: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Appends `ids` to the cache's sequence, in one pass.

        Returns the logits (rows, vocabulary) behind the positions `rows` of `ids`, by default the last
        one, in a buffer that the next call with this cache overwrites.
        """
        past, count = len(cache), len(ids)
        if past + count > cache.capacity:
            raise ContextOverflowError(past + count, cache.capacity)
        binding = self._bindings.get(cache)
        if binding is None:
            binding = self._bindings[cache] = _Binding(self._session, self._io, self.dimensions, cache)
        logits = binding.run(ids, past, [count - 1] if rows is None else rows)
        cache.append(ids)
        return logits


class _Binding:
    """The graph's inputs and outputs bound to one cache; a decode step only writes three integers."""

    def __init__(
        self, session: ort.InferenceSession, io: GraphIO, dimensions: Dimensions, cache: KVCache
    ) -> None:
        self._session = session
        self._io = io
        self._binding = session.io_binding()
        self._past_lengths = np.zeros(1, np.int32)
        self._bind_input(io.past_lengths, self._past_lengths)
        for layer in range(dimensions.layers):
            key, value = (_shared(cache.buffer[layer, part]) for part in (0, 1))
            self._binding.bind_ortvalue_input(io.past_key.format(layer=layer), key)
            self._binding.bind_ortvalue_input(io.past_value.format(layer=layer), value)
            # Past and present in one buffer: the attention node then writes in place.
            self._binding.bind_ortvalue_output(io.present_key.format(layer=layer), key)
            self._binding.bind_ortvalue_output(io.present_value.format(layer=layer), value)
        self._vocabulary = dimensions.vocabulary
        self._ids = np.empty((1, 0), np.int64)
        self._rows = np.empty(0, np.int64)
        self._logits = np.empty((0, 0), np.float32)

    def run(self, ids: Sequence[int], past: int, rows: Sequence[int]) -> NDArray[np.float32]:
        # Shapes are bound with the buffers, so a buffer of another size has to be bound anew.
        if self._ids.size != len(ids):
            self._ids = np.empty((1, len(ids)), np.int64)
            self._bind_input(self._io.input_ids, self._ids)
        if self._rows.size != len(rows):
            self._rows = np.empty(len(rows), np.int64)
            self._logits = np.empty((len(rows), self._vocabulary), np.float32)
            self._bind_input(self._io.logit_rows, self._rows)
            self._binding.bind_ortvalue_output(self._io.logits, _shared(self._logits))
        self._ids[0] = ids
        self._rows[:] = rows
        self._past_lengths[0] = past
        self._session.run_with_iobinding(self._binding)
        return self._logits

    def _bind_input(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_ortvalue_input(name, _shared(array))


def _shared(array: NDArray[np.generic]) -> ort.OrtValue:
    """ONNX Runtime's view of the array's own memory; the OrtValue keeps the array alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def open_graph(graph: Path, threads: int) -> ort.InferenceSession:
    """ONNX Runtime's session on the CPU, as pocketlm wants it. Raises BundleError if it refuses the graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Shapes change from call to call, so a pattern of the last call's memory only holds memory. Planning
    # which buffers to reuse takes time with the square of the nodes (half a second for thirty layers) and
    # gained neither speed nor memory.
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    # Products of unsigned and signed bytes saturate on x86-64 without VNNI; with this they are exact.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # Weights that are repacked for the kernels then free their first copy at once.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    try:
        session = ort.InferenceSession(os.fspath(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise BundleError(
            f"ONNX Runtime {ort.__version__} cannot load {graph}: {_first_line(error)} "
            "Export or pull the model again; if that does not help, upgrade onnxruntime."
        ) from error
    _return_freed_memory()
    return session


def _return_freed_memory() -> None:
    """Loading frees each weight's first copies; glibc would keep that memory (100 MB of 300) for itself."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
