"""What the policy said, kept for people to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf.types import Rollout


def write_samples(folder: Path, step: int, rollouts: Sequence[Rollout], scores: Sequence[float]) -> None:
    """Write `samples/step-<n>.jsonl`: prompt, response, score, length and how it ended."""
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
    (folder / f"step-{step:05d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
