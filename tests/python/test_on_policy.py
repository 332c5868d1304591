"""Completions that the student wrote itself."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")

from rarefy.distillation import OnPolicy  # noqa: E402

WORDS, EOS, PAD = 24, 1, 0


def gpt2(width: int, scale: float = 0.3, dropout: float = 0.0) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_embd=width,
            n_layer=2,
            n_head=2,
            n_positions=48,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=2,
            eos_token_id=EOS,
            pad_token_id=PAD,
            initializer_range=scale,
        )
    )


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(0)
    return gpt2(16)


def batch_of(prompts: list[list[int]], completions: list[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    rows, masks, labels = [], [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        padding = width - len(prompt) - len(completion)
        row, mask = prompt + completion, [1] * (len(prompt) + len(completion))
        label = [-100] * len(prompt) + completion
        if side == "right":
            row, mask, label = row + [PAD] * padding, mask + [0] * padding, label + [-100] * padding
        else:
            row, mask, label = [PAD] * padding + row, [0] * padding + mask, [-100] * padding + label
        rows.append(row)
        masks.append(mask)
        labels.append(label)
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(masks),
        "labels": torch.tensor(labels),
    }


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
COMPLETIONS = [[3, 4, EOS], [13, EOS], [14]]


def texts_of(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row, after a look at what every row must hold."""
    result = []
    for row, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        count = int(mask.sum())
        assert mask.tolist() == [1] * count + [0] * (len(mask) - count)  # padded at the right
        assert (row[count:] == PAD).all()
        learned = (label != -100).nonzero().flatten().tolist()
        start = learned[0]
        assert learned == list(range(start, count))
        assert torch.equal(label[learned], row[learned])
        result.append((row[:start].tolist(), row[start:count].tolist()))
    return result


@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_stay_and_completions_are_the_students(student, side):
    torch.manual_seed(3)
    batch = {**batch_of(PROMPTS, COMPLETIONS, side), "index": torch.arange(3), "position_ids": torch.zeros(3, 5)}
    before = {name: value.clone() for name, value in batch.items()}
    result = OnPolicy(student, 1.0, max_new_tokens=20)(batch)
    assert set(result) == {"input_ids", "attention_mask", "labels", "index"}
    assert all(torch.equal(before[name], value) for name, value in batch.items())
    assert all(result[name].dtype == torch.int64 for name in result)
    for (prompt, completion), expected in zip(texts_of(result), PROMPTS, strict=True):
        assert prompt == expected
        assert 1 <= len(completion) <= 20
        assert EOS not in completion[:-1]  # nothing after the end
        assert completion[-1] == EOS or len(completion) == 20
    assert result["input_ids"].shape[1] == int(result["attention_mask"].sum(1).max())  # no column that no row needs


def test_samples_follow_the_students_distribution(student):
    """The first sampled word has the probabilities that the student gives it after the prompt, whatever the padding."""
    student.eval()
    count = 2000
    on_policy = OnPolicy(student, 1.0, max_new_tokens=1, temperature=0.7)
    batch = batch_of([[5, 6, 7], [8, 9, 10, 11, 12, 13]] * count, [[3], [3]] * count)
    torch.manual_seed(0)
    words = torch.tensor([completion[0] for _, completion in texts_of(on_policy(batch))]).view(count, 2)
    for column, prompt in enumerate(([5, 6, 7], [8, 9, 10, 11, 12, 13])):
        with torch.no_grad():
            expected = F.softmax(student(torch.tensor([prompt])).logits[0, -1] / 0.7, -1)
        seen = torch.bincount(words[:, column], minlength=WORDS) / count
        assert (seen - expected).abs().sum() < 0.2
        assert (expected - 1 / WORDS).abs().sum() > 0.4  # not what any sampling would give


def test_prompts_of_their_own(student):
    batch = {
        **batch_of(PROMPTS, COMPLETIONS),
        "prompts": torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, 10]]),
        "prompts_attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    on_policy = OnPolicy(student, 1.0, max_new_tokens=4, prompt_key="prompts")
    assert [prompt for prompt, _ in texts_of(on_policy(batch))] == [[5, 6], [7, 8, 9, 10]]
    del batch["prompts_attention_mask"]  # all but the padding
    assert [prompt for prompt, _ in texts_of(on_policy(batch))] == [[5, 6], [7, 8, 9, 10]]


def test_a_row_without_labels_is_a_prompt(student):
    batch = batch_of([[5, 6], [7]], [[], [8]])
    result = OnPolicy(student, 1.0, max_new_tokens=3)(batch)
    assert [prompt for prompt, _ in texts_of(result)] == [[5, 6], [7]]


def test_fraction_and_torchs_random_numbers(student):
    batch = batch_of(PROMPTS, COMPLETIONS)

    def run(on_policy):
        return [on_policy(batch) for _ in range(60)]

    torch.manual_seed(0)
    on_policy = OnPolicy(student, 0.3, max_new_tokens=2)
    first = run(on_policy)
    replaced = sum(result is not batch for result in first)
    assert 8 <= replaced <= 30  # 18 expected
    torch.manual_seed(0)
    state = torch.get_rng_state()
    second = run(on_policy)
    torch.set_rng_state(state)
    again = run(on_policy)
    for a, b in zip(second, again, strict=True):
        assert (a is batch) == (b is batch)
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(result is batch for result in run(OnPolicy(student, 0.0)))
    assert all(result is not batch for result in run(OnPolicy(student, 1.0, max_new_tokens=1)))


def test_modes_and_gradients_are_left_alone():
    torch.manual_seed(0)
    student = gpt2(16, dropout=0.5).train()
    student.transformer.h[0].eval()
    modes = [m.training for m in student.modules()]
    seen = set()
    student.transformer.register_forward_pre_hook(
        lambda module, _: seen.add((any(m.training for m in module.modules()), torch.is_grad_enabled()))
    )
    OnPolicy(student, 1.0, max_new_tokens=3)(batch_of(PROMPTS, COMPLETIONS))
    assert seen == {(False, False)}
    assert [m.training for m in student.modules()] == modes
    student.generate = types.MethodType(lambda self, **options: 1 / 0, student)
    with pytest.raises(ZeroDivisionError):
        OnPolicy(student, 1.0)(batch_of(PROMPTS, COMPLETIONS))
    assert [m.training for m in student.modules()] == modes


def test_wrapped_students(student, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(student)
        result = OnPolicy(wrapped, 1.0, max_new_tokens=2)(batch_of(PROMPTS, COMPLETIONS))
        assert [prompt for prompt, _ in texts_of(result)] == PROMPTS
    finally:
        torch.distributed.destroy_process_group()


def divergence(student: nn.Module, teacher: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """KL(student || teacher) at the labelled positions."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    valid = batch["labels"][:, 1:] != -100
    s = F.log_softmax(student(**inputs).logits[:, :-1][valid], -1)
    with torch.no_grad():
        t = F.log_softmax(teacher(**inputs).logits[:, :-1][valid], -1)
    return (s.exp() * (s - t)).sum(-1).mean()


def test_reverse_kl_on_the_students_own_texts_brings_it_to_its_teacher():
    torch.manual_seed(0)
    teacher, student = gpt2(24, 0.2).eval(), gpt2(16, 0.2)
    batch = batch_of([[w, w + 1] for w in range(4, 20)], [[3]] * 16)
    on_policy = OnPolicy(student, 1.0, max_new_tokens=8)

    def measure():
        torch.manual_seed(7)
        with torch.no_grad():
            return sum(divergence(student.eval(), teacher, on_policy(batch)).item() for _ in range(4)) / 4

    before = measure()
    optimizer = torch.optim.Adam(student.parameters(), 5e-3)
    for _ in range(60):
        loss = divergence(student.train(), teacher, on_policy(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = measure()
    assert before > 0.05
    assert after < 0.4 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.5}, r"fraction must be in \[0, 1\], got 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"top_p": 0.0}, r"top_k must be 0 or more and top_p in \(0, 1\], got 0 and 0.0"),
    ],
)
def test_options_are_checked(student, options, message):
    with pytest.raises(ValueError, match=r"\[OnPolicy\] " + message):
        OnPolicy(student, **options)


def test_what_is_wrong_is_said(student):
    on_policy = OnPolicy(student, 1.0, max_new_tokens=2)
    assert repr(on_policy) == "OnPolicy(GPT2LMHeadModel, fraction=1, max_new_tokens=2, temperature=1)"
    good = batch_of(PROMPTS, COMPLETIONS)
    with pytest.raises(TypeError, match=r"\[OnPolicy\] student must have a method generate, got Linear"):
        OnPolicy(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="student must continue its prompts, got an encoder-decoder model"):
        OnPolicy(
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=WORDS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            )
        )
    with pytest.raises(TypeError, match="a batch must be a dict, got Tensor"):
        on_policy(good["input_ids"])
    with pytest.raises(KeyError, match="labels tell where a prompt ends"):
        on_policy({"input_ids": good["input_ids"]})
    with pytest.raises(KeyError, match="a batch must have its prompts under 'input_ids', got the keys"):
        on_policy({"labels": good["labels"]})
    with pytest.raises(ValueError, match=r"prompts must be int64 \[batch, length\], got torch.float32 \[3, 6\]"):
        on_policy({**good, "input_ids": good["input_ids"].float()})
    with pytest.raises(ValueError, match="every row must have a prompt before its first label, got none in row 1"):
        on_policy(batch_of([[5, 6], []], [[3], [4]]))
    student.config.pad_token_id = student.generation_config.pad_token_id = None
    student.config.eos_token_id = student.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="pad_token_id must be given where the student's configuration has none"):
        OnPolicy(student)
