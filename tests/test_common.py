"""
common.py: what every script does with empty paths, missing ranks and progress.

Run: python -m pytest tests/test_common.py
"""
import dataclasses
import time

import torch

import bench
import common
import evaluate
import publish
import report
import sample
import tasks
import train
from data import prepare

# every flag of every script that names a file or folder
PATHS = "data out resume continue_from prompt_file losses mix raw tokenizer requests picture".split()
FLAGS = [train.TrainConfig, evaluate.EvalConfig, sample.SampleConfig, report.Flags, publish.Flags,
         tasks.Flags, *(cls for _, cls, _ in prepare.COMMANDS.values())]


def test_an_empty_path_is_refused_and_no_default(refused):
    for field in sum(map(dataclasses.fields, FLAGS), ()):
        assert field.metadata.get("path", False) == (field.name in PATHS), field
    for script, *argv in ((train, "--resume="), (evaluate, ""), (sample, ""), (bench, "decode", "")):
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
