"""What is trained decides the settings that are not given."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from trainer import presets, run
from trainer.__main__ import main
from trainer.config.config_file import load_config
from trainer.config.train import TrainConfig
from trainer.errors import TrainingError

SIZES = {
    "quickstart": (64, 2),
    "qwen3-0.6b": (1024, 28),
    "llama-8b": (4096, 32),
}


@pytest.mark.parametrize(("preset", "size"), SIZES.items())
def test_the_size_of_the_network_decides(
    tmp_path: Path, preset: str, size: tuple[int, int]
) -> None:
    width, depth = size
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=8,
    )
    config.save_pretrained(tmp_path)
    assert presets.preset_for(str(tmp_path), has_adapter=False).preset == preset
    assert presets.preset_for(str(tmp_path), has_adapter=True).preset == "llama-8b-lora"


def test_without_a_config_the_settings_are_those_of_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[TrainConfig] = []

    def train(config: TrainConfig) -> None:
        trained.append(config)
        raise TrainingError("not wanted")

    monkeypatch.setattr(run, "train", train)
    given = [("data.train", str(tmp_path / "pairs.jsonl")), ("training.seed", "3")]
    assert main([word for key, value in given for word in (f"--{key}", value)]) == 1
    assert trained == [load_config("quickstart", given)]
    assert "settings of --config quickstart, for a network from scratch" in capsys.readouterr().out


def test_a_model_that_cannot_be_loaded_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.path: /nowhere cannot be loaded"):
        presets.preset_for("/nowhere", has_adapter=False)
