#!/usr/bin/env bash
# A real SLURM of three nodes, n1 to n3, on this one host, from Debian's packages and without systemd. As root:
#
#   bash tests/slurm/cluster.sh start STATE     STATE is a scratch folder; prints the SLURM_CONF to export
#   bash tests/slurm/cluster.sh stop STATE
#
# The nodes share the host, its loopback and its file system. Rendezvous, signals, requeue, preemption by the partition
# `urgent` and limits are real.
set -euo pipefail

mark="# nodes of the dstrain tests"

start() {
    local state="$1" cpus
    cpus="$(nproc)"
    if ! command -v slurmctld munged sbatch >/dev/null; then
        apt-get install -y -q --no-install-recommends slurm-wlm munge >&2 || {
            apt-get update -q >&2
            apt-get install -y -q --no-install-recommends slurm-wlm munge >&2
        }
    fi
    mkdir -p "$state/ctld" /run/munge
    cat >"$state/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool.%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.%n.pid
SlurmdLogFile=$state/slurmd.%n.log
SlurmctldLogFile=$state/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-3] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-17003] CPUs=$cpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
CONF
    # As on a real cluster, the names of the nodes can be resolved.
    grep -q "$mark" /etc/hosts || echo "127.0.0.1 n1 n2 n3 $mark" >>/etc/hosts
    if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
        chown -R munge /run/munge /etc/munge /var/log/munge /var/lib/munge
        su munge -s /bin/sh -c /usr/sbin/munged
        cp /run/munge/munged.pid "$state/munged.pid"
    fi
    export SLURM_CONF="$state/slurm.conf"
    slurmctld
    slurmd -N n1
    slurmd -N n2
    slurmd -N n3
    for _ in $(seq 60); do
        if [ "$(sinfo -h -t idle -p main -o %D 2>/dev/null)" = 3 ]; then
            echo "$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    echo "cluster.sh: the nodes did not become idle; see the logs in $state" >&2
    sinfo >&2 || true
    return 1
}

stop() {
    local state="$1" name pid
    SLURM_CONF="$state/slurm.conf" scancel --state=PENDING,RUNNING --user=root 2>/dev/null || true
    for name in slurmd.n1 slurmd.n2 slurmd.n3 slurmctld munged; do
        if [ -f "$state/$name.pid" ]; then
            pid="$(cat "$state/$name.pid")"
            kill "$pid" 2>/dev/null || true
            for _ in $(seq 50); do
                kill -0 "$pid" 2>/dev/null || break
                sleep 0.1
            done
        fi
    done
    # /etc/hosts is a mount in containers, and cannot be replaced
    local hosts
    hosts="$(grep -v "$mark" /etc/hosts)"
    printf '%s\n' "$hosts" >/etc/hosts
}

case "${1:-}" in
    start | stop)
        [ "$#" = 2 ] || { echo "usage: cluster.sh start|stop STATE" >&2; exit 2; }
        "$1" "$(mkdir -p "$2" && cd "$2" && pwd)"
        ;;
    *)
        echo "usage: cluster.sh start|stop STATE" >&2
        exit 2
        ;;
esac
