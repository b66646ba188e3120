"""What a checkpoint's config.json may say: the rules that families share.

Every key is one of four kinds: it is honoured; it changes nothing that is computed here; it has the
one value that is computed here; or it is refused by name. The last includes keys that nobody knows,
unless they are switched off: a switch that is silently ignored trains another model.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from transformers import GenerationConfig

from nemo_care.data.checkpoint_files import first_line

# Labels, outputs, sampling defaults (the recipe decides those) and left-overs of other versions.
_NO_EFFECT = {
    *vars(GenerationConfig()),
    *("architectures", "attn_implementation", "chunk_size_feed_forward", "dtype", "id2label"),
    *("initializer_range", "label2id", "model_type", "name_or_path", "num_labels", "prefix"),
    *("problem_type", "return_dict", "tokenizer_class", "torch_dtype", "use_return_dict"),
    *("sep_token_id", "unsloth_fixed"),
}
QUANTISED = "quantised weights can't be trained: use the checkpoint that they were made from"

Refuse = Callable[[str], NoReturn]


def check_keys(
    prefix: str,
    block: Mapping[str, Any],
    known: set[str],
    computed: Mapping[str, tuple[object, ...]],
    remedies: Mapping[str, str],
    family: str,
    refuse: Refuse,
) -> None:
    """Refuse keys that are not computed, by name.

    Args:
        prefix: of the block's keys in messages.
        block: a part of config.json.
        known: its keys that are honoured, or change nothing.
        computed: values that are computed, by key; None stands for a missing one.
        remedies: what to say of a key with another value.
        family: its name in messages.
        refuse: Called with what is wrong; raises.
    """
    for key, value in block.items():
        name = f"{prefix}{key}"
        if key in computed:
            if value not in computed[key]:
                good = shown(next((one for one in computed[key] if one is not None), None))
                remedy = remedies.get(key, f"only {good} is supported")
                refuse(f"{name} is {shown(value)}; {remedy}")
        elif key in known | _NO_EFFECT or key.startswith("_") or key.endswith("_version"):
            continue
        elif value not in (None, False, "", [], {}):
            refuse(
                f"{name} is {shown(value)}, a key that a {family} does not have; remove it if "
                "the weights do not depend on it"
            )


def positive(block: str, config: Any, names: Iterable[str], refuse: Refuse) -> None:
    """Refuse values of these names that are no positive whole numbers."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            refuse(f"{block}.{name} is {shown(value)}; a positive whole number is needed")


def divides(name: str, by: str, config: Any, refuse: Refuse) -> None:
    """Refuse a value of `name` that is no multiple of that of `by`."""
    whole, part = getattr(config, name), getattr(config, by)
    if whole % part:
        refuse(f"{name} is {whole}, no multiple of {by} = {part}")


def shown(value: object) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def transformers_reason(error: Exception) -> str:
    """Why transformers does not take a configuration, in one line.

    huggingface_hub's validation names the field in one line and the fault in the next.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[:2]) if len(lines) > 1 else first_line(error)
