"""Running the distribution's tools: with no privilege that they don't need, and never longer than we live."""

import os
import subprocess
from typing import IO, Any

from shifter.errors import ImageError
from shifter.linux.identity import Identity

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
"""What a tool gets, and where it is found: nothing of the caller's, who may be root by sudo with a PATH of a user's."""


class Helper:
    """A started tool. Use it in a ``with``: it is killed if it has not been waited for at the end of that.

    argv: the tool and its arguments; account: whom to run it as (root: whoever we are); stdin: as in Popen. Its
    standard output and error are kept and shown only if it fails.
    """

    def __init__(
        self,
        argv: list[str],
        account: Identity | None = None,
        stdin: int = subprocess.DEVNULL,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = argv[0]
        self._said = os.memfd_create("output")
        # The tool dies with us (SIGKILL leaves nobody to end it), and no file it executes can give it privileges.
        wrapper = ["setpriv", "--no-new-privs", "--pdeathsig", "KILL"]
        if account is not None and account.uid != 0:
            wrapper += ["--reuid", str(account.uid), "--regid", str(account.gid), "--clear-groups", "--inh-caps=-all"]
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [*wrapper, *argv],
            stdin=stdin,
            stdout=self._said,
            stderr=self._said,
            cwd="/",
            env=ENVIRONMENT | (environment or {}),
            start_new_session=True,
        )

    @property
    def stdin(self) -> IO[bytes]:
        """The pipe to the tool."""
        assert self.process.stdin is not None
        return self.process.stdin

    def finish(self, what: str) -> None:
        """Wait for the tool. Raises ImageError, which begins with *what*, when it failed."""
        status = self.process.wait()
        if status != 0:
            raise ImageError(f"{what}: {self.name}: {self.complaint() or f'exit status {status}'}")

    def complaint(self) -> str:
        """Return the line of the tool's output that says most about a failure."""
        data = os.pread(self._said, 1 << 16, max(0, os.fstat(self._said).st_size - (1 << 16)))
        lines = [
            line.strip() for line in data.decode("utf-8", "replace").replace("\r", "\n").split("\n") if line.strip()
        ]
        telling = [line for line in lines if "No space" in line or "FATAL" in line or "rror" in line]
        return (telling or lines or [""])[0 if telling else -1]

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
        os.close(self._said)


def run(argv: list[str], what: str, account: Identity | None = None, environment: dict[str, str] | None = None) -> None:
    """Run a tool to its end; parameters as of Helper. Raises ImageError, which begins with *what*, when it fails."""
    try:
        with Helper(argv, account, environment=environment) as tool:
            tool.finish(what)
    except FileNotFoundError as error:
        raise ImageError(f"{what}: setpriv is not installed") from error
