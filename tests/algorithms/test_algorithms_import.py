import pkgutil
import subprocess
import sys

import rlhf.algorithms

HEAVY = ("ray", "vllm", "deepspeed", "transformers", "datasets", "peft", "pydantic")


def test_importing_the_algorithms_loads_torch_only():
    modules = [f"rlhf.algorithms.{module.name}" for module in pkgutil.iter_modules(rlhf.algorithms.__path__)]
    assert len(modules) > 5
    script = "import sys, importlib\n"
    script += f"for name in {modules!r}: importlib.import_module(name)\n"
    script += "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    loaded = done.stdout.split()
    assert "torch" in loaded
    assert not set(HEAVY) & set(loaded)
