"""What the first page and searches cost among 100,000 jobs, at the API.

    python -m bench.search [--jobs 100000] [--rounds 10] [--requests 20] [--connections 4]

One database, one API process.  The prompts are made of 20,000 words, of which few are common
and most are rare, as in a language; the older three fifths say `Christmas`.  Every kind of
search is asked in turn, each with words chosen at random, over some connections at once.
`cut short` says how many answers were not full and had not looked at everything.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence
from urllib.parse import quote

import orjson
import uvloop

from app.api.deps import write_cursor
from bench.figures import percentile, print_load, print_table
from bench.growth import Kind, fill
from bench.harness import Machine, Service
from bench.http_load import Measure, get, load

_COMMON = (
    "a of the with in light at and dusk painting lighthouse sea portrait city".split()
)
_SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]


def vocabulary(rng: random.Random) -> list[str]:
    """Make words, the most common first."""
    made = {
        "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))) + rng.choice(" nrst")
        for _ in range(20_000)
    }
    rare = sorted(word.strip() for word in made)
    rng.shuffle(rare)
    return _COMMON + rare


def prompts(rng: random.Random, words: Sequence[str], jobs: int) -> list[str]:
    """Make the prompts, the oldest first: a word's share falls with its rank."""
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))
    made = []
    for number in range(jobs):
        chosen = rng.choices(words, cum_weights=weights, k=rng.randint(8, 40))
        if number < jobs * 0.6:
            chosen.append("Christmas")
        made.append(" ".join(chosen))
    return made


def kinds(service: Service, words: Sequence[str], said: Sequence[str]) -> list[Kind]:
    """Choose what is asked."""
    middle = service.rows(
        "SELECT id FROM jobs ORDER BY id OFFSET %s LIMIT 1", len(said) // 2
    )
    after = f"&cursor={write_cursor(middle[0][0])}"
    common, usual, rare = words[:14], words[300:600], words[-5000:]
    phrases = [" ".join(prompt.split()[2:5]) for prompt in random.sample(said, 500)]
    pairs = [" ".join(random.sample(usual, 2)) for _ in range(500)]

    def asking(name: str, texts: Sequence[str], more: str = "") -> Kind:
        prefix = f"/api/v1/jobs?limit=20{more}&q="
        return Kind(name, [prefix + quote(text, safe="") for text in texts])

    failed = "&status=failed&model=" + quote("black-forest-labs/flux-dev", safe="")
    return [
        Kind("first page", ["/api/v1/jobs?limit=20"]),
        asking("a common word", common),
        asking("a usual word", usual),
        asking("a rare word", rare),
        asking("a rare word, from the middle", rare, after),
        asking("nothing of the kind", ["xyzzy", "quux"]),
        asking("two usual words", pairs),
        asking("a phrase", [f'"{phrase}"' for phrase in phrases]),
        asking("common long ago", ["christmas"]),
        asking("two letters, common", ["th", "li"]),
        asking("two letters, nowhere", ["qx", "日本"]),
        asking("a rare word, of 200 jobs", rare, "&owner=few"),
        asking("a common word, failed, by model", common, failed),
        Kind("a common size", ["/api/v1/jobs?size=1024x1024"]),
        Kind("a rare size", ["/api/v1/jobs?size=512x512"]),
        Kind("a size nothing has", ["/api/v1/jobs?size=7x7"]),
        asking("a usual word, a rare size", usual, "&size=512x512"),
    ]


def spread(service: Service) -> None:
    """Give a few jobs to somebody else, and a few pictures another size."""
    service.rows(
        "UPDATE jobs SET owner = 'few' WHERE id IN (SELECT id FROM (SELECT id,"
        " row_number() OVER (ORDER BY id) AS n FROM jobs) AS numbered WHERE n %% 500 = 3)"
    )
    service.rows(
        "UPDATE assets SET width = 512, height = 512 WHERE sha256 LIKE 'bcd%%'"
    )
    service.rows("VACUUM (ANALYZE)")


def ask(service: Service, kind: Kind, options: argparse.Namespace) -> Measure:
    """Send the requests of one round."""
    chosen = [get(random.choice(kind.paths)) for _ in range(options.requests)]
    return uvloop.run(
        load(
            service.port,
            chosen.__getitem__,
            requests=options.requests,
            connections=options.connections,
            keep=True,
        )
    )


def main() -> None:
    """Fill, ask in turn, print latencies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--connections", type=int, default=4)
    options = parser.parse_args()
    rng = random.Random(1)
    words = vocabulary(rng)
    said = prompts(rng, words, options.jobs)
    with Machine(max_wal_size="8GB") as machine:
        service = Service(machine)
        fill(service, options.jobs, said)
        spread(service)
        service.start_api()
        asked = kinds(service, words, said)
        found: dict[str, list[Measure]] = {kind.name: [] for kind in asked}
        for number in range(options.rounds + 1):
            for kind in asked:
                measured = ask(service, kind, options)
                if number > 0:  # the first round warms up
                    found[kind.name].append(measured)
    print_table(
        ("ms", "p50", "p95", "max", "found", "cut short"),
        [(name, *_summed(measures)) for name, measures in found.items()],
    )
    print_load()


def _summed(measures: Sequence[Measure]) -> list[object]:
    latencies = sorted(t * 1000 for one in measures for t in one.latencies)
    pages = [orjson.loads(body) for one in measures for body in one.bodies]
    sizes = sorted(len(page["items"]) for page in pages)
    short = [page for page in pages if page["next_cursor"] and len(page["items"]) < 20]
    return [
        *(percentile(latencies, share) for share in (0.5, 0.95, 1)),
        sizes[len(sizes) // 2],
        f"{len(short)}/{len(pages)}",
    ]


if __name__ == "__main__":
    main()
