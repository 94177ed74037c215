"""Fixtures of the tests with several nodes."""

from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Slurm
from tests.images import Tree
from tests.node import cluster


@pytest.fixture
def slurm(propagation: str, image: Tree) -> Iterator[Slurm]:
    """Three nodes with Slurm, once with each propagation, whose store has the tiny image as docker:tiny:1."""
    with Slurm(cluster(3, shared=propagation == "shared")) as made:
        made.nodes.add_image("docker:tiny:1", image)
        yield made
        made.wait_idle()
        made.nodes.check_leaks()
