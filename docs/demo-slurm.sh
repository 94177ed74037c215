#!/bin/bash
# From an installation to a Slurm cluster whose jobs run in images: the steps of docs/wlm.md, on three virtual nodes with a
# real Slurm (packages slurmctld slurmd slurm-client munge). As root, in a checkout after `make deps stage`. Leaves nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $(id -u) == 0 ]] || { echo "demo: as root, please: it makes namespaces" >&2; exit 1; }
exec build/venv/bin/python -B -m tests.cluster.demo
