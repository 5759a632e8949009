"""Training on many ranks with DeepSpeed ZeRO 0-3 (Rajbhandari et al. 2020): the same step as on one rank."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.engines.base import B, Objective
from rlhf.engines.parameter_groups import build_adamw, scale_learning_rates
from rlhf.engines.shares import rank_shares
from rlhf.engines.torch_engine import step_metrics
from rlhf.errors import RecipeError
from rlhf.models.lora import trainable_parameters
from rlhf.recipe.base import Optimizer
from rlhf.types import Metrics, Rows

Dtype = Literal["bfloat16", "float32"]

LARGEST_BUCKET = 500_000_000
"""Gradient elements that are reduced at once; smaller models get a buffer of their own size."""

WHOLE_BELOW = 100_000
"""ZeRO-3 keeps parameters with fewer elements whole on every rank."""


class DeepSpeedEngine:
    """Owns the gradients and the AdamW state of a module's trainable parameters, cut over all ranks.

    Every rank makes the same calls with the same whole batch; each works on its share, and the step equals that of
    `TorchEngine` on the whole batch. Low-precision parameters keep float32 masters. All ranks start from rank 0's
    weights. Raises RecipeError for bfloat16 at stage 0, which has no masters there.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        head_learning_rate: float | None,
        max_tokens: int,
        zero_stage: Literal[0, 1, 2, 3],
        dtype: Dtype,
    ) -> None:
        if zero_stage == 0 and dtype == "bfloat16":
            raise RecipeError("ZeRO stage 0 cannot train bfloat16 weights; use stage 1, 2 or 3, or dtype: float32")
        self.module = module
        self.settings = optimizer
        self.max_tokens = max_tokens
        self.zero_stage = zero_stage
        self.deepspeed = _joined_deepspeed()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.optimizer = build_adamw(named, optimizer, head_learning_rate)
        size = sum(parameter.numel() for _, parameter in named)
        self.whole = _Whole(module)
        self.engine, *_ = self.deepspeed.initialize(
            model=self.whole,
            optimizer=self.optimizer,
            config=_config(zero_stage, dtype, optimizer.max_grad_norm, size),
            dist_init_required=False,
        )

    def step(self, batch: B, objective: Objective[B], lr_scale: float) -> Metrics:
        """Make one optimizer step on the mean loss over `batch`; a non-finite gradient skips it and is counted.

        Every rank passes the same batch and gets the same metrics, over the whole batch.
        """
        metrics = self._accumulate(batch, objective)
        scale_learning_rates(self.optimizer, lr_scale)
        norm = self._step_plain() if self.zero_stage == 0 else self._step_partitioned()
        return _over_ranks(metrics, batch).merge(step_metrics(norm))

    @contextmanager
    def gathered(self, writable: bool = False) -> Iterator[None]:
        """Return a context in which every parameter is whole on every rank; all ranks enter and leave together.

        Below stage 3 they always are, and this does nothing. At stage 3 changes are lost unless `writable`, which
        keeps those of rank 0 on all ranks.
        """
        gather = self.deepspeed.zero.GatheredParameters
        parameters = list(self.module.parameters())
        with gather(parameters, modifier_rank=0 if writable else None, enabled=self.zero_stage == 3):
            yield

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module, which is of no use after stage 3."""
        self.engine.destroy()

    def _accumulate(self, batch: B, objective: Objective[B]) -> Metrics:
        total = objective.count(batch)
        passes = rank_shares(batch.lengths(), self.ranks, self.max_tokens)[self.rank]
        shortest = int(batch.lengths().argmin())
        metrics = Metrics()
        self.engine.train()
        for index, rows in enumerate(passes):
            self.engine.set_gradient_accumulation_boundary(index == len(passes) - 1)
            loss = self.engine(objective, batch.select(rows or [shortest]).trim())
            # ZeRO reduces in every pass, so a rank without rows joins in with a gradient of nothing.
            self.engine.backward(loss * (self.ranks if rows else 0.0) / total)
            measured = self.whole.metrics
            metrics = metrics.merge(measured if rows else Metrics(dict.fromkeys(measured, (0.0, 0.0))))
        return metrics

    def _step_plain(self) -> float:
        """Clip and step at stage 0, where DeepSpeed neither reports the norm nor looks for NaN."""
        norm = float(nn.utils.clip_grad_norm_(trainable_parameters(self.module), self.settings.max_grad_norm))
        if math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return norm

    def _step_partitioned(self) -> float:
        self.engine.step()
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())


class _Whole(nn.Module):
    """Makes an objective's loss one forward pass of DeepSpeed's, whichever parts of the module it calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.metrics = Metrics()

    def forward(self, objective: Objective[B], batch: B) -> Tensor:
        """Return the sum of the loss over the batch and keep the metrics."""
        loss, self.metrics = objective.loss(self.module, batch)
        return loss


def _joined_deepspeed() -> ModuleType:
    """Import DeepSpeed for this machine's device and join the ranks that the environment (RANK, ...) describes."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not on_gpu:
        # Or joining compiles a kernel for inference with the machine's C++ compiler, which takes a minute or two.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False)
    return deepspeed


def _config(zero_stage: int, dtype: Dtype, max_grad_norm: float, size: int) -> dict[str, Any]:
    """Return DeepSpeed's settings; the engine itself counts passes, clips at stage 0 and scales the rates."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm if zero_stage else 0.0,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": min(size, LARGEST_BUCKET),
            "stage3_param_persistence_threshold": WHOLE_BELOW,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _over_ranks(metrics: Metrics, batch: Rows) -> Metrics:
    """Return the sums and counts of all ranks, which have the same names."""
    names = sorted(metrics)
    device = batch.lengths().device
    sums = torch.tensor([metrics.sums[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return Metrics({name: (total, count) for name, (total, count) in zip(names, sums.tolist(), strict=True)})
