"""A training that is killed in the middle resumes and ends with the same adapter, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interleaf.fit import last_whole_checkpoint

ROOT = Path(__file__).parent.parent


def start(way: str, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "tests.resumable", way, str(folder), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors.decode()[-2000:]


@pytest.mark.parametrize("way", ["peft", "base.add_adapter", "adapt"])
def test_killed_and_resumed_is_never_killed(way: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    never = start(way, whole)
    process = start(way, killed)
    deadline = time.monotonic() + 120
    while not (killed / "run/checkpoint-8/trainer_state.json").exists():
        assert process.poll() is None, (process.stderr.read() if process.stderr else b"").decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.12)  # two steps into what is not saved yet
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "final.safetensors").exists()
    files = {p.name for p in (killed / "run/checkpoint-8").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    finish(never)
    finish(start(way, killed, "resume"))
    expected, got = load_file(whole / "final.safetensors"), load_file(killed / "final.safetensors")
    assert expected.keys() == got.keys()
    assert len(expected) >= 4
    assert all(torch.equal(expected[k], got[k]) for k in expected)


def test_half_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    for step, text in ((5, "{}"), (10, "{}"), (15, '{"epo')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-20").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
