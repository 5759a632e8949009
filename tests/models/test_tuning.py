"""Every tuning method: where it starts, what it trains, that it merges, is saved, switched off and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel
from tuning_cases import (
    ADAPTED,
    MERGED,
    METHODS,
    PROMPTED,
    base_model,
    build_qwen,
    logits,
    ragged_batch,
    trained_model,
    tuned_model,
)

from rlhf.engines.scoring import response_values, sequence_scores, token_scores
from rlhf.errors import RecipeError
from rlhf.models.adapter import save_adapter
from rlhf.models.loading import load_causal
from rlhf.models.merging import merged_weights
from rlhf.models.saving import save_merged
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.models.tuning import adapters_off, trainable_parameters
from rlhf.recipe.model_shape import Model, read_shape
from rlhf.recipe.tuning_schema import Bitfit, Ia3, Layers, LlamaAdapter, Lora, PromptTuning, Qlora, Tuning
from rlhf.recipe.tuning_support import support

TOKENS = torch.randint(6, 262, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama, which has no biases, and a Qwen2, which has some."""
    return {"llama": tiny_folder, "qwen2": build_qwen(tiny_folder, tmp_path_factory.mktemp("qwen"))}


def fitting(names: list[str]) -> list[tuple[str, str]]:
    """Every method on the Qwen2 and those that fit on the Llama; the LLaMA-Adapter the other way around."""
    pairs = [(arch, name) for arch in ("llama", "qwen2") for name in names]
    return [pair for pair in pairs if pair not in {("llama", "bitfit"), ("qwen2", "llama_adapter")}]


@pytest.mark.parametrize(("arch", "name"), fitting(list(METHODS)))
@pytest.mark.parametrize("kind", ["causal", "scalar"])
def test_as_many_weights_train_as_the_plan_says(folders: dict[str, Path], arch: str, name: str, kind: str) -> None:
    model = tuned_model(folders[arch], METHODS[name], kind)
    planned = Model(read_shape(folders[arch]), "float32", scalar=kind == "scalar", tuning=METHODS[name])
    assert sum(parameter.numel() for parameter in trainable_parameters(model)) == planned.trainable
    if name != "qlora":  # its weights are packed two by two
        assert sum(parameter.numel() for parameter in model.parameters()) == planned.parameters


@pytest.mark.parametrize("name", [name for name in METHODS if name not in (*PROMPTED, "bitfit")])
def test_training_starts_from_the_model_as_it_is(folders: dict[str, Path], name: str) -> None:
    plain = logits(base_model(folders["llama"], "causal", METHODS[name]), TOKENS)
    fresh = logits(tuned_model(folders["llama"], METHODS[name]), TOKENS)
    if name in ("pissa", "dora"):
        torch.testing.assert_close(fresh, plain, rtol=0, atol=2e-6)
    else:
        assert torch.equal(fresh, plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "bitfit"])
def test_what_trains_has_the_models_dtype(folders: dict[str, Path], name: str, dtype: str) -> None:
    model = tuned_model(folders["llama"], METHODS[name], dtype=dtype)
    assert {parameter.dtype for parameter in trainable_parameters(model)} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("arch", "name"), fitting(MERGED))
@pytest.mark.parametrize("kind", ["causal", "scalar"])
def test_merged_is_equal_to_unmerged(
    folders: dict[str, Path], tmp_path: Path, tiny_tokenizer: ChatTokenizer, arch: str, name: str, kind: str
) -> None:
    model = trained_model(folders[arch], METHODS[name], kind)
    save_merged(model, tiny_tokenizer, tmp_path, "float32")
    reloaded = base_model(tmp_path, kind)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert load_file(tmp_path / "model.safetensors").keys() >= load_file(folders[arch] / "model.safetensors").keys() - {
        "lm_head.weight"
    }
    torch.testing.assert_close(logits(reloaded, TOKENS), logits(model, TOKENS), rtol=1e-5, atol=2e-5)
    assert not torch.allclose(logits(model, TOKENS), logits(tuned_model(folders[arch], METHODS[name], kind), TOKENS))


@pytest.mark.parametrize("name", ["dora", "ia3", "pissa", "qlora"])
def test_merging_in_bfloat16_rounds_once(folders: dict[str, Path], name: str) -> None:
    """Each weight is that of double precision, within half a unit in the last of bfloat16's 8 bits."""
    model = trained_model(folders["qwen2"], METHODS[name], dtype="bfloat16")
    assert isinstance(model, PeftModel)
    merged = dict(merged_weights(model))
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    exact = in_double(layer)
    found = merged["model.layers.1.self_attn.v_proj.weight"].double()
    assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def in_double(layer: nn.Module) -> Tensor:
    """Merge a layer by the definitions of the methods, in double precision."""
    weight = layer.base_layer.weight.data
    if hasattr(layer.base_layer.weight, "quant_state"):
        import bitsandbytes

        weight = bitsandbytes.functional.dequantize_4bit(weight, layer.base_layer.weight.quant_state)
    if hasattr(layer, "ia3_l"):
        return weight.double() * layer.ia3_l["default"].detach().double()
    a, b = (side["default"].weight.detach().double() for side in (layer.lora_A, layer.lora_B))
    whole = weight.double() + layer.scaling["default"] * b @ a
    if "default" in layer.lora_magnitude_vector:
        lengths = layer.lora_magnitude_vector["default"].weight.detach().double()
        return whole / whole.norm(dim=1, keepdim=True) * lengths[:, None]
    return whole


@pytest.mark.parametrize(("arch", "name"), fitting(ADAPTED))
def test_peft_loads_the_adapter_on_its_base(folders: dict[str, Path], tmp_path: Path, arch: str, name: str) -> None:
    model = trained_model(folders[arch], METHODS[name])
    assert isinstance(model, PeftModel)
    save_adapter(model, tmp_path, folders[arch])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(folders[arch]), "CAUSAL_LM")
    base = base_model(folders[arch], "causal", METHODS[name])
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(loaded, TOKENS), logits(model, TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Some weights")
@pytest.mark.parametrize("name", ["lora", "ia3", "pissa", "llama_adapter", *PROMPTED])
def test_peft_loads_the_adapter_of_a_reward_model_with_its_head(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    model = trained_model(folders["llama"], METHODS[name], "scalar")
    assert isinstance(model, PeftModel)
    save_adapter(model, tmp_path, folders["llama"])
    base = AutoModelForSequenceClassification.from_pretrained(folders["llama"], num_labels=1, pad_token_id=0)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    one = ragged_batch((12,))
    with torch.no_grad():
        expected = sequence_scores(model, one)
        found = loaded(input_ids=one.tokens, attention_mask=one.attention_mask).logits[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if support(METHODS[name]).reference])
def test_without_its_adapters_it_is_the_model_it_started_from(folders: dict[str, Path], name: str) -> None:
    model = trained_model(folders["llama"], METHODS[name])
    batch = ragged_batch()
    trained = token_scores(model, batch, 1.0)
    weights = len(trainable_parameters(model))
    with adapters_off(model):
        found = token_scores(model, batch, 1.0)
    expected = token_scores(base_model(folders["llama"], "causal", METHODS[name]), batch, 1.0)
    assert torch.equal(found, expected)
    assert torch.equal(token_scores(model, batch, 1.0), trained)
    assert not torch.allclose(trained, expected)
    assert len(trainable_parameters(model)) == weights


@pytest.mark.parametrize("name", [name for name in METHODS if not support(METHODS[name]).reference])
def test_what_changes_the_model_itself_leaves_no_reference(folders: dict[str, Path], name: str) -> None:
    with pytest.raises(RecipeError, match=r"no reference is left inside"):
        adapters_off(tuned_model(folders["qwen2"], METHODS[name]))


@pytest.mark.parametrize("name", PROMPTED)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_prompted_scores_are_those_of_pefts_own_forward_pass(folders: dict[str, Path], arch: str, name: str) -> None:
    """PEFT reads one row at a time, without padding; ours reads all of them, and more padding changes nothing."""
    model = trained_model(folders[arch], METHODS[name])
    batch = ragged_batch()
    found = token_scores(model, batch, 0.7)[:, 0]
    for row, length in enumerate(batch.lengths().tolist()):
        tokens = batch.tokens[row : row + 1, :length]
        said = logits(model, tokens)[0, -length:] / 0.7
        alone = torch.log_softmax(said[:-1], -1).gather(1, tokens[0, 1:, None]).squeeze(1)
        torch.testing.assert_close(found[row, length - 3 : length], alone[-3:], rtol=1e-5, atol=1e-5)
        assert not found[row, : length - 3].any()
    wider = token_scores(model, ragged_batch(extra=5), 0.7)[:, 0, : batch.width]
    torch.testing.assert_close(wider, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PROMPTED)
def test_prompted_values_do_not_depend_on_padding(folders: dict[str, Path], name: str) -> None:
    model = trained_model(folders["qwen2"], METHODS[name], "scalar")
    batch = ragged_batch()
    with torch.no_grad():
        scores, values = sequence_scores(model, batch), response_values(model, batch)
        for row, length in enumerate(batch.lengths().tolist()):
            alone = batch.select([row]).narrow(length)
            torch.testing.assert_close(sequence_scores(model, alone), scores[row : row + 1], rtol=1e-5, atol=1e-5)
            found = response_values(model, alone)[0]
            torch.testing.assert_close(found, values[row, :length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "llama_adapter", "qlora", "layers"])
def test_flat_rows_say_what_padded_ones_say(folders: dict[str, Path], name: str) -> None:
    batch = ragged_batch()
    padded = token_scores(trained_model(folders["llama"], METHODS[name]), batch, 1.0)
    flat = token_scores(trained_model(folders["llama"], METHODS[name], flat=True), batch, 1.0)
    torch.testing.assert_close(flat, padded, rtol=1e-5, atol=1e-5)


def test_fresh_prompts_are_what_was_asked_for(folders: dict[str, Path], tiny_tokenizer: ChatTokenizer) -> None:
    table = load_causal(folders["llama"], "float32").get_input_embeddings().weight
    words = tuned_model(folders["llama"], PromptTuning(virtual_tokens=7, init_text="Say it."))
    assert isinstance(words, PeftModel)
    ids = tiny_tokenizer.hf("Say it.")["input_ids"]
    assert torch.equal(words.get_prompt(1)[0], table[ids])
    drawn = tuned_model(folders["llama"], PromptTuning(virtual_tokens=7))
    assert isinstance(drawn, PeftModel)
    assert all((table == row).all(1).any() for row in drawn.get_prompt(1)[0])


def test_layers_may_be_named(folders: dict[str, Path]) -> None:
    model = tuned_model(folders["qwen2"], Layers(indices=[2, 0], norm=False))
    trained = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"0", "2"}


def test_quantised_weights_take_half_a_byte(folders: dict[str, Path]) -> None:
    model = base_model(folders["llama"], "causal", METHODS["qlora"])
    linears = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(linears) == 2 * 7
    assert model.get_output_embeddings().weight.dtype == torch.float32
    weights = sum(module.in_features * module.out_features for module in linears)
    assert sum(module.weight.nbytes for module in linears) == weights / 2
    shape = read_shape(folders["llama"])
    lora = Lora(**METHODS["qlora"].model_dump(include={"r", "alpha"}))
    whole, packed = (Model(shape, "bfloat16", False, tuning).weight_bytes for tuning in (lora, METHODS["qlora"]))
    # two bytes become half a byte, and one of a scale for 64 weights, 4 bytes of its scale for 256 of them
    assert whole - packed == pytest.approx(weights * (2 - 0.5 - 1 / 64 - 4 / 256 / 64), abs=1)


@pytest.mark.parametrize(
    ("arch", "tuning", "message"),
    [
        ("llama", Bitfit(), r"bitfit .* this model has none .* use lora"),
        ("qwen2", LlamaAdapter(), r"llama_adapter does not fit"),
        ("llama", LlamaAdapter(layers=9), r"llama_adapter \(layers: 9\) does not fit"),
        ("llama", Layers(last=3), r"layers \(last: 3\) does not fit the model: it has 2 layers"),
        ("llama", Layers(indices=[0, 2]), r"it has 2 layers"),
        ("llama", Qlora(target_modules=["nothing"]), r"qlora \(target_modules: \['nothing'\]\) does not fit"),
    ],
)
def test_what_does_not_fit_is_said(folders: dict[str, Path], arch: str, tuning: Tuning, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tuned_model(folders[arch], tuning)


def test_ia3_needs_the_names_it_knows(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"ia3 scales layers named k_proj, v_proj and down_proj or fc2"):
        tuned_model(tmp_path, Ia3())


def test_conv1d_layers_merge_transposed(tmp_path: Path) -> None:
    """GPT-2 keeps its weights as inputs x outputs."""
    config = GPT2Config(vocab_size=262, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = trained_model(tmp_path, Lora(r=2, dora=True))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh.load_state_dict(dict(merged_weights(model)), strict=False)
    torch.testing.assert_close(logits(fresh, TOKENS), logits(model, TOKENS), rtol=1e-5, atol=2e-5)
