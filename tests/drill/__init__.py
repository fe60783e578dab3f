"""The fault drill: inject faults into real runs on a cluster of hosts, and check that the run recovers.

    make drill                                                     # 60 faults, an hour on two cores; needs root
    python -m tests.drill --faults 12 --seed 3 --backends local,slurm --report /tmp/drill.md
    python -m tests.drill --list

One drill is one run directory, one fault, and as many starts of `mixmae launch` as the run takes to finish. `faults`
registers the faults and draws from them by seed; each is a function, in `..._faults`, that drives a run from its first
start to its end through a `Drill`. `invariants` checks the finished run against a baseline: a run without faults.
`report` writes docs/reliability.md.
"""
