"""A service of its own with all its guards up: `rayward serve` with TLS, tokens and a registry."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import re
import secrets
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from isolation import environment_for_a_cluster, free_port
from processes import descendants, titled

from serve.http.tokens import add_token


@dataclass
class Secured:
    url: str
    cert: Path
    token_file: Path
    registry: Path
    ray_address: str
    process: subprocess.Popen[str]
    score: str
    admin: str
    temporary: Path
    printed: list[str] = field(default_factory=list)

    def client(self, token: str | None = None) -> httpx.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        context = ssl.create_default_context(cafile=self.cert)
        return httpx.Client(base_url=self.url, verify=context, headers=headers, timeout=60)

    def processes(self) -> list[psutil.Process]:
        here = psutil.Process(self.process.pid)
        return [here, *descendants(here)]

    def replica_pids(self) -> set[int]:
        return {process.pid for process in titled("ray::ServeReplica", self.processes())}

    def log_files(self) -> list[Path]:
        """All that Ray, Serve and HAProxy wrote for this service."""
        return [path for path in self.temporary.rglob("*") if path.is_file()]


def self_signed(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rayward test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = directory / "cert.pem", directory / "key.pem"
    files[0].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


@contextlib.contextmanager
def secured_service(
    python: str, export: Path, directory: Path, *options: str, **environment: str
) -> Iterator[Secured]:
    """Started by its command; what it writes lies in a temporary folder of its own."""
    cert, key = self_signed(directory)
    token_file = directory / "tokens.json"
    score = add_token(token_file, "trainer", ["score"])
    admin = add_token(token_file, "operator", ["admin"])
    registry = directory / "registry"
    shutil.copytree(export, registry / "first")
    # Ray and HAProxy make sockets in there, and a socket's path must be short.
    temporary = Path(f"/tmp/r{secrets.token_hex(2)}")
    temporary.mkdir(mode=0o700)
    command = [python, "-m", "rayward", "serve", str(export), "--port", str(free_port())]
    command += ["--device", "cpu", "--cpus-per-replica", "0.5", "--threads-per-replica", "1"]
    command += ["--num-replicas", "2", "--token-file", str(token_file), "--registry", str(registry)]
    command += ["--tls-cert", str(cert), "--tls-key", str(key), *options]
    own = {"RAY_TMPDIR": str(temporary), "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    inherited = environment_for_a_cluster()
    inherited.pop("VLLM_HOST_IP", None)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=inherited | own | environment,
    )
    try:
        assert process.stdout is not None
        printed: list[str] = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("ready"):
                break
        else:
            raise AssertionError("it did not start:\n" + "".join(printed))
        text = "".join(printed)
        [url] = re.findall(r"POST (\S+)/v1/score", text)
        [address] = re.findall(r"Ray +(\S+)", text)
        yield Secured(
            url, cert, token_file, registry, address, process, score, admin, temporary, printed
        )
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        shutil.rmtree(temporary, ignore_errors=True)
