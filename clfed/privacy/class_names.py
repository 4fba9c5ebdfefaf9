r"""Which class names may be made public: a private union of sets.

The statistics are released over a fixed public list of classes. Where the list is not known
beforehand, it must not be the union of what clients have: a name published because one client saw
the class tells that somebody saw it. Here a name becomes public only if enough clients bring it
(Korolova et al. 2009, "Releasing search queries and clicks privately"): each name that anybody
brings is counted, noise is added, and names whose noised count stays below a threshold are dropped.

With at most :math:`k` names of one client, noise :math:`P(z) \propto e^{-\varepsilon|z|/k}` hides
it in the counts of names that others bring too; a name that it alone brings is published with
probability at most :math:`P(1 + z \ge 1 + t) = q^t / (1 + q) \le \delta / k` for
:math:`q = e^{-\varepsilon/k}`, so all of them with :math:`\delta` at most.

A class that one node alone has met stays unknown, by design: open discovery by a single node and
privacy of that node's discovery exclude each other. The :math:`(\varepsilon, \delta)` spent here
add to those of the statistics.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping

from clfed.errors import ConfigError
from clfed.privacy.gaussian import check_delta, check_positive
from clfed.privacy.noise import Entropy, integer_laplace, shuffled
from clfed.prototypes.tables import checked_names


def release_class_names(
    brought: Mapping[str, Collection[str]],
    *,
    most: int,
    epsilon: float,
    delta: float,
    entropy: Entropy,
) -> tuple[str, ...]:
    r"""Class names that can be published with :math:`(\varepsilon, \delta)`-privacy of each client.

    Args:
        brought: Names that each client has seen. Of a client with more than ``most``, as many are
            drawn at random.
        most: :math:`k`, names that count of one client, at least 1.
        epsilon: :math:`\varepsilon` above 0.
        delta: :math:`\delta` in (0, 1).
        entropy: Source of randomness, see :mod:`clfed.privacy.noise`.

    Returns:
        Sorted names.

    Raises:
        ConfigError: A parameter is out of range.
        InvalidMessage: A class name is none.
    """
    least = least_support(most, epsilon, delta)
    support: Counter[str] = Counter()
    for names in brought.values():
        distinct = sorted({*checked_names([*names], "class name")})
        support.update(shuffled(distinct, entropy)[:most])
    names = sorted(support)
    noise = integer_laplace(len(names), epsilon / most, entropy).tolist()
    return tuple(
        name for name, extra in zip(names, noise, strict=True) if support[name] + extra >= least
    )


def least_support(most: int, epsilon: float, delta: float) -> int:
    r"""Noised count from which on a name is published: :math:`1 + t` of the module's docstring.

    Args:
        most: :math:`k`, at least 1.
        epsilon: :math:`\varepsilon` above 0.
        delta: :math:`\delta` in (0, 1).

    Raises:
        ConfigError: A parameter is out of range.

    Example:
        >>> least_support(most=1, epsilon=1.0, delta=1e-5)
        13
    """
    check_positive("epsilon", epsilon)
    check_delta(delta)
    if type(most) is not int or most < 1:
        raise ConfigError(f"expected at least 1 name of each client, got {most!r}")
    rate = epsilon / most
    beyond = math.log(delta / most) + math.log1p(math.exp(-rate))
    return 1 + max(1, math.ceil(-beyond / rate))
