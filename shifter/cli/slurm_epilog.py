"""shifter-slurm-epilog: named by Epilog= of slurm.conf, or a line of the site's own epilog. Takes the job's UDIs down."""

import os


def main() -> int:
    """Run as slurmd runs it; return 0 only if nothing of the job is left."""
    # Of a job that asked for no image nothing can be here, unless it is here; and no modules are loaded to find that out.
    ident = os.environ.get("SLURM_JOB_ID", "")
    if not os.environ.get("SPANK_SHIFTER_IMAGE") and not os.path.exists(f"/run/shifter/jobs/{ident}"):
        return 0
    from shifter.wlm import node

    return node.epilog(os.environ)
