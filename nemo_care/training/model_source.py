"""The source of a model's weights: a Hugging Face directory, or a checkpoint of a run."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor

from nemo_care.checkpoints.pickles import read_common
from nemo_care.checkpoints.store import (
    check_files,
    is_checkpoint,
    list_checkpoints,
    load_checkpoint,
    sharding_metadata,
    stored_shapes,
)
from nemo_care.errors import DamagedCheckpoint, InputError
from nemo_care.models.ema import WeightAverage
from nemo_care.models.families import read_family
from nemo_care.models.family import Family
from nemo_care.models.hf_tensors import check_weights
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.models.weights import load_hf_weights
from nemo_care.recipe.evaluation import judged_by
from nemo_care.recipe.schema import Recipe
from nemo_care.scoring.reference import PREFIX as REFERENCE
from nemo_care.training.policy import PREFIX as POLICY

_WEIGHT_FILES = ("*.safetensors", "config.json", "*.distcp", "*.pt", ".metadata", "metadata.json")
_PROMPT_FILES = ("*.json", "*.jinja", "*.txt")


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `path` means: a run's newest, or the step_... folder itself.

    Raises:
        InputError: `path` is neither a run directory with a complete checkpoint nor a checkpoint.
    """
    path = path.resolve()
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give a run directory or one of its step_...")
    if (path / "checkpoints").is_dir():
        found = list_checkpoints(path / "checkpoints")
        if not found:
            raise InputError(f"{path}: the run has no complete checkpoint yet")
        return found[-1]
    if not is_checkpoint(path):
        raise InputError(
            f"{path}: no checkpoint there; give a run directory (with recipe.yaml and checkpoints) "
            "or one of its step_..."
        )
    return path


def run_of(checkpoint: Path) -> Path:
    """Return the run directory that contains a checkpoint."""
    return checkpoint.parent.parent


@dataclass(frozen=True)
class ModelSource:
    """The weights of a model, in a Hugging Face directory or in a checkpoint of a run.

    `key` is the recipe key that names them, `model_key` the one of the model directory they are
    loaded into. A checkpoint holds the policy and, for a run with a reference, its moving average;
    `is_reference` selects the latter.
    """

    key: str
    folder: Path
    is_checkpoint: bool
    is_reference: bool = False
    model_key: str = "model.hf_path"

    @classmethod
    def find(cls, key: str, path: str, *, is_reference: bool = False) -> "ModelSource":
        """Find the source that a user names: a Hugging Face directory, a run or a checkpoint.

        Raises:
            InputError: `path` is none of these.
        """
        folder = Path(path).resolve()
        if (folder / "config.json").is_file():
            return cls(key, folder, is_checkpoint=False)
        try:
            checkpoint = find_checkpoint(folder)
        except InputError as error:
            raise InputError(f"{key}: {error}, or a Hugging Face directory") from error
        return cls(key, checkpoint, is_checkpoint=True, is_reference=is_reference)

    def check(self, family: Family) -> None:
        """Refuse weights that don't fit this family and size, as far as the files show.

        Raises:
            InputError: a different architecture, unreadable weights, a damaged checkpoint, or a run
                without a reference.
        """
        if not self.is_checkpoint:
            other = read_family(self.folder, key=self.key)
            self._compare(other.signature(), family)
            check_weights(self.folder, key=self.key)
            return
        with self._named_if_damaged():
            check_files(self.folder)
            names = stored_shapes(self.folder)
            stored = read_common(self.folder).get("trainer", {})
        # Older checkpoints lack it; loading compares shapes.
        if "architecture" in stored:
            self._compare(stored["architecture"], family)
        if self.is_reference and not any(name.startswith(REFERENCE) for name in names):
            raise InputError(
                f"{self.key}={self.folder}: that run had no reference (neither a bonus nor a KL "
                "term); name another run, or a Hugging Face directory"
            )

    def _compare(self, theirs: dict[str, Any], family: Family) -> None:
        for name, ours in family.signature().items():
            if name in theirs and theirs[name] != ours:
                raise self._misfit(f"its {name} is {theirs[name]}, the model's is {ours}")

    def load(self, model: VideoLanguageModel) -> None:
        """Fill this rank's parameters; all ranks call it.

        Raises:
            InputError: a tensor is missing or has a different shape, or a checkpoint is damaged.
        """
        if not self.is_checkpoint:
            load_hf_weights(model, self.folder, key=self.key)
        elif self.is_reference:
            # It is stored in float32, whatever the model computes in.
            average = WeightAverage(model, decay=1.0)
            sharded = average.sharded_state_dict(REFERENCE, sharding_metadata())
            average.load_state_dict(self._read(sharded), REFERENCE)
        else:
            sharded = model.sharded_state_dict(prefix=POLICY, metadata=sharding_metadata())
            state = self._read(sharded)
            model.load_state_dict({name.removeprefix(POLICY): t for name, t in state.items()})

    def _read(self, sharded: dict[str, Any]) -> dict[str, Any]:
        part = REFERENCE if self.is_reference else POLICY
        with self._named_if_damaged():
            stored = stored_shapes(self.folder)
            for entry in sharded.values():
                if not isinstance(entry, ShardedTensor):
                    continue
                shape, wanted = stored.get(entry.key), tuple(entry.global_shape)
                if shape != wanted:
                    what = f"{entry.key} is {shape or 'missing'}, the model's is {wanted}"
                    raise self._misfit(what)
            return load_checkpoint(
                self.folder, lambda: {"weights": sharded}, parts={part.removesuffix(".")}
            )["weights"]

    @contextmanager
    def _named_if_damaged(self) -> Iterator[None]:
        """Raise InputError with the key that names a damaged checkpoint, and the remedy."""
        try:
            yield
        except DamagedCheckpoint as damage:
            raise InputError(
                f"{self.key}={self.folder}: the checkpoint is damaged: {damage}; name another "
                "step_... of the run"
            ) from damage

    def _misfit(self, what: str) -> InputError:
        return InputError(
            f"{self.key}={self.folder}: not the architecture of {self.model_key} ({what}); set "
            f"{self.model_key} to the Hugging Face directory that it was trained from"
        )

    def identity(self) -> dict[str, str]:
        """Return what identifies these weights, without reading them."""
        identity = {"folder": str(self.folder), "files": _digest(self.folder, _WEIGHT_FILES)}
        if self.is_checkpoint:
            identity["weights"] = "reference" if self.is_reference else "policy"
        return identity


def prompt_files_identity(folder: Path) -> str:
    """Return what identifies a model's configuration and tokenizer, without reading them."""
    return _digest(folder, _PROMPT_FILES)


def _digest(folder: Path, patterns: Sequence[str]) -> str:
    """Return a digest of the names, sizes and modification times of a model directory's files."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def evaluated_model(recipe: Recipe) -> ModelSource:
    """Return the model of `nemo-care evaluate`.

    Raises:
        InputError: evaluation.checkpoint names no model.
    """
    given = recipe.evaluation.checkpoint
    return ModelSource.find("evaluation.checkpoint", given or recipe.model.hf_path)


def judging_model(recipe: Recipe) -> ModelSource | None:
    """Return the reference of the likelihood judge in `nemo-care evaluate`, None without one.

    Raises:
        InputError: evaluation.reference names no model.
    """
    if not judged_by(recipe.evaluation, "likelihood"):
        return None
    given = recipe.evaluation.reference
    return ModelSource.find(
        "evaluation.reference", given or recipe.model.hf_path, is_reference=True
    )
