# Shared by demo.sh and test-vm.sh, which read it with `.`: what they look at, and how they judge it.
#
# Its user defines SERVICE, PORT, LOAD (how requests are sent, as options of `skep lab http`) and work (a
# directory), and three functions: `n1 COMMAND…` runs a command on the first node, `client COMMAND…` on a
# machine outside of the swarm, `address NODE` prints a node's address.
# shellcheck shell=bash disable=SC2154 # work is its user's

say() { printf '\n== %s\n' "$*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
show() { echo "\$ $*" >&2; "$@"; }
field() { sed -n "s/.*\"$1\":\"\\([^\"]*\\)\".*/\\1/p"; }                     # NAME: that field of each line
field_where() { grep "\"$1\":\"$2\"" | field "$3"; }                          # NAME VALUE FIELD
until_true() { # SECONDS WHAT COMMAND…: looks until the command succeeds
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ $SECONDS -lt $deadline ] || fail "not in time: $what"
        sleep 0.1
    done
}

tasks() { n1 skep service ps "$SERVICE" --filter desired-state=running --format json; }
running() { tasks | grep '"CurrentState":"Running' || true; }
is_running() { [ "$(running | wc -l)" -eq "$1" ]; }
node_status() { n1 skep node ls --format json | field_where Hostname "$1" Status; }
is_down() { [ "$(node_status "$1")" = Down ]; }
is_ready() { [ "$(node_status "$1")" = Ready ]; }
is_removed() { [ -z "$(n1 skep service ls --format json)" ]; } # No service is left.
# A filter that reads to the end: `grep -q` ends early, and what it reads from fails then.
has_replica_on() { [ -n "$(tasks | field_where Node "$1" Name)" ]; } # NODE
# COUNT NODE: so many replicas run, and none of them on the node.
is_replaced() { is_running "$1" && [ -z "$(running | field_where Node "$2" Name)" ]; }

# COUNT ADDRESS: so many requests by the outside client, a new connection each; an answer a line.
requests() {
    # shellcheck disable=SC2016 # expanded on the client
    client sh -c 'for _ in $(seq "$1"); do curl -sS -m 5 "http://$2/" | tr "\n" " "; echo; done' \
        sh "$1" "$2:$PORT"
}
replicas_of() { sed -n 's/.*Slot: \([^ ]*\).*/\1/p' "$@"; }
clients_of() { sed -n 's/.*Client: \([0-9.]*\).*/\1/p' "$@"; }
# FILE: how many answers each replica gave, in words such as "10 10 10 10 10".
spread() { replicas_of "$1" | sort | uniq -c | awk '{print $1}' | xargs; }
expect_spread() { # WHAT FILE EXPECTED
    local got
    got=$(spread "$2")
    echo "$1: $got"
    [ "$got" = "$3" ] || { head -3 "$2" >&2; fail "expected $3"; }
}
has_spread() { [ "$(spread "$1")" = "$2" ]; } # FILE EXPECTED
each() { # N COUNT: the word COUNT, N times
    for _ in $(seq "$1"); do echo "$2"; done | xargs
}

# Requests without end by four clients, each through the next node in turn; nothing is tried twice.
start_load() { # NODE…
    local urls=() node
    for node in "$@"; do urls+=("http://$(address "$node"):$PORT/"); done
    rm -f "$work/stop"
    mkfifo "$work/stop"
    client skep lab http "${LOAD[@]}" "${urls[@]}" <"$work/stop" >"$work/load" &
    load=$!
    exec 9>"$work/stop"
}
stop_load() { # WHAT: fails when a request failed
    exec 9>&-
    wait "$load"
    local n_all n_failed
    n_all=$(sed 's/.*"Requests":\([0-9]*\).*/\1/' "$work/load")
    n_failed=$(sed 's/.*"Failed":\([0-9]*\).*/\1/' "$work/load")
    echo "$1: $n_all requests, $n_failed failed"
    [ "$n_all" -gt 0 ] && [ "$n_failed" -eq 0 ] || { cat "$work/load" >&2; fail "no request may fail"; }
}

# SECONDS NODE: the service is given seven replicas, which answer in turns through the node.
check_seven_replicas() {
    say "Seven replicas"
    show n1 skep service scale "$SERVICE=7"
    until_true "$1" "seven replicas run" is_running 7
    requests 70 "$(address "$2")" >"$work/answers"
    expect_spread "through $2" "$work/answers" "$(each 7 10)"
}
# SECONDS COUNT NODE…: its replicas, so many, are replaced while the nodes are asked.
check_rolling_update() {
    local seconds=$1 n=$2
    shift 2
    say "A rolling update under load: each replica is replaced, and no request fails"
    tasks | field ID | sort >"$work/before"
    start_load "$@"
    show n1 skep service update --env-add GREETING=hello "$SERVICE"
    until_true "$seconds" "$n replicas run" is_running "$n"
    stop_load "through all nodes, while every replica was replaced"
    tasks | field ID | sort >"$work/after"
    [ -z "$(comm -12 "$work/before" "$work/after")" ] || fail "a task of before the update still runs"
}
