#!/bin/bash
# First steps with Shifter on this machine: a real Debian 12 image, made from the distribution's own packages, and an
# ordinary user who runs commands in it. `make demo` installs Shifter and calls this; `make demo-clean` undoes it.
# It may be run again at any time.
set -euo pipefail
cd "$(dirname "$0")/.."

PREFIX=${PREFIX:-/opt/shifter}
CONF=${CONF:-/etc/shifter/udiRoot.conf}
CACHE=build/demo
TAR=$CACHE/debian-12.tar
TAG=docker:debian:12
DEMO_USER=shifterdemo
MADE_USER=$CACHE/made-user       # there: the user is ours to remove
SCRIPT_DIR=/var/tmp/shifter-demo
export PATH=$PREFIX/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
umask 022

if [[ -t 1 ]]; then bold=$'\e[1m' plain=$'\e[0m'; else bold='' plain=''; fi
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
die() { echo "demo: $*" >&2; exit 1; }
[[ $(id -u) == 0 ]] || die "as root, please: it installs Shifter and may create a user"

if [[ ${1:-} == --clean ]]; then
    if [[ -x $PREFIX/bin/shifterctl ]]; then
        "$PREFIX/bin/shifterctl" gc --all || true
        if "$PREFIX/bin/shifterimg" lookup "$TAG" >/dev/null 2>&1; then "$PREFIX/bin/shifterimg" rm "$TAG"; fi
        store=$(sed -n 's/^[[:space:]]*imagePath[[:space:]]*=[[:space:]]*//p' "$CONF" 2>/dev/null | tail -1)
        [[ -z $store ]] || find "$store" -mindepth 1 -type d -empty -delete 2>/dev/null || true
    fi
    if [[ -e $MADE_USER ]] && id "$DEMO_USER" >/dev/null 2>&1; then userdel -r "$DEMO_USER" 2>/dev/null || userdel "$DEMO_USER"; fi
    rm -rf "$SCRIPT_DIR" "$CACHE"
    # The configuration goes only if nobody changed it since the installation.
    if cmp -s "$CONF" "$CONF.example"; then rm -f "$CONF"; fi
    echo "demo: removed its image, user and files"
    exit 0
fi

# --- the image: every file comes from a Debian package -----------------------------------------------------------------
mkdir -p "$CACHE"
if [[ ! -e $TAR ]]; then
    say "Making a Debian 12 root file system from packages (once; about a minute)"
    options=(--variant=minbase --include=python3-minimal,procps,hostname)
    # The machine's own mirror, proxy and other settings of apt, so that it works wherever apt-get does.
    while IFS= read -r line; do options+=(--aptopt="$line"); done < <(apt-config dump | grep -E '^Acquire::(http|https|ftp|Retries|Check)' || true)
    sources=()
    if grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release; then
        for file in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do [[ -s $file ]] && sources+=("$file"); done
    fi
    mmdebstrap "${options[@]}" bookworm "$TAR.new" "${sources[@]}" >"$CACHE/mmdebstrap.log" 2>&1 </dev/null ||
        { tail -20 "$CACHE/mmdebstrap.log" >&2; die "mmdebstrap failed (all it said: $CACHE/mmdebstrap.log)"; }
    mv -f "$TAR.new" "$TAR"
fi
say "\$ shifterimg import $(basename "$TAR") $TAG"
if ! shifterimg lookup "$TAG" >/dev/null 2>&1 || [[ $TAR -nt $CACHE/imported ]]; then
    shifterimg import "$TAR" "$TAG"
    touch "$CACHE/imported"
else
    echo "already there: $(shifterimg lookup "$TAG")"
fi

# --- the user ------------------------------------------------------------------------------------------------------------
user=${SUDO_USER:-}
if [[ -z $user || $user == root ]] || ! id "$user" >/dev/null 2>&1; then
    user=$DEMO_USER
    if ! id "$user" >/dev/null 2>&1; then
        useradd --create-home --shell /bin/bash --comment "Shifter demonstration" "$user"
        touch "$MADE_USER"
    fi
fi
home=$(getent passwd "$user" | cut -d: -f6)

# Run a command as that user, in a login's environment and with no privilege of ours.
as_user() {
    setpriv --reuid "$user" --regid "$(id -g "$user")" --init-groups --reset-env -- \
        env -C "$( [[ -d $home ]] && echo "$home" || echo / )" PATH="$PREFIX/bin:/usr/local/bin:/usr/bin:/bin" LC_ALL=C.UTF-8 "$@"
}
show() { say "$user\$ $*"; as_user "$@"; }

# Milliseconds that a command takes, as that user sees it: started and timed by one process, N times; the median.
timed() {
    local n=$1; shift
    as_user "$BASH" -c '
        set -o pipefail; n=$1; shift
        for ((i = 0; i < n; i++)); do
            a=${EPOCHREALTIME/./}; "$@" >/dev/null || exit 1; b=${EPOCHREALTIME/./}; echo $((b - a))
        done | sort -n | awk "{ t[NR] = \$1 } END { printf \"%.1f\", t[int((NR + 1) / 2)] / 1000 }"' timed "$n" "$@"
}

say "This machine is $(. /etc/os-release; echo "$PRETTY_NAME"), kernel $(uname -r). In the image, as $user:"
show shifter --image=debian:12 cat /etc/os-release
show shifter --image=debian:12 id
show shifter --image=debian:12 ls -la "$home"
show shifter --image=debian:12 python3 -c 'import sys; print("Python of the image:", sys.version.split()[0])'
show shifter --image=debian:12 --volume=/usr/share/doc:/data/new:ro ls -d /data/new/bash
show shifterctl plan -- --image=debian:12 --volume=/usr/share/doc:/data/new:ro | grep -v 'every UDI has it'

mkdir -p "$SCRIPT_DIR"
cat > "$SCRIPT_DIR/hello.sh" <<SCRIPT
#!$PREFIX/bin/shifter --image=debian:12 /bin/bash
echo "A script that runs in the image: \$(. /etc/os-release; echo "\$PRETTY_NAME"), host \$(hostname), user \$(id -un), arguments: \$*"
SCRIPT
chmod 755 "$SCRIPT_DIR/hello.sh"
say "$user\$ cat $SCRIPT_DIR/hello.sh"; cat "$SCRIPT_DIR/hello.sh"
show "$SCRIPT_DIR/hello.sh" one two

say "How long a launch takes (/bin/true, milliseconds)"
shifterctl gc --all >/dev/null
first=$(timed 1 shifter --image=debian:12 /bin/true)
again=$(timed 50 shifter --image=debian:12 /bin/true)
native=$(timed 50 /bin/true)
printf '  first, image not mounted yet   %7s\n' "$first"
printf '  every further one (median)     %7s\n' "$again"
printf '  /bin/true without Shifter      %7s\n' "$native"

say "What to try next"
cat <<NEXT
  su -P - $user -c '$PREFIX/bin/shifter --image=debian:12 /bin/bash'
                                   a shell in the image
  export PATH=$PREFIX/bin:\$PATH   the commands are there; then, as $user:
  bash docs/demo-volumes.sh        volumes, and what is refused (as $user)
  shifterctl ps                    the prepared images of this node
  shifterimg images                the image store
  shifterimg import SOURCE docker:NAME:TAG
                                   another image: directory, tar, OCI or docker archive (as root)
  man -M $PREFIX/share/man shifter   the manual; udiRoot.conf(5) is about $CONF
  make demo-clean                  takes all of this away again
NEXT
