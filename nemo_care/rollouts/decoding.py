"""Sample token after token, for several prompts with several completions each."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from nemo_care.data.prompts import Prompt
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.groups.batch import Rows
from nemo_care.megatron.cpu import compute_device
from nemo_care.models.decoding_cache import DecodingCache, PromptPass
from nemo_care.models.pipeline import forward_only
from nemo_care.models.video_language_model import ModelInputs, VideoLanguageModel
from nemo_care.ranks.process_groups import Ranks
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.routing_record import RoutingRecord
from nemo_care.rollouts.sampling import sample_tokens


class Decoding:
    """B prompts with G completions each, decoded together: N = B * G rows."""

    fixed = False

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
        records_routing: bool = False,
    ) -> None:
        """Compute nothing yet; `run` does everything, or `prefill`, `choose` and `decode`.

        The inputs of the layers are padded to a multiple of `multiple` tokens. With
        `records_routing`, `run` fills the `record` of a model with experts.
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
        rows = len(prompts) * group_size
        self.record = RoutingRecord(rows, sampling.max_tokens) if records_routing else None
        self.cache = DecodingCache(
            [prompt.length for prompt in prompts],
            group_size,
            sampling.max_tokens,
            device=self.device,
            multiple=multiple,
            apart=ranks.layout.pipeline > 1,
            fixed=self.fixed,
        )

    def run(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens [N, C_max] (padded after the end) and log-probabilities float32 [N, C_max].

        `uniforms` [N, C_max] are the random numbers to sample with. Results are on the CPU.
        """
        uniforms = uniforms.to(self.device)
        tokens, log_probs = self._results()
        positions = self._first_positions()
        count, longest = tokens.shape
        # Rows that have not ended; the batch contains only these.
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
            if self.record:
                self.record.add_tokens(rows, step)
        return tokens.cpu(), log_probs.cpu()

    def _results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and log-probabilities [N, C_max] before any is sampled."""
        shape = (len(self.prompts) * self.group_size, self.sampling.max_tokens)
        tokens = torch.full(shape, self.pad_id, device=self.device)
        return tokens, torch.zeros(shape, device=self.device)

    def _first_positions(self) -> torch.Tensor:
        """Return positions [3, N] of each completion's first token."""
        first = [prompt.continued_positions(1)[:, 0] for prompt in self.prompts]
        positions = torch.stack(first, dim=1).repeat_interleave(self.group_size, dim=1)
        return positions.to(self.device)

    def _padded(self, tokens: int) -> int:
        return -(-tokens // self.multiple) * self.multiple

    def prefill(self) -> torch.Tensor:
        """Compute the prompts; return logits float32 [B, V] of their completions' first token."""
        passes = self.cache.passes()
        logits = forward_only(
            self.model,
            passes,
            inputs_of=self._prompt_inputs,
            result_of=lambda hidden, packed: self.model.next_token_logits(
                hidden,
                torch.tensor([s.stop - 1 for s in packed.segments], device=self.device),
            ),
        )
        if self.record:
            self.record.add_prompts(passes)
        return torch.cat(logits) if logits else self._no_logits(len(self.prompts))

    def _prompt_inputs(self, packed: PromptPass) -> ModelInputs:
        prompts = self.prompts[packed.first : packed.first + len(packed.segments)]
        padding = (0, packed.length - packed.used)
        ids = torch.cat([prompt.token_ids for prompt in prompts])
        positions = torch.cat([prompt.position_ids for prompt in prompts], dim=1)
        is_vision = torch.cat([prompt.is_vision for prompt in prompts])
        rows = Rows(
            prompts,
            F.pad(ids, padding, value=self.pad_id)[None],
            F.pad(positions, padding)[:, None],
            F.pad(is_vision, padding)[None],
            packed,
        )
        return self._recorded(rows.inputs(self.model))

    def decode(self, token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Compute a token [R] of each row at `positions` [3, R]; return the next logits [R, V]."""
        logits = forward_only(
            self.model,
            [self._recorded(self._token_inputs(token, positions))],
            inputs_of=lambda inputs: inputs,
            result_of=lambda hidden, _: self._row_logits(hidden, len(token)),
        )
        self.cache.advance()
        return logits[0] if logits else self._no_logits(len(token))

    def _token_inputs(self, token: torch.Tensor, positions: torch.Tensor) -> ModelInputs:
        padding = (0, self._padded(len(token)) - len(token))
        return ModelInputs(
            token_ids=F.pad(token, padding, value=self.pad_id)[None],
            position_ids=F.pad(positions, padding)[:, None],
            packed=self.cache,
        )

    def _recorded(self, inputs: ModelInputs) -> ModelInputs:
        return self.record.recorded(inputs) if self.record else inputs

    def _row_logits(self, hidden: torch.Tensor, rows: int) -> torch.Tensor:
        return self.model.next_token_logits(hidden, torch.arange(rows, device=self.device))

    def _no_logits(self, rows: int) -> torch.Tensor:
        """Return what stages other than the last have instead of logits [rows, V]."""
        return torch.zeros(rows, self.model.vocab_size, device=self.device)

    def choose(
        self, logits: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next tokens and their log-probabilities [R]; all ranks of the replica agree.

        One rank samples. If logits are not finite, the token is EOS and its log-probability NaN.
        """
        if self.ranks.is_loss_leader:
            token, log_prob = self._chosen(logits, uniforms)
        else:
            token = torch.zeros(len(logits), dtype=torch.long, device=self.device)
            log_prob = torch.zeros(len(logits), device=self.device)
        self.ranks.broadcast_from_loss_leader(token)
        self.ranks.broadcast_from_loss_leader(log_prob)
        return token, log_prob

    def _chosen(
        self, logits: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        token = sample_tokens(logits, uniforms, self.sampling.temperature, self.sampling.top_p)
        log_prob = torch.log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0]
        # Nothing can be sampled from logits that are not finite. The completion ends, and because
        # of its log-probability the update leaves the step out.
        return token.masked_fill(log_prob.isnan(), self.end_id), log_prob
