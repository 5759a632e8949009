"""Training on preference pairs: DPO and its siblings, told apart by their loss alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from inspect import signature

import torch

from rlhf.algorithms.preference import PAIR_LOSSES, PairLoss
from rlhf.data.collate import collate_pairs
from rlhf.data.lazy import Lazy
from rlhf.data.sequences import TokenPair, TokenSequence
from rlhf.engines.preference_objectives import Preference
from rlhf.recipe.preference_schema import REFERENCE_FREE, AnyPairStage
from rlhf.stages.context import StageContext
from rlhf.stages.epochs import train_epochs
from rlhf.stages.pairs import load_pairs
from rlhf.stages.reference_cache import reference_sums
from rlhf.stages.sft import Summary
from rlhf.types import PreferenceBatch

ReferencedPair = tuple[TokenPair, float, float]
"""A pair with the sums of the reference's logprobs of the chosen and the rejected completion."""


def run(stage: AnyPairStage, context: StageContext) -> Summary:
    """Train on the pairs and save the merged policy; the held-out metrics are of the loss's own implicit reward.

    The policy before its first step is the reference, so its logprobs are computed once, up front, or not at
    all: where the loss does not read them, or an earlier run has left them (`reference_sums`).
    """
    tokenizer = context.tokenizer(stage.policy)
    split = load_pairs(stage, context, tokenizer)
    spec = context.trained("policy", "causal", stage.policy, stage.optimizer, stage.tuning)
    policy = context.launcher.policy(spec)
    collate = partial(_collate, pad_id=tokenizer.pad_id)
    groups = (split.train, split.heldout)
    if stage.kind in REFERENCE_FREE:
        train, heldout = map(_unreferenced, groups)
    else:
        sums = reference_sums(policy, spec, [_sides(pairs) for pairs in groups], tokenizer.pad_id, context)
        train, heldout = map(_referenced, groups, sums)
    objective = Preference(pair_loss(stage))
    trained = train_epochs(policy, train, collate, objective, stage, context, heldout)
    summary: Summary = {"pairs": len(train), "heldout_pairs": len(heldout), **trained.summary()}
    context.save(policy)
    return summary


def pair_loss(stage: AnyPairStage) -> PairLoss:
    """Return the loss of the stage's kind with the stage's settings: a loss names them as the recipe does."""
    loss = PAIR_LOSSES[stage.kind]
    settings = list(signature(loss).parameters)[1:]
    return partial(loss, **{name: getattr(stage, name) for name in settings})


def _sides(pairs: Sequence[TokenPair]) -> Sequence[TokenSequence]:
    return Lazy(lambda i: pairs[i // 2].rejected if i % 2 else pairs[i // 2].chosen, 2 * len(pairs))


def _referenced(pairs: Sequence[TokenPair], sums: Sequence[float]) -> Sequence[ReferencedPair]:
    return Lazy(lambda i: (pairs[i], sums[2 * i], sums[2 * i + 1]), len(pairs))


def _unreferenced(pairs: Sequence[TokenPair]) -> Sequence[ReferencedPair]:
    return Lazy(lambda i: (pairs[i], 0.0, 0.0), len(pairs))


def _collate(rows: Sequence[ReferencedPair], pad_id: int) -> PreferenceBatch:
    pairs, chosen, rejected = zip(*rows, strict=True)
    batch = collate_pairs(pairs, pad_id=pad_id)
    return replace(batch, chosen_ref_logprobs=torch.tensor(chosen), rejected_ref_logprobs=torch.tensor(rejected))
