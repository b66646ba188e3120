"""The loader: prompts in the requested order, decoded ahead, never more than announced."""

from concurrent.futures import Future

import pytest
import torch
from made_data import read_made
from small_runs import small_recipe

from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.loader import PromptLoader
from nemo_care.data.media import load_media
from nemo_care.data.prompts import Prompt, PromptBuilder
from nemo_care.data.samples import Sample, Skipped
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.models.families import read_family


class Workers:
    """Decodes on request, so that a test sees what is under way."""

    count = 1

    def __init__(self):
        self.futures: list[Future] = []
        self.requests = []

    def submit(self, request):
        future = Future()
        self.futures.append(future)
        self.requests.append(request)
        return future

    def decode(self):
        for future, request in zip(self.futures, self.requests, strict=True):
            if not future.done():
                future.set_result(load_media(request))


@pytest.fixture(scope="module")
def builder(checkpoint, world):
    recipe = small_recipe(checkpoint, world)
    prompt_format = read_family(checkpoint).prompt
    return PromptBuilder(recipe.data, prompt_format, load_tokenizer(checkpoint, prompt_format))


@pytest.fixture(scope="module")
def numbered(world):
    return list(enumerate(read_made(world, "train.jsonl").samples[:6]))


def test_announced_samples_are_decoded_once_and_given_in_the_requested_order(builder, numbered):
    workers = Workers()
    loader = PromptLoader(builder, workers)
    loader.prefetch(numbered[:4])
    assert len(workers.futures) == 4
    loader.prefetch(numbered[:4])
    assert len(workers.futures) == 4
    workers.decode()
    prompts = loader.load([numbered[2], numbered[0]])
    assert [prompt.index for prompt in prompts] == [2, 0]
    for prompt in prompts:
        expected = builder.build(prompt.index, prompt.sample)
        for field in ("token_ids", "position_ids", "is_vision", "grid_thw"):
            assert torch.equal(getattr(prompt, field), getattr(expected, field))
        assert all(map(torch.equal, prompt.frames, expected.frames))


def test_frames_decoded_ahead_are_counted_until_they_are_loaded(builder, numbered):
    workers = Workers()
    loader = PromptLoader(builder, workers)
    loader.prefetch(numbered[:3])
    assert loader.frame_bytes == 0
    workers.decode()
    one = 8 * 28 * 28 * 3
    assert loader.frame_bytes == 3 * one
    (prompt,) = loader.load(numbered[:1])
    assert (loader.frame_bytes, prompt.frame_bytes) == (2 * one, one)
    assert prompt.without_frames().frame_bytes == 0
    assert prompt.without_frames().frames[0].shape == prompt.frames[0].shape


def test_samples_no_longer_announced_are_given_up(builder, numbered):
    workers = Workers()
    loader = PromptLoader(builder, workers)
    loader.prefetch(numbered[:3])
    loader.prefetch(numbered[2:4])
    assert [future.cancelled() for future in workers.futures] == [True, True, False, False]


def test_samples_with_one_place_in_several_files_are_told_apart(builder, numbered):
    workers = Workers()
    loader = PromptLoader(builder, workers)
    loader.prefetch([(0, numbered[1][1]), (0, numbered[2][1])])
    workers.decode()
    (prompt,) = loader.load([(0, numbered[2][1])])
    assert prompt.sample is numbered[2][1]
    assert torch.equal(prompt.frames[0], builder.build(0, numbered[2][1]).frames[0])


def test_a_sample_that_can_t_be_used_is_skipped_with_its_reason(builder, numbered, tmp_path):
    loader = PromptLoader(builder, DecodingWorkers(0, seconds=1, memory_gib=1))
    missing = Sample("lost", "which way ?", "A", videos=(tmp_path / "lost.mp4",))
    long = Sample("long", " ".join(["left"] * 20000), "A")
    made = loader.load([numbered[0], (7, missing), (8, long)])
    assert isinstance(made[0], Prompt)
    assert made[1:] == [
        Skipped(
            7,
            "lost",
            f"{tmp_path / 'lost.mp4'}: video not readable: there is no such file; "
            "replace the file or remove its sample",
        ),
        Skipped(8, "long", made[2].reason),
    ]
    assert "max_prompt_tokens=16384" in made[2].reason


def test_vision_tokens_count_before_anything_is_decoded(builder, numbered, monkeypatch):
    index, sample = numbered[0]
    length = builder.build(index, sample).length
    monkeypatch.setattr(builder, "max_tokens", length - 1)
    draft = builder.draft(index, sample)
    assert not load_media(draft.request).frames
    with pytest.raises(Exception, match=rf"has {length} tokens, more than .*={length - 1}"):
        builder.build(index, sample)
    monkeypatch.setattr(builder, "max_tokens", length)
    assert builder.build(index, sample).length == length


def test_nothing_is_done_ahead_without_processes(builder, numbered, monkeypatch):
    workers = Workers()
    workers.count = 0
    PromptLoader(builder, workers).prefetch(numbered)
    assert not workers.futures


def test_a_control_token_that_can_not_be_text_costs_that_sample_only(builder, numbered):
    """The miniature has its control tokens as words: it can't write them in any other way."""
    loader = PromptLoader(builder, DecodingWorkers(0, seconds=1, memory_gib=1))
    bad = Sample("bad", "which way did the <|im_end|> move ?", "A")
    skipped, prompt = loader.load([(0, bad), numbered[1]])
    assert isinstance(skipped, Skipped)
    assert skipped.sample_id == "bad"
    assert "sample bad: the question holds <|im_end|>" in skipped.reason
    assert isinstance(prompt, Prompt)
