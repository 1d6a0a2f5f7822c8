"""What a fleet of up to 10⁸ users takes: machines, failures, shards and caches, simulated out of what was measured.

Times and sizes come from the committed results beside this file and those of the store and of serving: how long a
cohort of the fleet out of books took, how much that varies, how fast a store is written, checked and read. What nobody
can measure on one machine is assumed, and an option: how often machines and shards fail, the network, backups, how many
machines are slow. The results say all of it.

    python benchmarks/fleet/simulate.py [--users 100000 1000000 …] [--mtbf-hours inf 1000 100 10] [--seed 0]

Writes fleet_simulation.json (machines), and with more in the name: store (shards), serving (caches), rhythm, and
checked, in which the same functions are held against what is known in another way.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from caches import hit_rate, replayed, wanted_by
from cluster import Cluster, simulate

from modicum.fleet.schedule import makespan, with_failures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).parent
RESULTS = HERE / "results"
HOUR, DAY, MINUTE = 3600.0, 86_400.0, 60.0
GB, TB = 1e9, 1e12
#: tokens of a pass of the fleet out of books
_PASS = 4096


@dataclass(frozen=True)
class Facts:
    """What was measured; times in seconds."""

    #: of a cohort, its put included; users of it; of its users, the share whose adapter is stored
    cohort: float
    users: int
    stored: float
    #: until a process trains
    start: float
    #: bytes of a record, and of index and log for it
    record: float
    index: float
    #: factors by which equal steps differ
    noise: tuple[float, ...]
    #: one commit, and what each record adds; checking one record
    commit: float
    each: float
    verify: float
    #: a cold read, middle and 99th percentile; a switch with nothing else to do
    cold: tuple[float, float]
    switch: tuple[float, float]
    #: bytes of a slot in the pool
    slot: float

    @property
    def put(self) -> float:
        """Seconds in which a shard takes the adapters of a cohort."""
        return self.commit + self.users * self.stored * self.each


def read(*parts: str) -> dict[str, Any]:
    return json.loads(HERE.parent.joinpath(*parts).read_text(encoding="utf-8"))


def facts() -> Facts:
    """What the committed results say; records between the two measured sizes by the straight line through both."""
    books = read("fleet", "results", "fleet_books.json")
    plan = read("fleet", "results", "fleet_predicted.json")["plan"]
    steps = read("fleet", "results", "fleet_throughput.json")["cases"]
    small = read("store", "results", "load-1000000-10240.json")["store"]
    large = read("store", "results", "load-100000-102400.json")["store"]
    serving = read("serving", "results", "serving_zipf.json")
    timing, record = books["timing"], books["store"]["bytes_checked"] / books["store"]["versions"]

    def between(low: float, high: float) -> float:
        slope = (high - low) / (large["record_bytes"] - small["record_bytes"])
        return low + slope * (record - small["record_bytes"])

    times = [one["seconds"]["cohort"] for name, one in steps.items() if name.startswith("embedded")]
    return Facts(
        cohort=timing["seconds"] / timing["cohorts"],
        users=-(-books["users"]["all"] // timing["cohorts"]),
        stored=books["users"]["stored"] / books["users"]["all"],
        start=books["seconds"]["in_all"] - timing["seconds"],
        record=record,
        # its names are long, and it has metrics and tags, which those of the store's benchmark have not
        index=plan["measured"]["index_bytes"],
        noise=tuple(seconds / fmean(found) for found in times for seconds in found),
        commit=small["single_commit_ms"]["p50"] / 1e3,
        each=between(1 / small["batched_records_per_second"], 1 / large["batched_records_per_second"]),
        verify=between(
            small["verify_seconds"] / small["records"], large["verify_seconds"] / large["records"]
        ),
        cold=(small["cold_tensor_ms"]["p50"] / 1e3, small["cold_tensor_ms"]["p99"] / 1e3),
        switch=(serving["switch_idle_ms"]["p50"] / 1e3, serving["switch_idle_ms"]["p99"] / 1e3),
        slot=serving["pool"]["bytes"] / serving["pool"]["slots"],
    )


def cluster_for(users: int, mtbf_hours: float, known: Facts, given: argparse.Namespace) -> Cluster:
    """As many machines as finish in `--hours` if nothing fails, and as many shards as `--shard-users` make."""
    cohorts = math.ceil(users / known.users)
    shards = shards_for(users, given)
    full = users / shards * known.stored * (known.record + known.index)
    return Cluster(
        cohorts=cohorts,
        machines=max(1, math.ceil(cohorts * known.cohort / (given.hours * HOUR))),
        seconds=known.cohort - known.put,
        shards=shards,
        put=known.put,
        mtbf=mtbf_hours * HOUR,
        repair=given.repair_minutes * MINUTE + known.start,
        noise=known.noise,
        slow_share=given.slow_share,
        slow_factor=given.slow_factor,
        losses=given.losses,
        backup=given.backup_hours * HOUR,
        restore=restore_seconds(full, users / shards * known.stored, known, given),
    )


def shards_for(users: int, given: argparse.Namespace) -> int:
    return max(1, math.ceil(users / given.shard_users))


def restore_seconds(size: float, records: float, known: Facts, given: argparse.Namespace) -> float:
    """Until a shard is copied back and every record of it was checked."""
    return size / (given.network_gbit * 1e9 / 8) + records * known.verify


def trained(known: Facts, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One run for each number of users and each failure rate."""
    for users in given.users:
        for hours in given.mtbf_hours:
            cluster = cluster_for(users, hours, known, given)
            out = simulate(cluster, given.seed)
            machine_time = cluster.machines * out.seconds
            again = with_failures(known.cohort, hours * HOUR, cluster.repair)[1] if hours < math.inf else 0.0
            waits = np.quantile(out.waits, (0.5, 0.99, 1.0)).tolist()
            share = cluster.cohorts / cluster.machines * known.cohort
            yield {
                "users": users,
                "mtbf_hours": hours if hours < math.inf else None,
                "machines": cluster.machines,
                "shards": cluster.shards,
                "hours": out.seconds / HOUR,
                "failures": out.failures,
                "cohorts": cluster.cohorts,
                "cohorts_again": out.attempts - cluster.cohorts - out.relearnt,
                "cohorts_again_expected": again * cluster.cohorts,
                "relearnt_for_a_lost_shard": out.relearnt,
                "known": out.known,
                "wasted": out.wasted / machine_time,
                "idle": out.idle / machine_time,
                "putting": out.putting / machine_time,
                "down": out.down / machine_time,
                "put_seconds": dict(zip(("p50", "p99", "max"), waits, strict=True)),
                "stored_once": int(sum(one == 1 for one in out.stored)),
                # were a machine's whole share one unit of work, as without cohorts and a ledger
                "wasted_without_cohorts": 1 - share / with_failures(share, hours * HOUR, cluster.repair)[0]
                if hours < math.inf and share < 500 * hours * HOUR
                else 0.0 if hours == math.inf else 1.0,
                "commits": out.commits,
            }  # fmt: skip
            print(f"{users:,} users, a failure every {hours:g} h: {out.seconds / HOUR:.2f} h", flush=True)


def shards(users: int, run: dict[str, Any], known: Facts, given: argparse.Namespace) -> dict[str, Any]:
    """What a shard holds and does, in the run without failures of machines."""
    count, each = run["shards"], known.record + known.index
    # who belongs where goes by a hash: normal around the mean, the largest of all shards
    mean = users / count
    highest = NormalDist().inv_cdf(1 - 0.5 / count) if count > 1 else 0.0
    most = mean + highest * math.sqrt(mean * (1 - 1 / count))
    size = most * known.stored * each
    times = np.sort([when for when, _ in run["commits"]])
    spread = spread_puts(times, count, known)
    return {
        "users": users,
        "shards": count,
        "bytes": users * known.stored * each,
        "shard_bytes": size,
        "fullest_over_mean": most / mean - 1,
        "puts_per_hour_and_shard": len(times) / count / run["hours"],
        "busy": len(times) / count * known.put / (run["hours"] * HOUR),
        "put_seconds": run["put_seconds"],
        "spread": spread,
        "copy_seconds": size / (given.network_gbit * 1e9 / 8),
        "restore_seconds": restore_seconds(size, most * known.stored, known, given),
        "relearnt": run["relearnt_for_a_lost_shard"],
    }


def spread_puts(times: np.ndarray, count: int, known: Facts) -> dict[str, float]:
    """What one shard would see if the users of a cohort were in all shards: every cohort comes, with a part of it."""
    service = known.commit + known.users * known.stored / count * known.each
    free, waits = 0.0, np.empty(len(times))
    for at, when in enumerate(times):
        free = max(when, free) + service
        waits[at] = free - when
    p50, p99 = np.quantile(waits, (0.5, 0.99)).tolist()
    return {"commits_per_cohort": min(count, known.users), "p50": p50, "p99": p99}


def served(known: Facts, given: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for users in given.users:
        for slots in given.slots:
            hits = {exponent: hit_rate(users, slots, exponent) for exponent in given.exponents}
            worst = 1 - min(hits.values())
            found.append(
                {
                    "users": users,
                    "slots": slots,
                    "pool_bytes": slots * known.slot,
                    "hits": {str(exponent): hit for exponent, hit in hits.items()},
                    "wanted_90": wanted_by(users, 0.9, given.exponents[0]),
                    # a thread that reads one adapter after the other, cold
                    "requests_per_second_of_a_shard_thread": 1 / (worst * known.cold[0]) if worst else None,
                }
            )
    return found


def rhythms(known: Facts, given: argparse.Namespace) -> list[dict[str, Any]]:
    """What it takes to train everybody again and again: machines that never rest, and what each round adds."""
    found = []
    for users in given.users:
        busy = math.ceil(users / known.users) * known.cohort
        found.append(
            {
                "users": users,
                "machine_hours": busy / HOUR,
                "machines": {days: math.ceil(busy / (days * DAY)) for days in given.days},
                "bytes_of_a_round": users * known.stored * (known.record + known.index),
            }
        )
    return found


def checked(known: Facts, given: argparse.Namespace) -> list[list[Any]]:
    """(what, simulated, measured or exact): where the same thing is known in another way."""
    books = read("fleet", "results", "fleet_books.json")
    serving = read("serving", "results", "serving_zipf.json")
    rows: list[list[Any]] = []
    if given.data.is_dir():
        rows += [
            [
                f"the fleet of the books, from the step benchmark and its tokens, {what}: seconds",
                seconds,
                books["timing"]["seconds"],
            ]
            for what, seconds in from_steps(given.data, known.users).items()
        ]
    else:
        print(f"no {given.data}: the tokens of the books are not counted", file=sys.stderr)
    slots, turns = serving["pool"]["slots"], len(serving["ratios"])
    requests = round(serving["switches"] / (1 - serving["hit_rate"]) / turns)
    replay = replayed(100_000, slots, 1.0, turns, requests, given.seed)
    rows.append([f"found in a pool of {slots} of 100,000 adapters, Zipf 1.0", replay, serving["hit_rate"]])
    exact = simulate(Cluster(37, 5, known.cohort), given.seed).seconds
    rows.append(["37 cohorts on 5 machines, nothing fails: seconds", exact, makespan([known.cohort] * 37, 5)])
    tasks, mtbf = 20_000, 10 * known.cohort
    again = simulate(Cluster(tasks, 50, known.cohort, mtbf=mtbf), given.seed).attempts - tasks
    wanted = tasks * with_failures(known.cohort, mtbf, 0.0)[1]
    rows.append(["20,000 cohorts, a failure in the time of ten: begun again", again, wanted])
    return rows


def from_steps(data: Path, size: int) -> dict[str, float]:
    """Seconds of the fleet of the books, had every token taken as long as one of a step of 64 users."""
    from modicum.fleet.sample import sampled
    from modicum.fleet.spec import load_fleet
    from modicum.fleet.work import Work, cohorts_of, work_of

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "users.jsonl"
        subprocess.run(
            [sys.executable, str(HERE / "users.py"), "--data", str(data), "--output", str(rows)], check=True
        )
        spec = load_fleet(HERE.parents[1] / "recipes" / "fleet" / "users.yaml", [f"users.source='{rows}'"])
        cohorts = cohorts_of(sampled(spec, None).users, size)
    work = sum((work_of(one, spec.train, _PASS) for one in cohorts), Work())
    step = read("fleet", "results", "fleet_throughput.json")["cases"]["embedded, 8 rows of 8 tokens a user"]
    each = step["cohort_seconds"] / (64 * 8 * 8)
    return {
        "looking at rows as dear as training": each * work.all_tokens,
        "looking free of charge": each * work.tokens,
    }


def assumptions(given: argparse.Namespace) -> dict[str, Any]:
    """The options, as JSON can have them."""
    values = {name: value for name, value in vars(given).items() if name not in ("data", "output")}
    return {**values, "mtbf_hours": [None if hours == math.inf else hours for hours in given.mtbf_hours]}


def tables(known: Facts, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name of a result -> everything in it."""
    runs = list(trained(known, given))
    calm = {run["users"]: run for run in runs if run["mtbf_hours"] is None}
    held = [shards(users, run, known, given) for users, run in calm.items()]
    cached, sure, again = served(known, given), checked(known, given), rhythms(known, given)
    for run in runs:
        del run["commits"]
    about = {
        "command": f"python benchmarks/fleet/simulate.py --seed {given.seed}",
        "measured": asdict(known),
        "assumed": assumptions(given),
    }
    assumed = (
        f"Assumed: {given.hours:g} hours if nothing fails, {given.repair_minutes:g} minutes until a failed machine is "
        f"back, {given.slow_share:.0%} of the machines {given.slow_factor:g} × slower, "
        f"one shard lost in the second half of every run, "
        f"backups every {given.backup_hours:g} h. Measured: a cohort of {known.users} users takes {known.cohort:.0f} s."
    )
    found: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "": ("machines and failures", runs, machines_table(runs, assumed)),
        "_store": ("shards", held, shards_table(held, given)),
        "_serving": ("caches", cached, serving_table(cached, given)),
        "_rhythm": ("training again and again", again, rhythm_table(again)),
        "_checked": ("simulated against measured", sure, checked_table(sure)),
    }
    return {
        f"fleet_simulation{name}": {"what": what, **about, "found": values, "table": shown}
        for name, (what, values, shown) in found.items()
    }


def machines_table(runs: Sequence[dict[str, Any]], note: str) -> dict[str, Any]:
    rows = [
        [
            f"{run['users']:,}",
            str(run["machines"]),
            "never" if run["mtbf_hours"] is None else f"{run['mtbf_hours']:g} h",
            f"{run['hours']:.2f}",
            f"{run['failures']:,}",
            f"{run['cohorts_again']:,}",
            f"{run['relearnt_for_a_lost_shard']:,}",
            f"{run['wasted']:.2%}",
            f"{run['down']:.2%}",
            f"{run['idle']:.2%}",
            f"{run['wasted_without_cohorts']:.0%}",
        ]
        for run in runs
    ]
    columns = [
        "users", "machines", "one fails every", "hours", "failures", "cohorts again", "and for a lost shard",
        "computed in vain", "down", "idle", "in vain without cohorts",
    ]  # fmt: skip
    return {"columns": columns, "rows": rows, "note": note}


def shards_table(held: Sequence[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    rows = [
        [
            f"{one['users']:,}",
            str(one["shards"]),
            f"{one['bytes'] / TB:.3g}",
            f"{one['shard_bytes'] / GB:.1f}",
            f"{one['fullest_over_mean']:.1%}",
            f"{one['puts_per_hour_and_shard']:.1f}",
            milliseconds(one["put_seconds"]),
            f"{one['put_seconds']['max']:.0f}",
            f"{one['spread']['commits_per_cohort']} × {milliseconds(one['spread'])}",
            f"{one['restore_seconds'] / MINUTE:.1f}",
            f"{one['relearnt']:,}",
        ]
        for one in held
    ]
    columns = [
        "users", "shards", "TB in all", "GB of a shard", "fullest over mean", "puts per hour and shard",
        "a put, ms", "the longest, s", "spread over all shards, ms", "minutes to restore one",
        "cohorts trained again for it",
    ]  # fmt: skip
    note = (
        f"Shards of {given.shard_users:,} users. Two times are median and 99th percentile. Restoring is copying at "
        f"{given.network_gbit:g} Gbit/s (assumed) and checking every record (measured)."
    )
    return {"columns": columns, "rows": rows, "note": note}


def milliseconds(found: dict[str, Any]) -> str:
    return f"{1e3 * found['p50']:.1f} / {1e3 * found['p99']:.1f}"


def serving_table(pools: Sequence[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    rows = [
        [
            f"{one['users']:,}",
            f"{one['wanted_90']:,.0f}",
            f"{one['slots']:,}",
            f"{one['pool_bytes'] / 2**30:.2f}",
            *(f"{hit:.1%}" for hit in one["hits"].values()),
            "–"
            if one["requests_per_second_of_a_shard_thread"] is None
            else f"{one['requests_per_second_of_a_shard_thread']:,.0f}",
        ]
        for one in pools
    ]
    columns = [
        "users", "users who make 90 % of the requests", "slots", "GiB of the pool",
        *(f"found in memory, exponent {exponent:g}" for exponent in given.exponents),
        "requests per second that one reading thread feeds",
    ]  # fmt: skip
    note = (
        "Requests by Zipf's law, the pool keeps those used last (Che's approximation). A thread that reads one adapter "
        f"after the other, cold, and the worst of the hit rates; users who make 90 %: exponent {given.exponents[0]:g}."
    )
    return {"columns": columns, "rows": rows, "note": note}


def rhythm_table(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    days = list(rounds[0]["machines"]) if rounds else []
    rows = [
        [
            f"{one['users']:,}",
            f"{one['machine_hours']:,.0f}",
            *(f"{count:,}" for count in one["machines"].values()),
            f"{one['bytes_of_a_round'] / TB:.3g}",
        ]
        for one in rounds
    ]
    every = [f"machines, everybody every {f'{count} days' if count > 1 else 'day'}" for count in days]
    note = "Machines that never rest and never fail. Terabytes of a round that keeps the versions before it."
    return {
        "columns": ["users", "machine hours of a round", *every, "TB of a round"],
        "rows": rows,
        "note": note,
    }


def checked_table(rows: Sequence[list[Any]]) -> dict[str, Any]:
    shown = [
        [what, f"{found:,.4g}", f"{real:,.4g}", f"{found / real - 1:+.1%}"] for what, found, real in rows
    ]
    return {"columns": ["", "simulated", "measured, or in closed form", "difference"], "rows": shown}


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, nargs="+", default=[10**5, 10**6, 10**7, 10**8])
    parser.add_argument("--mtbf-hours", type=float, nargs="+", default=[math.inf, 1000.0, 100.0, 10.0])
    parser.add_argument("--hours", type=float, default=24.0, help="in which a round is to be finished")
    parser.add_argument("--repair-minutes", type=float, default=10.0, help="until a failed machine is back")
    parser.add_argument("--slow-share", type=float, default=0.02, help="of machines, that are slow")
    parser.add_argument("--slow-factor", type=float, default=2.0)
    parser.add_argument("--shard-users", type=int, default=1_000_000)
    parser.add_argument("--losses", type=int, default=1, help="shards lost in every run")
    parser.add_argument("--backup-hours", type=float, default=1.0)
    parser.add_argument("--network-gbit", type=float, default=10.0)
    parser.add_argument("--slots", type=int, nargs="+", default=[512, 65_536, 1_048_576])
    parser.add_argument("--exponents", type=float, nargs="+", default=[1.0, 0.8])
    parser.add_argument(
        "--days", type=int, nargs="+", default=[1, 7, 30], help="between two rounds of training"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(words)


def main() -> None:
    given = options()
    for name, values in tables(facts(), given).items():
        (given.output / f"{name}.json").write_text(
            json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
