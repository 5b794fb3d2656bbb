"""
publish.py and modeling_poe.py, against the checkpoints that they came from: outputs, texts, ids, metrics.

transformers and lm-eval run in a process of their own that does not find this project, see use_published.py.
Run: python -m pytest tests/test_publish.py
"""
import csv
import getpass
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import evaluate
import publish
from checkpoint import BOUNDS_KEY, load_checkpoint, read_json, write_json
from common import sha256_of
from conftest import ROOT, change_json, small_run, table
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


def publish_run(*argv):
    publish.main([str(a) for a in argv])


def measure(path, data):
    evaluate.main([str(path), *"--device cpu --split-tokens 640 --no-samples --data".split(), str(data)])


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
            small_run(data, folder / str(seed), "--seed", seed,
                      *"--sequence-len 64 --total-batch-tokens 128 --dtype float32 --peak-lrm 0.01".split())
    measure(folder / "0" / STEP, data)
    change_json(folder / "0" / STEP / "config.json", **{BOUNDS_KEY: BOUNDS})
    return folder


@pytest.fixture(scope="module")
def published(runs, tmp_path_factory):
    """Both runs as folders, float32; the second was not measured."""
    out = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        for name, shard in (("0", publish.SHARD), ("1", "10KB")):
            patch.setattr(publish, "SHARD", shard)
            publish_run(runs / name, "--out", out / name, "--folders", "--dtype", "float32")
    return out


@pytest.fixture(scope="module")
def found(published, tmp_path_factory):
    """What a stranger finds, and the texts that were encoded: those above and a fortieth of the sample."""
    texts = TEXTS + [json.loads(line)["text"] for path in (ROOT / "data/sample").glob("*.xz")
                     for line in [*lzma.open(path, "rt", encoding="utf-8")][::40]]
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


def test_what_was_published_comes_back_by_import(runs, published, data, tmp_path):
    publish_run("--import", published / "0/main", "--out", tmp_path / "again" / STEP)
    assert read_json(tmp_path / "again" / STEP / "config.json")[BOUNDS_KEY] == BOUNDS
    measure(tmp_path / "again" / STEP, data)
    before, after = (read_json(run / STEP / "metrics.json") for run in (runs / "0", tmp_path / "again"))
    # the log stays behind
    assert before | {"train_log_bpb": None} == after
    # in bfloat16, with names mapped
    publish_run(runs / "0", "--out", tmp_path / "p", "--folders")
    publish_run("--import", tmp_path / "p/main", "--out", tmp_path / "half" / STEP, "--rename",
           '{"model": "x", "^x.": ""}')
    before = torch.load(runs / "0" / STEP / "model.pt")
    for name, tensor in torch.load(tmp_path / "half" / STEP / "model.pt").items():
        # half a unit of 8 bits; scalars are kept whole
        limit = 2 ** -8 if tensor.dim() else 0
        assert ((tensor - before[name]).abs() <= limit * before[name].abs()).all(), name


@pytest.mark.parametrize("argv, word", table("""
    --import published/main --out new/step-00007                                  | step-00006
    --import published/main --out new/step-00006 --rename {"wte":"embedding"}     | wte
    run --out run                                                                 | something else
    other --out published --folders                                               | something else
    --import published/main                                                       | step-00006
    --import . --out new/step-00006                                               | cannot be read"""))
def test_bad_input_gets_one_line_and_writes_nothing(
        argv, word, runs, published, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in {"run": runs / "0", "other": runs / "1", "published": published / "0"}.items():
        Path(name).symlink_to(path)
    Path("cut.safetensors").touch()
    assert word in refused(publish.main, *argv.split()) and not Path("new").exists()


def test_git_branches_change_only_with_their_checkpoints(runs, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(runs / "0", tmp_path / "run")
    later = (run / STEP).rename(tmp_path / "later")
    out = tmp_path / "repository"
    commits = []
    monkeypatch.setenv("GIT_AUTHOR_NAME", "somebody")
    for _ in range(3):
        publish_run(run, "--out", out, "--license", "mit")
        assert "push --force --all" in capsys.readouterr().out
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
    expected = {"branch": STEP, "weights_sha256": sha256_of(out / "model.safetensors"), "phase": "1",
                "checkpoint_sha256": sha256_of(run / STEP / "model.pt"), "tokens_seen": "768", "rel_it": "6",
                "lrm": "0.05", "bpb_full": str(bpb["full"]), "bpb_s2": str(bpb["single"][2])}
    assert line == line | expected
    assert publish.git(out, "log", "--all", "--format=%an%ae%cn%ce").split() == 4 * ["publish.pypublish.py"]
    assert "license: mit\npipeline_tag: text-generation\n" in (out / "README.md").read_text()


def test_nothing_of_this_machine_is_published_and_what_was_not_measured_is_said(runs, published, data):
    text = "".join(path.read_text("latin1") for path in published.glob("*/*/*"))
    assert not any(word in text for word in (str(ROOT), runs.name, str(data.parent), getpass.getuser() + "@"))
    assert "was not measured" in (published / "1/main/README.md").read_text()
    assert "### Per-stage BPB" in (published / "0/main/README.md").read_text()


def test_weights_are_published_in_two_bytes_of_memory_a_parameter(tmp_path):
    n = 2 ** 25
    torch.save({"a": torch.zeros(n // 4, 4)}, tmp_path / "model.pt")
    write_json(tmp_path / "config.json", {})
    record = {"model": {"stage_layers": [1]}, "tokenizer": {"bos": 1}}
    writer = threading.Thread(target=publish.write_model, args=(tmp_path, record, tmp_path, "bfloat16"))
    writer.start()
    used = []
    while writer.is_alive():
        used.append(int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
        time.sleep(0.001)
    assert (tmp_path / "model.safetensors").stat().st_size > 2 * n
    # 64 MiB are the packages'
    assert max(used) - used[0] < 2 * n + 2 ** 26
