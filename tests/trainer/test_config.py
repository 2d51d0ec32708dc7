"""The settings of a training: every mistake is told with its key, before anything heavy loads."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_actor.command_line import Parser, option
from trainer.config.config_file import load_config, preset_names
from trainer.config.options import add_arguments, config_from_arguments, leaves

NEEDED = [("model.path", "base"), ("data.train", "pairs.jsonl")]


def parse(*argv: str):
    parser = Parser("rayward train", "")
    add_arguments(parser)
    return config_from_arguments(parser.parse(argv))


def test_defaults_and_overrides(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text("optimizer:\n  learning_rate: 3e-4\ntraining:\nmodel: {path: a}\n")
    config = load_config(
        str(file), [("data.train", "b"), ("model.path", "c"), ("model.max_length", "none")]
    )
    assert config.optimizer.learning_rate == 3e-4  # a string to YAML
    assert config.model.path == "c"
    assert config.model.max_length is None
    assert config.training.seed == 0


def test_every_setting_is_an_option_with_a_description():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for key, field in leaves():
        assert field.description
        assert re.search(rf"{option(key)}[ ,]", text)
        assert " ".join(field.description.split()) in text


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(1e-9, 1e3),
    st.sampled_from(["--loss.use-margin", "--no-loss.use-margin"]),
)
def test_what_is_given_arrives(seed: int, rate: float, flag: str):
    config = parse(
        "--model.path", "m", "--data.train", "d", "--training.seed", str(seed),
        "--optimizer.learning-rate", repr(rate), flag, "--output-dir", "out",
    )  # fmt: skip
    assert config.training.seed == seed
    assert config.optimizer.learning_rate == rate
    assert config.loss.use_margin is (flag == "--loss.use-margin")
    assert config.output_dir == "out"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.sed", "1", "unknown key 'training.sed'; did you mean 'training.seed'?"),
        ("trainig.seed", "1", "unknown key 'trainig'; did you mean 'training'?"),
        ("training.seed", "x", "training.seed is 'x': input should be a valid integer"),
        ("distributed.zero_stage", "4", "distributed.zero_stage is '4'"),
        ("model.dtype", "float16", "model.dtype is 'float16'"),
        ("optimizer.learning_rate", "nan", "optimizer.learning_rate is"),
        ("data.eval_fraction", "1", "data.eval_fraction is '1'"),
        ("checkpoint.num_to_keep", "1", "checkpoint.num_to_keep is '1'"),
        ("training.micro_batch_tokens", "0", "training.micro_batch_tokens is '0'"),
        ("model.freeze", "['(']", "'(' is not a regular expression"),
        ("model.template_args", "{tools: []}", "must not be named 'tools'"),
        ("model.template_args", "{day: 2026-01-01}", "template_args must be a JSON object"),
        ("data.train", "{a: 0}", "data.train.a.weight is 0"),
        ("data.train", "{a: {wait: 1}}", "unknown key 'data.train.a.wait'"),
        ("data.train", "{a: [", "data.train is '{a: [', which is not YAML"),
        ("distributed.offload_parameters", "true", "needs distributed.zero_stage 3, not 2"),
        ("distributed.zeropp_partition_size", "2", "must divide distributed.num_workers (1)"),
        ("adapter.quantize", "8bit", "adapter.quantize is '8bit'"),
        ("adapter.quantize", "4bit", "set adapter.rank to train adapters"),
        ("evaluation.patience", "2", "evaluation.patience needs evaluation.every_steps"),
        ("distributed.num_workers", "65", "distributed.num_workers is 65 but"),
        ("output_dir.x", "1", "output_dir"),
    ],
)
def test_a_wrong_setting_is_named(key: str, value: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(None, [*NEEDED, (key, value)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"optimizer.name": "muon"},
            "min_workers cannot be used: the state of optimizer.name muon",
        ),
        (
            {"distributed.zero_stage": "3", "distributed.zeropp_partition_size": "2"},
            "min_workers cannot be used: distributed.zeropp_partition_size",
        ),
        (
            {"evaluation.every_steps": "5", "evaluation.asynchronous": "true"},
            "evaluation.asynchronous needs a place beside the workers",
        ),
    ],
)
def test_fewer_workers_are_refused_where_they_could_not_go_on(more: dict[str, str], message: str):
    elastic = {"distributed.num_workers": "4", "distributed.min_workers": "2"}
    load_config(None, [*NEEDED, *elastic.items()])
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(None, [*NEEDED, *elastic.items(), *more.items()])


def test_template_args_need_a_template():
    args = ("model.template_args", "{enable_thinking: false}")
    assert load_config(None, [*NEEDED, args]).model.template_args == {"enable_thinking": False}
    with pytest.raises(ValueError, match=r"model.template_args needs model.format chat, not text"):
        load_config(None, [*NEEDED, args, ("model.format", "text")])


def test_a_password_in_an_address_is_refused_and_not_repeated():
    place = ("checkpoint.storage_path", "s3://key:s3cret@bucket/runs")
    with pytest.raises(ValueError, match="holds a password") as raised:
        load_config(None, [*NEEDED, place])
    assert "s3cret" not in str(raised.value)


def test_several_data_sets_have_weights_and_columns_of_their_own():
    text = "{a.jsonl: 0.5, b: {weight: 2, chosen_column: good}}"
    config = load_config(None, [("data.train", text), ("data.chosen_column", "best")])
    sources = config.data.sources("train")
    assert {name: source.weight for name, source in sources.items()} == {"a.jsonl": 0.5, "b": 2}
    assert [source.chosen_column for source in sources.values()] == ["best", "good"]
    assert config.data.sources("eval") == {}


def test_lists_and_mappings_are_given_as_yaml():
    config = parse(
        "--data.train", "d", "--model.freeze", "[embed, '^norm']",
        "--distributed.deepspeed", "{zero_optimization: {overlap_comm: false}}",
    )  # fmt: skip
    assert config.model.freeze == ["embed", "^norm"]
    assert config.distributed.deepspeed == {"zero_optimization": {"overlap_comm": False}}


def test_the_spelling_of_before_is_taken_with_a_warning(capsys: pytest.CaptureFixture[str]):
    config = parse(
        "--data.train", "d", "--optimizer.learning_rate=3e-4", "--loss.use_margin", "false",
        "--checkpoint.asynchronous", "false", "--data.deduplicate=false", "--output_dir", "out",
        "--data.streaming", "True",
    )  # fmt: skip
    assert config.optimizer.learning_rate == 3e-4
    assert (config.loss.use_margin, config.checkpoint.asynchronous) == (False, False)
    assert (config.data.deduplicate, config.data.streaming) == (False, True)
    assert config.output_dir == "out"
    assert capsys.readouterr().err.splitlines() == [
        "warning: --optimizer.learning_rate=3e-4 is spelled --optimizer.learning-rate=3e-4 now",
        "warning: --loss.use_margin false is spelled --no-loss.use-margin now",
        "warning: --checkpoint.asynchronous false is spelled --no-checkpoint.asynchronous now",
        "warning: --data.deduplicate=false is spelled --no-data.deduplicate now",
        "warning: --output_dir is spelled --output-dir now",
        "warning: --data.streaming True is spelled --data.streaming now",
    ]


def test_a_complaint_names_what_was_typed_and_the_file_for_the_rest(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("training: {num_epochs: y, seed: z}\ndistributed: {num_workers: 99}\n")
    with pytest.raises(ValueError, match="seed") as raised:
        parse("--config", str(file), "--data.train", "{a: 0}", "--training.num-epochs", "x")
    by_order = str(raised.value).split("; ")
    assert [line.partition(" is ")[0] for line in by_order] == [
        "--data.train.a.weight",
        "--training.num-epochs",
        f"{file}: training.seed",
    ]
    file.write_text("distributed: {num_workers: 99}\n")
    with pytest.raises(ValueError, match=rf"^{file}: distributed.num_workers is 99 but"):
        parse("--config", str(file), "--data.train", "d")
    with pytest.raises(ValueError, match=r"^distributed.num_workers is 99 but --training.global-b"):
        parse("--config", str(file), "--data.train", "d", "--training.global-batch-pairs", "8")
    with pytest.raises(ValueError, match=r"^--evaluation.patience needs --evaluation.every-steps$"):
        parse("--data.train", "d", "--evaluation.patience", "2")
    with pytest.raises(ValueError, match=r"^--data.train is '\{a: \[', which is not YAML"):
        parse("--data.train", "{a: [")


def test_what_is_required_is_named():
    with pytest.raises(ValueError, match=r"^data.train is required$"):
        load_config(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- 1", "holds list"), ("modell: {}", "did you mean 'model'")],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(str(file), NEEDED)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"cannot read nowhere.yaml"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_a_config_by_its_name(name: str):
    assert load_config(name, [("data.train", "pairs.jsonl")]).optimizer.learning_rate > 0


def test_a_file_comes_before_a_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("alpaca").write_text("training: {seed: 7}")
    assert load_config("alpaca", NEEDED).training.seed == 7


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Presets are alpaca, .*quickstart"):
        load_config("quick", NEEDED)


def test_an_unknown_option_is_named():
    with pytest.raises(
        ValueError, match=r"^unknown option --training\.sed; did you mean --training\.seed\?$"
    ):
        parse("--training.sed", "1")
    with pytest.raises(ValueError, match="unexpected argument 'stray'"):
        parse("stray")


@pytest.mark.process
def test_help_and_errors_of_the_command_load_neither_torch_nor_ray():
    code = (
        "import sys; from trainer.__main__ import main\n"
        "status = main(['--model.path', 'm', '--training.sed', '1'])\n"
        "assert status == 2, status\n"
        "assert not {'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: unknown option")
    assert "Traceback" not in done.stderr
