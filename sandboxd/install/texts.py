"""The files that an installation writes, as text. Pure.

Directives that are left out of the system service on purpose, each with its reason, are listed in docs/service.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "HOME",
    "MARK",
    "USER",
    "configuration",
    "exec_line",
    "service",
    "socket",
    "sysusers",
    "tmpfiles",
    "user_configuration",
    "user_service",
    "user_socket",
]

USER: Final = "sandboxd"
HOME: Final = "/var/lib/sandboxd"
GECOS: Final = "sandboxd engine"
MARK: Final = "# Written by sandboxd install-service."
"""The first words of every file that may be overwritten and removed."""
_HEAD: Final = f"{MARK} Changes belong in a drop-in: systemctl %sedit sandboxd.%s\n"
_SAFE: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+@:=,")

_BOTH: Final = """\
[Unit]
Description=sandboxd, cells for model-written code
Requires=sandboxd.socket
After=sandboxd.socket
StartLimitIntervalSec=60
StartLimitBurst=10

[Service]
Type=notify
NotifyAccess=main
ExecStart={command} serve{serve}
ExecReload={command} reload{reload}
SyslogIdentifier=sandboxd

# 2: the configuration or the default policy is wrong; trying again would not help.
Restart=on-failure
RestartSec=500ms
RestartPreventExitStatus=2
WatchdogSec=60
TimeoutStartSec=120
# drain_seconds (20), and what the end takes; a longer drain asks for more by itself.
TimeoutStopSec=50
TimeoutAbortSec=10
KillMode=mixed
OOMPolicy=continue

# The engine makes its cells' cgroups below its own.
Delegate=cpu memory pids io
LimitCORE=0
UMask=0077
"""
"""How the service of the system and one of a user begin."""

_SYSTEM: Final = """\
TasksMax=infinity
LimitNOFILE=1048576

# These two map the cells' ids. Nothing else of root's.
User=sandboxd
Group=sandboxd
AmbientCapabilities=CAP_SETUID CAP_SETGID
CapabilityBoundingSet=CAP_SETUID CAP_SETGID
NoNewPrivileges=yes

LogsDirectory=sandboxd
LogsDirectoryMode=0700
StateDirectory=sandboxd
StateDirectoryMode=0700
CacheDirectory=sandboxd
CacheDirectoryMode=0700
Environment=XDG_CACHE_HOME=/var/cache PYTHONNOUSERSITE=1

# What the engine and its cells do without. Cells inherit filters and mounts: docs/service.md says what is missing here,
# and why.
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateMounts=yes
PrivateNetwork=yes
PrivateIPC=yes
IPAddressDeny=any
PrivateDevices=yes
DevicePolicy=closed
ProtectClock=yes
ProtectKernelModules=yes
KeyringMode=private
RemoveIPC=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK
SystemCallArchitectures=native
# Refused, not killed: what a policy answers to its cells stays the stricter.
SystemCallErrorNumber=EPERM
SystemCallFilter=~@clock @cpu-emulation @debug @module @obsolete @raw-io @reboot @swap

[Install]
WantedBy=multi-user.target
Also=sandboxd.socket
"""

_SOCKET: Final = """\
[Unit]
Description=sandboxd, socket for its clients

[Socket]
ListenSequentialPacket=/run/sandboxd/sandboxd.sock
SocketUser=root
SocketGroup=sandboxd
SocketMode=0660
DirectoryMode=0750
Backlog=4096

[Install]
WantedBy=sockets.target
"""

_USER: Final = """\

# newuidmap, which maps the cells' ids, gets its right by its file: no_new_privs would take it away, and with it go all
# directives that install a filter. Those that change mounts would put the engine into a user namespace of systemd's.
NoNewPrivileges=no

[Install]
WantedBy=default.target
Also=sandboxd.socket
"""

_USER_SOCKET: Final = """\
[Unit]
Description=sandboxd, socket for its clients

[Socket]
ListenSequentialPacket=%t/sandboxd/sandboxd.sock
SocketMode=0600
DirectoryMode=0700

[Install]
WantedBy=sockets.target
"""

_CONFIGURATION: Final = """\
# The daemon's configuration; what is commented out shows the default. "sandboxd reload" has it read again.

# The policy of who names none, and where policies are looked for before the shipped ones.
#default_policy = "default"
{policies_dir}
# So long a stop waits for runs that are under way.
#drain_seconds = 20

# Bounds of everything together. These change by a restart only, as do [pool] and [audit].
#max_running = 8          # default: 4 for each CPU; further runs queue
#memory_bytes = "4G"      # default: 80 % of the host's memory
#pids = 4096              # default: 256 for each of max_running, and 1,024

#max_clients = 1024
#max_queued = 10000

# Cells that are kept ready, of each policy.
#[pool]
#maximum = 16
#memory_bytes = 268435456

{audit}"""

_AUDIT: Final = """\
#[audit]
#enabled = true
#path = "/var/log/sandboxd/audit.jsonl"
#max_bytes = "64M"
#keep = 8
#on_failure = "stop"      # or "continue": what happens while nothing can be written
"""


def exec_line(words: Sequence[str]) -> str:
    """*words* as the beginning of an Exec line: systemd's quotes, and its specifiers and variables escaped.

    Source: systemd.service(5), "Command lines".
    """
    return " ".join(_word(word) for word in words)


def _word(word: str) -> str:
    if word and set(word) <= _SAFE:
        return word
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{plain}"'


def service(words: Sequence[str]) -> str:
    """sandboxd.service of the system, that starts the command *words*."""
    return _HEAD % ("", "service") + _BOTH.format(command=exec_line(words), serve="", reload="") + _SYSTEM


def socket() -> str:
    """sandboxd.socket of the system."""
    return _HEAD % ("", "socket") + _SOCKET


def user_service(words: Sequence[str]) -> str:
    """sandboxd.service of a user's own manager."""
    begin = _BOTH.format(
        command=exec_line(words),
        serve=" --config %E/sandboxd/sandboxd.toml",
        reload=" --connect unix:%t/sandboxd/sandboxd.sock",
    )
    return _HEAD % ("--user ", "service") + begin + _USER


def user_socket() -> str:
    """sandboxd.socket of a user's own manager."""
    return _HEAD % ("--user ", "socket") + _USER_SOCKET


def sysusers() -> str:
    """sysusers.d(5): the service's user and its group, whose members are the clients."""
    return f'{MARK}\nu {USER} - "{GECOS}" {HOME}\n'


def tmpfiles() -> str:
    """tmpfiles.d(5): the directory of the socket, which is root's, so that the service cannot replace the socket."""
    return f"{MARK}\nd /run/sandboxd 0750 root {USER} -\n"


def configuration() -> str:
    """/etc/sandboxd/sandboxd.toml as it is when nobody has changed it."""
    return _CONFIGURATION.format(policies_dir='#policies_dir = "/etc/sandboxd/policies"\n', audit=_AUDIT)


def user_configuration(policies: str, audit: str) -> str:
    """sandboxd.toml of a user's own daemon, with the two paths that cannot be the system's."""
    own = f"[audit]\npath = {_toml(audit)}\n" + "".join(_AUDIT.splitlines(keepends=True)[3:])
    return _CONFIGURATION.format(policies_dir=f"policies_dir = {_toml(policies)}\n", audit=own)


def _toml(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
