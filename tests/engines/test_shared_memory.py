"""Weights through shared memory: exact, bounded, refused when damaged, and never left behind."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf.engines.shared_memory import (
    ALIGNMENT,
    Bucket,
    Checksum,
    Inbox,
    Outbox,
    content,
    folder_weights,
    send,
    tensor_bytes,
)
from rlhf.errors import RecipeError, ResourceError, TrainingError


def some_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embed": torch.randn(7, 5),
        "norm": torch.randn(3).bfloat16(),
        "transposed": torch.randn(4, 6).T,
        "steps": torch.tensor(9),
        "empty": torch.empty(0, 3),
        "large": torch.randn(500),
    }


class Receiver:
    """Receives buckets as an engine does."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.weights: list[tuple[str, torch.Tensor]] = []
        self.buckets: list[Bucket] = []
        self.sizes: list[int] = []

    def begin(self) -> None:
        self.inbox.begin()
        self.weights = []

    def update_weights(self, announcement: dict) -> None:
        bucket = Bucket(**announcement)
        self.sizes.append(len(content(announcement)))
        self.weights += [(name, tensor.clone()) for name, tensor in self.inbox.receive(bucket)]
        self.buckets.append(bucket)


@pytest.mark.parametrize("bucket_bytes", [1, 200, 10**6])
def test_all_tensors_arrive_bit_for_bit_and_the_files_go(bucket_bytes):
    receiver = Receiver()
    weights = some_weights()
    send(weights.items(), receiver.update_weights, bucket_bytes)
    assert [name for name, _ in receiver.weights] == list(weights)
    for name, tensor in receiver.weights:
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name])
    assert not any(Path(bucket.path).exists() for bucket in receiver.buckets)


def test_buckets_hold_what_fits_and_a_larger_tensor_goes_alone():
    receiver = Receiver()
    send(some_weights().items(), receiver.update_weights, 256)
    # Starts are multiples of 64: embed 0-140, norm 192-198; transposed would end at 352.
    assert [bucket.names for bucket in receiver.buckets] == [
        ["embed", "norm"],
        ["transposed", "steps", "empty"],
        ["large"],
    ]
    assert receiver.sizes == [198, 192, 2000]
    assert ALIGNMENT == 64


def test_checksum_is_that_of_the_tensors_however_they_are_cut():
    whole = Checksum()
    for item in some_weights().items():
        whole.add(*item)
    for bucket_bytes in (1, 200, 10**6):
        receiver = Receiver()
        send(some_weights().items(), receiver.update_weights, bucket_bytes)
        assert receiver.buckets[-1].checksum == whole.hexdigest()


def test_checksum_of_nothing_is_that_of_xxh3():
    assert Checksum().hexdigest() == "2d06800538d394c2"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("v", torch.tensor([1.0, 2.0, 3.0, 4.0])),
        ("w", torch.tensor([1.0, 2.0, 3.0, 5.0])),
        ("w", torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        ("w", torch.tensor([1.0, 2.0, 3.0, 4.0]).view(torch.int32)),
    ],
    ids=["name", "value", "shape", "dtype"],
)
def test_checksum_tells_apart(name, tensor):
    one, other = Checksum(), Checksum()
    one.add("w", torch.tensor([1.0, 2.0, 3.0, 4.0]))
    other.add(name, tensor)
    assert one.hexdigest() != other.hexdigest()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip_a_byte, "arrived with checksum"), (cut_short, "end after"), (Path.unlink, "same machine")],
)
def test_damage_on_the_way_is_refused(damage, message, tmp_path):
    def deliver(announcement: dict) -> None:
        copy = tmp_path / "bucket"
        copy.write_bytes(Path(announcement["path"]).read_bytes())
        damage(copy)
        Inbox().receive(Bucket(**announcement | {"path": str(copy)}))

    with pytest.raises(TrainingError, match=message):
        send(some_weights().items(), deliver)


def test_a_bucket_that_never_came_is_noticed_at_the_next():
    announcements: list[dict] = []
    receiver = Receiver()

    def lose_the_second(announcement: dict) -> None:
        announcements.append(announcement)
        if len(announcements) != 2:
            receiver.update_weights(announcement)

    with pytest.raises(TrainingError, match="refused"):
        send(some_weights().items(), lose_the_second, 1)
    assert len(announcements) == 3


def test_the_file_goes_when_the_receiver_fails():
    paths = []

    def fail(announcement: dict) -> None:
        paths.append(Path(announcement["path"]))
        assert paths[0].exists()
        raise TrainingError("the engine died")

    with pytest.raises(TrainingError, match="died"):
        send(some_weights().items(), fail)
    assert not paths[0].exists()


def open_buckets() -> list[str]:
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return [link for link in links if "rlhf-weights" in link]


def test_the_file_goes_when_the_weights_fail():
    before = len(open_buckets())  # of senders that other tests keep

    def failing():
        yield "w", torch.ones(3)
        assert len(open_buckets()) == before + 2
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        send(failing(), Receiver().update_weights)
    assert len(open_buckets()) == before


KILLED_SENDER = """
import json, sys, time, torch
from rlhf.engines.shared_memory import send
def announce(bucket):
    print(json.dumps(bucket), flush=True)
    time.sleep(60)
send({"w": torch.arange(5.0)}.items(), announce)
"""


def test_the_file_goes_when_the_sender_is_killed_and_what_was_received_stays():
    with subprocess.Popen([sys.executable, "-c", KILLED_SENDER], stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        bucket = Bucket(**json.loads(sender.stdout.readline()))
        inbox = Inbox()
        [(_, tensor)] = inbox.receive(bucket)
        sender.kill()
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    with pytest.raises(TrainingError, match="same machine"):
        inbox.receive(bucket)


def test_the_sender_may_reuse_its_memory():
    def reusing():
        buffer = torch.empty(3)
        for value in range(4):
            yield f"w{value}", buffer.fill_(value)

    receiver = Receiver()
    send(reusing(), receiver.update_weights)
    assert [tensor.tolist() for _, tensor in receiver.weights] == [[float(value)] * 3 for value in range(4)]


def test_memory_is_kept_and_filled_again_only_when_it_was_answered():
    order: list[str] = []
    receiver = Receiver()
    paths: list[set[str]] = []
    with Outbox(1) as outbox:
        for turn in range(3):
            weights = {name: tensor + turn for name, tensor in some_weights().items()}
            receiver.begin()
            receiver.buckets.clear()
            receiver.sizes.clear()
            late: list[dict] = []

            def announce(announcement: dict, last: bool, late: list[dict] = late):
                number = len(late)
                assert last == (number == 5)
                late.append(announcement)
                order.append(f"announced {number}")

                def answer() -> None:
                    order.append(f"answered {number}")
                    receiver.update_weights(announcement)

                return answer

            checksum = outbox.send(weights.items(), announce)
            for announcement in late[len(receiver.buckets) :]:
                receiver.update_weights(announcement)
            assert all(torch.equal(tensor, weights[name]) for name, tensor in receiver.weights)
            assert receiver.buckets[-1].checksum == checksum
            paths.append({bucket.path for bucket in receiver.buckets})
    # Six tensors go alone: the third waits for the first, the fourth for the second.
    assert order[:6] == ["announced 0", "announced 1", "answered 0", "announced 2", "answered 1", "announced 3"]
    assert len(paths[0]) == 2
    assert paths[0] == paths[1] == paths[2]


def test_another_file_under_the_same_path_is_not_taken_for_the_old_one(tmp_path):
    place = tmp_path / "bucket"
    receiver = Receiver()
    for value in (1.0, 2.0):

        def deliver(announcement: dict) -> None:
            place.unlink(missing_ok=True)
            place.write_bytes(content(announcement))
            receiver.begin()
            receiver.update_weights(announcement | {"path": str(place)})

        send({"w": torch.full((3,), value)}.items(), deliver)
        assert [tensor.tolist() for _, tensor in receiver.weights] == [[value] * 3]


def test_no_room_is_an_error_that_says_so():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ResourceError, match="no room for 8000 bytes"):
            send({"w": torch.zeros(2000)}.items(), Receiver().update_weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tensor_bytes():
    assert tensor_bytes("bfloat16", [2, 3]) == 12
    assert tensor_bytes("int64", []) == 8


def test_folder_weights_reads_all_shards(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert {name: tensor.tolist() for name, tensor in folder_weights(tmp_path)} == {"a": [1.0, 1.0], "b": [0.0]}


def test_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"no \*\.safetensors"):
        list(folder_weights(tmp_path))
