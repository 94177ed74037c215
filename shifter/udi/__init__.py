"""User defined image roots: plan, build, pins, records, reaping."""
