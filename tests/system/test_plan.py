"""``shifterctl plan`` and ``shifter -v``: the same operations, what would be done and what is done, each with its reason."""

import json

import pytest

from tests.images import Tree
from tests.node import PREFIX, Node
from tests.system.mounting import works

CONF = "/etc/shifter/udiRoot.conf"


def plan(node: Node, *options: str, user: str = "alice") -> list[dict[str, str]]:
    done = node.shifterctl("plan", "--json", "--", *options, user=user)
    assert (done.returncode, done.stderr) == (0, ""), done
    steps: list[dict[str, str]] = json.loads(done.stdout)
    return steps


def text(steps: list[dict[str, str]]) -> list[str]:
    return [f"{step['text']} ({step['reason']})" for step in steps]


def steps_of_a_launch(node: Node, *options: str) -> list[str]:
    """The operations that -v prints, in their order, without the times."""
    done = node.shifter("-v", *options, "true", check=True)
    lines = [line.removeprefix("shifter: ").strip().partition(" ms  ") for line in done.stderr.splitlines()]
    assert all(float(time) >= 0 for time, _, _ in lines)
    assert [float(time) for time, _, _ in lines] == sorted(float(time) for time, _, _ in lines)
    return [line for _, _, line in lines if line.endswith(")")]


def test_plan_is_what_a_launch_does(tiny_node: Node) -> None:
    tiny_node.conf(siteFs=["/home:/home", "/srv/a:/a:ro"], siteEnv="SITE=1 OTHER=2")
    tiny_node.write("/srv/a/file", "a\n")
    options = ("--image=tiny:1", "--volume=/srv/a:/usr/lib/new")
    planned = plan(tiny_node, *options)
    assert steps_of_a_launch(tiny_node, *options) == text(planned)
    assert tiny_node.shifterctl("plan", "--", *options, user="alice").stdout.splitlines() == text(planned)
    kinds = [step["do"] for step in planned]
    assert kinds[0] == "image" and kinds.index("mount-points") < kinds.index("set")
    by_path = {step["path"]: step for step in planned if step["do"] == "bind"}
    assert by_path["/a"]["reason"] == f"siteFs at {CONF}:3"
    assert by_path["/a"]["source"] == "/srv/a" and by_path["/a"]["flags"] == "ro"
    assert by_path["/usr/lib/new"]["reason"] == "volume /srv/a:/usr/lib/new, found on the node"
    assert [step["value"] for step in planned if step.get("field") == "env.set"] == ["SITE=1", "OTHER=2"]
    assert {step["reason"] for step in planned if step.get("field") == "env.set"} == {f"siteEnv at {CONF}:4"}


def test_plan_does_nothing(tiny_node: Node) -> None:
    works(tiny_node, "true")
    tiny_node.shifterctl("gc", "--all", check=True)
    before = sorted(mount.key for mount in tiny_node.mounts()), tiny_node.store_mounts(), tiny_node.loops()
    for _ in range(3):
        assert plan(tiny_node, "--image=tiny:1", "--volume=/tmp:/home/alice/new", "--", "touch", "/tmp/ran")
    after = sorted(mount.key for mount in tiny_node.mounts()), tiny_node.store_mounts(), tiny_node.loops()
    assert before == after
    assert not tiny_node.exists("/home/alice/new")
    assert not tiny_node.exists("/tmp/ran")
    assert json.loads(tiny_node.shifterctl("ps", "--json", user="alice").stdout) == []


def test_plan_of_what_the_image_sets(node: Node, image: Tree) -> None:
    node.add_image("tiny:1", image, env={"A": "1", "B": '"quoted" \\ text'}, entry=["/bin/sh", "-c"], workdir="/srv")
    planned = plan(node, "--image=tiny:1")
    assert [(step["field"], step["value"]) for step in planned if step["do"] == "set"] == [
        ("env.image", "A=1"),
        ("env.image", 'B="quoted" \\ text'),
        ("entry", "/bin/sh"),
        ("entry", "-c"),
        ("env.append", "PATH=/opt/udiImage/bin"),
        ("workdir", "/srv"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image=missing:1"], "missing:1"),
        (["--image=tiny:1", "--volume=/srv/missing:/x"], "volume /srv/missing: No such file or directory"),
        (["--image=tiny:1", "--volume=/tmp:/etc"], "belongs to the system"),
        (["--image=tiny:1", "--nonsense"], "unknown option '--nonsense'"),
        ([], "no image"),
    ],
)
def test_plan_says_why_a_launch_would_fail(tiny_node: Node, options: list[str], message: str) -> None:
    done = tiny_node.shifterctl("plan", "--", *options, user="alice")
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr and done.stderr.startswith("shifterctl: ")


def test_plan_tells_no_more_than_the_user_could_find_out(tiny_node: Node) -> None:
    tiny_node.mkdir("/home/bob/there", owner="bob")
    tiny_node.run(["chmod", "700", "/home/bob"], check=True)
    said = {
        tiny_node.shifterctl(
            "plan", "--", "--image=tiny:1", f"--volume=/home/bob/{name}:/x", user="alice"
        ).stderr.replace(name, "X")
        for name in ("there", "missing")
    }
    assert len(said) == 1 and "Permission denied" in said.pop()


def test_plan_is_the_users_own(tiny_node: Node) -> None:
    done = tiny_node.shifterctl("plan", "--", "--image=tiny:1")
    assert done.returncode == 1 and "run it as that user" in done.stderr
    works(tiny_node, "true")  # a UDI that could be entered
    done = tiny_node.run([f"{PREFIX}/bin/shifter", "--udi-plan", "--image=tiny:1", "touch", "/tmp/ran"], "alice")
    assert done.returncode == 0 and not tiny_node.exists("/tmp/ran")


def test_plan_without_base(tiny_node: Node) -> None:
    assert not tiny_node.exists("/run/shifter")
    assert plan(tiny_node, "--image=tiny:1")


def test_plan_where_nothing_is_shared(tiny_node: Node) -> None:
    tiny_node.conf(udiIdleTime=0)
    assert plan(tiny_node, "--image=tiny:1") == plan(tiny_node, "--image=tiny:1")
