"""Collects nodes and weights into one ONNX graph. Emitters take values and return values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10
PAGE = 4096


class GraphBuilder:
    """One graph under construction. Nodes run in the order in which they were added."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def optional_input(self, name: str, default: NDArray[Any]) -> ir.Value:
        """An input that has the value `default` where nothing is fed."""
        value = self.constant(name, default)
        self._inputs.append(value)
        return value

    def output(
        self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str | None]
    ) -> None:
        """Makes `value` an output of the graph and gives it the output's name."""
        value.name = name
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def op(
        self, op_type: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A node with one output, which has the node's name."""
        return self.ops(op_type, *inputs, name=name, outputs=(name,), domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        outputs: Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """A node with several outputs; an empty name leaves an optional output out."""
        values = [ir.Value(name=output) for output in outputs]
        self._nodes.append(
            ir.node(op_type, list(inputs), attributes, domain=domain, outputs=values, name=name)
        )
        return tuple(values)

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        """An initializer. The same name again returns the same value."""
        if name not in self._initializers:
            array = np.asarray(array)
            self._initializers[name] = _initializer(ir.tensor(array, name=name), array.shape)
        return self._initializers[name]

    def lazy(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], NDArray[Any]]
    ) -> ir.Value:
        """An initializer that `read` makes while the file is written: one at a time is in memory."""
        if name not in self._initializers:
            tensor = ir.LazyTensor(
                lambda: ir.tensor(np.ascontiguousarray(read()), name=name),
                dtype,
                ir.Shape(shape),
                name=name,
            )
            self._initializers[name] = _initializer(tensor, shape)
        return self._initializers[name]

    def save(
        self,
        folder: Path,
        graph_name: str,
        weights_name: str,
        *,
        on_weight: Callable[[int, int], None] | None = None,
    ) -> None:
        """Writes the graph and, beside it, its weights: aligned to pages, to be memory-mapped.

        `on_weight(number, total)` is called before each weight is written; numbers begin at one.
        """
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=OPSETS,
            name=self.name,
        )
        ir.save(
            ir.Model(graph, ir_version=IR_VERSION, producer_name="pocketlm"),
            folder / graph_name,
            external_data=weights_name,
            size_threshold_bytes=1024,
            alignment=PAGE,
            align_threshold=PAGE,
            callback=None if on_weight is None else lambda _, info: on_weight(info.index + 1, info.total),
        )


def _initializer(tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.Value:
    return ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor
    )
