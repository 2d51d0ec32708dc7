"""What follows the last step: the held-out evaluation, the report and the export."""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed as dist
from transformers import AutoModelForSequenceClassification

from reward_actor.atomic import replace_text
from reward_actor.contract import NUM_QUANTILES, HeldOut, ScoringContract
from reward_actor.export import export
from reward_actor.model.tokenizer import load_tokenizer
from reward_actor.readout import Readout
from trainer.checkpoints.run_directory import EXPORT_DIR, RESULT_FILE
from trainer.errors import TrainingError
from trainer.evaluation.metrics import compare_with_baselines, folded, measure
from trainer.job import RunFacts
from trainer.log import EVALUATIONS_FILE, LOG_FILE, read_log
from trainer.network import adapters, zero
from trainer.network.base_config import base_config
from trainer.report.card import model_card
from trainer.report.page import write_report

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from trainer.config.train import TrainConfig
    from trainer.step import Stepper


def finish(
    trainer: Stepper,
    contract: ScoringContract,
    facts: RunFacts,
    baselines: Mapping[str, NDArray[np.float32]],
) -> dict[str, Any]:
    """Measure, normalise, export: what `result.json` says, on every worker. The engine is used up.

    Its metrics, `heldout_*`, are those of `rayward eval`: rewards as the export's contract
    normalises them, and raw scores under their own names.
    """
    config, output_dir = trainer.config, Path(trainer.config.output_dir)
    heldout, attributes = trainer.data.heldout, config.loss.attributes
    scores = trainer.score(heldout) if len(heldout) else np.zeros(0, np.float32)
    raw_scores = folded(scores, attributes)
    contract = replace(contract, held_out=held_out(raw_scores, heldout.lengths))
    if config.evaluation.normalise:
        contract = normalised(contract, raw_scores)
    rewards = Readout.of(contract).read(raw_scores[:, None]).rewards
    metrics = measure(heldout, scores, attributes, rewards)
    if baselines:
        compared = compare_with_baselines(heldout, rewards, baselines)
        metrics["baselines"] = {name: asdict(result) for name, result in compared.items()}
    result = {**asdict(facts), **{f"heldout_{key}": value for key, value in metrics.items()}}
    weights = zero.whole_weights(trainer.engine)
    zero.release(trainer.engine)
    if dist.get_rank() == 0:
        try:
            with tempfile.TemporaryDirectory(prefix="rayward-report-") as folder:
                files = _files(Path(folder), trainer, contract, facts, metrics, raw_scores, rewards)
                _export(config, contract, weights, files)
            replace_text(output_dir / RESULT_FILE, json.dumps(result, indent=2) + "\n")
        except OSError as error:  # another try by itself would find no more room
            raise TrainingError(
                f"the export failed: {error}. The same command resumes from the last checkpoint"
            ) from error
    return result


def normalised(contract: ScoringContract, raw_scores: NDArray[np.float32]) -> ScoringContract:
    """The contract under which these raw scores have mean 0 and standard deviation 1.

    Unchanged where that cannot be measured: with fewer than two scores, or equal ones.
    """
    wide = raw_scores.astype(np.float64)
    std = float(wide.std()) if len(wide) > 1 else 0.0
    return replace(contract, mean=float(wide.mean()), std=std) if std > 0 else contract


def held_out(raw_scores: NDArray[np.float32], num_tokens: NDArray[np.int64]) -> HeldOut | None:
    """How these raw scores (S,) of sequences with so many tokens are distributed.

    None where that cannot be said: there are none, or one is not finite.
    """
    if not len(raw_scores) or not np.isfinite(raw_scores).all():
        return None
    wide = raw_scores.astype(np.float64)
    quantiles = np.sort(np.quantile(wide, np.linspace(0.0, 1.0, NUM_QUANTILES)))
    varies = wide.std() > 0 and num_tokens.std() > 0
    correlation = float(np.corrcoef(wide, num_tokens)[0, 1]) if varies else None
    return HeldOut(quantiles.tolist(), correlation, len(wide))


def _files(
    folder: Path,
    trainer: Stepper,
    contract: ScoringContract,
    facts: RunFacts,
    metrics: Mapping[str, Any],
    raw_scores: NDArray[np.float32],
    rewards: NDArray[np.float64],
) -> dict[str, Path]:
    """The files about the model that go into its export: card, plots and report."""
    config, output_dir = trainer.config, Path(trainer.config.output_dir)
    tokenizer = load_tokenizer(Path(config.model.directory))
    names: list[str] = []
    try:
        names = write_report(
            folder,
            config=config,
            contract=contract,
            facts=facts,
            metrics=metrics,
            log=list(read_log(output_dir / LOG_FILE)),
            evaluations=list(read_log(output_dir / EVALUATIONS_FILE)),
            heldout=trainer.data.heldout,
            raw_scores=raw_scores,
            rewards=rewards,
            decode=lambda ids: str(tokenizer.decode(list(ids))),
        )
    except Exception:  # a plot must not cost anyone a trained model
        traceback.print_exc()
    card = model_card(config, contract, facts, metrics, names)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return {name: folder / name for name in ("README.md", *names)}


def _export(
    config: TrainConfig,
    contract: ScoringContract,
    weights: Mapping[str, Tensor],
    files: Mapping[str, Path],
) -> None:
    output_dir = Path(config.output_dir)
    network_config = base_config(config.model.directory)
    network_config.dtype = getattr(torch, config.model.dtype)
    with torch.device("meta"):  # only its class and configuration are needed beside the weights
        network = AutoModelForSequenceClassification.from_config(network_config)
    export(
        output_dir / EXPORT_DIR,
        network_config,
        network,
        adapters.exported(weights, config),
        load_tokenizer(Path(config.model.directory)),
        contract,
        files={
            "resolved_config.json": config.model_dump_json(indent=2) + "\n",
            LOG_FILE: output_dir / LOG_FILE,
            **files,
        },
    )
