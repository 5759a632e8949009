"""Preference data: sample from a policy, let a judge rank the samples, add the stated label noise."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from rlhf.data.best import Best, read_best, write_best
from rlhf.data.pairs import Pair, read_pairs, write_pairs
from rlhf.data.reading import read_prompts
from rlhf.data.tokenize import tokenize_prompts
from rlhf.errors import TrainingError
from rlhf.recipe.stage_schema import AnnotateStage
from rlhf.rewards.llm import LlmReward
from rlhf.rewards.skips import Skips
from rlhf.roles import Pending, Ready, RolloutEngine
from rlhf.stages.context import StageContext
from rlhf.stages.sft import Summary
from rlhf.types import Prompt, Rollout, Sampling

PROMPTS_PER_CALL = 128
PAIRS, BEST = "pairs.jsonl", "best.jsonl"


class Made:
    """What has been annotated so far; its state is the files that a later stage reads."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.best: list[Best] = []

    def state_bytes(self) -> Pending[int]:
        """Return about how many bytes they take."""
        characters = sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in self.pairs)
        return Ready(12 * characters + 1000 * len(self.pairs))

    def save_state(self, folder: Path) -> Pending[None]:
        """Write `pairs.jsonl` and `best.jsonl`."""
        write_pairs(folder / PAIRS, self.pairs)
        write_best(folder / BEST, self.best)
        return Ready(None)

    def load_state(self, folder: Path) -> Pending[None]:
        """Read them; a file may be empty."""
        self.pairs = read_pairs(folder / PAIRS) if (folder / PAIRS).stat().st_size else []
        self.best = read_best(folder / BEST) if (folder / BEST).stat().st_size else []
        return Ready(None)


def run(stage: AnnotateStage, context: StageContext) -> Summary:
    """Write `pairs.jsonl`, and `best.jsonl` with the best sample of each prompt; whole prompts are held out.

    A prompt that a service with `on_error: skip_group` did not score is in neither; the summary counts them.
    """
    tokenizer = context.tokenizer(stage.policy)
    prompts = tokenize_prompts(read_prompts(stage.prompts), tokenizer, stage.max_prompt_tokens)
    engine = context.launcher.rollout(context.rollout(stage.policy))
    judge = context.judge(stage.judge, tokenizer.pad_id)
    skips = Skips(judge)
    starts = range(0, len(prompts), PROMPTS_PER_CALL)
    context.tracker.begin("sampling", len(starts))
    made = Made()
    with context.recovery.going_on([made]) as going:
        skips.take_up(going.carried.get("skips", {}))
        for index, start in list(enumerate(starts))[going.step :]:
            clock = time.perf_counter()
            rollouts = _draw(engine, prompts[start : start + PROMPTS_PER_CALL], stage, context)
            scored = judge.score(rollouts).result()
            rows = skips.kept(scored, rollouts)
            rollouts, scores = [rollouts[row] for row in rows], scored[rows].tolist()
            for row in range(0, len(rollouts), stage.samples_per_prompt):
                group = slice(row, row + stage.samples_per_prompt)
                made.pairs += _pairs(rollouts[group], scores[group], stage, context)
                made.best += _best(rollouts[group], scores[group], stage, context)
            speed = sum(len(r.tokens) for r in rollouts) / (time.perf_counter() - clock)
            reward = sum(scores) / len(scores) if scores else math.nan
            context.tracker.log(index + 1, {"reward": reward, "pairs": len(made.pairs), "tokens_per_second": speed})
            going.done(index + 1, lambda: {"skips": skips.carry()})
    pairs = made.pairs
    if not any(not pair.heldout for pair in pairs):
        raise TrainingError(
            f"annotate found no pair to train on in {len(prompts)} prompts: the judge scored all samples of a prompt"
            " alike; raise samples_per_prompt or temperature, or look at the judge"
        )
    made.save_state(context.folder)
    flipped = sum(pair.flipped for pair in pairs) / len(pairs)
    summary: Summary = {"pairs": len(pairs), "heldout": sum(pair.heldout for pair in pairs), "flipped": flipped}
    if isinstance(judge, LlmReward):
        summary |= {"questions_asked": judge.asked, "unreadable_answers": judge.unreadable}
    if skips.skipped:
        summary |= {"skipped_prompts": skips.skipped}
    return summary


def _draw(
    engine: RolloutEngine, prompts: Sequence[Prompt], stage: AnnotateStage, context: StageContext
) -> list[Rollout]:
    seeds = [[context.seed(prompt.id, k) for k in range(stage.samples_per_prompt)] for prompt in prompts]
    sampling = Sampling(stage.max_response_tokens, stage.temperature)
    rollouts = engine.generate(prompts, sampling, seeds).result()
    context.tracker.spend(generated_tokens=sum(len(r.tokens) for r in rollouts))
    return rollouts


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
