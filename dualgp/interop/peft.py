"""Adapters made by peft, as what a variational optimiser learns; peft is imported when it is asked for."""

from __future__ import annotations

from torch import nn

from dualgp.errors import InputError, UnsupportedError


def adapter_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters of a model's adapters, and of whatever else in it takes a gradient, such as a head.

    For `dualgp.optim.IVON`, whose `posterior()` is then over these weights only. Predict with
    `optimizer.sampled_params(train=False)`, or `posterior().predict_samples` for models of one tensor; peft's
    `merge_and_unload` gives the network at the mean.

    Args:
        model: what `peft.get_peft_model` or `peft.inject_adapter_in_model` made, or a network that contains it.

    Raises:
        UnsupportedError: if peft is not installed.
        InputError: if there is no adapter, none takes a gradient, or a weight under one does.

    Example:
        >>> import pytest, torch; peft = pytest.importorskip("peft")
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), net)
        >>> [name for name, _ in adapter_parameters(model)]
        ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise UnsupportedError("Adapters of peft need peft: pip install peft.") from error
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise InputError(
            "The model has no adapter of peft: wrap it by peft.get_peft_model(model, peft.LoraConfig(...)) first."
        )
    under = [p for layer in layers for p in layer.get_base_layer().parameters(recurse=False) if p.requires_grad]
    if under:
        raise InputError(
            f"{len(under)} weights under adapters take a gradient, the first of shape {tuple(under[0].shape)}; freeze "
            "them by requires_grad_(False), or give the optimiser model.named_parameters() to learn all."
        )
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    if not any(id(p) in inside for _, p in found):
        raise InputError("No adapter takes a gradient: it may have been made for inference (is_trainable=True trains).")
    return found
