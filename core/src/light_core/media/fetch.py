"""Fetching an item from an http(s) address of an allowed host.

A host is resolved once, every address that it has is judged, and the connection goes to one that was judged: nothing is
resolved a second time. A redirect starts over. Addresses are parsed by one parser, here, that knows far fewer forms
than others do, and what is sent is built from its parts. No proxies, no cookies, no compressed answers.

A connection goes to an IP address; the host's name is in the handshake, in its certificate and in the Host header. Who may
sign certificates is what certifi says, or what SSL_CERT_FILE or SSL_CERT_DIR of the environment say instead.
"""

import asyncio
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from light_core.errors import ConfigError, RequestError
from light_core.media.settings import MediaSettings
from light_core.media.sources import MAX_URL_CHARS, too_large

if TYPE_CHECKING:
    import httpcore
    import httpx

__all__ = ["Address", "Fetcher", "Resolver", "is_public", "parse_address"]

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Host and port to IP addresses."""

URL = re.compile(r"(https?)://([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?((?:[/?][!-~]*)?)", re.IGNORECASE)
BAD_CHARS = frozenset('\\"<>^`{|}')
PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "fec0::/10", "3fff::/20", "5f00::/16")))
"""Of the special-purpose registries, what some versions of `ipaddress` take for global: protocol assignments, site-local addresses,
documentation, segment routing."""
RELATIVE = re.compile(r"[A-Za-z0-9._~%!$&'()*+,;=@-]+(?:[/?].*)?")
"""A path that begins with a name, and has no scheme."""
REDIRECTS = frozenset([301, 302, 303, 307, 308])
CHUNK_BYTES = 1 << 16
DISTRUST = {9: "is not valid yet", 10: "has expired", 62: "is for another name", 64: "is for another name"}
"""By OpenSSL's number of what is wrong with a certificate (X509_V_ERR_*). Of most, authorities that are not known among them, no
more is said than that it is not trusted."""


@dataclass(frozen=True, slots=True)
class Address:
    """An http(s) address, taken apart. `host` is in lower case, an IPv6 address without brackets; `target` begins with /."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """As the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def parse_address(url: str) -> Address | None:
    """`url` taken apart, or None where it is anything but plain: user names, backslashes, blanks, international names in
    other than their ASCII form, and whatever else parsers disagree about."""
    plain = url.partition("#")[0]
    found = URL.fullmatch(plain) if len(url) <= MAX_URL_CHARS else None
    if found is None or set(plain) & BAD_CHARS:
        return None
    scheme, host, port, target = found[1].lower(), found[2].lower(), found[3], found[4]
    number = int(port) if port else PORTS[scheme]
    if not 0 < number < 65536 or host.startswith((".", "-")) or ".." in host:
        return None
    return Address(scheme, host.strip("[]"), number, target if target.startswith("/") else f"/{target}")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also by what is embedded in it."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a scope ("fe80::1%eth0"), or none at all
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in NAT64:  # a network without IPv4 sees every IPv4 address so
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        embedded = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(inner is not None and not is_public(str(inner)) for inner in embedded):
            return False
    if any(ip in network for network in NOT_PUBLIC if network.version == ip.version):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


async def resolve(host: str, port: int) -> list[str]:
    """The system's answer."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Fetcher:
    """Fetches for one server.

    Args:
        settings: hosts and limits.
        resolver: looks hosts up; tests bring their own.

    Raises:
        ConfigError: there are no certificates where SSL_CERT_FILE says.
    """

    def __init__(self, settings: MediaSettings, resolver: Resolver = resolve) -> None:
        self._settings, self._resolver = settings, resolver
        self._allowed = {name.lower() for name in settings.allowed_media_domains}
        self._client = _create_client() if self._allowed else None

    async def fetch(self, url: str, param: str) -> bytes:
        """The body of what is there.

        Raises:
            RequestError: the host is not allowed, cannot be reached, answers with an error, with too much, or too slowly.
        """
        try:
            async with asyncio.timeout(self._settings.fetch_timeout_s):
                for _ in range(self._settings.max_redirects + 1):
                    location, data = await self._get(url, param)
                    if location is None:
                        return data
                    url = location
        except TimeoutError:
            raise RequestError(f"{param}: the address did not answer in {self._settings.fetch_timeout_s:g} s", param) from None
        raise RequestError(f"{param}: the address redirects more than {self._settings.max_redirects} times", param)

    async def close(self) -> None:
        """Closes connections."""
        if self._client is not None:
            await self._client.aclose()

    async def _get(self, url: str, param: str) -> tuple[str | None, bytes]:
        """One request: where it redirects to, or the body."""
        import httpx

        address = parse_address(url)
        if address is None:
            raise RequestError(f"{param}: the address is not one that is understood here; write it plainly", param)
        ip = await self._judge(address, param)
        assert self._client is not None, "no host is allowed, and one has been let through"
        host = f"[{ip}]" if ":" in ip else ip
        connections: list[httpcore.AsyncNetworkStream] = []

        async def note(event: str, details: dict[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                connections.append(details["return_value"])

        request = self._client.build_request(
            "GET",
            f"{address.scheme}://{host}:{address.port}{address.target}",
            headers={"Host": address.authority, "Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "light"},
            extensions={"sni_hostname": address.host, "trace": note},
        )
        try:
            response = await self._client.send(request, stream=True)
            try:
                if response.status_code in REDIRECTS and "location" in response.headers:
                    return _absolute(address, response.headers["location"]), b""
                return None, await self._body(response, param)
            finally:
                await response.aclose()
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            why = _distrust(error)
            text = f"the host's certificate {why}" if why else "the address cannot be fetched"
            raise RequestError(f"{param}: {text}", param) from None
        finally:
            for connection in connections:  # the library forgets one whose handshake is cancelled
                await connection.aclose()

    async def _body(self, response: "httpx.Response", param: str) -> bytes:
        if response.status_code != 200:
            raise RequestError(f"{param}: the host answers with status {response.status_code}", param)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise RequestError(f"{param}: the host answers in a compressed form that was not asked for", param)
        limit = self._settings.max_media_bytes
        length = response.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > limit:
            raise too_large(self._settings, param)
        data = bytearray()
        async for chunk in response.aiter_raw(CHUNK_BYTES):
            data += chunk
            if len(data) > limit:
                raise too_large(self._settings, param)
        return bytes(data)

    async def _judge(self, address: Address, param: str) -> str:
        """The IP address to connect to."""
        named = address.host if address.port == PORTS[address.scheme] else ""
        pair = f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"
        if named not in self._allowed and pair not in self._allowed:
            raise RequestError(f"{param}: the host is not among those that are allowed here", param)
        if _is_ip(address.host):  # it stands in the list itself: nothing is resolved
            return address.host
        try:
            found = await self._resolver(address.host, address.port)
        except (OSError, UnicodeError):
            found = []
        if not found or not all(is_public(ip) for ip in found):
            raise RequestError(f"{param}: the host cannot be used", param)
        return found[0]


def _create_client() -> "httpx.AsyncClient":
    """A connection serves one request: the next may be for another name at the same address."""
    import httpx

    limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
    try:
        authorities = httpx.create_ssl_context()
    except OSError as error:
        raise ConfigError(
            "the certificate authorities for --allowed-media-domains cannot be read",
            f"SSL_CERT_FILE={os.environ.get('SSL_CERT_FILE')!r}: {error.strerror or type(error).__name__}",
            "have SSL_CERT_FILE name a file of certificates in PEM, or unset it",
        ) from None
    return httpx.AsyncClient(verify=authorities, follow_redirects=False, trust_env=False, timeout=None, limits=limits)


def _distrust(error: BaseException | None) -> str | None:
    """What is wrong with the host's certificate, if it is for that that a connection failed."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return None if error is None else DISTRUST.get(error.verify_code, "is not trusted here")


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _absolute(base: Address, location: str) -> str:
    """Where a redirect leads; what is neither an address nor a path is left to the parser to refuse."""
    if RELATIVE.fullmatch(location):
        location = base.target.partition("?")[0].rpartition("/")[0] + "/" + location
    if location.startswith("/") and not location.startswith("//"):
        return f"{base.scheme}://{base.authority}{location}"
    return location
