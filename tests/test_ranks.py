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

import checkpoint
import common
import train
from conftest import ROOT, SMALL, said_by_us
from checkpoint import checkpoint_steps, verify_checkpoint
from model import PRESETS, PoE
from muon import MuonAdamW, assign_owners, polar_flops
from test_train import log_lines, weights

fork = multiprocessing.get_context("fork")


def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(world, argv, folder, prepare=lambda rank: None, main=train.main):
    """Fork `world` ranks that run main(argv); their output goes to folder/<rank>.out. prepare: called in each before."""
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
        common.run(lambda: main([str(a) for a in argv]))
    processes = [fork.Process(target=rank_main, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def run_ranks(world, argv, folder, prepare=lambda rank: None, main=train.main, timeout=60):
    """As `start_ranks`, to the end: (exit codes, outputs)."""
    processes = start_ranks(world, argv, folder, prepare, main)
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, [said_by_us((folder / f"{rank}.out").read_text()) for rank in range(world)]


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
            flops[owner[name]] += polar_flops(p.shape) if group["kind"] == "muon" else 0
            state[owner[name]] += p.numel() * (4 if group["kind"] == "muon" else 8)
    assert max(flops) / (sum(flops) / 12) < 1.02
    assert sum(state) == pytest.approx(15.8e9, rel=0.01)        # bytes on one rank: 4 a matrix element, 8 for the rest
    assert max(state) < 1.7e9                                   # 1.32e9 were it even: a head of 0.54e9 is not divided
    assert train.memory_estimate(PRESETS["3b"], config, 12)["optimizer_state"] == pytest.approx(sum(state) / 12, rel=1e-6)


@pytest.mark.parametrize("environment, word", [({"WORLD_SIZE": "abc"}, "'abc'"), ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR")])
def test_an_environment_that_is_not_torchruns_gets_one_line(environment, word, monkeypatch, refused):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert word in refused(train.main)


# -- faults -------------------------------------------------------------------------------------------------------

def test_sigterm_at_one_rank_stops_all_at_the_same_step_with_a_checkpoint(data, one_rank, tmp_path):
    def late(rank):
        step = MuonAdamW.step

        def terminated(self):
            step(self)
            if rank == 1 and self.state and next(iter(self.state.values()))["step"] == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        MuonAdamW.step = terminated
    codes, output = run_ranks(2, [*TWENTY, "--data", data, "--out", tmp_path / "run"], tmp_path, late)
    assert codes == [0, 0] and "stopped at step 6; go on with --resume" in output[0], output      # told at the end of the next step
    codes, output = run_ranks(2, ["--resume", tmp_path / "run"], tmp_path)
    assert codes == [0, 0], output
    ours, expected = weights(tmp_path / "run" / "step-00020"), weights(one_rank / "step-00020")
    assert max((ours[name] - expected[name]).abs().max().item() for name in expected) < 1e-10


@pytest.mark.parametrize("what, message", [
    ("loss", "the loss (nan) or the largest gradient"), ("gradient", "gradient (inf) of stage 1 on rank 1 is not finite at step 11: stopped before"),
    ("data", "train.py: error: source prose holds token 65535"),
])
def test_what_goes_wrong_on_one_rank_stops_all_and_is_named(what, message, data, tmp_path):
    def spoil(rank):
        if rank != 1:
            return
        backward, calls = PoE.backward_by_stage, []

        def spoiled_backward(self, idx, targets, scale, last):
            for k, loss in backward(self, idx, targets, scale, last):
                if len(calls) == 11 and what == "loss" and k == 2:
                    loss = loss * float("nan")
                if len(calls) == 11 and what == "gradient" and k == 1:
                    self.blocks[2].mlp.c_fc.weight.grad[3, 4] = float("inf")
                yield k, loss
            calls.append(None) if last else None

        PoE.backward_by_stage = spoiled_backward
        if what == "data":
            from dataloader import Source
            window = Source.window
            Source.window = lambda self, w, T: window(self, w, T) * 0 + 65535 if self.name == "prose" and len(calls) > 3 else window(self, w, T)
    argv = [*TWENTY, "--data", data, "--out", tmp_path / "run"]
    start = time.time()
    codes, output = run_ranks(2, argv, tmp_path, spoil)
    lines = [line for text in output for line in text.splitlines() if "error" in line]
    assert message in "\n".join(lines), output
    if what == "data":                          # the other rank's collective fails
        assert codes[1] == 2 and codes[0] != 0, output
    else:
        assert codes == [2, 2] and len(lines) == 1, (codes, lines)
        verify_checkpoint(tmp_path / "run" / "step-00010")
        assert not (tmp_path / "run" / "step-00020").exists()
    assert time.time() - start < 50


def test_a_killed_rank_ends_the_others(data, tmp_path):
    def kill(rank):
        step, calls = MuonAdamW.step, []
        MuonAdamW.step = lambda self: (calls.append(None), os.kill(os.getpid(), signal.SIGKILL) if rank == 1 and len(calls) == 4 else None, step(self))
    start = time.time()
    codes, output = run_ranks(3, [*TWENTY, "--data", data, "--out", tmp_path / "run"], tmp_path, kill)
    assert codes[1] == -signal.SIGKILL and 0 not in codes and None not in codes, output
    assert time.time() - start < 30


def test_earlier_data_that_one_rank_cannot_read_and_a_damage_that_one_rank_finds_are_told_for_all(data, four_ranks, tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(data, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["sources"][0]["weight"] = 20
    (other / "manifest.json").write_text(json.dumps(manifest))

    def far(rank):
        opened = train.open_data
        train.open_data = lambda path, *more: opened("nowhere" if rank == 1 and path == str(data) else path, *more)
    codes, output = run_ranks(2, ["--continue-from", four_ranks / "step-00020", "--out", run, "--data", other, "--num-steps", "4", "--save-every", "2",
                                  "--warmup-steps", "1"], tmp_path, far)
    assert codes == [0, 0] and "the earlier data is left out: nowhere has no manifest.json" in output[0] and not output[1], output
    assert log_lines(run, "val") and not log_lines(run, "val_old")
    names = list(json.loads((run / "step-00024" / "manifest.json").read_text())["files"])
    for number, step in ((0, "step-00024"), (1, "step-00022")):             # one in the share of each rank
        with open(run / step / names[number], "a") as f:
            f.write(" x")
    def late(rank):                                                         # a file system that shows it the newest step late
        steps = checkpoint.checkpoint_steps
        checkpoint.checkpoint_steps = lambda out: steps(out)[:-1] if rank == 1 else steps(out)
    codes, output = run_ranks(2, ["--resume", run], tmp_path, late)
    assert codes == [0, 0] and output[0].count("skipping") == 2 and f"resuming {run / 'step-00020'}" in output[0], output


def test_a_late_rank_does_not_take_what_rank_0_writes_for_another_run(data, four_ranks, tmp_path):
    def late(rank):
        resolve = train.resolve_config
        train.resolve_config = lambda *args: (time.sleep(1.5 * rank), resolve(*args))[1]
    codes, output = run_ranks(2, ["--continue-from", four_ranks / "step-00020", "--out", tmp_path / "run", "--num-steps", "1", "--warmup-steps", "0"], tmp_path, late)
    assert codes == [0, 0], output


@pytest.mark.parametrize("argv, message", [
    (["--device-batch-size", "4"], "1 micro-batches leave some of 2 ranks without work"),
    (["--n-head", "5"], "n_embd = 12 must be an even multiple of n_head = 5"),
    (["--eval-tokens", "99999999"], "--eval-tokens 99999999"),
    (["--eval-tokens", "16"], "--eval-tokens 16 are 1 windows for 2 ranks"),
    (["--vocab-size", "x"], "argument --vocab-size: invalid int value: 'x'"),
])
def test_bad_input_is_told_once_and_by_rank_0(argv, message, data, tmp_path):
    codes, output = run_ranks(2, [*SMALL, "--data", data, "--out", tmp_path / "run", *argv], tmp_path)
    assert codes == [2, 2] and message in output[0] and len(output[0].splitlines()) == 1 and not output[1], output
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_disk_that_is_full_for_one_rank_keeps_the_checkpoint_before(data, tmp_path):
    def full(rank):
        save = torch.save

        def full_save(value, path):
            if rank == 1 and "step-00020" in str(path):
                raise OSError(28, "No space left on device")
            save(value, path)
        torch.save = full_save
    codes, output = run_ranks(2, [*TWENTY, "--data", data, "--out", tmp_path / "run"], tmp_path, full)
    error = [line for text in output for line in text.splitlines() if "error" in line]
    assert codes == [2, 2] and len(error) == 1 and "step-00020 could not be written ([Errno 28] No space left on device (rank 1)" in error[0]
    verify_checkpoint(tmp_path / "run" / "step-00010")
    assert [path.name for path in checkpoint_steps(tmp_path / "run")] == ["step-00010"]


def test_two_torchrun_nodes_restart_by_themselves_after_a_kill_and_end_as_one_rank_does(data, one_rank, tmp_path):
    run, port = tmp_path / "run", unused_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "2", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "7", ROOT / "train.py", *TWENTY, "--num-steps", "24", "--save-every", "4",
               "--data", data, "--out", run]
    files = [open(tmp_path / f"node-{node}.out", "w+") for node in range(2)]
    agents = [subprocess.Popen([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}) for f in files]
    end = time.time() + 90
    while not checkpoint_steps(run) and time.time() < end:
        time.sleep(0.05)
    killed = int(subprocess.run(["pgrep", "-P", str(agents[1].pid), "-f", "train.py"], capture_output=True, text=True).stdout.split()[0])
    os.kill(killed, signal.SIGKILL)
    codes = [agent.wait(timeout=90) for agent in agents]
    output = [(f.seek(0), f.read())[1] for f in files]
    assert codes == [0, 0], output
    assert sum("resuming " in text for text in output) == 1, output                 # the restarted rank 0 says so
    train.main([*TWENTY, "--num-steps", "24", "--save-every", "-1", "--data", str(data), "--out", str(tmp_path / "one")])
    ours, expected = (weights(path / "step-00024") for path in (run, tmp_path / "one"))
    assert max((ours[name] - expected[name]).abs().max().item() for name in expected) < 1e-9    # rounding grows with the steps
