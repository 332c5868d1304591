"""Labelled sentences for the examples: from files, or what Python's own documentation says; and their tokenizer."""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

# Modules of the standard library by what they are for: the labels of the sentences that document them.
TOPICS = {
    "files": "os pathlib shutil tempfile glob fnmatch zipfile tarfile gzip bz2 lzma io csv configparser fileinput mmap "
    "filecmp netrc plistlib sqlite3 dbm.dumb shelve stat genericpath posixpath",
    "network": "http.client http.server http.cookies http.cookiejar urllib.request urllib.parse urllib.error socket ssl "
    "smtplib imaplib poplib ftplib mailbox email.message email.policy email.utils email.headerregistry asyncio "
    "asyncio.streams asyncio.transports asyncio.protocols asyncio.events asyncio.base_events socketserver ipaddress "
    "selectors xmlrpc.client xmlrpc.server wsgiref.handlers wsgiref.headers",
    "numbers and dates": "decimal fractions statistics random math cmath datetime calendar numbers zoneinfo time colorsys "
    "secrets hashlib hmac struct array heapq bisect",
    "programs": "ast inspect tokenize typing types dis unittest unittest.case unittest.mock unittest.loader unittest.suite "
    "doctest pickle copy importlib.abc importlib.machinery importlib.util importlib.metadata pdb bdb trace profile pstats "
    "traceback code codeop symtable abc functools contextlib dataclasses enum warnings logging logging.config "
    "logging.handlers argparse optparse pydoc weakref gc timeit tracemalloc pickletools",
}


@dataclass(frozen=True)
class Sentences:
    """Sentences and their labels, to train and to test."""

    name: str
    labels: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]

    def first(self, train: int, test: int) -> Sentences:
        """A part, for a trial."""
        return Sentences(self.name, self.labels, self.train[:train], self.test[:test])


def _documented(module_name: str) -> Iterator[str]:
    """The docstrings of a module, of what it defines, and of the members of its classes."""
    module = importlib.import_module(module_name)
    members = [module, *(m for m in vars(module).values() if getattr(m, "__module__", None) == module_name)]
    members += [m for kind in members if inspect.isclass(kind) for m in vars(kind).values()]
    for member in members:
        text = getattr(member, "__doc__", None)
        if isinstance(text, str) and text is not type(member).__doc__:  # that of an instance is its class's
            yield inspect.cleandoc(text)


def _split(text: str) -> Iterator[str]:
    """The sentences of a docstring, without examples and signatures."""
    for paragraph in re.split(r"\n\s*\n", text):
        if ">>>" not in paragraph and "->" not in paragraph:
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if re.fullmatch(r"[A-Z].*[.!?]", sentence) and len(re.findall("[a-z]+", sentence)) >= 5:
                    yield sentence


def python_documentation(seed: int) -> Sentences:
    """Sentences of the standard library's docstrings; the label is the kind of module that they document.

    A docstring's sentences are all for training or, a quarter of them, all for testing, and none occurs twice.
    """
    seen: dict[str, tuple[int, int]] = {}
    docstring = 0
    for label, modules in enumerate(TOPICS.values()):
        for name in modules.split():
            for text in _documented(name):
                docstring += 1
                for sentence in _split(text):
                    seen.setdefault(sentence, (label, docstring))
    for_test = torch.rand(docstring + 1, generator=torch.Generator().manual_seed(seed)) < 0.25
    rows = [(sentence, label, bool(for_test[number])) for sentence, (label, number) in seen.items()]
    random.Random(seed).shuffle(rows)
    return Sentences(
        "Python's documentation",
        list(TOPICS),
        [(sentence, label) for sentence, label, test in rows if not test],
        [(sentence, label) for sentence, label, test in rows if test],
    )


def read_tsv(folder: Path) -> Sentences:
    """train.tsv and dev.tsv of a folder: a sentence, a tab and a label per line; labels are integers from 0 on.

    Raises ValueError where a file is something else.
    """
    parts: dict[str, list[tuple[str, int]]] = {}
    for part in ("train", "dev"):
        path = folder / f"{part}.tsv"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} must be a text file that can be read: {error}") from error
        parts[part] = []
        for number, line in enumerate(lines, 1):
            sentence, tab, label = line.rpartition("\t")
            if not (tab and sentence.strip() and re.fullmatch("[0-9]{1,4}", label)):
                raise ValueError(f"{path}, line {number} must be a sentence, a tab and a label from 0 on, got {line!r}")
            parts[part].append((sentence, int(label)))
        if not parts[part]:
            raise ValueError(f"{path} must hold sentences, got none")
    labels, highest = 1 + max(y for _, y in parts["train"]), max(y for _, y in parts["dev"])
    if highest >= labels:
        raise ValueError(f"{folder / 'dev.tsv'}: labels must be those of train.tsv, below {labels}, got {highest}")
    return Sentences(folder.name, [str(i) for i in range(labels)], parts["train"], parts["dev"])


def train_tokenizer(sentences: list[str], words: int, length: int) -> Tokenizer:
    """WordPiece as of BERT: up to ``words`` pieces, of which a sentence gives up to ``length``; number 0 is padding."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=words, min_frequency=2, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    set_length(tokenizer, length)
    return tokenizer


def set_length(tokenizer: Tokenizer, length: int) -> None:
    """Make every sentence ``length`` tokens long: cut, or padded with token 0."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0, pad_token=tokenizer.id_to_token(0))


def encode(tokenizer: Tokenizer, sentences: list[str]) -> Tensor:
    """Token numbers int64 [N, length]."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(sentences)])


class SentenceBatches:
    """Shuffled batches of sentences of similar length, each as long as its longest, by torch's global random numbers.

    A batch is a dict of what a model of Hugging Face takes: input_ids, attention_mask and labels.
    """

    def __init__(self, tokens: Tensor, labels: Tensor, batch_size: int) -> None:
        self.tokens, self.labels, self.batch_size = tokens, labels, batch_size
        self.lengths = (tokens != 0).sum(1)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # Nearly sorted by length: a random part of some words puts the same sentences into other company each time.
        order = (self.lengths + 6 * torch.rand(len(self.lengths))).argsort().split(self.batch_size)
        for index in torch.randperm(len(order)):
            chosen = order[index]
            tokens = self.tokens[chosen, : int(self.lengths[chosen].max())]
            yield {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": self.labels[chosen]}
