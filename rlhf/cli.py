"""The `rlhf` command. Everything heavy is imported inside the commands."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlhf import __version__
from rlhf.bench.figures import PARTS
from rlhf.command import MAX_LINES, quiet_libraries, reports_errors, takes_recipe
from rlhf.commands.cache import cache
from rlhf.commands.chat import chat
from rlhf.commands.eval import evaluate
from rlhf.commands.export import export
from rlhf.commands.init import init
from rlhf.commands.runs import runs
from rlhf.commands.serve import serve
from rlhf.commands.status import status
from rlhf.errors import DataError
from rlhf.untrusted import echo, printable
from rlhf.waiting import waiting

if TYPE_CHECKING:
    from rlhf.recipe.load import LoadedRecipe

PLAN_WIDTH = 100
TERMINATED = 143


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rlhf")
def main() -> None:
    """Take a base language model through SFT, preference data, reward model, PPO and DPO, and say who won."""


@main.command()
@takes_recipe
@click.option("--local", is_flag=True, help="Run every role in this process, without Ray.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="The run folder.")
@click.option("--restart", multiple=True, metavar="STAGE", help="Begin an interrupted or finished stage again.")
def run(loaded: LoadedRecipe, local: bool, output: Path | None, restart: tuple[str, ...]) -> None:
    """Run the stages of RECIPE: those done and unchanged are reused, an interrupted one goes on where it was."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    echo(f"{loaded.recipe.name}: reading the model and the data")
    from dataclasses import replace

    from rlhf.backend import launcher
    from rlhf.recipe_run import run_recipe

    if local:
        loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"backend": "local"}))
    run_recipe(loaded, launcher(loaded.recipe), output, restart=restart)


@main.command()
@takes_recipe
def validate(loaded: LoadedRecipe) -> None:
    """Check RECIPE and the files it names, and start nothing."""
    stages = " -> ".join(stage.name for stage in loaded.recipe.stages)
    echo(f"OK {loaded.recipe.name}: {stages}")
    if loaded.recipe.model.dtype == "bfloat16" and loaded.recipe.ray.address is None:
        with waiting("measuring this machine"):
            from rlhf.recipe.dtype import Here, decide

            warnings = decide(loaded.recipe, Here()).warnings
        for text in warnings:
            echo(f"warning: {loaded.located(text)}", err=True)


@main.command()
@takes_recipe
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--gpu", metavar="NAME", help="Plan for GPUs of this kind, wherever they are: h100-80gb, l4-24gb, ...")
def plan(loaded: LoadedRecipe, as_json: bool, gpu: str | None) -> None:
    """Print what RECIPE will do: stages, roles, batches, memory, time; fail when it does not fit."""
    import json
    from dataclasses import asdict, replace

    from rlhf.errors import ResourceError
    from rlhf.recipe.devices import local_device, named_device
    from rlhf.recipe.dtype import Here, decide
    from rlhf.recipe.host_fit import check_caches, check_main_memory
    from rlhf.recipe.plan import check_lengths, look_up, make_plan
    from rlhf.recipe.plan_table import render_plan
    from rlhf.recipe.resources import check_fits, local_resources
    from rlhf.recipe.seeds import expand_seeds
    from rlhf.recipe.vllm_build import check_engines
    from rlhf.run_folder import kept_dtype, run_place
    from rlhf.terminal import Terminal

    planned = named_device(gpu) if gpu else None
    with waiting("reading the model and the data, measuring this machine"):
        resources = local_resources()
        decision = decide(loaded.recipe, Here(resources.gpus, planned), kept_dtype(run_place(loaded.recipe)))
        loaded = replace(loaded, recipe=decision.recipe)
        recipe = expand_seeds(loaded.recipe)
        known = look_up(recipe)
        made = make_plan(loaded, resources, planned or local_device(), search=True, known=known)
    made = replace(made, notes=decision.notes, warnings=(*decision.warnings, *made.warnings))
    if as_json:
        echo(json.dumps(asdict(made), indent=2))
    else:
        console = Terminal()
        console.width = max(console.width, PLAN_WIDTH)
        console.print(render_plan(made))
    check_lengths(recipe, known.shapes.base)
    if loaded.recipe.ray.address is None and gpu is None:
        check_fits(loaded.recipe, resources)
        check_caches(recipe, known.shapes, known.measured)
        check_main_memory(recipe, known.shapes, known.measured, resources.memory_bytes)
        if loaded.recipe.backend == "ray":
            check_engines(loaded.recipe)
    if made.fit and made.fit.problems:
        helps = f"; would help: {made.remedies[0]}" if made.remedies else ""
        raise ResourceError(made.fit.problems[0] + helps)


@main.command()
@takes_recipe
@click.option("--address", required=True, metavar="URL", help="The cluster's job server: http://HEAD:8265")
@click.option("--name", help="Names the job; the recipe's name otherwise.")
@click.option("--output", help="The run folder on the cluster; a relative one is made under RLHF_RUNS or ~/runs there.")
@click.option("--wait/--no-wait", default=True, help="Follow the run and return its exit code, or return at once.")
@click.option("--dry-run", is_flag=True, help="List every file that would be uploaded, and do nothing.")
def submit(loaded: LoadedRecipe, address: str, name: str | None, output: str | None, wait: bool, dry_run: bool) -> None:
    """Upload RECIPE with its local files to a running Ray cluster and run it there."""
    from rlhf.recipe.upload import collect

    recipe = loaded.recipe
    folder = output or str(recipe.output_dir / recipe.name if recipe.output_dir.is_absolute() else recipe.name)
    upload = collect(loaded)

    def say(text: str) -> None:
        echo(text.replace("\r\n", "\n"), nl=False)

    if dry_run:
        say("".join(f"{line}\n" for line in upload.describe()))
        return
    from actors.submit import submit

    job = submit(address, upload, folder, name or recipe.name, say)
    if not wait:
        say(f"follow it with: {job.follower(address)}\n")
        return
    try:
        code = job.follow(say)
    except KeyboardInterrupt:
        echo(f"stopping {job.name}; once more does not wait for its end", err=True)
        job.stop()
        raise
    sys.exit(code)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The HTML report; the numbers go beside it as JSON.",
)
@reports_errors
def compare(runs: tuple[Path, ...], output: Path) -> None:
    """Compare the candidates of finished RUNS, sampled on the same prompts, in one report."""
    with waiting("reading the samples and resampling them"):
        from rlhf.report.runs import compare_runs
        from rlhf.report.table import comparison_table, verdict
        from rlhf.terminal import Terminal

        comparison = compare_runs(runs, output)
    console = Terminal()
    console.print(comparison_table(comparison))
    console.print(printable(verdict(comparison)), markup=False)
    console.print(f"report: {output}", markup=False, soft_wrap=True)


@main.group()
def checkpoint() -> None:
    """List or verify the states that a run can go on from."""


@checkpoint.command("list")
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@reports_errors
def list_checkpoints(run: Path) -> None:
    """Show the states saved in the run folder RUN: stage, step, age, size, and whether each is whole."""
    from rlhf.report.states import states_table
    from rlhf.terminal import Terminal

    table = states_table(run)
    if table is None:
        echo(f"no states in {run}")
    else:
        Terminal().print(table)


@checkpoint.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@reports_errors
def verify(run: Path) -> None:
    """Compare every state and finished model in the run folder RUN with the hashes taken when it was written."""
    with waiting("reading every file that was hashed"):
        from rlhf.report.states import check_run

        found = check_run(run)
    if found.problems:
        hidden = len(found.problems) - MAX_LINES
        lines = found.problems if hidden <= 0 else [*found.problems[: MAX_LINES - 1], f"and {hidden + 1} more"]
        raise DataError("\n".join(lines))
    echo(f"OK {found.states} states, {found.models} models")


@main.group()
def data() -> None:
    """Look at the data that a recipe reads."""


@data.command()
@click.argument("source", metavar="FILE_OR_RECIPE", type=click.Path(path_type=Path))
@click.option("--model", metavar="M", help="Count tokens with this model's tokenizer; a recipe's own otherwise.")
@click.option("--format", "kind", default="auto", show_default=True, help="The format of a data file, as in a recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@reports_errors
def inspect(source: Path, model: str | None, kind: str, as_json: bool) -> None:
    """Show formats, bad rows, lengths, repeats and one row as it is trained on; fail when a run would."""
    quiet_libraries()
    with waiting("starting"):
        from rlhf.report.inspection import inspect_and_print

    inspect_and_print(source, model, kind, as_json)


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs"), help="Where run folders will be made.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@reports_errors
def doctor(output: Path, as_json: bool) -> None:
    """Check this machine for what makes runs fail or slow: versions, GPUs, threads, memory, disk, Ray."""
    with waiting("looking at this machine"):
        from rlhf.doctor.check import print_checks
        from rlhf.doctor.machine import check_machine

        checks = check_machine(output)
    sys.exit(print_checks(checks, as_json))


@main.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option(
    "--only", multiple=True, type=click.Choice(PARTS), help="Measure this part and its limits; may be repeated."
)
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures there too.")
@reports_errors
def bench(recipe: Path | None, only: tuple[str, ...], output: Path | None) -> None:
    """Measure this machine, or RECIPE's roles on it: products, copies, learners, rollouts, transfer, Ray."""
    quiet_libraries()
    with waiting("starting"):
        from actors.bench import cluster
        from actors.worker import learner_environment
        from rlhf.bench.command import bench as measure_and_print
        from rlhf.bench.measure import Options
        from rlhf.recipe.load import load_recipe

        wanted = load_recipe(recipe, ()).recipe if recipe else None
    parts = [part for part in PARTS if part in only]
    sys.exit(measure_and_print(Options(wanted, parts, learner_environment()), cluster, output))


@main.command()
@reports_errors
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from rlhf.recipe.schema import Recipe

    echo(json.dumps(Recipe.model_json_schema(), indent=2))


for command in (init, status, runs, export, serve, chat, evaluate, cache):
    main.add_command(command)

if __name__ == "__main__":
    main()
