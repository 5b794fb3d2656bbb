"""
Kill a training run again and again with SIGKILL, resume it each time, and compare the end with a run that was
never killed, bit by bit.

    python tests/kill_and_resume.py                  # 40 kills; ten of them take three minutes on two cores
    python tests/kill_and_resume.py 5

A kill comes at a random moment of a process's life, from its first instant on; half of them wait for the next
save, so that they fall between its files. tests/test_train.py has the short form: file operations of a save,
one after the other.
"""
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import ROOT, same, weights
from test_ranks import saved_state
from test_train import losses

RUN = """--preset tiny --num-steps 200 --save-every 2 --eval-tokens 2048 --total-batch-tokens 512
         --device-batch-size 2 --device cpu --keep-optim 2 --out""".split()


def start(out):
    """Start the run, or go on with it where its folder says that it began."""
    argv = ["--resume", out] if (out / "config.json").exists() else [*RUN, out]
    return subprocess.Popen([sys.executable, ROOT / "train.py", *argv], stdout=subprocess.DEVNULL)


def kill_one(out, draw, life):
    """Start the run and kill it; its exit code, which is 0 where it had ended. life: most seconds before."""
    process = start(out)
    time.sleep(draw.uniform(0, life))
    if draw.random() < 0.5:
        while process.poll() is None and not any(out.glob(".tmp-step-*")):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    assert code in (0, -signal.SIGKILL)
    return code


def ending(out):
    """Finish a run: its last weights and optimizer state, and the losses of its log."""
    assert start(out).wait() == 0
    return weights(out) | saved_state(out), losses(out)


def main(n_kills=40):
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        killed = Path(folder) / "killed"
        begun = time.monotonic()
        state, log = ending(Path(folder) / "whole")
        life = min(time.monotonic() - begun, 6.0)
        kills = 0
        while kills < n_kills:
            kills += kill_one(killed, draw, life) != 0
            newest = max((path.name for path in killed.glob("step-*")), default="none")
            print(f"kill:{kills}/{n_kills} newest checkpoint: {newest}", flush=True)
            # near the end, or when all is done: compare, and begin anew
            if newest > "step-00195" or kills == n_kills:
                ours, our_log = ending(killed)
                assert same(ours, state) and our_log == log
                shutil.rmtree(killed)
    print(json.dumps({"kills": kills, "identical": True}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
