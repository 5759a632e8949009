import math
import pickle
from functools import partial
from inspect import signature
from typing import get_args

import pytest
import torch

from rlhf.algorithms.preference import (
    PAIR_LOSSES,
    PairLogprobs,
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
    token_means,
)
from rlhf.algorithms.reward_model import bradley_terry_loss
from rlhf.recipe.preference_schema import REFERENCE_FREE, AnyPairStage
from rlhf.recipe.stage_base import Training

# logratios: chosen 2 and -1, rejected -2 and 1, so with beta 0.5 the margins are 2 and -1
CHOSEN, REF_CHOSEN = torch.tensor([-10.0, -7.0]), torch.tensor([-12.0, -6.0])
REJECTED, REF_REJECTED = torch.tensor([-20.0, -5.0]), torch.tensor([-18.0, -6.0])
PAIRS = PairLogprobs(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, torch.tensor([4, 2]), torch.tensor([8, 5]))
SETTINGS = {
    "dpo": {"beta": 0.5},
    "robust_dpo": {"beta": 0.5, "label_noise": 0.1},
    "ipo": {"beta": 0.5},
    "hinge": {"beta": 0.5},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "orpo": {"beta": 0.5},
}


def softplus(x):
    return math.log1p(math.exp(x))


def one_pair(chosen, rejected, chosen_length=1, rejected_length=1):
    """A pair whose reference log-probabilities are 0, in float64; `chosen` gets a gradient."""
    numbers = (chosen, rejected, 0.0, 0.0)
    tensors = [torch.tensor([float(number)], dtype=torch.float64) for number in numbers]
    tensors[0].requires_grad_()
    return PairLogprobs(*tensors, torch.tensor([chosen_length]), torch.tensor([rejected_length]))


def slope(loss, pair):
    return torch.autograd.grad(loss(pair).loss.sum(), pair.chosen)[0].item()


def test_implicit_rewards_by_hand():
    assert implicit_rewards(CHOSEN, REF_CHOSEN, 0.5).tolist() == [1.0, -0.5]


def test_token_means_by_hand():
    means = token_means(PAIRS)
    assert means.chosen.tolist() == [-2.5, -3.5]
    assert means.rejected.tolist() == [-2.5, -1.0]
    torch.testing.assert_close(means.ref_chosen, torch.tensor([-3.0, -3.0]))
    torch.testing.assert_close(means.ref_rejected, torch.tensor([-2.25, -1.2]))
    torch.testing.assert_close(token_means(means).chosen, means.chosen)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_loss_by_hand(smoothing):
    out = dpo_loss(PAIRS, 0.5, smoothing)
    expected = [(1 - smoothing) * softplus(-margin) + smoothing * softplus(margin) for margin in (2, -1)]
    torch.testing.assert_close(out.loss, torch.tensor(expected))
    assert out.chosen_reward.tolist() == [1.0, -0.5]
    assert out.rejected_reward.tolist() == [-1.0, 0.5]


def test_length_normalised_dpo_by_hand():
    # log-ratios per token: 2/4 and -1/2 against -2/8 and 1/5, so with beta 2 the margins are 1.5 and -1.4
    out = dpo_loss(PAIRS, 2.0, length_normalised=True)
    torch.testing.assert_close(out.loss, torch.tensor([softplus(-1.5), softplus(1.4)]))
    torch.testing.assert_close(out.chosen_reward, torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(out.rejected_reward, torch.tensor([-0.5, 0.4]))


@pytest.mark.parametrize("length_normalised", [False, True])
def test_nll_adds_the_chosen_cross_entropy_per_token(length_normalised):
    plain = dpo_loss(PAIRS, 0.5, length_normalised=length_normalised)
    added = dpo_loss(PAIRS, 0.5, length_normalised=length_normalised, nll_coef=2.0)
    torch.testing.assert_close(added.loss - plain.loss, torch.tensor([2 * 10 / 4, 2 * 7 / 2]))
    assert torch.equal(added.chosen_reward, plain.chosen_reward)


def test_dpo_starts_at_log_2_with_gradient_half_beta():
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    losses = dpo_loss(PAIRS._replace(chosen=chosen, rejected=rejected, ref_chosen=CHOSEN, ref_rejected=REJECTED), 0.1)
    torch.testing.assert_close(losses.loss.detach(), torch.full((2,), math.log(2)))
    losses.loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.full((2,), -0.05))
    torch.testing.assert_close(rejected.grad, torch.full((2,), 0.05))


def test_smoothed_loss_is_least_where_the_policy_is_as_sure_as_the_labels():
    # cDPO: sigmoid(margin) = 1 - smoothing at the minimum
    assert slope(partial(dpo_loss, beta=1.0, label_smoothing=0.1), one_pair(math.log(9), 0)) == pytest.approx(
        0, abs=1e-12
    )


def test_robust_dpo_by_hand():
    out = robust_dpo_loss(PAIRS, 0.5, 0.1)
    expected = [(0.9 * softplus(-margin) - 0.1 * softplus(margin)) / 0.8 for margin in (2, -1)]
    torch.testing.assert_close(out.loss, torch.tensor(expected))
    assert out.chosen_reward.tolist() == [1.0, -0.5]
    torch.testing.assert_close(robust_dpo_loss(PAIRS, 0.5, 0.0).loss, dpo_loss(PAIRS, 0.5).loss)


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.45])
def test_robust_dpo_is_unbiased_under_flips_and_dpo_is_not(noise):
    chosen, rejected, ref_chosen, ref_rejected, longer, shorter = (part.double() for part in PAIRS)
    swapped = PairLogprobs(rejected, chosen, ref_rejected, ref_chosen, shorter, longer)
    straight = PairLogprobs(chosen, rejected, ref_chosen, ref_rejected, longer, shorter)
    clean = dpo_loss(straight, 0.5).loss

    def expected(loss):
        return (1 - noise) * loss(straight).loss + noise * loss(swapped).loss

    torch.testing.assert_close(expected(partial(robust_dpo_loss, beta=0.5, label_noise=noise)), clean)
    assert (expected(partial(dpo_loss, beta=0.5)) - clean).abs().min() > 0.02


def test_ipo_by_hand():
    # log-ratios per token differ by 0.75 and -0.7; 1 / (2 beta) is 1
    out = ipo_loss(PAIRS, 0.5)
    torch.testing.assert_close(out.loss, torch.tensor([0.25**2, 1.7**2]))
    torch.testing.assert_close(out.chosen_reward - out.rejected_reward, torch.tensor([0.75, -0.7]))


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_is_least_at_a_margin_of_half_over_beta(beta):
    loss = partial(ipo_loss, beta=beta)
    best = 1 / (2 * beta)
    at = one_pair(4 * (best + 0.3), 2 * 0.3, chosen_length=4, rejected_length=2)
    assert loss(at).loss.item() == pytest.approx(0, abs=1e-12)
    assert slope(loss, at) == pytest.approx(0, abs=1e-12)
    assert slope(loss, one_pair(best - 0.1, 0)) < 0 < slope(loss, one_pair(best + 0.1, 0))


def test_hinge_by_hand_is_flat_beyond_a_margin_of_1():
    out = hinge_loss(PAIRS, 0.5)
    assert out.loss.tolist() == [0.0, 2.0]
    assert out.chosen_reward.tolist() == [1.0, -0.5]
    loss = partial(hinge_loss, beta=0.5)
    assert slope(loss, one_pair(1.9, 0)) == -0.5
    assert slope(loss, one_pair(2.1, 0)) == 0


def test_simpo_by_hand():
    # log p per token: -2.5 and -3.5 against -2.5 and -1, so with beta 2 the margins are 0 and -5
    out = simpo_loss(PAIRS, 2.0, 1.0)
    torch.testing.assert_close(out.loss, torch.tensor([softplus(1), softplus(6)]))
    assert out.chosen_reward.tolist() == [-5.0, -7.0]
    assert out.rejected_reward.tolist() == [-5.0, -2.0]


def test_orpo_by_hand():
    # p = 1/2 has odds 1, p = 1/4 has odds 1/3: the log odds ratio is log 3, and -log sigmoid(log 3) = log 4/3
    pair = one_pair(3 * math.log(1 / 2), 2 * math.log(1 / 4), chosen_length=3, rejected_length=2)
    out = orpo_loss(pair, 0.5)
    assert out.loss.item() == pytest.approx(math.log(2) + 0.5 * math.log(4 / 3))
    assert out.chosen_reward.item() == pytest.approx(0, abs=1e-12)
    assert out.rejected_reward.item() == pytest.approx(-math.log(3))


@pytest.mark.parametrize("kind", sorted(PAIR_LOSSES))
def test_a_pair_that_is_the_wrong_way_round_pulls_its_sides_apart(kind):
    loss = partial(PAIR_LOSSES[kind], **SETTINGS[kind])
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    loss(PAIRS._replace(chosen=chosen, rejected=rejected)).loss[1].backward()
    assert chosen.grad[1] < 0 < rejected.grad[1]
    assert chosen.grad[0] == rejected.grad[0] == 0


@pytest.mark.parametrize("kind", sorted(PAIR_LOSSES))
def test_reference_free_losses_do_not_read_the_reference(kind):
    loss = partial(PAIR_LOSSES[kind], **SETTINGS[kind])
    other = PAIRS._replace(ref_chosen=REF_CHOSEN + 3, ref_rejected=REF_REJECTED - 1)
    assert torch.equal(loss(PAIRS).loss, loss(other).loss) == (kind in REFERENCE_FREE)


@pytest.mark.parametrize("stage", get_args(AnyPairStage))
def test_a_loss_names_its_settings_as_the_recipe_does_and_knows_all_of_them(stage):
    (kind,) = get_args(stage.model_fields["kind"].annotation)
    first, *settings = signature(PAIR_LOSSES[kind]).parameters
    shared = {"policy", "data", "heldout_fraction", "save_every", "kind"}
    trained = set(Training.model_fields)
    assert first == "pairs"
    assert set(settings) == set(stage.model_fields) - shared - trained


@pytest.mark.parametrize("kind", sorted(PAIR_LOSSES))
def test_losses_travel_between_processes(kind):
    loss = partial(PAIR_LOSSES[kind], **SETTINGS[kind])
    assert torch.equal(pickle.loads(pickle.dumps(loss))(PAIRS).loss, loss(PAIRS).loss)


@pytest.mark.parametrize("kind", sorted(PAIR_LOSSES))
@pytest.mark.parametrize("sums", [(-1e5, 0.0), (0.0, -1e5), (0.0, 0.0), (-1e-9, -1e-9)])
def test_losses_and_gradients_of_extreme_pairs_stay_finite(kind, sums):
    chosen, rejected = (torch.tensor([value], requires_grad=True) for value in sums)
    zero, one = torch.zeros(1), torch.ones(1, dtype=torch.int64)
    out = PAIR_LOSSES[kind](PairLogprobs(chosen, rejected, zero, zero, one, one), **SETTINGS[kind])
    out.loss.sum().backward()
    assert all(torch.isfinite(part).all() for part in (*out, chosen.grad, rejected.grad))


def test_losses_of_hopeless_pairs_by_hand():
    assert dpo_loss(one_pair(-1e5, 0), 0.1).loss.item() == pytest.approx(1e4)
    assert dpo_loss(one_pair(0, -1e5), 0.1).loss.item() == 0
    zero = torch.zeros(1)
    assert bradley_terry_loss(torch.tensor([-1e5]), zero, zero).item() == pytest.approx(1e5)


# log-ratios 2 and -1 with a reference point of 1: gains 0.5 and -1 at beta 0.5
KL = torch.ones(2)


@pytest.mark.parametrize(("desirable", "signs"), [((True, False), (-1, 1)), ((False, True), (1, -1))])
def test_kto_by_hand(desirable, signs):
    losses = kto_loss(CHOSEN, REF_CHOSEN, torch.tensor(desirable), KL, 0.5, 1.5, 0.7)
    weights = [1.5 if good else 0.7 for good in desirable]
    expected = [
        weight / (1 + math.exp(-sign * gain)) for weight, sign, gain in zip(weights, signs, (0.5, -1.0), strict=True)
    ]
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_kto_pulls_desirable_up_and_the_others_down_and_leaves_the_reference_point_alone():
    logprobs, kl = CHOSEN.clone().requires_grad_(), KL.clone().requires_grad_()
    kto_loss(logprobs, REF_CHOSEN, torch.tensor([True, False]), kl, 0.5, 1.0, 1.0).sum().backward()
    assert logprobs.grad[0] < 0 < logprobs.grad[1]
    assert kl.grad is None


def test_kto_is_bounded_and_values_nothing_far_from_the_reference_point():
    far = torch.tensor([1e5, -1e5], requires_grad=True)
    losses = kto_loss(far, torch.zeros(2), torch.tensor([True, True]), torch.zeros(2), 0.1, 2.0, 1.0)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 2.0]
    assert far.grad.tolist() == [0.0, 0.0]


def test_bradley_terry_by_hand():
    losses = bradley_terry_loss(
        torch.tensor([1.0, 1.0, 0.0]), torch.tensor([-1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 3.0])
    )
    torch.testing.assert_close(losses, torch.tensor([softplus(-2), math.log(2), softplus(3)]))
