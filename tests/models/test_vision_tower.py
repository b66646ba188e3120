"""The vision tower's windows in few kernel calls compute what transformers' call for each does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from nemo_care.models.vision_tower import WINDOW_ATTENTION

pytestmark = pytest.mark.numeric

# Windows of 8 x 8 patches: frames that they divide, that they don't, and both in one batch.
GRIDS = {
    "equal": [(3, 16, 8)],
    "edges": [(3, 12, 20)],
    "several": [(2, 12, 20), (1, 8, 8), (3, 6, 14)],
}
BLOCKS, WHOLE = 3, [1]


@pytest.fixture(scope="module")
def towers():
    """transformers' own and ours, with the same weights."""
    config = Qwen2_5_VLVisionConfig(
        depth=BLOCKS,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        out_hidden_size=32,
        fullatt_block_indexes=WHOLE,
    )
    torch.manual_seed(0)
    theirs = Qwen2_5_VisionTransformerPretrainedModel._from_config(
        config, attn_implementation="sdpa", dtype=torch.float32
    )
    ours = copy.deepcopy(theirs)
    ours.config._attn_implementation = WINDOW_ATTENTION
    assert theirs.config._attn_implementation == "sdpa"
    return theirs, ours


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", list(GRIDS))
def test_features_and_gradients_are_the_same(towers, name, recompute, monkeypatch):
    grids = torch.tensor(GRIDS[name])
    patches = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 14**2)
    found, calls = [], []
    kernel = F.scaled_dot_product_attention

    def counted(*arguments, **keywords):
        calls.append(arguments[0].shape)
        return kernel(*arguments, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    for tower in towers:
        tower.train()
        if recompute:
            tower.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            tower.gradient_checkpointing_disable()
        calls.clear()
        features = tower(patches, grid_thw=grids).pooler_output
        forward_calls = len(calls)
        (features * torch.arange(features.shape[1])).sum().backward()
        gradients = {key: p.grad.clone() for key, p in tower.named_parameters()}
        tower.zero_grad()
        found.append((features.detach(), gradients))
    (wanted, wanted_gradients), (features, gradients) = found
    torch.testing.assert_close(features, wanted)
    for key, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, atol=1e-4, rtol=1e-4, msg=key)
    # At most four sizes of windows in a frame of one size.
    assert forward_calls <= BLOCKS * 4 * len(GRIDS[name])
    if name == "equal":
        assert forward_calls == BLOCKS
