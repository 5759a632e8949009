"""The peers' virtual environments: TRL at a fixed release over the very torch and transformers that we use."""

from __future__ import annotations

import site
import subprocess
import sys
import venv
from pathlib import Path

DEFAULT_CACHE = Path.home() / ".cache" / "rlhf" / "peers"


def peer_python(version: str, cache: Path) -> Path:
    """Return the interpreter of an environment with `trl==version`, made if it is not there.

    Its own packages come first and ours after them, so TRL is its own and torch, transformers, accelerate and datasets
    are the same builds on both sides (TRL 1.12 and 1.16 only ask for lower versions than ours).
    """
    folder = cache / f"trl-{version}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, clear=True, with_pip=False)
        packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (packages / "ours.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
        subprocess.run([*pip, "--quiet", "--no-deps", "--force-reinstall", f"trl=={version}"], check=True)
        found = subprocess.run([python, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True)
        if found.stdout.strip() != version:
            raise RuntimeError(f"{python} has not trl {version} but {found.stdout.strip() or found.stderr.strip()}")
        ready.touch()
    return python
