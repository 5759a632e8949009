"""How near the plan's memory model is to what a process really takes, on the CPU.

    python -m tests.benchmarks.memory_model [--only NAME ...] [--runs 3] [--json out.json]

Each case builds a random Llama, then trains or scores with it in a fresh process with the allocator of a role's
process. Measured is the peak resident size after the model is there, less what was resident before it was built; a
step of a tiny model has come first, so that the libraries are not counted. Loading itself, which maps files, is not in
it. Where the heap's holes fall is a matter of chance (of the addresses that the kernel draws): runs of one case differ,
by some percent where it trains and by up to a half where it scores, as one more copy of the logits finds no hole or
does. So each case runs several times, its median counts, and the table shows the lowest and the highest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich.console import Console
from rich.table import Table

from actors.worker import learner_environment
from rlhf.engines.base import LearnerSpec
from rlhf.engines.learner import ModelLearner
from rlhf.engines.objectives import RewardModel, Sft
from rlhf.models.tiny import byte_tokenizer
from rlhf.recipe.activations import Pass
from rlhf.recipe.base import Optimizer
from rlhf.recipe.memory import Cut, learner_memory
from rlhf.recipe.model_shape import Model, read_shape
from rlhf.recipe.tuning_schema import Full, Lora
from rlhf.types import PreferenceBatch, TokenBatch
from tests.benchmarks._figures import command_line, give

ROOT = Path(__file__).parents[2]
DType = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Shape:
    """A Llama; heads are 64 wide."""

    hidden: int
    layers: int
    kv_heads: int
    vocabulary: int
    tied: bool = True


SMALL = Shape(512, 6, 4, 8192)
WIDE = Shape(768, 8, 4, 16384, tied=False)
WORDY = Shape(512, 6, 8, 49152)
LARGE = Shape(768, 12, 4, 32000)
TINY = Shape(64, 2, 1, 300)


@dataclass(frozen=True)
class Case:
    """One model, one kind of work: `rows` of `width` tokens, `prompt` of them not scored, `budget` tokens a pass."""

    shape: Shape
    dtype: DType
    work: Literal["train", "score", "reward", "value"]
    rows: int
    width: int
    budget: int
    prompt: int = 1
    lora: bool = False
    checkpointing: bool = False
    ragged: bool = False


CASES = {
    "full-fp32": Case(SMALL, "float32", "train", 8, 128, 1024),
    "full-fp32-passes": Case(SMALL, "float32", "train", 16, 128, 512),
    "full-fp32-long": Case(SMALL, "float32", "train", 2, 512, 1024, ragged=True),
    "full-fp32-wide": Case(WIDE, "float32", "train", 4, 128, 512),
    "full-fp32-checkpointed": Case(SMALL, "float32", "train", 4, 512, 2048, checkpointing=True),
    "full-bf16": Case(SMALL, "bfloat16", "train", 16, 128, 2048),
    "full-bf16-passes": Case(LARGE, "bfloat16", "train", 16, 128, 512),
    "full-bf16-long": Case(SMALL, "bfloat16", "train", 4, 512, 2048, ragged=True),
    "full-bf16-checkpointed": Case(WIDE, "bfloat16", "train", 4, 512, 2048, checkpointing=True),
    "lora-fp32": Case(SMALL, "float32", "train", 16, 128, 2048, lora=True),
    "lora-bf16": Case(SMALL, "bfloat16", "train", 32, 128, 4096, lora=True),
    "lora-bf16-large": Case(LARGE, "bfloat16", "train", 8, 256, 2048, prompt=192, lora=True, ragged=True),
    "lora-bf16-words": Case(WORDY, "bfloat16", "train", 16, 128, 2048, prompt=64, lora=True),
    "lora-bf16-long": Case(SMALL, "bfloat16", "train", 4, 512, 2048, lora=True, ragged=True),
    "lora-bf16-checkpointed": Case(LARGE, "bfloat16", "train", 8, 512, 4096, prompt=448, lora=True, checkpointing=True),
    "score-fp32": Case(SMALL, "float32", "score", 16, 256, 4096),
    "score-bf16-words": Case(WORDY, "bfloat16", "score", 32, 128, 4096),
    "score-bf16-large": Case(LARGE, "bfloat16", "score", 16, 256, 4096, prompt=192),
    "reward-fp32": Case(SMALL, "float32", "reward", 16, 64, 1024),
    "lora-fp32-passes": Case(WIDE, "float32", "train", 12, 96, 480, prompt=32, lora=True, ragged=True),
    "reward-bf16-large": Case(LARGE, "bfloat16", "reward", 16, 192, 1536, lora=True),
    "full-bf16-prompts": Case(WORDY, "bfloat16", "train", 12, 320, 1920, prompt=256, ragged=True),
    "score-fp32-prompts": Case(WIDE, "float32", "score", 12, 320, 1920, prompt=200, ragged=True),
    "value-bf16": Case(LARGE, "bfloat16", "value", 16, 256, 4096),
}


def config(shape: Shape) -> Any:
    """Return the configuration of a Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64 or 1,
        num_key_value_heads=shape.kv_heads,
        head_dim=64,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        eos_token_id=2,
    )


def build(case: Case, folder: Path) -> None:
    """Write random weights with the tokenizer that a scalar model asks for."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config(case.shape), dtype=getattr(torch, case.dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def batch(case: Case, rows: int) -> TokenBatch:
    """Return random tokens; the last row of a ragged batch is shorter by one, so that there is an attention mask."""
    tokens = torch.randint(6, case.shape.vocabulary, (rows, case.width))
    real = torch.ones_like(tokens, dtype=torch.bool)
    if case.ragged:
        real[1::2, -1] = False
    response = real.clone()
    response[:, : case.prompt] = False
    return TokenBatch(tokens, real, response, torch.zeros(tokens.shape))


def work(case: Case, learner: ModelLearner) -> None:
    """Do what the case says twice, as moments come with the first step."""
    for _ in range(2):
        match case.work:
            case "train":
                learner.train(batch(case, case.rows), Sft(), [range(case.rows)], 1.0)
            case "reward":
                both = [batch(case, case.rows // 2) for _ in range(2)]
                none = torch.zeros(case.rows // 2)
                pairs = PreferenceBatch(both[0], both[1], none, none, none)
                learner.train(pairs, RewardModel(), [range(case.rows // 2)], 1.0)
            case "score":
                learner.logprobs(batch(case, case.rows))
            case "value":
                learner.values(batch(case, case.rows))


def tuning(case: Case) -> Full | Lora | None:
    """Return what of the case's model trains."""
    if case.work not in ("train", "reward"):
        return None
    return Lora() if case.lora else Full()


def spec(case: Case, folder: Path) -> LearnerSpec:
    """Describe the case's model as a stage would."""
    trained = case.work in ("train", "reward")
    return LearnerSpec(
        role="policy",
        kind="scalar" if case.work in ("reward", "value") else "causal",
        checkpoint=folder,
        dtype=case.dtype,
        tuning=tuning(case),
        optimizer=Optimizer() if trained else None,
        head_learning_rate=None,
        max_tokens_per_microbatch=case.budget,
        temperature=1.0,
        threads=1,
        seed=0,
        gradient_checkpointing=case.checkpointing,
    )


def predict(case: Case, folder: Path) -> tuple[int, dict[str, int]]:
    """Return the model's answer, and its parts."""
    shape = read_shape(folder)
    trained = case.work in ("train", "reward")
    model = Model(
        shape,
        case.dtype,
        scalar=case.work in ("reward", "value"),
        tuning=tuning(case),
    )
    rows = min(case.rows, max(1, case.budget // case.width))
    tokens = rows * case.width
    scored = 0 if model.scalar else rows * (case.width - case.prompt)
    passes = -(-case.rows // rows)
    work = Pass(tokens=tokens, width=case.width, scored=scored, passes=passes)
    memory = learner_memory(model, work, Cut(checkpointing=case.checkpointing), on_gpu=False)
    peak = memory.learn if trained else memory.score
    return peak.total, asdict(peak)


def measure(case: Case, folder: Path) -> int:
    """Return the bytes that the case's process takes at its peak, in this process."""
    with tempfile.TemporaryDirectory() as tiny:
        small = replace(case, shape=TINY, rows=2, width=min(case.width, 8 if case.width <= 256 else 512), budget=8)
        small = replace(small, prompt=1)
        build(small, Path(tiny))
        work(small, ModelLearner(spec(small, Path(tiny))))
    process = psutil.Process()
    before = process.memory_info().rss
    learner = ModelLearner(spec(case, folder))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    work(case, learner)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def quiet() -> None:
    """Let no library print progress between the figures."""
    for name, value in {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}.items():
        os.environ.setdefault(name, value)


def compare(name: str, runs: int) -> dict[str, Any]:
    """Predict a case here and measure it in processes of their own."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        build(case, Path(folder))
        predicted, parts = predict(case, Path(folder))
        measured = sorted(_in_process(name, folder) for _ in range(runs))
    middle = statistics.median(measured)
    return {"predicted": predicted, "measured": measured, "ratio": predicted / middle, "parts": parts}


def _in_process(name: str, folder: str) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.memory_model", "--measure", name, folder]
    environment = os.environ | learner_environment()
    ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(ended.stdout.split()[-1])


def main() -> None:
    """Print the table, and JSON to a file or the console; in a child process, one measurement."""
    arguments = command_line(__doc__)
    arguments.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    quiet()
    if options.measure:
        name, folder = options.measure
        print(measure(CASES[name], Path(folder)))
        return
    table = Table("case", "predicted", "median", "lowest", "highest", "ratio", title="MiB of a learner's process")
    results = {}
    for name in options.only:
        results[name] = found = compare(name, options.runs)
        runs = found["measured"]
        sizes = (found["predicted"], statistics.median(runs), runs[0], runs[-1])
        table.add_row(name, *(f"{size / 2**20:,.0f}" for size in sizes), f"{found['ratio']:.3f}")
    Console().print(table)
    worst = max(abs(found["ratio"] - 1) for found in results.values())
    print(f"furthest from measurement: {worst:.1%}")
    give(results, options.json)


if __name__ == "__main__":
    main()
