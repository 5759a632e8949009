"""A shorter start: what transformers and PEFT would load besides stays out, and is there for who asks."""

import subprocess
import sys

import pytest

HEAVY = ("sklearn", "scipy", "pandas", "bitsandbytes")


def printed(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("module", ["rlhf.engines.learner", "rlhf.engines.hf_generate", "actors.learner"])
def test_a_role_starts_without_what_it_never_uses(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert printed(code) == ["[]"]


def test_what_was_hidden_can_be_imported_after():
    code = "import rlhf.models, sklearn.metrics, scipy.stats; print(sklearn.metrics.f1_score([1, 0], [1, 0]))"
    assert printed(code) == ["1.0"]


def test_who_has_found_a_package_goes_on_finding_it():
    code = """
from transformers.utils import is_scipy_available, is_sklearn_available
print(is_scipy_available(), is_sklearn_available())
import rlhf.engines.learner
from transformers import AutoModelForCausalLM
"""
    assert printed(code) == ["True True"]


def test_bitsandbytes_is_found_when_it_is_asked_for():
    pytest.importorskip("bitsandbytes")
    code = """
import rlhf.models
from peft.import_utils import is_bnb_4bit_available
from rlhf.models.lean import show_bitsandbytes
print(is_bnb_4bit_available())
show_bitsandbytes()
print(is_bnb_4bit_available())
"""
    assert printed(code) == ["False", "True"]
