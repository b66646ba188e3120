"""Decoding processes: what they give, and what happens when one hangs, dies or eats memory."""

import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from made_media import DAMAGES, damaged_video, encode_video, picture, same_media
from PIL import Image

from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.media import Media, MediaRequest, MediaSettings, load_media
from nemo_care.data.media_errors import UnreadableMedia
from nemo_care.data.patches import PixelBounds
from nemo_care.data.video import FrameChoice
from nemo_care.models.families.patches import PatchSize

SETTINGS = MediaSettings(
    FrameChoice(), PixelBounds(784, 28 * 28 * 4), PixelBounds(784, 28 * 28 * 16), PatchSize()
)


def request(*videos: Path, images=(), room=10**6) -> MediaRequest:
    return MediaRequest(SETTINGS, videos, tuple(images), room)


def misbehave(request: MediaRequest) -> Media:
    """What a file's name says; run in the decoding process."""
    (path,) = request.videos
    what, _, number = path.name.partition(" ")
    if what == "hang":
        time.sleep(600)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "once" and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "large":
        np.ones(int(float(number) * 2**30) // 8)
    if what == "wrong":
        raise ZeroDivisionError("of nothing\nat all")
    return Media(seconds_per_grid=[float(os.getpid())])


@pytest.fixture(scope="module")
def workers():
    """Two processes that do what the name of a file says."""
    with closing(DecodingWorkers(2, seconds=4, memory_gib=1, load=misbehave)) as workers:
        workers.submit(request(Path("ready"))).result()
        yield workers


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    frames = np.stack([picture(60, 90, seed) for seed in range(12)])
    encode_video(folder / "a.mp4", frames, 3)
    encode_video(folder / "b.mp4", frames[::-1, :30], 2)
    Image.fromarray(picture(100, 70)).save(folder / "c.jpg")
    return folder


def test_processes_give_what_the_calling_thread_would(files):
    requests = [
        request(files / "a.mp4"),
        request(files / "a.mp4", files / "b.mp4", images=[files / "c.jpg"]),
        request(images=[files / "c.jpg", files / "c.jpg"]),
        request(files / "b.mp4", room=3),
        request(),
    ]
    damaged = [request(damaged_video(files / f"{damage}.mp4", damage)) for damage in DAMAGES]
    requests += damaged
    with closing(DecodingWorkers(2, seconds=60, memory_gib=2)) as workers:
        futures = [workers.submit(item) for item in requests]
        for item, future in zip(requests, futures, strict=True):
            if item in damaged:
                with pytest.raises(UnreadableMedia) as here:
                    load_media(item)
                with pytest.raises(UnreadableMedia) as there:
                    future.result()
                assert str(there.value) == str(here.value)
            else:
                assert same_media(future.result(), load_media(item))
        assert 0.1 < workers.peak_memory_gib < 2
    with closing(DecodingWorkers(0, seconds=60, memory_gib=2)) as nobody:
        assert same_media(nobody.submit(requests[1]).result(), load_media(requests[1]))
        with pytest.raises(UnreadableMedia):
            nobody.submit(requests[-1]).result()
        assert nobody.peak_memory_gib is None


def test_a_process_holds_no_more_than_resized_frames(tmp_path):
    """96 MB of them in half a GiB: as float32 patches they would take four times as much."""
    encode_video(tmp_path / "a.mp4", np.stack([picture(64, 64, seed) for seed in range(32)]), 2)
    large = PixelBounds(10**6, 10**6)
    settings = replace(SETTINGS, frames=FrameChoice(max_frames=32), video_pixels=large)
    with closing(DecodingWorkers(1, seconds=60, memory_gib=0.5)) as workers:
        media = workers.submit(MediaRequest(settings, (tmp_path / "a.mp4",), (), 10**6)).result()
    (frames,) = media.frames
    assert len(frames) == 32
    assert frames.nbytes > 90e6


def test_what_there_is_no_room_for_is_measured_and_not_decoded(files):
    whole = load_media(request(files / "a.mp4", images=[files / "c.jpg"]))
    tokens = sum(map(SETTINGS.patching.tokens, whole.grids))
    fits = load_media(request(files / "a.mp4", images=[files / "c.jpg"], room=tokens))
    measured = load_media(request(files / "a.mp4", images=[files / "c.jpg"], room=tokens - 1))
    assert same_media(fits, whole)
    assert not measured.frames
    assert (measured.grids, measured.seconds_per_grid) == (whole.grids, whole.seconds_per_grid)


def test_a_sample_that_hangs_is_given_up_and_others_go_on(workers):
    started = time.monotonic()
    hung = workers.submit(request(Path("hang")))
    others = [workers.submit(request(Path("fine"))) for _ in range(20)]
    assert all(other.result() for other in others)
    with pytest.raises(UnreadableMedia, match=r"hang: not decoded after data\.seconds_per_sample"):
        hung.result()
    assert time.monotonic() - started < 20
    assert workers.submit(request(Path("fine"))).result()


def test_a_sample_that_crashes_its_process_is_given_up_and_others_go_on(workers):
    crashed = workers.submit(request(Path("crash")))
    others = [workers.submit(request(Path("fine"))) for _ in range(20)]
    with pytest.raises(UnreadableMedia, match=r"crash: the decoding process died.*exit code -11"):
        crashed.result()
    assert all(other.result() for other in others)


def test_a_sample_whose_process_is_killed_once_is_tried_again(workers, tmp_path):
    assert workers.submit(request(tmp_path / "once")).result()


def test_an_idle_process_that_was_killed_is_replaced(workers):
    pids = {workers.submit(request(Path("fine"))).result().seconds_per_grid[0] for _ in range(20)}
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    media = workers.submit(request(Path("fine"))).result()
    assert media.seconds_per_grid[0] not in pids


def test_memory_of_a_process_is_bounded(workers):
    assert workers.submit(request(Path("large 0.2"))).result()
    assert 0.2 < workers.peak_memory_gib < 2
    with pytest.raises(UnreadableMedia, match=r"large 3: not decoded.*[Mm]emory"):
        workers.submit(request(Path("large 3"))).result()
    assert workers.submit(request(Path("fine"))).result()


def test_an_unexpected_error_is_charged_to_its_sample(workers):
    with pytest.raises(
        UnreadableMedia, match=r"wrong: not decoded \(ZeroDivisionError: of nothing at all\)"
    ):
        workers.submit(request(Path("wrong"))).result()


def test_closing_stops_what_hangs():
    workers = DecodingWorkers(1, seconds=600, memory_gib=2, load=misbehave)
    pid = int(workers.submit(request(Path("fine"))).result().seconds_per_grid[0])
    hung, waiting = (workers.submit(request(Path("hang"))) for _ in range(2))
    time.sleep(0.2)
    started = time.monotonic()
    workers.close()
    assert time.monotonic() - started < 5
    assert not psutil.pid_exists(pid)
    assert waiting.cancelled() or waiting.exception()
    assert hung.exception()


_PROGRAM = """
import os
import signal
import time
from pathlib import Path
from test_decoding import misbehave, request
from nemo_care.data.decoding import DecodingWorkers
from nemo_care.process import ending
from nemo_care.ranks.stop_request import StopRequest

def slowly(request):
    time.sleep(0.2)
    return misbehave(request)

if __name__ == "__main__":
    # In a group of its own, or the signals would reach others too.
    os.setsid()
    ending.watch_run()
    StopRequest().catch_signals()
    workers = DecodingWorkers(2, seconds=600, memory_gib=2, load=slowly)
    pids = {workers.submit(request(Path("fine"))).result().seconds_per_grid[0] for _ in range(4)}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        futures = [workers.submit(request(Path("fine"))) for _ in range(2)]
        time.sleep(0.1)
        os.killpg(0, number)
        pids |= {future.result().seconds_per_grid[0] for future in futures}
    Path(__file__).with_name("pids").write_text(str(len(pids)))
    for _ in range(2):
        workers.submit(request(Path("hang")))
    time.sleep(600)
"""


def test_processes_outlive_signals_to_their_group_and_not_a_killed_run(rank_server, tmp_path):
    (tmp_path / "program.py").write_text(_PROGRAM)
    program = rank_server.start(1, [str(tmp_path / "program.py")])
    deadline = time.monotonic() + 120
    pids = tmp_path / "pids"
    while not (pids.exists() and pids.read_text()):
        assert time.monotonic() < deadline, program.text(0)
        time.sleep(0.02)
    assert pids.read_text() == "2", "the two that were there before the signals"
    family = psutil.Process(program.pids[0]).children(recursive=True)
    assert len(family) >= 3  # the fork server and two that decode
    os.kill(program.pids[0], signal.SIGKILL)
    assert program.wait() == [-signal.SIGKILL]
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


class EndsTheProcessThatReadsIt:
    def __reduce__(self):
        return os._exit, (3,)


def test_processes_that_can_t_start_fail_the_run():
    load = EndsTheProcessThatReadsIt()
    with (
        closing(DecodingWorkers(1, seconds=2, memory_gib=2, load=load)) as workers,
        pytest.raises(RuntimeError, match=r"did not start \(exit code 3\)"),
    ):
        workers.submit(request(Path("fine"))).result()


class HangsTheProcessThatReadsIt:
    def __reduce__(self):
        return time.sleep, (600,)


def test_processes_that_hang_while_they_start_fail_the_run(monkeypatch):
    monkeypatch.setattr("nemo_care.data.decoding._START_SECONDS", 0.5)
    load = HangsTheProcessThatReadsIt()
    with closing(DecodingWorkers(1, seconds=2, memory_gib=2, load=load)) as workers:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"did not start within 0\.5 seconds"):
                workers.submit(request(Path("fine"))).result()
