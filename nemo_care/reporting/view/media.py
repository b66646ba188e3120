"""Contact sheets: the frames that a model saw, side by side in one small JPEG file."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_care.errors import InputError
from nemo_care.process.os_errors import naming
from nemo_care.process.quiet import silent_stderr
from nemo_care.process.screen import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

FRAME = (160, 120)
"""Width and height of the box that a frame of a video is drawn into, in pixels."""
_PICTURE = (480, 360)  # a single image has more room
_MOST_FRAMES = 64


@dataclass(frozen=True)
class Sheet:
    """The frames of a video at some seconds, or an image."""

    kind: str
    """video or image."""
    path: str
    times: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The name of its file, which depends on path and times."""
        about = f"{self.kind}\0{self.path}\0{self.times}"
        digest = hashlib.sha256(about.encode("utf-8", errors="surrogatepass"))
        return f"{digest.hexdigest()[:20]}.jpg"

    @property
    def shown_times(self) -> tuple[float, ...]:
        """The times of the frames that are drawn: at most 64, evenly spread."""
        count = len(self.times)
        if count <= _MOST_FRAMES:
            return self.times
        return tuple(self.times[at * count // _MOST_FRAMES] for at in range(_MOST_FRAMES))

    def record(self) -> dict[str, Any]:
        """Return what the page needs to show it."""
        return {
            "kind": self.kind,
            "path": one_line(self.path),
            "sheet": self.name,
            "times": self.shown_times,
            "frames": len(self.times),
        }

    def problem(self) -> str | None:
        """Return why it can't be drawn, as far as is known without reading the file."""
        if not Path(self.path).is_file():
            return "missing: there is no such file on this machine"
        if self.kind == "video" and not (self.times and all(map(math.isfinite, self.times))):
            return "the run did not record which frames the model saw"
        return None

    def draw(self, folder: Path) -> str | None:
        """Write its file if it does not exist; return the reason if the media can't be read."""
        target = folder / self.name
        if target.exists():
            return None
        problem = self.problem()
        if problem is not None:
            return problem
        try:
            with silent_stderr():
                image = _side_by_side(list(self._frames()))
        except InputError as error:
            return one_line(error)
        partial = target.with_suffix(".partial")
        with naming(target):
            image.save(partial, "JPEG", quality=80)
            partial.replace(target)
        return None

    def _frames(self) -> "Iterator[Image]":
        from PIL import Image

        from nemo_care.data.images import ImageFile
        from nemo_care.data.video import FrameTimes, VideoFile

        if self.kind == "image":
            frames, room = ImageFile(self.path).frames(), _PICTURE
        else:
            frames, room = VideoFile(self.path, FrameTimes(self.shown_times)).frames(), FRAME
        for frame in frames:
            image = Image.fromarray(frame.numpy())
            image.thumbnail(room)
            # Enlarge small frames: those of the miniature have 28 pixels.
            larger = min(room[0] // image.width, room[1] // image.height, 3)
            yield image.resize(
                (larger * image.width, larger * image.height), Image.Resampling.NEAREST
            )


def _side_by_side(frames: "Sequence[Image]") -> "Image":
    """Join frames of one size in a row."""
    from PIL import Image

    width, height = frames[0].size
    sheet = Image.new("RGB", (width * len(frames), height))
    for place, frame in enumerate(frames):
        sheet.paste(frame, (width * place, 0))
    return sheet
