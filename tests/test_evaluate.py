"""
evaluate.py against a naive twin (whole probabilities, loops over positions and documents) and hand counts.

Run: python -m pytest tests/test_evaluate.py
"""

import contextlib
import io
import json
import math
import os
import shutil
from operator import eq

import numpy as np
import pytest
import torch

import evaluate
from checkpoint import (
    BOUNDS_KEY,
    load_checkpoint,
    read_json,
    read_record,
    verify_checkpoint,
    write_json,
    write_manifest,
)
from common import sha256_of, write_whole
from conftest import change_json, log_lines, table, weights
from dataloader import Mix, Source, Tokenizer, open_data
from evaluate import Slice, measure, score, slice_metrics, slice_text, summarize
from model import PRESETS, PoE, stage_bytes
from report import lookup, stderr_path
from sample import Engine, Plan, decode_timed
from test_model import make
from test_ranks import run_ranks

BOS = 256
CAP = 0.1
MARGIN_CAP = 0.15


def byte_mix():
    """Windows of 11 tokens over two sources of bytes with a bos now and then: documents span several."""
    draw = np.random.Generator(np.random.PCG64(0))
    sources = []
    for name, weight, size, period in (("a", 2, 400, 29), ("b", 1, 207, 37)):
        tokens = draw.integers(0, 23, size).astype(np.uint16)
        tokens[::period] = BOS
        sources.append(Source(name, weight, [tokens[:41], tokens[41:]]))
    return Mix(sources, 11, 0), Tokenizer.load(vocab_size=257)


def settled():
    """A small model whose later stages change little: early exits, violations and routing all occur."""
    model = make(vocab_size=257)
    with torch.no_grad():
        for factor, layers in zip((0.2, 0.02), model.layers_of_stage[1:]):
            for i in layers:
                model.blocks[i].attn.c_proj.weight.mul_(factor)
                model.blocks[i].mlp.c_proj.weight.mul_(factor)
        for head in model.lm_head_stages:
            head.weight.mul_(0.05)
        model.lm_head.weight[23:] -= 0.2  # the text holds 23 kinds of bytes
    return model


# --------------------------------------------------------------------------------------------------
# The naive twin


@torch.no_grad()
def positions(model, mix, n_windows):
    """What the definitions need of each counted position, without sharing code: its window, document and
    target (N,), and the distributions of the stages (N, K, V).
    """
    heads = [model.lm_head.weight + head.weight for head in model.lm_head_stages]
    found = []
    for i in range(n_windows):
        idx, targets = mix.batch(np.array([i]))
        source, _, window = (int(a[0]) for a in mix.locate([i]))
        stream = np.concatenate(mix.sources[source].shards)
        p = [torch.softmax(15 * torch.tanh(torch.nn.functional.rms_norm(x, (x.size(-1),)) @ W.T / 15), -1)[0]
             for x, W in zip(model.boundaries(idx), heads)]
        for t, y in enumerate(targets[0].tolist()):
            if y != BOS:
                document = (stream[:window * mix.T + t + 2] == BOS).sum() + 1000 * source
                found.append((i, document, y, np.stack([q[t].numpy() for q in p])))
    return map(np.array, zip(*found))


def naive_threshold(score, cost, cap, documents, stays):
    """The smallest score of all for which those that stay have a mean cost within the cap at its upper limit:
    sum(e) + 1.645 sqrt(sum(e^2)) <= 0 of cost - cap by document and of one more position of cost 1.
    """
    found = math.inf
    for t in sorted(score, reverse=True):
        here = stays & (score >= t)
        excess = np.array([1 - cap, *((cost - cap)[here & (documents == d)].sum() for d in set(documents))])
        if excess.sum() + 1.645 * np.sqrt((excess**2).sum()) <= 0:
            found = t
    return found


def twin(model, mix, n_windows, n_calibration):
    """metrics.json's figures from whole distributions."""
    windows, documents, y, p = positions(model, mix, n_windows)
    N, K, _ = p.shape
    # geometric means, then renormalised
    q = np.exp(np.cumsum(np.log(p), axis=1) / np.arange(1, K + 1)[:, None])
    q /= q.sum(-1, keepdims=True)

    def bits(of):
        # every counted token is one byte
        return -np.log2(np.take_along_axis(of, y[:, None, None], 2))[..., 0]

    def bpb(here):
        single, prefix = (bits(of)[here].mean(0) for of in (p, q))
        return {"full": prefix[-1], "single": single, "prefix": prefix}

    # of K = 3
    alphas = {name: np.prod(p, axis=1, keepdims=True) ** (3 ** float(name) / 3)
              for name in ("0", "0.25", "0.5", "0.75", "1")}
    whole = bpb(y >= 0)
    hits, hits_full = ((of.argmax(-1) == y[:, None]).mean(0) for of in (p, q))
    figures = {"tokens": N, "bytes": N, "bpb": whole, "accuracy": {"full": hits_full[-1], "single": hits},
               "crossover_gap": whole["full"] - whole["single"][-1],
               "alpha_sweep": {name: bits(of / of.sum(-1, keepdims=True)).mean()
                               for name, of in alphas.items()},
               "sources": {name: {"bytes": here.sum(), "bpb": bpb(here)}
                           for name, here in (("a", documents < 1000), ("b", documents >= 1000))}}

    ranges = np.ptp(np.diff(np.log(q), axis=1), axis=-1)
    second, first = np.moveaxis(np.sort(np.log(q), axis=-1)[..., -2:], -1, 0)
    margin = (first - second)[:, :-1]
    agree = q.argmax(-1) == q[:, -1:].argmax(-1)
    top = p[:, 0].max(-1)
    regret = np.log(np.take_along_axis(q[:, -1] / p[:, 0], y[:, None], 1))[:, 0]
    c = windows < n_calibration
    r = ~np.isin(documents, documents[c])
    bounds = np.array([min(v for v in of[c] if 100 * (of[c] <= v).sum() >= 99 * c.sum()) for of in ranges.T])
    margins = []
    stays = c[c]
    for k in range(K - 1):
        margins.append(naive_threshold(margin[c, k], ~agree[c, k], MARGIN_CAP, documents[c], stays))
        stays = stays & (margin[c, k] < margins[-1])
    tau = naive_threshold(top[c], np.maximum(regret[c], 0), CAP, documents[c], c[c])

    # c_q, c_proj; c_k, c_v; c_fc, c_proj of CONFIG, by hand
    layer = 2 * 12 * 12 + 2 * 12 * (12 // 6 * 3) + 2 * 12 * 17
    weights = np.cumsum([len(part) * layer + 257 * 12 for part in model.layers_of_stage])

    def adaptive(leaves):
        exits = np.hstack([leaves, np.ones((N, 1), bool)]).argmax(1)[r]
        agreeing = agree[r, exits].mean()
        return {"exit_fraction": np.bincount(exits, minlength=K) / r.sum(), "agreement": agreeing,
                "violation_rate": (1 - agreeing) / (exits < K - 1).mean(),
                "projected_speedup": weights[-1] / weights[exits].mean()}

    remaining = np.cumsum(bounds[::-1])[::-1]
    routed = r & (top >= tau)
    share = routed.sum() / r.sum()
    return figures | {
        "wand": {"p99_bounds": bounds, "tokens": c.sum(), "report_tokens": r.sum(),
                 **adaptive(margin > remaining), "exceedance": (ranges > bounds)[r].mean(0),
                 "margin": {"thresholds": margins, **adaptive(margin >= margins)}},
        "routing": {"cap": CAP, "threshold": tau, "fraction": share, "agreement": agree[routed, 0].mean(),
                    "oracle_fraction": (regret <= CAP)[r].mean(), "base_agreement": agree[r, 0].mean(),
                    "mean_cost": np.maximum(regret, 0)[routed].mean(),
                    "projected_speedup": weights[-1] / (share * weights[0] + (1 - share) * weights[-1])}}


def assert_equal(found, expected, path="", rel=1e-9):
    """Every figure of `expected` is in `found`, to `rel`; resamples, which are text, are left out."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if "_resamples" not in key:
                assert_equal(found[key], value, f"{path}.{key}", rel)
    else:
        # nan where it is None
        found, expected = (np.array(value, dtype=float) for value in (found, expected))
        assert found == pytest.approx(expected, rel=rel, abs=1e-13, nan_ok=True), path


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
    expected = twin(model, part.mix, 50, 17)
    assert_equal(metrics, expected)
    # every branch of the twin was taken
    wand = expected["wand"]
    routing = expected["routing"]
    shares = [*wand["exit_fraction"][1:], *wand["margin"]["exit_fraction"], wand["margin"]["violation_rate"],
              routing["agreement"], max(wand["exceedance"])]
    assert all(0 < share < 1 for share in shares), expected


def test_no_figure_depends_on_batch_or_chunk_size_and_the_light_pass_gives_the_same(measured, monkeypatch):
    model, part, metrics = measured
    monkeypatch.setattr(evaluate, "MARGIN_CAP", MARGIN_CAP)
    monkeypatch.setitem(evaluate.CHUNK_LOGITS, "cpu", 3 * 257)
    assert_equal(metrics, measure(model, part, 13, CAP), rel=1e-11)
    light = score(model, part.mix, 50, part.tokenizer, batch_size=3)
    assert_equal(metrics, summarize(light), rel=1e-12)


def test_a_sources_figures_and_errors_are_those_of_a_slice_that_holds_it_alone():
    draw = np.random.Generator(np.random.PCG64(1))
    names = ("tokens", "bytes", "nats_single", "nats_prefix", "hits_single", "hits_prefix", "nats_alpha")
    sums = {name: draw.random((3 * evaluate.N_BLOCKS, 4)) for name in names}
    of_last = {name: value[-evaluate.N_BLOCKS:] for name, value in sums.items()}
    blocks = np.arange(97)
    assert_equal(slice_metrics(sums, blocks, [0, 0, 1]), slice_metrics(of_last, blocks, [1]))
    # of a single block of documents errors are not known
    assert slice_metrics(sums, [7], [0, 0, 1])["bpb"]["full_stderr"] is None


def test_one_stage_has_no_adaptive_figures_and_no_gap():
    mix, tokenizer = byte_mix()
    model = make(vocab_size=257, stage_layers=(5,), objective="bp")
    metrics = measure(model, Slice(mix, 20, 4, tokenizer), 6, CAP)
    assert metrics["wand"] is metrics["routing"] is None and metrics["crossover_gap"] == 0


# --------------------------------------------------------------------------------------------------
# The slice, calibration, bytes, errors of ratios


def test_calibration_and_report_share_no_document(measured):
    # of 45 windows, which hold some of nearly every document, every second document calibrates nothing
    for n in (17, 45):
        part = Slice(measured[1].mix, 50, n, byte_mix()[1])
        calibrating = set(part.documents[:n][~part.in_report[:n]])
        reported = set(part.documents[n:][part.in_report[n:]])
        assert calibrating and reported and not calibrating & reported
        # the negative control: leaving out windows alone would not have done it
        assert calibrating & {*part.documents[n:].flat}


def test_a_rate_of_none_or_all_has_half_the_rule_of_threes_limit_as_its_error():
    n = np.array([50.0, 40.0, 60.0])
    found = evaluate.ratios(n, rates=np.array([0 * n, n]), some=n / 2)
    assert found["rates"] == [0, 1] and found["rates_stderr"] == [1.5 / 50] * 2 and found["some_stderr"] == 0
    assert evaluate.ratios(0 * n, none=0 * n)["none"] is None


def early_exit(columns, calibrating, reported):
    """Early exit of K = 2 fitted on some documents, of 50 positions each, and reported on others: metrics."""
    there, here = ({name: column[documents].reshape(-1, 1) for name, column in columns.items()}
                   for documents in (calibrating, reported))
    fits = evaluate.calibrate(there, np.arange(len(calibrating)).repeat(50), 0.04)
    blocks = np.arange(len(reported)).repeat(50)
    counts = evaluate.block_weights(blocks, 1)[:, blocks].T
    here, thresholds = ({name: torch.from_numpy(a) for name, a in arrays.items()} for arrays in (here, fits))
    sums = evaluate.exit_statistics(here, thresholds, torch.from_numpy(counts), 0.04)
    figures = evaluate.exit_metrics({name: a.numpy() for name, a in sums.items()}, fits, 0.04, [1, 2])
    return {"resamples": evaluate.take_resamples(figures), **figures}


def test_errors_of_rates_are_those_of_a_bootstrap_by_document_with_a_new_calibration(monkeypatch):
    monkeypatch.setattr(evaluate, "MARGIN_CAP", 0.04)
    monkeypatch.setattr(evaluate, "N_CANDIDATES", 100)
    draw = np.random.default_rng(3)
    hard = draw.normal(0, 0.4, (120, 1))
    margin = np.exp(draw.normal(0, 1, (120, 50)) - hard)
    chance = draw.random((120, 50))
    columns = {"margin": margin, "confidence": 1 - np.exp(-margin), "range": np.exp(hard) * chance,
               "agree": 1.0 * (draw.random((120, 50)) > 0.5 * np.exp(hard - margin)),
               "regret": 0.3 * draw.normal(0, 1, (120, 50)) * np.exp(hard - margin)}
    found = early_exit(columns, np.arange(50), np.arange(50, 120))
    assert 0.1 < found["routing"]["fraction"] < 0.9
    monkeypatch.setattr(evaluate, "N_RESAMPLES", 2)
    drawn = [early_exit(columns, draw.integers(0, 50, 50), draw.integers(50, 120, 70)) for _ in range(150)]
    for path in ("routing/fraction", "wand/margin/exit_fraction/0", "wand/margin/violation_rate",
                 "wand/p99_bounds/0", "wand/exceedance/0"):
        expected = np.std([lookup(row, path) for row in drawn])
        # 100 resamples know an error to 7 %, 150 to 5.8 %: 2.7 times what both come to; the seed is fixed
        assert lookup(found, stderr_path(path)) == pytest.approx(expected, rel=0.25), path


def test_3b_reads_the_bytes_that_the_specification_counts():
    with torch.device("meta"):
        read = stage_bytes(PoE(PRESETS["3b"], torch.bfloat16))
    assert [round(b / 1e9, 3) for b in (read[0], read[-1])] == [2.215, 4.698]


def test_slice_text_is_the_targets_bytes_in_the_corpus_order():
    mix, tokenizer = byte_mix()
    source, _, window = mix.locate(np.arange(20))
    windows = [mix.sources[s].window(w, 11)[1:] for s, w in sorted(zip(source.tolist(), window.tolist()))]
    text = tokenizer.decode_bytes(np.concatenate(windows).tolist())
    assert slice_text(mix, 20, tokenizer)[0] == text


def test_facts_are_words_and_numbers_standing_alone():
    texts = [" Paris.", " August 1979", "", "", " " + ", ".join(evaluate.PLANETS[:7]), "", "12 or -2.5"]
    _, facts = evaluate.probe(texts)
    assert facts == {"Paris": True, "Au": False, "79": False, "2": False, "planets": False}
    assert all(evaluate.stands_alone("2", text) for text in ("x=2", " 2.", "(2)", "2, then 3"))


def test_speculation_counts_drafts_on_documents_that_did_not_calibrate(trained, monkeypatch):
    monkeypatch.setattr(evaluate, "NEW_TOKENS", 7)
    model, record, _ = load_checkpoint(trained, dtype=torch.float64)
    data = open_data(read_record(trained)["train"]["data"], 300)
    part = Slice(data.val(16), 40, 10, data.tokenizer)
    prompts = evaluate.document_prompts(part, 5, 8)
    assert prompts and all(len(ids) == 8 and ids[0] == 299 and 299 not in ids[1:] for ids in prompts)
    found, _ = evaluate.generate_texts(model, part, 5, False)
    metrics = found["speculative"]
    assert metrics["identical_to_plain"] and metrics["draft_weights"] == "same"
    # by hand: draft 4 by s0 from the text so far, compare with full's text; what has no room is not judged
    s0, full = (Engine(model, Plan(range(n))) for n in (1, 3))
    accepted = judged = 0
    for ids in prompts:
        text = ids + decode_timed(full, ids, 7).ids
        place = 8
        while place + 4 <= 15:
            drafts = decode_timed(s0, text[:place], 4).ids
            right = [*map(eq, drafts, text[place:]), False].index(False)
            accepted += right
            judged += min(right + 1, 4)
            place += right + 1
    assert (metrics["acceptance"], metrics["judged"]) == (pytest.approx(accepted / judged), judged)


# --------------------------------------------------------------------------------------------------
# The script on real checkpoints

ARGUMENTS = """--split-tokens 640 --wand-tokens 160 --device cpu --dtype float64
               --speculative-prompts 0""".split()


def evaluate_runs(*argv):
    evaluate.main([*ARGUMENTS, *map(str, argv)])


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A run measured by the script, hard-linked to `trained` where it could be, and what it printed."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained, run, copy_function=os.link)
    old = {"kind": "val_old", "step": 6, "mix": "before", "bpb": {"full": 2.5}, "tokens": 7}
    log = (run / "log.jsonl").read_bytes()
    write_whole(run / "log.jsonl", log, json.dumps(old).encode())
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate_runs(run)
    return run, printed.getvalue()


@pytest.fixture
def run(evaluated, tmp_path, monkeypatch):
    """A copy of the measured run, to be changed; its picture, half a second each, is left out."""

    monkeypatch.setattr("report.find_spec", lambda name: None)
    return shutil.copytree(evaluated[0], tmp_path / "run")


def test_the_script_measures_every_step_and_writes_metrics(evaluated):
    run, summary = evaluated
    assert "`step-00006`, 640 tokens" in summary and "verdict" in summary and summary.count("\n") < 25
    metrics = read_json(run / "step-00006" / "metrics.json")
    assert metrics["settings"]["weights_sha256"] == load_checkpoint(run)[2] and len(metrics["samples"]) == 7
    assert metrics["phase"] == {"rel_it": 6, "lrm": pytest.approx(0.05), "position": "final", "offset": 0}
    # the resamples stand at the end, and nowhere else
    resamples = metrics.pop("resamples")
    assert len(resamples["wand"]["margin"]["exit_fraction"][2].split()) == evaluate.N_RESAMPLES
    assert "resamples" not in json.dumps(metrics)
    logged = log_lines(run, "val")[-1]
    assert metrics["train_log_bpb"] == {"mix": logged["mix"], "full": logged["bpb"]["full"], "tokens": 319}
    assert metrics["train_log_bpb_old"] == [{"mix": "before", "full": 2.5, "tokens": 7}]


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
    file = run / "step-00003" / "metrics.json"
    evaluate_runs(run, "--json")
    lines = [*map(json.loads, capsys.readouterr().out.splitlines())]
    assert [line.get("kind") or line["step"] for line in lines] == [3, 6, "trajectory"] and not calls
    assert lines[0]["resamples"] is None
    old = read_json(file)
    change_json(file, format=0, wand=1)
    evaluate_runs(run)
    # a pure function of weights and slice
    assert len(calls) == 1 and read_json(file) == old
    evaluate_runs(file.parent, "--wand-tokens", 320)
    assert len(calls) == 2 and read_json(file)["wand"]["tokens"] > old["wand"]["tokens"]


@pytest.fixture
def unmeasured(run):
    """A copy of the run without its metrics."""
    for path in run.glob("step-*/metrics.json"):
        path.unlink()
    return run


def test_two_ranks_share_the_slice_and_get_the_same_sums(evaluated, unmeasured, tmp_path):
    run = unmeasured
    codes, output = run_ranks(2, [run, *ARGUMENTS, "--device-batch-size", "3"], tmp_path, main=evaluate.main)
    assert codes == [0, 0] and "`step-00006`" in output[0] and not output[1], output
    for step in ("step-00003", "step-00006"):
        ours, alone = (read_json(r / step / "metrics.json") for r in (run, evaluated[0]))
        for name in ("bpb", "accuracy", "wand", "routing"):
            assert_equal(ours[name], alone[name], rel=1e-11)


def test_a_failure_of_rank_0_alone_skips_the_checkpoint_on_all(unmeasured, tmp_path):
    def full_disk(rank):
        evaluate.generate_texts = lambda *args: open("/dev/full", "w", buffering=1).write("\n")

    codes, output = run_ranks(2, [unmeasured, *ARGUMENTS], tmp_path, full_disk, main=evaluate.main)
    assert codes == [2, 2] and "2 of 2 checkpoints could not" in output[0] and not output[1], output


def test_damaged_checkpoints_are_named_and_do_not_stop_the_others(unmeasured, capsys):
    run = unmeasured
    for name in ("step-00004", "step-00005"):
        step = shutil.copytree(run / "step-00003", run / name)
        torch.save({name: weight * math.nan for name, weight in weights(step).items()}, step / "model.pt")
    write_manifest(step, verify_checkpoint(run / "step-00003") | {"model.pt": sha256_of(step / "model.pt")})
    words = r"2 of 4 checkpoints.*step-00004.*model.pt was altered.*step-00005: its log-probabilities are not"
    with pytest.raises(ValueError, match=words):
        evaluate_runs(run)
    assert "`step-00006`" in capsys.readouterr().out


def test_runs_are_compared_at_their_last_steps_and_refused_before_measuring_where_texts_differ(
    run, tmp_path, monkeypatch, capsys, refused
):
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "step-00006")
    entry = {"variant": "rc", "requests_sha256": "abcdefgh", "normalisation": "acc_raw",
             "heads": {"full": {"gold_bpb": 2.0, "gold_bpb_stderr": 0.1}}}
    for step in (run / "step-00006", other / "step-00003"):
        write_json(step / "tasks.json", {"quiz": entry})
    evaluate_runs(run, other)
    out = capsys.readouterr().out
    # names begin where the paths part
    assert "| run | 6 |" in out and "| other | 3 |" in out
    assert "| quiz rc, abcdef, acc_raw: gold_bpb | 2.000000 ± 0.100000 | +0.000000≈ ± 0.141421 |" in out
    model = read_json(other / "config.json")["model"]
    change_json(other / "config.json", model=model | {"sequence_len": 8})
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", None)  # nothing is measured
    assert "cannot be compared" in refused(evaluate.main, run, other, *ARGUMENTS)


@pytest.mark.parametrize("argv, words", table("""
    --split-tokens 9999999               | split-tokens 9999999
    --wand-tokens 15                     | 16 tokens or more
    --split-tokens 640 --wand-tokens 640 | wand-tokens
    --routing-cap nan                    | routing-cap: nan
    --data=                              | --data: an empty path"""))
def test_bad_input_gets_one_line(argv, words, trained, refused):
    assert words in refused(evaluate.main, trained / "step-00006", *argv.split())


def test_data_that_is_not_what_the_run_was_trained_on_is_refused(run, refused, monkeypatch):
    monkeypatch.setattr(evaluate, "open_data", lambda path, vocab: open_data("", vocab + 1))
    assert "another tokenizer" in refused(evaluate.main, run)
    monkeypatch.undo()
    record = read_json(run / "config.json")
    # the run's record counts for all steps, whatever their own names
    for key, value, words in (("mix_sha256", "made anew", "is not the data that"), ("mix", "other", "other")):
        record["phases"][-1][key] = value
        write_json(run / "config.json", record)
        assert words in refused(evaluate.main, run / "step-00003", *ARGUMENTS)


def test_what_was_measured_is_shown_where_it_cannot_be_written(run, monkeypatch, capsys):
    def read_only(path, *content):
        raise OSError(30, "Read-only file system", str(path))
    monkeypatch.setattr(evaluate, "write_json", read_only)
    monkeypatch.setattr("report.write_whole", read_only)
    with pytest.raises(ValueError, match="not written.*step-00006/timings.json"):
        evaluate_runs(run, "--wand-tokens", 320)
    assert "`step-00006`, 640 tokens" in capsys.readouterr().out
