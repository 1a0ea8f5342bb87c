#!/usr/bin/env bash
# A whole SLURM on this one machine, accounts included, without systemd. For tests; as root, on Debian.
#   tests/slurm/single_node.sh start FOLDER | stop FOLDER
# All of its files lie in FOLDER and its commands find it by SLURM_CONF=FOLDER/etc/slurm.conf; /etc/slurm is left alone.
set -euo pipefail
action=$1
base=$(realpath -m "$2")
host=$(hostname -s)
export SLURM_CONF=$base/etc/slurm.conf

until_it_works() {
  for _ in $(seq 1200); do if "$@" >/dev/null 2>&1; then return; fi; sleep 0.25; done
  echo "no answer: $*" >&2
  exit 1
}

write_configuration() {
  local megabytes=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 - 1024))
  cat >"$base/etc/slurmdbd.conf" <<CONF
DbdHost=localhost
DbdAddr=127.0.0.1
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
  # OverMemoryKill stands in for cgroups, which containers seldom have; KillWait is short so that tests are; and it has
  # four processors wherever it is, so that jobs run side by side on the smallest machine.
  cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$base/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePass=$base/munge/socket
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=$megabytes State=UNKNOWN
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
