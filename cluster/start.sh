#!/usr/bin/env bash
# Start the head of a cluster here, in the foreground: Ctrl-C or SIGTERM ends it, and with it every run on it.
#
#   cluster/start.sh [ADDRESS] [option of ray start]...
#
# ADDRESS is where the other nodes reach this one; the default, 127.0.0.1, admits this machine alone. The cluster's
# token is RAY_AUTH_TOKEN, or the file ~/.ray/auth_token, which is made when there is neither.
set -euo pipefail

address=${1:-127.0.0.1}
shift $(($# > 0))

umask 077
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
if [[ -z ${RAY_AUTH_TOKEN:-} && ! -s ${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token} ]]; then
    ray get-auth-token --generate >/dev/null
fi
if [[ $address == 127.0.0.1 ]]; then
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # or Ray takes this machine's outside address instead
fi

exec ray start --head --block --disable-usage-stats --node-ip-address="$address" --port="${PORT:-6379}" \
    --include-dashboard=true --dashboard-host="$address" --dashboard-port="${JOB_PORT:-8265}" \
    --dashboard-agent-listen-port=0 "$@" # another Ray here may have the usual port, and then no job could start
