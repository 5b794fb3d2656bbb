"""
evaluate.py against a naive twin (whole logits, float64, loops) and a model whose bits per byte are known.

Run: python -m pytest tests/test_evaluate.py
"""
import json
import math
import shutil

import numpy as np
import pytest
import torch

import evaluate
from dataloader import Mix, Source, Tokenizer, open_data
from evaluate import score, slice_text, summarize
from model import load_checkpoint, sha256_of
from test_model import make


def byte_mix(n=400, T=11):
    """Windows over a tokenizer of 256 bytes and bos, with a bos now and then."""
    draw = np.random.Generator(np.random.PCG64(0))
    tokens = draw.integers(0, 256, n).astype(np.uint16)
    tokens[::29] = 256
    return Mix([Source("a", 1, [tokens])], T, 0), Tokenizer.load(vocab_size=257)


@torch.no_grad()
def naive(model, mix, n_windows, tokenizer):
    """The definitions of SPEC 2, token by token, in Python floats."""
    K = model.config.n_stage
    nats, hits, n_bytes, n_tokens = np.zeros((2, K)), np.zeros((2, K)), 0, 0
    for i in range(n_windows):
        idx, targets = mix.batch(np.array([i]))
        p = [torch.softmax(15 * torch.tanh(torch.nn.functional.rms_norm(x, (x.size(-1),)) @ (model.lm_head.weight + head.weight).T / 15), -1)[0]
             for x, head in zip(model.boundaries(idx), model.lm_head_stages)]               # K x (T, V)
        for t, y in enumerate(targets[0].tolist()):
            if y == tokenizer.bos:
                continue
            n_tokens += 1
            n_bytes += len(tokenizer.ranks[y])
            for k in range(K):
                product = torch.stack([q[t] for q in p[:k + 1]]).prod(dim=0) ** (1 / (k + 1))       # geometric mean, then renormalised
                product = product / product.sum()
                for row, q in ((0, p[k][t]), (1, product)):
                    nats[row, k] -= math.log(q[y])
                    hits[row, k] += int(q.argmax()) == y
    return nats, hits, n_tokens, n_bytes


def test_every_sum_equals_the_naive_twin(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK_LOGITS", 7 * 257)      # chunks of 7 tokens
    model = make(vocab_size=257)
    mix, tokenizer = byte_mix()
    sums = score(model, mix, 17, tokenizer, batch_size=3)
    nats, hits, n_tokens, n_bytes = naive(model, mix, 17, tokenizer)
    assert (sums["tokens"], sums["bytes"]) == (n_tokens, n_bytes)
    assert np.allclose([sums["nats_single"], sums["nats_prefix"]], nats, rtol=1e-12, atol=0)
    assert [sums["hits_single"], sums["hits_prefix"]] == hits.tolist()


def test_bpb_does_not_depend_on_batch_or_chunk_size(monkeypatch):
    model = make(vocab_size=257)
    mix, tokenizer = byte_mix()
    reference = summarize(score(model, mix, 12, tokenizer, batch_size=12))
    for batch, chunk in ((1, 2 ** 20), (5, 257), (12, 3 * 257)):
        monkeypatch.setattr(evaluate, "CHUNK_LOGITS", chunk)
        other = summarize(score(model, mix, 12, tokenizer, batch_size=batch))
        assert other["bpb"]["full"] == pytest.approx(reference["bpb"]["full"], rel=1e-12)
        assert other["accuracy"] == reference["accuracy"]


def test_a_uniform_model_has_log2_of_the_vocabulary_over_the_bytes_of_a_token():
    model = make(vocab_size=257)
    with torch.no_grad():
        for head in (model.lm_head, *model.lm_head_stages):
            head.weight.zero_()
    mix, tokenizer = byte_mix()
    metrics = summarize(score(model, mix, 10, tokenizer, batch_size=4))
    assert metrics["bpb"]["full"] == pytest.approx(math.log2(257) / 1, rel=1e-12)      # every counted token is one byte
    assert metrics["bytes"] == metrics["tokens"] < 110                                 # bos counts neither


def test_identities_and_stderr():
    metrics = summarize({"tokens": 100, "bytes": 250, "nats_single": [5.0, 4.0], "nats_prefix": [5.0, 3.0], "hits_single": [36.0, 50.0], "hits_prefix": [36.0, 64.0]})
    assert metrics["bpb"]["prefix"][0] == metrics["bpb"]["single"][0] == 5 / (math.log(2) * 250)
    assert metrics["bpb"]["full"] == metrics["bpb"]["prefix"][-1]
    assert metrics["crossover_gap"] == metrics["bpb"]["full"] - metrics["bpb"]["single"][-1] < 0
    assert metrics["accuracy"]["full"] == 0.64 and metrics["accuracy"]["full_stderr"] == pytest.approx(0.048)


def test_slice_text_is_the_targets_bytes_in_the_corpus_order():
    data = open_data("", 300)
    mix = data.val(64)
    n = mix.n_in_first_epoch()
    text, sha = slice_text(mix, n, data.tokenizer)
    targets = mix.batch(np.arange(n))[1]
    assert len(text) == data.tokenizer.token_bytes[targets].sum() and len(sha) == 64
    source, _, window = mix.locate(np.arange(n))
    in_order = [mix.sources[s].window(w, 64)[1:].tolist() for s, w in sorted(zip(source.tolist(), window.tolist()))]
    assert text == b"".join(data.tokenizer.decode_bytes(ids) for ids in in_order)


def test_the_script_measures_every_step_and_writes_metrics(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    evaluate.main([str(run), "--split-tokens", "320", "--device", "cpu", "--dtype", "float64"])
    out = capsys.readouterr().out
    assert "| Branch | Step | full K=3 | single s0 | single s1 | single s2 | prefix K'=1 | prefix K'=2 |" in out
    assert "| `step-00003` | 3 |" in out and "| `step-00006` | 6 |" in out
    metrics = json.loads((run / "step-00006" / "metrics.json").read_text())
    assert {"format", "settings", "step", "tokens", "bytes", "bpb", "accuracy", "crossover_gap", "train_log_bpb"} <= metrics.keys()
    assert metrics["settings"]["split_tokens"] == 320
    assert metrics["train_log_bpb"] == {"full": pytest.approx(metrics["bpb"]["full"], rel=1e-12), "tokens": metrics["tokens"]}
    _, _, sha256 = load_checkpoint(run / "step-00006")
    assert metrics["settings"]["weights_sha256"] == sha256
    evaluate.main([str(run / "step-00006"), "--split-tokens", "320", "--json", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["bpb"]["full"] == pytest.approx(metrics["bpb"]["full"], rel=1e-5)      # float32


def test_step_directories_are_ordered_by_number(trained, tmp_path, capsys):
    run = tmp_path / "run"
    for name in ("step-100000", "step-84000"):
        shutil.copytree(trained / "step-00003", run / name)
    evaluate.main([str(run), "--split-tokens", "64"])
    assert [p.name for p in evaluate.checkpoint_steps(run)] == ["step-84000", "step-100000"]


@pytest.mark.parametrize("argv, words", [(["--split-tokens", "9999999"], ["9,999,999", "lower"]), (["--split-tokens", "0"], ["split-tokens 0"]),
                                         (["--data", "nowhere"], ["nowhere"]), (["--data", ""], ["another tokenizer"])])
def test_bad_input_gets_one_line(argv, words, trained, refused, monkeypatch):
    if argv[1] == "":
        real = Tokenizer.load
        monkeypatch.setattr(evaluate, "open_data", lambda path, vocab: open_data(path, vocab + 1))
    line = refused(evaluate.main, trained / "step-00006", *argv)
    assert all(word in line for word in words), line


def test_a_log_cut_mid_line_is_read_up_to_the_cut(trained, tmp_path):
    text = (trained / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text('[1]\n{"kind": "val"}\n' + text + '{"kind": "va')
    assert evaluate.train_log_bpb(tmp_path, 6) == evaluate.train_log_bpb(trained, 6) 
    assert evaluate.train_log_bpb(tmp_path, 5) is None and evaluate.train_log_bpb(tmp_path / "nowhere", 6) is None


def test_weights_that_are_not_numbers_are_named(trained, tmp_path, refused):
    step = tmp_path / "step-00006"
    shutil.copytree(trained / "step-00006", step)
    weights = torch.load(step / "model.pt", weights_only=True)
    weights["wte.weight"].fill_(float("nan"))
    torch.save(weights, step / "model.pt")
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["model.pt"] = sha256_of(step / "model.pt")
    (step / "manifest.json").write_text(json.dumps(manifest))
    assert "not finite" in refused(evaluate.main, step, "--split-tokens", "64")
    assert not (step / "metrics.json").exists()


def test_a_run_without_checkpoints_is_named(tmp_path, refused):
    assert "holds no step-XXXXX" in refused(evaluate.main, tmp_path)
