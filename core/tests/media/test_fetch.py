"""Addresses: only allowed hosts, only public addresses of theirs, resolved once; nothing that a host answers hangs us."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from authority import Authority

from light_core.errors import ConfigError, RequestError
from light_core.media.fetch import Address, Fetcher, is_public, parse_address
from light_core.media.settings import MediaSettings

BODY = b"the bytes of a picture"
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Host:
    """An HTTP server that counts and answers as it is told: target to a whole answer, or to what writes one."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Answer] = {}
        self.requests: list[dict[str, str]] = []
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(self.serve(reader, writer)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.answer(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            target = lines[0].split()[1]
            self.requests.append(
                {"target": target} | {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            )
            answer = self.answers.get(target, plain(BODY))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)


def plain(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str) -> bytes:
    return plain(b"", f"Location: {location}", status="302 Found")


@asynccontextmanager
async def hosting(tls: ssl.SSLContext | None = None) -> AsyncIterator[Host]:
    host = Host()
    server = await asyncio.start_server(host.accept, "127.0.0.1", 0, ssl=tls)
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        server.close()
        await host.close()


@asynccontextmanager
async def fetching(host: Host, *domains: str, answers: object = None, **settings: object) -> AsyncIterator[Fetcher]:
    """A fetcher that may fetch from the host by its IP address, and from `domains`; `answers` are what names resolve to."""
    looked_up = iter(answers) if isinstance(answers, list) else None

    async def resolve(name: str, port: int) -> list[str]:
        if looked_up is None:
            raise AssertionError(f"{name} is looked up")
        return next(looked_up)

    patient = {"fetch_timeout_s": 600.0} | settings
    fetcher = Fetcher(MediaSettings(allowed_media_domains=(f"127.0.0.1:{host.port}", *domains), **patient), resolve)
    try:
        yield fetcher
    finally:
        await fetcher.close()


async def refused(fetcher: Fetcher, url: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        await fetcher.fetch(url, "image_url")
    text = str(caught.value)
    assert text.startswith("image_url: ") and caught.value.param == "image_url"
    assert "127.0.0.1" not in text and "10.0.0" not in text, "an address gets out"


async def test_an_allowed_host_is_fetched() -> None:
    async with hosting() as host, fetching(host) as fetcher:
        assert await fetcher.fetch(f"http://127.0.0.1:{host.port}/a.png?x=1#part", "image_url") == BODY
        assert host.requests[0]["target"] == "/a.png?x=1" and host.requests[0]["host"] == f"127.0.0.1:{host.port}"
        assert host.requests[0]["accept-encoding"] == "identity" and "cookie" not in host.requests[0]


BLOCKED = [
    "http://127.0.0.1/",
    "http://127.0.0.1:1/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://0.0.0.0:{port}/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.0.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://2130706433:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://0x7f000001:{port}/",
    "http://127.1:{port}/",
    "http://localhost:{port}/",
    "http://localhost.:{port}/",
    "https://ok\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@evil/",
    "http://ok#@127.0.0.1:{port}/",
    "http://user@127.0.0.1:{port}/",
    "http://user:pass@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}@evil.test/",
    "http://127。0。0。1:{port}/",
    "http://①②⑦.0.0.1:{port}/",
    "http://evil.test:{port}/",
    "http://127.0.0.1:{port}.evil.test/",
    "http://127.0.0.1.:{port}/",
    "http://127.0.0.1:0{port}0/",
    "http:127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http:// 127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/a b",
    "http://127.0.0.1:{port}/\r\nX: y",
    "http://127.0.0.1:{port}/\x00",
    "gopher://127.0.0.1:{port}/",
    "ftp://127.0.0.1:{port}/",
]


async def test_nothing_else_is_touched() -> None:
    async with hosting() as host, fetching(host) as fetcher:
        for url in BLOCKED:
            await refused(fetcher, url.format(port=host.port), "not among those|not one that is understood")
        assert host.requests == []


async def test_an_allowed_name_must_be_public() -> None:
    private = [
        "127.0.0.1",
        "::1",
        "::ffff:127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "fd00::1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "224.0.0.1",
    ]
    async with hosting() as host:
        for answer in [[one] for one in private] + [["93.184.215.14", "127.0.0.1"], [], ["nonsense"]]:
            async with fetching(host, f"pictures.test:{host.port}", answers=[answer]) as fetcher:
                await refused(fetcher, f"http://pictures.test:{host.port}/", "host cannot be used")
        assert host.requests == []


async def test_a_name_is_resolved_once_and_the_connection_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    # A rebinding name: a public address when it is judged, ours when somebody asks again.
    monkeypatch.setattr("light_core.media.fetch.is_public", lambda ip: ip == "127.0.0.1")
    async with hosting() as host, fetching(host, f"pictures.test:{host.port}", answers=[["127.0.0.1"]]) as fetcher:
        assert await fetcher.fetch(f"http://PICTURES.test:{host.port}/x", "image_url") == BODY
        assert host.requests[0]["host"] == f"pictures.test:{host.port}"
    async with hosting() as host, fetching(host, f"pictures.test:{host.port}", answers=[["192.0.2.1"], ["127.0.0.1"]]) as fetcher:
        await refused(fetcher, f"http://pictures.test:{host.port}/", "host cannot be used")
        assert host.requests == []


async def test_every_redirect_is_judged() -> None:
    async with hosting() as host, fetching(host, "pictures.test", answers=[["10.0.0.7"]] * 9) as fetcher:
        base = f"http://127.0.0.1:{host.port}"
        host.answers |= {
            "/one": redirect("/two"),
            "/two": redirect(f"{base}/three"),
            "/three": redirect("/four"),
            "/loop": redirect("/loop"),
            "/private": redirect("http://10.0.0.7/"),
            "/name": redirect("http://pictures.test/"),
            "/file": redirect("file:///etc/passwd"),
            "/relative": redirect("//evil.test/"),
            "/deep/near?x=1": redirect("three.png?y=2"),
            "/deep/three.png?y=2": redirect("../three"),
            "/deep/../three": plain(BODY),
            "/scheme": redirect("javascript:alert(1)"),
            "/strange": redirect("http://127.0.0.1\\@evil/"),
            "/user": redirect(f"http://me@127.0.0.1:{host.port}/"),
        }
        assert await fetcher.fetch(f"{base}/one", "image_url") == BODY
        assert await fetcher.fetch(f"{base}/deep/near?x=1", "image_url") == BODY
        await refused(fetcher, f"{base}/scheme", "cannot be fetched")
        await refused(fetcher, f"{base}/loop", "redirects more than 3 times")
        for target, words in (("private", "not among"), ("name", "cannot be used"), ("file", "not one that"), ("relative", "not one that")):
            await refused(fetcher, f"{base}/{target}", words)
        for target in ("strange", "user"):
            await refused(fetcher, f"{base}/{target}", "not one that is understood")


async def test_answers_are_bounded() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(bytes(65536))
            await writer.drain()

    async with hosting() as host, fetching(host, fetch_timeout_s=60.0, max_media_bytes=200_000) as fetcher:
        host.answers |= {
            "/endless": endless,
            "/large": plain(b"").replace(b"Content-Length: 0", b"Content-Length: 10737418240"),
            "/lying": plain(b"").replace(b"Content-Length: 0", b"Content-Length: -5"),
            "/zipped": plain(b"x", "Content-Encoding: gzip"),
            "/gone": plain(b"no", status="404 Not Found"),
            "/broken": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
            "/nonsense": b"SSH-2.0-OpenSSH\r\n\r\n",
            "/heads": b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 1000) for i in range(2000)) + b"\r\n",
            "/fits": plain(bytes(200_000)),
        }
        base = f"http://127.0.0.1:{host.port}"
        for target, words in {
            "endless": "more than 200000 bytes",
            "large": "more than 200000 bytes",
            "lying": "cannot be fetched|more than",
            "zipped": "compressed form",
            "gone": "status 404",
            "broken": "cannot be fetched",
            "nonsense": "cannot be fetched",
            "heads": "cannot be fetched",
        }.items():
            await refused(fetcher, f"{base}/{target}", words)
        assert len(await fetcher.fetch(f"{base}/fits", "image_url")) == 200_000
        port = host.port
    async with fetching(host) as fetcher:
        await refused(fetcher, f"http://127.0.0.1:{port}/", "cannot be fetched")


async def test_slow_answers_are_given_up() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def silent(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(600)

    async with hosting() as host, fetching(host, fetch_timeout_s=0.25) as fetcher:
        host.answers |= {"/slow": slow, "/silent": silent}
        for target in host.answers:
            await refused(fetcher, f"http://127.0.0.1:{host.port}{target}", r"did not answer in 0\.25 s")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An operator has the authority trusted, and the names of these tests are taken for public ones."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    monkeypatch.setattr("light_core.media.fetch.is_public", lambda ip: ip == "127.0.0.1")
    return authority


class Names:
    """A TLS server of several names: each has its certificate, a client that gives none gets that of the first.

    Attributes:
        given: name that each handshake gave, None for none.
    """

    def __init__(self, certificates: dict[str, ssl.SSLContext]) -> None:
        self.given: list[str | None] = []
        self.context = next(iter(certificates.values()))

        def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            self.given.append(name)
            connection.context = certificates.get(name or "", self.context)

        self.context.sni_callback = choose


async def test_https_gives_the_name_and_not_the_address(trusted: Authority) -> None:
    names = Names({"pictures.test": trusted.server_context("DNS:pictures.test")})
    async with hosting(names.context) as host, fetching(host, f"pictures.test:{host.port}", answers=[["127.0.0.1"]]) as fetcher:
        assert await fetcher.fetch(f"https://Pictures.TEST:{host.port}/a.png", "image_url") == BODY
        assert names.given == ["pictures.test"] and host.requests[0]["host"] == f"pictures.test:{host.port}"
        assert host.requests[0]["target"] == "/a.png"


async def test_https_of_an_address_that_is_allowed_itself(trusted: Authority) -> None:
    names = Names({"": trusted.server_context("IP:127.0.0.1")})
    async with hosting(names.context) as host, fetching(host) as fetcher:
        assert await fetcher.fetch(f"https://127.0.0.1:{host.port}/", "image_url") == BODY
        assert names.given == [None] and host.requests[0]["host"] == f"127.0.0.1:{host.port}"


async def test_certificates_that_do_not_hold(trusted: Authority, tmp_path: Path) -> None:
    names = {
        "pictures.test": trusted.server_context("DNS:pictures.test"),
        "other.test": trusted.server_context("DNS:pictures.test"),
        "old.test": trusted.server_context("DNS:old.test", is_expired=True),
        "strange.test": Authority(tmp_path).server_context("DNS:strange.test"),
    }
    wrong = {
        "other.test": "image_url: the host's certificate is for another name",
        "old.test": "image_url: the host's certificate has expired",
        "strange.test": "image_url: the host's certificate is not trusted here",
    }
    async with hosting(Names(names).context) as host:
        async with fetching(host, *(f"{name}:{host.port}" for name in wrong), answers=[["127.0.0.1"]] * 3) as fetcher:
            for name, text in wrong.items():
                await refused(fetcher, f"https://{name}:{host.port}/", f"^{text}$")
        async with fetching(host) as fetcher:  # by an address that the certificate does not have
            await refused(fetcher, f"https://127.0.0.1:{host.port}/", "certificate is for another name$")
        assert host.requests == [], "nothing is asked of who may be anybody"


async def test_hosts_that_speak_no_tls(trusted: Authority) -> None:
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(plain(BODY))
        writer.close()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
        ended.set()
        writer.close()

    for handler, words in ((answer, "^image_url: the address cannot be fetched$"), (listen, r"did not answer in 0\.25 s$")):
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        domain = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        fetcher = Fetcher(MediaSettings(allowed_media_domains=(domain,), fetch_timeout_s=60.0 if handler is answer else 0.25))
        try:
            await refused(fetcher, f"https://{domain}/", words)
            if handler is listen:
                async with asyncio.timeout(60):  # a connection whose handshake is given up is closed, by whom there still is
                    await ended.wait()
        finally:
            await fetcher.close()
            server.close()


async def test_redirects_of_https_are_judged_too(trusted: Authority) -> None:
    certificates = {name: trusted.server_context(f"DNS:{name}") for name in ("pictures.test", "more.test")}
    names = Names(certificates | {"other.test": certificates["pictures.test"]})
    async with hosting(names.context) as host, hosting() as plain_host:
        domains = [f"{name}:{host.port}" for name in ("pictures.test", "more.test", "other.test", "private.test")]
        addresses = {"private.test": ["10.0.0.7"]}

        async def resolve(name: str, port: int) -> list[str]:
            return addresses.get(name, ["127.0.0.1"])

        fetcher = Fetcher(MediaSettings(allowed_media_domains=(*domains, f"127.0.0.1:{plain_host.port}"), fetch_timeout_s=120.0), resolve)
        host.answers |= {
            "/path": redirect("/a.png"),
            "/name": redirect(f"https://more.test:{host.port}/a.png"),
            "/http": redirect(f"http://127.0.0.1:{plain_host.port}/b.png"),
            "/http-private": redirect(f"http://private.test:{host.port}/"),
            "/private": redirect(f"https://private.test:{host.port}/"),
            "/evil": redirect(f"https://evil.test:{host.port}/"),
            "/http-evil": redirect("http://evil.test/"),
            "/wrong": redirect(f"https://other.test:{host.port}/"),
        }
        plain_host.answers["/https"] = redirect(f"https://pictures.test:{host.port}/a.png")
        base = f"https://pictures.test:{host.port}"
        try:
            assert await fetcher.fetch(f"{base}/path", "image_url") == BODY
            assert names.given == ["pictures.test"] * 2
            assert await fetcher.fetch(f"{base}/name", "image_url") == BODY
            assert names.given[2:] == ["pictures.test", "more.test"] and host.requests[-1]["host"] == f"more.test:{host.port}"
            assert await fetcher.fetch(f"{base}/http", "image_url") == BODY
            assert [request["target"] for request in plain_host.requests] == ["/b.png"]
            assert await fetcher.fetch(f"http://127.0.0.1:{plain_host.port}/https", "image_url") == BODY
            for target, words in {
                "private": "host cannot be used",
                "http-private": "host cannot be used",
                "evil": "not among",
                "http-evil": "not among",
                "wrong": "certificate is for another name",
            }.items():
                await refused(fetcher, f"{base}/{target}", words)
            assert {request["host"] for request in host.requests} == {f"pictures.test:{host.port}", f"more.test:{host.port}"}
        finally:
            await fetcher.close()


async def test_a_connection_serves_one_name(trusted: Authority) -> None:
    """Whose certificate was looked at is who is asked, though others have the same address."""

    async def held(writer: asyncio.StreamWriter) -> None:
        writer.write(plain(BODY).replace(b"Connection: close\r\n", b""))
        await writer.drain()
        await asyncio.sleep(600)

    names = Names({name: trusted.server_context(f"DNS:{name}") for name in ("pictures.test", "more.test")})
    async with hosting(names.context) as host:
        host.answers["/held"] = held
        domains = [f"pictures.test:{host.port}", f"more.test:{host.port}"]
        async with fetching(host, *domains, answers=[["127.0.0.1"]] * 2, fetch_timeout_s=60.0) as fetcher:
            for domain in domains:
                assert await fetcher.fetch(f"https://{domain}/held", "image_url") == BODY
        assert names.given == ["pictures.test", "more.test"] and [request["host"] for request in host.requests] == domains


async def test_who_is_trusted_is_the_operators_choice(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    authority.fill_folder(tmp_path / "trusted")
    (tmp_path / "empty.pem").touch()
    async with hosting(authority.server_context("IP:127.0.0.1")) as host:
        url = f"https://127.0.0.1:{host.port}/"
        async with fetching(host) as fetcher:
            await refused(fetcher, url, "certificate is not trusted here$")
        for name, path in (("SSL_CERT_FILE", authority.certificate), ("SSL_CERT_DIR", tmp_path / "trusted")):
            with monkeypatch.context() as patch:
                patch.setenv(name, str(path))
                async with fetching(host) as fetcher:
                    assert await fetcher.fetch(url, "image_url") == BODY
    for wrong in ("gone.pem", "empty.pem"):
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / wrong))
        with pytest.raises(ConfigError, match=f"SSL_CERT_FILE=.*{wrong}"):
            Fetcher(MediaSettings(allowed_media_domains=("pictures.test",)))
        await Fetcher(MediaSettings()).close()  # fetches nothing


def test_addresses_are_taken_apart() -> None:
    assert parse_address("HTTPS://Example.COM") == Address("https", "example.com", 443, "/")
    assert parse_address("http://example.com?x=/@") == Address("http", "example.com", 80, "/?x=/@")
    found = parse_address("http://[2001:DB8::1]:8080/a")
    assert found == Address("http", "2001:db8::1", 8080, "/a") and found.authority == "[2001:db8::1]:8080"
    for url in ("http://a:0/", "http://a:65536/", "http://-a/", "http://.a/", "http://a..b/", "http://[::1/", "http://a:/", "http://", "x"):
        assert parse_address(url) is None, url


def test_public_addresses() -> None:
    assert all(map(is_public, ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e")))
    assert not any(
        map(is_public, ("127.0.0.1", "0.0.0.0", "255.255.255.255", "::", "ff02::1", "2001:db8::1", "x", "fe80::1%lo", "192.0.2.1"))
    )
    assert not any(map(is_public, ("fec0::1", "3fff::1", "5f00::1", "192.0.0.8", "::ffff:192.0.0.8")))
