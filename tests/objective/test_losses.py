import dataclasses
import math

import pytest
import torch

from nemo_care.objective.losses import LOSSES, PolicyLoss, PolicyLossInputs, policy_loss

pytestmark = pytest.mark.numeric

N, C = 5, 7
LENGTHS = (7, 1, 3, 5, 2)


@pytest.fixture
def inputs() -> PolicyLossInputs:
    generator = torch.Generator().manual_seed(0)

    def log_probs(spread: float = 1.0) -> torch.Tensor:
        return -spread * torch.rand(N, C, generator=generator)

    policy = log_probs()
    mask = torch.arange(C) < torch.tensor(LENGTHS).unsqueeze(-1)
    return PolicyLossInputs(
        log_probs=policy.clone().requires_grad_(),
        advantages=torch.tensor([1.5, -0.7, 0.0, 0.4, -2.0]),
        mask=mask,
        old_log_probs=policy + 0.8 * torch.rand(N, C, generator=generator) - 0.4,
        reference_log_probs=log_probs(2.0),
    )


def loss_by_hand(
    inputs: PolicyLossInputs, clip_low: float, clip_high: float, kl_coefficient: float
) -> tuple[float, float, float, list[list[float]]]:
    """Loss, KL, clipped share and d loss / d log_probs of step 7, one token at a time.

    A token's weight multiplies its surrogate, and not its KL term."""
    loss = kl_sum = clipped_sum = 0.0
    gradient = [[0.0] * C for _ in range(N)]
    for i in range(N):
        tokens = [t for t in range(C) if inputs.mask[i, t]]
        advantage = inputs.advantages[i].item()
        for t in tokens:
            new = inputs.log_probs[i, t].item()
            old = new if inputs.old_log_probs is None else inputs.old_log_probs[i, t].item()
            ratio = math.exp(new - old)
            bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
            if inputs.old_log_probs is None:
                bounded = ratio
            value = -min(ratio * advantage, bounded * advantage)
            clipped = bounded * advantage < ratio * advantage
            slope = 0.0 if clipped else -advantage * ratio
            if inputs.token_weights is not None:
                weight = inputs.token_weights[i, t].item()
                value, slope = weight * value, weight * slope
            if kl_coefficient:
                d = inputs.reference_log_probs[i, t].item() - new
                kl = math.exp(d) - d - 1
                kl_sum += kl / len(tokens)
                value += kl_coefficient * kl
                slope += kl_coefficient * (1 - math.exp(d))
            loss += value / len(tokens)
            clipped_sum += clipped / len(tokens)
            gradient[i][t] = slope / len(tokens)
    return loss, kl_sum, clipped_sum, gradient


@pytest.mark.parametrize("several_updates", [False, True])
@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.2, 0.2), (0.1, 0.28), (1.0, 9.0)])
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.04])
def test_loss_and_gradient_agree_with_the_formula(
    inputs, several_updates, clip_low, clip_high, kl_coefficient
):
    if not several_updates:
        inputs = dataclasses.replace(inputs, old_log_probs=None)
    output = policy_loss(
        inputs, clip_low=clip_low, clip_high=clip_high, kl_coefficient=kl_coefficient
    )
    output.loss_sum.backward()
    loss, kl, clipped, gradient = loss_by_hand(inputs, clip_low, clip_high, kl_coefficient)
    assert output.loss_sum.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert output.kl_sum.item() == pytest.approx(kl, rel=1e-5)
    assert output.clipped_sum.item() == pytest.approx(clipped)
    torch.testing.assert_close(inputs.log_probs.grad, torch.tensor(gradient))
    # The cases mean something: the clip bites where it is narrow, and only there.
    assert (clipped > 0) == (several_updates and clip_high < 1)


LONGEST = 9


def objective_by_loops(
    name: str, inputs: PolicyLossInputs, clip_low: float, clip_high: float
) -> tuple[float, torch.Tensor]:
    """The whole objective as its paper writes it, token by token in float64, and its gradient."""
    log_probs = inputs.log_probs.detach().double().requires_grad_()
    rows, lengths = [], []
    for i in range(N):
        tokens = [t for t in range(C) if inputs.mask[i, t]]
        if not tokens:
            continue
        advantage = inputs.advantages[i].double()
        new = [log_probs[i, t] for t in tokens]
        old = [value.detach() for value in new]
        if inputs.old_log_probs is not None:
            old = [inputs.old_log_probs[i, t].double() for t in tokens]
        ratios = [torch.exp(a - b) for a, b in zip(new, old, strict=True)]
        if name == "gspo":
            mean = sum(a - b for a, b in zip(new, old, strict=True)) / len(tokens)
            ratios = [torch.exp(mean)] * len(tokens)
        values = []
        for ratio, log_prob in zip(ratios, new, strict=True):
            if name == "cispo":
                bounded = min(max(ratio.item(), 1 - clip_low), 1 + clip_high)
                values.append(bounded * advantage * log_prob)
                continue
            bounded = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
            values.append(torch.min(ratio * advantage, bounded * advantage))
        rows.append(values)
        lengths.append(len(tokens))
    sums = [sum(values) for values in rows]
    if name in ("grpo", "gspo"):
        objective = sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(rows)
    elif name == "dr_grpo":
        objective = sum(sums) / (len(rows) * LONGEST)
    else:
        objective = sum(sums) / sum(lengths)
    (-objective).backward()
    return -objective.item(), log_probs.grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("several_updates", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_each_loss_is_its_papers_objective(inputs, name, several_updates, masked):
    if not several_updates:
        inputs = dataclasses.replace(inputs, old_log_probs=None)
    if masked:
        # A completion that was cut off is in no mean.
        mask = inputs.mask.clone()
        mask[3] = False
        inputs = dataclasses.replace(inputs, mask=mask)
    clips = {"clip_low": 0.03, "clip_high": 0.05} if name == "gspo" else {}
    output = policy_loss(inputs, kind=LOSSES[name], **clips)
    count = LOSSES[name].mean.count(inputs.mask, LONGEST)
    (output.loss_sum / count).backward()
    value, gradient = objective_by_loops(
        name, inputs, clips.get("clip_low", 0.2), clips.get("clip_high", 0.2)
    )
    assert output.loss_sum.item() / count == pytest.approx(value, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(inputs.log_probs.grad, gradient.float())
    # The clip bites with old log-probabilities, and only then.
    assert (output.clipped_sum > 0) == several_updates
    assert output.completions == N - masked


@pytest.mark.parametrize(("name", "same_as"), [("gspo", "grpo"), ("cispo", "token_mean")])
def test_with_one_update_per_rollout_the_ratio_makes_no_difference(inputs, name, same_as):
    inputs = dataclasses.replace(inputs, old_log_probs=None)
    gradients = []
    for kind in (name, same_as):
        log_probs = inputs.log_probs.detach().clone().requires_grad_()
        policy_loss(
            dataclasses.replace(inputs, log_probs=log_probs), kind=LOSSES[kind]
        ).loss_sum.backward()
        gradients.append(log_probs.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.04])
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up(inputs, name, kl_coefficient):
    loss = LOSSES[name]
    inputs = dataclasses.replace(inputs, token_weights=torch.linspace(0, 2, N * C).view(N, C))
    whole = policy_loss(inputs, kind=loss, kl_coefficient=kl_coefficient)
    whole.loss_sum.backward()
    gradient = inputs.log_probs.grad.clone()
    inputs.log_probs.grad = None

    parts, count = [], 0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        names = [field.name for field in dataclasses.fields(PolicyLossInputs)]
        part = PolicyLossInputs(**{name: getattr(inputs, name)[rows] for name in names})
        parts.append(policy_loss(part, kind=loss, kl_coefficient=kl_coefficient))
        parts[-1].loss_sum.backward()
        count += loss.mean.count(part.mask, LONGEST)
    assert count == loss.mean.count(inputs.mask, LONGEST)
    torch.testing.assert_close(inputs.log_probs.grad, gradient)
    for field in dataclasses.fields(PolicyLoss):
        total = sum(getattr(part, field.name) for part in parts)
        torch.testing.assert_close(total, getattr(whole, field.name))


def test_values_outside_the_mask_reach_neither_loss_nor_gradient(inputs):
    clean = policy_loss(inputs, kl_coefficient=0.04)
    clean.loss_sum.backward()

    def spoil(tensor: torch.Tensor, value: float) -> torch.Tensor:
        return tensor.detach().masked_fill(~inputs.mask, value)

    spoilt = PolicyLossInputs(
        log_probs=spoil(inputs.log_probs, -math.inf).requires_grad_(),
        advantages=inputs.advantages,
        mask=inputs.mask,
        old_log_probs=spoil(inputs.old_log_probs, math.nan),
        reference_log_probs=spoil(inputs.reference_log_probs, math.inf),
    )
    output = policy_loss(spoilt, kl_coefficient=0.04)
    output.loss_sum.backward()
    assert torch.equal(output.loss_sum, clean.loss_sum)
    assert torch.equal(spoilt.log_probs.grad, inputs.log_probs.grad)


def test_a_row_of_padding_adds_nothing(inputs):
    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.detach(), torch.ones_like(tensor[:1])])

    longer = PolicyLossInputs(
        log_probs=padded(inputs.log_probs).requires_grad_(),
        advantages=padded(inputs.advantages),
        mask=torch.cat([inputs.mask, torch.zeros(1, C, dtype=torch.bool)]),
        old_log_probs=padded(inputs.old_log_probs),
        reference_log_probs=padded(inputs.reference_log_probs),
    )
    output = policy_loss(longer, kl_coefficient=0.04)
    output.loss_sum.backward()
    for field in dataclasses.fields(PolicyLoss):
        expected = getattr(policy_loss(inputs, kl_coefficient=0.04), field.name)
        torch.testing.assert_close(getattr(output, field.name), expected)
    assert (longer.log_probs.grad[-1] == 0).all()


def test_the_kl_term_is_zero_and_flat_at_the_reference(inputs):
    same = dataclasses.replace(
        inputs,
        advantages=torch.zeros(N),
        old_log_probs=None,
        reference_log_probs=inputs.log_probs.detach().clone(),
    )
    output = policy_loss(same, kl_coefficient=1.0)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0
    assert (same.log_probs.grad == 0).all()


def test_the_kl_term_keeps_small_differences():
    d = 1e-4
    inputs = PolicyLossInputs(
        log_probs=torch.zeros(1, 1),
        advantages=torch.zeros(1),
        mask=torch.ones(1, 1, dtype=torch.bool),
        reference_log_probs=torch.full((1, 1), d),
    )
    kl = policy_loss(inputs, kl_coefficient=1.0).kl_sum.item()
    assert kl == pytest.approx(d**2 / 2, rel=1e-2)


def test_without_a_coefficient_the_reference_is_not_read(inputs):
    spoilt = dataclasses.replace(inputs, reference_log_probs=torch.full((N, C), math.nan))
    without = dataclasses.replace(inputs, reference_log_probs=None)
    assert torch.equal(policy_loss(spoilt).loss_sum, policy_loss(without).loss_sum)
    assert policy_loss(spoilt).kl_sum == 0


def test_a_coefficient_without_a_reference_is_refused(inputs):
    with pytest.raises(ValueError, match="reference_log_probs"):
        policy_loss(dataclasses.replace(inputs, reference_log_probs=None), kl_coefficient=0.04)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("log_probs", torch.zeros(N)),
        ("advantages", torch.zeros(N, 1)),
        ("mask", torch.ones(N, C + 1, dtype=torch.bool)),
        ("old_log_probs", torch.zeros(N, 1)),
        ("reference_log_probs", torch.zeros(C)),
        ("token_weights", torch.zeros(N)),
    ],
)
def test_shapes_that_do_not_fit_are_named(inputs, name, value):
    with pytest.raises(ValueError, match=name):
        policy_loss(dataclasses.replace(inputs, **{name: value}))


def test_only_the_policy_gets_a_gradient_and_sums_are_float32(inputs):
    inputs = dataclasses.replace(inputs, token_weights=torch.ones(N, C))
    tensors = {
        field.name: getattr(inputs, field.name) for field in dataclasses.fields(PolicyLossInputs)
    }
    mask = tensors.pop("mask")
    halves = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in tensors.items()}
    output = policy_loss(PolicyLossInputs(mask=mask, **halves), kl_coefficient=0.04)
    output.loss_sum.backward()
    assert halves.pop("log_probs").grad is not None
    assert all(tensor.grad is None for tensor in halves.values())
    for field in dataclasses.fields(PolicyLoss):
        value = getattr(output, field.name)
        assert value.dtype == torch.float32
        assert value.requires_grad == (field.name == "loss_sum")


@pytest.mark.parametrize("several_updates", [False, True])
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.04])
def test_token_weights_multiply_the_surrogate_and_not_the_kl_term(
    inputs, several_updates, kl_coefficient
):
    if not several_updates:
        inputs = dataclasses.replace(inputs, old_log_probs=None)
    weights = torch.rand(N, C, generator=torch.Generator().manual_seed(1)) + 0.5
    # What is outside the mask is ignored, whatever it holds.
    weights = torch.where(inputs.mask, weights, math.nan).requires_grad_()
    weighted = dataclasses.replace(inputs, token_weights=weights)
    output = policy_loss(weighted, kl_coefficient=kl_coefficient)
    output.loss_sum.backward()
    assert weights.grad is None
    loss, _, _, gradient = loss_by_hand(weighted, 0.2, 0.2, kl_coefficient)
    assert output.loss_sum.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(inputs.log_probs.grad, torch.tensor(gradient))
    plain = policy_loss(inputs, kl_coefficient=kl_coefficient)
    assert torch.equal(output.kl_sum, plain.kl_sum)
    assert torch.equal(output.clipped_sum, plain.clipped_sum)
