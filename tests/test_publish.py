"""
publish.py and modeling_poe.py, against the checkpoints that they came from: outputs, texts, ids, metrics.

transformers and lm-eval run in a process of their own that does not find this project, see use_published.py.
Run: python -m pytest tests/test_publish.py
"""
import contextlib
import csv
import getpass
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import evaluate
import publish
import train
from checkpoint import BOUNDS_KEY, load_checkpoint, read_json, write_json
from common import sha256_of
from conftest import ROOT, SMALL
from dataloader import Tokenizer
from model import PoE, combine
from sample import complete, make_plan

pytest.importorskip("lm_eval")
STEP = "step-00006"
PROMPT = "The capital of France is"
# of which WAND leaves after every stage
BOUNDS = [0.5, 0.2]
# what a conversion of a tokenizer gets wrong first
TEXTS = ["I'll, WE'RE don't", "1234567 3.14", "你好，世界", "👩‍👩‍👧 🎉", "def f(x):\n\n\n\treturn  x",
         "a       b  \n  ", "<|bos|>", ""]


def spoken(main, *argv):
    """What a script printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(a) for a in argv])
    return printed.getvalue()


def measure(path, data):
    spoken(evaluate.main, path, *"--device cpu --split-tokens 640 --no-samples --data".split(), data)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Two runs of large weights; the first's last step was measured, and given bounds of its own."""
    def draw(model, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data.normal_(std=0.5)

    folder = tmp_path_factory.mktemp("secretplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoE, "init_weights", draw)
        for seed in (0, 1):
            spoken(train.main, *SMALL, *"--sequence-len 64 --total-batch-tokens 128 --dtype float32".split(),
                   "--peak-lrm", 0.01, "--seed", seed, "--data", data, "--out", folder / str(seed))
    measure(folder / "0" / STEP, data)
    config = folder / "0" / STEP / "config.json"
    write_json(config, read_json(config) | {BOUNDS_KEY: BOUNDS})
    return folder


@pytest.fixture(scope="module")
def published(runs, tmp_path_factory):
    """Both runs as folders, float32; the second was not measured."""
    out = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        for name, shard in (("0", publish.SHARD), ("1", "10KB")):
            patch.setattr(publish, "SHARD", shard)
            spoken(publish.main, runs / name, "--out", out / name, "--folders", "--dtype", "float32")
    return out


@pytest.fixture(scope="module")
def found(published, tmp_path_factory):
    """What a stranger finds, and the texts that were encoded: those above and the embedded sample."""
    texts = TEXTS + [json.loads(line)["text"] for path in (ROOT / "data/sample").glob("*.xz")
                     for line in lzma.open(path, "rt", encoding="utf-8")]
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "texts").write_text(json.dumps(texts))
    script = Path(__file__).with_name("use_published.py")
    # -P: without the script's own folder on the path
    command = [sys.executable, "-P", script, published / "0" / STEP, published / "1" / STEP, "texts", "out"]
    offline = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder, check=True, env=os.environ | offline)
    return torch.load(folder / "out") | {"texts": texts}


@pytest.fixture(scope="module")
def ours(runs):
    return load_checkpoint(runs / "0" / STEP)[0], Tokenizer.load(runs / "0" / STEP)


def greedy(ours, mode, prompt=PROMPT, **options):
    """The first 24 tokens of sample.py."""
    return next(complete(*ours, [prompt], 24, make_plan(ours[0].config, mode, **options)))


def new(text):
    """Those of a row that begins with the prompt, of 17 tokens."""
    return text[0, 17:41].tolist()


def test_a_stranger_gets_the_models_outputs(found, ours, runs):
    model, tokenizer = ours
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    s0, s1, s2 = [model.log_probs(k, x) for k, x in enumerate(model.boundaries(ids))]
    full = combine(s0 + s1 + s2, 3)
    other = load_checkpoint(runs / "1" / STEP)[0](ids)
    half = load_checkpoint(runs / "0" / STEP, dtype=torch.bfloat16)[0](ids)
    expected = [full, s0, s2, combine(s0 + s1, 2), combine(s0 + s1 + s2, 3, 0.5), other, half]
    errors = [(a - b).abs().max().item() for a, b in zip(found["logits"], expected)]
    # in bfloat16 heads are rounded before they are summed
    assert max(errors[:-1]) < 1e-5 and errors[-1] < 0.2, errors
    assert found["loss"].item() == pytest.approx(-full[0, :-1].gather(1, ids[0, 1:, None]).mean().item())


def test_a_stranger_gets_the_texts_of_sample_py(found, ours):
    plain = greedy(ours, "full")["token_ids"]
    assert all(new(text) == plain for text in found["plain"])
    # as if the fifth new token ended documents
    assert [new(text) for text in found["ended"]] == 2 * [plain[:plain.index(plain[4]) + 1]]
    assert found["bos alone"][0, 1:].tolist() == greedy(ours, "full", prompt="")["token_ids"][:5]
    wand = greedy(ours, "wand", bounds=BOUNDS)
    assert new(found["wand"]) == wand["token_ids"] and set(wand["depths"]) == {1, 2, 3}
    assert new(found["prefix"]) == greedy(ours, "prefix", prefix=2)["token_ids"] != plain
    # whatever is drafted
    assert all(torch.equal(text, found["half"][0]) for text in found["half"])
    assert torch.equal(found["batch"], torch.stack(found["each"]))


def test_ids_are_the_tokenizers(found, ours):
    # every text begins with bos
    assert torch.equal(found["ids"], torch.from_numpy(ours[1].encode_documents(found["texts"])).long())


def test_lm_eval_finds_the_models_log_likelihoods(found, ours):
    model, tokenizer = ours
    for value, choice in zip(found["lm_eval"], ("Paris", "a naïve town")):
        ids = torch.tensor(tokenizer.encode(f"{PROMPT} {choice}"))
        each = model(ids[None])[0, :-1].gather(1, ids[1:, None])
        assert value == pytest.approx(each[16:].sum().item(), abs=1e-4)


def test_saving_again_gives_equal_files(found, published):
    for name in ("model.safetensors", "config.json", "modeling_poe.py", "model.py", "tokenizer.json"):
        before, after = (published / "0" / STEP / name).read_text("latin1"), found["again"][name]
        if name == "config.json":
            before, after = (json.loads(text) | {"transformers_version": None} for text in (before, after))
        assert before == after, name


def test_what_was_published_comes_back_by_import(runs, published, data, tmp_path):
    spoken(publish.main, "--import", published / "0/main", "--out", tmp_path / "again" / STEP)
    assert read_json(tmp_path / "again" / STEP / "config.json")[BOUNDS_KEY] == BOUNDS
    measure(tmp_path / "again" / STEP, data)
    before, after = (read_json(run / STEP / "metrics.json") for run in (runs / "0", tmp_path / "again"))
    # the log stays behind
    assert before | {"train_log_bpb": None} == after
    # in bfloat16, with names mapped
    spoken(publish.main, runs / "0", "--out", tmp_path / "p", "--folders")
    spoken(publish.main, "--import", tmp_path / "p/main", "--out", tmp_path / "half" / STEP, "--rename",
           '{"model": "x", "^x.": ""}')
    before = torch.load(runs / "0" / STEP / "model.pt")
    for name, tensor in torch.load(tmp_path / "half" / STEP / "model.pt").items():
        # half a unit of 8 bits; scalars are kept whole
        limit = 2 ** -8 if tensor.dim() else 0
        assert ((tensor - before[name]).abs() <= limit * before[name].abs()).all(), name


@pytest.mark.parametrize("argv, word", [
    (["--import", "published/main", "--out", "new/step-00007"], STEP),
    (["--import", "published/main", "--out", f"new/{STEP}", "--rename", '{"wte": "embedding"}'], "wte"),
    (["run", "--out", "run"], "something else"),
    (["other", "--out", "published", "--folders"], "something else"),
    (["--import", "published/main"], STEP)])
def test_bad_input_gets_one_line_and_writes_nothing(
        argv, word, runs, published, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in {"run": runs / "0", "other": runs / "1", "published": published / "0"}.items():
        Path(name).symlink_to(path)
    assert word in refused(publish.main, *argv) and not Path("new").exists()


def test_git_branches_change_only_with_their_checkpoints(runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs / "0", tmp_path / "run")
    later = (run / STEP).rename(tmp_path / "later")
    out = tmp_path / "repository"
    commits = []
    monkeypatch.setenv("GIT_AUTHOR_NAME", "somebody")
    for _ in range(3):
        assert "push --force --all" in spoken(publish.main, run, "--out", out, "--license", "mit")
        text = publish.git(out, "for-each-ref", "--format=%(refname:short) %(objectname)")
        commits.append(dict(line.split() for line in text.splitlines()))
        if later.exists():
            later.rename(run / STEP)
            # interrupted, or another branch checked out
            (out / "trajectory.csv").unlink()
    first, second, third = commits
    assert first.keys() == {"step-00003", "main"} and second.keys() == {"step-00003", STEP, "main"}
    assert first["step-00003"] == second["step-00003"] and first["main"] != second["main"] and second == third
    # main is checked out: the newest, and an index of all
    line = list(csv.DictReader((out / "trajectory.csv").open()))[1]
    bpb = read_json(out / "metrics.json")["bpb"]
    assert line["branch"] == STEP and line["weights_sha256"] == sha256_of(out / "model.safetensors")
    assert line["checkpoint_sha256"] == sha256_of(run / STEP / "model.pt")
    assert [float(line[name]) for name in ("bpb_full", "bpb_s2")] == [bpb["full"], bpb["single"][2]]
    assert publish.git(out, "log", "--all", "--format=%an%ae%cn%ce").split() == 4 * ["publish.pypublish.py"]
    assert "license: mit\npipeline_tag: text-generation\n" in (out / "README.md").read_text()
    assert [line[name] for name in ("tokens_seen", "phase", "rel_it", "lrm")] == ["768", "1", "6", "0.05"]


def test_nothing_of_this_machine_is_published_and_what_was_not_measured_is_said(runs, published, data):
    text = "".join(path.read_text("latin1") for path in published.glob("*/*/*"))
    assert not any(word in text for word in (str(ROOT), runs.name, str(data.parent), getpass.getuser() + "@"))
    assert "was not measured" in (published / "1/main/README.md").read_text()
    assert "### Per-stage BPB" in (published / "0/main/README.md").read_text()


def test_weights_are_published_in_two_bytes_of_memory_a_parameter(tmp_path):
    n = 2 ** 25
    torch.save({"a": torch.zeros(n // 4, 4)}, tmp_path / "model.pt")
    write_json(tmp_path / "config.json", {})
    done = threading.Event()
    peaks = []

    def watch():
        while not done.wait(0.001):
            peaks.append(int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    record = {"model": {"stage_layers": [1]}, "tokenizer": {"bos": 1}}
    publish.write_model(tmp_path, record, tmp_path, "bfloat16")
    done.set()
    watcher.join()
    # 64 MiB are the packages'
    assert max(peaks) - peaks[0] < 2 * n + 2 ** 26
