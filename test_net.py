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


def namespaces() -> list[str]:
    """Return the names of the namespaces."""
    return os.listdir('/run/netns') if os.path.exists('/run/netns') else []


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
            with contextlib.suppress(OSError):      # no route, or no neighbour, yet
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
                    for _ in range(10):         # a port that just came up may need a moment
                        send_tap(a, data)
                        if received(b, data, 0.1):
                            break
                    else:
                        self.fail(f'{what} did not arrive')

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

    def test_a_firewall_that_drops_and_sees_bridged_frames(self) -> None:
        """As on a host with Docker: nf_call_iptables 0 of the bridge alone does not help there."""
        calls = Path('/proc/sys/net/bridge/bridge-nf-call-iptables')
        if not calls.exists():
            self.skipTest('br_netfilter is not loaded')
        calls.write_text('1')
        for program in ('iptables', 'ip6tables'):
            subprocess.run([program, '-P', 'FORWARD', 'DROP'], check=True)
        before = subprocess.run('iptables -S; iptables -t raw -S; ip6tables -S', shell=True,
                                capture_output=True).stdout
        switch = vmanager.Switch('lan')
        for number in (1, 2):
            vmanager.VirtualNic(f'p{number}', sink=f's{number}').connect(switch)
            machine(f'm{number}', f's{number}', f'10.1.0.{number}/24', f'fd01::{number}/64')
        self.assertEqual(reaches('m1', 'm2', '10.1.0.2'), '10.1.0.1')
        self.assertEqual(reaches('m1', 'm2', 'fd01::2'), 'fd01::1')
        switch.delete()
        self.assertEqual(subprocess.run('iptables -S; iptables -t raw -S; ip6tables -S', shell=True,
                                        capture_output=True).stdout, before)

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



class TestReading(NetCase):
    def test_interfaces_and_routes(self) -> None:
        physical('eth1', 'server')
        ip('addr add 192.0.2.5/24 dev eth1')
        ip('addr add 2001:db8::5/64 dev eth1 nodad')
        ip('route add default via 192.0.2.1 dev eth1 metric 7')
        ip('-6 route add default via 2001:db8::1 dev eth1')
        eth1 = vmanager.interfaces['eth1']
        self.assertEqual(eth1.addresses[:2], ('192.0.2.5/24', '2001:db8::5/64'))
        self.assertEqual((eth1.ip, eth1.gateway, eth1.kind, eth1.state, eth1.mtu),
                         ('192.0.2.5', '192.0.2.1', 'veth', 'up', 1500))
        self.assertRegex(eth1.mac, '^([0-9a-f]{2}:){5}[0-9a-f]{2}$')
        self.assertEqual([(route.to, route.gateway, route.v6) for route in vmanager.routes
                          if route.to == 'default'],
                         [('default', '192.0.2.1', False), ('default', '2001:db8::1', True)])
        self.assertEqual({route.device for route in eth1.routes}, {'eth1'})
        self.assertIn('eth1', vmanager.interfaces)
        self.assertNotIn('eth9', vmanager.interfaces)
        self.assertIsNone(vmanager.interfaces.get('eth9'))
        self.assertIn('w0', vmanager.Interfaces('server'))
        self.assertEqual([route.to for route in vmanager.Routes('server') if not route.v6], [])

    def test_it_is_live(self) -> None:
        ip('link add name x0 type bridge')
        x0 = vmanager.interfaces['x0']
        self.assertEqual((x0.ip, x0.state), ('', 'down'))
        ip('addr add 192.0.2.9/24 dev x0')
        self.assertEqual(x0.ip, '192.0.2.9')
        ip('link del dev x0')
        self.assertFalse(x0.exists)
        with self.refused(vmanager.NoInterface, 'x0: no such interface'):
            x0.mtu

    def test_two_processes_at_most_for_all(self) -> None:
        for number in range(20):
            ip(f'link add name x{number} type bridge')
        with mock.patch.object(vmanager, 'run', wraps=vmanager.run) as run:
            seen = [(one.name, one.ip, one.mac, one.mtu, one.routes, one.gateway)
                    for one in vmanager.interfaces.values()]
        self.assertGreaterEqual(len(seen), 20)
        self.assertLessEqual(run.call_count, 2)

    def test_changes(self) -> None:
        ip('link add name x0 type bridge')
        x0 = vmanager.interfaces['x0']
        x0.up()
        self.assertIn('UP', x0.link().flags)
        x0.down()
        self.assertNotIn('UP', x0.link().flags)
        x0.mtu = 1400
        self.assertEqual(x0.mtu, 1400)
        for address in ('192.0.2.1/24', '2001:db8::1/64'):
            for _ in range(2):
                x0.add_address(address)
            self.assertEqual(x0.addresses, (address,))
            for _ in range(2):
                x0.remove_address(address)
            self.assertEqual(x0.addresses, ())
        x0.up()
        x0.rename('x1')
        self.assertEqual((x0.name, 'UP' in x0.link().flags), ('x1', True))
        ip('netns add far')
        physical('eth1', 'server')
        eth1 = vmanager.interfaces['eth1']
        eth1.move('far')
        self.assertIn('eth1', vmanager.Interfaces('far'))
        eth1.up()
        self.assertEqual(eth1.state, 'up')

    def test_sys_command(self) -> None:
        self.assertEqual(vmanager.sys_command(['printf', '%s', '$HOME;']), b'$HOME;')
        self.assertEqual(vmanager.sys_command('echo one | tr o 0'), b'0ne\n')
        with self.assertRaises(vmanager.CommandError) as caught:
            vmanager.sys_command('echo why >&2; exit 3')
        self.assertEqual((caught.exception.status, caught.exception.stderr), (3, 'why\n'))
        self.assertIn('exit 3', str(caught.exception))
        with self.assertRaises(vmanager.CommandError) as caught:
            vmanager.sys_command(['no-such-program-here'])
        self.assertIn('install', vmanager.words(caught.exception))


class TestParsing(unittest.TestCase):
    """Pure functions, with what other versions of iproute2 and odd networks print."""

    def test_documents(self) -> None:
        for text, wanted in (('', []), ('[]\n[]\n', [[], []]), ('[{"a":1}]', [[{'a': 1}]]),
                             ('[1] \n\n [2]\n', [[1], [2]])):
            self.assertEqual(vmanager.parse_documents(text), wanted)

    def test_links(self) -> None:
        links = vmanager.parse_links([
            {'ifindex': 1, 'ifname': 'a'},
            {'ifindex': 2, 'ifname': 'b', 'link': 'a', 'linkinfo': {'info_kind': 'veth'}},
            {'ifindex': 3, 'ifname': 'c', 'link': 'a', 'linkinfo': {'info_kind': 'macvtap'}},
            {'ifindex': 4, 'ifname': 'd', 'addr_info': [
                {'family': 'inet6', 'local': 'fe80::1', 'prefixlen': 64, 'scope': 'link'},
                {'family': 'inet', 'local': '192.0.2.1', 'prefixlen': 32, 'scope': 'global',
                 'address': '192.0.2.2'}]}])
        self.assertEqual([link.peer for link in links.values()], ['', 'a', '', ''])
        self.assertEqual(links['d'].addresses, ('192.0.2.1/32', 'fe80::1/64'))
        self.assertEqual(list(links['d'].address_lines(False)),
                         ['192.0.2.1 peer 192.0.2.2/32 scope global'])

    def test_routes(self) -> None:
        rows = [({'dst': 'default', 'gateway': '192.0.2.1', 'dev': 'x', 'protocol': 'dhcp',
                  'metric': 5, 'prefsrc': '192.0.2.7', 'scope': 'global'},
                 'unicast default via 192.0.2.1 dev y proto dhcp table main src 192.0.2.7 '
                 'metric 5 scope global'),
                ({'dst': 'default', 'gateway': 'fe80::1', 'dev': 'x', 'protocol': 'ra',
                  'pref': 'medium', 'metric': 1024},
                 'unicast ::/0 via fe80::1 dev y proto ra table main metric 1024'),
                ({'dst': '10.0.0.0/8', 'via': {'family': 'inet6', 'host': 'fe80::1'}, 'dev': 'x',
                  'protocol': 'static', 'table': '77', 'flags': ['onlink']},
                 'unicast 10.0.0.0/8 via inet6 fe80::1 dev y proto static table 77 onlink'),
                ({'type': 'local', 'dst': '192.0.2.1', 'dev': 'x', 'table': 'local'}, None)]
        lines = [route.line('y') for route in vmanager.parse_routes(row for row, _ in rows)]
        self.assertEqual(lines, [line for _, line in rows if line])


class TestNames(NetCase):
    def test_bad_names(self) -> None:
        for name in ('', '-x', 'a b', 'a/b', 'a%d', 'a;b', '..', '.', 'lo', 'all', 'default',
                     'x' * 16, 'a\nb', 'a:b', 'ä', '$(id)'):
            for make in (vmanager.valid_name, lambda name: vmanager.Switch(name or '-'),
                         lambda name: vmanager.VirtualNic(name or '-'),
                         lambda name: vmanager.VirtualNic('ok', sink=name or '-')):
                with self.subTest(name), self.refused(vmanager.NetworkError, 'can\'t be the name'):
                    make(name)
        with self.refused(vmanager.NetworkError, 'can\'t be the name of a namespace'):
            vmanager.VirtualNic(namespace='../etc')
        self.assertEqual(names(), set())
        self.assertEqual(self.records(), {})

    def test_default_names_fit_and_the_long_one_is_an_altname(self) -> None:
        long = 'a-machine-with-a-very-long-name'
        nics = vmanager.VirtualNic.create_many(12, long)
        self.assertEqual(len({nic.name for nic in nics}), 12)
        for number, nic in enumerate(nics):
            for name in (nic.name, nic.sink, nic.tap_interface):
                self.assertLessEqual(len(name), 15)
            self.assertIn(f'{long}-p{number}', nic.link().names)
        nics[3].delete()
        self.assertEqual(vmanager.VirtualNic(namespace=long).name, nics[3].name)

    def test_macs(self) -> None:
        a, b = vmanager.VirtualNic(), vmanager.VirtualNic()
        self.assertRegex(a.mac, '^52:54:00:')
        self.assertRegex(a.link().mac, '^fe:01:')
        self.assertNotEqual(a.mac, b.mac)
        before = a.mac
        a.delete()
        self.assertEqual(vmanager.VirtualNic().mac, before)
        with mock.patch.object(vmanager, 'GUEST_MAC', '52:54:00:00:00:00'[:14]):
            pass
        # A name whose MAC somebody else has gets another.
        ip('link add name thief type bridge')
        vmanager.VirtualNic('n9').delete()
        nic = vmanager.VirtualNic('n9')
        wanted = nic.mac
        nic.delete()
        ip(f'link set dev thief address {wanted}')
        self.assertNotEqual(vmanager.VirtualNic('n9').mac, wanted)
        self.assertEqual(vmanager.VirtualNic('n8', mac='52:54:00:AA:bb:01').mac,
                         '52:54:00:aa:bb:01')
        with self.refused(vmanager.NameTaken, 'has the MAC'):
            vmanager.VirtualNic('n7', mac='52:54:00:aa:bb:01')
        for mac in ('01:00:5e:00:00:01', '00:00:00:00:00:00', '52:54:00', 'x'):
            with self.refused(vmanager.NetworkError, 'is no MAC'):
                vmanager.VirtualNic('n6', mac=mac)
        switch = vmanager.Switch('sw')
        pinned = switch.mac
        self.assertRegex(pinned, '^fe:01:00')
        switch.connect(a := vmanager.VirtualNic())
        self.assertEqual(switch.mac, pinned)
        a.delete()


class TestNic(NetCase):
    def test_macvtap_as_it_should_be(self) -> None:
        nic = vmanager.VirtualNic(namespace='web1')
        links = vmanager.look('web1')[0]
        tap = links[nic.tap_interface]
        self.assertEqual((tap.kind, tap.data['mode'], tap.index, tap.mac),
                         ('macvtap', 'passthru', nic.index, nic.mac))
        self.assertIn('ALLMULTI', tap.flags)
        for link in (*links.values(), nic.link()):
            if link.name != 'lo':
                self.assertTrue(link.ours(), link)
                self.assertEqual(link.addresses, ())
        vmanager.Switch('lan').connect(nic)
        time.sleep(0.3)
        self.assertEqual([link.addresses for link in vmanager.look()[0].values()
                          if link.name != 'lo'], [(), ()])
        nic.mtu = 1400
        self.assertEqual(nic.mtu, 1400)
        self.assertEqual({link.mtu for link in vmanager.look('web1')[0].values()
                          if link.name != 'lo'}, {1400})

    def test_two_namespaces_that_claim_one_tap(self) -> None:
        one = vmanager.VirtualNic(namespace='web1')
        os.close(one.open())
        # Another namespace makes a macvtap of the same number, as the kernel lets it ...
        with mock.patch.object(vmanager.random, 'choice', return_value=one.index), \
                mock.patch.object(vmanager.os.path, 'exists', return_value=False):
            two = vmanager.VirtualNic(namespace='web2')
        self.assertEqual(one.index, two.index)
        os.close(one.open())
        with self.refused(vmanager.InUse, f'/dev/tap{one.index}: is device', 'another namespace'):
            two.open()
        # ... and if the numbers agreed, the name would not.
        with mock.patch.object(vmanager, 'run') as run:
            run.return_value.returncode = 0
            rdev = os.stat(f'/dev/tap{one.index}').st_rdev
            run.return_value.stdout = f'{os.major(rdev)}:{os.minor(rdev)}\n'.encode()
            with self.refused(vmanager.InUse, f'of {one.tap_interface}'):
                two.open()
        self.assertEqual(open_files('/dev/tap'), [])

    def test_index_avoids_taps_that_exist(self) -> None:
        one = vmanager.VirtualNic(namespace='web1')
        with mock.patch.object(vmanager.random, 'choice', side_effect=[one.index, 1234567]):
            two = vmanager.VirtualNic(namespace='web2')
        self.assertEqual(two.index, 1234567)

    def test_plain_tap(self) -> None:
        nic = vmanager.VirtualNic('tap7')
        tap = nic.open()
        with self.refused(vmanager.InUse, 'tap tap7', 'has it open'):
            nic.open()
        os.close(tap)
        self.assertTrue(nic.exists)
        os.close(nic.open())

    def test_a_pair_has_no_tap(self) -> None:
        nic = vmanager.VirtualNic('p1', sink='s1')
        self.assertEqual(nic.far_end.kind, 'veth')
        with self.refused(vmanager.NetworkError, 'without a tap'):
            nic.open()

    def test_tap_that_is_gone(self) -> None:
        nic = vmanager.VirtualNic(namespace='web1')
        ip(f'-n web1 link del dev {nic.tap_interface}')
        with self.refused(vmanager.NoInterface, 'no such tap in web1'):
            nic.open()

    def test_unplugged_is_seen_by_the_machine(self) -> None:
        nic, switch = vmanager.VirtualNic(namespace='web1'), vmanager.Switch('lan')
        tap = vmanager.Interface(nic.tap_interface, 'web1')
        self.assertEqual(tap.state, 'lowerlayerdown')
        for _ in range(2):
            nic.connect(switch)
        wait(lambda: tap.state == 'up')
        for _ in range(2):
            nic.disconnect()
        wait(lambda: tap.state == 'lowerlayerdown')

    def test_twice_is_the_same(self) -> None:
        self.assertEqual(vmanager.VirtualNic('n1', namespace='web1').index,
                         vmanager.VirtualNic('n1', namespace='web1').index)
        vmanager.Switch('lan')
        vmanager.Switch('lan')
        with self.refused(vmanager.NameTaken, 'exists already, as a switch'):
            vmanager.VirtualNic('lan')
        with self.refused(vmanager.NameTaken, 'exists already, as a nic'):
            vmanager.VirtualNic('n1', namespace='web2')
        nic = vmanager.VirtualNic('n1', namespace='web1')
        for _ in range(2):
            nic.delete()
        self.assertEqual(set(namespaces()), set())

    def test_namespace_goes_with_its_last_nic_and_comes_again_at_once(self) -> None:
        ip('netns add theirs')
        for _ in range(5):
            one, two = vmanager.VirtualNic.create_many(2, 'web1')
            other = vmanager.VirtualNic(namespace='theirs')
            one.delete()
            self.assertIn('web1', namespaces())
            two.delete()
            other.delete()
            self.assertEqual(namespaces(), ['theirs'])
        room = vmanager.Namespace('room')
        vmanager.VirtualNic(namespace='room').delete()
        nic = vmanager.VirtualNic(namespace='room')
        self.assertIn(nic.tap_interface, room.interfaces)
        room.delete()
        self.assertEqual(names(), set())
        self.assertEqual(namespaces(), ['theirs'])
        with self.refused(vmanager.NameTaken, 'namespace theirs: exists and is not ours'):
            vmanager.Namespace('theirs')

    def test_contexts(self) -> None:
        with vmanager.Switch('lan') as lan, vmanager.VirtualNic() as nic:
            lan.connect(nic)
        self.assertEqual(names(), set())

    def test_netem_that_the_kernel_lacks(self) -> None:
        nic = vmanager.VirtualNic(namespace='web1')
        for bad in ({'delay': -1}, {'loss': 101}):
            with self.refused(vmanager.NetworkError, 'percent up to 100'):
                nic.impair(**bad)
        try:
            nic.impair(delay=0.01)
        except vmanager.Lacking as problem:
            self.assertIn('kernel lacks netem (modprobe sch_netem)', vmanager.words(problem))
        nic.impair()


def open_files(prefix: str) -> list[str]:
    """Return the files of this process below a path."""
    found = []
    for number in os.listdir('/proc/self/fd'):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f'/proc/self/fd/{number}'))
    return [path for path in found if path.startswith(prefix)]


def wait(check: Any, timeout: float = 3.0) -> None:
    """Wait until `check()` is true."""
    end = time.monotonic() + timeout
    while not check():
        if time.monotonic() > end:
            raise AssertionError('it never came true')
        time.sleep(0.02)


class TestRouter(NetCase):
    def setUp(self) -> None:
        super().setUp()
        physical('eth1', 'server', '192.0.2.1/24', '2001:db8::1/64')
        for line in ('addr add 192.0.2.5/24 dev eth1', 'addr add 192.0.2.6/32 dev eth1',
                     'addr add 2001:db8::5/64 dev eth1 nodad',
                     'route add 198.51.100.0/24 via 192.0.2.1 dev eth1 src 192.0.2.6 metric 9',
                     'route add 203.0.113.0/24 dev eth1', '-6 route add 2001:db8:9::/48 via '
                     '2001:db8::1 dev eth1 metric 77', 'route add default via 192.0.2.1 table 55'):
            ip(line)
        wait(lambda: 'fe80' in ip('-6 addr show dev eth1') and 'tentative' not in
             ip('-6 addr show dev eth1'))
        self.before = self.picture()

    def picture(self) -> list[str]:
        """Addresses and routes of eth1, as `ip` shows them."""
        rows = [f'{row["local"]}/{row["prefixlen"]} {row["scope"]}'
                for link in json.loads(ip('-json addr show dev eth1')) for row in link['addr_info']]
        for family in '46':
            rows += [json.dumps({key: value for key, value in row.items() if key != 'flags'})
                     for row in json.loads(ip(f'-{family} -json route show table all dev eth1'))
                     if row.get('type') != 'multicast']
        return sorted(rows)

    def test_all_kinds_of_traffic_between_machine_and_server(self) -> None:
        router, switch = vmanager.Router('eth1'), vmanager.Switch('lan')
        for _ in range(2):
            router.connect('p0', switch)
            switch.connect(router)
        self.assertEqual(list(router.ports), ['p0'])
        vmanager.VirtualNic('m0', sink='m0s').connect(switch)
        machine('web1', 'm0s', '192.0.2.77/24', '2001:db8::77/64')
        self.assertEqual(reaches('web1', 'server', '192.0.2.1'), '192.0.2.77')
        self.assertEqual(reaches('web1', 'server', '2001:db8::1'), '2001:db8::77')
        self.assertEqual(reaches('', 'server', '192.0.2.1'), '192.0.2.5')
        self.assertEqual(reaches('', 'server', '2001:db8::1'), '2001:db8::5')
        nic = vmanager.VirtualNic(namespace='vm1')
        nic.connect(switch)
        tap = nic.open()
        self.addCleanup(os.close, tap)
        with inside('server'):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        with wire:
            wire.bind(('w0', 0))
            wire.settimeout(0.1)
            for what, build in FRAMES.items():
                with self.subTest(what):
                    self.assertTrue(self.crosses(tap, wire, build(nic.mac, '02:00:00:00:00:aa')))

    def crosses(self, tap: int, wire: socket.socket, data: bytes) -> bool:
        for _ in range(10):
            send_tap(tap, data)
            with contextlib.suppress(OSError):
                while wire.recv(65536) != data:
                    pass
                return True
        return False

    def test_addresses_and_routes_move_and_come_back(self) -> None:
        router = vmanager.Router('eth1')
        self.assertEqual(router.mac, vmanager.interfaces['eth1'].mac)
        self.assertEqual(vmanager.interfaces['eth1'].addresses, ())
        self.assertEqual(vmanager.interfaces['eth1'].master, router.name)
        self.assertEqual(set(router.addresses[:3]),
                         {'192.0.2.5/24', '192.0.2.6/32', '2001:db8::5/64'})
        self.assertEqual({route.to for route in router.routes if route.protocol != 'kernel'},
                         {'198.51.100.0/24', '203.0.113.0/24', '2001:db8:9::/48', 'default'})
        self.assertEqual(vmanager.Router('eth1').name, router.name)
        for _ in range(2):
            router.delete()
        self.assertEqual(self.picture(), self.before)
        self.assertEqual(names(), {'eth1'})
        self.assertEqual(reaches('', 'server', '192.0.2.1'), '192.0.2.5')
        self.assertEqual(reaches('', 'server', '2001:db8::1'), '2001:db8::5')

    def test_come_back_after_every_crash(self) -> None:
        """Killed at the start, in the middle and at the end of its one batch."""
        for lines in (0, 3, 8, 12, 99):
            with self.subTest(f'killed after {lines} lines'):
                crash('vmanager.Router("eth1")', lines)
                self.assertIn('eth1-router', vmanager.leaks())
                vmanager.clean()
                self.assertEqual(self.picture(), self.before)
                self.assertEqual(names(), {'eth1'})
                self.assertEqual(self.records(), {})

    def test_rolls_back_when_it_fails(self) -> None:
        for failing in ('master', 'route replace', 'type bridge'):
            with self.subTest(failing), ip_fails_at(failing), \
                    self.refused(vmanager.NetworkError, 'can\'t', failing, 'as told'):
                vmanager.Router('eth1')
            self.assertEqual(self.picture(), self.before)
            self.assertEqual((names(), self.records()), ({'eth1'}, {}))

    def test_made_by_a_program_that_ended(self) -> None:
        python('vmanager.Router("eth1")')
        self.assertEqual(vmanager.leaks(), {})
        self.assertIn('which has ended', vmanager.leaks(everything=True)['eth1-router'])
        vmanager.Router('eth1').delete()
        self.assertEqual(self.picture(), self.before)

    def test_default_route(self) -> None:
        ip('route add default via 192.0.2.1 dev eth1')
        with self.refused(vmanager.InUse, 'eth1: carries the default route via 192.0.2.1',
                          'force=True'):
            vmanager.Router('eth1')
        with self.refused(vmanager.InUse, 'carries the default route'):
            vmanager.Switch('lan').connect('eth1')
        before = self.picture()
        router = vmanager.Router('eth1', force=True)
        self.assertEqual(router.gateway, '192.0.2.1')
        router.delete()
        self.assertEqual(self.picture(), before)

    def test_refusals(self) -> None:
        switch = vmanager.Switch('lan')
        with self.refused(vmanager.NoInterface, 'eth11: no such interface', 'did you mean eth1?'):
            vmanager.Router('eth11')
        with self.refused(vmanager.InUse, 'lo: is the loopback'):
            vmanager.Router('lo', name='r')
        with self.refused(vmanager.InUse, 'has the address 192.0.2.5/24', 'Router('):
            switch.connect('eth1')
        with self.refused(vmanager.NetworkError, '\'x0\' can\'t be a port', 'p0'):
            vmanager.Router('eth1').connect('x0', switch)
        with self.refused(vmanager.InUse, 'eth1: is already a port of eth1-router'):
            switch.connect('eth1', force=True)
        with self.refused(vmanager.InUse, 'eth1: is already a port of eth1-router'):
            vmanager.Router('eth1', name='another')

    def test_plain_interface_on_a_switch(self) -> None:
        ip('addr flush dev eth1')
        switch = vmanager.Switch('lan')
        for _ in range(2):
            switch.connect(vmanager.interfaces['eth1'])
        self.assertEqual(list(switch.ports), ['eth1'])
        switch.disconnect('eth1')
        self.assertEqual(list(switch.ports), [])

    def test_no_loops(self) -> None:
        a, b, c = vmanager.Switch('a'), vmanager.Switch('b'), vmanager.Switch('c')
        a.connect(b)
        b.connect(c)
        router = vmanager.Router('eth1')
        router.connect('p0', a)
        for again in (lambda: a.connect(c), lambda: a.connect(a),
                      lambda: router.connect('p1', c)):
            with self.refused(vmanager.InUse, 'a second way would be a loop'):
                again()
        b.disconnect(c)
        a.connect(c)
        self.assertEqual(len(c.ports), 1)

    def test_nat(self) -> None:
        ip('route add default via 192.0.2.1 dev eth1')
        before = self.picture()
        router = vmanager.Router('eth1', nat=True)
        self.assertEqual(router.ip, '10.77.0.1')
        self.assertEqual(self.picture(), before)
        switch = vmanager.Switch('lan')
        router.connect('p0', switch)
        vmanager.VirtualNic('m0', sink='m0s').connect(switch)
        machine('web1', 'm0s', '10.77.0.9/24')
        ip('-n web1 route add default via 10.77.0.1')
        self.assertEqual(reaches('web1', 'server', '192.0.2.1'), '192.0.2.5')   # masqueraded
        ip('-n server route add 10.77.0.0/24 via 192.0.2.5')
        self.assertEqual(reaches('server', 'web1', '10.77.0.9', 0.5), '')       # only answers in
        forwarding = Path('/proc/sys/net/ipv4/conf')
        self.assertEqual((forwarding / 'all/forwarding').read_text(), '0\n')
        self.assertEqual((forwarding / 'eth1/forwarding').read_text(), '1\n')
        second = vmanager.Router('eth1', name='second', nat=True)
        self.assertEqual(second.ip, '10.77.1.1')
        router.delete()
        self.assertEqual((forwarding / 'eth1/forwarding').read_text(), '1\n')
        second.delete()
        self.assertEqual((forwarding / 'eth1/forwarding').read_text(), '0\n')
        rules = subprocess.run(['iptables-save'], capture_output=True, text=True).stdout
        self.assertNotIn('10.77', rules)
        self.assertNotIn('-router', rules)
        self.assertEqual(self.picture(), before)

    def test_nat_without_a_firewall_program(self) -> None:
        with mock.patch.object(vmanager.shutil, 'which', return_value=None), \
                self.refused(vmanager.Lacking, 'neither iptables nor nft', 'install nftables'):
            vmanager.Router('eth1', nat=True)
        self.assertEqual((names(), self.records()), ({'eth1'}, {}))


# A program in the place of `ip`: it passes on only so many lines of a batch, and then kills
# whoever started it, or fails at a line as it is told.
FAKE_IP = """#!/usr/bin/env python3
import os, signal, subprocess, sys
real, mode, word = {real!r}, {mode!r}, {word!r}
if '-json' in sys.argv or '-batch' not in sys.argv:
    os.execv(real, ['ip', *sys.argv[1:]])
lines = sys.stdin.read().splitlines(True)
force = '-force' in sys.argv
if mode == 'crash' and not force:
    flag = {flag!r}
    seen = int(open(flag).read()) if os.path.exists(flag) else 0
    room = max(0, int(word) - seen)
    open(flag, 'w').write(str(seen + len(lines)))
    if room < len(lines) or int(word) >= 99:
        os.kill(os.getppid(), signal.SIGKILL)
        import time; time.sleep(0.2)        # an orphan that goes on
        lines = lines[:room]
    done = subprocess.run([real, *sys.argv[1:]], input=''.join(lines), text=True)
    sys.exit(done.returncode)
bad = next((n for n, line in enumerate(lines) if word in line), None)
if mode == 'fail' and bad is not None and not force:
    subprocess.run([real, *sys.argv[1:]], input=''.join(lines[:bad]), text=True, check=True)
    sys.exit(sys.stderr.write('RTNETLINK answers: as told\\nCommand failed -:%d\\n' % (bad + 1)) and 1)
done = subprocess.run([real, *sys.argv[1:]], input=''.join(lines), text=True)
sys.exit(done.returncode)
"""


@contextlib.contextmanager
def fake_ip(mode: str, word: str) -> Iterator[str]:
    """Put a treacherous `ip` first in PATH."""
    with tempfile.TemporaryDirectory() as directory:
        fake = Path(directory, 'ip')
        fake.write_text(FAKE_IP.format(real=vmanager.shutil.which('ip'), mode=mode, word=word,
                                       flag=f'{directory}/seen'))
        fake.chmod(0o755)
        path = f'{directory}:{os.environ["PATH"]}'
        with mock.patch.dict(os.environ, {'PATH': path}):
            yield path


def ip_fails_at(word: str) -> Any:
    """Let the first batch line that has `word` in it fail."""
    return fake_ip('fail', word)


def python(code: str) -> int:
    """Run code in a process of its own, and return how it ended."""
    return subprocess.run([sys.executable, '-c', f'import vmmonitor as vmanager; {code}'],
                          cwd=HERE, env={**os.environ, 'VMMONITOR_STATE': vmanager.STATE_DIR},
                          capture_output=True, timeout=60).returncode


def crash(code: str, lines: int) -> None:
    """Run code in a process that gets SIGKILL after so many batch lines were carried out."""
    with fake_ip('crash', str(lines)):
        status = python(code)
    if status != -signal.SIGKILL:
        raise AssertionError(f'it did not crash but ended with {status}')


class TestCrash(NetCase):
    FIFTY = 'vmanager.VirtualNic.create_many(50, "web1", vmanager.Switch("lan"))'

    def test_kill_in_the_middle_of_fifty(self) -> None:
        ip('link add name theirs type bridge')
        for lines in (3, 30, 55, 80, 99):
            with self.subTest(f'killed after {lines} lines'):
                crash(self.FIFTY, lines)
                would = vmanager.clean(dry_run=True)
                if lines == 30:
                    self.assertGreater(len(names()), 20)
                    self.assertIn('interrupted while creating', would['web1-p7'])
                self.assertEqual(vmanager.clean(), would)
                vmanager.clean(everything=True)         # the switch, which was whole
                self.assertEqual(names(), {'theirs'})
                self.assertEqual(namespaces(), [])
                self.assertEqual(self.records(), {})
        self.assertEqual(len(vmanager.VirtualNic.create_many(50, 'web1')), 50)

    def test_kill_in_the_middle_of_deleting(self) -> None:
        python(self.FIFTY)
        crash('vmanager.Namespace("web1").delete()', 20)
        self.assertIn('interrupted while deleting', vmanager.leaks()['web1-p0'])
        vmanager.clean()
        self.assertEqual((names(), namespaces()), ({'lan'}, []))

    def test_failure_in_the_middle_rolls_back_and_names_the_line(self) -> None:
        with ip_fails_at('name web1-p33 '), self.refused(
                vmanager.NetworkError, 'can\'t create port web1-p33 and sink web1-p33-sink: as told',
                'link add name web1-p33'):
            vmanager.VirtualNic.create_many(50, 'web1')
        with ip_fails_at('name web1-p9-tap '), self.refused(
                vmanager.NetworkError, 'can\'t create macvtap web1-p9-tap in namespace web1'):
            vmanager.VirtualNic.create_many(50, 'web1')
        self.assertEqual((names(), namespaces(), self.records()), (set(), [], {}))

    def test_interrupt_rolls_back(self) -> None:
        with mock.patch.object(vmanager, 'tap_open', side_effect=[
                vmanager.tap_open('nic-p0'), KeyboardInterrupt]), \
                self.assertRaises(KeyboardInterrupt):
            vmanager.VirtualNic.create_many(2)
        self.assertEqual((names(), self.records()), (set(), {}))
        real = vmanager._batch

        def interrupted(*args: Any) -> Iterator[Any]:
            yield from real(*args)
            raise KeyboardInterrupt
        with mock.patch.dict(vmanager.TOOLS, ip=interrupted), contextlib.ExitStack() as stack:
            stack.enter_context(self.assertRaises(KeyboardInterrupt))
            with mock.patch.object(vmanager.Ledger, 'remove', autospec=True,
                                   side_effect=lambda *args: None):
                vmanager.VirtualNic.create_many(5, 'web1')
        vmanager.clean()
        self.assertEqual((names(), self.records()), (set(), {}))

    def test_two_processes_at_once(self) -> None:
        children = [subprocess.Popen(
            [sys.executable, '-c', 'import vmmonitor as v; v.VirtualNic.create_many(10, "web1")'],
            cwd=HERE, env={**os.environ, 'VMMONITOR_STATE': vmanager.STATE_DIR}) for _ in range(3)]
        threads = [threading.Thread(target=vmanager.VirtualNic.create_many, args=(5,))
                   for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([child.wait(30) for child in children], [0, 0, 0])
        self.assertEqual(len(self.records()), 30 + 15 + 1)
        self.assertEqual(len({row.facts['mac'] for row in self.records().values()
                              if row.kind == 'nic'}), 45)


class TestOwnership(NetCase):
    def test_names_taken_by_others(self) -> None:
        ip('link add name lan type bridge')
        ip('link property add dev lan altname other-lan')
        for make in (vmanager.Switch, vmanager.VirtualNic):
            for name in ('lan', 'other-lan'):
                with self.refused(vmanager.NameTaken, f'{name}: a bridge interface of that name '
                                  'exists that is not ours', 'choose another name'):
                    make(name)
        with self.refused(vmanager.NetworkError, 's1'):
            ip('link add name s1 type bridge')
            vmanager.VirtualNic('p1', sink='s1')
        self.assertEqual(names(), {'lan', 's1'})

    def test_only_what_is_marked_as_ours_is_removed(self) -> None:
        switch = vmanager.Switch('lan')
        for spoil, back in (('alias theirs', f'alias {switch.link().alias}'),
                            ('group 7', f'group {switch.link().group}')):
            with self.subTest(spoil):
                ip(f'link set dev lan {spoil}')
                switch.delete()
                self.assertEqual(names(), {'lan'})
                ip('link del dev lan')
                switch = vmanager.Switch('lan')
        ip('link del dev lan')
        ip('link add name lan type bridge')             # another of the same name
        self.assertEqual(vmanager.clean(), {'lan': 'switch, of which a part is gone'})
        switch.delete()
        self.assertEqual((names(), self.records()), ({'lan'}, {}))

    def test_namespace_of_the_same_name(self) -> None:
        nic = vmanager.VirtualNic(namespace='web1')
        ip('netns del web1')
        ip('netns add keep')
        ip('netns add web1')
        wait(lambda: not nic.exists)
        self.assertEqual(set(vmanager.leaks()), {'web1-p0', 'netns/web1'})
        vmanager.clean()
        self.assertEqual(set(namespaces()), {'keep', 'web1'})
        nic.delete()

    def test_marks_without_a_ledger(self) -> None:
        vmanager.Switch('lan')
        vmanager.VirtualNic(namespace='web1')
        ip('link add name theirs type bridge')
        ip('link set dev theirs alias vmmonitor:40000000')
        vmanager.Ledger().path.unlink()
        self.assertEqual(set(vmanager.leaks()), {'lan', 'web1-p0'})
        vmanager.clean()
        self.assertEqual(names(), {'theirs'})

    def test_state_is_private_and_written_first(self) -> None:
        seen = []
        real = vmanager.carry_out

        def spy(ops: Any, *args: Any, **more: Any) -> Any:
            seen.append({name: row['stage'] for name, row in json.loads(
                vmanager.Ledger().path.read_text()).items()})
            return real(ops, *args, **more)
        with mock.patch.object(vmanager, 'carry_out', spy):
            vmanager.Switch('lan').delete()
        self.assertEqual(seen[0], {'lan': 'creating'})
        self.assertEqual(seen[-1], {'lan': 'deleting'})
        path = vmanager.Ledger().path
        self.assertEqual((path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777),
                         (0o600, 0o700))
        path.write_text('{broken')
        with self.refused(vmanager.NetworkError, 'can\'t be read', 'remove it'):
            vmanager.Switch('lan')

    def test_made_things_keep_their_names(self) -> None:
        switch = vmanager.Switch('lan')
        with self.refused(vmanager.InUse, 'made by this program and can\'t be renamed'):
            switch.rename('wan')
        with self.refused(vmanager.InUse, 'can\'t be moved'):
            switch.move('far')


class TestErrors(NetCase):
    def test_without_rights(self) -> None:
        code = ('import os, sys; sys.path.insert(0, "."); import vmmonitor as v\n'
                'os.makedirs(v.STATE_DIR, exist_ok=True); os.chmod(v.STATE_DIR, 0o777)\n'
                'os.setuid(65534)\n'
                'for make in (v.Switch, v.VirtualNic, v.interfaces["lo"].down,\n'
                '             lambda: v.VirtualNic(namespace="n")):\n'
                '    try: make()\n'
                '    except v.Lacking as problem: print(v.words(problem))\n'
                'print(len(v.interfaces) > 0, v.doctor()[0])\n')
        done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True,
                              text=True, env={**os.environ, 'VMMONITOR_STATE': '/run/open'})
        lines = done.stdout.splitlines()
        self.assertEqual(len(lines), 5, done)
        for line in lines[:4]:
            self.assertIn('needs root or CAP_NET_ADMIN', line)
        self.assertIn('True', lines[4])
        self.assertIn('good=False', lines[4])
        shut = subprocess.run(
            [sys.executable, '-c', code.replace('os.chmod(v.STATE_DIR, 0o777)', 'pass')], cwd=HERE,
            capture_output=True, text=True, env={**os.environ, 'VMMONITOR_STATE': '/run/shut'})
        self.assertIn('needs root or CAP_NET_ADMIN', shut.stdout)

    def test_connecting(self) -> None:
        one, two, nic = vmanager.Switch('one'), vmanager.Switch('two'), vmanager.VirtualNic()
        nic.connect(one)
        with self.refused(vmanager.InUse, 'nic-p0: is already a port of one', 'disconnect it'):
            nic.connect(two)
        with self.refused(vmanager.NoInterface, 'onee: no such interface', 'did you mean one?'):
            nic.connect('onee')
        with self.refused(vmanager.NoInterface, 'theirs: no such interface'):
            one.connect('theirs')
        other, third = vmanager.VirtualNic(), vmanager.VirtualNic()
        with self.refused(vmanager.InUse, 'nic-p0: is already connected to one'):
            nic.connect(other)
        with self.refused(vmanager.InUse, 'is already connected to itself'):
            other.connect(other)
        other.connect(third)
        with self.refused(vmanager.InUse, 'nic-p1: is already connected to nic-p2'):
            other.connect(one)
        third.delete()
        self.assertEqual(other.peer, '')
        other.connect(one)
        with self.refused(vmanager.NoInterface, 'nic-p2: no such interface', 'did you mean nic-p'):
            third.connect(one)
        with self.refused(vmanager.NoInterface, 'far: no such interface') if False else \
                self.refused(vmanager.NoInterface, 'no such namespace'):
            len(vmanager.Interfaces('far'))

    def test_what_ip_says(self) -> None:
        """The first row that fits, for the texts of iproute2 5.10 to 6.15."""
        for said, line, kind, hint in (
                ('RTNETLINK answers: Operation not permitted', 'link add name x type bridge',
                 vmanager.Lacking, 'needs root or CAP_NET_ADMIN'),
                ('Error: Unknown device type.', 'link add name b type bond mode 802.3ad',
                 vmanager.Lacking, 'kernel lacks bonding (modprobe bonding)'),
                ('RTNETLINK answers: Operation not supported', 'link add name b type bond',
                 vmanager.Lacking, 'kernel lacks bonding (modprobe bonding)'),
                ('Error: Unknown device type.', 'link add name b type macvtap mode passthru',
                 vmanager.Lacking, 'kernel lacks macvtap (modprobe macvtap)'),
                ('Error: Specified qdisc kind is unknown.', 'qdisc replace dev x root netem',
                 vmanager.Lacking, 'kernel lacks netem (modprobe sch_netem)'),
                ('RTNETLINK answers: File exists', 'link add name x', vmanager.NameTaken, 'ip link'),
                ('Cannot find device "x"', 'link set dev x up', vmanager.NoInterface, 'went away'),
                ('Error: argument "n" is wrong: Invalid "netns" value', 'link set dev x netns n',
                 vmanager.NoInterface, 'no such namespace'),
                ('something new', 'link set', vmanager.NetworkError, '')):
            with self.subTest(said):
                problem = vmanager.net_error(vmanager.Op('do it', line, 'ns'), said)
                self.assertIs(type(problem), kind)
                self.assertIn(hint, problem.hint)
                self.assertIn('can\'t do it in namespace ns: ', str(problem))
                self.assertNotIn('RTNETLINK', str(problem))

    def test_batch_that_ends_without_a_line_number(self) -> None:
        ops = [vmanager.Op('first', 'link set dev lo up'),
               vmanager.Op('second', 'link set dev lo master nothing'),
               vmanager.Op('third', 'link add name x3 type bridge')]
        with self.refused(vmanager.NoInterface, 'can\'t second: argument "nothing" is wrong'):
            vmanager.carry_out(ops)
        self.assertEqual(names(), set())
        self.assertEqual(len(vmanager.carry_out(ops, force=True)), 1)
        self.assertEqual(names(), {'x3'})

    def test_bond_that_the_kernel_lacks(self) -> None:
        physical('eth1', 'server')
        with self.refused(vmanager.NetworkError, 'mode \'fast\'', 'active-backup'):
            vmanager.Bond('bond7', ['eth1'], mode='fast')
        with self.refused(vmanager.NoInterface, 'eth2: no such interface', 'eth1'):
            vmanager.Bond('bond7', ['eth2'])
        try:
            vmanager.Bond('bond7', ['eth1']).delete()
        except vmanager.Lacking as problem:
            self.assertIn('kernel lacks bonding (modprobe bonding)', vmanager.words(problem))
        self.assertEqual((names(), self.records()), ({'eth1'}, {}))


class TestDoctor(NetCase):
    def test_doctor_and_clean_on_the_command_line(self) -> None:
        self.assertEqual(self.program('--clean'), (0, 'nothing to clean up\n'))
        crash(TestCrash.FIFTY, 30)
        vmanager.leaks()                        # waits for the orphan
        before = names()
        status, text = self.program('--doctor')
        self.assertEqual(status, 1)
        self.assertIn('rights: CAP_NET_ADMIN', text)
        self.assertIn('FAIL  web1-p7: nic, interrupted while creating', text)
        self.assertEqual(self.program('--clean', '--dry-run')[0], 0)
        self.assertEqual(names(), before)
        self.assertIn('web1-p7', self.program('--clean')[1])
        self.assertEqual(names(), {'lan'})
        self.assertIn('lan', self.program('--clean', '--all')[1])
        self.assertEqual(names(), set())
        self.assertNotIn('FAIL  web1', self.program('--doctor')[1])

    def program(self, *args: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, HERE / 'vmmonitor.py', *args], text=True, timeout=30,
                              capture_output=True,
                              env={**os.environ, 'VMMONITOR_STATE': vmanager.STATE_DIR})
        self.assertEqual(done.stderr, '')
        return done.returncode, done.stdout

    def test_what_is_missing(self) -> None:
        with mock.patch.object(vmanager.shutil, 'which', return_value=None):
            lines = [look.text for look in vmanager.doctor() if not look.good]
        self.assertIn('program ip: missing, for all of it; install iproute2', lines)
        self.assertTrue(any('iptables or nft: missing' in line for line in lines))
        with mock.patch.object(vmanager, 'FACILITIES', (*vmanager.FACILITIES, vmanager.Facility(
                'nothing', 'ip link add name x9 type nothing', 'a test'))):
            lines = [look.text for look in vmanager.doctor()]
        self.assertIn('kernel lacks nothing, for a test (modprobe nothing)', lines)
        self.assertIn('kernel: bridge', lines)
        self.assertEqual(names(), set())


class TestSpeed(NetCase):
    def test_batch_against_one_process_for_each_operation(self) -> None:
        ip('netns add slow')
        start = time.monotonic()
        for number in range(50):
            ip(f'link add name a{number} type veth peer name b{number} netns slow')
            ip(f'-n slow link set dev b{number} up')
            ip(f'-n slow link add link b{number} name t{number} type macvtap mode passthru')
        singly = time.monotonic() - start
        start = time.monotonic()
        with mock.patch.object(vmanager, 'run', wraps=vmanager.run) as run:
            nics = vmanager.VirtualNic.create_many(50, 'fast')
        batch = time.monotonic() - start
        self.assertLessEqual(run.call_count, 3)         # a look, the host, the namespace
        lines = sum(call.kwargs.get('stdin', call.args[2] if len(call.args) > 2 else b'').count(
            b'\n') for call in run.call_args_list)
        self.assertLessEqual(lines, 3 * 50 + 5)
        start = time.monotonic()
        vmanager.delete_all(nics)
        bulk = time.monotonic() - start
        start = time.monotonic()
        for number in range(20):
            ip(f'link del dev a{number}')
        one_by_one = (time.monotonic() - start) / 20 * 50
        print(f'50 nics: {batch * 1e3:.0f} ms up and {bulk * 1e3:.0f} down, singly '
              f'{singly * 1e3:.0f} and {one_by_one * 1e3:.0f}', file=sys.stderr)
        self.assertLess(batch, singly / 2)
        self.assertLess(bulk, one_by_one / 3)


if __name__ == '__main__':
    unittest.main()
