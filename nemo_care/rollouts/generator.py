"""What any generator of completions offers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from nemo_care.data.prompts import Prompt
from nemo_care.groups.group import Group


@dataclass(frozen=True)
class Sampling:
    """How to sample: `temperature` 0 is greedy; `seed` tells uses of the same prompts apart."""

    group_size: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: tuple[int, ...]


class Generator(Protocol):
    """Samples completions from the policy.

    All ranks call it alike. Where it fails with InputError or RunFailed, it does on all of them.
    """

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group per prompt. The same prompts and sampling give the same completions in every
        parallel layout (up to logits that differ by rounding)."""
        ...

    def rest(self) -> None:
        """Give back what is only needed while sampling; `generate` takes it again. Collective."""
        ...

    def close(self) -> None:
        """End what was started for sampling."""
        ...


@runtime_checkable
class BackgroundGenerator(Generator, Protocol):
    """A generator that samples while its caller does something else."""

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling) -> Any:
        """Begin to sample, with the policy's weights as they are now; what `collect` wants to have.

        Nothing may be in flight when these are not the weights of the last `submit`.
        """
        ...

    def collect(self, begun: Any) -> list[Group]:
        """Wait for the groups of a `submit`; `generate` is both."""
        ...

    def take_deaths(self) -> list[str]:
        """How engines have died since the last call, which were then started again; equal on all
        ranks."""
        ...
