"""Weights from one process to another through shared memory: in buckets, under a running checksum.

A bucket is a stretch of raw tensors in a nameless file in memory (`memfd_create`) and an announcement of plain values
(`Bucket`) that any RPC can carry. The receiver maps the file through the sender's entry in /proc, compares the
checksum over all bytes so far with the announced one, and only then uses the tensors.

The sender has two such files and keeps them: fresh memory costs several times what the copy costs. It fills one while
the receivers read the other, and fills a file again only when they have answered; from then on the tensors they got
from it are void. The files end with the sender's process, even when that is killed, so nothing is ever left behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from rlhf.errors import RecipeError, ResourceError, TrainingError
from rlhf.pulse import PULSE

ALIGNMENT = 64
BUCKET_BYTES = 64 * 2**20
CHUNK_BYTES = 2**20
"""Copied, then taken into the checksum while still in the processor's cache."""

Weights = Iterable[tuple[str, Tensor]]
Answer = Callable[[], object]
"""Waits until the receivers are done with a bucket."""

Announce = Callable[[dict[str, Any], bool], Answer | None]
"""Announces a bucket, and whether it is the last; None says that the receivers are done with it already."""


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
        self.begin(name, _dtype_name(tensor.dtype), list(tensor.shape))
        self.take(_raw(tensor).numpy().data)

    def begin(self, name: str, dtype_name: str, shape: list[int]) -> None:
        """Begin a tensor, whose bytes follow."""
        self._hash.update(f"{name} {dtype_name} {shape}\n".encode())

    def take(self, content: memoryview) -> None:
        """Take in some of the tensor's bytes."""
        self._hash.update(content)

    def hexdigest(self) -> str:
        """Return 16 hexadecimal digits for everything taken in so far."""
        return str(self._hash.hexdigest())


class Buffer:
    """A nameless file in memory, mapped here, that is filled again and again and only ever grows."""

    def __init__(self) -> None:
        self.file = os.memfd_create("rlhf-weights")
        self.path = f"/proc/{os.getpid()}/fd/{self.file}"
        self.used = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._memory = memoryview(b"")

    def append(self, tensor: Tensor, checksum: Checksum, room: int) -> None:
        """Copy one tensor behind the others and take it into the checksum; a file that grows gets up to `room`.

        Raises:
            ResourceError: memory has no room.
        """
        PULSE.beat()
        start = self.used + -self.used % ALIGNMENT
        self.used = start + tensor.nbytes
        if self.used > len(self._bytes):
            self._grow(max(self.used, min(2 * len(self._bytes), room)), tensor.nbytes)
        place = self._bytes[start : self.used]
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            checksum.take(self._memory[start : self.used])
            return
        raw = _raw(tensor)
        for offset in range(0, tensor.nbytes, CHUNK_BYTES):
            end = min(offset + CHUNK_BYTES, tensor.nbytes)
            place[offset:end].copy_(raw[offset:end])
            checksum.take(self._memory[start + offset : start + end])

    def fill(self, content: np.ndarray) -> None:
        """Make the bytes `[size]` of another machine's buffer the content of this one."""
        if len(content) > len(self._bytes):
            self._grow(len(content), len(content))
        np.copyto(self._bytes.numpy()[: len(content)], content)

    def close(self) -> None:
        """Give the memory back."""
        os.close(self.file)
        self._bytes, self._memory = torch.empty(0, dtype=torch.uint8), memoryview(b"")

    def _grow(self, size: int, wanted: int) -> None:
        try:
            os.posix_fallocate(self.file, 0, size)
        except OSError as error:
            raise ResourceError(f"no room for {wanted} bytes of weights in shared memory: {error.strerror}") from error
        self._bytes = torch.from_file(self.path, shared=True, size=size, dtype=torch.uint8)
        self._memory = self._bytes.numpy().data


class Outbox:
    """The sending side; keep it between publications, for its memory."""

    def __init__(self, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.bucket_bytes = bucket_bytes
        self.buffers = (Buffer(), Buffer())

    def send(self, weights: Weights, announce: Announce) -> str:
        """Write the weights into shared memory, bucket by bucket, announce each, and return the checksum of all.

        Each tensor is copied before the next is asked for, so the iterator may reuse its memory. At the end the last
        two buckets may still be unanswered: before the next `send` the receivers must be done with them.

        Raises:
            ResourceError: memory has no room for a bucket.
        """
        checksum = Checksum()
        answers: list[Answer | None] = []
        pairs = iter(weights)
        pair = next(pairs, None)
        while pair is not None:
            if len(answers) >= len(self.buffers) and (answer := answers[-len(self.buffers)]):
                answer()
            buffer = self.buffers[len(answers) % len(self.buffers)]
            buffer.used = 0
            names: list[str] = []
            dtype_names: list[str] = []
            shapes: list[list[int]] = []
            while pair is not None and (not names or buffer.used + pair[1].nbytes <= self.bucket_bytes):
                name, tensor = pair
                names.append(name)
                dtype_names.append(_dtype_name(tensor.dtype))
                shapes.append(list(tensor.shape))
                checksum.begin(name, dtype_names[-1], shapes[-1])
                buffer.append(tensor, checksum, self.bucket_bytes)
                pair = next(pairs, None)
            bucket = Bucket(names, dtype_names, shapes, buffer.path, checksum.hexdigest())
            answers.append(announce(asdict(bucket), pair is None))
        return checksum.hexdigest()

    def close(self) -> None:
        """Give the memory back; what the receivers have mapped stays theirs."""
        for buffer in self.buffers:
            buffer.close()

    def __enter__(self) -> Self:
        """Use it for one transfer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the memory back."""
        self.close()


class Inbox:
    """The receiving side; keep it between publications, for its mappings."""

    def __init__(self) -> None:
        self._mapped: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        self._checksum = Checksum()

    def begin(self) -> None:
        """Expect the first bucket of a transfer, and forget files that are gone."""
        self._checksum = Checksum()
        self._mapped = {path: item for path, item in self._mapped.items() if _identity(path) == item[0]}

    def receive(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        """Return a bucket's tensors, after comparing checksums. No copy: they are valid until this is answered.

        Raises:
            TrainingError: the file is not there, or is not what was announced.
        """
        data = self._map(bucket.path)
        memory = data.numpy().data
        weights: list[tuple[str, Tensor]] = []
        for name, dtype_name, shape, (start, end) in _layout(bucket):
            if end > len(data):
                raise TrainingError(
                    f"weights in {bucket.path} end after {len(data)} bytes, before the end of {name} at {end}"
                )
            PULSE.beat()
            self._checksum.begin(name, dtype_name, list(shape))
            self._checksum.take(memory[start:end])
            weights.append((name, data[start:end].view(getattr(torch, dtype_name)).view(shape)))
        if self._checksum.hexdigest() != bucket.checksum:
            raise TrainingError(
                f"weights {bucket.names[0]} to {bucket.names[-1]} arrived with checksum {self._checksum.hexdigest()}, "
                f"but {bucket.checksum} was sent: they are refused"
            )
        return weights

    def _map(self, path: str) -> Tensor:
        identity = _identity(path)
        if identity is None:
            raise TrainingError(
                f"weights were announced in {path}, which does not exist here: policy and rollout engine must run on "
                "the same machine to share memory"
            )
        if path not in self._mapped or self._mapped[path][0] != identity:
            mapped = torch.from_file(path, shared=True, size=identity[-1], dtype=torch.uint8)
            self._mapped[path] = identity, mapped
        return self._mapped[path][1]


def send(weights: Weights, update_weights: Callable[[dict[str, Any]], None], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Send once; `update_weights` takes an announcement and returns when the receiver is done with the bucket."""
    with Outbox(bucket_bytes) as outbox:
        outbox.send(weights, lambda announcement, _: update_weights(announcement))


def content(announcement: dict[str, Any]) -> np.ndarray:
    """Return the bytes `[size]` that a bucket of this machine announces, to be carried to another; no copy."""
    ends = [end for _, _, _, (_, end) in _layout(Bucket(**announcement))]
    return np.memmap(announcement["path"], mode="r")[: ends[-1]]


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
                PULSE.beat()


def _layout(bucket: Bucket) -> Iterator[tuple[str, str, list[int], tuple[int, int]]]:
    """Yield name, dtype and shape of each tensor of a bucket, and where its bytes start and end."""
    end = 0
    for name, dtype_name, shape in zip(bucket.names, bucket.dtype_names, bucket.shapes, strict=True):
        start = end + -end % ALIGNMENT
        end = start + tensor_bytes(dtype_name, shape)
        yield name, dtype_name, shape, (start, end)


def _identity(path: str) -> tuple[int, ...] | None:
    """Tell a file from another that has taken its place, or from itself before it grew; its size comes last."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
