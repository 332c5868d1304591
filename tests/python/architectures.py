"""Real architectures for structured pruning, small, in float64, with random weights.

Those that transformers has come from their configurations, nothing is downloaded; the others are written here.
"""

from __future__ import annotations

import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from structures import Inputs, conv, image, pool, randomize
from torch import nn

WORDS, LAYERS = 23, 2
Sizes = Callable[[nn.Module], set[int]]


@dataclass(frozen=True)
class Architecture:
    """A model, its inputs, and which field of its configuration is the size of what."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    fields: dict[str, Sizes] = field(default_factory=dict)
    output: str | None = None  # the one that counts: the others are features, which would have to keep their width

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.model().double().eval()
        randomize(model)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.bias += 0.5  # few units are dead, and a layer of the few that are left is not
        return model

    def make_inputs(self, seed: int = 0) -> Inputs:
        torch.manual_seed(1000 + seed)
        return self.inputs()

    def forward(self, model: nn.Module, inputs: Inputs) -> Any:
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        return output if self.output is None else output[self.output]


# Written here


class DenseNet(nn.Module):
    """Blocks of bottleneck layers, each reading all before it, with transitions between."""

    def __init__(self, growth: int = 4, width: int = 8, layers: tuple[int, ...] = (3, 2)):
        super().__init__()
        self.stem = nn.Sequential(conv(3, width, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for i, count in enumerate(layers):
            block = nn.ModuleList()
            for _ in range(count):
                block.append(
                    nn.Sequential(
                        nn.BatchNorm2d(width),
                        nn.ReLU(inplace=True),
                        conv(width, 2 * growth, 1, bias=False),
                        nn.BatchNorm2d(2 * growth),
                        nn.ReLU(inplace=True),
                        conv(2 * growth, growth, bias=False),
                    )
                )
                width += growth
            self.blocks.append(block)
            if i + 1 < len(layers):
                half = width // 2
                self.transitions.append(
                    nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), conv(width, half, 1, bias=False), nn.AvgPool2d(2))
                )
                width = half
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            features = [x]
            for layer in block:
                features.append(layer(torch.cat(features, 1)))
            x = torch.cat(features, 1)
            if i < len(self.transitions):
                x = self.transitions[i](x)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1), 1))


class ConvBnRelu(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int] = 1, **options: Any):
        padding = size // 2 if isinstance(size, int) else (size[0] // 2, size[1] // 2)
        super().__init__(
            nn.Conv2d(inputs, outputs, size, padding=padding, bias=False, **options),
            nn.BatchNorm2d(outputs, eps=1e-3),
            nn.ReLU(inplace=True),
        )


class InceptionBlock(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.one = ConvBnRelu(inputs, 5)
        self.three = nn.Sequential(ConvBnRelu(inputs, 4), ConvBnRelu(4, 6, 3))
        self.stem = ConvBnRelu(inputs, 4)
        self.wide = ConvBnRelu(4, 3, (1, 3))
        self.high = ConvBnRelu(4, 3, (3, 1))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvBnRelu(inputs, 4))

    def forward(self, x):
        y = self.stem(x)
        return torch.cat([self.one(x), self.three(x), torch.cat([self.wide(y), self.high(y)], 1), self.pool(x)], 1)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(ConvBnRelu(3, 6, 3, stride=2), nn.LocalResponseNorm(3))
        self.blocks = nn.Sequential(InceptionBlock(6), InceptionBlock(21), InceptionBlock(21))
        self.auxiliary = nn.Linear(21 * 4, 4)
        self.classifier = nn.Linear(21, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.classifier(pool(x)), self.auxiliary(F.adaptive_avg_pool2d(x, 2).flatten(1))


class UNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (5, 8, 12)):
        super().__init__()
        self.down = nn.ModuleList()
        for inputs, outputs in zip((3, *widths[:-1]), widths, strict=True):
            self.down.append(nn.Sequential(ConvBnRelu(inputs, outputs, 3), ConvBnRelu(outputs, outputs, 3)))
        self.up = nn.ModuleList()
        self.merge = nn.ModuleList()
        for inputs, outputs in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.up.append(nn.ConvTranspose2d(inputs, outputs, 2, stride=2))
            self.merge.append(nn.Sequential(ConvBnRelu(2 * outputs, outputs, 3), nn.GroupNorm(1, outputs)))
        self.out = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x):
        skips = []
        for i, layer in enumerate(self.down):
            x = layer(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = up(x)
            x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
            x = merge(torch.cat([skip, x], dim=1))
        return self.out(x)


class ShuffleUnit(nn.Module):
    """Of ShuffleNetV2: half of the channels pass by, then two groups are interleaved."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        half = outputs // 2
        self.stride = stride
        if stride > 1:
            self.shortcut = nn.Sequential(
                conv(inputs, inputs, stride=stride, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                ConvBnRelu(inputs, half),
            )
        inputs = inputs if stride > 1 else half
        self.branch = nn.Sequential(
            ConvBnRelu(inputs, half),
            conv(half, half, stride=stride, groups=half, bias=False),
            nn.BatchNorm2d(half),
            ConvBnRelu(half, half),
        )

    def forward(self, x):
        if self.stride > 1:
            parts = self.shortcut(x), self.branch(x)
        else:
            a, b = x.chunk(2, dim=1)
            parts = a, self.branch(b)
        x = torch.cat(parts, dim=1)
        b, c, h, w = x.size()
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


class ShuffleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = ConvBnRelu(3, 6, 3, stride=2)
        self.stages = nn.Sequential(ShuffleUnit(6, 12, 2), ShuffleUnit(12, 12, 1), ShuffleUnit(12, 20, 2))
        self.last = ConvBnRelu(20, 16)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x):
        return self.classifier(self.last(self.stages(self.stem(x))).mean([2, 3]))


# From transformers


def made(class_name: str, **fields: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kind = getattr(transformers, class_name)
        return kind(kind.config_class(**fields))

    return make


def tokens(length: int = 7) -> torch.Tensor:
    return torch.randint(3, WORDS, (2, length))


def text() -> Inputs:
    return {"input_ids": tokens(), "use_cache": False}


def masked_text() -> Inputs:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def sequence_to_sequence() -> Inputs:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5), "use_cache": False}


def pixels(size: int = 16) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size, dtype=torch.float64)}


def spectrogram() -> Inputs:
    features = torch.randn(2, 8, 24, dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": tokens(5), "use_cache": False}


def text_and_image() -> Inputs:
    ids = tokens()
    ids[:, -1] = 2  # where CLIP reads its text
    return {"input_ids": ids, **pixels()()}


TEXT = {"vocab_size": WORDS, "hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 20, "max_position_embeddings": 16, "pad_token_id": 0}
LLAMA = TEXT | {"head_dim": 6, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 20}
VISION |= {"image_size": 16, "patch_size": 4}
STAGES = {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [2, 1], "num_labels": 3}


def widths(pattern: str, dim: int = 0, unit: int = 1) -> Sizes:
    """The sizes of that dimension of all parameters whose name ends in the pattern, in units."""

    def sizes(model: nn.Module) -> set[int]:
        found = {p.shape[dim] // unit for name, p in model.named_parameters() if re.search(rf"{pattern}$", name)}
        assert found, f"no parameter ends in {pattern}"
        return found

    return sizes


ARCHITECTURES = {
    "ResNet": Architecture(made("ResNetForImageClassification", **STAGES, layer_type="basic"), pixels(32)),
    "ResNet bottleneck": Architecture(
        made("ResNetForImageClassification", **STAGES, layer_type="bottleneck"), pixels(32)
    ),
    "DenseNet": Architecture(DenseNet, image(3, 16)),
    "Inception": Architecture(Inception, image(3, 12)),
    "MobileNetV2": Architecture(
        made(
            "MobileNetV2ForImageClassification", depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, num_labels=3
        ),
        pixels(32),
    ),
    "EfficientNet": Architecture(
        made(
            "EfficientNetForImageClassification",
            image_size=32,
            width_coefficient=0.1,
            depth_coefficient=0.2,
            depth_divisor=4,
            hidden_dim=128,
            num_labels=3,
            dropout_rate=0.0,
        ),
        pixels(32),
    ),
    "ConvNeXt": Architecture(
        made("ConvNextForImageClassification", num_stages=2, hidden_sizes=[8, 12], depths=[1, 1], patch_size=2),
        pixels(16),
    ),
    "U-Net": Architecture(UNet, image(3, 14)),
    "ShuffleNet": Architecture(ShuffleNet, image(3, 16)),
    "RegNet": Architecture(
        made("RegNetForImageClassification", **STAGES, groups_width=4, layer_type="y"),
        pixels(32),
    ),
    "ViT": Architecture(
        made("ViTForImageClassification", **VISION),
        pixels(),
        {
            "hidden_size": widths("patch_embeddings.projection.weight"),
            "intermediate_size": widths("(fc1|intermediate.dense).weight"),
            "num_attention_heads": widths("(q_proj|query).weight", 0, 6),
        },
    ),
    "Swin": Architecture(
        made(
            "SwinForImageClassification",
            image_size=16,
            patch_size=2,
            embed_dim=12,
            depths=[2, 1],
            num_heads=[2, 4],
            window_size=4,
            mlp_ratio=2.0,
        ),
        pixels(),
    ),
    "BERT": Architecture(
        made("BertForSequenceClassification", **TEXT),
        masked_text,
        {
            "hidden_size": widths("word_embeddings.weight", 1),
            "intermediate_size": widths("intermediate.dense.weight"),
            "num_attention_heads": widths("query.weight", 0, 6),
        },
    ),
    "DistilBERT": Architecture(
        made("DistilBertForSequenceClassification", vocab_size=WORDS, dim=24, hidden_dim=20, n_layers=2, n_heads=4),
        masked_text,
        {
            "dim": widths("word_embeddings.weight", 1),
            "hidden_dim": widths("ffn.lin1.weight"),
            "n_heads": widths("q_lin.weight", 0, 6),
        },
    ),
    "GPT-2": Architecture(
        made(
            "GPT2LMHeadModel",
            vocab_size=WORDS,
            n_embd=24,
            n_layer=LAYERS,
            n_head=4,
            n_positions=16,
            n_inner=20,
            bos_token_id=1,
            eos_token_id=2,
        ),
        text,
        {
            "n_embd": widths("wte.weight", 1),
            "n_inner": widths("mlp.c_fc.weight", 1),
            "n_head": widths("attn.c_proj.weight", 0, 6),
        },
    ),
    "Llama": Architecture(
        made("LlamaForCausalLM", **LLAMA, num_key_value_heads=2),
        text,
        {
            "hidden_size": widths("embed_tokens.weight", 1),
            "intermediate_size": widths("up_proj.weight"),
            "num_attention_heads": widths("q_proj.weight", 0, 6),
            "num_key_value_heads": widths("k_proj.weight", 0, 6),
        },
    ),
    "Llama with one key head": Architecture(
        made("LlamaForCausalLM", **LLAMA, num_key_value_heads=1, tie_word_embeddings=True),
        text,
        {
            "hidden_size": widths("embed_tokens.weight", 1),
            "intermediate_size": widths("up_proj.weight"),
            "num_attention_heads": widths("q_proj.weight", 0, 6),
            "num_key_value_heads": widths("k_proj.weight", 0, 6),
        },
    ),
    "T5": Architecture(
        made(
            "T5ForConditionalGeneration",
            vocab_size=WORDS,
            d_model=24,
            d_ff=20,
            d_kv=6,
            num_layers=LAYERS,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        sequence_to_sequence,
        # With a tied head the model divides by the root of d_model: sizes that enter nothing but shapes follow, heads.
        {"num_heads": widths("Attention.q.weight", 0, 6)},
        output="logits",
    ),
    "T5 gated": Architecture(
        made(
            "T5ForConditionalGeneration",
            vocab_size=WORDS,
            d_model=24,
            d_ff=20,
            d_kv=6,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        sequence_to_sequence,
        {"d_ff": widths("wi_0.weight")},
        output="logits",
    ),
    "CLIP": Architecture(
        made(
            "CLIPModel",
            text_config=TEXT | {"bos_token_id": 1, "eos_token_id": 2},
            vision_config=VISION,
            projection_dim=10,
        ),
        text_and_image,
        {
            "text_config.hidden_size": widths("text_model.embeddings.token_embedding.weight", 1),
            "vision_config.hidden_size": widths("vision_model.embeddings.patch_embedding.weight", 0),
            "projection_dim": widths("text_projection.weight", 0),
        },
        output="logits_per_image",
    ),
    "Whisper": Architecture(
        made(
            "WhisperForConditionalGeneration",
            vocab_size=WORDS,
            d_model=24,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            num_mel_bins=8,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=20,
            decoder_ffn_dim=18,
            max_source_positions=12,
            max_target_positions=12,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        spectrogram,
        {
            "d_model": widths("layer_norm.weight"),
            "encoder_ffn_dim": widths("encoder.*fc1.weight"),
            "decoder_ffn_dim": widths("decoder.*fc1.weight"),
        },
        output="logits",
    ),
}
