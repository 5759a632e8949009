"""A step's rollouts: prompts in their turn, and with dynamic sampling further ones in place of flat groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf.algorithms.scores import flat_groups
from rlhf.data.sampler import permutation, prompt_batch
from rlhf.errors import GuardError
from rlhf.recipe.online_schema import OnlineStage, PolicyGradientStage
from rlhf.roles import Pending, Ready, Roles
from rlhf.stages.context import StageContext
from rlhf.stages.experience import check_rollouts, group_numbers
from rlhf.types import Metrics, Prompt, Rollout, Sampling


@dataclass(frozen=True)
class Draw:
    """A step's rollouts, the samples of a prompt next to each other.

    `score` begins the judge's scoring, or returns the scores where drawing needed them. `tokens` counts all that was
    generated for it; `metrics` say what dynamic sampling did.
    """

    rollouts: list[Rollout]
    score: Callable[[], Pending[Tensor]]
    tokens: int
    metrics: Metrics


def draw(roles: Roles, prompts: Sequence[Prompt], step: int, stage: OnlineStage, context: StageContext) -> Draw:
    """Return the rollouts of step `step` (from 0): `samples_per_prompt` of each of `prompts_per_step` prompts."""
    rows = prompt_batch(len(prompts), stage.prompts_per_step, step, context.seed("prompts"))
    rollouts = _generate(roles, [prompts[row] for row in rows], step, stage, context)
    check_rollouts(rollouts)
    if isinstance(stage, PolicyGradientStage) and stage.redraws:
        taken = set(rows)
        order = permutation(len(prompts), context.seed("redraws"), step)
        spare = [prompts[row] for row in order if row not in taken]
        return _with_spread(roles, rollouts, spare, step, stage, context)
    return Draw(rollouts, partial(roles.reward.score, rollouts), _tokens(rollouts), Metrics())


def _with_spread(
    roles: Roles,
    drawn: list[Rollout],
    spare: list[Prompt],
    step: int,
    stage: PolicyGradientStage,
    context: StageContext,
) -> Draw:
    """Draw further prompts for the groups whose clipped scores are all equal (dynamic sampling, Yu et al. 2025).

    Each redraw takes as many prompts as groups are missing; what is missing in the end is filled with flat groups.
    """
    scores = roles.reward.score(drawn).result()
    for _ in range(stage.redraws):
        missing = stage.prompts_per_step - int((~_flat(scores, stage)).sum())
        more, spare = spare[:missing], spare[missing:]
        if not more:
            break
        rollouts = _generate(roles, more, step, stage, context)
        drawn = drawn + rollouts
        check_rollouts(drawn)
        scores = torch.cat([scores, roles.reward.score(rollouts).result()])
    flat = _flat(scores, stage).tolist()
    groups = sorted(sorted(range(len(flat)), key=flat.__getitem__)[: stage.prompts_per_step])
    width = stage.samples_per_prompt
    kept = [row for group in groups for row in range(group * width, (group + 1) * width)]
    metrics = Metrics.of(1, redrawn=sum(group >= stage.prompts_per_step for group in groups))
    metrics = metrics.merge(Metrics.of(len(scores), drawn_reward=scores.sum()))
    return Draw([drawn[row] for row in kept], partial(Ready, scores[kept]), _tokens(drawn), metrics)


def _flat(scores: Tensor, stage: OnlineStage) -> Tensor:
    clipped = scores.clamp(-stage.score_clip, stage.score_clip)
    return flat_groups(clipped, group_numbers(len(scores), stage))


def _generate(
    roles: Roles, prompts: Sequence[Prompt], step: int, stage: OnlineStage, context: StageContext
) -> list[Rollout]:
    """Sample each prompt, refuse rollouts of other weights than the step's, and count the tokens."""
    seeds = [[context.seed(step, prompt.id, k) for k in range(stage.samples_per_prompt)] for prompt in prompts]
    sampling = Sampling(stage.max_response_tokens, stage.temperature)
    rollouts = roles.rollout.generate(prompts, sampling, seeds).result()
    stale = {rollout.policy_version for rollout in rollouts} - {step}
    if stale:
        raise GuardError(f"the rollout engine served weight versions {sorted(stale)}, the policy is at {step}")
    context.tracker.spend(generated_tokens=_tokens(rollouts))
    return rollouts


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(rollout.tokens) for rollout in rollouts)
