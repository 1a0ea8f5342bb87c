#!/usr/bin/env bash
# A whole SLURM on this one machine, accounts included, without systemd. For tests; as root, on Debian.
#   tests/slurm/single_node.sh install | start FOLDER | stop FOLDER
# All of its files lie in FOLDER and its commands find it by SLURM_CONF=FOLDER/etc/slurm.conf; /etc/slurm is left alone,
# and its ports are its own, so that it runs beside any other that is there.
set -euo pipefail
case ${1:-} in install | start | stop) action=$1 ;; *) sed -n 's/^#   /usage: /p' "$0" >&2; exit 2 ;; esac
base=$(realpath -m "${2:-.}")
host=$(hostname -s)
port=$((20000 + $$ % 4000 * 3))
export SLURM_CONF=$base/etc/slurm.conf

install() {
  for command in slurmctld slurmd slurmdbd munged mariadbd mariadb-install-db; do
    if ! command -v $command >/dev/null; then
      apt-get update -qq
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurm-wlm slurmdbd munge mariadb-server >/dev/null
      return
    fi
  done
}

until_it_works() {
  for _ in $(seq 1200); do if "$@" >/dev/null 2>&1; then return; fi; sleep 0.25; done
  echo "no answer: $*" >&2
  exit 1
}

write_configuration() {
  cat >"$base/etc/slurmdbd.conf" <<CONF
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 2))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$base/munge/socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounts
PidFile=$base/slurmdbd.pid
LogFile=$base/log/slurmdbd.log
CONF
  chmod 600 "$base/etc/slurmdbd.conf"
  # OverMemoryKill stands in for cgroups, which containers seldom have. It has 64 processors and 256 GB wherever it is,
  # so that jobs run side by side on the smallest machine. What SLURM waits for is cut short: a requeued job may start
  # again after cred_expire (120 s otherwise), at the scheduler's next look (30 or 60 s otherwise).
  cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$base/munge/socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 2))
AccountingStoragePass=$base/munge/socket
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=2
SlurmdParameters=config_overrides
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=64 RealMemory=256000 State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP DefMemPerCPU=512
CONF
}

start() {
  mkdir -p "$base"/{etc,log,state,spool,mysql,munge}
  grep -qw "$host" /etc/hosts || echo "127.0.0.1 $host" >>/etc/hosts
  write_configuration
  dd if=/dev/urandom of="$base/munge/key" bs=128 count=1 status=none
  chmod 400 "$base/munge/key"
  munged --force --key-file="$base/munge/key" --socket="$base/munge/socket" --pid-file="$base/munged.pid" \
    --log-file="$base/log/munged.log" --seed-file="$base/munge/seed"
  mariadb-install-db --user=root --datadir="$base/mysql" --auth-root-authentication-method=socket >"$base/log/mysql" 2>&1
  setsid mariadbd --user=root --datadir="$base/mysql" --skip-networking --socket="$base/mysql.sock" \
    --pid-file="$base/mariadb.pid" >>"$base/log/mysql" 2>&1 &
  until_it_works mariadb --socket="$base/mysql.sock" -e 'select 1'
  mariadb --socket="$base/mysql.sock" -e 'create database if not exists accounts'
  MYSQL_UNIX_PORT=$base/mysql.sock slurmdbd
  until_it_works sacctmgr -n show cluster
  sacctmgr -i add cluster one >/dev/null 2>&1 || true
  slurmctld
  slurmd
  until_it_works sh -c 'sinfo -h -o %T | grep -q idle'
  sinfo
}

stop() {
  for daemon in slurmd slurmctld slurmdbd mariadb munged; do
    if [ -s "$base/$daemon.pid" ]; then
      kill "$(cat "$base/$daemon.pid")" 2>/dev/null || true
      sleep 0.5
    fi
  done
}

"$action"
