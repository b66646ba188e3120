import numpy as np
import pytest
import torch
from made_media import DAMAGES, damaged_video, encode_at_times, encode_video, picture, rotate

from nemo_care.data.media_errors import UnreadableMedia
from nemo_care.data.video import FrameChoice, FrameTimes, VideoFile, choose_frames
from nemo_care.miniature.files import write_video
from nemo_care.miniature.world import draw_scenes


def read(path, choice=None):
    video = VideoFile(path, choice or FrameChoice())
    return video, torch.stack(list(video.frames()))


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
    indices = choose_frames(total, average_fps, FrameChoice())
    assert len(indices) == expected
    assert indices[0] == 0
    assert indices[-1] == total - 1
    assert indices == sorted(set(indices))


def test_decoded_frames_are_the_drawn_ones(tmp_path):
    scenes = draw_scenes(4, torch.Generator().manual_seed(0))
    for index, frames in enumerate(scenes.frames):
        write_video(tmp_path / f"{index}.mp4", frames)
        _, decoded = read(tmp_path / f"{index}.mp4")
        assert decoded.dtype == torch.uint8
        assert torch.equal(decoded, frames)


@pytest.mark.parametrize(
    ("rate", "count", "expected_frames", "expected_seconds"),
    [(2, 8, 8, 1.0), (10, 50, 10, 1.0), (10, 200, 16, 2.5), (4, 4, 4, 0.5)],
)
def test_seconds_per_grid_is_the_time_of_two_read_frames(
    tmp_path, rate, count, expected_frames, expected_seconds
):
    frames = np.stack([picture(28, 28, seed) for seed in range(count)])
    video, decoded = read(encode_video(tmp_path / "a.mp4", frames, rate))
    assert video.count == len(decoded) == expected_frames
    assert video.seconds_per_grid == pytest.approx(expected_seconds)


def test_recorded_times_give_the_same_frames_again(tmp_path):
    frames = np.stack([picture(28, 28, seed) for seed in range(50)])
    file = encode_video(tmp_path / "a.mp4", frames, 10)
    video, decoded = read(file)
    assert video.frame_times == tuple(index / 10 for index in choose_frames(50, 10, FrameChoice()))
    again, decoded_again = read(file, FrameTimes(video.frame_times))
    assert torch.equal(decoded_again, decoded)
    # A file that has been cut since: its last frames stand in.
    few, _ = read(file, FrameTimes((0.0, 1.04, 99.0)))
    assert few.frame_times == (0.0, 1.0, 4.9)
    assert again.count == video.count


def test_times_are_those_at_which_the_read_frames_are_shown(tmp_path):
    frames = np.stack([picture(28, 28, seed) for seed in range(50)])
    video, _ = read(encode_video(tmp_path / "a.mp4", frames, 12))
    indices = choose_frames(50, 12, FrameChoice())
    assert video.prompt_times == tuple(index / 12 for index in indices)
    # A slide show: the times are not those of evenly spaced frames.
    shown = [0.0, 0.5, 1.0, 4.0, 4.5, 5.0]
    path = encode_at_times(tmp_path / "b.mp4", frames[: len(shown)], shown)
    video, _ = read(path)
    assert set(video.prompt_times) <= set(shown)
    assert list(video.prompt_times) == sorted(set(video.prompt_times))
    assert (video.prompt_times[0], video.prompt_times[-1]) == (0.0, 5.0)


@pytest.mark.parametrize(
    ("degrees", "turns", "height", "by_pyav"),
    # decord can't hand over turned frames of 48 x 96 pixels.
    [(90, -1, 64, False), (180, 2, 64, False), (270, 1, 64, False), (90, -1, 48, True)],
)
def test_a_video_is_turned_as_its_rotation_says(tmp_path, degrees, turns, height, by_pyav):
    frames = np.stack([picture(height, 96, seed) for seed in range(4)])
    _, upright = read(encode_video(tmp_path / "a.mp4", frames, 2))
    video, turned = read(rotate(tmp_path / "a.mp4", degrees))
    assert (video.height, video.width) == ((height, 96) if degrees == 180 else (96, height))
    assert video.by_pyav is by_pyav
    assert torch.equal(turned, torch.rot90(upright, turns, dims=(1, 2)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unreadable_video_is_named_with_its_cause(tmp_path, damage):
    path = damaged_video(tmp_path / "broken.mp4", damage)
    with pytest.raises(UnreadableMedia, match="video not readable") as raised:
        read(path)
    assert str(path) in str(raised.value)
    assert DAMAGES[damage] in str(raised.value)
    assert "\n" not in str(raised.value)
