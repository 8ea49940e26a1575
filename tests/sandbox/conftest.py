"""Fixtures of the sandbox's tests: a fast sandbox over real HTTP, and a letterbox."""

from contextlib import asynccontextmanager

import aiohttp
import pytest
from tests.sandbox.sandbox_client import FAST, Client, Letterbox

from sandbox.runner import Sandbox


@asynccontextmanager
async def running(config):
    async with Sandbox(config) as sandbox, aiohttp.ClientSession() as session:
        yield Client(sandbox, session)


@pytest.fixture
def start():
    """Start a sandbox with a configuration: ``async with start(config) as client``."""
    return running


@pytest.fixture
async def client():
    """A sandbox that finishes everything at once, without limits."""
    async with running(FAST) as made:
        yield made


@pytest.fixture
async def letterbox():
    """A place that webhooks can be sent to."""
    async with Letterbox() as box:
        yield box
