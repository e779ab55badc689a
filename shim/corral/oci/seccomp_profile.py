"""corral's default seccomp profile: what a container may ask of the kernel. Everything else fails with EPERM.

It allows what docker's default profile allows. Calls that only make sense with a capability come with that capability.
Left out on purpose, although an ordinary process may use them: keyrings (not namespaced), io_uring and userfaultfd (a
history of holes), AF_ALG and AF_VSOCK sockets (reach past the container's network), new user namespaces.
A 32-bit program still gets such a socket by socketcall, whose arguments lie in memory, out of a filter's reach; without
that call 32-bit programs built with glibc have no sockets at all. As with docker, only a security module can tell them
apart (CVE-2026-31431).
Names that an architecture lacks are skipped there.
"""

from collections.abc import Iterable
from functools import lru_cache

from corral.kernel.syscalls import MACHINE
from corral.oci.spec import Action, Operator, Seccomp, SeccompArg, SeccompSyscall

ALLOWED = {
    "files: opening and names": """
        access chdir chmod chown chown32 close close_range creat dup dup2 dup3 faccessat faccessat2 fchdir
        fchmod fchmodat fchmodat2 fchown fchown32 fchownat getcwd lchown lchown32 link linkat mkdir mkdirat
        mknod mknodat name_to_handle_at open openat openat2 readlink readlinkat rename renameat renameat2 rmdir
        symlink symlinkat umask unlink unlinkat utime utimensat utimensat_time64 utimes futimesat""",
    "files: content": """
        copy_file_range fadvise64 fadvise64_64 fallocate fdatasync flock fsync ftruncate ftruncate64 _llseek
        lseek pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readv sendfile sendfile64 splice
        sync sync_file_range syncfs tee truncate truncate64 vmsplice write writev""",
    "files: facts": """
        fstat fstat64 fstatat64 fstatfs fstatfs64 getdents getdents64 listmount lstat lstat64 newfstatat stat
        stat64 statfs statfs64 statmount statx fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat
        lgetxattr listxattr listxattrat llistxattr lremovexattr lsetxattr removexattr removexattrat setxattr
        setxattrat""",
    "descriptors: control and waiting": """
        epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old
        eventfd eventfd2 fanotify_mark fcntl fcntl64 inotify_add_watch inotify_init inotify_init1
        inotify_rm_watch ioctl io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup
        io_submit _newselect pipe pipe2 poll ppoll ppoll_time64 pselect6 pselect6_time64 select""",
    "memory": """
        brk cachestat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2
        mlockall mmap mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free
        pkey_mprotect process_mrelease remap_file_pages""",
    "processes": """
        execve execveat exit exit_group fork getpgid getpgrp getpid getppid getpriority getrlimit getrusage
        getsid gettid ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
        landlock_restrict_self pidfd_open pidfd_send_signal prctl prlimit64 process_vm_readv process_vm_writev
        ptrace rseq seccomp setpgid setpriority setrlimit setsid set_thread_area get_thread_area set_tid_address
        tgkill tkill ugetrlimit uname uretprobe vfork wait4 waitid waitpid""",
    "users": """
        capget capset getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getresgid
        getresgid32 getresuid getresuid32 getuid getuid32 setfsgid setfsgid32 setfsuid setfsuid32 setgid
        setgid32 setgroups setgroups32 setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid
        setreuid32 setuid setuid32""",
    "threads and scheduling": """
        futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake getcpu get_robust_list
        set_robust_list sched_getaffinity sched_getattr sched_getparam sched_get_priority_max
        sched_get_priority_min sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64
        sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield""",
    "signals": """
        pause restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
        rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack signalfd signalfd4
        sigprocmask sigreturn""",
    "time": """
        adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime
        clock_gettime64 clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time
        timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64
        timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times""",
    "sockets": """
        accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg
        recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair""",
    "System V and POSIX messages": """
        ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
        mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop
        semtimedop_time64 shmat shmctl shmdt shmget""",
    "the rest": "getrandom sysinfo",
}
"""Allowed to everybody, by subject."""

ARCHITECTURE_ONLY = {
    "x86_64": "arch_prctl modify_ldt",
    "aarch64": "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
}
"""Allowed on one machine only (and in its 32-bit mode)."""

WITH_CAPABILITY = {
    "CAP_BPF": "bpf",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_PERFMON": "perf_event_open",
    "CAP_SYS_ADMIN": """
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr
        lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree open_tree_attr
        perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare""",
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYSLOG": "syslog",
}
"""Allowed with a capability."""

SOCKET_FAMILIES = (*range(12), *range(13, 19), 21, 22, 24, 26, *range(27, 34), 35, 36, 39, *range(41, 46))
"""Address families of socket(2): not AF_ALG (38), not AF_VSOCK (40), none that the kernel gave up."""

PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""Linux, 32-bit, UNAME26, both, and asking."""

NEW_NAMESPACES = 0x7E020000
"""The CLONE_NEW* bits of clone(2)."""

_ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}
_ENOSYS = 38


def default_profile(capabilities: Iterable[str]) -> Seccomp:
    """The profile of a container with these CAP_*: its own, 32-bit programs too, but not x32."""
    return _profile(frozenset(capabilities))


@lru_cache(maxsize=16)
def _profile(capabilities: frozenset[str]) -> Seccomp:
    names = [name for group in ALLOWED.values() for name in group.split()]
    names += ARCHITECTURE_ONLY[MACHINE].split()
    for capability, group in WITH_CAPABILITY.items():
        if capability in capabilities:
            names += group.split()
    rules = [SeccompSyscall(tuple(dict.fromkeys(names)), Action.ALLOW)]
    rules += [_when("socket", family) for family in SOCKET_FAMILIES]
    rules += [_when("personality", persona) for persona in PERSONALITIES]
    if "CAP_SYS_ADMIN" not in capabilities:
        no_namespaces = SeccompArg(0, NEW_NAMESPACES, Operator.MASKED_EQ, 0)
        rules.append(SeccompSyscall(("clone",), Action.ALLOW, args=(no_namespaces,)))
        # Its flags lie in memory, out of a filter's reach: libc falls back to clone.
        rules.append(SeccompSyscall(("clone3",), Action.ERRNO, _ENOSYS))
    return Seccomp(Action.ERRNO, 1, _ARCHITECTURES[MACHINE], syscalls=tuple(rules))


def _when(name: str, first_argument: int) -> SeccompSyscall:
    return SeccompSyscall((name,), Action.ALLOW, args=(SeccompArg(0, first_argument, Operator.EQ),))
