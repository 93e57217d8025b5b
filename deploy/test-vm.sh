#!/usr/bin/env bash
# A swarm of three virtual machines with a kernel each, Debian's, and cgroup v2: what `make demo` shows is
# checked there, with a machine that loses its power and comes back with its disk.
#
# QEMU interprets their instructions, so that it works anywhere. The machines are on a switch in a network
# namespace of this script's, with this script as the client outside of the swarm. Everything is in
# namespaces that end with the script, so that nothing is left of it, however it ends.
#
# SKEP_BINARY is the program: target/skep of `make release`. `KEEP=1` keeps consoles and disks.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
# shellcheck disable=SC2034 # of checks.sh
SERVICE=whoami_whoami PORT=8080 N_NODES=3
# A machine whose instructions are interpreted is busy for seconds when a container starts, and a load that
# takes all of its time lets none start. Who was sent to a task that is gone is not answered in 20 s either.
LOAD=(--clients 8 --rate 20 --timeout-ms 20000)
NET=10.77.0 CLIENT=10.77.0.250

if [ "${1:-}" != built ]; then
    SKEP_TEST_VM=1 deploy/prerequisites.sh
    SKEP_BINARY=$(realpath "${SKEP_BINARY:?names the program, such as target/skep of make release}")
    export SKEP_BINARY
    SKEP_VM_KERNEL=$(deploy/as-root.sh deploy/vm/kernel.sh "$target/vm")
    export SKEP_VM_KERNEL
    deploy/with-rust.sh deploy/examples/make-whoami-image.sh "$target/vm/whoami.tar" 2>&1 | sed -n 1p
    mkdir -p "$target/vm/tools/bin" "$target/vm/tools/tmp"
    cc -O1 -Wall -static -o "$target/vm/tools/bin/sctp" deploy/vm/sctp.c
    cp "$(command -v busybox)" "$target/vm/tools/bin/busybox"
    ln -sf busybox "$target/vm/tools/bin/sh"
    tar --create --file "$target/vm/tools.tar" --directory "$target/vm/tools" --owner 0 --group 0 .
    exec deploy/as-root.sh unshare --net --pid --mount --fork --kill-child --mount-proc "$0" built
fi

work=$(mktemp -d "$target/vm/run.XXXXXX")
finish() {
    code=$?
    trap - EXIT
    if [ "$code" -ne 0 ]; then
        for console in "$work"/n*.console; do
            [ ! -e "$console" ] || { echo "-- the end of $(basename "$console"):" && tail -n 25 "$console"; } >&2
        done
        echo "test-vm: FAILED (exit code $code)" >&2
    fi
    # The machines end with this namespace's first process, which this is.
    [ -n "${KEEP:-}" ] || rm -rf "$work"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

mkdir "$work/bin"
ln -s "$SKEP_BINARY" "$work/bin/skep"
PATH="$work/bin:$PATH"
address() { echo "$NET.1${1#n}"; }
client() { "$@"; }
n1() { on n1 "$@"; }
. deploy/checks.sh
declare -A machines

on() { # NODE COMMAND…: its output and exit code, as if it ran here
    local node=$1 answer tail
    shift
    answer=$(printf '%q ' "$@" | timeout 120 busybox nc -w 5 "$(address "$node")" 1) || return 255
    tail=${answer##*$'\n::exit '}
    [ "$tail" != "$answer" ] || return 255 # It was cut.
    [ "${answer%$'\n::exit '*}" = "" ] || printf '%s\n' "${answer%$'\n::exit '*}"
    [ "${tail%%$'\n'*}" = "$tail" ] || printf '%s\n' "${tail#*$'\n'}" >&2
    return "${tail%%$'\n'*}"
}
# The kernel's check of its timer fails where the host is busy, hence `no_timer_check`.
power_on() { # NODE [MORE]: words for its init
    local node=$1 more=${2-}
    qemu-system-x86_64 -accel tcg -cpu max -nodefaults -no-user-config -display none -no-reboot \
        -m 768 -smp 1 -device virtio-rng-pci -serial "file:$work/$node.console" \
        -kernel "$work/vmlinuz" -initrd "$work/initramfs" \
        -append "console=ttyS0 panic=-1 quiet no_timer_check skep.hostname=$node skep.address=$(address "$node")/24 $more" \
        -drive "file=$work/$node.disk,format=raw,if=none,id=disk" -device virtio-blk-pci,drive=disk \
        -netdev "tap,id=net,ifname=$node,script=no,downscript=no" \
        -device "virtio-net-pci,netdev=net,mac=52:54:00:00:00:0${node#n}" </dev/null &
    machines[$node]=$!
}
power_off() { # NODE: at once, as if its cable were pulled
    kill -KILL "${machines[$1]}"
    wait "${machines[$1]}" || true
}
has_daemon() { # NODE
    kill -0 "${machines[$1]}" 2>/dev/null || fail "the machine $1 ended"
    on "$1" skep info >/dev/null 2>&1
}

say "Three virtual machines on a switch"
ip link set lo up
ip link add switch type bridge
ip address add "$CLIENT/24" dev switch
ip link set switch up
# A machine whose instructions are interpreted takes seconds to start the program of a health check.
sed 's/interval: 1s/interval: 5s/; s/timeout: 3s/timeout: 30s/' deploy/examples/whoami.yml >"$work/whoami.yml"
deploy/vm/image.sh "$SKEP_VM_KERNEL" "$work" "$SKEP_BINARY" \
    "$target/vm/whoami.tar" "$target/vm/tools.tar" "$target/vm/tools/bin/sctp" "$work/whoami.yml"
plug() { # NODE: a cable to the switch, and a disk
    ip tuntap add "$1" mode tap
    ip link set "$1" master switch up
    cp --sparse=always "$work/disk" "$work/$1.disk"
}
for node in n1 n2 n3; do
    plug $node
    power_on $node
done
for node in n1 n2 n3; do
    until_true 120 "the daemon of $node answers" has_daemon "$node"
done
echo "up after $SECONDS s: $(n1 uname -sr)"

say "A swarm of three managers"
show n1 skep swarm init
join=$(n1 skep swarm join-token manager | sed -n 's/.*\(skep swarm join .*\)/\1/p')
for node in n2 n3; do
    # shellcheck disable=SC2086 # it is a command
    on $node $join
    until_true 60 "$node is ready" is_ready $node
done
show n1 skep node ls

say "An image, and a stack of one service: five replicas, published on port $PORT of every node"
show n1 skep image import --change 'ENTRYPOINT ["/whoami"]' /root/whoami.tar whoami:latest
show n1 skep stack deploy -c /root/whoami.yml whoami
until_true 120 "five replicas run" is_running 5
show n1 skep service ps $SERVICE

say "50 requests through each of the three nodes: each replica answers ten, and sees the client's address"
for i in $(seq $N_NODES); do
    requests 50 "$(address "n$i")" >"$work/answers"
    expect_spread "through n$i" "$work/answers" "$(each 5 10)"
    cat "$work/answers" >>"$work/all"
done
seen=$(clients_of "$work/all" | sort | uniq -c | xargs)
echo "the client is $CLIENT; addresses seen, with their number: $seen"
[ "$seen" = "150 $CLIENT" ] || fail "expected 150 $CLIENT"

say "n3 loses its power"
has_replica_on n3 || fail "no replica ran on n3"
power_off n3
until_true 60 "n3 is seen down" is_down n3
start_load n1 n2
until_true 120 "five replicas run on the two others" is_replaced 5 n3
stop_load "through the two living nodes, while replicas were replaced"
requests 50 "$(address n1)" >"$work/answers"
expect_spread "through n1" "$work/answers" "$(each 5 10)"
power_on n3
until_true 120 "n3 is ready again, with what its disk has" is_ready n3

check_seven_replicas 120 n3
check_rolling_update 120 7 n1 n2 n3

say "The stack goes"
show n1 skep stack rm whoami
until_true 60 "the service is gone" is_removed

say "SCTP: a port that is published, and asked through nodes without the task"
show n1 skep image import /root/tools.tar tools:latest
show n1 skep service create --quiet --name sctp --constraint node.hostname==n1 --publish 9000:9000/sctp \
    tools:latest /bin/sctp serve 9000 n1
for node in n2 n3; do
    # Of the machine itself: this one's kernel need not have SCTP.
    for through in n1 n2 n3; do
        answer=$(on $node /root/sctp ask "$(address $through)" 9000)
        echo "$node asks $through: $answer"
        [ "${answer%% *}" = n1 ] || fail "expected an answer of n1"
    done
done
show n1 skep service rm sctp

say "An encrypted network, with the kernel's WireGuard"
for node in n1 n2 n3; do
    n1 skep node inspect $node | grep '"Implementation": "kernel"' >/dev/null || fail "$node does not say: kernel"
done
nft -f - <<'RULES'
table bridge wire {
    counter wireguard {}
    counter vxlan {}
    counter clear {}
    chain forward {
        type filter hook forward priority 0
        udp dport { 4790, 4791 } counter name wireguard
        udp dport { 4789, 4792 } counter name vxlan
        tcp dport 8080 counter name clear
    }
}
RULES
n_packets() { nft list counter bridge wire "$1" | sed -n 's/.*packets \([0-9]*\).*/\1/p'; }
show n1 skep network create --opt encrypted secret
show n1 skep service create --quiet --name answer --network secret --replicas 3 \
    --env NODE_HOSTNAME='{{.Node.Hostname}}' whoami:latest
show n1 skep service create --quiet --name ask --network secret --constraint node.hostname==n2 \
    tools:latest /bin/sh -c 'while busybox sleep 0.2; do busybox wget -qO- http://answer:8080/; done'
answers() { n1 skep service logs --raw ask | sed -n 's/.*Node: //p'; }
all_answer() { [ "$(answers | sort -u | xargs)" = "n1 n2 n3" ]; }
until_true 60 "tasks of all nodes answer within the network" all_answer
echo "packets between the machines: $(n_packets wireguard) of WireGuard, $(n_packets vxlan) of VXLAN," \
    "$(n_packets clear) to the tasks' port in clear"
[ "$(n_packets wireguard)" -gt 0 ] && [ "$(n_packets vxlan)" -eq 0 ] && [ "$(n_packets clear)" -eq 0 ] ||
    fail "only WireGuard may be on the wire"
show n1 skep service rm ask answer
until_true 60 "the services are gone" is_removed
show n1 skep network rm secret

say "A machine whose kernel has neither VXLAN nor nftables: the daemon balances"
plug n4
power_on n4 skep.without=vxlan,nf_tables
until_true 120 "the daemon of n4 answers" has_daemon n4
join=$(n1 skep swarm join-token worker | sed -n 's/.*\(skep swarm join .*\)/\1/p')
# shellcheck disable=SC2086 # it is a command
on n4 $join
until_true 60 "n4 is ready" is_ready n4
n1 skep node inspect --pretty n4 | grep -i -A 2 balancer
n1 skep node inspect n4 | grep '"user-space"' >/dev/null || fail "n4 does not say that it balances in user space"
SERVICE=everywhere PORT=8081
show n1 skep service create --quiet --name $SERVICE --replicas 4 --publish $PORT:8080 \
    --env TASK_SLOT='{{.Task.Slot}}' --env NODE_HOSTNAME='{{.Node.Hostname}}' whoami:latest
until_true 60 "four replicas run" is_running 4
has_replica_on n4 || fail "no replica runs on n4"
has_turns() { # NODE: it has heard of all replicas
    requests 40 "$(address "$1")" >"$work/answers" && has_spread "$work/answers" "$(each 4 10)"
}
for node in n1 n2 n3 n4; do
    until_true 60 "each replica answers ten of 40 requests through $node" has_turns $node
done
check_rolling_update 120 4 n1 n2 n3 n4
show n1 skep service rm $SERVICE
until_true 60 "the service is gone" is_removed

say "The machines leave"
for node in n4 n3 n2; do
    show on $node skep swarm leave --force
done
echo "test-vm: ok"
