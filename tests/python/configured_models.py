"""Architectures of Hugging Face's transformers, small and randomly initialized, with inputs: nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves

WIDTH, HEADS, LAYERS, WORDS = 32, 2, 2, 50
TEXT = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
TEXT |= {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
LLAMA = TEXT | {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
VISION |= {"image_size": 32, "patch_size": 8}
SPEECH = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SPEECH |= {
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 3),
    "layerdrop": 0.0,
}
SPEECH |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
SPEECH |= {"apply_spec_augment": False}
BACKBONE = {"hidden_sizes": [16, 32], "depths": [1, 1]}
DUAL = (
    {"text_config": TEXT | {"bos_token_id": 1, "eos_token_id": 2}},
    {"vision_config": VISION},
    {"projection_dim": 16},
)


def tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(3, WORDS, (2, length))


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()}


def sequence_to_sequence() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(7)}


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels()}


def sound() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 800)}


def spectrogram() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": tokens(7)}


def text_and_image() -> dict[str, torch.Tensor]:
    ids = tokens()
    ids[:, -1] = 2  # where CLIP reads its text
    return {"input_ids": ids, "pixel_values": pixels()}


def merged(*parts: dict[str, object]) -> dict[str, object]:
    return {key: value for part in parts for key, value in part.items()}


# Architecture: the class of its model, the fields of its configuration, its inputs.
ARCHITECTURES = {
    # vision
    "ViT": ("ViTForImageClassification", VISION, image),
    "DeiT": ("DeiTForImageClassification", VISION, image),
    "BEiT": ("BeitForImageClassification", VISION, image),
    "DINOv2": ("Dinov2ForImageClassification", VISION | {"mlp_ratio": 2}, image),
    "Swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        image,
    ),
    "ConvNeXt": ("ConvNextForImageClassification", BACKBONE | {"num_stages": 2}, image),
    "ResNet": (
        "ResNetForImageClassification",
        BACKBONE | {"embedding_size": 16, "layer_type": "basic", "num_labels": 3},
        image,
    ),
    "MobileNetV2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.1, "min_depth": 8}, image),
    "SegFormer": (
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
         "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
        image,
    ),
    "YOLOS": ("YolosForObjectDetection", VISION | {"num_detection_tokens": 4, "image_size": [32, 32]}, image),
    # text
    "BERT": ("BertForSequenceClassification", TEXT, text),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        {"vocab_size": WORDS, "dim": WIDTH, "hidden_dim": 64, "n_layers": LAYERS, "n_heads": HEADS},
        text,
    ),
    "RoBERTa": ("RobertaForMaskedLM", TEXT, text),
    "ALBERT": ("AlbertForSequenceClassification", TEXT | {"embedding_size": 16}, text),
    "ELECTRA": ("ElectraForSequenceClassification", TEXT | {"embedding_size": 16}, text),
    "DeBERTa-v3": (
        "DebertaV2ForSequenceClassification",
        TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True,
                "norm_rel_ebd": "layer_norm", "position_biased_input": False},
        text,
    ),
    "BART": (
        "BartForConditionalGeneration",
        {"vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
         "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 1},
        sequence_to_sequence,
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64,
         "bos_token_id": 1, "eos_token_id": 2},
        text,
    ),
    "Llama": ("LlamaForCausalLM", LLAMA, text),
    "Mistral": ("MistralForCausalLM", LLAMA, text),
    "Qwen2": ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True}, text),
    "OPT": (
        "OPTForCausalLM",
        LLAMA | {"ffn_dim": 64, "word_embed_proj_dim": WIDTH},
        text,
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": WORDS, "d_model": WIDTH, "d_ff": 64, "d_kv": 16, "num_layers": LAYERS, "num_heads": HEADS,
         "decoder_start_token_id": 0},
        sequence_to_sequence,
    ),
    "Mamba": (
        "MambaForCausalLM",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8, "pad_token_id": 0},
        text,
    ),
    # speech
    "wav2vec 2.0": ("Wav2Vec2ForCTC", SPEECH, sound),
    "HuBERT": ("HubertForCTC", SPEECH, sound),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {"vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "num_mel_bins": 16,
         "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
         "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 1},
        spectrogram,
    ),
    # text and images
    "CLIP": ("CLIPModel", merged(*DUAL), text_and_image),
    "SigLIP": ("SiglipModel", merged(*DUAL[:2]), text_and_image),
    "BLIP": (
        "BlipForConditionalGeneration",
        {"text_config": DUAL[0]["text_config"] | {"encoder_hidden_size": WIDTH, "sep_token_id": 2},
         "vision_config": VISION | {"initializer_range": 0.02}},
        text_and_image,
    ),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    class_name, fields, make_inputs = ARCHITECTURES[name]
    torch.manual_seed(0)
    kind = getattr(transformers, class_name)
    dropouts = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attention_dropout": 0.0,
        "dropout": 0.0,
    }
    config = kind.config_class(**fields)
    for field, value in dropouts.items():
        if hasattr(config, field):
            setattr(config, field, value)
    return kind(config), make_inputs()


def floats(output: object) -> list[torch.Tensor]:
    """The floating-point tensors of a model's output, wherever they are."""
    output = dict(output) if hasattr(output, "keys") else output
    return [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
