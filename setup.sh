#!/bin/sh
# Installs what corral needs by name and makes .venv. Running it again changes nothing and takes no time.
set -eu
cd "$(dirname "$0")"

# MORE_PACKAGES: what else is wanted of Debian, for CI say.
PACKAGES="libnftables1 nftables iproute2 busybox-static tmux dbus-daemon ${MORE_PACKAGES:-}"
STAMP=.venv/.setup-done
want=$({ cat pyproject.toml setup.sh; echo "$PACKAGES"; } | sha256sum)
if [ -e "$STAMP" ] && [ "$(cat "$STAMP")" = "$want" ] && [ -x .venv/bin/corral ]; then
    exit 0
fi

say() { echo "setup: $*"; }

# A python >= 3.12 by name: `python3` may be an older one, and a shim may exist for a version that is not there.
usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }
find_python() {
    for name in ${PYTHON:-} /usr/bin/python3 python3 /usr/bin/python3.14 /usr/bin/python3.13 /usr/bin/python3.12 \
        python3.14 python3.13 python3.12; do
        if usable "$name"; then
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

apt_install() {
    missing=""
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "install ok installed" || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    if ! command -v apt-get >/dev/null; then
        say "please install$missing (or their like) with this system's package manager" >&2
        return 0
    fi
    say "installing Debian packages:$missing"
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null 2>&1 || {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null
    }
}

python=$(find_python) || { apt_install python3 && python=$(find_python); } || {
    say "no Python >= 3.12 found; install one and name it: PYTHON=/path/to/python3.12 make setup" >&2
    exit 1
}
"$python" -c 'import ensurepip' 2>/dev/null || apt_install "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')"
# Meanwhile Python's packages can come.
# shellcheck disable=SC2086
apt_install $PACKAGES &
debian=$!

# A venv whose interpreter is gone or too old is made anew.
usable .venv/bin/python || rm -rf .venv
if [ ! -x .venv/bin/python ]; then
    say "making .venv with $python"
    "$python" -m venv .venv
fi
say "installing Python packages"
.venv/bin/python -m pip install --help | grep -e --group >/dev/null ||
    .venv/bin/python -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
.venv/bin/python -m pip install -q --disable-pip-version-check --group dev --editable .
# corral-oci is started once per command: the installer's own script, and loading modules one by one, would take thrice as long.
.venv/bin/python -m corral.runtime.launcher .venv/bin/corral-oci
.venv/bin/python -m corral.cli.launcher .venv/bin/corral
# Compiled now rather than at the first start of each command.
.venv/bin/python -m compileall -q protos shim services cli >/dev/null || true
wait "$debian"
echo "$want" >"$STAMP"
say "done: .venv/bin/corral, .venv/bin/corrald, .venv/bin/corral-oci"
