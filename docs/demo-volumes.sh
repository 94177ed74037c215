#!/bin/bash
# Volumes, for an ordinary user: files and directories, mount points that are made, where a path is looked for, what is
# refused and why, and the plan of it all. After `make demo`:
#     su -P - shifterdemo -c 'bash docs/demo-volumes.sh'         (give the script's full path)
# It works in a directory of its own below $HOME, and removes it at the end.
set -uo pipefail
export PATH=${PREFIX:-/opt/shifter}/bin:$PATH SHIFTER_IMAGE=${SHIFTER_IMAGE:-docker:debian:12}
[[ $(id -u) != 0 ]] || { echo "demo: as an ordinary user, please" >&2; exit 1; }
work=$(mktemp -d "$HOME/volumes.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
mkdir data 'with: blank'; echo "a line" > data/file; echo "127.0.0.1 demo" > one-file; echo odd > 'with: blank/file'

show() { printf '\n$ %s\n' "${*@Q}"; "$@"; }

echo "A directory, and a file on a file of the image; what the image lacks is made, for you alone:"
show shifter --volume="$work/data:/usr/share/demo/deep/inside" ls -l /usr/share/demo/deep/inside
show shifter --volume="$work/one-file:/usr/share/common-licenses/BSD:ro" cat /usr/share/common-licenses/BSD

echo; echo "In a directory of the node the mount point is really made, with your rights:"
show shifter --volume="$work/data:$work/made/here" cat "$work/made/here/file"
show ls -ld made/here

echo; echo "Odd names:"
show shifter --volume="$work/with\\: blank:/odd" cat /odd/file

echo; echo "What is refused, and why:"
show shifter --volume=/etc:/etc true
show shifter --volume="$work/missing:/x" true
show shifter --volume=/usr/share/common-licenses/BSD-not-here:/x true
show shifter --volume=/proc/self/root:/x true

echo; echo "What a launch would do, and why (--json for programs); -v shows the same while it is done, with times:"
show shifterctl plan -- --volume="$work/data:/data:ro" | grep -v 'every UDI has it'
