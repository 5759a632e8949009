"""The policy's loss where the batch does not know the old logprobs, because its own pass does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import CASES, build_model, experience
from torch import Tensor, nn

from rlhf.engines.policy_objectives import ClippedPolicy
from rlhf.engines.scoring import response_logprobs
from rlhf.types import Experience, Metrics


def loss_and_gradient(
    objective: ClippedPolicy, model: nn.Module, batch: Experience
) -> tuple[Tensor, list[Tensor], Metrics]:
    loss, metrics = objective.loss(model, batch)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters()))), metrics


@pytest.mark.parametrize("name", ["policy", "policy_sequence_k3", "policy_constant_k2"])
def test_the_first_update_needs_no_old_logprobs(tiny_folder: Path, name: str) -> None:
    model = build_model(tiny_folder, "causal", lora=False, flat=True)
    given, batch = CASES[name].objective, experience()
    assert isinstance(given, ClippedPolicy)
    with torch.no_grad():
        present = response_logprobs(model, batch.batch, given.temperature)
    expected = loss_and_gradient(given, model, replace(batch, old_logprobs=present))
    unknown = replace(batch, old_logprobs=torch.full_like(present, torch.nan))
    found = loss_and_gradient(replace(given, first_update=True), model, unknown)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)
    assert found[2]["ratio"] == 1
    for key, value in expected[2].items():
        assert found[2][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
