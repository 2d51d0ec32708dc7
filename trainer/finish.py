"""What follows the last step: the held-out evaluation and the export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed as dist
from transformers import AutoModelForSequenceClassification

from reward_actor import checkpoint
from reward_actor.contract import ScoringContract
from trainer import resume, zero
from trainer.batches import micro_batches
from trainer.card import model_card
from trainer.config import TrainConfig
from trainer.evaluate import summarise
from trainer.network import base_config
from trainer.pairs import PairSet
from trainer.training_log import LOG_FILE

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

EXPORT_DIR = "export"
RESULT_FILE = "result.json"


def evaluate(
    engine: DeepSpeedEngine, config: TrainConfig, heldout: PairSet
) -> dict[str, float | int]:
    """`heldout_*` metrics over the pairs of all workers, exact; empty without held-out pairs."""
    if not len(heldout):
        return {}
    # Each worker fills in its pairs and leaves zeros elsewhere, so a sum puts the parts together.
    scores = torch.zeros(2, len(heldout), device=engine.device)
    passes = micro_batches(
        range(len(heldout)),
        heldout.lengths,
        config.training.micro_batch_pairs,
        dist.get_rank(),
        dist.get_world_size(),
    )
    engine.eval()
    with torch.no_grad():
        for mine in passes:
            rows = [heldout.chosen(i) for i in mine] + [heldout.rejected(i) for i in mine]
            scores[:, mine] = zero.forward(engine, rows or [[0]])[: len(rows)].view(2, -1)
    dist.all_reduce(scores)
    chosen, rejected = scores.cpu().numpy().astype(np.float32)
    return {f"heldout_{key}": value for key, value in asdict(summarise(chosen, rejected)).items()}


def export(
    engine: DeepSpeedEngine,
    config: TrainConfig,
    contract: ScoringContract,
    facts: Mapping[str, Any],
) -> None:
    """Write `output_dir/export` on rank 0, and the result that says the run is finished.

    Called on every worker; the engine is used up.
    """
    weights = zero.whole_weights(engine)
    zero.release(engine)
    if dist.get_rank() != 0:
        return
    output_dir = Path(config.output_dir)
    network_config = base_config(config.model.directory)
    network_config.dtype = getattr(torch, config.model.dtype)
    with torch.device("meta"):  # only its class and configuration are needed beside the weights
        network = AutoModelForSequenceClassification.from_config(network_config)
    checkpoint.export(
        output_dir / EXPORT_DIR,
        network_config,
        network,
        weights,
        checkpoint.load_tokenizer(Path(config.model.directory)),
        contract,
        files={
            "resolved_config.json": config.model_dump_json(indent=2) + "\n",
            LOG_FILE: output_dir / LOG_FILE,
            "README.md": model_card(config, contract, facts),
        },
    )
    resume.replace_text(output_dir / RESULT_FILE, json.dumps(dict(facts), indent=2) + "\n")
