"""
train.py: exact resume, accumulation, checkpoints that are whole or absent, and bad input, through the real main() at a small scale.

Run: python -m pytest tests/test_train.py
"""
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sample
import train
from conftest import ROOT, SMALL
from dataloader import Mix, Tokenizer, open_data
from checkpoint import checkpoint_steps, load_checkpoint, verify_checkpoint, write_manifest
from common import lock, sha256_of
from model import PRESETS, ModelConfig, PoE
from muon import MuonAdamW
from test_model import make, naive_losses, tokens


def weights(step_dir):
    return torch.load(step_dir / "model.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_lines(run, kind="step"):
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if line["kind"] == kind]


# -- the step -----------------------------------------------------------------------------------------------------

def test_one_optimizer_step_equals_the_naive_twins():
    config = train.TrainConfig(**{**train.asdict(train.RECIPES["tiny"]), "sequence_len": 16, "total_batch_tokens": 128, "device_batch_size": 4})
    ours, twin = make(), make()
    idx, targets = tokens()
    for row in range(3):
        for _ in ours.backward_by_stage(idx[row:row + 1], targets[row:row + 1], 1 / targets.numel(), last=row == 2):
            pass
    sum(naive_losses(twin, idx, targets, detach=True)).backward()
    for model in (ours, twin):
        MuonAdamW(train.optimizer_groups(model, config)).step()
    # eps is 1e-10 and the gates' gradients are small, so AdamW's first step, g / |g|, magnifies rounding: 1e-12 holds all the same
    for (name, p), (_, q) in zip(ours.named_parameters(), twin.named_parameters()):
        error = (p - q).abs().max().item()
        assert error < 1e-12, f"{name}: weights differ by {error:.1e} after one step"


def test_micro_batches_add_up_to_the_same_run(data, trained, tmp_path):
    train.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--device-batch-size", "4"])
    a, b = weights(trained / "step-00006"), weights(tmp_path / "run" / "step-00006")
    error = max((a[name] - b[name]).abs().max().item() for name in a)
    assert 0 < error < 1e-9, error                  # another order of summation: rounding, magnified by six AdamW steps


def test_training_lowers_the_loss_of_every_stage(data, tmp_path):
    train.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--num-steps", "40", "--save-every", "-1"])
    first, last = log_lines(tmp_path / "run")[0]["losses"], log_lines(tmp_path / "run")[-1]["losses"]
    assert all(abs(loss - 5.70) < 0.05 for loss in first)        # ln 300
    assert all(loss < 3.5 for loss in last), last                # 2.7 seen: ten words of a few tokens each


def test_the_same_seed_gives_the_same_run_and_another_does_not(data, trained, tmp_path):
    train.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "a")])
    train.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "b"), "--seed", "1"])
    assert same(weights(trained / "step-00006"), weights(tmp_path / "a" / "step-00006"))
    assert not same(weights(trained / "step-00006"), weights(tmp_path / "b" / "step-00006"))


@pytest.mark.parametrize("objective", ["bp", "joint"])
def test_the_control_arms_train_through_the_same_loop(objective, data, tmp_path):
    argv = [a for pair in zip(SMALL[::2], SMALL[1::2]) if objective != "bp" or pair[0] != "--stage-layers" for a in pair]
    train.main([*argv, "--data", str(data), "--out", str(tmp_path / "run"), "--objective", objective])
    record = json.loads((tmp_path / "run" / "step-00006" / "config.json").read_text())
    assert record["model"]["stage_layers"] == ([4] if objective == "bp" else [2, 1, 1])
    assert any("lm_head_stages" in name for name in weights(tmp_path / "run" / "step-00006")) == (objective == "joint")


def test_every_step_uses_the_schedules_rate_momentum_and_weight_decay(data, tmp_path, monkeypatch):
    seen, step = [], MuonAdamW.step
    monkeypatch.setattr(MuonAdamW, "step", lambda self: (seen.append([dict(group, params=None) for group in self.groups]), step(self)))
    train.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--weight-decay", "0.1", "--save-every", "-1"])
    muon, heads = [groups[0] for groups in seen], [groups[1] for groups in seen]
    lrm = [0.5, 1.0, 1.0, 0.7625, 0.525, 0.2875]                  # two of warmup, then 4 of warmdown from 1 to 0.05
    assert [g["lr"] for g in muon] == pytest.approx([0.03 * x for x in lrm])
    assert [g["lr"] for g in heads] == pytest.approx([0.008 * x for x in lrm])
    half_cosine = [1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]     # (1 + cos(pi rel / 6)) / 2
    assert [g["weight_decay"] for g in muon] == pytest.approx([0.1 * x for x in half_cosine])
    assert [g["momentum"] for g in muon] == pytest.approx([0.85 + 0.12 * s / 400 for s in range(6)])


def test_optimizer_groups_cover_every_preset_and_keep_embeddings_from_muon():
    config = train.TrainConfig(**{**train.asdict(train.RECIPES["tiny"]), "sequence_len": 256})
    for preset in PRESETS.values():
        with torch.device("meta"):
            groups = train.optimizer_groups(PoE(preset), config)        # asserts the partition
        assert {name.split(".")[-2] for name in groups[0]["params"]} == {"c_q", "c_k", "c_v", "c_proj", "c_fc"}
        assert all(group["kind"] == "adamw" for group in groups[1:])


# -- checkpoints and resume ---------------------------------------------------------------------------------------

def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "step-00006")
    (run / ".tmp-step-00006").mkdir()                                    # a save that was killed
    train.main(["--resume", str(run)])
    assert same(weights(run / "step-00006"), weights(trained / "step-00006"))
    ours, theirs = (torch.load(r / "step-00006" / "optim" / "rank-00000.pt", weights_only=True) for r in (run, trained))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name]["step"] == theirs[name]["step"] == 6
        assert all(torch.equal(v, theirs[name][key]) for key, v in ours[name].items() if key != "step")
    assert [(line["step"], line["losses"]) for line in log_lines(run)] == [(line["step"], line["losses"]) for line in log_lines(trained)]
    assert not list(run.glob(".tmp*"))
    assert json.loads((run / "step-00006" / "state.json").read_text())["sample"] == 24


def test_resume_skips_a_damaged_checkpoint_and_says_why(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with open(run / "step-00006" / "model.pt", "r+b") as f:
        f.seek(2000)
        f.write(b"\xff\xfe\xfd")
    train.main(["--resume", str(run)])
    out = capsys.readouterr().out
    assert "skipping" in out and "model.pt was altered or cut" in out and "resuming" in out and "step-00003" in out
    assert same(weights(run / "step-00006"), weights(trained / "step-00006"))


def test_a_run_killed_before_its_first_save_restarts_from_its_recorded_config(trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(trained / "config.json", run)
    (run / "log.jsonl").write_text('{"kind": "step", "step": 0}\n{"kind": "st')      # cut mid-line
    train.main(["--resume", str(run)])
    assert same(weights(run / "step-00006"), weights(trained / "step-00006"))
    assert [line["step"] for line in log_lines(run)] == list(range(6))


def test_resuming_a_finished_run_reports_again_and_changes_nothing(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = (run / "step-00006" / "manifest.json").read_bytes()
    train.main(["--resume", str(run)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 6
    assert (run / "step-00006" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])       # `timeout` and schedulers send SIGTERM twice
def test_interrupting_leaves_a_usable_checkpoint_and_exits_cleanly(signals, data, trained, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *SMALL, "--data", data, "--out", run, "--num-steps", "100000"],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("step:"):
            break
    for number in signals:
        process.send_signal(number)
        time.sleep(0.01)                                        # two of a kind at once are one
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and f"--resume {run}" in out
    newest = checkpoint_steps(run)[-1]
    verify_checkpoint(newest)
    assert int(newest.name[5:]) >= 1 and str(int(newest.name[5:])) in out
    train.main(["--resume", str(run), "--num-steps", str(int(newest.name[5:]) + 2), "--warmup-steps", "1"])
    assert checkpoint_steps(run)[-1].name == f"step-{int(newest.name[5:]) + 2:05d}"


def test_a_closed_pipe_does_not_end_a_run(data, tmp_path, monkeypatch):
    ours, theirs = os.pipe()
    os.close(ours)                                              # as of `train.py | tee log` after Ctrl-C
    with os.fdopen(theirs, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        train.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run")])
    verify_checkpoint(tmp_path / "run" / "step-00006")


def test_bfloat16_training_casts_the_new_weights_after_every_step(data, tmp_path, monkeypatch):
    """The casts that the loop keeps are those of the weights: the losses are, but for rounding, those of a run that casts in every pass."""
    def losses(out):
        train.main([*SMALL, "--data", str(data), "--out", str(tmp_path / out), "--dtype", "bfloat16"])
        return [line["losses"] for line in map(json.loads, (tmp_path / out / "log.jsonl").read_text().splitlines()) if line["kind"] == "step"]
    kept = losses("kept")
    monkeypatch.setattr(PoE, "cast_weights", lambda self: None)
    assert len(kept) == 6 and kept[-1][0] < kept[0][0] - 0.1
    assert all(a == pytest.approx(b, abs=0.01) for a, b in zip(kept, losses("cast_in_each_pass"), strict=True))


def test_checkpoint_round_trip_is_bit_exact(trained):
    model, record, _ = load_checkpoint(trained / "step-00006", dtype=torch.float64)
    stored = weights(trained / "step-00006")
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())
    assert torch.equal(model.merged_heads[1], stored["lm_head.weight"] + stored["lm_head_stages.1.weight"])
    assert record["step"] == 6 and record["phases"][0]["num_steps"] == 6


def test_a_checkpoint_holds_what_it_should_and_calibration_may_write_its_bounds(trained, tmp_path):
    step = tmp_path / "step-00006"
    shutil.copytree(trained / "step-00006", step)
    assert sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file()) == [
        "config.json", "manifest.json", "model.pt", "optim/rank-00000.pt", "state.json", "tokenizer.json", "tokenizer.txt"]
    record = json.loads((step / "config.json").read_text())
    (step / "config.json").write_text(json.dumps({**record, "poe_wand_p99_bounds_per_stage_head": [3.9, 2.0]}))
    (step / "metrics.json").write_text("{}")
    verify_checkpoint(step)
    (step / "config.json").write_text(json.dumps({**record, "step": 7}))
    with pytest.raises(ValueError, match="config.json was altered"):
        verify_checkpoint(step)


@pytest.mark.parametrize("name", ["model.pt", "tokenizer.txt", "manifest.json"])
def test_a_checkpoint_without_one_of_its_files_is_refused(name, trained, tmp_path):
    shutil.copytree(trained / "step-00006", tmp_path / "step-00006")
    (tmp_path / "step-00006" / name).unlink()
    with pytest.raises(ValueError if name != "model.pt" else FileNotFoundError, match=name if name != "model.pt" else "no checkpoint"):
        load_checkpoint(tmp_path / "step-00006")


def test_a_manifest_that_names_a_file_outside_of_the_checkpoint_is_refused(trained, tmp_path, refused):
    step = tmp_path / "step-00006"
    shutil.copytree(trained / "step-00006", step)
    (tmp_path / "secret").write_text("0")
    for name in ("../secret", str(tmp_path / "secret")):
        write_manifest(step, verify_checkpoint(trained / "step-00006") | {name: sha256_of(tmp_path / "secret")})
        assert f"its manifest names {name}, outside of it" in refused(sample.main, step)


def test_the_log_has_every_step_its_rate_and_a_validation_at_each_save(trained):
    steps = log_lines(trained)
    assert [line["step"] for line in steps] == list(range(6))
    assert [round(line["lrm"], 6) for line in steps] == [0.5, 1.0, 1.0, 0.7625, 0.525, 0.2875]     # w = round(0.65 x 6) = 4
    validations = log_lines(trained, "val")
    assert [line["step"] for line in validations] == [3, 6]
    bpb = validations[-1]["bpb"]
    assert bpb["prefix"][0] == bpb["single"][0] and bpb["prefix"][-1] == bpb["full"]


# -- dry run and bad input ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", list(PRESETS))
def test_dry_run_prints_the_plan_as_json_and_writes_nothing(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--preset", preset, "--dry-run", "--data", "not/there/yet"])
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["params_total"] == sum(plan["params"].values())
    assert plan["tokens"] == plan["num_steps"] * plan["total_batch_tokens"]
    if preset == "3b":
        assert plan["params_total"] == 3_019_900_480 and plan["total_batch_tokens"] == 12 * 32 * 2048 and plan["num_steps"] == 83_923
        assert 55 < plan["memory_per_rank_bytes_total"] / 2 ** 30 < 75          # one 80 GB GPU
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, words", [
    (["--preset", "huge"], ["huge", "tiny", "3b"]), (["--stage-layers", "1,1"], ["(1, 1)", "n_layer = 5"]), (["--stage-layers", "a,b"], ["'a,b'", "16,6,5,5"]),
    (["--n-embd", "97"], ["97", "n_head = 3"]), (["--n-kv-head", "2"], ["n_kv_head = 2"]), (["--vocab-size", "40000"], ["40000", "32768"]),
    (["--total-batch-tokens", "1000"], ["1000", "2048"]), (["--device-batch-size", "3"], ["--device-batch-size", "768"]), (["--num-steps", "0"], ["num-steps", "0 must be"]),
    (["--matrix-lr", "-1"], ["matrix-lr", "-1"]), (["--matrix-lr", "nan"], ["matrix-lr", "nan"]), (["--warmup-steps", "399"], ["warmup_steps 399"]),
    (["--data", "no/such/folder"], ["no/such/folder", "manifest.json"]), (["--resume", "no/such/run"], ["no/such/run"]), (["--num-step", "5"], ["--num-step"]),
    (["--objective", "bp", "--stage-layers", "2,3"], ["bp"]), (["--eval-tokens", "99999999"], ["--eval-tokens 99999999"]), (["--seed", "-1"], ["seed", "-1"]), (["--out", ""], ["--out", "an empty path"]),
    (["--sequence-len", "99999", "--total-batch-tokens", "99999", "--device-batch-size", "1"], ["100000"])])
def test_bad_flags_get_one_line_and_write_nothing(argv, words, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    line = refused(train.main, *argv)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_an_output_folder_with_a_run_in_it_is_refused_and_kept(trained, refused):
    before = sorted(trained.rglob("*"))
    assert "already holds a run" in refused(train.main, *SMALL, "--out", trained)
    assert sorted(trained.rglob("*")) == before


def test_shape_flags_beside_resume_are_refused(trained, refused):
    line = refused(train.main, "--resume", trained, "--n-embd", "24", "--preset", "tiny")
    assert "--preset" in line and "--n-embd" in line


@pytest.mark.parametrize("spoil, word", [(lambda p: p.write_bytes(p.read_bytes()[:-2]), "was cut"), (lambda p: p.unlink(), "No such file"),
                                         (lambda p: p.write_bytes(b"x" * 500), "not a token shard")])
def test_a_bad_shard_stops_the_start_and_writes_nothing(spoil, word, data, tmp_path, refused):
    shutil.copytree(data, tmp_path / "data")
    spoil(tmp_path / "data" / "prose-train-00000.bin")
    line = refused(train.main, *SMALL, "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert "prose-train-00000.bin" in line and word in line
    assert not (tmp_path / "run").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [b"", pickle.dumps(Evil())])
def test_foreign_weights_are_refused_and_never_executed(content, trained, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "step-00006"
    shutil.copytree(trained / "step-00006", step)
    (step / "model.pt").write_bytes(content)
    write_manifest(step, verify_checkpoint(trained / "step-00006") | {"model.pt": sha256_of(step / "model.pt")})
    assert "not a file of tensors" in refused(sample.main, step)
    assert not (tmp_path / "executed").exists()


def test_resume_refuses_a_step_directory_an_end_before_its_step_and_a_run_of_damaged_checkpoints(trained, tmp_path, refused):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert f"--resume {run}" in refused(train.main, "--resume", run / "step-00003")
    assert "past the run's end, step 4" in refused(train.main, "--resume", run, "--num-steps", "4", "--warmup-steps", "1")
    for step in ("step-00003", "step-00006"):
        (run / step / "manifest.json").unlink()
    assert "no checkpoint" in refused(train.main, "--resume", run).splitlines()[-1]
    assert (run / "step-00006" / "model.pt").exists()


def test_a_second_process_in_one_run_folder_is_refused(trained, tmp_path, refused):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with lock(run):
        assert "another process" in refused(train.main, "--resume", run)
    train.main(["--resume", str(run)])


def test_a_full_disk_leaves_the_checkpoints_before_it_whole(data, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    command = f"ulimit -f 100; exec {sys.executable} {ROOT / 'train.py'} --resume {run} --num-steps 8 --warmup-steps 2"      # 100 KiB a file
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "step-00008 could not be written" in done.stderr and "--resume" in done.stderr
    verify_checkpoint(run / "step-00006")
    assert checkpoint_steps(run)[-1].name == "step-00006" and not list(run.glob(".tmp*"))


# -- killed at any file operation of a save ------------------------------------------------------------------------

OPERATIONS = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "link"), (torch, "save"), (Path, "write_bytes"), (Path, "write_text"),
              (shutil, "rmtree")]


def killed_at(argv, number):
    """Fork a run of train.main(argv) that kills itself before its `number`-th file operation; return whether it came to that."""
    def child():
        count = [0]

        def counted(operation):
            def call(*args, **kwargs):
                count[0] += 1
                if count[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **kwargs)
            return call
        for owner, name in OPERATIONS:
            setattr(owner, name, counted(getattr(owner, name)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.main(argv)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


MINUTE = [*SMALL, "--n-layer", "1", "--n-embd", "4", "--n-head", "1", "--mlp-hidden", "2", "--stage-layers", "1", "--objective", "bp",
          "--total-batch-tokens", "16", "--device-batch-size", "1", "--eval-tokens", "16", "--save-every", "-1"]      # the loop, and little else


def test_a_run_killed_at_file_operations_ends_bit_identical(data, tmp_path):
    train.main([*MINUTE, "--data", str(data), "--out", str(tmp_path / "parent"), "--num-steps", "3", "--warmup-steps", "1"])
    argv = ["--continue-from", str(tmp_path / "parent" / "step-00003"), "--num-steps", "1", "--warmup-steps", "0"]
    whole, number = tmp_path / "whole", -1
    train.main([*argv, "--out", str(whole)])
    while True:                                                             # the seed is put in place, then a save; every second operation
        run, number = tmp_path / str(number), number + 2
        if not killed_at([*argv, "--out", str(run)], number):
            break
        for path in checkpoint_steps(run):
            verify_checkpoint(path)                                         # whole or absent
        train.main(["--resume", str(run)] if (run / "config.json").exists() else [*argv, "--out", str(run)])
        assert same(weights(run / "step-00004"), weights(whole / "step-00004")), number
        assert [line["losses"] for line in log_lines(run)] == [line["losses"] for line in log_lines(whole)], number
        shutil.rmtree(run)
    assert number > 25, "a seed and a save are that many operations"


# -- phases: the continual run ------------------------------------------------------------------------------------

CONTINUAL = ["--num-steps", "8", "--warmup-steps", "2", "--peak-lrm", "0.5", "--warmdown-ratio", "0.5", "--final-lrm", "0", "--save-every", "4",
             "--weight-decay", "0.1"]


@pytest.fixture(scope="module")
def continued(trained, tmp_path_factory):
    """The run of `trained` re-armed at step 6 with a second phase of eight steps. Read only."""
    out = tmp_path_factory.mktemp("continued") / "run"
    train.main(["--continue-from", str(trained / "step-00006"), "--out", str(out), *CONTINUAL])
    return out


def test_a_continued_run_begins_with_its_seed_and_records_both_phases(trained, continued):
    assert [path.name for path in checkpoint_steps(continued)] == ["step-00006", "step-00008", "step-00012", "step-00014"]
    assert os.stat(continued / "step-00006" / "model.pt").st_ino == os.stat(trained / "step-00006" / "model.pt").st_ino      # a hard link
    rows = json.loads((continued / "config.json").read_text())["phases"]
    assert [(row["anchor_step"], row["anchor_sample"], row["num_steps"], row["peak_lrm"], row["batch"]) for row in rows] == [
        (0, 0, 6, 1.0, 4), (6, 24, 8, 0.5, 4)]
    assert rows == json.loads((continued / "step-00012" / "config.json").read_text())["phases"]
    lrm = [0.25, 0.5, 0.5, 0.5, 0.5, 0.375, 0.25, 0.125]        # rel 0..7: two of warmup, peak to rel 4, then w = 4 down to 0 at rel 8
    assert [line["lrm"] for line in log_lines(continued)] == pytest.approx(lrm)
    assert [line["step"] for line in log_lines(continued)] == list(range(6, 14))
    validations = [line["step"] for line in log_lines(continued, "val")]
    assert validations == [6, 7, 8, 10, 12, 14]                 # rel 0, 1, 2, 4, 8, and the saves at 8, 12, 14
    assert log_lines(continued, "val")[0]["bpb"] == log_lines(trained, "val")[-1]["bpb"]


def test_the_first_step_of_a_phase_is_what_its_parts_say(trained, continued, data):
    """Twin: weights and optimizer state of step 6, samples 24 to 27, the new phase's rate, decay and momentum, one step by hand."""
    record = json.loads((trained / "step-00006" / "config.json").read_text())
    with torch.device("cpu"):
        model = PoE(ModelConfig(**record["model"]), torch.float64).double()
    model.load_state_dict(weights(trained / "step-00006"))
    groups = train.optimizer_groups(model, train.TrainConfig(**{**record["train"], "weight_decay": 0.1}))
    optimizer = MuonAdamW(groups)
    optimizer.load_state_dict(torch.load(trained / "step-00006" / "optim" / "rank-00000.pt", weights_only=True))
    idx, targets = open_data(str(data), 300).train(16, 0).batch(range(24, 28))
    for half in range(2):
        for _ in model.backward_by_stage(idx[2 * half:2 * half + 2], targets[2 * half:2 * half + 2], 1 / 64, last=half == 1):
            pass
    for group in groups:
        group["lr"] *= 0.25                                     # rel 0 of two warmup steps to 0.5
        if group["kind"] == "muon":
            group["momentum"] = 0.85 + 0.12 * 6 / 400           # the ramp goes on: step 6 of the run
    optimizer.step()
    state = json.loads((continued / "step-00008" / "state.json").read_text())
    assert state["sample"] == 32
    step_7 = weights(checkpoint_after(continued, 7, data))
    assert same(dict(model.named_parameters()), step_7)


def checkpoint_after(run, step, data):
    """Weights of a run at a step that it did not save: its seed, trained again and stopped there."""
    record = json.loads((run / "config.json").read_text())
    out = run.parent / f"until-{step}"
    train.main(["--continue-from", str(run / "step-00006"), "--out", str(out), *CONTINUAL, "--save-every", "1"])
    assert record["phases"] == json.loads((out / "config.json").read_text())["phases"]
    return out / f"step-{step:05d}"


def test_a_reset_optimizer_starts_from_zero_state_and_ramps_momentum_again(trained, tmp_path, monkeypatch):
    seen, step = [], MuonAdamW.step
    monkeypatch.setattr(MuonAdamW, "step", lambda self: (
        seen.append((self.groups[0]["momentum"], {s["step"] for s in self.state.values()}, max(s["momentum_buffer"].abs().max().item()
                     for s in self.state.values() if "momentum_buffer" in s))), step(self)))
    argv = ["--continue-from", str(trained / "step-00006"), "--out", str(tmp_path / "reset"), *CONTINUAL, "--reset-optimizer"]
    train.main(argv)
    assert [momentum for momentum, _, _ in seen[:3]] == pytest.approx([0.85, 0.85 + 0.12 / 400, 0.85 + 0.24 / 400])
    assert seen[0][1] == {0} and seen[0][2] == 0
    shutil.copytree(tmp_path / "reset", tmp_path / "again")
    for name in ("step-00008", "step-00012", "step-00014"):
        shutil.rmtree(tmp_path / "again" / name)
    train.main(["--resume", str(tmp_path / "again")])           # from the seed, whose own optimizer state must stay out of it
    assert same(weights(tmp_path / "again" / "step-00014"), weights(tmp_path / "reset" / "step-00014"))
    assert seen[8] == seen[0] and seen[9][0] == seen[1][0]


def test_a_continued_run_may_stop_and_resume_and_be_continued_again(trained, continued, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(continued, run)
    shutil.rmtree(run / "step-00012")
    shutil.rmtree(run / "step-00014")
    train.main(["--resume", str(run)])
    assert same(weights(run / "step-00014"), weights(continued / "step-00014"))
    train.main(["--continue-from", str(run / "step-00014"), "--out", str(tmp_path / "third"), "--num-steps", "4"])
    rows = json.loads((tmp_path / "third" / "config.json").read_text())["phases"]
    assert [(row["anchor_step"], row["anchor_sample"]) for row in rows] == [(0, 0), (6, 24), (14, 56)]
    assert json.loads((tmp_path / "third" / "step-00018" / "state.json").read_text())["sample"] == 72


def test_other_data_is_read_from_its_beginning_and_both_validation_slices_are_reported(trained, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["sources"][0]["weight"] = 20
    (other / "manifest.json").write_text(json.dumps(manifest))
    seen, batch = [], Mix.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mix, "batch", lambda self, indices: (seen.append((int(indices[0]), self.seed)), batch(self, indices))[1])
        train.main(["--continue-from", str(trained / "step-00006"), "--out", str(tmp_path / "b"), *CONTINUAL, "--data", str(other)])
    assert min(i for i, seed in seen if seed == 0) == 0
    new, old = log_lines(tmp_path / "b", "val"), log_lines(tmp_path / "b", "val_old")
    assert [line["step"] for line in new] == [line["step"] for line in old] and new[0]["mix"] == str(other) and old[0]["mix"] == str(data)
    assert old[0]["bpb"] == log_lines(trained, "val")[-1]["bpb"] != new[0]["bpb"]
    train.main(["--continue-from", str(tmp_path / "b" / "step-00014"), "--out", str(tmp_path / "c"), *CONTINUAL, "--data", str(data)])
    rows = json.loads((tmp_path / "c" / "config.json").read_text())["phases"]
    assert train.samples_of_earlier_phases(rows) == 24                      # back on the first data: where its stream was left


def test_the_cards_two_phases_through_the_loop_log_its_rates(data, tmp_path):
    """A step for 200 of the card's. SPEC 4: lrm 0.5 at 86,000, 0.478 at 108,000, 0.442 at 110,000, 0 at 134,723; 0.05 at 83,923."""
    argv = [*MINUTE, "--data", str(data)]
    train.main([*argv, "--out", str(tmp_path / "a"), "--num-steps", "420", "--warmup-steps", "5", "--warmdown-ratio", "0.65", "--final-lrm", "0.05"])
    train.main(["--continue-from", str(tmp_path / "a" / "step-00420"), "--out", str(tmp_path / "b"), "--num-steps", "254", "--warmup-steps", "5",
                "--peak-lrm", "0.5", "--warmdown-ratio", "0.55", "--final-lrm", "0.0"])
    first, second = ({line["step"]: line["lrm"] for line in log_lines(tmp_path / run)} for run in "ab")
    assert first[5] == first[420 - 273] == 1.0 > first[420 - 272]           # w = round(0.65 x 420) = 273, the last step at peak N - w
    assert first[419] == pytest.approx(0.05 + 0.95 / 273)

    def at(rel):                                                            # a step of the card, between two of these
        below = math.floor(rel / 200)
        return second[420 + below] + (rel / 200 - below) * (second[420 + below + 1] - second[420 + below])
    assert second[420 + 4] == at(2077) == second[420 + 114] == 0.5 > second[420 + 115]
    assert at(24_077) == pytest.approx(0.478, abs=1.5e-3) and at(26_077) == pytest.approx(0.442, abs=1.5e-3)      # w is a whole number
    assert second[420 + 253] == pytest.approx(0.5 / 140)
    assert max(second) == 673 and checkpoint_steps(tmp_path / "b")[-1].name == "step-00674"


def test_only_the_newest_saves_and_the_ends_of_phases_keep_their_optimizer_state(continued, data, tmp_path):
    run = tmp_path / "run"
    train.main(["--continue-from", str(continued / "step-00014"), "--out", str(run), *CONTINUAL, "--save-every", "1", "--keep-optim", "1"])
    kept = [path.name for path in checkpoint_steps(run) if (path / "optim").exists()]
    assert kept == ["step-00014", "step-00022"] and len(checkpoint_steps(run)) == 9
    for path in checkpoint_steps(run):
        verify_checkpoint(path)
        load_checkpoint(path)
    assert (continued / "step-00014" / "optim" / "rank-00000.pt").exists()


@pytest.mark.parametrize("argv, message", [
    (["--continue-from", "{run}"], "is not a checkpoint; give a RUN/step-XXXXX"),
    (["--continue-from", "{run}/step-00006", "--out", "{run}"], "already holds a run"),
    (["--continue-from", "{run}/step-00006", "--n-layer", "4"], "--n-layer cannot be given with --continue-from"),
    (["--continue-from", "{run}/step-00006", "--preset", "tiny"], "--preset cannot be given with --continue-from"),
    (["--continue-from", "{run}/step-00006", "--resume", "{run}"], "give one of them"),
    (["--reset-optimizer", "--out", "{run}x"], "--reset-optimizer needs --continue-from"),
    (["--continue-from", "{run}/step-00006", "--total-batch-tokens", "80", "--device-batch-size", "2"], "is not a multiple of --device-batch-size"),
])
def test_a_wrong_continuation_is_refused_and_writes_nothing(argv, message, trained, tmp_path, refused):
    argv = [a.format(run=trained) for a in argv]
    if "--out" not in argv and "--resume" not in argv:
        argv += ["--out", str(tmp_path / "b")]
    before = sorted(str(p) for p in trained.rglob("*"))
    assert message.format(run=trained) in refused(train.main, *argv)
    assert not (tmp_path / "b" / "config.json").exists() and sorted(str(p) for p in trained.rglob("*")) == before


def test_a_checkpoint_that_is_damaged_pruned_or_of_another_tokenizer_is_not_continued(trained, data, tmp_path, refused, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    argv = ["--continue-from", str(run / "step-00006"), "--out", str(tmp_path / "b"), *CONTINUAL]
    (run / "step-00006" / "optim" / "rank-00000.pt").rename(tmp_path / "kept.pt")
    assert "rank-00000.pt" in refused(train.main, *argv)
    write_manifest(run / "step-00006", {name: sha256 for name, sha256 in verify_checkpoint(trained / "step-00006").items()
                                        if not name.startswith("optim/")})
    assert "holds no optimizer state (see --keep-optim): choose another checkpoint, or --reset-optimizer" in refused(train.main, *argv)
    train.main([*argv, "--reset-optimizer"])
    tokenizer = (data / "tokenizer.txt").read_text().splitlines()
    tokenizer[-1] = tokenizer[-1].replace(tokenizer[-1].split()[0], "enp6cXo=")       # another last merge
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "tokenizer.txt").write_text("\n".join(tokenizer) + "\n")
    sha256 = Tokenizer.load(other).sha256
    for shard in other.glob("*.bin"):
        content = bytearray(shard.read_bytes())
        content[32:96] = sha256.encode()
        shard.write_bytes(content)
    line = refused(train.main, "--continue-from", trained / "step-00006", "--out", tmp_path / "d", *CONTINUAL, "--data", other)
    assert "was tokenised with another tokenizer than" in line and not (tmp_path / "d" / "config.json").exists()


def test_continuing_an_unfinished_phase_is_allowed(trained, tmp_path):
    shutil.copytree(trained / "step-00003", tmp_path / "seed")             # under any name
    train.main(["--continue-from", str(tmp_path / "seed"), "--out", str(tmp_path / "b"), *CONTINUAL])
    assert [path.name for path in checkpoint_steps(tmp_path / "b")] == ["step-00003", "step-00004", "step-00008", "step-00011"]


def test_data_that_was_made_anew_in_its_place_is_taken_on_purpose_alone(data, tmp_path, capsys, refused):
    mine = tmp_path / "mine"
    shutil.copytree(data, mine)
    train.main([*SMALL, "--data", str(mine), "--out", str(tmp_path / "a")])
    manifest = json.loads((mine / "manifest.json").read_text())
    manifest["sources"][0]["weight"] = 20
    (mine / "manifest.json").write_text(json.dumps(manifest))
    argv = ["--continue-from", str(tmp_path / "a" / "step-00006"), "--out", str(tmp_path / "b"), *CONTINUAL]
    assert "is not the data that was trained on" in refused(train.main, *argv)
    train.main([*argv, "--data", str(mine)])
    assert f"the validation slice of the earlier data is left out: {mine} is not the data that it was" in capsys.readouterr().out
    assert log_lines(tmp_path / "b", "val") and not log_lines(tmp_path / "b", "val_old")


def test_resuming_on_other_data_is_refused(trained, data, tmp_path, refused):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run)
    shutil.copytree(data, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["sources"][0]["weight"] = 20
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert "is not the data that" in refused(train.main, "--resume", run, "--data", other)


def test_the_same_command_goes_on_when_torchrun_restarts_it(trained, data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "step-00006")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main([*SMALL, "--data", str(data), "--out", str(run)])
    assert "resuming" in capsys.readouterr().out and same(weights(run / "step-00006"), weights(trained / "step-00006"))


def test_a_restart_does_not_take_up_a_run_that_the_same_command_was_refused(trained, data, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    for other in (["--seed", "7"], ["--eval-tokens", "304"]):
        assert "already holds a run" in refused(train.main, *SMALL, "--data", data, "--out", trained, *other)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    record = json.loads((run / "config.json").read_text())
    record["train"]["keep_optim"] = 5                           # what the command does not name must agree too
    (run / "config.json").write_text(json.dumps(record))
    assert "already holds a run" in refused(train.main, *SMALL, "--data", data, "--out", run)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_damaged_checkpoints_beyond_the_resumed_one_do_not_cost_new_ones_their_optimizer_state(data, tmp_path, capsys):
    run = tmp_path / "run"
    train.main([*SMALL, "--data", str(data), "--out", str(run), "--num-steps", "12", "--save-every", "2", "--keep-optim", "-1"])
    for step in (8, 10, 12):
        with open(run / f"step-{step:05d}" / "model.pt", "ab") as f:
            f.write(b"x")
    step, n = train.MuonAdamW.step, []

    def interrupted(self):
        step(self)
        n.append(os.kill(os.getpid(), signal.SIGTERM) if len(n) == 2 else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.MuonAdamW, "step", interrupted)
        before = signal.getsignal(signal.SIGTERM)
        train.main(["--resume", str(run), "--keep-optim", "2"])
        signal.signal(signal.SIGTERM, before)
    out = capsys.readouterr().out
    assert f"resuming {run / 'step-00006'}" in out and f"saved {run / 'step-00008'}" in out and "stopped at step 10" in out
    assert (run / "step-00008" / "optim").is_dir() and (run / "step-00010" / "optim").is_dir()
    train.main(["--resume", str(run)])
    assert f"resuming {run / 'step-00010'}" in capsys.readouterr().out


def test_an_older_damaged_manifest_does_not_stop_later_saves(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for damage in ("{", "{}"):
        (run / "step-00003" / "manifest.json").write_text(damage)
        last = int(checkpoint_steps(run)[-1].name[5:]) + 3
        train.main(["--resume", str(run), "--num-steps", str(last), "--save-every", "1"])
        assert checkpoint_steps(run)[-1].name == f"step-{last:05d}" and (run / "step-00003" / "optim").exists()


def test_a_run_whose_folder_is_gone_ends_instead_of_going_on_in_a_part_of_it(data, tmp_path, monkeypatch, refused):
    step = MuonAdamW.step
    monkeypatch.setattr(MuonAdamW, "step", lambda self: (step(self), shutil.rmtree(tmp_path / "run", ignore_errors=True)))
    assert "step-00003 could not be written" in refused(train.main, *SMALL, "--data", data, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_seed_of_symbolic_links_is_placed_as_files_and_a_stray_optimizer_file_is_not_read(trained, tmp_path):
    parent = tmp_path / "snapshot" / "step-00006"
    shutil.copytree(trained / "step-00006", parent)
    (parent / "model.pt").rename(tmp_path / "blob")
    (parent / "model.pt").symlink_to("../../blob")
    shutil.copy(trained / "step-00003" / "optim" / "rank-00000.pt", parent / "optim" / "rank-00001.pt")          # the manifest does not name it
    for name, seed in (("a", trained / "step-00006"), ("b", parent)):
        train.main(["--continue-from", str(seed), "--out", str(tmp_path / name), *CONTINUAL])
    assert not (tmp_path / "b" / "step-00006" / "model.pt").is_symlink()
    assert same(weights(tmp_path / "a" / "step-00014"), weights(tmp_path / "b" / "step-00014"))
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.copy(run / "step-00006" / "optim" / "rank-00000.pt", run / "step-00003" / "optim" / "rank-00001.pt")
    shutil.rmtree(run / "step-00006")
    train.main(["--resume", str(run)])
    assert same(weights(run / "step-00006"), weights(trained / "step-00006"))


def test_a_run_that_is_told_to_stop_saves_before_it_validates(data, trained, tmp_path, monkeypatch):
    step, n = MuonAdamW.step, []

    def interrupted(self):
        step(self)
        n.append(os.kill(os.getpid(), signal.SIGTERM) if len(n) == 0 else None)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(MuonAdamW, "step", interrupted)
        train.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--eval-every", "1"])
    signal.signal(signal.SIGTERM, before)
    stopped = int(checkpoint_steps(tmp_path / "run")[-1].name[5:])
    assert stopped == 2 and [line["step"] for line in log_lines(tmp_path / "run", "val")] == [1]
    train.main(["--resume", str(tmp_path / "run")])
    assert [line["step"] for line in log_lines(tmp_path / "run", "val")] == [1, 2, 3, 4, 5, 6]
    assert same(weights(tmp_path / "run" / "step-00006"), weights(trained / "step-00006"))


def test_the_commit_is_of_this_code_alone_and_needs_no_git(tmp_path, monkeypatch):
    # a copy of the code inside another repository
    (tmp_path / "copy").mkdir()
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "copy" / "train.py"))
    assert train.git_commit() == "unknown"
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    assert len(train.git_commit()) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train.git_commit() == "unknown"


def test_everything_that_a_resume_reads_is_on_the_disk_before_it_gets_its_name(data, trained, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.add(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor))[1])
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("another file system")))
    train.main(["--continue-from", str(trained / "step-00006"), "--out", str(tmp_path / "b"), *CONTINUAL])
    names = {str(Path(path).relative_to(tmp_path / "b")) for path in synced if path.startswith(str(tmp_path / "b"))}
    seed = {".tmp-step-00006" + tail for tail in ("", "/optim", "/model.pt", "/optim/rank-00000.pt", "/config.json", "/state.json", "/manifest.json")}
    new = {".tmp-step-00014" + tail for tail in ("", "/optim", "/model.pt", "/optim/rank-00000.pt", "/config.json", "/state.json", "/manifest.json.tmp")}
    assert names >= seed | new | {".", "config.json.tmp", "log.jsonl"}, sorted((seed | new) - names)
    assert same(weights(tmp_path / "b" / "step-00006"), weights(trained / "step-00006"))


def test_a_refused_resume_leaves_the_recorded_config_as_it_was(trained, tmp_path, refused):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = (run / "config.json").read_bytes(), (run / "log.jsonl").read_bytes()
    assert "is past the run's end, step 4; raise --num-steps" in refused(train.main, "--resume", run, "--num-steps", "4", "--warmup-steps", "1")
    assert ((run / "config.json").read_bytes(), (run / "log.jsonl").read_bytes()) == before
