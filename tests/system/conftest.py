"""Fixtures of the system tests."""

import pytest

from tests.node import Node


@pytest.fixture
def site(tiny_node: Node) -> Node:
    """A node with directories for the site to show: /srv/a, /srv/b with one file each, and a file."""
    for name in ("a", "b"):
        tiny_node.write(f"/srv/{name}/file", f"{name}\n")
        tiny_node.run(["chmod", "1777", f"/srv/{name}"], check=True)
    tiny_node.write("/srv/single", "single\n")
    return tiny_node
