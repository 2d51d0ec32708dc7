"""Packages of other people that are called as ours are."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from reward_actor import clashes


def test_a_distribution_of_our_packages_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index has one called trainer. What the user's own files do: tests/system/
    test_light_core.py and, on workers, tests/trainer/test_resume.py."""

    def version(name: str) -> str:
        if name == "trainer":
            return "0.0.36"
        raise PackageNotFoundError(name)

    clashes.check()
    monkeypatch.setattr(clashes, "version", version)
    with pytest.raises(ValueError, match=r"^the package trainer 0\.0\.36 is installed, .*: pip un"):
        clashes.check()
