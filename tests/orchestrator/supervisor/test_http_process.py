"""TLS files are looked at before anything is loaded."""

import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator.settings import HttpSettings
from orchestrator.supervisor.http_process import check_certificate
from protocol.errors import BadRequest


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return certificate(tmp_path, "one")


def certificate(folder: Path, name: str, *more: str) -> tuple[Path, Path]:
    if not shutil.which("openssl"):
        pytest.skip("makes certificates with openssl")
    files = folder / f"{name}.pem", folder / f"{name}.key"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", *(more or ("-nodes",)), *subject]
    subprocess.run([*command, "-out", str(files[0]), "-keyout", str(files[1])], check=True, capture_output=True)
    return files


def test_a_certificate_and_its_key_serve_in_two_files_or_in_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    check_certificate(HttpSettings())
    check_certificate(HttpSettings(http_certificate=pair[0], http_private_key=pair[1]))
    both = tmp_path / "both.pem"
    both.write_text(pair[0].read_text() + pair[1].read_text())
    check_certificate(HttpSettings(http_certificate=both))


def test_files_that_dont_serve_are_named_with_the_reason(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = certificate(tmp_path, "two", "-passout", "pass:secret")
    for files, reason in (
        ((pair[0], other[1]), "can't be used for TLS"),
        ((pair[0], None), "can't be used for TLS"),
        (other, "can't be used for TLS"),
        ((pair[1], pair[1]), "can't be used for TLS"),
        ((None, pair[1]), "no certificate"),
        ((tmp_path / "none.pem", pair[1]), "There is no file"),
    ):
        with pytest.raises(BadRequest, match=reason):
            check_certificate(HttpSettings(http_certificate=files[0], http_private_key=files[1]))
