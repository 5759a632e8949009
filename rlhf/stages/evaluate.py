"""A model's samples on held-out prompts and what they are worth: the same for candidates and their checkpoints.

Everything here is made in parts of bounded tokens, each on disk before the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.data.collate import collate, collate_pairs, collate_rollouts
from rlhf.data.pairs import Pair, each_pair, pair_sequences
from rlhf.data.rows import PromptRow
from rlhf.data.sequences import answered
from rlhf.errors import GuardError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.online_schema import Agreement
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.stage_schema import CompareStage
from rlhf.report.samples import ChatScores
from rlhf.rewards.skips import Skips
from rlhf.roles import Reference, RewardSource
from rlhf.stages.context import StageContext
from rlhf.stages.drawn import Drawn
from rlhf.stages.parts import Parts
from rlhf.stages.reference_cache import response_sums
from rlhf.stages.retention import Retained, chat_sequences
from rlhf.types import PreferenceBatch, Rollout, Sampling, TokenBatch

PART_TOKENS = 1 << 18
"""Tokens in one part, about: what an interrupt waits for and a crash costs, a few minutes on a CPU."""

LOADS = 2
"""A part of samples holds at least so many times the sequences that the engine generates at once."""

Commit = Callable[[Mapping[str, float]], None]
"""Says that a part is made; the metrics are shown."""

Row = TypeVar("Row")


def prompts_in_part(stage: CompareStage, role: RolloutRole) -> int:
    """Return how many prompts are sampled in one part."""
    longest = stage.max_prompt_tokens + stage.max_response_tokens
    sequences = max(PART_TOKENS // longest, LOADS * role.replicas * role.max_sequences)
    return max(1, sequences // stage.samples_per_prompt)


def draw(
    item: Drawn, size: int, tokenizer: ChatTokenizer, policy: Callable[[], Reference], stage: CompareStage,
    context: StageContext, commit: Commit,
) -> None:  # fmt: skip
    """Sample a model (a candidate, or `candidate/step-3`) with the stage's settings; all models get the same seeds.

    GuardError when the engine's logprobs so far are not those of `policy`, the trainer's model.
    """
    if item.done == len(item.prompts):
        return
    engine, sampling = (
        context.launcher.rollout(context.rollout(item.name)),
        Sampling(stage.max_response_tokens, stage.temperature),
    )
    model, (gap, tokens) = policy(), item.gap()
    for start in range(item.done, len(item.prompts), size):
        prompts = item.prompts[start : start + size]
        seeds = [[context.seed(prompt.id, k) for k in range(item.each)] for prompt in prompts]
        rollouts = engine.generate(prompts, sampling, seeds).result()
        context.tracker.spend(generated_tokens=sum(len(rollout.tokens) for rollout in rollouts))
        batch = collate_rollouts(rollouts, tokenizer.pad_id)
        mask, scores = batch.response_mask, model.logprobs(batch).result()
        gaps = (scores.logprobs - batch.rollout_logprobs).abs().masked_fill(~mask, 0).sum(dim=1)
        lengths = mask.sum(dim=1)
        gap, tokens = gap + float(gaps.sum()), tokens + int(lengths.sum())
        _check_served(item.name, gap / tokens)
        entropy = scores.entropy.masked_fill(~mask, 0).sum(dim=1) / lengths
        item.add(rollouts, sequence_logprobs(scores.logprobs, mask), entropy, gaps)
        commit({"length": float(lengths.double().mean())})


def heldout_pairs(stage: CompareStage, context: StageContext) -> list[Pair]:
    """Return the held-out pairs of the annotate stage that the comparison names, or none."""
    if stage.pairs is None:
        return []
    return [pair for pair in each_pair(context.outputs[stage.pairs] / "pairs.jsonl") if pair.heldout]


def add_margins(
    item: Drawn, pairs: Sequence[Pair], pad_id: int, policy: Callable[[], Reference], commit: Commit
) -> None:
    """Keep log p(chosen) - log p(rejected) of the held-out pairs by a model."""
    parts, series = item.parts, f"{item.name}/pairs"
    for start, some in _stretches(pairs, parts.done(series), _pair_tokens):
        parts.add(series, start + len(some), {"margins": _margins(policy(), some, pad_id).numpy()})
        commit({})


def add_chats(
    item: Drawn, retained: Retained, tokenizer: ChatTokenizer, policy: Callable[[], Reference], context: StageContext,
    commit: Commit,
) -> None:  # fmt: skip
    """Keep log p of what the assistant says in the retention chats, by a model at temperature 1.

    A model with a tokenizer of its own is asked for the same texts.
    """
    parts, series = item.parts, f"{item.name}/chats"
    if parts.done(series) == len(retained.rows):
        return
    chats = chat_sequences(retained.rows, tokenizer, context.checkpoint(item.name))
    for start, some in _stretches(chats, parts.done(series), lambda chat: len(chat.tokens)):
        sums = response_sums(policy(), some, tokenizer.pad_id)
        parts.add(series, start + len(some), {"sums": np.array(sums)})
        commit({})


def add_kl(
    item: Drawn, size: int, rows: Sequence[PromptRow], reference: Callable[[], Reference], tokenizer: ChatTokenizer,
    commit: Commit,
) -> None:  # fmt: skip
    """Keep log pi - log ref of every sample.

    `tokenizer` is the baseline's, which is the reference. A model with a tokenizer of its own is compared by text: the
    reference scores the response as it would write it.
    """
    parts, series = item.parts, f"{item.name}/kl"
    for start in range(parts.done(series), len(rows), size):
        end = min(start + size, len(rows))
        rollouts = item.rollouts(start, end)
        batch = (
            _retokenised(rollouts, rows[start:end], tokenizer)
            if item.foreign
            else collate_rollouts(rollouts, tokenizer.pad_id)
        )
        scored = reference().logprobs(batch).result().logprobs
        kl = item.numbers("logprobs", start, end) - sequence_logprobs(scored, batch.response_mask)
        parts.add(series, end, {"kl": kl.numpy()})
        commit({})


def add_scores(
    drawn: Mapping[str, Drawn], series: str, size: int, judge: Callable[[], RewardSource], parts: Parts, commit: Commit
) -> None:
    """Keep a judge's score of every sample of all models, a few prompts at a time, whose answers are in memory."""
    first = next(iter(drawn.values()))
    for start in range(parts.done(series), len(first.prompts), size):
        end = min(start + size, len(first.prompts))
        answers = {name: item.rollouts(start, end) for name, item in drawn.items()}
        scores = judged(answers, judge(), first.each)
        parts.add(series, end, {name: np.array(values) for name, values in scores.items()})
        commit({})


def judged(
    answers: Mapping[str, Sequence[Rollout]], judge: RewardSource, samples_per_prompt: int
) -> dict[str, list[float]]:
    """Return the judge's score of every sample, per model.

    Answers of all models to one prompt go to the judge next to each other, sample by sample, so that a judge who
    compares sees each against the others. A service that fails ends the comparison, whatever its `on_error`: it is
    complete or it is not one. GuardError on a score that is not finite.
    """
    names = list(answers)
    scores: dict[str, list[float]] = {name: [0.0] * len(answers[name]) for name in names}
    for k in range(samples_per_prompt):
        places = range(k, len(answers[names[0]]), samples_per_prompt)
        chosen = [(name, place) for place in places for name in names]
        rollouts = [answers[name][place] for name, place in chosen]
        values = judge.score(rollouts).result()
        Skips(judge).kept(values, rollouts)
        for (name, place), value in zip(chosen, values.tolist(), strict=True):
            scores[name][place] = value
    return scores


def implicit_accuracy(margins: Mapping[str, NDArray[np.float32]], baseline: str) -> dict[str, float | None]:
    """Return the share of held-out pairs whose chosen side gained on the reference, ties half; None without pairs.

    log pi(chosen) / ref(chosen) > log pi(rejected) / ref(rejected), the accuracy of Rafailov et al. 2023's implicit
    reward, for every policy however it was trained. The reference itself has none.
    """
    found: dict[str, float | None] = {}
    for name, column in margins.items():
        if len(column) and len(margins[baseline]) and name != baseline:
            gain = column - margins[baseline]
            found[name] = float(((gain > 0) + 0.5 * (gain == 0)).mean())
        else:
            found[name] = None
    return found


def chat_scores(item: Drawn, retained: Retained) -> ChatScores:
    """Return -log p of each chat by a model; its nats are divided by the tokens that the baseline counts."""
    return ChatScores.of(-item.parts.column(f"{item.name}/chats", "sums"), retained.tokens)


def _stretches(rows: Sequence[Row], start: int, tokens: Callable[[Row], int]) -> Iterator[tuple[int, list[Row]]]:
    """Yield the rows from `start` on in stretches of about `PART_TOKENS` tokens, each with the place of its first."""
    some: list[Row] = []
    size = 0
    for place in range(start, len(rows)):
        some.append(rows[place])
        size += tokens(some[-1])
        if size >= PART_TOKENS or place == len(rows) - 1:
            yield place + 1 - len(some), some
            some, size = [], 0


def _pair_tokens(pair: Pair) -> int:
    return 2 * len(pair.prompt_tokens) + len(pair.chosen_tokens) + len(pair.rejected_tokens)


def _margins(policy: Reference, pairs: Sequence[Pair], pad_id: int) -> Tensor:
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


def _check_served(name: str, gap: float) -> None:
    if not gap <= Agreement().tolerance:
        raise GuardError(f"the engine's logprobs differ from those of {name} by {gap:.3f} nats in the mean")
