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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from actors.authentication import MODE, RayVariables, token_header
from rlhf.errors import RecipeError, ResourceError, TrainingError
from rlhf.proxies import bypass, proxy_for
from rlhf.recipe.upload import Upload

ANSWER_S = 10.0
STEP_S = 120
"""How long a run that is stopped may take to finish its step and save; Ray's own patience is 3 s."""
STOP_S = STEP_S + 60.0
LOOK_EVERY_S = 0.5
UNPACKED = 20
"""An upload may be so many times its limit before it is packed; text seldom packs better."""
STOPPED = 143
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NO_COMMAND = (126, 127)
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
RUNS = '"${RLHF_RUNS:-$HOME/runs}"'
REFUSED = (401, 403)
REMEDY = "Put it on storage that the cluster reads, and run there: rlhf run on the head"
ENVIRONMENT = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")

Say = Callable[[str], None]

for noisy in ("dashboard_sdk", "job.sdk"):  # Ray's client sets its own level
    logging.getLogger(f"ray.dashboard.modules.{noisy}").setLevel(logging.WARNING)


class Job:
    """A run that was handed to a cluster; its id is what `ray job` calls the submission id."""

    def __init__(self, client: JobSubmissionClient, name: str, shows_token: bool) -> None:
        self.client = client
        self.name = name
        self.shows_token = shows_token

    def follower(self, address: str) -> str:
        """Return the shell command that follows it."""
        mode = "token" if self.shows_token else "disabled"
        return f"{MODE}={mode} ray job logs --follow --address {shlex.quote(address)} {self.name}"

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
    check_unpacked(upload)
    asks = check_answers(address)
    RayVariables().set({MODE: "token" if asks else "disabled"})
    if not asks:
        say("warning: this Ray cluster has no token authentication: anyone who reaches it can run code on it\n")
    bypass(address)
    job = f"{name}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="rlhf-submit-") as folder:
        archive = Path(folder) / "recipe.zip"
        upload.write(archive)
        check_size(upload, archive.stat().st_size)
        for line in describe(upload, archive.stat().st_size):
            say(f"{line}\n")
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
    return Job(client, job, asks)


def check_answers(address: str) -> bool:
    """Return whether the cluster behind the address wants a token; it is shown one only after it has asked for it.

    ResourceError unless a Ray job server answers within 10 s, and lets us in.
    """
    where = "give the head's job server, http://HEAD:8265, and start the head with a dashboard"
    try:
        proxy = proxy_for(address)
        answer = _version(address, {}, proxy)
        if asks := answer.status_code in REFUSED:
            answer = _version(address, token_header(), proxy)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = _first_line(str(error)) or type(error).__name__
        raise ResourceError(
            f"no Ray job server answers at {address} within {ANSWER_S:.0f} s: {why}; {where}"
        ) from error
    if answer.status_code in REFUSED:
        raise ResourceError(f"{address} wants a token that this is not: set RAY_AUTH_TOKEN to the cluster's")
    try:
        answer.raise_for_status().json()["ray_version"]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise ResourceError(
            f"what answers at {address} is no Ray job server ({answer.status_code}); {where}"
        ) from error
    return asks


def _version(address: str, headers: Mapping[str, str], proxy: str | None) -> httpx.Response:
    # Reads are bounded one by one, so the whole is bounded by the socket's silence.
    url = f"{address.rstrip('/')}/api/version"
    return httpx.get(url, headers=dict(headers), timeout=ANSWER_S, proxy=proxy, trust_env=False)


def check_unpacked(upload: Upload, limit: int = UNPACKED * DASHBOARD_CLIENT_MAX_SIZE) -> None:
    """Raise RecipeError, before a file is read, when packing cannot make the files small enough."""
    if upload.size > limit:
        raise RecipeError(
            f"the recipe's files have {_mib(upload.size)}, too much to upload: the largest are {upload.largest()}."
            f" {REMEDY}"
        )


def check_size(upload: Upload, packed: int, limit: int = DASHBOARD_CLIENT_MAX_SIZE) -> None:
    """Raise RecipeError when the archive is larger than Ray's job server takes."""
    if packed > limit:
        raise RecipeError(
            f"the recipe's files make an upload of {_mib(packed)}, and Ray takes {_mib(limit)}: the largest are"
            f" {upload.largest()}. {REMEDY}"
        )


def describe(upload: Upload, packed: int) -> list[str]:
    """Return what is uploaded, for people: every file, the largest first."""
    return [
        *upload.describe(),
        f"packed: {packed / 2**10:.1f} KiB",
        "no environment variable goes with it: the run has those that the head was started with",
    ]


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
