"""Rarefy: quantization, pruning and distillation for PyTorch, with one C++ core.

>>> import rarefy as rf
>>> rf.show_config()
"""

from pathlib import Path as _Path

import torch as _torch

from rarefy import _build_info


def _check_torch() -> None:
    running = str(_torch.__version__)
    if running != _build_info.torch_version:
        raise ImportError(
            f"[rarefy] was compiled against torch {_build_info.torch_version}, but torch {running} is installed. "
            "C++ extensions work with the torch they were built for only: reinstall rarefy beside this torch "
            "(pip install --no-build-isolation --force-reinstall --no-deps rarefy), or install "
            f"torch=={_build_info.torch_version}."
        )


_check_torch()

from rarefy import _core  # noqa: E402  (after the check, so that a mismatch is said instead of an undefined symbol)

__version__: str = _build_info.version

#: Prefix for a C++ user of this installation: cmake -DCMAKE_PREFIX_PATH="$(python -c 'import rarefy; ...')".
cmake_prefix_path: str = str(_Path(_core.__file__).parent)


def show_config() -> None:
    """Print versions, compiler, instruction sets and CUDA."""
    cuda = f"available ({_torch.cuda.get_device_name()})" if _torch.cuda.is_available() else "not available"
    print(f"{_core.show_config()}running torch: {_torch.__version__}\nGPU: {cuda}\nCMake prefix: {cmake_prefix_path}")


from rarefy import distillation, graph, pruning, quantization  # noqa: E402

# isort: split
from rarefy import export, nn  # noqa: E402  (nn's layers are built on quantization's fake quantizers)

__all__ = [
    "__version__",
    "cmake_prefix_path",
    "distillation",
    "export",
    "graph",
    "nn",
    "pruning",
    "quantization",
    "show_config",
]
