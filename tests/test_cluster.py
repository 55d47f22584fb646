"""Runs of several processes: equal to those of one, and ending together whatever happens to one.

All are real processes on this machine's loopback interface.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgrpo.checkpoint import load_run_model
from jaxgrpo.config_file import load_config
from jaxgrpo.data import load_problems
from jaxgrpo.link import LOST
from jaxgrpo.models.hf import load_hf
from jaxgrpo.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
LIMIT_S = 240  # for whatever must not hang


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Processes:
    """Started processes, their output in files; killed at the latest when the block is left."""

    def __init__(self, folder, commands, cwd=lambda i: None, **env):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        flags = os.environ["XLA_FLAGS"].split()
        env = {
            **os.environ,
            "XLA_FLAGS": " ".join(f for f in flags if "device_count" not in f),
            "PYTHONPATH": str(ROOT),
            **env,
        }
        self.all = []
        for i, (command, more) in enumerate(commands):
            with (folder / f"out{i}").open("w") as out, (folder / f"err{i}").open("w") as err:
                self.all.append(
                    subprocess.Popen(
                        command, stdout=out, stderr=err, env={**env, **more}, cwd=cwd(i)
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.wait()

    def wait_until(self, condition):
        """Polls; fails if a process ends before, or it takes too long."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() is None for process in self.all), self.said()
            time.sleep(0.02)

    def codes(self):
        """Exit codes, once all have ended."""
        try:
            return [process.wait(LIMIT_S) for process in self.all]
        except subprocess.TimeoutExpired:
            pytest.fail(f"does not end: {self.said()}")

    def out(self, i):
        return self._text(f"out{i}")

    def err(self, i):
        return self._text(f"err{i}")

    def _text(self, name):
        """All but whom the CPU's collectives say they met, whose threads mix their words."""
        lines = (self.folder / name).read_text().splitlines(True)
        gloo = [
            "[Gloo]" in line or "peer ranks" in line or not line.strip(" 0123456789\n")
            for line in lines
        ]
        return "".join(line for line, is_gloo in zip(lines, gloo, strict=True) if not is_gloo)

    def said(self):
        return "\n".join(f"{i}: {self.out(i)}{self.err(i)}" for i in range(len(self.all)))


# ---- Runs


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A short version of the shipped example, with prompts of one bucket."""
    config = load_config(CONFIGS / "invoice_tiny.toml")
    tokenizer = load_tokenizer(config.model.path)
    folder = tmp_path_factory.mktemp("data")
    for file, lines in (("train.jsonl", 40), ("heldout_50.jsonl", 4)):
        source = CONFIGS / "invoices" / file
        short = [len(p.prompt) in range(66, 98) for p in load_problems(source, tokenizer, 128)]
        kept = itertools.compress(source.read_text("utf-8").splitlines(True), short)
        (folder / file).write_text("".join(itertools.islice(kept, lines)), "utf-8")
    return [
        *("--data.train", str(folder / "train.jsonl")),
        *("--data.heldout", str(folder / "heldout_50.jsonl")),
        *("--eval.every", "0"),
        *("--eval.samples", "0"),
        *("--checkpoint.every", "1"),
        *("--checkpoint.keep", "9"),
        *("--signal.preflight-groups", "4"),
        *("--grpo.kl-beta", "0"),
        *("--rollout.problems", "4"),
        *("--rollout.group", "4"),
        *("--sampling.draft", "2"),
        *("--run.steps", "4"),
        "--model.no-unroll",
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory, options):
    """Starts a run on devices that are divided over some processes."""
    programs = tmp_path_factory.mktemp("programs")
    outputs = tmp_path_factory.mktemp("outputs")

    def start(run_dir, processes, *more, of_process=lambda i: (), devices=4, **popen):
        where = ["--cluster.coordinator", f"127.0.0.1:{free_port()}"]
        where += ["--cluster.processes", str(processes), "--cluster.timeout", "120"]
        train = [sys.executable, "-m", "jaxgrpo.train", *options, "--run.dir", str(run_dir), *more]
        commands = [
            train
            + ([*where, "--cluster.process", str(i)] if processes > 1 else [])
            + [*of_process(i)]
            for i in range(processes)
        ]
        return Processes(
            outputs / f"{random.getrandbits(64):x}",
            [(command, {}) for command in commands],
            JAX_NUM_CPU_DEVICES=str(devices // processes),
            JAX_ENABLE_COMPILATION_CACHE="true",
            JAX_COMPILATION_CACHE_DIR=str(programs),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            **popen,
        )

    return start


def read(run_dir, name):
    path = run_dir / f"{name}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def without_times(records):
    speeds = ("seconds", "sample_tokens_per_s", "train_tokens_per_s", "compilations")
    return [{k: v for k, v in r.items() if k not in speeds} for r in records]


def parameters(run_dir):
    model, _, _ = load_run_model(run_dir)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def assert_equal_runs(a, b):
    """The same text, the same rewards, the same numbers to the last bit."""
    for name in ("metrics", "completions", "eval"):
        assert without_times(read(a, name)) == without_times(read(b, name))
    for x, y in zip(parameters(a), parameters(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_same_within_rounding(a, b):
    """The same text and rewards; what is added up over devices, in another order, to rounding.

    Processes add up what their own devices have before they add up among themselves.
    """
    assert read(a, "completions") == read(b, "completions")
    assert without_times(read(a, "eval")) == without_times(read(b, "eval"))
    for x, y in zip(*(without_times(read(run, "metrics")) for run in (a, b)), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            if isinstance(x[name], float):
                np.testing.assert_allclose(x[name], y[name], rtol=1e-4, atol=2e-5, err_msg=name)
            else:
                assert x[name] == y[name]
    base = [
        np.asarray(x) for x in jax.tree.leaves(load_hf(load_config(a / "config.toml").model.path))
    ]
    moved = max(np.abs(x - y).max() for x, y in zip(base, parameters(a), strict=True))
    apart = max(np.abs(x - y).max() for x, y in zip(parameters(a), parameters(b), strict=True))
    assert apart < 0.01 * moved


def listening(pid):
    """The addresses on which a process listens."""
    inodes = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(handle)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].partition(":")[0])
    return addresses


@pytest.fixture(scope="module")
def two_processes(start, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    with start(run_dir, 2) as run:
        run.wait_until(lambda: read(run_dir, "metrics"))
        addresses = listening(run.all[0].pid) | listening(run.all[1].pid)
        assert run.codes() == [0, 0], run.said()
        return run_dir, run.out(0), run.out(1), run.err(1), addresses


@pytest.fixture(scope="module")
def one_process(start, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    with start(run_dir, 1) as run:
        assert run.codes() == [0], run.said()
    return run_dir


def test_two_processes_train_as_one(two_processes, one_process):
    assert len(read(two_processes[0], "metrics")) == 4
    assert_same_within_rounding(two_processes[0], one_process)


def test_process_0_alone_prints(two_processes):
    _, out0, out1, err1, _ = two_processes
    assert out0.count("step 4/4") == 1
    assert out1 == err1 == ""


def test_nobody_listens_on_all_addresses(two_processes):
    *_, addresses = two_processes
    loopback = "0100007F"  # in the kernel's byte order
    assert loopback in addresses
    assert not addresses & {"0" * 8, "0" * 32}


def copy_until(run_dir, step, to):
    """A run as if it had been stopped after a step."""
    shutil.copytree(run_dir, to)
    for checkpoint in (to / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return to


def test_goes_on_with_another_number_of_processes(two_processes, one_process, start, tmp_path):
    whole, *_ = two_processes
    as_one = copy_until(whole, 2, tmp_path / "as_one")
    with start(as_one, 1) as run:
        assert run.codes() == [0], run.said()
        assert "restored step 2" in run.out(0)
    assert_same_within_rounding(as_one, one_process)
    as_two = copy_until(one_process, 2, tmp_path / "as_two")
    with start(as_two, 2) as run:
        assert run.codes() == [0, 0], run.said()
        assert "restored step 2" in run.out(0)
    assert_same_within_rounding(as_two, one_process)


def test_stopped_and_killed_processes_and_the_same_command_again(two_processes, start, tmp_path):
    whole, *_ = two_processes
    host = socket.gethostname()
    with start(tmp_path / "run", 2) as run:
        run.wait_until(lambda: read(tmp_path / "run", "metrics"))
        run.all[1].send_signal(signal.SIGTERM)  # both stop at the same place
        assert run.codes() == [143, 143], run.said()
        assert re.match(r"SIGTERM: step [12] is saved in .*; the same command", run.err(0))
        assert run.err(1) == "SIGTERM: saving, then stopping; another one stops at once\n"
    with start(tmp_path / "run", 2) as run:
        run.wait_until(lambda: len(read(tmp_path / "run", "metrics")) >= 2)
        run.all[1].send_signal(signal.SIGKILL)
        assert run.codes() == [LOST, -signal.SIGKILL], run.said()
        assert run.err(0).startswith(f"error: process 1 on {host} is gone: ")
        assert run.err(0).count("\n") == 1
    with start(tmp_path / "run", 2) as run:
        run.wait_until(lambda: len(read(tmp_path / "run", "metrics")) >= 3)
        run.all[0].send_signal(signal.SIGKILL)
        assert run.codes() == [-signal.SIGKILL, LOST], run.said()
        # JAX may have begun to say so, too, in lines before or after.
        gone = f"error: process 0 on {host}, the coordinator, is gone: "
        ours = f"process 1 on {host}: {gone}"
        assert any(line.startswith(ours) for line in run.err(1).splitlines()), run.said()
    with start(tmp_path / "run", 2) as run:
        assert run.codes() == [0, 0], run.said()
        assert "restored step" in run.out(0)
    assert_equal_runs(tmp_path / "run", whole)


def test_tensor_parallel_over_processes(start, one_process, tmp_path):
    mesh = ("--mesh.fsdp", "1", "--mesh.tp", "2", "--run.steps", "1")
    mesh += ("--signal.preflight-groups", "0")
    with start(tmp_path / "run", 2, *mesh, devices=2) as run:
        assert run.codes() == [0, 0], run.said()
    expected = [r for r in read(one_process, "completions") if r["step"] == 1]
    assert read(tmp_path / "run", "completions") == expected


def test_processes_of_different_configurations_do_not_start(start, tmp_path):
    lr = lambda i: ("--update.lr", f"{1 + i}e-4")  # noqa: E731
    with start(tmp_path / "run", 2, of_process=lr) as run:
        assert run.codes() == [2, 2], run.said()
        host = socket.gethostname()
        assert run.err(0) == (
            f"error: update.lr is 0.0001 on process 0 on {host} and 0.0002 on process 1 on {host}:"
            " start all processes alike\n"
        )
        assert run.out(0) + run.out(1) + run.err(1) == ""
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_one_process_does_not_see(start, tmp_path):
    for i in range(2):
        (tmp_path / str(i)).mkdir()
    with start("run", 2, cwd=lambda i: tmp_path / str(i)) as run:
        assert run.codes() == [2, 2], run.said()
        assert run.err(0) == (
            f"error: process 1 on {socket.gethostname()}: there is no {tmp_path / '1' / 'run'}:"
            " run.dir must be on a file system that all processes share\n"
        )


def test_rewards_that_fail_end_all_processes(start, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def picky(completion, row):\n"
        "    if completion != '{}':\n"  # every row is tried with that
        "        raise KeyError('total')\n"
        "    return len(completion)\n"
    )
    with start(tmp_path / "run", 2, "--rewards", f"{reward}:picky", "1") as run:
        assert run.codes() == [2, 2], run.said()
        assert re.match(
            r"error: \d+ of 16 completions could not be scored, .*for the reason exception:"
            rf" reward '{reward}:picky' failed: {reward}:3: KeyError: 'total' for the completion '",
            run.err(0),
        )
        assert run.err(0).count("\n") == 1
        assert run.err(1) == ""


# ---- What processes tell each other


def together(tmp_path, body, numbers=(0, 1, 2), envs=None, **config):
    """Runs Python lines in processes that join as these numbers."""
    config = {
        "coordinator": f"127.0.0.1:{free_port()}",
        "processes": len(numbers),
        "process": "me",
    } | config
    settings = ", ".join(f"{k}={'me' if v == 'me' else repr(v)}" for k, v in config.items())
    code = (
        "import os, sys, time\n"
        "from jaxgrpo import cluster\n"
        "from jaxgrpo.cli import run_main\n"
        "from jaxgrpo.config import ClusterConfig\n"
        "def main():\n"
        "    me = int(sys.argv[1])\n"
        f"    with cluster.join(ClusterConfig({settings})):\n"
        + "".join(f"        {line}\n" for line in (body or "pass").splitlines())
        + "run_main(main)\n"
    )
    envs = envs or [{}] * len(numbers)
    commands = [
        ([sys.executable, "-c", code, str(i)], env) for i, env in zip(numbers, envs, strict=True)
    ]
    return Processes(tmp_path / f"{random.getrandbits(64):x}", commands)


def test_results_come_to_all_in_order(tmp_path):
    body = (
        "assert (cluster.index(), cluster.count(), cluster.is_main()) == (me, 3, me == 0)\n"
        "value = {'me': me, 'text': chr(233) + '\\n' * me, 'number': 0.1 + me}\n"
        "assert cluster.gather(lambda: value)[me] == value\n"
        "assert [each['me'] for each in cluster.gather(lambda: value)] == [0, 1, 2]\n"
        "assert cluster.on_main(lambda: me + 7) == 7\n"
        "mine = []\n"
        "f = lambda part: mine.extend(part) or [x * x for x in part]\n"
        "assert cluster.divided(f, list(range(8))) == [x * x for x in range(8)]\n"
        "assert mine == list(range(8))[me::3]\n"
        "assert cluster.divided(f, []) == []\n"
        "cluster.check_same(lambda: {'a': [1, 'x'], 'b': None})\n"
        "import jax\n"
        "assert (jax.process_index(), jax.process_count()) == (me, 3)\n"
        "time.sleep(0.2 * (2 - me))\n"
        "print('done')"
    )
    with together(tmp_path, body) as run:
        assert run.codes() == [0, 0, 0], run.said()
        assert run.out(0) == "done\n"
        assert run.out(1) + run.out(2) == ""  # what they print goes to stderr


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        # The same on all, on one within what all do together, on one alone.
        ("raise ValueError('no such thing')", 2, "error: no such thing\n"),
        (
            "cluster.gather(lambda: int('x' if me else '2'))",
            2,
            "error: process 1 on {host}: invalid literal for int() with base 10: 'x'\n",
        ),
        (
            "if me: raise OSError('disk full')\ncluster.gather(int)",
            2,
            "error: process 1 on {host}: disk full\n",
        ),
        (
            "if me: me / 0\ncluster.gather(int)",
            1,
            "error: process 1 on {host}: ZeroDivisionError: division by zero\n",
        ),
        (
            "cluster.check_same(lambda: {'a': 1, 'b' if me else 'c': 2})",
            2,
            "error: c is 2 on process 0 on {host} and None on process 1 on {host}: start all"
            " processes alike\n",
        ),
    ],
)
def test_an_error_of_one_ends_all(tmp_path, body, code, message):
    with together(tmp_path, body, [0, 1]) as run:
        assert run.codes() == [code, code], run.said()
        assert run.err(0) == message.format(host=socket.gethostname())
        # A traceback is where the bug was; what is one line, process 0 says for all.
        assert ("Traceback" in run.err(1)) == (code == 1)
        assert code == 1 or run.err(1) == ""


def test_a_process_that_ends_is_named_by_all_others(tmp_path):
    body = "if me == 2: os.kill(os.getpid(), 15)\ncluster.gather(int)"
    with together(tmp_path, body) as run:
        assert run.codes() == [LOST, LOST, -signal.SIGTERM], run.said()
        host = socket.gethostname()
        gone = (
            f"error: process 2 on {host} is gone: the same command, on all processes, goes on from"
            " the last checkpoint\n"
        )
        assert run.err(0) == gone
        assert run.err(1) == f"process 1 on {host}: {gone}"


# ---- How they meet


def test_a_coordinator_that_is_not_there(tmp_path):
    where = f"127.0.0.1:{free_port()}"
    with together(tmp_path, "", [1], coordinator=where, processes=2, timeout=1) as run:
        assert run.codes() == [2]
        assert run.err(0) == (
            f"error: process 1 cannot reach process 0 at {where} within 1 s (Connection refused):"
            " is that one running, and is this its address?\n"
        )


def test_processes_that_do_not_come(tmp_path):
    where = f"127.0.0.1:{free_port()}"
    with together(tmp_path, "", [0, 1], coordinator=where, processes=4, timeout=8) as run:
        assert run.codes() == [2, 2]
        assert run.err(0) == (
            f"error: of 4 processes these did not come to process 0 at {where} within 8 s: 2, 3;"
            " start them, raise cluster.timeout, or set cluster.processes alone to 1\n"
        )
        assert run.err(1) == ""


def test_two_with_one_number(tmp_path):
    with together(tmp_path, "", [0, 2, 2]) as run:
        assert run.codes() == [2, 2, 2]
        assert run.err(0).startswith(
            f"error: {socket.gethostname()} came as process 2 of 3, but process 0 knows 3 and has"
            " met [0, 2]: "
        )
        assert run.err(1) + run.err(2) == ""


def test_a_proxy_is_not_asked_for_the_way(tmp_path):
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with together(tmp_path, "", [0, 1], [proxy, proxy]) as run:
        assert run.codes() == [0, 0], run.said()
        assert run.err(0) + run.err(1) == ""


def test_a_stranger_is_no_process(tmp_path):
    port = free_port()
    where = {"coordinator": f"127.0.0.1:{port}", "processes": 2}
    with together(tmp_path, "", [0], **where) as run:
        run.wait_until(lambda: _knock(port))
        with together(tmp_path, "", [1], **where) as other:
            assert other.codes() == [0], other.said()
            assert run.codes() == [0], run.said()


def _knock(port):
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    except OSError:
        return False
    return True


def test_something_else_that_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        with together(tmp_path, "", [1], coordinator=where, processes=2, timeout=1) as run:
            listener.settimeout(LIMIT_S)
            connection, _ = listener.accept()
            connection.sendall(b"SSH-2.0-OpenSSH\r\n")
            assert run.codes() == [2]
            assert run.err(0) == (
                f"error: process 1 has reached process 0 at {where}, which does not answer: is it"
                " the coordinator of this run?\n"
            )
            connection.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"coordinator": "127.0.0.1"}, "cluster.coordinator is '127.0.0.1'; with"),
        ({"coordinator": "127.0.0.1:x"}, "must be HOST:PORT"),
        ({"coordinator": "127.0.0.1:70000"}, "must be HOST:PORT"),
        ({"coordinator": ""}, "cluster.coordinator is ''; with"),
        ({"processes": 0, "process": 0}, "cluster.process is 0 and cluster.processes is 0; with"),
        ({"process": 2}, "cluster.process is 2 and cluster.processes is 2; with"),
        ({"process": -1}, "cluster.process is -1 and cluster.processes is 2; with"),
        ({"coordinator": "8.8.8.8:99"}, "8.8.8.8 is 8.8.8.8, which is neither a loopback nor"),
        ({"coordinator": "0.0.0.0:99"}, "0.0.0.0 is 0.0.0.0, which is neither a loopback nor"),
        ({"coordinator": "[2001:4860:4860::8888]:99"}, "which is neither a loopback nor"),
        (
            {"coordinator": "no-such-host.invalid:99", "timeout": 1},
            "no-such-host.invalid is no known host",
        ),
        ({"bind": "203.0.113.9"}, "process 0 cannot listen on 203.0.113.9 port"),
    ],
)
def test_settings_that_cannot_be(config, message):
    from jaxgrpo.cluster import join
    from jaxgrpo.config import ClusterConfig

    where = {"coordinator": f"127.0.0.1:{free_port()}", "processes": 2, "process": 0}
    with (
        pytest.raises(ValueError, match=re.escape(message)) as caught,
        join(ClusterConfig(**where | config)),
    ):
        pass
    assert "\n" not in str(caught.value)


SLURM = {
    "SLURM_JOB_ID": "{job}",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "{i}",
    "SLURM_LOCALID": "{i}",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "{job4096}.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "{i}",
    "OMPI_COMM_WORLD_LOCAL_RANK": "{i}",
}


@pytest.mark.parametrize(("cluster", "alone"), [(SLURM, False), (OPEN_MPI, False), (SLURM, True)])
def test_the_variables_of_a_cluster(tmp_path, cluster, alone):
    job = random.randrange(2**20)
    envs = [
        {k: v.format(i=i, job=job, job4096=job * 4096) for k, v in cluster.items()}
        for i in range(2)
    ]
    body = f"assert cluster.gather(lambda: me) == ([me] if {alone} else [0, 1])"
    settings = {"coordinator": "", "processes": int(alone), "process": -1}
    with together(tmp_path, body, [0, 1], envs, **settings) as run:
        assert run.codes() == [0, 0], run.said()


def test_an_indexed_job_without_a_way_to_ask_kubernetes(tmp_path):
    env = {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    with together(tmp_path, "", [1], [env], coordinator="", processes=0, process=-1) as run:
        assert run.codes() == [2]
        assert run.err(0).startswith("error: JOB_COMPLETION_INDEX is set, but which process of")
        assert run.err(0).endswith("or cluster.processes alone to 1\n")
