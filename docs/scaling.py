"""
What more GPUs bring and what their communication costs, from the logs of short runs of train.py on 1, 2, 4, ... of them: a table.

    for n in 1 2 4; do
        torchrun --standalone --nproc_per_node $n train.py --preset 3b --total-batch-tokens $((65536 * n)) --num-steps 20 --warmup-steps 2 \\
            --eval-tokens 16384 --save-every -1 --out runs/gpus-$n
    done
    python docs/scaling.py runs/gpus-1 runs/gpus-2 runs/gpus-4

Each GPU has the same work in every run, so on W of them a step without communication would take forward and backward of one GPU, and 1 / W
of the rest of its step, which is the optimizer's work (and the casting of the new weights, which every rank does whole and which so counts
as communication). Exposed communication is what the step takes beyond that, as a share of the step.
"""
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compare_losses import NoFlags, read_log
from flags import parse_flags, run

SKIPPED = 5         # steps at the beginning, which compile and warm up


def read_run(path):
    """Of a run: (ranks, what must be alike in all, in words, tokens of a step, its steps in their order)."""
    header, steps, _ = read_log(path)
    if len(steps) < SKIPPED + 5:
        raise ValueError(f"{path} has {len(steps)} steps; take {SKIPPED + 5} or more, of which the first {SKIPPED} do not count")
    ranks, tokens = header["world_size"], header["total_batch_tokens"]
    alike = (f"{tokens // ranks:,} tokens a step and rank in micro-batches of {header['device_batch_size']} x {header['sequence_len']} "
             f"on {header['device']}")
    return ranks, alike, tokens, steps


def main(argv=None):
    given = parse_flags(NoFlags, __doc__, argv, positionals=[("runs", "+", "run folders, or copies of their log.jsonl: the first on one GPU")])
    runs = {name: read_run(name) for name in given["runs"]}
    first, (one, setting, *_) = next(iter(runs.items()))
    if one != 1:
        raise ValueError(f"{first} ran on {one} ranks; give a run on one first, which the others are held against")
    for name, (_, alike, *_) in runs.items():
        if alike != setting:
            raise ValueError(f"{name} ran with {alike}, {first} with {setting}: give runs alike (on a CPU with one OMP_NUM_THREADS)")
    n = min(len(steps) for *_, steps in runs.values())                      # the same steps of all: a GPU's clocks follow what it multiplies
    times = {name: [median(line[key] for line in steps[SKIPPED:n]) for key in ("dt", "fwdbwd")] for name, (*_, steps) in runs.items()}
    step_of_one, fwdbwd_of_one = times[first]
    print(f"{setting}; medians of steps {SKIPPED} to {n - 1}\n\n| GPUs | step | forward + backward | the rest: optimizer | tokens/s "
          f"| tokens/s per GPU, of one alone's | exposed communication |")
    print("| ---: |" + " ---: |" * 6)
    for name, (ranks, _, tokens, _) in runs.items():
        step, fwdbwd = times[name]
        exposed = (step - fwdbwd_of_one - (step_of_one - fwdbwd_of_one) / ranks) / step
        print(f"| {ranks} | {step:.3f} s | {fwdbwd:.3f} s | {step - fwdbwd:.3f} s | {tokens / step:,.0f} | {step_of_one / step:.1%} "
              f"| {'' if ranks == 1 else f'{exposed:.1%}'} |")


if __name__ == "__main__":
    run(main)
