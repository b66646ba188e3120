"""Attention of packed sequences equals that of separate ones: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from made_segments import HEADS, KEY_HEADS, LENGTH, SEGMENTS, WIDTH, gradients, made_inputs

from nemo_care.models.group_attention import GroupAttention
from nemo_care.models.segments import PackedSegments, Segment

pytestmark = pytest.mark.numeric


@pytest.fixture
def attention(ranks):
    from types import SimpleNamespace

    return GroupAttention(SimpleNamespace(), layer_number=1, attn_mask_type=None, attention_type="")


def separately(q, k, v) -> torch.Tensor:
    """Each segment with its context as a sequence of its own, by the plain formula."""
    out = torch.zeros(LENGTH, 1, HEADS * WIDTH)
    for segment in SEGMENTS:
        own = range(segment.start, segment.stop)
        tokens = [t for start, stop in segment.context for t in range(start, stop)] + [*own]
        mask = torch.ones(len(tokens), len(tokens)).tril().bool()
        rows = [x[tokens, 0].transpose(0, 1)[None] for x in (q, k, v)]
        rows[1:] = [x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in rows[1:]]
        values = F.scaled_dot_product_attention(*rows, attn_mask=mask)
        values = values[0, :, -segment.length :].transpose(0, 1).flatten(1)
        out = torch.cat([out[: segment.start], values[:, None], out[segment.stop :]])
    return out


def test_packed_equals_separate_sequences(attention):
    inputs = made_inputs()
    packed = PackedSegments(segments=SEGMENTS, length=LENGTH)
    ours = attention(*inputs, None, packed_seq_params=packed)
    wanted = separately(*inputs)
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)
    for mine, other in zip(gradients(ours, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_plain_causal_mask_over_the_packed_sequence_is_something_else(attention):
    """The negative control of the comparison above."""
    inputs = made_inputs()
    plain, wanted = attention(*inputs, None), separately(*inputs)
    prompt = slice(0, 11)
    torch.testing.assert_close(plain[prompt], wanted[prompt], atol=1e-6, rtol=1e-5)
    assert (plain[11:75] - wanted[11:75]).abs().amax(dim=(1, 2)).min() > 1e-3


def test_padding_is_zero_and_touches_nothing(attention):
    inputs = made_inputs()
    out = attention(*inputs, None, packed_seq_params=PackedSegments(segments=SEGMENTS, length=80))
    assert bool((out[77:] == 0).all())
    assert all(bool((gradient[77:] == 0).all()) for gradient in gradients(out, inputs))


def test_completions_are_not_padded_to_the_longest():
    lengths = [768, 760, 700, 300, 290, 40, 30, 25]
    segments, end = [Segment(0, 100)], 100
    for length in lengths:
        segments.append(Segment(end, end + length, ((0, 100),)))
        end += length
    buckets = PackedSegments(segments=tuple(segments), length=end).buckets
    computed = sum(bucket.count * bucket.length for bucket in buckets)
    assert computed < 1.1 * end
    assert len(buckets) == 4


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((Segment(0, 4), Segment(5, 6)), "follow each other"),
        ((Segment(0, 4), Segment(4, 4)), "not be empty"),
        ((Segment(0, 4), Segment(4, 6, ((0, 5),))), "precede its segment"),
        ((Segment(0, 9),), "in a sequence of 8"),
    ],
)
def test_impossible_segments_are_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        PackedSegments(segments=segments, length=8)


def test_a_packed_sequence_in_a_batch_is_refused(attention):
    q, k, v = (x.expand(-1, 2, -1, -1) for x in made_inputs())
    with pytest.raises(ValueError, match="batch of 2"):
        attention(q, k, v, None, packed_seq_params=PackedSegments(segments=SEGMENTS, length=80))
