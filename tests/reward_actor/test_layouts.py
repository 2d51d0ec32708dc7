"""Reward models of every layout in use load, and score as their own system scores them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from exports import from_pretrained
from families import SOME_FAMILIES, make_network
from foreign import ROWS, scores
from safetensors.torch import load_file, save_file

from reward_actor.contract import ContractError
from reward_actor.model.directory import CheckpointError
from reward_actor.model.layouts import recognise
from reward_actor.model.load import load

pytestmark = pytest.mark.filterwarnings("ignore:.*has no scoring_contract.json:UserWarning")


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_sequence_classifiers_of_transformers(family: str, tmp_path: Path, tokenizer: Any) -> None:
    network = make_network(family)
    network.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    assert recognise(tmp_path / "hf").kind == "hf"
    with torch.inference_mode():
        own = [network(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    scorer = from_pretrained(tmp_path / "hf")
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(own, abs=1e-5, rel=1e-5)


def test_a_head_named_classifier(tmp_path: Path, tokenizer: Any) -> None:
    """The weights' name counts, whatever `transformers` calls the head of that class."""
    directory = tmp_path / "hf"
    directory.mkdir()
    network = make_network("llama")
    foreign.write_weights(directory, network, "classifier")
    foreign.write_config(directory, network, architectures=["LlamaForSequenceClassification"])
    tokenizer.save_pretrained(directory)
    with torch.inference_mode():
        own = [network(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    assert from_pretrained(directory).score_ids(ROWS).tolist() == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt2", "opt"])
@pytest.mark.parametrize("head", ["score", "value_head", "a_head"])
def test_openrlhf(family: str, head: str, tmp_path: Path, tokenizer: Any) -> None:
    directory = tmp_path / "openrlhf"
    own = foreign.openrlhf(directory, family, head, architectures=["RewardModel"])
    tokenizer.save_pretrained(directory)
    assert recognise(directory).kind == "openrlhf"
    scorer = from_pretrained(directory)
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(scores(own), abs=1e-5, rel=1e-5)
    assert (scorer.contract.mean, scorer.contract.std) == (-0.577, 1.7)


def test_openrlhf_texts_end_with_eos(tmp_path: Path, tokenizer: Any) -> None:
    foreign.openrlhf(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    scorer = from_pretrained(tmp_path / "rm")
    ids = scorer.renderer.render("Name two fruits.", "An apple.")
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 2  # the user's turn and the completion's
    assert not scorer.contract.add_special_tokens


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"], "value_head_prefix": None},
        {"architectures": ["RewardModel"], "value_head_prefix": None, "normalize_reward": None},
    ],
)
def test_openrlhf_as_older_versions_saved_it(
    changes: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    own = foreign.openrlhf(tmp_path / "rm", **changes)
    tokenizer.save_pretrained(tmp_path / "rm")
    assert from_pretrained(tmp_path / "rm").score_ids(ROWS).tolist() == pytest.approx(
        scores(own), abs=1e-5
    )


def test_openrlhf_without_mean_and_std_is_not_normalised(tmp_path: Path, tokenizer: Any) -> None:
    own = foreign.openrlhf(tmp_path / "rm", normalisation=None)
    tokenizer.save_pretrained(tmp_path / "rm")
    scorer = from_pretrained(tmp_path / "rm")
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(scores(own), abs=1e-5)
    assert (scorer.contract.mean, scorer.contract.std) == (0.0, 1.0)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), "1"])
def test_a_std_that_cannot_normalise_is_refused(std: Any, tmp_path: Path, tokenizer: Any) -> None:
    foreign.openrlhf(tmp_path / "rm", std=1.0, normalisation=(0.0, std))
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises((CheckpointError, ContractError), match="std is"):
        from_pretrained(tmp_path / "rm")


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("bias", [None, 0.7])
@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_models_with_their_own_code(
    family: str, bias: float | None, auto: str, tmp_path: Path, tokenizer: Any
) -> None:
    directory = tmp_path / "own"
    name = f"modeling_reward.{family.title()}RewardModel"
    own = foreign.remote_code(directory, family, bias, auto_map={auto: name})
    tokenizer.save_pretrained(directory)
    assert recognise(directory).kind == "remote_code"
    scorer = from_pretrained(directory, trust_remote_code=True)
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(scores(own), abs=1e-5)


def test_own_code_is_not_run_unless_allowed(tmp_path: Path, tokenizer: Any) -> None:
    directory = tmp_path / "own"
    foreign.remote_code(directory)
    tokenizer.save_pretrained(directory)
    witness = tmp_path / "witness"
    code = directory / "modeling_reward.py"
    code.write_text(f"open({str(witness)!r}, 'w').write('ran')\n" + code.read_text())
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        from_pretrained(directory)
    assert not witness.exists()
    from_pretrained(directory, trust_remote_code=True)
    assert witness.exists()


def test_code_in_another_repository_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    directory = tmp_path / "own"
    auto_map = {"AutoModel": "someone/code--modeling_reward.LlamaRewardModel"}
    foreign.remote_code(directory, auto_map=auto_map)
    tokenizer.save_pretrained(directory)
    with pytest.raises(CheckpointError, match="from another repository"):
        from_pretrained(directory, trust_remote_code=True)


def test_code_that_transformers_has_had_since_is_not_needed(tmp_path: Path, tokenizer: Any) -> None:
    directory = tmp_path / "hf"
    network = make_network("phi3")
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_phi3.py").write_text("raise RuntimeError('ran')")
    assert len(from_pretrained(directory).score_ids(ROWS)) == len(ROWS)


def test_own_code_that_normalises(tmp_path: Path, tokenizer: Any) -> None:
    """Buffers that are filled in __init__ and not saved come back unset; config.json counts."""
    directory = tmp_path / "own"
    own = foreign.remote_code(directory, mean=-0.577, std=1.7, normalize_reward=True)
    tokenizer.save_pretrained(directory)
    code = directory / "modeling_reward.py"
    changed = code.read_text().replace(
        "        self.post_init()",
        '        self.register_buffer("mean", torch.tensor([config.mean]), persistent=False)\n'
        '        self.register_buffer("std", torch.tensor([config.std]), persistent=False)\n'
        "        self.post_init()",
    )
    code.write_text(
        changed.replace("values.gather(1, last)", "(values.gather(1, last) - self.mean) / self.std")
    )
    scorer = from_pretrained(directory, trust_remote_code=True)
    expected = [(raw + 0.577) / 1.7 for raw in scores(own)]
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(expected, abs=1e-5)


def test_own_code_that_does_more_than_its_head_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    directory = tmp_path / "own"
    foreign.remote_code(directory)
    tokenizer.save_pretrained(directory)
    code = directory / "modeling_reward.py"
    code.write_text(code.read_text().replace("values.gather(1, last)", "values.mean(1)"))
    with pytest.raises(CheckpointError, match="does more than this version knows"):
        from_pretrained(directory, trust_remote_code=True)


def test_adapters_are_merged(tmp_path: Path, tokenizer: Any) -> None:
    own = foreign.peft_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer)
    layout = recognise(tmp_path / "adapter")
    assert (layout.kind, layout.base, layout.head.name) == ("peft", tmp_path / "base", "score")
    scorer = from_pretrained(tmp_path / "adapter")
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(scores(own), abs=1e-5, rel=1e-5)
    before = scorer.model_version
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] *= 2
    save_file(weights, path, metadata={"format": "pt"})
    assert from_pretrained(tmp_path / "adapter").model_version != before  # the base decides, too


def test_an_adapter_whose_base_has_the_head(tmp_path: Path, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    network = make_network("qwen2")
    network.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    network.config._name_or_path = network.name_or_path = "../base"
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        own = [adapted(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    scorer = from_pretrained(tmp_path / "adapter")
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(own, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("how", ["modules_to_save", "added tokens", "trained rows"])
def test_adapters_bring_embeddings_of_their_own(how: str, tmp_path: Path, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_network("llama")
    causal = AutoModelForCausalLM.from_config(base.config)
    causal.model.load_state_dict(base.model.state_dict())
    causal.save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"modules_to_save": ["score"]}
    rows = ROWS
    if how == "trained rows":
        settings["trainable_token_indices"] = [5, 9, 11]
    else:
        settings["modules_to_save"] = ["score", "embed_tokens"]
    if how == "added tokens":
        base.resize_token_embeddings(base.config.vocab_size + 3, mean_resizing=False)
        rows = [*ROWS, [5, 402, 9, 401]]
    base.config._name_or_path = base.name_or_path = "../base"
    lora = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], **settings)
    torch.manual_seed(1)
    adapted = get_peft_model(base, lora)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        own = [adapted(input_ids=torch.tensor([row])).logits.item() for row in rows]
    scorer = from_pretrained(tmp_path / "adapter")
    assert scorer.score_ids(rows).tolist() == pytest.approx(own, abs=1e-5, rel=1e-5)


def edit_adapter(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_wrong_with_an_adapter_is_said(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    foreign.peft_adapter(adapter, tmp_path / "base", tokenizer)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(CheckpointError, match=re.escape('pip install "rayward[peft]"')):
            from_pretrained(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    head = weights.pop("base_model.model.score.weight")
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no trained reward head"):
        from_pretrained(adapter)
    weights["base_model.model.score.weight"] = head
    weights.pop(next(name for name in weights if "lora_A" in name))
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        from_pretrained(adapter)
    edit_adapter(adapter, base_model_name_or_path="meta-llama/Llama-3.1-8B")
    with pytest.raises(CheckpointError, match="is not a directory here"):
        from_pretrained(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        from_pretrained(adapter)


@pytest.mark.parametrize("body", ["rwtranrsformer", "rwtransformer"])
def test_deepspeed_chat_is_left_to_convert(body: str, tmp_path: Path, tokenizer: Any) -> None:
    foreign.deepspeed_chat(tmp_path / "rm", body=body)
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises(CheckpointError, match=r"DeepSpeed-Chat.*rayward convert .*/rm DST"):
        from_pretrained(tmp_path / "rm")


def test_a_directory_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    foreign.openrlhf(tmp_path / "rm")
    with pytest.raises(CheckpointError, match="--tokenizer-from DIR"):
        from_pretrained(tmp_path / "rm")


def test_heads_that_are_unclear_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    foreign.openrlhf(tmp_path / "rm", value_head_prefix=None)
    tokenizer.save_pretrained(tmp_path / "rm")
    path = tmp_path / "rm" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "score.weight": weights["value_head.weight"] + 1}, path)
    with pytest.raises(CheckpointError, match=r"several heads \(score, value_head\)"):
        load(tmp_path / "rm")
    save_file({**weights, "value_head.norm.weight": torch.ones(64)}, path)
    with pytest.raises(CheckpointError, match=r"linear layers alone .*value_head\.norm\.weight"):
        load(tmp_path / "rm")


def test_weights_that_nothing_reads_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    foreign.openrlhf(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    path = tmp_path / "rm" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, path)
    with pytest.raises(CheckpointError, match=r"knows nothing of: .*q_proj\.bias"):
        load(tmp_path / "rm")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_names_of_wrappers_do_not_matter(prefix: str, tmp_path: Path, tokenizer: Any) -> None:
    own = foreign.openrlhf(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    path = tmp_path / "rm" / "model.safetensors"
    save_file({prefix + name: weight for name, weight in load_file(path).items()}, path)
    scorer = from_pretrained(tmp_path / "rm")
    assert scorer.score_ids(ROWS).tolist() == pytest.approx(scores(own), abs=1e-5, rel=1e-5)


def edited(directory: Path, change: Any, **config: Any) -> Path:
    """A plain sequence classifier whose weights went through `change`."""
    make_network("llama").save_pretrained(directory)
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, **config}))
    return directory


def empty(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: w if "norm" in name else torch.empty(0) for name, w in weights.items()}


def gated(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights.pop("score.weight")
    other = {"regression_layer.weight": torch.ones(19, 64), "gating.0.weight": torch.ones(8, 64)}
    return {**weights, **other}


def not_a_number(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights["score.weight"][0, 3] = float("nan")
    return weights


def large(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (w * 3e4 if "layers.1.mlp.down" in name else w).half() for name, w in weights.items()
    }


def same(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (empty, {}, r"weights of size 0 \(model\.embed_tokens\.weight.*ZeRO-3.*zero_to_fp32"),
        (gated, {"architectures": ["LlamaWithGating"]},
         r"LlamaWithGating with gating\.0\.weight, regression_layer\.weight"),
        (not_a_number, {}, r"not finite \(NaN or infinity, in score\.weight\)"),
        (large, {"dtype": "float16"}, "float16.*overflow"),
        (same, {"vocab_size": 401}, r"embed_tokens\.weight has shape \[400, 64\].*asks for \[401"),
        (same, {"quantization_config": {"quant_method": "gptq"}}, r"quantised weights \(gptq"),
    ],
)  # fmt: skip
def test_a_refusal_is_true(
    change: Any, config: Any, reason: str, tmp_path: Path, tokenizer: Any
) -> None:
    directory = edited(tmp_path / "rm", change, **config)
    tokenizer.save_pretrained(directory)
    with pytest.raises(ValueError, match=reason):
        from_pretrained(directory)


def test_chat_templates_that_all_have_names_are_listed(tmp_path: Path, tokenizer: Any) -> None:
    directory = edited(tmp_path / "rm", same)
    tokenizer.chat_template = {"rag": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(directory)
    with pytest.raises(ValueError, match=r"only chat templates with names \(rag, tool_use\)"):
        from_pretrained(directory)
    tokenizer.chat_template = {**tokenizer.chat_template, "default": tokenizer.chat_template["rag"]}
    tokenizer.save_pretrained(directory)
    assert from_pretrained(directory).contract.format == "chat"


def test_an_index_cannot_reach_outside_its_directory(tmp_path: Path, tokenizer: Any) -> None:
    foreign.openrlhf(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    index = {"weight_map": {"value_head.weight": "../elsewhere.safetensors"}}
    (tmp_path / "rm" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its directory"):
        load(tmp_path / "rm")
