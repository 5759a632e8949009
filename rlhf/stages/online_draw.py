"""A step's rollouts: prompts in their turn, and with dynamic sampling further ones in place of flat groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice

import torch
from torch import Tensor

from rlhf.algorithms.scores import flat_groups
from rlhf.data.sampler import permutation, prompt_batch
from rlhf.errors import GuardError
from rlhf.recipe.online_schema import OnlineStage, PolicyGradientStage
from rlhf.rewards.skips import Skips
from rlhf.roles import Pending, Ready, Roles
from rlhf.stages.context import StageContext
from rlhf.stages.experience import check_rollouts, group_numbers, staleness
from rlhf.types import Metrics, Prompt, Rollout, Sampling


@dataclass(frozen=True)
class Draw:
    """A step's rollouts, the samples of a prompt next to each other.

    `score` begins the judge's scoring, or returns the scores where drawing needed them. `tokens` counts all that was
    generated for it; `metrics` say what dynamic sampling did and which prompts it had to leave out for want of scores.
    """

    rollouts: list[Rollout]
    score: Callable[[], Pending[Tensor]]
    tokens: int
    metrics: Metrics


@dataclass(frozen=True)
class Drawing:
    """Rollouts on their way, for step `step` (from 0), whose policy has that version too."""

    step: int
    pending: Pending[list[Rollout]]

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """The rollouts; waits for them the first time."""
        return self.pending.result()

    def wait(self) -> None:
        """Wait until they are there."""
        _ = self.rollouts

    def tokens(self) -> int:
        """Return how many tokens were sampled; waits for the rollouts."""
        return _tokens(self.rollouts)

    def take(self, context: StageContext, staleness: int) -> list[Rollout]:
        """Wait, refuse weights other than the step's or up to `staleness` steps older, and count the tokens."""
        versions = {rollout.policy_version for rollout in self.rollouts}
        wrong = sorted(version for version in versions if not 0 <= self.step - version <= staleness)
        if wrong:
            lag = f" (staleness {staleness})" if staleness else ""
            raise GuardError(f"the rollout engine served weight versions {wrong}, the policy is at {self.step}{lag}")
        context.tracker.spend(generated_tokens=self.tokens())
        return self.rollouts


def draw(roles: Roles, prompts: Sequence[Prompt], step: int, stage: OnlineStage, context: StageContext) -> Draw:
    """Return the rollouts of step `step` (from 0): `samples_per_prompt` of each of `prompts_per_step` prompts."""
    return take(begin(roles, prompts, step, stage, context), roles, prompts, stage, context)


def begin(roles: Roles, prompts: Sequence[Prompt], step: int, stage: OnlineStage, context: StageContext) -> Drawing:
    """Begin to draw the rollouts of a step; prompts and seeds depend on the step alone, not on when it is drawn."""
    return _ask(roles, prompts_of(prompts, step, stage, context), step, stage, context)


def prompts_of(prompts: Sequence[Prompt], step: int, stage: OnlineStage, context: StageContext) -> list[Prompt]:
    """Return the prompts of a step, in their order."""
    return [prompts[row] for row in _rows(prompts, step, stage, context)]


def take(drawing: Drawing, roles: Roles, prompts: Sequence[Prompt], stage: OnlineStage, context: StageContext) -> Draw:
    """Wait for a step's rollouts, check them, and draw further ones where dynamic sampling wants them."""
    step, lag = drawing.step, staleness(stage)
    rollouts = drawing.take(context, lag)
    check_rollouts(rollouts)
    if isinstance(stage, PolicyGradientStage) and stage.redraws:
        taken = set(_rows(prompts, step, stage, context))
        order = permutation(len(prompts), context.seed("redraws"), step)
        spare = (prompts[row] for row in order if row not in taken)
        return _with_spread(roles, rollouts, spare, step, stage, context)
    behind = sum(step - rollout.policy_version for rollout in rollouts)
    metrics = Metrics.of(len(rollouts), staleness=behind) if lag else Metrics()
    return Draw(rollouts, partial(roles.reward.score, rollouts), _tokens(rollouts), metrics)


def _with_spread(
    roles: Roles,
    drawn: list[Rollout],
    spare: Iterator[Prompt],
    step: int,
    stage: PolicyGradientStage,
    context: StageContext,
) -> Draw:
    """Draw further prompts for the groups whose clipped scores are all equal (dynamic sampling, Yu et al. 2025).

    Each redraw takes as many prompts as groups are missing; what is missing in the end is filled with flat groups.
    """
    skips = Skips(roles.reward)
    tokens = _tokens(drawn)
    drawn, scores = _scored(roles, drawn, skips)
    first = len(drawn) // stage.samples_per_prompt
    for _ in range(stage.redraws):
        missing = stage.prompts_per_step - int((~_flat(scores, stage)).sum())
        more = list(islice(spare, missing))
        if not more:
            break
        rollouts = _ask(roles, more, step, stage, context).take(context, staleness(stage))
        tokens += _tokens(rollouts)
        check_rollouts(drawn + rollouts)
        rollouts, more_scores = _scored(roles, rollouts, skips)
        drawn, scores = drawn + rollouts, torch.cat([scores, more_scores])
    flat = _flat(scores, stage).tolist()
    groups = sorted(sorted(range(len(flat)), key=flat.__getitem__)[: stage.prompts_per_step])
    width = stage.samples_per_prompt
    kept = [row for group in groups for row in range(group * width, (group + 1) * width)]
    metrics = Metrics.of(1, redrawn=sum(group >= first for group in groups))
    metrics = metrics.merge(Metrics.of(len(scores), drawn_reward=scores.sum()))
    return Draw([drawn[row] for row in kept], partial(Ready, scores[kept]), tokens, metrics.merge(skips.metrics()))


def _scored(roles: Roles, rollouts: list[Rollout], skips: Skips) -> tuple[list[Rollout], Tensor]:
    """Return the rollouts of the prompts that have scores, and these."""
    scores = roles.reward.score(rollouts).result()
    rows = skips.kept(scores, rollouts)
    return [rollouts[row] for row in rows], scores[rows]


def _flat(scores: Tensor, stage: OnlineStage) -> Tensor:
    clipped = scores.clamp(-stage.score_clip, stage.score_clip)
    return flat_groups(clipped, group_numbers(len(scores), stage))


def _rows(prompts: Sequence[Prompt], step: int, stage: OnlineStage, context: StageContext) -> list[int]:
    return prompt_batch(len(prompts), stage.prompts_per_step, step, context.seed("prompts"))


def _ask(roles: Roles, prompts: Sequence[Prompt], step: int, stage: OnlineStage, context: StageContext) -> Drawing:
    """Begin to sample each prompt."""
    seeds = [[context.seed(step, prompt.id, k) for k in range(stage.samples_per_prompt)] for prompt in prompts]
    sampling = Sampling(stage.max_response_tokens, stage.temperature)
    return Drawing(step, roles.rollout.generate(prompts, sampling, seeds))


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(rollout.tokens) for rollout in rollouts)
