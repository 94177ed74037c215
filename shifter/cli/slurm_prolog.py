"""shifter-slurm-prolog: named by Prolog= of slurm.conf, or a line of the site's own prolog. Sets up the job's UDI."""

import os
import sys


def main() -> int:
    """Run as slurmd runs it, with the job in the environment; return the exit status."""
    if len(sys.argv) == 4 and sys.argv[1] == "--namespace":
        from shifter.wlm import node

        return node.in_namespace(sys.argv[2], sys.argv[3])
    # Most jobs of a cluster have no image; they shall not wait until all the modules are loaded.
    if not os.environ.get("SPANK_SHIFTER_IMAGE"):
        return 0
    from shifter.wlm import node

    return node.prolog(os.environ)
