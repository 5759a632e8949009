"""A model and, where it is trained, its engine: what lives in one process, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.engines.base import B, LearnerSpec, Objective, TrainEngine
from rlhf.engines.head_fit import HeadFit
from rlhf.engines.microbatch import rank_passes
from rlhf.engines.offloading import Parked
from rlhf.engines.ranks import exchanging, join_alone, position
from rlhf.engines.scoring import response_values, score_share, sequence_scores, token_scores
from rlhf.engines.shares import Part, filled
from rlhf.engines.state_files import StateFiles, write_state
from rlhf.engines.torch_engine import TorchEngine
from rlhf.errors import RecipeError
from rlhf.manifest import Seal
from rlhf.models.adapter import adapter_config, adapter_weights, save_adapter
from rlhf.models.classifier import load_classifier
from rlhf.models.flat_attention import runs_flat, use_flat_attention
from rlhf.models.loading import load_causal
from rlhf.models.merging import leave_whole, merged_weights
from rlhf.models.quantised import keep_packing, quantisation
from rlhf.models.recompute import recompute_activations
from rlhf.models.saving import save_merged
from rlhf.models.scalar import fold_standardisation, load_scalar, offset_of, set_offset
from rlhf.models.tokenizer import load_tokenizer
from rlhf.models.tuning import adapters_off, apply_tuning, trainable_parameters, unwrapped
from rlhf.pulse import PULSE
from rlhf.recipe.tuning_support import support
from rlhf.seeding import derive
from rlhf.types import Metrics, Rows, TokenBatch, ValueBatch

T = TypeVar("T")
OFFSET = "score_offset"
"""What a state calls the offset of a scalar head, which is no parameter."""


class ModelLearner:
    """Policy, reference, reward model or critic, by its spec; every method waits until it is done.

    With several ranks each has one of these, after `rlhf.engines.ranks.join`, and all make the same calls with the same
    arguments. Raises TrainingError, which names the call, when another rank is lost.
    """

    def __init__(self, spec: LearnerSpec) -> None:
        self.spec = spec
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        if _wants_group(spec):
            join_alone()
        self.rank, ranks = position() if _wants_group(spec) else (0, 1)
        if ranks != spec.ranks:
            raise RuntimeError(f"{spec.role} is one of {spec.ranks} ranks, but {ranks} have joined")
        with PULSE.within_library(f"loading {spec.checkpoint.name}"):
            model = _loaded(spec)
        if spec.tuning is None or support(spec.tuning).flat:
            use_flat_attention(model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if spec.tuning is None:
            model.requires_grad_(False)
        else:
            model = apply_tuning(model, spec.tuning, spec.seed)
        if spec.optimizer and spec.gradient_checkpointing:
            recompute_activations(model)
        self.model = model.eval()
        self.parked: Parked | None = None
        self.updates = 0
        with exchanging(f"{spec.role}.build"), PULSE.within_library(f"building {spec.role}"):
            self.engine = self._engine()

    def train(
        self, batch: B, objective: Objective[B], minibatches: Sequence[Sequence[int]], lr_scale: float
    ) -> Metrics:
        """Make one optimizer step per minibatch, each a list of rows of `batch`; the metrics are of all ranks."""
        engine = self._training()
        batch = batch.to(self.device)
        metrics = Metrics()
        with exchanging(f"{self.spec.role}.train"):
            for rows in minibatches:
                torch.manual_seed(derive(self.spec.seed, "update", self.updates, self.rank))  # dropout
                metrics = metrics.merge(engine.step(batch.select(rows), objective, lr_scale))
                self.updates += 1
        self.model.eval()
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: B, objective: Objective[B]) -> Metrics:
        """Return the objective's metrics over this rank's share of the batch, without gradients."""
        batch = batch.to(self.device)
        metrics = Metrics()
        with exchanging(f"{self.spec.role}.evaluate"):
            for rows, part in filled(batch, self._passes(batch)):
                _, found = self._run(objective.loss, part)
                metrics = metrics.merge(found) if rows else metrics
        return metrics

    def logprobs(self, batch: TokenBatch, source: Literal["policy", "base"] = "policy") -> Part:
        """Score the response tokens of this rank's rows, `[rows, 2, T]`: logprob and entropy.

        `base` switches the adapters off (the shared reference).
        """

        def score(model: nn.Module, part: TokenBatch) -> Tensor:
            return token_scores(model, part, self.spec.temperature)

        with adapters_off(self.model) if source == "base" else nullcontext():
            return self._score("logprobs", score, batch)

    def scores(self, batch: TokenBatch) -> Part:
        """Return the reward of each whole sequence of this rank's rows, `[rows]`."""
        return self._score("scores", sequence_scores, batch)

    def values(self, batch: TokenBatch) -> Part:
        """Return the value before each response token of this rank's rows, `[rows, T]`."""
        return self._score("values", response_values, batch)

    def standardise(self, mean: float, std: float) -> None:
        """Fold (score - mean) / std into the scalar head."""
        head = unwrapped(self.model).score.weight
        with exchanging(f"{self.spec.role}.standardise"), self._gathered([head], writable=True):
            fold_standardisation(self.model, mean, std)

    @torch.no_grad()
    def fit_values(self, batch: ValueBatch) -> Part:
        """Set the scalar head to the ridge regression of the returns, before anything is trained.

        Returns the values of this rank's rows, `[rows, T]`, each by a fit that has not seen the row's prompt.
        """
        engine, batch = self._training(), batch.to(self.device)
        with exchanging(f"{self.spec.role}.fit_values"):
            fitted = HeadFit(self._run, batch, self._passes(batch), self.spec.ranks)
            head = unwrapped(self.model).score.weight
            weights, offset = fitted.head(head.dtype)
            engine.assign(head, weights)
            set_offset(self.model, offset)
            return fitted.values()

    def offload(self) -> None:
        """Move weights, gradients and optimizer to main memory; on CPU they are there."""
        if self.parked is None and self.device.type != "cpu":
            self.parked = Parked([self.model, *(self.engine.holdings() if self.engine else ())], self.device)

    def reload(self) -> None:
        """Move them back to the device."""
        if self.parked is not None:
            self.parked.reload()
            self.parked = None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as in the Hugging Face checkpoint, adapters merged; each is good until the next.

        Where the weights are cut over ranks, all ranks iterate to the end.
        """
        with exchanging(f"{self.spec.role}.weights"):
            yield from merged_weights(self.model, self._gathered)

    def adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the adapters as in a PEFT checkpoint; otherwise like `weights`."""
        with exchanging(f"{self.spec.role}.adapter_weights"):
            yield from adapter_weights(self._adapted(), self._gathered)

    def adapter_config(self) -> dict[str, Any]:
        """Return what belongs into PEFT's `adapter_config.json`."""
        return adapter_config(self._adapted())

    def save(self, folder: Path) -> None:
        """Let rank 0 write a Hugging Face folder with adapters merged, and the tokenizer."""
        tokenizer = load_tokenizer(self.spec.checkpoint)
        with exchanging(f"{self.spec.role}.save"), PULSE.within_library(f"writing {folder.name}"):
            save_merged(self.model, tokenizer, folder, self.spec.dtype, self._gathered, write=self.rank == 0)

    def save_adapter(self, folder: Path) -> None:
        """Let rank 0 write a PEFT folder of what was learned beside the model of the spec's checkpoint."""
        with exchanging(f"{self.spec.role}.save_adapter"), PULSE.within_library(f"writing {folder.name}"):
            save_adapter(self._adapted(), folder, self.spec.checkpoint, self._gathered, write=self.rank == 0)

    def state_bytes(self) -> int:
        """Return how many bytes the states of all ranks take together."""
        parameters: Sequence[Any] = trainable_parameters(self.model)
        return sum(12 * getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)

    def save_state(self, folder: Path) -> dict[str, Seal]:
        """Write this rank's share of what training goes on from, in files named by the role, into a folder.

        Returns the seals of the files it wrote, by name.

        Raises:
            ResourceError: the folder has no room.
        """
        engine = self._training()
        with exchanging(f"{self.spec.role}.save_state"):
            counts = [("updates", torch.tensor(self.updates))]
            if self.spec.kind == "scalar":
                counts.append((OFFSET, torch.tensor(offset_of(self.model), dtype=torch.float64)))
            return write_state(chain(counts, engine.state()), folder, self.spec.role, self.rank, self.spec.ranks)

    def load_state(self, folder: Path) -> None:
        """Go on from what `save_state` wrote, also when it was with other ranks or another ZeRO stage."""
        state = StateFiles(folder, self.spec.role)
        with exchanging(f"{self.spec.role}.load_state"):
            self._training().restore(state)
        self.updates = int(state["updates"])
        if OFFSET in state:
            set_offset(self.model, float(state[OFFSET]))

    def close(self) -> None:
        """Free the engine; the model is of no use afterwards."""
        self.parked = None
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def _engine(self) -> TrainEngine | None:
        """Build the engine of a model that is trained or cut over ranks, and bring the model to the device."""
        spec = self.spec
        if not _wants_deepspeed(spec):
            self.model.to(self.device)
            if spec.optimizer is None:
                return None
            return TorchEngine(self.model, spec.optimizer, spec.head_learning_rate, spec.max_tokens_per_microbatch)
        from rlhf.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(
            self.model,
            spec.optimizer,
            spec.head_learning_rate,
            spec.max_tokens_per_microbatch,
            spec.zero_stage,
            spec.dtype,
            spec.offload,
        )

    def _score(self, name: str, score: Callable[[nn.Module, TokenBatch], Tensor], batch: TokenBatch) -> Part:
        batch = batch.to(self.device)
        with exchanging(f"{self.spec.role}.{name}"):
            return score_share(lambda part: self._run(score, part), batch, self._passes(batch))

    def _passes(self, batch: Rows) -> list[list[int]]:
        flat = runs_flat(self.model)
        return rank_passes(batch, self.spec.max_tokens_per_microbatch, flat, self.spec.ranks)[self.rank]

    def _run(self, function: Callable[[nn.Module, B], T], batch: B) -> T:
        return self.engine.run(function, batch) if self.engine else function(self.model, batch)

    def _gathered(self, parameters: Sequence[Tensor], writable: bool = False) -> AbstractContextManager[None]:
        return self.engine.gathered(parameters, writable) if self.engine else leave_whole(parameters)

    def _training(self) -> TrainEngine:
        if self.engine is None or not self.spec.optimizer:
            raise RuntimeError(f"{self.spec.role} is frozen")
        return self.engine

    def _adapted(self) -> PeftModel:
        if not isinstance(self.model, PeftModel):
            raise RecipeError(f"{self.spec.role} trains weights of its own, so it has no adapters; use tuning: lora")
        return self.model


def _loaded(spec: LearnerSpec) -> PreTrainedModel:
    """Load the model that the spec describes, quantised where its tuning wants that."""
    how = quantisation(spec.tuning, spec.dtype)
    if spec.kind == "causal":
        model = load_causal(spec.checkpoint, spec.dtype, **how)
    elif spec.kind == "classes":
        model = load_classifier(spec.checkpoint, spec.dtype, spec.labels, spec.seed, **how)
    else:
        model = load_scalar(spec.checkpoint, spec.dtype, spec.seed, **how)
    keep_packing(model)
    return model


def _wants_deepspeed(spec: LearnerSpec) -> bool:
    """Return whether ranks share the model's state, or it is kept out of the device; copies of a frozen one do not."""
    if spec.optimizer is not None:
        return spec.ranks > 1 or spec.offload != "none"
    return spec.zero_stage == 3 and (spec.ranks > 1 or spec.offload == "parameters")


def _wants_group(spec: LearnerSpec) -> bool:
    return spec.ranks > 1 or _wants_deepspeed(spec)
