"""Distill a sentence classifier of BERT's shape into one of DistilBERT's, and train that on in 8 bits.

    python examples/python/distill_sentiment.py                # sentences of Python's own documentation: which topic?
    python examples/python/distill_sentiment.py --data sst2    # a folder with train.tsv and dev.tsv: sentence, tab, label
    python examples/python/distill_sentiment.py --teacher out/distill_sentiment/teacher   # a teacher that is there
    python examples/python/distill_sentiment.py --quick        # seconds, to see that it works

A teacher learns from the labels, and so does a student of less than half its size. The same student, from the same
random numbers, with the same batches and schedule, learns from the teacher as well, and goes on with 8-bit weights and
activations. The four are files of ONNX Runtime in the end, and one table compares them.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made here or read from a folder

import torch
from _common import atomic, interleaved_medians, open_onnx
from _sentences import SentenceBatches, Sentences, encode, python_documentation, read_tsv, set_length, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import rarefy as rf

WORDS, LENGTH, BATCH = 4000, 48, 32  #: pieces of words that are known, tokens of a sentence, sentences of a batch
RATE, QAT_RATE = 1e-3, 2e-4  #: the peaks of one-cycle schedules


def make_teacher(words: int, labels: int) -> nn.Module:
    """BERT with 4 layers of width 128."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=words,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.2,
            num_labels=labels,
        )
    )


def make_student(words: int, labels: int) -> nn.Module:
    """DistilBERT with 2 layers of width 96."""
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=words,
            dim=96,
            n_layers=2,
            n_heads=4,
            hidden_dim=256,
            max_position_embeddings=LENGTH,
            dropout=0.2,
            num_labels=labels,
        )
    )


def load_teacher(folder: Path, data: Sentences) -> tuple[nn.Module, Tokenizer]:
    """A BERT that was trained before, and the tokenizer beside it. Raises ValueError where there is none."""
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} must hold a BERT for sentences (config.json, weights) and tokenizer.json")
    model = BertForSequenceClassification.from_pretrained(folder)
    if model.config.num_labels != len(data.labels):
        raise ValueError(
            f"the teacher must know {len(data.labels)} labels, as {data.name}, got {model.config.num_labels}"
        )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    set_length(tokenizer, LENGTH)
    return model, tokenizer


# ---- training -------------------------------------------------------------------------------------------------------


def one_cycle(
    model: nn.Module, rate: float, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    """AdamW whose learning rate rises to ``rate`` and falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)


def train(model: nn.Module, batches: SentenceBatches, epochs: int, title: str) -> None:
    """Train on the labels."""
    optimizer, schedule = one_cycle(model, RATE, epochs * len(batches))
    model.train()
    bar = tqdm(total=epochs * len(batches), desc=title, unit="batch")
    for _ in range(epochs):
        for batch in batches:
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    bar.close()
    model.eval()


def distill(student: nn.Module, teacher: nn.Module, batches: SentenceBatches, epochs: int, rate: float) -> None:
    """Train on the teacher's logits and the labels."""
    optimizer, schedule = one_cycle(student, rate, epochs * len(batches))
    trainer = rf.distillation.DistillationTrainer(
        student,
        teacher,
        optimizer,
        rf.distillation.DistillationLoss(temperature=2.0, alpha=0.7),
        scheduler=schedule,
        max_grad_norm=1.0,
    )
    trainer.fit(batches, epochs)
    student.eval()


# ---- the table ------------------------------------------------------------------------------------------------------


def table(
    models: dict[str, nn.Module], tokens: Tensor, labels: Tensor, folder: Path, seconds: float
) -> tuple[str, dict]:
    """Export the models, and compare the files: accuracy, size, and latency of one sentence on one thread."""
    inputs = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    rows, latency = {}, {}
    for name, model in tqdm(models.items(), desc="export", unit="file"):
        path = folder / f"{name.replace(', ', '_').replace(' ', '_')}.onnx"
        report = rf.export.to_onnx(model, {key: x[:2] for key, x in inputs.items()}, path)
        run = open_onnx(path, threads=1)
        parts = zip(*(x.split(100) for x in inputs.values()), strict=True)
        right = torch.cat([run(*part).argmax(1) for part in parts]) == labels
        rows[name] = {"accuracy": 100 * right.float().mean().item(), "bytes": path.stat().st_size}
        latency[name] = partial(run, *(x[:1] for x in inputs.values()))
    tqdm.write(repr(report))
    for name, milliseconds in interleaved_medians(latency, seconds).items():
        rows[name]["milliseconds"] = milliseconds
    width = max(map(len, rows))
    lines = [
        f"| {'model':{width}} | parameters | accuracy % | file KiB | ORT ms |",
        f"| {'-' * width} | ---------: | ---------: | -------: | -----: |",
    ]
    for name, row in rows.items():
        row["parameters"] = sum(p.numel() for p in models[name].parameters())
        lines.append(
            f"| {name:{width}} | {row['parameters']:10,} | {row['accuracy']:10.2f} | {row['bytes'] / 1024:8.1f} "
            f"| {row['milliseconds']:6.3f} |"
        )
    return "\n".join(lines), rows


def main() -> None:
    """Run the job as the command line says."""
    parser = argparse.ArgumentParser(description="Distill a sentence classifier, and quantize it to 8 bits.")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="train.tsv and dev.tsv (default: Python's documentation)"
    )
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="a trained BERT with tokenizer.json, used as it is")
    parser.add_argument("--out", type=Path, default=Path("out/distill_sentiment"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, nargs=3, metavar=("TEACHER", "STUDENT", "QAT"))
    parser.add_argument("--quick", action="store_true", help="few sentences and epochs, to see that everything works")
    arguments = parser.parse_args()
    epochs = arguments.epochs or ((2, 3, 1) if arguments.quick else (5, 8, 2))
    if min(epochs) < 1:
        parser.error(f"argument --epochs: must be positive, got {' '.join(map(str, epochs))}")
    try:
        data = read_tsv(arguments.data) if arguments.data else python_documentation(arguments.seed)
        data = data.first(1000, 400) if arguments.quick else data
        loaded = load_teacher(arguments.teacher, data) if arguments.teacher else None
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{data.name}: {len(data.train)} sentences to train, {len(data.test)} to test, {len(data.labels)} labels")

    torch.manual_seed(arguments.seed)
    sentences = [sentence for sentence, _ in data.train]
    tokenizer = loaded[1] if loaded else train_tokenizer(sentences, WORDS, LENGTH)
    words, labels = tokenizer.get_vocab_size(), len(data.labels)
    batches = SentenceBatches(encode(tokenizer, sentences), torch.tensor([label for _, label in data.train]), BATCH)
    test_tokens = encode(tokenizer, [sentence for sentence, _ in data.test])
    test_labels = torch.tensor([label for _, label in data.test])

    if loaded:
        teacher = loaded[0].eval()
    else:
        teacher = make_teacher(words, labels)
        train(teacher, batches, epochs[0], "teacher")
        teacher.save_pretrained(arguments.out / "teacher")
        with atomic(arguments.out / "teacher" / "tokenizer.json") as temporary:
            tokenizer.save(str(temporary))

    untrained = make_student(words, labels)
    alone, distilled = copy.deepcopy(untrained), copy.deepcopy(untrained)
    torch.manual_seed(arguments.seed + 1)
    train(alone, batches, epochs[1], "student alone")
    torch.manual_seed(arguments.seed + 1)  # the same batches
    distill(distilled, teacher, batches, epochs[1], RATE)

    example = {"input_ids": test_tokens[:2], "attention_mask": (test_tokens[:2] != 0).long()}
    quantized = rf.quantization.prepare_qat(distilled, rf.quantization.QConfig.int8(), example)
    distill(quantized, teacher, batches, epochs[2], QAT_RATE)

    models = {"teacher": teacher, "student alone": alone, "student distilled": distilled, "distilled, QAT": quantized}
    lines, rows = table(models, test_tokens, test_labels, arguments.out, seconds=1 if arguments.quick else 5)
    first, before, best, last = rows.values()
    kept, size, time = (last[key] / first[key] for key in ("accuracy", "bytes", "milliseconds"))
    print(
        f"\n{lines}\n\nDistilling changes the student by {best['accuracy'] - before['accuracy']:+.2f} points, training in "
        f"8 bits by {last['accuracy'] - best['accuracy']:+.2f}. The int8 file keeps {100 * kept:.1f} % of the teacher's "
        f"accuracy with {size:.2f} of its size and {time:.2f} of its time.\nFiles: {arguments.out}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
