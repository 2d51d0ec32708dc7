"""The service as one Ray Serve application: `serve run serve.app:app model=DIR`."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any, cast

import torch
from ray import serve
from ray.serve.schema import LoggingConfig

from reward_actor.checkpoint import check_directory, load_contract
from reward_actor.cluster import connect, require_resources
from reward_actor.settings import validate
from serve.config import ServeConfig
from serve.deployment import RewardModelReplica
from serve.ingress import Ingress

if TYPE_CHECKING:
    from ray.serve import Application

APP_NAME = "rayward"

# Of a CPU: an ingress mostly waits; more of them are asked for when rendering is what limits.
_INGRESS_CPUS = 0.25

# A line for every request would cost more than a small model's scoring.
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def app(args: dict[str, Any]) -> Application:
    """The application for `serve run serve.app:app model=DIR [key=value ...]` and `rayward serve`.

    Raises ValueError for an unknown key, a directory without a trained reward model, or a contract
    that cannot be read: before anything is started.
    """
    return build(validate(ServeConfig, args, "serve"))


def build(config: ServeConfig) -> Application:
    directory = check_directory(config.model).resolve()
    load_contract(directory, trust_remote_code=config.trust_remote_code)
    config = config.model_copy(
        update={"model": str(directory), "name": config.name or directory.name}
    )
    replica: Any = RewardModelReplica
    front: Any = Ingress
    model = replica.options(
        num_replicas=config.num_replicas,
        ray_actor_options=_replica_resources(config),
        logging_config=_QUIET,
    ).bind(config)
    ingress = front.options(
        num_replicas=config.num_ingress,
        ray_actor_options={"num_cpus": _INGRESS_CPUS, "num_gpus": 0},
        logging_config=_QUIET,
    )
    return cast("Application", ingress.bind(config, model))


def start(
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ray_address: str | None = None,
) -> str:
    """Start the service and return its URL once it is ready.

    Joins the cluster at `ray_address` or starts a private one. Raises ValueError for a port in use
    or a cluster that is too small.
    """
    application = build(config)
    _require_free(host, port)
    resources = _replica_resources(config)
    bundles = [_bundle(resources)] * config.num_replicas
    bundles += [{"CPU": _INGRESS_CPUS}] * config.num_ingress
    num_cpus = sum(bundle.get("CPU", 0.0) for bundle in bundles)
    # A vLLM engine or two of rollout actors should find room beside the service.
    connect(
        num_cpus + 4, config.num_replicas * resources["num_gpus"], ray_address, log_to_driver=False
    )
    require_resources(bundles)
    serve.start(
        logging_config=_QUIET,
        http_options={"host": host, "port": port, "request_timeout_s": None},
    )
    serve.run(application, name=APP_NAME, route_prefix="/")
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _replica_resources(config: ServeConfig) -> dict[str, float]:
    on_gpu = config.device != "cpu" and (config.device != "auto" or torch.cuda.is_available())
    return {
        "num_cpus": config.cpus_per_replica,
        "num_gpus": config.gpus_per_replica if on_gpu else 0,
    }


def _bundle(resources: dict[str, float]) -> dict[str, float]:
    bundle = {"CPU": resources["num_cpus"]}
    return {**bundle, "GPU": resources["num_gpus"]} if resources["num_gpus"] else bundle


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} on {host} cannot be used ({error.strerror}); stop what holds it or "
                "choose another with --port"
            ) from error
