"""What the tests of mounts and volumes share: launches that must work or be refused, and the mount table inside."""

from tests.node import Mount, Node


def works(node: Node, script: str, *options: str, **more: object) -> str:
    done = node.shifter("--image=tiny:1", *options, "/bin/sh", "-c", script, **({"cwd": "/"} | more))  # type: ignore[arg-type]
    assert (done.returncode, done.stderr) == (0, ""), (done.returncode, done.stdout, done.stderr)
    return done.stdout


def refused(node: Node, *options: str, **more: object) -> str:
    """Return the one line that says why nothing was run."""
    done = node.shifter("--image=tiny:1", *options, "/bin/true", **more)  # type: ignore[arg-type]
    assert (done.returncode, done.stdout) == (125, ""), done
    assert done.stderr.startswith("shifter: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def mounts(node: Node, *options: str) -> dict[str, Mount]:
    """Mount point to mount, the topmost if several are stacked (the order of lines says nothing about that)."""
    table = [Mount.parse(line) for line in works(node, "cat /proc/self/mountinfo", *options).splitlines()]
    covered = {(mount.parent, mount.target) for mount in table}
    return {mount.target: mount for mount in table if (mount.id, mount.target) not in covered}


def flags(mount: Mount) -> set[str]:
    return set(mount.options.split(","))
