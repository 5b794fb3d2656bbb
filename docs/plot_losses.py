"""
Draw training loss per stage and validation bpb of several runs of the same data from their log.jsonl files (needs matplotlib).

    python docs/plot_losses.py docs/d12.png docs/d12-poe.jsonl docs/d12-joint.jsonl docs/d12-bp.jsonl
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compare_losses import NoFlags, pyplot, read_log
from flags import parse_flags, run


def main(argv=None):
    given = parse_flags(NoFlags, __doc__, argv, positionals=[("picture", None, "the .png to write"),
                                                             ("runs", "+", "run folders, or copies of their log.jsonl")])
    figure, (left, right) = pyplot(given["picture"]).subplots(1, 2, figsize=(9, 3.6), width_ratios=[3, 2], layout="constrained")
    for number, (header, steps, final) in enumerate(map(read_log, given["runs"])):
        name, style, color, smooth = header["objective"], ("-", "--", ":", "-.")[number % 4], f"C{number}", []
        for line in steps:                                      # exponential average over about 10 steps
            smooth.append(line["losses"] if not smooth else [0.9 * a + 0.1 * b for a, b in zip(smooth[-1], line["losses"])])
        K, first = len(final["single"]), int(0.3 * len(steps))      # the steep beginning would flatten the rest
        for k in range(K):                                      # the last stage in full colour, the first the palest
            left.plot([line["step"] for line in steps[first:]], [s[k] for s in smooth[first:]], style, lw=1.2, color=color, alpha=(k + 1) / K,
                      label=None if 0 < k < K - 1 else f"{name} s{k}" if K > 1 else name)
        heads = {f"s{k}": bpb for k, bpb in enumerate(final["single"]) if K > 1} | {"full": final["full"]}
        right.plot(heads.keys(), heads.values(), style, marker="o", ms=4, color=color, label=name)
    left.set(xlabel="step", ylabel="training loss, nats per token")
    left.legend(fontsize=8)
    right.set(ylabel="validation bits per byte", xlabel="head at the last step")
    right.legend(fontsize=8)
    figure.savefig(given["picture"], dpi=150)


if __name__ == "__main__":
    run(main)
