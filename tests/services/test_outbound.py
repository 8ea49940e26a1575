"""Where strangers' URLs lead: never to this machine, its network, or its cloud's metadata.

A bait listens on loopback.  Every row of the table is asked for in the way inputs are fetched and
webhooks are called, and the bait must not see a single connection, whatever the answers say.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from app.core.guarded_http import AddressRefused, was_refused
from app.domain.errors import OutboundRefused, OutputError
from app.services.outbound import Outbound
from app.services.providers.transport import Downloader, DownloadLimits
from tests.contracts.scripted_server import ScriptedServer, answer, echo_host

PUBLIC = "93.184.215.14"


class Names(AbstractResolver):
    """A name server: each name has a list of answers, one for each time it is asked."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self.answers = {
            name.replace("_", "."): list(each) for name, each in answers.items()
        }
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        answers = self.answers.get(host)
        if answers is None:
            # As the system reads what is no name: 127.1, 0x7f000001, localhost.
            return await ThreadedResolver().resolve(host, port, family)
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


def a_name_server() -> Names:
    return Names(
        loopback_example=[["127.0.0.1"]],
        six_example=[["::1"]],
        mapped_example=[["::ffff:127.0.0.1"]],
        nat64_example=[["64:ff9b::7f00:1"]],
        sixtofour_example=[["2002:7f00:1::1"]],
        metadata_example=[["169.254.169.254"]],
        cgnat_example=[["100.100.100.200"]],
        unspecified_example=[["0.0.0.0"]],
        # One good address and one bad one, in either order.
        mixed_example=[[PUBLIC, "127.0.0.1"]],
        dexim_example=[["::1", PUBLIC]],
        # Good when it is examined, bad when it is connected to.
        rebinding_example=[[PUBLIC], ["127.0.0.1"]],
        rebinding6_example=[[PUBLIC], ["::ffff:7f00:1"]],
    )


@pytest.fixture
async def bait() -> AsyncIterator[ScriptedServer]:
    """What must not be reached."""
    async with ScriptedServer([answer(200, b"the crown jewels")]) as server:
        yield server


# {port} is the bait's.  Rows with it fail if the port alone were all that keeps them out: they
# are asked for once more below with every port allowed.
ROWS = """
https://127.0.0.1:{port}/
https://127.0.0.1/
http://127.0.0.1:{port}/
https://127.1:{port}/
https://127.0.1:{port}/
https://2130706433:{port}/
https://0x7f000001:{port}/
https://0x7f.0.0.1:{port}/
https://0X7F.1:{port}/
https://017700000001:{port}/
https://0177.0.0.1:{port}/
https://127.0.0.01:{port}/
https://0:{port}/
https://0.0.0.0:{port}/
https://127.0.0.1.:{port}/
https://127.127.127.127:{port}/
https://[::1]:{port}/
https://[::]:{port}/
https://[0:0:0:0:0:0:0:1]:{port}/
https://[::ffff:127.0.0.1]:{port}/
https://[::ffff:7f00:1]:{port}/
https://[::127.0.0.1]:{port}/
https://[64:ff9b::127.0.0.1]:{port}/
https://[64:ff9b:1::7f00:1]:{port}/
https://[2002:7f00:1::]:{port}/
https://[fe80::1%25lo]:{port}/
https://[::1%25lo]:{port}/
https://[fd00:ec2::254]/latest/meta-data/
https://169.254.169.254/latest/meta-data/
https://[::ffff:169.254.169.254]/latest/meta-data/
https://2852039166/latest/meta-data/
https://100.100.100.200/latest/meta-data/
https://168.63.129.16/
https://192.0.0.192/
https://10.0.0.1/
https://172.16.0.1/
https://192.168.1.1/
https://metadata.google.internal/
https://metadata/
https://localhost:{port}/
https://LOCALHOST:{port}/
https://localhost.:{port}/
https://a.localhost:{port}/
https://localhost.localdomain:{port}/
https://printer.local:{port}/
https://db.internal:{port}/
https://router.home.arpa/
https://loopback.example/
https://six.example/
https://mapped.example/
https://nat64.example/
https://sixtofour.example/
https://metadata.example/
https://cgnat.example/
https://unspecified.example/
https://mixed.example/
https://dexim.example/
https://rebinding.example/
https://rebinding6.example/
https://good.example@127.0.0.1:{port}/
https://127.0.0.1:{port}@loopback.example/
https://user:password@loopback.example/
https://good.example\\@127.0.0.1:{port}/
https://loopback.example#@127.0.0.1:{port}/
https://127.0.0.1:{port}#.good.example/
https://good.example:{port}/
https://good.example:22/
https://good.example:0/
https://good.example:99999/
https://good.example:-1/
https://①②⑦.⓪.⓪.①:{port}/
https://127。0。0。1:{port}/
https://127．0．0．1:{port}/
https://１２７.0.0.1:{port}/
https://ⓛocalhost:{port}/
https://%31%32%37.0.0.1:{port}/
https://127.0.0.1%2f.good.example:{port}/
https://good.example%00.127.0.0.1:{port}/
https://loopback.example/\r\nHost: 127.0.0.1
https://loopback.example\r\n/
https://loop\tback.example/
https://loopback.example /
 https://loopback.example/
https:/127.0.0.1:{port}/
https:127.0.0.1:{port}/
https:///127.0.0.1:{port}/
//127.0.0.1:{port}/
127.0.0.1:{port}
https://
https://.
https://..example/
https://-a.example/
file:///etc/passwd
file://127.0.0.1/etc/passwd
gopher://127.0.0.1:{port}/_GET%20/
ftp://127.0.0.1:{port}/
dict://127.0.0.1:{port}/
ldap://127.0.0.1:{port}/
jar:https://127.0.0.1:{port}!/
ws://127.0.0.1:{port}/
wss://127.0.0.1:{port}/
javascript:fetch('https://127.0.0.1:{port}')
view-source:https://127.0.0.1:{port}/
blob:https://127.0.0.1:{port}/x
"""
URLS = [
    line.replace("\\r", "\r").replace("\\n", "\n").replace("\\t", "\t")
    for line in ROWS.strip("\n").splitlines()
    if line
]


def test_the_table_is_long_enough() -> None:
    assert len(set(URLS)) >= 100


@pytest.fixture
async def outbound() -> AsyncIterator[Outbound]:
    made = Outbound(resolver=a_name_server())
    yield made
    await made.aclose()


async def call(outbound: Outbound, url: str) -> str:
    """Do all that is ever done with a stranger's URL; say what refused it."""
    try:
        outbound.check(url)
    except OutboundRefused:
        return "checked"
    try:
        target = await outbound.examine(url)
    except OutboundRefused:
        return "examined"
    try:
        async with outbound.session_for(target).get(target, allow_redirects=False):
            return "reached"
    except aiohttp.ClientError as error:
        return "connecting" if was_refused(error) else "unreachable"


async def fetch(outbound: Outbound, url: str) -> bytes:
    limits = DownloadLimits(max_bytes=1000)
    downloader = Downloader(
        outbound, limits, max_redirects=0, sessions=outbound.sessions
    )
    return b"".join([chunk async for chunk in downloader.download(url)])


@pytest.mark.parametrize("url", URLS, ids=ascii)
async def test_no_url_reaches_the_bait(
    bait: ScriptedServer, outbound: Outbound, url: str
) -> None:
    url = url.replace("{port}", str(bait.port))

    refused_by = await call(outbound, url)
    with pytest.raises((OutboundRefused, OutputError)):
        await fetch(outbound, url)

    assert refused_by in ("checked", "examined", "connecting")
    assert bait.connections == 0


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "0"),
        *("localhost", "[::1]", "[::ffff:127.0.0.1]", "loopback.example"),
        *("six.example", "mapped.example", "mixed.example", "unspecified.example"),
    ],
)
async def test_the_socket_refuses_what_the_url_did_not_betray(
    bait: ScriptedServer, outbound: Outbound, host: str
) -> None:
    """As if `check` had let it through, and on the bait's very port: the guard below holds."""
    url = f"http://{host}:{bait.port}/"

    with pytest.raises(aiohttp.ClientError) as refused:
        await outbound.sessions.to_public.get(url, allow_redirects=False)

    # The client reads numbers strictly by itself: 127.1 is no host to it.
    is_strict = isinstance(refused.value, aiohttp.InvalidUrlClientError)
    assert is_strict or was_refused(refused.value)
    assert bait.connections == 0


async def test_the_bait_works(bait: ScriptedServer) -> None:
    """Without it, nothing above would mean anything."""
    outbound = Outbound([f"127.0.0.1:{bait.port}"])
    try:
        url = f"http://127.0.0.1:{bait.port}/"
        assert await call(outbound, url) == "reached"
        assert await fetch(outbound, url) == b"the crown jewels"
    finally:
        await outbound.aclose()
    assert bait.connections > 0


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["http", "https", "//"])
async def test_no_redirect_leads_to_the_bait(
    bait: ScriptedServer, status: int, where: str
) -> None:
    scheme = "" if where == "//" else f"{where}:"
    to = {"Location": f"{scheme}//127.0.0.1:{bait.port}/"}
    async with ScriptedServer([answer(status, b"", to)]) as server:
        outbound = Outbound([f"127.0.0.1:{server.port}"])
        try:
            with pytest.raises(OutputError):
                await fetch(outbound, f"{server.url}/picture.png")
        finally:
            await outbound.aclose()
        assert server.connections == 1
    assert bait.connections == 0


async def test_a_redirect_to_itself_is_not_followed_either() -> None:
    async with ScriptedServer([answer(302, b"", {"Location": "/other"})]) as server:
        outbound = Outbound([f"127.0.0.1:{server.port}"])
        with pytest.raises(OutputError):
            await fetch(outbound, f"{server.url}/picture.png")
        await outbound.aclose()
        assert server.count("GET") == 1


async def test_an_answer_that_changes_is_caught_at_the_socket(
    outbound: Outbound,
) -> None:
    target = await outbound.examine("https://rebinding.example/hook")

    with pytest.raises(aiohttp.ClientError) as refused:
        await outbound.session_for(target).post(target, data=b"{}")

    assert was_refused(refused.value)


async def test_nothing_is_sent_but_the_request(bait: ScriptedServer) -> None:
    bait.will(echo_host())
    outbound = Outbound([f"127.0.0.1:{bait.port}"])
    await fetch(outbound, f"http://127.0.0.1:{bait.port}/a?b=c#d")
    await outbound.aclose()

    (request,) = bait.requests
    assert request.target == "/a?b=c"
    assert set(request.headers) == {
        *("host", "accept", "accept-encoding", "user-agent"),
    }
    assert request.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"])
async def test_a_proxy_of_the_environment_is_not_used(
    bait: ScriptedServer, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedServer([answer(200, b"proxied")]) as proxy:
        monkeypatch.setenv(variable, proxy.url)
        monkeypatch.setenv(variable.lower(), proxy.url)
        outbound = Outbound([f"127.0.0.1:{bait.port}"])
        found = await fetch(outbound, f"http://127.0.0.1:{bait.port}/")
        await outbound.aclose()
        assert found == b"the crown jewels"
        assert proxy.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com/a%20b/ü".replace("ü", "%C3%BC"),
        "https://EXAMPLE.com:443/?q=%2F",
        "https://xn--bcher-kva.example/a#b",
        "https://a_b.example/x?y=1@2",
        "https://8.8.8.8/",
        "https://[2606:4700:4700::1111]/",
        "HTTPS://example.com/",
    ],
)
def test_what_is_public_is_let_through(url: str) -> None:
    target = Outbound().check(url)

    assert target.raw_path_qs.strip("/") in url
    assert (target.raw_host or "?").lower() in url.lower()


async def test_a_name_that_is_not_there_yet_is_let_through() -> None:
    class Nobody(Names):
        async def resolve(self, *args: object, **options: object) -> list:  # type: ignore
            raise socket.gaierror("no such name")

    class Silent(Names):
        async def resolve(self, *args: object, **options: object) -> list:  # type: ignore
            await asyncio.Event().wait()
            return []

    for resolver in (Nobody(), Silent()):
        outbound = Outbound(resolver=resolver)
        await outbound.examine("https://not-yet.example/hook")
        await outbound.aclose()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
async def test_the_systems_own_names_are_guarded(name: str) -> None:
    outbound = Outbound()
    with pytest.raises(AddressRefused):
        await outbound.sessions.resolver.resolve(name, 443)
    await outbound.aclose()


async def test_a_refusal_names_the_field_and_not_the_address(
    outbound: Outbound,
) -> None:
    with pytest.raises(OutboundRefused) as refused:
        await outbound.examine("https://metadata.example/", field="webhook_url")

    assert refused.value.field == "webhook_url"
    assert str(refused.value).startswith("webhook_url must ")
    assert "169" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.8:8080/hook",
        "https://10.0.0.8:8080/hook",
        "http://[::1]:80",
        "http://printer.local:631/",
        "http://PRINTER.local:631/",
    ],
)
def test_a_trusted_host_is_taken_as_written(url: str) -> None:
    trusted = ("10.0.0.8:8080", "[::1]:80", "printer.local:631")

    assert Outbound(trusted).check(url)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.8:8081/", "http://10.0.0.8/", "ftp://10.0.0.8:8080/"]
)
def test_trust_does_not_spread(url: str) -> None:
    with pytest.raises(OutboundRefused):
        Outbound(["10.0.0.8:8080"]).check(url)


@pytest.mark.parametrize(
    "entry", ["example.com", "a:b", "a:0", "a:65536", "http://a:80", "u@a:80", ""]
)
def test_an_entry_that_is_no_host_and_port_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="not host:port"):
        Outbound([entry])


def test_a_url_has_its_length() -> None:
    with pytest.raises(OutboundRefused, match="2048"):
        Outbound().check("https://example.com/" + "a" * 2048)
