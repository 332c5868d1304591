"""Data for accuracy.py: real data from a folder, or what Python and scikit-learn carry."""

import importlib
import inspect
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Inputs and labels for training, and for evaluation."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    def first(self, train: int, test: int) -> "Split":
        """The first samples, for a trial."""
        parts = (self.train_x[:train], self.train_y[:train], self.test_x[:test], self.test_y[:test])
        return Split(self.name, *parts, self.classes)


def _normalized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return ((train - mean) / std).contiguous(), ((test - mean) / std).contiguous()


def _order(count: int) -> tuple[Tensor, Tensor]:
    """Indices for training and, of 30 %, for evaluation; the same at every call."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[count * 3 // 10 :], order[: count * 3 // 10]


def images(data: Path | None) -> Split:
    """cifar10_subset.npz: train_images [N, 32, 32, 3] uint8, train_labels, test_images, test_labels; else sklearn's digits."""
    if data is not None:
        with np.load(data / "cifar10_subset.npz") as file:
            pixels = [torch.from_numpy(file[f"{part}_images"]).permute(0, 3, 1, 2) / 255 for part in ("train", "test")]
            labels = [torch.from_numpy(file[f"{part}_labels"]).long() for part in ("train", "test")]
        train, test = _normalized(*pixels)
        return Split("CIFAR-10 subset", train, labels[0], test, labels[1], 10)
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = torch.from_numpy(digits.target).long()
    first, second = _order(len(labels))
    train, test = _normalized(pixels[first], pixels[second])
    return Split("digits", train, labels[first], test, labels[second], 10)


# --- Sentences ------------------------------------------------------------------------------------------------------
LENGTH = 48  # words of a sentence that are read
_BUCKETS = 64  # numbers for words that are rare in the training data
_FIRST_WORD = 1 + _BUCKETS  # 0 is padding


def _words(sentence: str) -> list[str]:
    return re.findall(r"[a-z0-9']+|[^\sa-z0-9']", sentence.lower())[:LENGTH]


class Tokenizer:
    """Whole words by number; a word that the training sentences have once or never shares a number by its hash."""

    def __init__(self, sentences: list[str]) -> None:
        counts = Counter(word for sentence in sentences for word in _words(sentence))
        known = sorted(word for word, count in counts.items() if count > 1)
        self.numbers = {word: _FIRST_WORD + i for i, word in enumerate(known)}
        self.vocabulary = _FIRST_WORD + len(known)

    def __call__(self, sentences: list[str]) -> Tensor:
        """Word numbers [N, LENGTH], int64, padded with 0."""
        out = torch.zeros(len(sentences), LENGTH, dtype=torch.int64)
        for row, sentence in zip(out, sentences, strict=True):
            for i, word in enumerate(_words(sentence)):
                row[i] = self.numbers.get(word, 1 + zlib.crc32(word.encode()) % _BUCKETS)
        return out


_FAMILIES = (
    "os pathlib shutil tempfile glob zipfile tarfile subprocess",
    "http.client http.server urllib.request urllib.parse socket ssl smtplib imaplib ftplib email.message asyncio",
    "decimal fractions statistics random math cmath datetime calendar",
    "ast inspect tokenize typing types dis unittest unittest.mock doctest pickle copy",
)


def _docstrings() -> tuple[list[str], list[int]]:
    """Docstrings of the standard library, and to which of four families of modules each belongs."""
    found: dict[str, int] = {}
    for family, modules in enumerate(_FAMILIES):
        for name in modules.split():
            members = list(vars(importlib.import_module(name)).values())
            for member in members[:]:
                if inspect.isclass(member) and member.__module__ == name:
                    members.extend(vars(member).values())
            for member in members:
                text = getattr(member, "__doc__", None)
                if isinstance(text, str) and len(text) > 20 and getattr(member, "__module__", name) == name:
                    found.setdefault(text.split("\n\n")[0], family)
    return list(found), list(found.values())


def sentences(data: Path | None) -> tuple[Split, Tokenizer]:
    """sst2/{train,dev,test}.tsv: sentence, tab, label 0 or 1; dev and test both evaluate. Else docstrings of Python."""
    if data is not None:
        rows: dict[str, list[tuple[str, int]]] = {}
        for part in ("train", "dev", "test"):
            lines = (data / "sst2" / f"{part}.tsv").read_text().splitlines()
            rows[part] = [(text, int(label)) for text, _, label in (line.rpartition("\t") for line in lines if line)]
        train, test = rows["train"], rows["dev"] + rows["test"]
        name, classes = "sentences", 2
    else:
        texts, families = _docstrings()
        first, second = _order(len(texts))
        train, test = ([(texts[i], families[i]) for i in part.tolist()] for part in (first, second))
        name, classes = "docstrings", len(_FAMILIES)
    tokenizer = Tokenizer([text for text, _ in train])
    x = [tokenizer([text for text, _ in part]) for part in (train, test)]
    y = [torch.tensor([label for _, label in part]) for part in (train, test)]
    return Split(name, x[0], y[0], x[1], y[1], classes), tokenizer
