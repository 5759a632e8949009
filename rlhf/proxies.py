"""Which proxy of the environment a request goes through: never one to this machine or its link."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

import httpx

from rlhf.errors import ResourceError
from rlhf.untrusted import keep_secret, printable

log = logging.getLogger("rlhf")
HOSTS = Path("/etc/hosts")
SCHEMES = ("http", "https", "socks5", "socks5h")
Address = IPv4Address | IPv6Address


def is_local(host: str) -> bool:
    """Return whether a host is this machine or on its link by what it is called, in any notation of an address."""
    name = host.strip("[]").partition("%")[0].rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and _stays(address)


def proxy_for(url: str) -> str | None:
    """Return the proxy of the environment for a URL, None for the direct way; a proxy is logged once for each host.

    Requests to loopback and link-local addresses are direct, and so are those to names that this machine's hosts file
    gives such addresses alone (DNS is not asked: only the proxy may know other names). For all others `HTTP_PROXY`,
    `HTTPS_PROXY` and `ALL_PROXY` hold, except for the hosts in `NO_PROXY`: suffixes of names, addresses or networks.
    ResourceError where the proxy cannot be used.
    """
    try:
        target = httpx.URL(url)
    except httpx.InvalidURL:
        return None  # the request says why
    known = getproxies()
    proxy = known.get(target.scheme) or known.get("all")
    host = target.host
    if not proxy or is_local(host) or _excepted(host, target.port, known.get("no", "")) or _named_here(host):
        return None
    checked = _usable(proxy if "://" in proxy else f"http://{proxy}")
    _say(host, f"{checked.scheme}://{checked.netloc.decode('ascii', 'replace').rpartition('@')[2]}")
    return str(checked)


def bypass(url: str) -> None:
    """Have libraries that read the environment themselves reach a local host directly, in the rest of this process."""
    host = httpx.URL(url).host
    if is_local(host) or _named_here(host):
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), host)))


def _address(name: str) -> Address | None:
    try:
        found = ip_address(name)
    except ValueError:
        try:
            return IPv4Address(socket.inet_aton(name))  # 127.1, 0x7f000001
        except OSError:
            return None
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found


def _stays(address: Address) -> bool:
    return address.is_loopback or address.is_link_local or address.is_unspecified


def _named_here(host: str) -> bool:
    """Return whether the hosts file knows a name, and nothing but local addresses for it."""
    try:
        lines = HOSTS.read_text(errors="replace").splitlines()
    except OSError:
        return False
    rows = [line.partition("#")[0].lower().split() for line in lines]
    found = [_address(row[0].partition("%")[0]) for row in rows if host.rstrip(".").lower() in row[1:]]
    return bool(found) and all(address is not None and _stays(address) for address in found)


def _excepted(host: str, port: int | None, exceptions: str) -> bool:
    """Return whether `NO_PROXY` names a host; the standard library knows names, with and without a port."""
    if proxy_bypass(host) or (port is not None and proxy_bypass(f"{host}:{port}")):
        return True
    address = _address(host)
    return address is not None and any(_within(address, one.strip()) for one in exceptions.split(","))


def _within(address: Address, network: str) -> bool:
    try:
        return address in ip_network(network.strip("[]"), strict=False)
    except ValueError:
        return False


def _usable(proxy: str) -> httpx.URL:
    try:
        found = httpx.URL(proxy)
    except httpx.InvalidURL as error:
        raise ResourceError(f"the environment's proxy is no URL: {printable(str(error))}") from None
    if found.password:
        keep_secret(found.password)
    if found.scheme not in SCHEMES or not found.host:
        raise ResourceError(f"the environment's proxy is of a kind that is not known: {printable(found.scheme)}")
    if found.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ResourceError("the environment's proxy speaks SOCKS: pip install 'httpx[socks]', or set NO_PROXY")
    return found


@cache
def _say(host: str, proxy: str) -> None:
    log.warning("%s is asked through the proxy %s of the environment", printable(host), printable(proxy))
