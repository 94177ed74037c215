"""Jobs: a UDI that a workload manager sets up before a job, and takes down with all that runs in it."""
