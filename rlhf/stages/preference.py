"""Training on preference pairs: DPO and its siblings, told apart by their loss alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.algorithms.preference import PAIR_LOSSES, PairLoss
from rlhf.data.collate import collate_pairs
from rlhf.data.sequences import TokenPair
from rlhf.engines.preference_objectives import Preference
from rlhf.recipe.preference_schema import REFERENCE_FREE, AnyPairStage
from rlhf.roles import Reference
from rlhf.stages.context import StageContext
from rlhf.stages.epochs import train_epochs
from rlhf.stages.pairs import load_pairs
from rlhf.stages.sft import Summary
from rlhf.types import PreferenceBatch, TokenBatch

ReferencedPair = tuple[TokenPair, float, float]
"""A pair with the sums of the reference's logprobs of the chosen and the rejected completion."""


def run(stage: AnyPairStage, context: StageContext) -> Summary:
    """Train on the pairs and save the merged policy; the held-out accuracy is of the loss's own implicit reward.

    The policy before its first step is the reference, so its logprobs are computed once, up front, or not at all.
    """
    tokenizer = context.tokenizer(stage.policy)
    split = load_pairs(stage, context, tokenizer)
    policy = context.launcher.policy(context.trained("policy", "causal", stage.policy, stage.optimizer, stage.lora))
    collate = partial(_collate, pad_id=tokenizer.pad_id)
    referenced = _unreferenced if stage.kind in REFERENCE_FREE else partial(_referenced, policy, tokenizer.pad_id)
    train, heldout = referenced(split.train), referenced(split.heldout)
    objective = Preference(pair_loss(stage))
    train_epochs(policy, train, collate, objective, stage, context)
    summary: Summary = {"pairs": len(train)}
    if heldout:
        measured = policy.evaluate(collate(heldout), objective).result()
        summary |= {"heldout_pairs": len(heldout), **{f"heldout_{name}": measured[name] for name in measured}}
    policy.save(context.folder / "model").result()
    return summary


def pair_loss(stage: AnyPairStage) -> PairLoss:
    """Return the loss of the stage's kind with the stage's settings: a loss names them as the recipe does."""
    loss = PAIR_LOSSES[stage.kind]
    settings = list(signature(loss).parameters)[1:]
    return partial(loss, **{name: getattr(stage, name) for name in settings})


def response_sums(model: Reference, batch: TokenBatch) -> Tensor:
    """Return the model's sum of log-probabilities over each row's response, `[B]`."""
    return sequence_logprobs(model.logprobs(batch).result().logprobs, batch.response_mask)


def _referenced(model: Reference, pad_id: int, pairs: Sequence[TokenPair]) -> list[ReferencedPair]:
    if not pairs:
        return []
    batch = collate_pairs(pairs, pad_id=pad_id)
    chosen, rejected = (response_sums(model, side).tolist() for side in (batch.chosen, batch.rejected))
    return list(zip(pairs, chosen, rejected, strict=True))


def _unreferenced(pairs: Sequence[TokenPair]) -> list[ReferencedPair]:
    return [(pair, 0.0, 0.0) for pair in pairs]


def _collate(rows: Sequence[ReferencedPair], pad_id: int) -> PreferenceBatch:
    pairs, chosen, rejected = zip(*rows, strict=True)
    batch = collate_pairs(pairs, pad_id=pad_id)
    return replace(batch, chosen_ref_logprobs=torch.tensor(chosen), rejected_ref_logprobs=torch.tensor(rejected))
