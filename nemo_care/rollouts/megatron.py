"""Generation in the training shards: no second copy of the weights, no resharding.

The prompts of a batch are computed once each, as one packed sequence (or, with pipeline stages, one
after another, so that no stage waits for all of them), and cached once for all their completions. A
completion that has ended leaves the batch; with `rollout.cuda_graphs` it stays, so that no shape
changes (`fixed_decoding.py`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from nemo_care.data.prompts import Prompt
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.groups.group import Group
from nemo_care.models.pipeline import accompany
from nemo_care.models.precision import computing, decoding_multiple
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.model import FP8Config
from nemo_care.rollouts.completions import completion_of
from nemo_care.rollouts.decoding import Decoding
from nemo_care.rollouts.fixed_decoding import FixedDecoding
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.sampling import uniform_numbers


class MegatronGenerator:
    """Samples from the shards of the model that is being trained."""

    def __init__(
        self,
        model: VideoLanguageModel,
        tokenizer: ChatTokenizer,
        ranks: Ranks,
        *,
        groups_per_batch: int,
        shared_prompt: bool = True,
        fp8: FP8Config | None = None,
        cuda_graphs: bool = False,
        records_routing: bool = False,
    ) -> None:
        """Sample `groups_per_batch` prompts together, which bounds the key-value cache.

        Without `shared_prompt` every completion computes and caches the prompt for itself. With
        `fp8` and its `rollout`, it samples in 8 bits. `cuda_graphs`: in steps of one shape, which
        CUDA can replay. `records_routing`: groups have the experts of their tokens, if the model
        has experts.
        """
        self.decoding: type[Decoding] = FixedDecoding if cuda_graphs else Decoding
        self.fp8 = fp8
        self.model = model
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.groups_per_batch = groups_per_batch
        self.shared_prompt = shared_prompt
        self.records_routing = records_routing

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group per prompt; all ranks of the replica call it with equal prompts.

        Replicas that share experts call it equally often, also without prompts.
        """
        groups: list[Group] = []
        with self.inference():
            for start in range(0, len(prompts), self.groups_per_batch):
                batch = prompts[start : start + self.groups_per_batch]
                groups.extend(self._generate_batch(batch, sampling))
            accompany(self.model)
        return groups

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Compute without sequence parallelism, in evaluation mode and the rollout's precision."""
        was_training = self.model.training
        rollout = self.fp8 is not None and self.fp8.rollout
        self.model.eval()
        try:
            with (
                self.model.without_sequence_parallel(),
                computing(self.model.config, fp8=rollout),
                torch.no_grad(),
            ):
                yield
        finally:
            self.model.train(was_training)

    def _generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        copies = 1 if self.shared_prompt else sampling.group_size
        uniforms = uniform_numbers(
            sampling.seed,
            [prompt.index for prompt in prompts],
            sampling.group_size,
            sampling.max_tokens,
        )
        decoding = self.decoding(
            self.model,
            self.ranks,
            [prompt for prompt in prompts for _ in range(copies)],
            sampling.group_size // copies,
            sampling,
            self.tokenizer,
            multiple=decoding_multiple(self.fp8),
            records_routing=self.records_routing,
        )
        tokens, log_probs = decoding.run(uniforms)
        of_prompts: Sequence[torch.Tensor | None] = [None] * len(prompts) * copies
        routing: Sequence[torch.Tensor | None] | torch.Tensor = [None] * len(tokens)
        if decoding.record:
            of_prompts, routing = decoding.record.results()
        completions = [
            completion_of(token_ids, values, self.tokenizer, experts)
            for token_ids, values, experts in zip(tokens, log_probs, routing, strict=True)
        ]
        size = sampling.group_size
        return [
            Group(
                prompt,
                completions[number * size : (number + 1) * size],
                prompt_routing=of_prompts[number * copies],
            )
            for number, prompt in enumerate(prompts)
        ]

    def rest(self) -> None:
        """Do nothing: nothing is kept between rollouts."""

    def close(self) -> None:
        """Do nothing: no process was started."""
