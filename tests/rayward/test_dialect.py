"""The dialect of every command, and one line for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import command_lines

import rayward
from rayward.__main__ import COMMANDS, make_parser

FROZEN = Path(__file__).with_name("command_line.txt")


def test_the_command_line_is_the_one_that_is_frozen() -> None:
    assert command_lines() == FROZEN.read_text(), (
        "the command line has changed; if that is meant: "
        "python tests/helpers/command_lines.py > tests/rayward/command_line.txt"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_in_kebab_case_and_have_a_help_without_python(name: str) -> None:
    parser = make_parser(name)
    for action in parser._actions:
        for string in action.option_strings:
            assert re.fullmatch(r"-[a-z]|--(no-)?([a-z]+\.)?[a-z0-9]+(-[a-z0-9]+)*", string)
        assert action.help, action.option_strings
    assert not re.search(r"\[[^]]*(None|True|False|'|\")", parser.format_help().replace("'s", ""))


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert rayward.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("tran", "there is no command tran; did you mean train?"),
        ("frobnicate", "there is no command frobnicate; rayward --help lists them"),
        ("--verson", "there is no command --verson; did you mean --version?"),
        ("serve", "the following arguments are required: MODEL; "
                  "rayward serve --help lists the options"),
        ("serve m --port x", "--port: invalid int value: 'x'; "
                             "rayward serve --help lists the options"),
        ("serve m --num-replicas x", "--num-replicas is 'x': input should be a valid integer, "
                                     "unable to parse string as an integer"),
        ("serve m --min-replicas 2", "--min-replicas needs --max-replicas; --num-replicas alone "
                                     "is a fixed number"),
        ("serve m --num-replica 2", "unknown option --num-replica; did you mean --num-replicas?"),
        ("ensemble d m --combine x", "--combine: invalid choice: 'x' (choose from 'mean', 'min', "
                                     "'mean_minus_std'); rayward ensemble --help lists the "
                                     "options"),
        ("token me --fiel x", "unknown option --fiel; did you mean --file?"),
        ("token me --qqqqq x", "unknown option --qqqqq; rayward token --help lists the options"),
        ("score a b c d", "unexpected argument 'd'; rayward score --help lists the options"),
        ("train --output_dirr x", "unknown option --output_dirr; did you mean --output-dir?"),
        ("train --num-epochs 1", "unknown option --num-epochs; did you mean "
                                 "--training.num-epochs?"),
        ("token me --file /nowhere/t.json", "/nowhere/t.json: no such file or directory"),
        ("train --folds x", "--folds: invalid int value: 'x'; "
                            "rayward train --help lists the options"),
        ("train --training.num-epochs x --data.train f",
         "--training.num-epochs is 'x': input should be a valid integer, unable to parse string "
         "as an integer"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(
    typed: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = complaint(typed.split(), capsys)
    before_3_12 = told.replace("mean, min, mean_minus_std", "'mean', 'min', 'mean_minus_std'")
    assert before_3_12 == f"error: {message}"


def test_a_file_that_is_no_yaml_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("a: [\nb: 1\n")
    assert f"{file} is not YAML" in complaint(["train", "--config", str(file)], capsys)


def test_a_flag_of_the_service_takes_its_old_value_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = ["m", "--access-log", "true", "--trust_remote_code=false", "--max_queue_s", "3"]
    given = make_parser("serve").parse(typed)
    assert (given.access_log, given.trust_remote_code, given.max_queue_s) == (True, False, "3")
    assert capsys.readouterr().err.splitlines() == [
        "warning: --access-log true is spelled --access-log now",
        "warning: --trust_remote_code=false is spelled --no-trust-remote-code now",
        "warning: --max_queue_s is spelled --max-queue-s now",
    ]


def test_what_comes_after_two_dashes_is_no_option() -> None:
    given = make_parser("score").parse(["m", "--", "--in", "--out_put"])
    assert (given.input, given.output) == ("--in", "--out_put")


def test_help_is_by_topic_and_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert rayward.main([]) == 0
    help = capsys.readouterr().out
    assert [line for line in help.splitlines() if re.fullmatch(r"[a-z ]+:", line)] == [
        "train:",
        "measure:",
        "serve and score:",
        "tools:",
    ]
    assert all(re.search(rf"^  {name} +\S", help, re.MULTILINE) for name in COMMANDS)
    assert rayward.main(["--help"]) == 0
    assert capsys.readouterr().out == help
    assert rayward.main(["--version"]) == 0
    assert re.fullmatch(r"rayward \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["train", "serve"])
def test_many_options_have_headings(name: str) -> None:
    titles = [group.title for group in make_parser(name)._action_groups]
    assert {"train": "optimizer", "serve": "access"}[name] in titles
    assert max(len(group._group_actions) for group in make_parser(name)._action_groups) < 25


@pytest.mark.parametrize(
    "typed",
    [
        "score nowhere {rows} out.jsonl --device",
        "score nowhere {rows} --explain 1 --device",
        "eval nowhere {rows} --device",
        "compare nowhere nowhere {rows} --device",
        "convert nowhere copy --device",
        "train --data.train {rows} --model.path nowhere --distributed.device",
        pytest.param("serve nowhere --device", marks=pytest.mark.process),
    ],
)
def test_a_gpu_that_is_not_there_is_said_before_a_model_is_looked_for(
    tmp_path: Path,
    typed: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    told = complaint([*typed.format(rows=rows).split(), "cuda"], capsys)
    assert re.match(r"error: (--|--distributed\.)?device cuda: torch \S+ sees no GPU here", told)


WITHOUT_EXTRAS = """
import importlib.abc, sys

EXTRAS = set(sys.argv[1].split(","))

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import rayward

for line in sys.argv[2:]:
    print("exit", rayward.main(line.split()), file=sys.stderr)
"""
EXTRAS = (
    "torch ray transformers tokenizers safetensors huggingface_hub fastapi starlette deepspeed "
    "vllm jinja2 datasets matplotlib peft"
)
NEEDS = {
    "train --data.train {rows} --output-dir {new}": ("torch", "train"),
    "init-model {new} --corpus {rows}": ("torch", "train"),
    "eval {export} {rows}": ("torch", "train"),
    "compare {export} {export} {rows}": ("torch", "train"),
    "serve {export}": ("ray", "serve"),
    "score {export} {rows} {new}": ("torch", "serve"),
    "convert {export} {new}": ("torch", "serve"),
    "ensemble {new} {export}": ("safetensors", "serve"),
    "rollout {export} {rows} {new}": ("vllm", "rollout"),
}


@pytest.mark.process
def test_a_command_without_its_extra_names_it(export_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    new = tmp_path / "new"
    lines = [line.format(export=export_dir, rows=rows, new=new) for line in NEEDS]
    hidden = ",".join(EXTRAS.split())
    command = [sys.executable, "-c", WITHOUT_EXTRAS, hidden, *lines, f"token me --file {new}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    for line, (package, extra) in NEEDS.items():
        name = line.partition(" ")[0]
        assert told.pop(0) == (
            f"error: rayward {name} needs {package}, which is not installed: "
            f'pip install "rayward[{extra}]"'
        )
        assert told.pop(0) == "exit 2"
    assert told[-1] == "exit 0", "a token needs nothing"
    assert done.stdout.startswith("rw_")
    assert set(COMMANDS) - {line.partition(" ")[0] for line in NEEDS} == {"token", "doctor"}


def test_the_doctor_speaks_of_make_in_a_clone_and_of_pip_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rayward.commands import doctor

    monkeypatch.setattr(doctor, "version", missing)
    in_a_clone = {check.name: check.advice for check in doctor.checks()}
    assert in_a_clone["torch"] == "run `make setup`"
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "rayward" / "commands" / "doctor.py"))
    elsewhere = {check.name: check.advice for check in doctor.checks()}
    assert elsewhere["torch"] == 'pip install "rayward[serve]"'
    assert elsewhere["deepspeed"] == 'pip install "rayward[train]"'
    assert elsewhere["vllm"] == 'pip install "rayward[rollout]"'
    assert not any("make" in advice for advice in elsewhere.values())


def missing(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)
