#!/bin/sh
# Install vmmonitor as a service, in the directory that this file is in, or in --prefix.
# Running it again is harmless: what is there stays as it is. Whatever is about to be changed is
# noted by keep() and later() first, and undo() takes it all back if this does not come to its end.
set -eu
umask 022

NAME=vmmonitor
UNIT=/etc/systemd/system/$NAME.service
DROPIN=$UNIT.d/machines.conf
SOURCE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
FILES='vmmonitor.py vmmonitor.service config.json.sample install.sh'
COMMENT='vmmonitor service'     # in the account of a user that this file made

HERE=$SOURCE        # where the service runs
ACCOUNT=''          # who it runs as; empty: who it runs as now, or vmmonitor
PORT=''
MACHINES=''         # yes, no, or empty: as it is now
PACKAGES=yes
ACTION=install
PURGE=no
PYTHON=python3      # then the path of the one that the user can run, too

INSTALLED=''        # packages, by this run
SAVED=''            # a directory of what was there before
UNDO=''             # commands, the last one first, that bring it back
SYSTEMD=no
if [ -d /run/systemd/system ]; then
    SYSTEMD=yes
fi

usage() {
    cat <<USAGE
usage: sudo ./install.sh [OPTION...]    install or upgrade, and start the service
       sudo ./install.sh --uninstall [--purge]

  --prefix DIR          copy the program to DIR and install it there (default: $SOURCE)
  --user NAME           run the service as NAME, which is made if there is none (default: $NAME)
  --port N              listen on N, from 1024 to 65535 (default: 10000)
  --with-machines       let the service start machines made with the library: it becomes root
  --without-machines    take that back
  --no-packages         install no packages; say what is missing
  --uninstall           remove the service, its user, and what --prefix copied; config.json,
                        certificate and keys stay
  --purge               with --uninstall: remove config.json, certificate and key, too. Disks,
                        guests and machines always stay

examples:
  sudo ./install.sh --prefix /opt/vmmonitor
  sudo ./install.sh --prefix /opt/vmmonitor --port 8443 --no-packages
  sudo /opt/vmmonitor/install.sh --with-machines
  sudo /opt/vmmonitor/install.sh --uninstall
USAGE
}

say() { printf '%s\n' "$*"; }

die() {         # one line; what was changed comes back by undo()
    printf 'install.sh: %s\n' "$*${INSTALLED:+ (these packages stay:$INSTALLED)}" >&2
    exit 1
}

wrong() { printf 'install.sh: %s; see --help\n' "$*" >&2; exit 2; }

# --- taking back -----------------------------------------------------------------------------

later() {       # later COMMAND: what undoes the next step. Names in it are checked, or quoted.
    UNDO="$1
$UNDO"
}

quote() { printf '%s\n' "$1" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/"; }

keep() {        # keep FILE...: each comes back as it is now, or goes if there is none
    for file in "$@"; do
        if [ -e "$file" ] || [ -L "$file" ]; then
            copy=$(mktemp -u "$SAVED/XXXXXXXX")
            cp -a "$file" "$copy"
            later "mv -f '$copy' $(quote "$file")"
        else
            later "rm -f $(quote "$file")"
        fi
    done
}

undo() {        # at every exit
    status=$?
    trap '' HUP INT PIPE TERM
    set +e
    if [ "$status" != 0 ]; then
        eval "$UNDO" >/dev/null 2>&1
    fi
    [ -z "$SAVED" ] || rm -rf "$SAVED"
    exit "$status"
}

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
    [ "$PURGE" = no ] || [ "$ACTION" = uninstall ] || wrong '--purge goes with --uninstall'
}

read_value() {  # read_value OPTION VALUE: what is let through here may stand in a command
    case $1 in
        --prefix) check_path "$2"; HERE=${2%/} ;;
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
    [ "$PACKAGES" = yes ] || die "something is missing; install it: $manager install $packages"
    say "installing $packages"
    log=$(mktemp)
    if ! "$(echo "$manager" | tr - _)_install" $packages >"$log" 2>&1 </dev/null; then
        why=$(grep -i -E '^E:|error|unable' "$log" | head -n 1)
        rm -f "$log"
        die "$manager could not install $packages: ${why:-no reason given}; install it by hand" \
            "and run this again"
    fi
    rm -f "$log"
    INSTALLED=" $packages"
    lacking=$(missing | tr '\n' ' ')
    [ -z "$lacking" ] || die "still missing after that: $lacking"
}

# --- what is there ---------------------------------------------------------------------------

RUN='import sys; sys.path.insert(0, sys.argv[1]); exec(sys.stdin.read())'
python() {      # python HERE [ARGUMENT...]: run the program on stdin, beside vmmonitor.py
    "$PYTHON" -I -B -c "$RUN" "$@"
}

as_user() { runuser -u "$ACCOUNT" -- "$@"; }

unit_says() {   # unit_says KEY: the value in the unit that is installed
    [ ! -e "$UNIT" ] || sed -n "s|^$1=||p" "$UNIT" | head -n 1
}

where_it_runs() { unit_says ExecStart | sed -n 's|^.* \(/.*\)/vmmonitor\.py$|\1|p'; }

check_source() {
    for file in $FILES; do
        [ -r "$SOURCE/$file" ] || die "$SOURCE/$file is missing; copy all files of vmmonitor here"
    done
}

check_programs() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' \
        || die "$(python3 --version) is too old; install Python 3.9 or later as python3"
    problem=$(python "$SOURCE" 2>&1 <<'PYTHON'
import vmmonitor
try:
    vmmonitor.Library.get()
except vmmonitor.Error as problem:
    print(vmmonitor.explain(problem))
PYTHON
    ) || :
    [ -z "$problem" ] || die "$(say "$problem" | tail -n 1)"
}

# Sets CERTIFICATE to make or keep; a config that can't be used ends it all before it began.
check_config() {
    CERTIFICATE=$(python "$SOURCE" "$HERE" 2>&1 <<'PYTHON'
import os
import vmmonitor
here = sys.argv[2]
path = os.path.join(here, 'config.json')
own = [os.path.join(here, name) for name in ('cert.pem', 'key.pem')]
pair, problems = own, []
if os.path.lexists(path):
    try:
        vmmonitor.load(path)
    except vmmonitor.ConfigError as problem:
        problems = [f'{path}: {line}' for line in problem.problems]
    text = open(path, encoding='utf-8', errors='replace').read() if os.path.exists(path) else ''
    values, wrong = vmmonitor.parse(text, path)
    config = vmmonitor.Config(**values)
    names = [config.certificate, config.certificate_key or config.certificate]
    pair = [vmmonitor.beside(config, name) for name in names]
    pair = pair if config.listener_enabled and config.certificate and not wrong else []
missing = [name for name in pair if not os.path.exists(name)]
make = missing == own
if make:
    problems = [line for line in problems if ': listener.certificate:' not in line]
elif missing and missing != pair:
    there = next(name for name in pair if name not in missing)
    remove = f', or remove {there} to have both made' if pair == own else ''
    problems = [f'{there} is there, but {missing[0]} is not; put it back{remove}']
print('; '.join(problems) or ('make' if make else 'keep'))
PYTHON
    ) || die "$(printf '%s' "$CERTIFICATE" | tail -n 1)"
    case $CERTIFICATE in
        make | keep) ;;
        *) die "$CERTIFICATE; mend it and run this again" ;;
    esac
}

# --- libvirt ---------------------------------------------------------------------------------

libvirt_answers() {     # or is not on this host, or can't be told yet
    timeout 30 python3 -I -B -c "$RUN" "$SOURCE" "$HERE" >/dev/null 2>&1 <<'PYTHON'
import os
import vmmonitor
path = os.path.join(sys.argv[2], 'config.json')
config = vmmonitor.load(path, ('monitor',)) if os.path.exists(path) else vmmonitor.Config()
if config.libvirt_uri.startswith('qemu:///'):
    vmmonitor.Connection(config.libvirt_uri).close()
PYTHON
}

start_libvirt() {
    ! libvirt_answers || return 0
    for daemon in libvirtd virtqemud; do
        if start_daemon "$daemon"; then
            say "started $daemon"
            break
        fi
    done
    tries=0
    until libvirt_answers; do
        tries=$((tries + 1))
        [ "$tries" -lt 10 ] || die "libvirt does not answer; start libvirtd or virtqemud, see to" \
            "it that \"virsh -c qemu:///system list\" works, and run this again"
        sleep 1
    done
}

start_daemon() {        # start_daemon NAME, and have it started at boot
    if [ "$SYSTEMD" = yes ]; then
        systemctl cat "$1.service" >/dev/null 2>&1 || return 1
        if ! systemctl is-enabled --quiet "$1.service" 2>/dev/null; then
            later "systemctl disable $1.service"
        fi
        later "systemctl stop $1.socket $1-ro.socket $1-admin.socket $1.service"
        systemctl enable --quiet --now "$1.service" 2>/dev/null
    elif has rc-service; then
        rc-service --exists "$1" || return 1
        later "rc-service $1 stop"
        rc-service "$1" start >/dev/null 2>&1
    else
        has "$1" || return 1
        mkdir -p /run/libvirt
        if has virtlogd && [ ! -e /run/virtlogd.pid ]; then
            virtlogd -d >/dev/null 2>&1
            later "kill \$(cat /run/virtlogd.pid)"
        fi
        later "kill \$(cat /run/$1.pid)"
        libvirt_settings "$1" >"/run/libvirt/$NAME.conf"
        "$1" -d -f "/run/libvirt/$NAME.conf" >/dev/null 2>&1
    fi
}

# Its own settings, but for who may connect: there may be no D-Bus and no polkit to ask.
libvirt_settings() {
    sed '/^ *\(auth_unix_rw\|unix_sock_group\|unix_sock_rw_perms\)/d' "/etc/libvirt/$1.conf" \
        2>/dev/null || :
    printf '%s\n' 'auth_unix_rw = "none"' 'unix_sock_group = "libvirt"' 'unix_sock_rw_perms = "0770"'
}

# --- the directory and its user --------------------------------------------------------------

copy_files() {
    [ "$HERE" != "$SOURCE" ] || return 0
    if [ ! -d "$HERE" ]; then
        parent=$HERE
        while [ ! -d "$(dirname "$parent")" ]; do
            parent=$(dirname "$parent")
        done
        later "find '$parent' -depth -type d -exec rmdir {} +"
        mkdir -p "$HERE" || die "$HERE can't be made; choose another --prefix"
    fi
    for file in $FILES; do
        cmp -s "$SOURCE/$file" "$HERE/$file" || copy_file "$file"
    done
}

copy_file() {   # as a whole or not at all: the program may run
    keep "$HERE/$1" "$HERE/$1.new"
    cp "$SOURCE/$1" "$HERE/$1.new" || die "$HERE/$1 can't be written; make room there"
    case $1 in
        *.py | *.sh) chmod 0755 "$HERE/$1.new" ;;
        *) chmod 0644 "$HERE/$1.new" ;;
    esac
    mv -f "$HERE/$1.new" "$HERE/$1"
    record copied
}

# HERE/.installed tells --uninstall what else it has to take back: "copied", "joined" (libvirt).
record() {
    case " $RECORD " in
        *" $1 "*) ;;
        *) RECORD="$RECORD $1" ;;
    esac
}

write_record() {
    [ -n "$RECORD" ] || return 0
    say "${RECORD# }" >"$SAVED/put"
    put "$HERE/.installed"
}

make_user() {
    if ! getent passwd "$ACCOUNT" >/dev/null; then
        nologin=$(command -v nologin || echo /bin/false)
        group=--user-group
        if getent group "$ACCOUNT" >/dev/null; then
            group="--gid=$ACCOUNT"
        fi
        later "userdel $ACCOUNT"
        useradd --system "$group" --home-dir / --no-create-home --shell "$nologin" \
            --comment "$COMMENT" "$ACCOUNT" || die "the user $ACCOUNT could not be made; see above"
        say "made the user $ACCOUNT"
    fi
    [ "$(id -u "$ACCOUNT")" != 0 ] || die "the user $ACCOUNT is root; choose another --user"
    [ "$(id -gn "$ACCOUNT")" = "$ACCOUNT" ] || die "the group of $ACCOUNT is" \
        "$(id -gn "$ACCOUNT"), and others may be in it; choose a --user that does not exist yet"
    case " $(id -Gn "$ACCOUNT") " in
        *' libvirt '*) ;;
        *)
            later "gpasswd -d $ACCOUNT libvirt"
            usermod -a -G libvirt "$ACCOUNT"
            record joined ;;
    esac
    PYTHON=$(command -v python3)
    as_user "$PYTHON" -c '' 2>/dev/null || PYTHON=/usr/bin/python3      # one of root's own
    as_user "$PYTHON" -c '' || die "the user $ACCOUNT can't run $PYTHON; install python3 in /usr/bin"
    as_user test -r "$HERE/vmmonitor.py" || die "the user $ACCOUNT can't read" \
        "$HERE/vmmonitor.py; say --prefix /opt/vmmonitor, or open the path to it"
}

# The service must not be able to change what root runs: the files are mended, the path refused.
protect_code() {
    for path in $FILES .; do
        if as_user test -w "$HERE/$path"; then
            later "chmod $(stat -c %a "$HERE/$path") '$HERE/$path'"
            later "chown $(stat -c %u:%g "$HERE/$path") '$HERE/$path'"
            chown root:root "$HERE/$path"
            chmod go-w "$HERE/$path"
            say "$HERE/$path now belongs to root: $ACCOUNT could have changed it"
        fi
        ! as_user test -w "$HERE/$path" || die "$HERE/$path: the user $ACCOUNT may write it;" \
            "remove its access list (setfacl -b), or say --prefix /opt/vmmonitor"
    done
    path=$HERE
    while [ "$path" != / ]; do
        path=$(dirname "$path")
        ! as_user test -w "$path" || die "$path: the user $ACCOUNT may write it, and so replace" \
            "$HERE; say --prefix /opt/vmmonitor, or chmod o-w $path"
    done
}

own() {         # own FILE: root may write it, the service may read it, nobody else
    chown "root:$ACCOUNT" "$1"
    chmod 0640 "$1"
}

# What --uninstall or another --user left for root alone, and what a copy did not keep.
protect_secrets() {
    for file in "$HERE"/*; do
        if [ ! -f "$file" ] || [ -L "$file" ]; then
            continue
        fi
        mode=$(stat -c %U:%G:%a "$file")
        case $file:$mode in
            *":root:$ACCOUNT:640") ;;
            */config.json:* | */key.pem:* | *:root:root:640 | *":root:${OLD_ACCOUNT:-root}:640")
                keep "$file"
                own "$file" ;;
        esac
    done
}

# The addresses by which guests may reach this host: those of its interfaces, bridges among them, and
# of libvirt's networks, which may not be up yet.
addresses() {
    {
        hostname -I || ip -o address show scope global | awk '{ sub("/.*", "", $4); print $4 }'
        for network in $(virsh -q -c qemu:///system net-list --all --name); do
            virsh -q -c qemu:///system net-dumpxml "$network" \
                | sed -n "s/.*<ip .*address=['\"]\([0-9a-fA-F.:]*\)['\"].*/\1/p"
        done
    } 2>/dev/null </dev/null | tr ' ' '\n' | grep . | sort -u | head -n 50
}

make_certificate() {
    [ "$CERTIFICATE" = make ] || return 0
    host=$(hostname -f 2>/dev/null || hostname 2>/dev/null || uname -n)
    keep "$HERE/key.pem" "$HERE/cert.pem" "$HERE/key.pem.new" "$HERE/cert.pem.new"
    names=DNS:$host,DNS:localhost,IP:127.0.0.1,IP:::1
    for address in $(addresses); do
        names=$names,IP:$address
    done
    (umask 077 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -subj "/CN=$(printf %.64s "$host")" \
        -addext "subjectAltName=$names" \
        -keyout "$HERE/key.pem.new" -out "$HERE/cert.pem.new" 2>/dev/null) \
        || die "openssl could not make a certificate for $host; put cert.pem and key.pem into $HERE"
    own "$HERE/key.pem.new"
    chmod 0644 "$HERE/cert.pem.new"
    mv "$HERE/key.pem.new" "$HERE/key.pem"
    mv "$HERE/cert.pem.new" "$HERE/cert.pem"
    say "made a self-signed certificate for $host: $HERE/cert.pem"
}

make_config() {
    if [ -e "$HERE/config.json" ] || [ -L "$HERE/config.json" ]; then
        [ -z "$PORT" ] || set_port
        return 0
    fi
    keep "$HERE/config.json" "$HERE/config.json.new"
    (umask 077 && python "$HERE" "${PORT:-10000}" >"$HERE/config.json.new" <<'PYTHON'
import os
import secrets
with open(os.path.join(sys.argv[1], 'config.json.sample'), encoding='utf-8') as sample:
    text = sample.read().replace('CHANGE-ME', secrets.token_hex(32))
sys.stdout.write(text.replace('"port": 10000', f'"port": {sys.argv[2]}'))
PYTHON
    ) || die "$HERE/config.json could not be written; make room there"
    own "$HERE/config.json.new"
    mv "$HERE/config.json.new" "$HERE/config.json"
    say "made $HERE/config.json with a fresh key"
}

set_port() {            # in a config that is there, and nothing else in it
    keep "$HERE/config.json" "$HERE/config.json.new"
    (umask 077 && python "$HERE" "$PORT" >"$HERE/config.json.new" <<'PYTHON'
import dataclasses
import os
import re
import vmmonitor
path, port = os.path.join(sys.argv[1], 'config.json'), int(sys.argv[2])
old = vmmonitor.load(path)
with open(path, encoding='utf-8') as file:
    text, count = re.subn(r'("port"\s*:\s*)\d+', rf'\g<1>{port}', file.read())
values, problems = vmmonitor.parse(text, path)
new = dataclasses.replace(old, port=port)
if problems or count != 1 or vmmonitor.Config(**values) != dataclasses.replace(
        new, keys=(), warnings=()):
    sys.exit(1)
sys.stdout.write(text)
PYTHON
    ) || die "$HERE/config.json: set listener.port to $PORT there by hand, and leave out --port"
    if cmp -s "$HERE/config.json.new" "$HERE/config.json"; then
        rm "$HERE/config.json.new"
    else
        [ ! -L "$HERE/config.json" ] || die "$HERE/config.json is a link: set listener.port to" \
            "$PORT in $(readlink "$HERE/config.json") by hand, and leave out --port"
        own "$HERE/config.json.new"
        mv "$HERE/config.json.new" "$HERE/config.json"
        say "$HERE/config.json: listener.port is $PORT now"
    fi
}

# Sets NAMED to the files that config.json names. Those that the user can't read, systemd hands over.
check_readable() {
    NAMED=$(python "$HERE" <<'PYTHON'
import os
import vmmonitor
config = vmmonitor.load(os.path.join(sys.argv[1], 'config.json'))
names = [config.certificate, config.certificate_key, config.key_file,
         *(entry.key_file for entry in config.key_entries)] if config.listener_enabled else []
print(*dict.fromkeys(vmmonitor.beside(config, name) for name in names if name), sep='\n')
PYTHON
    ) || die "$HERE/config.json can't be used; see: python3 $HERE/vmmonitor.py --check"
    as_user test -r "$HERE/config.json" || die "the user $ACCOUNT can't read $HERE/config.json;" \
        "do: chown root:$ACCOUNT $HERE/config.json; chmod 0640 $HERE/config.json"
    printf '%s\n' "$NAMED" | while IFS= read -r file; do
        if [ -z "$file" ] || as_user test -r "$file" || may_hand_over "$file"; then
            continue
        fi
        die "the user $ACCOUNT can't read $file; put it into $HERE, owned by root:$ACCOUNT with" \
            'mode 0640, and run this again'
    done || exit 1
}

may_hand_over() {       # a plain name, once: it is by its last part that the daemon finds it
    [ "$SYSTEMD" = yes ] || return 1
    case $1 in
        *[!A-Za-z0-9/._+@-]*) return 1 ;;
    esac
    [ "$(printf '%s\n' "$NAMED" | sed 's|.*/||' | grep -c -x -F "${1##*/}")" = 1 ]
}

# --- the service -----------------------------------------------------------------------------

write_unit() {          # print it
    python "$HERE" "$PYTHON" "$ACCOUNT" "$NAMED" <<'PYTHON'
import os
import re
here, python, account, named = sys.argv[1:]
with open(os.path.join(here, 'vmmonitor.service'), encoding='utf-8') as file:
    unit = file.read()
names = [name for name in named.splitlines() if re.fullmatch('[A-Za-z0-9/._+@-]+', name)]
hand = {os.path.basename(name): name for name in reversed(names)}
lines = [f'LoadCredential={name}:{path}' for name, path in sorted(hand.items())]
unit = unit.replace('/usr/bin/python3', python).replace('/opt/vmmonitor', here)
print(unit.replace('User=vmmonitor\n', '\n'.join([f'User={account}', *lines, ''])), end='')
PYTHON
}

write_dropin() {        # print it
    cat <<'DROPIN'
# By install.sh --with-machines; --without-machines takes it away.
# It lets the service start machines made with the library, and gives this away: the service is
# root, sees and may write all files, makes namespaces, interfaces and mounts, and opens /dev/kvm
# and taps. Whoever takes it over has the host. A QEMU itself has no rights: it runs as a user of
# its own. Still shut: other devices, kernel modules, raw I/O, ptrace, the clock, new privileges.
[Unit]
Wants=modprobe@tun.service modprobe@macvtap.service
After=modprobe@tun.service modprobe@macvtap.service

[Service]
# That is root; if it is named, systemd 257 takes CAP_SETUID away.
User=
UMask=0022
# For namespaces and interfaces, for QEMU's own user, and for its sockets and its end.
CapabilityBoundingSet=CAP_NET_ADMIN CAP_SYS_ADMIN
CapabilityBoundingSet=CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_CHOWN CAP_FOWNER
CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_KILL
# Machines outlive the service, and the one that starts next finds them.
KillMode=process
OOMPolicy=continue
TasksMax=infinity
MemoryMax=infinity
DeviceAllow=/dev/kvm rw
DeviceAllow=/dev/net/tun rw
DeviceAllow=/dev/vhost-net rw
DeviceAllow=char-macvtap rw
# `ip netns` mounts its names where everybody sees them: no mount namespace of our own, and so
# none of what needs one.
ProtectSystem=no
ProtectHome=no
PrivateTmp=no
PrivateDevices=no
PrivateUsers=no
ProtectProc=default
ProcSubset=all
ProtectControlGroups=no
ProtectHostname=no
ProtectKernelLogs=no
ProtectKernelModules=no
ProtectKernelTunables=no
RestrictNamespaces=net mnt
RestrictAddressFamilies=AF_NETLINK
# QEMU's emulation writes code and runs it, and its threads set their priorities.
MemoryDenyWriteExecute=no
SystemCallFilter=
SystemCallFilter=~@clock @cpu-emulation @debug @module @obsolete @raw-io @reboot @swap
DROPIN
}

put() {         # put FILE: what is in SAVED/put, unless it is the same; sets CHANGED
    if ! cmp -s "$SAVED/put" "$1"; then
        keep "$1" "$1.new"
        cp "$SAVED/put" "$1.new"
        mv -f "$1.new" "$1"
        CHANGED=yes
    fi
}

install_unit() {        # and enable it
    later 'systemctl daemon-reload'
    write_unit >"$SAVED/put"
    put "$UNIT"
    case $MACHINES in
        yes)
            if [ ! -d "$UNIT.d" ]; then
                later "rmdir $UNIT.d"
                mkdir "$UNIT.d"
            fi
            write_dropin >"$SAVED/put"
            put "$DROPIN" ;;
        no) remove_dropin ;;
    esac
    [ "$CHANGED" = no ] || systemctl daemon-reload
    if ! systemctl is-enabled --quiet "$NAME" 2>/dev/null; then
        later "systemctl disable $NAME"
        systemctl enable --quiet "$NAME"
    fi
}

start_service() {
    if [ "$WAS_ACTIVE" = yes ]; then
        install_unit
        if [ "$CHANGED" = no ] && ! newer_than_service; then
            say "nothing has changed; the service runs: systemctl status $NAME"
            return 0
        fi
    else
        later "systemctl reset-failed $NAME"
        install_unit
        later "systemctl stop $NAME"
    fi
    since=$(date +%s)
    RESTARTED=$WAS_ACTIVE
    systemctl reset-failed "$NAME" 2>/dev/null || :     # and with it, how often it was started
    systemctl restart "$NAME" 2>/dev/null || die "the service did not start: $(last_words "$since")"
    say "the service runs: systemctl status $NAME"
}

remove_dropin() {
    [ -e "$DROPIN" ] || return 0
    keep "$DROPIN"
    rm -f "$DROPIN"
    rmdir "$UNIT.d" 2>/dev/null || :
    CHANGED=yes
}

newer_than_service() {  # whether a file of it was changed since it started
    python "$HERE" "$(systemctl show -p MainPID "$NAME")" "$NAMED" <<'PYTHON'
import os
import time
here, pid, named = sys.argv[1:]
with open(f'/proc/{pid.partition("=")[2]}/stat', encoding='utf-8') as file:
    ticks = int(file.read().rpartition(')')[2].split()[19])
age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
names = [os.path.join(here, 'vmmonitor.py'), os.path.join(here, 'config.json'), *named.splitlines()]
sys.exit(not any(os.stat(name).st_ctime > time.time() - age for name in names))
PYTHON
}

last_words() {          # last_words SECONDS: what the service said since then before it ended
    journalctl --sync 2>/dev/null || :
    words=$(journalctl -q -u "$NAME" -t "$NAME" --since "@$1" -o cat -p err --no-pager 2>/dev/null \
        | tail -n 1)
    say "${words:-$(systemctl show -p Result "$NAME"); see: journalctl -u $NAME -n 20}"
}

check_service() {       # in the service's place, and with what systemd hands it
    [ "$SYSTEMD" = no ] || export CREDENTIALS_DIRECTORY="/run/credentials/$NAME.service"
    status=0
    if [ -e "$DROPIN" ]; then
        "$PYTHON" -B "$HERE/vmmonitor.py" --check || status=$?
    else
        as_user "$PYTHON" -B "$HERE/vmmonitor.py" --check || status=$?
    fi
    unset CREDENTIALS_DIRECTORY
    [ "$status" = 0 ] || say "(mend what failed above; meanwhile the service goes on trying)"
}

check_port() {          # without systemd nobody tells us whether it starts
    problem=$(as_user "$PYTHON" -I -B -c "$RUN" "$HERE" 2>&1 <<'PYTHON'
import os
import vmmonitor
config = vmmonitor.load(os.path.join(sys.argv[1], 'config.json'))
try:
    vmmonitor.Server(config, vmmonitor.Dispatcher(
        vmmonitor.Guests([]), vmmonitor.Settings(config), {})).server_close()
except vmmonitor.Error as problem:
    print(vmmonitor.explain(problem))
PYTHON
    ) || :
    [ -z "$problem" ] || die "$(say "$problem" | tail -n 1)"
}

show_example() {
    sudo=''
    if has sudo; then
        sudo='sudo '
    fi
    python "$HERE" "$sudo" "$(hostname -f 2>/dev/null || uname -n)" <<'PYTHON'
import base64
import hashlib
import os
import re
import shlex
import vmmonitor
here, sudo, host = sys.argv[1:]
path = os.path.join(here, 'config.json')
config = vmmonitor.load(path)
if config.key_file:
    secret = f'cat {shlex.quote(vmmonitor.beside(config, config.key_file))}'
else:
    secret = f'python3 -c \'import json; print(json.load(open("{path}"))["listener"]["key"])\''
certificate = vmmonitor.beside(config, config.certificate)


def openssl(*words, stdin=b''):
    return vmmonitor.run(['openssl', *words], 10, stdin, check=False).stdout


shown = openssl('x509', '-noout', '-subject', '-issuer', '-ext', 'subjectAltName', '-in',
                certificate).decode(errors='replace')
names = re.findall(r'DNS:([^\s,*]+)', shown) or re.findall(r'CN ?= ?([^\s,/*]+)', shown)
if names:
    host = 'localhost' if 'localhost' in names else names[0]
address = config.address or 'localhost'
words = ['curl', '--cacert', shlex.quote(certificate)]
if address != host:
    words += ['--connect-to', shlex.quote(f'::[{address}]:' if ':' in address else f'::{address}:')]
words += ['-H', f'"Authorization: Bearer $({sudo}{secret})"',
          shlex.quote(f'https://{host}:{config.port}/?cmd=list')]
if config.listener_enabled and (config.key or config.key_file):
    print('try it:', ' '.join(words), sep='\n  ')
found = re.search(r'subject=(.*)\nissuer=(.*)', shown)
if config.listener_enabled and found and found[1] == found[2]:
    public = openssl('pkey', '-pubin', '-outform', 'der',
                     stdin=openssl('x509', '-noout', '-pubkey', '-in', certificate))
    pin = base64.b64encode(hashlib.sha256(public).digest()).decode()
    print(f'to know it from elsewhere: curl --pinnedpubkey sha256//{pin}')
PYTHON
    [ "$MACHINES" != yes ] || write_dropin | sed -n '2,/^\[Unit\]/s/^# *//p'
}

# --- taking away -----------------------------------------------------------------------------

uninstall() {
    there=$(where_it_runs)              # which may be another directory than this one
    HERE=${there:-$HERE}
    ACCOUNT=$(unit_says User)
    ACCOUNT=${ACCOUNT:-$NAME}
    read_record "$HERE"
    if [ -e "$UNIT" ]; then
        systemctl disable --now --quiet "$NAME" 2>/dev/null || :
        rm -f "$UNIT" "$DROPIN"
        rmdir "$UNIT.d" 2>/dev/null || :
        systemctl daemon-reload 2>/dev/null || :
        systemctl reset-failed --quiet "$NAME" 2>/dev/null || :
        say "removed $UNIT"
    fi
    remove_account "$ACCOUNT"
    [ "$PURGE" = no ] || purge
    case " $RECORD " in
        *' copied '*)
            for file in $FILES; do
                rm -f "$HERE/$file"
            done ;;
    esac
    rm -f "$HERE/.installed"
    if rmdir "$HERE" 2>/dev/null; then
        say "removed $HERE"
    else
        say "$HERE stays, with what is in it now"
    fi
}

remove_account() {      # remove_account NAME: if it was made for this, and its rights in any case
    getent passwd "$1" >/dev/null || return 0
    for file in "$HERE"/*; do
        if [ -f "$file" ] && [ "$(stat -c %U:%G:%a "$file")" = "root:$1:640" ]; then
            chgrp root "$file"
        fi
    done
    if [ "$(getent passwd "$1" | cut -d: -f5)" = "$COMMENT" ]; then
        userdel "$1" 2>/dev/null || die "the user $1 can't be removed; end what runs as it" \
            "(pgrep -u $1) and run this again"
        say "removed the user $1"
    else
        case " $RECORD " in
            *' joined '*) gpasswd -d "$1" libvirt >/dev/null 2>&1 || : ;;
        esac
    fi
}

purge() {       # what this file made; a certificate that somebody else signed, it did not
    rm -f "$HERE/config.json"
    subject=$(openssl x509 -noout -subject -in "$HERE/cert.pem" 2>/dev/null | cut -d= -f2-)
    if [ -n "$subject" ] && [ "$subject" \
        = "$(openssl x509 -noout -issuer -in "$HERE/cert.pem" 2>/dev/null | cut -d= -f2-)" ]; then
        rm -f "$HERE/cert.pem" "$HERE/key.pem"
    fi
    if grep -q -s -v -x '{}' /run/$NAME/net-*.json; then
        say "/run/$NAME stays: it lists networks that stand; see vmmonitor.py --clean --all"
    else
        rm -rf "/run/$NAME"
    fi
}

read_record() { RECORD=$(cat "$1/.installed" 2>/dev/null) || :; }

# --- all of it -------------------------------------------------------------------------------

choose() {      # what was not said stays as it is
    OLD_HERE=$(where_it_runs)
    OLD_ACCOUNT=$(unit_says User)
    ACCOUNT=${ACCOUNT:-${OLD_ACCOUNT:-$NAME}}
    read_record "$HERE"
    CHANGED=no
    if [ -z "$MACHINES" ] && [ -e "$DROPIN" ]; then
        MACHINES=yes
    fi
}

begin() {
    SAVED=$(mktemp -d)
    trap undo EXIT
    trap 'exit 1' HUP INT PIPE TERM
    # Last of all, when its files are back.
    WAS_ACTIVE=no RESTARTED=no
    if [ "$SYSTEMD" = yes ] && systemctl is-active --quiet "$NAME"; then
        WAS_ACTIVE=yes
    fi
    later restart_old
}

restart_old() {
    if [ "$RESTARTED" = yes ]; then
        systemctl reset-failed "$NAME"
        systemctl restart "$NAME"
    fi
}

finish() {      # from here on nothing is taken back, and it comes to its end
    trap '' HUP INT PIPE TERM
    UNDO=''
    if [ -n "$OLD_ACCOUNT" ] && [ "$OLD_ACCOUNT" != "$ACCOUNT" ]; then
        remove_account "$OLD_ACCOUNT"
    fi
    if [ -n "$OLD_HERE" ] && [ "$OLD_HERE" != "$HERE" ]; then
        say "the service has moved from $OLD_HERE, where everything is as it was"
    fi
}

run_in_foreground() {
    [ "$MACHINES" != yes ] || ACCOUNT=root
    say "systemd does not run here: this is the service now, as $ACCOUNT; Ctrl-C ends it"
    rm -rf "$SAVED"
    trap - EXIT HUP INT PIPE TERM
    # Not runuser, which would stay as its parent.
    exec "$PYTHON" -I -c 'import os, pwd, sys
account = pwd.getpwnam(sys.argv[1])
os.initgroups(account.pw_name, account.pw_gid)
os.setgid(account.pw_gid)
os.setuid(account.pw_uid)
os.execv(sys.executable, [sys.executable, sys.argv[2]])' "$ACCOUNT" "$HERE/vmmonitor.py"
}

install() {
    check_path "$HERE"
    check_source
    choose
    install_packages
    check_programs
    check_config
    begin
    start_libvirt
    copy_files
    make_user
    protect_code
    protect_secrets
    make_certificate
    make_config
    check_readable
    write_record
    if [ "$SYSTEMD" = yes ]; then
        start_service
    else
        check_port
    fi
    check_service
    finish
    show_example
    [ "$SYSTEMD" = yes ] || run_in_foreground
}

read_options "$@"
[ "$(id -u)" = 0 ] || die "must run as root: sudo $0 $*"
$ACTION
