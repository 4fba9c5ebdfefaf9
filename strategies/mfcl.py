r"""MFCL (Babakniya et al. NeurIPS 2023, arXiv 2311.07784): nodes draw old inputs from a generator.

After each mission the server trains its generator :math:`g` against the averaged network :math:`t`,

.. math:: L_g = \mathrm{CE}(o / \tau, \arg\max o)
    + w_{ie} \Bigl(1 + \frac{\sum_k \bar p_k \ln \bar p_k}{\ln K}\Bigr)
    + w_{bn} \frac1L \sum_l \overline{\mathrm{KL}}(\mathcal N_l \,\|\, \hat{\mathcal N}_l)
    + w_{noise} \overline{(x - \mathrm{blur}(x))^2}

with :math:`x = g(z)`, :math:`o = t(x)` over the :math:`K` classes so far, :math:`\bar p` the mean
of softmax :math:`o` over the batch (the term is 0 where all classes are equally frequent), and the
normal distributions of each channel before batch normalisation layer :math:`l`: as it was in
training, and in the batch. It is one generator for the whole run. Nodes get it with the network
before the mission, whose features are :math:`\phi^-` and head :math:`h^-`, and draw new inputs
:math:`\hat x`, with :math:`\hat y = \arg\max t(\hat x)`, for each step:

.. math:: L = \mathrm{CE}(h(\phi(x))_{current}, y)
    + w_{ft}\, \mathrm{CE}(h(\mathrm{stop}(\phi(x \cup \hat x))), y \cup \hat y)
    + w_{kd} \frac1K \overline{\|h^-(\phi(x \cup \hat x)) - h^-(\phi^-(x \cup \hat x))\|^2}

Where the release differs from the paper or from this:

* It divides outputs by 1,000 in the first term of :math:`L_g`, which leaves nearly nothing of it;
  ``temperature`` is :math:`\tau`.
* The generator's normalisation layers have ``eps`` 0.8; here the usual 1e-5.
* It computes the features for the second term in a second pass, which moves the running statistics
  twice a step; here it is the same pass.
* The learning rate falls from 0.1 to 0.01 over the rounds of a task; here it is constant.
* Published sizes are larger: a code of 1,000, a generator of width 128, 128 inputs a step, 100
  rounds a task.

Without batch normalisation in the network that term is 0; for ready features the generator makes
features, and the last term is 0.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.backbones import Encoder
from clfed.federated import records
from clfed.federated.local_training import Visit
from clfed.learners.fine_tuning import FineTuning, Loss
from clfed.learners.generators import Generator, batch_moments, moments_divergence
from clfed.seeding import generator
from clfed.strategies.base import Records
from clfed.strategies.data_free import LESSON, DataFree, DataFreeTraining
from clfed.strategies.settings import check_rates, check_weights, check_whole

GENERATOR = "generator"
BLUR_SIZE, BLUR_STD = 5, math.sqrt(2.0)


class MFCL(DataFree):
    r"""Sends a generator, see the module.

    Args:
        encoder: The network that everybody starts from.
        steps: Of the generator for each mission.
        batch_size: Inputs a step.
        code: Length of a code.
        width: Of the generator, even.
        lr: Its learning rate.
        temperature: :math:`\tau`.
        w_ie: Weight of the balance of classes.
        w_bn: Weight of the distance to the statistics of the network.
        w_noise: Weight of what blurring removes.
        options: Of :class:`~clfed.strategies.data_free.DataFree`.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        steps: int = 100,
        batch_size: int = 128,
        code: int = 256,
        width: int = 32,
        lr: float = 1e-3,
        temperature: float = 1.0,
        w_ie: float = 1.0,
        w_bn: float = 50.0,
        w_noise: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(encoder, **options)
        check_whole(1, steps=steps, code=code)
        check_whole(2, batch_size=batch_size, width=width)
        check_rates(lr=lr, temperature=temperature)
        check_weights(w_ie=w_ie, w_bn=w_bn, w_noise=w_noise)
        self.steps, self.batch_size, self.code, self.width = steps, batch_size, code, width
        self.lr, self.temperature = lr, temperature
        self.w_ie, self.w_bn, self.w_noise = w_ie, w_bn, w_noise
        self._generator: Generator | None = None

    def lesson(self, teacher: FineTuning, mission: int) -> tuple[ConfigRecord, Records]:
        """Return the generator and its sizes."""
        made = self.guided(teacher, mission)
        sizes = ConfigRecord({"code": self.code, "width": self.width})
        return sizes, {GENERATOR: ArrayRecord(made.state_dict())}

    def guided(self, teacher: FineTuning, mission: int) -> Generator:
        """Return the generator after training against a frozen network.

        Args:
            teacher: The network, in evaluation mode.
            mission: Decides, with the seed, everything random.
        """
        if self._generator is None:
            self._generator = _generator(self.encoder, self.seed, self.code, self.width)
        made, rng = self._generator.train(), generator(self.seed, "generator", mission)
        optimiser = torch.optim.Adam(made.parameters(), self.lr)
        with batch_moments(teacher.backbone) as seen:
            for _ in range(self.steps):
                inputs = made(torch.randn(self.batch_size, self.code, generator=rng))
                outputs = teacher.head(teacher.backbone(inputs))
                loss = F.cross_entropy(outputs / self.temperature, outputs.argmax(1))
                loss = loss + self.w_ie * imbalance(outputs)
                loss = loss + self.w_bn * moments_divergence(seen)
                loss = loss + self.w_noise * roughness(inputs)
                optimiser.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimiser.step()
        return made.eval()


class MFCLTraining(DataFreeTraining):
    r"""See the module.

    Args:
        w_kd: Weight of the distillation of features.
        w_ft: Weight of the cross-entropy that trains the head alone.
        options: Of :class:`~clfed.strategies.data_free.DataFreeTraining`.

    Raises:
        ConfigError: A setting is out of range.
    """

    kept: ClassVar[tuple[str, ...]] = (GENERATOR,)

    def __init__(self, *, w_kd: float = 0.1, w_ft: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        check_weights(**{"local.w_kd": w_kd, "local.w_ft": w_ft})
        self.w_kd, self.w_ft = w_kd, w_ft

    def remembering(self, network: FineTuning, visit: Visit, teacher: FineTuning) -> Loss:
        """Return the sum of the three terms."""
        lesson = records.config(visit.state, LESSON)
        code = records.integer(lesson, "code")
        made = _generator(visit.encoder, 0, code, records.integer(lesson, "width")).eval()
        made.load_state_dict(records.arrays(visit.state, GENERATOR).to_torch_state_dict())
        current, old = self.current(network, visit, teacher), network.label(teacher.classes)
        rng, transform = visit.rng("synthetic"), visit.encoder.transform

        def taught(network: FineTuning, images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                drawn = made(torch.randn(self.synthetic_batch_size, code, generator=rng))
                inputs = torch.cat([transform(images), drawn])
                if inputs.dim() == 4:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                before = teacher.head(teacher.backbone(inputs))
            features = network.backbone(inputs)
            every = torch.cat([labels, old[before[len(images) :].argmax(1)]])
            real = network.head(features[: len(images)])[:, current]
            new = F.cross_entropy(real, torch.searchsorted(current, labels))
            head = F.cross_entropy(network.head(features.detach()), every)
            kept = F.mse_loss(teacher.head(features), before)
            return new + self.w_ft * head + self.w_kd * kept

        return taught


def imbalance(outputs: Tensor) -> Tensor:
    r"""How far the classes that a batch is taken for are from equally frequent.

    .. math:: 1 + \frac{1}{\ln K} \sum_k \bar p_k \ln \bar p_k

    Args:
        outputs: ``(B, K)``.

    Returns:
        A scalar from 0, all alike, to 1, a single class; 0 where there is only one.
    """
    if outputs.shape[1] == 1:
        return outputs.new_zeros(())
    share = outputs.softmax(1).mean(0)
    missing: Tensor = 1 + torch.special.xlogy(share, share).sum() / math.log(outputs.shape[1])
    return missing


def roughness(images: Tensor) -> Tensor:
    """Mean squared difference of images and their blurred selves; 0 for ready features.

    The kernel is 5 x 5, normal with a standard deviation of the square root of 2 pixels, as the
    release's is in effect; borders are mirrored.

    Args:
        images: ``(B, C, H, W)``, at least 3 x 3.
    """
    if images.dim() != 4:
        return torch.zeros(())
    place = torch.arange(BLUR_SIZE) - BLUR_SIZE // 2
    line = (-0.5 * (place / BLUR_STD) ** 2).exp()
    kernel = torch.outer(line, line) / line.sum() ** 2
    channels = images.shape[1]
    padded = F.pad(images, [BLUR_SIZE // 2] * 4, mode="reflect")
    blurred = F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)
    return F.mse_loss(images, blurred)


def _generator(encoder: Encoder, seed: int, code: int, width: int) -> Generator:
    shape = encoder.input_shape
    return Generator.drawn(seed, shape, code=code, width=width, output="standard")
