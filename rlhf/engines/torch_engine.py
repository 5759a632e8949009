"""Training on one rank with plain torch: exact accumulation, float32 master weights, NaN guard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from rlhf.engines.adam_state import adam_state, restore_adam
from rlhf.engines.base import B, Objective, T
from rlhf.engines.microbatch import micro_batches
from rlhf.engines.parameter_groups import build_adamw, scale_learning_rates
from rlhf.models.flat_attention import runs_flat
from rlhf.recipe.base import Optimizer
from rlhf.types import Metrics


class TorchEngine:
    """Owns the gradients and the AdamW state of a module's trainable parameters.

    Low-precision parameters keep a float32 master copy; gradients add up in float32 over micro-batches, so how a
    batch is cut does not change the step beyond float32 rounding. A gradient moves to its master as soon as backward
    has formed it, so that those of low precision never lie in memory all at once. `head_learning_rate` is for a fresh
    scalar head.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, head_learning_rate: float | None, max_tokens: int
    ) -> None:
        self.module = module
        self.settings = optimizer
        self.max_tokens = max_tokens
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.masters = [_master(p) for p in self.parameters]
        self.hooks = [p.register_post_accumulate_grad_hook(self._collector(p, m)) for p, m in self._copies()]
        self.idle: dict[Tensor, Tensor] = {}
        self.trained = [(name, master) for (name, _), master in zip(named, self.masters, strict=True)]
        self.optimizer = build_adamw(self.trained, optimizer, head_learning_rate)

    def step(self, batch: B, objective: Objective[B], lr_scale: float) -> Metrics:
        """Make one optimizer step on the mean loss over `batch`; a non-finite gradient skips it."""
        metrics = self._accumulate(batch, objective)
        norm = float(nn.utils.clip_grad_norm_(self.masters, self.settings.max_grad_norm))
        if math.isfinite(norm):
            self._apply(lr_scale)
        self._let_go()
        return metrics.merge(step_metrics(norm))

    def run(self, function: Callable[[nn.Module, B], T], batch: B) -> T:
        """Return `function(module, batch)`."""
        return function(self.module, batch)

    def gathered(self, parameters: Sequence[Tensor], writable: bool = False) -> AbstractContextManager[None]:
        """Do nothing: parameters are always whole here."""
        return nullcontext()

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a trained parameter and its master."""
        masters = [master for own, master in zip(self.parameters, self.masters, strict=True) if own is parameter]
        for tensor in (parameter, *masters):
            tensor.copy_(value)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what training goes on from."""
        return adam_state(self.optimizer, self.trained)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        restore_adam(self.optimizer, self.trained, state)
        self._spread()

    def holdings(self) -> list[object]:
        """Return the masters and the optimizer."""
        return [self.masters, self.optimizer]

    def close(self) -> None:
        """Leave the module as it is; its gradients are its own again."""
        for hook in self.hooks:
            hook.remove()

    def _accumulate(self, batch: B, objective: Objective[B]) -> Metrics:
        total = objective.count(batch)
        metrics = Metrics()
        self.module.train()
        for _, part in micro_batches(batch, self.max_tokens, runs_flat(self.module)):
            loss, measured = objective.loss(self.module, part)
            (loss / total).backward()
            metrics = metrics.merge(measured)
        return metrics

    def _collector(self, parameter: Tensor, master: Tensor) -> Callable[[Tensor], None]:
        """Return what adds a gradient that backward has formed to the master's."""

        def collect(_: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            if grad is None:
                return
            if master.grad is not None:
                master.grad.add_(grad)
            else:
                idle = self.idle.pop(master, None)
                master.grad = grad.float() if idle is None else idle.copy_(grad)

        return collect

    def _let_go(self) -> None:
        """End the gradients' step; on CPU their memory waits for the next one, as new pages are dear there."""
        for master in self.masters:
            if master.grad is not None and master.device.type == "cpu":
                self.idle[master] = master.grad
            master.grad = None

    def _copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the parameters that have a master beside them, with it."""
        pairs = zip(self.parameters, self.masters, strict=True)
        return ((parameter, master) for parameter, master in pairs if master is not parameter)

    @torch.no_grad()
    def _apply(self, lr_scale: float) -> None:
        scale_learning_rates(self.optimizer, lr_scale)
        self.optimizer.step()
        self._spread()

    @torch.no_grad()
    def _spread(self) -> None:
        for parameter, master in self._copies():
            parameter.copy_(master)


def _master(parameter: Tensor) -> Tensor:
    """Return what the optimizer steps: the parameter, or a float32 copy of one in low precision."""
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()


def step_metrics(norm: float) -> Metrics:
    """Return the metrics of a step by its gradient norm before clipping; a norm that is not finite means: skipped."""
    finite = math.isfinite(norm)
    return Metrics.of(1, grad_norm=norm if finite else 0.0, skipped_steps=0.0 if finite else 1.0)
