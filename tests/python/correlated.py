"""A linear layer and inputs with correlated features of unequal size, as those of trained networks are."""

import torch


def correlated_layer(
    rows: int = 512,
    features: int = 1024,
    samples: int = 4096,
    *,
    spread: float = 0.72,
    rank: int = 340,
    noise: float = 0.465,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, features], standard normal, and inputs [samples, features]:

        x = scale * (sqrt(1 - noise^2) * A z + noise * e),  log(scale) the quantiles of a normal with deviation `spread`,

    A [features, rank] with elements of variance 1 / rank, z and e standard normal. So features have a low-rank part in
    common, some of their own, and log-normal sizes.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight = normal(rows, features)
    quantiles = (torch.arange(features, dtype=torch.float64) + 0.5) / features
    scale = torch.exp(spread * torch.special.ndtri(quantiles))[torch.randperm(features, generator=generator)]
    mixing = normal(rank, features) / rank**0.5
    inputs = ((1 - noise**2) ** 0.5 * normal(samples, rank) @ mixing + noise * normal(samples, features)) * scale
    return weight.to(dtype), inputs.to(dtype)
