"""Generation in the training shards: no second copy of the weights, no resharding.

The prompts of a batch are computed once each, as one packed sequence, and cached once for all their
completions. A completion that has ended leaves the batch, so that it costs nothing more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from nemo_care.data.prompts import Prompt
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.groups.batch import Rows
from nemo_care.groups.group import Group
from nemo_care.megatron.cpu import compute_device
from nemo_care.models.decoding_cache import DecodingCache
from nemo_care.models.pipeline import forward_only
from nemo_care.models.precision import computing, decoding_multiple
from nemo_care.models.segments import PackedSegments, Segment
from nemo_care.models.video_language_model import ModelInputs, VideoLanguageModel
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.model import FP8Config
from nemo_care.rollouts.completions import completion_of
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.sampling import sample_tokens, uniform_numbers


class MegatronGenerator:
    """Samples from the model that is being trained, where it is."""

    def __init__(
        self,
        model: VideoLanguageModel,
        tokenizer: ChatTokenizer,
        ranks: Ranks,
        *,
        groups_per_batch: int,
        shared_prompt: bool = True,
        fp8: FP8Config | None = None,
    ) -> None:
        """`groups_per_batch` bounds the key-value cache: that many prompts, and G completions each.

        Without `shared_prompt` every completion computes and caches the prompt for itself. `fp8`
        says whether to sample in 8 bits (`rollout`); in bf16 else.
        """
        self.fp8 = fp8
        self.model = model
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.groups_per_batch = groups_per_batch
        self.shared_prompt = shared_prompt

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group per prompt; all ranks of the model replica call it with equal prompts."""
        groups: list[Group] = []
        with self.inference():
            for start in range(0, len(prompts), self.groups_per_batch):
                batch = prompts[start : start + self.groups_per_batch]
                groups.extend(self._generate_batch(batch, sampling))
        return groups

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without sequence parallelism, in the rollout's precision, and back."""
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
        decoding = Decoding(
            self.model,
            self.ranks,
            [prompt for prompt in prompts for _ in range(copies)],
            sampling.group_size // copies,
            sampling,
            self.tokenizer,
            multiple=decoding_multiple(self.fp8),
        )
        tokens, log_probs = decoding.run(uniforms)
        groups = []
        for number, prompt in enumerate(prompts):
            rows = range(number * sampling.group_size, (number + 1) * sampling.group_size)
            completions = [
                completion_of(tokens[row], log_probs[row], self.tokenizer) for row in rows
            ]
            groups.append(Group(prompt, completions))
        return groups

    def rest(self) -> None:
        """Nothing is held between rollouts."""

    def close(self) -> None:
        """Nothing to end."""


class Decoding:
    """B prompts with G completions each, decoded together: N = B * G rows."""

    def __init__(
        self,
        model: VideoLanguageModel,
        ranks: Ranks,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        tokenizer: ChatTokenizer,
        *,
        multiple: int = 1,
    ) -> None:
        """Nothing is computed yet; `run` does everything, or `prefill`, `choose` and `decode`.

        What the layers see is padded to a multiple of `multiple` tokens.
        """
        self.multiple = multiple
        self.model = model
        self.ranks = ranks
        self.prompts = prompts
        self.group_size = group_size
        self.sampling = sampling
        self.device = compute_device()
        self.eos = torch.tensor(sorted(tokenizer.eos_ids), device=self.device)
        self.pad_id = tokenizer.pad_id
        self.end_id = min(tokenizer.eos_ids, default=tokenizer.pad_id)
        self.packed = self._pack_prompts()
        self.cache = DecodingCache(self.packed, group_size, sampling.max_tokens)

    def run(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [N, C_max] (padding after the end) and log-probabilities float32 [N, C_max].

        `uniforms` [N, C_max] are the random numbers to sample with. Results are on the CPU.
        """
        uniforms = uniforms.to(self.device)
        count, longest = len(self.prompts) * self.group_size, self.sampling.max_tokens
        tokens = torch.full((count, longest), self.pad_id, device=self.device)
        log_probs = torch.zeros(count, longest, device=self.device)
        first = [prompt.continued_positions(1)[:, 0] for prompt in self.prompts]
        positions = torch.stack(first, dim=1).repeat_interleave(self.group_size, dim=1)
        positions = positions.to(self.device)
        # Rows that have not ended; the batch holds nothing else.
        rows = torch.arange(count, device=self.device)
        logits = self.prefill().repeat_interleave(self.group_size, dim=0)
        for step in range(longest):
            token, log_prob = self.choose(logits, uniforms[rows, step])
            tokens[rows, step], log_probs[rows, step] = token, log_prob
            going_on = (~torch.isin(token, self.eos)).nonzero()[:, 0]
            if not len(going_on) or step + 1 == longest:
                break
            if len(going_on) < len(rows):
                rows, token = rows[going_on], token[going_on]
                positions = positions[:, going_on]
                self.cache.keep(going_on)
            logits = self.decode(token, positions + step)
        return tokens.cpu(), log_probs.cpu()

    def _pack_prompts(self) -> PackedSegments:
        segments, end = [], 0
        for prompt in self.prompts:
            segments.append(Segment(end, end + prompt.length))
            end += prompt.length
        return PackedSegments(
            segments=tuple(segments), length=self._padded(end), device=self.device
        )

    def _padded(self, tokens: int) -> int:
        return -(-tokens // self.multiple) * self.multiple

    def prefill(self) -> torch.Tensor:
        """Compute the prompts; logits float32 [B, V] of their completions' first token."""
        behind = (0, self.packed.length - self.packed.used)
        ids = torch.cat([prompt.token_ids for prompt in self.prompts])
        positions = torch.cat([prompt.position_ids for prompt in self.prompts], dim=1)
        is_vision = torch.cat([prompt.is_vision for prompt in self.prompts])
        rows = Rows(
            self.prompts,
            F.pad(ids, behind, value=self.pad_id)[None],
            F.pad(positions, behind)[:, None],
            F.pad(is_vision, behind)[None],
            self.cache,
        )
        last = [segment.stop - 1 for segment in self.packed.segments]
        logits = self._forward(rows.inputs(self.model), torch.tensor(last, device=self.device))
        self.cache.begin_decoding()
        return logits

    def decode(self, token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One token [R] of each row, at `positions` [3, R]; logits float32 [R, V] of the next."""
        behind = (0, self._padded(len(token)) - len(token))
        inputs = ModelInputs(
            token_ids=F.pad(token, behind, value=self.pad_id)[None],
            position_ids=F.pad(positions, behind)[:, None],
            packed=self.cache,
        )
        logits = self._forward(inputs, torch.arange(len(token), device=self.device))
        self.cache.advance()
        return logits

    def _forward(self, inputs: ModelInputs, places: torch.Tensor) -> torch.Tensor:
        """Logits float32 [N, V] at `places`; meaningful on the last stage only."""
        results = forward_only(
            self.model,
            [inputs],
            inputs_of=lambda inputs: inputs,
            result_of=lambda hidden, _: self.model.next_token_logits(hidden, places),
        )
        if self.ranks.is_last_stage:
            return results[0]
        return torch.zeros(len(places), self.model.vocab_size, device=self.device)

    def choose(
        self, logits: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token [R] and its log-probability [R], equal on all stages.

        Where the logits are not finite the token is EOS and its log-probability NaN.
        """
        token = torch.zeros(len(logits), dtype=torch.long, device=self.device)
        log_prob = torch.zeros(len(logits), device=self.device)
        if self.ranks.is_last_stage:
            token = sample_tokens(logits, uniforms, self.sampling.temperature, self.sampling.top_p)
            log_prob = torch.log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0]
            # Nothing can be sampled from logits that are not finite. The completion ends, and its
            # log-probability tells the update, which leaves the step out.
            token = torch.where(log_prob.isnan(), self.end_id, token)
        self.ranks.broadcast_from_last_stage(token)
        self.ranks.broadcast_from_last_stage(log_prob)
        return token, log_prob
