"""The dependency direction of the packages, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYER = {
    "errors": 0, "types": 0, "seeding": 0, "algorithms": 0, "recipe": 1, "models": 2, "data": 2, "roles": 2,
    "rewards": 3, "engines": 4, "progress": 2, "stage_progress": 0, "run_record": 1, "sinks": 3, "tracking": 3,
    "report": 3, "fingerprint": 2, "local": 5, "backend": 6, "starter": 6, "api": 7,
    "export": 6, "serving": 6, "allocator": 0, "installing": 0, "media": 0,
    "activity": 0, "pulse": 0, "patient_lock": 0, "proxies": 1, "privacy": 0, "terminal": 1, "tables": 0,
    "metrics_file": 1, "run_log": 1, "cache": 1, "pruning": 2, "amounts": 0,
    "disk": 1, "journal": 1, "manifest": 1, "checkpoint": 1, "interrupts": 0, "untrusted": 0, "waiting": 7, "stages": 5,
    "run_folder": 6, "stage_places": 1, "done_file": 1, "stage_folder": 6, "stage_run": 6, "recipe_run": 6,
    "doctor": 6, "bench": 6, "command": 6, "commands": 7, "cli": 8,
}  # fmt: skip
# The command line for its own commands, and the backend that a run of it and of the Python API both choose.
ENTRY_POINTS = {"cli.py", "backend.py"}
ALLOWED_UPWARDS = {("recipe", "models"), ("roles", "engines")}


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Return the dotted modules that a file imports at run time (annotations-only blocks left out)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden: set[int] = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy
        if typing_only or function:
            hidden |= {id(child) for child in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT / "rlhf").with_suffix("").parts[0]


@pytest.mark.parametrize("path", sources("rlhf"), ids=lambda p: str(p.relative_to(ROOT)))
def test_rlhf_imports_point_downwards(path):
    own = layer_of(path)
    for module in imports(path, lazy=False):
        parts = module.split(".")
        if parts[0] != "rlhf" or len(parts) == 1 or own in ("__init__",):
            continue
        if (own, parts[1]) in ALLOWED_UPWARDS:
            continue
        assert LAYER[parts[1]] <= LAYER[own], f"{path.name} ({own}) imports {module}"


@pytest.mark.parametrize("path", sources("rlhf"), ids=lambda p: str(p.relative_to(ROOT)))
def test_ray_stays_in_actors(path):
    for module in imports(path):
        top = module.split(".")[0]
        assert top != "ray", f"{path.name} imports ray"
        if top == "actors":
            assert path.relative_to(ROOT / "rlhf").as_posix() in ENTRY_POINTS
            assert not any(m.split(".")[0] == "actors" for m in imports(path, lazy=False))


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("rlhf", {"torch", "transformers", "ray", "vllm", "deepspeed"}),
        ("rlhf.cli", {"torch", "transformers", "ray", "vllm", "deepspeed", "datasets", "plotly"}),
        ("rlhf.recipe.schema", {"torch", "transformers", "ray", "vllm"}),
        ("rlhf.stages.online", {"ray", "vllm", "deepspeed"}),
        ("rlhf.local", {"ray", "vllm", "deepspeed"}),
        ("actors.supervise", {"torch", "transformers", "vllm"}),
        ("actors.dispatch", {"transformers", "peft", "vllm", "deepspeed"}),
    ],
)
def test_import_loads_nothing_heavy(module, banned):
    code = f"import sys, {module}; print(' '.join(m for m in sys.modules if '.' not in m))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not banned & set(out.stdout.split())
