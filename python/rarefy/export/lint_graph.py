"""What lint rules ask of an ONNX file: who computes a tensor and who reads it, constants, shapes, quantizers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "MaxPool")


class LintGraph:
    """The main graph of a file. Tensors of weights are read one at a time, when a rule asks for their values.

    Raises:
        OSError, ValueError: the file cannot be read, or is no ONNX file.
    """

    def __init__(self, function: str, path: str | os.PathLike[str]) -> None:
        import onnx
        from google.protobuf.message import DecodeError

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"[{function}] path must name an ONNX file, got {self.path}")
        try:
            model = onnx.load(self.path, load_external_data=False)
        except DecodeError as error:
            raise ValueError(f"[{function}] path must name an ONNX file, got {self.path} ({error})") from error
        self.model = onnx.shape_inference.infer_shapes(model) if model.ByteSize() < 1 << 30 else model
        self.graph = self.model.graph
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
        self.producer = {name: node for node in self.graph.node for name in node.output if name}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._constants = {tensor.name: tensor for tensor in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t
        self._values = {v.name: v for v in (*self.graph.value_info, *self.graph.input, *self.graph.output)}
        self.inputs = [value for value in self.graph.input if value.name not in self._constants]
        self._numbers = {id(node): index for index, node in enumerate(self.graph.node)}

    def name(self, node: onnx.NodeProto) -> str:
        """The node's name, or its type and place where it has none."""
        return node.name or f"{node.op_type} #{self._numbers[id(node)]}"

    def nodes(self, *op_types: str) -> list[onnx.NodeProto]:
        """The nodes of these types, in order."""
        return [node for node in self.graph.node if node.op_type in op_types]

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor."""
        return self._consumers.get(tensor, [])

    def is_constant(self, tensor: str) -> bool:
        """Whether the file holds the tensor's values."""
        return tensor in self._constants

    def constant(self, tensor: str) -> np.ndarray | None:
        """The values that the file holds, or None."""
        from onnx import numpy_helper

        proto = self._constants.get(tensor)
        return None if proto is None else numpy_helper.to_array(proto, os.fspath(self.path.parent))

    def type(self, tensor: str) -> str:
        """Name of the element type, "UNDEFINED" where nothing says it."""
        from onnx import TensorProto

        if tensor in self._constants:
            return TensorProto.DataType.Name(self._constants[tensor].data_type)
        value = self._values.get(tensor)
        return TensorProto.DataType.Name(value.type.tensor_type.elem_type if value is not None else 0)

    def shape(self, tensor: str) -> tuple[int | str | None, ...] | None:
        """Sizes, names of free axes, and None for what nobody knows; None where the rank is unknown."""
        if tensor in self._constants:
            return tuple(self._constants[tensor].dims)
        value = self._values.get(tensor)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        return tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in value.type.tensor_type.shape.dim
        )

    @staticmethod
    def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
        """An integer attribute."""
        return next((a.i for a in node.attribute if a.name == name), default)

    def integer_type(self, node: onnx.NodeProto) -> str:
        """The type of the integers that a Quantize- or DequantizeLinear writes or reads."""
        if node.op_type == DEQUANTIZE:
            found = self.type(node.input[0])
            if found != "UNDEFINED":
                return found
        if len(node.input) > 2 and node.input[2]:
            return self.type(node.input[2])
        kind = self.attribute(node, "output_dtype", 0)
        if kind:
            from onnx import TensorProto

            return TensorProto.DataType.Name(kind)
        return "UINT8"

    def dequantizer(self, tensor: str) -> onnx.NodeProto | None:
        """The DequantizeLinear behind which a tensor lies, through operators that only move values; or None."""
        node = self.producer.get(tensor)
        while node is not None and node.op_type in _MOVES:
            node = self.producer.get(node.input[0])
        return node if node is not None and node.op_type == DEQUANTIZE else None
