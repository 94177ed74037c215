#!/bin/bash
# Two nodes, one job, one image: `shifter ssh node2 hostname` lands in the container on the other node. `make demo` calls
# this, as root, after docs/demo-first-steps.sh; it may be run again at any time.
#     bash docs/demo-ssh.sh [USER]
# The nodes are this machine twice: each has its own processes, network, host name, mounts and /run, as two machines have,
# and all of it ends with this script. Their prolog is one line: setupRoot; their epilog another one: unsetupRoot.
set -euo pipefail

PREFIX=${PREFIX:-/opt/shifter}
IMAGE=${IMAGE:-debian:12}
user=${1:-${SUDO_USER:-shifterdemo}}
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
if [[ -t 1 ]]; then bold=$'\e[1m' plain=$'\e[0m'; else bold='' plain=''; fi
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
die() { echo "demo: $*" >&2; exit 1; }
[[ $(id -u) == 0 ]] || die "as root, please: it makes two nodes"
[[ -x $PREFIX/sbin/setupRoot ]] || die "$PREFIX/sbin/setupRoot is not there: run make demo first"
id "$user" >/dev/null 2>&1 || die "there is no user $user: run make demo first, or name another one"

declare -A pid address=([node1]=10.129.0.1 [node2]=10.129.0.2)
work=$(mktemp -d)
end() {
    for node in "${!pid[@]}"; do kill -KILL "${pid[$node]}" 2>/dev/null || true; done
    wait
    rm -rf "$work"
}
trap end EXIT

for node in node1 node2; do printf '%s %s\n' "${address[$node]}" "$node"; done | cat /etc/hosts - > "$work/hosts"

# Run a command on a node, as root; the second form as the user, in a login's environment.
on() { local node=$1; shift; nsenter --target "${pid[$node]}" --mount --uts --net --pid -- "$@"; }
as_user() {
    on "$1" setpriv --reuid "$user" --regid "$(id -g "$user")" --init-groups --reset-env -- \
        env -C / PATH="$PREFIX/bin:/usr/local/bin:/usr/bin:/bin" LC_ALL=C.UTF-8 "${@:2}"
}
show() { say "$user@$1\$ ${*:2}"; as_user "$@"; }

for node in node1 node2; do
    # shellcheck disable=SC2016 - the inner shell expands it
    unshare --mount --propagation private --uts --net --pid --fork --kill-child --mount-proc \
        bash -c 'hostname "$1"; mount -t tmpfs -o mode=755 tmpfs /run; mount --bind "$2" /etc/hosts; mkdir /run/up; exec sleep infinity' \
        node "$node" "$work/hosts" 2>"$work/$node.err" &
    pid[$node]=$!
done
for node in node1 node2; do # the first process of the node, and not the unshare that waits for it
    for _ in {1..500}; do
        child=$(pgrep -P "${pid[$node]}" || true)
        [[ -n $child && -d /proc/$child/root/run/up ]] && break
        sleep 0.01
    done
    [[ -n $child ]] || { cat "$work/$node.err" >&2; die "$node did not start"; }
    pid[$node]=$child
done
ip link add eth0 netns "${pid[node1]}" type veth peer name eth0 netns "${pid[node2]}"
for node in node1 node2; do
    on "$node" ip link set lo up
    on "$node" ip address add "${address[$node]}/24" dev eth0
    on "$node" ip link set eth0 up
done

say "The prolog of job 1, on each node, as root"
for node in node1 node2; do
    echo "$node# setupRoot --job 1 -u $user -N 'node1/1 node2/1' -V docker $IMAGE"
    on "$node" "$PREFIX/sbin/setupRoot" --job 1 -u "$user" -N "node1/1 node2/1" -V docker "$IMAGE"
done
show node1 shifter ssh node2 hostname
show node1 shifter ssh node2 'grep PRETTY /etc/os-release; id -un; cat /var/hostsfile'
# shellcheck disable=SC2016 - the shell of the other node expands it
show node2 shifter ssh node1 'echo "on $(hostname) by $SSH_CONNECTION, in $(readlink /proc/self/ns/mnt)"'
show node1 shifterctl logs --job 1
say "The epilog"
for node in node1 node2; do
    echo "$node# unsetupRoot --job 1"
    on "$node" "$PREFIX/sbin/unsetupRoot" --job 1
done
