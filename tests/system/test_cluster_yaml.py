"""cluster.yaml, checked offline: by Ray's own schema, and by what that schema does not see."""

import copy
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import ray
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.providers import _get_default_config
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

ROOT = Path(__file__).resolve().parents[2]
GPU_WORKER = ("available_node_types", "gpu_worker")

# Ray's schema closes the top level, `docker`, `auth`, a node type, a node type's `docker`, and
# `provider.security_group`. It passes any key under `provider`, `node_config`, `resources`,
# `labels`, `file_mounts` and `metadata`: a typo there is met at AWS, or never. So this file keeps
# lists of its own for what cluster.yaml uses (`security_group` goes to Ray's schema).
PROVIDER_KEYS = {"type", "region", "availability_zone", "cache_stopped_nodes", "security_group"}
# Of EC2's RunInstances, which gets node_config as it is written.
NODE_CONFIG_KEYS = {
    "BlockDeviceMappings",
    "IamInstanceProfile",
    "ImageId",
    "InstanceMarketOptions",
    "InstanceType",
    "KeyName",
    "SecurityGroupIds",
    "SubnetIds",
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket, no AWS credentials: a check that needs either fails."""

    def refuse(*args: object) -> NoReturn:
        raise AssertionError(f"cluster.yaml must be checked offline, not by connecting to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


def raw_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return config


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The config as `ray up` validates it: merged with Ray's AWS defaults."""
    filled: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    return filled


def with_value(path: tuple[str, ...], value: object) -> dict[str, Any]:
    config = node = raw_config()
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = value
    return config


def ray_start_commands(config: dict[str, Any]) -> list[str]:
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def test_ray_accepts_it() -> None:
    prepared(raw_config())


def test_nothing_is_left_to_rays_aws_defaults() -> None:
    assert set(_get_default_config({"type": "aws"})) <= set(raw_config())


def test_ray_is_pinned_everywhere() -> None:
    config = prepared(raw_config())
    pinned = re.compile(rf"rayproject/ray:{re.escape(ray.__version__)}-py311-(cpu|gpu|cu\d{{3}})")
    images = {key: value for key, value in config["docker"].items() if key.endswith("image")}
    assert all(pinned.fullmatch(image) for image in images.values()), images
    commands = " ".join(
        " ".join(value) for key, value in config.items() if key.endswith("_commands") and value
    )
    # Ray's AWS defaults install a wheel of the day from a URL.
    assert "://" not in commands
    assert ".whl" not in commands
    assert f"ray.__version__ == '{ray.__version__}'" in commands


def test_head_and_workers_get_their_own_image() -> None:
    """Through the autoscaler's own reading, which fails when only `worker_image` is set."""
    config = AutoscalingConfig(raw_config(), skip_content_hash=True)
    assert config.get_docker_config("head")["image"].endswith("-cpu")
    assert re.search(r"-(gpu|cu\d{3})$", config.get_docker_config("gpu_worker")["image"])
    broken = raw_config()
    broken["docker"]["worker_image"] = broken["docker"].pop("image")
    config = AutoscalingConfig(broken, skip_content_hash=True)
    with pytest.raises(KeyError, match="image"):
        config.get_docker_config("gpu_worker")


def test_dashboard_stays_on_loopback() -> None:
    config = prepared(raw_config())
    hosts = re.findall(r"--dashboard-host[= ](\S+)", " ".join(ray_start_commands(config)))
    assert hosts == ["127.0.0.1"]
    # Rules given here would be added to Ray's, which let in ssh alone.
    assert "security_group" not in config["provider"]


def test_every_node_starts_with_token_authentication() -> None:
    config = prepared(raw_config())
    starts = ray_start_commands(config)
    assert len(starts) == 2
    for command in starts:
        before = command.split("ray start")[0]
        assert "export RAY_AUTH_MODE=token;" in before, command
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_no_token_is_written_down() -> None:
    assert "RAY_AUTH_TOKEN" not in (ROOT / "cluster.yaml").read_text()


def test_head_has_no_gpu_and_takes_no_work_of_a_worker() -> None:
    config = prepared(raw_config())
    head = config["available_node_types"][config["head_node_type"]]
    assert "GPU" not in head["resources"]
    # EC2's families with an accelerator begin with g, p, trn, inf, dl, vt or f.
    assert re.match(r"[mcr]\d", head["node_config"]["InstanceType"])
    assert head["max_workers"] == 0
    assert not any("gpus" in option for option in config["docker"].get("head_run_options", []))


def test_gpu_workers_scale_from_zero_and_back() -> None:
    config = prepared(raw_config())
    workers = {k: v for k, v in config["available_node_types"].items() if k != "head"}
    assert workers
    for worker in workers.values():
        assert worker["min_workers"] == 0
        assert 1 <= worker["max_workers"] <= config["max_workers"]
        assert re.match(r"[gp]\d", worker["node_config"]["InstanceType"])
    assert "--gpus all" in config["docker"]["worker_run_options"]
    assert 0 < config["idle_timeout_minutes"] <= 60
    assert config["provider"]["cache_stopped_nodes"] is False
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in ray_start_commands(config)[0]


def test_code_is_not_copied_and_packages_are_pinned() -> None:
    config = prepared(raw_config())
    mounts = config["file_mounts"]
    assert sorted(mounts.values()) == ["constraints.txt", "~/.ray/auth_token"]
    pins = dict(
        line.split("==", 1)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if re.match(r"[\w.-]+==", line)
    )
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    installs = [command for command in config["setup_commands"] if "pip install" in command]
    assert installs
    for command in installs:
        arguments = command.split("pip install", 1)[1].split()
        constraints = arguments[arguments.index("-c") + 1]
        assert constraints in mounts
        packages = {a for a in arguments if not a.startswith("-")} - {constraints}
        assert packages
        assert {package.split("[")[0] for package in packages} <= names
    assert pins["ray"].split()[0] == ray.__version__


def test_keys_that_ray_does_not_check() -> None:
    config = raw_config()
    assert set(config["provider"]) <= PROVIDER_KEYS
    for name, node_type in config["available_node_types"].items():
        assert set(node_type["node_config"]) <= NODE_CONFIG_KEYS, name
        assert set(node_type["resources"]) <= {"CPU", "GPU", "memory"}, name


TYPOS: list[tuple[tuple[str, ...], object]] = [
    (("idle_timeout_minute",), 1),
    (("worker_start_ray_command",), ["ray stop"]),
    (("docker", "head_imge"), "x"),
    (("auth", "ssh_usr"), "ubuntu"),
    ((*GPU_WORKER, "min_worker"), 1),
    ((*GPU_WORKER, "setup_commands"), ["true"]),
    ((*GPU_WORKER, "docker"), {"worker_imge": "x"}),
    (("provider", "security_group"), {"GroupNmae": "x"}),
]

WRONG_TYPES: list[tuple[tuple[str, ...], object]] = [
    (("max_workers",), "4"),
    (("max_workers",), -1),
    (("worker_setup_commands",), [1]),
    (("docker", "run_options"), "-e X=1"),
    (("docker", "pull_before_run"), "yes"),
    (("auth", "ssh_proxy_use_node_id"), True),  # wants ssh_proxy_command beside it
    (("provider", "region"), 2),
    (("provider", "cache_stopped_nodes"), "no"),
    ((*GPU_WORKER, "min_workers"), "0"),
    ((*GPU_WORKER, "resources"), {"GPU": "4"}),
    ((*GPU_WORKER, "resources"), {"GPU": 0.5}),
    ((*GPU_WORKER, "resources"), {"GPU": -1}),
    ((*GPU_WORKER, "labels"), {"spot": 1}),
    (("available_node_types", "spare"), {"resources": {}}),
    (("available_node_types", "spare"), {"node_config": {}}),
]

OPEN: list[tuple[tuple[str, ...], object]] = [
    (("provider", "regoin"), "us-west-2"),
    ((*GPU_WORKER, "node_config", "InstanceTyp"), "p5.48xlarge"),
    ((*GPU_WORKER, "resources", "GPUs"), 4),
    (("metadata",), {"anything": 1}),
]


def dotted(value: object) -> str | None:
    return ".".join(value) if isinstance(value, tuple) else None


@pytest.mark.parametrize(("path", "value"), TYPOS, ids=dotted)
def test_an_unknown_key_is_refused(path: tuple[str, ...], value: object) -> None:
    with pytest.raises(ValidationError, match="Additional properties are not allowed"):
        prepared(with_value(path, value))


@pytest.mark.parametrize(("path", "value"), WRONG_TYPES, ids=dotted)
def test_a_wrong_value_is_refused(path: tuple[str, ...], value: object) -> None:
    with pytest.raises(ValidationError):
        prepared(with_value(path, value))


@pytest.mark.parametrize(("path", "value"), OPEN, ids=dotted)
def test_a_level_left_open_by_ray_is_still_open(path: tuple[str, ...], value: object) -> None:
    """If Ray closes one of these, our own list for it may go."""
    prepared(with_value(path, value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(head_node_type="hed"), "head_node_type"),
        (lambda c: c["available_node_types"]["gpu_worker"].update(min_workers=9), "min_workers"),
    ],
    ids=["head_node_type", "min_workers"],
)
def test_what_does_not_fit_together_is_refused(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    config = raw_config()
    change(config)
    with pytest.raises(ValueError, match=message):
        prepared(config)
