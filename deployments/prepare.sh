#!/usr/bin/env bash
# Make the folders and the secrets that deployments/compose.yaml and the gpu pool mount; what is
# there stays. On a further GPU host: copy secrets/client.toml to it, then run this there too.
#
#     deployments/prepare.sh [FOLDER]     default: ONBOARD_HOME, also of deployments/.env; /srv/onboard
set -euo pipefail
umask 077

settings=$(dirname "$0")/.env
if [[ -z ${ONBOARD_HOME:-} && -f $settings ]]; then
    ONBOARD_HOME=$(sed -n 's/^ONBOARD_HOME=//p' "$settings")
fi
HOME_FOLDER=${1:-${ONBOARD_HOME:-/srv/onboard}}
USER_ID=${USER_ID:-10001} # of both images

secret() {
    head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'
}

# Written under another name first: a file that is there is complete.
put() {
    local path=$1
    [[ -e $path ]] && return
    cat > "$path.new"
    chown "$USER_ID" "$path.new"
    chmod 400 "$path.new"
    mv "$path.new" "$path"
}

mkdir -p "$HOME_FOLDER"
chmod 755 "$HOME_FOLDER"
for folder in store store/results huggingface kernel-cache gpu-locks; do
    mkdir -p "$HOME_FOLDER/$folder"
    chown "$USER_ID" "$HOME_FOLDER/$folder"
done
chmod 777 "$HOME_FOLDER/gpu-locks" # everyone who uses these GPUs locks here

secrets=$HOME_FOLDER/secrets
mkdir -p "$secrets"
# Tokens to publish with, for the control worker only; empty without one. Given again, they replace.
for name in github_token hf_token; do
    variable=ONBOARD_${name^^}
    [[ -z ${!variable:-} ]] || rm -f "$secrets/$name"
    put "$secrets/$name" <<< "${!variable:-}"
done
if [[ ! -e $secrets/client.toml ]]; then
    password="admin:$(secret)"
    put "$secrets/database_password" <<< "$(secret)"
    put "$secrets/server.toml" << EOF
active = "server"

[profiles.server]
PREFECT_SERVER_API_AUTH_STRING = "$password"
PREFECT_SERVER_DATABASE_PASSWORD = "$(cat "$secrets/database_password")"
EOF
    put "$secrets/client.toml" << EOF
active = "client"

[profiles.client]
PREFECT_API_AUTH_STRING = "$password"
EOF
fi
