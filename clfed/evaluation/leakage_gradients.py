r"""From a gradient back to the examples: what gradient-sending baselines give away.

Inverting gradients (Geiping et al. 2020, arXiv 2003.14053), which matches directions where deep
leakage (Zhu et al. 2019, arXiv 1906.08935) matched distances:

.. math:: \min_{x \in [0,1]} 1 - \cos(\nabla_\theta L(x, y), g) + \alpha\, TV(x)

Dropout seems to stop it, because the gradient came from a thinned network that the attacker does
not know. The dropout inversion attack (Scheliga, Mäder & Seeland 2022, arXiv 2208.06163) looks for
the masks :math:`m_l \in [0,1]` of the dropout layers as well:

.. math:: \min_{x, m} 1 - \cos(\nabla_\theta L(x, y; m), g) + \alpha\, TV(x)
          + \beta \sum_l \big| (1 - \bar m_l) - p_l \big|

The sizes of steps and weights here suit small images; they are not those of the papers.
Behind a linear layer with bias no search is needed, with or without dropout behind it:
:func:`linear_input`. All of this takes the gradient of one batch as given; weights after several
local steps are a harder target, which is not measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError, InvalidMessage, NotEnoughData
from clfed.evaluation.leakage_images import Reconstruction, psnr

#: Fractions of the search after which the step is cut to a third.
CUTS = (3 / 8, 5 / 8, 7 / 8)

#: Kinds of dropout whose masks are not of the shape of what they drop.
OTHERS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def linear_input(weight: Tensor, bias: Tensor) -> Tensor:
    r"""The input of a linear layer from its gradient (Phong et al. 2018).

    For one example :math:`\partial L / \partial W = \delta x^T` and
    :math:`\partial L / \partial b = \delta`, so

    .. math:: x = \frac{(\partial L / \partial W)^T\, \partial L / \partial b}
                       {\|\partial L / \partial b\|^2}

    exactly. Of a batch it is a mixture of all inputs.

    Args:
        weight: :math:`\partial L / \partial W`, shape ``(O, I)``.
        bias: :math:`\partial L / \partial b`, shape ``(O,)``.

    Returns:
        Shape ``(I,)``.

    Raises:
        NotEnoughData: The gradient of the bias is zero: nothing was learned from the example.

    Example:
        >>> delta, x = torch.tensor([0.5, -2.0]), torch.tensor([3.0, 4.0])
        >>> linear_input(delta.outer(x), delta).tolist()
        [3.0, 4.0]
    """
    length = bias.square().sum()
    if not float(length) > 0:
        raise NotEnoughData(
            "Expected a gradient of the bias that is not zero, got zero.",
            remedy="An example that changes nothing cannot be read off.",
        )
    return weight.T @ bias / length


def draw_masks(model: nn.Module, images: Tensor, rng: torch.Generator) -> tuple[Tensor, ...]:
    """Draw what the dropout layers of a network keep, 1 or 0.

    Args:
        model: In eval mode, with ``torch.nn.Dropout`` and no other kind of dropout.
        images: ``(B, ...)`` input, for the shapes.
        rng: Source of all draws.

    Returns:
        One mask a dropout layer, ``(B, ...)``, in the order of ``model.modules()``.

    Raises:
        ConfigError: The network is in training mode or drops in another way.
    """
    shapes: dict[nn.Module, torch.Size] = {}
    layers = _dropouts(model)
    hooks = [
        layer.register_forward_hook(lambda m, inputs, _: shapes.update({m: inputs[0].shape}))
        for layer in layers
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(
        torch.bernoulli(torch.full(shapes[layer], 1 - layer.p), generator=rng) for layer in layers
    )


def shared_gradient(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    masks: Sequence[Tensor] = (),
    clip: float | None = None,
    noise: float = 0.0,
    rng: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    r"""The gradient that a node sends: the mean over a batch, perhaps clipped and noised.

    .. math:: g = \frac1B \Big( \sum_i g_i \min(1, S / \|g_i\|) + N(0, (\sigma S)^2 I) \Big)

    (Abadi et al. 2016, arXiv 1607.00133.)

    Args:
        model: In eval mode.
        images: ``(B, ...)``.
        labels: ``(B,)`` int64.
        masks: Of the dropout layers, see :func:`draw_masks`; empty where nothing is dropped.
        clip: :math:`S`, largest norm of one example's gradient; None leaves them.
        noise: :math:`\sigma`, in units of the clipping norm.
        rng: Of the noise.

    Returns:
        One tensor a parameter.

    Raises:
        ConfigError: Noise without a clipping norm or a generator, or a norm that is not positive.
    """
    if (clip is not None and not clip > 0) or not noise >= 0:
        raise ConfigError(f"Expected a positive norm and noise of 0 or more, got {clip}, {noise}.")
    if noise and (clip is None or rng is None):
        raise ConfigError("Noise needs a clipping norm and a generator.")
    if clip is None:
        return tuple(g.detach() for g in _gradient(model, images, labels, masks))
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for row in range(len(images)):
        one = slice(row, row + 1)
        parts = _gradient(model, images[one], labels[one], [mask[one] for mask in masks])
        scale = float((clip / _norm(parts)).clamp(max=1))
        total = [known + scale * part.detach() for known, part in zip(total, parts, strict=True)]
    if noise:
        total = [known + noise * clip * torch.randn(known.shape, generator=rng) for known in total]
    return tuple(known / len(images) for known in total)


def invert_gradient(
    model: nn.Module,
    gradient: Sequence[Tensor],
    labels: Tensor,
    shape: Sequence[int],
    *,
    find_masks: bool,
    rng: torch.Generator,
    steps: int = 500,
    lr: float = 0.1,
    variation: float = 1e-3,
    mask_weight: float = 1e-3,
) -> Tensor:
    r"""Search for the images that give this gradient, from random ones, with Adam.

    Args:
        model: The network that the gradient is of, in eval mode.
        gradient: One tensor a parameter.
        labels: ``(B,)`` int64: those of the batch, which the attacker is taken to know. Of one
            example it is the only class whose last bias has a negative gradient.
        shape: ``(C, H, W)`` of an image.
        find_masks: Look for the dropout masks too; else for a network that drops nothing.
        rng: Of the first images and masks.
        steps: Steps of the search.
        lr: Size of the first of them.
        variation: :math:`\alpha`, weight of the mean absolute difference of neighbouring pixels.
        mask_weight: :math:`\beta`, weight of a mask's distance from its dropout rate.

    Returns:
        ``(B, *shape)`` in 0..1: of all that was tried, what fits the gradient best.

    Raises:
        ConfigError: The network is in training mode or drops in another way.
        InvalidMessage: The gradient is of another network, not finite, or zero.
    """
    if [part.shape for part in gradient] != [part.shape for part in model.parameters()]:
        raise InvalidMessage("Expected one tensor of the gradient a parameter, got other shapes.")
    if not 0 < float(_norm(gradient)) < float("inf"):
        raise InvalidMessage("Expected a finite gradient that is not zero, got another.")
    images = torch.rand(len(labels), *shape, generator=rng).requires_grad_()
    rates = [layer.p for layer in _dropouts(model)] if find_masks else []
    drawn = draw_masks(model, images.detach(), rng) if find_masks else ()
    masks = [mask.requires_grad_() for mask in drawn]
    sought = [images, *masks]
    optimiser = torch.optim.Adam(sought, lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimiser, [int(steps * cut) for cut in CUTS], gamma=1 / 3
    )
    least, best = float("inf"), images.detach().clone()
    for _ in range(steps):
        found = _gradient(model, images, labels, masks, create_graph=True)
        loss = _angle(found, gradient) + variation * _variation(images)
        for mask, rate in zip(masks, rates, strict=True):
            loss = loss + mask_weight * (1 - mask.mean() - rate).abs()
        if loss.item() < least:
            least, best = loss.item(), images.detach().clone()
        for tensor, slope in zip(sought, torch.autograd.grad(loss, sought), strict=True):
            tensor.grad = slope
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for tensor in sought:
                tensor.clamp_(0, 1)
    return best


def gradient_inversion(guesses: Tensor, images: Tensor, *, public: Tensor) -> Reconstruction:
    """Judge what a search found, in the order of the batch that fits best.

    Args:
        guesses: ``(B, C, H, W)``.
        images: The batch, ``(B, C, H, W)`` in 0..1.
        public: Images that the attacker has anyway, ``(P, C, H, W)``; their mean is the floor.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    rows, columns = linear_sum_assignment(torch.cdist(guesses.flatten(1), images.flatten(1)))
    seen, there = guesses[torch.from_numpy(rows)], images[torch.from_numpy(columns)]
    return Reconstruction(
        mse=float((seen - there).square().mean()),
        psnr=float(psnr(seen, there).mean()),
        floor=float(psnr(public.mean(0, keepdim=True), images).mean()),
    )


def _dropouts(model: nn.Module) -> list[nn.Dropout]:
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    if model.training or any(isinstance(module, OTHERS) for module in model.modules()):
        raise ConfigError(
            "Expected a network in eval mode whose only dropout is torch.nn.Dropout.",
            remedy="Call model.eval(); masks are given, so that they can be looked for.",
        )
    return layers


@contextmanager
def _dropping(model: nn.Module, masks: Sequence[Tensor]) -> Iterator[None]:
    """Let the dropout layers keep what the masks say; without masks they keep all."""
    layers = _dropouts(model)
    if masks and len(masks) != len(layers):
        raise ConfigError(f"Expected a mask for each of {len(layers)} layers, got {len(masks)}.")
    hooks = [
        layer.register_forward_hook(
            lambda module, inputs, _out, mask=mask: inputs[0] * mask / (1 - module.p)
        )
        for layer, mask in zip(layers, masks, strict=False)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gradient(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    with _dropping(model, masks):
        loss = F.cross_entropy(model(images), labels)
    return torch.autograd.grad(loss, [*model.parameters()], create_graph=create_graph)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()


def _angle(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    inner = torch.stack([(a * b).sum() for a, b in zip(found, wanted, strict=True)]).sum()
    return 1 - inner / (_norm(found) * _norm(wanted))


def _variation(images: Tensor) -> Tensor:
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return down + (images[..., 1:] - images[..., :-1]).abs().mean()
