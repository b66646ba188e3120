"""A vision tower in front of Megatron's GPTModel: what the models of all families share.

The vision tower lives whole on every tensor-parallel rank of the first pipeline stage, and each of
them computes some of the frames (see `vision_dealing.py`). The language model is cut by Megatron.
Both are trained, except for the parts that `model.freeze` names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from nemo_care.data.patches import Patching
from nemo_care.megatron.experts import is_distributed_expert
from nemo_care.megatron.partial_gradients import mark_partial_gradient
from nemo_care.models.decoding_cache import DecodingCache
from nemo_care.models.deep_features import DeepFeatures, take_deep_features
from nemo_care.models.expert_routing import Routing, arguments, let_routing_be_given
from nemo_care.models.family import Family
from nemo_care.models.language_model import LanguageModel
from nemo_care.models.layer_specs import layer_spec
from nemo_care.models.log_probs import float32_product, token_log_probs
from nemo_care.models.segments import PackedSegments
from nemo_care.models.vision_dealing import VisionDealing

# Independent of the tensor-parallel size, so that a checkpoint of any layout fits any other.
_VOCABULARY_MULTIPLE = 128
# What TransformerEngine's modules keep besides parameters.
_EXTRA_STATE = "_extra_state"


@dataclass
class ModelInputs:
    """One micro-batch: B rows, right-padded to S tokens.

    `token_ids` [B, S], `position_ids` [3, B, S]. `pixel_values` [patches, values of
    a patch] and `grid_thw` [items, 3] hold the images and videos of all rows in order of
    appearance, `vision_places` long [N] says which tokens their features replace, as s * B + b; all
    None where there are none. A vision token that the model itself has sampled is an ordinary token
    and not among them. `vision_states`, what a frozen vision tower has made of the patches (see
    `VideoLanguageModel.frozen_vision`), replace the patches. `packed` says what a token sees where
    the one row (B = 1) holds several segments, or the next tokens of cached sequences; None: each
    row is one causal sequence. `routing` decides on the experts of this rank's tokens; None: the
    router does.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    grid_thw: torch.Tensor | None = None
    vision_places: torch.Tensor | None = None
    vision_states: torch.Tensor | None = None
    packed: PackedSegments | DecodingCache | None = None
    routing: Routing | None = None


def padded_vocabulary(size: int) -> int:
    """Vocabulary size V rounded up to what every tensor-parallel layout divides."""
    return -(-size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def _without_extra_states(module: torch.nn.Module, incompatible: Any) -> None:
    """Loading does not miss the states that `VideoLanguageModel.sharded_state_dict` leaves out."""
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not key.endswith(_EXTRA_STATE)
    ]


class VideoLanguageModel(MegatronModule, ABC):
    """This rank's part of the model: its pipeline stage, cut by tensor parallelism.

    A family's class adds the vision tower (`_attach_vision_tower`) on the first stage.

    `frozen` are the parts that are not trained. With `keeps_vision`, what the frozen vision tower
    makes of a prompt is kept with the prompt, and used by all models with the same tower.
    """

    visual: Any
    frozen: frozenset[str] = frozenset()
    keeps_vision: bool = False

    def __init__(
        self,
        family: Family,
        config: TransformerConfig,
        backend: str = "auto",
        **language_model: Any,
    ) -> None:
        """Build without meaningful weights: `weights.load_hf_weights` fills them.

        `language_model` are arguments of Megatron's GPTModel that say how this family turns
        positions into rotations.
        """
        super().__init__(config)
        # The pipeline schedules ask the outermost module for its kind and its place.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = parallel_state.is_pipeline_first_stage()
        self.post_process = parallel_state.is_pipeline_last_stage()
        self.share_embeddings_and_output_weights = family.architecture.tied
        self.family = family
        self.vocab_size = family.architecture.vocab_size
        self.deals_vision = False
        # Tensors of experts on disk whose matrices are stored as [input, output].
        self.stored_input_first: set[str] = set()
        layers = layer_spec(config, backend)
        if self.pre_process:
            take_deep_features(layers, family.architecture.deep_levels)
        self.language_model = LanguageModel(
            config,
            layers,
            vocab_size=padded_vocabulary(self.vocab_size),
            max_sequence_length=family.architecture.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            # The vision tokens are put in before the sequence is scattered.
            scatter_embedding_sequence_parallel=False,
            **language_model,
        )
        let_routing_be_given(self.language_model.decoder.layers)
        self._mark_tensor_parallel()
        self.register_load_state_dict_post_hook(_without_extra_states)

    def _attach_vision_tower(self, tower: torch.nn.Module) -> None:
        """Make the tower part of the model, under the name `visual`."""
        self.visual = tower
        if torch.cuda.is_available():
            # The copies on the tensor-parallel ranks see equal inputs, but CUDA's backward
            # kernels are not deterministic: averaging keeps the copies equal.
            for parameter in tower.parameters():
                parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    def deal_vision(self) -> None:
        """From now on each tensor-parallel rank computes the features of some of the frames.

        Its gradients of the tower's parameters are then a part of theirs, and marked to be summed.
        After a frozen tower every rank runs the mergers on all frames.
        """
        if parallel_state.get_tensor_model_parallel_world_size() == 1 or not self.pre_process:
            return
        self.deals_vision = True
        if "vision" in self.frozen:
            return
        for parameter in self.visual.parameters():
            parameter.average_gradients_across_tp_domain = False
            mark_partial_gradient(parameter)

    def part_of(self, name: str) -> str:
        """Return the part that a parameter belongs to, by its name: one of `PARTS`."""
        if not name.startswith("visual."):
            return "language"
        is_merger = name.removeprefix("visual.").startswith(self.family.weights.mergers)
        return "merger" if is_merger else "vision"

    def is_frozen(self, name: str) -> bool:
        """Whether the parameter with this name is not trained."""
        return self.part_of(name) in self.frozen

    def freeze(self, parts: Collection[str]) -> None:
        """Do not train these parts; call it before `deal_vision`."""
        self.frozen = frozenset(parts)
        for name, parameter in self.named_parameters():
            if self.is_frozen(name):
                parameter.requires_grad_(False)

    def share_frozen(self, other: "VideoLanguageModel") -> None:
        """Use the memory of another model of this kind, which never changes, for frozen parts."""
        theirs = dict(other.named_parameters())
        for name, parameter in self.named_parameters():
            if self.is_frozen(name):
                parameter.data = theirs[name].data
        self.keeps_vision = other.keeps_vision

    @abstractmethod
    def vision_features(self, inputs: ModelInputs) -> torch.Tensor:
        """The vision tower's features [N, (1 + D) * H] for all vision tokens, in order.

        Each token's own features are followed by its D levels of deep features, of which most
        families have none. Only `pixel_values` and `grid_thw` are read: they may be those of some
        of the frames.
        """

    def merger_inputs(self, inputs: ModelInputs) -> torch.Tensor:
        """What `merged` makes `vision_features` of, [N, ...]; of a tower without mergers those."""
        return self.vision_features(inputs)

    def merged(self, states: torch.Tensor) -> torch.Tensor:
        """The features of `merger_inputs`, row by row."""
        return states

    def all_vision_features(self, inputs: ModelInputs) -> torch.Tensor:
        """The features of all vision tokens, the frames dealt to the ranks if they are to be."""
        if "vision" in self.frozen:
            return self._features_of(self.frozen_vision(inputs))
        return self._of_all_frames(inputs, self.vision_features)

    @torch.no_grad()
    def frozen_vision(self, inputs: ModelInputs) -> torch.Tensor:
        """What does not depend on trained weights, [N, ...] for all vision tokens.

        The features if the mergers are frozen too, otherwise the inputs of the mergers.
        """
        of_some = self.vision_features if "merger" in self.frozen else self.merger_inputs
        return self._of_all_frames(inputs, of_some)

    def _features_of(self, states: torch.Tensor) -> torch.Tensor:
        return states if "merger" in self.frozen else self.merged(states)

    def _of_all_frames(
        self, inputs: ModelInputs, of_some: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        """`of_some` of all frames, which are dealt to the ranks if they are to be."""
        if not self.deals_vision:
            return of_some(inputs)
        assert inputs.pixel_values is not None
        assert inputs.grid_thw is not None
        rank = parallel_state.get_tensor_model_parallel_rank()
        dealing = VisionDealing.of(
            self.family,
            inputs.grid_thw.tolist(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        share = replace(
            inputs,
            pixel_values=dealing.pixels(rank, inputs.pixel_values),
            grid_thw=inputs.grid_thw.new_tensor(dealing.grids(rank)),
        )
        return dealing.gather(of_some(share))

    @property
    def first_layer(self) -> int:
        """The number of this stage's first layer, counted from 0 over all stages."""
        return self.language_model.decoder.layers[0].layer_number - 1

    @property
    def patching(self) -> Patching:
        """How the family's frames become patches."""
        return self.family.prompt.patching

    def _mark_tensor_parallel(self) -> None:
        """Mark the parameters that tensor parallelism cuts, as their initialisation would have.

        The gradient norm counts a parameter without the mark on one rank only.
        """
        dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
        for module in self.language_model.modules():
            weight = getattr(module, "weight", None)
            if type(module) in dims and weight is not None:
                tensor_parallel.set_tensor_model_parallel_attributes(
                    weight, is_parallel=True, dim=dims[type(module)], stride=1
                )
        for parameter in filter(is_distributed_expert, self.language_model.parameters()):
            # No other rank of a model has these experts, whatever cuts them.
            parameter.tensor_model_parallel = True

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The weights as Megatron's sharded tensors, under the same keys for every backend.

        TransformerEngine's states are empty but for the delayed scales, and left out then: a
        checkpoint fits any backend and recipe but that one.
        """
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.config.fp8 and self.config.fp8_recipe == "delayed":
            return sharded
        return {key: entry for key, entry in sharded.items() if not key.endswith(_EXTRA_STATE)}

    def idle_inputs(self) -> ModelInputs:
        """The shortest micro-batch, for a pass whose result nobody needs."""
        scattered = self.config.sequence_parallel
        tokens = self.config.tensor_model_parallel_size if scattered else 1
        device = next(self.parameters()).device
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        return ModelInputs(token_ids=ids, position_ids=ids.expand(3, 1, -1))

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's hidden states (the pipeline schedules call this)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The tied embedding, whose gradient Megatron sums over first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def _embed(self, inputs: ModelInputs) -> tuple[torch.Tensor, DeepFeatures | None]:
        """Token embeddings [S, B, H], and deep features if the family and the inputs have some.

        Vision tokens are replaced by the vision tower's features.
        """
        embeddings = self.language_model.embedding(input_ids=inputs.token_ids, position_ids=None)
        if inputs.vision_places is None:
            return embeddings, None
        found = (
            self.all_vision_features(inputs)
            if inputs.vision_states is None
            else self._features_of(inputs.vision_states)
        )
        features, *levels = found.split(self.config.hidden_size, dim=1)
        marked = len(inputs.vision_places)
        if marked != features.shape[0]:
            raise ValueError(f"{marked} vision tokens but {features.shape[0]} vision features")
        tokens = embeddings.flatten(0, 1)
        tokens = tokens.index_copy(0, inputs.vision_places, features.to(tokens.dtype))
        deep = DeepFeatures(torch.stack(levels), inputs.vision_places) if levels else None
        return tokens.view_as(embeddings), deep

    def forward(self, inputs: ModelInputs) -> torch.Tensor:
        """Run this stage.

        Returns:
            Hidden states [S, B, H] ([S / TP, B, H] with sequence parallelism): for the next stage,
            or on the last one normed, for `token_log_probs`, `logits` and `next_token_logits`.
        """
        hidden, deep = None, None
        if self.pre_process:
            hidden, deep = self._embed(inputs)
            if torch.is_grad_enabled() and not hidden.requires_grad:
                # Nothing before the layers is trained. They, or the loss, may be: recomputation and
                # the pipeline's backward need a graph that begins here.
                hidden.requires_grad_()
            if self.config.sequence_parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
                deep = deep and deep.of_this_rank(hidden.shape[0] * hidden.shape[1])
        return self.language_model(
            input_ids=None,
            position_ids=inputs.position_ids,
            attention_mask=None,
            decoder_input=hidden,
            packed_seq_params=inputs.packed,
            extra_block_kwargs=(deep.arguments() if deep else {}) | arguments(inputs.routing),
        )

    def _output_weight(self) -> torch.Tensor:
        """This rank's slice of the output layer, [V_padded / TP, H] (last stage)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.language_model.output_layer.weight

    def token_log_probs(
        self, hidden: torch.Tensor, places: torch.Tensor, token_ids: torch.Tensor
    ) -> torch.Tensor:
        """Log-probabilities float32 [T] of chosen tokens, on the last stage; differentiable.

        Args:
            hidden: what `forward` returned.
            places: long [T]: where each token is predicted, as s * B + b in `hidden` [S, B, H].
            token_ids: long [T].
        """
        if self.config.sequence_parallel:
            # Backward sums the ranks' parts of the gradient while it scatters them again.
            hidden = gather_from_sequence_parallel_region(hidden)
        rows, row_of = torch.unique(places, return_inverse=True)
        chosen = hidden.flatten(0, 1).index_select(0, rows)
        if not self.config.sequence_parallel:
            chosen = copy_to_tensor_model_parallel_region(chosen)
        return token_log_probs(chosen, self._output_weight(), row_of, token_ids, self.vocab_size)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V_padded / TP] of every position, this rank's slice (last stage)."""
        logits, _ = self.language_model.output_layer(hidden, weight=self._output_weight())
        return logits.transpose(0, 1)

    def next_token_logits(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits float32 [N, V] at `places` [N], gathered over the ranks (last stage).

        `hidden` must be whole: use it with `without_sequence_parallel`. Not differentiable.
        """
        chosen = hidden.flatten(0, 1).index_select(0, places)
        logits = float32_product(chosen, self._output_weight().t())
        return gather_from_tensor_model_parallel_region(logits)[:, : self.vocab_size]

    @contextmanager
    def without_sequence_parallel(self) -> Iterator[None]:
        """Sequence parallelism off: single tokens can't be scattered over ranks."""
        if not self.config.sequence_parallel:
            yield
            return
        parts = [m for m in self.modules() if getattr(m, "sequence_parallel", False) is True]
        for switch in (self.config, *parts):
            switch.sequence_parallel = False
        try:
            yield
        finally:
            for switch in (self.config, *parts):
                switch.sequence_parallel = True
