"""
The pictures of report.py: which lines and panels they have, and what they are drawn from.

Run: python -m pytest tests/test_pictures.py
"""
import pytest

import report
from schedule import Phase


def axes_of(K, **more):
    figures = {"full": 2.0, "single": [2.0] * K}
    rows = [{"step": step, "bpb": figures, "accuracy": figures, **more} for step in (0, 5)]
    figure = report.plot(rows, [Phase(num_steps=10)], "run-a")
    assert "run-a" in figure.get_suptitle() and all(axis.has_data() for axis in figure.axes)
    return figure.axes


def test_a_trajectory_shows_all_stages_errors_of_changes_and_earlier_data():
    routing = {"base_agreement": 0.9, "fraction": 0.1, "fraction_stderr": 0.3}
    old = [{"mix": "", "full": 3.0}]
    axes = axes_of(4, routing=routing, wand={"p99_bounds": [1.0] * 3}, train_log_bpb_old=old)
    labels = str(axes[0].get_legend_handles_labels())
    assert "s3" in labels and "earlier data" in labels
    assert axes[3].dataLim.ymax == pytest.approx(0.1 + 2 ** 0.5 * 0.3)
    # a single stage has fewer panels, none of them empty
    axes_of(1)


def test_losses_are_drawn_from_runs_and_from_thinned_logs(trained, tmp_path):
    lines = (trained / "log.jsonl").read_text().splitlines()
    thin = tmp_path / "thin.jsonl"
    thin.write_text("\n".join([*lines[:3], *lines[5:]]))
    report.main([str(trained), str(thin), "--losses", f"{tmp_path}/losses.svg"])
    drawn = (tmp_path / "losses.svg").read_text()
    assert all(f"<!-- {label} -->" in drawn for label in ("small s2", "thin s0"))


def test_tasks_are_drawn_as_changes_with_paired_errors():
    columns = {head: {"quiz": {"gold_bpb": value, "gold_bpb_stderr": 9.0,
                               "resamples": {"gold_bpb": f"{value} {value + move}"}}}
               for head, value, move in ((("bp", "full"), 1.0, 1.0), (("poe", "full"), 1.5, 3.0))}
    quiz, mean = report.plot_tasks(columns).axes
    # of two resamples the deviation is their difference / the root of 2
    bar = quiz.containers[1].lines[2][0].get_segments()[0][:, 0]
    assert bar == pytest.approx([0.5 - 2 ** 0.5, 0.5 + 2 ** 0.5])
    assert quiz.get_title() == "quiz\n1.000" and mean.has_data()


def test_what_cannot_be_drawn_is_refused(trained, refused, monkeypatch):
    assert "no training log" in refused(report.main, "nowhere", "--losses", "a.png")
    monkeypatch.setitem(report.sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(report.main, trained, "--losses", "a.png")
