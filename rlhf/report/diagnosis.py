"""What a curve of training says has gone wrong, in plain words with the numbers it rests on.

Made to be asked at every step of a stage that trains: it costs a pass over the curve and prefers to say nothing. A
finding needs two windows of the curve apart by four standard errors *and* by an amount that matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal

from rlhf.recipe.preference_schema import REFERENCE_FREE
from rlhf.report.curves import Curve, series
from rlhf.report.results import show

# The policy gives its own tokens e times the probability the reference gave them, on average: far out.
KL_PER_TOKEN = 1.0
# Growth of the KL from half way to now; a policy drifting at constant speed shows 2, one that only begins about 4.
KL_GROWTH = 5.0
KL_NOTABLE = 10.0
ENTROPY_LEFT = 0.15
LENGTH_FACTOR = 1.5
GOLD_LOST, GOLD_GONE = 1 / 2, 2 / 3
# Of what the margin gained, how much the chosen response may lose.
CHOSEN_LOST = 1 / 8
FLAT = 0.7
CUT_OFF = 0.5
# Of the lowest held-out loss, by how much it must have risen (twice that where just two evaluations say so), and how
# many times its largest step back on the way; of the training loss at that time, by how much it must have fallen since.
RISEN, TURNED, FALLEN = 0.05, 2, 0.15
# Of the loss at first, what is lost by who learns hardly anything.
HARDLY = 0.05
FEWEST_STEPS = 16
# A critic's beginning: an explained variance of -1 is twice the squared error of a constant.
FIRST_STEPS, WORSE_THAN_CONSTANT = 3, -1.0
WINDOWS = 8
SURE = 4.0
LIKELY = 2.0


@dataclass(frozen=True)
class Diagnosis:
    """One thing that went wrong. `stop` means that training on is a waste; `subject` is the stage or method."""

    name: str
    severity: Literal["warn", "stop"]
    evidence: str
    advice: str
    subject: str = ""

    def __str__(self) -> str:
        subject = f"{self.subject}: " if self.subject else ""
        name = f"{self.name}. " if self.name else ""
        return f"{subject}{name}{self.evidence} Try: {self.advice}"


@dataclass(frozen=True)
class Window:
    """A few neighbouring points of a curve: the step in their middle, their mean and its standard error."""

    step: float
    mean: float
    error: float

    def above(self, other: Window, errors: float = SURE) -> bool:
        """Whether this mean is higher by more than so many standard errors of the gap."""
        return self.mean - other.mean > errors * math.hypot(self.error, other.error)

    @property
    def least(self) -> float:
        """The lowest that the mean may well be."""
        return self.mean - SURE * self.error


def diagnose_curve(kind: str, curve: Curve) -> list[Diagnosis]:
    """Return what is wrong with a stage of that kind by its metrics so far.

    Before step 16 there is nothing but what the first steps of a critic tell.
    """
    checks = (_hacking, _kl, _entropy, _critic_start, _critic, _chosen, _length, _flat, _unfinished, _overfitting)
    return [finding for check in checks for finding in check(kind, curve)]


def diagnose_end(curve: Curve) -> list[Diagnosis]:
    """Return what only the metrics of a whole stage can tell: that it has learnt next to nothing."""
    return list(_underfitting(curve))


def windows(curve: Curve, metric: str) -> list[Window]:
    """Cut a curve into about eight windows of equal size; the points left over at the start join the first.

    The noise of a point comes from the steps between neighbours, which a slow trend leaves alone (von Neumann 1941).
    """
    points = series(curve, metric)
    if len(points) < FEWEST_STEPS:
        return []
    values = [value for _, value in points]
    noise = math.sqrt(fmean((late - early) ** 2 for early, late in pairwise(values)) / 2)
    size = len(points) // WINDOWS
    starts = list(range(len(points) % size, len(points), size))
    starts[0] = 0
    return [
        Window(points[(start + end) // 2][0], fmean(values[start:end]), noise / math.sqrt(end - start))
        for start, end in zip(starts, [*starts[1:], len(points)], strict=True)
    ]


def _hacking(kind: str, curve: Curve) -> Iterator[Diagnosis]:
    """Over-optimisation: gold passes a peak while the reward goes on rising (Gao et al. 2023)."""
    gold, reward = windows(curve, "gold"), windows(curve, "reward")
    if not gold or len(gold) != len(reward):
        return
    peak = max(range(len(gold)), key=lambda place: gold[place].mean)
    top, now, gain = gold[peak], gold[-1], gold[peak].mean - gold[0].mean
    fall = top.mean - now.mean
    if not (top.above(now) and fall > GOLD_LOST * gain and reward[-1].above(reward[peak], LIKELY)):
        return
    lasting = top.above(gold[-2], LIKELY) and fall > GOLD_GONE * gain
    yield Diagnosis(
        "reward hacking",
        "stop" if lasting else "warn",
        f"Gold peaked at {show(top.mean)} around step {top.step:g} and is now at {show(now.mean)}, while the reward "
        f"went on from {show(reward[peak].mean)} to {show(reward[-1].mean)}.",
        f"stop near step {top.step:g} (save_every keeps checkpoints), a larger kl_coef, a better reward model.",
    )


def _kl(kind: str, curve: Curve) -> Iterator[Diagnosis]:
    kl, length, reward = windows(curve, "kl"), windows(curve, "length"), windows(curve, "reward")
    if not kl:
        return
    now, middle = kl[-1], kl[len(kl) // 2]
    if length and now.least > KL_PER_TOKEN * length[-1].mean > 0:
        gaining = bool(reward) and reward[-1].above(reward[len(reward) // 2], LIKELY)
        yield Diagnosis(
            "KL blow-up",
            "warn" if gaining else "stop",
            f"{show(now.mean)} nats to the reference over {show(length[-1].mean)} tokens is "
            f"{show(now.mean / length[-1].mean)} nats a token; above {KL_PER_TOKEN:g} little of the reference is left"
            + ("." if gaining else ", and the reward has stopped rising."),
            "a larger kl_coef, a lower learning rate, fewer steps.",
        )
    elif now.above(middle) and now.mean > max(KL_GROWTH * middle.mean, KL_NOTABLE):
        yield Diagnosis(
            "KL speeds up",
            "warn",
            f"The KL to the reference was {show(middle.mean)} nats around step {middle.step:g} and is now "
            f"{show(now.mean)}.",
            "a larger kl_coef, a lower learning rate, or stop earlier.",
        )


def _entropy(kind: str, curve: Curve) -> Iterator[Diagnosis]:
    entropy, reward = windows(curve, "entropy"), windows(curve, "reward")
    if not entropy or not entropy[0].above(entropy[-1]) or entropy[-1].mean > ENTROPY_LEFT * entropy[0].mean:
        return
    best = max(reward, key=lambda window: window.mean, default=None)
    lost = best is not None and best.above(reward[-1]) and best.above(reward[-2])
    yield Diagnosis(
        "entropy collapse",
        "stop" if lost else "warn",
        f"From {show(entropy[0].mean)} to {show(entropy[-1].mean)} nats a token; little is left to explore"
        + (f", and the reward fell from {show(best.mean)} to {show(reward[-1].mean)}." if best and lost else "."),
        "a lower learning rate, a larger kl_coef, more samples per prompt.",
    )


def _critic_start(kind: str, curve: Curve) -> Iterator[Diagnosis]:
    """Values that begin far from the returns: as wrong as twice what a constant would be, or all on one side."""
    explained, values, returns, spread = (
        [value for _, value in series(curve, name)[:FIRST_STEPS]]
        for name in ("explained_variance", "value", "return", "reward_std")
    )
    if len(explained) < FIRST_STEPS:
        return
    gaps = [abs(value - found) - apart for value, found, apart in zip(values, returns, spread, strict=False)]
    aside = len(gaps) == FIRST_STEPS and min(gaps) > 0
    if not aside and fmean(explained) > WORSE_THAN_CONSTANT:
        return
    means = f"its mean value was {show(values[0])} where returns were {show(returns[0])}" if values and returns else ""
    yield Diagnosis(
        "the critic began far from the returns",
        "warn",
        f"In the first {FIRST_STEPS} steps its explained variance was {show(fmean(explained))} (0 is what a constant "
        f"would do){f', and {means} at first' if means else ''}; until it has unlearnt that, advantages are mostly its "
        "errors.",
        "`critic_start: fitted`, the default; a larger value_clip_range, which bounds what a value moves in a step; a "
        "higher critic_optimizer.learning_rate.",
    )


def _critic(kind: str, curve: Curve) -> Iterator[Diagnosis]:
    explained = windows(curve, "explained_variance")
    late = explained[len(explained) // 2 :]
    if late and all(window.mean + LIKELY * window.error <= 0 for window in late):
        yield Diagnosis(
            "the critic explains nothing",
            "warn",
            f"Its explained variance is {show(late[-1].mean)} late in training; 0 is what a constant would do.",
            "a higher critic_optimizer.learning_rate, more epochs, or a method without critic (rloo, grpo).",
        )


def _chosen(kind: str, curve: Curve) -> Iterator[Diagnosis]:
    """Rafailov et al. 2024 (2404.12358): DPO may lower the likelihood of both responses, the rejected one more."""
    margin, logprob = windows(curve, "margin"), windows(curve, "chosen_logprob")
    reward = [] if kind in REFERENCE_FREE else windows(curve, "chosen_reward")
    shown, unit = (reward, "implicit reward (0 is the reference)") if reward else (logprob, "logprob")
    if not shown or not margin or not margin[-1].above(margin[0]):
        return
    start = Window(0, 0.0, 0.0) if reward else shown[0]
    grown = margin[-1].mean - margin[0].mean
    if all(start.above(window) and start.mean - window.mean > CHOSEN_LOST * grown for window in shown[-2:]):
        other = windows(curve, "rejected_reward" if reward else "rejected_logprob")
        pair = f" (rejected: {show(other[0].mean)} to {show(other[-1].mean)})" if other else ""
        yield Diagnosis(
            "the chosen responses become less likely",
            "warn",
            f"Their {unit} went from {show(shown[0].mean)} to {show(shown[-1].mean)}{pair}, while the margin grew from "
            f"{show(margin[0].mean)} to {show(margin[-1].mean)}.",
            "a larger beta, a lower learning rate, nll_coef on the chosen response, or pairs from this policy.",
        )


def _length(kind: str, curve: Curve) -> Iterator[Diagnosis]:
    length = windows(curve, "length")
    if not length:
        return
    early, late = length[0], length[-1]
    longer = late.above(early) and late.mean > LENGTH_FACTOR * early.mean
    if longer or (early.above(late) and late.mean < early.mean / LENGTH_FACTOR):
        yield Diagnosis(
            "length drift",
            "warn",
            f"Responses went from {show(early.mean)} to {show(late.mean)} tokens while training.",
            f"check whether the reward prefers {'long' if longer else 'short'} answers; `overlong`, or judge at equal "
            "length.",
        )


def _flat(kind: str, curve: Curve) -> Iterator[Diagnosis]:
    flat = windows(curve, "flat_groups")
    if flat and all(window.least > FLAT for window in flat[-2:]):
        yield Diagnosis(
            "flat groups",
            "warn",
            f"In {flat[-1].mean:.0%} of the groups all samples score the same and teach nothing.",
            "prompts of middling difficulty, `redraws`, more samples_per_prompt, a finer reward.",
        )


def _unfinished(kind: str, curve: Curve) -> Iterator[Diagnosis]:
    cut = windows(curve, "unfinished")
    if cut and all(window.least > CUT_OFF for window in cut[-2:]):
        yield Diagnosis(
            "missing end of sequence",
            "warn",
            f"{cut[-1].mean:.0%} of the responses reach the token limit without an end ({cut[0].mean:.0%} at first).",
            "a larger max_response_tokens, or a larger missing_eos_penalty.",
        )


def _overfitting(kind: str, curve: Curve) -> Iterator[Diagnosis]:
    """The held-out loss has turned while the training loss goes on falling.

    Evaluations are few, so the latter half of those after the lowest, two at least, must all lie above it, by more than
    the curve moved against its trend anywhere: up before the lowest, or down after it.
    """
    measured, loss = series(curve, "heldout_loss"), windows(curve, "loss")
    place = min(range(len(measured)), key=lambda index: measured[index][1], default=0)
    later = len(measured) - 1 - place
    if not loss or later < 2:
        return
    (step, least), values = measured[place], [value for _, value in measured]
    rise = min(values[-max(2, later // 2) :]) - least
    changes = [late - early for early, late in pairwise(values)]
    back = max([0.0, *changes[:place], *(-change for change in changes[place:])])
    then = min(loss, key=lambda window: abs(window.step - step))
    falling = all(then.above(late) and then.mean - late.mean > FALLEN * abs(then.mean) for late in loss[-2:])
    enough = RISEN * (1 + 2 / later) * abs(least)
    if not (falling and rise > max(enough, TURNED * back)):
        return
    stays = next((at for at, value in measured if at and value == min(values[1:])), step)
    since = f"fell to {show(least)} at step {step:g}" if step else f"was {show(least)} before training"
    yield Diagnosis(
        "overfitting",
        "warn",
        f"The held-out loss {since} and is now {show(values[-1])}, while the training loss went on from "
        f"{show(then.mean)} to {show(loss[-1].mean)}: overfitting since step {step:g}.",
        f"`keep: best`, the default, which leaves the model of step {stays:g}; fewer epochs, a lower learning rate, "
        "more data, dropout.",
    )


def _underfitting(curve: Curve) -> Iterator[Diagnosis]:
    """Neither loss has fallen by an amount that matters, and the noise is too small to hide that it did."""
    measured, loss = series(curve, "heldout_loss"), windows(curve, "loss")
    if not loss or len(measured) < 2:
        return
    start, least = measured[0][1], min(value for _, value in measured)
    first, last = loss[0], loss[-1]
    most = first.mean - last.mean + SURE * math.hypot(first.error, last.error)
    if most < HARDLY * abs(first.mean) and start - least < HARDLY * abs(start):
        yield Diagnosis(
            "underfitting",
            "warn",
            f"In {curve[-1]['step']:g} steps the training loss went from {show(first.mean)} to {show(last.mean)} and "
            f"the held-out loss from {show(start)} to {show(measured[-1][1])}: next to nothing was learnt.",
            "a higher learning rate, more epochs, a larger rank (tuning.r); or it was known before.",
        )
