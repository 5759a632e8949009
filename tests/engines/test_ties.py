"""Accuracy where nothing is told apart: a policy that equals its reference, scores that are all the same."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import OPTIMIZER, build_model, labelled_batch, preference_batch

from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.algorithms.preference import PAIR_LOSSES
from rlhf.engines.base import LearnerSpec
from rlhf.engines.learner import ModelLearner
from rlhf.engines.objectives import RewardModel
from rlhf.engines.preference_objectives import Kto, Preference
from rlhf.engines.scoring import response_logprobs
from rlhf.recipe.tuning_schema import Lora
from rlhf.types import TokenBatch

SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1}, "robust_dpo": {"beta": 0.1, "label_noise": 0.1}, "ipo": {"beta": 0.1}, "hinge": {"beta": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_pairs_of_a_policy_that_equals_its_reference_are_half_right(tiny_folder: Path, kind: str) -> None:
    model, batch = build_model(tiny_folder, "causal", lora=True, flat=True), preference_batch()
    with torch.no_grad():
        both = TokenBatch.stack([batch.chosen, batch.rejected])
        chosen, rejected = sequence_logprobs(response_logprobs(model, both), both.response_mask).chunk(2)
        equal = replace(batch, chosen_ref_logprobs=chosen, rejected_ref_logprobs=rejected)
        _, metrics = Preference(partial(PAIR_LOSSES[kind], **SETTINGS[kind])).loss(model, equal)
        assert (metrics["accuracy"], metrics["margin"]) == (0.5, 0)
        moved = replace(equal, rejected_ref_logprobs=rejected + torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0]))
        _, metrics = Preference(partial(PAIR_LOSSES[kind], **SETTINGS[kind])).loss(model, moved)
        assert metrics["accuracy"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 1) / 5)


def test_responses_at_ktos_reference_point_are_half_right(tiny_folder: Path) -> None:
    model, batch = build_model(tiny_folder, "causal", lora=True, flat=True), labelled_batch()
    with torch.no_grad():
        own = sequence_logprobs(response_logprobs(model, batch.batch), batch.batch.response_mask)
        equal = replace(batch, ref_logprobs=own, kl=torch.zeros(5))
        _, metrics = Kto(0.1, 1.0, 1.0).loss(model, equal)
    assert (metrics["accuracy"], metrics["margin"]) == (0.5, 0)


def test_pairs_of_equal_scores_are_half_right(tiny_folder: Path) -> None:
    model, batch = build_model(tiny_folder, "scalar", lora=False, flat=True), preference_batch()
    with torch.no_grad():
        _, one = RewardModel().loss(model, batch)
        _, other = RewardModel().loss(model, replace(batch, chosen=batch.rejected, rejected=batch.chosen))
        assert one["accuracy"] + other["accuracy"] == pytest.approx(1)
        model.get_submodule("score").weight.zero_()
        _, metrics = RewardModel().loss(model, batch)
    assert (metrics["accuracy"], metrics["margin"]) == (0.5, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_change_no_bit(tiny_folder: Path, dtype: Any) -> None:
    """So the policy of a first step is its own reference, and what tells a pair apart is how its passes were cut."""
    spec = LearnerSpec(
        role="policy", kind="causal", checkpoint=tiny_folder, dtype=dtype, tuning=Lora(r=4), optimizer=OPTIMIZER,
        head_learning_rate=None, max_tokens_per_microbatch=64, temperature=1.0, threads=1, seed=1,
    )  # fmt: skip
    learner, batch = ModelLearner(spec), preference_batch()
    for side in (batch.chosen, batch.rejected):
        assert torch.equal(learner.logprobs(side).values, learner.logprobs(side, "base").values)
    learner.train(batch, Preference(partial(PAIR_LOSSES["dpo"], beta=0.1)), [[0, 1], [2, 3]], 1.0)
    assert not torch.equal(learner.logprobs(side).values, learner.logprobs(side, "base").values)
