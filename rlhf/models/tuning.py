"""Tuning methods: which weights of a model train, and through what."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import RecipeError
from rlhf.models.layers import decoder_layers, last_norms
from rlhf.recipe.tuned_sizes import FEED_FORWARD, KEYS_AND_VALUES, layer_numbers
from rlhf.recipe.tuning_schema import (
    Bitfit,
    Full,
    Ia3,
    Layers,
    LlamaAdapter,
    Lora,
    PrefixTuning,
    Prompted,
    PromptTuning,
    PTuning,
    Qlora,
    Tuning,
)

ADAPTER = "default"
"""PEFT's name for the one set of adapters."""

PISSA = "pissa_niter_16"
"""Principal singular vectors by randomised SVD in 16 rounds: exact SVD takes minutes a layer where models are large."""

PREFIX_DEVIATION = 0.02
"""Keys and values of a fresh prefix: PEFT's standard normal ones drown the text, and equal ones learn all the same."""


def apply_tuning(model: PreTrainedModel, tuning: Tuning, seed: int) -> PreTrainedModel | PeftModel:
    """Let those weights of a model train that the method names, and its scalar head; what is added has its own dtype.

    Random beginnings are drawn by `seed`, whatever the global random state. The first output equals the model's, bit
    for bit, but for prompts, and up to rounding for PiSSA. Raises RecipeError when the method does not fit the model.
    """
    if isinstance(tuning, Full):
        return model
    model.requires_grad_(False)
    head = getattr(model, "score", None)
    tuned: PreTrainedModel | PeftModel = model
    if isinstance(tuning, Bitfit | Layers):
        for parameter in _chosen(model, tuning):
            parameter.requires_grad_(True)
    else:
        tuned = _with_adapters(model, tuning, seed)
    if head is not None:
        head.requires_grad_(True)
    return tuned


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model inside (its layers keep their adapters), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the model is its frozen base, bit for bit.

    Raises RecipeError for a model without adapters, whose base is gone once it trains, and with PiSSA, which starts by
    taking its adapters out of the base.
    """
    if not isinstance(model, PeftModel) or starts_from_base(model):
        raise RecipeError(
            "roles.reference.share: the policy trains weights of its own, so no reference is left inside it; "
            "use another method of `tuning`, such as lora, or give the reference its own process"
        )
    return model.disable_adapter()


def starts_from_base(model: PeftModel) -> bool:
    """Return whether the adapters began as a part of the base's weights, which lack it since (PiSSA)."""
    config = model.peft_config[ADAPTER]
    return isinstance(config, LoraConfig) and config.init_lora_weights == PISSA


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that get gradients, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _with_adapters(model: PreTrainedModel, tuning: Tuning, seed: int) -> PeftModel:
    layers = len(decoder_layers(model))
    if isinstance(tuning, Ia3):
        _check_ia3(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, _config(model, tuning, layers), autocast_adapter_dtype=False)
        except (ValueError, TypeError, AssertionError) as error:
            raise RecipeError(f"tuning: {_asked(tuning)} does not fit the model: {error}") from error
        if isinstance(tuning, PrefixTuning):
            nn.init.normal_(adapted.prompt_encoder[ADAPTER].embedding.weight, std=PREFIX_DEVIATION)
    if isinstance(tuning, Prompted):
        adapted.prompt_encoder.to(model.dtype)
    ends = (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "score", None))
    if any(isinstance(end, LoraLayer) for end in ends):
        raise RecipeError(f"tuning: {_asked(tuning)} includes the embeddings or the head; leave it out")
    if starts_from_base(adapted):
        adapted.start = _factors(adapted)  # where training began, which its adapter on the whole base must leave out
    return cast(PeftModel, adapted)


def _config(model: PreTrainedModel, tuning: Tuning, layers: int) -> PeftConfig:
    head = getattr(model, "score", None)
    task = "CAUSAL_LM" if head is None else "FEATURE_EXTRACTION" if isinstance(tuning, Prompted) else None
    match tuning:
        case Lora() | Qlora():
            everything = tuning.target_modules == "all-linear"
            own = {"use_dora": tuning.dora} if isinstance(tuning, Lora) else {}
            pissa = isinstance(tuning, Lora) and tuning.init == "pissa"
            return LoraConfig(
                r=tuning.r,
                lora_alpha=tuning.alpha,
                lora_dropout=tuning.dropout,
                target_modules=tuning.target_modules,
                exclude_modules=["score"] if everything and head is not None else None,
                use_rslora=tuning.rslora,
                init_lora_weights=PISSA if pissa else True,
                task_type=task,
                **own,
            )
        case Ia3():
            feeding = [name for name in FEED_FORWARD if _has(model, name)]
            return IA3Config(target_modules=[*KEYS_AND_VALUES, *feeding], feedforward_modules=feeding, task_type=task)
        case LlamaAdapter():
            return AdaptionPromptConfig(
                adapter_len=tuning.tokens, adapter_layers=tuning.layers or layers, task_type=task
            )
        case PrefixTuning():
            return PrefixTuningConfig(num_virtual_tokens=tuning.virtual_tokens, task_type=task)
        case PromptTuning():
            words = {"prompt_tuning_init_text": tuning.init_text, "tokenizer_name_or_path": model.name_or_path}
            return PromptTuningConfig(
                num_virtual_tokens=tuning.virtual_tokens,
                prompt_tuning_init="TEXT" if tuning.init_text else "SAMPLE_VOCAB",
                task_type=task,
                **(words if tuning.init_text else {}),
            )
        case PTuning():
            return PromptEncoderConfig(
                num_virtual_tokens=tuning.virtual_tokens, encoder_hidden_size=tuning.encoder_size, task_type=task
            )
    raise TypeError(tuning.kind)


def _chosen(model: PreTrainedModel, tuning: Bitfit | Layers) -> list[Tensor]:
    """Return the weights of the model itself that train."""
    if isinstance(tuning, Bitfit):
        found = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
        if not found:
            raise RecipeError(
                "tuning.kind: bitfit trains bias terms, and this model has none (Llama and Mistral have none, Qwen2 "
                "has some); use lora, ia3 or layers"
            )
        return found
    layers = decoder_layers(model)
    numbers = layer_numbers(tuning, len(layers))
    asked = tuning.last if tuning.last is not None else len(set(tuning.indices or ()))
    if len(numbers) != asked:
        raise RecipeError(f"tuning: {_asked(tuning)} does not fit the model: it has {len(layers)} layers")
    modules = [layers[number] for number in numbers] + (last_norms(model) if tuning.norm else [])
    return [parameter for module in modules for parameter in module.parameters()]


def _check_ia3(model: PreTrainedModel) -> None:
    if not all(_has(model, name) for name in KEYS_AND_VALUES) or not any(_has(model, name) for name in FEED_FORWARD):
        raise RecipeError(
            f"tuning.kind: ia3 scales layers named {', '.join(KEYS_AND_VALUES)} and {' or '.join(FEED_FORWARD)}, and "
            "this model has other ones; use lora"
        )


def _has(model: PreTrainedModel, name: str) -> bool:
    return any(path.endswith(f".{name}") and isinstance(module, nn.Linear) for path, module in model.named_modules())


def _factors(model: PeftModel) -> dict[str, Tensor]:
    """Return a copy of the low-rank factors by the name that they have among the parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def _asked(tuning: Tuning) -> str:
    """Return what the recipe says, but for what it leaves as it is."""
    own = ", ".join(f"{key}: {value}" for key, value in tuning.model_dump(exclude_defaults=True).items())
    return f"{tuning.kind} ({own})" if own else tuning.kind
