"""Parameter counts against real models, memory against hand-worked sums and what autograd really keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.algorithms import linear_logprobs
from rlhf.engines import scoring
from rlhf.models.flat_attention import use_flat_attention
from rlhf.recipe.activations import GPU_PART, KEPT, LARGE, PART, Pass, kept, logits
from rlhf.recipe.devices import Device
from rlhf.recipe.engine_memory import engine_memory
from rlhf.recipe.memory import CONTEXT, LARGEST_BUCKET, Cut, Memory, learner_memory
from rlhf.recipe.model_shape import Model, ModelShape, read_shape
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.tuning_schema import Full, Lora
from rlhf.types import TokenBatch

SHAPE = ModelShape(
    parameters=1000,
    lm_head=200,
    hidden=10,
    intermediate=20,
    layers=2,
    heads=2,
    q_width=10,
    kv_width=5,
    vocabulary=20,
    linears={"layers.0.q_proj": (10, 10), "layers.0.gate_proj": (10, 20)},
    biases=0,
    layer_sizes=(300, 300),
    last_norm=10,
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
    scalar = Model(shape, "float32", scalar=True, tuning=None)
    truth = LlamaForSequenceClassification(config(tied).__class__(**{**config(tied).to_dict(), "num_labels": 1}))
    assert scalar.parameters == truth.num_parameters()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_as_peft_counts_them(tmp_path, targets):
    config(False).save_pretrained(tmp_path)
    lora = Lora(r=4, target_modules=targets)
    model = Model(read_shape(tmp_path), "float32", scalar=False, tuning=lora)
    truth = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    trainable, everything = get_peft_model(LlamaForCausalLM(config(False)), truth).get_nb_trainable_parameters()
    assert (model.trainable, model.parameters) == (trainable, everything)


def test_shape_of_a_model_with_other_names(tmp_path):
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert (shape.hidden, shape.intermediate, shape.kv_width, shape.lm_head) == (32, 128, 32, 0)
    assert shape.linears["transformer.h.0.attn.c_attn"] == (32, 96)


WORK = Pass(tokens=8, width=4, scored=6, passes=1)


def test_what_a_layer_keeps_by_hand():
    full = Model(SHAPE, "bfloat16", scalar=False, tuning=Full())
    norms, inputs, mlp = 2 * 4 * 11 + 2 * 2 * 10, 2 * (2 * 10 + 10), 4 * 2 * 20
    plain = 2 * (10 + 2 * 5) + 2 * 2 * 4
    assert kept(full, WORK, on_gpu=False) == 8 * (norms + inputs + plain + mlp)
    fused = 2 * (10 + 2 * 5) + 4 * 2
    assert kept(full, WORK, on_gpu=True) == 8 * (norms + inputs + fused + mlp)
    wide = Pass(tokens=4000, width=2000, scored=0)
    assert kept(full, wide, on_gpu=False) == 4000 * (norms + inputs + fused + mlp)
    adapted = Model(SHAPE, "bfloat16", scalar=False, tuning=Lora(r=2))
    assert kept(adapted, WORK, True) == 8 * (2 * 4 * 11 + 2 * 2 * 1 + inputs + fused + mlp)


def test_copies_of_the_logits():
    for dtype, copies in (("bfloat16", 2 + 4 + 4), ("float32", 4 + 4)):
        model = Model(SHAPE, dtype, scalar=False, tuning=Full())
        assert logits(model, WORK, training=True) == 6 * 20 * 12
        assert logits(model, WORK, training=False) == 6 * 20 * copies
    assert logits(Model(SHAPE, "float32", scalar=True, tuning=Full()), WORK, True) == 0


def test_many_logits_are_never_whole_and_a_head_that_learns_keeps_their_probabilities():
    full = Model(SHAPE, "bfloat16", scalar=False, tuning=Full())
    frozen = Model(SHAPE, "bfloat16", scalar=False, tuning=Lora(r=2))
    many, more = (Pass(tokens=scored, width=4, scored=scored) for scored in (2**20, 2**23))
    assert (LARGE, PART, GPU_PART) == (
        scoring.LARGE,
        linear_logprobs.CHUNK_BYTES,
        linear_logprobs.DEVICE_BYTES,
    )
    assert logits(full, many, training=True) == 2**20 * 20 * 2
    assert logits(full, more, training=True) == 2**25
    assert logits(frozen, many, training=True) == logits(full, many, training=False) == 2**25
    assert KEPT == linear_logprobs.KEPT_BYTES


@pytest.mark.parametrize(
    ("stage", "weights", "optimizer"), [(0, 2000, 8000), (1, 2000, 3000), (2, 2000, 3000), (3, 500, 3000)]
)
def test_what_each_stage_divides_over_four_ranks(stage, weights, optimizer):
    model = Model(SHAPE, "bfloat16", scalar=False, tuning=Full())
    found = learner_memory(model, WORK, Cut(ranks=4, zero_stage=stage), on_gpu=True)
    assert found.resident == Memory(weights=weights, optimizer=optimizer)
    assert found.score.buffers == (2000 if stage == 3 else 0)
    assert found.host == 0


def test_gradients_are_divided_from_stage_2_on():
    model = Model(SHAPE, "float32", scalar=False, tuning=Full())
    several = Pass(tokens=1, width=1, scored=0, passes=3)
    after = {stage: learner_memory(model, several, Cut(4, stage), True).learn.gradients for stage in (1, 2)}
    assert after == {1: 4000 + 4000 + 800, 2: 1000 + 4000 + 800}
    assert LARGEST_BUCKET > 1000


def test_offloading_moves_the_optimizer_and_the_parameters_to_the_host():
    model = Model(SHAPE, "bfloat16", scalar=False, tuning=Full())
    optimizer = learner_memory(model, WORK, Cut(2, 3, "optimizer"), on_gpu=True)
    assert optimizer.resident == Memory(weights=1000)
    parameters = learner_memory(model, WORK, Cut(2, 3, "parameters"), on_gpu=True)
    assert parameters.resident == Memory()
    assert parameters.host - optimizer.host == 1000
    assert optimizer.host == 6000 + optimizer.learn.gradients


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    model = Model(SHAPE, "bfloat16", scalar=True, tuning=Lora(r=2))
    whole = learner_memory(model, WORK, Cut(), on_gpu=True).learn
    cut = learner_memory(model, WORK, Cut(checkpointing=True), on_gpu=True).learn
    layer = int(kept(model, WORK, True))
    assert whole.activations - cut.activations == 2 * layer - (2 * 8 * 10 * 2 + layer)


def test_a_frozen_model_only_scores():
    model = Model(SHAPE, "bfloat16", scalar=False, tuning=None)
    found = learner_memory(model, WORK, Cut(), on_gpu=True)
    assert (model.trainable, found.learn, found.resident) == (0, Memory(weights=2000), Memory(weights=2000))
    assert (found.score.activations, found.score.logits) == (8 * 10 * 2 + 8 * 2 * (3 * 10 + 3 * 20), 0)
    wordy = Pass(tokens=8, width=4, scored=8)
    assert learner_memory(model, wordy, Cut(), on_gpu=True).score.logits == 8 * 20 * 10


def test_engine_by_hand():
    device = Device("made", memory=64 << 30, flops=1, bandwidth=1, link=1)
    role = RolloutRole(gpus=1, max_sequences=8, gpu_memory_utilization=0.5)
    found = engine_memory(SHAPE, "bfloat16", role, 100, device)
    assert found.needed == 8 * 100 * 2 * 2 * 5 * 2
    assert found.least == 100 * 2 * 2 * 5 * 2
    assert found.awake.total == 32 << 30
    assert found.asleep == Memory(buffers=CONTEXT)
    halves = engine_memory(SHAPE, "bfloat16", role.model_copy(update={"tensor_parallel": 2}), 100, device)
    assert (halves.awake.weights, found.awake.weights) == (1000, 2000)
    on_cpu = engine_memory(SHAPE, "bfloat16", RolloutRole(max_sequences=8, kv_cache_gib=2), 100, None)
    head = 2 * 20 * SHAPE.hidden  # packed once more
    assert on_cpu.awake == Memory(weights=2000, logits=8 * 8 * 20, kv_cache=2 << 30, buffers=head)
    plain = engine_memory(SHAPE, "bfloat16", RolloutRole(engine="transformers", max_sequences=8), 100, None)
    assert plain.awake.kv_cache == found.needed


def test_activations_are_near_what_autograd_keeps(tmp_path):
    config(True).save_pretrained(tmp_path)
    model = LlamaForCausalLM._from_config(config(True), attn_implementation="sdpa")
    use_flat_attention(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(1, 300, (8, 64))
    real = torch.ones_like(tokens, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = scoring.response_logprobs(model, TokenBatch(tokens, real, real, torch.zeros(8, 64))).sum()
    assert loss.requires_grad
    measured = sum(size for size, _ in seen.values())
    model = Model(read_shape(tmp_path), "float32", scalar=False, tuning=Full())
    estimate = 3 * kept(model, Pass(512, 64, 512), on_gpu=False)
    assert estimate / (measured - 504 * 300 * 4) == pytest.approx(1, abs=0.12)
