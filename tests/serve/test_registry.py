"""A name of the registry never leads out of it."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traversal import NAMES

from serve.registry import Registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Models inside, models outside, and links that lead out in every way."""
    root = tmp_path_factory.mktemp("root")
    inside, outside = root / "registry", root / "outside"
    for model in (inside / "first", inside / "run-1" / "export", outside, outside / "export"):
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    (inside / "empty").mkdir()
    (inside / "file").write_text("")
    (inside / "link-inside").symlink_to(inside / "first")
    (inside / "link-out").symlink_to(outside)
    (inside / "link-up").symlink_to("../outside")
    (inside / "link-round").symlink_to("link-round")
    (inside / "link-gone").symlink_to("nowhere")
    (inside / "nested").mkdir()
    (inside / "nested" / "export").symlink_to(outside / "export")
    (inside / "inner").symlink_to(inside / "first" / "..")
    return Registry(inside)


def test_names_are_those_of_models_inside(registry: Registry) -> None:
    assert registry.names() == ["first", "link-inside", "run-1"]
    assert registry.directory("run-1") == registry.root / "run-1" / "export"
    assert registry.directory("link-inside") == registry.root / "first"
    assert registry.name_of(registry.root / "run-1" / "export") == "run-1"
    assert registry.name_of(registry.root.parent / "outside") is None


@pytest.mark.parametrize("name", ["link-out", "link-up", "link-gone", "nested", "inner", "empty"])
def test_links_that_lead_out_are_no_models(registry: Registry, name: str) -> None:
    with pytest.raises(ValueError, match="no model of that name"):
        registry.directory(name)


@pytest.mark.parametrize("name", ["link-round", "file", "other"])
def test_what_is_no_directory_is_no_model(registry: Registry, name: str) -> None:
    with pytest.raises(ValueError, match="no model of that name"):
        registry.directory(name)


def test_two_hundred_ways_out_are_refused(registry: Registry) -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match="name") as refused:
            registry.directory(name)
        assert len(str(refused.value)) < 200  # which is not in it


pieces = st.sampled_from(["..", "/", "\\", ".", "first", "outside", "link-out", "%2e", "\x00", "~"])
names = st.text(max_size=30) | st.lists(pieces, max_size=8).map("".join)


@given(names)
def test_no_name_leads_out(registry: Registry, name: str) -> None:
    try:
        found = registry.directory(name)
    except ValueError:
        return
    assert found.is_relative_to(registry.root)
    assert found.is_dir()
    assert set(name) <= set(string.ascii_letters + string.digits + "._-")
    assert isinstance(found, Path)
