"""
train.py: exact resume, accumulation, checkpoints that are whole or absent, and bad input, through the real
main() at a small scale.

Run: python -m pytest tests/test_train.py
"""
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import sample
import train
from checkpoint import checkpoint_steps, load_checkpoint, read_json, verify_checkpoint, write_manifest
from common import lock, sha256_of
from conftest import SMALL, before_steps, closed_stdout, log_lines, reweigh, same, train_run, weights
from dataloader import Mix, Tokenizer, open_data
from model import PRESETS, ModelConfig, PoE
from muon import MuonAdamW
from schedule import learning_rate, phase_of


def losses(run):
    return [(line["step"], line["losses"]) for line in log_lines(run)]


def names(run):
    return [path.name for path in checkpoint_steps(run)]


# --------------------------------------------------------------------------------------------------
# The step

def test_micro_batches_add_up_to_the_same_run_and_another_seed_is_another_run(data, trained, tmp_path):
    expected = weights(trained / "step-00006")
    for name, *argv in (["a", "--device-batch-size", 4], ["b", "--seed", 1]):
        train_run(*SMALL, "--data", data, "--out", tmp_path / name, *argv)
        ours = weights(tmp_path / name / "step-00006")
        error = max((ours[key] - expected[key]).abs().max().item() for key in expected)
        # another order of summation: rounding, magnified by six AdamW steps
        assert 0 < error < 1e-9 if name == "a" else error > 0.1, error


def test_training_lowers_the_loss_of_every_stage(data, tmp_path):
    train_run(*SMALL, "--data", data, "--out", tmp_path, "--num-steps", 40, "--save-every", -1)
    (_, first), *_, (_, last) = losses(tmp_path)
    # ln 300
    assert all(abs(loss - 5.70) < 0.05 for loss in first)
    # 2.7 seen: ten words of a few tokens each
    assert all(loss < 3.5 for loss in last), last


@pytest.mark.parametrize("objective, argv, stage_layers", [
    ("bp", SMALL[:10] + SMALL[12:], [4]), ("joint", SMALL, [2, 1, 1])])
def test_the_control_arms_train_through_the_same_loop(objective, argv, stage_layers, data, tmp_path):
    train_run(*argv, "--data", data, "--out", tmp_path, "--objective", objective)
    assert read_json(tmp_path / "step-00006" / "config.json")["model"]["stage_layers"] == stage_layers
    found = any("lm_head_stages" in name for name in weights(tmp_path / "step-00006"))
    assert found == (objective == "joint")


def test_every_step_uses_the_schedules_rate_momentum_and_weight_decay(data, tmp_path, monkeypatch):
    seen = []
    before_steps(monkeypatch, lambda optimizer: seen.append([dict(group) for group in optimizer.groups]))
    train_run(*SMALL, "--data", data, "--out", tmp_path, "--weight-decay", 0.1, "--save-every", -1)
    # two of warmup, then round(0.65 x 6) = 4 of warmdown from 1 to 0.05
    lrm = [0.5, 1.0, 1.0, 0.7625, 0.525, 0.2875]
    # (1 + cos(pi rel / 6)) / 2
    half_cosine = [1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]
    assert [groups[0]["lr"] for groups in seen] == pytest.approx([0.03 * x for x in lrm])
    assert [groups[1]["lr"] for groups in seen] == pytest.approx([0.008 * x for x in lrm])
    assert [groups[0]["weight_decay"] for groups in seen] == pytest.approx([0.1 * x for x in half_cosine])
    momentum = [0.85 + 0.12 * step / 400 for step in range(6)]
    assert [groups[0]["momentum"] for groups in seen] == pytest.approx(momentum)
    assert [line["lrm"] for line in log_lines(tmp_path)] == pytest.approx(lrm)


def test_bfloat16_training_casts_the_new_weights_after_every_step(data, tmp_path, monkeypatch):
    """The loop's casts are of the weights: losses are, but for rounding, as with a cast in every pass."""
    argv = [*SMALL, "--data", data, "--dtype", "bfloat16", "--save-every", -1, "--out"]
    train_run(*argv, tmp_path / "kept")
    monkeypatch.setattr(PoE, "cast_weights", lambda self: None)
    train_run(*argv, tmp_path / "cast_in_each_pass")
    kept = losses(tmp_path / "kept")
    assert kept[-1][1][0] < kept[0][1][0] - 0.1
    for (_, a), (_, b) in zip(kept, losses(tmp_path / "cast_in_each_pass"), strict=True):
        assert a == pytest.approx(b, abs=0.01)


# --------------------------------------------------------------------------------------------------
# Checkpoints and resume

def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(trained, run):
    shutil.rmtree(run / "step-00006")
    # a save that was killed
    (run / ".tmp-step-00006").mkdir()
    # state that the manifest does not name is not read
    optim = run / "step-00003" / "optim"
    shutil.copy(trained / "step-00006" / "optim" / "rank-00000.pt", optim / "rank-00001.pt")
    train_run("--resume", run)
    assert same(weights(run / "step-00006"), weights(trained / "step-00006"))
    ours, theirs = (torch.load(r / "step-00006" / "optim" / "rank-00000.pt", weights_only=True)
                    for r in (run, trained))
    assert ours.keys() == theirs.keys()
    for name, state in ours.items():
        assert state.pop("step") == theirs[name].pop("step") == 6 and same(state, theirs[name])
    assert losses(run) == losses(trained) and not list(run.glob(".tmp*"))
    assert [line["step"] for line in log_lines(run, "val")] == [3, 6]
    assert read_json(run / "step-00006" / "state.json")["sample"] == 24


def test_resume_skips_a_damaged_checkpoint_and_says_why(trained, run, capsys):
    with open(run / "step-00006" / "model.pt", "r+b") as f:
        f.seek(2000)
        f.write(b"\xff\xfe\xfd")
    train_run("--resume", run)
    out = capsys.readouterr().out
    assert "model.pt was altered or cut" in out and f"resuming {run / 'step-00003'}" in out
    assert same(weights(run / "step-00006"), weights(trained / "step-00006"))


def test_a_run_killed_before_its_first_save_restarts_from_its_recorded_config(trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(trained / "config.json", run)
    # cut mid-line
    (run / "log.jsonl").write_text('{"kind": "step", "step": 0}\n{"kind": "st')
    train_run("--resume", run)
    assert same(weights(run / "step-00006"), weights(trained / "step-00006"))
    assert losses(run) == losses(trained)


@pytest.mark.parametrize("flags, word", [
    ([], "already complete"), (["--num-steps", 60], "--continue-from"),
    (["--matrix-lr", 0.1], "from 0.015 to 0.05")])
def test_what_was_trained_is_history(flags, word, run, refused, capsys):
    def content():
        return {path: path.read_bytes() for path in run.rglob("*.json*")}
    before = content()
    if flags:
        assert word in refused(train.main, "--resume", run, *flags)
    else:
        train_run("--resume", run, "--save-every", 1)
        assert word in capsys.readouterr().out
    assert content() == before


@pytest.mark.parametrize("decay", [0, 0.1])
def test_a_resume_may_change_the_rates_to_come(decay, data, tmp_path, refused):
    run = tmp_path / "run"
    train_run(*SMALL, "--data", data, "--out", run, "--warmdown-ratio", 0.5, "--weight-decay", decay)
    shutil.rmtree(run / "step-00006")
    if decay:
        # its cosine would have been another one
        assert "weight_decay of step" in refused(train.main, "--resume", run, "--num-steps", 8)
        return
    train_run("--resume", run, "--num-steps", 8)
    used = [line["lrm"] for line in log_lines(run)]
    phase = phase_of(json.loads((run / "config.json").read_text())["phases"][0])
    assert used == [learning_rate(phase, step) for step in range(8)] and used[3:5] == [1, 1]


def test_durations_do_not_follow_the_wall_clock(data, tmp_path, monkeypatch):
    # it is set back an hour at every look
    clock = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    train_run(*SMALL, "--data", data, "--out", tmp_path / "run")
    assert all(line["dt"] > 0 and line["train_time"] > 0 for line in log_lines(tmp_path / "run"))


def test_the_data_is_found_from_anywhere_and_nothing_else_in_its_place(data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    train_run(*SMALL, "--data", "data", "--out", "runs/a")
    shutil.rmtree("runs/a/step-00006")
    # a folder of the same name, with other weights of the sources
    shutil.copytree("data", "elsewhere/data")
    reweigh(Path("elsewhere/data"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_run("--resume", "../runs/a")
    train_run("--continue-from", "../runs/a/step-00006", "--out", "deep/down/b", *CONTINUAL)
    # killed before its seed was placed
    for path in checkpoint_steps("deep/down/b"):
        shutil.rmtree(path)
    monkeypatch.chdir("/")
    train_run("--resume", tmp_path / "elsewhere/deep/down/b")
    # together they may move
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    b = tmp_path / "moved" / "deep" / "down" / "b"
    train_run("--continue-from", b / "step-00006", "--out", tmp_path / "c", *CONTINUAL)
    assert len({row["mix_sha256"] for row in read_json(tmp_path / "c/config.json")["phases"]}) == 1


# `timeout` and schedulers send SIGTERM twice
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_run_that_is_told_to_stop_saves_without_validation_and_goes_on_as_if_it_had_not(
        signals, data, trained, tmp_path, monkeypatch, capsys):
    def hook(optimizer):
        if next(iter(optimizer.state.values()))["step"] == 0:
            for number in signals:
                os.kill(os.getpid(), number)
    with monkeypatch.context() as patch:
        before_steps(patch, hook)
        train_run(*SMALL, "--data", data, "--out", tmp_path, "--eval-every", 1)
    assert f"stopped at step 2; go on with --resume {tmp_path}" in capsys.readouterr().out
    assert names(tmp_path) == ["step-00002"]
    assert [line["step"] for line in log_lines(tmp_path, "val")] == [1]
    train_run("--resume", tmp_path)
    assert [line["step"] for line in log_lines(tmp_path, "val")] == [1, 2, 3, 4, 5, 6]
    assert same(weights(tmp_path / "step-00006"), weights(trained / "step-00006"))


def test_a_closed_pipe_does_not_end_a_run(data, tmp_path):
    with closed_stdout():
        train_run(*SMALL, "--data", data, "--out", tmp_path)
    verify_checkpoint(tmp_path / "step-00006")


def test_a_checkpoint_holds_what_it_should_to_the_bit_and_calibration_may_write_its_bounds(trained, run):
    step = run / "step-00006"
    assert sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file()) == [
        "config.json", "manifest.json", "model.pt", "optim/rank-00000.pt", "state.json", "tokenizer.json",
        "tokenizer.txt"]
    record = read_json(step / "config.json")
    (step / "config.json").write_text(json.dumps(record | {"poe_wand_p99_bounds_per_stage_head": [3.9, 2.0]}))
    (step / "metrics.json").write_text("{}")
    model, _, _ = load_checkpoint(step, dtype=torch.float64)
    stored = weights(step)
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())
    merged = stored["lm_head.weight"] + stored["lm_head_stages.1.weight"]
    assert torch.equal(model.merged_heads[1], merged)
    (step / "config.json").write_text(json.dumps(record | {"step": 7}))
    with pytest.raises(ValueError, match="config.json was altered"):
        verify_checkpoint(step)


@pytest.mark.parametrize("name", ["tokenizer.txt", "manifest.json"])
def test_a_checkpoint_without_one_of_its_files_is_refused(name, run):
    (run / "step-00006" / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_checkpoint(run)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [b"", pickle.dumps(Evil())])
def test_foreign_weights_are_refused_and_never_executed(content, run, monkeypatch, refused):
    monkeypatch.chdir(run)
    step = run / "step-00006"
    (step / "model.pt").write_bytes(content)
    files = read_json(step / "manifest.json")["files"] | {"model.pt": sha256_of(step / "model.pt")}
    write_manifest(step, files)
    assert "not a file of tensors" in refused(sample.main, step)
    assert not (run / "executed").exists()
    write_manifest(step, files | {"../config.json": ""})
    assert "names ../config.json, outside" in refused(sample.main, step)


# --------------------------------------------------------------------------------------------------
# Dry run and bad input

@pytest.mark.parametrize("preset", PRESETS)
def test_dry_run_prints_the_plan_as_json_and_writes_nothing(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_run("--preset", preset, "--dry-run", "--data", "not/there/yet")
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["params_total"] == sum(plan["params"].values())
    assert plan["tokens"] == plan["num_steps"] * plan["total_batch_tokens"]
    if preset == "3b":
        assert plan["params_total"] == 3_019_900_480 and plan["num_steps"] == 83_923
        assert plan["total_batch_tokens"] == 12 * 32 * 2048
        # one 80 GB GPU
        assert 55 < plan["memory_per_rank_bytes_total"] / 2 ** 30 < 75
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, word", [
    ("--stage-layers 1,1", "n_layer = 5"), ("--stage-layers a,b", "16,6,5,5"), ("--n-embd 97", "n_head = 3"),
    ("--vocab-size 40000", "32768"), ("--total-batch-tokens 1000", "1000"), ("--device-batch-size 3", "768"),
    ("--num-steps 0", "num-steps"), ("--matrix-lr nan", "matrix-lr"), ("--warmup-steps 399", "399"),
    ("--data no/such/folder", "manifest.json"), ("--resume no/such/run", "no/such/run"),
    ("--objective bp --stage-layers 2,3", "bp"), ("--out=", "--out"), ("--fp8 --n-embd 40 --n-head 4", "(40, 384, 2048)"),
    ("--reset-optimizer", "--continue-from")])
def test_bad_flags_get_one_line_and_write_nothing(argv, word, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert word in refused(train.main, *argv.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, message", [
    ("--out {run}", "already holds a run"), ("--resume {run} --n-embd 24", "--n-embd"),
    ("--resume {run}/step-00003", "--resume {run}/step-00003 is not a run"),
    ("--resume {run} --num-steps 4 --warmup-steps 1", "past the run's end, step 4"),
    ("--resume {run} --continue-from {run}/step-00006", "--continue-from cannot"),
    ("--continue-from {run} --out b", "RUN/step-XXXXX"),
    ("--continue-from {run}/step-00006 --out {run}", "already holds a run"),
    ("--continue-from {run}/step-00006 --out b --n-layer 4 --preset tiny", "--preset, --n-layer cannot"),
    ("--continue-from {run}/step-00006 --out b --total-batch-tokens 80", "not a multiple")])
def test_a_run_is_not_overwritten_nor_continued_wrongly(argv, message, run, tmp_path, monkeypatch, refused):
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    before = files()
    assert message.format(run=run) in refused(train.main, *argv.format(run=run).split())
    assert files() == before


def test_a_run_of_damaged_checkpoints_is_refused_and_kept(run, refused):
    for step in checkpoint_steps(run):
        (step / "manifest.json").unlink()
    assert "no checkpoint" in refused(train.main, "--resume", run)
    assert (run / "step-00006" / "model.pt").exists()


def test_a_bad_shard_stops_the_start_and_writes_nothing(other_data, tmp_path, refused):
    shard = other_data / "prose-train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert shard.name in refused(train.main, *SMALL, "--data", other_data, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_process_in_one_run_folder_is_refused(run, refused):
    with lock(run):
        assert "another process" in refused(train.main, "--resume", run)
    train_run("--resume", run)


def test_a_full_disk_leaves_the_checkpoints_before_it_whole(run, refused):
    shutil.rmtree(run / "step-00006")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # 100 KiB a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, limits[1]))
    try:
        line = refused(train.main, "--resume", run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-00006 could not be written" in line and "--resume" in line
    assert names(run) == ["step-00003"] and not list(run.glob(".tmp*"))
    verify_checkpoint(run / "step-00003")


def test_a_run_whose_folder_is_gone_ends_instead_of_going_on_in_a_part_of_it(
        data, tmp_path, monkeypatch, refused):
    run = tmp_path / "run"
    before_steps(monkeypatch, lambda optimizer: shutil.rmtree(run, ignore_errors=True))
    assert "step-00003 could not be written" in refused(train.main, *SMALL, "--data", data, "--out", run)
    assert not run.exists()


# --------------------------------------------------------------------------------------------------
# Killed at any file operation of a save

OPERATIONS = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "link"), (torch, "save"),
              (Path, "write_bytes"), (shutil, "rmtree")]


def killed_at(argv, number):
    """Fork a run that kills itself before its `number`-th file operation; whether it came to that."""
    def child():
        done = []

        def counted(operation):
            def call(*args, **kwargs):
                done.append(operation)
                if len(done) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **kwargs)
            return call
        for owner, name in OPERATIONS:
            setattr(owner, name, counted(getattr(owner, name)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train_run(*argv)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_a_run_killed_at_file_operations_ends_bit_identical(data, tmp_path):
    # the loop, and little else
    minute = """--n-layer 1 --n-embd 4 --n-head 1 --mlp-hidden 2 --stage-layers 1 --objective bp
                --eval-tokens 16 --total-batch-tokens 16 --device-batch-size 1 --num-steps 1
                --warmup-steps 0""".split()
    train_run(*SMALL, *minute, "--data", data, "--out", tmp_path / "parent")
    argv = ["--continue-from", tmp_path / "parent" / "step-00001", "--num-steps", 1, "--out"]
    whole = tmp_path / "whole"
    train_run(*argv, whole)
    # the seed is put in place, then a save; every third operation
    for number in range(1, 100, 3):
        run = tmp_path / str(number)
        if not killed_at([*argv, run], number):
            break
        for path in checkpoint_steps(run):
            # whole or absent
            verify_checkpoint(path)
        train_run(*(["--resume", run] if (run / "config.json").exists() else [*argv, run]))
        assert same(weights(run / "step-00002"), weights(whole / "step-00002")), number
        assert losses(run) == losses(whole), number
    assert number > 25, "a seed and a save are that many operations"


# --------------------------------------------------------------------------------------------------
# Phases: the continual run

CONTINUAL = """--num-steps 8 --warmup-steps 2 --peak-lrm 0.5 --warmdown-ratio 0.5 --final-lrm 0 --save-every 4
               --weight-decay 0.1""".split()


@pytest.fixture(scope="module")
def continued(trained, tmp_path_factory):
    """The run of `trained` re-armed at step 6 with a second phase of eight steps. Read only."""
    out = tmp_path_factory.mktemp("continued") / "run"
    train_run("--continue-from", trained / "step-00006", "--out", out, *CONTINUAL)
    return out


@pytest.fixture(scope="module")
def saved_often(trained, tmp_path_factory):
    """As `continued`, with a save after every step, of which the newest keeps its optimizer state."""
    out = tmp_path_factory.mktemp("saved_often") / "run"
    train_run("--continue-from", trained / "step-00006", "--out", out, *CONTINUAL, "--save-every", 1,
              "--keep-optim", 1)
    return out


def test_a_continued_run_begins_with_its_seed_and_records_both_phases(trained, continued):
    assert names(continued) == ["step-00006", "step-00008", "step-00012", "step-00014"]
    # a hard link
    assert (continued / "step-00006" / "model.pt").samefile(trained / "step-00006" / "model.pt")
    rows = read_json(continued / "config.json")["phases"]
    keys = ("anchor_step", "anchor_sample", "num_steps", "peak_lrm", "batch")
    assert [[row[key] for key in keys] for row in rows] == [[0, 0, 6, 1.0, 4], [6, 24, 8, 0.5, 4]]
    assert rows == read_json(continued / "step-00012" / "config.json")["phases"]
    # rel 0..7: two of warmup, peak to rel 4, then w = 4 down to 0 at rel 8
    lrm = [0.25, 0.5, 0.5, 0.5, 0.5, 0.375, 0.25, 0.125]
    assert [line["lrm"] for line in log_lines(continued)] == pytest.approx(lrm)
    assert [line["step"] for line in log_lines(continued)] == list(range(6, 14))
    # rel 0, 1, 2, 4, 8, and the saves at 8, 12, 14
    validations = log_lines(continued, "val")
    assert [line["step"] for line in validations] == [6, 7, 8, 10, 12, 14]
    assert validations[0]["bpb"] == log_lines(trained, "val")[-1]["bpb"]


def test_the_first_step_of_a_phase_is_what_its_parts_say(trained, saved_often, data):
    """Twin: weights and state of step 6, samples 24 to 27, the new phase's rates, one step by hand."""
    record = read_json(trained / "step-00006" / "config.json")
    model = PoE(ModelConfig(**record["model"]), torch.float64).double()
    model.load_state_dict(weights(trained / "step-00006"))
    groups = train.optimizer_groups(model, train.TrainConfig(**{**record["train"], "weight_decay": 0.1}))
    optimizer = MuonAdamW(groups)
    optimizer.load_state_dict(torch.load(trained / "step-00006/optim/rank-00000.pt", weights_only=True))
    idx, targets = open_data(str(data), 300).train(16, 0).batch(range(24, 28))
    for half in range(2):
        rows = slice(2 * half, 2 * half + 2)
        list(model.backward_by_stage(idx[rows], targets[rows], 1 / 64, last=half == 1))
    for group in groups:
        # rel 0 of two warmup steps to 0.5
        group["lr"] *= 0.25
        # Muon's ramp goes on: step 6 of the run
        group["momentum"] = 0.85 + 0.12 * 6 / 400
    optimizer.step()
    assert same(dict(model.named_parameters()), weights(saved_often / "step-00007"))


def test_only_the_newest_saves_and_the_ends_of_phases_keep_their_optimizer_state(trained, saved_often):
    assert names(saved_often) == [f"step-{step:05d}" for step in range(6, 15)]
    kept = [path.name for path in checkpoint_steps(saved_often) if (path / "optim").exists()]
    assert kept == ["step-00006", "step-00014"]
    for path in checkpoint_steps(saved_often):
        verify_checkpoint(path)
    assert (trained / "step-00003" / "optim").exists()


def test_a_reset_optimizer_starts_from_zero_state_and_ramps_momentum_again(trained, tmp_path, monkeypatch):
    seen = []

    def hook(optimizer):
        states = optimizer.state.values()
        largest = max(x.abs().max().item() for s in states for key, x in s.items() if key != "step")
        seen.append((optimizer.groups[0]["momentum"], {s["step"] for s in states}, largest))
    before_steps(monkeypatch, hook)
    run = tmp_path / "reset"
    train_run("--continue-from", trained / "step-00006", "--out", run, *CONTINUAL, "--reset-optimizer")
    assert [momentum for momentum, _, _ in seen[:2]] == pytest.approx([0.85, 0.85 + 0.12 / 400])
    assert seen[0][1:] == ({0}, 0)
    expected = weights(run / "step-00014")
    for name in names(run)[1:]:
        shutil.rmtree(run / name)
    # from the seed, whose own optimizer state must stay out of it
    train_run("--resume", run)
    assert same(weights(run / "step-00014"), expected)
    assert seen[8] == seen[0]


def test_a_continued_run_may_stop_and_resume_and_be_continued_again(continued, tmp_path):
    run = shutil.copytree(continued, tmp_path / "run")
    shutil.rmtree(run / "step-00012")
    shutil.rmtree(run / "step-00014")
    train_run("--resume", run)
    assert same(weights(run / "step-00014"), weights(continued / "step-00014"))
    third = tmp_path / "third"
    train_run("--continue-from", run / "step-00014", "--out", third, "--num-steps", 4)
    rows = read_json(third / "config.json")["phases"]
    assert [(row["anchor_step"], row["anchor_sample"]) for row in rows] == [(0, 0), (6, 24), (14, 56)]
    assert read_json(third / "step-00018" / "state.json")["sample"] == 72


def test_other_data_is_read_from_its_beginning_and_both_validation_slices_are_reported(
        trained, data, other_data, tmp_path, monkeypatch):
    seen = []
    batch = Mix.batch

    def recorded(self, indices):
        # not those of validation, which has a seed of its own
        seen.extend(int(i) for i in indices if self.seed == 0)
        return batch(self, indices)
    monkeypatch.setattr(Mix, "batch", recorded)
    run = tmp_path / "b"
    train_run("--continue-from", trained / "step-00006", "--out", run, *CONTINUAL, "--data", other_data)
    assert min(seen) == 0
    new = log_lines(run, "val")
    old = log_lines(run, "val_old")
    assert [line["step"] for line in new] == [line["step"] for line in old]
    assert new[0]["mix"] == str(other_data) and old[0]["mix"] == str(data)
    assert old[0]["bpb"] == log_lines(trained, "val")[-1]["bpb"] != new[0]["bpb"]
    # back on the first data: where its stream was left
    seen.clear()
    train_run("--continue-from", run / "step-00014", "--out", tmp_path / "c", *CONTINUAL, "--data", data)
    assert min(seen) == 24


def test_a_checkpoint_that_is_damaged_pruned_or_of_another_tokenizer_is_not_continued(
        run, other_data, tmp_path, refused):
    step = run / "step-00006"
    argv = ["--continue-from", step, "--out", tmp_path / "b", *CONTINUAL]
    tokenizer = (other_data / "tokenizer.txt").read_text().splitlines()
    # another last merge
    tokenizer[-1] = tokenizer[-1].replace(tokenizer[-1].split()[0], "enp6cXo=")
    (other_data / "tokenizer.txt").write_text("\n".join(tokenizer) + "\n")
    sha256 = Tokenizer.load(other_data).sha256
    for shard in other_data.glob("*.bin"):
        content = bytearray(shard.read_bytes())
        content[32:96] = sha256.encode()
        shard.write_bytes(content)
    assert "another tokenizer" in refused(train.main, *argv, "--data", other_data)
    (step / "optim" / "rank-00000.pt").unlink()
    assert "rank-00000.pt" in refused(train.main, *argv)
    files = read_json(step / "manifest.json")["files"]
    files.pop("optim/rank-00000.pt")
    write_manifest(step, files)
    assert "no optimizer state" in refused(train.main, *argv)
    assert not (tmp_path / "b").exists()
    train_run(*argv, "--reset-optimizer")


def test_data_that_was_made_anew_in_its_place_is_taken_on_purpose_alone(
        other_data, tmp_path, capsys, refused):
    run = tmp_path / "a"
    train_run(*SMALL, "--data", other_data, "--out", run)
    reweigh(other_data, 10)
    assert "is not the data that" in refused(train.main, "--resume", run)
    argv = ["--continue-from", run / "step-00006", "--out", tmp_path / "b", *CONTINUAL]
    assert "is not the data that" in refused(train.main, *argv)
    train_run(*argv, "--data", other_data)
    assert f"the earlier data is left out: {other_data}" in capsys.readouterr().out
    assert log_lines(tmp_path / "b", "val") and not log_lines(tmp_path / "b", "val_old")


def test_a_restart_does_not_take_up_a_run_that_the_same_command_was_refused(
        data, run, monkeypatch, refused):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    argv = [*SMALL, "--data", data, "--out", run]
    assert "already holds a run" in refused(train.main, *argv, "--eval-tokens", 304)
    record = read_json(run / "config.json")
    # what the command does not name must agree too
    record["train"]["keep_optim"] = 5
    (run / "config.json").write_text(json.dumps(record))
    assert "already holds a run" in refused(train.main, *argv)


def test_damaged_checkpoints_beyond_the_resumed_one_do_not_cost_new_ones_their_optimizer_state(
        data, tmp_path, monkeypatch, capsys):
    train_run(*SMALL, "--data", data, "--out", tmp_path, "--num-steps", 12, "--save-every", 2,
              "--keep-optim", -1)
    for step in ("step-00008", "step-00010", "step-00012"):
        (tmp_path / step / "model.pt").write_bytes(b"x")

    def hook(optimizer):
        if next(iter(optimizer.state.values()))["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)
    before_steps(monkeypatch, hook)
    train_run("--resume", tmp_path, "--keep-optim", 2)
    out = capsys.readouterr().out
    assert f"resuming {tmp_path / 'step-00006'}" in out and "stopped at step 10" in out
    assert (tmp_path / "step-00008" / "optim").is_dir() and (tmp_path / "step-00010" / "optim").is_dir()


@pytest.mark.parametrize("damage", ["{", "{}"])
def test_an_older_damaged_manifest_does_not_stop_later_saves(damage, data, tmp_path):
    train_run(*SMALL, "--data", data, "--out", tmp_path, "--save-every", 2)
    shutil.rmtree(tmp_path / "step-00006")
    (tmp_path / "step-00002" / "manifest.json").write_text(damage)
    train_run("--resume", tmp_path, "--keep-optim", 1)
    assert names(tmp_path)[-1] == "step-00006" and not (tmp_path / "step-00004" / "optim").exists()


def test_a_seed_of_symbolic_links_under_any_name_is_placed_as_files(run, tmp_path):
    parent = (run / "step-00003").rename(run / "snapshot")
    (parent / "model.pt").rename(run / "blob")
    (parent / "model.pt").symlink_to("../blob")
    train_run("--continue-from", parent, "--out", tmp_path / "b", *CONTINUAL)
    assert names(tmp_path / "b") == ["step-00003", "step-00004", "step-00008", "step-00011"]
    assert not (tmp_path / "b" / "step-00003" / "model.pt").is_symlink()
    verify_checkpoint(tmp_path / "b" / "step-00003")


def test_the_commit_is_of_this_code_alone_and_needs_no_git(tmp_path, monkeypatch):
    # a copy of the code inside another repository
    (tmp_path / "copy").mkdir()
    for command in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m theirs"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "copy" / "train.py"))
    assert train.git_commit() == "unknown"
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    assert len(train.git_commit()) == 40
    monkeypatch.setenv("PATH", "")
    assert train.git_commit() == "unknown"


def test_everything_that_a_resume_reads_is_on_the_disk_before_it_gets_its_name(
        trained, tmp_path, monkeypatch):
    synced = set()
    fsync = os.fsync

    def recorded(descriptor):
        synced.add(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path / "b"))
        fsync(descriptor)

    def no_link(*paths):
        raise OSError("another file system")
    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "link", no_link)
    run = tmp_path / "b"
    train_run("--continue-from", trained / "step-00006", "--out", run, *CONTINUAL, "--num-steps", 4)
    inside = ("", "/optim", "/model.pt", "/optim/rank-00000.pt", "/config.json", "/state.json")
    expected = {f".tmp-step-{step}{name}" for step in ("00006", "00010") for name in inside}
    expected |= {f".tmp-step-{step}/manifest.json.tmp" for step in ("00006", "00010")} | {".", "log.jsonl",
                 "config.json.tmp"}
    assert synced >= expected, expected - synced
    assert same(weights(run / "step-00006"), weights(trained / "step-00006"))
