"""The fault drill: real launches on real hosts, something breaks, and what must hold afterwards is looked at.

    make drill                                                     # 60 faults, an hour on two cores; needs root
    python -m tests.drill --faults 12 --seed 3 --backends local,slurm --report /tmp/drill.md
    python -m tests.drill --list

A drill is one run directory, one fault, and as many starts of `mixmae launch` as it takes to finish. `faults` has the
list of faults and draws from it by seed; each is a small function, in `faults_of_...`, that plays through a run's life
with a `Drill`. `verdict` says what must hold afterwards, by comparison with a run that nothing disturbed. `report`
writes docs/reliability.md.
"""
