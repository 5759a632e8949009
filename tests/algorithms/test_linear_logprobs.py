import math

import pytest
import torch

from rlhf.algorithms import linear_logprobs as module
from rlhf.algorithms.linear_logprobs import linear_logprobs, linear_token_scores
from rlhf.algorithms.logprobs import entropies, selected_logprobs
from tests.benchmarks.fused_logprobs import peak_bytes

TOKENS, HIDDEN, VOCABULARY = 7, 5, 13
ROW = 4 * VOCABULARY


@pytest.fixture(params=["at once", "a row", "uneven", "in slices"])
def _cutting(request, monkeypatch):
    """Results must not depend on how rows are cut; sizes are those of float32 rows."""
    chunk, cut = {"at once": (2**20, 2**20), "a row": (1, 1), "uneven": (3 * ROW, 2 * ROW), "in slices": (2**20, ROW)}[
        request.param
    ]
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(module, "SLICE_BYTES", cut)


@pytest.fixture(params=["kept", "computed anew"])
def _keeping(request, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", {"kept": 2**20, "computed anew": 0}[request.param])


def batch(dtype=torch.float32, tokens=TOKENS, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    hidden = scale * torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), torch.randint(VOCABULARY, (tokens,), generator=generator)


def plain(hidden, weight, targets, temperature=1.0):
    return selected_logprobs(hidden @ weight.T / temperature, targets)


def gradients(function, hidden, weight, targets, upstream, *options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    values = function(hidden, weight, targets, *options)
    return values.detach(), *torch.autograd.grad(values, (hidden, weight), upstream.to(values.dtype))


def test_by_hand():
    hidden = torch.tensor([[1.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[math.log(3)], [0.0]], requires_grad=True)
    found = linear_logprobs(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([math.log(3 / 4), math.log(1 / 2)]))
    found.backward(torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(hidden.grad, torch.tensor([[math.log(3)], [-math.log(3)]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0], [-1.0]]))


@pytest.mark.usefixtures("_cutting", "_keeping")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(temperature):
    hidden, weight, targets = batch(torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, targets, temperature), leaves)


@pytest.mark.usefixtures("_cutting", "_keeping")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_equals_plain_logits(temperature):
    inputs = *batch(), torch.linspace(-2, 2, TOKENS)
    found = gradients(linear_logprobs, *inputs, temperature)
    assert found[0].dtype == torch.float32
    for ours, expected in zip(found, gradients(plain, *inputs, temperature), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("_cutting", "_keeping")
def test_bfloat16_is_as_near_to_double_as_its_own_rounding():
    inputs = *batch(torch.bfloat16), torch.linspace(-2, 2, TOKENS)
    found = gradients(linear_logprobs, *inputs)
    exact = gradients(plain, *(tensor.double() for tensor in inputs[:2]), *inputs[2:])
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))


@pytest.mark.usefixtures("_cutting")
def test_bfloat16_scores_are_those_of_the_same_logits_in_float32():
    hidden, weight, targets = batch(torch.bfloat16)
    logits = hidden @ weight.T
    scores, entropy = linear_token_scores(hidden, weight, targets)
    assert scores.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(scores, selected_logprobs(logits, targets), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, entropies(logits), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_cutting")
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_scores_equal_plain_logits(temperature):
    hidden, weight, targets = batch()
    scores, entropy = linear_token_scores(hidden.requires_grad_(), weight, targets, temperature)
    assert not scores.requires_grad
    assert not entropy.requires_grad
    logits = hidden.detach() @ weight.T / temperature
    torch.testing.assert_close(scores, selected_logprobs(logits, targets))
    torch.testing.assert_close(entropy, entropies(logits))


@pytest.mark.usefixtures("_keeping")
def test_gradients_of_one_side_alone():
    hidden, weight, targets = batch()
    upstream = torch.linspace(-2, 2, TOKENS)
    _, of_hidden, of_weight = gradients(linear_logprobs, hidden, weight, targets, upstream)
    alone = hidden.clone().requires_grad_()
    linear_logprobs(alone, weight, targets).backward(upstream)
    torch.testing.assert_close(alone.grad, of_hidden, rtol=0, atol=0)
    alone = weight.clone().requires_grad_()
    linear_logprobs(hidden, alone, targets).backward(upstream)
    torch.testing.assert_close(alone.grad, of_weight, rtol=0, atol=0)


@pytest.mark.usefixtures("_cutting")
def test_without_gradients_the_values_are_the_same():
    hidden, weight, targets = batch()
    found = linear_logprobs(hidden, weight, targets)
    assert not found.requires_grad
    learning = linear_logprobs(hidden.requires_grad_(), weight, targets)
    assert learning.requires_grad
    torch.testing.assert_close(found, learning.detach(), rtol=0, atol=0)
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, targets).requires_grad


@pytest.mark.usefixtures("_keeping")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_tokens(dtype):
    hidden, weight, targets = batch(dtype, tokens=0)
    values, of_hidden, of_weight = gradients(linear_logprobs, hidden, weight, targets, torch.zeros(0))
    assert values.shape == (0,)
    assert of_hidden.shape == (0, HIDDEN)
    torch.testing.assert_close(of_weight, torch.zeros_like(weight), rtol=0, atol=0)
    assert [tuple(found.shape) for found in linear_token_scores(hidden, weight, targets)] == [(0,), (0,)]


@pytest.mark.usefixtures("_cutting", "_keeping")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_very_large_logits_stay_finite(dtype):
    hidden, weight, targets = batch(dtype, scale=1e6)
    found = gradients(linear_logprobs, hidden, weight, targets, torch.ones(TOKENS))
    assert all(tensor.isfinite().all() for tensor in found)
    exact = selected_logprobs((hidden @ weight.T).double(), targets)
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-5)
    scores, entropy = linear_token_scores(hidden, weight, targets)
    assert scores.isfinite().all()
    assert (entropy.abs() < 1e-3).all()


def test_impossible_tokens():
    hidden = torch.tensor([[1.0], [2.0]])
    weight = torch.tensor([[0.0], [0.0], [-math.inf]])
    scores, entropy = linear_token_scores(hidden, weight, torch.tensor([1, 2]))
    torch.testing.assert_close(scores, torch.tensor([-math.log(2), -math.inf]))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(2)))


@pytest.mark.usefixtures("_keeping")
def test_linear_in_the_upstream_gradient_and_repeatable():
    hidden, weight, targets = batch()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    values = linear_logprobs(hidden, weight, targets)
    first, second = torch.eye(TOKENS)[1], torch.linspace(-1, 3, TOKENS)
    pulls = [
        torch.autograd.grad(values, leaves, upstream, retain_graph=True)
        for upstream in (first, second, 2 * first - second)
    ]
    for one, two, both in zip(*pulls, strict=True):
        torch.testing.assert_close(both, 2 * one - two, rtol=1e-5, atol=1e-6)
    assert not pulls[0][0][[0, *range(2, TOKENS)]].any()


def test_views_give_what_copies_give():
    hidden, weight, targets = batch()
    wide = torch.stack([hidden, -hidden], dim=1)
    upstream = torch.ones(TOKENS)
    strided = gradients(
        lambda h, w, t: linear_logprobs(torch.stack([h, -h], 1)[:, 0], w, t), hidden, weight, targets, upstream
    )
    for found, expected in zip(strided, gradients(linear_logprobs, hidden, weight, targets, upstream), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        linear_token_scores(wide[:, 0], weight, targets), linear_token_scores(hidden, weight, targets)
    )


@pytest.mark.parametrize(("kept", "copies"), [(2**30, 1), (0, 0)])
def test_holds_a_chunk_of_logits_beside_what_it_keeps(kept, copies, monkeypatch):
    tokens, hidden, vocabulary = 256, 8, 1024
    row = 4 * vocabulary
    monkeypatch.setattr(module, "CHUNK_BYTES", 16 * row)
    monkeypatch.setattr(module, "SLICE_BYTES", 4 * row // torch.get_num_threads())
    monkeypatch.setattr(module, "KEPT_BYTES", kept)
    h = torch.randn(tokens, hidden, requires_grad=True)
    w = torch.randn(vocabulary, hidden, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    ours = peak_bytes(lambda: linear_logprobs(h, w, targets).sum().backward())
    logits = tokens * row
    assert copies * logits < ours < copies * logits + 40 * row
    assert peak_bytes(lambda: plain(h, w, targets).sum().backward()) > 2.9 * logits
