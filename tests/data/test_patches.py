import sys

import numpy as np
import pytest
import torch
from made_media import picture
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from nemo_care.data.patches import PixelBounds
from nemo_care.errors import InputError
from nemo_care.models.families.qwen2_5_vl.patches import PatchSize

PATCHING = PatchSize()
BOUNDS = PixelBounds(4 * 28 * 28, 128 * 28 * 28)


@pytest.mark.parametrize(
    ("height", "width"),
    [(56, 84), (100, 130), (28, 56), (333, 77), (600, 800)],
    ids=["unchanged", "rounded", "enlarged", "narrow", "reduced"],
)
def test_patches_of_one_frame_equal_hugging_face_s(height, width):
    bounds = PixelBounds(4 * 28 * 28, 64 * 28 * 28)
    pixels = picture(height, width)
    theirs = Qwen2VLImageProcessorPil(min_pixels=bounds.least, max_pixels=bounds.most)(
        images=[Image.fromarray(pixels)], return_tensors="pt"
    )
    patches, grid = PATCHING.patches(torch.from_numpy(pixels)[None], bounds)
    assert grid == tuple(theirs["image_grid_thw"][0].tolist())
    assert patches.dtype == torch.float32
    difference = (patches - theirs["pixel_values"]).abs()
    # Resizing may round differently by one level of 255 (.0146 here), in rare places by two.
    assert difference.max() < (1e-5 if (height, width) == (56, 84) else 0.032)
    assert difference.mean() < 5e-4


def test_a_video_s_patches_hold_two_frames_each():
    frames = torch.from_numpy(np.stack([picture(56, 84, seed) for seed in range(4)]))
    patches, grid = PATCHING.patches(frames, BOUNDS)
    assert grid == (2, 4, 6)
    assert patches.shape == (2 * 4 * 6, 3 * 2 * 14 * 14)
    per_frame = patches.view(2, 24, 3, 2, 14 * 14)
    for index, frame in enumerate(frames):
        alone, _ = PATCHING.patches(frame[None], BOUNDS)
        expected = alone.view(24, 3, 2, 14 * 14)[:, :, 0]
        torch.testing.assert_close(per_frame[index // 2, :, :, index % 2], expected)


def test_an_odd_number_of_frames_is_filled_with_the_last():
    frames = torch.from_numpy(np.stack([picture(56, 56, seed) for seed in range(3)]))
    patches, grid = PATCHING.patches(frames, BOUNDS)
    filled, _ = PATCHING.patches(torch.cat([frames, frames[-1:]]), BOUNDS)
    assert grid[0] == 2
    torch.testing.assert_close(patches, filled)


def test_frames_far_too_narrow_are_refused():
    with pytest.raises(InputError, match="too narrow"):
        PATCHING.patches(torch.zeros(1, 2, 900, 3, dtype=torch.uint8), BOUNDS)
    with pytest.raises(InputError, match="too narrow"):
        PATCHING.grid(1, 2, 900, BOUNDS)


@pytest.mark.parametrize("size", [(56, 84), (100, 130), (28, 56), (333, 77), (600, 800)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_grid_is_known_before_there_are_frames(size, count):
    frames = torch.zeros(count, *size, 3, dtype=torch.uint8)
    assert PATCHING.grid(count, *size, BOUNDS) == PATCHING.patches(frames, BOUNDS)[1]


def test_torchvision_is_not_imported():
    # Its wheel does not load beside a CPU build of torch.
    assert "torchvision" not in sys.modules
