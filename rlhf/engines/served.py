"""Which weights an engine serves, and what has arrived of the next ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import xxhash

from rlhf.engines.shared_memory import tensor_bytes
from rlhf.errors import TrainingError
from rlhf.roles import EnginePart

Backend = Literal["shared_memory", "nccl", "ipc"]
Phase = Literal["serving", "receiving", "failed", "complete"]


class Transport(NamedTuple):
    """How weights reach a replica: by what, into how many worker processes, on which node, and as adapters or whole."""

    backend: Backend
    workers: int
    node: str = ""
    adapters: bool = False


class Ledger:
    """What one side of a transfer knows to have passed; both sides must arrive at the same `checksum`.

    Shared-memory announcements carry the checksum of the contents, which the receiver has verified. NCCL and CUDA IPC
    announce names, dtypes and shapes only, so there an equal ledger says that both sides mean the same tensors.
    """

    def __init__(self) -> None:
        self.checksum = ""
        self.bytes = 0

    def add(self, announcement: dict[str, Any]) -> None:
        """Enter one `update_weights` announcement of any backend."""
        names, dtypes, shapes = (announcement[key] for key in ("names", "dtype_names", "shapes"))
        self.checksum = announcement.get("checksum") or self._described(names, dtypes, shapes)
        self.bytes += sum(tensor_bytes(dtype, shape) for dtype, shape in zip(dtypes, shapes, strict=True))

    def _described(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> str:
        description = json.dumps([self.checksum, names, dtypes, [list(shape) for shape in shapes]])
        return xxhash.xxh3_64(description.encode()).hexdigest()


class ServedWeights:
    """The state of an engine's weights: it serves only in phase `serving`, with its KV cache awake.

    `begin` -> `receiving`, again and again -> `finish` -> `declare`; after a failure only `begin` leads back. An engine
    that slept has its weights again after `wake("weights")` and serves after `wake("kv_cache")`.
    """

    def __init__(self) -> None:
        self.phase: Phase = "serving"
        self.version = 0
        self.ledger = Ledger()
        self.awake: set[EnginePart] = {"weights", "kv_cache"}

    def begin(self) -> None:
        """Stop serving; whatever was under way before is void. TrainingError while there is no room for weights."""
        if "weights" not in self.awake:
            raise TrainingError("the rollout engine is asleep: wake its weights before an update")
        self.phase = "receiving"
        self.ledger = Ledger()

    @contextmanager
    def receiving(self, announcement: dict[str, Any]) -> Iterator[None]:
        """Take in, inside, what was announced; a failure there voids the update.

        Raises:
            TrainingError: no update is under way.
        """
        if self.phase != "receiving":
            raise TrainingError(f"weights came, but no update of them is under way ({self.phase})")
        try:
            yield
        except BaseException:
            self.phase = "failed"
            raise
        self.ledger.add(announcement)

    def finish(self) -> None:
        """All tensors are in place; TrainingError when none came."""
        if self.phase != "receiving" or not self.ledger.checksum:
            raise TrainingError(f"a weight update was finished, but no weights have arrived (phase {self.phase})")
        self.phase = "complete"

    def declare(self, version: int, checksum: str | None = None) -> tuple[int, str]:
        """Serve as `version` from now on; return it and the checksum.

        Raises:
            TrainingError: the update is unfinished, or its checksum is not the one given.
        """
        if self.phase != "complete":
            raise TrainingError(f"version {version} was declared, but its weights have not arrived ({self.phase})")
        if checksum not in (None, self.ledger.checksum):
            self.phase = "failed"
            raise TrainingError(f"weights arrived with checksum {self.ledger.checksum}, but {checksum} was sent")
        self.phase = "serving"
        self.version = version
        return self.served()

    def sleep(self) -> bool:
        """Note that weights and KV cache have left the device; return whether any was awake."""
        was_awake = bool(self.awake)
        self.awake = set()
        return was_awake

    def wake(self, part: EnginePart) -> bool:
        """Note that a part is on the device again; return whether it was asleep.

        Raises:
            TrainingError: the KV cache is woken before the weights.
        """
        if part == "kv_cache" and "weights" not in self.awake:
            raise TrainingError("the KV cache was woken before the weights")
        asleep = part not in self.awake
        self.awake.add(part)
        return asleep

    def served(self) -> tuple[int, str]:
        """Return version and checksum (empty for the weights that the engine began with)."""
        return self.version, self.ledger.checksum

    def check_serving(self) -> None:
        """Raise TrainingError unless whole, declared weights are in place, and a KV cache."""
        if self.phase != "serving":
            raise TrainingError(f"the rollout engine cannot generate: a weight update is unfinished ({self.phase})")
        if "kv_cache" not in self.awake:
            raise TrainingError("the rollout engine cannot generate: it is asleep")
