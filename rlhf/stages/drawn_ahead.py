"""Rollouts in a saved state, as columns of a safetensors file: the policy that drew them is gone by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from rlhf.roles import Pending, Ready
from rlhf.stages.online_draw import Drawing
from rlhf.types import FinishReason, Prompt, Rollout

AHEAD = "ahead.safetensors"
FINISHES: tuple[FinishReason, ...] = get_args(FinishReason)
ROW_BYTES, TOKEN_BYTES = 64, 12
Columns = dict[str, NDArray[Any]]


class DrawnAhead:
    """The rollouts of the next step, which a `StageRecovery` keeps. Prompts are not saved.

    A step's prompts follow from its number, so `taken_up` gets them from the caller.
    """

    def __init__(self) -> None:
        self.drawing: Drawing | None = None
        self.columns: Columns = {}

    def state_bytes(self) -> Pending[int]:
        """Return about how many bytes the file takes; waits for the rollouts."""
        rollouts = self._rollouts()
        texts = sum(len(rollout.text.encode("utf-8", "surrogatepass")) for rollout in rollouts)
        return Ready(ROW_BYTES * (1 + len(rollouts)) + TOKEN_BYTES * sum(len(r.tokens) for r in rollouts) + texts)

    def save_state(self, folder: Path) -> Pending[None]:
        """Write the rollouts; waits for them."""
        save_file(columns_of(self._rollouts()), folder / AHEAD)
        return Ready(None)

    def load_state(self, folder: Path) -> Pending[None]:
        """Read them; states of earlier versions have no such file."""
        self.columns = load_file(folder / AHEAD) if (folder / AHEAD).exists() else {}
        return Ready(None)

    def taken_up(self, step: int, prompts: Sequence[Prompt], earlier: Sequence[Mapping[str, Any]]) -> Drawing | None:
        """Return the rollouts of step `step` that were loaded, if any were; each prompt has as many.

        `earlier` are the rows that states of earlier versions carry in their manifest.
        """
        if earlier:
            samples = len(earlier) // len(prompts)
            rollouts = [_of_json(prompts[row // samples], columns) for row, columns in enumerate(earlier)]
        else:
            rollouts = rollouts_of(self.columns, prompts) if self.columns else []
        self.columns = {}
        return Drawing(step, Ready(rollouts)) if rollouts else None

    def _rollouts(self) -> list[Rollout]:
        return self.drawing.rollouts if self.drawing else []


def columns_of(rollouts: Sequence[Rollout]) -> Columns:
    """Return rollouts, without their prompts, as arrays that keep every bit.

    tokens, logprobs  of all responses one after the other; `lengths` says where each ends
    text              the UTF-8 bytes of all texts; `text_bytes` says where each ends
    """
    texts = [rollout.text.encode("utf-8", "surrogatepass") for rollout in rollouts]
    return {
        "tokens": np.fromiter(chain.from_iterable(rollout.tokens for rollout in rollouts), np.int32),
        "logprobs": _narrow(np.fromiter(chain.from_iterable(rollout.logprobs for rollout in rollouts), np.float64)),
        "lengths": np.array([len(rollout.tokens) for rollout in rollouts], np.int64),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "text_bytes": np.array([len(text) for text in texts], np.int64),
        "finish_reason": np.array([FINISHES.index(rollout.finish_reason) for rollout in rollouts], np.uint8),
        "policy_version": np.array([rollout.policy_version for rollout in rollouts], np.int64),
        "seed": np.array([rollout.seed for rollout in rollouts], np.int64),
    }


def rollouts_of(columns: Columns, prompts: Sequence[Prompt]) -> list[Rollout]:
    """Return the rollouts of `columns_of`; each prompt has as many of them, side by side."""
    tokens, logprobs, text = columns["tokens"].tolist(), columns["logprobs"].tolist(), columns["text"].tobytes()
    ends, text_ends = columns["lengths"].cumsum().tolist(), columns["text_bytes"].cumsum().tolist()
    rows = zip(*(columns[name].tolist() for name in ("finish_reason", "policy_version", "seed")), strict=True)
    rollouts: list[Rollout] = []
    start = text_start = 0
    for row, (finish, version, seed) in enumerate(rows):
        end, text_end = ends[row], text_ends[row]
        said = text[text_start:text_end].decode("utf-8", "surrogatepass")
        prompt = prompts[row * len(prompts) // len(ends)]
        part = tuple(tokens[start:end]), tuple(logprobs[start:end])
        rollouts.append(Rollout(prompt, *part, said, FINISHES[finish], version, seed))
        start, text_start = end, text_end
    return rollouts


def _narrow(values: NDArray[np.float64]) -> NDArray[Any]:
    """Return the values as float32 where that changes none: engines give float32."""
    narrow = values.astype(np.float32)
    return narrow if (narrow == values).all() else values


def _of_json(prompt: Prompt, columns: Mapping[str, Any]) -> Rollout:
    lists = {"tokens": tuple(columns["tokens"]), "logprobs": tuple(columns["logprobs"])}
    return Rollout(prompt, **{**columns, **lists})
