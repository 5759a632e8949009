"""A model's samples on held-out prompts and what they are worth: the same for candidates and their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.algorithms.masked import masked_mean
from rlhf.data.collate import collate, collate_pairs, collate_rollouts
from rlhf.data.pairs import Pair, pair_sequences, read_pairs
from rlhf.data.rows import PromptRow
from rlhf.data.sequences import answered
from rlhf.data.tokenize import tokenize_prompts
from rlhf.errors import GuardError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.online_schema import Agreement
from rlhf.recipe.stage_schema import CompareStage
from rlhf.report.samples import ChatScore
from rlhf.rewards.skips import Skips
from rlhf.roles import Reference, RewardSource
from rlhf.stages.context import StageContext
from rlhf.stages.retention import Retained, chat_scores
from rlhf.types import PreferenceBatch, Rollout, Sampling, TokenBatch


@dataclass(frozen=True)
class Drawn:
    """A model's rollouts, sample by sample and prompt by prompt, and its own sequence logprobs of them `[B]`.

    `entropy` `[B]` is the mean of its token entropies in each response, in nats; `foreign` says that its tokenizer is
    not the baseline's.
    `margins` `[P]` are log p(chosen) - log p(rejected) of the held-out pairs, `[0]` where there are none or where the
    model has another tokenizer than the pairs. `retention` has its scores of the retention chats, where it is asked.
    """

    rollouts: list[Rollout]
    logprobs: Tensor
    entropy: Tensor
    margins: Tensor
    foreign: bool
    retention: tuple[ChatScore, ...] = ()


def draw(
    name: str,
    tokenizer: ChatTokenizer,
    foreign: bool,
    rows: Sequence[PromptRow],
    pairs: Sequence[Pair],
    stage: CompareStage,
    context: StageContext,
    retained: Retained | None = None,
) -> Drawn:
    """Sample a model (a candidate, or `candidate/step-3`) with the stage's settings; all models get the same seeds.

    Its scores of the held-out `pairs` and the `retained` chats come with it.
    """
    prompts = tokenize_prompts(rows, tokenizer, stage.max_prompt_tokens)
    engine = context.launcher.rollout(context.rollout(name))
    policy = context.launcher.policy(context.frozen("policy", "causal", name, stage.temperature))
    seeds = [[context.seed(prompt.id, k) for k in range(stage.samples_per_prompt)] for prompt in prompts]
    rollouts = engine.generate(prompts, Sampling(stage.max_response_tokens, stage.temperature), seeds).result()
    context.tracker.spend(generated_tokens=sum(len(rollout.tokens) for rollout in rollouts))
    batch = collate_rollouts(rollouts, tokenizer.pad_id)
    mask, scores = batch.response_mask, policy.logprobs(batch).result()
    _check_served(name, scores.logprobs, batch)
    margins = _margins(policy, pairs, tokenizer.pad_id)
    if retained and stage.temperature != 1:
        policy = context.launcher.policy(context.frozen("policy", "causal", name))
    return Drawn(
        rollouts=rollouts,
        logprobs=sequence_logprobs(scores.logprobs, mask),
        entropy=scores.entropy.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1),
        margins=margins,
        foreign=foreign,
        retention=chat_scores(retained, policy, tokenizer, context.checkpoint(name)) if retained else (),
    )


def heldout_pairs(stage: CompareStage, context: StageContext) -> list[Pair]:
    """Return the held-out pairs of the annotate stage that the comparison names, or none."""
    if stage.pairs is None:
        return []
    return [pair for pair in read_pairs(context.outputs[stage.pairs] / "pairs.jsonl") if pair.heldout]


def sequence_kl(
    drawn: Mapping[str, Drawn], rows: Sequence[PromptRow], reference: Reference, tokenizer: ChatTokenizer, baseline: str
) -> dict[str, Tensor]:
    """Return log pi - log ref of every sample, `[B]` per model; 0 for the baseline, which is the reference.

    `tokenizer` is the baseline's. A model with a tokenizer of its own is compared by text: the reference scores the
    response as it would write it.
    """
    found = {baseline: torch.zeros_like(drawn[baseline].logprobs)}
    for name, item in drawn.items():
        if name == baseline:
            continue
        batch = (
            _retokenised(item.rollouts, rows, tokenizer)
            if item.foreign
            else collate_rollouts(item.rollouts, tokenizer.pad_id)
        )
        scored = reference.logprobs(batch).result().logprobs
        found[name] = item.logprobs - sequence_logprobs(scored, batch.response_mask)
    return found


def implicit_accuracy(drawn: Mapping[str, Drawn], baseline: str) -> dict[str, float | None]:
    """Return the share of held-out pairs whose chosen side gained on the reference, ties half; None without pairs.

    log pi(chosen) / ref(chosen) > log pi(rejected) / ref(rejected), the accuracy of Rafailov et al. 2023's implicit
    reward, for every policy however it was trained. The reference itself has none.
    """
    reference = drawn[baseline].margins
    found: dict[str, float | None] = {}
    for name, item in drawn.items():
        if len(item.margins) and len(reference) and name != baseline:
            gain = item.margins - reference
            found[name] = float(((gain > 0).float() + 0.5 * (gain == 0).float()).mean())
        else:
            found[name] = None
    return found


def judged(drawn: Mapping[str, Drawn], judge: RewardSource, samples_per_prompt: int) -> dict[str, list[float]]:
    """Return the judge's score of every sample, per model.

    Answers of all models to one prompt go to the judge next to each other, sample by sample, so that a judge who
    compares sees each against the others. A service that fails ends the comparison, whatever its `on_error`: it is
    complete or it is not one. GuardError on a score that is not finite.
    """
    names = list(drawn)
    scores: dict[str, list[float]] = {name: [0.0] * len(drawn[name].rollouts) for name in names}
    places = range(len(drawn[names[0]].rollouts))
    for k in range(samples_per_prompt):
        chosen = [(name, place) for place in places if place % samples_per_prompt == k for name in names]
        rollouts = [drawn[name].rollouts[place] for name, place in chosen]
        values = judge.score(rollouts).result()
        Skips(judge).kept(values, rollouts)
        for (name, place), value in zip(chosen, values.tolist(), strict=True):
            scores[name][place] = value
    return scores


def _margins(policy: Reference, pairs: Sequence[Pair], pad_id: int) -> Tensor:
    if not pairs:
        return torch.zeros(0)
    batch: PreferenceBatch = collate_pairs(pair_sequences(pairs), pad_id=pad_id)
    chosen, rejected = policy.logprobs(batch.chosen), policy.logprobs(batch.rejected)
    return sequence_logprobs(chosen.result().logprobs, batch.chosen.response_mask) - sequence_logprobs(
        rejected.result().logprobs, batch.rejected.response_mask
    )


def _retokenised(rollouts: Sequence[Rollout], rows: Sequence[PromptRow], tokenizer: ChatTokenizer) -> TokenBatch:
    by_id = {row.id: row for row in rows}
    sequences = []
    for rollout in rollouts:
        prompt, response = tokenizer.completion_ids(by_id[rollout.prompt.id].messages, rollout.text)
        kept = response if rollout.finish_reason == "stop" else response[:-1]
        sequences.append(answered(tuple(prompt), tuple(kept)))
    return collate(sequences, tokenizer.pad_id)


def _check_served(name: str, logprobs: Tensor, batch: TokenBatch) -> None:
    gap = float(masked_mean((logprobs - batch.rollout_logprobs).abs(), batch.response_mask))
    if not gap <= Agreement().tolerance:
        raise GuardError(f"the engine's logprobs differ from those of {name} by {gap:.3f} nats in the mean")
