"""
Kill a training run again and again with SIGKILL, resume it each time, and compare the end with a run that was never killed, bit by bit.

    python tests/kill_and_resume.py                  # 40 kills; ten of them take three minutes on two cores
    python tests/kill_and_resume.py --kills 5 --seed 1

Half of the kills come at a random moment of a process's life, from its first instant on; half while a save is being written, so that
they fall between its files. tests/test_train.py has the short form: every single file operation of a save, one after the other.
"""
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import flag, parse_flags, run  # noqa: E402

RUN = ["--preset", "tiny", "--num-steps", "200", "--save-every", "2", "--eval-tokens", "2048", "--total-batch-tokens", "512",
       "--device-batch-size", "2", "--device", "cpu", "--keep-optim", "2"]


@dataclass(frozen=True)
class Config:
    kills: int = flag(40, "how often to kill")
    seed: int = flag(0, "of the moments")


def start(out):
    """Start the run, or go on with it where its folder says that it began."""
    argv = ["--resume", out] if (out / "config.json").exists() else [*RUN, "--out", out]
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, argv)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    if process.wait():
        raise ValueError(f"the run ended with code {process.returncode}: {process.stderr.read()}")


def kill_one(out, draw, life):
    """Start the run, kill it, and say where it was hit; None where it had finished. life: seconds that a process is let live at most."""
    left, begun = {path.name for path in out.glob(".tmp-step-*")}, time.monotonic()       # by the kill before: the run removes them first
    process = start(out)

    def saving():
        now = {path.name for path in out.glob(".tmp-step-*")}
        left.intersection_update(now)
        return now - left
    if draw.random() < 0.5:
        at = draw.uniform(0, life)
        while process.poll() is None and time.monotonic() - begun < at:
            saving()
            time.sleep(0.001)
    else:
        skip = draw.randrange(3)                                # saves that pass before
        seen = set()
        while process.poll() is None and len(seen) <= skip:
            seen |= saving()
        time.sleep(draw.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        raise ValueError(f"a resumed run failed: {process.stderr.read()}")
    unfinished = [sum(file.is_file() for file in (out / name).rglob("*")) for name in saving()]
    return f"in a save, after {unfinished[0]} files" if unfinished else "between saves"


def main():
    config = Config(**parse_flags(Config, __doc__))
    with tempfile.TemporaryDirectory() as folder:
        kill_all(config, Path(folder))


def kill_all(config, folder):
    """Kill a run in `folder` as often as `config` says, and compare its end with that of a run that is never killed."""
    draw, where, begun = random.Random(config.seed), Counter(), time.monotonic()
    finish(start(folder / "whole"))
    life = time.monotonic() - begun
    while where.total() < config.kills:
        place = kill_one(folder / "killed", draw, min(life, 6.0))
        steps = sorted(int(path.name[5:]) for path in (folder / "killed").glob("step-*"))
        if place:
            where[place] += 1
            print(f"kill:{where.total()}/{config.kills} {place}; newest checkpoint: {steps[-1] if steps else 'none'}", flush=True)
        if steps and steps[-1] >= 196:                          # near the end: begin anew, the kills that are left go on there
            check(folder)
            shutil.rmtree(folder / "killed")
    check(folder)
    print(json.dumps({"kills": config.kills, "where": dict(sorted(where.items())), "identical": True}))


def check(folder):
    """Finish the killed run; raise ValueError unless its last checkpoint and its log are those of the run that was never killed."""
    import torch
    finish(start(folder / "killed"))
    last = [folder / name / "step-00200" for name in ("whole", "killed")]
    for file in ("model.pt", "optim/rank-00000.pt"):
        a, b = (torch.load(path / file, weights_only=True) for path in last)
        pairs = zip(a.items(), b.items(), strict=True) if file == "model.pt" else (
            ((f"{name}.{key}", torch.as_tensor(value)), (f"{other}.{key}", torch.as_tensor(b[other][key])))
            for name, other in zip(a, b, strict=True) for key, value in a[name].items())
        for (name, x), (other, y) in pairs:
            if name != other or not torch.equal(x, y):
                raise ValueError(f"{file} differs in {name}")
    logs = [[(e["step"], e["losses"]) for e in map(json.loads, (path.parent / "log.jsonl").read_text().splitlines()) if e["kind"] == "step"]
            for path in last]
    if logs[0] != logs[1]:
        raise ValueError("the logs differ")
    print("the killed run ended as the whole one did: weights, optimizer state and log are identical", flush=True)


if __name__ == "__main__":
    run(main)
