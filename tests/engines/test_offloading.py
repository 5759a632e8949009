"""Memory that is emptied and filled again in place: aliases and later steps are the same, bit for bit."""

from pathlib import Path

import pytest
import torch
from engine_cases import CASES, HEAD_RATE, OPTIMIZER, build_model
from torch import nn

from rlhf.engines.offloading import Parked, tensors_of
from rlhf.engines.torch_engine import TorchEngine

CPU = torch.device("cpu")


def test_views_and_aliases_stay_what_they_are() -> None:
    flat = torch.arange(12.0)
    model = nn.Linear(3, 4, bias=False)
    model.weight.data = flat.view(4, 3)
    model.weight.grad = torch.ones(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=1.0)
    optimizer.step()
    expected, where = flat.clone(), flat.untyped_storage()._cdata
    parked = Parked([model, optimizer], CPU)
    assert parked.bytes == 3 * 48  # weight, gradient, momentum
    assert flat.untyped_storage().nbytes() == model.weight.grad.untyped_storage().nbytes() == 0
    parked.reload()
    assert torch.equal(flat, expected)
    assert torch.equal(model.weight.data.flatten(), expected)
    assert model.weight.untyped_storage()._cdata == where
    flat[0] = 77
    assert model.weight[0, 0] == 77


def test_other_devices_and_strange_objects_are_left_alone() -> None:
    here, there = torch.ones(2), torch.ones(2, device="meta")
    roots = [{"a": [here, there]}, (here[:1],), object(), Path("x"), None]
    assert [tensor is there for tensor in tensors_of(roots, torch.device("meta"))] == [True]
    assert all(tensor.untyped_storage()._cdata == here.untyped_storage()._cdata for tensor in tensors_of(roots, CPU))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_go_on_as_if_never_parked(tiny_folder: Path, lora: bool, dtype: str) -> None:
    case = CASES["policy"]
    outcomes = []
    for park in (False, True):
        module = build_model(tiny_folder, "causal", lora, dtype)
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()  # out of the mapped file, which cannot be resized
        engine = TorchEngine(module, OPTIMIZER, HEAD_RATE, 24)
        metrics = [engine.step(case.batch(), case.objective, 1.0).sums]
        if park:
            roots = [module, *engine.holdings()]
            held = Parked(roots, CPU)
            assert not list(tensors_of(roots, CPU))
            held.reload()
        metrics.append(engine.step(case.batch(), case.objective, 0.5).sums)
        outcomes.append((metrics, module.state_dict()))
    (plain, weights), (parked, again) = outcomes
    assert plain == parked
    assert all(torch.equal(weights[name], again[name]) for name in weights)
