"""A Slurm of its own on this machine: slurmctld, and a slurmd for each of two nodes, which trust one another by munge.

Needs root on Linux, and Debian's slurm-wlm and munge. Everything ends with the block.
"""

import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.servers.local import free_port
from tests.waiting import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue")
CONFIGURATION = """
ClusterName=grid
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that goes back into the queue waits as long as its old credentials are valid: two minutes by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Of a machine that is far too busy.
MessageTimeout=100
BatchStartTimeout=600
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
NodeName=one,two NodeHostname=localhost NodeAddr=127.0.0.1 Port={first},{second} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def missing() -> str:
    """Return what this machine lacks; empty if nothing."""
    if os.geteuid() != 0:
        return "needs root"
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(lacking)} (Debian: slurm-wlm munge)" if lacking else ""


class Slurm:
    """A running Slurm, for jobs that are submitted from a folder.

    Args:
        configuration: Its slurm.conf.
        project: The folder.
        home: Of who submits.
    """

    def __init__(self, configuration: Path, project: Path, home: Path):
        self.project = project
        self.environment = {**os.environ, "SLURM_CONF": str(configuration), "HOME": str(home)}

    def call(self, *command: str) -> str:
        """Run a command of Slurm in the project, and return what it prints."""
        done = subprocess.run(
            command, cwd=self.project, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_until_it_is_idle(self) -> None:
        """Wait until no job is left."""
        jobs = ("squeue", "--noheader")
        wait_until(lambda: not self.call(*jobs), 900, explain=lambda: self.call(*jobs), every=0.5)

    def submit(self, *arguments: str) -> str:
        """Submit a job, and return its number."""
        return self.call("sbatch", "--parsable", *arguments).strip()

    def of(self, job: str, fact: str) -> str:
        """Return a fact of a job, such as `JobState`, as `scontrol` shows it."""
        found = re.search(rf"\b{fact}=(\S+)", self.call("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def log(self, job: str) -> str:
        """Return what a job has printed."""
        file = self.project / f"slurm-{job}.log"
        return file.read_text(errors="replace") if file.exists() else ""


@contextmanager
def slurm(project: Path, home: Path) -> Iterator[Slurm]:
    """Start the servers, and wait until both nodes are idle."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as servers:
        folder = Path(name)
        for inner in ("munge", "state"):
            (folder / inner).mkdir(mode=0o700)
        (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
        (folder / "munge" / "key").chmod(0o600)
        configuration = folder / "slurm.conf"
        port, first, second = free_port(), free_port(), free_port()
        configuration.write_text(CONFIGURATION.format(folder=folder, port=port, first=first, second=second))
        own = {**os.environ, "SLURM_CONF": str(configuration)}
        munge = [f"--{kind}={folder}/munge/{kind.removesuffix('-file')}" for kind in MUNGE_FILES]
        for command in (
            ["munged", "--foreground", "--force", *munge],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "one"],
            ["slurmd", "-D", "-N", "two"],
        ):
            servers.enter_context(_running(command, own, folder))
            if command[0] == "munged":
                wait_until((folder / "munge" / "socket").exists)
        cluster = Slurm(configuration, project, home)
        log = folder / "slurmctld.log"
        wait_until(lambda: _idle_nodes(own) == 2, explain=lambda: log.read_text()[-2000:], every=0.5)
        yield cluster
        subprocess.run(["scancel", "--user=root"], env=own, check=False)
        cluster.wait_until_it_is_idle()


MUNGE_FILES = ("key-file", "pid-file", "log-file", "seed-file", "socket")


def _idle_nodes(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return found.stdout.split().count("idle")


@contextmanager
def _running(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    with (folder / "servers.log").open("ab") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
