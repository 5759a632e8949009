"""Ray, the Hugging Face hub and Weights & Biases, as this environment sees them; no secret is ever shown."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

from rlhf.doctor.check import Check

DASHBOARD = 8265
PROBE_S = 2.0
Listener = tuple[str, int]


def token_check(environ: Mapping[str, str], home: Path) -> Check:
    """Say whether Ray shows a token to the cluster that a recipe names; a local Ray of ours makes its own."""
    file = Path(environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    where = "RAY_AUTH_TOKEN" if environ.get("RAY_AUTH_TOKEN") else str(file) if file.is_file() else ""
    mode = environ.get("RAY_AUTH_MODE", "not set")
    found = f"RAY_AUTH_MODE {mode}, token {f'in {where}' if where else 'nowhere'}"
    if mode == "token" and not where:
        return Check("ray token", "fail", found, "export RAY_AUTH_TOKEN, or ray get-auth-token --generate")
    if where == str(file) and file.stat().st_mode & 0o077:
        return Check("ray token", "warn", f"{found}, which others can read", f"chmod 600 {file}")
    if environ.get("RAY_ADDRESS") and not where:
        said = f"RAY_ADDRESS is set; {found}"
        return Check("ray token", "warn", said, "whoever reaches a cluster without a token runs code there: use one")
    return Check("ray token", "ok", found if where else f"{found}; a local Ray gets one of its own")


def dashboard_check(listening: Collection[Listener] | None, asks_token: bool | None) -> Check:
    """Say whether a Ray runs here and who reaches its job server; `asks_token` None: it did not answer."""
    if listening is None:
        return Check("ray here", "ok", "cannot see which ports are open")
    hosts = sorted({host for host, port in listening if port == DASHBOARD})
    if not hosts:
        return Check("ray here", "ok", f"nothing listens on port {DASHBOARD}")
    found = f"a Ray listens on {', '.join(hosts)} port {DASHBOARD}, {_answers(asks_token)}"
    is_open = any(not ip_address(host).is_loopback for host in hosts)
    if asks_token:
        return Check("ray here", "ok", found)
    if is_open and asks_token is False:
        remedy = "whoever reaches this port runs code as you: RAY_AUTH_MODE=token, ray start --dashboard-host 127.0.0.1"
        return Check("ray here", "fail", found, remedy)
    remedy = "every user of this machine runs code as you: start it with RAY_AUTH_MODE=token"
    return Check("ray here", "warn", found, remedy)


def _answers(asks_token: bool | None) -> str:
    return {True: "with a token", False: "without a token", None: "and does not answer"}[asks_token]


def hub_check(environ: Mapping[str, str]) -> Check:
    """Say whether models may be downloaded."""
    flags = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if environ.get(name, "0") not in ("", "0")]
    token = "set" if environ.get("HF_TOKEN") else "not set"
    online = f"{', '.join(flags)}: only models that are here already" if flags else "models are downloaded when missing"
    return Check("hub", "ok", f"{online}; HF_TOKEN {token}")


def wandb_check(environ: Mapping[str, str]) -> Check:
    """Say whether a recipe's `tracking.wandb` goes online."""
    there = bool(environ.get("WANDB_API_KEY"))
    return Check("wandb", "ok", "WANDB_API_KEY set: online" if there else "WANDB_API_KEY not set: offline")


def check_services() -> Iterator[Check]:
    """Check what this environment and machine say of the services."""
    listening = _listening()
    yield token_check(os.environ, Path.home())
    here = any(port == DASHBOARD for _, port in listening or ())
    yield dashboard_check(listening, _asks_token() if here else None)
    yield hub_check(os.environ)
    yield wandb_check(os.environ)


def _listening() -> set[Listener] | None:
    import psutil

    try:
        found = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    return {(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN}


def _asks_token() -> bool | None:
    """Ask the dashboard on loopback for its version, without a token; None when it says something else or nothing."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        direct.open(f"http://127.0.0.1:{DASHBOARD}/api/version", timeout=PROBE_S).close()
    except urllib.error.HTTPError as error:
        return True if error.code in (401, 403) else None
    except OSError:
        return None
    return False
