#!/bin/sh
# Install vmmonitor as a systemd service, out of the directory that this file is in.
# Running it again is harmless: a config, key or certificate that is there stays as it is.
set -eu

NAME=vmmonitor
UNIT=/etc/systemd/system/$NAME.service
HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)

usage() {
    cat <<USAGE
usage: sudo ./install.sh               install or upgrade, and start the service
       sudo ./install.sh --uninstall   stop and remove the service and its user

Installing makes the user $NAME (in the group libvirt), config.json with a fresh key and a
self-signed certificate if there are none, and the unit $UNIT.
Uninstalling leaves $HERE with config.json, key and certificate as it is.
USAGE
}

say() { printf '%s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

need() {        # need PROGRAM WHY
    command -v "$1" >/dev/null 2>&1 || die "$1 is missing; install it: $2"
}

check_host() {
    [ "$(id -u)" = 0 ] || die "must run as root: sudo $0 $*"
    [ -d /run/systemd/system ] || die "systemd does not run here; start the program yourself:" \
        "python3 $HERE/vmmonitor.py --config $HERE/config.json"
}

check_directory() {
    case $HERE in
        *[!A-Za-z0-9/._+-]*) die "$HERE: move the files to a path without spaces or special" \
            "characters, such as /opt/vmmonitor" ;;
    esac
    for file in vmmonitor.py vmmonitor.service config.json.sample; do
        [ -r "$HERE/$file" ] || die "$HERE/$file is missing; copy all files of vmmonitor here"
    done
}

make_user() {
    if ! getent passwd "$NAME" >/dev/null; then
        nologin=$(command -v nologin || echo /bin/false)
        useradd --system --user-group --home-dir / --no-create-home --shell "$nologin" \
            --comment 'vmmonitor service' "$NAME"
        say "made the user $NAME"
    fi
    if getent group libvirt >/dev/null; then
        usermod -a -G libvirt "$NAME"
    else
        say "warning: there is no group libvirt; install libvirt, then run this again"
    fi
    runuser -u "$NAME" -- test -r "$HERE/vmmonitor.py" || die "the user $NAME can't read" \
        "$HERE/vmmonitor.py; move the files elsewhere, such as /opt/vmmonitor, or open the path"
}

own() {         # own FILE: root may write it, the service may read it, nobody else
    chown "root:$NAME" "$1"
    chmod 0640 "$1"
}

make_certificate() {
    if [ -e "$HERE/cert.pem" ] || [ -e "$HERE/key.pem" ]; then
        return
    fi
    host=$(hostname -f 2>/dev/null || hostname)
    (umask 077 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -subj "/CN=$host" -addext "subjectAltName=DNS:$host,DNS:localhost,IP:127.0.0.1,IP:::1" \
        -keyout "$HERE/key.pem.new" -out "$HERE/cert.pem.new" 2>/dev/null) \
        || die "openssl could not make a certificate for $host"
    own "$HERE/key.pem.new"
    chmod 0644 "$HERE/cert.pem.new"
    mv "$HERE/key.pem.new" "$HERE/key.pem"
    mv "$HERE/cert.pem.new" "$HERE/cert.pem"
    say "made a self-signed certificate for $host: $HERE/cert.pem"
}

make_config() {
    if [ -e "$HERE/config.json" ]; then
        return
    fi
    key=$(openssl rand -hex 32)
    (umask 077 && KEY=$key python3 - "$HERE/config.json.sample" >"$HERE/config.json.new" <<'PYTHON'
import os
import sys
with open(sys.argv[1], encoding='utf-8') as sample:
    sys.stdout.write(sample.read().replace('CHANGE-ME', os.environ['KEY']))
PYTHON
    )
    own "$HERE/config.json.new"
    mv "$HERE/config.json.new" "$HERE/config.json"
    say "made $HERE/config.json with a fresh key"
}

check_config() {
    runuser -u "$NAME" -- test -r "$HERE/config.json" || die "the user $NAME can't read" \
        "$HERE/config.json; chown root:$NAME and chmod 0640 it"
    status=0
    runuser -u "$NAME" -- python3 "$HERE/vmmonitor.py" --config "$HERE/config.json" --check \
        || status=$?
    [ "$status" = 0 ] || say "(what failed above can be mended later; the service starts anyway)"
}

install_unit() {
    python=$(command -v python3)
    sed -e "s|/opt/vmmonitor|$HERE|g" -e "s|/usr/bin/python3|$python|" "$HERE/vmmonitor.service" \
        >"$UNIT.new"
    mv "$UNIT.new" "$UNIT"
    systemctl daemon-reload
    systemctl enable --quiet "$NAME"
    systemctl restart "$NAME" || die "the service did not start; see: journalctl -u $NAME -n 20"
    say "the service runs: systemctl status $NAME"
}

show_example() {
    python3 - "$HERE/config.json" "$HERE/cert.pem" <<'PYTHON'
import json
import sys
with open(sys.argv[1], encoding='utf-8') as file:
    listener = json.load(file).get('listener', {})
if listener.get('enabled'):
    print('try it (the key is in config.json):')
    print("  curl --cacert %s -H 'Authorization: Bearer KEY' 'https://localhost:%s/?cmd=list'"
          % (sys.argv[2], listener.get('port', 10000)))
PYTHON
}

uninstall() {
    if [ -e "$UNIT" ]; then
        systemctl disable --now --quiet "$NAME" || true
        rm -f "$UNIT"
        systemctl daemon-reload
        say "removed $UNIT"
    fi
    if getent passwd "$NAME" >/dev/null; then
        userdel "$NAME"
        say "removed the user $NAME"
    fi
    say "$HERE stays as it is, with config.json, key and certificate"
}

case ${1-} in
    '') ;;
    --uninstall) check_host "$1"; uninstall; exit 0 ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac
check_host
check_directory
need python3 'apt install python3'
need openssl 'apt install openssl'
make_user
make_certificate
make_config
check_config
install_unit
show_example
