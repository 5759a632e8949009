"""Bradley-Terry reward model: train, measure on held-out pairs, standardise, save."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf.data.collate import collate_pairs
from rlhf.data.pairs import Pair
from rlhf.engines.objectives import RewardModel
from rlhf.errors import GuardError
from rlhf.recipe.stage_schema import RewardStage
from rlhf.roles import Reward
from rlhf.stages.context import StageContext
from rlhf.stages.epochs import train_epochs
from rlhf.stages.pairs import load_pairs
from rlhf.stages.sft import Summary
from rlhf.types import PreferenceBatch, Prompt, Rollout

STANDARDISING_PAIRS = 128


def run(stage: RewardStage, context: StageContext) -> Summary:
    """Train; afterwards scores have mean 0 and standard deviation 1 over (a sample of) the training responses."""
    tokenizer = context.tokenizer(stage.init)
    split = load_pairs(stage, context, tokenizer)
    spec = context.trained(
        "reward", "scalar", stage.init, stage.optimizer, stage.tuning, head_learning_rate=stage.head_learning_rate
    )
    model = context.launcher.reward(spec)
    collate = partial(collate_pairs, pad_id=tokenizer.pad_id)
    trained = train_epochs(model, split.train, collate, RewardModel(), stage, context, split.heldout)
    chosen, rejected = _scores(model, collate(split.train[:STANDARDISING_PAIRS]))
    everything = torch.cat([chosen, rejected])
    std = float(everything.std())
    if not std > 0:
        raise GuardError("the reward model gives every training response the same score; raise the learning rates")
    model.standardise(float(everything.mean()), std).result()
    summary: Summary = {"pairs": len(split.train), "train_accuracy": _accuracy(chosen, rejected)}
    summary |= {"heldout_pairs": len(split.heldout), **trained.summary()}
    if split.judged:
        chosen, rejected = _scores(model, collate(split.heldout))
        summary |= _agreement(stage, context, split.judged, chosen > rejected, tokenizer.pad_id)
    context.save(model)
    return summary


def _scores(model: Reward, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    chosen, rejected = model.scores(batch.chosen), model.scores(batch.rejected)
    return chosen.result(), rejected.result()


def _accuracy(chosen: Tensor, rejected: Tensor) -> float:
    return float((chosen > rejected).float().mean())


def _agreement(
    stage: RewardStage, context: StageContext, judged: Sequence[Pair], prefers_chosen: Tensor, pad_id: int
) -> Summary:
    """Return the accuracy against the judge's noise-free order, and against gold where the recipe names it."""
    truth = torch.tensor([pair.chosen_score > pair.rejected_score for pair in judged])
    summary: Summary = {"judge_accuracy": float((prefers_chosen == truth).float().mean())}
    if stage.gold:
        gold = context.judge(stage.gold, pad_id)
        better = gold.score([_rollout(pair, True) for pair in judged]).result()
        worse = gold.score([_rollout(pair, False) for pair in judged]).result()
        decided = better != worse
        agree = (prefers_chosen == (better > worse))[decided]
        summary["gold_accuracy"] = float(agree.float().mean())
    return summary


def _rollout(pair: Pair, chosen: bool) -> Rollout:
    tokens, text = (pair.chosen_tokens, pair.chosen) if chosen else (pair.rejected_tokens, pair.rejected)
    prompt = Prompt(pair.prompt_id, tuple(pair.prompt_tokens), pair.prompt, pair.metadata)
    return Rollout(prompt, tuple(tokens), (0.0,) * len(tokens), text, "stop", 0, 0)
