#!/usr/bin/env python3
"""Tests of the host network section of vmmonitor.py, with the real `ip` and real traffic.

All of it happens in network and mount namespaces of the test's own, with their own /run and /sys:
nothing of the host's network is seen, let alone touched, and all is gone when the process is,
however it ends. Needs root. Bond and netem are tested in an emulated guest with Debian's kernel.
"""
from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import vmmonitor as vmanager

HERE = Path(__file__).resolve().parent
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_REC_PRIVATE = 0x4000 | 0x40000
libc = ctypes.CDLL(None, use_errno=True)

LLDP = '01:80:c2:00:00:0e'


# --- helpers ---

def call(result: int) -> None:
    """Raise what errno says when a libc call failed."""
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def setns(path: str, kind: int) -> None:
    """Put this thread into a namespace."""
    with open(path) as file:
        call(libc.setns(file.fileno(), kind))


def ip(line: str, check: bool = True) -> str:
    """Run `ip`, independently of what is tested."""
    done = subprocess.run(['ip', *line.split()], capture_output=True, text=True, timeout=30)
    if check and done.returncode:
        raise AssertionError(f'ip {line}: {done.stderr}')
    return done.stdout


def names(namespace: str = '') -> set[str]:
    """Return the names of all interfaces but lo."""
    rows = json.loads(ip((f'-n {namespace} ' if namespace else '') + '-json link show'))
    return {row['ifname'] for row in rows} - {'lo', 'tunl0', 'sit0', 'ip6tnl0', 'ifb0', 'ifb1'}


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Be in a named namespace for a moment; sockets opened there stay there."""
    with open('/proc/thread-self/ns/net') as before:
        if namespace:
            setns(f'/run/netns/{namespace}', CLONE_NEWNET)
        try:
            yield
        finally:
            call(libc.setns(before.fileno(), CLONE_NEWNET))


def machine(name: str, nic: str, address: str = '', six: str = '') -> None:
    """Make a namespace with the interface `nic` in it: a machine with an IP stack."""
    ip(f'netns add {name}')
    ip(f'link set dev {nic} netns {name}')
    for line in ('link set dev lo up', f'link set dev {nic} up',
                 f'addr add {address} dev {nic}' if address else '',
                 f'addr add {six} dev {nic} nodad' if six else ''):
        if line:
            ip(f'-n {name} {line}')


def physical(name: str, namespace: str, address: str = '', six: str = '') -> None:
    """Make a "physical" interface on the host whose other end, w0, is a server elsewhere."""
    ip(f'link add name {name} type veth peer name w0')
    ip(f'link set dev {name} up')
    machine(namespace, 'w0', address, six)


def reaches(source: str, target: str, address: str, timeout: float = 2.0) -> str:
    """Send datagrams from one namespace to an address of another; return the sender's address as
    the target saw it, '' if none arrived and was answered."""
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    with inside(target):
        server = socket.socket(family, socket.SOCK_DGRAM)
    with inside(source):
        client = socket.socket(family, socket.SOCK_DGRAM)
    with server, client:
        server.bind(('::' if ':' in address else '0.0.0.0', 0))
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                client.sendto(b'ping', (address, server.getsockname()[1]))
            if select.select([server], [], [], 0.1)[0]:
                _, peer = server.recvfrom(100)
                server.sendto(b'pong', peer)
                if select.select([client], [], [], 1.0)[0]:
                    return str(peer[0])
    return ''


def frame(target: str, source: str, kind: int, payload: bytes) -> bytes:
    """Return an Ethernet frame."""
    return (bytes.fromhex(target.replace(':', '')) + bytes.fromhex(source.replace(':', ''))
            + struct.pack('!H', kind) + payload.ljust(46, b'\0'))


def send_tap(tap: int, data: bytes) -> None:
    """Write a frame to a tap, after an empty virtio header."""
    os.write(tap, bytes(10) + data)


def received(tap: int, wanted: bytes, timeout: float = 1.0) -> bool:
    """Tell whether this very frame comes out of a tap."""
    end = time.monotonic() + timeout
    while select.select([tap], [], [], max(0.0, end - time.monotonic()))[0]:
        if os.read(tap, 65536)[10:] == wanted:
            return True
    return False


def ipv4() -> bytes:
    """Return an IPv4 packet as long as the frame: a host's firewall may look at bridged ones."""
    head = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 46, 0, 0, 64, 59, 0, b'\n\0\0\1', b'\n\0\0\2')
    total = sum(struct.unpack('!10H', head))
    return head[:10] + struct.pack('!H', ~(total % 0xffff) & 0xffff) + head[12:]


IPV6 = struct.pack('!IHBB16s16s', 6 << 28, 6, 59, 64, b'\xfd' + bytes(15), b'\xfd' + bytes(14) + b'\1')

FRAMES = {          # what must get through, and where to: a machine's own MAC changes, too
    'IPv4': lambda here, there: frame(there, here, 0x0800, ipv4()),
    'IPv6': lambda here, there: frame(there, here, 0x86dd, IPV6),
    'IPv6 neighbour discovery': lambda here, there: frame(
        '33:33:ff:12:34:56', here, 0x86dd, IPV6),
    'ARP': lambda here, there: frame('ff:ff:ff:ff:ff:ff', here, 0x0806, bytes(28)),
    'LLDP': lambda here, there: frame(LLDP, here, 0x88cc, b'\x02\x07'),
    'changed MAC': lambda here, there: frame(there, '02:00:00:00:be:ef', 0x0800, ipv4()),
    'to a changed MAC': lambda here, there: frame('02:00:00:00:ca:fe', here, 0x0800, ipv4()),
}


class NetCase(unittest.TestCase):
    """A test in a fresh network, with /run and /sys to match."""

    @classmethod
    def setUpClass(cls) -> None:
        if os.geteuid():
            raise unittest.SkipTest('needs root, to make namespaces')

    def setUp(self) -> None:
        self._before = [open(f'/proc/thread-self/ns/{kind}') for kind in ('net', 'mnt')]
        call(libc.unshare(CLONE_NEWNS | CLONE_NEWNET))
        self.addCleanup(self._return)
        call(libc.mount(b'none', b'/', None, MS_REC_PRIVATE, None))
        call(libc.mount(b'tmpfs', b'/run', b'tmpfs', 0, None))
        call(libc.mount(b'sysfs', b'/sys', b'sysfs', 0, None))
        patch = mock.patch.object(vmanager, 'STATE_DIR', '/run/vmmonitor-test')
        patch.start()
        self.addCleanup(patch.stop)
        ip('link set dev lo up')

    def _return(self) -> None:
        for file, kind in zip(self._before, (CLONE_NEWNET, CLONE_NEWNS)):
            with file:
                call(libc.setns(file.fileno(), kind))

    def refused(self, kind: type[vmanager.NetworkError], *parts: str) -> Any:
        """Expect an error whose words have all of these parts."""
        return Refusal(self, kind, parts)

    def records(self) -> dict[str, Any]:
        return dict(vmanager.Ledger().load())


class Refusal:
    """assertRaises, that also wants the reason."""

    def __init__(self, case: unittest.TestCase, kind: type[vmanager.NetworkError],
                 parts: Sequence[str]) -> None:
        self.case, self.kind, self.parts = case, kind, parts

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, problem: Any, _: Any) -> bool:
        self.case.assertIsNotNone(problem, 'nothing was refused')
        if not isinstance(problem, self.kind):
            return False
        for part in self.parts:
            self.case.assertIn(part, vmanager.words(problem))
        return True


# --- tests ---

class TestSwitch(NetCase):
    def taps(self, *nics: vmanager.VirtualNic) -> list[int]:
        taps = [nic.open() for nic in nics]
        for tap in taps:
            self.addCleanup(os.close, tap)
        return taps

    def all_frames(self, one: vmanager.VirtualNic, other: vmanager.VirtualNic) -> None:
        ends = self.taps(one, other)
        for (here, there), (a, b) in (((one, other), ends), ((other, one), ends[::-1])):
            for what, build in FRAMES.items():
                with self.subTest(what, source=here.name):
                    data = build(here.mac, there.mac)
                    send_tap(a, data)
                    self.assertTrue(received(b, data), f'{what} did not arrive')

    def test_macvtaps_on_a_switch(self) -> None:
        switch = vmanager.Switch('lan')
        a, b = vmanager.VirtualNic(namespace='web1'), vmanager.VirtualNic(namespace='web2')
        a.connect(switch)
        switch.connect(b)
        self.assertEqual(set(switch.ports), {'web1-p0', 'web2-p0'})
        self.all_frames(a, b)

    def test_plain_taps_on_two_joined_switches(self) -> None:
        one, two = vmanager.Switch('one'), vmanager.Switch('two')
        a, b = vmanager.VirtualNic(), vmanager.VirtualNic()
        a.connect(one)
        b.connect(two)
        one.connect(two)
        two.connect(one)                            # again, from the other side: harmless
        self.assertEqual(len(one.ports), 2)
        self.all_frames(a, b)
        one.disconnect(two)
        self.assertEqual(set(one.ports), {a.name})
        self.assertEqual(names(), {'one', 'two', a.name, b.name})

    def test_ip_stacks_on_two_joined_switches(self) -> None:
        one, two = vmanager.Switch('one'), vmanager.Switch('two')
        one.connect(two)
        for number, switch in enumerate((one, two), 1):
            nic = vmanager.VirtualNic(f'p{number}', sink=f's{number}')
            nic.connect(switch)
            machine(f'm{number}', f's{number}', f'10.1.0.{number}/24', f'fd01::{number}/64')
        self.assertEqual(reaches('m1', 'm2', '10.1.0.2'), '10.1.0.1')
        self.assertEqual(reaches('m2', 'm1', 'fd01::1'), 'fd01::2')
        self.assertEqual(reaches('m1', 'm2', '10.1.0.9', 0.3), '')

    def test_direct_link_passes_even_what_bridges_keep(self) -> None:
        a, b = vmanager.VirtualNic(namespace='web1'), vmanager.VirtualNic(namespace='web2')
        a.connect(b)
        b.connect(a)
        self.assertEqual((a.peer, b.peer), (b.name, a.name))
        self.all_frames(a, b)
        with mock.patch.dict(FRAMES, {'LACP': lambda here, there: frame(
                '01:80:c2:00:00:02', here, 0x8809, bytes(40))}, clear=True):
            c, d = vmanager.VirtualNic(), vmanager.VirtualNic()
            c.connect(d)
            self.all_frames(c, d)
        a.disconnect()
        self.assertEqual((a.peer, b.peer), ('', ''))
        b.connect(vmanager.Switch('lan'))


if __name__ == '__main__':
    unittest.main()
