"""Several reward models as one: which they are, whether they render alike, how they are read.

An ensemble is a directory with `ensemble.json` and no weights of its own:
  {"members": ["../seed-0/export", "../seed-1/export"], "combine": "min", "k": 1.0}
A member's path is relative to the directory, or absolute.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from reward_actor.contract import (
    Combine,
    Golden,
    Rendering,
    ScoringContract,
    check_rule,
    sha256_text,
)
from reward_actor.json_files import json_object
from reward_actor.model.directory import CheckpointError
from reward_actor.model.load import LoadedModel, check_directory, load_contract
from reward_actor.model.tokenizer import load_tokenizer, tokenizer_fingerprint
from reward_actor.readout import Readout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENSEMBLE_FILE = "ensemble.json"

# What turns text into ids; of the two that can be long, no value is shown.
_RENDERING = (
    "format",
    "chat_template",
    "template_date",
    *(field.name for field in fields(Rendering)),
    "eos_token_id",
    "tokenizer",
)
_LONG = ("chat_template", "tokenizer")


@dataclass(frozen=True)
class Ensemble:
    """The directories of at least two reward models, and the rule that makes their rewards one.

    Raises ValueError for a rule that is not known, and for members that are no directories, are
    ensembles themselves or are named twice.
    """

    members: tuple[Path, ...]
    combine: Combine = "mean"
    k: float = 1.0

    def __post_init__(self) -> None:
        check_rule(self.combine, self.k)
        if len(self.members) < 2:
            raise ValueError(f"an ensemble of {len(self.members)}; it needs at least two members")
        places = [path.resolve() for path in self.members]
        for path in self.members:
            if not path.is_dir():
                raise ValueError(f"member {path} is not a directory; name a reward model's")
            if (path / ENSEMBLE_FILE).exists():
                raise ValueError(f"member {path} is an ensemble itself; name its members instead")
            if places.count(path.resolve()) > 1:
                raise ValueError(f"member {path} is named twice and would count twice")

    @classmethod
    def load(cls, directory: Path) -> Ensemble | None:
        """That of a directory, its paths completed; None where there is none.

        Raises CheckpointError for a file that cannot be read or that may not say what it says.
        """
        path = directory / ENSEMBLE_FILE
        if not path.exists():
            return None
        data = json_object(path, CheckpointError)
        unknown = data.keys() - {"members", "combine", "k"}
        if unknown:
            raise CheckpointError(f"{path}: unknown key {min(unknown)!r}")
        members = data.get("members")
        if not isinstance(members, list) or not all(isinstance(m, str) and m for m in members):
            raise CheckpointError(f"{path}: members must be a list of directories")
        try:
            places = tuple(directory / Path(member).expanduser() for member in members)
            return cls(places, data.get("combine", "mean"), data.get("k", 1.0))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def save(self, directory: Path) -> None:
        """Write `ensemble.json`. A member that was given by a relative path stays relative."""
        place = directory.resolve()
        members = [
            str(path) if path.is_absolute() else os.path.relpath(os.path.abspath(path), place)
            for path in self.members
        ]
        text = json.dumps({"members": members, "combine": self.combine, "k": self.k}, indent=2)
        (directory / ENSEMBLE_FILE).write_text(text + "\n", encoding="utf-8")


def write_ensemble(
    directory: str | Path, members: Sequence[str | Path], combine: str = "mean", k: float = 1.0
) -> Readout:
    """Make `directory` an ensemble, once its members are known to be reward models that render
    alike; no weights are loaded.

    Raises CheckpointError or ValueError, and then writes nothing.
    """
    place = Path(directory).expanduser()
    for name in ("config.json", ENSEMBLE_FILE):
        if (place / name).exists():
            raise ValueError(
                f"{place} holds {name} already; give a directory of the ensemble's own"
            )
    paths = tuple(Path(member).expanduser() for member in members)
    ensemble = Ensemble(paths, cast("Combine", combine), k)
    contracts = [load_contract(check_directory(path)) for path in paths]
    shared_contract(paths, contracts, [load_tokenizer(path) for path in paths])
    place.mkdir(parents=True, exist_ok=True)
    ensemble.save(place)
    return ensemble_readout(paths, contracts, ensemble.combine, k)


def model_directories(path: str | Path) -> tuple[Path, ...]:
    """The directories that hold the weights behind `path`: an ensemble's members, or itself.

    Raises CheckpointError unless each holds a trained reward model.
    """
    directory = Path(path).expanduser()
    ensemble = Ensemble.load(directory)
    members = (directory,) if ensemble is None else ensemble.members
    return tuple(check_directory(member) for member in members)


def shared_contract(
    paths: Sequence[Path],
    contracts: Sequence[ScoringContract],
    tokenizers: Sequence[PreTrainedTokenizerFast],
) -> ScoringContract:
    """The contract to render under, so that one stream of ids serves every member.

    The first member's, with the smallest `max_length` and `vocab_size` of all, and without golden
    samples and held-out scores: those are each member's own. That of a single model comes back as
    it is. Raises ValueError naming the member and the field in which it renders otherwise than the
    first.
    """
    if len(contracts) == 1:
        return contracts[0]
    first = _rendering(contracts[0], tokenizers[0])
    for path, contract, tokenizer in zip(paths, contracts, tokenizers, strict=True):
        theirs = _rendering(contract, tokenizer)
        for name in _RENDERING:
            if theirs[name] == first[name]:
                continue
            values = f" ({theirs[name]!r} against {first[name]!r})" if name not in _LONG else ""
            raise ValueError(
                f"member {path}: its {name} differs from that of {paths[0]}{values}. The members "
                "of an ensemble must render alike, so that they score the same token ids"
            )
    return replace(
        contracts[0],
        max_length=min(contract.max_length for contract in contracts),
        vocab_size=min(contract.vocab_size for contract in contracts),
        golden=Golden(),
        held_out=None,
    )


def _rendering(contract: ScoringContract, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    found = {name: getattr(contract, name) for name in _RENDERING if name != "tokenizer"}
    if not contract.append_eos:  # then no text gets one
        found["eos_token_id"] = None
    return {**found, "tokenizer": tokenizer_fingerprint(tokenizer, contract)}


def ensemble_readout(
    paths: Sequence[Path], contracts: Sequence[ScoringContract], combine: Combine, k: float
) -> Readout:
    """How the heads of several models are read; a single model's is its contract's own."""
    if len(contracts) == 1:
        return Readout.of(contracts[0])
    names, means, stds = [], [], []
    weighted = [path for path, c in zip(paths, contracts, strict=True) if c.head_weights]
    if weighted:
        raise ValueError(
            f"member {weighted[0]} has weights for its heads; an ensemble combines its members by "
            "one rule, so it takes models without"
        )
    for label, contract in zip(_labels(paths), contracts, strict=True):
        for head in contract.heads:
            names.append(label if len(contract.heads) == 1 else f"{label}/{head}")
            stds.append(contract.std)
        means += contract.head_means or [contract.mean] * len(contract.heads)
    return Readout(names, means, stds, combine, k)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The paths' shortest ends that tell them apart: seed-0/export, seed-1/export."""
    parts = [path.resolve().parts for path in paths]
    labels: list[str] = []
    for depth in range(1, max(len(p) for p in parts) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def ensemble_version(members: Sequence[LoadedModel], combine: Combine, k: float) -> str:
    """sha256 over the members' versions, in order, and the rule; a single model's is its own."""
    versions = [member.version for member in members]
    if len(versions) == 1:
        return versions[0]
    rule = {"members": versions, "combine": combine, "k": float(k)}
    return f"sha256:{sha256_text(json.dumps(rule, sort_keys=True))}"
