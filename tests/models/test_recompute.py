"""Activations that are computed again: the same gradients from much less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.engines.objectives import RewardModel, Sft
from rlhf.models.loading import load_causal
from rlhf.models.recompute import recompute_activations
from rlhf.models.scalar import load_scalar
from rlhf.models.tuning import apply_tuning
from rlhf.recipe.tuning_schema import Lora
from rlhf.types import PreferenceBatch, TokenBatch


def batch(rows: int = 4, width: int = 48) -> TokenBatch:
    tokens = torch.randint(6, 262, (rows, width), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(tokens, dtype=torch.bool)
    return TokenBatch(tokens, real, torch.arange(width).expand(rows, -1) >= 8, torch.zeros(rows, width))


def pairs() -> PreferenceBatch:
    zeros = torch.zeros(4)
    return PreferenceBatch(batch(), batch(width=40), zeros, zeros, zeros)


def gradients(model: nn.Module, objective: Any, rows: Any) -> tuple[dict[str, Tensor], int]:
    """Return the gradients, and the bytes of distinct memory kept for the way backward beside the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = objective.loss(model, rows)
    before = sum(kept.values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, before


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["causal", "scalar"])
@pytest.mark.parametrize("width", [48, 300])  # other attention kernels on CPU from 256
def test_gradients_are_the_same_from_less_memory(tiny_folder: Path, kind: str, lora: bool, width: int) -> None:
    def build() -> Any:
        model = load_causal(tiny_folder, "float32") if kind == "causal" else load_scalar(tiny_folder, "float32", 1)
        return apply_tuning(model, Lora(r=4, dropout=0.1), seed=1) if lora else model

    objective, rows = (Sft(), batch(width=width)) if kind == "causal" else (RewardModel(), pairs())
    plain, again = build(), build()
    recompute_activations(again)
    torch.manual_seed(3)
    expected, kept = gradients(plain, objective, rows)
    torch.manual_seed(3)
    found, kept_again = gradients(again, objective, rows)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)
    assert kept_again < 0.5 * kept


def test_nothing_is_computed_twice_without_training(tiny_folder: Path) -> None:
    model = load_causal(tiny_folder, "float32")
    recompute_activations(model)
    runs = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for training, passes in ((False, 1), (True, 2)):
        runs.clear()
        model.train(training)
        loss, _ = Sft().loss(model, batch())
        loss.backward()
        assert len(runs) == passes
