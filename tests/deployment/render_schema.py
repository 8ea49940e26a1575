"""The part of Render's Blueprint specification that our render.yaml may use.

Written from the documented fields (render.com/docs/blueprint-spec, read 2026): service types, what
each requires, the six sources of an environment variable, plans and limits.  Narrower than Render's
own schema on purpose: a field that is not listed here is a field nobody has looked up.
"""

from __future__ import annotations

from typing import Any

NAME = {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]*$"}
KEY = {"type": "string", "pattern": "^[A-Z][A-Z0-9_]*$"}
PLAN = {
    "enum": ["free", "starter", "standard", "pro", "pro plus", "pro max", "pro ultra"]
}
IP_ALLOW_LIST = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["source"],
        "properties": {"source": {"type": "string"}, "description": {"type": "string"}},
        "additionalProperties": False,
    },
}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


VALUE = _object(["key", "value"], key=KEY, value={"type": ["string", "number"]})
GENERATED = _object(["key", "generateValue"], key=KEY, generateValue={"const": True})
ASKED = _object(["key", "sync"], key=KEY, sync={"const": False})
FROM_DATABASE = _object(
    ["key", "fromDatabase"],
    key=KEY,
    fromDatabase=_object(
        ["name", "property"],
        name=NAME,
        property={
            "enum": ["connectionString", "host", "port", "user", "password", "database"]
        },
    ),
)
FROM_SERVICE = _object(
    ["key", "fromService"],
    key=KEY,
    fromService={
        **_object(
            ["type", "name"],
            type={"enum": ["web", "pserv", "worker", "keyvalue"]},
            name=NAME,
            property={"enum": ["host", "port", "hostport", "connectionString"]},
            envVarKey=KEY,
        ),
        "oneOf": [{"required": ["property"]}, {"required": ["envVarKey"]}],
    },
)
FROM_GROUP = _object(["fromGroup"], fromGroup=NAME)

PROGRAM = {
    "name": NAME,
    "runtime": {"const": "docker"},
    "plan": PLAN,
    "region": {"enum": ["oregon", "ohio", "virginia", "frankfurt", "singapore"]},
    "dockerfilePath": {"type": "string"},
    "dockerCommand": {"type": "string"},
    "preDeployCommand": {"type": "string"},
    "numInstances": {"type": "integer", "minimum": 1},
    "maxShutdownDelaySeconds": {"type": "integer", "minimum": 1, "maximum": 300},
    "envVars": {
        "type": "array",
        "items": {
            "oneOf": [VALUE, GENERATED, ASKED, FROM_DATABASE, FROM_SERVICE, FROM_GROUP]
        },
    },
}
WEB = _object(
    ["type", "name", "runtime"],
    type={"const": "web"},
    healthCheckPath={"type": "string", "pattern": "^/"},
    **PROGRAM,
)
WORKER = _object(["type", "name", "runtime"], type={"const": "worker"}, **PROGRAM)
KEY_VALUE = _object(
    # Without `ipAllowList` Render refuses the Blueprint.
    ["type", "name", "ipAllowList"],
    type={"const": "keyvalue"},
    name=NAME,
    plan=PLAN,
    region=PROGRAM["region"],
    maxmemoryPolicy={
        "enum": [
            "noeviction",
            "allkeys-lru",
            "allkeys-lfu",
            "allkeys-random",
            "volatile-lru",
            "volatile-lfu",
            "volatile-random",
            "volatile-ttl",
        ]
    },
    ipAllowList=IP_ALLOW_LIST,
)
DATABASE = _object(
    ["name"],
    name=NAME,
    databaseName={"type": "string"},
    user={"type": "string"},
    plan={"type": "string", "pattern": r"^(free|(basic|pro|accelerated)-\d+(mb|gb))$"},
    region=PROGRAM["region"],
    postgresMajorVersion={"type": "string"},
    diskSizeGB={"type": "integer"},
    ipAllowList=IP_ALLOW_LIST,
)
BLUEPRINT = _object(
    ["services"],
    services={"type": "array", "items": {"oneOf": [WEB, WORKER, KEY_VALUE]}},
    databases={"type": "array", "items": DATABASE},
    envVarGroups={
        "type": "array",
        # A group holds plain values: nothing in it may be asked for or come from elsewhere.
        "items": _object(
            ["name", "envVars"],
            name=NAME,
            envVars={"type": "array", "items": {"oneOf": [VALUE, GENERATED]}},
        ),
    },
)
