"""The module that others wrap: DistributedDataParallel, DataParallel, torch.compile."""

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside of DistributedDataParallel, DataParallel and torch.compile, in any order."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model
