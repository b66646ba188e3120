import pytest
import torch

from nemo_care.errors import InputError
from nemo_care.models.families.positions import mrope_positions

TEXT, IMAGE, VIDEO = 1, 2, 3


def positions(token_ids, grids, seconds, **options):
    return mrope_positions(
        torch.tensor(token_ids),
        grids,
        seconds,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **options,
    ).tolist()


def test_text_only_counts_up_on_every_axis():
    assert positions([TEXT] * 4, [], []) == [[0, 1, 2, 3]] * 3


def test_text_after_an_image_starts_after_its_larger_side():
    token_ids = [TEXT, TEXT, *[IMAGE] * 6, TEXT, TEXT]
    assert positions(token_ids, [(1, 4, 6)], [0.0]) == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_text_after_a_short_video_starts_after_its_larger_side():
    token_ids = [TEXT, *[VIDEO] * 6, TEXT]
    assert positions(token_ids, [(1, 4, 6)], [1.0]) == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]


def test_text_after_a_long_video_starts_after_its_last_frame():
    token_ids = [TEXT, *[VIDEO] * 8, TEXT, TEXT]
    assert positions(token_ids, [(4, 2, 4)], [1.0]) == [
        [0, 1, 1, 3, 3, 5, 5, 7, 7, 8, 9],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 8, 9],
        [0, 1, 2, 1, 2, 1, 2, 1, 2, 8, 9],
    ]


@pytest.mark.parametrize(
    ("seconds", "time_axis", "after"),
    [
        (0.5, [1, 2, 3, 4], 5),
        (1.0, [1, 3, 5, 7], 8),
        # 1.7 s are 3.4 positions, cut off: 0, 3.4, 6.8, 10.2.
        (1.7, [1, 4, 7, 11], 12),
        (0.2, [1, 1, 1, 2], 3),
    ],
)
def test_time_positions_follow_the_seconds_per_grid(seconds, time_axis, after):
    found = positions([TEXT, *[VIDEO] * 4, TEXT], [(4, 2, 2)], [seconds])
    assert found == [[0, *time_axis, after], [0, 1, 1, 1, 1, after], [0, 1, 1, 1, 1, after]]


def test_an_image_and_a_video_are_placed_one_after_the_other():
    token_ids = [TEXT, IMAGE, IMAGE, TEXT, *[VIDEO] * 3, TEXT]
    assert positions(token_ids, [(1, 2, 4), (3, 2, 2)], [0.0, 1.0]) == [
        [0, 1, 1, 3, 4, 6, 8, 9],
        [0, 1, 1, 3, 4, 4, 4, 9],
        [0, 1, 2, 3, 4, 4, 4, 9],
    ]


def test_adjacent_videos_are_told_apart_by_their_grids():
    found = positions([*[VIDEO] * 4, TEXT], [(2, 2, 2), (2, 2, 2)], [1.0, 1.0])
    assert found[0] == [0, 2, 3, 5, 6]


def test_merge_size_and_tokens_per_second_come_from_the_model():
    found = positions([VIDEO] * 4 + [TEXT], [(2, 1, 2)], [1.0], merge_size=1, tokens_per_second=25)
    assert found == [[0, 0, 25, 25, 26], [0, 0, 0, 0, 26], [0, 1, 0, 1, 26]]


@pytest.mark.parametrize(
    ("token_ids", "grids"),
    [
        ([TEXT, VIDEO, VIDEO], [(3, 2, 2)]),  # cut off inside the video
        ([TEXT, VIDEO, VIDEO, TEXT], [(1, 2, 2)]),
        ([TEXT, VIDEO, IMAGE, TEXT], [(2, 2, 2)]),
        ([TEXT, TEXT], [(1, 2, 2)]),
        ([TEXT, VIDEO], []),
    ],
)
def test_vision_tokens_that_do_not_match_the_grids_are_refused(token_ids, grids):
    with pytest.raises(InputError, match="vision tokens"):
        positions(token_ids, grids, [1.0] * len(grids))


def test_a_missing_value_of_seconds_per_grid_is_refused():
    with pytest.raises(InputError, match="seconds per grid"):
        positions([VIDEO], [(1, 2, 2)], [])
