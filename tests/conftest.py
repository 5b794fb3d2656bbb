"""
What the tests share: one torch thread (small tensors gain nothing from more), a small corpus, a trained run,
and how a run is started, read and refused.
"""
import contextlib
import json
import os
import random
import shutil
import socket
import traceback
from pathlib import Path

import pytest
import torch

import common
import train
from checkpoint import read_json, resolve_checkpoint, write_json
from dataloader import Tokenizer, write_shard
from muon import MuonAdamW

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
# of the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"

SMALL = """--n-layer 4 --n-embd 12 --n-head 3 --n-kv-head 1 --mlp-hidden 20 --stage-layers 2,1,1
           --sequence-len 16 --vocab-size 300 --total-batch-tokens 64 --device-batch-size 2 --dtype float64
           --device cpu --warmup-steps 2 --eval-tokens 320 --num-steps 6 --save-every 3""".split()


def table(text):
    """The rows of a table: a line each, its cells parted by bars."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def train_run(*argv):
    """train.py in this process."""
    train.main([str(a) for a in argv])


def small_run(data, out, *argv):
    """Train SMALL on `data` in the folder `out`."""
    train_run(*SMALL, "--data", data, "--out", out, *argv)


def weights(path):
    """Those of a checkpoint, or of the newest one of a run."""
    return torch.load(resolve_checkpoint(path) / "model.pt", weights_only=True)


def same(a, b):
    """Whether two {name: tensor} hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_end(run, other):
    """Whether two runs ended with the same weights, to the bit."""
    return same(weights(run), weights(other))


def log_lines(run, kind="step"):
    return [line for line in map(json.loads, (run / "log.jsonl").open()) if line["kind"] == kind]


def before_steps(patch, hook):
    """Call hook(optimizer) before every optimizer step. patch: pytest's MonkeyPatch."""
    step = MuonAdamW.step
    patch.setattr(MuonAdamW, "step", lambda self: (hook(self), step(self)))


def at_step(patch, step, action):
    """Call action() before the optimizer's step of this number."""
    before_steps(patch, lambda optimizer: next(iter(optimizer.state.values()))["step"] == step and action())


def signal_at_step(patch, step, *signals):
    """Send this process signals before the optimizer's step of this number."""
    at_step(patch, step, lambda: [os.kill(os.getpid(), number) for number in signals])


def change_json(path, **changes):
    """Change the values of some keys of a JSON file."""
    write_json(path, read_json(path) | changes)


def reweigh(folder, weight=20):
    """Make the mixture of a data folder another one."""
    sources = read_json(folder / "manifest.json")["sources"]
    sources[0]["weight"] = weight
    change_json(folder / "manifest.json", sources=sources)


def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def closed_stdout():
    """Within it standard output is a pipe without a reader, as of `train.py | tee log` after Ctrl-C."""
    ours, theirs = os.pipe()
    os.close(ours)
    return contextlib.redirect_stdout(os.fdopen(theirs, "w"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of token shards: two sources of random words, 300 ids."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = Tokenizer.load(vocab_size=300)
    draw = random.Random(0)
    words = ["the", "of", "naïve", "stage", "expert", "in", "a\n", "is", "12", "x = y"]
    sources = []
    for name, weight in (("prose", 70), ("code", 30)):
        row = {"name": name, "weight": weight}
        for split, documents in (("train", 40), ("val", 12)):
            texts = [" ".join(draw.choices(words, k=40)) for _ in range(documents)]
            tokens = tokenizer.encode_documents(texts)
            file = f"{name}-{split}-00000.bin"
            write_shard(folder / file, tokens, documents, tokenizer)
            row[split] = [{"file": file, "tokens": len(tokens)}]
        sources.append(row)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    write_json(folder / "manifest.json", {"format": 1, "sources": sources})
    return folder


@pytest.fixture
def other_data(data, tmp_path):
    """A copy of `data` in other proportions."""
    shutil.copytree(data, tmp_path / "other")
    reweigh(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A run of six steps with step-00003 and step-00006, float64. Read only: take `run` to change it."""
    out = tmp_path_factory.mktemp("runs") / "small"
    small_run(data, out)
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of `trained`."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def refused(capsys):
    """Call a script's main as the shell would; assert code 2 and one line on stderr; return that line."""
    def call(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            common.run(lambda: main([str(a) for a in argv]))
        error = stopped.value
        code = error.code
        lines = capsys.readouterr().err.splitlines()
        # the end of a process would close the run's lock; here the frames of the exceptions hold it
        while error:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        assert code == 2 and len(lines) == 1, lines
        return lines[0]
    return call
