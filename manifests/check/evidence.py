"""Which plan the files of a dataset are of, where they do not agree.

One rule: plan.json, manifest.json and the entries in commits/ are independent witnesses, and a seal makes none of them
right. Two that agree outvote one; where no two agree, nobody decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pydantic import ValidationError

from dtpipe.manifests.canonical import blake3_hex, dump_record, load_record
from dtpipe.manifests.check.problems import UNREADABLE, Problem, problem_of, reason
from dtpipe.manifests.errors import DtpipeError, ManifestError, MissingObjectError
from dtpipe.manifests.layout.tables import INDEX_FILE, LISTING_FILE, SHARDS_FILE
from dtpipe.manifests.schema import Manifest, Plan, ShardEntry
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import COMMIT_FOLDER, MANIFEST_FILE, load_manifest
from dtpipe.manifests.write.plan import PLAN_FILE, parse_plan

_THREADS, _READ_AHEAD = 16, 512
_ENTRY = re.compile(rf"{COMMIT_FOLDER}[0-9]+\.json")
_SHOWN = 12  # digits of a digest


@dataclass(frozen=True)
class Evidence:
    """What the files say of the plan, and what follows."""

    plan: Plan | None
    """None: no plan can be trusted."""
    plan_bytes: bytes | None
    """As they should be; other than those in the store where they were rebuilt from the manifest."""
    manifest: Manifest | None
    """If it is of this plan."""
    disagreement: str = ""
    """What no two witnesses agree on; then nothing may be changed."""


def read_all(store: Store, names: Iterable[str]) -> Iterator[tuple[str, bytes | DtpipeError]]:
    """Each file's bytes, or the error of reading it; read ahead in threads."""

    def read(name: str) -> bytes | DtpipeError:
        try:
            return store.read(name)
        except UNREADABLE as err:
            return err

    listed = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(listed), _READ_AHEAD):
            some = listed[first : first + _READ_AHEAD]
            yield from zip(some, pool.map(read, some), strict=True)


def find_plan_evidence(store: Store, problems: list[Problem]) -> Evidence:
    """Read plan.json and manifest.json, and the entries where these do not agree."""
    manifest = _read_manifest(store, problems)
    data, plan, trouble = _read_plan(store)
    named = manifest.files[PLAN_FILE].blake3 if manifest is not None and PLAN_FILE in manifest.files else None
    if manifest is not None and named is None:
        problems.append(Problem(MANIFEST_FILE, f"does not name {PLAN_FILE}", "merge"))
        manifest = None
    stored = blake3_hex(data) if data is not None else None
    if plan is not None and named in (None, stored):
        return Evidence(plan, data, manifest)
    if plan is None and named is None:
        assert trouble is not None
        problems.append(Problem(PLAN_FILE, trouble.what, "nobody"))
        return Evidence(None, None, None)
    return _decide(store, manifest, data if plan is not None else None, plan, trouble, problems)


def _decide(
    store: Store,
    manifest: Manifest | None,
    data: bytes | None,
    plan: Plan | None,
    trouble: Problem | None,
    problems: list[Problem],
) -> Evidence:
    """plan.json is damaged, or the manifest is of another plan: ask the entries."""
    assert manifest is not None
    named = manifest.files[PLAN_FILE].blake3
    stored = blake3_hex(data) if data is not None else None
    plans = plans_of_entries(store)
    majority, share = majority_of(plans)
    if stored is not None and majority == stored:
        problems.append(Problem(MANIFEST_FILE, f"is of another plan than {PLAN_FILE} and {share}", "merge"))
        return Evidence(plan, data, None)
    if majority == named or (stored is None and not plans):
        again = rebuilt_plan(manifest)
        what = trouble.what if trouble else f"is not the plan that {MANIFEST_FILE} and {share} are of"
        if trouble is not None and trouble.mend == "nobody":
            problems.append(trouble)  # it may only be out of reach
            return Evidence(None, None, None)
        problems.append(Problem(PLAN_FILE, what, "nobody" if again is None else "rewrite"))
        if again is None:
            return Evidence(None, None, None)
        return Evidence(load_record(Plan, again, PLAN_FILE), again, manifest)
    sayings = [f"{PLAN_FILE} is plan {stored[:_SHOWN]}" if stored else f"{PLAN_FILE} cannot be read"]
    sayings += [f"{MANIFEST_FILE} is of plan {named[:_SHOWN]}", *_sayings(plans)]
    what = f"no two of these agree: {', '.join(sayings)}"
    problems.append(Problem(PLAN_FILE, what, "nobody"))
    return Evidence(None, None, None, what)


def outvoted(plan_blake3: str, plans: Counter[str]) -> str:
    """What contradicts a plan without a manifest: most entries are of another one. Empty where they are not."""
    majority, _ = majority_of(plans)
    if majority in (None, plan_blake3):
        return ""
    return f"no two of these agree: {PLAN_FILE} is plan {plan_blake3[:_SHOWN]}, {', '.join(_sayings(plans))}"


def plans_of_entries(store: Store) -> Counter[str]:
    """How many entries are of which plan; damaged ones are left out."""
    plans: Counter[str] = Counter()
    names = [name for name in store.list(COMMIT_FOLDER) if _ENTRY.fullmatch(name)]
    for name, data in read_all(store, names):
        if isinstance(data, bytes):
            try:
                plans[load_record(ShardEntry, data, name).plan_blake3] += 1
            except ManifestError:
                continue
    return plans


def majority_of(plans: Counter[str]) -> tuple[str | None, str]:
    """The plan of more than half of the entries, if there is one, and their share in words."""
    plan_blake3, count = plans.most_common(1)[0] if plans else ("", 0)
    total = plans.total()
    return (plan_blake3, f"{count} of {total} entries") if 2 * count > total else (None, "")


def _sayings(plans: Counter[str]) -> list[str]:
    said = [f"{count} entries of plan {plan_blake3[:_SHOWN]}" for plan_blake3, count in plans.most_common(3)]
    return said or ["there are no entries"]


def rebuilt_plan(manifest: Manifest) -> bytes | None:
    """The bytes of plan.json as the manifest describes it, if they come out as the ones it names."""
    totals, files = manifest.totals, manifest.files
    if PLAN_FILE not in files or LISTING_FILE not in files:
        return None
    try:
        plan = Plan(
            format=manifest.format,
            recipe=manifest.recipe,
            num_rows=totals.num_rows,
            num_shards=totals.num_shards,
            listing_blake3=files[LISTING_FILE].blake3,
            provenance=manifest.provenance.get("plan", {}),
        )
        data = dump_record(plan)
        parse_plan(data, PLAN_FILE)
    except (ValidationError, ManifestError):
        return None
    return data if blake3_hex(data) == files[PLAN_FILE].blake3 else None


def _read_manifest(store: Store, problems: list[Problem]) -> Manifest | None:
    try:
        return load_manifest(store)
    except MissingObjectError:
        if store.exists(SHARDS_FILE) or store.exists(INDEX_FILE):
            problems.append(Problem(MANIFEST_FILE, "is missing, although the shards were merged or nearly so", "merge"))
    except UNREADABLE as err:
        problems.append(problem_of(MANIFEST_FILE, err, "merge"))
    return None


def _read_plan(store: Store) -> tuple[bytes | None, Plan | None, Problem | None]:
    try:
        data = store.read(PLAN_FILE)
        return data, parse_plan(data, store.where(PLAN_FILE)), None
    except UNREADABLE as err:
        problem = problem_of(PLAN_FILE, err, "extract")
        return None, None, Problem(PLAN_FILE, reason(err), "nobody" if problem.mend == "nobody" else "rewrite")
