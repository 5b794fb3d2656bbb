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


def read_log(path):
    """(what its header says, lines of steps, last full validation bpb by head) of a run folder or of a copy of its log.jsonl."""
    path = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        header, config, bpb = lines[0], lines[0]["config"], [line["bpb"] for line in lines if line["kind"] == "val"][-1]
        steps = [{"step": int(line["step"]), "losses": [*map(float, line["losses"])],
                  **{key: float(line[key]) for key in ("train_loss", "dt", "fwdbwd")}} for line in lines if line["kind"] == "step"]
        sizes = {key: int(config[key]) for key in ("total_batch_tokens", "device_batch_size", "sequence_len")}
        sizes["world_size"] = int(header["world_size"])
        if min([*sizes.values(), *(line["dt"] for line in steps)]) <= 0 or not bpb["single"]:
            raise ValueError
        return (sizes | {"objective": str(config["objective"]), "device": str(header["device"])}, steps,
                {"single": [*map(float, bpb["single"])], "full": float(bpb["full"])})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path} is not the log.jsonl of a run of train.py that has validated; give run folders or their logs") from None


def pyplot(picture):
    """matplotlib.pyplot, drawing to files; ValueError where it is missing or `picture` is no .png."""
    if Path(picture).suffix != ".png":
        raise ValueError(f"{picture} is the picture to write: its name must end in .png")
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the picture needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def main(argv=None):
    given = parse_flags(NoFlags, __doc__, argv, positionals=[("picture", None, "the .png to write"),
                                                             ("runs", "+", "run folders, or copies of their log.jsonl")])
    plt = pyplot(given["picture"])
    logs = {name: read_log(name) for name in given["runs"]}
    runs = {name: ([line["train_loss"] for line in steps], bpb["full"]) for name, (_, steps, bpb) in logs.items()}
    (first, (reference, _)), n = next(iter(runs.items())), min(len(losses) for losses, _ in runs.values())
    if not n:
        raise ValueError(f"a run of {', '.join(runs)} has no steps; train it first")
    if {len(losses) for losses, _ in runs.values()} != {n}:
        print(f"losses are compared over the first {n} steps, which all have; validations are each run's last\n")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    print(f"| run | validation bpb, full | training loss, mean of the last 20 steps | largest difference from {first} at a step "
          f"| mean difference | its standard deviation |")
    print("| --- |" + " ---: |" * 5)
    for number, (name, (losses, bpb)) in enumerate(runs.items()):
        last = losses[:n][-20:]
        apart = [a - b for a, b in zip(losses[:n], reference)]
        center = sum(apart) / n
        spread = (sum((d - center) ** 2 for d in apart) / n) ** 0.5
        print(f"| {name} | {bpb:.4f} | {sum(last) / len(last):.4f} | {max(map(abs, apart)):.4f} | {center:+.5f} | {spread:.5f} |")
        left.plot(range(n), losses[:n], color=f"C{number}", lw=1, label=Path(name).stem)
        right.plot(range(n), apart, color=f"C{number}", lw=0.8)
    left.set(xlabel="step", ylabel="training loss, nats per token")
    right.set(xlabel="step", ylabel=f"difference from {Path(first).stem}, nats")
    left.legend(fontsize=8)
    figure.savefig(given["picture"], dpi=150)


if __name__ == "__main__":
    run(main)
