"""Puts secrets into the environment of real runs, good and failing ones, and looks for them in all that is left.

Every byte of the run folders, of what was printed, of Ray's session and logs, of wandb's offline folder, of the caches
and of the home folder is searched, as it is and as base64; so are the command lines of all processes while they run.
"""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.row import Row, only
from tests.rewards.local_server import Answer, LocalServer

COUNT = 7
LONGEST_S = 150.0
LOOK_EVERY_S = 0.2
ROOT = Path(__file__).parents[2]
NAMES = (
    "WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DATABASE_PASSWORD",
    "RAY_AUTH_TOKEN", "JUDGE_ACCESS",
)  # fmt: skip
JUDGE = "JUDGE_ACCESS"
"""What the recipes call the judge's secret: a name that does not look like one."""

ONLINE = """\
name: canary
model: {path: "tiny://llama", dtype: float32}
tuning: {kind: full}
backend: local
roles: {rollout: {engine: transformers}}
stages:
  - name: grpo
    kind: grpo
    policy: base
    reward: REWARD
    prompts: {path: PROMPTS, limit: 4}
    steps: 1
    prompts_per_step: 2
    samples_per_prompt: 2
    minibatch_size: 4
    max_prompt_tokens: 64
    max_response_tokens: 4
"""
BAD_FUNCTION = """\
import os
print(dict(os.environ))
def score(prompt, response, metadata):
    raise RuntimeError(" ".join(os.environ.values())[-400:] + os.environ["HF_TOKEN"])
"""


@dataclass(frozen=True)
class Trial:
    """One run: what `rlhf` is told, the exit codes that are right, and whether its recipe names the judge's secret."""

    arguments: list[str]
    codes: tuple[int, ...]
    judged: bool


Kind = Callable[[Path, ExitStack], Trial]


def _recipe(folder: Path, reward: dict[str, Any]) -> Path:
    text = ONLINE.replace("REWARD", json.dumps(reward))
    text = text.replace("PROMPTS", str(ROOT / "recipes" / "data" / "smoke_prompts.jsonl"))
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def _run(folder: Path, recipe: Path, *more: str, codes: tuple[int, ...] = (0,)) -> Trial:
    arguments = ["run", str(recipe), "--output", str(folder / "run"), "--debug", *more]
    return Trial(arguments, codes, JUDGE in recipe.read_text())


def through_ray(folder: Path, stack: ExitStack) -> Trial:
    """A good run through Ray, its judge behind a URL."""
    server = stack.enter_context(LocalServer(lambda number, body: Answer({"scores": [0.5] * len(body["items"])})))
    judge = {"kind": "http", "url": server.url, "token_env": JUDGE}
    return _run(folder, _recipe(folder, judge), "--set", "backend=ray")


def pipeline(folder: Path, stack: ExitStack) -> Trial:
    """The whole pipeline, recorded by wandb too."""
    sets = ("stages.ppo.steps=1", "tracking.wandb.project=canary")
    more = [item for value in sets for item in ("--set", value)]
    return _run(folder, ROOT / "recipes" / "smoke" / "pipeline.yaml", "--local", *more)


def function(folder: Path, stack: ExitStack) -> Trial:
    """A reward function prints its whole environment, and fails with parts of it."""
    (folder / "bad.py").write_text(BAD_FUNCTION)
    return _run(folder, _recipe(folder, {"kind": "function", "path": "bad.py:score"}), codes=(5,))


def _echo(kind: str) -> Kind:
    def trial(folder: Path, stack: ExitStack) -> Trial:
        def answer(number: int, body: Any) -> Answer:
            said = server.asked[-1].headers["Authorization"]
            return {
                "refused": Answer(f"not allowed: {said}", 403),
                "wrong type": Answer({"scores": [said, said.split()[-1]]}),
                "down": Answer({said: said}, 500, {"Retry-After": "0"}),
                "moved": Answer(said, 302, {"Location": f"http://127.0.0.1:9/?{said.split()[-1]}"}),
                "odd header": Answer(said.encode(), 200, {"Content-Encoding": said}),
                "no json": Answer(said.encode()),
            }[kind]

        server = stack.enter_context(LocalServer(answer))
        judge = {"kind": "http", "url": server.url, "token_env": JUDGE, "deadline_s": 1.0}
        return _run(folder, _recipe(folder, judge), codes=(5,))

    return trial


def wrong_recipe(folder: Path, stack: ExitStack) -> Trial:
    """A recipe that does not hold."""
    return _run(folder, _recipe(folder, {"kind": "http", "url": "http://x", "token": "x"}), codes=(2,))


KINDS: tuple[Kind, ...] = (
    _echo("refused"), function, _echo("wrong type"), through_ray, pipeline, wrong_recipe, _echo("odd header"),
    _echo("down"), _echo("moved"), _echo("no json"),
)  # fmt: skip


def run(count: int, rng: random.Random) -> Row:
    """Make `count` runs, the kinds in turn."""
    counts: Counter[str] = Counter(runs=count, canaries=len(NAMES))
    counts.update({"files searched": 0, "leaked": 0, "wrong exits": 0})
    with tempfile.TemporaryDirectory(prefix="c") as name:
        top = Path(name)
        for number in range(count):
            folder = top / str(number)
            folder.mkdir()
            canaries = {name: f"{rng.getrandbits(160):040x}" for name in NAMES}
            with ExitStack() as stack:
                trial = KINDS[number % len(KINDS)](folder, stack)
                if not trial.judged:
                    del canaries[JUDGE]  # nobody has said that this one is a secret
                shown, code = _ended(folder, trial, canaries)
            if code not in trial.codes:
                counts["wrong exits"] += 1
                print(f"{trial.arguments}: exit {code}\n{(folder / 'printed').read_text(errors='replace')[-2000:]}")
            files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
            counts["files searched"] += len(files)
            found = [*leaks(files, canaries), *(f"a command line: {name}" for name in shown)]
            counts["leaked"] += len(found)
            for line in found:
                print(line)
    passed = not counts["leaked"] and not counts["wrong exits"]
    return Row("secrets in the environment of runs", "0 leaked", dict(counts), passed)


def leaks(files: list[Path], canaries: dict[str, str]) -> Iterator[str]:
    """Yield in words which file, or its name, holds which secret, plain or as base64."""
    for file in files:
        content = file.read_bytes() + os.fsencode(file)
        for name, value in canaries.items():
            forms = (value.encode(), base64.b64encode(value.encode())[:-4])
            if any(form in content for form in forms):
                yield f"{file}: {name}"


def _ended(folder: Path, trial: Trial, canaries: dict[str, str]) -> tuple[set[str], int]:
    """Run `rlhf` to its end; return which secrets stood in a command line meanwhile, and its exit code."""
    places = {name: str(folder / name) for name in ("home", "cache", "ray")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
    environment = kept | canaries | {
        "HOME": places["home"], "RLHF_CACHE": places["cache"], "RAY_TMPDIR": places["ray"], "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    for place in places.values():
        Path(place).mkdir()
    command = [sys.executable, "-m", "rlhf.cli", *trial.arguments]
    with (folder / "printed").open("wb") as printed:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=printed, stderr=printed)
    shown: set[str] = set()
    ends = time.monotonic() + LONGEST_S
    while process.poll() is None and time.monotonic() < ends:
        lines = "\n".join(_command_lines(process.pid))
        shown |= {name for name, value in canaries.items() if value in lines}
        time.sleep(LOOK_EVERY_S)
    if process.poll() is None:
        process.kill()
    return shown, process.wait()


def _command_lines(pid: int) -> Iterator[str]:
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            yield " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    only(run, COUNT)
