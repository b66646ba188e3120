"""Image files as RGB frames."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin
from torch import Tensor

from nemo_care.data.media_errors import check_file, library_reason, unreadable
from nemo_care.errors import InputError

_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)
# For these formats, PIL returns grey values with more than 8 bits as 32-bit integers up to 65535.
_TO_16_BITS = ("PNG", "PPM")


class ImageFile:
    """An image whose size is known but whose pixels have not been decoded yet.

    It is the first picture of an animation or a file with several pages. The attributes that an
    image lacks have the values that say so (see `VideoFile`).
    """

    count = 1
    seconds_per_grid = 0.0
    frame_times: tuple[float, ...] = ()
    prompt_times: tuple[float, ...] = ()
    by_pyav = False

    def __init__(self, path: str | Path) -> None:
        """Open the file.

        Raises:
            MissingMedia: there is no such file.
            UnreadableMedia: it is empty, or not an image that PIL can read.
        """
        self.path = Path(path)
        check_file(self.path, "image")
        with self._readable():
            self._image = Image.open(path)
            size = self._image.size
            turned = self._image.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
        self.width, self.height = reversed(size) if turned else size

    def frame(self) -> Tensor:
        """Decode the image as RGB, uint8 [H, W, 3], rotated by its EXIF orientation.

        Raises:
            UnreadableMedia: it can't be decoded, or the range of its values is unknown.
        """
        with self._readable(), self._image as image:
            image.load()
            # Copies of the image lose the file's tags.
            depth = _Depth.of(image)
            return torch.from_numpy(np.array(_rgb(ImageOps.exif_transpose(image), depth)))

    def frames(self) -> Iterator[Tensor]:
        """Yield the only frame."""
        yield self.frame()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, InputError):
            raise
        except _UnknownRange as error:
            raise unreadable(self.path, "image", str(error)) from error
        # A damaged file makes PIL raise many exceptions, such as struct.error and IndexError.
        except Exception as error:
            cause = f"it can't be decoded as an image ({library_reason(error)})"
            raise unreadable(self.path, "image", cause) from error


class _UnknownRange(Exception):
    """The value that means white in the image is unknown."""


def on_white(image: Image.Image) -> Image.Image:
    """Return a picture with transparency as RGB over white, as on a page or in a browser."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


@dataclass(frozen=True)
class _Depth:
    """How to interpret the grey values of an image with more than 8 bits.

    `most` is the value of full brightness, or None if unknown. `inverted`: 0 is white.
    """

    most: int | None
    inverted: bool = False

    @classmethod
    def of(cls, image: Image.Image) -> "_Depth":
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
            white = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
            known = image.mode.startswith("I;16")
            return cls(2**bits - 1 if known else None, inverted=white == 0)
        # For other formats, PIL scales the values to 16 bits.
        return cls(65535 if image.mode.startswith("I;16") or image.format in _TO_16_BITS else None)


def _rgb(image: Image.Image, depth: _Depth) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_integers(image, depth)
    if image.mode == "F":
        return _from_floats(image)
    if image.mode == "LAB":
        return ImageCms.profileToProfile(  # type: ignore[return-value]
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:
        # For PNG files with 16 bits per colour, PIL cuts the pixels to 8 bits, but not this value.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return on_white(image) if image.has_transparency_data else image.convert("RGB")


def _from_integers(image: Image.Image, depth: _Depth) -> Image.Image:
    if depth.most is None:
        raise _UnknownRange("its 32-bit grey values have no known range; save it with 8 or 16 bits")
    values = np.asarray(image).astype(np.int64).clip(0, depth.most)
    scaled = ((values * 255 + depth.most // 2) // depth.most).astype(np.uint8)
    grey = Image.fromarray(255 - scaled if depth.inverted else scaled)
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey.convert("RGB")
    grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return on_white(grey)


def _from_floats(image: Image.Image) -> Image.Image:
    """Convert values from 0 to 1, or otherwise from 0 to 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):  # also NaN
        raise _UnknownRange(
            f"its values from {low:g} to {high:g} have no known range; scale them to 0 to 1"
        )
    scaled = values * 255 if high <= 1 else values
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
