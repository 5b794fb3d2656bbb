"""
Training on several ranks: any world size is one run. Reference: the same run on one rank, and state files read with torch.load.

Ranks are forked from the test (no second import of torch) and talk over gloo on loopback; one test goes through torchrun itself.
Run: python -m pytest tests/test_ranks.py
"""
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import flags
import train
from conftest import ROOT, SMALL
from model import PRESETS, PoE, checkpoint_steps, verify_checkpoint
from muon import MuonAdamW, assign_owners
from test_train import log_lines, same, weights

fork = multiprocessing.get_context("fork")


def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(world, argv, folder, prepare=lambda rank: None):
    """Fork `world` ranks that run train.main(argv); their output goes to folder/<rank>.out. prepare: called in each before."""
    port = unused_port()

    def rank_main(rank):
        out = os.open(folder / f"{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False, buffering=1), open(2, "w", closefd=False, buffering=1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["train.py"]
        torch.set_num_threads(1)
        prepare(rank)
        flags.run(lambda: train.main([str(a) for a in argv]))
    processes = [fork.Process(target=rank_main, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def run_ranks(world, argv, folder, prepare=lambda rank: None, timeout=60):
    """As `start_ranks`, to the end: (exit codes, outputs)."""
    processes = start_ranks(world, argv, folder, prepare)
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, [(folder / f"{rank}.out").read_text() for rank in range(world)]


def optimizer_state(step_dir):
    """All optimizer state of a checkpoint, {(parameter, key): value}; asserts that no parameter is in two ranks' files."""
    state = {}
    for file in sorted((step_dir / "optim").iterdir()):
        for name, values in torch.load(file, weights_only=True).items():
            assert (name, "step") not in state, f"{name} has two owners"
            state |= {(name, key): torch.as_tensor(value) for key, value in values.items()}
    return state


TWENTY = [*SMALL, "--num-steps", "20", "--save-every", "10", "--device-batch-size", "1"]      # four micro-batches a step


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    train.main([*TWENTY, "--data", str(data), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def four_ranks(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    codes, output = run_ranks(4, [*TWENTY, "--data", data, "--out", folder / "run"], folder)
    assert codes == [0] * 4, output
    return folder / "run"


# -- one run on any number of ranks -------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [2, 3])
def test_any_world_size_trains_the_run_of_one_rank(world, data, one_rank, tmp_path):
    codes, output = run_ranks(world, [*TWENTY, "--data", data, "--out", tmp_path / "run"], tmp_path)   # on 3 ranks: 2, 1, 1 micro-batches
    assert codes == [0] * world, output
    assert not any(output[1:]), "rank 0 alone prints"
    ours, expected = (weights(run / "step-00020") for run in (tmp_path / "run", one_rank))
    error = max((ours[name] - expected[name]).abs().max().item() for name in expected)
    assert error < 1e-10, f"{world} ranks differ from one by {error:.1e}"
    for kind, key in (("step", "train_loss"), ("val", "crossover_gap")):
        pairs = list(zip(log_lines(tmp_path / "run", kind), log_lines(one_rank, kind), strict=True))
        assert pairs and all(abs(a[key] - b[key]) < 1e-10 and a["step"] == b["step"] for a, b in pairs)
    state, expected = optimizer_state(tmp_path / "run" / "step-00020"), optimizer_state(one_rank / "step-00020")
    assert state.keys() == expected.keys() and len(list((tmp_path / "run" / "step-00020" / "optim").iterdir())) == world


@pytest.mark.parametrize("world", [1, 2, 3])
def test_state_saved_by_four_ranks_is_read_by_any_other_number(world, data, four_ranks, tmp_path):
    shutil.copytree(four_ranks, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00020")

    def save_at_once(rank):         # in place of the step that follows the restore
        def step(self):
            torch.save(self.state_dict(), tmp_path / f"state-{rank}.pt")
            os._exit(0)
        MuonAdamW.step = step
    if world == 1:
        process = fork.Process(target=lambda: (save_at_once(0), train.main(["--resume", str(tmp_path / "run")])))
        process.start()
        process.join(60)
    else:
        run_ranks(world, ["--resume", tmp_path / "run"], tmp_path, save_at_once)
    ours = {}
    for rank in range(world):
        for name, values in torch.load(tmp_path / f"state-{rank}.pt", weights_only=True).items():
            ours |= {(name, key): torch.as_tensor(value) for key, value in values.items()}
    expected = optimizer_state(four_ranks / "step-00010")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())


def test_a_run_of_four_ranks_resumed_on_two_is_the_run_of_one(four_ranks, one_rank, tmp_path):
    shutil.copytree(four_ranks, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00020")
    codes, output = run_ranks(2, ["--resume", tmp_path / "run"], tmp_path)
    assert codes == [0, 0], output
    ours, expected = weights(tmp_path / "run" / "step-00020"), weights(one_rank / "step-00020")
    assert max((ours[name] - expected[name]).abs().max().item() for name in expected) < 1e-10
    assert [line["step"] for line in log_lines(tmp_path / "run")] == list(range(20))


def test_the_layout_of_3b_on_12_ranks_covers_balances_and_saves_memory():
    config = train.TrainConfig(**{**train.asdict(train.RECIPES["3b"]), "sequence_len": 2048})
    with torch.device("meta"):
        groups = train.optimizer_groups(PoE(PRESETS["3b"]), config)
    owner = assign_owners(groups, 12)
    assert sorted(owner) == sorted(name for group in groups for name in group["params"]) and set(owner.values()) == set(range(12))
    flops, state = [0] * 12, [0] * 12
    for group in groups:
        for name, p in group["params"].items():
            flops[owner[name]] += p.numel() * min(p.shape) if group["kind"] == "muon" else 0
            state[owner[name]] += p.numel() * (4 if group["kind"] == "muon" else 8)
    assert max(flops) / (sum(flops) / 12) < 1.02
    assert sum(state) == pytest.approx(15.8e9, rel=0.01)        # bytes on one rank: 4 a matrix element, 8 for the rest
    assert max(state) < 1.7e9                                   # 1.32e9 were it even: a head of 0.54e9 is not divided
    assert train.memory_estimate(PRESETS["3b"], config, 12)["optimizer_state"] == max(state)
