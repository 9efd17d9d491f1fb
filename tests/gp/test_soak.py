"""A stream that is killed again and again, and goes on from its file: no batch lost, none taken twice, no memory eaten.

`DUALGP_SOAK_SECONDS` says how long the slow test streams: three minutes unless told, 3600 for an hour.
"""

import os
import random
import signal
import statistics
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import soaking
from safetensors.torch import load_file
from toys import same_bits

SECONDS = float(os.environ.get("DUALGP_SOAK_SECONDS", "180"))
ROOT = Path(__file__).parents[2]


class Line(NamedTuple):
    """Of one batch that was taken in and saved: by which process, its number, and the memory then in use."""

    pid: int
    batch: int
    heap: float  # MB
    blocks: int


def lines(log: Path) -> list[Line]:
    told = log.read_text().splitlines(keepends=True) if log.exists() else []
    parts = [line.split() for line in told if line.endswith("\n")]
    return [Line(int(pid), int(i), float(mb), int(blocks)) for pid, i, mb, blocks in parts]


def fork(kind: str, path: Path, log: Path, limit: int | None) -> int:
    """Stream in a fork of this process, which is there at once; return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks of processes with threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            soaking.stream(kind, path, log, limit)
            code = 0
        finally:
            os._exit(code)
    return pid


def fresh(kind: str, path: Path, log: Path, limit: int | None) -> int:
    """Stream in a process that starts from nothing, as after a crash; return its number."""
    command = [sys.executable, soaking.__file__, kind, str(path), str(log), "-" if limit is None else str(limit)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.posix_spawn(sys.executable, command, {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})


def kill_once_it_streams(pid: int, log: Path, delay: float) -> None:
    """Send SIGKILL `delay` seconds after the process has taken in its first batch."""
    end = time.monotonic() + 600
    while not any(line.pid == pid for line in lines(log)):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the stream ended by itself"
        assert time.monotonic() < end, "no batch in 600 s"
        time.sleep(0.05)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(kind: str, path: Path, log: Path, kills: int) -> int:
    """What was killed so often equals what never was, to the last bit; return how many batches there were."""
    taken = [line.batch for line in lines(log)]
    # A process that dies between saving a batch and saying so leaves that number out, at most one for each kill.
    assert taken == sorted(set(taken))
    count = taken[-1] + 1
    assert count - len(taken) <= kills
    straight = path.with_name("straight")
    soaking.stream(kind, straight, path.with_name("straight.log"), count)
    mine, theirs = load_file(path), load_file(straight)
    assert int(mine["num_seen"]) == count * soaking.SIZE
    assert same_bits(mine, theirs)
    assert len(list(path.parent.glob("*.part"))) <= kills  # of writes that were cut off
    return count


def kept(log: Path, warm: int) -> tuple[float, float, int]:
    """MB and blocks that a process keeps of the batches after its first `warm`, and of how many.

    Ten times the median over ten parts: a table that the interpreter copies to twice its size takes megabytes, once.
    """
    rest = lines(log)[warm:]
    size = len(rest) // 10
    parts = [rest[k * size : (k + 1) * size] for k in range(10)]
    heap = [statistics.median(line.heap for line in part) for part in parts]
    blocks = [statistics.median(line.blocks for line in part) for part in parts]
    more = (10 * statistics.median(b - a for a, b in pairwise(levels)) for levels in (heap, blocks))
    return *more, 10 * size


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def test_a_stream_that_was_killed_goes_on_to_the_same_last_bit(tmp_path):
    path, log = tmp_path / "stream", tmp_path / "log"
    kill_once_it_streams(fork("regression", path, log, None), log, 0.3)
    done = lines(log)[-1].batch + 1
    assert ended(fork("regression", path, log, done + 3)) == 0
    assert check("regression", path, log, 1) == done + 3


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS + 600)
@pytest.mark.parametrize("kind", soaking.KINDS)
def test_a_soak_with_kills_loses_nothing(kind, tmp_path, record_property):
    rng = random.Random(0)
    path, log, kills = tmp_path / "stream", tmp_path / "log", 0
    end = time.monotonic() + SECONDS / len(soaking.KINDS)
    while time.monotonic() < end:
        begin = rng.choice([fork, fork, fork, fresh])
        kill_once_it_streams(begin(kind, path, log, None), log, rng.uniform(0, 4))
        kills += 1
    assert ended(fresh(kind, path, log, lines(log)[-1].batch + 3)) == 0
    count = check(kind, path, log, kills)
    heap, blocks, of = kept(tmp_path / "straight.log", warm=count // 5)  # in the run that nobody killed
    left = len(list(tmp_path.glob("*.part")))
    told = f"{count} batches, {kills} kills, {left} cut-off writes; of {of} kept {1e3 * heap:.1f} kB, {blocks} blocks"
    record_property(kind, told)
    print(f"{kind}: {told}")
    assert heap < 0.1 + 2e-4 * of  # 200 bytes of each batch
    assert blocks < 200 + 0.2 * of  # an object of one in five
