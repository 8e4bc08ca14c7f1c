#!/usr/bin/env python3
"""Tests of vmmonitor: real guests on a real libvirtd, real TLS and curl, and fakes only for peers
that can't be had.

    python3 test_vmmonitor.py                   what this machine allows
    sudo python3 test_vmmonitor.py --install    install what is needed, then everything
    sudo python3 test_vmmonitor.py BarsTest     one class, or CLASS.test
    sudo python3 test_vmmonitor.py --bench      figures against virsh

The first sections are the rig: packages, a guest image built from Debian's kernel and busybox, a
libvirtd in name spaces of its own, and a client that measures clocks without vmmonitor. Guests are
always emulated (libvirt domain type `qemu`). What a run makes lives in one directory and one mount
and network name space, and is gone when it ends, of whatever cause; only the image cache stays.
"""
from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

import vmmonitor as vm

CACHE = Path('/var/tmp/vmmonitor-test')
KERNEL_PACKAGE = 'linux-image-cloud-amd64'
# The monolithic libvirtd with its QEMU driver, but not libvirt-daemon-system: that would start a
# second libvirtd, on the host itself.
PACKAGES = ('libvirt-daemon', 'libvirt-daemon-driver-qemu', 'libvirt-clients',
            'qemu-system-x86', 'qemu-utils', 'qemu-guest-agent', 'libfaketime', 'busybox-static',
            'cpio', 'kmod', 'iproute2', 'openssl', 'curl', 'xz-utils')


class RigError(Exception):
    """The rig, or a command that a test gave through it, failed."""


def say(text: str) -> None:
    """Print a progress line."""
    print(f'rig: {text}', file=sys.stderr, flush=True)


def run(*argv: str, timeout: float, cwd: Path | None = None) -> str:
    """Run a program and return its standard output; RigError with its stderr if it fails."""
    what = ' '.join(argv)
    try:
        done = subprocess.run(argv, cwd=cwd, timeout=timeout, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors='replace', check=False)
    except subprocess.TimeoutExpired:
        raise RigError(f'{what}: not done within {timeout} s') from None
    if done.returncode:
        raise RigError(f'{what}: exit {done.returncode}: {done.stderr.strip()}')
    return done.stdout


def wait_for(what: str, check: Callable[[], object], timeout: float, pause: float = 0.05) -> float:
    """Poll until `check()` is true; return the seconds that took; RigError after `timeout`."""
    start = time.monotonic()
    while not check():
        if time.monotonic() - start > timeout:
            raise RigError(f'{what}: not within {timeout} s')
        time.sleep(pause)
    return time.monotonic() - start


def random_uuid() -> str:
    """Return a new UUID."""
    return Path('/proc/sys/kernel/random/uuid').read_text().strip()


# === Debian packages ============================================================================
def apt(*args: str, cwd: Path | None = None) -> None:
    """Run apt-get without questions, and not as user `_apt`, who may not write to `cwd`."""
    run('env', 'DEBIAN_FRONTEND=noninteractive', 'apt-get', '-qq', '-o', 'DPkg::Lock::Timeout=300',
        '-o', 'APT::Sandbox::User=root', *args, cwd=cwd, timeout=1800)


def installed(package: str) -> bool:
    """True if dpkg has the package installed."""
    with contextlib.suppress(RigError):
        return run('dpkg-query', '-Wf', '${db:Status-Abbrev}', package, timeout=60)[:2] == 'ii'
    return False


def install() -> None:
    """Install those of PACKAGES that are missing."""
    missing = [package for package in PACKAGES if not installed(package)]
    if missing:
        say(f'installing {" ".join(missing)}')
        apt('update')
        apt('install', '-y', '--no-install-recommends', *missing)


# === Guest image ================================================================================
IMAGE_RECIPE = 1        # raise it when build_image() changes what it puts in
MODULES = ('virtio_pci', 'virtio_console', 'button', 'evdev', 'virtio_blk', 'virtio_scsi',
           'virtio_net')
# The clock is right (to the second) when /init starts: the kernel itself reads the RTC, by
# CONFIG_RTC_HCTOSYS and the built-in rtc_cmos.
INIT = r"""#!/bin/sh
export PATH=/sbin:/usr/sbin:/bin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
read -r words < /proc/cmdline
for word in $words; do
    case $word in
    nohwclock) rm /sbin/hwclock ;;
    gablock=*) block="-b ${word#gablock=}" ;;
    noga) noga=1 ;;
    esac
done
modprobe -a virtio_pci button evdev
modprobe -a $(cat /sys/bus/virtio/devices/*/modalias)
acpid -l /dev/null -c /etc/acpi
mkdir /dev/virtio-ports
while [ "$noga" ]; do sleep 3600; done
agent=/dev/virtio-ports/org.qemu.guest_agent.0
while :; do
    # The host announces its ports after the module is loaded: they may come late.
    for port in /sys/class/virtio-ports/*; do
        read -r name < $port/name && ln -sf ../${port##*/} /dev/virtio-ports/$name
    done 2>/dev/null
    [ -e $agent ] && qemu-ga -m virtio-serial -p $agent -t /run $block
    usleep 200000
done
"""
POWER_BUTTON = '#!/bin/sh\nexec poweroff -f\n'
# What guest-shutdown of qemu-ga runs, with -H, -P or -r.
SHUTDOWN = '#!/bin/sh\ncase " $* " in *" -r "*) exec reboot -f ;; esac\nexec poweroff -f\n'
# qemu-ga 5.2 suspends by systemctl or not at all: it asks for the unit (3: inactive), and then.
SYSTEMCTL = """#!/bin/sh
[ $1 = status ] && exit 3
[ $1 = suspend ] && echo mem > /sys/power/state
"""
SCRIPTS = {'init': INIT, 'sbin/shutdown': SHUTDOWN, 'bin/systemctl': SYSTEMCTL,
           'etc/acpi/PWRF/00000080': POWER_BUTTON}
BUSYBOX, AGENT = Path('/bin/busybox'), Path('/usr/sbin/qemu-ga')


def guest_image() -> tuple[str, str]:
    """Return the paths of a kernel and an initramfs; build them if the cache has none such."""
    CACHE.mkdir(mode=0o755, exist_ok=True)
    if CACHE.is_symlink() or CACHE.stat().st_uid != os.getuid() or CACHE.stat().st_mode & 0o022:
        raise RigError(f'{CACHE}: not ours alone, and we would boot what is in it; remove it')
    with (CACHE / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        deb = None if installed_kernel() else kernel_deb()
        version = deb.name.split('_')[0][len('linux-image-'):] if deb else installed_kernel()
        kernel = CACHE / f'vmlinuz-{version}'
        initramfs = CACHE / f'initramfs-{version}-{fingerprint(deb)}'
        if not (kernel.exists() and initramfs.exists()):
            say(f'building {initramfs}')
            for left in CACHE.glob('build-*'):  # by a killed run; the lock is ours, so nobody's
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(prefix='build-', dir=CACHE) as work:
                build_image(Path(work), deb, version)
                Path(work, 'kernel').rename(kernel)
                Path(work, 'initramfs').rename(initramfs)
    return str(kernel), str(initramfs)


def installed_kernel() -> str:
    """Return the version of an installed cloud kernel that has its modules, or nothing."""
    found = (path.name[len('vmlinuz-'):] for path in Path('/boot').glob('vmlinuz-*cloud*'))
    return max((v for v in found if Path('/lib/modules', v, 'modules.dep').exists()), default='')


def kernel_deb() -> Path:
    """Return a cloud kernel's .deb in the cache; download it if there is none."""
    def cached() -> list[Path]:
        return sorted(CACHE.glob('linux-image-*.deb'))

    if not cached():
        say(f'downloading {KERNEL_PACKAGE}')
        with contextlib.suppress(RigError):     # stale or missing lists: stay with what we have
            apt('update')
        depends = run('apt-cache', 'depends', '--important', KERNEL_PACKAGE, timeout=60).split()
        package = next(word for word in reversed(depends) if word.startswith('linux-image-'))
        with tempfile.TemporaryDirectory(prefix='build-', dir=CACHE) as work:
            apt('download', package, cwd=Path(work))
            for path in Path(work).glob('*.deb'):
                path.rename(CACHE / path.name)
    return cached()[-1]


def fingerprint(deb: Path | None) -> str:
    """Return a digest of what goes into an image besides an installed kernel."""
    parts = (IMAGE_RECIPE, MODULES, SCRIPTS, deb and deb.name)
    digest = hashlib.sha256(repr(parts).encode())
    for path in (BUSYBOX, AGENT):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def build_image(work: Path, deb: Path | None, version: str) -> None:
    """Build the files `kernel` and `initramfs` in the directory `work`."""
    root, stage = Path('/'), work / 'stage'
    if deb:
        root = work / 'deb'
        run('dpkg-deb', '-x', str(deb), str(root), timeout=300)
        if not (root / 'lib').exists():         # merged-/usr packages have /usr/lib only
            (root / 'lib').symlink_to('usr/lib')
    for name in ('bin', 'sbin', 'usr/bin', 'usr/sbin', 'proc', 'sys', 'dev', 'run', 'tmp', 'var'):
        (stage / name).mkdir(parents=True)
    (stage / 'var/run').symlink_to('../run')
    stage_programs(stage)
    stage_modules(stage, root, version)
    run('sh', '-c', 'find . | cpio --quiet -o -H newc -R 0:0 | gzip -1 > ../initramfs', cwd=stage,
        timeout=120)
    shutil.copyfile(root / 'boot' / f'vmlinuz-{version}', work / 'kernel')


def stage_programs(stage: Path) -> None:
    """Copy busybox with all its names, the agent with its libraries, and our scripts."""
    libraries = [word for word in run('ldd', str(AGENT), timeout=60).split() if word[0] == '/']
    for path in [*map(Path, libraries), BUSYBOX, AGENT]:
        target = stage / path.relative_to('/')
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in run(str(BUSYBOX), '--list-full', timeout=60).split():
        if not (stage / name).exists() and name not in SCRIPTS:
            (stage / name).symlink_to(BUSYBOX)
    for name, text in SCRIPTS.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text(text)
        (stage / name).chmod(0o755)


def stage_modules(stage: Path, root: Path, version: str) -> None:
    """Copy MODULES and what they need, uncompressed since busybox cannot do that."""
    if not (root / 'lib/modules' / version / 'modules.dep').exists():
        run('depmod', '-b', str(root), version, timeout=120)
    listing = run('modprobe', '-a', '-S', version, '-d', str(root), '--show-depends', *MODULES,
                  timeout=60)
    for line in listing.splitlines():
        kind, _, name = line.strip().partition(' ')
        if kind == 'insmod':                    # the other kind is "builtin"
            path = Path(name.split()[0])
            target = stage / 'lib/modules' / version / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            if path.suffix == '.xz':            # Debian 13
                run('xz', '-df', str(target), timeout=60)
    run('depmod', '-b', str(stage), version, timeout=60)


# === libvirt, by ctypes: short calls with an exact clock around them ============================
# Instead of libvirt's own error handler, which prints.
SILENCE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda data, error: None)


@functools.cache
def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL, ctypes.CDLL]:
    """Load libvirt, libvirt-qemu and libc, and declare the calls used here."""
    text, pointer, number = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int
    lib, qemu = ctypes.CDLL('libvirt.so.0'), ctypes.CDLL('libvirt-qemu.so.0')
    libc = ctypes.CDLL(None)

    def declare(function: Any, result: Any, *arguments: Any) -> None:
        function.restype, function.argtypes = result, arguments

    declare(lib.virConnectOpen, pointer, text)
    declare(lib.virConnectClose, number, pointer)
    declare(lib.virDomainLookupByName, pointer, pointer, text)
    declare(lib.virDomainFree, number, pointer)
    declare(lib.virGetLastErrorMessage, text)
    declare(lib.virSetErrorFunc, None, pointer, pointer)
    declare(qemu.virDomainQemuAgentCommand, pointer, pointer, text, number, ctypes.c_uint)
    declare(libc.free, None, pointer)
    lib.virSetErrorFunc(None, ctypes.cast(SILENCE, pointer))
    return lib, qemu, libc


@contextlib.contextmanager
def agent_link(uri: str, name: str) -> Iterator[Callable[[str, int], str]]:
    """Give a function that sends JSON to a domain's agent (virDomainQemuAgentCommand).

    A connection of its own for every use: nothing is shared between threads, or kept over a
    restart of libvirtd.
    """
    lib, qemu, libc = libraries()

    def checked(result: int | None) -> int:
        if not result:
            raise RigError(f'domain {name}: {lib.virGetLastErrorMessage().decode()}')
        return result

    def ask(command: str, timeout: int) -> str:
        reply = checked(qemu.virDomainQemuAgentCommand(domain, command.encode(), timeout, 0))
        try:
            return ctypes.string_at(reply).decode()
        finally:
            libc.free(reply)

    with contextlib.ExitStack() as stack:
        connection = checked(lib.virConnectOpen(uri.encode()))
        stack.callback(lib.virConnectClose, connection)
        domain = checked(lib.virDomainLookupByName(connection, name.encode()))
        stack.callback(lib.virDomainFree, domain)
        yield ask


# === A libvirtd of our own ======================================================================
# /run is hidden as a whole: no D-Bus, so no systemd-machined or logind that would learn of our
# guests.  The cgroups are hidden for the same end.  libvirt 7.0 does not start without its user,
# which only libvirt-daemon-system would make.  The shell stays, and with it the name spaces,
# while our process holds its standard input open; its end, of whatever cause, ends everything.
HOLDER = r"""set -e
for dir in /run /var/lib /var/cache /var/log; do mount -t tmpfs -o mode=0755 rig $dir; done
mount --bind "$1/etc" /etc/libvirt
for file in passwd group; do
    grep -q '^libvirt-qemu:' /etc/$file && continue
    { cat /etc/$file; echo 'libvirt-qemu:x:64055:64055::/:/bin/false'; } > "$1/$file"
    mount --bind "$1/$file" /etc/$file
done
umount -R -l /sys/fs/cgroup 2>/dev/null || true
echo "${1##*-}" > /proc/sys/kernel/hostname     # migration refuses a host of the same name
set +e
echo ready
cat > /dev/null
us=$(readlink /proc/$$/ns/mnt)
for round in $(seq 100); do
    found=
    for dir in /proc/[0-9]*; do
        pid=${dir#/proc/}
        [ $pid != $$ ] && [ "$(readlink $dir/ns/mnt)" = "$us" ] && kill -9 $pid && found=1
    done
    [ $found ] || break
    sleep 0.05
done
rm -rf "$1"
"""
LIBVIRTD_CONF = """unix_sock_dir = "{dir}"
unix_sock_group = "{group}"
unix_sock_rw_perms = "0770"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "2:stderr"
host_uuid = "{uuid}"
"""
QEMU_CONF = """user = "root"
group = "root"
security_driver = "none"
seccomp_sandbox = 0
cgroup_controllers = []
namespaces = []
remember_owner = 0
stdio_handler = "file"
"""


class Libvirtd:
    """A private libvirtd in name spaces of its own; the host's libvirt and network are not seen.

    `uri` reaches it from outside, as root or as a member of `group`; `dir` has its socket, its
    log and the serial logs of the guests.
    """

    def __init__(self, group: str = 'root') -> None:
        self.dir = Path(tempfile.mkdtemp(prefix='vmmonitor-rig-', dir=CACHE.parent))
        self.dir.chmod(0o755)                   # for `group`
        self.uri = f'qemu+unix:///system?socket={self.dir}/libvirt-sock'
        self.process: subprocess.Popen[bytes] | None = None
        (self.dir / 'etc').mkdir()
        (self.dir / 'etc/qemu.conf').write_text(QEMU_CONF)
        (self.dir / 'etc/libvirtd.conf').write_text(
            LIBVIRTD_CONF.format(dir=self.dir, group=group, uuid=random_uuid()))
        # A session of its own: Ctrl-C in the terminal must not reach it.
        self.holder = subprocess.Popen(
            ['unshare', '-m', '-n', '-u', '--propagation', 'slave', 'sh', '-c', HOLDER,
             'rig-holder', str(self.dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd='/',
            start_new_session=True)
        atexit.register(self.close)
        if self.holder.stdout is None or self.holder.stdout.readline() != b'ready\n':
            self.close()
            raise RigError('cannot make a mount name space: needs root and CAP_SYS_ADMIN')

    def start(self) -> None:
        """Start libvirtd, again too after kill9() or stop(); return when it serves."""
        if self.alive():
            return
        with (self.dir / 'libvirtd.log').open('ab') as log:
            self.process = subprocess.Popen(
                ['nsenter', '-t', str(self.holder.pid), '-m', '-n', '-u', '-r',
                 '/usr/sbin/libvirtd', '-f', '/etc/libvirt/libvirtd.conf',
                 '-p', f'{self.dir}/libvirtd.pid'],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd='/',
                start_new_session=True, env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin'})
        wait_for('libvirtd listens', self.listens, 30, 0.01)
        self.virsh('list', timeout=60)          # it listens before it serves

    def listens(self) -> bool:
        """True if the socket takes connections; RigError if libvirtd has exited."""
        if not self.alive():
            raise RigError(f'libvirtd exited: {(self.dir / "libvirtd.log").read_text()[-2000:]}')
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(f'{self.dir}/libvirt-sock') == 0

    def alive(self) -> bool:
        """True if the daemon's process runs."""
        return self.process is not None and self.process.poll() is None

    def kill9(self) -> None:
        """Kill libvirtd as a crash would; the guests go on."""
        if self.process:
            self.process.kill()
            self.process.wait(10)

    def stop(self) -> None:
        """End libvirtd as `systemctl stop` would (SIGTERM); the guests go on."""
        if self.process:
            self.process.terminate()
            self.process.wait(30)

    def close(self) -> None:
        """End libvirtd and all guests, and remove every trace of them."""
        atexit.unregister(self.close)
        if self.holder.stdin and self.holder.stdout:
            self.holder.stdin.close()
            self.holder.wait(30)
            self.holder.stdout.close()
        if self.process:
            self.process.wait(10)
        shutil.rmtree(self.dir, ignore_errors=True)     # if the holder did not come so far

    def guest_log(self, name: str) -> str:
        """Return libvirt's log of a guest."""
        return run('nsenter', '-t', str(self.holder.pid), '-m', 'cat',
                   f'/var/log/libvirt/qemu/{name}.log', timeout=10)

    def virsh(self, *args: str, timeout: float = 60) -> str:
        """Run `virsh -c URI ...` and return what it prints; RigError with its stderr."""
        return run('virsh', '-c', self.uri, *args, timeout=timeout).strip()


# === Guests =====================================================================================
# "nokaslr ... noreplace-smp" take a third off the boot under TCG.  Without no_timer_check a busy
# host makes the kernel panic.  HPET, since a TSC calibrated on a busy host would make clocks drift.
CMDLINE = ('console=ttyS0 quiet panic=-1 nokaslr cryptomgr.notests initcall_blacklist='
           'crypto_kdf108_init,init_kprobe_trace,load_system_certificate_list noreplace-smp '
           'no_timer_check clocksource=hpet')
DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  {uuid}
  <memory unit='MiB'>{memory}</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  {clock}
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <pm><suspend-to-mem enabled='yes'/><suspend-to-disk enabled='no'/></pm>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <video><model type='none'/></video>
    <serial type='file'><source path='{dir}/{name}.serial'/></serial>
    {devices}
  </devices>
</domain>
"""
# Directly on the root bus: behind a root port of its own the guest finds it later.
CHANNEL = """<controller type='virtio-serial' index='0'>
      <address type='pci' bus='0' slot='4'/></controller>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"""
DISK = """<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
      <source file='{path}'/><target dev='vda' bus='virtio'/></disk>"""


class Vm:
    """A guest on a `Libvirtd`.

    `cmdline` may have `nohwclock` (no /sbin/hwclock, so guest-set-time is not supported), `noga`
    (channel but no agent) and `gablock=COMMAND,...` (commands that the agent refuses).
    `memory` is in MiB.  `disk` adds a 64 MiB qcow2, which internal snapshots need.
    """

    def __init__(self, host: Libvirtd, name: str, *, cmdline: str = '', channel: bool = True,
                 memory: int = 112, uuid: str | None = None, disk: bool = False,
                 clock: str = "<clock offset='utc'/>") -> None:
        self.host, self.name, self.memory, self.uuid = host, name, memory, uuid
        self.cmdline, self.channel = f'{CMDLINE} {cmdline}', channel
        self.clock = clock
        self.disk = host.dir / f'{name}.qcow2' if disk else None

    def xml(self) -> str:
        """Return the domain XML."""
        kernel, initramfs = guest_image()
        devices = [CHANNEL] * self.channel + [DISK.format(path=self.disk)] * bool(self.disk)
        return DOMAIN.format(
            name=self.name, uuid=f'<uuid>{self.uuid}</uuid>' if self.uuid else '',
            memory=self.memory, kernel=kernel, initramfs=initramfs, cmdline=self.cmdline,
            dir=self.host.dir, clock=self.clock, devices='\n    '.join(devices))

    def define(self) -> None:
        """Define the domain, with a new disk if it has one."""
        if self.disk:
            run('qemu-img', 'create', '-q', '-f', 'qcow2', str(self.disk), '64M', timeout=60)
        path = self.host.dir / f'{self.name}.xml'
        path.write_text(self.xml())
        self.host.virsh('define', str(path))

    def start(self) -> None:
        """Start the guest; wait_agent() tells when it is up."""
        self.virsh('start')

    def virsh(self, command: str, *args: str, timeout: float = 60) -> str:
        """Run `virsh COMMAND NAME ...`; RigError with its stderr if it fails."""
        return self.host.virsh(command, self.name, *args, timeout=timeout)

    def state(self) -> str:
        """Return the state in virsh's words (`virsh domstate`)."""
        return self.virsh('domstate')

    def wait_state(self, state: str, timeout: float = 20) -> float:
        """Wait until the guest is in that state; return the seconds it took."""
        return wait_for(f'{self.name} {state}', lambda: self.state() == state, timeout, 0.02)

    def pid(self) -> int:
        """Return the process id of the guest's QEMU."""
        root = Path(f'/proc/{self.host.holder.pid}/root')
        return int((root / f'run/libvirt/qemu/{self.name}.pid').read_text())

    def agent(self, command: dict[str, Any], timeout: int = 10) -> Any:
        """Send a command to the agent (`virsh qemu-agent-command`); return its `return`."""
        reply = self.virsh('qemu-agent-command', '--timeout', str(timeout), json.dumps(command),
                           timeout=timeout + 30)
        return json.loads(reply)['return']

    def answers(self) -> bool:
        """True if the agent answers guest-ping."""
        with contextlib.suppress(RigError), agent_link(self.host.uri, self.name) as ask:
            return 'return' in ask('{"execute": "guest-ping"}', 5)
        return False

    def wait_agent(self, timeout: float = 60) -> float:
        """Wait until the agent answers; return the seconds it took."""
        return wait_for(f'agent of {self.name}', self.answers, timeout)

    def offset(self, samples: int = 5, timeout: int = 10) -> float:
        """Return guest time minus host time in seconds: of some samples the tightest one."""
        best = (float('inf'), 0.0)
        with agent_link(self.host.uri, self.name) as ask:
            for _ in range(samples):
                before = time.time_ns()
                reply = ask('{"execute": "guest-get-time"}', timeout)
                after = time.time_ns()
                middle = (before + after) // 2
                best = min(best, (after - before, (json.loads(reply)['return'] - middle) / 1e9))
        return best[1]

    def exec(self, argv: list[str], timeout: float = 20) -> tuple[int, str]:
        """Run a program in the guest (guest-exec); return exit code, stdout and stderr."""
        status = self.agent({'execute': 'guest-exec', 'arguments': {
            'path': argv[0], 'arg': argv[1:], 'capture-output': True}})
        ask = {'execute': 'guest-exec-status', 'arguments': {'pid': status['pid']}}

        def exited() -> bool:
            status.update(self.agent(ask))
            return bool(status['exited'])

        wait_for(f'{self.name}: {argv}', exited, timeout)
        out = (base64.b64decode(status.get(key, '')) for key in ('out-data', 'err-data'))
        return status.get('exitcode', -1), b''.join(out).decode(errors='replace')

    def freeze_agent(self, seconds: float) -> None:
        """Stop the agent's process (SIGSTOP) and let it go on after `seconds`."""
        script = f'kill -STOP $pid; sleep {seconds}; kill -CONT $pid'
        self.exec(['sh', '-c', f'pid=$(pidof qemu-ga); (sleep 0.3; {script}) >/dev/null 2>&1 &'])
        time.sleep(0.6)     # twice the 0.3 s in which the agent gives its answer to the exec

    def skew(self, seconds: int) -> None:
        """Put the guest's clock that much off the host's, up to a second less (`date -s`)."""
        code, out = self.exec(['date', '-u', '-s', f'@{int(time.time()) + seconds}'])
        if code:
            raise RigError(f'{self.name}: date: {out}')

    def skew_by_pause(self, seconds: float) -> None:
        """Pause the guest, and let it go on after `seconds`."""
        self.virsh('suspend')
        time.sleep(seconds)
        self.virsh('resume')

    def destroy(self) -> None:
        """Cut the power, if it is on."""
        with contextlib.suppress(RigError):
            self.virsh('destroy')

    def undefine(self) -> None:
        """Remove the domain with its saved state, snapshots and disk."""
        self.virsh('undefine', '--managed-save', '--snapshots-metadata')
        if self.disk:
            self.disk.unlink()


# === configuration ==============================================================================

CERT_ARGS = ('openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256',
             '-days', '30', '-subj', '/CN=localhost', '-addext',
             'subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1')
KEY = 'k' * 32                  # the main key in the tests' configurations
OTHER_KEY = 'o' * 32


def make_certificate(directory: Path, name: str = 'cert', password: str = '') -> None:
    """Make DIRECTORY/NAME.pem and NAME.key by openssl."""
    secret = ['-passout', f'pass:{password}'] if password else ['-nodes']
    subprocess.run([*CERT_ARGS, *secret, '-keyout', str(directory / f'{name}.key'),
                    '-out', str(directory / f'{name}.pem')], check=True, timeout=30,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def merged(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries, the second laid over the first."""
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


class TempCase(unittest.TestCase):
    """A test with a directory of its own, and a certificate in it."""

    directory: Path
    GOOD: dict[str, Any] = {
        'listener': {'enabled': True, 'port': 10000, 'key': KEY, 'certificate': {
            'path': 'cert.pem', 'keyPath': 'cert.key', 'password': None}},
        'monitor': {'enabled': True}, 'startup': {'enabled': False, 'vmStartupCommands': []}}

    @classmethod
    def setUpClass(cls) -> None:
        cls.directory = Path(tempfile.mkdtemp(prefix='vmmonitor-test-'))
        cls.addClassCleanup(shutil.rmtree, cls.directory)
        make_certificate(cls.directory)

    def write(self, *changes: Mapping[str, Any], name: str = 'config.json') -> str:
        """Write a configuration, GOOD with `changes`, and return its path."""
        tree = self.GOOD
        for change in changes:
            tree = merged(tree, change)
        return self.write_text(json.dumps(tree), name)

    def write_text(self, text: str, name: str = 'config.json') -> str:
        """Write a file and return its path."""
        path = self.directory / name
        path.write_text(text)
        path.chmod(0o600)
        return str(path)


class ConfigTest(TempCase):
    """load(): what is taken, and why the rest is refused."""

    BAD: tuple[tuple[dict[str, Any], str], ...] = (
        ({'listener': {'prt': 1}}, 'listener.prt: unknown; did you mean listener.port?'),
        ({'monitor': {'enable': True}}, 'monitor.enable: unknown; did you mean monitor.enabled?'),
        ({'zzz': 1}, 'zzz: unknown; remove it'),
        ({'listener': 5}, 'listener: must be an object'),
        ({'listener': {'port': '10000'}}, 'listener.port: must be a whole number from 1 to 65535'),
        ({'listener': {'port': 1.5}}, 'listener.port: must be a whole number'),
        ({'listener': {'port': True}}, 'listener.port: must be a whole number'),
        ({'listener': {'address': 'localhost'}}, 'listener.address: must be an IPv4 or IPv6'),
        ({'monitor': {'enabled': 'yes'}}, 'monitor.enabled: must be true or false'),
        ({'monitor': {'toleranceMs': 0}}, 'monitor.toleranceMs: must be a number from 0.1 to'),
        ({'monitor': {'exclude': 'web1'}}, 'monitor.exclude: must be a list of strings'),
        ({'libvirt': {'uri': 'qemu:///system\n'}}, 'libvirt.uri: must be a string without control'),
        ({'listener': {'key': ''}}, 'listener.key: missing; put in what'),
        ({'listener': {'key': 'CHANGE-ME'}}, 'listener.key: still the sample\'s'),
        ({'listener': {'keyFile': 'x'}}, 'listener.keyFile: there is a listener.key too'),
        ({'listener': {'key': '', 'keyFile': 'nokey'}}, 'nokey: No such file or directory'),
        ({'listener': {'keys': [{'name': 'a', 'key': OTHER_KEY, 'tragets': []}]}},
         'listener.keys: [0]: unknown key \'tragets\''),
        ({'listener': {'keys': [{'name': 'a'}]}}, '[0] (a): needs one of "key" and "keyFile"'),
        ({'listener': {'keys': [{'name': 'a', 'key': OTHER_KEY, 'commands': ['fly']}]}},
         '[0]: needs a "name", and "commands" out of start'),
        ({'listener': {'keys': [{'name': 'main', 'key': OTHER_KEY}]}}, 'needs a name of its own'),
        ({'listener': {'keys': [{'name': 'a', 'key': KEY}]}}, 'two entries have the same key'),
        ({'listener': {'certificate': {'path': ''}}}, 'listener.certificate.path: missing'),
        ({'listener': {'certificate': {'path': 'none.pem'}}}, 'none.pem: no such file'),
        ({'listener': {'certificate': {'keyPath': 'config.json'}}}, 'both must be PEM'),
        ({'startup': {'vmStartupCommands': ['start']}}, 'line 1: \'start\' is not understood'),
        ({'startup': {'vmStartupCommands': ['', '#', 'delay soon']}}, 'line 3: \'delay soon\''),
        ({'startup': {'vmStartupCommands': ['start a b']}}, 'names with spaces in quotes'),
        ({'startup': {'vmStartupCommands': ['start "a']}}, 'No closing quotation'),
        ({'startup': {'vmStartupCommands': ['wait a agent 5 6']}}, 'line 1: \'wait a agent 5 6\''),
        ({'startup': {'vmStartupCommands': ['wait a -1']}}, 'no number of seconds'),
        ({'startup': {'vmStartupCommands': ['delay nan']}}, 'no number of seconds'),
        ({'startup': {'vmStartupCommands': ['suspend a']}}, 'line 1: \'suspend a\''),
    )

    def test_each_problem_is_named(self) -> None:
        for change, reason in self.BAD:
            with self.subTest(reason=reason):
                with self.assertRaises(vm.ConfigError) as caught:
                    vm.load(self.write(change))
                self.assertEqual(len(caught.exception.problems), 1, caught.exception.problems)
                self.assertIn(reason, caught.exception.problems[0])

    def test_all_problems_at_once(self) -> None:
        path = self.write(*(change for change, _ in (self.BAD[0], self.BAD[1], self.BAD[24])))
        with self.assertRaises(vm.ConfigError) as caught:
            vm.load(path)
        self.assertEqual(len(caught.exception.problems), 3)

    def test_files_that_are_no_json(self) -> None:
        for text, reason in (
                ('{"monitor": {', 'not JSON: Expecting property name enclosed in double quotes: '
                 'line 1 column 14'),
                ('[]', 'must be an object'), ('[' * 100000, 'nested too deeply'),
                ('{"monitor": {"enabled": true, "enabled": false}}', '\'enabled\' stands twice')):
            with self.subTest(reason=reason):
                with self.assertRaises(vm.ConfigError) as caught:
                    vm.load(self.write_text(text))
                self.assertIn(reason, caught.exception.problems[0])
        with self.assertRaisesRegex(vm.ConfigError, 'no such file; copy config.json.sample'):
            vm.load(str(self.directory / 'absent.json'))

    def test_an_old_file_works_unchanged(self) -> None:
        text = '''{"listener": {"enabled": true, "port": 10000, "certificate": {"path": "cert.pem",
            "keyPath": "cert.key", "password": null}, "key": "%s", "commandsEnabled": {"wake": true,
            "save": true, "start": true, "stop": false}}, "monitor": {"enabled": true}, "startup":
            {"enabled": true, "vmStartupCommands": ["start vm1", "  start vm2 ", "delay 5", "#",
            "", "start vm3"]}}''' % KEY
        config = vm.load(self.write_text(text))
        self.assertEqual([(step.number, step.verb, step.name, step.seconds)
                          for step in config.steps],
                         [(1, 'start', 'vm1', 0), (2, 'start', 'vm2', 0), (3, 'delay', '', 5),
                          (6, 'start', 'vm3', 0)])
        self.assertEqual((config.allows('save'), config.allows('stop')), (True, False))
        self.assertEqual(vm.enabled_roles(config), ['monitor', 'startup', 'listen'])
        self.assertEqual(config.warnings, ())

    def test_startup_lines(self) -> None:
        for line, step in (('wait a', (1, 'wait', 'a', vm.WAIT_DEFAULT, 'agent')),
                           ('wait a running', (1, 'wait', 'a', vm.WAIT_DEFAULT, 'running')),
                           ('wait a 2.5', (1, 'wait', 'a', 2.5, 'agent')),
                           ('wait "my vm" agent 9', (1, 'wait', 'my vm', 9, 'agent')),
                           ('start \'my vm\'  # first', (1, 'start', 'my vm', 0, '')),
                           ('delay 0.25', (1, 'delay', '', 0.25, ''))):
            with self.subTest(line=line):
                self.assertEqual(vm.read_step(1, line), step)

    def test_warnings(self) -> None:
        path = self.write({'listener': {'key': 'short'}})
        os.chmod(path, 0o644)
        key = self.directory / 'cert.key'
        os.chmod(key, 0o644)
        self.addCleanup(os.chmod, key, 0o600)
        warnings = ' | '.join(vm.load(path).warnings)
        for reason in ('can be guessed', 'everybody may read it; chmod o-r', 'private key'):
            self.assertIn(reason, warnings)
        os.chmod(path, 0o640)
        self.assertNotIn('holds a key', ' | '.join(vm.load(path).warnings))

    def test_key_files_and_encrypted_key(self) -> None:
        make_certificate(self.directory, 'locked', 'open sesame')
        self.write_text(OTHER_KEY + '\n', 'other.key')
        change = {'listener': {
            'key': '', 'keyFile': 'other.key', 'certificate': {
                'path': 'locked.pem', 'keyPath': 'locked.key', 'password': 'open sesame'}}}
        config = vm.load(self.write(change))
        self.assertEqual([key.name for key in config.keys], ['main'])
        self.assertEqual(config.keys[0].digest, hashlib.sha256(OTHER_KEY.encode()).digest())
        for wrong in ('', 'wrong'):
            with self.assertRaisesRegex(vm.ConfigError, 'certificate.password open the key'):
                vm.load(self.write(change, {'listener': {'certificate': {'password': wrong}}}))

    def test_secrets_stay_out_of_repr(self) -> None:
        config = vm.load(self.write({'listener': {
            'keys': [{'name': 'a', 'key': OTHER_KEY}], 'certificate': {'password': 'pass-word'}}}))
        for secret in (KEY, OTHER_KEY, 'pass-word'):
            self.assertNotIn(secret, repr(config))

    def test_roles_decide_what_must_be_there(self) -> None:
        path = self.write({'listener': {'enabled': False, 'key': '', 'certificate': {'path': ''}}})
        self.assertEqual(vm.load(path).keys, ())
        with self.assertRaisesRegex(vm.ConfigError, 'listener.key: missing'):
            vm.load(path, ['listen'])

    def test_sample_and_readme_name_the_options(self) -> None:
        here = Path(vm.__file__).parent
        with self.assertRaises(vm.ConfigError) as caught:
            vm.load(str(here / 'config.json.sample'))
        problems = [problem.partition(': ')[0] for problem in caught.exception.problems]
        self.assertEqual(problems, ['listener.key', 'listener.certificate'])
        readme = (here / 'README.md').read_text()
        for key, (attribute, row) in vm.OPTIONS.items():
            default = getattr(vm.Config(), attribute)
            shown = json.dumps(list(default) if isinstance(default, tuple) else default)
            self.assertIn(f'| `{key}` | `{shown}` | {row.help} |', readme)


# === words and log ==============================================================================

class WordsTest(unittest.TestCase):
    """One line for every problem, and no line that something from outside could forge."""

    def test_words(self) -> None:
        self.assertEqual(vm.words(vm.Error('it broke', 'mend it')), 'it broke; mend it')
        self.assertEqual(vm.words(FileNotFoundError(2, 'No such file', '/x')), '/x: No such file')
        self.assertEqual(vm.words(KeyError('x')), 'KeyError: \'x\'')

    def test_printable(self) -> None:
        self.assertEqual(vm.printable('a\nb\x1b[2Jc\u2028d\u202ee'),
                         'a\\nb\\x1b[2Jc\\u2028d\\u202ee')
        self.assertEqual(vm.printable('größe 100 € 🖥'), 'größe 100 € 🖥')

    def test_log_formats(self) -> None:
        def record(level: int, text: str, exc_info: Any = None) -> logging.LogRecord:
            return logging.LogRecord('vmmonitor', level, __file__, 1, text, (), exc_info)
        journal, terminal = vm.LogFormat(True), vm.LogFormat(False)
        self.assertEqual(journal.format(record(logging.WARNING, 'a\n<0>b')), '<4>a\\n<0>b')
        self.assertRegex(terminal.format(record(logging.INFO, 'x')), r'^\d\d:\d\d:\d\d\.\d{3} info')
        try:
            raise ValueError('bug')
        except ValueError:
            lines = journal.format(record(logging.ERROR, 'x', sys.exc_info())).splitlines()
        self.assertTrue(len(lines) > 2 and all(line.startswith('<3>') for line in lines), lines)

    def test_a_thread_that_dies_is_logged(self) -> None:
        with self.assertLogs('vmmonitor', 'ERROR') as logged:
            vm.spawn('doomed', lambda: 1 // 0).join()
        self.assertIn('doomed: unexpected error', logged.output[0])


# === wire =======================================================================================

class Peer:
    """A unix-socket server whose behaviour a test scripts: the peer that misbehaves."""

    def __init__(self, case: unittest.TestCase, serve: Callable[[socket.socket], None]) -> None:
        directory = tempfile.mkdtemp(prefix='vmmonitor-test-')
        case.addCleanup(shutil.rmtree, directory)
        self.path = os.path.join(directory, 'peer.sock')
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(8)
        case.addCleanup(self.listener.close)
        self.received: list[bytes] = []
        self.serve = serve
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                self.serve(connection)


GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


def answering(*replies: bytes, greeting: bytes = GREETING) -> Callable[[socket.socket], None]:
    """Return a QMP peer that greets, accepts the capabilities, then gives `replies` in turn;
    ID in a reply stands for the command's id."""
    def serve(connection: socket.socket) -> None:
        connection.sendall(greeting)
        stream = connection.makefile('rb')
        for reply in (b'{"return": {}, "id": ID}\r\n', *replies):
            line = stream.readline()
            if not line:
                return
            serial = str(json.loads(line)['id']).encode()
            for part in reply.replace(b'ID', serial).split(b'PAUSE'):
                connection.sendall(part)
                time.sleep(0.02)
        stream.read()
    return serve


class QmpTest(unittest.TestCase):
    """The QMP client against peers that behave badly; a real QEMU is in MachineSocketTest."""

    GOOD = (
        ('split', b'{"retPAUSEurn": {"status": "runPAUSEning"}, "id": IPAUSED}\r\n'.replace(
            b'IPAUSED', b'ID')),
        ('joined with an event', b'{"event": "RESUME", "timestamp": {}}\r\n'
         b'{"return": {"status": "running"}, "id": ID}\r\n{"event": "STOP"}\r\n'),
        ('late answer to an earlier command', b'{"return": {}, "id": 0}\r\n'
         b'{"return": {"status": "running"}, "id": ID}\r\n'))
    BAD = (
        ('closed', b'', vm.PeerClosed, 'closed by its other end'),
        ('half a line', b'{"return": ', vm.PeerClosed, 'closed by its other end'),
        ('not JSON', b'hello\r\n', vm.ProtocolError, 'not a JSON object: b\'hello\''),
        ('not an object', b'[1]\r\n', vm.ProtocolError, 'not a JSON object'),
        ('too deep', b'[' * 50000 + b'\r\n', vm.ProtocolError, 'not a JSON object'),
        ('not UTF-8', b'{"return": "\xff"}\r\n', vm.ProtocolError, 'not a JSON object'),
        ('no answer', b'{"id": ID}\r\n', vm.ProtocolError, 'no answer'),
        ('error', b'{"error": {"class": "GenericError", "desc": "no such node"}, "id": ID}\r\n',
         vm.ReplyError, 'GenericError: no such node'),
        ('odd error', b'{"error": 7, "id": ID}\r\n', vm.ReplyError, '7'))

    def test_good_answers(self) -> None:
        for name, reply in self.GOOD:
            with self.subTest(name), vm.QMP(Peer(self, answering(reply)).path) as qmp:
                self.assertEqual(qmp.execute('query-status'), {'status': 'running'})

    def test_bad_answers(self) -> None:
        for name, reply, kind, reason in self.BAD:
            peer = Peer(self, answering(reply) if reply else answering())
            if name in ('closed', 'half a line'):
                peer.serve = closing(reply)
            with self.subTest(name), vm.QMP(peer.path) as qmp:
                with self.assertRaises(kind) as caught:
                    qmp.execute('query-block', timeout=2)
                self.assertIs(type(caught.exception), kind)
                self.assertIn(reason, str(caught.exception))

    def test_silent_and_busy(self) -> None:
        with vm.QMP(Peer(self, answering()).path) as qmp, \
                self.assertRaisesRegex(vm.PeerSilent, 'did not answer in time'):
            qmp.execute('query-status', timeout=0.2)
        quiet = Peer(self, lambda connection: time.sleep(1))
        with self.assertRaises(vm.PeerSilent) as caught:
            vm.QMP(quiet.path, timeout=0.2)
        self.assertIn('another program has this monitor open', caught.exception.hint)
        with self.assertRaisesRegex(vm.ProtocolError, 'no QMP greeting'):
            vm.QMP(Peer(self, answering(greeting=b'{"hello": 1}\r\n')).path)
        with self.assertRaises(vm.PeerClosed) as closed:
            vm.QMP('/nonexistent/qmp.sock')
        self.assertIn('No such file', str(closed.exception))

    def test_events(self) -> None:
        events = b''.join(b'{"event": "E%d", "n": %d}\r\n' % (n % 3, n) for n in range(9))
        with vm.QMP(Peer(self, answering(events + b'{"return": 1, "id": ID}\r\n')).path) as qmp:
            self.assertEqual(qmp.execute('x'), 1)
            self.assertEqual(qmp.event(['E2'], 1)['n'], 2)
            self.assertEqual(qmp.event(['E0', 'E2'], 1)['n'], 3)
            with self.assertRaises(vm.PeerSilent):
                qmp.event(['NEVER'], 0.2)


def closing(last_words: bytes) -> Callable[[socket.socket], None]:
    """Return a QMP peer that closes after the first command, in the middle of `last_words`."""
    def serve(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        stream = connection.makefile('rb')
        serial = str(json.loads(stream.readline())['id']).encode()
        connection.sendall(b'{"return": {}, "id": ' + serial + b'}\r\n')
        stream.readline()
        connection.sendall(last_words)
    return serve


def agent_peer(answer: Callable[[dict[str, Any]], bytes], stale: bytes = b'',
               sync: bool = True) -> Callable[[socket.socket], None]:
    """Return a guest agent that writes `stale` first, answers guest-sync-delimited, and every
    other command by `answer`."""
    def serve(connection: socket.socket) -> None:
        connection.sendall(stale)
        stream = connection.makefile('rb')
        while True:
            line = stream.readline()
            if not line:
                return
            if line.startswith(b'\xff'):
                connection.sendall(b'{"error": {"class": "GenericError", "desc": "JSON parse"}}\n')
            command = json.loads(line.lstrip(b'\xff'))
            if command['execute'] != 'guest-sync-delimited':
                connection.sendall(answer(command))
            elif sync:
                connection.sendall(b'\xff{"return": %d}\n' % command['arguments']['id'])
    return serve


class AgentWireTest(unittest.TestCase):
    """The guest-agent client against agents that behave badly."""

    def ask(self, serve: Callable[[socket.socket], None], timeout: float = 0.5) -> Any:
        return vm.GuestAgent(Peer(self, serve).path, 'web1').execute('guest-get-time', {}, timeout)

    def test_answer(self) -> None:
        def answer(command: dict[str, Any]) -> bytes:
            self.assertEqual(command, {'execute': 'guest-get-time', 'arguments': {}})
            return b'{"return": 5}\n'
        self.assertEqual(self.ask(agent_peer(answer)), 5)

    def test_late_answers_of_others_are_skipped(self) -> None:
        stale = b'{"return": 1}\n{"return": 99}\n\xff{"return": 7}\ngarbage'
        self.assertEqual(self.ask(agent_peer(lambda _: b'{"return": 5}\n', stale)), 5)

    def test_troubles(self) -> None:
        for serve, trouble in (
                (agent_peer(lambda _: b'', sync=False), 'silent'),
                (agent_peer(lambda _: b''), 'silent'),
                (lambda connection: None, 'not connected'),
                (agent_peer(lambda _: b'{"error": {"class": "CommandNotFound", "desc": '
                            b'"The command guest-get-time has not been found"}}\n'), 'blocked'),
                (agent_peer(lambda _: b'{"error": {"class": "GenericError", "desc": '
                            b'"the agent is in frozen state"}}\n'), 'frozen'),
                (agent_peer(lambda _: b'{"error": {"class": "GenericError", "desc": '
                            b'"odd"}}\n'), 'refused')):
            with self.subTest(trouble):
                with self.assertRaises(vm.AgentError) as caught:
                    self.ask(serve)
                self.assertEqual(caught.exception.trouble.name, trouble)
                self.assertTrue(str(caught.exception).startswith('web1: '))


# === clock, with agents that can't be had =======================================================

class ScriptedGuest(vm.Guest):
    """A guest whose clock and agent a test scripts: a Windows agent, one that lies, one that
    hangs. Its clock is the host's plus `offset` ns."""

    def __init__(self, name: str = 'web1', offset: int = -3 * vm.SECOND) -> None:
        self.name, self.id = name, f'id-of-{name}'
        self.offset = offset
        self.calls: list[str] = []
        self.explicit = self.hardware = self.date = ''      # the error of each way to set it
        self.sets_anyway = False                            # errors, but the time is set
        self.delay = 0.0                                    # seconds one way
        self.troubles: list[str] = []                       # of the next agent calls
        self.condition = vm.State.RUNNING

    def state(self) -> vm.State:
        return self.condition

    def start(self) -> str:
        self.calls.append('start')
        return 'started'

    def stop(self) -> str:
        return 'asked to shut down'

    def agent_state(self) -> str:
        return 'connected'

    def agent(self, command: str, arguments: Mapping[str, Any] | None = None,
              timeout: int = 5) -> Any:
        arguments = arguments or {}
        self.calls.append(command)
        time.sleep(self.delay)
        if self.troubles:
            raise vm.agent_error(self.name, self.troubles.pop(0))
        if command == 'guest-get-time':
            now = time.time_ns() + self.offset
            time.sleep(self.delay)
            return now
        if command == 'guest-exec':
            error, when = self.date, int(arguments['arg'][-1][1:]) * vm.SECOND
        elif command == 'guest-set-time':
            error = self.explicit if arguments else self.hardware
            when = arguments.get('time', time.time_ns() - vm.SECOND // 2)
        else:
            return {'exited': True, 'exitcode': 0}
        if not error or self.sets_anyway:
            self.offset = when - time.time_ns()
        if error:
            raise vm.agent_error(self.name, error)
        return {'pid': 1} if command == 'guest-exec' else {}


NO_HWCLOCK = 'this feature or command is not currently supported'
TOLERANCE = 5 * vm.MS


class ClockTest(unittest.TestCase):
    """correct() against what agents of other systems and versions answer."""

    def test_explicit_time(self) -> None:
        guest = ScriptedGuest()
        result = vm.correct(guest, TOLERANCE, False)
        self.assertLess(abs(guest.offset), TOLERANCE)
        self.assertEqual(result.method, 'guest-set-time')
        self.assertAlmostEqual(result.before / vm.SECOND, -3, 1)
        self.assertEqual(guest.calls[:2], ['guest-get-time', 'guest-set-time'])

    def test_the_way_is_allowed_for(self) -> None:
        guest = ScriptedGuest()
        guest.delay = 0.05
        vm.correct(guest, TOLERANCE, False)
        self.assertLess(abs(guest.offset), TOLERANCE)

    def test_right_clock_is_left_alone(self) -> None:
        guest = ScriptedGuest(offset=2 * vm.MS)
        result = vm.correct(guest, TOLERANCE, True)
        self.assertEqual((result.method, result.after), ('', result.before))
        self.assertEqual(set(guest.calls), {'guest-get-time'})

    def test_error_with_a_right_clock_is_a_success(self) -> None:
        guest = ScriptedGuest()
        guest.explicit, guest.sets_anyway = 'hwclock failed to set hardware clock', True
        result = vm.correct(guest, TOLERANCE, False)
        self.assertLess(abs(result.after), TOLERANCE)
        self.assertIn('install hwclock in the guest', result.warning)
        self.assertEqual(guest.calls.count('guest-set-time'), 1)

    def test_success_with_a_wrong_clock_is_none(self) -> None:
        guest = ScriptedGuest()
        guest.agent = lambda command, arguments=None, timeout=5: (      # type: ignore[method-assign]
            time.time_ns() - vm.SECOND if command == 'guest-get-time' else {})
        with self.assertRaisesRegex(vm.ClockError, r'still off by -1000\.\dms, was -1000'):
            vm.correct(guest, TOLERANCE, False)

    def test_date_only_where_allowed(self) -> None:
        guest = ScriptedGuest()
        guest.explicit = guest.hardware = NO_HWCLOCK
        with self.assertRaises(vm.AgentError) as caught:
            vm.correct(guest, TOLERANCE, False)
        self.assertEqual(caught.exception.trouble.name, 'no hwclock')
        self.assertIn('util-linux-extra', vm.words(caught.exception))
        self.assertNotIn('guest-exec', guest.calls)
        result = vm.correct(guest, TOLERANCE, True)
        self.assertEqual(result.method, 'guest-exec-date')
        self.assertLess(abs(guest.offset), TOLERANCE)

    def test_windows_without_its_time_service(self) -> None:
        guest = ScriptedGuest()
        guest.explicit = 'Failed to set time: the RPC server is unavailable'
        guest.hardware = 'Windows Time service not running on the guest'
        with self.assertRaises(vm.AgentError) as caught:
            vm.correct(guest, TOLERANCE, False)
        self.assertIn('RPC server', str(caught.exception))
        self.assertEqual(vm.agent_error('x', guest.hardware).trouble.name, 'no w32time')

    def test_texts_of_agents(self) -> None:
        for text, trouble in (
                ('argument unsupported: QEMU guest agent is not configured', 'no channel'),
                ('Guest agent is not responding: QEMU guest agent is not connected',
                 'not connected'),
                ('Guest agent is not responding: Guest agent not available for now', 'silent'),
                ('internal error: End of file from agent socket', 'not connected'),
                ('Guest agent is not responding: QEMU guest agent is not available due to an '
                 'error', 'silent'),
                ('Timed out during operation: cannot acquire state change lock (held by '
                 'agent=remoteDispatchDomainFsfreeze)', 'busy'),
                ('internal error: unable to execute QEMU agent command \'guest-set-time\': this '
                 'feature or command is not currently supported', 'no hwclock'),
                ('hwclock: select() to /dev/rtc0 to wait for clock tick timed out', 'no hwclock'),
                ('Command guest-set-time has been disabled: the agent is in frozen state',
                 'frozen'),
                ('The command guest-set-time has been disabled for this instance', 'blocked'),
                ('The command guest-set-time has not been found', 'blocked')):
            with self.subTest(text):
                error = vm.agent_error('web1', text)
                self.assertEqual(error.trouble.name, trouble)
                self.assertTrue(error.hint)

    def test_waits_for_the_agent(self) -> None:
        guest = ScriptedGuest()
        guest.troubles = ['Guest agent is not responding: QEMU guest agent is not connected'] * 5
        began = time.monotonic()
        result = vm.synchronise(guest, vm.Config(), 'restored', began, threading.Event())
        self.assertEqual(result.cause, 'restored')
        self.assertLess(abs(guest.offset), TOLERANCE)
        self.assertTrue(0.1 < result.right < 2, result.right)
        self.assertGreaterEqual(result.proved, result.right)

    def test_gives_up(self) -> None:
        guest = ScriptedGuest()
        guest.troubles = ['not connected'] * 1000
        began = time.monotonic()
        with self.assertRaisesRegex(vm.AgentError, 'not connected'):
            vm.synchronise(guest, vm.Config(agent_wait=1), '', began, threading.Event())
        self.assertTrue(1 <= time.monotonic() - began < 3)
        guest.troubles = ['QEMU guest agent is not configured']
        with self.assertRaisesRegex(vm.AgentError, 'no guest agent channel'):
            vm.synchronise(guest, vm.Config(), '', began, threading.Event())

    def test_a_nudge_cuts_the_pause_short(self) -> None:
        guest, nudge = ScriptedGuest(), threading.Event()
        guest.troubles = ['not connected'] * 14         # the pauses are 2 s by then

        def answer() -> None:
            guest.troubles.clear()
            nudge.set()
        threading.Timer(0.5, answer).start()
        began = time.monotonic()
        vm.synchronise(guest, vm.Config(), '', began, nudge)
        self.assertLess(time.monotonic() - began, 1.0)

    def test_odd_answers(self) -> None:
        for answer in ('soon', True, None, [1], {'time': 1}):
            guest = ScriptedGuest()
            guest.agent = lambda *_, answer=answer: answer      # type: ignore[method-assign]
            with self.subTest(answer=answer), self.assertRaisesRegex(vm.AgentError, 'get-time ret'):
                vm.correct(guest, TOLERANCE, True)

    def test_span(self) -> None:
        for offset, text in ((0, '+0.0ms'), (-3_004_123_456, '-3004.1ms'),
                             (3600 * vm.SECOND, '+3600.000s')):
            self.assertEqual(vm.span(offset), text)

    def test_host_clock(self) -> None:
        then = vm.HostClock(1000 * vm.SECOND, 500 * vm.SECOND, 400 * vm.SECOND)

        def later(real: float, boot: float, monotonic: float) -> vm.HostClock:
            return vm.HostClock(then.real + round(real * vm.SECOND),
                                then.boot + round(boot * vm.SECOND),
                                then.monotonic + round(monotonic * vm.SECOND))
        for now, cause in ((later(1, 1, 1), ''), (later(60, 60, 1), 'host slept'),
                           (later(3, 1, 1), 'host clock stepped'),
                           (later(-3, 1, 1), 'host clock stepped'), (later(1.01, 1, 1), '')):
            self.assertEqual(now.jump_since(then), cause)
        now = vm.HostClock.now()
        self.assertEqual(vm.HostClock.now().jump_since(now), '')


class ScriptedHost(vm.Host):
    """A host of scripted guests, with no libvirt behind it."""

    def __init__(self, *guests: vm.Guest) -> None:
        super().__init__('scripted:///')
        self.guests = {guest.name: guest for guest in guests}
        self.up.set()

    def find(self, name: str) -> vm.Guest | None:
        return self.guests.get(name)

    def each(self, running: bool = False) -> list[vm.Guest]:
        return [guest for guest in self.guests.values()
                if not running or guest.state() is vm.State.RUNNING]


class MonitorTest(unittest.TestCase):
    """Events -> at most one job per guest."""

    def setUp(self) -> None:
        self.guest = ScriptedGuest()
        self.settings = vm.Settings(vm.Config(agent_wait=1))
        self.monitor = vm.Monitor(vm.Guests([ScriptedHost(self.guest)]), self.settings)
        vm.spawn('monitor', self.monitor._take_events)
        self.addCleanup(self.monitor.stop)

    def send(self, *kinds: str) -> None:
        for kind in kinds:
            self.monitor.events.put(vm.GuestEvent(self.guest, kind, time.monotonic()))

    def settle(self) -> None:
        """Wait until all events are taken and all jobs have ended."""
        done = vm.Deadline(10).poll(
            lambda: self.monitor.events.empty() and not self.monitor._jobs, 0.05)
        self.assertTrue(done, 'jobs go on for ever')
        time.sleep(0.05)

    def test_one_job_at_a_time_and_once_more(self) -> None:
        self.guest.delay = 0.05
        with self.assertLogs('vmmonitor', 'INFO') as logged:
            self.send('restored', *['resumed'] * 20, 'agent connected')
            self.settle()
        self.assertEqual(len(logged.output), 1, logged.output)
        self.assertIn('cause=restored before=-3', logged.output[0])
        once = 1 + vm.SAMPLES_MAX           # readings of a run that sets the clock
        self.assertEqual(self.guest.calls.count('guest-set-time'), 1)
        self.assertTrue(once < self.guest.calls.count('guest-get-time') <= 2 * once,
                        self.guest.calls)

    def test_no_triggers(self) -> None:
        self.send('booted', 'stopped')
        self.settle()
        self.assertEqual(self.guest.calls, [])

    def test_exclude(self) -> None:
        self.settings.config = vm.Config(exclude=('db', 'we*'))
        self.send('resumed')
        self.settle()
        self.assertEqual(self.guest.calls, [])

    def test_a_failure_is_told_once_per_start(self) -> None:
        self.guest.troubles = ['not configured'] * 3
        with self.assertLogs('vmmonitor', 'WARNING') as logged:
            for kind in ('resumed', 'resumed', 'restored'):
                self.send(kind)
                self.settle()
        self.assertEqual(len(logged.output), 2, logged.output)
        self.assertIn('add a <channel>', logged.output[0])

    def test_a_stopped_guest_is_no_failure(self) -> None:
        def gone(*_: Any) -> Any:
            raise vm.WrongState('web1: domain is not running')
        self.guest.agent = gone         # type: ignore[method-assign, assignment]
        with self.assertLogs('vmmonitor', 'DEBUG') as logged:
            self.send('resumed')
            self.settle()
        self.assertEqual([line for line in logged.output if 'WARN' in line or 'ERROR' in line], [])
        self.assertIn('clock left alone', logged.output[-1])

    def test_a_bug_ends_one_job_only(self) -> None:
        self.guest.agent = lambda *_: 1 // 0        # type: ignore[method-assign]
        with self.assertLogs('vmmonitor', 'ERROR') as logged:
            self.send('resumed')
            self.settle()
        self.assertIn('ZeroDivisionError', logged.output[0])
        del self.guest.agent
        self.send('resumed')
        self.settle()
        self.assertLess(abs(self.guest.offset), TOLERANCE)

    def test_a_wrong_clock_is_found_by_the_periodic_check(self) -> None:
        self.settings.config = vm.Config(check_interval=1)
        self.guest.offset = 0
        vm.spawn('host-clock', self.monitor._watch_host)
        time.sleep(0.2)
        self.guest.offset = vm.SECOND
        self.assertTrue(vm.Deadline(5).poll(lambda: abs(self.guest.offset) < TOLERANCE))
        self.settle()
        self.assertEqual(self.monitor.corrections[self.guest.id].cause, 'periodic check')


class StartupTest(unittest.TestCase):
    """The list, with guests that start at once; real ones are in GuestTest."""

    def run_list(self, lines: Sequence[str], *guests: ScriptedGuest) -> list[str]:
        steps = vm.steps(list(lines))
        with self.assertLogs('vmmonitor', 'DEBUG') as logged:
            vm.Startup(vm.Guests([ScriptedHost(*guests)]), steps).run()
        return [record.getMessage() for record in logged.records]

    def test_delay_and_order(self) -> None:
        moments: dict[str, float] = {}
        guests = [ScriptedGuest(name) for name in ('a', 'b', 'c')]
        for guest in guests:
            def start(name: str = guest.name) -> str:
                moments[name] = time.monotonic()
                time.sleep(0.3)
                return 'started'
            guest.start = start         # type: ignore[method-assign]
        messages = self.run_list(['start a', '# x', 'start b', 'delay 0.5', 'start c'], *guests)
        self.assertLess(abs(moments['a'] - moments['b']), 0.2)
        self.assertTrue(0.45 < moments['c'] - moments['b'] < 0.8, moments)
        self.assertRegex(messages[-1], r'startup: ended after 0\.[89]')

    def test_failures_are_tried_again_and_stop_nothing(self) -> None:
        guest, broken = ScriptedGuest('good'), ScriptedGuest('broken')
        moments: list[float] = []

        def fail() -> str:
            moments.append(time.monotonic())
            if len(moments) < 3:
                raise vm.LibvirtError('no memory')
            return 'started'
        broken.start = fail             # type: ignore[method-assign]
        with unittest.mock.patch.object(vm, 'START_RETRY_PAUSE', 0.2):
            messages = self.run_list(['start absent', 'start broken', 'start good'], guest, broken)
        self.assertEqual(len(moments), 3)
        self.assertTrue(all(0.15 < b - a < 0.6 for a, b in zip(moments, moments[1:])), moments)
        self.assertEqual(guest.calls, ['start'])
        self.assertEqual(sum('start absent failed: no guest is named' in text
                             for text in messages), 1 + vm.START_RETRIES)
        self.assertIn('failed: absent (no guest is named absent', messages[-1])
        self.assertIn('broken started', messages[-1])
        self.assertEqual((vm.START_RETRIES, vm.START_RETRY_PAUSE), (3, 5))

    def test_wait(self) -> None:
        late, dead = ScriptedGuest('late'), ScriptedGuest('dead')
        late.troubles = ['not connected'] * 3
        dead.troubles = ['not connected'] * 1000
        messages = self.run_list(['wait late 5', 'wait dead agent 0.5', 'wait absent running 0.3',
                                  'start late'], late, dead)
        self.assertRegex(messages[0], r'late: agent after 0\.[2-6]')
        self.assertRegex(messages[1], r'line 2: dead: not yet "agent" after 0\.[56] s; going on')
        self.assertRegex(messages[2], r'line 3: absent: not yet "running" after 0\.[34]')
        self.assertEqual(late.calls[-1], 'start')


# === listener ===================================================================================

def free_port() -> int:
    """Return a TCP port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])


class ListenerTest(TempCase):
    """The https trigger with real TLS and real curl; the guests behind it are scripted."""

    def setUp(self) -> None:
        self.port = free_port()
        self.guest, self.other = ScriptedGuest('web1'), ScriptedGuest('größe 1')
        self.host = ScriptedHost(self.guest, self.other)
        self.guests = vm.Guests([self.host])
        self.changes: dict[str, Any] = {'listener': {'port': self.port, 'keys': [
            {'name': 'web', 'key': OTHER_KEY, 'commands': ['start', 'list'],
             'targets': ['web*']}]}}
        self.settings = vm.Settings(vm.load(self.write(self.changes)))
        self.listener = vm.Listener(self.guests, self.settings, {})
        self.listener.open(self.settings.config)
        self.addCleanup(self.listener.close)
        self.url = f'https://localhost:{self.port}/'

    def curl(self, *arguments: str, url: str = '') -> tuple[int, str]:
        """Return (status, body) of a curl call that checks the certificate."""
        done = subprocess.run(
            ['curl', '-sS', '--max-time', '20', '--cacert', str(self.directory / 'cert.pem'),
             '-w', '\n%{http_code}', *arguments, url or self.url], timeout=30,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        body, _, status = done.stdout.decode().rpartition('\n')
        return int(status), body.rstrip('\n')

    def ask(self, query: str, *arguments: str) -> tuple[int, str]:
        return self.curl(*arguments, url=f'{self.url}?{query}')

    BEARER = ('-H', f'Authorization: Bearer {KEY}')
    WEB_BEARER = ('-H', f'Authorization: Bearer {OTHER_KEY}')
    WRONG = (401, 'wrong key, or not for this target')

    def test_the_ways_to_ask(self) -> None:
        done = (200, 'web1: started')
        self.assertEqual(self.ask(f'key={KEY}&cmd=start&target=web1'), done)
        self.assertEqual(self.ask('cmd=start&target=web1', *self.BEARER), done)
        self.assertEqual(self.ask('cmd=start&target=%77eb1', *self.BEARER), done)
        self.assertEqual(self.curl('-d', f'key={KEY}', '-d', 'cmd=start', '-d', 'target=web1'),
                         done)
        self.assertEqual(self.curl('-H', 'Content-Type: application/json', '-d', json.dumps(
            {'key': KEY, 'cmd': 'start', 'target': 'web1', 'wait': 5})), done)
        self.assertEqual(self.ask(f'key={KEY}&cmd=start&target=gr%C3%B6%C3%9Fe+1'),
                         (200, 'größe 1: started'))
        self.assertEqual(self.ask('cmd=start&target=web1', *self.BEARER, '--http1.0'), done)

    def test_refusals(self) -> None:
        good = f'key={KEY}&cmd=start&target=web1'
        for query, arguments, answer in (
                ('', (), (401, 'key is missing')),
                ('cmd=start&target=web1', (), (401, 'key is missing')),
                ('key=wrong&cmd=start&target=web1', (), self.WRONG),
                ('cmd=start&target=db1', self.WEB_BEARER, self.WRONG),
                ('cmd=start&target=absent', self.WEB_BEARER, self.WRONG),
                ('cmd=stop&target=web1', self.WEB_BEARER, (403, 'this key may not stop')),
                ('cmd=start&target=web2', self.WEB_BEARER,
                 (404, 'no guest is named web2; --status lists them')),
                ('cmd=start&target=a', ('-H', 'Authorization: Basic eDp5'),
                 (401, 'use Authorization: Bearer KEY')),
                (f'{good}&cmd=stop', (), (400, 'cmd stands there twice')),
                (good, self.BEARER, (400, 'key stands there twice')),
                (f'{good}&tarqet=x', (), (400, 'parameters are cmd, key, target, wait')),
                (f'{good}&wait=soon', (), (400, 'wait must be a number of seconds from 0 to 300')),
                (f'{good}&wait=nan', (), (400, 'wait must be a number of seconds from 0 to 300')),
                (f'key={KEY}&cmd=fly&target=web1', (), (400, 'cmd must be one of start, stop, '
                                                        'save, wake, status, list')),
                (f'key={KEY}&cmd=start', (), (400, 'target is missing: the name of the guest to '
                                              'start')),
                (f'key={KEY}&cmd=list&target=web1', (), (400, 'list takes no target')),
                (f'key={KEY}&cmd=start&target=a%0Ab', (), (400, 'target has control characters')),
                (f'key={KEY}&cmd=start&target=%ff', (), (400, 'parameters must be NAME=VALUE, '
                                                         'joined by & and percent-encoded UTF-8')),
                ('key', (), (400, 'parameters must be NAME=VALUE, joined by & and '
                             'percent-encoded UTF-8')),
                (good, ('-X', 'DELETE'), (405, 'use GET or POST')),
                (good, ('-H', 'X: ' + 'x' * 20000), (431, 'request line and headers too large')),
                ('', ('-d', 'x' * 20000), (413, 'the body may have 16384 bytes')),
                ('', ('-H', 'Transfer-Encoding: chunked', '-d', 'x=1'),
                 (411, 'send the body with a Content-Length')),
                ('', ('-H', 'Content-Type: text/xml', '-d', '<x/>'),
                 (415, 'send application/x-www-form-urlencoded or application/json')),
                ('', ('-H', 'Content-Type: application/json', '-d', '{"cmd": ["a"]}'),
                 (400, 'the body must be a JSON object, its keys once each, its values strings or '
                  'numbers'))):
            with self.subTest(query=query[-40:], arguments=str(arguments)[:60]):
                self.assertEqual(self.ask(query, *arguments) if query else self.curl(*arguments),
                                 answer)
                self.listener.router.throttle = vm.Throttle()
        self.assertEqual(self.curl(url=f'{self.url}other'),
                         (404, 'nothing here; use /?cmd=...&target=...'))

    def test_switched_off(self) -> None:
        for command in vm.COMMANDS:
            path = self.write(self.changes, {'listener': {'commandsEnabled': {command: False}}})
            self.settings.config = vm.load(path)
            target = '' if command == 'list' else '&target=web1'
            self.assertEqual(self.ask(f'cmd={command}{target}', *self.BEARER),
                             (403, f'{command} is switched off (listener.commandsEnabled)'))
        self.assertEqual(self.guest.calls, [])

    def test_errors_of_guests(self) -> None:
        for problem, status in ((vm.WrongState('it is off'), 409), (vm.Busy('busy'), 409),
                                (vm.NoGuest('gone'), 404), (vm.HostAway('away'), 503),
                                (vm.LibvirtError('no memory', hint='buy some'), 500)):
            def start(problem: vm.Error = problem) -> str:
                raise problem
            self.guest.start = start        # type: ignore[method-assign]
            self.assertEqual(self.ask('cmd=start&target=web1', *self.BEARER),
                             (status, vm.words(problem)))
        self.guest.start = lambda: str(1 // 0)      # type: ignore[method-assign]
        with self.assertLogs('vmmonitor', 'ERROR') as logged:
            self.assertEqual(self.ask('cmd=start&target=web1&wait=1', *self.BEARER)[0], 500)
        self.assertIn('ZeroDivisionError', logged.output[0])

    def test_status_and_list(self) -> None:
        correction = vm.Correction('web1', 'resumed', -3 * vm.SECOND, vm.MS, 'guest-set-time',
                                   when=86400)
        self.listener.router.corrections = {self.guest.id: correction}
        line = 'web1 running agent=connected clock=+1.0ms at 1970-01-02T00:00:00Z after "resumed"'
        self.assertEqual(self.ask('cmd=status&target=web1', *self.BEARER), (200, line))
        self.assertEqual(self.ask('cmd=list', *self.BEARER), (
            200, line + '\ngröße 1 running agent=connected clock=unknown'))
        self.assertEqual(self.ask('cmd=list', *self.WEB_BEARER), (200, line))
        status, body = self.ask('cmd=list', *self.BEARER, '-H', 'Accept: application/json')
        self.assertEqual((status, json.loads(body)['guests'][0]), (200, {
            'name': 'web1', 'state': 'running', 'agent': 'connected', 'clock': {
                'cause': 'resumed', 'beforeMs': -3000.0, 'afterMs': 1.0, 'corrected': True,
                'at': '1970-01-02T00:00:00Z'}}))
        status, body = self.ask('cmd=x', *self.BEARER, '-H', 'Accept: application/json')
        self.assertEqual((status, list(json.loads(body))), (400, ['error']))

    def slow_start(self, seconds: float) -> None:
        def start() -> str:
            time.sleep(seconds)
            return 'started'
        self.guest.start = start        # type: ignore[method-assign]

    def test_wait_and_busy(self) -> None:
        self.slow_start(1.0)
        began = time.monotonic()
        with self.assertLogs('vmmonitor', 'INFO') as logged:
            self.assertEqual(self.ask('cmd=start&target=web1&wait=0', *self.BEARER),
                             (202, 'web1: start goes on'))
            self.assertLess(time.monotonic() - began, 0.8)
            busy = (409, 'web1 is busy: "start" has not ended; try again later')
            self.assertEqual(self.ask('cmd=stop&target=web1&wait=0', *self.BEARER), busy)
            self.assertEqual(self.ask('cmd=stop&target=web1&wait=0.2', *self.BEARER)[0], 202)
            self.assertEqual(self.ask('cmd=stop&target=web1', *self.BEARER),
                             (200, 'web1: asked to shut down'))
            self.assertGreater(time.monotonic() - began, 0.95, 'the second did not wait')
        self.assertIn('INFO:vmmonitor:start web1: started', logged.output)

    def test_too_many_wrong_keys(self) -> None:
        for _ in range(vm.WRONG_KEYS):
            self.assertEqual(self.ask('key=wrong&cmd=start&target=web1'), self.WRONG)
        began = time.monotonic()
        status, text = self.ask('cmd=start&target=web1', *self.BEARER)
        self.assertEqual(status, 429)
        self.assertRegex(text, r'too many wrong keys; try again in (5\d|60) s')
        self.assertLess(time.monotonic() - began, 1)
        url = f'https://[::1]:{self.port}/?cmd=start&target=web1'
        self.assertEqual(self.curl(*self.BEARER, url=url), (200, 'web1: started'))

    def test_a_forbidden_target_counts_as_a_wrong_key(self) -> None:
        for _ in range(vm.WRONG_KEYS):
            self.assertEqual(self.ask('cmd=start&target=db1', *self.WEB_BEARER), self.WRONG)
        self.assertEqual(self.ask('cmd=start&target=db1', *self.WEB_BEARER)[0], 429)

    def test_throttle_forgets(self) -> None:
        throttle = vm.Throttle()
        with unittest.mock.patch.object(vm, 'WRONG_KEYS_WINDOW', 0.2):
            for _ in range(vm.WRONG_KEYS):
                throttle.wrong('2001:db8::1')
        self.assertEqual(throttle.seconds('2001:db8::2'), 1)        # the same /64
        self.assertEqual(throttle.seconds('2001:db8:1::1'), 0)
        time.sleep(0.25)
        self.assertEqual(throttle.seconds('2001:db8::1'), 0)
        with unittest.mock.patch.object(vm, 'WRONG_KEYS_PEERS', 3):
            for number in range(9):
                throttle.wrong(f'10.0.0.{number}')
        self.assertLessEqual(len(throttle._wrong), 3)

    def test_audit(self) -> None:
        with self.assertLogs('vmmonitor', 'INFO') as logged:
            self.ask(f'key={KEY}&cmd=start&target=web1')
            self.ask('key=guess&cmd=start&target=we%20b%22x')
            self.ask('cmd=list', *self.WEB_BEARER)
        for line, pattern in zip(logged.output, (
                r'request peer=127\.0\.0\.1 key=main cmd=start target=web1 result=200 ms=\d+',
                r'request peer=127\.0\.0\.1 key=- cmd=start target="we b\\"x" result=401 ms=\d+',
                r'request peer=127\.0\.0\.1 key=web cmd=list target=- result=200 ms=\d+')):
            self.assertRegex(line, pattern)
        for secret in (KEY, OTHER_KEY, 'guess'):
            self.assertNotIn(secret, '\n'.join(logged.output))

    def connect(self, send: bytes = b'') -> socket.socket:
        """Return a connection, with TLS only if there is something to `send`."""
        raw = socket.create_connection(('127.0.0.1', self.port), timeout=20)
        self.addCleanup(raw.close)
        if not send:
            return raw
        context = ssl.create_default_context(cafile=str(self.directory / 'cert.pem'))
        secure = context.wrap_socket(raw, server_hostname='localhost')
        self.addCleanup(secure.close)
        secure.sendall(send)
        return secure

    def test_keep_alive_and_one_write(self) -> None:
        request = f'GET /?key={KEY}&cmd=start&target=web1 HTTP/1.1\r\nHost: x\r\n\r\n'.encode()
        connection = self.connect(request + request)
        answers = b''
        while answers.count(b'web1: started\n') < 2:
            answers += connection.recv(65536)
        self.assertEqual(answers.count(b'Connection: keep-alive'), 2)
        sizes = []
        for _ in range(3):
            connection.sendall(request)
            sizes.append(connection.recv(65536).count(b'started\n'))
        self.assertEqual(sizes, [1, 1, 1], 'an answer came in more than one record')

    def test_garbage(self) -> None:
        for request, status in ((b'\x00\xff\x16junk\r\n\r\n', b' 400 '), (b'GET /\r\n', b' 400 '),
                                (b'GET / HTTP/9.9\r\n\r\n', b' 505 '),
                                (b'GET / HTTP/1.1\r\n' + b'a: b\r\n' * 150 + b'\r\n', b' 431 '),
                                (b'POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n', b' 400 '),
                                (b'POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n'
                                 b'\r\n', b' 400 '),
                                (b'HEAD / HTTP/1.1\r\n\r\n', b' 405 ')):
            with self.subTest(request[:30]):
                answer = self.connect(request).recv(65536)
                self.assertTrue(answer.startswith(b'HTTP/1.1' + status), answer)

    def test_plain_http_and_old_tls_are_refused(self) -> None:
        connection = self.connect()
        connection.sendall(b'GET / HTTP/1.1\r\nHost: x\r\n\r\n')
        with contextlib.suppress(ConnectionResetError):
            self.assertNotIn(b'HTTP', connection.recv(65536))
        for version, works in (('1.3', True), ('1.2', True), ('1.1', False), ('1.0', False)):
            done = subprocess.run(
                ['openssl', 's_client', f'-tls{version.replace(".", "_").replace("1_3", "1_3")}',
                 '-cipher', 'DEFAULT@SECLEVEL=0', '-connect', f'127.0.0.1:{self.port}'],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=20, check=False)
            self.assertEqual(done.returncode == 0, works, (version, done.stdout[-300:]))

    def test_silent_and_trickling_clients_delay_nobody(self) -> None:
        stop = threading.Event()
        for _ in range(200):
            self.connect()
        trickling = [self.connect(b'GET /?x') for _ in range(50)]

        def trickle() -> None:
            while not stop.wait(1):
                for connection in trickling:
                    with contextlib.suppress(OSError):
                        connection.sendall(b'y')
        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            slowest = 0.0
            for _ in range(5):
                began = time.monotonic()
                self.assertEqual(self.ask(f'key={KEY}&cmd=start&target=web1')[0], 200)
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.3)
            self.assertLess(slowest, 1.0)
            self.assertLessEqual(len(self.listener.server.clients),     # type: ignore[union-attr]
                                 vm.CONNECTIONS_PER_PEER)
        finally:
            stop.set()
            thread.join()

    def test_time_limits(self) -> None:
        with unittest.mock.patch.multiple(vm, HANDSHAKE_TIMEOUT=0.5, REQUEST_TIMEOUT=1.0,
                                          IDLE_TIMEOUT=0.5):
            silent = self.connect()
            began = time.monotonic()
            self.assertEqual(silent.recv(1), b'')
            self.assertLess(time.monotonic() - began, 2)
            slow = self.connect(b'GET')
            for _ in range(4):
                time.sleep(0.2)
                slow.sendall(b'x')
            self.assertTrue(slow.recv(65536).startswith(b'HTTP/1.1 408 '))
            idle = self.connect(b'GET / HTTP/1.1\r\n\r\n')
            self.assertTrue(idle.recv(65536).startswith(b'HTTP/1.1 401 '))
            self.assertEqual(idle.recv(1), b'')

    def test_certificate_and_address_change(self) -> None:
        def fingerprint() -> str:
            return hashlib.sha256(ssl.get_server_certificate(
                ('127.0.0.1', self.listener.settings.config.port)).encode()).hexdigest()
        first, old = fingerprint(), self.settings.config
        make_certificate(self.directory, 'next')
        change: dict[str, Any] = {'listener': {'certificate': {
            'path': 'next.pem', 'keyPath': 'next.key'}}}
        self.settings.config = vm.load(self.write(self.changes, change))
        self.listener.reload(old)
        self.assertNotEqual(fingerprint(), first)
        other = free_port()
        new = vm.load(self.write(self.changes, change, {'listener': {'port': other}}))
        old, self.settings.config = self.settings.config, new
        self.listener.reload(old)
        fingerprint()
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(('127.0.0.1', self.port), timeout=5)
        only_v4 = vm.load(self.write(self.changes, change, {'listener': {
            'port': other, 'address': '127.0.0.1'}}))
        old, self.settings.config = new, only_v4
        self.listener.reload(old)
        fingerprint()
        with self.assertRaises(OSError):
            socket.create_connection(('::1', other), timeout=5)

    def test_a_taken_port_is_told(self) -> None:
        with self.assertRaises(vm.Error) as caught:
            vm.Listener(self.guests, self.settings, {}).open(self.settings.config)
        self.assertEqual(vm.words(caught.exception), f'can\'t listen on *:{self.port}: Address '
                         'already in use; set listener.port and listener.address to what is free '
                         'here')


# === real guests on a real libvirtd =============================================================

HERE = Path(__file__).resolve().parent
BAR_OFFSET = 0.005              # s: what a corrected clock may be off


class Program:
    """A vmmonitor.py in a process of its own, with its log."""

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None,
                 code: str = '') -> None:
        self.log_path = Path(tempfile.mkstemp(prefix='vmmonitor-test-', suffix='.log')[1])
        program = ['-c', code] if code else [str(HERE / 'vmmonitor.py')]
        with self.log_path.open('wb') as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments], stdout=subprocess.DEVNULL, stderr=log,
                stdin=subprocess.DEVNULL, env={**os.environ, 'PYTHONPATH': str(HERE),
                                               **(env or {})})

    def log(self) -> str:
        """Return what it has logged so far."""
        return self.log_path.read_text()

    def wait_log(self, pattern: str, timeout: float = 30, count: int = 1) -> list[str]:
        """Wait until `pattern` is in the log `count` times; return the matches."""
        found: list[str] = []

        def look() -> bool:
            nonlocal found
            found = re.findall(pattern, self.log())
            return len(found) >= count
        deadline = time.monotonic() + timeout
        while not look():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f'not in the log: {pattern}\n{self.log()}')
            time.sleep(0.02)
        return found

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Send a signal; return exit status and the seconds that the end took."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
        return status, time.monotonic() - began

    def close(self) -> None:
        """End it and remove its log."""
        self.stop()
        self.log_path.unlink()


def vmmonitor(*arguments: str, timeout: float = 60, env: Mapping[str, str] | None = None
              ) -> tuple[int, str, str]:
    """Run vmmonitor.py to its end; return exit status, stdout and stderr."""
    done = subprocess.run([sys.executable, str(HERE / 'vmmonitor.py'), *arguments],
                          timeout=timeout, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, check=False, env={**os.environ, **(env or {})})
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class GuestCase(TempCase):
    """Tests with real guests. They share one libvirtd, and guests that run already."""

    _host: Libvirtd | None = None
    _vms: dict[str, Vm] = {}
    host: Libvirtd

    @classmethod
    def setUpClass(cls) -> None:
        why = what_is_missing()
        if why:
            raise unittest.SkipTest(why)
        super().setUpClass()
        if not GuestCase._host:
            GuestCase._host = Libvirtd()
            GuestCase._host.start()
        cls.host = GuestCase._host

    @classmethod
    def close_host(cls) -> None:
        """End libvirtd and all guests; after the last test."""
        if GuestCase._host:
            GuestCase._host.close()

    def vm(self, name: str, running: bool = True, **options: Any) -> Vm:
        """Return a guest, made at its first use; running, with an agent that answers."""
        if name not in self._vms:
            self._vms[name] = Vm(self.host, name, **options)
            self._vms[name].define()
        guest = self._vms[name]
        state = guest.state()
        if running and state != 'running':
            if state in ('paused', 'pmsuspended', 'crashed'):
                guest.destroy()
            guest.start()
        if running and not re.search('noga', options.get('cmdline', '')) \
                and options.get('channel', True):
            guest.wait_agent()
        elif not running and state != 'shut off':
            guest.destroy()
        return guest

    def only(self, *names: str) -> None:
        """Destroy all guests but these: the machine is small, and timing matters."""
        for name, guest in self._vms.items():
            if name not in names and guest.state() != 'shut off':
                guest.destroy()

    def config(self, *changes: Mapping[str, Any], name: str = 'config.json') -> str:
        """Write a configuration for the rig's libvirt."""
        base = {'libvirt': {'uri': self.host.uri}, 'listener': {'enabled': False}}
        return self.write(base, *changes, name=name)

    def program(self, *arguments: str, config: str = '', **options: Any) -> Program:
        """Start the daemon, and end it with the test."""
        path = config or self.config()
        program = Program('--config', path, *arguments, **options)
        self.addCleanup(program.close)
        return program

    def monitor(self, *changes: Mapping[str, Any]) -> Program:
        """Start the monitor, and wait until it is connected."""
        program = self.program('--monitor', '--verbose', config=self.config(*changes))
        program.wait_log('connected after')
        return program

    def right(self, guest: Vm, limit: float = BAR_OFFSET) -> None:
        """Assert that the guest's clock is right."""
        self.assertLessEqual(abs(guest.offset(15)), limit, guest.name)

    def wait_right(self, guest: Vm, timeout: float) -> float:
        """Wait until the guest's clock is right; return how long that took."""
        began = time.monotonic()
        while True:
            with contextlib.suppress(RigError):
                if abs(guest.offset(1)) <= BAR_OFFSET:
                    return time.monotonic() - began
            if time.monotonic() - began > timeout:
                self.fail(f'{guest.name}: not right within {timeout} s: {guest.offset()}')
            time.sleep(0.005)


class BarsTest(GuestCase):
    """The figures that the tool promises, measured from outside of it."""

    def test_without_it_the_clock_stays_wrong(self) -> None:
        guest = self.vm('web1')
        before = guest.offset()
        guest.virsh('suspend')
        time.sleep(3)
        guest.virsh('resume')
        time.sleep(1)
        self.assertAlmostEqual(guest.offset() - before, -3.0, delta=0.3)

    def test_pause_and_resume(self) -> None:
        self.only('web1')
        guest, program = self.vm('web1'), self.monitor()
        program.wait_log('web1: clock')
        took = []
        for number in range(1, 4):
            guest.virsh('suspend')
            time.sleep(3)
            began = time.monotonic()
            guest.virsh('resume')
            while abs(guest.offset(1)) > BAR_OFFSET:
                self.assertLess(time.monotonic() - began, 5, program.log())
            took.append(time.monotonic() - began)
            self.right(guest)
            line = program.wait_log(r'web1: clock corrected, cause=resumed .*', count=number)[-1]
            self.assertRegex(line, r'before=-[34]\d\d\d\.\dms after=[+-][0-5]\.\dms right_after='
                             r'\d+ms proved_after=\d+ms by=guest-set-time')
        say(f'pause and resume: right {min(took) * 1000:.0f} ms after `virsh resume` began')
        self.assertLess(min(took), 0.1, took)

    def test_save_and_restore(self) -> None:
        self.only('web1')
        guest, program = self.vm('web1'), self.monitor()
        program.wait_log('web1: clock')
        took = []
        for number in range(1, 4):
            guest.virsh('managedsave')
            time.sleep(5 if number == 1 else 1)
            guest.start()
            guest.wait_agent()
            answered = time.monotonic()
            while abs(guest.offset(1)) > BAR_OFFSET:
                self.assertLess(time.monotonic() - answered, 5, program.log())
            took.append(time.monotonic() - answered)
            program.wait_log(r'web1: clock corrected, cause=restored before=-', count=number)
            self.right(guest)
        say(f'save and restore: right {min(took) * 1000:.0f} ms after the agent\'s first answer')
        self.assertLess(min(took), 0.25, took)

    def test_eight_at_once(self) -> None:
        names = [f'herd{number}' for number in range(8)]
        self.only(*names)
        guests = [self.vm(name, memory=112) for name in names]
        program = self.monitor()
        program.wait_log('herd[0-7]: clock', count=8)
        for guest in guests[:2]:
            guest.freeze_agent(60)
        for guest in guests:
            guest.virsh('suspend')
        time.sleep(3)
        began = time.monotonic()
        for guest in guests:
            guest.virsh('resume')
        resumed = time.monotonic()
        took: dict[str, float] = {}

        def watch(guest: Vm) -> None:
            while guest.name not in took and time.monotonic() - began < 10:
                with contextlib.suppress(RigError):
                    if abs(guest.offset(1)) <= BAR_OFFSET:
                        took[guest.name] = time.monotonic() - resumed
        threads = [vm.spawn(guest.name, watch, guest) for guest in guests[3:]]
        guests[2].destroy()
        for thread in threads:
            thread.join()
        self.assertEqual(len(took), 5, program.log())
        say(f'five of eight, two hang: right {max(took.values()) * 1000:.0f} ms after the last '
            'resume')
        self.assertLess(max(took.values()), 1.0, f'{took}\n{program.log()}')
        self.assertEqual(len(re.findall(r'herd[3-7]: clock corrected, cause=resumed',
                                        program.log())), 5)
        status, seconds = program.stop()        # while two agents hang
        self.assertEqual(status, 0)
        self.assertLess(seconds, 2)
        self.only('web1')

    def test_libvirtd_killed_while_a_guest_is_paused(self) -> None:
        self.only('web1')
        guest, program = self.vm('web1'), self.monitor()
        program.wait_log('web1: clock')
        guest.virsh('suspend')
        self.host.kill9()
        program.wait_log('connection lost')
        time.sleep(3)
        self.host.start()
        guest.virsh('resume')
        took = self.wait_right(guest, 10)
        say(f'libvirtd killed, started, guest resumed: right after {took * 1000:.0f} ms')
        self.assertLess(took, 3)


class CauseTest(GuestCase):
    """Every cause of a wrong clock that can be had here."""

    def test_snapshot_revert(self) -> None:
        self.only('disk')
        guest, program = self.vm('disk', disk=True), self.monitor()
        program.wait_log('disk: clock')
        guest.virsh('snapshot-create-as', 'one')
        program.wait_log('disk: clock (corrected|is right), cause=resumed')
        time.sleep(3)
        guest.virsh('snapshot-revert', 'one', timeout=60)
        program.wait_log(r'disk: clock corrected, cause=(reverted|restored) before=-[3-9]')
        self.right(guest)
        guest.virsh('snapshot-delete', 'one')
        guest.destroy()

    def test_sleep_and_wake(self) -> None:
        self.only('web1')
        guest, program = self.vm('web1'), self.monitor()
        guest.skew(-7)                      # a wake-up re-reads the clock chip only to a second
        guest.virsh('dompmsuspend', 'mem')
        guest.wait_state('pmsuspended')
        guest.virsh('dompmwakeup')
        program.wait_log('web1: clock (corrected|is right), cause=woken')
        self.wait_right(guest, 5)

    def test_boot_and_agent_restart(self) -> None:
        self.only()
        program = self.monitor()
        guest = self.vm('web1')
        program.wait_log('web1: clock (corrected|is right), cause=(booted|agent connected)')
        guest.exec(['sh', '-c', '(sleep 0.5; kill $(pidof qemu-ga)) >/dev/null 2>&1 &'])
        guest.skew(-9)
        program.wait_log('web1: clock corrected, cause=agent connected before=-[89]')
        self.right(guest)

    def test_reboot_and_own_setting_do_not_loop(self) -> None:
        guest, program = self.vm('web1'), self.monitor()
        program.wait_log('web1: clock')
        guest.virsh('suspend')
        guest.virsh('resume')
        time.sleep(2)
        self.assertLess(len(re.findall('web1: clock', program.log())), 4, program.log())

    def test_found_at_start(self) -> None:
        guest = self.vm('web1')
        guest.skew(-100)
        program = self.monitor()
        program.wait_log('web1: clock corrected, cause=found before=-')
        self.right(guest)

    def test_periodic_check_and_reload(self) -> None:
        guest, program = self.vm('web1'), self.monitor()
        program.wait_log('web1: clock')
        guest.skew(60)
        time.sleep(1.5)
        self.assertGreater(guest.offset(), 50)
        self.config({'monitor': {'checkInterval': 1}})
        program.process.send_signal(signal.SIGHUP)
        program.wait_log('configuration read again')
        program.wait_log('web1: clock corrected, cause=periodic check before=\\+(58|59|60)')
        self.right(guest)

    def test_host_clock_step(self) -> None:
        library = next(Path('/usr/lib').glob('*/faketime/libfaketime.so.1'), None)
        if not library:
            self.skipTest('libfaketime is not installed')
        guest = self.vm('web1')
        offset = self.directory / 'faketime'
        offset.write_text('+0')
        program = self.program('--monitor', '--verbose', env={
            'LD_PRELOAD': str(library), 'FAKETIME_TIMESTAMP_FILE': str(offset),
            'FAKETIME_NO_CACHE': '1', 'FAKETIME_DONT_FAKE_MONOTONIC': '1'})
        program.wait_log('web1: clock')
        offset.write_text('+100')
        program.wait_log('host clock stepped; checking all guests')
        program.wait_log('web1: clock corrected, cause=host clock stepped before=-')
        self.assertAlmostEqual(guest.offset(), 100, delta=1)

    def test_migration(self) -> None:
        self.only('mover')
        guest = self.vm('mover')
        guest.skew(-40)             # so that there is something to see: downtime is too short
        there = Libvirtd()
        self.addCleanup(there.close)
        there.start()
        program = self.program('--monitor', '--verbose', config=self.config(
            {'libvirt': {'uri': there.uri}}, name='there.json'))
        program.wait_log('connected after')
        guest.virsh('migrate', there.uri, '--live', '--migrateuri',
                    f'unix://{there.dir}/migration.sock', timeout=90)
        program.wait_log('mover: clock corrected, cause=migrated before=-(39|40|41)')
        Vm(there, 'mover').wait_agent()
        self.right(Vm(there, 'mover'))

    def test_excluded(self) -> None:
        guest, program = self.vm('web1'), self.monitor({'monitor': {'exclude': ['we?1']}})
        guest.skew(-50)
        guest.virsh('suspend')
        guest.virsh('resume')
        time.sleep(1)
        self.assertLess(guest.offset(), -49)
        self.assertNotIn('web1: clock', program.log())

    def test_catchup_forgets_missed_ticks(self) -> None:
        self.only('catchup')
        guest = self.vm('catchup', clock="<clock offset='utc'><timer name='rtc' "
                        "tickpolicy='catchup'/></clock>")
        program = self.monitor()
        guest.virsh('suspend')
        time.sleep(1)
        guest.virsh('resume')
        program.wait_log('catchup: clock corrected, cause=resumed')
        self.right(guest)
        self.assertIn('custom-monitor', self.host.guest_log('catchup'))
        guest.destroy()


class TroubleTest(GuestCase):
    """Guests whose clock can't be set: the cause and the remedy, once."""

    def complaint(self, program: Program, guest: Vm, pattern: str) -> None:
        program.wait_log(f'warning {guest.name}: clock not corrected after "[a-z ]+": {pattern}')
        guest.virsh('suspend')
        guest.virsh('resume')
        time.sleep(1)
        self.assertEqual(len(re.findall(f'warning {guest.name}: ', program.log())), 1,
                         program.log())

    def test_no_hwclock(self) -> None:
        self.only('nohw')
        guest, program = self.vm('nohw', cmdline='nohwclock'), self.monitor()
        guest.skew(-20)
        guest.virsh('suspend')
        guest.virsh('resume')
        if guest.offset() > -19:        # qemu-ga 9.1 and later set the time first
            program.wait_log('nohw: the clock is right, but: .*hwclock')
            return
        self.complaint(program, guest, '.*not currently supported; install hwclock in the guest: '
                       'util-linux-extra on Debian 12')
        program.stop()
        program = self.monitor({'monitor': {'allowExec': True}})
        program.wait_log('nohw: clock corrected, cause=found before=-.*by=guest-exec-date')
        self.right(guest)

    def test_blocked(self) -> None:
        self.only('blocked')
        guest = self.vm('blocked', cmdline='gablock=guest-set-time')
        guest.skew(-20)
        program = self.monitor()
        self.complaint(program, guest, '.*refuses the command: .*guest-set-time.*; allow it in')
        self.assertLess(guest.offset(), -15)

    def test_no_channel(self) -> None:
        self.only('deaf')
        guest, program = self.vm('deaf', channel=False), self.monitor()
        self.complaint(program, guest, 'deaf: no guest agent channel; add a <channel> for '
                       'org.qemu.guest_agent.0 and install qemu-guest-agent')

    def test_no_agent(self) -> None:
        self.only('noagent')
        guest = self.vm('noagent', cmdline='noga')
        program = self.monitor({'monitor': {'agentWait': 1}})
        self.complaint(program, guest, 'noagent: the guest agent is not connected; install '
                       'qemu-guest-agent in the guest and start it')

    def test_hung_agent(self) -> None:
        self.only('web1', 'web2')
        guest, other = self.vm('web1'), self.vm('web2')
        program = self.monitor({'monitor': {'agentWait': 20}})
        program.wait_log('web[12]: clock', count=2)
        guest.freeze_agent(12)
        guest.virsh('suspend')
        other.virsh('suspend')
        guest.virsh('resume')
        other.virsh('resume')
        program.wait_log('web2: clock (corrected|is right), cause=resumed', 2)
        # It is tried again until it answers, and then it is put right.
        program.wait_log('web1: clock (corrected|is right), cause=resumed', 30)
        self.right(guest)

    def test_frozen_file_systems(self) -> None:
        self.only('disk')
        guest = self.vm('disk', disk=True)
        mounted = guest.exec(['sh', '-c', 'until [ -e /dev/vda ]; do usleep 100000; done; '
                              'mke2fs /dev/vda && mkdir /mnt && mount -t ext2 /dev/vda /mnt'])
        self.assertEqual(mounted[0], 0, mounted)
        program = self.monitor({'monitor': {'agentWait': 20}})
        program.wait_log('disk: clock')
        self.assertEqual(guest.agent({'execute': 'guest-fsfreeze-freeze'}), 1)
        guest.skew_by_pause(2)
        time.sleep(1)
        self.assertNotIn('cause=resumed', program.log())
        status, out, _ = vmmonitor('--config', self.config(), '--sync', 'disk')
        self.assertEqual(status, 1)
        self.assertIn('disk: its file systems are frozen; thaw them with virsh domfsthaw', out)
        guest.agent({'execute': 'guest-fsfreeze-thaw'})
        program.wait_log('disk: clock corrected, cause=resumed', 12)
        self.right(guest)
        guest.destroy()


class LibvirtTest(GuestCase):
    """The ctypes layer."""

    def test_errors_carry_code_domain_and_text(self) -> None:
        connection = vm.Connection(self.host.uri)
        with self.assertRaises(vm.LibvirtError) as caught, \
                connection.domain('nope', 'virDomainLookupByName'):
            pass
        self.assertEqual((caught.exception.code, caught.exception.domain), (42, 10))
        self.assertIn('no domain with matching name \'nope\'', str(caught.exception))
        self.assertEqual(connection.library.call('virConnectClose', connection.handle), 0)
        with self.assertRaises(vm.LibvirtError) as caught:
            vm.Connection('qemu+unix:///system?socket=/nonexistent/sock')
        self.assertEqual((caught.exception.code, caught.exception.domain), (38, 7))
        self.assertIn('systemctl start libvirtd', vm.words(caught.exception))

    def test_no_reference_is_leaked(self) -> None:
        guest = self.vm('web1')
        host = vm.Host(self.host.uri)
        found = host.find('web1')
        assert found
        events: list[str] = []
        connection = vm.Connection(self.host.uri)
        subscription = vm.Subscription(connection, lambda uuid, name, kind: events.append(kind))
        for _ in range(3):
            guest.virsh('suspend')
            guest.virsh('resume')
            host.each()
            found.state()
            found.get_time()
            with self.assertRaises(vm.AgentError):
                found.agent('no-such-command')
        self.assertTrue(vm.Deadline(5).poll(lambda: events.count('resumed') >= 3), events)
        subscription.cancel()
        call = connection.library.call
        self.assertEqual(call('virConnectClose', connection.handle), 0, 'references are left')
        for lane in (host.queries, host.agents):
            self.assertEqual(len(lane.idle), 1, 'one call at a time needs one connection')
            self.assertEqual(call('virConnectClose', lane.idle.pop().handle), 0,
                             'references are left')

    def test_reconnects_leave_no_descriptors(self) -> None:
        program = self.monitor()

        def descriptors() -> int:
            return len(os.listdir(f'/proc/{program.process.pid}/fd'))
        counts = []
        for number in range(2, 8):
            self.host.kill9()
            self.host.start()
            program.wait_log('connected after', count=number)
            time.sleep(0.3)
            counts.append(descriptors())
        self.assertLessEqual(counts[-1], counts[0], counts)
        self.assertNotIn('still has', program.log())

    def test_more_calls_than_a_connection_takes(self) -> None:
        """Hung agents on one connection must not hold up what needs libvirt meanwhile."""
        self.only('web1', 'web2')
        guest, other = self.vm('web1'), self.vm('web2')
        guest.freeze_agent(12)
        host = vm.Host(self.host.uri)
        hung, healthy = host.find('web1'), host.find('web2')
        assert hung and healthy
        calls = [vm.spawn(f'hung {number}', self._ask, hung) for number in range(6)]
        time.sleep(0.3)
        slowest = 0.0
        for _ in range(5):
            began = time.monotonic()
            self.assertIs(hung.state(), vm.State.RUNNING)
            healthy.get_time()
            slowest = max(slowest, time.monotonic() - began)
        self.assertLess(slowest, 1.0)
        self.assertTrue(vm.Deadline(8).poll(lambda: hung.id in host.silent), 'not taken for hung')
        for call in calls:
            call.join(60)
        self.assertTrue(vm.Deadline(20).poll(lambda: self._ask(hung)))
        self.assertNotIn(hung.id, host.silent, 'an agent that answers again stays slow')
        self.right(other, 60)
        host.stop()

    @staticmethod
    def _ask(guest: vm.Guest) -> bool:
        with contextlib.suppress(vm.AgentError):
            guest.get_time()
            return True
        return False

    def test_without_the_qemu_library(self) -> None:
        guest = self.vm('web1')
        guest.skew(-30)
        code = ('import sys, vmmonitor as vm; vm.QEMU_PROTOTYPES.clear(); '
                'vm.leave(vm.main(sys.argv[1:]))')
        done = subprocess.run([sys.executable, '-c', code, '--config', self.config(), '--sync',
                               'web1'], cwd=HERE, timeout=60, stdout=subprocess.PIPE, check=False)
        self.assertRegex(done.stdout.decode(), 'web1: clock corrected, cause=sync before=-')
        self.right(guest)

    def test_a_missing_library_or_symbol_is_told(self) -> None:
        for change, text in (
                ('vm.ctypes.CDLL = fail', 'libvirt.so.0 can\'t be loaded: gone; install libvirt: '
                 'apt install libvirt-daemon-system'),
                ('vm.PROTOTYPES["virNew"] = (None, ())', 'libvirt.so.0 has no virNew; update')):
            code = ('import sys, vmmonitor as vm\ndef fail(*_):\n    raise OSError("gone")\n'
                    f'{change}\nvm.leave(vm.main(sys.argv[1:]))')
            done = subprocess.run([sys.executable, '-c', code, '--monitor'], cwd=HERE, timeout=60,
                                  stderr=subprocess.PIPE, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn(text, done.stderr.decode())
            self.assertNotIn('Traceback', done.stderr.decode())


class DaemonTest(GuestCase):
    """The program as a service: start, stop, reload, a libvirt that comes and goes."""

    def test_starts_before_libvirtd(self) -> None:
        self.only()
        guest = self.vm('web1', running=False)
        self.host.stop()
        program = self.program('--monitor', '--startup', config=self.config(
            {'startup': {'vmStartupCommands': ['start web1']}}))
        program.wait_log('systemctl start libvirtd')
        time.sleep(1)
        self.assertEqual(program.log().count('trying again'), 1, 'the same thing is told often')
        self.host.start()
        program.wait_log('startup: web1 started')
        program.wait_log('startup: ended after')
        guest.wait_agent()
        self.wait_right(guest, 5)
        self.host.kill9()
        self.host.start()
        program.wait_log('connected after', count=2)
        time.sleep(1)
        self.assertEqual(program.log().count('startup: web1'), 1, 'the list ran twice')

    def test_a_stopped_libvirtd_does_not_hold_up_the_end(self) -> None:
        self.vm('web1')
        program = self.monitor()
        assert self.host.process
        self.host.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(0.5)
            status, seconds = program.stop()
        finally:
            self.host.process.send_signal(signal.SIGCONT)
        self.assertEqual(status, 0)
        self.assertLess(seconds, 2)

    def test_startup_with_real_guests(self) -> None:
        self.only()
        saved, off, running = (self.vm(name) for name in ('web1', 'web2', 'web3'))
        off.destroy()
        saved.virsh('suspend')
        saved.virsh('managedsave')
        program = self.program('--startup', config=self.config({'startup': {'vmStartupCommands': [
            'start web1', 'start web2', 'start web3', 'wait web2 agent 30', 'delay 0.5',
            'wait web1 running 5']}}))
        program.wait_log('startup: ended after', 60)
        for text in ('web1 restored', 'web2 started', 'web3 already running', 'web2: agent after',
                     'web1: running after'):
            self.assertIn(text, program.log())
        for guest in (saved, off, running):
            self.assertEqual(guest.state(), 'running')
        self.assertEqual(program.stop(signal.SIGINT)[0], 0)

    def test_reload(self) -> None:
        port = free_port()
        listener: dict[str, Any] = {'listener': {'enabled': True, 'port': port}}
        program = self.program('--monitor', '--listen', config=self.config(listener))
        program.wait_log('connected after')

        def ask(key: str) -> int:
            context = ssl.create_default_context(cafile=str(self.directory / 'cert.pem'))
            request = urllib.request.Request(f'https://localhost:{port}/?cmd=list', headers={
                'Authorization': f'Bearer {key}'})
            try:
                with urllib.request.urlopen(request, timeout=10, context=context) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as problem:
                return problem.code
        self.assertEqual((ask(KEY), ask(OTHER_KEY)), (200, 401))
        self.config(listener, {'listener': {'key': OTHER_KEY}})
        program.process.send_signal(signal.SIGHUP)
        program.wait_log('configuration read again')
        self.assertEqual((ask(KEY), ask(OTHER_KEY)), (401, 200))
        for change, reason in (({'listener': {'port': 'x'}}, 'listener.port: must be a whole'),
                               ({'listener': {'certificate': {'path': 'absent.pem'}}},
                                'absent.pem: no such file')):
            self.config(listener, change)
            program.process.send_signal(signal.SIGHUP)
            program.wait_log(f'reload refused, the old configuration stays: .*{reason}')
            self.assertEqual(ask(OTHER_KEY), 200)
        self.config(listener, {'listener': {'key': OTHER_KEY}, 'libvirt': {'uri': 'test:///x'}})
        program.process.send_signal(signal.SIGHUP)
        program.wait_log('counts after a restart: libvirt.uri')
        self.assertNotIn(OTHER_KEY, program.log())

    def test_systemd(self) -> None:
        path = str(self.directory / 'notify.sock')
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(path)
            systemd.settimeout(10)
            read, write = os.pipe()
            info = os.fstat(write)
            os.close(read)
            os.close(write)
            program = self.program('--monitor', env={
                'NOTIFY_SOCKET': path, 'WATCHDOG_USEC': '900000',
                'JOURNAL_STREAM': f'{info.st_dev}:{info.st_ino}'})
            seen = ''
            while 'libvirt connected' not in seen or seen.count('WATCHDOG=1') < 2:
                seen += systemd.recv(4096).decode() + '\n'
            self.assertIn('READY=1', seen)
            self.assertIn('STATUS=monitor; ', seen)
            program.process.send_signal(signal.SIGHUP)
            while 'RELOADING=1\nMONOTONIC_USEC=' not in seen or seen.count('READY=1') < 2:
                seen += systemd.recv(4096).decode() + '\n'
            self.assertEqual(program.stop()[0], 0)
            while 'STOPPING=1' not in seen:
                seen += systemd.recv(4096).decode() + '\n'

    def test_https_to_real_guests(self) -> None:
        self.only('web1')
        guest, port = self.vm('web1'), free_port()
        program = self.program('--monitor', '--listen', config=self.config(
            {'listener': {'enabled': True, 'port': port}}))
        program.wait_log('connected after')

        def ask(command: str, more: str = '') -> tuple[int, str]:
            done = subprocess.run(
                ['curl', '-sS', '--cacert', str(self.directory / 'cert.pem'),
                 '-w', '\n%{http_code}', '-H', f'Authorization: Bearer {KEY}',
                 f'https://localhost:{port}/?cmd={command}&target=web1{more}'],
                timeout=60, stdout=subprocess.PIPE, check=True)
            text, _, status = done.stdout.decode().rpartition('\n')
            return int(status), text.strip()
        for prepare, command, answer, state in (
                ((), 'start', (200, 'web1: already running'), 'running'),
                ((), 'save', (200, 'web1: saved'), 'shut off'),
                ((), 'save', (200, 'web1: already saved'), 'shut off'),
                ((), 'stop', (200, 'web1: already off'), 'shut off'),
                ((), 'wake', (200, 'web1: restored'), 'running'),
                (('suspend',), 'stop',
                 (409, 'web1 is paused and can\'t shut down; start it first'), 'paused'),
                ((), 'wake', (200, 'web1: resumed'), 'running'),
                (('dompmsuspend', 'mem'), 'save',
                 (409, 'web1 is asleep and can\'t be saved; start it first'), 'pmsuspended'),
                ((), 'start', (200, 'web1: woken'), 'running'),
                (('suspend',), 'save', (200, 'web1: saved'), 'shut off'),
                ((), 'start', (200, 'web1: restored'), 'running')):
            if prepare:
                guest.wait_agent()
                guest.virsh(*prepare)
                guest.wait_state('paused' if 'suspend' in prepare else 'pmsuspended')
            with self.subTest(command=command, state=state):
                self.assertEqual(ask(command), answer)
                self.assertEqual(guest.state(), state)
        self.wait_right(guest, 5)
        self.assertRegex(ask('status')[1], r'^web1 running agent=connected clock=[+-]\d\.\dms at ')
        guest.destroy()             # a guest of this kind that slept can't power itself off
        self.assertEqual(ask('start'), (200, 'web1: started'))
        guest.wait_agent()
        self.assertEqual(ask('stop'), (200, 'web1: asked to shut down'))
        guest.wait_state('shut off', 20)
        self.assertEqual(ask('stop'), (200, 'web1: already off'))
        self.assertEqual(ask('save')[0], 409)
        self.assertEqual(ask('start', '&wait=0')[0], 202)
        guest.wait_state('running', 20)
        guest.wait_agent()
        self.assertEqual(ask('save', '&wait=0')[0], 202)
        self.assertEqual(ask('start')[0], 200)          # waits for the save, then restores
        self.assertEqual(guest.state(), 'running')
        # Saved while paused by somebody else: libvirt restores it as paused.
        guest.virsh('suspend')
        guest.virsh('managedsave')
        self.assertEqual(ask('start'), (200, 'web1: restored'))
        self.assertEqual(guest.state(), 'running')
        self.host.stop()
        program.wait_log('connection lost')
        status, text = ask('start')
        self.host.start()
        self.assertEqual(status, 503)
        self.assertIn('is away', text)
        program.wait_log('connected after', count=2)
        self.assertEqual(ask('start')[0], 200)

    def test_stop_without_an_agent_uses_acpi(self) -> None:
        self.only('noagent')
        guest = self.vm('noagent', cmdline='noga')
        time.sleep(4)                       # no agent that would say that acpid is up
        host = vm.Host(self.host.uri)
        found = host.find('noagent')
        assert found
        self.assertEqual(found.stop(), 'asked to shut down')
        guest.wait_state('shut off', 20)
        host.stop()


class OneShotTest(GuestCase):
    """--status, --sync, --check, and what the command line refuses."""

    def test_status(self) -> None:
        self.only('web1')
        guest = self.vm('web1')
        self.vm('web2', running=False)
        self.vm('deaf', channel=False)
        guest.skew(-60)
        status, out, err = vmmonitor('--config', self.config(), '--status')
        self.assertEqual((status, err), (0, ''))
        lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
        self.assertEqual(lines['NAME'], ['STATE', 'AGENT', 'CLOCK'])
        self.assertEqual(lines['web1'][:2], ['running', 'answers'])
        self.assertRegex(lines['web1'][2], r'^-(59|60|61)\.\d\d\ds$')
        self.assertEqual(lines['web2'], ['off', 'disconnected', '-'])
        self.assertEqual(lines['deaf'][1], 'absent')
        status, out, _ = vmmonitor('--config', self.config(), '--status', 'web1', '--json')
        known = json.loads(out)['guests'][0]
        self.assertEqual((status, known['name'], known['agent']), (0, 'web1', 'answers'))
        self.assertLess(known['offsetMs'], -58000)

    def test_sync(self) -> None:
        guest = self.vm('web1')
        guest.skew(-60)
        status, out, _ = vmmonitor('--config', self.config(), '--sync', 'web1')
        self.assertEqual(status, 0)
        self.assertRegex(out, r'^web1: clock corrected, cause=sync before=-\d\d\.\d\d\ds after=')
        self.right(guest)
        status, out, _ = vmmonitor('--config', self.config(), '--sync', 'web1', '--json')
        self.assertEqual(json.loads(out)['guests'][0]['corrected'], False)
        deaf = self.vm('deaf', channel=False)
        status, out, _ = vmmonitor('--config', self.config(), '--sync')
        self.assertEqual(status, 1)
        self.assertIn('web1: clock is right', out)
        self.assertIn('deaf: no guest agent channel; add a <channel>', out)
        deaf.destroy()
        status, _, err = vmmonitor('--config', self.config(), '--sync', 'nope')
        self.assertEqual(status, 1)
        self.assertIn('no guest is named nope; --status lists them', err)

    def test_check(self) -> None:
        guest = self.vm('web1')
        self.vm('deaf', channel=False)
        guest.virsh('autostart')
        self.addCleanup(guest.virsh, 'autostart', '--disable')
        path = self.config({'listener': {'enabled': True, 'port': free_port()}, 'startup': {
            'enabled': True, 'vmStartupCommands': ['start web1', 'start nope']}})
        status, out, _ = vmmonitor('--config', path, '--check')
        self.assertEqual(status, 1)
        for line in (r'ok    config .*: monitor, startup, listen', r'ok    libvirt .*: version \d+',
                     r'ok    certificate cert\.pem: valid until ', r'ok    port: can listen on \*:',
                     r'ok    guests: \d+ defined', r'FAIL  deaf: no guest agent channel; add',
                     r'FAIL  web1 is started by libvirt, too, .*virsh autostart --disable web1',
                     r'FAIL  startup\.vmStartupCommands line 2: no guest is named nope'):
            self.assertRegex(out, f'(?m)^{line}')
        status, out, _ = vmmonitor('--config', self.config({'monitor': {'exclude': ['*']}}),
                                   '--check', '--json')
        self.assertEqual((status, json.loads(out)['ok']), (0, True))
        path = self.write({'libvirt': {'uri': 'qemu+unix:///system?socket=/nonexistent'},
                           'listener': {'enabled': False}})
        status, out, _ = vmmonitor('--config', path, '--check')
        self.assertEqual(status, 1)
        self.assertRegex(out, '(?m)^FAIL  libvirt .*systemctl start libvirtd')

    def test_a_user_without_rights_is_told(self) -> None:
        script = self.directory / 'vmmonitor.py'
        shutil.copy(HERE / 'vmmonitor.py', script)
        self.directory.chmod(0o755)
        config = self.write_text(json.dumps({'libvirt': {'uri': self.host.uri}}), 'nobody.json')
        os.chmod(config, 0o644)
        done = subprocess.run(
            ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', sys.executable,
             str(script), '--config', config, '--check'], timeout=60, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, check=False)
        if b'Permission denied' in done.stderr:
            self.skipTest(f'nobody can\'t run {sys.executable}')
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stdout.decode(), r'FAIL  libvirt .*Permission denied.*group libvirt')


class CommandLineTest(TempCase):
    """What needs no libvirt."""

    def test_version_and_help(self) -> None:
        self.assertEqual(vmmonitor('--version'), (0, f'vmmonitor {vm.__version__}\n', ''))
        status, out, _ = vmmonitor('--help')
        self.assertEqual(status, 0)
        for option in ('--monitor', '--startup', '--listen', '--config', '--check', '--status',
                       '--sync', '--json', 'examples:'):
            self.assertIn(option, out)

    def test_refusals(self) -> None:
        nothing = self.write({'listener': {'enabled': False}, 'monitor': {'enabled': False}})
        for arguments, text in (
                (('--config', '/nonexistent.json'), 'no such file; copy config.json.sample'),
                (('--config', nothing), 'nothing is enabled; set monitor.enabled'),
                (('--listen', '--config', self.write({'listener': {'key': 'CHANGE-ME'}}, name='s')),
                 'still the sample\'s'),
                (('--json',), 'goes with --status, --sync or --check'),
                (('--monitor', '--status'), 'does not go with --status'),
                (('--status', '--sync'), 'not allowed with argument'),
                (('--fly',), 'unrecognized arguments: --fly')):
            with self.subTest(arguments=arguments):
                status, out, err = vmmonitor(*arguments)
                self.assertEqual((status, out), (2, ''), err)
                self.assertIn(text, err)
                self.assertNotIn('Traceback', err)

    def test_one_file_alone(self) -> None:
        """A copy of the one file, without a config, tells what the listener needs."""
        script = self.directory / 'alone.py'
        shutil.copy(HERE / 'vmmonitor.py', script)
        done = subprocess.run([sys.executable, str(script), '--listen'], timeout=60,
                              stderr=subprocess.PIPE, check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn('config.json: no such file; copy config.json.sample there',
                      done.stderr.decode())


# === packaging ==================================================================================

class PackagingTest(unittest.TestCase):
    """What stands beside the program."""

    def test_top_level(self) -> None:
        done = subprocess.run(['git', 'ls-files'], cwd=HERE, timeout=30, stdout=subprocess.PIPE,
                              check=False)
        if done.returncode:
            self.skipTest('not a git checkout')
        names = {name.split('/')[0] for name in done.stdout.decode().splitlines()}
        self.assertEqual({name for name in names if not name.startswith('.')}, {
            'vmmonitor.py', 'test_vmmonitor.py', 'config.json.sample', 'install.sh',
            'vmmonitor.service', 'README.md'})

    def test_sections_are_those_of_the_map(self) -> None:
        text = (HERE / 'vmmonitor.py').read_text()
        sections = re.findall(r'(?m)^# === ([a-z ]+) =', text)
        table = (vm.__doc__ or '').partition('The sections')[2].partition('Rules')[0]
        self.assertEqual(re.findall(r'(?m)^    ([a-z]+(?: [a-z]+)*)  ', table), sections)

    def test_unit(self) -> None:
        if not shutil.which('systemd-analyze'):
            self.skipTest('systemd-analyze is not installed')
        with tempfile.TemporaryDirectory() as directory:
            unit = Path(directory, 'vmmonitor.service')
            unit.write_text((HERE / 'vmmonitor.service').read_text().replace(
                '/opt/vmmonitor/vmmonitor.py', str(HERE / 'vmmonitor.py')))
            done = subprocess.run(['systemd-analyze', 'verify', str(unit)], timeout=60,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        self.assertNotIn(b'vmmonitor.service:', done.stdout)


# === benchmark ==================================================================================

def benchmark() -> None:
    """Put a clock right that is 3 s slow: by this program, and by what virsh offers."""
    with contextlib.closing(Libvirtd()) as host:
        host.start()
        guest = Vm(host, 'bench')
        guest.define()
        guest.start()
        guest.wait_agent()
        domain = vm.Host(host.uri).find('bench')
        assert domain
        ways: dict[str, Callable[[], object]] = {
            'vmmonitor': lambda: vm.correct(domain, 5 * vm.MS, False),
            'vmmonitor --sync': lambda: vmmonitor_sync(host.uri),
            'virsh domtime --now': lambda: guest.virsh('domtime', '--now'),
            'virsh domtime --sync': lambda: guest.virsh('domtime', '--sync')}
        took: dict[str, list[float]] = {name: [] for name in ways}
        left: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(7):
            for name, way in ways.items():
                guest.skew(-3)
                began = time.monotonic()
                way()
                took[name].append(time.monotonic() - began)
                left[name].append(abs(guest.offset()))
        base = statistics.median(took['vmmonitor'])
        print(f'{"way":22} {"median s":>9} {"ratio":>6} {"offset left, median":>20} {"worst":>9}')
        for name in ways:
            middle = statistics.median(took[name])
            print(f'{name:22} {middle:9.3f} {middle / base:6.2f} '
                  f'{statistics.median(left[name]) * 1000:17.2f} ms '
                  f'{max(left[name]) * 1000:6.1f} ms')


def vmmonitor_sync(uri: str) -> None:
    """Correct all clocks by the command line."""
    with tempfile.NamedTemporaryFile('w', suffix='.json') as config:
        json.dump({'libvirt': {'uri': uri}}, config)
        config.flush()
        vmmonitor('--config', config.name, '--sync')


# === running ====================================================================================

class StrictResult(unittest.TextTestResult):
    """Says how long each test took, and with --strict counts a skipped test as a failure."""

    strict = False

    def startTest(self, test: unittest.TestCase) -> None:
        self.began = time.monotonic()
        super().startTest(test)

    def stopTest(self, test: unittest.TestCase) -> None:
        if self.showAll:
            self.stream.writeln(f'    {time.monotonic() - self.began:.1f} s')
        super().stopTest(test)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        if self.strict:
            problem = AssertionError(f'skipped: {reason}')
            self.addFailure(test, (AssertionError, problem, None))      # type: ignore[arg-type]
        else:
            super().addSkip(test, reason)
            self.stream.writeln(f'skipped: {test}: {reason}')


def what_is_missing() -> str:
    """Return why tests with real guests can't run here, or ''."""
    if os.getuid():
        return 'real guests need root: sudo python3 test_vmmonitor.py --install'
    missing = [name for name in ('virsh', 'libvirtd', 'qemu-system-x86_64', 'qemu-ga', 'busybox',
                                 'cpio', 'curl', 'openssl') if not shutil.which(name)]
    return f'{", ".join(missing)} not installed; --install does that' if missing else ''


def left_behind() -> set[str]:
    """Return what runs of these tests have left: their files, and the processes of their guests."""
    found = {str(path) for place in (tempfile.gettempdir(), CACHE.parent)
             for path in Path(place).glob('vmmonitor-*-*')}
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            text = path.read_bytes()
            if b'vmmonitor-rig-' in text:
                found.add(f'{path.parent.name}: {text.decode(errors="replace"):.200}')
    return found


def main() -> int:
    """Run the tests that the command line names, or all."""
    parser = argparse.ArgumentParser(description='Test vmmonitor.')
    parser.add_argument('--install', action='store_true',
                        help='first install the Debian packages that the tests need')
    parser.add_argument('--strict', action='store_true', help='a skipped test is a failure')
    parser.add_argument('--bench', action='store_true', help='measure instead of testing')
    parser.add_argument('tests', nargs='*', help='classes or tests, as for unittest')
    options = parser.parse_args()
    if options.install:
        install()
    if options.bench:
        benchmark()
        return 0
    StrictResult.strict = options.strict
    before = left_behind()              # another run, at the same time or killed
    logging.getLogger('vmmonitor').addHandler(logging.NullHandler())
    logging.lastResort = None
    try:
        program = unittest.main(
            module='__main__', argv=[sys.argv[0], *options.tests], exit=False,
            verbosity=2, testRunner=unittest.TextTestRunner(
                verbosity=2, resultclass=StrictResult))     # type: ignore[arg-type]
    finally:
        GuestCase.close_host()
    left = sorted(left_behind() - before)
    if left:
        print('left behind:', *left, sep='\n', file=sys.stderr)
    return 0 if program.result.wasSuccessful() and not left else 1


if __name__ == '__main__':
    vm.leave(main())
