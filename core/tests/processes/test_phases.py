"""What is shown while the engine loads."""

import fcntl
import io
import os
import re
import struct
import termios

from light_core.processes.phases import LoadingLog


def play(log: LoadingLog) -> str:
    for phase, share in (("plugins", 0.0), ("weights", 0.0), ("weights", 0.4), ("weights", 1.0), ("memory", 0.0), ("weights", 1.0)):
        log(phase, share)
    return log.finish()


def test_phases_are_timed_once_each() -> None:
    assert re.fullmatch(r"\d+\.\d s: plugins \d+\.\d, weights \d+\.\d, memory \d+\.\d", play(LoadingLog(io.StringIO())))


def test_no_bar_but_on_a_terminal() -> None:
    stream = io.StringIO()
    play(LoadingLog(stream))
    assert stream.getvalue() == ""


def test_the_bar_is_gone_when_the_phase_is_done() -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        log = LoadingLog(terminal)
        log("weights", 0.0)
        log("weights", 1.0)
        terminal.write("next line")
        terminal.flush()
        shown = ""
        while "next line" not in shown:
            shown += os.read(ours, 4096).decode()
    os.close(ours)
    assert "loading weights:   0%" in shown
    *_, cleared, last = shown.split("\r")
    assert cleared.strip() == "" and len(cleared) > 20 and last == "next line"
