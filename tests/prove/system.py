"""The processes under proof, and the wires between them.

Everything is real and started as an operator would: PostgreSQL and Valkey from wheels, the
sandbox, two APIs, two workers.  Every connection that can break in production leads over a
wire of its own (`TcpProxy`), which lives in the loop of whoever opens the system.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from app.core.config import Settings
from app.embedded import Postgres, Valkey
from app.processes import free_port
from tests.prove.clients import MODELS
from tests.prove.plan import APIS, WORKERS
from tests.support.servers import ROOT, migrate
from tests.support.stack import API, WORKER, Program
from tests.support.tcp_proxy import TcpProxy

# A crash of the server loses nothing it had committed; only one of the machine would.
POSTGRES = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
START = 60.0  # seconds; the machine may be busy
SUPERVISION = 0.2  # seconds between looks at whether everybody lives


@dataclass(slots=True)
class Part:
    """A process that should be running unless a fault says otherwise."""

    program: Program
    is_wanted: bool = False

    def start(self) -> None:
        """Start it, and see to it from now on."""
        self.program.start()
        self.is_wanted = True

    def release(self) -> None:
        """Let it end: whoever calls this is about to end it."""
        self.is_wanted = False


@dataclass(slots=True)
class System:
    """All of it, running.  `deaths` tells which part ended although nobody ended it."""

    folder: Path
    postgres: Postgres
    valkey: Valkey
    sandbox: Part
    parts: dict[str, Part]
    wires: dict[str, TcpProxy]
    api_urls: Sequence[str]
    sandbox_url: str
    deaths: list[str] = field(default_factory=list)

    async def until_ready(self) -> None:
        """Wait until every API says that all is well."""
        async with (
            asyncio.timeout(START),
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5)) as http,
        ):
            for url in self.api_urls:
                while not await _is_well(http, url):
                    await asyncio.sleep(0.1)

    async def supervise(self) -> None:
        """Note who died by itself, and start it again as a platform would.  Until cancelled."""
        while True:
            for name, part in self.parts.items():
                if part.is_wanted and part.program.has_ended():
                    self.deaths.append(f"{name}: exit code {part.program.wait(1)}")
                    part.start()
            await asyncio.sleep(SUPERVISION)

    async def heal(self) -> None:
        """End every fault there may still be: a plan that was cut short leaves some."""
        if self.valkey.is_running and self.valkey.pid is not None:
            os.kill(self.valkey.pid, signal.SIGCONT)
        for server in (self.postgres, self.valkey):
            await start_server(server)
        for wire in self.wires.values():
            await wire.restore()
        for part in self.parts.values():
            if part.program.has_ended():
                part.start()
            part.program.thaw()
        async with aiohttp.ClientSession() as http:
            await http.delete(f"{self.sandbox_url}/sandbox/faults")


async def _is_well(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/api/v1/health") as answer:
            return bool((await answer.json())["status"] == "ok")
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return False


async def start_server(server: Postgres | Valkey) -> None:
    """Start a server and wait until it answers, without holding up the loop.

    From this thread, which lives as long as we do: a child is signalled when the thread that
    started it ends.
    """
    server.launch()
    async with asyncio.timeout(START):
        while not server.is_ready():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def open_system(
    folder: Path,
    *,
    sandbox_options: Sequence[str] = (),
    has_webhooks: bool = True,
    worker: str = WORKER,
    **settings: str,
) -> AsyncIterator[System]:
    """Start everything in this folder, and end everything after."""
    folder.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        postgres = Postgres(folder / "postgres", settings=POSTGRES)
        valkey = Valkey(folder / "valkey")
        for server in (postgres, valkey):
            stack.callback(server.stop)
            await start_server(server)
        migrate(postgres.url)
        ports = {name: free_port() for name in (*APIS, "sandbox")}
        wires: dict[str, TcpProxy] = {}
        for name, port in (
            ("api-database", postgres.port),
            ("worker-database", postgres.port),
            ("broker", valkey.port),
            ("worker-provider", ports["sandbox"]),
            ("provider-api", ports[APIS[0]]),
        ):
            wires[name] = await stack.enter_async_context(TcpProxy("127.0.0.1", port))
        own = _settings(folder, wires, valkey.url, has_webhooks) | settings
        sandbox, parts = _parts(
            folder, own, wires, postgres.url, ports, sandbox_options, worker
        )
        for part in (sandbox, *parts.values()):
            stack.callback(_end, part)
            part.start()
        system = System(
            folder,
            postgres,
            valkey,
            sandbox,
            parts,
            wires,
            [f"http://127.0.0.1:{ports[name]}" for name in APIS],
            f"http://127.0.0.1:{ports['sandbox']}",
        )
        await system.until_ready()
        yield system


def _settings(
    folder: Path, wires: dict[str, TcpProxy], broker_url: str, has_webhooks: bool
) -> dict[str, str]:
    """Give the settings of every process of ours; the lease is production's."""
    provider = f"127.0.0.1:{wires['worker-provider'].port}"
    settings = {
        "REDIS_URL": _through(wires["broker"], broker_url),
        "REPLICATE_API_TOKEN": "r8_for_tests_only",
        "AUTH_REQUIRED": "false",
        "REPLICATE_API_BASE_URL": f"http://{provider}/v1",
        "OUTPUT_HOSTS": provider,
        "STORAGE_PATH": str(folder / "media"),
        "PROVIDER_CREATES_PER_MINUTE": "60000",
        "PROVIDER_REQUESTS_PER_MINUTE": "600000",
        "LOG_DIR": "",
        "LOG_FORMAT": "json",
        # Money is held and settled for some models, under a budget nobody reaches.
        "PRICE_FILE": str(_write_prices(folder)),
        "BUDGET_DAY_USD": "1000000",
    }
    if has_webhooks:
        base = f"http://127.0.0.1:{wires['provider-api'].port}"
        settings["PUBLIC_BASE_URL"] = base
    return settings


def _write_prices(folder: Path) -> Path:
    path = folder / "prices.toml"
    entries = (
        f'[[price]]\nmodel = "{model}"\nsince = 2026-01-01\nper_image_usd = 0.003\n'
        for model in MODELS
    )
    path.write_text('version = "proof"\n' + "".join(entries))
    return path


def _parts(
    folder: Path,
    settings: dict[str, str],
    wires: dict[str, TcpProxy],
    database_url: str,
    ports: dict[str, int],
    sandbox_options: Sequence[str],
    worker: str,
) -> tuple[Part, dict[str, Part]]:
    names = {name.upper() for name in Settings.model_fields}
    ours = {name: value for name, value in os.environ.items() if name not in names}
    ours |= {"PYTHONPATH": str(ROOT)} | settings

    def part(title: str, argv: Sequence[str], wire: str = "") -> Part:
        env = dict(ours)
        if wire:
            env["DATABASE_URL"] = _through(wires[wire], database_url)
        if title in APIS:
            # The catalogue is not what breaks here; purchases and files are.
            env["REPLICATE_API_BASE_URL"] = f"http://127.0.0.1:{ports['sandbox']}/v1"
        return Part(Program(title, argv, env, folder))

    options = ["--creates-per-minute", "0", "--requests-per-minute", "0"]
    options += ["--pictures", "plain", *sandbox_options]
    sandbox = part("sandbox", ["sandbox", "--port", str(ports["sandbox"]), *options])
    parts = {}
    for name in APIS:
        argv = ["uvicorn", API, "--no-access-log", "--port", str(ports[name])]
        parts[name] = part(name, argv, "api-database")
    for name in WORKERS:
        argv = ["celery", "-A", worker, "worker", "--loglevel=info", "-n", f"{name}@%h"]
        parts[name] = part(name, argv, "worker-database")
    return sandbox, parts


def _through(wire: TcpProxy, url: str) -> str:
    """Give the address that leads to the same server over the wire."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{login}@127.0.0.1:{wire.port}").geturl()


def _end(part: Part) -> None:
    part.release()
    if not part.program.has_ended():
        part.program.kill()
