"""A real Slurm on one machine, for trying job scripts: a controller and several nodes with fake GPUs.

    python tools/mini_slurm.py start --directory /tmp/mini --nodes 3 --gpus 2
    python tools/mini_slurm.py run --directory /tmp/mini -- sbatch slurm/rl_7b.sh --help
    python tools/mini_slurm.py stop --directory /tmp/mini

All of it lives in namespaces of its own (processes, network, mounts, hostname) below one first process, so that nothing
outlasts it, whoever dies first, and nothing can be reached from outside: the network has only a loopback interface,
which carries one address per node. Files are below one directory. Nodes report more cores than the machine has; GPUs
are null devices, which Slurm counts and no program can use. Needs Linux, root and the packages of PACKAGES.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

# Program -> the Debian package that brings it.
PACKAGES = {
    "slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge", "unshare": "util-linux",
    "ip": "iproute2",
}  # fmt: skip
# Where daemons are; not everybody's PATH leads there.
SBIN = ("/usr/sbin", "/sbin")
NETWORK = "10.77.0."
STATES = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t")
NAMESPACES = ("unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--mount-proc")
START_S, STOP_S, COMMAND_S = 60.0, 15.0, 60.0
# After which a node that does not answer is down, a killed step is gone and a requeued job may start, seconds.
NODE_TIMEOUT_S, KILL_WAIT_S, CREDENTIAL_S = 10, 5, 5

CONFIGURATION = """\
ClusterName=mini
SlurmctldHost=control({network}250)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire={credential}
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SlurmdTimeout={node_timeout}
KillWait={kill_wait}
InactiveLimit=0
MaxArraySize={largest_array}
MessageTimeout=30
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


class MiniSlurm:
    """A cluster below `directory`; as a context manager it is started and stopped.

    Nodes are node1, node2, ...; commands run as on a login node called `control`. Partitions: `main`, and `urgent`,
    whose jobs preempt those of the other.
    """

    def __init__(self, directory: Path | str, nodes: int = 2, gpus: int = 2, cpus: int = 16, largest_array: int = 1001):
        self.directory = Path(directory).resolve()
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.gpus, self.cpus, self.largest_array = gpus, cpus, largest_array
        self._launcher: subprocess.Popen | None = None

    def __enter__(self) -> MiniSlurm:
        self.start(outlive=False)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self, outlive: bool = True) -> None:
        """Return once every node is idle. Unless `outlive`, the cluster ends with this process, however that ends.

        Raises RuntimeError if something is missing or does not start, with the end of its log.
        """
        lacking = missing()
        if lacking:
            raise RuntimeError(f"a Slurm on this machine needs {'; '.join(lacking)}")
        if self._first() is not None:
            raise RuntimeError(f"{self.directory}: a cluster is running there; stop it first")
        self._write_files()
        command = [
            *NAMESPACES, "--kill-child", sys.executable, str(Path(__file__).resolve()), "_first", str(self.directory),
            *self.nodes,
        ]  # fmt: skip
        dies_with_us = [] if outlive else ["setpriv", "--pdeathsig", "KILL"]
        with (self.directory / "first.log").open("wb") as log:
            self._launcher = subprocess.Popen(
                [*dies_with_us, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        children = Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children")
        deadline = time.monotonic() + START_S
        try:
            while not (self.directory / "ready").is_file():
                if self._launcher.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the cluster did not start within {START_S:g} s: {self._last_words()}")
                if children.is_file() and (found := children.read_text().split()):
                    (self.directory / "first.pid").write_text(found[0])
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the daemons, then whatever else is left of the cluster. Twice does no harm."""
        first = self._first()
        if first is not None:
            os.kill(first, signal.SIGTERM)
            try:
                until(lambda: self._first() is None, STOP_S, "the cluster's end")
            except TimeoutError:
                os.kill(first, signal.SIGKILL)
        if self._launcher is not None:
            if first is None:
                self._launcher.kill()
            self._launcher.wait(STOP_S)
            self._launcher = None
        (self.directory / "first.pid").unlink(missing_ok=True)

    def power_off(self, node: str) -> None:
        """End everything on a node at once, as if it had lost its power."""
        home = namespace(self._daemon(node) or 0, "uts")

        def dark() -> bool:
            # Again and again, since what is being ended may be starting something.
            left = [pid for pid in process_ids() if home and namespace(pid, "uts") == home]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        until(dark, STOP_S, f"the end of {node}", pause=0.02)

    def power_on(self, node: str, setup: str = "") -> None:
        """Start a node again and return once it is idle. `setup`: shell commands that make it differ from the others,
        such as mounts, which only this node sees."""
        (self.directory / f"{node}.sh").write_text(setup)
        self.run(*start_node(self.directory, node))
        until(lambda: self.node_state(node) == "idle", START_S, f"{node} to be idle")

    def run(
        self, *command: str, cwd: Path | str | None = None, environment: Mapping[str, str] | None = None,
        timeout: float = COMMAND_S, check: bool = True,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command on the login node. Raises RuntimeError, with what it said, if it fails and `check`."""
        done = subprocess.run(
            self._inside(command, cwd), capture_output=True, text=True, timeout=timeout, check=False,
            env=self._environment(os.environ if environment is None else environment),
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: {"JobState": "RUNNING", "ExitCode": "0:0", "Restarts": "0", ...}."""
        text = self.run("scontrol", "show", "job", "--oneliner", number).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: str, what: Callable[[dict[str, str]], bool], timeout: float) -> dict[str, str]:
        """Poll a job until `what` holds of it. Raises TimeoutError."""
        found: dict[str, str] = {}

        def holds() -> bool:
            found.update(self.job(number))
            return what(found)

        until(holds, timeout, f"job {number}", pause=0.5)
        return found

    def node_state(self, node: str) -> str:
        return self.run(*STATES, f"--nodes={node}").stdout.strip()

    def processes(self) -> Iterator[tuple[int, str, list[str]]]:
        """Every process of the cluster: its id (outside), the node that it is on ("" for the login node's), its
        command."""
        first = self._first()
        if first is None:
            return
        homes = {namespace(pid, "uts"): node for node in self.nodes if (pid := self._daemon(node))}
        mine = namespace(first, "pid")
        for pid in process_ids():
            command = command_of(pid) if namespace(pid, "pid") == mine else []
            if command:
                yield pid, homes.get(namespace(pid, "uts"), ""), command

    def _first(self) -> int | None:
        """The first process' id, outside, or None if it is not running."""
        file = self.directory / "first.pid"
        pid = int(file.read_text()) if file.is_file() else 0
        command = command_of(pid)
        return pid if "_first" in command and str(self.directory) in command else None

    def _daemon(self, node: str) -> int | None:
        """The id of a node's slurmd, outside."""
        configuration = str(self.directory / "slurm.conf")
        for pid in process_ids():
            command = command_of(pid)
            if command[:1] == ["slurmd"] and node in command and configuration in command:
                return pid
        return None

    def _environment(self, given: Mapping[str, str]) -> dict[str, str]:
        path = os.pathsep.join([given.get("PATH", ""), *SBIN])
        return {**given, "PATH": path, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def _inside(self, command: Sequence[str], cwd: Path | str | None) -> list[str]:
        first = self._first()
        if first is None:
            raise RuntimeError(f"{self.directory}: no cluster is running there; start it")
        enter = ["nsenter", f"--target={first}", "--mount", "--uts", "--net", "--pid"]
        return [*enter, "env", f"--chdir={Path(cwd or Path.cwd()).resolve()}", *command]

    def _write_files(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        for name in ("state", "munge", *(f"spool-{node}" for node in self.nodes)):
            (self.directory / name).mkdir(parents=True, mode=0o755)
        addresses = {node: f"{NETWORK}{number}" for number, node in enumerate(self.nodes, 1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {node}" for node, address in addresses.items())]
        (self.directory / "hosts").write_text("\n".join([*lines, f"{NETWORK}250 control"]) + "\n")
        for number in range(self.gpus):
            os.mknod(self.directory / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        gres = f"Gres=gpu:h100:{self.gpus}" if self.gpus else ""
        nodes = [
            f"NodeName={node} NodeAddr={address} Port={17000 + number} CPUs={self.cpus} Boards=1 SocketsPerBoard=1 "
            f"CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory=8000 {gres} State=UNKNOWN"
            for number, (node, address) in enumerate(addresses.items())
        ]
        text = CONFIGURATION.format(
            directory=self.directory, network=NETWORK, nodes="\n".join(nodes), node_timeout=NODE_TIMEOUT_S,
            kill_wait=KILL_WAIT_S, credential=CREDENTIAL_S, largest_array=self.largest_array,
        )  # fmt: skip
        (self.directory / "slurm.conf").write_text(text)
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        devices = f"{self.directory}/gpu[0-{self.gpus - 1}]" if self.gpus > 1 else f"{self.directory}/gpu0"
        line = f"NodeName={','.join(self.nodes)} Name=gpu Type=h100 File={devices}\n" if self.gpus else ""
        (self.directory / "gres.conf").write_text(line)
        key = self.directory / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _last_words(self) -> str:
        words: list[str] = []
        for log in sorted(self.directory.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            telling = [line for line in lines if "error" in line.lower() or log.name == "first.log"]
            words += [f"{log.name}: {line}" for line in telling[-3:]]
        return " | ".join(words) or "no log says why"


def missing() -> list[str]:
    """What this machine lacks, each with what helps; empty if nothing."""
    lacking = []
    if sys.platform != "linux" or os.geteuid() != 0:
        lacking.append("Linux and root (namespaces and device files)")
    path = os.pathsep.join([os.environ.get("PATH", ""), *SBIN])
    packages = [package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None]
    if packages:
        lacking.append(f"Debian packages: apt-get install {' '.join(packages)}")
    if not lacking:
        tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, timeout=COMMAND_S, check=False)
        if tried.returncode:
            lacking.append(f"leave to make namespaces ({tried.stderr.strip()})")
    return lacking


def install(timeout: float = 300.0) -> None:
    """Install what packages are lacking, where that is possible; `missing` says what came of it."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None or not any("apt-get" in line for line in missing()):
        return
    packages = sorted(set(PACKAGES.values()))
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["apt-get", *command], env=environment, capture_output=True, timeout=timeout, check=False)


def until(what: Callable[[], bool], timeout: float, name: str, pause: float = 0.1) -> None:
    """Poll until `what` holds. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {name}")
        time.sleep(pause)


def process_ids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def command_of(pid: int) -> list[str]:
    """A process' command; nothing for one that is gone, or dead and not yet collected."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    return []


def namespace(pid: int, kind: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    return ""


def start_node(directory: Path, node: str) -> list[str]:
    """The command that starts a node's daemon, under a hostname of its own and with mounts of its own."""
    script = (
        'set -e; hostname "$1"; if [ -f "$2/$1.sh" ]; then . "$2/$1.sh"; fi; exec slurmd -N "$1" -f "$2/slurm.conf"'
    )
    return ["unshare", "--uts", "--mount", "--", "sh", "-c", script, "sh", node, str(directory)]


def first_process(directory: Path, nodes: Sequence[str]) -> int:
    """The first process of the namespaces: starts the daemons, collects dead processes, ends with SIGTERM."""
    os.environ["SLURM_CONF"] = str(directory / "slurm.conf")
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *SBIN])
    # With the handler in place the signal interrupts the wait below.
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))

    def do(*command: str) -> None:
        subprocess.run(command, check=True, timeout=COMMAND_S)

    do("ip", "link", "set", "lo", "up")
    for number in [*range(1, len(nodes) + 1), 250]:
        do("ip", "address", "add", f"{NETWORK}{number}/32", "dev", "lo")
    do("mount", "--bind", str(directory / "hosts"), "/etc/hosts")
    do("hostname", "control")
    munge = directory / "munge"
    do(
        "munged", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key", f"--pid-file={munge}/pid",
        f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--origin=127.0.0.1",
    )  # fmt: skip
    do("slurmctld", "-f", str(directory / "slurm.conf"))
    for node in nodes:
        do(*start_node(directory, node))

    def idle() -> bool:
        done = subprocess.run(STATES, capture_output=True, text=True, timeout=COMMAND_S, check=False)
        return done.stdout.split() == ["idle"] * len(nodes)

    until(idle, START_S, "all nodes to be idle", pause=0.2)
    (directory / "ready").touch()
    while not asked:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.1)
    # Job steps end with the namespaces; the daemons get to write their state.
    for file in [*directory.glob("slurmd-*.pid"), directory / "slurmctld.pid", munge / "pid"]:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(file.read_text()), signal.SIGTERM)
    # ChildProcessError: none is left.
    with contextlib.suppress(ChildProcessError, TimeoutError):
        until(lambda: os.waitpid(-1, os.WNOHANG)[0] < 0, STOP_S / 3, "the daemons' end", pause=0.02)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["_first"]:
        return first_process(Path(arguments[1]), arguments[2:])
    parser = argparse.ArgumentParser(prog="mini_slurm.py", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="start a cluster and leave it running")
    start.add_argument("--nodes", type=int, default=2)
    start.add_argument("--gpus", type=int, default=2, help="fake ones per node")
    start.add_argument("--install", action="store_true", help="install missing Debian packages first")
    stop = commands.add_parser("stop", help="end a cluster and everything in it")
    run = commands.add_parser("run", help="run a command (sbatch, squeue, a shell) on the login node")
    run.add_argument("rest", nargs="+", metavar="-- command")
    for one in (start, stop, run):
        one.add_argument("--directory", type=Path, required=True, help="where the cluster has its files")
    options = parser.parse_args(arguments)
    try:
        if options.command == "start":
            if options.install:
                install()
            MiniSlurm(options.directory, options.nodes, options.gpus).start()
        elif options.command == "stop":
            MiniSlurm(options.directory).stop()
        else:
            cluster = MiniSlurm(options.directory)
            inside = cluster._inside(options.rest, None)
            return subprocess.run(inside, env=cluster._environment(os.environ), check=False).returncode
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
