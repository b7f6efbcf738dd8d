"""A private nginx with the project's configuration: on a free port of this machine, gone afterwards."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.deploy import DEPLOY

PROGRAM = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

_OUTER = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; {user}
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/conf.d/*.conf;
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def proxy(folder: Path, ports: Sequence[int]) -> Iterator[str]:
    """nginx in front of servers on these ports; yields its address, whose certificate nobody knows."""
    assert PROGRAM
    port, name = free_port(), "models.example.org"
    (folder / "conf.d").mkdir(parents=True)
    key, certificate = folder / "key", folder / "certificate"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], capture_output=True, check=True)
    places = {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        f"/etc/ssl/certs/{name}.pem": str(certificate),
        f"/etc/ssl/private/{name}.key": str(key),
        **{f"127.0.0.1:800{i}": f"127.0.0.1:{own}" for i, own in enumerate(ports, 1)},
    }
    for file in ("nginx.conf", "upstream.conf"):
        text = (DEPLOY / file).read_text(encoding="utf-8")
        for before, after in places.items():
            text = text.replace(before, after)
        told = re.sub(r"(?m)^ *#.*", "", text)
        assert not re.search(r"/etc/|443|127\.0\.0\.1:800", told), "everything is in a place of the test's own"
        (folder / "conf.d" / file).write_text(text)
    (folder / "outer.conf").write_text(_OUTER.format(folder=folder, user="user root;" if os.geteuid() == 0 else ""))
    command = [PROGRAM, "-p", str(folder), "-c", str(folder / "outer.conf")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.02)
        try:
            yield f"https://127.0.0.1:{port}"
        finally:
            process.terminate()
