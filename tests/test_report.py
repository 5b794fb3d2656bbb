"""
report.py against hand counts and the model card.

Run: python -m pytest tests/test_report.py
card.md holds the card's tables verbatim: fed with them, the report must print the same rows and find what the
card's text states, and where its prose contradicts its numbers, the numbers.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import report
from model import ModelConfig, flops_per_token
from report import change, compare, compute_multiplier, ratio, read_trajectory, write_report
from schedule import phase_of

PHASE = {"batch": 384, "mix": "frontier_v1", "mix_sha256": "m", "warmup_steps": 1000, "matrix_lr": 0.015,
         "embedding_lr": 0.3, "unembedding_lr": 0.008}
CARD_RECORD = {"model": {"sequence_len": 2048}, "tokenizer": {"sha256": "t"}, "phases": [
    {**PHASE, "anchor_step": 0, "anchor_sample": 0, "num_steps": 83923, "peak_lrm": 1.0,
     "warmdown_ratio": 0.65, "final_lrm": 0.05},
    {**PHASE, "anchor_step": 83923, "anchor_sample": 83923 * 384, "num_steps": 50800, "peak_lrm": 0.5,
     "warmdown_ratio": 0.55, "final_lrm": 0.0}]}


def card_rows():
    """The card's tables as rows of metrics, {step: row}, and its data lines."""
    sections = (Path(__file__).parent / "card.md").read_text().split("### ")[1:]
    tables = [[line for line in section.splitlines() if line.startswith("| `")] for section in sections]
    rows = {}
    for number, lines in enumerate(tables):
        for line in lines:
            cells = [cell.strip().replace(",", "").rstrip("%x") for cell in line.strip("| ").split("|")[1:]]
            step, *figures = map(float, cells)
            row = rows.setdefault(int(step), {
                "step": int(step), "facts": None,
                "settings": {"slice_sha256": "s", "split_tokens": 1048576, "wand_tokens": 131072}})
            if number == 0:
                row["train_log_bpb"] = {"full": figures[1]}
            elif number == 1:
                row["bpb"] = {"full": figures[0], "single": figures[1:5],
                              "prefix": [*figures[5:], figures[0]]}
            elif number == 2:
                row["accuracy"] = {"single": figures[:4], "full": figures[4]}
            elif number == 3:
                row["speculative"] = {"acceptance": figures[0], "mean_accepted": figures[1]}
                row["timings"] = {"speculative": {"speedup": figures[2]}}
            elif number == 4:
                row["routing"] = {"cap": 0.02, "fraction": figures[0] / 100, "projected_speedup": figures[1],
                                  "base_agreement": figures[2]}
            elif number == 5:
                row["wand"] = {"p99_bounds": figures}
            else:
                row["alpha_sweep"] = dict(zip(("0", "0.25", "0.5", "0.75", "1"), figures))
                row["crossover_gap"] = figures[5]
    # as the card's text says
    rows[83923]["facts"] = {"Paris": True, "Au": True, "79": True, "planets": True, "2": False}
    rows[84000]["facts"] = {"Paris": True, "Au": True, "79": False, "planets": False, "2": False}
    return rows, [line for lines in tables for line in lines]


def write_run(out, rows):
    out.mkdir()
    (out / "config.json").write_text(json.dumps(CARD_RECORD))
    for step, row in rows.items():
        folder = out / f"step-{step:05d}"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({key: row[key] for key in row if key != "timings"}))
        (folder / "timings.json").write_text(json.dumps(row["timings"]))
    return out


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """(the report of the card's own numbers, its reading as JSON, the rows, the card's lines)."""
    rows, lines = card_rows()
    run = write_run(tmp_path_factory.mktemp("card") / "continual", rows)
    text, reading = write_report(run)
    assert (run / "TRAJECTORY.md").read_text() == text and "![" in text
    assert (run / "trajectory.png").read_bytes()[:4] == b"\x89PNG"
    return text, json.loads(json.dumps(reading)), rows, lines


# --------------------------------------------------------------------------------------------------
# Figures and their changes

def test_ratio_and_its_error_by_hand():
    # documents with 1 of 2, 3 of 4 and none of 0: R = 4/6; residuals 1 - 4/3 = -1/3 and 3 - 8/3 = 1/3;
    # se^2 = 2/1 (1/9 + 1/9) / 36
    value, error = ratio(np.array([1.0, 3.0, 0.0]), np.array([2.0, 4.0, 0.0]))
    assert value == pytest.approx(4 / 6) and error == pytest.approx(math.sqrt(2 * 2 / 9 / 36))
    assert ratio(np.zeros(3), np.zeros(3)) == (None, None)
    assert ratio(np.array([1.0, 0]), np.array([2.0, 0])) == (0.5, None)


def with_blocks(nats, row={}):
    """A row whose full bpb comes from nats per document, each of 10 bytes."""
    blocks = {"bytes": "10 " * len(nats), "bpb": {"full": " ".join(map(str, nats))}}
    bpb = {**row.get("bpb", {}), "full": sum(nats) / math.log(2) / 10 / len(nats)}
    return {**row, "bpb": bpb, "blocks": blocks}


def test_errors_of_bpb_and_accuracy_are_paired_by_document():
    found = change("bpb/full", with_blocks([5.0, 9.0, 9.5]), with_blocks([4.0, 8.0, 8.5]))
    # every document changes by 0.1 nats a byte: no doubt at all
    assert found["change"] == pytest.approx(0.1 / math.log(2)) and found["stderr"] < 1e-12
    assert found["judged"] == "worse"

    def hits(of_blocks):
        blocks = {"bytes": "9 9 9", "tokens": "2 4 4", "accuracy": {"full": " ".join(map(str, of_blocks))}}
        return {"accuracy": {"full": sum(of_blocks) / 10, "full_stderr": 0.2}, "blocks": blocks}
    found = change("accuracy/full", hits([2, 3, 1]), hits([1, 2, 0]))
    # 3 more of 10; residuals 1 - 0.3 * 2 = 0.4, 1 - 0.3 * 4 = -0.2 twice; se^2 = 3/2 (0.16 + 0.04 + 0.04) /
    # 100
    assert found["change"] == pytest.approx(0.3)
    assert found["stderr"] == pytest.approx(math.sqrt(1.5 * 0.24) / 10)


def test_other_errors_add_in_quadrature_and_twice_the_error_is_noise():
    def row(value, error):
        return {"wand": {"exit_fraction": [0.5, value], "exit_fraction_stderr": [0.0, error],
                         "p99_bounds": [value]}}
    found = change("wand/exit_fraction/1", row(0.59, 0.03), row(0.5, 0.04))
    assert found["stderr"] == pytest.approx(0.05) and found["judged"] == "noise"
    assert change("wand/exit_fraction/1", row(0.61, 0.03), row(0.5, 0.04))["judged"] == "better"
    assert change("wand/p99_bounds/0", row(1, 0), row(2, 0)) == {
        "figure": "wand/p99_bounds/0", "change": -1, "stderr": None, "judged": "narrower"}
    assert change("wand/p99_bounds/1", row(1, 0), row(2, 0)) is None
    assert change("routing/fraction", {"routing": None}, {"routing": {"fraction": 0.5}}) is None


# --------------------------------------------------------------------------------------------------
# The card

def test_the_cards_own_rows_are_printed_to_the_digit(card):
    text, _, rows, lines = card
    assert len(rows) == 15 and len(lines) == 105
    assert not [line for line in lines if line not in text]


def test_the_cards_changes_are_printed_to_the_digit(card):
    for title, step, expected in (
            ("Per-stage BPB", 84000, "-0.000151 / -0.000151 | -0.000157 / -0.000157"),
            ("Per-stage BPB", 86000, "+0.097608 / +0.097457"),
            ("Per-stage BPB", 110000, "| -0.005612 / +0.077558 | -0.005636 / +0.077931 |"),
            ("Per-checkpoint val BPB", 86000, "+0.102830 / +0.102608"),
            ("Per-stage standalone target accuracy", 110000, "+0.0032 / -0.0345 | +0.0031 / -0.0347 |"),
            ("Self-speculative", 98000, "-0.0611 / -0.0610"),
            ("Self-speculative", 110000, "-0.0218 / -0.0477 | +0.00≈ / -0.16 | -0.02x / -0.08x"),
            ("Confidence-aware", 96000, "-7.18 pp / -14.54 pp"),
            ("WAND p99", 94000, "-0.4795 / -0.6462 | -0.2412 / -0.3953 | -0.1752 / -0.2777"),
            ("Bayesian PoE", 108000, "-0.000222 / -0.000514 |")):
        section = card[0].split(f"### {title}")[1].split("###")[0]
        lines = [line for line in section.splitlines() if line.startswith(f"| `step-{step}` ")]
        assert expected in lines[1]


def test_what_the_cards_text_states_is_found_and_its_numbers_win_over_its_prose(card):
    text, reading, _, _ = card
    assert (reading["reference"], reading["last"]) == (83923, 110000)
    assert reading["notes"] == {
        "seed: the end of the phase before": [83923],
        "first after the warmup": [86000], "first below the entry": [102000],
        # so step 94,000 was no low of its phase: step 86,000 is below it
        "new low of full bpb": [102000, 106000, 108000, 110000],
        "new high of full accuracy": [102000, 106000, 108000, 110000],
        "crossover gap negative": [108000]}
    answers = {name: [found["judged"] for found in changes] for name, changes in reading["questions"].items()}
    assert answers == {"descent": ["worse"], "stages": ["worse"] * 4, "accuracy": ["worse"],
                       "routing": ["worse"], "acceptance": ["worse"], "bounds": ["narrower"] * 3}
    assert reading["verdict"] == "regression"
    # not about 10,000
    assert (reading["remaining_steps"], reading["end"]) == (24723, 134723)
    # through 0.813492, 0.807908 and 0.802296, 2,000 steps apart
    rate = (0.802296 - 0.813492) / 2
    assert reading["rate_per_2000_steps"] == pytest.approx(rate)
    assert reading["projection"] == pytest.approx(0.802296 + rate * 24723 / 2000)
    for line in ("| 1. BPB descent past the seed | worse | +0.077558 |",
                 "| 5. WAND bounds | narrower | -0.1659, -0.0689, -0.0362 |",
                 "| Paris: 2 of 2, Au: 2 of 2, 79: 1 of 2, planets: 1 of 2, 2: 0 of 2 |",
                 "| **Verdict** | **regression** |", "| Full bpb per 2,000 steps | -0.005598 |",
                 "| Linear projection to step 134,723 | 0.7331 | +0.0084; 24,723 steps remain |",
                 "| `step-108000` | 108,000 | rel_it = 24,077 (warmdown +1,217, lrm = 0.478) | new low",
                 "rel_it = 77 (warmup +77, lrm = 0.039)", "| effective `matrix_lr` peak | 0.0075 | 0.015 |",
                 "| `num_steps` | 50,800 | 83,923 |", "| `step-84000` | 84,000 | ✓ | ✓ | ✗ | ✗ | ✗ |",
                 "| `step-86000` | 86,000 | pending |"):
        assert line in text, line


# --------------------------------------------------------------------------------------------------
# Other runs

def test_a_change_within_noise_gives_no_verdict(card):
    phases = [phase_of(row) for row in CARD_RECORD["phases"]]
    first, second = list(card[2].values())[:2]
    # accuracy is one more vote for a win, and no other figure votes
    first = {**first, "routing": None, "speculative": None, "accuracy": {"full": 0.4, "single": [0.4] * 4}}
    first = with_blocks([7.0, 7.1, 7.0, 6.9], first)
    for nats, descent, verdict in (
            ([7.0, 7.2, 6.8, 7.1], "noise", "null"), ([6.0, 6.01, 5.99, 6.0], "better", "win"),
            ([8.0, 8.01, 7.99, 8.0], "worse", "null")):
        reading = read_trajectory([first, with_blocks(nats, second)], phases)
        assert (reading["questions"]["descent"][0]["judged"], reading["verdict"]) == (descent, verdict)
    # full bpb alone is no win
    assert read_trajectory([first, with_blocks([6.0, 6.01, 5.99, 6.0], first)], phases)["verdict"] == "null"


def test_steps_not_measured_are_named_and_no_matplotlib_means_no_picture(tmp_path, monkeypatch, capsys):
    rows, _ = card_rows()
    run = write_run(tmp_path / "run", {step: rows[step] for step in (108000, 110000)})
    (run / "step-112000").mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.main([str(run)])
    printed = capsys.readouterr()
    assert "step-112000 is left out" in printed.err and "needs matplotlib" in printed.err
    assert "![" not in printed.out
    assert "| `step-110000` | 110,000 | 26,077 | 0.855854 | 0.802296 |" in printed.out
    assert not (run / "trajectory.png").exists() and (run / "TRAJECTORY.md").read_text() in printed.out

    rows[110000]["settings"]["slice_sha256"] = "other"
    (run / "step-110000" / "metrics.json").write_text(json.dumps(rows[110000]))
    with pytest.raises(ValueError, match="measured on 2 slices"):
        write_report(run)


def one_stage(row):
    bpb = {"full": 0.6768, "single": [0.6768], "prefix": [0.6768]}
    return {**row, "bpb": bpb, "accuracy": {"full": 0.5, "single": [0.5]}, "crossover_gap": 0.0, "wand": None,
            "routing": None, "speculative": None}


def test_one_stage_and_one_checkpoint_make_a_report(tmp_path):
    text, reading = write_report(write_run(tmp_path / "bp", {110000: one_stage(card_rows()[0][110000])}))
    assert reading["questions"]["stages"] == [] and reading["questions"]["descent"] == [None]
    assert "| 3. Routing margin | not measured |" in text and "**not measured**" in text
    assert "WAND p99" not in text and "Change |" not in text


def test_single_checkpoints_of_one_kind_share_their_tables():
    rows = card_rows()[0]
    text = report.tables_of({Path("a/step-108000"): rows[108000], Path("b/step-110000"): rows[110000],
                             Path("bp/step-110000"): one_stage(rows[110000])})
    assert "| `a/step-108000` | 108,000 | 0.807908 |" in text
    assert "| `b/step-110000` | 110,000 | 0.802296 |" in text
    assert text.count("### Per-stage BPB") == 2 and text.count("### WAND p99 bounds") == 1


# --------------------------------------------------------------------------------------------------
# Runs side by side

def a_run(name, row, curve, **phase):
    """A run of one layer, with 10 samples of 5 tokens a step, whose log holds {step: bpb}."""
    model = {"sequence_len": 5, "vocab_size": 7, "n_layer": 1, "n_embd": 4, "n_head": 2, "n_kv_head": 1,
             "mlp_hidden": 3, "stage_layers": [1], "objective": "poe"}
    log = [{"kind": "val", "step": step, "tokens": 99, "bpb": {"full": bpb}} for step, bpb in curve.items()]
    phases = [{**CARD_RECORD["phases"][0], "batch": 10, "num_steps": 100, "warmup_steps": 0, **phase}]
    return {"name": name, "row": row, "log": [{"kind": "header", "step": 0}, *log],
            "record": {"model": model, "tokenizer": {"sha256": "t"}, "phases": phases}}


def test_compute_multiplier_by_hand():
    first = a_run("first", {}, {0: 4.0, 10: 3.0, 20: 2.0, 30: 2.4, 40: 1.0})
    # 2.25 lies three quarters of the way from step 10 to 20: 17.5 steps against 25 of the other
    other = a_run("other", {}, {0: 4.0, 25: 2.25})
    assert compute_multiplier(first, other) == pytest.approx(17.5 / 25, rel=1e-12)
    # of twice the samples a step
    other = a_run("other", {}, {25: 2.25}, batch=20)
    assert compute_multiplier(first, other) == pytest.approx(17.5 / 50, rel=1e-12)
    # of twice the layers
    wide = a_run("other", {}, {25: 2.25})
    wide["record"]["model"].update(n_layer=2, stage_layers=[2])
    flops, wide_flops = (flops_per_token(ModelConfig(**run["record"]["model"])) for run in (first, wide))
    assert compute_multiplier(first, wide) == pytest.approx(17.5 * flops / (25 * wide_flops), rel=1e-12)
    # a phase before: 60 samples in 3 steps, then 10 a step
    later = a_run("other", {}, {13: 2.25})
    later["record"]["phases"].append({**later["record"]["phases"][0], "anchor_step": 3, "anchor_sample": 60})
    assert compute_multiplier(first, later) == pytest.approx(175 / (60 + 100), rel=1e-12)
    assert compute_multiplier(first, first) == 1
    assert compute_multiplier(first, {**first, "log": []}) is None
    for curve, mix in (({25: 0.9}, "m"), ({25: 4.5}, "m"), ({25: 2.25}, "another mix")):
        assert compute_multiplier(first, a_run("other", {}, curve, mix_sha256=mix)) is None


def test_runs_stand_in_one_table_with_gaps_and_multipliers():
    row = card_rows()[0][110000]
    poe = a_run("poe", with_blocks([7.0, 7.1, 7.0, 6.9], row), {0: 4.0, 100: 2.0})
    # each document is worse by the same: without doubt
    again = a_run("again", with_blocks([7.07, 7.17, 7.07, 6.97], row), {100: 3.0})
    bp = a_run("bp", one_stage(row), {100: 1.0})
    lines = compare([poe, again, bp]).splitlines()[-3:]
    full = 28 / 40 / math.log(2)
    assert lines[0] == (f"| poe | 110,000 | 5,500,000 | {full:.6f} "
                        f"| 0.805671 | 0.803292 | 0.802526 | 0.801884 | 0.4513 | 0.4517 "
                        f"| 0.9697 | 0.9375 | 1.000x |")
    assert f"| {full * 1.01:.6f} (+1.00% ± 0.00%) | 0.805671 (+0.00%) |" in lines[1]
    # half of the 100 steps, of the same model
    assert lines[1].endswith("| 0.500x |")
    assert lines[2] == (f"| bp | 110,000 | 5,500,000 | 0.676800 ({0.6768 / full - 1:+.2%}) "
                        f"| 0.676800 | — | — | — | 0.5000 (+10.79%) | 0.5000 | — | — | — |")
