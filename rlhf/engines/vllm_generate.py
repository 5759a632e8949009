"""Generation with vLLM inside this process: no server, no port, no second process to lose."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.allocator import give_back
from rlhf.engines.adapter import ArrivingAdapter, adapter_settings, serves_adapters
from rlhf.engines.base import RolloutSpec
from rlhf.engines.environment import cpu_cache_bytes, vllm_environment
from rlhf.engines.gate import Gate
from rlhf.engines.served import Backend, ServedWeights, Transport
from rlhf.engines.shared_memory import Inbox, folder_weights, send
from rlhf.engines.vllm_batch import SharedBatch
from rlhf.errors import RecipeError, TrainingError
from rlhf.media import hide_media
from rlhf.models.tokenizer import load_tokenizer
from rlhf.pulse import PULSE
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.vllm_build import check_device
from rlhf.roles import EnginePart, WeightReceipt
from rlhf.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest


def backend_for(role: RolloutRole, on_cpu: bool) -> Backend:
    """Return how weights reach an engine: on the CPU, on the policy's GPUs, or on GPUs of its own.

    NCCL cannot join two processes on one GPU, and CUDA IPC cannot leave it.
    """
    if on_cpu:
        return "shared_memory"
    return "ipc" if role.share == "policy" else "nccl"


def cpu_settings(spec: RolloutSpec) -> dict[str, Any]:
    """Return what vLLM is told on a CPU.

    A prompt is never taken in pieces: vLLM 0.32 then rewinds the generator of a request with a seed, which only a GPU's
    allows, and the engine fails.
    """
    cache = cpu_cache_bytes(spec)
    return {"enforce_eager": True, "enable_chunked_prefill": False, "kv_cache_memory_bytes": cache}


class VllmEngine:
    """One replica. It has the methods of vLLM's `VLLMWeightSyncClient`, so a trainer can drive it directly.

    From `start_weight_update` until `update_weight_version` it refuses to generate, so no rollout is ever drawn from
    half-loaded weights or labelled with the wrong version.
    """

    def __init__(self, spec: RolloutSpec) -> None:
        """Load `spec.checkpoint` (a few seconds, after about 10 s of imports) and serve it as version 0.

        Raises:
            RecipeError: vLLM cannot run this model, or not with these settings, on this device.
            ResourceError: the installed vLLM is not made for this device.
        """
        os.environ.update(vllm_environment(spec))
        import torch

        check_device("the engine", gpus=torch.cuda.device_count() > 0)
        hide_media()
        from vllm import LLM
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        import rlhf.engines.vllm_transfer  # noqa: F401  (registers the backend)

        on_cpu = current_platform.is_cpu()
        _check(spec, on_cpu)
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.backend = backend_for(spec.role, on_cpu)
        self.sleeps = self.backend == "ipc"
        self.weights = ServedWeights()
        self.inbox = Inbox()
        self.arriving: ArrivingAdapter | None = None
        self.adapter: LoRARequest | None = None
        self.gate = Gate(self.weights.check_serving)
        self.tokenizer = load_tokenizer(spec.checkpoint)
        with PULSE.within_library(f"loading {spec.checkpoint.name} into vLLM"):
            self.llm: LLM = LLM(
                model=str(spec.checkpoint),
                trust_remote_code=False,
                load_format="safetensors",
                dtype=spec.dtype,
                seed=spec.seed,
                max_model_len=spec.max_length,
                max_num_seqs=spec.role.max_sequences,
                tensor_parallel_size=spec.role.tensor_parallel,
                distributed_executor_backend="uni" if spec.role.tensor_parallel == 1 else "mp",
                gpu_memory_utilization=spec.role.gpu_memory_utilization,
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend=self.backend),
                enable_sleep_mode=self.sleeps,
                **adapter_settings(spec),
                **(cpu_settings(spec) if on_cpu else {}),
            )
        self.batch = SharedBatch(self.llm.llm_engine)
        give_back()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """Draw `len(seeds[i])` responses to prompt i, one per seed, in the order of prompts and seeds.

        `logprobs` are those of the sampled tokens under the distribution they were drawn from (temperature and top_p
        applied). In float32 a seed gives the same response in any batch. Temperature 0 is greedy. Several threads may
        call at once: their requests run in one batch, and a weight update waits for them.

        Raises:
            TrainingError: a weight update is under way, or a prompt leaves no room for the response.
        """
        for prompt in prompts:
            if len(prompt.tokens) + sampling.max_tokens > self.spec.max_length:
                raise TrainingError(
                    f"prompt {prompt.id} has {len(prompt.tokens)} tokens; with {sampling.max_tokens} for the response "
                    f"that exceeds the engine's {self.spec.max_length}: lower max_prompt_tokens or max_response_tokens"
                )
        jobs = [(prompt, seed) for prompt, row in zip(prompts, seeds, strict=True) for seed in row]
        with self.gate.passing():
            outputs = self.batch.generate(
                [prompt.tokens for prompt, _ in jobs],
                [self._parameters(sampling, seed) for _, seed in jobs],
                self.adapter,
            )
            return [self._rollout(prompt, seed, output) for (prompt, seed), output in zip(jobs, outputs, strict=True)]

    def load(self, folder: Path, version: int) -> WeightReceipt:
        """Serve the weights of a Hugging Face folder of the same architecture, as `version`.

        Raises:
            RecipeError: the folder holds no safetensors.
        """
        from rlhf.engines.vllm_transfer import described

        started = time.perf_counter()
        if self.backend == "shared_memory":
            self.start_weight_update()
            send(folder_weights(folder), self.update_weights)
            self.finish_weight_update()
        else:
            self._reload(folder, described(folder_weights(folder)))
        version, checksum = self.update_weight_version(version)
        return WeightReceipt(version, checksum, self.weights.ledger.bytes, time.perf_counter() - started)

    def served(self) -> tuple[int, str]:
        """Return the version and the checksum of its weights (empty for the weights the engine began with)."""
        return self.weights.served()

    def transport(self) -> Transport:
        """Return how weights reach this engine."""
        return Transport(self.backend, self.spec.role.tensor_parallel, adapters=serves_adapters(self.spec))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect from the trainer."""
        self.llm.shutdown_weight_transfer_engine()

    def start_weight_update(self, adapter: dict[str, Any] | None = None) -> None:
        """Stop serving and begin an update; an earlier one that its trainer abandoned is closed first.

        What comes is a whole checkpoint or, with `adapter` (PEFT's adapter_config.json), a LoRA adapter.
        """
        abandoned = self.weights.phase == "receiving" and self.arriving is None
        self.weights.begin()
        self.gate.drain()
        if abandoned:
            self.llm.finish_weight_update()
        self.arriving = ArrivingAdapter(adapter, self.inbox) if adapter else None
        if self.arriving is None:
            self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive some of the tensors; after a failure only a new update makes the engine serve again."""
        with self.weights.receiving(update_info):
            if self.arriving is None:
                self.llm.update_weights({"update_info": update_info})
            else:
                self.arriving.receive(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the tensors in place and forget the keys and values that the old ones computed."""
        self.weights.finish()
        try:
            if self.arriving is None:
                self.llm.finish_weight_update()
            self.adapter = self.arriving.install(self.llm) if self.arriving else None
            self._forget_prefixes()
        except BaseException:
            self.weights.phase = "failed"
            raise
        self.arriving = None
        give_back()  # a second copy of the weights
        if weight_version is not None:
            self.update_weight_version(int(weight_version))

    def update_weight_version(self, version: int, checksum: str | None = None) -> tuple[int, str]:
        """Serve again; from now on rollouts carry `version`. Return what `served` returns.

        Raises:
            TrainingError: the update was not finished, or what arrived has not this checksum.
        """
        self.llm.update_weight_version(str(version))
        return self.weights.declare(version, checksum)

    def sleep(self) -> None:
        """Move the weights to main memory and drop the KV cache: the GPU is free, and no weights are lost."""
        asleep = self.weights.sleep()
        self.gate.drain()
        if asleep and self.sleeps:
            self.llm.sleep(level=1)

    def wake(self, part: EnginePart) -> None:
        """Bring back the weights, or an empty KV cache after them."""
        if self.weights.wake(part) and self.sleeps:
            self.llm.wake_up([part])

    def _reload(self, folder: Path, announcement: dict[str, Any]) -> None:
        """Let each GPU worker read the folder itself."""
        self.weights.begin()
        self.gate.drain()
        with self.weights.receiving(announcement), PULSE.within_library(f"loading {folder.name} into vLLM"):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.adapter = None
        self._forget_prefixes()
        self.weights.finish()

    def _forget_prefixes(self) -> None:
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise TrainingError("vLLM kept its prefix cache, whose keys and values belong to the old weights")

    def _parameters(self, sampling: Sampling, seed: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            stop_token_ids=list(self.tokenizer.eos_ids),
            allowed_token_ids=list(sampling.allowed) or None,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
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

    config = AutoConfig.from_pretrained(spec.checkpoint, trust_remote_code=False, local_files_only=True)
    config = config.get_text_config()
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
