"""Prompts from samples: decoded ahead in other processes, or skipped with a reason."""

from collections.abc import Sequence
from concurrent.futures import Future

from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.media import Media
from nemo_care.data.prompts import Draft, Prompt, PromptBuilder
from nemo_care.data.samples import Sample, Skipped
from nemo_care.errors import InputError

Numbered = tuple[int, Sample]
"""A sample and its place in the training stream or the validation file."""


class PromptLoader:
    """Gives prompts, and decodes those that were announced while the caller does something else.

    It holds the media of the samples last announced, and of those being loaded: never more.
    """

    def __init__(self, builder: PromptBuilder, workers: DecodingWorkers) -> None:
        """Several loaders may share `workers`."""
        self.builder = builder
        self.workers = workers
        # By place and identity of the sample: levels of a validation number theirs alike.
        self._begun: dict[tuple[int, int], tuple[Draft, Future[Media]]] = {}

    def prefetch(self, samples: Sequence[Numbered]) -> None:
        """Begin to decode these, and give up those that were announced earlier.

        Without decoding processes nothing is done ahead.
        """
        if not self.workers.count:
            return
        wanted = {_key(item) for item in samples}
        for key in self._begun.keys() - wanted:
            _, future = self._begun.pop(key)
            future.cancel()
        for item in samples:
            self._begin(item)

    @property
    def frame_bytes(self) -> int:
        """Bytes of the frames that were decoded ahead and have not been loaded yet."""
        done = [future for _, future in self._begun.values() if future.done()]
        media = [future.result() for future in done if not future.exception()]
        return sum(frames.nbytes for item in media for frames in item.frames)

    def load(self, samples: Sequence[Numbered]) -> list[Prompt | Skipped]:
        """A prompt for each sample, or the reason why there is none.

        Raises:
            RuntimeError: the decoding processes do not start.
        """
        for item in samples:
            self._begin(item)
        return [self._finish(item) for item in samples]

    def _begin(self, item: Numbered) -> None:
        if _key(item) not in self._begun:
            draft = self.builder.draft(*item)
            self._begun[_key(item)] = draft, self.workers.submit(draft.request)

    def _finish(self, item: Numbered) -> Prompt | Skipped:
        draft, media = self._begun.pop(_key(item))
        try:
            return self.builder.finish(draft, media.result())
        except InputError as error:
            return Skipped(draft.index, draft.sample.sample_id, str(error))


def _key(item: Numbered) -> tuple[int, int]:
    index, sample = item
    return index, id(sample)
