"""Every tuning method once, tiny models with and without biases, and models as they are after some training."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from rlhf.models.flat_attention import use_flat_attention
from rlhf.models.loading import load_causal
from rlhf.models.quantised import keep_packing, quantisation
from rlhf.models.scalar import load_scalar
from rlhf.models.tuning import apply_tuning, trainable_parameters
from rlhf.recipe.tuning_schema import (
    Bitfit,
    Full,
    Ia3,
    Layers,
    LlamaAdapter,
    Lora,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Qlora,
    Tuning,
)
from rlhf.recipe.tuning_support import support
from rlhf.types import TokenBatch

METHODS: dict[str, Tuning] = {
    "full": Full(),
    "lora": Lora(r=4, alpha=10),
    "rslora": Lora(r=4, rslora=True, target_modules=["q_proj", "up_proj"]),
    "dora": Lora(r=4, dora=True),
    "pissa": Lora(r=4, alpha=8, init="pissa"),
    "qlora": Qlora(r=4),
    "ia3": Ia3(),
    "llama_adapter": LlamaAdapter(tokens=5, layers=1),
    "prefix_tuning": PrefixTuning(virtual_tokens=3),
    "prompt_tuning": PromptTuning(virtual_tokens=3),
    "p_tuning": PTuning(virtual_tokens=3, encoder_size=12),
    "bitfit": Bitfit(),
    "layers": Layers(last=1),
}
ADAPTED = [name for name, tuning in METHODS.items() if support(tuning).adapter]
MERGED = [name for name, tuning in METHODS.items() if support(tuning).merges]
PROMPTED = ["prefix_tuning", "prompt_tuning", "p_tuning"]


def build_qwen(tiny: Path, folder: Path) -> Path:
    """Write a random Qwen2, whose queries, keys and values have biases, with the tokenizer of the tiny Llama."""
    config = Qwen2Config(
        vocab_size=262,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    for file in tiny.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder


def base_model(folder: Path, kind: str, tuning: Tuning | None = None, dtype: str = "float32") -> PreTrainedModel:
    """Load the model that a method starts from, quantised where it is."""
    how = quantisation(tuning, dtype)
    model = load_causal(folder, dtype, **how) if kind == "causal" else load_scalar(folder, dtype, 2, **how)
    keep_packing(model)
    return model


def tuned_model(
    folder: Path, tuning: Tuning, kind: str = "causal", dtype: str = "float32", flat: bool = False
) -> PreTrainedModel | PeftModel:
    """Return a model as it is before training."""
    model = base_model(folder, kind, tuning, dtype)
    if flat and support(tuning).flat:
        use_flat_attention(model)
    return apply_tuning(model, tuning, seed=5).eval()


def trained_model(
    folder: Path, tuning: Tuning, kind: str = "causal", dtype: str = "float32", flat: bool = False
) -> PreTrainedModel | PeftModel:
    """Return a model as it might be after training: everything that trains has moved."""
    model = tuned_model(folder, tuning, kind, dtype, flat)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def ragged_batch(lengths: tuple[int, ...] = (9, 4, 12, 7), extra: int = 0) -> TokenBatch:
    """Return rows of random text, the last 3 tokens of each the response, padded by `extra` columns more."""
    generator = torch.Generator().manual_seed(3)
    width = max(lengths) + extra
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    there = torch.zeros(len(lengths), width, dtype=torch.bool)
    response = there.clone()
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(6, 262, (length,), generator=generator)
        there[row, :length] = True
        response[row, length - 3 : length] = True
    return TokenBatch(tokens, there, response, torch.zeros(tokens.shape))


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Return what a model says of whole rows without padding."""
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
