"""`rayward convert`: every layout into ours, without changing a reward."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from exports import from_pretrained
from families import SOME_FAMILIES, make_network
from foreign import ROWS, Score, scores
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import rayward
from reward_actor import Group, RewardScorer
from reward_actor.contract import ScoringContract
from reward_actor.convert import convert
from reward_actor.model.directory import CheckpointError
from reward_actor.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*has no scoring_contract.json:UserWarning")

Maker = Callable[[Path], Score]

FOREIGN: dict[str, Maker] = {
    "openrlhf": foreign.openrlhf,
    "openrlhf-mixtral": lambda path: foreign.openrlhf(path, "mixtral", "score"),
    "remote-llama": foreign.remote_code,
    "remote-llama-bias": lambda path: foreign.remote_code(path, "llama", 0.7),
    "remote-bloom-bias": lambda path: foreign.remote_code(path, "bloom", -1.3),
}


def plain_scores(directory: Path, rows: list[list[int]] = ROWS) -> list[float]:
    """The raw scores of `transformers` alone."""
    network = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False
    )
    assert network.config.problem_type == "regression"
    with torch.inference_mode():
        return [network(input_ids=torch.tensor([row])).logits.item() for row in rows]


def check(directory: Path, expected: list[float]) -> RewardScorer:
    """`directory` is one of ours and gives the expected rewards, and plain raw scores with them."""
    config = json.loads((directory / "config.json").read_text())
    assert not config.keys() & {"auto_map", "value_head_prefix", "mean", "std", "normalize_reward"}
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert not [path for path in directory.iterdir() if path.suffix in (".py", ".bin")]
    scorer = from_pretrained(directory)
    assert scorer.contract.golden.samples
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(expected, abs=1e-5, rel=1e-5)
    raw = scorer.raw_scores(ROWS).ravel().tolist()
    assert plain_scores(directory) == pytest.approx(raw, abs=1e-5, rel=1e-5)
    return scorer


@pytest.mark.parametrize("name", FOREIGN)
def test_converting_changes_no_reward(name: str, tmp_path: Path, tokenizer: Any) -> None:
    source, destination = tmp_path / "source", tmp_path / "converted"
    own = FOREIGN[name](source)
    tokenizer.save_pretrained(source)
    command = ["convert", str(source), str(destination), "--trust-remote-code"]
    assert rayward.main(command) == 0
    check(destination, scores(own))
    for dtype in ("float32", "bfloat16"):
        before = from_pretrained(source, dtype=dtype, trust_remote_code=True).score_ids(ROWS)
        after = from_pretrained(destination, dtype=dtype).score_ids(ROWS)
        assert after.tolist() == pytest.approx(before.tolist(), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_every_family_converts_to_what_plain_transformers_loads(
    family: str, tmp_path: Path, tokenizer: Any
) -> None:
    source = tmp_path / "source"
    make_network(family).save_pretrained(source)
    tokenizer.save_pretrained(source)
    convert(source, tmp_path / "converted")
    before = from_pretrained(source).score_ids(ROWS).tolist()
    after = check(tmp_path / "converted", before).score_ids(ROWS).tolist()
    assert after == pytest.approx(before, abs=1e-6, rel=1e-6)


def test_an_adapter_becomes_whole(tmp_path: Path, tokenizer: Any) -> None:
    adapter = tmp_path / "adapter"
    own = foreign.peft_adapter(adapter, tmp_path / "base", tokenizer)
    convert(adapter, tmp_path / "converted")
    check(tmp_path / "converted", scores(own))
    for dtype in ("float32", "bfloat16"):
        before = from_pretrained(adapter, dtype=dtype).score_ids(ROWS).tolist()
        after = from_pretrained(tmp_path / "converted", dtype=dtype).score_ids(ROWS).tolist()
        assert after == pytest.approx(before, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "body"),
    [
        ("opt", "rwtranrsformer"),
        ("opt", "rwtransformer"),
        ("bloom", "rwtranrsformer"),
        *(
            pytest.param(family, "rwtranrsformer", marks=pytest.mark.long)
            for family in ("llama", "gpt2", "gpt_neox")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is an OPT model:UserWarning")
def test_deepspeed_chat(family: str, body: str, tmp_path: Path, base_model: Path) -> None:
    own = foreign.deepspeed_chat(tmp_path / "rm", family, body)
    contract = convert(tmp_path / "rm", tmp_path / "converted", tokenizer_from=base_model)
    assert (contract.format, contract.append_eos) == ("text", False)
    scorer = from_pretrained(tmp_path / "converted")
    eos = 2
    rows = [[eos, *row] for row in ROWS] if family == "opt" else ROWS
    assert scorer.score_ids(rows).tolist() == pytest.approx(scores(own, rows), abs=1e-5, rel=1e-5)
    raw = scorer.raw_scores(rows).ravel().tolist()
    assert plain_scores(tmp_path / "converted", rows) == pytest.approx(raw, abs=1e-5, rel=1e-5)


def test_a_tokenizer_that_is_not_opts_is_mentioned(tmp_path: Path, base_model: Path) -> None:
    foreign.deepspeed_chat(tmp_path / "rm", "opt")
    with pytest.warns(UserWarning, match="does not begin a text with </s>"):
        convert(tmp_path / "rm", tmp_path / "converted", tokenizer_from=base_model)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/rayward-must-not-exist", "w"))


def test_a_pickle_that_holds_code_is_refused(tmp_path: Path, base_model: Path) -> None:
    directory = tmp_path / "rm"
    foreign.deepspeed_chat(directory, "llama", extra=Evil())
    with pytest.raises(CheckpointError, match="holds more than weights"):
        convert(directory, tmp_path / "converted", tokenizer_from=base_model)
    assert not Path("/tmp/rayward-must-not-exist").exists()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        convert(directory, tmp_path / "converted", tokenizer_from=base_model)
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    network = make_network("llama")
    torch.nn.init.constant_(network.score.weight, float("nan"))
    network.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="finite"):
        convert(tmp_path / "source", tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_keep_the_dtype_they_come_in(tmp_path: Path, tokenizer: Any) -> None:
    network = make_network("llama").to(torch.bfloat16)
    network.config.dtype = torch.bfloat16
    network.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "same").dtype == "bfloat16"
    assert convert(tmp_path / "source", tmp_path / "wide", dtype="float32").dtype == "float32"
    for name, dtype in (("same", torch.bfloat16), ("wide", torch.float32)):
        weights = load_file(tmp_path / name / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {dtype}


def test_float16_is_kept_and_proved(tmp_path: Path, tokenizer: Any) -> None:
    network = make_network("llama").half()
    network.config.dtype = torch.float16
    network.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    contract = convert(tmp_path / "source", tmp_path / "converted")
    assert contract.dtype == "float16"
    assert contract.golden.raw_scores.keys() == {"float32", "bfloat16", "float16"}
    before = from_pretrained(tmp_path / "source").score_ids(ROWS)
    scorer = from_pretrained(tmp_path / "converted")
    assert scorer.dtype == "float16"
    assert scorer.score_ids(ROWS).tolist() == before.tolist()


def test_what_pads_has_an_embedding(tmp_path: Path, tokenizer: Any) -> None:
    """A pad token that was added to the tokenizer alone: plain loading works, so must this."""
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    network = make_network("llama", vocab_size=len(tokenizer) - 1)
    network.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    contract = convert(tmp_path / "source", tmp_path / "converted")
    assert contract.pad_token_id < len(tokenizer) - 1
    group = Group("Name two fruits.", ["An apple."])
    [before], [after] = (
        from_pretrained(tmp_path / name).score([group]) for name in ("source", "converted")
    )
    assert after.rewards == pytest.approx(before.rewards, abs=1e-5)


def test_the_format_can_be_chosen(tmp_path: Path, tokenizer: Any) -> None:
    foreign.openrlhf(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    assert convert(tmp_path / "rm", tmp_path / "chat").format == "chat"
    assert convert(tmp_path / "rm", tmp_path / "text", format="text").format == "text"
    group = Group("Name two fruits. ", ["An apple."])
    [scored] = from_pretrained(tmp_path / "text").score([group])
    scorer = from_pretrained(tmp_path / "text")
    ids = tokenizer(f"Name two fruits. An apple. {tokenizer.eos_token}")["input_ids"]
    assert scored.rewards == pytest.approx(scorer.score_ids([ids]).tolist(), abs=1e-6)


def test_template_args_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    foreign.openrlhf(tmp_path / "rm")
    tokenizer.chat_template = "{{ mood }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "rm")
    command = ["convert", str(tmp_path / "rm"), str(tmp_path / "wry")]
    assert rayward.main([*command, "--template-args", '{"mood": "wry"}']) == 0
    told = from_pretrained(tmp_path / "wry")
    assert told.contract.template_args == {"mood": "wry"}
    plain = from_pretrained(tmp_path / "rm")
    own = Group("Name two fruits.", ["An apple."], template_args={"mood": "wry"})
    other = Group("Name two fruits.", ["An apple."])
    [expected], [found], [without] = plain.score([own]), told.score([other]), plain.score([other])
    assert found.rewards == pytest.approx(expected.rewards, abs=1e-5)
    assert found.num_tokens != without.num_tokens


def test_an_export_of_ours_keeps_its_contract(export_dir: Path, tmp_path: Path) -> None:
    convert(export_dir, tmp_path / "again")
    before, after = ScoringContract.load(export_dir), ScoringContract.load(tmp_path / "again")
    assert before is not None
    assert after is not None
    assert after.golden.raw_scores["float32"] == pytest.approx(before.golden.raw_scores["float32"])
    with pytest.raises(ValueError, match="leave --format away"):
        convert(export_dir, tmp_path / "text", format="text")


def test_a_body_that_transformers_does_not_have_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """It is served with its code, but an export would need that code."""
    directory = tmp_path / "own"
    own = foreign.remote_code(directory)
    tokenizer.save_pretrained(directory)
    code = directory / "modeling_reward.py"
    text = code.read_text().replace("LlamaModel(config)", "OwnModel(config)")
    code.write_text(text + "\n\nclass OwnModel(LlamaModel):\n    pass\n")
    scorer = from_pretrained(directory, trust_remote_code=True)
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(scores(own), abs=1e-5)
    with pytest.raises(CheckpointError, match="would need its code"):
        convert(directory, tmp_path / "converted", trust_remote_code=True)


def test_what_the_command_refuses(
    tmp_path: Path, base_model: Path, export_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.remote_code(tmp_path / "own")
    load_tokenizer(base_model).save_pretrained(tmp_path / "own")
    foreign.openrlhf(tmp_path / "bare")
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ([tmp_path / "own", tmp_path / "new"], "--trust-remote-code"),
        ([tmp_path / "bare", tmp_path / "new"], "--tokenizer-from DIR"),
        ([export_dir, tmp_path / "there"], "exists; convert into a directory that does not"),
        ([tmp_path / "nowhere", tmp_path / "new"], "is not a directory"),
        ([base_model, tmp_path / "new"], "no trained reward head"),
        ([export_dir, tmp_path / "new", "--dtype", "int8"], "dtype is 'int8'"),
        ([tmp_path / "bare", tmp_path / "new", "--tokenizer-from", "/no"], "/no is not a dir"),
        ([export_dir, tmp_path / "new", "--template-args", "{}"], "remove --template-args"),
        ([export_dir, tmp_path / "new", "--template-args", "[1]"], "is a list, not an object"),
    ):
        assert rayward.main(["convert", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    command = ["convert", str(tmp_path / "bare"), str(tmp_path / "new")]
    assert rayward.main([*command, "--tokenizer-from", str(base_model)]) == 0
    printed = capsys.readouterr().out
    assert "reward = (raw score - -0.577) / 1.7" in printed
