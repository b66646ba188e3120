"""What vLLM has to be given to see a Qwen3-VL's prompts as they are trained."""

from typing import Any

from nemo_care.models.families.patches import PatchSize
from nemo_care.models.families.processor_files import processing

# The published processor's limit for all frames of a video. vLLM reserves memory for a video of
# this size; none is resized to it.
_VIDEO_PIXELS = 25165824


def processor_files(patching: PatchSize, max_pixels: int) -> dict[str, dict[str, Any]]:
    """As `Family.processor_files`."""
    least = (patching.side * patching.merge) ** 2
    common = {
        **processing(patching),
        "do_resize": False,
        "processor_class": "Qwen3VLProcessor",
    }
    return {
        "preprocessor_config.json": {
            **common,
            "size": {"shortest_edge": least, "longest_edge": max(max_pixels, least)},
            "image_processor_type": "Qwen2VLImageProcessor",
        },
        "video_preprocessor_config.json": {
            **common,
            "size": {"shortest_edge": least, "longest_edge": max(_VIDEO_PIXELS, max_pixels)},
            "cap_pixels_per_frame": False,
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }
