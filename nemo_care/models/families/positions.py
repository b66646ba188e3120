"""mRoPE positions by Qwen2.5-VL's rule.

Computed here, and passed to every model as `position_ids`, because `get_rope_index` of
transformers 5 starts the text after a video elsewhere than the released checkpoints expect.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_care.data.patches import Grid
from nemo_care.errors import InputError


def mrope_positions(
    token_ids: Tensor,
    grids: Sequence[Grid],
    seconds_per_grid: Sequence[float],
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int = 2,
    tokens_per_second: int = 2,
) -> Tensor:
    """Positions of each token on the axes time, height and width.

    Text counts up by one on all three axes. The tokens of an image or a video that begins at
    position p get (time, row, column) + p, where one second of video is `tokens_per_second`
    positions. What follows begins one after the largest position so far on any axis.

    Args:
        token_ids: [P] long, with one vision token per merged patch.
        grids: patches (time, height, width) of each image and video, in order of appearance.
        seconds_per_grid: seconds covered by one grid step in time; 0.0 for an image.
        image_token_id, video_token_id: the ids that stand for vision tokens.
        merge_size: patches per vision token along height and along width.
        tokens_per_second: positions per second of video.

    Returns:
        [3, P] long.

    Raises:
        InputError: the vision tokens do not match the grids.
    """
    if len(grids) != len(seconds_per_grid):
        raise InputError(
            f"{len(grids)} vision grids but {len(seconds_per_grid)} values of seconds per grid: "
            "give one value per image or video"
        )
    is_vision = (token_ids == image_token_id) | (token_ids == video_token_id)
    pieces: list[Tensor] = []
    cursor = 0  # tokens done
    position = 0  # the next text position
    for number, ((time, height, width), seconds) in enumerate(
        zip(grids, seconds_per_grid, strict=True), start=1
    ):
        rows, columns = height // merge_size, width // merge_size
        count = time * rows * columns
        found = is_vision[cursor:].nonzero()
        start = cursor + int(found[0]) if len(found) else len(token_ids)
        run = token_ids[start : start + count]
        if len(run) < count or not bool((run == run[0]).all()):
            raise InputError(
                f"image or video {number} of the prompt has fewer than the {count} vision tokens "
                f"of its grid {(time, height, width)}: do not truncate inside a video; lower "
                "max_frames or max_pixels, or allow a longer prompt"
            )
        pieces.append((torch.arange(start - cursor) + position).expand(3, -1))
        position += start - cursor
        at_time = (torch.arange(time) * seconds * tokens_per_second).long()
        vision = torch.stack(
            torch.meshgrid(at_time, torch.arange(rows), torch.arange(columns), indexing="ij")
        )
        pieces.append(vision.reshape(3, -1) + position)
        position = int(pieces[-1].max()) + 1
        cursor = start + count
    if bool(is_vision[cursor:].any()):
        raise InputError(
            f"the prompt has more vision tokens than its {len(grids)} images and videos: "
            "remove image or video placeholders from the question's text"
        )
    pieces.append((torch.arange(len(token_ids) - cursor) + position).expand(3, -1))
    return torch.cat(pieces, dim=1)
