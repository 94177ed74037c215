"""Adapters: what a workload manager knows of a job, made into shifter.jobs.job.Job. Nothing else of Shifter imports them.

| module    | for                                                                                          |
|-----------|----------------------------------------------------------------------------------------------|
| `submit`  | Slurm, at submission: checks the options of sbatch, salloc and srun, as the user             |
| `slurm`   | Slurm: the Job of a prolog's environment and of what Slurm itself says of the job            |
| `node`    | Slurm: prolog and epilog                                                                     |
| `generic` | any other one: the Job in a JSON object, for setupRoot --from-json                           |
| `doctor`  | looks at a node's Slurm, and says what to change                                             |
"""
