"""
Training losses of runs of the same data against the first one's, from their log.jsonl files: a table and a picture (needs matplotlib).

    python docs/compare_losses.py losses.png runs/fast runs/naive
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flags import parse_flags, run


@dataclass(frozen=True)
class NoFlags:
    pass


def read(path):
    """(mean training loss by step, final full validation bpb) of a run folder or of a copy of its log.jsonl."""
    path = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        losses = [line["train_loss"] for line in lines if line["kind"] == "step"]
        return losses, [line["bpb"]["full"] for line in lines if line["kind"] == "val"][-1]
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(f"{path} is not the log.jsonl of a run of train.py that has validated; give run folders or their logs") from None


def main(argv=None):
    given = parse_flags(NoFlags, __doc__, argv, positionals=[("picture", None, "the .png to write"), ("runs", "+", "run folders, or copies of their log.jsonl")])
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("the picture needs matplotlib; pip install matplotlib") from None
    if Path(given["picture"]).suffix != ".png":
        raise ValueError(f"{given['picture']} is the picture to write: its name must end in .png")
    runs = {name: read(name) for name in given["runs"]}
    (first, (reference, _)), n = next(iter(runs.items())), min(len(losses) for losses, _ in runs.values())
    if not n:
        raise ValueError(f"a run of {', '.join(runs)} has no steps; train it first")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    print(f"| run | validation bpb, full | training loss, mean of the last 20 steps | largest difference from {first} at a step | mean difference | its standard deviation |")
    print("| --- |" + " ---: |" * 5)
    for number, (name, (losses, bpb)) in enumerate(runs.items()):
        style, shade, last = ("-", "--", ":", "-.")[number % 4], str(0.7 * number / len(runs)), losses[:n][-20:]
        apart = [a - b for a, b in zip(losses[:n], reference)]
        center = sum(apart) / n
        spread = (sum((d - center) ** 2 for d in apart) / n) ** 0.5
        print(f"| {name} | {bpb:.4f} | {sum(last) / len(last):.4f} | {max(map(abs, apart)):.4f} | {center:+.5f} | {spread:.5f} |")
        label = Path(name).stem
        left.plot(range(n), losses[:n], style, color=shade, lw=1.2, label=label)
        if name != first:
            right.plot(range(n), apart, style, color=shade, lw=1, label=f"{label} − {Path(first).stem}")
    left.set(xlabel="step", ylabel="training loss, nats per token")
    right.set(xlabel="step", ylabel="difference, nats")
    left.legend(fontsize=8)
    if len(runs) > 1:
        right.legend(fontsize=8)
    figure.savefig(given["picture"], dpi=150)


if __name__ == "__main__":
    run(main)
