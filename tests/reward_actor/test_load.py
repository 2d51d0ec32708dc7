"""Reward-model directories: what loads, and what is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from reward_actor import Group, RewardScorer
from reward_actor.contract import ContractError, ScoringContract
from reward_actor.model.directory import CheckpointError
from reward_actor.model.load import load
from reward_actor.model.manifest import check_manifest, write_manifest

GROUP = Group("Name two fruits.", ["An apple and a pear.", "A hammer."])


@pytest.fixture
def copy(export_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export_dir, tmp_path / "copy"))


def change_weights(directory: Path, change: object) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)  # type: ignore[operator]
    save_file(weights, path, metadata={"format": "pt"})


def test_plain_transformers_gives_the_same_raw_scores(export_dir: Path) -> None:
    scorer = RewardScorer.from_pretrained(export_dir, "cpu")
    plain = AutoModelForSequenceClassification.from_pretrained(export_dir, dtype=torch.float32)
    assert plain.config.num_labels == 1
    assert plain.config.problem_type == "regression"
    [scores] = scorer.score([GROUP])
    for completion, expected in zip(GROUP.completions, scores.raw_scores, strict=True):
        ids = scorer.renderer.render("Name two fruits.", completion)
        with torch.inference_mode():
            assert plain(torch.tensor([ids])).logits.item() == pytest.approx(expected, abs=1e-5)


def test_the_version_is_a_function_of_the_directory(copy: Path, export_dir: Path) -> None:
    versions = {
        RewardScorer.from_pretrained(path, "cpu").model_version for path in (copy, export_dir)
    }
    assert len(versions) == 1
    assert versions.pop().startswith("sha256:")


def test_a_causal_model_without_a_head_is_refused(base_model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no trained reward head.*rayward train"):
        RewardScorer.from_pretrained(base_model)


def test_golden_samples_that_do_not_reproduce_are_refused(copy: Path) -> None:
    def shift(weights: dict[str, torch.Tensor]) -> None:
        weights["score.weight"] += 0.01

    change_weights(copy, shift)
    write_manifest(copy)  # the digests are right: only the scores give it away
    with pytest.raises(ContractError, match=r"golden sample 0 scores .* but the contract expects"):
        RewardScorer.from_pretrained(copy)


def test_another_tokenizer_is_refused(copy: Path) -> None:
    path = copy / "tokenizer.json"
    rules = json.loads(path.read_text())
    merges = rules["model"]["merges"]
    rules["model"]["merges"] = merges[: len(merges) // 2]
    path.write_text(json.dumps(rules))
    write_manifest(copy)
    with pytest.raises(ContractError, match="renders to other token ids"):
        RewardScorer.from_pretrained(copy)


def test_a_changed_file_is_noticed_by_its_digest(copy: Path) -> None:
    path = copy / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"model\.safetensors differs from its digest"):
        RewardScorer.from_pretrained(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is in MANIFEST\.json"):
        RewardScorer.from_pretrained(copy)


def test_a_copy_may_lack_files_about_the_model_but_not_have_others(copy: Path) -> None:
    for name in ("README.md", "report.html"):
        (copy / name).write_text(name)
    write_manifest(copy, optional=["README.md", "report.html"])
    (copy / "report.html").unlink()
    check_manifest(copy)
    (copy / "README.md").write_text("another")
    with pytest.raises(CheckpointError, match=r"README\.md differs from its digest"):
        check_manifest(copy)


def test_truncated_weights_are_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        RewardScorer.from_pretrained(copy)


def test_weights_that_do_not_fit_the_network_are_refused(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.pop("model.norm.weight"))
    write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        RewardScorer.from_pretrained(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        RewardScorer.from_pretrained(copy)


@pytest.mark.parametrize("name", ["nowhere", "parent"])
def test_what_is_no_model_is_refused_with_a_hint(copy: Path, name: str) -> None:
    parent = copy.parent / "parent"
    shutil.move(copy, parent / "export")
    with pytest.raises(CheckpointError, match="export/ folder"):
        RewardScorer.from_pretrained(copy.parent / name)


def test_a_foreign_directory_is_read_with_a_warning(copy: Path, export_dir: Path) -> None:
    (copy / "scoring_contract.json").unlink()
    (copy / "MANIFEST.json").unlink()
    with pytest.warns(UserWarning, match=r"no scoring_contract\.json"):
        foreign = RewardScorer.from_pretrained(copy, "cpu")
    # Nothing says any more that it was trained to the token that ends a turn, as ours are.
    ours = RewardScorer.from_pretrained(export_dir, "cpu")
    newline = foreign.renderer.tokenizer.encode("\n")
    rows = [[*ours.renderer.render(GROUP.prompt, text), *newline] for text in GROUP.completions]
    assert foreign.score([GROUP])[0].rewards == ours.score_ids(rows).tolist()
    assert foreign.model_version != ours.model_version


def test_an_encoder_with_a_pooler_of_its_own_is_refused(copy: Path) -> None:
    """Its head is linear, but it does not read the last token."""
    from transformers import BertConfig, BertForSequenceClassification

    (copy / "scoring_contract.json").unlink()
    (copy / "MANIFEST.json").unlink()
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, num_labels=1,
        )
    )  # fmt: skip
    torch.nn.init.constant_(bert.classifier.weight, 1.0)  # an untrained head says about nothing
    torch.nn.init.normal_(bert.bert.pooler.dense.weight, std=1.0)
    bert.save_pretrained(copy)
    with (
        pytest.warns(UserWarning, match="scoring_contract"),
        pytest.raises(CheckpointError, match="pools or attends in another way"),
    ):
        RewardScorer.from_pretrained(copy)


def test_the_noise_of_half_precision_is_no_other_pooling(copy: Path) -> None:
    """A training was lost at its export to this: the terms of its head were large and cancelled,
    and the check compared a padded row with one that is not, here -80 with 16."""
    for name in ("scoring_contract.json", "MANIFEST.json"):
        (copy / name).unlink()
    network = AutoModelForSequenceClassification.from_pretrained(copy, dtype=torch.bfloat16)
    with torch.inference_mode():
        backbone = network.get_decoder()
        hidden = backbone(torch.arange(5, 14)[None]).last_hidden_state[0, -1].double()
    head = torch.randn(len(hidden), generator=torch.Generator().manual_seed(0)).double()
    head = 3e3 * (head - hidden * (head @ hidden) / (hidden @ hidden))
    change_weights(copy, lambda weights: weights.update({"score.weight": head[None].float()}))
    with pytest.warns(UserWarning, match="scoring_contract"):
        assert load(copy, dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_a_contract_that_proves_nothing_is_no_proof(
    num_outputs: int, export_dir: Path, tmp_path: Path
) -> None:
    """Without golden samples the network must score as we do, however many outputs it has."""
    from transformers import BertConfig, BertForSequenceClassification

    directory = Path(shutil.copytree(export_dir, tmp_path / "foreign"))
    (directory / "MANIFEST.json").unlink()
    contract = json.loads((directory / "scoring_contract.json").read_text())
    contract |= {"golden": None, "heads": ["a", "b"][:num_outputs]}
    (directory / "scoring_contract.json").write_text(json.dumps(contract))
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, num_labels=num_outputs,
        )
    )  # fmt: skip
    torch.nn.init.normal_(bert.classifier.weight, std=1.0)
    torch.nn.init.normal_(bert.bert.pooler.dense.weight, std=1.0)
    bert.save_pretrained(directory)
    with pytest.raises(CheckpointError, match="pools or attends in another way"):
        RewardScorer.from_pretrained(directory)


def test_two_outputs_are_refused(copy: Path) -> None:
    def widen(weights: dict[str, torch.Tensor]) -> None:
        weights["score.weight"] = weights["score.weight"].repeat(2, 1)

    change_weights(copy, widen)
    config = json.loads((copy / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b"}
    config["label2id"] = {"a": 0, "b": 1}
    (copy / "config.json").write_text(json.dumps(config))
    write_manifest(copy)
    with pytest.raises(CheckpointError, match="2 outputs"):
        RewardScorer.from_pretrained(copy)


def test_a_contract_that_is_not_json_is_refused(copy: Path) -> None:
    (copy / "scoring_contract.json").write_text("{")
    with pytest.raises(ContractError, match="is not JSON"):
        ScoringContract.load(copy)


def test_weights_that_are_not_finite_are_never_exported(base_model: Path, tmp_path: Path) -> None:
    from reward_actor.export import export
    from reward_actor.model.inferred import contract_for
    from reward_actor.model.tokenizer import load_tokenizer

    network = AutoModelForSequenceClassification.from_pretrained(
        base_model, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.constant_(network.score.weight, float("nan"))
    tokenizer = load_tokenizer(base_model)
    contract = contract_for(tokenizer, network.config, format="chat")
    with pytest.raises(ValueError, match="not finite"):
        export(
            tmp_path / "export",
            network.config,
            network,
            network.state_dict(),
            tokenizer,
            contract,
            {},
            "cpu",
        )
    assert not (tmp_path / "export").exists()
