"""
Train with the naive PoE step in place of `PoE.backward_by_stage`, to compare loss curves. The flags are train.py's.

    python docs/train_naive.py --preset d12 --data DATA --num-steps 200 --out runs/naive

Two matmuls a head, all logits at once, autograd through the loss, one backward over all stages, weights cast in every micro-batch.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
import train
from flags import run
from model import PoE


def backward_by_stage(self, idx, targets, scale, last=True):
    yield from enumerate(bench.trial_step(self, [(idx, targets)], scale, merged=False, chunked=False, per_stage=False))


def main(argv=None):
    model_config = train.TrainConfig.model_config

    def checked(self):
        config = model_config(self)
        if config.objective != "poe" or config.n_stage == 1:
            raise ValueError(f"the naive step is of --objective poe with several stages, not of {config.objective} with {config.n_stage}; use train.py")
        return config
    train.TrainConfig.model_config, PoE.backward_by_stage, PoE.cast_weights = checked, backward_by_stage, lambda self: None
    train.main(argv)


if __name__ == "__main__":
    run(main)
