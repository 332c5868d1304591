"""Batches whose completions the student wrote itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.distillation.modes import evaluating
from rarefy.distillation.unwrap import unwrap

_REMADE = ("position_ids", "token_type_ids", "shift_labels")


class OnPolicy:
    """Replace the completions of a batch by samples of the student, for some of the batches.

    A student that learns on given texts alone sees in use what it never saw in training: its own beginnings. Trained on
    its own samples, with the reverse KL or the Jensen-Shannon divergence to its teacher, it does not (GKD, Agarwal et al.,
    2023, arXiv:2306.13649; MiniLLM, Gu et al., 2023, arXiv:2306.08543). No gradient flows through the sampling.

    Args:
        student: a decoder-only language model with transformers' ``generate``, also in DistributedDataParallel or from
            torch.compile.
        fraction: the probability with which a batch is replaced, in [0, 1]; one draw of torch's random numbers per batch.
        max_new_tokens: the length of a completion at most.
        temperature: of the sampling, positive.
        top_k, top_p: sample among the top_k most likely words (0: all), and among the likeliest with a probability of
            top_p together.
        prompt_key: where a batch has its prompts. ``"input_ids"``: each row's tokens before its first label; rows
            without labels are prompts as a whole. Another key names int64 prompts [batch, length] of their own.
        mask_key: the mask of the prompts, 1 for a token; without such an entry all tokens other than padding are
            prompt. Default: "attention_mask" for ``"input_ids"``, else ``"<prompt_key>_attention_mask"``.
        label_key, ignore_index: where the labels are, and the label of positions that do not count.
        pad_token_id, eos_token_id: of padding and ends of text (one or several); default: the student's configuration.

    Called with a dict, it returns a dict: the same object where the batch is not replaced, else a copy in which
    ``input_ids`` [batch, length] are prompt and sample, padded at the right; ``attention_mask`` is 1 on both;
    ``label_key`` holds the sample, up to and with the first end of text, and ``ignore_index`` elsewhere.
    ``position_ids``, ``token_type_ids`` and ``shift_labels`` are left out: they belonged to the old text.

    The student generates in evaluation mode; every submodule's mode is then put back. Samples come from torch's random
    numbers, so that a checkpoint that restores these resumes exactly.

    Raises:
        ValueError, TypeError, KeyError: an argument or a batch breaks its rule.

    >>> on_policy = OnPolicy(student, fraction=0.5, max_new_tokens=64)
    >>> loss_fn = DistillationLoss(1.0, 1.0, divergence="reverse_kl", shift=True)
    >>> for batch in loader:
    ...     batch = on_policy(batch)
    """

    def __init__(
        self,
        student: nn.Module,
        fraction: float = 0.5,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prompt_key: str = "input_ids",
        mask_key: str | None = None,
        label_key: str = "labels",
        ignore_index: int = -100,
        pad_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        if not callable(getattr(unwrap(student), "generate", None)):
            raise TypeError(f"[OnPolicy] student must have a method generate, got {type(unwrap(student)).__name__}")
        if getattr(getattr(unwrap(student), "config", None), "is_encoder_decoder", False):
            raise ValueError("[OnPolicy] student must continue its prompts, got an encoder-decoder model")
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"[OnPolicy] fraction must be in [0, 1], got {fraction}")
        if max_new_tokens < 1:
            raise ValueError(f"[OnPolicy] max_new_tokens must be at least 1, got {max_new_tokens}")
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"[OnPolicy] temperature must be positive and finite, got {temperature}")
        if top_k < 0 or not 0.0 < top_p <= 1.0:
            raise ValueError(f"[OnPolicy] top_k must be 0 or more and top_p in (0, 1], got {top_k} and {top_p}")
        self.student = student
        self.fraction = fraction
        self.prompt_key = prompt_key
        self.mask_key = mask_key or ("attention_mask" if prompt_key == "input_ids" else f"{prompt_key}_attention_mask")
        self.label_key = label_key
        self.ignore_index = ignore_index
        self.eos_token_ids = _token_ids(student, "eos_token_id", eos_token_id)
        pad = _token_ids(student, "pad_token_id", pad_token_id) or self.eos_token_ids
        if not pad:
            raise ValueError(
                "[OnPolicy] pad_token_id must be given where the student's configuration has none, got None"
            )
        self.pad_token_id = pad[0]
        self._options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "do_sample": True,
            "num_beams": 1,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": self.eos_token_ids or None,
        }

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch, with probability `fraction` with completions of the student."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"[OnPolicy] a batch must be a dict, got {type(batch).__name__}")
        if torch.rand(()).item() >= self.fraction:
            return batch
        return self.sample(batch)

    def sample(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of the batch with completions of the student."""
        prompts, mask = self._prompts(batch)
        lengths = mask.sum(1)
        if not bool((lengths > 0).all()):
            raise ValueError(
                "[OnPolicy] every row must have a prompt before its first label, got none in row "
                f"{int((lengths == 0).nonzero()[0])}"
            )
        # Samples grow at the right, so that prompts end there.
        prompts, mask = _pack(prompts, mask, self.pad_token_id, left=False)
        student = unwrap(self.student)
        with torch.no_grad(), evaluating(student):
            tokens = student.generate(input_ids=prompts, attention_mask=mask.long(), **self._options)
        completion = tokens[:, prompts.shape[1] :]
        ends = torch.zeros_like(completion, dtype=torch.bool)
        for token in self.eos_token_ids:
            ends |= completion == token
        written = ends.cumsum(1) - ends.long() == 0  # up to and with the first end
        labels = torch.where(written, completion, self.ignore_index)
        labels = torch.cat([torch.full_like(prompts, self.ignore_index), labels], 1)
        valid = torch.cat([mask, written], 1)
        # And whole texts begin at the left, where models without position_ids count from.
        input_ids, attention_mask = _pack(tokens, valid, self.pad_token_id, left=True)
        labels, _ = _pack(labels, valid, self.ignore_index, left=True)
        kept = {name: value for name, value in batch.items() if name not in _REMADE}
        return {**kept, "input_ids": input_ids, "attention_mask": attention_mask.long(), self.label_key: labels}

    def _prompts(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if self.prompt_key not in batch:
            raise KeyError(
                f"[OnPolicy] a batch must have its prompts under {self.prompt_key!r}, got the keys {sorted(batch)}"
            )
        prompts = batch[self.prompt_key]
        if prompts.dim() != 2 or prompts.dtype != torch.int64:
            raise ValueError(
                f"[OnPolicy] prompts must be int64 [batch, length], got {prompts.dtype} {list(prompts.shape)}"
            )
        mask = batch.get(self.mask_key)
        mask = prompts != self.pad_token_id if mask is None else mask.bool()
        if self.prompt_key == "input_ids":
            if self.label_key not in batch:
                raise KeyError(
                    f"[OnPolicy] labels tell where a prompt ends: a batch must have them under {self.label_key!r}, got the "
                    f"keys {sorted(batch)} (or name prompts of their own by prompt_key)"
                )
            mask = mask & ((batch[self.label_key] != self.ignore_index).cumsum(1) == 0)
        return prompts, mask

    def __repr__(self) -> str:
        return (
            f"OnPolicy({type(unwrap(self.student)).__name__}, fraction={self.fraction:g}, "
            f"max_new_tokens={self._options['max_new_tokens']}, temperature={self._options['temperature']:g})"
        )


def _pack(values: Tensor, valid: Tensor, fill: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Move the valid values of each row to one side, in order, and cut columns that no row needs."""
    key = valid.long()
    order = torch.argsort(-key if left else key, dim=1, stable=True)
    values = torch.where(valid, values, fill).gather(1, order)
    valid = valid.gather(1, order)
    width = int(valid.sum(1).max())
    part = slice(0, width) if left else slice(values.shape[1] - width, None)
    return values[:, part].contiguous(), valid[:, part].contiguous()


def _token_ids(student: nn.Module, name: str, given: int | Sequence[int] | None) -> list[int]:
    student = unwrap(student)
    sources = (getattr(student, "generation_config", None), getattr(student, "config", None))
    for value in (given, *(getattr(source, name, None) for source in sources)):
        if value is not None:
            return [int(v) for v in ([value] if isinstance(value, int) else value)]
    return []
