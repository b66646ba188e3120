"""A tiny world and a tiny Qwen2.5-VL: the whole system as a real run on a laptop."""

from nemo_care.data.sources import training_sources
from nemo_care.data_config import DataConfig


def write_missing_worlds(data: DataConfig) -> None:
    """Write the miniature's files wherever a recipe asks for them and they are not there.

    Raises:
        InputError: something else lies there.
    """
    sources = [(source.kind, source.root) for source in training_sources(data)]
    for kind, root in (*sources, (data.validation.kind, data.validation.root)):
        if kind == "miniature":
            from nemo_care.miniature.files import ensure_world

            ensure_world(root)
