"""Optimizers of the private gradient. All of them only see what is already private."""

import torch

from utils.arguments.training import TrainingArguments
from utils.privacy.plan import PrivacyPlan


class DPAdamBC(torch.optim.Optimizer):
    """Adam whose second moment is corrected for the privacy noise (Tang et al. 2024, "DP-AdamBC").

    The noise adds (sigma C / B)^2 to every squared gradient, whatever the data; subtracting it
    lets the step follow the signal: m / sqrt(max(v - (sigma C / B)^2, eps)).

    Args:
        noise_variance: (sigma C / B)^2, public.
        eps: the least corrected second moment (gamma' of the paper).
    """

    def __init__(self, params, lr, noise_variance, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"noise_variance": noise_variance})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                square = state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - beta2)
                mean = mean / (1 - beta1 ** state["step"])
                square = square / (1 - beta2 ** state["step"])
                scale = (square - group["noise_variance"]).clamp_min(group["eps"]).sqrt()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(mean, scale, value=-group["lr"])


def build_optimizer(
    training: TrainingArguments, parameters: list, plan: PrivacyPlan
) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer`."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=training.learning_rate,
            momentum=training.adam_beta1,
            weight_decay=training.adam_weight_decay,
        )
    settings = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "weight_decay": training.adam_weight_decay,
        "eps": training.adam_epsilon,
    }
    if training.optimizer == "adam_bc":
        noise_variance = (plan.noise_std / plan.expected_batch_size) ** 2
        return DPAdamBC(parameters, noise_variance=noise_variance, **settings)
    return torch.optim.AdamW(parameters, **settings)
