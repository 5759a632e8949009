"""One-step-off-policy training: the next step's rollouts are drawn while this step is learnt.

    engine   draw 0 | draw 1 with v0 | get v1 | draw 2 with v1 | get v2 | ...
    policy          | learn 0 -> v1  | send   | learn 1 -> v2  | send   | ...

A step takes max(generate, learn) instead of their sum (Noukhovitch et al. 2024, asynchronous RLHF). Step k is learnt
from rollouts of version k - 1, so three policies meet in its loss: b, the one that sampled, by the engine's own
numbers (`rollout_logprobs`); p, the policy at the beginning of step k, by the trainer (`old_logprobs`); and q, the one
that is being trained. For each token, with advantage A:

    -min(p / b, cap) * min(q / p * A, clip(q / p, 1 - low, 1 + high) * A)

The clip bounds what this step does to p: held against b, the last step's change would have used up the range already.
The weight p / b makes means over samples of b means under p, in one factor for the lag and for the engine's other
arithmetic. This is the decoupled objective of PPO (Hilton et al. 2022; AReaL, Fu et al. 2025) with the weight
truncated (Ionides 2008; TIS, Yao et al. 2025): each `importance_weight` up to `importance_cap`. Without staleness
p / b is 1 but for rounding. It corrects each token and not what came before it, a bias that a lag of one step keeps
small. What is measured (reward, length, `kl`) is that of b; `agreement` holds the lag too, so that the gate between
engine and trainer asks for a few short responses of the present weights instead (`probe_agreement`).
"""

from __future__ import annotations

from functools import partial

from rlhf.algorithms.masked import masked_sum
from rlhf.data.collate import collate_rollouts
from rlhf.roles import WeightReceipt
from rlhf.stages.drawn_ahead import DrawnAhead
from rlhf.stages.experience import staleness
from rlhf.stages.online_draw import Draw, Drawing, begin, prompts_of, take
from rlhf.stages.online_step import Training, check_agreement, going_on, make_step, steps
from rlhf.types import Metrics, Sampling

PROBES, PROBE_TOKENS = 8, 8


def overlapped(training: Training) -> WeightReceipt:
    """Train for the stage's steps, `staleness` of them drawn ahead, and return the last publication's receipt.

    What was drawn for a step that the budget no longer allows, one step at most, still counts as spent.
    """
    roles, stage, context = training.roles, training.stage, training.context
    kept = DrawnAhead()
    with going_on(training, kept) as going:
        receipt = training.publish(going.step)
        prompts = prompts_of(training.prompts, going.step, stage, context)
        ahead = kept.taken_up(going.step, prompts, going.carried.get("ahead", ()))
        for step in steps(training, going.step):
            drawing = ahead or begin(roles, training.prompts, step.number, stage, context)
            drawn = take(drawing, roles, training.prompts, stage, context)
            step.clock.lap("generate")
            # before the next draw, which keeps the engine busy meanwhile
            probing = _probe(training, drawn, step.number)
            another = staleness(stage) > 0 and step.number + 1 < stage.steps and context.spent() < 1
            ahead = begin(roles, training.prompts, step.number + 1, stage, context) if another else None
            gate = partial(_agreement, training, probing) if probing else None
            receipt = make_step(training, step, drawn, gate, ahead.wait if ahead else None)
            kept.drawing = ahead
            going.done(receipt.version, lambda: {"method": training.method.carry()})
        if ahead:
            context.tracker.spend(generated_tokens=ahead.tokens())
    return receipt


def _probe(training: Training, drawn: Draw, version: int) -> Drawing | None:
    """Begin a few short responses where the gate is due and the rollouts are too old for it."""
    stage, context = training.stage, training.context
    if version % stage.agreement.every or not drawn.metrics.get("staleness"):
        return None
    prompts = list({rollout.prompt.id: rollout.prompt for rollout in drawn.rollouts}.values())[:PROBES]
    sampling = Sampling(min(PROBE_TOKENS, stage.max_response_tokens), stage.temperature)
    seeds = [[context.seed("probe", version, prompt.id)] for prompt in prompts]
    return Drawing(version, training.roles.rollout.generate(prompts, sampling, seeds))


def _agreement(training: Training, probing: Drawing) -> Metrics:
    """Compare engine and trainer at the same weights; GuardError when they differ by more than is tolerated."""
    batch = collate_rollouts(probing.take(training.context, staleness=0), training.pad_id)
    scores = training.roles.policy.logprobs(batch).result()
    gap = (scores.logprobs - batch.rollout_logprobs).abs()
    metrics = Metrics.of(float(batch.response_mask.sum()), probe_agreement=masked_sum(gap, batch.response_mask))
    check_agreement(metrics["probe_agreement"], training.stage)
    return metrics
