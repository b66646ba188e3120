"""What TransformerEngine's kernel is given for packed groups.

TransformerEngine is not on a machine without CUDA. Its `DotProductAttention` is replaced by what
its documentation says it computes, row by row; the kernel itself is not run here.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from made_segments import LENGTH, SEGMENTS, gradients, made_inputs
from made_transformer_engine import attend_rows

from nemo_care.errors import InputError
from nemo_care.models.group_attention import GroupAttention
from nemo_care.models.segments import PackedSegments
from nemo_care.models.te_attention import TransformerEngineGroupAttention

pytestmark = pytest.mark.numeric

CONFIG = SimpleNamespace(
    tensor_model_parallel_size=2, num_attention_heads=8, num_query_groups=4, kv_channels=8
)


class WrittenOutKernel(torch.nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.arguments = arguments

    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state):
        raise AssertionError("TransformerEngine's state is not part of a checkpoint")

    def forward(self, q, k, v, *, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):
        assert self.arguments["qkv_format"] == "thd"
        assert self.arguments["attn_mask_type"] == "padding_causal_bottom_right"
        # What a row's keys are masked by: their own number, not that of its queries.
        assert self.arguments["attention_type"] == "cross"
        assert q.shape[1] == self.arguments["num_attention_heads"]
        assert k.shape[1] == v.shape[1] == self.arguments["num_gqa_groups"]
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert len(q) == cu_seqlens_q[-1]
        assert len(k) == len(v) == cu_seqlens_kv[-1]
        assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
        assert int(cu_seqlens_kv.diff().max()) == max_seqlen_kv
        return attend_rows(q, k, v, cu_seqlens_q, cu_seqlens_kv)


def build(kind):
    return kind(CONFIG, layer_number=1, attn_mask_type=None, attention_type="")


def test_kernel_is_given_rows_that_make_the_same_attention(ranks, monkeypatch):
    module = ModuleType("transformer_engine.pytorch")
    module.DotProductAttention = WrittenOutKernel
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    inputs = made_inputs()
    assert build(TransformerEngineGroupAttention).state_dict() == build(GroupAttention).state_dict()
    packed = PackedSegments(segments=SEGMENTS, length=LENGTH)
    ours, wanted = (
        build(kind)(*inputs, None, packed_seq_params=packed)
        for kind in (TransformerEngineGroupAttention, GroupAttention)
    )
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)
    for mine, other in zip(gradients(ours, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_missing_transformer_engine_is_an_error_that_says_what_to_install(ranks, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(InputError, match=r"\.\[gpu\]"):
        build(TransformerEngineGroupAttention)
