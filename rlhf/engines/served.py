"""Which weights an engine serves, and what has arrived of the next ones."""

from __future__ import annotations

import json
from typing import Any, Literal

import xxhash

from rlhf.engines.shared_memory import tensor_bytes
from rlhf.errors import TrainingError

Phase = Literal["serving", "receiving", "failed", "complete"]


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
        described = json.dumps([self.checksum, names, dtypes, [list(shape) for shape in shapes]])
        self.checksum = announcement.get("checksum") or xxhash.xxh3_64(described.encode()).hexdigest()
        self.bytes += sum(tensor_bytes(dtype, shape) for dtype, shape in zip(dtypes, shapes, strict=True))


class ServedWeights:
    """The state of an engine's weights: it serves only in phase `serving`.

    `begin` -> `receive`, again and again -> `finish` -> `declare`; after a failure only `begin` leads back.
    """

    def __init__(self) -> None:
        self.phase: Phase = "serving"
        self.version = 0
        self.ledger = Ledger()

    def begin(self) -> None:
        """Stop serving; whatever was under way before is void."""
        self.phase = "receiving"
        self.ledger = Ledger()

    def finish(self) -> None:
        """All tensors are in place; TrainingError when none came."""
        if self.phase != "receiving" or not self.ledger.checksum:
            raise TrainingError(f"a weight update was finished, but no weights have arrived (phase {self.phase})")
        self.phase = "complete"

    def declare(self, version: int) -> tuple[int, str]:
        """Serve as `version` from now on; return it and the checksum. TrainingError when the update is unfinished."""
        if self.phase != "complete":
            raise TrainingError(f"version {version} was declared, but its weights have not arrived ({self.phase})")
        self.phase = "serving"
        self.version = version
        return self.served()

    def served(self) -> tuple[int, str]:
        """Return version and checksum (empty for the weights that the engine began with)."""
        return self.version, self.ledger.checksum

    def check_serving(self) -> None:
        """Raise TrainingError unless whole, declared weights are in place."""
        if self.phase != "serving":
            raise TrainingError(f"the rollout engine cannot generate: a weight update is unfinished ({self.phase})")
