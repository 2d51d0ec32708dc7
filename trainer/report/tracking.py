"""Weights & Biases, TensorBoard and MLflow, fed by the driver from the files of the run.

Workers know nothing of them. `trackers.json` in the run's directory says which runs of theirs it
is, and how far they are, so that a restarted training goes on in the same ones.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

import yaml

from reward_actor import terminal
from reward_actor.atomic import replace_text
from reward_actor.json_files import json_object
from trainer.config.train import ReportConfig, TrainConfig
from trainer.report import describe
from trainer.report.progress import Line

STATE_FILE = "trackers.json"
_MODULES = {
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard",),
    # mlflow-skinny leaves out what a store in a local file needs.
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
_INIT_TIMEOUT_S = 30


def check_trackers(config: ReportConfig) -> None:
    """Raise ValueError if a tracker is not installed, or has no key to log in with."""
    for tracker in config.trackers:
        missing = [name for name in _MODULES[tracker] if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"report.trackers: {tracker} needs {' and '.join(missing)}: "
                'pip install "rayward[tracking]"'
            )
    if "wandb" in config.trackers:
        _check_wandb()


def _check_wandb() -> None:
    wandb = _import_wandb()
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise ValueError(
            "report.trackers: wandb has no API key. Run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline and upload the run later with `wandb sync`"
        )


def _import_wandb() -> ModuleType:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


class Trackers:
    """The trackers of one run. One that fails while the training runs is left out from then on."""

    def __init__(self, config: TrainConfig, say: Callable[[str], None] = terminal.say) -> None:
        """Start, or go on with, a run of each tracker. Raises ValueError for one that cannot."""
        self._say = say
        self._path = Path(config.output_dir) / STATE_FILE
        self._state: dict[str, Any] = {"runs": {}, "last": {}}
        if self._path.exists():
            self._state = json_object(self._path)
        self._trackers: dict[str, _Tracker] = {}
        for name in config.report.trackers:
            tracker = _START[name](config, self._state["runs"].get(name))
            self._trackers[name] = tracker
            self._state["runs"][name] = tracker.run_id
            say(f"{name}: {tracker.place}")
        if self._trackers:
            self._save()

    def log(self, lines: Sequence[Line]) -> None:
        """Log every line of a step that the trackers do not have. Never raises."""
        last = self._state["last"]
        new = [line for line in lines if line.values["step"] > last.get(line.kind, 0)]
        if not (new and self._trackers):
            return
        last.update({line.kind: line.values["step"] for line in new})
        metrics = [(metrics_of(line), int(line.values["step"])) for line in new]
        self._for_each(lambda tracker: tracker.log(metrics))
        try:
            self._save()
        except OSError as error:  # a full disk, say: a restart would log some steps twice
            self._say(f"{self._path} could not be written: {error}")

    def close(self, finished: bool = True) -> None:
        """End the runs, as finished or as failed. Never raises."""
        self._for_each(lambda tracker: tracker.close(finished))
        self._trackers = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(finished=kind is None)

    def _for_each(self, do: Callable[[_Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                do(tracker)
            # Whatever a tracker fails with, hours of training matter more than its curves.
            except Exception as error:
                del self._trackers[name]
                self._say(
                    f"{name} failed and gets nothing more of this training: "
                    f"{type(error).__name__}: {error}"
                )

    def _save(self) -> None:
        replace_text(self._path, json.dumps(self._state) + "\n")


def metrics_of(line: Line) -> dict[str, float]:
    """The finite numbers of a line, named like `train/loss` and `heldout/subsets/math/accuracy`."""
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                # MLflow takes only these in a name.
                add(f"{name}/{re.sub(r'[^0-9A-Za-z_. -]', '_', key)}", inner)
        elif isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)

    add(line.kind, {key: value for key, value in line.values.items() if key != "step"})
    return found


Metrics = Sequence[tuple[Mapping[str, float], int]]
"""Metrics by name and their step, of one or more lines."""


class _Tracker(Protocol):
    run_id: str | None
    place: str

    def log(self, metrics: Metrics) -> None: ...

    def close(self, _finished: bool, /) -> None: ...


class _Wandb:
    def __init__(self, config: TrainConfig, run_id: str | None) -> None:
        wandb = _import_wandb()
        try:
            self._run = wandb.init(
                project=config.report.project,
                name=describe.run_name(config),
                id=run_id,
                resume="allow",
                config=config.model_dump(mode="json"),
                dir=config.output_dir,
                settings=wandb.Settings(console="off", silent=True, init_timeout=_INIT_TIMEOUT_S),
            )
        except wandb.Error as error:
            raise ValueError(
                f"report.trackers: wandb cannot start: {error}. Without a network set "
                "WANDB_MODE=offline and upload the run later with `wandb sync`"
            ) from error
        # An evaluation may arrive after later steps; wandb's own step counter would drop it.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.run_id: str | None = self._run.id
        folder = Path(self._run.dir).parent
        self.place = f"wandb sync {folder}" if self._run.offline else str(self._run.url)

    def log(self, metrics: Metrics) -> None:
        for values, step in metrics:
            self._run.log({**values, "step": step})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _TensorBoard:
    run_id: str | None = None  # its run is the directory

    def __init__(self, config: TrainConfig, _run_id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = Path(config.output_dir) / "tensorboard"
        is_new = not directory.exists()
        self._writer = SummaryWriter(str(directory))
        if is_new:
            settings = config.model_dump_json(indent=4).replace("\n", "\n    ")
            self._writer.add_text("settings", f"    {settings}")  # indented: Markdown for code
        self.place = f"tensorboard --logdir {directory}"

    def log(self, metrics: Metrics) -> None:
        for values, step in metrics:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()  # else a kill would take the last two minutes

    def close(self, _finished: bool) -> None:
        self._writer.close()


class _Mlflow:
    def __init__(self, config: TrainConfig, run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # A server that has gone away is given up after seconds; by default it takes minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        directory = Path(config.output_dir)
        given = os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or f"sqlite:///{directory / 'mlflow.db'}"
        try:
            self._client = MlflowClient(uri)
            experiment = self._client.get_experiment_by_name(config.report.project)
            experiment_id = (
                experiment.experiment_id
                if experiment
                else self._client.create_experiment(
                    config.report.project,
                    artifact_location=None if given else (directory / "mlruns").as_uri(),
                )
            )
            if run_id is None:
                run_id = self._client.create_run(
                    experiment_id, run_name=describe.run_name(config)
                ).info.run_id
                params = [Param(key, value[:500]) for key, value in settings_of(config).items()]
                for first in range(0, len(params), 100):  # at most so many in one call
                    self._client.log_batch(run_id, params=params[first : first + 100])
            else:
                self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise ValueError(
                f"report.trackers: mlflow cannot use {uri}: {error} (to begin another run there, "
                f"delete {directory / STATE_FILE})"
            ) from error
        self._run_id: str = run_id
        self.run_id: str | None = run_id
        self.place = f"run {run_id} in {uri}"

    def log(self, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        entries = [
            Metric(name, value, now_ms, step)
            for values, step in metrics
            for name, value in values.items()
        ]
        for first in range(0, len(entries), 1000):  # at most so many in one call
            self._client.log_batch(self._run_id, metrics=entries[first : first + 1000])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")


_START: dict[str, Callable[[TrainConfig, str | None], _Tracker]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
    "mlflow": _Mlflow,
}


def settings_of(config: TrainConfig) -> dict[str, str]:
    """Every setting by its dotted key, as text; of a data set only what is not as by default."""
    sections = config.model_dump(mode="json")
    for which in ("train", "eval"):
        sources = getattr(config.data, which) or {}
        shown = {
            name: {"weight": of.weight, **of.named} if of.named else of.weight
            for name, of in sources.items()
        }
        is_plain = list(shown.values()) == [1]
        sections["data"][which] = next(iter(shown)) if is_plain else shown or None
    found = {"output_dir": str(sections.pop("output_dir"))}
    for section, values in sections.items():
        found.update({f"{section}.{key}": as_text(value) for key, value in values.items()})
    return found


def as_text(value: Any) -> str:
    """A setting's value; a list or a mapping as the command line takes it."""
    if not isinstance(value, list | dict):
        return str(value)
    return yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    ).strip()
