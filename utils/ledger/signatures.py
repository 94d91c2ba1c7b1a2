"""Who stands behind a statement: signatures of privacy.json by SSH keys (`ssh-keygen -Y`).

A statement that verifies is consistent, and about its files, whose digests it holds; anybody could
have written it. A signature says who did.
"""

import subprocess
from pathlib import Path

from utils.errors import UsageError
from utils.files import SIGNATURE, STATEMENT

NAMESPACE = "privacy-statement"  # a signature for something else is none for this


def sign(folder: Path, key: str) -> Path:
    """Sign the statement in a folder; returns the file of the signature. ssh-keygen asks for the
    passphrase of the key, if it has one.

    Raises:
        UsageError: there is no statement or no such key, or ssh-keygen is missing or refuses.
    """
    statement, signature = folder / STATEMENT, folder / SIGNATURE
    if not statement.is_file():
        raise UsageError(f"{folder} holds no privacy.json: there is nothing to sign")
    if not Path(key).is_file():
        raise UsageError(f"--key {key}: there is no such file")
    content = statement.read_bytes()
    run = _run(["sign", "-f", key], content)
    if run.returncode:
        raise UsageError(f"--key {key}: {_why(run)}")
    signature.write_bytes(run.stdout)
    return signature


def check_signature(folder: Path, signers: str | None) -> tuple[list[str], list[str]]:
    """What there is to say of the signature of a statement, and what is wrong with it: sentences.

    Args:
        signers: file of those who are trusted, as ssh-keygen reads it (`allowed_signers`): a name
            and a public key a line.

    Raises:
        UsageError: there is no such file, or no ssh-keygen.
    """
    if signers is not None and not Path(signers).is_file():
        raise UsageError(f"--signers {signers}: there is no such file")
    signature, content = folder / SIGNATURE, (folder / STATEMENT).read_bytes()
    if not signature.is_file():
        return [], [] if signers is None else ["it is not signed"]
    at = ["-s", str(signature)]
    if _run(["check-novalidate", *at], content).returncode:
        return [], ["its signature is not of this statement"]
    if signers is None:
        return ["signed; --signers FILE says by whom, of those whom you trust"], []
    run = _run(["find-principals", *at, "-f", signers], content)
    names = run.stdout.decode().splitlines()
    for name in names:
        if not _run(["verify", *at, "-f", signers, "-I", name], content).returncode:
            return [f"signed by {name}"], []
    return [], [f"it is signed by nobody in {signers}"]


def _run(arguments: list[str], content: bytes) -> subprocess.CompletedProcess:
    verb, *rest = arguments
    command = ["ssh-keygen", "-Y", verb, "-n", NAMESPACE, *rest]
    try:
        return subprocess.run(command, input=content, capture_output=True)
    except FileNotFoundError as error:
        raise UsageError("signatures need ssh-keygen, which comes with OpenSSH") from error


def _why(run: subprocess.CompletedProcess) -> str:
    lines = run.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "ssh-keygen refused"
