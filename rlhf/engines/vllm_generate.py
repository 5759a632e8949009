"""Generation with vLLM inside this process: no server, no port, no second process to lose."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.engines.base import RolloutSpec
from rlhf.engines.shared_memory import Ledger
from rlhf.errors import RecipeError, TrainingError
from rlhf.roles import WeightReceipt
from rlhf.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

Backend = Literal["shared_memory", "nccl", "ipc"]


def vllm_environment(threads: int, kv_cache_gib: int) -> dict[str, str]:
    """Return the environment vLLM needs, to be set before vllm (better: before torch) is imported.

    In-process engine (a synchronous LLM hangs when its engine process dies), threads not pinned to cores that other
    roles use too, KV cache of a fixed size on CPU, no telemetry, no hub, errors only on the console.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


class VllmEngine:
    """One replica. It also has the methods of vLLM's `VLLMWeightSyncClient`, so a trainer can drive it directly.

    From `start_weight_update` until `update_weight_version` it refuses to generate, so no rollout is ever drawn from
    half-loaded weights or labelled with the wrong version.
    """

    def __init__(self, spec: RolloutSpec, backend: Backend = "shared_memory") -> None:
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
        if on_cpu:
            torch.set_num_threads(spec.threads)
        self._max_length = spec.max_length
        self._backend = backend
        self._llm: LLM = LLM(
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
            weight_transfer_config=WeightTransferConfig(backend=backend),
        )
        self._version = 0
        self._ledger = Ledger()
        self._serving = True
        self._receiving = False

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[Rollout]:
        """Draw `len(seeds[i])` responses to prompt i, one per seed, in the order of prompts and seeds.

        `logprobs` are those of the sampled tokens under the distribution they were drawn from (temperature and top_p
        applied). In float32 a seed gives the same response in any batch.

        Raises:
            TrainingError: a weight update is under way, or a prompt leaves no room for the response.
        """
        if not self._serving:
            raise TrainingError("the rollout engine was asked to generate in the middle of a weight update")
        jobs = [(prompt, seed) for prompt, of_prompt in zip(prompts, seeds, strict=True) for seed in of_prompt]
        for prompt in prompts:
            if len(prompt.tokens) + sampling.max_tokens > self._max_length:
                raise TrainingError(
                    f"prompt {prompt.id} has {len(prompt.tokens)} tokens; with {sampling.max_tokens} for the response "
                    f"that exceeds the engine's {self._max_length}: lower max_prompt_tokens or max_response_tokens"
                )
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt.tokens)} for prompt, _ in jobs],
            [_parameters(sampling, seed) for _, seed in jobs],
            use_tqdm=False,
        )
        return [self._rollout(*job, output) for job, output in zip(jobs, outputs, strict=True)]

    def load(self, folder: Path, version: int) -> WeightReceipt:
        """Serve the weights of a Hugging Face folder of the same architecture, as `version`.

        Raises:
            RecipeError: the folder holds no safetensors.
        """
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        from rlhf.engines.vllm_transfer import ReplayedSource, SharedMemoryTrainerInitInfo, folder_weights

        started = time.perf_counter()
        source = ReplayedSource(partial(folder_weights, folder))
        if self._backend == "shared_memory":
            WeightTransferTrainerFactory.trainer_init(
                SharedMemoryTrainerInitInfo(rank=0), client=self, source=source
            ).send_weights()
        else:
            self._reload(folder, source.announcement())
        self.update_weight_version(version)
        return WeightReceipt(version, self._ledger.checksum, self._ledger.bytes, time.perf_counter() - started)

    def served(self) -> tuple[int, str]:
        """Return the version served and the checksum of its weights (empty for the weights the engine began with)."""
        return self._version, self._ledger.checksum

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect from the trainer."""
        self._llm.shutdown_weight_transfer_engine()

    def start_weight_update(self) -> None:
        """Stop serving and begin an update; an earlier one that its trainer abandoned is closed first."""
        self._serving = False
        if self._receiving:
            self._llm.finish_weight_update()
        self._ledger = Ledger()
        self._llm.start_weight_update()
        self._receiving = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive some of the tensors; after a failure only a new update makes the engine serve again."""
        try:
            self._llm.update_weights({"update_info": update_info})
        except BaseException:
            self._receiving = False
            raise
        self._ledger.add(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the tensors in place and forget the keys and values of the old ones."""
        self._llm.finish_weight_update()
        self._receiving = False
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise TrainingError("vLLM kept its prefix cache, whose keys belong to the old weights")
        if weight_version is not None:
            self.update_weight_version(int(weight_version))

    def update_weight_version(self, version: int) -> None:
        """Serve again; from now on rollouts carry `version`.

        Raises:
            TrainingError: the update was not finished.
        """
        if self._receiving or not self._ledger.checksum:
            raise TrainingError(f"version {version} was declared, but its weights have not arrived")
        self._llm.update_weight_version(str(version))
        self._version = version
        self._serving = True

    def _reload(self, folder: Path, announcement: dict[str, Any]) -> None:
        """Let each GPU worker read the folder itself."""
        self._serving = False
        self._ledger = Ledger()
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._llm.reset_prefix_cache(reset_running_requests=True)
        self._ledger.add(announcement)

    def _rollout(self, prompt: Prompt, seed: int, output: RequestOutput) -> Rollout:
        drawn = output.outputs[0]
        if drawn.finish_reason not in ("stop", "length"):
            raise TrainingError(f"vLLM ended the response to prompt {prompt.id} with {drawn.finish_reason!r}")
        tokens = tuple(drawn.token_ids)
        return Rollout(
            prompt=prompt,
            tokens=tokens,
            logprobs=tuple(step[token].logprob for step, token in zip(drawn.logprobs, tokens, strict=True)),
            text=self._llm.get_tokenizer().decode(tokens, skip_special_tokens=True),
            finish_reason=drawn.finish_reason,
            policy_version=self._version,
            seed=seed,
        )


def _parameters(sampling: Sampling, seed: int) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        logprobs=0,
        detokenize=False,
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
            f"{', '.join(map(str, supported))}: use roles.rollout.engine transformers, or another model"
        )
    if spec.role.tensor_parallel > 1:
        raise RecipeError("roles.rollout.tensor_parallel above 1 needs GPUs: use replicas on CPU")
