"""A cluster of several hosts on one machine, with addresses, host names, sshd and Slurm.

A host is a set of Linux namespaces (network, UTS, mount, IPC, PID) held open by one sleeping process. All hosts are
inside the PID namespace of the switch, so killing the switch's process ends the cluster. Nothing of a cluster is
visible on the machine (no interface, no mount, no entry in /etc), and clusters are isolated from each other.

Manually, as root, in the repository root:

    python -m tests.cluster up --name mine --hosts 2 --slots 2
    python -m tests.cluster shell --name mine                      # a shell on the login host
    pdsh -w node1,node2 hostname
    srun -N2 hostname
    deepspeed --hostfile /tmp/mixmae-cluster-mine/hostfile --module mixmae.trainer.train RECIPE key=value
    exit
    python -m tests.cluster shell --name mine node1 -- ps aux      # one command on a host
    python -m tests.cluster status
    python -m tests.cluster down --name mine

All hosts share the machine's files, so the Python environment and run directories have their usual paths. Private to
each host: /run, /dev/shm, and STATE/local. STATE is the cluster's folder, /tmp/mixmae-cluster-NAME; it is deleted with
the cluster. Logs of the daemons are in STATE/log/HOST. Nothing outside the cluster is reachable from a host.

In tests: the fixtures `cluster` (two hosts) and `cluster_of(n)`, both session-scoped. A test that disconnects, fills
or stops something ends with `cluster.repair()`, or repairs it itself.
"""
