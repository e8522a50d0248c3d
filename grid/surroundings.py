"""What a process finds: its CPU's name; no home folder, no user name, closed standard streams. Standard library only.

Importing `grid` or `analysis` calls `make_do`: MLflow and Ray look for these when they are imported.
"""

import getpass
import logging
import os
import platform
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path


def cpu_name(processors: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the CPU of this machine."""
    with suppress(OSError, subprocess.CalledProcessError):
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
        if found := re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", processors.read_text(), re.M):
            return found[1].strip()
    return platform.processor() or platform.machine()


def make_do() -> None:
    """Give the process what is missing; processes that it starts inherit it."""
    _open_closed_streams()
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a user without an entry in /etc/passwd, as of `docker run --user`
        os.environ["USER"] = str(os.getuid())
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"  # what Docker sets for such a user
    if sys.argv[:1] == ["-m"] and os.environ.get("GRID_DEBUG") != "1":  # so it is while `python -m` imports a command
        sys.excepthook = _report_early
        _silence_warnings()
    os.environ.pop("PYTHONOPTIMIZE", None)  # a server of Ray needs its docstrings, and dies without
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else three lines if its cache can't be written


def _silence_warnings() -> None:
    """Keep warnings of libraries off the screen, and from being errors, which no library is tested with."""
    warnings.showwarning = lambda *_, **__: None
    os.environ.pop("PYTHONWARNINGS", None)  # Ray's servers and workers inherit it
    if sys.warnoptions:
        warnings.simplefilter("ignore")


def _open_closed_streams() -> None:
    """Open closed standard streams: the next file to be opened, such as the database, would get their prints."""
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


def _report_early(kind: type[BaseException], error: BaseException, _: object) -> None:
    """Say in one line why a command could not even be imported, as for want of memory or of a package, and end it."""
    name = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else sys.argv[0]
    is_interrupted = issubclass(kind, KeyboardInterrupt)
    what = " ".join(str(error).split())[:300]
    line = (
        "interrupted" if is_interrupted else f"can't start: {kind.__name__}: {what}; GRID_DEBUG=1 shows its traceback"
    )
    with suppress(OSError):
        os.write(2, f"{name}: {line}\n".encode(errors="replace"))
    os._exit(130 if is_interrupted else 70)
