"""What the ranks of one machine share: downloads and sums of files."""

import threading

import huggingface_hub
import numpy as np
import pytest
import torch.distributed as dist
from helpers_training import flip_a_bit, save_tiny_model, text_folder

from nanosft import shards, weights
from nanosft.errors import UserError
from nanosft.machine import first_on_machine


@pytest.fixture
def two_local_ranks(monkeypatch):
    """As torchrun starts them; both are this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    yield store
    del store


@pytest.mark.parametrize("fails", [True, False])
def test_second_rank_waits_for_the_first_and_is_told_whether_it_succeeded(fails, two_local_ranks):
    events, second = [], None

    def wait():
        with first_on_machine("work") as is_done:
            events.append(is_done)

    try:
        with first_on_machine("work") as is_done:
            assert not is_done
            second = threading.Thread(target=wait)
            second.start()
            second.join(0.2)
            events.append("the first is through")
            if fails:
                raise UserError("no such file")
    except UserError:
        pass
    second.join()
    assert events == ["the first is through", not fails]


@pytest.mark.parametrize("name", ["GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"])
def test_each_machine_and_each_start_has_its_own_first(name, two_local_ranks, monkeypatch):
    for value in ("0", "1"):
        monkeypatch.setenv(name, value)
        with first_on_machine("work") as is_done:
            assert not is_done
        with first_on_machine("work") as is_done:
            assert is_done


def test_single_process_needs_no_store(monkeypatch):
    monkeypatch.setattr(dist, "TCPStore", None)
    for _ in range(2):
        with first_on_machine("work") as is_done:
            assert not is_done


def test_one_rank_downloads_a_model_and_the_others_do_not_ask_the_hub(
        two_local_ranks, tmp_path, monkeypatch):
    offline = []

    def download(hub_id, allow_patterns, local_files_only):
        offline.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert [weights.find_model("gpt2") for _ in range(3)] == [tmp_path] * 3
    assert offline == [False, True, True]


@pytest.fixture
def summed(monkeypatch) -> list[str]:
    """The names of the files whose sha256 was computed."""
    names, sha256_of = [], shards.sha256_of
    monkeypatch.setattr(shards, "sha256_of",
                        lambda path: names.append(path.name) or sha256_of(path))
    return names


def test_one_rank_sums_a_file_for_all(two_local_ranks, tmp_path, summed):
    text_folder(tmp_path / "data", train=range(9))
    save_tiny_model(tmp_path / "model")
    shards.write_sums(tmp_path / "model", [tmp_path / "model" / "config.json"])
    summed.clear()
    for _ in range(2):
        read = shards.Shards(str(tmp_path / "data"), "train", "text")
        np.testing.assert_array_equal(read[0:9], range(9))
        weights.read_config(tmp_path / "model")
    assert summed == ["meta.json", "train_000000.npy", "config.json"]


def test_each_rank_refuses_a_file_that_is_damaged(two_local_ranks, tmp_path, summed):
    text_folder(tmp_path / "data", train=range(9))
    flip_a_bit(tmp_path / "data" / "train_000000.npy")
    summed.clear()
    for _ in range(2):
        with pytest.raises(UserError, match=r"train_000000\.npy: sha256 "):
            shards.Shards(str(tmp_path / "data"), "train", "text")[0:9]
    assert summed == ["meta.json", *["train_000000.npy"] * 2]
