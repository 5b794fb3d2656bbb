"""
schedule.py against values worked out by hand and the model card's figures (SPEC 4).

Run: python -m pytest tests/test_schedule.py
"""
import subprocess
import sys
from pathlib import Path

import pytest

from schedule import Phase, learning_rate, muon_momentum, phase_index, position, weight_decay_factor

FIRST = Phase(anchor=0, num_steps=83_923, warmup_steps=1_000, peak_lrm=1.0, warmdown_ratio=0.65, final_lrm=0.05)
CONTINUAL = Phase(anchor=83_923, num_steps=50_800, warmup_steps=1_000, peak_lrm=0.5, warmdown_ratio=0.55, final_lrm=0.0)


def test_a_ten_step_phase_written_out():
    phase = Phase(anchor=100, num_steps=10, warmup_steps=2, peak_lrm=1.0, warmdown_ratio=0.5, final_lrm=0.2)
    expected = [
        0.50,  # rel 0: (0 + 1) / 2, positive at the anchor
        1.00,  # rel 1: warmup complete
        1.00,  # rel 2
        1.00,  # rel 3
        1.00,  # rel 4
        1.00,  # rel 5 = N - w: still the peak
        0.84,  # rel 6: t = 4/5
        0.68,  # rel 7
        0.52,  # rel 8
        0.36,  # rel 9: the last rate that an update uses
        0.20,  # rel 10 = N: the floor, exactly
    ]
    assert [learning_rate(phase, 100 + rel) for rel in range(11)] == pytest.approx(expected, abs=1e-12)
    assert learning_rate(phase, 110) == 0.2


@pytest.mark.parametrize("step, lrm", [(84_000, 0.039), (86_000, 0.5), (83_923 + 22_860, 0.5), (108_000, 0.478), (110_000, 0.442), (134_723, 0.0)])
def test_the_cards_continual_phase(step, lrm):
    assert round(learning_rate(CONTINUAL, step), 3) == lrm


def test_22860_is_the_last_step_at_peak_and_the_first_phase_ends_at_its_floor():
    assert learning_rate(CONTINUAL, 83_923 + 22_861) < 0.5
    assert learning_rate(FIRST, 83_923) == pytest.approx(0.05, abs=1e-15)
    assert learning_rate(CONTINUAL, 134_723) == 0.0


def test_an_anchor_belongs_to_the_new_phase_and_is_final_where_the_run_ends():
    assert phase_index([FIRST, CONTINUAL], 83_922) == 0
    assert phase_index([FIRST, CONTINUAL], 83_923) == 1
    assert phase_index([FIRST, CONTINUAL], 10 ** 6) == 1
    assert position(CONTINUAL, 83_923) == ("warmup", 0)
    assert position(FIRST, 83_923) == ("final", 0)


@pytest.mark.parametrize("step, name, offset", [
    (84_000, "warmup", 77), (84_923, "peak", 0), (86_000, "peak", 1_077), (106_000, "peak", 21_077), (108_000, "warmdown", 1_217), (134_723, "final", 0)])
def test_positions_match_the_cards_branch_table(step, name, offset):
    assert position(CONTINUAL, step) == (name, offset)


def test_phases_without_warmup_or_warmdown():
    flat = Phase(anchor=0, num_steps=3, warmup_steps=0, peak_lrm=0.7, warmdown_ratio=0.0, final_lrm=0.1)
    assert [learning_rate(flat, s) for s in range(4)] == [0.7] * 4
    fall = Phase(anchor=0, num_steps=4, warmup_steps=0, peak_lrm=1.0, warmdown_ratio=1.0, final_lrm=0.0)
    assert [learning_rate(fall, s) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_momentum_ramps_once_per_run_and_falls_in_each_warmdown():
    assert muon_momentum(FIRST, 0) == pytest.approx(0.85)
    assert muon_momentum(FIRST, 200) == pytest.approx(0.91)
    assert muon_momentum(FIRST, 400) == pytest.approx(0.97)
    assert muon_momentum(FIRST, 83_923) == pytest.approx(0.90)
    assert muon_momentum(CONTINUAL, 83_923) == pytest.approx(0.97)                       # a restored buffer: no second ramp
    assert muon_momentum(CONTINUAL, 83_923, ramp_start=83_923) == pytest.approx(0.85)    # a reset optimizer: the ramp again
    assert muon_momentum(CONTINUAL, 134_723) == pytest.approx(0.90)


def test_weight_decay_is_a_half_cosine_that_each_phase_rearms():
    assert weight_decay_factor(FIRST, 0) == 1.0
    assert weight_decay_factor(CONTINUAL, 83_923) == 1.0
    assert weight_decay_factor(CONTINUAL, 83_923 + 25_400) == pytest.approx(0.5)
    assert weight_decay_factor(CONTINUAL, 134_723) == pytest.approx(0.0, abs=1e-15)


def test_a_phase_that_is_too_short_is_named():
    with pytest.raises(ValueError, match="do not fit"):
        Phase(anchor=0, num_steps=10, warmup_steps=6, peak_lrm=1.0, warmdown_ratio=0.5, final_lrm=0.0)


def script(*argv):
    return subprocess.run([sys.executable, Path(__file__).parent.parent / "schedule.py", *argv], capture_output=True, text=True)


def test_the_script_prints_the_cards_figures():
    done = script("--anchor", "83923", "--num-steps", "50800", "--warmup-steps", "1000", "--peak-lrm", "0.5", "--warmdown-ratio", "0.55",
                  "--final-lrm", "0", "--at", "84000,86000")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2:] == ["step:84000 rel:77 lrm:0.039000 position:warmup", "step:86000 rel:2077 lrm:0.500000 position:peak"]


@pytest.mark.parametrize("argv, word", [(["--at", "x"], "--at"), (["--num-steps", "10", "--at", "11"], "outside"), (["--num-steps", "0"], "--num-steps: 0 must be"), (["--warmdown-ratio", "1.5"], "from 0 to 1"),
                                        (["--peak-lrm", "nan"], "nan"), (["--warmup-steps", "-1"], "-1"),
                                        (["--peak", "1"], "--peak")])
def test_the_script_refuses_bad_flags_in_one_line(argv, word):
    done = script(*argv)
    assert done.returncode == 2 and done.stdout == ""
    assert word in done.stderr and len(done.stderr.splitlines()) == 1
