"""Small videos, written for the miniature and to see whether videos can be decoded here."""

from pathlib import Path

import av
from torch import Tensor


def write_video(path: str | Path, frames: Tensor, rate: int = 2) -> None:
    """Writes uint8 frames [T, H, W, 3] as an mp4 file of `rate` frames a second, without loss.

    Lossless H.264 in RGB: at 28x28 pixels, the chroma subsampling of the usual yuv420p changes
    colours by 7 of 255 on average.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.options = {"crf": "0", "preset": "ultrafast"}
        # One thread: starting more takes longer than the encoding, and the bytes stay the same.
        stream.thread_count = 1
        for pixels in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
