"""Win rates: who gave the better answer to the same prompt, as it is and as if both were of the same length."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from rlhf.report.intervals import Array, Groups, standard_error
from rlhf.report.results import Comparison, Estimate, Interval, WinRate

RIDGE = 0.01


@dataclass(frozen=True)
class LeaderboardRow:
    """One method against the baseline in the columns of AlpacaEval (Dubois et al. 2023); rates in per cent.

    `avg_length` is in characters, as there.
    """

    name: str
    win_rate: float
    standard_error: float
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    discrete_win_rate: float
    length_controlled_winrate: float
    avg_length: int


def outcomes(gold: Array, other: Array, tie_margin: float) -> Array:
    """Return 1, 0.5 or 0 for a win, a tie and a loss: `[runs, samples]` against `[other runs, samples]`.

    The result is `[runs, other runs, samples]`: sample k of one meets sample k of the other, on the same prompt.
    """
    gap = gold[:, None] - other[None]
    return np.where(np.abs(gap) <= tie_margin, 0.5, (gap > 0).astype(np.float64))


class Meeting(NamedTuple):
    """Two methods on the same prompts: `outcome` and the length differences `longer`, `[runs, other runs, samples]`."""

    candidate: str
    baseline: str
    outcome: Array
    longer: Array


def tally(meeting: Meeting, groups: Groups) -> tuple[WinRate, Array]:
    """Return all of a win rate but its interval, and the share of wins `[runs, other runs, prompts]` for `bounded`."""
    outcome, wins = meeting.outcome, groups.means(meeting.outcome)
    rate = WinRate(
        candidate=meeting.candidate,
        baseline=meeting.baseline,
        win_rate=float(wins.mean()),
        win_rate_ci=Interval(0.0, 1.0),
        standard_error=standard_error(wins),
        wins=int((outcome == 1).sum()),
        losses=int((outcome == 0).sum()),
        draws=int((outcome == 0.5).sum()),
        length_controlled=length_controlled(outcome.ravel(), meeting.longer.ravel()),
    )
    return rate, wins


def bounded(rate: WinRate, found: Estimate, level: float) -> WinRate:
    """Return a win rate with the interval that was found for its wins, within 0 and 1.

    When the candidate wins (or loses) everything no resample sees a spread; the exact binomial limit over prompts
    stands in (Clopper & Pearson 1934).
    """
    if rate.win_rate not in (0.0, 1.0):
        return replace(rate, win_rate_ci=Interval(max(found.ci.low, 0.0), min(found.ci.high, 1.0)))
    limit = ((1 - level) / 2) ** (1 / found.n)
    return replace(rate, win_rate_ci=Interval(limit, 1.0) if rate.win_rate == 1.0 else Interval(0.0, 1 - limit))


def length_controlled(outcome: Array, longer: Array) -> float:
    """Return the win rate, 0..1, at equal length: sigmoid(a) of a logistic fit sigmoid(a + b tanh(longer / sd)).

    Dubois et al. 2024 (Length-Controlled AlpacaEval), eq. 2, with a slight L2 penalty so that clean sweeps stay
    finite. Left out is their term for the difficulty of each instruction: its values come from a leaderboard of many
    models, and a handful of candidates cannot tell them from chance. Swapping the sides gives one minus the result.
    """
    spread = float(longer.std())
    length = np.tanh(longer / spread) if spread > 0 else np.zeros_like(outcome)
    design = np.stack([np.ones_like(length), length], axis=1)

    def loss(weights: Array) -> float:
        scores = design @ weights
        return float((np.logaddexp(0, scores) - outcome * scores).sum() + RIDGE / 2 * weights @ weights)

    def slope(weights: Array) -> Array:
        return design.T @ (special.expit(design @ weights) - outcome) + RIDGE * weights

    def bend(weights: Array) -> Array:
        share = special.expit(design @ weights)
        return (design.T * (share * (1 - share))) @ design + RIDGE * np.eye(2)

    settings = {"jac": slope, "hess": bend, "method": "trust-exact", "options": {"gtol": 1e-9, "maxiter": 200}}
    return float(special.expit(optimize.minimize(loss, np.zeros(2), **settings).x[0]))


def leaderboard(comparison: Comparison) -> list[LeaderboardRow]:
    """Return a row per method, best win rate first; the baseline stands at 50 per cent, against itself."""
    total = max((item.wins + item.losses + item.draws for item in comparison.wins), default=comparison.samples)
    rows = []
    for item in comparison.candidates:
        length = round(item.characters)
        if item.name == comparison.baseline:
            rows.append(LeaderboardRow(item.name, 50.0, 0.0, 0, 0, total, total, 50.0, 50.0, length))
            continue
        won = comparison.win(item.name, comparison.baseline)
        met = won.wins + won.losses + won.draws
        row = LeaderboardRow(
            name=item.name,
            win_rate=100 * won.win_rate,
            standard_error=100 * won.standard_error,
            n_wins=won.wins,
            n_wins_base=won.losses,
            n_draws=won.draws,
            n_total=met,
            discrete_win_rate=100 * (won.wins + won.draws / 2) / met,
            length_controlled_winrate=100 * won.length_controlled,
            avg_length=length,
        )
        rows.append(row)
    return sorted(rows, key=lambda row: -row.win_rate)


def write_leaderboard(path: Path, comparison: Comparison) -> None:
    """Write the leaderboard as AlpacaEval keeps its own: a CSV file whose first, unnamed column is the model."""
    names = [item.name for item in fields(LeaderboardRow)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", *names[1:]])
        for row in leaderboard(comparison):
            writer.writerow(asdict(row).values())
