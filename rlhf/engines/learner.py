"""A model and, where it is trained, its engine: what lives in one process, whoever calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlhf.engines.base import B, LearnerSpec, Objective
from rlhf.engines.microbatch import micro_batches
from rlhf.engines.scoring import response_values, score_rows, score_tokens, sequence_scores
from rlhf.engines.torch_engine import TorchEngine
from rlhf.models.loading import load_causal
from rlhf.models.lora import adapters_off, add_lora, merged_weights
from rlhf.models.saving import save_merged
from rlhf.models.scalar import fold_standardisation, load_scalar
from rlhf.models.tokenizer import load_tokenizer
from rlhf.types import Metrics, TokenBatch, TokenScores


class ModelLearner:
    """Policy, reference, reward model or critic, by its spec; every method waits until it is done."""

    def __init__(self, spec: LearnerSpec) -> None:
        self.spec = spec
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        if spec.kind == "causal":
            model = load_causal(spec.checkpoint, spec.dtype)
        else:
            model = load_scalar(spec.checkpoint, spec.dtype, spec.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if spec.lora and spec.optimizer:
            model = add_lora(model, spec.lora, spec.kind, spec.seed)
        elif not spec.optimizer:
            model.requires_grad_(False)
        self.model = model.to(self.device).eval()
        self.engine = (
            TorchEngine(self.model, spec.optimizer, spec.head_learning_rate, spec.max_tokens_per_microbatch)
            if spec.optimizer
            else None
        )

    def train(
        self, batch: B, objective: Objective[B], minibatches: Sequence[Sequence[int]], lr_scale: float
    ) -> Metrics:
        """Make one optimizer step per minibatch, each a list of row indices of `batch`."""
        if self.engine is None:
            raise RuntimeError(f"{self.spec.role} is frozen")
        batch = batch.to(self.device)
        metrics = Metrics()
        for rows in minibatches:
            metrics = metrics.merge(self.engine.step(batch.select(rows), objective, lr_scale))
        self.model.eval()
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: B, objective: Objective[B]) -> Metrics:
        """Return the objective's metrics over the batch, without gradients."""
        metrics = Metrics()
        for _, part in micro_batches(batch.to(self.device), self.spec.max_tokens_per_microbatch):
            metrics = metrics.merge(objective.loss(self.model, part)[1])
        return metrics

    def logprobs(self, batch: TokenBatch, source: Literal["policy", "base"] = "policy") -> TokenScores:
        """Score the response tokens, `[B, T]`; `base` switches the adapters off (the shared reference)."""
        with adapters_off(self.model) if source == "base" else nullcontext():
            return score_tokens(
                self.model, batch.to(self.device), self.spec.temperature, self.spec.max_tokens_per_microbatch
            )

    def scores(self, batch: TokenBatch) -> Tensor:
        """Return the reward of each whole sequence, `[B]`."""
        return score_rows(sequence_scores, self.model, batch.to(self.device), self.spec.max_tokens_per_microbatch)

    def values(self, batch: TokenBatch) -> Tensor:
        """Return the value before each response token, `[B, T]`."""
        return score_rows(response_values, self.model, batch.to(self.device), self.spec.max_tokens_per_microbatch)

    def standardise(self, mean: float, std: float) -> None:
        """Fold (score - mean) / std into the scalar head."""
        fold_standardisation(self.model, mean, std)

    def offload(self) -> None:
        """Move weights, gradients and optimizer to main memory."""

    def reload(self) -> None:
        """Move them back to the device."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as in the Hugging Face checkpoint, adapters merged."""
        return merged_weights(self.model)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder with adapters merged, and the tokenizer."""
        save_merged(self.model, load_tokenizer(self.spec.checkpoint), folder, self.spec.dtype)
