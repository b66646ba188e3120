"""Several tensors as one message."""

from collections.abc import Sequence

import torch


def flat_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the elements of at least one tensor, one after another; all have the same type."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflattened(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Invert `flat_of`, with the shapes of `like`."""
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
