"""A new environment with the project as a wheel and the packages of locks, made in seconds.

The packages are links to those of the environment that runs the tests, each line of the locks and nothing else: what
is not locked is not there, nor is the clone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from commands import environment
from lock_closure import locked

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("rlhf", "actors", "recipes", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Fresh:
    """An environment in a folder; `cache` is where models are kept."""

    folder: Path
    cache: Path

    def command(self, *arguments: str) -> list[str]:
        """Return a call of its `rlhf`."""
        return [str(self.folder / "bin" / "rlhf"), *arguments]

    def variables(self) -> dict[str, str]:
        """Return the variables of the tests without those that lead back to the clone or its environment."""
        kept = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = os.pathsep.join((str(self.folder / "bin"), *os.defpath.split(os.pathsep)))
        return kept | {"PATH": path, "RLHF_CACHE": str(self.cache)}

    def run(self, *arguments: str, cwd: Path, asked: str = "") -> subprocess.CompletedProcess[str]:
        """Run `rlhf` in a process of its own, outside the clone; `asked` is its input."""
        return subprocess.run(
            self.command(*arguments), cwd=cwd, env=self.variables(), input=asked, capture_output=True, text=True
        )


def build_wheel(folder: Path) -> Path:
    """Build the project's wheel in a folder, from a copy of what it is built from."""
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    _pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path, *locks: str) -> Fresh:
    """Make an environment with a wheel and the packages of these locks of `cluster/`."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    for name in locked(*locks):
        _link(name, Path(packages))
    _pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    return Fresh(folder, folder / "cache")


def _link(name: str, packages: Path) -> None:
    """Link what a package has at the top of its folder; several may share a namespace there."""
    found = distribution(name)
    assert found.files, name
    for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
        target = Path(str(found.locate_file(top)))
        if target.exists() and not (packages / top).exists():
            (packages / top).symlink_to(target)


def _pip(*arguments: str) -> None:
    """Run the pip of this environment, whose own settings and place of installation it ignores."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", *arguments],
        capture_output=True, text=True, env=variables,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
