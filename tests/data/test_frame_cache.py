"""The cache of decoded frames: what is found, what is decoded again, and what is removed."""

import os
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_media import encode, encode_video, numbered, picture, same_media
from PIL import Image

from nemo_care.data import media as media_module
from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.frame_cache import CacheSettings, DecodedFile, FrameCache, check_cache
from nemo_care.data.media import MediaRequest, MediaSettings, load_media
from nemo_care.data.media_errors import MissingMedia
from nemo_care.data.patches import PixelBounds
from nemo_care.data.video import FrameChoice
from nemo_care.errors import InputError
from nemo_care.models.families.patches import PatchSize
from nemo_care.recipe.data import DataConfig


@pytest.fixture
def settings(tmp_path):
    return MediaSettings(
        FrameChoice(),
        PixelBounds(784, 28 * 28 * 4),
        PixelBounds(784, 28 * 28 * 16),
        PatchSize(),
        CacheSettings(tmp_path / "cache", 2**20),
    )


@pytest.fixture
def video(tmp_path):
    frames = np.stack([picture(60, 90, seed) for seed in range(12)])
    return encode_video(tmp_path / "a.mp4", frames, 3)


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are opened to be decoded."""
    names = []
    for kind in (media_module.VideoFile, media_module.ImageFile):

        class Noted(kind):
            def __init__(self, path, *choice):
                names.append(Path(path).name)
                super().__init__(path, *choice)

        monkeypatch.setattr(media_module, kind.__name__, Noted)
    return names


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.frames"))


def test_a_file_is_decoded_once(settings, video, opened, tmp_path):
    Image.fromarray(picture(100, 70)).save(tmp_path / "c.png")
    by_pyav = encode(tmp_path / "b.avi", numbered(8), 4, "mpeg4")
    request = MediaRequest(settings, (video, by_pyav), (tmp_path / "c.png",), 10**6)
    plain = load_media(replace(request, settings=replace(settings, cache=None)))
    assert plain.videos_by_pyav == 1
    opened.clear()
    first = load_media(request)
    assert opened == ["a.mp4", "b.avi", "c.png"]
    second = load_media(request)
    assert len(opened) == 3
    assert same_media(first, plain)
    assert same_media(second, plain)
    # Sizes alone are known without decoding too.
    measured = load_media(replace(request, room=0))
    assert (measured.grids, measured.frames, len(opened)) == (plain.grids, [], 3)


def test_what_frames_depend_on_makes_another_entry(settings, video, opened):
    def load(**changed):
        load_media(MediaRequest(replace(settings, **changed), (video,), (), 10**6))

    load()
    load(image_pixels=PixelBounds(784, 784))  # not of videos
    assert len(opened) == 1
    load(frames=FrameChoice(fps=1.0))
    load(frames=FrameChoice(max_frames=4))
    load(video_pixels=PixelBounds(784, 784))
    load(patching=PatchSize(side=7))
    assert len(opened) == 5
    os.utime(video, ns=(0, video.stat().st_mtime_ns + 1))
    load()
    video.write_bytes(video.read_bytes() + b"\0")
    load()
    assert len(opened) == 7
    load()
    assert len(opened) == 7
    video.unlink()
    with pytest.raises(MissingMedia):
        load()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"",
        lambda content: b"[]" + content,
        lambda content: content[:20] + b"x" + content[20:],
        lambda content: content.replace(b'"by_pyav"', b'"bypyav"'),
    ],
    ids=["cut", "one bit", "empty", "no header", "another name", "a key less"],
)
def test_a_damaged_entry_is_decoded_again_and_replaced(settings, video, opened, damage, capsys):
    request = MediaRequest(settings, (video,), (), 10**6)
    wanted = load_media(request)
    (entry,) = entries(settings.cache.folder)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert same_media(load_media(request), wanted)
    assert len(opened) == 2
    assert f"{entry}: not a readable entry of data.cache" in capsys.readouterr().err
    assert entry.read_bytes() == whole
    assert same_media(load_media(request), wanted)
    assert len(opened) == 2


def entry_of(number: int, size: int = 900) -> DecodedFile:
    return DecodedFile((1, 2, 2), 0.5, np.full((1, size // 3, 1, 3), number, dtype=np.uint8))


def test_entries_that_were_not_used_for_the_longest_time_are_removed(tmp_path):
    cache = FrameCache(tmp_path, 10_000)
    names = [f"{number:064x}" for number in range(12)]
    for number, name in enumerate(names):
        cache.put(name, entry_of(number))
        path = cache._path(name)
        os.utime(path, (number, number))  # as if a second lay between them
        assert sum(path.stat().st_size for path in entries(tmp_path)) <= 10_000
        if number >= 1:
            found = cache.get(names[1])  # used all the time
            assert found is not None
            assert found.frames.max() == 1
            os.utime(cache._path(names[1]), (number + 0.5, number + 0.5))
    kept = [name for name in names if cache.get(name) is not None]
    assert names[1] in kept
    assert names[0] not in kept
    assert names[2] not in kept
    assert kept[1:] == names[-len(kept) + 1 :]
    assert len(kept) > 5


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path):
    cache = FrameCache(tmp_path, 1000)
    cache.put("a" * 64, entry_of(1, 600))
    cache.put("b" * 64, entry_of(1, 3000))
    assert [path.stem for path in entries(tmp_path)] == ["a" * 64]


def test_what_a_kill_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    old, new = tmp_path / "ab" / "old.partial", tmp_path / "ab" / "new.partial"
    old.parent.mkdir()
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 7200))
    FrameCache(tmp_path, 10_000).put("a" * 64, entry_of(1))
    assert (old.exists(), new.exists()) == (False, True)


def test_a_folder_that_can_not_be_written_to_costs_the_cache_only(settings, video, capsys):
    settings.cache.folder.write_text("no folder")
    request = MediaRequest(settings, (video,), (), 10**6)
    wanted = load_media(replace(request, settings=replace(settings, cache=None)))
    assert same_media(load_media(request), wanted)
    assert same_media(load_media(request), wanted)
    assert capsys.readouterr().err.count("can't be used") == 1
    with pytest.raises(InputError, match=r"data\.cache=.*cache: can't be written to"):
        check_cache(DataConfig(cache=str(settings.cache.folder)))


def test_processes_share_a_folder(settings, video, tmp_path):
    requests = [MediaRequest(settings, (video,), (), 10**6)] * 6
    wanted = load_media(MediaRequest(replace(settings, cache=None), (video,), (), 10**6))
    with closing(DecodingWorkers(2, seconds=60, memory_gib=2)) as workers:
        for future in [workers.submit(request) for request in requests]:
            assert same_media(future.result(), wanted)
    assert len(entries(settings.cache.folder)) == 1
    assert not list(settings.cache.folder.rglob("*.partial"))
