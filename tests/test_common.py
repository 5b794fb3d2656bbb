"""
common.py: what every script does with empty paths, missing ranks and progress.

Run: python -m pytest tests/test_common.py
"""
import dataclasses
import time

import pytest
import torch

import bench
import common
import evaluate
import report
import sample
import train
from data import prepare

# every flag of every script that names a file or folder
PATHS = "data out resume continue_from prompt_file losses mix raw tokenizer".split()
COMMANDS = [(train, train.TrainConfig, []), (evaluate, evaluate.EvalConfig, ["run"]),
            (sample, sample.SampleConfig, ["run"]), (report, report.Flags, ["run"]),
            (prepare, prepare.DownloadFlags, ["download"]), (prepare, prepare.TokenizeFlags, ["tokenize"]),
            (prepare, prepare.TokenizerFlags, ["tokenizer"]), (prepare, prepare.InspectFlags, ["inspect"])]


@pytest.mark.parametrize("script, argv", [
    (script, [*argv, common.spelled(field.name), ""]) for script, flags, argv in COMMANDS
    for field in dataclasses.fields(flags) if field.name in PATHS
] + [(evaluate, [""]), (sample, [""]), (report, [""]), (bench, ["decode", ""])])
def test_an_empty_path_is_refused_and_no_default(script, argv, refused):
    assert "empty path" in refused(script.main, *argv)


def test_a_rank_that_waits_for_others_says_so(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(common, "PATIENCE", 0.01)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: time.sleep(0.2))
    monkeypatch.setattr(common.Ranks, "gather", lambda self, value: [value])
    common.Ranks()
    assert "WORLD_SIZE=2" in capfd.readouterr().err


def test_progress_prints_every_ten_seconds_and_its_eta(monkeypatch, capsys):
    clock = iter([0, 4, 12, 13])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = common.Progress()
    for done in range(1, 5):
        progress("pass", done, 4)
    # 3 of 4 after 12 s
    assert capsys.readouterr().err == "pass 3 of 4 eta:4s  \n"
