"""Generation with transformers: for `--local`, and as the oracle that vLLM is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from rlhf.engines.base import RolloutSpec
from rlhf.models.loading import load_causal
from rlhf.models.tokenizer import load_tokenizer
from rlhf.pulse import PULSE
from rlhf.types import Prompt, Rollout, Sampling


class SeededChoice(LogitsProcessor):
    """Exact sampling by the Gumbel-max trick with one generator per row, so that a row's draw is its own.

    Records the logprob of each chosen token; greedy search on the noisy scores then picks that token.
    """

    def __init__(self, seeds: Sequence[int], greedy: bool) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.greedy = greedy
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[B, V]` with Gumbel noise added; each token counts as progress."""
        PULSE.beat()
        scores = scores.float()
        noisy = scores if self.greedy else scores + self._gumbel(scores)
        chosen = noisy.argmax(dim=-1, keepdim=True)
        self.logprobs.append((scores.gather(1, chosen) - scores.logsumexp(-1, keepdim=True)).squeeze(1))
        return noisy

    def _gumbel(self, scores: Tensor) -> Tensor:
        rows = [torch.rand(scores.shape[1], generator=g) for g in self.generators]
        return -torch.stack(rows).clamp_min(1e-20).log().neg().log().to(scores.device)


class TransformersEngine:
    """A rollout engine on `transformers.generate`; every method waits until it is done."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec
        torch.set_num_threads(spec.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with PULSE.within_library(f"loading {spec.checkpoint.name}"):
            self.model = load_causal(spec.checkpoint, spec.dtype).to(self.device).eval()
        self.tokenizer = load_tokenizer(spec.checkpoint)
        self.version = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """Draw one response per (prompt, seed), in that order; temperature 0 is greedy."""
        wanted = [(prompt, seed) for prompt, row in zip(prompts, seeds, strict=True) for seed in row]
        size = self.spec.role.max_sequences
        groups = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        return [rollout for group in groups for rollout in self._generate(group, sampling)]

    @torch.no_grad()
    def _generate(self, wanted: list[tuple[Prompt, int]], sampling: Sampling) -> Iterator[Rollout]:
        width = max(len(prompt.tokens) for prompt, _ in wanted)
        tokens = torch.full((len(wanted), width), self.tokenizer.pad_id)
        mask = torch.zeros(tokens.shape, dtype=torch.long)
        for row, (prompt, _) in enumerate(wanted):
            tokens[row, width - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
            mask[row, width - len(prompt.tokens) :] = 1
        choice = SeededChoice([seed for _, seed in wanted], greedy=sampling.temperature == 0)
        out = self.model.generate(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            logits_processor=LogitsProcessorList([*_warpers(sampling), choice]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.max_tokens,
                pad_token_id=self.tokenizer.pad_id,
                eos_token_id=list(self.tokenizer.eos_ids),
            ),
        )
        logprobs = torch.stack(choice.logprobs, dim=1).tolist()
        for (prompt, seed), ids, row in zip(wanted, out[:, width:].tolist(), logprobs, strict=True):
            yield self._rollout(prompt, seed, ids, row)

    def _rollout(self, prompt: Prompt, seed: int, ids: list[int], logprobs: list[float]) -> Rollout:
        ends = [index for index, token in enumerate(ids) if token in self.tokenizer.eos_ids]
        length = ends[0] + 1 if ends else len(ids)
        return Rollout(
            prompt=prompt,
            tokens=tuple(ids[:length]),
            logprobs=tuple(logprobs[:length]),
            text=self.tokenizer.decode(ids[:length]),
            finish_reason="stop" if ends else "length",
            policy_version=self.version,
            seed=seed,
        )

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> str:
        """Copy the tensors in, serve them as `version`, and return the checksum of what arrived."""
        state = self.model.state_dict()
        digest = xxhash.xxh3_64()
        for name, tensor in weights:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            state[name].copy_(tensor)
        self.version = version
        return digest.hexdigest()

    def load(self, folder: Path, version: int) -> str:
        """Serve the weights of a Hugging Face folder of the same architecture."""
        files = sorted(folder.glob("*.safetensors"))
        return self.load_weights((item for file in files for item in load_file(file).items()), version)


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if sampling.allowed:
        warpers.append(PrefixConstrainedLogitsProcessor(lambda _row, _tokens: list(sampling.allowed), num_beams=1))
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers
