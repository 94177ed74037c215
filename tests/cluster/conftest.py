"""Fixtures of the tests with several nodes."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.slurm import Slurm
from tests.images import Tree
from tests.node import cluster


@pytest.fixture
def options() -> dict[str, Any]:
    """What the Slurm of a test has of its own; a test that wants something is parametrized with it."""
    return {}


@pytest.fixture
def slurm(propagation: str, image: Tree, options: dict[str, Any]) -> Iterator[Slurm]:
    """Three nodes with Slurm, once with each propagation, whose store has the tiny image as docker:tiny:1."""
    with Slurm(cluster(3, shared=propagation == "shared"), **options) as made:
        made.nodes.add_image("docker:tiny:1", image)
        yield made
        made.wait_idle()
        made.nodes.check_leaks()
