"""Any workload manager: a job as a JSON object, which its prolog writes to setupRoot --from-json FILE (- for its standard input).

    {"job": "17", "user": "alice", "image": "docker:debian:12",
     "uid": 5001, "gid": 5001, "volumes": ["/scratch:/scratch"], "modules": [], "restart": 0, "sshd": true,
     "nodes": ["node2", {"name": "node1", "tasks": 4}], "authorize": ["ssh-ed25519 AAAA..."]}

The first three must be there. A key that is not known is an error: a misspelt ``sshd`` must not start one.
"""

import json
import sys
from typing import Any

from shifter.errors import UsageError, describe
from shifter.images import reference
from shifter.jobs import job as jobs
from shifter.sshd import authorized

MAX_BYTES = 1 << 24
_KEYS: dict[str, type] = {
    "job": str, "user": str, "image": str, "uid": int, "gid": int, "volumes": list, "modules": list, "restart": int,
    "sshd": bool, "nodes": list, "authorize": list,
}  # fmt: skip


def read(path: str) -> jobs.Job:
    """Return the Job that the file *path* describes. Raises UsageError."""
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--from-json {describe(error)}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"--from-json {path}: longer than {MAX_BYTES} bytes")
    return parse(data)


def parse(data: bytes) -> jobs.Job:
    """Return the Job that the JSON object in *data* describes. Raises UsageError that names the key at fault."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--from-json: no JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise UsageError("--from-json: it must be an object")
    for key, value in found.items():
        if key not in _KEYS:
            raise UsageError(f"--from-json: {key[:40]!a} is not one of {', '.join(_KEYS)}")
        if type(value) is not _KEYS[key]:
            raise UsageError(f"--from-json: {key} must be of JSON's kind for {_KEYS[key].__name__}")
    if not found.get("job") or not found.get("image") or not (found.get("user") or "uid" in found):
        raise UsageError("--from-json: job, image and user (or uid) are needed")
    for key in ("uid", "gid", "restart"):
        if not 0 <= found.get(key, 0) < 2**31:
            raise UsageError(f"--from-json: {key} {found[key]} is out of range")
    name, uid, gid, groups, home = jobs.account(found.get("user", ""), found.get("uid"), found.get("gid"))
    keys = "\n".join(_texts(found, "authorize")).encode("utf-8", "surrogateescape")
    return jobs.Job(
        jobs.parse_ident(found["job"]),
        name,
        uid,
        gid,
        groups,
        str(reference.parse(found["image"], "")),
        volumes=_texts(found, "volumes"),
        modules=_texts(found, "modules"),
        nodes=jobs.parse_nodes(" ".join(_node(node) for node in found.get("nodes", []))),
        restart=found.get("restart", 0),
        sshd=found.get("sshd", True),
        home=home,
        authorized=authorized.parse_keys(keys, "authorize") if keys else [],
    )


def _texts(found: dict[str, Any], key: str) -> list[str]:
    """Return a list of strings. Raises UsageError."""
    values = found.get(key, [])
    for value in values:
        if not isinstance(value, str) or not value.isprintable():
            raise UsageError(f"--from-json: {key} must be strings without control characters")
    return list(values)


def _node(node: object) -> str:
    """Return NAME/TASKS. Raises UsageError."""
    if isinstance(node, dict) and set(node) <= {"name", "tasks"}:
        name, tasks = node.get("name"), node.get("tasks", 1)
    else:
        name, tasks = node, 1
    if not isinstance(name, str) or len(name.split()) != 1 or "/" in name or type(tasks) is not int:
        raise UsageError('--from-json: nodes must be "NAME" or {"name": "NAME", "tasks": NUMBER}')
    return f"{name}/{tasks}"
