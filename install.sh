#!/bin/sh
# Install vmmonitor as a systemd service, out of the directory that this file is in.
# Running it again is harmless: a config, key or certificate that is there stays as it is.
set -eu
umask 022

NAME=vmmonitor
UNIT=/etc/systemd/system/$NAME.service
HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
MADE_USER=no    # by this run; a failure before the unit is installed takes it back

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

need() {        # need PROGRAM PACKAGE
    command -v "$1" >/dev/null 2>&1 || die "$1 is missing; install it: apt install $2"
}

RUN='import sys; sys.path.insert(0, sys.argv[1]); exec(sys.stdin.read())'
python() {      # python HERE [ARGUMENT...]: run the program on stdin, beside vmmonitor.py
    python3 -I -B -c "$RUN" "$@"
}

check_host() {
    [ "$(id -u)" = 0 ] || die "must run as root: sudo $0${1:+ $1}"
    [ -d /run/systemd/system ] || die "systemd does not run here; run it in the foreground" \
        "instead: python3 '$HERE/vmmonitor.py' --monitor"
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

check_programs() {
    need python3 python3
    need openssl openssl
    need useradd passwd
    need runuser util-linux
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' \
        || die "$(python3 --version) is too old; vmmonitor needs Python 3.9 or later"
    getent group libvirt >/dev/null \
        || die "there is no group libvirt; install libvirt: apt install libvirt-daemon-system"
    problem=$(python "$HERE" 2>&1 <<'PYTHON'
import vmmonitor
try:
    vmmonitor.Library.get()
except vmmonitor.Error as problem:
    print(vmmonitor.words(problem))
PYTHON
    ) || :
    [ -z "$problem" ] || die "$problem"
}

# Sets CERTIFICATE to make or keep; a config that can't be used ends it all before it began.
check_config() {        # check_config [PREFIX...]: as root, or as who the prefix makes it run
    CERTIFICATE=$("$@" python3 -I -B -c "$RUN" "$HERE" <<'PYTHON'
import os
import vmmonitor
here = sys.argv[1]
path = os.path.join(here, 'config.json')
own = [os.path.join(here, name) for name in ('cert.pem', 'key.pem')]
pair, config, problems = own, None, []
if os.access(path, os.R_OK):
    try:
        vmmonitor.load(path)
    except vmmonitor.ConfigError as problem:
        problems = [f'{path}: {line}' for line in problem.problems]
    values, wrong = vmmonitor.parse(open(path, encoding='utf-8', errors='replace').read(), path)
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
files = [path, *pair]
if config:
    files += [vmmonitor.beside(config, name) for name in (
        config.key_file, *(entry.key_file for entry in config.key_entries)) if name]
closed = [name for name in dict.fromkeys(files)
          if os.path.lexists(name) and not os.access(name, os.R_OK)]
if closed:
    problems = []
for name in closed:
    problems.append(f"the user vmmonitor can't read {name}; " + (
        f'do: chown root:root {name}; chmod 0640 {name}' if os.path.dirname(name) == here
        else f'put it into {here}, owned by root:root with mode 0640') + '; then run this again')
for line in problems:
    print(f'install.sh: {line}', file=sys.stderr)
print('make' if make else 'keep')
sys.exit(bool(problems))
PYTHON
    ) || exit 1
}

undo() {        # at every exit; all of it is there or none of it
    rm -f "$HERE/cert.pem.new" "$HERE/key.pem.new" "$HERE/config.json.new"
    if [ "$MADE_USER" = yes ]; then
        regroup "$NAME" root
        userdel "$NAME"
    fi
}

make_user() {
    if ! getent passwd "$NAME" >/dev/null; then
        nologin=$(command -v nologin || echo /bin/false)
        group=--user-group
        if getent group "$NAME" >/dev/null; then
            group="--gid=$NAME"
        fi
        useradd --system "$group" --home-dir / --no-create-home --shell "$nologin" \
            --comment 'vmmonitor service' "$NAME"
        MADE_USER=yes
    fi
    usermod -a -G libvirt "$NAME"
    runuser -u "$NAME" -- test -r "$HERE/vmmonitor.py" || die "the user $NAME can't read" \
        "$HERE/vmmonitor.py; move the files elsewhere, such as /opt/vmmonitor, or open the path"
}

regroup() {     # regroup FROM TO: files of the service that --uninstall left, and back
    for file in "$HERE"/*; do
        if [ -f "$file" ] && [ "$(stat -c %U:%G:%a "$file")" = "root:$1:640" ]; then
            chgrp "$2" "$file"
        fi
    done
}

own() {         # own FILE: root may write it, the service may read it, nobody else
    chown "root:$NAME" "$1"
    chmod 0640 "$1"
}

make_certificate() {
    if [ "$CERTIFICATE" = keep ]; then
        return
    fi
    host=$(hostname -f 2>/dev/null || hostname)
    (umask 077 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -subj "/CN=$(printf %.64s "$host")" \
        -addext "subjectAltName=DNS:$host,DNS:localhost,IP:127.0.0.1,IP:::1" \
        -keyout "$HERE/key.pem.new" -out "$HERE/cert.pem.new" 2>/dev/null) \
        || die "openssl could not make a certificate for $host"
    own "$HERE/key.pem.new"
    chmod 0644 "$HERE/cert.pem.new"
    mv "$HERE/key.pem.new" "$HERE/key.pem"
    mv "$HERE/cert.pem.new" "$HERE/cert.pem"
    say "made a self-signed certificate for $host: $HERE/cert.pem"
}

make_config() {
    if [ -e "$HERE/config.json" ] || [ -L "$HERE/config.json" ]; then
        return
    fi
    (umask 077 && python "$HERE" >"$HERE/config.json.new" <<'PYTHON'
import os
import secrets
with open(os.path.join(sys.argv[1], 'config.json.sample'), encoding='utf-8') as sample:
    sys.stdout.write(sample.read().replace('CHANGE-ME', secrets.token_hex(32)))
PYTHON
    )
    own "$HERE/config.json.new"
    mv "$HERE/config.json.new" "$HERE/config.json"
    say "made $HERE/config.json with a fresh key"
}

check_service() {
    status=0
    runuser -u "$NAME" -- python3 -B "$HERE/vmmonitor.py" --config "$HERE/config.json" --check \
        || status=$?
    [ "$status" = 0 ] || say "(mend what failed above; meanwhile the service goes on trying)"
}

install_unit() {
    python=$(command -v python3)
    sed -e "s|/opt/vmmonitor|$HERE|g" -e "s|/usr/bin/python3|$python|" "$HERE/vmmonitor.service" \
        >"$UNIT.new"
    mv "$UNIT.new" "$UNIT"
    systemctl daemon-reload
    systemctl enable --quiet "$NAME"
    systemctl restart "$NAME" 2>/dev/null \
        || die "the service did not start; see: journalctl -u $NAME -n 20"
    say "the service runs: systemctl status $NAME"
}

show_example() {
    sudo=''
    if command -v sudo >/dev/null 2>&1; then
        sudo='sudo '
    fi
    python "$HERE" "$sudo" "$(hostname -f 2>/dev/null || hostname)" <<'PYTHON'
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
shown = vmmonitor.run(['openssl', 'x509', '-noout', '-subject', '-ext', 'subjectAltName', '-in',
                       certificate], 10, check=False).stdout.decode(errors='replace')
names = re.findall(r'DNS:([^\s,*]+)', shown) or re.findall(r'CN ?= ?([^\s,/*]+)', shown)
if names:
    host = 'localhost' if 'localhost' in names else names[0]
address = config.address or 'localhost'
words = ['curl', '--cacert', shlex.quote(certificate)]
if address != host:
    words += ['--connect-to', shlex.quote(f'::[{address}]:' if ':' in address else f'::{address}:')]
words += ['-H', f'"Authorization: Bearer $({sudo}{secret})"',
          f"'https://{host}:{config.port}/?cmd=list'"]
if config.listener_enabled and (config.key or config.key_file):
    print('try it:', ' '.join(words), sep='\n  ')
PYTHON
}

uninstall() {
    there=$HERE         # where the service runs, which may be another directory
    if [ -e "$UNIT" ]; then
        there=$(sed -n 's|^ExecStart=.* \(/.*\)/vmmonitor\.py$|\1|p' "$UNIT")
        there=${there:-$HERE}
        systemctl disable --now --quiet "$NAME" || true
        rm -f "$UNIT"
        systemctl daemon-reload
        say "removed $UNIT"
    fi
    if getent passwd "$NAME" >/dev/null; then
        regroup "$NAME" root
        [ "$there" = "$HERE" ] || (HERE=$there && regroup "$NAME" root)
        userdel "$NAME"
        say "removed the user $NAME"
    fi
    say "$there stays as it is, with config.json, key and certificate"
}

case ${1-} in
    '') ;;
    --uninstall) check_host "$1"; uninstall; exit 0 ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac
check_host
check_directory
check_programs
check_config
trap undo EXIT
trap 'exit 1' HUP INT TERM
make_user
regroup root "$NAME"
check_config runuser -u "$NAME" --
make_certificate
make_config
check_service
[ "$MADE_USER" = no ] || say "made the user $NAME"
MADE_USER=no
install_unit
show_example
