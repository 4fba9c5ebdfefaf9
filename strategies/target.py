r"""TARGET (Zhang et al. ICCV 2023, arXiv 2303.06937): nodes rehearse what the server made up.

After each mission the server makes images that the averaged network :math:`t` takes for its
classes. Codes :math:`z` and a copy of a generator :math:`g` are fitted to each batch of drawn
classes :math:`y`,

.. math:: \min_{g, z}\; \lambda_{bn} \sum_l \left( \|\mu_l - \hat\mu_l\|_2
    + \|\sigma^2_l - \hat\sigma^2_l\|_2 \right) + \lambda_{oh}\, \mathrm{CE}(t(g(z)), y)
    - \lambda_{adv}\, \overline{[\arg\max s = \arg\max t]\; \mathrm{KL}(t(g(z)) \| s(g(z)))}

where :math:`\mu_l, \sigma^2_l` are the running statistics of batch normalisation layer :math:`l`,
the hats those of the batch, smoothed over batches, and :math:`s` a student that learns from the
images so far. The last term asks for images that the student does not know yet. The generator
itself follows the gradients of its copies (first-order MAML). At nodes

.. math:: L = \mathrm{CE}(f(x)_{current}, y) + \lambda_{kd}\, \mathrm{KL}(\mathrm{softmax}(t(\hat x)
    / T) \,\|\, \mathrm{softmax}(f(\hat x)_{old} / T))

Where the release (settings for CIFAR-100) differs from the paper or from this:

* It makes 10 batches and lets the student and the adversarial term begin after 20, so neither ever
  runs, and 2,560 images exist instead of 8,000. Here both run, from batch ``warmup`` on.
* It crops and flips images at random, made-up and real ones. Here nothing is augmented.
* So many made-up images go with a batch that a pass over the real ones is one over all of them,
  about 1,000. Here their number is a setting, and the student's learning rate is constant.
* Published sizes are larger, see ``conf/strategy/target.yaml``.

Without batch normalisation that term is 0. For ready features the generator makes features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from clfed.backbones import Encoder
from clfed.errors import ConfigError
from clfed.federated import records
from clfed.federated.local_training import Visit
from clfed.learners.fine_tuning import FineTuning, Loss
from clfed.learners.generators import (
    Generator,
    Moments,
    batch_moments,
    mixed_moments,
    moments_distance,
)
from clfed.learners.losses import soft_divergence
from clfed.learners.training import initialisation
from clfed.seeding import derive_seed, generator
from clfed.strategies.base import Records
from clfed.strategies.data_free import DataFree, DataFreeTraining
from clfed.strategies.settings import check_rates, check_weights, check_whole

IMAGES = "images"
BETAS = (0.5, 0.999)
STUDENT_TEMPERATURE = 20.0


class TARGET(DataFree):
    r"""Sends images that the server makes, see the module.

    Args:
        encoder: The network that everybody starts from.
        images: Number of images made for each mission.
        batch_size: Images made at once, and images a step of the student.
        steps: Of the codes and the generator's copy for each batch.
        warmup: Batches before the student and the adversarial term begin.
        student_steps: Of the student before each batch from then on.
        student_lr: Its learning rate.
        code: Length of a code.
        width: Of the generator, even.
        lr: Learning rate of the generator's copies; the generator's own is ``steps`` times it.
        code_lr: Learning rate of codes.
        bn: :math:`\lambda_{bn}`.
        bn_momentum: Weight of earlier batches in the smoothed statistics.
        oh: :math:`\lambda_{oh}`.
        adv: :math:`\lambda_{adv}`.
        options: Of :class:`~clfed.strategies.data_free.DataFree`.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        images: int = 1024,
        batch_size: int = 128,
        steps: int = 10,
        warmup: int = 2,
        student_steps: int = 20,
        student_lr: float = 0.2,
        code: int = 256,
        width: int = 32,
        lr: float = 2e-3,
        code_lr: float = 1e-2,
        bn: float = 10.0,
        bn_momentum: float = 0.9,
        oh: float = 0.5,
        adv: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(encoder, **options)
        check_whole(1, images=images, steps=steps, warmup=warmup, code=code)
        check_whole(2, batch_size=batch_size, width=width)
        check_whole(0, student_steps=student_steps)
        check_weights(bn=bn, oh=oh, adv=adv, bn_momentum=bn_momentum)
        check_rates(lr=lr, code_lr=code_lr, student_lr=student_lr)
        if bn_momentum >= 1:
            raise ConfigError(f"strategy.bn_momentum must be below 1, got {bn_momentum}.")
        self.images, self.batch_size, self.steps, self.warmup = images, batch_size, steps, warmup
        self.student_steps, self.student_lr = student_steps, student_lr
        self.code, self.width, self.lr, self.code_lr = code, width, lr, code_lr
        self.bn, self.bn_momentum, self.oh, self.adv = bn, bn_momentum, oh, adv

    def lesson(self, teacher: FineTuning, mission: int) -> tuple[ConfigRecord, Records]:
        """Return the images."""
        made = self.synthesise(teacher, mission)
        return ConfigRecord(), {IMAGES: ArrayRecord({IMAGES: Array(made.numpy())})}

    def synthesise(self, teacher: FineTuning, mission: int) -> Tensor:
        """Make images that a frozen network takes for its classes.

        Args:
            teacher: The network, in evaluation mode.
            mission: Decides, with the seed, everything random.

        Returns:
            ``(images, C, H, W)`` uint8, or ``(images, D)`` float32 for ready features.
        """
        rng = generator(self.seed, "synthesis", mission)
        seed = derive_seed(self.seed, "synthesis", mission)
        shape = self.encoder.input_shape
        maker = Generator.drawn(seed, shape, code=self.code, width=self.width)
        meta = torch.optim.Adam(maker.parameters(), self.lr * self.steps, betas=BETAS)
        student = _Student(teacher, seed, self.student_lr)
        made: list[Tensor] = []
        smoothed: dict[_BatchNorm, Moments] = {}
        with batch_moments(teacher.backbone) as seen:
            for number in range(math.ceil(self.images / self.batch_size)):
                challenged = self.adv > 0 and number >= self.warmup
                if challenged:
                    student.learn(torch.cat(made), self.student_steps, self.batch_size, rng)
                rival = student.network if challenged else None
                made.append(self._batch(teacher, rival, maker, meta, seen, smoothed, rng))
        return torch.cat(made)[: self.images]

    def _batch(
        self,
        teacher: FineTuning,
        student: FineTuning | None,
        maker: Generator,
        meta: torch.optim.Optimizer,
        seen: Mapping[_BatchNorm, Moments],
        smoothed: dict[_BatchNorm, Moments],
        rng: torch.Generator,
    ) -> Tensor:
        """Fit codes and a copy of the generator; return the images of the step of least loss."""
        codes = torch.randn(self.batch_size, self.code, generator=rng).requires_grad_()
        wanted = torch.randint(len(teacher.classes), (self.batch_size,), generator=rng)
        fast = copy.deepcopy(maker)
        groups: list[dict[str, Any]] = [
            {"params": fast.parameters()},
            {"params": [codes], "lr": self.code_lr},
        ]
        optimiser = torch.optim.Adam(groups, self.lr, betas=BETAS)
        meta.zero_grad(set_to_none=True)
        best, least = torch.empty(0), math.inf
        for _ in range(self.steps):
            made = fast(codes)
            outputs = teacher(_scaled(made))
            loss = self.oh * F.cross_entropy(outputs, wanted)
            loss = loss + self.bn * moments_distance(seen, smoothed, self.bn_momentum)
            if student is not None:
                loss = loss - self.adv * disagreement(outputs, student(_scaled(made)))
            if loss.item() < least or not len(best):
                best, least = _stored(made.detach()), loss.item()
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            for slow, quick in zip(maker.parameters(), fast.parameters(), strict=True):
                if quick.grad is not None:
                    slow.grad = quick.grad.clone() if slow.grad is None else slow.grad + quick.grad
            optimiser.step()
        meta.step()
        for layer, now in seen.items():
            mean, variance = mixed_moments(now, smoothed.get(layer), self.bn_momentum)
            smoothed[layer] = mean.detach(), variance.detach()
        return best


class TARGETTraining(DataFreeTraining):
    r"""See the module.

    Args:
        kd: :math:`\lambda_{kd}`.
        temperature: :math:`T`; as released, the distillation is not multiplied by its square.
        options: Of :class:`~clfed.strategies.data_free.DataFreeTraining`.

    Raises:
        ConfigError: A setting is out of range.
    """

    kept: ClassVar[tuple[str, ...]] = (IMAGES,)

    def __init__(self, *, kd: float = 25.0, temperature: float = 2.0, **options: Any) -> None:
        super().__init__(**options)
        check_weights(**{"local.kd": kd})
        check_rates(**{"local.temperature": temperature})
        self.kd, self.temperature = kd, temperature

    def remembering(self, network: FineTuning, visit: Visit, teacher: FineTuning) -> Loss:
        """Return cross-entropy over current classes with distillation of old ones."""
        made = records.arrays(visit.state, IMAGES)
        images = torch.from_numpy(records.array(made, IMAGES).numpy().copy())
        current, old = self.current(network, visit, teacher), network.label(teacher.classes)
        rng, count = visit.rng("synthetic"), self.synthetic_batch_size

        def taught(network: FineTuning, real: Tensor, labels: Tensor) -> Tensor:
            drawn = images[torch.randperm(len(images), generator=rng)[:count]]
            with torch.no_grad():
                before = teacher(drawn)
            new = F.cross_entropy(network(real)[:, current], torch.searchsorted(current, labels))
            kept = soft_divergence(before, network(drawn)[:, old], self.temperature)
            return new + self.kd * kept

        return taught


class _Student:
    """A network like the teacher that starts anew and learns what the teacher says."""

    def __init__(self, teacher: FineTuning, seed: int, lr: float) -> None:
        self.teacher, self.network = teacher, copy.deepcopy(teacher).requires_grad_(True)
        with initialisation(seed, "student"):
            for layer in self.network.modules():
                if callable(reset := getattr(layer, "reset_parameters", None)):
                    reset()
        self._optimiser = torch.optim.SGD(
            self.network.parameters(), lr, momentum=0.9, weight_decay=1e-4
        )

    def learn(self, images: Tensor, steps: int, batch_size: int, rng: torch.Generator) -> None:
        """Train on images; leaves the network in evaluation mode and without gradients."""
        self.network.train().requires_grad_(True)
        for _ in range(steps):
            drawn = images[torch.randperm(len(images), generator=rng)[:batch_size]]
            with torch.no_grad():
                told = self.teacher(drawn)
            loss = soft_divergence(told, self.network(drawn), STUDENT_TEMPERATURE)
            self._optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss * STUDENT_TEMPERATURE**2)
            self._optimiser.step()
        self.network.eval().requires_grad_(False)


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean divergence of a student from its teacher; it is 0 where they name different classes.

    Args:
        teacher: Outputs, ``(B, C)``.
        student: Outputs, ``(B, C)``.
    """
    each = F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    return (each * (student.argmax(1) == teacher.argmax(1))).mean()


def _scaled(made: Tensor) -> Tensor:
    """Return what a network takes for images: numbers from 0 to 255."""
    return 255 * made if made.dim() == 4 else made


def _stored(made: Tensor) -> Tensor:
    return (255 * made).round().to(torch.uint8) if made.dim() == 4 else made
