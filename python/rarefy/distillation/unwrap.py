"""The module that others wrap: DistributedDataParallel, DataParallel, torch.compile, EMATeacher."""

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside of DistributedDataParallel, DataParallel, torch.compile and EMATeacher, in any order."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(getattr(model, "averaged_module", None), nn.Module):  # an EMATeacher
            model = model.averaged_module
        else:
            return model
