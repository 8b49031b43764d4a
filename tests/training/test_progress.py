import io

from rich.console import Console

from lcattn.training.progress import Progress, Stopwatch


def show(terminal):
    text = io.StringIO()
    progress = Progress(100, 10, Console(file=text, force_terminal=terminal, width=120))
    for step in (20, 30):
        progress.update(step, loss=1.25, tokens_per_second=12345.6)
    progress.print("a line")
    progress.close()
    return text.getvalue()


def test_bar_on_a_terminal():
    text = show(terminal=True)
    assert "30/100" in text
    assert "loss 1.2500  12,346 tokens/s" in text
    assert "a line" in text


def test_a_plain_line_now_and_then_elsewhere():
    assert show(terminal=False) == "step 20/100  loss 1.2500  12,346 tokens/s\na line\n"


def test_stopwatch_leaves_out_the_first_lap_and_what_is_skipped(monkeypatch):
    clock = iter([100.0, 101.0, 103.0, 150.0, 152.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stopwatch = Stopwatch()
    assert stopwatch.tokens_per_second == 0.0
    for _ in range(3):  # 100 starts the clock; then 1 s and 2 s.
        stopwatch.lap(10)
    stopwatch.skip()  # 47 s of evaluation.
    stopwatch.lap(10)  # 2 s.
    assert stopwatch.tokens_per_second == 30 / 5
