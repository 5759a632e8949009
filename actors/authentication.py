"""Ray's token authentication: what a cluster asks for, and what this process shows it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

import grpc
from ray._common.tls_utils import load_certs_from_env
from ray._raylet import AuthenticationTokenLoader, Config
from ray.exceptions import AuthenticationError

from rlhf.errors import ResourceError

ANSWER_S = 10.0
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
KUBERNETES = "RAY_ENABLE_K8S_TOKEN_AUTH"
"""With it Ray asks Kubernetes whether a token is good, instead of comparing it with its own."""
BREAKPOINT = "PYTHONBREAKPOINT"
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""The request behind `ray health-check`."""
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
SILENCE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class RayVariables:
    """Environment variables that Ray reads, set for as long as this process is connected and put back after it."""

    def __init__(self) -> None:
        self.before: dict[str, str | None] = {BREAKPOINT: os.environ.get(BREAKPOINT)}  # ray.init sets it

    def set(self, values: Mapping[str, str | None]) -> None:
        """Set variables, None to remove one, and have Ray read its settings and token again."""
        for name, value in values.items():
            self.before.setdefault(name, os.environ.get(name))
            _put(name, value)
        _read_again()

    def restore(self) -> None:
        """Put back what was there before."""
        for name, value in self.before.items():
            _put(name, value)
        self.before.clear()
        _read_again()


def fresh_token() -> dict[str, str | None]:
    """Return the variables with which a new Ray demands a token of its own, whatever the environment says."""
    return {MODE: "token", TOKEN: secrets.token_hex(32), TOKEN_PATH: None, KUBERNETES: None}


def token_found() -> bool:
    """Return whether there is a token to show: in the environment, in the file it names, or in ~/.ray/auth_token.

    ResourceError where a token file that the environment names cannot be read.
    """
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        return bool(loader.has_token(ignore_auth_mode=True))
    except AuthenticationError as error:
        raise ResourceError(f"cannot read Ray's token: {next(iter(str(error).splitlines()), '')}") from error


def token_header() -> dict[str, str]:
    """Return the header that shows this machine's token, nothing where there is none."""
    if not token_found():
        return {}
    return dict(AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True))


def asks_token(address: str) -> bool | None:
    """Ask the head at `host:port`, without a token, whether it is alive: True when it refuses to say.

    None when the answer tells nothing; ResourceError when no Ray answers within `ANSWER_S`.
    """
    with _channel(address) as channel:
        try:
            channel.unary_unary(ALIVE)(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            if error.code() in REFUSALS:
                return True
            if error.code() in SILENCE:
                raise ResourceError(f"no Ray answers: {next(iter(str(error.details()).splitlines()), '')}") from error
            return None
    return False


def _channel(address: str) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address, options)
    chain, key, authority = load_certs_from_env()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, chain), options)


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _read_again() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
