"""A model's training state in safetensors files: written by its ranks side by side, read by any number of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import ResourceError, TrainingError
from rlhf.manifest import Seal, seal_file
from rlhf.pulse import PULSE

SHARD = 2 * 10**9
"""Bytes of a file, and of main memory that writing takes on each rank."""


def write_state(items: Iterable[tuple[str, Tensor]], folder: Path, role: str, rank: int, ranks: int) -> dict[str, Seal]:
    """Write this rank's share of the tensors: every `ranks`-th one; all ranks iterate over all of them.

    Returns the seals of the files it wrote, by name; each file is flushed, and hashed while the next one is gathered,
    so that nobody has to read the state again to seal it.

    Raises:
        ResourceError: the folder cannot be written to, or the disk is full.
    """
    with ThreadPoolExecutor(1) as sealer:
        share = (item for index, item in enumerate(items) if index % ranks == rank)
        files = [(file.name, sealer.submit(_sealed, file)) for file in _written(share, folder, f"{role}-{rank}")]
        return {name: sealing.result() for name, sealing in files}


def _written(share: Iterable[tuple[str, Tensor]], folder: Path, prefix: str) -> Iterator[Path]:
    """Write tensors to numbered files of about `SHARD` bytes and yield each file when it is written."""
    shard: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in share:
        if shard and size + tensor.nbytes > SHARD:
            yield _save(shard, folder / f"{prefix}-{number}.safetensors")
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        PULSE.beat()
    if shard:
        yield _save(shard, folder / f"{prefix}-{number}.safetensors")


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
        PULSE.beat()
        with safe_open(self.homes[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.homes)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.homes)


def _save(tensors: dict[str, Tensor], file: Path) -> Path:
    try:
        with PULSE.within_library(f"writing {file.name}"):
            save_file(tensors, file)
    except (SafetensorError, OSError) as error:
        raise _refused(file, error) from error
    return file


def _sealed(file: Path) -> Seal:
    try:
        return seal_file(file)
    except OSError as error:
        raise _refused(file, error) from error
    finally:
        PULSE.beat()


def _refused(file: Path, error: Exception) -> ResourceError:
    return ResourceError(f"{file}: cannot be written, is the disk full? {error}")
