"""`internalrl serve` in a process of its own, with keys and the audit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from internalrl.serving.api.security import SCOPES, Keys
from tests.support.served import byte_tokenizer, save_adapter, served_base

SLOTS, LARGEST = 16, 65_536
"""Slots of the server; bytes of the largest body."""


@dataclass(frozen=True)
class Server:
    """A running server: its address, a key for everything, its process and its folder."""

    url: str
    key: str
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def client(self) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        return httpx2.AsyncClient(base_url=self.url, headers=self.headers, verify=False, timeout=120, limits=limits)

    def memory(self) -> float:
        """Resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def cpu_seconds(self) -> float:
        """Time that its threads have computed."""
        user, system = (
            Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
        )
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def open_files(self) -> int:
        """Files and sockets that it holds."""
        return len([*Path(f"/proc/{self.process.pid}/fd").iterdir()])


def save_models(folder: Path, **sizes: int) -> None:
    """A random base, its tokenizer, and three adapters."""
    base = served_base(**sizes)
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("code", "support", "other"), 1):
        save_adapter(base, folder / name, seed, policy=name == "code")


@contextmanager
def server(folder: Path, *options: str, state: str = "state") -> Iterator[Server]:
    """`internalrl serve` with the models of `folder`; its registry and audit are in `folder / state`."""
    registry = folder / state / "registry"
    keys = Keys(registry)
    _, key = keys.create("load", SCOPES)
    keys.close()
    command = [sys.executable, "-m", "internalrl.cli", "serve", str(folder / "base"), "--name", "tiny", "--port", "0"]
    command += ["--adapter", f"code={folder / 'code'}", "--adapter", f"support={folder / 'support'}"]
    command += ["--registry", str(registry), "--audit.folder", str(folder / state / "audit"), "--threads", "1"]
    command += ["--slots", str(SLOTS), "--queue", "256", "--bounds.body-bytes", str(LARGEST), *options]
    log = folder / f"{state}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (found := re.search(r"Serving tiny at (\S+)/v1", log.read_text(encoding="utf-8"))):
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.05)
        yield Server(found[1], key, process, folder / state)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(60)
        said = log.read_text(encoding="utf-8").splitlines()[1:]
        sys.stderr.write("".join(f"server: {line}\n" for line in said if line))
