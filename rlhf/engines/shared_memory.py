"""Weights from one process to another through shared memory: in buckets, under a running checksum.

A bucket is a nameless file of raw tensors in memory (`memfd_create`) and an announcement of plain values (`Bucket`)
that any RPC can carry. The receiver maps the file through the sender's entry in /proc, compares the checksum over all
bytes so far with the announced one, and only then uses the tensors. The file is closed as soon as the receiver has
answered; it ends with the sender's process too, even when that is killed, so nothing is ever left behind. Tensors that
the receiver still holds stay valid, because a mapping outlives the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from rlhf.errors import RecipeError, ResourceError, TrainingError

ALIGNMENT = 64
BUCKET_BYTES = 128 * 2**20

Weights = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Bucket:
    """Announces one file: the tensors in it, in order, and the checksum of all tensors sent up to its end."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    path: str
    checksum: str


class Checksum:
    """Running xxh3 over named tensors; names, dtypes, shapes, bytes and order all count."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor."""
        self._hash.update(_header(name, _dtype_name(tensor.dtype), list(tensor.shape)))
        self._hash.update(_raw(tensor))

    def hexdigest(self) -> str:
        """Return 16 hexadecimal digits for everything taken in so far."""
        return str(self._hash.hexdigest())


def send(weights: Weights, update_weights: Callable[[dict[str, Any]], None], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Write the weights into shared memory, bucket by bucket, and announce each to `update_weights`.

    At most one bucket (or one tensor, if that is larger) is in shared memory at a time. Each tensor is copied before
    the next is asked for, so the iterator may reuse its memory.

    Raises:
        ResourceError: memory has no room for a bucket.
    """
    checksum = Checksum()
    pairs = iter(weights)
    pair = next(pairs, None)
    while pair is not None:
        with os.fdopen(os.memfd_create("rlhf-weights"), "wb") as file:
            names: list[str] = []
            dtype_names: list[str] = []
            shapes: list[list[int]] = []
            while pair is not None and (not names or file.tell() + pair[1].nbytes <= bucket_bytes):
                name, tensor = pair
                _append(file, tensor)
                checksum.add(name, tensor)
                names.append(name)
                dtype_names.append(_dtype_name(tensor.dtype))
                shapes.append(list(tensor.shape))
                pair = next(pairs, None)
            file.flush()
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            update_weights(asdict(Bucket(names, dtype_names, shapes, path, checksum.hexdigest())))


def receive(bucket: Bucket, checksum: Checksum) -> list[tuple[str, Tensor]]:
    """Map a bucket and return its tensors (no copy), after taking them into `checksum` and comparing.

    Raises:
        TrainingError: the file is not there, or is not what was announced.
    """
    path = Path(bucket.path)
    if not path.is_file():
        raise TrainingError(
            f"weights were announced in {path}, which does not exist here: policy and rollout engine must run on "
            "the same machine to share memory (on several machines, give both roles GPUs)"
        )
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    weights: list[tuple[str, Tensor]] = []
    offset = 0
    for name, dtype_name, shape in zip(bucket.names, bucket.dtype_names, bucket.shapes, strict=True):
        offset += -offset % ALIGNMENT
        end = offset + tensor_bytes(dtype_name, shape)
        if end > len(data):
            raise TrainingError(f"weights in {path} end after {len(data)} bytes, before the end of {name} at {end}")
        tensor = data[offset:end].view(getattr(torch, dtype_name)).view(shape)
        checksum.add(name, tensor)
        weights.append((name, tensor))
        offset = end
    if checksum.hexdigest() != bucket.checksum:
        raise TrainingError(
            f"weights {bucket.names[0]} to {bucket.names[-1]} arrived with checksum {checksum.hexdigest()}, "
            f"but {bucket.checksum} was sent: they are refused"
        )
    return weights


def tensor_bytes(dtype_name: str, shape: Sequence[int]) -> int:
    """Return the size of a tensor from its announcement: `tensor_bytes("bfloat16", [2, 3])` is 12."""
    return torch.Size(shape).numel() * getattr(torch, dtype_name).itemsize


def folder_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a Hugging Face folder, one at a time, from its safetensors files.

    Raises:
        RecipeError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RecipeError(f"{folder} holds no *.safetensors file: give a Hugging Face folder saved with safetensors")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def _append(file: IO[bytes], tensor: Tensor) -> None:
    try:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        file.write(_raw(tensor))
    except OSError as error:
        raise ResourceError(
            f"no room for {tensor.nbytes} bytes of weights in shared memory: {error.strerror}"
        ) from error


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(name: str, dtype_name: str, shape: list[int]) -> bytes:
    return f"{name} {dtype_name} {shape}\n".encode()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
