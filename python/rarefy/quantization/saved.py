"""Converted models in folders that both languages write and read."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rarefy import _core
from rarefy import nn as rnn
from rarefy._core.quantization import Latest, MinMax, QuantizedTensorParts, SavedLayer, Scheme, part_names
from rarefy.nn.packed import share_packed
from rarefy.nn.registry import converted_type, is_layer, row_of, unsupported
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.fast_path import leave_fast_path
from rarefy.quantization.tied import share_integers


def save_quantized(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted model to a folder: ``model.safetensors``, its tensors with integers as int8, and
    ``quantization.json``, which layers compute with integers and on which grids.

    C++ reads the same folders (``rarefy::quantization::load_quantized``). Nothing in the files runs when they are read. The
    folder is written under another name beside its place and renamed, so that a failure leaves what was there. A tensor
    with several names is written once.

    Args:
        model: of ``convert``, on any device.
        folder: made, with its parents, or replaced if it holds nothing but such files.

    Raises:
        ValueError: the model is not converted, or a layer is only prepared; a state that is not tensors; scales that are not
            finite; ``folder`` is no folder, or has files of other names, which would be lost.
        RuntimeError: the folder cannot be written.
    """
    layers: dict[str, SavedLayer] = {}
    folded: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, rnn.SpentBatchNorm):
            folded.add(name)
        elif _is_converted(module):
            layers[name] = _describe(module)
        elif isinstance(module, rnn.QuantizableLayer) and module.prepared:
            raise ValueError(
                f"[save_quantized] layer {name} must be converted, but is only prepared: call convert first"
            )
    if not layers:
        raise ValueError("[save_quantized] the model must have converted layers; call convert first")
    own = {name for name in folded if name.rpartition(".")[0] in layers}  # of a ConvBn2d: it is gone with the layer
    state = _state("save_quantized", model)
    tensors = [tensor.detach() for tensor in state.values()]
    _core.quantization.write_quantized(list(state), tensors, layers, folded - own, os.fspath(folder))


def load_quantized(model: nn.Module, folder: str | os.PathLike[str], *, inplace: bool = False) -> nn.Module:
    """The converted model of a folder that ``save_quantized`` has written, in either language.

    Neither data nor a configuration is needed, and nothing of the float model's values is: it may be on the meta device.

    Args:
        model: floating point, of the class that was converted, as constructed.
        folder: written by ``save_quantized``.
        inplace: swap the layers of ``model`` itself.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        ValueError: files that are missing, of another format version, or not as they were written; a layer that the model
            does not have, has in another kind or shape, or has prepared already; tensors that are missing, unexpected, or of
            another shape or type. The layer, the rule and the value are named, and the model is as it was.
        RuntimeError: a file cannot be read.
    """
    path = os.fspath(folder)
    tensors, layers, folded = _core.quantization.read_quantized(path)
    if not inplace:
        model = copy.deepcopy(model)
    return _Loader(model, path, tensors, layers, folded).load()


def _is_converted(module: nn.Module) -> bool:
    if isinstance(module, (rnn.IntegerLayer, rnn.PackedLayer)):
        return True
    return isinstance(module, rnn.QuantizableLayer) and module.prepared and converted_type(module) is None


def _describe(module: nn.Module) -> SavedLayer:
    quant: rnn.QuantState = module.quant  # type: ignore[assignment]
    kind = type(module).__name__.removeprefix("Quantized").removeprefix("Packed")
    channels_last, packed = False, None
    if isinstance(module, rnn.PackedLayer):
        packed = (module.scheme, list(module.weight_shape), module.weight_dtype)
        if isinstance(module, rnn.PackedLinear) and module.channel_axis == 1:
            kind = rnn.TransposedLinear.__name__
    if isinstance(module, rnn.QuantizedLayer):
        weight = module.integer_weight
        if isinstance(module, rnn.QuantizedLinear) and module.channel_axis == 1:
            kind = rnn.TransposedLinear.__name__
        channels_last = weight.dim() == 4 and not weight.is_contiguous()
    grids = {name: q.scheme for name, q in quant.named_children() if isinstance(q, FakeQuantizer)}
    following = None if quant.next is None else (quant.next.qmin, quant.next.qmax)
    return SavedLayer(kind, bool(module.relu), channels_last, grids, following, module.target, packed)


def _state(function: str, model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"[{function}] the state of a model must be tensors, got {type(value).__name__} at {name}")
    return state


def _own_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the tensors that the converted form of a floating layer with several weights has itself, by name."""
    if isinstance(module, nn.MultiheadAttention):
        return rnn.MultiheadAttention.integer_shapes(module)
    return {name: tensor.shape for name, tensor in module.named_parameters(recurse=False)}


def _saved_kind(kind: type[nn.Module]) -> str:
    """The kind in a file, which does not tell what has been folded in."""
    name = kind.__name__
    return f"Conv{name.removeprefix('ConvBn')}" if name.startswith("ConvBn") else name


class _Loader:
    """Decides everything before the first layer of the model is swapped."""

    def __init__(
        self,
        model: nn.Module,
        path: str,
        tensors: Mapping[str, Tensor],
        layers: Mapping[str, SavedLayer],
        folded: set[str],
    ) -> None:
        self.model, self.path, self.tensors, self.layers, self.folded = model, path, tensors, layers, folded
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[int, str] = {}  # of the layers that change, by identity: the first name in the file

    def fail(self, rule: str) -> ValueError:
        return ValueError(f"[load_quantized] {self.path}: {rule}")

    def load(self) -> nn.Module:
        swaps: dict[int, nn.Module] = {}
        tied: dict[int, list[str]] = {}
        for name, saved in self.layers.items():
            module = self._module(name, saved)
            first = self.names.setdefault(id(module), name)
            if first != name:  # one module with two names
                if self.layers[first] != saved:
                    raise self.fail(f"layers {first} and {name} are one in the model and must be equal in the file")
                continue
            swaps[id(module)] = self._restored(name, module, saved)
            if isinstance(swaps[id(module)], (rnn.QuantizedLayer, rnn.PackedLayer)):
                tied.setdefault(id(module.weight), []).append(name)
        for name in self.folded & self.modules.keys():
            bn = self.modules[name]
            if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
                raise self.fail(
                    f"{name} must be a batch normalization in the model, as it was folded, got a {type(bn).__name__}"
                )
            swaps[id(bn)] = rnn.SpentBatchNorm()
        if any(saved.next is not None for saved in self.layers.values()):  # bytes flow, as after convert
            for module in self.modules.values():
                if type(module) is nn.MaxPool2d and not module.return_indices:
                    swaps[id(module)] = rnn.MaxPool2d.from_float(module)
        rest = self._rest(swaps)

        skipped = {name: "saved in floating point" for name, module in self.modules.items() if is_layer(module)}
        for name, module in self.modules.items():
            if id(module) in swaps:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, swaps[id(module)])
        leave_fast_path(self.model, {id(module) for module in swaps.values()})
        self.model.load_state_dict(rest, strict=False, assign=any(t.is_meta for t in self.model.parameters()))
        groups = tuple(tuple(group) for group in tied.values() if len(group) > 1)
        share_integers(self.model, groups)
        share_packed(self.model, groups)
        self.model._rarefy_skipped = {name: why for name, why in skipped.items() if name not in self.layers}
        return self.model.eval()

    def _module(self, name: str, saved: SavedLayer) -> nn.Module:
        module = self.modules.get(name)
        if module is None:
            raise self.fail(f"layer {name} ({saved.kind}) must be of the model, which has none")
        if not name:
            raise self.fail("the model must contain its layers, got a single layer; wrap it in nn.Sequential")
        if _is_converted(module) or (isinstance(module, rnn.QuantizableLayer) and module.prepared):
            raise self.fail(
                f"layer {name} must be floating point in the model, but is already "
                f"{'converted' if _is_converted(module) else 'prepared'}"
            )
        row, reason = row_of(module), unsupported(module)
        kind = type(module).__name__ if row is None else _saved_kind(row.layer)
        if row is None or kind != saved.kind or reason is not None:
            why = f" ({reason})" if reason else ""
            raise self.fail(f"layer {name} must be a {saved.kind} in the model, got a {kind}{why}")
        self._check_tensors(name, module, saved, row.layer)
        return module

    def _check_several(self, name: str, module: nn.Module, saved: SavedLayer) -> None:
        """Of a layer with several weights: the model's own tensors, all of them and no other."""
        own = _own_shapes(module)
        for key, shape in own.items():
            given = self.tensors.get(f"{name}.{key}")
            if given is None or given.shape != shape:
                got = "nothing" if given is None else list(given.shape)
                raise self.fail(f"{key} of layer {name} must have the model's shape {list(shape)}, got {got}")
            quantizer = _core.quantization.weight_quantizer(saved.kind, key)
            if quantizer is not None and quantizer not in saved.quantizers:
                raise self.fail(f"layer {name} must have a grid for {key}")
        elsewhere = ("quant.", *(f"{child}." for child, _ in module.named_children()))
        for key in self.tensors:
            rest = key.removeprefix(f"{name}.")
            if rest != key and not rest.startswith(elsewhere) and rest not in own:
                raise self.fail(f"layer {name} has no {key} in the model")

    def _check_tensors(self, name: str, module: nn.Module, saved: SavedLayer, kind: type[rnn.QuantizableLayer]) -> None:
        if issubclass(kind, (rnn.RecurrentLayer, rnn.MultiheadAttention, rnn.BoundaryLayer)):
            self._check_several(name, module, saved)
            return
        if saved.packed is not None:
            self._check_packed(name, module, saved, kind)
            return
        if kind.has_weight != ("weight" in saved.quantizers):
            raise self.fail(f"layer {name} ({saved.kind}) must have {'a' if kind.has_weight else 'no'} weight")
        if not issubclass(kind, rnn.WeightedLayer):
            return
        weight, integers = module.weight, self.tensors[f"{name}.weight"]
        if weight.shape != integers.shape:
            raise self.fail(
                f"the weight of layer {name} must have the model's shape {list(weight.shape)}, got {list(integers.shape)}"
            )
        axis = saved.quantizers["weight"].axis
        if axis not in (None, kind.channel_axis):
            raise self.fail(
                f"the weight of layer {name} must have channels in axis {kind.channel_axis}, got axis {axis}"
            )
        has_bias, bias = getattr(module, "bias", None) is not None, self.tensors.get(f"{name}.bias")
        # A batch normalization that is folded gives a bias.
        folds = saved.kind.startswith("Conv") and not saved.kind.startswith("ConvTranspose")
        if has_bias != (bias is not None) and not (folds and bias is not None):
            raise self.fail(f"layer {name} must have {'a' if has_bias else 'no'} bias, as in the model")
        channels = weight.shape[kind.channel_axis]
        if issubclass(kind, rnn.ConvTransposeLayer):
            channels = module.out_channels
            if axis is not None and len(self.tensors[f"{name}.quant.weight.scale"]) != channels:
                raise self.fail(f"the weight of layer {name} must have {channels} scales, one for each output channel")
        if bias is not None and len(bias) != channels:
            raise self.fail(f"the bias of layer {name} must have {channels} elements, got {len(bias)}")

    def _check_packed(self, name: str, module: nn.Module, saved: SavedLayer, kind: type[rnn.QuantizableLayer]) -> None:
        assert saved.packed is not None
        shape = torch.Size(saved.packed[1])
        if not issubclass(kind, rnn.WeightedLayer):
            raise self.fail(f"layer {name} ({saved.kind}) must have no weight")
        transposed = issubclass(kind, rnn.ConvTransposeLayer)  # packed with all output channels on one axis
        weight = module.weight
        if weight.shape != shape and not (transposed and weight.numel() == shape.numel()):
            raise self.fail(
                f"the weight of layer {name} must have the model's shape {list(weight.shape)}, got {list(shape)}"
            )
        has_bias, bias = getattr(module, "bias", None) is not None, self.tensors.get(f"{name}.bias")
        folds = saved.kind.startswith("Conv") and not transposed
        if has_bias != (bias is not None) and not (folds and bias is not None):
            raise self.fail(f"layer {name} must have {'a' if has_bias else 'no'} bias, as in the model")
        channels = module.out_channels if transposed else weight.shape[kind.channel_axis]
        if bias is not None and len(bias) != channels:
            raise self.fail(f"the bias of layer {name} must have {channels} elements, got {len(bias)}")

    def _quantizer(self, name: str, scheme: Scheme, is_weight: bool, device: torch.device) -> FakeQuantizer:
        state = {key: self.tensors[f"{name}.{key}"] for key in ("scale", "zero_point", "min_val", "max_val", "skipped")}
        quantizer = FakeQuantizer(scheme, Latest() if is_weight else MinMax(), len(state["scale"]))
        quantizer.load_state_dict(state)
        quantizer.name, quantizer.observe = name, False
        return quantizer.to(device)

    def _restored(self, name: str, module: nn.Module, saved: SavedLayer) -> nn.Module:
        row = row_of(module)
        assert row is not None
        weight = next(module.parameters(recurse=False), None)
        device = weight.device if weight is not None and not weight.is_meta else torch.device("cpu")
        quant = rnn.QuantState(
            **{
                key: self._quantizer(f"{name}.quant.{key}", scheme, key.startswith("weight"), device)
                for key, scheme in saved.quantizers.items()
            }
        )
        if saved.next is not None:
            prefix = f"{name}.quant.next"
            quant.set_next(
                rnn.ByteGrid(*saved.next, self.tensors[f"{prefix}.scale"], self.tensors[f"{prefix}.zero_point"]).to(
                    device
                )
            )
        layer = row.layer.with_quantizers(module, quant, relu=saved.relu)
        layer.target = saved.target
        if isinstance(layer, rnn.WeightedLayer) and saved.packed is not None:
            scheme, shape, dtype = saved.packed
            tensors = {part: self.tensors[f"{name}.weight_{part}"].to(device) for part in part_names(scheme)}
            bias = self.tensors.get(f"{name}.bias")
            parts = QuantizedTensorParts(scheme, shape, dtype, tensors)
            layer.saved_parts = parts, None if bias is None else bias.to(device)
        elif isinstance(layer, rnn.WeightedLayer):
            values, bias = self.tensors[f"{name}.weight"].to(device), self.tensors.get(f"{name}.bias")
            if saved.channels_last:
                values = values.contiguous(memory_format=torch.channels_last)
            q = quant.weight
            assert q is not None
            layer.saved_weight = rnn.IntegerWeight(
                values, q.scale, q.zero_point, q.axis, None if bias is None else bias.to(device)
            )
        if isinstance(layer, rnn.BoundaryLayer):
            layer._parameters = layer._parameters.copy()
            for key, value in module.named_parameters(recurse=False):
                given = self.tensors[f"{name}.{key}"].to(device, value.dtype)
                setattr(layer, key, nn.Parameter(given, value.requires_grad))
        if isinstance(layer, (rnn.RecurrentLayer, rnn.MultiheadAttention)):
            layer.saved_tensors = {key: self.tensors[f"{name}.{key}"].to(device) for key in _own_shapes(module)}
        converted = converted_type(layer)
        return layer.eval() if converted is None else converted(layer).eval()

    def _parts(self, name: str) -> tuple[str, ...]:
        """The names below a layer's of the tensors that are its own."""
        packed = self.layers[name].packed
        parts = () if packed is None else tuple(f"weight_{part}" for part in part_names(packed[0]))
        return ("weight", "bias", *parts, *_own_shapes(self.modules[name]))

    def _rest(self, swaps: Mapping[int, nn.Module]) -> dict[str, Tensor]:
        """The file's tensors that are of no converted layer, after every check against the model."""
        changing = tuple(f"{name}." for name, module in self.modules.items() if id(module) in swaps)
        # The output projection of an attention may stay as it is where the attention changes.
        kept = tuple(
            f"{name}.out_proj."
            for name, module in self.modules.items()
            if isinstance(module, nn.MultiheadAttention) and id(module.out_proj) not in swaps
        )
        state = _state("load_quantized", self.model)
        expected = {n: t for n, t in state.items() if not n.startswith(changing) or n.startswith(kept)}
        of_layers = tuple(f"{name}.{part}" for name in self.layers for part in ("quant.", *self._parts(name)))
        given = {n: t for n, t in self.tensors.items() if not _is_of(n, of_layers)}
        by_identity = {id(expected[name]): name for name in given if name in expected}
        missing = [n for n, t in expected.items() if n not in given and id(t) not in by_identity]
        unexpected = [name for name in given if name not in expected]
        if missing or unexpected:
            raise self.fail(
                f"names must be those of the model, but missing are: {', '.join(missing) or 'none'}; unexpected are: "
                f"{', '.join(unexpected) or 'none'}"
            )
        unfit = []
        for name, value in given.items():
            target = expected[name]
            types = value.dtype == target.dtype or (value.is_floating_point() and target.is_floating_point())
            if not types or value.shape != target.shape:
                unfit.append(f"{name} ({value.dtype} {list(value.shape)} into {target.dtype} {list(target.shape)})")
        if unfit:
            raise self.fail(f"shapes and types must be those of the model, but are not for: {', '.join(unfit)}")
        for name, value in given.items():
            first = by_identity[id(expected[name])]
            if not torch.equal(given[first], value):
                raise self.fail(f"{first} and {name} are one tensor of the model and must be equal in the file")
        return {n: given[n] if n in given else given[by_identity[id(t)]] for n, t in expected.items()}


def _is_of(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or (part.endswith(".") and name.startswith(part)) for part in parts)
