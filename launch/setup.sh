#!/usr/bin/env bash
# Makes the Python environment of this checkout and enters it:  source launch/setup.sh
# Safe to run again; when nothing has changed it takes no time. It takes no arguments, since a script that sources it
# without any would pass on its own; these variables change what it does:
#
# DSTRAIN_EXTRAS       extras of pyproject.toml to install as well, e.g. "test dev"
# DSTRAIN_PYTHON       the Python to use; otherwise the first >= 3.11 that is found
# DSTRAIN_BUILD        cpu or gpu: the torch to install; otherwise by the machine. Set it to gpu on a login node
#                      without a GPU when the jobs will have one
# DSTRAIN_TORCH_INDEX  package index for torch, e.g. https://download.pytorch.org/whl/cu126 for an older driver

_dstrain_torch="2.13.0"
_dstrain_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

_dstrain_say() { printf 'setup: %s\n' "$*" >&2; }

_dstrain_find_python() {
    local candidate
    for candidate in ${DSTRAIN_PYTHON:+"$DSTRAIN_PYTHON"} python3 python3.12 python3.11 python3.13 python3.14; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        if [ "$candidate" = "${DSTRAIN_PYTHON:-}" ]; then
            _dstrain_say "DSTRAIN_PYTHON=$DSTRAIN_PYTHON is not a Python >= 3.11."
            return 1
        fi
    done
    _dstrain_say "no Python >= 3.11 is on the PATH; install one (Debian, Ubuntu: apt install python3 python3-venv" \
        "python3-dev) or name it with DSTRAIN_PYTHON."
    return 1
}

# What an install needs from the system, each with the way to get it.
_dstrain_check_system() {
    local python="$1" folder="$2" gib="$3" free
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        _dstrain_say "$python cannot make virtual environments; install what it lacks" \
            "(Debian, Ubuntu: apt install python3-venv)."
        return 1
    fi
    if ! command -v g++ >/dev/null; then
        _dstrain_say "g++ is missing, and DeepSpeed compiles its CPU optimizer with it; install it" \
            "(Debian, Ubuntu: apt install g++)."
        return 1
    fi
    if ! "$python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())'; then
        _dstrain_say "Python.h of $python is missing, and DeepSpeed compiles against it; install it" \
            "(Debian, Ubuntu: apt install python3-dev)."
        return 1
    fi
    free="$(df -Pk "$folder" | awk 'NR == 2 {print int($4 / 1048576)}')"
    if [ "${free:-$gib}" -lt "$gib" ]; then
        _dstrain_say "warning: $free GiB are free where $folder lies; the environment takes about $gib."
    fi
}

_dstrain_pip() {
    local quiet=(-q)
    [ ! -t 1 ] || quiet=() # a person wants to see the downloads move
    "$1" -m pip --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} "${@:2}"
}

_dstrain_install_torch() {
    local python="$1" build="$2" index=()
    if [ -n "${DSTRAIN_TORCH_INDEX:-}" ]; then
        index=(--index-url "$DSTRAIN_TORCH_INDEX")
    elif [ "$build" = cpu ] && curl -sfI -m 5 https://download.pytorch.org/whl/cpu/ >/dev/null 2>&1; then
        index=(--index-url https://download.pytorch.org/whl/cpu)
    fi
    # A CPU build from an earlier set-up satisfies pip, also on a machine that has a GPU now.
    if [ "$build" = gpu ] && "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null; then
        _dstrain_pip "$python" uninstall -y torch || return 1
    fi
    _dstrain_pip "$python" install "torch==$_dstrain_torch" ${index[@]+"${index[@]}"}
}

_dstrain_install() {
    local venv="$1" build="$2" extras="$3" python
    python="$venv/bin/python"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        local base gib=4
        [ "$build" = cpu ] || gib=10
        base="$(_dstrain_find_python)" && mkdir -p "$venv" && _dstrain_check_system "$base" "$venv" "$gib" || return 1
        _dstrain_say "making $venv with $("$base" --version)"
        "$base" -m venv --clear "$venv" || return 1
    fi
    _dstrain_say "installing torch $_dstrain_torch ($build) and dstrain${extras:+ with $extras};" \
        "the first time this takes some minutes"
    _dstrain_install_torch "$python" "$build" || return 1
    _dstrain_pip "$python" install -e "$_dstrain_root${extras:+[${extras// /,}]}" || return 1
    if nvidia-smi -L >/dev/null 2>&1 && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        _dstrain_say "warning: there is a GPU, but this torch cannot use it; most often its driver is too old:" \
            "update it, or remove $venv and name an older CUDA with DSTRAIN_TORCH_INDEX."
    fi
}

_dstrain_setup() {
    local venv stamp build hash extra extras="" done_hash="" done_extras="" done_root=""
    # Neither compilers nor the `deepspeed` script work in an environment whose path has a space.
    venv="$_dstrain_root/.venv"
    case "$venv" in
        *[[:space:]]*)
            venv="${XDG_CACHE_HOME:-$HOME/.cache}/dstrain/venv-$(printf %s "$_dstrain_root" | cksum | cut -d' ' -f1)"
            ;;
    esac
    stamp="$venv/dstrain-setup"
    build="${DSTRAIN_BUILD:-}"
    if [ -z "$build" ]; then
        build=cpu
        if nvidia-smi -L >/dev/null 2>&1; then build=gpu; fi
    fi
    hash="$({ cat "$_dstrain_root/pyproject.toml"; echo "$_dstrain_torch $build"; } | cksum | cut -d' ' -f1)"
    if [ -f "$stamp" ]; then
        { read -r done_hash; read -r done_extras; read -r done_root; } <"$stamp"
        if [ "$done_root" != "$_dstrain_root" ]; then # an environment does not survive being moved
            rm -rf "$venv"
            done_hash="" done_extras=""
        fi
    fi
    extras="$done_extras" # what was asked for once stays
    for extra in ${DSTRAIN_EXTRAS:-}; do
        case " $extras " in *" $extra "*) ;; *) extras="${extras:+$extras }$extra" ;; esac
    done
    if [ "$done_hash" != "$hash" ] || [ "$extras" != "$done_extras" ]; then
        _dstrain_install "$venv" "$build" "$extras" || return 1
        printf '%s\n' "$hash" "$extras" "$_dstrain_root" >"$stamp" || return 1
    fi

    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH" TOKENIZERS_PARALLELISM=false
    unset PYTHONHOME
    # DeepSpeed's compiled operators, one folder for each environment since they are built against it. A build that was
    # killed leaves a lock that every later one would wait for.
    export TORCH_EXTENSIONS_DIR="$venv/torch_extensions"
    [ ! -d "$TORCH_EXTENSIONS_DIR" ] || find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +15 -delete
    hash -r
}

_dstrain_setup || {
    _dstrain_say "not set up."
    return 1 2>/dev/null || exit 1
}
