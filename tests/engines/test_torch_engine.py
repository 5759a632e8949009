"""One optimizer step is exact: how a batch is cut, padded and ordered changes nothing, for every objective."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import CASES, HEAD_RATE, OPTIMIZER, build_model, experience, largest_change, token_batch, trained
from rank_cases import poisoned
from torch import Tensor, nn

from rlhf.engines.microbatch import rank_passes
from rlhf.engines.objectives import Sft
from rlhf.engines.scoring import token_scores
from rlhf.engines.torch_engine import TorchEngine
from rlhf.recipe.base import Optimizer
from rlhf.types import Experience, Metrics, Rows, TokenBatch

WHOLE = 10**6


ROUNDING = 1e-5
"""Norm of a float32 gradient's error over its own norm: 80 times the spacing of float32 numbers at 1."""


@dataclass(frozen=True)
class Stepped:
    """A fresh model after one step: its parameters, the clipped gradient that moved them, and the step's metrics."""

    parameters: dict[str, Tensor]
    gradient: dict[str, Tensor]
    metrics: Metrics


def step(folder: Path, name: str, lora: bool, batch: Rows, max_tokens: int, flat: bool = True) -> Stepped:
    model = build_model(folder, CASES[name].kind, lora, flat=flat)
    engine = TorchEngine(model, OPTIMIZER, HEAD_RATE, max_tokens)
    metrics = engine.step(batch, CASES[name].objective, 1.0)
    moments = engine.optimizer.state  # after one step the first moment is (1 - beta1) times the gradient
    gradient = {key: moments[p]["exp_avg"] / (1 - OPTIMIZER.betas[0]) for key, p in engine.trained}
    return Stepped(trained(model), gradient, metrics)


def padded(batch: Any, columns: int) -> Any:
    """The batch with more columns; every padding position holds noise, or nan where numbers are."""
    if isinstance(batch, TokenBatch):
        wide = TokenBatch(*(nn.functional.pad(value, (0, columns)) for value in vars(batch).values()))
        noise = torch.randint(6, 262, wide.tokens.shape, generator=torch.Generator().manual_seed(9))
        return replace(
            wide,
            tokens=torch.where(wide.attention_mask, wide.tokens, noise),
            rollout_logprobs=wide.rollout_logprobs.masked_fill(~wide.attention_mask, float("nan")),
        )
    changed = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, TokenBatch):
            changed[item.name] = padded(value, columns)
        elif value.ndim == 2:
            real = nn.functional.pad(batch.batch.attention_mask, (0, columns))
            changed[item.name] = nn.functional.pad(value, (0, columns)).masked_fill(~real, float("nan"))
    return replace(batch, **changed)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_cutting_padding_and_order_change_nothing(tiny_folder: Path, name: str, lora: bool) -> None:
    batch = CASES[name].batch()
    before = trained(build_model(tiny_folder, CASES[name].kind, lora))
    whole = step(tiny_folder, name, lora, batch, WHOLE)
    assert largest_change(whole.parameters, before) > 5e-4
    variants: dict[str, tuple[Rows, int, bool]] = {
        "cut": (batch, 24, True),
        "row by row": (batch, 1, True),
        "padded": (padded(batch, 5), WHOLE, True),
        "padded and cut": (padded(batch, 5), 24, False),
        "not flat": (batch, WHOLE, False),
        "reordered": (batch.select([3, 0, 4, 2, 1]), WHOLE, True),
        "reordered and cut": (batch.select([3, 0, 4, 2, 1]), 24, True),
    }
    assert 1 < len(rank_passes(batch, 24, flat=True)[0]) < len(batch)
    for variant, (changed, max_tokens, flat) in variants.items():
        found = step(tiny_folder, name, lora, changed, max_tokens, flat)
        # The gradient, not the parameters: Adam's first step divides it by its own size, so that where it is almost 0
        # rounding alone may move a parameter by a whole learning rate.
        for key, gradient in whole.gradient.items():
            error = (found.gradient[key] - gradient).norm()
            assert error <= ROUNDING * gradient.norm(), (variant, key)
        assert found.metrics.keys() == whole.metrics.keys()
        for key in whole.metrics:
            assert found.metrics.sums[key][1] == whole.metrics.sums[key][1], (variant, key)
            assert found.metrics[key] == pytest.approx(whole.metrics[key], rel=2e-6, abs=2e-6), (variant, key)


def test_sft_loss_is_that_of_transformers(tiny_folder: Path) -> None:
    batch = token_batch()
    model = build_model(tiny_folder, "causal", lora=False)
    labels = batch.tokens.masked_fill(~batch.response_mask, -100)
    expected = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), labels=labels).loss
    metrics = TorchEngine(model, OPTIMIZER, None, 24).step(batch, Sft(), 1.0)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)


def at_ratio_one(model: nn.Module, temperature: float) -> Experience:
    """Experience whose old log-probabilities are the model's own."""
    batch = experience()
    with torch.no_grad():
        old = token_scores(model.eval(), batch.batch, temperature)[:, 0]
    return replace(batch, old_logprobs=old, batch=replace(batch.batch, rollout_logprobs=old))


def test_first_ppo_step_follows_advantage_times_logprob(tiny_folder: Path) -> None:
    model = build_model(tiny_folder, "causal", lora=False)
    batch = at_ratio_one(model, 0.9)
    tokens, mask = batch.batch.tokens, batch.batch.response_mask
    logits = model(input_ids=tokens, attention_mask=batch.batch.attention_mask.long()).logits
    logprobs = (logits[:, :-1] / 0.9).log_softmax(dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    loss = -(batch.advantages[:, 1:] * logprobs)[mask[:, 1:]].mean()
    named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named])
    before = trained(model)

    settings = Optimizer(learning_rate=1e-3, max_grad_norm=1e6)
    metrics = TorchEngine(model, settings, None, 24).step(batch, CASES["policy"].objective, 1.0)

    assert metrics["grad_norm"] == pytest.approx(nn.utils.get_total_norm(gradients).item(), rel=1e-5)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert metrics["importance_weight"] == 1
    assert metrics["policy_loss"] == pytest.approx(-batch.advantages[mask].mean().item(), rel=1e-5)
    for (key, parameter), gradient in zip(named, gradients, strict=True):
        large = gradient.abs() > 1e-5
        assert large.any()
        # Adam's first step is the learning rate against the gradient's sign.
        moved = (parameter.detach() - before[key])[large]
        torch.testing.assert_close(moved, -1e-3 * gradient[large].sign(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["policy", "policy_sequence_k3", "policy_constant_k2", "value"])
def test_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted(tiny_folder: Path, name: str) -> None:
    objective, batch = CASES[name].objective, CASES[name].batch()
    bad = poisoned(batch)
    model = build_model(tiny_folder, CASES[name].kind, lora=False, flat=True)
    engine = TorchEngine(model, OPTIMIZER, HEAD_RATE, 24)
    before = trained(model)
    metrics = engine.step(bad, objective, 1.0)
    assert largest_change(trained(model), before) == 0
    assert (metrics["skipped_steps"], metrics["grad_norm"]) == (1, 0)

    merged = metrics.merge(engine.step(batch, objective, 1.0))
    assert merged["skipped_steps"] == 0.5
    assert largest_change(trained(model), step(tiny_folder, name, False, batch, 24).parameters) == 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_head_learns_at_its_own_rate(tiny_folder: Path, lora: bool) -> None:
    moved: dict[float | None, dict[str, float]] = {}
    for head_rate in (None, 7e-3):
        model = build_model(tiny_folder, "scalar", lora)
        before = trained(model)
        engine = TorchEngine(model, Optimizer(learning_rate=1e-3), head_rate, WHOLE)
        engine.step(CASES["reward"].batch(), CASES["reward"].objective, 0.5)
        moved[head_rate] = {key: float((p - before[key]).abs().max()) for key, p in trained(model).items()}
    for head_rate, expected in ((None, 5e-4), (7e-3, 3.5e-3)):
        heads = [change for key, change in moved[head_rate].items() if key.endswith("score.weight")]
        body = [change for key, change in moved[head_rate].items() if not key.endswith("score.weight")]
        assert heads == pytest.approx([expected], rel=1e-3)
        assert max(body) == pytest.approx(5e-4, rel=1e-2)


def test_rate_of_zero_changes_nothing(tiny_folder: Path) -> None:
    model = build_model(tiny_folder, "causal", lora=False)
    engine = TorchEngine(model, OPTIMIZER, None, WHOLE)
    before = trained(model)
    metrics = engine.step(token_batch(), Sft(), 0.0)
    assert largest_change(trained(model), before) == 0
    assert metrics["skipped_steps"] == 0
    assert metrics["grad_norm"] > 0


@dataclass(frozen=True)
class Slope:
    """Loss of `slope` times the weights, once per row: the gradient of its mean is `slope`."""

    slope: float

    def count(self, batch: TokenBatch) -> float:
        return float(len(batch))

    def loss(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        weights = torch.cat([p.float().flatten() for p in model.parameters()])
        loss = len(batch) * self.slope * weights.sum()
        return loss, Metrics.of(len(batch), loss=loss.detach())


def weight(start: float, dtype: torch.dtype) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, start)
    return model


def test_bfloat16_keeps_updates_smaller_than_its_own_precision() -> None:
    model, plain = weight(1.0, torch.bfloat16), weight(1.0, torch.bfloat16)
    engine = TorchEngine(model, Optimizer(learning_rate=1e-4), None, 24)
    naive = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0)
    for _ in range(100):
        engine.step(token_batch(), Slope(1.0), 1.0)
        plain.weight.grad = torch.ones_like(plain.weight)
        naive.step()
    assert plain.weight.item() == 1.0
    assert engine.masters[0].item() == pytest.approx(0.99, abs=1e-5)
    assert model.weight.item() == 0.98828125
    assert model.weight.dtype == torch.bfloat16


def test_gradient_is_clipped_by_its_norm_and_reported_before() -> None:
    """Slopes 10 and 1 clipped to 1 are equal for Adam: two full steps. Unclipped, the second would be 0.74 of one."""
    model = weight(1.0, torch.float32)
    engine = TorchEngine(model, Optimizer(learning_rate=0.01, max_grad_norm=1.0), None, 24)
    norms = [engine.step(token_batch(), Slope(slope), 1.0)["grad_norm"] for slope in (10.0, 1.0)]
    assert norms == pytest.approx([10.0, 1.0])
    assert model.weight.item() == pytest.approx(0.98, abs=1e-6)


def test_weight_decay_and_betas_are_the_recipes() -> None:
    """AdamW by hand: decay 0.1 at rate 0.5 leaves 0.95 of 1; with betas of 0 every step is 0.5 against the sign."""
    model = weight(1.0, torch.float32)
    settings = Optimizer(learning_rate=0.5, weight_decay=0.1, betas=(0.0, 0.0), max_grad_norm=100)
    engine = TorchEngine(model, settings, None, 24)
    engine.step(token_batch(), Slope(3.0), 1.0)
    assert model.weight.item() == pytest.approx(0.45)
    engine.step(token_batch(), Slope(-0.2), 1.0)
    assert model.weight.item() == pytest.approx(0.45 * 0.95 + 0.5)


@dataclass(frozen=True)
class Named:
    """The sum of some parameters alone."""

    names: tuple[str, ...]

    def count(self, batch: TokenBatch) -> float:
        return float(len(batch))

    def loss(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        loss = len(batch) * sum(model.get_parameter(name).float().sum() for name in self.names)
        return loss, Metrics.of(len(batch), loss=loss.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_parameter_without_a_gradient_stays_though_it_had_one(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"a": weight(1.0, dtype), "b": weight(1.0, dtype)})
    engine = TorchEngine(model, Optimizer(learning_rate=0.1), None, 24)
    engine.step(token_batch(), Named(("a.weight", "b.weight")), 1.0)
    engine.step(token_batch(), Named(("b.weight",)), 1.0)
    assert [model[name].weight.item() for name in "ab"] == pytest.approx([0.9, 0.8], abs=1e-2)


def test_float32_weights_are_stepped_themselves() -> None:
    model = weight(1.0, torch.float32)
    assert TorchEngine(model, OPTIMIZER, None, 24).masters[0] is model.weight


def test_a_gradient_leaves_its_parameter_and_its_memory_serves_the_next_step() -> None:
    model = weight(1.0, torch.bfloat16)
    engine = TorchEngine(model, OPTIMIZER, None, 24)
    places = set()
    for _ in range(3):
        engine.step(token_batch(), Slope(1.0), 1.0)
        assert model.weight.grad is None
        assert engine.masters[0].grad is None
        places |= {grad.data_ptr() for grad in engine.idle.values()}
    assert len(places) == 1


def test_a_closed_engine_leaves_gradients_to_the_module() -> None:
    model = weight(1.0, torch.bfloat16)
    TorchEngine(model, OPTIMIZER, None, 24).close()
    model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad is not None
