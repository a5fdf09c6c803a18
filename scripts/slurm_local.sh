#!/usr/bin/env bash
# Starts a one-node SLURM on this machine, to try hydra/launcher=slurm. Run it as root on Debian or Ubuntu:
#
#   eval "$(scripts/slurm_local.sh start)"     # installs slurm-wlm and munge if missing; sets SLURM_CONF
#   scripts/slurm_local.sh stop                # ends the daemons and removes all their state
#
# All state is in one folder, ${QUASAR_SLURM:-/tmp/quasar-slurm}. Nothing is isolated: no cgroups, no accounting.
set -euo pipefail

state=${QUASAR_SLURM:-/tmp/quasar-slurm}
export SLURM_CONF=$state/slurm.conf
daemons=(slurmctld slurmd munged)

say() { echo "$@" >&2; }

install() {
    # command -v of several names succeeds if any of them exists.
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    [ "$(id -u)" = 0 ] || { say "slurm-wlm and munge are not installed; run this as root, or install them" && exit 1; }
    say "installing slurm-wlm and munge"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2
    apt-get install -qq -y --no-install-recommends slurm-wlm munge >&2
}

configure() {
    local host memory
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    mkdir -p "$state"/{munge,ctld,slurmd,log}
    chmod 755 "$state" "$state/munge"
    head -c 128 /dev/urandom >"$state/munge/key"
    chmod 400 "$state/munge/key"
    chown -R munge: "$state/munge"
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=300
SchedulerParameters=sched_interval=2
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/slurmd
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/log/slurmctld
SlurmdLogFile=$state/log/slurmd
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=local Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
}

start() {
    if running; then
        say "already running in $state"
    else
        stop
        install
        configure
        runuser -u munge -- munged --key-file="$state/munge/key" --socket="$state/munge/socket" \
            --pid-file="$state/munge/munged.pid" --log-file="$state/munge/log" --seed-file="$state/munge/seed"
        slurmctld
        slurmd
        wait_until_idle
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

running() { [ -f "$SLURM_CONF" ] && timeout 5 sinfo >/dev/null 2>&1; }

wait_until_idle() {
    for _ in $(seq 60); do
        if [ "$(timeout 5 sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then
            say "SLURM is up in $state"
            return
        fi
        sleep 0.5
    done
    say "SLURM did not come up; see $state/log"
    tail -n 20 "$state"/log/* "$state/munge/log" >&2 || true
    exit 1
}

stop() {
    [ -d "$state" ] || return 0
    local daemon file pid
    for daemon in "${daemons[@]}"; do
        for file in "$state/$daemon.pid" "$state/munge/$daemon.pid"; do
            pid=$(cat "$file" 2>/dev/null) || continue
            kill "$pid" 2>/dev/null || continue
            for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null && sleep 0.1; done
        done
    done
    rm -rf "$state"
}

case ${1-} in
start) start ;;
stop) stop ;;
*)
    say "usage: slurm_local.sh start|stop"
    exit 2
    ;;
esac
