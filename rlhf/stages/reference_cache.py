"""The reference's log-probabilities, kept in the user's cache: no run makes a pass that an earlier one has made.

Preference training asks for one number per response, and neither the loss nor its settings bear on it: DPO with another
beta, or IPO next to DPO, from the same start on the same data finds what the first run left. The responses are asked in
parts, each a file of its own that is flushed before the next part: an interrupt ends a pass after a part, a crash costs
one, and longer data with the same beginning finds the parts that it shares. A file is named by the sha256 of all that
its numbers depend on to the last bit: the model's files, the tokens and masks of the part's responses in their order,
dtype, temperature, adapters, passes and threads, kind of device, the libraries' versions and our own code. Whether a
model runs flat or padded follows from its files, the libraries and our code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import rlhf
from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.data.collate import collate
from rlhf.data.lazy import Lazy
from rlhf.data.sequences import TokenSequence
from rlhf.engines.base import LearnerSpec
from rlhf.fingerprint import file_digest, folder_digest
from rlhf.manifest import flush_folder
from rlhf.models.cache import default_cache
from rlhf.recipe.resources import accelerators
from rlhf.roles import Reference
from rlhf.stages.context import StageContext

LIBRARIES = ("torch", "transformers", "peft", "deepspeed")
TRAINING_ONLY = {"checkpoint", "role", "optimizer", "head_learning_rate", "seed"}
"""What of a spec does not bear on a model's numbers before its first step: new adapters add 0 whatever their seed."""

PART = 4096
"""Responses in one part, at most."""

PART_TOKENS, CPU_PART_TOKENS = 1 << 18, 1 << 13
"""Tokens in one part for each rank of the model on a GPU and on a CPU, about: an interrupt waits for that."""


@dataclass
class Part:
    """Some neighbours of a group, the file of their sums, and the sums where the file has them."""

    sequences: Sequence[TokenSequence]
    file: Path
    sums: list[float] | None


def reference_sums(
    model: Reference, spec: LearnerSpec, groups: Sequence[Sequence[TokenSequence]], pad_id: int, context: StageContext
) -> list[list[float]]:
    """Return the sum of log-probabilities over each response of each group, in nats, from the cache as far as it goes.

    The model is the one that `spec` describes, before its first step. A damaged file is replaced. Sums that are not
    finite are not kept. An interrupt takes effect after a part.
    """
    content = _content(spec, context)
    folder = default_cache() / "reference"
    parts = [list(_parts(group, spec, content, folder, context)) for group in groups]
    missing = [part for group in parts for part in group if part.sums is None]
    if known := sum(len(part.sums) for group in parts for part in group if part.sums is not None):
        context.tracker.say(f"takes the reference's logprobs of {known} responses from the cache")
    if missing:
        _ask(model, missing, pad_id, context)
    return [[total for part in group for total in part.sums or ()] for group in parts]


def response_sums(model: Reference, sequences: Sequence[TokenSequence], pad_id: int) -> list[float]:
    """Return the model's sum of log-probabilities over each response; neighbours with one prompt share it."""
    sums: list[float] = []
    for start in range(0, len(sequences), PART):
        sums += _pass(model, sequences[start : start + PART], pad_id)
    return sums


def _pass(model: Reference, sequences: Sequence[TokenSequence], pad_id: int) -> list[float]:
    batch = collate(sequences, pad_id)
    return sequence_logprobs(model.logprobs(batch).result().logprobs, batch.response_mask).tolist()


def _ask(model: Reference, missing: Sequence[Part], pad_id: int, context: StageContext) -> None:
    """Fill in the sums of parts, and write each to disk before the next; training continues if the disk refuses."""
    interrupts, keeping = context.recovery.interrupts, True
    context.tracker.begin("reference logprobs", len(missing))
    try:
        with interrupts.deferred():
            for number, part in enumerate(missing, start=1):
                part.sums = _pass(model, part.sequences, pad_id)
                if keeping and all(map(math.isfinite, part.sums)):
                    keeping = _keep(part.file, part.sums, context)
                context.tracker.advance(number, {})
                kept = "which are kept" if keeping else "which cannot be kept"
                interrupts.check(f"after part {number} of {len(missing)} of the reference's logprobs, {kept}")
    finally:
        context.tracker.step = 0  # parts are no steps of the training that follows


def _parts(
    group: Sequence[TokenSequence], spec: LearnerSpec, content: dict[str, Any], folder: Path, context: StageContext
) -> Iterator[Part]:
    """Yield a group in parts; each depends on what stands before it and in it, not on what follows.

    Two neighbours, the sides of a pair, stay together and share their prompt.
    """
    model = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    room = spec.ranks * (PART_TOKENS if _on_gpu(context) else CPU_PART_TOKENS)
    start = tokens = 0
    digest = model.copy()

    def part(end: int) -> Part:
        file = folder / f"{digest.hexdigest()}.json"
        return Part(Lazy(partial(_row, group, start), end - start), file, _read(file, context))

    for place in range(0, len(group), 2):
        sides = group[place : place + 2]
        size = sum(len(sequence.tokens) for sequence in sides)
        if place > start and (tokens + size > room or place - start >= PART):
            yield part(place)
            start, tokens, digest = place, 0, model.copy()
        tokens += size
        for sequence in sides:
            digest.update(len(sequence.tokens).to_bytes(8, "little"))
            digest.update(array("q", sequence.tokens))
            digest.update(bytes(sequence.response_mask))
    if start < len(group):
        yield part(len(group))


def _row(group: Sequence[TokenSequence], start: int, place: int) -> TokenSequence:
    return group[start + place]


def _content(spec: LearnerSpec, context: StageContext) -> dict[str, Any]:
    """Return all that the numbers depend on beside the sequences, in JSON."""
    settings = {name: value for name, value in asdict(spec).items() if name not in TRAINING_ONLY}
    return {
        "model": folder_digest(spec.checkpoint),
        "settings": settings | {"tuning": spec.tuning.model_dump(mode="json") if spec.tuning else None},
        "device": "gpu" if _on_gpu(context) else [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "libraries": {name: version(name) for name in LIBRARIES},
        "code": _code_digest(),
    }


def _on_gpu(context: StageContext) -> bool:
    return accelerators(context.recipe, context.stage) > 0


@cache
def _code_digest() -> str:
    """Return the sha256 over this package's source: its version alone does not tell two working copies apart."""
    root = Path(rlhf.__file__).parent
    files = sorted(root.rglob("*.py"))
    return hashlib.sha256(
        "".join(f"{file.relative_to(root)} {file_digest(file)}" for file in files).encode()
    ).hexdigest()


def _read(file: Path, context: StageContext) -> list[float] | None:
    """Return the sums that a file holds; None if it is missing or damaged."""
    try:
        kept = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        context.tracker.say(f"cannot read {file}, so the reference is asked again: {error}")
        return None
    sums = kept.get("sums") if isinstance(kept, dict) else None
    if not isinstance(sums, list) or kept.get("sha256") != _seal(sums):
        context.tracker.say(f"finds {file} damaged, so the reference is asked again")
        return None
    return sums


def _keep(file: Path, sums: list[float], context: StageContext) -> bool:
    """Write a file that is on disk whole or not there; return whether the cache takes it, and say so where not."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as writing:
            writing.write(json.dumps({"sha256": _seal(sums), "sums": sums}))
            writing.flush()
            os.fsync(writing.fileno())
        unfinished.replace(file)
        flush_folder(file.parent)
    except OSError as error:
        context.tracker.say(f"cannot keep the reference's logprobs for later runs: {error}")
        return False
    return True


def _seal(sums: list[float]) -> str:
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
