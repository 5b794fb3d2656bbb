"""
The model card's tables and picture, from what evaluate.py and tasks.py measured; nothing is measured here.

    python report.py runs/tiny          # every measured step of a run: TRAJECTORY.md and trajectory.png in it
    python report.py runs/poe runs/bp --losses losses.png      # training losses and validations of runs

A row is the metrics.json of one checkpoint as a dict, with its timings.json under the key "timings" and its
name in the tables under "name". A figure is named by its path in a row, such as "bpb/single/0". Functions are
pure, but for `write_report`, which reads and writes a run's files, `plot_losses` and `main`.

Every judgement follows a fixed rule: a change within two standard errors is noise, and so is one of a figure
that was measured on too few documents to know its error. Where no error is recorded, as in train.py's log,
the sign alone decides. The errors are evaluate.py's: spreads over resamples of blocks of documents.
"""
import json
import math
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist

import numpy as np

from checkpoint import checkpoint_steps, read_json, read_log
from common import flag, parse_flags, run, write_whole
from model import ModelConfig, flops_per_token
from schedule import learning_rate, phase_index, phase_of, position

# How a figure is printed and which way is better (-1 lower, +1 higher, 0 neither), by how a name in its path
# ends, a regular expression; the first that fits.
FORMS = """\
bpb|bpb_old|alpha_sweep|violation_rate   {:,.6f}  -1
crossover_gap                            {:+,.6f}  0
accuracy|acceptance|agreement            {:,.4f}   1
mean_accepted                            {:,.2f}   1
fraction                                 {:,.2%}   1
projected_speedup|compute_multiplier     {:,.3f}x  1
speedup                                  {:,.2f}x  1
rel_it|tokens                            {:,}      0
.*                                       {:,.4f}   0"""

# The facts that evaluate.py grades, and the card's headers for them.
FACTS = {
    "Paris": "France",
    "Au": "Gold: Au",
    "79": "Gold: atomic # 79",
    "planets": "Planets list",
    "2": "Algebra `5x+3=13` (correct: 2)"}


# --------------------------------------------------------------------------------------------------
# Figures and their changes

def titled(text):
    """{title: {label: path}} of lines of text: a title, then its labels, each with the path of a figure."""
    found = {}
    for line in text.splitlines():
        label, _, path = line.strip().partition(" | ")
        if not path:
            labels = found[label] = {}
        else:
            labels[label] = path
    return found


def lookup(value, path):
    """The value at a path such as "bpb/single/0" in dicts and lists; None where nothing was measured."""
    for key in path.split("/"):
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = value.get(key) if value else None
    return value


def read_row(step):
    """The row of a step directory that was measured."""
    return {**read_json(step / "metrics.json"), "timings": read_json(step / "timings.json")}


def count_stages(row):
    """K of the checkpoint that a row is of."""
    return len(row["bpb"]["single"])


def spread(row, columns):
    """Columns {header: path} with one for each entry of a list or dict where the path holds {}, its number,
    or {2}, the entry: "s{}": "bpb/single/{}" gives "s0": "bpb/single/0" and so on.

    A header may hold {1} too, the number of the next entry. The prefix of all stages, which is full, is left
    out.
    """
    full = f"bpb/prefix/{count_stages(row) - 1}"
    found = {}
    for header, path in columns.items():
        owner, many, _ = path.partition("/{")
        entries = (lookup(row, owner) or []) if many else [None]
        for k, entry in enumerate(entries):
            place = path.format(k, k + 1, entry)
            if place != full:
                found[header.format(k, k + 1, entry)] = place
    return found


def stderr_path(path):
    """Where a figure's standard error lies: that of "bpb/single/0" at "bpb/single_stderr/0"."""
    return re.sub(r"(/-?[\d.]+)?$", r"_stderr\1", path, count=1)


def stderr_of_change(path, row, base):
    """Standard error of the difference of a figure in two rows of one slice, or None where they give none.

    Paired: the spread of the difference over the resamples of the text, which are the same for all
    checkpoints. Where it does not vary, or without resamples, the root of the sum of squares.
    """
    errors, resamples = ([lookup(r, where) for r in (row, base)]
                         for where in (stderr_path(path), f"resamples/{path}"))
    if None in errors:
        return None
    if None not in resamples:
        values, base_values = (np.array(text.split(), dtype=float) for text in resamples)
        paired = float(np.nanstd(values - base_values, ddof=1))
        if paired > 0:
            return paired
    return math.hypot(*errors)


def form_of(path):
    """(how a figure is printed, which way is better), see `FORMS`."""
    for names, form, better in map(str.split, FORMS.splitlines()):
        if re.search(f"({names})(/|$)", path):
            return form, int(better)


def change(path, row, base):
    """How a figure changed from row `base` to `row`, as a dict; None where it was not measured in both.

    judged: better, worse or noise; wider or narrower where neither way is better, as of bounds.
    """
    values = [lookup(r, path) for r in (row, base)]
    if None in values:
        return None
    delta = values[0] - values[1]
    stderr = stderr_of_change(path, row, base)
    _, better = form_of(path)
    # measured on so few documents that the error is not known
    unknown = stderr is None and lookup(row, f"resamples/{path}")
    if unknown or abs(delta) <= 2 * (stderr or 0):
        word = "noise"
    elif better:
        word = "better" if delta * better > 0 else "worse"
    else:
        word = "wider" if delta > 0 else "narrower"
    return {"figure": path, "change": delta, "stderr": stderr, "judged": word}


def shown(path, value, signed=False):
    """A figure, or with `signed` a change of one, as the tables print it; a dash where not measured."""
    if value is None:
        return "—"
    text = form_of(path)[0].format(value)
    if signed:
        text = ("" if text[0] in "+-" else "+") + text.replace("%", " pp")
    return text


def shown_figure(path, row):
    """A figure of a row as the tables print it; a rate of 0 with its upper limit, two standard errors."""
    value = lookup(row, path)
    error = lookup(row, stderr_path(path))
    text = shown(path, value)
    _, better = form_of(path)
    return f"{text} (≤ {shown(path, 2 * error)})" if value == 0 and error and better else text


def shown_change(found, error=False):
    """A change as the tables print it, ≈ where it is noise; with `error` also its standard error if known."""
    if found is None:
        return "—"
    text = shown(found["figure"], found["change"], signed=True)
    if found["judged"] == "noise":
        text += "≈"
    if error and found["stderr"] is not None:
        text += " ± " + shown(found["figure"], found["stderr"], signed=True).lstrip("+")
    return text


# --------------------------------------------------------------------------------------------------
# Tables

# The tables of numbers: titles, and below each the headers of its columns and what they show, see `spread`.
# The first seven are the card's; the others hold what its protocol lacks.
TABLES = """\
Per-checkpoint val BPB{text}
    Phase rel_it | phase/rel_it
    Training-log val BPB | train_log_bpb/full
    Training-log val BPB on earlier data, {{2[mix]}} | train_log_bpb_old/{{}}/full
    Local-slice full K={K} BPB | bpb/full
Per-stage BPB
    full K={K} | bpb/full
    single s{{}} | bpb/single/{{}}
    prefix K'={{1}} | bpb/prefix/{{}}
Per-stage standalone target accuracy
    s{{}} | accuracy/single/{{}}
    full | accuracy/full
Self-speculative decoding (m=4 stage-0 draft, full K={K} verify)
    acceptance α | speculative/acceptance
    mean accepted / 4 | speculative/mean_accepted
    end-to-end speedup | timings/speculative/speedup
Confidence-aware routing (target_regression cap = {cap})
    fraction routed to stage 0 | routing/fraction
    projected speedup | routing/projected_speedup
    base s0=full agreement | routing/base_agreement
WAND p99 bounds (cumulative-PoE delta range, constant-shift invariant)
    bound {{}} → {{}} | wand/p99_bounds/{{}}
Bayesian PoE α-sweep (renormed BPB at α=0)
    α=0 (geom-mean) | alpha_sweep/0
    α=0.25 | alpha_sweep/0.25
    α=0.5 (Bayesian √K) | alpha_sweep/0.5
    α=0.75 | alpha_sweep/0.75
    α=1.0 (pure sum / Log-OP) | alpha_sweep/1
    crossover gap (α=0 vs single s{last}) | crossover_gap
Self-speculative decoding, the card's 7 prompts
    acceptance, 7 prompts | speculative/card_prompts/acceptance
    mean accepted / 4, 7 prompts | speculative/card_prompts/mean_accepted
Adaptive depth, on other text than calibrated it
    positions | wand/report_tokens
    exceedance {{}} → {{}} | wand/exceedance/{{}}
    p99 exits s{{}} | wand/exit_fraction/{{}}
    p99 violations | wand/violation_rate
    p99 agreement | wand/agreement
    p99 speedup | wand/projected_speedup
    margin exits s{{}} | wand/margin/exit_fraction/{{}}
    margin cap | wand/margin/cap
    margin violations | wand/margin/violation_rate
    margin agreement | wand/margin/agreement
    margin speedup | wand/margin/projected_speedup
Routing, on other text than calibrated it
    threshold | routing/threshold
    oracle fraction | routing/oracle_fraction
    agreement of the routed | routing/agreement
    mean cost of the routed, nats (cap {cap}) | routing/mean_cost
BPB by source of the mix, full K={K}
    {{2}} | sources/{{2}}/bpb/full"""


def tables(row):
    """All tables of numbers, {title: {header: path}}, for rows with as many stages as `row`."""
    K = count_stages(row)
    data = lookup(row, "settings/data")
    text = TABLES.format(K=K, last=K - 1, cap=shown_figure("routing/cap", row),
                         text=f" (local slice: text of {data})" if data else "")
    found = titled(text)
    for k in range(K):
        found[f"BPB by source of the mix, s{k}"] = {"{2}": f"sources/{{2}}/bpb/single/{k}"}
    return {title: spread(row, columns) for title, columns in found.items()}


def markdown(header, rows, text=False):
    """A Markdown table of strings; columns after the first are right-aligned unless they hold text."""
    align = ["---"] + ["---" if text else "---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def checkpoint_table(columns, rows, cells, text=False, name="Checkpoint"):
    """A Markdown table with a line for each checkpoint. cells: those of each line after its name and step."""
    lines = [[row["name"], f"{row['step']:,}", *others] for row, others in zip(rows, cells)]
    return markdown([name, "Step", *columns], lines, text)


def tables_text(rows):
    """All tables with a line for each row, as Markdown; those of which nothing was measured are left out.

    Below each, where there are several rows, the changes against the previous row / against the first.
    """
    texts = []
    for title, columns in tables(rows[-1]).items():
        paths = columns.values()
        if all(lookup(row, path) is None for row in rows for path in paths):
            continue
        figures = [[shown_figure(path, row) for path in paths] for row in rows]
        texts += [f"### {title}", checkpoint_table(columns, rows, figures)]
        changes = [[" / ".join(shown_change(change(path, row, base)) for base in (previous, rows[0]))
                    for path in paths] for previous, row in zip(rows, rows[1:])]
        if changes:
            texts.append(checkpoint_table(columns, rows[1:], changes, name="Change"))
    return "\n\n".join(texts)


# --------------------------------------------------------------------------------------------------
# The trajectory of a run

# The card's "Reading the table", and what else the verdict counts: question and figures, see `spread`.
QUESTIONS = titled("""\
descent
    1. BPB descent past the seed | bpb/full
stages
    2. Per-stage refinement, s0 first | bpb/single/{}
accuracy
    Accuracy | accuracy/full
routing
    3. Routing margin | routing/fraction
acceptance
    4. Acceptance of s0's drafts | speculative/acceptance
bounds
    5. WAND bounds | wand/p99_bounds/{}
old
    BPB on the data of earlier phases | train_log_bpb_old/{}/full""")


def phase_position(phases, step):
    """metrics.json's `phase`: where a step stands in the phase that it belongs to."""
    phase = phases[phase_index(phases, step)]
    name, offset = position(phase, step)
    return {"rel_it": step - phase.anchor, "lrm": learning_rate(phase, step), "position": name,
            "offset": offset}


def records(rows, path):
    """Steps of the rows whose figure is better than in every row before; the first row is one."""
    _, better = form_of(path)
    values = [better * lookup(row, path) for row in rows]
    return [row["step"] for i, row in enumerate(rows) if all(values[i] > before for before in values[:i])]


def correct(changes):
    """Call noise what noise may well have made, so that it moves any of the `changes` further as seldom as it
    moves one beyond two standard errors (Holm). Changes without a better way, as of bounds, decide nothing
    and are not counted.
    """
    tested = [found for found in changes if found and found["stderr"] and form_of(found["figure"])[1]]
    tested.sort(key=lambda found: abs(found["change"]) / found["stderr"])
    for rank, found in enumerate(tested, 1):
        # 2.28 % of a normal distribution lie above two standard errors
        limit = NormalDist().inv_cdf(1 - 0.0228 / rank)
        if abs(found["change"]) <= limit * found["stderr"]:
            for smaller in tested[:rank]:
                smaller["judged"] = "noise"


def answer(changes):
    """The word for one or more changes, or the words where they differ."""
    words = {found["judged"] for found in changes if found}
    return ", ".join(sorted(words)) or "not measured"


def read_trajectory(rows, phases):
    """What the report states of a run's rows, as a dict for JSON.

    questions: the changes of the last row against the first, which is the seed where the run continues
    another; see `change` and `correct`. notes: {text: steps}; lows and highs
    are of the rows after the last phase's warmup, the first of which is the entry. projection: the
    least-squares line through the last three of them, drawn on from the last row to the end of the phase;
    rate: its slope; a phase at its end has neither. verdict: win where full bpb and at least one more of
    stage bpb, accuracy, routing, acceptance and bpb on earlier data are better, and more are better than
    worse; regression the other way round; else null. Better in full bpb but worse on earlier data is mixed.
    """
    phase = phases[-1]
    last = rows[-1]
    after_warmup = [row for row in rows if row["step"] >= phase.anchor + phase.warmup_steps]
    lows = records(after_warmup, "bpb/full")
    notes = {
        "entry: the first after the warmup": lows[:1],
        "low of full bpb since the entry": lows[1:],
        "high of full accuracy since the entry": records(after_warmup, "accuracy/full")[1:],
        f"below {rows[0]['name']} in full bpb": [row["step"] for row in rows
                                                 if row["bpb"]["full"] < rows[0]["bpb"]["full"]]}
    reference = rows[0] if len(rows) > 1 else None
    questions = {name: [change(one, last, reference) for one in spread(last, {"{}": path}).values()]
                 for name, question in QUESTIONS.items() for path in question.values()}
    if count_stages(last) == 1:
        # the only stage is full
        questions["stages"] = []
    correct(sum(questions.values(), []))
    votes = {name: answer(changes) for name, changes in questions.items()}
    words = list(votes.values())
    verdict = "null" if reference else "not measured"
    for word, opposite, name in (("better", "worse", "win"), ("worse", "better", "regression")):
        if votes["descent"] == word and words.count(word) > max(1, words.count(opposite)):
            verdict = name
    if votes["descent"] == "better" and "worse" in votes["old"]:
        verdict = "mixed: better on the new text, worse on the old"
    remaining = max(0, phase.end - last["step"])
    reading = {
        "kind": "trajectory", "reference": rows[0]["step"], "last": last["step"], "end": phase.end,
        "remaining_steps": remaining, "verdict": verdict, "questions": questions,
        "facts": {fact: [row["facts"][fact] for row in rows if row["facts"]] for fact in FACTS},
        "notes": notes}
    if len(after_warmup) > 1 and remaining:
        points = [(row["step"] - last["step"], row["bpb"]["full"]) for row in after_warmup[-3:]]
        slope = float(np.polyfit(*zip(*points), 1)[0])
        reading["rate_per_2000_steps"] = 2000 * slope
        reading["projection"] = last["bpb"]["full"] + slope * remaining
    return reading


def answers(rows, reading):
    """The card's six questions with their answers and reasons, the rate and the projection: lists of three
    texts.
    """
    lines = []
    for name, (question,) in QUESTIONS.items():
        changes = reading["questions"][name]
        if changes or name != "old":
            reasons = ", ".join(shown_change(found, error=True) for found in changes)
            lines.append([question, answer(changes), reasons])
    facts = [f"{fact}: {sum(known)} of {len(known)}" for fact, known in reading["facts"].items() if known]
    lines.append(["6. Facts, checkpoints that have each", ", ".join(facts) or "not measured", ""])
    if "projection" in reading:
        gap = reading["projection"] - rows[0]["bpb"]["full"]
        lines += [["Full bpb per 2,000 steps", f"{reading['rate_per_2000_steps']:+.6f}", ""],
                  [f"Linear projection to step {reading['end']:,}", f"{reading['projection']:.4f}",
                   f"{gap:+.4f}; {reading['remaining_steps']:,} steps remain"]]
    return lines


# The main figures of a checkpoint, for the terminal.
SUMMARY = titled("""\
bpb
    full | bpb/full
    s{} | bpb/single/{}
accuracy
    full | accuracy/full
    s{} | accuracy/single/{}
speculation
    acceptance | speculative/acceptance
    speedup | timings/speculative/speedup
WAND, margins
    leave after s0 | wand/margin/exit_fraction/0
    agreement with full | wand/margin/agreement
routing
    to s0 | routing/fraction
    agreement with full | routing/agreement""")


def summary(row):
    """The main figures of a checkpoint: a few lines, of what was measured."""
    texts = [f"{row['name']}, {row['settings']['split_tokens']:,} tokens of held-out text, "
             f"{lookup(row, 'wand/report_tokens') or 0:,} of them for WAND and routing"]
    for title, columns in SUMMARY.items():
        cells = []
        for label, path in spread(row, columns).items():
            value = lookup(row, path)
            error = lookup(row, stderr_path(path))
            if value is not None:
                cells.append(f"{label} {shown(path, value)} ± {shown(path, error)}")
        if cells:
            texts.append(f"  {title:<14}{'   '.join(cells)}")
    return "\n".join(texts)


def schedule_table(record):
    """The card's table of the schedule's parameters, newest phase first."""
    phases = record["phases"][::-1]
    T = record["model"]["sequence_len"]
    lines = [["token budget", *(f"{row['num_steps'] * row['batch'] * T:,}" for row in phases)]]
    for name in "num_steps warmup_steps peak_lrm warmdown_ratio final_lrm anchor_step".split():
        lines.append([f"`{name}`", *(f"{row[name]:,}" for row in phases)])
    for name in "matrix_lr embedding_lr unembedding_lr".split():
        lines.append([f"effective `{name}` peak", *(f"{row[name] * row['peak_lrm']:g}" for row in phases)])
    return markdown(["param", *(f"phase {n}" for n in range(len(phases), 0, -1))], lines)


def position_table(rows, reading):
    """The card's table of checkpoints: where each step stands in its phase, and what stands out there."""
    where = "rel_it = {rel_it:,} ({position} +{offset:,}, lrm = {lrm:.3f})"
    notes = reading["notes"].items()
    cells = [[where.format(**row["phase"]), "; ".join(text for text, steps in notes if row["step"] in steps)]
             for row in rows]
    return checkpoint_table(["Phase position", "Notes"], rows, cells, text=True)


def sample_table(rows):
    """The card's table of the sample-mode probe; pending where it was not run."""
    signs = {True: "✓", False: "✗", None: "pending"}
    cells = [[signs[lookup(row, f"facts/{fact}")] for fact in FACTS] for row in rows]
    return checkpoint_table(FACTS.values(), rows, cells, text=True)


# What the tables' words mean, for a reader of TRAJECTORY.md alone.
WORDS = """\
- `rel_it`: steps since the phase began. The seed is the checkpoint that the phase continues, the entry the
  first one after its warmup. `lrm`: multiplier of the learning rates.
- s0, s1, ...: the stages, groups of layers, each with a head that predicts (single). prefix K'=n: the product
  of the first n predictions; full: of all of them. bpb: bits per byte of text, lower is better.
- acceptance: the share of the tokens drafted by s0 that full confirms. The text is exactly full's.
- routing: s0 alone answers where its top probability reaches a threshold. It is fitted to cost at most the
  cap on other text too; where calibration is too small to tell, nothing is routed.
- WAND: stop after a stage where the lead of its prefix's top token exceeds all that later stages may move it
  by, the sum of their p99 bounds (nats); margin: where it reaches a fitted threshold. Violation: full would
  choose otherwise."""


def trajectory_text(name, rows, record, reading, picture):
    """TRAJECTORY.md: verdict and answers, the words, the card's ten tables, what it lacks. picture: whether
    there will be one.
    """
    K = count_stages(rows[-1])
    settings = rows[-1]["settings"]
    seed = rows[0]["name"]
    return "\n\n".join(filter(None, [
        f"# Trajectory of {name}", reading["warning"],
        f"**Verdict: {reading['verdict']}**, of {rows[-1]['name']} against {seed}. A win needs better full "
        f"bpb, one more answer better (WAND bounds and facts apart), and more better than worse; a "
        f"regression the reverse; all else is null.",
        markdown(["Question", "Answer", f"Change against {seed}, ± standard error"], answers(rows, reading),
                 text=True),
        f"≈ and noise: a change within two standard errors, found by resampling documents; where none is "
        f"recorded, the sign alone decides. The answers that count are corrected for their number, so "
        f"that noise rarely moves any. — is not measured, or not in the log; ≤ the upper limit of a rate "
        f"that was 0. {len(rows)} checkpoints of {K} stages on {settings['split_tokens']:,} tokens of "
        f"validation text (sha256 {settings['slice_sha256'][:12]}), of which {settings['wand_tokens']:,} "
        f"calibrate bounds and thresholds; rates of early exit are of positions in other documents. The "
        f"verdict is about this run's own seed; evaluate.py RUN RUN compares with another run.",
        WORDS,
        "![bits per byte, accuracy, routing and bounds over the steps](trajectory.png)" if picture else "",
        "## Schedule", schedule_table(record),
        "## Checkpoints", position_table(rows, reading),
        f"## Sample-mode probe (FULL K={K}, greedy, 60 tokens, 7-prompt fixed set)", sample_table(rows),
        "## Trajectory measurements",
        f"Below each table: changes against the previous row / against {seed}. Training-log figures are of "
        f"train.py's validation text.",
        tables_text(rows)])) + "\n"


# How lines look: markers and dashes tell them apart where colours do not.
LOOKS = "o-C0 s--C1 D-.C2 ^:C3 v-C4 P--C5 X-.C6 *:C7".split() * 9

# What trajectory.png shows.
PANELS = titled("""\
bits per byte
    full | bpb/full
    s{} | bpb/single/{}
    full, training log | train_log_bpb/full
    earlier data {1}, training log | train_log_bpb_old/{}/full
top-1 accuracy
    full | accuracy/full
    s{} | accuracy/single/{}
s0 as a draft, shares
    drafts accepted | speculative/acceptance
    s0 = full | routing/base_agreement
routing
    share routed to s0 | routing/fraction
WAND p99 bounds, nats
    bound {} → {} | wand/p99_bounds/{}""")


def behind(axis):
    """An axis behind a panel, for lrm."""
    shaded = axis.twinx()
    shaded.set_ylabel("lrm (shaded)")
    axis.set(zorder=1, facecolor="none")
    return shaded


def plot(rows, phases, name):
    """The figure of trajectory.png: `PANELS`, with lrm behind the first. It needs matplotlib, an extra."""
    from matplotlib.figure import Figure
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    figure.suptitle(f"{name} (bars: standard errors of the change since step {steps[0]})")
    figure.supxlabel("step")
    # a single stage leaves nothing to draw in the second row
    axes = figure.subplot_mosaic("AAB;CDE" if count_stages(rows[-1]) > 1 else "AAB", sharex=True)
    for axis, (title, columns) in zip(axes.values(), PANELS.items()):
        axis.set_title(title)
        # in the upper row too
        axis.tick_params(labelbottom=True)
        for look, (label, path) in zip(LOOKS, spread(rows[-1], columns).items()):
            points = [(lookup(row, path), stderr_of_change(path, row, rows[0])) for row in rows]
            values, errors = np.array(points, dtype=float).T
            # the first row has not changed
            errors[0] = 0
            if np.isfinite(values).any():
                axis.errorbar(steps, values, errors, fmt=look, label=label, linewidth=1, markersize=4)
        axis.legend(fontsize=8)
    every_step = range(steps[0], steps[-1] + 1)
    lrm = [phase_position(phases, step)["lrm"] for step in every_step]
    behind(axes["A"]).fill_between(every_step, lrm, color="0.5", alpha=0.2)
    return figure


def plot_losses(runs, losses):
    """Draw training losses by stage and validations of runs into the file `losses`.

    runs: paths of runs, or of copies of their log.jsonl under other names. A point is a mean over 1 % of the
    log's lines.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    whole, validation = figure.subplot_mosaic("AAB").values()
    shaded = behind(whole)
    for look, path in zip(LOOKS, map(Path, runs)):
        log = read_log(path if path.suffix == ".jsonl" else path / "log.jsonl")
        rows = np.array([[e["step"], e["lrm"], *e["losses"]] for e in log if e.get("kind") == "step"])
        if not rows.size:
            raise ValueError(f"{path} holds no training log: name a run, or a copy of its log.jsonl")
        shaded.fill_between(*rows.T[:2], color="0.5", alpha=0.08)
        means = np.array([part.mean(axis=0) for part in np.array_split(rows, min(100, len(rows)))])
        name = path.name.removesuffix(".jsonl")
        for k, values in enumerate(means.T[2:]):
            whole.plot(means[:, 0], values, look, label=f"{name} s{k}", linewidth=k + 1, markevery=0.1)
        points = np.array([(e["step"], e["bpb"]["full"]) for e in log if e["kind"] == "val"])
        validation.plot(*points.reshape(-1, 2).T, look, label=name)
    whole.set_title("training loss by stage, nats (1 % means)")
    validation.set_title("validation bpb, full")
    whole.legend(fontsize=8, ncols=3)
    validation.legend()
    figure.supxlabel("step")
    figure.savefig(losses)


def trajectory(folder, rows, record=None, picture=False):
    """(TRAJECTORY.md's text, reading, rows with their names) of a run's rows {step directory: row}.

    record: RUN/config.json, read where it is None. See `read_trajectory` and `trajectory_text`. Raises
    ValueError where there are no rows, or where they were measured on different slices.
    """
    slices = {row["settings"]["slice_sha256"] for row in rows.values()}
    if len(slices) != 1:
        raise ValueError(f"{folder} must be a run whose steps were measured on one slice of text, not on "
                         f"{len(slices)}; measure them with python evaluate.py {folder}")
    record = record or read_json(folder / "config.json")
    phases = list(map(phase_of, record["phases"]))
    seeds = [phase.anchor for phase in phases[1:]]
    # the run may have got a new phase since a step was measured
    rows = [{**row, "name": f"`{path.name}`{' (seed)' if row['step'] in seeds else ''}",
             "phase": phase_position(phases, row["step"])} for path, row in rows.items()]
    reading = read_trajectory(rows, phases)
    reading["warning"] = ""
    if lookup(rows[-1], "settings/mix_sha256") != lookup(record, "phases/-1/mix_sha256"):
        reading["warning"] = "Measured on other data than the run's, by --data: this text may have been " \
                             "trained on."
    return trajectory_text(folder.resolve().name, rows, record, reading, picture), reading, rows


def write_report(folder, rows=None, as_json=False):
    """Print what there is to say of a run, then write its TRAJECTORY.md and trajectory.png; return (text,
    reading), see `read_trajectory`.

    rows: {step directory: row}, or None: of those that have metrics.json; others are left out, and counted
    on stderr. Raises ValueError where there are none, or where they were measured on different slices.
    """
    folder = Path(folder)
    steps = checkpoint_steps(folder)
    if rows is None:
        rows = {path: read_row(path) for path in steps if (path / "metrics.json").exists()}
    # a single checkpoint has no lines to draw
    picture = find_spec("matplotlib") and len(rows) > 1
    text, reading, rows = trajectory(folder, rows, picture=picture)
    if as_json:
        print(json.dumps(reading))
    else:
        print(f"{summary(rows[-1])} {reading['warning']}".rstrip())
        if len(rows) > 1:
            print(f"verdict against {rows[0]['name']}: {reading['verdict']}")
            for question, word, reasons in answers(rows, reading):
                print(f"  {question:<38}{word:<17}{reasons}".rstrip())
    # printed first: a folder that cannot be written loses nothing
    write_whole(folder / "TRAJECTORY.md", text.encode())
    remark = "; a picture needs several checkpoints, and matplotlib (pip install matplotlib)"
    if picture:
        phases = list(map(phase_of, read_json(folder / "config.json")["phases"]))
        plot(rows, phases, folder.resolve().name).savefig(folder / "trajectory.png")
        remark = ", and trajectory.png"
    print(f"wrote {folder / 'TRAJECTORY.md'}, tables of {len(rows)} of {len(steps)} checkpoints{remark}",
          file=sys.stderr)
    return text, reading


# --------------------------------------------------------------------------------------------------
# Tasks

def read_tasks(step, head):
    """{task: figures of a head} of a step directory's tasks.json, {} without one. A task's name here tells
    its variant, its questions (their sha256) and what accuracy divides by.
    """
    path = step / "tasks.json"
    entries = read_json(path) if path.exists() else {}
    return {f"{task} {entry['variant']}, {entry['requests_sha256'][:6]}, {entry['normalisation']}":
            entry["heads"][head] for task, entry in entries.items()}


TASK_WORDS = """\
The first column has values ± standard errors, found by resampling questions; the others have their changes
against it. ≈ is noise, by Holm's correction over the column. gold_bpb: bits per byte of the right
continuation, lower is better. accuracy: how often it is the likeliest, by its nats divided as the end of the
task's name says."""


def task_changes(columns, name):
    """{task: [a figure's value in the first column, changes of the others against it]}, see `change`, of the
    tasks that all columns have, and of their "mean". columns: {name: {task: figures}}.
    """
    first, *others = columns.values()
    rows = {}
    for task, figures in first.items():
        changes = [change(name, column.get(task), figures) for column in others]
        if name in figures and None not in changes:
            rows[task] = [change(name, figures, dict.fromkeys(figures, 0)), *changes]
    # tasks are independent of each other
    rows["mean"] = [
        {"figure": name, "judged": "", "change": np.mean([found["change"] for found in column]),
         "stderr": np.linalg.norm([found["stderr"] or 0 for found in column]) / len(column)}
        for column in zip(*rows.values())]
    return rows


def task_table(columns):
    """Figures of tasks as Markdown, a line for each row of `task_changes`: the first column's value and
    standard error, then the others' changes against it, see `correct`.
    """
    lines = []
    for name in ("gold_bpb", "accuracy"):
        rows = task_changes(columns, name)
        for column in zip(*rows.values()):
            correct(column)
        for task, row in rows.items():
            cells = [shown_change(found, error=True) for found in row]
            if cells:
                lines.append([f"{task}: {name}", cells[0].lstrip("+"), *cells[1:]])
    return f"### Tasks\n\n{TASK_WORDS}\n\n{markdown(['Task', *columns], lines)}" if lines else ""


def plot_tasks(columns):
    """The figure of tasks, a panel for each and one for their mean: how far the gold_bpb of each head is from
    the first's, and the standard error of this change. It needs matplotlib, an extra.

    columns: as of `task_changes`, by (run, head): the full of a run, which is coloured, and then its other
    heads, which are grey.
    """
    from matplotlib.figure import Figure
    changes = task_changes(columns, "gold_bpb")
    runs = dict.fromkeys(run for run, _ in columns)
    looks = dict(zip(runs, LOOKS))
    width = min(6, len(changes))
    height = -(-len(changes) // width)
    figure = Figure((2 + 2.5 * width, height * (1.6 + len(columns) / 5)), layout="constrained")
    figure.supxlabel(f"gold_bpb less that of {next(iter(runs))} full, which is under the task's name. Lower "
                     f"is better.\nBars: standard errors of the difference.")
    axes = figure.subplots(height, width, sharex=True, sharey=True).flat
    for (task, row), axis in zip(changes.items(), axes):
        axis.set_title(f"{task.split(',')[0]}\n{row[0]['change']:.3f}")
        axis.grid(color="0.93")
        # in each, since the panel below may be empty
        axis.tick_params(labelbottom=True)
        axis.axvline(0)
        row[0] = {"change": 0, "stderr": 0}
        for (name, head), found in zip(columns, row):
            axis.errorbar(found["change"], f"{name} {head}", xerr=found["stderr"],
                          fmt=looks[name] if head == "full" else ".C7")
    axis.invert_yaxis()
    for empty in axes:
        empty.remove()
    return figure


# --------------------------------------------------------------------------------------------------
# Runs side by side

def tokens_seen(record, step):
    """Training tokens up to a step, earlier phases included. record: RUN/config.json."""
    phase = [row for row in record["phases"] if row["anchor_step"] <= step][-1]
    n_samples = phase["anchor_sample"] + (step - phase["anchor_step"]) * phase["batch"]
    return n_samples * record["model"]["sequence_len"]


def validation_curve(run):
    """A run's logged validations in order: [(FLOPs spent, full bpb)]."""
    flops = flops_per_token(ModelConfig(**run["record"]["model"]))
    return [(flops * tokens_seen(run["record"], entry["step"]), entry["bpb"]["full"])
            for entry in run["log"] if entry["kind"] == "val"]


def compute_multiplier(first, other):
    """FLOPs at which run `first` first falls to the last bpb of `other`, divided by the FLOPs of `other`.

    Linear between validations. None where it never does, where the two were validated on different text, or
    without a log.
    """
    other_curve = validation_curve(other)
    alike = [lookup(first["record"], path) == lookup(other["record"], path)
             for path in ("phases/-1/mix_sha256", "train/eval_tokens")]
    if not other_curve or not all(alike):
        return None
    total, target = other_curve[-1]
    curve = validation_curve(first)
    for (before, bpb_before), (after, bpb_after) in zip(curve, curve[1:]):
        if bpb_after <= target < bpb_before:
            return np.interp(target, [bpb_after, bpb_before], [after, before]) / total
    return None


def shown_gap(path, row, base):
    """A figure of a run and, in brackets, its gap to that of row `base` in percent, where both have it."""
    text = shown(path, lookup(row, path))
    found = change(path, row, base)
    value = lookup(base, path)
    # stage k of another number of stages is another part of the model
    alike = "single" not in path or count_stages(row) == count_stages(base)
    if row is base or not (found and value and alike):
        return text
    error = "" if found["stderr"] is None else f" ± {found['stderr'] / value:.2%}"
    return f"{text} ({found['change'] / value:+.2%}{error})"


def compare(runs):
    """The final checkpoints of two or more runs in one Markdown table, a line for each run.

    runs: dicts with `name`, `row` (metrics of the final checkpoint), `record` (RUN/config.json) and `log`
    (entries of log.jsonl). Gaps are to the first run, in percent ± their standard error, which is paired for
    bpb and accuracy; stages are compared where there are as many. The runs must have been measured on one
    slice with one tokenizer.
    """
    first = runs[0]
    deepest = max((run["row"] for run in runs), key=count_stages)
    columns = spread(deepest, *titled("""\
Final checkpoints
    bpb full | bpb/full
    bpb s{} | bpb/single/{}
    accuracy full | accuracy/full
    accuracy, last stage | accuracy/single/-1
    s0 = full | routing/base_agreement
    routed to s0 | routing/fraction
    acceptance α | speculative/acceptance
    bound 0 → 1 | wand/p99_bounds/0""").values())
    lines = []
    for one in runs:
        row = one["row"]
        seen = tokens_seen(one["record"], row["step"])
        lines.append([one["name"], f"{row['step']:,}", f"{seen:,}",
                      *(shown_gap(path, row, first["row"]) for path in columns.values()),
                      shown("compute_multiplier", compute_multiplier(first, one))])
    judged = [f"{run['name']} {change('bpb/full', run['row'], first['row'])['judged']}" for run in runs[1:]]
    name = first["name"]
    about = f"Full bpb against {name}: {', '.join(judged)}. Lower bpb is better, and higher accuracy, " \
            f"agreement and acceptance. In brackets: the gap to {name} ± its standard error; within two it " \
            f"is noise. Compute multiplier: the FLOPs of {name} when it reached the run's last validation " \
            f"bpb, divided by those of the run; above 1 the run is the cheaper. — is not measured; as " \
            f"multiplier, {name} never reached it, or was validated on other text."
    header = ["Run", "Step", "Tokens seen", *columns, "Compute multiplier"]
    return f"### Final checkpoints\n\n{about}\n\n{markdown(header, lines)}"


# --------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class Flags:
    losses: str = flag(None, "draw training losses and validations of the runs into this file (.png, .svg or "
                             ".pdf) instead", path=True)


def main(argv=None):
    given = parse_flags(Flags, __doc__, argv, positionals=[
        ("runs", "+", "runs whose steps were measured; with --losses: runs, or copies of their log.jsonl")])
    if "losses" not in given:
        for folder in given["runs"]:
            write_report(folder)
    elif find_spec("matplotlib"):
        plot_losses(**given)
    else:
        raise ValueError("--losses needs matplotlib: pip install matplotlib")


if __name__ == "__main__":
    run(main)
