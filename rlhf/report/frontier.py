"""What the numbers say about the trade between reward and distance from the reference, in plain words.

Every finding quotes the numbers that it rests on and says what to try. A claim about candidates needs a paired
interval that excludes zero; a claim about training needs a change larger than twice its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from rlhf.report.curves import Curve, series
from rlhf.report.results import FEWEST_PROMPTS, CandidateResult, Comparison, show

# The policy gives its own tokens e times the probability the reference gave them, on average: far out.
KL_PER_TOKEN = 1.0
# Growth of the KL from half way to the end; a policy drifting at constant speed shows 2.
KL_GROWTH = 3.0
LENGTH_CHANGE = 0.2
TRUNCATED = 0.1
COLLAPSE = 0.5
FEWEST_STEPS = 8


@dataclass(frozen=True)
class Window:
    """A few neighbouring points of a curve: where they start, their mean and its standard error."""

    step: float
    mean: float
    error: float

    def above(self, other: Window) -> bool:
        """Whether this mean is higher by more than twice the standard error of the gap."""
        return self.mean - other.mean > 2 * math.hypot(self.error, other.error)


def diagnose(comparison: Comparison, curves: Mapping[str, Curve]) -> list[str]:
    """Return findings, most serious first within each candidate; empty when the numbers show nothing odd."""
    findings = []
    if comparison.prompts < FEWEST_PROMPTS:
        findings.append(
            f"Only {comparison.prompts} prompt(s) were compared; intervals from fewer than {FEWEST_PROMPTS} cannot be "
            "trusted and nothing is called a win. Try: more held-out prompts."
        )
    for item in comparison.candidates:
        if item.name != comparison.baseline:
            findings += _against_baseline(comparison, item)
    for name, curve in curves.items():
        findings += _while_training(name, curve)
    return findings


def _against_baseline(comparison: Comparison, item: CandidateResult) -> Iterator[str]:
    yield from _outcome(comparison, item)
    yield from _drift(comparison, item)
    base = comparison.candidate(comparison.baseline)
    length = comparison.difference(item.name, base.name, "length")
    if length.clear and abs(length.difference) > LENGTH_CHANGE * base.length:
        yield (
            f"{item.name}: length drift. Responses went from {show(base.length)} to {show(item.length)} tokens "
            f"({length}). Try: check whether the reward prefers {'long' if length.difference > 0 else 'short'} "
            "answers; judge at equal length or penalise length in the reward."
        )
    if item.truncated > TRUNCATED and item.truncated > base.truncated + TRUNCATED / 2:
        yield (
            f"{item.name}: {item.truncated:.0%} of the responses hit the token limit ({base.truncated:.0%} for "
            f"{base.name}). Try: a larger max_response_tokens, or a larger missing_eos_penalty in PPO."
        )
    if item.distinct < COLLAPSE * base.distinct:
        yield (
            f"{item.name}: collapse. Only {item.distinct:.0%} of the responses are distinct ({base.distinct:.0%} for "
            f"{base.name}). Try: more KL (kl_coef or beta), fewer steps, a lower learning rate."
        )


def _outcome(comparison: Comparison, item: CandidateResult) -> Iterator[str]:
    base = comparison.baseline
    gold = comparison.difference(item.name, base, "gold")
    proxy = comparison.difference(item.name, base, "reward")
    kl = comparison.difference(item.name, base, "kl")
    if proxy.clear and proxy.ci.above_zero and gold.clear and gold.ci.below_zero:
        yield (
            f"{item.name}: reward hacking (over-optimisation). The reward model's score changed by {proxy} and "
            f"gold by {gold} against {base}, at a KL of {show(item.kl)} {item.kl_ci} nats. Try: stop earlier, a larger "
            "kl_coef (PPO) or beta (DPO), a reward model trained on more pairs or on this policy's own samples."
        )
    elif proxy.clear and proxy.ci.above_zero and not gold.clear:
        yield (
            f"{item.name}: the proxy's gain does not show in gold. The reward model's score changed by {proxy}, gold "
            f"by {gold} against {base}: an interval that covers zero. Try: more held-out prompts to tell, and check "
            "the reward model's accuracy on pairs from this policy."
        )
    elif gold.clear and gold.ci.below_zero:
        yield (
            f"{item.name}: worse than {base}. Gold changed by {gold} and the reward model's score changed by {proxy}. "
            "Try: a lower learning rate or fewer epochs, and look at the samples."
        )
    elif not gold.clear and not proxy.clear and gold.n >= FEWEST_PROMPTS:
        moved = "It did move away from the reference" if kl.clear else "It hardly moved from the reference either"
        yield (
            f"{item.name}: learned nothing that shows. Gold {gold} and reward {proxy} against {base} both cover zero. "
            f"{moved} (KL {kl} nats). Try: "
            + ("a cleaner or denser reward signal." if kl.clear else "a higher learning rate or more steps.")
        )


def _drift(comparison: Comparison, item: CandidateResult) -> Iterator[str]:
    if comparison.prompts >= FEWEST_PROMPTS and item.length > 0 and item.kl_ci.low > KL_PER_TOKEN * item.length:
        yield (
            f"{item.name}: KL blow-up. {show(item.kl)} {item.kl_ci} nats to the reference over {show(item.length)} "
            f"tokens is {show(item.kl / item.length)} nats a token; above {KL_PER_TOKEN:g} little of the reference is "
            "left. Try: a larger kl_coef or beta, a lower learning rate, fewer steps."
        )


def _while_training(name: str, curve: Curve) -> Iterator[str]:
    yield from _turned(name, curve)
    kl = _windows(curve, "kl")
    if kl and kl[-1].above(kl[len(kl) // 2]) and kl[-1].mean > KL_GROWTH * max(kl[len(kl) // 2].mean, 1.0):
        middle = kl[len(kl) // 2]
        yield (
            f"{name}: the KL to the reference speeds up, {show(middle.mean)} nats around step {middle.step:g} and "
            f"{show(kl[-1].mean)} at the end. Try: a larger kl_coef, a lower learning rate, or stop earlier."
        )
    entropy = _windows(curve, "entropy")
    if entropy and entropy[0].above(entropy[-1]) and entropy[-1].mean < COLLAPSE / 2 * entropy[0].mean:
        yield (
            f"{name}: entropy collapses from {show(entropy[0].mean)} to {show(entropy[-1].mean)} nats a token; little "
            "is left to explore. Try: a lower learning rate, a larger kl_coef, more samples per prompt."
        )
    yield from _chosen(name, curve)


def _turned(name: str, curve: Curve) -> Iterator[str]:
    """Over-optimisation seen in training: gold passes a peak while the reward goes on rising (Gao et al. 2023)."""
    gold, reward = _windows(curve, "gold"), _windows(curve, "reward")
    if not gold or len(gold) != len(reward):
        return
    peak = max(range(len(gold)), key=lambda place: gold[place].mean)
    if gold[peak].above(gold[-1]) and reward[-1].mean >= reward[peak].mean:
        yield (
            f"{name}: over-optimisation while training. Gold peaked at {show(gold[peak].mean)} around step "
            f"{gold[peak].step:g} and ended at {show(gold[-1].mean)}, while the reward went on from "
            f"{show(reward[peak].mean)} to {show(reward[-1].mean)}. Try: stop near step {gold[peak].step:g} "
            "(save_every keeps checkpoints), a larger kl_coef, a better reward model."
        )


def _chosen(name: str, curve: Curve) -> Iterator[str]:
    """Rafailov et al. 2024 (2404.12358): DPO may lower the likelihood of both responses, the rejected one more."""
    chosen, rejected = _windows(curve, "chosen_reward"), _windows(curve, "rejected_reward")
    unit = "implicit reward (beta times the log-ratio to the reference)"
    if not chosen:
        chosen, rejected, unit = _windows(curve, "chosen_logprob"), _windows(curve, "rejected_logprob"), "logprob"
    if chosen and chosen[0].above(chosen[-1]):
        also = (
            f" (rejected: {show(rejected[0].mean)} to {show(rejected[-1].mean)}; a falling pair is common in DPO)"
            if rejected
            else ""
        )
        yield (
            f"{name}: the chosen responses become less likely, {unit} from {show(chosen[0].mean)} to "
            f"{show(chosen[-1].mean)}{also}. Try: a larger beta, a lower learning rate, an SFT term on the chosen "
            "response, or pairs sampled from this policy."
        )


def _windows(curve: Curve, metric: str) -> list[Window]:
    """Cut a curve into about eight windows of equal size; the points left over at the start join the first."""
    points = series(curve, metric)
    if len(points) < FEWEST_STEPS:
        return []
    size = max(2, len(points) // 8)
    starts = list(range(len(points) % size, len(points), size))
    starts[0] = 0
    windows = []
    for start, end in zip(starts, [*starts[1:], len(points)], strict=True):
        values = [value for _, value in points[start:end]]
        windows.append(Window(points[(start + end) // 2][0], fmean(values), stdev(values) / math.sqrt(len(values))))
    return windows
