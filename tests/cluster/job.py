"""A job on the nodes of a cluster: its UDIs and sshds, and commands in them."""

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from tests.node import PREFIX, Node

SETUP, UNSETUP = f"{PREFIX}/sbin/setupRoot", f"{PREFIX}/sbin/unsetupRoot"


class Job:
    """A job of *user* on *nodes*, set up on all of them; `with` takes it down again."""

    def __init__(
        self,
        nodes: Sequence[Node],
        image: str,
        *options: str,
        kind: str = "docker",
        ident: str = "17",
        user: str = "alice",
        names: str = "",
    ) -> None:
        self.nodes, self.ident, self.user = nodes, ident, user
        names = names or " ".join(f"{node.name}/1" for node in nodes)
        words = [SETUP, "-u", user, "-N", names, "--job", ident, *options, kind, image]
        started = [node.popen(words) for node in nodes]
        for process in started:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (0, ""), (out, err)

    def run(self, *words: str, on: int = 0, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run *words* in the UDI of node number *on*."""
        env: Mapping[str, str] = {"SHIFTER_JOB_ID": self.ident, **options.pop("env", {})}
        user = options.pop("user", self.user)
        done = self.nodes[on].shifter(*words, user=user, env=env, **options)
        assert not check or done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done

    def sh(self, script: str, **options: Any) -> str:
        """Run a script of the shell in the UDI; return its output. What it says on stderr fails it."""
        done = self.run("sh", "-ec", script, **options)
        assert done.stderr == "", (script, done)
        return done.stdout

    def ssh(self, there: str, *words: str, **options: Any) -> str:
        """Run a command on another node by ssh; return its output."""
        return self.run("ssh", there, *words, **options).stdout

    def end(self) -> None:
        """unsetupRoot on all nodes."""
        ended = [node.run([UNSETUP, "--job", self.ident]) for node in self.nodes]
        assert [(done.returncode, done.stderr) for done in ended] == [(0, "")] * len(ended), ended

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
