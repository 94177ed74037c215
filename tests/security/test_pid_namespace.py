"""A caller in a PID namespace whose PID 1 is a program of the user: it must not become "the node's first namespace".

HTCondor (USE_PID_NAMESPACES), systemd (PrivatePIDs=) and wrappers of sites make such namespaces. The user's PID 1 goes
into a user namespace, where it may mount what it likes at /run/shifter; root must not follow it there.
"""

import textwrap

from tests.node import Node

# PID 1 of the namespace, as alice. What it does in its own mount namespace is legitimate for any user.
EVIL_INIT = """
import ctypes, os, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, target, kind=None, flags=4096):
    if libc.mount(source.encode(), target.encode(), kind and kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), f"mount {source} {target}")
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:  # stays in the node's user namespace
    os.read(ready[0], 1)
    done = subprocess.run(sys.argv[1:], capture_output=True, text=True, timeout=40)
    sys.stdout.write(f"exit {done.returncode} {done.stdout}{done.stderr}")
    sys.stdout.flush()
    os._exit(0)
assert os.getpid() == 1 and libc.unshare(0x10020000) == 0  # CLONE_NEWUSER | CLONE_NEWNS
open("/proc/self/setgroups", "w").write("deny")
open("/proc/self/uid_map", "w").write("0 5001 1")
open("/proc/self/gid_map", "w").write("0 5001 1")
mount("/srv/private", "/run/shifter")
os.write(ready[1], b"1")
os.waitpid(child, 0)
"""


def test_pid_1_of_a_user_is_not_home(tiny_node: Node) -> None:
    """Root followed PID 1 into the user's mount namespace, and made /srv/private (there: /run/shifter) 0711."""
    assert tiny_node.shifter("--image=tiny:1", "/bin/true", user="bob").returncode == 0  # so that /run/shifter is there
    tiny_node.mkdir("/srv/private", 0o700)
    tiny_node.mkdir("/srv/private/udi")
    tiny_node.write("/srv/private/file", "secret")
    tiny_node.write("/tmp/evil.py", textwrap.dedent(EVIL_INIT))
    enter = "unshare --mount --pid --fork --mount-proc setpriv --reuid 5001 --regid 5001 --clear-groups"
    done = tiny_node.run(
        f"{enter} /usr/bin/python3 /tmp/evil.py /opt/shifter/bin/shifter --image=tiny:1 /bin/echo inside", timeout=60
    )
    assert tiny_node.path("/srv/private").stat().st_mode & 0o7777 == 0o700, done.stdout
    assert not tiny_node.exists("/srv/private/udi/5001"), "nor did the door"
    assert done.stdout.startswith("exit 125") and "PID 1" in done.stdout, done.stdout + done.stderr


def test_pid_namespace_of_the_site_works(tiny_node: Node) -> None:
    done = tiny_node.run(
        "unshare --mount --pid --fork --mount-proc setpriv --reuid 5001 --regid 5001 --clear-groups "
        "/opt/shifter/bin/shifter --image=tiny:1 /bin/echo inside"
    )
    assert done.stdout == "inside\n", done.stderr
