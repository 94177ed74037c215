"""Fixtures of the tests with several nodes."""

from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Slurm
from tests.images import Tree
from tests.node import Cluster


@pytest.fixture
def slurm(nodes: Cluster, image: Tree) -> Iterator[Slurm]:
    """Three nodes with Slurm, once with each propagation, whose store has the tiny image as docker:tiny:1."""
    nodes.add_image("docker:tiny:1", image)
    with Slurm(nodes) as made:
        yield made
        made.wait_idle()
        nodes.check_leaks()
