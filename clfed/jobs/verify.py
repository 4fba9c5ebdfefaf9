"""Whether a certificate of unlearning holds: ``clfed job=verify job.certificate=FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clfed.config import build, one_sentence
from clfed.errors import CertificateError, ConfigError
from clfed.federated.field import open_benchmark
from clfed.reporting.console import console
from clfed.scenarios.holdings import Holdings
from clfed.unlearning.certificate import FILE, MODEL, Certificate, read
from clfed.unlearning.signatures import read_public_key
from clfed.unlearning.verification import Check, verify

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: DictConfig) -> list[Check]:
    """Print one line for each check of a certificate.

    Of a run: the model is the file ``model.pt`` beside it, the certificates before it lie in the
    folders beside its own, and the run's ``config.yaml`` two folders above says where the data come
    from. Of a federation: the certificates before it lie beside it, and one folder above is what it
    speaks of, the server's folder or a node's state directory.

    Args:
        cfg: The resolved configuration; only ``job`` counts.

    Returns:
        The checks, all of which hold.

    Raises:
        ConfigError: No certificate is named, or an option is of another kind.
        CertificateError: A check fails, or a file is missing or damaged.
    """
    path, key = cfg.job.certificate, cfg.job.public_key
    if not isinstance(path, str) or not path:
        raise ConfigError(
            f"Expected job.certificate as a file, got {path!r}.",
            remedy="clfed job=verify job.certificate=RUN/requests/01-class/certificate.json",
        )
    if not isinstance(cfg.job.data, bool) or not isinstance(key, str | None):
        raise ConfigError(
            "Expected job.data as true or false and job.public_key as a file or null, got "
            f"{cfg.job.data!r} and {key!r}."
        )
    file = Path(path)
    certificate = read(file)
    public_key = None if key is None else read_public_key(key)
    if certificate.model_file is None:
        from clfed.deploy import verification

        checks = verification.verify(file, certificate, public_key=public_key)
    else:
        checks = verify(
            certificate,
            model_file=file.parent / MODEL,
            previous=_before(file, certificate),
            holdings=_data(file.absolute().parents[2] / "config.yaml") if cfg.job.data else None,
            public_key=public_key,
        )
    for check in checks:
        state = "ok    " if check.ok else "failed"
        console().print(f"{state}  {check.name}: {check.sentence}", markup=False, soft_wrap=True)
    failed = next((check for check in checks if not check.ok), None)
    if failed is not None:
        raise CertificateError(f"{path} does not hold, {failed.name}: {failed.sentence}")
    return checks


def _before(file: Path, certificate: Certificate) -> list[Certificate]:
    folder = file.absolute().parent.parent
    found = []
    for number in range(1, certificate.number):
        places = sorted(folder.glob(f"{number:02d}-*/{FILE}"))
        if len(places) != 1:
            raise CertificateError(
                f"Expected one certificate number {number} in {folder}, got {len(places)}."
            )
        found.append(read(places[0]))
    return found


def _data(path: Path) -> Holdings:
    from omegaconf import OmegaConf

    try:
        plain: Any = OmegaConf.to_container(OmegaConf.load(path))
        data, scenario, seed = plain["data"], plain["scenario"], plain["seed"]
        targets = [part["_target_"] for part in (data, scenario)]
    except Exception as error:  # a foreign file may hold anything
        raise CertificateError(
            f"Expected the configuration of the run at {path}, got: {one_sentence(error)}",
            remedy="Keep it there, or leave the data out with job.data=false.",
        ) from error
    # What a file names would be run, so a file that came with a certificate may not name anything.
    foreign = [
        name for name in targets if not str(name).startswith(("clfed.data.", "clfed.scenarios."))
    ]
    if foreign:
        raise CertificateError(
            f"Expected data and scenario of clfed itself in {path}, got {foreign[0]!r}.",
            remedy="Leave the data out with job.data=false.",
        )
    holdings = build(scenario, benchmark=open_benchmark(data), seed=seed)
    if not isinstance(holdings, Holdings):
        raise CertificateError(f"Expected scenario=holdings in {path}, got {targets[1]!r}.")
    return holdings
