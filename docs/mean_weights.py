"""
The mean of the weights of checkpoints, as a checkpoint that evaluate.py reads; it takes no training.

    python docs/mean_weights.py RUN/step-00600 RUN/step-00620 --out MEAN     # MEAN/step-00620; beside RUN
"""
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import digest, load_tensors, write_manifest

*steps, _, out = map(Path, sys.argv[1:])
mean = out / steps[-1].name
mean.mkdir(parents=True, exist_ok=True)
shutil.copy(steps[-1].parent / "config.json", out)
names = ("config.json", "state.json", "tokenizer.txt", "tokenizer.json")
for name in names:
    shutil.copy(steps[-1] / name, mean)
weights = [load_tensors(step / "model.pt") for step in steps]
torch.save({name: sum(of[name] for of in weights) / len(steps) for name in weights[0]}, mean / "model.pt")
write_manifest(mean, {name: digest(mean / name) for name in (*names, "model.pt")})
