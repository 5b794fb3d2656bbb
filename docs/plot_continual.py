"""
The picture of continual.sh: validation bits per byte over the tokens seen, a line a run.

    python docs/plot_continual.py docs/results/seed0 --out docs/continual.png         # or several seeds

A folder holds NAME/log.jsonl, as in RUNS, or copies of them as NAME.jsonl. The first seed's lines are whole.
"""
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import read_log
from schedule import learning_rate, phase_of

LINES = {"poe": ("first phase", "k"), "poe-cycle": ("re-warmed to half its peak", "C0"),
         "poe-quarter": ("to a quarter of it", "C4"), "poe-held": ("last rate held", "C1"),
         "poe-long": ("one long cycle", "C2"), "bp": ("backprop, first phase", "0.6"),
         "bp-cycle": ("backprop, re-warmed", "C3")}

*folders, _, out = sys.argv[1:]
figure = Figure(figsize=(10, 5), layout="constrained")
curves, rates = figure.subplots(2, sharex=True, height_ratios=[4, 1])
for folder, dashes in zip(folders, ("-", "--", ":")):
    for name, (label, color) in LINES.items():
        copy = Path(folder, f"{name}.jsonl")
        log = read_log(copy if copy.exists() else Path(folder, name, "log.jsonl"))
        batch = log[0]["config"]["total_batch_tokens"] / 1e6
        values = [(entry["step"] * batch, entry["bpb"]["full"]) for entry in log if entry["kind"] == "val"]
        curves.plot(*zip(*values), dashes, color=color, label=label if dashes == "-" else None)
        if dashes == "-" and name.startswith("poe"):
            phase = phase_of(log[0]["phases"][-1])
            steps = range(phase.anchor, phase.anchor + phase.num_steps + 1)
            rates.plot([step * batch for step in steps], [learning_rate(phase, step) for step in steps],
                       color=color)
ends = [line.get_ydata()[-1] for line in curves.lines]
curves.set(ylim=(min(ends) - 0.01, max(ends) + 0.12), ylabel="validation bits per byte")
curves.legend()
curves.grid(alpha=0.3)
rates.set(ylabel="lrm", xlabel="million training tokens")
figure.savefig(out, dpi=150)
