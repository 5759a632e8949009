"""Moving tensors out of accelerator memory and back in place, whoever holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn


class Parked:
    """The memory of all tensors of a device that `roots` lead to, kept in main memory until `reload`.

    Storages are emptied and filled again, so every view, alias and optimizer state stays the object it was, with the
    same bits. On an accelerator the copies are page-locked.
    """

    def __init__(self, roots: Iterable[object], device: torch.device) -> None:
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors_of(roots, device)}
        self.kept: list[tuple[UntypedStorage, Tensor]] = []
        for storage in storages.values():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=device.type == "cuda")
            host.copy_(_bytes(storage))
            storage.resize_(0)
            self.kept.append((storage, host))
        if device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def bytes(self) -> int:
        """What it keeps."""
        return sum(host.nbytes for _, host in self.kept)

    def reload(self) -> None:
        """Move everything back."""
        for storage, host in self.kept:
            storage.resize_(host.nbytes)
            _bytes(storage).copy_(host)
        self.kept = []


def tensors_of(roots: Iterable[object], device: torch.device) -> Iterator[Tensor]:
    """Yield the tensors on a device, with their gradients, in modules, optimizers, containers and DeepSpeed objects."""
    seen: dict[int, object] = {}  # the objects too, so that no id comes twice
    ahead: list[Any] = list(roots)
    while ahead:
        item = ahead.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            if item.device.type == device.type and item.untyped_storage().nbytes():
                yield item
            ahead += [item.grad if item.is_leaf else None, *getattr(item, "__dict__", {}).values()]
        elif isinstance(item, Mapping):
            ahead += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            ahead += item
        elif isinstance(item, nn.Module | torch.optim.Optimizer) or type(item).__module__.startswith("deepspeed."):
            ahead += vars(item).values() if hasattr(item, "__dict__") else ()


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
