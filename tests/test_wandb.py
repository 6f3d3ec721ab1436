"""--wandb: the numbers of metrics.jsonl under the same names; without it nothing is imported."""

import importlib.util
import json
import struct
import sys
import time

import pytest
from helpers_training import fine_tune, metrics, random_examples, sft_folder

from nanosft.errors import UserError


def logged(file) -> list[dict]:
    """The rows in an offline run: after 7 bytes, records of (crc, length, type, protobuf)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, rows = file.read_bytes(), 7, []
    assert len(content) < 1 << 15  # the format's first block
    while at + 7 <= len(content):
        _, length, _ = struct.unpack_from("<IHB", content, at)
        if at + 7 + length > len(content):  # not yet written
            break
        record = Record.FromString(content[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json)
                         for item in items})
    return rows


def test_offline_run_logs_the_numbers_of_metrics_jsonl(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    examples = random_examples(11)
    data = sft_folder(tmp_path / "data", train=examples, val=examples[:3])
    fine_tune(data, tmp_path / "out", max_steps=3, wandb="project")
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    for _ in range(100):  # wandb's own process writes the file, on a busy machine a little later
        if len(rows := logged(file)) == 3:
            break
        time.sleep(0.2)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "val_loss" in rows[-1]
    for row, expected in zip(rows, metrics(tmp_path / "out"), strict=True):
        assert expected.items() <= row.items()


def test_without_the_flag_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    fine_tune(sft_folder(tmp_path / "data", train=random_examples(4)), tmp_path / "out",
              max_steps=1)


def test_missing_package_is_one_line_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--wandb project needs a package; run `pip install wandb`"):
        fine_tune(sft_folder(tmp_path / "data", train=random_examples(4)), tmp_path / "out",
                  wandb="project")
    assert not (tmp_path / "out").exists()
