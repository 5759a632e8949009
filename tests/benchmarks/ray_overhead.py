"""How many milliseconds of a PPO step are Ray's: calls, pickling and the object store, with roles that do no work.

    python -m tests.benchmarks.ray_overhead [--steps 50] [--replicas 1 2 4 8 16] [--ranks 1 2 4 8] [--json out.json]

One step makes the calls of `rlhf.stages.online` for PPO, with its faces and payloads: generate, logprobs of policy and
reference, scores, values, train policy and critic, publish. The roles answer at once; publishing makes every
call of a weight transfer but moves four bytes. The same steps in one process show what is not Ray's, and the
same calls with no arguments and no values what Ray takes at the least. Growth is that of
the whole step with more rollout replicas, and with more ranks of the policy, at the same batch. Times are rough where
the machine is shared; Ray's workers run at niceness 0 here, not at its default of 15.
"""

from __future__ import annotations

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

from actors.dispatch import CALLS
from actors.group import RankGroup
from actors.learner import RayModel
from actors.objects import Asked
from actors.rollout import RayRollout, RolloutActor
from actors.weights import publish
from rlhf.engines.served import Transport
from rlhf.engines.shares import Part, assemble, token_scores
from rlhf.recipe.base import ModelJudge, PathData
from rlhf.recipe.online_schema import PpoStage
from rlhf.rewards.model import ModelReward
from rlhf.roles import Ready, Roles, SharedReference, WeightReceipt
from rlhf.stages.estimators import WithCritic
from rlhf.stages.experience import check_rollouts, collect, measure
from rlhf.stages.policy_gradient import objective
from rlhf.types import Experience, Metrics, Prompt, Rollout, Rows, Sampling, TokenBatch
from tests.benchmarks._figures import command_line, give

if TYPE_CHECKING:
    from ray.actor import ActorHandle

SEQUENCES, PROMPT_TOKENS, RESPONSE_TOKENS = 32, 24, 24
PHASES = ("generate", "score", "learn", "publish")
DEADLINE_S = 300.0
WARM_UP = 10

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
    """Answers as a rank of a policy, reference, reward model or critic would, for its share of the rows."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.rank = rank
        rows = list(range(rank, SEQUENCES, ranks))
        width = PROMPT_TOKENS + RESPONSE_TOKENS
        self.sums = Part(rows, torch.zeros(len(rows)))
        self.tokens = Part(rows, torch.zeros(len(rows), width))
        self.both = Part(rows, torch.zeros(len(rows), 2, width))
        self.metrics = Metrics.of(1, **dict.fromkeys(("loss", "ratio", "approx_kl", "clip_fraction", "norm"), 0.0))

    def build(self) -> int:
        return os.getpid()

    def meeting_point(self) -> tuple[str, int]:
        return "", 0

    def join(self, *group: Any) -> None:
        pass

    def logprobs(self, batch: TokenBatch) -> Part:
        return self.both

    def base_logprobs(self, batch: TokenBatch) -> Part:
        return self.both

    def scores(self, batch: TokenBatch) -> Part:
        return self.sums

    def values(self, batch: TokenBatch) -> Part:
        return self.tokens

    def train(self, batch: Rows, objective: Any, minibatches: Sequence[Sequence[int]], scale: float) -> Metrics:
        return self.metrics

    def publish(self, replicas: list[ActorHandle], version: int, deadline_s: float) -> WeightReceipt:
        return publish(lambda: iter([("w", torch.zeros(1))]), replicas, version, deadline_s, self.rank)


class IdleEngine:
    """Answers as an engine of a replica would."""

    def __init__(self) -> None:
        self.now: tuple[int, str] = 0, ""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        tokens, logprobs = tuple(range(RESPONSE_TOKENS)), (0.0,) * RESPONSE_TOKENS
        return [Rollout(prompt, tokens, logprobs, "an answer", "stop", 0, 1) for prompt in prompts]

    def transport(self) -> Transport:
        return Transport("shared_memory", 1)

    def start_weight_update(self, adapter: dict[str, Any] | None = None) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass

    def update_weight_version(self, version: int, checksum: str) -> tuple[int, str]:
        self.now = version, checksum
        return self.now

    def served(self) -> tuple[int, str]:
        return self.now


class IdleReplica(RolloutActor):
    """A replica with an idle engine."""

    def __init__(self) -> None:
        self.engine: Any = IdleEngine()


class Here:
    """The methods of an idle role as calls that are ready at once."""

    def __init__(self, role: IdleModel | IdleReplica) -> None:
        self.role = role

    def __getattr__(self, method: str) -> Any:
        if method == "publish":
            return lambda engine, version: Ready(WeightReceipt(version, "", 0, 0.0))
        if method == "generate":
            return lambda prompts, sampling, seeds: Ready(
                list(self.role.draw(Asked.of(prompts, sampling, seeds)).rollouts(prompts, seeds))
            )
        combine = {"logprobs": token_scores, "base_logprobs": token_scores, "scores": assemble, "values": assemble}
        if method in combine:
            return lambda batch: Ready(combine[method]([getattr(self.role, method)(batch)]))
        return lambda *arguments: Ready(getattr(self.role, method)(*arguments))


def bundle(policy: Any, reward: Any, critic: Any, rollout: Any) -> tuple[Roles, WithCritic]:
    return Roles(policy, SharedReference(policy), ModelReward(reward, pad_id=0), rollout), WithCritic(critic, STAGE)


def in_ray(replicas: int = 1, ranks: int = 1) -> tuple[Roles, WithCritic]:
    """Start the processes: policy with reference, of so many ranks, reward model, critic, rollout replicas."""

    def model(role: str, ranks: int = 1) -> RayModel:
        actors = [ray.remote(IdleModel).options(num_cpus=0).remote(rank, ranks) for rank in range(ranks)]
        group = RankGroup(role, actors, DEADLINE_S)
        group.building = [actor.build.remote() for actor in actors]
        return RayModel(group)

    kind = ray.remote(concurrency_groups={"generate": CALLS})(IdleReplica)
    engines = [kind.options(num_cpus=0).remote() for _ in range(replicas)]
    return bundle(model("policy", ranks), model("reward"), model("critic"), RayRollout(engines, DEADLINE_S))


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
    estimate = estimator.estimate(scored, kl, STAGE.kl_coef, step=1)
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


class Bare:
    """Answers with nothing; `relay` asks another first, as publishing does."""

    def answer(self) -> None:
        pass

    def relay(self, other: list[ActorHandle]) -> None:
        ray.get(other[0].answer.remote())


def bare(steps: int) -> dict[str, float]:
    """Return the median milliseconds of the same calls with no arguments, no values and nothing of this project."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    policy, reward, critic, replica = (ray.remote(Bare).options(num_cpus=0).remote() for _ in range(4))
    phases = {
        "generate": lambda: [replica.answer.remote()],
        "score": lambda: [actor.answer.remote() for actor in (policy, policy, reward, critic)],
        "learn": lambda: [actor.answer.remote() for actor in (policy, critic)],
        "publish": lambda: [policy.relay.remote([replica])],
    }
    laps: dict[str, list[float]] = {name: [] for name in phases}
    for _ in range(WARM_UP + steps):
        for name, calls in phases.items():
            began = time.perf_counter()
            ray.get(calls())
            laps[name].append(1e3 * (time.perf_counter() - began))
    ray.shutdown()
    middle = {name: statistics.median(values[WARM_UP:]) for name, values in laps.items()}
    return middle | {"step": statistics.median(map(sum, zip(*(v[WARM_UP:] for v in laps.values()), strict=True)))}


def medians(roles: Roles, estimator: WithCritic, steps: int) -> dict[str, float]:
    """Return, after warm-up, the median milliseconds of each phase and of the step, and the step's 90th percentile."""
    laps = [step(roles, estimator, version) for version in range(WARM_UP + steps)][WARM_UP:]
    middle = {name: statistics.median(lap[name] for lap in laps) for name in (*PHASES, "step")}
    return middle | {"step_p90": statistics.quantiles([lap["step"] for lap in laps], n=10)[-1]}


def measured(steps: int, replicas: int = 1, ranks: int = 1) -> dict[str, float]:
    """Return the medians in a Ray of its own."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return medians(*in_ray(replicas, ranks), steps)
    finally:
        ray.shutdown()


def show(title: str, columns: dict[str, dict[str, float]]) -> None:
    """Print a table of phases by column."""
    table = Table("phase", *columns, title=title)
    for name in (*PHASES, "step"):
        table.add_row(name, *(f"{column[name]:.2f}" for column in columns.values()))
    Console().print(table)


def main() -> None:
    """Measure all and print tables, and JSON to a file or the console."""
    arguments = command_line(__doc__)
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--replicas", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    arguments.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8])
    options = arguments.parse_args()
    torch.set_num_threads(1)
    here = medians(*in_process(), options.steps)
    with_ray, floor = measured(options.steps), bare(options.steps)
    results: dict[str, Any] = {"with_ray_ms": with_ray, "without_ray_ms": here, "bare_ray_ms": floor}
    results["ray_ms"] = {name: with_ray[name] - here[name] for name in (*PHASES, "step")}
    title = f"ms of a PPO step, B={SEQUENCES}, T={PROMPT_TOKENS + RESPONSE_TOKENS}"
    show(title, {"with Ray": with_ray, "without": here, "Ray's": results["ray_ms"], "bare calls": floor})
    growth: dict[str, dict[str, dict[str, float]]] = {"replicas": {}, "ranks": {}}
    for kind, counts in (("replicas", options.replicas), ("ranks", options.ranks)):
        for count in counts:
            laps = with_ray if count == 1 else measured(options.steps, **{kind: count})
            growth[kind][str(count)] = {name: laps[name] - here[name] for name in (*PHASES, "step")}
        if counts:
            show(f"Ray's ms by {kind}", growth[kind])
    give(results | {"growth_ms": growth, "steps": options.steps, "cpus": os.cpu_count()}, options.json)


if __name__ == "__main__":
    main()
