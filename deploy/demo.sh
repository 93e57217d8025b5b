#!/usr/bin/env bash
# A swarm of five nodes on this machine, from a fresh clone: builds skep, starts the lab `demo`, and
# shows a service that is deployed, balanced, moved off a dead node, scaled and updated. Every step
# checks what it shows: the exit code is 0 only if all of it held. Removes what it made, also when a
# step fails; `KEEP=1 make demo` leaves the lab for a look.
set -euo pipefail
cd "$(dirname "$0")/.."
LAB=demo SERVICE=whoami_whoami PORT=8080 N_NODES=5 LOAD=(--clients 4)
STACK_FILE=deploy/examples/whoami.yml
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
image=$target/debug/whoami.tar

if [ "${1:-}" != built ]; then
    echo "== Building skep; the first time takes some minutes"
    deploy/prerequisites.sh
    deploy/with-rust.sh cargo build --package skep-cli
    deploy/with-rust.sh deploy/examples/make-whoami-image.sh "$image" 2>&1 | sed -n 1p
    exec deploy/as-root.sh "$0" built
fi

PATH="$target/debug:$PATH"
work=$(mktemp -d)
has_lab=
finish() {
    code=$?
    trap - EXIT
    if [ -n "$has_lab" ] && [ -n "${KEEP:-}" ]; then
        echo "the lab is left as it is: skep lab --name $LAB ls; remove it with skep lab --name $LAB down"
    elif [ -n "$has_lab" ]; then
        skep lab --name $LAB down || code=1
    fi
    rm -rf "$work"
    [ "$code" -eq 0 ] || echo "the demonstration FAILED (exit code $code)" >&2
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

lab() { skep lab --name $LAB "$@"; }
n1() { lab exec n1 -- "$@"; }
client() { lab client -- "$@"; }
address() { lab ls --format json | field_where Name "$1" Address; }
. deploy/checks.sh

say "A lab of five nodes: each has namespaces, cgroups, data and an address of its own"
if lab ls >/dev/null 2>&1; then show lab down; fi
show skep lab --name $LAB up --managers 3 --workers 2
has_lab=yes
show n1 skep node ls

say "An image, compiled here and stored by one node: there is no registry"
show n1 skep image import --change 'ENTRYPOINT ["/whoami"]' "$image" whoami:latest

say "A stack of one service: five replicas, published on port $PORT of every node"
show n1 skep stack deploy -c $STACK_FILE whoami
until_true 60 "five replicas run" is_running 5
show n1 skep service ps $SERVICE

say "50 requests through each of the five nodes: each replica answers ten"
for i in $(seq $N_NODES); do
    requests 50 "$(address "n$i")" >"$work/answers"
    expect_spread "through n$i" "$work/answers" "$(each 5 10)"
    cat "$work/answers" >>"$work/all"
done

say "The same with three clients at once: 150 requests, 30 to each"
clients=()
for c in 1 2 3; do
    requests 50 "$(address n2)" >"$work/client$c" &
    clients+=($!)
done
for pid in "${clients[@]}"; do wait "$pid"; done
cat "$work"/client? >"$work/answers"
expect_spread "through n2" "$work/answers" "$(each 5 30)"

say "Every replica saw the client's own address, whichever node the request came through"
own=$(address n1 | sed 's/[0-9]*$/250/')
seen=$(clients_of "$work/all" "$work/answers" | sort | uniq -c | xargs)
echo "the client is $own; addresses seen, with their number: $seen"
[ "$seen" = "400 $own" ] || fail "expected 400 $own"
echo "this machine is outside of the lab too: curl http://$(address n3):$PORT/"
curl -sS -m 5 "http://$(address n3):$PORT/" 

say "n5 loses its power"
has_replica_on n5 || fail "no replica ran on n5"
killed_at=$(date +%s%N)
show lab kill n5
until_true 30 "n5 is seen down" is_down n5
echo "seen down after $((($(date +%s%N) - killed_at) / 1000000)) ms; from now on no request may fail"
start_load n1 n2 n3 n4
until_true 60 "five replicas run on the four others" is_replaced 5 n5
echo "five replicas run again after $((($(date +%s%N) - killed_at) / 1000000)) ms"
stop_load "through the four living nodes, while the replica was replaced"
requests 50 "$(address n1)" >"$work/answers"
expect_spread "through n1" "$work/answers" "$(each 5 10)"
show n1 skep service ps $SERVICE
show lab start n5
until_true 30 "n5 is ready again" is_ready n5

check_seven_replicas 60 n4
check_rolling_update 60 7 n1 n2 n3 n4 n5

say "Cleaning up"
show n1 skep stack rm whoami
until_true 30 "the service is gone" is_removed
if [ -z "${KEEP:-}" ]; then
    show lab down
    has_lab=
fi

cat <<'NEXT'

== All of it held. Try next, as root:
   PATH="$PWD/target/debug:$PATH"
   skep lab up                                    a lab of your own
   skep lab exec n1 -- skep node ls               any command on any node
   skep lab exec n1 -- skep stack deploy -c deploy/examples/whoami.yml whoami
   skep lab cut n4                                pull a network cable; `heal n4` plugs it in
   skep lab down
NEXT
