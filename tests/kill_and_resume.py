"""
Kill a training run again and again with SIGKILL, resume it each time, and compare the end with a run that was
never killed, bit by bit.

    python tests/kill_and_resume.py                  # 40 kills; ten of them take three minutes on two cores
    python tests/kill_and_resume.py --kills 5 --seed 1

Half of the kills come at a random moment of a process's life, from its first instant on; half while a save is
being written, so that they fall between its files. tests/test_train.py has the short form: file operations of
a save, one after the other.
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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import flag, parse_flags, run
from conftest import ROOT, log_lines, same, weights

RUN = """--preset tiny --num-steps 200 --save-every 2 --eval-tokens 2048 --total-batch-tokens 512
         --device-batch-size 2 --device cpu --keep-optim 2 --out""".split()


@dataclass(frozen=True)
class Config:
    kills: int = flag(40, "how often to kill")
    seed: int = flag(0, "of the moments")


def start(out):
    """Start the run, or go on with it where its folder says that it began."""
    argv = ["--resume", out] if (out / "config.json").exists() else [*RUN, out]
    return subprocess.Popen([sys.executable, ROOT / "train.py", *argv], stdout=subprocess.DEVNULL)


def finish(out):
    if start(out).wait():
        raise ValueError(f"the run in {out} failed")


def kill_one(out, draw, life):
    """Start the run, kill it, and say where; None where it had ended. life: most seconds before a kill."""
    begun = time.monotonic()
    # by the kill before: the run removes them first
    left = {path.name for path in out.glob(".tmp-step-*")}
    process = start(out)

    def saving():
        now = {path.name for path in out.glob(".tmp-step-*")}
        left.intersection_update(now)
        return now - left

    at = draw.uniform(0, life)
    in_a_save = draw.random() < 0.5
    # saves that pass before
    skip = draw.randrange(3)
    seen = set()
    while process.poll() is None and (len(seen) <= skip if in_a_save else time.monotonic() - begun < at):
        seen |= saving()
        time.sleep(0.001)
    if in_a_save:
        time.sleep(draw.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        raise ValueError(f"the resumed run in {out} failed")
    for name in saving():
        return f"in a save, after {sum(file.is_file() for file in (out / name).rglob('*'))} files"
    return "between saves"


def main():
    config = Config(**parse_flags(Config, __doc__))
    with tempfile.TemporaryDirectory() as folder:
        kill_all(config, Path(folder) / "whole", Path(folder) / "killed")


def kill_all(config, whole, killed):
    """Kill a run as often as `config` says, and compare its end with that of a run that is never killed."""
    draw = random.Random(config.seed)
    where = Counter()
    begun = time.monotonic()
    finish(whole)
    life = min(time.monotonic() - begun, 6.0)
    while where.total() < config.kills:
        place = kill_one(killed, draw, life)
        newest = max((int(path.name[5:]) for path in killed.glob("step-*")), default=0)
        if place:
            where[place] += 1
            print(f"kill:{where.total()}/{config.kills} {place}; newest checkpoint: {newest}", flush=True)
        # near the end: begin anew, the kills that are left go on there
        if newest >= 196:
            check(whole, killed)
            shutil.rmtree(killed)
    check(whole, killed)
    print(json.dumps({"kills": config.kills, "where": dict(sorted(where.items())), "identical": True}))


def check(whole, killed):
    """Finish the killed run; raise ValueError unless it ended as the run that was never killed."""
    finish(killed)
    states = []
    for out in (whole, killed):
        found = weights(out / "step-00200")
        optim = torch.load(out / "step-00200" / "optim" / "rank-00000.pt", weights_only=True)
        for name, state in optim.items():
            found |= {f"{name} {key}": torch.as_tensor(value) for key, value in state.items()}
        losses = [(line["step"], line["losses"]) for line in log_lines(out)]
        states.append((found, losses))
    (ours, our_losses), (theirs, their_losses) = states
    if not same(ours, theirs) or our_losses != their_losses:
        raise ValueError("the killed run's weights, optimizer state or log are not those of the whole run")
    print("the killed run ended as the whole one did: weights, state and log are identical", flush=True)


if __name__ == "__main__":
    run(main)
