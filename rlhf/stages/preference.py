"""DPO: the policy before its first step is the reference, so its logprobs are computed once, up front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.data.collate import collate_pairs
from rlhf.data.tokenize import TokenPair
from rlhf.engines.objectives import Preference
from rlhf.recipe.stage_schema import DpoStage
from rlhf.roles import Policy
from rlhf.stages.context import StageContext
from rlhf.stages.epochs import train_epochs
from rlhf.stages.pairs import load_pairs
from rlhf.stages.sft import Summary
from rlhf.types import PreferenceBatch, TokenBatch

ReferencedPair = tuple[TokenPair, float, float]


def run(stage: DpoStage, context: StageContext) -> Summary:
    """Train on the pairs and save the merged policy; the held-out accuracy is of the implicit reward."""
    tokenizer = context.tokenizer(stage.policy)
    split = load_pairs(stage, context, tokenizer)
    policy = context.launcher.policy(context.trained("policy", "causal", stage.policy, stage.optimizer, stage.lora))
    collate = partial(_collate, pad_id=tokenizer.pad_id)
    train = _reference(policy, split.train, tokenizer.pad_id)
    heldout = _reference(policy, split.heldout, tokenizer.pad_id)
    objective = Preference(stage.beta, stage.label_smoothing)
    train_epochs(policy, train, collate, objective, stage, context)
    summary: Summary = {"pairs": len(train)}
    if heldout:
        measured = policy.evaluate(collate(heldout), objective).result()
        summary |= {"heldout_pairs": len(heldout), **{f"heldout_{name}": measured[name] for name in measured}}
    policy.save(context.folder / "model").result()
    return summary


def _reference(policy: Policy, pairs: Sequence[TokenPair], pad_id: int) -> list[ReferencedPair]:
    """Return each pair with the sums of the reference's logprobs of the chosen and the rejected completion."""
    if not pairs:
        return []
    batch = collate_pairs(pairs, pad_id=pad_id)
    chosen, rejected = (_sums(policy, side).tolist() for side in (batch.chosen, batch.rejected))
    return list(zip(pairs, chosen, rejected, strict=True))


def _sums(policy: Policy, batch: TokenBatch) -> Tensor:
    return sequence_logprobs(policy.logprobs(batch).result().logprobs, batch.response_mask)


def _collate(rows: Sequence[ReferencedPair], pad_id: int) -> PreferenceBatch:
    pairs, chosen, rejected = zip(*rows, strict=True)
    batch = collate_pairs(pairs, pad_id=pad_id)
    return replace(batch, chosen_ref_logprobs=torch.tensor(chosen), rejected_ref_logprobs=torch.tensor(rejected))
