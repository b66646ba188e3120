"""A sample becomes a prompt: chat template, decoded frames, positions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from nemo_care.data.media import Media, MediaRequest, MediaSettings, load_media
from nemo_care.data.prompt_format import PromptFormat
from nemo_care.data.samples import Sample, Skipped
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.errors import InputError
from nemo_care.recipe.data import DataConfig

# Our own wording; a recipe replaces it with data.prompt_template.
DEFAULT_TEMPLATE = (
    "{question}\n{options}\n"
    "Think aloud first: write down, step by step, what you observe and how it leads you to an "
    "answer, inside <think> </think>. Then give only the final answer inside <answer> </answer>. "
    "{answer_hint}"
)
ANSWER_HINTS = {
    "multiple choice": "The answer is a single option letter, such as <answer>A</answer>.",
    "numerical": "The answer is a number, such as <answer>3.14</answer>.",
    "OCR": "The answer is the transcribed text.",
    "free-form": "The answer is a short free text.",
    "regression": "The answer is a number, such as <answer>42</answer>.",
    "quantity": "The answer is a number with its unit, such as <answer>12 cm</answer>.",
    "math": r"The answer is a mathematical expression, such as <answer>\frac{1}{2}</answer>.",
}


class PromptTooLong(InputError):
    """A prompt with more tokens than data.max_prompt_tokens."""

    def __init__(self, message: str, tokens: int = 0) -> None:
        """`tokens`: how many it has. (Unpickling passes the message alone, and sets them after.)"""
        super().__init__(message)
        self.tokens = tokens


@dataclass
class Prompt:
    """One prompt of P tokens, ready for the model.

    `index` is the prompt's place in the training stream or the validation file: the seed of its
    sampling, whichever rank it lands on. `token_ids` is [P], `position_ids` [3, P], `is_vision`
    bool [P] (True at the tokens that stand for a vision feature), `frames` uint8
    [count, H, W, 3] each and `grid_thw` [items, 3] (None for a text-only prompt) are those of its
    videos and images, in order of appearance. Frames are on the leader of a model replica only;
    other ranks know their shapes (see `without_frames`). `seconds_per_grid` has the seconds that
    one grid step of each item covers, 0.0 for an image. `vision_states` are what a frozen vision
    tower has made of the frames, kept where they were computed (see
    `VideoLanguageModel.frozen_vision`). `videos_by_pyav`, `frame_times` and
    `prompt_times` are as in `Media`.
    """

    index: int
    sample: Sample
    token_ids: torch.Tensor
    position_ids: torch.Tensor
    is_vision: torch.Tensor
    frames: tuple[torch.Tensor, ...]
    grid_thw: torch.Tensor | None
    seconds_per_grid: tuple[float, ...] = ()
    videos_by_pyav: int = 0
    frame_times: tuple[tuple[float, ...], ...] = ()
    prompt_times: tuple[tuple[float, ...], ...] = ()
    vision_states: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def length(self) -> int:
        """P, tokens of the prompt."""
        return len(self.token_ids)

    @property
    def frame_bytes(self) -> int:
        """Bytes of the frames that are in this process."""
        return sum(frames.nbytes for frames in self.frames if not frames.is_meta)

    def without_frames(self) -> "Prompt":
        """The same prompt for ranks that need no pixels: its frames are on `meta`."""
        frames = tuple(frames.to("meta") for frames in self.frames)
        return replace(self, frames=frames, vision_states=None)

    def continued_positions(self, count: int) -> torch.Tensor:
        """Positions [3, count] of the completion's tokens: text goes on after the prompt."""
        first = int(self.position_ids.max()) + 1
        return torch.arange(first, first + count).expand(3, -1)


def without_frames(items: Sequence[Prompt | Skipped]) -> list[Prompt | Skipped]:
    """What a loader made, for ranks that need no pixels."""
    return [item.without_frames() if isinstance(item, Prompt) else item for item in items]


@dataclass(frozen=True)
class Draft:
    """A prompt whose videos and images have not been read: `token_ids` holds one token for each.

    `request` names them. `problem` says why the text can't become a prompt, whatever they hold.
    """

    index: int
    sample: Sample
    token_ids: list[int]
    request: MediaRequest
    problem: str | None = None


class PromptBuilder:
    """Makes prompts for one model."""

    def __init__(
        self, config: DataConfig, prompt_format: PromptFormat, tokenizer: ChatTokenizer
    ) -> None:
        """`config` has a template that check_data accepts, `prompt_format` is the model's."""
        self.max_tokens = config.max_prompt_tokens
        self.format = prompt_format
        self.tokenizer = tokenizer
        self.template = config.prompt_template or DEFAULT_TEMPLATE
        self.media = MediaSettings.of(config, prompt_format.patching)

    def build(self, index: int, sample: Sample) -> Prompt:
        """Tokenise and decode, here and now.

        Raises:
            UnreadableMedia: a video or image can't be decoded.
            PromptTooLong: more tokens than data.max_prompt_tokens; nothing is ever cut.
            InputError: the text holds a control token that can't be written as text.
        """
        draft = self.draft(index, sample)
        return self.finish(draft, load_media(draft.request))

    def draft(self, index: int, sample: Sample) -> Draft:
        """Return the text, and the request for the media that finish the prompt."""
        token_ids, problem = [], None
        try:
            token_ids = self._token_ids(sample)
        except InputError as error:
            problem = f"sample {sample.sample_id}: {error}"
        placeholders = self.format.placeholders.values()
        text = sum(token not in placeholders for token in token_ids)
        room = self.max_tokens - text
        request = MediaRequest(self.media, sample.videos, sample.images, room)
        return Draft(index, sample, token_ids, request, problem)

    def finish(self, draft: Draft, media: Media) -> Prompt:
        """The prompt with its videos and images; raises InputError and PromptTooLong as `build`."""
        if draft.problem is not None:
            raise InputError(draft.problem)
        token_ids = self.format.expanded(draft.token_ids, media, self.tokenizer.encode)
        if len(token_ids) > self.max_tokens:
            raise PromptTooLong(
                f"prompt {draft.sample.sample_id} has {len(token_ids)} tokens, more than "
                f"data.max_prompt_tokens={self.max_tokens}; lower "
                "data.video.max_frames or data.video.max_pixels",
                len(token_ids),
            )
        ids = torch.tensor(token_ids)
        return Prompt(
            index=draft.index,
            sample=draft.sample,
            token_ids=ids,
            position_ids=self.format.positions(ids, media),
            is_vision=self.format.is_vision(ids),
            frames=tuple(map(torch.from_numpy, media.frames)),
            grid_thw=torch.tensor(media.grids) if media.grids else None,
            seconds_per_grid=tuple(media.seconds_per_grid),
            videos_by_pyav=media.videos_by_pyav,
            frame_times=tuple(media.frame_times),
            prompt_times=tuple(media.prompt_times),
        )

    def with_text_of(self, prompt: Prompt, sample: Sample) -> Prompt:
        """The prompt of a sample with the same videos and images, which are not read again.

        Raises InputError and PromptTooLong as `build`.
        """
        media = Media(
            [] if prompt.grid_thw is None else [(t, h, w) for t, h, w in prompt.grid_thw.tolist()],
            list(prompt.seconds_per_grid),
            videos_by_pyav=prompt.videos_by_pyav,
            frame_times=list(prompt.frame_times),
            prompt_times=list(prompt.prompt_times),
        )
        made = self.finish(self.draft(prompt.index, sample), media)
        return replace(made, frames=prompt.frames, vision_states=prompt.vision_states)

    def _token_ids(self, sample: Sample) -> list[int]:
        """The chat with one token per video and image; videos come before images and text."""
        text = self.template.format(
            question=sample.question,
            options="\n".join(f"{letter}. {text}" for letter, text in sample.options.items()),
            answer_hint=ANSWER_HINTS.get(sample.problem_type, ""),
        )
        content: list[dict[str, str]] = [
            *({"type": "video", "video": ""} for _ in sample.videos),
            *({"type": "image", "image": ""} for _ in sample.images),
            {"type": "text", "text": text},
        ]
        return self.tokenizer.encode_chat(content)
