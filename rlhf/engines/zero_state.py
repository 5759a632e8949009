"""What ZeRO goes on from, in the same whole tensors as `rlhf.engines.adam_state`, whatever the ranks and the stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from rlhf.engines.adam_state import KEYS, MOMENTS
from rlhf.engines.ranks import position

Named = Sequence[tuple[str, nn.Parameter]]
Gathered = Callable[..., AbstractContextManager[None]]


def zero_state(zero: Any, named: Named) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter and its moments, whole; every rank iterates to the end. `zero` is DeepSpeed's optimizer."""
    moments = zero.optimizer.state
    step = next((moments[flat]["step"] for flat in _flats(zero) if flat in moments), None)
    if step is not None:
        _link(zero)
    for name, parameter in named:
        yield f"parameter/{name}", safe_get_full_fp32_param(parameter)
        if step is None:
            continue
        for key in MOMENTS:
            yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)
        yield f"step/{name}", step


@torch.no_grad()
def restore_zero(zero: Any, named: Named, state: Mapping[str, Tensor], gathered: Gathered) -> None:
    """Put back what `zero_state`, or `adam_state`, gave; every rank calls this with the whole state."""
    adam = zero.optimizer
    adam.state.clear()
    step = next((state[f"step/{name}"] for name, _ in named if f"step/{name}" in state), None)
    if step is not None:
        for flat in _flats(zero):
            adam.state[flat] = {
                "step": step.clone().to(flat.device),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        _link(zero)
    for name, parameter in named:
        whole = {key: state[f"{key}/{name}"] for key in ("parameter", *KEYS) if f"{key}/{name}" in state}
        restore_parameter(parameter, whole, gathered)


def _link(zero: Any) -> None:
    """Let the parameters find their moments: stages 1 and 2 do so once, after the first group of parameters alone."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def restore_parameter(parameter: nn.Parameter, whole: Mapping[str, Tensor], gathered: Gathered) -> None:
    """Put back a parameter and what there is of its moments, by `parameter` and `KEYS`; every rank calls this."""
    with gathered([parameter], writable=True):
        parameter.data.copy_(whole["parameter"])
    cut = hasattr(parameter, "ds_tensor")
    for key, value in whole.items():
        if key == "step":
            continue
        value = _share(parameter, value) if cut else value.to(parameter.device)
        if key == "parameter":
            (safe_set_local_fp32_param if cut else safe_set_full_fp32_param)(parameter, value)
        else:
            (safe_set_local_optimizer_state if cut else safe_set_full_optimizer_state)(parameter, value, key)


def _share(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor as stage 3 cuts it: equal parts, the last one filled with zeros."""
    rank, ranks = position()
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * ranks, dtype=value.dtype)
    padded[: value.numel()] = value.flatten()
    return padded[rank * size : (rank + 1) * size]


def _flats(zero: Any) -> list[Tensor]:
    """Return this rank's flat float32 parts, by which the optimizer inside keeps its state."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)
