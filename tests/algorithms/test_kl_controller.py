import pytest

from rlhf.algorithms.kl_controller import AdaptiveKl, FixedKl, kl_controller


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.5),  # e = 0.1, half a horizon of samples
        (5.4, 1 - 0.1 * 0.5),
        (100.0, 1 + 0.2 * 0.5),  # clipped
        (-1.0, 1 - 0.2 * 0.5),
    ],
)
def test_adaptive_update_by_hand(kl, factor):
    before = AdaptiveKl(coef=0.1, target=6.0, horizon=1000)
    after = before.update(kl, samples=500)
    assert after.coef == pytest.approx(0.1 * factor)
    assert (before.coef, after.target, after.horizon) == (0.1, 6.0, 1000)


def test_a_step_longer_than_the_horizon_counts_as_one():
    assert AdaptiveKl(0.1, 6.0, 10).update(0.0, samples=1000).coef == pytest.approx(0.08)


def test_it_settles_where_the_kl_meets_the_target():
    """A toy policy whose KL is 1 / coef."""
    controller = AdaptiveKl(coef=1.0, target=5.0, horizon=100)
    for _ in range(300):
        controller = controller.update(1 / controller.coef, samples=20)
    assert 1 / controller.coef == pytest.approx(5, rel=1e-3)


def test_without_a_target_the_coefficient_stays():
    assert kl_controller(0.3, None, 100).update(50.0, 64) == FixedKl(0.3)
    assert kl_controller(0.3, 2.0, 100) == AdaptiveKl(0.3, 2.0, 100)
