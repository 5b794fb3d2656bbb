"""
The model card's tables and picture, from what evaluate.py measured; nothing is measured here.

    python report.py runs/tiny          # every measured step of a run: TRAJECTORY.md and trajectory.png in it

A row is the metrics.json of one checkpoint as a dict, with its timings.json under the key "timings" and its
name in the tables under "name". A figure is named by its path in a row, such as "bpb/single/0". Functions are
pure, but for `write_report`, which reads and writes a run's files, and `main`.

Every judgement follows a fixed rule: a change within two standard errors is noise, and where no error is
known the sign alone decides. Errors are of documents, because the positions of a document are alike.
"""
import math
import re
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import checkpoint_steps, read_json
from common import parse_flags, run, write_whole
from model import ModelConfig, flops_per_token
from schedule import learning_rate, phase_index, phase_of, position

# How a figure is printed and which way is better (-1 lower, +1 higher, 0 neither), by how a name in its path
# ends, a regular expression; the first that fits.
Form = namedtuple("Form", "text better", defaults=("{:,.4f}", 0))
FORMS = {
    "bpb|alpha_sweep|violation_rate": Form("{:,.6f}", -1),
    "crossover_gap": Form("{:+,.6f}"),
    "accuracy|acceptance|agreement": Form("{:,.4f}", 1),
    "mean_accepted": Form("{:,.2f}", 1),
    "fraction": Form("{:,.2%}", 1),
    "projected_speedup|compute_multiplier": Form("{:,.3f}x", 1),
    "speedup": Form("{:,.2f}x", 1),
    "tokens_per_s": Form("{:,.1f}"),
    "rel_it": Form("{:,}")}

# The card's "Reading the table", and accuracy, which the verdict counts too.
QUESTIONS = {
    "descent": "1. BPB descent past the seed",
    "stages": "2. Per-stage refinement, s0 first",
    "accuracy": "Accuracy",
    "routing": "3. Routing margin",
    "acceptance": "4. Acceptance of s0's drafts",
    "bounds": "5. WAND bounds"}

# The facts that evaluate.py grades, and the card's headers for them.
FACTS = {
    "Paris": "France",
    "Au": "Gold: Au",
    "79": "Gold: atomic # 79",
    "planets": "Planets list",
    "2": "Algebra `5x+3=13` (correct: 2)"}


# --------------------------------------------------------------------------------------------------
# Figures and their changes

def lookup(value, path):
    """The value at a path such as "bpb/single/0" in dicts and lists; None where nothing was measured."""
    for key in path.split("/"):
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = value.get(key) if value else None
    return value


def count_stages(row):
    """K of the checkpoint that a row is of."""
    return len(row["bpb"]["single"])


def ratio(numerator, denominator):
    """(R, standard error) of R = sum(numerator) / sum(denominator), from float64 sums (G,) per block of
    documents.

    The usual linearisation of a ratio: with e = numerator - R denominator,
    se^2 = G / (G - 1) sum(e^2) / sum(denominator)^2 over the G blocks that hold something. Documents are
    taken as independent, positions of one are not. None where nothing was counted.
    """
    total = denominator.sum()
    G = int((denominator != 0).sum())
    if total == 0:
        return None, None
    value = numerator.sum() / total
    residual = numerator - value * denominator
    return float(value), float(math.sqrt(G / (G - 1) * (residual ** 2).sum()) / total) if G > 1 else None


def stderr_of_change(path, row, base):
    """Standard error of the difference of a figure in two rows of one slice, or None where they give none.

    bpb and accuracy: paired, per block of documents. Other rates: the root of the sum of squares, which is
    too large rather than too small, because both come from the same text.
    """
    blocks = [lookup(r, f"blocks/{path}") for r in (row, base)]
    if None not in blocks:
        counted, unit = ("tokens", 1) if path.startswith("accuracy") else ("bytes", math.log(2))
        texts = [*blocks, row["blocks"][counted]]
        sums, base_sums, counts = (np.array(text.split(), dtype=float) for text in texts)
        return ratio((sums - base_sums) / unit, counts)[1]
    # "accuracy/single/0" has its error at "accuracy/single_stderr/0"
    stderr_path = re.sub(r"(/-?\d+)?$", r"_stderr\1", path, count=1)
    errors = [lookup(r, stderr_path) for r in (row, base)]
    return None if None in errors else math.hypot(*errors)


def form_of(path):
    """The `Form` of a figure."""
    for names, form in FORMS.items():
        if re.search(f"({names})(/|$)", path):
            return form
    return Form()


def change(path, row, base):
    """How a figure changed from row `base` to `row`, as a dict; None where it was not measured in both.

    judged: better, worse or noise; wider or narrower where neither way is better, as of bounds.
    """
    values = [lookup(r, path) for r in (row, base)]
    if None in values:
        return None
    delta = values[0] - values[1]
    stderr = stderr_of_change(path, row, base)
    better = form_of(path).better
    if abs(delta) <= 2 * (stderr or 0):
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
    text = form_of(path).text.format(value)
    if signed:
        text = ("" if text[0] in "+-" else "+") + text.replace("%", " pp")
    return text


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

def tables(row):
    """All tables of numbers, {title: {header: path}}, for rows with as many stages as `row`.

    The first seven are the card's; the others hold what its protocol lacks.
    """
    K = count_stages(row)
    cap = lookup(row, "routing/cap") or 0.02

    # a column for each stage k, or for each step from stage k to k + 1
    def each(header, path, n):
        return {header.format(k, k + 1): f"{path}/{k}" for k in range(n)}

    depth = each("exceedance {} → {}", "wand/exceedance", K - 1)
    for name, path in (("p99", "wand"), ("margin", "wand/margin")):
        depth |= {
            **each(name + " exits s{}", f"{path}/exit_fraction", K),
            f"{name} violations": f"{path}/violation_rate",
            f"{name} agreement": f"{path}/agreement",
            f"{name} speedup": f"{path}/projected_speedup"}
    return {
        "Per-checkpoint val BPB": {
            "Phase rel_it": "phase/rel_it", "Training-log val BPB": "train_log_bpb/full",
            f"Local-slice full K={K} BPB": "bpb/full"},
        "Per-stage BPB": {
            f"full K={K}": "bpb/full", **each("single s{}", "bpb/single", K),
            **each("prefix K'={1}", "bpb/prefix", K - 1)},
        "Per-stage standalone target accuracy": {
            **each("s{}", "accuracy/single", K), "full": "accuracy/full"},
        f"Self-speculative decoding (m=4 stage-0 draft, full K={K} verify)": {
            "acceptance α": "speculative/acceptance", "mean accepted / 4": "speculative/mean_accepted",
            "end-to-end speedup": "timings/speculative/speedup"},
        f"Confidence-aware routing (target_regression cap = {cap:.3f})": {
            "fraction routed to stage 0": "routing/fraction",
            "projected speedup": "routing/projected_speedup",
            "base s0=full agreement": "routing/base_agreement"},
        "WAND p99 bounds (cumulative-PoE delta range, constant-shift invariant)":
            each("bound {} → {}", "wand/p99_bounds", K - 1),
        "Bayesian PoE α-sweep (renormed BPB at α=0)": {
            "α=0 (geom-mean)": "alpha_sweep/0", "α=0.25": "alpha_sweep/0.25",
            "α=0.5 (Bayesian √K)": "alpha_sweep/0.5", "α=0.75": "alpha_sweep/0.75",
            "α=1.0 (pure sum / Log-OP)": "alpha_sweep/1",
            f"crossover gap (α=0 vs single s{K - 1})": "crossover_gap"},
        "Self-speculative decoding: the card's 7 prompts, and speeds": {
            "acceptance, 7 prompts": "speculative/card_prompts/acceptance",
            "mean accepted / 4, 7 prompts": "speculative/card_prompts/mean_accepted",
            "tokens/s, plain": "timings/speculative/plain_tokens_per_s",
            "tokens/s, speculative": "timings/speculative/speculative_tokens_per_s",
            "tokens/s, s0 alone": "timings/speculative/s0_tokens_per_s"},
        "Adaptive depth, on other text than calibrated it": depth,
        "Routing, on other text than calibrated it": {
            "threshold": "routing/threshold", "oracle fraction": "routing/oracle_fraction",
            "agreement of the routed": "routing/agreement",
            "mean cost of the routed, nats": "routing/mean_cost"}}


def markdown(header, rows, text=False):
    """A Markdown table of strings; columns after the first are right-aligned unless they hold text."""
    align = ["---"] + ["---" if text else "---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def branch(row):
    """The first two cells of a checkpoint's line in a table."""
    return [row["name"], f"{row['step']:,}"]


def tables_text(rows):
    """All tables with a line for each row, as Markdown; those of which nothing was measured are left out.

    Below each, where there are several rows, the changes against the previous row / against the first.
    """
    texts = []
    for title, columns in tables(rows[-1]).items():
        paths = columns.values()
        if all(lookup(row, path) is None for row in rows for path in paths):
            continue
        lines = [[*branch(row), *(shown(path, lookup(row, path)) for path in paths)] for row in rows]
        texts += [f"### {title}", markdown(["Branch", "Step", *columns], lines)]
        changes = []
        for previous, row in zip(rows, rows[1:]):
            cells = [" / ".join(shown_change(change(path, row, base)) for base in (previous, rows[0]))
                     for path in paths]
            changes.append([*branch(row), *cells])
        if changes:
            texts.append(markdown(["Change", "Step", *columns], changes))
    return "\n\n".join(texts)


def tables_of(rows):
    """The tables of single checkpoints, {path: row}, as text: one set for as many stages on the same text."""
    groups = {}
    for path, row in rows.items():
        alike = (count_stages(row), row["settings"]["slice_sha256"])
        groups.setdefault(alike, []).append({**row, "name": f"`{path}`"})
    return "\n\n".join(map(tables_text, groups.values()))


# --------------------------------------------------------------------------------------------------
# The trajectory of a run

def phase_position(phases, step):
    """metrics.json's `phase`: where a step stands in the phase that it belongs to."""
    phase = phases[phase_index(phases, step)]
    name, offset = position(phase, step)
    lrm = learning_rate(phase, step)
    return {"rel_it": step - phase.anchor, "lrm": lrm, "position": name, "offset": offset}


def records(rows, path):
    """Steps of the rows whose figure is better than in every row before; the first row is one."""
    values = [form_of(path).better * lookup(row, path) for row in rows]
    return [row["step"] for i, row in enumerate(rows) if all(values[i] > before for before in values[:i])]


def answer(changes):
    """The word for one or more changes, or the words where they differ."""
    words = {found["judged"] for found in changes if found}
    return ", ".join(sorted(words)) or "not measured"


def read_trajectory(rows, phases):
    """What the report states of a run's rows, as a dict for JSON.

    questions: the changes of the last row against the first, which is the seed where the run continues
    another; see `change`. notes: {text: steps}. Lows, highs and the rate are of the rows after the last
    phase's warmup, the first of which is the entry. rate and projection: the least-squares line through the
    last three of them, drawn on from the last row to the end of the phase. verdict: win where full bpb and at
    least one more of stage bpb, accuracy, routing and acceptance are better and more are better than worse;
    regression the other way round; else null.
    """
    phase = phases[-1]
    last = rows[-1]
    K = count_stages(last)
    after_warmup = [row for row in rows if row["step"] >= phase.anchor + phase.warmup_steps]
    lows = records(after_warmup, "bpb/full")
    notes = {
        "seed: the end of the phase before": [later.anchor for later in phases[1:]],
        "first after the warmup": lows[:1],
        "first below the entry": lows[1:2],
        "new low of full bpb": lows[1:],
        "new high of full accuracy": records(after_warmup, "accuracy/full")[1:],
        "crossover gap negative": [row["step"] for row in rows if row["crossover_gap"] < 0]}
    asked = {
        "descent": ["bpb/full"],
        "stages": [f"bpb/single/{k}" for k in range(K) if K > 1],
        "accuracy": ["accuracy/full"],
        "routing": ["routing/fraction"],
        "acceptance": ["speculative/acceptance"],
        "bounds": [f"wand/p99_bounds/{k}" for k in range(K - 1)]}
    reference = rows[0] if len(rows) > 1 else None
    questions = {name: [change(path, last, reference) for path in paths] for name, paths in asked.items()}
    votes = [answer(questions[name]) for name in asked if name != "bounds"]
    verdict = "null" if reference else "not measured"
    for word, opposite, name in (("better", "worse", "win"), ("worse", "better", "regression")):
        if votes[0] == word and votes.count(word) > max(1, votes.count(opposite)):
            verdict = name
    reading = {
        "kind": "trajectory", "reference": rows[0]["step"], "last": last["step"], "end": phase.end,
        "remaining_steps": max(0, phase.end - last["step"]), "verdict": verdict, "questions": questions,
        "facts": {fact: [row["facts"][fact] for row in rows if row["facts"]] for fact in FACTS},
        "notes": notes}
    if len(after_warmup) > 1:
        points = [(row["step"] - last["step"], row["bpb"]["full"]) for row in after_warmup[-3:]]
        slope = float(np.polyfit(*zip(*points), 1)[0])
        reading["rate_per_2000_steps"] = 2000 * slope
        reading["projection"] = last["bpb"]["full"] + slope * reading["remaining_steps"]
    return reading


def summary_table(rows, reading):
    """The card's six questions with their answers, the verdict, the rate and the projection."""
    lines = []
    for name, question in QUESTIONS.items():
        changes = reading["questions"][name]
        texts = [shown_change(found, error=True) for found in changes]
        lines.append([question, answer(changes), ", ".join(texts)])
    facts = [f"{fact}: {sum(known)} of {len(known)}" for fact, known in reading["facts"].items() if known]
    lines.append(["6. Facts, rows that have each", ", ".join(facts) or "not measured", ""])
    lines.append(["**Verdict**", f"**{reading['verdict']}**", ""])
    if "projection" in reading:
        lines.append(["Full bpb per 2,000 steps", f"{reading['rate_per_2000_steps']:+.6f}", ""])
        gap = reading["projection"] - rows[0]["bpb"]["full"]
        lines.append([f"Linear projection to step {reading['end']:,}", f"{reading['projection']:.4f}",
                      f"{gap:+.4f}; {reading['remaining_steps']:,} steps remain"])
    header = ["Question", "Answer", f"Change against {rows[0]['name']}, ± standard error"]
    return markdown(header, lines, text=True)


def schedule_table(record):
    """The card's table of the schedule's parameters, newest phase first."""
    phases = record["phases"][::-1]
    T = record["model"]["sequence_len"]
    lines = [["token budget", *(f"{row['num_steps'] * row['batch'] * T:,}" for row in phases)]]
    for name in ("num_steps", "warmup_steps", "peak_lrm", "warmdown_ratio", "final_lrm", "anchor_step"):
        lines.append([f"`{name}`", *(f"{row[name]:,}" for row in phases)])
    for name in ("matrix_lr", "embedding_lr", "unembedding_lr"):
        lines.append([f"effective `{name}` peak", *(f"{row[name] * row['peak_lrm']:g}" for row in phases)])
    return markdown(["param", *(f"phase {n}" for n in range(len(phases), 0, -1))], lines)


def branch_table(rows, reading):
    """The card's table of branches: where each step stands in its phase, and what stands out there."""
    lines = []
    for row in rows:
        where = "rel_it = {rel_it:,} ({position} +{offset:,}, lrm = {lrm:.3f})".format(**row["phase"])
        notes = "; ".join(text for text, steps in reading["notes"].items() if row["step"] in steps)
        lines.append([*branch(row), where, notes])
    return markdown(["Branch", "Step", "Phase position", "Notes"], lines, text=True)


def sample_table(rows):
    """The card's table of the sample-mode probe; pending where it was not run."""
    lines = []
    for row in rows:
        graded = row["facts"] or {}
        signs = [{True: "✓", False: "✗"}.get(graded.get(fact), "pending") for fact in FACTS]
        lines.append([*branch(row), *signs])
    return markdown(["Branch", "Step", *FACTS.values()], lines, text=True)


def trajectory_text(name, rows, record, reading, picture):
    """TRAJECTORY.md: answers, the card's ten tables, what it lacks. picture: a line of Markdown, or ""."""
    K = count_stages(rows[-1])
    settings = rows[-1]["settings"]
    return "\n\n".join(filter(None, [
        f"# Trajectory of {name}",
        f"{len(rows)} checkpoints of {K} stages on {settings['split_tokens']:,} tokens of validation text "
        f"(sha256 {settings['slice_sha256'][:12]}), of which {settings['wand_tokens']:,} calibrate bounds "
        f"and thresholds. ≈ marks noise: a change within two standard errors, which are paired by document "
        f"for bpb and accuracy; where none is known, the sign alone decides. The verdict counts full bpb, "
        f"the bpb of all stages, accuracy, routing and acceptance: a win needs full bpb and one more better, "
        f"and more better than worse; a regression the reverse; all else is null.",
        summary_table(rows, reading), picture, "## Schedule", schedule_table(record),
        "## Branches", branch_table(rows, reading),
        f"## Sample-mode probe (FULL K={K}, greedy, 60 tokens, 7-prompt fixed set)", sample_table(rows),
        "## Trajectory measurements",
        f"Below each table: changes against the previous row / against {rows[0]['name']}.",
        tables_text(rows)])) + "\n"


def plot(rows, phases):
    """The figure of trajectory.png: bpb with lrm behind it, accuracy, routing and acceptance, WAND bounds.

    Raises ImportError without matplotlib, which is an extra.
    """
    from matplotlib.figure import Figure
    _, _, accuracy, _, _, bounds, *_ = tables(rows[0]).values()
    panels = {
        "bits per byte": {
            "full, local slice": "bpb/full", "full, training log": "train_log_bpb/full",
            "single s0": "bpb/single/0"},
        "top-1 accuracy, share of targets": accuracy,
        "routing and acceptance, share of positions": {
            "acceptance of 4 drafts": "speculative/acceptance",
            "s0 = full (base agreement)": "routing/base_agreement", "routed to s0": "routing/fraction"},
        "WAND p99 bounds, nats": bounds}
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    figure.supxlabel("step")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (title, lines) in zip(axes.flat, panels.items()):
        axis.set_title(title)
        for label, path in lines.items():
            axis.plot(steps, [lookup(row, path) for row in rows], ".-", label=label)
        # one stage has no bounds
        if lines:
            axis.legend(fontsize=8)
    every_step = range(steps[0], steps[-1] + 1)
    behind = axes[0, 0].twinx()
    behind.fill_between(every_step, [phase_position(phases, step)["lrm"] for step in every_step], color="0.9")
    behind.set_ylabel("lrm (shaded)")
    axes[0, 0].set(zorder=1, facecolor="none")
    return figure


def write_report(folder):
    """Write TRAJECTORY.md and trajectory.png of a run from its steps' metrics.json; return (text, reading).

    reading: see `read_trajectory`. Steps without metrics.json are left out and named on stderr. Raises
    ValueError where no step has one, or where the steps were measured on different slices.
    """
    folder = Path(folder)
    record = read_json(folder / "config.json")
    phases = [phase_of(row) for row in record["phases"]]
    rows = []
    for path in checkpoint_steps(folder):
        if not (path / "metrics.json").exists():
            print(f"{path} is left out: it has no metrics.json, which evaluate.py writes", file=sys.stderr)
            continue
        row = {**read_json(path / "metrics.json"), "timings": read_json(path / "timings.json")}
        # the run may have got a new phase since this step was measured
        row["phase"] = phase_position(phases, row["step"])
        is_seed = row["step"] in [phase.anchor for phase in phases[1:]]
        row["name"] = f"`{path.name}`" + (" (seed)" if is_seed else "")
        rows.append(row)
    slices = {row["settings"]["slice_sha256"] for row in rows}
    if len(slices) != 1:
        raise ValueError(f"the steps of {folder} were measured on {len(slices)} slices, not on one; "
                         f"measure them with python evaluate.py {folder}")
    reading = read_trajectory(rows, phases)
    picture = ""
    try:
        plot(rows, phases).savefig(folder / "trajectory.png", dpi=130)
        picture = "![bits per byte, accuracy, routing and bounds over the steps](trajectory.png)"
    except ImportError:
        print("no trajectory.png: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
    text = trajectory_text(folder.resolve().name, rows, record, reading, picture)
    write_whole(folder / "TRAJECTORY.md", text.encode())
    return text, reading


# --------------------------------------------------------------------------------------------------
# Runs side by side

def tokens_seen(record, step):
    """Training tokens up to a step, earlier phases included. record: RUN/config.json."""
    phase = [row for row in record["phases"] if row["anchor_step"] <= step][-1]
    n_samples = phase["anchor_sample"] + (step - phase["anchor_step"]) * phase["batch"]
    return n_samples * record["model"]["sequence_len"]


def validation_curve(run):
    """A run's logged validations in order: [(FLOPs spent, full bpb)]."""
    record = run["record"]
    flops = flops_per_token(ModelConfig(**record["model"]))
    return [(flops * tokens_seen(record, entry["step"]), entry["bpb"]["full"])
            for entry in run["log"] if entry["kind"] == "val"]


def compute_multiplier(first, other):
    """FLOPs at which run `first` first falls to the last bpb of `other`, divided by the FLOPs of `other`.

    Linear between validations. None where it never does, where the two were validated on different text, or
    without a log.
    """
    for path in ("phases/-1/mix_sha256", "train/eval_tokens"):
        if lookup(first["record"], path) != lookup(other["record"], path):
            return None
    other_curve = validation_curve(other)
    if not other_curve:
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
    base_value = lookup(base, path)
    if not found or not base_value:
        return text
    error = "" if found["stderr"] is None else f" ± {found['stderr'] / base_value:.2%}"
    return f"{text} ({found['change'] / base_value:+.2%}{error})"


def compare(runs):
    """The final checkpoints of two or more runs in one Markdown table, a line for each run.

    runs: dicts with `name`, `row` (metrics of the final checkpoint), `record` (RUN/config.json) and `log`
    (entries of log.jsonl). Gaps are to the first run, in percent ± their standard error, which is paired for
    bpb and accuracy; stages are compared where there are as many. The runs must have been measured on one
    slice with one tokenizer.
    """
    first = runs[0]
    K = max(count_stages(run["row"]) for run in runs)
    columns = {
        "bpb full": "bpb/full", **{f"bpb s{k}": f"bpb/single/{k}" for k in range(K)},
        "accuracy full": "accuracy/full", "accuracy, last stage": "accuracy/single/-1",
        "s0 = full": "routing/base_agreement", "acceptance α": "speculative/acceptance"}
    lines = []
    for run in runs:
        row = run["row"]
        # stage k of another number of stages is another part of the model
        alike = count_stages(row) == count_stages(first["row"])
        cells = []
        for path in columns.values():
            has_gap = run is not first and (alike or "single" not in path)
            cells.append(shown_gap(path, row, first["row"] if has_gap else None))
        cells.append(shown("compute_multiplier", compute_multiplier(first, run)))
        seen = tokens_seen(run["record"], row["step"])
        lines.append([run["name"], f"{row['step']:,}", f"{seen:,}", *cells])
    about = f"In brackets: the gap to {first['name']} ± its standard error. Compute multiplier: the FLOPs " \
            f"of {first['name']} when it reached the run's last validation bpb, divided by those of the run."
    header = ["Run", "Step", "Tokens seen", *columns, "Compute multiplier"]
    return f"### Final checkpoints\n\n{about}\n\n{markdown(header, lines)}"


# --------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class Flags:
    pass


def main(argv=None):
    given = parse_flags(Flags, __doc__, argv, positionals=[("run", None, "a run whose steps were measured")])
    print(write_report(given["run"])[0])


if __name__ == "__main__":
    run(main)
