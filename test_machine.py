"""Tests of the library's disks and machines, on a real QEMU (always emulating) and real guests."""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

os.environ.setdefault('VMMONITOR_ACCEL', 'tcg')
import vmmonitor as vm

QEMU = shutil.which('qemu-system-x86_64')
XORRISO = shutil.which('xorriso') or shutil.which('genisoimage')


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
        import shlex
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


if __name__ == '__main__':
    unittest.main(verbosity=2)
