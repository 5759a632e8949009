"""The verdict, the terminal's table and the JSON file say the same as the comparison."""

import io
import json
import math
from dataclasses import replace

import pytest
from made import comparison, samples, spent
from rich.console import Console

from rlhf.errors import DataError
from rlhf.recipe.base import Budget
from rlhf.report.frontier import frontier_point
from rlhf.report.json import read_json, write_json
from rlhf.report.results import Interval, show
from rlhf.report.table import comparison_table, verdict


@pytest.fixture(scope="module")
def found():
    return comparison(samples("sft"), samples("ppo", gold=0.5, reward=1.5, kl=8.0), samples("dpo", gold=1.0, kl=3.0))


def test_verdict_names_a_winner_only_when_every_lead_is_clear(found):
    said = verdict(found)
    assert said.startswith("dpo wins by gold reward")
    assert "+1.00 [" in said
    assert "over sft" in said
    assert "+0.50 [" in said
    assert "over ppo" in said


def test_verdict_without_a_clear_lead():
    tied = comparison(samples("sft", gold=-1.0), samples("ppo", gold=0.01, noise=0.4), samples("dpo", noise=0.4))
    said = verdict(tied)
    assert said.startswith("No clear winner. Highest is ppo")
    assert said.endswith("It does beat sft.")


def test_verdict_can_go_to_the_baseline():
    assert verdict(comparison(samples("sft", gold=1.0), samples("ppo"))).startswith("sft wins by gold reward")


def test_verdict_refuses_to_call_a_handful_of_prompts():
    few = comparison(samples("sft", prompts=3), samples("ppo", gold=9.0, prompts=3))
    assert verdict(few).startswith("No clear winner: 3 prompt(s) are too few")


def test_table_shows_every_number_with_its_interval(found):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparison_table(found))
    lines = [line for line in console.export_text().splitlines() if "│" in line]
    assert [line.split()[1] for line in lines] == ["dpo", "ppo", "sft"]
    ppo = found.candidate("ppo")
    for piece in (f"{show(ppo.gold)} {ppo.gold_ci}", f"{show(ppo.kl)} {ppo.kl_ci}", "20.0 [20.0, 20.0]", "100% ["):
        assert piece in lines[1]
    assert "sft (baseline)" in lines[2]


def test_table_says_how_many_seeds_and_leaves_out_what_nobody_measured():
    runs = [samples(f"ppo@{seed}", gold=0.5, reward=None) for seed in (1, 2, 3)]
    found = comparison(samples("sft", reward=None), *runs, samples("dpo", gold=0.1, reward=None))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparison_table(found))
    text = console.export_text()
    assert "ppo (3 seeds)" in text
    assert "1 to 3 seeds" in text
    assert "reward model" not in text
    assert "nan" not in text
    assert "3 seeds" in verdict(found)


def test_verdict_quotes_the_corrected_p_value_where_the_interval_looks_clear(found):
    def weak(item):
        shaky = item.candidate == "dpo" and item.metric == "gold"
        return replace(item, p_value=0.03, p_corrected=0.09) if shaky else item

    said = verdict(replace(found, differences=tuple(weak(item) for item in found.differences)))
    assert said.startswith("No clear winner. Highest is dpo")
    assert "over sft (corrected p 0.09)" in said


def test_table_does_not_read_markup_in_names():
    odd = samples("[bold]x[/nope]")
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparison_table(comparison(odd)))
    assert "[bold]x[/nope]" in console.export_text()


def test_json_has_the_documented_shape(found, tmp_path):
    write_json(tmp_path / "report.json", found)
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["baseline"] == "sft"
    assert (document["seed"], document["bootstrap_samples"], document["prompts"]) == (5, 300, 24)
    names = (
        "name kind runs gold gold_ci reward reward_ci kl kl_ci length length_ci win_rate win_rate_ci truncated distinct"
        " entropy characters preference_accuracy cost retention"
    )
    assert [list(item) for item in document["candidates"]] == [names.split()] * 3
    ppo = document["candidates"][1]
    assert ppo["gold_ci"] == [found.candidate("ppo").gold_ci.low, found.candidate("ppo").gold_ci.high]
    fields = "candidate baseline metric difference ci n p_value p_corrected level"
    assert list(document["differences"][0]) == fields.split()
    assert len(document["differences"]) == 3 * 4
    assert [(item["candidate"], item["baseline"]) for item in document["wins"]] == [
        ("ppo", "sft"),
        ("dpo", "sft"),
        ("dpo", "ppo"),
    ]
    assert [item["name"] for item in document["leaderboard"]] == ["ppo", "dpo", "sft"]
    assert document["leaderboard"][1]["win_rate"] == 100 * found.candidate("dpo").win_rate
    assert [item["run"] for item in document["frontier"]] == ["sft", "ppo", "dpo"]


def test_json_reads_back_as_it_was_and_unbounded_intervals_are_null(found, tmp_path):
    single = comparison(samples("sft", prompts=1), samples("ppo", prompts=1))
    point = frontier_point("ppo@1", samples("ppo@1", reward=None).samples, 4)
    full = comparison(
        samples("sft", reward=None),
        spent(samples("ppo@1", reward=None), 10, 5, accuracy=0.5),
        samples("ppo@2", reward=None),
        frontier=[point],
        budget=Budget(gradient_tokens=100),
        reward_accuracy=0.7,
    )
    for number, original in enumerate((found, single, full)):
        path = tmp_path / f"{number}.json"
        write_json(path, original)
        assert read_json(path) == original
    assert json.loads((tmp_path / "1.json").read_text())["candidates"][0]["gold_ci"] == [None, None]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"candidates": [{"name": 1}], "differences": []}'])
def test_other_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"report\.json:1: not a comparison report"):
        read_json(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.7, "0.70"), (12.34, "12.3"), (456.7, "457"), (0.0042, "0.004"), (-1e-9, "0.00"), (math.nan, "unknown")],
)
def test_numbers_are_written_as_precisely_as_they_deserve(value, text):
    assert show(value) == text


def test_intervals_turn_around_and_know_their_side_of_zero():
    assert -Interval(-1.0, 3.0) == Interval(-3.0, 1.0)
    assert Interval(0.1, 0.2).above_zero
    assert Interval(-0.2, -0.1).below_zero
    assert not Interval(0.0, 0.2).above_zero
    assert str(Interval(-math.inf, math.inf)) == "[unknown]"


def test_a_verdict_over_many_methods_stays_short():
    names = ("sft", "a", "b", "c", "d")
    found = comparison(*(samples(name, gold=0.01 * place, noise=0.5) for place, name in enumerate(names)))
    text = verdict(found)
    assert text.startswith("No clear winner. Highest is d ")
    assert text.count("] over ") == 2
    assert ", nor is it sure over a, sft (" in text
