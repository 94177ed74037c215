"""The Job in a JSON object: what is missing, misspelt, of another kind or out of range is refused with the reason."""

import json
from typing import Any

import pytest

from shifter.errors import ShifterError
from shifter.wlm import generic

JOB = {"job": "17", "user": "nobody", "image": "docker:tiny:1"}

REFUSED: list[tuple[str | dict[str, Any], str]] = [
    ("[]", "it must be an object"),
    ("{", "no JSON"),
    ("[" * 100000, "no JSON"),
    ({"Sshd": False}, "'Sshd' is not one of job, user"),
    ({"sshd": "no"}, "sshd must be of JSON's kind for bool"),
    ({"uid": True}, "uid must be of JSON's kind for int"),
    ({"job": ""}, "job, image and user (or uid) are needed"),
    ({"job": "../x"}, "job id '../x'"),
    ({"uid": 5002}, "user nobody has uid 65534 on this node, not 5002"),
    ({"uid": -1}, "uid -1 is out of range"),
    ({"image": "tiny:1"}, "no type"),
    ({"image": "docker:ti\nny"}, "is not allowed"),
    ({"volumes": "/tmp:/mnt"}, "volumes must be of JSON's kind for list"),
    ({"volumes": ["/tmp\n:/mnt"]}, "without control characters"),
    ({"nodes": ["a b"]}, "nodes must be"),
    ({"nodes": [{"name": "a", "tasks": "2"}]}, "nodes must be"),
    ({"nodes": [{"name": "a", "tasks": 0}]}, "node 'a/0'"),
    ({"nodes": [{"host": "a"}]}, "nodes must be"),
    ({"authorize": ['command="x" ssh-ed25519 AAAA']}, "authorize"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_refused(change: str | dict[str, Any], reason: str) -> None:
    text = change if isinstance(change, str) else json.dumps(JOB | change)
    with pytest.raises(ShifterError) as caught:
        generic.parse(text.encode())
    assert reason in caught.value.chain() and "\n" not in caught.value.chain()


def test_taken() -> None:
    job = generic.parse(
        json.dumps(JOB | {"nodes": ["a", {"name": "b", "tasks": 3}], "sshd": False, "restart": 2}).encode()
    )
    assert (job.ident, job.user, job.image, job.restart, job.sshd) == ("17", "nobody", "docker:tiny:1", 2, False)
    assert job.nodes == [("a", 1), ("b", 3)]
