# Sourced by run.sh and test.sh: makes the environment in .venv (or $VENV) the first time, and again when what it must
# hold has changed. Afterwards $python is the interpreter to use.
# usage: make_environment EXTRAS [CONSTRAINTS]   (extras of pyproject.toml, such as "train,export"; a file for pip)

die() { printf '%s\n' "$*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

make_environment() {
    local extras=$1 constraints=${2:-/dev/null} root=$PWD venv=${VENV:-$PWD/.venv} base wanted stamp
    python=$venv/bin/python
    stamp=$venv/installed-$extras
    wanted=$(cat "$constraints" "$root/pyproject.toml" "$root/setup.py" "$root"/src/efficient_densenet/ops/cpu/*.{cpp,h} | cksum)
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -x "$python" ]; then
        base=$(find_python) || die "Python 3.11 or newer is needed; set PYTHON to one, as in: PYTHON=/path/to/python3.12 $0"
        echo "Making the environment $venv (once)"
        "$base" -m venv "$venv" || {
            rm -rf "$venv"
            die "Python could not make an environment; on Debian and Ubuntu install its package: apt install python3-venv"
        }
    fi
    echo "Installing efficient-densenet[$extras] into it; PyTorch is large, so this takes a few minutes"
    "$python" -m pip install --quiet --constraint "$constraints" --editable "$root[$extras]" ||
        die "the installation failed; see the messages above, and run the command again once they are mended"
    printf '%s\n' "$wanted" >"$stamp"
}
