"""Log-probabilities computed a chunk of rows at a time equal log-softmax: values and gradients."""

import pytest
import torch
from made_cuda import CUDA_PRODUCT, with_cuda_products, without_values
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_care.models.log_probs import float32_product, token_log_probs

pytestmark = pytest.mark.numeric

R, H, V, PADDED = 23, 6, 37, 48
# Several tokens may be predicted from one row, in any order, and a row may predict none.
ROW_OF = torch.tensor([0, 5, 5, 22, 3, 5, 7, 19, 0])
TOKENS = torch.tensor([36, 0, 11, 4, 4, 30, 8, 1, 2])


def made_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, H, generator=generator).to(dtype).requires_grad_() for rows in (R, PADDED)
    )
    return hidden, weight


def by_log_softmax(hidden, weight):
    logits = (hidden @ weight.t()).float()[:, :V]
    return torch.log_softmax(logits, dim=-1)[ROW_OF, TOKENS]


@pytest.mark.parametrize("rows", [1, 4, 23, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_equal_log_softmax(ranks, rows, dtype):
    hidden, weight = made_inputs(dtype)
    ours = token_log_probs(hidden, weight, ROW_OF, TOKENS, V, chunk_elements=rows * PADDED)
    wanted = by_log_softmax(hidden, weight)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    factors = torch.randn(len(TOKENS), generator=torch.Generator().manual_seed(1))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for mine, other in zip(
        torch.autograd.grad((ours * factors).sum(), (hidden, weight)),
        torch.autograd.grad((wanted * factors).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


def test_gradients_of_many_bf16_chunks_are_as_good_as_one_rounding(ranks):
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary = 2048, 8
    hidden = (1 + 0.1 * torch.randn(rows, 4, generator=generator)).bfloat16()
    weight = torch.randn(vocabulary, 4, generator=generator).bfloat16().requires_grad_()
    tokens = torch.zeros(rows, dtype=torch.long)
    exact = weight.detach().double().requires_grad_()
    torch.log_softmax(hidden.double() @ exact.t(), dim=-1)[:, 0].sum().backward()
    for chunk in (1, 16, rows):
        weight.grad = None
        token_log_probs(
            hidden,
            weight,
            torch.arange(rows),
            tokens,
            vocabulary,
            chunk_elements=chunk * vocabulary,
        ).sum().backward()
        error = (weight.grad - exact.grad).abs().max() / exact.grad.abs().max()
        assert error < 2**-7, chunk


def test_only_what_is_asked_for_gets_a_gradient(ranks):
    hidden, weight = made_inputs()
    log_probs = token_log_probs(hidden.detach(), weight, ROW_OF, TOKENS, V)
    log_probs.sum().backward()
    assert weight.grad is not None
    # The padding columns have no probability, and so no gradient.
    assert bool((weight.grad[V:] == 0).all())


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


def test_no_tensor_of_all_tokens_times_the_vocabulary_exists(ranks):
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary, chunk = 512, 2048, 64 * 2048
    hidden = torch.randn(rows, 8, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 8, generator=generator, requires_grad=True)
    tokens = torch.randint(0, vocabulary, (rows,), generator=generator)
    with _LargestTensor() as largest:
        token_log_probs(
            hidden, weight, torch.arange(rows), tokens, vocabulary, chunk_elements=chunk
        ).sum().backward()
    assert largest.elements == chunk < rows * vocabulary
    with _LargestTensor() as largest:
        torch.log_softmax(hidden @ weight.t(), dim=-1)[torch.arange(rows), tokens].sum().backward()
    assert largest.elements == rows * vocabulary


def rounding_errors():
    """Largest errors of log-probabilities and of the weight's gradient, bf16 with large logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16()
    weight = (4 * torch.randn(40, 32, generator=generator)).bfloat16().requires_grad_()
    tokens = torch.randint(0, 40, (64,), generator=generator)
    exact = weight.detach().double().requires_grad_()
    wanted = torch.log_softmax(hidden.double() @ exact.t(), dim=-1)[torch.arange(64), tokens]
    ours = token_log_probs(hidden, weight, torch.arange(64), tokens, 40, chunk_elements=8 * 40)
    wanted.sum().backward()
    ours.sum().backward()
    return (ours - wanted).abs().max().item(), (weight.grad - exact.grad).abs().max().item()


def test_logits_of_bf16_weights_are_not_rounded_where_cuda_sums_them(ranks):
    rounded, rounded_gradient = rounding_errors()
    with with_cuda_products():
        whole, whole_gradient = rounding_errors()
    assert whole < 1e-4 < 1e-2 < rounded
    assert whole_gradient < rounded_gradient


class _Products(TorchDispatchMode):
    """The kernels that are called, views left out."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace == "aten":
            self.kernels.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_of_cuda_tensors_is_one_kernel_with_a_float32_result(dtype):
    """Tensors without values, since there is no GPU: only the call is checked."""
    with FakeTensorMode():
        left, right = without_values(4, 8, dtype=dtype), without_values(6, 8, dtype=dtype)
        with _Products() as calls:
            product = float32_product(left, right.t())
    assert (product.dtype, product.device.type) == (torch.float32, "cuda")
    wanted = CUDA_PRODUCT if dtype == torch.bfloat16 else torch.ops.aten.mm.default
    assert calls.kernels == [wanted]
