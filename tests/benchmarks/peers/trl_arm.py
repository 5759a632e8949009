"""TRL's arm, run by the peer's interpreter: `python -m tests.benchmarks.peers.trl_arm task.json outcome.json`.

`defaults` leaves to TRL what the comparison does not fix: 8 rows a pass, gradient checkpointing, float32 weights under
bfloat16 autocast, the reference in every step. `tuned` is what an expert sets on a CPU: bfloat16 weights without
float32 masters, no checkpointing, passes of alike rows that are small enough for little padding, reference logprobs
computed before training. Fixed for both, and for us: the examples of each step, AdamW, a constant rate, clipping at 1.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import TrainerCallback

from tests.benchmarks.peers.task import BETA, LEARNING_RATE, Example, Outcome, Task, reward_of

PASS = {"dpo": 2, "sft": 4, "reward": 2, "grpo": 4, "rloo": 4}
"""Rows in one pass of the tuned arm."""


class Timed(TrainerCallback):
    """Times each optimizer step, and takes the losses and the gradient norms that the trainer logs."""

    def __init__(self) -> None:
        self.outcome = Outcome()
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock: the step's first batch is collated already."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it: the weights have moved."""
        self.outcome.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Take what belongs to a step; the summary at the end does not."""
        if logs and "loss" in logs:
            self.outcome.losses.append(float(logs["loss"]))
            self.outcome.grad_norms.append(float(logs["grad_norm"]))


def settings(task: Task, folder: Path, rows: int) -> dict[str, Any]:
    """Return the training arguments; `rows` of the dataset make a step."""
    tuned = task.arm == "tuned"
    passes = PASS[task.row] if tuned else min(8, rows)
    made = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": passes,
        "gradient_accumulation_steps": rows // passes,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "seed": 3,
        "model_init_kwargs": {"dtype": "bfloat16" if tuned else "float32"},
    }
    if tuned:
        made["gradient_checkpointing"] = False
    return made


def text(tokens: list[int]) -> str:
    """Return the text whose tokens these are."""
    return " ".join({0: "<pad>", 1: "<eos>", 2: "<unk>"}.get(token, f"w{token}") for token in tokens)


def ordered(task: Task) -> list[Example]:
    """Return the examples in the order of training; the tuned arm has alike ones of a step side by side."""
    steps = task.examples()
    if task.arm == "tuned" and task.row in ("dpo", "sft", "reward"):
        steps = [sorted(step, key=lambda example: -example.tokens()) for step in steps]
    return [example for step in steps for example in step]


def counting(trainer: Any, timed: Timed) -> None:
    """Count the real tokens of every batch that the trainer collates."""
    collate = trainer.data_collator

    def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        timed.outcome.tokens += int(batch["attention_mask"].sum())
        return batch

    trainer.data_collator = counted


def train_sft(task: Task, timed: Timed, folder: Path) -> None:
    """Train with SFTTrainer, on the completions."""
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": text(e.prompt), "completion": " " + text(e.completions[0])} for e in ordered(task)]
    made = settings(task, folder, len(task.steps[0]))
    trainer = SFTTrainer(task.causal, args=SFTConfig(**made), train_dataset=Dataset.from_list(rows), callbacks=[timed])
    counting(trainer, timed)
    trainer.train()


def train_dpo(task: Task, timed: Timed, folder: Path) -> None:
    """Train with DPOTrainer."""
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": text(e.prompt), "chosen": " " + text(e.completions[0]), "rejected": " " + text(e.completions[1])}
        for e in ordered(task)
    ]
    made = settings(task, folder, len(task.steps[0]))
    if task.arm == "tuned":
        made |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": PASS["dpo"]}
    args = DPOConfig(**made, beta=BETA["dpo"])
    trainer = DPOTrainer(task.causal, args=args, train_dataset=Dataset.from_list(rows), callbacks=[timed])
    counting(trainer, timed)
    trainer.train()


def train_reward(task: Task, timed: Timed, folder: Path) -> None:
    """Train with RewardTrainer."""
    from trl import RewardConfig, RewardTrainer

    rows = [
        {"chosen_ids": e.prompt + e.completions[0], "rejected_ids": e.prompt + e.completions[1]} for e in ordered(task)
    ]
    args = RewardConfig(**settings(task, folder, len(task.steps[0])))
    trainer = RewardTrainer(task.scalar, args=args, train_dataset=Dataset.from_list(rows), callbacks=[timed])
    counting(trainer, timed)
    trainer.train()


def train_group(task: Task, timed: Timed, folder: Path) -> None:
    """Train with GRPOTrainer or RLOOTrainer on completions that are given in place of sampled ones."""
    examples = ordered(task)
    group = len(examples[0].completions)
    given = {tuple(e.prompt): e.completions for e in examples}
    with_logprobs = task.row == "grpo"
    config, base = (trl.GRPOConfig, trl.GRPOTrainer) if with_logprobs else (trl.RLOOConfig, trl.RLOOTrainer)

    class Given(base):  # type: ignore[misc,valid-type]
        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
            found = [given[tuple(ids)][row % group] for row, ids in enumerate(prompt_ids)]
            timed.outcome.tokens += sum(len(ids) + len(c) for ids, c in zip(prompt_ids, found, strict=True))
            return (found, None) if with_logprobs else found

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [reward_of(completion) for completion in completion_ids]

    made = settings(task, folder, len(task.steps[0]) * group)
    made.pop("train_sampling_strategy")
    args = config(**made, beta=BETA[task.row], num_generations=group, shuffle_dataset=False, max_completion_length=1024)
    rows = Dataset.from_list([{"prompt": text(e.prompt)} for e in examples])
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.causal)
    parts = {"args": args, "train_dataset": rows, "processing_class": tokenizer, "callbacks": [timed]}
    Given(task.causal, reward_funcs=reward, **parts).train()


TRAINERS: dict[str, Callable[[Task, Timed, Path], None]] = {
    "sft": train_sft,
    "dpo": train_dpo,
    "reward": train_reward,
    "grpo": train_group,
    "rloo": train_group,
}


def main(task_file: Path, outcome_file: Path) -> None:
    """Run the task, and write what it measured."""
    task = Task.read(task_file)
    torch.set_num_threads(task.threads)
    timed = Timed()
    if task.row == "ppo":
        from tests.benchmarks.peers.trl_ppo import train_ppo

        train_ppo(task, timed.outcome, outcome_file.parent)
    else:
        TRAINERS[task.row](task, timed, outcome_file.parent)
    outcome = timed.outcome
    outcome.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcome.versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    outcome.write(outcome_file)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
