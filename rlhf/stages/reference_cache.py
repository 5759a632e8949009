"""The reference's log-probabilities, kept in the user's cache: no run makes a pass that an earlier one has made.

Preference training asks for one number per response, and neither the loss nor its settings bear on it: DPO with another
beta, or IPO next to DPO, from the same start on the same data finds what the first run left. A file is named by the
sha256 of all that the numbers depend on to the last bit: the model's files, the tokens and masks of all responses in
their order, dtype, temperature, adapters, passes and threads, kind of device, the libraries' versions and our own code.
Whether a model runs flat or padded follows from its files, the libraries and our code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import rlhf
from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.data.collate import collate
from rlhf.data.sequences import TokenSequence
from rlhf.engines.base import LearnerSpec
from rlhf.fingerprint import file_digest, folder_digest
from rlhf.models.cache import default_cache
from rlhf.recipe.resources import accelerators
from rlhf.roles import Reference
from rlhf.stages.context import StageContext

LIBRARIES = ("torch", "transformers", "peft", "deepspeed")
TRAINING_ONLY = {"checkpoint", "role", "optimizer", "head_learning_rate", "seed"}
"""What of a spec does not bear on a model's numbers before its first step: new adapters add 0 whatever their seed."""

PART = 4096
"""Responses in one call, so that a large data set is never one tensor."""


def reference_sums(
    model: Reference, spec: LearnerSpec, groups: Sequence[Sequence[TokenSequence]], pad_id: int, context: StageContext
) -> list[list[float]]:
    """Return `response_sums` of each group, in nats, from the cache where an earlier run has kept them.

    The model is the one that `spec` describes, before its first step. A damaged file is made anew. Sums that are not
    finite are not kept.
    """
    content, found, known = _content(spec, context), [], 0
    for group in groups:
        file = default_cache() / "reference" / f"{_key(content, group)}.json"
        sums = _read(file, context) if group else []
        known += len(sums or ())
        if sums is None:
            sums = response_sums(model, group, pad_id)
            if all(map(math.isfinite, sums)):
                _keep(file, sums, context)
        found.append(sums)
    if known:
        context.tracker.say(f"takes the reference's logprobs of {known} responses from the cache")
    return found


def response_sums(model: Reference, sequences: Sequence[TokenSequence], pad_id: int) -> list[float]:
    """Return the model's sum of log-probabilities over each response; neighbours with one prompt share it."""
    sums: list[float] = []
    for start in range(0, len(sequences), PART):
        batch = collate(sequences[start : start + PART], pad_id)
        sums += sequence_logprobs(model.logprobs(batch).result().logprobs, batch.response_mask).tolist()
    return sums


def _content(spec: LearnerSpec, context: StageContext) -> dict[str, Any]:
    """Return all that the numbers depend on beside the sequences, in JSON."""
    settings = {name: value for name, value in asdict(spec).items() if name not in TRAINING_ONLY}
    on_gpu = accelerators(context.recipe, context.stage) > 0
    return {
        "model": folder_digest(spec.checkpoint),
        "settings": settings | {"tuning": spec.tuning.model_dump(mode="json") if spec.tuning else None},
        "device": "gpu" if on_gpu else [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "libraries": {name: version(name) for name in LIBRARIES},
        "code": _code_digest(),
    }


@cache
def _code_digest() -> str:
    """Return the sha256 over this package's source: its version alone does not tell two working copies apart."""
    root = Path(rlhf.__file__).parent
    files = sorted(root.rglob("*.py"))
    return hashlib.sha256(
        "".join(f"{file.relative_to(root)} {file_digest(file)}" for file in files).encode()
    ).hexdigest()


def _key(content: dict[str, Any], sequences: Sequence[TokenSequence]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for sequence in sequences:
        digest.update(len(sequence.tokens).to_bytes(8, "little"))
        digest.update(array("q", sequence.tokens))
        digest.update(bytes(sequence.response_mask))
    return digest.hexdigest()


def _read(file: Path, context: StageContext) -> list[float] | None:
    """Return the sums that a file holds; None where there is none, or none that is as it was written."""
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


def _keep(file: Path, sums: list[float], context: StageContext) -> None:
    """Write a file that is there whole or not at all; training goes on where the cache cannot be written."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"sha256": _seal(sums), "sums": sums}), encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        context.tracker.say(f"cannot keep the reference's logprobs for later runs: {error}")


def _seal(sums: list[float]) -> str:
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
