"""Hosts made of namespaces of this machine: each has its own network, processes, login, home and Ray folder.

Needs root on Linux, iproute2, openssh-server and rsync. Everything is removed when the block ends.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter", "setpriv", "sshd", "rsync", "ssh-keygen", "make")


def missing() -> str:
    """Return what this machine lacks to make hosts; empty if nothing."""
    if os.geteuid() != 0:
        return "needs root"
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian has sshd
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (Debian: openssh-server rsync iproute2)"
    probe = f"grid-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "may not make network namespaces"
    subprocess.run(["ip", "netns", "del", probe], check=False)
    return ""


@dataclass
class Hosts:
    """Hosts on one bridge, by name.

    Args:
        folder: Holds their private files.
        names: In the order of their addresses.
        shared: Folders that every host finds in its home: path in the home -> folder.
    """

    folder: Path
    names: Sequence[str]
    shared: dict[str, Path]
    inits: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """Home of root on every host; the same path everywhere, with different content."""
        return self.folder / "home"

    @property
    def key(self) -> Path:
        """Private key that opens all hosts."""
        return self.folder / "key"

    def address(self, name: str) -> str:
        """Return the address of a host."""
        return f"10.213.{os.getpid() % 250}.{self.names.index(name) + 1}"

    def own_home(self, name: str) -> Path:
        """Return the folder that is the home of a host, as seen from outside."""
        return self.folder / "homes" / name

    def build(self) -> None:
        """Create the bridge and start all hosts."""
        _sweep()
        self.home.mkdir()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "hostkey")], check=True)
        (self.folder / "passwd").write_text(_passwd(self.home))
        (self.folder / "sshd_config").write_text(_sshd_config(self.folder))
        Path("/run/sshd").mkdir(exist_ok=True)
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        for name in self.names:
            self._plug_in(name)
            self.start(name)

    def _plug_in(self, name: str) -> None:
        number = self.names.index(name)
        inside, outside, space = f"gi{number}-{os.getpid()}", f"go{number}-{os.getpid()}", self._space(name)
        _ip("netns", "add", space)
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", space)
        _ip("link", "set", outside, "master", self._bridge, "up")
        _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", inside)
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "set", inside, "up")
        # Without a default route Ray takes 127.0.0.1 for its own address; no gateway has to answer.
        _ip("-n", space, "route", "add", "default", "via", f"{self.address(name).rpartition('.')[0]}.254")

    def start(self, name: str) -> None:
        """Switch a host on."""
        home = self.own_home(name)
        for inner, folder in self.shared.items():
            (home / inner).mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        binds = [f"mount --bind '{folder}' '{self.home / inner}'" for inner, folder in self.shared.items()]
        script = [
            "set -e",
            f"hostname {name}",
            "mkdir -p /tmp/ray",
            "mount -t tmpfs tmpfs /tmp/ray",
            f"mount --bind '{home}' '{self.home}'",
            f"mount --bind '{self.folder}/passwd' /etc/passwd",
            *binds,
            f"exec {shutil.which('sshd')} -D -e -f '{self.folder}/sshd_config'",
        ]
        dying = ["setpriv", "--pdeathsig", "KILL"]  # ends with the test, even if that is killed
        unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.inits[name] = subprocess.Popen(
                [*dying, "ip", "netns", "exec", self._space(name), *unshare, "bash", "-c", "\n".join(script)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_for_sshd(name)

    def _wait_for_sshd(self, name: str) -> None:
        deadline = time.monotonic() + 600
        probe = f": </dev/tcp/{self.address(name)}/22"
        while subprocess.run(self._inside(name, ["bash", "-c", probe]), capture_output=True, check=False).returncode:
            if time.monotonic() > deadline:
                raise TimeoutError(f"host {name} does not come up: {(self.folder / f'{name}.log').read_text()}")
            time.sleep(0.2)

    def kill(self, name: str) -> None:
        """Switch a host off: kill its first process, and so all others."""
        pid = self._first_process(name)
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.inits[name].kill()
        self.inits[name].wait()

    def popen(self, name: str, command: Sequence[str], cwd: Path, log: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self._inside(name, command, cwd), stdout=file, stderr=file, stdin=subprocess.DEVNULL
            )

    def run(self, name: str, command: Sequence[str], cwd: Path, seconds: float) -> subprocess.CompletedProcess[str]:
        """Run a command on a host; output and errors together, whatever the exit code."""
        return subprocess.run(
            self._inside(name, ["timeout", str(seconds), *command], cwd),
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def _inside(self, name: str, command: Sequence[str], cwd: Path = Path("/")) -> list[str]:
        pid = self._first_process(name)
        clean = [
            "env",
            "-i",
            f"--chdir={cwd}",
            f"HOME={self.home}",
            f"PATH={os.environ['PATH']}",
            "TERM=dumb",
            "LC_ALL=C.UTF-8",
        ]
        if not pid:
            return ["false"]
        return ["nsenter", "-t", str(pid), "--mount", "--uts", "--net", "--pid", *clean, *command]

    def _first_process(self, name: str) -> int:
        """Return the pid, as seen from outside, of a host's first process; 0 if it is off."""
        unshare = self.inits[name].pid
        with suppress(OSError, IndexError):
            return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])
        return 0

    def tear_down(self) -> None:
        """Switch everything off and remove it, whatever state it is in."""
        for name in self.inits:
            with suppress(OSError, IndexError):
                self.kill(name)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)

    @property
    def _bridge(self) -> str:
        return f"gb-{os.getpid()}"

    def _space(self, name: str) -> str:
        return f"grid-{os.getpid()}-{name}"


@contextmanager
def hosts(folder: Path, names: Sequence[str], shared: dict[str, Path]) -> Iterator[Hosts]:
    """Yield hosts that exist as long as the block."""
    made = Hosts(folder, names, shared)
    try:
        made.build()
        yield made
    finally:
        made.tear_down()


def _sweep() -> None:
    """Remove the networks of tests that were killed; their processes have died with them."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        prefix, _, rest = line.split()[0].partition("-")
        owner = rest.partition("-")[0]
        if prefix == "grid" and owner.isdecimal() and not Path("/proc", owner).exists():
            subprocess.run(["ip", "netns", "del", line.split()[0]], check=False)
            subprocess.run(["ip", "link", "del", f"gb-{owner}"], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _passwd(home: Path) -> str:
    """Return /etc/passwd with another home of root."""
    lines = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
    return "".join(":".join([*line[:5], str(home), "/bin/bash"] if line[2] == "0" else line) + "\n" for line in lines)


def _sshd_config(folder: Path) -> str:
    rules = {
        "HostKey": folder / "hostkey",
        "AuthorizedKeysFile": folder / "key.pub",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
    }
    return "".join(f"{name} {value}\n" for name, value in rules.items())
