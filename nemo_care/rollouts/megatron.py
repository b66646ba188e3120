"""Generation in the training shards: no second copy of the weights, no resharding.

Prompts of a batch are padded on the left, so that all completions start at the same column. The
prompt is computed once per group; its key-value cache is then expanded to the G completions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from nemo_care.data.prompts import Prompt
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.models.pipeline import forward_only
from nemo_care.models.qwen2_5_vl import ModelInputs, Qwen25VL
from nemo_care.parallel.cpu_compat import compute_device
from nemo_care.parallel.process_groups import Ranks
from nemo_care.rollouts.answer_span import answer_token_span
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.group import Completion, Group
from nemo_care.rollouts.sampling import sample_tokens, uniform_numbers


class MegatronGenerator:
    """Samples from the model that is being trained, where it is."""

    def __init__(
        self, model: Qwen25VL, tokenizer: ChatTokenizer, ranks: Ranks, *, groups_per_batch: int
    ) -> None:
        """`groups_per_batch` bounds the key-value cache: that many prompts times G rows."""
        self.model = model
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.groups_per_batch = groups_per_batch

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group per prompt; all ranks of the model replica call it with equal prompts."""
        groups: list[Group] = []
        with self._inference():
            for start in range(0, len(prompts), self.groups_per_batch):
                batch = prompts[start : start + self.groups_per_batch]
                groups.extend(self._generate_batch(batch, sampling))
        return groups

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode without sequence parallelism, and back."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self.model.without_sequence_parallel(), torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def _generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        decoding = _Decoding(self.model, self.ranks, prompts, sampling, self.tokenizer)
        tokens, log_probs = decoding.run()
        groups = []
        for number, prompt in enumerate(prompts):
            rows = range(number * sampling.group_size, (number + 1) * sampling.group_size)
            completions = [self._completion(tokens[row], log_probs[row]) for row in rows]
            groups.append(Group(prompt, completions))
        return groups

    def _completion(self, tokens: torch.Tensor, log_probs: torch.Tensor) -> Completion:
        """Cut a row [C_max] after its EOS."""
        ids = tokens.tolist()
        end = next((at for at, token in enumerate(ids) if token in self.tokenizer.eos_ids), None)
        length = len(ids) if end is None else end + 1
        return Completion(
            token_ids=tokens[:length].clone(),
            log_probs=log_probs[:length].clone(),
            text=self.tokenizer.completion_text(ids[:length]),
            ended=end is not None,
            answer_span=answer_token_span(self.tokenizer.base, ids[:length]),
        )


class _Decoding:
    """One batch of B prompts with G completions each, decoded together: N = B * G rows."""

    def __init__(
        self,
        model: Qwen25VL,
        ranks: Ranks,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        tokenizer: ChatTokenizer,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.prompts = prompts
        self.sampling = sampling
        self.device = compute_device()
        self.eos = torch.tensor(sorted(tokenizer.eos_ids), device=self.device)
        self.pad_id = tokenizer.pad_id
        self.width = max(prompt.length for prompt in prompts)
        self.rows = len(prompts) * sampling.group_size
        self.context = StaticInferenceContext(self.rows, self.width + sampling.max_tokens)
        self.uniforms = uniform_numbers(
            sampling.seed,
            [prompt.index for prompt in prompts],
            sampling.group_size,
            sampling.max_tokens,
        ).to(self.device)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [N, C_max] and their log-probabilities float32 [N, C_max], on the CPU."""
        group_size = self.sampling.group_size
        prompt_inputs, visible, positions = self._left_padded_prompts()
        logits = self._forward(prompt_inputs, advance=self.width)
        self._expand_cache(group_size)
        logits = logits.repeat_interleave(group_size, dim=0)
        positions = positions.repeat_interleave(group_size, dim=1)
        visible = visible.repeat_interleave(group_size, dim=0)
        ended = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        tokens, log_probs = [], []
        for step in range(self.sampling.max_tokens):
            token, log_prob = self._choose(logits, step, ended)
            tokens.append(token)
            log_probs.append(log_prob)
            ended |= torch.isin(token, self.eos)
            if bool(ended.all()) or step + 1 == self.sampling.max_tokens:
                break
            # The cache holds keys without rotary embedding, so the positions of the whole
            # sequence so far go in at every step.
            positions = self._next_positions(positions)
            visible = torch.nn.functional.pad(visible, (0, 1), value=True)
            inputs = ModelInputs(
                token_ids=token[:, None],
                position_ids=positions,
                attention_mask=None if bool(visible.all()) else visible[:, None, None, :],
            )
            logits = self._forward(inputs, advance=1)
        return torch.stack(tokens, dim=1).cpu(), torch.stack(log_probs, dim=1).cpu()

    def _left_padded_prompts(self) -> tuple[ModelInputs, torch.Tensor, torch.Tensor]:
        """Inputs of the prefill, visible keys [B, P_max] and positions [3, B, P_max]."""
        count, width = len(self.prompts), self.width
        ids = torch.full((count, width), self.pad_id)
        positions = torch.zeros(3, count, width, dtype=torch.long)
        visible = torch.zeros(count, width, dtype=torch.bool)
        is_vision = torch.zeros(count, width, dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            start = width - prompt.length
            ids[row, start:] = prompt.token_ids
            positions[:, row, start:] = prompt.position_ids
            visible[row, start:] = True
            is_vision[row, start:] = prompt.is_vision
        mask = None
        if not bool(visible.all()):
            causal = torch.ones(width, width, dtype=torch.bool).tril()
            # A padding token sees itself, because a row without any key would give NaN.
            itself = torch.eye(width, dtype=torch.bool)
            mask = ((causal & visible[:, None, :]) | itself)[:, None].to(self.device)
        pixels = [p.pixel_values for p in self.prompts if p.pixel_values is not None]
        grids = [p.grid_thw for p in self.prompts if p.grid_thw is not None]
        inputs = ModelInputs(
            token_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            pixel_values=torch.cat(pixels).to(self.device) if pixels else None,
            grid_thw=torch.cat(grids).to(self.device) if grids else None,
            is_vision=is_vision.to(self.device) if pixels else None,
            attention_mask=mask,
        )
        return inputs, visible.to(self.device), inputs.position_ids

    def _next_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Append one text position per row: one after the largest on any axis."""
        following = positions.amax(dim=(0, 2)) + 1
        return torch.cat([positions, following.expand(3, -1).unsqueeze(-1)], dim=2)

    def _forward(self, inputs: ModelInputs, advance: int) -> torch.Tensor:
        """Logits of the last position, float32 [rows, V]; meaningful on the last stage only."""
        results = forward_only(
            self.model,
            [inputs],
            inputs_of=lambda inputs: inputs,
            result_of=lambda logits, _: logits,
            inference_context=self.context,
        )
        self.context.sequence_len_offset += advance
        vocabulary = self.model.vocab_size
        if self.ranks.is_last_stage:
            return results[0][:, -1, :vocabulary].float()
        return torch.zeros(len(inputs.token_ids), vocabulary, device=self.device)

    def _expand_cache(self, group_size: int) -> None:
        """Repeat the prompts' keys and values for the completions of each group."""
        prompts, width = len(self.prompts), self.width
        for memories in self.context.key_value_memory_dict.values():
            for memory in memories:  # [S_max, N, key-value heads, head_dim]
                memory[:width] = memory[:width, :prompts].repeat_interleave(group_size, dim=1)
        self.context.enable_decode_mode()

    def _choose(
        self, logits: torch.Tensor, step: int, ended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token [N] and its log-probability [N]; padding after the end."""
        token = torch.full((self.rows,), self.pad_id, device=self.device)
        log_prob = torch.zeros(self.rows, device=self.device)
        if self.ranks.is_last_stage:
            sampled = sample_tokens(
                logits, self.uniforms[:, step], self.sampling.temperature, self.sampling.top_p
            )
            scored = torch.log_softmax(logits, dim=-1).gather(-1, sampled[:, None])[:, 0]
            token = torch.where(ended, token, sampled)
            log_prob = torch.where(ended, log_prob, scored)
        self.ranks.broadcast_from_last_stage(token)
        self.ranks.broadcast_from_last_stage(log_prob)
        return token, log_prob
