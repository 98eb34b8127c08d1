"""Nobody takes what lies in a run's folder for another run's."""

from dnipipe.report import clear


def test_what_an_earlier_run_reported_is_cleared_away_and_nothing_else(tmp_path):
    names = ["trace.json", "trace-1F1B.json", "timeline.png", "metrics.jsonl", "run.json", "report.html", "notes.txt"]
    for name in names:
        (tmp_path / name).write_text("")
    for name in ("checkpoint", "tensorboard"):
        (tmp_path / name / "DNI").mkdir(parents=True)
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
