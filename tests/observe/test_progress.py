"""In a log a line every ten seconds; in a terminal one line that changes; elsewhere nothing."""

import io

from dnipipe.observe.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _run(progress, now, seconds):
    for second in seconds:
        now[0] = float(second)
        progress.update(step=second, loss=2.0, tokens_per_s=1234.0, cosine=0.5, elapsed_s=float(second))
    progress.close()


def test_a_log_gets_the_first_line_one_every_ten_seconds_and_the_last():
    stream, now = io.StringIO(), [0.0]
    _run(Progress(total_s=60, stream=stream, clock=lambda: now[0]), now, range(26))
    steps = [int(line.split()[1]) for line in stream.getvalue().splitlines()]
    assert steps == [0, 10, 20, 25]


def test_a_line_says_all_that_is_known():
    stream = io.StringIO()
    progress = Progress(total_s=60, stream=stream)
    progress.update(step=42, loss=1.23456, tokens_per_s=1_500_000, cosine=-0.25, elapsed_s=12.4)
    assert stream.getvalue().split() == "step 42 loss 1.2346 1.5 Mtok/s cosine -0.25 12 of 60 s".split()


def test_what_is_not_yet_known_is_a_dash():
    stream = io.StringIO()
    Progress(total_s=0, stream=stream).update(step=0, loss=None, tokens_per_s=0, cosine=None, elapsed_s=3)
    assert stream.getvalue().split() == "step 0 loss - 0.0 tok/s cosine - 3 s".split()


def test_a_terminal_sees_the_last_update_and_gets_its_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, now = _Terminal(), [0.0]
    progress = Progress(total_s=60, stream=stream, clock=lambda: now[0])
    _run(progress, now, range(4))
    assert "step      3" in stream.getvalue()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("step")


def test_a_disabled_progress_writes_nothing():
    stream, now = io.StringIO(), [0.0]
    _run(Progress(total_s=60, enabled=False, stream=stream, clock=lambda: now[0]), now, range(30))
    assert stream.getvalue() == ""


def test_closing_twice_repeats_nothing():
    stream, now = io.StringIO(), [0.0]
    progress = Progress(total_s=60, stream=stream, clock=lambda: now[0])
    _run(progress, now, range(3))
    before = stream.getvalue()
    progress.close()
    assert stream.getvalue() == before
