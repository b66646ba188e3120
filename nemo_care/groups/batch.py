"""One micro-batch of groups, as scoring and update see it, whatever its layout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nemo_care.data.patches import Patching
from nemo_care.data.prompts import Prompt
from nemo_care.groups.group import Group, known
from nemo_care.groups.routing import Span
from nemo_care.megatron.cpu import compute_device
from nemo_care.models.decoding_cache import DecodingCache
from nemo_care.models.frames import patches_on_device
from nemo_care.models.segments import PackedSegments
from nemo_care.models.video_language_model import ModelInputs, VideoLanguageModel


@dataclass(frozen=True)
class Rows:
    """The rows of a micro-batch in CPU memory: what `ModelInputs` are made of.

    `prompts` in the order in which their images and videos appear in the rows; a prompt may appear
    several times. The rest as in `ModelInputs`, with `is_vision` False everywhere where there are
    no vision tokens. `spans` are the prompts and completions in the rows, and nothing else.
    """

    prompts: Sequence[Prompt]
    token_ids: torch.Tensor
    position_ids: torch.Tensor
    is_vision: torch.Tensor
    packed: PackedSegments | DecodingCache | None = None
    spans: Sequence[Span] = ()

    def inputs(self, model: VideoLanguageModel) -> ModelInputs:
        """The inputs of this rank's stage, on the compute device.

        The first stage cuts its patches now: call this when the micro-batch is computed, or the
        patches of all micro-batches are in memory together. All tensor-parallel ranks call it
        alike (see `patches_on_device`).

        Raises:
            ValueError: a prompt's frames were not decoded.
        """
        device = compute_device()
        seen = [p for p in self.prompts if p.grid_thw is not None] if model.pre_process else []
        inputs = ModelInputs(
            token_ids=self.token_ids.to(device),
            position_ids=self.position_ids.to(device),
            vision_places=self._vision_places().to(device) if seen else None,
            packed=self.packed,
        )
        if not seen:
            return inputs
        if "vision" in model.frozen:
            return replace(inputs, vision_states=_vision_states(seen, model, inputs))
        return _with_patches(inputs, seen, model.patching)

    def _vision_places(self) -> torch.Tensor:
        rows, columns = self.is_vision.nonzero(as_tuple=True)
        return columns * len(self.is_vision) + rows


def _with_patches(
    inputs: ModelInputs, prompts: Sequence[Prompt], patching: Patching
) -> ModelInputs:
    """The inputs with the patches of these prompts, each of which is cut once."""
    seen = {id(p): p for p in prompts}
    for prompt in seen.values():
        if len(prompt.frames) != len(known(prompt.grid_thw)):
            raise ValueError(f"the frames of prompt {prompt.index} were not decoded")
    cut = patches_on_device([prompt.frames for prompt in seen.values()], patching)
    of_prompt = dict(zip(seen, cut, strict=True))
    parts = [of_prompt[id(p)] for p in prompts]
    return replace(
        inputs,
        pixel_values=parts[0] if len(parts) == 1 else torch.cat(parts),
        grid_thw=torch.cat([known(p.grid_thw) for p in prompts]).to(inputs.token_ids.device),
    )


def _vision_states(
    prompts: Sequence[Prompt], model: VideoLanguageModel, inputs: ModelInputs
) -> torch.Tensor:
    """What the frozen vision tower makes of these prompts: computed once for each of them.

    It stays with a prompt if the model says so: rollout, scoring and update then share it.
    """
    states = {id(p): p.vision_states for p in prompts}
    new = list({id(p): p for p in prompts if p.vision_states is None}.values())
    if new:
        computed = model.frozen_vision(_with_patches(inputs, new, model.patching))
        counts = [int(prompt.is_vision.sum()) for prompt in new]
        for prompt, part in zip(new, computed.split(counts), strict=True):
            # Of its own memory, which is freed with the prompt.
            states[id(prompt)] = part.clone() if len(new) > 1 else part
            if model.keeps_vision:
                prompt.vision_states = states[id(prompt)]
    return torch.cat([known(states[id(p)]) for p in prompts])


@dataclass(frozen=True)
class AnswerPairs:
    """Every answer of a group placed after every reasoning of the same group.

    T tokens over all pairs: `token_ids` [T], `places` [T] (as in `GroupBatch`), and `pair` [T], the
    number of the pair: an index into the groups' G x G matrices (row: answer, column: reasoning),
    concatenated.
    """

    token_ids: torch.Tensor
    places: torch.Tensor
    pair: torch.Tensor


@dataclass
class GroupBatch:
    """The N completions of some groups, of at most C tokens, and the rows that hold them.

    `token_ids` [N, C] are the completions' tokens, `mask` bool [N, C] is True at each of them,
    `answer_mask` bool [N, C] at those of the answer. `places` [N, C] is where each token is
    predicted: s * B + b in the hidden states [S, B, H] that the model computes from the rows.
    """

    groups: Sequence[Group]
    rows: Rows
    token_ids: torch.Tensor
    mask: torch.Tensor
    answer_mask: torch.Tensor
    places: torch.Tensor
    pairs: AnswerPairs | None = None

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        rows: Rows,
        places: Sequence[torch.Tensor],
        pairs: AnswerPairs | None = None,
    ) -> "GroupBatch":
        """Build the batch of these groups; `places` are one vector [C_i] per completion."""
        completions = [completion for group in groups for completion in group.completions]
        width = max(completion.length for completion in completions)
        mask = [torch.ones(completion.length, dtype=torch.bool) for completion in completions]
        answers = [torch.zeros(completion.length, dtype=torch.bool) for completion in completions]
        for row, completion in zip(answers, completions, strict=True):
            if completion.answer_span is not None:
                row[slice(*completion.answer_span)] = True
        device = compute_device()
        return cls(
            groups=groups,
            rows=rows,
            token_ids=_pad_rows([c.token_ids for c in completions], width).to(device),
            mask=_pad_rows(mask, width).to(device),
            answer_mask=_pad_rows(answers, width).to(device),
            places=_pad_rows(places, width).to(device),
            pairs=pairs,
        )

    def asked_of_reference(self, *, all_tokens: bool) -> torch.Tensor:
        """Return which tokens the reference scores, bool [N, C]: answers, or all with a KL term."""
        return self.mask if all_tokens else self.answer_mask

    def log_probs(
        self, model: VideoLanguageModel, hidden: torch.Tensor, where: torch.Tensor
    ) -> torch.Tensor:
        """Return log-probabilities of the tokens in `where` (bool [N, C]), float32 [N, C].

        Zero elsewhere. `hidden` is the model's output for the rows; differentiable. The output
        layer runs only on the positions needed.
        """
        values = model.token_log_probs(hidden, self.places[where], self.token_ids[where])
        return torch.zeros(where.shape, device=values.device).masked_scatter(where, values)

    def pair_likelihoods(
        self, model: VideoLanguageModel, hidden: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the likelihood of each answer under each reasoning: float32 [G, G] per group.

        Row i, column j: exp(mean log-probability of the tokens of answer i after reasoning j); NaN
        if either completion has no answer, or their opening tags can't be cut at the same place.

        Raises:
            ValueError: the batch has no answer pairs.
        """
        if self.pairs is None:
            raise ValueError("this batch was laid out without answer pairs")
        log_probs = model.token_log_probs(hidden, self.pairs.places, self.pairs.token_ids)
        squares = [group.size**2 for group in self.groups]
        total, count = torch.zeros(2, sum(squares), device=log_probs.device)
        total.index_add_(0, self.pairs.pair, log_probs)
        count.index_add_(0, self.pairs.pair, torch.ones_like(log_probs))
        # 0 / 0 gives the NaN of a pair that does not exist.
        means = torch.exp(total / count).split(squares)
        return [part.view(group.size, -1) for part, group in zip(means, self.groups, strict=True)]

    def rollout_log_probs(self) -> torch.Tensor:
        """The log-probability of each token in the generator, float32 [N, C], zero-padded."""
        return self.padded([[c.log_probs for c in group.completions] for group in self.groups])

    def staleness(self) -> torch.Tensor:
        """The `Group.staleness` of each completion, int64 [N]."""
        values = [group.staleness for group in self.groups for _ in group.completions]
        if not any(values):  # Usual, and then nothing is copied to the device.
            return torch.zeros(len(values), dtype=torch.int64, device=self.mask.device)
        return torch.tensor(values, device=self.mask.device)

    def ended(self) -> torch.Tensor:
        """Whether each completion ended within its token limit, bool [N]."""
        ended = [completion.ended for group in self.groups for completion in group.completions]
        return torch.tensor(ended, device=self.mask.device)

    def advantages(self) -> torch.Tensor:
        """The advantage of each completion, float32 [N]."""
        return torch.cat([known(group.advantage) for group in self.groups]).to(self.mask.device)

    def padded(self, per_group: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Return per-completion vectors [C_i] of each group as float32 [N, C], zero-padded."""
        vectors = [vector for vectors in per_group for vector in vectors]
        return _pad_rows(vectors, self.mask.shape[1]).to(self.mask.device)

    def unpadded(self, values: torch.Tensor) -> list[list[torch.Tensor]]:
        """Invert `padded`: return [N, C] as per-completion vectors of each group, on the CPU."""
        values = values.detach().float().cpu()
        rows = iter(values)
        return [
            [next(rows)[: completion.length].clone() for completion in group.completions]
            for group in self.groups
        ]


def _pad_rows(rows: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Stack vectors [C_i] into one tensor [N, width] of their type, zero-padded."""
    out = torch.zeros(len(rows), width, dtype=rows[0].dtype)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out
