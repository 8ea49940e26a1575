"""Downloads against a scripted server: where from, how much, how fast, and what is raised."""

from __future__ import annotations

import base64
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from app.core.guarded_http import is_public
from app.domain.errors import (
    OutputError,
    OutputForbidden,
    OutputGone,
    OutputInterrupted,
    OutputInvalid,
)
from app.services.providers.addresses import OutputHosts
from app.services.providers.transport import Downloader, DownloadLimits, Pace
from tests.contracts.scripted_server import (
    Reaction,
    ScriptedServer,
    answer,
    drip,
    hang,
    raw,
    reset,
    then_close,
)

OK = b"HTTP/1.1 200 OK\r\n"
LIMITS = DownloadLimits(
    max_bytes=1000,
    total=timedelta(seconds=0.6),
    idle=timedelta(seconds=0.3),
    slowest=10_000,
    window=timedelta(seconds=0.2),
)


class FixedResolver(AbstractResolver):
    """Answers every name with the same addresses."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self.addresses
        ]

    async def close(self) -> None:
        pass


async def fetch(downloader: Downloader, url: str) -> bytes:
    return b"".join([chunk async for chunk in downloader.download(url)])


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer() as running:
        yield running


@pytest.fixture
async def resolver() -> FixedResolver:
    return FixedResolver("127.0.0.1")


@pytest.fixture
async def downloader(
    server: ScriptedServer, resolver: FixedResolver
) -> AsyncIterator[Downloader]:
    hosts = OutputHosts.parse(("replicate.delivery", f"127.0.0.1:{server.port}"))
    made = Downloader(hosts, LIMITS, resolver=resolver)
    yield made
    await made.aclose()


# ------------------------------------------------------------------------------ where

FORBIDDEN = {
    "another host": "https://evil.com/x",
    "a prefix of ours": "https://replicate.delivery.evil.com/x",
    "a suffix without the dot": "https://notreplicate.delivery/x",
    "ours as a path": "https://evil.com/replicate.delivery",
    "ours as a user": "https://replicate.delivery@evil.com/x",
    "a user at ours": "https://user:pw@replicate.delivery/x",
    "a backslash": "https://evil.com\\@replicate.delivery/x",
    "a tab": "https://replicate\t.delivery/x",
    "a newline": "https://replicate.delivery/x\r\nHost: evil.com",
    "a space": "https://replicate.delivery /x",
    "a look-alike letter": "https://repl\u0131cate.delivery/x",
    "plain http": "http://replicate.delivery/x",
    "another port": "https://replicate.delivery:8443/x",
    "port 80": "https://replicate.delivery:80/x",
    "no host": "https:///x",
    "a file": "file:///etc/passwd",
    "ftp": "ftp://replicate.delivery/x",
    "gopher": "gopher://replicate.delivery/x",
    "no scheme": "//replicate.delivery/x",
    "nothing": "",
    "loopback": "https://127.0.0.1/x",
    "loopback, decimal": "https://2130706433/x",
    "loopback, octal": "https://0177.0.0.1/x",
    "loopback, hex": "https://0x7f.0.0.1/x",
    "loopback, short": "https://127.1/x",
    "loopback, v6": "https://[::1]/x",
    "loopback, mapped": "https://[::ffff:127.0.0.1]/x",
    "metadata": "https://169.254.169.254/latest/meta-data/",
    "the trusted host on another port": "http://127.0.0.1:1/x",
    "the trusted port on another host": "http://localhost:{port}/x",
    "the trusted host with a user": "http://u@127.0.0.1:{port}/x",
    "broken v6": "https://[::1/x",
    "a port out of range": "https://replicate.delivery:99999/x",
}


@pytest.mark.parametrize("row", FORBIDDEN)
async def test_elsewhere_is_forbidden(
    server: ScriptedServer,
    resolver: FixedResolver,
    downloader: Downloader,
    row: str,
) -> None:
    with pytest.raises(OutputForbidden):
        await fetch(downloader, FORBIDDEN[row].replace("{port}", str(server.port)))
    assert server.connections == 0
    assert resolver.asked == []


NOT_PUBLIC = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "not an address",
    "",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "104.18.32.7", "2606:4700::1", "::ffff:1.1.1.1", "64:ff9b::101:101"],
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "https://replicate.delivery/x",
        "https://pbxt.replicate.delivery/x",
        "https://A.B.Replicate.Delivery:443/x",
        "https://replicate.delivery./x",
    ],
)
async def test_a_listed_name_that_points_inside_is_forbidden(
    resolver: FixedResolver, downloader: Downloader, url: str
) -> None:
    with pytest.raises(OutputForbidden):
        await fetch(downloader, url)
    assert len(resolver.asked) == 1


@pytest.mark.parametrize("address", [a for a in NOT_PUBLIC if a[:1].isalnum()][:12])
async def test_one_address_inside_spoils_the_name(address: str) -> None:
    resolver = FixedResolver("1.1.1.1", address)
    hosts = OutputHosts.parse(("replicate.delivery",))
    made = Downloader(hosts, LIMITS, resolver=resolver)
    with pytest.raises(OutputForbidden) as caught:
        await fetch(made, "https://replicate.delivery/x")
    await made.aclose()
    # Refused at the look-up: the public address was not tried first.
    assert isinstance(caught.value.__cause__, aiohttp.ClientConnectorDNSError)


@pytest.mark.parametrize(
    "literal", ["10.0.0.1", "169.254.169.254", "127.0.0.1", "[::1]", "[::ffff:7f00:1]"]
)
async def test_a_literal_address_is_checked_when_the_socket_is_made(
    literal: str,
) -> None:
    """Even on the list: an entry without a port promises a public host."""
    resolver = FixedResolver("1.1.1.1")
    made = Downloader(OutputHosts.parse((literal,)), LIMITS, resolver=resolver)
    with pytest.raises(OutputForbidden, match="address"):
        await fetch(made, f"https://{literal}/x")
    assert resolver.asked == []
    await made.aclose()


@pytest.mark.parametrize(
    "entry", ["", "a b", "https://a", "a/b", "u@a", "a:x", "a:99999", "a?b"]
)
def test_a_wrong_entry_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        OutputHosts.parse((entry,))


# --------------------------------------------------------------------------- redirects


def redirect(to: str, status: int = 302) -> Reaction:
    return answer(status, b"", {"Location": to})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_on_the_list_are_followed(
    server: ScriptedServer, downloader: Downloader, status: int
) -> None:
    server.will(
        redirect("/b?s=%2F", status),
        redirect(f"{server.url}/c", status),
        redirect("d", status),
        answer(200, b"picture"),
    )
    assert await fetch(downloader, server.url + "/a") == b"picture"
    assert [r.target for r in server.requests] == ["/a", "/b?s=%2F", "/c", "/d"]


@pytest.mark.parametrize(
    "to",
    [
        "https://evil.com/x",
        "//evil.com/x",
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:1/x",
        "file:///etc/passwd",
        "http://[::1",
        "https://replicate.delivery/inside",
    ],
)
async def test_redirects_off_the_list_are_forbidden(
    server: ScriptedServer, downloader: Downloader, to: str
) -> None:
    server.will(redirect(to))
    with pytest.raises(OutputForbidden):
        await fetch(downloader, server.url + "/a")
    assert len(server.requests) == 1


async def test_four_redirects_are_too_many(
    server: ScriptedServer, downloader: Downloader
) -> None:
    server.will(redirect("/again"))
    with pytest.raises(OutputForbidden):
        await fetch(downloader, server.url + "/a")
    assert len(server.requests) == 4


# ----------------------------------------------------------------------------- answers


def sized(length: int) -> bytes:
    return OK + f"Content-Length: {length}\r\n\r\n".encode()


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

ANSWERS: dict[str, tuple[Reaction, type[OutputError] | bytes]] = {
    "complete": (answer(200, b"picture"), b"picture"),
    "exactly the cap": (answer(200, b"x" * 1000), b"x" * 1000),
    "chunked": (raw(CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"), b"abcde"),
    "until the end": (then_close(raw(OK + b"Connection: close\r\n\r\nabc")), b"abc"),
    "encoding is not undone": (
        answer(200, b"\x1f\x8b..", {"Content-Encoding": "gzip"}),
        b"\x1f\x8b..",
    ),
    "404": (answer(404, b"no"), OutputGone),
    "410": (answer(410), OutputGone),
    "401": (answer(401), OutputInterrupted),
    "403": (answer(403), OutputInterrupted),
    "429": (answer(429), OutputInterrupted),
    "500": (answer(500), OutputInterrupted),
    "503": (answer(503), OutputInterrupted),
    "206": (answer(206, b"pict"), OutputInterrupted),
    "204": (raw(b"HTTP/1.1 204 None\r\n\r\n"), OutputInterrupted),
    "304": (raw(b"HTTP/1.1 304 Same\r\n\r\n"), OutputInterrupted),
    "a redirect to nowhere": (answer(302), OutputInterrupted),
    "announced too large": (hang(sized(1001)), OutputInvalid),
    "turns out too large": (
        raw(CHUNKED + b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n"),
        OutputInvalid,
    ),
    "endless": (drip(CHUNKED, b"64\r\n" + b"x" * 100 + b"\r\n", 0.001), OutputInvalid),
    "shorter than announced": (
        then_close(raw(sized(9) + b"pict")),
        OutputInterrupted,
    ),
    "cut in a chunk": (then_close(raw(CHUNKED + b"9\r\npict")), OutputInterrupted),
    "cut between chunks": (
        then_close(raw(CHUNKED + b"4\r\npict\r\n")),
        OutputInterrupted,
    ),
    "reset": (reset(sized(9) + b"pict"), OutputInterrupted),
    "closed": (then_close(raw(b"")), OutputInterrupted),
    "no http": (then_close(raw(b"\x89PNG\r\n\r\n")), OutputInterrupted),
    "two lengths": (
        raw(OK + b"Content-Length: 4\r\nContent-Length: 7\r\n\r\npicture"),
        OutputInterrupted,
    ),
    "never answers": (hang(), OutputInterrupted),
    "stalls": (hang(sized(9) + b"pict"), OutputInterrupted),
    "too slow": (drip(sized(900), b"x", 0.02), OutputInterrupted),
}


@pytest.mark.parametrize("row", ANSWERS)
async def test_answers_and_what_becomes_of_them(
    server: ScriptedServer, downloader: Downloader, row: str
) -> None:
    reaction, expected = ANSWERS[row]
    server.will(reaction)
    if isinstance(expected, bytes):
        assert await fetch(downloader, server.url + "/x") == expected
    else:
        with pytest.raises(expected) as caught:
            await fetch(downloader, server.url + "/x?signature=secret")
        assert type(caught.value) is expected
        assert "secret" not in str(caught.value)


async def test_the_total_time_ends_a_transfer_that_is_never_idle(
    server: ScriptedServer,
) -> None:
    hosts = OutputHosts.parse((f"127.0.0.1:{server.port}",))
    made = Downloader(hosts, replace(LIMITS, slowest=0))
    server.will(drip(sized(900), b"x", 0.02))
    with pytest.raises(OutputInterrupted, match="TimeoutError"):
        await fetch(made, server.url)
    await made.aclose()


async def test_no_secret_leaves_and_no_compression_is_asked_for(
    server: ScriptedServer, downloader: Downloader
) -> None:
    server.will(
        answer(200, b"x", {"Set-Cookie": "a=b"}),
        answer(200, b"x"),
    )
    await fetch(downloader, server.url + "/x")
    await fetch(downloader, server.url + "/x")
    for sent in server.requests:
        assert sent.headers["accept-encoding"] == "identity"
        assert not {"authorization", "cookie", "referer"} & set(sent.headers)


async def test_signed_urls_arrive_as_they_are(
    server: ScriptedServer, downloader: Downloader
) -> None:
    server.will(answer(200, b"x"))
    target = "/a%2Fb/%7Ec/out-0.png?sig=a%2Bb%3D+c&e=%41"
    await fetch(downloader, server.url + target)
    assert server.requests[0].target == target


async def test_stopping_early_gives_the_connection_up(
    server: ScriptedServer, downloader: Downloader
) -> None:
    server.will(hang(sized(900) + b"x"), answer(200, b"next"))
    stream = downloader.download(server.url)
    assert await anext(stream) == b"x"
    await stream.aclose()
    assert await fetch(downloader, server.url) == b"next"
    assert server.connections == 2


async def test_a_closed_downloader_is_interrupted(
    server: ScriptedServer, downloader: Downloader
) -> None:
    await downloader.aclose()
    with pytest.raises(OutputInterrupted):
        await fetch(downloader, server.url)


async def test_every_download_is_reported(server: ScriptedServer) -> None:
    seen: list[tuple[str, str]] = []
    hosts = OutputHosts.parse((f"127.0.0.1:{server.port}",))
    made = Downloader(hosts, LIMITS, on_request=lambda o, c, _: seen.append((o, c)))
    server.will(answer(200, b"x"), answer(404))
    await fetch(made, server.url)
    with pytest.raises(OutputGone):
        await fetch(made, server.url)
    await made.aclose()
    assert seen == [("download", "200"), ("download", "OutputGone")]


# -------------------------------------------------------------------------------- pace


def test_nothing_is_judged_before_a_whole_window() -> None:
    pace = Pace(replace(LIMITS, slowest=10, window=timedelta(seconds=10)))
    assert not pace.is_too_slow(0, 9.9)
    assert pace.is_too_slow(0, 0.1)


def test_a_quick_start_does_not_pay_for_a_slow_end() -> None:
    pace = Pace(replace(LIMITS, slowest=10, window=timedelta(seconds=10)))
    assert not pace.is_too_slow(10_000, 1)
    verdicts = [pace.is_too_slow(1, 1) for _ in range(12)]
    assert verdicts[-1] and not verdicts[0]


def test_a_steady_pace_at_the_limit_is_fine() -> None:
    pace = Pace(replace(LIMITS, slowest=10, window=timedelta(seconds=10)))
    assert not any(pace.is_too_slow(10, 1) for _ in range(100))


# --------------------------------------------------------------------------- data URIs

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.mark.parametrize(
    "uri, expected",
    [
        ("data:image/png;base64," + base64.b64encode(PICTURE).decode(), PICTURE),
        ("DATA:image/png;BASE64," + base64.b64encode(PICTURE).decode(), PICTURE),
        ("data:image/png;charset=x;base64,YWI%3D", b"ab"),
        ("data:,a%20b", b"a b"),
        ("data:;base64,", b""),
    ],
)
async def test_data_uris_are_decoded(
    downloader: Downloader, uri: str, expected: bytes
) -> None:
    assert await fetch(downloader, uri) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64",
        "data:image/png;base64,a",
        "data:image/png;base64,****",
        "data:image/png;base64," + base64.b64encode(bytes(1001)).decode(),
        "data:image/png;base64," + "A" * 10_000,
        "data:," + "a" * 1001,
        "data:," + "%41" * 1001,
    ],
)
async def test_data_uris_that_are_broken_or_large_are_invalid(
    downloader: Downloader, uri: str
) -> None:
    with pytest.raises(OutputInvalid):
        await fetch(downloader, uri)
