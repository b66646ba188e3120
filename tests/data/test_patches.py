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
from nemo_care.models.families.qwen3_vl.patches import Qwen3PatchSize

PATCHING = PatchSize()
BOUNDS = PixelBounds(4 * 28 * 28, 128 * 28 * 28)


@pytest.mark.parametrize(
    ("height", "width"),
    [(4, 6), (100, 130), (2, 4), (333, 77), (600, 800)],
    ids=["unchanged", "rounded", "enlarged", "narrow", "reduced"],
)
@pytest.mark.parametrize("patching", [PATCHING, Qwen3PatchSize()])
def test_patches_of_one_frame_equal_hugging_face_s(patching, height, width):
    unchanged, side = (height, width) == (4, 6), patching.side
    if height < 10:
        height, width = height * side, width * side
    area = (side * patching.merge) ** 2
    bounds = PixelBounds(4 * area, 64 * area)
    pixels = picture(height, width)
    theirs = Qwen2VLImageProcessorPil(
        min_pixels=bounds.least,
        max_pixels=bounds.most,
        patch_size=side,
        image_mean=patching.mean.flatten().tolist(),
        image_std=patching.std.flatten().tolist(),
    )(images=[Image.fromarray(pixels)], return_tensors="pt")
    resized = patching.resize(torch.from_numpy(pixels), bounds)
    patches, grid = patching.patches(resized[None]), patching.grid(1, height, width, bounds)
    assert patching.frame_shape(grid) == (2, *resized.shape)
    assert grid == tuple(theirs["image_grid_thw"][0].tolist())
    assert patches.dtype == torch.float32
    # In levels of a pixel: resizing may round differently by one, in rare places by two.
    difference = (patches - theirs["pixel_values"]).abs() * patching.std.min() * 255
    assert difference.max() < (1e-3 if unchanged else 2.2)
    assert difference.mean() < 0.04


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
