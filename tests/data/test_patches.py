import sys

import numpy as np
import pytest
import torch
from made_media import picture
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from nemo_care.data.patches import PixelBounds
from nemo_care.errors import InputError
from nemo_care.models.families.patches import PatchSize

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
    resized = PATCHING.resize(torch.from_numpy(pixels), bounds)
    patches, grid = PATCHING.patches(resized[None]), PATCHING.grid(1, height, width, bounds)
    assert PATCHING.frame_shape(grid) == (2, *resized.shape)
    assert grid == tuple(theirs["image_grid_thw"][0].tolist())
    assert patches.dtype == torch.float32
    difference = (patches - theirs["pixel_values"]).abs()
    # Resizing may round differently by one level of 255 (.0146 here), in rare places by two.
    assert difference.max() < (1e-5 if (height, width) == (56, 84) else 0.032)
    assert difference.mean() < 5e-4


def test_a_video_s_patches_hold_two_frames_each():
    frames = torch.from_numpy(np.stack([picture(56, 84, seed) for seed in range(4)]))
    patches = PATCHING.patches(frames)
    assert PATCHING.grid(4, 56, 84, BOUNDS) == (2, 4, 6)
    assert patches.shape == (2 * 4 * 6, 3 * 2 * 14 * 14)
    per_frame = patches.view(2, 24, 3, 2, 14 * 14)
    for index, frame in enumerate(frames):
        alone = PATCHING.patches(frame[None])
        expected = alone.view(24, 3, 2, 14 * 14)[:, :, 0]
        torch.testing.assert_close(per_frame[index // 2, :, :, index % 2], expected)


def test_an_odd_number_of_frames_is_filled_with_the_last():
    frames = torch.from_numpy(np.stack([picture(56, 56, seed) for seed in range(3)]))
    patches = PATCHING.patches(frames)
    filled = PATCHING.patches(torch.cat([frames, frames[-1:]]))
    assert PATCHING.grid(3, 56, 56, BOUNDS)[0] == 2
    torch.testing.assert_close(patches, filled)


def test_frames_far_too_narrow_are_refused():
    with pytest.raises(InputError, match="too narrow"):
        PATCHING.resize(torch.zeros(2, 900, 3, dtype=torch.uint8), BOUNDS)
    with pytest.raises(InputError, match="too narrow"):
        PATCHING.grid(1, 2, 900, BOUNDS)


@pytest.mark.parametrize("size", [(56, 84), (100, 130), (28, 56), (333, 77), (600, 800)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_grid_is_known_before_there_are_frames(size, count):
    resized = PATCHING.resize(torch.zeros(*size, 3, dtype=torch.uint8), BOUNDS)
    frames = resized.expand(count, -1, -1, -1)
    t, h, w = PATCHING.grid(count, *size, BOUNDS)
    assert len(PATCHING.patches(frames)) == t * h * w
    assert PATCHING.frame_shape((t, h, w))[1:] == resized.shape


def test_torchvision_is_not_imported():
    # Its wheel does not load beside a CPU build of torch.
    assert "torchvision" not in sys.modules
