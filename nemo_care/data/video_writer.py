"""Write small videos, for the miniature and to check whether videos can be decoded here."""

from pathlib import Path

import av
from torch import Tensor


def write_video(path: str | Path, frames: Tensor, rate: int = 2) -> None:
    """Write uint8 frames [T, H, W, 3] as a lossless mp4 file of `rate` frames per second.

    Lossless H.264 in RGB: at 28x28 pixels, the chroma subsampling of the usual yuv420p changes
    colours by 7 of 255 on average.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.options = {"crf": "0", "preset": "ultrafast"}
        # One thread, because starting more takes longer than encoding; the bytes are the same.
        stream.thread_count = 1
        for pixels in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
