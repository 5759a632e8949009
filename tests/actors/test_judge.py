"""A judge with a model of its own, in vLLM and in a process of its own: it says what the same model says here."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from test_launch import start, summary

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]


def verdicts(cache: Path) -> list[float]:
    """All verdicts, the smallest first; the keys of two kinds of engine differ."""
    with sqlite3.connect(cache / "verdicts.sqlite") as table:
        return sorted(verdict for (verdict,) in table.execute("SELECT first_wins FROM readable_verdicts"))


def test_the_judge_in_vllm_agrees_with_the_same_model_in_this_process(tmp_path, monkeypatch):
    folders = {}
    for name, arguments in {"local": ["--local"], "ray": ["--set", "roles.judge.engine=vllm"]}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        monkeypatch.setenv("RLHF_CACHE", str(tmp_path / f"{name}-cache"))
        run = start(folders[name], "rlaif.yaml", *arguments)
        run.finish()
        assert run.run.returncode == 0, run.stderr
        assert run.left() == set()
    assert len(run.pids("RolloutActor")) == 2
    assert summary(folders["ray"], "pairs")["questions_asked"] == 48
    here, there = (verdicts(tmp_path / f"{name}-cache") for name in ("local", "ray"))
    assert len(here) == 48
    assert there == pytest.approx(here, abs=1e-5)
    pairs = [
        [json.loads(line) for line in (folder / "stages" / "pairs" / "pairs.jsonl").read_text().splitlines()]
        for folder in folders.values()
    ]
    assert [row["chosen_tokens"] for row in pairs[0]] == [row["chosen_tokens"] for row in pairs[1]]
