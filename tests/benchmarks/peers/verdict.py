"""From what the processes measured to one row of the table, and whether it reaches its aim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.benchmarks.peers.limits import step_flops
from tests.benchmarks.peers.protocol import Measured, Plan, step_seconds
from tests.benchmarks.peers.rows import AIM_SPREAD, Row
from tests.benchmarks.peers.task import Example, Outcome

DTYPES = {
    "ours": "bfloat16 weights, float32 masters",
    "defaults": "float32 weights under bfloat16 autocast (TRL's default); PPO: bfloat16 weights",
    "tuned": "bfloat16 weights, no float32 masters",
}


def settle(row: Row, found: Measured, steps: Sequence[Sequence[Example]], plan: Plan, limit: float) -> dict[str, Any]:
    """Return the row's verdict and its `figures`, which a void row has as `unreliable` instead.

    `limit` is the machine's operations per second.

    DPO's reference: against `defaults`, which runs it in every step, our steps carry their share of the precomputed
    pass; against `tuned`, which precomputes too, it is outside the steps on both sides.
    """
    timed = steps[plan.warmup :]
    tokens = sum(row.tokens(step) for step in timed) / len(timed)
    flops = sum(step_flops(row.name, step, plan_shape()) for step in timed) / len(timed)
    seconds = {arm: step_seconds(outcomes, plan.warmup) for arm, outcomes in found.outcomes.items()}
    whole = step_seconds(found.outcomes["ours"], plan.warmup, with_reference=True)
    ratios = {arm: seconds[arm] / (whole if arm == "defaults" else seconds["ours"]) for arm in seconds if arm != "ours"}
    shares = {arm: flops / spent / limit for arm, spent in seconds.items()}
    figures = {
        "tokens_per_step": tokens,
        "useful_flops_per_step": flops,
        "seconds_per_step": seconds,
        "ours_with_reference_seconds": whole,
        "tokens_per_second": {arm: tokens / spent for arm, spent in seconds.items()},
        "ratio": ratios,
        "fraction_of_limit": shares,
        "peak_gib": {arm: max(o.peak_bytes for o in outs) / 2**30 for arm, outs in found.outcomes.items()},
        "dtypes": {arm: DTYPES[arm] for arm in seconds},
        "probe_seconds": found.probes,
        "losses": {arm: outs[0].losses for arm, outs in found.outcomes.items()},
        "grad_norms": {arm: outs[0].grad_norms for arm, outs in found.outcomes.items()},
        "steps": {arm: [o.seconds for o in outs] for arm, outs in found.outcomes.items()},
        "parts": {arm: outs[0].parts for arm, outs in found.outcomes.items() if outs[0].parts},
        "versions": {arm: outs[0].versions for arm, outs in found.outcomes.items()},
    }
    said = verdict(row, ratios, shares["ours"])
    return recorded(row.name, figures, found.reasons, said) | {"peer": f"trl {row.peer}"}


def recorded(name: str, figures: dict[str, Any], reasons: Sequence[str], said: str) -> dict[str, Any]:
    """Return a row of the result; with reasons against it the verdict is `void`, and nothing counts as a figure."""
    if reasons:
        return {"row": name, "verdict": "void", "void": sorted(set(reasons)), "unreliable": figures}
    return {"row": name, "verdict": said, "void": [], "figures": figures}


def plan_shape() -> dict[str, int]:
    """Return the shape of the model, which only the workload knows."""
    from tests.benchmarks.peers.workload import SHAPE

    return {name: int(value) for name, value in SHAPE.items()}


def verdict(row: Row, ratios: dict[str, float], share: float) -> str:
    """Return `reached`, `missed: ..` with each aim that was, or `no aim`."""
    aims = [
        ("defaults", ratios.get("defaults"), row.aim_defaults),
        ("tuned", ratios.get("tuned"), row.aim_tuned),
        ("limit", share, row.aim_limit),
    ]
    set_aims = [(name, value, aim) for name, value, aim in aims if aim is not None]
    missed = [f"{name} {value or 0:.2f} of {aim:g}" for name, value, aim in set_aims if value is None or value < aim]
    if not set_aims:
        return "no aim"
    return f"missed: {', '.join(missed)}" if missed else "reached"


def settle_spread(
    outcomes: dict[float, Sequence[Outcome]], plan: Plan, tokens: int, probes: list[float], void: list[str]
) -> dict[str, Any]:
    """Return our cost per real token, `tokens` a step, by the spread of lengths, and its growth to the widest."""
    seconds = {sigma: step_seconds(outs, plan.warmup) for sigma, outs in outcomes.items()}
    growth = seconds[max(seconds)] / seconds[min(seconds)]
    reached = "reached" if growth <= AIM_SPREAD else f"missed: {growth:.2f} of {AIM_SPREAD}"
    figures = {
        "tokens_per_step": tokens,
        "microseconds_per_token": {str(sigma): 1e6 * spent / tokens for sigma, spent in seconds.items()},
        "growth": growth,
        "probe_seconds": probes,
    }
    return recorded("spread", figures, void, reached)
