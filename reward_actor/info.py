"""What a scorer says of itself: `schema.ModelInfo`, the same behind a service and in an actor."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from reward_actor import schema
from reward_actor.json_files import json_object
from reward_actor.model.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from reward_actor.contract import ScoringContract
    from reward_actor.readout import Readout
    from reward_actor.render import Renderer


class Described(Protocol):
    """What `model_info` reads of a scorer; `RewardScorer` is one, `VllmScorer` another."""

    contract: ScoringContract
    readout: Readout
    renderer: Renderer
    model_version: str

    @property
    def dtype(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def fallback_reason(self) -> str | None: ...


def model_name(directory: str | Path) -> str:
    """What a directory's model is called: as its training's `report.run_name` says, or like its
    folder, which of RUN/export is RUN. Raises ValueError for settings that are no JSON object."""
    place = Path(directory).expanduser().resolve()
    settings = place / "resolved_config.json"
    report = json_object(settings).get("report") if settings.is_file() else None
    named = report.get("run_name") if isinstance(report, dict) else None
    return str(named or (place.parent if place.name == "export" else place).name or "model")


def model_info(scorer: Described) -> schema.ModelInfo:
    """Takes a while: the tokenizer is tried on texts."""
    contract, readout = scorer.contract, scorer.readout
    versions = {name: version(name) for name in ("ray", "torch", "transformers")}
    if scorer.path == "vllm":
        import vllm  # its distribution has another name on a CPU

        versions["vllm"] = vllm.__version__
    return schema.ModelInfo(
        model_version=scorer.model_version,
        dtype=scorer.dtype,
        path=scorer.path,
        fallback_reason=scorer.fallback_reason,
        format=contract.format,
        tokenizer_fingerprint=tokenizer_fingerprint(scorer.renderer.tokenizer, contract),
        template_date=contract.template_date,
        normalisation=readout.normalisation,
        versions=versions,
        rendering=contract.rendering,
        ensemble=readout if readout.is_ensemble else None,
    )
