"""Stops a run after every step of every kind of training, goes on, and compares with the run that never stopped.

SIGINT arrives while step k is being recorded; what it leaves is then taken up in a new run, as `rlhf run` would. A
tiny model, every role in this process; `late` draws each step's rollouts one step ahead. Weights, optimizer and
metrics must be equal bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from rlhf.checkpoint import states
from rlhf.interrupts import Interrupted
from rlhf.local import LocalLauncher
from rlhf.manifest import read_manifest
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import local_resources
from rlhf.recipe_run import run_recipe
from rlhf.tracking import Tracker
from tests.chaos.row import Row, only

KINDS = ("sft", "rm", "dpo", "ppo", "grpo", "late")
STEPS = 10
COUNT = len(KINDS) * STEPS
DATA = Path(__file__).parents[2] / "recipes"
JUDGE = f'{{kind: function, path: "{DATA}/rewards/smoke.py:judge"}}'
ONLINE = f"""policy: sft, prompts: {{path: {DATA}/data/smoke_prompts.jsonl}}, steps: {STEPS}, prompts_per_step: 4,
     samples_per_prompt: 2, minibatch_size: 4, max_prompt_tokens: 64, max_response_tokens: 8, target_kl: 3,
     optimizer: {{learning_rate: 5e-3}}"""
WATCHED = "heldout_fraction: 0.1, evaluations: 5, optimizer: {learning_rate: 2e-2}"
RECIPE = f"""\
name: resumed
model: {{path: "tiny://llama", dtype: float32}}
tuning: {{kind: lora, r: 4, dropout: 0.1}}
backend: local
recovery: {{every_minutes: 1000}}
roles: {{rollout: {{engine: transformers}}}}
stages:
  - {{name: sft, kind: sft, data: {{path: {DATA}/data/smoke_sft.jsonl}}, batch_size: 2, {WATCHED}}}
  - {{name: pairs, kind: annotate, policy: sft, prompts: {{path: {DATA}/data/smoke_prompts.jsonl}}, judge: {JUDGE},
     samples_per_prompt: 4, max_prompt_tokens: 64, max_response_tokens: 8, heldout_fraction: 0.2}}
  - {{name: rm, kind: reward, init: sft, data: {{stage: pairs}}, batch_size: 2, {WATCHED}}}
  - {{name: dpo, kind: dpo, policy: sft, data: {{stage: pairs}}, batch_size: 2, {WATCHED}}}
  - {{name: ppo, kind: ppo, reward: {{kind: model, stage: rm}}, {ONLINE}}}
  - {{name: grpo, kind: grpo, reward: {JUDGE}, {ONLINE}}}
  - {{name: late, kind: grpo, reward: {JUDGE}, staleness: 1, {ONLINE}}}
"""
MEASURED = re.compile("time|seconds_.*|tokens_per_second")


class Stopped:
    """Sends SIGINT to this process when a stage records a step, so that the step is finished and saved."""

    def __init__(self, stage: str, steps: tuple[int, ...]) -> None:
        self.stage = stage
        self.steps = steps
        self.record = Tracker.log

    def __call__(self, tracker: Tracker, step: int, metrics: Any) -> None:
        self.record(tracker, step, metrics)
        if tracker.stage == self.stage and step in self.steps:
            os.kill(os.getpid(), signal.SIGINT)


def go(folder: Path, stage: str, *steps: int) -> bool:
    """Run the recipe as far as a stage, with a signal after each of `steps`; return whether it came to its end."""
    loaded = load_recipe(folder.parent / "recipe.yaml")
    names = [made.name for made in loaded.recipe.stages]
    stages = loaded.recipe.stages[: names.index(stage) + 1]
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"stages": stages}))
    stopped = Stopped(stage, steps)
    one_core = replace(local_resources(), cpus=1)
    with (
        patch.object(Tracker, "log", lambda *arguments: stopped(*arguments)),
        patch("rlhf.recipe_run.local_resources", lambda: one_core),
    ):
        try:
            run_recipe(loaded, LocalLauncher, folder, Console(quiet=True))
        except Interrupted:
            return False
    return True


def final(folder: Path, stage: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of a finished stage, without what is measured by the clock, and the seals of its model."""
    target = folder / "stages" / stage
    rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if not MEASURED.fullmatch(name)} for row in rows]
    return kept, json.loads((target / "done.json").read_text())["files"]


def saved(folder: Path, stage: str) -> dict[str, Any]:
    """Return the seals of a stage's newest state: weights, moments, counts."""
    return read_manifest(states(folder / "stages" / stage / "state")[-1])["files"]


def copy_until(source: Path, target: Path, stage: str) -> None:
    """Begin a run folder with what comes before a stage."""
    for name in ("sft", "pairs", "rm", "dpo", "ppo", "grpo", "late"):
        if name == stage:
            return
        shutil.copytree(source / "stages" / name, target / "stages" / name)


def run(count: int, rng: random.Random) -> Row:
    cases = [(kind, step) for kind in KINDS for step in range(1, STEPS + 1)]
    if count < len(cases):
        cases = [(kind, rng.randrange(1, STEPS + 1)) for kind in rng.sample(KINDS, min(count, len(KINDS)))]
    different = unfinished = 0
    kinds = {kind for kind, _ in cases}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "recipe.yaml").write_text(RECIPE)
        twin = Path(name) / "twin"
        assert go(twin, "late")
        steps = {kind: final(twin, kind)[0][-1]["step"] for kind in kinds}
        last = {}
        for kind in kinds:
            folder = Path(name) / f"last-{kind}"
            copy_until(twin, folder, kind)
            go(folder, kind, steps[kind])
            last[kind] = saved(folder, kind)
        for kind, step in cases:
            folder = Path(name) / f"{kind}-{step}"
            copy_until(twin, folder, kind)
            ended = go(folder, kind, step)
            if step < steps[kind]:
                ended = ended or go(folder, kind, steps[kind])
                same = saved(folder, kind) == last[kind]
            else:
                same = True
            unfinished += ended or not go(folder, kind)
            different += not (same and final(folder, kind) == final(twin, kind))
    counts = {"interrupted and resumed": len(cases), "different": different, "without an end": unfinished}
    return Row("resume at every step", "weights, optimizer and metrics equal bit for bit", counts, different == 0)


if __name__ == "__main__":
    only(run, COUNT)
