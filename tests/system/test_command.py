"""What is run, where, and with which exit status: words, entry points, working directories, `#!` scripts, usage."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import Tree
from tests.node import PREFIX, Node, User

DOOR = f"{PREFIX}/bin/shifter"
E, C = ["/bin/show", "entry word", ""], ["command", "a b", "$HOME"]

SHOW = '#!/bin/sh\nprintf \'<%s>\' "$0" "$@"\n'


@pytest.fixture(scope="module")
def rich(image: Tree, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The tiny image with a program that shows its words, a shell of its own, and files that can't be executed."""
    tree = image.copy(tmp_path_factory.mktemp("images") / "rich")
    (tree.path / "bin/show").write_text(SHOW)
    (tree.path / "bin/orphan").write_text("#!/no/such/interpreter\n")
    (tree.path / "bin/plain").write_text("echo no line with an interpreter\n")
    (tree.path / "bin/elf").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\xb7\0" + bytes(44))
    (tree.path / "bin/noexec").write_text(SHOW)
    (tree.path / "bin/mysh").write_text("#!/bin/sh\necho /bin/mysh\n")
    (tree.path / "opt/only here").mkdir()
    (tree.path / "opt/closed").mkdir(mode=0o700)
    for name in ("show", "orphan", "plain", "elf", "mysh"):
        (tree.path / "bin" / name).chmod(0o755)
    return tree


@pytest.fixture(scope="module", params=["private", "shared"])
def node(request: pytest.FixtureRequest, rich: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(shared=request.param == "shared") as made:
        made.add_image("docker:tiny:1", rich)
        made.add_image("docker:both:1", rich, entry=E, cmd=C, workdir="/opt/only here")
        made.add_image("docker:entry:1", rich, entry=E)
        made.add_image("docker:cmd:1", rich, cmd=C)
        made.add_image("docker:empty:1", rich, entry=[], cmd=[])
        made.add_image("docker:badworkdir:1", rich, workdir="/no/where")
        made.add_image("docker:path:1", rich, env={"PATH": "/opt/first:/bin"})
        yield made
        made.check_leaks()


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "options", "words", "expected"),
    [
        ("both:1", [], ["/bin/show", "a", "b c"], ["/bin/show", "a", "b c"]),
        ("both:1", ["--entrypoint"], [], E + C),
        ("both:1", ["--entrypoint"], ["a", "b c", ""], [*E, "a", "b c", ""]),
        ("both:1", ["--entry"], ["--", "-x"], [*E, "-x"]),
        ("both:1", ["--entrypoint=/bin/show"], [], ["/bin/show"]),
        ("both:1", ["--entrypoint=show"], ["a", "--b"], ["show", "a", "--b"]),
        ("both:1", ["--entrypoint=/no", "--entry=show"], [], ["show"]),
        ("both:1", ["--entrypoint=show", "--entrypoint"], [], E + C),
        ("entry:1", ["--entrypoint"], [], E),
        ("cmd:1", ["--entrypoint=show"], [], ["show"]),
        ("empty:1", ["--entrypoint=show"], ["a"], ["show", "a"]),
        ("cmd:1", [], ["show", "--image=x", "-v", "--"], ["show", "--image=x", "-v", "--"]),
    ],
)
def test_words(node: Node, tag: str, options: list[str], words: list[str], expected: list[str]) -> None:
    done = node.shifter(f"--image={tag}", *options, *words)
    assert done.returncode == 0, done.stderr
    shown = [re.sub("^show$", "/bin/show", expected[0]), *expected[1:]]  # a script sees the path it was found at
    assert done.stdout.replace("</usr/bin/show>", "</bin/show>") == "".join(f"<{word}>" for word in shown)


@pytest.mark.parametrize("tag", ["cmd:1", "empty:1", "tiny:1"])
@pytest.mark.parametrize("words", [[], ["echo", "ran"]])
def test_entry_point_of_an_image_without_one(node: Node, tag: str, words: list[str]) -> None:
    done = node.shifter(f"--image={tag}", "--entrypoint", *words)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == "shifter: --entrypoint: the image has no entry point; name one: --entrypoint=CMD\n"


def test_entry_point_is_one_word(node: Node) -> None:
    done = node.shifter("--image=both:1", "--entrypoint=/bin/show a")
    assert (done.returncode, done.stderr) == (127, "shifter: /bin/show a: no such file in the container\n")


@pytest.mark.parametrize("tag", ["tiny:1", "cmd:1", "both:1"])
@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ("/bin/mysh", "/bin/mysh"),
        ("/bin/sh", "/bin/sh"),
        ("/bin/only-on-the-node", "/bin/sh"),
        ("/bin/noexec", "/bin/sh"),
        ("/opt", "/bin/sh"),
        ("mysh", "/bin/sh"),
        ("", "/bin/sh"),
    ],
)
def test_without_words_the_users_shell(node: Node, tag: str, shell: str, expected: str) -> None:
    """The image's CMD is not used; $SHELL, which anybody may set to anything, neither."""
    passwd = node.read("/etc/passwd")
    line = "zoe:x:5010:5010::/tmp:"
    node.write(
        "/etc/passwd", "".join(f"{x}\n" for x in passwd.splitlines() if not x.startswith("zoe")) + line + shell + "\n"
    )
    done = node.shifter(
        f"--image={tag}", user=User("zoe", 5010, 5010, "/tmp"), input='echo "$0"', env={"SHELL": "/bin/show"}
    )
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


# --- exit status -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 2, 77, 124, 125, 126, 127, 255])
def test_status_of_the_command(node: Node, status: int) -> None:
    done = node.shifter("--image=tiny:1", "sh", "-c", f"exit {status}")
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT, signal.SIGPIPE, signal.SIGXFSZ])
def test_command_ended_by_a_signal(node: Node, number: signal.Signals) -> None:
    done = node.shifter("--image=tiny:1", "sh", "-c", f"kill -{int(number)} $$; sleep 5")
    assert done.returncode == -number


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["nonsense"], 127, "not found on the container's PATH"),
        (["/no/such/program"], 127, "no such file in the container"),
        (["/etc/passwd/x"], 127, "Not a directory"),
        ([""], 127, "not found on the container's PATH"),
        (["/bin/orphan"], 127, "it is there, but the program that its #! line or its ELF header names is not"),
        (["/bin/noexec"], 126, "Permission denied"),
        (["noexec"], 126, "Permission denied"),
        (["/etc"], 126, "Permission denied"),
        (["/bin/elf"], 126, "neither a program for this machine nor a script with a #! line"),
        (["/bin/plain"], 126, "neither a program for this machine nor a script with a #! line"),
        (["/opt/closed/x"], 126, "Permission denied"),
        (["a\nb\x1b[31m"], 127, "not found on the container's PATH"),
    ],
)
def test_command_that_can_not_be_run(node: Node, words: list[str], status: int, message: str) -> None:
    done = node.shifter("--image=tiny:1", *words)
    assert done.returncode == status
    shown = "".join(c if c >= " " else "?" for c in words[0])
    assert done.stderr == f"shifter: {shown}: {message}\n"


def test_path_is_the_containers(node: Node) -> None:
    """That of the image, if it has one; what the caller's names does not matter then."""
    node.write("/home/alice/bin/show", "#!/bin/sh\necho home\n", mode=0o755, owner="alice")
    home = {"PATH": "/home/alice/bin"}
    assert node.shifter("--image=tiny:1", "show", env=home).stdout == "home\n"
    assert node.shifter("--image=path:1", "show", env=home).stdout == "</bin/show>"
    assert node.shifter("--image=path:1", "--env=PATH=/home/alice/bin", "show").stdout == "home\n"
    assert node.shifter("--image=tiny:1", "-E", "true").returncode == 0, "a default is searched without any PATH"


# --- working directory -----------------------------------------------------------------------------------------------


def where(node: Node, *options: str, tag: str = "both:1", **run: object) -> tuple[str, str]:
    done = node.shifter(f"--image={tag}", *options, "pwd", **run)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n"), done.stderr


def test_working_directory_is_kept(node: Node) -> None:
    node.mkdir("/home/alice/a dir/\udcff", owner="alice")
    for path in ("/home/alice", "/home/alice/a dir/\udcff", "/tmp", "/", "/etc", "/usr/bin"):
        assert where(node, cwd=path) == (path, "")


def test_working_directory_that_is_missing_inside(node: Node) -> None:
    node.mkdir("/scratch", mode=0o777)
    message = "shifter: the working directory {} is not there in the container; using {}\n"
    assert where(node, cwd="/scratch") == ("/home/alice", message.format("/scratch", "/home/alice"))
    assert where(node, cwd="/scratch", env={"HOME": "/nowhere"}) == ("/", message.format("/scratch", "/"))
    assert where(node, "--env=HOME=/tmp", cwd="/scratch")[0] == "/home/alice", "the caller's HOME, not the command's"
    assert node.shifter("--image=tiny:1", "/bin/pwd", cwd="/scratch", clean=True).stdout == "/\n"


def test_working_directory_that_was_removed(node: Node) -> None:
    done = node.run(f"mkdir gone; cd gone; rmdir ../gone; exec {DOOR} --image=tiny:1 pwd", "alice")
    assert (done.returncode, done.stdout) == (0, "/home/alice\n"), done.stderr
    assert (
        done.stderr.startswith("shifter: the working directory (unreachable) is not there")
        and done.stderr.count("\n") == 1
    )


def test_working_directory_that_the_user_may_not_enter_inside(node: Node) -> None:
    """/opt/closed is the user's on the node and root's in the image."""
    node.mkdir("/opt/closed", owner="alice", mode=0o700)
    path, said = where(node, cwd="/opt/closed")
    assert path == "/home/alice" and "/opt/closed" in said


def test_working_directory_that_is_asked_for(node: Node) -> None:
    assert where(node, "--workdir=/tmp") == ("/tmp", "")
    assert where(node, "-w/srv/data") == ("/srv/data", "")
    assert where(node, "--workdir") == ("/opt/only here", "")
    assert where(node, "-w") == ("/opt/only here", "")
    assert where(node, "--workdir", "--workdir=/srv") == ("/srv", "")
    assert where(node)[0] == "/home/alice", "the image's is not used unasked"


@pytest.mark.parametrize(
    ("tag", "option", "message"),
    [
        ("tiny:1", "--workdir", "--workdir: the image has no working directory; name one: --workdir=PATH"),
        (
            "badworkdir:1",
            "-w",
            "--workdir /no/where: No such file or directory (the path is one inside of the container)",
        ),
        (
            "both:1",
            "--workdir=/no",
            "--workdir /no: No such file or directory (the path is one inside of the container)",
        ),
        ("both:1", "--workdir=", "--workdir : No such file or directory (the path is one inside of the container)"),
        ("both:1", "-w/root", "--workdir /root: Permission denied (the path is one inside of the container)"),
        ("both:1", "-w/etc/passwd", "--workdir /etc/passwd: Not a directory (the path is one inside of the container)"),
    ],
)
def test_asked_for_working_directory_that_can_not_be_entered(node: Node, tag: str, option: str, message: str) -> None:
    done = node.shifter(f"--image={tag}", option, "echo", "ran")
    assert (done.returncode, done.stdout, done.stderr) == (125, "", f"shifter: {message}\n")


# --- scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "environment", "expected"),
    [
        ("--image=tiny:1 /bin/show", {}, ["/bin/show"]),
        ("--image=tiny:1 --env=A=1  -v   /bin/show", {}, ["/bin/show"]),
        ("\t--image=tiny:1\t--  /bin/show -e ", {}, ["/bin/show", "-e"]),
        ("-itiny:1 --entrypoint=show -- x", {}, ["show", "x"]),
        ("--image=both:1 --entrypoint", {}, E),
        ("/bin/show", {"SHIFTER_IMAGE": "tiny:1"}, ["/bin/show"]),
        ("/bin/show -e", {"SHIFTER_IMAGE": "tiny:1"}, ["/bin/show", "-e"]),
        ("--image=tiny:1 /bin/show", {"SHIFTER_IMAGE": "nonsense"}, ["/bin/show"]),
    ],
)
@pytest.mark.parametrize("start", ["./script", "/home/alice/script", "script"])
def test_script(node: Node, line: str, environment: dict[str, str], expected: list[str], start: str) -> None:
    node.write("/home/alice/script", f"#!{DOOR} {line}\n", mode=0o755, owner="alice")
    path = {"PATH": "/home/alice:/usr/bin:/bin"}
    words = ["-x", "b c", "", "--image=other", "--"]
    done = node.run(["sh", "-c", f'{start} "$@"', "sh", *words], "alice", env=environment | path)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace("</usr/bin/show>", "</bin/show>").replace("<show>", "</bin/show>")
    name = "/home/alice/script" if start == "script" else start
    expected = [expected[0].replace("show", "/bin/show") if expected[0] == "show" else expected[0], *expected[1:]]
    assert shown == "".join(f"<{word}>" for word in [*expected, name, *words])


def test_script_for_a_shell(node: Node) -> None:
    text = f'#!{DOOR} --image=tiny:1 /bin/sh\n. /etc/os-release\nprintf "%s|" "$ID" "$@"\nexit 7\n'
    node.write("/home/alice/a script", text, mode=0o755, owner="alice")
    done = node.run(["/home/alice/a script", "a  b", "c"], "alice")
    assert (done.returncode, done.stdout) == (7, "tiny|a  b|c|"), done.stderr


def test_script_with_a_usage_error(node: Node) -> None:
    node.write("/home/alice/script", f"#!{DOOR} --image=tiny:1 --nonsense /bin/sh\n", mode=0o755, owner="alice")
    done = node.run(["./script"], "alice")
    assert done.returncode == 125 and "unknown option '--nonsense'" in done.stderr


def test_ordinary_argument_with_blanks_is_never_split(node: Node) -> None:
    done = node.shifter("--image=tiny:1 /bin/show", "x")
    assert done.returncode == 125 and "tiny:1 /bin/show" in done.stderr
    done = node.shifter("--env=A=b c", "--image=tiny:1", "sh", "-c", 'echo "$A"')
    assert done.stdout == "b c\n"
    # The door's own path as second word looks like a script, but is none.
    script = [DOOR, "--workdir=/opt/only here", DOOR]
    done = node.run(script, "alice", env={"SHIFTER_IMAGE": "both:1"}, input="pwd\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "/opt/only here\n", "")
    # A script that somebody runs by the door's name.
    node.write("/home/alice/plain", "#!/bin/sh\necho $0\n", mode=0o755, owner="alice")
    assert node.shifter("--workdir=/opt/only here", "/home/alice/plain", env={"SHIFTER_IMAGE": "both:1"}).stdout == (
        "/home/alice/plain\n"
    )


# --- what Shifter itself says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "-h", "-vh"])
@pytest.mark.parametrize("user", ["alice", "root"])
def test_help(node: Node, option: str, user: str) -> None:
    done = node.shifter(option, "--image=nonsense", "ignored", user=user)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: shifter ") and "--entrypoint" in done.stdout


def test_version(node: Node) -> None:
    done = node.shifter("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"shifter \S+ \(build \S+\)\n", done.stdout)


def test_help_needs_no_configuration(node: Node) -> None:
    node.conf("nonsense\n")
    try:
        assert node.shifter("--help").returncode == 0
        done = node.shifter("--image=tiny:1", "true")
        assert done.returncode == 125 and "udiRoot.conf:1" in done.stderr
    finally:
        node.conf()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nonsense", "x"], "unknown option '--nonsense'"),
        (["-z"], "unknown option '-z'"),
        (["--image"], "option '--image' needs a value"),
        (["-vi"], "option '-i' needs a value"),
        (["--clearenv=1"], "option '--clearenv' takes no value"),
        (["--help", "--nonsense"], "unknown option '--nonsense'"),
        (["-\x1b[31m"], r"unknown option '-\x1b[31m'"),
        (["true"], "no image: use --image=TYPE:TAG, or set SHIFTER_IMAGE"),
        ([], "no image: use --image=TYPE:TAG, or set SHIFTER_IMAGE"),
    ],
)
def test_usage_error(node: Node, words: list[str], message: str) -> None:
    done = node.shifter(*words)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == f"shifter: {message}\nTry 'shifter --help'.\n"


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("", "no image: use --image=TYPE:TAG"),
        ("nonsense:1", "nonsense:1"),
        ("a b", "the character ' ' is not allowed"),
        ("id:../x", "not allowed"),
        ("local:/", "allowLocalChroot"),
        ("custom:", "has no name"),
    ],
)
def test_image_that_is_not_there(node: Node, tag: str, message: str) -> None:
    done = node.shifter(f"--image={tag}", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("shifter: ") and message in done.stderr and done.stderr.count("\n") <= 2


def test_help_to_a_full_disk(node: Node) -> None:
    done = node.run(f"{DOOR} --help > /dev/full", "alice")
    assert done.returncode == 125 and "No space left" in done.stderr


def test_help_runs_without_any_privilege(node: Node) -> None:
    """What prints it is Python: seen under strace, that has the caller's ids in all three places."""
    script = f"strace -f -qq -s 300 -o /tmp/trace -e trace=getresuid,setresuid,execve -u alice {DOOR} --help"
    assert node.run(script).returncode == 0
    trace = node.read("/tmp/trace")
    before, _, after = trace.partition("shifter_cli")
    last = [line.split(None, 1)[1] for line in before.splitlines() if "getresuid" in line][-1]
    assert last == "getresuid([5001], [5001], [5001]) = 0" and "setresuid" not in after


# --- own records -----------------------------------------------------------------------------------------------------


def test_list_of_own_udis(node: Node) -> None:
    node.shifter("--image=tiny:1", "true")
    node.shifter("--image=tiny:1", "true", user="bob")
    done = node.shifter("--udi-list")
    assert done.returncode == 0
    fields = done.stdout.split("\0")
    assert any(field == "uid=5001" for field in fields) and not any(field == "uid=5002" for field in fields)
    used = [field for field in fields if re.fullmatch(r"[0-9a-f]{16} \d+", field)]
    assert used and fields.count("end=record") == len(used)
    assert node.shifter("--udi-list", user="dave").stdout == ""
    done = node.run(f"{DOOR} --udi-list > /dev/full", "alice")
    assert done.returncode == 125


def test_list_is_an_option_of_its_own_only(node: Node) -> None:
    done = node.shifter("--udi-list", "x")
    assert done.returncode == 125 and "unknown option '--udi-list'" in done.stderr


def test_options_in_the_help_are_those_of_the_door(node: Node) -> None:
    header = (Path(__file__).parents[2] / "build/options.h").read_text()
    names = re.findall(r'\{"([a-z-]+)", ', header)
    text = node.shifter("--help").stdout
    assert names and all(f"--{name}" in text for name in names)
