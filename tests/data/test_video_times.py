"""Which frames of a video are shown, when, and that exactly those are read.

Frames that show their own number (`numbered`) are the oracle, or what PyAV decodes from the first
frame to the last.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from made_media import (
    encode,
    encode_at_times,
    encode_video,
    numbered,
    numbers_of,
    remux,
    rotate,
    show_only,
)
from PIL import Image

from nemo_care.data.media_errors import UnreadableMedia, library_reason
from nemo_care.data.video import FrameChoice, VideoFile, choose_frames, frames_shown_at

FILES = Path(__file__).parents[1] / "files/media"
ALL = FrameChoice(fps=1000, max_frames=1000)


def read(path, choice=ALL):
    video = VideoFile(path, choice)
    frames = torch.stack(list(video.frames()))
    assert frames.shape == (video.count, video.height, video.width, 3)
    assert frames.dtype == torch.uint8
    return video, frames


def decoded_from_the_start(path):
    with av.open(str(path)) as container:
        return [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


# ------------------------------------------------------------------ files that failed


@pytest.mark.parametrize(
    ("name", "shown", "rate"),
    [
        ("stream_copy_clip.mp4", 15, 10),
        ("av1.mp4", 40, 10),
        ("animation.gif", 3, 10),
        ("upright_16x16.mp4", 40, 10),
        ("vp8_hidden.webm", 60, 30),
    ],
)
@pytest.mark.parametrize("choice", [ALL, FrameChoice()], ids=["all", "some"])
def test_the_shown_frames_of_a_file_are_read_with_their_times(name, shown, rate, choice):
    video, frames = read(FILES / name, choice)
    everything = decoded_from_the_start(FILES / name)
    assert len(everything) == shown
    indices = choose_frames(shown, rate, choice)
    assert video.count == len(indices)
    assert torch.equal(frames, torch.stack([everything[index] for index in indices]))
    assert video.seconds_per_grid == pytest.approx(2 * shown / rate / len(indices))
    assert video.by_pyav


# ------------------------------------------------------------------ frames that are not shown


@pytest.mark.parametrize(("first", "last"), [(0, 12), (7, 29), (13, 20), (18, 29)])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_frames_that_an_edit_list_hides_are_not_there(tmp_path, codec, first, last):
    path = encode(tmp_path / "a.mp4", numbered(30), 10, codec, g="10")
    assert numbers_of(read(path)[1]) == list(range(30))
    show_only(path, first / 10, (last - first + 1) / 10)
    video, frames = read(path)
    count = (last - first + 1) // 2 * 2
    assert numbers_of(frames)[0] == first
    assert numbers_of(frames)[-1] == last
    assert video.count == count
    assert video.seconds_per_grid == pytest.approx(2 * (last - first + 1) / 10 / count)
    assert video.by_pyav is (last - first < 29)


@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".mp4"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_what_comes_before_the_first_key_frame_is_not_there(tmp_path, codec, suffix):
    parameters = "keyint=10:repeat-headers=1:open-gop=1:bframes=3"
    whole = encode(
        tmp_path / f"a{suffix}", numbered(40), 10, codec, **{f"{codec[3:]}-params": parameters}
    )
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        key = next(p.pts for p in packets[5:] if p.is_keyframe)
        first = sorted(packet.pts for packet in packets).index(key)
    cut = remux(whole, tmp_path / f"b{suffix}", lambda number, packet: number >= 5)
    numbers = numbers_of(read(cut)[1])
    assert first > 5
    assert numbers == [first + index for index in choose_frames(40 - first, 10, ALL)]


# ------------------------------------------------------------------ frames that decord confuses


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"x264-params": "open-gop=1:keyint=10:bframes=3:log-level=-1"}),
        ("a.mkv", "libx264", {"x264-params": "open-gop=1:keyint=10:bframes=3:log-level=-1"}),
        ("a.mp4", "libx265", {"x265-params": "keyint=10:log-level=none"}),
        ("a.mp4", "mpeg4", {"bf": "2", "g": "12", "qmax": "2"}),
        ("a.ts", "libx264", {"g": "10"}),
        ("a.ts", "mpeg2video", {"bf": "2", "g": "12", "qmax": "2"}),
        ("a.avi", "libx264", {"bf": "2"}),
        ("a.avi", "mpeg4", {"bf": "2", "qmax": "2"}),
        ("a.wmv", "libx264", {"bf": "2"}),
        ("a.h264", "libx264", {"bf": "2"}),
        ("a.webm", "libsvtav1", {"preset": "12"}),
        ("a.mp4", "libx264", {"g": "10"}),
        ("a.mkv", "libx264", {"g": "10"}),
        ("a.webm", "libvpx-vp9", {"g": "10", "deadline": "realtime"}),
        ("a.mov", "prores_ks", {"pix_fmt": "yuv422p10le"}),
        ("a.mov", "mjpeg", {"pix_fmt": "yuvj420p"}),
    ],
)
def test_every_chosen_frame_is_the_right_one(tmp_path, name, codec, options):
    rate = 25  # MPEG-2 knows few others
    path = encode(tmp_path / name, numbered(50), rate, codec, **options)
    for choice in (FrameChoice(fps=5), FrameChoice(), ALL):
        video, frames = read(path, choice)
        assert numbers_of(frames) == choose_frames(50, rate, choice)
        assert video.seconds_per_grid == pytest.approx(2 * 2 / video.count)


def test_ordinary_files_are_decoded_by_decord(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        path = encode_video(tmp_path / name, numbered(40), 10, g="10", bf="3")
        assert not read(path)[0].by_pyav


def test_a_cover_picture_is_not_the_video(tmp_path):
    video = encode_video(tmp_path / "a.mp4", numbered(40), 10)
    Image.new("RGB", (200, 200), "red").save(tmp_path / "cover.png")
    with (
        av.open(str(video)) as film,
        av.open(str(tmp_path / "cover.png")) as cover,
        av.open(str(tmp_path / "b.mp4"), "w") as both,
    ):
        sources = [(cover, cover.streams.video[0]), (film, film.streams.video[0])]
        streams = [both.add_stream_from_template(source) for _, source in sources]
        streams[0].disposition = av.stream.Disposition.attached_pic
        for (container, source), stream in zip(sources, streams, strict=True):
            for packet in container.demux(source):
                if packet.size:
                    packet.stream = stream
                    both.mux(packet)
    _, frames = read(tmp_path / "b.mp4")
    assert numbers_of(frames) == list(range(40))


def test_a_still_picture_is_no_video(tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (200, 200), "red").save(tmp_path / name)
        with pytest.raises(UnreadableMedia, match="it holds a still picture only"):
            read(tmp_path / name)


# ------------------------------------------------------------------ times


@pytest.mark.parametrize("name", ["a.webm", "a.mkv", "a.mp4"])
def test_a_claimed_rate_does_not_count_against_the_frames_times(tmp_path, name):
    codec = "libvpx-vp9" if name == "a.webm" else "libx264"
    times = [Fraction(10 * number) for number in range(8)]
    path = encode_at_times(tmp_path / name, numbered(8), times, codec=codec, rate=10)
    video, frames = read(path, FrameChoice())
    assert numbers_of(frames) == list(range(8))
    assert video.seconds_per_grid == pytest.approx(2 * 80 / 8)


@pytest.mark.parametrize("rate", [1, 24, 60, 240])
def test_a_constant_rate_is_the_declared_one_exactly(tmp_path, rate):
    # Matroska rounds times to milliseconds.
    video, _ = read(encode_video(tmp_path / "a.mkv", numbered(50), rate), FrameChoice())
    total = 50
    assert video.seconds_per_grid == 2 / (video.count / total * rate)


def test_frames_of_a_variable_rate_are_chosen_by_time(tmp_path):
    # Ten seconds with a frame each second, then three seconds with ten a second.
    times = [*map(Fraction, range(10)), *(10 + Fraction(n, 10) for n in range(30))]
    path = encode_at_times(tmp_path / "a.mkv", numbered(40), times)
    video, frames = read(path, FrameChoice(fps=1))
    chosen = [float(times[number]) for number in numbers_of(frames)]
    assert video.count == 12
    assert chosen[0] == 0
    assert chosen[-1] == pytest.approx(12.9)
    assert np.abs(np.array(chosen) - np.linspace(0, 12.9, 12)).max() < 1
    assert video.seconds_per_grid == pytest.approx(2 * 13 / 12, rel=0.03)


@pytest.mark.parametrize(
    ("starts", "count", "expected"),
    [
        ([0, 1, 2, 3], 4, [0, 1, 2, 3]),
        ([0, 0.1, 0.2, 0.3, 10], 2, [0, 4]),
        ([0, 0.1, 0.2, 0.3, 10], 4, [0, 2, 3, 4]),  # 0.3 is shown at 3.3 s and 6.7 s
        ([0, 9.7, 9.8, 9.9, 10], 4, [0, 1, 2, 4]),
        ([0, 9.7, 9.8, 9.9, 10], 5, [0, 1, 2, 3, 4]),
    ],
)
def test_each_frame_is_chosen_once(starts, count, expected):
    chosen = frames_shown_at(np.array(starts, float), count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    assert chosen[0] == 0
    assert chosen[-1] == len(starts) - 1
    assert chosen == expected


def test_frames_of_equal_times_choose_as_by_index():
    choice = FrameChoice(fps=3, max_frames=1000)
    for total in range(2, 200):
        by_index = choose_frames(total, 30, choice)
        by_time = frames_shown_at(np.arange(total) / 30, len(by_index))
        assert np.abs(np.array(by_index) - by_time).max() <= 1


def test_times_in_the_wrong_order_are_refused(tmp_path):
    source = encode(tmp_path / "a.mkv", numbered(20), 10, "mjpeg", "yuvj420p")
    order = np.random.default_rng(0).permutation(20) ** 2

    def shuffle(number, packet):
        packet.dts = 100 * number
        packet.pts = 100 * number + 30 * int(order[number])

    path = remux(source, tmp_path / "b.mkv", shuffle)
    with pytest.raises(UnreadableMedia, match="times are in the wrong order; encode it again"):
        read(path)


def test_times_that_occur_twice_are_refused(tmp_path):
    source = encode(tmp_path / "a.mkv", numbered(20), 10, "mjpeg", "yuvj420p")

    def halve(number, packet):
        packet.pts = packet.dts = number // 2 * 100

    path = remux(source, tmp_path / "b.mkv", halve)
    with pytest.raises(UnreadableMedia, match="several frames have the same timestamp"):
        read(path)


# ------------------------------------------------------------------ how frames come out


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_pyav_turns_frames_as_decord_does(tmp_path, degrees):
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    path = rotate(encode_video(tmp_path / "a.mp4", frames, 10, g="10"), degrees)
    by_decord, expected = read(path)
    by_pyav, turned = read(show_only(path, 1, 3))
    assert (by_decord.by_pyav, by_pyav.by_pyav) == (False, True)
    assert (turned.int() - expected[10:].int()).abs().float().mean() < 0.1


def test_a_transparent_animation_is_laid_on_white(tmp_path):
    pictures = []
    for number in range(4):
        pixels = np.zeros((20, 30, 4), np.uint8)
        pixels[number : number + 5, 5:10] = (200, 0, 0, 255)
        pictures.append(Image.fromarray(pixels))
    pictures[0].save(
        tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100, disposal=2
    )
    _, frames = read(tmp_path / "a.gif")
    for number, frame in enumerate(frames):
        assert frame[0, 0].tolist() == [255, 255, 255]
        assert frame[number + 2, 7].tolist() == [200, 0, 0]


def test_frames_are_read_from_wherever_they_are_in_the_file(tmp_path):
    from nemo_care.data.video_readers import PyavReader
    from nemo_care.data.video_times import read_timeline

    for suffix in (".mp4", ".ts"):
        path = encode_video(tmp_path / f"a{suffix}", numbered(50), 10, g="5", bf="2")
        reader = PyavReader(path, read_timeline(path))
        for index in (0, 49, 3, 3, 21, 44, 20, 48):
            assert numbers_of(torch.from_numpy(reader.at(index))[None]) == [index]


# ------------------------------------------------------------------ messages


def test_the_codec_and_the_reason_are_in_the_message(tmp_path):
    path = tmp_path / "a.mp4"
    content = (FILES / "av1.mp4").read_bytes()
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    assert start < end
    path.write_bytes(content[:start] + b"\xff" * (end - start) + content[end:])
    with pytest.raises(UnreadableMedia, match=r"a\.mp4: .*its av1 frames can't be decoded \(.+\)"):
        read(path)


def test_a_library_s_reason_is_one_short_line_without_control_characters():
    reason = library_reason(ValueError("bad\x1b[31m chunk\x07\r\n\tIDAT\x9b" + "x" * 500))
    assert reason.startswith("bad [31m chunk IDAT x")
    assert reason.isprintable()
    assert len(reason) == 200
    assert library_reason(ValueError()) == "ValueError"


def test_a_file_name_can_t_break_the_line(tmp_path):
    path = tmp_path / "a\n\x1b[2Jb.mp4"
    path.write_bytes(b"nothing")
    with pytest.raises(UnreadableMedia) as raised:
        read(path)
    assert str(raised.value).isprintable()
    assert "b.mp4: video not readable" in str(raised.value)


def test_a_file_name_with_a_colon_is_a_file(tmp_path):
    path = encode_video(tmp_path / "a.mp4", numbered(10), 10)
    path = path.rename(tmp_path / "http:a.mp4")
    assert read(path)[0].count == 10
