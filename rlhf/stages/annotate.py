"""Preference data: sample from a policy, let a judge rank the samples, add the stated label noise.

Prompts are processed in rounds, sized by what the engine generates at once. While a round is judged the engine draws
the next one, so that it never runs empty between two of them. A round is committed, its rows appended and flushed and
a state saved, before the next one is judged: an interrupt or crash loses the rounds in flight, and memory holds no
others.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from rlhf.data.best import Best
from rlhf.data.pairs import Pair, each_pair
from rlhf.data.reading import read_prompts
from rlhf.data.tokenize import tokenize_prompts
from rlhf.errors import TrainingError
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.stage_schema import AnnotateStage
from rlhf.rewards.llm import LlmReward
from rlhf.rewards.skips import Skips
from rlhf.roles import Pending, RewardSource, RolloutEngine
from rlhf.stages.appended import AppendedFiles
from rlhf.stages.context import StageContext
from rlhf.stages.recovery import Going
from rlhf.stages.sft import Summary
from rlhf.types import Prompt, Rollout, Sampling

PAIRS, BEST = "pairs.jsonl", "best.jsonl"
LOADS = 2
"""A round holds so many times the sequences that the engine generates at once. One round more is always queued; with
less, the engine would run out of it before the longest response of the present round ends."""

EARLIER_ROUND = 128
"""Prompts in a round of states that do not hold the number of finished prompts."""


@dataclass
class Made:
    """How many prompts are done, and the pairs they gave: all, those held out, those whose label noise has flipped."""

    prompts: int = 0
    pairs: int = 0
    heldout: int = 0
    flipped: int = 0

    def add(self, pair: Pair) -> None:
        """Count a pair."""
        self.pairs += 1
        self.heldout += pair.heldout
        self.flipped += pair.flipped


@dataclass(frozen=True)
class Round:
    """The rollouts of some prompts, the samples of each side by side; `end` prompts are done with it."""

    end: int
    rollouts: list[Rollout]


def run(stage: AnnotateStage, context: StageContext) -> Summary:
    """Write `pairs.jsonl`, and `best.jsonl` with the best sample of each prompt; whole prompts are held out.

    A prompt that a service with `on_error: skip_group` did not score is in neither; the summary counts them.
    """
    tokenizer = context.tokenizer(stage.policy)
    prompts = tokenize_prompts(read_prompts(stage.prompts), tokenizer, stage.max_prompt_tokens)
    spec = context.rollout(stage.policy)
    engine = context.launcher.rollout(spec)
    judge = context.judge(stage.judge, tokenizer.pad_id)
    size = prompts_per_round(spec.role, stage.samples_per_prompt)
    files, skips = AppendedFiles(context.folder, (PAIRS, BEST), stage.name), Skips(judge)
    context.tracker.begin("sampling", -(-len(prompts) // size))
    with context.recovery.going_on([files]) as going:
        made = _taken_up(going, files, skips, context.folder)
        context.tracker.expect(going.step + -(-(len(prompts) - made.prompts) // size))
        clock = time.perf_counter()
        for step, drawn in enumerate(_rounds(engine, prompts, made.prompts, size, stage, context), going.step + 1):
            metrics = _judged(drawn, judge, skips, files, made, stage, context)
            now = time.perf_counter()
            metrics["tokens_per_second"] = sum(len(rollout.tokens) for rollout in drawn.rollouts) / (now - clock)
            clock = now
            context.tracker.log(step, metrics)
            going.done(step, lambda: {"made": asdict(made), "skips": skips.carry()}, commit=True)
    return _summary(made, judge, skips)


def prompts_per_round(role: RolloutRole, samples_per_prompt: int) -> int:
    """Return the prompts of a round: their samples are `LOADS` times what all replicas generate at once."""
    return -(-LOADS * role.replicas * role.max_sequences // samples_per_prompt)


def _taken_up(going: Going, files: AppendedFiles, skips: Skips, folder: Path) -> Made:
    """Return the counts so far; files that no state refers to are emptied."""
    skips.take_up(going.carried.get("skips", {}))
    if not going.step:
        files.clear()
        return Made()
    if counts := going.carried.get("made"):
        return Made(**counts)
    made = Made(EARLIER_ROUND * going.step)
    for pair in each_pair(folder / PAIRS):
        made.add(pair)
    return made


def _rounds(
    engine: RolloutEngine, prompts: Sequence[Prompt], done: int, size: int, stage: AnnotateStage, context: StageContext
) -> Iterator[Round]:
    """Yield the rounds after `done` prompts; the one after the present one is being drawn meanwhile.

    Where the engine takes turns with models on shared devices, each waits until the one before is judged. After an
    interrupt nothing further is drawn.
    """
    roles = context.recipe.roles
    alone = not (roles.rollout.share or roles.judge.share)
    asked = (
        (min(start + size, len(prompts)), _ask(engine, prompts[start : start + size], stage, context))
        for start in range(done, len(prompts), size)
    )
    present = next(asked, None)
    while present is not None:
        following = next(asked, None) if alone and context.recovery.interrupts.wanted is None else None
        end, pending = present
        rollouts = pending.result()
        context.tracker.spend(generated_tokens=sum(len(rollout.tokens) for rollout in rollouts))
        yield Round(end, rollouts)
        present = following or next(asked, None)


def _ask(
    engine: RolloutEngine, prompts: Sequence[Prompt], stage: AnnotateStage, context: StageContext
) -> Pending[list[Rollout]]:
    seeds = [[context.seed(prompt.id, k) for k in range(stage.samples_per_prompt)] for prompt in prompts]
    return engine.generate(prompts, Sampling(stage.max_response_tokens, stage.temperature), seeds)


def _judged(
    drawn: Round,
    judge: RewardSource,
    skips: Skips,
    files: AppendedFiles,
    made: Made,
    stage: AnnotateStage,
    context: StageContext,
) -> dict[str, float]:
    """Score a round, append its pairs and best samples, count them, and return its metrics."""
    scored = judge.score(drawn.rollouts).result()
    rows = skips.kept(scored, drawn.rollouts)
    rollouts, scores = [drawn.rollouts[row] for row in rows], scored[rows].tolist()
    pairs: list[Pair] = []
    best: list[Best] = []
    for row in range(0, len(rollouts), stage.samples_per_prompt):
        group = slice(row, row + stage.samples_per_prompt)
        pairs += _pairs(rollouts[group], scores[group], stage, context)
        best += _best(rollouts[group], scores[group], stage, context)
    files.append(PAIRS, map(vars, pairs))
    files.append(BEST, map(vars, best))
    made.prompts = drawn.end
    for pair in pairs:
        made.add(pair)
    return {"reward": sum(scores) / len(scores) if scores else math.nan, "pairs": made.pairs}


def _summary(made: Made, judge: RewardSource, skips: Skips) -> Summary:
    if made.heldout == made.pairs:
        raise TrainingError(
            f"annotate found no pair to train on in {made.prompts} prompts: the judge scored all samples of a prompt"
            " alike; raise samples_per_prompt or temperature, or look at the judge"
        )
    summary: Summary = {"pairs": made.pairs, "heldout": made.heldout, "flipped": made.flipped / made.pairs}
    if isinstance(judge, LlmReward):
        summary |= {"questions_asked": judge.asked, "unreadable_answers": judge.unreadable}
    if skips.skipped:
        summary |= {"skipped_prompts": skips.skipped}
    return summary


def _labels(prompt: Prompt, stage: AnnotateStage, context: StageContext) -> tuple[bool, random.Random]:
    """Return whether a prompt is held out, and what draws the noise of its labels."""
    rng = random.Random(context.seed("label", prompt.id))
    return rng.random() < stage.heldout_fraction, rng


def _best(
    rollouts: Sequence[Rollout], scores: Sequence[float], stage: AnnotateStage, context: StageContext
) -> list[Best]:
    """Return the sample of one prompt that scores highest, the first of equals; nothing of a held-out prompt."""
    prompt = rollouts[0].prompt
    if _labels(prompt, stage, context)[0]:
        return []
    score, rollout = max(zip(scores, rollouts, strict=True), key=lambda pair: pair[0])
    return [
        Best(
            prompt_id=prompt.id,
            prompt=prompt.text,
            prompt_tokens=prompt.tokens,
            metadata=dict(prompt.metadata),
            response=rollout.text,
            response_tokens=rollout.tokens,
            score=score,
        )
    ]


def _pairs(
    rollouts: Sequence[Rollout], scores: Sequence[float], stage: AnnotateStage, context: StageContext
) -> list[Pair]:
    """Pair the samples of one prompt; equal scores and equal texts say nothing and are left out."""
    order = sorted(range(len(rollouts)), key=lambda i: -scores[i])
    chosen = [(order[0], order[-1])] if stage.pairing == "best_worst" else list(combinations(order, 2))
    prompt = rollouts[0].prompt
    heldout, rng = _labels(prompt, stage, context)
    pairs = []
    for better, worse in chosen:
        if scores[better] == scores[worse] or rollouts[better].tokens == rollouts[worse].tokens:
            continue
        flipped = rng.random() < stage.label_noise
        first, second = (worse, better) if flipped else (better, worse)
        pairs.append(
            Pair(
                prompt_id=prompt.id,
                prompt=prompt.text,
                prompt_tokens=prompt.tokens,
                metadata=dict(prompt.metadata),
                chosen=rollouts[first].text,
                chosen_tokens=rollouts[first].tokens,
                rejected=rollouts[second].text,
                rejected_tokens=rollouts[second].tokens,
                chosen_score=scores[first],
                rejected_score=scores[second],
                flipped=flipped,
                heldout=heldout,
            )
        )
    return pairs
