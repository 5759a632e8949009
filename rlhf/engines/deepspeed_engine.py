"""Models on many ranks with DeepSpeed ZeRO 0-3 (Rajbhandari et al. 2020): the same results as on one rank."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.engines.adam_state import adam_state, restore_adam
from rlhf.engines.base import B, Objective, T
from rlhf.engines.microbatch import rank_passes
from rlhf.engines.parameter_groups import build_adamw, scale_learning_rates
from rlhf.engines.ranks import position
from rlhf.engines.shares import filled
from rlhf.engines.torch_engine import step_metrics
from rlhf.engines.zero_config import Dtype, check_settings, zero_config
from rlhf.models.flat_attention import runs_flat
from rlhf.models.tuning import trainable_parameters
from rlhf.recipe.base import Optimizer
from rlhf.recipe.role_schema import Offload, ZeroStage
from rlhf.types import Metrics, Rows


class DeepSpeedEngine:
    """Owns the gradients and the AdamW state of a module's trainable parameters, cut over all ranks.

    Every rank makes the same calls with the same whole batch; each works on its share, and the step equals that of
    `TorchEngine` on the whole batch. Low-precision parameters keep float32 masters. All ranks start from rank 0's
    weights. At stage 3 the weights are cut too, one parameter after the other, so the module may start in main memory;
    that also serves a frozen module (`optimizer` None). The ranks must have joined (`rlhf.engines.ranks`). Raises
    RecipeError for settings that DeepSpeed lacks, such as bfloat16 at stage 0, which has no masters there.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        head_learning_rate: float | None,
        max_tokens: int,
        zero_stage: ZeroStage,
        dtype: Dtype,
        offload: Offload = "none",
    ) -> None:
        check_settings(zero_stage, dtype, offload)
        self.module = module
        self.max_grad_norm = optimizer.max_grad_norm if optimizer else 0.0
        self.max_tokens = max_tokens
        self.zero_stage = zero_stage
        self.rank, self.ranks = position()
        self.deepspeed = _deepspeed()
        self.trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        size = sum(parameter.numel() for _, parameter in self.trained)
        config = zero_config(zero_stage, dtype, offload, self.max_grad_norm, size)
        self.whole = _Whole(module)
        with contextlib.redirect_stdout(io.StringIO()):
            if zero_stage == 3:
                self._cut(config)
            self.optimizer = build_adamw(self.trained, optimizer, head_learning_rate) if optimizer else None
            self.engine, *_ = self.deepspeed.initialize(
                model=self.whole, optimizer=self.optimizer, config=config, dist_init_required=False
            )

    def step(self, batch: B, objective: Objective[B], lr_scale: float) -> Metrics:
        """Make one optimizer step on the mean loss over `batch`; a non-finite gradient skips it and is counted.

        Every rank passes the same batch and gets the same metrics, over the whole batch.
        """
        assert self.optimizer is not None
        metrics = self._accumulate(batch, objective)
        scale_learning_rates(self.optimizer, lr_scale)
        norm = self._step_plain() if self.zero_stage == 0 else self._step_partitioned()
        return _over_ranks(metrics, batch).merge(step_metrics(norm))

    def run(self, function: Callable[[nn.Module, B], T], batch: B) -> T:
        """Return `function(module, batch)`; at stage 3 every rank calls this equally often."""
        return self.whole.run(function, batch)

    def gathered(self, parameters: Sequence[Tensor], writable: bool = False) -> AbstractContextManager[None]:
        """Return a context in which the parameters are whole on every rank; all ranks enter and leave together.

        Below stage 3 they always are, and this does nothing. At stage 3 changes are lost unless `writable`, which
        keeps those of rank 0 on all ranks.
        """
        if self.zero_stage < 3:
            return nullcontext()
        self._release()
        gather = self.deepspeed.zero.GatheredParameters
        return gather(list(parameters), modifier_rank=0 if writable else None)

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a trained parameter and its master, wherever its parts are."""
        if self.zero_stage == 0:
            parameter.copy_(value)
            return
        from rlhf.engines.zero_state import restore_parameter

        restore_parameter(parameter, {"parameter": value.float()}, self.gathered)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what training goes on from; all ranks iterate."""
        if self.zero_stage == 0:
            return adam_state(self.engine.optimizer, self.trained)
        from rlhf.engines.zero_state import zero_state

        return zero_state(self.engine.optimizer, self.trained)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; all ranks call this."""
        if self.zero_stage == 0:
            restore_adam(self.engine.optimizer, self.trained, state)
            return
        from rlhf.engines.zero_state import restore_zero

        restore_zero(self.engine.optimizer, self.trained, state, self.gathered)

    def holdings(self) -> list[object]:
        """Return DeepSpeed's engine, whose buffers and partitions of gradients and optimizer hang on it."""
        self._release()
        return [self.engine, self.engine.optimizer, self.optimizer]

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module, which is of no use after stage 3."""
        self.engine.destroy()

    def _cut(self, config: dict[str, Any]) -> None:
        """Cut the parameters over the ranks, each as it comes to the device; buffers come whole."""
        device = self.deepspeed.get_accelerator().current_device_name()
        self.deepspeed.zero.Init(module=self.whole, config_dict_or_path=config)
        for buffer in self.whole.buffers():
            buffer.data = buffer.data.to(device)

    def _release(self) -> None:
        """Drop the whole parameters that stage 3 keeps for the next pass, up to a billion elements of them."""
        if self.zero_stage == 3:
            self.engine.optimizer.empty_partition_cache()

    def _accumulate(self, batch: B, objective: Objective[B]) -> Metrics:
        total = objective.count(batch)
        passes = rank_passes(batch, self.max_tokens, runs_flat(self.module), self.ranks)[self.rank]
        metrics = Metrics()
        self.engine.train()
        for index, (rows, part) in enumerate(filled(batch, passes)):
            self.engine.set_gradient_accumulation_boundary(index == len(passes) - 1)
            loss = self.engine(objective.loss, part)
            # ZeRO reduces in every pass, so a rank without rows joins in with a gradient of nothing.
            self.engine.backward(loss * (self.ranks if rows else 0.0) / total)
            _, measured = self.whole.result
            metrics = metrics.merge(measured if rows else Metrics(dict.fromkeys(measured, (0.0, 0.0))))
        self.whole.result = None
        return metrics

    def _step_plain(self) -> float:
        """Clip and step at stage 0, where DeepSpeed neither reports the norm nor looks for NaN."""
        norm = float(nn.utils.clip_grad_norm_(trainable_parameters(self.module), self.max_grad_norm))
        if math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return norm

    def _step_partitioned(self) -> float:
        self.engine.step()
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())


class _Whole(nn.Module):
    """Makes any use of the module one forward pass of DeepSpeed's, whichever parts of the module it calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.result: Any = None

    def forward(self, function: Callable[[nn.Module, B], Any], batch: B) -> Tensor | None:
        """Keep `function(module, batch)` as `result`; return its loss, if it begins with one, for the way backward."""
        self.result = function(self.module, batch)
        return self.result[0] if isinstance(self.result, tuple) else None

    def run(self, function: Callable[[nn.Module, B], T], batch: B) -> T:
        """Return `function(module, batch)`."""
        self(function, batch)
        result, self.result = self.result, None
        return result


def _deepspeed() -> ModuleType:
    """Import DeepSpeed for this machine's device and let it use the group that this process joined."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not on_gpu:
            # Or joining compiles a kernel for inference with the machine's C++ compiler, which takes minutes.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False)
    return deepspeed


def _over_ranks(metrics: Metrics, batch: Rows) -> Metrics:
    """Return the sums and counts of all ranks, which have the same names."""
    names = sorted(metrics)
    device = batch.lengths().device
    sums = torch.tensor([metrics.sums[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return Metrics({name: (total, count) for name, (total, count) in zip(names, sums.tolist(), strict=True)})
