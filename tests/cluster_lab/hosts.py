"""Several hosts on one Linux machine: each has its own network, processes, name, home, /tmp, /dev/shm and sshd.

They share the machine's files, processors and memory, so that the environment is installed once, and a folder on disk
is to them what NFS is to machines. A switch in the first host's network joins them; a link can be cut, a host killed
and started again. Needs root, iproute2, util-linux, OpenSSH and rsync.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.conftest import ROOT

PREFIX = "rayjobs-lab"
TOOLS = ("ip", "unshare", "nsenter", "rsync", "ssh", "ssh-keygen", "/usr/sbin/sshd")


def lacking() -> str:
    """Why there can be no hosts here; empty if there can."""
    if not sys.platform.startswith("linux") or os.geteuid():
        return "hosts are made of Linux namespaces, which takes root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"hosts need {', '.join(missing)}: apt install iproute2 openssh-server rsync" if missing else ""


class Hosts:
    """Hosts 0 to n - 1 at 10.78.0.10 onwards; host 0 is where its user sits, and can ssh to all of them."""

    def __init__(self, folder: Path, n: int, disks: Mapping[Path, str]) -> None:
        """`disks` are small ones that all hosts share: {folder: size}."""
        self.folder, self.disks, self.processes = folder, disks, dict[int, subprocess.Popen[bytes]]()
        self.project = folder / "project"
        self._copy_project()
        self.down()  # what an earlier run may have left
        for path, size in disks.items():
            _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
        for host in range(n):
            _run("ip", "netns", "add", _namespace(host))
            if host == 0:
                _run("ip", "-n", _namespace(0), "link", "add", "switch", "type", "bridge")
                _run("ip", "-n", _namespace(0), "addr", "add", f"{self.address(0)}/24", "dev", "switch")
                _run("ip", "-n", _namespace(0), "link", "set", "switch", "up")
            else:
                cable = ["link", "add", f"port{host}", "type", "veth", "peer", "name", "eth0"]
                _run("ip", "-n", _namespace(0), *cable, "netns", _namespace(host))
                _run("ip", "-n", _namespace(0), "link", "set", f"port{host}", "master", "switch", "up")
                _run("ip", "-n", _namespace(host), "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
                _run("ip", "-n", _namespace(host), "link", "set", "eth0", "up")
                _run("ip", "-n", _namespace(host), "route", "add", "default", "via", self.address(0))
            _run("ip", "-n", _namespace(host), "link", "set", "lo", "up")
            self.start(host)

    def _copy_project(self) -> None:
        """Copies the project without what git ignores, so that an edit meanwhile changes nothing on the hosts."""
        list_files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(list_files, cwd=ROOT, capture_output=True, check=True)
        copy = ["rsync", "-a", "--from0", "--files-from=-", "--ignore-missing-args", f"{ROOT}/", str(self.project)]
        subprocess.run(copy, input=listed.stdout, capture_output=True, check=True)

    def address(self, host: int) -> str:
        return f"10.78.0.{10 + host}"

    def start(self, host: int) -> None:
        """Boots a host; one that was killed comes back with its disk, but with none of its processes."""
        own = self.folder / str(host)
        ssh = own / "root" / ".ssh"
        for made in (ssh, own / "tmp"):
            made.mkdir(parents=True, exist_ok=True)
        ssh.chmod(0o700)
        shutil.copy(self.folder / "key.pub", ssh / "authorized_keys")
        if host == 0:
            shutil.copy(self.folder / "key", ssh / "id_ed25519")
        (own / "hosts").write_text("127.0.0.1 localhost\n")
        (own / "boot.sh").write_text("\n".join([*self._boot(own), f"hostname host{host}", self._sshd(own)]))
        enter = ["ip", "netns", "exec", _namespace(host), "unshare", "--pid", "--fork", "--kill-child", "--mount"]
        with (own / "sshd.log").open("ab") as log:
            self.processes[host] = subprocess.Popen(
                [*enter, "--mount-proc", "--uts", "--ipc", "bash", "-e", str(own / "boot.sh")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 20
        while self.processes[host].poll() is None and time.monotonic() < deadline:
            if b"Server listening" in (own / "sshd.log").read_bytes():
                return
            time.sleep(0.1)
        raise RuntimeError(f"host {host} did not start: {(own / 'sshd.log').read_text()[-500:]}")

    def _boot(self, own: Path) -> list[str]:
        """Its own /root, /tmp, /run and /dev/shm; what tests need of the machine's stays where it is."""
        lines = []
        for at in (Path("/root"), Path("/tmp")):
            mine = own / at.name
            for kept in {ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), self.folder}:
                if kept.is_relative_to(at):
                    within = mine / kept.relative_to(at)
                    within.mkdir(parents=True, exist_ok=True)
                    lines.append(f"mount --rbind {kept} {within}")
            lines.append(f"mount --rbind {mine} {at}")
        lines += ["mount -t tmpfs tmpfs /run", "mkdir /run/sshd", "mount -t tmpfs -o size=2g tmpfs /dev/shm"]
        return [*lines, f"mount --bind {own}/hosts /etc/hosts", "mount --bind /dev/null /etc/resolv.conf"]

    def _sshd(self, own: Path) -> str:
        options = {"HostKey": self.folder / "key", "PidFile": "none", "UsePAM": "no", "StrictModes": "no"}
        options |= {"PasswordAuthentication": "no", "MaxStartups": 100, "MaxSessions": 100}
        return " ".join(["exec /usr/sbin/sshd -D -e -f /dev/null", *(f"-o {k}={v}" for k, v in options.items())])

    def popen(self, host: int, command: Sequence[str], **how: object) -> "subprocess.Popen[str]":
        """Starts a command on a host, in a copy of the project, with this environment's programs."""
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        home = ["env", "-i", "HOME=/root", "USER=root", "LANG=C.UTF-8", "TERM=dumb", f"PATH={path}"]
        enter = ["nsenter", "-t", str(self._first_process(host)), "-n", "-p", "-m", "-u", "-i", f"--wd={self.project}"]
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
        return subprocess.Popen([*enter, *home, *command], **(piped | how))  # type: ignore[call-overload]

    def run(self, host: int, *command: str, timeout: float = 300) -> str:
        """A command's output. Raises RuntimeError if it fails."""
        process = self.popen(host, command)
        output, _ = process.communicate(timeout=timeout)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{output[-3000:]}")
        return output

    def link(self, host: int, state: str) -> None:
        """Plugs a host's cable in ("up") or out ("down")."""
        _run("ip", "-n", _namespace(0), "link", "set", f"port{host}", state)

    def power_off(self, host: int) -> None:
        """Ends a host without a word to anyone: nothing closes its connections."""
        self.link(host, "down")
        os.kill(self._first_process(host), signal.SIGKILL)
        self.processes.pop(host).wait()

    def power_on(self, host: int) -> None:
        (self.folder / str(host) / "sshd.log").write_bytes(b"")
        self.link(host, "up")
        self.start(host)

    def pids(self, host: int) -> list[int]:
        """The host's processes, by the machine's numbers."""
        listed = subprocess.run(["ip", "netns", "pids", _namespace(host)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def down(self) -> None:
        """Ends and removes all hosts."""
        names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout.split()
        ours = [name for name in names if name.startswith(f"{PREFIX}-")]
        for name in ours:
            for pid in self.pids(int(name.rpartition("-")[2])):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for process in self.processes.values():
            process.wait()
        for name in ours:
            _run("ip", "netns", "del", name)
        for path in self.disks:
            subprocess.run(["umount", path], capture_output=True, check=False)

    def _first_process(self, host: int) -> int:
        for pid in self.pids(host):
            status = Path(f"/proc/{pid}/status").read_text()
            if next(line for line in status.splitlines() if line.startswith("NSpid")).split()[-1] == "1":
                return pid
        raise RuntimeError(f"host {host} is not running")


def _namespace(host: int) -> str:
    return f"{PREFIX}-{host}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
