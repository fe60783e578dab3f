"""A cluster of several hosts on one machine: own addresses, host names, sshd, Slurm.

Every host is a set of namespaces (network, host name, mounts, shared memory, processes) held by one process that does
nothing. All hosts are inside the process namespace of a switch, so the end of the switch is the end of the cluster,
and nothing of it is visible on the machine: no interface, no mount, no entry in /etc. Clusters do not see each other.

By hand, as root, in the repository root:

    python -m tests.cluster up --name mine --hosts 2 --slots 2
    python -m tests.cluster shell --name mine                      # a shell on the login host
    pdsh -w node1,node2 hostname
    srun -N2 hostname
    deepspeed --hostfile /tmp/mixmae-cluster-mine/hostfile --module mixmae.trainer.train RECIPE key=value
    exit
    python -m tests.cluster shell --name mine node1 -- ps aux      # one command on a host
    python -m tests.cluster status
    python -m tests.cluster down --name mine

The machine's files are the same on all hosts, so the Python environment and run directories are where they always are.
These differ from host to host: /run, /dev/shm, and STATE/local. STATE is the cluster's folder, mixmae-cluster-NAME in
the directory for temporary files; it ends with the cluster. Logs of the daemons are in STATE/log/HOST. Addresses lead
nowhere outside the cluster.

In tests: the fixtures `cluster` (two hosts) and `cluster_of(n)`, both for the whole session. A test that cuts, fills
or stops something ends with `cluster.repair()`, or sets it right itself.
"""
