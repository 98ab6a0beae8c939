"""The daemon: one engine behind a Unix socket, for clients that its operator lets in.

Who may connect is the file system's affair: the socket is 0660 in a directory of 0750, both of group `sandboxd`. Who
connected is the kernel's word (SO_PEERCRED). A client names an installed policy and may narrow its limits; it never
sends a path, a policy's text or an interpreter. SIGTERM and SIGINT end the daemon: what runs may finish for a while,
then it is killed, and nothing stays. SIGHUP has its files read again.
"""

from sandboxd.daemon.config import DaemonConfig, load_config
from sandboxd.daemon.listening import listen
from sandboxd.daemon.serving import Daemon, main

__all__ = ["Daemon", "DaemonConfig", "listen", "load_config", "main"]
