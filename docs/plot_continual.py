"""
The picture of continual.sh: validation bits per byte over the tokens seen, a line a run.

    python docs/plot_continual.py docs/results/seed0 --out docs/continual.png         # or several seeds

A folder holds NAME/log.jsonl, as in RUNS, or copies of them as NAME.jsonl; runs that it lacks are left out.
The first seed's lines are whole.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import read_log
from common import flag, parse_flags, run
from dataloader import reading
from schedule import learning_rate, phase_of

LINES = {"poe": ("first phase", "k"), "poe-cycle": ("re-warmed to half its peak", "C0"),
         "poe-quarter": ("to a quarter of it", "C4"), "poe-held": ("last rate held", "C1"),
         "poe-long": ("one long cycle", "C2"), "bp": ("backprop, first phase", "0.6"),
         "bp-cycle": ("backprop, re-warmed", "C3")}


@dataclass(frozen=True)
class Flags:
    out: str = flag("continual.png", "file of the picture (.png, .svg or .pdf)", path=True)


def main():
    given = parse_flags(Flags, __doc__, positionals=[("folders", "+", "of a seed's runs")])
    folders = given.pop("folders")
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 5), layout="constrained")
    curves, rates = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    for folder, dashes in zip(folders, ("-", "--", ":")):
        for name, (label, color) in LINES.items():
            copy = Path(folder, f"{name}.jsonl")
            log = read_log(copy if copy.exists() else Path(folder, name, "log.jsonl"))
            if not log:
                continue
            batch = log[0]["config"]["total_batch_tokens"] / 1e6
            values = [(e["step"] * batch, e["bpb"]["full"]) for e in log if e["kind"] == "val"]
            curves.plot(*zip(*values), dashes, color=color, label=label if dashes == "-" else None)
            if dashes == "-" and name.startswith("poe"):
                phase = phase_of(log[0]["phases"][-1])
                steps = range(phase.anchor, phase.anchor + phase.num_steps + 1)
                rates.plot([step * batch for step in steps], [learning_rate(phase, step) for step in steps],
                           color=color)
    with reading(f"a log in {folders}", "name the RUNS of continual.sh"):
        ends = [line.get_ydata()[-1] for line in curves.lines]
        curves.set(ylim=(min(ends) - 0.01, max(ends) + 0.12), ylabel="validation bits per byte")
    curves.legend()
    curves.grid(alpha=0.3)
    rates.set(ylabel="lrm", xlabel="million training tokens")
    figure.savefig(Flags(**given).out, dpi=150)


run(main)
