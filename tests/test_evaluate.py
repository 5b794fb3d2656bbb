"""
evaluate.py against a naive twin (whole probabilities, loops over positions and documents) and hand counts.

Run: python -m pytest tests/test_evaluate.py
"""

import hashlib
import itertools
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

import evaluate
from checkpoint import BOUNDS_KEY, load_checkpoint, read_json, read_log, verify_checkpoint, write_json
from common import sha256_of
from dataloader import Mix, Source, Tokenizer, open_data
from evaluate import Slice, fit_bound, fit_threshold, measure, score, slice_text, summarize
from model import PRESETS, PoE, stage_bytes
from sample import Engine, Plan, decode_timed
from test_model import make
from test_ranks import run_ranks

BOS = 256
CAP = 0.025
MARGIN_CAP = 0.02


def byte_mix(n=400, T=11, document=29):
    """Windows over two sources of bytes with a bos now and then: documents of `document` tokens span several
    windows.
    """
    draw = np.random.Generator(np.random.PCG64(0))
    sources = []
    for name, weight, size, period in (("a", 2, n, document), ("b", 1, n // 2 + 7, document + 8)):
        tokens = draw.integers(0, 23, size).astype(np.uint16)
        tokens[::period] = BOS
        sources.append(Source(name, weight, [tokens[:41], tokens[41:]]))
    return Mix(sources, T, 0), Tokenizer.load(vocab_size=257)


def settled():
    """A small model whose later stages change little: early exits, violations and routing all occur."""
    model = make(vocab_size=257)
    with torch.no_grad():
        for layers in model.layers_of_stage[-2:]:
            for i in layers:
                model.blocks[i].attn.c_proj.weight.mul_(0.02)
                model.blocks[i].mlp.c_proj.weight.mul_(0.02)
        for head in model.lm_head_stages:
            head.weight.mul_(0.05)
        model.lm_head.weight[23:] -= 0.2  # the text holds 23 kinds of bytes
    return model


# --------------------------------------------------------------------------------------------------
# The naive twin


@torch.no_grad()
def positions(model, mix, n_windows):
    """One dict per counted position: window, document, target and the K distributions, as the definitions
    say, without sharing code.
    """
    found = []
    K = model.config.n_stage
    heads = [model.lm_head.weight + head.weight for head in model.lm_head_stages] or [model.lm_head.weight]
    for i in range(n_windows):
        idx, targets = mix.batch(np.array([i]))
        source, _, window = (int(a[0]) for a in mix.locate([i]))
        stream = np.concatenate([np.asarray(s) for s in mix.sources[source].shards])
        p = [
            torch.softmax(15 * torch.tanh(torch.nn.functional.rms_norm(x, (x.size(-1),)) @ W.T / 15), -1)[0]
            for x, W in zip(model.boundaries(idx), heads)
        ]
        for t, y in enumerate(targets[0].tolist()):
            if y != BOS:
                place = window * mix.T + t + 1
                products = []
                for k in range(K):
                    product = torch.stack([q[t] for q in p[: k + 1]]).prod(dim=0) ** (
                        1 / (k + 1)
                    )  # geometric mean, then renormalised
                    products.append(product / product.sum())
                found.append(
                    {
                        "window": i,
                        "document": (source, (stream[: place + 1] == BOS).sum()),
                        "y": y,
                        "p": [q[t] for q in p],
                        "products": products,
                    }
                )
    return found


def se(pairs):
    """Standard error of sum(a) / sum(b) over documents: (document, a, b) triples, by the textbook formula for
    a ratio of cluster totals.
    """
    totals = {}
    for document, a, b in pairs:
        old = totals.get(document, (0.0, 0.0))
        totals[document] = (old[0] + a, old[1] + b)
    totals = [t for t in totals.values() if t[1]]
    A = sum(t[0] for t in totals)
    B = sum(t[1] for t in totals)
    G = len(totals)
    return math.sqrt(sum((a - A / B * b) ** 2 for a, b in totals) * G / (G - 1)) / B


def naive_threshold(scores, costs, cap):
    """The smallest score t among the scores for which the mean cost of those with score >= t is within the
    cap.
    """
    for t in sorted(set(scores)):
        above = [c for s, c in zip(scores, costs) if s >= t]
        if sum(above) / len(above) <= cap:
            return t
    return math.inf


def slice_twin(all_positions, K):
    """metrics.json's figures of the whole slice by loops over positions."""
    N = len(all_positions)                  # every counted token is one byte
    bits = math.log(2)

    def nats(q, y):
        return -math.log(q[y])

    def bpb(f):
        return sum(f(z) for z in all_positions) / (bits * N)

    def alpha(z, a):
        q = torch.stack(z["p"]).log().sum(dim=0) * K**a / K
        return (q.exp().sum().log() - q[z["y"]]).item()

    out = {
        "tokens": N,
        "bytes": N,
        "bpb": {
            "full": bpb(lambda z: nats(z["products"][-1], z["y"])),
            "single": [bpb(lambda z: nats(z["p"][k], z["y"])) for k in range(K)],
            "prefix": [bpb(lambda z: nats(z["products"][k], z["y"])) for k in range(K)],
            "full_stderr": se(
                (z["document"], nats(z["products"][-1], z["y"]) / bits, 1) for z in all_positions
            ),
        },
    }

    def hit(q, z):
        return float(int(q.argmax()) == z["y"])

    out["accuracy"] = {
        "full": sum(hit(z["products"][-1], z) for z in all_positions) / N,
        "single": [sum(hit(z["p"][k], z) for z in all_positions) / N for k in range(K)],
        "full_stderr": se((z["document"], hit(z["products"][-1], z), 1) for z in all_positions),
    }
    out["alpha_sweep"] = {
        name: bpb(lambda z: alpha(z, float(name))) for name in ("0", "0.25", "0.5", "0.75", "1")
    }
    out["crossover_gap"] = out["bpb"]["full"] - out["bpb"]["single"][-1]
    out["crossover_gap_stderr"] = se(
        (z["document"], (nats(z["products"][-1], z["y"]) - nats(z["p"][-1], z["y"])) / bits, 1)
        for z in all_positions
    )

    return out


def exit_twin(model, all_positions, n_calibration, cap, margin_cap):
    """metrics.json's figures of early exit by loops over positions."""
    K = model.config.n_stage
    for z in all_positions:
        logs = [q.log() for q in z["products"]]
        z["range"] = [float((b - a).max() - (b - a).min()) for a, b in zip(logs, logs[1:])]
        z["margin"] = [float(q.sort().values[-1] - q.sort().values[-2]) for q in logs]
        z["agree"] = [int(q.argmax()) == int(logs[-1].argmax()) for q in logs]
        z["top"] = float(z["p"][0].max())
        z["regret"] = math.log(z["products"][-1][z["y"]]) - math.log(z["p"][0][z["y"]])
    calibration = [z for z in all_positions if z["window"] < n_calibration]
    seen = {z["document"] for z in calibration}
    report = [z for z in all_positions if z["window"] >= n_calibration and z["document"] not in seen]
    M = len(report)
    bounds = []
    for k in range(K - 1):
        values = sorted(z["range"][k] for z in calibration)
        bounds.append(next(v for v in values if 100 * sum(x <= v for x in values) >= 99 * len(values)))
    margins = []
    stay = calibration
    for k in range(K - 1):
        margins.append(
            naive_threshold([z["margin"][k] for z in stay], [1 - z["agree"][k] for z in stay], margin_cap)
        )
        stay = [z for z in stay if z["margin"][k] < margins[-1]]
    tau = naive_threshold([z["top"] for z in calibration], [max(z["regret"], 0) for z in calibration], cap)

    # c_q, c_proj; c_k, c_v; c_fc, c_proj of CONFIG, by hand
    layers = [2 * 12 * 12 + 2 * 12 * (12 // 6 * 3) + 2 * 12 * 17] * 5
    weights = list(
        itertools.accumulate(sum(layers[i] for i in part) + 257 * 12 for part in model.layers_of_stage)
    )

    def adaptive(leaves):
        exits = [next((k for k in range(K - 1) if leaves(z, k)), K - 1) for z in report]
        wrong = [not z["agree"][k] for z, k in zip(report, exits)]
        early = sum(k < K - 1 for k in exits)
        return {
            "exit_fraction": [exits.count(k) / M for k in range(K)],
            "violation_rate": sum(wrong) / early if early else None,
            "agreement": 1 - sum(wrong) / M,
            "agreement_stderr": se((z["document"], 1 - w, 1) for z, w in zip(report, wrong)),
            "violation_rate_stderr": se(
                (z["document"], w, k < K - 1) for z, w, k in zip(report, wrong, exits)
            ),
            "projected_speedup": weights[-1] / (sum(weights[k] for k in exits) / M),
        }

    wand = {
        "p99_bounds": bounds,
        "tokens": len(calibration),
        "report_tokens": M,
        **adaptive(lambda z, k: z["margin"][k] > sum(bounds[k:])),
        "exceedance": [sum(z["range"][k] > bounds[k] for z in report) / M for k in range(K - 1)],
        "margin": {"thresholds": margins, **adaptive(lambda z, k: z["margin"][k] >= margins[k])},
    }
    routed = [z for z in report if z["top"] >= tau]
    f = len(routed) / M
    routing = {
        "cap": cap,
        "threshold": tau,
        "fraction": f,
        "fraction_stderr": se((z["document"], z["top"] >= tau, 1) for z in report),
        "oracle_fraction": sum(z["regret"] <= cap for z in report) / M,
        "agreement": sum(z["agree"][0] for z in routed) / len(routed),
        "base_agreement": sum(z["agree"][0] for z in report) / M,
        "mean_cost": sum(max(z["regret"], 0) for z in routed) / len(routed),
        "projected_speedup": weights[-1] / (f * weights[0] + (1 - f) * weights[-1]),
    }
    return {"wand": wand, "routing": routing}


def assert_equal(found, expected, path="", rel=1e-9):
    """Every figure of `expected` is in `found`, to `rel`."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_equal(found[key], value, f"{path}.{key}", rel)
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for i, value in enumerate(expected):
            assert_equal(found[i], value, f"{path}[{i}]", rel)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=1e-13), f"{path}: {found} is not {expected}"
    else:
        assert found == expected, f"{path}: {found} is not {expected}"


@pytest.fixture(scope="module")
def measured():
    """(model, slice, metrics) with caps at which bounds, margins and routing all let positions out, some of
    them wrongly.
    """
    model = settled()
    mix, tokenizer = byte_mix()
    part = Slice(mix, 50, 17, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "MARGIN_CAP", MARGIN_CAP)
        return model, part, measure(model, part, 7, CAP)


def test_every_quantity_equals_the_naive_twin(measured):
    model, part, metrics = measured
    all_positions = positions(model, part.mix, 50)
    expected = slice_twin(all_positions, 3) | exit_twin(model, all_positions, 17, CAP, MARGIN_CAP)
    assert_equal(metrics, expected)
    # every branch of the twin was taken
    wand = expected["wand"]
    routing = expected["routing"]
    shares = [*wand["exit_fraction"], *wand["margin"]["exit_fraction"], wand["margin"]["violation_rate"],
              routing["fraction"], routing["agreement"], max(wand["exceedance"])]
    assert all(0 < share < 1 for share in shares), expected


def test_the_light_pass_gives_the_figures_of_the_full_one(measured, monkeypatch):
    monkeypatch.setitem(evaluate.CHUNK_LOGITS, "cpu", 7 * 257)  # chunks of 7 tokens
    model, part, metrics = measured
    light = score(model, part.mix, 50, part.tokenizer, batch_size=3)
    assert light.keys() == {"tokens", "bytes", "nats_single", "nats_prefix", "hits_single", "hits_prefix"}
    assert_equal(metrics, summarize(light), rel=1e-12)


def test_no_figure_depends_on_batch_or_chunk_size(measured, monkeypatch):
    model, part, metrics = measured
    monkeypatch.setattr(evaluate, "MARGIN_CAP", MARGIN_CAP)
    for batch, chunk in ((1, 2**20), (13, 3 * 257)):
        monkeypatch.setitem(evaluate.CHUNK_LOGITS, "cpu", chunk)
        other = measure(model, part, batch, CAP)
        other.pop("blocks")
        assert_equal(metrics, other, rel=1e-11)


def test_a_uniform_model_has_log2_of_the_vocabulary_over_the_bytes_of_a_token():
    model = make(vocab_size=257)
    with torch.no_grad():
        for head in (model.lm_head, *model.lm_head_stages):
            head.weight.zero_()
    mix, tokenizer = byte_mix()
    metrics = summarize(score(model, mix, 10, tokenizer, batch_size=4))
    # every counted token is one byte; bos counts neither as a token nor as a byte
    assert metrics["bpb"]["full"] == pytest.approx(math.log2(257), rel=1e-12)
    assert metrics["bytes"] == metrics["tokens"] < 110


def test_the_sums_of_the_blocks_give_the_figures(measured):
    metrics = measured[2]
    blocks = metrics["blocks"]
    tokens, hits, nats = (sum(map(float, text.split())) for text in (
        blocks["tokens"], blocks["accuracy"]["single"][2], blocks["bpb"]["full"]))
    assert tokens == metrics["tokens"]
    assert hits / tokens == pytest.approx(metrics["accuracy"]["single"][2], rel=1e-12)
    assert nats / math.log(2) / metrics["bytes"] == pytest.approx(metrics["bpb"]["full"], rel=1e-6)


def test_one_stage_has_no_adaptive_figures_and_no_gap():
    mix, tokenizer = byte_mix()
    metrics = measure(
        make(vocab_size=257, stage_layers=(5,), objective="bp"), Slice(mix, 20, 4, tokenizer), 6, CAP
    )
    assert metrics["wand"] is metrics["routing"] is None and metrics["crossover_gap"] == 0
    assert metrics["alpha_sweep"]["1"] == pytest.approx(metrics["bpb"]["full"], rel=1e-12)  # K^alpha = 1


# --------------------------------------------------------------------------------------------------
# The slice, calibration, bytes, errors of ratios


def test_calibration_and_report_share_no_document(measured):
    part = measured[1]
    calibrating = set(part.documents[:17].flat)
    reported = set(part.documents[part.in_report])
    assert reported and not calibrating & reported and not part.in_report[:17].any()
    # the negative control: leaving out windows alone would not have done it
    assert calibrating & set(part.documents[17:].flat)


def test_documents_are_those_of_the_stream_even_where_one_spans_many_windows():
    tokens = np.zeros(100, np.uint16)
    tokens[[0, 3, 61, 62]] = BOS  # documents of 3, 58, 1 and 38 tokens; the second spans windows 0 to 5
    mix = Mix([Source("a", 1, [tokens[:50], tokens[50:]])], 11, 0)
    number = evaluate.slice_documents(mix, 9, BOS)
    window = mix.locate(np.arange(9))[2].astype(int)
    expected = np.array(
        [[np.searchsorted([3, 61, 62], w * 11 + t + 1, side="right") for t in range(11)] for w in window]
    )
    assert (number == expected).all()


def test_a_slice_of_one_document_has_nothing_to_report_on():
    tokens = np.zeros(200, np.uint16)
    with pytest.raises(ValueError, match="whole documents to report on"):
        Slice(Mix([Source("a", 1, [tokens])], 11, 0), 9, 2, Tokenizer.load(vocab_size=257))


def test_fit_threshold_is_the_smallest_score_within_the_cap():
    score = np.array([0.9, 0.8, 0.7, 0.7, 0.2])
    cost = np.array([0.0, 0.0, 1.0, 0.0, 0.0])
    # one fifth over all five; equal scores stay together
    assert [fit_threshold(score, cost, cap) for cap in (0.0, 0.19, 0.2)] == [0.8, 0.8, 0.2]
    assert fit_threshold(score, cost + 1, 0.5) == math.inf == fit_threshold(score[:0], cost[:0], 1.0)


def test_the_error_of_a_bound_is_clustered_by_document():
    draw = np.random.default_rng(1)
    documents = np.repeat(np.arange(500), 20)
    ranges = 1.0 + draw.random(500)[documents] + 0.1 * draw.random(10_000)
    stderr = fit_bound(ranges, documents % evaluate.N_BLOCKS)[1]
    independent = fit_bound(ranges, np.arange(10_000) % evaluate.N_BLOCKS)[1]
    # the spread of the bound where documents are taken with replacement
    by_document = ranges.reshape(500, 20)
    bounds = [np.sort(by_document[draw.integers(0, 500, 500)].flat)[9899] for _ in range(200)]
    assert 0.6 < stderr / np.std(bounds) < 1.6 and independent < 0.5 * stderr


def test_3b_reads_the_bytes_that_the_specification_counts():
    with torch.device("meta"):
        read = stage_bytes(PoE(PRESETS["3b"], torch.bfloat16))
    assert [round(b / 1e9, 3) for b in (read[0], read[-1])] == [2.215, 4.698]


def test_slice_text_is_the_targets_bytes_in_the_corpus_order():
    mix, tokenizer = byte_mix()
    text, sha256 = slice_text(mix, 20, tokenizer)
    source, _, window = mix.locate(np.arange(20))
    places = sorted(zip(source.tolist(), window.tolist()))
    in_order = [mix.sources[s].window(w, mix.T)[1:].tolist() for s, w in places]
    assert text == b"".join(map(tokenizer.decode_bytes, in_order))
    assert sha256 == hashlib.sha256(text).hexdigest()


def test_facts_are_graded_by_substring():
    texts = [" Paris.", " Au, number 7.", "", "", " " + ", ".join(evaluate.PLANETS[:7]), "", " 12"]
    samples, facts = evaluate.probe(texts)
    assert facts == {"Paris": True, "Au": True, "79": False, "planets": False, "planets_named": 7, "2": True}
    assert samples[0] == {"prompt": "The capital of France is", "completion": " Paris."}


def test_a_damaged_validation_shard_is_named():
    mix, tokenizer = byte_mix()
    mix.vocab_size = 22
    with pytest.raises(ValueError, match="source a holds token 256, beyond the vocabulary of 22"):
        Slice(mix, 40, 10, tokenizer)


def test_speculation_counts_drafts_on_documents_that_did_not_calibrate(trained):
    model, record, _ = load_checkpoint(trained, dtype=torch.float64)
    data = open_data(record["train"]["data"], 300)
    part = Slice(data.val(16), 40, 10, data.tokenizer)
    prompts = evaluate.document_prompts(part, 5, 8)
    assert prompts and all(len(ids) == 8 and ids[0] == 299 and 299 not in ids[1:] for ids in prompts)
    found, timings = evaluate.generate_texts(model, part, 5, False)
    metrics = found["speculative"]
    assert metrics["identical_to_plain"] and metrics["prompts"] == len(prompts) and metrics["new_tokens"] == 9
    # by hand: draft 4 by s0 from the text so far, compare with full's text
    plain = Engine(model, Plan(range(3)))
    accepted = 0
    judged = 0
    for ids in prompts:
        text = ids + decode_timed(plain, ids, 15).ids
        place = 8
        while place < 17:
            drafts = list(text[:place])
            for _ in range(4):
                x = next(model.boundaries(torch.tensor([drafts])))[:, -1]
                drafts.append(int(model.log_probs(0, x).argmax()))
            right = next((i for i in range(4) if drafts[place + i] != text[place + i]), 4)
            accepted += right
            judged += min(right + 1, 4)
            place += right + 1
    assert (metrics["acceptance"], metrics["judged"]) == (pytest.approx(accepted / judged), judged)
    assert timings["speedup"] > 0 and metrics["card_prompts"]["acceptance"] is not None


# --------------------------------------------------------------------------------------------------
# The script on real checkpoints

ARGUMENTS = [
    "--split-tokens",
    "640",
    "--wand-tokens",
    "160",
    "--device",
    "cpu",
    "--dtype",
    "float64",
    "--speculative-prompts",
    "0",
]


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A run measured by the script, hard-linked to `trained` where it could be, and what it printed."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained, run, copy_function=os.link)
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **kwargs: printed.append((args[0], kwargs)))
        evaluate.main([str(run), *ARGUMENTS])
    return run, [text for text, kwargs in printed if "file" not in kwargs]


@pytest.fixture
def run(evaluated, tmp_path, monkeypatch):
    """A copy of the measured run, to be changed; its picture, half a second each, is left out."""

    def without_matplotlib(*args):
        raise ImportError

    monkeypatch.setattr("report.plot", without_matplotlib)
    return shutil.copytree(evaluated[0], tmp_path / "run")


def test_the_script_measures_every_step_and_writes_metrics(evaluated):
    run, (out,) = evaluated
    assert (run / "TRAJECTORY.md").read_text() == out and "`step-00003`" in out and "`step-00006`" in out
    metrics = read_json(run / "step-00006" / "metrics.json")
    mix = open_data(read_json(run / "config.json")["train"]["data"], 300).val(16)
    assert metrics["tokens"] == 640 - (mix.batch(range(40))[1] == 299).sum()  # bos counts nowhere
    assert metrics["settings"]["weights_sha256"] == load_checkpoint(run / "step-00006")[2]
    assert metrics["phase"] == {"rel_it": 6, "lrm": pytest.approx(0.05), "position": "final", "offset": 0}
    assert len(metrics["samples"]) == 7
    log = [entry for entry in read_log(run / "log.jsonl") if entry["kind"] == "val"][-1]
    assert metrics["train_log_bpb"] == {"full": log["bpb"]["full"], "tokens": log["tokens"]}
    assert (run / "step-00006" / "timings.json").exists()


def test_bounds_go_into_config_json_alone_and_not_into_the_run_it_is_linked_to(evaluated, trained):
    ours = evaluated[0] / "step-00003"
    theirs = trained / "step-00003"
    bounds = {BOUNDS_KEY: read_json(ours / "metrics.json")["wand"]["p99_bounds"]}
    assert read_json(ours / "config.json") == read_json(theirs / "config.json") | bounds
    assert verify_checkpoint(ours) and os.stat(ours / "model.pt").st_nlink > 1
    added = {path.name for path in ours.iterdir()} - {path.name for path in theirs.iterdir()}
    assert added == {"metrics.json", "timings.json"}


def test_what_is_measured_with_equal_settings_is_not_measured_again(run, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(evaluate, "measure", lambda *args: calls.append(1) or measure(*args))
    step = run / "step-00003"
    evaluate.main([str(run), *ARGUMENTS, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("kind") or line["step"] for line in lines] == [3, 6, "trajectory"] and not calls
    old = read_json(step / "metrics.json")
    write_json(step / "metrics.json", {**old, "format": 0, "wand": 1})
    evaluate.main([str(run), *ARGUMENTS])
    # a pure function of weights and slice
    assert len(calls) == 1 and read_json(step / "metrics.json") == old
    evaluate.main([str(step), *ARGUMENTS, "--wand-tokens", "320"])
    assert len(calls) == 2 and read_json(step / "metrics.json")["wand"]["tokens"] > old["wand"]["tokens"]
    assert "step-00003 (1/1)" in capsys.readouterr().err  # progress, in a pipe too


def test_two_ranks_share_the_slice_and_get_the_same_sums(evaluated, run, tmp_path):
    for path in run.glob("step-*/metrics.json"):
        path.unlink()
    codes, output = run_ranks(2, [run, *ARGUMENTS, "--device-batch-size", "3"], tmp_path, main=evaluate.main)
    assert codes == [0, 0] and "`step-00006`" in output[0] and not output[1], output
    for step in ("step-00003", "step-00006"):
        ours, alone = (read_json(r / step / "metrics.json") for r in (run, evaluated[0]))
        ours.pop("blocks")
        alone.pop("blocks")
        assert_equal(ours, alone, rel=1e-11)


def test_a_failure_of_rank_0_alone_skips_the_checkpoint_on_all(run, tmp_path):
    for path in run.glob("step-*/metrics.json"):
        path.unlink()

    def no_texts(*args):
        raise OSError(28, "No space left on device")

    codes, output = run_ranks(
        2,
        [run, *ARGUMENTS],
        tmp_path,
        lambda rank: setattr(evaluate, "generate_texts", no_texts),
        main=evaluate.main,
    )
    assert (
        codes == [2, 2] and "2 of 2 checkpoints could not be measured" in output[0] and not output[1]
    ), output


def test_one_damaged_checkpoint_does_not_stop_the_others(run, capsys):
    shutil.copytree(run / "step-00003", run / "step-00005")
    with open(run / "step-00005" / "model.pt", "ab") as f:
        f.write(b"x")
    (run / "step-00005" / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 checkpoints.*step-00005.*model.pt was altered"):
        evaluate.main([str(run), *ARGUMENTS])
    assert "`step-00006`" in capsys.readouterr().out


def test_weights_that_are_not_numbers_are_named(run):
    step = run / "step-00006"
    weights = torch.load(step / "model.pt", weights_only=True)
    weights["wte.weight"].fill_(float("nan"))
    torch.save(weights, step / "model.pt")
    manifest = read_json(step / "manifest.json")
    manifest["files"]["model.pt"] = sha256_of(step / "model.pt")
    write_json(step / "manifest.json", manifest)
    (step / "metrics.json").unlink()
    with pytest.raises(ValueError, match="step-00006: its log-probabilities are not finite"):
        evaluate.main([str(step), *ARGUMENTS])
    assert not (step / "metrics.json").exists()


def test_runs_are_compared_at_their_last_steps_and_refused_before_measuring_where_texts_differ(
    run, tmp_path, monkeypatch, capsys, refused
):
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "step-00006")
    evaluate.main([str(run), str(other), *ARGUMENTS])
    out = capsys.readouterr().out
    assert f"| {run} | 6 |" in out and f"| {other} | 3 |" in out
    record = read_json(other / "config.json")
    record["model"]["sequence_len"] = 8
    write_json(other / "config.json", record)
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", None)  # nothing is measured
    assert "cannot be compared" in refused(evaluate.main, run, other, *ARGUMENTS)


def test_all_rows_of_a_run_are_measured_on_its_own_data(run):
    record = read_json(run / "config.json")
    record["train"]["data"] = "other-data"
    write_json(run / "config.json", record)
    # the seed's too, whose own config.json names another
    with pytest.raises(ValueError, match="other-data"):
        evaluate.main([str(run / "step-00003"), *ARGUMENTS])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--split-tokens", "9999999"], ["split-tokens 9999999", "lower"]),
        (["--split-tokens", "640", "--wand-tokens", "640"], ["wand-tokens", "split-tokens"]),
        (["--wand-tokens", "15"], ["wand-tokens", "16 tokens or more"]),
        (["--routing-cap", "nan"], ["routing-cap: nan"]),
        (["--data", ""], ["--data: an empty path"]),
    ],
)
def test_bad_input_gets_one_line(argv, words, trained, refused):
    line = refused(evaluate.main, trained / "step-00006", *argv)
    assert all(word in line for word in words), line


def test_data_that_is_not_what_the_run_was_trained_on_is_refused(trained, tmp_path, refused, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    record = read_json(run / "config.json")
    record["phases"][0]["mix_sha256"] = "made anew in its place"
    (run / "config.json").write_text(json.dumps(record))
    assert "is not the data that" in refused(evaluate.main, run)
    monkeypatch.setattr(evaluate, "open_data", lambda path, vocab: open_data("", vocab + 1))
    assert "another tokenizer" in refused(evaluate.main, trained)


def test_a_run_without_checkpoints_is_named(tmp_path, refused):
    assert str(tmp_path) in refused(evaluate.main, tmp_path)
