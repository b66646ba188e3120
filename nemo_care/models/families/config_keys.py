"""What a checkpoint's config.json may say: the rules that families share.

Every key is one of four kinds: it is honoured; it changes nothing that is computed here; it has the
one value that is computed here; or it is refused by name. The last includes keys that nobody knows,
unless they are switched off: a switch that is silently ignored trains another model.
"""

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN

from nemo_care.errors import InputError, first_line

# Labels, outputs, sampling defaults (the recipe decides those) and left-overs of other versions.
_NO_EFFECT = {
    *vars(GenerationConfig()),
    *("architectures", "attn_implementation", "chunk_size_feed_forward", "dtype", "id2label"),
    *("initializer_range", "label2id", "model_type", "name_or_path", "num_labels", "prefix"),
    *("problem_type", "return_dict", "tokenizer_class", "torch_dtype", "use_return_dict"),
    *("sep_token_id", "unsloth_fixed"),
}
QUANTISED = "quantised weights can't be trained: use the checkpoint that they were made from"

# Keys that may be there with a value that is computed here; None stands for a missing one.
COMPUTED: dict[str, tuple[object, ...]] = {
    "attention_dropout": (None, 0),
    "hidden_act": (None, "silu", "swish"),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1),
    "use_sliding_window": (None, False),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "use_bidirectional_attention": (None, False),
    "quantization_config": (None, {}),
}
VISION_COMPUTED: dict[str, tuple[object, ...]] = {
    # Frames have three colours.
    "in_channels": (None, 3),
    "quantization_config": (None, {}),
}
# What the blocks rope_scaling and rope_parameters may say, and with which values; (): any.
ROPE: dict[str, tuple[object, ...]] = {
    "type": (None, "default", "mrope"),
    "rope_type": (None, "default", "mrope"),
    "rope_theta": (),
    "mrope_section": (),
    "partial_rotary_factor": (None, 1),
}

Refuse = Callable[[str], NoReturn]
C = TypeVar("C", bound=PretrainedConfig)


def refusing(folder: Path, key: str) -> Refuse:
    """Return what refuses the config.json in a folder, which the recipe's `key` names."""

    def refuse(what: str) -> NoReturn:
        raise InputError(f"{key}={folder}: in config.json {what}")

    return refuse


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


def check_names(raw: Mapping[str, Any], architecture: str, model_type: str, refuse: Refuse) -> None:
    """Refuse another architecture, or a block of another model type."""
    architectures = raw.get("architectures")
    if architectures and architectures != [architecture]:
        refuse(f"architectures is {shown(architectures)}; only {architecture} is supported")
    for block, kind in (("text_config", "text"), ("vision_config", "vision")):
        said = (raw.get(block) or {}).get("model_type")
        if said not in (None, model_type, f"{model_type}_{kind}"):
            refuse(f"{block}.model_type is {shown(said)}; only {model_type}_{kind} is supported")


def check_rope_block(
    name: str,
    rope: Any,
    known: Mapping[str, tuple[object, ...]],
    remedy: str,
    refuse: Refuse,
) -> None:
    """Refuse what a block about rotation says and is not computed.

    Args:
        name: of the block in messages.
        rope: the block.
        known: the values that each of its keys can have; (): any.
        remedy: what to say of another key or value.
        refuse: Called with what is wrong; raises.
    """
    if not isinstance(rope, dict):
        refuse(f"{name} is {shown(rope)} where an object is needed")
    for part, value in rope.items():
        if part not in known or (known[part] and value not in known[part]):
            refuse(f"{name}.{part} is {shown(value)}; {remedy}")


def check_equal(places: Iterable[tuple[str, Any]], refuse: Refuse) -> None:
    """Refuse a value that is stated at several places (name, value) and differs."""
    (first, wanted), *others = list(places) or [("", None)]
    for name, value in others:
        if value != wanted:
            refuse(f"{first} is {shown(wanted)}, but {name} is {shown(value)}; make them equal")


def check_text_numbers(text: Any, refuse: Refuse) -> None:
    """Refuse numbers of a language model that no model can have."""
    for name, value in (
        ("rms_norm_eps", text.rms_norm_eps),
        ("rope_theta", text.rope_parameters["rope_theta"]),
    ):
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            refuse(f"{name} is {shown(value)}; a positive number is needed")
    divides("num_attention_heads", "num_key_value_heads", text, refuse)


def check_mrope_section(text: Any, head_dim: int, refuse: Refuse, *, interleaved: bool) -> None:
    """Refuse an mrope_section that does not divide a head's frequencies among three axes."""
    section, half = text.rope_parameters.get("mrope_section"), head_dim / 2
    if (
        not isinstance(section, list)
        or len(section) != 3
        or not all(type(part) is int and part >= 0 for part in section)
        or sum(section) != half
        # Each third frequency turns with height, and each third with width.
        or (interleaved and any(axis + 3 * (section[axis] - 1) >= half for axis in (1, 2)))
    ):
        bound = ", the last two at most a third of it" if interleaved else ""
        refuse(
            f"mrope_section is {'missing' if section is None else shown(section)}; three numbers "
            "are needed, how many of a head's frequencies turn with time, height and width, whose "
            f"sum is head_dim / 2 = {half:g}{bound}"
        )


def check_tokens(hf: Any, names: Sequence[str], refuse: Refuse) -> None:
    """Refuse token ids of these names that are equal, or not in the vocabulary."""
    ids = [getattr(hf, name) for name in names]
    for name, token in zip(names, ids, strict=True):
        if not 0 <= token < hf.text_config.vocab_size:
            refuse(f"{name} is {token}, no token of a vocabulary of {hf.text_config.vocab_size}")
        if ids.count(token) > 1:
            refuse(f"{name} is {token}, which another of {', '.join(names)} is too")


def check_tower(vision: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuse an activation or rotation that a vision tower of transformers does not compute."""
    if "hidden_act" in vision:
        activation = vision["hidden_act"]
        if not isinstance(activation, str) or activation not in ACT2FN:
            refuse(
                f"vision_config.hidden_act is {shown(activation)}, no activation that transformers "
                "has"
            )
    rope = vision.get("rope_parameters")
    if rope not in (None, {}, {"rope_type": "axial", "rope_theta": 10000}):
        refuse(
            f"vision_config.rope_parameters is {shown(rope)}; only rope_type axial with "
            "rope_theta 10000 is supported"
        )


def check_tower_sizes(vision: Any, text: Any, names: Iterable[str], refuse: Refuse) -> None:
    """Refuse sizes of a vision tower that do not fit each other or the language model."""
    positive("vision_config", vision, names, refuse)
    if vision.hidden_size % (4 * vision.num_heads):
        refuse(
            f"vision_config.hidden_size is {vision.hidden_size}, no multiple of 4 * num_heads = "
            f"{4 * vision.num_heads}"
        )
    if vision.out_hidden_size != text.hidden_size:
        refuse(
            f"vision_config.out_hidden_size is {vision.out_hidden_size}, the language model's "
            f"hidden_size {text.hidden_size}; they have to be equal"
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


def _reason(error: Exception) -> str:
    """Why transformers does not take a configuration, in one line.

    huggingface_hub's validation names the field in one line and the fault in the next.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[:2]) if len(lines) > 1 else first_line(error)


def transformers_config(kind: type[C], folder: Path, raw: Mapping[str, Any]) -> C:
    """Return transformers' configuration of a directory whose config.json is `raw`.

    Raises:
        InputError: transformers does not take it.
    """
    try:
        return kind.from_dict(copy.deepcopy(dict(raw)))
    # transformers checks types with exceptions of several libraries and stumbles over others.
    except Exception as error:
        raise InputError(
            f"{folder / 'config.json'}: transformers can't use it ({_reason(error)})"
        ) from error
