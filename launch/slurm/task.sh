#!/bin/bash
# What train.sbatch starts on the nodes, once for each task: gives COMMAND the node's cache of compiled code.
#
#   bash launch/slurm/task.sh COMMAND [ARGUMENT ...]
#
# DSTRAIN_CACHE        folder on the node that outlives the job
# DSTRAIN_ENVIRONMENT  which of its folders is this environment's
set -euo pipefail

refuse() {
    echo "task.sh: ${SLURMD_NODENAME:-$(hostname)}: $*; name another folder of the node with DSTRAIN_CACHE" >&2
    exit 2
}

# In /tmp anybody can take a name first, with a folder or a link of their own, and code is run from here.
mkdir -p "$(dirname "$DSTRAIN_CACHE")"
mkdir -m 700 "$DSTRAIN_CACHE" 2>/dev/null || true
if [ -z "$(find "$DSTRAIN_CACHE" -maxdepth 0 -type d -user "$(id -u)" ! -perm /022 2>/dev/null)" ]; then
    refuse "$DSTRAIN_CACHE is not a folder that only $(id -un) can write"
fi
if [ -n "$(find -H "$(dirname "$DSTRAIN_CACHE")" -maxdepth 0 -perm /022 ! -perm -1000)" ]; then
    refuse "others can replace $DSTRAIN_CACHE, since its parent folder is open to all without the sticky bit"
fi

here="$DSTRAIN_CACHE/$DSTRAIN_ENVIRONMENT"
export TORCH_EXTENSIONS_DIR="$here/torch_extensions" TRITON_CACHE_DIR="$here/triton"
mkdir -p "$TORCH_EXTENSIONS_DIR" "$TRITON_CACHE_DIR"

# A build that was killed leaves a lock that every later one waits for. Each task holds in_use as long as it lives, so
# who gets it alone knows that nobody compiles.
exec 9>"$here/in_use"
if flock --exclusive --nonblock 9; then
    find "$TORCH_EXTENSIONS_DIR" -mindepth 2 -maxdepth 2 -name lock -delete
fi
flock --shared 9

exec "$@"
