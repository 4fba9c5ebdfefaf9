"""X.509 certificates as values: what an authority and its server say of themselves (RFC 5280).

They pass OpenSSL's strict checks (``X509_V_FLAG_X509_STRICT``).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from clfed.errors import InvalidMessage

# What the library raises while it takes a damaged certificate apart.
_DAMAGED = (ValueError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension)
# A node whose clock is a little slow can use a certificate that was made a minute ago.
_SLACK = timedelta(days=1)


def authority_certificate(
    key: ec.EllipticCurvePrivateKey, name: str, start: datetime, end: datetime
) -> bytes:
    """Certificate (PEM) by which an authority introduces itself.

    Args:
        key: Its own key, which signs.
        name: Common name, 1 to 64 bytes in UTF-8.
        start: Time of the issue, with its time zone.
        end: First moment at which it is no longer valid.
    """
    subject = _named(name)
    builder = (
        _builder(subject, subject, key.public_key(), key.public_key(), start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(issues=True), critical=True)
    )
    return _signed(builder, key)


def server_certificate(
    key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    start: datetime,
    end: datetime,
) -> bytes:
    """Certificate (PEM) of a server, issued by an authority that it does not outlive.

    Args:
        key: Of the server.
        hosts: Its names and IP addresses, as ``parse_host`` returns them.
        authority: Certificate of the issuer.
        authority_key: Key of the issuer.
        start: Time of the issue, with its time zone.
        end: First moment at which it is no longer valid.
    """
    end = min(end, authority.not_valid_after_utc)
    names = x509.SubjectAlternativeName([*map(_general_name, hosts)])
    subject = _named("clfed server")
    builder = (
        _builder(subject, authority.subject, key, authority_key.public_key(), start, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(issues=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
    )
    return _signed(builder, authority_key)


def read_certificate(pem: bytes, source: str) -> x509.Certificate:
    """Read one certificate.

    Args:
        pem: Text in PEM form.
        source: Where it came from, for the message.

    Raises:
        InvalidMessage: Damaged, or not exactly one certificate.
    """
    try:
        (certificate,) = x509.load_pem_x509_certificates(pem)
    except _DAMAGED as error:
        raise InvalidMessage(
            f"Expected one certificate in PEM form in {source}, got {len(pem)} bytes of something "
            "else.",
            remedy="Copy the file again from the federation folder, unchanged.",
        ) from error
    return certificate


def check_authority(pem: bytes) -> x509.Certificate:
    """Return the one self-signed authority that a PEM text holds.

    Raises:
        InvalidMessage: Damaged, more than one certificate, or none that may issue others.
    """
    certificate = read_certificate(pem, "the given authority")
    try:
        certificate.verify_directly_issued_by(certificate)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        sound = constraints.value.ca
    except (*_DAMAGED, InvalidSignature, TypeError, x509.ExtensionNotFound):
        sound = False
    if not sound:
        raise InvalidMessage(
            "Expected the certificate of an authority that signed itself, got another one or a "
            "damaged one.",
            remedy="Take ca.pem of the federation folder, unchanged.",
        )
    return certificate


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Names and IP addresses that a certificate is for; none where it says nothing readable."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (*_DAMAGED, x509.ExtensionNotFound):
        return []
    return [str(name.value) for name in names]


def common_name(name: x509.Name) -> str:
    """The part of a subject or issuer that people read; empty where there is none."""
    return ", ".join(str(part.value) for part in name.get_attributes_for_oid(NameOID.COMMON_NAME))


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    start: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    # The identifiers of both keys tell authorities of the same name apart.
    own = x509.SubjectKeyIdentifier.from_public_key(key)
    other = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    return (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        .not_valid_before(start - _SLACK)
        .not_valid_after(end)
        .add_extension(own, critical=False)
        .add_extension(other, critical=False)
    )


def _usage(*, issues: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not issues,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=issues,
        crl_sign=issues,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
