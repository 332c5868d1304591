"""Multi-head attention: floating point with heads of any width, and with quantized projections and products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy._core.quantization import LONGEST_INTEGER_SUM, Latest
from rarefy.nn._base import _EXACT_PRODUCTS, QuantizableLayer, QuantState, activation_quantizer
from rarefy.nn.sdpa import attention_and_weights
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.qconfig import QConfig

if TYPE_CHECKING:
    from typing_extensions import Self

PARTS = ("query", "key", "value")


def _additive(mask: Tensor | None, name: str, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to the scores: True becomes -inf."""
    if mask is None or torch.is_floating_point(mask):
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(f"[MultiheadAttention] {name} must be bool or floating point, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


class AttentionForward:
    """The arguments and results of ``nn.MultiheadAttention``, for a floating, prepared, converted or exported layer.

    A subclass gives the projections, and the attention of heads where it is not that on grids.
    """

    quant: nn.Module  #: a ``QuantState``, or what was lowered from one
    num_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    training: bool
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Module

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections [..., k], [..., k] and [..., v], biases included."""
        raise NotImplementedError

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The heads [batch, heads, length, width]: their results and, where asked for, their probabilities before these are
        rounded. What is multiplied goes through the quantizers of ``quant``, where it has them."""
        quantizers = [self.quant._modules.get(name) for name in ("query", "key", "probabilities", "value")]
        y, weights = attention_and_weights(query, key, value, mask, dropout, False, self.scale, quantizers)
        return y, weights if need_weights else None

    def _takes_hint(self) -> bool:
        """Whether ``_attend`` computes a causal mask by itself."""
        return False

    def _sizes(self) -> list[int]:
        """Rows of the projections of query, key and value."""
        keys, values = self.num_heads * self.head_dim, self.num_heads * self.v_head_dim
        return [keys, keys, values]

    def _check_masks(
        self, attn_mask: Tensor | None, padding: Tensor | None, batch: int, target: int, source: int
    ) -> None:
        shapes = ((target, source), (batch * self.num_heads, target, source))
        if attn_mask is not None and tuple(attn_mask.shape) not in shapes:
            raise ValueError(
                f"[MultiheadAttention] attn_mask must have shape {shapes[0]} or {shapes[1]}, got {tuple(attn_mask.shape)}"
            )
        if padding is not None and tuple(padding.shape) != (batch, source):
            raise ValueError(
                f"[MultiheadAttention] key_padding_mask must have shape {(batch, source)}, got {tuple(padding.shape)}"
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of each query over the keys: as ``nn.MultiheadAttention.forward``, argument by argument.

        Raises:
            ValueError: masks of other shapes than ``nn.MultiheadAttention`` takes, ``is_causal`` without ``attn_mask``,
                inputs that are not all batched or all without a batch, nested tensors.
        """
        batched = query.dim() == 3
        if query.is_nested:
            raise ValueError(
                "[MultiheadAttention] inputs must not be nested tensors: set use_nested_tensor = False on the "
                "nn.TransformerEncoder that makes them"
            )
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                f"[MultiheadAttention] query, key and value must all have 3 dimensions, or 2 without a batch, got "
                f"{query.dim()}, {key.dim()} and {value.dim()}"
            )
        if is_causal and attn_mask is None:
            raise ValueError("[MultiheadAttention] attn_mask must be given where is_causal says what it is")
        dtype = query.dtype if query.is_floating_point() else torch.float32  # bytes, of a converted layer
        attn_mask = _additive(attn_mask, "attn_mask", dtype)
        key_padding_mask = _additive(key_padding_mask, "key_padding_mask", dtype)
        # The hint replaces the mask where nothing else needs the scores.
        causal = is_causal and key_padding_mask is None and not need_weights and self._takes_hint()
        if causal:
            attn_mask = None
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        batch, heads = q.shape[0], self.num_heads
        self._check_masks(attn_mask, key_padding_mask, batch, q.shape[1], k.shape[1])
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, -1)], dim=1)
            more += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            more += 1
        mask = None  # broadcast to [batch, heads, target, source]
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (0, more))
            mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))
        if key_padding_mask is not None:
            padding = F.pad(key_padding_mask, (0, more))[:, None, None, :]
            mask = padding if mask is None else mask + padding
        q, k = (x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2) for x in (q, k))
        v = v.unflatten(-1, (heads, self.v_head_dim)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y, weights = self._attend(q, k, v, mask, dropout, causal, need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights


class MultiheadAttention(AttentionForward, QuantizableLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with heads of any width: what is left of one when heads are removed.

    With h heads:

        head_i = softmax(scale * (x Wq_i)(x Wk_i)^T + mask) x Wv_i,    output = [head_1, ..., head_h] Wo

    Parameters have the names that ``nn.MultiheadAttention`` gives them, and these shapes, with k = h * head_dim and
    v = h * v_head_dim:

    | name | shape |
    |---|---|
    | ``in_proj_weight``, where query, key and value have one width | [k + k + v, embed_dim] |
    | ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``, otherwise | [k, embed_dim], [k, kdim], [v, vdim] |
    | ``in_proj_bias`` | [k + k + v] |
    | ``bias_k``, ``bias_v`` | [1, 1, k], [1, 1, v] |
    | ``out_proj.weight``, ``out_proj.bias`` | [embed_dim, v], [embed_dim] |

    With ``head_dim = embed_dim // num_heads`` it computes what ``nn.MultiheadAttention`` computes.
    ``nn.TransformerEncoderLayer`` calls it in evaluation too, where it would read the weights of torch's own type by itself;
    ``nn.TransformerEncoder`` needs ``use_nested_tensor = False``.

    Floating point until ``prepare_qat`` or ``prepare``, which make it of an ``nn.MultiheadAttention`` too, over its Parameter
    objects. Then the inputs of the projections (``quant.input_query``, ``quant.input_key``, ``quant.input_value``) are
    quantized per tensor and their weights (``quant.weight_query``, ...: those rows of ``in_proj_weight``) per output channel
    where the configuration says so, computed in integers where it allows; and what the heads multiply (``quant.query``,
    ``quant.key``, ``quant.probabilities``, ``quant.value``) as in ``SDPA``, with scores, masks and softmax in floating point.
    ``out_proj`` is a ``rarefy.nn.Linear`` with quantizers of its own. ``bias_k``, ``bias_v`` and the zeros of ``add_zero_attn``
    go through the quantizers of the heads beside the keys and values.

    Args:
        embed_dim: width of query and result.
        num_heads: number of heads; need not divide ``embed_dim`` where ``head_dim`` is given.
        head_dim: width of a head's query and key; ``embed_dim // num_heads`` if None.
        v_head_dim: width of a head's value; ``head_dim`` if None.
        scale: what scores are multiplied with; ``head_dim ** -0.5`` if None.
        dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as of ``nn.MultiheadAttention``.

    Raises:
        ValueError: sizes below 1; no ``head_dim`` and heads that do not divide ``embed_dim``.
    """

    v_head_dim: int
    scale: float

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        scale: float | None = None,
    ) -> None:
        if num_heads < 1 or (head_dim is None and embed_dim % num_heads != 0):
            raise ValueError(
                f"[MultiheadAttention] num_heads must divide embed_dim where head_dim is not given, got {num_heads} heads "
                f"for {embed_dim}"
            )
        nn.Module.__init__(self)
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.v_head_dim = self.head_dim if v_head_dim is None else v_head_dim
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn
        if min(self.embed_dim, self.head_dim, self.v_head_dim, self.kdim, self.vdim) < 1:
            raise ValueError(
                f"[MultiheadAttention] sizes must be at least 1, got embed_dim {embed_dim}, head_dim {self.head_dim}, "
                f"v_head_dim {self.v_head_dim}, kdim {self.kdim}, vdim {self.vdim}"
            )
        self.scale = self.head_dim**-0.5 if scale is None else scale
        keys, values = num_heads * self.head_dim, num_heads * self.v_head_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = parameter(2 * keys + values, embed_dim)
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.q_proj_weight = parameter(keys, embed_dim)
            self.k_proj_weight = parameter(keys, self.kdim)
            self.v_proj_weight = parameter(values, self.vdim)
            self.register_parameter("in_proj_weight", None)
        self.register_parameter("in_proj_bias", parameter(2 * keys + values) if bias else None)
        self.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(
            values, embed_dim, bias=bias, device=device, dtype=dtype
        )
        self.bias_k = parameter(1, 1, keys) if add_bias_kv else None
        self.bias_v = parameter(1, 1, values) if add_bias_kv else None
        self._reset_parameters()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # What torch's encoder layers ask before they take the path that reads the weights by itself.
        return False

    def _reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    fuses_relu = False
    quantizes_output = False  # it is that of out_proj
    has_weight = True
    _integer_devices = ("cpu", "cuda")

    float_reason: str | None = None
    saved_tensors: dict[str, Tensor] | None = None  #: of a file, in place of those of the float weights

    @property
    def prepared(self) -> bool:
        """Whether the layer has quantizers."""
        return "quant" in self._modules

    @classmethod
    def from_float(
        cls, module: nn.Module, config: QConfig, *, relu: bool = False, quantize_output: bool = False
    ) -> Self:
        """A quantized layer over the parameters of ``module``."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        layer._modules = module._modules.copy()
        layer._complete_sizes()
        layer._attach(config, relu, quantize_output)
        return layer

    @classmethod
    def with_quantizers(cls, module: nn.Module, quant: QuantState, *, relu: bool = False) -> Self:
        """A quantized layer over the parameters of ``module``, with quantizers that exist: a file's."""
        layer = super().with_quantizers(module, quant, relu=relu)
        layer._complete_sizes()
        return layer

    def _complete_sizes(self) -> None:
        # What torch's own type takes from the width.
        self.__dict__.setdefault("v_head_dim", self.head_dim)
        self.__dict__.setdefault("scale", self.head_dim**-0.5)

    def _attach(self, config: QConfig, relu: bool, quantize_output: bool) -> None:
        super()._attach(config, relu, quantize_output)
        self.quant.to(self.out_proj.weight.device)
        self.float_reason = config.why_not_integer() or (
            None if _EXACT_PRODUCTS else "the processor sums products of bytes in 16 bits"
        )

    def _make_quantizers(self, config: QConfig) -> dict[str, FakeQuantizer]:
        quantizers = {}
        if config.activation is not None:
            names = (*(f"input_{part}" for part in PARTS), "query", "key", "probabilities", "value")
            quantizers = {name: activation_quantizer(config) for name in names}
        assert config.weight is not None
        for part, weight in zip(PARTS, self.projections(), strict=True):
            observer = config.weight_observer or Latest()
            quantizers[f"weight_{part}"] = FakeQuantizer(config.weight, observer, weight.shape[0], weight.shape)
        return quantizers

    def projections(self) -> tuple[Tensor, ...]:
        """The weights of the projections of query, key and value: rows of ``in_proj_weight`` where there is one."""
        if self.in_proj_weight is not None:
            return self.in_proj_weight.split(self._sizes())
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    @torch.no_grad()
    def integer_tensors(self) -> dict[str, Tensor]:
        """The trained weights as int8, one for each projection, and the biases as float32, by name."""
        if self.saved_tensors is not None:
            return self.saved_tensors
        tensors = {}
        for part, weight in zip(PARTS, self.projections(), strict=True):
            quantizer = self.quant.find(f"weight_{part}")
            assert quantizer is not None
            if quantizer.observe:
                quantizer(weight)
            tensors[f"{part[0]}_proj_weight"] = quantizer.quantize_to_integer(weight)
        return tensors | self.biases()

    def biases(self) -> dict[str, Tensor]:
        """Copies of those that it has, as float32, by name."""
        found = {name: getattr(self, name) for name in ("in_proj_bias", "bias_k", "bias_v")}
        return {name: bias.detach().float().clone() for name, bias in found.items() if bias is not None}

    @classmethod
    def integer_shapes(cls, module: nn.MultiheadAttention) -> dict[str, torch.Size]:
        """The shapes of ``integer_tensors`` of a floating layer, torch's own type included."""
        keys, values = module.num_heads * module.head_dim, module.out_proj.in_features
        shapes = {
            "q_proj_weight": torch.Size((keys, module.embed_dim)),
            "k_proj_weight": torch.Size((keys, module.kdim)),
            "v_proj_weight": torch.Size((values, module.vdim)),
        }
        own = {name: getattr(module, name) for name in ("in_proj_bias", "bias_k", "bias_v")}
        return shapes | {name: tensor.shape for name, tensor in own.items() if tensor is not None}

    def _runs_in_integers(self, x: Tensor, weight: FakeQuantizer, input_: FakeQuantizer | None) -> bool:
        if self.execution == "simulated" or not weight.quantize or input_ is None or not input_.quantize:
            return False
        reason = self.float_reason
        if reason is None and x.shape[-1] > LONGEST_INTEGER_SUM:
            reason = f"int32 does not hold sums of {x.shape[-1]} products"
        if reason is None and x.dtype is torch.float64:
            reason = "float64 has no integer kernels"
        if reason is None and x.device.type not in self._integer_devices:
            reason = f"there are no integer kernels on {x.device.type}"
        if reason is not None and self.execution == "integer":
            raise ValueError(f"[MultiheadAttention] execution='integer' must be possible for its input, but {reason}")
        return reason is None

    def _product(self, part: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One projection on the grids of its input and weight."""
        w, q = self.quant.find(f"weight_{part}"), self.quant.find(f"input_{part}")
        assert w is not None
        if self._runs_in_integers(x, w, q):
            assert q is not None
            grids = (*q.grid(x), q.qmin, q.qmax, *w.grid(weight), w.qmin, w.qmax)
            bf16 = self.gradient_dtype is torch.bfloat16
            return torch.ops.rarefy.integer_linear(x, weight, bias, *grids, False, False, bf16, None)
        return F.linear(x if q is None else q(x), w(weight), bias)

    def _takes_hint(self) -> bool:
        return not self.prepared

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.in_proj_bias
        if not self.prepared and self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).split(self._sizes(), dim=-1)
        biases = (None, None, None) if bias is None else bias.split(self._sizes())
        given = zip(PARTS, (query, key, value), self.projections(), biases, strict=True)
        if self.prepared:
            q, k, v = (self._product(*arguments) for arguments in given)
        else:
            q, k, v = (F.linear(x, weight, b) for _, x, weight, b in given)
        return q, k, v

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if self.prepared:
            return super()._attend(query, key, value, mask, dropout, causal, need_weights)
        if not need_weights:
            y = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=self.scale)
            return y, None
        scores = torch.matmul(query * self.scale, key.transpose(-2, -1))
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout)
        return torch.matmul(weights, value), weights
