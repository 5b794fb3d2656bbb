"""
schedule.py against values worked out by hand and the model card's figures (SPEC 4).

Run: python -m pytest tests/test_schedule.py
"""
import pytest

import schedule
from conftest import table
from schedule import Phase, learning_rate, muon_momentum, phase_index, position, weight_decay_factor

FIRST = Phase(0, 83_923, 1_000, peak_lrm=1.0, warmdown_ratio=0.65, final_lrm=0.05)
CONTINUAL = Phase(83_923, 50_800, 1_000, peak_lrm=0.5, warmdown_ratio=0.55, final_lrm=0.0)


def test_a_ten_step_phase_written_out():
    phase = Phase(100, num_steps=10, warmup_steps=2, peak_lrm=1.0, warmdown_ratio=0.5, final_lrm=0.2)
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


@pytest.mark.parametrize("step, lrm, name, offset", [
    (84_000, 0.039, "warmup", 77), (84_923, 0.5, "peak", 0), (86_000, 0.5, "peak", 1_077),
    (106_783, 0.5, "peak", 21_860), (108_000, 0.478, "warmdown", 1_217), (110_000, 0.442, "warmdown", 3_217),
    (134_723, 0.0, "final", 0)])
def test_the_cards_continual_phase(step, lrm, name, offset):
    assert learning_rate(CONTINUAL, step) == pytest.approx(lrm, abs=5e-4)
    assert position(CONTINUAL, step) == (name, offset)


def test_an_anchor_belongs_to_the_new_phase_and_is_final_where_the_run_ends():
    assert [phase_index([FIRST, CONTINUAL], step) for step in (83_922, 83_923, 10 ** 6)] == [0, 1, 1]
    assert position(FIRST, 83_923) == ("final", 0)
    assert learning_rate(FIRST, 83_923) == pytest.approx(0.05, abs=1e-15)


def test_phases_without_warmup_or_warmdown():
    flat = Phase(0, num_steps=3, peak_lrm=0.7, warmdown_ratio=0.0)
    assert {learning_rate(flat, step) for step in range(4)} == {0.7}
    fall = Phase(0, num_steps=4, warmdown_ratio=1.0, final_lrm=0.0)
    assert [learning_rate(fall, step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("phase, step, reset_at, momentum", [
    (FIRST, 0, 0, 0.85), (FIRST, 200, 0, 0.91), (FIRST, 400, 0, 0.97), (FIRST, 83_923, 0, 0.90),
    # a restored buffer: no second ramp; a reset optimizer: the ramp again
    (CONTINUAL, 83_923, 0, 0.97), (CONTINUAL, 83_923, 83_923, 0.85), (CONTINUAL, 134_723, 0, 0.90)])
def test_momentum_ramps_once_per_run_and_falls_in_each_warmdown(phase, step, reset_at, momentum):
    assert muon_momentum(phase, step, reset_at) == pytest.approx(momentum)


def test_weight_decay_is_a_half_cosine_that_each_phase_rearms():
    found = [weight_decay_factor(CONTINUAL, 83_923 + rel) for rel in (0, 25_400, 50_800)]
    assert found == pytest.approx([1.0, 0.5, 0.0])


def test_the_script_prints_the_cards_figures(capsys):
    argv = ("--anchor 83923 --num-steps 50800 --warmup-steps 1000 --peak-lrm 0.5 --warmdown-ratio 0.55 "
            "--final-lrm 0 --at 84000,86000")
    schedule.main(argv.split())
    assert capsys.readouterr().out.splitlines() == [
        "step:84000 rel:77 lrm:0.039000 position:warmup", "step:86000 rel:2077 lrm:0.500000 position:peak"]


@pytest.mark.parametrize("argv, word", table("""
    --at x                          | --at
    --num-steps 10 --at 11          | outside
    --num-steps 0                   | --num-steps
    --warmdown-ratio 1.5            | 1.5
    --peak-lrm nan                  | nan
    --peak 1                        | --peak
    --num-steps 10 --warmup-steps 6 | do not fit"""))
def test_bad_flags_are_refused_in_one_line(argv, word, refused):
    assert word in refused(schedule.main, *argv.split())
