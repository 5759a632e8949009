"""Hands a recipe to a running cluster through Ray's job server, and follows it there to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from rlhf.errors import RecipeError, ResourceError, TrainingError
from rlhf.recipe.upload import Upload

ANSWER_S = 10.0
STEP_S = 120
"""How long a run that is stopped may take to finish its step and save; Ray's own patience is 3 s."""
STOP_S = STEP_S + 60.0
LOOK_EVERY_S = 0.5
SHOW_FILES = 8
STOPPED = 143
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NO_COMMAND = (126, 127)
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
RUNS = '"${RLHF_RUNS:-$HOME/runs}"'
ENVIRONMENT = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")

Say = Callable[[str], None]

for noisy in ("dashboard_sdk", "job.sdk"):  # Ray's client sets its own level
    logging.getLogger(f"ray.dashboard.modules.{noisy}").setLevel(logging.WARNING)


class Job:
    """A run that was handed to a cluster; its id is what `ray job` calls the submission id."""

    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self.client = client
        self.name = name

    def follow(self, say: Say) -> int:
        """Pass on what the run prints until it ends, and return its exit code."""
        asyncio.run(self._follow(say))
        return self._exit_code()

    def stop(self) -> None:
        """Ask the run to end, and wait until it has; it is killed where it does not."""
        self.client.stop_job(self.name)
        self._ended(STOP_S)

    async def _follow(self, say: Say) -> None:
        async for text in self.client.tail_job_logs(self.name):
            say(text)

    def _exit_code(self) -> int:
        details = self._ended(STOP_S)
        code = details.driver_exit_code
        if details.status == JobStatus.STOPPED:
            return STOPPED
        if code in NO_COMMAND:
            raise ResourceError(
                f"job {self.name}: the cluster has no rlhf on its PATH; install it on the head, in the environment that"
                " `ray start` runs in"
            )
        if code is None:
            raise TrainingError(f"job {self.name}: {_first_line(details.message or 'ended without an exit code')}")
        return code if code >= 0 else 128 - code

    def _ended(self, timeout_s: float) -> JobDetails:
        """Return the job when it has ended; its logs end a moment before its status says so."""
        ends = time.monotonic() + timeout_s
        while (details := self.client.get_job_info(self.name)).status not in ENDED:
            if time.monotonic() > ends:
                raise TrainingError(f"job {self.name} is still {details.status} after {timeout_s:.0f} s")
            time.sleep(LOOK_EVERY_S)
        return details


def submit(address: str, upload: Upload, output: str, name: str, say: Say) -> Job:
    """Upload the files and start `rlhf run` on the cluster behind `address`; returns at once.

    `output` is a run folder on the cluster; a relative one is made under RLHF_RUNS there. RecipeError when the upload
    is too large, ResourceError when there is no cluster at the address or it refuses.
    """
    if not re.fullmatch(NAME, name):
        raise RecipeError(f"--name {name}: must be letters, digits, '.', '_' and '-'")
    check_answers(address)
    job = f"{name}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="rlhf-submit-") as folder:
        archive = Path(folder) / "recipe.zip"
        upload.write(archive)
        check_size(upload, archive.stat().st_size)
        for line in describe(upload, archive.stat().st_size):
            say(line + "\n")
        say(f"job {job}\n")
        for variable in ENVIRONMENT:  # Ray's client would put these before the address it is given
            os.environ.pop(variable, None)
        try:
            client = JobSubmissionClient(address)
            client.submit_job(
                entrypoint=command(upload.recipe, upload.overrides, output),
                submission_id=job,
                runtime_env={"working_dir": str(archive), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STEP_S)}},
                metadata={"job_name": name},
            )
        except (RuntimeError, ConnectionError, AuthenticationError, OSError) as error:
            raise ResourceError(f"{address} did not take the job: {_first_line(str(error))}") from error
    return Job(client, job)


def check_answers(address: str) -> None:
    """Raise ResourceError unless a Ray job server answers at the address within 10 s, and lets us in."""
    where = "give the head's job server, http://HEAD:8265, and start the head with a dashboard"
    try:
        # Reads are bounded one by one, so the whole is bounded by the socket's silence.
        answer = httpx.get(
            f"{address.rstrip('/')}/api/version", headers=get_auth_headers_if_auth_enabled({}), timeout=ANSWER_S
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = _first_line(str(error)) or type(error).__name__
        raise ResourceError(
            f"no Ray job server answers at {address} within {ANSWER_S:.0f} s: {why}; {where}"
        ) from error
    if answer.status_code in (401, 403):
        raise ResourceError(f"{address} wants a token that this is not: set RAY_AUTH_TOKEN to the cluster's")
    try:
        answer.raise_for_status().json()["ray_version"]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise ResourceError(
            f"what answers at {address} is no Ray job server ({answer.status_code}); {where}"
        ) from error


def check_size(upload: Upload, packed: int, limit: int = DASHBOARD_CLIENT_MAX_SIZE) -> None:
    """Raise RecipeError when the archive is larger than Ray's job server takes."""
    if packed <= limit:
        return
    name, file = max(upload.files.items(), key=lambda item: item[1].stat().st_size)
    raise RecipeError(
        f"the recipe's files make an upload of {_mib(packed)}, and Ray takes {_mib(limit)}: the largest is {name}"
        f" ({_mib(file.stat().st_size)}). Put it on storage that the cluster reads, and run there: rlhf run on the head"
    )


def describe(upload: Upload, packed: int) -> list[str]:
    """Return what is uploaded, for people: the largest files first."""
    by_size = sorted(upload.files.items(), key=lambda item: -item[1].stat().st_size)
    lines = [f"uploading {len(by_size)} files, {_kib(upload.size)} ({_kib(packed)} packed):"]
    lines += [f"  {name} {_kib(file.stat().st_size)}" for name, file in by_size[:SHOW_FILES]]
    if len(by_size) > SHOW_FILES:
        lines.append(f"  and {len(by_size) - SHOW_FILES} smaller ones")
    lines += [f"not uploaded, must be on the cluster under the same path: {path}" for path in upload.models]
    lines.append("no environment variable goes with it: the run has those that the head was started with")
    return lines


def command(recipe: str, overrides: Sequence[str], output: str) -> str:
    """Return the shell command of the run; `exec` lets its exit code and signals through."""
    run = ["exec", "rlhf", "run", shlex.quote(recipe)]
    for override in overrides:
        run += ["--set", shlex.quote(override)]
    folder = shlex.quote(output) if output.startswith("/") else f"{RUNS}/{shlex.quote(output)}"
    return " ".join([*run, "--output", folder])


def _first_line(text: str) -> str:
    """Return the first line that says something; Ray's job server puts tracebacks before it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not re.match(r"Request failed with status code|Traceback|File ", line)]
    return next(iter(said or lines), "")


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _kib(size: int) -> str:
    return f"{size / 2**10:.1f} KiB"
