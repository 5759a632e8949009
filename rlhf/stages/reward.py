"""Bradley-Terry reward model: train, measure on held-out pairs, standardise, save."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf.algorithms.ordering import wins
from rlhf.data.collate import collate, collate_pairs
from rlhf.data.pairs import Pair
from rlhf.data.sequences import TokenPair
from rlhf.engines.objectives import RewardModel
from rlhf.errors import GuardError
from rlhf.recipe.stage_schema import RewardStage
from rlhf.roles import Reward
from rlhf.stages.context import StageContext
from rlhf.stages.epochs import train_epochs
from rlhf.stages.pairs import load_pairs
from rlhf.stages.sft import Summary
from rlhf.types import Prompt, Rollout

STANDARDISING_PAIRS = 128


def run(stage: RewardStage, context: StageContext) -> Summary:
    """Train; afterwards scores have mean 0 and standard deviation 1 over (a sample of) the training responses."""
    tokenizer = context.tokenizer(stage.init)
    split = load_pairs(stage, context, tokenizer)
    spec = context.trained(
        "reward", "scalar", stage.init, stage.optimizer, stage.tuning, head_learning_rate=stage.head_learning_rate
    )
    model = context.launcher.reward(spec)
    batched = partial(collate_pairs, pad_id=tokenizer.pad_id)
    trained = train_epochs(model, split.train, batched, RewardModel(), stage, context, split.heldout)
    chosen, rejected = _scores(model, split.train[:STANDARDISING_PAIRS], tokenizer.pad_id)
    everything = torch.cat([chosen, rejected])
    std = float(everything.std())
    if not std > 0:
        raise GuardError("the reward model gives every training response the same score; raise the learning rates")
    model.standardise(float(everything.mean()), std).result()
    summary: Summary = {"pairs": len(split.train), "train_accuracy": float(wins(chosen, rejected).mean())}
    summary |= {"heldout_pairs": len(split.heldout), **trained.summary()}
    if split.judged:
        chosen, rejected = _scores(model, split.heldout, tokenizer.pad_id)
        summary |= _agreement(stage, context, split.judged, wins(chosen, rejected), tokenizer.pad_id)
    context.save(model)
    return summary


def _scores(model: Reward, pairs: Sequence[TokenPair], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the scores of the chosen and of the rejected sides, `[P]`; neighbours share their prompt's pass."""
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    scores = model.scores(collate(sides, pad_id)).result()
    return scores[0::2], scores[1::2]


def _agreement(
    stage: RewardStage, context: StageContext, judged: Sequence[Pair], chosen_wins: Tensor, pad_id: int
) -> Summary:
    """Return the accuracy against the judge's noise-free order, and against gold where it tells any pair apart."""
    given = torch.tensor([[pair.chosen_score, pair.rejected_score] for pair in judged], dtype=torch.float64)
    summary: Summary = {"judge_accuracy": agreement(chosen_wins, wins(given[:, 0], given[:, 1]))}
    if stage.gold:
        gold = context.judge(stage.gold, pad_id)
        better = gold.score([_rollout(pair, True) for pair in judged]).result()
        worse = gold.score([_rollout(pair, False) for pair in judged]).result()
        decided = better != worse
        if decided.any():
            summary["gold_accuracy"] = agreement(chosen_wins[decided], wins(better, worse)[decided])
    return summary


def agreement(ours: Tensor, truth: Tensor) -> float:
    """Return the share of pairs that two orders agree on; a pair that either of them leaves open counts one half.

    Both are as of `wins`, `[P]`.
    """
    return float((ours * truth + (1 - ours) * (1 - truth)).mean())


def _rollout(pair: Pair, chosen: bool) -> Rollout:
    tokens, text = (pair.chosen_tokens, pair.chosen) if chosen else (pair.rejected_tokens, pair.rejected)
    prompt = Prompt(pair.prompt_id, tuple(pair.prompt_tokens), pair.prompt, pair.metadata)
    return Rollout(prompt, tuple(tokens), (0.0,) * len(tokens), text, "stop", 0, 0)
