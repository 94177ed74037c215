"""The environment of the command: where each variable comes from, in which order, and which image the caller's names."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.images import Tree
from tests.node import PREFIX, Node, User

SHOW = ("cat", "/proc/self/environ")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture(scope="module", params=["private", "shared"])
def node(request: pytest.FixtureRequest, image: Tree) -> Iterator[Node]:
    """One node for the whole module: nothing here changes what another test sees."""
    with Node(shared=request.param == "shared") as made:
        made.add_image("docker:tiny:1", image)
        made.add_image("custom:tiny:1", image, env={"WHICH": "custom"})
        variables = {"PATH": "/usr/bin:/bin", "FROM": "image", "LIST": "image", "EMPTY": "", "EQUALS": "a=b='c'"}
        made.add_image("docker:env:1", image, env=variables)
        yield made
        made.check_leaks()


@pytest.fixture
def site(node: Node) -> Iterator[Node]:
    """The node with the rules of a site, for one test."""
    node.conf(
        siteEnv=["FROM=site", "SITE=1"],
        siteEnvAppend=["LIST=last", "NEW_APPEND=a"],
        siteEnvPrepend=["LIST=first", "NEW_PREPEND=p"],
        siteEnvUnset="GONE",
    )
    yield node
    node.conf()


def variables(node: Node, *options: str, command: tuple[str, ...] = SHOW, **run: Any) -> dict[str, str]:
    """The environment that a command finds, without what every PATH ends in; no variable may be there twice."""
    done = node.shifter(*options, *command, **run)
    assert done.returncode == 0, done.stderr
    found = [text.partition("=")[::2] for text in done.stdout.split("\0") if text]
    assert len(dict(found)) == len(found)
    assert dict(found)["PATH"].endswith(":/opt/udiImage/bin")
    return dict(found) | {"PATH": dict(found)["PATH"].removesuffix(":/opt/udiImage/bin")}


def test_callers_environment_reaches_the_command_as_it_is(node: Node) -> None:
    mine = {
        "TMPDIR": "/tmp/x",
        "LD_LIBRARY_PATH": "/opt/lib:/lib",
        "GCONV_PATH": "/g",
        "EMPTY": "",
        "LINES": "one\ntwo\n",
        "QUOTES": "a'b\"c`d $(e) \\",
        "EQUALS": "=a=b==",
        "BYTES": "\udcff\udc80é",
        "BASH_FUNC_f%%": "() { :; }",
        "A B": "a blank in the name",
        "SHIFTER_VOLUME": "",
        "SHIFTER_OTHER": "mine",
    }
    found = variables(node, "--image=tiny:1", env=mine)
    login = node.login_environment(node.users["alice"])
    ours = {"SHIFTER_IMAGEREQUEST": "tiny:1", "SHIFTER_IMAGE": found["SHIFTER_IMAGE"]}
    assert found == login | mine | ours
    assert len(found["SHIFTER_IMAGE"]) == 64


def test_variables_that_load_the_nodes_libraries_do_not(node: Node) -> None:
    library = {"LD_PRELOAD": "/opt/x.so", "LD_AUDIT": "/opt/y.so"}
    assert not set(library) & set(variables(node, "--image=tiny:1", env=library))
    found = variables(node, "--image=tiny:1", "--env=LD_PRELOAD=/z.so", "-e", "LD_AUDIT=", env=library)
    assert (found["LD_PRELOAD"], found["LD_AUDIT"]) == ("/z.so", "")
    node.conf(siteEnv="LD_PRELOAD=/site.so")
    try:
        assert variables(node, "--image=tiny:1", env=library)["LD_PRELOAD"] == "/site.so"
    finally:
        node.conf()


def test_order_of_sources(site: Node) -> None:
    """Caller < image < file < --env < site's set, append, prepend, unset."""
    site.write("/home/alice/vars", "FROM=file\nFILE=file\nLIST=file\n", owner="alice")
    file = "--env-file=/home/alice/vars"

    def found(*options: str) -> tuple[str | None, ...]:
        caller = {"FROM": "caller", "LIST": "caller", "FILE": "caller", "GONE": "caller", "SITE": "caller"}
        got = variables(site, *options, env=caller)
        return tuple(got.get(name) for name in ("FROM", "LIST", "FILE", "GONE", "SITE"))

    assert found("--image=tiny:1") == ("site", "first:caller:last", "caller", None, "1")
    assert found("--image=env:1") == ("site", "first:image:last", "caller", None, "1")
    assert found("--image=env:1", file) == ("site", "first:file:last", "file", None, "1")
    expected = ("site", "first:option:last", "option", None, "1")
    assert found("--image=env:1", "--env=LIST=option", file, "-eFILE=option", "--env=GONE=1") == expected
    new = variables(site, "--image=tiny:1", "--env=NEW_PREPEND=")
    assert (new["NEW_APPEND"], new["NEW_PREPEND"]) == ("a", "p")


def test_order_of_sources_without_a_site(node: Node) -> None:
    node.write("/home/alice/vars", "FROM=file\n", owner="alice")
    caller = {"FROM": "caller", "EMPTY": "caller"}
    assert variables(node, "--image=tiny:1", env=caller)["FROM"] == "caller"
    found = variables(node, "--image=env:1", env=caller)
    assert (found["FROM"], found["EMPTY"], found["EQUALS"]) == ("image", "", "a=b='c'")
    found = variables(node, "--env-file=/home/alice/vars", "--image=env:1", env=caller)
    assert found["FROM"] == "file"
    found = variables(node, "--env=FROM=", "--env-file", "/home/alice/vars", "--image=env:1", env=caller)
    assert found["FROM"] == ""
    found = variables(node, "-e", "FROM=1", "-eFROM=2", "--image=env:1", env=caller)
    assert found["FROM"] == "2"


def test_clearenv(site: Node) -> None:
    found = variables(site, "-E", "--image=env:1", "--env=MINE=1", env={"GONE": "x", "CALLER": "x"})
    image = {"PATH": "/usr/bin:/bin", "EMPTY": "", "EQUALS": "a=b='c'"}
    rules = {"FROM": "site", "SITE": "1", "LIST": "first:image:last", "NEW_APPEND": "a", "NEW_PREPEND": "p"}
    ours = {"SHIFTER_IMAGE": found["SHIFTER_IMAGE"], "SHIFTER_IMAGEREQUEST": "env:1", "MINE": "1"}
    assert found == image | rules | ours


def test_empty_environment(node: Node) -> None:
    found = variables(node, "--image=tiny:1", clean=True, command=("/bin/cat", "/proc/self/environ"))
    assert set(found) == {"SHIFTER_IMAGE", "SHIFTER_IMAGEREQUEST", "PATH"}
    assert found["PATH"] == DEFAULT_PATH


# --- env-file --------------------------------------------------------------------------------------------------------


def test_env_file_syntax(node: Node) -> None:
    text = (
        "# comment\n   # another\n\n \t\nA=1\n  B = 2 \nC='x' \"y\"\nD=a=b\nE=\nF=\\n $HOME # no comment\r\n"
        "A=again\nBYTES=\udcff\nLAST=no newline"
    )
    node.write("/home/alice/file", text, owner="alice")
    found = variables(node, "-E", "--image=tiny:1", "--env-file=/home/alice/file", command=("/bin/cat", SHOW[1]))
    del found["SHIFTER_IMAGE"], found["SHIFTER_IMAGEREQUEST"]
    assert found == {
        "PATH": DEFAULT_PATH,
        "A": "again",
        "B ": " 2",
        "C": "'x' \"y\"",
        "D": "a=b",
        "E": "",
        "F": "\\n $HOME # no comment",
        "BYTES": "\udcff",
        "LAST": "no newline",
    }


def test_env_file_is_one_of_the_container(node: Node) -> None:
    """The path is looked up inside, as the user, in the command's working directory."""
    node.write("/etc/only-on-the-node", "A=1\n")
    done = node.shifter("--image=tiny:1", "--env-file=/etc/only-on-the-node", "true")
    assert (done.returncode, done.stdout) == (125, "")
    assert "/etc/only-on-the-node: No such file" in done.stderr and "inside of the container" in done.stderr
    node.write("/home/alice/dir/file", "B=1\n", owner="alice")
    assert variables(node, "--image=tiny:1", "--env-file=dir/file")["B"] == "1"
    assert variables(node, "--image=tiny:1", "--env-file=file", "--workdir=/home/alice/dir")["B"] == "1"
    assert variables(node, "--image=tiny:1", "--env-file=/etc/os-release")["VERSION_ID"] == "1"
    node.write("/home/alice/secret", "B=1\n", mode=0o600)
    done = node.shifter("--image=tiny:1", "--env-file=/home/alice/secret", "true")
    assert done.returncode == 125 and "Permission denied" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=1\n\nnonsense\n", "line 3: not NAME=VALUE"),
        ("=1\n", "line 1: not NAME=VALUE"),
        ("A=1\0\n", "NUL byte"),
        ("A=" + "x" * (1 << 20), "larger than 1048576 bytes"),
    ],
)
def test_bad_env_file(node: Node, text: str, message: str) -> None:
    node.write("/home/alice/bad", text, owner="alice")
    done = node.shifter("--image=tiny:1", "--env-file=/home/alice/bad", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == f"shifter: --env-file /home/alice/bad{':' if 'line' not in message else ''} {message}\n"


def test_env_file_of_other_kinds(node: Node) -> None:
    assert "Is a directory" in node.shifter("--image=tiny:1", "--env-file=/home", "true").stderr
    assert node.shifter("--image=tiny:1", "--env-file=/dev/null", "true").returncode == 0
    shifter = f"{PREFIX}/bin/shifter --image=tiny:1"
    done = node.run(["bash", "-c", f"{shifter} --env-file=<(echo A=1; sleep 0.1; echo B=2) sh -c 'echo $A$B'"], "alice")
    assert done.stdout == "12\n", done.stderr
    done = node.run(f"mkfifo fifo; echo C=3 > fifo & {shifter} --env-file=fifo sh -c 'echo $C'", "alice")
    assert done.stdout == "3\n", done.stderr
    done = node.run(f"echo D=4 | {shifter} --env-file=/dev/stdin sh -c 'echo $D'", "alice")
    assert done.stdout == "4\n", done.stderr


def test_env_file_of_the_largest_size(node: Node) -> None:
    """Too long for execve(2) as one variable, but a file of comments of that size is right."""
    node.write("/home/alice/large", "A=1\n#" + "x" * ((1 << 20) - 5), owner="alice")
    assert variables(node, "--image=tiny:1", "--env-file=/home/alice/large")["A"] == "1"
    node.write("/home/alice/large", "A=" + "x" * ((1 << 20) - 2), owner="alice")
    done = node.shifter("--image=tiny:1", "--env-file=/home/alice/large", "true")
    assert done.returncode == 126 and "arguments and environment together are too long" in done.stderr


@pytest.mark.parametrize("text", ["NAME", "=value", ""])
def test_bad_env_option(node: Node, text: str) -> None:
    done = node.shifter("--image=tiny:1", "--env", text, "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == f"shifter: --env {text}: not NAME=VALUE\n"


# --- size and odd forms ----------------------------------------------------------------------------------------------


def test_ten_thousand_variables(site: Node) -> None:
    many = {f"VARIABLE_{number}": str(number) * 5 for number in range(10000)}
    found = variables(site, "--image=env:1", env=many)
    assert many.items() <= found.items()
    assert found["SITE"] == "1"


def test_a_variable_passed_twice_is_there_once_when_it_is_set(site: Node) -> None:
    """Programs disagree on which of two counts. Untouched ones are passed on as they are."""
    script = (
        "import ctypes, os\n"
        f"argv = [b'{PREFIX}/bin/shifter', b'--image=tiny:1', b'--env=OPTION=set', b'/bin/cat', b'/proc/self/environ', None]\n"
        "env = [b'FROM=1', b'GONE=1', b'OPTION=1', b'LIST=1', b'X=1', b'LD_PRELOAD=1', b'nonsense', b'=C:'] * 2 + [None]\n"
        "array = lambda items: (ctypes.c_char_p * len(items))(*items)\n"
        "ctypes.CDLL(None).execve(argv[0], array(argv), array(env))\n"
    )
    found = site.run(["/usr/bin/python3", "-c", script], "alice", check=True).stdout.split("\0")[:-1]
    assert [text for text in found if text.startswith(("FROM", "GONE", "OPTION", "LIST", "LD_"))] == [
        "FROM=site",
        "OPTION=set",
        "LIST=first:1:last",
    ]
    assert found.count("X=1") == 2
    assert "nonsense" not in found and "=C:" not in found


# --- which image -----------------------------------------------------------------------------------------------------

NO_IMAGE = "shifter: no image: use --image=TYPE:TAG, or set SHIFTER_IMAGE"


@pytest.mark.parametrize(
    ("env", "request_text"),
    [
        ({"IMAGETYPE": "custom", "IMAGE": "tiny:1"}, "custom:tiny:1"),
        ({"IMAGE": "tiny:1"}, "tiny:1"),
        ({"IMAGE": "custom:tiny:1"}, "custom:tiny:1"),
        ({"IMAGEREQUEST": "custom:tiny:1"}, "custom:tiny:1"),
        ({"IMAGEREQUEST": "custom:tiny:1", "IMAGE": "tiny:1"}, "custom:tiny:1"),
        ({"IMAGEREQUEST": "custom:tiny:1", "IMAGETYPE": "docker"}, "custom:tiny:1"),
        ({"IMAGETYPE": "custom", "IMAGE": "tiny:1", "IMAGEREQUEST": "docker:env:1"}, "docker:env:1"),
        ({"IMAGETYPE": "", "IMAGE": "tiny:1"}, "tiny:1"),
        ({"IMAGE": ""}, None),
        ({"IMAGETYPE": "docker"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("prefix", ["SHIFTER_", "SLURM_SPANK_SHIFTER_"])
def test_image_from_the_environment(node: Node, prefix: str, env: dict[str, str], request_text: str | None) -> None:
    environment = {prefix + name: value for name, value in env.items()}
    if request_text is None:
        done = node.shifter("true", env=environment)
        assert done.returncode == 125 and done.stderr.startswith(NO_IMAGE)
        return
    found = variables(node, env=environment)
    assert found["SHIFTER_IMAGEREQUEST"] == request_text
    assert found.get("WHICH") == (None if request_text == "tiny:1" else "custom")


def test_own_variables_win_over_slurms(node: Node) -> None:
    slurm = {"SLURM_SPANK_SHIFTER_IMAGETYPE": "custom", "SLURM_SPANK_SHIFTER_IMAGE": "tiny:1"}
    assert variables(node, env=slurm)["WHICH"] == "custom"
    found = variables(node, env=slurm | {"SHIFTER_IMAGETYPE": "docker"})
    assert "WHICH" not in found and found["SHIFTER_IMAGETYPE"] == "docker"
    assert variables(node, env=slurm | {"SHIFTER_IMAGE": "", "SHIFTER_IMAGETYPE": ""})["WHICH"] == "custom"


def test_option_wins_over_the_environment(node: Node) -> None:
    for name in ("SHIFTER_IMAGE", "SHIFTER_IMAGEREQUEST", "SLURM_SPANK_SHIFTER_IMAGE"):
        env = {name: "custom:tiny:1", "SHIFTER_IMAGETYPE": "custom"}
        found = variables(node, "--image=env:1", "--image=docker:tiny:1", env=env)
        assert "WHICH" not in found and found["SHIFTER_IMAGEREQUEST"] == "docker:tiny:1"


def test_environment_of_a_udi_names_its_image_again(node: Node) -> None:
    """What a UDI exports (srun from inside) leads to the same image, although SHIFTER_IMAGE is now an identifier."""
    inside = variables(node, "--image=custom:tiny:1")
    again = variables(node, env={name: inside[name] for name in ("SHIFTER_IMAGE", "SHIFTER_IMAGEREQUEST")})
    assert again["SHIFTER_IMAGE"] == inside["SHIFTER_IMAGE"] and again["WHICH"] == "custom"


def test_default_image_type(node: Node) -> None:
    node.conf(defaultImageType="custom")
    try:
        assert variables(node, env={"SHIFTER_IMAGE": "tiny:1"})["WHICH"] == "custom"
        assert variables(node, "--image=tiny:1")["WHICH"] == "custom"
        assert "WHICH" not in variables(node, "--image=docker:tiny:1")
    finally:
        node.conf()


def test_volumes_from_the_environment(node: Node) -> None:
    for owner in ("one", "two"):
        node.write(f"/home/alice/{owner}/{owner}", "", owner="alice")
    one, two = "/home/alice/one:/mnt", "/home/alice/two:/srv"

    def inside(*options: str, **env: str) -> str:
        return node.shifter("--image=tiny:1", *options, "sh", "-c", "ls /mnt /srv", env=env).stdout

    assert inside(SHIFTER_VOLUME=one) == "/mnt:\none\n\n/srv:\ndata\n"
    assert inside(SLURM_SPANK_SHIFTER_VOLUME=f"{one};{two}") == "/mnt:\none\n\n/srv:\ntwo\n"
    assert inside(SHIFTER_VOLUME=one, SLURM_SPANK_SHIFTER_VOLUME=two) == "/mnt:\none\n\n/srv:\ndata\n"
    assert inside(f"--volume={two}", SHIFTER_VOLUME=one) == "/mnt:\n\n/srv:\ntwo\n"
    assert inside("--volume", two, "-V", one, SHIFTER_VOLUME="nonsense") == "/mnt:\none\n\n/srv:\ntwo\n"


def test_modules_from_the_environment(node: Node) -> None:
    done = node.shifter("--image=tiny:1", "true", env={"SHIFTER_MODULE": "mpi"})
    assert done.returncode == 125 and "'mpi'" in done.stderr
    assert node.shifter("--image=tiny:1", "--module=none", "true", env={"SHIFTER_MODULE": "mpi"}).returncode == 0
    assert node.shifter("--image=tiny:1", "true", env={"SLURM_SPANK_SHIFTER_MODULE": "none"}).returncode == 0


def test_user_without_any_variable_of_a_login(node: Node) -> None:
    nobody = User("uid7777", 7777, 7777, "/nonexistent")
    done = node.run([f"{PREFIX}/bin/shifter", "--image=tiny:1", "/bin/cat", SHOW[1]], nobody, clean=True)
    assert done.returncode == 0, done.stderr
