"""Rollouts with vLLM: sends prompts to the engines, and the weights after each update."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from nemo_care.data.prompts import Prompt
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.errors import InputError, RunFailed
from nemo_care.groups.group import Group
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.ranks.process_groups import Ranks
from nemo_care.rollouts.completions import completion_of
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.vllm.engine import Engine, EngineDied
from nemo_care.rollouts.vllm.fleet import Fleet
from nemo_care.rollouts.vllm.messages import SampleReply, SampleRequest
from nemo_care.rollouts.vllm.requests import RequestBuilder
from nemo_care.rollouts.vllm.weight_stream import WeightStream
from nemo_care.rollouts.vllm.weight_sync import Sender, make_sender

T = TypeVar("T")


@dataclass
class Part:
    """The prompts of a rollout that one engine samples; `replies` is None until they are here."""

    engine: Engine
    requests: list[SampleRequest]
    answer: Future | None = None
    replies: list[SampleReply] | None = None

    def begin(self) -> None:
        """Start to sample, unless that has been done."""
        if self.answer is None and self.replies is None:
            self.answer = self.engine.call("generate", requests=self.requests)

    def finish(self) -> None:
        """Wait for the replies. If the engine has died, `begin` starts anew."""
        if self.answer is not None:
            answer, self.answer = self.answer, None
            self.replies = self.engine.wait(answer, "generation")


@dataclass(frozen=True)
class Begun:
    """A rollout in progress; `parts` are those of this rank's own engines.

    Greedy completions of a prompt are all equal, so one is requested and used `copies` times.
    """

    prompts: Sequence[Prompt]
    copies: int
    parts: Sequence[Part]


class VLLMGenerator:
    """Samples from vLLM's copy of the model that is being trained.

    `generate` is `submit` and `collect`; between them, the engines work and this process is free.
    Engines that die are started again: they get the policy's weights as they are then, and their
    prompts are sampled again with the same seeds.
    """

    def __init__(
        self,
        model: VideoLanguageModel,
        tokenizer: ChatTokenizer,
        ranks: Ranks,
        fleet: Fleet,
        *,
        version: Callable[[], int],
        from_checkpoint: bool,
    ) -> None:
        """Sample with the engines of `fleet`. `version` changes whenever the weights have changed.

        With `from_checkpoint`, the model's weights are those of the checkpoint's directory while
        the version is 0: then the weights sent are compared with those that vLLM loaded itself.
        """
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.fleet = fleet
        self.version = version
        self.from_checkpoint = from_checkpoint
        self.requests = RequestBuilder(model.family, tokenizer.eos_ids)
        self.weights = WeightStream(model, ranks)
        self._sender: Sender | None = None
        self._sent: int | None = None
        self._started = self._asleep = False
        self._in_flight: list[Begun] = []
        self._deaths: list[str] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group per prompt; all ranks of the model replica call it with equal prompts."""
        return self.collect(self.submit(prompts, sampling))

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling) -> Begun:
        """Update the engines' weights and start sampling. Collective over all ranks.

        Raises:
            EnginesLost: an engine has died too often.
            RunFailed: an engine did not accept the weights, or a prompt can't be sent.
        """
        self._with_engines(self._wake)
        dealt = self._parts(prompts)

        def begin() -> list[Part]:
            parts = [
                Part(engine, [self.requests.build(prompt, sampling) for prompt in part])
                for engine, part in dealt
                if part
            ]
            for part in parts:
                part.begin()
            return parts

        parts = self.ranks.together(begin)
        copies = sampling.group_size if sampling.temperature == 0 else 1
        begun = Begun(prompts, copies, parts)
        self._in_flight.append(begun)
        return begun

    def collect(self, begun: Begun) -> list[Group]:
        """Wait for the completions of a `submit`. Collective over all ranks.

        When it returns, no replica has completions in flight, so engines shared by several replicas
        can receive new weights.

        Raises:
            InputError: vLLM's prompt has different tokens than training's.
            EnginesLost: an engine has died too often.
            RunFailed: an engine refused a prompt.
        """

        def own() -> None:
            for part in begun.parts:
                part.begin()
            for part in begun.parts:
                part.finish()

        self._with_engines(lambda: self.ranks.together(own))
        self._in_flight = [other for other in self._in_flight if other is not begun]
        mine = [part.replies or [] for part in begun.parts]
        of_engines = [
            replies for of_rank in self.ranks.gather_in_replica(mine) for replies in of_rank
        ]
        return self.ranks.together(lambda: self._groups(begun, of_engines))

    def take_deaths(self) -> list[str]:
        """Return how engines have died since the last call; they have been started again.

        Equal on all ranks.
        """
        deaths, self._deaths = self._deaths, []
        return deaths

    def _groups(self, begun: Begun, of_engines: Sequence[list[SampleReply]]) -> list[Group]:
        # Dealt one by one to the engines; those after the last prompt received none.
        count = len(of_engines)
        groups = []
        for number, prompt in enumerate(begun.prompts):
            reply = of_engines[number % count][number // count]
            self._check_tokens(prompt, reply)
            completions = [
                completion_of(
                    torch.tensor(sampled.token_ids, dtype=torch.long),
                    torch.from_numpy(sampled.log_probs),
                    self.tokenizer,
                    _experts(sampled.routing),
                )
                for sampled in reply.completions * begun.copies
            ]
            of_prompt = _experts(reply.prompt_routing)
            groups.append(Group(prompt, completions, prompt_routing=of_prompt))
        return groups

    def rest(self) -> None:
        """If colocated, return the engines' memory to training. Collective."""
        if self.fleet.sleep_level == 0 or self._asleep or self._sent is None:
            return
        self._with_engines(lambda: self._tell("sleep", level=self.fleet.sleep_level))
        self._asleep = True
        if self.fleet.sleep_level == 2:
            self._sent = None

    def close(self) -> None:
        """End the engines."""
        self.fleet.close()

    # ------------------------------------------------------------------ weights

    def _wake(self) -> None:
        """Load this version's weights into the engines, and all of their memory. Collective."""
        first = not self._started
        if first or self._asleep:
            self.fleet.make_room()
        if first:
            self.fleet.start()
        if self._asleep:
            self._tell("wake_up", tags=["weights"])
        version = self.version()
        if self._sent != version:
            # Frozen parts need not be sent again, unless the engines have discarded everything.
            self.weights.trained_only = self._sent is not None
            self._send(check=first and self.from_checkpoint and version == 0)
            self._sent = version
        self._started = True
        if self._asleep:
            self._tell("wake_up", tags=["kv_cache"])
            self._asleep = False

    def _send(self, *, check: bool) -> None:
        before = self.ranks.together(self._digests) if check else {}
        fed = self.fleet.fed

        def send() -> None:
            if self._sender is None and self.fleet.feeds:
                self._sender = make_sender(
                    self.fleet.settings.backend, self.weights, fed, self.fleet.bucket_bytes
                )
            elif self._sender is None:
                self._sender = _NothingToSend(self.weights)
            self._sender.send_weights()

        # Replicas whose engines get their weights from another replica wait for it here.
        self.ranks.together(send)
        if check:
            self.ranks.together(lambda: self._check_digests(before))

    def _digests(self) -> dict[str, dict[str, str]]:
        return {engine.name: engine.ask("digests") for engine in self.fleet.fed}

    def _check_digests(self, before: dict[str, dict[str, str]]) -> None:
        """Check that vLLM got the same parameters from the sent weights as from its own loading."""
        for name, digests in self._digests().items():
            wrong = [key for key, digest in before[name].items() if digests.get(key) != digest]
            if wrong:
                raise RunFailed(
                    f"vLLM's engine {name} has different weights after they were sent than after "
                    f"it had loaded {self.fleet.settings.folder} itself: {len(wrong)} of "
                    f"{len(digests)} parameters differ, the first is {wrong[0]}"
                )

    # ------------------------------------------------------------------ engines and ranks

    def _with_engines(self, do: Callable[[], T]) -> T:
        """Do what all ranks do together; while engines die of it, start them again and repeat."""
        while True:
            try:
                return do()
            except EngineDied:
                self._with_engines(self._revive)

    def _revive(self) -> None:
        """Start dead engines again, and send the weights. Collective over all ranks."""
        parts = [part for begun in self._in_flight for part in begun.parts]

        def finish() -> None:
            """Weights can't change while engines that are alive still generate."""
            for part in parts:
                with suppress(EngineDied):
                    part.finish()

        self.ranks.together(finish)
        self.fleet.make_room()
        self._deaths += self.fleet.restart()
        # All engines connect anew, since the connection may include a dead one.
        self._sender = self._sent = None
        self._wake()
        for part in parts:
            part.begin()

    def _parts(self, prompts: Sequence[Prompt]) -> list[tuple[Engine, Sequence[Prompt]]]:
        """This rank's engines, each with its part of the replica's prompts.

        Their frames come from the leader, and to no rank without an engine. All ranks call it.
        """

        def share(place: int) -> Sequence[Prompt]:
            return prompts[place :: self.fleet.count]

        places = self.ranks.gather_in_replica([place for place, _ in self.fleet.own])
        received = self.ranks.dealt_by_leader(
            [
                (number, [frames for prompt in share(place) for frames in prompt.frames])
                for number, of_rank in enumerate(places)
                for place in of_rank
            ]
        )
        parts: list[tuple[Engine, Sequence[Prompt]]] = []
        for (place, engine), dealt in zip(self.fleet.own, received, strict=True):
            frames = iter(dealt)
            own = [
                replace(prompt, frames=tuple(islice(frames, len(prompt.frames))))
                for prompt in share(place)
            ]
            parts.append((engine, own))
        return parts

    def _tell(self, name: str, **arguments: object) -> None:
        def ask() -> None:
            answers = [(engine, engine.call(name, **arguments)) for engine in self.fleet.fed]
            for engine, answer in answers:
                engine.wait(answer, name)

        self.ranks.together(ask)

    @staticmethod
    def _check_tokens(prompt: Prompt, reply: SampleReply) -> None:
        ours = prompt.token_ids.tolist()
        if reply.prompt_token_ids == ours:
            return
        theirs = reply.prompt_token_ids
        at = next(
            (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
            min(len(ours), len(theirs)),
        )
        raise InputError(
            f"sample {prompt.sample.sample_id}: vLLM's prompt has {len(theirs)} tokens and "
            f"training's {len(ours)}, and they differ from token {at} on: vLLM reads the tokenizer "
            "or the vision settings of model.hf_path differently; sample with "
            "rollout.backend=megatron"
        )


def _experts(routing: np.ndarray | None) -> torch.Tensor | None:
    return None if routing is None else torch.from_numpy(routing)


class _NothingToSend:
    """The sender of a replica whose engines get their weights from another replica."""

    def __init__(self, weights: WeightStream) -> None:
        """`weights` are those of this replica."""
        self.weights = weights

    def send_weights(self) -> None:
        """Contribute this replica's experts, if it shares them with the replica that sends."""
        if self.weights.ranks.layout.replicas_in_step > 1:
            for _ in self.weights:
                pass
