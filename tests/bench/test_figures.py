"""Figures, their JSON and their table."""

import json
from io import StringIO

import pytest
from rich.console import Console

from rlhf.bench.figures import KINDS, PARTS, BenchResult, Figure, names_of, with_needs
from rlhf.bench.table import print_table

MACHINE = {"cpu": "made by hand", "cores": 2, "memory_gib": 4.0, "gpus": ["one"]}


def result(figures):
    return BenchResult(MACHINE, {"torch": "1", "ray": None}, {"model": "tiny", "dtype": "float32"}, figures)


def printed(result):
    out = StringIO()
    print_table(result, Console(file=out, width=140))
    return out.getvalue()


def test_json_round_trip():
    figures = [Figure("sft", 123.0, "2 threads", 410.0), Figure("rollouts", None, reason="no engine")]
    read = BenchResult.from_json(result(figures).to_json())
    assert read == result(figures)
    said = json.loads(result(figures).to_json())["figures"]
    assert said[0]["fraction"] == pytest.approx(0.3)
    assert (said[0]["unit"], said[0]["part"]) == ("tokens/s", "learners")
    assert all(figure["low"] for figure in said)


def test_the_table_has_every_name():
    text = printed(result([Figure(name, 1.5, "here", 3.0) for name in KINDS]))
    lines = [line for line in text.splitlines() if "50 %" in line]
    assert len(lines) == len(KINDS)
    for name, kind in KINDS.items():
        assert any(line.split()[: 1 + len(name.split())] == [kind.part, *name.split()] for line in lines)


def test_what_was_not_measured_says_why():
    text = printed(result([Figure("call", 1.0), Figure("rollouts", None, reason="vllm is [not] installed")]))
    assert "rollouts rollouts: not measured: vllm is [not] installed" in text
    assert result([Figure("call", 1.0), Figure("rollouts", None, reason="no")]).measured
    assert not result([Figure("rollouts", None, reason="no")]).measured


def test_every_part_has_figures():
    assert [name for part in PARTS for name in names_of(part)] == list(KINDS)


def test_parts_bring_those_that_measure_their_limits():
    assert with_needs([]) == list(PARTS)
    assert with_needs(["learners"]) == ["gemm", "learners"]
    assert with_needs(["ray", "copy"]) == ["copy", "ray"]
    assert with_needs(["rollouts"]) == ["gemm", "copy", "rollouts"]
