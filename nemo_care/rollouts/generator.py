"""The interface of all generators of completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from nemo_care.data.prompts import Prompt
from nemo_care.groups.group import Group


@dataclass(frozen=True)
class Sampling:
    """How to sample: `temperature` 0 is greedy; `seed` distinguishes uses of the same prompts."""

    group_size: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: tuple[int, ...]


class Generator(Protocol):
    """Samples completions from the policy.

    All ranks call it alike. InputError and RunFailed are raised on all of them.
    """

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group per prompt.

        The same prompts and sampling give the same completions in every parallel layout, up to
        logits that differ by rounding.
        """
        ...

    def rest(self) -> None:
        """Free what is only needed while sampling, until `generate` needs it. Collective."""
        ...

    def close(self) -> None:
        """End processes that were started for sampling."""
        ...


@runtime_checkable
class BackgroundGenerator(Generator, Protocol):
    """A generator that can sample while its caller continues."""

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling) -> Any:
        """Begin to sample with the policy's current weights; return the handle for `collect`.

        Nothing may be in flight if the weights have changed since the last `submit`.
        """
        ...

    def collect(self, begun: Any) -> list[Group]:
        """Wait for the groups of a `submit`; `generate` does both."""
        ...

    def take_deaths(self) -> list[str]:
        """Return how engines have died since the last call; they have been started again.

        Equal on all ranks.
        """
        ...
