"""Win rates by hand, at equal length, in AlpacaEval's columns, the same from both sides."""

import csv

import numpy as np
import pandas as pd
import pytest
from made import comparison, samples
from scipy import stats

from rlhf.report.intervals import Groups, estimate
from rlhf.report.results import Interval
from rlhf.report.wins import (
    Meeting,
    bounded,
    leaderboard,
    length_controlled,
    outcomes,
    tally,
    write_leaderboard,
)


def met(gold, other, ids=None, margin=1e-6):
    outcome = outcomes(np.atleast_2d(np.asarray(gold, float)), np.atleast_2d(np.asarray(other, float)), margin)
    ids = ids or [f"p{place}" for place in range(outcome.shape[-1])]
    rate, wins = tally(Meeting("a", "b", outcome, np.zeros_like(outcome)), Groups(ids))
    return bounded(rate, estimate(wins, seed=0, resamples=200, level=0.95), 0.95)


def test_win_rate_by_hand_with_ties():
    # win, loss, tie, tie within the margin -> (1 + 0 + .5 + .5) / 4
    found = met([2, 0, 1, 1], [1, 1, 1, 1 + 5e-7])
    assert (found.win_rate, found.wins, found.losses, found.draws) == (0.5, 1, 1, 2)
    assert 0 <= found.win_rate_ci.low < 0.5 < found.win_rate_ci.high <= 1
    assert met([1.0, 0.0, 1.0, 1.0], [1, 1, 1, 1.2], margin=0.5).win_rate == 0.375


def test_win_rate_weighs_prompts_not_samples():
    # p0: three wins of three; p1: one loss of one. By prompt (1 + 0) / 2, by sample it would be 3/4.
    assert met([1, 1, 1, 0], [0, 0, 0, 1], ["p0", "p0", "p0", "p1"]).win_rate == 0.5


def test_every_run_meets_every_run():
    found = met([[1, 1], [3, 3]], [[0, 2], [2, 0], [2, 2]])
    # Run 1 wins at (0, -) and (-, 0), run 2 everywhere: 2 + 6 of 12.
    assert (found.wins, found.losses, found.win_rate) == (8, 4, pytest.approx(8 / 12))


@pytest.mark.parametrize("n", [1, 7, 40])
def test_winning_everything_keeps_the_exact_binomial_limit(n):
    won, lost = met(np.ones(n), np.zeros(n)), met(np.zeros(n), np.ones(n))
    exact = stats.binomtest(n, n).proportion_ci(0.95, method="exact")
    assert (won.win_rate, won.win_rate_ci) == (1.0, Interval(pytest.approx(exact.low), 1.0))
    assert (lost.win_rate, lost.win_rate_ci) == (0.0, Interval(0.0, pytest.approx(1 - exact.low)))


def fight(seed=0, n=400, skill=0.0, taste=0.0):
    """Return outcomes and length differences of a judge who likes `skill`, and longer answers by `taste`."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(30, 60, n)
    chance = 1 / (1 + np.exp(-(skill + taste * np.tanh(longer / longer.std()))))
    return (rng.random(n) < chance).astype(float), longer


def test_length_control_takes_out_a_taste_for_length_and_leaves_skill():
    outcome, longer = fight(taste=2.0, n=6000)
    assert outcome.mean() > 0.6
    assert length_controlled(outcome, longer) == pytest.approx(0.5, abs=0.025)
    outcome, longer = fight(skill=1.0, taste=1.0, n=6000)
    assert length_controlled(outcome, longer) == pytest.approx(1 / (1 + np.exp(-1)), abs=0.025)


def test_length_control_agrees_with_another_solver():
    from scipy.optimize import brentq

    outcome, longer = fight(skill=0.4, taste=0.7)
    # With no length difference only the constant is left: the mean, pulled to one half by the penalty.
    weight = brentq(lambda w: len(outcome) / (1 + np.exp(-w)) - outcome.sum() + 0.01 * w, -5, 5)
    assert length_controlled(outcome, np.zeros_like(longer)) == pytest.approx(1 / (1 + np.exp(-weight)))


@pytest.mark.parametrize("case", ["mixed", "ties", "all won", "separated"])
def test_length_control_is_one_minus_itself_from_the_other_side(case):
    outcome, longer = fight(skill=0.5, taste=0.5)
    outcome = {"ties": np.where(longer > 60, 0.5, outcome), "all won": np.ones_like(outcome)}.get(case, outcome)
    outcome = (longer > 0).astype(float) if case == "separated" else outcome
    there, back = length_controlled(outcome, longer), length_controlled(1 - outcome, -longer)
    assert there + back == pytest.approx(1, abs=1e-7)
    assert 0 < there < 1


def test_the_matrix_is_the_same_from_both_sides():
    found = comparison(samples("sft"), samples("ppo@1", gold=0.1), samples("ppo@2", gold=-0.1), samples("dpo", noise=1))
    for one in ("sft", "ppo", "dpo"):
        for other in {"sft", "ppo", "dpo"} - {one}:
            there, back = found.win(one, other), found.win(other, one)
            assert there.win_rate + back.win_rate == pytest.approx(1)
            assert there.length_controlled + back.length_controlled == pytest.approx(1)
            assert (there.wins, there.draws) == (back.losses, back.draws)
            assert there.win_rate_ci.low == pytest.approx(1 - back.win_rate_ci.high)
    with pytest.raises(KeyError, match="sft did not meet rloo"):
        found.win("sft", "rloo")


def test_leaderboard_has_the_columns_and_formulas_of_alpaca_eval(tmp_path):
    ppo = samples("ppo", gold=0.05, noise=0.4)
    found = comparison(samples("sft"), ppo, samples("dpo", gold=3.0))
    write_leaderboard(tmp_path / "leaderboard.csv", found)
    table = pd.read_csv(tmp_path / "leaderboard.csv", index_col=0)
    names = "win_rate standard_error n_wins n_wins_base n_draws n_total discrete_win_rate length_controlled_winrate"
    assert list(table.columns) == [*names.split(), "avg_length"]
    assert next(iter(table.index)) == "dpo"
    row = table.loc["ppo"]
    golds, base = (np.array([s.gold for s in item.samples]) for item in (ppo, samples("sft")))
    preference = pd.Series(np.where(golds > base, 2.0, 1.0))
    assert row["win_rate"] == pytest.approx((preference - 1).mean() * 100)
    assert row["standard_error"] == pytest.approx(preference.sem() * 100)
    assert (row["n_wins"], row["n_wins_base"]) == ((preference > 1.5).sum(), (preference < 1.5).sum())
    assert (row["n_draws"], row["n_total"]) == (0, 24)
    assert row["discrete_win_rate"] == pytest.approx(row["win_rate"])
    assert row["avg_length"] == round(np.mean([len(s.response) for s in ppo.samples]))
    assert tuple(table.loc["sft", ["win_rate", "length_controlled_winrate"]]) == (50, 50)
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 4
    assert [item.name for item in leaderboard(found)] == list(table.index)
