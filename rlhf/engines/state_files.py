"""A model's training state in safetensors files: written by its ranks side by side, read by any number of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import ResourceError, TrainingError

SHARD = 2 * 10**9
"""Bytes of a file, and of main memory that writing takes on each rank."""


def write_state(items: Iterable[tuple[str, Tensor]], folder: Path, role: str, rank: int, ranks: int) -> None:
    """Write this rank's share of the tensors: every `ranks`-th one; all ranks iterate over all of them.

    Raises:
        ResourceError: the folder cannot be written to, or the disk is full.
    """
    shard: dict[str, Tensor] = {}
    size = number = 0
    for index, (name, tensor) in enumerate(items):
        if index % ranks != rank:
            continue
        if shard and size + tensor.nbytes > SHARD:
            _save(shard, folder / f"{role}-{rank}-{number}.safetensors")
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    if shard:
        _save(shard, folder / f"{role}-{rank}-{number}.safetensors")


class StateFiles(Mapping[str, Tensor]):
    """The tensors of a role, read when they are asked for."""

    def __init__(self, folder: Path, role: str) -> None:
        self.homes: dict[str, Path] = {}
        for file in sorted(folder.glob(f"{role}-*-*.safetensors")):
            try:
                with safe_open(file, framework="pt") as tensors:
                    self.homes |= dict.fromkeys(tensors.keys(), file)
            except SafetensorError as error:
                raise TrainingError(f"{file}: not in safetensors format: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor."""
        with safe_open(self.homes[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.homes)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.homes)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file)
    except (SafetensorError, OSError) as error:
        raise ResourceError(f"{file}: cannot be written, is the disk full? {error}") from error
