"""What the policy said, kept for people to read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf.recipe.online_schema import SampleFiles
from rlhf.types import Rollout

FILE = re.compile(r"step-(\d{5,})\.jsonl")


def write_samples(folder: Path, step: int, rollouts: Sequence[Rollout], scores: Sequence[float]) -> Path:
    """Write `samples/step-<n>.jsonl`, and return it: prompt, response, score, length and how it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {
                "prompt_id": rollout.prompt.id,
                "prompt": rollout.prompt.text,
                "response": rollout.text,
                "score": score,
                "tokens": len(rollout.tokens),
                "finish_reason": rollout.finish_reason,
            },
            ensure_ascii=False,
        )
        for rollout, score in zip(rollouts, scores, strict=True)
    ]
    file = folder / f"step-{step:05d}.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def is_kept(step: int, newest: int, files: SampleFiles) -> bool:
    """Return whether the samples of a step (from 1) stay when those of step `newest` are written.

    The newest half of `keep` and the first stay. Between them stays every second, fourth, eighth ... in turn, as
    sparsely as the rest of `keep` allows, so that what stays is spread over the whole run. It follows from the two
    steps alone: a run that was interrupted ends with the files of one that never was.
    """
    if step > newest or (step != 1 and step % files.every):
        return False
    if files.keep is None:
        return True
    recent = max(1, files.keep // 2)
    number, last = step // files.every, newest // files.every
    if step == newest or number > last - recent:
        return True
    if step == 1:
        return files.keep > 1
    between = max(0, files.keep - recent - 1)
    stride = 1
    while between and (last - recent) // stride > between:
        stride *= 2
    return between > 0 and number % stride == 0


def forget_samples(folder: Path, newest: int, files: SampleFiles) -> None:
    """Remove the files that do not stay when `newest` is the last step, such as those of steps made again."""
    for file in folder.glob("step-*.jsonl"):
        named = FILE.fullmatch(file.name)
        if named and not is_kept(int(named[1]), newest, files):
            file.unlink(missing_ok=True)
