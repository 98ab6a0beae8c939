# Sourced by run-example, run-tests and .ci/run: everything they need on a fresh Debian 12 machine with git, Python 3.11
# or later and the package registries. Quick when nothing has changed. SANDBOXD_VENV names another place than ./.venv.
# shellcheck shell=bash

TREE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${SANDBOXD_VENV:-$TREE/.venv}
case $TREE/ in
/tmp/* | /var/tmp/* | /run/* | /var/run/* | /dev/*)
    # A sandbox has such places for itself, so the environment of a tree there lies elsewhere.
    VENV=${SANDBOXD_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/sandboxd/venv-$(cksum <<<"$TREE" | cut -d " " -f 1)}
    ;;
esac

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "$0: $*"
    exit 1
}

# Install Debian packages; the only step that wants root.
install_packages() {
    say "Installing Debian packages: $*"
    command -v apt-get >/dev/null || fail "please install the equivalents of these Debian packages: $*"
    local as_root=()
    if ((EUID != 0)); then
        command -v sudo >/dev/null || fail "please run as root: apt-get install $*"
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update -qq >&2
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$@" >/dev/null
}

# Print the first Python that is new enough. A name alone proves nothing: it may be the shim of a version manager.
find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# Print the Debian packages that are missing for building with, and running under, the interpreter $1.
missing_packages() {
    local python=$1 version include cc
    version=$("$python" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}")')
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    cc=${CC:-$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("CC") or "gcc")')}

    # shellcheck disable=SC2086  # CC may carry options
    printf '#include <linux/landlock.h>\n#include <stdio.h>\n' | $cc -fsyntax-only -x c - 2>/dev/null || echo gcc libc6-dev
    [[ -e $include/Python.h ]] || echo "$version-dev"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$version-venv"
    "$python" -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")' 2>/dev/null || echo libseccomp2
    # Without root, subordinate ids are mapped by newuidmap; tests run as such a user, too.
    command -v newuidmap >/dev/null || echo uidmap
}

# What an installation depends on; modules and policies are used from the tree and need no new one.
fingerprint() {
    (
        cd -- "$TREE" || exit
        "$VENV/bin/python" -VV
        echo "${CC:-}"
        find pyproject.toml setup.py native -type f -not -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum
    ) | sha256sum
}

is_current() {
    local built
    for built in _native.abi3.so inside/_cell.abi3.so inside/nursery; do
        [[ -e $TREE/sandboxd/$built ]] || return 1
    done
    [[ -e $VENV/.sandboxd-$1 && $(<"$VENV/.sandboxd-$1") == "$(fingerprint)" ]]
}

# Refuse a $VENV in a place that a sandbox has for itself: no interpreter there can be shown in one (_NEVER_BELOW in
# sandboxd/rootfs/plan.py).
check_place() {
    local spelled real place
    spelled=$(realpath --canonicalize-missing --no-symlinks -- "$VENV")
    real=$(realpath --canonicalize-missing -- "$VENV")
    for place in /code /dev /etc /proc /run /sandboxd /sys /tmp /var/run /var/tmp /workspace; do
        [[ $spelled/ != "$place"/* && $real/ != "$place"/* ]] ||
            fail "no sandbox can use an environment in $place: have it made elsewhere, with SANDBOXD_VENV=/path $0"
    done
}

# Make $VENV hold sandboxd, from this tree, with the extra $1 of pyproject.toml.
setup_environment() {
    local extra=$1 python missing
    check_place
    if ! "$VENV/bin/python" -c '' 2>/dev/null; then
        python=$(find_python) || {
            install_packages python3
            python=$(find_python) || fail "Python 3.11 or later is needed, and this system's packages have none"
        }
        mapfile -t missing < <(missing_packages "$python" | tr ' ' '\n')
        ((${#missing[@]} == 0)) || install_packages "${missing[@]}"
        say "Making a virtual environment in $VENV"
        "$python" -m venv --clear "$VENV"
    fi
    is_current "$extra" && return

    mapfile -t missing < <(missing_packages "$VENV/bin/python" | tr ' ' '\n')
    ((${#missing[@]} == 0)) || install_packages "${missing[@]}"
    say "Installing sandboxd[$extra] into $VENV"
    "$VENV/bin/python" -c 'import pip' 2>/dev/null || "$VENV/bin/python" -m ensurepip >&2
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable "${TREE}[$extra]"
    # pip compiles what it installs, but not a tree that is used in place.
    "$VENV/bin/python" -m compileall -q "$TREE/sandboxd"
    fingerprint >"$VENV/.sandboxd-$extra"
}
