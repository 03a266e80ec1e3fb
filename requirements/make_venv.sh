#!/bin/sh
# Makes a virtual environment, installing what a bare Debian or Ubuntu lacks for it.
#   make_venv.sh PYTHON DIRECTORY
set -eu
python=$1 directory=$2

install() {
  echo "installing $* (needs root)" >&2
  if [ "$(id -u)" = 0 ]; then run=""; else run=sudo; fi
  $run apt-get update -qq && $run apt-get install -y -qq "$@"
}

command -v "$python" >/dev/null || {
  install python3.11 python3.11-venv || {
    echo "error: '$python' is not there and could not be installed; set PYTHON to a Python 3.11 or newer" >&2
    exit 1
  }
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) found, Python 3.11 or newer is needed; set PYTHON" >&2
  exit 1
}
# Debian splits ensurepip off into a package of its own.
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  install "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
[ -x "$directory/bin/python" ] || "$python" -m venv "$directory"
