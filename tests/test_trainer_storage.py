"""Where checkpoints lie: any filesystem of pyarrow, complete or not, whole or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs
from trainer_runs import overrides, settings

from reward_actor.contract import sha256_file
from trainer.config import TrainConfig
from trainer.config_file import load_config
from trainer.identity import IDENTITY_FILE, check_identity, identity
from trainer.saved import SavedState, fetched, is_read_by, saved_states, stored_files, tidy
from trainer.storage import Storage, checkpoint_storage


def remote(directory: Path) -> Storage:
    """A storage that cannot be opened in place, as pyarrow's own files-in-a-bucket cannot."""
    directory.mkdir(parents=True, exist_ok=True)
    return Storage(fs.SubTreeFileSystem(str(directory), fs.LocalFileSystem()), "runs/one")


@pytest.fixture(params=["local", "remote"])
def storage(request, tmp_path: Path) -> Storage:
    if request.param == "remote":
        return remote(tmp_path / "bucket")
    return Storage.at(str(tmp_path / "disk"))


def store(
    storage: Storage, step: int, directory: Path, *, workers: int = 2, without: str = ""
) -> SavedState:
    """A checkpoint as a training stores it, but for the file or manifest `without`."""
    folder = f"checkpoint_{step:08d}"
    directory.mkdir(exist_ok=True)
    for rank in range(workers):
        files = {}
        for name in [f"state/zero_pp_rank_{rank}_states.pt", "state/common.pt"][: 2 - rank]:
            source = directory / "file"
            source.write_bytes(f"{step} {name} ".encode() * 1000)
            if without == name:
                files[name] = (sha256_file(source), source.stat().st_size)
            else:
                files[name] = (storage.upload(source, f"{folder}/{name}"), source.stat().st_size)
        if without != f"manifest-rank{rank}.json":
            manifest = {"step": step, "num_workers": workers, "num_failed": 0, "files": files}
            storage.write_json(f"{folder}/manifest-rank{rank}.json", manifest)
    return SavedState(folder, step, workers, 0)


def test_complete_checkpoints_are_listed_newest_first(storage, tmp_path: Path):
    states = [store(storage, step, tmp_path / "source") for step in (20, 100, 3)]
    assert saved_states(storage) == [states[1], states[0], states[2]]


def test_there_is_nothing_in_a_storage_that_does_not_exist(storage):
    assert saved_states(storage) == []
    assert tidy(storage) == []


@pytest.mark.parametrize(
    "without", ["state/zero_pp_rank_1_states.pt", "manifest-rank0.json", "manifest-rank1.json"]
)
def test_an_incomplete_checkpoint_is_never_chosen_and_tidied_away(
    storage, tmp_path: Path, without: str
):
    whole = store(storage, 1, tmp_path / "source")
    store(storage, 2, tmp_path / "source", without=without)
    assert saved_states(storage) == [whole]
    assert tidy(storage) == [whole]
    assert storage.folders() == [whole.folder]


def test_a_file_cut_short_makes_a_checkpoint_incomplete(storage, tmp_path: Path):
    state = store(storage, 1, tmp_path / "source")
    with storage.filesystem.open_output_stream(
        storage.path(f"{state.folder}/state/common.pt")
    ) as f:
        f.write(b"1 state/common.pt ")
    assert saved_states(storage) == []


@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_manifest_cut_short_anywhere_makes_a_checkpoint_incomplete(tmp_path_factory, kept: float):
    root = tmp_path_factory.mktemp("cut")
    storage = Storage.at(str(root / "disk"))
    state = store(storage, 1, root / "source")
    manifest = Path(storage.path(state.folder)) / "manifest-rank1.json"
    text = manifest.read_bytes().rstrip()
    manifest.write_bytes(text[: int(kept * len(text))])
    assert saved_states(storage) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_fetches_what_it_reads(storage, tmp_path: Path, rank: int):
    state = store(storage, 7, tmp_path / "source")
    files = stored_files(storage, state, range(2))
    mine = {name: digest for name, digest in files.items() if is_read_by(rank, name)}
    assert sorted(mine) == ["state/common.pt", f"state/zero_pp_rank_{rank}_states.pt"]
    with fetched(storage, state, mine, tmp_path) as (place, problem):
        assert problem is None
        for name, digest in mine.items():
            assert sha256_file(place / name) == digest
        found = {path.name for path in place.rglob("*.pt")}
    if not storage.is_local:
        assert found == {Path(name).name for name in mine}
        assert not place.exists()


def test_a_flipped_byte_is_found_and_named(storage, tmp_path: Path):
    state = store(storage, 7, tmp_path / "source")
    name = f"{state.folder}/state/common.pt"
    with storage.filesystem.open_input_stream(storage.path(name)) as file:
        data = bytearray(file.read())
    data[len(data) // 2] ^= 1
    with storage.filesystem.open_output_stream(storage.path(name)) as file:
        file.write(bytes(data))
    assert saved_states(storage) == [state], "its size is right"
    with fetched(storage, state, stored_files(storage, state, [0]), tmp_path) as (_, problem):
        assert problem == "state/common.pt does not have the sha256 that its manifest says"


def test_a_file_that_is_gone_by_then_is_damage(storage, tmp_path: Path):
    state = store(storage, 7, tmp_path / "source")
    files = stored_files(storage, state, [0])
    storage.filesystem.delete_file(storage.path(f"{state.folder}/state/common.pt"))
    with fetched(storage, state, files, tmp_path) as (_, problem):
        assert problem is not None
        assert problem.startswith("state/common.pt cannot be read")


def config_for(output_dir: Path, **changes: str) -> TrainConfig:
    return load_config(None, overrides(settings(Path("m"), Path("d"), output_dir, **changes)))


def test_checkpoints_lie_below_the_output_or_by_its_name_in_the_storage(tmp_path: Path):
    config = config_for(tmp_path / "rm")
    assert checkpoint_storage(config).root == str(tmp_path / "rm" / "checkpoints")
    config = config_for(tmp_path / "rm", checkpoint__storage_path=str(tmp_path / "nfs"))
    assert checkpoint_storage(config).root == str(tmp_path / "nfs" / "rm")
    config = config_for(tmp_path / "rm", checkpoint__storage_path="s3://bucket/runs?region=eu")
    found = checkpoint_storage(config)
    assert isinstance(found.filesystem, fs.S3FileSystem)
    assert found.root == "bucket/runs/rm"
    assert not found.is_local


@pytest.mark.parametrize("place", ["relative/path", "nowhere://x"])
def test_a_storage_path_that_is_no_place_is_refused(tmp_path: Path, place: str):
    with pytest.raises(ValueError, match=r"checkpoint.storage_path: .* no absolute path"):
        checkpoint_storage(config_for(tmp_path, checkpoint__storage_path=place))


def test_a_storage_belongs_to_one_run_even_when_the_output_is_new(tmp_path: Path):
    config = config_for(tmp_path / "a" / "rm", checkpoint__storage_path=str(tmp_path / "nfs"))
    mine = identity(config, "model", "data")
    check_identity(config, mine)
    check_identity(config, mine)
    again = config_for(tmp_path / "b" / "rm", checkpoint__storage_path=str(tmp_path / "nfs"))
    check_identity(again, mine)  # its output was lost; the checkpoints are still its own
    other = config_for(tmp_path / "c" / "rm", checkpoint__storage_path=str(tmp_path / "nfs"))
    with pytest.raises(ValueError, match=r"checkpoint.storage_path: .* holds another run: the tra"):
        check_identity(other, {**mine, "the training pairs": "others"})
    kept = json.loads((tmp_path / "nfs" / "rm" / IDENTITY_FILE).read_text())
    assert kept == json.loads(json.dumps(mine))


def test_a_storage_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    config = config_for(tmp_path / "rm", checkpoint__storage_path=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"checkpoint.storage_path: .* cannot be used"):
        check_identity(config, identity(config, "model", "data"))
