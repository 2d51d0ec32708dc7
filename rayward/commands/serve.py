"""`rayward serve MODEL`."""

from __future__ import annotations

import argparse
import os
import signal
import threading

NAME = "serve"
HELP = "serve a reward model over HTTP until interrupted"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--ray-address", help="join this Ray cluster instead of starting one")
    _add_serve_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    from reward_actor.config_errors import validate
    from serve.config import ServeConfig

    prefix = "setting_"
    settings = {
        name.removeprefix(prefix): value
        for name, value in vars(arguments).items()
        if name.startswith(prefix) and value is not None
    }
    config = validate(ServeConfig, {"model": arguments.model, **settings})
    from serve.haproxy import settings as haproxy

    joins = arguments.ray_address or os.environ.get("RAY_ADDRESS")
    if not joins:
        haproxy.enable()
    import ray

    from serve.app import start
    from serve.monitoring.metrics import targets

    url = start(config, host=arguments.host, port=arguments.port, ray_address=arguments.ray_address)
    print(f"serving  {config.model}\nscore    POST {url}/v1/score\nAPI page {url}/docs")
    print(f"try it   {url}/playground")
    print(f"metrics  http://{targets()[0]}/metrics")
    print(f"Ray      {ray.get_runtime_context().gcs_address}\nready; Ctrl-C stops", flush=True)
    stop = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray sets its own at start
        signal.signal(signal_number, lambda *_: stop.set())
    while not stop.wait(1.0):
        pass
    if joins:  # a private cluster ends with us
        from ray import serve as ray_serve

        from serve.app import APP_NAME

        ray_serve.delete(APP_NAME)
    ray.shutdown()
    return 0


def _add_serve_settings(parser: argparse.ArgumentParser) -> None:
    from serve.config import ServeConfig

    for name, field in ServeConfig.model_fields.items():
        if name == "model":
            continue
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=f"setting_{name}",
            metavar="VALUE",
            help=f"{field.description} [{field.default!r}]".replace("%", "%%"),
        )
