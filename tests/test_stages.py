"""What a release says while it runs, and how a command ends that is told to."""

import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from flows.signals import Terminated, stopped_by_signals
from flows.stages import PLAIN_SECONDS, TASK_RUNS, Interrupted, Stages
from flows.work import working
from modelmint.errors import StageError
from modelmint.isolate import Progress
from modelmint.progress import BEGUN
from modelmint.settings import Settings
from modelmint.step import StepResult

pytestmark = pytest.mark.pure


def shown(width: int = 80, terminal: bool = False) -> tuple[Stages, io.StringIO]:
    """Stages on a console, and what is printed there."""
    text = io.StringIO()
    return Stages(Console(file=text, width=width, force_terminal=terminal, color_system=None)), text


def ended(name: str, message: str) -> logging.LogRecord:
    """What Prefect logs when a task run has ended."""
    record = logging.LogRecord(TASK_RUNS, logging.INFO, __file__, 1, f"Finished in state {message}", None, None)
    record.task_run_name, record.task_run_id = name, f"id of {name}"
    return record


def test_each_end_of_a_stage_is_a_line_in_our_own_words() -> None:
    stages, text = shown()
    stages.heard("quantize gguf:Q8_0", BEGUN)
    digest = "0123456789abcdef" * 4
    for name, message in (
        ("quantize gguf:Q8_0", "Completed('made sha256:12 in 1.0 s')"),
        (f"acquire hf:a/b@{digest[:40]}", "Cached('reused sha256:12', type=COMPLETED)"),
        ("convert gguf", 'Failed("Task run encountered an exception ToolError: it\'s broken\\nIt printed last: x")'),
        ("evaluate gguf:Q8_0", "NotReady(\"Upstream task run '12' did not reach a 'COMPLETED' state.\", type=PENDING)"),
    ):
        stages.emit(ended(name, message))
    assert text.getvalue().splitlines() == [
        "✓ quantize gguf:Q8_0  0.0 s",
        "· acquire hf:a/b@0123456789ab  reused",
        "✗ convert gguf  ToolError: it's broken",
        "- evaluate gguf:Q8_0  left out: what it needs has failed",
    ]
    assert stages.ended == {
        "id of quantize gguf:Q8_0",
        f"id of acquire hf:a/b@{digest[:40]}",
        "id of convert gguf",
    }


def test_lines_are_not_cut_where_there_is_no_terminal() -> None:
    stages, text = shown(width=20)
    stages.finished("a stage with a long name", "Failed", "because of this and that")
    assert text.getvalue() == "✗ a stage with a long name  because of this and that\n"


def test_progress_is_said_every_few_seconds_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stages, text = shown()
    for tenths in range(121):
        now = 100.0 + tenths / 10
        stages.heard("acquire", Progress(tenths * 1e6, 120e6, "bytes", 10e6, 12 - tenths / 10))
    assert PLAIN_SECONDS == 5
    assert text.getvalue().splitlines() == [
        "acquire: 42 %, 10 MB/s, 7 s left",
        "acquire: 83 %, 10 MB/s, 2 s left",
    ]


def test_a_terminal_shows_a_live_line_that_is_gone_at_the_end() -> None:
    stages, text = shown(terminal=True)
    with stages:
        stages.heard("acquire", Progress(5e6, 10e6, "bytes", 1e6, 5.0))
        stages._bars.refresh()
        assert "50 %, 1 MB/s, 5 s left" in text.getvalue()
        stages.emit(ended("acquire fake:tiny", "Completed('made')"))
        assert not stages._bars.tasks
    assert "✓ acquire fake:tiny" in text.getvalue()


def test_what_our_own_modules_log_is_shown_and_other_peoples_is_not() -> None:
    stages, text = shown()
    with stages:
        logging.getLogger("modelmint.locks").info("quantize waits for %s", "machine")
        logging.getLogger("somebody.else").info("chatter")
    logging.getLogger("modelmint.locks").info("after the end")
    assert text.getvalue() == "  quantize waits for machine\n"


def test_stop_ends_the_stage_that_runs_and_lets_none_begin() -> None:
    stages, text = shown()
    found: list[BaseException] = []
    begun = threading.Event()

    def stage() -> None:
        try:
            stages.heard("quantize", BEGUN)
            begun.set()
            while True:
                time.sleep(0.01)
        except Interrupted as error:
            found.append(error)

    thread = threading.Thread(target=stage)
    thread.start()
    assert begun.wait(5)
    stages.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert len(found) == 1
    with pytest.raises(Interrupted, match=r"^$"):
        stages.heard("evaluate", BEGUN)
    stages.emit(ended("quantize", "Crashed('Execution was interrupted by an unexpected exception: Interrupted: ')"))
    assert text.getvalue() == ""


# Signals.


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_stops_what_works_and_unwinds_the_main_thread(
    number: signal.Signals, raised: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stopped = threading.Event()

    def told_to_end() -> None:
        with stopped_by_signals(stopped.set):
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(raised, match=r"^$"):
        told_to_end()
    assert stopped.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert "the same command goes on from there" in capsys.readouterr().err


def test_a_block_that_ends_by_itself_leaves_no_thread_behind() -> None:
    with stopped_by_signals(lambda: None):
        assert any(thread.name == "signals" for thread in threading.enumerate())
    deadline = time.monotonic() + 5
    while any(thread.name == "signals" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_process_that_does_not_stop_ends_after_the_grace_or_at_the_second_signal(signals: int) -> None:
    grace = 1.0 if signals == 1 else 60.0
    program = textwrap.dedent(f"""
        import signal, time
        from flows.signals import stopped_by_signals
        with stopped_by_signals(lambda: None, grace={grace}):
            # Somebody else's handler, which nothing stops.
            signal.signal(signal.SIGTERM, lambda number, frame: print("heard", flush=True))
            print("ready", flush=True)
            while True:
                time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "heard\n"
        started = time.monotonic()
        if signals == 2:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - started < 20


# Stages by themselves.


def test_work_without_the_orchestrator_shows_how_each_stage_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(context: object) -> StepResult:
        raise StageError("no luck")

    with working(Settings(home=tmp_path)) as work:
        outcome = work.caught(lambda: work.do("evaluate fake:Q8", fails))
    assert isinstance(outcome, StageError)
    assert "✗ evaluate fake:Q8  no luck" in capsys.readouterr().err
