"""
evaluate.py against a naive twin (whole probabilities, float64, loops over positions and documents), hand counts and the model card.

Run: python -m pytest tests/test_evaluate.py
card.md holds the card's tables verbatim: fed with them, the report must print the same rows and find what the card's text states,
and where its prose contradicts its numbers, the numbers.
"""
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import sample
from conftest import said_by_us
from dataloader import Mix, Source, Tokenizer, open_data
from evaluate import Slice, adaptive_metrics, calibrate, fit_threshold, measure, ratio, score, slice_text, stage_bytes, summarize, token_statistics
from model import PRESETS, PoE, combine, load_checkpoint, sha256_of, verify_checkpoint
from test_model import make

BOS, CAP, MARGIN_CAP = 256, 0.025, 0.02


def byte_mix(n=400, T=11, document=29):
    """Windows over two sources of bytes with a bos now and then: documents of `document` tokens span several windows."""
    draw = np.random.Generator(np.random.PCG64(0))
    sources = []
    for name, weight, size, period in (("a", 2, n, document), ("b", 1, n // 2 + 7, document + 8)):
        tokens = draw.integers(0, 23, size).astype(np.uint16)
        tokens[::period] = BOS
        sources.append(Source(name, weight, [tokens[:41], tokens[41:]]))
    return Mix(sources, T, 0), Tokenizer.load(vocab_size=257)


def settled(**changes):
    """A small model whose later stages change little, so that early exits, violations and routing all occur."""
    model = make(vocab_size=257, **changes)
    with torch.no_grad():
        for layer in model.layers_of_stage[-2:] if model.config.n_stage > 1 else ():
            for i in layer:
                model.blocks[i].attn.c_proj.weight.mul_(0.02)
                model.blocks[i].mlp.c_proj.weight.mul_(0.02)
        for head in model.lm_head_stages:
            head.weight.mul_(0.05)
        model.lm_head.weight[23:] -= 0.2        # the text holds 23 kinds of bytes
    return model


# ---------------------------------------------------------------------------------------------------------------
# The naive twin

@torch.no_grad()
def positions(model, mix, n_windows):
    """One dict per counted position: window, document, target and the K distributions, as the definitions say, without sharing code."""
    found, K = [], model.config.n_stage
    heads = [model.lm_head.weight + head.weight for head in model.lm_head_stages] or [model.lm_head.weight]
    for i in range(n_windows):
        idx, targets = mix.batch(np.array([i]))
        source, _, window = (int(a[0]) for a in mix.locate([i]))
        stream = np.concatenate([np.asarray(s) for s in mix.sources[source].shards])
        p = [torch.softmax(15 * torch.tanh(torch.nn.functional.rms_norm(x, (x.size(-1),)) @ W.T / 15), -1)[0] for x, W in zip(model.boundaries(idx), heads)]
        for t, y in enumerate(targets[0].tolist()):
            if y != BOS:
                place = window * mix.T + t + 1
                products = []
                for k in range(K):
                    product = torch.stack([q[t] for q in p[:k + 1]]).prod(dim=0) ** (1 / (k + 1))       # geometric mean, then renormalised
                    products.append(product / product.sum())
                found.append({"window": i, "document": (source, (stream[:place + 1] == BOS).sum()), "y": y, "p": [q[t] for q in p], "products": products})
    return found


def se(pairs):
    """Standard error of sum(a) / sum(b) over documents: (document, a, b) triples, by the textbook formula for a ratio of cluster totals."""
    totals = {}
    for document, a, b in pairs:
        old = totals.get(document, (0.0, 0.0))
        totals[document] = (old[0] + a, old[1] + b)
    totals = [t for t in totals.values() if t[1]]
    A, B, G = sum(t[0] for t in totals), sum(t[1] for t in totals), len(totals)
    return math.sqrt(sum((a - A / B * b) ** 2 for a, b in totals) * G / (G - 1)) / B


def naive_threshold(scores, costs, cap):
    """The smallest score t among the scores for which the mean cost of those with score >= t is within the cap."""
    for t in sorted(set(scores)):
        above = [c for s, c in zip(scores, costs) if s >= t]
        if sum(above) / len(above) <= cap:
            return t
    return math.inf


def twin(model, mix, n_windows, n_calibration, cap, margin_cap):
    """metrics.json's figures by loops over positions."""
    K, all_positions = model.config.n_stage, positions(model, mix, n_windows)
    N, bits = len(all_positions), math.log(2)                       # every counted token is one byte
    def nats(q, y):
        return -math.log(q[y])
    def bpb(f):
        return sum(f(z) for z in all_positions) / (bits * N)
    def alpha(z, a):
        q = torch.stack(z["p"]).log().sum(dim=0) * K ** a / K
        return (q.exp().sum().log() - q[z["y"]]).item()
    out = {"tokens": N, "bytes": N, "bpb": {"full": bpb(lambda z: nats(z["products"][-1], z["y"])), "single": [bpb(lambda z: nats(z["p"][k], z["y"])) for k in range(K)],
                                           "prefix": [bpb(lambda z: nats(z["products"][k], z["y"])) for k in range(K)],
                                           "full_stderr": se((z["document"], nats(z["products"][-1], z["y"]) / bits, 1) for z in all_positions)}}
    def hit(q, z):
        return float(int(q.argmax()) == z["y"])
    out["accuracy"] = {"full": sum(hit(z["products"][-1], z) for z in all_positions) / N, "single": [sum(hit(z["p"][k], z) for z in all_positions) / N for k in range(K)],
                       "full_stderr": se((z["document"], hit(z["products"][-1], z), 1) for z in all_positions)}
    out["alpha_sweep"] = {name: bpb(lambda z: alpha(z, float(name))) for name in ("0", "0.25", "0.5", "0.75", "1")}
    out["crossover_gap"] = out["bpb"]["full"] - out["bpb"]["single"][-1]
    out["crossover_gap_stderr"] = se((z["document"], (nats(z["products"][-1], z["y"]) - nats(z["p"][-1], z["y"])) / bits, 1) for z in all_positions)

    for z in all_positions:
        logs = [q.log() for q in z["products"]]
        z["range"] = [float((b - a).max() - (b - a).min()) for a, b in zip(logs, logs[1:])]
        z["margin"] = [float(q.sort().values[-1] - q.sort().values[-2]) for q in logs]
        z["agree"] = [int(q.argmax()) == int(logs[-1].argmax()) for q in logs]
        z["top"], z["regret"] = float(z["p"][0].max()), nats(z["p"][0], z["y"]) - nats(z["products"][-1], z["y"])
    calibration = [z for z in all_positions if z["window"] < n_calibration]
    seen = {z["document"] for z in calibration}
    report = [z for z in all_positions if z["window"] >= n_calibration and z["document"] not in seen]
    M = len(report)
    bounds = []
    for k in range(K - 1):
        values = sorted(z["range"][k] for z in calibration)
        bounds.append(next(v for v in values if 100 * sum(x <= v for x in values) >= 99 * len(values)))
    margins, stay = [], calibration
    for k in range(K - 1):
        margins.append(naive_threshold([z["margin"][k] for z in stay], [1 - z["agree"][k] for z in stay], margin_cap))
        stay = [z for z in stay if z["margin"][k] < margins[-1]]
    tau = naive_threshold([z["top"] for z in calibration], [max(z["regret"], 0) for z in calibration], cap)

    layers = [2 * 12 * 12 + 2 * 12 * (12 // 6 * 3) + 2 * 12 * 17] * 5               # c_q, c_proj; c_k, c_v; c_fc, c_proj of CONFIG, by hand
    weights = list(itertools.accumulate(sum(layers[i] for i in part) + 257 * 12 for part in model.layers_of_stage))

    def adaptive(leaves):
        exits = [next((k for k in range(K - 1) if leaves(z, k)), K - 1) for z in report]
        wrong = [not z["agree"][k] for z, k in zip(report, exits)]
        early = sum(k < K - 1 for k in exits)
        return {"exit_fraction": [exits.count(k) / M for k in range(K)], "violation_rate": sum(wrong) / early if early else None, "agreement": 1 - sum(wrong) / M,
                "agreement_stderr": se((z["document"], 1 - w, 1) for z, w in zip(report, wrong)),
                "violation_rate_stderr": se((z["document"], w, k < K - 1) for z, w, k in zip(report, wrong, exits)),
                "projected_speedup": weights[-1] / (sum(weights[k] for k in exits) / M)}
    out["wand"] = {"p99_bounds": bounds, "tokens": len(calibration), "report_tokens": M, **adaptive(lambda z, k: z["margin"][k] > sum(bounds[k:])),
                   "exceedance": [sum(z["range"][k] > bounds[k] for z in report) / M for k in range(K - 1)],
                   "margin": {"thresholds": margins, **adaptive(lambda z, k: z["margin"][k] >= margins[k])}}
    routed = [z for z in report if z["top"] >= tau]
    f = len(routed) / M
    out["routing"] = {"cap": cap, "threshold": tau, "fraction": f, "fraction_stderr": se((z["document"], z["top"] >= tau, 1) for z in report),
                      "oracle_fraction": sum(z["regret"] <= cap for z in report) / M, "agreement": sum(z["agree"][0] for z in routed) / len(routed),
                      "base_agreement": sum(z["agree"][0] for z in report) / M, "mean_cost": sum(max(z["regret"], 0) for z in routed) / len(routed),
                      "projected_speedup": weights[-1] / (f * weights[0] + (1 - f) * weights[-1]), "projected_speedup_card": 1 / (1 - 0.49 * f), "curve": []}
    for percent in range(5, 101, 5):
        ordered = sorted((z["top"] for z in calibration), reverse=True)
        level = ordered[-(-len(ordered) * percent // 100) - 1]
        leaving = [z for z in report if z["top"] >= level]
        out["routing"]["curve"].append({"threshold": level, "fraction": len(leaving) / M, "agreement": sum(z["agree"][0] for z in leaving) / len(leaving),
                                        "agreement_stderr": se((z["document"], z["agree"][0] and z["top"] >= level, z["top"] >= level) for z in report)})
    return out


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
    """(model, slice, metrics) with caps at which bounds, margins and routing all let positions out, some of them wrongly."""
    model, (mix, tokenizer) = settled(), byte_mix()
    part = Slice(mix, 50, 17, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "MARGIN_CAP", MARGIN_CAP)
        return model, part, measure(model, part, 7, CAP)


def test_every_quantity_equals_the_naive_twin(measured):
    model, part, metrics = measured
    expected = twin(model, part.mix, 50, 17, cap=CAP, margin_cap=MARGIN_CAP)
    assert_equal(metrics, expected)
    wand, margin, routing = expected["wand"], expected["wand"]["margin"], expected["routing"]
    for what in (wand["exit_fraction"][0], wand["exit_fraction"][1], margin["exit_fraction"][0], margin["violation_rate"], 1 - routing["fraction"],
                 routing["fraction"], 1 - routing["agreement"], max(wand["exceedance"])):
        assert 0 < what < 1, expected                               # every branch of the twin was taken


def test_every_sum_of_the_light_pass_equals_the_full_one_and_needs_no_merged_heads(measured, monkeypatch):
    monkeypatch.setitem(evaluate.CHUNK_LOGITS, "cpu", 7 * 257)      # chunks of 7 tokens
    model, part, metrics = measured
    light = score(model, part.mix, 50, part.tokenizer, batch_size=3)
    assert_equal({name: summarize(light)[name] for name in ("tokens", "bytes", "bpb", "crossover_gap")}, {name: metrics[name] for name in ("tokens", "bytes", "crossover_gap")}, rel=1e-12)
    assert light.keys() == {"tokens", "bytes", "nats_single", "nats_prefix", "hits_single", "hits_prefix"} and len(light["nats_prefix"]) == 3
    assert summarize(light)["accuracy"]["single"] == metrics["accuracy"]["single"]


def test_no_figure_depends_on_batch_or_chunk_size(measured, monkeypatch):
    model, part, metrics = measured
    monkeypatch.setattr(evaluate, "MARGIN_CAP", MARGIN_CAP)
    for batch, chunk in ((1, 2 ** 20), (50, 257), (13, 3 * 257)):
        monkeypatch.setitem(evaluate.CHUNK_LOGITS, "cpu", chunk)
        other = measure(model, part, batch, CAP)
        other.pop("blocks")
        assert_equal(metrics, other, rel=1e-11)


def test_statistics_are_those_of_model_combine():
    """The algebra on unnormalised scores equals log_softmax of log_softmaxes, in float32 within its rounding."""
    draw = torch.Generator().manual_seed(0)
    logits, y = [8 * torch.randn(31, 257, generator=draw) for _ in range(3)], torch.randint(257, (31,), generator=draw)
    found, total = token_statistics(logits, y, True), 0
    for k in range(3):
        total = total + torch.log_softmax(15 * torch.tanh(logits[k] / 15), -1)
        prefix = combine(total, k + 1)
        assert torch.allclose(found["nats_prefix"][:, k], -prefix.gather(1, y[:, None])[:, 0], rtol=0, atol=1e-5)
        assert torch.equal(found["hits_prefix"][:, k] > 0, prefix.argmax(-1) == y)
    for i, alpha in enumerate(evaluate.ALPHAS):
        assert torch.allclose(found["nats_alpha"][:, i], -combine(total, 3, alpha).gather(1, y[:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_a_uniform_model_has_log2_of_the_vocabulary_over_the_bytes_of_a_token():
    model = make(vocab_size=257)
    with torch.no_grad():
        for head in (model.lm_head, *model.lm_head_stages):
            head.weight.zero_()
    mix, tokenizer = byte_mix()
    metrics = summarize(score(model, mix, 10, tokenizer, batch_size=4))
    assert metrics["bpb"]["full"] == pytest.approx(math.log2(257) / 1, rel=1e-12)      # every counted token is one byte
    assert metrics["bytes"] == metrics["tokens"] < 110                                 # bos counts neither


def test_identities(measured):
    metrics = measured[2]
    bpb, wand = metrics["bpb"], metrics["wand"]
    assert bpb["prefix"][0] == bpb["single"][0]
    assert bpb["prefix"][-1] == bpb["full"] == pytest.approx(metrics["alpha_sweep"]["0"], rel=1e-15)
    assert metrics["crossover_gap"] == bpb["full"] - bpb["single"][-1]
    for form in (wand, wand["margin"]):
        assert sum(form["exit_fraction"]) == pytest.approx(1, rel=1e-12)
        assert 1 - form["agreement"] == pytest.approx(form["violation_rate"] * (1 - form["exit_fraction"][-1]), abs=1e-12)
    assert metrics["routing"]["curve"][-1]["agreement"] == pytest.approx(metrics["routing"]["base_agreement"], rel=1e-12)       # all leave
    assert bpb["full"] * math.log(2) * metrics["bytes"] == pytest.approx(sum(map(float, metrics["blocks"]["bpb"]["full"].split())), rel=1e-6)
    for of, hits in ((metrics["accuracy"]["full"], metrics["blocks"]["accuracy"]["full"]),
                     *zip(metrics["accuracy"]["single"], metrics["blocks"]["accuracy"]["single"])):
        assert of * sum(map(int, metrics["blocks"]["tokens"].split())) == pytest.approx(sum(map(int, hits.split())), rel=1e-12)


def test_one_stage_has_no_adaptive_figures_and_no_gap():
    mix, tokenizer = byte_mix()
    metrics = measure(make(vocab_size=257, stage_layers=(5,), objective="bp"), Slice(mix, 20, 4, tokenizer), 6, CAP)
    assert metrics["wand"] is metrics["routing"] is metrics["speculative"] is None and metrics["crossover_gap"] == 0
    assert metrics["alpha_sweep"]["1"] == pytest.approx(metrics["bpb"]["full"], rel=1e-12)      # K^alpha = 1


# ---------------------------------------------------------------------------------------------------------------
# The slice, calibration, bytes, errors of ratios

def test_calibration_and_report_share_no_document(measured):
    part = measured[1]
    inside, outside = set(part.documents[:17].flat), set(part.documents[part.in_report])
    assert not inside & outside and outside and not part.in_report[:17].any()
    assert inside & set(part.documents[17:].flat)       # the negative control: leaving out windows alone would not have done it
    assert len(set(part.documents.flat)) == part.documents.max() + 1
    again = Slice(part.mix, 50, 17, part.tokenizer)
    assert (again.in_report == part.in_report).all() and again.sha256 == part.sha256


def test_documents_are_those_of_the_stream_even_where_one_spans_many_windows():
    tokens = np.zeros(100, np.uint16)
    tokens[[0, 3, 61, 62]] = BOS                        # documents of 3, 58, 1 and 38 tokens; the second spans windows 0 to 5
    mix = Mix([Source("a", 1, [tokens[:50], tokens[50:]])], 11, 0)
    number = evaluate.slice_documents(mix, 9, BOS)
    window = mix.locate(np.arange(9))[2].astype(int)
    expected = np.array([[np.searchsorted([3, 61, 62], w * 11 + t + 1, side="right") for t in range(11)] for w in window])
    assert (number == expected).all()


def test_a_slice_of_one_document_has_nothing_to_report_on():
    tokens = np.zeros(200, np.uint16)
    with pytest.raises(ValueError, match="none is left.*lower --wand-tokens"):
        Slice(Mix([Source("a", 1, [tokens])], 11, 0), 9, 2, Tokenizer.load(vocab_size=257))


def test_fit_threshold_is_the_smallest_score_within_the_cap():
    score, cost = np.array([0.9, 0.8, 0.7, 0.7, 0.2]), np.array([0.0, 0.0, 1.0, 0.0, 0.0])
    assert fit_threshold(score, cost, 0.0) == 0.8
    assert fit_threshold(score, cost, 0.2) == 0.2       # 1 / 5 over all five
    assert fit_threshold(score, cost, 0.24) == 0.2 and fit_threshold(score, cost, 0.19) == 0.8          # equal scores stay together
    assert fit_threshold(score, cost + 1, 0.5) == math.inf == fit_threshold(score[:0], cost[:0], 1.0)
    draw = np.random.default_rng(0)
    for _ in range(50):
        score, cost, cap = draw.integers(0, 9, 23) / 8, draw.random(23), draw.random()
        assert fit_threshold(score, cost, cap) == naive_threshold(score.tolist(), cost.tolist(), cap)


def test_a_bound_is_exceeded_by_at_most_a_hundredth_where_it_was_fitted_and_by_more_when_halved():
    draw = np.random.default_rng(0)
    columns = {name: draw.random((1013, 2)) for name in ("range", "margin")} | {"agree": np.ones((1013, 2)), "confidence": draw.random((1013, 1)), "regret": np.zeros((1013, 1))}
    fitted = calibrate(columns, np.arange(1013) % 128, 0.0)
    exceedance = (columns["range"] > fitted["bounds"]).mean(axis=0)
    assert (exceedance <= 0.01).all() and (exceedance > 0.008).all()
    assert ((columns["range"] > fitted["bounds"] / 2).mean(axis=0) > 0.4).all()
    assert (fitted["remaining"] == [fitted["bounds"].sum(), fitted["bounds"][1]]).all()
    assert [evaluate.quantile_index(n, 99) for n in (1, 99, 100, 101, 200)] == [0, 98, 98, 99, 197]


def test_the_error_of_a_bound_knows_that_the_positions_of_a_document_are_alike():
    draw = np.random.default_rng(1)
    documents = np.repeat(np.arange(500), 20)
    ranges = 1.0 + draw.random(500)[documents] + 0.1 * draw.random(10_000)

    def fit(rows, blocks):
        one = np.ones((len(rows), 1))
        return calibrate({"range": ranges[rows, None], "margin": one, "agree": one, "confidence": one, "regret": one}, blocks, 0.0)["bounds_stderr"][0]
    stderr = fit(np.arange(10_000), documents % evaluate.N_BLOCKS)
    drawn = [np.concatenate([np.arange(20 * d, 20 * d + 20) for d in draw.integers(0, 500, 500)]) for _ in range(200)]      # documents, with replacement
    bootstrap = np.std([np.sort(ranges[rows])[evaluate.quantile_index(10_000, 99)] for rows in drawn])
    independent = fit(np.arange(10_000), np.arange(10_000) % evaluate.N_BLOCKS)
    assert 0.6 < stderr / bootstrap < 1.6 and independent < 0.5 * stderr, (stderr, bootstrap, independent)


def test_a_true_bound_is_never_violated_and_half_of_it_is():
    """Over a vocabulary of 5 and the largest range there is: no decided top token is overtaken. With half the bounds some are."""
    draw = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(4001, 5, generator=draw, dtype=torch.float64) for _ in range(3)]
    columns = token_statistics(logits, torch.zeros(4001, dtype=torch.int64), True)
    bounds = columns["range"].amax(dim=0)
    fitted = {"bounds": bounds, "margins": bounds, "tau": torch.ones(1), "levels": torch.ones(20)}
    for scale, violated in ((1.0, False), (0.25, True)):
        fitted["remaining"] = scale * bounds.flip(0).cumsum(0).flip(0)
        found = evaluate.adaptive_statistics(columns, fitted, 0.02)
        assert (found["wand_violation"].sum() > 0) == violated
        assert found["wand_exit"][:, :-1].sum() > 0 or not violated


def test_3b_reads_the_bytes_that_the_specification_counts():
    with torch.device("meta"):
        read = stage_bytes(PoE(PRESETS["3b"], torch.bfloat16))
    assert [round(b / 1e9, 3) for b in (read[0], read[-1] - read[0], read[-1])] == [2.215, 2.483, 4.698]
    assert read[-1] / read[0] == pytest.approx(2.12, abs=0.005)
    report = {"tokens": np.ones((2, 1)), "exceedance": np.zeros((2, 3)), "base_agree": np.ones((2, 1)), "oracle": np.ones((2, 1)), "cost": np.zeros((2, 1)),
              "routed": np.array([[1.0], [0.0]]), "routed_agree": np.array([[1.0], [0.0]]), "curve": np.ones((2, 20)), "curve_agree": np.ones((2, 20)),
              **{f"{m}_violation": np.zeros((2, 1)) for m in ("wand", "margin")}, **{f"{m}_exit": np.array([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]) for m in ("wand", "margin")}}
    found = {"bounds": np.ones(3), "bounds_stderr": np.zeros(3), "margins": np.ones(3), "tau": np.ones(1), "levels": np.ones(20)}
    metrics = adaptive_metrics(report, found, 0.02, read)
    assert metrics["routing"]["projected_speedup"] == metrics["wand"]["projected_speedup"] == pytest.approx(4.698 / (0.5 * 2.215 + 0.5 * 4.698), abs=1e-4)


def test_ratio_and_its_error_by_hand():
    # documents with 1 of 2, 3 of 4 and none of 0: R = 4/6; residuals 1 - 4/3 = -1/3 and 3 - 8/3 = 1/3; se^2 = 2/1 (1/9 + 1/9) / 36
    value, error = ratio(np.array([1.0, 3.0, 0.0]), np.array([2.0, 4.0, 0.0]))
    assert value == pytest.approx(4 / 6) and error == pytest.approx(math.sqrt(2 * 2 / 9 / 36))
    assert ratio(np.zeros(3), np.zeros(3)) == (None, None) and ratio(np.array([1.0, 0]), np.array([2.0, 0])) == (0.5, None)


def test_paired_error_of_a_difference_is_that_of_the_differences():
    def row(nats):
        return {"bpb": {"full": sum(nats) / math.log(2) / 10}, "settings": {"slice_sha256": "x"}, "blocks": {"bytes": "2 4 4", "bpb": {"full": " ".join(map(str, nats))}}}
    column = evaluate.Column("full", ("bpb", "full"), 6, -1, "")
    delta, error = evaluate.change(column, row([5.0, 9.0, 9.5]), row([4.0, 7.0, 7.5]))
    per_byte = np.array([1.0, 2.0, 2.0]) / math.log(2) - delta * np.array([2.0, 4.0, 4.0])
    assert delta == pytest.approx(0.5 / math.log(2)) and error == pytest.approx(math.sqrt(1.5 * (per_byte ** 2).sum()) / 10, abs=1e-12)
    assert error < 1e-9                                             # each document changes by the same per byte: no doubt at all

    def hits(of_blocks):
        return {"accuracy": {"full": sum(of_blocks) / 10, "full_stderr": 0.2}, "settings": {"slice_sha256": "x"},
                "blocks": {"bytes": "9 9 9", "tokens": "2 4 4", "accuracy": {"full": " ".join(map(str, of_blocks))}}}
    delta, error = evaluate.change(evaluate.Column("full", ("accuracy", "full"), 4, 1, ""), hits([2, 3, 1]), hits([1, 2, 0]))
    # 3 more of 10; residuals 1 - 0.3 * 2 = 0.4, 1 - 0.3 * 4 = -0.2 twice; se^2 = 3/2 (0.16 + 0.04 + 0.04) / 100
    assert delta == pytest.approx(0.3) and error == pytest.approx(math.sqrt(1.5 * 0.24) / 10)
    rates = [{"accuracy": {"single": [0.5], "single_stderr": [e]}} for e in (0.03, 0.04)]      # of other text, or measured without sums
    assert evaluate.change(evaluate.Column("s0", ("accuracy", "single", 0), 4, 1, ""), *rates) == (0.0, pytest.approx(0.05))


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


def test_facts_are_graded_by_substring(monkeypatch):
    said = dict(zip(evaluate.PROBE, [" Paris.", " Au, number 7.", "", "", " " + ", ".join(evaluate.PLANETS[:7]), "", " 12"]))
    monkeypatch.setattr(evaluate, "complete", lambda model, tokenizer, prompts, n, plan: iter([{"completion": said[prompts[0]]}]))
    samples, facts = evaluate.probe(make(sequence_len=257, vocab_size=257), Tokenizer.load(vocab_size=257))
    assert facts == {"Paris": True, "Au": True, "79": False, "planets": False, "planets_named": 7, "2": True}
    assert [s["prompt"] for s in samples] == list(evaluate.PROBE) and samples[0]["completion"] == " Paris."


def test_a_damaged_validation_shard_is_named(trained, monkeypatch):
    data = open_data(str(json.loads((trained / "config.json").read_text())["train"]["data"]), 300)
    monkeypatch.setattr(type(data.val(16).sources[0]), "window", lambda self, w, T: np.full(T + 1, 65535, dtype=np.uint16))
    with pytest.raises(ValueError, match="prose holds token 65535, beyond the vocabulary of 300"):
        Slice(data.val(16), 40, 10, data.tokenizer)


def test_speculation_counts_drafts_on_documents_that_did_not_calibrate(trained):
    data = open_data(str(json.loads((trained / "config.json").read_text())["train"]["data"]), 300)
    part, model = Slice(data.val(16), 40, 10, data.tokenizer), load_checkpoint(trained, dtype=torch.float64)[0]
    prompts = evaluate.document_prompts(part, 5, 8)
    assert prompts and all(len(ids) == 8 and ids[0] == 299 and 299 not in ids[1:] for ids in prompts)
    metrics, timings = evaluate.speculation(model, part, 5, False)
    assert metrics["identical_to_plain"] and metrics["prompts"] == len(prompts) and metrics["new_tokens"] == 9
    plain = sample.Engine(model, sample.Plan(range(3)))
    accepted = judged = 0
    for ids in prompts:                                         # by hand: draft 4 by s0 from the text so far, compare with full's text
        text = ids + sample.decode_timed(plain, ids, 30).ids[:15]
        place = len(ids)
        while place < len(ids) + 9:
            drafts = list(text[:place])
            for _ in range(4):
                drafts.append(int(model.log_probs(0, next(model.boundaries(torch.tensor([drafts])))[:, -1]).argmax()))
            right = next((i for i in range(4) if drafts[place + i] != text[place + i]), 4)
            accepted, judged, place = accepted + right, judged + min(right + 1, 4), place + right + 1
    assert (metrics["acceptance"], metrics["judged"]) == (pytest.approx(accepted / judged), judged)
    assert timings["speedup"] == pytest.approx(timings["speculative_tokens_per_s"] / timings["plain_tokens_per_s"]) and metrics["card_prompts"]["acceptance"] is not None


# ---------------------------------------------------------------------------------------------------------------
# The card

def card_rows():
    """The card's tables as metrics.json-like dicts, {step: (metrics, timings)}, and its data lines."""
    tables = [[line for line in part.splitlines() if line.startswith("| `")] for part in (Path(__file__).parent / "card.md").read_text().split("### ")[1:]]
    rows = {}
    for number, lines in enumerate(tables):
        for line in lines:
            step, *cells = [float(cell.strip().replace(",", "").rstrip("%x")) for cell in line.strip("| ").split("|")[1:]]
            m, timings = rows.setdefault(int(step), ({"format": 1, "step": int(step), "samples": None, "facts": None}, {}))
            if number == 0:
                m["train_log_bpb"] = {"full": cells[1], "tokens": 41_943_040}
            elif number == 1:
                m["bpb"] = {"full": cells[0], "single": cells[1:5], "prefix": [*cells[5:], cells[0]]}
            elif number == 2:
                m["accuracy"] = {"single": cells[:4], "full": cells[4]}
            elif number == 3:
                m["speculative"] = {"draft_len": 4, "acceptance": cells[0], "mean_accepted": cells[1]}
                timings["speculative"] = {"speedup": cells[2]}
            elif number == 4:
                m["routing"] = {"cap": 0.02, "fraction": cells[0] / 100, "projected_speedup": cells[1], "base_agreement": cells[2]}
            elif number == 5:
                m["wand"] = {"p99_bounds": cells}
            else:
                m |= {"alpha_sweep": dict(zip(("0", "0.25", "0.5", "0.75", "1"), cells)), "crossover_gap": cells[5]}
    rows[83923][0]["facts"] = {"Paris": True, "Au": True, "79": True, "planets": True, "2": False}          # as its text says
    rows[84000][0]["facts"] = {"Paris": True, "Au": True, "79": False, "planets": False, "2": False}
    return rows, [line for lines in tables for line in lines]


CARD_RECORD = {"model": {"sequence_len": 2048, "vocab_size": 32768}, "train": {"matrix_lr": 0.015, "embedding_lr": 0.3, "unembedding_lr": 0.008}, "phases": [
    {"anchor_step": 0, "anchor_sample": 0, "batch": 384, "mix": "frontier_v1", "num_steps": 83923, "warmup_steps": 1000, "peak_lrm": 1.0, "warmdown_ratio": 0.65, "final_lrm": 0.05},
    {"anchor_step": 83923, "anchor_sample": 83923 * 384, "batch": 384, "mix": "frontier_v1", "num_steps": 50800, "warmup_steps": 1000, "peak_lrm": 0.5, "warmdown_ratio": 0.55, "final_lrm": 0.0}]}


def write_run(out, rows, record):
    out.mkdir()
    (out / "config.json").write_text(json.dumps(record))
    for step, (metrics, timings) in rows.items():
        folder = out / f"step-{step:05d}"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "timings.json").write_text(json.dumps(timings))
    return out


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """(the report of the card's own numbers, its reading as JSON, the rows)."""
    rows, lines = card_rows()
    run = write_run(tmp_path_factory.mktemp("card") / "continual", rows, CARD_RECORD)
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(args[0]))
        evaluate.main([str(run), "--no-measure"])
        evaluate.main([str(run), "--no-measure", "--json"])
    assert (run / "TRAJECTORY.md").read_text() == printed[0] and (run / "trajectory.png").read_bytes()[:4] == b"\x89PNG"
    return printed[0], json.loads(printed[-1]), rows, lines


def test_the_cards_own_rows_are_printed_to_the_digit(card):
    text, _, rows, lines = card
    assert len(rows) == 15 and len(lines) == 105
    assert not [line for line in lines if line not in text]
    for m, _ in rows.values():                                      # the identities of SPEC 7, on printed digits
        assert m["bpb"]["prefix"][0] == m["bpb"]["single"][0] and m["alpha_sweep"]["0"] == m["bpb"]["full"]
        assert abs(m["crossover_gap"] - (m["bpb"]["full"] - m["bpb"]["single"][3])) < 1.5e-6
    assert sum(abs(m["crossover_gap"] - (m["bpb"]["full"] - m["bpb"]["single"][3])) > 5e-7 for m, _ in rows.values()) == 3      # printed as given


def test_the_cards_deltas_are_printed_to_the_digit(card):
    text = card[0]
    def cells(title, step):
        part = text.split(f"### {title}")[1].split("###")[0]
        return next(line for line in part.splitlines() if line.startswith(f"| `step-{step}` ") and " / " in line)
    for title, step, expected in (
            ("Per-stage BPB", 84000, "-0.000151 / -0.000151 | -0.000157 / -0.000157"), ("Per-stage BPB", 86000, "+0.097608 / +0.097457"),
            ("Per-stage BPB", 110000, "| -0.005612 / +0.077558 | -0.005636 / +0.077931 |"), ("Per-checkpoint val BPB", 86000, "+0.102830 / +0.102608"),
            ("Per-stage standalone target accuracy", 110000, "+0.0032 / -0.0345 | +0.0031 / -0.0347 |"), ("Self-speculative", 98000, "-0.0611 / -0.0610"),
            ("Self-speculative", 110000, "-0.0218 / -0.0477 | +0.00 / -0.16 | -0.02 / -0.08"), ("Confidence-aware", 96000, "-7.18 pp / -14.54 pp"),
            ("WAND p99", 94000, "-0.4795 / -0.6462 | -0.2412 / -0.3953 | -0.1752 / -0.2777"), ("Bayesian PoE", 108000, "-0.000222 / -0.000514 |")):
        assert expected in cells(title, step), cells(title, step)


def test_what_the_cards_text_states_is_found_and_its_numbers_win_over_its_prose(card):
    text, reading, rows, _ = card
    assert (reading["reference"], reading["seed"], reading["entry"], reading["last"]) == (83923, True, 86000, 110000)
    assert reading["below_entry"] == 102000 and reading["below_reference"] is None
    full = reading["series"]["bpb.full"]
    assert full["records"] == [102000, 106000, 108000, 110000]      # so step 94,000 was no low of its phase: step 86,000 is below it
    assert full["in_a_row"] == 3 and full["low"] == [110000, 0.802296] and full["high"] == [88000, 0.832245]
    assert reading["negative_gaps"] == [108000] and reading["gap_changes_sign"] == [108000, 110000]
    assert reading["levels"] == {"102000": 0.82, "108000": 0.81}    # step 108,000 was the first below 0.81
    acceptance = reading["series"]["speculative.acceptance"]
    assert acceptance["high"] == [92000, 0.9970] and acceptance["setback"] == [98000, pytest.approx(-0.0611)]       # larger than step 110,000's
    routing = reading["series"]["routing.fraction"]
    assert routing["high"] == [94000, pytest.approx(0.7769)]
    bounds = [reading["series"][f"wand.p99_bounds.{k}"] for k in range(3)]
    assert all(b["low"][0] == 94000 for b in bounds) and reading["questions"]["bounds"] == ["narrower"] * 3
    accuracy = [reading["series"][name] for name in ("accuracy.full", *(f"accuracy.single.{k}" for k in range(4)))]
    assert all(a["records"][-3:] == [106000, 108000, 110000] and a["in_a_row"] == 3 for a in accuracy)
    assert (reading["remaining_steps"], reading["end"]) == (24723, 134723)              # not about 10,000
    assert reading["projection"] == pytest.approx(0.733, abs=5e-4) and reading["rate_per_2000_steps"] == pytest.approx(-0.0056, abs=1e-4)
    assert reading["verdict"] == "regression" and reading["noise_known"] is False
    assert reading["questions"]["facts"] == {"Paris": [True, True], "Au": [True, True], "79": [True, False], "planets": [True, False], "2": [False, False]}
    for words in ("no standard error given", "first below 0.81", "New lows: `step-102000`, `step-106000`, `step-108000`, `step-110000`. 3 descents in a row.",
                  "24,723 steps remain to 134,723", "rel_it = 24,077 (warmdown +1,217, lrm = 0.478)", "rel_it = 77 (warmup +77, lrm = 0.039)",
                  "| token budget | 40 B | 66 B |", "| effective `matrix_lr` peak | 0.0075 | 0.015 |", "| total steps in phase | 50,800 | 83,923 |",
                  "Paris ✓ | Au ✓ 79 ✗ | planets ✗ | 2 ✗ |", "| pending |", "**Verdict: regression** against the seed so far"):
        assert words in text, words


def with_blocks(row, nats, sha="x"):
    return {**row, "bpb": {**row["bpb"], "full": sum(nats) / math.log(2) / 40}, "settings": {"slice_sha256": sha, "split_tokens": 1, "wand_tokens": 1}, "blocks": {"bytes": "10 10 10 10", "bpb": {"full": " ".join(map(str, nats))}}}


def test_a_change_within_two_standard_errors_is_noise_and_the_verdict_null(card):
    rows = [dict(m, timings={}, phase=None) for m, _ in card[2].values()][:2]
    for nats, descent in (([7.0, 7.2, 6.8, 7.1], "noise"), ([6.0, 6.01, 5.99, 6.0], "better")):
        pair = [with_blocks(rows[0], [7.0, 7.1, 7.0, 6.9]), with_blocks({**rows[1], "accuracy": {"single": [0.5] * 4, "full": 0.5}}, nats)]
        reading = evaluate.read_trajectory(pair, [])
        assert reading["questions"]["descent"] == descent and reading["noise_known"]
        assert reading["verdict"] == ("null" if descent == "noise" else "win")
    assert "≈" in evaluate.report("r", *(lambda p: (p, [], {}, evaluate.read_trajectory(p, [])))([with_blocks(rows[0], [7, 7.1, 7, 6.9]), with_blocks(rows[1], [7, 7.2, 6.8, 7])]))


def test_two_runs_stand_side_by_side_with_the_gap_in_percent(card, tmp_path, capsys, refused, undrawn):
    rows = {step: card[2][step] for step in (108000, 110000)}
    poe = {step: ({**m, "bpb": {**m["bpb"], "full": 0.7209}}, t) for step, (m, t) in rows.items()}
    bp = {step: ({**m, "bpb": {"full": 0.6768, "single": [0.6768], "prefix": [0.6768]}, "accuracy": {"full": 0.5, "single": [0.5]}, "crossover_gap": 0.0, "wand": None, "routing": None,
                  "speculative": None}, {}) for step, (m, _) in rows.items()}
    runs = [write_run(tmp_path / name, r, CARD_RECORD) for name, r in (("poe", poe), ("bp", bp))]
    evaluate.main([*map(str, runs), "--no-measure"])
    out = capsys.readouterr().out
    assert "| A `step-110000` | 110,000 | 0.720900 |" in out and "| B `step-110000` | 110,000 | 0.676800 | — | — | — | — |" in out
    assert "| gap |  | +6.52 % |" in out                            # the family's published gap
    assert (runs[0] / "TRAJECTORY.md").exists() and "One stage" in (runs[1] / "TRAJECTORY.md").read_text()
    assert "left out" not in out
    one = tmp_path / "one"
    for step, common in (("step-110000", "the steps that both have. Checkpoints left out: 1."), ("step-110001", "the last step of each: they have none in common. Checkpoints left out: 1.")):
        shutil.copytree(runs[1], one)
        shutil.rmtree(one / "step-108000")
        (one / "step-110000").rename(one / step)
        metrics = json.loads((one / step / "metrics.json").read_text())
        (one / step / "metrics.json").write_text(json.dumps({**metrics, "step": int(step[5:])}))
        evaluate.main([str(runs[0]), str(one), "--no-measure"])
        assert f"Rows are {common}" in capsys.readouterr().out
        shutil.rmtree(one)
    (runs[1] / "config.json").write_text(json.dumps({**CARD_RECORD, "model": {"sequence_len": 2048, "vocab_size": 1024}}))
    line = refused(evaluate.main, *runs, "--no-measure")
    assert "32768 ids" in line and "1024 ids" in line and "one vocabulary" in line
    for run, sha in zip(runs, "ab"):
        (run / "config.json").write_text(json.dumps(CARD_RECORD))
        for path in run.glob("step-*/metrics.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {"slice_sha256": sha, "split_tokens": 1, "wand_tokens": 1}}))
    assert "different text" in refused(evaluate.main, *runs, "--no-measure")


def test_tables_come_out_without_matplotlib(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", card_rows()[0], CARD_RECORD)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluate.main([str(run), "--no-measure"])
    printed = capsys.readouterr()
    assert "### WAND p99 bounds" in printed.out and "matplotlib is missing" in printed.err and "trajectory.png" not in printed.out
    assert not (run / "trajectory.png").exists() and (run / "TRAJECTORY.md").exists()


@pytest.mark.parametrize("matplotlib_is_there", [True, False])
def test_a_report_that_cannot_be_written_is_printed_with_matplotlib_and_without(matplotlib_is_there, tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", card_rows()[0], CARD_RECORD)
    for name in ("TRAJECTORY.md", "trajectory.png"):
        (run / name / "in-the-way").mkdir(parents=True)             # no file can take the place of a directory
    if not matplotlib_is_there:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluate.main([str(run), "--no-measure"])
    printed = capsys.readouterr()
    assert "### WAND p99 bounds" in printed.out and "not written, only printed" in printed.err
    assert ("matplotlib is missing" in printed.err) is not matplotlib_is_there


def test_metrics_of_another_format_are_named_and_the_others_reported(tmp_path, capsys, undrawn):
    rows = card_rows()[0]
    rows[84000][0]["format"] = 0
    run = write_run(tmp_path / "run", rows, CARD_RECORD)
    (run / "step-112000").mkdir()
    with pytest.raises(ValueError, match="2 of 16 checkpoints.*step-84000.*step-112000"):
        evaluate.main([str(run), "--no-measure"])
    printed = capsys.readouterr()
    assert "older or foreign format" in printed.err and "has no metrics.json" in printed.err and "`step-110000`" in printed.out


# ---------------------------------------------------------------------------------------------------------------
# The script on real checkpoints

ARGUMENTS = ["--split-tokens", "640", "--wand-tokens", "160", "--device", "cpu", "--dtype", "float64", "--speculative-prompts", "0"]


@pytest.fixture
def undrawn(monkeypatch):
    """Leave out the picture, half a second each, where a test is about something else."""
    monkeypatch.setattr(evaluate, "draw", lambda *args: None)


def without(metrics, *names):
    return {name: value for name, value in metrics.items() if name not in names}


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A run measured by the script, hard-linked to `trained` where it could be, and what it printed."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained, run, copy_function=os.link)
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(args[0]))
        evaluate.main([str(run), *ARGUMENTS])
    return run, printed[0]


def test_the_script_measures_every_step_and_writes_metrics(evaluated, trained):
    run, out = evaluated
    assert "| Branch | Step | full K=3 | single s0 | single s1 | single s2 | prefix K'=1 | prefix K'=2 |" in out
    assert "| `step-00003` | 3 |" in out and "| `step-00006` | 6 |" in out
    metrics = json.loads((run / "step-00006" / "metrics.json").read_text())
    assert {"format", "settings", "step", "phase", "tokens", "bytes", "train_log_bpb", "bpb", "accuracy", "alpha_sweep", "crossover_gap", "wand", "routing",
            "speculative", "samples", "facts"} <= metrics.keys()
    assert {"split_tokens", "wand_tokens", "seed", "slice_sha256", "weights_sha256"} <= metrics["settings"].keys()
    assert metrics["settings"]["weights_sha256"] == load_checkpoint(run / "step-00006")[2]
    assert metrics["phase"] == {"rel_it": 6, "lrm": pytest.approx(0.05), "position": "final", "offset": 0} and len(metrics["samples"]) == 7
    assert metrics["tokens"] + sum(b == 299 for i in range(40) for b in open_data(str(json.loads((run / "config.json").read_text())["train"]["data"]), 300).val(16).batch([i])[1][0]) == 640
    log = [e for e in evaluate.read_log(run / "log.jsonl") if e["kind"] == "val"][-1]
    assert metrics["train_log_bpb"] == {"full": log["bpb"]["full"], "tokens": log["tokens"]}
    assert (run / "TRAJECTORY.md").read_text() == out and json.loads((run / "step-00006" / "timings.json").read_text())["evaluate"]["pass_seconds"] > 0


def test_bounds_go_into_config_json_alone_and_not_into_the_run_it_is_linked_to(evaluated, trained):
    run, _ = evaluated
    for step in ("step-00003", "step-00006"):
        ours, theirs = (json.loads((r / step / "config.json").read_text()) for r in (run, trained))
        assert ours.pop("poe_wand_p99_bounds_per_stage_head") == json.loads((run / step / "metrics.json").read_text())["wand"]["p99_bounds"]
        assert ours == theirs and list(ours) == list(theirs)
        assert verify_checkpoint(run / step) and os.stat(run / step / "model.pt").st_nlink > 1
        assert {p.name for p in (run / step).iterdir()} - {p.name for p in (trained / step).iterdir()} == {"metrics.json", "timings.json"}


def test_what_is_measured_with_the_same_settings_is_skipped_and_all_else_measured_again(evaluated, tmp_path, monkeypatch, capsys, undrawn):
    run = tmp_path / "run"
    shutil.copytree(evaluated[0], run)
    calls = []
    real = evaluate.measure
    monkeypatch.setattr(evaluate, "measure", lambda *args: calls.append(1) or real(*args))
    config = json.loads((run / "step-00003" / "config.json").read_text())
    bounds = config.pop("poe_wand_p99_bounds_per_stage_head")
    (run / "step-00003" / "config.json").write_text(json.dumps(config))
    evaluate.main([str(run), *ARGUMENTS, "--json"])
    assert not calls and json.loads((run / "step-00003" / "config.json").read_text())["poe_wand_p99_bounds_per_stage_head"] == bounds       # missing bounds come back
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("kind") or line["step"] for line in lines] == [3, 6, "trajectory"]
    old = json.loads((run / "step-00003" / "metrics.json").read_text())
    (run / "step-00003" / "metrics.json").write_text(json.dumps(old | {"format": 0, "settings": [], "wand": 1}))       # an older format
    (run / "step-00006" / "metrics.json").write_text(json.dumps(json.loads((run / "step-00006" / "metrics.json").read_text()) | {"speculative": {"acceptance": 0.5}}))
    evaluate.main([str(run), *ARGUMENTS])
    assert len(calls) == 1 and json.loads((run / "step-00003" / "metrics.json").read_text()) == old         # a pure function of weights and slice
    evaluate.main([str(run / "step-00006"), *ARGUMENTS[:3], "320", *ARGUMENTS[4:]])
    changed = json.loads((run / "step-00006" / "metrics.json").read_text())
    assert len(calls) == 2 and changed["wand"]["tokens"] > old["wand"]["tokens"]


def test_two_ranks_share_the_slice_and_get_the_same_sums(evaluated, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(evaluated[0], run)
    for path in run.glob("step-*/metrics.json"):
        path.unlink()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen([sys.executable, evaluate.__file__, str(run), str(run / "step-00003"), *ARGUMENTS, "--device-batch-size", "3"], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for r in range(2)]
    outs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outs
    assert said_by_us(outs[1][0]) == "" and "| `step-00006` | 6 |" in outs[0][0]
    for step in ("step-00003", "step-00006"):
        ours, alone = (json.loads((r / step / "metrics.json").read_text()) for r in (run, evaluated[0]))
        assert_equal(without(ours, "blocks"), without(alone, "blocks"), rel=1e-11)


def test_a_failure_of_rank_0_alone_skips_the_checkpoint_on_all(evaluated, tmp_path):
    from test_ranks import run_ranks
    run = tmp_path / "run"
    shutil.copytree(evaluated[0], run)

    def spoil(rank):
        evaluate.probe = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        read = evaluate.read_object
        evaluate.read_object = lambda path: {} if rank == 0 and path.name == "metrics.json" else read(path)          # rank 0 has measured nothing yet
    codes, output = run_ranks(2, [str(run), *ARGUMENTS, "--samples"], tmp_path, spoil, main=evaluate.main)
    assert codes == [2, 2] and output[0].count("skipping") == 2 and "2 of 2 checkpoints could not be reported" in output[0] and not output[1], output


def test_checkpoints_of_several_runs_are_told_apart(evaluated, tmp_path, capsys):
    for name in "ab":
        shutil.copytree(evaluated[0] / "step-00006", tmp_path / name / "step-00006")
    steps = [str(tmp_path / name / "step-00006") for name in "ab"]
    evaluate.main([*steps, *ARGUMENTS])
    out = capsys.readouterr().out
    assert all(f"| `step-00006` of {tmp_path / name} | 6 |" in out for name in "ab")
    other = json.loads((tmp_path / "b" / "step-00006" / "metrics.json").read_text())
    other["settings"]["slice_sha256"] = "0" * 64
    (tmp_path / "b" / "step-00006" / "metrics.json").write_text(json.dumps(other))
    evaluate.main([*steps, "--no-measure"])
    assert capsys.readouterr().out.count("### Per-stage BPB") == 2           # texts differ: no common table
    (tmp_path / "a" / "step-00006" / "metrics.json").unlink()
    with pytest.raises(ValueError, match=rf"1 of 2 checkpoints could not be reported: {steps[0]}"):
        evaluate.main([*steps, "--no-measure", "--json"])
    assert json.loads(capsys.readouterr().out)["step"] == 6


@pytest.mark.parametrize("change", [{"facts": {"x": 1}}, {"bpb": {"full": 1.0, "single": [1.0, "x"], "prefix": [1.0, 1.0]}}, {"blocks": {"bytes": "1 2", "bpb": {"full": "1"}}},
                                    {"wand": 5}, {"routing": {"curve": [{}]}}, {"samples": 3}, {"accuracy": {"full": 0.5}}, {"phase": "x"}])
def test_metrics_from_another_hand_end_in_a_report_or_in_one_line_that_names_the_run(change, evaluated, tmp_path, capsys, undrawn):
    run = tmp_path / "run"
    shutil.copytree(evaluated[0], run)
    file = run / "step-00006" / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    try:
        evaluate.main([str(run), "--no-measure"])
    except ValueError as e:
        assert str(run) in str(e), e


def test_one_bad_checkpoint_does_not_stop_the_others(evaluated, tmp_path, capsys, refused, undrawn):
    run = tmp_path / "run"
    shutil.copytree(evaluated[0], run)
    shutil.copytree(run / "step-00003", run / "step-00005")
    with open(run / "step-00005" / "model.pt", "ab") as f:
        f.write(b"x")
    (run / "step-00005" / "metrics.json").unlink()
    (run / ".tmp-step-00007").mkdir()                               # a checkpoint being written right now
    with pytest.raises(ValueError, match=r"1 of 3 checkpoints.*step-00005"):
        evaluate.main([str(run), *ARGUMENTS])
    printed = capsys.readouterr()
    assert "skipping" in printed.err and "does not match its manifest" in printed.err
    assert "`step-00006`" in printed.out and "`step-00005`" not in printed.out
    assert "being written right now" in refused(evaluate.main, run / ".tmp-step-00007", *ARGUMENTS)


def test_rows_of_a_continued_run_take_its_own_phase_table(evaluated, tmp_path, capsys, undrawn):
    run = tmp_path / "run"
    shutil.copytree(evaluated[0], run)
    shutil.rmtree(run / "step-00003")
    record = json.loads((run / "config.json").read_text())
    first = {**record["phases"][0], "num_steps": 6}
    record["phases"] = [first, {**first, "anchor_step": 6, "anchor_sample": 24, "num_steps": 10, "peak_lrm": 0.5, "warmup_steps": 4, "matrix_lr": 0.7}]
    (run / "config.json").write_text(json.dumps(record))
    evaluate.main([str(run), *ARGUMENTS])
    out = capsys.readouterr().out
    assert "| `step-00006` (seed) | 6 | rel_it = 0 (warmup +0, lrm = 0.125) | seed: the last checkpoint of the phase before |" in out
    assert "| effective `matrix_lr` peak | 0.35 | 0.03 |" in out             # 0.5 x 0.7; each phase has its own
    (run / "config.json").write_text(json.dumps(record | {"train": {**record["train"], "data": "other-data"}}))
    with pytest.raises(FileNotFoundError, match="other-data"):      # all rows of a run on its own data, the seed included
        evaluate.main([str(run), *ARGUMENTS])
    (run / "config.json").write_text(json.dumps(record | {"phases": [{"anchor": 0}]}))
    with pytest.raises(ValueError, match="no phase table"):
        evaluate.main([str(run), *ARGUMENTS])


def test_step_directories_are_ordered_by_number(trained, tmp_path):
    for name in ("step-100000", "step-84000"):
        (tmp_path / name).mkdir()
    assert [p.name for p in evaluate.checkpoint_steps(tmp_path)] == ["step-84000", "step-100000"]


@pytest.mark.parametrize("argv, words", [(["--split-tokens", "9999999"], ["9999999", "lower"]), (["--split-tokens", "0"], ["split-tokens 0"]),
                                         (["--split-tokens", "640", "--wand-tokens", "640"], ["wand-tokens 640", "from 16 (one window) to 624"]),
                                         (["--split-tokens", "16"], ["wand-tokens 16", "raise --split-tokens"]), (["--routing-cap", "-1"], ["routing-cap -1"]), (["--data", "nowhere"], ["nowhere"]), (["--data", ""], ["another tokenizer"])])
def test_bad_input_gets_one_line(argv, words, trained, refused, monkeypatch):
    if argv[1] == "":
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
    assert "not finite" in refused(evaluate.main, step, *ARGUMENTS)
    assert not (step / "metrics.json").exists()


def test_a_run_without_checkpoints_is_named(tmp_path, refused):
    assert "holds no step-XXXXX" in refused(evaluate.main, tmp_path)
