#!/usr/bin/env bash
# Add this machine to a cluster, in the foreground: Ctrl-C or SIGTERM takes it out again.
#
#   cluster/join.sh HEAD:6379 [option of ray start]...
#
# Needs the head's token in RAY_AUTH_TOKEN, or in ~/.ray/auth_token. Waits WAIT_S seconds for the head.
set -euo pipefail

head=${1:?"usage: cluster/join.sh HEAD:6379 [option of ray start]..."}
shift

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
if [[ -z ${RAY_AUTH_TOKEN:-} && ! -s ${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token} ]]; then
    echo "no token: set RAY_AUTH_TOKEN to the head's, or copy its ~/.ray/auth_token here" >&2
    exit 2
fi
for ((waited = 0; ; waited++)); do
    (exec 3<>"/dev/tcp/${head%:*}/${head##*:}") 2>/dev/null && break
    if ((waited >= ${WAIT_S:-120})); then
        echo "no Ray head answers at $head after $waited s" >&2
        exit 4
    fi
    sleep 1
done

exec ray start --block --disable-usage-stats --address="$head" "$@"
