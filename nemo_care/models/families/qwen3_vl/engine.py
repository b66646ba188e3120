"""What vLLM has to be given to see a Qwen3-VL's prompts as they are trained."""

from typing import Any

from nemo_care.models.families.qwen3_vl.patches import Qwen3PatchSize

# The published processor's limit for all frames of a video. vLLM reserves memory for a video of
# this size; none is resized to it.
_VIDEO_PIXELS = 25165824


def processor_files(patching: Qwen3PatchSize, max_pixels: int) -> dict[str, dict[str, Any]]:
    """As `Family.processor_files`."""
    least = (patching.side * patching.merge) ** 2
    common = {
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": patching.mean.flatten().tolist(),
        "image_std": patching.std.flatten().tolist(),
        "patch_size": patching.side,
        "temporal_patch_size": patching.frames,
        "merge_size": patching.merge,
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
