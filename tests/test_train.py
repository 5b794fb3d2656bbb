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
from checkpoint import (
    checkpoint_steps,
    load_checkpoint,
    read_json,
    verify_checkpoint,
    write_manifest,
)
from common import lock, sha256_of
from conftest import (
    SMALL,
    before_steps,
    change_json,
    closed_stdout,
    log_lines,
    reweigh,
    same,
    same_end,
    signal_at_step,
    small_run,
    table,
    train_run,
    weights,
)
from dataloader import Mix, open_data
from model import PRESETS


def losses(run):
    return [(line["step"], line["losses"]) for line in log_lines(run)]


def names(run):
    return [path.name for path in checkpoint_steps(run)]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CONTINUAL = """--num-steps 8 --warmup-steps 2 --peak-lrm 0.5 --warmdown-ratio 0.5 --final-lrm 0 --save-every 4
               --weight-decay 0.1""".split()


def continue_run(parent, out, *argv):
    """Open a second phase, CONTINUAL, from the newest checkpoint of a run."""
    train_run("--continue-from", checkpoint_steps(parent)[-1], "--out", out, *CONTINUAL, *argv)


# --------------------------------------------------------------------------------------------------
# The step

def test_another_seed_is_another_run(data, trained, tmp_path):
    small_run(data, tmp_path, "--seed", 1)
    assert not same_end(tmp_path, trained)


# in bfloat16 the loss falls only where the new weights are cast after every step
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_training_lowers_the_loss_of_every_stage(dtype, data, tmp_path):
    small_run(data, tmp_path, "--num-steps", 30, "--save-every", -1, "--dtype", dtype)
    (_, first), *_, (_, last) = losses(tmp_path)
    # ln 300
    assert all(abs(loss - 5.70) < 0.05 for loss in first)
    # ten words of a few tokens each
    assert all(loss < 3.5 for loss in last), last


def test_a_backprop_run_has_one_stage_and_a_joint_run_trains_all(data, tmp_path, capsys):
    train_run("--objective", "bp", "--dry-run")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"]["stage_layers"] == [5]
    small_run(data, tmp_path, "--objective", "joint", "--num-steps", 20)
    assert all(loss < 5 for loss in losses(tmp_path)[-1][1])


def test_every_step_uses_the_schedules_rate_momentum_and_weight_decay(data, tmp_path, monkeypatch):
    seen = []
    before_steps(monkeypatch, lambda optimizer: seen.append([dict(group) for group in optimizer.groups]))
    # the wall clock, which no duration follows, is set back an hour at every look
    monkeypatch.setattr(time, "time", itertools.count(0, -3600).__next__)
    small_run(data, tmp_path, "--weight-decay", 0.1, "--save-every", -1)
    assert all(line["dt"] > 0 for line in log_lines(tmp_path))
    # two of warmup, then round(0.65 x 6) = 4 of warmdown from 1 to 0.05
    lrm = [0.5, 1.0, 1.0, 0.7625, 0.525, 0.2875]
    assert [line["lrm"] for line in log_lines(tmp_path)] == pytest.approx(lrm)
    for step, decay in ((0, 0.1), (3, 0.05), (5, 0.00669873)):
        matrices, heads, *_ = seen[step]
        assert (matrices["lr"], heads["lr"]) == pytest.approx((0.06 * lrm[step], 0.008 * lrm[step]))
        # (1 + cos(pi rel / 6)) / 2, and the ramp of the run's first 400 steps
        expected = (decay, 0.85 + 0.12 * step / 400)
        assert (matrices["weight_decay"], matrices["momentum"]) == pytest.approx(expected)


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
    assert same_end(run, trained)
    assert losses(run) == losses(trained) and not list(run.glob(".tmp*"))
    assert read_json(run / "step-00006" / "state.json")["sample"] == 24


def test_a_run_killed_before_its_first_save_restarts_from_its_recorded_config(trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(trained / "config.json", run)
    # cut mid-line
    (run / "log.jsonl").write_text('{"kind": "step", "step": 0}\n{"kind": "st')
    train_run("--resume", run)
    assert same_end(run, trained) and losses(run) == losses(trained)


def test_a_complete_run_is_left_alone_and_so_is_one_that_another_process_holds(run, refused, capsys):
    before = files(run)
    with lock(run):
        assert "another process" in refused(train.main, "--resume", run)
    train_run("--resume", run, "--save-every", 1)
    assert "already complete" in capsys.readouterr().out and files(run) == before


def test_a_resume_may_change_the_rates_to_come_and_none_that_was_used(data, tmp_path, refused):
    small_run(data, tmp_path, "--warmdown-ratio", 0.5, "--weight-decay", 0.1)
    shutil.rmtree(tmp_path / "step-00006")
    # the cosine of its weight decay would have been another one
    assert "weight_decay of step" in refused(train.main, "--resume", tmp_path, "--num-steps", 8)
    train_run("--resume", tmp_path, "--final-lrm", 0.5)
    # step 3 is the last at the peak; then in three steps to 0.5
    assert [line["lrm"] for line in log_lines(tmp_path)] == pytest.approx([0.5, 1, 1, 1, 5 / 6, 2 / 3])
    assert read_json(tmp_path / "config.json")["phases"][0]["final_lrm"] == 0.5


def test_the_data_is_found_from_anywhere_and_nothing_else_in_its_place(data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    small_run("data", "runs/a")
    shutil.rmtree("runs/a/step-00006")
    # a folder of the same name, with other weights of the sources
    shutil.copytree("data", "elsewhere/data")
    reweigh(Path("elsewhere/data"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_run("--resume", "../runs/a")
    continue_run("../runs/a", "deep/down/b")
    # killed before its seed was placed
    for path in checkpoint_steps("deep/down/b"):
        shutil.rmtree(path)
    monkeypatch.chdir("/")
    train_run("--resume", tmp_path / "elsewhere/deep/down/b")
    # together they may move
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    continue_run(tmp_path / "moved/deep/down/b", tmp_path / "c")
    rows = read_json(tmp_path / "c/config.json")["phases"]
    assert [(row["anchor_step"], row["anchor_sample"]) for row in rows] == [(0, 0), (6, 24), (14, 56)]
    assert len({row["mix_sha256"] for row in rows}) == 1


# `timeout` and schedulers send SIGTERM twice
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_run_that_is_told_to_stop_saves_without_validation_and_goes_on_as_if_it_had_not(
        signals, data, trained, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at_step(patch, 0, *signals)
        small_run(data, tmp_path, "--eval-every", 1)
    assert f"stopped at step 2; go on with --resume {tmp_path}" in capsys.readouterr().out
    assert names(tmp_path) == ["step-00002"]
    assert [line["step"] for line in log_lines(tmp_path, "val")] == [1]
    train_run("--resume", tmp_path)
    assert [line["step"] for line in log_lines(tmp_path, "val")] == [1, 2, 3, 4, 5, 6]
    assert same_end(tmp_path, trained)


def test_a_checkpoint_holds_what_it_should_to_the_bit_and_calibration_may_write_its_bounds(trained, run):
    step = run / "step-00006"
    assert sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file()) == [
        "config.json", "manifest.json", "model.pt", "optim/rank-00000.pt", "state.json", "tokenizer.json",
        "tokenizer.txt"]
    change_json(step / "config.json", poe_wand_p99_bounds_per_stage_head=[3.9, 2.0])
    (step / "metrics.json").write_text("{}")
    model, _, _ = load_checkpoint(step, dtype=torch.float64)
    stored = weights(trained)
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())
    change_json(step / "config.json", step=7)
    with pytest.raises(ValueError, match="config.json was altered"):
        verify_checkpoint(step)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [b"", pickle.dumps(Evil())])
def test_foreign_weights_are_refused_and_never_executed(content, run, monkeypatch, refused):
    monkeypatch.chdir(run)
    step = run / "step-00006"
    (step / "model.pt").write_bytes(content)
    listed = read_json(step / "manifest.json")["files"] | {"model.pt": sha256_of(step / "model.pt")}
    write_manifest(step, listed)
    assert "not a file of tensors" in refused(sample.main, step)
    assert not (run / "executed").exists()
    write_manifest(step, listed | {"../config.json": ""})
    assert "names ../config.json, outside" in refused(sample.main, step)


# --------------------------------------------------------------------------------------------------
# Dry run and bad input

@pytest.mark.parametrize("preset", PRESETS)
def test_dry_run_prints_the_plan_as_json_and_writes_nothing(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_run("--preset", preset, "--dry-run", "--data", "not/there/yet")
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    if preset == "3b":
        assert plan["params_total"] == 3_019_900_480 and plan["total_batch_tokens"] == 12 * 32 * 2048
        # one 80 GB GPU
        assert 55 < plan["memory_per_rank_bytes_total"] / 2 ** 30 < 75
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, word", table("""
    --stage-layers 1,1                | n_layer = 5
    --stage-layers a,b                | 16,6,5,5
    --n-embd 97                       | n_head = 3
    --vocab-size 40000                | 32768
    --total-batch-tokens 1000         | 1000
    --device-batch-size 3             | 768
    --num-steps 0                     | num-steps
    --matrix-lr nan                   | matrix-lr
    --warmup-steps 399                | 399
    --data no/such/folder             | manifest.json
    --resume no/such/run              | no/such/run
    --objective bp --stage-layers 2,3 | bp
    --out=                            | --out
    --reset-optimizer                 | --continue-from
    --fp8 --n-embd 40 --n-head 4      | (40, 384, 2048)"""))
def test_bad_flags_get_one_line_and_write_nothing(argv, word, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert word in refused(train.main, *argv.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, message", table("""
    --out {run} | already holds a run
    --resume {run} --n-embd 24 | --n-embd
    --resume {run}/step-00003 | --resume {run}/step-00003 is not a run
    --resume {run} --num-steps 4 --warmup-steps 1 | past the run's end, step 4
    --resume {run} --num-steps 60 | --continue-from
    --resume {run} --matrix-lr 0.1 | from 0.03 to
    --resume {run} --continue-from {run}/step-00006 | --continue-from cannot
    --continue-from {run} --out b | RUN/step-XXXXX
    --continue-from {run}/step-00006 --out {run} | already holds a run
    --continue-from {run}/step-00006 --out b --n-layer 4 --preset tiny | --preset, --n-layer cannot
    --continue-from {run}/step-00006 --out b --total-batch-tokens 80 | not a multiple"""))
def test_a_run_is_not_overwritten_nor_continued_wrongly(argv, message, run, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    assert message.format(run=run) in refused(train.main, *argv.format(run=run).split())
    assert files(tmp_path) == before


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
    numbers = itertools.count(1)

    def counted(operation):
        def call(*args, **kwargs):
            if next(numbers) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)
        return call

    def child():
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
    small_run(data, tmp_path / "parent", *minute)
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
        assert same_end(run, whole) and losses(run) == losses(whole)
    assert number > 25, "a seed and a save are that many operations"


# --------------------------------------------------------------------------------------------------
# Phases: the continual run

def test_a_continued_run_begins_with_its_seed_and_records_both_phases(trained, tmp_path):
    run = tmp_path / "run"
    continue_run(trained, run, "--keep-optim", 1)
    assert names(run) == ["step-00006", "step-00008", "step-00012", "step-00014"]
    # a hard link
    assert (run / "step-00006" / "model.pt").samefile(trained / "step-00006" / "model.pt")
    rows = read_json(run / "config.json")["phases"]
    assert [(row["num_steps"], row["peak_lrm"], row["batch"]) for row in rows] == [(6, 1.0, 4), (8, 0.5, 4)]
    assert rows == read_json(run / "step-00012" / "config.json")["phases"]
    # rel 0..7: two of warmup, peak to rel 4, then w = 4 down to 0 at rel 8
    lrm = [0.25, 0.5, 0.5, 0.5, 0.5, 0.375, 0.25, 0.125]
    assert [line["lrm"] for line in log_lines(run)] == pytest.approx(lrm)
    assert [line["step"] for line in log_lines(run)] == list(range(6, 14))
    # rel 0, 1, 2, 4, 8, and the saves at 8, 12, 14
    validations = log_lines(run, "val")
    assert [line["step"] for line in validations] == [6, 7, 8, 10, 12, 14]
    assert validations[0]["bpb"] == log_lines(trained, "val")[-1]["bpb"]
    # the newest save and the ends of phases keep their optimizer state
    kept = [path.name for path in checkpoint_steps(run) if (path / "optim").exists()]
    assert kept == ["step-00006", "step-00014"] and (trained / "step-00003" / "optim").exists()
    for path in checkpoint_steps(run):
        verify_checkpoint(path)


@pytest.mark.parametrize("argv, first", [([], 6), (["--reset-optimizer"], 0)])
def test_a_new_phase_goes_on_with_the_optimizers_state_and_ramp_or_resets_them(
        argv, first, trained, tmp_path, monkeypatch):
    seen = []

    def hook(optimizer):
        states = optimizer.state.values()
        largest = max(x.abs().max().item() for s in states for key, x in s.items() if key != "step")
        seen.append((optimizer.groups[0]["momentum"], {s["step"] for s in states}, largest > 0))
    before_steps(monkeypatch, hook)
    run = tmp_path / "run"
    continue_run(trained, run, *argv)
    assert [momentum for momentum, *_ in seen[:2]] == pytest.approx(
        [0.85 + 0.12 * (first + step) / 400 for step in (0, 1)])
    assert seen[0][1:] == ({first}, first > 0)
    expected = weights(run)
    for name in names(run)[1:]:
        shutil.rmtree(run / name)
    # from the seed, whose own optimizer state must stay out of a reset
    train_run("--resume", run)
    assert same(weights(run), expected) and seen[8] == seen[0]


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
    # what reads its output has ended
    with closed_stdout():
        continue_run(trained, run, "--data", other_data)
    assert min(seen) == 0
    new = log_lines(run, "val")
    old = log_lines(run, "val_old")
    assert [line["step"] for line in new] == [line["step"] for line in old]
    assert new[0]["mix"] == str(other_data) and old[0]["mix"] == str(data)
    assert old[0]["bpb"] == log_lines(trained, "val")[-1]["bpb"] != new[0]["bpb"]
    # back on the first data: where its stream was left
    seen.clear()
    continue_run(run, tmp_path / "c", "--data", data)
    assert min(seen) == 24


def test_a_checkpoint_that_is_damaged_pruned_or_of_another_tokenizer_is_not_continued(
        run, tmp_path, monkeypatch, refused):
    step = run / "step-00006"
    argv = ["--continue-from", step, "--out", tmp_path / "b", *CONTINUAL]
    with monkeypatch.context() as patch:
        patch.setattr(train, "open_data", lambda path, vocab_size: open_data("", vocab_size + 1))
        assert "another tokenizer" in refused(train.main, *argv, "--data", tmp_path)
    (step / "optim" / "rank-00000.pt").unlink()
    assert "rank-00000.pt" in refused(train.main, *argv)
    listed = read_json(step / "manifest.json")["files"]
    listed.pop("optim/rank-00000.pt")
    write_manifest(step, listed)
    assert "no optimizer state" in refused(train.main, *argv)
    assert not (tmp_path / "b").exists()
    train_run(*argv, "--reset-optimizer")


def test_data_that_was_made_anew_in_its_place_is_taken_on_purpose_alone(
        other_data, tmp_path, capsys, refused):
    run = tmp_path / "a"
    small_run(other_data, run)
    reweigh(other_data, 10)
    assert "is not the data that" in refused(train.main, "--resume", run)
    argv = ["--continue-from", run / "step-00006", "--out", tmp_path / "b"]
    assert "is not the data that" in refused(train.main, *argv)
    continue_run(run, tmp_path / "b", "--data", other_data)
    assert f"the earlier data is left out: {other_data}" in capsys.readouterr().out


def test_a_restart_does_not_take_up_a_run_that_the_same_command_was_refused(
        data, run, monkeypatch, refused):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    argv = [*SMALL, "--data", data, "--out", run]
    assert "already holds a run" in refused(train.main, *argv, "--eval-tokens", 304)
    # what the command does not name must agree too
    recorded = read_json(run / "config.json")["train"]
    change_json(run / "config.json", train=recorded | {"keep_optim": 5})
    assert "already holds a run" in refused(train.main, *argv)


def test_damaged_checkpoints_are_skipped_and_do_not_cost_new_ones_their_optimizer_state(
        data, tmp_path, monkeypatch, capsys, refused):
    small_run(data, tmp_path, "--num-steps", 12, "--save-every", 2, "--keep-optim", -1)
    for path in checkpoint_steps(tmp_path)[3:]:
        (path / "model.pt").write_bytes(b"x")
    for step, damage in (("step-00002", "{"), ("step-00004", "{}")):
        (tmp_path / step / "manifest.json").write_text(damage)
    signal_at_step(monkeypatch, 8, signal.SIGTERM)
    train_run("--resume", tmp_path, "--keep-optim", 2)
    out = capsys.readouterr().out
    assert out.count("model.pt was altered or cut") == 3 and "stopped at step 10" in out
    assert f"resuming {tmp_path / 'step-00006'}" in out
    kept = [path.name for path in checkpoint_steps(tmp_path)[2:] if (path / "optim").exists()]
    assert kept == ["step-00008", "step-00010", "step-00012"]
    for path in checkpoint_steps(tmp_path):
        (path / "manifest.json").unlink()
    assert "no checkpoint" in refused(train.main, "--resume", tmp_path)


def test_a_seed_of_symbolic_links_under_any_name_is_placed_as_files(run, tmp_path):
    parent = (run / "step-00003").rename(run / "snapshot")
    (parent / "model.pt").rename(run / "blob")
    (parent / "model.pt").symlink_to("../blob")
    train_run("--continue-from", parent, "--out", tmp_path / "b", *CONTINUAL)
    assert names(tmp_path / "b") == ["step-00003", "step-00004", "step-00008", "step-00011"]
    assert not (tmp_path / "b" / "step-00003" / "model.pt").is_symlink()
    verify_checkpoint(tmp_path / "b" / "step-00003")


def test_the_commit_is_of_this_code_alone_and_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    for command in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m ours"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    assert len(train.git_commit()) == 40
    # a copy of the code inside another repository
    monkeypatch.setattr(train, "__file__", str(tmp_path / "copy" / "train.py"))
    (tmp_path / "copy").mkdir()
    assert train.git_commit() == "unknown"
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
    continue_run(trained, run, "--num-steps", 4)
    inside = ("", "/optim", "/model.pt", "/optim/rank-00000.pt", "/config.json", "/state.json",
              "/manifest.json.tmp")
    expected = {f".tmp-step-{step}{name}" for step in ("00006", "00010") for name in inside}
    expected |= {".", "log.jsonl", "config.json.tmp"}
    assert synced >= expected, expected - synced
    assert same(weights(run / "step-00006"), weights(trained))
