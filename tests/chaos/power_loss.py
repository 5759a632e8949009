"""Loses power at every flush of a run, goes on with what is then on disk, and compares with the run that never stopped.

The run trains, annotates and takes the reference's logprobs, each stage with a state after every step; every role is in
this process. Power fails just before each flush of metrics, samples, pairs, sums, manifests, `done.json` and folders.
(The row `saving` does the same to the files of a state one by one.) What was not flushed is then old, cut, zeros or
new, at random (`tests.chaos._power`). The same command must go on from a state no older than the newest that had been
saved, and end with the same model, pairs, samples and metrics.
"""

from __future__ import annotations

import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from rlhf import checkpoint
from rlhf.errors import RlhfError
from rlhf.local import LocalLauncher
from rlhf.metrics_file import metric_row
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import local_resources
from rlhf.recipe_run import run_recipe
from rlhf.tracking import Tracker
from tests.chaos._power import Disk, Tree, write_tree
from tests.chaos.corruption import Heard
from tests.chaos.row import Row, only

COUNT = 150
DATA = Path(__file__).parents[2] / "recipes"
JUDGE = f'{{kind: function, path: "{DATA}/rewards/smoke.py:judge"}}'
RECIPE = f"""\
name: power
model: {{path: "tiny://llama", dtype: float32}}
tuning: {{kind: lora, r: 2}}
backend: local
recovery: {{every_steps: 1}}
roles: {{rollout: {{engine: transformers}}}}
stages:
  - {{name: sft, kind: sft, data: {{path: {DATA}/data/smoke_sft.jsonl, limit: 6}}, batch_size: 2}}
  - {{name: pairs, kind: annotate, policy: sft, prompts: {{path: {DATA}/data/smoke_prompts.jsonl, limit: 8}},
     judge: {JUDGE}, samples_per_prompt: 3, max_prompt_tokens: 64, max_response_tokens: 6}}
  - {{name: dpo, kind: dpo, policy: sft, data: {{stage: pairs}}, batch_size: 2, heldout_fraction: 0}}
  - {{name: grpo, kind: grpo, policy: sft, reward: {JUDGE}, steps: 4,
     prompts: {{path: {DATA}/data/smoke_prompts.jsonl, limit: 8}}, prompts_per_step: 2, samples_per_prompt: 2,
     minibatch_size: 4, max_prompt_tokens: 64, max_response_tokens: 6, samples: {{keep: 3}}}}
"""
MEASURED = re.compile("time|seconds_.*|tokens_per_second")
PAYLOAD = re.compile(r"/\.partial-step-[^/]*/(?!manifest\.json)")
MADE = ("model", "adapter", "samples", "pairs.jsonl", "best.jsonl")


@dataclass(frozen=True)
class Loss:
    """A power failure just before a flush, in a stage after one of its saved steps, and what is found then."""

    at: str
    stage: str
    saved: int
    left: Tree


class Watch:
    """Follows a run: the stage that is at work, its newest saved step, and the losses at its flushes."""

    def __init__(self, place: Path, rng: random.Random) -> None:
        self.stage, self.saved = "", 0
        self.losses: list[Loss] = []
        self.disk = Disk(place, rng, self.flushing)
        self.place = place

    def flushing(self, path: Path) -> None:
        """Lose power before this flush."""
        if self.stage and not PAYLOAD.search(str(path)):
            self.losses.append(Loss(str(path.relative_to(self.place)), self.stage, self.saved, self.disk.found()))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Follow the run inside."""
        write, rewind = checkpoint.write, Tracker.rewind

        def began(tracker: Tracker, mark: Mapping[str, float] | None) -> None:
            self.stage, self.saved = tracker.stage, 0
            rewind(tracker, mark)

        def saving(root: Path, step: int, *arguments: Any, **options: Any) -> checkpoint.Saved:
            made = write(root, step, *arguments, **options)
            self.saved = step
            return made

        with patch.object(Tracker, "rewind", began), patch("rlhf.checkpoint.write", saving), self.disk:
            yield


def run(count: int, rng: random.Random) -> Row:
    """Lose power at `count` of the flushes, those of every kind of file among them."""
    seen: Counter[str] = Counter()
    notes: list[str] = []
    with Heard(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE)
        place = folder / "twin"
        place.mkdir()
        go(folder, folder / "first", "sft")
        (folder / "first" / "cache").rename(place / "cache")  # with the model that it has built
        watch = Watch(place, rng)
        with watch.entered():
            go(folder, place, "grpo")
        for number, loss in enumerate(_chosen(watch.losses, count, rng)):
            after = folder / f"after-{number}"
            write_tree(loss.left, after)
            for wrong in _wrong(folder, after, place, loss):
                seen[wrong.partition(":")[0]] += 1
                notes.append(f"{loss.stage} after step {loss.saved}, at {loss.at}: {wrong}")
            seen["lost power"] += 1
    for note in notes:
        print(note, file=sys.stderr)
    wanted = min(count, len(watch.losses))
    kinds = ("cannot go on", "states lost", "other results", "other rows")
    return Row(
        "power lost at a flush",
        f"{wanted} (of {len(watch.losses)} flushes): 0 runs that cannot go on, 0 states lost, 0 other results",
        {"lost power": seen["lost power"]} | {kind: seen[kind] for kind in kinds},
        seen["lost power"] == wanted and not any(seen[kind] for kind in kinds),
    )


def go(folder: Path, place: Path, last: str) -> dict[str, list[int]]:
    """Run the recipe as far as a stage in `place/run`; return the steps after which each stage went on."""
    loaded = load_recipe(folder / "recipe.yaml")
    names = [made.name for made in loaded.recipe.stages]
    stages = loaded.recipe.stages[: names.index(last) + 1]
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"stages": stages}))
    began: dict[str, list[int]] = {}
    rewind = Tracker.rewind

    def note(tracker: Tracker, mark: Mapping[str, float] | None) -> None:
        rewind(tracker, mark)
        began.setdefault(tracker.stage, []).append(tracker.step)

    with (
        patch.dict(os.environ, RLHF_CACHE=str(place / "cache")),
        patch.object(Tracker, "rewind", note),
        patch("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1)),
    ):
        run_recipe(loaded, LocalLauncher, place / "run", Console(quiet=True))
    return began


def _chosen(losses: list[Loss], count: int, rng: random.Random) -> list[Loss]:
    """Return so many losses, as evenly as can be of each stage and kind of file."""
    groups: dict[tuple[str, str], list[Loss]] = {}
    for loss in rng.sample(losses, len(losses)):
        groups.setdefault((loss.stage, re.sub(r"[0-9a-f]{8,}|\d+", "#", loss.at)), []).append(loss)
    chosen: list[Loss] = []
    while len(chosen) < min(count, len(losses)):
        chosen += [group.pop() for group in groups.values() if group]
    return chosen[:count]


def _wrong(folder: Path, after: Path, twin: Path, loss: Loss) -> Iterator[str]:
    """Go on after a loss, as far as the end of the stage that was at work, and yield what is not as it should be."""
    try:
        began = go(folder, after, loss.stage)
    except Exception as error:
        untold = "" if isinstance(error, RlhfError) else "unexpected "
        yield f"cannot go on: {untold}{type(error).__name__}: {error}"
        return
    if loss.saved and min(began.get(loss.stage, [loss.saved])) < loss.saved:
        yield f"states lost: went on after step {began[loss.stage]}"
    stages = [folder / "run" / "stages" for folder in (after, twin)]
    for stage in sorted(path.name for path in stages[0].iterdir() if (path / "done.json").is_file()):
        made, wanted = (_made(root / stage, (after, twin)) for root in stages)
        if made != wanted:
            different = [name for name in made | wanted if made.get(name) != wanted.get(name)]
            yield f"other results: {stage}: {', '.join(sorted(different)[:3])}"
        if _rows(stages[0] / stage) != _rows(stages[1] / stage):
            yield f"other rows: {stage}"


def _made(stage: Path, places: tuple[Path, Path]) -> dict[str, bytes]:
    """Return what a stage has made, by name; where the run lies, which an adapter tells, is left out."""
    roots = [stage / name for name in MADE]
    files = [file for root in roots for file in (root, *root.rglob("*")) if file.is_file()]
    found = {str(file.relative_to(stage)): file.read_bytes() for file in files}
    for place in places:
        found = {name: content.replace(bytes(place), b"") for name, content in found.items()}
    return found


def _rows(stage: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics without what is measured by the clock; a line that is no JSON is no row."""
    rows = [metric_row(line) or {} for line in (stage / "metrics.jsonl").read_bytes().splitlines()]
    return [{name: value for name, value in row.items() if not MEASURED.fullmatch(name)} for row in rows]


if __name__ == "__main__":
    only(run, COUNT)
