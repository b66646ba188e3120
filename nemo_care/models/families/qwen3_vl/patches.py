"""Frames as patches: Qwen2.5-VL's, of another size and normalised around grey."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nemo_care.models.families.patches import PatchSize

GREY = torch.full((1, 3, 1, 1), 0.5)


@dataclass(frozen=True)
class Qwen3PatchSize(PatchSize):
    """As `PatchSize`; the pixel bounds are those of a frame, also for videos."""

    mean: ClassVar[Tensor] = GREY
    std: ClassVar[Tensor] = GREY

    side: int = 16
