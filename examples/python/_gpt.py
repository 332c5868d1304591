"""A small language model of characters, and text for it: sentences of Python's documentation, or of files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from _sentences import python_documentation, read_tsv
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm


@dataclass(frozen=True)
class Text:
    """Characters as numbers, int64, to train and to test; number 0 is a character that is rare."""

    name: str
    alphabet: str
    train: Tensor
    test: Tensor


def load_text(data: Path | None, seed: int) -> Text:
    """Sentences of a folder with train.tsv and dev.tsv, or of the standard library's docstrings, one per line."""
    sentences = python_documentation(seed) if data is None else read_tsv(data)
    train, test = ("\n".join(sentence for sentence, _ in part) for part in (sentences.train, sentences.test))
    common = [character for character, count in Counter(train).items() if count >= 20]
    alphabet = "\0" + "".join(sorted(common))
    numbers = {character: i for i, character in enumerate(alphabet)}
    encoded = [torch.tensor([numbers.get(character, 0) for character in text]) for text in (train, test)]
    return Text(sentences.name, alphabet, *encoded)


class Block(nn.Module):
    """Attention over what came before, then two linear layers, both with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Logits of the next character at every place: [batch, length] to [batch, length, characters]."""

    def __init__(self, characters: int, length: int = 128, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.length = length
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.characters(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def windows(text: Tensor, length: int, batch: int, generator: torch.Generator) -> Tensor:
    """[batch, length + 1] characters from random places."""
    starts = torch.randint(len(text) - length, (batch,), generator=generator)
    return text[starts[:, None] + torch.arange(length + 1)]


def calibration(text: Text, length: int, batches: int, batch: int, seed: int) -> list[Tensor]:
    """Windows of the training text, as a model takes them."""
    generator = torch.Generator().manual_seed(seed)
    return [windows(text.train, length, batch, generator)[:, :-1] for _ in range(batches)]


def train(model: Gpt, text: Text, steps: int, batch: int, rate: float, seed: int, title: str) -> None:
    """AdamW with a learning rate that rises to ``rate`` and falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    bar = tqdm(range(steps), desc=title, unit="batch")
    for _ in bar:
        tokens = windows(text.train, model.length, batch, generator)
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    model.eval()


def _rows(text: Tensor, length: int) -> Iterator[Tensor]:
    count = (len(text) - 1) // length
    inputs = text[: count * length].view(count, length)
    targets = text[1 : count * length + 1].view(count, length)
    for begin in range(0, count, 32):
        yield torch.stack([inputs[begin : begin + 32], targets[begin : begin + 32]])


@torch.no_grad()
def perplexity(model: Gpt, text: Tensor) -> float:
    """exp of the mean loss per character, over windows that do not overlap."""
    loss, count = 0.0, 0
    for inputs, targets in _rows(text, model.length):
        logits = model(inputs)
        loss += functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return math.exp(loss / count)


@torch.no_grad()
def continued(model: Gpt, text: Text, prompt: str, characters: int, generator: torch.Generator) -> str:
    """What the model writes after a prompt, drawn at temperature 0.7."""
    tokens = torch.tensor([[max(text.alphabet.find(c), 0) for c in prompt]])
    for _ in range(characters):
        logits = model(tokens[:, -model.length :])[0, -1] / 0.7
        drawn = torch.multinomial(logits.softmax(0), 1, generator=generator)
        tokens = torch.cat([tokens, drawn[None]], 1)
    return "".join(text.alphabet[i] for i in tokens[0])
