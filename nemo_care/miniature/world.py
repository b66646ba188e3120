"""The miniature's world: videos of a moving shape, questions about them, and their reasonings.

A shape of 10 pixels moves left, right, up or down through 8 frames of 28x28 pixels at 1 or 2 pixels
per frame. The question asks which way it moves, or (level 3) which way it came from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_care.miniature.vocabulary import DIRECTIONS, LETTERS, OPPOSITE, SHAPES

FRAMES = 8
SIDE = 28
SHAPE_SIDE = 10
SPEEDS = (1, 2)
NOISE = 0.05
FRAMES_PER_SECOND = 2
# One merged patch per pair of frames.
GRID = (FRAMES // 2, SIDE // 14, SIDE // 14)
SECONDS_PER_GRID = 2 / FRAMES_PER_SECOND

LEVELS = ("L1", "L2", "L3")
TEMPLATES = 3

_COLOURS = torch.tensor(
    [
        [1, 0.1, 0.1],
        [0.1, 1, 0.1],
        [0.2, 0.2, 1],
        [1, 1, 0.1],
        [0.9, 0.2, 0.9],
        [0.9, 0.9, 0.9],
    ]
)
_UNSEEN_COLOURS = torch.tensor(
    [
        [0.1, 0.9, 0.9],
        [1, 0.55, 0.1],
        [0.6, 0.3, 0.1],
        [0.5, 1, 0.6],
        [1, 0.6, 0.8],
        [0.55, 0.55, 0.55],
    ]
)
_BACKGROUNDS = torch.tensor([[0, 0, 0], [0.1, 0.1, 0.1], [0, 0, 0.2], [0.15, 0.05, 0.05]])
_UNSEEN_BACKGROUNDS = torch.tensor(
    [[0.2, 0.2, 0.05], [0.0, 0.25, 0.15], [0.25, 0.15, 0.3], [0.05, 0.15, 0.3]]
)


def _shape_masks() -> Tensor:
    """Return the mask of each of SHAPES in its box: [4, SHAPE_SIDE, SHAPE_SIDE] of 0 and 1."""
    centred = torch.arange(SHAPE_SIDE) + 0.5 - SHAPE_SIDE / 2
    radius = centred[:, None] ** 2 + centred[None] ** 2
    thin = centred.abs() < SHAPE_SIDE * 0.17
    masks = {
        "square": torch.ones(SHAPE_SIDE, SHAPE_SIDE),
        "disc": radius <= (SHAPE_SIDE / 2) ** 2 * 0.95,
        "cross": thin[:, None] | thin[None],
        "bar": (centred.abs() < SHAPE_SIDE * 0.25).expand(SHAPE_SIDE, -1),
    }
    return torch.stack([masks[shape].float() for shape in SHAPES])


_MASKS = _shape_masks()


@dataclass(frozen=True)
class Scenes:
    """Drawn videos: `frames` uint8 [N, T, SIDE, SIDE, 3], and their properties, [N] each.

    `direction` and `shape` are indices into DIRECTIONS and SHAPES, `speed` is in pixels per frame.
    """

    frames: Tensor
    direction: Tensor
    shape: Tensor
    speed: Tensor


def draw_scenes(count: int, generator: torch.Generator, *, unseen: bool = False) -> Scenes:
    """Draw `count` random videos; `unseen` uses the colours and backgrounds of levels 2 and 3."""

    def choose(options: int) -> Tensor:
        return torch.randint(options, (count,), generator=generator)

    colours = _UNSEEN_COLOURS if unseen else _COLOURS
    backgrounds = _UNSEEN_BACKGROUNDS if unseen else _BACKGROUNDS
    direction, shape = choose(len(DIRECTIONS)), choose(len(SHAPES))
    speed = torch.tensor(SPEEDS)[choose(len(SPEEDS))]
    colour, background = colours[choose(len(colours))], backgrounds[choose(len(backgrounds))]

    # In the direction of its motion, the shape's whole path is inside the frame.
    path = speed * (FRAMES - 1)
    room = SIDE - SHAPE_SIDE - path + 1
    along = (torch.rand(count, generator=generator) * room).long()
    across = choose(SIDE - SHAPE_SIDE + 1)[:, None].expand(-1, FRAMES)
    step = speed[:, None] * torch.arange(FRAMES)
    rising, falling = along[:, None] + step, (along + path)[:, None] - step
    is_direction = {name: (direction == i)[:, None] for i, name in enumerate(DIRECTIONS)}
    x = torch.where(is_direction["right"], rising, across)
    x = torch.where(is_direction["left"], falling, x)
    y = torch.where(is_direction["down"], rising, across)
    y = torch.where(is_direction["up"], falling, y)

    covered = _cover(shape, x, y)[..., None]
    picture = torch.lerp(
        background[:, None, None, None], colour[:, None, None, None], covered
    )  # [N, T, SIDE, SIDE, 3]
    picture += NOISE * torch.randn(picture.shape, generator=generator)
    frames = picture.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
    return Scenes(frames, direction, shape, speed)


def _cover(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the pixels of shapes [N] whose upper left corners are at x, y [N, T]: [N, T, S, S]."""
    pixels = torch.arange(SIDE)
    row, column = pixels - y[..., None], pixels - x[..., None]  # [N, T, SIDE], in the shape's box
    row_inside = (row >= 0) & (row < SHAPE_SIDE)
    column_inside = (column >= 0) & (column < SHAPE_SIDE)
    masks = _MASKS[
        shape[:, None, None, None],
        row.clamp(0, SHAPE_SIDE - 1)[..., :, None],
        column.clamp(0, SHAPE_SIDE - 1)[..., None, :],
    ]
    return masks * (row_inside[..., :, None] & column_inside[..., None, :])


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about one video; a reverse one asks where the shape came from.

    `direction` is the way the shape moves, `order` the option texts of the letters A to D.
    """

    shape: str
    direction: str
    order: tuple[str, ...]
    reverse: bool = False

    @property
    def text(self) -> str:
        """The question with its options, as words separated by spaces."""
        verb, end = ("did", "come from") if self.reverse else ("does", "move ?")
        options = " ".join(f"{letter} {text}" for letter, text in self.options.items())
        return f"which way {verb} the {self.shape} {end} {options}"

    @property
    def options(self) -> dict[str, str]:
        """Map option letters to option texts."""
        return dict(zip(LETTERS, self.order, strict=True))

    @property
    def solution(self) -> str:
        """The letter of the correct answer."""
        return self.implied_letter(self.direction)

    def implied_letter(self, claimed: str) -> str:
        """Return the letter implied by a reasoning that the shape moves `claimed`."""
        answer = OPPOSITE[claimed] if self.reverse else claimed
        return LETTERS[self.order.index(answer)]

    def reasoning(self, claimed: str, template: int) -> str:
        """Return a reasoning from "the shape moves `claimed`", in template 0 to TEMPLATES - 1.

        The last direction word is the text of the implied answer; no letter is named.
        """
        origin = OPPOSITE[claimed]
        if self.reverse:
            end = f"so it came from the {origin}"
            return (
                f"i see the {self.shape} . it moves {claimed} {end}",
                f"in the first frames the {self.shape} goes {claimed} {end}",
                f"the {self.shape} starts at the {origin} and ends at the {claimed} {end}",
            )[template]
        end = f"so it moves {claimed}"
        return (
            f"i see the {self.shape} . it moves {claimed}",
            f"in the first frames the {self.shape} goes {claimed} {end}",
            f"the {self.shape} starts at the {origin} and ends at the {claimed} {end}",
        )[template]


def ask(scenes: Scenes, generator: torch.Generator, *, reverse: Tensor | bool) -> list[Question]:
    """Ask one question per scene, its options shuffled; `reverse` is one flag or bool [N]."""
    count = len(scenes.direction)
    orders = torch.rand(count, len(DIRECTIONS), generator=generator).argsort(dim=1).tolist()
    flags = [reverse] * count if isinstance(reverse, bool) else reverse.tolist()
    return [
        Question(SHAPES[shape], DIRECTIONS[way], tuple(DIRECTIONS[i] for i in order), flag)
        for shape, way, order, flag in zip(
            scenes.shape.tolist(), scenes.direction.tolist(), orders, flags, strict=True
        )
    ]


def draw_level(level: str, count: int, generator: torch.Generator) -> tuple[Scenes, list[Question]]:
    """Draw scenes and questions of a level.

    L1 is the training distribution, L2 has unseen colours and backgrounds, L3 also asks the
    reverse question. Raises ValueError on any other level.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r}: must be one of {', '.join(LEVELS)}")
    scenes = draw_scenes(count, generator, unseen=level != "L1")
    return scenes, ask(scenes, generator, reverse=level == "L3")


def draw_wrong_directions(questions: list[Question], generator: torch.Generator) -> list[str]:
    """Draw for each question one of the three directions in which the shape does not move."""
    shifts = torch.randint(1, len(DIRECTIONS), (len(questions),), generator=generator).tolist()
    return [
        DIRECTIONS[(DIRECTIONS.index(question.direction) + shift) % len(DIRECTIONS)]
        for question, shift in zip(questions, shifts, strict=True)
    ]
