"""A stand-in for TransformerEngine, written in torch, for machines where it can't be imported.

TransformerEngine needs CUDA. The parts that Megatron's layers use are written here from the
documented behaviour of its version 2.4: the same names, arguments, parameters, attributes and
states, so that Megatron's own layer spec for TransformerEngine is built and runs on a CPU. It tests
how this project uses these layers, not TransformerEngine: its kernels, rounding and speed are not
reproduced. In an 8-bit context, inputs and weights of products are rounded to e4m3 with one scale
per tensor, whatever the recipe; gradients are not rounded.

`install()` must run before Megatron is imported.
"""

import sys
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.nn.functional as F

VERSION = "2.4.0"
# Rows and columns of 8-bit products (assert_dim_for_fp8_exec and the layouts of cuBLAS); mxfp8: 32.
MULTIPLE = 16


@dataclass
class Product:
    """One call of a linear layer, as recorded in `PRODUCTS`."""

    layer: str
    rows: int
    recipe: str | None
    """The recipe of the 8-bit context; None outside of one."""
    grad: bool
    first: bool | None


PRODUCTS: list[Product] = []


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    pass


@dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    override_linear_precision: tuple = (False, False, False)
    fp8_dpa: bool = False
    fp8_mha: bool = False
    # Megatron passes these two on from a layer's arguments.
    params_dtype: torch.dtype | None = None
    device: object = None


@dataclass
class Float8CurrentScaling(Recipe):
    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    fp8_format: Format = Format.E4M3


@dataclass
class MXFP8BlockScaling(Recipe):
    fp8_format: Format = Format.E4M3


@dataclass
class _State:
    recipes: list[Recipe | None] = field(default_factory=list)


_STATE = _State()


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return _recipe() is not None


def _recipe() -> Recipe | None:
    return _STATE.recipes[-1] if _STATE.recipes else None


class fp8_autocast:
    def __init__(self, enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None):
        self.recipe = fp8_recipe if enabled else None

    def __enter__(self):
        _STATE.recipes.append(self.recipe)

    def __exit__(self, *error):
        _STATE.recipes.pop()


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Return x rounded to e4m3; the gradient passes through."""
    scale = 448.0 / x.detach().abs().amax().float().clamp(min=1e-12)
    small = (x.detach().float() * scale).to(torch.float8_e4m3fn)
    return x + ((small.float() / scale).to(x.dtype) - x.detach())


class _Layer(torch.nn.Module):
    """A layer with a state that is part of checkpoints, like all of TransformerEngine's."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0


class _ParallelLinear(_Layer):
    def _make(self, sizes, tp, sequence_parallel, parallel_mode, bias, return_bias, dtype, device):
        (in_features, out_features), (tp_group, tp_size) = sizes, tp
        self.tp_group, self.tp_size = tp_group, tp_size
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.parallel_mode = parallel_mode
        self.use_bias, self.return_bias = bias, return_bias
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.in_features, self.out_features = in_features, out_features
        options = {"dtype": dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, **options))
        self._mark(self.weight, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(out_features, **options))
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
            elif parallel_mode == "column":
                self._mark(self.bias, 0)

    @staticmethod
    def _mark(parameter, dim):
        parameter.tensor_model_parallel = True
        parameter.partition_dim = dim
        parameter.partition_stride = 1

    def _multiply(self, x, first):
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode == "column" and self.sequence_parallel:
            x = mappings.gather_from_sequence_parallel_region(x)
        elif self.parallel_mode == "column" and self.tp_size > 1:
            x = mappings.copy_to_tensor_model_parallel_region(x)
        recipe, weight = _recipe(), self.weight
        rows = x.shape[:-1].numel()
        name = type(recipe).__name__ if recipe else None
        PRODUCTS.append(Product(type(self).__name__, rows, name, torch.is_grad_enabled(), first))
        if recipe is not None:
            multiple = 32 if isinstance(recipe, MXFP8BlockScaling) else MULTIPLE
            for size in (rows, *weight.shape):
                assert size % multiple == 0, f"8-bit product of {rows} rows with {weight.shape}"
            x, weight = _rounded(x), _rounded(weight)
        out = x @ weight.t()
        if self.use_bias and not self.return_bias:
            out = out + self.bias
        if self.parallel_mode == "row" and self.sequence_parallel:
            out = mappings.reduce_scatter_to_sequence_parallel_region(out)
        elif self.parallel_mode == "row" and self.tp_size > 1:
            out = mappings.reduce_from_tensor_model_parallel_region(out)
        return (out, self.bias) if self.return_bias else out


class Linear(_ParallelLinear):
    def __init__(self, in_features, out_features, sequence_parallel=False,
                 fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
                 get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True,
                 return_bias=False, params_dtype=None, parallel_mode=None,
                 device="cuda"):  # fmt: skip
        super().__init__()
        assert not fuse_wgrad_accumulation
        self._make((in_features, out_features), (tp_group, tp_size), sequence_parallel,
                   parallel_mode, bias, return_bias, params_dtype, device)  # fmt: skip

    def forward(self, inp, is_first_microbatch=None):
        return self._multiply(inp, is_first_microbatch)


class LayerNormLinear(_ParallelLinear):
    def __init__(self, in_features, out_features, eps=1e-5, sequence_parallel=False,
                 fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
                 get_rng_state_tracker=None, init_method=None, bias=True, normalization="LayerNorm",
                 return_bias=False, params_dtype=None, parallel_mode=None,
                 return_layernorm_output=False, zero_centered_gamma=False,
                 device="cuda"):  # fmt: skip
        super().__init__()
        used = (normalization, fuse_wgrad_accumulation, return_layernorm_output)
        assert used == ("RMSNorm", False, False)
        assert not zero_centered_gamma
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, dtype=params_dtype, device=device)
        )
        self._make((in_features, out_features), (tp_group, tp_size), sequence_parallel,
                   parallel_mode, bias, return_bias, params_dtype, device)  # fmt: skip
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None):
        normed = F.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps)
        return self._multiply(normed, is_first_microbatch)


class RMSNorm(_Layer):
    def __init__(self, hidden_size, eps=1e-5, sequence_parallel=False, zero_centered_gamma=False,
                 params_dtype=None, device="cuda"):  # fmt: skip
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def attend_rows(q, k, v, query_starts, key_starts, *, scale=None):
    """Attend in rows of unequal length, one by one, causal from the bottom right."""
    outputs = []
    for row in range(len(query_starts) - 1):
        queries = slice(query_starts[row], query_starts[row + 1])
        keys = slice(key_starts[row], key_starts[row + 1])
        count, total = queries.stop - queries.start, keys.stop - keys.start
        mask = torch.ones(count, total).tril(total - count).bool()
        part = [x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys])]
        out = F.scaled_dot_product_attention(*part, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outputs)


class DotProductAttention(_Layer):
    """Attends in rows of unequal length, causal from the bottom right."""

    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None,
                 attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal",
                 layer_number=None, softmax_scale=None, attention_type="self"):  # fmt: skip
        super().__init__()
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal_bottom_right")
        assert attention_type == "cross"
        self.scale = softmax_scale

    def forward(self, q, k, v, *, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):
        return attend_rows(q, k, v, cu_seqlens_q, cu_seqlens_kv, scale=self.scale)


def checkpoint(function, *args, distribute_saved_activations=False, get_rng_state_tracker=None,
               tp_group=None):  # fmt: skip
    """Recompute in the context of the forward pass."""
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    recipes = list(_STATE.recipes)

    def again(*inputs):
        outside, _STATE.recipes = _STATE.recipes, recipes
        try:
            return function(*inputs)
        finally:
            _STATE.recipes = outside

    return torch_checkpoint(again, *args, use_reentrant=True)


def needs_cuda(*arguments, **keywords):
    """Replace a function that calls a CUDA kernel."""
    raise AssertionError("a CUDA kernel was called without CUDA")


class _Unused(_Layer):
    """Bases of classes that Megatron defines on import and this project never creates."""


_MODULES = {
    "": {"__version__": VERSION},
    "common": {},
    "common.recipe": {
        "Format": Format, "DelayedScaling": DelayedScaling,
        "Float8CurrentScaling": Float8CurrentScaling, "Float8BlockScaling": Float8BlockScaling,
        "MXFP8BlockScaling": MXFP8BlockScaling,
    },
    "pytorch": {
        "Linear": Linear, "LayerNormLinear": LayerNormLinear, "RMSNorm": RMSNorm,
        "LayerNorm": _Unused, "GroupedLinear": _Unused, "DotProductAttention": DotProductAttention,
        "fp8_autocast": fp8_autocast,
    },
    "pytorch.fp8": {
        "FP8GlobalStateManager": FP8GlobalStateManager, "fp8_autocast": fp8_autocast,
    },
    "pytorch.distributed": {
        "CudaRNGStatesTracker": _Unused, "checkpoint": checkpoint,
        "activation_recompute_forward": None,
    },
    "pytorch.optimizers": {
        "FusedAdam": needs_cuda, "FusedSGD": needs_cuda, "multi_tensor_applier": needs_cuda,
        "multi_tensor_l2norm": needs_cuda, "multi_tensor_scale": needs_cuda,
    },
    "pytorch.ops": {"Sequential": _Unused, "FusibleOperation": _Unused},
    "pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
}  # fmt: skip


def install() -> None:
    """Make `import transformer_engine` find this module instead."""
    assert "megatron.core" not in sys.modules, "Megatron looks for TransformerEngine on import"
    for path, contents in _MODULES.items():
        name = f"transformer_engine.{path}".rstrip(".")
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(contents)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
