"""How long work shows itself: bars on a terminal, plain lines elsewhere, nothing when quiet."""

import io
import threading

import pytest
from rich.console import Console

from distill_jax.progress import Progress, duration, one_line, printable

HOSTILE = "[red]x[/red] \x1b[31mred\x1b[0m \x1b]0;title\x07 \u202eevil \x9b2J \r back \ud800 end"


class Clock:
    """Seconds that a test moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(console=Console(file=out, width=40), clock=clock), out


def terminal() -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, force_interactive=True, width=120)
    return Progress(console=console), out


def test_a_line_every_ten_seconds_without_a_terminal():
    clock = Clock()
    progress, out = plain(clock)
    with progress.stage("exam, round 1", total=500, unit="questions") as advance:
        for _ in range(25):
            clock.now += 2.0
            advance(20)
    assert out.getvalue().splitlines() == [
        "exam, round 1: 500 questions",
        "exam, round 1: 100 of 500 questions, 10.0/s, 40 s left",
        "exam, round 1: 200 of 500 questions, 10.0/s, 30 s left",
        "exam, round 1: 300 of 500 questions, 10.0/s, 20 s left",
        "exam, round 1: 400 of 500 questions, 10.0/s, 10 s left",
        "exam, round 1: 500 of 500 questions, 10.0/s, 0.0 s left",
        "exam, round 1: 500 questions in 50 s (10.0/s)",
    ]


def test_what_was_done_before_counts_but_is_not_speed():
    clock = Clock()
    progress, out = plain(clock)
    with progress.stage("training, round 2", total=300, unit="steps", done=200) as advance:
        clock.now += 20.0
        advance(10, "loss 1.25")
    assert out.getvalue().splitlines() == [
        "training, round 2: 300 steps, 200 done before",
        "training, round 2: 210 of 300 steps, 30.0/min, 3 min 00 s left, loss 1.25",
        "training, round 2: stopped at 210 of 300 steps in 20 s (30.0/min), loss 1.25",
    ]


@pytest.mark.parametrize("make", [lambda: plain(Clock()), terminal])
def test_an_error_passes_through_and_says_how_far_it_came(make):
    progress, out = make()
    with (
        pytest.raises(RuntimeError, match="boom"),
        progress.stage("teaching", total=10, unit="questions") as advance,
    ):
        advance(3)
        raise RuntimeError("boom")
    assert "teaching: stopped at 3 of 10 questions" in printable(out.getvalue())


def test_a_terminal_gets_a_bar_and_notes_above_it():
    progress, out = terminal()
    with progress.stage("exam, round 1", total=4, unit="questions") as advance:
        advance(3, "1 unreadable")
        progress.note("the teacher is slow")
        advance()
    text = printable(out.getvalue())
    assert "━" in text
    assert "0 of 4 questions" in text and "4 of 4 questions" in text and "1 unreadable" in text
    assert "the teacher is slow\n" in text
    assert "exam, round 1: 4 questions in " in text.splitlines()[-1]


def test_quiet_says_nothing():
    out = io.StringIO()
    progress = Progress(quiet=True, console=Console(file=out))
    with progress.stage("exam", total=2, unit="questions") as advance:
        advance(2)
    progress.note("a note")
    assert out.getvalue() == ""


@pytest.mark.parametrize("make", [lambda: plain(Clock()), terminal])
def test_hostile_text_never_steers_the_terminal(make):
    progress, out = make()
    progress.note(HOSTILE)
    with progress.stage(HOSTILE, total=1, unit="questions") as advance:
        advance(1, HOSTILE)
    out.getvalue().encode()
    assert "[red]x[/red]" in out.getvalue()
    for bad in ("\x1b[31m", "title", "\u202e", "\x9b", "\ud800"):
        assert bad not in out.getvalue()


def test_no_update_of_several_threads_is_lost():
    clock = Clock()
    progress, out = plain(clock)
    with progress.stage("teaching", total=4000, unit="answers") as advance:
        threads = [
            threading.Thread(target=lambda: [advance() for _ in range(1000)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "teaching: 4,000 answers in" in out.getvalue()


def test_printable_keeps_what_can_be_read():
    assert printable("naïve 数 ½\tx\r\ny 👩‍🚀") == "naïve 数 ½\tx\ny 👩‍🚀"
    assert printable("a\u202eb\u2066c\x07d\ud800e") == "a�b�c�d�e"
    assert one_line(" a\x1b[2K\n\n b ") == "a b"


def test_duration_rounds_within_its_unit():
    assert [duration(s) for s in (0, 9.94, 59.4, 59.6, 3599, 3600)] == [
        "0.0 s",
        "9.9 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
    ]
