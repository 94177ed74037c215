"""udiImage/client.c: which program does the work of ssh, scp and sftp, and with which words.

Built for a directory of the test, where the real programs are scripts that print their argument lists.
What the destination is, is judged by the real ssh (`ssh -G`), and option letters by the real programs' own strings.
"""

import getopt
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from tests.node import REPO

NODES = ["10.0.0.7", "fd00::1", "n", *(f"node{number}" for number in range(1000)), "node1.example"]
ECHO = "#!/bin/sh\nprintf '%s\\0' '{name}' \"$@\"\n"


class Client:
    """Our programs in *base*/udi, the image's in *base*/image."""

    def __init__(self, base: Path, *flags: str) -> None:
        self.udi, self.image = base / "udi", base / "image"
        for directory in ("udi/bin", "udi/libexec", "udi/etc", "image"):
            (base / directory).mkdir(parents=True)
        define = f'-DUDI_IMAGE="{self.udi}"'
        subprocess.run(
            ["gcc", "-O1", *flags, define, "-o", self.udi / "bin/ssh", REPO / "udiImage/client.c"], check=True
        )
        for tool in ("ssh", "scp", "sftp"):
            if tool != "ssh":
                os.link(self.udi / "bin/ssh", self.udi / "bin" / tool)
            for path, name in (
                (self.udi / f"libexec/{tool}.real", f"our {tool}"),
                (self.image / tool, f"image {tool}"),
            ):
                path.write_text(ECHO.format(name=name))
                path.chmod(0o755)
        (self.udi / "etc/nodes").write_text("".join(f"{name}\n" for name in sorted(NODES)))
        self.config = str(self.udi / "etc/ssh_config.nodes")

    def run(self, tool: str, *words: str | bytes, path: str | None = None) -> list[str]:
        """Who did the work, and the words that it got."""
        search = path if path is not None else f"{self.udi}/bin:relative::/nonexistent:{self.image}"
        done = subprocess.run([self.udi / "bin" / tool, *words], capture_output=True, env={"PATH": search}, timeout=60)
        assert (done.returncode, done.stderr) == (0, b""), (words, done)
        return done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(tmp_path_factory.mktemp("client"), "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


TO_NODES = [
    "node1",
    "NODE999",
    "n",
    "user@node1",
    "a@b@node1",
    "ssh://node1",
    "ssh://u@node1:2222",
    "ssh://u;x=y@NODE1/path",
    "ssh://[fd00::1]:22",
    "fd00::1",
    "FD00:0::1",
    "u@fd00::1",
    "10.0.0.7",
    "-p 22 node1",
    "-p22 node1 cmd",
    "-vvvT node1 -- cmd",
    "-l github.com node1",
    "-oPort=1 -o ProxyJump=github.com node1",
    "-J github.com node1",
    "-W github.com:22 node1",
    "-G node1",
    "-O exit node1",
    "-F /other node1 github.com",
    "-- node1",
    "-tt -L1:github.com:2 -R 1:a:2 -D1 node1",
]
TO_OTHERS = [
    "github.com",
    "node1@github.com",
    "node1000",
    "node",
    "node1.",
    "node1:22",
    "node1x",
    "ssh://node1@github.com",
    "ssh://github.com:22/node1",
    "-l node1 github.com",
    "-lnode1 github.com node1",
    "-W node1:22 github.com",
    "-o HostName=node1 github.com",
    "-- github.com node1",
    "-i node1 github.com",
    "10.0.0.70",
    "fd00::2",
    "node1/",
    "",
]


@pytest.mark.parametrize("line", TO_NODES)
def test_nodes_get_our_ssh_and_our_file(client: Client, line: str) -> None:
    words = line.split()
    assert client.run("ssh", *words) == ["our ssh", "-F", client.config, *words]


@pytest.mark.parametrize("line", TO_OTHERS)
def test_other_hosts_get_the_images_ssh_untouched(client: Client, line: str) -> None:
    words = line.split() or [""]
    assert client.run("ssh", *words) == ["image ssh", *words]
    assert client.run("ssh", *words, path="/nonexistent") == ["our ssh", *words]


@pytest.mark.parametrize("line", ["", "-V", "-Q cipher", "-p", "-J node1", "-F"])
def test_no_host_is_answered_by_ours(client: Client, line: str) -> None:
    assert client.run("ssh", *line.split()) == ["our ssh", *line.split()]


def test_jump_over_a_node(client: Client) -> None:
    """Our ssh starts this program again for each hop, with the file it was given, which is not for other hops."""
    for words in (["-J", "node1", "x.org"], ["-Jx.org,u@NODE2:22", "y.org"], ["-oProxyJump=[fd00::1]:22", "x.org"]):
        assert client.run("ssh", *words) == ["our ssh", *words]
    assert client.run("ssh", "x.org", "-J", "ssh://node1", "cmd")[0] == "our ssh"
    assert client.run("ssh", "--", "x.org", "-J", "node1")[0] == "image ssh"
    assert client.run("ssh", "x.org", "cmd", "-J", "node1")[0] == "image ssh"
    hop = ["-l", "u", "-F", client.config, "-W", "[node1]:1204", "gate.org"]
    assert client.run("ssh", *hop) == ["image ssh", "-l", "u", "-W", "[node1]:1204", "gate.org"]
    assert client.run("scp", "-J", "node1", "a", "x.org:b")[0] == "our scp"


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("scp a node1:b", True),
        ("scp node1: .", True),
        ("scp -r u@NODE1:a x.org:b", True),
        ("scp -3 x.org:a scp://u@node1:22/b", True),
        ("scp -P 22 -o Port=1 [fd00::1]:a b", True),
        ("scp u@[fd00::1]:a b", True),
        ("scp a x.org:b", False),
        ("scp a node1", False),
        ("scp ./node1:a b", False),
        ("scp :node1:a b", False),
        ("scp -i node1: x.org:a b", False),
        ("scp -S node1: a x.org:b", False),
        ("scp -t node1", False),
        ("sftp node1", True),
        ("sftp u@node1", True),
        ("sftp -b - node1:dir", True),
        ("sftp sftp://u@node1/dir", True),
        ("sftp -P 1204 [fd00::1]", True),
        ("sftp x.org node1:", False),
        ("sftp -b node1 x.org", False),
        ("sftp node1@x.org:node1", False),
    ],
)
def test_scp_and_sftp(client: Client, line: str, ours: bool) -> None:
    tool, *words = line.split()
    if ours:
        assert client.run(tool, *words) == [f"our {tool}", "-S", f"{client.udi}/bin/ssh", *words]
    else:
        assert client.run(tool, *words) == [f"image {tool}", *words]


def test_links_in_the_image_lead_to_the_covered_program_and_never_in_a_circle(client: Client, tmp_path: Path) -> None:
    """The image ssh may be covered by a link to ours; setupRoot keeps the original below udiImage/image."""
    (tmp_path / "ssh").symlink_to(client.udi / "bin/ssh")
    (tmp_path / "scp").mkdir()
    assert client.run("ssh", "x.org", path=str(tmp_path)) == ["our ssh", "x.org"]
    assert client.run("scp", "a", "b", path=f"{tmp_path}:{client.image}") == ["image scp", "a", "b"]
    covered = client.udi / "image"
    covered.mkdir()
    try:
        (covered / "ssh").write_text(ECHO.format(name="covered ssh"))
        (covered / "ssh").chmod(0o755)
        assert client.run("ssh", "x.org") == ["covered ssh", "x.org"]
    finally:
        (covered / "ssh").unlink()
        covered.rmdir()


def test_lists_of_nodes_that_are_empty_missing_or_odd(client: Client) -> None:
    path = client.udi / "etc/nodes"
    good = path.read_bytes()
    try:
        for text, found in (
            (b"", False),
            (b"\n", False),
            (b"node1", True),
            (b"\n\nnode1\n", True),
            (b"n\0\nnode1", True),
        ):
            path.write_bytes(text)
            assert client.run("ssh", "node1")[0] == ("our ssh" if found else "image ssh"), text
        path.unlink()
        assert client.run("ssh", "node1")[0] == "image ssh"
        os.mkfifo(path)
        assert client.run("ssh", "node1")[0] == "image ssh"
    finally:
        path.unlink()
        path.write_bytes(good)


def option_strings() -> dict[str, str]:
    """getopt's strings in our source."""
    return dict(re.findall(r'\{"(\w+)", "([^"]+)", UDI', (REPO / "udiImage/client.c").read_text()))


def test_option_letters_are_those_of_the_real_programs() -> None:
    ours = option_strings()
    assert set(ours) == {"ssh", "scp", "sftp"}
    for tool, letters in ours.items():
        assert b"\0" + letters.encode() + b"\0" in Path(f"/usr/bin/{tool}").read_bytes(), tool


def test_generated_command_lines(client: Client) -> None:
    """Against getopt of Python, which reads as POSIX says, and `ssh -G`, which says whom ssh would go to."""
    letters = option_strings()["ssh"]
    chance = random.Random(22)
    hosts = [
        "node1",
        "NODE2",
        "x.org",
        "u@node3",
        "node1@x.org",
        "ssh://node4:9",
        "ssh://u@x.org",
        "fd00::1",
        "10.0.0.7",
        "y",
    ]
    values = ["node1", "x.org", "5", "-p"]
    judged = 0
    for _ in range(120):
        words = []
        for letter in chance.sample("46AaCfGgKkMNnqsTtvXxYyBbceDEFiIJLlmopRSw", k=chance.randrange(4)):
            value = chance.choice(values) if letters[letters.index(letter) + 1 :][:1] == ":" else None
            words += [f"-{letter}"] if value is None else chance.choice([[f"-{letter}", value], [f"-{letter}{value}"]])
        words += [
            *chance.choice([[], ["--"]]),
            chance.choice(hosts),
            *chance.choice([[], ["cmd", "node1"], ["-v", "x"]]),
        ]
        options, rest = getopt.getopt(words, letters)
        if any(letter == "-J" and value == "node1" for letter, value in options):
            continue
        asked = subprocess.run(
            ["/usr/bin/ssh", "-G", "-F", "none", rest[0]], capture_output=True, text=True, check=True
        ).stdout
        host = re.search(r"^hostname (.*)$", asked, re.M)
        assert host
        judged += 1
        assert client.run("ssh", *words)[0] == ("our ssh" if host[1] in NODES else "image ssh"), words
    assert judged > 80


def test_any_bytes_are_a_command_line(sanitized: Client) -> None:
    """Under ASan and UBSan: somebody does the work, with all words as they are."""
    chance = random.Random(23)
    pieces = [
        "-",
        "--",
        "-J",
        "-o",
        "-F",
        ":",
        "[",
        "]",
        "@",
        "ssh://",
        "scp://",
        "node1",
        ",",
        "/",
        "\xff",
        "=",
        " ",
        "ProxyJump",
        "",
    ]
    pieces += [sanitized.config, "x" * 300, "\udc80", "%"]
    for _ in range(80):
        words = ["".join(chance.choices(pieces, k=chance.randrange(4))) for _ in range(chance.randrange(6))]
        tool = chance.choice(["ssh", "scp", "sftp"])
        who, *got = sanitized.run(tool, *words)
        assert who in (f"our {tool}", f"image {tool}")
        added = {2: got[:2], 0: []}.get(len(got) - len(words))
        if added is None:  # -F with our own file was taken out
            assert tool == "ssh" and len(got) == len(words) - 2 and "-F" in words
        else:
            assert got == [*added, *words]
