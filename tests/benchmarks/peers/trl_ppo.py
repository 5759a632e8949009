"""The peer's PPO, `trl.experimental.ppo` of TRL 1.12: whole steps, with the rollouts of its own generate."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from tests.benchmarks.peers.task import BETA, LEARNING_RATE, PAD, PPO_EPOCHS, RESPONSE, Outcome, Task


class Steps(TrainerCallback):
    """Times whole steps, from the end of one to the end of the next, and takes the policy's mean NLL per token."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time of the step."""
        now = time.perf_counter()
        self.outcome.seconds.append(now - self.last)
        self.last = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Take -log p of what was sampled, summed over a response of fixed length."""
        if logs and "objective/entropy" in logs:
            self.outcome.losses.append(logs["objective/entropy"] / RESPONSE)


def train_ppo(task: Task, outcome: Outcome, folder: Path) -> None:
    """Run PPOTrainer over the task's prompts, a step's prompts in one pass; all models are bfloat16."""
    ppo = import_module("trl.experimental.ppo")  # in the last release that has it, not in our environment

    steps = task.examples()
    causal = [AutoModelForCausalLM.from_pretrained(task.causal, dtype=torch.bfloat16) for _ in range(2)]
    scalar = [
        AutoModelForSequenceClassification.from_pretrained(task.scalar, dtype=torch.bfloat16, num_labels=1)
        for _ in range(2)
    ]
    tokenizer = AutoTokenizer.from_pretrained(task.causal, padding_side="left")

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
        outcome.tokens += int((batch["input_ids"] != PAD).sum()) + RESPONSE * len(rows)
        return dict(batch)

    args = ppo.PPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=len(steps[0]),
        gradient_accumulation_steps=1,
        total_episodes=sum(map(len, steps)),
        num_ppo_epochs=PPO_EPOCHS,
        response_length=RESPONSE,
        temperature=1.0,
        kl_coef=BETA["ppo"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=1,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=3,
    )
    ppo.PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=causal[0],
        ref_model=causal[1],
        reward_model=scalar[0],
        value_model=scalar[1],
        train_dataset=Dataset.from_list([{"input_ids": e.prompt} for step in steps for e in step]),
        data_collator=collate,
        callbacks=[Steps(outcome)],
    ).train()
