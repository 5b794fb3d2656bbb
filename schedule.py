"""
The cyclic schedule: a run is a chain of phases, each anchored at the step where it starts.

    lrm
    peak  |      ____________________
          |     /:                   \\
          |    / :                    \\   linear to `final`
    final |   /  :                     \\____
          +--+---+--------------------+------+--> rel = step - anchor
             0   warmup               N - w  N        w = round(warmdown_ratio * N)

rel < warmup: peak (rel + 1) / warmup, so step 0 has a positive rate. rel <= N - w: peak, both ends included.
Then linear; rel = N gives `final` exactly, which no update uses: `step-S` holds the weights after S updates,
and lrm(S) is the rate of update S -> S + 1. An anchor step belongs to the new phase.

Pure functions of the step; resuming needs nothing else. Shape of a phase and Muon's momentum after nanochat's
base_train; restarts: SGDR (arXiv 1608.03983). As a script it prints steps of a phase:

    python schedule.py --anchor 83923 --num-steps 50800 --warmup-steps 1000 --peak-lrm 0.5 \\
        --warmdown-ratio 0.55 --final-lrm 0 --at 84000,86000
"""
import math
from dataclasses import dataclass, fields

from common import flag, parse_flags, run

# Muon's, over a run (after nanochat)
MOMENTUM_START = 0.85
MOMENTUM_PEAK = 0.97
MOMENTUM_END = 0.90
MOMENTUM_RAMP_STEPS = 400


@dataclass(frozen=True)
class Phase:
    anchor: int = flag(0, "step at which the phase starts", low=0)
    num_steps: int = flag(1000, "length of the phase, steps", low=1)
    warmup_steps: int = flag(0, "steps of linear warmup: the first at peak / warmup_steps", low=0)
    peak_lrm: float = flag(1.0, "learning-rate multiplier between warmup and warmdown", low=0)
    warmdown_ratio: float = flag(0.65, "share of the phase spent in linear warmdown, 0 to 1", low=0, high=1)
    final_lrm: float = flag(0.05, "learning-rate multiplier at the end of the phase", low=0)

    def __post_init__(self):
        if self.warmup_steps > self.peak_end:
            raise ValueError(f"warmup_steps {self.warmup_steps} and a warmdown of {self.warmdown_steps} "
                             f"steps (warmdown_ratio {self.warmdown_ratio}) do not fit in num_steps "
                             f"{self.num_steps}; lower --warmup-steps or --warmdown-ratio")

    @property
    def end(self):
        return self.anchor + self.num_steps

    @property
    def warmdown_steps(self):
        return round(self.warmdown_ratio * self.num_steps)

    @property
    def peak_end(self):
        """The last rel at the peak, N - w."""
        return self.num_steps - self.warmdown_steps


def phase_of(row):
    """The schedule of a row of a checkpoint's phase table."""
    return Phase(row["anchor_step"], *(row[f.name] for f in fields(Phase)[1:]))


def phase_index(phases, step):
    """Index of the phase of `step`: an anchor belongs to the new phase, a step past the end to the last."""
    return max(i for i, phase in enumerate(phases) if phase.anchor <= step)


def learning_rate(phase, step):
    """lrm(step), the multiplier of every group's rate in update step -> step + 1."""
    rel = step - phase.anchor
    if rel < phase.warmup_steps:
        return phase.peak_lrm * (rel + 1) / phase.warmup_steps
    if rel <= phase.peak_end:
        return phase.peak_lrm
    t = (phase.num_steps - rel) / phase.warmdown_steps
    return t * phase.peak_lrm + (1 - t) * phase.final_lrm


def muon_momentum(phase, step, ramp_start=0):
    """Muon's momentum: 0.85 -> 0.97 over 400 steps, 0.97 -> 0.90 through the warmdown; the smaller of both.

    ramp_start: the step at which the momentum buffers were last zero: 0, or the anchor where the optimizer
    was reset.
    """
    ramp = min(1.0, (step - ramp_start) / MOMENTUM_RAMP_STEPS)
    fall = max(0.0, (step - phase.anchor - phase.peak_end) / max(1, phase.warmdown_steps))
    rising = MOMENTUM_START + ramp * (MOMENTUM_PEAK - MOMENTUM_START)
    falling = MOMENTUM_PEAK + fall * (MOMENTUM_END - MOMENTUM_PEAK)
    return min(rising, falling)


def weight_decay_factor(phase, step):
    """Factor on weight decay: a half cosine from 1 at the anchor to 0 at the end of the phase."""
    return 0.5 * (1 + math.cos(math.pi * (step - phase.anchor) / phase.num_steps))


def position(phase, step):
    """Where a step stands in its phase: (warmup, peak, warmdown or final, steps since that began)."""
    rel = step - phase.anchor
    if rel >= phase.num_steps:
        return "final", rel - phase.num_steps
    if rel < phase.warmup_steps:
        return "warmup", rel
    if rel <= phase.peak_end:
        return "peak", rel - phase.warmup_steps
    return "warmdown", rel - phase.peak_end


@dataclass(frozen=True)
class Flags(Phase):
    at: str = flag("", "steps to print, absolute, separated by commas (empty: the corners of the phase)")


def main(argv=None):
    phase = Flags(**parse_flags(Flags, __doc__, argv))
    try:
        steps = [int(step) for step in phase.at.split(",") if step]
    except ValueError:
        raise ValueError(f"--at {phase.at!r} is not a list of steps such as 84000,86000") from None
    corners = (0, phase.warmup_steps, phase.peak_end, phase.num_steps)
    for step in steps or [phase.anchor + rel for rel in corners]:
        if not phase.anchor <= step <= phase.end:
            raise ValueError(f"--at {step} lies outside the phase, steps {phase.anchor} to {phase.end}")
        print(f"step:{step} rel:{step - phase.anchor} lrm:{learning_rate(phase, step):.6f} "
              f"position:{position(phase, step)[0]}")


if __name__ == "__main__":
    run(main)
