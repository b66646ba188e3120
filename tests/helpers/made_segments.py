"""An artificial packed sequence, for tests of attention."""

import torch

from nemo_care.models.segments import Segment

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
# Two groups with prompts of 7 and 5 tokens and completions of unequal length; in the second group,
# a branch after the first three tokens of its first completion; three tokens of padding.
SEGMENTS = (
    Segment(0, 7),
    Segment(7, 11, ((0, 7),)),
    Segment(11, 60, ((0, 7),)),
    Segment(60, 61, ((0, 7),)),
    Segment(61, 66),
    Segment(66, 72, ((61, 66),)),
    Segment(72, 75, ((61, 66),)),
    Segment(75, 77, ((61, 66), (66, 69))),
)
LENGTH = 80


def made_inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(LENGTH, 1, heads, WIDTH, generator=generator, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def gradients(out, inputs) -> list[torch.Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((out * weight).sum(), inputs))
