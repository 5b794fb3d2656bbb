"""
train.py: exact resume, accumulation, checkpoints that are whole or absent, and bad input, through the real main() at a small scale.

Run: python -m pytest tests/test_train.py
"""
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import sample
import train
from conftest import ROOT, SMALL
from model import PRESETS, PoE, checkpoint_steps, load_checkpoint, verify_checkpoint
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
    assert "skipping" in out and "step-00006/model.pt does not match" in out and "resuming" in out and "step-00003" in out
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


def test_interrupting_leaves_a_usable_checkpoint_and_exits_cleanly(data, trained, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *SMALL, "--data", data, "--out", run, "--num-steps", "100000"],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("step:"):
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and f"--resume {run}" in out
    newest = checkpoint_steps(run)[-1]
    verify_checkpoint(newest)
    assert int(newest.name[5:]) >= 1 and str(int(newest.name[5:])) in out
    train.main(["--resume", str(run), "--num-steps", str(int(newest.name[5:]) + 2), "--warmup-steps", "1"])
    assert checkpoint_steps(run)[-1].name == f"step-{int(newest.name[5:]) + 2:05d}"


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
    with pytest.raises(ValueError, match="config.json does not match"):
        verify_checkpoint(step)


@pytest.mark.parametrize("name", ["model.pt", "tokenizer.txt", "manifest.json"])
def test_a_checkpoint_without_one_of_its_files_is_refused(name, trained, tmp_path):
    shutil.copytree(trained / "step-00006", tmp_path / "step-00006")
    (tmp_path / "step-00006" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_checkpoint(tmp_path / "step-00006")


def test_weights_of_another_shape_are_named(trained, tmp_path):
    record = json.loads((trained / "step-00006" / "config.json").read_text())
    record["model"]["mlp_hidden"] = 24
    with pytest.raises(ValueError, match=r"blocks.0.mlp.c_fc.weight: the config says \(24, 12\), model.pt has \(20, 12\)"):
        PoE.from_record(record, weights(trained / "step-00006"))


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
    (["--total-batch-tokens", "1000"], ["1000", "256"]), (["--device-batch-size", "3"], ["3", "8 sequences"]), (["--num-steps", "0"], ["num-steps 0"]),
    (["--matrix-lr", "-1"], ["matrix-lr -1"]), (["--matrix-lr", "nan"], ["matrix-lr nan"]), (["--warmup-steps", "399"], ["warmup_steps 399"]),
    (["--data", "no/such/folder"], ["no/such/folder", "manifest.json"]), (["--resume", "no/such/run"], ["no/such/run"]), (["--num-step", "5"], ["--num-step"]),
    (["--objective", "bp", "--stage-layers", "2,3"], ["bp"]), (["--eval-tokens", "99999999"], ["99,999,999"]), (["--seed", "-1"], ["seed -1"]),
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


@pytest.mark.parametrize("spoil, word", [(lambda p: p.write_bytes(p.read_bytes()[:-2]), "was cut"), (lambda p: p.unlink(), "is missing"),
                                         (lambda p: p.write_bytes(b"x" * 500), "not a token shard")])
def test_a_bad_shard_stops_the_start_and_writes_nothing(spoil, word, data, tmp_path, refused):
    shutil.copytree(data, tmp_path / "data")
    spoil(tmp_path / "data" / "prose-train-00000.bin")
    line = refused(train.main, *SMALL, "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert "prose-train-00000.bin" in line and word in line
    assert not (tmp_path / "run").exists()


def remanifest(step):
    """Make the manifest agree with damaged files: what a careless copy or an attacker would leave."""
    manifest = json.loads((step / "manifest.json").read_text())
    (step / "manifest.json").write_text(json.dumps({**manifest, "files": {name: train.sha256_of(step / name) for name in manifest["files"]}}))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name, content, word", [
    ("model.pt", b"", "not a file of tensors"), ("model.pt", pickle.dumps(Evil()), "not a file of tensors"), ("config.json", b'{"model": null}', "needs 'model'"),
    ("config.json", b'{"model": {"n_layer": 3}}', "needs 'model'"), ("tokenizer.txt", b"IQ== 0\n", "byte-level BPE")])
def test_a_foreign_file_in_a_checkpoint_is_named_and_never_executed(name, content, word, trained, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "step-00006"
    shutil.copytree(trained / "step-00006", step)
    (step / name).write_bytes(content)
    remanifest(step)
    assert word in refused(sample.main, step)
    assert not (tmp_path / "executed").exists()


def test_resume_refuses_a_step_directory_an_end_before_its_step_and_a_run_of_damaged_checkpoints(trained, tmp_path, refused):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert f"--resume {run}" in refused(train.main, "--resume", run / "step-00003")
    assert "past the run's end, step 4" in refused(train.main, "--resume", run, "--num-steps", "4", "--warmup-steps", "1")
    for step in ("step-00003", "step-00006"):
        (run / step / "manifest.json").unlink()
    assert "no checkpoint" in refused(train.main, "--resume", run)
    assert (run / "step-00006" / "model.pt").exists()


def test_a_config_that_is_not_a_run_s_is_named(tmp_path, refused):
    for content in ("[1]", '{"train": {"nonsense": 1}}', '{"train": null}', "{"):
        (tmp_path / "config.json").write_text(content)
        assert "config.json" in refused(train.main, "--resume", tmp_path)


def test_a_second_process_in_one_run_folder_is_refused(trained, tmp_path, refused):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with train.lock(run):
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
