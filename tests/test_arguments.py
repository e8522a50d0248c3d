"""How every command meets the machine: output that can't be written, errors that no one has foreseen."""

import argparse
import json
import math
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import big_store, step_speed, writer_speed
from grid import arguments
from grid.arguments import positive, print_json, run_command, write_output
from grid.config import InputError

PRINTS = """
import sys
from grid.arguments import run_command
sys.exit(run_command("some.command", lambda: print("line\\n" * 100_000) or 0))
"""
COMMANDS = ("grid.run", "grid.confirm", "grid.record", "analysis.rank", "analysis.effects", "analysis.audit")


def shell(line: str, **settings: str | Path) -> tuple[int, str]:
    """Run a line of bash, in which `python` is this one; return its exit code and stderr."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'python() {{ "{sys.executable}" "$@"; }}; {line}'],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        **settings,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("redirection", "exit_code", "said"),
    [
        ("| head -1", 0, ""),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("> /dev/full", 1, "some.command: the output could not be written: No space left on device\n"),
        ("> /dev/full 2>&1", 1, ""),
    ],
)
def test_output_that_cannot_be_written_never_ends_in_a_traceback(
    redirection: str, exit_code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    assert shell(f"python '{tmp_path}/prints.py' {redirection}", cwd=Path(__file__).parents[1]) == (exit_code, said)


@pytest.mark.parametrize(
    ("command", "redirection"),
    [
        *(("grid.run", redirection) for redirection in ("> /dev/full", ">&-", "2>&-", "| head -1")),
        ("analysis.rank", "> /dev/full"),
    ],
)
def test_help_that_cannot_be_printed_is_no_error(command: str, redirection: str) -> None:
    assert shell(f"python -m {command} --help {redirection}") == (0, "")


def test_a_file_that_is_opened_later_does_not_get_what_is_printed_to_a_closed_stream(tmp_path: Path) -> None:
    code = "import grid, os; file = open('first', 'w'); os.write(1, b'print'); os.write(2, b'error')"
    assert shell(f'cd "{tmp_path}"; python -c "{code}" <&- >&- 2>&-') == (0, "")
    assert (tmp_path / "first").read_bytes() == b""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_gone_is_said(command: str, tmp_path: Path) -> None:
    options = "" if command == "grid.run" else "--experiment x"
    options += " --replay" if command == "grid.record" else ""
    gone = tmp_path / "gone"
    gone.mkdir()
    exit_code, said = shell(f'cd "{gone}"; rmdir "{gone}"; python -m {command} {options}')
    expected = f"{command}: the current folder is gone (No such file or directory); change to another one"
    assert (exit_code, said.splitlines()[-1:]) == (2, [expected])
    assert "Traceback" not in said


def fail(*_: object) -> int:
    raise ZeroDivisionError("no answer from sqlite://me:secret@host/x\nwith a second line")


def test_an_error_that_no_one_has_foreseen_is_one_line_that_names_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_command("some.command", fail) == 70
    (file,) = tmp_path.iterdir()
    what = "unexpected ZeroDivisionError: no answer from sqlite://me:***@host/x"
    assert capsys.readouterr().err == f"some.command: {what}; its traceback is in {file}\n"
    assert "in fail" in file.read_text()
    assert "secret" not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_without_a_folder_for_the_traceback_the_line_says_how_to_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert run_command("some.command", fail) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; GRID_DEBUG=1 shows it")


def test_errors_are_raised_for_developers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRID_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run_command("some.command", fail)
    monkeypatch.delenv("GRID_DEBUG")
    with pytest.raises(ZeroDivisionError):
        run_command("some.command", fail, debug=True)


def test_an_error_in_a_thread_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return 0

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_command("some.command", body) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("some.command: unexpected ZeroDivisionError: ")


def test_a_warning_of_a_library_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        warnings.simplefilter("default")
        warnings.warn("an old name\nis used", DeprecationWarning, stacklevel=1)
        return 0

    assert run_command("some.command", body) == 0
    assert capsys.readouterr().err == ""


def test_wrong_input_and_ctrl_c_have_exit_codes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    def raise_(error: BaseException) -> int:
        raise error

    assert run_command("some.command", lambda: raise_(InputError("wrong"))) == 2
    assert run_command("some.command", lambda: raise_(KeyboardInterrupt()), interrupted="stopped") == 130
    assert capsys.readouterr().err == "some.command: wrong\nsome.command: stopped\n"


@pytest.fixture
def listening() -> Iterator[None]:
    """Listen to Ctrl-C as in a terminal; a shell without job control lets background commands ignore it."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


def test_ctrl_c_is_sent_once_more_where_a_library_swallows_it(listening: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "INSIST_SECONDS", 2.0)
    swallowed = []

    def body() -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            swallowed.append("once")
        time.sleep(1000)
        return 0

    assert run_command("some.command", body) == 130
    assert swallowed == ["once"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_python_ignores_is_sent_once_more_without_a_word(
    listening: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arguments, "INSIST_SECONDS", 1000.0)

    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def body() -> int:
        dying = Dying()
        del dying
        time.sleep(1000)
        return 0

    hook = sys.unraisablehook
    assert run_command("some.command", body) == 130
    assert capsys.readouterr().err == "some.command: interrupted\n"
    assert sys.unraisablehook is hook


def test_ctrl_c_that_ends_a_command_is_not_sent_once_more(listening: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "INSIST_SECONDS", 2.0)
    assert run_command("some.command", lambda: signal.raise_signal(signal.SIGINT) or 0) == 130
    time.sleep(3)


@pytest.mark.parametrize(
    ("path", "why"),
    [("/dev/full", "No space left on device"), ("no/folder.csv", "No such file or directory"), (".", "Is a directory")],
)
def test_a_file_that_the_user_named_and_that_can_not_be_written_is_named(path: str, why: str) -> None:
    with pytest.raises(InputError, match=rf"can't write {re.escape(path)}: {why}; pass another file, or make room"):
        write_output(Path(path), "a,b\n1,2\n")


def test_json_has_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    described = {"mean": math.nan, "rows": [{"low": -math.inf, "level": "on"}], "ends": (0.5, math.inf)}
    print_json(described)
    assert json.loads(capsys.readouterr().out) == {
        "mean": None,
        "rows": [{"low": None, "level": "on"}],
        "ends": [0.5, None],
    }


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "1_0"])
def test_a_number_of_things_is_1_or_more(text: str) -> None:
    assert positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match=f"^must be 1 or more, got {re.escape(text)}$"):
        positive(text)


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (writer_speed.main, ["--rate", "0"], "benchmarks.writer_speed: --rate and --seconds must be above 0"),
        (big_store.main, ["--folder", "/proc/x"], "benchmarks.big_store: can't make the folder /proc/x: No such file"),
        (step_speed.main, ["--device", "cuda"], "benchmarks.step_speed: --device cuda: torch finds no GPU here; use"),
    ],
)
def test_wrong_input_of_a_benchmark_is_one_line(
    main: Callable[[list[str]], int],
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
