"""How many milliseconds of a PPO step are Ray's: calls, pickling and the object store, with roles that do no work.

    python -m tests.benchmarks.ray_overhead [--steps 50] [--json out.json]

One step makes the calls of `rlhf.stages.online` for PPO, with its faces and payloads: generate, logprobs of policy and
reference, scores, values, train policy and critic, publish. The roles answer at once; publishing makes every
call of a weight transfer but moves no weights. The same steps in one process show what is not Ray's. Times are rough
where the machine is shared; Ray's workers run at niceness 0 here, not at its default of 15.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("RAY_worker_niceness", "0")  # read when Ray starts

import ray
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from actors.learner import RayModel
from actors.rollout import RayRollout
from actors.weights import ReplicaClient
from rlhf.recipe.base import ModelJudge, PathData
from rlhf.recipe.online_schema import PpoStage
from rlhf.rewards.model import ModelReward
from rlhf.roles import Ready, Roles, SharedReference, WeightReceipt
from rlhf.stages.estimators import WithCritic
from rlhf.stages.experience import check_rollouts, collect, measure
from rlhf.stages.policy_gradient import objective
from rlhf.types import Experience, Metrics, Prompt, Rollout, Rows, Sampling, TokenBatch, TokenScores

if TYPE_CHECKING:
    from ray.actor import ActorHandle

SEQUENCES, PROMPT_TOKENS, RESPONSE_TOKENS = 32, 24, 24
PHASES = ("generate", "score", "learn", "publish")
DEADLINE_S = 60.0
WARM_UP = 10
NO_WEIGHTS: dict[str, Any] = {"names": [], "dtype_names": [], "shapes": [], "checksum": ""}

STAGE = PpoStage(
    name="ppo",
    kind="ppo",
    policy="sft",
    reward=ModelJudge(kind="model", stage="rm"),
    prompts=PathData(path=Path("prompts.jsonl")),
    steps=1,
    prompts_per_step=SEQUENCES,
)
PROMPTS = [Prompt(f"p{row}", tuple(range(100, 100 + PROMPT_TOKENS)), "a question") for row in range(SEQUENCES)]
MINIBATCHES = [list(range(start, start + 16)) for _ in range(2) for start in (0, 16)]


class IdleModel:
    """Answers as a policy, reference, reward model or critic would."""

    def __init__(self) -> None:
        shape = (SEQUENCES, PROMPT_TOKENS + RESPONSE_TOKENS)
        self.zeros = torch.zeros(shape)
        self.token_scores = TokenScores(torch.zeros(shape), torch.zeros(shape))
        self.metrics = Metrics.of(1, **dict.fromkeys(("loss", "ratio", "approx_kl", "clip_fraction", "norm"), 0.0))

    def build(self) -> int:
        return os.getpid()

    def logprobs(self, batch: TokenBatch) -> TokenScores:
        return self.token_scores

    def base_logprobs(self, batch: TokenBatch) -> TokenScores:
        return self.token_scores

    def scores(self, batch: TokenBatch) -> Tensor:
        return self.zeros[:, 0]

    def values(self, batch: TokenBatch) -> Tensor:
        return self.zeros

    def train(self, batch: Rows, objective: Any, minibatches: Sequence[Sequence[int]], scale: float) -> Metrics:
        return self.metrics

    def publish(self, replicas: list[ActorHandle], version: int, deadline_s: float) -> WeightReceipt:
        client = ReplicaClient(replicas, deadline_s)
        client.transport()
        client.init_weight_transfer_engine({})
        client.start_weight_update()
        client.update_weights(NO_WEIGHTS)
        client.finish_weight_update()
        client.served()
        client.update_weight_version(version)
        client.shutdown_weight_transfer_engine()
        return WeightReceipt(version, "", 0, 0.0)


class IdleReplica:
    """Answers as a rollout engine would."""

    def __init__(self) -> None:
        tokens, logprobs = tuple(range(RESPONSE_TOKENS)), (0.0,) * RESPONSE_TOKENS
        self.rollouts = [Rollout(prompt, tokens, logprobs, "an answer", "stop", 0, 1) for prompt in PROMPTS]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        return self.rollouts

    def transport(self) -> tuple[str, int]:
        return "shared_memory", 1

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass

    def served(self) -> tuple[int, str]:
        return 0, ""

    def update_weight_version(self, version: int) -> tuple[int, str]:
        return version, ""

    def shutdown_weight_transfer_engine(self) -> None:
        pass


class Here:
    """The methods of an idle role as calls that are ready at once."""

    def __init__(self, role: IdleModel | IdleReplica) -> None:
        self.role = role

    def __getattr__(self, method: str) -> Any:
        if method == "publish":
            return lambda engine, version: Ready(WeightReceipt(version, "", 0, 0.0))
        return lambda *arguments: Ready(getattr(self.role, method)(*arguments))


def bundle(policy: Any, reward: Any, critic: Any, rollout: Any) -> tuple[Roles, WithCritic]:
    return Roles(policy, SharedReference(policy), ModelReward(reward, pad_id=0), rollout), WithCritic(critic, STAGE)


def in_ray() -> tuple[Roles, WithCritic]:
    """Start four processes: policy with reference, reward model, critic, rollout engine."""

    def model(role: str) -> RayModel:
        actor = ray.remote(IdleModel).options(num_cpus=1).remote()
        return RayModel(actor, role, DEADLINE_S, actor.build.remote())

    replica = ray.remote(IdleReplica).options(num_cpus=1).remote()
    return bundle(model("policy"), model("reward"), model("critic"), RayRollout([replica], DEADLINE_S))


def in_process() -> tuple[Roles, WithCritic]:
    return bundle(Here(IdleModel()), Here(IdleModel()), Here(IdleModel()), Here(IdleReplica()))


def step(roles: Roles, estimator: WithCritic, version: int) -> dict[str, float]:
    """Make one PPO step and return the milliseconds of each phase."""
    marks = [time.perf_counter()]
    seeds = [[version + row] for row in range(SEQUENCES)]
    rollouts = roles.rollout.generate(PROMPTS, Sampling(RESPONSE_TOKENS), seeds).result()
    check_rollouts(rollouts)
    marks.append(time.perf_counter())
    scored = collect(roles, estimator, rollouts, partial(roles.reward.score, rollouts), 0, STAGE)
    measure(scored, compares_samples=False)
    marks.append(time.perf_counter())
    kl = scored.old.logprobs - scored.ref_logprobs
    estimate = estimator.estimate(scored, kl, STAGE.kl_coef)
    experience = Experience(
        scored.batch, scored.scores, kl, scored.old.logprobs, scored.ref_logprobs, estimate.advantages
    )
    updates = [
        roles.policy.train(experience, objective(STAGE, STAGE.kl_coef), MINIBATCHES, 1.0),
        *estimate.update(MINIBATCHES, 0, 1),
    ]
    for update in updates:
        update.result()
    marks.append(time.perf_counter())
    roles.policy.publish(roles.rollout, version).result()
    marks.append(time.perf_counter())
    laps = {name: 1e3 * (marks[i + 1] - marks[i]) for i, name in enumerate(PHASES)}
    return laps | {"step": 1e3 * (marks[-1] - marks[0])}


def medians(roles: Roles, estimator: WithCritic, steps: int) -> dict[str, float]:
    """Return, after warm-up, the median milliseconds of each phase and of the step, and the step's 90th percentile."""
    laps = [step(roles, estimator, version) for version in range(WARM_UP + steps)][WARM_UP:]
    middle = {name: statistics.median(lap[name] for lap in laps) for name in (*PHASES, "step")}
    return middle | {"step_p90": statistics.quantiles([lap["step"] for lap in laps], n=10)[-1]}


def main() -> None:
    """Measure both and print a table, and JSON to a file or the console."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    here = medians(*in_process(), options.steps)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with_ray = medians(*in_ray(), options.steps)
    ray.shutdown()
    results = {"with_ray_ms": with_ray, "without_ray_ms": here}
    results["ray_ms"] = {name: with_ray[name] - here[name] for name in (*PHASES, "step")}
    title = f"ms of a PPO step, B={SEQUENCES}, T={PROMPT_TOKENS + RESPONSE_TOKENS}"
    table = Table("phase", "with Ray", "without", "Ray's", title=title)
    for name in (*PHASES, "step"):
        table.add_row(name, *(f"{results[column][name]:.2f}" for column in results))
    Console().print(table)
    text = json.dumps(results | {"steps": options.steps, "cpus": os.cpu_count()}, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
