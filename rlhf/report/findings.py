"""What the comparison says about each method, in plain words, together with what its curves say.

A claim about methods needs a paired difference that is clear after correction for the number of comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from rlhf.recipe.seeds import method
from rlhf.report.curves import Curve
from rlhf.report.diagnosis import KL_PER_TOKEN, Diagnosis, diagnose_curve, diagnose_end
from rlhf.report.frontier import paths
from rlhf.report.results import FEWEST_PROMPTS, CandidateResult, Comparison, FrontierPoint, show

LENGTH_CHANGE = 0.2
TRUNCATED = 0.1
COLLAPSE = 0.5
FORGOTTEN = 0.02
SURE = 3.0
KL_MOVED = 0.5
NOTHING = "learned nothing that shows"


def diagnose(comparison: Comparison, curves: Mapping[str, Curve]) -> list[Diagnosis]:
    """Return findings by method, then by training run; empty when the numbers show nothing odd."""
    findings = []
    if comparison.prompts < FEWEST_PROMPTS:
        findings.append(
            Diagnosis(
                "few prompts",
                "warn",
                f"Only {comparison.prompts} prompt(s) were compared; intervals from fewer than {FEWEST_PROMPTS} cannot "
                "be trusted and nothing is called a win.",
                "more held-out prompts.",
            )
        )
    for item in comparison.candidates:
        if item.name != comparison.baseline:
            found = [*_outcome(comparison, item), *_drift(comparison, item), *_responses(comparison, item)]
            found += _forgetting(item)
            findings += [replace(finding, subject=item.name) for finding in found]
    for run, points in paths(comparison).items():
        findings += [replace(finding, subject=run) for finding in _turned(points)]
    kinds = {item.name: item.kind for item in comparison.candidates}
    for run, curve in curves.items():
        found = [*diagnose_curve(kinds.get(method(run), ""), curve), *diagnose_end(curve)]
        findings += [replace(finding, subject=run) for finding in found]
    return findings


def _outcome(comparison: Comparison, item: CandidateResult) -> Iterator[Diagnosis]:
    base = comparison.baseline
    gold = comparison.difference(item.name, base, "gold")
    proxy = comparison.difference(item.name, base, "reward") if "reward" in comparison.metrics else None
    gained = proxy is not None and proxy.clear and proxy.ci.above_zero
    also = f" and the reward model's score by {proxy}" if proxy else ""
    if gained and gold.clear and gold.ci.below_zero:
        yield Diagnosis(
            "reward hacking (over-optimisation)",
            "stop",
            f"The reward model's score changed by {proxy} and gold by {gold} against {base}, at a KL of "
            f"{show(item.kl)} {item.kl_ci} nats.",
            "stop earlier, a larger kl_coef (online) or beta (DPO), a reward model trained on more pairs or on this "
            "policy's own samples.",
        )
    elif gained and not gold.clear:
        yield Diagnosis(
            "the proxy's gain does not show in gold",
            "warn",
            f"The reward model's score changed by {proxy}, gold by {gold} against {base}: not told from chance.",
            "more held-out prompts to tell, and check the reward model's accuracy on pairs from this policy.",
        )
    elif gold.clear and gold.ci.below_zero:
        yield Diagnosis(
            f"worse than {base}",
            "warn",
            f"Gold changed by {gold}{also}.",
            "a lower learning rate or fewer epochs, and look at the samples.",
        )
    elif not gold.clear and not (proxy and proxy.clear) and gold.n >= FEWEST_PROMPTS:
        yield _undecided(item, f"Gold changed by {gold}{also} against {base}: not told from chance.")


def _undecided(item: CandidateResult, evidence: str) -> Diagnosis:
    """Say why a method's gain does not show: its runs end far apart, the signal is poor, or it never moved."""
    if item.kl < KL_MOVED:
        moved = f"It hardly moved from the reference either (KL {show(item.kl)} nats)."
        return Diagnosis(NOTHING, "warn", f"{evidence} {moved}", "a higher learning rate or more steps.")
    golds = [run.gold for run in item.runs]
    if len(golds) > 1:
        runs = f"Gold of its runs: {', '.join(map(show, golds))}, at KL {show(item.kl)} nats."
        advice = "more seeds to tell; a lower learning rate or a larger kl_coef or beta, so that runs end alike."
        return Diagnosis("too few seeds for runs this far apart", "warn", f"{evidence} {runs}", advice)
    moved = f"It did move away from the reference (KL {show(item.kl)} nats)."
    return Diagnosis(NOTHING, "warn", f"{evidence} {moved}", "a cleaner or denser reward signal.")


def _drift(comparison: Comparison, item: CandidateResult) -> Iterator[Diagnosis]:
    if comparison.prompts >= FEWEST_PROMPTS and item.length > 0 and item.kl_ci.low > KL_PER_TOKEN * item.length:
        yield Diagnosis(
            "KL blow-up",
            "stop",
            f"{show(item.kl)} {item.kl_ci} nats to the reference over {show(item.length)} tokens is "
            f"{show(item.kl / item.length)} nats a token; above {KL_PER_TOKEN:g} little of the reference is left.",
            "a larger kl_coef or beta, a lower learning rate, fewer steps.",
        )


def _forgetting(item: CandidateResult) -> Iterator[Diagnosis]:
    """Chats that training did not aim at have become less likely, by an amount that matters."""
    change = item.retention.difference if item.retention else None
    if item.retention and change and change.clear and change.difference > FORGOTTEN:
        yield Diagnosis(
            "forgets",
            "warn",
            f"{change} nats a token on retention: {item.retention.chats} chats that training did not aim at, now "
            f"{show(item.retention.nll)} nats a token ({show(item.retention.nll - change.difference)} for "
            f"{change.baseline}).",
            "a larger kl_coef or beta, a lower learning rate, fewer epochs, adapters in place of full training, or "
            "such chats among the training data.",
        )


def _responses(comparison: Comparison, item: CandidateResult) -> Iterator[Diagnosis]:
    base = comparison.candidate(comparison.baseline)
    length = comparison.difference(item.name, base.name, "length")
    if length.clear and abs(length.difference) > LENGTH_CHANGE * base.length:
        yield Diagnosis(
            "length drift",
            "warn",
            f"Responses went from {show(base.length)} to {show(item.length)} tokens ({length}).",
            f"check whether the reward prefers {'long' if length.difference > 0 else 'short'} answers; judge at equal "
            "length or penalise length in the reward.",
        )
    if item.truncated > TRUNCATED and item.truncated > base.truncated + TRUNCATED / 2:
        yield Diagnosis(
            "missing end of sequence",
            "warn",
            f"{item.truncated:.0%} of the responses hit the token limit ({base.truncated:.0%} for {base.name}).",
            "a larger max_response_tokens, or a larger missing_eos_penalty when training online.",
        )
    if item.distinct < COLLAPSE * base.distinct:
        yield Diagnosis(
            "collapse",
            "stop",
            f"Only {item.distinct:.0%} of the responses are distinct ({base.distinct:.0%} for {base.name}).",
            "more KL (kl_coef or beta), fewer steps, a lower learning rate.",
        )


def _turned(points: list[FrontierPoint]) -> Iterator[Diagnosis]:
    """Over-optimisation along the checkpoints of one run, on the held-out prompts (Gao et al. 2023)."""
    peak, last = max(points, key=lambda point: point.gold), points[-1]
    if peak.reward is None or last.reward is None or peak.gold_se is None or last.gold_se is None:
        return
    error = math.hypot(peak.gold_se, last.gold_se)
    if peak.gold - last.gold > SURE * error and last.reward > peak.reward:
        yield Diagnosis(
            "reward hacking along the checkpoints",
            "stop",
            f"On the held-out prompts gold peaks at {show(peak.gold)} at step {peak.step}, KL {show(peak.kl)}, and "
            f"ends at {show(last.gold)}, KL {show(last.kl)}, while the proxy goes on from {show(peak.reward)} to "
            f"{show(last.reward)}.",
            f"the checkpoint of step {peak.step}, a larger kl_coef or beta, a better reward model.",
        )
