"""Isolates the current process with what the Linux kernel offers, without privileges.

Three parts, each of which may be missing: namespaces (a private file system in memory, no network, no other process),
Landlock (rules on paths) and seccomp (a filter of system calls). A part that cannot be applied raises OSError.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

PARTS = ("namespaces", "landlock", "seccomp")
DISK_BYTES = 16 << 20
"""Size of the private file system. It is memory, and goes away with the process."""

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_MOUNT_RDONLY, _MOUNT_NOSUID = 1, 2
_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38
_SIGKILL, _EPERM, _ENOSYS = 9, 1, 38

# Numbers of system calls are those of x86-64 and of arm64; calls of 424 and above have one number everywhere.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT, _MOUNT_SETATTR, _CLONE3 = 444, 445, 446, 442, 435
_PIVOT_ROOT, _CAPSET, _CLONE, _PRLIMIT = (155, 41), (126, 91), (56, 220), (302, 261)
_CLONE_THREAD = 0x00010000

_REFUSED_CALLS: tuple[tuple[int | None, int | None], ...] = (
    (41, 198),  # socket
    (57, None),  # fork
    (58, None),  # vfork
    (59, 221),  # execve
    (322, 281),  # execveat
    (62, 129),  # kill
    (200, 130),  # tkill
    (234, 131),  # tgkill
    (129, 138),  # rt_sigqueueinfo
    (297, 240),  # rt_tgsigqueueinfo
    (424, 424),  # pidfd_send_signal
    (434, 434),  # pidfd_open
    (438, 438),  # pidfd_getfd
    (101, 117),  # ptrace
    (310, 270),  # process_vm_readv
    (311, 271),  # process_vm_writev
    (312, 272),  # kcmp
    (165, 40),  # mount
    (166, 39),  # umount2
    (155, 41),  # pivot_root
    (161, 51),  # chroot
    (272, 97),  # unshare
    (308, 268),  # setns
    *((number, number) for number in range(428, 434)),  # open_tree, move_mount, fsopen, fsconfig, fsmount, fspick
    (442, 442),  # mount_setattr
    (304, 265),  # open_by_handle_at
    (76, 45),  # truncate
    (90, None),  # chmod
    (91, 52),  # fchmod
    (268, 53),  # fchmodat
    (452, 452),  # fchmodat2
    (92, None),  # chown
    (93, 55),  # fchown
    (94, None),  # lchown
    (260, 54),  # fchownat
    *((188 + offset, 5 + offset) for offset in range(3)),  # setxattr, lsetxattr, fsetxattr
    *((197 + offset, 14 + offset) for offset in range(3)),  # removexattr, lremovexattr, fremovexattr
    *((number, number) for number in (463, 466)),  # setxattrat, removexattrat
    (132, None),  # utime
    (235, None),  # utimes
    (261, None),  # futimesat
    (280, 88),  # utimensat
    (133, None),  # mknod
    (259, 33),  # mknodat
    (425, 425),  # io_uring_setup
    (426, 426),  # io_uring_enter
    (427, 427),  # io_uring_register
    (321, 280),  # bpf
    (298, 241),  # perf_event_open
    (323, 282),  # userfaultfd
    (250, 219),  # keyctl
    (248, 217),  # add_key
    (249, 218),  # request_key
    (319, 279),  # memfd_create
    (447, 447),  # memfd_secret
    (29, 194),  # shmget
    (64, 190),  # semget
    (68, 186),  # msgget
    (240, 180),  # mq_open
    (141, 140),  # setpriority
    (203, 122),  # sched_setaffinity
    (144, 119),  # sched_setscheduler
    (314, 274),  # sched_setattr
    (251, 30),  # ioprio_set
)

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REMOVE, _MAKE_DIR, _MAKE_REG, _TRUNCATE = 1 << 4 | 1 << 5, 1 << 7, 1 << 8, 1 << 14
# The number of access rights that Landlock knows, by the version of its interface.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}


def readable_paths() -> list[str]:
    """Return what the interpreter needs: its own folders, with installed packages, and the system's libraries."""
    wanted = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__)}
    wanted |= {"/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime"}
    everything = {path for path in wanted | {os.path.realpath(path) for path in wanted} if os.path.exists(path)}
    folders = {path for path in everything if os.path.isdir(path) and not os.path.islink(path)} - {"/"}
    inside = {path for path in everything for parent in folders if path.startswith(f"{parent}/")}
    return [*sorted(everything - inside - {"/"}), "/dev/null", "/dev/zero", "/dev/urandom"]


def enter_namespaces(folder: str, readable: Sequence[str]) -> None:
    """Continue in a new process whose file system holds the readable paths and an empty ``/work``, its folder.

    The calling process waits for the new one and leaves with its exit code. The capabilities are dropped.

    folder: an empty folder, on which the private file system is mounted
    """
    user, group = os.getuid(), os.getgid()
    _called("unshare", _NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _build_root(folder, readable)
    child = os.fork()
    if child:
        for descriptor in range(3):  # otherwise the other end would not notice that the child has ended
            os.close(descriptor)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _called("prctl", _PDEATHSIG, _SIGKILL, 0, 0, 0)
    _syscall(_CAPSET[_machine()[0]], struct.pack("=Ii", 0x20080522, 0), bytes(24))


def restrict_files(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Allow reading below ``readable`` only and writing below ``writable`` only, by Landlock."""
    version = _syscall(_LANDLOCK_CREATE, None, 0, 1)
    every = (1 << _RIGHTS.get(version, 16)) - 1
    connections = 3 if version >= 4 else 0
    scope = 3 if version >= 6 else 0  # signals and abstract sockets
    attributes = struct.pack("=QQQ", every, connections, scope)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _syscall(_LANDLOCK_CREATE, attributes, size, 0)
    reading = _READ_FILE | _READ_DIR
    writing = reading | _WRITE_FILE | _REMOVE | _MAKE_DIR | _MAKE_REG | _TRUNCATE
    for path, rights in [*((path, reading) for path in readable), *((path, writing) for path in writable)]:
        if path == "/dev/null":
            rights |= _WRITE_FILE
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights & every, descriptor), 0)
        os.close(descriptor)
    _called("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _syscall(_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def refuse_calls() -> None:
    """Refuse the system calls that reach other processes, the network or a file's attributes, by seccomp."""
    column, machine = _machine()
    refused = sorted({pair[column] for pair in _REFUSED_CALLS} - {None})  # type: ignore[type-var]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown, kill = 0x7FFF0000, 0x00050000 | _EPERM, 0x00050000 | _ENOSYS, 0x80000000
    code = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, machine),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 0, 1, 0x40000000),  # the calls of x32
        (give, 0, 0, unknown),
    ]
    for number in refused:
        assert number is not None
        code += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    # The C library tries clone3, whose flags a filter cannot read, and then clone.
    code += [(equal, 0, 1, _CLONE3), (give, 0, 0, unknown)]
    # Threads are allowed, processes are not. Limits may be read and lowered, but not those of another process.
    code += [(equal, 0, 3, _CLONE[column]), (load, 0, 0, 16), (any_bit, 1, 0, _CLONE_THREAD), (give, 0, 0, refuse)]
    code += [(load, 0, 0, 0), (equal, 0, 3, _PRLIMIT[column]), (load, 0, 0, 16), (equal, 1, 0, 0)]
    code += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    content = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(content))
    _called("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _called("prctl", _SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0)


def hide_memory() -> None:
    """Keep other processes of the same user from reading this process's memory."""
    _called("prctl", _SET_DUMPABLE, 0, 0, 0, 0)


def _build_root(folder: str, readable: Sequence[str]) -> None:
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={DISK_BYTES},nr_inodes=4096,mode=755")
    for path in readable:
        target = f"{folder}{path}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            Path(target).touch()
        _mount(path, target, None, _MS_BIND | _MS_REC)
        attributes = struct.pack("=QQQQ", _MOUNT_RDONLY | _MOUNT_NOSUID, 0, 0, 0)
        _syscall(_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, len(attributes))
    for name in ("work", "tmp"):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
    os.chdir(folder)
    _syscall(_PIVOT_ROOT[_machine()[0]], b".", b".")
    _called("umount2", b".", _MNT_DETACH)
    os.chdir("/work")


def _machine() -> tuple[int, int]:
    """The column of system call numbers and the architecture's number in seccomp."""
    found = _MACHINES.get(platform.machine())
    if found is None or sys.platform != "linux" or struct.calcsize("P") != 8:
        raise OSError(_ENOSYS, f"not known for {sys.platform} on {platform.machine()}")
    return found


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _called("mount", texts[0], texts[1], texts[2], flags, texts[3])


def _called(name: str, *arguments: object) -> int:
    function = getattr(_libc(), name, None)
    if function is None:
        raise OSError(_ENOSYS, name)
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(function(*wide))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(number: int, *arguments: object) -> int:
    _machine()
    return _called("syscall", number, *arguments)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
