"""Growing seeds into instruction data: what comes out, why the rest does not, and that a stopped stage goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from annotate_made import Flushes, Killed
from click.testing import CliRunner, Result

from rlhf.cli import main
from rlhf.data.synthesized import read_synthesized
from rlhf.local import LocalRollout
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import local_resources
from rlhf.recipe.schedule import schedule
from rlhf.roles import Ready
from rlhf.seeding import derive
from rlhf.stages.instructions import normalised, rouge_l, words
from rlhf.types import Rollout

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke" / "synthesize.yaml"
SEEDS = ("Name three rivers.", "Write a poem about rain.", "Add two and three.", "Say hello to Anna.")
RECIPE = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
roles: {rollout: {engine: transformers}}
stages:
  - {name: more, kind: synthesize, policy: base, seeds: {path: seeds.jsonl}, count: 12, examples: 3,
     max_similarity: 0.8, max_prompt_tokens: 440, max_response_tokens: 48}
"""
THINGS = ("cats", "trains", "bread", "winter", "music", "stars", "boats", "wool", "tea", "chess", "moss", "clocks")
VERBS = ("Explain", "Praise", "Compare", "Describe", "Count", "Sketch out")


class Scripted:
    """Writes tasks of a small grammar, some bad, and answers; what it says depends on a prompt and its seed alone."""

    def __init__(self) -> None:
        self.asked: dict[str, str] = {}

    def __call__(self, engine, prompts, sampling, seeds):
        rollouts = [self.rollout(prompt, seed) for prompt, (seed,) in zip(prompts, seeds, strict=True)]
        return Ready(rollouts)

    def rollout(self, prompt, seed) -> Rollout:
        self.asked[prompt.id] = prompt.text
        drawn = derive(seed)
        if prompt.id.startswith("request-"):
            number = prompt.text.count("\n") + 1
            text = "".join(f" {self.task(derive(drawn, k))}\n{number + 1 + k}." for k in range(drawn % 4)) + "..."
        else:
            text = self.answer(drawn, prompt.text)
        tokens = tuple(text.encode())
        finish = "length" if text.endswith("...") else "stop"
        return Rollout(prompt, tokens, (0.0,) * len(tokens), text, finish, 0, seed)

    def task(self, drawn: int) -> str:
        if drawn % 5 == 0:
            return ("Name THREE rivers!", "Hi.", "Describe this image of a cat.", "Name <| a lake")[drawn // 5 % 4]
        thing, other = THINGS[drawn // 7 % 12], THINGS[drawn // 91 % 12]
        return f"{VERBS[drawn // 1001 % 6]} {thing} and {other} to a child."

    def answer(self, drawn: int, question: str) -> str:
        if drawn % 6 == 0:
            return ("", question, "As an AI, I cannot.", "no and " * 12)[drawn // 6 % 4]
        return f"This is what number {drawn} has to say."


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other crawl on a busy machine."""
    monkeypatch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
    monkeypatch.setattr("rlhf.command.leave", sys.exit)  # which would end the tests too


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"prompt": seed, "completion": "Gladly."} for seed in SEEDS]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    script = Scripted()
    monkeypatch.setattr(LocalRollout, "generate", lambda *arguments: script(*arguments))
    return script


def run(folder: Path, *sets: str, name: str = "out", recipe: Path | None = None) -> Result:
    options = [word for override in sets for word in ("--set", override)]
    command = ["run", str(recipe or folder / "recipe.yaml"), "--local", "--output", str(folder / name), *options]
    return CliRunner().invoke(main, command)


def summary(folder: Path) -> dict:
    return json.loads((folder / "out" / "stages" / "more" / "done.json").read_text())["summary"]


def test_chats_pass_every_filter_and_what_does_not_is_told(folder, scripted):
    result = run(folder, "stages.more.count=30")
    assert result.exit_code == 0, result.output
    chats, rejected = read_synthesized(folder / "out" / "stages" / "more")
    assert len(chats) == 30
    pool = dict(zip((f"seed-{n}" for n in range(1, 5)), SEEDS, strict=True))
    for chat in chats:
        assert [turn.role for turn in chat.messages] == ["user", "assistant"]
        assert re.fullmatch(r"[A-Z][a-z]+( out)? \w+ and \w+ to a child\.", chat.instruction)
        assert chat.messages[1].content.startswith("This is what number")
        assert chat.similarity <= 0.8
        assert len(chat.examples) == 3
        near = {name: rouge_l(words(chat.instruction), words(text)) for name, text in pool.items()}
        assert chat.similarity == near[chat.nearest] == max(near.values())
        pool[chat.id] = chat.instruction
    assert len({normalised(chat.instruction) for chat in chats}) == 30
    told = summary(folder)
    assert told["rows"] == 30
    reasons = {item.reason for item in rejected}
    assert reasons >= {"similar", "repeat", "too short", "not a text task"}
    assert reasons & {"answer: empty", "answer: repeats the instruction", "answer: speaks as a machine"}
    for reason in reasons:
        assert told[f"rejected, {reason}"] == sum(item.reason == reason for item in rejected)
    assert 30 + len(rejected) == told["drawn"]


def test_requests_show_seeds_and_at_most_two_tasks_of_its_own(folder, scripted):
    assert run(folder, "stages.more.count=30", "stages.more.max_similarity=0.9").exit_code == 0
    requests = [text for name, text in scripted.asked.items() if name.startswith("request-")]
    own = [sum(line.endswith("to a child.") for line in text.splitlines()) for text in requests]
    assert (max(own), own[0]) == (2, 0)
    assert all(re.fullmatch(r"1\. .+\n2\. .+\n3\. .+\n4\.", text) for text in requests)


def test_examples_that_do_not_fit_are_left_out_and_one_that_never_fits_is_an_error(folder, scripted):
    assert run(folder, "stages.more.max_prompt_tokens=160").exit_code == 0
    counts = {text.count("\n") for name, text in scripted.asked.items() if name.startswith("request-")}
    assert counts == {1, 2}
    result = run(folder, "stages.more.max_prompt_tokens=100", name="other")
    assert result.exit_code == 3
    assert "of the seeds alone makes a request of" in result.stderr


def test_what_a_comparison_asks_is_never_written(folder, scripted):
    assert run(folder).exit_code == 0
    chats, _ = read_synthesized(folder / "out" / "stages" / "more")
    (folder / "asked.jsonl").write_text(json.dumps({"prompt": chats[0].instruction.upper()}) + "\n")
    (folder / "judge.py").write_text("def score(prompt, response, metadata):\n    return len(response)\n")
    (folder / "recipe.yaml").write_text(
        RECIPE
        + """\
  - {name: sft, kind: sft, data: {stage: more}}
  - {name: duel, kind: compare, candidates: [base, sft], baseline: base, prompts: {path: asked.jsonl},
     gold: {kind: function, path: "judge.py:score"}, max_prompt_tokens: 64, max_response_tokens: 8}
"""
    )
    # The stage itself has not changed, so it is reused as it is, and the comparison finds out.
    result = run(folder)
    assert result.exit_code == 3
    assert "1 of 1 prompts of stages.duel are also in what stages.more wrote" in " ".join(result.stderr.split())
    run(folder, name="fresh")
    chats, rejected = read_synthesized(folder / "fresh" / "stages" / "more")
    assert len(chats) == 12
    assert "asked in a comparison" in {item.reason for item in rejected}


def test_a_judge_sets_aside_low_scores(folder, scripted):
    (folder / "judge.py").write_text(
        "def score(prompt, response, metadata):\n    return int(response.split()[4]) % 4\n"
    )
    judge = f'{{kind: function, path: "{folder}/judge.py:score"}}'
    result = run(folder, f"stages.more.judge={judge}", "stages.more.min_score=2")
    assert result.exit_code == 0, result.output
    chats, rejected = read_synthesized(folder / "out" / "stages" / "more")
    assert {chat.score for chat in chats} == {2.0, 3.0}
    assert summary(folder)["rejected, answer: low score"] == sum(r.reason == "answer: low score" for r in rejected)


def test_it_fails_in_words_when_nothing_new_comes(folder, scripted):
    scripted.rollout = lambda prompt, seed: Rollout(prompt, (9,), (0.0,), "Name three rivers.", "stop", 0, seed)
    result = run(folder, "stages.more.max_attempts=3")
    assert result.exit_code == 5
    said = " ".join(result.stderr.split())
    assert "only 0 of 12 chats after 36 drawn instructions (max_attempts 3): set aside 36 repeat; raise temp" in said
    assert len((folder / "out" / "stages" / "more" / "rejected.jsonl").read_text().splitlines()) == 36


def test_a_stopped_stage_goes_on_to_the_same_chats(folder, scripted):
    assert run(folder).exit_code == 0
    through = (folder / "out").rename(folder / "through") / "stages" / "more"
    assert len((through / "metrics.jsonl").read_text().splitlines()) >= 2
    speak = scripted.rollout

    def interrupted(prompt, seed):
        if prompt.id == "request-0":
            os.kill(os.getpid(), signal.SIGINT)
        return speak(prompt, seed)

    scripted.rollout = interrupted
    assert run(folder).exit_code == 130
    scripted.rollout = speak
    scripted.asked.clear()
    assert run(folder).exit_code == 0
    assert "request-0" not in scripted.asked
    for name in ("data.jsonl", "rejected.jsonl"):
        assert (folder / "out" / "stages" / "more" / name).read_bytes() == (through / name).read_bytes()


def test_a_death_at_a_flush_costs_a_turn_and_no_row(folder, scripted):
    sets = ("stages.more.count=6",)
    flushes = Flushes()
    with flushes.counted():
        assert run(folder, *sets, name="through").exit_code == 0
    through = folder / "through" / "stages" / "more"
    turns = len((through / "metrics.jsonl").read_text().splitlines())
    assert turns >= 2
    for fatal in range(1, flushes.count, 4):
        dying = Flushes(fatal)
        with dying.counted(), pytest.raises(Killed):
            run(folder, *sets, name=f"out-{fatal}")
        more = folder / f"out-{fatal}" / "stages" / "more"
        dying.lose_power(more / "data.jsonl", more / "rejected.jsonl")
        assert run(folder, *sets, name=f"out-{fatal}").exit_code == 0
        for name in ("data.jsonl", "rejected.jsonl"):
            assert (more / name).read_bytes() == (through / name).read_bytes()


def test_the_smoke_recipe_writes_and_trains_on_it(tmp_path):
    result = run(tmp_path, recipe=SMOKE)
    assert result.exit_code == 0, result.output
    chats, _ = read_synthesized(tmp_path / "out" / "stages" / "more")
    assert len(chats) == 24
    done = json.loads((tmp_path / "out" / "stages" / "sft" / "done.json").read_text())["summary"]
    assert (done["rows"], done["heldout_rows"]) == (23, 1)
    recipe = load_recipe(SMOKE).recipe
    assert schedule(recipe, recipe.stages[1])["rows"] == 24
    assert schedule(recipe, recipe.stages[2])["optimizer_steps"] == 3
    again = run(tmp_path, recipe=SMOKE)
    assert again.stdout.count("unchanged, reused") == 3
    (tmp_path / "out" / "stages" / "more" / "data.jsonl").write_text("")
    refused = run(tmp_path, recipe=SMOKE)
    assert refused.exit_code == 3
    assert "is damaged (data.jsonl" in refused.output
    assert "--restart more" in refused.output


def test_what_does_not_fit_together_is_refused(folder):
    result = CliRunner().invoke(main, ["validate", str(folder / "recipe.yaml"), "--set", "stages.more.max_words=2"])
    assert result.exit_code == 2
    assert "stages.more.max_words: must be at least min_words = 3, got 2" in result.stderr
