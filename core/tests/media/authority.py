"""A certificate authority of a test's own, made by the `openssl` command, and certificates of its."""

import itertools
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

__all__ = ["Authority"]

CONFIG = """
[req]
distinguished_name = subject
prompt = no
[subject]
CN = Light tests
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[host]
basicConstraints = CA:FALSE
authorityKeyIdentifier = keyid
subjectAltName = {name}
"""


class Authority:
    """Its keys are for tests alone and lie in `folder`.

    Attributes:
        certificate: file that who trusts it reads.
    """

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("there is no openssl command to make certificates with")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._serials, self.certificate = folder, itertools.count(1), folder / "authority.pem"
        self._run("req", "-x509", "-keyout", "authority.key", *self._new_key(), "-extensions", "authority", "-days", "30")
        self._run("req", "-keyout", "host.key", *self._new_key(), out="request.pem")

    def server_context(self, name: str, is_expired: bool = False) -> ssl.SSLContext:
        """What a server needs that goes by `name`, such as "DNS:pictures.test"."""
        certificate = f"{name.replace(':', '-')}.pem"
        (self._folder / "config").write_text(CONFIG.format(name=name))
        signer = ("-CA", "authority.pem", "-CAkey", "authority.key", "-set_serial", str(next(self._serials)))
        extensions = ("-extfile", "config", "-extensions", "host")
        self._run("x509", "-req", "-in", "request.pem", *signer, *extensions, "-days", "-1" if is_expired else "30", out=certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._folder / certificate, self._folder / "host.key")
        return context

    def fill_folder(self, folder: Path) -> None:
        """Puts the authority into a folder as OpenSSL looks for it there."""
        folder.mkdir()
        name = self._run("x509", "-in", "authority.pem", "-noout", "-subject_hash", out="").strip()
        (folder / f"{name}.0").write_bytes(self.certificate.read_bytes())

    def _new_key(self) -> tuple[str, ...]:
        (self._folder / "config").write_text(CONFIG.format(name="DNS:unused"))
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-config", "config")

    def _run(self, *arguments: str, out: str = "authority.pem") -> str:
        command = ["openssl", *arguments, *(("-out", out) if out else ())]
        ended = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.stderr}"
        return ended.stdout
