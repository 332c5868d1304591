"""Distill a pair of towers of CLIP's shape, images and texts, then prune the image tower and train it on in 8 bits.

    python examples/python/distill_clip.py                       # scikit-learn's digits, with captions made of their labels
    python examples/python/distill_clip.py --data images.npz     # 32x32 colour images, the names of their labels in "classes"
    python examples/python/distill_clip.py --quick               # seconds, to see that it works

A teacher learns which caption belongs to which image. A student of less than a fifth of its size does so alone, and once
more with the teacher's affinities and embeddings to follow. A third of the work of the distilled image tower is then
removed, and what is left trains on with 8-bit weights and activations; both under the same loss, with the same trainer.
The image towers are files of ONNX Runtime in the end, and one table compares them with captions of unseen wording.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made here

import numpy as np
import torch
import torch.nn.functional as F
from _common import Images, TrainingBatches, interleaved_medians, load_digits, load_npz, open_onnx
from _sentences import encode, train_tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel

import rarefy as rf

BATCH = 64
RATE, TUNE_RATE = 2e-3, 1e-3  #: the peaks of one-cycle schedules
WORDS, LENGTH = 200, 16  #: pieces of words that are known, tokens of a caption

TEMPLATES = (
    "a photo of a {}",
    "this picture shows a {}",
    "a {}, seen from the front",
    "somebody made a picture of a {}",
    "a small image with a {} in it",
    "there is a {} in the middle",
    "one {} and nothing else",
    "a blurry {}",
)
UNSEEN = 2  #: so many of them, the last, are for testing only
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


# ---- images and captions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Images, and the captions that each label can have: token numbers int64 [labels, templates, length]."""

    images: Images
    captions: Tensor

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of an epoch, each with the number of one of its captions: label * templates + template."""
        templates = self.captions.shape[1]
        for images, labels in TrainingBatches(self.images, BATCH):
            yield images, labels * templates + torch.randint(templates - UNSEEN, labels.shape)


class Epochs:
    """The batches of a `Pairs`, anew for each epoch."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(TrainingBatches(self.pairs.images, BATCH))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.pairs.batches()


def load_pairs(path: Path | None, seed: int) -> Pairs:
    """The images of a file or scikit-learn's digits, twice as large, and their captions."""
    if path is None:
        small = load_digits(seed)
        larger = [F.interpolate(x, scale_factor=2, mode="bilinear") for x in (small.train_images, small.test_images)]
        images = Images("digits", 10, larger[0], small.train_labels, larger[1], small.test_labels, flip=False, shift=2)
        names = list(DIGITS)
    else:
        images = load_npz(path)
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["classes"]] if "classes" in file.files else []
        if len(names) != images.classes:
            raise ValueError(f"{path} must hold classes, the names of its {images.classes} labels, got {len(names)}")
    sentences = [template.format(name) for name in names for template in TEMPLATES]
    tokenizer = train_tokenizer(sentences, WORDS, LENGTH)
    return Pairs(images, encode(tokenizer, sentences).view(len(names), len(TEMPLATES), LENGTH))


# ---- models ---------------------------------------------------------------------------------------------------------


def make_clip(pairs: Pairs, width: int, layers: int, text_width: int, text_layers: int) -> CLIPModel:
    """A CLIP for images of this size, in 4 x 4 patches."""
    _, channels, size, _ = pairs.images.train_images.shape
    text = {"hidden_size": text_width, "intermediate_size": 2 * text_width, "num_hidden_layers": text_layers}
    text |= {"vocab_size": WORDS, "max_position_embeddings": LENGTH, "num_attention_heads": 2}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}  # [PAD], [CLS] and [SEP] of the tokenizer
    vision = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": 4, "num_channels": channels, "image_size": size, "patch_size": size // 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


class ImageTower(nn.Module):
    """The part of a CLIP that embeds images: pixels [N, C, H, W] to [N, width], of norm 1. It shares its parameters."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def embed_texts(clip: CLIPModel, tokens: Tensor) -> Tensor:
    """Embeddings of norm 1: tokens [N, length] to [N, width]."""
    pooled = clip.text_model(input_ids=tokens, attention_mask=(tokens != 0).long()).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1)


# ---- losses ---------------------------------------------------------------------------------------------------------


def contrastive(images: Tensor, texts: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """CLIP's loss, where a batch has several pairs of one label: each image of it belongs to each of their captions."""
    logits = scale * images @ texts.t()
    right = (labels[:, None] == labels[None, :]).to(logits.dtype)
    right /= right.sum(1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.t(), right)) / 2


class PairLoss(nn.Module):
    """What the student learns from: the captions, the teacher's affinities of images and texts, and its embeddings.

    A term for a trainer whose models embed images: the texts are embedded here.
    """

    def __init__(self, student: CLIPModel, teacher: CLIPModel, captions: Tensor) -> None:
        super().__init__()
        self.student, self.captions, self.templates = student, captions.flatten(0, 1), captions.shape[1]
        with torch.no_grad():
            self.teacher_texts = embed_texts(teacher, self.captions)  # all of them: they do not change
        self.teacher_scale = float(teacher.logit_scale.exp())
        self.affinities = rf.distillation.AffinityMimicking()
        self.embeddings = rf.distillation.EmbeddingMSE()

    def forward(self, student_images: Tensor, teacher_images: Tensor, captions: Tensor) -> Tensor:
        scale = self.student.logit_scale.exp()
        texts, teacher_texts = embed_texts(self.student, self.captions[captions]), self.teacher_texts[captions]
        student, teacher = (student_images, texts), (teacher_images, teacher_texts)
        affinities = self.affinities(student, teacher, student_scale=scale, teacher_scale=self.teacher_scale)
        embeddings = self.embeddings(student_images, teacher_images) + self.embeddings(texts, teacher_texts)
        return contrastive(student_images, texts, scale, captions // self.templates) + affinities + embeddings


# ---- training -------------------------------------------------------------------------------------------------------


def one_cycle(
    model: nn.Module, rate: float, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    """AdamW whose learning rate rises to ``rate`` and falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)


def train(clip: CLIPModel, pairs: Pairs, epochs: int, title: str) -> None:
    """Train on images and captions."""
    batches, tower, captions = Epochs(pairs), ImageTower(clip), pairs.captions.flatten(0, 1)
    optimizer, schedule = one_cycle(clip, RATE, epochs * len(batches))
    clip.train()
    bar = tqdm(total=epochs * len(batches), desc=title, unit="batch")
    for _ in range(epochs):
        for images, numbers in batches:
            texts = embed_texts(clip, captions[numbers])
            labels = numbers // pairs.captions.shape[1]
            loss = contrastive(tower(images), texts, clip.logit_scale.exp(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    bar.close()
    clip.eval()


def distill(student: CLIPModel, teacher: CLIPModel, pairs: Pairs, epochs: int, rate: float) -> None:
    """Train on images, captions and the teacher."""
    batches = Epochs(pairs)
    optimizer, schedule = one_cycle(student, rate, epochs * len(batches))
    trainer = rf.distillation.DistillationTrainer(
        ImageTower(student),
        ImageTower(teacher),
        optimizer,
        PairLoss(student, teacher, pairs.captions),
        scheduler=schedule,
    )
    student.train()
    trainer.fit(batches, epochs)
    student.eval()


# ---- the table ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieval(run: Callable[[Tensor], Tensor], clip: CLIPModel, pairs: Pairs) -> dict[str, float]:
    """How well images and captions of unseen wording find each other, in per cent; images are embedded by ``run``."""
    labels, captions = pairs.images.test_labels, pairs.captions[:, -UNSEEN:]
    images = torch.cat([run(part) for part in pairs.images.test_images.split(100)])
    texts = embed_texts(clip, captions.flatten(0, 1))
    similar, meaning = images @ texts.t(), torch.arange(len(captions)).repeat_interleave(UNSEEN)
    classes = F.normalize(texts.unflatten(0, (-1, UNSEEN)).mean(1), dim=-1)
    first = similar.t().topk(10).indices  # [captions, 10] images
    shares = {
        "image to text": meaning[similar.argmax(1)] == labels,
        "text to image": labels[first] == meaning[:, None],
        "zero-shot": (images @ classes.t()).argmax(1) == labels,
    }
    return {name: 100 * right.float().mean().item() for name, right in shares.items()}


def table(models: dict[str, CLIPModel], pairs: Pairs, folder: Path, seconds: float) -> tuple[str, dict]:
    """Export the image towers, and compare: retrieval, size of the file, latency of one image on one thread."""
    rows, latency = {}, {}
    for name, clip in tqdm(models.items(), desc="export", unit="file"):
        path = folder / f"{name.replace(', ', '_').replace(' ', '_')}.onnx"
        report = rf.export.to_onnx(ImageTower(clip), pairs.images.test_images[:2].contiguous(), path)
        run = open_onnx(path, threads=1)
        rows[name] = {**retrieval(run, clip, pairs), "bytes": path.stat().st_size}
        latency[name] = partial(run, pairs.images.test_images[:1].contiguous())
    tqdm.write(repr(report))
    for name, milliseconds in interleaved_medians(latency, seconds).items():
        rows[name]["milliseconds"] = milliseconds
    width = max(map(len, rows))
    lines = [
        f"| {'image tower':{width}} | parameters | to text, R@1 | to image, P@10 | zero-shot | file KiB | ORT ms |",
        f"| {'-' * width} | ---------: | -----------: | -------------: | --------: | -------: | -----: |",
    ]
    for name, row in rows.items():
        row["parameters"] = sum(p.numel() for p in ImageTower(models[name]).parameters())
        lines.append(
            f"| {name:{width}} | {row['parameters']:10,} | {row['image to text']:12.2f} | {row['text to image']:14.2f} "
            f"| {row['zero-shot']:9.2f} | {row['bytes'] / 1024:8.1f} | {row['milliseconds']:6.3f} |"
        )
    return "\n".join(lines), rows


def main() -> None:
    """Run the job as the command line says."""
    parser = argparse.ArgumentParser(description="Distill a CLIP, prune its image tower, and quantize it to 8 bits.")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="colour images (default: scikit-learn's digits)")
    parser.add_argument("--out", type=Path, default=Path("out/distill_clip"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--macs", type=float, default=1 / 3, help="part of the image tower's work to remove")
    parser.add_argument("--epochs", type=int, nargs=4, metavar=("TEACHER", "STUDENT", "PRUNED", "QAT"))
    parser.add_argument("--quick", action="store_true", help="few epochs, to see that everything works")
    arguments = parser.parse_args()
    epochs = arguments.epochs or ((10, 10, 4, 2) if arguments.quick else (30, 30, 10, 6))
    if min(epochs) < 1:
        parser.error(f"argument --epochs: must be positive, got {' '.join(map(str, epochs))}")
    if not 0 <= arguments.macs < 1:
        parser.error(f"argument --macs: must be in [0, 1), got {arguments.macs}")
    try:
        pairs = load_pairs(arguments.data, arguments.seed)
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    images = pairs.images
    print(f"{images.name}: {len(images.train_labels)} images to train, {len(images.test_labels)} to test")

    torch.manual_seed(arguments.seed)
    teacher = make_clip(pairs, width=96, layers=3, text_width=64, text_layers=2)
    train(teacher, pairs, epochs[0], "teacher")
    untrained = make_clip(pairs, width=48, layers=2, text_width=32, text_layers=1)
    alone, distilled = copy.deepcopy(untrained), copy.deepcopy(untrained)
    torch.manual_seed(arguments.seed + 1)
    train(alone, pairs, epochs[1], "student alone")
    torch.manual_seed(arguments.seed + 1)  # the same batches
    distill(distilled, teacher, pairs, epochs[1], RATE)

    # Hidden units, heads and widths of the image tower go, in one step, and what is left follows the teacher again.
    pruned = copy.deepcopy(distilled)
    example = images.test_images[:2].contiguous()
    report = rf.pruning.StructuredPruner(ImageTower(pruned), example, macs=arguments.macs, round_to=8).prune()
    tqdm.write(f"\n{report}\n")
    distill(pruned, teacher, pairs, epochs[2], TUNE_RATE)

    # 8 bits: the layers of the tower are swapped in place, so that the CLIP around it has them too.
    quantized = copy.deepcopy(pruned)
    rf.quantization.prepare_qat(ImageTower(quantized), rf.quantization.QConfig.int8(), example, inplace=True)
    distill(quantized, teacher, pairs, epochs[3], TUNE_RATE)

    models = {"teacher": teacher, "student alone": alone, "student distilled": distilled, "distilled, pruned": pruned}
    models |= {"distilled, pruned, QAT": quantized}
    lines, rows = table(models, pairs, arguments.out, seconds=1 if arguments.quick else 5)
    first, before, best, *_, last = rows.values()
    gained, left = (a["image to text"] - b["image to text"] for a, b in ((best, before), (last, first)))
    size, time = (last[key] / first[key] for key in ("bytes", "milliseconds"))
    print(
        f"\n{lines}\n\nPer cent of images whose first caption is right, of the first 10 images of a caption that are, and of "
        "images whose label is found;\nno caption is worded as in training. Distilling changes the student's R@1 by "
        f"{gained:+.2f} points. The pruned int8 tower is {left:+.2f} from\nthe teacher's, with {size:.2f} of its size and "
        f"{time:.2f} of its time.\nFiles: {arguments.out}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
