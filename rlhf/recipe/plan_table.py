"""The plan as a person reads it in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.recipe.plan import Plan, StagePlan, gib, headline, title

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = ("wts", "grad", "opt", "act", "logit", "KV", "rest", "sum")


def render_plan(plan: Plan) -> RenderableType:
    """Return the plan for a terminal: the headline, warnings, the work of each stage, and who does it."""
    from rich.console import Group
    from rich.text import Text

    largest = max((stage.memory for stage in plan.stages), key=lambda memory: memory.total)
    parts = sorted(largest.parts.items(), key=lambda part: -part[1])
    there = plan.resources
    lines = [
        headline(plan),
        f"model: {plan.model}, {_count(plan.parameters)} parameters in {plan.dtype}",
        *plan.notes,
        f"main memory: about {gib(largest.total)} GiB at once (stage {largest.stage}, {largest.phase}): "
        + ", ".join(f"{name} {gib(size)}" for name, size in parts),
        f"available: {there.cpus:g} CPUs, {there.gpus:g} GPUs, {gib(there.memory_bytes)} GiB",
        *_device_lines(plan),
        *(f"warning: {text}" for text in plan.warnings),
    ]
    return Group(*(Text(line) for line in lines), _work_table(plan), _role_table(plan))


def _device_lines(plan: Plan) -> list[str]:
    """Return what there is to say of the GPUs that are planned for."""
    if plan.device is None or plan.fit is None:
        return []
    name, peak = plan.device.name, plan.fit.peak
    lines = [f"GPU: {name}, {gib(plan.device.memory)} GiB"]
    if peak:
        parts = ", ".join(f"{role} {gib(size)}" for role, size in peak.parts.items())
        lines.append(
            f"fullest GPU: {gib(peak.total)} of {gib(peak.limit)} GiB, stage {peak.stage}, {peak.phase}: {parts}"
        )
    else:
        lines.append("fullest GPU: none, no role asks for one")
    lines += [f"does not fit: {text}" for text in plan.fit.problems]
    lines += [f"would help: {text}" for text in plan.remedies]
    if plan.smallest:
        policy = plan.smallest.roles.get("policy", {})
        ranks = f" (policy ranks {policy.get('ranks', 1)})" if policy else ""
        lines += [f"smallest: {plan.smallest.gpus} x {name}{ranks}, with", *plan.smallest.block().splitlines()]
    elif plan.searched:
        lines.append(f"smallest: none of the layouts up to 64 ranks fits on {name}")
    return lines


def _work_table(plan: Plan) -> RenderableType:
    from rich import box
    from rich.text import Text

    from rlhf.tables import WholeTable

    table = WholeTable("stage", "work", box=box.SIMPLE_HEAD, pad_edge=False)
    for stage in plan.stages:
        figures = [f"{name.replace('_', ' ')} {count:,}" for name, count in stage.schedule.items()]
        table.add_row(Text(title(stage)), ", ".join([*figures, *_step_figures(stage)]))
    return table


def _step_figures(stage: StagePlan) -> list[str]:
    """Return a step's share of each rank, its tokens, and its seconds by phase."""
    figures = []
    if step := stage.step:
        figures.append(
            f"a step on each of {step.ranks} ranks: rows {step.rows_per_rank:,} in passes {step.passes_per_rank:,} "
            f"of tokens {step.tokens_per_pass:,}"
        )
    if online := stage.online:
        figures.append(
            f"tokens a step at most: generated {online.generated_tokens:,}, scored {online.scored_tokens:,}, "
            f"trained {online.trained_tokens:,}"
        )
        if online.seconds:
            laps = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in online.seconds.items())
            figures.append(f"within a factor of two: {laps}")
    return figures


def _role_table(plan: Plan) -> RenderableType:
    from rich import box
    from rich.text import Text

    from rlhf.tables import WholeTable

    caption = (
        "GiB of each process (of an engine: on each GPU) in its fullest phase, with rows as long as the data's on the "
        "CPU and as long as allowed on GPUs; opt: masters and moments, rest: allocator, buffers, CUDA"
    )
    table = WholeTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption)
    table.add_column("stage, role")
    for column in ("n", "GPUs", "thr", "trained", "phase", *COLUMNS):
        table.add_column(column, justify="right")
    for stage in plan.stages:
        table.add_row(Text(title(stage)))
        for role in stage.roles:
            memory = role.memory
            parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits)
            sizes = (*parts, memory.kv_cache, memory.buffers + memory.slack, memory.total)
            counts = (str(role.processes), f"{role.gpus:g}", str(role.threads), _count(role.trainable), role.peak)
            name = f"  {role.role}, {role.tuning}" if role.tuning else f"  {role.role}"
            table.add_row(name, *counts, *(_short(size) for size in sizes))
    return table


def _short(size: int) -> str:
    """Return bytes as GiB in at most four characters, below ten thousand of them."""
    amount = size / 2**30
    return f"{amount:.{2 if amount < 9.995 else 1 if amount < 99.95 else 0}f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f}M" if parameters >= 100_000 else f"{parameters:,}"
