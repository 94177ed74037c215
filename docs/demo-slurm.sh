#!/bin/bash
# From `make install` to a Slurm cluster whose jobs run in images: executes the lines of docs/wlm.md ("Slurm: administrator") on
# three virtual nodes with a real Slurm, and shows each of them. As root, in a checkout after `make deps`. Leaves nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $(id -u) == 0 ]] || { echo "demo: as root, please: it makes namespaces" >&2; exit 1; }
exec build/venv/bin/python -B -m tests.cluster.demo
