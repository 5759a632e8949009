"""Where models come from: folders, GGUF files, the tiny model, the hub; and what is cached."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf.errors import RecipeError
from rlhf.models.cache import build_once, default_cache
from rlhf.models.loading import load_causal, resolve_model
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.schema import ModelSource


def test_local_folder_is_itself(tiny_folder: Path) -> None:
    assert resolve_model(ModelSource(path=str(tiny_folder))) == tiny_folder.resolve()


def test_tiny_is_built_once_in_the_cache(tmp_path: Path) -> None:
    first = resolve_model(ModelSource(path="tiny://llama"), cache=tmp_path)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    second = resolve_model(ModelSource(path="tiny://llama"), cache=tmp_path)
    assert first == second
    assert (second / "model.safetensors").stat().st_mtime_ns == stamp
    assert first.parent == tmp_path / "models"
    assert load_causal(first, "float32").config.vocab_size == 262


def test_cache_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "mine"))
    assert resolve_model(ModelSource(path="tiny://llama")).is_relative_to(tmp_path / "mine")
    monkeypatch.delenv("RLHF_CACHE")
    assert default_cache() == Path.home() / ".cache" / "rlhf"


def test_replaced_chat_template_leaves_the_source_alone(tiny_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "short.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    source = ModelSource(path=str(tiny_folder), chat_template=template)
    folder = resolve_model(source, cache=tmp_path)
    assert folder != tiny_folder
    assert load_tokenizer(folder).hf.decode(load_tokenizer(folder).prompt_ids([{"role": "user", "content": "Hi"}])) == (
        "u:Hi<|im_end|>a:"
    )
    assert "<|im_start|>" in load_tokenizer(tiny_folder).hf.chat_template
    assert (folder / "model.safetensors").is_symlink()
    assert torch.equal(
        load_causal(folder, "float32").lm_head.weight, load_causal(tiny_folder, "float32").lm_head.weight
    )
    assert resolve_model(source, cache=tmp_path) == folder
    template.write_text(template.read_text() + "{# changed #}")
    assert resolve_model(source, cache=tmp_path) != folder


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("../no/such", "there is no folder"),
        ("nobody/nothing-at-all", r"nobody/nothing-at-all is no folder here and cannot be had .*HF_HUB_OFFLINE"),
        ("gguf://no_such_package/x.gguf", "no Python package 'no_such_package' is installed"),
        ("gguf:///no/such.gguf", "there is no file /no/such.gguf"),
    ],
)
def test_missing_models_say_what_is_missing(path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        resolve_model(ModelSource(path=path), cache=tmp_path)
    assert str(caught.value).startswith("model.path: ")
    assert "\n" not in str(caught.value)


def test_unusable_folders_are_recipe_errors(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no config\.json"):
        resolve_model(ModelSource(path=str(tmp_path)))
    shutil.copytree(tiny_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="no safetensors weights"):
        resolve_model(ModelSource(path=str(tmp_path / "pickled")))
    with pytest.raises(RecipeError, match=r"no file .*missing\.jinja"):
        resolve_model(ModelSource(path=str(tiny_folder), chat_template=tmp_path / "missing.jinja"))


def test_missing_weights_are_never_drawn_at_random(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "holes")
    weights = load_file(tmp_path / "holes" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"lacks weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal(tmp_path / "holes", "float32")


def test_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    def succeed(folder: Path) -> None:
        (folder / "whole").write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path, "model", "key", fail)
    folder = build_once(tmp_path, "model", "key", succeed)
    assert [file.name for file in folder.iterdir()] == ["whole"]


def test_concurrent_runs_build_once(tmp_path: Path) -> None:
    builds = []

    def build(folder: Path) -> None:
        builds.append(folder)
        time.sleep(0.2)
        (folder / "weights").write_text("done")

    def run() -> None:
        assert (build_once(tmp_path, "model", "key", build) / "weights").read_text() == "done"

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def write_gguf(file: Path, model: PreTrainedModel, folder: Path) -> None:
    """Write the tiny Llama as float32 GGUF: an oracle for the import, from the format's side."""
    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_scores([0.0] * len(vocabulary))  # in place of merges: bytes have none
    writer.add_token_types([3 if index < 6 else 1 for index in range(len(vocabulary))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):  # llama.cpp interleaves the two halves of each head
                heads = weight.shape[0] // config.head_dim
                halves = weight.reshape(heads, 2, config.head_dim // 2, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_becomes_the_model_it_was_written_from(tiny_folder: Path, tmp_path: Path) -> None:
    original = load_causal(tiny_folder, "bfloat16")
    write_gguf(tmp_path / "tiny.gguf", original.float(), tiny_folder)
    folder = resolve_model(ModelSource(path=f"gguf://{tmp_path}/tiny.gguf"), cache=tmp_path)
    assert folder.name.startswith("tiny-")
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    tokens = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        assert torch.equal(load_causal(folder, "float32")(tokens).logits, original(tokens).logits)
    prompt = [{"role": "user", "content": "Grüezi"}]
    assert load_tokenizer(folder).prompt_ids(prompt) == load_tokenizer(tiny_folder).prompt_ids(prompt)


@pytest.mark.real_model
def test_model_inside_a_package_answers(real_folder: Path) -> None:
    weights = load_file(real_folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert sum(weight.numel() for weight in weights.values()) == 134_515_008
    assert "lm_head.weight" not in weights
    tokenizer = load_tokenizer(real_folder)
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "What is the capital of France?"}])
    plain = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    answer = plain.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[0, len(prompt) :].tolist()
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_ids[0]
    assert AutoTokenizer.from_pretrained(real_folder).chat_template == tokenizer.hf.chat_template
