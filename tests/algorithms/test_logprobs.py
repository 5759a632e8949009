import math

import pytest
import torch

from rlhf.algorithms import logprobs
from rlhf.algorithms.logprobs import align, entropies, selected_logprobs, sequence_logprobs


@pytest.fixture(params=["one slice", "a row per slice", "ragged slices"])
def _slicing(request, monkeypatch):
    """Results must not depend on how rows are cut; the batches below have vocabulary 13."""
    size = {"one slice": 2**20, "a row per slice": 1, "ragged slices": 13 * 4}[request.param]
    monkeypatch.setattr(logprobs, "SLICE_ELEMENTS", size)


def batch(dtype=torch.float32, scale=3.0, offset=0.0):
    generator = torch.Generator().manual_seed(3)
    logits = offset + scale * torch.randn(2, 5, 13, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(13, (2, 5), generator=generator)


def oracle(logits, targets):
    return logits.double().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def test_align_puts_a_prediction_on_the_token_it_is_about():
    next_values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    aligned = align(next_values)
    assert aligned.tolist() == [[0, 1, 2], [0, 3, 4]]
    (aligned * torch.tensor([10.0, 20.0, 30.0])).sum().backward()
    assert next_values.grad.tolist() == [[20, 30], [20, 30]]


def test_selected_logprobs_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = torch.tensor([math.log(1 / 2), math.log(3 / 4)])
    torch.testing.assert_close(selected_logprobs(logits, torch.tensor([1, 0])), expected)


@pytest.mark.usefixtures("_slicing")
@pytest.mark.parametrize("offset", [0.0, 60.0, -60.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_selected_logprobs_equal_log_softmax_in_double(dtype, offset):
    logits, targets = batch(dtype, offset=offset)
    selected = selected_logprobs(logits, targets)
    assert selected.dtype == torch.float32
    torch.testing.assert_close(selected.double(), oracle(logits, targets), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_slicing")
def test_selected_logprobs_gradcheck():
    logits, targets = batch(torch.float64)
    assert torch.autograd.gradcheck(lambda x: selected_logprobs(x, targets), logits.requires_grad_())


@pytest.mark.usefixtures("_slicing")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float32, 1e-6)])
def test_selected_logprobs_gradient_equals_log_softmax_in_double(dtype, tolerance):
    logits, targets = batch(dtype)
    weights = torch.linspace(-2, 2, 10).view(2, 5)
    ours = logits.clone().requires_grad_()
    (selected_logprobs(ours, targets) * weights).sum().backward()
    exact = logits.double().requires_grad_()
    (oracle(exact, targets) * weights).sum().backward()
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=1e-6)


def test_selected_logprobs_survive_extreme_logits():
    logits = torch.tensor([[3e4, -3e4, 0.0], [-math.inf, 0.0, 0.0]], requires_grad=True)
    selected = selected_logprobs(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(selected.detach(), torch.tensor([-6e4, -math.log(2)]))
    selected.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0, 0.0], [0.0, -0.5, 0.5]]))


def test_selected_logprobs_of_a_strided_view_and_of_nothing():
    logits, targets = batch()
    torch.testing.assert_close(
        selected_logprobs(logits[:, :-1], targets[:, 1:])[1], oracle(logits[1, :-1], targets[1, 1:]).float()
    )
    assert selected_logprobs(logits[:0], targets[:0]).shape == (0, 5)
    assert entropies(logits[:0]).shape == (0, 5)


@pytest.mark.usefixtures("_slicing")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_entropies_equal_the_definition_in_double(dtype):
    logits, _ = batch(dtype)
    probabilities = logits.double().softmax(-1)
    expected = -(probabilities * probabilities.log()).sum(-1)
    result = entropies(logits)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


def test_entropies_by_hand():
    logits = torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, -math.inf, -math.inf], [1e4, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(entropies(logits), torch.tensor([math.log(4), math.log(2), 0.0]))


def test_entropies_gradcheck_and_finite_gradient_at_impossible_tokens():
    logits, _ = batch(torch.float64)
    assert torch.autograd.gradcheck(entropies, logits.requires_grad_())
    extreme = torch.tensor([[0.0, 1.0, -1e4]], requires_grad=True)
    entropies(extreme).sum().backward()
    assert extreme.grad.isfinite().all()


def test_sequence_logprobs_sum_the_mask_only():
    values = torch.tensor([[0.0, -1.0, -2.0, float("nan")], [0.0, -9.0, -0.5, -0.25]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert sequence_logprobs(values, mask).tolist() == [-3.0, -0.75]
