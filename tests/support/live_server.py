"""A server as `internalrl serve` starts it, in a thread, on a free port of this machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internalrl.serving.api.guard import Guard
from internalrl.serving.api.process import Process
from internalrl.serving.main import AuditOptions, ServeConfig, build, listen
from tests.support.served import save_adapter, save_base

BASE = "tiny"
"""What the served base is called."""


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        url: of its API, which ends with /v1; root: the same without it.
        folder: holds base/, code/, support/, more/ (adapters), registry/ and audit/.
    """

    url: str
    folder: Path
    app: Guard

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    @property
    def port(self) -> int:
        return int(self.root.rpartition(":")[2])


def save_models(folder: Path) -> Path:
    """A base and adapters of it, in `folder`."""
    base = save_base(folder / "base")
    for seed, name in enumerate(("code", "support", "more"), 1):
        save_adapter(base, folder / name, seed, policy=name == "code")
    return folder


def config_for(folder: Path, **options: Any) -> ServeConfig:
    """Options of a server of the models in `folder`."""
    defaults: dict[str, Any] = {
        "adapter": (f"code={folder / 'code'}", f"support={folder / 'support'}"),
        "audit": AuditOptions(folder=folder / "audit"),
        "registry": folder / "registry",
        "name": BASE,
        "port": 0,
        "device": "cpu",
    }
    return ServeConfig(str(folder / "base"), **{**defaults, **options})


@contextmanager
def serving(config: ServeConfig, folder: Path) -> Iterator[Served]:
    """A server with these options, until the block ends."""
    with ExitStack() as stack:
        listener = listen(config.host, config.port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # so that slow readers are soon noticed
        stack.callback(listener.close)
        app = build(config, stack)
        server = Process(app, config.bounds, config.drain_seconds)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", folder, app)
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
