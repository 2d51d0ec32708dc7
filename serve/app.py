"""The service as one Ray Serve application: `serve run serve.app:app model=DIR`."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from reward_actor.client.handle import DEFAULT_APP_NAME
from reward_actor.cluster import capacity, connect, require_resources
from reward_actor.config_errors import validate
from reward_actor.devices import resolve_device
from reward_actor.ray_internals import serve_http_options
from reward_actor.terminal import phase
from serve.config import ServeConfig
from serve.current_model import forget
from serve.deployments import Ingress, RewardModel
from serve.haproxy import settings as haproxy
from serve.http.auth import require_guard
from serve.http.tokens import Tokens
from serve.ingress.functions import Functions
from serve.listeners import listeners
from serve.monitoring.metrics import publish_targets
from serve.registry import Registry

if TYPE_CHECKING:
    from ray.serve import Application

APP_NAME = DEFAULT_APP_NAME

# Of a CPU: an ingress mostly waits; more of them are asked for when rendering is what limits.
_INGRESS_CPUS = 0.25

_HEALTH_CHECK_PERIOD_S = 2.0

# A line for every request would cost more than a small model's scoring.
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def app(args: dict[str, Any]) -> Application:
    """The application for `serve run serve.app:app model=DIR [key=value ...]`.

    Raises ValueError for an unknown key, a directory without a trained reward model, a file that
    differs from its digest, a contract that cannot be read, or a token file that cannot be used:
    before anything is started.
    """
    config = resolve(validate(ServeConfig, args, "serve"))
    if config.tls_cert is not None:
        raise ValueError(
            "tls_cert and tls_key are for `rayward serve`; here Ray Serve's own configuration "
            "opens the port: set ssl_certfile and ssl_keyfile of its http_options, without HAProxy"
        )
    return build(config, _uses_gpu(config))


def resolve(config: ServeConfig) -> ServeConfig:
    """The config with absolute paths and a name, its model checked. Raises ValueError.

    The name is the one that was given, the registry's for a model that it has, or the run's.
    """
    from reward_actor.info import model_name
    from reward_actor.model.ensemble import ensemble_readout, model_directories
    from reward_actor.model.layouts import recognise
    from reward_actor.model.load import load_contract
    from reward_actor.model.manifest import check_manifest

    directory = Path(config.model).expanduser().resolve()
    members, contracts = model_directories(directory), []
    for member in members:
        recognise(member).require_trust(config.trust_remote_code)
        contracts.append(load_contract(member, trust_remote_code=config.trust_remote_code))
        check_manifest(member)
    if config.engine == "vllm":
        from reward_actor.vllm.scorer import check_supported

        check_supported(directory)
    registry = None if config.registry is None else Registry(config.registry)
    listed = None if registry is None else registry.name_of(directory)
    files = {
        setting: str(Path(file).expanduser().absolute())
        for setting in ("token_file", "tls_cert", "tls_key", "functions")
        if (file := getattr(config, setting)) is not None
    }
    if "token_file" in files:
        Tokens(files["token_file"])
    if "functions" in files:
        named = ensemble_readout(members, contracts, "mean", 0.0).named
        Functions.load(files["functions"]).require_other_names(named)
    if "tls_cert" in files:
        _check_certificate(files["tls_cert"], files["tls_key"])
    return config.model_copy(
        update={
            "model": str(directory),
            "name": config.name or listed or model_name(directory),
            "registry": None if registry is None else str(registry.root),
            **files,
        }
    )


def build(config: ServeConfig, use_gpu: bool) -> Application:
    replica: Any = RewardModel
    front: Any = Ingress
    options: dict[str, Any] = {
        "ray_actor_options": _replica_resources(config, use_gpu),
        "logging_config": _QUIET,
        # A model that fails its golden samples fails them again: say so instead of trying on.
        "max_constructor_retry_count": 1,
        # Three failures in a row replace a replica.
        "health_check_period_s": _HEALTH_CHECK_PERIOD_S,
    }
    if config.is_autoscaled:
        options["autoscaling_config"] = _autoscaling(config)
    else:
        options["num_replicas"] = config.num_replicas
    start = uuid.uuid4().hex
    model = replica.options(**options).bind(config, start)
    ingress = front.options(
        num_replicas=config.num_ingress,
        ray_actor_options={"num_cpus": _INGRESS_CPUS, "num_gpus": 0},
        logging_config=_QUIET,
    )
    return cast("Application", ingress.bind(config, start, model))


def _autoscaling(config: ServeConfig) -> AutoscalingConfig:
    assert config.max_replicas is not None
    return AutoscalingConfig(
        min_replicas=config.min_replicas or 0,
        initial_replicas=max(1, config.min_replicas or 0),
        max_replicas=config.max_replicas,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        metrics_interval_s=1.0,
        look_back_period_s=5.0,
        policy=AutoscalingPolicy(
            policy_function="serve.autoscaling:QueuedTokensPolicy",
            policy_kwargs={"target_queue_s": config.target_queue_s},
        ),
    )


def start(
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ray_address: str | None = None,
) -> str:
    """Start the service and return its URL once it is ready.

    Joins the cluster at `ray_address` or $RAY_ADDRESS, or starts a private one. Raises ValueError
    for a device that is not there, a port in use, an address that others can reach without tokens,
    a cluster that is too small or serves already, or a model that does not reproduce its golden
    samples.
    """
    is_private = not (ray.is_initialized() or ray_address or os.environ.get("RAY_ADDRESS"))
    if is_private:  # another's cluster may have the device elsewhere
        resolve_device(config.device)
    config = resolve(config)
    require_guard(host, config)
    _require_free(host, port)
    if config.tls_cert is not None and not is_private:
        raise ValueError(
            "tls_cert is for a service with a Ray cluster of its own; in another's cluster let a "
            "proxy speak TLS in front of the service (docs/clusters.md)"
        )
    http_options = {"host": host, "port": port, "request_timeout_s": None}
    if is_private and haproxy.front(host, port, config.tls_cert, config.tls_key):
        # HAProxy alone faces the network; what it leads to stays on this machine.
        http_options["host"] = "127.0.0.1"
    elif config.tls_cert is not None:
        http_options |= {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
    num_replicas = config.max_replicas or config.num_replicas
    cpus = num_replicas * config.cpus_per_replica + config.num_ingress * _INGRESS_CPUS
    # A vLLM engine or two of rollout actors should find room beside the service.
    connect(cpus + 4, address=ray_address, log_to_driver=False)
    use_gpu = _uses_gpu(config)
    resources = _replica_resources(config, use_gpu)
    bundle = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
    # A service that scales by itself needs room for what it begins with.
    at_least = max(1, config.min_replicas or 0) if config.is_autoscaled else config.num_replicas
    bundles = [{name: amount for name, amount in bundle.items() if amount}] * at_least
    require_resources([*bundles, *[{"CPU": _INGRESS_CPUS}] * config.num_ingress])
    try:
        serve.start(logging_config=_QUIET, http_options=http_options)
    except RuntimeError as error:
        raise ValueError(f"Ray Serve did not start: {_last_error(str(error))}") from error
    _require_own_address(str(http_options["host"]), port)
    if APP_NAME in serve.status().applications:
        raise ValueError(
            f"this Ray cluster serves an application {APP_NAME!r} already; end it first "
            f"(serve.delete({APP_NAME!r})), or use another cluster"
        )
    forget(APP_NAME)
    publish_targets()
    try:
        with phase(f"loading {config.model} on its replicas, and replaying its golden samples"):
            serve.run(build(config, use_gpu), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        message = serve.status().applications[APP_NAME].deployments["RewardModel"].message
        serve.delete(APP_NAME)
        raise ValueError(f"the model could not be served: {_last_error(message)}") from error
    shown = f"[{host}]" if ":" in host else host
    return f"{'http' if config.tls_cert is None else 'https'}://{shown}:{port}"


def _uses_gpu(config: ServeConfig) -> bool:
    """The cluster decides: the node that starts a service often has no GPU itself."""
    if config.device != "auto":
        return config.device.startswith("cuda")
    if ray.is_initialized():
        return capacity("GPU") > 0
    import torch

    return torch.cuda.is_available()


def _replica_resources(config: ServeConfig, use_gpu: bool) -> dict[str, float]:
    """Of one replica: with tensor_parallel it owns all of its GPUs, and its engine starts a process
    for each; so they lie on one node, and nothing of it is elsewhere when it dies."""
    gpus = config.tensor_parallel if config.tensor_parallel > 1 else config.gpus_per_replica
    return {"num_cpus": config.cpus_per_replica, "num_gpus": gpus if use_gpu else 0}


def _require_own_address(host: str, port: int) -> None:
    """Raise ValueError if the cluster's Serve listens elsewhere: its first start decided that."""
    options = serve_http_options()
    if (options.host, options.port) != (host, port):
        raise ValueError(
            f"Ray Serve listens on {options.host} port {options.port} in this cluster already; "
            f"use --host {options.host} --port {options.port}, or another cluster"
        )


def _last_error(message: str) -> str:
    """What a traceback's last exception says, without its class; HAProxy's complaints alone where
    they are among it."""
    lines = message.splitlines()
    named = [i for i, line in enumerate(lines) if re.match(r"\S*(Error|Exception): ", line)]
    if not named:
        return message
    alerts = [line.partition(") : ")[2] for line in lines[named[-1] :] if "[ALERT]" in line]
    return f"HAProxy: {'; '.join(alerts)}" if alerts else lines[named[-1]].partition(": ")[2]


def _check_certificate(cert: str, key: str) -> None:
    """Raise ValueError unless these are a certificate chain in PEM and its key."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password="")
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(
            f"tls_cert {cert} and tls_key {key} cannot be used together ({error.strerror}); they "
            "are the certificate chain and its private key, both in PEM, without a password"
        ) from error


def _require_free(host: str, port: int) -> None:
    if not 0 < port < 65_536:
        raise ValueError(f"port is {port}; there are 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            holders = "".join(f", by {holder}" for holder in listeners(port))
            raise ValueError(
                f"port {port} on {host} cannot be used ({error.strerror}{holders}); stop what "
                "holds it or choose another with --port"
            ) from error
