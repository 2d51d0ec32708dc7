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
from trainer.checkpoints.manifest import (
    Problem,
    SavedState,
    Survey,
    delete,
    fetched,
    manifest_name,
    new_folder,
    saved_state,
    stored_steps,
    survey,
    tidy,
    write_manifest,
)
from trainer.checkpoints.run_identity import IDENTITY_FILE, check_identity, identity
from trainer.checkpoints.storage import Storage, checkpoint_storage
from trainer.config.config_file import load_config
from trainer.config.train import TrainConfig
from trainer.log import TrainingLog


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
    folder = new_folder(step, "mark")
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
            write_manifest(storage, folder, rank, manifest)
    return SavedState(folder, step, workers, 0)


def test_complete_checkpoints_are_listed_newest_first(storage, tmp_path: Path):
    states = [store(storage, step, tmp_path / "source") for step in (20, 100, 3)]
    assert survey(storage).states == [states[1], states[0], states[2]]


def test_there_is_nothing_in_a_storage_that_does_not_exist(storage):
    assert survey(storage) == tidy(storage) == Survey([], {}, [])


@pytest.mark.parametrize("without", ["manifest-rank0.json", "manifest-rank1.json"])
def test_an_unfinished_checkpoint_is_never_chosen_and_tidied_away(
    storage, tmp_path: Path, without: str
):
    whole = store(storage, 1, tmp_path / "source")
    half = store(storage, 2, tmp_path / "source", without=without)
    assert tidy(storage) == Survey([whole], {}, [half.folder])
    assert storage.folders() == [whole.folder]


def test_a_half_deleted_checkpoint_is_unfinished(storage, tmp_path: Path, monkeypatch):
    whole, old = (store(storage, step, tmp_path / "source") for step in (2, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", lambda *_: None)  # killed before it
        delete(storage, old.folder)
    assert survey(storage) == Survey([whole], {}, [old.folder])


def test_what_is_no_checkpoint_is_left_alone(storage, tmp_path: Path):
    (tmp_path / "mine").write_text("notes")
    storage.upload(tmp_path / "mine", "[x/manifest-rank0.json")
    assert tidy(storage) == Survey([], {}, [])
    assert storage.folders() == ["[x"]


def test_one_folder_is_looked_at_whatever_lies_in_others(storage, tmp_path: Path):
    whole = store(storage, 1, tmp_path / "source")
    write(storage, f"{store(storage, 2, tmp_path / 'source').folder}/manifest-rank0.json", b"{")
    half = store(storage, 3, tmp_path / "source", without="manifest-rank1.json")
    lost = store(storage, 4, tmp_path / "source", without="state/common.pt")
    assert saved_state(storage, whole.folder) == whole
    assert saved_state(storage, half.folder) is None
    assert saved_state(storage, "checkpoint_of_nobody") is None
    with pytest.raises(ValueError, match=r"state/common.pt is missing or was cut short"):
        saved_state(storage, lost.folder)


@pytest.mark.parametrize("without", ["state/zero_pp_rank_1_states.pt", "state/common.pt"])
def test_a_lost_file_makes_a_checkpoint_damaged(storage, tmp_path: Path, without: str):
    whole = store(storage, 1, tmp_path / "source")
    lost = store(storage, 2, tmp_path / "source", without=without)
    damaged = {lost.folder: f"{without} is missing or was cut short"}
    assert tidy(storage) == Survey([whole], damaged, [])
    assert sorted(storage.folders()) == [whole.folder, lost.folder]


def test_a_file_cut_short_makes_a_checkpoint_damaged(storage, tmp_path: Path):
    state = store(storage, 1, tmp_path / "source")
    write(storage, f"{state.folder}/state/common.pt", b"1 state/common.pt ")
    assert survey(storage).damaged == {state.folder: "state/common.pt is missing or was cut short"}


def write(storage: Storage, name: str, data: bytes) -> None:
    with storage.filesystem.open_output_stream(storage.path(name)) as file:
        file.write(data)


def read(storage: Storage, name: str) -> bytes:
    with storage.filesystem.open_input_stream(storage.path(name)) as file:
        return bytes(file.read())


@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_manifest_cut_short_anywhere_makes_a_checkpoint_damaged(tmp_path_factory, kept: float):
    root = tmp_path_factory.mktemp("cut")
    storage = Storage.at(str(root / "disk"))
    state = store(storage, 1, root / "source")
    manifest = Path(storage.path(state.folder)) / "manifest-rank1.json"
    text = manifest.read_bytes().rstrip()
    manifest.write_bytes(text[: int(kept * len(text))])
    found = survey(storage)
    assert not found.states
    assert list(found.damaged) == [state.folder]


@given(place=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_manifest_is_damage_or_means_the_same(
    tmp_path_factory, place: int, bit: int
):
    root = tmp_path_factory.mktemp("flipped")
    storage = Storage.at(str(root / "disk"))
    state = store(storage, 40, root / "source")
    name = f"{state.folder}/{manifest_name(0)}"
    data = bytearray(read(storage, name))
    data[place % len(data)] ^= 1 << bit
    write(storage, name, bytes(data))
    found = survey(storage)
    assert found.states == [state] or list(found.damaged) == [state.folder]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_fetches_what_it_reads(storage, tmp_path: Path, rank: int):
    state = store(storage, 7, tmp_path / "source")
    with fetched(storage, state, rank, tmp_path) as (place, problem):
        assert problem is None
        found = {path.relative_to(place).as_posix() for path in place.rglob("*.pt")}
    mine = {"state/common.pt", f"state/zero_pp_rank_{rank}_states.pt"}
    assert mine <= found
    if not storage.is_local:
        assert mine == found
        assert not place.exists()


def test_a_flipped_byte_is_found_and_named(storage, tmp_path: Path):
    state = store(storage, 7, tmp_path / "source")
    name = f"{state.folder}/state/common.pt"
    data = bytearray(read(storage, name))
    data[len(data) // 2] ^= 1
    write(storage, name, bytes(data))
    assert survey(storage).states == [state], "its size is right"
    for rank in (None, 0):
        with fetched(storage, state, rank, tmp_path) as (_, problem):
            text = "state/common.pt does not have the sha256 of its manifest"
            assert problem == Problem(text, is_damage=True)


def test_a_file_that_another_node_has_seen_is_no_damage(storage, tmp_path: Path):
    state = store(storage, 7, tmp_path / "source")
    storage.filesystem.delete_file(storage.path(f"{state.folder}/state/common.pt"))
    with fetched(storage, state, 0, tmp_path) as (_, problem):
        assert problem is not None
        assert not problem.is_damage
        assert problem.text.startswith("state/common.pt is missing here: is this storage that")


def test_a_storage_out_of_reach_is_no_damage(storage, tmp_path: Path, monkeypatch):
    state = store(storage, 7, tmp_path / "source")

    def unplugged(*_: object) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(Storage, "sha256", unplugged)
    monkeypatch.setattr(Storage, "download", unplugged)
    with fetched(storage, state, 0, tmp_path) as (_, problem):
        assert problem is not None
        assert not problem.is_damage
        assert "cannot be read: Input/output error" in problem.text


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
    mine = identity(config, "data")
    check_identity(config, mine)
    check_identity(config, mine)
    again = config_for(tmp_path / "b" / "rm", checkpoint__storage_path=str(tmp_path / "nfs"))
    check_identity(again, mine)  # its output was lost; the checkpoints are still its own
    other = config_for(tmp_path / "c" / "rm", checkpoint__storage_path=str(tmp_path / "nfs"))
    with pytest.raises(ValueError, match=r"checkpoint.storage_path: .* holds another run: the tra"):
        check_identity(other, {**mine, "the training pairs": "others"})
    kept = json.loads((tmp_path / "nfs" / "rm" / IDENTITY_FILE).read_text())
    assert kept == json.loads(json.dumps(mine))


def test_a_run_from_before_a_setting_existed_goes_on(tmp_path: Path):
    config = config_for(tmp_path / "rm")
    mine = identity(config, "data")
    check_identity(config, {k: v for k, v in mine.items() if k != "model.template_args"})
    check_identity(config, mine)
    with pytest.raises(ValueError, match=r"model\.template_args was {}, is now {'brief': True}"):
        check_identity(config, {**mine, "model.template_args": {"brief": True}})


def test_a_storage_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    config = config_for(tmp_path / "rm", checkpoint__storage_path=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"checkpoint.storage_path: .* cannot be used"):
        check_identity(config, identity(config, "data"))


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    config = config_for(tmp_path / "file" / "rm")
    with pytest.raises(ValueError, match=r"output_dir: .* cannot be used"):
        check_identity(config, identity(config, "data"))


def test_a_damaged_note_about_the_run_is_no_empty_place(tmp_path: Path):
    config = config_for(tmp_path / "rm")
    mine = identity(config, "data")
    check_identity(config, mine)
    note = tmp_path / "rm" / IDENTITY_FILE
    note.write_text(note.read_text()[:-5])
    with pytest.raises(ValueError, match=r"output_dir: .*run.json is damaged.*nobody can tell"):
        check_identity(config, mine)


def run_with(tmp_path: Path, steps: int) -> TrainConfig:
    """One that has logged so many steps, with a checkpoint every 20, and none is there."""
    config = config_for(tmp_path / "rm", checkpoint__every_steps="20")
    (tmp_path / "rm").mkdir()
    log = TrainingLog(tmp_path / "rm" / "training_log.jsonl", 0)
    for step in range(steps):
        log.write({"step": step + 1})
    log.close()
    return config


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path):
    assert stored_steps(run_with(tmp_path, 40)) == 0


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has 41 steps, but there is no checkpoint in .*mounted"):
        stored_steps(run_with(tmp_path, 41))
