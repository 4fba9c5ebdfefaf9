"""What a node finds out about its server before anything else starts.

Flower's own processes retry for ever, or end with a traceback, where a person needs one sentence.
"""

from __future__ import annotations

import math
import socket
import ssl
import time
from datetime import UTC, datetime

from cryptography import x509

from clfed.deploy.address import parse_address
from clfed.deploy.certificates import check_authority, common_name, hosts_of
from clfed.deploy.keys import days_left
from clfed.errors import (
    ClfedError,
    ConfigError,
    ExpiredCertificate,
    Unreachable,
    UntrustedServer,
)

_PAUSE = 0.25  # seconds between two attempts
_ATTEMPT = 5.0  # seconds for one of the addresses that a name stands for
_SECOND_LOOK = 2.0  # seconds to find out what to say about a server that is refused
# X509_V_ERR_* of OpenSSL's x509_vfy.h; the ssl module has no names for them.
_DATES = {9, 10}  # CERT_NOT_YET_VALID, CERT_HAS_EXPIRED
_NAMES = {62, 64}  # HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH


def check_server(address: str, authority_pem: bytes, *, wait: float = 30.0) -> float:
    """Connect as a node would, trusting the federation's authority alone.

    Waits for a server that is still starting. A refusal may take 2 s more, to learn its reason.

    Args:
        address: ``host:port``.
        authority_pem: Certificate of the federation's authority.
        wait: Seconds in which the server has to answer, more than 0. Looking up a name takes as
            long as this machine's resolver allows, which may be longer.

    Returns:
        Days until the server's certificate expires.

    Raises:
        ConfigError: The address or the wait is none.
        InvalidMessage: The authority's certificate is damaged.
        Unreachable: Nobody answered; names the last reason.
        UntrustedServer: The certificate is from another authority or for other addresses, or what
            answers does not speak TLS.
        ExpiredCertificate: By this machine's clock a certificate is not valid; names the dates.
    """
    host, port = parse_address(address)
    if not 0 < wait < math.inf:
        raise ConfigError(f"Expected a wait of more than 0 seconds, got {wait!r}.")
    authority = check_authority(authority_pem)
    context = ssl.create_default_context(cadata=authority_pem.decode("ascii"))
    deadline = time.monotonic() + wait
    while True:
        try:
            return days_left(_pem(_handshake(host, port, context, deadline)))
        except ssl.SSLCertVerificationError as error:
            raise _refusal(address, host, _shown(host, port), authority, error) from error
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError):
            reason = "it closed the connection"
        except ssl.SSLError as error:
            raise _no_tls(address, host, port, error) from error
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() + _PAUSE >= deadline:
            raise Unreachable(
                f"Expected a clfed server at {address} within {wait:g} s, got none: {reason}."
            )
        time.sleep(_PAUSE)


def _handshake(host: str, port: int, context: ssl.SSLContext, deadline: float) -> bytes:
    """Return the server's certificate (DER) after a handshake that ends before the deadline."""
    with _connect(host, port, deadline) as plain:
        plain.settimeout(_left(deadline))
        try:
            with context.wrap_socket(plain, server_hostname=host) as secured:
                return secured.getpeercert(binary_form=True) or b""
        except TimeoutError as error:
            raise TimeoutError("it accepted the connection and did not answer") from error


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """Connect to the first address of a host that answers; raises the last one's ``OSError``."""
    failure = OSError("the name stands for no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        candidate = socket.socket(family, kind, protocol)
        try:
            candidate.settimeout(min(_ATTEMPT, _left(deadline)))
            candidate.connect(place)
        except OSError as error:
            candidate.close()
            failure = error
        else:
            return candidate
    raise failure


def _left(deadline: float) -> float:
    """Seconds for a socket, which takes 0 for "never wait"."""
    return max(deadline - time.monotonic(), 0.01)


def _pem(der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(der).encode("ascii")


def _shown(host: str, port: int) -> x509.Certificate | None:
    """The certificate that a server shows to those who do not check it; None if it cannot be had.

    It explains a refusal and decides nothing.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        der = _handshake(host, port, context, time.monotonic() + _SECOND_LOOK)
        return x509.load_der_x509_certificate(der)
    except (OSError, ValueError, x509.InvalidVersion):
        return None


def _refusal(
    address: str,
    host: str,
    shown: x509.Certificate | None,
    authority: x509.Certificate,
    error: ssl.SSLCertVerificationError,
) -> ClfedError:
    if error.verify_code in _DATES:
        return _outdated(address, shown, authority)
    if error.verify_code in _NAMES:
        names = ", ".join(hosts_of(shown)) if shown else ""
        return UntrustedServer(
            f"Expected at {address} a certificate for {host}, got one for {names or 'others'}.",
            remedy="Use one of these addresses, or renew the server's certificate for this one.",
        )
    return UntrustedServer(
        f"Expected at {address} a certificate that {common_name(authority.subject)!r} issued, got "
        f"one of {common_name(shown.issuer) if shown else 'another authority'!r}: "
        f"{error.verify_message}."
    )


def _outdated(
    address: str, shown: x509.Certificate | None, authority: x509.Certificate
) -> ExpiredCertificate:
    now = datetime.now(UTC)
    own = authority.not_valid_before_utc <= now <= authority.not_valid_after_utc
    certificate = shown if own else authority
    period = "another time"
    if certificate is not None:
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        period = f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
    return ExpiredCertificate(
        f"Expected {'the server' if own else 'the authority of the server'} at {address} to have a "
        f"certificate for {now:%Y-%m-%d %H:%M} UTC, this machine's time, got one for {period}."
    )


def _no_tls(address: str, host: str, port: int, error: ssl.SSLError) -> UntrustedServer:
    got = "plain HTTP" if _speaks_http(host, port) else f"something else ({error.reason})"
    return UntrustedServer(
        f"Expected a server at {address} that speaks TLS, got {got}.",
        remedy="Check the port, and start the server with clfed serve, which uses certificates.",
    )


def _speaks_http(host: str, port: int) -> bool:
    deadline = time.monotonic() + _SECOND_LOOK
    try:
        with _connect(host, port, deadline) as plain:
            plain.settimeout(_left(deadline))
            plain.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return plain.recv(5) == b"HTTP/"
    except OSError:
        return False
