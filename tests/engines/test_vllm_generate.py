"""vLLM in this process, against transformers with the same weights in float32."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rollout_oracle import differences, is_greedy, open_model, perturb, save, sharpen
from transformers import LlamaConfig

from rlhf.engines.base import RolloutSpec
from rlhf.engines.shared_memory import Checksum, content, folder_weights, send
from rlhf.engines.vllm_generate import VllmEngine, backend_for
from rlhf.errors import RecipeError, TrainingError
from rlhf.recipe.role_schema import RolloutRole
from rlhf.types import Prompt, Rollout, Sampling

pytestmark = pytest.mark.vllm

TOLERANCE = 5e-5
SIXTEEN = Sampling(16)
# The second and fourth are longer than a block of the KV cache (128 tokens).
PROMPTS = [Prompt(str(n), tuple(6 + (7 * i + n) % 256 for i in range(n)), "") for n in (5, 150, 9, 200)]


def spec(folder: Path, **changes: object) -> RolloutSpec:
    role = RolloutRole(max_sequences=32)
    return replace(RolloutSpec(folder, "float32", role, max_length=256, threads=1, seed=0), **changes)


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of the same architecture; predictions are sharp, so wrong weights show."""
    root = tmp_path_factory.mktemp("models")
    first = save(sharpen(open_model(tiny_folder)), tiny_folder, root / "0")
    others = [save(perturb(open_model(first), seed, 0.5), first, root / str(seed)) for seed in (1, 2)]
    return [first, *others]


@pytest.fixture(scope="module")
def started(folders: list[Path]) -> Iterator[VllmEngine]:
    """One engine for all tests: a second in the same process would take another gigabyte of KV cache."""
    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    yield VllmEngine(spec(folders[0]))
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    torch.set_num_threads = set_num_threads
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def engine(started: VllmEngine, folders: list[Path]) -> VllmEngine:
    """The engine, serving the first model, its prefix cache full of keys of the long prompts."""
    started.load(folders[0], 0)
    started.generate(PROMPTS, Sampling(1), [[0]] * 4)
    return started


def draw(engine: VllmEngine, sampling: Sampling = SIXTEEN, seeds: tuple[int, ...] = (1, 2)) -> list[Rollout]:
    return engine.generate(PROMPTS, sampling, [list(seeds)] * len(PROMPTS))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.4])
def test_logprobs_are_those_of_the_sampled_tokens_at_the_temperature(engine, folders, temperature):
    rollouts = draw(engine, Sampling(16, temperature))
    assert differences(open_model(folders[0]), rollouts, temperature).max() < TOLERANCE
    assert [rollout.seed for rollout in rollouts] == [1, 2] * 4
    assert [rollout.prompt.id for rollout in rollouts] == ["5", "5", "150", "150", "9", "9", "200", "200"]


def test_top_p_logprobs_are_renormalised(engine, folders):
    whole = differences(open_model(folders[0]), draw(engine, Sampling(16, top_p=0.5)))
    # Within a nucleus of mass m in [0.5, 1] a token's logprob rises by -log m <= log 2.
    assert whole.max() > 0.01
    assert whole.max() < 0.6931 + TOLERANCE


def test_a_seed_gives_the_same_response_in_any_company(engine):
    def samples(rollouts: list[Rollout]) -> dict[tuple[str, int], tuple[int, ...]]:
        return {(rollout.prompt.id, rollout.seed): rollout.tokens for rollout in rollouts}

    batch = samples(draw(engine, seeds=(1, 2, 3)))
    assert samples(draw(engine, seeds=(1, 2, 3))) == batch
    assert samples(engine.generate(PROMPTS[::-1], Sampling(16), [[3, 1, 2]] * 4)) == batch
    alone = samples(engine.generate(PROMPTS[:1], Sampling(16), [[2]]))
    assert alone == {("5", 2): batch["5", 2]}
    assert len(set(batch.values())) == len(batch)


def test_more_tokens_of_prompts_than_go_into_a_step_change_no_response(engine):
    """32 prompts of 200 tokens: vLLM takes 4,096 tokens into a step, which ends within a prompt."""
    prompts = [Prompt(str(n), tuple(6 + (7 * i * (n + 1)) % 256 for i in range(200)), "") for n in range(32)]
    together = engine.generate(prompts, SIXTEEN, [[n] for n in range(32)])
    for n in (0, 20, 31):
        assert together[n].tokens == engine.generate([prompts[n]], SIXTEEN, [[n]])[0].tokens


def test_calls_at_the_same_time_draw_what_one_call_would(engine):
    alone = draw(engine, seeds=(1, 2, 3))
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(draw, engine, seeds=(seed,)) for seed in (1, 2, 3)]
        apart = [call.result(timeout=60) for call in calls]
    together = [apart[seed][row] for row in range(len(PROMPTS)) for seed in range(3)]
    assert [replace(rollout, logprobs=()) for rollout in together] == [replace(r, logprobs=()) for r in alone]
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=TOLERANCE)


def test_an_update_waits_for_running_responses_and_lets_no_new_one_begin(engine, folders):
    steps, began = engine.llm.llm_engine.step, threading.Event()

    def step() -> object:
        began.set()
        time.sleep(0.02)
        return steps()

    engine.llm.llm_engine.step = step
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(draw, engine)
            assert began.wait(20)
            engine.start_weight_update()
            assert running.done() or not engine.gate.inside
            with pytest.raises(TrainingError, match="weight update is unfinished"):
                draw(engine)
            rollouts = running.result(timeout=60)
    finally:
        del engine.llm.llm_engine.step
    assert {rollout.policy_version for rollout in rollouts} == {0}
    assert differences(open_model(folders[0]), rollouts).max() < TOLERANCE


def test_end_of_sequence_stays_in_the_tokens_and_out_of_the_text(started, tiny_folder):
    started.load(tiny_folder, 0)
    end = started.tokenizer.eos_ids[0]
    rollouts = started.generate(PROMPTS[:1], Sampling(40), [range(48)])
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert stopped
    for rollout in rollouts:
        ended = rollout.finish_reason == "stop"
        assert rollout.tokens.count(end) == (rollout.tokens[-1] == end) == ended
        assert ended or len(rollout.tokens) == 40
        assert len(rollout.logprobs) == len(rollout.tokens)
        assert rollout.text == started.tokenizer.decode(rollout.tokens)
        assert "<|" not in rollout.text


def test_load_serves_the_new_weights_and_forgets_the_old_keys(engine, folders):
    before = draw(engine)
    for version, folder in ((4, folders[1]), (5, folders[2])):
        checksum = Checksum()
        for item in folder_weights(folder):
            checksum.add(*item)
        receipt = engine.load(folder, version)
        assert (receipt.version, receipt.checksum) == (version, checksum.hexdigest()) == engine.served()
        assert receipt.bytes == sum(tensor.nbytes for _, tensor in folder_weights(folder))
        model = open_model(folder)
        rollouts = draw(engine)
        assert {rollout.policy_version for rollout in rollouts} == {version}
        assert differences(model, rollouts).max() < TOLERANCE
        assert differences(open_model(folders[0]), rollouts).mean() > 0.1
        best = engine.generate(PROMPTS, Sampling(16, temperature=0), [[0]] * 4)
        assert all(is_greedy(model, rollout) for rollout in best)
    engine.load(folders[0], 6)
    assert [rollout.tokens for rollout in draw(engine)] == [rollout.tokens for rollout in before]


def test_generates_nothing_while_an_update_is_unfinished(engine, folders):
    def refuses() -> None:
        with pytest.raises(TrainingError, match="weight update is unfinished"):
            draw(engine)

    engine.start_weight_update()
    refuses()
    send(folder_weights(folders[1]), engine.update_weights)
    refuses()
    engine.finish_weight_update()
    refuses()
    assert engine.served()[0] == 0
    assert engine.update_weight_version(3) == engine.served()
    assert {rollout.policy_version for rollout in draw(engine)} == {3}


def corrupt(engine: VllmEngine, bad_bucket: int) -> Callable[[dict], None]:
    """Return an `update_weights` that changes one byte of the n-th bucket on its way."""
    count = 0

    def update_weights(announcement: dict) -> None:
        nonlocal count
        count += 1
        if count == bad_bucket:
            path = Path(announcement["path"])
            memory = bytearray(path.read_bytes())
            memory[len(content(announcement)) - 1] ^= 1  # the file may be longer than what is in it
            path.write_bytes(memory)
        engine.update_weights(announcement)

    return update_weights


@pytest.mark.parametrize("bad_bucket", [1, 5, 7])
def test_damaged_weights_are_refused_until_a_whole_update_comes(engine, folders, bad_bucket):
    engine.start_weight_update()
    with pytest.raises(TrainingError, match="refused"):
        send(folder_weights(folders[1]), corrupt(engine, bad_bucket), 16_000)
    with pytest.raises(TrainingError, match="weight update is unfinished"):
        draw(engine)
    with pytest.raises(TrainingError, match="was declared"):
        engine.update_weight_version(1)
    engine.load(folders[2], 2)
    assert differences(open_model(folders[2]), draw(engine)).max() < TOLERANCE


def test_an_abandoned_update_does_not_spoil_the_next(engine, folders):
    engine.start_weight_update()
    weights = list(folder_weights(folders[1]))
    send(weights[: len(weights) // 2], engine.update_weights)
    engine.load(folders[2], 2)
    assert differences(open_model(folders[2]), draw(engine)).max() < TOLERANCE


def test_a_prompt_without_room_for_its_response_is_named(engine):
    with pytest.raises(TrainingError, match=r"prompt 200 has 200 tokens; with 57 .* 256"):
        engine.generate(PROMPTS, Sampling(57), [[0]] * 4)


def test_no_prompts_no_rollouts(engine):
    assert engine.generate([], Sampling(4), []) == []


def test_head_size_is_checked_before_anything_starts(tmp_path):
    LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"heads have 16 dimensions, supported are 32, 64, 80"):
        VllmEngine(spec(tmp_path))


def test_length_beyond_the_model_is_refused(tiny_folder):
    with pytest.raises(RecipeError, match="513 tokens, but the model was built for 512"):
        VllmEngine(spec(tiny_folder, max_length=513))


def test_tensor_parallel_needs_gpus(tiny_folder):
    with pytest.raises(RecipeError, match="tensor_parallel above 1 needs GPUs"):
        VllmEngine(spec(tiny_folder, role=RolloutRole(tensor_parallel=2)))


@pytest.mark.parametrize(
    ("share", "on_cpu", "backend"),
    [(None, True, "shared_memory"), ("policy", True, "shared_memory"), ("policy", False, "ipc"), (None, False, "nccl")],
)
def test_backend_follows_the_place_of_the_engine(share, on_cpu, backend):
    assert backend_for(RolloutRole(share=share, gpus=0.5), on_cpu) == backend
