#!/bin/sh
# Install vmmonitor as a service, in the directory that this file is in, or in --prefix.
# This finds out what is missing and installs it, and looks who could change what root is about to
# run; the rest is done by `vmmonitor.py --setup`, as a whole or not at all.
set -eu
umask 022
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin      # which Debian's `su` leaves out

SOURCE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
FILES='vmmonitor.py vmmonitor.service config.json.sample install.sh'

HERE=$SOURCE        # where the service runs
ACCOUNT=''          # who it runs as; empty: who it runs as now, or vmmonitor
PORT=''
MACHINES=''         # yes, no, or empty: as it is now
PACKAGES=yes
ACTION=install
PURGE=''

usage() {
    cat <<USAGE
usage: sudo ./install.sh [OPTION...]    install or upgrade, and start the service
       sudo ./install.sh --uninstall [--purge]

  --prefix DIR          copy the program to DIR and install it there (default: $SOURCE)
  --user NAME           run the service as NAME, which is made if there is none (default: vmmonitor)
  --port N              have the config.json that is made listen on N, from 1024 to 65535
                        (default: 10000)
  --with-machines       let the service start machines made with the library: it becomes root
  --without-machines    take that back
  --no-packages         install no packages; say what is missing
  --uninstall           remove the service, its user, and what --prefix copied; config.json,
                        certificate and keys stay
  --purge               with --uninstall: remove config.json, certificate and key, too, if they
                        were made here. Disks, guests and machines always stay

examples:
  sudo ./install.sh --prefix /opt/vmmonitor
  sudo ./install.sh --prefix /opt/vmmonitor --port 8443 --no-packages
  sudo /opt/vmmonitor/install.sh --with-machines
  sudo /opt/vmmonitor/install.sh --uninstall
USAGE
}

say() { printf '%s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
wrong() { printf 'install.sh: %s; see --help\n' "$*" >&2; exit 2; }

# --- the command line ------------------------------------------------------------------------

read_options() {
    while [ $# -gt 0 ]; do
        case $1 in
            --prefix=* | --user=* | --port=*)
                option=${1%%=*} value=${1#*=}
                shift
                set -- "$option" "$value" "$@" ;;
        esac
        case $1 in
            --prefix | --user | --port)
                [ $# -gt 1 ] || wrong "$1 needs a value"
                read_value "$1" "$2"
                shift ;;
            --with-machines) MACHINES=yes ;;
            --without-machines) MACHINES=no ;;
            --no-packages) PACKAGES=no ;;
            --uninstall) ACTION=uninstall ;;
            --purge) PURGE=yes ;;
            -h | --help) usage; exit 0 ;;
            *) wrong "$1: unknown" ;;
        esac
        shift
    done
    [ -z "$PURGE" ] || [ "$ACTION" = uninstall ] || wrong '--purge goes with --uninstall'
}

read_value() {  # read_value OPTION VALUE: what is let through here may stand in a command
    case $1 in
        --prefix) check_path "$2"; HERE=$(readlink -f "$2" || echo "${2%/}") ;;
        --user)
            case $2 in
                '' | [!a-z_]* | *[!a-z0-9_-]* | ????????????????????????????????*)
                    wrong "--user $2: use at most 31 of a-z, 0-9, _ and -" ;;
                root) wrong '--user root: what needs root is --with-machines' ;;
            esac
            ACCOUNT=$2 ;;
        --port)
            case $2 in
                '' | 0* | *[!0-9]* | ??????*) wrong "--port $2: use 1024 to 65535" ;;
            esac
            if [ "$2" -lt 1024 ] || [ "$2" -gt 65535 ]; then
                wrong "--port $2: use 1024 to 65535"
            fi
            PORT=$2 ;;
    esac
}

check_path() {
    case $1 in
        /*/../* | /*/.. | /../* | /.. | *//* | / | [!/]* | '')
            wrong "$1: use an absolute path without .., such as /opt/vmmonitor" ;;
        *[!A-Za-z0-9/._+-]*)
            wrong "$1: use a path without spaces or special characters, such as /opt/vmmonitor" ;;
        /tmp/* | /var/tmp/*)
            wrong "$1: the service has a /tmp of its own and would not see it; say" \
                '--prefix /opt/vmmonitor' ;;
    esac
}

# --- who could change it ---------------------------------------------------------------------

# check_owners DIRECTORY UID ELSE: it, what is read from it, and the way to each; ELSE is what to do
# where the owner shall stay
check_owners() {
    OPEN='' THEIRS=''
    for name in $FILES config.json cert.pem key.pem .installed __pycache__; do
        [ ! -e "$1/$name" ] || check_owner "$1/$name" "$2"
        [ ! -L "$1/$name" ] || check_way "$(readlink -f "$1/$name")" "$2"
    done
    path=$1
    while [ ! -e "$path" ]; do
        path=$(dirname "$path")
    done
    check_owner "$path" "$2"
    check_way "$path" "$2"
    [ -z "$OPEN" ] || die "${OPEN# }: others can write to it, and root would run what they put" \
        "there; do: chmod go-w$OPEN"
    [ -z "$THEIRS" ] || die "${THEIRS# }: $WHO could change what root runs; do: chown" \
        "root:root$THEIRS, or $3"
}

check_way() {           # check_way PATH UID: the directories above it
    path=$1
    while [ "$path" != / ]; do
        path=$(dirname "$path")
        check_owner "$path" "$2" way
    done
}

check_owner() {         # check_owner PATH UID [way]: note who but root and UID can change it
    # Of a sticky one on the way, as /tmp, only its owner can rename what is ours.
    case $(stat -L -c %a "$1")$([ ! -k "$1" ] || echo "${3:-}") in
        *way) ;;
        *[2367]? | *[2367]) OPEN="$OPEN $1" ;;
    esac
    owner=$(stat -L -c %u "$1")
    if [ "$owner" != 0 ] && [ "$owner" != "$2" ]; then
        THEIRS="$THEIRS $1" WHO=$(stat -L -c %U "$1")
    fi
}

# --- packages --------------------------------------------------------------------------------

# Who installs it, what is needed, and the packages that have it; the last row that fits counts.
TABLE='
any      python    python3
pacman   python    python
any      openssl   openssl
any      curl      curl
any      users     shadow
apt-get  users     passwd
dnf      users     shadow-utils
any      runuser   util-linux
apk      runuser   runuser
apt-get  libvirt   libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients QEMU qemu-utils
dnf      libvirt   libvirt-daemon-kvm libvirt-client
zypper   libvirt   libvirt-daemon-qemu libvirt-client qemu-tools
pacman   libvirt   libvirt qemu-base
apk      libvirt   libvirt-daemon libvirt-qemu libvirt-client qemu-system-x86_64 qemu-img
apt-get  machines  iproute2 util-linux QEMU qemu-utils
dnf      machines  iproute iproute-tc util-linux qemu-kvm qemu-img
zypper   machines  iproute2 util-linux qemu-x86 qemu-tools
pacman   machines  iproute2 util-linux qemu-base
apk      machines  iproute2 setpriv qemu-system-x86_64 qemu-img
'
MANAGERS='apt-get dnf zypper pacman apk'
# How each installs without a question.
apt_get_install() {
    apt-get -qq update || :         # an old list may do
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 install -y \
        --no-install-recommends "$@"
}
dnf_install() { dnf -q -y install "$@"; }
zypper_install() { zypper -q -n install --no-recommends "$@"; }
pacman_install() { pacman -S --noconfirm --needed "$@"; }
apk_install() { apk add -q "$@"; }

by_hand() {             # by_hand MANAGER: what to type before the packages
    case $1 in
        pacman) echo 'pacman -S' ;;
        apk) echo 'apk add' ;;
        *) echo "$1 install" ;;
    esac
}

has() { command -v "$1" >/dev/null 2>&1; }

missing() {     # print what of the table's first column is not there
    has python3 || echo python
    has openssl || echo openssl
    has curl || echo curl
    has useradd || echo users
    has runuser || echo runuser
    { has libvirtd || has virtqemud; } && getent group libvirt >/dev/null || echo libvirt
    [ "$MACHINES" != yes ] || { has ip && has tc && has setpriv && has qemu-img; } || echo machines
}

packages_for() {        # packages_for MANAGER WHAT...
    printf '%s' "$TABLE" | awk -v manager="$1" -v wanted="$*" -v qemu="$(qemu_package)" '
        $1 == "any" || $1 == manager { row = $0; sub(/^[^ ]+ +[^ ]+ +/, "", row); found[$2] = row }
        END {
            count = split(wanted, what, " ")
            for (i = 2; i <= count; i++) line = line " " found[what[i]]
            gsub("QEMU", qemu, line)
            print substr(line, 2) }'
}

qemu_package() {        # Debian's, which has one for each architecture
    case $(uname -m) in
        x86_64 | i?86) echo qemu-system-x86 ;;
        aarch64 | arm*) echo qemu-system-arm ;;
        ppc*) echo qemu-system-ppc ;;
        *) echo qemu-system-misc ;;
    esac
}

# shellcheck disable=SC2046,SC2086      # these are lists of words
install_packages() {
    lacking=$(missing | tr '\n' ' ')
    [ -n "$lacking" ] || return 0
    for manager in $MANAGERS none; do
        ! has "$manager" || break
    done
    [ "$manager" != none ] || die "not here: $lacking; and none of $MANAGERS is here to install" \
        "it: do that by hand and run this again"
    packages=$(packages_for "$manager" $lacking)
    [ "$PACKAGES" = yes ] || die "something is missing; install it:" \
        "$(by_hand "$manager") $packages"
    say "installing $packages"
    if ! shown=$("$(echo "$manager" | tr - _)_install" $packages 2>&1 </dev/null 9>&-); then
        why=$({ say "$shown" | grep -i -E '^E:|error|unable|not found' || say "$shown" | tail -n 1
            } | head -n 1)
        die "$manager could not install $packages: ${why:-no reason given}; install it by hand" \
            "and run this again"
    fi
    lacking=$(missing | tr '\n' ' ')
    [ -z "$lacking" ] || die "still missing after that: $lacking"
}

# --- all of it -------------------------------------------------------------------------------

read_options "$@"
[ "$(id -u)" = 0 ] || die "must run as root: sudo $0 $*"
check_path "$HERE"
for file in $FILES; do
    [ -r "$SOURCE/$file" ] || die "$SOURCE/$file is missing; copy all files of vmmonitor here"
done
# A user's own directory is as good as the sudo that they ran this by.
check_owners "$SOURCE" "${SUDO_UID:-0}" 'copy all files of vmmonitor to /root and run it there'
check_owners "$HERE" 0 'say --prefix /opt/vmmonitor'
exec 9>/run/vmmonitor-install.lock
if has flock; then
    flock -n 9 || die 'another one is at work; wait for its end and run this again'
fi
[ "$ACTION" = uninstall ] || install_packages
python3 -I -c 'import sys; sys.exit(sys.version_info < (3, 9))' \
    || die "$(python3 --version) is too old; install Python 3.9 or later as python3"
# The last program that is run: a signal reaches it, and it takes back what it has done.
exec python3 -I -B "$SOURCE/vmmonitor.py" --setup "action=$ACTION" "source=$SOURCE" "here=$HERE" \
    "account=$ACCOUNT" "port=$PORT" "machines=$MACHINES" "purge=$PURGE"
