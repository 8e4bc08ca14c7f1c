#!/usr/bin/env python3
"""Right clocks, staggered starts and an https trigger for the guests of a Linux host.

As a program: see --help. As a library (import vmmonitor as vm) it makes networks and machines, as
root. A network card on a switch:

    lan = vm.Switch('lan')
    card = vm.VirtualNic(namespace='web')
    card.connect(lan)
    print(lan.name, sorted(lan.ports), vm.interfaces['lan'].mtu)

A machine with a new disk of 5 GiB, as it was and as it is again:

    web = vm.Machine('web', harddrives=vm.Harddrive('web.qcow2', size=5), nics=[card])
    web.start_vm()
    web.snapshot('clean')
    web.screenshot('web.png')
    print(web.load_snapshot('clean'), web.stop(force=True))

A guest of libvirt, by its guest agent:

    db = vm.LibvirtHost('qemu:///system').find('db')
    print(db.start(), db.exec(['uname', '-r']).out)

What there is for that; each of them has its own help():

    networks  interfaces routes Interface Interfaces Route Routes Switch Router VirtualNic Bond
              Namespace delete_all check_networks clean
    machines  Machine machines MachineSnapshot Harddrive Snapshot CD Console Lab
    guests    LibvirtHost Domain Guest State ExecResult Correction
    errors    Error CommandError FileError DiskError NetworkError NoInterface NameTaken InUse
              MissingFeature LibvirtError GuestError NoGuest WrongState Busy AgentError ClockError
              MachineError explain
    besides   sys_command

For who changes this file: one file, the standard library, and what the host has: libvirt.so through
ctypes, QEMU's and the guest agent's JSON over unix sockets. Four flows run through it:

    clock     libvirt's callback -> Subscription.deliver() -> LibvirtHost forgets what it knew
              -> Monitor.events -> one ClockJob per guest -> synchronise(): wait for the agent,
              measure, set, measure again -> one log line
    request   TLS connection -> worker thread: handshake, limits -> Request.parameters()
              -> Key.covers() -> Guests.find(): LibvirtHost.find(), Machines.find() -> Guests.act(),
              one at a time for a guest -> Domain or Machine -> status code and one audit line
    startup   lines checked when the configuration is loaded -> one after another, each start
              in a thread of its own -> one summary line
    a disk    Machine -> Devices.plan_disk() -> MachineFile; at the start Harddrive.blockdev() with
              QemuCommand.fdset(), live with QmpSession.fdset(); its DriveSlot has the Qemu

Four parts, each section using only those above it (grep -nE '^# (###|===)' prints them):

  part 1: daemon
    constants              units, and the numbers that several sections use
    errors                 the exception tree, and explain() that turns one into a sentence
    logging and threads    one log format, one thread starter, one deadline
    data from outside      JSON with limits, and the shape that each answer must have
    files and locks        files that are there whole or not, and locks with a deadline
    processes              run(), sys_command()
    configuration          the table of options, Config, load()
    guest                  what every guest answers, wherever it lives
    clock                  measure an offset, correct it, prove it
    libvirt                by ctypes: Library, Connection, LibvirtHost, Domain
    figures                what is counted, and word to who wants to know what failed
    guests                 one name space over the hosts; one command per guest at a time
    monitor                triggers -> at most one clock job per guest
    startup                the lists for the way up and the way down
    page                   what a browser is shown
    listener               Listener, ClientConnection (the wire), Dispatcher (all error policy)
  part 2: networks
    ip                     reading links and routes, changing them, and what is refused
    registry               what was made, in a file; Transaction: all of a change, or none
    interfaces             Interface, what the host has
    switches and nics      Switch, VirtualNic, Router, Bond
    network checks         what is missing, what others took away, what leaked
  part 3: machines
    json sockets           the line protocol, QMP, GuestAgent
    disks                  CD, Harddrive over qemu-img
    spec                   machine.json: what a machine is, read and changed under one lock
    qemu                   one QEMU: its process, sessions with it, descriptors for it
    devices                disks, nics, memory, chardevs: on the command line, or hot-plugged
    memory stream          a machine's memory to a file, from one, to another machine; dumps
    snapshots              memory and disks as they were
    migration              the two programs that move a guest between them
    input                  screen, keyboard, mouse
    console                the serial port
    machine                Machine, a face over these; Machines: those of this host
    lab                    Lab: machines and networks that a file describes
  part 4: command line
    installation           what install.sh leaves to this file: Setup, and what --check asks of it
    command line           verbs, options, roles, signals, systemd, main()

Rules for threads:

  * The libvirt event loop has a thread that does nothing else. Its callbacks only enqueue.
  * A guest agent that hangs delays nobody else: agent calls have connections of their own, a
    guest whose agent was silent moves to a slow pool, and a connection never carries more than
    one call.
  * Every wait has a deadline (class Deadline). SIGTERM ends the program within STOP_TIMEOUT,
    whatever hangs: every thread is a daemon thread, and main() leaves by os._exit().
  * Every thread is started by spawn(): it has a name, and an exception in it is logged.
"""
from __future__ import annotations

import sys

if sys.version_info < (3, 9):             # noqa: UP036  # else it would be a traceback
    sys.exit('vmmonitor needs Python 3.9 or later, and this is ' + sys.version.split()[0])
if __name__ == '__main__' and not getattr(sys.flags, 'safe_path', sys.flags.isolated):
    del sys.path[0]     # the directory of this file: what else lies there is no module of it

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import ctypes.util
import dataclasses
import enum
import errno
import fcntl
import fnmatch
import functools
import grp
import hashlib
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import pwd
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import termios
import threading
import time
import urllib.parse
import zlib
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable, NamedTuple, NoReturn, Protocol, TypeVar, Union

# Modules that only some roles and verbs need are imported where they are used: ssl alone is 4 MB.
if TYPE_CHECKING:
    import email.message
    import ssl
    import xml.etree.ElementTree

    from typing_extensions import Concatenate, ParamSpec
    Parameters = ParamSpec('Parameters')

__version__ = '1.0'
# What `import *`, help() and tab completion show: the names in the docstring above.
__all__ = [
    'interfaces', 'routes', 'Interface', 'Interfaces', 'Route', 'Routes', 'Switch', 'Router',
    'VirtualNic', 'Bond', 'Namespace', 'delete_all', 'check_networks', 'clean',
    'Machine', 'machines', 'MachineSnapshot', 'Harddrive', 'Snapshot', 'CD', 'Console', 'Lab',
    'LibvirtHost', 'Domain', 'Guest', 'State', 'ExecResult', 'Correction', 'Error',
    'CommandError', 'FileError', 'DiskError', 'NetworkError', 'NoInterface', 'NameTaken',
    'InUse', 'MissingFeature', 'LibvirtError', 'GuestError', 'NoGuest', 'WrongState', 'Busy',
    'AgentError', 'ClockError', 'MachineError', 'explain', 'sys_command']

# ### part 1: daemon ##############################################################################

# === constants ==================================================================================
# What several sections use; every other number that decides something heads its own section.
# Times are seconds unless the name says otherwise; sizes are bytes.

MS = 1_000_000                 # nanoseconds in a millisecond; clock offsets are kept in ns
SECOND = 1_000_000_000         # nanoseconds in a second
DAY = 86400                    # seconds

STATE_POLL = 0.1               # between two looks at a state that somebody else is changing
BUSY_TIMEOUT = 30.0            # how long a command waits for another one on the same guest
QMP_TIMEOUT = 10.0             # for one answer of QEMU, or of a short-lived program
STOP_TIMEOUT = 1.5             # from SIGTERM to the end of the process


# === errors =====================================================================================

class Error(Exception):
    """Something went wrong that the user can do something about.

    `message` says what, `hint` what to do; str() is both, so that a traceback shows both.

    Error
     +- ConfigError           the configuration: every problem at once
     +- OutputLost            what was printed could not be written
     +- InvalidValue          one value of it, or an argument (a ValueError, too)
     +- Refusal               a request that gets another answer than 200
     +- CommandError          a program failed: argv, exit status, stderr
     +- ProtocolError         a peer on a JSON socket sent what is no answer
     |   +- PeerClosed        ... or closed it
     |   +- PeerSilent        ... or did not answer in time
     |   +- ReplyError        ... or answered with an error
     +- FileError             a file of this host can't be read or written
     |   +- DiskError         a disk image or CD
     +- LibvirtError          libvirt's code, domain and text
     |   +- HostAway          libvirt can't be reached; it is being tried again
     +- NetworkError          something of the host's network could not be made or changed
     |   +- NoInterface       there is none of that name (a KeyError, too)
     |   +- NameTaken         something that is not ours has the name
     |   +- InUse             it is a port of something else, or carries what would be cut off
     |   +- MissingFeature    the kernel, a program or a right is missing
     +- GuestError            one guest, one request
         +- NoGuest           there is none of that name
         +- Ambiguous         there are several, on different hosts
         +- WrongState        its state does not allow it
         +- Busy              another command has not ended
         +- AgentError        its guest agent: `trouble` says which row of AGENT_TROUBLES
         +- ClockError        its clock could not be corrected
         +- OutOfStep         its host's clock is not shown to be in step with ours
         +- MachineError      QEMU failed or does not answer
             +- QemuRefused   ... or answered with an error: its class, its text
             +- DamagedFile   a machine.json that can't be used
    """

    def __init__(self, message: str, hint: str = '') -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f'{self.message}; {self.hint}' if self.hint else self.message


class InvalidValue(Error, ValueError):
    """Why one value can't be used; whoever asked for it adds its place. Of a value that has others
    in it, `places` are all that can't be used: (place, why)."""

    def __init__(self, message: str, hint: str = '', places: Iterable[tuple[str, str]] = ()
                 ) -> None:
        super().__init__(message, hint)
        self.places = list(places) or [('', str(self))]


class OutputLost(Error):
    """What was printed could not be written: the reader has gone, or a disk is full."""

    def __init__(self, problem: OSError) -> None:
        super().__init__(f'the output can\'t be written: {problem.strerror}')
        self.reader_gone = isinstance(problem, BrokenPipeError)


class ConfigError(Error):
    """What is wrong with a configuration; `problems` has a line for each."""

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        super().__init__(f'{path}: ' + '; '.join(problems))
        self.path, self.problems = path, list(problems)


class CommandError(Error):
    """A program that was run failed."""

    def __init__(self, argv: Sequence[str], status: int, stderr: str, hint: str = '') -> None:
        super().__init__(f'{argv[0]} failed with status {status}: {clip(stderr.strip())}', hint)
        self.argv, self.status, self.stderr = list(argv), status, stderr


class ProtocolError(Error):
    """A peer on a JSON socket sent something that is no answer; the text shows the bytes."""


class PeerClosed(ProtocolError):
    """The peer closed the socket."""


class PeerSilent(ProtocolError):
    """The peer did not answer before the deadline."""


class ReplyError(ProtocolError):
    """The peer answered with an error object: its class `code`, such as CommandNotFound, and its
    `text`."""

    def __init__(self, path: str, code: str, text: str) -> None:
        super().__init__(': '.join(filter(None, [path, code, text])))
        self.code, self.text = code, text


class FileError(Error):
    """A file can't be read or written."""


class DiskError(FileError):
    """A disk image or CD can't be used that way."""


class LibvirtError(Error):
    """A libvirt call failed. `code` and `domain` are virErrorNumber and virErrorDomain."""

    def __init__(self, message: str, code: int = 0, domain: int = 0, hint: str = '') -> None:
        super().__init__(message, hint)
        self.code, self.domain = code, domain


class HostAway(LibvirtError):
    """libvirt can't be reached at the moment."""


class NetworkError(Error):
    """Something of the host's network could not be made, changed or removed."""


class NoInterface(NetworkError, KeyError):
    """No interface has that name; the hint has the closest one."""

    __str__ = Error.__str__     # KeyError's would show the text in quotes


class NameTaken(NetworkError):
    """The name belongs to something that this program did not make, or made as another thing."""


class InUse(NetworkError):
    """It is a port of something else, or carries what the host needs."""


class MissingFeature(NetworkError):
    """The kernel lacks a module, the host a program, or this process a right."""


class GuestError(Error):
    """A request to one guest could not be carried out."""


class NoGuest(GuestError):
    """No guest has that name."""


class Ambiguous(GuestError):
    """Guests of several hosts have that name."""


class WrongState(GuestError):
    """The guest's state does not allow the request."""


class Busy(GuestError):
    """Another command for the same guest has not ended."""


class ClockError(GuestError):
    """A guest's clock could not be corrected."""


class OutOfStep(GuestError):
    """Nothing shows that a guest's host is in step with this machine, whose time it would get."""


class MachineError(GuestError):
    """A machine's QEMU could not be started, refused a command, or does not answer."""


class QemuRefused(MachineError):
    """A machine's QEMU answered with an error: its class `code`, and its `text`."""

    def __init__(self, name: str, code: str, text: str) -> None:
        super().__init__(f'{name}: QEMU: {text}')
        self.code, self.text = code, text


class DamagedFile(MachineError):
    """A machine's file can't be used: `why` says what is wrong in it."""

    def __init__(self, path: str, name: str, why: str) -> None:
        super().__init__(f'{path} is damaged: {why}', f'mend it, or Machine.load({name!r}, '
                         'repair=True) puts back the copy of its last change; a copied directory '
                         'is no machine: copy its disks by qemu-img convert, make a new one of them'
                         )


def explain(problem: BaseException) -> str:
    """Return one line for people: what went wrong, and what to do about it."""
    if isinstance(problem, Error):
        return str(problem)
    if isinstance(problem, UnicodeDecodeError):
        return f'no UTF-8 at byte {problem.start}'
    if isinstance(problem, OSError) and problem.strerror:
        return f'{problem.filename}: {problem.strerror}' if problem.filename else problem.strerror
    return f'{type(problem).__name__}: {problem}'


def as_error(problem: Exception, kind: type[Error] = Error) -> Error:
    """Return what went wrong as an Error, of that kind if it is none yet: for where an OSError of
    this host, such as too many open files, must not end what goes on."""
    return problem if isinstance(problem, Error) else kind(explain(problem))


def told(problem: Error, guest: str = '') -> dict[str, str]:
    """Return an error for programs, which must not take a sentence apart to know the guest; the
    sentence names it, too."""
    named = not guest or re.search(rf'(?<!\w){re.escape(guest)}(?!\w)', problem.message)
    text = problem.message if named else f'{guest}: {problem.message}'
    return {**({'guest': guest} if guest else {}), 'error': text, 'hint': problem.hint}


class Check(NamedTuple):
    """A line of --check."""

    good: bool
    text: str


# === logging and threads ========================================================================

LINE_LENGTH = 1000              # characters of a log line; journald's own limit is 48 KiB
TRACE_LINES = 60                # of a traceback: the first ones, for its message may be anything

log = logging.getLogger('vmmonitor')


# Told of each step that outlives a crash of this program, just before it: "run ip ...",
# "send cont to PATH", "write PATH". A test kills or interrupts it there; else it does nothing.
TRACE: Callable[[str], object] = bool


def clip(text: str | bytes, length: int = LINE_LENGTH) -> str:
    """Return a text from outside at no more than `length`, saying what was cut off; bytes that are
    no UTF-8 are escaped. Whoever takes such a text in passes it through here."""
    if isinstance(text, bytes):
        text = text[:4 * length + 4].decode(errors='backslashreplace')
    return text if len(text) <= length else f'{text[:length - 1]}…'


def printable(text: str) -> str:
    """Return `text` with control characters and line ends escaped, so that no name or answer
    from outside can forge a log line or move a terminal's cursor."""
    return text if text.isprintable() else ''.join(
        c if c.isprintable() else ascii(c)[1:-1] for c in text)


class LogFormat(logging.Formatter):
    """One record, one line of LINE_LENGTH at most: with a priority for journald, which would take
    the rest of a longer one for a line of its own, or with the time for a terminal."""

    PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

    def __init__(self, journal: bool) -> None:
        super().__init__()
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and a traceback, if there is one, as further lines of its kind."""
        if self.journal:
            head = f'<{next(p for level, p in self.PRIORITIES if record.levelno >= level)}>'
        else:
            clock = self.formatTime(record, '%H:%M:%S')
            head = f'{clock}.{int(record.msecs):03d} {record.levelname.lower():7} '
        lines = [record.getMessage()]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()[:TRACE_LINES]
        return '\n'.join(head + clip(printable(clip(line))) for line in lines)


def under_journal() -> bool:
    """Tell whether stderr goes to journald (systemd.exec(5), JOURNAL_STREAM)."""
    device, _, inode = os.environ.get('JOURNAL_STREAM', '').partition(':')
    with contextlib.suppress(OSError):
        info = os.fstat(2)
        return (device, inode) == (str(info.st_dev), str(info.st_ino))
    return False


def set_up_logging(verbose: bool = False) -> None:
    """Send the log to stderr; `verbose` shows what was looked at and found in order, too. Both it
    and stdout escape what the terminal's encoding lacks."""
    with contextlib.suppress(AttributeError):   # it is closed, or no file
        sys.stdout.reconfigure(errors='backslashreplace')               # type: ignore
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormat(under_journal()))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


def spawn(name: str, target: Callable[..., object], *args: Any) -> threading.Thread:
    """Start a daemon thread, or raise Error; an exception that reaches its top is logged, never
    lost."""
    def guarded() -> None:
        try:
            target(*args)
        except Error as problem:
            log.error('%s: %s', name, explain(problem))
        except Exception:           # the boundary of every thread: a bug must be seen in the log
            log.exception('%s: unexpected error', name)
    thread = threading.Thread(target=guarded, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as problem:
        raise Error(f'{name}: {problem}', 'raise TasksMax= of the service, or see what takes the '
                    'memory of this host') from None
    return thread


Result = TypeVar('Result')


def in_thread(name: str, function: Callable[..., Result], *args: Any
              ) -> concurrent.futures.Future[Result]:
    """Call a function in a thread of its own; the future has its outcome, an exception too."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except Exception as problem:    # a boundary: it is raised where the outcome is asked for
            future.set_exception(problem)
    try:
        spawn(name, work)
    except Error as problem:
        future.set_exception(problem)
    return future


def utc(when: float) -> str:
    """Return a time.time() as ISO 8601 in UTC."""
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(when))


class Deadline:
    """A moment on the monotonic clock, `seconds` from now: the one way to bound a wait."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left, 0 when it has passed."""
        return max(0.0, self.end - time.monotonic())

    def passed(self) -> bool:
        return time.monotonic() >= self.end

    def poll(self, probe: Callable[[], bool], pause: float = STATE_POLL) -> bool:
        """Call `probe` every `pause` seconds until it is true (True) or time is up (False)."""
        while not probe():
            if self.passed():
                return False
            time.sleep(min(pause, self.left()))
        return True


def ended(work: concurrent.futures.Future[Any], deadline: Deadline) -> bool:
    """Wait until something in a thread has its outcome (True) or time is up (False). The main
    thread looks up now and then: a Ctrl-C that the kernel gave to another one does not wake it."""
    main = threading.current_thread() is threading.main_thread()
    return deadline.poll(lambda: not concurrent.futures.wait(
        [work], min(deadline.left(), STATE_POLL if main else math.inf)).not_done, 0)


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Let the first Ctrl-C count only when the block has ended: it must not be left halfway."""
    if threading.current_thread() is not threading.main_thread():
        yield                               # only the main thread is interrupted
        return
    kept: list[Any] = []

    def keep(*arguments: Any) -> None:
        if kept and callable(before):
            before(*arguments)
        kept.append(arguments)
    before = signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if len(kept) == 1 and callable(before):
        before(*kept[0])


# === data from outside ==========================================================================
# A guest, a client and even a QEMU that a guest has broken into may send anything at all.

JSON_BYTES = 10 * 1024 * 1024  # the longest text, so the longest line; libvirt's own limit
JSON_DEPTH = 64                # objects in objects; the deepest honest answer has about ten
JSON_DIGITS = 40               # of a number: Python takes minutes to read one of some millions
JSON_COMMAS = 100_000          # of an answer: objects take 20 times the memory of their text, and a
#                                second to make of JSON_BYTES, in which no other thread runs
TEXT_LENGTH = 4096             # characters of a string: a path has as many; more only in DATA
BOM = '\ufeff'                 # with which some editors begin a text; it is none of it
DATA = 'data'                  # in a schema: a string of any length


def parse_documents(text: str | bytes, unique: bool = False, names: bool = False
                    ) -> Iterator[Any]:
    """Yield the JSON values that follow each other in a text; with `unique`, no object may have
    a key twice. With `names`, strings may be as the kernel's names are: any bytes.

    Raises ValueError for what is no JSON, longer than JSON_BYTES or deeper than JSON_DEPTH, and
    for numbers that JSON does not have.
    """
    if len(text) > JSON_BYTES:
        raise ValueError(f'longer than {JSON_BYTES} bytes')
    if isinstance(text, bytes):
        text = text.decode(errors='surrogateescape' if names else 'strict')
    text = text.removeprefix(BOM).strip()
    decoder = json.JSONDecoder(parse_int=_whole, parse_float=_finite, parse_constant=_finite,
                               object_pairs_hook=_no_duplicates if unique else None,
                               strict=not names)
    place = 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except RecursionError:
            raise ValueError('nested too deeply') from None
        yield _shallow(value)
        while text[place:place + 1].isspace():
            place += 1


def parse_json(text: str | bytes, unique: bool = False) -> Any:
    """Return the one value of a JSON text, as parse_documents() does."""
    values = [*itertools.islice(parse_documents(text, unique), 2)]
    if len(values) != 1:
        raise ValueError('more than one value' if values else 'nothing in it')
    return values[0]


def parse_answer(text: str | bytes) -> Any:
    """Return the JSON value that a guest has sent, or a QEMU; ValueError as parse_json(), and for
    what is in too many pieces."""
    if text.count(b',' if isinstance(text, bytes) else ',') > JSON_COMMAS:  # type: ignore[arg-type]
        raise ValueError(f'more than {JSON_COMMAS} values')
    return parse_json(text)


def _shallow(value: Any) -> Any:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > JSON_DEPTH:
            raise ValueError('nested too deeply')
        level = [item for outer in level if isinstance(outer, (dict, list))
                 for item in (outer.values() if isinstance(outer, dict) else outer)]
    return value


def _whole(text: str) -> int:
    if len(text) > JSON_DIGITS:
        raise ValueError(f'a number of {len(text)} digits')
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text} is no number')
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice in one JSON object, where json would take the last."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f'the key {key!r} stands twice in one object; remove one')
        seen[key] = value
    return seen


# A table that each layer adds its own rows to: what is read of an answer to a command, or of
# another value from outside. A row is a schema: a type (bool is no int, int is a float, str has
# TEXT_LENGTH at most), DATA for a string of any length, None, [schema] for a list of such, a tuple
# for a choice, {member: schema} for an object that has these members and maybe others; a member
# with a "?" may be missing, and "*" stands for all that are not named.
SCHEMAS: dict[str, Any] = {}


class Rows(list[Any]):
    """In a schema, a list of which the items that are none of it are left out."""


def matches(value: Any, schema: Any) -> bool:
    """Tell whether a value is as a schema says."""
    if isinstance(schema, tuple):
        return any(matches(value, one) for one in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(matches(item, schema[0]) for item in value)
    if isinstance(schema, dict):
        named = {key.rstrip('?'): inner for key, inner in schema.items()}
        return isinstance(value, dict) and all(
            key.rstrip('?') in value for key in schema if key[-1] not in '?*') and all(
            matches(item, named.get(key, named.get('*', object))) for key, item in value.items())
    if schema is None or schema == DATA:
        return value is None if schema is None else isinstance(value, str)
    if isinstance(value, bool) or schema is bool:
        return isinstance(value, bool) and schema in (bool, object)
    if isinstance(value, str):
        return schema is object or schema is str and len(value) <= TEXT_LENGTH
    return isinstance(value, (int, float) if schema is float else schema)


def tidied(value: Any, schema: Any) -> Any:
    """Return a value without the optional members that are null, and without what is odd in Rows:
    neither may take the rest of an answer with it."""
    if isinstance(schema, list) and isinstance(value, list):
        items = [tidied(item, schema[0]) for item in value]
        return isinstance(schema, Rows) and [
            item for item in items if matches(item, schema[0])] or items
    if isinstance(schema, dict) and isinstance(value, dict):
        named = {key.rstrip('?'): inner for key, inner in schema.items()}
        return {key: tidied(item, named.get(key, object)) for key, item in value.items()
                if item is not None or f'{key}?' not in schema or matches(None, named[key])}
    return value


def checked(what: str, value: Any, schema: Any = None) -> Any:
    """Return a value from outside, tidied(); ValueError unless its schema, or row, fits."""
    schema = SCHEMAS.get(what, object) if schema is None else schema
    value = tidied(value, schema)
    if not matches(value, schema):
        raise ValueError(f'{what} returned {value!r:.80}')
    return value


def answer_of(command: str, reply: Any) -> Any:
    """Return the "return" of a reply to a command, checked."""
    return checked(command, reply, {'return': SCHEMAS.get(command, object)})['return']


def raw_bytes(data: str | bytes) -> bytes:
    """Return text as UTF-8, bytes as they are; TypeError or ValueError for anything else."""
    return data.encode() if isinstance(data, str) else bytes(memoryview(data))


# === files and locks ============================================================================
# A program that is root never acts twice by a name that another user can change: a file is made or
# opened once, in a directory that is held open, and from there on known by its descriptor.

DRAFT = '.vmmonitor-'           # how the names of files begin that are not whole yet
RENAMING = threading.Lock()     # held while one has that name: exit_now() waits for it
LOCK_POLL = 0.005               # between two tries to get a lock: the kernel's waiting has no end
UNHEARD = -1                    # a holder who does not listen: it has just begun, or ended, ...
UNHEARD_MAX = 1.0               # ... or, after so long, is somebody who wants to hold others up
FLOCK = 'hhqqi4x'               # struct flock: l_type, l_whence, l_start, l_len, l_pid


def write_error(path: str, problem: OSError) -> FileError:
    """Return the error that stands for one in making or writing a file."""
    if isinstance(problem, FileExistsError):
        return FileError(f'{path} exists', 'name another file, or remove this one')
    return FileError(f'{path}: can\'t be written: {problem.strerror}',
                     'see that its directory is there, has space, and may be written to')


@contextlib.contextmanager
def whole_file(path: str, replace: bool = False, lasting: bool = False) -> Iterator[int]:
    """Lend the descriptor of a new file, which becomes `path` when the block ends well; if it is
    `lasting`, it then stays so after a power failure, too, and what it replaced does not come back.

    Until then it has no name, so that nothing stays when this program is killed, where the file
    system can do that (NFS can't). A program that inherits it finds it at fd_path(). Without
    `replace`, a file that is there already stays, and FileError is raised.
    """
    place, name = os.path.split(path)
    draft, mode = DRAFT + os.urandom(8).hex(), os.O_RDWR | os.O_CLOEXEC
    with contextlib.ExitStack() as opened:
        try:
            home = os.open(place or '.', os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, home)
            if replace:
                _require_file(path, name, home)
            try:
                file = os.open('.', mode | os.O_TMPFILE, 0o600, dir_fd=home)
            except OSError:
                file = os.open(draft, mode | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600,
                               dir_fd=home)
            opened.callback(os.close, file)
            opened.callback(remove_file, draft, home)
        except OSError as problem:
            raise write_error(path, problem) from None
        yield file
        TRACE(f'write {path}')
        try:
            if lasting:
                os.fsync(file)
            if replace or not _linked(file, name, home):
                with RENAMING:
                    if not os.fstat(file).st_nlink:
                        os.link(fd_path(file), draft, dst_dir_fd=home)
                    os.replace(draft, name, src_dir_fd=home, dst_dir_fd=home)
        except OSError as problem:                  # nothing has changed then
            raise write_error(path, problem) from None
        if lasting:
            with contextlib.suppress(OSError):      # not every file system can
                os.fsync(home)


def made_once(path: str, make: Callable[..., object], *arguments: Any) -> bool:
    """Make a file, unless another one does so at the same time; tell whether it was made here."""
    try:
        make(*arguments)
    except FileError:
        if not os.path.exists(path):
            raise
        return False
    return True


def _require_file(path: str, name: str, directory: int) -> None:
    """Raise FileError for what is there under a name and is no file: /dev/null must stay what it
    is, and so must /dev/stdout, a link to whatever that is."""
    with contextlib.suppress(FileNotFoundError):
        link = stat.S_ISLNK(os.lstat(name, dir_fd=directory).st_mode)
        if link and os.readlink(name, dir_fd=directory).startswith('/proc/') \
                or not stat.S_ISREG(os.stat(name, dir_fd=directory).st_mode):
            raise FileError(f'{path}: is no file', 'name another')


def _linked(file: int, name: str, directory: int) -> bool:
    """Give a file a name that nothing has; where there are no links (FAT), only take the name."""
    try:
        os.link(fd_path(file), name, dst_dir_fd=directory)
        return True
    except OSError as problem:
        if problem.errno not in (errno.EPERM, errno.EOPNOTSUPP) or not os.fstat(file).st_nlink:
            raise
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600,
                     dir_fd=directory))
    return False


def remove_file(path: str, directory: int | None = None) -> None:
    """Remove a file, if it is there; a relative name is one in the open `directory`."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path, dir_fd=directory)


def write_whole(path: str, data: bytes, replace: bool = False,
                dress: Callable[[int], object] = os.fstat, lasting: bool = True) -> None:
    """Write a file so that it is there whole, or not at all, after a power failure, too, if it is
    `lasting`; `dress` gives the open file its owner and mode."""
    with whole_file(path, replace, lasting) as file:
        try:
            with open(file, 'wb', closefd=False) as stream:
                stream.write(data)
            dress(file)
        except OSError as problem:                  # such as a full disk
            raise write_error(path, problem) from None


def names_in(directory: str) -> list[str]:
    """Return what is in a directory; nothing if there is none, or none that can be read."""
    try:
        return os.listdir(directory)
    except OSError:
        return []


def fd_path(fd: int) -> str:
    """Return the name by which whoever has a descriptor opens its file anew."""
    return f'/proc/self/fd/{fd}'


def is_device(path: str) -> bool:
    """Tell whether it is a block device; not, where this user may not look (pathlib raises)."""
    with contextlib.suppress(OSError):
        return stat.S_ISBLK(os.stat(path).st_mode)
    return False


def open_file(path: str, mode: int = os.O_RDONLY) -> int:
    """Return a descriptor of a file or block device, to read it; FileError if it can't be had."""
    try:
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)     # a FIFO would hold us
    except OSError as problem:
        kept = problem.errno == errno.EPERM and is_device(path)
        raise FileError(explain(problem), 'systemctl edit vmmonitor: [Service] and DeviceAllow='
                        f'{path} rw' if kept else 'put it back, or name another') from None
    if not stat.S_ISREG(os.fstat(fd).st_mode) and not stat.S_ISBLK(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileError(f'{path}: is no file', 'name a file or a block device')
    return fd


def read_own(path: str) -> bytes:
    """Return a file, JSON_BYTES of it, that is this user's or root's: whoever has it can have
    written anything into it. OSError if it is not, or no file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)      # a FIFO would hold us
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, 'is no file')
        if info.st_uid not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, f'is of the user {info.st_uid}, who can have '
                                  'written anything into it')
        with open(fd, 'rb', closefd=False) as file:
            return file.read(JSON_BYTES + 1)
    finally:
        os.close(fd)


def lock_one(files: Sequence[int], deadline: Deadline) -> int:
    """Lock one of these open files against all other openings, of this program, too (flock);
    return its place, or -1 when others had them all until the deadline."""
    found: list[int] = []

    def tried() -> bool:
        for place, fd in enumerate(files):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(place)
                return True
        return False
    return found[0] if deadline.poll(tried, LOCK_POLL) else -1


def lock_bytes(fd: int, first: int, count: int, deadline: Deadline) -> bool:
    """Lock bytes of an open file as QEMU does (F_OFD_SETLK); False when others had one of them."""
    def tried() -> bool:
        with contextlib.suppress(BlockingIOError, PermissionError):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, ask)
            return True
        return False
    ask = struct.pack(FLOCK, fcntl.F_WRLCK, 0, first, count, 0)
    return deadline.poll(tried, LOCK_POLL)


def bytes_locked(fd: int, first: int, count: int) -> bool:
    """Tell whether somebody else has such a lock (F_OFD_GETLK)."""
    told = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, 0, first, count, 0))
    return bool(struct.unpack(FLOCK, told)[0] != fcntl.F_UNLCK)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return process and user at the other end of a unix socket (SO_PEERCRED, unix(7))."""
    process, user, _ = struct.unpack('3i', connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize('3i')))
    return process, user


@contextlib.contextmanager
def turn(name: str, deadline: Deadline) -> Iterator[int | None]:
    """Let one block of that name run at a time, in all programs of this host; lend None, or the
    process that has not ended its own by the deadline.

    The lock is an abstract socket, which ends with its process and needs no directory that all may
    write. Who is neither root, we, nor one who may talk to libvirt can't hold anybody up by it, or
    for no more than UNHEARD_MAX.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        unheard = Deadline(UNHEARD_MAX)
        while True:
            holder = None
            try:
                lock.bind(f'\0{name}')
                lock.listen()
            except OSError as problem:
                if problem.errno == errno.EADDRINUSE:
                    holder = _outlast(f'\0{name}', deadline)
            if holder != UNHEARD:
                unheard = Deadline(UNHEARD_MAX)
                if holder is None or deadline.passed():
                    break
            elif unheard.passed():
                holder = None
                break
        yield holder


def _outlast(name: str, deadline: Deadline) -> int | None:
    """Wait until who listens at an abstract socket has ended, or the deadline; return its process,
    0 when that can't be told, UNHEARD when nobody listens, None if it does not count."""
    with socket.socket(socket.AF_UNIX) as asker:
        asker.settimeout(STATE_POLL)
        try:
            asker.connect(name)
            process, user = peer_of(asker)
        except OSError as problem:
            time.sleep(LOCK_POLL)
            return UNHEARD if isinstance(problem, ConnectionRefusedError) else None
        if user not in (0, os.geteuid()) and not in_group(user, 'libvirt'):
            return None
        asker.settimeout(max(deadline.left(), STATE_POLL))
        with contextlib.suppress(OSError):          # it ends with the listener
            asker.recv(1)
    return process


def in_group(user: int, group: str) -> bool:
    with contextlib.suppress(KeyError):
        known = pwd.getpwuid(user)
        return grp.getgrnam(group).gr_gid in os.getgrouplist(known.pw_name, known.pw_gid)
    return False


# === processes ==================================================================================

SYS_COMMAND_TIMEOUT = 600.0    # of sys_command(), unless it is told another
# Debian's, where its name is another
PACKAGES = {'ip': 'iproute2', 'tc': 'iproute2', 'qemu-img': 'qemu-utils', 'setpriv': 'util-linux',
            'qemu-system-x86_64': 'qemu-system-x86', 'dnsmasq': 'dnsmasq-base'}
SBIN = '/usr/local/sbin', '/usr/sbin', '/sbin'      # which Debian's `su` leaves out of PATH


def environment() -> dict[str, str]:
    """Return the environment of what is run: ours, with the directories of administrators."""
    path = os.environ.get('PATH', os.defpath).split(os.pathsep)
    return {**os.environ, 'PATH': os.pathsep.join(dict.fromkeys([*path, *SBIN]))}


def which(program: str) -> str | None:
    """Return the path of a program that run() would find, or None."""
    return shutil.which(program, path=environment()['PATH'])


def run(argv: Sequence[str], timeout: float, stdin: bytes = b'', check: bool = True,
        keep: Sequence[int] = ()) -> subprocess.CompletedProcess[bytes]:
    """Run a program without a shell, for at most `timeout` seconds; return what it printed.

    It inherits the descriptors `keep`. Raises CommandError when it is missing, can't be run, takes
    longer, or (with `check`) fails.
    """
    TRACE(f'run {" ".join(argv)}')
    try:
        done = subprocess.run(argv, input=stdin, timeout=timeout, check=False,
                              capture_output=True, pass_fds=keep, env=environment())
    except FileNotFoundError:
        raise CommandError(argv, 127, 'not found',
                           f'install {PACKAGES.get(argv[0], argv[0])}') from None
    except subprocess.TimeoutExpired:
        raise CommandError(argv, 124, f'no end after {timeout:g} s') from None
    except OSError as problem:
        raise CommandError(argv, 126, f'can\'t be run: {problem.strerror}', 'see that this user '
                           'may run it' * isinstance(problem, PermissionError)) from None
    if check and done.returncode:
        raise CommandError(argv, done.returncode, done.stderr.decode(errors='backslashreplace'))
    return done


def sys_command(cmd: str | Sequence[str | os.PathLike[str]],
                timeout: float = SYS_COMMAND_TIMEOUT) -> bytes:
    """Run a command of the library's user and return its standard output.

    A string goes through /bin/sh, and nothing else in this program does: put no name from outside
    into one. A list, of strings and paths, is run as it stands. Raises CommandError (`status`,
    `stderr`).
    """
    try:
        words = ['/bin/sh', '-c', cmd] if isinstance(cmd, str) else [*map(os.fsdecode, cmd)]
        if not words or any(b'\0' in os.fsencode(word) for word in words):
            raise ValueError(words)
    except (TypeError, ValueError):
        raise CommandError([f'{cmd!r:.80}'], 126, 'is no command',
                           'give a string for a shell, or a list of strings') from None
    try:
        return run(words, timeout).stdout
    except CommandError as problem:
        shown = cmd if isinstance(cmd, str) else shlex.join(words)
        raise CommandError([shown], problem.status, problem.stderr, problem.hint) from None


def process_name(pid: str) -> str:
    """Return what a process is called: "socat (process 12)", and of a QEMU its machine."""
    line = Path(f'/proc/{pid}/cmdline').read_bytes().decode(errors='backslashreplace')
    guest = re.search(r'\0-name\0(?:guest=)?([^,\0]+)', line)
    program = os.path.basename(line.partition('\0')[0])
    return f'machine {guest[1]} ({program}, process {pid})' if guest else \
        f'{program} (process {pid})'


def is_of(who: str, machines_: Iterable[str]) -> bool:
    """Tell whether a process_name() is that of one of these machines."""
    return who.startswith(tuple(f'machine {name} (' for name in machines_))


def process_start(pid: int) -> str:
    """Return when a process began, in clock ticks (proc(5), field 22); '' when it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f'/proc/{pid}/stat').read_bytes().rpartition(b')')[2].split()
        return fields[19].decode() if fields[0] not in (b'Z', b'X') else ''
    return ''


def process_users(pid: str) -> set[int]:
    """Return the numbers of all users that a process is: of anybody's `su`, or other setuid
    program, /proc/PID is root's, who is but one of them."""
    status = Path('/proc', pid, 'status').read_text(errors='replace')
    return {*map(int, status.partition('\nUid:')[2].partition('\n')[0].split())}


# === configuration ==============================================================================

KEY_MINIMUM = 16               # shorter keys draw a warning
WAIT_DEFAULT = 120.0           # of "wait NAME" without a time
MACHINES_LABEL = 'machines'    # HOST in HOST/NAME for this program's own ...
LIBVIRT_LABEL = 'libvirt'      # ... and for the only libvirt


@dataclasses.dataclass(frozen=True)
class Option:
    """One row of the table of options: everything that is known of a configuration key."""

    key: str                                # its place in the file: listener.certificate.path
    help: str                               # for the README's table
    read: Callable[[Any], Any]              # checks and converts, or raises InvalidValue
    restart: bool = False                   # a change counts only after a restart
    shown: Any = None                       # its default as the file has it, if that is different


def option(key: str, default: Any, read: Callable[[Any], Any], text: str,
           restart: bool = False, secret: bool = False, shown: Any = None) -> Any:
    """Return a dataclass field of Config that carries its row of the table."""
    row = Option(key, text, read, restart, shown)
    return dataclasses.field(default=default, repr=not secret, metadata={'option': row})


# --- readers: each returns a value as it is used, or raises InvalidValue with what it must be ---

Reader = Callable[[Any], Any]
# What no name in libvirt has; a tab may be in one.
CONTROLS = re.compile('[\0-\x08\n-\x1f\x7f\ud800-\udfff]')


def check(name: str, value: Any, read: Reader, error: type[Error] = InvalidValue) -> Any:
    """Return an argument as `read` reads it; `error`, which names it, if it can't be used.

        delay = check('delay', delay, a_number(0, 3600, 'seconds'), NetworkError)
    """
    try:
        return read(value)
    except InvalidValue as problem:
        raise error(f'{name}: {value!r:.80} {problem.message}', problem.hint) from None


def a_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidValue('must be true or false')
    return value


def a_text(value: Any) -> str:
    """Read a string without control characters; null, as in old files, is the empty one."""
    if value is None:
        return ''
    if not isinstance(value, str) or CONTROLS.search(value) or len(value) > TEXT_LENGTH:
        raise InvalidValue('must be a string without control characters, of no more than '
                           f'{TEXT_LENGTH} characters')
    return value


def a_number(low: float, high: float, unit: str = '', whole: bool = False) -> Reader:
    """Return a reader of numbers from `low` to `high`."""
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) \
                or (whole and not isinstance(value, int)) or not low <= value <= high:
            number = 'a whole number' if whole else 'a number'
            raise InvalidValue(f'must be {number} from {low} to {high}{unit and " " + unit}')
        return value
    return read


def one_of(*choices: Any) -> Reader:
    """Return a reader of what is one of these."""
    def read(value: Any) -> Any:
        if value not in choices:
            raise InvalidValue(f'must be one of {", ".join(map(str, choices))}')
        return value
    return read


def optional(read: Reader) -> Reader:
    return lambda value: None if value is None else read(value)


def read_each(items: Iterable[tuple[str, Any, Reader]]) -> list[Any]:
    """Read values, each with its place in what they stand in; InvalidValue says all that is wrong,
    each by its place, such as machines.web.memory."""
    found: list[Any] = []
    problems: list[tuple[str, str]] = []
    for place, value, read in items:
        try:
            found.append(read(value))
        except InvalidValue as problem:
            problems += [(place + '.' * bool(place and inner and inner[0] != '[') + inner, why)
                         for inner, why in problem.places]
    if problems:
        raise InvalidValue('; '.join(f'{place}: {why}' if place else why
                                     for place, why in problems), places=problems)
    return found


def a_list(read: Reader, what: str = 'strings', of: type = str) -> Reader:
    """Return a reader of lists of `what`, read into a tuple."""
    def read_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, of) for item in value):
            raise InvalidValue(f'must be a list of {what}')
        return tuple(read_each((f'[{number}]', item, read) for number, item in enumerate(value)))
    return read_all


texts = a_list(a_text)


def read_members(item: Mapping[str, Any], members: Mapping[str, tuple[Reader, Any]]) -> list[Any]:
    """Read an object with these members, each with its reader and default; return the values."""
    def strange(key: str) -> NoReturn:
        raise InvalidValue(unknown(key, members, f'there are {", ".join(members)}'))
    return read_each([
        *((f'{key:.80}', key, strange) for key in sorted(item.keys() - members.keys())),
        *((member, item.get(member, default), read) for member, (read, default)
          in members.items())])


def an_address(value: Any) -> str:
    """Read an IP address; the empty string is all of them."""
    text = a_text(value)
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, text or '::')
            return text
    raise InvalidValue('must be an IPv4 or IPv6 address, or "" for all addresses of this host')


def a_network(value: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Read an IP address or network, such as 10.0.0.0/8."""
    try:
        return ipaddress.ip_network(a_text(value))
    except ValueError:
        raise InvalidValue('must be an address or a network, such as 10.0.0.0/8') from None


class Form(NamedTuple):
    """A row of the list language: how one kind of line is written. Words in capitals stand for a
    value, those in brackets may be left out."""

    words: str
    otherwise: tuple[str, ...] = ()     # what may stand behind "or" at its end
    seconds: float = 0.0                # where SECONDS is left out

    def __str__(self) -> str:
        return self.words + (f' [or {"|".join(self.otherwise)}]' if self.otherwise else '')


# The first row that fits counts.
STARTUP_FORMS = (
    Form('start NAME'),
    Form('delay SECONDS'),
    Form('wait path PATH [SECONDS]', ('stop',), WAIT_DEFAULT),
    Form('wait NAME port PORT [SECONDS]', ('stop',), WAIT_DEFAULT),
    Form('wait NAME [agent|running|off] [SECONDS]', ('stop',), WAIT_DEFAULT))
SHUTDOWN_FORMS = (              # the NAME "all" is all that no other line names
    Form('stop NAME [SECONDS]', ('save', 'off'), WAIT_DEFAULT),
    Form('save NAME'),
    Form('off NAME'),
    Form('delay SECONDS'),
    Form('wait NAME off [SECONDS]', ('stop',), WAIT_DEFAULT))


class Step(NamedTuple):
    """One line of a list."""

    number: int                 # of the line, from 1
    verb: str                   # the first word
    name: str = ''              # of the guest
    seconds: float = 0.0        # to sleep, or to wait at most
    until: str = ''             # wait: agent, running, off, port or path
    what: str = ''              # the port or path
    otherwise: str = ''         # what to do when it waited in vain: "stop" the list, "save" the
#                                 guest or cut its power, "off"; '': go on

    def __str__(self) -> str:
        seconds = f'{self.seconds:g} s' if self.verb == 'delay' else ''
        return ' '.join(filter(None, [self.verb, self.name, self.until, self.what, seconds]))


def _fits(token: str, word: str) -> bool:
    if token.islower():
        return word in token.split('|')
    return word.startswith('/') if token == 'PATH' else bool(word)


def _read_form(form: Form, words: Sequence[str]) -> dict[str, str] | None:
    """Return what stands in a line for each word of a Form; None if it is not such a line."""
    rest, found = list(words), {'SECONDS': str(form.seconds)}
    if len(rest) > 2 and rest[-2] == 'or' and rest[-1] in form.otherwise:
        found['or'] = rest[-1]
        del rest[-2:]
    for token in form.words.split():
        if rest and _fits(token.strip('[]'), rest[0]):
            found[token.strip('[]')] = rest.pop(0)
        elif token[0] != '[':
            return None
    return None if rest else found


def _words(line: str) -> list[str]:
    """Return the words of a line up to its remark, which begins with a word that begins with "#":
    one in the middle of a word is part of a name."""
    for remark in re.finditer(r'(?:^|\s)#', line):
        with contextlib.suppress(ValueError):           # it stands in quotes
            return shlex.split(line[:remark.start()])
    return shlex.split(line)


def read_step(number: int, line: str, forms: Sequence[Form] = STARTUP_FORMS) -> Step | None:
    """Read one line of a list; None for a comment or an empty one."""
    a_text(line)
    try:
        words = _words(line)
    except ValueError as reason:
        raise InvalidValue(f'{line!r}: {reason}; quote names with spaces') from None
    if not words:
        return None
    found = next(filter(None, (_read_form(form, words) for form in forms)), None)
    if not found:
        raise InvalidValue(f'{line!r} is not understood; write {usage(forms)}, names with spaces '
                           'in quotes')
    for token, kind, low, high, what in (('PORT', int, 1, 65535, 'port'),
                                         ('SECONDS', float, 0, DAY, 'number of seconds')):
        text, fits = found.get(token, '1'), False
        with contextlib.suppress(ValueError):
            fits = low <= kind(text) <= high
        if not fits:
            raise InvalidValue(f'{line!r}: {text!r} is no {what} from {low} to {high}')
    until = [word for token, word in found.items() if token.islower() and token != 'or'][1:]
    return Step(number, words[0], found.get('NAME', ''), float(found['SECONDS']),
                until[0] if until else 'agent' if words[0] == 'wait' else '',
                found.get('PORT', found.get('PATH', '')), found.get('or', ''))


def usage(forms: Sequence[Form]) -> str:
    return ', '.join(f'"{form}"' for form in forms)


def steps(value: Any, forms: Sequence[Form] = STARTUP_FORMS) -> tuple[Step, ...]:
    """Read a list of lines, naming every line that can't be understood."""
    return tuple(filter(None, read_each(
        (f'line {number}', line, functools.partial(read_step, number, forms=forms))
        for number, line in enumerate(a_list(str)(value), 1))))


HOST_NAME = re.compile(r'[\w.-]{1,40}', re.ASCII)
HOST_MEMBERS: dict[str, tuple[Reader, Any]] = {     # of an entry -> its reader, its default
    'uri': (a_text, ''), 'trustClock': (a_bool, False)}


class HostEntry(NamedTuple):
    """An entry of hosts: a libvirt, and what it is called."""

    name: str                   # '' for the only one, of libvirt.uri
    uri: str
    trust_clock: bool = False   # its clock is taken to be in step with ours


def host_entries(value: Any) -> tuple[HostEntry, ...]:
    """Read hosts, {name: URI, or object with uri and trustClock}."""
    if not isinstance(value, dict):
        raise InvalidValue('must be an object such as {"alpha": "qemu:///system", "beta": '
                           '{"uri": "qemu+tls://beta/system", "trustClock": true}}')
    entries: list[HostEntry] = read_each((f'{name!r:.60}', (name, entry), _host_entry)
                                         for name, entry in value.items())
    if len({entry.uri for entry in entries}) < len(entries):
        raise InvalidValue('each host needs a URI of its own')
    return tuple(entries)


def _host_entry(item: tuple[str, Any]) -> HostEntry:
    name, value = item
    if not HOST_NAME.fullmatch(name) or name == MACHINES_LABEL:
        raise InvalidValue('call it by up to 40 letters, digits, ".", "-" and "_"; '
                           f'"{MACHINES_LABEL}" are those of this program')
    entry = HostEntry(name, *read_members(value if isinstance(value, dict) else {'uri': value},
                                          HOST_MEMBERS))
    if not entry.uri:
        raise InvalidValue(f'needs a URI such as "qemu+tls://{name}/system"')
    return entry


def matches_any(patterns: Iterable[str], own: str, full: str) -> bool:
    """Tell whether a name or shell pattern is that of a guest: of its own name, and if there is a
    "/" in it, also of HOST/NAME; so "b*" never means all guests of a host beta."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns
               for name in ((own, full) if '/' in pattern else (own,)))


def matches_host(patterns: Iterable[str], host: str) -> bool:
    """Tell whether a name or shell pattern can be that of a guest of this HOST."""
    return any('/' not in pattern or fnmatch.fnmatchcase(host, pattern.partition('/')[0])
               for pattern in patterns)


class Verb(NamedTuple):
    """A row of the table of what can be asked for, by the trigger and on the command line."""

    help: str
    enabled: bool = False       # for the trigger, where listener.commandsEnabled does not say
    act: bool = True            # changes the guest: the method of that name of Guest


VERBS = {
    'start': Verb('make it run, from whatever state', enabled=True),
    'stop': Verb('ask it to shut down', enabled=True),
    'save': Verb('save its memory to disk and end it', enabled=True),
    'wake': Verb('make it run, from saved, paused, asleep or off', enabled=True),
    'off': Verb('cut its power: what it has not written is lost'),
    'reboot': Verb('ask it to boot anew'),
    'reset': Verb('press its reset button'),
    'pause': Verb('stop its processors'),
    'resume': Verb('let them go on'),
    'sync': Verb('correct its clock now'),
    'status': Verb('what it is doing', enabled=True, act=False),
    'screenshot': Verb('a PNG of what its screen shows', act=False),
    'list': Verb('all guests, and what they are doing', enabled=True, act=False),
    'log': Verb('the last commands and corrections', enabled=True, act=False),
    'metrics': Verb('figures for Prometheus', enabled=True, act=False)}
FOR_ALL = ('list', 'log', 'metrics')    # they take no target
COMMANDS = tuple(VERBS)
# What notify.command can be told of: troubles of a guest, and others
GUEST_NOTICES = ('clock', 'start', 'stop', 'io-error', 'crashed')
NOTICES = (*GUEST_NOTICES, 'host', 'reload', 'keys', 'certificate')


def commands_enabled(value: Any) -> tuple[str, ...]:
    """Read listener.commandsEnabled; return the commands that are switched on."""
    if not isinstance(value, dict):
        raise InvalidValue('must be an object such as {"start": true, "stop": false}')
    switches = {name: (a_bool, verb.enabled) for name, verb in VERBS.items()}
    return tuple(itertools.compress(VERBS, read_members(value, switches)))


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the listener, an entry of listener.keys: what it may do, and to which guests."""

    name: str
    key: str = dataclasses.field(default='', repr=False)        # as it stands there ...
    key_file: str = ''                                          # ... or where it is
    commands: tuple[str, ...] = COMMANDS
    targets: tuple[str, ...] = ('*',)                   # shell patterns (fnmatch)
    # These are found when keys are read: SHA-256, which all compare in the same time; and whether
    # it is shorter than KEY_MINIMUM.
    digest: bytes = dataclasses.field(default=b'', repr=False)
    guessable: bool = False

    def covers(self, own: str, full: str) -> bool:
        """Tell whether the key reaches the guest with this own name, and HOST/NAME."""
        return matches_any(self.targets, own, full)

    def enters(self, host: str) -> bool:
        """Tell whether it may reach guests of this HOST."""
        return matches_host(self.targets, host)


KEY_MEMBERS: dict[str, tuple[Reader, Any]] = {      # of an entry -> its reader, its default
    'name': (a_text, ''), 'key': (a_text, ''), 'keyFile': (a_text, ''),
    'commands': (a_list(one_of(*COMMANDS)), COMMANDS), 'targets': (texts, ('*',))}


def key_entries(value: Any) -> tuple[Key, ...]:
    """Read listener.keys: objects with name, key or keyFile, commands, targets."""
    entries: tuple[Key, ...] = a_list(
        _key_entry, 'objects such as {"name": "backup", "keyFile": "backup.key", "commands": '
        '["save", "start"], "targets": ["db*"]}', dict)(value)
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names) or 'main' in names:
        raise InvalidValue('each key needs a name of its own; "main" is the one of listener.key')
    return entries


def _key_entry(item: Mapping[str, Any]) -> Key:
    """Read one entry of listener.keys; what is wrong is said without showing the key."""
    entry = Key(*read_members(item, KEY_MEMBERS))
    if not entry.name:
        raise InvalidValue('needs a "name"')
    if bool(entry.key) == bool(entry.key_file):
        raise InvalidValue(f'({entry.name}) needs one of "key" and "keyFile"')
    return entry


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration, and with it the one table of options: a row each, in file order."""

    libvirt_uri: str = option(
        'libvirt.uri', 'qemu:///system', a_text, 'the libvirt to talk to', restart=True)
    hosts: tuple[HostEntry, ...] = option(
        'hosts', (), host_entries, 'several of them instead: names with URIs', restart=True,
        shown={})
    monitor_enabled: bool = option(
        'monitor.enabled', True, a_bool, 'correct the clocks of guests', restart=True)
    tolerance: float = option(
        'monitor.toleranceMs', 5, a_number(0.1, 60000, 'ms'),
        'an offset up to this many milliseconds is left alone')
    agent_wait: float = option(
        'monitor.agentWait', 120, a_number(1, 3600, 'seconds'),
        'how long a job waits for the guest agent to answer, in seconds')
    check_interval: float = option(
        'monitor.checkInterval', 0, a_number(0, DAY, 'seconds'),
        'check all running guests this often, in seconds; 0: only when something happened')
    allow_exec: bool = option(
        'monitor.allowExec', False, a_bool,
        'run `date` in guests whose agent can\'t set the time (guest-exec)')
    exclude: tuple[str, ...] = option(
        'monitor.exclude', (), texts, 'guests to leave alone: names or patterns such as "test*"')
    listener_enabled: bool = option(
        'listener.enabled', False, a_bool, 'answer https requests', restart=True)
    address: str = option(
        'listener.address', '', an_address, 'the address to listen on; "": all, IPv6 and IPv4',
        restart=True)
    port: int = option(
        'listener.port', 10000, a_number(1, 65535, whole=True), 'the TCP port to listen on',
        restart=True)
    certificate: str = option(
        'listener.certificate.path', '', a_text, 'certificate chain, PEM')
    certificate_key: str = option(
        'listener.certificate.keyPath', '', a_text, 'its private key; "": in the same file')
    certificate_password: str = option(
        'listener.certificate.password', '', a_text,
        'the password of the private key, if it has one', secret=True)
    key: str = option(
        'listener.key', '', a_text, 'the key for all that commandsEnabled allows', secret=True)
    key_file: str = option(
        'listener.keyFile', '', a_text, 'a file that holds it instead')
    enabled: tuple[str, ...] = option(
        'listener.commandsEnabled', commands_enabled({}), commands_enabled,
        'what any key may use; those not named keep their default', shown={
            name: verb.enabled for name, verb in VERBS.items()})
    key_entries: tuple[Key, ...] = option(
        'listener.keys', (), key_entries, 'further keys: name, key or keyFile, commands, targets')
    trusted_proxies: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = option(
        'listener.trustedProxies', (), a_list(a_network),
        'addresses or networks of proxies whose X-Forwarded-For says who asks')
    page: bool = option(
        'listener.page', True, a_bool, 'show browsers a page')
    startup_enabled: bool = option(
        'startup.enabled', False, a_bool, 'start guests when the host has booted', restart=True)
    steps: tuple[Step, ...] = option(
        'startup.vmStartupCommands', (), steps,
        f'lines: {usage(STARTUP_FORMS)}', restart=True)
    shutdown_enabled: bool = option(
        'shutdown.enabled', False, a_bool, 'end guests in order when the host goes down',
        restart=True)
    shutdown_steps: tuple[Step, ...] = option(
        'shutdown.vmShutdownCommands', (), lambda value: steps(value, SHUTDOWN_FORMS),
        f'lines: {usage(SHUTDOWN_FORMS)}')
    shutdown_timeout: float = option(
        'shutdown.timeout', 300, a_number(1, 1500, 'seconds'),
        'how long all of that may take, in seconds; what is left is not waited for')

    notify_command: tuple[str, ...] = option(
        'notify.command', (), texts, 'run when something fails: a list, program and arguments')
    notify_kinds: tuple[str, ...] = option(
        'notify.kinds', NOTICES, a_list(one_of(*NOTICES)), 'of what it is told')

    path: str = ''                                      # the file it was read from
    keys: tuple[Key, ...] = ()                          # listener.key and listener.keys, read
    warnings: tuple[str, ...] = ()                      # what works but should not stay so

    def excludes(self, own: str, full: str) -> bool:
        """Tell whether the monitor shall leave a guest alone."""
        return matches_any(self.exclude, own, full)

    def libvirts(self) -> tuple[HostEntry, ...]:
        return self.hosts or (HostEntry('', self.libvirt_uri),)


class Settings:
    """The configuration that counts now; a reload replaces it whole."""

    def __init__(self, config: Config) -> None:
        self.config = config


OPTIONS: dict[str, tuple[str, Option]] = {      # key in the file -> (attribute of Config, row)
    field.metadata['option'].key: (field.name, field.metadata['option'])
    for field in dataclasses.fields(Config) if 'option' in field.metadata}

ROLES = ('monitor', 'startup', 'listen', 'shutdown')

FRESH_KEY = 'put in what "openssl rand -hex 32" prints'
# Keys that stand in documentation, here or elsewhere: whoever left one in has no key at all.
SAMPLE_KEYS = frozenset(('CHANGE-ME', 'YOURPSK', 'CHANGEME', 'YOURKEY', 'YOUR-KEY', 'PSK',
                         'PSK GOES HERE', 'SECRET', 'KEY', 'PASSWORD'))


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a parsed file; objects are entered unless they are values."""
    for key, value in tree.items():
        if isinstance(value, dict) and f'{prefix}{key}' not in OPTIONS:
            yield from _flatten(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


def unknown(key: str, known: Iterable[str], remedy: str = 'remove it') -> str:
    """Say that a key is unknown, and which one may have been meant."""
    import difflib
    names = [*known]
    leaf = {name.rpartition('.')[2].lower(): name for name in names}
    near = difflib.get_close_matches(key, names, 1) or [
        leaf[name] for name in difflib.get_close_matches(key.rpartition('.')[2].lower(), leaf, 1)]
    return 'unknown; ' + (f'did you mean {near[0]}?' if near else remedy)


NOT_READABLE = 'this user may not read it; run this as root'


def read_file(path: str, remedy: str) -> str:
    """Return the text of a file that a person wrote; ConfigError, with a remedy if it is absent."""
    try:
        return Path(path).read_text('utf-8')
    except FileNotFoundError:
        raise ConfigError(path, [f'no such file; {remedy}']) from None
    except PermissionError:
        raise ConfigError(path, [NOT_READABLE]) from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(path, [f'can\'t be read: {explain(problem)}']) from None


def parse(text: str, path: str) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a configuration by attribute, and what is wrong with the others."""
    try:
        tree = parse_json(text, unique=True)
        if not isinstance(tree, dict):
            raise ValueError('must be an object: {"monitor": {...}, ...}')
    except ValueError as reason:        # json.JSONDecodeError says line and column
        return {}, [f'not JSON: {reason}']
    values: dict[str, Any] = {'path': path}
    problems: list[str] = []
    for key, value in _flatten(tree):
        if key not in OPTIONS:
            inside = any(name.startswith(key + '.') for name in OPTIONS)
            problems.append(f'{key}: ' + ('must be an object' if inside else
                                          unknown(key, OPTIONS)))
            continue
        attribute, row = OPTIONS[key]
        try:
            values[attribute] = row.read(value)
        except InvalidValue as problem:
            problems.append(f'{key}: {problem}')
    if values.get('hosts') and 'libvirt_uri' in values:
        problems.append('libvirt.uri: there are hosts, too; name it there, such as "here": '
                        f'"{values["libvirt_uri"]}", and remove it here')
    return values, problems


def load(path: str, roles: Sequence[str] = ()) -> Config:
    """Read the configuration file `path` for `roles` (none: those that it enables).

    Raises ConfigError with every problem found, each with its key and what to do.
    """
    values, problems = parse(read_file(path, 'copy config.json.sample there and edit it, or name '
                                       'another with --config'), path)
    config = Config(**values)
    warnings: list[str] = []
    listens = values and 'listen' in (roles or enabled_roles(config))
    if listens:
        keys = _read_keys(config, problems, warnings)
        config = dataclasses.replace(config, keys=tuple(keys))
        _check_certificate(config, problems, warnings)
    warnings += _exposed(path, 'a key' if listens and any(_keys_inside(config)) else '')
    if problems:
        raise ConfigError(path, problems)
    return dataclasses.replace(config, warnings=tuple(warnings))


def enabled_roles(config: Config) -> list[str]:
    enabled = (config.monitor_enabled, config.startup_enabled, config.listener_enabled,
               config.shutdown_enabled)
    return [role for role, on in zip(ROLES, enabled) if on]


SELF_SIGNED = 'install.sh makes cert.pem and key.pem beside config.json, self-signed'
STALE_COPY = 'systemd\'s copies are renewed by: systemctl restart vmmonitor'


def beside(config: Config, name: str) -> str:
    """Return a path of the configuration, relative ones counted from its own directory.

    For a file that this user may not read, such as a private key that is root's alone, it is the
    copy that systemd hands over, if there is one (LoadCredential, systemd.exec(5)).
    """
    path = os.path.join(os.path.dirname(os.path.abspath(config.path)), name)
    copies = os.environ.get('CREDENTIALS_DIRECTORY')
    if not copies or os.access(path, os.R_OK):
        return path
    copy = os.path.join(copies, os.path.basename(path))
    return copy if os.access(copy, os.R_OK) else path


def notifier(config: Config) -> list[str]:
    """Return notify.command; a program with a "/" in it is a path, counted as all others."""
    program, *arguments = config.notify_command or ('',)
    return [beside(config, program) if '/' in program else program, *arguments]


def handed_over(config: Config) -> list[str]:
    """Return the files of the certificate that are systemd's copies, made when we started."""
    names = filter(None, [config.certificate, config.certificate_key])
    copies = os.environ.get('CREDENTIALS_DIRECTORY')
    return [name for name in names if os.path.dirname(beside(config, name)) == copies]


def _exposed(path: str, secret: str) -> list[str]:
    """Return warnings if everybody may write to a file, or read the secret in it, if any."""
    with contextlib.suppress(OSError):          # that it can't be read is said elsewhere
        mode, name = os.stat(path).st_mode, shlex.quote(path)
        return [f'everybody may write to {path}; chmod o-w {name}'] * bool(mode & 0o002) + [
                f'{path} holds {secret} and everybody may read it; chmod o-r {name}'
                ] * bool(mode & 0o004 and secret)
    return []


def _keys_inside(config: Config) -> Iterator[str]:
    yield from filter(None, [config.key, config.certificate_password,
                             *(entry.key for entry in config.key_entries)])


def _read_keys(config: Config, problems: list[str], warnings: list[str]) -> list[Key]:
    """Return the keys of the listener, their files read; add what is wrong with them."""
    entries = [(f'listener.keys[{number}]', key) for number, key in enumerate(config.key_entries)]
    if config.key and config.key_file:
        problems.append('listener.keyFile: there is a listener.key too; remove one of them')
    elif config.key or config.key_file:
        entries.insert(0, ('listener', Key('main', config.key, config.key_file)))
    elif not entries and not any(said.startswith('listener.key') for said in problems):
        problems.append(f'listener.key: missing; {FRESH_KEY}')
    keys: list[Key] = []
    for place, entry in entries:
        try:
            path = beside(config, entry.key_file)
            secret = entry.key or _secret_file(path)
            warnings += [] if entry.key else _exposed(path, 'a key')
        except (InvalidValue, ConfigError) as problem:
            problems.append(f'{place}.keyFile: {problem}')
            continue
        if secret.upper() in SAMPLE_KEYS:
            problems.append(f'{place}.key: still the sample\'s; {FRESH_KEY}')
        elif len(secret) < KEY_MINIMUM:
            warnings.append(f'{place}.key is shorter than {KEY_MINIMUM} characters and can be '
                            f'guessed; {FRESH_KEY}')
        keys.append(dataclasses.replace(entry, digest=hashlib.sha256(secret.encode()).digest(),
                                        guessable=len(secret) < KEY_MINIMUM))
    if len({key.digest for key in keys}) < len(keys):
        problems.append('listener.keys: two entries have the same key; give each its own')
    return keys


def _secret_file(path: str) -> str:
    """Return the key that the file `path` holds, without the line end."""
    secret = read_file(path, f'make it, and {FRESH_KEY}').removeprefix(BOM).strip()
    if not secret or CONTROLS.search(secret) or len(secret) > TEXT_LENGTH:
        raise InvalidValue(f'{path} must hold one line, the key')
    return secret


def _check_certificate(config: Config, problems: list[str], warnings: list[str]) -> None:
    if any(said.startswith('listener.certificate') for said in problems):
        return                                  # it is not known what is meant
    if not config.certificate:
        problems.append('listener.certificate.path: missing; say "cert.pem", and "key.pem" as '
                        f'keyPath; {SELF_SIGNED}')
        return
    try:
        tls_context(config)
    except InvalidValue as problem:
        problems.append(f'listener.certificate: {problem}')
        return
    warnings += _exposed(beside(config, config.certificate_key or config.certificate),
                         'the private key')


def tls_context(config: Config) -> ssl.SSLContext:
    """Return the server's TLS settings, with its certificate; InvalidValue says what is wrong."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers('ECDHE+AESGCM:ECDHE+CHACHA20')      # of TLS 1.2; 1.3 has only good ones
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    names = [config.certificate, config.certificate_key or config.certificate]
    paths = [beside(config, name) for name in names]
    for path in paths:
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            why = NOT_READABLE if os.path.isfile(path) else \
                'is no file' if os.path.exists(path) else \
                f'no such file; put it there, or: {SELF_SIGNED}'
            raise InvalidValue(f'{path}: {why}')
    try:
        # A function as password: without one, OpenSSL would ask at the terminal.
        context.load_cert_chain(paths[0], paths[1], lambda: config.certificate_password)
    except (ssl.SSLError, OSError, ValueError) as problem:
        stale = f' ({STALE_COPY})' if handed_over(config) else ''
        raise InvalidValue(f'{_pem_trouble(config, problem, *paths)}{stale}') from None
    return context


def _pem_trouble(config: Config, problem: Exception, certificate: str, key: str) -> str:
    """Return what is wrong with a certificate and its key: OpenSSL says "PEM lib" of nearly all."""
    chain, secret = Path(certificate).read_bytes(), Path(key).read_bytes()
    if b'-BEGIN CERTIFICATE-' not in chain:
        return f'{certificate}: no certificate in PEM is in it (of DER, openssl x509 makes PEM)'
    if b'PRIVATE KEY-' not in secret:
        return f'{key}: no private key in PEM is in it; say in certificate.keyPath where it is'
    if re.search('MISMATCH|NO_CERTIFICATE_ASSIGNED', str(problem)):
        return f'{key}: is not the key of the certificate {certificate}'
    if b'ENCRYPTED' in secret:
        return f'{key}: certificate.password ' + (
            'does not open it' if config.certificate_password else 'is missing, to open it')
    return f'{certificate} with {key}: damaged: {explain(problem)}'


# === guest ======================================================================================

AGENT_TIMEOUT = 5              # seconds, whole: libvirt waits at least 5 s for guest-sync
AGENT_SET_TIMEOUT = 10         # guest-set-time runs hwclock, which can wait for the next second
ANSWER_TIMEOUT = 22.0          # for find, list and status: libvirt's keepalive has ended by then
ASK_TIMEOUT = 60.0             # for what is asked of all guests at once; each call has its own
PICTURE_BYTES = 1 << 26        # of the largest screen, 5K: a guest chooses its size, and several
#                                times that must fit into the service's MemoryMax
AGENT_SILENT = 2.0             # an agent that took this long and failed is hung, not absent
MOMENT = 0.3                   # after it was made to run, until a guest counts as running ...
TROUBLED_MOMENT = 2.0          # ... one that had stopped itself: its disk may be full still
CONNECT_TIMEOUT = 2.0          # for a connection to a port of a guest ...
ADDRESSES_MAX = 20             # ... at one of so many addresses that its agent tells
AWAKE_TIMEOUT = 10.0           # until a guest that sleeps is awake
GUEST_FILE_BYTES = 48 * 1024   # in one call: an agent takes some MiB, but in memory
GUEST_FILE_LIMIT = 1 << 26     # bytes of a whole file: a guest may never come to its end

# What is read of a guest agent's answers (qga/qapi-schema.json).
SCHEMAS.update({
    'guest-exec': {'pid': int},
    'guest-exec-status': {'exited': bool, 'exitcode?': int, 'signal?': int, 'out-data?': DATA,
                          'err-data?': DATA, 'out-truncated?': bool, 'err-truncated?': bool},
    'guest-file-open': int,
    'guest-file-read': {'buf-b64': DATA, 'eof': bool},
    'guest-file-write': {'count': int},
    'guest-fsfreeze-status': str,
    'guest-get-memory-blocks': [{'phys-index': int, 'online': bool}],
    'guest-get-time': int,
    'guest-network-get-interfaces': Rows([{'name': str, 'ip-addresses?': Rows([
        {'ip-address': str}])}])})


class State(enum.Enum):
    """What a guest is doing; the value is the word that people read."""

    RUNNING = 'running'
    PAUSED = 'paused'
    ASLEEP = 'asleep'           # the guest's own suspend to RAM (S3)
    SAVED = 'saved'             # off, with a saved state that the next start restores
    OFF = 'off'
    STOPPING = 'stopping'
    CRASHED = 'crashed'


IO_ERROR, WATCHDOG, PANICKED, FAILED = 'I/O error', 'watchdog', 'the guest panicked', 'QEMU failed'
# Why a guest does not run although nobody wanted that -> what to do about it
TROUBLES = {
    IO_ERROR: "is the host's disk full?",
    WATCHDOG: 'the guest hung: see its console, then reset it',
    PANICKED: 'see its console; cut its power before you start it again',
    FAILED: "see QEMU's log"}


class Status(NamedTuple):
    """What a guest is doing, and why, where that is known: booted, restored, one of TROUBLES."""

    state: State
    reason: str = ''

    def __str__(self) -> str:
        told = self.reason and self.state is not State.RUNNING
        return f'{self.state.value} ({self.reason})' if told else self.state.value


class AgentTrouble(NamedTuple):
    """A row of the table of what can be wrong with a guest agent."""

    name: str
    pattern: str                # found in the text of the answer
    says: str                   # for people
    hint: str                   # what to do, whatever kind of guest it is; see Guest.remedies()
    transient: bool             # trying again may help


# The first row whose pattern is found counts; an agent's texts differ between its versions.
AGENT_TROUBLES = (
    AgentTrouble(
        'too long', r'line longer|was cut|response found in \d+ bytes|encode message payload',
        'it printed more than an answer of its agent can hold: {text}',
        "have it write into a file: exec(['sh', '-c', '… > /tmp/out']), then read_file() that",
        False),
    AgentTrouble('no end', r'did not end within', '{text}',
                 'it goes on in the guest; give it more time', False),
    AgentTrouble(
        'no channel', r'not configured', 'no guest agent channel',
        'give it one, and install qemu-guest-agent in the guest', False),
    AgentTrouble(
        'not connected', r'not connected|disappeared|End of file',
        'the guest agent is not connected',
        'install qemu-guest-agent in the guest and start it', True),
    AgentTrouble(
        'busy', r'state change lock', 'the guest agent is busy with another call: {text}',
        'see which program it is', True),
    AgentTrouble(
        'frozen', r'frozen', 'its file systems are frozen',
        'thaw them: a backup goes on, or forgot to send guest-fsfreeze-thaw to the agent', True),
    AgentTrouble(
        'not permitted', r'Operation not permitted', 'the guest agent lacks the right: {text}',
        'see "ausearch -m avc -c qemu-ga" in the guest; where SELinux is the cause, "semanage '
        'permissive -a virt_qemu_ga_t" lets it', False),
    AgentTrouble(
        'no hwclock', r'not currently supported|hwclock',
        'the guest agent can\'t set the time: {text}',
        'install hwclock in the guest: util-linux-extra on Debian 12 and later, util-linux '
        'elsewhere; on BSD, which has none, only monitor.allowExec helps', False),
    AgentTrouble(
        'no w32time', r'w32tm|Windows Time', 'the guest can\'t fetch the time: {text}',
        'start the Windows Time service in the guest', False),
    AgentTrouble(
        'silent', r'not responding|not available|timed? ?out|did not answer|unsynced|wrong id',
        'the guest agent does not answer', 'restart qemu-guest-agent in the guest', True),
    AgentTrouble(
        'blocked', r'disabled|not allowed|has not been found|CommandNotFound',
        'the guest agent refuses the command: {text}',
        'allow it in /etc/default/qemu-guest-agent, /etc/sysconfig/qemu-ga or '
        '/etc/qemu/qemu-ga.conf in the guest, or update the agent', False),
    AgentTrouble('refused', r'', 'the guest agent answered: {text}', '', False))


class AgentError(GuestError):
    """The guest agent did not do what was asked; `trouble` is a row of AGENT_TROUBLES."""

    def __init__(self, guest: str, trouble: AgentTrouble, text: str) -> None:
        super().__init__(f'{guest}: {trouble.says.format(text=text)}', trouble.hint)
        self.trouble = trouble


def agent_error(guest: str, text: str) -> AgentError:
    """Return the error that stands for an agent's, or libvirt's, text."""
    text = clip(text)
    row = next(row for row in AGENT_TROUBLES if re.search(row.pattern, text, re.IGNORECASE))
    return AgentError(guest, row, text)


def agent_answer(guest: str, command: str, reply: Any) -> Any:
    """Return what an agent's reply to a command returns; AgentError unless it is well formed."""
    try:
        return answer_of(command, reply)
    except ValueError as problem:
        raise agent_error(guest, f'no answer: {problem}') from None


# What an agent command is given. A time has to be looked at as late as can be: a call may wait
# for a free connection. Hence a function may stand in for the arguments.
Arguments = Union[Mapping[str, Any], Callable[[], Mapping[str, Any]], None]


class ExecResult(NamedTuple):
    """The end of a program that ran in a guest."""

    status: int                 # exit status, or 128 + signal
    out: bytes
    err: bytes


def png(picture: bytes, guest: str) -> bytes:
    """Return the PNG of a PPM picture (P6 with 8 bits); a PNG as it is."""
    if re.match(rb'\x89PNG\r\n\x1a\n.{4}IHDR.{8}', picture[:40], re.DOTALL):
        return picture
    header = re.match(rb'P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s', picture)
    width, height = map(int, header.groups()) if header else (0, 0)
    rows = memoryview(picture)[header.end():] if header else memoryview(b'')
    if not rows or len(rows) != width * height * 3:
        raise GuestError(f'{guest}: QEMU made no picture: {picture[:40]!r}')

    def chunk(kind: bytes, *data: bytes) -> list[bytes]:
        checksum = functools.reduce(lambda crc, part: zlib.crc32(part, crc), (kind, *data), 0)
        return [struct.pack('>I', sum(map(len, data))), kind, *data, struct.pack('>I', checksum)]
    packer, packed = zlib.compressobj(6), list[bytes]()     # line by line: it may be large
    for place in range(0, len(rows), width * 3):
        packed += [packer.compress(b'\0'), packer.compress(rows[place:place + width * 3])]
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b''.join([b'\x89PNG\r\n\x1a\n', *chunk(b'IHDR', head),
                     *chunk(b'IDAT', *packed, packer.flush()), *chunk(b'IEND')])


class Guest:
    """A machine, wherever it lives: the few calls that monitor, startup and listener know.

    All of them raise GuestError or LibvirtError, and return only when the thing is done.
    """

    name: str                   # HOST/NAME where there are several hosts
    prefix = ''                 # ... the HOST/ in it
    label = LIBVIRT_LABEL       # HOST where there is one
    id: str                     # stays the same when the guest is renamed
    damage = ''                 # why it can only be stopped and removed, if that is so

    @property
    def own(self) -> str:
        """Its name on its host."""
        return self.name[len(self.prefix):]

    @property
    def full_name(self) -> str:
        """HOST/NAME, also where there is one host."""
        return f'{self.prefix or self.label + "/"}{self.own}'

    @property
    def whole_id(self) -> str:
        """Its id for all programs of this host, whatever their configurations call its host."""
        return self.id

    def status(self) -> Status:
        """Return what the guest is doing, and why."""
        raise NotImplementedError

    def state(self) -> State:
        """Return what the guest is doing."""
        return self.status().state

    def is_off(self) -> bool:
        """Tell whether it is off, saved or not; one that was never defined is gone then."""
        with contextlib.suppress(NoGuest):
            return self.state() in (State.OFF, State.SAVED)
        return True

    def start(self) -> str:
        """Make it run, from whatever state; return what was done, in words."""
        raise NotImplementedError

    def _settled(self, says: str, before: Status) -> str:
        """Return what was done if the guest still runs a moment later; WrongState says why it
        does not: a full disk stops it again with its next write."""
        moment = Deadline(TROUBLED_MOMENT if before.reason in TROUBLES else MOMENT)
        while not moment.passed():
            now = self.status()
            if now.state is not State.RUNNING:
                raise WrongState(f'{self.name}: {now.state.value} again'
                                 f'{now.reason and ": " + now.reason}',
                                 TROUBLES.get(now.reason, 'see its console and its log'))
            time.sleep(STATE_POLL)
        return says

    def shut_down(self) -> str:
        """Ask it to shut down, by its agent if that answers, else by the ACPI power button; return
        what was done, in words."""
        state = self.state()
        if state in (State.OFF, State.SAVED):
            return 'already off'
        if state is State.STOPPING:
            return 'already shutting down'
        if state is not State.RUNNING:
            raise WrongState(f'{self.name} is {state.value} and can\'t shut down', 'start it first')
        if not self._shut_down_by_agent():
            self.power_button()
        return 'asked to shut down'

    def _shut_down_by_agent(self, mode: str = 'powerdown') -> bool:
        """Tell whether the agent took guest-shutdown, which has no answer when it works."""
        if self.agent_state() != 'connected' or not self.agent_answers():
            return False
        try:
            self.agent('guest-shutdown', {'mode': mode})
        except AgentError as problem:
            return problem.trouble.name in ('silent', 'not connected')
        except WrongState:
            pass                                        # off already
        return True

    # verb -> (the states that it is for, the one that makes it superfluous, what was done)
    CHANGES: Mapping[str, tuple[tuple[State, ...], State | None, str]] = {
        'pause': ((State.RUNNING,), State.PAUSED, 'paused'),
        'resume': ((State.PAUSED,), State.RUNNING, 'resumed'),
        'reset': ((State.RUNNING, State.PAUSED, State.CRASHED), None, 'reset'),
        'reboot': ((State.RUNNING,), None, 'asked to reboot')}

    def change(self, verb: str) -> str:
        """Pause, resume, reset or reboot it (a row of CHANGES); return what was done, in words."""
        states, there, says = self.CHANGES[verb]
        before = self.status()
        if before.state is there:
            return f'already {there.value}'
        if before.state not in states:
            raise WrongState(f'{self.name} is {before}: it can\'t {verb}', 'use start')
        says = self._change(verb) or says
        if verb == 'reset' and before.state is not State.RUNNING:
            if before.reason not in TROUBLES:
                return f'{says}, and still {before.state.value}'
            self._change('resume')                      # that alone makes it boot
        return self._settled(says, before) if before.state is not State.RUNNING else says

    def _change(self, verb: str) -> str | None:
        raise NotImplementedError

    def picture(self) -> bytes:
        """Return a PNG of what its screen shows."""
        raise NotImplementedError

    def _await_waking(self, whole: bool = False) -> None:
        """Wait until it is awake, with `whole` until its agent is, too, if it has one: who is saved
        in the middle of waking up may hang when it is restored."""
        deadline = Deadline(AWAKE_TIMEOUT)
        deadline.poll(lambda: self.state() is not State.ASLEEP)
        if whole and self.agent_state() not in ('absent', 'silent'):
            deadline.poll(self.agent_answers)

    def power_button(self) -> None:
        """Press the ACPI power button."""
        raise NotImplementedError

    def power_off(self) -> str:
        """End it at once, as if its power was cut."""
        raise NotImplementedError

    def save(self) -> str:
        """Save its memory to disk and end it, so that start() goes on from there.

        One that sleeps is woken first: not every QEMU can wake one that was saved asleep.
        """
        raise NotImplementedError

    def discard(self) -> bool:
        """Forget the saved state, so that it boots anew; tell whether there was one."""
        raise NotImplementedError

    def wake(self) -> str:
        """Make it run, but only from saved, paused, asleep or off."""
        state = self.state()
        if state in (State.STOPPING, State.CRASHED):
            raise WrongState(f'{self.name} is {state.value}', 'use start')
        return self.start()

    def agent(self, command: str, arguments: Arguments = None,
              timeout: int = AGENT_TIMEOUT) -> Any:
        """Return what the guest agent answers to `command`; AgentError if it does not."""
        raise NotImplementedError

    def agent_error(self, text: str) -> AgentError:
        """Return the error that stands for an agent's text, with the remedy for this guest."""
        error = agent_error(self.name, text)
        error.hint = self.remedies().get(error.trouble.name, error.hint)
        return error

    def _raise_if_frozen(self, command: str, problem: AgentError) -> None:
        """Raise the right error of an old agent, which calls a command disabled when the guest's
        file systems are frozen."""
        answer = None
        if problem.trouble.name == 'blocked' and command != 'guest-fsfreeze-status':
            with contextlib.suppress(GuestError):
                answer = self.agent('guest-fsfreeze-status')
        if answer == 'frozen':
            raise self.agent_error('the agent is in frozen state') from None

    def remedies(self) -> Mapping[str, str]:
        """Return what to do for this kind of guest, by the name in AGENT_TROUBLES."""
        return {}

    def agent_state(self) -> str:
        """Return what is known of the guest agent without asking it, in a word."""
        raise NotImplementedError

    def check_step(self, offset: int) -> None:
        """Raise OutOfStep if this may not be its host's time; `offset` is how far it is off, ns."""

    def agent_answers(self) -> bool:
        """Tell whether the guest agent answers."""
        with contextlib.suppress(GuestError):
            if self.agent_state() != 'disconnected':    # else libvirtd would log an error
                self.agent('guest-ping')
                return True
        return False

    def addresses(self) -> list[str]:
        """Return its IP addresses that can be reached from elsewhere: those that its agent knows
        (guest-network-get-interfaces), or without an agent those of its name in the resolver."""
        try:
            found = [address['ip-address'] for card in self.agent('guest-network-get-interfaces')
                     for address in card.get('ip-addresses', [])]
        except AgentError:
            found = []
            with contextlib.suppress(OSError, UnicodeError):
                found = [str(row[4][0]) for row in socket.getaddrinfo(
                    self.own, None, type=socket.SOCK_STREAM)]
        return [text for text in found if is_elsewhere(text)][:ADDRESSES_MAX]

    def serves(self, port: int) -> bool:
        """Tell whether it takes connections on a TCP port."""
        for address in self.addresses():
            with contextlib.suppress(OSError), \
                    socket.create_connection((address, port), CONNECT_TIMEOUT) as connection:
                # Guests may have addresses that this host has itself, as Docker's 172.17.0.1.
                if connection.getsockname()[0] != connection.getpeername()[0]:
                    return True
        return False

    def remembered(self) -> tuple[Status, str] | None:
        """Return status() and agent_state() if they are known without asking anybody."""
        return None

    def seen(self) -> tuple[Status, str]:
        """Return status() and agent_state(); those that are remembered, if they are."""
        return self.remembered() or self._look()

    def _look(self) -> tuple[Status, str]:
        return self.status(), self.agent_state()

    def get_time(self) -> int:
        """Return the guest's clock, in nanoseconds since 1970 (guest-get-time)."""
        return int(self.agent('guest-get-time'))

    def set_time(self, when: Callable[[], int] | int | None) -> None:
        """Set the guest's clock: to nanoseconds since 1970, or to what a function says when the
        call goes out, or with None from its hardware clock (guest-set-time)."""
        self.agent('guest-set-time', {} if when is None else lambda: {
            'time': when() if callable(when) else when}, AGENT_SET_TIMEOUT)

    def exec(self, argv: Sequence[str], stdin: bytes | str = b'', timeout: float = 30.0
             ) -> ExecResult:
        """Run a program in the guest and return its end (guest-exec).

        Raises AgentError when it can't be started, prints more than some MiB, or does not end in
        time: it then goes on, as it does for a child in the background that keeps its output open.
        """
        if not isinstance(argv, (list, tuple)) or not argv \
                or not all(isinstance(word, str) for word in argv):
            raise GuestError(f'{self.name}: exec({argv!r:.80})',
                             "give a list of strings: ['ls', '-l']")
        more = {'input-data': base64.b64encode(self._raw(stdin)).decode()} if stdin else {}
        started = self.agent('guest-exec', {
            'path': argv[0], 'arg': list(argv[1:]), 'capture-output': True, **more})
        status: dict[str, Any] = {}

        def ended() -> bool:
            status.update(self.agent('guest-exec-status', {'pid': started['pid']}))
            return bool(status['exited'])
        if not Deadline(timeout).poll(ended, STATE_POLL / 4):
            raise self.agent_error(f'{argv[0]} did not end within {timeout:g} s')
        if status.get('out-truncated') or status.get('err-truncated'):
            raise self.agent_error(f'the output was cut, of {argv[0]}')
        code = status['exitcode'] if 'exitcode' in status else 128 + status.get('signal', 0)
        return ExecResult(code, *(self._decoded(status.get(key, ''))
                                  for key in ('out-data', 'err-data')))

    def _raw(self, data: bytes | str) -> bytes:
        try:
            return raw_bytes(data)
        except (TypeError, ValueError):
            raise GuestError(f'{self.name}: {data!r:.80} is no data', 'give bytes or str') from None

    def _decoded(self, text: str) -> bytes:
        try:
            return base64.b64decode(text)
        except ValueError:
            raise self.agent_error(f'no base64: {text!r:.80}') from None

    @contextlib.contextmanager
    def _guest_file(self, path: str, mode: str) -> Iterator[int]:
        handle = self.agent('guest-file-open', {'path': path, 'mode': mode})
        try:
            yield handle
        finally:
            self.agent('guest-file-close', {'handle': handle})

    def read_file(self, path: str, limit: int = GUEST_FILE_LIMIT) -> bytes:
        """Return what is in a file of the guest (guest-file-read).

        Raises GuestError when it has more than `limit` bytes.
        """
        data = bytearray()
        with self._guest_file(path, 'rb') as handle:
            while True:
                part = self.agent('guest-file-read', {'handle': handle, 'count': GUEST_FILE_BYTES})
                data += self._decoded(part['buf-b64'])
                if len(data) > limit:
                    raise GuestError(f'{self.name}: {path} has more than {limit} bytes',
                                     'say a larger limit=')
                if part['eof']:
                    return bytes(data)
                if not part['buf-b64']:
                    raise self.agent_error('read 0 bytes')

    def write_file(self, path: str, data: bytes | str) -> None:
        """Write a file in the guest (guest-file-write)."""
        left = self._raw(data)
        with self._guest_file(path, 'wb') as handle:
            while left:
                part = base64.b64encode(left[:GUEST_FILE_BYTES]).decode()
                done = self.agent('guest-file-write', {'handle': handle, 'buf-b64': part})
                if done['count'] <= 0:
                    raise self.agent_error(f'wrote {done["count"]} bytes')
                left = left[done['count']:]


# What lists, requests and the command line wait for -> whether it is so
GUEST_ENDS: dict[str, Callable[[Guest], bool]] = {
    'agent': lambda guest: guest.agent_answers(),
    'running': lambda guest: guest.state() is State.RUNNING,
    'off': lambda guest: guest.is_off()}


def within(deadline: Deadline, who: str, ask: Callable[..., Result], *args: Any) -> Result:
    """Return what `ask` returns; HostAway if it has not returned at the deadline: libvirt's calls
    have none of their own, and one that hangs must hold up a thread, not who asked."""
    return outcome(deadline, who, in_thread(who, ask, *args))


def outcome(deadline: Deadline, who: str, under_way: concurrent.futures.Future[Result]) -> Result:
    """Return what something that goes on returns; HostAway if it goes on at the deadline."""
    if not ended(under_way, deadline):
        raise HostAway(f'{who} does not answer', hint='try again in a moment')
    return under_way.result()


def is_elsewhere(text: str) -> bool:
    """Tell whether what an agent calls an address is one, and none of this host's own loopback."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:                          # such as a name, which would be resolved
        return False
    address = getattr(address, 'ipv4_mapped', None) or address
    return not (address.is_loopback or address.is_unspecified or address.is_multicast
                or address.version == 6 and address.is_link_local)


def reached(who: str, probe: Callable[[], bool], deadline: Deadline) -> bool:
    """Wait until `probe` is true (True) or time is up (False), even while it hangs or fails, such
    as in a moment without libvirt; with no time at all, what is so already counts."""
    def ask() -> bool:
        with contextlib.suppress(Error, OSError):
            return probe()
        return False
    asked = in_thread(f'wait {who}', deadline.poll, ask)
    try:
        return ended(asked, Deadline(max(deadline.left(), MOMENT))) and asked.result()
    except Error:                       # there is no thread for it
        return deadline.poll(ask)


def ask_all(guests: Sequence[Guest], ask: Callable[[Guest], dict[str, Any]],
            timeout: float = ASK_TIMEOUT) -> list[dict[str, Any]]:
    """Ask all guests at once, so that a silent one delays no other; return the answers, each with
    the guest's name and maybe the `problem`, an Error, that came instead."""
    deadline, answers = Deadline(timeout), []
    for name, future in [(guest.name, in_thread(guest.name, ask, guest)) for guest in guests]:
        try:
            answer = outcome(deadline, name, future)
            answers.append({'name': name, **answer})
        except (Error, OSError) as problem:
            answers.append({'name': name, 'problem': as_error(problem)})
    return answers


class GuestEvent(NamedTuple):
    """Something happened to a guest.

    `kind` is booted, started, resumed, restored, reverted, migrated, woken, "agent connected",
    found or off (what it was when the host was reached), stopped, stuck (its status says why, or
    that it is gone), or what else had all guests looked at, in words.
    """

    guest: Guest
    kind: str
    when: float                 # time.monotonic() at which it became known
    reason: str = ''            # why it is off, if its status does not tell


class GuestHost(Protocol):
    """A place where guests live: a libvirt, or this program's own machines."""

    name: str                   # for people
    label: str                  # the HOST of HOST/NAME
    prefix: str                 # what its guests' names begin with, "HOST/" if there are several
    here: bool                  # on this machine
    up: threading.Event         # whether it can be asked
    links: int                  # how often that began
    problem: Error | None       # why it can't

    def find(self, name: str) -> Guest | None:
        """Return the guest of that name, or None."""

    def all(self, running: bool = False) -> list[Guest]:
        """Return all guests, or those that run, by name."""

    def known(self) -> Mapping[str, Guest] | None:
        """Return all guests by name, if that needs asking nobody."""

    def watch(self, receive: Callable[[GuestEvent], None],
              changed: Callable[[], object] = lambda: None) -> None:
        """Give every event to `receive`, which only enqueues, for ever; call `changed` when `up`
        has changed."""

    def stop(self) -> None:
        """Stop watching."""


# === clock ======================================================================================

SAMPLES = 3                    # readings per measurement; the one with the shortest call counts
SURE_WITHIN = 1.0              # ... of as many as fit into this, while it is too long to be sure
SHORT_TRIP = 12 * MS           # a way to the agent and back by which one setting is exact; it is
SHORT_WITHIN = 0.5             # ... awaited so long: the first ones after a restore take 100 ms
USUAL_GRAIN = 16 * MS          # Windows' clock shows up to this much less than it is ...
GRAIN_WITHIN = 1.1             # ... and others up to a second: how long a tick is awaited
GRAIN_READINGS = 64            # ... and by how many readings at most
ROUNDS = 6                     # settings in a row, each made better by what the others missed by
CLOCK_RETRIES = 4              # such rows, with pauses between them, when the host is overloaded
RETRY_FIRST = 0.02             # pause after the first try that the agent did not answer;
RETRY_FACTOR = 1.4             # tens of ms apart at first, because after a restore the agent
RETRY_LAST = 5.0               # comes back within 150 ms; later its connecting is an event
LEAD_MAX = 10 * MS             # what a guest's agent may need to set a clock, beyond the way to it
TURN_TIMEOUT = 15.0            # for another program that is at the same clock
HOST_CLOCK_JUMP = 0.01         # NTP slews the boot clock with the real one: this is a step
AWAY_PAUSE = 0.5               # before guests that could not be asked are asked once more
UNTOLD_PAUSE = 60.0            # after monitor.agentWait, before an agent is tried again that hangs;
UNSET_PAUSE = 600.0            # ... before a clock is set again that was not to be put right


class Reading(NamedTuple):
    """One look at a guest's clock."""

    value: int                  # what it showed, ns since 1970
    asked: int                  # what the host's showed when the call began
    delay: int                  # ns that the call took

    @property
    def offset(self) -> int:
        """Guest minus host, ns: sure to half the delay."""
        return self.value - self.asked - self.delay // 2


class Measurement(NamedTuple):
    """What a few readings tell."""

    offset: int                 # guest minus host, ns
    delay: int                  # of the shortest call
    blur: int = 0               # ns of the offset that a coarse tick hides; 0: a fine clock


@dataclasses.dataclass
class Correction:
    """What became of one clock job."""

    guest: str
    cause: str = 'sync'         # the kind of the event that asked for it
    before: int = 0             # offset when the job first saw the clock, ns
    after: int = 0              # offset left, ns
    method: str = ''            # what set the clock; '' when it was right already
    right: float = 0.0          # seconds from the trigger to the setting
    proved: float = 0.0         # ... and to the reading that proved it
    when: float = 0.0           # time.time() of the proof
    warning: str = ''           # an error that came although the clock is right
    began: float = dataclasses.field(default_factory=time.monotonic)    # of the trigger
    seen: bool = False          # whether `before` is known
    late: bool = False          # a setting had no answer, and may yet come, with an old time
    lead: int = 0               # ns that the first setting takes beyond half the way ...
    missed: int = 0             # ... and what it missed by

    # Causes that prove that the clock is behind, unless it was for less than the tolerance.
    BEHIND = frozenset(('resumed', 'restored', 'reverted'))

    def __str__(self) -> str:
        if not self.method:
            return f'{self.guest}: clock is right, cause={self.cause} offset={span(self.before)}'
        return (f'{self.guest}: clock corrected, cause={self.cause} before={span(self.before)} '
                f'after={span(self.after)} right_after={self.right * 1000:.0f}ms '
                f'proved_after={self.proved * 1000:.0f}ms by={self.method}')


def span(offset: int) -> str:
    """Return a signed offset for people, ns -> ms, or s where that reads better."""
    if abs(offset) < 10 * SECOND:
        return f'{offset / MS:+.1f}ms'
    return f'{offset / SECOND:+.3f}s'


def read_clock(guest: Guest) -> Reading:
    """Read the guest's clock once, between two looks at the host's."""
    asked, began = time.time_ns(), time.monotonic_ns()
    value = guest.get_time()
    return Reading(value, asked, time.monotonic_ns() - began)


def measure(guest: Guest, tolerance: int, behind: bool = False) -> Measurement:
    """Return what the best of a few readings tells.

    A clock that is clearly off is read only until the way to the guest is short, so that the one
    setting is exact: it shall not stay wrong for the sake of a better figure. Without a cause
    that proves it to be `behind` that takes two readings, by which a coarse clock is told.
    """
    readings = [read_clock(guest)]
    short, sure = Deadline(SHORT_WITHIN), Deadline(SURE_WITHIN)
    while True:
        best = min(readings, key=lambda reading: reading.delay)
        off = max(best.offset, -best.offset - USUAL_GRAIN) > tolerance + 2 * best.delay
        if off and (behind or len(readings) > 1):
            enough = best.delay <= SHORT_TRIP or short.passed()
        else:
            enough = len(readings) >= SAMPLES and (
                best.delay // 2 <= tolerance or sure.passed())
        if enough:
            return Measurement(best.offset, best.delay)
        readings.append(read_clock(guest))
        if readings[-1].value == readings[-2].value:
            return _measure_coarse(guest, readings)


def _measure_coarse(guest: Guest, readings: list[Reading]) -> Measurement:
    """Return what a clock tells that shows the same in two readings, by waiting for its tick.

    It shows up to a tick less than it is: each reading bounds the offset from below, and by a
    tick more from above.
    """
    began, limit = time.monotonic(), Deadline(GRAIN_WITHIN)
    while True:
        steps = [after.value - before.value for before, after in zip(readings, readings[1:])]
        grain = min((step for step in steps if step > 0), default=0)
        if grain or limit.passed() or len(readings) >= GRAIN_READINGS:
            break
        time.sleep((time.monotonic() - began) / 8)
        readings.append(read_clock(guest))
    best = min(readings, key=lambda reading: reading.delay)
    if not grain:
        return Measurement(best.offset, best.delay)             # it stands still
    low = max(reading.value - reading.asked - reading.delay for reading in readings)
    high = min(reading.value - reading.asked for reading in readings) + grain
    return Measurement((low + high) // 2, best.delay, abs(high - low) // 2)


def _set_by_date(guest: Guest, ahead: int) -> None:
    """Run `date` in the guest, timed for a whole second: not every date takes fractions."""
    second = (time.time_ns() + ahead) // SECOND + 1
    time.sleep(max(0, second * SECOND - ahead - time.time_ns()) / SECOND)
    done = guest.exec(['sh', '-c', f'date -u -s @{second} || date -u -f %s {second}'],  # Linux; BSD
                      timeout=AGENT_SET_TIMEOUT)
    if done.status:
        raise guest.agent_error(f'date did not set the time: {done!r:.80}')


class Method(NamedTuple):
    """A way to set a guest's clock."""

    name: str
    apply: Callable[[Guest, int], None]         # sets the host's time plus so many ns, which the
    #                                             call and its way will take
    rounds: int                 # tries, each made better by what the last one missed by
    grain: int = 0              # ns: how much it may leave, and so what it can't improve on
    executes: bool = False      # runs a program in the guest


METHODS = (                     # from the best to the last resort
    Method('guest-set-time', lambda guest, ahead: guest.set_time(lambda: time.time_ns() + ahead),
           ROUNDS),
    # The guest reads its hardware clock (Linux) or asks its time service (Windows).
    Method('hardware-clock', lambda guest, _ahead: guest.set_time(None), 1, grain=SECOND),
    Method('guest-exec-date', _set_by_date, ROUNDS, grain=20 * MS, executes=True))


def _apply(guest: Guest, method: Method, tolerance: int, result: Correction,
           found: Measurement) -> tuple[AgentError | None, Measurement]:
    """Set the clock by one method until a reading shows that it is right, or rounds are over;
    return the error of the last round, and what was measured after it.

    The call allows for its own way to the guest. A busy host or guest only ever makes that
    longer, so what counts for the next round is the shortest one seen; but not after the first
    round: one late setting says nothing, and a clock that is put ahead has to go back.
    """
    failed: AgentError | None = None
    ahead, ways, before = found.delay // 2 + result.lead, [], abs(found.offset)
    for number in range(method.rounds):
        failed, began = None, time.monotonic()
        try:
            method.apply(guest, ahead)
        except AgentError as problem:
            failed = problem
            result.late |= problem.trouble.name == 'silent'
        if abs(found.offset) > tolerance:
            result.right, result.method = began + ahead / SECOND - result.began, method.name
        found = measure(guest, tolerance)
        result.late = False             # an agent answers in order
        result.missed = result.missed if number else found.offset
        # What is sure to be within the tolerance, so that another reading still finds it so.
        goal = max(tolerance * 3 // 5, tolerance - found.delay // 2, method.grain, found.blur)
        stuck = failed and abs(found.offset) > max(before // 2, 4 * tolerance)
        if abs(found.offset) <= goal or stuck:
            break                       # right; or it did not move, and this way is none
        ways.append(ahead - found.offset)
        ahead = max(0, min(ways)) if len(ways) > 1 else ahead
    return failed, found


def guest_turn(what: str, guest: Guest, deadline: Deadline
               ) -> contextlib.AbstractContextManager[int | None]:
    """Return the turn() of a guest, as all programs of this host see it."""
    name = hashlib.sha256(guest.whole_id.encode()).hexdigest()[:32]
    return turn(f'vmmonitor {what} {name}', deadline)


def correct(guest: Guest, tolerance: int, allow_exec: bool, result: Correction | None = None
            ) -> Correction:
    """Measure the guest's clock and set it if it is off by more than `tolerance` ns.

    Agents report errors although they set the time, and success although they did not: only a
    reading afterwards counts. Raises AgentError with the reason why it could not be set, or
    ClockError when setting it did not help. `result` is that of earlier tries of the same job.
    """
    result = result or Correction(guest.name)
    # Two programs undo each other's settings. Who waits in vain for its turn goes on.
    with guest_turn('clock', guest, Deadline(TURN_TIMEOUT)) as holder:
        if holder is not None:
            log.warning('%s: going on without a turn at its clock: process %s does not end its own',
                        guest.name, holder or 'unknown')
        return _correct(guest, tolerance, allow_exec, result)


def _correct(guest: Guest, tolerance: int, allow_exec: bool, result: Correction) -> Correction:
    found = measure(guest, tolerance, result.cause in result.BEHIND)
    result.late = False
    guest.check_step(found.offset)
    if not result.seen:
        result.before, result.seen = found.offset, True
    problem: AgentError | None = None
    limit = max(tolerance, found.blur)  # of what is right: no finer than the way that works
    for method in METHODS:
        if abs(found.offset) <= limit or (method.executes and not allow_exec):
            break
        failed = None
        if abs(found.offset) > method.grain:
            failed, found = _apply(guest, method, limit, result, found)
            problem = problem or failed
        elif not method.executes:
            continue                    # it would do no better, but the next one may
        if not failed:
            limit = max(tolerance, method.grain, found.blur)
            break
        if failed.trouble.transient:       # it may work later: a rougher way would not do better
            break
    result.after = found.offset
    result.proved, result.when = max(time.monotonic() - result.began, result.right), time.time()
    if abs(result.after) <= limit:
        result.warning = explain(problem) if problem else ''
        return result
    if problem:
        raise problem
    raise ClockError(f'{guest.name}: clock is still off by {span(result.after)}, was '
                     f'{span(result.before)}', 'the host or the guest may be overloaded; raise '
                     'monitor.toleranceMs if this lasts')


def synchronise(guest: Guest, config: Config, result: Correction, nudge: threading.Event) -> None:
    """Wait until the guest's agent answers, then correct the clock; `result` says how it went,
    also after an error.

    `nudge` cuts the pause between two tries short, and those after it. Raises AgentError when the
    agent does not answer within monitor.agentWait, or can't help, and ClockError when the clock
    was not to be put right even after pauses.
    """
    deadline, pause, again = Deadline(config.agent_wait), RETRY_FIRST, CLOCK_RETRIES
    while True:
        try:
            correct(guest, round(config.tolerance * MS), config.allow_exec, result)
            return
        except AgentError as problem:
            if not problem.trouble.transient or deadline.passed():
                raise
        except (HostAway, Busy):        # the agent of a machine serves one program at a time
            if deadline.passed():       # events would bring us back only if their link fell, too
                raise
        except ClockError:
            again, pause = again - 1, max(pause, RETRY_LAST / 2 ** again)
            if not again:
                raise
        if nudge.wait(min(pause, max(deadline.left(), RETRY_FIRST))):
            nudge.clear()
            pause = RETRY_FIRST
        else:                           # what comes only now counts for the next pause
            pause = min(pause * RETRY_FACTOR, RETRY_LAST)


class HostClock(NamedTuple):
    """The host's clocks at one moment, in ns."""

    real: int
    boot: int                   # goes on while the host sleeps
    monotonic: int              # does not

    @classmethod
    def now(cls) -> HostClock:
        """Read the three as one: of a few attempts, the one that took the least time."""
        def read() -> tuple[int, HostClock]:
            boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            clock = cls(time.time_ns(), boot, time.monotonic_ns())
            return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - boot, clock
        return min(read() for _ in range(SAMPLES))[1]

    def jump_since(self, earlier: HostClock) -> str:
        """Return what happened to the clocks since `earlier`, or ''."""
        limit = HOST_CLOCK_JUMP * SECOND
        if (self.boot - self.monotonic) - (earlier.boot - earlier.monotonic) > limit:
            return 'host slept'
        if abs((self.real - self.boot) - (earlier.real - earlier.boot)) > limit:
            return 'host clock stepped'
        return ''


class ClockSetTimer:
    """Tells when the host's clock is set, which its waking up does, too (timerfd_create(2),
    TFD_TIMER_CANCEL_ON_SET; os.timerfd_create() came with Python 3.13)."""

    ABSOLUTE, CANCEL_ON_SET = 1, 2              # flags of timerfd_settime()
    NEVER = 1 << 32                             # seconds since 1970: 2106

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.timerfd_create(time.CLOCK_REALTIME, os.O_CLOEXEC)
        self._expire(self.NEVER, self.ABSOLUTE | self.CANCEL_ON_SET)

    def wait(self) -> bool:
        """Wait until the clock is set (True), or until stop() (False)."""
        try:
            os.read(self.fd, 8)
        except OSError as problem:
            if problem.errno != errno.ECANCELED:
                raise
            return True
        return False

    def stop(self) -> None:
        self._expire(0, 0)

    def close(self) -> None:
        os.close(self.fd)

    def _expire(self, seconds: int, flags: int) -> None:
        times = (ctypes.c_long * 4)(0, 0, seconds, 1)           # struct itimerspec
        if self.libc.timerfd_settime(self.fd, flags, times, None):
            raise OSError(ctypes.get_errno(), 'timerfd_settime')


# === libvirt ====================================================================================
# Structures, then prototypes, then thin wrappers. But for ClockSetTimer, DirectoryChanges and the
# daemon's memory, nothing outside this section uses ctypes.

AGENT_CALLS = 8                # at once, each on a connection of its own; to guest agents ...
SLOW_CALLS = 3                 # ... to those that were silent ...
ACTION_CALLS = 4               # ... starts, saves, stops ...
PICTURE_CALLS = 2              # ... pictures, of which a QEMU that hangs has none, for ever ...
QUERY_CALLS = 2                # ... look-ups: together 19 of libvirtd's 20 workers
KEEPALIVE_INTERVAL = 5         # a libvirtd that is stopped or gone is noticed after about
KEEPALIVE_COUNT = 3            # INTERVAL * (COUNT + 1)
RECONNECT_FIRST = 0.1          # pause before the second attempt to reach libvirt; it doubles
RECONNECT_LAST = 1.0           # ... up to this: an attempt at an absent socket costs 1 ms
LOOP_TICK_MS = 5000            # the event loop shows this often that it runs
FOUND_MOMENT = 1.0             # until a libvirtd that is back knows whose QEMU has died meanwhile
SPARE_TIME = 10.0              # s; connections that nobody needed so long are closed
QUERY_TIMEOUT = 25.0           # for a free line to libvirt; longer than its keepalive
OPEN_TIMEOUT = 10.0            # for one attempt to connect; ssh over a slow line takes seconds
STEP_LIMIT = 1.5               # seconds: two hosts are in step; what a boot tells is no finer
STEP_AGAIN = 60.0              # until ssh is asked again of one that is not
OPEN_GRACE = 1.0               # for an attempt to end when what it started was killed
START_TIMEOUT = 300.0          # from the first call to "running"; one restore may take minutes
START_ATTEMPTS = 3             # the same action on the same state, before giving up
HANDLES = 2000                 # that a connection keeps, also of domains that are gone


class VirError(ctypes.Structure):
    """The beginning of virError of virterror.h."""

    _fields_ = [('code', ctypes.c_int), ('domain', ctypes.c_int), ('message', ctypes.c_char_p)]


_INT, _UINT, _PTR, _STR = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p

# The callback types of libvirt-domain.h, -host.h and -event.h. `opaque`, the last argument, is
# the number of a Subscription.
LifecycleCallback = ctypes.CFUNCTYPE(_INT, _PTR, _PTR, _INT, _INT, _PTR)
WakeupCallback = ctypes.CFUNCTYPE(None, _PTR, _PTR, _INT, _PTR)
AgentCallback = ctypes.CFUNCTYPE(None, _PTR, _PTR, _INT, _INT, _PTR)
CloseCallback = ctypes.CFUNCTYPE(None, _PTR, _INT, _PTR)
TimeoutCallback = ctypes.CFUNCTYPE(None, _INT, _PTR)
ErrorCallback = ctypes.CFUNCTYPE(None, _PTR, _PTR)

# name -> (result, arguments); pointers that must be freed are _PTR, borrowed strings _STR
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    'virInitialize': (_INT, ()),
    'virSetErrorFunc': (None, (_PTR, ErrorCallback)),
    'virGetLastError': (ctypes.POINTER(VirError), ()),
    'virResetLastError': (None, ()),
    'virEventRegisterDefaultImpl': (_INT, ()),
    'virEventRunDefaultImpl': (_INT, ()),
    'virEventAddTimeout': (_INT, (_INT, TimeoutCallback, _PTR, _PTR)),
    'virConnectOpen': (_PTR, (_STR,)),
    'virConnectClose': (_INT, (_PTR,)),
    'virConnectIsAlive': (_INT, (_PTR,)),
    'virConnectSetKeepAlive': (_INT, (_PTR, _INT, _UINT)),
    'virConnectGetLibVersion': (_INT, (_PTR, ctypes.POINTER(ctypes.c_ulong))),
    'virConnectRegisterCloseCallback': (_INT, (_PTR, CloseCallback, _PTR, _PTR)),
    'virConnectUnregisterCloseCallback': (_INT, (_PTR, CloseCallback)),
    'virConnectDomainEventRegisterAny': (_INT, (_PTR, _PTR, _INT, _PTR, _PTR, _PTR)),
    'virConnectDomainEventDeregisterAny': (_INT, (_PTR, _INT)),
    'virConnectListAllDomains': (_INT, (_PTR, ctypes.POINTER(ctypes.POINTER(_PTR)), _UINT)),
    'virDomainLookupByUUIDString': (_PTR, (_PTR, _STR)),
    'virDomainFree': (_INT, (_PTR,)),
    'virDomainGetName': (_STR, (_PTR,)),
    'virDomainGetUUIDString': (_INT, (_PTR, _STR)),
    'virDomainGetState': (_INT, (_PTR, ctypes.POINTER(_INT), ctypes.POINTER(_INT), _UINT)),
    'virDomainGetXMLDesc': (_PTR, (_PTR, _UINT)),
    'virDomainGetAutostart': (_INT, (_PTR, ctypes.POINTER(_INT))),
    'virDomainCreateWithFlags': (_INT, (_PTR, _UINT)),
    'virDomainResume': (_INT, (_PTR,)),
    'virDomainPMWakeup': (_INT, (_PTR, _UINT)),
    'virDomainShutdownFlags': (_INT, (_PTR, _UINT)),
    'virDomainDestroyFlags': (_INT, (_PTR, _UINT)),
    'virDomainSuspend': (_INT, (_PTR,)),
    'virDomainReset': (_INT, (_PTR, _UINT)),
    'virDomainReboot': (_INT, (_PTR, _UINT)),
    'virDomainScreenshot': (_PTR, (_PTR, _PTR, _UINT, _UINT)),
    'virStreamNew': (_PTR, (_PTR, _UINT)),
    'virStreamRecv': (_INT, (_PTR, _STR, ctypes.c_size_t)),
    'virStreamFinish': (_INT, (_PTR,)),
    'virStreamAbort': (_INT, (_PTR,)),
    'virStreamFree': (_INT, (_PTR,)),
    'virDomainManagedSave': (_INT, (_PTR, _UINT)),
    'virDomainManagedSaveRemove': (_INT, (_PTR, _UINT)),
    'virDomainHasManagedSaveImage': (_INT, (_PTR, _UINT)),
}
QEMU_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    'virDomainQemuAgentCommand': (_PTR, (_PTR, _STR, _INT, _UINT)),
    'virDomainQemuMonitorCommand': (_INT, (_PTR, _STR, ctypes.POINTER(_PTR), _UINT)),
}

# virErrorNumber
ERR_SYSTEM, ERR_NO_DOMAIN, ERR_INVALID, ERR_TIMEOUT = 38, 42, 55, 68
ERR_RIGHTS = 45, 79, 88, 94         # AUTH_FAILED, AUTH_CANCELLED, ACCESS_DENIED, AUTH_UNAVAILABLE
# What a failed agent call means, by its code where its text does not tell: libvirtd has the
# language of its host. ARGUMENT_UNSUPPORTED, AGENT_UNRESPONSIVE
AGENT_CODES = {74: 'not configured', 86: 'not responding'}
FROM_RPC = 7                                            # virErrorDomain of a lost connection
LIST_RUNNING, LIST_STUCK, LIST_OFF = 1 << 4, 1 << 5 | 1 << 7, 1 << 6    # virConnectList...Flags
SAVE_RUNNING = 1 << 1                                   # virDomainSaveRestoreFlags
SHUTDOWN_ACPI = 1 << 0                                  # virDomainShutdownFlagValues
REBOOT_ACPI = 1 << 0                                    # virDomainRebootFlagValues

_RIGHTS = ('run this as root or put the user in the group libvirt: usermod -aG libvirt USER; that '
           'counts for a shell after logging in again, for a service after its restart')
_DAEMON = 'start it: systemctl start libvirtd, or virtqemud where that is installed'
# What to do about a URI that can't be opened: the first row that fits URI and text counts; "{far}"
# is the host in it, "{ssh}" how it is reached. Others have the hint of their error.
URI_HINTS = (
    ('', 'parse URI|Bad port', 'take a URI such as qemu:///system or qemu+ssh://root@far:22/system'),
    (r'\w+\+ssh:', r"[Cc]annot find 'ssh'|ssh'?:? .*No such file", 'install openssh-client here'),
    (r'\w+\+ssh:', 'Host key verification failed', 'the key that it shows is not known to be its '
     'own: put the right one into /etc/ssh/ssh_known_hosts, which the service reads, too'),
    (r'\w+\+(ssh|libssh2?):', '', 'this must work without a question: {ssh} true'),
    (r'\w+\+tls:', 'certificate|PKI', 'make libvirt\'s certificates: virt-pki-validate says which '
     'are missing'),
    (r'\w+\+(tls|tcp):', '', 'on {far} start what listens: systemctl start libvirtd-tls.socket, or '
     'libvirtd-tcp.socket'),
    (r'qemu(\+unix)?:///session', '', 'a session belongs to one user: run this as that user, who '
     'sees it by "virsh -c qemu:///session list"; the host\'s guests are at qemu:///system'),
    ('', r'not recogni[sz]ed|unexpected .*path|no connection driver', 'take a URI such as '
     'qemu:///system'),
    (r'(?!(qemu|test)(\+(unix|ext))?://)', '', 'take a URI such as qemu:///system'))

STATES = {1: State.RUNNING, 2: State.RUNNING, 3: State.PAUSED, 4: State.STOPPING, 5: State.OFF,
          6: State.CRASHED, 7: State.ASLEEP}            # virDomainState; 2 is "blocked on I/O"
# (virDomainState, its reason) -> Status.reason
REASONS = {(1, 1): 'booted', (1, 3): 'restored', (3, 5): IO_ERROR, (3, 6): WATCHDOG,
           (3, 10): PANICKED, (3, 14): FAILED, (3, 2): 'migrating', (3, 3): 'being saved',
           (3, 4): 'being dumped', (3, 9): 'snapshot', (3, 11): 'starting', (3, 12): 'migrating',
           (5, 3): FAILED, (5, 6): FAILED, (6, 1): PANICKED}
# (virDomainEventType, detail) -> kind of GuestEvent. A restore ends in RESUMED/FROM_SNAPSHOT.
STARTED, RESUMED, STOPPED = 2, 4, 5
LIFECYCLE_KINDS = {
    (STARTED, 0): 'booted', (STARTED, 1): 'migrated', (STARTED, 2): 'restored',
    (STARTED, 3): 'reverted', (STARTED, 4): 'woken',
    (RESUMED, 0): 'resumed', (RESUMED, 1): 'migrated', (RESUMED, 2): 'restored',
    (RESUMED, 3): 'migrated', (RESUMED, 4): 'migrated',
    (1, 0): 'stuck', (3, 2): 'stuck', (3, 3): 'stuck', (8, 0): 'stuck'}
DEFAULT_KINDS = {STARTED: 'started', RESUMED: 'resumed', STOPPED: 'stopped'}
CLOSE_REASONS = {0: 'error', 1: 'end of file', 2: 'keepalive timed out', 3: 'closed by us'}


class Library:
    """libvirt.so.0 and libvirt-qemu.so.0, loaded once, with their event loop running."""

    _instance: Library | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.functions: dict[str, Any] = {}
        self._bind('libvirt.so.0', PROTOTYPES)
        self._bind('libvirt-qemu.so.0', QEMU_PROTOTYPES)
        self.libc = ctypes.CDLL(None)
        self.libc.free.argtypes, self.libc.free.restype = (_PTR,), None
        self.ticked = time.monotonic()          # when the event loop last showed that it runs
        # The loop must be registered before the first connection, or that one has no keepalive
        # and no events. References to the callbacks are kept: C calls them at any time.
        self._silence, self._tick = ErrorCallback(lambda *_: None), TimeoutCallback(self._on_tick)
        self.functions['virSetErrorFunc'](None, self._silence)
        self.call('virInitialize')
        self.call('virEventRegisterDefaultImpl')
        self.call('virEventAddTimeout', LOOP_TICK_MS, self._tick, None, None)
        self.loop = spawn('libvirt-events', self._run_loop)

    @classmethod
    def get(cls) -> Library:
        """Return the library, loading it at the first call; LibvirtError if it is missing."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls()
            return cls._instance

    def _bind(self, file: str, prototypes: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
        try:
            library = ctypes.CDLL(file)
        except OSError as problem:
            raise LibvirtError(f'{file} can\'t be loaded: {problem}', hint='install libvirt: apt '
                               'install libvirt-daemon-system (it is in libvirt0), or dnf install '
                               'libvirt-daemon (in libvirt-libs)') from None
        for name, (result, arguments) in prototypes.items():
            function = getattr(library, name, None)
            if function is None:
                raise LibvirtError(f'{file} has no {name}', hint='update libvirt')
            function.restype, function.argtypes = result, arguments
            self.functions[name] = function

    def _on_tick(self, _timer: int, _opaque: int | None) -> None:
        self.ticked = time.monotonic()

    def _run_loop(self) -> None:
        run_once = self.functions['virEventRunDefaultImpl']
        while True:
            if run_once() < 0:
                time.sleep(STATE_POLL)          # it will not fail twice for the same reason

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function; LibvirtError when it returns NULL or a negative number."""
        result = self.functions[name](*arguments)
        if result is None or (isinstance(result, int) and result < 0):
            raise self._error(name)
        return result

    def _error(self, name: str) -> LibvirtError:
        """Return this thread's last error; libvirt keeps one for every thread."""
        last = self.functions['virGetLastError']()
        if not last:
            return LibvirtError(f'{name} failed without a reason')
        info = last.contents
        text = ' '.join(clip(info.message or name.encode()).split())    # QEMU's may have two lines
        hint = _RIGHTS if info.code in ERR_RIGHTS else ''
        if name == 'virConnectOpen':        # such errors of other calls are about a guest's files
            hint = _RIGHTS if 'Permission denied' in text else \
                _DAEMON if info.code == ERR_SYSTEM else hint
        error = LibvirtError(text, info.code, info.domain, hint)
        self.functions['virResetLastError']()
        return error

    def take_string(self, pointer: int) -> str:
        """Return the string at `pointer` and free it."""
        try:
            return ctypes.string_at(pointer).decode(errors='replace')
        finally:
            self.libc.free(pointer)

    def identity(self, domain: int) -> tuple[str, str]:
        """Return (UUID, name) of a virDomainPtr, which both are copied from."""
        buffer = ctypes.create_string_buffer(37)
        self.call('virDomainGetUUIDString', domain, buffer)
        return buffer.value.decode(), self.call('virDomainGetName', domain).decode(errors='replace')


class Subscription:
    """What one connection tells: libvirt's events, each to `notify` with the UUID and name of its
    domain and its kind, and that it was lost.

    C gets four fixed callbacks and the number of the subscription, so that no callback object
    can be gone when it is called.
    """

    _numbers = iter(range(1, sys.maxsize))
    _all: dict[int, Subscription] = {}                  # number -> subscription

    def __init__(self, connection: Connection, notify: Callable[[str, str, str], None]) -> None:
        self.connection, self.notify = connection, notify
        self.lost = threading.Event()
        self.reason = ''                                # why it was lost
        self.number = next(self._numbers)
        self.events: list[int] = []                     # callback ids; the first one is 0
        self._all[self.number] = self
        call, handle = connection.call, connection.handle
        try:
            call('virConnectRegisterCloseCallback', handle, _ON_CLOSE, self.number, None)
            for event, callback in _EVENTS.items():
                self.events.append(call('virConnectDomainEventRegisterAny', handle, None, event,
                                        ctypes.cast(callback, _PTR), self.number, None))
        except LibvirtError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Take every registration back: each holds a reference to the connection."""
        for event in self.events:
            with contextlib.suppress(LibvirtError):     # the connection may be dead
                self.connection.call('virConnectDomainEventDeregisterAny',
                                     self.connection.handle, event)
        with contextlib.suppress(LibvirtError):
            self.connection.call('virConnectUnregisterCloseCallback', self.connection.handle,
                                 _ON_CLOSE)
        self._all.pop(self.number, None)

    @classmethod
    def deliver(cls, number: int | None, domain: int, kind: str) -> int:
        """Pass on an event. Runs in the event loop: it copies the names and enqueues, no more."""
        subscription = cls._all.get(number or 0)
        if subscription and kind:
            try:
                subscription.notify(*subscription.connection.library.identity(domain), kind)
            except Exception:           # a boundary: C can't do anything with an exception
                log.exception('event %s: unexpected error', kind)
        return 0

    @classmethod
    def close(cls, number: int | None, reason: int) -> None:
        subscription = cls._all.get(number or 0)
        if subscription:
            subscription.reason = CLOSE_REASONS.get(reason, str(reason))
            subscription.lost.set()


_ON_CLOSE = CloseCallback(lambda _conn, reason, number: Subscription.close(number, reason))
_EVENTS: dict[int, Any] = {         # virDomainEventID -> callback; never 2, RTC_CHANGE: that one
    #                                 is the echo of our own guest-set-time
    0: LifecycleCallback(lambda _conn, domain, event, detail, number: Subscription.deliver(
        number, domain, LIFECYCLE_KINDS.get((event, detail), DEFAULT_KINDS.get(event, 'changed')))),
    11: WakeupCallback(lambda _conn, domain, _reason, number: Subscription.deliver(
        number, domain, 'woken')),
    18: AgentCallback(lambda _conn, domain, state, _reason, number: Subscription.deliver(
        number, domain, 'agent connected' if state == 1 else 'changed'))}


class Opening:
    """One virConnectOpen, in a thread of its own: it has no time limit and hangs as long as its
    transport does.

    When time is up, what it started (ssh) is killed, by the pids of that thread's children, which
    ends it. What has started nothing goes on, and the next who wants a connection takes that one
    over: so a host that hangs holds no more threads than there are callers. What ends while nobody
    waits for it counts for nothing: the next one may come hours later.
    """

    _lock = threading.Lock()                    # guards _all, `wanted` and the setting of `ended`
    _all: list[Opening] = []                    # that go on, or whose end somebody waits for

    def __init__(self, uri: str) -> None:
        self.library, self.uri = Library.get(), uri
        self.ended, self.wanted = threading.Event(), True
        self.handle = 0                         # virConnectPtr, or ...
        self.problem: LibvirtError | None = None        # ... why there is none
        self.thread = spawn('libvirt-open', self._run)

    def _run(self) -> None:
        uri = self.uri
        if re.match(r'\w+\+ssh:', uri) and 'no_tty=' not in uri:
            uri += ('&' if '?' in uri else '?') + 'no_tty=1'    # ssh shall not ask: BatchMode
        try:
            self.handle = self.library.call('virConnectOpen', uri.encode())
        except LibvirtError as problem:
            self.problem = problem
        finally:
            with self._lock:
                self.ended.set()
                nobodys = not self.wanted
                if nobodys:
                    self._all.remove(self)
            if nobodys and self.handle:
                self.library.functions['virConnectClose'](self.handle)

    @classmethod
    def connect(cls, uri: str) -> int:
        """Return a virConnectPtr; HostAway when there is none within OPEN_TIMEOUT."""
        with cls._lock:
            opening = next((one for one in cls._all if one.uri == uri and not one.wanted), None)
            if opening:
                opening.wanted = True
            else:
                opening = cls(uri)
                cls._all.append(opening)
        in_time = opening.ended.wait(OPEN_TIMEOUT)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not opening.ended.is_set():
                opening.signal_children(number)
                opening.ended.wait(OPEN_GRACE)
        with cls._lock:
            opening.wanted, ended = False, opening.ended.is_set()
            if ended:
                cls._all.remove(opening)
        if ended and opening.handle:
            return opening.handle
        late = HostAway(f'no answer within {OPEN_TIMEOUT:g} s')
        raise opening.problem if in_time and opening.problem else late

    def signal_children(self, number: int) -> None:
        """Send a signal to what virConnectOpen has started, if it goes on."""
        with contextlib.suppress(OSError):
            path = Path(f'/proc/self/task/{self.thread.native_id}/children')
            for pid in path.read_text().split():
                os.kill(int(pid), number)

    @classmethod
    def end_all(cls) -> None:
        """Kill what all attempts have started: the program ends."""
        with cls._lock:
            for opening in cls._all:
                opening.signal_children(signal.SIGKILL)


class Connection:
    """One virConnectPtr, for one call at a time (see ConnectionPool)."""

    def __init__(self, uri: str) -> None:
        self.library = Library.get()
        self._handles: dict[str, int] = {}              # UUID -> virDomainPtr
        try:
            self.handle = Opening.connect(uri)
        except LibvirtError as problem:
            hint = next((hint for pattern, text, hint in URI_HINTS
                         if re.match(pattern, uri) and re.search(text, problem.message)),
                        problem.hint)
            far = re.sub(r'.*?//([^/?]*).*', r'\1', uri)
            said = re.sub(r'\s*@{9,}\s*@?|\s*@\s*@{9,}', '', problem.message) # ssh's box
            ssh = shlex.join(ssh_words(uri) or ['ssh', far])
            raise HostAway(said, problem.code, problem.domain, hint.format(far=far, ssh=ssh)
                           ) from None
        with contextlib.suppress(LibvirtError):         # a local driver has no keepalive
            self.library.call('virConnectSetKeepAlive', self.handle, KEEPALIVE_INTERVAL,
                              KEEPALIVE_COUNT)

    def close(self) -> int:
        """Give up the connection; nobody may be in a call. Return how many references are left."""
        self._forget()
        left = 0
        with contextlib.suppress(LibvirtError):
            left = self.library.call('virConnectClose', self.handle)
            if left:
                log.debug('libvirt: a closed connection still has %d references', left)
        return left

    def alive(self) -> bool:
        """Tell whether the connection stands (virConnectIsAlive: no round trip)."""
        return bool(self.library.functions['virConnectIsAlive'](self.handle) == 1)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function; HostAway when it failed because the connection is gone."""
        try:
            return self.library.call(name, *arguments)
        except LibvirtError as problem:
            if problem.domain == FROM_RPC or not self.alive():
                raise HostAway(f'libvirt is away: {problem.message}', problem.code, problem.domain,
                               'try again in a moment') from None
            raise

    def _forget(self) -> None:
        """Give up what domain() keeps."""
        while self._handles:
            self.library.functions['virDomainFree'](self._handles.popitem()[1])

    def domain(self, uuid: str) -> int:
        """Return the virDomainPtr of a UUID, which is looked up once: libvirtd is told the UUID in
        every call, and so it stays good over restarts and renames of the domain."""
        if uuid not in self._handles:
            if len(self._handles) >= HANDLES:
                self._forget()
            self._handles[uuid] = self.call('virDomainLookupByUUIDString', self.handle,
                                            uuid.encode())
        return self._handles[uuid]

    def domains(self, flags: int = 0) -> list[tuple[str, str]]:
        """Return (UUID, name) of all domains, or those of `flags` (virConnectListAllDomains)."""
        array = ctypes.POINTER(_PTR)()
        count = self.call('virConnectListAllDomains', self.handle, ctypes.byref(array), flags)
        try:
            return [self.library.identity(array[index]) for index in range(count)]
        finally:
            for index in range(count):
                self.library.functions['virDomainFree'](array[index])
            self.library.libc.free(array)

    def screenshot(self, domain: int) -> bytes:
        """Return the picture of a domain's first screen, in the format that its QEMU gives."""
        stream = self.call('virStreamNew', self.handle, 0)
        buffer, picture = ctypes.create_string_buffer(1 << 16), bytearray()
        try:
            self.library.libc.free(self.call('virDomainScreenshot', domain, stream, 0, 0))
            while len(picture) < PICTURE_BYTES:
                count = self.call('virStreamRecv', stream, buffer, len(buffer))
                if not count:
                    self.call('virStreamFinish', stream)
                    return bytes(picture)
                picture += buffer.raw[:count]
            self.call('virStreamAbort', stream)
            raise LibvirtError(f'the screen\'s picture has more than {PICTURE_BYTES >> 20} MiB',
                               hint='give the guest one of 5120x2880 pixels, or less')
        finally:
            self.library.functions['virStreamFree'](stream)

    def version(self) -> str:
        number = ctypes.c_ulong()
        self.call('virConnectGetLibVersion', self.handle, ctypes.byref(number))
        return f'{number.value // 1000000}.{number.value // 1000 % 1000}.{number.value % 1000}'


class ConnectionPool:
    """Connections for one kind of call, so that calls of another kind never wait for these.

    A connection is lent to one call at a time. libvirt's client allows more, but up to 10.1 it
    can lose the wake-up of the second thread, which then waits for the call of the first.
    """

    def __init__(self, uri: str, calls: int, full: type[Error] = Busy) -> None:
        self.uri, self.full = uri, full                 # `full`: raised when there is no room
        self.room = threading.Semaphore(calls)
        self.lock = threading.Lock()
        self.idle: list[Connection] = []                # guarded by self.lock, the last used last
        self.spare = 0              # as many of these nobody has needed since the last trim()

    @contextlib.contextmanager
    def connection(self, timeout: float) -> Iterator[Connection]:
        """Lend a connection, waiting at most `timeout` seconds for a free one."""
        if not self.room.acquire(timeout=timeout):
            raise self.full(f'libvirt gave no answer to earlier calls within {timeout:g} s',
                            hint='try again in a moment')
        try:
            connection = self._take() or Connection(self.uri)
            try:
                yield connection
            finally:
                self._put(connection)
        finally:
            self.room.release()

    def _take(self) -> Connection | None:
        """Return an idle connection that still stands, closing those that do not."""
        while True:
            with self.lock:
                if not self.idle:
                    return None
                connection = self.idle.pop()
                self.spare = min(self.spare, len(self.idle))
            if connection.alive():
                return connection
            connection.close()

    def _put(self, connection: Connection) -> None:
        if connection.alive():
            with self.lock:
                self.idle.append(connection)
        else:
            connection.close()

    def trim(self, keep: int) -> None:
        """Close those that nobody needed since the last time, but so many: each is pinged."""
        with self.lock:
            count = max(0, self.spare - keep)
            spare, self.idle = self.idle[:count], self.idle[count:]
            self.spare = len(self.idle)
        for connection in spare:
            connection.close()
            log.debug('%s: closed a connection that nobody needed', self.uri)

    def close(self) -> None:
        with self.lock:
            idle, self.idle = self.idle, []
        for connection in idle:
            connection.close()


def ssh_words(uri: str, *options: str) -> list[str]:
    """Return the ssh, with these options, by which libvirt reaches the host of a URI; or []."""
    with contextlib.suppress(ValueError):               # no URI: opening it says so
        parts = urllib.parse.urlsplit(uri)
        if parts.scheme.endswith(('+ssh', '+libssh', '+libssh2')) and \
                (parts.hostname or '-')[0] != '-':
            more = urllib.parse.parse_qs(parts.query)
            words = [more.get('command', ['ssh'])[0], *options]
            for option, value in (('-p', parts.port), ('-l', parts.username),
                                  ('-i', more.get('keyfile', [''])[0])):
                words += [option, urllib.parse.unquote(str(value))] if value else []
            return [*words, str(parts.hostname)]
    return []


class HostStep:
    """Whether a host's clock is in step with this machine's: only then do its guests get their
    time from here.

    What tells is ssh; or a guest that has just booted there, whose clock came from that host's, to
    the second. That it is in step counts until the clock of this machine is set.
    """

    def __init__(self, host: LibvirtHost, trusted: bool) -> None:
        self.host = host
        # What shows the clock of a qemu+ssh host, as libvirt would reach it; or [].
        words = ssh_words(host.uri, '-T', '-e', 'none', '-o', 'BatchMode=yes') \
            if '+ssh:' in host.uri else []
        self.date = words and ['timeout', f'{OPEN_TIMEOUT:g}', *words, 'date +%s.%N']
        self.sure = trusted or host.here
        self.fresh: set[str] = set()        # UUIDs of guests that booted, and were not set since
        self.off: float | None = None       # seconds that it may be off; None: nothing tells
        self.by = ''                        # what tells that
        self.state = ''                     # what was said last: in step, out of step, not known
        self._unasked = bool(self.date)     # ssh was not asked since the host was connected
        self._again = Deadline(0)           # when it is, if the host was not in step
        self._seen = HostClock.now()
        self._lock = threading.Lock()       # guards all this; ssh holds it for OPEN_TIMEOUT
        self._waits: threading.Thread | None = None     # until the host is in step

    def connected(self) -> None:
        """Have ssh asked again: the host may have booted."""
        self._unasked = bool(self.date)

    def note(self, uuid: str, event: str) -> None:
        """Note what happened to a guest; after its boot, its clock is its host's for a while."""
        if event == 'booted':
            self.fresh.add(uuid)
        elif event not in ('agent connected', 'changed'):
            self.fresh.discard(uuid)

    def check(self, guest: Domain, offset: int) -> bool:
        """Raise OutOfStep unless it is in step; tell whether it was not until now."""
        if self.sure:
            return False
        with self._lock:
            self._measure(guest, offset)
            was, self.state = self.state, 'not known' if self.off is None else \
                'in step' if self.off <= STEP_LIMIT else 'out of step'
            if self.state == 'in step':
                if self.state != was:
                    log.info('%s: its clock is that of this machine to %.2f s, by %s',
                             self.host.name, self.off, self.by)
                return bool(was) and self.state != was
            if self.by == 'ssh' and self.off and not (self._waits and self._waits.is_alive()):
                with contextlib.suppress(Error):        # no thread: the next one left alone tries
                    self._waits = spawn(f'step {self.host.name}', self._await)
        why = 'nothing tells yet whether its clock is that of this machine, as a guest that ' \
            'boots there would' if self.off is None else \
            f"its clock may be {self.off:.1f} s off this machine's, by {self.by}"
        hint = 'have both follow NTP, and ' + (
            f'set hosts.{self.host.label}.trustClock' if self.host.prefix else
            'instead of libvirt.uri say "hosts": {"far": {"uri": '
            f'{json.dumps(self.host.uri)}, "trustClock": true}}}}')
        if self.state != was:
            log.warning('%s: %s: its guests\' clocks are left alone; %s', self.host.name, why, hint)
        raise OutOfStep(f'{guest.name}: its clock is left alone: {self.host.name}: {why}', hint)

    def _measure(self, guest: Domain, offset: int) -> None:
        """Find out how far it may be off, if something tells now."""
        seen, self._seen = self._seen, HostClock.now()
        if self._seen.jump_since(seen):
            self.off, self._unasked = None, bool(self.date)
        if self._unasked or self.date and self.state != 'in step' and self._again.passed():
            told, self._again = self._ask(), Deadline(STEP_AGAIN)
            if self._unasked or told is not None:
                self.off, self.by, self._unasked = told, 'ssh', False
        if guest.uuid in self.fresh and (self.off is None or self.by != 'ssh'):
            off = abs(offset) / SECOND
            if self.off is None or off < self.off:      # one of many may have a clock of its own
                self.off, self.by = off, f'{guest.own}, which has just booted there'
        self.fresh.discard(guest.uuid)

    def _await(self) -> None:
        """Have its guests checked when ssh tells that it is in step: no event tells that its NTP
        has set its clock. When its connection is back, they are anyway."""
        while self.host.up.is_set() and not self.host.stopping.wait(STEP_AGAIN):
            with self._lock:
                told = self._ask()
                self.off = self.off if told is None else told
            if told is not None and told <= STEP_LIMIT:
                self.host.tell_running()
                break

    def _ask(self) -> float | None:
        """Return how far the host's clock may be off, by ssh; None if that tells nothing."""
        asked, began = time.time(), time.monotonic()
        try:
            seen = float(run(self.date, OPEN_TIMEOUT + OPEN_GRACE).stdout)
        except (Error, ValueError) as problem:
            log.debug('%s: its clock: %s', self.host.name, explain(problem))
            return None
        return max(abs(seen - asked), abs(seen - asked - (time.monotonic() - began)))


class LibvirtHost:
    """One libvirt: its domains, its events, and the connections for each kind of call."""

    def __init__(self, uri: str, label: str = '', trust_clock: bool = False) -> None:
        self.uri, self.name = uri, f'libvirt {label or uri}'
        self.label, self.prefix = label or LIBVIRT_LABEL, label and f'{label}/'
        self.here = bool(re.match(r'\w+(\+unix)?:///', uri))
        # State, look-ups, XML: quick ones, or libvirt does not answer at all.
        self.queries = ConnectionPool(uri, QUERY_CALLS, HostAway)
        self.actions = ConnectionPool(uri, ACTION_CALLS)    # start, save, stop: up to minutes
        self.pictures = ConnectionPool(uri, PICTURE_CALLS)
        self.agents = ConnectionPool(uri, AGENT_CALLS)      # guest agents that answer
        self.slow = ConnectionPool(uri, SLOW_CALLS)         # guest agents that did not
        self.silent: set[str] = set()                   # ids of guests whose agent was silent
        # What was seen since the last event, while events come: that it is still so need not be
        # asked. A look that an event overtook is not kept.
        self._memory = threading.Lock()                 # guards these
        self._serial = 0                                # of the last event
        self._names: dict[str, Guest] | None = None     # name -> domain: all that there are
        self._seen: dict[str, tuple[Status, str]] = {}  # UUID -> status, state of its agent
        self._on: set[str] = set()                      # UUIDs of those that are on, by events
        self.up = threading.Event()                     # connected, with events registered
        self.links = 0                                  # how often it became so
        self.stopping = threading.Event()
        self.problem: Error | None = None               # why the last attempt failed
        self.step = HostStep(self, trust_clock)
        self._subscription: Subscription | None = None
        self._thread: threading.Thread | None = None
        self._receive: Callable[[GuestEvent], None] = lambda _: None
        self._changed: Callable[[], object] = lambda: None

    # Events

    def watch(self, receive: Callable[[GuestEvent], None],
              changed: Callable[[], object] = lambda: None) -> None:
        """Keep a connection for events, for ever; give each to `receive`, which only enqueues.

        After every connect, all guests are given, as 'found', 'stuck' or 'off': what happened
        while there was no connection is lost. `changed` is called when `up` has changed.
        """
        self._receive, self._changed = receive, changed
        self._thread = spawn('libvirt-link', self._link)

    def _notify(self, uuid: str, name: str, kind: str) -> None:
        guest = Domain(self, uuid, name)
        self.forget(uuid)
        self.step.note(uuid, kind)
        if kind in ('agent connected', 'stopped'):
            self.silent.discard(guest.id)           # a new agent may be a better one
        if kind in ('stopped', 'off'):
            self._on.discard(uuid)
        elif kind not in ('changed', 'stuck'):
            self._on.add(uuid)
        if kind != 'changed':
            self._receive(GuestEvent(guest, kind, time.monotonic()))

    def tell_running(self) -> None:
        """Have all running guests checked: the host is in step, since a moment ago."""
        with contextlib.suppress(LibvirtError):     # away: when it is back, they are anyway
            for guest in self.all(running=True):
                self._receive(GuestEvent(guest, 'host in step', time.monotonic()))

    def _link(self) -> None:
        pause, since = RECONNECT_FIRST, time.monotonic()
        while not self.stopping.is_set():
            try:
                connection = Connection(self.uri)
                try:
                    pause = RECONNECT_FIRST
                    self._follow(connection, since)
                finally:
                    self.up.clear()
                    self._changed()
                    connection.close()
                since = time.monotonic()
            except Error as problem:
                if str(problem) != str(self.problem):
                    log.warning('%s: %s; trying again', self.name, explain(problem))
                self.problem = problem
            self.stopping.wait(pause)
            pause = min(pause * 2, RECONNECT_LAST)

    def _follow(self, connection: Connection, since: float) -> None:
        """Register for events, report what runs, and stay until the connection is lost."""
        self._subscription = subscription = Subscription(connection, self._notify)
        try:
            self.step.connected()
            running = connection.domains(LIST_RUNNING)
            self.problem = None
            self.forget()
            self.links += 1
            self.up.set()
            self._changed()
            log.info('%s: connected after %.1f s, version %s, %d guests running',
                     self.name, time.monotonic() - since, connection.version(), len(running))
            for uuid, name in running:
                self._notify(uuid, name, 'found')
            for uuid, name in connection.domains(LIST_STUCK):       # paused, crashed, asleep
                self._notify(uuid, name, 'stuck')
            with contextlib.suppress(HostAway):         # which is said below
                off = [] if subscription.lost.wait(FOUND_MOMENT) else connection.domains(LIST_OFF)
                for uuid, name in off:
                    self._notify(uuid, name, 'stopped' if uuid in self._on else 'off')
            while not subscription.lost.wait(SPARE_TIME) and connection.alive():
                for pool in self._pools():
                    pool.trim(pool is self.agents)      # the next resume shall not wait for one
            if not self.stopping.is_set():
                log.warning('%s: connection lost (%s); trying again', self.name,
                            subscription.reason or 'dead')
        finally:
            subscription.cancel()

    def stop(self) -> None:
        """Stop watching and close what can be closed at once."""
        self.stopping.set()
        Opening.end_all()
        if self._subscription:
            self._subscription.lost.set()
        if self._thread:
            self._thread.join(STOP_TIMEOUT / 2)
        # A thread, because closing is a call, too: a libvirtd that hangs does not answer it.
        spawn('libvirt-close', self._close).join(STOP_TIMEOUT / 4)

    def _close(self) -> None:
        for pool in self._pools():
            pool.close()

    def _pools(self) -> Sequence[ConnectionPool]:
        return self.queries, self.actions, self.pictures, self.slow, self.agents

    # Domains

    def reachable(self) -> None:
        """Raise HostAway at once if the watched connection is down."""
        if self._thread and not self.up.is_set():
            raise HostAway(f'{self.name} is away: {self.problem or "not connected yet"}',
                           hint='try again in a moment')

    def version(self) -> str:
        """Return the version of its libvirt."""
        with self.queries.connection(QUERY_TIMEOUT) as connection:
            return connection.version()

    def forget(self, uuid: str = '') -> None:
        """Something happened to a domain, or may have happened to all."""
        with self._memory:
            self._serial, self._names = self._serial + 1, None
            if uuid:
                self._seen.pop(uuid, None)
            else:
                self._seen.clear()

    def _follows(self) -> bool:
        return self._thread is not None and self.up.is_set()

    def remembered(self, uuid: str) -> tuple[Status, str] | None:
        """Return status and agent of a domain as they were seen since its last event."""
        with self._memory:
            return self._seen.get(uuid) if self._follows() else None

    def look_at(self, domain: Domain) -> tuple[Status, str]:
        """Return status and agent of a domain, and remember them."""
        serial = self._serial
        found = domain.status(), domain.channel_state()
        with self._memory:          # that a saved state was removed, no event tells
            if serial == self._serial and found[0].state is not State.SAVED:
                self._seen[domain.uuid] = found
        return found

    def known(self) -> Mapping[str, Guest] | None:
        """Return all domains by name, if nothing happened since they were listed."""
        with self._memory:
            return self._names if self._follows() else None

    def find(self, name: str) -> Guest | None:
        """Return the domain `name`, or None: all are listed, so that the next is known."""
        return next((guest for guest in self.all() if guest.own == name), None)

    def all(self, running: bool = False) -> list[Guest]:
        """Return all domains, or those that run, by name."""
        self.reachable()
        serial = self._serial
        with self.queries.connection(QUERY_TIMEOUT) as connection:
            found = connection.domains(LIST_RUNNING if running else 0)
        names: dict[str, Guest] = {name: Domain(self, uuid, name)
                                   for name, uuid in sorted((name, uuid) for uuid, name in found)}
        with self._memory:
            if not running and serial == self._serial:
                self._names = names
        return [*names.values()]


class Domain(Guest):
    """A libvirt domain. It holds no handle, so that it outlives any connection."""

    MEANINGS: dict[int, type[GuestError]] = {
        ERR_NO_DOMAIN: NoGuest, ERR_INVALID: WrongState, ERR_TIMEOUT: Busy}

    def __init__(self, host: LibvirtHost, uuid: str, name: str) -> None:
        self.host, self.uuid, self.prefix = host, uuid, host.prefix
        self.id, self.name = f'{host.prefix}{uuid}', f'{host.prefix}{name}'

    @property
    def whole_id(self) -> str:
        return f'{self.host.uri} {self.uuid}'

    def virsh(self, command: str) -> str:
        """Return what to type, for hints: without -c, virsh asks another libvirt than that of the
        host as soon as it is not root who types it."""
        return shlex.join(['virsh', '-c', self.host.uri, *command.split(), self.own])

    def remedies(self) -> Mapping[str, str]:
        return {'no channel': 'add a <channel> for org.qemu.guest_agent.0 and install '
                              'qemu-guest-agent in the guest',
                'frozen': f'thaw them: {self.virsh("domfsthaw")}'}

    @contextlib.contextmanager
    def _on(self, pool: ConnectionPool, timeout: float = BUSY_TIMEOUT
            ) -> Iterator[tuple[Connection, int]]:
        """Lend (connection, virDomainPtr) on `pool`, and give libvirt's errors their meaning."""
        self.host.reachable()
        try:
            with pool.connection(timeout) as connection:
                yield connection, connection.domain(self.uuid)
        except LibvirtError as problem:
            meaning = self.MEANINGS.get(problem.code)
            if meaning:
                raise meaning(f'{self.name}: {problem}') from None
            raise

    def status(self) -> Status:
        """Return what the domain is doing (virDomainGetState, virDomainHasManagedSaveImage)."""
        with self._on(self.host.queries) as (connection, handle):
            state, reason = _INT(), _INT()
            connection.call('virDomainGetState', handle, ctypes.byref(state), ctypes.byref(reason),
                            0)
            found = STATES.get(state.value, State.OFF)
            if found is State.OFF and connection.call('virDomainHasManagedSaveImage', handle, 0):
                return Status(State.SAVED)
            return Status(found, REASONS.get((state.value, reason.value), ''))

    def _act(self, function: str, *arguments: Any) -> None:
        try:
            with self._on(self.host.actions, START_TIMEOUT) as (connection, handle):
                connection.call(function, handle, *arguments)
        finally:                    # no event tells why it is off when it did not start
            self.host.forget(self.uuid)

    # state -> (what makes it run, its arguments, in words)
    STARTERS: dict[State, tuple[str, tuple[int, ...], str]] = {
        State.OFF: ('virDomainCreateWithFlags', (0,), 'started'),
        State.SAVED: ('virDomainCreateWithFlags', (0,), 'restored'),
        State.PAUSED: ('virDomainResume', (), 'resumed'),
        State.ASLEEP: ('virDomainPMWakeup', (0,), 'woken')}

    def start(self) -> str:
        """Make it run: virDomainCreateWithFlags, virDomainResume or virDomainPMWakeup.

        More than one may be needed: a state that was saved while paused is restored as paused.
        Raises WrongState for a crashed domain that libvirt preserves.
        """
        deadline, before = Deadline(START_TIMEOUT), self.status()
        done: list[str] = []
        refused = 0
        while not deadline.passed():
            state = self.state()
            if state is State.RUNNING:
                if 'restored' in done:
                    self._wake_restored()
                return self._settled(done[0], before) if done else 'already running'
            if state is State.CRASHED:
                raise WrongState(f'{self.name} has crashed and is kept for inspection',
                                 f'cut its power first: {self.virsh("destroy")}')
            if state is State.STOPPING:
                time.sleep(STATE_POLL)
                continue
            if len(done) >= START_ATTEMPTS:
                self._settled('', before)               # WrongState, with the reason
            # A save, dump or migration that goes on makes these wait, and then its end counts:
            # somebody else was quicker, or libvirt has had enough of waiting. Check again. But
            # libvirt also says "not valid" of a network that is down, and then nothing changes.
            try:
                done.append(self._start_from(state))
            except Busy:
                pass
            except WrongState:
                refused += self.state() is state
                if refused == START_ATTEMPTS:
                    raise
                time.sleep(STATE_POLL)
        raise Busy(f'{self.name} did not start within {START_TIMEOUT:g} s')

    def _start_from(self, state: State) -> str:
        """Do what makes it run from one state; return what that was, in words."""
        function, arguments, says = self.STARTERS[state]
        try:
            self._act(function, *arguments)
        except LibvirtError as problem:
            if state is not State.SAVED or isinstance(problem, HostAway):
                raise
            raise LibvirtError(
                f'{self.name}: its saved state can\'t be restored: {problem.message}', problem.code,
                problem.domain, f'cmd=start&discard=1, or {self.virsh("managedsave-remove")}, '
                'forgets it; it then boots anew, and what was not on its disks is lost') from None
        if state is State.ASLEEP:                       # the guest wakes up by itself
            self._await_waking()
        if state is State.SAVED and self.status().reason == 'booted':
            return 'booted anew: the saved state was not usable'
        return says

    def _wake_restored(self) -> None:
        """Wake a guest that somebody saved while it was asleep: QEMU 9.0 and later restore it
        asleep (system_wakeup), and libvirt takes it for running. Those before wake it to save it,
        but may save it before it is awake: it then waits for that for ever, and can't be helped."""
        try:
            status = checked('query-status', parse_answer(self._qmp('query-status')),
                             {'return': {'status': str}})['return']['status']
            if status == 'suspended':
                self._qmp('system_wakeup')
        except (GuestError, LibvirtError, ValueError) as problem:   # it is restored all the same
            log.debug('%s: query-status: %s', self.name, explain(problem))

    def _shut_down_by_agent(self, mode: str = 'powerdown') -> bool:
        asked = super()._shut_down_by_agent(mode)
        if asked:
            self.host.silent.discard(self.id)         # it was asked to go, it is not hung
        return asked

    def power_button(self) -> None:
        """Press the ACPI power button (virDomainShutdownFlags)."""
        self._act('virDomainShutdownFlags', SHUTDOWN_ACPI)

    # verb -> the function that does it, and its flags
    CHANGERS: Mapping[str, tuple[Any, ...]] = {
        'pause': ('virDomainSuspend',), 'resume': ('virDomainResume',),
        'reset': ('virDomainReset', 0), 'reboot': ('virDomainReboot', REBOOT_ACPI)}

    def _change(self, verb: str) -> None:
        if verb != 'reboot' or not self._shut_down_by_agent('reboot'):
            self._act(*self.CHANGERS[verb])

    def picture(self) -> bytes:
        """Return a PNG of what its screen shows (virDomainScreenshot)."""
        if self.is_off():
            raise WrongState(f'{self.name} is off: it shows nothing', 'start it first')
        with self._on(self.host.pictures) as (connection, handle):
            try:
                return png(connection.screenshot(handle), self.name)
            except LibvirtError as problem:
                problem.hint = problem.hint or 'it needs a <video> device'
                raise

    def power_off(self) -> str:
        """End it at once (virDomainDestroyFlags)."""
        if self.is_off():
            return 'already off'
        self._act('virDomainDestroyFlags', 0)
        return 'powered off'

    def save(self) -> str:
        """Save it so that it comes back running (virDomainManagedSave)."""
        state = self.state()
        if state is State.SAVED:
            return 'already saved'
        if state is State.ASLEEP:
            self._act('virDomainPMWakeup', 0)
            self._await_waking(whole=True)
        elif state not in (State.RUNNING, State.PAUSED):
            raise WrongState(f'{self.name} is {state.value} and can\'t be saved', 'start it first')
        self._act('virDomainManagedSave', SAVE_RUNNING)
        return 'saved'

    def discard(self) -> bool:
        """Forget the saved state (virDomainManagedSaveRemove)."""
        saved = self.state() is State.SAVED
        if saved:
            self._act('virDomainManagedSaveRemove', 0)
        return saved

    def autostarts(self) -> bool:
        """Tell whether libvirtd starts it at boot (virDomainGetAutostart)."""
        with self._on(self.host.queries) as (connection, handle):
            flag = _INT()
            connection.call('virDomainGetAutostart', handle, ctypes.byref(flag))
            return bool(flag.value)

    def _xml(self) -> xml.etree.ElementTree.Element:
        """Return its definition (virDomainGetXMLDesc)."""
        with self._on(self.host.queries) as (connection, handle):
            text = connection.library.take_string(connection.call('virDomainGetXMLDesc', handle, 0))
        # libvirt wrote it anew, so that it has no entities but XML's own.
        from xml.etree import ElementTree
        return ElementTree.fromstring(text)         # nosec B314

    def _qmp(self, command: str) -> str:
        """Return QEMU's own answer to a command (virDomainQemuMonitorCommand), JSON; one that hangs
        has none, and shall hold up no look-up."""
        with self._on(self.host.agents) as (connection, handle):
            answer = _PTR()
            connection.call('virDomainQemuMonitorCommand', handle,
                            json.dumps({'execute': command}).encode(), ctypes.byref(answer), 0)
            return connection.library.take_string(answer.value) if answer.value else ''

    # Guest agent

    @contextlib.contextmanager
    def _asking(self) -> Iterator[tuple[Connection, int]]:
        """Lend (connection, virDomainPtr) for an agent call; note whether the agent answers."""
        began, lent = time.monotonic(), False
        pool = self.host.slow if self.id in self.host.silent else self.host.agents
        try:
            with self._on(pool, BUSY_TIMEOUT) as (connection, handle):
                began, lent = time.monotonic(), True
                yield connection, handle
            self.host.silent.discard(self.id)
        except Busy as problem:
            if not lent:                # agents of other guests hang
                raise
            self.host.silent.add(self.id)           # another program's call to this one does
            raise self.agent_error(f'state change lock: {problem.message}') from None
        except HostAway:
            raise
        except LibvirtError as problem:
            error = self.agent_error(problem.message)
            if error.trouble is AGENT_TROUBLES[-1] and problem.code in AGENT_CODES:
                off = self.channel_state() == 'disconnected'
                error = self.agent_error('not connected' if off else AGENT_CODES[problem.code])
            if error.trouble.transient and time.monotonic() - began > AGENT_SILENT:
                self.host.silent.add(self.id)
            elif not error.trouble.transient:
                self.host.silent.discard(self.id)     # a refusal is an answer
            raise error from None

    def agent(self, command: str, arguments: Arguments = None,
              timeout: int = AGENT_TIMEOUT) -> Any:
        """Return what the guest agent answers (virDomainQemuAgentCommand)."""
        try:
            with self._asking() as (connection, handle):
                members = arguments() if callable(arguments) else arguments or {}
                question = json.dumps({'execute': command, 'arguments': dict(members)})
                text = connection.library.take_string(connection.call(
                    'virDomainQemuAgentCommand', handle, question.encode(), timeout, 0))
        except AgentError as problem:
            self._raise_if_frozen(command, problem)
            raise
        try:
            reply = parse_answer(text)
        except ValueError as problem:
            raise self.agent_error(f'no answer: {problem}: {text!r:.80}') from None
        return agent_answer(self.name, command, reply)

    def agent_state(self) -> str:
        """Return absent, disconnected, connected or silent: by its XML, and its last call."""
        return self._heard(self.channel_state())

    def _heard(self, channel: str) -> str:
        return 'silent' if channel != 'absent' and self.id in self.host.silent else channel

    def channel_state(self) -> str:
        """Return absent, disconnected or connected: what the domain's XML says."""
        for channel in self._xml().iterfind('devices/channel/target'):
            if channel.get('name') == 'org.qemu.guest_agent.0':     # libvirt speaks to no other
                return channel.get('state', 'disconnected')
        return 'absent'

    def remembered(self) -> tuple[Status, str] | None:
        found = self.host.remembered(self.uuid)
        return found and (found[0], self._heard(found[1]))

    def _look(self) -> tuple[Status, str]:
        status, channel = self.host.look_at(self)
        return status, self._heard(channel)

    def check_step(self, offset: int) -> None:
        """Raise OutOfStep unless its host is in step; look at its others when that is news."""
        if self.host.step.check(self, offset):
            spawn(f'check {self.host.name}', self.host.tell_running)

    def set_time(self, when: Callable[[], int] | int | None) -> None:
        """Set its clock, as Guest.set_time().

        A guest with tickpolicy="catchup" is also told to forget the ticks that it missed (QMP
        rtc-reset-reinjection): it would add them to the time that was just set.
        """
        super().set_time(when)
        try:
            timers = self._xml().iterfind('clock/timer[@name="rtc"]')
            if any(timer.get('tickpolicy') == 'catchup' for timer in timers):
                self._qmp('rtc-reset-reinjection')
        except (GuestError, LibvirtError) as problem:       # the time is set all the same
            log.debug('%s: rtc-reset-reinjection: %s', self.name, explain(problem))


# === figures ====================================================================================

NOTIFY_TIMEOUT = 30.0          # for notify.command ...
NOTIFY_PAUSES = 5, 15, 45, 120  # ... and s until one that failed is run again: no network yet?
NOTICES_WAITING = 100          # for it; what is more is lost
BUCKETS = {f'{limit:g}': limit for limit in (       # of histograms, in seconds
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)}
BUCKETS['+Inf'] = math.inf
ESCAPES = str.maketrans({'\\': r'\\', '"': r'\"', '\n': r'\n'})     # in values of labels


class Figure(NamedTuple):
    """A row of the table of what GET /metrics shows."""

    kind: str                   # counter, gauge or histogram
    help: str
    labels: tuple[str, ...] = ()


FIGURES = {
    'guests': Figure('gauge', 'Guests by state.', ('state',)),
    'guest_agent_up': Figure('gauge', 'Whether the agent of a guest is connected and answered '
                             'what it was asked last.', ('guest',)),
    'clock_offset_seconds': Figure('gauge', "How far a guest's clock was off, before and after "
                                   'its last correction.', ('guest', 'when')),
    'corrections_total': Figure('counter', 'Clocks corrected.', ('cause',)),
    'correction_failures_total': Figure('counter', 'Clocks that could not be corrected.',
                                        ('cause', 'trouble')),
    'right_seconds': Figure('histogram', 'From what made a clock wrong to its setting.', ('le',)),
    'commands_total': Figure('counter', 'Commands carried out.', ('command', 'result')),
    'request_seconds': Figure('histogram', 'How long requests took.', ('le',)),
    'wrong_keys_total': Figure('counter', 'Requests with a wrong key, or one for other guests.'),
    'host_up': Figure('gauge', 'Whether a host can be asked.', ('host',)),
    'host_reconnects_total': Figure('counter', 'How often a host came back.', ('host',)),
    'build_info': Figure('gauge', 'The version of vmmonitor.', ('version', 'python'))}
Samples = dict[tuple[str, tuple[str, ...]], float]      # (name, values of its labels) -> value


class Figures:
    """What was counted since the program began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Samples = collections.defaultdict(float)

    def count(self, name: str, *labels: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self._counts[name, labels] += 1

    def observe(self, name: str, seconds: float) -> None:
        """Add a time to a histogram."""
        with self._lock:
            for limit, most in BUCKETS.items():
                self._counts[f'{name}_bucket', (limit,)] += seconds <= most
            self._counts[f'{name}_count', ()] += 1
            self._counts[f'{name}_sum', ()] += seconds

    def text(self, now: Samples) -> str:
        """Return all figures, those of `now` among them, as Prometheus reads them."""
        with self._lock:
            values = {**self._counts, **now}
        lines = []
        for name, row in FIGURES.items():
            keys = sorted(key for key in values if key[0] == name)
            if row.kind == 'histogram':
                keys = [(f'{name}_bucket', (limit,)) for limit in BUCKETS]
                keys += [(f'{name}_sum', ()), (f'{name}_count', ())]
            lines += [f'# HELP vmmonitor_{name} {row.help}', f'# TYPE vmmonitor_{name} {row.kind}']
            for key in keys or [(name, ())] * (not row.labels):
                labels = ','.join(f'{label}="{value.translate(ESCAPES)}"'
                                  for label, value in zip(row.labels, key[1]))
                lines.append(f'vmmonitor_{key[0]}{labels and "{%s}" % labels} '
                             f'{values.get(key, 0):.10g}')
        return '\n'.join(lines) + '\n'


class Notices:
    """What is wrong now: notify.command is told of each thing once, and once when it is over."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.RLock()                  # guards these, and their order
        # (kind, a guest's id or what else it is about) -> what that is, what is wrong: a guest may
        # be renamed, and a machine have the name of a guest of libvirt
        self._now: dict[tuple[str, str], tuple[Guest | str, Error]] = {}
        self._told: set[tuple[str, str]] = set()        # those of which word was sent
        self._waiting: collections.deque[dict[str, Any]] = collections.deque()
        self.sending = False                            # a thread is at it
        self.ending = threading.Event()                 # the host goes down: without pauses

    def of(self, guest: Guest) -> list[str]:
        """Return what is wrong with a guest, in words."""
        found = (self._now.get((kind, key)) for kind in GUEST_NOTICES if self._now
                 for key in (guest.id, guest.name))
        return [explain(known[1]) for known in found if known]

    def troubled(self, kinds: Iterable[str] = GUEST_NOTICES) -> list[Guest]:
        """Return the guests with which something is wrong, of these kinds."""
        with self._lock:
            return [about for (kind, _), (about, _) in self._now.items()
                    if kind in kinds and isinstance(about, Guest)]

    @staticmethod
    def _keys(about: Guest | str) -> Sequence[str]:
        """Return what something may have been begun as: a list has a guest by any of its names."""
        return (about,) if isinstance(about, str) else (
            about.id, about.name, about.own, about.full_name)

    def concerns(self, guest: Guest) -> bool:
        """Tell whether something is wrong with a guest, or with one of its names."""
        return bool(self._now) and any(
            row in self._now for row in itertools.product(GUEST_NOTICES, self._keys(guest)))

    def begin(self, kind: str, about: Guest | str, problem: Error) -> bool:
        """Tell of a problem, of a kind in NOTICES, with a guest, or with what is called so; tell
        whether it is news."""
        row = kind, self._keys(about)[0]
        with self._lock:
            news = row not in self._now
            self._now[row] = about, problem
            if news:
                self._tell(row, False, about, problem)
        return news

    def end(self, about: Guest | str, *kinds: str) -> None:
        """Tell that it is over, if it was begun; also of a name that no guest had then."""
        for row in itertools.product(kinds, self._keys(about)) if self._now else ():
            with self._lock:
                known = self._now.pop(row, None)
                if known:
                    self._tell(row, True, *known)

    def catch_up(self) -> None:
        """Tell of what was wrong before notify.command, or its kind, was there to be told; a clock
        that shall be left alone now is no trouble any more."""
        for guest in self.troubled(('clock',)):
            if self.settings.config.excludes(guest.own, guest.full_name):
                self.end(guest, 'clock')
        with self._lock:
            for row, known in self._now.items():
                if row not in self._told:
                    self._tell(row, False, *known)

    def _tell(self, row: tuple[str, str], over: bool, about: Guest | str, problem: Error) -> None:
        config, unheard = self.settings.config, over and row not in self._told
        name = about if isinstance(about, str) else about.name
        kind, known = row[0], told(problem)
        self._told.discard(row)
        if unheard or not config.notify_command or kind not in config.notify_kinds:
            return
        if len(self._waiting) >= NOTICES_WAITING:
            log.warning('notify.command is behind; it is not told: %s', known['error'])
            return
        self._waiting.append({'version': 1, 'kind': kind, 'name': name, 'over': over,
                              'at': utc(time.time()), 'host': os.uname().nodename, **known})
        if not over:
            self._told.add(row)
        if not self.sending:
            with contextlib.suppress(Error):            # the next word tries again
                spawn('notify', self._send)
                self.sending = True

    def _send(self) -> None:
        pauses = iter(NOTIFY_PAUSES)                    # for all words, until one gets through
        while True:
            with self._lock:
                self.sending = bool(self._waiting)
                if not self.sending:
                    return
                notice, config = self._waiting.popleft(), self.settings.config
            try:
                if config.notify_command:               # a reload may have taken it away
                    run(notifier(config), NOTIFY_TIMEOUT, json.dumps(notice).encode() + b'\n')
                pauses = iter(NOTIFY_PAUSES)
            except (Error, OSError) as problem:
                pause = 0 if self.ending.is_set() else next(pauses, 0)
                log.warning('notify.command: %s%s', explain(problem),
                            f'; run again in {pause} s' if pause else '')
                if pause:
                    self._waiting.appendleft(notice)
                    self.ending.wait(pause)


# === guests =====================================================================================

RECENT = 100                   # commands and corrections that are remembered ...
OFFSETS = 60                   # ... and offsets of a guest's clock
LOOKS, LOOK_PAUSE = 6, 10.0    # at a guest in trouble that can't be asked, and s between them
OTHERS_WAIT = 2.0              # for a host that is silent, when another one has told something ...
NAMED_WAIT = 0.2               # ... when that one is the HOST of HOST/NAME


class Guests:
    """One name space over the hosts of guests; one command per guest at a time."""

    ACTIONS: dict[str, Callable[[Guest], str]] = {
        'start': lambda guest: guest.start(), 'stop': lambda guest: guest.shut_down(),
        'save': lambda guest: guest.save(), 'wake': lambda guest: guest.wake(),
        'off': lambda guest: guest.power_off(),
        **{verb: operator.methodcaller('change', verb) for verb in Guest.CHANGES},
        'start anew': lambda guest: (guest.discard() and 'saved state discarded, ' or '')
        + guest.start()}

    # action -> the kind of notice when it fails
    FAILURES = {'start': 'start', 'start anew': 'start', 'wake': 'start', 'stop': 'stop',
                'save': 'stop', 'off': 'stop'}
    CURES = {State.RUNNING: ('start', 'io-error', 'crashed'),       # what is over then
             State.OFF: ('clock', 'stop', 'io-error', 'crashed'),
             State.SAVED: ('clock', 'stop', 'io-error', 'crashed')}
    # What was known is of an earlier life of the guest then, or may be: events were lost.
    ENDS = frozenset(('booted', 'stopped', 'off', 'reverted', 'found'))

    def __init__(self, hosts: Sequence[GuestHost], settings: Settings | None = None) -> None:
        self.hosts = list(hosts)
        self.settings = settings or Settings(Config())
        self.figures, self.notices = Figures(), Notices(self.settings)
        self.corrections: dict[str, Correction] = {}    # id of a guest -> the last one of its life
        self.commands: dict[str, dict[str, Any]] = {}   # id of a guest -> the last one, as JSON
        self.recent: collections.deque[tuple[Guest, dict[str, Any], int]] = collections.deque(
            maxlen=RECENT)                          # guest, what is shown, when it came (us)
        self.lists: dict[str, str] = {}             # "startup" -> where that list is now
        self.offsets: dict[str, collections.deque[tuple[int, float]]] = {}  # id -> of its clock,
        #                                             the last ones found: seconds since 1970, ms
        self.leads: dict[str, dict[str, int]] = {}  # id -> cause -> Correction.lead
        # id of a guest -> why, and when, it will be looked at, by one thread, however often; and
        # how many more times if it can't be asked
        self._looks: dict[str, tuple[GuestEvent, Deadline, int]] = {}
        self._looking = threading.Lock()            # guards _looks
        # id of a guest -> the command that it carries out, its name
        self._busy: dict[str, tuple[str, str]] = {}
        self._waiting: list[str] = []               # id of the guest of each command that waits
        self._free = threading.Condition()          # guards these, _ended; notified when one ends
        self._ended = False                         # no command begins any more

    def ask(self, question: Callable[[GuestHost], Result], timeout: float = ANSWER_TIMEOUT,
            hosts: Sequence[GuestHost] | None = None, named: bool = False,
            recall: Callable[[GuestHost, Mapping[str, Guest]], Result] | None = None
            ) -> list[tuple[GuestHost, Result | Error]]:
        """Ask all hosts at once and return their answers, or why there is none; of a host whose
        guests are known, what `recall` makes of these.

        When another one has had something to tell, a host that is connected and silent is waited
        for no longer than OTHERS_WAIT; any host for NAMED_WAIT when the right one was `named`.
        """
        hosts = self.hosts if hosts is None else hosts
        answers: dict[GuestHost, Result | Error] = {}
        if recall:
            answers = {host: recall(host, known) for host in hosts
                       for known in [host.known()] if known is not None}
        if len(answers) == len(hosts):
            return [*answers.items()]
        asked: dict[concurrent.futures.Future[Result], GuestHost] = {
            in_thread(host.name, question, host): host for host in hosts if host not in answers}
        deadline = Deadline(timeout)
        done, late = concurrent.futures.wait(
            asked, min(NAMED_WAIT if named else OTHERS_WAIT, timeout))
        while late and not deadline.passed() and not (
                (named or all(asked[future].up.is_set() for future in late))
                and (any(not future.exception() and future.result() for future in done)
                     or any(answers.values()))):
            news, late = concurrent.futures.wait(late, deadline.left(), 'FIRST_COMPLETED')
            done |= news
        for future, host in asked.items():
            try:
                answers[host] = future.result(0)
            except concurrent.futures.TimeoutError:
                answers[host] = HostAway(f'{host.name} does not answer',
                                         hint='try again in a moment')
            except (Error, OSError) as failed:
                answers[host] = problem = as_error(failed, HostAway)
                if host.prefix and host.name not in problem.message:
                    problem.message = f'{host.name}: {problem.message}'
        return [(host, answers[host]) for host in hosts]

    def meanings(self, name: str) -> list[tuple[GuestHost, str]]:
        """Return what a name without a "/" of its own means: (host, the guest's own name there)."""
        label, _, own = name.partition('/')
        return [(host, own) for host in self.hosts if own and host.label == label] or [
            (host, name) for host in self.hosts]

    def find(self, name: str, timeout: float = ANSWER_TIMEOUT,
             reached: Callable[[Guest], bool] = lambda _: True,
             hosts: Sequence[GuestHost] | None = None) -> Guest:
        """Return the guest NAME or HOST/NAME, of those that are `reached`; NoGuest if there is
        none, Ambiguous if several hosts have one.

        A host that can't be asked hides nobody else's guests. Whether one of its own has that
        name is not known then, and its error says so.
        """
        meant = dict(self.meanings(name))

        def look(host: GuestHost, find: Callable[[str], Guest | None]) -> Guest | None:
            found = (find(own) for own in dict.fromkeys((name, meant.get(host, name))))
            return next((guest for guest in found if guest and reached(guest)), None)
        answers = self.ask(lambda host: look(host, host.find), timeout, hosts,
                           named=len(meant) < len(self.hosts),
                           recall=lambda host, known: look(host, known.get))
        found = [guest for _, guest in answers if guest and not isinstance(guest, Error)]
        found = [guest for guest in found if not guest.damage] or found     # which hides no other
        found = [guest for guest in found if guest.own == name] or found    # a "/" may be in it
        if len(found) > 1:
            choices = [guest.full_name for guest in found]
            raise Ambiguous(f'{name} can be {" or ".join(choices)}', 'say which')
        if found:
            return found[0]
        raise next((answer for host, answer in answers if isinstance(answer, Error)
                    and host in meant), NoGuest(f'no guest is named {name}', 'list shows them'))

    def names(self, hosts: Sequence[GuestHost], away: list[Error]) -> dict[str, list[Guest]]:
        """Return the guests of these hosts by NAME and HOST/NAME; add to `away` why one can't be
        asked."""
        names: dict[str, list[Guest]] = collections.defaultdict(list)
        for guest in self.all(away=away, hosts=hosts):
            names[guest.own].append(guest)
            names[guest.full_name].append(guest)
        return names

    def all(self, running: bool = False, away: list[Error] | None = None,
            timeout: float = ANSWER_TIMEOUT, hosts: Sequence[GuestHost] | None = None
            ) -> list[Guest]:
        """Return guests by name; add to `away` why a host can't be asked, or raise that."""
        found: list[Guest] = []
        for _, answer in self.ask(lambda host: host.all(running), timeout, hosts, recall=None
                                  if running else lambda _, known: [*known.values()]):
            if not isinstance(answer, Error):
                found += answer
            elif away is None:
                raise answer
            else:
                away.append(answer)
        return found

    def heard(self, event: GuestEvent) -> None:
        """Have a guest looked at that may be in trouble, or out of it."""
        if event.kind in self.ENDS:
            self.corrections.pop(event.guest.id, None)
        stuck = event.kind in ('stopped', 'stuck')
        if stuck or self.notices.concerns(event.guest): # with a full disk it soon stops again
            with self._looking:
                if event.guest.id not in self._looks:
                    spawn(f'look {event.guest.name}', self._keep_looking, event.guest.id)
                elif event.kind == 'again':
                    return                              # what is to come tells more
                self._looks[event.guest.id] = event, Deadline(
                    0 if stuck else 2 * TROUBLED_MOMENT), LOOKS

    def look_again(self, host: GuestHost) -> None:
        """Have the guests in trouble of a host that is back looked at: they may be gone."""
        for guest in self.notices.troubled():
            if guest.full_name.startswith(f'{host.label}/'):
                self._look_again(guest)

    def connected(self, guest: Guest) -> bool:
        """Tell whether the host of a guest is there."""
        return any(host.up.is_set() and guest.full_name.startswith(f'{host.label}/')
                   for host in self.hosts)

    def _look_again(self, guest: Guest) -> None:
        with contextlib.suppress(Error):            # no thread for it
            self.heard(GuestEvent(guest, 'again', time.monotonic()))

    def _trouble(self, kind: str, guest: Guest, problem: Error) -> None:
        """Send word, and look at the guest: the event that ends this may have come before."""
        if self.notices.begin(kind, guest, problem):
            self._look_again(guest)

    def _keep_looking(self, id: str) -> None:
        """Look at a guest until that was done after its last event: it may have any number."""
        over = False
        while not over:
            with self._looking:
                event, when, left = wanted = self._looks[id]
            if not when.passed():
                time.sleep(min(STATE_POLL, when.left()))        # something else may happen
                continue
            over, seen = True, False
            try:
                seen, over = self._look_at(event), False
            finally:
                with self._looking:
                    if self._looks[id] is wanted and not (over or seen) and left:
                        self._looks[id] = event, Deadline(LOOK_PAUSE), left - 1
                    over = over or self._looks[id] is wanted
                    if over:
                        del self._looks[id]
            time.sleep(0 if over else STATE_POLL)

    def _look_at(self, event: GuestEvent) -> bool:
        """See what is wrong with a guest, and what is over; tell whether it could be asked."""
        guest = event.guest
        try:
            status = guest.status()
        except NoGuest:                                 # it was the last event of that one
            self.notices.end(guest, *GUEST_NOTICES)
            kept: tuple[dict[str, Any], ...] = (
                self.commands, self.offsets, self.corrections, self.leads)
            for known in kept:
                known.pop(guest.id, None)
        except (GuestError, LibvirtError, OSError) as problem:  # it may hang, its host be there
            log.debug('%s: %s', guest.name, explain(problem))
            return False
        else:
            if status.state is State.OFF:
                status = status._replace(reason=status.reason or event.reason)
            kind = '' if status.reason not in TROUBLES else \
                'io-error' if status.reason == IO_ERROR else 'crashed'
            if status.state is State.RUNNING and event.kind in ('stopped', 'stuck'):
                return True                             # again: its event has it looked at, too
            self.notices.end(guest, *(
                cured for cured in self.CURES.get(status.state, ()) if cured != kind))
            if kind and event.kind not in ('off', 'again'):     # then it is none of now
                self.notices.begin(kind, guest, WrongState(
                    f'{guest.name} is {status}', TROUBLES[status.reason]))
        return True

    def act(self, action: str, guest: Guest, patience: float = BUSY_TIMEOUT,
            tell: bool = True) -> str:
        """Carry out a command of ACTIONS and return what was done, in words.

        What became of it stays in `commands`; `tell` sends word if it fails. Raises Busy when
        another command for this guest does not end within `patience` seconds.
        """
        kind = self.FAILURES.get(action, '')
        with self._alone(guest, action, Deadline(patience)):
            known: dict[str, Any] = {'cmd': action, 'at': utc(time.time())}
            self.commands[guest.id] = {**known, 'result': 'goes on'}
            try:
                says = self._sync(guest) if action == 'sync' else self.ACTIONS[action](guest)
            except Exception as problem:
                error = as_error(problem)
                self.commands[guest.id] = {**known, **told(error)}
                self.figures.count('commands_total', action, type(problem).__name__)
                if kind and tell:
                    self._trouble(kind, guest, error)
                self.note(guest, f'{action} {guest.name}: {explain(problem)}', failed=True)
                raise
            self.commands[guest.id] = {**known, 'result': says}
            self.figures.count('commands_total', action, 'done')
            self.notices.end(guest, kind)
            self.note(guest, f'{action} {guest.name}: {says}')
            return says

    def _sync(self, guest: Guest) -> str:
        config, result = self.settings.config, Correction(guest.name)
        try:
            correct(guest, round(config.tolerance * MS), config.allow_exec, result)
        except (AgentError, ClockError) as problem:
            self.uncorrected(guest, result.cause, problem)
            raise
        self.corrected(guest, result)
        return str(result)[len(guest.name) + 2:]

    def uncorrected(self, guest: Guest, cause: str, problem: Error) -> str:
        """Count a clock that could not be corrected, and send word; return what the trouble is."""
        trouble = problem.trouble.name if isinstance(problem, AgentError) else 'clock'
        self.figures.count('correction_failures_total', cause, trouble)
        self._trouble('clock', guest, problem)
        return trouble

    def corrected(self, guest: Guest, result: Correction) -> None:
        """Keep what was found of a clock, which is right now."""
        self.notices.end(guest, 'clock')
        self.offsets.setdefault(guest.id, collections.deque(maxlen=OFFSETS)).extend(
            (round(result.when), offset / MS) for offset in
            ([result.before] if result.method else []) + [result.after])
        if result.method:
            self.figures.count('corrections_total', result.cause)
            self.figures.observe('right_seconds', result.right)
            if result.cause != 'sync':                  # else act() does
                self.note(guest, str(result))
        if result.method or guest.id not in self.corrections:
            self.corrections[guest.id] = result

    def note(self, guest: Guest, text: str, failed: bool = False) -> None:
        """Add a line to the last commands and corrections, which `cmd=log` shows."""
        self.recent.append((guest, {'at': utc(time.time()), 'guest': guest.name,
                                    'text': clip(text), 'failed': failed},
                            time.monotonic_ns() // 1000))

    @contextlib.contextmanager
    def _alone(self, guest: Guest, action: str, deadline: Deadline) -> Iterator[None]:
        """Keep others from giving a guest commands, also other programs; Busy if one does."""
        with self._free:
            while self._ended or guest.id in self._busy:
                if self._ended:
                    raise Busy(f'{guest.name}: {action}: vmmonitor is ending', 'try again later')
                if deadline.passed():
                    raise Busy(f'{guest.name} is busy: "{self._busy[guest.id][0]}" has not ended',
                               'try again later')
                self._waiting.append(guest.id)
                self._free.wait(deadline.left())
                self._waiting.remove(guest.id)
            self._busy[guest.id] = action, guest.name
        try:
            with guest_turn('guest', guest, deadline) as holder:
                if holder is not None:
                    raise Busy(f'{guest.name} is busy: another program has not ended its command',
                               'try again later')
                yield
        finally:
            with self._free:
                del self._busy[guest.id]
                self._free.notify_all()

    def waiting(self, guest: Guest) -> int:
        """Return how many commands for a guest wait for the one that goes on."""
        with self._free:
            return self._waiting.count(guest.id)

    def busy(self, guest: Guest) -> bool:
        """Tell whether a command of this program goes on for a guest."""
        with self._free:
            return guest.id in self._busy

    def end(self, timeout: float) -> None:
        """Let no command begin, and wait until none is under way: what goes on after `timeout` is
        named in the log."""
        with self._free:
            self._ended = True
            if not self._free.wait_for(lambda: not self._busy, timeout):
                log.warning('ending while these go on: %s', ', '.join(
                    f'{action} of {name}' for action, name in self._busy.values()))

    def ready(self, stopping: threading.Event, names: Iterable[str], far: bool = True) -> bool:
        """Wait until every host is connected, or those that are have all of `names`; or (False)
        until `stopping`. Without `far`, other machines of several are not waited for."""
        hosts = [host for host in self.hosts if far or host.here or not host.prefix]
        while not all(host.up.wait(STATE_POLL) for host in hosts):
            if stopping.is_set():
                return False
            with contextlib.suppress(LibvirtError):     # one is away, or hangs
                for name in names:
                    with contextlib.suppress(GuestError):       # that is said later
                        self.find(name)
                break
        return not stopping.is_set()


# === monitor ====================================================================================

class ClockJob:
    """The one clock job of a guest; the Monitor's lock guards `again`."""

    def __init__(self, event: GuestEvent) -> None:
        self.event = event                              # what it is about
        self.again: GuestEvent | None = None         # came meanwhile: run once more
        self.nudge = threading.Event()                  # set with `again`, and `past`
        self.late = False                               # see Correction.late
        self.past = False                               # it began in a life before of the guest


class Monitor:
    """Events -> at most one clock job per guest; a trigger during a job makes it run again."""

    NO_TRIGGERS = frozenset(('booted', 'stopped', 'off', 'stuck'))  # a boot is "resumed", too
    NEW_START = frozenset(('booted', 'started', 'restored', 'reverted', 'migrated'))
    UNTOLD = frozenset(('silent', 'busy', 'frozen'))        # AgentTrouble whose end no event tells

    def __init__(self, guests: Guests, settings: Settings) -> None:
        self.guests, self.settings = guests, settings
        self.events: queue.SimpleQueue[GuestEvent | None] = queue.SimpleQueue()
        self._jobs: dict[str, ClockJob] = {}            # id -> the job that runs
        self._told: dict[str, set[str]] = {}            # id -> complaints since its start
        self._lock = threading.Lock()                   # guards _jobs, _told and corrections
        self._stopping = threading.Event()
        self._checks: queue.SimpleQueue[str] = queue.SimpleQueue()      # why to check all guests
        self._timer: ClockSetTimer | None = None

    def start(self) -> None:
        """Start the threads that take events, check all guests, and watch the host's clock."""
        spawn('monitor', self._take_events)
        spawn('checks', self._check_all)
        try:
            self._timer = ClockSetTimer()
        except OSError as problem:
            log.warning('the host\'s clock can\'t be watched: %s; monitor.checkInterval helps',
                        explain(problem))
        else:
            spawn('host-clock', self._watch_host, self._timer)

    def check(self, cause: str = '') -> None:
        """Have all guests checked; without a cause, have a new monitor.checkInterval count."""
        self._checks.put(cause)

    def stop(self) -> None:
        self._stopping.set()
        with self._lock:
            for job in self._jobs.values():
                job.nudge.set()
        self.events.put(None)
        self.check()
        timer, self._timer = self._timer, None
        if timer:
            timer.stop()

    def trigger_all(self, cause: str, hosts: Sequence[GuestHost]) -> list[GuestHost]:
        """Check every running guest of these hosts; return those that can't be asked now."""
        def trigger(host: GuestHost) -> bool:
            for guest in host.all(running=True):
                self.events.put(GuestEvent(guest, cause, time.monotonic()))
            return True
        answers = self.guests.ask(trigger, hosts=hosts)
        for problem in (answer for _, answer in answers if isinstance(answer, Error)):
            log.debug('%s: %s', cause, explain(problem))
        return [host for host, answer in answers if isinstance(answer, Error)]

    def _take_events(self) -> None:
        for event in iter(self.events.get, None):
            try:
                self._take(event)
            except Error as problem:    # no more threads: it waits for one
                self._complain(event.guest, 'thread', explain(problem))
                self._stopping.wait(STATE_POLL)
                self.events.put(event)
            except Exception:           # one event that can't be handled must not end the rest
                log.exception('%s: unexpected error', event.kind)

    def _take(self, event: GuestEvent) -> None:
        """Start a job, or have the one that runs look again."""
        key, config = event.guest.id, self.settings.config
        log.debug('%s: %s', event.guest.name, event.kind)
        with self._lock:
            if event.kind in (*self.NEW_START, 'stopped', 'off'):
                self._told.pop(key, None)
            job = self._jobs.get(key)
            if event.kind in self.guests.ENDS:
                self.guests.corrections.pop(key, None)      # again: the job may have found one
                if job and event.kind != 'booted':      # which comes after the "resumed" of a boot
                    job.past = True
                    job.nudge.set()                     # it finds that it is off, and ends
            if job and event.kind == 'booted':
                job.event = job.event._replace(kind='booted')
            if event.kind in self.NO_TRIGGERS or config.excludes(
                    event.guest.own, event.guest.full_name):
                return
            if job:
                job.again = event
                job.nudge.set()
                return
            job = self._jobs[key] = ClockJob(event)
        try:
            spawn(f'clock {event.guest.name}', self._work, job)
        except Error:
            with self._lock:
                del self._jobs[key]
            raise

    def _work(self, job: ClockJob) -> None:
        """Run the job, and again as long as triggers came while it ran."""
        key = job.event.guest.id
        while True:
            guest = job.event.guest
            try:
                self._run(job)
            except Exception:           # a bug in one job must not end the clock of this guest
                log.exception('%s: unexpected error', guest.name)
            alone = self.settings.config.excludes(guest.own, guest.full_name)
            if alone:                       # since a reload: what was found is no trouble then
                self.guests.notices.end(guest, 'clock')
            with self._lock:
                if not job.again or self._stopping.is_set() or alone:
                    del self._jobs[key]
                    return
                job.event, job.again, job.past = job.again, None, False
                job.nudge.clear()

    def _run(self, job: ClockJob) -> None:
        guest = job.event.guest
        learned = self.guests.leads.get(guest.id, {})   # one that is emulated sets it some ms late
        result = Correction(guest.name, job.event.kind, began=job.event.when, late=job.late,
                            lead=learned.get(job.event.kind, 0))
        try:
            synchronise(guest, self.settings.config, result, job.nudge)
        except (WrongState, NoGuest, HostAway, OutOfStep) as problem:
            # It was stopped or paused meanwhile, or libvirt is: an event will bring us back, but
            # for a libvirt that has no room for one more while it stays connected.
            log.debug('%s: clock left alone: %s', guest.name, explain(problem))
            if isinstance(problem, HostAway) and self.guests.connected(guest):
                self._run_again(job, UNTOLD_PAUSE)
            return
        except (Error, OSError) as failed:
            trouble = as_error(failed, Busy)
            kind = self.guests.uncorrected(guest, job.event.kind, trouble)
            self._complain(guest, kind, f'clock not corrected after "{job.event.kind}": '
                           f'{explain(trouble)}')
            # No event tells when the agent comes back and takes a late setting, nor when it answers
            # again, its file systems are thawed, agents that hang leave a line to libvirt, or a
            # guest that was too busy, or had no memory left, no longer is.
            if result.late or kind in self.UNTOLD or isinstance(trouble, Busy):
                self._run_again(job, 0 if result.late else UNTOLD_PAUSE)
            elif kind in ('clock', 'refused'):
                self._run_again(job, UNSET_PAUSE)
            return
        finally:
            job.late = result.late
            if result.method and abs(result.missed) <= LEAD_MAX:
                self.guests.leads[guest.id] = {**learned, job.event.kind: max(
                    0, min(result.lead - result.missed, LEAD_MAX))}
        result.cause = job.event.kind
        with self._lock:
            if not job.past:
                self.guests.corrected(guest, result)
        log.log(logging.INFO if result.method else logging.DEBUG, '%s', result)
        if result.warning:
            self._complain(guest, 'warning', f'the clock is right, but: {result.warning}')

    def _run_again(self, job: ClockJob, pause: float) -> None:
        """Have a job run once more after a pause, or as soon as something happens to its guest."""
        if not job.again:                   # of which synchronise() may have taken the nudge
            job.nudge.wait(pause)
        with self._lock:
            job.again = job.again or job.event

    def _complain(self, guest: Guest, kind: str, text: str) -> None:
        """Log a warning, each kind once per start of the guest."""
        with self._lock:
            told = self._told.setdefault(guest.id, set())
            news = kind not in told
            told.add(kind)
        if news:
            self.guests.note(guest, f'{guest.name}: {text}', failed=True)
        log.log(logging.WARNING if news else logging.DEBUG, '%s: %s', guest.name, text)

    def _watch_host(self, timer: ClockSetTimer) -> None:
        """Have all checked when the host slept or its clock was set: libvirt does not tell."""
        seen = HostClock.now()
        while timer.wait():
            now = HostClock.now()
            jump, seen = now.jump_since(seen), now
            log.log(logging.WARNING if jump else logging.INFO, '%s; checking all guests',
                    jump or 'host clock set')
            self.check(jump or 'host clock set')
        timer.close()

    def _check_all(self) -> None:
        """Check all guests when there is a cause, and every monitor.checkInterval."""
        checked, cause = time.monotonic(), ''
        away: list[GuestHost] = []              # they are asked once more, in a moment
        while not self._stopping.is_set():
            interval = self.settings.config.check_interval
            due = checked + interval - time.monotonic() if interval else math.inf
            pause = max(0.0, min(due, AWAY_PAUSE if away else due))
            try:
                news = self._checks.get(timeout=None if math.isinf(pause) else pause)
            except queue.Empty:
                news = 'periodic check' if due <= 0 or not away else ''
            if news:
                cause, checked, away = news, time.monotonic(), self.guests.hosts
            away = self.trigger_all(cause, away)


# === startup ====================================================================================

START_RETRIES = 3              # further tries of a guest that failed to start ...
START_RETRY_PAUSE = 5.0        # ... this long apart
BACK_WAIT = 5.0                # on the way down, for a host that was there before
UNIT_RUN = '/run/vmmonitor-service'     # RuntimeDirectory= of the unit
MARK_BYTES = 1 << 16           # more than the number of a boot, and names that are left, have
REMEDY_SHARES = {'save': 0.25, 'off': 0.1}      # of what is left of shutdown.timeout, for "or save"


class BootMark:
    """Says whether something was done since the host booted: a file that the host forgets when it
    boots, with the number of the boot in case it does not, and lines with what is left to be done.

    It lies where the unit's RuntimeDirectory= is, in /run for root, else in the user's own place.
    """

    def __init__(self, name: str) -> None:
        own = os.environ.get('RUNTIME_DIRECTORY', '').partition(':')[0]
        place = own or (
            '/run' if os.geteuid() == 0 else os.environ.get('XDG_RUNTIME_DIR', '/nonexistent'))
        self.path = os.path.join(place, f'vmmonitor-{name}')
        # That of the service counts, too, for who runs it without an option; no other unit does.
        self.paths = [self.path] + [os.path.join(UNIT_RUN, f'vmmonitor-{name}')] * (not own)

    @staticmethod
    def _boot() -> bytes:
        """Return the number of this boot; the unit gives it, which hides /proc/sys."""
        return os.environ.get('VMMONITOR_BOOT', '').encode() or Path(
            '/proc/sys/kernel/random/boot_id').read_bytes().strip().replace(b'-', b'')

    def _lines(self, path: str) -> list[str]:
        # That of the service is in a directory of its user, and may be anything.
        with contextlib.suppress(OSError, FileError), open(open_file(path), 'rb') as mark:
            lines = mark.read(MARK_BYTES).split(b'\n')
            if lines[0] == self._boot():
                return [line.decode(errors='replace') for line in lines]
        return []

    def is_set(self) -> bool:
        return any(map(self._lines, self.paths))

    def left(self) -> list[str]:
        """Return what was left to be done when it was set."""
        return self._lines(self.path)[1:]

    def clear(self) -> None:
        """Have it done again at the next start of the program."""
        with contextlib.suppress(OSError):
            remove_file(self.path)

    def set(self, left: Iterable[str] = ()) -> None:
        try:
            write_whole(self.path, b'\n'.join([self._boot(), *(
                name.encode(errors='replace') for name in left)]), replace=True)
        except (Error, OSError) as problem:
            log.warning('%s can\'t be written, so that it will be done again when the program '
                        'starts: %s', self.path, explain(problem))


class GuestList:
    """What the lists for the way up and the way down have in common."""

    key = ''                    # of the list in the configuration
    what = ''                   # for the log

    def __init__(self, guests: Guests, lines: Sequence[Step]) -> None:
        self.guests, self.steps = guests, lines
        self.stopping = threading.Event()
        self._results: dict[str, str] = {}          # guest -> what was done, in words
        self.failed: dict[str, str] = {}            # guest -> why not
        self.away: list[Error] = []                 # why it is not known which guests are meant
        self._waiting: set[str] = set()             # guests whose host, another one, is away

    def _sum_up(self, began: float) -> None:
        done = ', '.join(f'{name} {says}' for name, says in [*self._results.items()])
        failed = ', '.join(f'{name} ({why})' for name, why in [*self.failed.items()])
        log.log(logging.WARNING if failed or self.away else logging.INFO,
                '%s: ended after %.1f s: %s%s', self.what, time.monotonic() - began, done or (
                    'not known what was to be done' if self.away else 'nothing was to be done'),
                failed and f'; failed: {failed}')

    def _actions(self) -> Iterator[Step]:
        """Yield the lines that do something to guests, each in its turn: the others have us wait,
        and one of them may end the list."""
        for step in self.steps:
            if self.stopping.is_set():
                return
            self.guests.lists[self.what] = f'line {step.number}: {step}'
            if step.verb == 'delay':
                self.stopping.wait(step.seconds)
            elif step.verb != 'wait':
                yield step
            elif not self._wait(step) and step.otherwise:
                return

    def begin(self, name: str, work: Callable[..., object], *args: Any) -> threading.Thread | None:
        """Do it in a thread of its own; here and now (None), when there is none to be had."""
        try:
            return spawn(name, work, *args)
        except Error as problem:
            log.warning('%s: one after the other: %s', self.what, explain(problem))
            work(*args)
            return None

    def _wait(self, step: Step) -> bool:
        """Wait as long as a line says for its guest, port or path; tell whether it is there."""
        began, until = time.monotonic(), ' '.join(filter(None, [step.until, step.what]))
        there = reached(step.name or step.what, lambda: self.stopping.is_set() or self._there(step),
                        Deadline(step.seconds))
        if self.stopping.is_set():
            return False
        log.log(logging.INFO if there else logging.WARNING, '%s: line %d: %s: %s after %.1f s%s',
                self.what, step.number, step.name or 'host',
                until if there else f'not yet "{until}"', time.monotonic() - began,
                '' if there else '; the list ends here' if step.otherwise else '; going on')
        return there

    def _there(self, step: Step) -> bool:
        if step.until == 'path':
            return os.path.exists(step.what)
        try:
            guest = self.guests.find(step.name)
        except NoGuest:
            return step.until == 'off'
        return guest.serves(int(step.what)) if step.until == 'port' else \
            GUEST_ENDS[step.until](guest)


class Startup(GuestList):
    """Carry out startup.vmStartupCommands: once, or with `mark` once since the host booted."""

    key, what = 'startup.vmStartupCommands', 'startup'

    def __init__(self, guests: Guests, lines: Sequence[Step], mark: BootMark | None = None) -> None:
        super().__init__(guests, lines)
        self.mark = mark
        self._marking = threading.Lock()            # guards these
        self._left: set[str] = set()                # starts that have begun, and not ended
        self._through = False                       # no line is to come

    def run(self) -> None:
        """Wait for the guests' hosts, go through the lines, wait for the last start, and sum up."""
        if self.mark and self.mark.is_set():
            left = self.mark.left()                 # for hosts that were away
            self.steps = [step for step in self.steps if step.verb == 'start' and step.name in left]
            log.info('startup: was done since this host booted%s; --startup does it again',
                     ''.join(f', but for {step.name}' for step in self.steps))
            if not self.steps:
                return
        names = {step.name for step in self.steps if step.name}
        if not self.guests.ready(self.stopping, names, far=False):
            return
        began = time.monotonic()
        threads = [(step.name, self.begin(f'start {step.name}', self._start, step.name))
                   for step in self._actions()]
        self.guests.lists[self.what] = 'waiting for the last guest'
        # Each start has a time limit; one whose host is away goes on in its thread.
        while any(thread and thread.is_alive() and name not in self._waiting
                  for name, thread in threads) \
                and not self.stopping.wait(STATE_POLL):
            pass
        del self.guests.lists[self.what]
        if self.stopping.is_set():
            return
        self._note()
        self._sum_up(began)

    def _note(self, ended: str = '') -> None:
        """Have the mark tell which starts are left, when no line is to come."""
        with self._marking:
            self._left.discard(ended)
            self._through = self._through or not ended
            if self.mark and self._through and not self.stopping.is_set():
                self.mark.set(self._left)

    def _ready(self, name: str) -> bool:
        """Wait until a guest's host is there; False if we are stopping."""
        if any(host.prefix and not host.here and not host.up.is_set()
               for host, _ in self.guests.meanings(name)):
            try:
                self.guests.find(name)
            except LibvirtError as problem:         # the list does not wait for that
                self.failed[name] = explain(problem)
                self._waiting.add(name)
            except GuestError:
                pass                                # the start will say it
        ready = self.guests.ready(self.stopping, [name])
        self._waiting.discard(name)
        return ready

    def _start(self, name: str) -> None:
        self._left.add(name)
        for attempt in range(1 + START_RETRIES):
            if attempt:
                self.stopping.wait(START_RETRY_PAUSE)
            if not self._ready(name):
                return
            about: Guest | str = name
            try:
                about = guest = self.guests.find(name)
                if self.stopping.is_set():          # the way down has looked who is on
                    return
                says = self.guests.act('start', guest, tell=False)
            except (Error, OSError) as problem:
                self.failed[name] = explain(problem)
                left = START_RETRIES - attempt
                if not left:
                    self.guests.notices.begin('start', about, as_error(problem))
                log.log(logging.WARNING if left else logging.ERROR,
                        'startup: start %s failed: %s; %s', name, explain(problem),
                        f'{left} more tries' if left else 'given up')
            else:
                self.failed.pop(name, None)
                self._results[name] = says
                log.info('startup: %s %s', name, says)
                break
        self._note(ended=name)

    def plan(self) -> Iterator[str]:
        for step in self.steps:
            state = ''
            if step.verb == 'start':
                try:
                    state = f': it is {self.guests.find(step.name).status()}'
                except Error as problem:
                    state = f': {explain(problem)}'
            limit = f', {step.seconds:g} s at most' if step.verb == 'wait' else ''
            yield f'{step}{state}{limit}' + (f', or {step.otherwise}' if step.otherwise else '')


class Shutdown(GuestList):
    """Carry out shutdown.vmShutdownCommands, within shutdown.timeout."""

    key, what = 'shutdown.vmShutdownCommands', 'shutdown'

    def __init__(self, guests: Guests, config: Config) -> None:
        super().__init__(guests, config.shutdown_steps)
        self.limit = Deadline(config.shutdown_timeout)
        # name in the start list -> how many delays and waits come before it
        self.place = {step.name: sum(before.verb != 'start' for before in config.steps[:number])
                      for number, step in enumerate(config.steps) if step.verb == 'start'}
        self.total = 0                              # guests that were on
        self._found: set[str] = set()               # names of those that there are
        self._on: dict[str, Guest] = {}             # those that still are on, by name
        self._waits: dict[str, float] = {}          # name -> since when it is being ended

    def run(self) -> None:
        """Go through the lines, wait for the last guest or for the limit, and sum up."""
        began = time.monotonic()
        self._find()
        self._end_of(self.begin('shutdown list', self._work))
        self.stopping.set()
        for problem in self.away:
            log.error('shutdown: %s', explain(problem))
        for name, since in [*self._waits.items()]:
            self.failed.setdefault(name, f'still on after {time.monotonic() - since:.0f} s')
        for name in [name for step in self.steps if step.verb != 'wait'
                     for names in self.named(step) for name in names]:
            self.failed.setdefault(name, 'still on: its turn did not come')
        for name, why in [*self.failed.items()]:        # threads may still be at it
            self.guests.notices.begin('stop', self._on.get(name, name), Error(f'{name}: {why}'))
        self._sum_up(began)
        self.guests.notices.ending.set()
        Deadline(NOTIFY_TIMEOUT).poll(lambda: not self.guests.notices.sending)

    def _find(self) -> None:
        """Find out which guests of this host are on, and what their lines call them."""
        here = [host for host in self.guests.hosts if host.here]
        # A libvirtd that is just being restarted is back in a moment.
        Deadline(BACK_WAIT).poll(lambda: all(host.up.is_set() or not host.links for host in here))
        names = self.guests.names(here, self.away)
        names.pop('all', None)                      # one that is named so is HOST/all in a list
        guests = {guest.id: guest for named in names.values() for guest in named}
        called = {guest.id: next((name for name in (guest.name, guest.own, guest.full_name)
                                  if len(names.get(name, ())) == 1), guest.name)
                  for guest in guests.values()}     # what it alone is named
        full = {name: called[named[0].id] for name, named in names.items() if len(named) == 1}
        self.away += [Ambiguous(f'{step.name} can be ' + ' or '.join(
            called[guest.id] for guest in names[step.name]), 'say which')
            for step in self.steps if step.name in names and step.name not in full]
        self.steps = [step._replace(name=full.get(step.name, step.name)) for step in self.steps]
        self.place = {full.get(name, name): place for name, place in self.place.items()}
        self._found.update(called.values())
        for guest, known in zip(guests.values(), ask_all(
                [*guests.values()], lambda guest: {'off': guest.is_off()}, ANSWER_TIMEOUT)):
            # What can't be asked counts as on, and so does what is just being started.
            if not known.get('off') or self.guests.busy(guest):
                self._on[called[guest.id]] = guest
        self.total = len(self._on)

    def progress(self) -> str:
        """Return how far it is, for people."""
        slowest = min([*self._waits.items()], key=lambda item: item[1], default=None)
        return f'{self.total - len(self._on)} of {self.total} off' + (
            f', waiting for {slowest[0]}: {time.monotonic() - slowest[1]:.0f} s' if slowest else '')

    def _work(self) -> None:
        self._end_of(*[self.begin(f'{step.verb} {step.name}', self._end_all, step)
                       for step in self._actions()])

    def _end_of(self, *threads: threading.Thread | None) -> None:
        """Wait for these, as long as the whole way down may take."""
        for thread in filter(None, threads):
            thread.join(self.limit.left())

    def _there(self, step: Step) -> bool:
        guest = self._on.get(step.name)             # no look-up: another host may hang
        return not self.guests.busy(guest) and guest.is_off() if guest else \
            step.name in self._found or not self.away

    def named(self, step: Step) -> list[list[str]]:
        """Return the guests of a line that are on: groups one after another, those of one
        together. "all" is those without a line, in the reverse order of the start list."""
        if step.name != 'all':
            return [[step.name]] if step.name in self._on else []
        lines = {other.name for other in self.steps if other.verb != 'wait'}
        rest = [name for name in [*self._on] if name not in lines]
        places = {name: self.place.get(name, sys.maxsize) for name in rest}     # unknown ones first
        return [[name for name in rest if places[name] == place]
                for place in sorted(set(places.values()), reverse=True)]

    def _end_all(self, step: Step) -> None:
        """End the guests of a line, group by group."""
        for names in self.named(step):
            self._end_of(*[self.begin(f'{step.verb} {name}', self._end, step, name, guest)
                           for name, guest in [(name, self._on.get(name)) for name in names]
                           if guest and not self.stopping.is_set()])    # or another line ended it

    def _end(self, step: Step, name: str, guest: Guest) -> None:
        self._waits[name] = time.monotonic()
        for verb in filter(None, (step.verb, step.otherwise)):
            if self.stopping.is_set():
                return
            # What is under way, such as its start, has as long as its line: else it stays on.
            left = self.limit.left() * (1 - REMEDY_SHARES.get(step.otherwise, 0))
            busy = BUSY_TIMEOUT if verb != step.verb else left if verb == 'save' else \
                max(step.seconds, BUSY_TIMEOUT)
            try:
                says = self.guests.act(verb, guest, min(busy, left), tell=False)
                patience = min(step.seconds,
                               self.limit.left() * (1 - REMEDY_SHARES.get(step.otherwise, 0)))
                if verb != 'stop' or reached(name, guest.is_off, Deadline(patience)):
                    self.failed.pop(name, None)
                    self._results[name] = 'shut down' if verb == 'stop' else says
                    self._on.pop(name, None)
                    break
                self.failed[name] = f'did not shut down within {round(patience, 1):g} s'
            except (Error, OSError) as problem:
                self.failed[name] = explain(problem)
            log.warning('shutdown: %s %s: %s', verb, name, self.failed[name])
        self._waits.pop(name, None)
        log.info('shutdown: %s: %s; %s', name, self._results.get(name) or 'still on',
                 self.progress())

    def plan(self) -> Iterator[str]:
        self._find()
        for step in self.steps:
            if step.verb in ('delay', 'wait'):
                yield ' '.join(filter(None, [step.verb, step.name, step.until,
                                             f'{step.seconds:g} s']))
                continue
            names = '; then '.join(', '.join(group) for group in self.named(step))
            if not names:
                off = step.name in self._found or step.name == 'all' and not self.away
                yield f'{step.verb} {step.name}: ' + (
                    'off already' if off else 'not known' if self.away else
                    'no guest here is named so')
                continue
            limit = f', {step.seconds:g} s at most' if step.verb == 'stop' else ''
            yield f'{step.verb} {names}{limit}' + (
                f', then {step.otherwise}' if step.otherwise else '')
        for problem in self.away:
            yield f'not known: {explain(problem)}'


# === page =======================================================================================
# What a browser is shown: three constants, page() puts them together. Nothing is loaded from
# elsewhere, and nothing that comes from a guest is ever read as HTML: the script makes elements and
# sets their text; the policy (hashes, no inline handlers, Trusted Types) would refuse the rest.

PAGE_STYLE = r'''
:root { color-scheme: light dark; --edge: #8884; --good: #187a3d; --bad: #b3261e; --dim: #667;
        --face: #f3f4f7; --accent: #2457b3 }
@media (prefers-color-scheme: dark) {
  :root { --good: #69c78d; --bad: #ff8a80; --dim: #99a; --face: #23252b; --accent: #8ab4f8 } }
* { box-sizing: border-box }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem;
  overflow-wrap: anywhere }
h1 { font-size: 1.25rem; margin: 0 } h2 { font-size: 1rem; margin: 1.5rem 0 .5rem }
header, .tools, .does { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center }
header { justify-content: space-between; margin-bottom: .8rem }
button, input, select { font: inherit; padding: .3rem .7rem; border-radius: .4rem;
  border: 1px solid var(--edge); background: var(--face); color: inherit; min-height: 2.25rem }
button { cursor: pointer } button[aria-disabled=true] { cursor: default; opacity: .5 }
button.danger { color: var(--bad) }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px }
ul { list-style: none; margin: 0; padding: 0 }
.guest { display: grid; gap: .2rem 1rem; padding: .8rem; margin: .5rem 0; border-radius: .6rem;
  border: 1px solid var(--edge); grid-template-columns: 8rem minmax(10rem, 1fr) minmax(12rem, 1fr);
  grid-template-areas: "picture name clock" "picture facts plot" "wrong wrong wrong"
    "does does does" }
.picture { grid-area: picture; width: 8rem; height: 6rem; object-fit: contain;
  border-radius: .3rem; background: #000 }
.picture.none { background: var(--face) }
.name { grid-area: name; font-size: 1.05rem; margin: 0 }
.facts { grid-area: facts } .clock { grid-area: clock } .plot { grid-area: plot }
.wrong { grid-area: wrong; color: var(--bad); margin: 0 } .does { grid-area: does }
.state::before { content: "\25cf\a0"; color: var(--dim) }
.state.running::before { color: var(--good) }
.state.crashed::before { color: var(--bad) }
#away, #lists { white-space: pre-line; margin: .5rem 0 }
.dim, time { color: var(--dim) } .bad { color: var(--bad) } .good { color: var(--good) }
svg { width: 100%; height: 2.5rem; display: block }
polyline { fill: none; stroke: var(--accent); stroke-width: 1.5; vector-effect: non-scaling-stroke }
line { stroke: var(--edge); vector-effect: non-scaling-stroke }
.log li { border-top: 1px solid var(--edge); padding: .2rem 0 }
dialog { border: 1px solid var(--edge); border-radius: .6rem; max-width: 26rem; color: inherit;
  background: Canvas }
dialog form { display: grid; gap: .7rem } dialog p { margin: 0 }
@media (max-width: 40rem) {
  .guest { grid-template-columns: 5rem 1fr; grid-template-areas: "picture name" "picture facts"
    "clock clock" "plot plot" "wrong wrong" "does does" }
  .picture { width: 5rem; height: 3.75rem } }
'''

PAGE_BODY = '''
<header><h1>vmmonitor <span id="host" class="dim"></span></h1>
<span><span id="link" role="status"></span>
<button id="forget" hidden>Forget the key</button></span>
</header>
<noscript><p>This page needs JavaScript; curl does not: see the README.</p></noscript>
<form id="login" hidden>
<p><label for="key">Key of the listener, or one of listener.keys</label></p>
<div class="tools"><input id="key" type="password" autocomplete="off" required>
<button>Open</button></div><p id="refused" class="bad" role="alert"></p>
</form>
<main id="main" hidden>
<div class="tools"><label>Show <input id="filter" type="search" placeholder="name, state"></label>
<label>by <select id="order"><option value="name">name</option><option value="state">state</option>
<option value="offset">clock offset</option><option value="host">host</option></select></label>
<span id="count" class="dim" role="status"></span></div>
<div id="away" class="bad" role="status"></div><div id="lists" role="status"></div>
<ul id="guests" aria-label="guests"></ul>
<h2>Last commands and corrections</h2><ol id="log" class="log" reversed></ol>
</main>
<dialog id="sure" aria-labelledby="question"><form method="dialog"><p id="question"></p>
<div class="tools"><button value="no">No</button>
<button value="yes" class="danger">Yes</button></div></form></dialog>
'''

PAGE_SCRIPT = r'''
'use strict';
const $ = id => document.getElementById(id);
const DANGEROUS = { off: 'Pull the plug of', reset: 'Press the reset button of' };
const FITTING = {                       // what can be done in which state
  running: ['sync', 'stop', 'save', 'pause', 'reboot', 'reset', 'off'], off: ['start'],
  paused: ['resume', 'save', 'off'], asleep: ['wake', 'save', 'off'], saved: ['start'],
  crashed: ['off'], stopping: ['off'] };
const rows = new Map();                 // HOST/NAME/number -> the row of a guest, what it holds
let etag = '', known = { guests: [] }, logged = -1, failures = 0, timer = 0;

function make(tag, properties = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...inside);
  return made;
}

async function ask(query, headers = {}) {
  const bytes = new TextEncoder().encode(sessionStorage.getItem('key'));    // fetch takes no more
  return fetch('?' + new URLSearchParams(query), { cache: 'no-store', headers: {
    Authorization: 'Bearer ' + String.fromCharCode(...bytes), ...headers } });
}

async function askJson(query) {
  const answer = await ask(query, { Accept: 'application/json' });
  return [answer.status, await answer.json()];
}

// --- what is seen ---

const ms = value => Math.abs(value) < 10000 ? value.toFixed(1) + ' ms'
  : (value / 1000).toFixed(1) + ' s';
const when = text => make('time', { dateTime: text }, new Date(text).toLocaleString());
const tell = (id, text) => {            // what is set again, a screen reader reads again
  if ($(id).textContent !== text) $(id).textContent = text;
};

function plot(points) {                 // [[seconds since 1970, offset in ms], ...]
  const space = 'http://www.w3.org/2000/svg', svg = document.createElementNS(space, 'svg');
  svg.setAttribute('viewBox', '0 -20 200 40');
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('role', 'img');
  svg.setAttribute('aria-label', `the last ${points.length} offsets of the clock, in ms: ` +
    points.map(point => point[1].toFixed(1)).join(', '));
  const line = document.createElementNS(space, 'polyline');
  const zero = document.createElementNS(space, 'line');
  for (const [key, value] of Object.entries({ x1: 0, x2: 200, y1: 0, y2: 0 }))
    zero.setAttribute(key, value);
  const scale = offset => -18 * Math.sign(offset) * Math.log1p(Math.abs(offset)) / Math.log1p(
    Math.max(10, ...points.map(point => Math.abs(point[1]))));
  line.setAttribute('points', points.map((point, place) =>
    `${200 * place / Math.max(1, points.length - 1)},${scale(point[1])}`).join(' '));
  svg.append(zero, line);
  return svg;
}

function build(name) {
  const row = { picture: make('img', { className: 'picture none', alt: '' }),
    name: make('h2', { className: 'name' }, name), facts: make('div', { className: 'facts' }),
    clock: make('div', { className: 'clock' }), plot: make('div', { className: 'plot' }),
    wrong: make('p', { className: 'wrong' }), buttons: make('span', { className: 'tools' }),
    said: make('span', { role: 'status' }), time: make('span', { className: 'dim' }),
    pending: '', shown: '', tag: '' };
  row.time.setAttribute('aria-hidden', 'true');
  row.does = make('div', { className: 'does' }, row.buttons, row.said, row.time);
  row.item = make('li', { className: 'guest', tabIndex: -1 }, row.picture, row.name, row.facts,
    row.clock, row.plot, row.wrong, row.does);
  row.item.dataset.name = name;
  seen.observe(row.item);
  return row;
}

function fill(row, guest) {
  const text = JSON.stringify([guest, row.pending, known.commands]);
  if (text === row.shown) return;
  Object.assign(row, { shown: text, blind: 0 });
  const state = guest.state || 'unknown', clock = guest.clock;
  row.facts.replaceChildren(
    make('span', { className: 'state ' + state },
      guest.reason && state !== 'running' ? `${state} (${guest.reason})` : state),
    ` · agent ${guest.agent || '?'}`, guest.host ? ` · ${guest.host}` : '');
  row.clock.replaceChildren(...clock ? ['clock ', make('strong', {}, ms(clock.afterMs)),
    clock.corrected ? `, was ${ms(clock.beforeMs)} (${clock.cause}) ` : ` (${clock.cause}) `,
    when(clock.at)] : [make('span', { className: 'dim' }, 'clock not looked at yet')]);
  row.plot.replaceChildren(...clock && clock.history && clock.history.length > 1
    ? [plot(clock.history)] : []);
  row.wrong.textContent = [...guest.problems || [guest.error], guest.hint].filter(Boolean)
    .join('; ');
  const held = row.buttons.contains(document.activeElement) && document.activeElement.textContent;
  row.buttons.replaceChildren(...(FITTING[state] || []).filter(verb =>
    known.commands.includes(verb)).map(verb => {
      const button = make('button', { type: 'button', className: verb in DANGEROUS ? 'danger' : '',
        onclick: () => row.pending || act(row, guest.name, verb) }, verb);
      button.setAttribute('aria-label', `${verb} ${guest.name}`);
      button.setAttribute('aria-disabled', !!row.pending);      // "disabled" would lose the focus
      return button;
    }));
  if (held) ([...row.buttons.children].find(one => one.textContent === held) || row.item).focus();
  if (!['running', 'paused'].includes(state)) unpaint(row);
}

function unpaint(row) {
  URL.revokeObjectURL(row.picture.src);
  row.picture.removeAttribute('src');
  Object.assign(row, { tag: '' }).picture.alt = '';
  row.picture.classList.add('none');
}

function show() {
  const wanted = $('filter').value.toLowerCase(), order = $('order').value;
  const key = { state: guest => guest.state || '', host: guest => guest.host || '',
    offset: guest => guest.clock ? -Math.abs(guest.clock.afterMs) : 1 }[order] || (() => 0);
  const chosen = known.guests.filter(guest =>
    [guest.name, guest.state, guest.reason, guest.host].join(' ').toLowerCase().includes(wanted));
  chosen.sort((a, b) => key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a.name < b.name ? -1 : 1);
  const ids = new Map(), times = {};    // a machine and a guest of libvirt may have the same name
  for (const guest of known.guests) {
    const id = `${guest.host || ''}/${guest.name}`;
    times[id] = (times[id] || 0) + 1;
    ids.set(guest, `${id}/${times[id]}`);
  }
  const items = chosen.map(guest => {
    const id = ids.get(guest);
    if (!rows.has(id)) rows.set(id, build(guest.name));
    fill(rows.get(id), guest);
    return rows.get(id).item;
  });
  const there = new Set(ids.values());
  for (const [id, row] of rows)
    if (!there.has(id)) { seen.unobserve(row.item); row.item.remove(); rows.delete(id); }
  const list = $('guests'), held = document.activeElement;
  items.forEach((item, place) => {      // moved only where it must be: the focus stays
    if (list.children[place] !== item) list.insertBefore(item, list.children[place] || null);
  });
  while (list.children.length > items.length) list.lastChild.remove();
  if (held !== document.activeElement && held.isConnected) held.focus();
  tell('count', `${items.length} of ${known.guests.length} guests`);
  tell('away', (known.away || []).map(one => [one.error, one.hint].filter(Boolean).join('; '))
    .join('\n'));
  tell('lists', (known.lists || []).join('\n'));
}

async function showLog(number) {
  const key = sessionStorage.getItem('key'), [status, answer] = await askJson({ cmd: 'log' });
  if (status !== 200 || key !== sessionStorage.getItem('key')) return;
  logged = number;
  $('log').replaceChildren(...answer.lines.map(line => make('li', {}, when(line.at), ' ',
    make('span', { className: line.failed ? 'bad' : '' }, line.text))));
}

// --- what is done ---

async function sure(verb, name) {
  $('question').textContent = `${DANGEROUS[verb]} ${name}? What it has not written is lost.`;
  $('sure').returnValue = 'no';
  $('sure').showModal();
  await new Promise(ended => $('sure').addEventListener('close', ended, { once: true }));
  return $('sure').returnValue === 'yes';
}

const acting = new Set();               // what was asked for and is not answered

async function act(row, name, verb) {
  if (verb in DANGEROUS && !await sure(verb, name)) return;
  const began = Date.now(), key = sessionStorage.getItem('key');
  row.pending = verb;
  row.said.className = 'dim';
  const tick = setInterval(() => {
    row.time.textContent = `${Math.round((Date.now() - began) / 1000)} s`;
  }, 1000);
  row.said.textContent = verb + ' …';
  show();
  let good = false, text;
  try {
    // A browser has six connections: three are for what goes on in the page meanwhile.
    while (acting.size > 2) await Promise.race(acting).catch(() => 0);
    if (key !== sessionStorage.getItem('key')) throw new Error('the key was forgotten');
    const asked = askJson({ cmd: verb, target: name });
    acting.add(asked);
    const [status, answer] = await asked.finally(() => acting.delete(asked));
    good = status < 300;
    text = good ? answer.result : [answer.error, answer.hint].filter(Boolean).join('; ');
  } catch (problem) {
    text = 'no answer; look at its state';
  }
  clearInterval(tick);
  row.pending = row.time.textContent = '';
  row.said.className = good ? 'good' : 'bad';
  row.said.textContent = text;
  show();
  look();
}

// Pictures: of the guests that are in view, one after another, each every few seconds.
const inView = new Set();
const seen = new IntersectionObserver(entries => entries.forEach(entry =>
  inView[entry.isIntersecting ? 'add' : 'delete'](entry.target.dataset.name)));

async function paint() {
  for (const [, row] of rows) {
    const guest = known.guests.find(one => one.name === row.item.dataset.name);
    if (!guest || guest.state !== 'running' || !inView.has(guest.name) || document.hidden
        || row.blind > Date.now() || !(known.commands || []).includes('screenshot')) continue;
    try {
      const answer = await ask({ cmd: 'screenshot', target: guest.name },
        { 'If-None-Match': row.tag });
      if (answer.status === 200) {
        const old = row.picture.src;
        row.tag = answer.headers.get('ETag') || '';
        row.picture.src = URL.createObjectURL(await answer.blob());
        row.picture.alt = `the screen of ${guest.name}`;
        row.picture.classList.remove('none');
        if (old) URL.revokeObjectURL(old);
      } else if (answer.status !== 304) {
        unpaint(row);                   // what it showed is old, and ...
        row.blind = Date.now() + 60000; // ... it is asked again soon, or when something changes
      }
    } catch (problem) { break; }
  }
  setTimeout(paint, 5000);
}

// --- staying in touch ---

function enter(refusal) {
  sessionStorage.removeItem('key');
  Object.assign($('main'), { hidden: true });
  known = { guests: [] };               // the next key may show less
  etag = '';
  logged = -1;
  show();
  $('log').replaceChildren();
  $('sure').close('no');
  Object.assign($('forget'), { hidden: true });
  Object.assign($('login'), { hidden: false });
  $('refused').textContent = refusal;
  tell('link', '');
  $('key').focus();
}

async function look() {
  clearTimeout(timer);
  const key = sessionStorage.getItem('key');
  if (!key) return enter('');
  try {
    const answer = await ask({ cmd: 'list' }, { Accept: 'application/json',
      ...etag && { 'If-None-Match': etag } });
    const told = answer.status === 304 || await answer.json();
    if (key !== sessionStorage.getItem('key')) return;          // it was forgotten meanwhile
    if (answer.status === 200) {
      etag = answer.headers.get('ETag') || '';
      known = told;
      show();
    } else if ([401, 403, 429].includes(answer.status)) {
      return enter(told.error);
    } else if (answer.status === 503) {
      known.away = [told];
      etag = '';
      show();
    }
    if (known.logged !== logged && (known.commands || []).includes('log')) showLog(known.logged);
    Object.assign($('main'), { hidden: false });
    Object.assign($('forget'), { hidden: false });
    Object.assign($('login'), { hidden: true });
    $('host').textContent = known.host || '';
    tell('link', [200, 304].includes(answer.status) ? '' : `answer ${answer.status}`);
    failures = 0;
  } catch (problem) {
    tell('link', 'no connection; trying again');
    failures += 1;
  }
  timer = setTimeout(look, document.hidden ? 5000 : Math.min(1000 * 2 ** failures, 10000));
}

$('login').addEventListener('submit', event => {
  event.preventDefault();
  sessionStorage.setItem('key', $('key').value.trim());
  $('key').value = '';
  look();
});
$('forget').addEventListener('click', () => enter(''));
$('filter').addEventListener('input', show);
$('order').addEventListener('change', show);
document.addEventListener('visibilitychange', () => { if (!document.hidden) look(); });
look();
paint();
'''


def page() -> tuple[str, bytes]:
    """Return the page, and the Content-Security-Policy that goes with it."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
               for text in (PAGE_SCRIPT, PAGE_STYLE)]
    policy = ("default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src blob:; "
              "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
              "require-trusted-types-for 'script'").format(*digests)
    return policy, ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>vmmonitor'
                    '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
                    f'<style>{PAGE_STYLE}</style></head><body>{PAGE_BODY}'
                    f'<script>{PAGE_SCRIPT}</script></body></html>\n').encode()


# === listener ===================================================================================
# Listener: socket policy. ClientConnection: the wire. Dispatcher: dispatch, and all error policy.

HANDSHAKE_TIMEOUT = 5.0        # for the whole TLS handshake
REQUEST_TIMEOUT = 10.0         # from the first byte of a request to its last
IDLE_TIMEOUT = 15.0            # between two requests of one connection
SEND_TIMEOUT = 10.0            # for the next piece of a response ...
SEND_PIECE = 1 << 14           # ... of so many bytes, a record of TLS: a phone may be slow
SENDING_MAX = PICTURE_BYTES    # bytes of large answers at once, or one that is larger: each is kept
SENDING_LARGE = 1 << 20        # ... until its client has read it, as slowly as it likes
LINGER_TIMEOUT = 1.0           # for what a client sends on after it was refused, and for ...
LINGER_BYTES = 1 << 20         # ... so many of it: a connection reset would take our answer away
CONNECTIONS_MAX = 256          # threads that serve clients
SPARE_THREADS = 3              # ... and that wait for one, at most, when there were more
CONNECTIONS_PER_PEER = 100     # of them for one address
HEADER_BYTES = 16 * 1024       # request line and headers together
BODY_BYTES = 16 * 1024
COMMAND_TIMEOUT = 300.0        # how long a request waits for its command, unless wait= says less
LIST_TIMEOUT = 18.0            # for the names of all guests; ANSWER_TIMEOUT is for the rest, too
STATE_TIMEOUT = 2.0            # for the state that is told with an answer
REFUSAL_TIMEOUT = 0.05         # with wait=0: long enough to hear that it was refused at once
WAITING_MAX = 32               # requests that wait for another command on a guest: each is a
#                                thread, also when its client has long had its 202
WRONG_KEYS = 10                # wrong keys from one address within ...
WRONG_KEYS_WINDOW = 60.0       # ... this time; then 429 until the window is over
WRONG_KEYS_PEERS = 4096        # addresses remembered; beyond it the oldest is forgotten
HANDSHAKES_WINDOW = 60.0       # failed handshakes of this time make one line in the log

NO_HTTP = 'not an HTTP request that can be read'
HTTP_METHODS = ('GET', 'HEAD', 'POST')
# Python's parser would stop at a line that it can't read, and take a bare CR for a line's end: what
# follows would be the next request, though a proxy in front has seen one.
HEADER = re.compile(rb"([\w!#$%&'*+.^`|~-]+:[^\r\n\0]*)?\r?\n")
LINE_ENDS = (b'\r\n', b'\n')
METRICS_FORM = 'text/plain; version=0.0.4; charset=utf-8'       # Prometheus' own name for it
PICTURE_PAUSE = 1.0            # between two pictures of a guest, however many look at it
PARAMETERS = ('cmd', 'discard', 'key', 'target', 'wait')
BEARER = ('WWW-Authenticate', 'Bearer')


class Refusal(Error):
    """A request that gets another answer than 200."""

    def __init__(self, status: int, message: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status, self.headers = status, tuple(headers)


class Request(NamedTuple):
    """One request, read whole."""

    peer: str                   # address at the other end of the connection
    method: str
    target: str                 # path and query; what was no ASCII in it is percent-encoded
    headers: email.message.Message
    body: bytes

    def client(self, trusts: Callable[[str], bool]) -> str:
        """Return the address that the request comes from: the peer's, or what a trusted proxy
        says, the last of X-Forwarded-For that is not a trusted proxy itself."""
        client = self.peer
        hops = ','.join(self.headers.get_all('X-Forwarded-For', [])).split(',')
        while hops and trusts(client):
            hop = re.sub(r'^\[(.*)\](:\d+)?$|^([\d.]+):\d+$', r'\1\3', hops.pop().strip())
            try:
                client = plain_address(hop)
            except ValueError:
                break
        return client

    def parameters(self) -> dict[str, str]:
        """Return what stands in the query, the body and the Authorization header, each once."""
        try:
            url = urllib.parse.urlsplit(self.target)
        except ValueError:
            raise Refusal(400, NO_HTTP) from None
        if url.path not in ('/', '', '/metrics'):
            raise Refusal(404, 'nothing here; use /?cmd=...&target=...')
        pairs = [('cmd', 'metrics')] if url.path == '/metrics' else []
        pairs += [*form_pairs(url.query.encode()), *self._body_pairs()]
        found: dict[str, str] = {}
        for name, value in self._with_bearer(pairs):
            if name == '_':                     # what some clients add to get past caches
                continue
            if name not in PARAMETERS:
                raise Refusal(400, f'parameters are {", ".join(PARAMETERS)}')
            if name in found:
                raise Refusal(400, f'{name} stands there twice')
            try:
                found[name] = a_text(value)
            except InvalidValue as problem:
                raise Refusal(400, f'{name} {problem}') from None
        return found

    def _body_pairs(self) -> Iterable[tuple[str, str]]:
        form = self.headers.get('Content-Type', '').partition(';')[0].strip().lower()
        if self.method != 'POST' or not self.body:
            return []
        if form == 'application/json':
            return json_pairs(self.body)
        if form in ('application/x-www-form-urlencoded', ''):
            return form_pairs(self.body.removeprefix(BOM.encode()).strip(b'\r\n'))
        raise Refusal(415, 'send application/x-www-form-urlencoded or application/json')

    def _with_bearer(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Add the key of the Authorization header; a proxy's Basic may stand there, too."""
        given = self.headers.get('Authorization', '').encode('latin-1', 'replace')
        scheme, _, token = given.partition(b' ')
        if scheme.lower() == b'bearer':
            return [*pairs, ('key', token.strip().decode(errors='replace'))]
        if scheme and 'key' not in dict(pairs):
            raise Refusal(401, 'use Authorization: Bearer KEY', (BEARER,))
        return pairs


def form_pairs(form: bytes) -> Iterator[tuple[str, str]]:
    """Yield the members of a query or a form, in UTF-8, raw or percent-encoded."""
    for pair in filter(None, form.split(b'&')):
        name, equals, value = (urllib.parse.unquote_to_bytes(part.replace(b'+', b' '))
                               for part in pair.partition(b'='))
        try:
            if not equals:
                raise ValueError
            yield name.decode(), value.decode()
        except ValueError:
            raise Refusal(400, 'parameters must be NAME=VALUE, joined by & and UTF-8') from None


def json_pairs(body: bytes) -> list[tuple[str, str]]:
    """Return the members of a JSON body: an object whose values are strings or numbers."""
    try:
        value = checked('the body', parse_json(body, unique=True), {'*': (str, int, float)})
    except ValueError:
        raise Refusal(400, 'the body must be a JSON object, its keys once each, its values '
                      'strings or numbers') from None
    return [(name, str(item)) for name, item in value.items()]


def plain_address(address: str) -> str:
    """Return an address, IPv4 that came by an IPv6 socket as IPv4; ValueError if it is none."""
    if not re.fullmatch(r'[\w.-]{0,15}', address.partition('%')[2], re.ASCII):
        raise ValueError('no interface has such a name')        # and Python would take any
    parsed = ipaddress.ip_address(address)
    return str(getattr(parsed, 'ipv4_mapped', None) or parsed)


class Reply(NamedTuple):
    """One answer: a line for people, and the same for programs."""

    status: int
    text: str
    data: Mapping[str, Any] = {}
    headers: tuple[tuple[str, str], ...] = ()
    content: tuple[str, bytes] | None = None    # type and bytes of what is neither

    @property
    def weight(self) -> int:
        """How many bytes count for SENDING_MAX."""
        size = len(self.content[1]) if self.content else 0
        return size if size > SENDING_LARGE else 0

    def rendered(self, accept: str) -> tuple[str, bytes]:
        """Return its type and bytes: JSON for those who accept that."""
        if self.content:
            return self.content
        if 'application/json' in accept:
            data = self.data or ({'error': self.text} if self.status >= 400 else {})
            return 'application/json', json.dumps(data).encode() + b'\n'
        text = '\n'.join(map(printable, self.text.split('\n')))
        return 'text/plain; charset=utf-8', text.encode('utf-8', 'replace') + b'\n'


class Audit:
    """What the audit line of a request says; filled in as it becomes known."""

    def __init__(self, peer: str) -> None:
        self.began = time.monotonic()
        self.peer, self.key, self.command, self.target = peer, '-', '-', '-'

    def write(self, status: int) -> None:
        """Write the line; no key ever stands in it."""
        log.info('request peer=%s key=%s cmd=%s target=%s result=%d ms=%.0f', self.peer,
                 *(json.dumps(text, ensure_ascii=False) if re.search(r'[^\w.:*-]', text) else text
                   for text in (self.key[:100], self.command[:100], self.target[:100])),
                 status, (time.monotonic() - self.began) * 1000)


class Throttle:
    """Counts failures to show a right key, and says who has had enough of them: by key where a
    right one was shown, for a guest that it does not reach, else by address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wrong: dict[str, tuple[float, int]] = {}      # who -> (window's end, count)

    @staticmethod
    def network(peer: str) -> str:
        """Return what is counted as one: an IPv4 address, or an IPv6 /64, which one host has."""
        if ':' not in peer:
            return peer
        return socket.inet_pton(socket.AF_INET6, peer.partition('%')[0])[:8].hex()

    def refuse(self, who: str) -> None:
        """Raise 429 if `who` has had enough."""
        with self._lock:
            end, count = self._wrong.get(who, (0.0, 0))
        pause = math.ceil(end - time.monotonic())
        if count >= WRONG_KEYS and pause > 0:
            raise Refusal(429, f'too many wrong keys or targets; try again in {pause} s',
                          (('Retry-After', str(pause)),))

    def locked(self, who: str = '') -> bool:
        """Tell whether `who`, or anybody, has had enough."""
        with self._lock:
            rows = [self._wrong.get(who, (0.0, 0))] if who else self._wrong.values()
            return any(count >= WRONG_KEYS and end > time.monotonic() for end, count in rows)

    def wrong(self, who: str) -> Refusal:
        """Count a wrong key and return what it is answered; 429 if `who` has had enough."""
        self.refuse(who)
        now = time.monotonic()
        with self._lock:
            end, count = self._wrong.pop(who, (0.0, 0))
            if end <= now:
                end, count = now + WRONG_KEYS_WINDOW, 0
            if len(self._wrong) >= WRONG_KEYS_PEERS:
                del self._wrong[next(iter(self._wrong))]
            self._wrong[who] = end, count + 1
        return Refusal(401, 'wrong key, or not for this target', (BEARER,))


class Order(NamedTuple):
    """What a request wants done with a guest."""

    command: str                # one of COMMANDS
    wait: float                 # seconds that it waits for the end
    until: str = ''             # wait also for "agent" to answer, or until it is "off"
    discard: bool = False       # of a start: forget the saved state

    @property
    def action(self) -> str:
        return 'start anew' if self.discard else self.command

    @classmethod
    def read(cls, command: str, parameters: Mapping[str, str]) -> Order:
        given, discard = parameters.get('wait', ''), parameters.get('discard', '0')
        if discard not in ('0', '1') or (discard == '1' and command != 'start'):
            raise Refusal(400, 'discard is 0 or 1, and goes with start')
        until = 'off' if given and command in ('stop', 'save') else ''
        if given == 'agent':
            if command not in ('start', 'wake'):
                raise Refusal(400, 'wait=agent goes with start and wake')
            given, until = '', given
        try:
            wait = float(given or COMMAND_TIMEOUT)
        except ValueError:
            wait = -1.0
        if not 0 <= wait <= COMMAND_TIMEOUT:
            raise Refusal(400, 'wait must be "agent", or a number of seconds from 0 to '
                          f'{COMMAND_TIMEOUT:g}')
        return cls(command, wait, until if wait else '', discard == '1')


def unless_known(request: Request, reply: Reply) -> Reply:
    """Return the answer with an ETag, or 304 if the client has it already."""
    form, body = reply.rendered(request.headers.get('Accept', ''))
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    if tag in request.headers.get('If-None-Match', ''):
        return Reply(304, '', headers=(('ETag', tag),), content=(form, b''))
    return reply._replace(headers=(('ETag', tag),), content=(form, body))


def page_reply(request: Request) -> Reply | None:
    """Return the page, if it is a browser that asks for it."""
    if request.target not in ('/', '/?') or request.method not in ('GET', 'HEAD') \
            or 'text/html' not in request.headers.get('Accept', ''):
        return None
    policy, body = page()
    return Reply(200, '', content=('text/html; charset=utf-8', body), headers=(
        ('Content-Security-Policy', policy), ('Referrer-Policy', 'no-referrer')))


class Dispatcher:
    """Turns a request into an action and its outcome into an answer."""

    # The first row that fits gives the status of a failed command.
    STATUSES: tuple[tuple[type[Error], int], ...] = (
        (NoGuest, 404), (Ambiguous, 409), (WrongState, 409), (Busy, 409), (HostAway, 503),
        (Error, 500))

    def __init__(self, guests: Guests, settings: Settings) -> None:
        self.guests, self.settings = guests, settings
        self.throttle = Throttle()
        # id of a guest -> its last picture, and until when that is new enough
        self.pictures: dict[str, tuple[Deadline, concurrent.futures.Future[bytes]]] = {}
        self.sending = 0                                # weight of the answers on their way
        self._painting = threading.Lock()               # guards pictures and sending

    def answer(self, request: Request) -> Reply:
        """Return the answer to any request, and write its audit line."""
        shown = page_reply(request) if self.settings.config.page else None
        if shown:
            return shown
        audit = Audit(request.client(self.trusts))
        try:
            reply = self._dispatch(request, audit)
        except Refusal as refusal:
            reply = Reply(refusal.status, str(refusal), headers=refusal.headers)
        except Error as problem:
            reply = self._failure(problem, audit.target)
        except Exception:               # a boundary: the client gets an answer, the log the bug
            log.exception('request from %s: unexpected error', audit.peer)
            reply = Reply(500, 'an error in vmmonitor; its log has more')
        if reply.status == 200 and not VERBS[audit.command].act:
            reply = unless_known(request, reply)
        if not self._room(reply.weight):
            reply = self._failure(HostAway('as many pictures as may are on their way to clients',
                                           hint='try again in a moment'), audit.target)
        self.guests.figures.observe('request_seconds', time.monotonic() - audit.began)
        if reply.status != 304:         # a page that looks every second would fill the log
            audit.write(reply.status)
        return reply

    def _room(self, weight: int) -> bool:
        """Count an answer as one on its way, if there is room for it."""
        with self._painting:
            free = not (weight and self.sending) or self.sending + weight <= SENDING_MAX
            self.sending += weight * free
        return free

    def sent(self, reply: Reply) -> None:
        """Count an answer as one that has arrived, or never will."""
        with self._painting:
            self.sending -= reply.weight

    def _failure(self, problem: Error, target: str) -> Reply:
        """Return the answer for a command that failed, which names its guest."""
        status = next(code for error, code in self.STATUSES if isinstance(problem, error))
        guest = '' if target == '-' else target
        known = told(problem, guest)
        return Reply(status, str(Error(known['error'], problem.hint)), known,
                     (('Retry-After', '2'),) if status == 503 else ())

    def _dispatch(self, request: Request, audit: Audit) -> Reply:
        """Check everything in the order in which it may be told, and carry it out."""
        if request.method not in HTTP_METHODS:
            raise Refusal(405, 'use GET, HEAD or POST', (('Allow', ', '.join(HTTP_METHODS)),))
        parameters = request.parameters()
        audit.command = parameters.get('cmd', '-')
        audit.target = parameters.get('target', '-')
        key = self._authenticate(parameters.get('key', ''), audit)
        command, target = parameters.get('cmd', ''), parameters.get('target', '')
        if command not in COMMANDS:
            raise Refusal(400, f'cmd must be one of {", ".join(COMMANDS)}')
        if bool(target) == (command in FOR_ALL):
            raise Refusal(400, f'{command} takes no target' if target else
                          f'target is missing: the name of the guest to {command}')
        if target and not self._may_reach(key, target):
            self.guests.figures.count('wrong_keys_total')
            raise self._wrong(f'key {key.name}', audit)         # not to be told from a wrong key
        if command not in self.settings.config.enabled:
            raise Refusal(403, f'{command} is switched off (listener.commandsEnabled)')
        if command not in key.commands:
            raise Refusal(403, f'this key may not {command}')
        if VERBS[command].act and 'shutdown' in self.guests.lists:
            raise Refusal(503, 'the host goes down')
        order, deadline = Order.read(command, parameters), Deadline(ANSWER_TIMEOUT)
        if command in FOR_ALL:
            return {'list': self._list, 'metrics': self._metrics, 'log': self._log}[command](
                key, deadline)
        guest = self.guests.find(target, hosts=self._hosts(key),
                                 reached=lambda guest: key.covers(guest.own, guest.full_name))
        if command == 'status':
            seen = guest.remembered()
            known = self._describe(guest, seen) if seen else within(
                deadline, guest.name, self._describe, guest)
            return Reply(200, self._line(known), {'version': 1, **known})
        if command == 'screenshot':
            return Reply(200, '', content=('image/png', self._picture(guest, deadline)))
        return self._act(order, guest)

    def _picture(self, guest: Guest, deadline: Deadline) -> bytes:
        with self._painting:
            for key in [key for key, (new, picture) in self.pictures.items()
                        if new.passed() and picture.done()]:
                del self.pictures[key]
            if guest.id not in self.pictures:
                self.pictures[guest.id] = Deadline(PICTURE_PAUSE), in_thread(
                    guest.name, guest.picture)
            picture = self.pictures[guest.id][1]
        return outcome(deadline, guest.name, picture)

    def _wrong(self, who: str, audit: Audit) -> Refusal:
        """Count a wrong key and return what it is answered."""
        refusal = self.throttle.wrong(who)
        if self.throttle.locked(who):
            with contextlib.suppress(Error):        # the next who is locked out tries again
                spawn('locked out', self._tell_of_lock, Error(
                    f'{audit.peer} sends wrong keys, or targets that its key does not reach, and '
                    'is locked out for a while', 'see the log for its requests'))
        return refusal

    def _tell_of_lock(self, problem: Error) -> None:
        if self.guests.notices.begin('keys', 'listener', problem):
            while self.throttle.locked():
                time.sleep(WRONG_KEYS_WINDOW / 10)
            self.guests.notices.end('listener', 'keys')

    def _may_reach(self, key: Key, name: str) -> bool:
        """Tell whether the key reaches a guest that NAME or HOST/NAME can mean."""
        return any(key.covers(own, f'{host.label}/{own}')
                   for host, own in self.guests.meanings(name))

    def _hosts(self, key: Key) -> list[GuestHost]:
        """Return the hosts that may have guests for a key; it learns nothing of the others."""
        return [host for host in self.guests.hosts if key.enters(host.label)]

    def trusts(self, address: str) -> bool:
        """Tell whether an address is one of listener.trustedProxies."""
        proxies = self.settings.config.trusted_proxies
        return bool(proxies) and any(ipaddress.ip_address(address) in proxy for proxy in proxies)

    def _authenticate(self, secret: str, audit: Audit) -> Key:
        """Return the key of the request; 401, or 429 for an address that guesses.

        A key that can't be guessed is served from there, too: whoever sends it has it.
        """
        # In a query a + means a space; who puts a key of base64 there as it stands, means the +.
        digests = [hashlib.sha256(text.encode()).digest()
                   for text in (secret, secret.replace(' ', '+'))]
        from hmac import compare_digest
        found: Key | None = None
        for key in self.settings.config.keys:       # all of them: the time shall tell nothing
            if any([compare_digest(key.digest, digest) for digest in digests]):    # noqa: C419
                found = key
        network = self.throttle.network(audit.peer)
        if secret and not found:
            self.guests.figures.count('wrong_keys_total')
        if not found or found.guessable:
            self.throttle.refuse(network)
        if not secret:
            raise Refusal(401, 'key is missing', (BEARER,))
        if not found:
            raise self._wrong(network, audit)
        audit.key = found.name
        return found

    def _act(self, order: Order, guest: Guest) -> Reply:
        """Carry out a command in a thread of its own; 202 if it takes longer than `wait`."""
        command, deadline = order.command, Deadline(order.wait)
        patient = order.wait and self.guests.waiting(guest) < WAITING_MAX
        outcome = in_thread(f'{command} {guest.name}', self.guests.act, order.action, guest,
                            BUSY_TIMEOUT if patient else 0)
        known = {'target': guest.name, 'cmd': command}
        try:
            result = outcome.result(max(order.wait, REFUSAL_TIMEOUT))
        except concurrent.futures.TimeoutError:
            outcome.add_done_callback(lambda late: self._log_late(command, guest, late))
            state = self._state_now(guest) if order.wait else {}
            return Reply(202, f'{guest.name}: {command} goes on'
                         + (f', it is {state["state"]}' if state else ''),
                         {**known, 'result': 'goes on', **state})
        says, known['result'] = f'{guest.name}: {result}', result
        if not order.until or result == 'already off':
            return Reply(200, says, {**known, **(self._state_now(guest) if order.until else {})})
        there = reached(guest.name, lambda: GUEST_ENDS[order.until](guest), deadline)
        if order.until == 'agent':
            known['agent'] = 'answers' if there else 'silent'
            says += ', its agent answers' if there else ', but its agent does not answer yet'
            known.update({} if there else self._state_now(guest))
            if known.get('state', 'running') != 'running':
                says += f': it is {known["state"]}'
        else:
            known.update(self._state_now(guest))
            says += ', it is off' if there else (
                f', but it is {known["state"]}; a guest may ignore that')
        return Reply(200 if there else 202, says, known)

    @staticmethod
    def _state_now(guest: Guest) -> dict[str, str]:
        try:
            return {'state': str(within(Deadline(STATE_TIMEOUT), guest.name, guest.status))}
        except NoGuest:                     # it was never defined
            return {'state': State.OFF.value}
        except Error:                       # the command was carried out, that is the answer
            return {'state': 'unknown'}

    @staticmethod
    def _log_late(command: str, guest: Guest, outcome: concurrent.futures.Future[str]) -> None:
        problem = outcome.exception()
        log.log(logging.WARNING if problem else logging.INFO, '%s %s: %s', command, guest.name,
                explain(problem) if problem else outcome.result())

    def _describe(self, guest: Guest, seen: tuple[Status, str] | None = None) -> dict[str, Any]:
        """Return what is known of a guest, which was `seen` so, or is looked at."""
        status, agent = seen or guest.seen()
        last = self.guests.corrections.get(guest.id)
        clock = last and {
            'cause': last.cause, 'beforeMs': last.before / MS, 'afterMs': last.after / MS,
            'corrected': bool(last.method), 'at': utc(last.when),
            'history': [*self.guests.offsets.get(guest.id, ())]}
        problems = self.guests.notices.of(guest) or [
            f'{status}; {hint}' for hint in [TROUBLES.get(status.reason)] if hint]
        return {'name': guest.name, 'state': status.state.value, 'reason': status.reason,
                'host': guest.prefix[:-1], 'agent': agent, 'clock': clock,
                'lastCommand': self.guests.commands.get(guest.id),
                'problems': problems}

    @staticmethod
    def _line(known: Mapping[str, Any]) -> str:
        if 'error' in known:
            return f'{known["name"]} unknown: {known["error"]}'
        clock, last = known['clock'], known['lastCommand'] or {}
        return '{} {} agent={} clock={}{}'.format(
            known['name'], Status(State(known['state']), known['reason']), known['agent'],
            '{:+.1f}ms at {} after "{}"'.format(clock['afterMs'], clock['at'], clock['cause'])
            if clock else 'unknown',
            ' "{}" failed at {}: {}'.format(last['cmd'], last['at'], last['error'])
            if 'error' in last else '')

    def _describe_all(self, key: Key, deadline: Deadline, away: list[Error]
                      ) -> list[tuple[Guest, dict[str, Any]]]:
        """Return the guests that the key reaches, each with what is known of it, and add to `away`
        which hosts can't be asked."""
        guests = [guest for guest in self.guests.all(away=away, timeout=LIST_TIMEOUT,
                                                     hosts=self._hosts(key))
                  if key.covers(guest.own, guest.full_name)]
        found = {guest.id: self._describe(guest, seen) for guest in guests
                 for seen in [guest.remembered()] if seen}
        unknown = [guest for guest in guests if guest.id not in found]
        found.update(zip((guest.id for guest in unknown),
                         ask_all(unknown, self._describe, deadline.left())))
        answers = ((guest, found[guest.id]) for guest in guests)
        return [(guest, {'name': answer['name'], **told(answer['problem'])}
                 if 'problem' in answer else answer) for guest, answer in answers
                if not isinstance(answer.get('problem'), NoGuest)]      # undefined meanwhile

    def _list(self, key: Key, deadline: Deadline) -> Reply:
        away: list[Error] = []
        known = [answer for _, answer in self._describe_all(key, deadline, away)]
        if away and not known:
            raise away[0]
        lines = [*map(self._line, known), *map(explain, away)]
        return Reply(200, '\n'.join(lines) or 'no guests', {
            'version': 1, 'host': os.uname().nodename, 'guests': known,
            **({'away': [told(problem) for problem in away]} if away else {}),
            'lists': [f'{name}: {text if "*" in key.targets else "goes on"}'    # guests' names
                      for name, text in [*self.guests.lists.items()]],
            'commands': [command for command in key.commands
                         if command in self.settings.config.enabled],
            'logged': next((when for guest, _, when in [*self.guests.recent][::-1]
                            if key.covers(guest.own, guest.full_name)), 0)})

    def _metrics(self, key: Key, deadline: Deadline) -> Reply:
        """Return the figures; those of guests are of the ones that the key reaches."""
        now: Samples = {('guests', (state.value,)): 0 for state in State}
        now['build_info', (__version__, '.'.join(map(str, sys.version_info[:3])))] = 1
        for host in self._hosts(key):
            now['host_up', (host.label,)] = host.up.is_set()
            now['host_reconnects_total', (host.label,)] = max(0, host.links - 1)
        for guest, known in self._describe_all(key, deadline, []):
            row = 'guests', (known.get('state', 'unknown'),)
            now[row] = now.get(row, 0) + 1
            # A guest of libvirt may have the name of a machine, and two samples alike are an error.
            name = guest.full_name if guest.label == MACHINES_LABEL else guest.name
            if 'agent' in known:                        # else nobody knows
                now['guest_agent_up', (name,)] = known['agent'] == 'connected'
            for when in ('before', 'after') if known.get('clock') else ():
                now['clock_offset_seconds', (name, when)] = known['clock'][f'{when}Ms'] / 1000
        return Reply(200, '', content=(METRICS_FORM, self.guests.figures.text(now).encode(
            'utf-8', 'replace')))

    def _log(self, key: Key, _deadline: Deadline) -> Reply:
        """Return the last commands and corrections of the key's guests, the newest first."""
        lines = [row for guest, row, _ in [*self.guests.recent][::-1]
                 if key.covers(guest.own, guest.full_name)]
        return Reply(200, '\n'.join(f'{row["at"]} {row["text"]}' for row in lines)
                     or 'nothing yet', {'version': 1, 'lines': lines})


class RequestReader(io.RawIOBase):
    """The bytes of a connection, with a limit on how many and on how long one request may take.

    The clock starts with the first byte: a connection that is idle has IDLE_TIMEOUT, and then a
    request that trickles has REQUEST_TIMEOUT, not that long for every byte.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self.connection = connection
        self.expect()

    def readable(self) -> bool:
        return True

    def expect(self) -> None:
        self.deadline = Deadline(IDLE_TIMEOUT)
        self.began = False                  # whether more than an empty line has come
        self.limit(HEADER_BYTES, Refusal(431, 'request line and headers too large'))

    def limit(self, budget: int, refusal: Refusal) -> None:
        """Read so many bytes at most, and raise `refusal` instead of more."""
        self.budget, self.refusal = budget, refusal

    def readinto(self, buffer: Any) -> int:
        """Read what there is; a Refusal when that is too much, or socket.timeout."""
        if self.budget <= 0:
            raise self.refusal
        self.connection.settimeout(max(self.deadline.left(), 0.001))
        if self.began:          # a client that writes headers and body apart waits for our ACK
            with contextlib.suppress(OSError):      # (Nagle), which would come after 40 ms
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        count = self.connection.recv_into(memoryview(buffer)[:self.budget])
        if not self.began and bytes(buffer[:count]).strip(b'\r\n'):
            self.deadline, self.began = Deadline(REQUEST_TIMEOUT), True
        self.budget -= count
        return count


class Failures:
    """The handshakes that failed: one line a minute in the log, with their count."""

    def __init__(self, closing: threading.Event) -> None:
        self.closing = closing
        self.lock = threading.Lock()
        self.count, self.last = 0, ''               # since the last line

    def add(self, address: str, reason: str) -> None:
        """Count one; the first has the line written when the minute is over."""
        with self.lock:
            self.count, self.last = self.count + 1, f'{address}: {reason}'
            if self.count == 1:
                try:
                    spawn('handshakes', self._tell)
                except Error:                           # the next one tries again
                    self.count = 0

    def _tell(self) -> None:
        self.closing.wait(HANDSHAKES_WINDOW)
        with self.lock:
            count, last, self.count = self.count, self.last, 0
        log.warning('TLS handshakes that failed: %d, the last of %s', count, last)


class ClientConnection:
    """The wire: handshake, limits, time-outs, and one write per response."""

    command = ''                            # the method, '' until it is known
    accept = ''                             # what the client wants to have, once that is known
    close_connection = False
    refused = False                         # it may be sending still
    idle = True                             # not in the middle of carrying out a request
    secure = False                          # whether it has sent something that TLS let through

    def __init__(self, connection: socket.socket, address: str, server: Listener) -> None:
        self.connection: Any = connection               # then an ssl.SSLSocket
        self.address, self.server = address, server

    def drop(self) -> None:
        """End the connection from another thread than its own."""
        with contextlib.suppress(OSError):      # not SSLSocket's own, which the owner would notice
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)

    def serve(self) -> None:
        """Answer one request after the other."""
        self.setup()
        try:
            while not self.close_connection:
                self.handle_one_request()
        finally:
            self.finish()

    def setup(self) -> None:
        """Do the TLS handshake, here in the worker and within HANDSHAKE_TIMEOUT."""
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deadline = Deadline(HANDSHAKE_TIMEOUT)
        self.connection.settimeout(deadline.left())
        if self.connection.recv(1, socket.MSG_PEEK).isalpha():      # a TLS record begins with 22
            self.connection.recv(HEADER_BYTES)          # unread, it would reset the connection
            self.refuse(400, 'this port speaks https: begin the address with https://')
            raise OSError(errno.EPROTO, 'plain http')
        self.connection = self.server.context.wrap_socket(
            self.connection, server_side=True, do_handshake_on_connect=False)
        self.connection.settimeout(max(deadline.left(), 0.001))
        self.connection.do_handshake()
        self.source = RequestReader(self.connection)
        self.rfile = io.BufferedReader(self.source)

    def finish(self) -> None:
        """Say goodbye in TLS, without waiting for the other end to do so."""
        with contextlib.suppress(OSError, ValueError):
            self.connection.settimeout(0)
            self.connection.unwrap()
        with contextlib.suppress(OSError):
            if self.refused:
                self._linger()
        self.rfile.close()

    def _linger(self) -> None:
        """Read what the client still sends, so that it reads the answer."""
        plain, deadline, left = socket.socket, Deadline(LINGER_TIMEOUT), LINGER_BYTES
        plain.shutdown(self.connection, socket.SHUT_WR)
        while left > 0 and not deadline.passed():
            self.connection.settimeout(max(deadline.left(), 0.001))
            data = plain.recv(self.connection, 65536)
            left = left - len(data) if data else 0

    def handle_one_request(self) -> None:
        self.source.expect()
        self.close_connection, self.command, self.accept = True, '', ''
        try:
            if not self._head():
                return
            body = self._body()
        except socket.timeout:
            if self.source.began:
                self.refuse(408, f'the request took longer than {REQUEST_TIMEOUT:g} s')
            return
        except Refusal as refusal:
            self.refuse(refusal.status, str(refusal))
            return
        self.idle = False
        reply = self.server.router.answer(Request(
            self.address, self.command, self.path, self.headers, body))
        try:
            self.respond(reply)
        finally:
            self.server.router.sent(reply)
        self.idle = True

    def _head(self) -> bool:
        """Read request line and headers; False when there are none, or they were refused."""
        first = self._line()
        while first in LINE_ENDS:                       # an empty line before a request is ignored
            first = self._line()
        if not first:
            return False
        if b' HTTP/' not in first:                      # it would be taken for HTTP/0.9
            raise Refusal(400, NO_HTTP)
        # UTF-8 in the target as it stands: Python's parser would split the line at some bytes.
        first = re.sub(rb'[\x80-\xff]', lambda at: b'%%%02X' % ord(at[0]), first)
        lines: list[bytes] = []
        while not lines or lines[-1] not in LINE_ENDS:
            lines.append(self._line())
            if not HEADER.fullmatch(lines[-1]):
                raise Refusal(400, NO_HTTP)
        return self._parse(first, b''.join(lines))

    def _parse(self, first: bytes, rest: bytes) -> bool:
        """Have http.server tell what a head says; False if it refused that."""
        from http.server import BaseHTTPRequestHandler
        head = BaseHTTPRequestHandler.__new__(BaseHTTPRequestHandler)       # its parser, no more
        head.protocol_version = 'HTTP/1.1'
        head.raw_requestline = first                                        # type: ignore
        head.rfile = io.BytesIO(rest)
        head.send_error = lambda code, *_: self.refuse(int(code), NO_HTTP)  # type: ignore
        head.handle_expect_100 = self._expect_100                           # type: ignore
        if not head.parse_request():
            return False
        self.command, self.path, self.headers = head.command, head.path, head.headers
        self.accept = self.headers.get('Accept', '')
        self.request_version, self.close_connection = head.request_version, head.close_connection
        return True

    def _line(self) -> bytes:
        line = self.rfile.readline()
        self.secure = True
        return line

    def _body(self) -> bytes:
        coding = self.headers.get_all('Transfer-Encoding', [])
        lengths = self.headers.get_all('Content-Length', [])
        too_large = Refusal(413, f'the body may have {BODY_BYTES} bytes')
        self.source.limit(4 * BODY_BYTES, too_large)        # what a chunk has around it, too
        if coding:
            if [name.strip().lower() for name in coding] != ['chunked'] or lengths \
                    or self.request_version < 'HTTP/1.1':
                raise Refusal(400, 'send the body chunked or with a Content-Length')
            return b''.join(self._chunks(too_large))
        if not lengths:
            return b''
        if len(lengths) > 1 or not re.fullmatch(r'[0-9]{1,10}', lengths[0]):
            raise Refusal(400, 'Content-Length must be one number')
        length = int(lengths[0])
        if length > BODY_BYTES:
            raise too_large
        return self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        data = self.rfile.read(length)
        if len(data) < length:
            raise Refusal(400, 'the body is shorter than was said')
        return data

    def _chunks(self, too_large: Refusal) -> Iterator[bytes]:
        """Yield the chunks of a body (RFC 9112, 7.1); extensions and trailers are skipped."""
        left = BODY_BYTES
        while True:
            size = re.fullmatch(rb'([0-9a-fA-F]{1,8})[ \t]*(;[^\r\n]*)?\r\n', self._line())
            if not size:
                raise Refusal(400, 'the body is not chunked as it was said to be')
            length = int(size[1], 16)
            if length > left:
                raise too_large
            if not length:
                break
            yield self._exactly(length)
            left -= length
            if self._exactly(2) != b'\r\n':
                raise Refusal(400, 'the body is not chunked as it was said to be')
        while self._line() not in (*LINE_ENDS, b''):
            pass

    def refuse(self, status: int, text: str) -> None:
        """Answer a request that can't be read, and end the connection."""
        self.close_connection = self.refused = True
        Audit(self.address).write(status)
        self.respond(Reply(status, text))

    def _expect_100(self) -> bool:
        self.connection.sendall(b'HTTP/1.1 100 Continue\r\n\r\n')
        return True

    def respond(self, reply: Reply) -> None:
        """Send an answer, one of a few KiB in one write."""
        from http import HTTPStatus
        form, body = reply.rendered(self.accept)
        lines = [f'HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}', 'Server: vmmonitor',
                 time.strftime('Date: %a, %d %b %Y %H:%M:%S GMT', time.gmtime()),
                 f'Content-Type: {form}',
                 *([] if reply.status == 304 else [f'Content-Length: {len(body)}']),   # RFC 9110
                 'Cache-Control: no-store', 'X-Content-Type-Options: nosniff',
                 *(f'{name}: {value}' for name, value in reply.headers),
                 f'Connection: {"close" if self.close_connection else "keep-alive"}', '', '']
        if self.command == 'HEAD':
            body = b''
        head = '\r\n'.join(lines).encode('latin-1')
        first = max(0, SEND_PIECE - len(head))              # a whole copy could be large
        self.connection.settimeout(SEND_TIMEOUT)            # which is for all of a sendall()
        self.connection.sendall(head + body[:first])
        for place in range(first, len(body), SEND_PIECE):
            self.connection.sendall(body[place:place + SEND_PIECE])


class Listener:
    """The https trigger: the socket that listens, who may connect, and how many at once."""

    def __init__(self, guests: Guests, settings: Settings) -> None:
        self.router = Dispatcher(guests, settings)
        self.clients: dict[ClientConnection, None] = {}     # in the order in which they came
        self.lock = threading.Lock()                # guards clients and waiting
        self.closing = threading.Event()
        self.failures = Failures(self.closing)
        self.waiting = 0                            # threads that wait for a connection
        self.certificate = b''                      # what clients are shown, PEM
        self.name = ''                              # address and port
        self.socket: socket.socket | None = None    # once it is bound

    def bind(self, config: Config) -> None:
        """Take the port that `config` names; Error if that can't be."""
        self._show(config)
        address, port = config.address, config.port
        self.name = f'[{address}]:{port}' if ':' in address else f'{address or "*"}:{port}'
        six = ':' in address or not address and socket.has_dualstack_ipv6()
        try:
            self.socket = socket.create_server(
                (address, port), family=socket.AF_INET6 if six else socket.AF_INET, backlog=128,
                dualstack_ipv6=six and not address)
        except OSError as problem:
            raise Error(f'can\'t listen on {self.name}: {os.strerror(problem.errno or 0)}',
                        'set listener.address to one that this host has, and listener.port to a '
                        'free one, 1024 or more where it is not root that runs this') from None

    def open(self, config: Config) -> None:
        """Listen where `config` says; Error if that can't be."""
        self.bind(config)
        spawn('listener', self._accept, self.socket)
        log.info('listening on %s', self.name)

    def reload(self, config: Config) -> None:
        """Take over the new certificate; with an InvalidValue, the old one stays."""
        if self.socket:
            self._show(config)

    def _show(self, config: Config) -> None:
        self.context, self.certificate = tls_context(config), Path(
            beside(config, config.certificate)).read_bytes()

    def _accept(self, listening: socket.socket) -> None:
        """Serve whoever connects. Another thread waits for the next one meanwhile: so many are idle
        that starting one costs only the first of many clients."""
        while not self.closing.is_set() and self.waiting < SPARE_THREADS:
            with self.lock:
                self.waiting += 1
            try:
                connection, address = listening.accept()
            except OSError as problem:
                if not self.closing.wait(STATE_POLL):       # such as too many open files
                    log.error('can\'t accept a connection: %s', explain(problem))
                continue
            finally:
                with self.lock:
                    self.waiting -= 1
            try:
                if not self.waiting:
                    spawn('listener', self._accept, listening)
                client = ClientConnection(connection, plain_address(address[0]), self)
                if self._admit(client):
                    self._serve(client)
            except Exception:           # a boundary: one client must not end the listener
                log.exception('client %s: unexpected error', address[0])
            finally:
                connection.close()

    def _admit(self, client: ClientConnection) -> bool:
        """Count the client in, and drop an idle one for it; False if all others are at work."""
        with self.lock:
            others = list(self.clients)
            same = [] if self.router.trusts(client.address) else [
                other for other in others if other.address == client.address]
            for crowd, limit in ((same, CONNECTIONS_PER_PEER), (others, CONNECTIONS_MAX)):
                if len(crowd) >= limit:
                    idle = next((other for other in crowd if other.idle), None)
                    if not idle:
                        return False
                    idle.drop()
                    self.clients.pop(idle, None)
            self.clients[client] = None
            return True

    def _serve(self, client: ClientConnection) -> None:
        try:
            client.serve()
        except (OSError, ValueError) as problem:        # a handshake that failed, a lost client
            log.debug('client %s: %s', client.address, explain(problem))
            if not client.secure:
                self.failures.add(client.address, explain(problem))
        finally:
            with self.lock:
                self.clients.pop(client, None)
            with contextlib.suppress(OSError):
                client.connection.close()

    def close(self) -> None:
        """Accept no more, and end the connections that are idle."""
        self.closing.set()
        if self.socket:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)      # ends accept()
            self.socket.close()
        with self.lock:
            for client in self.clients:
                if client.idle:
                    client.drop()


# ### part 2: networks ############################################################################

# === ip =========================================================================================
# Reading is read_network(): one `ip` process for all links, addresses and routes, and pure
# functions that turn its JSON into Link and Route. Changing is carry_out(): a list of Op, run by
# one `ip -batch` per namespace.

IP_TIMEOUT = 60.0              # for one run of ip, tc or iptables
SERVER_TIMEOUT = 5.0           # for the end of a server that was asked to end
NAME_LENGTH = 15               # the kernel's IFNAMSIZ, less its final zero byte
LENGTHS = {'interface': NAME_LENGTH, 'namespace': 100, 'nic': 127}  # a nic's can be an altname
MAC_FORM = re.compile('([0-9a-f]{2}:){5}[0-9a-f]{2}')
FOR_EVER = 0xffffffff          # as the seconds that an address lives
WIDE = {False: 3, True: 4}      # bits of a route to everywhere, or a good part of it: 2000::/3, or
#                                 the halves and quarters that VPNs make; v6 -> at most

# An odd row never takes the others with it: what the kernel has is not ours to choose.
SCHEMAS.update({
    'ip address': Rows([{
        'ifname': str, 'ifindex': int, 'address?': str, 'mtu?': int, 'operstate?': str,
        'flags?': Rows([str]), 'master?': str, 'link?': str, 'ifalias?': DATA, 'group?': str,
        'altnames?': Rows([str]),
        'linkinfo?': {'info_kind?': str, 'info_data?': dict, 'info_slave_data?': dict},
        'addr_info?': Rows([{'family': str, 'local': str, 'prefixlen': int, 'scope': str,
                             'address?': str, 'broadcast?': str, 'label?': str}])}]),
    'ip route': Rows([{
        'dst': str, 'gateway?': str, 'via?': {'host': str}, 'dev?': str, 'metric?': int,
        'table?': str, 'protocol?': str, 'type?': str, 'scope?': str, 'flags?': Rows([str]),
        'flow?': dict, 'metrics?': [dict], 'nexthops?': [{
            'gateway?': str, 'via?': {'host': str}, 'dev?': str, 'weight?': int,
            'flags?': Rows([str])}]}]),
    'ip neighbour': Rows([{'dst': str, 'lladdr?': str}]),
    'ip rule': Rows([{'priority': int, 'iif?': str, 'oif?': str}])})


class Feature(NamedTuple):
    """What a kernel may lack: how that shows, and how it is tried beforehand."""

    name: str
    modules: str                # for modprobe
    line: str                   # found in the line of an operation that needs it
    said: str                   # ... and in what is said when it is not there
    probe: str                  # for `ip` or `tc`, tried in a network namespace that then goes
    use: str

    def lacks(self) -> str:
        """Say that it is missing, and what to do."""
        return f'kernel lacks {self.name} (modprobe {self.modules})'


_NO_TYPE, _NO_QDISC = 'Unknown device type|not supported', 'kind is unknown|No such file'
FEATURES = (
    Feature('bridge', 'bridge', r'type bridge\b', _NO_TYPE, 'ip link add name x0 type bridge',
            'Switch and Router'),
    Feature('veth', 'veth', r'type veth\b', _NO_TYPE,
            'ip link add name x1 type veth peer name x2', 'VirtualNic'),
    Feature('macvtap', 'macvtap', r'type macvtap\b', _NO_TYPE,
            'ip link add link x1 name x3 type macvtap mode passthru',
            'VirtualNic with a namespace'),
    Feature('tun', 'tun', '^/dev/net/tun', 'No such', 'ip tuntap add dev x4 mode tap',
            'VirtualNic without a namespace'),
    Feature('bonding', 'bonding', r'type bond\b', _NO_TYPE, 'ip link add name x5 type bond',
            'Bond'),
    Feature('netem', 'sch_netem', r'\bnetem\b', _NO_QDISC, 'tc qdisc add dev lo root netem',
            'VirtualNic.impair()'),
    Feature('redirection', 'sch_ingress cls_u32 act_mirred', 'mirred|ingress',
            _NO_QDISC + '|classifier|action', 'tc qdisc add dev lo ingress',
            'connecting nics directly'))

# What else `ip`, `tc` and the kernel refuse: found in what was said, found in the line of the
# operation (the first row with both counts), the error, and its hint.
NET_TROUBLES: tuple[tuple[str, str, type[NetworkError], str], ...] = (
    ('busy', '^/dev/', InUse, 'another program, perhaps a machine, has it open'),
    ('', '^/dev/tap', InUse, 'needs root, and a /dev that is a devtmpfs'),
    ('Address already in use', '^--pid-file', InUse, 'another server of names or addresses listens '
     'there, perhaps on all addresses (see ss -lnup); let it bind to its own interfaces only'),
    ('not permitted|Permission denied|must be root', '', MissingFeature,
     'needs root or CAP_NET_ADMIN'),
    ('File exists', '', NameTaken, 'something has that name or number; see ip link'),
    ('Cannot find device|does not exist', '', NoInterface, 'it went away meanwhile; see ip link'),
    ('network namespace|"netns" value', '', NoInterface, 'no such namespace; see ip netns'),
    ('busy', 'master|link ', InUse, 'it belongs to something else; see ip -d link'),
    ('not supported|not allow enslaving', ' master ', InUse, 'it can be no port, as Wi-Fi can\'t; '
     'a Router(..., nat=True) can have it as its trunk'),
    ('', '', NetworkError, ''))


class Op(NamedTuple):
    """One change, as a line for `ip -batch` or for another tool."""

    what: str                   # in words: "create port web1-p0"
    line: str                   # words as a shell would quote them
    namespace: str = ''
    tool: str = 'ip'            # or tc; sysctl: path=value; end: what ends a server, and the files
    #                             that go with it; any other program: its arguments

    def devices(self) -> set[str]:
        """Return the interfaces that its line names after "dev"."""
        return {shlex.split(word)[0] for word in re.findall(r'(?<= dev )\S+', self.line)}

    def moved(self, onto: Mapping[str, str]) -> Op:
        """Return it, if it is about a route, on the devices that `onto` has for others."""
        if self.tool != 'ip' or not self.line.startswith('route '):
            return self
        return self._replace(line=re.sub(r'(?<= dev )\S+', lambda word: shlex.quote(onto.get(
            shlex.split(word[0])[0], shlex.split(word[0])[0])), self.line))

    def renamed(self, names: Mapping[str, str]) -> Op:
        """Return it for interfaces that are called otherwise by now: old name -> new one. A rule of
        a firewall keeps the old one."""
        old = '|'.join(re.escape(shlex.quote(name)) for name in names)
        if not names or self.tool not in ('ip', 'sysctl'):
            return self
        return self._replace(line=re.sub(
            rf'(?:(?<= dev )|(?<= label )|(?<=/conf/))(?:{old})(?![\w.-])',
            lambda word: shlex.quote(names[shlex.split(word[0])[0]]), self.line))


FORWARD_ALL = Op('forward', 'net/ipv4/ip_forward=1', tool='sysctl')     # between all interfaces


def ops_for(what: str, *lines: str, tool: str = 'ip') -> list[Op]:
    """Return the operations that do something together, on the host."""
    return [Op(what, line, tool=tool) for line in lines]


def net_error(op: Op, said: str) -> NetworkError:
    """Return the error that stands for what a tool said about an operation."""
    said = re.sub(r'^(RTNETLINK answers|Error): |^Command failed.*\n?', '', clip(said.strip()),
                  flags=re.MULTILINE).strip()
    where = f' in namespace {op.namespace}' if op.namespace else ''
    text = f'can\'t {op.what}{where}: {said} ({op.tool} {op.line})'
    for feature in FEATURES:
        if re.search(feature.line, op.line) and re.search(feature.said, said):
            return MissingFeature(text, feature.lacks())
    kind, hint = next((kind, hint) for pattern, line, kind, hint in NET_TROUBLES
                      if re.search(pattern, said) and re.search(line, op.line))
    return kind(text, hint)


def carry_out(ops: Iterable[Op], force: bool = False, keep: Sequence[int] = ()
              ) -> list[NetworkError]:
    """Carry out operations in order: one `ip -batch` for each run of them in one namespace.

    The first that fails raises its NetworkError; with `force` all are tried, and the errors
    returned. What is run inherits the descriptors `keep`.
    """
    def batched(op: Op) -> bool:    # a batch reads # as a comment, and quotes its own way
        return op.tool in ('ip', 'tc') and not set(op.line) & set('#"\'\\')
    errors: list[NetworkError] = []
    for (batch, *_), group in itertools.groupby(
            ops, lambda op: (batched(op), op.tool, op.namespace)):
        todo = list(group)
        for op, said in _batch(todo, force, keep) if batch else _one_by_one(todo, keep):
            errors.append(net_error(op, said))
            if not force:
                raise errors[0]
    return errors


def _batch(ops: Sequence[Op], force: bool, keep: Sequence[int], before: Sequence[str] = ()
           ) -> Iterator[tuple[Op, str]]:
    """Yield the operations that `ip -batch` or `tc -batch` refused, with what it said."""
    argv = [*before, ops[0].tool, *(['-n', ops[0].namespace] if ops[0].namespace else []),
            *(['-force'] if force else []), '-batch', '-']
    text = ''.join(f'{op.line}\n' for op in ops)
    done = run(argv, IP_TIMEOUT, text.encode(), check=False, keep=keep)
    said = done.stderr.decode(errors='backslashreplace')
    failed = re.findall(r'((?:.*\n)*?)Command failed -:(\d+)', said)
    for texts_, number in failed:
        yield ops[int(number) - 1], texts_
    if done.returncode and not failed:  # an argument it could not read: it ends without a number
        quoted = re.findall(r'"([^"]+)"', said)
        place = next((place for word in quoted for place, op in enumerate(ops)
                      if word in op.line.split()), 0)
        yield ops[place], said
        if force and ops[place + 1:]:
            yield from _batch(ops[place + 1:], force, keep, before)


def _one_by_one(ops: Sequence[Op], keep: Sequence[int]) -> Iterator[tuple[Op, str]]:
    """Write a value below /proc/sys, or run a program, for each operation. A server, whose first
    argument is --pid-file=PATH, takes the place of the one that has it."""
    for op in ops:
        if op.tool == 'sysctl':
            path, _, value = op.line.rpartition('=')
            try:
                Path('/proc/sys', path).write_text(value)
            except OSError as problem:
                yield op, explain(problem)
            continue
        words = shlex.split(op.line)
        if words[0].startswith('--pid-file='):
            end_server(words[0])
        if op.tool == 'end':
            for word in words:
                remove_file(word.partition('=')[2])
            continue
        where = ['-n', op.namespace] if op.namespace else []
        try:
            run([op.tool, *where, *words], IP_TIMEOUT, keep=keep)
        except CommandError as problem:
            yield op, '; '.join(filter(None, [problem.stderr, problem.hint]))


def server_of(op: Op) -> list[str]:
    """Return the arguments of the server that an operation starts, [] when it does not run. Only
    root writes its pid file, and a later process of that number has other arguments."""
    flag = shlex.split(op.line)[0]
    with contextlib.suppress(OSError, ValueError):
        pid = int(Path(flag.partition('=')[2]).read_text())
        argv = Path(f'/proc/{pid}/cmdline').read_bytes().decode().split('\0')[1:-1]
        return argv if flag in argv else []
    return []


def server_accounts() -> list[pwd.struct_passwd]:
    """Return who a server may run as when it has its sockets: the first is the one of a new one."""
    found = []
    for name in ('dnsmasq', 'nobody'):
        with contextlib.suppress(KeyError):
            found.append(pwd.getpwnam(name))
    return found


def end_server(flag: str) -> None:
    """End the server with that argument, also one that has not yet written its pid; other people's
    processes may have that argument, too."""
    users = [{0}, *({account.pw_uid} for account in server_accounts())]
    for pid in filter(str.isdecimal, os.listdir('/proc')):
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            process = os.pidfd_open(int(pid))
            opened.callback(os.close, process)
            if flag.encode() not in Path('/proc', pid, 'cmdline').read_bytes().split(b'\0') \
                    or process_users(pid) not in users:
                continue
            for number in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(process, number)
                if select.select([process], [], [], SERVER_TIMEOUT)[0]:
                    break


class Hop(NamedTuple):
    """One next hop of a route."""

    gateway: str                # '' when the target is on the link
    device: str
    weight: int
    onlink: bool

    def words(self, onto: Mapping[str, str], v6: bool) -> list[str]:
        """Return how `ip route` writes it, with the devices that `onto` has for others."""
        mixed = ':' in self.gateway and not v6
        device = shlex.quote(onto.get(self.device, self.device))
        return [*(['via', *(['inet6'] if mixed else []), self.gateway] if self.gateway else []),
                *(['dev', device] if self.device else []), *(['onlink'] if self.onlink else [])]


# What a row of `ip -json route` may have for line() to say all of it, and which of its metrics.
ROUTE_MEMBERS = frozenset((
    'type', 'dst', 'from', 'tos', 'gateway', 'via', 'dev', 'table', 'protocol', 'scope', 'prefsrc',
    'metric', 'flags', 'flow', 'metrics', 'pref', 'expires', 'nexthops', 'weight'))
ROUTE_METRICS = frozenset((
    'mtu', 'advmss', 'window', 'hoplimit', 'initcwnd', 'initrwnd', 'quickack', 'reordering',
    'ssthresh', 'cwnd', 'congestion', 'ecn'))
METRIC_WORDS = {'congestion': 'congctl', 'ecn': 'features'}     # where `ip route add` has others


@dataclasses.dataclass(frozen=True)
class Route:
    """A route as `ip -json route` shows it."""

    to: str                     # network/prefix, address, or "default"
    gateway: str                # '' when the target is on the link, or with several next hops
    device: str                 # '' with several next hops
    metric: int
    table: str                  # main, local, or a number
    protocol: str               # who made it: kernel, static, dhcp, ra
    v6: bool
    hops: tuple[Hop, ...]       # all of them; one for most routes
    raw: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)

    @property
    def wide(self) -> bool:
        """Whether it is a default route, or one of the few that stand for it."""
        return self.to == 'default' or bool(re.search(rf'/[0-{WIDE[self.v6]}]$', self.to))

    def uses(self, device: str) -> bool:
        """Tell whether a next hop of it goes out at `device`."""
        return any(hop.device == device for hop in self.hops)

    def strange(self) -> Iterator[str]:
        """Yield what it has that line() can't say, in words."""
        odd = {key for row in (self.raw, *self.raw.get('nexthops', ()))
               for key in row.keys() - ROUTE_MEMBERS}
        odd |= {key for row in self.raw.get('metrics', ()) for key in row.keys() - ROUTE_METRICS}
        if odd:
            yield f'route {self.to} ({", ".join(sorted(odd))})'

    def line(self, onto: Mapping[str, str]) -> str:
        """Return what follows `ip route replace` to have this route: on the devices that `onto` has
        for its own, for ever, as nobody renews it there."""
        raw, several = self.raw, len(self.hops) > 1
        flow = raw.get('flow', {})
        pairs = {'proto': self.protocol, 'table': self.table, 'src': raw.get('prefsrc'),
                 'metric': self.metric, 'scope': not self.v6 and raw.get('scope'),
                 'from': raw.get('from'), 'tos': raw.get('tos'),
                 'realms': '/'.join(str(flow[key]) for key in ('from', 'to') if key in flow),
                 'pref': raw.get('pref'), 'expires': not onto and raw.get('expires')}
        metrics = [word for row in raw.get('metrics', ()) for key, value in row.items()
                   for word in (METRIC_WORDS.get(key, key), key if key == 'ecn' else f'{value}')]
        return ' '.join([
            raw.get('type', 'unicast'),
            '::/0' if self.v6 and self.to == 'default' else self.to,
            *([] if several else self.hops[0].words(onto, self.v6)),
            *(f'{key} {value}' for key, value in pairs.items() if value), *metrics,
            *(word for hop in self.hops if several for word in (
                'nexthop', *hop.words(onto, self.v6), 'weight', f'{hop.weight}'))])


def place_of(line: str) -> tuple[str, ...]:
    """Return the place of a Route's line(), where `ip route replace` puts it in another's stead."""
    return line.split()[1], *re.findall(r' (?:table|metric|from|tos) \S+', line)


# The members of an address of `ip -json address` that `ip address replace` has a flag for, and
# the other ones that are known.
ADDRESS_FLAGS = ('home', 'mngtmpaddr', 'noprefixroute', 'autojoin')
ADDRESS_MEMBERS = frozenset((
    *ADDRESS_FLAGS, 'family', 'local', 'address', 'prefixlen', 'metric', 'broadcast', 'scope',
    'label', 'valid_life_time', 'preferred_life_time', 'protocol', 'secondary', 'temporary',
    'deprecated', 'tentative', 'dadfailed', 'permanent', 'dynamic', 'nodad', 'optimistic',
    'stable-privacy'))


class Link:
    """An interface as `ip -json -details address` shows it."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        info = row.get('linkinfo', {})
        self.name: str = row['ifname']
        self.index: int = row['ifindex']
        self.kind: str = info.get('info_kind', '')      # bridge, veth, ...
        # A tunnel's is an IP address, or nothing; InfiniBand's is longer.
        self.mac: str = row.get('address', '') if MAC_FORM.fullmatch(row.get('address', '')) else ''
        self.mtu: int = row.get('mtu', 0)
        self.state: str = row.get('operstate', 'unknown').lower()
        self.flags: tuple[str, ...] = tuple(row.get('flags', ()))
        self.admin = 'up' if 'UP' in self.flags else 'down'     # as set, whatever its cable says
        self.master: str = row.get('master', '')        # the bridge or bond it is a port of
        self.peer: str = row.get('link', '') if self.kind == 'veth' else ''     # in this namespace
        self.below = row.get('link'), info.get('info_data', {}).get('link')     # of a tunnel, ...
        self.alias: str = row.get('ifalias', '')
        self.group: str = row.get('group', '')
        self.names: tuple[str, ...] = (self.name, *row.get('altnames', ()))
        self.data: Mapping[str, Any] = info.get('info_data', {})        # what its kind says of it
        self.slave: Mapping[str, Any] = info.get('info_slave_data', {})         # ... its master
        self.raw_addresses: Sequence[Mapping[str, Any]] = row.get('addr_info', ())
        self.addresses = tuple(                 # with their prefixes, the link-local ones last
            f'{raw["local"]}/{raw["prefixlen"]}' for raw in sorted(
                self.raw_addresses, key=lambda raw: raw['scope'] == 'link'))

    def ours(self) -> bool:
        """Tell whether it carries the marks of this program."""
        return self.group.isdigit() and self.alias == mark_of(int(self.group))

    def own_networks(self) -> set[str]:
        """Return the targets of the routes that the kernel itself makes for its addresses."""
        found = {'fe80::/64'}
        for raw in self.raw_addresses:
            if not raw.get('noprefixroute'):
                whole = f'{raw.get("address", raw["local"])}/{raw["prefixlen"]}'
                network = ipaddress.ip_network(whole, strict=False)
                found.add(str(network).removesuffix(f'/{network.max_prefixlen}'))
        return found

    def strange_addresses(self) -> Iterator[str]:
        """Yield what can't be given back to it as it is, in words."""
        for raw in self.raw_addresses:
            odd = sorted(raw.keys() - ADDRESS_MEMBERS)
            if not str(raw.get('label', self.name)).startswith(self.name):
                odd.append(f'label {raw["label"]}')     # which `ip` takes for no label of it
            if odd:
                yield f'address {raw["local"]} ({", ".join(odd)})'

    def address_lines(self, back: bool) -> Iterator[str]:
        """Yield what follows `ip address replace` to have its addresses again (`back`), or
        elsewhere: there they live for ever, since a DHCP client can't renew them, have no label,
        which begins with the interface's name, and link-local IPv6 stays. Of IPv6 the kernel has
        the latest first, and prefers it."""
        kinds = [[raw for raw in self.raw_addresses if (raw['family'] == 'inet6') is v6]
                 for v6 in (False, True)]
        for raw in kinds[0] + kinds[1][::-1]:
            v6 = raw['family'] == 'inet6'
            if raw.get('temporary') or (v6 and raw['scope'] == 'link' and not back):
                continue
            peer = f' peer {raw["address"]}' if 'address' in raw else ''
            pairs = {'broadcast': raw.get('broadcast'), 'scope': raw['scope'],
                     'label': back and raw.get('label', self.name) != self.name and shlex.quote(
                         raw['label']), 'metric': raw.get('metric')}
            for key in 'valid', 'preferred':
                seconds = raw.get(f'{key}_life_time', FOR_EVER)
                if seconds == 0 or (back and seconds != FOR_EVER):
                    pairs[f'{key}_lft'] = str(seconds)
            yield ' '.join([
                f'{raw["local"]}{peer}/{raw["prefixlen"]}',
                *(f'{key} {value}' for key, value in pairs.items() if value),
                *(['nodad'] if v6 else []), *(flag for flag in ADDRESS_FLAGS if raw.get(flag))])


class NetworkState(NamedTuple):
    """What one read_network() saw."""

    links: dict[str, Link]
    routes: list[Route]
    at: float                   # when it was (time.monotonic())

    def find(self, name: str, namespace: str = '') -> Link:
        """Return the interface of this name, or other name (altname); or raise NoInterface."""
        found = self.links.get(name) or next(
            (link for link in self.links.values() if name in link.names), None)
        if found:
            return found
        import difflib
        near = difflib.get_close_matches(name, list(self.links), 1)
        raise NoInterface(f'{name}: no such interface' + (namespace and f' in {namespace}'),
                          f'did you mean {near[0]}?' if near else 'see ip link')

    def ports(self, master: str) -> list[Link]:
        return [link for link in self.links.values() if link.master == master]


def parse_links(rows: Iterable[Mapping[str, Any]]) -> dict[str, Link]:
    """Turn the output of `ip -json -details address show` into name -> Link."""
    return {row['ifname']: Link(row) for row in rows}


def parse_routes(rows: Iterable[Mapping[str, Any]]) -> list[Route]:
    """Turn the output of `ip -json -details route show table all` into Routes that people make."""
    routes_ = []
    for row in rows:
        label = row['dst'] != 'default' and not {'.', ':'} & {*row['dst']}      # of MPLS
        if label or row.get('protocol', 'kernel') == 'kernel' and row.get('type', 'unicast') in (
                'local', 'broadcast', 'multicast', 'anycast'):
            continue
        ways = row.get('nexthops') or [row]
        hops = tuple(Hop(way.get('gateway') or way.get('via', {}).get('host', ''),
                         way.get('dev', ''), way.get('weight', 1), 'onlink' in way.get('flags', ()))
                     for way in ways)
        v6 = 'pref' in row or any(':' in text for text in (
            row['dst'], *(way.get('gateway', '') for way in ways)))
        alone = hops[0] if len(hops) == 1 else Hop('', '', 1, False)
        routes_.append(Route(row['dst'], alone.gateway, alone.device, row.get('metric', 0),
                             row.get('table', 'main'), row.get('protocol', ''), v6, hops, row))
    return routes_


def read_network(namespace: str = '') -> NetworkState:
    """Read all links and routes of a namespace ('' is the host's): one `ip -json -batch`."""
    argv = ['ip', *(['-n', valid_name(namespace, 'namespace')] if namespace else []),
            '-json', '-details', '-batch', '-']
    done = run(argv, IP_TIMEOUT, b'address show\nroute show table all\n', check=False)
    if done.returncode:
        raise net_error(Op('read the interfaces', 'address show', namespace),
                        done.stderr.decode(errors='backslashreplace'))
    try:
        rows, ways = (checked(command, value) for command, value in zip(
            ('ip address', 'ip route'), parse_documents(done.stdout, names=True)))
    except ValueError as problem:
        raise NetworkError(f'ip printed no such list: {problem}', 'update iproute2') from None
    return NetworkState(parse_links(rows), parse_routes(ways), time.monotonic())


def neighbour_lines(device: str) -> Iterator[str]:
    """Yield what follows `ip neighbour replace` for those that people have entered, which the
    kernel takes away with the last address."""
    for what in ('nud', 'permanent'), ('proxy',):
        said = run(['ip', '-json', 'neighbour', 'show', *what, 'dev', device], IP_TIMEOUT).stdout
        for row in checked('ip neighbour', parse_json(said or b'[]')):
            if 'lladdr' in row:
                yield f'{row["dst"]} lladdr {row["lladdr"]} nud permanent'
            elif what[0] == 'proxy':
                yield f'proxy {row["dst"]}'


def rules_of(devices: Sequence[str]) -> Iterator[str]:
    """Yield the rules that name one of these interfaces (`ip rule`; kernels without IPv6, or
    without rules, fail), in words."""
    for family in '-4', '-6':
        said = run(['ip', '-json', family, 'rule', 'show'], IP_TIMEOUT, check=False).stdout
        for row in checked('ip rule', parse_json(said or b'[]')):
            for way in 'iif', 'oif':
                if row.get(way) in devices:
                    yield f'rule {row["priority"]} ({way} {row[way]})'


def valid_name(name: str, what: str = 'interface', empty: bool = False) -> str:
    """Return a name (or '', if it may be `empty`) that is safe to give to `ip` and in a path."""
    length, more = LENGTHS[what], ':@+,' if what == 'namespace' else ''
    if empty and name == '':
        return ''
    if not isinstance(name, str) or name in ('lo', 'all', 'default') or not re.fullmatch(
            rf'[A-Za-z0-9_][A-Za-z0-9_.{more}-]{{0,{length - 1}}}', name):
        raise NetworkError(
            f'{name!r:.80} can\'t be the name of {"an" if what == "interface" else "a"} {what}',
            f'take 1 to {length} of the characters A-Z a-z 0-9 _ . {" ".join([*more, "-"])}, the '
            'first a letter, a digit or _, but not lo, all or default')
    return name


def valid_address(address: str, kind: Callable[[str], object] = ipaddress.ip_interface) -> str:
    """Return an IP address with prefix, checked, as `ip` wants it."""
    try:
        if not isinstance(address, str) or '%' in address:  # it takes anything behind one
            raise ValueError('it must be a string without a %')
        return str(kind(address))
    except ValueError as problem:
        raise NetworkError(f'{address!r:.80} is no IP address: {problem}',
                           'write one such as 192.0.2.1/24 or 2001:db8::1/64') from None


def valid_mac(mac: str) -> str:
    """Return a MAC that an interface can have, in small letters."""
    small = mac.lower() if isinstance(mac, str) else ''
    if not MAC_FORM.fullmatch(small) or int(small[:2], 16) & 1 or not set(small) - set('0:'):
        raise NetworkError(f'{mac!r:.80} is no MAC for an interface',
                           'write six bytes such as 52:54:00:12:34:56, the first one even')
    return small


def short_name(long: str) -> str:
    """Return an interface name for a longer one: itself if it fits, else a stable short form."""
    if len(long) <= NAME_LENGTH:
        return long
    digest = base64.b32encode(hashlib.sha256(long.encode()).digest()).decode().lower()
    return f'vm{digest[:7]}-{long.rpartition("-")[2][-5:]}'


def plain(name: str) -> str:
    """Return a name of others' as ours can begin."""
    return re.sub(r'^\W|[^A-Za-z0-9_.-]', '_', name)


def mark_of(group: int) -> str:
    """Return the alias that goes with an interface group of ours."""
    return f'vmmonitor:{group:08x}'


def open_for(what: str, path: str, prepare: Callable[[int], object], make: bool = False) -> int:
    """Open a device, or a file that it may have to `make`, and `prepare` the descriptor."""
    with contextlib.ExitStack() as opened:
        try:
            if make:
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o600)
            opened.callback(os.close, file)
            prepare(file)
        except OSError as problem:
            said = problem.strerror or str(problem)
            raise net_error(Op(what, path, tool='open'), said) from None
        opened.pop_all()
        return file


# === registry ===================================================================================
# Ownership. Whatever is made gets a Record in the Registry first, then an interface group of its
# own and the alias "vmmonitor:GROUP". Only what shows both, or stands in the Registry as being
# created with that group, is ever removed. A Record has the way back, too, as a list of Op: a
# trunk's addresses and routes, firewall rules, forwarding. Rollback, delete() and clean() are
# the same function, Transaction.remove().

LOCK_TIMEOUT = 90.0            # for another process that is changing the network, longer than that
USERS_TIMEOUT = 1.0            # for a QEMU that is just ending to let its taps go
GROUP_FIRST = 1 << 30          # interface groups we mark our own with: from here to 2 << 30
STATE_DIR = os.environ.get('VMMONITOR_STATE', '/run/vmmonitor')     # of the Registry
NETNS_DIR = '/run/netns'        # where `ip netns` keeps the names of namespaces
CLEAN = 'vmmonitor.py --clean'

SCHEMAS.update({
    'registry': {'version': int, 'things': dict},
    'record': {'kind': str, 'group': int, 'stage?': str, 'pid?': int, 'started?': str,
               'parents?': [str], 'undo?': [[str]], 'facts?': dict},
    'namespace facts': {'space': str, 'inode': str},
    'nic facts': {'layout': str, 'namespace': str, 'mac': str, 'index': int, 'sink': str,
                  'tap': str},
    'bond facts': {'identities?': {'*': [(int, str)]}},
    'router facts': {'trunk': str, 'nat': bool, 'subnet': str,
                     'identities?': {'*': [(int, str)]}}})


@dataclasses.dataclass
class Record:
    """A line of the Registry: one thing that was made, and the way back."""

    kind: str                                   # switch, router, bond, nic, cable or namespace
    group: int                                  # the mark of its interfaces
    stage: str = 'creating'                     # then ready, and deleting
    pid: int = 0                                # the process that made it ...
    started: str = ''                           # ... and when that began, in clock ticks
    parents: list[str] = dataclasses.field(default_factory=list)    # it goes when one of them goes
    undo: list[Op] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)     # what its class needs
    more: dict[str, Any] = dataclasses.field(default_factory=dict)      # of a later version

    @classmethod
    def read(cls, row: Any) -> Record:
        """Return what a row of the file stands for; ValueError or TypeError if it is damaged."""
        row = {'undo': [], 'facts': {}, **checked('record', row)}
        checked(f'{row["kind"]} facts', row['facts'])
        names = {field.name for field in dataclasses.fields(cls)} - {'more'}
        known = {key: row.pop(key) for key in names & row.keys()}
        return cls(**{**known, 'undo': [Op._make(op) for op in known['undo']]}, more=row)

    def other(self, kind: str, facts: Mapping[str, Any]) -> str:
        """Return what it is, if that is not what is wanted, or ''."""
        had = ', '.join(f'{key} {self.facts.get(key)}' for key, value in facts.items()
                        if value and self.facts.get(key) != value)
        return f'a {self.kind}{had and " with " + had}' if had or self.kind != kind else ''

    def taken(self) -> list[str]:
        """Return the interfaces that it took over."""
        trunk = self.facts.get('trunk', '') if not self.facts.get('nat') else ''
        return [*self.facts.get('interfaces', [trunk] * bool(trunk))]

    def row(self) -> dict[str, Any]:
        row = {**vars(self), 'undo': [*map(list, self.undo)]}
        return {**row.pop('more'), **row}


def namespace_id(name: str) -> str:
    """Return what tells a namespace from a later one of its name, even of that inode, or ''."""
    with contextlib.suppress(OSError):
        info = os.stat(os.path.join(NETNS_DIR, name))
        return f'{info.st_ino} {info.st_ctime_ns}'
    return ''


def same_namespace(row: Record) -> bool:
    """Tell whether the namespace of a Record is there, and not a later one of that name."""
    now = namespace_id(row.facts['space'])
    return bool(now) and row.facts['inode'] in ('', now)        # '': it was not yet written down


def closure(start: Iterable[str], follow: Callable[[set[str]], Iterable[str]]) -> set[str]:
    """Return `start`, what follows from it, what follows from that, and so on."""
    found: set[str] = set()
    more = set(start)
    while more:
        found |= more
        more = set(follow(found)) - found
    return found


class Registry:
    """What this program made in this network namespace, in a file: name -> Record."""

    VERSION = 1

    def __init__(self) -> None:
        inode = os.stat('/proc/thread-self/ns/net').st_ino
        self.path = Path(STATE_DIR, f'net-{inode}.json')
        self.records: dict[str, Record] = {}
        self.damaged: dict[str, Any] = {}   # rows that can't be read, as they stand in the file
        self.more: dict[str, Any] = {}      # members of the file that are not ours

    @classmethod
    def read(cls) -> Registry:
        registry = cls()
        registry.load()
        return registry

    def load(self) -> None:
        """Read the file; what is not there yet is empty."""
        try:
            self.more = dict(checked('registry', parse_json(self.path.read_bytes())))
            version, things = self.more.pop('version'), self.more.pop('things')
        except FileNotFoundError:
            return
        except PermissionError:                     # it is whole, as far as is known
            raise MissingFeature(f'{self.path}: what was made of networks is for root alone',
                                 'run this as root, with sudo') from None
        except (OSError, ValueError) as problem:
            raise NetworkError(
                f'{self.path}: what was made of networks can\'t be read: {explain(problem)}',
                f'move the file away and run {CLEAN}: that removes what is marked as ours, but '
                'gives no addresses back') from None
        if version != self.VERSION:
            raise NetworkError(f'{self.path}: is of version {version}, and this program knows '
                               f'{self.VERSION}', 'use the vmmonitor.py that wrote it')
        for name, row in things.items():
            try:
                self.records[name] = Record.read(row)
            except (TypeError, ValueError):         # it is in the way of nobody else
                self.damaged[name] = row

    def unreadable(self, name: str) -> NetworkError:
        """Return the error for a thing whose row is damaged."""
        return NetworkError(
            f'{name}: what is written down of it in {self.path} can\'t be read: '
            f'{self.damaged[name]!r:.80}', f'mend that, or {CLEAN} {name} --force removes what '
            'of it is marked as ours, but gives no addresses back')

    def require_readable(self, name: str) -> None:
        if name in self.damaged:
            raise self.unreadable(name)

    def save(self) -> None:
        things = {**self.damaged, **{name: row.row() for name, row in self.records.items()}}
        tree = {**self.more, 'version': self.VERSION, 'things': things}
        write_whole(str(self.path), json.dumps(tree).encode(), replace=True)

    def lock(self) -> int:
        """Have the registry to oneself until the descriptor that this returns is closed."""
        def take(lock: int) -> None:
            if lock_one([lock], Deadline(LOCK_TIMEOUT)) < 0:
                raise InUse('another process has been changing the network for '
                            f'{LOCK_TIMEOUT:g} s', f'see fuser {path}')
        path = str(self.path.with_suffix('.lock'))
        return open_for('write down what is made', path, take, make=True)

    def plugged(self, nic: str) -> tuple[str, str]:
        """Return the cable that is in a nic, and the nic at its other end; '' for none."""
        if nic not in self.records:
            raise NoInterface(f'{nic}: is not one of ours any more', 'make it again')
        return next(((name, end) for name, row in self.records.items() if row.kind == 'cable'
                     and nic in row.parents for end in row.parents if end != nic), ('', ''))

    def between(self, one: str, other: str) -> list[str]:
        """Return what connects two switches, or two nics: a nic, or a cable."""
        return [name for name, row in self.records.items()
                if one != other and set(row.parents) == {one, other}]

    def with_dependents(self, names: Iterable[str]) -> list[str]:
        """Return these names, their children, and namespaces that were made for what goes; what is
        damaged may need any of those."""
        def follow(gone: set[str]) -> Iterator[str]:
            needed = {parent for name, row in self.records.items() if name not in gone
                      for parent in row.parents}
            for name, row in self.records.items():
                if gone & set(row.parents) or (row.facts.get('automatic') and name not in needed
                                               and not self.damaged):
                    yield name
        gone = closure(self.records.keys() & set(names), follow)
        return [name for name in self.records if name in gone]


def open_taps() -> dict[str, str]:
    """Return which other processes have taps open: /dev/tapN, or a plain tap's name -> its name."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir('/proc')):
        for fd in names_in(f'/proc/{pid}/fd') if int(pid) != os.getpid() else ():
            with contextlib.suppress(OSError):      # it ended, or closed it meanwhile
                tap = os.readlink(f'/proc/{pid}/fd/{fd}')
                if tap == '/dev/net/tun':
                    shown = Path(f'/proc/{pid}/fdinfo/{fd}').read_text()
                    tap = ''.join(re.findall(r'^iff:[ \t]*(\S+)$', shown, re.MULTILINE))
                elif not tap.startswith('/dev/tap'):
                    continue
                found[tap] = process_name(pid)
    return found


class Transaction:
    """Changes of the network, all or none: `with transaction() as plan`."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.records = self.registry.records
        self.network = NetworkState({}, [], 0.0)
        self.taken: set[str] = set()        # names, MACs and groups that something has
        self.group = 0                      # the mark of what this transaction makes or deletes
        self.claimed: list[str] = []        # the names of what is planned ...
        self.unsaved = False                # ... or Records that were changed
        self.ops: list[Op] = []             # what makes the interfaces ...
        self.late: list[Op] = []            # ... what follows when they are marked ...
        self.optional: list[Op] = []        # ... and what is done if it can be
        self.taps: list[int] = []           # descriptors of taps that vanish with this process
        self.maker = os.getpid(), process_start(os.getpid())
        self.host = os.uname().nodename     # what the MACs of this host stand on
        with contextlib.suppress(OSError):
            self.host = Path('/etc/machine-id').read_text()
        self.lock = -1

    def look(self) -> None:
        """See what is there, and what can't be had any more."""
        self.network = read_network()
        self.taken = {word for link in self.network.links.values()
                      for word in (*link.names, link.mac, link.group)}
        self.taken |= {word for name, row in self.records.items()
                       for word in (name, row.facts.get('mac', ''))}

    def standing(self, name: str) -> Record | None:
        """Return the Record of what stands under a name; what is left of a broken one goes."""
        row = self.records.get(name)
        if row and (row.stage != 'ready' or not self.stands(name)):
            self.remove([name])
            self.look()
        return self.records.get(name)

    def claim(self, name: str, kind: str, parents: Sequence[str] = (), **facts: Any
              ) -> Record | None:
        """Reserve a name for what shall be made; None when it stands already. Raises NameTaken."""
        if name in self.claimed:
            raise NameTaken(f'{name}: would be made twice at once', 'name each otherwise')
        self.registry.require_readable(name)
        row = self.standing(name)
        if row:
            other = row.other(kind, facts)
            if not other:
                return None
            raise NameTaken(f'{name}: exists already, as {other}',
                            'choose another name, or delete() it first')
        holder = next((link for link in self.network.links.values() if name in link.names), None)
        if holder:
            raise NameTaken(f'{name}: a {holder.kind or "network"} interface of that name exists '
                            'that is not ours to use',
                            f'choose another name; see ip -d link show dev {name}')
        row = Record(kind, self.group, 'creating', *self.maker, list(parents), [], facts)
        self.records[name] = row
        self.claimed.append(name)
        self.taken.add(name)
        return row

    def free_name(self, stem: str) -> str:
        """Return `stem` with the lowest number that makes it a free name."""
        return next(name for name in (f'{stem}{number}' for number in itertools.count())
                    if short_name(name) not in self.taken)

    def free_mac(self, prefix: str, name: str, wanted: str = '') -> str:
        """Return the MAC for a name: always the same on this host, and never one that is known."""
        if wanted in self.taken - {''}:
            raise NameTaken(f'{name}: another interface has the MAC {wanted}', 'choose another')
        digests = (hashlib.sha256(f'{self.host}/{name}/{attempt}'.encode()).hexdigest()
                   for attempt in itertools.count())
        macs = (':'.join([prefix, *re.findall('..', digest)])[:17] for digest in digests)
        mac = wanted or next(mac for mac in macs if mac not in self.taken)
        self.taken.add(mac)
        return mac

    def plan_namespace(self, name: str, automatic: bool = True) -> list[str]:
        """Plan a namespace, unless there is one; return what it is called here, if it is ours."""
        key = f'netns/{valid_name(name, "namespace")}'
        if key in self.claimed or self.standing(key):
            return [key]
        if namespace_id(name):
            if automatic:
                return []
            raise NameTaken(f'namespace {name}: exists and is not ours', 'choose another name')
        self.claim(key, 'namespace', space=name, inode='', automatic=automatic)
        self.ops.append(Op(f'create namespace {name}', f'netns add {name}'))
        return [key]

    def make(self) -> None:
        """Write down what is claimed, make and mark it, bring up what is in namespaces, and do the
        rest that was planned: one batch for the host, one for each namespace."""
        if self.claimed or self.unsaved:
            self.registry.save()
        mark = f'link set group {self.group} alias {mark_of(self.group)} addrgenmode none'
        todo = []
        for space in sorted({op.namespace for op in self.ops}):
            todo += [op for op in self.ops if op.namespace == space]
            todo.append(Op('mark what was made', f'{mark} up' if space else mark, space))
        carry_out(todo + self.late, keep=[self.lock])
        for tap in self.taps:
            fcntl.ioctl(tap, TUNSETPERSIST, 1)
        for problem in carry_out(self.optional, True, [self.lock]):
            log.warning('%s', explain(problem))
        for row in map(self.records.__getitem__, self.claimed):
            row.stage = 'ready'
            if row.kind == 'namespace':
                row.facts['inode'] = namespace_id(row.facts['space'])
        if self.claimed:
            self.registry.save()

    def owns(self, name: str) -> bool:
        """Tell whether the interface of that name is what its Record stands for."""
        row, link = self.records[name], self.network.links.get(name)
        return link is not None and (
            link.ours() or (row.stage != 'ready' and link.group == str(row.group)))

    def stands(self, name: str) -> bool:
        """Tell whether what a Record stands for is there, and what joins bridges is in them."""
        row, links = self.records[name], self.network.links
        if row.kind == 'namespace':
            return same_namespace(row)
        if row.kind == 'cable':
            return links.keys() >= set(row.parents)
        if row.facts.get('layout') == 'pair' and row.parents:       # of a LAN port only the sink
            ends = [links[end].master for end in (name, row.facts['sink']) if end in links]
            if ends[-len(row.parents):] != row.parents:
                return False
        space = row.facts.get('namespace')
        return name in links and links[name].ours() and not (space and not namespace_id(space))

    def joined(self, bridges: Iterable[str]) -> set[str]:
        """Return these bridges and those that veth pairs join to them."""
        links = self.network.links
        pairs = [(link.master, links[link.peer].master) for link in links.values()
                 if link.master and link.peer in links]
        return closure(filter(None, bridges), lambda found: (
            there for here, there in pairs if here in found and there))

    def users(self, ending: Iterable[str] = ()) -> dict[str, str]:
        """Return what running machines, but for the `ending` ones, use: nics, bridges that these
        reach, and cables -> whose."""
        links = self.network.links
        used = dict.fromkeys(self.registry.damaged.keys() & links.keys(), 'something unknown')
        taps = {tap: who for tap, who in (open_taps() if self.records else {}).items()
                if not is_of(who, ending)}
        trunks = {name for row in self.records.values() for name in row.taken()}
        for link in links.values():                 # it is not open: another namespace's one is
            if link.admin == 'up' and 'LOWER_UP' not in link.flags:     # as soon as one is open
                taps.pop(link.name, None)
        for link in links.values():                 # of others, such as libvirt
            who = taps.get(f'/dev/tap{link.index}' if link.kind == 'macvtap' else link.name)
            if who and link.name not in trunks:     # as a VPN's is, which gets it back
                used.update(dict.fromkeys({link.name, link.below[0] or ''} & links.keys(), who))
            elif link.kind != 'veth' and not link.ours():   # a VLAN's and the like would go with it
                used.update((name, link.name) for name in self.records if name in link.below)
        for name, row in self.records.items():
            layout = row.facts.get('layout')
            tap = f'/dev/tap{row.facts.get("index")}' if layout == 'macvtap' else name
            if layout in ('tap', 'macvtap') and tap in taps:
                used[name] = taps[tap]
        for nic, who in list(used.items()):
            master = links[nic].master if nic in links else ''
            used.update(dict.fromkeys(self.joined([master]) - used.keys(), who))
        for name, row in self.records.items():      # cables, what joins bridges, and the ways out
            joins = name in links and (row.facts.get('layout') == 'pair' or row.kind == 'bond')
            sides = row.parents if row.kind == 'cable' else [links[name].master] if joins else []
            for side in used.keys() & set(sides):
                used.setdefault(name, used[side])
        for name, row in self.records.items():
            if name in used and row.facts.get('trunk') in self.records:
                used.setdefault(row.facts['trunk'], used[name])
        return used

    def require_unused(self, names: Iterable[str], force: bool = False,
                       ending: Sequence[str] = ()) -> None:
        """Raise InUse when a running machine, but for the `ending` ones, uses what would go with
        these names."""
        def free() -> bool:
            used = self.users(ending)
            blocked[:] = [(name, used[name]) for name in going if name in used]
            return not blocked
        going = self.registry.with_dependents(names)
        blocked: list[tuple[str, str]] = []
        if going and not force and not Deadline(USERS_TIMEOUT).poll(free):
            raise InUse('; '.join(f'{name}: {who} uses it' for name, who in blocked),
                        'stop that first, or say force=True')

    def remove(self, names: Iterable[str]) -> None:
        """Undo and remove what was made under these names, as a group: one by one takes 22 ms each.
        What can't be undone is logged; what can't be removed raises, and stays in the Registry."""
        going = {name: self.records[name] for name in self.registry.with_dependents(names)}
        if not going:
            return
        # Of what was not finished, not all that is undone was done.
        ready = all(row.stage == 'ready' for row in going.values())
        doomed = [name for name in going if self.owns(name)]
        needed = [op for name, row in self.records.items() if name not in going for op in row.undo]
        for row in going.values():
            row.stage = 'deleting'
        self.registry.save()
        # The last first: what one took over may be on what another had made before.
        undo = [op for row in [*going.values()][::-1] for op in row.undo
                if op.tool != 'sysctl' or op not in needed]
        undo = [*self.given_back(undo, going)]
        for problem in carry_out(undo, True, [self.lock]):
            log.log(logging.WARNING if ready else logging.DEBUG, '%s', explain(problem))
        mark = f'group {self.group} alias {mark_of(self.group)}'
        removal = [Op(f'mark {name}', f'link set dev {shlex.quote(name)} {mark}')
                   for name in doomed]
        if doomed:
            removal.append(Op(f'delete {", ".join(doomed)}', f'link delete group {self.group}'))
        removal += [Op(f'delete namespace {row.facts["space"]}', f'netns del {row.facts["space"]}')
                    for row in going.values() if row.kind == 'namespace' and same_namespace(row)]
        carry_out(removal, keep=[self.lock])
        back = {name: row.taken()[0] for name, row in going.items() if row.taken()}
        for name in going:
            del self.records[name]
        for row in self.records.values():       # whose routes were on what is gone
            row.undo = [op.moved(back) for op in row.undo]
        self.registry.save()

    def given_back(self, undo: Iterable[Op], going: Mapping[str, Record]) -> Iterator[Op]:
        """Yield what undoes, as it is now: a route's other next hops may be on what stays, and what
        others have made a port of theirs meanwhile is left to them, and so is forwarding that
        others, such as Docker, have switched on for all meanwhile: they never look again. A route
        comes after one that others have entered in its place, or not at all: of IPv6 the two would
        share what is sent."""
        theirs, onto = dict[str, str](), dict[str, str]()
        shared = in_force(FORWARD_ALL)
        routes_ = [(place_of(route.line({})), {hop.device for hop in route.hops})
                   for route in self.network.routes]
        links = self.network.links.values()
        # One that came from another namespace may have the index of one that went.
        renamed = {name: link.name for row in going.values()
                   for name, (index, mac) in row.facts.get('identities', {}).items()
                   for link in links if link.index == index and link.name != name
                   and (link.mac == mac or link.master in going)}
        for link in links:
            if link.master and link.master not in self.records:
                theirs[link.name] = link.master
            elif link.name in (self.records[link.master].taken() if link.master else ()) \
                    and link.master not in going:
                onto[link.name] = link.master
        for op in (op.renamed(renamed) for op in undo):
            gone = theirs.keys() & op.devices() if re.match('give .* back$', op.what) else ()
            for name in gone:
                log.warning('can\'t %s: %s is a port of %s by now (ip %s)', op.what, name,
                            theirs[name], op.line)
            if gone or shared and op.what == 'stop forwarding':
                continue
            op = op.moved(onto)
            _, _, line = op.line.partition('route replace ')
            there = [devices for place, devices in routes_ if line and place == place_of(line)]
            if not any(devices - going.keys() - op.devices() for devices in there):
                yield op
            elif ':' not in line.split()[1] or any(devices & going.keys() for devices in there):
                yield op._replace(line=f'route append {line}')
            else:
                log.warning('can\'t %s: others have entered another in its place, which stays '
                            '(ip %s)', op.what, op.line)


@contextlib.contextmanager
def transaction() -> Iterator[Transaction]:
    """Lock the Registry; what is planned in the block is written down and made at its end.

    An exception, there or in the making, Ctrl-C included, removes what was claimed and undoes what
    was done. `ip` inherits the lock, so that nobody looks before an `ip` whose parent was killed
    has ended: a Record that is not ready while somebody else has the lock is what a crash left.
    """
    plan = Transaction()
    plan.lock = plan.registry.lock()
    try:
        plan.registry.load()
        plan.look()
        while not plan.group or str(plan.group) in plan.taken:
            plan.group = random.randrange(GROUP_FIRST, 2 * GROUP_FIRST)
        yield plan
        plan.make()
    except BaseException:
        if plan.claimed:
            plan.look()
            plan.remove(plan.claimed)
        raise
    finally:
        for descriptor in (*plan.taps, plan.lock):
            os.close(descriptor)


# === interfaces =================================================================================

SEEN_TIMEOUT = 1.0             # how long an Interface from interfaces.values() needs no new look
MTU = 68, 65535                # of Ethernet, in bytes


def name_of(thing: Any) -> str:
    """Read an interface, or the name of one."""
    if isinstance(thing, Interface) and thing._where:   # one of that name here is another
        raise InvalidValue('is not on the host', 'take an interface of the host')
    name = thing.name if isinstance(thing, Interface) else thing
    if not isinstance(name, str) or not name or name.startswith('-') or '\0' in name:
        raise InvalidValue('must be an interface, a switch, a nic or a name of one',
                           'of a machine these are its .nics')
    return name


def shown(name: str, doc: str) -> Any:
    """Return a property of an Interface: what its Link says at that moment."""
    return property(lambda self: getattr(self.link(), name), doc=doc)


class Interface:
    """A network interface of the host, or of a namespace; what it says is read when asked for.

    All of its properties raise NoInterface when it is gone.
    """

    state: str = shown('state', 'Its link, as the kernel sees it: up, down, lowerlayerdown, ...')
    kind: str = shown('kind', "bridge, veth, bond, tun, ...; '' for hardware and loopback.")
    master: str = shown('master', "The name of the bridge or bond it is a port of, or ''.")
    addresses: tuple[str, ...] = shown('addresses', 'With their prefixes, link-local ones last.')

    def __init__(self, name: str, namespace: str = '', seen: NetworkState | None = None) -> None:
        self.name: str = check('Interface', name, name_of, NetworkError)
        self.namespace = namespace
        self._where = namespace             # a nic's port is not in its namespace
        self._seen = seen                   # from interfaces.values(): counts for a moment

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.name!r}' + (
            f', namespace={self.namespace!r})' if self.namespace else ')')

    def _look(self) -> NetworkState:
        if self._seen and time.monotonic() - self._seen.at < SEEN_TIMEOUT:
            return self._seen
        return read_network(self._where)

    def link(self) -> Link:
        """Return all that `ip -details address` says of it."""
        return self._look().find(self.name, self._where)

    @property
    def exists(self) -> bool:
        """Whether there is an interface of this name."""
        return any(self.name in link.names for link in self._look().links.values())

    @property
    def mac(self) -> str:
        """Its MAC; '' for what has none, such as a tunnel."""
        return self.link().mac

    @property
    def mtu(self) -> int:
        """Its MTU in bytes; assign to it to change it (ip link set mtu)."""
        return self.link().mtu

    @mtu.setter
    def mtu(self, size: int) -> None:
        self._set_mtu(check('mtu', size, a_number(*MTU, 'bytes', whole=True), NetworkError))

    @property
    def ip(self) -> str:
        """Its first address, without prefix; '' if it has none."""
        return next(iter(self.addresses), '').partition('/')[0]

    @property
    def routes(self) -> list[Route]:
        """The routes of which a next hop goes out here."""
        seen = self._look()
        name = seen.find(self.name, self._where).name
        return [route for route in seen.routes if route.uses(name)]

    @property
    def gateway(self) -> str:
        """The gateway of the default route that goes out here, or ''; the main table's first."""
        name = self.link().name
        found = sorted(self.routes, key=lambda route: route.table != 'main')
        return next((hop.gateway for route in found if route.to == 'default'
                     for hop in route.hops if hop.device == name), '')

    def _set_mtu(self, size: int) -> None:
        self._set(f'give {self.name} an MTU of {size}', f'mtu {size}')

    def up(self) -> None:
        """Bring it up (ip link set up)."""
        self._set(f'bring up {self.name}', 'up')

    def down(self) -> None:
        """Bring it down (ip link set down)."""
        self._set(f'bring down {self.name}', 'down')

    def add_address(self, address: str) -> None:
        """Add an address such as 192.0.2.1/24; there already is fine (ip address replace)."""
        self._set(f'add {address} to {self.name}', valid_address(address), 'address replace')

    def remove_address(self, address: str) -> None:
        """Remove an address, written with its prefix; not there is fine (ip address del)."""
        self._seen = None                   # what it had may not be all that it has
        if valid_address(address) in self.addresses:
            self._set(f'remove {address} from {self.name}', valid_address(address), 'address del')

    def _set(self, what: str, text: str, command: str = 'link set') -> None:
        self._seen = None
        self.link()                         # or NoInterface, with a hint
        carry_out([Op(what, f'{command} dev {shlex.quote(self.name)} {text}', self._where)])


class Interfaces(Mapping[str, Interface]):
    """The interfaces of the host, or of a namespace, by name; each use looks anew.

    values() and items() look once for all: what those Interfaces say stays as it was for
    SEEN_TIMEOUT seconds. Raises NoInterface (a KeyError) for a name that is not there.
    """

    def __init__(self, namespace: str = '') -> None:
        self.namespace = valid_name(namespace, 'namespace', empty=True)

    def __repr__(self) -> str:
        return f'Interfaces({self.namespace!r})'

    def __getitem__(self, name: str) -> Interface:
        found = Interface(name, self.namespace).link()      # or NoInterface
        return Interface(found.name, self.namespace)

    def __iter__(self) -> Iterator[str]:
        return iter(read_network(self.namespace).links)

    def __len__(self) -> int:
        return len(read_network(self.namespace).links)

    def items(self) -> ItemsView[str, Interface]:
        """Return names and interfaces, seen at once."""
        seen = read_network(self.namespace)
        return {name: Interface(name, self.namespace, seen) for name in seen.links}.items()

    def values(self) -> ValuesView[Interface]:
        """Return all, seen at once."""
        return dict(self.items()).values()


class Routes(Sequence[Route]):
    """All routes of the host, or of a namespace, IPv4 and IPv6; each use looks anew."""

    def __init__(self, namespace: str = '') -> None:
        self.namespace = valid_name(namespace, 'namespace', empty=True)

    def __repr__(self) -> str:
        return f'Routes({self.namespace!r})'

    def __iter__(self) -> Iterator[Route]:
        return iter(read_network(self.namespace).routes)

    def __getitem__(self, index: Any) -> Any:
        return read_network(self.namespace).routes[index]

    def __len__(self) -> int:
        return len(read_network(self.namespace).routes)


interfaces = Interfaces()
routes = Routes()


# === switches and nics ==========================================================================

GUEST_MAC = '52:54:00'          # how the MACs of guests begin, unless mac= says another
NIC_PARTS = {'macvtap': ('sink', 'tap'), 'pair': ('sink',)}     # what a layout has below its port
TAP_INDEX = range(1_000_000, 1 << 31)   # ifindex of macvtaps, so that /dev/tapN is theirs alone

# How the MACs of our own host interfaces begin: locally administered, and FE keeps a bridge
# from ever taking one for its own.
HOST_MAC = 'fe:01'

LEASE = '12h'                   # how long an address is lent
DOMAIN = 'internal'             # of machines' names; set aside for such, so that no other has it
DHCP_PORTS = 'udp --dport 67', 'udp --dport 53', 'tcp --dport 53'

IMPAIRMENTS = {                 # what makes a cable worse
    'delay': a_number(0, 3600, 'seconds'), 'jitter': a_number(0, 3600, 'seconds'),
    'loss': a_number(0, 100, 'percent'), 'rate': a_number(0, 10 ** 12, 'bits per second')}
MIIMON = a_number(0, 60000, 'milliseconds', whole=True)
SWITCH_OPTIONS = ('type bridge stp_state 0 forward_delay 0 group_fwd_mask 0xfff8 '
                  'nf_call_iptables 0 nf_call_ip6tables 0 nf_call_arptables 0')

# ioctls and flags of linux/if_tun.h
TUNSETIFF, TUNSETPERSIST, TUNGETIFF = 0x400454ca, 0x400454cb, 0x800454d2
TAP_FLAGS = 0x0002 | 0x1000 | 0x4000        # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR


# --- what becomes a port ---

def require_port(plan: Transaction, link: Link, master: str, force: bool, nat: bool = False
                 ) -> None:
    """Raise InUse for what can't become a port of `master`, or with `nat` only its way out."""
    default = [route for route in plan.network.routes
               if route.uses(link.name) and route.wide and route.table == 'main']
    gateways = [hop.gateway for route in default[:1] for hop in route.hops
                if hop.device == link.name and hop.gateway]
    via = f' via {" and ".join(gateways)}' if gateways else ''
    bond = master in plan.records and plan.records[master].kind == 'bond'
    above = [one.name for one in plan.network.links.values()    # but a pair's other end
             if link.name in one.below and one.name not in link.below
             and (bond or one.kind != 'vlan')]                  # which a bridge leaves alone
    for wrong, what, hint in (
            (link.master not in ('', master), f'is already a port of {link.master}',
             f'disconnect it there first: ip link set dev {link.name} nomaster'),
            ('LOOPBACK' in link.flags, 'is the loopback', 'take an interface with a cable'),
            (link.kind == 'bridge' and not nat, 'is a bridge already',
             'connect nics and switches to it as it is, or have it as the trunk of a '
             'Router(..., nat=True)'),
            (not link.mac and not nat, 'has no MAC, so that it can be no port',
             'a Router(..., nat=True) can have it as its trunk'),
            (default and not force and not nat, f'carries the default route{via}',
             'making it a port may cut this host off; take another interface, or say force=True'),
            (above and not force and not nat, f'{" and ".join(above)} on it would be cut off',
             'remove that first, use Router(..., nat=True), or say force=True')):
        if wrong:
            raise InUse(f'{link.name}: {what}', hint)


def require_bare(plan: Transaction, link: Link, master: str, force: bool) -> None:
    """Raise InUse for what has addresses or routes, unless `force`."""
    has = [*(f'address {one}' for one in link.addresses if not one.startswith('fe80:')),
           *(f'route {route.to}' for route in plan.network.routes
             if route.uses(link.name) and route.protocol != 'kernel')]
    if has and not force:
        facts = plan.records[master].facts if master in plan.records else {}
        back = link.name in (facts.get('trunk'), *facts.get('interfaces', ()))
        raise InUse(f'{link.name}: has the {has[0]}, which stops working on a port of {master}',
                    f'say force=True: {master} has those that it had' if back else
                    f'use Router({link.name!r}), which moves and gives back addresses and routes, '
                    'or say force=True')


def find_bridge(plan: Transaction, name: str) -> Link:
    """Return the bridge of this name; or raise NoInterface."""
    found = plan.network.find(name)
    if found.kind != 'bridge':
        raise NoInterface(f'{name}: is no bridge', 'name a Switch, a Router or another bridge')
    return found


def plan_port(plan: Transaction, device: str, bridge: str, force: bool = False) -> None:
    """Plan to make an interface a port of a bridge, or join two bridges; InUse if it can't be."""
    target, link = find_bridge(plan, bridge), plan.network.find(device)
    bridge = target.name
    plan_renewal(plan, [bridge, link.name])
    if link.kind == 'bridge':
        plan_join(plan, target, link)
        return
    require_port(plan, link, bridge, force)
    if link.master == bridge:
        return
    require_bare(plan, link, bridge, force)
    if link.peer in plan.network.links and plan.network.links[link.peer].master:
        refuse_loop(plan, plan.network.links[link.peer].master, bridge)
    plan_agreed_mtu(plan, link, target)
    plan.late += ops_for(f'connect {link.name} to {bridge}',
                         f'link set dev {shlex.quote(link.name)} master {shlex.quote(bridge)} up')


def plan_join(plan: Transaction, one: Link, other: Link) -> None:
    """Plan a veth pair between two bridges; the smaller MTU counts of those that have ports."""
    parents = [one.name, other.name]
    if any(map(plan.standing, plan.registry.between(*parents))):
        return
    refuse_loop(plan, other.name, one.name)
    fixed = [side.mtu for side in (one, other) if plan.network.ports(side.name)]
    mtu = min(fixed or [one.mtu])
    for side in (one, other):
        if side.mtu != mtu:
            plan_mtu(plan, side.name, mtu)
    plan_nic(plan, plan.free_name(plain('-'.join(parents))), 'pair', mtu=mtu, master=one.name,
             inner=other.name, parents=parents)


def refuse_loop(plan: Transaction, one: str, other: str) -> None:
    """Raise InUse when two bridges are connected: frames would go round a loop for ever."""
    if other in plan.joined([one]):
        raise InUse(f'{one} and {other}: are connected already; a second way would be a loop',
                    'disconnect the first way')


def plan_mtu(plan: Transaction, name: str, size: int) -> None:
    """Plan to give an interface an MTU, but first a nic's parts, and a bridge's ports if nics."""
    facts = plan.records[name].facts if name in plan.records else {}
    below = NIC_PARTS.get(facts.get('layout', ''), ())
    parts = [(facts[part], facts['namespace']) for part in below]
    for port in plan.network.ports(name):
        if port.name in plan.records and plan.records[port.name].kind == 'nic':
            plan_mtu(plan, port.name, size)
    plan.late += [Op(f'give {one} an MTU of {size}',
                     f'link set dev {shlex.quote(one)} mtu {size}', space)
                  for one, space in (*parts, (name, ''))]


def plan_agreed_mtu(plan: Transaction, port: Link, bridge: Link) -> None:
    """Plan that they agree: a machine's nic follows the bridge; a bridge follows its first port,
    and is never larger than what comes later, as larger frames would get no further."""
    row = plan.records.get(port.name)
    if row and row.kind == 'nic' and not (row.facts['layout'] == 'pair' and row.parents):
        if port.mtu != bridge.mtu:
            plan_mtu(plan, port.name, bridge.mtu)
    elif port.mtu < bridge.mtu or (port.mtu > bridge.mtu and not plan.network.ports(bridge.name)):
        plan_mtu(plan, bridge.name, port.mtu)


def refuse_strange(links: Sequence[Link], routes: Sequence[Route]) -> None:
    """Raise InUse for what could not go with interfaces, or not come back as it was."""
    devices = [link.name for link in links]
    strange = [*(words for link in links for words in link.strange_addresses()),
               *(words for route in routes for words in route.strange()), *rules_of(devices)]
    if strange:
        raise InUse(f'{" and ".join(devices)}: can\'t be taken with all that it has: '
                    + '; '.join(strange),
                    'change that, or use Router(..., nat=True), which leaves it alone')


def take_over(plan: Transaction, devices: Sequence[str], master: str, owner: Record) -> None:
    """Plan to make `devices` ports of `master`, with their addresses and routes; and back."""
    links = [plan.network.links[device] for device in devices]
    own = {network for link in links for network in link.own_networks()}
    # With an address the kernel takes away the routes of all interfaces that name it as source.
    theirs = {raw['local'] for link in links for raw in link.raw_addresses}
    moved = sorted((route for route in plan.network.routes
                    if (any(map(route.uses, devices)) or route.raw.get('prefsrc') in theirs)
                    and (route.protocol != 'kernel' or route.to not in own)),
                   key=lambda route: any(hop.gateway for hop in route.hops))
    refuse_strange(links, moved)
    others = {place_of(route.line({})) for route in plan.network.routes if route not in moved}

    def ways(onto: Mapping[str, str]) -> Iterator[str]:
        seen = {*others}                    # what `replace` would take away
        for route in moved:
            line = route.line(onto)
            yield f'route {"append" if place_of(line) in seen else "replace"} {line}'
            seen.add(place_of(line))
    known = {device: [*neighbour_lines(device)] for device in devices}
    owner.facts['identities'] = {link.name: [link.index, link.mac] for link in links}
    # A bond takes only interfaces that are down, brings them up itself, and leaves them down.
    bond = owner.kind == 'bond'
    for link in links:
        name = shlex.quote(link.name)
        owner.undo += ops_for(
            f'give {link.name} back', f'address flush dev {master}',
            f'link set dev {name} nomaster', f'link set dev {name} {link.admin}',
            *(f'address replace {line} dev {name}' for line in link.address_lines(True)),
            *(f'neighbour replace {line} dev {name}' for line in known[link.name]))
        plan.late += ops_for(
            f'make {link.name} a port of {master}',
            *([f'link set dev {name} down'] if bond else []),
            f'link set dev {name} master {master}{"" if bond else " up"}',  # first what may fail
            f'address flush dev {name}',
            *(f'address replace {line} dev {master}' for line in link.address_lines(False)),
            *(f'neighbour replace {line} dev {master}' for line in known[link.name]))
    plan.optional += own_settings(devices[0], master)
    owner.undo += ops_for('give routes back', *ways({}))
    plan.late += ops_for(f'move routes to {master}', *ways(dict.fromkeys(devices, master)))


def own_settings(device: str, master: str) -> Iterator[Op]:
    """Yield what gives `master` the settings of an interface that are not those of each new one,
    such as accept_ra=0 or proxy_arp=1, but those that say how it is made itself."""
    for family in ('ipv4', 'ipv6'):
        place = Path('/proc/sys/net', family, 'conf')
        for name in sorted({*names_in(str(place / device))}
                           - {'addr_gen_mode', 'mtu', 'stable_secret'}):
            with contextlib.suppress(OSError):
                value, new = ((place / one / name).read_text().strip()
                              for one in (device, 'default'))
                if value != new:
                    path = f'net/{family}/conf/{master}/{name}'
                    yield Op(f'set {name} of {master}', f'{path}={value}', tool='sysctl')


# --- the host's firewall and sysctls, which others change, too ---

def filtered(program: str) -> bool:
    """Tell whether iptables or ip6tables sees frames that only cross a bridge."""
    return in_force(Op('', f'net/bridge/bridge-nf-call-{program}=1', tool='sysctl'))


def firewall(what: str, rules: Sequence[tuple[str, str]]) -> tuple[list[Op], list[Op]]:
    """Return what makes rules of (iptables or ip6tables, rule), and what deletes them."""
    return ([Op(what, f'-w {rule}', tool=program) for program, rule in rules],
            [Op(f'no longer {what}', '-w ' + re.sub('-[AI] ', '-D ', rule), tool=program)
             for program, rule in rules])


def masquerade(bridge: str, trunk: str, subnet: str, dhcp: bool) -> tuple[list[Op], list[Op]]:
    """Return what lets `subnet` out, masqueraded, and only answers in, with `dhcp` also what asks
    this host for addresses and names; and what takes that back.

    By iptables, and not nft: its FORWARD chain is where others, such as Docker, drop.
    """
    what, name = f'masquerade {subnet}', shlex.quote(trunk)
    if not which('iptables'):
        raise MissingFeature(f'can\'t {what}: there is no iptables', 'install iptables')
    return firewall(what, [('iptables', rule) for rule in (
        f'-t nat -A POSTROUTING -s {subnet} ! -d {subnet} -o {name} -j MASQUERADE',
        f'-I FORWARD -o {bridge} ! -i {bridge} -j DROP',
        f'-I FORWARD -i {name} -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT',
        f'-I FORWARD -i {bridge} -o {name} -s {subnet} -j ACCEPT',
        *(f'-I INPUT -i {bridge} -p {port} -j ACCEPT' for port in DHCP_PORTS if dhcp))])


def host_name(name: Any) -> str:
    """Return a name as DNS can have it, or a MAC as it is; '' if there is nothing in it."""
    if isinstance(name, str) and ':' in name:
        return valid_mac(name)
    return re.sub('[^a-z0-9]+', '-', name.lower())[:63].strip('-') if isinstance(name, str) else ''


def valid_hosts(hosts: Any) -> dict[str, str]:
    """Return fixed addresses by name or MAC, checked."""
    pairs = [*hosts.items()] if isinstance(hosts, Mapping) else [('', hosts)]
    found = {host_name(host): valid_address(address, ipaddress.IPv4Address)
             for host, address in pairs}
    if '' in found or len({*found.values()}) < len(pairs):
        raise NetworkError(f'hosts: {hosts!r:.80}: each needs a name, and an address of its own',
                           "write {'web': '10.77.0.10'}")
    return found


def require_nat(given: Mapping[str, Any]) -> None:
    """Raise NetworkError for arguments of Router that count with others only."""
    if (given['subnet'] or given['dhcp']) and not given['nat'] or \
            given['hosts'] and not given['dhcp']:
        raise NetworkError('subnet= and dhcp=True need nat=True, and hosts= needs dhcp=True',
                           'on the network of its trunk another server hands out addresses')


def require_dhcp(name: str, network: Any, hosts: Mapping[str, str]) -> None:
    """Raise NetworkError when addresses can't be handed out from a network, or not these."""
    if not which('dnsmasq'):
        raise MissingFeature(f'{name}: can\'t hand out addresses: there is no dnsmasq',
                             f'install {PACKAGES["dnsmasq"]}')
    if network.num_addresses < 4:
        raise NetworkError(f'{name}: subnet {network} is too small to hand out addresses',
                           'give a /30, or a larger one, with subnet=')
    for host, address in hosts.items():
        if not network[2] <= ipaddress.ip_address(address) <= network[-2]:
            raise NetworkError(f'{name}: {host} can\'t have {address}',
                               f'take one from {network[2]} to {network[-2]}')


def dhcp_server(name: str, row: Record, records: Mapping[str, Record]) -> tuple[list[Op], list[Op]]:
    """Return what hands out addresses and names on a router's network, and what ends that: dnsmasq,
    which gives up root when it has its sockets.

    It is at the router's address only, and of the host's own it reads nothing but resolv.conf. It
    has all in its arguments, so that they tell whether it knows of all machines.
    """
    network = ipaddress.ip_network(row.facts['subnet'])
    known: dict[str, list[str]] = {}            # name -> MACs
    for other in records.values():              # a machine's namespace has its name
        host = host_name(other.facts.get('namespace', '').replace(':', '-'))
        if other.kind == 'nic' and host:
            known.setdefault(host, []).append(other.facts['mac'])
    rows: list[tuple[str, list[str]]] = []
    fixed = {**row.facts['hosts']}
    for host, macs in known.items():            # of several rows for a MAC the last one counts
        rows += [(host, [mac, fixed.pop(mac)]) for mac in macs if mac in fixed]
        there = [mac for mac in macs if mac not in row.facts['hosts']]
        if host in fixed:
            there.append(fixed.pop(host))
        rows += [(host, there)] * bool(there)
    rows += [(host, [address]) for host, address in fixed.items()]
    path = shlex.quote(str(Registry().path.with_suffix('')) + f'-{name}')
    files = f'--pid-file={path}.pid --dhcp-leasefile={path}.leases'
    user = next((account.pw_name for account in server_accounts()), 'nobody')
    return (ops_for('hand out addresses and names', ' '.join([
        files, f'--user={user} --conf-file=/dev/null --no-hosts',
        f'--bind-interfaces --except-interface=lo --interface={name}',
        f'--dhcp-range={network[network.num_addresses // 2]},{network[-2]},'
        f'{network.netmask},{LEASE} --dhcp-authoritative --no-ping',
        f'--domain={DOMAIN} --local=/{DOMAIN}/ --domain-needed --bogus-priv',
        # What a guest calls itself counts, but for the names of ours, also of those that are off.
        '--dhcp-ignore-names=tag:taken', *(
            f'--dhcp-name-match=set:taken,{host}{rest}' for host in sorted(
                {*known, host_name(name), host_name(os.uname().nodename.partition('.')[0])} - {''})
            for rest in ('', '.*')),                # with any domain, which would be taken off
        # With its domain, as a name such as "45" or "ignore" would be read as something else.
        *(f'--dhcp-host={",".join([*words, host if ":" in host else f"{host}.{DOMAIN}"])}'
          for host, words in sorted(rows))]), tool='dnsmasq'),
        ops_for('no longer hand out addresses and names', files, tool='end'))


def passage_ops(name: str, row: Record, records: Mapping[str, Record]
                ) -> tuple[list[Op], list[Op]]:
    """Return all else that frames need to pass a switch or router, and the way back."""
    facts = row.facts
    if facts.get('nat'):
        network = ipaddress.ip_network(facts['subnet'])
        own = ops_for('be a gateway', f'address replace {next(network.hosts())}/'
                      f'{network.prefixlen} dev {name}')    # systemd-networkd may take it away
        # Forwarding for these two only: ip_forward would make a router of all interfaces.
        forward = ops_for('forward', *(f'net/ipv4/conf/{one}/forwarding=1'
                                       for one in (name, facts['trunk'])), tool='sysctl')
        dhcp = facts.get('dhcp', False)
        rules, undo = masquerade(name, facts['trunk'], facts['subnet'], dhcp)
        serves, ends = dhcp_server(name, row, records) if dhcp else ([], [])
        return [*own, *forward, *rules, *serves], [*undo, *ends]
    # With net.bridge.bridge-nf-call-iptables=1, as Docker sets it, nf_call_iptables 0 of a bridge
    # counts for nothing (the kernel takes the one *or* the other): a policy of DROP would stop
    # what only crosses the bridge, and what is known from there would not be masqueraded any more.
    rules, undo = firewall(f'let frames pass {name}', [
        (program, rule) for program in ('iptables', 'ip6tables')
        if filtered(program) and which(program) for rule in (
            f'-t raw -I PREROUTING -i {name} -m addrtype ! --dst-type LOCAL -j CT --notrack',
            f'-I FORWARD -i {name} -o {name} -j ACCEPT')])
    quiet = ops_for('keep quiet', f'net/ipv4/conf/{name}/arp_ignore=1', tool='sysctl')
    return [*(quiet if row.kind == 'switch' else []), *rules], undo


def in_force(op: Op) -> bool:
    """Tell whether what an operation of passage_ops() makes is there."""
    if op.tool == 'sysctl':
        path, _, value = op.line.rpartition('=')
        with contextlib.suppress(OSError):              # of an interface that is gone
            return Path('/proc/sys', path).read_text().strip() == value
        return False
    if op.tool == 'dnsmasq':
        return bool(server_of(op))
    if op.tool == 'ip':                                 # an address
        _, _, address, _, name = op.line.split()
        links = read_network().links
        return name in links and address in links[name].addresses
    rule = shlex.split(re.sub('-[AI] ', '-C ', op.line))
    return not run([op.tool, *rule], IP_TIMEOUT, check=False).returncode


def plan_renewal(plan: Transaction, bridges: Iterable[str]) -> None:
    """Plan to put back what these bridges, and those joined to them, need to pass frames."""
    for name in sorted(plan.joined(bridges)):
        row = plan.records.get(name)
        if not row or row.kind not in ('switch', 'router') or row.stage != 'ready':
            continue
        wanted, undo = passage_ops(name, row, plan.records)
        asked = [in_thread(f'look at {op.tool}', in_force, op) for op in wanted]
        missing = [op for op, there in zip(wanted, asked) if not there.result(2 * IP_TIMEOUT)]
        if missing:
            # In a firewall their order counts: what is left of them goes first.
            rules = [op for op in wanted if 'tables' in op.tool]
            plan.optional += [back for op, back in zip(rules, undo) if op not in missing]
            plan.optional += wanted
            new = [back for back in undo if back not in row.undo]
            row.undo += new
            plan.unsaved |= bool(new)
        else:                                   # dnsmasq does not know of all machines
            plan.optional += [op for op in wanted if op.tool == 'dnsmasq'
                              and server_of(op) != shlex.split(op.line)]


# --- what can be made ---

class Managed:
    """What this program makes: it stays until delete(), or the end of a `with`, and making it twice
    gives the same thing."""

    name: str

    def delete(self, force: bool = False) -> None:
        """Remove it and what hangs on it, and give back what it took; twice is fine. Raises InUse
        for what a running machine uses, unless `force`."""
        delete_all([self], force)

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.delete()


T = TypeVar('T', bound=Managed)


def delete_all(things: Iterable[Managed], force: bool = False) -> None:
    """Delete many things at once: as quick as one, where one by one takes 22 ms each."""
    check('force', force, a_bool, NetworkError)
    names = []
    for thing in things:
        if not isinstance(thing, Managed):
            raise NetworkError(f'delete: {thing!r:.80} was not made by this program',
                               'give a Switch, Router, VirtualNic, Bond or Namespace')
        names.append(thing.name)
    delete_names(names, force)


def delete_names(names: Iterable[str], force: bool = False, ending: Sequence[str] | None = None
                 ) -> list[str]:
    """Delete what is there of these names, as delete_all() does, or see whether that will be free
    to go after the `ending` machines; return them."""
    with transaction() as plan:
        names = [*names]
        for name in names:
            plan.registry.require_readable(name)
        there = [name for name in names if name in plan.records]
        plan.require_unused(there, force, ending or ())
        if ending is None:
            plan.remove(there)
    return there


class Namespace(Managed):
    """A network namespace by name (ip netns), made if there is none. One that VirtualNic made goes
    with the last nic in it; this one stays until delete(), which removes the nics in it first."""

    def __init__(self, name: str) -> None:
        self.namespace = valid_name(name, 'namespace')
        self.name = f'netns/{name}'         # in the Registry
        with transaction() as plan:
            plan.plan_namespace(name, automatic=False)
            plan.records[self.name].facts['automatic'] = False
            plan.unsaved = True

    def __repr__(self) -> str:
        return f'Namespace({self.namespace!r})'

    @property
    def interfaces(self) -> Interfaces:
        """The interfaces in it."""
        return Interfaces(self.namespace)


class ManagedInterface(Managed, Interface):
    """An interface that this program made."""

    def _set_mtu(self, size: int) -> None:
        with transaction() as plan:
            plan_mtu(plan, plan.network.find(self.name).name, size)


class Switch(ManagedInterface):
    """A virtual switch: a bridge with a pinned MAC and no spanning tree, that forwards all that
    a bridge may forward, LLDP and EAPOL among it.

    Switch('lan') makes it, or finds the one that was made before. Raises NameTaken.
    """

    def __init__(self, name: str = '') -> None:
        valid_name(name, empty=True)
        with transaction() as plan:
            super().__init__(name or plan.free_name('switch'))
            row = plan.claim(self.name, 'switch')
            if row:
                self._plan(plan, row, plan.free_mac(HOST_MAC, self.name))
                plan.late += ops_for(f'bring up {self.name}', f'link set dev {self.name} up')
            else:
                plan_renewal(plan, [self.name])

    def _plan(self, plan: Transaction, row: Record, mac: str, mtu: int = 1500) -> None:
        """Plan the bridge, and what it needs to pass frames."""
        plan.ops.append(Op(f'create bridge {self.name}', f'link add name {self.name} address '
                           f'{mac} mtu {mtu} group {plan.group} {SWITCH_OPTIONS}'))
        needs, undo = passage_ops(self.name, row, plan.records)
        # Else the bridge would answer ARP for all addresses of the host, or not be a router.
        plan.late += [op for op in needs if op.tool == 'sysctl' or row.facts.get('nat')]
        plan.optional += [op for op in needs if op not in plan.late]
        row.undo += undo

    @property
    def ports(self) -> Mapping[str, Interface]:
        """Its ports by the names of their interfaces."""
        records = Registry.read().records
        nics = {name for name, row in records.items() if row.kind == 'nic'}     # and no bond
        return {link.name: VirtualNic.known(link.name, records) if link.name in nics else
                Interface(link.name) for link in read_network().ports(self.link().name)}

    def connect(self, thing: Interface | str, *, force: bool = False) -> None:
        """Connect a VirtualNic, an Interface, another Switch or a Router; again is fine.

        Switches are joined by a veth pair. Raises InUse for what is a port of something else,
        for an interface that has addresses, routes, or a tunnel or the like on it, as these stop
        working there (`force` takes it nevertheless), and for a join that would make a loop.
        """
        name = check('connect', thing, name_of, NetworkError)
        check('force', force, a_bool, NetworkError)
        if isinstance(thing, (Router, VirtualNic)):
            thing.connect(self)
            return
        with transaction() as plan:
            plan_port(plan, name, self.name, force)

    def disconnect(self, thing: Interface | str) -> None:
        """Undo connect(); what is not connected is left alone."""
        name = check('disconnect', thing, name_of, NetworkError)
        with transaction() as plan:
            name = next((link.name for link in plan.network.links.values() if name in link.names),
                        name)
            plan.remove(plan.registry.between(self.name, name))
            plugs = {name, *(lan for lan, row in plan.records.items() if row.parents == [name])}
            for link in plan.network.ports(self.name):
                if link.name in plugs:
                    # What others made stays up: they would lose their routes.
                    down = ' down' if link.name in plan.records else ''
                    plan.late += ops_for(f'disconnect {link.name}',
                                         f'link set dev {shlex.quote(link.name)} nomaster{down}')


def plan_nic(plan: Transaction, long: str, layout: str, sink: str = '', namespace: str = '',
             mac: str = '', master: str = '', inner: str = '', mtu: int = 0,
             parents: Sequence[str] = ()) -> str:
    """Plan a nic, three operations at most, unless it stands; return the name of its port, which
    becomes a port of the bridge `master`, as its sink of `inner`."""
    name, tap, group = short_name(valid_name(long, 'nic')), short_name(f'{long}-tap'), plan.group
    row = plan.claim(name, 'nic', parents, layout=layout, sink=sink, namespace=namespace, mac=mac)
    if not row:
        return name
    if namespace:
        row.parents += plan.plan_namespace(namespace)
    sink = sink or short_name(f'{long}-sink')
    own = plan.free_mac(HOST_MAC, name)
    guest = plan.free_mac(HOST_MAC if inner else GUEST_MAC, long, mac)
    index = free_tap_index()
    row.facts.update(sink=sink, mac=guest, tap=name if layout == 'tap' else tap, index=index)
    mtu = mtu or (plan.network.links[master].mtu if master in plan.network.links else 0)
    size, plug = f'mtu {mtu}' if mtu else '', f'up master {shlex.quote(master)}' if master else ''
    if layout == 'tap':     # which is gone with this process, until make() lets it stay
        plan.taps.append(tap_open(name))
        plan.ops.append(Op(f'set up tap {name}',
                           f'link set dev {name} group {group} address {own} {size} {plug}'))
    else:
        plan.ops.append(Op(
            f'create port {name} and sink {sink}',
            f'link add name {name} address {own} {size} group {group} {plug} type veth peer name '
            f'{sink} address {guest} {size} group {group}' + (namespace and f' netns {namespace}')))
    if layout == 'macvtap':
        plan.ops.append(Op(
            f'create macvtap {tap}', f'link add link {sink} name {tap} index {index} group {group} '
            'allmulticast on type macvtap mode passthru', namespace))
    if name != long:
        plan.ops.append(Op(f'call {name} {long}', f'link property add dev {name} altname {long}'))
    if inner:
        plan.late += ops_for(f'connect {sink} to {inner}', f'link set dev {sink} master '
                             f'{shlex.quote(inner)} up')
    return name


def free_tap_index() -> int:
    """Return a number for a macvtap that no /dev/tapN has."""
    while True:
        index = random.choice(TAP_INDEX)
        if not os.path.exists(f'/dev/tap{index}'):
            return index


def tap_open(name: str) -> int:
    """Open the tap `name`, made if there is none; return its descriptor (TUNSETIFF)."""
    return open_for(f'open tap {name}', '/dev/net/tun', lambda tap: fcntl.ioctl(
        tap, TUNSETIFF, struct.pack('16sH22x', name.encode(), TAP_FLAGS)))


class VirtualNic(ManagedInterface):
    """A machine's network card, and its cable.

    VirtualNic(namespace='web1') is a veth pair: the port stays on the host, the sink goes into
    the namespace (made if there is none) and carries a macvtap for the machine. With `sink` and
    no namespace both ends stay on the host; with neither it is a plain tap. `ifname` names the
    port, at most 15 characters. `mac` is the machine's; without it, always the same for a name.
    `mtu` is also what the machine should be told (host_mtu of its virtio-net).
    Raises NameTaken, MissingFeature.
    """

    def __init__(self, ifname: str = '', sink: str = '', namespace: str = '',
                 mac: str = '') -> None:
        valid_name(ifname, empty=True)
        valid_name(sink, empty=True)
        valid_name(namespace, 'namespace', empty=True)
        mac = valid_mac(mac) if mac != '' else ''
        with transaction() as plan:
            long = ifname or self._free(plan, namespace)
            name = plan_nic(plan, long, 'macvtap' if namespace else 'pair' if sink else 'tap',
                            sink, namespace, mac)
        self._recall(name, plan.records[name])

    @classmethod
    def create_many(cls, count: int, namespace: str = '', switch: Switch | None = None
                    ) -> list[VirtualNic]:
        """Make `count` nics with default names, in `namespace` or as plain taps, each a port of
        `switch` if there is one: in one `ip -batch` for the host and one for the namespace."""
        check('count', count, a_number(0, 1000, whole=True), NetworkError)
        master = check('switch', switch, name_of, NetworkError) if switch is not None else ''
        valid_name(namespace, 'namespace', empty=True)
        with transaction() as plan:
            if master:
                master = find_bridge(plan, master).name
                plan_renewal(plan, [master])
            names = [plan_nic(plan, cls._free(plan, namespace), 'macvtap' if namespace else 'tap',
                              namespace=namespace, master=master) for _ in range(count)]
        return [cls.known(name, plan.records) for name in names]

    @classmethod
    def known(cls, name: str, records: Mapping[str, Record] | None = None) -> VirtualNic:
        """Return the nic with the port `name`, that was made before; NoInterface if none was."""
        row = (Registry.read().records if records is None else records).get(name)
        if row is None or row.kind != 'nic':
            raise NoInterface(f'{name}: is no VirtualNic', 'make it with VirtualNic()')
        nic = cls.__new__(cls)
        nic._recall(name, row)
        return nic

    @staticmethod
    def _free(plan: Transaction, namespace: str) -> str:
        return plan.free_name(plain(namespace or 'nic') + '-p')

    def _recall(self, name: str, row: Record) -> None:
        super().__init__(name)
        self.layout: str = row.facts['layout']          # macvtap, pair or tap
        self.namespace = row.facts['namespace']         # of sink and tap
        self.sink: str = '' if self.layout == 'tap' else row.facts['sink']
        self.tap_interface: str = '' if self.layout == 'pair' else row.facts['tap']
        self.index: int = row.facts['index']            # of the macvtap, and of its /dev/tapN
        self._mac: str = row.facts['mac']

    @property
    def mac(self) -> str:
        """The machine's MAC; the port has another one."""
        return self._mac

    @property
    def far_end(self) -> Interface:
        """The sink, as an Interface; of a plain tap, the tap."""
        return Interface(self.sink or self.name, self.namespace)

    @property
    def peer(self) -> str:
        """The port of the nic it is directly connected to, or ''."""
        return Registry.read().plugged(self.name)[1]

    def open(self) -> int:
        """Open the tap for a machine and return its descriptor, as for QEMU's `tap,fd=`; close it.

        What its switch needs of the host's firewall is looked at again before. /dev/tapN is one
        for the whole host, but each namespace counts its N alone: it is checked that device
        number (/sys/class/net) and name (TUNGETIFF) are those of this nic.
        """
        if self.layout == 'pair':
            raise NetworkError(f'{self.name}: is a veth pair without a tap',
                               'make it with namespace=, or without sink=')
        with contextlib.ExitStack() as opened:
            with transaction() as plan:     # so that it is open before others look who uses it
                plan_renewal(plan, [plan.network.find(self.name).master])
                tap = tap_open(self.name) if self.layout == 'tap' else self._open_macvtap()
                opened.callback(os.close, tap)
            opened.pop_all()
        return tap

    def _open_macvtap(self) -> int:
        # `ip netns exec` shows the namespace's own /sys.
        shown = run(['ip', 'netns', 'exec', self.namespace, 'cat',
                     f'/sys/class/net/{self.tap_interface}/tap{self.index}/dev'], IP_TIMEOUT,
                    check=False)
        if shown.returncode:
            raise NoInterface(f'{self.tap_interface}: no such tap in {self.namespace}: '
                              + clip(shown.stderr).strip(), 'delete() the nic and make it again')
        path = f'/dev/tap{self.index}'
        wanted = shown.stdout.decode().strip()

        def examine(tap: int) -> None:
            info = os.fstat(tap)
            device = f'{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}'
            name = ''
            if stat.S_ISCHR(info.st_mode) and device == wanted:
                name = fcntl.ioctl(tap, TUNGETIFF, bytes(40))[:16].rstrip(b'\0').decode()
            if name != self.tap_interface:
                raise InUse(f'{path}: is device {device}{name and " of " + name}, not the {wanted} '
                            f'of {self.tap_interface} in {self.namespace}: another namespace has '
                            'a tap of the same number', 'delete() this nic and make it again')
            if lock_one([tap], Deadline(USERS_TIMEOUT)) < 0:    # a plain tap refuses it by itself
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return open_for(f'open {self.tap_interface}', path, examine)

    def connect(self, target: Interface | str) -> None:
        """Plug it into a Switch, Router or other bridge, or straight into another VirtualNic,
        without a bridge, so that all frames pass, STP and LACP too. Again is fine.

        Raises InUse when it is connected to something else.
        """
        name = check('connect', target, name_of, NetworkError)
        with transaction() as plan:
            plan.network.find(self.name)
            peer = plan.registry.plugged(self.name)[1]
            if isinstance(target, VirtualNic):
                self._direct(plan, target)
            elif peer:
                raise InUse(f'{self.name}: is already connected to {peer}', 'disconnect() it first')
            else:
                plan_port(plan, self.name, name, force=True)

    def disconnect(self) -> None:
        """Pull it out of whatever it is connected to; the machine sees its cable unplugged."""
        with transaction() as plan:
            plan.network.find(self.name)
            plan.remove(plan.registry.plugged(self.name)[:1])
            plan.late += ops_for(f'disconnect {self.name}',
                                 f'link set dev {self.name} nomaster down')

    def _direct(self, plan: Transaction, other: VirtualNic) -> None:
        """Plan to send what comes in at one port out at the other (tc mirred), both ways."""
        ends = (self.name, other.name), (other.name, self.name)
        links = {here: plan.network.find(here) for here, _ in ends}
        if plan.registry.between(self.name, other.name):
            return
        for here, there in ends:
            has = links[here].master or plan.registry.plugged(here)[1]
            if has or here == there:
                raise InUse(f'{here}: is already connected to {has or "itself"}',
                            'disconnect() it first')
        row = plan.claim('='.join(ends[0]), 'cable', ends[0])
        what = f'connect {self.name} to {other.name}'
        if row:
            plan.late += ops_for(what, *(f'link set dev {here} up' for here, _ in ends))
            for here, there in ends:
                row.undo += ops_for(f'dis{what}', f'qdisc del dev {here} ingress', tool='tc')
                plan.late += ops_for(
                    what, f'qdisc add dev {here} ingress', f'filter add dev {here} parent ffff: '
                    f'protocol all u32 match u8 0 0 action mirred egress redirect dev {there}',
                    tool='tc')

    def impair(self, delay: float = 0, jitter: float = 0, loss: float = 0, rate: float = 0) -> None:
        """Make the cable worse, each way (tc netem): `delay` and `jitter` in seconds, `loss` in
        percent, `rate` in bits per second. Without arguments, make it good again.

        Of a plain tap only what goes to the machine. Raises MissingFeature without netem.
        """
        for what, value in (('delay', delay), ('jitter', jitter), ('loss', loss), ('rate', rate)):
            check(what, value, IMPAIRMENTS[what], NetworkError)
        worse = (f'{f" delay {delay * 1e6:.0f}us {jitter * 1e6:.0f}us" if delay or jitter else ""}'
                 f'{f" loss {loss:g}%" if loss else ""}{f" rate {rate:.0f}bit" if rate else ""}')
        self.link()                         # or NoInterface
        ends = [(self.name, ''), *([(self.sink, self.namespace)] if self.sink else [])]
        netem = 'replace dev {} root netem limit 10000' + worse if worse else 'del dev {} root'
        try:                    # what has no qdisc to delete is as it should be
            carry_out((Op(f'impair {name}', 'qdisc ' + netem.format(name), namespace, 'tc')
                       for name, namespace in ends), force=not worse)
        except BaseException:
            if worse:
                self.impair()
            raise


class Router(Switch):
    """A bridge that ties a physical interface, the trunk, to virtual ones.

    Router('ens4u1') makes the trunk a port of it; the trunk's addresses and routes move to the
    bridge, which has the trunk's MAC and MTU, and come back with delete(), or clean() after a
    crash. The LAN ports p0, p1, ... go to switches. With `nat` the trunk stays as it is: the
    bridge has `subnet` (by default a free /24) and its first address, forwarding between the two,
    and masquerading by iptables. With `dhcp`, too, dnsmasq hands out addresses from the upper half
    of the subnet, and tells machines each other's names (web, or web.internal); a machine's is that
    of its namespace, of another guest what it calls itself, unless that is one of those, or the
    router's or this host's. `hosts` fixes addresses, by name or MAC: {'web': '10.77.0.10'}.

    Raises InUse for the interface of the default route, and one with a tunnel or the like on it,
    unless `force`, as the host is cut off if it goes wrong, for what is a port of something else,
    for a route or address that could not be given back as it is, and for a rule that names it.
    """

    def __init__(self, trunk: Interface | str, name: str = '', force: bool = False,
                 nat: bool = False, subnet: str = '', dhcp: bool = False,
                 hosts: Mapping[str, str] | None = None) -> None:
        given = check('trunk', trunk, name_of, NetworkError)
        for what, flag in (('force', force), ('nat', nat), ('dhcp', dhcp)):
            check(what, flag, a_bool, NetworkError)
        valid_name(name, empty=True)
        if subnet != '':
            subnet = valid_address(subnet, ipaddress.IPv4Network)
        require_nat(locals())
        fixed = valid_hosts(hosts or {})
        with transaction() as plan:
            self.trunk = plan.network.find(given).name
            Interface.__init__(self, name or short_name(plain(self.trunk) + '-router'))
            row = plan.claim(self.name, 'router', trunk=self.trunk, nat=nat, subnet=subnet,
                             dhcp=dhcp, hosts=fixed)
            if row:
                self._plan_router(plan, row, force)
            elif nat or plan.network.links[self.trunk].master == self.name:
                plan_renewal(plan, [self.name])
            else:                       # taken out by others, or unplugged and there again
                plan_port(plan, self.trunk, self.name, force)

    def _plan_router(self, plan: Transaction, row: Record, force: bool) -> None:
        nat = row.facts['nat']
        link = plan.network.links[self.trunk]
        require_port(plan, link, self.name, force, nat)
        mtu = min(max(link.mtu, MTU[0]), MTU[1])
        if nat:
            row.facts['subnet'] = free_subnet(plan, row.facts['subnet'])
            row.facts['identities'] = {self.trunk: [link.index, link.mac]}
            if row.facts['subnet'].endswith('/32'):
                raise NetworkError(f'{self.name}: subnet {row.facts["subnet"]} is one address',
                                   'give a network such as 10.77.0.0/24')
            back = Op('forbid forwarding' if in_force(FORWARD_ALL) else 'stop forwarding',
                      f'net/ipv4/conf/{self.trunk}/forwarding=0', tool='sysctl')
            if not in_force(back._replace(line=back.line[:-1] + '1')) or any(
                    back in other.undo for other in plan.records.values()):
                row.undo.append(back)
        # With NAT it is IPv4 alone, and dnsmasq would wait until an address of IPv6 may be used.
        plan.late += ops_for(f'bring up {self.name}', f'link set dev {self.name} '
                             f'{"" if nat else "addrgenmode eui64 "}up')
        if row.facts['dhcp']:
            require_dhcp(self.name, ipaddress.ip_network(row.facts['subnet']), row.facts['hosts'])
        self._plan(plan, row, plan.free_mac(HOST_MAC, self.name) if nat else link.mac,
                   mtu)
        self._plan_lan(plan, 'p0', mtu)
        if not nat:
            take_over(plan, [self.trunk], self.name, row)

    def _plan_lan(self, plan: Transaction, label: str, mtu: int) -> None:
        plan_nic(plan, f'{self.name}-{label}', 'pair', inner=self.name, parents=[self.name],
                 mtu=mtu)

    @property
    def ports(self) -> Mapping[str, VirtualNic]:
        """Its LAN ports by label: p0, p1, ..."""
        self.link()
        records = Registry.read().records
        return {name.rpartition('-')[2]: VirtualNic.known(name, records)
                for name, row in records.items() if row.parents == [self.name]}

    def connect(self, thing: Interface | str, to: Interface | str | None = None, *,
                force: bool = False) -> None:
        """router.connect('p0', switch) plugs a LAN port into a switch, and makes the port if there
        is none; router.connect(switch) takes a free one. A VirtualNic or an Interface becomes a
        port of the router's own bridge. Raises InUse as Switch.connect() does."""
        check('connect', thing, name_of, NetworkError)
        if to is None and not isinstance(thing, Switch):
            return super().connect(thing, force=force)
        label = str(thing)
        target = check('connect', thing if to is None else to, name_of, NetworkError)
        if to is None:                      # by the port that is in it, or a free one
            links = read_network().links
            masters = {label: links[port.name].master for label, port in self.ports.items()
                       if port.name in links}
            labels = (f'p{number}' for number in itertools.count())
            label = next((label for label in masters if masters[label] == target), '') or next(
                label for label in labels if not masters.get(label))
        if not re.fullmatch(r'p\d{1,3}', label):
            raise NetworkError(f'{self.name}: {label!r} can\'t be a port', 'take p0, p1, ...')
        with transaction() as plan:         # one that somebody deleted, or unplugged, is made anew
            self._plan_lan(plan, label, plan.network.find(self.name).mtu)
        return self.ports[label].connect(target)


def free_subnet(plan: Transaction, wanted: str = '') -> str:
    """Return `wanted`, or the first 10.77.N.0/24, if it overlaps with nothing of the host."""
    taken = {f'address {address} of {link.name}': ipaddress.ip_interface(address).network
             for link in plan.network.links.values() for address in link.addresses}
    taken.update({f'route {route.to}': ipaddress.ip_network(route.to)
                  for route in plan.network.routes if not route.wide})
    for text in [wanted] if wanted else (f'10.77.{number}.0/24' for number in range(256)):
        subnet = ipaddress.ip_network(text)
        blocked = next((what for what, other in taken.items()
                        if subnet.version == other.version and subnet.overlaps(other)), '')
        if not blocked:
            return str(subnet)
    raise InUse(f'subnet {text}: overlaps with the {blocked}', 'give another with subnet=')


class Bond(ManagedInterface):
    """Several interfaces as one (the bonding driver).

    `interfaces` are names or Interfaces; their addresses and routes move to the bond and come
    back with delete(). `mode` is one of MODES, `miimon` the milliseconds between two looks at
    their links. Raises MissingFeature when the kernel lacks bonding, InUse as Router does.
    """

    MODES = ('balance-rr', 'active-backup', 'balance-xor', 'broadcast', '802.3ad', 'balance-tlb',
             'balance-alb')

    def __init__(self, name: str, interfaces: Sequence[Interface | str],
                 mode: str = 'active-backup', miimon: int = 100, force: bool = False) -> None:
        super().__init__(valid_name(name))
        several = list(interfaces) if isinstance(interfaces, (list, tuple)) else [interfaces]
        given = [check('interfaces', one, name_of, NetworkError) for one in several]
        check('mode', mode, one_of(*self.MODES), NetworkError)
        check('miimon', miimon, MIIMON, NetworkError)
        check('force', force, a_bool, NetworkError)
        if not given:
            raise NetworkError(f'bond {name}: has no interfaces', 'name at least one')
        if not os.path.exists('/sys/class/net/bonding_masters'):
            # Loaded on demand the module would make a bond0, and this one's name be taken.
            with contextlib.suppress(CommandError):
                run(['modprobe', '-q', 'bonding', 'max_bonds=0'], IP_TIMEOUT, check=False)
        with transaction() as plan:
            names = [plan.network.find(one).name for one in given]
            row = plan.claim(name, 'bond', interfaces=names, mode=mode)
            links = [link for link in map(plan.network.links.__getitem__, names)
                     if link.master != name]
            for link in links:
                require_port(plan, link, name, force)
            if not row:                     # these were taken out, or unplugged and there again
                for link in links:
                    require_bare(plan, link, name, force)
                    device = shlex.quote(link.name)
                    plan.late += ops_for(f'make {link.name} a port of {name}', f'link set dev '
                                         f'{device} down', f'link set dev {device} master {name}')
                return
            plan.ops.append(Op(f'create bond {name}', f'link add name {name} mtu '
                               f'{min(link.mtu for link in links)} group {plan.group} '
                               f'type bond mode {mode} miimon {miimon}'))
            plan.late += ops_for(f'bring up {name}', f'link set dev {name} addrgenmode eui64 up')
            take_over(plan, names, name, row)

    @property
    def active(self) -> str:
        """The name of the interface that is in use, in the modes that have one; or ''."""
        return str(self.link().data.get('active_slave', ''))

    @property
    def status(self) -> dict[str, Mapping[str, Any]]:
        """What `ip -details` says of each interface in it: state, mii_status and the like."""
        return {link.name: link.slave for link in read_network().ports(self.link().name)}


# === network checks =============================================================================

def check_networks() -> Iterator[Check]:
    """Yield what is here or missing, what others took away, and what leaked; change nothing."""
    def left() -> Iterator[Check]:
        registry = Registry.read()
        for name in registry.damaged:
            yield Check(False, explain(registry.unreadable(name)))
        for name, why in clean(dry_run=True).items():
            yield Check(False, f'{name}: {why}; {CLEAN} removes it')
    for look in (_check_programs, _check_kernel, _check_passages, left):
        try:
            lines = [*look()]
        except (Error, OSError, ValueError) as problem:     # the others are looked at all the same
            lines = [Check(False, f'networks: {explain(problem)}')]
        yield from lines


def networks_used() -> bool:
    """Tell whether anything was ever made here, since this host was started."""
    return os.path.exists(Registry().path)      # what we may not look into counts as nothing


def _has_rights() -> bool:
    caps = re.search(r'CapEff:\s*(\w+)', Path('/proc/self/status').read_text())
    return bool(caps and int(caps.group(1), 16) >> 12 & 1)


def _check_programs() -> Iterator[Check]:
    admin = _has_rights()
    yield Check(admin, 'rights: ' + ('CAP_NET_ADMIN' if admin else 'needs root or CAP_NET_ADMIN'))
    for program, use in (('ip', 'all of it'), ('tc', 'VirtualNic.impair()'),
                         ('iptables', 'Router(nat=True)')):
        found = which(program)
        yield Check(bool(found), f'program {found or program}' + (
            '' if found else f': missing, for {use}; install {PACKAGES.get(program, program)}'))


def _check_kernel() -> Iterator[Check]:
    """Look what the kernel has loaded, as a module or built in."""
    if not _has_rights() or not which('ip'):
        return
    rest = [row for row in FEATURES for module in row.modules.split()[-1:]
            if not os.path.exists(f'/sys/module/{module}') and not (which('modprobe') and not run(
                ['modprobe', '-nq', module], IP_TIMEOUT, check=False).returncode)]
    # No module can be loaded by trying these, as there is none; veth is what macvtap stands on.
    tries = [Op(row.name, row.probe[3:], tool=row.probe[:2]) for row in FEATURES
             if row in rest or row.name == 'veth']
    refused = {op.what for tool, ops in itertools.groupby(tries, lambda op: op.tool) if which(tool)
               for op, _ in _batch(list(ops), True, (), ('unshare', '-n'))}
    for row in FEATURES:
        lacks = row in rest and row.name in refused
        yield Check(not lacks, f'{row.lacks()}, for {row.use}' if lacks else f'kernel: {row.name}')


def _check_passages() -> Iterator[Check]:
    """Look at what frames need to pass our switches and routers, and which others change."""
    records = Registry.read().records
    bridges = {name: row for name, row in records.items()
               if row.kind in ('switch', 'router') and row.stage == 'ready'}
    if bridges and filtered('iptables'):
        yield Check(True, 'note: net.bridge.bridge-nf-call-iptables=1: the firewall sees what '
                    'crosses bridges; switches have rules to let it pass')
    ports = read_network().links if bridges else {}
    for name, row in bridges.items():
        trunk = row.facts.get('trunk', '')
        index = row.facts.get('identities', {}).get(trunk, [0])[0]      # it may be renamed
        if trunk and not row.facts['nat'] and not any(
                port.master == name and (port.name == trunk or port.index == index)
                for port in ports.values()):
            yield Check(False, f'{name}: somebody took {trunk} away; Router({trunk!r}, '
                        f'name={name!r}) puts it back')
        for op in passage_ops(name, row, records)[0]:
            if not in_force(op):
                yield Check(False, f'{name}: somebody took away what it needs to {op.what}: '
                            f'{op.tool} {op.line}; connect() or starting a machine on it puts '
                            'that back')
    routed = filtered('iptables') or any(row.facts.get('nat') for row in bridges.values())
    serving = [name for name, row in bridges.items() if row.facts.get('dhcp')]
    for family, table, chain, hook, rules in dropping_chains() if bridges else ():
        needs = [*bridges] if routed or family == 'bridge' else []
        if hook == 'input':                     # of what it lets in, its rules have the name
            needs = [name for name in serving if family in ('ip', 'inet') and f'"{name}"' not in
                     rules]
        if needs:
            yield Check(False, f'nft chain {family} {table} {chain}: drops what it does not know, '
                        f'which {", ".join(needs)} may need; accept it there, too')


def dropping_chains() -> list[tuple[str, ...]]:
    """Return family, table, name, hook and rules of others' nft chains that drop what is forwarded,
    or for this host (input), such as machines' DHCP. Their rules may be in chains of that table
    that they jump to, as firewalld's."""
    if not which('nft'):
        return []
    tree = parse_json(run(['nft', '-j', 'list', 'ruleset'], IP_TIMEOUT).stdout)
    items = [(what, row) for item in checked('nft', tree, {'nftables': [{'*': object}]})['nftables']
             for what, row in item.items() if isinstance(row, dict)]
    based = {(row.get('family'), row.get('table'), row.get('name')): row for what, row in items
             if what == 'chain' and row.get('hook')}
    hooked = {place: row for place, row in based.items()
              if row['hook'] in ('forward', 'input') and row.get('type') == 'filter'}
    chains = {place: row.get('policy') == 'drop' for place, row in hooked.items()}
    rules: dict[Any, list[str]] = {place: [] for place in hooked}
    for what, row in items:
        place = row.get('family'), row.get('table'), row.get('chain')
        for one in hooked if what == 'rule' else ():
            if one == place or one[:2] == place[:2] and place not in based:
                rules[one].append(json.dumps(row))
        if what == 'rule' and place in chains:
            said = [one for one in row.get('expr') or () if isinstance(one, dict)]
            verdicts = [one.keys() for one in said if not one.keys() & {'counter', 'log'}]
            chains[place] |= verdicts in ([{'drop'}], [{'reject'}])
    # iptables' own chains are where our rules stand before the others.
    ours = [(family, 'filter', name) for family in ('ip', 'ip6') for name in ('FORWARD', 'INPUT')]
    return [(*map(str, place), str(hooked[place]['hook']), ''.join(rules[place]))
            for place, drops in chains.items() if drops and place not in ours]


def clean(names: Sequence[str] = (), *, dry_run: bool = False, everything: bool = False,
          force: bool = False) -> dict[str, str]:
    """Remove what interrupted changes left, with `everything` also what stands though the program
    that made it has ended, or what has these names, giving back what it had taken; return name ->
    why. What a running machine uses stays, and is named in the log, unless `force`."""
    for what, flag in (('dry_run', dry_run), ('everything', everything), ('force', force)):
        check(what, flag, a_bool, NetworkError)
    check('names', names, texts, NetworkError)
    with transaction() as plan:
        damaged = plan.registry.damaged         # which may be in, or on, any of the others
        found = _leaks(plan, everything and not damaged)
        for name in damaged.keys() - {*names}:
            log.warning('%s', explain(plan.registry.unreadable(name)))
        if names:
            known = {**{name: row.kind for name, row in plan.records.items()}, **found,
                     **dict.fromkeys(damaged, 'its row can\'t be read')}
            for name in names:
                if name not in known:
                    raise NoInterface(f'{name}: nothing that this program made has that name',
                                      f'see {CLEAN} --all --dry-run')
            found = {name: known[name] for name in names}
        used = plan.users() if found and not force else {}
        for name in list(found):
            holders = sorted({used[one] for one in (name, *plan.registry.with_dependents([name]))
                              if one in used})
            if holders:
                del found[name]
                log.warning('%s stays: %s uses it; stop that first, or use force', name,
                            ', '.join(holders))
        if not dry_run:
            for name in found.keys() - plan.records.keys():
                plan.records[name] = Record('nic', plan.group, 'deleting')
                damaged.pop(name, None)
            plan.remove(found)
    return found


def _leaks(plan: Transaction, everything: bool) -> dict[str, str]:
    """Return what clean() may remove, and why."""
    found = {}
    for name, row in plan.records.items():
        if row.stage != 'ready':
            found[name] = f'{row.kind}, interrupted while {row.stage}'
        elif not plan.stands(name):
            found[name] = f'{row.kind}, of which a part is gone'
        elif everything and process_start(row.pid) != row.started:
            found[name] = f'{row.kind}, made by process {row.pid}, which has ended'
    parts = {*plan.records, *plan.registry.damaged,
             *(row.facts.get('sink') for row in plan.records.values())}
    for link in plan.network.links.values():
        if link.ours() and link.name not in parts:
            found[link.name] = f'{link.kind}, marked as ours but not written down'
    return found


# ### part 3: machines ############################################################################

# === json sockets ===============================================================================

EVENTS_KEPT = 1000             # that came while nobody waited for one; the oldest are forgotten

SCHEMAS['event'] = {'event': str, 'data?': dict}


class LineSocket(contextlib.AbstractContextManager['LineSocket']):
    """A socket that carries one JSON value a line: the wire of QMP, of the guest agent, and of
    two programs between which a guest migrates.

    Not for two threads at once: QMP locks around an exchange.
    """

    def __init__(self, path: str, connected: socket.socket) -> None:
        self.path = path                        # of the socket, or who is at the other end
        self.buffer = bytearray()               # received, not yet a whole line
        self.socket = connected

    @classmethod
    def connect(cls, path: str, deadline: Deadline) -> LineSocket:
        """Connect to a unix socket; PeerSilent or PeerClosed when that fails."""
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.settimeout(max(deadline.left(), 0.001))
            place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                connected.connect(fd_path(place))       # this one, whatever is put in its place
            finally:
                os.close(place)
        except BlockingIOError:             # as many wait to be taken as may
            connected.close()
            raise PeerSilent(f'{path}: takes no connections') from None
        except OSError as problem:
            connected.close()
            raise PeerClosed(f'{path}: {problem.strerror or problem}',
                             'is the machine running?') from None
        return cls(path, connected)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, value: Mapping[str, Any], deadline: Deadline, prefix: bytes = b'',
             fds: Sequence[int] = ()) -> None:
        """Send one value as a line, after the raw bytes `prefix`, with descriptors (SCM_RIGHTS)."""
        TRACE(f'send {value.get("execute")} to {self.path}')
        self.socket.settimeout(max(deadline.left(), 0.001))
        # No byte too many: QEMU takes each by itself, in some microseconds.
        data = prefix + json.dumps(value, separators=(',', ':')).encode() + b'\n'
        try:
            sent = socket.send_fds(self.socket, [data], fds) if fds else 0
            self.socket.sendall(data[sent:])
        except socket.timeout:
            raise PeerSilent(f'{self.path}: takes no more bytes') from None
        except OSError as problem:
            raise PeerClosed(f'{self.path}: {explain(problem)}') from None

    def _more(self, deadline: Deadline) -> None:
        if deadline.passed():
            raise PeerSilent(f'{self.path}: did not answer in time')
        self.socket.settimeout(max(deadline.left(), 0.001))
        try:
            data = self.socket.recv(65536)
        except socket.timeout:
            raise PeerSilent(f'{self.path}: did not answer in time') from None
        except OSError as problem:
            raise PeerClosed(f'{self.path}: {explain(problem)}') from None
        if not data:
            raise PeerClosed(f'{self.path}: closed by its other end')
        self.buffer += data

    def line(self, deadline: Deadline) -> bytes:
        """Return the next line, without its end."""
        seen, end = 0, self.buffer.find(b'\n')
        while end < 0:                  # each byte is looked at once, in however small pieces
            seen = len(self.buffer)
            if seen > JSON_BYTES:
                raise ProtocolError(f'{self.path}: a line longer than {JSON_BYTES} bytes')
            self._more(deadline)
            end = self.buffer.find(b'\n', seen)
        line = bytes(self.buffer[:end])
        del self.buffer[:end + 1]
        return line

    def skip(self, mark: bytes, deadline: Deadline) -> None:
        """Drop all that comes before a byte, however much that is, and the byte."""
        while mark not in self.buffer:
            self.buffer.clear()
            self._more(deadline)
        del self.buffer[:self.buffer.index(mark) + 1]

    def receive(self, deadline: Deadline) -> dict[str, Any]:
        line = self.line(deadline).strip()
        try:
            value = parse_answer(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ProtocolError(f'{self.path}: not a JSON object: {line[:80]!r}')
        return value

    def ask(self, command: str, timeout: float, **arguments: Any) -> Any:
        """Return what the other end answers to a command."""
        deadline = Deadline(timeout)
        self.send({'execute': command, 'arguments': arguments}, deadline)
        return self.returned(command, self.receive(deadline))

    def asked(self, command: str, timeout: float) -> dict[str, Any]:
        """Return the arguments of the command that has to come now."""
        request = self.receive(Deadline(timeout))
        if not matches(request, {'execute': str, 'arguments': SCHEMAS[f'request {command}']}) \
                or request['execute'] != command:
            raise ProtocolError(f'{self.path}: no request "{command}": {request!r:.80}')
        return dict(request['arguments'])

    def closed(self) -> bool:
        """Tell whether the other end has closed it, and waits for nothing any more."""
        with contextlib.suppress(OSError):
            ready = select.select([self.socket], [], [], 0)[0]
            return bool(ready and not self.buffer and not self.socket.recv(1, socket.MSG_PEEK))
        return True

    def returned(self, command: str, reply: Mapping[str, Any]) -> Any:
        """Return what a reply to a command returns; ReplyError if it is an error."""
        if 'error' in reply:
            raise reply_error(self.path, reply)
        try:
            return answer_of(command, reply)
        except ValueError as problem:
            raise ProtocolError(f'{self.path}: no answer: {problem}') from None


def reply_error(path: str, answer: Mapping[str, Any]) -> ReplyError:
    """Return the error that an answer with an "error" member stands for."""
    error = answer['error'] if isinstance(answer['error'], dict) else {'desc': answer['error']}
    return ReplyError(path, *(clip(str(error.get(member, ''))) for member in ('class', 'desc')))


class QMP(contextlib.AbstractContextManager['QMP']):
    """QEMU's monitor protocol over its unix socket (docs/interop/qmp-spec).

    QEMU serves one client of a socket at a time and lets a second one wait without a word, so
    a missing greeting means that the socket is in use.
    """

    def __init__(self, path: str, timeout: float = QMP_TIMEOUT) -> None:
        deadline = Deadline(timeout)
        self.wire = LineSocket.connect(path, deadline)
        self.lock = threading.Lock()            # one exchange at a time
        self.serial = 0                         # of the last command: an answer must carry it
        self.pending: collections.deque[dict[str, Any]] = collections.deque(
            maxlen=EVENTS_KEPT)                 # events that came before anybody asked
        try:
            self._greeting(deadline)
            self.execute('qmp_capabilities', timeout=deadline.left())
        except BaseException:
            self.wire.close()
            raise

    def _greeting(self, deadline: Deadline) -> None:
        try:
            greeting = self.wire.receive(deadline)
        except PeerSilent:
            raise PeerSilent(f'{self.wire.path}: no greeting',
                             'another program has this monitor open; close it') from None
        if not isinstance(greeting.get('QMP'), dict):
            raise ProtocolError(f'{self.wire.path}: no QMP greeting: {str(greeting)[:80]}')

    def __exit__(self, *_: object) -> None:
        self.wire.close()

    def execute(self, command: str, timeout: float = QMP_TIMEOUT, fds: Sequence[int] = (),
                **arguments: Any) -> Any:
        """Return what QEMU answers to `command`; `_` in argument names stands for `-`.

        `fds` are descriptors for getfd or add-fd; they stay open here. Raises ReplyError with
        QEMU's words, PeerSilent or PeerClosed.
        """
        with self.lock:
            deadline = Deadline(timeout)
            self.serial += 1
            members = {name.replace('_', '-'): value for name, value in arguments.items()}
            self.wire.send({'execute': command, 'id': self.serial,
                            **({'arguments': members} if members else {})}, deadline, fds=fds)
            while True:
                answer = self.wire.receive(deadline)
                if 'event' in answer:
                    self.pending.append(answer)
                elif answer.get('id') == self.serial or 'id' not in answer:
                    break               # an answer to an earlier, timed-out command is dropped
            return self.wire.returned(command, answer)

    def event(self, names: Iterable[str], timeout: float, **data: Any) -> dict[str, Any]:
        """Return the next event of these names (of any if none) and data; or PeerSilent."""
        wanted, deadline = set(names), Deadline(timeout)
        with self.lock:
            while True:
                event = self.pending.popleft() if self.pending else self.wire.receive(deadline)
                if not matches(event, SCHEMAS['event']) or wanted and event['event'] not in wanted:
                    continue
                if all(event.get('data', {}).get(key) == value for key, value in data.items()):
                    return event


class GuestAgent:
    """The QEMU guest agent over its unix socket (qga/qapi-schema.json).

    Its protocol has no message ids, so that a late answer to an earlier question would be taken
    for the answer to this one. Hence every attempt starts with guest-sync-delimited and a number
    of its own: the answer with that number stands where the two ends agree again.
    """

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name

    def execute(self, command: str, arguments: Arguments = None,
                timeout: float = AGENT_TIMEOUT) -> Any:
        """Return what the agent answers to `command`; AgentError when it does not."""
        deadline = Deadline(timeout)
        try:
            with LineSocket.connect(self.path, deadline) as wire:
                self._synchronise(wire, deadline)
                members = arguments() if callable(arguments) else arguments or {}
                wire.send({'execute': command, 'arguments': dict(members)}, deadline)
                answer = wire.receive(deadline)
        except ProtocolError as problem:
            raise agent_error(self.name, 'did not answer' if isinstance(problem, PeerSilent) else
                              'not connected: ' * isinstance(problem, PeerClosed)
                              + problem.message) from None
        if 'error' in answer:
            refusal = reply_error(self.path, answer)
            raise agent_error(self.name, f'{refusal.code}: {refusal.text}'.lstrip(': '))
        return agent_answer(self.name, command, answer)

    def _synchronise(self, wire: LineSocket, deadline: Deadline) -> None:
        """Have the agent drop what it has read (0xFF), and skip what it had written."""
        number = random.randrange(1 << 31)
        sync = {'execute': 'guest-sync-delimited', 'arguments': {'id': number}}
        wire.send(sync, deadline, prefix=b'\xff')
        while True:
            wire.skip(b'\xff', deadline)        # no text has that byte
            with contextlib.suppress(ValueError):
                answer = parse_answer(wire.line(deadline).rpartition(b'\xff')[2])
                if isinstance(answer, dict) and answer.get('return') == number:
                    return


# === disks ======================================================================================
# QEMU never finds out by itself what an image is: a guest can write any header into a raw disk,
# and with it name a file of the host as "backing file" (CVE-2024-32498 and its kin). So formats
# are always given, and a header is read here before any program opens the image.

GIB, MIB = 1 << 30, 1 << 20
IMAGE_TIMEOUT = 120.0           # for one run of qemu-img; none of its uses here copies data
QCOW2_MAGIC, XZ = b'QFI\xfb', b'\xfd7zXZ\0'
BACKING_LAST = 1 << 21          # byte at which a backing file's name may begin: of one cluster
BACKING_LENGTH = 1023           # ... and how long it may be
CORRUPT = 1 << 1                # of the incompatible features: QEMU found it to be damaged
EXTERNAL_DATA = 1 << 2          # ... and: the data are in another file
KEPT_BY_WIPE = ('compat', 'compression-type', 'extended-l2', 'lazy-refcounts', 'refcount-bits')
DECRYPT = ('qemu-img convert --object secret,id=key,file=KEYFILE --image-opts '
           'driver={},{},file.filename={{}} -O qcow2 NEW.qcow2')
# What is neither raw nor qcow2: where its magic is (below 0: from the end), the magic, what it is,
# and what makes a disk of it; {} is its name.
FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    *((place, magic, f'{what} ({form})', f'qemu-img convert -f {form} -O qcow2 {{}} NEW.qcow2')
      for place, magic, what, form in (
        (0, b'QFI\xfb\0\0\0\1', 'an image of qcow2\'s forerunner', 'qcow'),
        (0, b'KDMV', 'an image of VMware', 'vmdk'), (0, b'COWD', 'an image of VMware', 'vmdk'),
        (0, b'# Disk DescriptorFile', 'the description of an image of VMware', 'vmdk'),
        (64, b'\x7f\x10\xda\xbe', 'an image of VirtualBox', 'vdi'),
        (0, b'vhdxfile', 'an image of Hyper-V', 'vhdx'),
        (0, b'conectix', 'a VHD image', 'vpc'), (-512, b'conectix', 'a VHD image', 'vpc'),
        (-512, b'koly', 'an image of macOS', 'dmg'), (0, b'QED\0', 'a QED image', 'qed'),
        (0, b'WithoutFreeSpace', 'an image of Parallels', 'parallels'),
        (0, b'WithouFreSpacExt', 'an image of Parallels', 'parallels'))),
    (0, b'LUKS\xba\xbe', 'encrypted (LUKS)', DECRYPT.format('luks', 'key-secret=key')),
    *((place, magic, f'{what}, not a disk', f'unpack it: {program} {{}}')
      for place, magic, what, program in (
        (257, b'ustar', 'a tar archive, as an .ova is', 'tar xf'),
        (0, XZ, 'compressed by xz', 'xz -dk'), (0, b'\x04"M\x18', 'compressed by lz4', 'lz4 -dm'),
        (0, b'\x1f\x8b', 'compressed by gzip', 'gunzip -k'),
        (0, b'\x28\xb5\x2f\xfd', 'compressed by zstd', 'zstd -d'),
        (0, b'BZh', 'compressed by bzip2', 'bunzip2 -k'),
        (0, b'7z\xbc\xaf', 'a 7z archive', '7z x'), (0, b'PK\3\4', 'a zip archive', 'unzip'))))
IMAGE_LOCKS = 100, 200          # QEMU locks bytes 100 to 299 of an image that it has open ...
WRITER_LOCK = 101, 1            # ... and this one if it writes to it
TAG = re.compile(r'[A-Za-z][A-Za-z0-9._-]{0,62}')   # never a number: qemu-img would take it for
#                                 the id of another snapshot
LOGIN = re.compile(r'[A-Za-z_][A-Za-z0-9._-]{0,31}')
USER_DATA = re.compile(r'\s*#|(?s:.{0,4096})mime-version:', re.IGNORECASE)     # as cloud-init does
SSH_KEY = re.compile(r'(ssh|ecdsa|sk)-[!-~]+ [A-Za-z0-9+/=]+( [ -~]*)?')
ISO_MAKERS = (('xorriso', '-as', 'mkisofs'), ('genisoimage',), ('mkisofs',))

# Who tells which machines, or only those that are saved, have an image, and how deep below their
# disk it is: *devices*, as no disk knows of machines.
MACHINES_WITH: list[Callable[[str, bool], Iterable[tuple[str, int]]]] = []

SCHEMAS.update({
    'query-block': [{'qdev?': str, 'locked': bool, 'tray_open?': bool}],
    'qemu-img info': {
        'virtual-size': int, 'cluster-size?': int, 'format-specific?': {'data?': dict},
        'snapshots?': [{'id': str, 'name': str, 'date-sec': int, 'vm-state-size': int}]}})
SCHEMAS['query-named-block-nodes'] = [{'node-name?': str, 'image': SCHEMAS['qemu-img info']}]


def image_path(filename: str | os.PathLike[str]) -> str:
    """Return the absolute path, which QEMU can't take for a protocol or an option."""
    try:
        path = os.path.abspath(os.fsdecode(filename))
    except TypeError:
        raise DiskError(f'{filename!r:.80} is no file name', 'give a path') from None
    strange = re.search(r'[\0-\x1f\x7f-\x9f\u2028\u2029]|([\ud800-\udfff])', path)
    if strange:
        raise DiskError(f'{path!r}: a file name with ' + (
            'bytes that are no UTF-8' if strange[1] else 'control characters'), 'rename it')
    return path


def checked_tag(tag: str) -> str:
    """Return a snapshot's name; DiskError if QEMU could take it for something else."""
    if not isinstance(tag, str) or not TAG.fullmatch(tag):
        raise DiskError(f'{tag!r:.80} can\'t be the name of a snapshot',
                        'use a letter, then up to 62 letters, digits, ".", "_", "-"')
    return tag


def free_tag(taken: Sequence[str], stem: str = 's') -> str:
    now = time.strftime(f'{stem}%Y%m%d-%H%M%S')
    return next(tag for tag in itertools.chain([now], (f'{now}-{n}' for n in itertools.count(2)))
                if tag not in taken)


def readable(filename: str | os.PathLike[str]) -> str:
    """Return the absolute path of a file; FileError if it can't be read."""
    path = image_path(filename)
    os.close(open_file(path))
    return path


class Header(NamedTuple):
    """What the header of a qcow2 image says (docs/interop/qcow2.txt)."""

    size: int                   # of the disk, bytes
    backing: str                # '' if there is none
    encrypted: int              # 0, 1: AES, 2: LUKS
    features: int               # CORRUPT, EXTERNAL_DATA


def image_at(path: str, *places: int) -> list[bytes]:
    """Return 1 KiB of a file from each place, below 0 from its end; b'' for what can't be read."""
    found = [b''] * len(places)
    with contextlib.suppress(OSError, FileError), open(open_file(path), 'rb') as image:
        end = image.seek(0, os.SEEK_END)
        found = [os.pread(image.fileno(), 1024, max(place + end * (place < 0), 0))
                 for place in places]
    return found


def qcow2_header(path: str) -> Header | None:
    """Read the header; None if the file is no qcow2 image."""
    os.close(open_file(path))
    head = image_at(path, 0)[0].ljust(80, b'\0')
    version, where, length, _, size, encrypted = struct.unpack('>IQIIQI', head[4:36])
    if head[:4] != QCOW2_MAGIC or version == 1:
        return None
    if version not in (2, 3) or where > BACKING_LAST or length > BACKING_LENGTH:
        raise DiskError(f'{path}: a broken header', 'restore the image from a backup')
    backing = os.fsdecode(image_at(path, where)[0][:length]) if where else ''
    features = struct.unpack('>Q', head[72:80])[0] if version > 2 else 0
    return Header(size, backing, encrypted, features)


def foreign(path: str) -> tuple[str, str]:
    """Return what a foreign image is, and the command that makes a disk of it; or ""."""
    first, last = image_at(path, 0, -512)
    for place, magic, what, remedy in FOREIGN:
        if (last if place < 0 else first)[max(place, 0):].startswith(magic):
            return what, remedy.format(shlex.quote(path))
    return '', ''


def file_driver(path: str) -> str:
    """Return QEMU's driver for a file, or for a block device, such as a volume of LVM."""
    return 'host_device' if is_device(path) else 'file'


def warn_of_foreign(path: str, use: str) -> None:
    """Only log what a raw disk or a CD looks like: a guest may have written that."""
    what, remedy = foreign(path)
    if not what and image_at(path, 0)[0].startswith(QCOW2_MAGIC):
        what, remedy = 'a qcow2 image', "say Harddrive(…, format='qcow2')"
    if what:
        log.warning('%s: looks like %s, but is used as %s: the guest sees the file as it stands, '
                    'not the disk in it; %s', path, what, use, remedy)


def holder_of(path: str, but: int = 0) -> str:
    """Return who has locked a file, by its machine, program and process, or '' where this process
    may not see it (/proc/PID/fdinfo); other than this process and the one `but`. Of a device, that
    may be the host itself."""
    device = is_device(path)
    if device:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as problem:
            if problem.errno == errno.EBUSY:
                return 'this host (a file system, swap, LVM or the like that is on it)'

    def is_it(fd: str) -> bool:     # whatever else is open may be on a file server that hangs
        with contextlib.suppress(OSError):
            return (not device or os.readlink(fd).startswith('/dev/')) and _is_file(fd, path)
        return False
    for process in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            mine = [fd.name for fd in (process / 'fd').iterdir() if is_it(str(fd))]
            if int(process.name) not in (os.getpid(), but) and any(
                    'lock:' in (process / 'fdinfo' / fd).read_text() for fd in mine):
                return process_name(process.name)
    return ''


def is_planted(path: str, image: str = '/') -> bool:
    """Tell whether a file, or a link itself, is neither ours, nor root's, nor of who has its
    directory, or the image that it goes with: in /tmp, others foresee its name."""
    return os.lstat(path).st_uid not in (0, os.geteuid(), *(
        os.stat(place).st_uid for place in (os.path.dirname(path), image)))


def _is_file(one: str, other: str) -> bool:
    """Tell whether both are one file, or one device: libvirt's QEMUs have nodes of their own."""
    with contextlib.suppress(OSError):
        mine, theirs = os.stat(one), os.stat(other)
        return os.path.samestat(mine, theirs) or stat.S_ISBLK(mine.st_mode) and stat.S_ISBLK(
            theirs.st_mode) and mine.st_rdev == theirs.st_rdev
    return False


class Attached(Protocol):
    """The place of a disk or CD in a machine, as far as the disk needs to know it."""

    id: str                     # of the device
    node: str                   # of the block layer

    def alive(self) -> bool:
        """Tell whether the machine runs."""

    def execute(self, command: str, medium: str = '', **arguments: Any) -> Any:
        """Carry out a QMP command; the file `medium` is opened here, its argument `filename`."""

    def keep(self, medium: str) -> None:
        """Have the machine remember what is in the drive."""


class Snapshot(NamedTuple):
    """A snapshot inside a qcow2 image."""

    tag: str
    when: int                   # seconds since 1970
    ram: int                    # bytes of a machine's state that are in it; 0: the disk alone
    id: str = ''                # QEMU's own number for it in this image


class Harddrive:
    """A disk image of format qcow2 or raw; created when the file is absent, never overwritten.

    `size` is in GiB. `backing` (a Harddrive, or the path of a qcow2 image) makes a thin copy of
    another image, which is only read. Raises DiskError for an image that is not of this format,
    or that names a backing file other than `backing`.
    """

    def __init__(self, filename: str | os.PathLike[str] = 'harddrive0.qcow2', size: float = 5,
                 format: str = 'qcow2',
                 backing: Harddrive | str | os.PathLike[str] | None = None) -> None:
        if format not in ('qcow2', 'raw') or (backing and format == 'raw'):
            raise DiskError(f'{filename}: format {format!r:.80}'
                            f'{" with a backing file" if backing else ""}',
                            'use qcow2, or raw without a backing file')
        self.filename, self.format = image_path(filename), format
        if backing is not None and not isinstance(backing, Harddrive):
            if not os.path.exists(image_path(backing)):
                raise DiskError(f'{image_path(backing)}: no such image',
                                'a backing image must exist')
            backing = Harddrive(backing)
        self.backing = backing
        self.attached: Attached | None = None       # its place in the machine that has it
        self.create(size)

    def __repr__(self) -> str:
        return f'Harddrive({self.filename!r}, format={self.format!r})'

    def _bytes(self, size: float) -> int:
        """Return GiB as bytes, in whole sectors."""
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 < size < 1 << 20:
            raise DiskError(f'{self.filename}: size {size!r}', 'give it as a number of GiB')
        return -(-round(size * GIB) // 512) * 512

    def create(self, size: float = 5) -> None:
        """Create the image, of `size` GiB, if it is absent (qemu-img create), and check it."""
        wanted = self._bytes(size)
        if not os.path.exists(self.filename):
            if re.match('/dev/(?!shm/)', os.path.realpath(self.filename)):  # a file would be in RAM
                raise DiskError(f'{self.filename}: no such device',
                                'activate it first, as by lvchange -ay, or name a file elsewhere')
            base = self.backing.info()['virtual-size'] if self.backing else 0
            made_once(self.filename, self._write, max(wanted, base))
        elif self.format == 'raw':
            warn_of_foreign(self.filename, 'raw')
        self.check()

    def _write(self, size: int, *kind: str, replace: bool = False) -> None:
        base = ['-b', self.backing.filename, '-F', self.backing.format] if self.backing else []
        header = qcow2_header(self.filename) if base and replace else None
        if header:                              # the name in it may be relative
            base[1:2] = [header.backing, '-u']
        link = os.path.islink(self.filename) and not is_planted(self.filename)
        path = os.path.realpath(self.filename) if replace or link else self.filename
        with whole_file(path, replace) as file:
            self._img('create', '-q', '-f', self.format, *kind, *base, fd_path(file), str(size),
                      keep=[file])
            if replace:
                old = os.stat(self.filename)
                os.fchown(file, old.st_uid, old.st_gid)
                os.fchmod(file, stat.S_IMODE(old.st_mode))
                for key in os.listxattr(self.filename):     # such as an ACL, a label
                    with contextlib.suppress(OSError):
                        os.setxattr(file, key, os.getxattr(self.filename, key))

    def _img(self, *arguments: str, keep: Sequence[int] = ()) -> bytes:
        """Run qemu-img; DiskError with its words."""
        if '-U' not in arguments and self._is_device_in_use():
            raise self.taken()
        try:
            return run(['qemu-img', *arguments], IMAGE_TIMEOUT, keep=keep).stdout
        except CommandError as problem:
            # What it made has no name that could be deleted, and what is there stays.
            said = '; '.join(line for line in problem.stderr.splitlines() if 'Error when deleting '
                             not in line) or f'ended by signal {-problem.status}'
            for name in (self._explicit(), *map(fd_path, keep)):
                said = said.replace(name, self.filename)
            if ' lock' in said:     # nothing but its words (Failed to get "write" lock) says which
                raise self.taken() from None
            raise DiskError(f'{self.filename}: qemu-img {arguments[0]}: {said}',
                            problem.hint) from None

    def taken(self) -> DiskError:
        """Return the error that another program has the image open, and who."""
        holders = [(row, holder_of(row.filename)) for row in self.chain()]
        layer, who = next((pair for pair in holders if pair[1]), (self, 'a machine'))
        return DiskError(f'{layer.filename}: can\'t be changed: {who} has it open',
                         'stop the machine first; what works live, its own harddrives can do')

    def _explicit(self) -> str:
        """Return a name for qemu-img that leaves it nothing to find out by itself."""
        return 'json:' + json.dumps(self.blockdev('image', lambda path, _: path))

    def check(self) -> None:
        """Raise DiskError unless the image, and what it stands on, are what was named."""
        if self.format == 'raw':                # whatever a guest has written into it
            return
        header = qcow2_header(self.filename)
        if not header:
            what, remedy = foreign(self.filename)
            raise DiskError(f'{self.filename}: not a qcow2 image' + (what and f', but {what}'),
                            remedy or "say format='raw' if it is raw")
        self._check_usable(header)
        named = os.path.join(os.path.dirname(self.filename), header.backing or '')
        if header.backing and not (self.backing and os.path.realpath(named)
                                   == os.path.realpath(self.backing.filename)):
            raise DiskError(f'{self.filename}: its backing file {header.backing!r} was not named',
                            'say backing=, if it is yours: a guest can write such a name, too')
        if self.backing and not header.backing:
            raise DiskError(f'{self.filename}: has no backing file', 'leave out backing=')
        if self.backing:
            self.backing.check()

    def _check_usable(self, header: Header) -> None:
        """Raise DiskError for an image that QEMU would not take as it is."""
        path = shlex.quote(self.filename)
        for wrong, why, remedy in (
                (header.features & EXTERNAL_DATA, 'its data are in another file',
                 f'qemu-img convert -f qcow2 -O qcow2 {path} NEW.qcow2 makes one of its own'),
                (header.features & CORRUPT, 'is marked as corrupt: QEMU found it damaged',
                 f'copy it, then mend it: qemu-img check -f qcow2 -r all {path}'),
                (header.encrypted, 'is encrypted, and there is no way to give its key',
                 DECRYPT.format('qcow2', 'encrypt.key-secret=key').format(path))):
            if wrong:
                raise DiskError(f'{self.filename}: {why}', remedy)

    def in_use(self) -> bool:
        """Tell by its locks whether a QEMU has the image open, or writes to its base, and of a
        device whether the host itself uses it."""
        if self._is_device_in_use():
            return True
        for layer in self.chain():
            with open(open_file(layer.filename), 'rb') as image:
                if bytes_locked(image.fileno(), *(IMAGE_LOCKS if layer is self else WRITER_LOCK)):
                    return True
        return False

    def _is_device_in_use(self) -> bool:        # a QEMU's locks are on its node of the device
        return is_device(self.filename) and bool(holder_of(self.filename))

    @contextlib.contextmanager
    def _kept_free(self) -> Iterator[None]:
        """Hold QEMU's locks, so that none opens the image; DiskError if one has it open."""
        with open(open_file(self.filename, os.O_RDWR), 'r+b') as image:
            if not lock_bytes(image.fileno(), *IMAGE_LOCKS, Deadline(0)):
                raise self.taken()
            yield

    def _live(self) -> Attached | None:
        return self.attached if self.attached and self.attached.alive() else None

    def require_not_saved(self) -> None:
        """Raise WrongState when a machine's memory is saved, which goes with what is in it."""
        for name, _ in MACHINES_WITH[0](self.filename, True):
            raise WrongState(f'{self.filename}: {name} is saved, and its memory would not fit',
                             'start it first, or delete_saved() its memory')

    def _require_not_needed(self) -> None:
        """Raise WrongState when a machine is saved with it, or has a disk that stands on it."""
        self.require_not_saved()
        for name, depth in MACHINES_WITH[0](self.filename, False):
            if depth:
                raise WrongState(f'{self.filename}: the disk of machine {name} stands on it',
                                 'delete that machine first, or give it a disk of its own')

    def info(self) -> dict[str, Any]:
        """Return what qemu-img info says, also of a disk in use: virtual-size, actual-size ..."""
        self.check()
        printed = self._img('info', '-U', '--output=json', '-f', self.format, self.filename)
        try:
            return dict(checked('qemu-img info', parse_json(os.fsdecode(printed))))
        except ValueError as problem:
            raise DiskError(f'{self.filename}: {problem}') from None

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots that are in the image now: a QEMU that has it tells, else qemu-img."""
        live, image = self._live(), None
        if live:
            with contextlib.suppress(GuestError):       # one that hangs
                image = next((row['image'] for row in live.execute(
                    'query-named-block-nodes', flat=True) if row.get('node-name') == live.node),
                    None)
        return [Snapshot(row['name'], row['date-sec'], row['vm-state-size'], row['id'])
                for row in (image or self.info()).get('snapshots', [])]

    def found(self, tag: str) -> Snapshot:
        """Return the one snapshot of exactly this name, whoever made it."""
        rows = [row for row in self.snapshots if row.tag == tag]
        if len(rows) > 1:
            raise DiskError(f'{self.filename}: has {len(rows)} snapshots {tag}',
                            f'{shlex.join(["qemu-img", "snapshot", "-d", tag, self.filename])} '
                            'deletes the oldest of them')
        if not rows:
            raise DiskError(f'{self.filename}: has no snapshot {tag}', '.snapshots lists them')
        return rows[0]

    def snapshot(self, name: str = '') -> str:
        """Snapshot the disk, and return the snapshot's name (qemu-img snapshot -c; of a running
        machine blockdev-snapshot-internal-sync: as if the power had failed now)."""
        if self.format == 'raw':
            raise DiskError(f'{self.filename}: a raw image can\'t hold snapshots', 'use qcow2')
        taken = [row.tag for row in self.snapshots]
        tag = checked_tag(name or free_tag(taken))
        if tag in taken:
            raise DiskError(f'{self.filename}: has a snapshot {tag}', 'delete it or name another')
        live = self._live()
        if live:
            live.execute('blockdev-snapshot-internal-sync', device=live.node, name=tag)
        else:
            self._img('snapshot', '-q', '-c', tag, self._explicit())
        return tag

    def load_snapshot(self, name: str) -> None:
        """Put the disk back to a snapshot (qemu-img snapshot -a); not while in use, or while the
        machine that has it is saved."""
        self.require_not_saved()
        # Of id and name it takes the id first, so that the id is never another one's name.
        self._img('snapshot', '-q', '-a', self.found(name).id, self._explicit())

    def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot (qemu-img snapshot -d, blockdev-snapshot-delete-internal-sync)."""
        live, row = self._live(), self.found(name)
        if live:
            live.execute('blockdev-snapshot-delete-internal-sync', device=live.node, name=name,
                         id=row.id)
        else:                                           # this one takes names only
            self._img('snapshot', '-q', '-d', name, self._explicit())

    def wipe(self, snapshots_only: bool = False) -> None:
        """Make it empty (or what its backing image is), or only delete its snapshots.

        Its size, version, cluster size, rights and the like stay. A new image takes the place of
        the old one in one step. DiskError while it is in use, WrongState while the machine that has
        it is saved, or another one's disk stands on it.
        """
        check('snapshots_only', snapshots_only, a_bool, DiskError)
        self.check()
        if snapshots_only:
            for row in self.snapshots:
                self._img('snapshot', '-q', '-d', row.tag, self._explicit())
            return
        self._require_not_needed()
        if not os.path.isfile(self.filename):           # a device's node must stay one
            raise DiskError(f'{self.filename}: is no file', 'wipe a block device by blkdiscard')
        info = self.info()
        told = info.get('format-specific', {}).get('data', {})
        kind = [f'cluster_size={info.get("cluster-size")}', *(
            f'{key.replace("-", "_")}={str(told[key]).lower()}'
            for key in KEPT_BY_WIPE if key in told)]
        with self._kept_free():
            self._write(info['virtual-size'], *('-o', ','.join(kind)) * (self.format == 'qcow2'),
                        replace=True)

    def resize(self, size: float, shrink: bool = False) -> None:
        """Give it a new size in GiB, less only with `shrink` (block_resize, qemu-img resize)."""
        check('shrink', shrink, a_bool, DiskError)
        wanted, now = self._bytes(size), self.info()['virtual-size']
        if wanted < now and not shrink:
            raise DiskError(f'{self.filename}: {wanted} bytes are less than its {now}',
                            'shrink=True cuts off what is behind; shrink the file system first')
        if wanted < now:
            self._require_not_needed()
        live = self._live()
        if live:
            live.execute('block_resize', node_name=live.node, size=wanted)
        else:
            self._img('resize', '-q', *['--shrink'] * shrink, self._explicit(), str(wanted))

    def chain(self) -> list[Harddrive]:
        """Return the image and those it stands on."""
        return [self, *(self.backing.chain() if self.backing else ())]

    def blockdev(self, node: str, name: Callable[[str, bool], str], top: bool = True
                 ) -> dict[str, Any]:
        """Return its BlockdevOptions; `name` gives QEMU's path for (path, is written to)."""
        told: dict[str, Any] = {
            'node-name': node, 'driver': self.format, 'read-only': not top,
            'file': {'node-name': f'{node}-file', 'driver': file_driver(self.filename),
                     'read-only': not top, 'filename': name(self.filename, top)}}
        if top:
            told.update({'discard': 'unmap'})
        if self.format == 'qcow2':
            # null: what a header says about a backing file counts for nothing.
            told['backing'] = self.backing.blockdev(f'{node}-b', name, False) \
                if self.backing else None
        return told

    @property
    def qemu_string(self) -> str:
        """The options for QEMU's command line that give a machine this disk."""
        id = f'disk-{hashlib.sha256(os.fsencode(self.filename)).hexdigest()[:8]}'
        return shlex.join([
            '-blockdev', json.dumps(self.blockdev(f'{id}-node', lambda path, _: path)),
            '-device', f'virtio-blk-pci,id={id},drive={id}-node'])


def base_image(filename: str | os.PathLike[str]) -> Harddrive:
    """Return an image that others made, qcow2 or raw as its header says, for a thin copy; what is
    compressed by xz is unpacked beside it, once."""
    path = readable(filename)
    if image_at(path, 0)[0].startswith(XZ):
        packed, path = path, path[:-3] if path.endswith('.xz') else f'{path}.unpacked'
        if not os.path.exists(path):
            made_once(path, _unpack, packed, path)
        elif os.stat(packed).st_mtime > os.stat(path).st_mtime:
            log.warning('%s is older than %s, and used as it is; remove it to have that unpacked',
                        path, packed)
        require_not_planted(path, packed)
    form = 'qcow2' if qcow2_header(path) else 'raw'
    what, remedy = foreign(path) if form == 'raw' else ('', '')
    if what:
        raise DiskError(f'{path}: not a disk image, but {what}', remedy)
    return Harddrive(path, format=form)


def require_not_planted(path: str, image: str) -> None:
    """Raise DiskError for what goes with an image, and was not named, if it is_planted()."""
    if is_planted(path, image):
        raise DiskError(f'{path}: is of the user {os.lstat(path).st_uid}, who can have written '
                        'anything into it', 'remove it, and put the image where nobody else may '
                        'write')


def _unpack(packed: str, path: str) -> None:
    import lzma
    with whole_file(path, lasting=True) as file:        # it counts for ever, once it has its name
        try:
            with lzma.open(packed) as source, open(file, 'wb', closefd=False) as target:
                shutil.copyfileobj(source, target, MIB)
        except (lzma.LZMAError, EOFError) as problem:
            raise DiskError(f'{packed}: {problem}', 'download it again') from None
        except OSError as problem:
            raise write_error(path, problem) from None


@contextlib.contextmanager
def put_back_on_failure(drives: Sequence[Harddrive]) -> Iterator[None]:
    """Have disks hold again what they held before when the block fails, by snapshots of them that
    are made first. A QEMU that still has them then has not touched them."""
    tag = free_tag([row.tag for drive in drives for row in drive.snapshots], 'before-load-')
    snapshot_all(drives, tag)
    try:
        yield
    except BaseException as problem:
        back = [drive for drive in drives if not drive.in_use()]
        for drive in back:
            try:
                drive.load_snapshot(tag)
            except Error as failed:
                raise DiskError(f'{problem}; {failed}', f'what {drive.filename} held before is in '
                                f'its snapshot {tag}') from None
        if back and isinstance(problem, Error):
            problem.hint = '; '.join(filter(None, [
                'the disks were put back to what they held before', problem.hint]))
        for drive in drives:
            drive.delete_snapshot(tag)
        raise
    for drive in drives:
        drive.delete_snapshot(tag)


def snapshot_all(drives: Sequence[Harddrive], tag: str) -> None:
    """Snapshot all disks, or none."""
    with contextlib.ExitStack() as on_failure:
        for drive in drives:
            drive.snapshot(tag)
            on_failure.callback(drive.delete_snapshot, tag)
        on_failure.pop_all()


def login(user: str, ssh_key: str | os.PathLike[str]) -> str:
    """Return the user-data that lets somebody in by an SSH key, which is text or a file's: a new
    `user` who may do all by sudo, or the one that the image has."""
    if user and not (isinstance(user, str) and LOGIN.fullmatch(user)):
        raise MachineError(f'user {user!r:.80}: can\'t be the name of one who logs in',
                           'use a letter, then up to 31 letters, digits, ".", "_", "-"')
    text = ssh_key.strip() if isinstance(ssh_key, str) else image_path(ssh_key)
    if not SSH_KEY.fullmatch(text) and '\n' not in text:
        with open(open_file(image_path(os.path.expanduser(text))), encoding='utf-8',
                  errors='replace') as file:
            text = file.read(JSON_BYTES).strip()
    if not SSH_KEY.fullmatch(text):
        raise DiskError('ssh_key: is no public key', 'give the file .pub, or the one line in it')
    keys: dict[str, Any] = {'ssh_authorized_keys': [text]}
    return '#cloud-config\n' + json.dumps({'users': [{
        'name': user, 'shell': '/bin/bash', 'sudo': 'ALL=(ALL) NOPASSWD:ALL', **keys}]}
        if user else keys)


def own_data(text: str) -> str:
    """Return user-data that somebody has written, if cloud-init takes it."""
    if not isinstance(text, str) or not USER_DATA.match(text):
        raise MachineError(f'user_data {text!r:.80}: cloud-init would not know what it is',
                           'give the text itself, which begins with a line such as #cloud-config')
    return text


class Tray(NamedTuple):
    """The state of a CD drive (query-block)."""

    open: bool
    locked: bool                # by the guest
    medium: bool                # there is one in the drive


class CD:
    """A CD drive and the ISO image in it, if any; the image is only ever read.

    One that was put into a machine's drive speaks of that drive as long as it is in there.
    """

    def __init__(self, filename: str | os.PathLike[str] | None = None) -> None:
        self.filename = readable(filename) if filename else ''
        if self.filename:
            warn_of_foreign(self.filename, 'a CD')
        self.attached: Attached | None = None       # its place in the machine whose drive it is
        self.drive: CD | None = None                # the drive that insert() put it into

    def __repr__(self) -> str:
        return f'CD({self.filename!r})'

    def _live(self) -> Attached | None:
        return self.attached if self.attached and self.attached.alive() else None

    def _in(self) -> CD:
        """Return the drive that it is in: itself, if it was not put into another one."""
        if self.drive and self.drive.filename != self.filename:
            raise DiskError(f'{self.filename}: is not in the drive any more',
                            f'{self.drive.filename or "nothing"} is')
        return self.drive or self

    @property
    def tray(self) -> Tray:
        """Whether the tray is open, locked by the guest, and has a medium (query-block)."""
        if self.drive:
            return self._in().tray
        live = self._live()
        if live:
            with contextlib.suppress(WrongState):       # it has just ended
                drive = next(row for row in live.execute('query-block')
                             if row.get('qdev') == live.id)
                return Tray(bool(drive.get('tray_open')), drive['locked'], 'inserted' in drive)
        return Tray(False, False, bool(self.filename))

    def _ask(self, live: Attached, command: str, force: bool, **arguments: Any) -> None:
        """Carry out what a guest that has locked the tray may refuse."""
        before = self.tray
        try:
            live.execute(command, id=live.id, force=force, **arguments)
        except QemuRefused:
            if before.open or not before.locked:
                raise
            raise DiskError(f'{self.filename}: the guest has locked the tray',
                            'unmount it in the guest, or use force=True') from None

    def eject(self, force: bool = False) -> None:
        """Take the medium out (QMP eject). A guest that has locked the tray is asked to open it,
        and DiskError is raised, unless `force`."""
        if self.drive:
            self._in().eject(force)
            self.drive = None
            return
        live = self._live()
        if live:
            self._ask(live, 'eject', force)
            if self.tray.medium:
                raise DiskError(f'{self.filename}: is still in the drive', 'use force=True')
        self._holds('')

    def _holds(self, medium: str) -> None:
        self.filename = medium
        if self.attached:
            self.attached.keep(medium)

    def insert(self, other: CD | str | os.PathLike[str], force: bool = False) -> None:
        """Put another image in (blockdev-change-medium); the old one stays in if that fails."""
        if self.drive:
            self._in().insert(other, force)
            return
        new = CD(other.filename if isinstance(other, CD) else other)
        live = self._live()
        if live and new.filename:
            self._ask(live, 'blockdev-change-medium', force, medium=new.filename, format='raw',
                      read_only_mode='read-only')
        elif live:
            self.eject(force)
        self._holds(new.filename)
        if isinstance(other, CD) and not other.attached:
            other.drive = self

    @classmethod
    def seed(cls, user_data: str, meta_data: str = '', filename: str | os.PathLike[str]
             = 'seed.iso', network_config: str = '') -> CD:
        """Make a cloud-init NoCloud image in a new file (xorriso, genisoimage or mkisofs)."""
        path = image_path(filename)
        try:
            files = {'user-data': raw_bytes(user_data), 'meta-data': raw_bytes(meta_data),
                     **({'network-config': raw_bytes(network_config)} if network_config else {})}
        except (TypeError, ValueError):
            raise DiskError(f'{path}: user_data, meta_data or network_config is no text',
                            'give strings') from None
        maker = next((maker for maker in ISO_MAKERS if which(maker[0])), None)
        if not maker:
            raise DiskError(f'{path}: no program to make it with', 'install xorriso or genisoimage')
        with contextlib.ExitStack() as kept:
            try:
                place = kept.enter_context(tempfile.TemporaryDirectory(prefix='vmmonitor-'))
                for name, data in files.items():
                    Path(place, name).write_bytes(data)
            except OSError as problem:
                raise DiskError(f'{path}: can\'t be made: {explain(problem)}',
                                'make space there, or set TMPDIR to another directory') from None
            made = run([*maker, '-quiet', '-volid', 'cidata', '-joliet', '-rock', place],
                       IMAGE_TIMEOUT)
        write_whole(path, made.stdout)
        return cls(path)

    @property
    def qemu_string(self) -> str:
        """The options for QEMU's command line that give a machine this CD."""
        medium = {'node-name': 'cd0-node', 'driver': 'raw', 'read-only': True,
                  'file': {'driver': file_driver(self.filename), 'filename': self.filename}}
        return shlex.join([
            *(('-blockdev', json.dumps(medium)) if self.filename else ()),
            '-device', 'virtio-scsi-pci,id=scsi0', '-device',
            'scsi-cd,id=cd0,bus=scsi0.0' + (',drive=cd0-node' if self.filename else '')])


# === spec =======================================================================================
# A machine is a directory of root's, HOME. What it is stands in HOME/machine.json, which one thread
# of one program at a time changes, on what it says at that moment.

MACHINES_DIR = os.environ.get('VMMONITOR_MACHINES') or (
    '/var/lib/vmmonitor/machines' if os.geteuid() == 0 else
    os.path.expanduser('~/.local/state/vmmonitor/machines'))
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,62}')
SPEC_VERSION = 3                # of machine.json
VIRTIO_PORTS = 31               # of the virtio serial device, the agent's among them
PORTS_MAX = 15 * 8              # root ports of PCI
HOME_LENGTH = 88                # of HOME's path: a unix socket's has 107 bytes at most


class Model(NamedTuple):
    """What a device is to its guest."""

    driver: str                 # QEMU's
    port: str                   # the name, without its number, of what it sits on


# kind of device -> the names of what it can be
MODELS: dict[str, dict[str, Model]] = {
    'disk': {'virtio': Model('virtio-blk-pci', 'rp'), 'scsi': Model('scsi-hd', 'scsi'),
             'sata': Model('ide-hd', 'ide'), 'nvme': Model('nvme', 'rp'),
             'usb': Model('usb-storage', 'usb')},
    'cd': {'scsi': Model('scsi-cd', 'scsi'), 'sata': Model('ide-cd', 'ide')},
    'nic': {'virtio': Model('virtio-net-pci', 'rp'), **{name: Model(name, 'rp') for name in (
        'e1000', 'e1000e', 'igb', 'rtl8139', 'vmxnet3', 'pcnet', 'ne2k_pci')}},
    'dimm': {'': Model('pc-dimm', '')}, 'chardev': {'': Model('virtserialport', 'nr')}}
VIDEO = {name: Model(driver, 'pcie') for name, driver in {
    'std': 'VGA', 'virtio': 'virtio-vga', 'qxl': 'qxl-vga', 'vmware': 'vmware-svga',
    'cirrus': 'cirrus-vga', 'bochs': 'bochs-display', 'none': ''}.items()}
# name of a port without its number -> the numbers (the first of virtio serial are console and
# agent, that of USB is the pointer; of PCI's root ports each machine has some), and how device_add
# is told of one
PORTS_OF: dict[str, tuple[range, Callable[[int], dict[str, Any]]]] = {
    'rp': (range(PORTS_MAX), lambda n: {'bus': f'rp{n}'}),
    'nr': (range(2, VIRTIO_PORTS), lambda n: {'bus': 'serial.0', 'nr': n}),
    'ide': (range(6), lambda n: {'bus': f'ide.{n}'}),
    'scsi': (range(256), lambda n: {'bus': 'scsi.0', 'scsi-id': n}),
    'usb': (range(2, 5), lambda n: {'bus': 'usb.0', 'port': str(n)})}
# Firmware and the variables that a machine begins with, in each distribution's place: those for
# secure boot have Microsoft's keys, by which distributions' boot loaders are signed.
OVMF: dict[str, tuple[tuple[str, str], ...]] = {'bios': (), 'uefi': (
        ('/usr/share/OVMF/OVMF_CODE_4M.fd', '/usr/share/OVMF/OVMF_VARS_4M.fd'),
        ('/usr/share/OVMF/OVMF_CODE.fd', '/usr/share/OVMF/OVMF_VARS.fd'),
        ('/usr/share/edk2/ovmf/OVMF_CODE.fd', '/usr/share/edk2/ovmf/OVMF_VARS.fd'),
        ('/usr/share/edk2/x64/OVMF_CODE.4m.fd', '/usr/share/edk2/x64/OVMF_VARS.4m.fd')),
    'uefi-secure': (
        ('/usr/share/OVMF/OVMF_CODE_4M.secboot.fd', '/usr/share/OVMF/OVMF_VARS_4M.ms.fd'),
        ('/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd', '/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd'))}
# member of MachineSpec -> the names that it can have
CHOICES: dict[str, Mapping[str, Any]] = {'firmware': OVMF, 'video': VIDEO,
                                         'nic_model': MODELS['nic'], 'disk_bus': MODELS['disk']}
FACTS: dict[str, Any] = {       # what machine.json says of each kind of device
    'disk': {'chain': [[str]], 'model': str}, 'cd': {'chain': [[str]], 'model': str},
    'dimm': {'mib': int}, 'chardev': {'type': str, 'name': str},
    'nic': {'name': str, 'namespace': str, 'mac': str, 'up': bool, 'own': bool, 'mtu?': int,
            'moved_mac?': str, 'forwards?': [str], 'model': str}}
SCHEMAS['device'] = {'id': str, 'kind': str, 'bus?': str, 'boot?': int, 'pending?': bool,
                     'facts': dict}
SCHEMAS['machine.json'] = {
    'version': int, 'name': str, 'uuid': str, 'type': str, 'memory': int, 'cpus': int,
    'maxmemory': int, 'namespace': str, 'accel': str, 'kernel': str, 'initrd': str,
    'cmdline': DATA, 'display': str, 'monitor_port': (int, None), 'uid': int, 'ports': int,
    'memory_at': str, 'memory_place': str, 'cpu': str, 'processor': str,
    **dict.fromkeys(CHOICES, str), 'tpm': bool, 'args': [DATA],
    'devices': [SCHEMAS['device']], 'snapshots': {'*': [list]}, 'made': dict}


class MemoryAt(enum.Enum):
    """Where a machine's guest is, that is its memory."""

    HERE = 'here'               # in its QEMU, if that runs
    SAVED = 'saved'             # in the file `memory_place`, from which the next start restores it
    AWAITED = 'awaited'         # at another machine, from which it is to come
    GIVEN = 'given'             # at `memory_place`, which was told to run it: it must not run here
    LOST = 'lost'               # nowhere: a snapshot was loaded by half


def filled(kind: Callable[..., Result], known: Mapping[str, Any], own: Iterable[str]) -> Result:
    """Return a dataclass made of an object of the file; `more` gets what is not its `own`."""
    own = {key.rstrip('?') for key in own}
    return kind(**{key: known[key] for key in known.keys() & own},
                more={key: known[key] for key in known.keys() - own})


def spread(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of the file again, for dataclasses.asdict()."""
    values = dict(pairs)
    return {**values.pop('more'), **values}


@dataclasses.dataclass
class Facts:
    """What is kept of a device beyond what each has: the members that FACTS names for its kind."""

    chain: list[list[str]] = dataclasses.field(default_factory=list)    # file and format of an
    #                             image, then of those it stands on
    mib: int = 0
    type: str = ''              # pty, socket or file
    name: str = ''              # of a chardev, or of a VirtualNic; '' is QEMU's own NAT
    namespace: str = ''         # of that VirtualNic
    mac: str = ''
    up: bool = False            # the cable is plugged in
    own: bool = False           # the VirtualNic was made for this machine, and goes with it
    mtu: int = 0                # that the guest is told; 0: nothing, it takes 1500
    moved_mac: str = ''         # of a guest that was migrated here, which it keeps
    forwards: list[str] = dataclasses.field(default_factory=list)   # of a nic 'user', as given
    model: str = ''             # a name of MODELS
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def file(self) -> str:
        """The image of a disk, the medium in a CD drive; '' for none."""
        return self.chain[0][0] if self.chain else ''


@dataclasses.dataclass
class Device:
    """Something plugged into a machine, as its file keeps it."""

    id: str                     # disk0, cd0, nic0, dimm0, chardev0
    kind: str                   # a row of MODELS
    bus: str = ''               # the port that it sits on
    boot: int = 0               # its place in the boot order, from 1; 0: is not booted from
    pending: bool = False       # the guest has been asked to let it go, and has not
    facts: Facts = dataclasses.field(default_factory=Facts)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def shape(self) -> list[Any]:
        """Return what a snapshot's guest would miss, if it were different."""
        return [self.id, self.kind, self.bus, self.facts.mib or self.facts.mtu, self.facts.model]

    @property
    def model(self) -> Model:
        """What it is to the guest."""
        return MODELS[self.kind][self.facts.model]

    def place(self) -> dict[str, Any]:
        """Return the arguments of device_add that say which port it is in."""
        stem = self.model.port
        return PORTS_OF[stem][1](int(self.bus[len(stem):])) if stem else {}


@dataclasses.dataclass
class MachineSpec:
    """What is kept of a machine in its file, machine.json."""

    name: str
    uuid: str
    type: str                   # versioned, such as pc-q35-7.2: a newer QEMU stays compatible
    memory: int                 # MiB
    cpus: int
    maxmemory: int              # MiB, 0: no room for more
    namespace: str              # '' for the host's
    firmware: str               # bios, uefi or uefi-secure
    accel: str
    kernel: str
    initrd: str
    cmdline: str
    display: str                # '' or vnc
    monitor_port: int | None
    uid: int                    # that QEMU runs as
    ports: int
    memory_at: MemoryAt = MemoryAt.HERE
    memory_place: str = ''
    devices: list[Device] = dataclasses.field(default_factory=list)
    snapshots: dict[str, list[Any]] = dataclasses.field(default_factory=dict)   # tag -> shape()
    cpu: str = 'auto'           # or as QEMU takes it
    processor: str = ''         # what that was at the last start
    nic_model: str = 'virtio'   # of cards, and ...
    disk_bus: str = 'virtio'    # ... of disks, that are added
    video: str = 'std'
    tpm: bool = False
    args: list[str] = dataclasses.field(default_factory=list)   # more of QEMU's command line
    made: dict[str, Any] = dataclasses.field(default_factory=dict)      # the arguments of Machine()
    #                             that it was made with, but for defaults
    version: int = SPEC_VERSION
    more: dict[str, Any] = dataclasses.field(default_factory=dict)  # members that are not ours

    def check_fits(self, other: Sequence[Any], why: str, hint: str = '',
                   mine: Sequence[Any] = ()) -> None:
        """Raise MachineError unless a memory image of a machine of that shape fits this one."""
        mine = mine or self.shape()
        here, there = ([row for row in a if row not in b] for a, b in ((mine, other),
                                                                       (other, mine)))
        if here or there:
            raise MachineError(f'{self.name}: {why}: it has {clip(str(there or "nothing"))} where '
                               f'this one has {here or "nothing"}',
                               '; '.join(filter(None, [
                                   'add or remove devices until they are the same', hint])))

    def cpu_option(self, accel: str) -> str:
        """Return the processor for QEMU; its default is too old for distributions of today."""
        return self.cpu if self.cpu != 'auto' else 'host' if accel == 'kvm' else 'max'

    def of_kind(self, kind: str) -> list[Device]:
        return [device for device in self.devices if device.kind == kind]

    def new_id(self, stem: str) -> str:
        """Return an id that no device has."""
        taken = {device.id for device in self.devices}
        return next(f'{stem}{n}' for n in itertools.count() if f'{stem}{n}' not in taken)

    def new(self, kind: str, model: str = '', **facts: Any) -> Device:
        """Return a new device of its kind, with a free port for it."""
        device = Device(self.new_id(kind), kind, facts=Facts(**facts, model=model))
        stem, taken = device.model.port, {row.bus for row in self.devices}
        if stem:
            ports = range(self.ports) if stem == 'rp' else PORTS_OF[stem][0]
            free = [f'{stem}{number}' for number in ports if f'{stem}{number}' not in taken]
            if not free:
                raise MachineError(f'{self.name}: all {len(ports)} ports for such a device are '
                                   'taken', 'remove one first, or take another disk_bus')
            device.bus = free[0]
        return device

    def ram(self) -> int:
        """Return the MiB of memory that it has, with what was plugged in."""
        return self.memory + sum(row.facts.mib for row in self.devices)

    def shape(self) -> list[Any]:
        """Return all that must be the same for a memory image to fit."""
        return [[self.type, self.memory, self.cpus, self.maxmemory, self.ports, self.firmware,
                 self.video, self.tpm, self.args], ['processor', self.processor],
                *sorted(device.shape() for device in self.devices)]

    @property
    def uefi(self) -> bool:
        """Whether it boots by UEFI."""
        return self.firmware != 'bios'

    @classmethod
    def read(cls, data: bytes, name: str) -> MachineSpec:
        """Return what the file of the machine `name` says; ValueError says what is wrong in it."""
        known, schema = parse_json(data, unique=True), SCHEMAS['machine.json']
        if not isinstance(known, dict):
            raise ValueError('it is no JSON object')
        if known.get('version') != SPEC_VERSION:
            raise ValueError(f'it is of version {known.get("version")!r:.40}, and this vmmonitor '
                             f'knows {SPEC_VERSION}: use the one that wrote it, or make a new '
                             'machine of its disks')
        for key, inner in schema.items():
            if not matches(known, {key: inner}):
                raise ValueError(f'"{key.rstrip("?")}" is '
                                 f'{clip(repr(known.get(key.rstrip("?"), "missing")), 80)}')
        for row in known['devices']:
            facts, kind = row['facts'], row['kind']
            model = MODELS.get(kind, {}).get(str(facts.get('model', '')))
            if not model or not matches(facts, FACTS[kind]) \
                    or 'chain' in FACTS[kind] and any(len(layer) != 2 for layer in facts['chain']) \
                    or not re.fullmatch(f'{model.port}[0-9]{{1,3}}' if model.port else '',
                                        row.get('bus', '')):
                raise ValueError(f'the device {row["id"]!r:.40} is {row!r:.80}')
        for key, choices in CHOICES.items():
            if known[key] not in choices:
                raise ValueError(f'"{key}" is {known[key]!r:.80}')
        if known['name'] != name:
            raise ValueError(f'it is the file of the machine {known["name"]!r:.80}')
        known['memory_at'] = MemoryAt(known['memory_at'])
        known['devices'] = [filled(Device, {
            **row, 'facts': filled(Facts, row['facts'], FACTS[row['kind']])}, SCHEMAS['device'])
            for row in known['devices']]
        return filled(cls, known, schema)

    def json(self) -> bytes:
        values = dataclasses.asdict(self, dict_factory=spread)
        for row, device in zip(values['devices'], self.devices):
            own = FACTS[device.kind]
            row['facts'] = {**device.facts.more, **{
                key: value for key, value in dataclasses.asdict(device.facts).items()
                if key in own or value and f'{key}?' in own}}
        return json.dumps({**values, 'memory_at': self.memory_at.value}, indent=1).encode()


def of_part(path: str, doc: str = "What the machine's file says, as far as is known here.") -> Any:
    """Return a property that is one of a part's, such as 'file.spec'."""
    return property(operator.attrgetter(path), doc=doc)


class MachineFile:
    """HOME and its machine.json; `spec` is what that says, as far as is known here."""

    def __init__(self, home: str, spec: MachineSpec) -> None:
        self.home, self.spec = home, spec
        self.name, self.uuid = spec.name, spec.uuid
        self._changing = threading.Lock()   # held while `spec` is ahead of the file, or is replaced

    @classmethod
    def open(cls, name: str) -> MachineFile:
        """Return the file of the machine `name`; NoGuest, or MachineError if it is damaged."""
        home = os.path.join(MACHINES_DIR, name)
        return cls(home, cls.read(home))

    @staticmethod
    def read(home: str) -> MachineSpec:
        path, name = os.path.join(home, 'machine.json'), os.path.basename(home)
        try:
            data = read_own(path)
        except (FileNotFoundError, NotADirectoryError):
            raise NoGuest(f'{path}: no such machine',
                          'list shows them; "up" makes those of a lab') from None
        except OSError as problem:
            raise MachineError(f'{path}: can\'t be read: {explain(problem)}',
                               'see that it is a file, yours or root\'s, and that you may read it'
                               ) from None
        try:
            return MachineSpec.read(data, name)
        except (ValueError, RecursionError) as problem:
            raise DamagedFile(path, name, str(problem)) from None

    def path(self, name: str) -> str:
        return os.path.join(self.home, name)

    def now(self) -> MachineSpec:
        """Return what the file says at this moment; NoGuest when the machine was deleted."""
        spec = self.read(self.home)
        if spec.uuid != self.uuid:
            raise NoGuest(f'machine {self.name} was deleted, and another one made of that name',
                          f'Machine.load({self.name!r}) takes that one')
        return spec

    def refresh(self) -> MachineSpec:
        """See what other programs have changed, unless a thread of ours is changing it now."""
        if self._changing.acquire(blocking=False):
            try:
                self.spec = self.now()
            finally:
                self._changing.release()
        return self.spec

    def write(self) -> None:
        """Write what `spec` says, and a copy for Machine.load(name, repair=True); MachineError,
        and nothing is written, if it could not be read again."""
        data = self.spec.json()
        try:
            MachineSpec.read(data, self.name)
        except ValueError as problem:
            raise MachineError(f'{self.name}: can\'t be kept like that: {problem}') from None
        for path in (self.path('machine.json'), self.path('machine.json.copy')):
            with contextlib.suppress(OSError):
                if Path(path).read_bytes() == data:
                    continue
            first = not path.endswith('.copy')
            try:
                write_whole(path, data, replace=True, lasting=first)
            except FileError as problem:        # such as a full disk: nothing has changed ...
                if first:
                    raise
                # ... or all that counts has: the copy does where the first was damaged later.
                log.warning('%s', explain(problem))

    def move_memory(self, at: MemoryAt, place: str = '') -> None:
        """Write down where the guest is from now on."""
        self.spec.memory_at, self.spec.memory_place = at, place
        self.write()

    @contextlib.contextmanager
    def held(self) -> Iterator[MachineSpec]:
        """Have the machine to oneself, as its file is now; Busy after BUSY_TIMEOUT."""
        deadline = Deadline(BUSY_TIMEOUT)
        with self.one_of('change', 1, deadline):
            if not self._changing.acquire(timeout=deadline.left() + STATE_POLL):
                raise self.busy('change')
            try:
                for left in Path(self.home).glob(f'{DRAFT}*'):      # of a program that was killed
                    remove_file(str(left))      # the daemon may just have made one whole
                self.spec = self.now()
                yield self.spec
            finally:
                self._changing.release()

    @contextlib.contextmanager
    def change(self) -> Iterator[MachineSpec]:
        """Have the machine to oneself, and write what `spec` is made to say."""
        with self.held():
            yield self.spec
            self.write()

    def busy(self, what: str) -> Busy:
        """Return the error for a lock that somebody has for too long."""
        return Busy(f'{self.name}: "{what}" is in use by another program or thread', 'try later')

    @contextlib.contextmanager
    def one_of(self, what: str, count: int, deadline: Deadline) -> Iterator[int]:
        """Hold one of `count` locks `what`, among all threads and programs, and lend its number."""
        with contextlib.ExitStack() as opened:
            locks: list[int] = []
            for number in range(count):
                try:
                    locks.append(os.open(self.path(f'{what}{number}.lock'),
                                         os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                except FileNotFoundError:
                    raise NoGuest(f'machine {self.name} was deleted') from None
                opened.callback(os.close, locks[-1])
            number = lock_one(locks, deadline)
            if number < 0:
                raise self.busy(what)
            yield number

    @classmethod
    def repair(cls, name: str) -> MachineFile:
        """Put the copy of the last change back where a damaged file is, which is kept beside it."""
        with contextlib.suppress(DamagedFile):
            return cls.open(name)
        home = os.path.join(MACHINES_DIR, name)
        path = os.path.join(home, 'machine.json')
        try:
            spec = MachineSpec.read(read_own(f'{path}.copy'), name)
        except (OSError, ValueError) as problem:
            raise MachineError(
                f'{path}: there is no copy to put back: {explain(problem)}',
                'make the machine anew of its disks, which stay where they are, when '
                f'machines.find({name!r}).delete() has forgotten this one') from None
        remove_file(f'{path}.damaged')
        os.link(path, f'{path}.damaged')
        write_whole(path, spec.json(), replace=True)    # without one, nobody knows of the machine
        return cls(home, spec)

    def forget(self) -> None:
        """Remove HOME with what this program makes in it, and say what is left."""
        left = False
        for entry in os.scandir(self.home):
            if entry.name in HOME_DIRECTORIES and entry.is_dir(follow_symlinks=False):
                # QEMU's user can have made it deeper than Python's rmtree() goes down.
                run(['rm', '-rf', '--', entry.path], IMAGE_TIMEOUT)
            elif HOME_FILES.fullmatch(entry.name):
                os.unlink(entry.path)
            else:
                left = True
                log.warning('%s is not of this program, and stays', entry.path)
        if not left:
            os.rmdir(self.home)


HOME_DIRECTORIES = ('sockets', 'ports', 'vnc', 'tpm')
HOME_FILES = re.compile(r'machine\.json(\.copy|\.damaged)?|process\.json|qemu\.log(\.1)?|'
                        r'console\.log(\.1)?|(change|qmp|agent|console|capture)\d+\.lock|memory|'
                        r'efi-vars\.qcow2|screen-[0-9a-f]+|\.vmmonitor-.*')


# === qemu =======================================================================================
# QEMU runs as a user of its own, without a right to any path: files, sockets and logs are opened
# here, in directories of root's, and handed over as descriptors. A guest that has broken into its
# QEMU can write what it was given, and to HOME/vnc, in which root does nothing by name. Whether the
# machine lives is known from HOME/process.json alone, which QEMU can't reach.
# Every operation opens a session for itself, so that it sees no event from before it began.

QEMU = 'qemu-system-x86_64'
LAUNCHERS = QEMU, 'setpriv', 'ip'       # what its process is, one after another
SESSIONS = 4                    # operations at once; the daemon's events and a person's tool
#                                 have one more each
QMP_SOCKETS = (*(f'qmp{number}' for number in range(SESSIONS)), 'events', 'tool')
QEMU_START_TIMEOUT = 30.0       # until QEMU's greeting; 40 ms is usual
CONSOLE_BYTES = 16 * MIB        # of a console's log; the daemon begins a longer one anew
ITS_LOGS = 'console.log', 'qemu.log'    # that grow as long as QEMU runs
LAST_WORDS = 4096               # bytes at the end of qemu.log that are looked at
SANDBOX = 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny'
# Of root's environment, in which there may be secrets, what another user gets
ITS_ENVIRONMENT = ('PATH', 'LANG', 'LC_ALL', 'TZ', 'TMPDIR', 'LD_LIBRARY_PATH')
NO_PRIVILEGES = ('--inh-caps=-all', '--ambient-caps=-all', '--bounding-set=-all', '--no-new-privs')
FORWARD_HINT = 'another program has that port, or the host not that address: see ss -lntup'
# What stop() tries, from the kindest: (name, seconds until the next one)
STOP_STEPS = (('power button', 30.0), ('guest agent', 15.0), ('quit', 5.0), ('SIGTERM', 5.0),
              ('SIGKILL', 5.0))

JOB_TIMEOUT = 600.0             # for a snapshot, a dump, a saved state
CANCEL_TIMEOUT = 30.0           # for the end of one that was interrupted and can't be cancelled
WORK_POLL = STATE_POLL / 5      # between two looks at how far one is
DIMM_SLOTS = 16
# QEMU's RunState -> what people call it; what is not here is running
QEMU_STATES = {
    'paused': State.PAUSED, 'prelaunch': State.PAUSED, 'inmigrate': State.PAUSED,
    'postmigrate': State.PAUSED, 'finish-migrate': State.PAUSED, 'save-vm': State.PAUSED,
    'io-error': State.PAUSED, 'watchdog': State.PAUSED, 'suspended': State.ASLEEP,
    'shutdown': State.STOPPING, 'guest-panicked': State.CRASHED,
    'internal-error': State.CRASHED, 'restore-vm': State.CRASHED}
QEMU_REASONS = {'io-error': IO_ERROR, 'watchdog': WATCHDOG, 'guest-panicked': PANICKED,
                'internal-error': FAILED}

SCHEMAS.update({
    'add-fd': {'fdset-id': int, 'fd': int}, 'human-monitor-command': DATA,
    'query-chardev': [{'label': str, 'filename': str, 'frontend-open': bool}],
    'query-jobs': [{'id': str, 'status': str, 'error?': str}],
    'query-status': {'status': str}, 'query-version': {'qemu': {'major': int, 'minor': int}},
    'process.json': {'machine': str, 'uuid': str, 'boot': str, 'pid': int, 'started': str}})


def boot_id() -> str:
    return Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()


def options(head: str, values: Mapping[str, Any]) -> str:
    """Return QEMU's key=value form, with commas doubled; of a list, one for each."""
    def told(value: Any) -> str:
        return ('off', 'on')[value] if isinstance(value, bool) else str(value).replace(',', ',,')
    return ','.join([head, *(f'{key}={told(one)}' for key, value in values.items()
                             for one in (value if isinstance(value, list) else [value]))])


def listener(path: str) -> int:
    """Return the descriptor of a new listening unix socket, in a directory of root's."""
    remove_file(path)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)
        made.listen(4)
        return made.detach()


def closed_ways(path: str) -> list[str]:
    """Return the directories on the way to a file that QEMU's user can't come through."""
    closed = list[str]()
    for place in Path(path).parents:
        with contextlib.suppress(PermissionError):      # it is behind another one
            closed += [str(place)] * (not place.stat().st_mode & stat.S_IXOTH)
    return closed


def appended(path: str) -> int:
    """Return a descriptor by which QEMU can only add to a file in a directory of root's."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def kvm_opens(uid: int) -> bool:
    """Tell whether /dev/kvm opens, for us and for QEMU as the user `uid` in the device's group."""
    try:
        info = os.stat('/dev/kvm')
        os.close(os.open('/dev/kvm', os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return uid in (0, os.geteuid()) or info.st_mode & 0o006 == 0o006 or (
        info.st_mode & 0o060 == 0o060 and info.st_gid != 0)


def usable_accel(wanted: str, uid: int = 0) -> str:
    """Return kvm if wanted, or 'auto', and usable, else tcg; VMMONITOR_ACCEL overrides both."""
    for name in (wanted, os.environ.get('VMMONITOR_ACCEL') or wanted):
        if name not in ('auto', 'kvm', 'tcg'):
            raise MachineError(f'accelerator {name!r:.80}', 'use auto, kvm or tcg')
    if name == 'auto':
        return 'kvm' if kvm_opens(uid) else 'tcg'
    return name


def processor_of(spec: MachineSpec) -> str:
    """Return what tells the processor of the next start from others; of the host's own, which."""
    accel = usable_accel(spec.accel, spec.uid)
    cpu = spec.cpu_option(accel)
    own = None
    if accel == 'kvm' and cpu.split(',')[0] in ('host', 'max'):
        own = re.search(r'^model name\s*: (.*)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
    return f'{accel} {cpu}{f" ({clip(own[1])})" if own else ""}'


_told: dict[tuple[str, str, int], str] = {}     # what qemu_help() was told
_asking = threading.Lock()                      # guards it


def qemu_help(option: str) -> str:
    """Return what QEMU says to `OPTION help`; each QEMU is asked once, which takes it 0.1 s."""
    found = which(QEMU) or ''
    with _asking:
        key = option, found, os.stat(found).st_mtime_ns if found else 0
        if key not in _told:
            _told[key] = run([QEMU, option, 'help'], QMP_TIMEOUT).stdout.decode(errors='replace')
        return _told[key]


def require_hardware(spec: MachineSpec) -> None:
    """Raise MachineError unless this host has all that a machine needs."""
    if spec.uefi:
        firmware_files(spec.firmware)
    if spec.tpm and not which('swtpm'):
        raise MachineError(f'{spec.name}: no swtpm, for its TPM', 'install swtpm')
    shown = qemu_help('-device')
    for name in ('video', 'nic_model', 'disk_bus'):
        there = [key for key, model in CHOICES[name].items()
                 if f'"{model.driver}"' in shown or not model.driver]
        if getattr(spec, name) not in there:
            raise MachineError(f'{spec.name}: {name} {getattr(spec, name)}: not in this QEMU',
                               f'use {", ".join(there)}, or install a newer QEMU or, for qxl, '
                               'qemu-system-modules-spice')


def firmware_files(name: str) -> tuple[str, str]:
    """Return the files of a firmware: its code, and the variables that a machine begins with."""
    for pair in OVMF[name]:
        if all(map(os.path.exists, pair)):
            return pair
    raise MachineError(f'firmware {name}: not on this host', 'install ovmf')


class QemuCommand:
    """The command line of a QEMU to be, and the descriptors that it inherits."""

    def __init__(self) -> None:
        self.argv: list[str] = []
        self.fds: list[int] = []
        self.sets = 0

    def add(self, option: str, *words: str) -> None:
        self.argv += [option, *words]

    def named_fd(self, fd: int) -> str:
        """Have QEMU inherit a descriptor; ours is closed after the start."""
        self.fds.append(fd)
        return str(fd)

    def fdset(self, fd: int) -> str:
        """Have QEMU inherit a descriptor for where it takes a file (-add-fd)."""
        self.sets += 1
        self.add('-add-fd', f'fd={self.named_fd(fd)},set={self.sets}')
        return f'/dev/fdset/{self.sets}'

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


class QmpSession(contextlib.AbstractContextManager['QmpSession']):
    """One operation's QMP, whose errors are the machine's, in QEMU's words."""

    def __init__(self, qmp: QMP, error: Callable[[ProtocolError], GuestError]) -> None:
        self.qmp, self._error = qmp, error
        self._names: list[str] = []             # of descriptors, which their first use consumes
        self._sets: list[int] = []              # fdsets, to be removed at the end

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self.qmp, contextlib.suppress(GuestError):
            for number in self._sets:
                self.execute('remove-fd', fdset_id=number)
            for name in self._names if kind else ():
                with contextlib.suppress(QemuRefused):
                    self.execute('closefd', fdname=name)

    def execute(self, command: str, timeout: float = QMP_TIMEOUT, fds: Sequence[int] = (),
                **arguments: Any) -> Any:
        """Return what QEMU answers to `command`; `_` in argument names stands for `-`.

        Raises QemuRefused with QEMU's words, WrongState when it has ended, else MachineError.
        """
        try:
            return self.qmp.execute(command, timeout, fds, **arguments)
        except ProtocolError as problem:
            raise self._error(problem) from None

    def event(self, names: Iterable[str], timeout: float, **data: Any) -> dict[str, Any] | None:
        """Return the next event of these names (or any) and data; None if none comes."""
        try:
            return self.qmp.event(names, timeout, **data)
        except PeerSilent:
            return None
        except ProtocolError as problem:
            raise self._error(problem) from None

    def named_fd(self, fd: int) -> str:
        """Hand over a descriptor under a name (getfd)."""
        self._names.append(f'fd{fd}')
        self._give('getfd', fd, fdname=f'fd{fd}')
        return f'fd{fd}'

    def _give(self, command: str, fd: int, **arguments: Any) -> Any:
        try:
            return self.execute(command, fds=[fd], **arguments)
        finally:
            os.close(fd)

    def fdset(self, fd: int) -> str:
        """Hand over a descriptor for where QEMU takes a file, until the session's end (add-fd)."""
        self._sets.append(self._give('add-fd', fd)['fdset-id'])
        return f'/dev/fdset/{self._sets[-1]}'

    @contextlib.contextmanager
    def opened(self, fd: int, uid: int) -> Iterator[str]:
        """Hand over a file for where QEMU takes a path, but no fdset: by its own descriptor's name,
        by which only its owner, for that time QEMU's user, may open a file."""
        try:
            os.fchown(fd, uid, -1)
            told = self._give('add-fd', os.dup(fd))
            self._sets.append(told['fdset-id'])
            yield fd_path(told['fd'])
        finally:
            os.fchown(fd, os.geteuid(), -1)

    def stream(self, fd: int, access: int) -> str:
        """Return the URI by which QEMU migrates to or from a descriptor (`access`, as of open(2)).

        QEMU 11 takes no file by `fd:`, and 8.2 is the first to take one by `file:`; an fdset gives
        it a file only with just the access that it asks for.
        """
        try:
            told = self.execute('query-version')['qemu']
            if (told['major'], told['minor']) < (8, 2) or not stat.S_ISREG(os.fstat(fd).st_mode):
                return f'fd:{self.named_fd(os.dup(fd))}'
            return f'file:{self.fdset(os.open(fd_path(fd), access | os.O_CLOEXEC))}'
        finally:
            os.close(fd)


FdGiver = Union[QemuCommand, QmpSession]        # both take a descriptor, and close it here


class Progress(NamedTuple):
    """How far something is that QEMU does in the background."""

    over: bool
    error: str = ''
    done: int = 0               # bytes ...
    total: int = 0              # ... of so many


def follow(look: Callable[[float], Progress], timeout: float,
           progress: Callable[[int, int], object] | None = None,
           cancel: Callable[[], object] | None = None) -> str:
    """Wait for the end of what QEMU does in the background, and return its error or ''.

    `look` gets the seconds that its question may take. It goes on by itself: when it takes longer
    than `timeout` seconds, or on Ctrl-C, or an error of `progress`, it is told to `cancel`, if it
    can be, and its end is awaited.
    """
    seen, deadline = Progress(False), Deadline(timeout)

    def told() -> bool:
        nonlocal seen
        seen = look(max(deadline.left(), QMP_TIMEOUT))
        if progress and seen.total:
            progress(seen.done, seen.total)
        return seen.over
    try:
        deadline.poll(told, WORK_POLL)
    finally:
        if not seen.over:
            patience = QMP_TIMEOUT if cancel else CANCEL_TIMEOUT
            with contextlib.suppress(GuestError):
                if cancel:
                    cancel()
                Deadline(patience).poll(lambda: look(patience).over, WORK_POLL)
    return seen.error if seen.over else 'took too long'


class Qemu:
    """The QEMU process of a machine, if it runs one: what is known of it, and how to speak to it.

    HOME/process.json, which only root writes, names it by pid, start time and boot. It is written
    with pid 0 before the process is made, so that one whose maker was killed in between is looked
    for.
    """

    spec: MachineSpec = of_part('file.spec')

    def __init__(self, file: MachineFile) -> None:
        self.file, self.name = file, file.name

    def _record(self, pid: int) -> dict[str, Any]:
        known = {'machine': self.name, 'uuid': self.file.uuid, 'boot': boot_id(), 'pid': pid,
                 'started': process_start(pid)}
        write_whole(self.file.path('process.json'), json.dumps(known).encode(), replace=True,
                    lasting=False)                      # until the next boot
        return known

    def _known(self) -> dict[str, Any]:
        """Return what is written down of the process; of an unfinished record what is found."""
        known = nothing = {'pid': 0, 'started': ''}
        try:
            known = dict(checked('process.json', parse_json(
                read_own(self.file.path('process.json')))))
            if known['machine'] != self.name or known['boot'] != boot_id():
                return nothing                  # of the machine that this one was copied from
            if known['uuid'] != self.file.uuid:
                return nothing                  # of a later one of that name
        except FileNotFoundError:
            return nothing
        except (OSError, ValueError):
            pass
        found = 0 if known['pid'] else self._search()
        return self._record(found) if found else known

    def _search(self) -> int:
        """Return the pid of a QEMU with this machine's uuid, that runs as its user; 0 if none."""
        for pid in filter(str.isdecimal, os.listdir('/proc')):
            with contextlib.suppress(OSError, ValueError, IndexError):
                argv = Path('/proc', pid, 'cmdline').read_bytes().decode().split('\0')
                if argv[argv.index('-uuid') + 1] == self.file.uuid \
                        and argv[argv.index('-name') + 1] == f'guest={self.name}' \
                        and self._is_ours(pid) and process_start(int(pid)):
                    return int(pid)
        return 0

    def _is_ours(self, pid: str) -> bool:
        """Tell whether a process is its user's, or root's on the way to that: not a `su`, whose
        arguments anybody chooses."""
        users = process_users(pid)
        return users == {self.file.spec.uid} if users != {0} else os.readlink(
            f'/proc/{pid}/exe') in map(os.path.realpath, filter(None, map(which, LAUNCHERS)))

    def pid(self) -> int:
        """Return the process id of its QEMU, 0 if none runs."""
        known = self._known()
        return known['pid'] if process_start(known['pid']) == known['started'] != '' else 0

    def is_alive(self) -> bool:
        """Tell whether its QEMU runs, without asking it."""
        return self.pid() > 0

    def socket(self, name: str) -> str:
        return self.file.path(f'sockets/{name}')

    # Sessions

    @contextlib.contextmanager
    def session(self, timeout: float = 0) -> Iterator[QmpSession]:
        """Lend a QMP session with no event from before, for `with`; it is waited for.

        Raises WrongState when the machine is off, Busy, MachineError with QEMU's words.
        """
        deadline = Deadline(timeout or QMP_TIMEOUT)
        with self.file.one_of('qmp', SESSIONS, deadline) as number:
            if not self.is_alive():             # nor is a later one of that name meant
                self.file.now()
                raise WrongState(f'{self.name} is off{self.last_words()}', 'start it first')
            try:
                qmp = QMP(self.socket(f'qmp{number}'), max(deadline.left(), 0.1))
            except ProtocolError as problem:
                raise self._error(problem) from None
            with QmpSession(qmp, self._error) as session:
                yield session

    def _error(self, problem: ProtocolError) -> GuestError:
        if isinstance(problem, ReplyError):
            refused = QemuRefused(self.name, problem.code, problem.text)
            refused.hint = self._remedy(problem.text) or refused.hint
            return refused
        # Who hangs up is about to end, which takes a moment: all its memory is given back.
        if Deadline(QMP_TIMEOUT if isinstance(problem, PeerClosed) else 0).poll(
                lambda: not self.is_alive()):
            return WrongState(f'{self.name} is off{self.last_words()}', 'start it first')
        return MachineError(f'{self.name}: QEMU: {problem.message}', 'QEMU is stopped or overloaded'
                            if isinstance(problem, PeerSilent) else problem.hint)

    def _remedy(self, text: str) -> str:
        """Return what to do about a disk that QEMU can't have ('Failed to get "write" lock'), with
        who has it, or about a kernel that it may not read; '' for another text. Only a remedy is
        chosen by QEMU's words, which have one class for all of these."""
        for path in (self.file.spec.kernel, self.file.spec.initrd):
            if path and path in text and 'Permission denied' in text:
                ways = [f'chmod o+x {shlex.quote(place)}' for place in closed_ways(path)]
                return '; '.join([*ways, f'chmod o+r {shlex.quote(path)}']) + \
                    ': QEMU runs as a user of its own'
        if 'non-migratable' in text:
            return 'its memory can\'t be kept; that of disk_bus=\'nvme\' can with QEMU 11'
        if 'host forwarding rule' in text:
            return FORWARD_HINT
        if '" lock' not in text:
            return ''
        for path in (path for row in self.file.spec.devices for path, _ in row.facts.chain):
            holder = holder_of(path, self.pid())
            if holder:
                return f'{path}: {holder} has it open; stop that first'
        return 'another program has one of its disks open; stop that first'

    def qmp(self, /, command: str, **arguments: Any) -> Any:
        """Return what QEMU answers to a QMP command; `_` in names stands for `-`."""
        with self.session() as session:
            return session.execute(command, **arguments)

    def run_state(self) -> str:
        """Return QEMU's RunState (query-status)."""
        return str(self.qmp('query-status')['status'])

    def last_words(self) -> str:
        """Return ': ' and what QEMU wrote last, or ''."""
        with contextlib.suppress(OSError), open(self.file.path('qemu.log'), 'rb') as log_:
            log_.seek(max(0, log_.seek(0, os.SEEK_END) - LAST_WORDS))
            lines = [line for line in log_.read(LAST_WORDS).decode(errors='replace').splitlines()
                     if line.strip() and ': warning: ' not in line]     # which ends no QEMU
            return ''.join(f': {clip(line)}'.replace(f'{QEMU}: ', '') for line in lines[-3:])
        return ''

    # The process

    def start(self, command: QemuCommand) -> None:
        """Run QEMU, and wait for its greeting; MachineError with its own last words."""
        tpm: subprocess.Popen[bytes] | None = None
        try:
            self._record(0)
            remove_file(self.file.path('qemu.log'))
            if self.spec.tpm:
                tpm = self._start_tpm(command)
            process = self._run([QEMU, *command.argv], command.fds)
        except OSError as problem:
            if tpm:
                tpm.kill()
            os.unlink(self.file.path('process.json'))
            absent = isinstance(problem, FileNotFoundError) and PACKAGES.get(problem.filename)
            raise MachineError(f'{self.name}: can\'t start QEMU: {explain(problem)}',
                               f'install {absent}' if absent else '') from None
        finally:
            command.close()
        reaper = spawn(f'reap {self.name}', process.wait)
        try:
            self._record(process.pid)           # before anything can be done with it
            QMP(self.socket('qmp0'), QEMU_START_TIMEOUT).wire.close()
        except BaseException as problem:        # Ctrl-C, too: it must not run on
            reaper.join(QMP_TIMEOUT if isinstance(problem, PeerClosed) else 0)  # its last words
            process.kill()
            if tpm:
                tpm.kill()                      # it knows of no end of a QEMU that it never knew
            reaper.join(QMP_TIMEOUT)
            if not isinstance(problem, ProtocolError):
                raise
            why = self.last_words() or f': {problem.message}'
            raise MachineError(f'{self.name}: QEMU did not start{why}', self._remedy(why)
                               or f'see {self.file.path("qemu.log")}') from None

    def _run(self, argv: Sequence[str], fds: Sequence[int], cwd: str = '/'
             ) -> subprocess.Popen[bytes]:
        """Start a program that has no rights, and writes to qemu.log."""
        log_ = appended(self.file.path('qemu.log'))
        try:
            return subprocess.Popen([*self.wrapper(), *argv], stdin=subprocess.DEVNULL, stdout=log_,
                                    stderr=log_, cwd=cwd, start_new_session=True, pass_fds=fds,
                                    env={name: value for name, value in environment().items()
                                         if os.geteuid() or name in ITS_ENVIRONMENT})
        finally:
            os.close(log_)

    def _start_tpm(self, command: QemuCommand) -> subprocess.Popen[bytes]:
        """Start its TPM, a program that keeps its state in HOME/tpm, and ends with QEMU."""
        near, far = socket.socketpair()
        with far:
            command.add('-chardev', f'socket,id=tpm,fd={command.named_fd(near.detach())}')
            command.add('-tpmdev', 'emulator,id=tpm0,chardev=tpm')
            command.add('-device', 'tpm-crb,tpmdev=tpm0')
            tpm = self._run(['swtpm', 'socket', '--tpm2', '--terminate', '--tpmstate',
                             'dir=tpm,mode=0600', '--ctrl',     # a path might have a comma
                             f'type=unixio,clientfd={far.fileno()}'], [far.fileno()],
                            self.file.home)
        spawn(f'reap the TPM of {self.name}', tpm.wait)
        return tpm

    def end(self, *ways: tuple[str, float, Callable[[], bool]], patience: int = 2) -> str:
        """End it in one of these ways, (name, seconds, what to do), then by quit, SIGTERM and
        SIGKILL, or from STOP_STEPS[patience] on; return which it was, when it has ended."""
        pid = self.pid()
        try:
            process = os.pidfd_open(pid)
        except OSError as problem:
            if not self.is_alive():
                return 'already off'
            raise MachineError(f'{self.name}: can\'t be ended: {explain(problem)}', 'try later'
                               ) from None
        try:
            if self.pid() != pid:               # its number was given to another one meanwhile
                return 'already off'
            steps: list[tuple[str, float, Callable[[], bool]]] = [*ways, *(
                (name, seconds, functools.partial(self._push, name, process))
                for name, seconds in STOP_STEPS[patience:])]
            for name, seconds, push in steps:
                if push() and select.select([process], [], [], seconds)[0]:
                    return f'stopped by {name}'
        finally:
            os.close(process)
        raise MachineError(f'{self.name}: process {pid} does not end, not even by SIGKILL',
                           'its disk or network storage hangs: see dmesg')

    def _push(self, way: str, process: int) -> bool:
        """Have it end without its guest; tell whether to wait for it."""
        with contextlib.suppress(ProcessLookupError, GuestError):   # it may end before it answers
            if way == 'quit':
                with self.session(STOP_STEPS[2][1]) as session:
                    session.execute('quit')
            else:
                signal.pidfd_send_signal(process, getattr(signal, way))
        return True

    def status(self) -> Status:
        """Return what the machine is doing, and why (query-status)."""
        self.file.refresh()
        if not self.is_alive():
            return Status(State.SAVED if self.spec.memory_at is MemoryAt.SAVED else State.OFF)
        try:
            told = self.run_state()
        except WrongState:                      # it ended meanwhile, and may be saved
            return self.status()
        state = State.CRASHED if self.spec.memory_at is MemoryAt.LOST else QEMU_STATES.get(
            told, State.RUNNING)
        plain = state not in (State.PAUSED, State.CRASHED) or told in ('paused', 'running')
        return Status(state, '' if plain else QEMU_REASONS.get(told, told))

    def events(self, timeout: float) -> Iterator[dict[str, Any]]:
        """Yield QEMU's events as they come, until none came for `timeout` seconds."""
        with self.session() as session:
            yield from iter(lambda: session.event((), timeout), None)

    def job(self, command: str, **arguments: Any) -> None:
        """Carry out a command that is a job, whose answer says nothing of its end; while it writes
        or reads a guest's memory, QEMU answers nothing at all."""
        job = f'vmmonitor-{os.urandom(6).hex()}'

        def look(patience: float) -> Progress:
            row = {row['id']: row for row in qmp.execute('query-jobs', patience)}.get(job)
            return Progress(row['status'] == 'concluded', row.get('error', '')) if row else \
                Progress(True, 'somebody has dismissed it')
        with self.session(CANCEL_TIMEOUT) as qmp:
            for row in qmp.execute('query-jobs'):           # of a program that was killed
                if row['id'].startswith('vmmonitor-') and row['status'] == 'concluded':
                    qmp.execute('job-dismiss', id=row['id'])
            qmp.execute(command, JOB_TIMEOUT, job_id=job, **arguments)
            try:
                error = follow(look, JOB_TIMEOUT)
            finally:
                with contextlib.suppress(GuestError):
                    qmp.execute('job-dismiss', id=job)
        if error:
            raise MachineError(f'{self.name}: {command} {arguments.get("tag", "")}: {error}',
                               self._remedy(error))

    def wrapper(self) -> list[str]:
        """Return what runs QEMU in its namespace and as its user, with no rights at all."""
        # One that was made for its cards goes with the last of them.
        space, cards = self.spec.namespace, self.spec.of_kind('nic')
        argv = ['ip', 'netns', 'exec', space] if space and (cards or namespace_id(space)) else []
        uid = self.spec.uid
        if os.geteuid() == 0 and uid:
            kvm = usable_accel(self.spec.accel, uid) == 'kvm' and os.stat('/dev/kvm').st_gid
            argv += ['setpriv', f'--reuid={uid}', f'--regid={uid}', *NO_PRIVILEGES,
                     f'--groups={kvm}' if kvm else '--clear-groups', '--']
        return argv

    def compose(self, launch: QemuCommand) -> None:
        """Put together what the command line says of all but its devices."""
        spec, accel = self.spec, usable_accel(self.spec.accel, self.spec.uid)
        plain: tuple[tuple[str, ...], ...] = (
                ('-name', f'guest={spec.name}'), ('-uuid', spec.uuid), ('-no-user-config',),
                ('-nodefaults',), ('-accel', accel), ('-display', 'none'), ('-rtc', 'base=utc'),
                ('-cpu', spec.cpu_option(accel)), ('-smp', str(spec.cpus)),
                ('-sandbox', SANDBOX),
                ('-incoming', 'defer') if spec.memory_at in (MemoryAt.SAVED, MemoryAt.AWAITED)
                else (),
                ('-S',),
                ('-m', f'{spec.memory}M' + (f',slots={DIMM_SLOTS},maxmem={spec.maxmemory}M'
                                            if spec.maxmemory else '')),
                ('-kernel', spec.kernel) if spec.kernel else (),
                ('-initrd', spec.initrd) if spec.initrd else (),
                ('-append', spec.cmdline) if spec.cmdline else (),
                ('-vnc', f'unix:{self.file.path("vnc/vnc")}'.replace(',', ',,'))
                if spec.display == 'vnc' else (), tuple(spec.args))
        launch.argv += itertools.chain(*plain)
        self._compose_firmware(launch)
        self._compose_sockets(launch)

    def _compose_firmware(self, launch: QemuCommand) -> None:
        machine, firmware = self.spec.type, self.spec.firmware
        if self.spec.uefi:
            code, blank = firmware_files(firmware)
            own = os.path.join(self.file.home, 'efi-vars.qcow2')
            if not os.path.exists(own):
                with whole_file(own) as file:
                    run(['qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', blank, fd_path(file)],
                        IMAGE_TIMEOUT, keep=[file])
            try:
                Harddrive(own)                  # a QEMU that was broken into can write its header
            except DiskError as problem:
                problem.hint = f'remove it: {self.name} then begins with blank variables'
                raise
            for node, form, file in (
                    ('efi-code', 'raw', os.open(code, os.O_RDONLY | os.O_CLOEXEC)),
                    ('efi-vars', 'qcow2', os.open(own, os.O_RDWR | os.O_CLOEXEC))):
                launch.add('-blockdev', json.dumps({
                    'node-name': node, 'driver': form, 'read-only': node == 'efi-code',
                    'file': {'driver': 'file', 'filename': launch.fdset(file),
                             'read-only': node == 'efi-code'}}))
            machine += ',pflash0=efi-code,pflash1=efi-vars'
        if firmware == 'uefi-secure':           # the guest's system can't change its variables
            machine += ',smm=on'
            launch.add('-global', 'driver=cfi.pflash01,property=secure,value=on')
        launch.add('-machine', machine)

    def _compose_sockets(self, launch: QemuCommand) -> None:
        """Open the listening sockets here: no polling for them, and no right to make them."""
        for name in (*QMP_SOCKETS, 'agent', 'console'):
            path = self.file.path(f'sockets/{name}')
            more = {'logfile': launch.fdset(appended(self.file.path('console.log'))),
                    'logappend': True} if name == 'console' else {}
            launch.add('-chardev', options('socket', {
                'id': name, 'fd': launch.named_fd(listener(path)), 'server': True, 'wait': False,
                **more}))
        for name in QMP_SOCKETS:
            launch.add('-mon', f'chardev={name},mode=control')
        launch.add('-serial', 'chardev:console')
        if self.spec.monitor_port is not None:
            server = socket.create_server(('127.0.0.1', self.spec.monitor_port))
            self.spec.monitor_port = server.getsockname()[1]
            launch.add('-chardev', options('socket', {
                'id': 'hmp', 'fd': launch.named_fd(server.detach()), 'server': True,
                'wait': False}))
            launch.add('-mon', 'chardev=hmp,mode=readline')

    def require_savable(self) -> None:
        """Raise WrongState unless its memory can be kept; one asleep could not be woken."""
        self.require_not_saved()
        state = self.state()
        if state not in (State.RUNNING, State.PAUSED):
            raise WrongState(f'{self.name} is {state.value}: its memory can\'t be kept',
                             'start it first')
        self.require_not_given()

    def require_not_given(self) -> None:
        """Raise WrongState when its guest may run elsewhere by now."""
        if self.spec.memory_at is MemoryAt.GIVEN and self.is_alive():
            raise WrongState(
                f'{self.name} was told to run on {self.spec.memory_place}',
                'look there: if it does, stop(force=True) this one, else unfreeze(force=True) it')

    def require_not_saved(self) -> None:
        """Raise WrongState when its memory would not fit what it is about to become."""
        if self.spec.memory_at is MemoryAt.SAVED:
            raise WrongState(f'{self.name} is saved, and its memory would not fit',
                             'start it first, or delete_saved() its memory')

    def chardev(self, label: str) -> str:
        """Return what QEMU says of the other end of one of its own chardevs (query-chardev)."""
        found = {row['label']: str(row['filename']) for row in self.qmp('query-chardev')}
        if label not in found:
            raise MachineError(f'{self.name}: has no chardev {label!r:.80}',
                               f'it has {", ".join(sorted(found))}')
        return found[label]

    def has_live_guest(self) -> bool:
        """Tell whether it holds a guest that may run: not half of one that came from a file,
        another machine or a snapshot, nor one that has given up, nor one whose QEMU hangs."""
        with contextlib.suppress(GuestError):
            return self.state() is not State.CRASHED and self.spec.memory_at is MemoryAt.HERE
        return False

    def agent(self, command: str, arguments: Arguments = None,
              timeout: float = AGENT_TIMEOUT) -> Any:
        """Return what the guest agent answers, over a socket of its own."""
        if not self.is_alive():
            raise WrongState(f'{self.name} is off', 'start it first')
        with self.file.one_of('agent', 1, Deadline(timeout)):
            try:
                return GuestAgent(self.socket('agent'), self.name).execute(command, arguments,
                                                                             timeout)
            except AgentError as problem:
                opened = problem.trouble.name != 'silent' or self._agent_open(1.0)
                if opened is False:
                    raise agent_error(self.name, 'not connected') from None
                now = self.status() if opened and problem.trouble.name == 'silent' else None
                if now and now.state is not State.RUNNING:
                    raise WrongState(f'{self.name} is {now}', TROUBLES.get(
                        now.reason, 'start it')) from None
                raise

    def agent_state(self) -> str:
        """Return connected or disconnected: whether the guest has its port open."""
        return 'connected' if self._agent_open(QMP_TIMEOUT) else 'disconnected'

    def _agent_open(self, timeout: float) -> bool | None:
        """Tell whether the guest has the agent's port open; None if QEMU does not say."""
        with contextlib.suppress(GuestError), self.session(timeout) as qmp:
            return any(row['label'] == 'agent' and row['frontend-open']
                       for row in qmp.execute('query-chardev', timeout))
        return None

    def state(self) -> State:
        return self.status().state

    def wait(self, what: str = 'agent', timeout: float = 60.0) -> float:
        """Wait for a state (running, off, paused ...), or until its 'agent' answers; return the
        seconds that it took. MachineError when they are more than `timeout`."""
        began, states = time.monotonic(), [state.value for state in State]
        if what not in ('agent', *states):
            raise MachineError(f'{self.name}: wait({what!r:.80})',
                               f'wait for agent, {", ".join(states)}')

        def reached() -> bool:
            with contextlib.suppress(GuestError):
                if what != 'agent':
                    return self.state() is State(what)
                self.agent('guest-ping', timeout=1)
                return True
            return False
        if not Deadline(timeout).poll(reached, STATE_POLL / 4):
            raise MachineError(f'{self.name}: not "{what}" within {timeout:g} s, but '
                               f'{self.status()}{self.last_words()}')
        return time.monotonic() - began

    def wake_up(self) -> None:
        """Wake a guest that sleeps (system_wakeup)."""
        self.qmp('system_wakeup')
        Deadline(AWAKE_TIMEOUT).poll(lambda: self.state() is not State.ASLEEP)

    def trim_console(self) -> None:
        """Begin a log of CONSOLE_BYTES anew, and keep those: a guest may write for ever, and have
        QEMU warn for ever."""
        for path in map(self.file.path, ITS_LOGS):
            with contextlib.suppress(FileNotFoundError), open(path, 'r+b') as text:
                if text.seek(0, os.SEEK_END) >= CONSOLE_BYTES:
                    text.seek(-CONSOLE_BYTES, os.SEEK_END)
                    write_whole(f'{path}.1', text.read(CONSOLE_BYTES), replace=True)
                    text.truncate(0)


class Part:
    """A part of a machine that stands on its QEMU and its file."""

    spec: MachineSpec = of_part('file.spec')

    def __init__(self, qemu: Qemu) -> None:
        self.qemu, self.file, self.name = qemu, qemu.file, qemu.name


# === devices ====================================================================================
MAC = re.compile(r'[0-9a-f][02468ace](:[0-9a-f]{2}){5}')    # unicast
PORTS = 16                      # for disks and nics: root ports
SPARE_PORTS = 8                 # ... and at least this many are free at first
CD_DRIVES = 11                  # the host's: SCSI_CDROM_MAJOR of linux/major.h
ETH_P_ALL = 3                   # all frames (packet(7))
SOL_PACKET, PACKET_AUXDATA, TP_STATUS_VLAN_VALID = 263, 8, 0x10
CAPTURES = 8                    # of one machine at once
CAPTURE_BYTES = 1 << 18         # of a frame: what its network card segments itself comes whole
UNPLUG_TIMEOUT = 15.0           # Linux takes 0.2 s; without an operating system it never goes
UNPLUG_AGAIN = 6.0              # between two requests; a second one within 5 s could be taken for
#                                 a taking back, where a slot has a button
DIMM_MIB = 128                  # Linux on x86 takes memory in such blocks only
BALLOON_TIMEOUT = 30.0          # a guest gives back some 100 MiB/s when the host is busy
HOTPLUG_RAM = 512               # MiB; room for more turns on bounce buffers of 64 MiB in the
#                                 guest: a smaller one can't boot with them

SCHEMAS['query-balloon'] = {'actual': int}


def told_mtu(nic: VirtualNic | None) -> int:
    """Return the MTU that a guest is told of a card; 0 when it need not be told."""
    mtu = nic.mtu if nic else 0
    return 0 if mtu == 1500 else mtu


def is_card(nic: Any) -> bool:
    """Tell whether a machine can have it as a network card: a pair has no tap."""
    return isinstance(nic, VirtualNic) and nic.layout != 'pair'


def chain_of(drive: Harddrive) -> list[list[str]]:
    return [[row.filename, row.format] for row in drive.chain()]


def host_forward(text: str) -> tuple[str, str]:
    """Return what a forward such as tcp:127.0.0.1:2222:22 takes of the host, and the guest's port:
    with a - between them, QEMU's hostfwd. MachineError says what is wrong with another."""
    found = re.fullmatch(r'((?:tcp|udp):([0-9.]+):(\d{1,5})):(\d{1,5})', text, re.ASCII) \
        if isinstance(text, str) else None
    wrong = 'it is not PROTOCOL:ADDRESS:PORT:PORT OF THE GUEST'
    if found:
        taken, address, port, inner = found.groups()
        valid_address(address, ipaddress.IPv4Address)
        wrong = 'a port is 1 to 65535' if not all(0 < int(one) < 65536 for one in (port, inner)) \
            else 'the host\'s ports below 1024 are root\'s, and QEMU has no rights' \
            if int(port) < 1024 else ''
        if not wrong:
            return taken, f':{inner}'
    raise MachineError(f'forward {text!r:.80}: {wrong}', 'write one such as tcp:127.0.0.1:2222:22, '
                       'with 0.0.0.0 for all addresses of the host')


def checked_forwards(forwards: Any, user: bool) -> list[str]:
    """Return forwards in a list, each of which takes something else of the host; none, unless it is
    for a nic 'user'."""
    given = list(forwards) if isinstance(forwards, (list, tuple)) else [forwards]
    taken = [host_forward(one)[0] for one in given]
    twice = next((one for one in taken if taken.count(one) > 1), '')
    if twice:
        raise MachineError(f'forwards: {twice} twice', 'give each a port of the host of its own')
    if given and not user:
        raise MachineError('forwards: only for a nic of QEMU\'s own NAT', "say nics='user'; a "
                           'VirtualNic has an address of its own on its switch')
    return given


DriveLike = Union[Harddrive, str, 'os.PathLike[str]']


class Kind(NamedTuple):
    """How one kind of device is plugged: its back end, then the device itself."""

    option: str                 # of the command line ...
    add: str                    # ... and the QMP commands, for the back end
    remove: str
    key: str                    # the name of the member that names it ...
    type: str                   # ... and of the one that the command line has first
    suffix: str                 # of its name, after the device's id


KINDS = {
    'disk': Kind('-blockdev', 'blockdev-add', 'blockdev-del', 'node-name', 'driver', 'node'),
    'nic': Kind('-netdev', 'netdev_add', 'netdev_del', 'id', 'type', 'link'),
    'dimm': Kind('-object', 'object-add', 'object-del', 'id', 'qom-type', 'memory'),
    'chardev': Kind('-chardev', 'chardev-add', 'chardev-remove', 'id', 'type', 'host')}


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested QMP structure in the form of -netdev, -object and -chardev."""
    told: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = [row['str'] for row in value]
        inner = flat(value) if isinstance(value, dict) else {
            {'out': 'path', 'str': 'fd'}.get(key, key): value}
        told = {**inner, **told}
    return told


def machines_with(path: str, saved: bool = False) -> Iterator[tuple[str, int]]:
    """Yield the machines, or only those that are `saved`, that have an image, or one on it: name
    and how deep the image is. Of a damaged file its copy tells."""
    for name in names_in(MACHINES_DIR):
        home, devices = os.path.join(MACHINES_DIR, name), list[Device]()
        with contextlib.suppress(Error, OSError, ValueError, RecursionError):   # no machine
            try:
                spec = MachineFile.read(home)
            except DamagedFile:
                spec = MachineSpec.read(read_own(f'{home}/machine.json.copy'), name)
            if not saved or spec.memory_at is MemoryAt.SAVED:   # others' disks may hang (NFS)
                devices = spec.devices
        for depth, layer in (pair for row in devices for pair in enumerate(row.facts.chain)):
            if _is_file(layer[0], path):
                yield name, depth


MACHINES_WITH.append(machines_with)


class DriveSlot:
    """Where a Harddrive or CD is: the Attached of *disks*."""

    def __init__(self, qemu: Qemu, id: str, filename: str = '') -> None:
        self.qemu, self.id, self.node = qemu, id, f'{id}-node'
        self.filename = filename                # of a disk; a drive's CD changes

    def alive(self) -> bool:
        return self.qemu.is_alive() and (not self.filename or any(
            row.id == self.id and row.facts.file == self.filename
            for row in self.qemu.file.now().of_kind('disk')))

    def keep(self, medium: str) -> None:
        with self.qemu.file.change() as spec:
            for device in spec.devices:
                if device.id == self.id:
                    device.facts.chain = [[medium, 'raw']] if medium else []

    def execute(self, command: str, medium: str = '', **arguments: Any) -> Any:
        with self.qemu.session() as session:
            if medium:
                named = session.fdset(open_file(medium))
                # QEMU sees what a descriptor is of a file or a CD drive, not of another device.
                other = is_device(medium) and os.major(os.stat(medium).st_rdev) != CD_DRIVES
                arguments['filename'] = f'host_device:{named}' if other else named
            return session.execute(command, **arguments)


def plugged(kind: str) -> Any:
    """Return a property: the things behind a machine's devices of a kind."""
    def things(devices: Devices) -> list[Any]:
        devices.file.refresh()
        return [devices.thing(device) for device in devices.spec.of_kind(kind)]
    return property(things)


class Devices(Part):
    """What is plugged into a machine, and how it comes in and out, and their boot order."""

    harddrives: list[Harddrive] = plugged('disk')
    cds: list[CD] = plugged('cd')
    nics: list[VirtualNic | None] = plugged('nic')

    def __init__(self, qemu: Qemu) -> None:
        super().__init__(qemu)
        self._things: dict[str, Any] = {}       # id of a device -> its Harddrive, CD or VirtualNic

    def after_start(self) -> None:
        """Do what the command line can't say: the media, and links that are down."""
        for device in self.spec.of_kind('cd'):
            if device.facts.file:
                DriveSlot(self.qemu, device.id).execute(
                    'blockdev-change-medium', device.facts.file, id=device.id, format='raw',
                    read_only_mode='read-only')
        self.set_links()

    def set_links(self) -> None:
        """Plug in and pull the cables as they were."""
        for device in self.spec.of_kind('nic'):
            self.qemu.qmp('set_link', name=device.id, up=device.facts.up)

    def start_qemu(self) -> None:
        """Start QEMU, stopped, and wait for its greeting."""
        if self.spec.memory_at in (MemoryAt.LOST, MemoryAt.GIVEN):
            self.spec.memory_at, self.spec.memory_place = MemoryAt.HERE, ''
        self.spec.processor = processor_of(self.spec)
        for place in HOME_DIRECTORIES:
            os.makedirs(self.file.path(place), mode=0o700, exist_ok=True)
            if os.geteuid() == 0:
                owner = self.spec.uid if place in ('vnc', 'tpm') else 0
                os.chown(self.file.path(place), owner, owner)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.file.path('console.log'), self.file.path('console.log.1'))
        with contextlib.closing(QemuCommand()) as launch:
            try:
                self.qemu.compose(launch)
                for text in self._fixed_devices():
                    launch.add('-device', text)
                for device in self.spec.devices:
                    self._compose_device(launch, device)
            except OSError as problem:
                hint = FORWARD_HINT if problem.errno == errno.EADDRINUSE else ''
                raise MachineError(f'{self.name}: can\'t start QEMU: {explain(problem)}',
                                   hint) from None
            self.qemu.start(launch)

    def _fixed_devices(self) -> Iterator[str]:
        for number in range(self.spec.ports):
            yield options('pcie-root-port', {
                'id': f'rp{number}', 'bus': 'pcie.0', 'chassis': number + 1, 'slot': number + 1,
                'addr': f'{0x10 + number // 8:#x}.{number % 8}', 'multifunction': number % 8 == 0})
        if self.spec.video != 'none':
            yield f'{VIDEO[self.spec.video].driver},id=video'
        yield 'qemu-xhci,id=usb'
        yield 'usb-tablet,id=pointer,bus=usb.0'     # every system has a driver for one of the two
        yield 'virtio-tablet-pci,id=tablet'
        yield f'virtio-serial-pci,id=serial,max_ports={VIRTIO_PORTS}'
        yield 'virtserialport,chardev=agent,name=org.qemu.guest_agent.0,bus=serial.0'
        yield 'virtio-balloon-pci,id=balloon'
        yield 'virtio-scsi-pci,id=scsi'

    def thing(self, device: Device) -> Any:
        """Return the Harddrive, CD or VirtualNic behind a device, made again after a load()."""
        if device.id not in self._things or not self._same(device, self._things[device.id]):
            self.attach(device, self._remake(device))
        thing = self._things[device.id]
        if device.kind == 'cd':                 # a drive stays, its medium changes
            thing.filename = device.facts.file
        return thing

    def recognise(self, things: Iterable[Any]) -> None:
        """Take these Harddrives and VirtualNics for those of its devices that they are."""
        for device in self.spec.devices:
            for thing in things:
                if device.kind == ('disk' if isinstance(thing, Harddrive) else 'nic') \
                        and thing and self._same(device, thing):
                    self._keep(device, thing)

    def _keep(self, device: Device, thing: Any) -> None:
        if device.kind == 'disk' and self.spec.memory_at is MemoryAt.AWAITED:
            self._things[device.id] = thing     # it is its other machine's until then
        else:
            self.attach(device, thing)

    def attach(self, device: Device, thing: Any) -> None:
        self._things[device.id] = thing
        if device.kind in ('disk', 'cd'):
            thing.attached = DriveSlot(self.qemu, device.id,
                                       thing.filename if device.kind == 'disk' else '')

    @staticmethod
    def _same(device: Device, thing: Any) -> bool:
        """Tell whether a thing is the device's: others may have changed what has its id."""
        if isinstance(thing, Harddrive):
            return device.facts.chain == chain_of(thing)
        return bool(device.facts.name == getattr(thing, 'name', ''))

    def _remake(self, device: Device) -> Any:
        facts = device.facts
        if device.kind == 'disk':
            drive: Harddrive | None = None
            for filename, form in facts.chain[::-1]:
                if not os.path.exists(filename):
                    raise DiskError(f'{self.name}: {filename}: its disk is gone', 'put it back')
                drive = Harddrive(filename, format=form, backing=drive)
            return drive
        if device.kind == 'cd':
            return CD()
        return self._nic(facts) if facts.mac and facts.name else None

    @staticmethod
    def _nic(facts: Facts) -> VirtualNic:
        """Return a nic, made again if the host has rebooted since."""
        return VirtualNic(facts.name, namespace=facts.namespace, mac=facts.mac)

    def plan(self, device: Device, thing: Any) -> Device:
        self.spec.devices.append(device)
        self._keep(device, thing)
        return device

    def plan_disk(self, drive: Harddrive) -> Device:
        drive.check()
        files = {os.path.realpath(row.facts.file) for row in self.spec.of_kind('disk')}
        if os.path.realpath(drive.filename) in files:
            raise DiskError(f'{self.name}: has {drive.filename} already')
        return self.plan(self.spec.new('disk', self.spec.disk_bus, chain=chain_of(drive)), drive)

    def plan_cd(self, disc: CD, model: str) -> Device:
        chain = [[disc.filename, 'raw']] if disc.filename else []
        return self.plan(self.spec.new('cd', model, chain=chain), disc)

    def plan_nic(self, nic: VirtualNic | None, own: bool, forwards: Sequence[str] = ()) -> Device:
        digest = hashlib.sha256(f'{self.file.uuid} {self.spec.new_id("nic")}'.encode()).digest()
        mac = nic.mac if nic else ':'.join(['52', '54', '00', *(
            f'{byte:02x}' for byte in digest[:3])])
        if nic and any(nic.name == device.facts.name for device in self.spec.of_kind('nic')):
            raise MachineError(f'{self.name}: has {nic.name} already')
        return self.plan(self.spec.new(
            'nic', self.spec.nic_model, name=nic.name if nic else '', mac=mac, up=True, own=own,
            namespace=nic.namespace if nic else '', mtu=told_mtu(nic), forwards=list(forwards)),
            nic)

    @staticmethod
    def back_name(device: Device) -> str:
        """Return what the back end of a device is called."""
        return f'{device.id}-{KINDS[device.kind].suffix}'

    def front(self, device: Device) -> dict[str, Any]:
        """Return the arguments of device_add."""
        facts, driver = device.facts, device.model.driver
        back = self.back_name(device) if device.kind in KINDS else ''
        rows: dict[str, dict[str, Any]] = {
            'disk': {'drive': back, **({'serial': device.id} if driver == 'nvme' else {})},
            'nic': {'netdev': back, 'mac': facts.moved_mac or facts.mac, **(
                {'host_mtu': facts.mtu} if facts.mtu and facts.model == 'virtio' else {})},
            'cd': {}, 'dimm': {'memdev': back}, 'chardev': {'chardev': back, 'name': facts.name}}
        told = {'driver': driver, **rows[device.kind], 'id': device.id, **device.place()}
        if device.boot:
            told['bootindex'] = device.boot
        return told

    def _ensure_free(self, drive: Harddrive) -> None:
        # One that was just shut down is away for us some ms before it lets its disks go.
        if not Deadline(1.0).poll(lambda: not drive.in_use(), 0.01):
            raise DiskError(f'{self.name}: {drive.taken()}', 'stop that one first')
        for other in {name for name, _ in machines_with(drive.filename, True)} - {self.name}:
            raise DiskError(f'{self.name}: {drive.filename}: {other} is saved, and its memory '
                            'would not fit', 'start and stop that one, or say its delete_saved()')

    def _compose_device(self, launch: QemuCommand, device: Device) -> None:
        thing = self.thing(device)
        if device.kind == 'disk':
            thing.check()
            if self.spec.memory_at is not MemoryAt.AWAITED:
                self._ensure_free(thing)
        if device.kind in KINDS:                # a CD drive comes without its medium
            kind, back = KINDS[device.kind], self._back(device, launch)
            if device.kind == 'disk':
                launch.add(kind.option, json.dumps(back))
            else:
                back = flat(back)
                launch.add(kind.option, options(back.pop(kind.type), back))
        front = self.front(device)
        launch.add('-device', options(front.pop('driver'), front))

    @staticmethod
    def _vhost(give: FdGiver) -> dict[str, Any]:
        """Use the kernel's virtio where it is there: without it, QEMU aborts on vhost=on."""
        try:
            return {'vhost': True, 'vhostfd': give.named_fd(os.open('/dev/vhost-net',
                                                                    os.O_RDWR | os.O_CLOEXEC))}
        except OSError:
            return {}

    def _require_hotplug(self, device: Device) -> None:
        if device.model.port == 'ide':
            raise WrongState(f'{self.name} is running, and SATA takes and gives nothing meanwhile',
                             'stop it first')

    def _plug(self, device: Device) -> None:
        """Plug a device into the running machine: back end, then device, or neither."""
        kind = KINDS[device.kind]
        self._require_hotplug(device)
        if device.kind == 'disk':
            self._ensure_free(self.thing(device))
        with self.qemu.session() as qmp:
            back = self._back(device, qmp)
            qmp.execute(kind.add, **back)
            try:
                qmp.execute('device_add', **self.front(device))
            except BaseException:
                qmp.execute(kind.remove, **{kind.key: back[kind.key]})
                raise

    def _back(self, device: Device, give: FdGiver) -> dict[str, Any]:
        """Return the arguments of the QMP command that adds a device's back end."""
        facts, thing, name = device.facts, self.thing(device), self.back_name(device)
        if device.kind == 'disk':
            return dict(thing.blockdev(name, lambda path, write: give.fdset(os.open(
                path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC))))
        if device.kind == 'nic':
            tap = {'fd': give.named_fd(thing.open()), **self._vhost(give)} if thing else {}
            leads = {'hostfwd': [{'str': '-'.join(host_forward(text))} for text in facts.forwards]}
            return {'id': name, 'type': 'tap' if thing else 'user', **tap,
                    **(leads if facts.forwards else {})}
        if device.kind == 'dimm':
            return {'id': name, 'qom-type': 'memory-backend-ram', 'size': facts.mib * MIB}
        path = self._port(device)
        if facts.type == 'socket':
            data = {'addr': {'type': 'fd', 'data': {'str': give.named_fd(listener(path))}},
                    'server': True, 'wait': False}
        elif facts.type == 'file':
            data = {'out': give.fdset(appended(path)), 'append': True}
        else:
            data = {}
        return {'id': name, 'backend': {'type': facts.type, 'data': data}}

    def _port(self, device: Device) -> str:
        return self.file.path(f'ports/{device.id}')

    def _unplug(self, device: Device, timeout: float) -> bool:
        """Ask the guest to let a device go, and remove it when it does (DEVICE_DELETED)."""
        kind = KINDS[device.kind]
        self._require_hotplug(device)
        back: dict[str, Any] = {kind.key: self.back_name(device)}
        with self.qemu.session() as qmp:
            gone = self._request_unplug(qmp, device, Deadline(timeout))
            device.pending = not gone

            def removed() -> bool:                      # the device may hold it some ms more
                with contextlib.suppress(QemuRefused):
                    qmp.execute(kind.remove, **back)
                    return True
                return False
            if gone and not Deadline(UNPLUG_TIMEOUT).poll(removed, STATE_POLL / 10):
                raise MachineError(f'{self.name}: {device.id} is gone, but QEMU keeps its back end')
        return gone

    @staticmethod
    def _request_unplug(qmp: QmpSession, device: Device, deadline: Deadline) -> bool:
        """Ask until the guest lets it go: one that is just finding it can miss a request."""
        asked = device.pending
        while True:
            try:
                qmp.execute('device_del', id=device.id)
            except QemuRefused as problem:
                if problem.code == 'DeviceNotFound':            # let go since the last request
                    return True
                if not asked:                   # else it is still in the process of unplug
                    raise
            asked = True
            event = qmp.event(['DEVICE_DELETED', 'DEVICE_UNPLUG_GUEST_ERROR'],
                              min(UNPLUG_AGAIN, deadline.left()), device=device.id)
            if event:
                return bool(event['event'] == 'DEVICE_DELETED')
            if deadline.passed():
                return False

    def find(self, kind: str, thing: Any) -> Device:
        """Return the device of a thing, which may also be its id or number."""
        rows = self.spec.of_kind(kind)
        held = [row for row in rows if self._things.get(row.id) is thing is not None]
        if held:
            return held[0]
        wanted = thing if isinstance(thing, os.PathLike) else \
            getattr(thing, 'filename', None) or getattr(thing, 'name', None) or thing
        for number, device in enumerate(rows):
            names = [device.id, device.facts.name]
            if wanted and wanted in names or wanted == number and type(wanted) is int or (
                    wanted and isinstance(wanted, (str, os.PathLike))
                    and image_path(wanted) == device.facts.file):
                return device
        raise MachineError(f'{self.name}: has no {kind} {thing!r}',
                           f'it has {", ".join(row.id for row in rows) or "none"}')

    def add(self, plan: Callable[[], Device]) -> Device:
        """Enter a device, and plug it in if the machine runs; or neither."""
        with self.file.change():
            self.qemu.require_not_saved()
            device = plan()
            try:
                self.file.write()               # first: a full disk must not leave it plugged in
                if self.qemu.is_alive():
                    self._plug(device)
            except BaseException:
                self.drop(device)
                self.file.write()
                raise
        return device

    def drop(self, device: Device) -> None:
        self.spec.devices.remove(device)
        thing = self._things.pop(device.id, None)
        if isinstance(thing, (Harddrive, CD)):
            thing.attached = None
        if device.facts.own:                    # and another one of that name is not ours
            with contextlib.suppress(NoInterface):
                nic = VirtualNic.known(device.facts.name)
                if (nic.mac, nic.namespace) == (device.facts.mac, device.facts.namespace):
                    nic.delete()

    def remove(self, kind: str, what: Any, timeout: float) -> str:
        with self.file.change():
            self.qemu.require_not_saved()
            device = self.find(kind, what)
            if self.qemu.is_alive() and not self._unplug(device, timeout):
                return (f'{device.id}: the guest does not let it go; it goes when the machine is '
                        'reset or stopped')
            self.drop(device)
        return f'{device.id} removed'

    def add_nic(self, nic: VirtualNic | str | None = None, forwards: Sequence[str] = ()) -> Device:
        """Plug in a network card, a new one of its own if none is given, 'user' for QEMU's own
        NAT, with `forwards` as Machine has them, at once if it runs (getfd, netdev_add,
        device_add)."""
        if nic not in (None, 'user') and not is_card(nic):
            raise MachineError(f'{self.name}: nic {nic!r:.80}',
                               "give a VirtualNic with a tap, 'user', or nothing")
        leads = checked_forwards(forwards, nic == 'user')

        def plan() -> Device:
            if isinstance(nic, str):
                return self.plan_nic(None, False, leads)
            card = nic or VirtualNic.create_many(1, self.spec.namespace or self.name)[0]
            try:
                return self.plan_nic(card, own=nic is None)
            except BaseException:
                if nic is None:
                    card.delete()
                raise
        return self.add(plan)

    def del_nic(self, nic: Any, timeout: float = UNPLUG_TIMEOUT) -> str:
        """Unplug a network card: the object, its id, or its number (device_del, netdev_del). One
        that the guest does not let go stays until it is reset, and the answer says so."""
        return self.remove('nic', nic, timeout)

    def add_harddrive(self, drive: DriveLike) -> Device:
        """Plug in a disk, at once if it runs (blockdev-add, device_add)."""
        disk = drive if isinstance(drive, Harddrive) else Harddrive(drive)
        place = disk.attached
        try:
            return self.add(lambda: self.plan_disk(disk))
        except BaseException:
            disk.attached = place               # in the machine that has it
            raise

    def del_harddrive(self, drive: Any, timeout: float = UNPLUG_TIMEOUT) -> str:
        """Unplug a disk: the object, its id, or its number; the image stays (device_del)."""
        return self.remove('disk', drive, timeout)

    def nic_state(self, nic: Any, up: bool) -> None:
        """Plug the cable in or pull it, as the guest sees it; kept over restarts (set_link)."""
        check('up', up, a_bool, MachineError)
        with self.file.change():
            device = self.find('nic', nic)
            if self.qemu.is_alive():
                self.qemu.qmp('set_link', name=device.id, up=up)
            device.facts.up = up

    def set_forwards(self, nic: Any, forwards: Sequence[str]) -> None:
        """Have these ports of the host, and no others, lead to the guest behind a nic 'user', at
        once if it runs, and kept (hostfwd_add, hostfwd_remove)."""
        def console(verb: str, rule: str) -> str:
            line = f'hostfwd_{verb} {self.back_name(device)} {rule}'
            return str(self.qemu.qmp('human-monitor-command', command_line=line)).strip()

        def lead(away: Iterable[str], here: Iterable[str]) -> None:
            for text in away:
                console('remove', host_forward(text)[0])
            for text in here:
                said = console('add', '-'.join(host_forward(text)))
                if said:                                # nothing, when it is well
                    raise MachineError(f'{self.name}: {said}', FORWARD_HINT)
        with self.file.change():
            device = self.find('nic', nic)
            leads = checked_forwards(forwards, not device.facts.name)
            old, new = ([one for one in a if one not in b] for a, b in (
                (device.facts.forwards, leads), (leads, device.facts.forwards)))
            if self.qemu.is_alive():
                try:
                    lead(old, new)
                except BaseException:
                    lead(new, old)
                    raise
            device.facts.forwards = leads

    def resize_harddrive(self, drive: Any, size: float, shrink: bool = False) -> None:
        """Give a disk a new size in GiB (Harddrive.resize: block_resize, qemu-img resize)."""
        self.file.refresh()
        self.thing(self.find('disk', drive)).resize(size, shrink)

    def set_boot_order(self, ids: Sequence[str]) -> None:
        for device in self.spec.devices:
            device.boot = ids.index(device.id) + 1 if device.id in ids else 0

    def change_boot_device(self, *devices: Any) -> None:
        """Boot from these, in this order: 'cd', a Harddrive, a nic, or an id such as disk1. It
        counts from the next reset on, and is kept (qom-set bootindex)."""
        with self.file.change():
            ids = [self._boot_id(device) for device in devices]
            twice = [id for id in ids if ids.count(id) > 1]
            if twice:
                raise MachineError(f'{self.name}: {twice[0]} twice in the boot order',
                                   'name each device once')
            before = {device.id: device.boot for device in self.spec.devices}
            self.set_boot_order(ids)
            if not self.qemu.is_alive():
                return
            with self.qemu.session() as qmp:
                # First all others out: QEMU refuses a place that is taken.
                for id, place in [*((id, -1) for id, place in before.items() if place),
                                  *((id, place) for place, id in enumerate(ids, 1))]:
                    qmp.execute('qom-set', path=f'/machine/peripheral/{id}',
                                property='bootindex', value=place)

    def _boot_id(self, thing: Any) -> str:
        if isinstance(thing, str) and thing == 'cd':
            return 'cd0'
        for kind in ('disk', 'cd', 'nic'):
            with contextlib.suppress(MachineError):
                return self.find(kind, thing).id
        raise MachineError(f'{self.name}: can\'t boot from {thing!r}',
                           "name 'cd', or one of its disks or nics")

    def create_chardev(self, name: str, kind: str = 'socket') -> str:
        """Give the guest a port /dev/virtio-ports/NAME, and return its other end on the host: a
        pty, a unix socket, or a file that collects what the guest writes (chardev-add, device_add
        virtserialport). It is kept over restarts; chardevs tells the paths."""
        if not isinstance(name, str) or not NAME.fullmatch(name) \
                or kind not in ('pty', 'socket', 'file'):
            raise MachineError(f'{self.name}: chardev {name!r:.80} of kind {kind!r}',
                               'use a name like org.example.0, and pty, socket or file')

        def plan() -> Device:
            if any(row.facts.name == name for row in self.spec.of_kind('chardev')):
                raise MachineError(f'{self.name}: has a chardev {name}')
            id = self.spec.new_id('chardev')
            remove_file(self.file.path(f'ports/{id}'))          # of one that was deleted
            return self.plan(self.spec.new('chardev', type=kind, name=name), None)
        self.add(plan)
        return self.chardevs[name]

    def delete_chardev(self, name: str, timeout: float = UNPLUG_TIMEOUT) -> str:
        """Take a port away again (device_del, chardev-remove)."""
        return self.remove('chardev', name, timeout)

    @property
    def chardevs(self) -> dict[str, str]:
        self.file.refresh()
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(WrongState):           # it is off
            rows = self.qemu.qmp('query-chardev')
        ends = {row['label']: row['filename'].partition(':')[2] for row in rows
                if re.fullmatch(r'pty:/dev/pts/\d+', row['filename'])}
        return {row.facts.name: self._its_pty(ends.get(f'{row.id}-host', ''))
                if row.facts.type == 'pty' else self._port(row)
                for row in self.spec.of_kind('chardev')}

    def _its_pty(self, path: str) -> str:
        """Return the path if that is a terminal of QEMU's user, and not whatever it has named."""
        with contextlib.suppress(OSError):
            return path if os.stat(path).st_uid == self.spec.uid else ''
        return ''


class DevicesPart(Part):
    """A part of a machine that stands on its devices, too."""

    def __init__(self, devices: Devices) -> None:
        super().__init__(devices.qemu)
        self.devices = devices


class Ram(DevicesPart):
    """A machine's memory, as its guest has it: plugged in, and ballooned."""

    def increase_ram(self, mb: int) -> str:
        """Give the guest `mb` MiB more, and say what it took (object-add, device_add pc-dimm).

        In steps of 128 MiB, which the agent switches on (guest-set-memory-blocks); a machine
        that was ballooned down is let out first. Raises MachineError with the reason why not.
        """
        self._check_mib(mb)
        blocks: dict[int, bool] = {}
        if self.qemu.is_alive():
            actual = self.qemu.qmp('query-balloon')['actual'] // MIB
            if actual + mb <= self.spec.ram():
                return self.balloon(actual + mb)
            blocks = self.memory_blocks()

        def plan() -> Device:
            room = self.spec.maxmemory - self.spec.ram()
            if mb % DIMM_MIB or mb > room:
                why, remedy = (f'Linux takes memory in blocks of {DIMM_MIB} MiB', 'use a multiple '
                               'of it') if mb % DIMM_MIB else (
                    f'there is room for {max(room, 0)} MiB', 'make the machine with a larger '
                                                             'maxmemory=')
                raise MachineError(f'{self.name}: can\'t get {mb} MiB more: {why}', remedy)
            return self.devices.plan(self.spec.new('dimm', mib=mb), None)
        device = self.devices.add(plan)
        return f'{device.id}: {mb} MiB plugged in, {self._online(blocks)}'

    def _check_mib(self, mb: int) -> None:
        if type(mb) is not int or mb <= 0:
            raise MachineError(f'{self.name}: memory {mb!r:.80}', 'use MiB')
        self.file.refresh()                     # what it has, another program may have changed

    def memory_blocks(self) -> dict[int, bool]:
        """Return the number of each block of the guest's memory, and whether it is switched on."""
        with contextlib.suppress(AgentError, Busy):
            return {row['phys-index']: row['online']
                    for row in self.qemu.agent('guest-get-memory-blocks')}
        return {}

    def _online(self, before: Mapping[int, bool]) -> str:
        """Switch on the memory blocks that are new, and say what the guest then has."""
        if not self.qemu.is_alive():
            return 'counts from the next start'
        if not before:
            return 'not confirmed: the guest agent does not answer'
        deadline = Deadline(AGENT_TIMEOUT)
        while not deadline.passed():
            off = [index for index, online in self.memory_blocks().items() if not online]
            if off:
                with contextlib.suppress(AgentError, Busy):
                    self.qemu.agent('guest-set-memory-blocks', {
                        'mem-blks': [{'phys-index': index, 'online': True} for index in off]})
            new = [index for index, online in self.memory_blocks().items()
                   if online and index not in before]
            if new:
                return f'confirmed by the guest: {len(new)} more blocks are online'
            time.sleep(STATE_POLL)
        return 'not confirmed: the guest shows no new memory; it may have no memory hot-plug'

    def balloon(self, mb: int) -> str:
        """Have the guest use `mb` MiB of its memory, and say what it does (balloon)."""
        self._check_mib(mb)
        if mb > self.spec.ram():
            raise MachineError(f'{self.name}: can\'t have {mb} MiB, only {self.spec.ram()}',
                               'increase_ram() plugs in more')
        self.qemu.qmp('balloon', value=mb * MIB)

        def reached() -> bool:
            return bool(self.qemu.qmp('query-balloon')['actual'] == mb * MIB)
        if Deadline(BALLOON_TIMEOUT).poll(reached, STATE_POLL / 2):
            return f'the guest has {mb} MiB now'
        actual = self.qemu.qmp('query-balloon')['actual'] // MIB
        raise MachineError(f'{self.name}: the guest has {actual} MiB, not {mb}',
                           'it needs the virtio_balloon driver, and can\'t have more than '
                           f'{self.spec.ram()} MiB')


@contextlib.contextmanager
def captured(port: str, file: int) -> Iterator[None]:
    """Write the frames that come and go at an interface of this host to a file (packet(7))."""
    over, frames = threading.Event(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    wrong: list[OSError] = []

    def copy() -> None:
        while not over.is_set():
            if select.select([frames], [], [], STATE_POLL)[0]:
                try:
                    data = received_frame(frames)
                    target.write(struct.pack('IIII', *divmod(time.time_ns() // 1000, 1_000_000),
                                             len(data), len(data)) + data)
                    target.flush()
                except OSError as problem:
                    if problem.errno != errno.ENETDOWN:     # the cable was pulled, for now
                        wrong.append(problem)
                        return
    with frames, open(file, 'wb', closefd=False) as target:
        frames.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        try:
            frames.bind((port, ETH_P_ALL))
        except OSError as problem:              # somebody has removed it
            raise NetworkError(f'{port}: can\'t be captured: {problem.strerror}',
                               'see check_networks(), which names what is missing') from None
        target.write(struct.pack('IHHiIII', 0xa1b2c3d4, 2, 4, 0, 0, CAPTURE_BYTES, 1))
        target.flush()
        copier = spawn(f'capture {port}', copy)
        try:
            yield
        finally:
            over.set()
            copier.join(QMP_TIMEOUT)
    if wrong:
        raise write_error(f'the capture of {port}', wrong[0])


def received_frame(frames: socket.socket) -> bytes:
    """Return a frame with its VLAN tag, which the kernel gives beside it (packet(7))."""
    data, told, *_ = frames.recvmsg(CAPTURE_BYTES, 64)
    for level, kind, extra in told:
        if (level, kind) == (SOL_PACKET, PACKET_AUXDATA):
            status, tag, protocol = struct.unpack_from('I12xHH', extra)     # tpacket_auxdata
            if status & TP_STATUS_VLAN_VALID:
                data = data[:12] + struct.pack('!HH', protocol or 0x8100, tag) + data[12:]
    return data


class Captures(DevicesPart):
    """What crosses a machine's network cards, in files."""

    @contextlib.contextmanager
    def capture(self, nic: VirtualNic | str | int, filename: str | os.PathLike[str]
                ) -> Iterator[str]:
        """Write the frames of a nic, as long as the block lasts, to a new file in pcap's format,
        and lend its path: at the port of a VirtualNic, for QEMU's own NAT by object-add
        filter-dump.
        """
        device, path = self.devices.find('nic', nic), image_path(filename)
        self.qemu.run_state()                           # WrongState if it is off
        with self.file.one_of('capture', CAPTURES, Deadline(0)) as number, \
                contextlib.ExitStack() as opened:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as problem:
                raise write_error(path, problem) from None
            opened.callback(os.close, file)
            empty = opened.enter_context(contextlib.ExitStack())
            empty.callback(remove_file, path)           # if it does not begin
            # A tap's frames pass by QEMU where there is vhost, which then refuses the filter; and
            # QEMU before 8.0 has the filter write the tap's header before each.
            opened.enter_context(captured(device.facts.name, file) if device.facts.name else
                                 self._dumped(device, f'capture{number}', file))
            empty.pop_all()
            yield path

    @contextlib.contextmanager
    def _dumped(self, device: Device, id: str, file: int) -> Iterator[None]:
        """Have QEMU write a nic's frames to a file. It is asked for nothing that it would refuse:
        QEMU (7.2) then closes its descriptor 0, whatever that is (net/dump.c)."""
        with self.qemu.session() as qmp:
            with contextlib.suppress(QemuRefused):      # of a program that was killed
                qmp.execute('object-del', id=id)
            with qmp.opened(file, self.spec.uid) as name:
                qmp.execute('object-add', qom_type='filter-dump', id=id, file=name,
                            netdev=Devices.back_name(device), maxlen=CAPTURE_BYTES)
        try:
            yield
        finally:
            with contextlib.suppress(GuestError):       # it has ended
                self.qemu.qmp('object-del', id=id)


# === memory stream ==============================================================================

SCHEMAS.update({
    'query-dump': {'status': str, 'completed': int, 'total': int},
    'query-migrate': {'status?': str, 'error-desc?': str,
                      'ram?': {'total': int, 'remaining': int}}})


class MemoryStream(Part):
    """A machine's memory on its way into a file or out of one, or to another machine."""

    def save(self, file: str = '') -> str:
        with self.file.change():
            if self.spec.memory_at is MemoryAt.SAVED:
                self.qemu.end()                 # of a save or restore that was killed: has not run
                return 'already saved'
            self.qemu.require_savable()
            path = image_path(file) if file else os.path.join(self.file.home, 'memory')
            if not file:                        # of a start that was killed: it fits no more
                remove_file(path)
            if os.path.exists(path):
                raise DiskError(f'{path} exists', 'name another file, or remove this one')
            with self.run_state_kept() as ran, whole_file(path, lasting=True) as memory, \
                    self.qemu.session() as qmp:
                qmp.execute('stop', JOB_TIMEOUT)        # it writes the disks' caches first
                try:
                    self.send(qmp, os.dup(memory), None, JOB_TIMEOUT)
                except MachineError as problem:
                    raise MachineError(f'{problem}; to {path}',
                                       f'it may take {self.spec.ram()} MiB there') from None
            try:
                self.file.move_memory(MemoryAt.SAVED, path)
            except FileError:
                remove_file(path)
                if ran:
                    self._go_on()
                raise
            self.qemu.end()
        return 'saved'

    def delete_saved(self) -> str:
        """Forget the memory of a saved machine, so that it boots anew; what it had not written
        to its disks is lost. A file that you named to save() stays."""
        with self.file.change():
            if self.spec.memory_at is not MemoryAt.SAVED:
                return 'not saved'
            path = self.spec.memory_place
            self.qemu.end()               # a restore that was killed
            self.file.move_memory(MemoryAt.HERE)
            if path != os.path.join(self.file.home, 'memory'):
                return f'forgotten; {path} is still there'
            remove_file(path)
        return 'saved state deleted'

    @contextlib.contextmanager
    def run_state_kept(self) -> Iterator[bool]:
        """When the block fails, let the guest run again if it ran before, which it lends."""
        ran = self.qemu.run_state() == 'running'
        with contextlib.ExitStack() as on_failure:
            if ran:
                on_failure.callback(self._go_on)
            yield ran
            on_failure.pop_all()

    def _go_on(self) -> None:
        """Let it run, which QEMU refuses until a transfer that failed is over."""
        def goes_on() -> bool:
            with contextlib.suppress(GuestError):
                if self.qemu.is_alive():
                    self.qemu.qmp('cont')
                    return self.qemu.run_state() == 'running'
            return not self.qemu.is_alive()
        if not Deadline(QMP_TIMEOUT).poll(goes_on):
            log.warning('%s stands still now; start it when QEMU answers again', self.name)

    def restore(self, path: str) -> str:
        """Fill a QEMU that waits for a migration from a file (migrate-incoming)."""
        try:
            with self.qemu.session() as qmp:
                self.receive(qmp, open_file(path))
                if not qmp.event(['MIGRATION'], JOB_TIMEOUT, status='completed'):
                    raise MachineError(f'{self.name}: no end within {JOB_TIMEOUT:g} s')
        except GuestError:
            raise MachineError(f'{self.name}: can\'t be restored from {path}'
                               f'{self.qemu.last_words()}',
                               'delete_saved(), or cmd=start&discard=1, forgets it; the machine '
                               'then boots anew, and what was not on its disks is lost') from None
        return 'restored'

    @staticmethod
    def receive(qmp: QmpSession, fd: int, late: bool = False) -> None:
        """Have a waiting QEMU read from a descriptor; `late`: it opens disks when it runs."""
        qmp.execute('migrate-set-capabilities', capabilities=[
            {'capability': 'events', 'state': True},
            {'capability': 'late-block-activate', 'state': late}])
        qmp.execute('migrate-incoming', uri=qmp.stream(fd, os.O_RDONLY))

    def send(self, qmp: QmpSession, fd: int, progress: Callable[[int, int], object] | None,
             timeout: float, stream: socket.socket | None = None) -> None:
        """Send memory and devices to a descriptor, with progress(bytes done, bytes in all)."""
        qmp.execute('migrate-set-parameters', max_bandwidth=1 << 40)
        if qmp.execute('query-status')['status'] == 'postmigrate':
            for command in ('cont', 'stop'):    # it was sent, by who was killed before all was done
                qmp.execute(command)
        qmp.execute('migrate', uri=qmp.stream(fd, os.O_WRONLY))

        def look(patience: float) -> Progress:
            # What the disk does not take in time holds it up; another machine must not do that.
            info = qmp.execute('query-migrate', QMP_TIMEOUT if stream else patience)
            ram, status = info.get('ram', {'total': 0, 'remaining': 0}), info.get('status', '')
            failed = status in ('failed', 'cancelled')
            return Progress(failed or status == 'completed',
                            f'{status}: {info.get("error-desc", status)}' if failed else '',
                            ram['total'] - ram['remaining'], ram['total'])

        def cancel() -> None:
            if stream:                  # a QEMU whose writing waits for ever answers nothing
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)
            qmp.execute('migrate_cancel')
        error = follow(look, timeout, progress, cancel)
        if error:
            raise MachineError(f'{self.name}: the transfer of its memory {error}')

    def dump(self, filename: str | os.PathLike[str], format: str = 'elf',
             progress: Callable[[int, int], object] | None = None) -> str:
        path = image_path(filename)
        with self.file.change(), whole_file(path) as file, self.qemu.session() as qmp:
            qmp.execute('dump-guest-memory', paging=False, detach=True, format=format,
                        protocol=f'fd:{qmp.named_fd(os.dup(file))}')

            def look(_: float) -> Progress:
                info = qmp.execute('query-dump')
                return Progress(info['status'] in ('completed', 'failed'), '', info['completed'],
                                info['total'])
            error = follow(look, JOB_TIMEOUT, progress)
            event = qmp.event(['DUMP_COMPLETED'], QMP_TIMEOUT) or {}
            error = error or event.get('data', {}).get('error', '')
            # It comes before the guest goes on, and until then much is refused.
            Deadline(QMP_TIMEOUT).poll(
                lambda: bool(qmp.execute('query-status')['status'] != 'save-vm'), STATE_POLL / 20)
            if error:
                raise MachineError(f'{self.name}: dump to {path}: {error}')
        return path


# === snapshots ==================================================================================

class MachineSnapshot(NamedTuple):
    """A snapshot of a machine."""

    tag: str
    when: int                   # seconds since 1970
    ram: bool                   # with its memory
    disks: tuple[str, ...]      # the images that it is in ...
    uncovered: tuple[str, ...]  # ... and the machine's others


class Snapshots(DevicesPart):
    """Snapshots of a machine's memory and disks."""

    def _layers(self) -> list[tuple[str, Harddrive]]:
        """Return node and disk of all that can hold a snapshot."""
        drives = [(f'{device.id}-node', self.devices.thing(device))
                  for device in self.spec.of_kind('disk')]
        return [(node, drive) for node, drive in drives if drive.format == 'qcow2']

    @property
    def all(self) -> list[MachineSnapshot]:
        drives = self.devices.harddrives
        rows = [(drive, row) for drive in drives for row in drive.snapshots]
        found = []
        for tag in dict.fromkeys(row.tag for _, row in sorted(rows, key=lambda pair: pair[1].when)):
            mine = {drive.filename: row for drive, row in rows if row.tag == tag}
            found.append(MachineSnapshot(
                tag, min(row.when for row in mine.values()),
                any(row.ram for row in mine.values()), tuple(mine),
                tuple(drive.filename for drive in drives if drive.filename not in mine)))
        return found

    def find(self, tag: str) -> MachineSnapshot:
        for row in self.all:
            if row.tag == tag:
                return row
        raise MachineError(f'{self.name}: has no snapshot {tag}', '.snapshots lists them')

    def take(self, tag: str = '') -> MachineSnapshot:
        with self.file.change():
            taken = [row.tag for row in self.all]
            tag = checked_tag(tag or free_tag(taken))
            alive = self.qemu.is_alive()
            if alive:
                self.qemu.require_savable()
            else:
                self.qemu.require_not_saved()
            layers = self._layers()
            if not layers:
                raise MachineError(f'{self.name}: has no qcow2 disk to hold a snapshot',
                                   'save() works without one')
            if tag in taken:
                raise MachineError(f'{self.name}: has a snapshot {tag}', 'name another')
            if alive:
                self._live_snapshot(tag, layers)
            else:
                self.spec.snapshots.pop(tag, None)      # of one that was deleted elsewhere
                snapshot_all([drive for _, drive in layers], tag)
            made = self.find(tag)
        if made.uncovered:
            log.warning('%s: snapshot %s is without %s', self.name, tag, ', '.join(made.uncovered))
        return made

    def _live_snapshot(self, tag: str, layers: Sequence[tuple[str, Harddrive]]) -> None:
        self.spec.snapshots[tag] = self._saved_shape(layers)    # it may be there though we are not
        self.file.write()
        try:
            self._snapshot_job('save', tag, layers)
            made = layers[0][1].found(tag)
            self.spec.snapshots[tag] = [*self._saved_shape(layers),
                                        ['made', made.id, made.when, made.ram]]
        except BaseException as problem:
            if isinstance(problem, KeyboardInterrupt):
                with contextlib.suppress(GuestError):
                    self._snapshot_job('delete', tag, layers)
            del self.spec.snapshots[tag]
            self.file.write()
            if isinstance(problem, MachineError):
                problem.hint = problem.hint or (f'its memory, up to {self.spec.ram()} MiB, goes '
                                                f'into {layers[0][1].filename}: is there space?')
            raise

    def _saved_shape(self, layers: Sequence[tuple[str, Harddrive]]) -> list[Any]:
        """Return what must be the same for its memory to fit; of several disks which is which."""
        files = [['file', node, drive.filename] for node, drive in layers]
        return [*self.spec.shape(), *(files if len(files) > 1 else ())]

    def _check_memory(self, tag: str, layers: Sequence[tuple[str, Harddrive]]) -> None:
        """Raise MachineError unless the memory in a snapshot is known to fit.

        QEMU itself puts the disks back before it looks, and takes a guest that lacks a device. The
        memory does not tell its processor; so it counts only where this machine noted the snapshot
        when it made it, and it is still that one.
        """
        hint = ('load_snapshot(…, disks_only=True) puts back the disks alone when it is off; '
                'snapshot() first keeps what they hold now')
        made = layers[0][1].found(tag)
        others = [drive.filename for _, drive in layers
                  if any(row.id == tag != row.tag for row in drive.snapshots)]
        if others:                              # QEMU would take that one
            raise MachineError(f'{self.name}: {others[0]} has another snapshot whose id is {tag}',
                               hint)
        rows = self.spec.snapshots.get(tag, ())
        if not made.ram or ['made', made.id, made.when, made.ram] not in rows:
            raise MachineError(f'{self.name}: what machine the memory in snapshot {tag} is of is '
                               'not known', hint)
        self.spec.check_fits([row for row in rows if row[0] != 'made'],
                             f'snapshot {tag} is of other devices', hint, self._saved_shape(layers))

    def _snapshot_job(self, verb: str, tag: str, layers: Sequence[tuple[str, Harddrive]]) -> None:
        nodes = self._nodes(layers)
        memory = {} if verb == 'delete' else {'vmstate': nodes[0]}
        self.qemu.job(f'snapshot-{verb}', tag=tag, devices=nodes, **memory)

    def _nodes(self, layers: Sequence[tuple[str, Harddrive]]) -> list[str]:
        return [*(node for node, _ in layers), *['efi-vars'] * self.spec.uefi]

    def load(self, tag: str, disks_only: bool = False) -> str:
        check('disks_only', disks_only, a_bool, MachineError)
        with self.file.change():
            found = self.find(tag)
            self.qemu.require_not_given()
            mine = self._layers()
            layers = [row for row in mine if row[1].filename in found.disks]
            bare = [drive.filename for _, drive in mine if drive.filename not in found.disks]
            memory, started = found.ram and not disks_only, not self.qemu.is_alive()
            if memory and bare:                 # its memory would not fit them
                raise MachineError(f'{self.name}: snapshot {tag} is without {", ".join(bare)}',
                                   'delete it, or remove that disk first')
            self.qemu.require_not_saved()
            if not memory and not started:
                raise WrongState(f'{self.name} runs, and '
                                 + ('its memory would not fit the disks' if found.ram else
                                    f'snapshot {tag} has no memory in it'), 'stop it first')
            if memory:
                if started:
                    self.spec.processor = processor_of(self.spec)
                self._check_memory(tag, layers)
            if found.uncovered:
                log.warning('%s: snapshot %s is without %s, which stays as it is', self.name, tag,
                            ', '.join(found.uncovered))
            if memory:
                self._load(tag, layers, started)
                return f'put back to {tag}'
            for _, drive in layers:             # another machine may be
                drive.require_not_saved()
            with put_back_on_failure([drive for _, drive in layers]):
                for _, drive in layers:
                    drive.load_snapshot(tag)
            return f'disks put back to {tag}'

    def _load(self, tag: str, layers: Sequence[tuple[str, Harddrive]], started: bool) -> None:
        """Load memory and disks, and leave the run state as it was."""
        with contextlib.ExitStack() as on_failure:
            if started:
                self.devices.start_qemu()
                on_failure.callback(self.qemu.end)
                self.devices.after_start()
            self._load_stopped(tag, layers, started)
            on_failure.pop_all()
        self.devices.set_links()

    def _load_stopped(self, tag: str, layers: Sequence[tuple[str, Harddrive]], started: bool
                      ) -> None:
        asleep = self.qemu.run_state() == 'suspended'   # it would be with the other guest
        ran = started or asleep or self.qemu.run_state() == 'running'
        drives = [drive for _, drive in layers]
        if self.spec.uefi:
            drives.append(Harddrive(os.path.join(self.file.home, 'efi-vars.qcow2')))
            drives[-1].attached = firmware = DriveSlot(self.qemu, 'efi-vars')
            firmware.node = 'efi-vars'
        try:
            with self.qemu.session() as qmp:
                if asleep:
                    qmp.execute('system_wakeup')
                    qmp.event(['RESUME', 'WAKEUP'], QMP_TIMEOUT)
                qmp.execute('stop')
            with put_back_on_failure(drives):
                self._load_or_end(tag, layers)
        except Error:
            if ran and not started and self.qemu.is_alive():
                self.qemu.qmp('cont')
            raise
        self.spec.memory_at, self.spec.memory_place = MemoryAt.HERE, ''
        if ran:
            self.qemu.qmp('cont')

    def _load_or_end(self, tag: str, layers: Sequence[tuple[str, Harddrive]]) -> None:
        """Carry out snapshot-load; end a QEMU that it leaves with half of each guest."""
        # The job's error does not tell whether it has touched the guest, and there is no other
        # trace of it; so what it would refuse at once is looked at before.
        held = {row.get('node-name') for row in self.qemu.qmp('query-named-block-nodes')
                if any(one['name'] == tag for one in row['image'].get('snapshots', ()))}
        lacking = [node for node in self._nodes(layers) if node not in held]
        if lacking:
            raise MachineError(f'{self.name}: {lacking[0]} has no snapshot {tag}',
                               'load_snapshot(…, disks_only=True) works when it is off')
        try:
            self._snapshot_job('load', tag, layers)
        except QemuRefused:                         # the job did not begin
            raise
        except MachineError as problem:
            self.file.move_memory(MemoryAt.LOST)
            self.qemu.end()
            raise MachineError(f'{problem.message}; its guest is lost',
                               'start() boots it, as after a power failure') from None

    def delete(self, tag: str) -> None:
        """Delete a snapshot from all disks (snapshot-delete; qemu-img)."""
        with self.file.change():
            found = self.find(tag)
            layers = [row for row in self._layers() if row[1].filename in found.disks]
            if self.qemu.is_alive():
                for _, drive in layers:
                    drive.found(tag)                    # or it has several of that name
                self._snapshot_job('delete', tag, layers)
                if any(row.tag == tag for _, drive in layers for row in drive.snapshots):
                    raise MachineError(f'{self.name}: QEMU did not delete snapshot {tag}',
                                       'its name is no UTF-8; see qemu-img snapshot -d, which can')
            else:
                for _, drive in layers:
                    drive.delete_snapshot(tag)
            self.spec.snapshots.pop(tag, None)


# === migration ==================================================================================
ARRIVAL_TIMEOUT = 30.0          # from the last byte of a migration to the word that it has arrived

# What the destination is asked, and with what.
SCHEMAS.update({
    'request receive': {'shape': [list], 'runs': bool, 'seconds': int, 'macs': [str], 'disks': [
        {'format': str, 'size': int, 'host': str, 'name': str, 'file': [int]}]},
    'request arrived': {}, 'request run': {}})


class Migration(DevicesPart):
    """One end of a migration.

    The programs at its two ends agree over a socket beside the stream of their QEMUs, in requests,
    see SCHEMAS. The guest runs at one end at most: the source lets it go on only while it has not
    said "run", and the destination lets it run only when it has heard that.
    """

    def __init__(self, devices: Devices, memory: MemoryStream) -> None:
        super().__init__(devices)
        self.memory = memory

    def migrate(self, to: Migration | str, progress: Callable[[int, int], object] | None = None,
                timeout: float = JOB_TIMEOUT) -> str:
        name = to.name if isinstance(to, Migration) else str(to)
        if name == self.name:
            raise MachineError(f'{name}: is here', 'migrate it to another machine')
        try:
            with self.file.change(), contextlib.ExitStack() as ends:
                self.qemu.require_savable()
                with self.memory.run_state_kept() as ran:
                    peer, stream = self._connect_peer(to, ends)
                    self._send_to(peer, stream, ran, progress, timeout)
                with unbroken():
                    self._hand_over(peer, ran)
                    self.qemu.end()
                self.spec.memory_at, self.spec.memory_place = MemoryAt.HERE, ''
        except ProtocolError as problem:
            raise MachineError(f'{self.name}: {problem}') from None
        return f'migrated to {name}'

    def _connect_peer(self, to: Migration | str, ends: contextlib.ExitStack
              ) -> tuple[LineSocket, socket.socket]:
        """Return two connections to the program at the other end, which may be this one."""
        if isinstance(to, Migration):
            (peer, far), (stream, end) = socket.socketpair(), socket.socketpair()
            taker = spawn(f'receive {to.name}', to.accept, far, lambda: end)
            ends.callback(taker.join, ARRIVAL_TIMEOUT)      # after ours are closed
        else:
            host, _, port = str(to).rpartition(':')
            try:
                if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                    raise OSError(0, 'no address')
                where = host.strip('[]'), int(port)
                peer = ends.enter_context(socket.create_connection(where, QMP_TIMEOUT))
                stream = socket.create_connection(where, QMP_TIMEOUT)
            except OSError as problem:
                raise MachineError(f'{self.name}: can\'t migrate to {to}: {explain(problem)}',
                                   'give host:port of a machine that waits in receive()') from None
            stream.setblocking(True)
        ends.enter_context(stream)
        return ends.enter_context(LineSocket(getattr(to, 'name', str(to)), peer)), stream

    def _send_to(self, peer: LineSocket, stream: socket.socket, ran: bool,
                 progress: Callable[[int, int], object] | None, timeout: float) -> None:
        """Send the guest, and hear that it has arrived, where it does not run yet."""
        peer.ask('receive', ARRIVAL_TIMEOUT, shape=self.spec.shape(),
                 disks=self.disk_identities(), runs=ran,
                 seconds=round(timeout + ARRIVAL_TIMEOUT),
                 macs=[self.devices.front(device)['mac'] for device in self.spec.of_kind('nic')])
        try:
            with self.qemu.session() as qmp:
                self.memory.send(qmp, os.dup(stream.fileno()), progress, timeout, stream)
        except MachineError as problem:
            try:
                peer.ask('arrived', QMP_TIMEOUT / 2)
                raise
            except ProtocolError as answer:         # it says why
                raise MachineError(f'{problem}; {answer}') from None
        peer.ask('arrived', ARRIVAL_TIMEOUT + QMP_TIMEOUT)

    def _hand_over(self, peer: LineSocket, ran: bool) -> None:
        """Have the other end run the guest: from here on it may be there."""
        try:
            self.file.move_memory(MemoryAt.GIVEN, peer.path)    # before anybody hears it
            # Longer than the other end tries, and then ends its QEMU: an error is a sure answer.
            peer.ask('run', ARRIVAL_TIMEOUT + QMP_TIMEOUT)
        except (ReplyError, FileError):
            self.spec.memory_at, self.spec.memory_place = MemoryAt.HERE, ''
            if ran:
                self.qemu.qmp('cont')
            self.file.write()
            raise
        except ProtocolError as problem:
            raise MachineError(
                f'{self.name}: {problem}, when it was to run the guest; this one stays paused',
                'look whether it runs there: if so, stop(force=True) this one, else '
                'unfreeze(force=True) it') from None

    def disk_identities(self) -> list[dict[str, Any]]:
        """Return what tells its disks and CD from others, on this host the file itself."""
        host = boot_id()
        layers = [(layer.format, layer.info()['virtual-size'], layer.filename)
                  for device in self.spec.of_kind('disk')
                  for layer in self.devices.thing(device).chain()]
        layers += [('cd', os.path.getsize(readable(disc.filename)), disc.filename)
                   for disc in self.devices.cds if disc.filename]
        return [{'format': form, 'size': size, 'host': host, 'name': name,
                 'file': [os.stat(name).st_dev, os.stat(name).st_ino]}
                for form, size, name in layers]

    def check_same_disks(self, theirs: Sequence[Mapping[str, Any]]) -> None:
        """Raise MachineError unless these are the marks of this machine's disks."""
        none = {'format': 'none', 'size': 0, 'host': '', 'name': 'no disk', 'file': []}
        for mine, other in itertools.zip_longest(self.disk_identities(), theirs, fillvalue=none):
            file = ['file'] if mine['host'] == other['host'] else []
            if any(mine[key] != other[key] for key in ('format', 'size', *file)):
                here, there = ('{name} ({format}, {size} bytes)'.format(**row)
                               for row in (mine, other))
                raise MachineError(f'{self.name}: has {here} where the guest has {there}',
                                   'give both machines the same disks and CD')

    def receive_at(self, port: int, timeout: float = 60.0, address: str = '') -> None:
        self.file.refresh()
        self._require_waiting()
        deadline, why = Deadline(timeout), ''
        try:
            with socket.create_server((address, port)) as server:
                while (self.spec.memory_at is MemoryAt.AWAITED and self.qemu.is_alive()
                       and not deadline.passed()):
                    why = self._admit(server, deadline) or why
        except (OSError, OverflowError, TypeError) as problem:
            raise MachineError(f'{self.name}: can\'t wait on port {port!r:.80}: {explain(problem)}'
                               ) from None
        if self.spec.memory_at is MemoryAt.AWAITED:
            raise MachineError(f'{self.name}: the guest did not arrive: '
                               f'{why or f"nobody came to port {port}"}')

    def _require_waiting(self) -> None:
        if self.spec.memory_at is not MemoryAt.AWAITED or not self.qemu.is_alive():
            raise WrongState(f'{self.name} does not wait for a migration',
                             'make it with incoming=True, and start it')

    def cancel(self) -> None:
        """End a migration that another thread carries out (migrate_cancel)."""
        self.qemu.qmp('migrate_cancel')

    def _admit(self, server: socket.socket, deadline: Deadline) -> str:
        """Take in the guest of whoever comes; return '' or why that failed."""
        with contextlib.suppress(socket.timeout):
            server.settimeout(max(deadline.left(), 0.001))
            peer, (host, *_) = server.accept()

            def stream() -> socket.socket:
                server.settimeout(QMP_TIMEOUT)
                while True:
                    taken, (other, *_) = server.accept()
                    if other == host:
                        taken.setblocking(True)
                        return taken
                    taken.close()
            return self.accept(peer, stream)
        return ''

    def accept(self, peer: socket.socket, stream: Callable[[], socket.socket]) -> str:
        """Be the other end of migrate(); return '' when the guest runs here, else why not."""
        with LineSocket('the source', peer) as wire:
            waited = self.file.now().memory_at is MemoryAt.AWAITED
            try:
                self._take_in(wire, stream)
            except (Error, socket.timeout) as problem:
                with contextlib.suppress(ProtocolError):
                    wire.send({'error': {'desc': str(problem)}}, Deadline(QMP_TIMEOUT))
                if waited and self.spec.memory_at is MemoryAt.HERE:     # it runs here none the less
                    raise
                return str(problem)
        return ''

    def _take_in(self, peer: LineSocket, stream: Callable[[], socket.socket]) -> None:
        offer = peer.asked('receive', QMP_TIMEOUT)
        with stream() as carrier, self.file.change():
            self._require_waiting()
            if self.qemu.run_state() != 'inmigrate':
                raise WrongState(f'{self.name} has taken a guest in, but was not told to run it')
            self.spec.check_fits(offer['shape'], 'the guest comes from another kind of machine')
            self.check_same_disks(offer['disks'])
            if not all(map(MAC.fullmatch, offer['macs'])):
                raise MachineError(f'{self.name}: the guest comes with {offer["macs"]!r:.80}')
            landed = False
            try:
                with self.qemu.session() as qmp:
                    # Its disks stay the source's until it runs, if it does.
                    self.memory.receive(qmp, carrier.detach(), late=offer['runs'])
                    peer.send({'return': {}}, Deadline(QMP_TIMEOUT))
                    peer.asked('arrived', min(offer['seconds'], DAY))
                    self._await_arrival(qmp, peer)
                self.devices.set_links()
                peer.send({'return': {}}, Deadline(QMP_TIMEOUT))
                peer.asked('run', ARRIVAL_TIMEOUT)
                with unbroken():
                    for device, mac in zip(self.spec.of_kind('nic'), offer['macs']):
                        device.facts.moved_mac = mac     # for its next start
                    self.file.move_memory(MemoryAt.HERE)    # it is this machine's from here on
                    if offer['runs']:
                        self.qemu.qmp('cont')
                    landed = True
                    with contextlib.suppress(ProtocolError):
                        peer.send({'return': {}}, Deadline(QMP_TIMEOUT))
            except BaseException:
                if not landed:                      # what has come must not run here, too
                    self.qemu.end(patience=-1)
                    self.file.move_memory(MemoryAt.AWAITED)
                raise
            for device in self.spec.of_kind('disk'):
                self.devices.attach(device, self.devices.thing(device))

    def _await_arrival(self, qmp: QmpSession, peer: LineSocket) -> None:
        """Wait until QEMU has read a whole guest, and the other end still wants it to."""
        deadline = Deadline(ARRIVAL_TIMEOUT)
        while not qmp.event(['MIGRATION'], STATE_POLL, status='completed'):
            if deadline.passed() or peer.closed():
                raise MachineError(f'{self.name}: its QEMU does not take the guest in')


# === input ======================================================================================
KEY_HOLD = 10                   # ms that a key is down
KEY_PAUSE = 0.03                # s per key: faster ones pile up, and QEMU drops them unsaid
CLICK_PAUSE = 0.06              # s from the pointer's arrival to button down, and to up
POINTER_MAX = 32767             # QEMU's right and lower edge of any screen

SCHEMAS.update({
    'query-mice': [{'current': bool, 'absolute': bool}]})

KEY_NAMES: dict[str, str] = {
    'del': 'delete', 'enter': 'ret', 'return': 'ret', 'space': 'spc', 'escape': 'esc',
    'win': 'meta_l', 'super': 'meta_l', 'control': 'ctrl', 'ins': 'insert', 'pageup': 'pgup',
    'pagedown': 'pgdn', 'page_up': 'pgup', 'page_down': 'pgdn', 'printscreen': 'print',
    'prtsc': 'print', 'break': 'pause', 'numlock': 'num_lock', 'capslock': 'caps_lock',
    'scrolllock': 'scroll_lock', 'altgr': 'alt_r', 'windows': 'meta_l', 'cmd': 'meta_l',
    'bksp': 'backspace', 'period': 'dot', 'backtick': 'grave_accent', 'quote': 'apostrophe',
    'plus': '+', 'underscore': '_', 'tilde': '~', 'colon': ':', 'pipe': '|'}
# character -> its key on a US keyboard, and whether with shift
KEYS_OF: dict[str, tuple[str, bool]] = {
    **{c: (c, False) for c in 'abcdefghijklmnopqrstuvwxyz0123456789'},
    **{c: (c.lower(), True) for c in 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'},
    **{c: (key, True) for c, key in zip('!@#$%^&*()', '1234567890')},
    **{pair[place]: (key, bool(place)) for pair, key in {
        '-_': 'minus', '=+': 'equal', '[{': 'bracket_left', ']}': 'bracket_right',
        '\\|': 'backslash', ';:': 'semicolon', '\'"': 'apostrophe', '`~': 'grave_accent',
        ',<': 'comma', '.>': 'dot', '/?': 'slash'}.items() for place in (0, 1)},
    ' ': ('spc', False), '\n': ('ret', False), '\t': ('tab', False)}
BUTTONS = {1: 'left', 2: 'middle', 3: 'right', 4: 'wheel-up', 5: 'wheel-down'}


class Input(Part):
    """A machine's screen, keyboard and mouse."""

    def _picture(self, **form: Any) -> bytes:
        """Return what screendump writes, as a PPM or in the format asked for.

        Into a file of QEMU's user in root's directory, read by the descriptor that made it: of an
        fdset (add-fd) QEMU 7.2 never lets go.
        """
        path = self.file.path(f'screen-{os.urandom(4).hex()}')
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if os.geteuid() == 0:
                os.fchown(file, self.spec.uid, self.spec.uid)
            self.qemu.qmp('screendump', filename=path, **form)
            with open(file, 'rb', closefd=False) as picture:
                return picture.read(PICTURE_BYTES)
        finally:
            os.close(file)
            os.unlink(path)

    def picture(self) -> bytes:
        """Return a PNG of the screen."""
        try:
            return png(self._picture(format='png'), self.name)
        except QemuRefused:                     # before 7.1, or built without libpng
            return png(self._picture(), self.name)

    def screenshot(self, filename: str | os.PathLike[str]) -> str:
        """Write what the screen shows to a PNG file, and return its path (screendump)."""
        path, picture = image_path(filename), self.picture()
        write_whole(path, picture, replace=True)
        return path

    def _awake(self) -> None:
        if self.qemu.state() is not State.RUNNING:
            raise WrongState(f'{self.name} is {self.qemu.status()}: QEMU would drop its input',
                             'start or unfreeze it')

    def _press(self, qmp: QmpSession, keys: Sequence[str], hold: int = KEY_HOLD) -> None:
        qmp.execute('send-key', hold_time=hold,
                    keys=[{'type': 'qcode', 'data': key} for key in keys])
        time.sleep(KEY_PAUSE + hold / 1000)

    def send_key(self, keys: str, hold: int = KEY_HOLD) -> None:
        """Press keys together for `hold` ms: 'ctrl-alt-del', 'f2', 'a', 'A', '!' (send-key)."""
        check('hold', hold, a_number(0, 60_000, 'ms'), MachineError)
        self._awake()
        spoken = [KEY_NAMES.get(key.lower(), key)
                  for key in re.findall('[^-]+|(?<=-)-|-$', str(keys))]
        if not spoken:
            raise MachineError(f'{self.name}: no key to press', "name keys: 'ctrl-alt-del'")
        named = [KEYS_OF.get(key, (key.lower(), False))[0] for key in spoken]
        if any(KEYS_OF.get(key, (key, False))[1] and (len(spoken) == 1 or not key.isalpha())
               for key in spoken):              # of CTRL-C, C says the same as c
            named.insert(0, 'shift')
        with self.qemu.session() as qmp:
            try:
                self._press(qmp, named, hold)
            except QemuRefused as problem:
                known = ' '.join(sorted({*KEY_NAMES, *KEYS_OF})).strip()
                problem.hint = f'keys are {known}, and those that QEMU calls QKeyCode'
                raise

    def type_text(self, text: str) -> None:
        """Type on a US keyboard, no faster than QEMU takes it (send-key)."""
        strange = sorted({*text} - {*KEYS_OF, '\r'}) if isinstance(text, str) else text
        if strange or not isinstance(text, str):
            raise MachineError(f'{self.name}: no key for {strange!r:.80}',
                               'type what a US keyboard has')
        text = re.sub('\r\n?', '\n', text)             # each is one press of Enter
        self._awake()
        with self.qemu.session() as qmp:
            for key, shift in (KEYS_OF[c] for c in text):
                self._press(qmp, [*['shift'] * shift, key])

    def mouse_move(self, x: int, y: int) -> None:
        """Move the pointer to a place on the screen, in pixels (input-send-event), which takes a
        guest with a driver for tablets."""
        for place in (x, y):
            if not isinstance(place, (int, float)) or not abs(place) < 1 << 31:
                raise MachineError(f'{self.name}: mouse_move({x!r:.40}, {y!r:.40})',
                                   'give pixels from the upper left corner')
        self._awake()
        if not any(row['current'] and row['absolute'] for row in self.qemu.qmp('query-mice')):
            raise MachineError(f'{self.name}: the guest uses no absolute pointer',
                               'it needs a driver for USB or virtio tablets')
        size = struct.unpack('>II', self.picture()[16:24])
        self._send(*({'type': 'abs', 'data': {'axis': axis, 'value': round(
            min(max(place, 0), extent - 1) * POINTER_MAX / max(extent - 1, 1))}}
            for axis, place, extent in zip('xy', (x, y), size)))

    def mouse_click(self, button: int = 1) -> None:
        """Click where the pointer is: 1 left, 2 middle, 3 right, 4 and 5 the wheel."""
        if type(button) is not int or button not in BUTTONS:
            raise MachineError(f'{self.name}: mouse button {button!r:.80}', 'use 1 to 5')
        self._awake()
        for down in (True, False):
            time.sleep(CLICK_PAUSE)
            self._send({'type': 'btn', 'data': {'button': BUTTONS[button], 'down': down}})

    def _send(self, *events: Mapping[str, Any]) -> None:
        self.qemu.qmp('input-send-event', events=events)


# === console ====================================================================================
CONSOLE_TIMEOUT = 1.0           # for another writer to close the console, and for its last bytes


class Console(contextlib.AbstractContextManager['Console']):
    """A machine's serial console: all that it wrote since its start, and a way to type.

    Reading is from QEMU's log of it, so that nothing is missed while nobody looks, and many may
    look; one at a time may write.
    """

    def __init__(self, qemu: Qemu) -> None:
        self.qemu, self.name = qemu, qemu.name
        self.position = 0                       # in the log: what read() returned
        self._wire: socket.socket | None = None     # to write
        self._drainer: threading.Thread | None = None   # has the socket and the claim on it ...
        self._hung_up: list[Deadline] = []              # ... until QEMU closes it, or this

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another one write, when the guest has read what was typed, or does not."""
        wire = self._wire
        self._hang_up()
        if wire and self._drainer:
            self._drainer.join(CONSOLE_TIMEOUT)
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)
            self._drainer.join(CONSOLE_TIMEOUT)

    def _hang_up(self) -> None:
        """Type no more, but wait for nothing, which garbage collection may not."""
        wire, self._wire = self._wire, None
        if wire:
            self._hung_up.append(Deadline(CONSOLE_TIMEOUT))
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_WR)   # QEMU closes it when it has read all

    __del__ = _hang_up

    def read(self) -> bytes:
        """Return what was written since the last read(), CONSOLE_BYTES at a time."""
        path = self.qemu.file.path('console.log')
        with contextlib.suppress(FileNotFoundError), open(path, 'rb') as text:
            if os.fstat(text.fileno()).st_size < self.position:     # it was begun anew
                self.position = 0
            text.seek(self.position)
            data = text.read(CONSOLE_BYTES)
            self.position += len(data)
            return data
        return b''

    def expect(self, pattern: str | bytes, timeout: float = 30) -> str:
        """Read until the regular expression matches; return all up to the match's end, of the last
        2 * CONSOLE_BYTES.

        MachineError when it does not within `timeout` seconds; the next one reads that again.
        """
        deadline, seen = Deadline(timeout), b''
        try:
            compiled = re.compile(raw_bytes(pattern))
        except (re.error, TypeError, ValueError) as problem:
            raise MachineError(f'{self.name}: {pattern!r:.80} is no pattern: {problem}',
                               'give a regular expression') from None
        while True:
            seen = seen[-CONSOLE_BYTES:] + self.read()      # a guest may write for ever
            found = compiled.search(seen)
            if found:
                self.position -= len(seen) - found.end()
                return seen[:found.end()].decode(errors='replace')
            if deadline.passed() or not self.qemu.is_alive():
                self.position = max(0, self.position - len(seen))   # the next one reads it again
                tail = seen[-200:].decode(errors='replace')
                raise MachineError(f'{self.name}: no {pattern!r} on the console within '
                                   f'{timeout:g} s, only: …{tail!r}')
            time.sleep(STATE_POLL / 5)

    def write(self, data: bytes | str) -> None:
        """Type into the console; Busy when another one does, MachineError when the guest does not
        read what is typed."""
        name = self.name
        try:
            typed = raw_bytes(data)
        except (TypeError, ValueError):
            raise MachineError(f'{name}: can\'t type {data!r:.80}', 'give str or bytes') from None
        try:
            (self._wire or self._open()).sendall(typed)
        except (OSError, ProtocolError) as problem:
            self.close()
            raise MachineError(f'{name}: console: {explain(problem)}',
                               'nothing in the guest reads from it'
                               if isinstance(problem, socket.timeout) else '') from None

    def _open(self) -> socket.socket:
        """Connect to QEMU's end, which lets a second one wait without a word."""
        qemu, deadline = self.qemu, Deadline(CONSOLE_TIMEOUT)
        if not qemu.is_alive():
            raise WrongState(f'{qemu.name} is off', 'start it first')
        with contextlib.ExitStack() as keep:
            keep.enter_context(qemu.file.one_of('console', 1, deadline))
            if not deadline.poll(lambda: qemu.chardev('console').startswith('disconnected'),
                                 STATE_POLL / 10):
                raise Busy(f'{qemu.name}: another program has its console open', 'close it')
            wire = LineSocket.connect(qemu.socket('console'), Deadline(QMP_TIMEOUT)).socket
            keep.enter_context(wire)
            wire.settimeout(QMP_TIMEOUT)
            self._wire, self._hung_up = wire, []
            self._drainer = spawn(f'console {qemu.name}', self._drain, wire, keep.pop_all(),
                                  self._hung_up)
        return wire

    @staticmethod
    def _drain(wire: socket.socket, keep: contextlib.ExitStack, hung_up: Sequence[Deadline]
               ) -> None:
        """Throw away what the log has, too: unread, it would stop the guest's writing."""
        with keep, contextlib.suppress(OSError):        # closed
            while not (hung_up and hung_up[0].passed()):
                with contextlib.suppress(socket.timeout):
                    if not wire.recv(65536):
                        return


# === machine ====================================================================================
FIRST_UID = 0x766d0000          # machines' own users: above all that login.defs, subuid and
#                                 systemd give out, below 2^31
DISKS_TOLD = 8                  # disks of a machine that the log says have failed, in a second
REOPENED = 1.0                  # s until a guest that wakes up has its agent's port open again
MACHINES_POLL = 1.0             # s between two looks for machines that others started
CPU = re.compile(r'(?!help\b)[A-Za-z0-9][ -~]{0,250}')


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]


def require_disks(name: str, paths: Iterable[str | os.PathLike[str]]) -> None:
    """Raise DiskError if a machine is there and one of its disks is not: it shall not get an empty
    one without a word."""
    for path in paths if os.path.exists(os.path.join(MACHINES_DIR, name or '.', 'machine.json')) \
            else ():
        if not os.path.exists(image_path(path)):
            raise DiskError(f'machine {name} exists, but the disk {path} does not',
                            f'put it back, or see Machine.load({name!r}).harddrives')


def _own_disc(disc: CD | str | os.PathLike[str] | None) -> CD:
    """Return a CD for a drive; an object that is in another machine's goes on speaking of that."""
    if isinstance(disc, CD):
        return CD(disc.filename) if disc.attached else disc
    return CD(disc)


def newest_type() -> str:
    """Return the versioned machine type that q35 stands for in this QEMU."""
    shown = qemu_help('-M')
    found = re.search(r'alias of (pc-q35-[0-9.]+)', shown)
    if not found:
        raise MachineError(f'{QEMU} has no machine type q35', 'install qemu-system-x86')
    return found[1]


def name_limit() -> int:
    """Return how long a machine's name may be, so that its sockets' paths are not too long."""
    return max(0, min(63, HOME_LENGTH - 1 - len(os.fsencode(MACHINES_DIR))))


def _cards(nics: Any, namespace: str) -> list[VirtualNic | None]:
    if isinstance(nics, int):
        return [*VirtualNic.create_many(nics, namespace)] if nics else []
    return [None] if nics == 'user' else _several(nics)


def _are_nics(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 64 or value == 'user' or not isinstance(
        value, (int, str)) and all(nic is None or is_card(nic) for nic in _several(value))


def _is_word(text: Any) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(text, str) and b'\0' not in os.fsencode(text)
    return False


# argument of Machine -> whether a value of it is good, and what to say of another one
ARGUMENTS: dict[str, tuple[Callable[[Any], object], str]] = {
    'name': (lambda name: isinstance(name, str) and (not name or NAME.fullmatch(name)
                                                     and len(name) <= name_limit()),
             'use letters, digits, ".", "_", "-", at most {} for a machine in {}'),
    'memory': (lambda mib: type(mib) is int and 16 <= mib <= 1 << 24, 'use MiB, at least 16'),
    'maxmemory': (lambda mib: type(mib) is int and mib >= 0, 'use MiB, more than memory'),
    'cpus': (lambda count: type(count) is int and 1 <= count <= 255, 'use 1 to 255'),
    'cpu': (lambda cpu: isinstance(cpu, str) and CPU.fullmatch(cpu),
            "use auto, or what QEMU's -cpu takes, such as EPYC-v3"),
    'display': (lambda display: display in (None, '', 'vnc'), 'use None or vnc'),
    'monitor_port': (lambda port: port is None or type(port) is int and 0 <= port < 65536,
                     'use a TCP port'),
    'nics': (_are_nics, "use a number, a VirtualNic with a tap, a list of them, or 'user'"),
    **{name: (lambda text: isinstance(text, (str, os.PathLike)), 'is no string')
       for name in ('kernel', 'initrd')},
    'cmdline': (_is_word, 'is no string'),
    **{name: (lambda flag: isinstance(flag, bool), 'is no bool')
       for name in ('incoming', 'tpm')},
    **{name: (functools.partial(operator.contains, [*choices]), f'use {", ".join(choices)}')
       for name, choices in CHOICES.items()},
    'args': (lambda args: isinstance(args, (list, tuple)) and all(map(_is_word, args)),
             'use a list of strings'),
    'cds': (lambda cds: isinstance(cds, (list, tuple)), 'use a list, of one or more')}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise MachineError or NetworkError for an argument of Machine that can't be used."""
    for argument, (good, what) in ARGUMENTS.items():
        value = given[argument]
        if not good(value) or argument == 'maxmemory' and 0 < value <= given['memory']:
            raise MachineError(f'machine {given["name"]!r:.80}: {argument} {value!r:.80}: '
                               f'{what.format(name_limit(), MACHINES_DIR)}')
    valid_name(given['namespace'], 'namespace', empty=True)
    usable_accel(given['accel'])


def require_fit(given: Mapping[str, Any]) -> list[str]:
    """Raise MachineError for arguments of Machine that are not for each other; return forwards."""
    if given['cd'] and given['cds']:
        raise MachineError('cd and cds: only one of them', 'name all CDs in cds')
    nics = given['nics']
    return checked_forwards(given['forwards'], nics == 'user' or None in _several(nics))


def make_machines_dir() -> None:
    """Make MACHINES_DIR, if it is not there."""
    for place in (os.path.dirname(MACHINES_DIR), MACHINES_DIR):
        with contextlib.suppress(FileExistsError):
            os.makedirs(place)
            os.chmod(place, 0o711)      # nosec B103  # QEMU's user must come through


def _make_home(name: str) -> str:
    """Return the directory of a machine, or of the first free machineN, made if there is none."""
    try:
        make_machines_dir()
        closed = closed_ways(os.path.join(MACHINES_DIR, name or 'machine'))
        if closed and os.geteuid() == 0:
            raise MachineError(f'{MACHINES_DIR}: users other than root can\'t come through '
                               f'{closed[-1]}, and QEMU runs as one',
                               f'chmod o+x {shlex.quote(closed[-1])}, or say '
                               'VMMONITOR_MACHINES=')
        for chosen in [name] if name else (f'machine{number}' for number in range(1 << 16)):
            home = os.path.join(MACHINES_DIR, chosen)
            if len(chosen) > name_limit():
                raise MachineError(f'{home}: this path is too long for sockets in it',
                                   'say VMMONITOR_MACHINES= with a shorter one')
            with contextlib.suppress(FileExistsError):
                os.mkdir(home)
                os.chmod(home, 0o711)   # nosec B103  # ... here, too
                return home
    except OSError as problem:
        raise write_error(os.path.join(MACHINES_DIR, name), problem) from None
    return os.path.join(MACHINES_DIR, name)


def defaults_of(maker: Callable[..., object]) -> dict[str, Any]:
    """Return the arguments of a function or class, and their defaults."""
    return {name: row.default for name, row in inspect.signature(maker).parameters.items()}


def as_kept(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept in a file of a machine's arguments: those that are no defaults."""
    given = {name: arguments[name] for name, default in defaults_of(Machine).items()
             if name != 'name' and arguments[name] not in (default, [])}
    return dict(json.loads(json.dumps(given, default=lambda thing: (
        chain_of(thing) if isinstance(thing, Harddrive) else os.fsdecode(thing)
        if isinstance(thing, os.PathLike) else thing.name))))


def _uid(user: str | int | None, identity: str) -> int:
    if os.geteuid():
        if user not in (None, os.geteuid()):
            raise MachineError(f'user {user!r}: only root can start QEMU as another user')
        return int(os.geteuid())
    if user is None:
        return FIRST_UID + int(identity[:4], 16)
    try:
        uid = user if type(user) is int else int(pwd.getpwnam(user).pw_uid)     # type: ignore[arg-type]
        if 0 <= uid < 1 << 31:
            return uid
        raise ValueError(uid)
    except (KeyError, TypeError, ValueError):
        raise MachineError(f'user {user!r:.80}: no such user') from None


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return in what the arguments that a machine was made with are not those that are wanted."""
    one, other = ({**defaults_of(Machine), **given} for given in (made, wanted))
    return [f'{key} {one[key]!r}, not {other[key]!r}' for key in other if one[key] != other[key]]


class Power(DevicesPart):
    """How a machine comes to run and ends: what needs its QEMU, its devices and its memory."""

    def __init__(self, devices: Devices, memory: MemoryStream) -> None:
        super().__init__(devices)
        self.memory = memory

    def start(self, paused: bool) -> str:
        """Start QEMU, from the saved state if there is one; return what was done, in words."""
        with self.file.change():
            if self.qemu.is_alive():
                if self.spec.memory_at is not MemoryAt.SAVED:
                    return f'already {self.qemu.state().value}'
                self.qemu.end()                 # of a save or restore that was killed midway
            for device in [row for row in self.spec.devices if row.pending]:
                self.devices.drop(device)
            saved = self.spec.memory_place if self.spec.memory_at is MemoryAt.SAVED else ''
            now, then = processor_of(self.spec), self.spec.processor
            if saved and now != then:
                raise MachineError(
                    f'{self.name}: was saved with the processor {then}, and would start with {now}',
                    'start it where that is there (VMMONITOR_ACCEL=tcg or kvm), or delete_saved()')
            if not saved:                       # else it is told what it was told before
                for device in self.spec.of_kind('nic'):
                    device.facts.mtu = told_mtu(self.devices.thing(device))
            self.devices.start_qemu()
            goes_on = False
            try:
                self.devices.after_start()
                if self.spec.memory_at is MemoryAt.AWAITED:
                    return 'waiting for a migration'
                says = self.memory.restore(saved) if saved else 'started'
                self.file.move_memory(MemoryAt.HERE)    # it fits the disks until the guest runs
                goes_on = not paused
                if goes_on:
                    self.qemu.qmp('cont')
            except BaseException as problem:
                if saved and goes_on and not isinstance(problem, QemuRefused):
                    raise                       # it may run, and write to its disks
                self.qemu.end()
                if saved:
                    self.file.move_memory(MemoryAt.SAVED, saved)
                raise
            if saved == os.path.join(self.file.home, 'memory'):
                os.unlink(saved)
        return says

    def unfreeze(self, force: bool = False) -> None:
        check('force', force, a_bool, MachineError)
        with self.file.held():
            state = self.qemu.state()
            if state is State.CRASHED:
                raise WrongState(f'{self.name} has crashed', 'stop(force=True), then start it')
            if state is State.ASLEEP:           # for which QEMU's cont does nothing
                raise WrongState(f'{self.name} is asleep', 'start() wakes it')
            if self.spec.memory_at is MemoryAt.SAVED:
                raise WrongState(f'{self.name} was being saved or restored', 'use start')
            if self.spec.memory_at is MemoryAt.AWAITED:
                raise WrongState(f'{self.name} waits for a migration',
                                 'migrate() another machine to it, or stop(force=True)')
            if force and self.spec.memory_at is MemoryAt.GIVEN:
                self.file.move_memory(MemoryAt.HERE)
            self.qemu.require_not_given()
            if self.qemu.run_state() == 'prelaunch':    # who started it may have been killed
                self.devices.after_start()
            self.qemu.qmp('cont')

    def resume(self, state: State) -> str:
        if state in (State.PAUSED, State.CRASHED):
            self.unfreeze()
            return 'resumed'
        if state is State.ASLEEP:
            self.qemu.wake_up()
            return 'woken'
        return 'already running'

    def stop(self, force: bool = False, timeout: float = STOP_STEPS[0][1]) -> str:
        """Shut it down, and say what did it; return when it is off.

        The power button (system_powerdown, for `timeout` seconds), the agent (guest-shutdown),
        quit, SIGTERM, SIGKILL; with `force`, or when no guest is there to hear it, from quit on.
        The disks' caches are written by all but the last. Busy, without `force`, while another
        program or thread saves it, say.
        """
        if check('force', force, a_bool, MachineError) or not self._hears():
            return self.qemu.end()
        return self.qemu.end(('power button', timeout, self._press_power),
                             ('guest agent', STOP_STEPS[1][1], self._ask_agent),
                             ('guest agent', 0, self._hears))       # before it is cut off

    def _hears(self) -> bool:
        """Tell whether a guest is there to hear us. One that is being saved or snapshotted seems to
        hang, and must not be lost."""
        with contextlib.suppress(NoGuest), self.file.one_of('change', 1, Deadline(BUSY_TIMEOUT)):
            return self.qemu.has_live_guest()
        return False

    def _press_power(self) -> bool:
        try:
            if self.qemu.is_alive():
                self.resume(self.qemu.state())      # else it would not hear the button
                self.qemu.qmp('system_powerdown')
                return True
        except Busy:
            raise
        except GuestError:                          # it may end before it answers
            pass
        return False

    def _ask_agent(self) -> bool:
        try:
            if self.qemu.agent_state() == 'connected':
                self.qemu.agent('guest-shutdown', {'mode': 'powerdown'})
                return True
        except GuestError as problem:               # guest-shutdown has no answer
            return isinstance(problem, AgentError) and problem.trouble.name in ('silent',
                                                                                'not connected')
        return False

    def delete(self, force: bool = False) -> None:
        """Forget the machine, with the nics that were made for it and its saved memory; never
        its disks, nor a saved state in a file that you named. WrongState while it runs, without
        `force`. Twice is fine."""
        check('force', force, a_bool, MachineError)
        with contextlib.suppress(NoGuest), self.file.held():
            if self.qemu.is_alive() and not force:
                raise WrongState(f'{self.name} is running', 'stop it first, or use force=True')
            self.qemu.end()
            for device in [*self.spec.devices]:
                self.devices.drop(device)
            self.file.forget()


def handed(part: str, method: Callable[Concatenate[Any, Parameters], Result]
           ) -> Callable[Concatenate[Any, Parameters], Result]:
    """Return a method of a machine that hands on to one of its `part`, whose docstring it has."""
    def hand_on(machine: Any, /, *args: Parameters.args, **options: Parameters.kwargs) -> Result:
        does: Callable[Parameters, Result] = getattr(getattr(machine, part), method.__name__)
        return does(*args, **options)
    functools.update_wrapper(hand_on, method)
    return hand_on


class Machine(Guest):
    """A virtual machine under this program: QEMU, driven over QMP.

    `harddrives`, `cd` and `cds` are objects or paths (or a list); `nics` a VirtualNic, a list of
    them, a number of them to be made, or 'user' for QEMU's own NAT without any right, with
    `forwards` such as 'tcp:127.0.0.1:2222:22': that port of the host leads to port 22 of the guest.
    For guests without virtio drivers there are other `nic_model`s, a `disk_bus` (virtio, scsi,
    sata, nvme, usb), and `cds` instead of `cd`, drives on SATA. `firmware` is bios, uefi, or
    uefi-secure, which starts what is signed by a key of Microsoft's. `tpm` is a TPM 2.0 (swtpm).
    `args` is what else QEMU's command line is to say; a file named there is not opened for it, as
    all others are. See MODELS and VIDEO for what there is to choose from. `memory` and
    `maxmemory` (room for increase_ram) are MiB. `display` 'vnc' serves VNC on the socket `vnc`.
    `monitor_port` puts QEMU's own console (HMP) on that TCP port of 127.0.0.1, 0 on any. `user` is
    who QEMU runs as, when root starts it; without it, a user of its own. `incoming` has it wait
    for a migration. `cpu` is the processor, as QEMU's -cpu takes it, such as 'EPYC-v3' or
    'host,-arch-capabilities'; 'auto' is the host's ('host') under KVM, which only hosts of the same
    kind can take over, and without KVM all that QEMU can emulate ('max'). A machine stays when the
    program ends: Machine.load(name) finds it again, and so does making it with the same arguments,
    whatever was changed since. Raises MachineError when there is one that was made with others.
    """

    label = MACHINES_LABEL

    def __init__(self, name: str = '', harddrives: DriveLike | Sequence[DriveLike] | None = None,
                 nics: int | str | VirtualNic | Sequence[VirtualNic | None] | None = 0,
                 cd: CD | str | os.PathLike[str] | None = None,
                 memory: int = 1024, cpus: int = 1, namespace: str = '', firmware: str = 'bios',
                 accel: str = 'auto', kernel: str | os.PathLike[str] = '',
                 initrd: str | os.PathLike[str] = '', cmdline: str = '',
                 display: str | None = None, monitor_port: int | None = None, maxmemory: int = 0,
                 user: str | int | None = None, incoming: bool = False, cpu: str = 'auto',
                 forwards: Sequence[str] = (), nic_model: str = 'virtio', disk_bus: str = 'virtio',
                 cds: Sequence[CD | str | os.PathLike[str]] = (), tpm: bool = False,
                 video: str = 'std', args: Sequence[str] = ()) -> None:
        given = {**locals()}
        identity = Path('/proc/sys/kernel/random/uuid').read_text('utf-8').strip()
        check_arguments(given)
        leads = require_fit(given)
        uid = _uid(user, identity)
        kernel, initrd = (readable(path) if path else '' for path in (kernel, initrd))
        require_disks(name, [d for d in _several(harddrives) if not isinstance(d, Harddrive)])
        drives = [d if isinstance(d, Harddrive) else Harddrive(d) for d in _several(harddrives)]
        discs = [_own_disc(disc) for disc in (*cds, *[cd] * (not cds))]
        media = [disc.filename for disc in discs]
        given.update(harddrives=drives, kernel=kernel, initrd=initrd, forwards=leads, args=[*args],
                     cd=None if cds else media[0] or None, cds=media if cds else [],
                     nics=nics if isinstance(nics, (int, str)) else _several(nics))
        home = _make_home(name)
        file = MachineFile(home, MachineSpec(
            os.path.basename(home), identity, '', memory, cpus,
            maxmemory or (memory * 4 if memory >= HOTPLUG_RAM else 0), namespace, firmware, accel,
            kernel, initrd, cmdline, display or '', monitor_port, uid, 0, cpu=cpu, tpm=tpm,
            nic_model=nic_model, disk_bus=disk_bus, video=video, args=given['args'],
            memory_at=MemoryAt.AWAITED if incoming else MemoryAt.HERE, made=as_kept(given)))
        with file.one_of('change', 1, Deadline(BUSY_TIMEOUT)):
            if os.path.exists(file.path('machine.json')):
                self._take(file, [*drives, *given['nics']] if isinstance(given['nics'], list)
                           else drives, discs)
            elif os.path.exists(file.path('machine.json.copy')):
                raise MachineError(f'machine {name}: {home} has lost its machine.json',
                                   'rename its copy, machine.json.copy, or take the directory away')
            else:                               # also what is left of a program that was killed
                self._make(file, drives, nics, discs)

    def _take(self, file: MachineFile, things: Sequence[Any], discs: Sequence[CD]) -> None:
        """Be the machine that is there, if it was made with the same arguments."""
        there = MachineFile.open(file.name)
        other = differences(there.spec.made, file.spec.made)
        if other:
            raise MachineError(f'machine {file.name} exists, made with {"; ".join(other)}',
                               f'Machine.load({file.name!r}) takes it as it is; its delete(), '
                               f'or "vmmonitor delete {file.name}", leaves the disks')
        self._compose_parts(there)
        self.devices.recognise(things)
        for device, disc in zip(self.spec.of_kind('cd'), discs):
            self.devices.attach(device, disc)

    def _make(self, file: MachineFile, drives: Sequence[Harddrive], nics: Any, discs: Sequence[CD]
              ) -> None:
        spec, things = file.spec, list[Union[Harddrive, CD]]([*drives, *discs])
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(file.forget)
            for thing in things:
                on_failure.callback(setattr, thing, 'attached', thing.attached)
            spec.type = newest_type()
            require_hardware(spec)
            cards = _cards(nics, spec.namespace or file.name)
            for card in cards if isinstance(nics, int) else ():
                on_failure.callback(card.delete)    # type: ignore[union-attr]
            spec.namespace = spec.namespace or next(
                (card.namespace for card in cards if card), '')
            spec.ports = min(max(PORTS, len(drives) + len(cards) + SPARE_PORTS), PORTS_MAX)
            self._compose_parts(file)
            for drive in drives:
                self.devices.plan_disk(drive)
            for disc in discs:
                self.devices.plan_cd(disc, 'sata' if 'cds' in spec.made else 'scsi')
            for card in cards:
                self.devices.plan_nic(card, own=isinstance(nics, int))
            leads = spec.made.get('forwards')
            if leads:
                self.spec.of_kind('nic')[cards.index(None)].facts.forwards = leads
            self.devices.set_boot_order([row.id for kind in ('disk', 'cd')
                                         for row in spec.of_kind(kind)])
            self.file.write()
            on_failure.pop_all()

    def __repr__(self) -> str:
        with contextlib.suppress(GuestError):
            state = self.state().value
            disks, nics = (len(self.spec.of_kind(kind)) for kind in ('disk', 'nic'))
            return (f'Machine({self.name!r}, {state}, {disks} disk{"s" * (disks != 1)}, '
                    f'{nics} nic{"s" * (nics != 1)})')
        return f'Machine({self.name!r})'

    def _compose_parts(self, file: MachineFile) -> None:
        self.name, self.id, self.home, self.file = file.name, file.uuid, file.home, file
        self.qemu = Qemu(file)
        self.devices = Devices(self.qemu)
        self._ram = Ram(self.devices)
        self._captures = Captures(self.devices)
        self._memory = MemoryStream(self.qemu)
        self._power = Power(self.devices, self._memory)
        self._snapshots = Snapshots(self.devices)
        self._migration = Migration(self.devices, self._memory)
        self._input = Input(self.qemu)

    @classmethod
    def load(cls, name: str, repair: bool = False) -> Machine:
        """Return the machine `name`, running or not, that any program made; NoGuest if none.

        MachineError when its file is damaged; with `repair`, the copy of its last change takes
        its place, and the damaged one stays beside it, as machine.json.damaged.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise NoGuest(f'no machine is named {name!r:.80}')
        machine = cls.__new__(cls)
        file = MachineFile.repair(name) if repair else MachineFile.open(name)
        machine._compose_parts(file)
        return machine

    @classmethod
    def from_image(cls, name: str, image: str | os.PathLike[str], user: str = '',
                   ssh_key: str | os.PathLike[str] = '', size: float = 5, user_data: str = '',
                   network_config: str = '', disk: str | os.PathLike[str] = '', **options: Any
                   ) -> Machine:
        """Make a machine of a cloud image (qcow2, raw, also packed by xz), which is only read.

        Its disk, of at least `size` GiB, is a thin copy beside the image, or `disk`; cloud-init
        gets a CD beside that: a `user` with the public `ssh_key` (text, or a file), or your own
        `user_data`, and `network_config`. `options` are Machine's. What is there already stays,
        and is refused if another user has put it there, as in /tmp.
        """
        if bool(ssh_key) == bool(user_data) or user and user_data:
            raise MachineError(f'machine {name!r:.80}: nobody could log in, or not only as told',
                               'give an ssh_key, and perhaps a user, or user_data instead')
        if not isinstance(name, str) or not NAME.fullmatch(name) or {'cd', 'cds'} & {*options}:
            raise MachineError(f'machine {name!r:.80}: from_image needs a name, and its CD drive',
                               'insert() other CDs later')
        data = own_data(user_data) if user_data else login(user, ssh_key)
        base = base_image(image)
        path = image_path(disk or os.path.join(os.path.dirname(base.filename), f'{name}.qcow2'))
        if os.path.realpath(path) == os.path.realpath(base.filename):
            raise MachineError(f'machine {name}: its disk would be {path}, the image itself',
                               'name the machine otherwise, or another file as disk=')
        require_disks(name, [path])
        drive = Harddrive(path, size, backing=base)
        if not disk:
            require_not_planted(path, image_path(image))
        # cloud-init looks at all of it anew when the name of the instance is another one.
        digest = hashlib.sha256(f'{name}\0{data}\0{network_config}'.encode()).hexdigest()[:8]
        seed = f'{os.path.splitext(path)[0]}-seed-{digest}.iso'
        new = not os.path.exists(seed) and made_once(seed, CD.seed, data, json.dumps({
            'instance-id': f'{name}-{digest}', 'local-hostname': name}), seed, network_config)
        require_not_planted(seed, image_path(image))
        more = _several(options.pop('harddrives', None))
        try:
            return cls(name, harddrives=[drive, *more], cd=seed, **options)
        except BaseException:
            if new:
                remove_file(seed)
            raise

    # What one part has, or does, by itself.
    spec: MachineSpec = of_part('file.spec')
    cds: list[CD] = of_part('devices.cds', 'Its CD drives.')
    harddrives: list[Harddrive] = of_part('devices.harddrives', 'Its disks.')
    nics: list[VirtualNic | None] = of_part(
        'devices.nics', "Its network cards; None is QEMU's own NAT.")
    chardevs: dict[str, str] = of_part('devices.chardevs', "The host's ends of the guest's ports: "
                                       "name -> path ('' for a pty while it is off).")
    snapshots: list[MachineSnapshot] = of_part(
        '_snapshots.all', "The snapshots of the machine's disks as they are now, the oldest first.")
    pid = handed('qemu', Qemu.pid)
    is_alive = handed('qemu', Qemu.is_alive)
    status = handed('qemu', Qemu.status)
    wait = handed('qemu', Qemu.wait)
    monitor = handed('qemu', Qemu.session)
    qmp = handed('qemu', Qemu.qmp)
    events = handed('qemu', Qemu.events)
    chardev = handed('qemu', Qemu.chardev)
    agent_state = handed('qemu', Qemu.agent_state)
    stop = handed('_power', Power.stop)
    delete = handed('_power', Power.delete)
    add_nic = handed('devices', Devices.add_nic)
    del_nic = handed('devices', Devices.del_nic)
    nic_state = handed('devices', Devices.nic_state)
    capture = handed('_captures', Captures.capture)
    set_forwards = handed('devices', Devices.set_forwards)
    add_harddrive = handed('devices', Devices.add_harddrive)
    del_harddrive = handed('devices', Devices.del_harddrive)
    resize_harddrive = handed('devices', Devices.resize_harddrive)
    change_boot_device = handed('devices', Devices.change_boot_device)
    create_chardev = handed('devices', Devices.create_chardev)
    delete_chardev = handed('devices', Devices.delete_chardev)
    eject = handed('cd', CD.eject)
    insert = handed('cd', CD.insert)
    increase_ram = handed('_ram', Ram.increase_ram)
    balloon = handed('_ram', Ram.balloon)
    delete_saved = handed('_memory', MemoryStream.delete_saved)
    delete_snapshot = handed('_snapshots', Snapshots.delete)
    cancel_migration = handed('_migration', Migration.cancel)
    send_key = handed('_input', Input.send_key)
    type_text = handed('_input', Input.type_text)
    mouse_move = handed('_input', Input.mouse_move)
    mouse_click = handed('_input', Input.mouse_click)
    picture = handed('_input', Input.picture)
    screenshot = handed('_input', Input.screenshot)

    @property
    def cd(self) -> CD:
        """Its CD drive, the first if it has several."""
        return self.cds[0]

    def agent(self, command: str, arguments: Arguments = None,
              timeout: float = AGENT_TIMEOUT) -> Any:
        """Return what the guest agent answers, over a socket of its own."""
        try:
            return self.qemu.agent(command, arguments, timeout)
        except AgentError as problem:
            self._raise_if_frozen(command, problem)
            raise

    def save(self, file: str = '') -> str:
        """Save its memory to a file (or a place of its own) and end it; start goes on from there.

        Also with raw disks (QMP stop, getfd, migrate). On failure it goes on running.
        """
        if self.state() is State.ASLEEP:
            self.qemu.wake_up()
            self._await_waking(whole=True)
        with self._clock_kept():
            return self._memory.save(file)

    def dump_memory(self, filename: str | os.PathLike[str], format: str = 'elf',
                    progress: Callable[[int, int], object] | None = None, clock: bool = True
                    ) -> str:
        """Write the guest's memory to a new file, as elf or kdump-zlib; it stands still meanwhile
        (dump-guest-memory). `progress` gets bytes done and in all. Then the clock is set, as by
        snapshot()."""
        with self._clock_kept(clock):
            return self._memory.dump(filename, format, progress)

    def snapshot(self, tag: str = '', clock: bool = True) -> MachineSnapshot:
        """Snapshot memory and disks, or of a machine that is off the disks alone.

        It goes on as before: its clock, which stood still, is set, where an agent answers, unless
        `clock` is false. The answer's `uncovered` names the disks, raw ones, that are not in it.
        Raises MachineError with the job's own error (snapshot-save).
        """
        with self._clock_kept(clock):
            return self._snapshots.take(tag)

    def load_snapshot(self, tag: str, disks_only: bool = False, clock: bool = True) -> str:
        """Put memory and disks back to a snapshot, starting the machine if it is off; with
        `disks_only`, or a snapshot of the disks alone, the disks of a machine that is off.

        Memory that is not known to fit this machine is refused before anything is touched; when it
        fails none the less, the disks are put back. Then the clock is set, where an agent answers,
        unless `clock` is false (snapshot-load).
        """
        with unbroken():                        # a guest of the snapshot's time is half a load, too
            says = self._snapshots.load(tag, disks_only)
            return says + self._clock_set('reverted', clock and self.is_alive())

    def migrate(self, to: Machine | str, progress: Callable[[int, int], object] | None = None,
                timeout: float = JOB_TIMEOUT, clock: bool = True) -> str:
        """Move the guest to another Machine(..., incoming=True), or to "host:port" of one that
        waits in receive().

        Both must have the same devices and the same disks: on one host the same files, over TCP
        of the same format and size. `progress` is called with bytes done and in all;
        cancel_migration() ends it from another thread. Its clock is set there, where an agent
        answers, unless `clock` is false; over TCP receive() does that. After a failure the guest
        goes on here, and MachineError has the destination's own words; only when contact is lost at
        the very last step it stays paused, and the error says what to do (getfd, migrate).
        """
        with self._clock_kept(clock):
            if not isinstance(to, Machine):
                return self._migration.migrate(str(to), progress, timeout)
            says = self._migration.migrate(to._migration, progress, timeout)
        return says + to._clock_set('migrated', clock)

    def receive(self, port: int, timeout: float = 60.0, address: str = '', clock: bool = True
                ) -> str:
        """Wait on a TCP port for migrate('host:port') to this machine, which was started with
        incoming=True; return when the guest runs here, its clock set as by migrate().

        Raises MachineError when nobody came within `timeout` seconds, or the guest did not
        arrive. Open the port to hosts that you trust only: it takes the guest from anybody.
        """
        self._migration.receive_at(port, timeout, address)
        return 'arrived' + self._clock_set('migrated', clock)

    def send(self, what: bytes | str) -> str:
        """Press keys, b'ctrl-alt-f2', or run an HMP command, 'info block', and return its text,
        in which errors are, too (human-monitor-command)."""
        if isinstance(what, bytes):
            self.send_key(what.decode('ascii', 'replace'))
            return ''
        return str(self.qmp('human-monitor-command', command_line=what))

    def console(self) -> Console:
        """Return its serial console."""
        return Console(self.qemu)

    @property
    def vnc(self) -> str:
        """The path of the unix socket on which it serves VNC; '' without display='vnc'."""
        return self.file.path('vnc/vnc') if self.spec.display == 'vnc' else ''

    @property
    def monitor_port(self) -> int | None:
        """The TCP port of its HMP on 127.0.0.1; None if it has none, 0 until its first start."""
        self.file.refresh()
        return self.spec.monitor_port

    def start_vm(self, paused: bool = False, clock: bool = True) -> str:
        """Start QEMU, from the saved state if there is one; return what was done, in words. The
        clock of a guest that was saved is set, where an agent answers, unless `clock` is false.

        Raises MachineError with QEMU's own last words, DiskError for a disk that is in use.
        """
        says = self._power.start(paused)
        return says + self._clock_set('restored', clock and says == 'restored')

    def start(self, clock: bool = True) -> str:
        """Make it run, from whatever state: start_vm, cont or system_wakeup. Then set its clock,
        where an agent answers, unless `clock` is false."""
        before = self.status()
        if before.state in (State.OFF, State.SAVED) or (
                before.state is State.PAUSED and self.spec.memory_at is MemoryAt.SAVED):
            says = self.start_vm(clock=clock)
        else:
            says = self._power.resume(before.state)
            if clock and says == 'woken':               # the guest closed its agent's port to sleep
                Deadline(REOPENED).poll(lambda: self.agent_state() == 'connected')
            says += self._clock_set(says, clock and says in ('resumed', 'woken'))
        waits = self.spec.memory_at is MemoryAt.AWAITED or before.state is State.RUNNING
        return says if waits else self._settled(says, before)

    def power_button(self) -> None:
        """Press the ACPI power button (system_powerdown)."""
        self.qmp('system_powerdown')

    def power_off(self) -> str:
        """End it at once: stop(force=True)."""
        return self.stop(force=True)

    def discard(self) -> bool:
        """Forget the saved state: delete_saved()."""
        return self.delete_saved() != 'not saved'

    def freeze(self) -> None:
        """Stop its processors; twice is fine (QMP stop)."""
        self.qmp('stop')

    def unfreeze(self, force: bool = False, clock: bool = True) -> str:
        """Let its processors go on; twice is fine (QMP cont). Then set its clock, where an agent
        answers, unless `clock` is false. Return what was done, in words.

        WrongState for a guest that has crashed, sleeps, or is not whole, Busy while it is being
        saved or migrated. `force` is for one of which a migration that failed at the very end could
        not tell whether it runs at its destination: see there first.
        """
        self._power.unfreeze(force)
        return 'resumed' + self._clock_set('resumed', clock)

    def _change(self, verb: str) -> str | None:
        does: dict[str, Callable[[], str | None]] = {
            'pause': self.freeze, 'resume': self.unfreeze, 'reset': self.reset}
        if verb in does:
            return does[verb]()
        if not self._shut_down_by_agent('reboot'):
            self.send_key('ctrl-alt-del')           # there is no ACPI button for it
        return None

    def reset(self) -> None:
        """Press the reset button, which also ends unplugging (system_reset)."""
        self.qmp('system_reset')
        self.file.refresh()
        for device in [row for row in self.spec.devices if row.pending]:
            self.devices.remove(device.kind, device.id, UNPLUG_TIMEOUT)

    @contextlib.contextmanager
    def _clock_kept(self, wanted: bool = True) -> Iterator[None]:
        """Set the clock of a guest that runs after it has stood still meanwhile."""
        try:
            yield
        finally:
            with contextlib.suppress(GuestError):       # the outcome of what was done counts
                self._clock_set('resumed', wanted and self.is_alive())

    def _clock_set(self, cause: str, wanted: bool = True) -> str:
        """Set the clock of a guest that has stood still, if it can be; return ', ' and how."""
        if not wanted or self.qemu.run_state() != 'running' or self.agent_state() != 'connected':
            return ''
        try:
            self._sync(cause)
        except (AgentError, ClockError, Busy, WrongState) as problem:
            log.warning('%s: its clock is wrong: %s', self.name, explain(problem))
            return ', but its clock is wrong'
        return ', clock set'

    def sync_time(self, tolerance: float = 0.005, timeout: float = AGENT_TIMEOUT) -> Correction:
        """Set the guest's clock if it is off by more than `tolerance` seconds, and prove it."""
        return self._sync('sync', tolerance, timeout)

    def _sync(self, cause: str, tolerance: float = 0.005, timeout: float = AGENT_TIMEOUT
              ) -> Correction:
        result = Correction(self.name, cause)
        synchronise(self, Config(tolerance=tolerance * 1000, agent_wait=timeout, allow_exec=True),
                    result, threading.Event())
        return result

    def interfaces(self) -> list[dict[str, Any]]:
        """Return the guest's own view of its network (guest-network-get-interfaces)."""
        return list(self.agent('guest-network-get-interfaces'))


class DamagedMachine(Guest):
    """A machine whose file can't be used: it can be seen, stopped and deleted."""

    label = MACHINES_LABEL

    def __init__(self, name: str, problem: MachineError) -> None:
        self.name = self.id = name
        self.problem, self.damage = problem, problem.message
        home = os.path.join(MACHINES_DIR, name)
        known: dict[str, str] = {}              # what can still be read of it
        for file in ('machine.json', 'process.json'):
            with contextlib.suppress(OSError):
                text = read_own(os.path.join(home, file)).decode('utf-8', 'replace')
                known.update(re.findall(r'"(uuid|uid)": "?([0-9a-f-]{1,36})\b', text))
        self._file = MachineFile(home, MachineSpec(
            name, known.get('uuid', ''), '', 0, 0, 0, '', '', '', '', '', '', '', None,
            int(known['uid']) if known.get('uid', '').isdecimal() else 0, 0))
        self._process = Qemu(self._file)

    @property
    def _qemu(self) -> Qemu:
        """Its QEMU; of a file that can't even be read, whether that runs is not known."""
        if isinstance(self.problem, DamagedFile):
            return self._process
        raise self.problem

    def __repr__(self) -> str:
        return f'DamagedMachine({self.name!r})'

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise self.problem

    status = start = save = discard = agent = agent_state = power_button = _refuse
    _change = picture = _refuse

    def is_alive(self) -> bool:
        """Tell whether its QEMU runs, without asking it."""
        return self._qemu.is_alive()

    def is_off(self) -> bool:
        return not self.is_alive()

    def stop(self) -> str:
        """End its QEMU (quit, SIGTERM, SIGKILL), and say what did it."""
        return self._qemu.end()

    shut_down = power_off = stop

    def delete(self, force: bool = True) -> None:
        """Forget it; disks stay, and nics until --clean. WrongState if it runs, without `force`."""
        if self.is_alive() and not force:
            raise WrongState(f'{self.name} is running', 'stop it first, or use force=True')
        with self._file.one_of('change', 1, Deadline(BUSY_TIMEOUT)):
            self._qemu.end()
            self._file.forget()


class DirectoryChanges:
    """Tells when something changed in the directory of machines, a machine's, or its files
    (inotify(7)). Where the kernel can't, or has no room for more (fs.inotify.max_user_watches), it
    is time to look once in MACHINES_POLL."""

    # IN_ATTRIB | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE; IN_MODIFY
    NAMES, WRITES = 0x4 | 0x40 | 0x80 | 0x100 | 0x200, 0x2

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.bell, self.other = socket.socketpair()     # of ring()
        self.bell.setblocking(False)
        self.fd = -1
        self.blind = False                              # not all that was to be told will be

    def follow(self, root: str) -> None:
        """Have changes of `root` told, or of what is there of the way to it."""
        if self.fd < 0:
            self.fd = self.libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self.blind = self.fd < 0
        for path in (root, *map(str, Path(root).parents)):
            if self._add(path, self.NAMES):
                break
        for name in names_in(root):
            self._add(os.path.join(root, name), self.NAMES)
            for file in (*ITS_LOGS, 'machine.json', 'process.json'):
                self._add(os.path.join(root, name, file), self.WRITES)

    def _add(self, path: str, events: int) -> bool:
        added = self.libc.inotify_add_watch(self.fd, os.fsencode(path), events) >= 0
        self.blind |= not added and ctypes.get_errno() in (errno.ENOMEM, errno.ENOSPC)
        return bool(added)

    def wait(self) -> None:
        """Wait for a change or for ring()."""
        told = [self.bell.fileno(), self.fd]
        select.select(told[:1 + (self.fd >= 0)], [], [], MACHINES_POLL if self.blind else None)
        with contextlib.suppress(OSError):
            self.bell.recv(4096)
        with contextlib.suppress(OSError):
            os.read(self.fd, 1 << 16)

    def ring(self) -> None:
        """End wait()."""
        with contextlib.suppress(OSError):
            self.other.send(b'!')

    def close(self) -> None:
        """Give it back."""
        if self.fd >= 0:
            os.close(self.fd)
        self.bell.close()


class Machines:
    """The machines of this host, as `LibvirtHost` is the domains of a libvirt."""

    # event of QMP -> kind of GuestEvent
    EVENTS = {'RESUME': 'resumed', 'RESET': 'booted', 'WAKEUP': 'woken',
              'VSERPORT_CHANGE': 'agent connected', 'GUEST_PANICKED': 'stuck',
              'WATCHDOG': 'stuck'}

    def __init__(self) -> None:
        self.name = self.label = MACHINES_LABEL
        self.prefix, self.here = '', True
        self.up = threading.Event()                 # they are always there
        self.up.set()
        self.links = 1
        self.problem: Error | None = None
        self.stopping = threading.Event()
        self._changes: DirectoryChanges | None = None           # while they are watched
        # Name -> one with a thread for its events, and its session.
        self._followed: dict[str, tuple[Machine, QMP | None]] = {}
        self._warned: dict[str, str] = {}           # name -> what is wrong with it

    def find(self, name: str) -> Machine | DamagedMachine | None:
        try:
            return Machine.load(name)
        except NoGuest:
            return None
        except MachineError as problem:
            return DamagedMachine(name, problem)

    def all(self, running: bool = False) -> list[Guest]:
        """Return all machines, or those that run, by name: also those that hang, as they may."""
        found: list[Guest] = [*filter(None, map(self.find, sorted(names_in(MACHINES_DIR))))]
        if not running:
            return found
        # What became of its file since is nothing to one that is followed.
        followed = {name: machine for name, (machine, _) in list(self._followed.items())}
        found = [*{**{guest.name: guest for guest in found}, **followed}.values()]
        answers = ask_all(found, lambda guest: {
            'runs': guest.is_alive() if isinstance(guest, DamagedMachine)
            else guest.state() is State.RUNNING})
        return [guest for guest, known in zip(found, answers) if known.get(
            'runs', guest.name in followed or not isinstance(known.get('problem'), NoGuest))]

    def known(self) -> Mapping[str, Guest] | None:
        """Return {} if there are none: what else there is, files must be read for."""
        try:
            return None if os.listdir(MACHINES_DIR) else {}
        except OSError as problem:
            return {} if problem.errno == errno.ENOENT else None

    def watch(self, receive: Callable[[GuestEvent], None],
              changed: Callable[[], object] = lambda: None) -> None:
        self._changes = DirectoryChanges()
        spawn('machines', self._look, receive, self._changes)

    def _look(self, receive: Callable[[GuestEvent], None], changes: DirectoryChanges) -> None:
        kind = 'found'
        while not self.stopping.is_set():
            changes.follow(MACHINES_DIR)
            for machine in self.all():
                try:
                    self._look_at(machine, kind, receive)
                    if self._warned.pop(machine.name, '') and machine.name in self._followed:
                        receive(GuestEvent(machine, 'found', time.monotonic()))
                except (Error, OSError) as problem:
                    why = explain(problem)
                    if self._warned.get(machine.name) != why:
                        self._warned[machine.name] = why
                        log.warning('%s', why)
            kind = 'started'
            self.stopping.wait(MACHINES_POLL)       # for what else changes now
            changes.wait()
        changes.close()

    def _look_at(self, machine: Guest, kind: str, receive: Callable[[GuestEvent], None]) -> None:
        if isinstance(machine, DamagedMachine):
            raise machine.problem
        if isinstance(machine, Machine) and machine.is_alive():
            if machine.name not in self._followed:
                self._followed[machine.name] = machine, None
                try:
                    spawn(f'events {machine.name}', self._follow, machine, kind, receive)
                except Error:                           # no more threads
                    del self._followed[machine.name]
                    self._ring()
                    raise
            machine.qemu.trim_console()                 # which a full disk may not let us

    def _follow(self, machine: Machine, kind: str, receive: Callable[[GuestEvent], None]) -> None:
        why = ''
        try:
            with QMP(machine.qemu.socket('events')) as qmp:
                self._followed[machine.name], said = (machine, qmp), dict[str, Deadline]()
                why = FAILED                # if it does not say before that it ends
                for known in ('stuck', kind):           # the first, if it was before we came
                    receive(GuestEvent(machine, known, time.monotonic()))
                while not self.stopping.is_set():
                    with contextlib.suppress(PeerSilent):
                        event = qmp.event((*self.EVENTS, 'BLOCK_IO_ERROR', 'SHUTDOWN'), DAY)
                        data = event.get('data', {})
                        if event['event'] == 'SHUTDOWN':
                            why = ''
                        elif event['event'] == 'BLOCK_IO_ERROR':
                            self._tell_of_disk(machine.name, data, said)
                            receive(GuestEvent(machine, 'stuck', time.monotonic()))
                        elif data.get('open', True):
                            receive(GuestEvent(machine, self.EVENTS[event['event']],
                                               time.monotonic()))
        except ProtocolError as problem:
            log.debug('%s: events: %s', machine.name, explain(problem))
        finally:
            del self._followed[machine.name]
            self._ring()                # if it runs on, it is asked again
            receive(GuestEvent(machine, 'stopped', time.monotonic(), why))

    @staticmethod
    def _tell_of_disk(name: str, data: Mapping[str, Any], said: dict[str, Deadline]) -> None:
        """Log that a disk failed: of each once in a second, as QEMU before 10 tells of each
        request, and of DISKS_TOLD at most; `said` has what was."""
        for text in [text for text, until in said.items() if until.passed()]:
            del said[text]
        text = '{}: {} failed: {}; {}'.format(
            name, data.get('node-name') or data.get('device'), data.get('reason'),
            'it is paused: make space on the host, then start it'
            if data.get('action') == 'stop' else 'the guest was told')
        if text not in said and len(said) < DISKS_TOLD:
            said[text] = Deadline(1.0)
            log.warning('%s', text)

    def stop(self) -> None:
        self.stopping.set()
        self._ring()
        for qmp in [qmp for _, qmp in list(self._followed.values()) if qmp]:
            with contextlib.suppress(OSError):
                qmp.wire.socket.shutdown(socket.SHUT_RDWR)

    def _ring(self) -> None:
        if self._changes:
            self._changes.ring()


machines = Machines()


# === lab ========================================================================================
# A lab is a JSON file: what it is made of, by name, each with the arguments of what makes it here.
# Which arguments there are, and of what type, is said by that class or function alone.

LAB_FILE = 'lab.json'
LAB_TIMEOUT = 3600.0            # for what is done to all machines of a lab at once
INTERRUPTED_TIMEOUT = 60.0      # after Ctrl-C, for the step that each machine is at
SECTIONS: dict[str, Callable[..., Any]] = {         # in the order of making
    'switches': Switch, 'routers': Router, 'bonds': Bond, 'machines': Machine}
# A name in an argument's annotation -> what makes such a thing of an object in the file ...
INSIDE: dict[str, Callable[..., Any]] = {
    'DriveLike': Harddrive, 'Harddrive': Harddrive, 'VirtualNic': VirtualNic, 'CD': CD}
# ... or which plain values it takes, and what they are called.
PLAIN: dict[str, tuple[tuple[type, ...], str]] = {
    'bool': ((bool,), 'true or false'), 'int': ((int,), 'a whole number'),
    'float': ((int, float), 'a number'), 'PathLike': ((str,), 'a path'),
    'DriveLike': ((str,), 'a path'), 'str': ((str,), 'a string'),
    'Mapping': ((dict,), 'an object'), 'None': ((type(None),), 'null')}
NETWORK_SECTIONS = 'switches', 'routers', 'bonds'
KIND_NAMES = {'switches': 'switch', 'routers': 'router', 'bonds': 'bond', 'machines': 'machine',
              'nics': 'nic'}
LAB_VERSION = 1                 # of the file in which a lab writes down what it has made
SCHEMAS['lab'] = {'version': int, 'lab': str, 'made': {'*': {'*': str}}}


def must_be(good: Callable[[Any], object], what: str) -> Reader:
    """Return a reader of values that are `good`."""
    def read(value: Any) -> Any:
        if not good(value):
            raise InvalidValue(what)
        return value
    return read


# Argument -> what returns a good value of it, or raises what is wrong with another.
VALUES: dict[str, Callable[[Any], object]] = {
    'ifname': functools.partial(valid_name, what='nic', empty=True),
    'sink': functools.partial(valid_name, empty=True),
    'namespace': functools.partial(valid_name, what='namespace', empty=True),
    'mac': lambda mac: mac and valid_mac(mac), 'trunk': name_of,
    'subnet': lambda subnet: subnet and valid_address(subnet, ipaddress.IPv4Network),
    'hosts': lambda hosts: valid_hosts(hosts or {}),
    'mode': one_of(*Bond.MODES), 'miimon': MIIMON, 'format': one_of('qcow2', 'raw'),
    'routers': require_nat, 'machines': require_fit,    # of such a thing: all of them
    'size': must_be(lambda gib: 0 < gib < 1 << 20, 'must be a number of GiB, more than 0'),
    'accel': one_of('auto', 'kvm', 'tcg'), 'forwards': lambda all_: checked_forwards(all_, True)}


def a_value(key: str, value: Any) -> Any:
    """Return a value of an argument, if it is a good one by VALUES."""
    try:
        VALUES.get(key, bool)(value)
    except InvalidValue:
        raise
    except Error as problem:
        raise InvalidValue(problem.message, problem.hint) from None
    return value


def an_argument(annotation: str, place: str) -> Reader:
    """Return a reader of what an argument with that annotation takes; a path counts from `place`.
    An object becomes the arguments of the Harddrive, CD or VirtualNic that it stands for."""
    # 'str | Sequence[CD | None]' -> {'str': '', 'Sequence': 'CD | None'}
    kinds = {name.rpartition('.')[2]: inner for name, inner in re.findall(
        r'([\w.]+)(?:\[((?:[^][]|\[[^]]*\])*)\])?', annotation)}
    plain = {kind: what for name, row in PLAIN.items() if name in kinds for kind in row[0]
             for what in [row[1]]}
    inside = next((INSIDE[name] for name in kinds if name in INSIDE), None)

    def read(value: Any) -> Any:
        if isinstance(value, dict) and inside:
            return an_object(inside, place)(value)
        if isinstance(value, list) and 'Sequence' in kinds:
            item = an_argument(kinds['Sequence'], place)
            return read_each((f'[{number}]', one, item) for number, one in enumerate(value))
        if type(value) not in plain:
            lists = ['a list'] * ('Sequence' in kinds)
            raise InvalidValue('must be ' + ' or '.join(dict.fromkeys(
                [*plain.values(), *['an object'] * bool(inside), *lists])))
        if value and isinstance(value, str) and kinds.keys() & {'PathLike', 'DriveLike'} \
                and not SSH_KEY.fullmatch(value):
            return os.path.abspath(os.path.join(place, os.path.expanduser(a_text(value))))
        return value
    return read


def an_object(maker: Callable[..., Any], place: str, but: Iterable[str] = ('self', 'name')
              ) -> Reader:
    """Return a reader of an object with the arguments of a class or function, all but some; where
    others are handed on, they are Machine's."""
    rows: dict[str, inspect.Parameter] = {}
    for source in (maker, Machine)[:1 + ('options' in inspect.signature(maker).parameters)]:
        rows = {**inspect.signature(source).parameters, **rows}
    rows = {name: row for name, row in rows.items() if name not in {*but, 'options'}}

    def member(key: str) -> Reader:
        if key not in rows:
            return must_be(lambda _: False, unknown(key, rows))
        plain = an_argument(str(rows[key].annotation), place)

        def read(value: Any) -> Any:
            return a_value(key, plain(value))
        if rows[key] != inspect.signature(Machine).parameters.get(key) or key not in ARGUMENTS:
            return read
        good, what = ARGUMENTS[key]
        fits = must_be(lambda one: isinstance(one, (list, dict)) or good(one), what)
        return lambda value: fits(read(value))

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise InvalidValue('must be an object, such as {' + ', '.join(
                f'"{name}": …' for name in [*rows][:2]) + '}')
        return dict(zip(value, read_each([
            *((key, one, member(key)) for key, one in value.items()),
            *((name, None, must_be(bool, 'missing')) for name, row in rows.items()
              if (row.default is row.empty or name == 'filename' and maker is Harddrive)
              and name not in value)])))
    return read


class End(NamedTuple):
    """An end of a link: a switch, router or bond, or a machine's network card of that number."""

    name: str
    nic: int = -1

    def __str__(self) -> str:
        return f'{self.name}:{self.nic}' if self.nic >= 0 else self.name


class Cable(NamedTuple):
    """A link of a lab, and the arguments of VirtualNic.impair() for it."""

    ends: tuple[End, End]
    worse: dict[str, float]

    def __str__(self) -> str:
        return ' - '.join(map(str, self.ends))


def lab_path(path: str | os.PathLike[str]) -> str:
    """Return what a lab's file is called, by whichever way to its directory it was named."""
    place, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(place), name)


class LabFile:
    """What a lab's file says; ConfigError has all that is wrong in it."""

    def __init__(self, path: str) -> None:
        self.path = lab_path(path)
        try:
            tree = parse_json(read_file(path, f'write one, or name another instead of {LAB_FILE}'),
                              unique=True)
            if not isinstance(tree, dict):
                raise ValueError('must be an object: {"machines": {...}, ...}')
            self.kinds: dict[str, str] = {}                 # name -> its section
            self.sections: dict[str, dict[str, dict[str, Any]]] = {key: {} for key in SECTIONS}
            self.cables: list[Cable] = []
            self.nics: dict[str, list[dict[str, Any] | None]] = {}  # machine -> arguments; None is
            #                                                         QEMU's own NAT
            self._read(tree)
        except InvalidValue as problem:
            raise ConfigError(path, [f'{where}: {why}' for where, why in problem.places]) from None
        except ValueError as reason:
            raise ConfigError(path, [f'not JSON: {reason}']) from None

    def _read(self, tree: dict[str, Any]) -> None:
        place = os.path.dirname(self.path)
        again = [(f'{section}.{name}', f'is one of {self.kinds[name]}, too') for section in SECTIONS
                 for name in (tree.get(section) or {} if isinstance(tree.get(section), dict)
                              else {}) if self.kinds.setdefault(name, section) != section]
        readers: dict[str, Reader] = {
            'links': a_list(self._cable, 'links, such as ["web", "lan"]', object),
            **{section: functools.partial(self._section, section, place) for section in SECTIONS}}
        read_each([
            *((key, value, readers.get(key) or must_be(lambda _: False, unknown(key, readers)))
              for key, value in tree.items()),
            *((where, why, must_be(lambda _: False, why)) for where, why in again),
            ('', None, lambda _: self._number_cards())])

    def _section(self, section: str, place: str, value: Any) -> None:
        """Read a section: names, each with arguments."""
        def arguments(given: Any) -> Any:
            image = section == 'machines' and isinstance(given, dict) and 'image' in given
            found = an_object(Machine.from_image if image else SECTIONS[section], place)(given)
            a_value(section, {**defaults_of(SECTIONS[section]), **found})
            return found
        good, what = ARGUMENTS['name'] if section == 'machines' else (
            lambda name: len(name) <= NAME_LENGTH and NAME.fullmatch(name),
            f'use at most {NAME_LENGTH} letters, digits, ".", "_", "-"')
        named = must_be(lambda name: name and good(name), f'can\'t be a name; {what}'.format(
            name_limit(), MACHINES_DIR))
        if not isinstance(value, dict):
            raise InvalidValue('must be an object: {"NAME": {...}, ...}')
        found = read_each([*((name, one, arguments) for name, one in value.items()),
                           *((name, name, named) for name in value)])
        self.sections[section] = dict(zip(value, found))

    def _cable(self, value: Any) -> None:
        """Read a link: its ends, or an object with them and what makes it worse."""
        value = dict(value) if isinstance(value, dict) else {'ends': value}
        ends: tuple[End, ...]
        ends, *_ = read_each([
            ('ends', value.pop('ends', ()), a_list(self._end)),
            ('', {key: value[key] for key in value.keys() - IMPAIRMENTS.keys()},
             an_object(VirtualNic.impair, '')),
            *((key, value[key], read) for key, read in IMPAIRMENTS.items() if key in value)])
        kinds = {self.kinds[end.name] for end in ends}
        if len(ends) != 2 or ends[0] == ends[1] and ends[0].nic < 0 and kinds != {'machines'}:
            raise InvalidValue('must have two ends, such as ["web", "lan"]')
        if 'bonds' in kinds and (value or kinds - {'switches', 'bonds'} or len(kinds) < 2):
            raise InvalidValue('a bond can be linked to switches only, as it is')
        self.cables.append(Cable((ends[0], ends[1]), value))

    def _end(self, value: str) -> End:
        """Read an end of a link: NAME, or MACHINE:NUMBER."""
        name, colon, number = value.partition(':')
        if name not in self.kinds:
            raise InvalidValue(f'{name!r:.60} is ' + unknown(
                name, self.kinds, f'write it down in {", ".join(SECTIONS)}, too'))
        if colon and not (re.fullmatch('[0-9]{1,2}', number) and self.kinds[name] == 'machines'):
            raise InvalidValue(f'{value!r:.60}: only a machine\'s nics have numbers, 0 to 99')
        return End(name, int(number) if colon else -1)

    def _number_cards(self) -> None:
        """Give each link's end at a machine the number of a nic, and each machine as many nics."""
        ends = [end for cable in self.cables for end in cable.ends]
        taken = {end for end in ends if end.nic >= 0}
        problems = [('links', f'{end} is in two of them') for end in taken if ends.count(end) > 1]

        def numbered(end: End) -> End:
            if end.nic < 0 and self.kinds[end.name] == 'machines':
                end = next(free for free in map(End, itertools.repeat(end.name), itertools.count())
                           if free not in taken)
                taken.add(end)
            return end
        self.cables = [cable._replace(ends=(numbered(cable.ends[0]), numbered(cable.ends[1])))
                       for cable in self.cables]
        for name, given in self.sections['machines'].items():
            wanted = max((end.nic for end in taken if end.name == name), default=-1) + 1
            nics = given.get('nics', wanted)
            cards = [{}] * nics if isinstance(nics, int) else [] if isinstance(nics, str) else \
                _several(nics)
            if wanted > len(cards) or any(end.name == name and cards[end.nic] is None
                                          for end in taken):
                problems.append((f'machines.{name}.nics', 'are too few for the links; leave it '
                                 f'out, or have {wanted}'))
            self.nics[name] = [card if card is None else {
                'ifname': f'{name}-p{number}', 'namespace': given.get('namespace') or name,
                **{key: value for key, value in card.items() if value}}
                for number, card in enumerate(cards)]
        problems += [*self._rings(), *self._twice()]
        if problems:
            raise InvalidValue('', places=problems)

    def _rings(self) -> Iterator[tuple[str, str]]:
        """Yield the places of links that are there twice, or close a ring of networks."""
        ways: list[set[str]] = []
        joined = {name: {name} for name, kind in self.kinds.items() if kind != 'machines'}
        for cable in self.cables:
            way = {end.name for end in cable.ends}
            if way <= joined.keys():
                groups = [joined[name] for name in way]
                if way in ways:
                    yield 'links', f'{cable} is there twice; leave one out'
                elif groups[0] is groups[1]:
                    yield ('links', f'{cable} closes a ring, in which frames would go round for '
                           'ever; leave one of its links out')
                joined.update(dict.fromkeys(set.union(*groups), set.union(*groups)))
                ways.append(way)

    def _twice(self) -> Iterator[tuple[str, str]]:
        """Yield the places of nics whose name is another thing's, too, and of such disks."""
        ports = {name: name for name, kind in self.kinds.items() if kind != 'machines'}
        disks: dict[str, str] = {}
        for name, given in self.sections['machines'].items():
            for number, card in enumerate(self.nics[name]):
                end = End(name, number)
                if card and ports.setdefault(self.port(end), str(end)) != str(end):
                    yield (f'machines.{name}.nics', f'{self.port(end)} is the name of '
                           f'{ports[self.port(end)]}, too; choose another ifname')
            for drive in _several(given.get('harddrives')):
                path = drive['filename'] if isinstance(drive, dict) else drive
                if path in disks:
                    yield (f'machines.{name}.harddrives', f'{path} is a disk of {disks[path]} '
                           'already; give each a file of its own')
                disks[path] = name

    def networks(self) -> bool:
        """Tell whether there is more than machines, or they have more than QEMU's own NAT."""
        return any(map(any, self.nics.values())) or bool({*self.kinds.values()} - {'machines'})

    def facts(self, names: Mapping[str, str]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return what shall be made of networks, by the names in the Registry: kind and facts;
        `names` has interfaces by all that they are called."""
        found = {name: (KIND_NAMES[kind], {'mode': given.get('mode')}) for kind, rows in
                 self.sections.items() if kind != 'machines' for name, given in rows.items()}
        for name, given in self.sections['routers'].items():
            subnet = given.get('subnet')
            found[name][1].update(
                {key: given.get(key) for key in ('nat', 'dhcp')},
                trunk=names.get(given['trunk'], given['trunk']),
                hosts=valid_hosts(given.get('hosts') or {}),
                subnet=subnet and valid_address(subnet, ipaddress.IPv4Network))
        for name, given in self.sections['bonds'].items():
            found[name][1]['interfaces'] = [names.get(one, one) for one in given['interfaces']]
        for end, card in self.cards().items():
            found[self.port(end)] = 'nic', {'mac': card.get('mac', '').lower(),
                                            'sink': card.get('sink')}
        return found

    def cards(self) -> dict[End, dict[str, Any]]:
        """Return the nics that are made for machines, with their arguments."""
        return {End(name, number): card for name, rows in self.nics.items()
                for number, card in enumerate(rows) if card}

    def joining(self, cable: Cable, records: Mapping[str, Record], network: NetworkState) -> str:
        """Return what up() would do of a link that is not there, in words."""
        for port in [self.port(end) for end in cable.ends if end.nic >= 0]:
            others = {network.links[port].master if port in network.links else '', *(
                end for row in records.values() if row.kind == 'cable' and port in row.parents
                for end in row.parents)} - {'', port}
            if others:
                return f'refuse {cable}: {port} is connected to {", ".join(others)}'
        return f'connect {cable}'

    def port(self, end: End) -> str:
        """Return the interface of this host that an end is."""
        card = self.nics[end.name][end.nic] if end.nic >= 0 else None
        return short_name(card['ifname']) if card else end.name


def read_worse(note: str) -> dict[str, float]:
    """Return what a lab wrote down to have made a link worse by; nothing, if that was not whole."""
    with contextlib.suppress(ValueError):
        return dict(checked('worse', parse_json(note), {'*': float}))
    return {}


def drop_absent(made: dict[str, dict[str, str]], before: Mapping[str, Mapping[str, str]]) -> None:
    """Take what was not there before, and is not now, off the list of what a lab has made."""
    there: dict[str, Callable[[str], object]] = {
        'machines': lambda name: os.path.exists(os.path.join(MACHINES_DIR, name)),
        'disks': os.path.exists}
    if made.keys() - there.keys():
        registry = Registry.read()
        there.update(dict.fromkeys(made.keys() - there.keys(), {
            **registry.damaged, **registry.records}.__contains__))
    made.update({kind: {name: row for name, row in names.items()
                        if name in before.get(kind, ()) or there[kind](name)}
                 for kind, names in made.items()})


def note_groups(made: Mapping[str, dict[str, str]], before: Mapping[str, Record]) -> None:
    """Add to what a lab has made the groups of networks that were not there `before`: they tell
    them from later ones of their names."""
    now = Registry.read().records
    for names in (names for kind, names in made.items() if kind in NETWORK_SECTIONS):
        for name in names.keys() & now.keys():
            stood = name in before and before[name].group == now[name].group
            names[name] = stood and names[name] or str(now[name].group)


def delete_networks(made: Mapping[str, Mapping[str, str]], force: bool,
                    ending: Sequence[str] | None = None) -> dict[str, str]:
    """Delete the networks that a lab has made, or look, as delete_names() with `ending`; return
    what came of each. Another one of their names stays."""
    now = Registry.read().records
    groups = {name: group for kind in ('nics', *NETWORK_SECTIONS)
              for name, group in made.get(kind, {}).items()}
    said = {name: 'is another one by now, and stays' for name, group in groups.items()
            if group and name in now and group != str(now[name].group)}
    there = delete_names((name for name in groups if name not in said), force, ending)
    return {**said, **dict.fromkeys(there, 'deleted')}


def require_free(path: str, ending: Sequence[str] = ()) -> None:
    """Raise DiskError when a machine, but for the `ending` ones, has a disk."""
    with open(open_file(path), 'rb') as image:
        locked = bytes_locked(image.fileno(), *IMAGE_LOCKS)
    who = (holder_of(path) or 'a machine') if locked else ''
    if who and not is_of(who, ending):
        raise DiskError(f'{path}: {who} has it open', 'stop that first')
    for name in (name for name, _ in machines_with(path) if name not in ending):
        raise DiskError(f'{path}: machine {name} has it, too',
                        'delete that machine first, or keep the disks')


def find_made(name: str, known: str) -> Machine | DamagedMachine | str:
    """Return a machine that up() has made, or what there is of one, or why there is none."""
    home = os.path.join(MACHINES_DIR, name)
    machine = machines.find(name) or (DamagedMachine(name, DamagedFile(
        home, name, 'it was not finished')) if os.path.isdir(home) else None)
    if machine is None:
        return 'is gone'
    if isinstance(machine, Machine) and known not in ('', machine.id):
        return 'is another machine by now, and stays'
    return machine


def plan_down(made: Mapping[str, Mapping[str, str]], disks: bool) -> Iterator[str]:
    """Yield what down() would do, by the same checks; what is refused ends it."""
    def line(what: str, why: str) -> str:
        return f'delete {what}' if why == 'deleted' else \
            f'leave {what}, which {why}' if why else f'keep {what}'
    ending = []
    for name, known in made.get('machines', {}).items():
        found = find_made(name, known)
        ending += [name] * (not isinstance(found, str))
        yield line(f'machine {name}', found if isinstance(found, str) else 'deleted')
    kinds = {name: KIND_NAMES[kind] for kind in ('nics', *NETWORK_SECTIONS)
             for name in made.get(kind, ())}
    said, refused = dict[str, str](), list[str]()
    try:
        if kinds:
            said = {**dict.fromkeys(kinds, 'is gone'), **delete_networks(made, False, ending)}
        for path in made.get('disks', ()) if disks else ():
            if os.path.exists(path):
                require_free(path, ending)
            said[path] = 'deleted' if os.path.exists(path) else 'is gone'
    except Error as problem:
        refused = [f'refuse {explain(problem)}']
    for name, kind in (kinds | dict.fromkeys(made.get('disks', ()), 'disk')).items():
        yield line(f'{kind} {name}', said.get(name, ''))
    yield from refused


def declared_chain(drive: Any) -> list[list[str]]:
    """Return files and formats of a disk in a lab's file and what it stands on, as chain_of()."""
    if not drive:
        return []
    row = drive if isinstance(drive, dict) else {'filename': drive}
    return [[row['filename'], row.get('format', 'qcow2')], *declared_chain(row.get('backing'))]


def about(name: str, problem: BaseException) -> BaseException:
    """Have an error say which of a lab's things it is about; return it."""
    if isinstance(problem, Error) and not re.match(rf"(machine )?'?{re.escape(name)}(?![\w.-])",
                                                   problem.message):
        problem.message = f'{name}: {problem.message}'
    return problem


def at_once(what: str, names: Iterable[str], work: Callable[[str], Result],
            stopping: threading.Event | None = None) -> dict[str, Result]:
    """Do something for several names at once; return the outcomes, or raise what went wrong.

    Ctrl-C sets `stopping`, and waits until each has come to the end of its step.
    """
    futures: dict[str, concurrent.futures.Future[Result]] = {}
    try:
        with unbroken():                        # each that runs is known, and waited for
            futures.update({name: in_thread(f'{what} {name}', work, name) for name in names})
        deadline = Deadline(LAB_TIMEOUT)
        for future in futures.values():
            ended(future, deadline)
    except KeyboardInterrupt:
        if stopping:
            stopping.set()
        concurrent.futures.wait(futures.values(), INTERRUPTED_TIMEOUT)
        raise
    problems = {name: future.exception() if future.done() else
                MachineError(f'{name}: no end of this ({what}) within {LAB_TIMEOUT:g} s')
                for name, future in futures.items()}
    wrong = [about(name, problem) for name, problem in problems.items() if problem]
    for problem in wrong:
        if len(wrong) == 1 or not isinstance(problem, Error):
            raise problem
    if wrong:
        raise MachineError(f'{len(wrong)} of {len(futures)}: '
                           + '; '.join(map(explain, wrong)))
    return {name: future.result() for name, future in futures.items()}


class Lab:
    """Machines, switches, routers, bonds and links that a JSON file describes.

    Lab.load('lab.json').up() makes what is not there, and changes nothing else; so it goes on after
    an error or a crash. What it makes is written down first, in a file of this host; down() takes
    away just that, whatever the lab's file says by then. What was there before is used, and stays.
    Raises ConfigError with all that is wrong in the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = lab_path(path)
        self._stopping = threading.Event()
        self._at_work = set[str]()                  # machines that up() has not done with
        self._noting = threading.Lock()             # guards what is written down
        self._place = os.path.join(MACHINES_DIR, '.labs', hashlib.sha256(
            os.fsencode(self.path)).hexdigest()[:16])

    @classmethod
    def load(cls, path: str | os.PathLike[str] = LAB_FILE) -> Lab:
        """Read a lab's file."""
        lab = cls(path)
        lab.file = LabFile(str(path))
        return lab

    def __repr__(self) -> str:
        return f'Lab({self.path!r})'

    @functools.cached_property
    def file(self) -> LabFile:
        """What the file says."""
        return LabFile(self.path)

    # What was made: kind -> name -> what tells it from another one of that name.

    def made(self) -> dict[str, dict[str, str]]:
        """Return what this lab has made and not taken away: machines, nics, switches ..., disks."""
        try:
            known = checked('lab', parse_json(read_own(self._place)))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as problem:
            raise FileError(f'{self._place}: what {self.path} has made can\'t be read: '
                            f'{explain(problem)}', 'delete its machines, disks and networks one by '
                            'one (vmmonitor delete, clean), then this file') from None
        if known['version'] > LAB_VERSION:
            raise FileError(f'{self._place}: is of a newer version', 'use the newer vmmonitor')
        return dict(known['made'])

    def _note(self, change: Callable[[dict[str, dict[str, str]]], object]) -> None:
        """Write down what is about to be made, or has gone."""
        with self._noting:
            made = self.made()
            before = json.dumps(made)
            change(made)
            left = {kind: names for kind, names in made.items() if names}
            if left and json.dumps(left) != before:
                try:
                    make_machines_dir()
                    os.makedirs(os.path.dirname(self._place), mode=0o700, exist_ok=True)
                except OSError as problem:
                    raise write_error(self._place, problem) from None
                write_whole(self._place, json.dumps({
                    'version': LAB_VERSION, 'lab': self.path, 'made': left}).encode(), replace=True)
            elif not left:
                remove_file(self._place)

    def _note_new(self, kind: str, names: Mapping[str, str]) -> None:
        """Write down the names of what is not there, and so shall be ours."""
        if names:
            self._note(lambda made: made.setdefault(kind, {}).update(names))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one at work on this lab; Busy after BUSY_TIMEOUT."""
        with turn(f'vmmonitor lab {self._place}', Deadline(BUSY_TIMEOUT)) as holder:
            if holder is not None:
                raise Busy(f'{self.path}: process {holder or "unknown"} is at work on this lab',
                           'try later')
            yield

    # up

    def up(self, done: Callable[[str], object] = bool, wait: str = '') -> list[str]:
        """Make what is not there, and start the machines, all at once; return what was done. `done`
        is called with the name of each machine that is up; with `wait` ('agent'), it is waited for.

        What stands is not touched; what stands with other arguments is refused, and named.
        """
        check('wait', wait, one_of('', *GUEST_ENDS), MachineError)
        did = list[str]()
        with self.alone():
            self._stopping.clear()                      # set by an earlier Ctrl-C
            self._at_work = set()
            before = self.made()
            try:
                self._make_networks(did)
                self._make_machines(did, done, wait)
            except BaseException:                       # what could not be made is not ours
                if not self._at_work:                   # (a second Ctrl-C: it may still be made)
                    self._note(lambda made: drop_absent(made, before))
                raise
        return did

    def _make_machines(self, did: list[str], done: Callable[[str], object], wait: str) -> None:
        given = self.file.sections['machines']
        new = [name for name in given if machines.find(name) is None]
        self._note_new('machines', dict.fromkeys(new, ''))
        self._note_new('disks', {path: '' for name in given for path in self._disks(name)
                                 if not os.path.exists(path) and path not in self._had(name)})

        def bring_up(name: str) -> None:
            machine = self._make_machine(name)
            if self.made().get('machines', {}).get(name) == '':     # not another one by now
                self._note_new('machines', {name: machine.id})
            says = ['made'] * (name in new)
            if not self._stopping.is_set():
                says += [text for text in [machine.start()] if text != 'already running']
            if wait and not self._stopping.is_set() and not Deadline(LAB_TIMEOUT).poll(
                    lambda: self._stopping.is_set() or GUEST_ENDS[wait](machine)):
                raise GuestError(f'{name}: is up, but not {wait}')
            did.extend([f'{name}: {", ".join(says)}'] * bool(says))
            done(name)

        def work(name: str, all_: set[str] = self._at_work) -> None:
            all_.add(name)
            try:
                bring_up(name)
            finally:
                all_.discard(name)
        at_once('up', given, work, self._stopping)

    def _make_networks(self, did: list[str]) -> None:
        file = self.file
        if not file.networks():
            return
        known = Registry.read().records
        for kind in NETWORK_SECTIONS:
            self._note_new(kind, {name: '' for name in file.sections[kind] if name not in known})
            for name, given in file.sections[kind].items():
                try:
                    SECTIONS[kind](name=name, **given)
                except Error as problem:
                    raise about(name, problem) from None
                did += [f'{name}: made'] * (name not in known)
        self._note(lambda made: note_groups(made, known))
        self._make_cards(known)
        seen = self._seen()
        for cable in file.cables:
            if self._carrier(cable, *seen) is None:
                self._connect(cable)
                did.append(f'{cable}: connected')
        if 'worse' in self.made() or any(cable.worse for cable in file.cables):
            self._impair(did)

    def _make_cards(self, known: Mapping[str, Record]) -> None:
        """Make the machines' nics, those of a switch connected to it: all that can be in one go."""
        file = self.file
        plugs = {end: other for cable in file.cables for end, other in (
            cable.ends, cable.ends[::-1]) if end.nic >= 0 and other.nic < 0}
        cards = file.cards()
        self._note_new('nics', {port: '' for port in map(file.port, cards) if port not in known})
        if cards:
            with transaction() as plan:
                for end, card in cards.items():
                    long = valid_name(card['ifname'], 'nic')
                    plan_nic(plan, long, 'macvtap', card.get('sink', ''), card['namespace'],
                             valid_mac(card['mac']) if card.get('mac') else '',
                             plugs[end].name if end in plugs else '')

    def _seen(self) -> tuple[Mapping[str, Record], NetworkState]:
        return (Registry.read().records, read_network()) if self.file.networks() else (
            {}, NetworkState({}, [], 0))

    def _carrier(self, cable: Cable, records: Mapping[str, Record], network: NetworkState
                 ) -> str | None:
        """Return the nic that a link goes through ('' for a bond's), None if it is not there."""
        one, other = map(self.file.port, cable.ends)
        for here, there in ((one, other), (other, one)):
            if here in network.links and network.links[here].master == there:
                return here if here in records and records[here].kind == 'nic' else ''
        for name, row in records.items():
            if set(row.parents) == {one, other} and (row.kind == 'cable' or name in network.links):
                return one if row.kind == 'cable' else name
            master = network.links[name].master if name in network.links else ''
            if row.parents and {row.parents[0], master} == {one, other}:    # a router's LAN port
                return name
        return None

    def _connect(self, cable: Cable) -> None:
        def thing(end: End) -> Any:
            if end.nic >= 0:
                return VirtualNic.known(self.file.port(end))
            kind = self.file.kinds[end.name]
            return SECTIONS[kind](name=end.name, **self.file.sections[kind][end.name])
        one, other = sorted(cable.ends, key=lambda end: (
            end.nic < 0, self.file.kinds[end.name] == 'bonds'))
        thing(one).connect(thing(other))

    def _impair(self, did: list[str]) -> None:
        """Make links as bad as the file says, and those good again of which it says so no more."""
        seen, before = self._seen(), self.made().get('worse', {})
        links = {carrier: cable for cable in self.file.cables
                 for carrier in [self._carrier(cable, *seen)] if carrier}
        worse = {name: json.dumps(cable.worse) for name, cable in links.items() if cable.worse}
        new = [name for name in worse if before.get(name) != worse[name]]
        self._note_new('worse', dict.fromkeys(new, ''))         # '': not yet, or by half
        for name in (before.keys() - worse.keys()) & seen[0].keys() & seen[1].links.keys():
            VirtualNic.known(name, seen[0]).impair()
            did.append(f'{links.get(name, name)}: no longer impaired')
        for name in worse:
            VirtualNic.known(name, seen[0]).impair(**links[name].worse)
            did += [f'{links[name]}: impaired'] * (name in new)
        if before != worse:
            self._note(lambda made: made.update(worse=worse))

    def _make_machine(self, name: str) -> Machine:
        given = dict(self.file.sections['machines'][name])
        require_disks(name, self._had(name) & {*self._disks(name)})
        drives = [self._drive(drive) for drive in _several(given.get('harddrives'))]
        cards = self.file.nics[name]
        if cards:
            records = Registry.read().records
            given['nics'] = [card and VirtualNic.known(self.file.port(End(name, number)), records)
                             for number, card in enumerate(cards)]
        for key in ('cd', 'cds'):
            if isinstance(given.get(key), (dict, list)):
                discs = [CD(**disc) if isinstance(disc, dict) else disc
                         for disc in _several(given[key])]
                given[key] = discs if isinstance(given[key], list) else discs[0]
        if drives:
            given['harddrives'] = drives
        if 'image' not in given:
            return Machine(name, **given)
        disk = self._thin_copy(name)
        machine = Machine.from_image(name, **{**given, 'disk': disk})
        if name in self.made().get('machines', {}):
            self._note_new('disks', {machine.spec.made['cd']: ''})      # its seed
        return machine

    def _thin_copy(self, name: str) -> str:
        """Return the disk of a machine that is made of an image: beside the lab's file."""
        return str(self.file.sections['machines'][name].get('disk') or os.path.join(
            os.path.dirname(self.path), f'{name}.qcow2'))

    @staticmethod
    def _had(name: str) -> set[str]:
        """Return the files of the disks that a machine has already: none of those is made."""
        there = machines.find(name)
        return {path for disk in there.spec.of_kind('disk') for path, _ in disk.facts.chain
                } if isinstance(there, Machine) else set()

    def _disks(self, name: str) -> Iterator[str]:
        """Yield the files of a machine's disks, and of what they stand on."""
        given = self.file.sections['machines'][name]
        yield from [self._thin_copy(name)] * ('image' in given)
        for drive in _several(given.get('harddrives')):
            yield from (path for path, _ in declared_chain(drive))

    def _drive(self, given: Any) -> Harddrive:
        """Make a disk, and what it stands on."""
        given = dict(given) if isinstance(given, dict) else {'filename': given}
        if isinstance(given.get('backing'), dict):
            given['backing'] = self._drive(given['backing'])
        return Harddrive(**given)

    # down

    def down(self, disks: bool = False, force: bool = False, done: Callable[[str], object] = bool
             ) -> list[str]:
        """Shut down the machines that up() has made, all at once, and remove all that it has made
        but for the disks; also what is half made. Return what was done.

        With `disks` those go, too; `force` cuts the machines' power, and takes what others use.
        """
        for what, flag in (('disks', disks), ('force', force)):
            check(what, flag, a_bool, MachineError)
        did = list[str]()
        with self.alone():
            made = self.made()

            def end(name: str) -> None:
                did.append(f'{name}: {self._end(name, made["machines"][name], force or disks)}')
                done(name)
            at_once('down', made.get('machines', {}), end)
            self._note(lambda now: now.pop('machines', None))
            if made.keys() & {'nics', *NETWORK_SECTIONS}:
                did += map(': '.join, delete_networks(made, force).items())
                self._note(lambda now: [now.pop(kind, None)
                                        for kind in ('nics', *NETWORK_SECTIONS, 'worse')])
            for path in made.get('disks', {}) if disks else ():
                if os.path.exists(path):
                    require_free(path)
                    os.unlink(path)
                    did.append(f'{path}: deleted')
                self._note(lambda now, path=path: now['disks'].pop(path))   # type: ignore[misc]
        return did

    def _end(self, name: str, known: str, force: bool) -> str:
        """Shut down and delete a machine, or what there is of one."""
        machine = find_made(name, known)
        if isinstance(machine, str):
            return machine
        says = machine.stop() if isinstance(machine, DamagedMachine) else machine.stop(force)
        machine.delete(force=True)
        return f'{says}, deleted'

    # What is there

    def plan(self, down: bool = False, disks: bool = False) -> list[str]:
        """Return what up() would do now, or with `down`, what down() would."""
        made = self.made()
        if down:
            return [*plan_down(made, disks)]
        lines, rows = [], {row['name']: row for row in self.status()}
        for kind in SECTIONS:
            for name in self.file.sections[kind]:
                state = rows[name]['state']
                if state == 'absent':
                    lines.append(f'make {KIND_NAMES[kind]} {name}')
                elif state == 'damaged':
                    lines.append(f'refuse machine {name}, which is damaged')
                    continue
                elif kind == 'machines':
                    made_of = MachineFile.open(name).spec.made
                    other = differences(made_of, self._kept(name, made_of))
                    lines += [f'refuse machine {name}, made with {"; ".join(other)}'] * bool(other)
                if kind == 'machines' and state != 'running':
                    lines.append(f'start machine {name}')
        records, network = self._seen()
        lines += self._refused(records, network)
        for cable in self.file.cables:
            row = rows[str(cable)]
            if row['state'] == 'absent':
                lines.append(self.file.joining(cable, records, network))
            now = {key: row[key] for key in IMPAIRMENTS if key in row}
            if now != cable.worse or cable.worse and row['state'] == 'absent':
                lines.append(f'{"impair" if cable.worse else "no longer impair"} {cable}')
        return lines + [f'keep {KIND_NAMES[kind]} {name}, which the file has no more: "down" '
                        'removes it' for kind in SECTIONS for name in made.get(kind, ())
                        if self.file.kinds.get(name) != kind]

    def _refused(self, records: Mapping[str, Record], network: NetworkState) -> Iterator[str]:
        """Yield what up() would refuse of networks, as it stands with other arguments."""
        names = {name: link.name for link in network.links.values() for name in link.names}
        for name, (kind, facts) in self.file.facts(names).items():
            if name in network.links and name in records and records[name].stage == 'ready':
                other = records[name].other(kind, facts)
                if other:
                    yield f'refuse {kind} {name}, which exists as {other}'

    def _kept(self, name: str, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return what would be kept of a machine's arguments, as by as_kept(); make nothing. What
        an image is made to is taken to be as `before`."""
        def medium(disc: Any) -> Any:
            return disc.get('filename') if isinstance(disc, dict) else disc
        given = {**defaults_of(Machine), **self.file.sections['machines'][name]}
        given['harddrives'] = [*map(declared_chain, _several(given['harddrives']))]
        for key in {'cd', 'cds'} & given.keys():
            given[key] = [medium(one) or '' for one in given[key]] if isinstance(
                given[key], (list, tuple)) else medium(given[key]) or None
        if self.file.nics[name]:
            given['nics'] = [card and self.file.port(End(name, number))
                             for number, card in enumerate(self.file.nics[name])]
        if 'image' in given:
            given.update({key: before.get(key, defaults_of(Machine)[key])
                          for key in ('harddrives', 'cd', 'user')})
        return as_kept(given)

    def status(self) -> list[dict[str, Any]]:
        """Return what there is of the lab: for each switch, router, bond, machine and link of the
        file its kind, name and state, of a link also its `ends` and what makes it worse."""
        (records, network), impaired = self._seen(), dict[str, str]()
        with contextlib.suppress(FileError):            # up() and down() say that
            impaired = self.made().get('worse', {})
        rows: list[dict[str, Any]] = []
        guests = {name: machines.find(name) for name in self.file.sections['machines']}
        states = ask_all([one for one in guests.values() if one], lambda guest: {
            'state': 'damaged' if guest.damage else guest.state().value})
        known = {row['name']: row.get('state', 'unknown') for row in states}
        for name, kind in self.file.kinds.items():
            state = known.get(name, 'absent') if kind == 'machines' else \
                network.links[name].state if name in network.links else 'absent'
            rows.append({'kind': KIND_NAMES[kind], 'name': name, 'state': state})
        pulled = {row.facts.name for guest in guests.values() if isinstance(guest, Machine)
                  for row in guest.spec.of_kind('nic') if not row.facts.up}
        good = {name for name, link in network.links.items() if link.state in ('up', 'unknown')}
        for cable in self.file.cables:
            carrier = self._carrier(cable, records, network)
            ports = {carrier or '', *map(self.file.port, cable.ends)} & network.links.keys()
            down = ports - (good - pulled)
            rows.append({'kind': 'link', 'name': str(cable), 'ends': [*map(str, cable.ends)],
                         'state': 'absent' if carrier is None else 'down' if down else 'up',
                         **(cable.worse if carrier is None else read_worse(
                             impaired.get(carrier, '')))})
        return rows

    def graph(self, dot: bool = False) -> str:
        """Return a drawing of who is connected to whom, for a terminal, or in Graphviz's DOT."""
        rows = self.status()
        links = [(row, ', '.join([*[row['state']] * (row['state'] != 'up'), *(
            f'{key} {row[key]:g}' for key in IMPAIRMENTS if key in row)]))
            for row in rows if row['kind'] == 'link']
        things = {row['name']: f'{row["kind"]}, {row["state"]}' for row in rows
                  if row['kind'] != 'link'}
        if dot:
            shapes = {row['name']: 'box' if row['kind'] == 'machine' else 'ellipse' for row in rows}
            return '\n'.join([
                f'graph {json.dumps(os.path.basename(self.path))} {{',
                *(f'  "{name}" [shape={shapes[name]}, label="{name}\\n{text}"];'
                  for name, text in things.items()),
                *('  ' + ' -- '.join(f'"{end.partition(":")[0]}"' for end in row['ends'])
                  + f' [label="{text}"{"" if row["state"] == "up" else ", style=dashed"}];'
                  for row, text in links), '}'])
        lines = []
        for name, text in things.items():
            lines.append(f'{name}  ({text})')
            mine = [(row['ends'], text) for row, text in links
                    if name in [end.partition(':')[0] for end in row['ends']]]
            for number, (ends, text) in enumerate(mine, 1):
                one, other = ends if ends[0].partition(':')[0] == name else ends[::-1]
                here = f'{one} ── '.partition(':')[2]       # of a machine, which nic it is
                lines.append(f' {"└" if number == len(mine) else "├"}─ {here}{other}'
                             + (text and f'  ({text})'))
        return '\n'.join(lines)

    # Snapshots

    @property
    def machines(self) -> dict[str, Machine]:
        """Its machines, by name; NoGuest for one that is not there."""
        return {name: Machine.load(name) for name in self.file.sections['machines']}

    @contextlib.contextmanager
    def _still(self, ran: Mapping[str, Machine], then: Mapping[str, Machine]) -> Iterator[None]:
        """Have machines stand still together, and `then` go on together, with right clocks."""
        try:
            at_once('freeze', ran, lambda name: ran[name].freeze())
            yield
        finally:
            at_once('unfreeze', [name for name in then if then[name].is_alive()],
                    lambda name: then[name].unfreeze())

    def snapshot(self, tag: str) -> str:
        """Snapshot all machines, memory and disks, at one moment: they stand still together. One
        that is off gives its disks. All snapshots are made, or none. Return what was done."""
        checked_tag(tag)
        with self.alone(), unbroken():
            all_ = self.machines
            for name, machine in all_.items():
                if tag in [row.tag for row in machine.snapshots]:
                    raise MachineError(f'{name}: has a snapshot {tag}', 'name another')
            ran = {name: machine for name, machine in all_.items()
                   if machine.state() is State.RUNNING}
            with self._still(ran, ran):
                try:
                    at_once('snapshot', all_, lambda name: all_[name].snapshot(tag))
                except BaseException:
                    for machine in all_.values():
                        try:
                            if tag in [row.tag for row in machine.snapshots]:
                                machine.delete_snapshot(tag)
                        except Error as problem:        # is in no other's way
                            log.warning('%s', explain(about(machine.name, problem)))
                    raise
        return f'snapshot {tag} of {", ".join(all_)}'

    def load_snapshot(self, tag: str) -> str:
        """Put all machines back to a snapshot(): those that it has memory of go on together from
        there, started if they are off; the others are off then. Return what was done."""
        with self.alone(), unbroken():
            all_ = self.machines
            with_memory = {}
            for name, machine in all_.items():
                found = [row for row in machine.snapshots if row.tag == tag]
                if not found:
                    raise MachineError(f'{name}: has no snapshot {tag}', 'snapshot all, then load')
                machine.qemu.require_not_saved()
                if found[0].ram:
                    with_memory[name] = machine

            def load(name: str) -> None:
                off = not all_[name].is_alive()
                if name not in with_memory:
                    all_[name].stop(force=True)
                elif off:
                    all_[name].start_vm(paused=True)
                try:
                    all_[name].load_snapshot(tag, clock=False)
                except BaseException:
                    if off:                             # as it was
                        all_[name].stop(force=True)
                    raise
            ran = {name: machine for name, machine in with_memory.items()
                   if machine.state() is State.RUNNING}
            with self._still(ran, with_memory):
                at_once('load', all_, load)
        return f'{", ".join(all_)}: put back to {tag}'


# ### part 4: command line ########################################################################

# === installation ===============================================================================
# install.sh finds and installs packages, and leaves the rest to `--setup`. Root trusts no directory
# that another user owns: install.sh has refused those before it ran this.

UNIT = '/etc/systemd/system/vmmonitor.service'
DROPIN = f'{UNIT}.d/machines.conf'
CREATED_BY = 'vmmonitor service'    # in the account of a user that was made here
SETUP_TIMEOUT = 90                  # seconds; of a program, such as a start by systemctl
CERTIFICATE_ADDRESSES = 50          # at most in a certificate
LIBVIRT_WAIT = 10                   # seconds for a libvirt that was started to answer
STEPPED_RESTARTS = 254              # the systemd that can restart with growing pauses
# The program is the last: the service runs nothing else, so one rename makes a new version count.
PROGRAM_FILES = {'install.sh': 0o755, 'vmmonitor.service': 0o644, 'config.json.sample': 0o644,
                 'vmmonitor.py': 0o755}

LAUNCHER = 'vmmonitor'      # in HERE; what the service runs
COMMAND = '/usr/local/bin/vmmonitor'
COMPLETIONS = '/usr/local/share/bash-completion/completions/vmmonitor'
COMMAND_TEXT = """#!{python} -I
# By vmmonitor's install.sh: runs {here}/vmmonitor.py from its cached bytecode.
import importlib.util
import sys
spec = importlib.util.spec_from_file_location('vmmonitor', '{here}/vmmonitor.py')
program = sys.modules['vmmonitor'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
program.exit_now(program.main())
"""
# What install() may make, and uninstall() remove, whatever the record says.
MADE = {*PROGRAM_FILES, LAUNCHER, COMMAND, COMPLETIONS, 'config.json', 'cert.pem', 'key.pem'}

# Prints where Python keeps the bytecode of a file, NUL, and the bytecode.
BYTECODE = '''
import importlib.util, os, py_compile, sys, tempfile
with tempfile.TemporaryDirectory() as place:
    made = py_compile.compile(sys.argv[1], os.path.join(place, 'made'), doraise=True)
    with open(made, 'rb') as file:
        where = os.fsencode(importlib.util.cache_from_source(sys.argv[1]))
        sys.stdout.buffer.write(where + bytes(1) + file.read())
'''
SCHEMAS['.installed'] = {'files': {'*': str}, 'joined': bool, 'places': [str]}


class Service(NamedTuple):
    """What the installed unit says."""

    here: str = ''              # the directory it runs in; '' if there is none
    account: str = ''           # its user
    machines: bool = False      # with machines made by the library, and so as root

    @classmethod
    def read(cls) -> Service:
        try:
            text = Path(UNIT).read_text('utf-8', 'replace')
        except OSError:
            return cls()
        here = re.search(r'(?m)^ExecStart=.* (/.*)/vmmonitor(?:\.py)?$', text)
        account = re.search(r'(?m)^User=(.*)$', text)
        return cls(here[1] if here else '', account[1] if account else '', os.path.exists(DROPIN))

    @classmethod
    def of(cls, path: str) -> Service | None:
        """Return it if this file is its program, and `path` its configuration."""
        service = cls.read()
        own = os.path.dirname(os.path.realpath(__file__))
        ours = service.here and os.path.realpath(service.here) == own
        named = os.path.join(own, 'config.json')
        return service if ours and os.path.realpath(path) == os.path.realpath(named) else None


def attempt(*argv: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program, whatever comes of it."""
    return run(argv, SETUP_TIMEOUT, check=False)


def systemctl(*words: str) -> subprocess.CompletedProcess[bytes]:
    """Run systemctl, whatever comes of it."""
    return attempt('systemctl', *words)


def as_user(account: str, *argv: str) -> bool:
    """Tell whether a program ends well when this user runs it."""
    return not attempt('runuser', '-u', account, '--', *argv).returncode


def is_roots(path: str) -> bool:
    """Tell whether a program is root's, and none but root can put another one in its place."""
    names = Path(path), Path(os.path.realpath(path))
    infos = [place.stat() for name in names for place in (name, *name.parents)]
    return all(info.st_uid == 0 and (not info.st_mode & 0o022 or info.st_mode & stat.S_ISVTX)
               for info in infos)


class Changes:
    """What is changed on this host, and how that is taken back: all of it is done, or nothing."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], object]] = []      # the last one is carried out first
        self.interrupted = False                        # by a signal; it counts at the next step

    def interrupt(self, _number: int, _frame: Any) -> None:
        """Note a signal: a step that has begun comes to its end."""
        self.interrupted = True

    def step(self, undo: Callable[[], object]) -> None:
        """Note how the next step is undone."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.undo.append(undo)

    def do(self, argv: Sequence[str], back: Sequence[str], why: str) -> None:
        """Run a program, and `back` if it is to be taken back; Error(why) if it fails."""
        self.step(lambda: attempt(*back))
        try:
            run(argv, SETUP_TIMEOUT)
        except CommandError as problem:
            raise Error(f'{why}: {problem.stderr.strip() or problem}') from None

    def keep(self, path: str) -> tuple[bytes, int, int, int] | None:
        """Note how a file is put back that is about to be changed: contents, mode, group and owner
        now; None: there is none, or a link, which may lead nowhere."""
        if os.path.islink(path):
            self.step(functools.partial(os.symlink, os.readlink(path), path))
            self.step(lambda: remove_file(path))
            return None
        if not os.path.lexists(path):
            self.step(lambda: os.unlink(path))
            return None
        info = os.stat(path)
        was = (Path(path).read_bytes(), stat.S_IMODE(info.st_mode), info.st_gid)
        self.step(lambda: _write_owned(path, *was, info.st_mtime_ns))
        return (*was, info.st_uid)

    def put(self, path: str, data: bytes | None, mode: int = 0, group: int = 0) -> None:
        """Have a file of root's with these contents, written whole; None: no such file."""
        if self.keep(path) == (data, mode, group, 0):
            return
        if data is not None:
            _write_owned(path, data, mode, group)
        elif os.path.lexists(path):
            os.unlink(path)

    def directory(self, path: str) -> None:
        if not os.path.isdir(path):
            self.directory(os.path.dirname(path))
            self.step(lambda: os.rmdir(path))
            os.mkdir(path, 0o755)

    def take_back(self) -> None:
        """Bring back all as it was, as far as that goes."""
        while self.undo:
            with contextlib.suppress(OSError, Error):
                self.undo.pop()()


def _write_owned(path: str, data: bytes, mode: int, group: int, mtime: int = 0) -> None:
    """Write a file of root's whole; `mtime` (ns) gives it its old time back."""
    def own(file: int) -> None:
        os.chown(file, 0, group)
        os.chmod(file, mode)
        if mtime:
            os.utime(file, ns=(mtime, mtime))
    write_whole(path, data, replace=True, dress=own)


class SetupRecord:
    """HERE/.installed: what was made there, so that only that is ever changed or taken away."""

    def __init__(self, here: str) -> None:
        self.path, known = os.path.join(here, '.installed'), dict[str, Any]()
        with contextlib.suppress(FileNotFoundError):
            try:
                known = checked('.installed', parse_json(Path(self.path).read_bytes()))
            except ValueError:
                raise Error(f'{self.path}: damaged; see what is in that directory, remove that '
                            'file and what install.sh made there') from None
        # in HERE -> SHA-256 of the contents; HERE may be somebody else's by now, who writes what
        # root shall remove
        self.files: dict[str, str] = {
            name: digest for name, digest in known.get('files', {}).items() if name in MADE}
        self.joined: bool = known.get('joined', False)  # the account was put into "libvirt"
        # Where the service ran before it moved here: files of its group may be there.
        self.places: list[str] = known.get('places', [])

    def data(self) -> bytes:
        known = {'files': self.files, 'joined': self.joined, 'places': self.places}
        return (json.dumps(known, indent=4) + '\n').encode()


def named_files(config: Config) -> list[str]:
    """Return the files of certificate and keys that the configuration names."""
    names = [config.certificate, config.certificate_key, config.key_file,
             *(entry.key_file for entry in config.key_entries)] if config.listener_enabled else []
    return list(dict.fromkeys(beside(config, name) for name in names if name))


@dataclasses.dataclass
class Setup:
    """What install.sh was asked for: install(), or uninstall()."""

    source: str                 # the directory that install.sh is in
    here: str                   # where the service is to run
    account: str = ''           # its user; '': as it is, or vmmonitor
    port: str = ''              # for a configuration that is made; '': 10000
    machines: str = ''          # yes, no, or '': as it is
    purge: str = ''             # yes: with uninstall()

    def __post_init__(self) -> None:
        self.before = Service.read()
        self.account = self.account or self.before.account or 'vmmonitor'
        self.machines = self.machines or ('yes' if self.before.machines else 'no')
        self.systemd = os.path.isdir('/run/systemd/system')
        self.python = sys.executable
        self.ran = False            # the service, before it was touched
        self.changes = Changes()
        self.record = SetupRecord(self.here)

    def path(self, name: str) -> str:
        return os.path.join(self.here, name)

    def install(self) -> None:
        """Install or upgrade, and start the service; all is as it was if that fails."""
        Library.get()
        self._refuse_foreign()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.changes.interrupt)
        try:
            # The last to be taken back, when the old files are there again.
            self.changes.step(lambda: self.ran and systemctl('restart', 'vmmonitor'))
            self.changes.directory(self.here)
            group = self._make_account()
            self._copy_program()
            config = self._make_config(group)
            named = self._check_readable(config)
            self._start_libvirt(config)
            if self.before.here not in ('', self.here):
                earlier = [*SetupRecord(self.before.here).places, self.before.here]
                self.record.places = sorted({*self.record.places, *earlier})
            self._make_commands()
            self.changes.put(self.path('.installed'), self.record.data(), 0o644)
            if self.systemd:
                self._start_service(named)
        except BaseException:                   # Ctrl-C, too
            self.changes.take_back()
            raise
        if self.before.account and self.before.account != self.account:
            remove_account(self.before.account, [self.here, *self.record.places])
        if self.before.here and self.before.here != self.here:
            print(f'the service has moved from {self.before.here}, where everything is as it was')
        self._show_end(config)

    def _refuse_foreign(self) -> None:
        """Refuse somebody else's files of our names, and name those that Python might run."""
        names = [] if self.here in (self.source, self.before.here) else list(PROGRAM_FILES)
        names.append(LAUNCHER)
        if not os.path.lexists(self.path('config.json')):
            names += ['cert.pem', 'key.pem']    # the new one would name them
        for name in set(names) - set(self.record.files):
            path, new = Path(self.path(name)), Path(self.source, name)
            if os.path.lexists(path) and not (name in PROGRAM_FILES and path.is_file()
                                              and path.read_bytes() == new.read_bytes()):
                raise Error(f'{path} is there, and was not made by install.sh; choose another '
                            '--prefix' + (', or name it in a config.json there' if
                                          name.endswith('.pem') else ''))
        others = [name for end in ('*.py', '__pycache__/*') for path in Path(self.here).glob(end)
                  for name in [str(path.relative_to(self.here))] if not re.match(
                      r'(__pycache__/)?(test_)?vmmonitor\.', name)]
        if others:
            print('note: not of vmmonitor, and never run by it: '
                  f'{printable(", ".join(sorted(others)))} in {self.here}')

    def _make_account(self) -> int:
        """Have the service's user, in the group libvirt; return the number of its own group."""
        name = self.account
        if not _exists('passwd', name):
            group = ['--gid', name] if _exists('group', name) else ['--user-group']
            self.changes.do(
                ['useradd', '--system', *group, '--home-dir', '/', '--no-create-home', '--shell',
                 which('nologin') or '/bin/false', '--comment', CREATED_BY, name],
                ['userdel', name], f'the user {name} could not be made')
            print(f'made the user {name}')
        known = pwd.getpwnam(name)
        own = grp.getgrgid(known.pw_gid).gr_name
        if known.pw_uid == 0:
            raise Error(f'the user {name} is root; choose another --user')
        if own != name:
            raise Error(f'the group of {name} is {own}, and others may be in it; choose a --user '
                        'that does not exist yet')
        if grp.getgrnam('libvirt').gr_gid not in os.getgrouplist(name, known.pw_gid):
            self.changes.do(['usermod', '-a', '-G', 'libvirt', name],
                            ['gpasswd', '-d', name, 'libvirt'],
                            f'the user {name} could not be put into the group libvirt')
            self.record.joined = True
        if not (is_roots(self.python) and as_user(self.account, self.python, '-c', '')):
            self.python = '/usr/bin/python3'            # this one is in somebody's home
        if not as_user(self.account, self.python, '-c', ''):
            raise Error(f'the user {name} can\'t run {self.python}; install python3 in /usr/bin')
        return known.pw_gid

    def _made(self, name: str, data: bytes, mode: int, group: int = 0) -> None:
        self.changes.put(self.path(name), data, mode, group)
        self.record.files[name] = hashlib.sha256(data).hexdigest()

    def _copy_program(self) -> None:
        """Put the new version there; the program itself counts from the rename on."""
        for name, mode in PROGRAM_FILES.items() if self.here != self.source else ():
            self._made(name, Path(self.source, name).read_bytes(), mode)
        if not as_user(self.account, 'test', '-r', self.path('vmmonitor.py')):
            raise Error(f'the user {self.account} can\'t read {self.path("vmmonitor.py")}',
                        'say --prefix /opt/vmmonitor, or open the path to it')

    def _make_commands(self) -> None:
        """Put `vmmonitor` into HERE and PATH, the bytecode that it runs from into HERE/__pycache__,
        and what completes its words in bash where bash looks for that."""
        launcher = self.path(LAUNCHER)
        text = COMMAND_TEXT.format(python=self.python, here=self.here).encode()
        self._made(LAUNCHER, text, 0o755)
        cached, data = run([self.python, '-I', '-c', BYTECODE, self.path('vmmonitor.py')],
                           SETUP_TIMEOUT).stdout.split(b'\0', 1)
        place, own = os.path.split(os.fsdecode(cached))
        self.changes.directory(place)
        for name in os.listdir(place):          # whoever wrote these, they would be run
            if re.fullmatch(r'vmmonitor\..*\.pyc', name) and name != own:
                self.changes.put(os.path.join(place, name), None)
        self.changes.put(os.path.join(place, own), data, 0o644)
        words = run([self.python, '-I', launcher, 'completion'], SETUP_TIMEOUT).stdout
        for path, data, mode, ours in ((COMMAND, text, 0o755, b"\n# By vmmonitor's install.sh: "),
                                       (COMPLETIONS, words, 0o644, b'_vmmonitor() {')):
            if os.path.lexists(path) and path not in self.record.files and not (
                    os.path.isfile(path) and ours in Path(path).read_bytes()):  # of another copy
                print(f'note: {path} is not of vmmonitor, and stays')
                continue
            self.changes.directory(os.path.dirname(path))
            self._made(path, data, mode)

    def _make_config(self, group: int) -> Config:
        path = self.path('config.json')
        there = os.path.lexists(path)
        if there:
            with contextlib.suppress(OSError):          # load() will say it
                values, _ = parse(Path(path).read_text('utf-8', 'replace'), path)
                config = Config(**values)
                pair = [beside(config, config.certificate), beside(config, config.certificate_key)]
                if pair == [self.path('cert.pem'), self.path('key.pem')]:
                    self._make_certificate(group)
        else:
            self._make_certificate(group)
            sample = Path(self.source, 'config.json.sample').read_text('utf-8')
            text = sample.replace('CHANGE-ME', os.urandom(32).hex()).replace(
                '"port": 10000', f'"port": {self.port or 10000}')
            self._made('config.json', text.encode(), 0o640, group)
            print(f'made {path} with a fresh key')
        for name in {'config.json', 'key.pem'} & set(self.record.files):
            if os.path.isfile(self.path(name)) and not os.path.islink(self.path(name)):
                self.changes.put(self.path(name), Path(self.path(name)).read_bytes(), 0o640, group)
        config = load(path)
        if there and self.port and config.port != int(self.port):
            raise Error(f'{path} is there, and its listener.port is {config.port}; change it '
                        'there, and leave out --port')
        return config

    def _make_certificate(self, group: int) -> None:
        there = [name for name in ('cert.pem', 'key.pem') if os.path.lexists(self.path(name))]
        if len(there) == 1:
            gone = 'key.pem' if there == ['cert.pem'] else 'cert.pem'
            raise Error(f'{self.path(there[0])} is there, but {self.path(gone)} is not',
                        f'put it back, or remove {there[0]} to have both made')
        if there:
            return
        host = _host_name()
        names = [f'DNS:{host}', 'DNS:localhost', 'IP:127.0.0.1', 'IP:::1',
                 *(f'IP:{address}' for address in host_addresses())]
        with tempfile.TemporaryDirectory() as work:
            made = attempt('openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                           'ec_paramgen_curve:P-256', '-nodes', '-days', '3650', '-subj',
                           f'/CN={host:.64}', '-addext', f'subjectAltName={",".join(names)}',
                           '-keyout', f'{work}/key.pem', '-out', f'{work}/cert.pem')
            if made.returncode:
                raise Error(f'openssl could not make a certificate for {host}; put cert.pem and '
                            f'key.pem into {self.here}, and a config.json that names them')
            self._made('key.pem', Path(work, 'key.pem').read_bytes(), 0o640, group)
            self._made('cert.pem', Path(work, 'cert.pem').read_bytes(), 0o644)
        print(f'made a self-signed certificate for {host}: {self.path("cert.pem")}')

    def _check_readable(self, config: Config) -> list[str]:
        """Return the files that systemd shall hand over; refuse what is too open or too closed."""
        named = named_files(config)
        secrets = set(named) - {beside(config, config.certificate)} | (
            {config.path} if any(_keys_inside(config)) else set())
        for path in sorted(secrets):
            if os.stat(path).st_mode & 0o004:
                raise Error(f'{path}: everybody may read it', self._remedy(path))
        # It is by its last part that the daemon finds it.
        ends = collections.Counter(os.path.basename(path) for path in named)
        hand = [path for path in named if self.systemd and ends[os.path.basename(path)] == 1
                and re.fullmatch('[A-Za-z0-9/._+@-]+', path)]
        for path in [config.path, *named]:
            if path not in hand and not as_user(self.account, 'test', '-r', path):
                raise Error(f'the user {self.account} can\'t read {path}', self._remedy(path))
        return hand

    def _remedy(self, path: str) -> str:
        """Return what to type so that the service, and nobody else, can read a file."""
        new = '' if self.before.account == self.account else f'groupadd -f {self.account}; '
        path = shlex.quote(path)
        return f'do: {new}chgrp {self.account} {path}; chmod 0640 {path}; and run this again'

    def _start_libvirt(self, config: Config) -> None:
        """Have a libvirt that answers, if the configuration means that of this host."""
        def answers() -> bool:
            with contextlib.suppress(LibvirtError):
                Connection(own[0]).close()
                return True
            return False
        own = [host.uri for host in config.libvirts() if host.uri.startswith('qemu:///')]
        if not own or answers():
            return
        for daemon in ('libvirtd', 'virtqemud'):
            units = [f'{daemon}{end}' for end in ('.socket', '-ro.socket', '-admin.socket')]
            units.append(f'{daemon}.service')
            if self.systemd and not systemctl('cat', units[-1]).returncode:
                was_enabled = not systemctl('is-enabled', '--quiet', units[-1]).returncode
                back = ['stop'] if was_enabled else ['disable', '--quiet', '--now']
                self.changes.do(['systemctl', 'enable', '--quiet', '--now', units[-1]],
                                ['systemctl', *back, *units], f'{daemon} could not be started')
                print(f'started {daemon}')
                break
        if not Deadline(LIBVIRT_WAIT).poll(answers, 1.0):
            raise Error('libvirt does not answer; start libvirtd or virtqemud, see to it that '
                        '"virsh -c qemu:///system list" works, and run this again')

    def _unit(self, named: Sequence[str]) -> str:
        text = Path(self.source, 'vmmonitor.service').read_text('utf-8')
        lines = [f'LoadCredential={os.path.basename(path)}:{path}' for path in sorted(named)]
        text = text.replace('/usr/bin/python3', self.python).replace('/opt/vmmonitor', self.here)
        text = text.replace('User=vmmonitor\n', '\n'.join([f'User={self.account}', *lines, '']))
        version = re.search(rb'systemd (\d+)', systemctl('--version').stdout)
        if version and int(version[1]) >= STEPPED_RESTARTS:
            text = text.replace('StartLimitIntervalSec=60\nStartLimitBurst=25\n',
                                'StartLimitIntervalSec=0\n')
            text = text.replace('RestartSec=100ms\n', 'RestartSec=100ms\nRestartSteps=8\n'
                                'RestartMaxDelaySec=5\n')
        return text

    def _drop_in(self) -> str:
        """Return what --with-machines adds to the unit: the unit's file has it in comments."""
        text = Path(self.source, 'vmmonitor.service').read_text('utf-8')
        return ''.join(f'{line[3:]}\n' for line in text.splitlines() if line.startswith('#|'))

    def _start_service(self, named: Sequence[str]) -> None:
        """Put the unit in its place, and start it."""
        self.ran = not systemctl('is-active', '--quiet', 'vmmonitor').returncode
        self.changes.step(lambda: systemctl('reset-failed', 'vmmonitor'))
        self.changes.step(lambda: systemctl('daemon-reload'))
        self.changes.put(UNIT, self._unit(named).encode(), 0o644)
        if self.machines == 'yes':
            self.changes.directory(os.path.dirname(DROPIN))
            self.changes.put(DROPIN, self._drop_in().encode(), 0o644)
        else:
            self.changes.put(DROPIN, None)
        systemctl('daemon-reload')
        if systemctl('is-enabled', '--quiet', 'vmmonitor').returncode:
            self.changes.do(['systemctl', 'enable', '--quiet', 'vmmonitor'],
                            ['systemctl', 'disable', '--quiet', 'vmmonitor'],
                            'the service could not be enabled')
        systemctl('reset-failed', 'vmmonitor')          # and with it, how often it was started
        self.changes.step(lambda: systemctl('stop', 'vmmonitor'))
        since = time.time()
        if systemctl('restart', 'vmmonitor').returncode:
            raise Error(f'the service did not start: {_service_words(since)}')
        print('the service runs: systemctl status vmmonitor')

    def _show_end(self, config: Config) -> None:
        """Print what --check finds, how to ask the service, and what was given away."""
        program = self.path(LAUNCHER)
        shown = attempt(self.python, '-I', program, '--check')
        print(shown.stdout.decode(errors='replace'), end='')
        if shown.returncode:
            print('(mend what failed above; meanwhile the service goes on trying)')
        for line in curl_example(config):
            print(line)
        if self.machines == 'yes':
            print(*(line[2:] for line in self._drop_in().splitlines()[1:5]), sep='\n')
        if not self.systemd:
            print('systemd does not run here; run the service by:\n  runuser -u '
                  f'{"root" if self.machines == "yes" else self.account} -- {self.python} -I '
                  f'{program}')

    def uninstall(self) -> None:
        """Take away what install() made; config.json, certificate and key only with `purge`."""
        self.here = self.before.here or self.here
        self.record = SetupRecord(self.here)
        self._remove_service()
        named = []
        with contextlib.suppress(OSError, Error):
            values, _ = parse(Path(self.path('config.json')).read_text('utf-8'),
                              self.path('config.json'))
            named = named_files(Config(**values))
        remove_account(self.account, [self.here, *self.record.places, *named], self.record)
        for cached in Path(self.here).glob('__pycache__/vmmonitor.*.pyc'):
            cached.unlink()
        for name in list(self.record.files):
            if name in {*PROGRAM_FILES, LAUNCHER} or os.path.isabs(name) or (
                    self.purge and self._is_ours(name)):
                remove_file(self.path(name))
                del self.record.files[name]
        if self.purge:
            _purge_state()
            for path in named:
                if os.path.lexists(path):
                    print(f'{path} stays: install.sh did not make it')
        self.record.joined = False
        if self.record.files:
            _write_owned(self.record.path, self.record.data(), 0o644, 0)
        else:
            remove_file(self.record.path)
        _rmdir(self.path('__pycache__'))
        left = not _rmdir(self.here)
        print(f'{self.here} stays, with what is in it now' if left else f'removed {self.here}')

    def _remove_service(self) -> None:
        if os.path.lexists(UNIT):
            systemctl('disable', '--now', '--quiet', 'vmmonitor')
            remove_file(UNIT)
            remove_file(DROPIN)
            _rmdir(os.path.dirname(DROPIN))
            systemctl('daemon-reload')
            systemctl('reset-failed', '--quiet', 'vmmonitor')
            shutil.rmtree(UNIT_RUN, ignore_errors=True)
            print(f'removed {UNIT}')

    def _is_ours(self, name: str) -> bool:
        """Tell whether a file of the list still holds what was made; config.json may be edited."""
        with contextlib.suppress(OSError):
            digest = hashlib.sha256(Path(self.path(name)).read_bytes()).hexdigest()
            return name == 'config.json' or digest == self.record.files[name]
        return True


def _rmdir(path: str) -> bool:
    with contextlib.suppress(OSError):
        os.rmdir(path)
        return True
    return False


def _exists(database: str, name: str) -> bool:
    return not attempt('getent', database, name).returncode


def _host_name() -> str:
    with contextlib.suppress(CommandError):
        return run(['hostname', '-f'], QMP_TIMEOUT).stdout.decode().strip() or os.uname().nodename
    return os.uname().nodename


def host_addresses() -> list[str]:
    """Return the addresses of this host's interfaces, and of libvirt's networks, up or not."""
    def shown(*argv: str) -> str:
        with contextlib.suppress(CommandError):
            return attempt(*argv).stdout.decode(errors='replace')
        return ''
    virsh = ('virsh', '-q', '-c', 'qemu:///system')
    found = shown('hostname', '-I').split()
    for network in shown(*virsh, 'net-list', '--all', '--name').split():
        found += re.findall(r'<ip [^>]*address=.([0-9a-fA-F.:]+)',
                            shown(*virsh, 'net-dumpxml', network))
    return sorted(set(found))[:CERTIFICATE_ADDRESSES]


def _service_words(since: float) -> str:
    with contextlib.suppress(CommandError):
        attempt('journalctl', '--sync')
        words = attempt('journalctl', '-q', '-u', 'vmmonitor', '-t', 'vmmonitor', '--since',
                        f'@{int(since)}', '-o', 'cat', '-p', 'err', '--no-pager'
                        ).stdout.decode(errors='replace').splitlines()
        if words:
            return words[-1]
    return 'see: journalctl -u vmmonitor -n 20'


def remove_account(name: str, places: Sequence[str], record: SetupRecord | None = None) -> None:
    """Remove a user that install() made, so that no file keeps its number; or its rights."""
    if not _exists('passwd', name):
        return
    known = pwd.getpwnam(name)
    ours = known.pw_gecos == CREATED_BY
    state = ['/var/lib/vmmonitor', '/run/vmmonitor'] if ours else []
    for top in [*places, *state]:
        below = [os.path.join(where, each) for where, inner, files in os.walk(top)
                 for each in [*inner, *files]]
        for path in [top, *below]:
            with contextlib.suppress(OSError):
                info = os.lstat(path)
                whose = ours and info.st_uid == known.pw_uid, info.st_gid == known.pw_gid
                if any(whose):
                    os.chown(path, *(its - 1 for its in whose), follow_symlinks=False)
    if ours:
        if attempt('userdel', name).returncode:
            raise Error(f'the user {name} can\'t be removed; end what runs as it (pgrep -u {name}) '
                        'and run this again')
        print(f'removed the user {name}')
    elif record and record.joined:
        attempt('gpasswd', '-d', name, 'libvirt')


def _purge_state() -> None:
    """Remove /run/vmmonitor, unless it lists networks that stand."""
    if any(path.read_text(errors='replace').strip() != '{}'
           for path in Path(STATE_DIR).glob('net-*.json')):
        print(f'{STATE_DIR} stays: it lists networks that stand; see vmmonitor.py --clean --all')
    else:
        shutil.rmtree(STATE_DIR, ignore_errors=True)


def command_setup(asked: dict[str, str]) -> int:
    """--setup: install or uninstall, as install.sh says; its messages are install.sh's."""
    action = asked.pop('action')
    try:
        setup = Setup(**asked)
        setup.install() if action == 'install' else setup.uninstall()
    except (Error, OSError) as problem:
        print(f'install.sh: {printable(explain(problem))}', file=sys.stderr)
        return 1
    return 0


def curl_example(config: Config) -> Iterator[str]:
    """Yield a curl line that this listener answers, and how to know it from elsewhere."""
    if not config.listener_enabled:
        return
    certificate = beside(config, config.certificate)

    def openssl(*words: str, stdin: bytes = b'') -> bytes:
        return run(['openssl', *words], QMP_TIMEOUT, stdin, check=False).stdout
    shown = openssl('x509', '-noout', '-subject', '-issuer', '-ext', 'subjectAltName', '-in',
                    certificate).decode(errors='replace')
    names = re.findall(r'DNS:([^\s,*]+)', shown) or re.findall(r'CN ?= ?([^\s,/*]+)', shown)
    host = config.address if config.address not in ('', '0.0.0.0', '::') else (     # nosec B104
        'localhost' if 'localhost' in names else [*names, _host_name()][0])
    where = f'[{host}]' if ':' in host else host
    secret = f'cat {shlex.quote(beside(config, config.key_file))}' if config.key_file else \
        f'python3 -c \'import json; print(json.load(open("{config.path}"))["listener"]["key"])\''
    sudo = 'sudo ' if shutil.which('sudo') else ''
    if config.key or config.key_file:
        yield (f'try it:\n  curl --cacert {shlex.quote(certificate)} -H "Authorization: Bearer '
               f'$({sudo}{secret})" \'https://{where}:{config.port}/?cmd=list\'')
    found = re.search(r'subject=(.*)\nissuer=(.*)', shown)
    if found and found[1] == found[2]:
        public = openssl('pkey', '-pubin', '-outform', 'der',
                         stdin=openssl('x509', '-noout', '-pubkey', '-in', certificate))
        pin = base64.b64encode(hashlib.sha256(public).digest()).decode()
        # Nobody has signed it: -k leaves its names and signers out, and the pin counts still.
        yield f'to know it from elsewhere: curl -k --pinnedpubkey sha256//{pin}'


# === command line ===============================================================================

# libvirt-guests.service: the script, whose defaults differ between distributions, and its settings.
LIBVIRT_GUESTS = ('/usr/lib/libvirt/libvirt-guests.sh', '/usr/libexec/libvirt-guests.sh',
                  '/etc/default/libvirt-guests', '/etc/sysconfig/libvirt-guests')
SYSTEMCTL_TRIES = 5             # until it says whether the host goes down
# When systemd stops us it waits 30 s for the next sign of life, not TimeoutStopSec.
MORE_TIME = 'EXTEND_TIMEOUT_USEC=30000000'
OWN_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config.json')
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
AWAY_LIMIT = 60.0              # a host that is away longer is worth a word
CERTIFICATE_DAYS = 14          # a certificate that ends sooner, too ...
CERTIFICATE_PAUSE = DAY / 4    # ... which is looked at this often

EXAMPLES = """examples:
  vmmonitor.py --monitor                    correct the clocks of all guests, no config needed
  vmmonitor.py                              do what config.json enables
  vmmonitor.py --monitor --startup --listen --config /etc/vmmonitor/config.json
  vmmonitor.py --check                      is everything there that the config needs?
  vmmonitor.py --status                     guests, agents, and how far their clocks are off
  vmmonitor.py --sync                       correct all clocks now, once
  vmmonitor.py --shutdown --dry-run         what would be done if the host went down
  vmmonitor.py --sync web1 db1 --json       ... of these two, answer for programs

from a guest, once the listener runs:
  curl -k --pinnedpubkey sha256//... -H "Authorization: Bearer $KEY" \\
       "https://host:10000/?cmd=start&target=web1"

SIGHUP has the daemon read config, keys and certificate again. Exit status: 0 done, 1 failed,
2 usage or configuration."""


RELOAD_ADDRESS = '\0vmmonitor reload {}'         # an abstract socket, of the daemon's process
RELOAD_TIMEOUT = 30.0                           # seconds, for a reload and its answer
RELOADED = 'ok'                                 # the answer when it was not refused
LIBVIRT_DAEMONS = 'libvirtd', 'virtqemud'       # one of these, or what they make, is where ...
LIBVIRT_RUN = '/run/libvirt'                    # ... libvirt was installed, whether it runs or not


def command_reload(process: int) -> int:
    """--reload: have the daemon `process` read its configuration again, and say what it refused."""
    try:
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.settimeout(RELOAD_TIMEOUT)
            daemon.connect(RELOAD_ADDRESS.format(process))
            if peer_of(daemon)[0] != process:
                raise Error(f'another process answers for {process}')
            answer = b''.join(iter(lambda: daemon.recv(4096), b'')).decode(errors='replace')
        if not answer:
            raise Error(f'process {process} ended before it answered')
    except OSError as problem:
        raise Error(f'process {process} does not answer: {explain(problem)}',
                    'see that it is a vmmonitor, or restart it') from None
    if answer == RELOADED:
        return 0
    for line in answer.splitlines():
        log.error('the configuration was refused, the old one stays: %s', line)
    return EXIT_FAILED


def host_goes_down() -> bool:
    """Tell whether the host is being shut down, and not only this service stopped."""
    said = ''
    for _ in range(SYSTEMCTL_TRIES):        # it may be too busy just then to answer
        notify_systemd(MORE_TIME)
        try:
            said = run(['systemctl', 'is-system-running'], QMP_TIMEOUT, check=False
                       ).stdout.decode(errors='replace').strip()
        except CommandError as problem:
            said = explain(problem)
        log.debug('systemctl is-system-running: %s', said)
        if said in ('running', 'degraded', 'maintenance', 'starting', 'stopping'):
            return said == 'stopping'
        time.sleep(STATE_POLL)
    log.error('whether the host goes down is not known (systemctl is-system-running: %s); the '
              'guests are left alone', said)
    return False


def notify_systemd(*lines: str) -> None:
    """Tell systemd about our state (sd_notify(3)); nothing happens outside of it."""
    address = os.environ.get('NOTIFY_SOCKET', '')
    if not address:
        return
    address = '\0' + address[1:] if address[0] == '@' else address      # an abstract socket
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
        notifier.sendto('\n'.join(map(printable, lines)).encode(), address)


def libvirt_hosts(config: Config) -> list[LibvirtHost]:
    return [LibvirtHost(host.uri, host.name, host.trust_clock) for host in config.libvirts()]


@contextlib.contextmanager
def all_guests(config: Config) -> Iterator[Guests]:
    """Lend the guests of all hosts, to a command that soon ends. Who has machines, and no libvirt
    on this host, misses none, unless the configuration names one."""
    machines = Machines()
    alone = machines.known() is None and config.libvirts() == Config().libvirts() and not (
        os.path.isdir(LIBVIRT_RUN) or any(map(which, LIBVIRT_DAEMONS)))
    guests = Guests([machines, *([] if alone else libvirt_hosts(config))])
    try:
        yield guests
    finally:
        stop_all(guests.hosts)


def stop_all(hosts: Iterable[GuestHost], timeout: float = STOP_TIMEOUT) -> None:
    """Stop hosts, all at once, each within `timeout`."""
    deadline = Deadline(timeout)
    for thread in [spawn(f'stop {host.name}', host.stop) for host in hosts]:
        thread.join(deadline.left())


class Daemon:
    """The roles that were asked for, until a signal ends them."""

    def __init__(self, config: Config, roles: Sequence[str], once: bool = False) -> None:
        self.settings = Settings(config)
        self.first = config                         # of it, some count until a restart
        self.roles = list(roles)
        self.guests = Guests([Machines(), *libvirt_hosts(config)], self.settings)
        self.monitor = Monitor(self.guests, self.settings)
        # A restart of the service must not start what the admin has switched off meanwhile.
        self.startup = Startup(self.guests, config.steps, BootMark('startup') if once else None)
        self.listener = Listener(self.guests, self.settings)
        self.away: dict[str, float] = {}            # name of a host -> since when (monotonic)
        self._links: dict[str, int] = {}            # ... -> how often it was back, when last seen
        self.certificate = Deadline(0)              # when to look at its end
        self._ending = ''                           # the one of which word was sent last ...
        self._looking = threading.Lock()            # ... which this guards
        # What wakes main(): the numbers of signals, and 0 when there is something else to see.
        self._bell, self._ring = socket.socketpair()
        self._askers: collections.deque[socket.socket] = collections.deque()    # for a reload
        self._said = ''                             # the last STATUS= for systemd
        self._refused = ''                          # added to it after a refused reload

    def run(self) -> int:
        """Start the roles, serve until SIGTERM or SIGINT, and return the exit status."""
        libc, library = ctypes.CDLL(None), Library.get()
        with contextlib.suppress(AttributeError):       # not in every C library
            libc.mallopt(-8, 1)     # M_ARENA_MAX: what a thread had would be for it alone
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        signal.set_wakeup_fd(self._ring.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)      # not their default: they are read below
        log.info('vmmonitor %s: %s', __version__, ', '.join(self.roles))
        for warning in self.settings.config.warnings:
            log.warning('%s', warning)
        if 'listen' in self.roles:
            self.listener.open(self.settings.config)
        if 'monitor' in self.roles:
            self.monitor.start()
        for host in self.guests.hosts:
            host.watch(self._receive, self._wake)
        if 'startup' in self.roles:
            spawn('startup', self.startup.run)
        spawn('reload', self._hear_reloads)
        self._say('READY=1')
        with contextlib.suppress(AttributeError):       # not in every C library
            libc.malloc_trim(0)                         # 30 MB, if this file had to be compiled
        self._serve(library)
        notify_systemd('STOPPING=1', 'STATUS=stopping')
        log.info('stopping')
        self.startup.stopping.set()
        if 'shutdown' in self.roles and host_goes_down():
            self._shut_down()
        self.monitor.stop()
        self.listener.close()
        deadline = Deadline(STOP_TIMEOUT)
        self.guests.end(STOP_TIMEOUT * 2 / 3)           # else a machine may be left half started
        stop_all(self.guests.hosts, deadline.left())
        return 0

    def _receive(self, event: GuestEvent) -> None:
        if 'monitor' in self.roles:
            self.monitor.events.put(event)
        self.guests.heard(event)

    def _look_around(self) -> float:
        """Send word of what no event tells; return the seconds until there is more to see."""
        notices, now, pauses = self.guests.notices, time.monotonic(), [math.inf]
        for host in self.guests.hosts:
            left = self.away.setdefault(host.name, now) + AWAY_LIMIT - now
            if host.up.is_set():
                del self.away[host.name]
                notices.end(host.name, 'host')
                if self._links.get(host.name) != host.links:
                    self._links[host.name] = host.links
                    self.guests.look_again(host)
            elif left > 0:
                pauses.append(left)
            else:
                notices.begin('host', host.name,
                              host.problem or HostAway(f'{host.name} does not answer'))
        if 'listen' in self.roles:
            if self.certificate.passed():
                self.certificate = Deadline(CERTIFICATE_PAUSE)
                with contextlib.suppress(Error):        # no thread for it is no end of the service
                    spawn('certificate', self._look_at_certificate)
            pauses.append(self.certificate.left())
        return min(pauses)

    def _look_at_certificate(self) -> None:
        with self._looking, contextlib.suppress(CommandError):      # no openssl
            config, notices = self.settings.config, self.guests.notices
            check = check_certificate(config, self.listener.certificate)
            if check.good or self._ending != config.certificate:
                notices.end(self._ending, 'certificate')
            if not check.good:
                self._ending = config.certificate
                notices.begin('certificate', self._ending, Error(check.text))

    def _shut_down(self) -> None:
        """End the guests of a host that goes down, and have systemd wait for it."""
        self.guests.lists['shutdown'] = 'begins'        # from now on the listener only tells
        if self.startup.mark:                           # systemd's soft-reboot leaves it, and the
            self.startup.mark.clear()                   # number of the boot
        shutdown = Shutdown(self.guests, self.settings.config)
        work = shutdown.begin('shutdown', shutdown.run)
        while work and work.is_alive():
            self.guests.lists['shutdown'] = shutdown.progress()
            notify_systemd(f'STATUS={shutdown.progress()}', 'WATCHDOG=1', MORE_TIME)
            work.join(1.0)

    def _serve(self, library: Library) -> None:
        """Wait for signals; keep systemd's watchdog content as long as events can come."""
        interval = int(os.environ.get('WATCHDOG_USEC', '0')) / 1e6
        heard = b''
        while signal.SIGTERM not in heard and signal.SIGINT not in heard:
            pause = min(interval / 3 or math.inf, self._look_around())
            ready = select.select([self._bell], [], [], None if math.isinf(pause) else pause)[0]
            heard = self._bell.recv(4096) if ready else b''
            if signal.SIGHUP in heard:
                self._reload()
            while self._askers:
                with self._askers.popleft() as asker, contextlib.suppress(OSError):
                    asker.settimeout(RELOAD_TIMEOUT)
                    asker.sendall(('\n'.join(self._reload()) or RELOADED).encode())
            stuck = time.monotonic() - library.ticked
            if stuck < max(interval, 10.0):
                notify_systemd('WATCHDOG=1')
            self._say()

    def _wake(self) -> None:
        """Have main() see what is new."""
        with contextlib.suppress(BlockingIOError):      # it has enough to see
            self._ring.send(b'\0')

    def _say(self, *more: str) -> None:
        """Tell systemd what `systemctl status` shall show, if that is news."""
        away = ' and '.join(host.name for host in self.guests.hosts if not host.up.is_set())
        link = f'waiting for {away}' if away else 'libvirt connected'
        status = f'STATUS={", ".join(self.roles)}; {link}{self._refused}'
        if more or status != self._said:
            notify_systemd(status, *more)
        self._said = status

    def _hear_reloads(self) -> None:
        """Hand on who wants a reload, and to know whether it was refused (--reload)."""
        with socket.socket(socket.AF_UNIX) as server:
            try:
                server.bind(RELOAD_ADDRESS.format(os.getpid()))
                server.listen()
            except OSError as problem:                  # somebody has taken the name
                raise Error(f'--reload would get no answer: {explain(problem)}') from None
            while True:
                try:
                    asker, _ = server.accept()
                except OSError:                         # such as too many open files
                    time.sleep(STATE_POLL)
                    continue
                if peer_of(asker)[1] in (0, os.geteuid()):
                    self._askers.append(asker)
                    self._wake()
                else:
                    asker.close()

    def _reload(self) -> list[str]:
        """Read the configuration again, or keep the old one; return what is wrong."""
        old = self.settings.config
        notify_systemd('RELOADING=1', f'MONOTONIC_USEC={time.monotonic_ns() // 1000}')
        try:
            new = load(old.path, self.roles) if old.path else old
            self.listener.reload(new)
        except (Error, OSError) as problem:         # files may change under our hands
            self._refused = '; the last reload was refused, see the log'
            lines = problem.problems if isinstance(problem, ConfigError) else [explain(problem)]
            for line in lines:
                log.error('reload refused, the old configuration stays: %s', line)
            self.guests.notices.begin('reload', old.path, Error('; '.join(lines)))
            self._say('READY=1')
            return lines
        self.settings.config = new
        # What was left alone may be put right now, such as with allowExec: no event will tell.
        same = all(getattr(old, name) == getattr(new, name) for name in (
            'exclude', 'allow_exec', 'tolerance'))
        self.monitor.check('' if same else 'configuration read again')
        self._refused = ''
        self.guests.notices.end(old.path, 'reload')
        self.guests.notices.catch_up()
        self.certificate = Deadline(0)
        later = [row.key for attribute, row in OPTIONS.values()
                 if row.restart and getattr(self.first, attribute) != getattr(new, attribute)]
        log.info('configuration read again%s', later and
                 f'; counts after a restart: {", ".join(later)}' or '')
        if 'listen' in self.roles and handed_over(new):
            log.info('%s: %s', ', '.join(handed_over(new)), STALE_COPY)
        for warning in new.warnings:
            log.warning('%s', warning)
        self._say('READY=1')
        return []


def checks(path: str, roles: Sequence[str]) -> Iterator[Check]:
    """Yield what --check prints: each thing that must be there, in the order of its use."""
    try:
        config = load(path, roles) if path else Config()
    except ConfigError as problem:
        for line in problem.problems:
            yield Check(False, f'config {problem.path}: {line}')
        return
    service = Service.of(path)
    roles = roles or enabled_roles(config)
    yield Check(True, f'config {path or "none that this user can read, defaults"}: '
                f'{", ".join(roles) or "nothing enabled"}')
    for warning in config.warnings:
        yield Check(False, warning)
    if service:
        yield from _check_service(service, config, roles)
    if 'listen' in roles:
        yield from _check_listener(config)
    if config.notify_command and not which(notifier(config)[0]):
        yield Check(False, f'notify.command: {config.notify_command[0]} can\'t be run; name a '
                    'program by its path, and its arguments as further strings')
    if networks_used():
        yield from check_networks()
    hosts: list[GuestHost] = [] if service and not service.machines else [Machines()]
    asked = [(host, in_thread(host.name, host.version)) for host in libvirt_hosts(config)]
    for host, version in asked:
        try:
            yield Check(True, f'{host.name}: version {version.result()}')
            hosts.insert(0, host)
        except LibvirtError as problem:
            yield Check(False, f'{host.name}: {explain(problem)}')
    away = [version.exception() for _, version in asked]
    if hosts:
        yield from _check_guests(config, roles, hosts, any(away))


def _check_service(service: Service, config: Config, roles: Sequence[str]) -> Iterator[Check]:
    """Check at the installed service: does it run, what can it not read, what will it not see?"""
    if os.path.isdir('/run/systemd/system'):
        state = systemctl('is-active', 'vmmonitor').stdout.decode().strip()
        yield Check(state == 'active', f'service: {state}' + (
            '' if state == 'active' else '; see journalctl -u vmmonitor -n 20, then do: systemctl '
            'restart vmmonitor'))
    for step in config.steps if 'startup' in roles and not service.machines else ():
        if step.until == 'path' and re.match(r'/(dev/(?!shm/)|(var/)?tmp/)', step.what):
            yield Check(False, f'{Startup.key} line {step.number}: the service has a /dev, /tmp '
                        f'and /var/tmp of its own, and will not see {step.what}; name a path '
                        'elsewhere, such as below /sys, or a file of what is mounted')
    if os.geteuid() != 0:
        return                                          # only root can ask for another user
    if not service.machines:
        handed = Path(UNIT).read_text('utf-8', 'replace')
        for path in [config.path, *named_files(config)]:
            if f':{path}\n' not in handed and not as_user(
                    service.account, 'test', '-r', path):
                quoted = shlex.quote(path)
                yield Check(False, f'service: its user {service.account} can\'t read {path}; do: '
                           f'chgrp {service.account} {quoted}; chmod 0640 {quoted}')
        names = [guest.name for guest in Machines().all()]
        if names:
            yield Check(True, f'note: the service does not see machines of root, {", ".join(names)}'
                       f'; {service.here}/install.sh --with-machines changes that')


RENEW = '; put a new one there, and reload; for the one that install.sh made, remove it and its ' \
    'key and run install.sh again'


def check_certificate(config: Config, pem: bytes) -> Check:
    """Say until when a certificate is valid, and whether that is CERTIFICATE_DAYS at least."""
    shown = run(['openssl', 'x509', '-noout', '-enddate', '-checkend',
                 f'{CERTIFICATE_DAYS * DAY:.0f}'], QMP_TIMEOUT, pem, check=False)
    end = shown.stdout.decode(errors='replace').partition('=')[2].partition('\n')[0]
    good = shown.returncode == 0
    return Check(good, f'certificate {config.certificate}: valid until {end}'
                 f'{"" if good else RENEW}')


def _check_listener(config: Config) -> Iterator[Check]:
    try:
        yield check_certificate(config, Path(beside(config, config.certificate)).read_bytes())
    except CommandError:
        yield Check(True, f'certificate {config.certificate}: loads (no openssl to see its end)')
    listener = Listener(Guests([]), Settings(config))
    try:
        listener.bind(config)
    except Error as problem:
        served = _is_served(config)
        yield Check(served, f'port: {config.port} is served with this certificate, by the daemon'
                   if served else explain(problem))
    else:
        yield Check(True, f'port: can listen on {listener.name}')
        listener.close()


def _is_served(config: Config) -> bool:
    """Tell whether who listens at our port shows our certificate, and so is the daemon."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        ours = Path(beside(config, config.certificate)).read_text('utf-8', 'replace')
        first = ours[ours.index(ssl.PEM_HEADER):].partition(ssl.PEM_FOOTER)
        with socket.create_connection((config.address or 'localhost', config.port),
                                      HANDSHAKE_TIMEOUT) as plain, \
                context.wrap_socket(plain) as connection:
            return connection.getpeercert(True) == ssl.PEM_cert_to_DER_cert(''.join(first[:2]))
    except (OSError, ValueError):
        return False


def _check_guests(config: Config, roles: Sequence[str], hosts: list[GuestHost], some_away: bool
                  ) -> Iterator[Check]:
    away: list[Error] = []
    guests = Guests(hosts).names(hosts, away)
    for problem in away:
        yield Check(False, f'guests: {explain(problem)}')
    found = {guest.id: guest for named in guests.values() for guest in named}.values()
    yield Check(True, f'guests: {len(found)} defined')
    if 'monitor' in roles:
        for guest in found:
            try:
                if not config.excludes(guest.own, guest.full_name) \
                        and guest.agent_state() == 'absent':
                    raise guest.agent_error('not configured')
            except NoGuest:                             # undefined since it was listed
                pass
            except Error as problem:
                yield Check(False, explain(problem))
    if 'startup' in roles:
        yield from _check_list(Startup.key, config.steps, guests,
                               ' on the hosts that can be asked' if some_away or away else '')
    if 'shutdown' in roles:
        here = Guests(hosts).names([host for host in hosts if host.here], [])
        yield from _check_list(Shutdown.key, [step for step in config.shutdown_steps
                                              if step.name != 'all'], here, ' on this machine')
    if 'startup' in roles and libvirt_guests('ON_BOOT') == 'start':
        yield Check(False, 'libvirt-guests resumes all guests at once when the host boots, which '
                    'undoes the order; set ON_BOOT=ignore in /etc/default/libvirt-guests or '
                    '/etc/sysconfig/libvirt-guests')
    afterwards = libvirt_guests('ON_SHUTDOWN') if 'shutdown' in roles else ''
    if afterwards:
        yield Check(True, f'libvirt-guests (ON_SHUTDOWN={afterwards}) acts after '
                    'shutdown.vmShutdownCommands, on the guests that are still on then')
    stop_all(hosts)


def _check_list(key: str, lines: Iterable[Step], guests: Mapping[str, Sequence[Guest]],
                where: str) -> Iterator[Check]:
    for step in lines:
        named = guests.get(step.name, ())
        if step.name and len(named) != 1:
            yield Check(False, f'{key} line {step.number}: ' + (
                f'several hosts have a {step.name}; say HOST/NAME' if named else
                f'no guest is named {step.name}{where}'))
        elif step.verb == 'start' and isinstance(named[0], Domain) and named[0].autostarts():
            yield Check(False, f'{step.name} is started by libvirt, too, before this program runs; '
                       + named[0].virsh('autostart --disable'))


def libvirt_guests(setting: str) -> str:
    """Return a setting of libvirt's own libvirt-guests.service; '' where that is not in use."""
    try:
        if run(['systemctl', 'is-enabled', 'libvirt-guests'], QMP_TIMEOUT, check=False).returncode:
            return ''
    except CommandError:
        return ''
    value = ''
    for path in LIBVIRT_GUESTS:             # the script with its defaults, then what overrides them
        with contextlib.suppress(OSError):
            for line in Path(path).read_text('utf-8', 'replace').splitlines():
                found = re.match(rf'{setting}=["\']?([\w-]*)', line)
                value = found[1] if found else value
    return value


def show(text: str, file: IO[str] | None = None) -> None:
    """Print lines at once; OutputLost if nobody takes them."""
    try:
        print(*map(printable, text.split('\n')), sep='\n', file=file, flush=True)
    except OSError as problem:
        raise OutputLost(problem) from None


def show_checks(lines: Iterable[Check], as_json: bool) -> int:
    """--check: print a line for each thing looked at, as soon as that is done."""
    found: list[Check] = []
    for line in lines:
        found.append(line)
        if not as_json:
            show(f'{"ok   " if line.good else "FAIL "} {line.text}')
    good = all(line.good for line in found)
    if as_json:
        show(json.dumps({'ok': good, 'checks': [
            {'ok': line.good, 'text': line.text} for line in found]}))
    return 0 if good else EXIT_FAILED


def command_clean(options: argparse.Namespace) -> int:
    found = clean(options.names, dry_run=options.dry_run, everything=options.all,
                  force=options.force)
    if not found:
        show('nothing to clean up')
    for name, why in found.items():
        show(f'{"would remove" if options.dry_run else "removed"} {name}: {why}')
    return 0


def choose(guests: Guests, names: Sequence[str], away: list[Error],
           single: bool = False) -> list[Guest]:
    """Return the guests of these names or patterns; with `single`, refuse several."""
    found: dict[str, Guest] = {}
    patterns = [name for name in names if set(name) & set('*?[')]
    asked = [host for host in guests.hosts if matches_host(patterns, host.label)]
    everybody = guests.all(away=away, hosts=asked)
    for name in names:
        if name not in patterns:
            fitting = [guests.find(name)]
        else:
            exact = [one for one in everybody
                     if name != '*' and name in (one.own, one.full_name)]
            fitting = exact or [
                one for one in everybody if matches_any([name], one.own, one.full_name)]
            if not fitting:
                raise away[0] if away else NoGuest(f'no guest fits {name}', 'list shows them')
        found.update((guest.id, guest) for guest in fitting)
    if single and len(found) > 1:
        raise Error(f'{names[0]} are {len(found)} guests', 'name one, for one file')
    return list(found.values())


Answers = list[dict[str, Any]]


def ask_and_show(config: Config, options: argparse.Namespace,
                 ask: Callable[[Guests, Guest], dict[str, Any]],
                 lines: Callable[[Answers], Iterable[str]], *, strict: bool = True,
                 running: bool = False, timeout: float = ASK_TIMEOUT) -> int:
    """Ask the guests that are named, or all, at once; print their answers, as JSON or as `lines`,
    and what went wrong. Return the exit status; without `strict`, no guest's error is a failure."""
    away: list[Error] = []
    done = set[str]()

    def asked(guest: Guest) -> dict[str, Any]:
        try:
            return ask(guests, guest)
        finally:
            done.add(guest.name)
    with all_guests(config) as guests:
        chosen = choose(guests, options.names, away, 'file' in options) if options.names else [
            guest for guest in guests.all(running, away)
            if not (running and config.excludes(guest.own, guest.full_name))]
        if away and not chosen and not options.json:
            raise away[0]
        with progress([guest.name for guest in chosen], done):
            answers = [{'name': known['name'], **told(known['problem'], known['name'])}
                       if 'problem' in known else known
                       for known in ask_all(chosen, asked, timeout)]
    if options.json:
        show(json.dumps({'guests': [{key: value for key, value in known.items() if key != 'text'}
                                     for known in answers],
                          **({'away': [told(problem) for problem in away]} if away else {})}))
    else:
        for line in lines(answers):
            show(line)
        wrong = [str(Error(known['error'], known['hint'])) for known in answers
                 if 'error' in known and not running]
        for line in [*wrong, *(f'{known["name"]}: {known["warning"]}' for known in answers
                               if known.get('warning')), *map(explain, away)]:
            show(line, sys.stderr)
    return EXIT_FAILED if away or strict and any('error' in known for known in answers) else 0


@contextlib.contextmanager
def progress(names: Sequence[str], done: set[str]) -> Iterator[None]:
    """On a terminal, say each second which of these are not yet done, until the block ends."""
    def tell() -> None:
        began = time.monotonic()
        while not over.wait(1.0):
            left = [name for name in names if name not in done]
            head = f'{len(names) - len(left)} of {len(names)} done, waiting for '
            tail = f': {time.monotonic() - began:.0f} s'
            room = shutil.get_terminal_size().columns - 1 - len(head + tail)    # not a second row
            print(f'\r\x1b[K{head}{clip(printable(", ".join(left)), max(room, 1))}{tail}',
                  end='\r', file=sys.stderr, flush=True)
        print('\r\x1b[K', end='', file=sys.stderr, flush=True)
    over = threading.Event()
    thread = names and sys.stderr.isatty() and spawn('progress', tell)
    try:
        yield
    finally:
        over.set()
        if thread:
            thread.join(STATE_POLL)                 # its line goes before the answers come


def command_status(config: Config, options: argparse.Namespace) -> int:
    def ask(_guests: Guests, guest: Guest) -> dict[str, Any]:
        status = guest.status()
        known: dict[str, Any] = {'state': status.state.value, 'reason': status.reason,
                                 'agent': guest.agent_state()}
        if known['state'] == 'running' and known['agent'] != 'absent':
            try:
                reading = measure(guest, round(config.tolerance * MS))
            except AgentError as problem:
                return {**known, 'agent': problem.trouble.name, **told(problem, guest.name)}
            except GuestError as problem:       # such as Busy: the daemon is asking it, too
                return {**known, **told(problem, guest.name)}
            known.update(agent='answers', offsetMs=reading.offset / MS)
        return known

    def lines(answers: Answers) -> Iterator[str]:
        rows = [('NAME', 'STATE', 'AGENT', 'CLOCK')] + [
            (known['name'], str(Status(State(known['state']), known['reason']))
             if 'state' in known else '?', known.get('agent', '?'),
             span(round(known['offsetMs'] * MS)) if 'offsetMs' in known else '-')
            for known in answers]
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            yield '  '.join(f'{cell:{width}}' for cell, width in zip(row, widths)).rstrip()
    return ask_and_show(config, options, ask, lines, strict=False)


def command_sync(config: Config, options: argparse.Namespace) -> int:
    """sync: correct the clocks of these guests, or of all that run."""
    def ask(_guests: Guests, guest: Guest) -> dict[str, Any]:
        result = Correction(guest.name)
        try:
            synchronise(guest, config, result, threading.Event())
        except AgentError as problem:
            if result.late:
                problem.hint = 'when its agent answers again it sets an old time: --sync it then'
            raise
        return {'beforeMs': result.before / MS, 'afterMs': result.after / MS,
                'corrected': bool(result.method), 'by': result.method, 'warning': result.warning,
                'text': str(result)}

    def lines(answers: Answers) -> Iterator[str]:
        for known in answers:
            yield known.get('text') or str(Error(known['error'], known['hint']))
        if not answers:
            yield 'no guest is running'
    # Once, by hand: a guest whose agent does not answer soon is an answer, too.
    config = dataclasses.replace(config, agent_wait=min(config.agent_wait, AGENT_TIMEOUT))
    return ask_and_show(config, options, ask, lines, running=True)


def command_list(config: Config, options: argparse.Namespace) -> int:
    def ask(_guests: Guests, guest: Guest) -> dict[str, Any]:
        return {'state': '' if options.only_names else guest.state().value}

    def lines(answers: Answers) -> Iterator[str]:
        width = max((len(known['name']) for known in answers), default=0)
        for known in answers:
            yield f'{known["name"]:{width}}  {known.get("state", "?")}'.rstrip()
    return ask_and_show(config, options, ask, lines, strict=False)


def command_list_steps(config: Config, options: argparse.Namespace) -> int:
    """--shutdown and --dry-run: carry out the list, or show what it would do."""
    with all_guests(config) as guests:
        steps = Shutdown(guests, config) if options.shutdown else Startup(guests, config.steps)
        if options.dry_run:
            for line in steps.plan():
                show(line)
        else:
            steps.run()
    return EXIT_FAILED if steps.failed or steps.away else 0


# --- verbs: vmmonitor VERB NAME ... ---

LOG_TIMEOUT = 60.0             # seconds; for a journal of years
ACTION_TIMEOUT = 3600.0        # seconds for what is asked of guests; Ctrl-C ends it earlier
CONSOLE_LEAVES = b'\x1d'       # Ctrl-], as of virsh console


class Task(NamedTuple):
    """A row of the table of verbs that only the command line has, beside VERBS."""

    help: str
    names: str | int | None = '*'       # how many guests it takes, as of argparse; None: none
    words: str = ''                     # what else stands behind it; LAB may be left out
    flags: tuple[tuple[str, str], ...] = ()     # what it can be told, and what that means


DISKS = ('--disks', 'also the disks that "up" has made')
TASKS = {
    'up': Task('build the lab that a file describes: what is not there', None, 'LAB'),
    'down': Task('shut down and remove what "up" has made of a lab; disks stay', None, 'LAB', (
        DISKS, ('--force', 'cut the power of its machines, and also what others use'))),
    'plan': Task('show what "up" would do, or with --down, what "down" would', None, 'LAB', (
        ('--down', 'show what "down" would do'), DISKS)),
    'graph': Task('draw who is connected to whom in a lab', None, 'LAB', (
        ('--dot', 'for Graphviz: vmmonitor graph --dot | dot -Tsvg'),)),
    'snapshot': Task('snapshot all machines of a lab at one moment', None, 'LAB TAG'),
    'load': Task('put all machines of a lab back to a snapshot', None, 'LAB TAG'),
    'capture': Task('write what crosses a nic (its number) to a file, as pcap, until Ctrl-C', None,
                    'MACHINE NIC FILE'),
    'sync': Task('correct clocks now'),
    'check': Task('say whether all is there that is needed, or what to do', None, flags=tuple(
        (f'--{role}', f'as if it ran with --{role}') for role in ROLES[:3])),
    'screenshot': Task(VERBS['screenshot'].help, 1, 'FILE'),
    'console': Task('its serial console; Ctrl-] leaves it', 1),
    'delete': Task('forget machines and the nics that were made for them; disks stay', '+'),
    'clean': Task('remove what interrupted programs left of networks, or what has this name', '*',
                  '', (('--dry-run', 'only show it'), ('--force', 'also what a running machine '
                       'uses'), ('--all', 'all of programs that have ended'))),
    'log': Task('what was done, from the journal', '?'),
    'completion': Task('print what completes these words in bash; in zsh after bashcompinit', None)}

AS_OPTIONS = '--check', '--status', '--sync', '--clean'     # which are the verbs of that name
VERBS_HERE: dict[str, Verb | Task] = {**VERBS, **TASKS}
del VERBS_HERE['metrics']      # they are the service's

# Nothing here expands a guest's name, as compgen -W would: "$(reboot)" is one. zsh has no mapfile.
COMPLETION = """_vmmonitor() {
    local word=${COMP_WORDS[COMP_CWORD]} words name
    COMPREPLY=()
    case $COMP_CWORD:$word in
        *:-*) words='%s' ;;
        1:*) words='%s' ;;
        *) words=$(vmmonitor list --names 2>/dev/null) ;;
    esac
    while IFS= read -r name; do
        [[ $name ]] && printf -v name %%q "$name" && [[ $name == "$word"* ]] && COMPREPLY+=("$name")
    done <<< "$words"
}
complete -o default -F _vmmonitor vmmonitor
"""


def verb_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='vmmonitor', description='Do something with guests, by their names or patterns such '
                                      'as "web*". Without a verb, see vmmonitor --help.')
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
    for verb, row in VERBS_HERE.items():
        task = row if isinstance(row, Task) else Task(row.help)
        one = verbs.add_parser(verb, help=row.help, description=row.help)
        one.set_defaults(all=False, json=False, names=[])
        if task.names is not None:
            one.add_argument('names', nargs=task.names, metavar='NAME')
        for word in task.words.split():
            lab: dict[str, Any] = {} if word != 'LAB' else {
                'nargs': '?', 'default': LAB_FILE, 'help': f'its file; {LAB_FILE}, if left out'}
            one.add_argument(word.lower(), metavar=word, **lab)
        for flag, text in task.flags:
            one.add_argument(flag, action='store_true', help=text)
        if verb == 'up':
            one.add_argument('--wait', choices=GUEST_ENDS, default='', help='then wait until '
                             'it is so for each machine')
        if verb == 'list':
            one.add_argument('--names', dest='only_names', action='store_true', help='no more')
        acts = isinstance(row, Verb) and row.act
        if acts or verb in ('list', 'status', 'sync'):
            one.add_argument('--all', action='store_true', help='all guests')
        if acts:
            one.add_argument('--wait', choices=GUEST_ENDS, help='then wait until it is so')
        if verb not in ('console', 'completion', 'log', 'clean') and not task.words:
            one.add_argument('--json', action='store_true', help='answer in JSON')
        one.add_argument('--config', metavar='FILE', help='the configuration')
        one.add_argument('--verbose', action='store_true', help='log every event, too')
    return parser


def dispatch_verb(options: argparse.Namespace) -> int:
    path = find_config(options.config)
    if not options.config and path and not os.access(path, os.R_OK):
        path = ''                       # the service's; whoever may not read it has the defaults
    if options.verb == 'check':
        roles = [role for role in ROLES if getattr(options, role, False)]
        return show_checks(checks(path, roles), options.json)
    if options.verb == 'clean':
        return command_clean(options)
    if options.verb == 'completion':
        verbs: Any = next(action.choices for action in verb_arguments()._actions if action.choices)
        flags = {flag for parser in (arguments(), *verbs.values()) for action in parser._actions
                 for flag in action.option_strings if action.help != argparse.SUPPRESS}
        show(COMPLETION % ('\n'.join(sorted([*flags, *AS_OPTIONS])), '\n'.join(VERBS_HERE)))
        return 0
    if options.verb == 'log':
        return command_log(''.join(options.names or ()))
    if options.verb == 'capture':
        return command_capture(options)
    if options.verb == 'status' and [name[-5:] for name in options.names] == ['.json']:
        options.lab = options.names.pop()       # no guest's name, but a lab's file
    if 'lab' in options:
        return command_lab(options)
    # The listener's keys are none of these commands' business, nor whether they are right.
    config = load(path, ('monitor',)) if path else Config()
    commands = {'list': command_list, 'status': command_status, 'sync': command_sync,
                'console': command_console}
    return commands.get(options.verb, command_act)(config, options)


def command_act(config: Config, options: argparse.Namespace) -> int:
    """Do something to guests, all at once, and print what was done to each."""
    def screenshot(_guests: Guests, guest: Guest) -> str:
        write_whole(os.path.abspath(options.file), guest.picture(), replace=True)
        return f'its screen is in {options.file}'

    def delete(_guests: Guests, guest: Guest) -> str:
        if isinstance(guest, Domain):
            raise WrongState(f'{guest.name} is no machine of this program', guest.virsh('undefine'))
        if isinstance(guest, (Machine, DamagedMachine)):
            guest.delete(force=False)
        return 'deleted'

    def act(guests: Guests, guest: Guest) -> str:
        says = guests.act(options.verb, guest)
        if options.wait == 'agent' and guest.agent_state() == 'absent':
            raise GuestError(f'{guest.name}: {says}, but {guest.agent_error("not configured")}')
        if options.wait and (not reached(
                guest.name, lambda: guest.is_off() or GUEST_ENDS[options.wait](guest),
                Deadline(ACTION_TIMEOUT)) or options.wait != 'off' and guest.is_off()):
            raise GuestError(f'{guest.name}: {says}, but not {options.wait}')
        return says
    if not options.names and not options.all:
        raise ConfigError(options.verb, ['no guest is named; name some, or say --all'])
    options.names = options.names or ['*']
    do = {'screenshot': screenshot, 'delete': delete}.get(options.verb, act)
    return ask_and_show(
        config, options, lambda guests, guest: {'result': do(guests, guest)},
        lambda answers: (f'{known["name"]}: {known["result"]}' for known in answers
                         if 'result' in known), timeout=ACTION_TIMEOUT)


def command_lab(options: argparse.Namespace) -> int:
    """up, down, plan, status LAB, graph, snapshot and load: do it, and print what was done."""
    down = options.verb == 'down' or options.verb == 'plan' and options.down
    lab = Lab(options.lab)
    if not down or not (os.path.exists(lab.path) or lab.made()):    # what was made counts for it
        lab = Lab.load(options.lab)
    done = set[str]()
    does: dict[str, Callable[[], Iterable[str]]] = {
        'up': lambda: lab.up(done.add, options.wait),
        'down': lambda: lab.down(options.disks, options.force, done.add),
        'plan': lambda: lab.plan(options.down, options.disks),
        'graph': lambda: [lab.graph(options.dot)],
        'snapshot': lambda: [lab.snapshot(options.tag)],
        'load': lambda: [lab.load_snapshot(options.tag)],
        'status': lambda: _lab_lines(lab, options.json)}
    made = lab.file.sections if options.verb == 'up' else lab.made() if down else {}
    with progress([*made.get('machines', ())], done):
        lines = [*does[options.verb]()]
    for line in lines or ['nothing to do']:
        show(line)
    return 0


def _lab_lines(lab: Lab, as_json: bool) -> Iterator[str]:
    rows = lab.status()
    if as_json:
        yield json.dumps({'lab': rows})
        return
    width = max((len(row['name']) for row in rows), default=0)
    for row in rows:
        worse = ', '.join(f'{key} {row[key]:g}' for key in IMPAIRMENTS if key in row)
        yield f'{row["kind"]:7}  {row["name"]:{width}}  {row["state"]}{worse and ", " + worse}'


def command_capture(options: argparse.Namespace) -> int:
    """capture: write what crosses a nic to a file, until Ctrl-C or the end of the machine."""
    machine = Machine.load(options.machine)
    nic = int(options.nic) if options.nic.isdecimal() else options.nic
    with machine.capture(nic, options.file) as path, contextlib.suppress(KeyboardInterrupt):
        show(f'{machine.name}: what crosses its nic {nic} goes to {path}; Ctrl-C ends it',
             sys.stderr)
        while machine.is_alive():
            time.sleep(STATE_POLL)
    return 0


def command_log(name: str) -> int:
    """log: print what the service did, or what it did with one guest."""
    service, users = Service.read(), {0}
    with contextlib.suppress(KeyError):
        users.add(pwd.getpwnam(service.account).pw_uid)
    # A QEMU that the service has started counts as its process, too, and may write what it likes.
    its_own = [f'_UID={user}' for user in sorted(users)] * service.machines
    lines = run(['journalctl', '-q', '-u', 'vmmonitor', '-t', 'vmmonitor', '-o', 'short-iso',
                 '--no-pager', *its_own], LOG_TIMEOUT).stdout.decode(errors='replace').splitlines()
    if not lines:
        raise Error('the journal shows this user nothing of the service',
                    'run this as root, or put the user in the group systemd-journal')
    who = rf'([\w.-]+/)?{re.escape(printable(name))}'
    its = re.compile(rf'(startup|shutdown): (line \d+: )?(\w+ )?{who}[: ]|(\w+ )?{who}: |'
                     rf'request .* target="?{who}"? ')
    for line in lines:
        if not name or its.match(line.partition(']: ')[2]):
            show(line)
    return 0


def command_console(config: Config, options: argparse.Namespace) -> int:
    """console: join a guest's serial console and this terminal, until Ctrl-]."""
    with all_guests(config) as guests:
        guest = guests.find(options.names[0])
    if isinstance(guest, Domain):
        if not which('virsh'):
            raise Error('console: there is no virsh', 'install libvirt-clients')
        os.execvp('virsh', ['virsh', '-c', guest.host.uri, 'console', '--', guest.own])
    if not isinstance(guest, Machine):
        raise MachineError(f'{guest.name} has no console', 'mend its file first')
    before = termios.tcgetattr(0) if os.isatty(0) else None
    with guest.console() as console:
        try:
            if before:
                from tty import setraw
                signal.signal(signal.SIGTERM, signal.default_int_handler)   # puts it back, too
                setraw(0)
            ends = False
            while not ends and guest.is_alive():
                said = console.read()
                try:
                    sys.stdout.buffer.write(said)
                    sys.stdout.flush()
                except OSError as problem:
                    raise OutputLost(problem) from None
                if select.select([0], [], [], STATE_POLL)[0]:
                    typed = os.read(0, 4096)
                    ends = not typed or CONSOLE_LEAVES in typed
                    console.write(typed.partition(CONSOLE_LEAVES)[0])
        finally:
            if before:
                termios.tcsetattr(0, termios.TCSADRAIN, before)
    return 0


def arguments() -> argparse.ArgumentParser:
    verbs = (f'verbs, each with --help:\n  {" ".join(VERBS_HERE)}\n'
             f'  {" ".join(AS_OPTIONS)} are the same\n\n')
    parser = argparse.ArgumentParser(
        prog='vmmonitor.py', epilog=verbs + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Right clocks, staggered starts and an https trigger for the guests of this '
                    'host. Without an option it does what the configuration enables.')
    roles = parser.add_argument_group('roles, any of them, in the foreground')
    roles.add_argument('--monitor', action='store_true', help='correct the clocks of guests')
    roles.add_argument('--startup', action='store_true', help='carry out vmStartupCommands, once')
    roles.add_argument('--listen', action='store_true', help='answer https requests')
    once = parser.add_argument_group('once').add_mutually_exclusive_group()
    once.add_argument('--shutdown', action='store_true', help='carry out vmShutdownCommands now')
    once.add_argument('--version', action='store_true', help='show which version this is')
    once.add_argument('--reload', type=int, help=argparse.SUPPRESS)         # for the unit ...
    once.add_argument('--setup', nargs='*', help=argparse.SUPPRESS)         # ... and install.sh
    parser.add_argument('--config', metavar='FILE',
                        help='the configuration (default: config.json beside this script)')
    parser.add_argument('--dry-run', action='store_true',
                        help='with --startup alone, or --shutdown: only show it')
    parser.add_argument('--verbose', action='store_true', help='log every event, too')
    return parser


def find_config(given: str | None) -> str:
    return given or (OWN_CONFIG if os.path.exists(OWN_CONFIG) else '')


def dispatch(options: argparse.Namespace) -> int:
    path = find_config(options.config)
    roles = [role for role in ROLES[:3] if getattr(options, role)]
    if options.dry_run and not options.shutdown and roles != ['startup']:
        raise ConfigError('--dry-run', ['goes with --startup alone, or --shutdown'])
    if options.setup is not None:
        return command_setup(dict(item.split('=', 1) for item in options.setup))
    if options.version:
        show(f'vmmonitor {__version__}')
        return 0
    if options.reload is not None:
        return command_reload(options.reload)
    if options.shutdown:
        return command_list_steps(load(path, ('monitor',)) if path else Config(), options)
    # Clocks need no configuration; what else is meant stands in one.
    config = Config() if not path and roles == ['monitor'] else load(path or OWN_CONFIG, roles)
    roles = roles or enabled_roles(config)
    if not roles:
        raise ConfigError(path, ['nothing is enabled; set monitor.enabled, startup.enabled, '
                                 'listener.enabled or shutdown.enabled, or say --monitor, '
                                 '--startup or --listen'])
    if options.dry_run:
        return command_list_steps(config, options)
    return Daemon(config, roles, once=not options.startup).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    for option in [word for word in words if word in AS_OPTIONS][:1]:
        words.remove(option)
        words.insert(0, option[2:])
    place = 0
    while words[place:] and words[place][:1] == '-':        # --config FILE VERB is fine, too
        place += 1 + (words[place] == '--config')
    if words[place:] and words[place] in VERBS_HERE:
        words.insert(0, words.pop(place))
    by_verb = bool(words) and words[0][:1] != '-'
    try:
        options = (verb_arguments() if by_verb else arguments()).parse_args(words)
    except SystemExit as ended:         # argparse has said it, or printed the help
        return int(ended.code or 0)
    set_up_logging(options.verbose)
    try:
        return dispatch_verb(options) if by_verb else dispatch(options)
    except OutputLost as problem:
        if not problem.reader_gone:
            log.error('%s', explain(problem))
        return EXIT_FAILED
    except ConfigError as problem:
        for line in problem.problems:
            log.error('%s: %s', problem.path, line)
        return EXIT_USAGE
    except Error as problem:
        log.error('%s', explain(problem))
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:                   # a boundary: a bug is told from a mistake of the user
        log.exception('unexpected error; this is a bug in vmmonitor')
        return EXIT_FAILED


def exit_now(status: int) -> NoReturn:
    """End the process at once: a thread that hangs inside libvirt would hold it for ever."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):       # full, gone, or closed from the start
            status = status or EXIT_FAILED
    RENAMING.acquire(timeout=1)             # else a draft may be left
    os._exit(status)


if __name__ == '__main__':
    exit_now(main())
