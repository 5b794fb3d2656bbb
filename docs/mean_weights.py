"""
The mean of the weights of a run's checkpoints, as a checkpoint that evaluate.py reads; it takes no training.

    python docs/mean_weights.py RUN/step-00600 RUN/step-00620 --out MEAN       # MEAN/step-00620
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import (
    load_tensors,
    read_json,
    read_record,
    recorded_in,
    save_checkpoint,
    verify_checkpoint,
    write_json,
)
from common import Ranks, flag, parse_flags, run
from dataloader import Tokenizer, reading
from model import PoE


@dataclass(frozen=True)
class Flags:
    out: str = flag("runs/mean", "new folder", path=True)


def main():
    given = parse_flags(Flags, __doc__, positionals=[("steps", "+", "step-XXXXX directories of one run")])
    steps = list(map(Path, given.pop("steps")))
    out = Path(Flags(**given).out)
    weights = []
    for step in steps:
        verify_checkpoint(step, skip_optimizer=True)
        weights.append(load_tensors(step / "model.pt"))
    record = recorded_in(out, read_record(steps[-1].parent))
    with reading("their mean", "name checkpoints of one run"):
        mean = {name: sum(of[name] for of in weights) / len(steps) for name in weights[-1]}
        model = PoE.from_config(record["model"], mean, torch.float32)
    # raises where it exists: nothing is overwritten
    out.mkdir(parents=True)
    write_json(out / "config.json", record)
    save_checkpoint(out, Ranks(), model, None, record, read_json(steps[-1] / "state.json"),
                    Tokenizer.load(steps[-1]))


run(main)
