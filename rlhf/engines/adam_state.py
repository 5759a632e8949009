"""What AdamW goes on from, as named tensors: each parameter in float32, its two moments and its number of steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = (*MOMENTS, "step")


def adam_state(optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield `parameter/<name>` of each trained parameter and, once it has made a step, `exp_avg/<name>` and so on."""
    for name, parameter in named:
        yield f"parameter/{name}", parameter.detach()
        for key in KEYS:
            if parameter in optimizer.state:
                yield f"{key}/{name}", optimizer.state[parameter][key]


@torch.no_grad()
def restore_adam(
    optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, Tensor]], state: Mapping[str, Tensor]
) -> None:
    """Put back what `adam_state` gave. KeyError for a parameter that the state has not."""
    optimizer.state.clear()
    for name, parameter in named:
        parameter.copy_(state[f"parameter/{name}"])
        if f"step/{name}" in state:
            moments = {key: state[f"{key}/{name}"].to(parameter.device, copy=True) for key in KEYS}
            optimizer.state[parameter] = moments
