"""A model family outside the package: different prompts, patches, vision tower and names."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from nemo_care.models.architecture import Architecture, VisionArchitecture
from nemo_care.models.family import Family
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.models.weight_table import EMBEDDING, OUTPUT, Source, WeightTable

IMAGE_PAD, VIDEO_PAD = 6, 7
# Words of the miniature, which this family writes before each vision token.
TIME_WORDS = "it starts at"


@dataclass(frozen=True)
class ToyPatching:
    """Two frames become one patch, the mean of their first 4 x 4 pixels."""

    frames: int = 2
    values: int = 3 * 4 * 4

    def tokens(self, grid):
        return grid[0]

    def grid(self, count, height, width, bounds):
        return -(-count // self.frames), 1, 1

    def frame_shape(self, grid):
        return self.frames * grid[0], 4, 4, 3

    def resize(self, frame, bounds):
        return frame[:4, :4].contiguous()

    def patches(self, frames):
        images = frames.permute(0, 3, 1, 2).float() / 255
        return torch.stack([part.mean(0) for part in images.split(self.frames)]).flatten(1)


class ToyPrompt:
    """Puts words before each vision token, and counts positions over all tokens."""

    patching = ToyPatching()
    eos_token_id = 2

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.placeholders = {"video": VIDEO_PAD, "image": IMAGE_PAD}

    def expanded(self, token_ids, media, encode):
        grids, expanded = iter(media.grids), []
        for token in token_ids:
            if token in self.placeholders.values():
                steps, _, _ = next(grids)
                expanded += [*encode(TIME_WORDS), token] * steps
            else:
                expanded.append(token)
        return expanded

    def positions(self, token_ids, media):
        return torch.arange(len(token_ids)).expand(3, -1)

    def is_vision(self, token_ids):
        return (token_ids == VIDEO_PAD) | (token_ids == IMAGE_PAD)


class ToyModel(VideoLanguageModel):
    """A model whose vision tower is one matrix."""

    def __init__(self, family, config, backend):
        super().__init__(family, config, backend, position_embedding_type="mrope")
        if self.pre_process:
            width = family.architecture.hidden_size
            tower = torch.nn.Linear(ToyPatching.values, width, bias=False)
            self._attach_vision_tower(tower.to(config.params_dtype))

    def vision_features(self, inputs):
        return self.visual(inputs.pixel_values)


class ToyFamily(Family):
    """A family whose config.json has the number of layers."""

    model_type = "toy"
    name = "Toy"
    weights = WeightTable(
        layer={
            "input_layernorm.weight": Source(("norm1",), "whole"),
            "self_attention.linear_qkv.weight": Source(("q", "k", "v"), "qkv"),
            "self_attention.linear_proj.weight": Source(("o",), "columns"),
            "pre_mlp_layernorm.weight": Source(("norm2",), "whole"),
            "mlp.linear_fc1.weight": Source(("gate", "up"), "gate_up"),
            "mlp.linear_fc2.weight": Source(("down",), "columns"),
        },
        layer_prefix="toy.{}.",
        outer={
            EMBEDDING: Source(("words",), "vocabulary"),
            "decoder.final_layernorm.weight": Source(("norm",), "whole"),
            OUTPUT: Source(("answers",), "vocabulary"),
        },
        vision_prefix="eye.",
        disk_name=lambda name: name,
    )

    def __init__(self, layers):
        # Queries are wider than the hidden states.
        vision = VisionArchitecture(heads=1, ffn_size=1)
        self.architecture = Architecture(layers, 32, 32, 2, 1, 64, 51, 512, False, vision)
        self.prompt = ToyPrompt(self.architecture.vocab_size)

    @classmethod
    def read(cls, folder, raw, *, key):
        return cls(raw["layers"])

    def signature(self):
        return {"model_type": "toy", "layers": self.architecture.layers}

    def tensor_shapes(self):
        model = self.architecture
        width, ffn = model.hidden_size, model.ffn_size
        layer = {
            "norm1": (width,), "q": (model.query_size, width), "k": (model.kv_size, width),
            "v": (model.kv_size, width), "o": (width, model.query_size), "norm2": (width,),
            "gate": (ffn, width), "up": (ffn, width), "down": (width, ffn),
        }  # fmt: skip
        layers = {
            f"toy.{number}.{name}": shape
            for number in range(model.layers)
            for name, shape in layer.items()
        }
        ends = {"words": (model.vocab_size, width), "answers": (model.vocab_size, width)}
        return {**layers, **ends, "norm": (width,), "eye.weight": (width, ToyPatching.values)}

    def vision_flops(self, grids):
        return (
            2.0 * sum(t for t, _, _ in grids) * ToyPatching.values * self.architecture.hidden_size
        )

    def megatron_settings(self):
        return {"mrope_section": [6, 5, 5]}

    def build(self, config, backend="auto"):
        return ToyModel(self, config, backend)

    def processor_files(self, max_pixels):
        raise NotImplementedError

    def video_fps(self, grid, seconds_per_grid):
        raise NotImplementedError


def write_toy(folder: Path, tokenizer_from: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint of the family with random weights; return the weights."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer_from / name, folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "layers": 2}))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.2
        for name, shape in ToyFamily(2).tensor_shapes().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights
