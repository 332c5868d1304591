"""What every test file shares: devices, instruction sets and the seed."""

import os
from collections.abc import Iterator

import pytest
import torch

from rarefy import _core

# Torch seeds itself from the system's randomness: a test would draw other numbers in every run. RAREFY_TEST_SEED=N tries
# others.
SEED = int(os.environ.get("RAREFY_TEST_SEED", "0"))
torch.manual_seed(SEED)  # what files draw while they are imported


def pytest_runtest_setup() -> None:
    torch.manual_seed(SEED)


@pytest.fixture
def cuda() -> torch.device:
    """The first GPU. Without one the test is skipped, or fails when FAIL_WITHOUT_CUDA=1 says that there must be one."""
    if torch.cuda.is_available() and _core.has_cuda_kernels():
        return torch.device("cuda", 0)
    reason = (
        f"needs a GPU and CUDA kernels (torch.cuda: {torch.cuda.is_available()}, rarefy: {_core.has_cuda_kernels()})"
    )
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that kernels exist for: one test, parametrised."""
    return request.getfixturevalue("cuda") if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def restore_instruction_set() -> Iterator[None]:
    """Puts the instruction set back that was in use before the test."""
    before = _core.instruction_set()
    yield
    _core.set_instruction_set(before)


def available_instruction_sets() -> list[str]:
    """The instruction sets that this processor runs, plain first."""
    before = _core.instruction_set()
    names = []
    for name in ("plain", "avx2", "avx512"):
        try:
            _core.set_instruction_set(name)
        except ValueError:
            continue
        names.append(name)
    _core.set_instruction_set(before)
    return names
