"""ONNX Runtime: options, buffers bound once, and `forward(ids, cache) → logits`, or hidden states."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import BundleError, ContextOverflowError
from pocketlm.kv_cache import KVCache, KVSlots
from pocketlm.manifest import Dimensions, GraphIO

# Its wheels report usage over the network by default; this is read once, when the library is loaded.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

ort.disable_telemetry_events()


class NoHiddenStatesError(BundleError):
    """A bundle whose graph gives logits and nothing else."""


class Session:
    """One graph on the CPU. Safe for several threads, each with a cache of its own."""

    def __init__(
        self,
        graph: Path,
        dimensions: Dimensions,
        io: GraphIO,
        *,
        threads: int,
        spin_us: int | None = None,
    ) -> None:
        """Maps the weights beside `graph` into memory. `threads` and `spin_us`: see `open_graph`.

        Raises BundleError if ONNX Runtime refuses the graph.
        """
        self.dimensions = dimensions
        self.threads = threads
        self._io = io
        self._session = open_graph(graph, threads, spin_us)
        self._bindings: WeakKeyDictionary[KVSlots, tuple[int, dict[tuple[int, int, bool], _Binding]]] = (
            WeakKeyDictionary()
        )

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.dimensions, capacity)

    def forward(
        self, ids: Sequence[int], cache: KVCache, rows: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Appends `ids` to the cache's sequence, in one pass.

        Returns the logits (rows, vocabulary) behind the positions `rows` of `ids`, by default the last
        one, in a buffer that the next call with this cache overwrites.
        """
        return self._append(ids, cache, rows)

    def hidden(
        self, ids: Sequence[int], cache: KVCache, rows: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """As `forward`, with hidden states (rows, hidden) in place of logits.

        They are what the checkpoint's head reads, the last norm's output, whatever the bundle's precision.
        Raises NoHiddenStatesError for a bundle that was exported before graphs gave them.
        """
        if self._io.hidden is None:
            raise NoHiddenStatesError(
                "The bundle gives no embeddings: it was exported before bundles did. Make it again with "
                "pocketlm pull MODEL --force or pocketlm export."
            )
        return self._append(ids, cache, rows, hidden=True)

    def forward_each(self, ids: Mapping[KVCache, int]) -> NDArray[np.float32]:
        """Appends one token to each of several caches of the same slots, in one pass.

        A slot between them takes part with a token that does not count. Returns the logits
        (caches, vocabulary) in the order of `ids`, in a buffer that the next call overwrites.
        """
        slots = next(iter(ids)).slots
        for cache in ids:
            if len(cache) == cache.capacity:
                raise ContextOverflowError(len(cache) + 1, cache.capacity)
        first = min(cache.index for cache in ids)
        caches = slots.caches[first : 1 + max(cache.index for cache in ids)]
        for cache in caches:
            if cache not in ids and len(cache) == cache.capacity:
                cache.truncate(cache.capacity - 1)  # the token that does not count goes behind the others
        logits = self._binding(slots, first, len(caches), hidden=False).run(
            [[ids.get(cache, 0)] for cache in caches],
            [len(cache) for cache in caches],
            [cache.index - first for cache in ids],
        )
        for cache, token_id in ids.items():
            cache.append([token_id])
        return logits

    def _append(
        self, ids: Sequence[int], cache: KVCache, rows: Sequence[int] | None, *, hidden: bool = False
    ) -> NDArray[np.float32]:
        past, count = len(cache), len(ids)
        if past + count > cache.capacity:
            raise ContextOverflowError(past + count, cache.capacity)
        binding = self._binding(cache.slots, cache.index, 1, hidden=hidden)
        values = binding.run([ids], [past], [count - 1] if rows is None else rows)
        cache.append(ids)
        return values

    def _binding(self, slots: KVSlots, first: int, count: int, *, hidden: bool) -> _Binding:
        version, bindings = self._bindings.get(slots, (None, {}))
        if version != slots.version:  # other buffers: those that are bound would keep the old ones alive
            bindings = {}
            self._bindings[slots] = (slots.version, bindings)
        binding = bindings.get((first, count, hidden))
        if binding is None:
            buffer = slots.buffer[:, :, first : first + count]
            binding = _Binding(self._session, self._io, self.dimensions, buffer, hidden=hidden)
            bindings[first, count, hidden] = binding
        return binding


class _Binding:
    """The graph's inputs and outputs bound to neighbouring slots; a decode step only writes three integers
    for each."""

    def __init__(
        self,
        session: ort.InferenceSession,
        io: GraphIO,
        dimensions: Dimensions,
        buffer: NDArray[np.float32],
        *,
        hidden: bool,
    ) -> None:
        """`buffer` (layers, key or value, slots, kv_heads, capacity, head_dim); `hidden` is whether all rows
        get hidden states, and no logits."""
        self._session = session
        self._io = io
        self._binding = session.io_binding()
        self._past_lengths = np.zeros(buffer.shape[2], np.int32)
        self._bind_input(io.past_lengths, self._past_lengths)
        for layer in range(dimensions.layers):
            key, value = (_shared(buffer[layer, part]) for part in (0, 1))
            self._binding.bind_ortvalue_input(io.past_key.format(layer=layer), key)
            self._binding.bind_ortvalue_input(io.past_value.format(layer=layer), value)
            # Past and present in one buffer: the attention node then writes in place.
            self._binding.bind_ortvalue_output(io.present_key.format(layer=layer), key)
            self._binding.bind_ortvalue_output(io.present_value.format(layer=layer), value)
        self._hidden_rows: NDArray[np.int64] | None = None
        self._output, self._width = io.logits, dimensions.vocabulary
        if hidden and io.hidden is not None and io.hidden_rows is not None:
            self._hidden_rows = np.zeros(1, np.int64)
            self._bind_input(io.hidden_rows, self._hidden_rows)
            self._output, self._width = io.hidden, dimensions.hidden
        self._ids = np.empty((0, 0), np.int64)
        self._rows = np.empty(0, np.int64)
        self._values = np.empty((0, 0), np.float32)

    def run(
        self, ids: Sequence[Sequence[int]], past: Sequence[int], rows: Sequence[int]
    ) -> NDArray[np.float32]:
        # Shapes are bound with the buffers, so a buffer of another size has to be bound anew.
        if self._ids.shape[1] != len(ids[0]):
            self._ids = np.empty((len(ids), len(ids[0])), np.int64)
            self._bind_input(self._io.input_ids, self._ids)
        if self._rows.size != len(rows):
            self._rows = np.empty(len(rows), np.int64)
            self._values = np.empty((len(rows), self._width), np.float32)
            self._bind_input(self._io.logit_rows, self._rows)
            self._binding.bind_ortvalue_output(self._output, _shared(self._values))
            if self._hidden_rows is not None:
                self._hidden_rows[:] = len(rows)
        self._ids[:] = ids
        self._rows[:] = rows
        self._past_lengths[:] = past
        self._session.run_with_iobinding(self._binding)
        return self._values

    def _bind_input(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_ortvalue_input(name, _shared(array))


def _shared(array: NDArray[np.generic]) -> ort.OrtValue:
    """ONNX Runtime's view of the array's own memory; the OrtValue keeps the array alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def open_graph(graph: Path, threads: int, spin_us: int | None = None) -> ort.InferenceSession:
    """ONNX Runtime's session on the CPU, as pocketlm wants it.

    An idle thread looks for work for `spin_us` microseconds before it sleeps: 0 is not at all, None as long
    as ONNX Runtime has it. Raises BundleError if it refuses the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if spin_us == 0:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    elif spin_us is not None:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
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
    return_freed_memory()
    return session


def return_freed_memory() -> None:
    """Loading frees the weights' first copies, closing the others; glibc would keep that memory to itself."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
