"""An annotate stage on an engine and a judge made by hand, which say what they were asked and in which order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from online_made import context_of

from rlhf.interrupts import Interrupts
from rlhf.recipe.base import FunctionJudge, PathData
from rlhf.recipe.role_schema import Roles, RolloutRole
from rlhf.recipe.stage_schema import AnnotateStage
from rlhf.roles import Ready
from rlhf.seeding import derive
from rlhf.stages import annotate
from rlhf.stages.context import StageContext
from rlhf.stages.recovery import StageRecovery
from rlhf.types import Rollout

FILES = (annotate.PAIRS, annotate.BEST)


class Killed(BaseException):
    """The process is no more."""


class Bench:
    """A folder with prompts, and runs of a stage on them; `events` tells what engine and judge were asked.

    Rounds have two prompts of two samples. `during` is called with each event before it is done; every response begins
    with the tokens `filling`.
    """

    def __init__(self, folder: Path, model: Path, prompts: int = 9, **settings: Any) -> None:
        self.folder, self.model = folder, model
        self.events: list[tuple[str, tuple[str, ...]]] = []
        self.during: Any = lambda event: None
        self.filling: tuple[int, ...] = ()
        rows = "".join(f'{{"prompt": "Say {n}.", "id": "p{n}"}}\n' for n in range(prompts))
        (folder / "prompts.jsonl").write_text(rows)
        self.stage = AnnotateStage(
            name="pairs",
            kind="annotate",
            policy="base",
            prompts=PathData(path=folder / "prompts.jsonl"),
            judge=FunctionJudge(kind="function", path="judge.py:score"),
            **{"samples_per_prompt": 2, "heldout_fraction": 0.3, "label_noise": 0.3, **settings},
        )
        self.roles = Roles(rollout=RolloutRole(engine="transformers", max_sequences=2))

    def run(self, name: str, interrupts: Interrupts | None = None) -> Any:
        """Run the stage in a folder, from where it stands there, as a new process would."""
        (self.folder / name).mkdir(exist_ok=True)
        context: Any = context_of(self.stage, self.folder / name)
        recipe = context.recipe.model_copy(update={"roles": self.roles})
        recovery = StageRecovery(
            self.folder / name / "state", "key", {}, recipe.recovery, context.tracker, interrupts or Interrupts()
        )
        context = replace(
            context,
            recipe=recipe,
            outputs={"base": self.model},
            threads={"rollout": 1},
            launcher=self,
            recovery=recovery,
        )
        with patch.object(StageContext, "judge", lambda *_: self):
            return annotate.run(self.stage, context)

    def rollout(self, spec: Any) -> "Bench":
        return self

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> Ready[list[Rollout]]:
        self._did("draw", prompts)
        return Ready(
            [
                Rollout(
                    prompt, (*self.filling, seed % 50), (-1.0,) * (1 + len(self.filling)), f"{seed}", "stop", 0, seed
                )
                for prompt, row in zip(prompts, seeds, strict=True)
                for seed in row
            ]
        )

    def score(self, rollouts: Any) -> Ready[torch.Tensor]:
        self._did("judge", [rollout.prompt for rollout in rollouts[::2]])
        return Ready(torch.tensor([derive(rollout.seed) % 5 / 7 for rollout in rollouts]))

    def _did(self, what: str, prompts: Any) -> None:
        self.events.append((what, tuple(prompt.id for prompt in prompts)))
        self.during(self.events[-1])

    def files(self, name: str) -> list[bytes]:
        return [(self.folder / name / file).read_bytes() for file in FILES]

    def drawn(self) -> list[str]:
        return [prompt for what, prompts in self.events if what == "draw" for prompt in prompts]


class Flushes:
    """Counts what is flushed to disk; the process dies at flush `fatal` (from 1), before or after it."""

    def __init__(self, fatal: int | None = None, after: bool = False) -> None:
        self.fatal, self.after = fatal, after
        self.count = 0
        self.flushed: dict[int, int] = {}
        self.real = os.fsync

    def __call__(self, handle: int) -> None:
        self.count += 1
        if self.count == self.fatal and not self.after:
            raise Killed
        self.real(handle)
        self.flushed[os.fstat(handle).st_ino] = os.fstat(handle).st_size
        if self.count == self.fatal:
            raise Killed

    @contextmanager
    def counted(self) -> Iterator[None]:
        with patch.object(os, "fsync", self):
            yield

    def lose_power(self, *files: Path) -> None:
        """Take from files what was never flushed."""
        for file in files:
            if file.exists():
                os.truncate(file, min(file.stat().st_size, self.flushed.get(file.stat().st_ino, 0)))
