"""The optimizer and the schedule of its learning rate, by name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from reward_actor.model.heads import HEADS
from trainer.deepspeed_internals import mark_for_muon, muon_class, whole_shape

if TYPE_CHECKING:
    from trainer.config.train import OptimizerConfig

# They follow a loss that the trainer would have to measure, and a resumed run to remember.
_NEED_A_METRIC = ("reduce_lr_on_plateau", "greedy")
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")  # transformers drops them in silence
# Their module imports half of `transformers`, so it is imported when one is made. These are right
# without arguments for any number of steps.
_NEED_NO_CHECK = ("constant", "constant_with_warmup", "cosine", "linear")


def check_optimizer(config: OptimizerConfig, num_steps: int) -> None:
    """Raises ValueError for what could only fail once the workers have loaded the network.

    That is an unknown schedule, arguments that it does not take or that make a learning rate below
    0, an optimizer whose package is missing, and clipping for one that has no use for it.
    """
    if config.schedule_args or config.schedule not in _NEED_NO_CHECK:
        _check_schedule(config, num_steps)
    if config.name == "adamw_8bit":
        _eight_bit_class()
    if config.name == "muon" and config.max_grad_norm:
        raise ValueError(
            f"optimizer.max_grad_norm is {config.max_grad_norm}, but muon's updates have the same "
            "size whatever the gradient's: set it to 0"
        )


def _check_schedule(config: OptimizerConfig, num_steps: int) -> None:
    weight = nn.Parameter(torch.zeros(1))
    schedule = make_schedule(config, torch.optim.SGD([weight], config.learning_rate), num_steps)
    try:
        rates = [schedule.lr_lambdas[0](step) for step in range(num_steps + 1)]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"optimizer.schedule_args: {config.schedule} fails with {config.schedule_args}: {error}"
        ) from None
    for step, rate in enumerate(rates):
        if isinstance(rate, complex) or not 0 <= rate < math.inf:
            raise ValueError(
                f"optimizer.schedule_args: with {config.schedule_args} the learning rate of step "
                f"{step + 1} is {rate} times its peak"
            )


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Of the parameters that need gradients. Raises ValueError if its package is missing.

    adamw: Loshchilov and Hutter, arXiv:1711.05101. adamw_8bit: Dettmers et al., arXiv:2110.02861.
    muon: Jordan et al., https://kellerjordan.github.io/posts/muon/, for the body's matrices.
    """
    if config.name == "muon":
        return _muon(config, model)
    kind = _eight_bit_class() if config.name == "adamw_8bit" else torch.optim.AdamW
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (config.beta1, config.beta2)
    return kind(parameters, config.learning_rate, betas, config.epsilon, config.weight_decay)


def _eight_bit_class() -> Any:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer.name: adamw_8bit needs bitsandbytes ({error}): pip install bitsandbytes"
        ) from None
    return AdamW8bit


def _muon(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """DeepSpeed's Muon, which ZeRO gives whole matrices; AdamW for what is no matrix of the body.

    Its update of an (out, in) matrix has a root mean square of about sqrt(1 / in); times
    0.2 sqrt(in) it is that of AdamW, so that learning rates carry over (Liu et al.,
    arXiv:2502.16982, section 2.2).
    """
    # DeepSpeed compiles its few matrix products anew for every shape: minutes on a CPU.
    torch.compiler.set_stance("force_eager")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices: dict[int, list[nn.Parameter]] = defaultdict(list)
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        shape = whole_shape(parameter)
        is_head = not {*name.split(".")}.isdisjoint(HEADS)
        is_matrix = len(shape) == 2 and not is_head and id(parameter) not in tables
        mark_for_muon(parameter, is_matrix)
        if parameter.requires_grad:
            (matrices[shape[1]] if is_matrix else others).append(parameter)
    groups: list[dict[str, Any]] = []
    if others:  # first: its learning rate is the one in the log
        groups.append(
            {
                "params": others,
                "use_muon": False,
                "lr": config.learning_rate,
                "betas": (config.beta1, config.beta2),
                "eps": config.epsilon,
                "weight_decay": config.weight_decay,
            }
        )
    for width, parameters in sorted(matrices.items()):
        scale = 0.2 * math.sqrt(width)
        groups.append(
            {
                "params": parameters,
                "use_muon": True,
                "lr": config.learning_rate * scale,
                "momentum": config.beta1,
                "weight_decay": config.weight_decay / scale,  # it is multiplied by this lr
            }
        )
    optimizer: torch.optim.Optimizer = muon_class()(groups)
    optimizer.defaults["lr"] = config.learning_rate  # schedules read it
    return optimizer


def make_schedule(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, num_steps: int
) -> LambdaLR:
    """Any schedule of `transformers` that follows the step alone; no step of its warm-up is 0.

    Raises ValueError for another one, and for arguments that it does not take.
    """
    from transformers import SchedulerType, get_scheduler

    known = [kind.value for kind in SchedulerType if kind.value not in _NEED_A_METRIC]
    name, arguments = config.schedule, dict(config.schedule_args)
    num_warmup = math.ceil(config.warmup_fraction * num_steps)
    if name == "cosine_with_min_lr" and not arguments:
        arguments = {"min_lr_rate": 0.1}
    if name in _NEED_A_METRIC:
        raise ValueError(
            f"optimizer.schedule: {name} follows a metric, and the learning rate here depends on "
            f"the step alone; there are {', '.join(known)}"
        )
    try:
        if name not in known:
            raise ValueError("there is no such schedule")
        if name in _WITHOUT_ARGUMENTS and arguments:
            raise ValueError("it takes no arguments")
        schedule: LambdaLR = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=num_warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=arguments,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optimizer.schedule: {name} with schedule_args {arguments}: {error}; there are "
            f"{', '.join(known)}"
        ) from None
    return LambdaLR(optimizer, [_rising(rate, num_warmup) for rate in schedule.lr_lambdas])


def _rising(rate: Callable[..., float], num_warmup: int) -> Callable[[int], float]:
    """`rate` of a step, its warm-up moved a little ahead where it begins with 0, which would lose
    the first step."""
    if rate(0) > 0:
        return rate

    def warmed(step: int) -> float:
        return rate(step if step >= num_warmup else num_warmup * (step + 1) / (num_warmup + 1))

    return warmed
