r"""How well a model forgets some classes and keeps others, in one number.

Zhao et al. 2024 (arXiv 2403.11530) take the harmonic mean of what is kept and what is lost.
"""

from __future__ import annotations

from clfed.errors import ConfigError


def h_mean(kept: float, before: float, after: float) -> float:
    r"""Harmonic mean of the accuracy on what stays and the drop of it on what goes.

    .. math:: H = \frac{2\, \mathrm{Acc}_r\, \mathrm{Drop}}{\mathrm{Acc}_r + \mathrm{Drop}},
              \qquad \mathrm{Drop} = \mathrm{Acc}_f^{\text{before}} - \mathrm{Acc}_f^{\text{after}}

    It is 0 where nothing was forgotten, also where the forget set is answered better than before.

    Args:
        kept: :math:`\mathrm{Acc}_r` after the request, in [0, 1].
        before: :math:`\mathrm{Acc}_f` before it, in [0, 1].
        after: :math:`\mathrm{Acc}_f` after it, in [0, 1].

    Raises:
        ConfigError: Something else than a fraction.

    Example:
        >>> round(h_mean(0.8, before=0.9, after=0.1), 6)
        0.8
    """
    if not all(0 <= value <= 1 for value in (kept, before, after)):
        raise ConfigError(f"Expected accuracies in [0, 1], got {kept}, {before} and {after}.")
    drop = max(before - after, 0.0)
    return 2 * kept * drop / (kept + drop) if kept * drop > 0 else 0.0
