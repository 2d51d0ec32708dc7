"""The command line as a user meets it: files in, files out, errors in one line."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from data_files import with_damage
from isolation import free_port
from pyarrow import Table, parquet
from score_files import ROWS, write

import rayward
from rayward.scoring import tell_unscored
from reward_actor import Group
from reward_actor.actor import is_model_directory
from reward_actor.files import group_of, read_rows
from reward_actor.model.manifest import write_manifest


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_score_writes_rewards_beside_the_rows(
    export_dir: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from reward_actor import RewardScorer

    source, output = write(tmp_path / name, ROWS), tmp_path / "made" / "out.jsonl"
    assert rayward.main(["score", str(export_dir), str(source), str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows[0]["id"] == 7
    assert [len(row["rewards"]) for row in rows] == [2, 1, 3]
    assert rows[2]["rewards"][2] is None
    assert rows[2]["errors"][2]["type"] == "too_long"
    scorer = RewardScorer.from_pretrained(export_dir)
    expected = scorer.score([Group("Name two fruits.", ["An apple.", "A pear."])])[0]
    assert rows[0]["rewards"] == pytest.approx(expected.rewards, abs=1e-5)
    assert rows[0]["model_version"] == scorer.model_version
    printed = capsys.readouterr()
    assert "scored 5 completions of 3 prompts" in printed.out
    assert "1 of 6 have no reward:\n  1 x too_long: " in printed.err


def test_a_file_without_any_reward_is_a_failure(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt_ids": [5], "completion_ids": [[7] * 999, [7] * 998, [7] * 999]}
    source, output = write(tmp_path / "in.jsonl", [long]), tmp_path / "out.jsonl"
    command = ["score", str(export_dir), str(source), str(output)]
    assert rayward.main(command) == 1
    printed = capsys.readouterr()
    assert "scored 0 completions of 1 prompts" in printed.out
    assert "3 of 3 have no reward:\n  2 x too_long: " in printed.err
    assert json.loads(output.read_text())["rewards"] == [None] * 3
    write(source, [{"prompt": "Hi.", "completions": []}])
    assert rayward.main(command) == 1
    assert "there is no completion to score" in capsys.readouterr().err


def test_of_many_reasons_the_first_three_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell_unscored([None, "a", "b", "a", "c", "d", "e"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "6 of 7 have no reward:", "  2 x a", "  1 x b", "  1 x c", "  and 2 other reasons"
    ]  # fmt: skip
    assert tell_unscored([None]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["score", "eval", "compare", "rollout"])
def test_a_service_that_is_down_is_told_within_five_seconds(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    rows, out = str(write(tmp_path / "in.jsonl", ROWS)), str(tmp_path / "out.jsonl")
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    arguments = {
        "score": [url, rows, out],
        "eval": [url, str(pairs)],
        "compare": [str(tmp_path), url, str(pairs)],
        "rollout": [str(tmp_path), str(pairs), out, "--scorer", url],
    }[command]
    started = time.monotonic()
    assert rayward.main([command, *arguments]) == 2
    assert time.monotonic() - started < 5
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: unavailable: nothing answers at {url} (")
    assert "`rayward serve MODEL`" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ('[\n {"prompt": "a", "completions": ["b"]}\n]', "is one JSON array over many lines"),
        ("{", "in.jsonl:1: not JSON"),
        ('{"prompt": "a", "completions": ["b"]}\n\n[1]', "in.jsonl:3: a list, not a JSON object"),
        ('{"completions": ["b"]}', "in.jsonl:1: needs a prompt"),
        (
            '{"prompt": [{"role": "user"}], "completions": []}',
            "in.jsonl:1: prompt.0.content is null",
        ),
        ('{"prompt": "a"}', "in.jsonl:1: needs completions"),
        (
            '{"prompt": "a", "completions": [1]}',
            "in.jsonl:1: completions.0 is int, not text or messages",
        ),
        ('{"prompt_ids": [1], "completion_ids": [["a"]]}', "must be lists of token ids"),
        ('{"prompt_ids": "ab", "completion_ids": []}', "needs prompt_ids"),
    ],
)
def test_a_bad_input_file_is_told_by_line(
    export_dir: Path,
    tmp_path: Path,
    text: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    output = tmp_path / "out.jsonl"
    assert rayward.main(["score", str(export_dir), str(source), str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not output.exists()


def test_a_mark_before_the_first_row_is_no_part_of_it(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a", "completions": ["b"]}\r\n')
    [(place, row)] = read_rows(source)
    assert (place, row["prompt"]) == (f"{source}:1", "a")


def test_what_parquet_has_and_json_has_not_is_text_or_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    when, price = datetime(2026, 11, 30, 12, tzinfo=UTC), Decimal("1.50")
    known = {"prompt": "a", "seen": [{"at": when, "on": when.date()}], "price": price}
    parquet.write_table(Table.from_pylist([known]), source)
    [(_, row)] = read_rows(source)
    seen = [{"at": "2026-11-30T12:00:00+00:00", "on": "2026-11-30"}]
    assert row == {"prompt": "a", "seen": seen, "price": "1.50"}
    parquet.write_table(Table.from_pylist([{**known, "image": b"\x89PNG"}]), source)
    with pytest.raises(ValueError, match=r"in\.parquet: row 1: 'image' has values of type bytes, "):
        list(read_rows(source))


def test_a_row_is_explained(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    assert rayward.main(["score", str(export_dir), str(source), "--explain", "1"]) == 0
    told = capsys.readouterr().out
    assert "contract (as exported):" in told
    assert told.count("<- read here") == 2
    assert re.search(r"path forest in blocks(, paged)?, float32", told)
    for arguments, message in (
        (["http://127.0.0.1:1", str(source), "--explain", "1"], "needs the model's directory"),
        ([str(export_dir), str(source), "--explain", "4"], "INPUT has rows 1 to 3"),
        ([str(export_dir), str(source)], "give OUTPUT"),
    ):
        assert rayward.main(["score", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_model_that_fails_its_golden_samples_can_be_explained(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Path(shutil.copytree(export_dir, tmp_path / "bad"))
    contract = json.loads((bad / "scoring_contract.json").read_text())
    contract["golden"]["raw_scores"]["float32"][0] += 0.1
    (bad / "scoring_contract.json").write_text(json.dumps(contract))
    write_manifest(bad)  # without it its digests say so first
    source = str(write(tmp_path / "in.jsonl", ROWS))
    assert rayward.main(["score", str(bad), source, str(tmp_path / "out.jsonl")]) == 2
    assert "rayward score DIR INPUT --explain ROW shows" in capsys.readouterr().err
    assert rayward.main(["score", str(bad), source, "--explain", "1"]) == 0
    printed = capsys.readouterr()
    assert "warning: golden sample 0 scores" in printed.err
    assert printed.out.count("<- read here") == 2


def test_converting_says_how_sequences_end_and_why(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = Path(shutil.copytree(export_dir, tmp_path / "foreign"))
    for name in ("scoring_contract.json", "MANIFEST.json"):
        (foreign / name).unlink()
    with pytest.warns(UserWarning, match=r"--ends-with TEXT"):
        assert rayward.main(["convert", str(foreign), str(tmp_path / "whole")]) == 0
    template = "what the chat template writes after the last message"
    assert f'inferred end_text = "\\n": {template}' in capsys.readouterr().out
    options = ["--ends-with", "<|im_end|>", "--no-append-eos"]
    assert rayward.main(["convert", str(foreign), str(tmp_path / "ours"), *options]) == 0
    assert 'inferred end_text = "": as you said' in capsys.readouterr().out


def test_a_damaged_input_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "a"}\n' * 3)
    file = tmp_path / "in.jsonl.gz"
    for damaged in (b"no gzip", whole[:-9], with_damage(whole)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"in.jsonl.gz:\d+: cannot be read"):
            list(read_rows(file))
    for line in (b"\xff", b"[" * 10**5):
        file.write_bytes(gzip.compress(b"{}\n" + line))
        with pytest.raises(ValueError, match=r"in.jsonl.gz:2: not JSON"):
            list(read_rows(file))


def test_a_missing_file_is_named(export_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rayward.main(["score", str(export_dir), "/no/such.jsonl", "/tmp/out.jsonl"]) == 2
    assert "error: /no/such.jsonl is not a file" in capsys.readouterr().err


def test_rows_of_a_rollout_file_can_be_scored_again(tmp_path: Path) -> None:
    row = {"prompt": "a", "completions": ["b"], "prompt_ids": [1], "completion_ids": [[2]]}
    [(place, read)] = read_rows(write(tmp_path / "rollouts.jsonl", [row]))
    assert group_of(read, place) == Group("a", ["b"])


def test_score_reads_a_pair_of_dialogues_as_the_contract_says(
    export_dir: Path, text_model: Path, tmp_path: Path
) -> None:
    from reward_actor import RewardScorer

    hi = "\n\nHuman: Hi.\n\nAssistant:"
    pair = {"chosen": hi + " Hello.", "rejected": hi + " No."}
    source, output = write(tmp_path / "in.jsonl", [pair]), tmp_path / "out.jsonl"
    for model, group in (
        (export_dir, Group([{"role": "user", "content": "Hi."}], ["Hello.", "No."])),
        (text_model, Group("", [*pair.values()])),
    ):
        assert rayward.main(["score", str(model), str(source), str(output)]) == 0
        [expected] = RewardScorer.from_pretrained(model).score([group])
        row = json.loads(output.read_text())
        assert row["rewards"] == pytest.approx(expected.rewards, abs=1e-5)
        assert row["num_tokens"] == expected.num_tokens


def test_the_doctor_finds_this_machine_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert rayward.main(["doctor"]) == 0
    report = capsys.readouterr().out
    for name in ("python", "torch", "ray", "deepspeed", "vllm", "device", "compiler"):
        assert f"ok    {name}" in report


def test_the_doctor_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert rayward.main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "FAIL  ray auth" in report
    assert "unset RAY_AUTH_MODE" in report


def test_a_folder_without_a_model_may_have_the_name_of_an_application(
    export_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rayward").mkdir()
    Path("rayward", "__init__.py").touch()
    Path("mine").symlink_to(export_dir)
    assert not is_model_directory("rayward")
    assert not is_model_directory("http://127.0.0.1:8000")
    assert is_model_directory("mine")
    assert is_model_directory(str(export_dir))
    assert is_model_directory("./rayward"), "a path, whose model is then missed by name"
