"""A shorter start: what transformers and PEFT would load besides stays out, and is there for who asks."""

import subprocess
import sys

import pytest

from rlhf.media import MEDIA

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


@pytest.fixture
def broken_media(tmp_path):
    """Return a path with builds for another torch, which fail as those do."""
    for name in MEDIA:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    return f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"


def test_broken_packages_for_images_and_sound_break_no_model(broken_media):
    code = broken_media + "import rlhf.models; from transformers import AutoModelForCausalLM, LlamaForCausalLM as model"
    assert printed(code + "; print(model.__name__)") == ["LlamaForCausalLM"]


@pytest.mark.vllm
def test_nor_do_they_break_the_engine(broken_media):
    code = broken_media + "from rlhf.media import hide_media; hide_media(); from vllm import LLM; print(LLM.__name__)"
    assert printed(code)[-1] == "LLM"


def test_they_are_found_by_who_has_imported_them_already(broken_media):
    code = "import sys, types; sys.modules['torchaudio'] = mine = types.ModuleType('torchaudio')\n"
    code += "from rlhf.media import hide_media; hide_media(); import torchaudio; print(torchaudio is mine)"
    assert printed(code) == ["True"]
