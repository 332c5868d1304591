"""Writes brevitas_formats.json: what brevitas makes of some tensors, for tests/python/test_formats_elsewhere.py.

pip install --no-deps --target build/brevitas brevitas dependencies==2.0.1 unfoldNd
PYTHONPATH=build/brevitas python tests/data/brevitas_formats.py
"""

import base64
import json
from importlib.metadata import version
from pathlib import Path

import torch
from brevitas.core.function_wrapper.misc import Identity
from brevitas.core.quant import IntQuant
from brevitas.nn import QuantLinear
from brevitas.quant.float_quant_ocp import (
    FpOCPWeightPerChannelFloat,
    FpOCPWeightPerTensorFloat,
)
from brevitas.quant.mx_quant_ocp import MXFloat8e4m3Weight


def numbers(x: torch.Tensor) -> str:
    """The bytes of float32 values."""
    return base64.b64encode(x.detach().float().contiguous().numpy().tobytes()).decode()


def weight() -> torch.Tensor:
    """4 rows of 64: different sizes per row, a few outliers, zeros, a tie."""
    generator = torch.Generator().manual_seed(20)
    w = torch.randn(4, 64, generator=generator) * torch.logspace(-3, 2, 4)[:, None]
    w[0, 5], w[1, 40], w[3, 63], w[2, 32:] = 0.0, 31.0, -900.0, 0.0
    return w


def of_layer(quantizer: type, w: torch.Tensor, **options: object) -> dict[str, object]:
    layer = QuantLinear(w.shape[1], w.shape[0], bias=False, weight_quant=quantizer, **options)
    layer.weight.data.copy_(w)
    layer.eval()
    quantized = layer.quant_weight()
    value = quantized.value if hasattr(quantized, "value") else quantized
    return {"value": numbers(value.reshape(w.shape)), "scale": numbers(layer.quant_weight().scale)}


def main() -> None:
    w = weight()
    cases: dict[str, object] = {}
    for bits, signed, narrow, zero in [
        (8, True, False, 0.0),
        (4, True, True, 0.0),
        (8, False, False, 121.0),
        (3, False, False, 2.0),
    ]:
        impl = IntQuant(narrow_range=narrow, signed=signed, input_view_impl=Identity())
        y = impl(torch.tensor(0.05), torch.tensor(zero), torch.tensor(float(bits)), w)
        cases[f"int{bits}{'s' if signed else 'u'}{'n' if narrow else ''}"] = {
            "bits": bits,
            "signed": signed,
            "narrow": narrow,
            "zero_point": int(zero),
            "scale": numbers(torch.tensor(0.05)),
            "value": numbers(y),
        }
    formats = {"e4m3": (4, 3), "e5m2": (5, 2), "e3m2": (3, 2), "e2m3": (2, 3), "e2m1": (2, 1)}
    for name, (e, m) in formats.items():
        options = {"weight_bit_width": 1 + e + m, "weight_exponent_bit_width": e, "weight_mantissa_bit_width": m}
        cases[f"{name} tensor"] = of_layer(FpOCPWeightPerTensorFloat, w, **options)
        cases[f"{name} channel"] = of_layer(FpOCPWeightPerChannelFloat, w, **options)
    for name, (e, m) in formats.items():
        options = {"weight_bit_width": 1 + e + m, "weight_exponent_bit_width": e, "weight_mantissa_bit_width": m}
        cases[f"mx {name}"] = of_layer(MXFloat8e4m3Weight, w, **options)
    file = Path(__file__).with_suffix(".json")
    file.write_text(
        json.dumps({"brevitas": version("brevitas"), "x": numbers(w), "shape": list(w.shape), "cases": cases}, indent=0)
    )


if __name__ == "__main__":
    main()
