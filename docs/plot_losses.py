"""
Draw training loss per stage and validation bpb of several runs from their log.jsonl files (needs matplotlib).

    python docs/plot_losses.py docs/d12.png docs/d12-poe.jsonl docs/d12-joint.jsonl docs/d12-bp.jsonl
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

picture, *logs = sys.argv[1:]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[3, 2], layout="constrained")
for log, style in zip(logs, ("-", "--", ":", "-.")):
    lines = [json.loads(line) for line in open(log)]
    name = lines[0]["config"]["objective"]
    steps = [line for line in lines if line["kind"] == "step"]
    smooth = []                                                 # exponential average over about 10 steps
    for line in steps:
        smooth.append(line["losses"] if not smooth else [0.9 * a + 0.1 * b for a, b in zip(smooth[-1], line["losses"])])
    K = len(smooth[0])
    for k in range(K):
        left.plot([line["step"] for line in steps], [s[k] for s in smooth], style, lw=1, color=str(0.75 * (1 - (k + 1) / K)), label=f"{name} s{k}" if K > 1 else name)
    final = [line for line in lines if line["kind"] == "val"][-1]["bpb"]
    right.plot([*(f"s{k}" for k in range(K)), "full"] if K > 1 else ["s3", "full"], [*final["single"], final["full"]] if K > 1 else [final["full"]] * 2,
               style, marker="o", ms=4, color="black", label=name)
left.set(xlabel="step", ylabel="training loss, nats per token", xlim=(100, None), ylim=(3.1, 4.6))
left.legend(fontsize=7, ncols=2)
right.set(ylabel="validation bits per byte", xlabel="head at the last step")
right.legend(fontsize=8)
figure.savefig(picture, dpi=150)
