"""Certificates made on the spot, by the openssl program."""

from __future__ import annotations

import subprocess
from pathlib import Path

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


def make_authority(folder: Path, name: str = "ca") -> Path:
    """The certificate of a new authority, whose key lies beside it."""
    _openssl(
        folder, "req", "-x509", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN=Authority {name}"
    )
    return folder / f"{name}.pem"


def make_certificate(authority: Path, name: str, alternative: str = "DNS:nobody") -> tuple[Path, Path]:
    """A certificate that `authority` has signed, valid for the `alternative` names, and its key."""
    folder = authority.parent
    _openssl(folder, "req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (folder / f"{name}.ext").write_text(f"subjectAltName={alternative}\n")
    signer = ["-CA", authority.name, "-CAkey", f"{authority.stem}.key", "-CAcreateserial", "-days", "2"]
    _openssl(folder, "x509", "-req", "-in", f"{name}.csr", *signer, "-extfile", f"{name}.ext", "-out", f"{name}.pem")
    return folder / f"{name}.pem", folder / f"{name}.key"
