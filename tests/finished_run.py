"""A small run that is done, made once for all tests that take something out of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

RECIPE = """\
name: taken
model: {path: "tiny://llama", dtype: float32}
tuning: {kind: lora, r: 4, alpha: 8}
backend: local
roles:
  reference: {share: policy}
  rollout: {engine: transformers}
stages:
  - name: sft
    kind: sft
    data: {path: "chats `a|b` <b>.jsonl"}
    optimizer: {learning_rate: 1e-2}
    batch_size: 4
    epochs: 2
  - name: dpo
    kind: dpo
    policy: sft
    data: {path: pairs.jsonl}
    optimizer: {learning_rate: 5e-3}
    batch_size: 8
  - name: ipo
    kind: ipo
    policy: sft
    data: {path: pairs.jsonl}
    optimizer: {learning_rate: 1e-2}
    batch_size: 4
  - name: full
    kind: dpo
    policy: base
    tuning: {kind: full}
    data: {path: pairs.jsonl}
    batch_size: 8
  - name: rm
    kind: reward
    init: sft
    data: {path: pairs.jsonl}
    batch_size: 8
  - name: duel
    kind: compare
    candidates: [sft, dpo, ipo]
    baseline: sft
    prompts: {path: prompts.jsonl}
    gold: {kind: function, path: "judge.py:score"}
    max_prompt_tokens: 64
    max_response_tokens: 8
    bootstrap_samples: 200
    frontier: false
"""
WORDS = ("cab", "fad", "bee", "ace", "tux", "zest", "moss", "vow")


def finished_run(factory: pytest.TempPathFactory) -> Path:
    """Return the run folder `taken`, made by whoever asks first."""
    root = factory.getbasetemp() / "finished"
    if not root.exists():
        root.mkdir()
        _make(root)
    return root / "taken"


def _make(root: Path) -> None:
    from rich.console import Console

    from rlhf.local import LocalLauncher
    from rlhf.recipe.load import load_recipe
    from rlhf.recipe.resources import local_resources
    from rlhf.recipe_run import run_recipe

    _write_data(root)
    (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
        console = Console(width=200, force_terminal=False, quiet=True)
        run_recipe(load_recipe(root / "recipe.yaml"), LocalLauncher, root / "taken", console)


def _write_data(root: Path) -> None:
    asked = [f"{verb} {word}." for verb in ("Say", "Spell") for word in WORDS]
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[:-1].split()[1]}] for text in asked
    ]
    _write(root / "chats `a|b` <b>.jsonl", [{"messages": chat} for chat in chats])
    _write(root / "pairs.jsonl", [{"prompt": text, "chosen": "cab", "rejected": "zest"} for text in asked])
    _write(
        root / "prompts.jsonl", [{"id": str(i), "prompt": f"Name {word}"} for i, word in enumerate((*WORDS, *"abcd"))]
    )
    (root / "judge.py").write_text("def score(prompt, response, metadata):\n    return response.count('a') / 8\n")


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
