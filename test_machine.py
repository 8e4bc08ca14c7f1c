"""Tests of the library's disks and machines, on a real QEMU (always emulating) and real guests.

All of it happens in network and mount namespaces of the test's own, so that the host's network is
neither seen nor touched. Needs root for whatever has machines in it.
"""
from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zlib
from pathlib import Path
from unittest import mock

os.environ.setdefault('VMMONITOR_ACCEL', 'tcg')
sys.path.insert(0, '/tmp/rig')
import rig

import vmmonitor as vm

QEMU = shutil.which('qemu-system-x86_64')
XORRISO = shutil.which('xorriso') or shutil.which('genisoimage')
HERE = Path(__file__).resolve().parent
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_REC_PRIVATE = 0x4000 | 0x40000
BOOT = 120.0                    # seconds that a guest may take on a busy host
libc = ctypes.CDLL(None, use_errno=True)
leave = contextlib.ExitStack()  # what tearDownModule undoes
kernel = initramfs = ''


def setUpModule() -> None:
    """Enter namespaces of our own, and have a guest's kernel and initramfs ready."""
    global kernel, initramfs
    if os.geteuid():
        return
    rig.MODULES += tuple(name for name in ('sr_mod', 'isofs', 'virtio_balloon', 'virtio_input')
                         if name not in rig.MODULES)
    kernel, initramfs = rig.guest_image()
    for kind, flag in (('net', CLONE_NEWNET), ('mnt', CLONE_NEWNS)):
        before = os.open(f'/proc/thread-self/ns/{kind}', os.O_RDONLY)
        leave.callback(os.close, before)
        leave.callback(libc.setns, before, flag)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET) \
            or libc.mount(b'none', b'/', None, MS_REC_PRIVATE, None) \
            or libc.mount(b'tmpfs', b'/run', b'tmpfs', 0, None) \
            or libc.mount(b'sysfs', b'/sys', b'sysfs', 0, None):
        raise OSError(ctypes.get_errno(), 'no namespaces')
    subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)


def tearDownModule() -> None:
    leave.close()


class Scratch(unittest.TestCase):
    """Tests with a directory of their own, whose end leaves nothing behind."""

    dir: Path

    @classmethod
    def setUpClass(cls) -> None:
        cls.dir = Path(tempfile.mkdtemp(prefix='vmmonitor-machine-'))
        cls.dir.chmod(0o711)
        cls.addClassCleanup(shutil.rmtree, cls.dir)

    def path(self, name: str) -> str:
        """Return a path in this test's own directory."""
        place = self.dir / self._testMethodName
        place.mkdir(mode=0o711, exist_ok=True)
        return str(place / name)

    @contextlib.contextmanager
    def refused(self, *words: str, kind: type[Exception] = vm.Error):
        """Expect an error whose message and hint have all of `words`."""
        with self.assertRaises(kind) as caught:
            yield
        for word in words:
            self.assertIn(word, vm.words(caught.exception))


@contextlib.contextmanager
def user_of(path: str):
    """Have a QEMU keep an image open."""
    process = subprocess.Popen(
        ['nice', '-n', '19', QEMU, '-M', 'q35', '-accel', 'tcg', '-nodefaults', '-display', 'none',
         '-S', '-qmp', 'stdio', '-blockdev', json.dumps({
             'driver': 'qcow2', 'node-name': 'd', 'file': {'driver': 'file', 'filename': path}}),
         '-device', 'virtio-blk-pci,drive=d'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


class TestHarddrive(Scratch):
    """Images, by what qemu-img and the bytes of the file say afterwards."""

    def img(self, *argv: str) -> str:
        return subprocess.run(['qemu-img', *argv], check=True, capture_output=True,
                              text=True).stdout

    def io(self, path: str, command: str, form: str = 'qcow2') -> str:
        return subprocess.run(['qemu-io', '-f', form, '-c', command, path], check=True,
                              capture_output=True, text=True).stdout

    def test_creates_if_absent_and_never_overwrites(self) -> None:
        path = self.path('a.qcow2')
        drive = vm.Harddrive(path, size=0.5)
        self.assertEqual(drive.info()['virtual-size'], 1 << 29)
        self.assertEqual(drive.info()['format'], 'qcow2')
        inode = os.stat(path).st_ino
        again = vm.Harddrive(path, size=7)
        self.assertEqual((os.stat(path).st_ino, again.info()['virtual-size']), (inode, 1 << 29))
        with self.refused(path, 'exists'):
            drive._create(1 << 20)
        self.assertEqual(os.stat(path).st_ino, inode)
        self.assertEqual(os.listdir(os.path.dirname(path)), ['a.qcow2'])

    def test_odd_names_are_taken_literally(self) -> None:
        for name in ('a,readonly=on.qcow2', 'nbd:host.qcow2', '-f.qcow2', 'json:{}.qcow2'):
            with self.subTest(name):
                path = self.path(name)
                self.assertEqual(vm.Harddrive(path, 0.1).info()['filename'], path)
                self.assertTrue(os.path.exists(path))
        with self.refused('control characters'):
            vm.Harddrive(self.path('a\nb'))

    def test_formats_are_never_probed(self) -> None:
        raw = vm.Harddrive(self.path('r.raw'), 0.01, 'raw')
        self.img('create', '-q', '-f', 'qcow2', '-b', '/etc/hostname', '-F', 'raw',
                 self.path('evil.qcow2'), '1M')
        evil = Path(self.path('evil.qcow2')).read_bytes()
        with open(raw.filename, 'r+b') as image:        # as a guest could do it
            image.write(evil)
        again = vm.Harddrive(raw.filename, format='raw')
        self.assertEqual(again.info()['format'], 'raw')
        self.assertNotIn('backing-filename', again.info())
        self.assertEqual(again.blockdev('n', lambda path, _: path)['driver'], 'raw')
        with self.refused('/etc/hostname', 'was not named', 'backing='):
            vm.Harddrive(self.path('evil.qcow2'))
        Path(self.path('plain')).write_bytes(bytes(1 << 20))
        with self.refused('not a qcow2 image'):
            vm.Harddrive(self.path('plain'))
        for form in ('vmdk', 'json:{}', ''):
            with self.refused('format'):
                vm.Harddrive(self.path('x'), format=form)

    def test_external_data_files_are_refused(self) -> None:
        path = self.path('e.qcow2')
        self.img('create', '-q', '-f', 'qcow2', '-o', f'data_file={self.path("data")}', path, '1M')
        with self.refused('another file'):
            vm.Harddrive(path)

    def test_backing(self) -> None:
        base = vm.Harddrive(self.path('base.qcow2'), 0.01)
        self.io(base.filename, 'write -P 0x41 0 64k')
        thin = vm.Harddrive(self.path('thin.qcow2'), 0.005, backing=base)
        self.assertEqual(thin.info()['virtual-size'], base.info()['virtual-size'])
        self.assertIn('read 65536', self.io(thin.filename, 'read -P 0x41 0 64k'))
        self.io(thin.filename, 'write -P 0x42 0 64k')
        thin.wipe()
        self.assertIn('read 65536', self.io(thin.filename, 'read -P 0x41 0 64k'))
        vm.Harddrive(thin.filename, backing=base.filename)
        with self.refused('was not named'):
            vm.Harddrive(thin.filename)
        with self.refused('was not named'):
            vm.Harddrive(thin.filename, backing=vm.Harddrive(self.path('other.qcow2'), 0.01))
        with self.refused('no backing file'):
            vm.Harddrive(base.filename, backing=self.path('other.qcow2'))
        with self.refused('no such image'):
            vm.Harddrive(self.path('t2.qcow2'), backing=self.path('absent'))
        blockdev = thin.blockdev('n', lambda path, _: path)
        self.assertTrue(blockdev['backing']['read-only'])
        self.assertIsNone(blockdev['backing']['backing'])

    def test_snapshots(self) -> None:
        drive = vm.Harddrive(self.path('s.qcow2'), 0.01)
        self.io(drive.filename, 'write -P 1 0 64k')
        self.assertEqual(drive.snapshot('first'), 'first')
        self.io(drive.filename, 'write -P 2 0 64k')
        named = drive.snapshot()
        self.assertEqual([row.tag for row in drive.snapshots], ['first', named])
        self.assertAlmostEqual(drive.snapshots[0].when, time.time(), delta=60)
        with self.refused('has a snapshot first'):
            drive.snapshot('first')
        drive.load_snapshot('first')
        self.io(drive.filename, 'read -P 1 0 64k')
        drive.delete_snapshot('first')
        self.assertEqual([row.tag for row in drive.snapshots], [named])
        for call in (drive.load_snapshot, drive.delete_snapshot):
            with self.refused('no snapshot first'):
                call('first')
        for tag in ('1', '-d', 'a b', '../a', 'a' * 64):
            with self.refused('name of a snapshot'):
                drive.snapshot(tag)
        with self.refused('raw', 'qcow2'):
            vm.Harddrive(self.path('r'), 0.01, 'raw').snapshot('a')

    def test_wipe(self) -> None:
        drive = vm.Harddrive(self.path('w.qcow2'), 0.01)
        os.chmod(drive.filename, 0o640)
        self.io(drive.filename, 'write -P 1 0 64k')
        drive.snapshot('one')
        drive.snapshot('two')
        drive.wipe(snapshots_only=True)
        self.assertEqual(drive.snapshots, [])
        self.io(drive.filename, 'read -P 1 0 64k')
        drive.snapshot('one')
        size = drive.info()['virtual-size']
        drive.wipe()
        self.assertEqual((drive.snapshots, drive.info()['virtual-size']), ([], size))
        self.io(drive.filename, 'read -P 0 0 64k')
        self.assertEqual(os.stat(drive.filename).st_mode & 0o777, 0o640)
        with mock.patch.object(vm.Harddrive, '_img', side_effect=vm.DiskError('no')):
            inode = os.stat(drive.filename).st_ino
            with contextlib.suppress(vm.DiskError):
                drive._create(1 << 20, replace=True)
        self.assertEqual(os.stat(drive.filename).st_ino, inode)

    def test_in_use(self) -> None:
        drive = vm.Harddrive(self.path('u.qcow2'), 0.01)
        drive.snapshot('one')
        self.assertFalse(drive.in_use())
        with user_of(drive.filename):
            self.assertTrue(drive.in_use())
            self.assertEqual([row.tag for row in drive.snapshots], ['one'])
            for what in (drive.wipe, lambda: drive.wipe(True), lambda: drive.snapshot('two'),
                         lambda: drive.load_snapshot('one'), lambda: drive.resize(1)):
                with self.refused('stop the machine'):
                    what()
        self.assertFalse(drive.in_use())
        drive.wipe()

    def test_resize(self) -> None:
        for form in ('qcow2', 'raw'):
            with self.subTest(form):
                drive = vm.Harddrive(self.path(f'z.{form}'), 0.01, form)
                drive.resize(0.02)
                self.assertEqual(drive.info()['virtual-size'], -(-round(0.02 * (1 << 30)) // 512)
                                 * 512)
                size = drive.info()['virtual-size']
                with self.refused('less than', 'shrink=True'):
                    drive.resize(0.01)
                self.assertEqual(drive.info()['virtual-size'], size)
                drive.resize(0.01, shrink=True)
                self.assertLess(drive.info()['virtual-size'], size)
                for bad in (0, -1, 'x', True, float('nan')):
                    with self.refused('size'):
                        drive.resize(bad)

    def test_qemu_string(self) -> None:
        drive = vm.Harddrive(self.path('q.qcow2'), 0.01)
        self.assertIn('"backing": null', drive.qemu_string)
        Path(self.path('q.iso')).write_bytes(bytes(2048))
        subprocess.run(['nice', '-n', '19', QEMU, '-M', 'q35', '-accel', 'tcg', '-display', 'none',
                        '-nodefaults', '-S', '-qmp', 'stdio', *shlex.split(drive.qemu_string),
                        *shlex.split(vm.CD(self.path('q.iso')).qemu_string)], check=True,
                       timeout=30, input=b'{"execute":"qmp_capabilities"}{"execute":"quit"}',
                       capture_output=True)


class TestCD(Scratch):
    """CDs without a machine; with one, see TestMachine."""

    def test_off_line(self) -> None:
        Path(self.path('a.iso')).write_bytes(bytes(2048))
        disc = vm.CD(self.path('a.iso'))
        self.assertEqual(disc.tray, vm.Tray(False, False, True))
        with self.refused('No such file'):
            disc.insert(self.path('absent.iso'))
        self.assertTrue(disc.tray.medium)
        disc.eject()
        self.assertEqual((disc.filename, disc.tray.medium), ('', False))
        disc.insert(vm.CD(self.path('a.iso')))
        self.assertEqual(disc.filename, self.path('a.iso'))
        with self.refused('No such file'):
            vm.CD(self.path('absent.iso'))

    @unittest.skipUnless(XORRISO, 'needs xorriso or genisoimage')
    def test_seed(self) -> None:
        disc = vm.CD.seed('#cloud-config\n', 'instance-id: i1\n', self.path('seed.iso'))
        image = Path(disc.filename).read_bytes()
        self.assertEqual(image[32769:32774], b'CD001')
        self.assertEqual(image[32808:32814], b'cidata')
        self.assertIn(b'#cloud-config\n', image)
        self.assertIn(b'instance-id: i1\n', image)
        with self.refused('exists'):
            vm.CD.seed('', '', self.path('seed.iso'))

    def test_seed_without_a_maker(self) -> None:
        with mock.patch('shutil.which', return_value=None), self.refused('install xorriso'):
            vm.CD.seed('', '', self.path('seed.iso'))
        self.assertFalse(os.path.exists(self.path('seed.iso')))


def sh(machine: vm.Machine, script: str, timeout: float = 30) -> str:
    """Run a script in the guest and return what it prints."""
    done = machine.exec(['sh', '-c', script], timeout=timeout)
    if done.status:
        raise AssertionError(f'{script}: status {done.status}: {done.out + done.err!r}')
    return done.out.decode()


def soon(check, timeout: float = 10, pause: float = 0.05):
    """Call `check` until what it returns is true, or time is up; return that."""
    deadline = vm.Deadline(timeout)
    while True:
        found = check()
        if found or deadline.passed():
            return found
        time.sleep(pause)


def colours(path: str) -> set[bytes]:
    """Return the colours in a PNG, read independently of what wrote it."""
    data, at, packed = Path(path).read_bytes(), 8, b''
    while at < len(data):
        size, kind = struct.unpack('>I4s', data[at:at + 8])
        body = data[at + 8:at + 8 + size]
        assert struct.unpack('>I', data[at + 8 + size:at + 12 + size])[0] == zlib.crc32(kind + body)
        if kind == b'IHDR':
            width, height, depth, colour = struct.unpack('>IIBB', body[:10])
            assert (depth, colour) == (8, 2), (depth, colour)
        packed += body if kind == b'IDAT' else b''
        at += 12 + size
    raw, line, found = zlib.decompress(packed), 1 + width * 3, set()
    assert len(raw) == height * line
    above = bytearray(line - 1)
    for start in range(0, len(raw), line):
        row = bytearray(raw[start + 1:start + line])
        for i in range(line - 1) if raw[start] else ():
            a, b, c = (row[i - 3] if i > 2 else 0), above[i], (above[i - 3] if i > 2 else 0)
            paeth = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            row[i] = (row[i] + (0, a, b, (a + b) // 2, paeth)[raw[start]]) & 255
        found |= {bytes(row[i:i + 3]) for i in range(0, line - 1, 3)}
        above = row
    return found


@unittest.skipIf(os.geteuid(), 'needs root, to make namespaces')
class Live(Scratch):
    """Tests with machines, in a directory of their own."""

    old = False                 # this QEMU is older than 6.0: snapshots by HMP, native PCIe slots

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        shown = subprocess.run([QEMU, '--version'], check=True, capture_output=True).stdout
        cls.old = int(re.search(rb'version (\d+)', shown)[1]) < 6
        cls.home = cls.dir / 'm'
        cls.enterClassContext(mock.patch.object(vm, 'MACHINES_DIR', str(cls.home))) \
            if hasattr(cls, 'enterClassContext') else cls._enter()
        cls.addClassCleanup(cls.end_all)

    @classmethod
    def _enter(cls) -> None:
        patch = mock.patch.object(vm, 'MACHINES_DIR', str(cls.home))
        patch.start()
        cls.addClassCleanup(patch.stop)

    @classmethod
    def end_all(cls) -> None:
        for name in os.listdir(cls.home) if cls.home.exists() else ():
            vm.Machine.load(name).delete(force=True)

    @classmethod
    def guest(cls, name: str, **options) -> vm.Machine:
        """Make a machine with the test guest in it."""
        return vm.Machine(name, **{'memory': 160, 'kernel': kernel, 'initrd': initramfs,
                                   'cmdline': rig.CMDLINE, **options})


class TestGuest(Live):
    """All that can be done with one running guest."""

    machine: vm.Machine

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.disk = vm.Harddrive(cls.dir / 'disk.qcow2', 0.1)
        cls.raw = vm.Harddrive(cls.dir / 'data.raw', 0.05, 'raw')
        cls.machine = cls.guest('web', harddrives=[cls.disk, cls.raw], memory=512, maxmemory=1024,
                                nics=1, monitor_port=0)
        cls.machine.start_vm()
        cls.machine.wait('agent', BOOT)
        sh(cls.machine, 'modprobe -a virtio_net virtio_blk sr_mod isofs')

    def setUp(self) -> None:
        self.assertIs(self.machine.state(), vm.State.RUNNING)

    def test_agent(self) -> None:
        m = self.machine
        done = m.exec(['sh', '-c', 'cat; echo err >&2; exit 3'], stdin=b'in\0put')
        self.assertEqual(done, (3, b'in\0put', b'err\n'))
        with self.refused('no-such-program', kind=vm.AgentError):
            m.exec(['no-such-program'])
        with self.refused('did not end within'):
            m.exec(['sh', '-c', 'sleep 3 & echo'], timeout=0.5)
        data = os.urandom(150_000)
        m.write_file('/tmp/data', data)
        self.assertEqual(m.read_file('/tmp/data'), data)
        self.assertIn('lo', [row['name'] for row in m.interfaces()])
        self.assertEqual(m.agent_state(), 'connected')
        sh(m, 'date -s @1000000000')
        self.assertLess(abs(m.get_time() - 1e18), 60e9)
        self.assertEqual(m.sync_time().method, 'guest-set-time')
        self.assertLess(abs(m.get_time() - time.time_ns()), 1e9)

    def test_agent_answers_late(self) -> None:
        """An answer to an earlier question is never taken for one to a later."""
        m = self.machine
        sh(m, 'pid=$(pidof qemu-ga); (sleep 0.3; kill -STOP $pid; sleep 2.5; kill -CONT $pid)'
              ' >/dev/null 2>&1 &')
        time.sleep(0.6)
        for _ in range(2):
            with self.refused('does not answer', kind=vm.AgentError):
                m.agent('guest-info', timeout=0.5)
        self.assertTrue(soon(lambda: self.clock(m)))
        for _ in range(5):
            self.assertIsInstance(m.agent('guest-get-time'), int)

    def clock(self, m: vm.Machine) -> int:
        with contextlib.suppress(vm.AgentError):
            return m.get_time()
        return 0

    def test_unprivileged_and_sandboxed(self) -> None:
        m = self.machine
        status = dict(line.split(':\t', 1) for line in
                      Path(f'/proc/{m.pid()}/status').read_text().splitlines() if ':\t' in line)
        self.assertEqual(set(status['Uid'].split()), {str(m.kept.uid)})
        self.assertGreater(m.kept.uid, 1 << 30)
        self.assertEqual(status['Groups'].strip(), '')
        for row in ('CapEff', 'CapPrm', 'CapBnd', 'CapAmb', 'CapInh'):
            self.assertEqual(int(status[row], 16), 0, row)
        self.assertEqual((status['NoNewPrivs'].strip(), status['Seccomp'].strip()), ('1', '2'))
        run = os.stat(m.run_path(''))
        self.assertEqual((run.st_uid, run.st_mode & 0o777), (m.kept.uid, 0o700))
        self.assertEqual(os.stat(m.home).st_uid, 0)
        argv = Path(f'/proc/{m.pid()}/cmdline').read_text().split('\0')
        self.assertIn('elevateprivileges=deny', argv[argv.index('-sandbox') + 1])
        self.assertNotIn(self.disk.filename, ' '.join(argv))
        self.assertRegex(argv[argv.index('-machine') + 1], r'^pc-q35-\d')
        self.assertEqual(os.stat(self.disk.filename).st_uid, 0)
        with self.refused('Permission denied'):
            m.qmp('blockdev-add', driver='file', node_name='x', filename=self.disk.filename)

    def test_monitors(self) -> None:
        m = self.machine
        self.assertIn('info version', m.send('help info'))
        self.assertRegex(m.send('info version'), r'^\d+\.')
        self.assertIn('unknown command', m.send('nonsense'))
        with self.refused('CommandNotFound'):
            m.qmp('nonsense')
        with socket.create_connection(('127.0.0.1', m.kept.monitor_port), 5) as hmp:
            hmp.sendall(b'info name\n')
            self.assertTrue(soon(lambda: b'web' in hmp.recv(4096)))
        with vm.QMP(m.run_path('tool')) as tool:        # a person's, while ours works
            self.assertEqual(tool.execute('query-name')['name'], 'web')
            self.assertEqual(m.qmp('query-uuid')['UUID'], m.id)
        with contextlib.ExitStack() as all_of_them:
            for _ in range(vm.MONITORS):
                all_of_them.enter_context(m.monitor())
            with self.refused('in use', kind=vm.Busy), m.monitor(0.2):
                pass
        got: list[str] = []
        thread = threading.Thread(target=lambda: got.extend(
            row['event'] for row in m.events(1.0)))
        thread.start()
        time.sleep(0.3)
        m.freeze()
        m.unfreeze()
        thread.join()
        self.assertIn('STOP', got)
        self.assertIn('RESUME', got)

    def test_qemu_that_hangs(self) -> None:
        m, pid = self.machine, self.machine.pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            self.assertTrue(m.is_alive())
            with self.refused('stopped or overloaded', kind=vm.MachineError), m.monitor(0.5) as qmp:
                qmp.execute('query-status', 0.5)
        finally:
            os.kill(pid, signal.SIGCONT)
        self.assertEqual(m.state(), vm.State.RUNNING)

    def test_freeze(self) -> None:
        m = self.machine
        for _ in range(2):
            m.freeze()
            self.assertIs(m.state(), vm.State.PAUSED)
        with self.refused('drop its input', kind=vm.WrongState):
            m.send_key('a')
        for _ in range(2):
            m.unfreeze()
            self.assertIs(m.state(), vm.State.RUNNING)

    def pressed(self, act, seconds: int = 60) -> list[tuple[int, int, int]]:
        """Return the events (type, code, value) of all input devices while `act` is done."""
        m = self.machine
        count = int(sh(m, 'rm -f /tmp/ev.*; ls -d /dev/input/event* | wc -l'))
        m.agent('guest-exec', {'path': 'sh', 'arg': [
            '-c', 'for i in /dev/input/event*; do timeout '
            f'{seconds} cat $i > /tmp/ev.${{i##*/}} & done; wait']})
        soon(lambda: int(sh(m, 'ls /proc/[0-9]*/fd/* -l | grep -c "> /dev/input/event"; true'))
             >= count)
        act()
        sh(m, 'sleep 0.2; killall cat')
        data = m.exec(['sh', '-c', 'cat /tmp/ev.event*']).out
        rows = [struct.unpack('qqHHi', data[at:at + 24]) for at in range(0, len(data), 24)]
        return [row[2:] for row in rows if row[2]]

    def test_keys(self) -> None:
        events = self.pressed(lambda: (self.machine.send_key('ctrl-shift-z'),
                                       self.machine.send(b'alt-f2')))
        keys = [(code, value) for kind, code, value in events if kind == 1]
        self.assertEqual(keys, [(29, 1), (42, 1), (44, 1), (44, 0), (42, 0), (29, 0),
                                (56, 1), (60, 1), (60, 0), (56, 0)])
        with self.refused('nokey'):
            self.machine.send_key('ctrl-nokey')

    def test_text_is_typed_whole(self) -> None:
        text = ('The quick {brown} fox_jumps @ "lazy" dogs; ' * 8)[:230]
        events = self.pressed(lambda: self.machine.type_text(text))
        table = {2 + i: c for i, c in enumerate('1234567890-=')} | {
            16 + i: c for i, c in enumerate('qwertyuiop[]')} | {
            30 + i: c for i, c in enumerate("asdfghjkl;'`")} | {
            43: '\\', 57: ' '} | {44 + i: c for i, c in enumerate('zxcvbnm,./')}
        upper = dict(zip("1234567890-=[];'`\\,./", '!@#$%^&*()_+{}:"~|<>?'))
        typed, shift = '', False
        for kind, code, value in events:
            if kind == 1 and code == 42:
                shift = bool(value)
            elif kind == 1 and value == 1:
                typed += upper.get(table[code], table[code].upper()) if shift else table[code]
        self.assertEqual(typed, text)
        with self.refused('no key for'):
            self.machine.type_text('naïve')

    def test_mouse(self) -> None:
        m = self.machine
        m.screenshot(self.path('s.png'))
        width, height = struct.unpack('>II', Path(self.path('s.png')).read_bytes()[16:24])

        def act() -> None:
            m.mouse_move(width - 1, 0)
            m.mouse_click()
            m.mouse_move(width // 2, height + 999)
            m.mouse_click(3)
        events = self.pressed(act)
        self.assertEqual([row for row in events if row[0] == 1],
                         [(1, 0x110, 1), (1, 0x110, 0), (1, 0x111, 1), (1, 0x111, 0)])
        xs = [value for kind, code, value in events if (kind, code) == (3, 0)]
        ys = [value for kind, code, value in events if (kind, code) == (3, 1)]
        self.assertEqual((xs[0], ys[-1]), (32767, 32767))
        self.assertAlmostEqual(xs[-1] * (width - 1) / 32767, width // 2, delta=0.5)
        with self.refused('mouse button'):
            m.mouse_click(9)
        sh(m, 'rmmod virtio_input')
        try:
            with self.refused('no absolute pointer'):
                m.mouse_move(1, 1)
        finally:
            sh(m, 'modprobe virtio_input')

    def test_screenshot(self) -> None:
        m = self.machine
        before = len(m.qmp('query-fdsets')), os.listdir(m.run_path(''))
        self.assertEqual(m.screenshot(self.path('a.png')), self.path('a.png'))
        self.assertEqual((len(m.qmp('query-fdsets')), os.listdir(m.run_path(''))), before)
        self.assertGreater(len(colours(self.path('a.png'))), 1)
        real = vm.Machine._picture

        def old(machine: vm.Machine, **form: str) -> bytes:
            if form:
                raise vm.MachineError("Parameter 'format' is unexpected")
            return real(machine)
        with mock.patch.object(vm.Machine, '_picture', old):     # QEMU before 7.1
            m.screenshot(self.path('b.png'))
        self.assertEqual(colours(self.path('b.png')), colours(self.path('a.png')))
        with self.refused('no-such-dir'):
            m.screenshot('/no-such-dir/a.png')
        self.assertEqual(sorted(os.listdir(os.path.dirname(self.path('a')))), ['a.png', 'b.png'])

    def test_dump(self) -> None:
        m, seen = self.machine, []
        secret = os.urandom(8).hex()
        m.write_file('/tmp/secret', (f'<<{secret}>>' * 1000).encode())
        path = m.dump_memory(self.path('core'), progress=lambda *row: seen.append(row))
        self.assertIs(m.state(), vm.State.RUNNING)
        data = Path(path).read_bytes()
        self.assertEqual(data[:4], b'\x7fELF')
        self.assertIn(f'<<{secret}>><<'.encode(), data)
        self.assertEqual(seen[-1][0], seen[-1][1])
        self.assertGreater(seen[-1][1], 400 << 20)
        for name in ('at', 'once'):                     # while QEMU lets the guest go on
            os.unlink(m.dump_memory(self.path(name)))
        os.unlink(path)
        with self.refused('nonsense'):
            m.dump_memory(self.path('core2'), format='nonsense')
        Path(path).write_text('mine')
        with self.refused('exists'):
            m.dump_memory(path)
        self.assertEqual(os.listdir(os.path.dirname(path)), ['core'])
        m.freeze()
        os.unlink(path)
        m.dump_memory(path, format='kdump-zlib')
        self.assertIs(m.state(), vm.State.PAUSED)
        m.unfreeze()
        os.unlink(path)

    @unittest.skipUnless(XORRISO, 'needs xorriso or genisoimage')
    def test_cd(self) -> None:
        m = self.machine
        one, two = (vm.CD.seed(f'#disc {n}\n', 'i: 1\n', self.path(f'{n}.iso')) for n in (1, 2))
        sets = len(m.qmp('query-fdsets'))
        m.insert(one)
        self.assertIn('#disc 1', sh(m, "tr -dc ' -~' < /dev/sr0"))
        m.insert(two.filename)
        self.assertIn('#disc 2', sh(m, "tr -dc ' -~' < /dev/sr0"))
        self.assertEqual(m.cd.tray, vm.Tray(False, False, True))
        with self.refused('No such file'):
            m.insert(self.path('absent.iso'))
        self.assertEqual(m.cd.filename, two.filename)
        sh(m, 'mkdir -p /mnt; mount -t iso9660 -o ro /dev/sr0 /mnt; '
              'echo 1 > /proc/sys/dev/cdrom/lock; umount /mnt; mount -t iso9660 /dev/sr0 /mnt')
        self.assertTrue(m.cd.tray.locked)
        with self.refused('locked'):
            m.eject()
        with self.refused('locked'):
            m.insert(one)
        sh(m, 'umount /mnt')
        m.eject()
        self.assertEqual(m.cd.tray.medium, False)
        self.assertEqual(len(m.qmp('query-fdsets')), sets)      # no descriptor is left behind
        self.assertEqual(vm.Machine.load('web').cd.filename, '')
        self.assertNotEqual(m.exec(['sh', '-c', 'dd if=/dev/sr0 count=1']).status, 0)

    def test_harddrives(self) -> None:
        m = self.machine
        more = vm.Harddrive(self.path('more.qcow2'), 0.05)
        before = sh(m, 'ls /sys/block')
        device = m.add_harddrive(more)
        name = soon(lambda: set(sh(m, 'ls /sys/block').split()) - set(before.split())).pop()
        sh(m, f'echo found-it > /dev/{name}; sync')
        self.assertTrue(more.in_use())
        with self.refused('has', 'already'):
            m.add_harddrive(more)
        m.resize_harddrive(more, 0.1)
        self.assertTrue(soon(lambda: int(sh(m, f'cat /sys/block/{name}/size')) * 512
                             == more.info()['virtual-size'] > 100 << 20))
        with self.refused('shrink=True'):
            m.resize_harddrive(device.id, 0.05)
        with self.refused('stop the machine'):
            more.wipe()
        self.assertEqual(m.del_harddrive(more), f'{device.id} removed')
        self.assertFalse(more.in_use())
        self.assertEqual(sh(m, 'ls /sys/block'), before)
        self.assertIn(b'found-it', Path(more.filename).read_bytes())
        self.assertEqual(vm.Machine.load('web')._devices('disk'), m._devices('disk'))
        with self.refused('has no disk'):
            m.del_harddrive(more)

    def test_nics(self) -> None:
        m = self.machine
        nic = vm.VirtualNic(namespace='web')
        device = m.add_nic(nic)
        self.assertTrue(soon(lambda: m.exec(['grep', '-l', nic.mac, '/sys/class/net/eth1/address'])
                             .status == 0, 40))
        sh(m, 'ip link set eth1 up')
        carrier = 'cat /sys/class/net/eth1/carrier'
        self.assertTrue(soon(lambda: sh(m, carrier) == '1\n'))
        m.nic_state(nic, False)
        self.assertTrue(soon(lambda: sh(m, carrier) == '0\n'))
        self.assertFalse(vm.Machine.load('web')._find('nic', nic.name).facts['up'])
        m.nic_state(device.id, True)
        self.assertTrue(soon(lambda: sh(m, carrier) == '1\n'))
        m.freeze()                                      # a guest that does not let go
        self.assertIn('does not let it go', m.del_nic(nic, timeout=0.5))
        self.assertTrue(m._find('nic', nic).pending)
        m.unfreeze()
        self.assertEqual(m.del_nic(nic, 30), f'{device.id} removed')
        self.assertNotIn('eth1', sh(m, 'ls /sys/class/net'))
        self.assertTrue(nic.exists)                   # it was not the machine's own
        nic.delete()
        own = m.add_nic()                               # its port and id are free again
        self.assertEqual((own.id, own.bus), (device.id, device.bus))
        name = own.facts['name']
        soon(lambda: 'eth1' in sh(m, 'ls /sys/class/net'))
        m.del_nic(1)
        self.assertNotIn(name, vm.Ledger().load())
        with mock.patch.object(vm.Machine, '_front', lambda *_: {'driver': 'nonsense'}), \
                self.refused('nonsense'):
            m.add_nic()
        self.assertEqual(len(m.nics), 1)
        self.assertEqual(len(vm.Ledger().load()), 2)    # the namespace and its one nic

    def test_chardevs(self) -> None:
        m = self.machine
        for kind in ('socket', 'pty', 'file'):
            with self.subTest(kind):
                name = f'org.example.{kind}'
                path = m.create_chardev(name, kind)
                port = soon(lambda name=name: sh(
                    m, f'grep -l {name} /sys/class/virtio-ports/*/name; true')).split('/')[4]
                with contextlib.ExitStack() as stack:
                    if kind == 'socket':
                        end = stack.enter_context(socket.socket(socket.AF_UNIX))
                        end.connect(path)
                        read = end.fileno()
                    else:
                        read = os.open(path, os.O_RDONLY | os.O_NOCTTY)
                        stack.callback(os.close, read)
                    sh(m, f'echo hello > /dev/{port}')
                    self.assertIn(b'hello', soon(lambda read=read: os.read(read, 100)))
                    if kind == 'socket':
                        m.agent('guest-exec', {'path': 'sh', 'arg': [
                            '-c', f'head -n1 /dev/{port} > /tmp/from-host']})
                        time.sleep(0.3)
                        end.sendall(b'to the guest\n')
                        self.assertTrue(soon(lambda: m.exec(
                            ['grep', 'to the guest', '/tmp/from-host']).status == 0))
                with self.refused('has a chardev'):
                    m.create_chardev(name)
                self.assertIn('removed', m.delete_chardev(name))
        self.assertEqual(m.chardevs, {})
        with self.refused('pty, socket or file'):
            m.create_chardev('a', 'tcp')
        with self.refused('chardev'):
            m.create_chardev('../x')

    def test_console(self) -> None:
        m = self.machine
        sh(m, 'echo marker-1 > /dev/ttyS0')
        with m.console() as console:
            self.assertTrue(console.expect('marker-[0-9]', 10).endswith('marker-1'))
            m.agent('guest-exec', {'path': 'sh', 'arg': [
                '-c', 'head -n1 < /dev/ttyS0 | sed s/^/got-/ > /dev/ttyS0']})
            time.sleep(0.5)
            console.write('typed\n')
            console.expect('got-typed', 10)
            with self.refused('"console" is in use', kind=vm.Busy):
                m.console().write('x')
            with self.refused('never-said', 'on the console'):
                console.expect('never-said', 0.3)
        self.assertIn(b'marker-1', m.console().read())

    def test_ram(self) -> None:
        m = self.machine
        total = 'grep MemTotal /proc/meminfo | tr -dc 0-9'
        before = int(sh(m, total))
        self.assertIn('confirmed by the guest', m.increase_ram(256))
        self.assertAlmostEqual(int(sh(m, total)) - before, 256 * 1024, delta=9000)
        for size, why in ((100, 'blocks of 128 MiB'), (1024, 'room for 256 MiB'), (0, 'use MiB')):
            with self.refused(why):
                m.increase_ram(size)
        sh(m, 'modprobe virtio_balloon')
        m.balloon(400)
        self.assertLess(int(sh(m, total)), 400 * 1024)
        self.assertIn('768 MiB now', m.increase_ram(368))   # lets the balloon out, no dimm
        self.assertEqual(len(m._devices('dimm')), 1)
        self.assertAlmostEqual(int(sh(m, total)) - before, 256 * 1024, delta=9000)
        with self.refused('not 4000'), mock.patch.object(vm, 'BALLOON_TIMEOUT', 0.5):
            m.balloon(4000)

    def test_snapshots(self) -> None:
        m = self.machine
        if self.old:
            self.skipTest('with a raw disk, QEMU before 6.0 makes none')
        with mock.patch.object(vm.log, 'warning') as warned:
            taken = m.snapshot('s1')
        self.assertEqual((taken.tag, taken.ram, taken.disks, taken.uncovered),
                         ('s1', True, (self.disk.filename,), (self.raw.filename,)))
        self.assertIn(self.raw.filename, str(warned.call_args))
        self.assertIs(m.state(), vm.State.RUNNING)
        sh(m, 'echo later > /tmp/later; echo later > /dev/vda; sync')
        m.nic_state(0, False)                           # this stays, whatever the snapshot says
        time.sleep(1.2)
        for ran in (True, False):
            m.freeze() if not ran else None
            says = m.load_snapshot('s1')
            self.assertIs(m.state(), vm.State.RUNNING if ran else vm.State.PAUSED)
            self.assertEqual(says, 'put back to s1' + ', clock set' * ran)
            m.unfreeze()
            self.assertNotEqual(m.exec(['cat', '/tmp/later']).status, 0)
            self.assertNotIn('later', sh(m, 'head -c 5 /dev/vda'))
            if ran:
                self.assertLess(abs(m.get_time() - time.time_ns()), 0.5e9)
        m.sync_time()
        sh(m, 'ip link set eth0 up')
        self.assertTrue(soon(lambda: sh(m, 'cat /sys/class/net/eth0/carrier') == '0\n'))
        m.nic_state(0, True)
        with self.refused('has a snapshot s1'):
            m.snapshot('s1')
        for call in (m.load_snapshot, m.delete_snapshot):
            with self.refused('no snapshot s9'):
                call('s9')
            self.assertIs(m.state(), vm.State.RUNNING)
        nic = vm.VirtualNic(namespace='web')            # another device list
        added = m.add_nic(nic)
        with self.refused('of other devices', added.id):
            m.load_snapshot('s1')
        self.assertIs(m.state(), vm.State.RUNNING)
        m.wait('agent')
        self.assertEqual(m.del_nic(nic, 30), f'{added.id} removed')
        nic.delete()
        job = m._job
        with mock.patch.object(vm.Machine, '_job', lambda self, qmp, command, **more: job(
                qmp, command, **{**more, 'devices': ['nonsense']})):
            with self.refused('nonsense'):
                m.snapshot('s2')
            with self.refused('nonsense'):
                m.load_snapshot('s1')
        self.assertIs(m.state(), vm.State.RUNNING)      # although QEMU leaves it in restore-vm
        m.wait('agent')
        self.assertEqual(m.qmp('query-jobs'), [])
        m.delete_snapshot('s1')
        self.assertEqual(m.snapshots, [])
        self.assertEqual(self.disk.snapshots, [])
        self.disk.snapshot('disk-only')
        with self.refused('no memory in it', kind=vm.WrongState):
            m.load_snapshot('disk-only')
        self.disk.delete_snapshot('disk-only')

    def test_snapshots_of_old_qemus(self) -> None:
        m = self.machine
        m.qmp('query-commands')
        real = vm.QMP.execute

        def old(qmp: vm.QMP, command: str, *more: object, **arguments: object) -> object:
            if command == 'query-commands':
                return []
            return real(qmp, command, *more, **arguments)
        with mock.patch.object(vm.QMP, 'execute', old), \
                self.refused('writable but does not support snapshots'):
            m.snapshot('h1')                            # because of the raw disk: as 5.2 is
        self.assertIs(m.state(), vm.State.RUNNING)


class TestLife(Live):
    """Starting and ending machines, and what they leave."""

    def bios(self, name: str, **options) -> vm.Machine:
        """Make a machine without an operating system: it starts in no time."""
        return vm.Machine(name, **{'memory': 32, **options})

    def test_forms_of_arguments(self) -> None:
        disk = vm.Harddrive(self.path('a.qcow2'), 0.01)
        Path(self.path('c.iso')).write_bytes(bytes(2048))
        m = self.bios('forms', harddrives=disk, cd=self.path('c.iso'), nics='user')
        self.assertEqual((m.harddrives, m.nics, m.cd.filename),
                         ([disk], [None], self.path('c.iso')))
        n = self.bios('', harddrives=[self.path('b.qcow2')], nics=2)
        self.assertEqual(n.name, 'machine0')
        self.assertEqual([nic.namespace for nic in n.nics], ['machine0'] * 2)
        self.assertEqual(len({nic.mac for nic in n.nics}), 2)
        n.start_vm()
        self.assertEqual(os.readlink(f'/proc/{n.pid()}/ns/net'), os.readlink(
            f'/proc/{n.pid()}/ns/net'))
        self.assertEqual(subprocess.run(['ip', 'netns', 'identify', str(n.pid())], check=True,
                                        capture_output=True, text=True).stdout, 'machine0\n')
        self.assertEqual(self.bios('').name, 'machine1')
        self.assertEqual(len(m.qmp('query-block')) if m.start_vm() else 0, 2)
        again = vm.Machine.load('machine0')
        self.assertEqual([nic.mac for nic in again.nics], [nic.mac for nic in n.nics])
        self.assertEqual(again.id, n.id)
        n.delete(force=True)
        self.assertTrue(os.path.exists(self.path('b.qcow2')))
        self.assertFalse([name for name in vm.Ledger().load() if 'machine0' in name])
        m.delete(force=True)

    def test_bad_arguments(self) -> None:
        before = sorted(os.listdir(self.home)) if self.home.exists() else []
        for options, why in (
                ({'name': '../x'}, 'name'), ({'name': 'a,b=c'}, 'name'), ({'name': '-x'}, 'name'),
                ({'memory': 1}, 'memory'), ({'memory': '512'}, 'memory'), ({'cpus': 0}, 'cpus'),
                ({'maxmemory': 3}, 'maxmemory'), ({'display': 'gtk'}, 'display'),
                ({'monitor_port': 70000}, 'monitor_port'), ({'accel': 'hvf'}, 'accelerator'),
                ({'user': 'nobody-such'}, 'no such user'), ({'cd': '/absent.iso'}, '/absent.iso'),
                ({'harddrives': [self.path('a'), self.path('a')]}, 'already')):
            with self.subTest(why), mock.patch.dict(os.environ):
                os.environ.pop('VMMONITOR_ACCEL', None)
                with self.refused(why):
                    vm.Machine(**options)
        self.assertEqual(sorted(os.listdir(self.home)), before)
        with mock.patch.object(vm.Machine, '_write', side_effect=OSError('disk full')), \
                self.assertRaises(OSError):
            self.bios('full', nics=1)
        self.assertFalse([name for name in vm.Ledger().load() if name.startswith('full')])
        self.assertEqual(sorted(os.listdir(self.home)), before)
        self.bios('one')
        with self.refused('one exists', 'load'):
            self.bios('one')
        with self.assertRaises(vm.NoGuest):
            vm.Machine.load('absent')
        with self.assertRaises(vm.NoGuest):
            vm.Machine.load('../m/one')

    def test_qemus_last_words(self) -> None:
        m = self.bios('words', kernel='/absent-kernel')
        with self.refused('did not start', '/absent-kernel', 'No such file', 'qemu.log'):
            m.start_vm()
        self.assertFalse(m.is_alive())
        with self.refused('is off', kind=vm.WrongState):
            m.qmp('query-status')
        with mock.patch.object(vm, 'QEMU', 'no-such-qemu'), self.refused('no-such-qemu'):
            self.bios('words2').start_vm()

    def test_one_disk_one_qemu(self) -> None:
        disk = self.path('d.qcow2')
        a, b = self.bios('own-a', harddrives=disk), self.bios('own-b', harddrives=disk)
        a.start_vm()
        with self.refused('another machine has it open'):
            b.start_vm()
        with mock.patch.object(vm.Harddrive, 'in_use', lambda _: False), \
                self.refused('did not start', 'lock'):      # QEMU's own lock, too
            b.start_vm()
        self.assertEqual(a.start_vm(), 'already running')
        answers = []
        c = self.bios('own-c')
        threads = [threading.Thread(target=lambda: answers.append(
            vm.Machine.load('own-c').start_vm())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(answers), ['already running', 'already running', 'started'])
        c.stop(force=True)
        a.stop(force=True)
        b.start_vm()
        b.stop(force=True)

    def test_evil_images(self) -> None:
        disk = self.path('e.qcow2')
        m = self.bios('evil', harddrives=disk)
        subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', '/etc/hostname', '-F',
                        'raw', disk, '1M'], check=True)
        with self.refused('/etc/hostname', 'was not named'):
            m.start_vm()

    def test_stop(self) -> None:
        m = self.guest('ends', memory=128)
        m.start_vm()
        m.wait('agent', BOOT)
        self.assertEqual(m.stop(), 'stopped by power button')
        self.assertEqual((m.stop(), m.state()), ('already off', vm.State.OFF))
        self.assertFalse(os.path.exists(m.run_path('pid')))
        m.start_vm()
        m.wait('agent', BOOT)
        sh(m, 'killall acpid')                          # the button does nothing now
        self.assertEqual(m.stop(timeout=0.5), 'stopped by guest agent')
        quick = (('power button', 0.3), ('guest agent', 0.3), ('quit', 2.0), ('SIGTERM', 1.0),
                 ('SIGKILL', 5.0))
        bios = self.bios('ends2')
        with mock.patch.object(vm, 'STOP_STEPS', quick), \
                mock.patch.object(vm, 'AGENT_TIMEOUT', 0.3), \
                mock.patch.object(vm, 'QMP_TIMEOUT', 1.0):
            bios.start_vm()
            self.assertEqual(bios.stop(timeout=0.3), 'stopped by quit')
            bios.start_vm()
            pid = bios.pid()
            os.kill(pid, signal.SIGSTOP)
            self.assertEqual(bios.stop(force=True), 'stopped by SIGKILL')
        self.assertTrue(soon(lambda: not os.path.exists(f'/proc/{pid}')))   # reaped
        bios.start_vm()                                 # over the pidfile and sockets it left
        with mock.patch.object(vm, 'STOP_STEPS', (*quick[:2], *quick[3:])):
            self.assertEqual(bios.stop(force=True), 'stopped by SIGTERM')

    def test_survives_its_manager(self) -> None:
        script = (f'import os, sys; sys.path.insert(0, {str(HERE)!r}); import vmmonitor as vm\n'
                  f"m = vm.Machine('orphan', memory=32, harddrives={self.path('o.qcow2')!r})\n"
                  "m.start_vm(); print(m.pid(), flush=True); os.kill(os.getpid(), 9)")
        done = subprocess.run([sys.executable, '-c', script], capture_output=True, check=False,
                              env={**os.environ, 'VMMONITOR_MACHINES': str(self.home)})
        self.assertEqual(done.returncode, -9, done.stderr)
        began = time.monotonic()
        m = vm.Machine.load('orphan')
        state = m.state()
        took = time.monotonic() - began
        self.assertEqual((state, m.pid()), (vm.State.RUNNING, int(done.stdout)))
        self.assertLess(took, 0.5)                      # some 10 ms on an idle host
        self.assertEqual(m.start_vm(), 'already running')
        self.assertEqual(m.harddrives[0].filename, self.path('o.qcow2'))
        m.stop(force=True)

    def test_boot_device(self) -> None:
        def sector(letter: bytes) -> vm.Harddrive:      # write it to COM1, for ever halt
            code = b'\xba\xf8\x03\xb0' + letter + b'\xee\xf4\xeb\xfd'
            path = self.path(letter.decode() + '.raw')
            Path(path).write_bytes(code.ljust(510, b'\0') + b'\x55\xaa'
                                   + bytes((1 << 20) - 512))
            return vm.Harddrive(path, format='raw')
        one, two, three = sector(b'A'), sector(b'B'), sector(b'C')
        m = self.bios('boots', harddrives=[one, two])
        m.start_vm()
        console = m.console()
        console.expect('A', BOOT)
        m.change_boot_device(two, one)
        m.reset()
        if self.old:                                    # it tells the BIOS only at a start
            m.stop(force=True)
            m.start_vm()
            console = m.console()
        console.expect('B', BOOT)
        m.add_harddrive(three)
        if self.old:
            return
        m.change_boot_device('disk0', two, 'cd')
        m.reset()
        console.expect('A', BOOT)
        m.change_boot_device(two)
        m.stop(force=True)
        m.start_vm()                                    # kept over a restart
        m.console().expect('B', BOOT)
        with self.refused('boot from'):
            m.change_boot_device('floppy')
        m.change_boot_device(three)                     # hot-plugged
        m.reset()
        m.console().expect('C', BOOT)

    def test_accelerator(self) -> None:
        with mock.patch.dict(os.environ, VMMONITOR_ACCEL=''):
            self.assertEqual(vm.usable_accel('tcg'), 'tcg')
            for mode, group, uid, kvm in (
                    (0o660, 108, 70000, True), (0o666, 0, 70000, True), (0o600, 0, 70000, False),
                    (0o660, 0, 70000, False), (0o600, 0, 0, True)):
                looks = mock.Mock(st_mode=stat.S_IFCHR | mode, st_gid=group)
                with mock.patch('os.stat', return_value=looks), \
                        mock.patch('os.open', return_value=os.dup(0)):
                    self.assertEqual(vm.usable_accel('auto', uid), 'kvm' if kvm else 'tcg')
            with mock.patch('os.stat', side_effect=FileNotFoundError):
                self.assertEqual(vm.usable_accel('auto'), 'tcg')
        with mock.patch.dict(os.environ, VMMONITOR_ACCEL='tcg'):
            self.assertEqual(vm.usable_accel('kvm'), 'tcg')

    def test_kept_over_a_restart(self) -> None:
        m = self.bios('restart', memory=512, maxmemory=1024, nics='user')
        self.assertIn('counts from the next start', m.increase_ram(128))
        kinds = ('socket', 'pty', 'file')
        for kind in kinds:
            m.create_chardev(f'org.example.{kind}', kind)
        m.nic_state(0, False)
        for _ in range(2):
            m.start_vm()
            self.assertEqual([row['data']['size'] for row in m.qmp('query-memory-devices')],
                             [128 << 20])
            for kind, path in zip(kinds, m.chardevs.values()):
                mode = os.stat(path).st_mode
                self.assertEqual((stat.S_ISSOCK(mode), stat.S_ISCHR(mode), stat.S_ISREG(mode)),
                                 tuple(kind == each for each in kinds))
            m.stop(force=True)
            m = vm.Machine.load('restart')
        self.assertFalse(m.kept.devices[0].facts['up'])

    def test_unplug_without_a_system(self) -> None:
        m = self.bios('noos', harddrives=self.path('a.qcow2'))
        more = vm.Harddrive(self.path('b.qcow2'), 0.01)
        m.start_vm()
        m.add_harddrive(more)
        self.assertIn('does not let it go', m.del_harddrive(more, timeout=0.3))
        self.assertTrue(more.in_use())
        self.assertIn('does not let it go', m.del_harddrive(more, timeout=0.3))
        with mock.patch.object(vm, 'UNPLUG_TIMEOUT', 1.0):
            m.reset()
        if not self.old:                                # it takes until the stop then
            self.assertFalse(more.in_use())
        m.stop(force=True)
        m.start_vm()
        self.assertFalse(more.in_use())
        self.assertEqual(len(m.kept.devices), 1)
        with mock.patch.object(m.kept, 'ports', 1), self.refused('ports are taken'):
            m._free_port()

    def test_save(self) -> None:
        disk = vm.Harddrive(self.path('s.raw'), 0.01, 'raw')    # also without qcow2
        m = self.guest('saves', harddrives=disk)
        m.start_vm()
        m.wait('agent', BOOT)
        m.write_file('/tmp/kept', b'kept')
        boot = sh(m, 'cat /proc/sys/kernel/random/boot_id')
        self.assertEqual(m.save(), 'saved')
        self.assertIs(m.state(), vm.State.SAVED)
        self.assertEqual(m.save(), 'already saved')
        self.assertEqual(vm.Machine.load('saves').wake(), 'restored')
        m = vm.Machine.load('saves')
        m.wait('agent', BOOT)
        self.assertEqual(m.read_file('/tmp/kept'), b'kept')
        self.assertEqual(sh(m, 'cat /proc/sys/kernel/random/boot_id'), boot)
        self.assertFalse(os.path.exists(os.path.join(m.home, 'memory')))
        Path(self.path('mine')).write_text('mine')
        with self.refused('exists'):
            m.save(self.path('mine'))
        with mock.patch.object(vm.Machine, '_transfer', side_effect=vm.MachineError('no')), \
                self.refused('no'):
            m.save()
        self.assertIs(m.state(), vm.State.RUNNING)
        m.save(self.path('memory'))
        Path(self.path('memory')).write_bytes(b'broken')
        m.kept.saved = self.path('memory')
        with self.refused('saves'):
            m.start_vm()
        self.assertIs(m.state(), vm.State.SAVED)
        self.assertTrue(os.path.exists(self.path('memory')))

    def test_snapshot_when_off(self) -> None:
        one, two = (vm.Harddrive(self.path(f'{n}.qcow2'), 0.01) for n in (1, 2))
        m = self.bios('off', harddrives=[one, two])
        self.assertEqual(m.snapshot('cold').ram, False)
        self.assertEqual([row.tag for row in two.snapshots], ['cold'])
        self.assertEqual(m.load_snapshot('cold'), 'disks put back to cold')
        two.snapshot('half')
        two.delete_snapshot('cold')
        real = vm.Harddrive.snapshot

        def second_fails(drive: vm.Harddrive, name: str = '') -> str:
            if drive.filename == two.filename:
                raise vm.DiskError('disk full')
            return real(drive, name)
        with mock.patch.object(vm.Harddrive, 'snapshot', second_fails), self.refused('disk full'):
            m.snapshot('both')
        self.assertEqual([row.tag for row in one.snapshots], ['cold'])  # both or none
        m.start_vm()
        m.snapshot('warm')
        m.stop(force=True)
        self.assertIn('put back', m.load_snapshot('warm'))      # -S, load, cont
        self.assertIs(m.state(), vm.State.RUNNING)
        m.stop(force=True)
        m.delete_snapshot('warm')
        self.assertEqual([row.tag for row in one.snapshots], ['cold'])
        with self.refused('no qcow2 disk'):
            self.bios('diskless').snapshot('x')

    @unittest.skipUnless(os.access('/usr/bin/python3', os.X_OK), 'needs a python3 for everybody')
    def test_without_root(self) -> None:
        script = (
            'import sys; sys.path.insert(0, sys.argv[1]); import vmmonitor as vm\n'
            "m = vm.Machine('mine', memory=32, harddrives=sys.argv[2], nics='user')\n"
            'try:\n'
            '    m.start_vm(); print(m.state().value, m.screenshot(sys.argv[3]))\n'
            "    print(m.send('info network').count('nic0'), m.stop(force=True))\n"
            'finally: m.delete(force=True)')
        place = Path(self.path('nobody'))
        place.mkdir()
        os.chown(place, 65534, 65534)
        source = shutil.copy(HERE / 'vmmonitor.py', place)
        done = subprocess.run(
            ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', '/usr/bin/python3',
             '-c', script, os.path.dirname(source), place / 'd.qcow2', place / 's.png'],
            env={**os.environ, 'VMMONITOR_MACHINES': str(place / 'm')}, capture_output=True,
            check=False, text=True)
        self.assertEqual(done.stdout.splitlines(), [f'running {place}/s.png', '2 stopped by quit'],
                         done.stderr)
        self.assertEqual(os.listdir(place / 'm'), [])

    @unittest.skipUnless(any(os.path.exists(code) for code, _ in vm.OVMF), 'needs ovmf')
    def test_efi(self) -> None:
        m = self.bios('efi', efi=True, memory=128, harddrives=self.path('e.qcow2'))
        m.start_vm()
        m.console().expect('UEFI|BdsDxe|Boot', BOOT)
        m.snapshot('s')
        found = {row['node-name']: row['image'] for row in m.qmp('query-named-block-nodes')}
        for node in ('disk0-node', 'efi-vars'):
            self.assertEqual([row['name'] for row in found[node]['snapshots']], ['s'])
        m.load_snapshot('s')
        m.screenshot(self.path('e.png'))
        self.assertGreater(len(colours(self.path('e.png'))), 1)

    def test_snapshots_by_hmp(self) -> None:
        """As QEMU before 6.0 does it."""
        real = vm.QMP.execute

        def old(qmp: vm.QMP, command: str, *more: object, **arguments: object) -> object:
            return [] if command == 'query-commands' else real(qmp, command, *more, **arguments)
        m = self.bios('hmp', harddrives=self.path('h.qcow2'))
        m.start_vm()
        with mock.patch.object(vm.QMP, 'execute', old):
            self.assertTrue(m.snapshot('h1').ram)
            self.assertIn('put back', m.load_snapshot('h1'))
            self.assertIs(m.state(), vm.State.RUNNING)
            m.freeze()
            m.load_snapshot('h1')
            self.assertIs(m.state(), vm.State.PAUSED)
            m.delete_snapshot('h1')
        self.assertEqual(m.snapshots, [])

    def test_load_that_fails_midway(self) -> None:
        """QEMU lets the guest "run" afterwards; it must not."""
        m = self.bios('mid', harddrives=self.path('m.qcow2'))
        m.start_vm()
        more = vm.Harddrive(self.path('n.qcow2'), 0.01)
        m.add_harddrive(more)
        m.snapshot('s')
        self.assertIn('does not', m.del_harddrive(more, 0.3))
        m.stop(force=True)
        m.start_vm()
        with self.refused('of other devices'):
            m.load_snapshot('s')
        with mock.patch.object(vm.Machine, '_check_fits'), \
                self.refused('the guest is lost'):
            m.load_snapshot('s')
        self.assertIs(m.state(), vm.State.CRASHED)
        for call in (m.start, m.unfreeze, vm.Machine.load('mid').start):
            with self.refused('has crashed'):
                call()
        m.stop(force=True)
        self.assertEqual(m.start(), 'started')

    def test_migrate(self) -> None:
        disk = vm.Harddrive(self.path('d.qcow2'), 0.01)
        a = self.guest('here', memory=128, harddrives=disk)
        b = self.guest('there', memory=128, harddrives=disk, incoming=True)
        other = self.guest('other', memory=144, harddrives=disk, incoming=True)
        a.start_vm()
        a.wait('agent', BOOT)
        a.write_file('/tmp/kept', b'kept')
        with self.refused('another kind of machine', '144'):
            a.migrate(other)
        with self.refused("can't migrate to 127.0.0.1:1"):
            a.migrate('127.0.0.1:1')
        self.assertEqual(b.start_vm(), 'waiting for a migration')
        with mock.patch.object(vm.Machine, '_receive',
                               lambda _, qmp, fd: os.close(fd)), self.refused('here'):
            a.migrate(b)                                # nobody reads the stream
        self.assertIs(a.state(), vm.State.RUNNING)
        b.stop(force=True)
        b.start_vm()
        seen: list[tuple[int, int]] = []
        self.assertEqual(a.migrate(b, lambda *row: seen.append(row)), 'migrated to there')
        self.assertEqual((a.state(), b.state()), (vm.State.OFF, vm.State.RUNNING))
        self.assertEqual(b.read_file('/tmp/kept'), b'kept')
        self.assertGreater(seen[-1][1], 128 << 20)
        with self.refused('another machine has it open'):
            a.start_vm()
        disk.resize(0.02)                               # goes to the machine that has it now
        self.assertEqual(b.qmp('query-block')[-1]['inserted']['image']['virtual-size'],
                         disk.info()['virtual-size'])
        c = self.guest('over', memory=128, harddrives=disk, incoming=True)
        c.start_vm()
        with socket.create_server(('127.0.0.1', 0)) as probe:
            port = probe.getsockname()[1]
        waiter = threading.Thread(target=c.receive, args=(port, 30), daemon=True)
        waiter.start()
        soon(lambda: self.listens(port), 5)
        self.assertIn('migrated to', b.migrate(f'127.0.0.1:{port}'))
        waiter.join(30)
        c.wait('agent', BOOT)
        self.assertEqual(c.read_file('/tmp/kept'), b'kept')
        d = self.guest('slow', memory=128, harddrives=disk, incoming=True)
        d.start_vm()

        def slowly(done: int, _total: int) -> None:
            c.qmp('migrate-set-parameters', max_bandwidth=1 << 16)
            threading.Timer(0.3, c.cancel).start() if not cancelled else None
            cancelled.append(done)
        cancelled: list[int] = []
        with self.refused('cancelled'):
            c.migrate(d, slowly)
        self.assertIs(c.state(), vm.State.RUNNING)
        c.wait('agent')

    @staticmethod
    def listens(port: int) -> bool:
        """Tell whether a TCP port is open, without connecting to it."""
        return f':{port:04X} ' in Path('/proc/net/tcp').read_text().partition('rem_')[2]


# The example of the README, word by word.
EXAMPLE = '''\
import vmmonitor as vm

lan = vm.Switch('lan')                          # a switch between the machines
router = vm.Router('eth1', 'gateway')           # a spare interface of the host is its trunk
router.connect(lan)                             # its LAN port p0 goes to the switch

machines = []
for name in ('web', 'db'):
    disk = vm.Harddrive(f'{name}.qcow2', size=5)        # GiB; created if it is absent
    machine = vm.Machine(name, harddrives=disk, nics=1, memory=512, kernel=KERNEL,
                         initrd=INITRD, cmdline=CMDLINE)
    machine.nics[0].connect(lan)                # its cable goes into the switch
    machine.start_vm()
    machines.append(machine)

web, db = machines
for number, machine in enumerate(machines, 1):
    machine.wait('agent')                       # the guest agent answers: it has booted
    machine.exec(['modprobe', 'virtio_net'])
    machine.exec(['ip', 'address', 'add', f'10.0.0.{number}/24', 'dev', 'eth0'])
    machine.exec(['ip', 'link', 'set', 'eth0', 'up'])
print(web.exec(['ping', '-c', '3', '10.0.0.2']).out.decode())

web.snapshot('clean')                           # memory and disks
web.send_key('ctrl-alt-f2')
web.screenshot('web.png')
print(web.load_snapshot('clean'))               # back, with the right time
for machine in machines:
    print(machine.name, machine.stop())         # power button, agent, quit, TERM, KILL
    machine.delete()                            # the machine and its nics, never its disks
router.delete()
lan.delete()
'''


class TestNetwork(Live):
    """The README's example, and machines that see each other."""

    def test_example(self) -> None:
        readme = (HERE / 'README.md').read_text()
        if 'Library: machines' in readme:
            self.assertIn(EXAMPLE, readme)
        subprocess.run('ip link add eth1 type veth peer name wire; ip link set eth1 up', shell=True,
                       check=True)
        self.addCleanup(subprocess.run, ['ip', 'link', 'del', 'eth1'], check=True)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(os.path.dirname(self.path('x')))
        said: list[str] = []
        exec(EXAMPLE, {'KERNEL': kernel, 'INITRD': initramfs, 'CMDLINE': rig.CMDLINE,
                       'print': lambda *words: said.append(' '.join(words))})
        self.assertRegex(said[0], r'3 packets received|[123] packets received')
        self.assertEqual(said[1:], ['put back to clean, clock set', 'web stopped by power button',
                                    'db stopped by power button'])
        self.assertGreater(len(colours('web.png')), 1)
        self.assertEqual(sorted(os.listdir('.')), ['db.qcow2', 'web.png', 'web.qcow2'])
        self.assertFalse([name for name in vm.Ledger().load() if re.search('web|db|lan|gate', name)
                          and 'netns' not in name])

    def test_two_machines_reach_each_other(self) -> None:
        switch = vm.Switch('lan')
        pair = [self.guest(name, memory=112, nics=1) for name in ('left', 'right')]
        for machine in pair:
            machine.nics[0].connect(switch)
            machine.start_vm()
        for machine, address in zip(pair, ('10.9.0.1', '10.9.0.2')):
            machine.wait('agent', BOOT)
            sh(machine, 'modprobe virtio_net; sleep 0.2; ip link set eth0 up; '
                        f'ip addr add {address}/24 dev eth0')
        left, right = pair
        ping = ['ping', '-c', '1', '-W', '1', '10.9.0.2']
        self.assertTrue(soon(lambda: left.exec(ping).status == 0))
        right.nic_state(0, False)
        self.assertNotEqual(left.exec(ping).status, 0)
        right.nic_state(0, True)
        self.assertTrue(soon(lambda: left.exec(ping).status == 0))
        self.assertIn('10.9.0.1', str(left.interfaces()))
        for machine in pair:
            machine.delete(force=True)
        switch.delete()
        self.assertFalse([name for name in vm.Ledger().load() if re.search('left|right|lan', name)])


class TestAsGuests(Live):
    """Monitor, startup and listener see machines as they see libvirt's domains."""

    def test_guests(self) -> None:
        machines = vm.Machines()
        guests = vm.Guests([machines])
        m = self.guest('daemon', harddrives=self.path('d.qcow2'))
        self.assertEqual([guest.name for guest in guests.each()], ['daemon'])
        self.assertEqual(guests.each(running=True), [])
        monitor = vm.Monitor(guests, vm.Settings(vm.Config(tolerance=300)))
        monitor.start()
        machines.watch(monitor.events.put)
        self.addCleanup(monitor.stop)
        self.addCleanup(machines.stop)
        self.assertEqual(guests.act('start', guests.find('daemon')), 'started')
        m.wait('agent', BOOT)
        self.assertTrue(soon(lambda: m.id in monitor.corrections, 30))
        sh(m, 'date -s @1000000000')
        self.assertEqual(guests.act('save', guests.find('daemon')), 'saved')
        self.assertEqual(guests.act('wake', guests.find('daemon')), 'restored')
        self.assertTrue(soon(lambda: abs(self.offset(m)) < 0.2e9, 20))
        self.assertIn('daemon: clock corrected', str(monitor.corrections[m.id]))
        (self.home / 'broken').mkdir()
        (self.home / 'broken' / 'machine.json').write_text('{')
        self.assertEqual([guest.name for guest in guests.each()], ['daemon'])
        shutil.rmtree(self.home / 'broken')
        self.assertEqual(guests.act('stop', guests.find('daemon')), 'stopped by power button')
        with self.assertRaises(vm.NoGuest):
            guests.find('nobody')

    def offset(self, m: vm.Machine) -> float:
        with contextlib.suppress(vm.Error):
            return m.get_time() - time.time_ns()
        return 1e18


if __name__ == '__main__':
    unittest.main(verbosity=2)
