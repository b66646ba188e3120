"""Qwen3-VL's prompts equal those of transformers' processor, and their positions its model's."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from qwen_vocabulary import CHAT_TEMPLATE, SPECIAL, qwen_tokenizer
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from nemo_care.data.chat import ChatEncoder
from nemo_care.data.media import Media
from nemo_care.data.patches import PixelBounds
from nemo_care.errors import InputError
from nemo_care.models.families.qwen3_vl.patches import Qwen3PatchSize
from nemo_care.models.families.qwen3_vl.prompt import Qwen3VLPrompt

VIDEO, IMAGE = SPECIAL["<|video_pad|>"], SPECIAL["<|image_pad|>"]
FORMAT = Qwen3VLPrompt(
    Qwen3PatchSize(),
    vocab_size=151936,
    eos_token_id=None,
    placeholders={"video": VIDEO, "image": IMAGE},
    vision_start=SPECIAL["<|vision_start|>"],
    vision_end=SPECIAL["<|vision_end|>"],
)
# Places of a video's frames in its file, and its frames per second.
SHORT, LONG = ([0, 29], 29.97), (list(range(0, 500, 23)), 23.976)
ODD = ([0, 10, 20], 10.0)
CASES = {
    "text": [],
    "image": [((1, 4, 6), None)],
    "short video": [((1, 4, 2), SHORT)],
    "long video": [((11, 2, 4), LONG)],
    "a video of an odd number of frames": [((2, 4, 4), ODD)],
    "image and video": [((1, 6, 4), None), ((1, 4, 2), SHORT)],
    "two videos": [((11, 2, 4), LONG), ((1, 2, 2), SHORT)],
    "video, image and video": [((1, 2, 2), SHORT), ((1, 2, 6), None), ((2, 4, 4), ODD)],
}
TEXT = "Which way does it go? <3.0 seconds> are shown."


def content_of(case):
    kinds = ["image" if file is None else "video" for _, file in CASES[case]]
    return [*({"type": kind, kind: ""} for kind in kinds), {"type": "text", "text": TEXT}]


def prompt_of(case):
    """Token ids by our rule, and what the files hold."""
    files = CASES[case]
    media = Media(
        grids=[grid for grid, _ in files],
        seconds_per_grid=[0.0] * len(files),
        prompt_times=[
            () if file is None else tuple(n / file[1] for n in file[0]) for _, file in files
        ],
    )
    tokenizer = qwen_tokenizer()
    chat = ChatEncoder(tokenizer).encode(content_of(case))
    ids = FORMAT.expanded(chat, media, lambda text: tokenizer(text)["input_ids"])
    return chat, ids, media


def processor():
    """transformers' own, without the parts that need torchvision."""
    made = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    made.image_processor = SimpleNamespace(merge_size=2)
    made.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    made.image_token, made.video_token = "<|image_pad|>", "<|video_pad|>"
    made.vision_start_token, made.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    return made


def text_by_transformers(case) -> str:
    """The chat with each placeholder replaced as the processor does it."""
    tokenizer = qwen_tokenizer()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content_of(case)}],
        chat_template=CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    made, text = processor(), ""
    for grid, file in CASES[case]:
        token = made.image_token if file is None else made.video_token
        before, chat = chat.split(token, 1)
        grids = torch.tensor([grid])
        if file is None:
            replacement = made.replace_image_token({"image_grid_thw": grids}, 0)
        else:
            metadata = SimpleNamespace(fps=file[1], frames_indices=list(file[0]))
            replacement = made.replace_video_token(
                {"video_grid_thw": grids, "video_metadata": [metadata]}, 0
            )
        text += before + replacement
    return text + chat


@pytest.mark.parametrize("case", CASES)
def test_token_ids_equal_those_of_transformers_processor(case):
    _, ids, _ = prompt_of(case)
    assert ids == qwen_tokenizer()(text_by_transformers(case))["input_ids"]


@pytest.mark.parametrize("case", CASES)
def test_positions_equal_those_of_transformers_model(case):
    _, ids, media = prompt_of(case)
    tokens = torch.tensor(ids)
    grids = {
        kind: torch.tensor([grid for grid, file in CASES[case] if (file is None) is still])
        for kind, still in (("image_grid_thw", True), ("video_grid_thw", False))
    }
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)),
        get_vision_position_ids=partial(Qwen3VLModel.get_vision_position_ids, None),
    )
    wanted, _ = Qwen3VLModel.get_rope_index(
        model,
        tokens[None],
        ((tokens == IMAGE) + 2 * (tokens == VIDEO))[None],
        **{kind: grid if len(grid) else None for kind, grid in grids.items()},
    )
    assert torch.equal(FORMAT.positions(tokens, media), wanted[:, 0])
    assert FORMAT.is_vision(tokens).sum() == sum(map(FORMAT.patching.tokens, media.grids))


@pytest.mark.parametrize("case", CASES)
def test_placeholders_come_back_from_a_prompt_s_tokens(case):
    chat, ids, media = prompt_of(case)
    assert FORMAT.collapsed(ids, media.grids) == chat


def test_vision_tokens_that_do_not_match_the_grids_are_refused():
    _, ids, media = prompt_of("two videos")
    for wrong in (ids[: ids.index(VIDEO) + 3], [*ids, VIDEO]):
        with pytest.raises(InputError, match="vision tokens"):
            FORMAT.positions(torch.tensor(wrong), media)


@pytest.mark.parametrize("size", [(240, 320), (360, 640), (1080, 1920), (2160, 3840), (90, 120)])
@pytest.mark.parametrize("frames", [2, 4, 16, 64])
def test_frames_of_a_video_have_the_size_that_transformers_gives_them(size, frames):
    """It bounds the pixels of all frames together, and the recipe those of each."""
    bounds = PixelBounds(128 * 32 * 32, 256 * 32 * 32)
    wanted = smart_resize(
        frames, *size, factor=32, min_pixels=frames * bounds.least, max_pixels=frames * bounds.most
    )
    assert FORMAT.patching.size(*size, bounds) == wanted
