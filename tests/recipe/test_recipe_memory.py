"""Parameter counts against real models, memory against hand-worked sums and what autograd really keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.recipe.base import Lora
from rlhf.recipe.memory import Memory, Model, ModelShape, engine_memory, read_shape
from rlhf.recipe.role_schema import RolloutRole

SHAPE = ModelShape(
    parameters=1000,
    lm_head=200,
    hidden=10,
    intermediate=20,
    layers=3,
    kv_width=5,
    vocabulary=20,
    linears={"layers.0.q_proj": 20, "layers.0.gate_proj": 30},
)


def config(tied):
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_shape_of_a_llama(tmp_path, tied):
    config(tied).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.parameters == LlamaForCausalLM(config(tied)).num_parameters()
    assert (shape.hidden, shape.intermediate, shape.layers, shape.vocabulary) == (64, 160, 3, 300)
    assert shape.kv_width == 2 * 16
    assert shape.lm_head == (0 if tied else 300 * 64)
    assert len(shape.linears) == 3 * 7
    scalar = Model(shape, "float32", scalar=True, trained=False, lora=None)
    truth = LlamaForSequenceClassification(config(tied).__class__(**{**config(tied).to_dict(), "num_labels": 1}))
    assert scalar.parameters == truth.num_parameters()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_as_peft_counts_them(tmp_path, targets):
    config(False).save_pretrained(tmp_path)
    lora = Lora(r=4, target_modules=targets)
    model = Model(read_shape(tmp_path), "float32", scalar=False, trained=True, lora=lora)
    truth = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    trainable, everything = get_peft_model(LlamaForCausalLM(config(False)), truth).get_nb_trainable_parameters()
    assert (model.trainable, model.parameters) == (trainable, everything)


def test_shape_of_a_model_with_other_names(tmp_path):
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert (shape.hidden, shape.intermediate, shape.kv_width, shape.lm_head) == (32, 128, 32, 0)
    assert shape.linears["transformer.h.0.attn.c_attn"] == 32 + 96


def test_trained_with_adapters_by_hand():
    model = Model(SHAPE, "bfloat16", scalar=False, trained=True, lora=Lora(r=2))
    assert model.trainable == 2 * (20 + 30)
    per_token = 3 * (8 * 10 + 2 * 5 + 4 * 20) * 2 + 2 * 4 * 20
    expected = Memory(weights=1100 * 2, optimizer=100 * 18, activations=7 * per_token, kv_cache=0)
    assert model.memory(7) == expected
    assert expected.total == 2200 + 1800 + 7 * 1180


def test_trained_critic_by_hand():
    model = Model(SHAPE, "float32", scalar=True, trained=True, lora=None)
    assert model.parameters == model.trainable == 1000 - 200 + 10
    assert model.memory(7) == Memory(810 * 4, 810 * 20, 7 * 3 * 170 * 4, 0)
    adapted = Model(SHAPE, "float32", scalar=True, trained=True, lora=Lora(r=2, target_modules=["q_proj"]))
    assert (adapted.trainable, adapted.parameters) == (2 * 20 + 10, 810 + 2 * 20)


def test_frozen_by_hand():
    model = Model(SHAPE, "bfloat16", scalar=False, trained=False, lora=None)
    assert model.trainable == 0
    assert model.memory(7) == Memory(2000, 0, 7 * (170 * 2 + 4 * 20), 0)


def test_engine_by_hand():
    needed = 8 * 100 * 3 * 2 * 5 * 2
    on_gpu = engine_memory(SHAPE, "bfloat16", RolloutRole(gpus=1, max_sequences=8), 100)
    assert on_gpu == Memory(2000, 0, 8 * 20 * 4, needed)
    on_cpu = engine_memory(SHAPE, "bfloat16", RolloutRole(max_sequences=8, kv_cache_gib=2), 100)
    assert on_cpu.kv_cache == 2 << 30
    plain = engine_memory(SHAPE, "bfloat16", RolloutRole(engine="transformers", max_sequences=8), 100)
    assert plain.kv_cache == needed


def test_activations_are_near_what_autograd_keeps(tmp_path):
    config(True).save_pretrained(tmp_path)
    model = LlamaForCausalLM(config(True))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(0, 300, (8, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten())
    assert loss.requires_grad
    measured = sum(size for size, _ in kept.values())
    estimate = Model(read_shape(tmp_path), "float32", scalar=False, trained=True, lora=None).memory(8 * 64).activations
    assert 0.6 < estimate / measured < 1.6
