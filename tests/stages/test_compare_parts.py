"""A comparison that is interrupted, killed or damaged between its parts resumes, and ends as if nothing had been."""

# ruff: noqa: PT012 (a crash is set up where it is expected)

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlhf import checkpoint, command
from rlhf.cli import main
from rlhf.local import LocalRollout
from rlhf.models.tiny import build_tiny
from rlhf.recipe.resources import local_resources
from rlhf.stages.parts import Parts
from rlhf.tracking import Tracker

RECIPE = """\
name: duel
model: {path: "tiny://llama", dtype: float32}
checkpoints: {other: OTHER}
roles: {rollout: {engine: transformers, max_sequences: 2}}
stages:
  - name: duel
    kind: compare
    candidates: [base, other]
    baseline: base
    prompts: {path: prompts.jsonl}
    gold: {kind: function, path: "judge.py:score"}
    retention: {path: chats.jsonl}
    samples_per_prompt: 2
    max_prompt_tokens: 32
    max_response_tokens: 4
    bootstrap_samples: 100
"""
PARTS = 2 * (2 + 1) + 2 + 3
"""Two parts of samples and one of chats for each model, two of KL, and three of scores."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    other = build_tiny(folder / "other", seed=5)
    (folder / "recipe.yaml").write_text(RECIPE.replace("OTHER", str(other)))
    prompts = [{"id": str(number), "prompt": f"Say {number}"} for number in range(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "chats.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Hello."}) + "\n")
    (folder / "judge.py").write_text("def score(prompt, response, metadata):\n    return len(response) / 7\n")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "leave", sys.exit)  # which would end the tests too
    monkeypatch.setattr("rlhf.stages.evaluate.PART_TOKENS", 1)
    monkeypatch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))


def run(root: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["run", str(root / "recipe.yaml"), "--local", "--output", str(out), *options])


def made(out: Path) -> dict[str, bytes]:
    """Return what a comparison leaves, but for how long it took and the page."""
    folder = out / "stages" / "duel"
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix in (".json", ".jsonl", ".csv")]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    del found["progress.json"]
    done = json.loads(found.pop("done.json"))
    return found | {"tokens": str(done["cost"]["generated_tokens"]).encode()}


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.stages.evaluate.PART_TOKENS", 1)
        patch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
        assert run(root, root / "whole").exit_code == 0
    return made(root / "whole")


def ending(patch: pytest.MonkeyPatch, at: int, how: Callable[[], None]) -> None:
    """Have something happen when a part has been made, before it is committed."""
    advance = Tracker.advance

    def advanced(tracker: Tracker, step: int, metrics: dict[str, float]) -> None:
        advance(tracker, step, metrics)
        if step == at:
            how()

    patch.setattr(Tracker, "advance", advanced)


def test_it_goes_on_after_every_part_and_ends_the_same(root, undisturbed, tmp_path, monkeypatch):
    for step in range(1, PARTS + 1):
        number = signal.SIGINT if step % 2 else signal.SIGTERM
        with monkeypatch.context() as patch:
            ending(patch, step, partial(os.kill, os.getpid(), number))
            result = run(root, tmp_path / "out")
        assert result.exit_code == (130 if step % 2 else 143)
        assert f"interrupted in stage duel, after step {step}, which is saved" in result.stderr
        assert f"duel goes on after step {step - 1}" in result.stdout or step == 1
    assert run(root, tmp_path / "out").exit_code == 0
    assert made(tmp_path / "out") == undisturbed
    assert not (tmp_path / "out" / "stages" / "duel" / "state").exists()


def test_what_is_sampled_is_not_sampled_again(root, tmp_path, monkeypatch):
    asked: list[str] = []
    generate = LocalRollout.generate

    def generating(engine, prompts, sampling, seeds):
        asked.extend(prompt.id for prompt in prompts)
        return generate(engine, prompts, sampling, seeds)

    monkeypatch.setattr(LocalRollout, "generate", generating)
    for _ in range(2):
        with monkeypatch.context() as patch:
            ending(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            run(root, tmp_path / "out")
    assert asked == ["0", "1", "2", "0", "1", "2"]


class Crash(BaseException):
    """The process is gone."""


def crash(*_: object, **__: object) -> None:
    raise Crash


@pytest.mark.parametrize("place", ["rlhf.stages.parts.Journal.append", "rlhf.checkpoint.write"])
def test_a_crash_between_a_part_and_its_state_costs_that_part(root, undisturbed, tmp_path, monkeypatch, place):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(place, crash)
        run(root, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        ending(patch, 3 if place.endswith("append") else 4, lambda: patch.setattr(place, crash))
        run(root, tmp_path / "out")
    assert len(checkpoint.states(tmp_path / "out" / "stages" / "duel" / "state")) > 0
    result = run(root, tmp_path / "out")
    assert (result.exit_code, made(tmp_path / "out")) == (0, undisturbed)


@pytest.mark.parametrize("damage", ["truncated", "missing", "journal"])
def test_damaged_parts_are_said_and_made_again(root, undisturbed, tmp_path, monkeypatch, damage):
    with monkeypatch.context() as patch:
        ending(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(root, tmp_path / "out")
    folder = tmp_path / "out" / "stages" / "duel" / "state" / "parts"
    file = folder / ("parts.jsonl" if damage == "journal" else "00000002.safetensors")
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    result = run(root, tmp_path / "out")
    assert result.exit_code == 0
    assert "goes back to part 2: what comes after it in" in result.stdout.replace("\n", " ")
    found = made(tmp_path / "out")
    assert found.pop("tokens") > undisturbed["tokens"]  # what was sampled twice is counted twice
    assert found.items() <= undisturbed.items()


def test_other_settings_take_no_parts(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        ending(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(root, tmp_path / "out")
    result = run(root, tmp_path / "out", "--set", "stages.duel.temperature=0.5")
    assert result.exit_code == 2
    assert "duel was interrupted after step 2 with other settings: temperature 1.0 -> 0.5" in result.stderr
    saved = []
    monkeypatch.setattr(Parts, "load_state", lambda parts, folder: saved.append(folder))
    assert run(root, tmp_path / "out", "--set", "stages.duel.temperature=0.5", "--restart", "duel").exit_code == 0
    assert not saved


def test_a_state_is_small_whatever_the_parts_hold(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        ending(patch, PARTS, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(root, tmp_path / "out")
    states = checkpoint.states(tmp_path / "out" / "stages" / "duel" / "state")
    assert sum((state / "parts.json").stat().st_size for state in states) < 100 * len(states)
