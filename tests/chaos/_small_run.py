"""A run of four small stages, every role in this process: about two seconds from nothing, a third where all is done."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from click.testing import CliRunner

os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}  # read when imported
RECIPE = """\
name: small
model: {path: "tiny://llama", dtype: float32}
tuning: {kind: lora, r: 4}
backend: local
recovery: {every_steps: 1}
roles: {rollout: {engine: transformers}}
stages:
  - {name: sft, kind: sft, data: {path: chats.jsonl}, batch_size: 4}
  - {name: pairs, kind: annotate, policy: sft, prompts: {path: prompts.jsonl}, samples_per_prompt: 2,
     judge: {kind: function, path: "judge.py:score"}, max_prompt_tokens: 64, max_response_tokens: 8}
  - {name: dpo, kind: dpo, policy: sft, data: {stage: pairs}, batch_size: 3, save_every: 3}
  - {name: duel, kind: compare, candidates: [sft, dpo], baseline: sft, prompts: {path: heldout.jsonl},
     gold: {kind: function, path: "judge.py:score"}, max_prompt_tokens: 64, max_response_tokens: 8,
     bootstrap_samples: 50}
"""
WORDS = ("cab", "fad", "bee", "ace", "tux", "zest", "moss", "vow")
JUDGE = "def score(prompt, response, metadata):\n    return len(set(response)) / 8\n"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and what it said on the error stream."""

    code: int
    said: str

    @property
    def clean(self) -> bool:
        """Whether it is a message for people: no traceback, no unexpected error, six lines at most."""
        return "Traceback" not in self.said and "unexpected" not in self.said and len(self.said.splitlines()) <= 6


def write_recipe(folder: Path) -> None:
    """Write the recipe and its data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "judge.py").write_text(JUDGE)
    asked = [f"{verb} {word}." for verb in ("Say", "Spell") for word in WORDS]
    rows = {
        "chats": [{"prompt": text, "completion": text[:-1].split()[1]} for text in asked],
        "prompts": [{"prompt": text} for text in asked],
        "heldout": [{"prompt": f"Name {text}"} for text in asked[:12]],
    }
    for name, made in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


@contextmanager
def in_this_process() -> Iterator[None]:
    """Let commands end without ending this process, plan for one core, and keep what they log off the screen."""
    from rlhf.recipe.resources import local_resources

    one = replace(local_resources(), cpus=1)
    logging.getLogger("rlhf").addHandler(quiet := logging.NullHandler())
    with ExitStack() as stack:
        stack.enter_context(patch("rlhf.command.leave", sys.exit))
        stack.enter_context(patch("rlhf.recipe_run.local_resources", lambda: one))
        measured = patch("rlhf.recipe.plan._rate", lambda *_: (1e12, False))  # or each run measures this machine
        stack.enter_context(measured)
        try:
            yield
        finally:
            logging.getLogger("rlhf").removeHandler(quiet)


def command(*arguments: object) -> Ended:
    """Run `rlhf` with arguments, in this process."""
    from rlhf.cli import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    return Ended(result.exit_code, result.stderr + (f"Traceback: {result.exception!r}" if crashed else ""))


def go(folder: Path, *options: str, recipe: str = "recipe.yaml") -> Ended:
    """Run the recipe beside a run folder."""
    return command("run", folder.parent / recipe, "--local", "--output", folder, *options)


@contextmanager
def recorded_step(stage: str, step: int, fault: Callable[[], Any]) -> Iterator[None]:
    """Let something happen right after a stage has recorded a step."""
    from rlhf.tracking import Tracker

    record = Tracker.log

    def log(tracker: Any, at: int, metrics: Any) -> None:
        record(tracker, at, metrics)
        if (tracker.stage, at) == (stage, step):
            fault()

    with patch.object(Tracker, "log", log):
        yield


def interrupt() -> None:
    """Send this process SIGINT."""
    os.kill(os.getpid(), signal.SIGINT)


def copy(source: Path, target: Path) -> Path:
    """Copy a run folder, its times too; what was there before is gone."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, symlinks=True))
