"""The GPU's benchmark, as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import attention
from benchmarks.gpu.dry_run import Outcome, Watch, tables

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="missing: machine without a GPU")


def test_without_a_gpu_it_says_what_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU here; --dry-run needs none" in capsys.readouterr().err
    if not torch.backends.cuda.is_built():
        assert gpu.main(["--dry-run"]) == 2
        assert "`make check-cuda` installs one" in capsys.readouterr().err


def test_memory_is_that_of_the_tensors_that_live_at_once() -> None:
    mebi = 2**20
    given = torch.zeros(8 * mebi, dtype=torch.uint8)
    with Watch("cpu") as memory:
        first = given + 1  # 8
        view = first[: 4 * mebi]
        del first
        second = view * 2  # 12
        del view
        third = second + second  # 8
        third += 1  # in place
        del second, third
        torch.empty(2 * mebi, dtype=torch.uint8)
    assert memory.peak == 12 * mebi


def test_to_comes_in_the_parts_that_fake_tensors_know() -> None:
    """Whole, that of a tensor of one number would be done on the real device by torch 2.13."""
    seen = []

    class Below(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    one = torch.ones(1)
    with torch.inference_mode(), Below(), Watch("cpu"):
        moved = one.to(torch.float64)
    assert seen == [torch.ops.aten._to_copy.default]
    assert moved.dtype == torch.float64


@pytest.mark.parametrize("wrong", ["dtype", "device"])
def test_a_product_over_two_kinds_is_refused(wrong: str) -> None:
    left = torch.zeros(2, 2)
    right = left.bfloat16() if wrong == "dtype" else left.to("meta")
    for product in (torch.mm, torch.nn.functional.linear):
        with (
            torch.inference_mode(),
            Watch("cpu"),
            pytest.raises(TypeError, match=r"aten\.\w+.* gets"),
        ):
            product(left, right)


def test_a_fault_is_named_below_the_table() -> None:
    outcomes = [vars(Outcome("forest", 10, 20480)), vars(Outcome("padded", fault="TypeError: no"))]
    budgets = {24: None, 48: {"largest": 9, "default": 3}, 80: None, 141: None}
    budgets[141] = {"largest": 5, "default": 7}
    result = {"scoring": outcomes, "training": [], "weights_bytes": 2**31, "budgets": budgets}
    text = tables({"8b": result})
    assert "8b, on 141 GB a scorer takes 7 rows, and 5 fit" in text
    assert "forest    10      0.00          2     yes" in text
    assert "8b, padded: TypeError: no" in text
    assert "9 (3)" in text


@pytest.mark.process
@pytest.mark.parametrize("by", ["its limit", "an interrupt"])
def test_a_part_ends_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
) -> None:
    pid = tmp_path / "pid"
    script = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r} + '.partial', 'w').write(str(child.pid))\n"
        f"os.rename({str(pid)!r} + '.partial', {str(pid)!r})\n"
        "time.sleep(600)"
    )

    def wait(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is None:
            return own(self)
        while not pid.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt if by == "an interrupt" else subprocess.TimeoutExpired("", timeout)

    own = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    part = gpu.Part("slow", ("-c", script), limit_s=600, writes=False)
    if by == "an interrupt":
        with pytest.raises(KeyboardInterrupt):
            gpu._run(part, 600)
    else:
        assert gpu._run(part, 600)["outcome"] == "cut short"
    deadline = time.monotonic() + 10
    while _is_alive(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.process
def test_figures_and_failures_come_back() -> None:
    script = (
        "import json, sys\n"
        "json.dump({'a': 1}, open(sys.argv[-1], 'w'))\n"
        "sys.exit(len(sys.argv) - 3)  # 1 for one more\n"
    )
    assert gpu._run(gpu.Part("right", ("-c", script), 60), 60)["figures"] == {"a": 1}
    assert gpu._run(gpu.Part("wrong", ("-c", script, "x"), 60), 60)["outcome"] == "failed"
    assert gpu._run(gpu.Part("late", ("-c", script), 60), -1.0)["outcome"].startswith("left out")
    absent = gpu.Part("absent", ("-c", script), 60, needs="no_such_module")
    assert "no_such_module is not installed" in gpu._run(absent, 60)["outcome"]


def test_every_part_is_a_command_that_is_there() -> None:
    """By its flags, and the file that it runs."""
    from benchmarks.scoring.__main__ import make_parser as scoring
    from benchmarks.training.__main__ import make_parser as training

    assert sum(part.limit_s for part in gpu.PARTS) <= gpu._LIMIT_S
    parsers = {"benchmarks.scoring": scoring, "benchmarks.training": training}
    for part in gpu.PARTS:
        module, *flags = part.arguments[1:]
        if module in parsers:
            parsers[module]().parse_args(flags)
        assert part.limit_s > 0
        for flag in flags:
            assert not flag.endswith(".py") or (gpu._ROOT / flag).exists()


def test_attention_is_timed_each_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "attention.json"
    flags = "--shape tiny --groups 2 --group-size 2 --prompt-tokens 40 --completion-tokens 20"
    assert attention.main([*flags.split(), "--rounds", "2", "--output", str(output)]) == 0
    assert "160 rows" in capsys.readouterr().out
    seconds = json.loads(output.read_text())["seconds"]
    assert len(seconds) == 2 * 2
    assert all(len(values) == 2 for values in seconds.values())
