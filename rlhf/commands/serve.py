"""`rlhf serve`: finished stages behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import ExitStack

import click

from rlhf.command import quiet_libraries, reports_errors
from rlhf.untrusted import echo
from rlhf.waiting import waiting


@click.command()
@click.argument("models", metavar="RUN/STAGE...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--api-key-env", metavar="VAR", help="The variable with the key that requests must show.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; all cores otherwise.")
@click.option("--max-length", type=click.IntRange(8), help="Tokens of prompt and answer; what the model has otherwise.")
@click.option(
    "--ready-timeout",
    default=900.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Seconds that vLLM may show no progress until it is ready.",
)
@reports_errors
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    api_key_env: str | None,
    threads: int | None,
    max_length: int | None,
    ready_timeout: float,
) -> None:
    """Serve stages (or model folders) with vLLM, each under its name, until Ctrl-C.

    LoRA stages that began with the same model are served by one engine, as adapters of that model.
    """
    quiet_libraries()
    key = read_key(api_key_env)
    with waiting(f"reading {', '.join(models)}"):
        from rlhf.export.source import find_models
        from rlhf.interrupts import Interrupted, Interrupts
        from rlhf.serving.plan import plan_serving
        from rlhf.serving.server import Endpoint, Limits, free_port, running

        endpoint = Endpoint(host, free_port(host, port), key)
        if not endpoint.on_loopback:
            _check_open(host, key)
        serving = plan_serving(find_models(models))
    limits = Limits(threads or len(os.sched_getaffinity(0)), max_length, ready_timeout)
    names = ", ".join(serving.names)
    echo(f"starting vLLM with {names} ...")
    try:
        with Interrupts(), ExitStack() as stack:
            with waiting(f"vLLM loads {names}"):
                server = stack.enter_context(running(serving, endpoint, limits))
            echo(f"ready: {endpoint.url}  models: {names}")
            echo(_example(endpoint.url, serving.names[-1], api_key_env))
            server.wait()
    except Interrupted as stop:
        echo("stopped")
        sys.exit(stop.exit_code)


def read_key(variable: str | None) -> str:
    """Return the key in a variable, "" where none is named; RecipeError where it is not set."""
    from rlhf.errors import RecipeError
    from rlhf.untrusted import keep_secret

    if variable is None:
        return ""
    if not (key := os.environ.get(variable, "").strip()):
        raise RecipeError(f"--api-key-env {variable}: the variable is not set")
    keep_secret(key)
    return key


def _check_open(host: str, key: str) -> None:
    from rlhf.errors import RecipeError

    if not key:
        raise RecipeError(
            f"--host {host} lets other machines in: give --api-key-env VAR with a key that requests must show"
        )
    echo(f"warning: {host} is reachable from other machines; the key and all texts travel unencrypted", err=True)


def _example(url: str, name: str, key: str | None) -> str:
    import json

    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    shown = f' -H "Authorization: Bearer ${key}"' if key else ""
    return f"curl {url}/chat/completions -H 'Content-Type: application/json'{shown} -d {shlex.quote(body)}"
