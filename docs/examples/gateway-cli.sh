#!/usr/bin/env bash
# The gateway's HTTP API by curl and jq: every answer is JSON on standard output, what goes wrong a line on standard
# error and exit code 1. It speaks to the root of a gateway or to its /api/gateway alike.
#
#   GATEWAY_URL=http://127.0.0.1:8080 GATEWAY_API_TOKEN=... gateway-cli.sh COMMAND
#
#   status                                health, jobs that wait and run, services that run
#   gpu | vram | services | queue         what there is
#   service NAME                          one service
#   register NAME CONTAINER PORT TYPE [--vram GB] [--health PATH] [--progress-mode stateless|queue|poll] [--description TEXT]
#   unregister | enable | disable | start | stop | restart NAME
#   submit TYPE FILE [-p PRIORITY]        a job whose payload is the JSON of FILE ('-': standard input)
#   job | cancel | progress ID            one job
#   preempt check NAME                    what could be preempted on a service
#   preempt exec NAME JOB                 make room on a service for a waiting job
#   release NAME                          let the jobs go on that were preempted on a service
set -euo pipefail

base="${GATEWAY_URL:-http://127.0.0.1:8080}"
base="${base%/}"

fail() {
    printf 'gateway-cli: %s\n' "$*" >&2
    exit 1
}

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
}

# call METHOD PATH [BODY]: the answer's body. The token is in a header file, not among the arguments that all users see.
call() {
    local method="$1" path="$2" answer status options=()
    (($# < 3)) || options=(--header 'Content-Type: application/json' --data-binary "$3")
    answer="$(curl --silent --show-error --max-time 150 --request "$method" --write-out '\n%{http_code}' \
        --header @<(printf 'Authorization: Bearer %s\n' "${GATEWAY_API_TOKEN:-}") \
        ${options[@]+"${options[@]}"} "$base$path")" || fail "no gateway answers at $base"
    status="${answer##*$'\n'}"
    answer="${answer%$'\n'*}"
    if ((status >= 400)); then
        fail "$status $(jq -r '.detail | if type == "string" then . else tojson end' <<<"$answer" 2>/dev/null || echo "$answer")"
    fi
    printf '%s\n' "$answer"
}

show() {
    local answer
    answer="$(call "$@")"
    jq . <<<"$answer"
}

# in_path TEXT: as a part of a path.
in_path() {
    jq -rn --arg text "$1" '$text | @uri'
}

# takes COUNT ARGUMENT...: fails unless there are that many arguments.
takes() {
    local count="$1"
    shift
    (($# == count)) || fail "wrong arguments; see: gateway-cli.sh help"
}

status() {
    local health services queue
    health="$(call GET /health)"
    services="$(call GET /services)"
    queue="$(call GET /queue/stats)"
    jq -n --argjson health "$health" --argjson services "$services" --argjson queue "$queue" '{
        status: $health.status,
        version: $health.version,
        queued: $queue.total_queued,
        running: $queue.total_running,
        services: ($services.services | length),
        services_running: [$services.services | to_entries[] | select(.value.container_running) | .key]
    }'
}

register() {
    (($# >= 4)) || fail "register takes NAME CONTAINER PORT TYPE"
    local body
    body="$(jq -n --arg name "$1" --arg container "$2" --arg port "$3" --arg type "$4" \
        '{name: $name, container: $container, port: ($port | tonumber? // $port), type: $type}')"
    shift 4
    while (($#)); do
        (($# >= 2)) || fail "$1 takes a value"
        case "$1" in
            --vram) body="$(jq --arg v "$2" '.vram_gb = ($v | tonumber? // $v)' <<<"$body")" ;;
            --health) body="$(jq --arg v "$2" '.health_endpoint = $v' <<<"$body")" ;;
            --progress-mode) body="$(jq --arg v "$2" '.progress_mode = $v' <<<"$body")" ;;
            --description) body="$(jq --arg v "$2" '.description = $v' <<<"$body")" ;;
            *) fail "register knows no option '$1'" ;;
        esac
        shift 2
    done
    show POST /services/register "$body"
}

submit() {
    (($# == 2 || $# == 4)) || fail "submit takes TYPE FILE [-p PRIORITY]"
    local priority=3 payload
    if (($# == 4)); then
        [[ "$3" == -p || "$3" == --priority ]] || fail "submit knows no option '$3'"
        priority="$4"
    fi
    payload="$(cat -- "$2")" || fail "cannot read '$2'"
    show POST /queue/submit "$(jq -n --arg type "$1" --arg priority "$priority" --argjson payload "$payload" \
        '{service_type: $type, priority: ($priority | tonumber? // $priority), payload: $payload}')"
}

preempt() {
    case "${1:-}" in
        check)
            takes 2 "$@"
            show GET "/preempt/check/$(in_path "$2")"
            ;;
        exec)
            takes 3 "$@"
            show POST /preempt/execute \
                "$(jq -n --arg service "$2" --arg job "$3" '{service_name: $service, preemptor_job_id: $job}')"
            ;;
        *) fail "preempt takes check NAME, or exec NAME JOB" ;;
    esac
}

command="${1:-help}"
(($# == 0)) || shift
case "$command" in
    status) takes 0 "$@" && status ;;
    gpu | vram | services) takes 0 "$@" && show GET "/$command" ;;
    queue) takes 0 "$@" && show GET /queue/stats ;;
    service) takes 1 "$@" && show GET "/services/$(in_path "$1")" ;;
    register) register "$@" ;;
    unregister) takes 1 "$@" && show DELETE "/services/$(in_path "$1")" ;;
    enable | disable | start | stop | restart)
        takes 1 "$@" && show POST "/services/$(in_path "$1")/$command"
        ;;
    submit) submit "$@" ;;
    job) takes 1 "$@" && show GET "/queue/$(in_path "$1")" ;;
    cancel) takes 1 "$@" && show DELETE "/queue/$(in_path "$1")" ;;
    progress) takes 1 "$@" && show GET "/queue/$(in_path "$1")/progress" ;;
    preempt) preempt "$@" ;;
    release) takes 1 "$@" && show POST "/preempt/release/$(in_path "$1")" ;;
    help | -h | --help) usage ;;
    *) fail "no command '$command'; see: gateway-cli.sh help" ;;
esac
