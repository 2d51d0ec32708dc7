"""Every kind of head, against its own system's formula: loaded, converted and in half precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from exports import from_pretrained
from families import make_network
from foreign import ROWS, Score, scores
from safetensors.torch import load_file, save_file

import rayward
from reward_actor import Group, RewardScorer
from reward_actor.contract import ContractError
from reward_actor.convert import convert
from reward_actor.model.directory import CheckpointError
from reward_actor.model.layouts import recognise
from reward_actor.shaping import weighted_sum
from reward_actor.vllm.scorer import check_supported

pytestmark = pytest.mark.filterwarnings("ignore:.*has no scoring_contract.json:UserWarning")

Maker = Callable[[Path, Any], Score]


def adapter(directory: Path, tokenizer: Any) -> Score:
    base = directory.with_name("base")
    return foreign.value_head_adapter(directory, base, tokenizer)


HEADS: dict[str, Maker] = {
    "LLaMA-Factory, full": lambda path, _: foreign.value_head(path, "file"),
    "LLaMA-Factory, adapter": adapter,
    "TRL, inside the model file": lambda path, _: foreign.value_head(path, "inside"),
    "GRM": lambda path, _: foreign.value_head(path, "inside", (48,), vhead_layer_type="mlp"),
    "GRM of two layers": lambda path, _: foreign.value_head(
        path, "inside", (48, 48), vhead_layer_type="mlp"
    ),
    "Qwen2.5-Math-RM, WorldPM": lambda path, _: foreign.layered(path, "Qwen2ForRewardModel"),
    "INF-ORM": lambda path, _: foreign.layered(path, "INFORMForSequenceClassification", "llama"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_scores_as_its_system_does(name: str, tmp_path: Path, tokenizer: Any) -> None:
    source, destination = tmp_path / "source", tmp_path / "converted"
    own = HEADS[name](source, tokenizer)
    tokenizer.save_pretrained(source)
    expected = scores(own)
    scorer = from_pretrained(source)
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(expected, abs=1e-5, rel=1e-5)
    convert(source, destination)
    after = from_pretrained(destination)
    assert after.score_ids(ROWS).tolist() == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert after.contract.golden.samples
    half = from_pretrained(destination, dtype="bfloat16").score_ids(ROWS).tolist()
    assert half == pytest.approx(expected, abs=0.1, rel=0.1)
    before = from_pretrained(source, dtype="bfloat16").score_ids(ROWS).tolist()
    assert half == pytest.approx(before, abs=1e-6, rel=1e-6)


def test_equal_rows_have_equal_scores_through_several_layers(
    tmp_path: Path, tokenizer: Any
) -> None:
    foreign.layered(tmp_path / "rm", "Qwen2ForRewardModel")
    tokenizer.save_pretrained(tmp_path / "rm")
    scorer = from_pretrained(tmp_path / "rm", cache_size=0)
    found = scorer.score_ids([ROWS[0]] * 37).tolist()
    assert found == found[:1] * 37
    [each] = scorer.token_rewards([ROWS[3]])
    assert each.tolist()[-1] == pytest.approx(scorer.score_ids([ROWS[3]])[0], abs=1e-6)


def test_a_wide_head_on_a_half_body_keeps_its_digits(tmp_path: Path, tokenizer: Any) -> None:
    """LLaMA-Factory keeps the head in float32 beside a body in bfloat16."""
    own = foreign.value_head(tmp_path / "rm", "file")
    tokenizer.save_pretrained(tmp_path / "rm")
    path = tmp_path / "rm" / "model.safetensors"
    save_file({key: w.bfloat16() for key, w in load_file(path).items()}, path)
    convert(tmp_path / "rm", tmp_path / "converted", dtype="bfloat16")
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    head = load_file(tmp_path / "rm" / "value_head.safetensors")["v_head.summary.weight"]
    assert torch.equal(stored["score.weight"], head)
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    before = from_pretrained(tmp_path / "rm", dtype="bfloat16").score_ids(ROWS).tolist()
    scorer = from_pretrained(tmp_path / "converted")
    assert scorer.dtype == "bfloat16"
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(before, abs=1e-6)
    assert before == pytest.approx(scores(own), abs=0.1, rel=0.1)


def test_a_wide_head_of_its_own_code_keeps_its_digits(tmp_path: Path, tokenizer: Any) -> None:
    foreign.remote_code(tmp_path / "rm", dtype="bfloat16")
    tokenizer.save_pretrained(tmp_path / "rm")
    path = tmp_path / "rm" / "model.safetensors"
    weights = load_file(path)
    halved = {k: w if k.startswith("value_head") else w.bfloat16() for k, w in weights.items()}
    save_file(halved, path, metadata={"format": "pt"})
    convert(tmp_path / "rm", tmp_path / "out", trust_remote_code=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["score.weight"], weights["value_head.weight"])


def test_the_bias_of_several_outputs_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    network = make_network("llama", num_labels=2)
    network.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    path = tmp_path / "rm" / "model.safetensors"
    bias = torch.tensor([0.5, -2.0])
    save_file({**load_file(path), "score.bias": bias}, path)
    convert(tmp_path / "rm", tmp_path / "out", heads="a=2,b=3")
    assert "score.bias" not in load_file(tmp_path / "out" / "model.safetensors")
    with torch.inference_mode():
        own = torch.cat([network(input_ids=torch.tensor([row])).logits for row in ROWS]) + bias
    scorer = from_pretrained(tmp_path / "out")
    found = scorer.score_ids(ROWS).tolist()
    assert found == pytest.approx((own @ torch.tensor([2.0, 3.0])).tolist(), abs=1e-5, rel=1e-5)
    [group] = scorer.score([Group(prompt_ids=ROWS[0][:2], completion_ids=[ROWS[0][2:]])])
    assert group.named_rewards is not None
    named = [rewards[0] for rewards in group.named_rewards.values()]
    ids = torch.tensor([scorer.renderer.sequences(Group(
        prompt_ids=ROWS[0][:2], completion_ids=[ROWS[0][2:]]
    ))[0]])  # fmt: skip
    with torch.inference_mode():
        expected = network(input_ids=ids).logits[0] + bias
    assert named == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_adapters_own_head_takes_no_bias_of_its_base(tmp_path: Path, tokenizer: Any) -> None:
    own = foreign.peft_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer)
    path = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(path), "score.bias": torch.tensor([9.0])}, path)
    found = from_pretrained(tmp_path / "adapter").score_ids(ROWS).tolist()
    assert found == pytest.approx(scores(own), abs=1e-5, rel=1e-5)


def test_a_plain_head_keeps_its_bias(tmp_path: Path, tokenizer: Any) -> None:
    """`score.bias`, for which plain classes have no place."""
    make_network("llama").save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    without = from_pretrained(tmp_path / "rm").score_ids(ROWS)
    path = tmp_path / "rm" / "model.safetensors"
    save_file({**load_file(path), "score.bias": torch.tensor([0.75])}, path)
    scorer = from_pretrained(tmp_path / "rm")
    assert scorer.score_ids(ROWS).tolist() == pytest.approx((without + 0.75).tolist(), abs=1e-5)
    convert(tmp_path / "rm", tmp_path / "converted")
    after = from_pretrained(tmp_path / "converted").score_ids(ROWS).tolist()
    assert after == pytest.approx((without + 0.75).tolist(), abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("said", "rows"), [("7", [7]), ("9-40", [9, 40]), ("a-b", None)])
def test_rows_of_a_language_models_head(
    said: str,
    rows: list[int] | None,
    tied: bool,
    tmp_path: Path,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    causal = foreign.language_model(tmp_path / "lm", tie_word_embeddings=tied)
    tokenizer.save_pretrained(tmp_path / "lm")
    rows = rows or [tokenizer.convert_tokens_to_ids(token) for token in said.split("-")]
    command = ["convert", str(tmp_path / "lm"), str(tmp_path / "rm"), "--head-rows", said]
    assert rayward.main(command) == 0
    told = capsys.readouterr().out
    for row in rows:
        assert f"{row} ({tokenizer.convert_ids_to_tokens(row)!r})" in told
    with torch.inference_mode():
        logits = [causal(input_ids=torch.tensor([row])).logits[0, -1] for row in ROWS]
    expected = [(x[rows[0]] - (x[rows[1]] if len(rows) == 2 else 0)).item() for x in logits]
    scorer = from_pretrained(tmp_path / "rm")
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_a_reward_model_has_no_rows_to_take(export_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a reward model already; leave --head-rows away"):
        convert(export_dir, tmp_path / "rm", head_rows="7")


def test_rows_beside_an_adapter(tmp_path: Path, tokenizer: Any) -> None:
    foreign.value_head_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer)
    (tmp_path / "adapter" / "value_head.safetensors").unlink()
    tokenizer.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "rm", head_rows="9-40")
    from peft import AutoPeftModelForCausalLM

    own = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    with torch.inference_mode():
        logits = [own(input_ids=torch.tensor([row])).logits[0, -1] for row in ROWS]
    expected = [(x[9] - x[40]).item() for x in logits]
    found = from_pretrained(tmp_path / "rm").score_ids(ROWS).tolist()
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(
    ("said", "settings", "reason"),
    [
        ("400", {}, "has 400 rows, and none is 400"),
        ("two words", {}, r"'two words' is \d+ tokens; give one token"),
        ("7", {"final_logit_softcapping": 30.0}, "changes its logits after the head"),
        ("7", {"tie_word_embeddings": False}, "holds no head of a language model to take rows of"),
    ],
)
def test_rows_that_cannot_be_taken(
    said: str, settings: dict[str, Any], reason: str, tmp_path: Path, tokenizer: Any
) -> None:
    foreign.language_model(tmp_path / "lm", **settings)
    tokenizer.save_pretrained(tmp_path / "lm")
    if "tie_word_embeddings" in settings:  # the body alone
        make_network("llama").model.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=reason):
        convert(tmp_path / "lm", tmp_path / "rm", head_rows=said)


def test_several_outputs_with_names_and_weights(tmp_path: Path, tokenizer: Any) -> None:
    network = make_network("llama", num_labels=3)
    network.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises(CheckpointError, match=r"3 outputs.*--heads name=weight"):
        from_pretrained(tmp_path / "rm")
    with pytest.raises(CheckpointError, match="3 outputs, and 2 have names"):
        convert(tmp_path / "rm", tmp_path / "out", heads="a=1,b=2")
    said = "helpful=0.65,correct=0.8,verbose=-0.4"
    convert(tmp_path / "rm", tmp_path / "out", heads=said)
    with torch.inference_mode():
        own = torch.cat([network(input_ids=torch.tensor([row])).logits for row in ROWS])
    weights = torch.tensor([0.65, 0.8, -0.4])
    scorer = from_pretrained(tmp_path / "out")
    found = scorer.score_ids(ROWS).tolist()
    assert found == pytest.approx((own @ weights).tolist(), abs=1e-5, rel=1e-5)
    assert scorer.contract.heads == ["helpful", "correct", "verbose"]
    [group] = scorer.score([Group(prompt_ids=[5], completion_ids=[[6, 7]])])
    assert group.named_rewards is not None
    assert list(group.named_rewards) == ["helpful", "correct", "verbose"]
    combined = weighted_sum(group.named_rewards, {"helpful": 0.65, "correct": 0.8, "verbose": -0.4})
    assert group.rewards == pytest.approx(combined.tolist(), abs=1e-5)
    again = shutil.copytree(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ValueError, match="has weights for its heads"):
        RewardScorer.from_pretrained([tmp_path / "out", again], "cpu")


@pytest.mark.parametrize("said", ["a=1,b", "a=x", "a=1,,b=2", "a=1,b=nan", "a=1,a=2"])
def test_heads_that_cannot_be_meant(said: str, tmp_path: Path, tokenizer: Any) -> None:
    make_network("llama", num_labels=2).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises((ValueError, ContractError), match="heads"):
        convert(tmp_path / "rm", tmp_path / "out", heads=said)
    assert not (tmp_path / "out").exists()


def test_nothing_is_guessed_between_layers(tmp_path: Path, tokenizer: Any) -> None:
    own = foreign.layered(tmp_path / "rm", "SomethingElse", "llama")
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises(CheckpointError, match=r"2 layers \(score\.0, score\.2\).*head_activation"):
        from_pretrained(tmp_path / "rm")
    path = tmp_path / "rm" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"head_activation": "swish"}))
    with pytest.raises(CheckpointError, match="'swish'; it must be one of relu"):
        from_pretrained(tmp_path / "rm")
    path.write_text(json.dumps(config | {"head_activation": "relu"}))
    found = from_pretrained(tmp_path / "rm").score_ids(ROWS).tolist()
    assert found == pytest.approx(scores(own), abs=1e-5, rel=1e-5)


def test_the_models_own_code_says_what_stands_between_layers(
    tmp_path: Path, tokenizer: Any
) -> None:
    own = foreign.layered_code(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises(CheckpointError, match="needs Python code of its own"):
        from_pretrained(tmp_path / "rm")
    scorer = from_pretrained(tmp_path / "rm", trust_remote_code=True)
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(scores(own), abs=1e-5, rel=1e-5)
    convert(tmp_path / "rm", tmp_path / "out", trust_remote_code=True)
    after = from_pretrained(tmp_path / "out").score_ids(ROWS).tolist()
    assert after == pytest.approx(scores(own), abs=1e-5, rel=1e-5)


def test_vllm_leaves_several_layers_to_the_forest(tmp_path: Path, tokenizer: Any) -> None:
    foreign.layered(tmp_path / "rm", "Qwen2ForRewardModel")
    tokenizer.save_pretrained(tmp_path / "rm")
    convert(tmp_path / "rm", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"a head of 2 layers.*engine forest"):
        check_supported(tmp_path / "out")


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_bitsandbytes_quantised(
    bits: int, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu"), "compute_in_own_dtype"
    # The reference, too, without the way that `compute_in_own_dtype` leaves out.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    make_network("llama").save_pretrained(tmp_path / "whole")
    settings = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=["score"]
    )
    network = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "whole", quantization_config=settings, dtype=torch.float32
    )
    network.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    with torch.inference_mode():
        own = [network(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    # Eight bits round what goes in, too, and its largest numbers by what stands beside them.
    tolerance = 1e-5 if bits == 4 else 5e-3
    scorer = from_pretrained(tmp_path / "rm")
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(own, abs=tolerance, rel=tolerance)
    monkeypatch.undo()
    contract = convert(tmp_path / "rm", tmp_path / "out")
    assert (contract.golden.tolerance["float32"] > 1e-5) == (bits == 8)
    again = from_pretrained(tmp_path / "out")
    assert again.score_ids(ROWS).tolist() == scorer.score_ids(ROWS).tolist()


def test_quantised_weights_with_a_bias_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    make_network("llama").save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    config["quantization_config"] = settings
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    path = tmp_path / "rm" / "model.safetensors"
    save_file({**load_file(path), "score.bias": torch.tensor([1.0])}, path)
    with pytest.raises(CheckpointError, match="called score, without a bias"):
        from_pretrained(tmp_path / "rm")


def test_a_quantised_head_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    foreign.layered(tmp_path / "rm", "Qwen2ForRewardModel", quantization_config={
        "quant_method": "bitsandbytes", "load_in_8bit": True,
    })  # fmt: skip
    path = tmp_path / "rm" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "score.0.weight": weights["score.0.weight"].to(torch.int8)}, path)
    with pytest.raises(CheckpointError, match=r'llm_int8_skip_modules=\["score"\]'):
        recognise(tmp_path / "rm")


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("visual.blocks.0.attn.qkv.weight", {}, r"a vision tower \(visual\.blocks"),
        ("x.weight", {"quantization_config": {"quant_method": "awq"}}, r"quantised weights \(awq"),
        ("x.weight", {"quantization_config": {"quant_method": "fp8"}}, r"quantised weights \(fp8"),
    ],
)
def test_what_is_not_read_is_named(
    name: str, config: dict[str, Any], reason: str, tmp_path: Path, tokenizer: Any
) -> None:
    foreign.layered(tmp_path / "rm", "Qwen2ForRewardModel", **config)
    path = tmp_path / "rm" / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(4, 4)}, path)
    with pytest.raises(CheckpointError, match=reason):
        recognise(tmp_path / "rm")


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"GGUF files are llama\.cpp's"):
        recognise(tmp_path)


def test_a_head_in_a_pickle_is_named(tmp_path: Path, tokenizer: Any) -> None:
    foreign.value_head(tmp_path / "rm", "file")
    (tmp_path / "rm" / "value_head.safetensors").rename(tmp_path / "rm" / "value_head.bin")
    with pytest.raises(CheckpointError, match=r"value_head\.bin, a pickle"):
        recognise(tmp_path / "rm")
