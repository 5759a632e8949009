"""From a step's rollouts to what every role says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rlhf.algorithms.masked import masked_sum
from rlhf.algorithms.scores import flat_groups, overlong_penalty, whiten_scores
from rlhf.data.collate import collate_rollouts
from rlhf.errors import GuardError, TrainingError
from rlhf.recipe.online_schema import OnlineStage, PolicyGradientStage
from rlhf.rewards.skips import Skips
from rlhf.roles import Pending, Roles
from rlhf.types import Metrics, Rollout, TokenBatch, TokenScores

MAX_EMPTY = 0.5


@dataclass(frozen=True)
class Scored:
    """A step's rollouts once every role has spoken; what is of tokens is `[B, T]` and 0 off the response.

    groups `[B]` numbers each rollout's prompt from 0. raw_scores `[B]` are the judge's, scores `[B]` those that are
    learnt from. `old` is what the trainer says of the policy before the step; None where the engine's logprobs stand
    for it. values are the critic's, 0 without one. unfinished `[B]` says which responses met the length limit.
    `stale` says that the policy has moved on since it sampled them. `rollouts` are the rows, and `skipped` counts the
    prompts that are not among them because a reward service failed.
    """

    batch: TokenBatch
    groups: Tensor
    raw_scores: Tensor
    scores: Tensor
    old: TokenScores | None
    ref_logprobs: Tensor
    values: Tensor
    unfinished: Tensor
    stale: bool = False
    rollouts: Sequence[Rollout] = ()
    skipped: Metrics = field(default_factory=Metrics)

    @property
    def old_logprobs(self) -> Tensor:
        """The logprobs of the policy before the step, `[B, T]`: the trainer's, or else the engine's."""
        return self.batch.rollout_logprobs if self.old is None else self.old.logprobs

    def kl(self) -> Tensor:
        """Return the sum over all rollouts of the sequence KL to the reference (k1), in nats, a scalar.

        It is the KL of the policy that sampled them; by the trainer's numbers where it is the present one and they are
        there.
        """
        sampled = self.batch.rollout_logprobs if self.stale else self.old_logprobs
        return masked_sum(sampled - self.ref_logprobs, self.batch.response_mask)


class Valued(Protocol):
    """Anything that says what it expects before each token."""

    def values(self, batch: TokenBatch) -> Pending[Tensor]:
        """Return the value before each response token, `[B, T]`; zeros where there is no critic."""
        ...


def check_rollouts(rollouts: Sequence[Rollout]) -> None:
    """Refuse responses with no token or logprobs that are not finite, and batches of mostly empty text."""
    for rollout in rollouts:
        if not rollout.tokens:
            raise TrainingError(f"the engine returned no token for prompt {rollout.prompt.id}")
        if not all(map(math.isfinite, rollout.logprobs)):
            raise GuardError(
                f"the engine's logprobs for prompt {rollout.prompt.id} are not finite: the policy's weights hold NaN"
                " or infinity; start from another checkpoint, or lower optimizer.learning_rate"
            )
    empty = sum(not rollout.text.strip() for rollout in rollouts) / len(rollouts)
    if empty > MAX_EMPTY:
        raise GuardError(
            f"{empty:.0%} of the responses are empty text; check the chat template, or start from an SFT checkpoint"
        )


def collect(
    roles: Roles,
    valued: Valued,
    rollouts: Sequence[Rollout],
    score: Callable[[], Pending[Tensor]],
    pad_id: int,
    stage: OnlineStage,
    asks_policy: bool = True,
) -> Scored:
    """Ask every role about the rollouts, all at the same time; `score` begins the judge's scoring.

    The policy is left out where not `asks_policy`. Prompts without scores are left out where the recipe allows that
    (`Skips`). GuardError names the role and the prompt of any other number that is not finite.
    """
    batch = collate_rollouts(rollouts, pad_id)
    old_pending = roles.policy.logprobs(batch) if asks_policy else None
    ref_pending, score_pending, value_pending = roles.reference.logprobs(batch), score(), valued.values(batch)
    old, ref = old_pending.result() if old_pending else None, ref_pending.result()
    raw_scores, values = score_pending.result(), value_pending.result()
    skips = Skips(roles.reward)
    rows = skips.kept(raw_scores, rollouts)
    if len(rows) < len(rollouts):
        rollouts, batch, raw_scores = [rollouts[row] for row in rows], batch.select(rows), raw_scores[rows]
        old, ref, values = old and _picked(old, rows), _picked(ref, rows), values[rows]
    told = {"policy": old.logprobs if old else None, "reference": ref.logprobs, "critic": values}
    for role, said in told.items():
        if said is not None:
            check_finite(role, said, batch.response_mask, rollouts)
    unfinished = torch.tensor([rollout.finish_reason == "length" for rollout in rollouts])
    lengths = batch.response_mask.sum(dim=1)
    return Scored(
        batch=batch,
        groups=group_numbers(len(rollouts), stage),
        raw_scores=raw_scores,
        scores=shaped(raw_scores, lengths, unfinished, stage),
        old=old,
        ref_logprobs=ref.logprobs,
        values=values,
        unfinished=unfinished,
        stale=staleness(stage) > 0,
        rollouts=rollouts,
        skipped=skips.metrics(),
    )


def _picked(scores: TokenScores, rows: Sequence[int]) -> TokenScores:
    return TokenScores(scores.logprobs[rows], scores.entropy[rows])


def check_finite(role: str, said: Tensor, mask: Tensor, rollouts: Sequence[Rollout]) -> None:
    """Refuse what a role says of tokens, `[B, T]`, when it is not finite anywhere in a response."""
    wrong = (~said.isfinite() & mask).any(dim=1)
    if wrong.any():
        raise GuardError(
            f"what the {role} says of a response to prompt id {rollouts[int(wrong.int().argmax())].prompt.id} is not"
            f" finite: its weights hold NaN or infinity, or overflow; start from another checkpoint, lower the learning"
            " rate or use model.dtype: float32"
        )


def staleness(stage: OnlineStage) -> int:
    """Return by how many steps the stage's rollouts may lag behind the policy."""
    return stage.staleness if isinstance(stage, PolicyGradientStage) else 0


def group_numbers(rows: int, stage: OnlineStage) -> Tensor:
    """Return the number of each rollout's prompt, from 0, `[B]`: a prompt's samples stand next to each other."""
    return torch.arange(rows) // stage.samples_per_prompt


def shaped(raw_scores: Tensor, lengths: Tensor, unfinished: Tensor, stage: OnlineStage) -> Tensor:
    """Return the scores that are learnt from, `[B]`: clipped, whitened, then less what the penalties take."""
    scores = raw_scores.clamp(-stage.score_clip, stage.score_clip)
    if isinstance(stage, PolicyGradientStage) and stage.whiten_scores:
        scores = whiten_scores(scores)
    scores = scores - stage.missing_eos_penalty * unfinished
    if stage.overlong:
        overlong = overlong_penalty(lengths, stage.max_response_tokens, stage.overlong.buffer)
        scores = scores - stage.overlong.penalty * overlong
    return scores


def measure(scored: Scored, compares_samples: bool) -> Metrics:
    """Return what every method reports of its rollouts; the share of flat groups where samples are compared.

    `agreement` is missing in steps in which the trainer was not asked, and `entropy` is then the mean of -logprob of
    the sampled tokens: the same in expectation, with more noise.
    """
    mask, rows = scored.batch.response_mask, len(scored.scores)
    tokens = float(mask.sum())
    per_row = Metrics.of(
        rows, reward=scored.raw_scores.sum(), kl=scored.kl(), length=tokens, unfinished=scored.unfinished.sum()
    )
    once = Metrics.of(1, reward_std=scored.raw_scores.std() if rows > 1 else 0.0)
    metrics = per_row.merge(once).merge(scored.skipped)
    if scored.old:
        gap = (scored.old.logprobs - scored.batch.rollout_logprobs).abs()
        per_token = Metrics.of(tokens, entropy=masked_sum(scored.old.entropy, mask), agreement=masked_sum(gap, mask))
        metrics = metrics.merge(per_token).merge(Metrics.of(1, agreement_max=gap[mask].max()))
    else:
        metrics = metrics.merge(Metrics.of(tokens, entropy=-masked_sum(scored.old_logprobs, mask)))
    if compares_samples:
        flat = flat_groups(scored.scores, scored.groups)
        metrics = metrics.merge(Metrics.of(len(flat), flat_groups=flat.sum()))
    return metrics
