"""What is forked from a process that has imported everything is as if Python had started it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ray

if TYPE_CHECKING:
    from nursery import Nursery


@ray.remote(num_cpus=0)
class Drawer:
    def draw(self) -> list[str]:
        """Random ids of Ray's core: of the main thread, and of another one."""
        from concurrent.futures import ThreadPoolExecutor

        def one() -> str:
            return str(ray.WorkerID.from_random().hex())

        with ThreadPoolExecutor(1) as pool:
            return [one(), pool.submit(one).result()]


def test_no_two_workers_draw_the_same_ids(ray_cluster: None) -> None:
    drawers = [Drawer.remote() for _ in range(4)]
    drawn = [number for two in ray.get([d.draw.remote() for d in drawers]) for number in two]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.process
def test_a_program_imports_the_packages_beside_it(nursery: Nursery, tmp_path: Path) -> None:
    """A job runs the code that was uploaded with it, not that of the tests' checkout."""
    for package in ("reward_actor", "trainer"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "trainer/__main__.py").write_text("print(__file__)\n")
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    done = subprocess.run([nursery.python, "-m", "trainer"], **run)
    assert done.stdout.strip() == str(tmp_path / "trainer/__main__.py")


@pytest.mark.process
def test_a_program_ends_as_it_would_end(nursery: Nursery) -> None:
    for code, expected in (
        ("import sys; sys.exit(3)", 3),
        ("raise ValueError", 1),
        ("raise KeyboardInterrupt", -2),
        ("import os; os.kill(os.getpid(), 9)", -9),
    ):
        done = subprocess.run([nursery.python, "-c", code], stderr=subprocess.DEVNULL)
        assert done.returncode == expected, code
