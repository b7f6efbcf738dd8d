"""A private PostgreSQL server for tests: in a temporary folder, on a socket there, gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from sqlalchemy import create_engine, text

_numbers = count()


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl; Debian keeps it off the PATH."""
    found = [Path(p).resolve().parent for p in [shutil.which("initdb")] if p]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in found if (folder / "initdb").exists()), None)


PROGRAMS = _programs()


@dataclass(frozen=True)
class Server:
    """A server in `folder`, which `start` starts."""

    folder: Path

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off -c max_connections=40"
        self._run("pg_ctl", "-w", "-o", options, "-l", str(self.folder / "log"), "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-m", "immediate", "stop")

    def database(self) -> str:
        """URL of a new database, as a user would write it."""
        name = f"test{next(_numbers)}"
        engine = create_engine(
            f"postgresql+psycopg://tester@/postgres?host={self.folder}", isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return f"postgresql://tester@/{name}?host={self.folder}"

    def guarded(self, password: str) -> str:
        """URL of a new database, without the password that it asks for."""
        name, url = f"guarded{next(_numbers)}", self.database()
        engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            connection.execute(text(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'"))
            connection.execute(text(f"GRANT ALL ON SCHEMA public TO {name}"))
        engine.dispose()
        rules = self.folder / "data" / "pg_hba.conf"
        rules.write_text(f"local all {name} scram-sha-256\n{rules.read_text()}")
        self._run("pg_ctl", "reload")
        return url.replace("tester@", f"{name}@")

    def _run(self, program: str, *options: str) -> None:
        assert PROGRAMS is not None
        user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}  # it refuses to run as root
        command = [str(PROGRAMS / program), "-D", str(self.folder / "data"), *options]
        with open(os.devnull, "w") as null:  # the server would keep a pipe open
            subprocess.run(command, check=True, stdout=null, stderr=null, cwd="/", timeout=120, **user)


@contextmanager
def server() -> Iterator[Server]:
    """A running server."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path must be short
    running = Server(folder)
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody", "nogroup")
    try:
        running._run("initdb", "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync")
        running.start()
        yield running
    finally:
        with suppress(subprocess.CalledProcessError):  # a test had stopped it
            running.stop()
        shutil.rmtree(folder)
