import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from nemo_care.data.video import (
    UnreadableMedia,
    VideoSampling,
    choose_frames,
    frames_to_patches,
    read_image,
    read_video,
)
from nemo_care.errors import InputError
from nemo_care.miniature.files import write_video
from nemo_care.miniature.world import SAMPLING, draw_scenes


def picture(height, width, seed=0):
    gradient = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    noise = np.random.default_rng(seed).integers(0, 80, (height, width, 3))
    return ((gradient + noise) % 256).astype(np.uint8)


def encode_video(path, frames, rate):
    """An ordinary H.264 file whose index comes first, so that its rest can be damaged."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("height", "width"),
    [(56, 84), (100, 130), (28, 56), (333, 77), (600, 800)],
    ids=["unchanged", "rounded", "enlarged", "narrow", "reduced"],
)
def test_patches_of_one_frame_equal_hugging_face_s(height, width):
    sampling = VideoSampling(min_pixels=4 * 28 * 28, max_pixels=64 * 28 * 28)
    pixels = picture(height, width)
    theirs = Qwen2VLImageProcessorPil(
        min_pixels=sampling.min_pixels, max_pixels=sampling.max_pixels
    )(images=[Image.fromarray(pixels)], return_tensors="pt")
    patches, grid = frames_to_patches(torch.from_numpy(pixels)[None], sampling)
    assert grid == tuple(theirs["image_grid_thw"][0].tolist())
    assert patches.dtype == torch.float32
    difference = (patches - theirs["pixel_values"]).abs()
    # Resizing may round differently by one level of 255 (.0146 here), in rare places by two.
    assert difference.max() < (1e-5 if (height, width) == (56, 84) else 0.032)
    assert difference.mean() < 5e-4


def test_a_video_s_patches_hold_two_frames_each():
    frames = torch.from_numpy(np.stack([picture(56, 84, seed) for seed in range(4)]))
    sampling = VideoSampling()
    patches, grid = frames_to_patches(frames, sampling)
    assert grid == (2, 4, 6)
    assert patches.shape == (2 * 4 * 6, 3 * 2 * 14 * 14)
    per_frame = patches.view(2, 24, 3, 2, 14 * 14)
    for index, frame in enumerate(frames):
        alone, _ = frames_to_patches(frame[None], sampling)
        expected = alone.view(24, 3, 2, 14 * 14)[:, :, 0]
        torch.testing.assert_close(per_frame[index // 2, :, :, index % 2], expected)


def test_an_odd_number_of_frames_is_filled_with_the_last():
    frames = torch.from_numpy(np.stack([picture(56, 56, seed) for seed in range(3)]))
    patches, grid = frames_to_patches(frames, VideoSampling())
    filled, _ = frames_to_patches(torch.cat([frames, frames[-1:]]), VideoSampling())
    assert grid[0] == 2
    torch.testing.assert_close(patches, filled)


def test_frames_far_too_narrow_are_refused():
    with pytest.raises(InputError, match="too narrow"):
        frames_to_patches(torch.zeros(1, 2, 900, 3, dtype=torch.uint8), VideoSampling())


def test_torchvision_is_not_imported():
    # Its wheel does not load beside a CPU build of torch.
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize(
    ("total", "average_fps", "expected"),
    [
        (8, 2.0, 8),
        (300, 30.0, 16),  # 20 at 2 per second, at most 16
        (150, 30.0, 10),
        (165, 30.0, 10),  # 11, made even
        (30, 30.0, 4),  # 2, at least 4
        (3, 30.0, 2),  # not more than there are, and even
        (2, 30.0, 2),
    ],
)
def test_the_number_of_frames_follows_qwen_s_rule(total, average_fps, expected):
    indices = choose_frames(total, average_fps, VideoSampling())
    assert len(indices) == expected
    assert indices[0] == 0
    assert indices[-1] == total - 1
    assert indices == sorted(set(indices))


def test_decoded_frames_are_the_drawn_ones(tmp_path):
    scenes = draw_scenes(4, torch.Generator().manual_seed(0))
    for index, frames in enumerate(scenes.frames):
        write_video(tmp_path / f"{index}.mp4", frames)
        video = read_video(tmp_path / f"{index}.mp4", SAMPLING)
        assert video.frames.dtype == torch.uint8
        assert torch.equal(video.frames, frames)


@pytest.mark.parametrize(
    ("rate", "count", "expected_frames", "expected_seconds"),
    [(2, 8, 8, 1.0), (10, 50, 10, 1.0), (10, 200, 16, 2.5), (4, 4, 4, 0.5)],
)
def test_seconds_per_grid_is_the_time_of_two_read_frames(
    tmp_path, rate, count, expected_frames, expected_seconds
):
    frames = np.stack([picture(28, 28, seed) for seed in range(count)])
    video = read_video(encode_video(tmp_path / "a.mp4", frames, rate), VideoSampling())
    assert len(video.frames) == expected_frames
    assert video.seconds_per_grid == pytest.approx(expected_seconds)


def damaged_file(tmp_path, damage):
    path = tmp_path / "broken.mp4"
    if damage == "missing":
        return path
    frames = np.stack([picture(56, 56, seed) for seed in range(1 if damage == "short" else 16)])
    encode_video(path, frames, 4)
    content = path.read_bytes()
    damages = {
        "empty": b"",
        "text": b"this is not a video\n" * 50,
        "cut off": content[: len(content) // 3],
        "short": content,
    }
    path.write_bytes(damages[damage])
    return path


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut off", "short"])
def test_an_unreadable_video_is_named_with_its_cause(tmp_path, damage):
    path = damaged_file(tmp_path, damage)
    with pytest.raises(UnreadableMedia, match="video not readable") as raised:
        read_video(path, VideoSampling())
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path):
    pixels = picture(20, 30)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    frame = read_image(tmp_path / "a.png")
    assert frame.shape == (1, 30, 20, 3)
    np.testing.assert_array_equal(frame[0].numpy(), np.rot90(pixels, -1))


def test_an_image_without_colour_is_read_as_rgb(tmp_path):
    Image.new("L", (30, 20), 7).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").unique().tolist() == [7]


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_an_unreadable_image_is_named_with_its_cause(tmp_path, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableMedia, match=r"a\.png: image not readable"):
        read_image(path)
