"""`rlhf export`: take a finished stage away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlhf.command import quiet_libraries, reports_errors
from rlhf.untrusted import echo
from rlhf.waiting import waiting

if TYPE_CHECKING:
    from rlhf.export.gguf import GgufType
    from rlhf.export.write import Form


@click.command()
@click.argument("stage", metavar="RUN/STAGE", type=click.Path(path_type=Path))
@click.option(
    "--as",
    "form",
    type=click.Choice(("merged", "adapter", "gguf")),
    default="merged",
    show_default=True,
    help="A Hugging Face folder, the adapter alone, or a GGUF file with an Ollama Modelfile.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The folder that is made; <run>-<stage> here otherwise."
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(("bf16", "f16", "f32", "q8_0")),
    default="bf16",
    show_default=True,
    help="How a GGUF file stores the weights.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Load the result and compare its logits with the stage's.",
)
@reports_errors
def export(stage: Path, form: Form, output: Path | None, kind: GgufType, verify: bool) -> None:
    """Copy a finished stage into a folder of its own, verified, with a model card."""
    quiet_libraries()
    with waiting(f"writing {stage} as {form}" + (" and reading it back" if verify else "")):
        from rlhf.export.write import export as export_stage

        made = export_stage(stage, form, kind, output, verify)
    echo(f"verified: {made.verified}" if verify else "not verified")
    echo(f"exported: {made.folder}")
