"""A PostgreSQL of its own on loopback, with one database of one user who is no superuser."""

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.servers.local import free_port

DEBIANS_PROGRAMS = Path("/usr/lib/postgresql")
"""Where Debian has them, in a folder for each version; they are not on the PATH."""
DATABASE, OWNER = "mlflow", "grid"


class Postgres:
    """A running PostgreSQL.

    Args:
        folder: Empty, and of the user as whom it runs.
    """

    def __init__(self, folder: Path):
        self._data, self._port, self._password = folder / "data", free_port(), secrets.token_hex(8)
        superusers = folder / "password"
        superusers.write_text(secrets.token_hex(8))
        self._run("initdb", "--no-sync", "--auth=scram-sha-256", "--username=postgres", f"--pwfile={superusers}")
        self.start()

    def create(self) -> None:
        """Create the user and the database, as docs/cluster.md says."""
        environment = {**os.environ, "PGPASSWORD": (self._data.parent / "password").read_text()}
        for statement in (
            f"CREATE ROLE {OWNER} LOGIN PASSWORD '{self._password}'",
            f"CREATE DATABASE {DATABASE} OWNER {OWNER}",
        ):
            place = ["--host=127.0.0.1", f"--port={self._port}", "--username=postgres", "--no-psqlrc", "--quiet"]
            command = [_program("psql"), *place, "--set=ON_ERROR_STOP=1", f"--command={statement}"]
            subprocess.run(command, env=environment, check=True)

    @property
    def uri(self) -> str:
        """Of the database, for MLflow."""
        return f"postgresql+psycopg://{OWNER}:{self._password}@127.0.0.1:{self._port}/{DATABASE}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        self._run("pg_ctl", "--wait", f"--log={self._data}.log", f"--options={options}", "start")

    def stop(self) -> None:
        """End it at once, as a crash does."""
        self._run("pg_ctl", "--mode=immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*_as_user(), _program(program), f"--pgdata={self._data}", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Start a PostgreSQL in a folder of its own; it ends, and the folder goes, with the block."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        if os.geteuid() == 0:
            shutil.chown(folder, _user())
        database = Postgres(Path(folder))
        try:
            database.create()
            yield database
        finally:
            database.stop()


def missing() -> str:
    """Return what this machine lacks for it; empty if nothing."""
    try:
        for name in ("initdb", "pg_ctl", "psql"):
            _program(name)
    except FileNotFoundError as error:
        return str(error)
    return ""


def _program(name: str) -> str:
    newest_first = sorted(DEBIANS_PROGRAMS.glob("*/bin"), key=lambda folder: float(folder.parent.name), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, newest_first)])
    found = shutil.which(name, path=path)
    if found is None:
        raise FileNotFoundError(f"needs PostgreSQL's {name} (Debian: postgresql)")
    return found


def _as_user() -> list[str]:
    """Return what a command is prefixed with: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam(_user())
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _user() -> str:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"
