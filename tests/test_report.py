"""
report.py against hand counts and the model card.

Run: python -m pytest tests/test_report.py
card.md holds the card's tables verbatim: fed with them, the report must print the same rows and find what the
card's text states, and where its prose contradicts its numbers, the numbers.
"""
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import report
from checkpoint import write_json
from conftest import change_json
from model import ModelConfig, flops_per_token
from report import change, compare, compute_multiplier, correct, read_trajectory, task_table, write_report
from schedule import phase_of
from test_schedule import CONTINUAL, FIRST

PHASE = {"batch": 384, "mix": "frontier_v1", "mix_sha256": "m", "matrix_lr": 0.015,
         "embedding_lr": 0.3, "unembedding_lr": 0.008}
CARD_RECORD = {"model": {"sequence_len": 2048}, "tokenizer": {"sha256": "t"}, "phases": [
    {**PHASE, **asdict(phase), "anchor_step": phase.anchor, "anchor_sample": phase.anchor * 384}
    for phase in (FIRST, CONTINUAL)]}


def card_rows():
    """The card's tables as rows of metrics, {step: row}, and its data lines."""
    sections = (Path(__file__).parent / "card.md").read_text().split("### ")[1:8]
    tables = [[line for line in section.splitlines() if line.startswith("| `")] for section in sections]
    rows = {}
    # the same checkpoint's line of each table
    for lines in zip(*tables):
        cells = [line.replace(",", "").strip("| ").split("|")[1:] for line in lines]
        figures = [[float(cell.strip(" x%")) / (100 if "%" in cell else 1) for cell in row] for row in cells]
        (step, rel_it, logged, _), (_, full, *bpb), (_, *accuracy), drafts, routing, bounds, alphas = figures
        rows[int(step)] = {
            "step": int(step), "facts": None,
            "settings": {"slice_sha256": "s", "split_tokens": 1048576, "wand_tokens": 131072},
            "phase": {"rel_it": rel_it}, "train_log_bpb": {"full": logged},
            "bpb": {"full": full, "single": bpb[:4], "prefix": bpb[4:]},
            "accuracy": {"full": accuracy[4], "single": accuracy[:4]},
            "speculative": {"acceptance": drafts[1], "mean_accepted": drafts[2]},
            "timings": {"speculative": {"speedup": drafts[3]}},
            "routing": dict(zip(("fraction", "projected_speedup", "base_agreement"), routing[1:])),
            "wand": {"p99_bounds": bounds[1:]},
            "alpha_sweep": dict(zip(("0", "0.25", "0.5", "0.75", "1"), alphas[1:])),
            "crossover_gap": alphas[6]}
    # as the card's text says
    for step, right in ((83923, ("Paris", "Au", "79", "planets")), (84000, ("Paris", "Au"))):
        rows[step]["facts"] = {fact: fact in right for fact in report.FACTS}
    return rows, [line for lines in tables for line in lines]


def write_run(out, rows):
    for step, row in rows.items():
        folder = out / f"step-{step:05d}"
        folder.mkdir(parents=True)
        write_json(folder / "metrics.json", row)
        write_json(folder / "timings.json", row["timings"])
    write_json(out / "config.json", CARD_RECORD)
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

def with_error(full, stderr, resamples=None, **row):
    """A row of one stage with a full bpb, its error and its values in resamples."""
    bpb = {"full": full, "full_stderr": stderr, "single": [full]}
    return {"accuracy": {"full": 0.4, "full_stderr": 0.0}, **row, "bpb": bpb,
            "resamples": {"bpb": {"full": resamples}}}


def test_errors_of_changes_are_paired_by_resample_or_add_in_quadrature():
    first = with_error(1.0, 0.1, "1.0 1.1 0.9 1.05")
    # the text varies by more than the change, which every resample shows alike
    found = change("bpb/full", with_error(1.01, 0.1, "1.01 1.112 0.908 1.06"), first)
    assert found["stderr"] == pytest.approx(math.sqrt(8 / 3) / 1000) and found["judged"] == "worse"
    for value, judged in ((1.09, "noise"), (0.89, "better")):
        found = change("bpb/full", with_error(value, 0.04), with_error(1.0, 0.03))
        assert found["stderr"] == pytest.approx(0.05) and found["judged"] == judged
    bounds = {"wand": {"p99_bounds": [1]}}
    assert change("wand/p99_bounds/0", bounds, bounds)["stderr"] is None
    assert change("wand/p99_bounds/1", bounds, bounds) is change("wand/p99_bounds/0", {}, bounds) is None


def test_of_several_changes_those_count_that_noise_would_not_make():
    # the largest of 3 counts beyond 2.43 standard errors, then the next beyond 2.28, the last beyond 2
    bound = {"figure": "wand/p99_bounds/0", "change": 2.1, "stderr": 1.0, "judged": "wider"}

    def judged(*sizes):
        changes = [{"figure": "bpb", "change": size, "stderr": 1.0, "judged": "worse"} for size in sizes]
        correct([None, *changes, bound])
        return [found["judged"] for found in changes]
    assert judged(2.42, -2.42, 2.3) == ["noise"] * 3 and judged(2.01) == ["worse"]
    assert judged(2.2, -2.45, 2.2) == ["noise", "worse", "noise"]
    assert judged(2.01, -2.45, 2.3) == ["worse"] * 3


def test_a_rate_of_0_prints_its_upper_limit(card):
    row = {**card[2][110000], "name": "x", "settings": {"slice_sha256": "s"}}
    row["wand"] = {**row["wand"], "violation_rate": 0.0, "violation_rate_stderr": 0.00015}
    assert "| 0.000000 (≤ 0.000300) |" in report.tables_text([row])


# --------------------------------------------------------------------------------------------------
# The card

def test_the_cards_own_rows_are_printed_to_the_digit(card):
    text, _, rows, lines = card
    assert len(lines) == 7 * len(rows) == 105
    assert not [line for line in lines if line not in text]


def test_the_cards_changes_are_printed_to_the_digit(card):
    for title, step, expected in (
            ("Per-stage BPB", 84000, "-0.000151 / -0.000151 | -0.000157 / -0.000157"),
            ("Per-checkpoint val BPB", 86000, "+0.102830 / +0.102608"),
            ("Per-stage standalone target accuracy", 110000, "+0.0032 / -0.0345 | +0.0031 / -0.0347 |"),
            ("Self-speculative", 110000, "-0.0218 / -0.0477 | +0.00≈ / -0.16 | -0.02x / -0.08x"),
            ("Confidence-aware", 96000, "-7.18 pp / -14.54 pp"),
            ("WAND p99", 94000, "-0.4795 / -0.6462 | -0.2412 / -0.3953 | -0.1752 / -0.2777"),
            ("Bayesian PoE", 108000, "-0.000222 / -0.000514 |")):
        section = card[0].split(f"### {title}")[1].split("###")[0]
        assert expected in section.split(f"| `step-{step}` ")[2]


def test_what_the_cards_text_states_is_found_and_its_numbers_win_over_its_prose(card):
    text, reading, _, _ = card
    assert (reading["reference"], reading["last"]) == (83923, 110000)
    assert reading["notes"] == {
        "entry: the first after the warmup": [86000],
        # so step 94,000 was no low of its phase: step 86,000 is below it
        "low of full bpb since the entry": [102000, 106000, 108000, 110000],
        "high of full accuracy since the entry": [102000, 106000, 108000, 110000],
        "below `step-83923` (seed) in full bpb": [84000]}
    answers = {name: [found["judged"] for found in changes] for name, changes in reading["questions"].items()}
    assert answers == {"descent": ["worse"], "stages": ["worse"] * 4, "accuracy": ["worse"],
                       "routing": ["worse"], "acceptance": ["worse"], "bounds": ["narrower"] * 3,
                       "old": []}
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
                 "**Verdict: regression**", "| Full bpb per 2,000 steps | -0.005598 |",
                 "| Linear projection to step 134,723 | 0.7331 | +0.0084; 24,723 steps remain |",
                 "| `step-108000` | 108,000 | rel_it = 24,077 (warmdown +1,217, lrm = 0.478) | low of",
                 "rel_it = 77 (warmup +77, lrm = 0.039)", "| effective `matrix_lr` peak | 0.0075 | 0.015 |",
                 "| `num_steps` | 50,800 | 83,923 |", "| `step-84000` | 84,000 | ✓ | ✓ | ✗ | ✗ | ✗ |",
                 "| `step-86000` | 86,000 | pending |"):
        assert line in text, line


# --------------------------------------------------------------------------------------------------
# Other runs

def reading_of(full, remaining=2000, old=(), **last):
    """What the report states of a seed with a full bpb of 0.9 and of a checkpoint 2,077 steps on, whose full
    bpb is `full` standard errors lower and whose accuracy is the same. old: their bpb on earlier data.
    """
    phases = [{**row, "warmup_steps": 0} for row in CARD_RECORD["phases"]]
    phases[1]["num_steps"] = 2077 + remaining
    rows = [with_error(bpb, stderr, step=step, name="x", facts=None, crossover_gap=0)
            for step, bpb, stderr in ((83923, 0.9, 0.0), (86000, 0.9 - 0.01 * full, 0.01))]
    for row, bpb in zip(rows, old):
        row["train_log_bpb_old"] = [{"mix": "prose", "full": bpb}]
    return read_trajectory([rows[0], rows[1] | last], [phase_of(row) for row in phases])


def test_the_verdict_takes_full_bpb_beyond_noise_and_one_more():
    # 2.1 of two changes each is noise by Holm's correction
    for full, accuracy, verdict in ((1.9, 3, "null"), (2.5, 3, "win"), (-2.5, 3, "null"),
                                    (-2.5, -3, "regression"), (2.1, 2.1, "null")):
        last = {"accuracy": {"full": 0.4 + 0.01 * accuracy, "full_stderr": 0.01}}
        assert reading_of(full, **last)["verdict"] == verdict, (full, accuracy)


def test_forgetting_is_a_column_and_makes_the_verdict_mixed(card):
    assert reading_of(2.5, old=(0.8, 0.81))["verdict"].startswith("mixed")
    assert reading_of(2.5, old=(0.8, 0.79))["verdict"] == "win"
    row = {**card[2][110000], "name": "x", "train_log_bpb_old": [{"mix": "prose", "full": 0.8}]}
    row["settings"] = {**row["settings"], "data": "code"}
    text = report.tables_text([row])
    assert "(local slice: text of code)" in text and "BPB on earlier data, prose | Local-slice full" in text


def test_a_finished_phase_has_no_rate_and_no_projection():
    assert ["projection" in reading_of(1, remaining) for remaining in (0, 100)] == [False, True]


def test_steps_not_measured_are_counted_and_no_matplotlib_means_no_picture(tmp_path, monkeypatch, capsys,
                                                                           refused):
    rows, _ = card_rows()
    run = write_run(tmp_path / "run", {step: rows[step] for step in (108000, 110000)})
    (run / "step-112000").mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.main([str(run)])
    printed = capsys.readouterr()
    assert "2 of 3 checkpoints" in printed.err and "pip install matplotlib" in printed.err
    assert "![" not in (run / "TRAJECTORY.md").read_text() and not (run / "trajectory.png").exists()

    change_json(run / "step-110000" / "metrics.json", settings={"slice_sha256": "other"})
    for folder in (run, tmp_path):
        assert f"python evaluate.py {folder}" in refused(report.main, folder)


def one_stage(row):
    bpb = {"full": 0.6768, "single": [0.6768], "prefix": [0.6768]}
    return {**row, "bpb": bpb, "accuracy": {"full": 0.5, "single": [0.5]}, "crossover_gap": 0.0, "wand": None,
            "routing": None, "speculative": None}


def test_one_stage_and_one_checkpoint_make_a_report(tmp_path):
    text, reading = write_report(write_run(tmp_path / "bp", {110000: one_stage(card_rows()[0][110000])}))
    assert reading["questions"]["stages"] == [] and reading["questions"]["descent"] == [None]
    assert "| 3. Routing margin | not measured |" in text and "**Verdict: not measured**" in text
    assert "WAND p99" not in text and "Change |" not in text
    # the prefix of all stages is full
    assert "K'=1" not in text


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
    # twice the layers
    wide = a_run("wide", {}, {25: 2.25})
    wide["record"]["model"].update(n_layer=2, stage_layers=[2])
    flops, wide_flops = (flops_per_token(ModelConfig(**run["record"]["model"])) for run in (first, wide))
    # a phase before: 60 samples in 3 steps, then 10 a step
    later = a_run("later", {}, {13: 2.25})
    later["record"]["phases"].append({**later["record"]["phases"][0], "anchor_step": 3, "anchor_sample": 60})
    # 2.25 lies three quarters of the way from step 10 to 20: 17.5 steps
    for run, expected in ((wide, 17.5 * flops / (25 * wide_flops)), (later, 175 / (60 + 100)), (first, 1)):
        assert compute_multiplier(first, run) == pytest.approx(expected, rel=1e-12)
    for curve, mix in (({25: 0.9}, "m"), ({25: 4.5}, "m"), ({25: 2.25}, "another mix"), ({}, "m")):
        assert compute_multiplier(first, a_run("other", {}, curve, mix_sha256=mix)) is None


def test_runs_stand_in_one_table_with_gaps_multipliers_and_who_wins():
    row = card_rows()[0][110000]
    bpb = row["bpb"] | {"full": 0.8, "full_stderr": 0.01}
    poe = a_run("poe", {**row, "bpb": bpb}, {0: 4.0, 100: 2.0})
    again = a_run("again", {**row, "bpb": bpb | {"full": 0.808}}, {100: 3.0})
    bp = a_run("bp", one_stage(row), {100: 1.0})
    text = compare([poe, again, bp])
    assert "against poe: again noise, bp better." in text
    lines = text.splitlines()[-3:]
    assert lines[0] == ("| poe | 110,000 | 5,500,000 | 0.800000 | 0.805671 | 0.803292 | 0.802526 | 0.801884 "
                        "| 0.4513 | 0.4517 | 0.9697 | 72.36% | 0.9375 | 3.7770 | 1.000x |")
    assert "| 0.808000 (+1.00% ± 1.77%) | 0.805671 (+0.00%) |" in lines[1]
    # half of the 100 steps, of the same model
    assert lines[1].endswith("| 0.500x |")
    assert lines[2] == ("| bp | 110,000 | 5,500,000 | 0.676800 (-15.40%) "
                        "| 0.676800 | — | — | — | 0.5000 (+10.79%) | 0.5000 | — | — | — | — | — |")


def test_tasks_that_all_have_are_compared_pair_by_pair():
    def head(value, resamples):
        return {"gold_bpb": value, "gold_bpb_stderr": 0.3, "resamples": {"gold_bpb": resamples}}
    poe = {"a": head(2, "1 2 3"), "b": head(4, "4 5 6"), "c": head(1, "1 2 3")}
    bp = {"a": head(2.5, "1.5 2.6 3.7"), "b": head(4.1, "4.5 5.6 6.7")}
    assert task_table({"poe": poe, "bp": bp}).splitlines()[-3:] == [
        "| a: gold_bpb | 2.000000 ± 0.300000 | +0.500000 ± 0.100000 |",
        "| b: gold_bpb | 4.000000 ± 0.300000 | +0.100000≈ ± 0.100000 |",
        "| mean: gold_bpb | 3.000000 ± 0.212132 | +0.300000 ± 0.070711 |"]
    assert task_table({"poe": poe, "bp": {}}) == ""
