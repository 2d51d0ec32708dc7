"""`rayward serve MODEL`."""

from __future__ import annotations

import argparse
import os
import signal
import threading

from rayward.loading import chosen
from reward_actor.command_line import add_setting, complain, option
from reward_actor.reaper import Reaper
from reward_actor.terminal import put

NAME = "serve"
HELP = "serve a reward model over HTTP until interrupted"
EXTRA = "serve"

# The first setting of a topic, in the order of ServeConfig.
_HEADINGS = {
    "num_replicas": "replicas",
    "device": "devices",
    "max_batch_tokens": "batches",
    "drop_in_scores": "models and protocols",
    "token_file": "access",
    "max_queued_tokens": "limits",
    "access_log": "monitoring",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    from serve.config import ServeConfig

    parser.usage = "%(prog)s MODEL [--option value ...]"
    parser.add_argument("model", metavar="MODEL", help="directory of the reward model")
    parser.add_argument(
        "--host", metavar="HOST", default="127.0.0.1", help="address to listen on [%(default)s]"
    )
    parser.add_argument(
        "--port", type=int, metavar="PORT", default=8000, help="to listen on [%(default)s]"
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="join this Ray cluster instead of starting one [none]",
    )
    group: argparse._ActionsContainer = parser
    for name, field in ServeConfig.model_fields.items():
        if name in _HEADINGS:
            group = parser.add_argument_group(_HEADINGS[name])
        if name != "model":
            add_setting(group, name, field, dest=name)


def run(arguments: argparse.Namespace) -> int:
    from reward_actor.config_errors import as_typed, validate
    from serve.config import ServeConfig

    given = chosen(arguments, ServeConfig.model_fields)
    options = {name: option(name) for name in ServeConfig.model_fields} | {"model": "MODEL"}
    config = validate(ServeConfig, given, options=options)
    from serve.haproxy import settings as haproxy

    joins = arguments.ray_address or os.environ.get("RAY_ADDRESS")
    if not joins:
        # Of the cluster, HAProxy and its files included: however this process ends.
        reaper = Reaper(haproxy.enable())
        os.environ.update(reaper.environment)
    import ray

    from reward_actor.ray_internals import ended_processes
    from serve.app import start
    from serve.monitoring.metrics import targets

    try:
        url = start(
            config, host=arguments.host, port=arguments.port, ray_address=arguments.ray_address
        )
    except ValueError as error:
        raise ValueError(as_typed(str(error), options)) from error
    put(f"serving  {config.model}\nscore    POST {url}/v1/score\nAPI page {url}/docs")
    put(f"try it   {url}/playground")
    put(f"metrics  http://{targets()[0]}/metrics")
    put(f"Ray      {ray.get_runtime_context().gcs_address}\nready; Ctrl-C stops")
    stop = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray sets its own at start
        signal.signal(signal_number, lambda *_: stop.set())
    while not stop.wait(1.0):
        if not joins and (ended := {"gcs_server", "raylet"}.intersection(ended_processes())):
            reaper.close()
            what = " and ".join(sorted(ended))
            os._exit(
                complain(f"Ray's {what} has ended, and the service with it; start it again", 1)
            )
    if joins:  # a private cluster ends with us
        from ray import serve as ray_serve

        from serve.app import APP_NAME

        ray_serve.delete(APP_NAME)
    ray.shutdown()
    if not joins:
        reaper.close()
    return 0
