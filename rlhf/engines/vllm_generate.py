"""Generation with vLLM inside this process: no server, no port, no second process to lose."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.engines.base import RolloutSpec
from rlhf.engines.environment import vllm_environment
from rlhf.engines.served import ServedWeights
from rlhf.engines.shared_memory import folder_weights
from rlhf.errors import RecipeError, TrainingError
from rlhf.models.tokenizer import load_tokenizer
from rlhf.roles import WeightReceipt
from rlhf.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

Backend = Literal["shared_memory", "nccl", "ipc"]


def backend_for(gpus: float) -> Backend:
    """Return how weights reach an engine that holds `gpus`: none, a part of the policy's GPU, or GPUs of its own.

    NCCL cannot join two processes on one GPU, and CUDA IPC cannot leave it.
    """
    if not gpus:
        return "shared_memory"
    return "ipc" if gpus < 1 else "nccl"


class VllmEngine:
    """One replica. It has the methods of vLLM's `VLLMWeightSyncClient`, so a trainer can drive it directly.

    From `start_weight_update` until `update_weight_version` it refuses to generate, so no rollout is ever drawn from
    half-loaded weights or labelled with the wrong version.
    """

    def __init__(self, spec: RolloutSpec) -> None:
        """Load `spec.checkpoint` (a few seconds, after about 10 s of imports) and serve it as version 0.

        Raises:
            RecipeError: vLLM cannot run this model, or not with these settings, on this device.
        """
        os.environ.update(vllm_environment(spec.threads, spec.role.kv_cache_gib))
        import torch
        from vllm import LLM
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        import rlhf.engines.vllm_transfer  # noqa: F401  (registers the backend)

        on_cpu = current_platform.is_cpu()
        _check(spec, on_cpu)
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.backend = backend_for(spec.role.gpus)
        self.weights = ServedWeights()
        self.tokenizer = load_tokenizer(spec.checkpoint)
        self.llm: LLM = LLM(
            model=str(spec.checkpoint),
            dtype=spec.dtype,
            seed=spec.seed,
            max_model_len=spec.max_length,
            max_num_seqs=spec.role.max_sequences,
            tensor_parallel_size=spec.role.tensor_parallel,
            distributed_executor_backend="uni" if spec.role.tensor_parallel == 1 else "mp",
            gpu_memory_utilization=spec.role.gpu_memory_utilization,
            enforce_eager=on_cpu,
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=self.backend),
        )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """Draw `len(seeds[i])` responses to prompt i, one per seed, in the order of prompts and seeds.

        `logprobs` are those of the sampled tokens under the distribution they were drawn from (temperature and top_p
        applied). In float32 a seed gives the same response in any batch. Temperature 0 is greedy.

        Raises:
            TrainingError: a weight update is under way, or a prompt leaves no room for the response.
        """
        self.weights.check_serving()
        for prompt in prompts:
            if len(prompt.tokens) + sampling.max_tokens > self.spec.max_length:
                raise TrainingError(
                    f"prompt {prompt.id} has {len(prompt.tokens)} tokens; with {sampling.max_tokens} for the response "
                    f"that exceeds the engine's {self.spec.max_length}: lower max_prompt_tokens or max_response_tokens"
                )
        jobs = [(prompt, seed) for prompt, row in zip(prompts, seeds, strict=True) for seed in row]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt.tokens)} for prompt, _ in jobs],
            [self._parameters(sampling, seed) for _, seed in jobs],
            use_tqdm=False,
        )
        return [self._rollout(prompt, seed, output) for (prompt, seed), output in zip(jobs, outputs, strict=True)]

    def load(self, folder: Path, version: int) -> WeightReceipt:
        """Serve the weights of a Hugging Face folder of the same architecture, as `version`.

        Raises:
            RecipeError: the folder holds no safetensors.
        """
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        from rlhf.engines.vllm_transfer import ReplayedSource, SharedMemoryTrainerInitInfo

        started = time.perf_counter()
        source = ReplayedSource(partial(folder_weights, folder))
        if self.backend == "shared_memory":
            WeightTransferTrainerFactory.trainer_init(
                SharedMemoryTrainerInitInfo(rank=0), client=self, source=source
            ).send_weights()
        else:
            self._reload(folder, source.announcement())
        version, checksum = self.update_weight_version(version)
        return WeightReceipt(version, checksum, self.weights.ledger.bytes, time.perf_counter() - started)

    def served(self) -> tuple[int, str]:
        """Return the version and the checksum of its weights (empty for the weights the engine began with)."""
        return self.weights.served()

    def transport(self) -> tuple[Backend, int]:
        """Return how weights reach this engine, and into how many worker processes."""
        return self.backend, self.spec.role.tensor_parallel

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect from the trainer."""
        self.llm.shutdown_weight_transfer_engine()

    def start_weight_update(self) -> None:
        """Stop serving and begin an update; an earlier one that its trainer abandoned is closed first."""
        if self.weights.phase == "receiving":
            self.llm.finish_weight_update()
        self.weights.begin()
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive some of the tensors; after a failure only a new update makes the engine serve again."""
        try:
            self.llm.update_weights({"update_info": update_info})
        except BaseException:
            self.weights.phase = "failed"
            raise
        self.weights.ledger.add(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the tensors in place and forget the keys and values that the old ones computed."""
        self.llm.finish_weight_update()
        self.weights.finish()
        self._forget_prefixes()
        if weight_version is not None:
            self.update_weight_version(int(weight_version))

    def update_weight_version(self, version: int) -> tuple[int, str]:
        """Serve again; from now on rollouts carry `version`. Return what `served` returns.

        Raises:
            TrainingError: the update was not finished.
        """
        self.llm.update_weight_version(str(version))
        return self.weights.declare(version)

    def _reload(self, folder: Path, announcement: dict[str, Any]) -> None:
        """Let each GPU worker read the folder itself."""
        self.weights.begin()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.weights.ledger.add(announcement)
        self.weights.finish()
        self._forget_prefixes()

    def _forget_prefixes(self) -> None:
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            self.weights.phase = "failed"
            raise TrainingError("vLLM kept its prefix cache, whose keys and values belong to the old weights")

    def _parameters(self, sampling: Sampling, seed: int) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            stop_token_ids=list(self.tokenizer.eos_ids),
            allowed_token_ids=list(sampling.allowed) or None,
            logprobs=0,
            detokenize=False,
        )

    def _rollout(self, prompt: Prompt, seed: int, output: RequestOutput) -> Rollout:
        drawn = output.outputs[0]
        if drawn.finish_reason not in ("stop", "length"):
            raise TrainingError(f"vLLM ended the response to prompt {prompt.id} with {drawn.finish_reason!r}")
        tokens = tuple(drawn.token_ids)
        return Rollout(
            prompt=prompt,
            tokens=tokens,
            logprobs=tuple(step[token].logprob for step, token in zip(drawn.logprobs, tokens, strict=True)),
            text=self.tokenizer.decode(tokens),
            finish_reason=drawn.finish_reason,
            policy_version=self.weights.version,
            seed=seed,
        )


def _check(spec: RolloutSpec, on_cpu: bool) -> None:
    """Find what would fail late (at the first generate) or silently."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(spec.checkpoint).get_text_config()
    if spec.max_length > config.max_position_embeddings:
        raise RecipeError(
            f"prompt and response may take {spec.max_length} tokens, but the model was built for "
            f"{config.max_position_embeddings}: lower max_prompt_tokens or max_response_tokens"
        )
    if not on_cpu:
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in supported:
        raise RecipeError(
            f"vLLM on CPU cannot run {spec.checkpoint}: its attention heads have {head_dim} dimensions, supported are "
            f"{', '.join(map(str, supported))}; use `roles.rollout.engine: transformers`, or another model"
        )
    if spec.role.tensor_parallel > 1:
        raise RecipeError("roles.rollout.tensor_parallel above 1 needs GPUs; on CPU raise roles.rollout.replicas")
