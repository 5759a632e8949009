"""What people get wrong, and what goes wrong on its own: the exit code, the few lines that are said, and no hang."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.cli import main
from rlhf.errors import GuardError, TrainingError
from rlhf.models.tiny import TURN_END
from rlhf.recipe.resources import local_resources
from rlhf.stages.experience import check_rollouts
from rlhf.types import Prompt, Rollout

pytestmark = pytest.mark.timeout(240)

HEAD = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
tuning: {kind: lora, r: 4}
roles: {rollout: {engine: transformers}}
stages:
"""
SFT = "  - {name: sft, kind: sft, data: {path: sft.jsonl}, batch_size: 2}\n"
RM = "  - {name: rm, kind: reward, data: {path: pairs.jsonl}, heldout_fraction: 0, batch_size: 2}\n"
JUDGE = '{kind: function, path: "rewards.py:score"}'
PAIRS = f"""\
  - {{name: pairs, kind: annotate, policy: base, prompts: {{path: prompts.jsonl}}, judge: {JUDGE},
     max_prompt_tokens: 64}}
"""
PPO = """\
  - name: ppo
    kind: ppo
    policy: base
    reward: {kind: function, path: "rewards.py:score"}
    prompts: {path: prompts.jsonl}
    steps: 3
    prompts_per_step: 4
    minibatch_size: 2
    max_prompt_tokens: 64
    max_response_tokens: 4
"""
DUEL = f"""\
  - {{name: duel, kind: compare, candidates: [base, sft], baseline: base, prompts: {{path: heldout.jsonl}},
     gold: {JUDGE}, reward: {JUDGE}, max_prompt_tokens: 64, max_response_tokens: 4}}
"""
REWARDS = """\
def score(prompt, response, metadata):
    return len(response) / 10


def raises(prompt, response, metadata):
    return {}["quality"]


def nothing(prompt, response, metadata):
    return float("nan")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with data that is all right, on a machine with one core (for speed where others work too)."""
    monkeypatch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
    questions = ("Why?", "How?", "Who?", "When?", "Where?", "What?")
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": "So."}] for q in questions]
    write_rows(tmp_path / "sft.jsonl", [{"messages": chat} for chat in chats])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": question} for question in questions])
    write_rows(tmp_path / "heldout.jsonl", [{"prompt": "Which?"}, {"prompt": "Whose?"}])
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": q, "chosen": "yes", "rejected": "no"} for q in questions])
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(text: str, *overrides: str, local: bool = True) -> list[str]:
    Path("recipe.yaml").write_text(text)
    sets = [word for override in overrides for word in ("--set", override)]
    return ["run", "recipe.yaml", "--output", "out", *(["--local"] if local else []), *sets]


def refusal(code: int, text: str, *overrides: str, local: bool = True) -> str:
    """Run the recipe as a user would, check how it ends, and return what stands after `error: `."""
    result = CliRunner().invoke(main, arguments(text, *overrides, local=local))
    return checked(code, result.exit_code, result.stdout, result.stderr)


def checked(code: int, exit_code: int, stdout: str, stderr: str) -> str:
    assert exit_code == code, stderr
    assert "Traceback" not in stdout + stderr
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) <= 6
    return stderr.removeprefix("error: ").rstrip()


def test_the_recipes_of_this_file_are_all_right(folder):
    text = HEAD + SFT + RM + PPO + DUEL
    result = CliRunner().invoke(
        main, arguments(text, "stages.ppo.steps=1", "stages.ppo.reward={kind: model, stage: rm}")
    )
    assert result.exit_code == 0, result.stderr
    assert (folder / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("steps: 3", "stpes: 3", "recipe.yaml:11:5: stages.ppo.stpes: unknown key (did you mean steps?)"),
        ("steps: 3", "steps: few", "recipe.yaml:11:12: stages.ppo.steps: must be a whole number, got 'few'"),
        ("steps: 3", "steps: 3\n    steps: 4", 'recipe.yaml:12:5: not valid YAML: found duplicate key "steps"'),
        ("prompts.jsonl", "prompt.jsonl", "recipe.yaml:10:21: stages.ppo.prompts.path: file not found: prompt.jsonl"),
        ("rewards.py", "reward.py", "recipe.yaml:9:36: stages.ppo.reward.path: file not found: reward.py"),
        ("tiny://llama", "./llama", "recipe.yaml:2:15: model.path: folder not found: ./llama"),
    ],
)
def test_a_wrong_recipe(folder, old, new, expected):
    assert expected in refusal(2, (HEAD + PPO).replace(old, new, 1)).splitlines()
    assert not (folder / "out").exists()


def test_more_gpus_than_there_are(folder):
    message = refusal(4, HEAD + PPO, "roles.policy.ranks=64", "roles.policy.gpus=1", local=False)
    assert message.startswith("the recipe wants 64 gpus: policy 64 (for ppo); ")
    assert "Lower roles.*.gpus, share roles, or use a larger machine or cluster" in message


def test_less_memory_than_the_run_needs(folder, monkeypatch):
    little = replace(local_resources(), cpus=1, free_bytes=300 << 20)
    monkeypatch.setattr("rlhf.recipe_run.local_resources", lambda: little)
    message = refusal(4, HEAD + PPO)
    assert message.startswith("stage ppo is estimated to need ")
    assert "GiB of main memory to " in message
    assert "and 0.3 GiB are free" in message
    assert not (folder / "out" / "recipe.yaml").exists()
    result = CliRunner().invoke(main, arguments(HEAD + PPO, "on_low_memory=warn", "stages.ppo.steps=1"))
    assert result.exit_code == 0
    assert "0.3 GiB are free" in result.stdout + result.stderr
    again = CliRunner().invoke(main, arguments(HEAD + PPO, "stages.ppo.steps=1"))
    assert again.exit_code == 0  # all is done, so nothing needs memory


def test_a_cluster_that_is_not_there(folder):
    message = refusal(4, HEAD + PPO, "ray.address=127.0.0.1:9", local=False)
    assert message.startswith("ray.address: cannot join a Ray cluster at 127.0.0.1:9: ")
    assert "Connection refused" in message


def test_a_malformed_line(folder):
    with (folder / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "And\n')
    assert "prompts.jsonl:7: " in refusal(3, HEAD + PPO)


def test_a_prompt_over_the_limit(folder):
    with (folder / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "' + "far " * 20 + '"}\n')
    message = refusal(3, HEAD + PPO)
    assert re.search(r"prompts\.jsonl:7: prompt has \d+ tokens, the limit is 64 \(max_prompt_tokens\)$", message)


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("raises", 5, "stage ppo: .*/rewards.py:6: raises\\(\\) raised KeyError: 'quality' \\(prompt id "),
        ("nothing", 5, "stage ppo: .*/rewards.py:9: nothing\\(\\) returned nan, not a finite number \\(prompt id "),
        ("quality", 2, ".*/rewards.py: has no function 'quality'"),
    ],
)
def test_a_reward_function_that_fails(folder, name, code, expected):
    message = refusal(code, HEAD + PPO, f'stages.ppo.reward.path="rewards.py:{name}"')
    assert re.match(expected, message)
    assert not (folder / "out" / "stages" / "ppo" / "done.json").exists()


def test_comparison_prompts_that_were_trained_on(folder):
    with (folder / "heldout.jsonl").open("a") as file:
        file.write('{"prompt": "Why?"}\n')
    message = refusal(3, HEAD + SFT + DUEL)
    assert message == "1 of 3 prompts of stages.duel are also in stages.sft, for example 'Why?'; hold them out"
    assert not (folder / "out" / "stages").exists()


def test_more_tokens_than_the_model_has_positions(folder):
    message = refusal(2, HEAD + PPO, "stages.ppo.max_prompt_tokens=5000")
    assert re.fullmatch(
        r"recipe\.yaml:6:5: stages\.ppo: max_prompt_tokens \+ max_response_tokens = 5004, "
        r"but tiny://llama has \d+ positions;"
        " lower one of them",
        message,
    )


def test_a_run_folder_in_use(folder):
    (folder / "out").mkdir()
    with FileLock(folder / "out" / ".lock"):
        message = refusal(2, HEAD + PPO)
    assert message == f"{folder / 'out'} is in use by another run; choose another one with --output"
    assert sorted(path.name for path in (folder / "out").iterdir()) == [".lock"]


def test_the_policy_runs_away_from_the_reference(folder):
    fast = "stages.ppo.optimizer={learning_rate: 0.05, schedule: constant}"
    message = refusal(6, HEAD + PPO, "stages.ppo.max_kl=1e-4", "stages.ppo.kl_coef=0", fast)
    assert re.fullmatch(
        r"stage ppo, after step \d: the KL to the reference is \S+ nats a response \(max_kl 0\.0001\);"
        r" raise kl_coef or lower optimizer\.learning_rate",
        message,
    )


def test_engine_and_trainer_disagree(folder):
    message = refusal(6, HEAD + PPO, "stages.ppo.agreement.tolerance=1e-12")
    assert re.fullmatch(
        r"stage ppo: engine and trainer logprobs differ by \S+ nats in the mean \(tolerance 1e-12\);"
        r" the engine may serve wrong weights, or use model\.dtype: float32",
        message,
    )


@pytest.fixture
def broken_model(folder, tiny_folder):
    """`tiny://llama` with one weight that is not a number."""
    target = shutil.copytree(tiny_folder, folder / "broken")
    weights = load_file(target / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return "model.path=./broken"


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_weights_that_are_not_numbers_stop_training(folder, broken_model, stage, epochs):
    text = HEAD + (SFT if stage == "sft" else RM)
    message = refusal(6, text, broken_model, f"stages.{stage}.epochs={epochs}")
    assert message.startswith(f"stage {stage}, after step ")
    assert "the gradient was not finite" in message
    assert message.endswith("lower optimizer.learning_rate or use float32")
    assert not (folder / "out" / "stages" / stage / "done.json").exists()


def test_weights_that_are_not_numbers_stop_ppo(folder, broken_model):
    message = refusal(6, HEAD + PPO, broken_model)
    assert re.match(r"stage ppo: the engine's logprobs for prompt \S+ are not finite: ", message)
    assert "start from another checkpoint" in message


def test_a_critic_that_overflows_stops_ppo(folder):
    message = refusal(6, HEAD + PPO, "stages.ppo.critic_optimizer={learning_rate: 1e18, schedule: constant}")
    assert re.fullmatch(
        r"stage ppo(, after step 1)?: (the gradient of the (policy|critic) was not finite in any minibatch of this step"
        r"|what the critic says of a response to prompt id \d is not finite).* lower .*model\.dtype: float32",
        message,
    )
    assert not (folder / "out" / "stages" / "ppo" / "done.json").exists()


@pytest.fixture
def silent_model(folder, tiny_folder):
    """A Llama that ends every response at once: each position's hidden state points at end-of-sequence."""
    target = shutil.copytree(tiny_folder, folder / "silent")
    config = AutoConfig.from_pretrained(target, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 10
        model.lm_head.weight.zero_()
        model.lm_head.weight[TURN_END, 0] = 5
    model.save_pretrained(target)
    return "model.path=./silent"


def test_a_model_that_says_nothing(folder, silent_model):
    assert refusal(6, HEAD + PPO, silent_model) == (
        "stage ppo: 100% of the responses are empty text; check the chat template, or start from an SFT checkpoint"
    )


def test_no_pair_to_learn_from(folder, silent_model):
    message = refusal(5, HEAD + PAIRS, silent_model)
    assert message.startswith("stage pairs, after step 1: annotate found no pair to train on in 6 prompts")
    assert "raise samples_per_prompt or temperature, or look at the judge" in message


SPOKEN = Rollout(Prompt("p1", (1, 2), "Why?"), (7, 2), (-0.5, -0.1), "x", "stop", 0, 1)


def test_responses_without_a_token_are_an_error_and_empty_text_only_in_most():
    silent = replace(SPOKEN, tokens=(2,), logprobs=(-0.1,), text=" \n")
    check_rollouts([SPOKEN, silent])
    with pytest.raises(GuardError, match="67% of the responses are empty text") as guard:
        check_rollouts([SPOKEN, silent, silent])
    with pytest.raises(TrainingError, match="the engine returned no token for prompt p2") as failed:
        check_rollouts([SPOKEN, replace(SPOKEN, prompt=Prompt("p2", (1,), ""), tokens=(), logprobs=(), text="")])
    assert (guard.value.exit_code, failed.value.exit_code) == (6, 5)


def test_the_whole_command_says_the_same_and_keeps_the_traceback_for_the_log(folder):
    """In a process of its own, where everything that any library prints is seen."""
    text = HEAD + SFT + DUEL.replace("rewards.py:score", "rewards.py:raises", 1)
    ended = subprocess.run(
        [sys.executable, "-m", "rlhf.cli", *arguments(text)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
    )
    message = checked(5, ended.returncode, ended.stdout, ended.stderr)
    assert message.startswith(
        f"stage duel, after step 3: {folder / 'rewards.py'}:6: raises() raised KeyError: 'quality'"
    )
    assert "sft: done in" in ended.stdout
    assert "Traceback" in (folder / "out" / "logs" / "run.log").read_text()
