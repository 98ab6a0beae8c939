#!/usr/bin/env bash
# Install the peers that `sandboxd bench` measures beside ours, and say what is there: programs from Debian, sandlock from
# PyPI into an environment of its own ($SANDBOXD_PEERS, else the cache directory; `sandboxd bench` looks there too).
#
#   scripts/peers.sh           install and show
#   scripts/peers.sh --show    only show
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

PEERS=${SANDBOXD_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/sandboxd/peers}
declare -A PACKAGES=([bwrap]=bubblewrap [firejail]=firejail [crun]=crun [runsc]=runsc [nsjail]=nsjail)
ORDER=(bwrap firejail crun runsc nsjail)

# Of the packages that are missing, those that this release of Debian has: nsjail is not in every one.
install_missing() {
    local name wanted=()
    for name in "${ORDER[@]}"; do
        command -v "$name" >/dev/null && continue
        if [[ -n $(apt-cache --quiet=2 show "${PACKAGES[$name]}" 2>/dev/null) ]]; then
            wanted+=("${PACKAGES[$name]}")
        else
            say "This system's packages have no ${PACKAGES[$name]}."
        fi
    done
    ((${#wanted[@]} == 0)) || install_packages "${wanted[@]}"
}

install_sandlock() {
    local python
    "$PEERS/bin/python" -c 'import sandlock' 2>/dev/null && return
    if ! "$PEERS/bin/python" -m pip --version >/dev/null 2>&1; then
        # The interpreter of our own environment where there is one: its packages serve sandlock's clones as well.
        python=$VENV/bin/python
        [[ -x $python ]] || python=$(find_python) || fail "Python 3.11 or later is needed"
        "$python" -m venv --clear "$PEERS"
    fi
    say "Installing sandlock into $PEERS"
    "$PEERS/bin/python" -m pip install --quiet --disable-pip-version-check sandlock ||
        say "sandlock could not be installed."
}

show() {
    local name version
    for name in "${ORDER[@]}"; do
        if command -v "$name" >/dev/null; then
            version=$({ "$name" --version 2>/dev/null || true; } | head -n 1)
            printf '%-9s %s\n' "$name" "${version:-$(command -v "$name")}"
        else
            printf '%-9s not found\n' "$name"
        fi
    done
    version=$("$PEERS/bin/python" -c 'from importlib.metadata import version; print(version("sandlock"))' 2>/dev/null) ||
        version="not found"
    printf '%-9s %s\n' sandlock "$version"
}

case ${1:-} in
--show) show ;;
"")
    if command -v apt-get >/dev/null; then
        install_missing
    else
        say "Not Debian: install what you want to compare with by hand."
    fi
    install_sandlock
    show
    ;;
*) fail "unknown argument $1; see the head of this file" ;;
esac
