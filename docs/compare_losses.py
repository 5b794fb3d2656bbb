"""
Training losses of runs of the same data against the first one's, from their log.jsonl files: a table and a picture (needs matplotlib).

    python docs/compare_losses.py docs/fast-naive.png docs/curve-fast.jsonl docs/curve-naive.jsonl docs/curve-halves.jsonl
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(path):
    lines = [json.loads(line) for line in open(path)]
    return [line["losses"] for line in lines if line["kind"] == "step"], [line["bpb"]["full"] for line in lines if line["kind"] == "val"][-1]


picture, *logs = sys.argv[1:]
runs = {Path(log).stem: read(log) for log in logs}
(first, (losses, _)), n = next(iter(runs.items())), min(len(losses) for losses, _ in runs.values())
means = {name: [sum(step) / len(step) for step in of[:n]] for name, (of, _) in runs.items()}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
print(f"| run | validation bpb, full | training loss, mean of the last 20 steps | largest difference from {first} at a step | mean difference | its standard deviation |")
print("| --- |" + " ---: |" * 5)
for number, (name, mean) in enumerate(means.items()):
    style, shade = ("-", "--", ":", "-.")[number % 4], str(0.7 * number / len(means))
    apart = [a - b for a, b in zip(mean, means[first])]
    center = sum(apart) / n
    spread = (sum((d - center) ** 2 for d in apart) / n) ** 0.5
    print(f"| {name} | {runs[name][1]:.4f} | {sum(mean[-20:]) / 20:.4f} | {max(map(abs, apart)):.4f} | {center:+.5f} | {spread:.5f} |")
    left.plot(range(n), mean, style, color=shade, lw=1.2, label=name)
    if name != first:
        right.plot(range(n), apart, style, color=shade, lw=1, label=f"{name} − {first}")
left.set(xlabel="step", ylabel="training loss, nats per token")
right.set(xlabel="step", ylabel="difference, nats")
left.legend(fontsize=8)
right.legend(fontsize=8)
figure.savefig(picture, dpi=150)
