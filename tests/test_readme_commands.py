"""Every command of the README's table and of `rlhf --help` runs in a new process of a new environment."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from fresh_environment import ROOT, Fresh, build_wheel, make_environment

from rlhf.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = "runs/taken"
RECIPE = """\
name: taken
model: {path: "tiny://llama", dtype: float32}
tuning: {kind: lora, r: 4, alpha: 8}
backend: local
roles: {reference: {share: policy}, rollout: {engine: transformers}}
stages:
  - {name: sft, kind: sft, data: {path: recipes/data/smoke_sft.jsonl}, batch_size: 8}
  - {name: dpo, kind: dpo, policy: sft, data: {path: recipes/data/smoke_pairs.jsonl}, batch_size: 8}
  - name: duel
    kind: compare
    candidates: [sft, dpo]
    baseline: sft
    prompts: {path: recipes/data/smoke_heldout.jsonl}
    gold: {kind: function, path: "recipes/rewards/smoke.py:gold"}
    max_prompt_tokens: 64
    max_response_tokens: 8
    bootstrap_samples: 200
    frontier: false
"""
CALLS = {
    "init [FILE] --data chats.jsonl": "init new.yaml --data recipes/data/smoke_sft.jsonl --method sft --yes",
    "init [FOLDER] --example quickstart": "init example --example quickstart",
    "run RECIPE": "run recipe.yaml",
    "run RECIPE --restart STAGE": "run recipe.yaml --restart duel",
    "run RECIPE --local": "run recipe.yaml --local",
    "run RECIPE --set stages.ppo.kl_coef=0.05": "run recipe.yaml --set stages.duel.bootstrap_samples=300",
    "compare RUN [RUN...] -o report.html": f"compare {RUN} -o both.html",
    "validate RECIPE": "validate recipe.yaml",
    "plan RECIPE": "plan recipe.yaml",
    "data inspect FILE_OR_RECIPE": "data inspect recipe.yaml",
    "checkpoint list RUN": f"checkpoint list {RUN}",
    "checkpoint verify RUN": f"checkpoint verify {RUN}",
    "status RUN": f"status {RUN}",
    "runs [FOLDER]": "runs",
    "export RUN/STAGE --as merged, adapter or gguf": f"export {RUN}/dpo --as merged --output taken-away",
    "chat RUN/STAGE [RUN/STAGE]": f"chat {RUN}/dpo {RUN}/sft --max-tokens 4",
    "eval RUN/STAGE... --tasks NAME": f"eval {RUN}/dpo --task-folder recipes/eval --tasks everyday --limit 4",
    "bench [RECIPE]": "bench --only copy --json bench.json",
    "cache": "cache",
    "cache prune": "cache prune --older-than 30d",
    "doctor": "doctor",
    "schema": "schema",
}
"""A call for each command of the table, in its order; those that start vLLM have a test of their own."""
SERVE = "serve RUN/STAGE..."
HELD = {"submit RECIPE": "submit recipe.yaml --address http://127.0.0.1:9 --dry-run"}
"""Commands that the README explains elsewhere."""


def table() -> list[str]:
    """Return the commands of the README's table without `rlhf`; a second one in a cell shares its group's name."""
    found = []
    for cell in re.findall(r"^\| (`rlhf .*?) \|", README, re.MULTILINE):
        group = ""
        for span in re.findall(r"`([^`]+)`", cell):
            words = span.split(" ")
            if words[0] == "rlhf":
                group = words[1] if len(words) > 2 and words[1] in ("checkpoint", "data") else ""
                found.append(" ".join(words[1:]))
            else:
                found.append(f"{group} {span}".strip())
    return found


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield every command, groups too, as the words behind `rlhf`."""
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Fresh:
    """The CPU set with every extra, and the wheel."""
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    return make_environment(tmp_path_factory.mktemp("fresh"), wheel, "cpu", "torch", "dev")


@pytest.fixture(scope="module")
def work(fresh, tmp_path_factory) -> Path:
    """Return a folder with a finished run, made by the command itself."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "recipe.yaml").write_text(RECIPE)
    made = fresh.run("run", "recipe.yaml", cwd=folder)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


def test_the_table_is_covered():
    assert sorted([*CALLS, SERVE]) == sorted(table())


def test_no_command_is_left_out():
    called = {shlex.split(call)[0] for call in (*CALLS.values(), *HELD.values(), "serve")}
    assert called == set(main.commands)


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_help(fresh, tmp_path, path):
    shown = fresh.run(*path, "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("Usage: rlhf")


@pytest.mark.parametrize("call", [*CALLS.values(), *HELD.values()])
def test_a_command_runs(fresh, work, call):
    ran = fresh.run(*shlex.split(call), cwd=work, asked="Say cab.\n")
    assert "Traceback" not in ran.stdout + ran.stderr
    if call == "doctor":  # it judges this machine, whatever it is
        assert ran.returncode in (0, 4), ran.stderr
        assert re.search(r"^ok +imports ", ran.stdout, re.MULTILINE), ran.stdout
        return
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_eval_scores_a_model(fresh, work):
    """The harness and all that it needs come from the locks: nothing that another library brings is at hand."""
    asked = f"eval {RUN}/dpo --task-folder recipes/eval --tasks everyday --limit 4 --json scores.json"
    ran = fresh.run(*shlex.split(asked), cwd=work)
    assert ran.returncode == 0, ran.stderr
    scores = json.loads((work / "scores.json").read_text())["scores"]
    assert {(one["task"], one["n"]) for one in scores} == {("everyday", 4)}


@pytest.mark.vllm
def test_serve_answers_and_ends(fresh, work):
    command = fresh.command("serve", f"{RUN}/dpo", "--port", "0", "--max-length", "64")
    with subprocess.Popen(
        command, cwd=work, env=fresh.variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if line.startswith("ready: "):  # it has answered, or this line would not be there
                server.send_signal(signal.SIGINT)
        assert any(line.startswith("ready: ") for line in said), said
    assert server.returncode == 130, said


def mentions() -> list[str]:
    """Return what the README says in passing: `rlhf plan recipe.yaml --gpu h100-80gb`, and lines of its examples."""
    spans = re.findall(r"`(rlhf [^`\n]+)`", README)
    lines = re.findall(r"^(?:\$ )?(rlhf .*)$", README, re.MULTILINE)
    parts = [part.strip() for line in lines for part in re.split(r"&&|#", line)]
    return [text for text in (*spans, *parts) if text.startswith("rlhf ")]


def test_commands_in_passing_exist_with_their_options():
    assert len(mentions()) > 25
    for text in mentions():
        command: click.Command = main
        for word in text.split()[1:]:
            if isinstance(command, click.Group) and word in command.commands:
                command = command.commands[word]
        assert isinstance(command, click.Group) == (text in ("rlhf --help",)) or command.name == "cache", text
        known = {name for parameter in command.params for name in parameter.opts} | {"--help", "--version"}
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", text):
            assert option in known, text
