"""
Training on several ranks: any world size is one run. Reference: the same run on one rank, and state files
read with torch.load.

Ranks are forked from the test (no second import of torch) and talk over gloo on loopback; one test goes
through torchrun's launcher.
Run: python -m pytest tests/test_ranks.py
"""
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import checkpoint
import common
import train
from checkpoint import checkpoint_steps, read_json, read_log, verify_checkpoint
from conftest import (
    SMALL,
    at_step,
    log_lines,
    signal_at_step,
    small_run,
    table,
    train_run,
    unused_port,
    weights,
)
from dataloader import Source
from model import PRESETS, PoE
from muon import assign_owners, polar_flops

FORK = multiprocessing.get_context("fork")
# what forked ranks change, each in its own process
PATCH = pytest.MonkeyPatch()


def run_ranks(world, argv, folder, prepare=lambda rank: None, main=train.main, timeout=60):
    """Fork `world` ranks that run main(argv): (exit codes, outputs). prepare: called in each before."""
    port = unused_port()

    def rank_main(rank):
        out = os.open(folder / f"{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = open(1, "w", closefd=False, buffering=1)
        sys.stderr = open(2, "w", closefd=False, buffering=1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["train.py"]
        prepare(rank)
        common.run(lambda: main([str(a) for a in argv]))
    processes = [FORK.Process(target=rank_main, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    outputs = [(folder / f"{rank}.out").read_text().splitlines(keepends=True) for rank in range(world)]
    # without the lines in which the Gloo of torch 2.9 tells of its connections
    return codes, ["".join(line for line in lines if not line.startswith("[Gloo]")) for lines in outputs]


def saved_state(run):
    """{(parameter, key): tensor} of a run's last optimizer state, of which no two ranks own one."""
    found = {}
    for file in (checkpoint_steps(run)[-1] / "optim").iterdir():
        for name, values in torch.load(file, weights_only=True).items():
            assert (name, "step") not in found, f"{name} has two owners"
            found |= {(name, key): torch.as_tensor(value) for key, value in values.items()}
    return found


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def distance(run, other):
    """The largest difference of the weights and of the optimizer state of two runs."""
    return max(largest_difference(read(run), read(other)) for read in (weights, saved_state))


# four micro-batches a step
TWENTY = "--num-steps 20 --save-every 10 --device-batch-size 1".split()


@pytest.fixture
def twenty(data, tmp_path):
    """The flags of a run of twenty steps."""
    return [*SMALL, "--data", data, "--out", tmp_path / "run", *TWENTY]


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    small_run(data, out, *TWENTY)
    return out


@pytest.fixture(scope="module")
def four_ranks(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    codes, _ = run_ranks(4, [*SMALL, "--data", data, "--out", folder / "run", *TWENTY], folder)
    assert codes == [0] * 4
    return folder / "run"


# --------------------------------------------------------------------------------------------------
# One run on any number of ranks

def test_any_world_size_trains_the_run_of_one_rank(twenty, one_rank, tmp_path):
    run = tmp_path / "run"
    # 2, 1 and 1 micro-batches
    codes, output = run_ranks(3, twenty, tmp_path)
    # rank 0 alone prints
    assert codes == [0] * 3 and not any(output[1:]), output
    assert distance(run, one_rank) < 1e-10
    for kind, key in (("step", "train_loss"), ("val", "crossover_gap")):
        for a, b in zip(log_lines(run, kind), log_lines(one_rank, kind), strict=True):
            assert abs(a[key] - b[key]) < 1e-10 and a["step"] == b["step"]
    assert len(list((run / "step-00020" / "optim").iterdir())) == 3


def test_a_run_of_four_ranks_goes_on_on_two_when_one_node_restarts(twenty, four_ranks, one_rank, tmp_path):
    run = shutil.copytree(four_ranks, tmp_path / "run")
    shutil.rmtree(run / "step-00020")

    def restarted(rank):
        PATCH.setenv("TORCHELASTIC_RESTART_COUNT", str(rank))
    codes, output = run_ranks(2, twenty, tmp_path, restarted)
    assert codes == [0, 0], output
    assert distance(run, one_rank) < 1e-10


def test_in_fp8_a_run_that_two_ranks_go_on_with_is_the_run_of_one(twenty, tmp_path):
    train_run(*twenty, *"--n-embd 48 --mlp-hidden 32 --fp8 --num-steps 6 --save-every 3".split())
    one = shutil.copytree(tmp_path / "run", tmp_path / "one")
    shutil.rmtree(tmp_path / "run" / "step-00006")
    codes, output = run_ranks(2, ["--resume", tmp_path / "run"], tmp_path)
    assert codes == [0, 0], output
    assert distance(tmp_path / "run", one) < 1e-10
    assert all(line["config"]["fp8"] for line in log_lines(one, "header"))


def test_the_layout_of_3b_on_12_ranks_covers_balances_and_saves_memory():
    config = train.TrainConfig(**{**train.RECIPES["3b"]._asdict(), "sequence_len": 2048})
    with torch.device("meta"):
        groups = train.optimizer_groups(PoE(PRESETS["3b"]), config)
    owner = assign_owners(groups, 12)
    flops = [0] * 12
    state = [0] * 12
    for group in groups:
        is_muon = group["kind"] == "muon"
        for name, p in group["params"].items():
            flops[owner[name]] += polar_flops(p.shape) if is_muon else 0
            # bytes: 4 a matrix element, 8 for the rest
            state[owner[name]] += p.numel() * (8 - 4 * is_muon)
    assert max(flops) / (sum(flops) / 12) < 1.02
    # 1.32e9 were it even: a head of 0.54e9 is not divided
    assert min(state) > 0 and max(state) < 1.7e9
    estimate = train.memory_estimate(PRESETS["3b"], config, 12)["optimizer_state"]
    assert estimate == pytest.approx(sum(state) / 12, rel=1e-6) == pytest.approx(15.8e9 / 12, rel=0.01)


# --------------------------------------------------------------------------------------------------
# Faults

def test_sigterm_at_one_rank_stops_all_at_the_same_step_with_a_checkpoint(twenty, one_rank, tmp_path):
    run = tmp_path / "run"

    def terminated(rank):
        if rank == 1:
            signal_at_step(PATCH, 4, signal.SIGTERM)
    codes, output = run_ranks(2, twenty, tmp_path, terminated)
    # told at the end of the next step
    assert codes == [0, 0] and "stopped at step 6" in output[0], output
    codes, output = run_ranks(2, ["--resume", run], tmp_path)
    assert codes == [0, 0], output
    assert distance(run, one_rank) < 1e-10


BACKWARD = PoE.backward_by_stage
WINDOW = Source.window


def nan_losses(self, *args):
    for k, loss in BACKWARD(self, *args):
        yield k, loss * math.nan


def an_infinite_gradient(self, *args):
    for k, loss in BACKWARD(self, *args):
        if k == 1:
            self.blocks[2].mlp.c_fc.weight.grad[3, 4] = math.inf
        yield k, loss


def full_disk(*args):
    raise OSError(28, "No space left on device")


def unknown_tokens(*args):
    return WINDOW(*args) * 0 + 65535


@pytest.mark.parametrize("owner, name, spoiled, message", [
    (PoE, "backward_by_stage", nan_losses, "the loss (nan)"),
    (PoE, "backward_by_stage", an_infinite_gradient, "gradient (inf) of stage 1 on rank 1"),
    (torch, "save", full_disk, "No space left on device (rank 1)"),
    (Source, "window", unknown_tokens, "source prose holds token 65535")])
def test_what_goes_wrong_on_one_rank_stops_all_and_is_named(owner, name, spoiled, message, twenty, tmp_path):
    def spoil(rank):
        if rank == 1:
            at_step(PATCH, 11, lambda: PATCH.setattr(owner, name, spoiled))
    run = tmp_path / "run"
    codes, output = run_ranks(2, twenty, tmp_path, spoil)
    errors = [line for text in output for line in text.splitlines() if "error" in line]
    assert any(message in line for line in errors), output
    if owner is Source:
        # the other rank's collective fails
        assert codes[1] == 2 and codes[0] not in (0, None), output
    else:
        assert codes == [2, 2] and len(errors) == 1, output
        # the checkpoint before is whole
        step, = checkpoint_steps(run)
        assert step.name == "step-00010"
        verify_checkpoint(step)


def test_a_killed_rank_ends_the_others(twenty, tmp_path):
    def killed(rank):
        if rank == 1:
            signal_at_step(PATCH, 3, signal.SIGKILL)
    codes, output = run_ranks(3, twenty, tmp_path, killed, timeout=30)
    assert codes[1] == -signal.SIGKILL and 0 not in codes and None not in codes, output


def test_what_one_rank_alone_sees_is_told_for_all(data, other_data, four_ranks, tmp_path):
    """Earlier data that one cannot read, a damage that one finds, a checkpoint that it is shown late; and
    what rank 0 writes is no other run for a rank that is late itself.
    """
    run = tmp_path / "run"

    def far(rank):
        opened = train.open_data
        resolve = train.resolve_config
        PATCH.setattr(train, "open_data", lambda path, *more: opened(
            "nowhere" if rank == 1 and path == str(data) else path, *more))
        PATCH.setattr(train, "resolve_config", lambda *args: (time.sleep(rank), resolve(*args))[1])
    argv = ["--continue-from", four_ranks / "step-00020", "--out", run, "--data", other_data,
            *"--num-steps 4 --save-every 2 --warmup-steps 1".split()]
    codes, output = run_ranks(2, argv, tmp_path, far)
    assert codes == [0, 0] and "left out: manifest.json in nowhere" in output[0] and not output[1], output
    names = list(read_json(run / "step-00024" / "manifest.json")["files"])
    # one in the share of each rank
    for number, step in ((0, "step-00024"), (1, "step-00022")):
        with open(run / step / names[number], "a") as f:
            f.write(" x")

    def late(rank):
        steps = checkpoint.checkpoint_steps
        if rank == 1:
            PATCH.setattr(checkpoint, "checkpoint_steps", lambda out: steps(out)[:-1])
    codes, output = run_ranks(2, ["--resume", run], tmp_path, late)
    assert codes == [0, 0] and output[0].count("skipping") == 2, output
    assert f"a new phase from {run / 'step-00020'}" in output[0]


@pytest.mark.parametrize("argv, message", table("""
    --device-batch-size 4 | 1 micro-batches leave some of 2 ranks without work
    --eval-tokens 16      | 1 windows for 2 ranks
    --vocab-size x        | --vocab-size"""))
def test_bad_input_is_told_once_and_by_rank_0(argv, message, data, tmp_path):
    run = tmp_path / "run"
    codes, output = run_ranks(2, [*SMALL, "--data", data, "--out", run, *argv.split()], tmp_path)
    assert codes == [2, 2] and message in output[0], output
    assert output[0].count("\n") == 1 and not output[1] and not run.exists()


def killed_once(argv):
    """A rank of torchrun's: rank 1 kills itself after five steps of its first life."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        signal_at_step(PATCH, 5, signal.SIGKILL)
    train_run(*argv)


def launch(argv):
    """What torchrun --nproc_per_node 2 --max_restarts 2 does, with forked ranks, which have torch already."""
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=2,
                          start_method="fork")
    elastic_launch(config, killed_once)(argv)


def test_torchrun_restarts_a_killed_run_by_itself_and_it_ends_as_one_rank_does(
        twenty, one_rank, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    agent = FORK.Process(target=launch, args=([*twenty, "--save-every", "5"],))
    agent.start()
    agent.join(60)
    assert agent.exitcode == 0
    run = tmp_path / "run"
    assert sum(line["kind"] == "header" for line in read_log(run / "log.jsonl")) == 2
    assert distance(run, one_rank) < 1e-10
