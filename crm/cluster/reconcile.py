"""Makes a sweep on Slurm what was asked: the one place that submits, submits again, holds and gives up.

It looks, compares and acts, and doing it twice changes nothing; a lease keeps it to one process at a time. It runs when
`crm sweep` is typed, at the end of every job of the sweep, and in a last job behind all of them, so that nobody has to
watch. What is done about a failure is data (crm.failures.REASONS); how often it was tried stands in the run's journal.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crm import failures
from crm.cluster import slurm
from crm.cluster.folder import Asked, Submission, SweepFolder
from crm.cluster.slurm import FINISHED, Element
from crm.cluster.smoked import smoke_key, verdict
from crm.cluster.submit import Full, Refused, Uncertain, new, settle, submit
from crm.cluster.view import Seen, look, worked_on_here
from crm.config import Config, difference
from crm.records import append, claims, raw_lines, read_config, read_json, retire, write_json
from crm.retries import halve, may_retry, retries, teach

SETTLE = 4.0  # seconds for which the scheduler must say the same before a process without a last word is given up
ARRIVAL = 20.0  # seconds after which a job whose submission was never answered would be there
SCANCELLED = "cancelled with scancel"  # how the reason begins for which such a run is held
SMOKES = 3  # tries of a smoke test that ends without a verdict


@dataclass
class Report:
    """What one look came to."""

    words: list[str] = field(default_factory=list)  # what was done, and what stands in the way
    submitted: dict[str, str] = field(default_factory=dict)  # label -> why, for what was handed in
    unsubmitted: list[str] = field(default_factory=list)  # labels that the scheduler takes later
    unsettled: int = 0  # cells of which it is not yet certain what has become


def reconcile(
    folder: SweepFolder, own: tuple[str, int] | None = None, patience: float = 0.0, held: bool = False
) -> Report:
    """One look at the sweep, and all that follows from it.

    Args:
        own: submission and task of the job that calls, which is about to end and so counts as over.
        patience: seconds to wait for another process that is at it.
        held: what is submitted waits until it is released.

    Raises Busy, slurm.Unreachable, or Refused if the scheduler does not take jobs like these at all.
    """
    with folder.lease(patience):
        asked = folder.asked()
        if asked is None:
            raise ValueError(f"nothing was asked of {folder.name} yet: crm sweep {folder.name} --cluster slurm")
        return _Round(folder, asked, own, held).work()


class _Round:
    """One reconciliation."""

    def __init__(self, folder: SweepFolder, asked: Asked, own: tuple[str, int] | None, held: bool) -> None:
        self.folder, self.asked, self.own, self.held = folder, asked, own, held
        self.report = Report()
        self.looks: dict[str, float] = read_json(folder.path / "looks.json") or {}
        self.doubts: dict[str, float] = {}
        self.ended: dict[tuple[str, int], tuple[str, str]] | None = None

    def work(self) -> Report:
        self._settle_submissions()
        self.now = look(self.folder, self.asked)
        if self.now.trouble:
            raise slurm.Unreachable(self.now.trouble)
        if self._gates():
            self.now = look(self.folder, self.asked)
        todo: dict[tuple[str, float, str], list[Seen]] = {}
        for seen in self.now.cells:
            if (key := self._wanted(seen)) is not None:
                todo.setdefault(key, []).append(seen)
        write_json(self.folder.path / "looks.json", self.doubts)
        self.report.unsettled = len(self.doubts)
        if self._broken():
            todo = {}
        self._submit(todo)
        self._afterwards()
        if self.now.removed:
            self.report.words.append(
                f"{len(self.now.removed)} runs have jobs and are no longer in the sweep: crm cancel "
                f"{self.folder.name} --removed"
            )
        return self.report

    # ------------------------------------------------------------------------------------------ submissions

    def _settle_submissions(self) -> None:
        """Finds the jobs whose ids never arrived; raises slurm.Unreachable."""
        for one in self.folder.submissions():
            if one.state != "intended":
                continue
            found = settle(self.folder, one)
            if found.state == "submitted":
                self.report.words.append(f"job {found.job} exists although sbatch did not answer; it is used")
            elif time.time() - one.time > ARRIVAL:
                self.folder.write(replace(one, state="refused", why="it never reached the scheduler"))

    def _gates(self) -> bool:
        """Looks at smoke tests that are over; True if something was cancelled or held."""
        acted = False
        for smoke in self.now.submissions:
            gated = [one for one in self.now.submissions if one.gate == smoke.token and one.state == "submitted"]
            if smoke.kind != "smoke" or not any(self._open(one) for one in gated) or self._open(smoke):
                continue
            told = {id: verdict(self.folder, smoke_key(read_config(self.folder.run(id)), smoke)) for id in smoke.cells}
            bad = {id: found for id, found in told.items() if found is not None and not found["passed"]}
            if not bad and None not in told.values():
                continue
            acted = True
            slurm.cancel([one.job for one in gated])
            waiting = [id for one in gated for id in one.cells]
            for one in gated:
                self.folder.write(replace(one, state="refused", why="its smoke test failed"))
            if bad:
                self._hold_smoked(bad, waiting)
            else:
                self._without_verdict(smoke, waiting)
            self.report.words.append(f"the smoke test failed; {len(waiting)} runs were not started")
        return acted

    def _without_verdict(self, smoke: Submission, waiting: Sequence[str]) -> None:
        """A smoke test that was killed is tried again where that may help, a few times."""
        state, code = self._accounted().get((smoke.token, 0), ("", ""))
        kind = failures.reason_of_end(state, code, _tail(self.folder.jobs(smoke.token) / f"{smoke.job}_0_log.out"))
        tries = sum(one.kind == "smoke" and bool(set(one.cells) & set(smoke.cells)) for one in self.now.submissions)
        if kind in ("preempted", "node", "lost", "unknown") and tries < SMOKES:
            return
        hint = "; ask for more with --slurm memory_gb=" if kind == "host_memory" else ""
        hint = hint or ("; ask for more with --slurm minutes=" if kind == "time" else "")
        ended = failures.REASONS[kind].words.partition(":")[0]
        why = f"the smoke test gave no verdict: {ended}{hint} (its log is in {self.folder.jobs(smoke.token)})"
        self.folder.hold(waiting, "smoke", f"{why}; crm release tries anew")
        self.report.words.append(why)

    def _hold_smoked(self, bad: Mapping[str, Any], waiting: Sequence[str]) -> None:
        """The runs that would fail, with how; and the others, which may be released."""
        labels = self.asked.labels
        keys = {id: _settings(self.folder, id) for id in waiting}
        failing = {_settings(self.folder, id): found for id, found in bad.items()}
        for id in waiting:
            found = failing.get(keys[id])
            if found is not None:
                self.folder.hold([id], "smoke", f"fails in the smoke test: {found['reason']}")
            else:
                other = labels.get(next(iter(bad)), next(iter(bad)))
                self.folder.hold([id], "smoke", f"{other} failed the smoke test; crm release starts the others")
        for id, found in bad.items():
            self.report.words.append(f"smoke test of {labels.get(id, id)} failed: {found['reason']}")

    def _open(self, submission: Submission) -> bool:
        """Whether the scheduler still has some of it; what calls counts as over."""
        return any(
            element.state not in FINISHED and (submission.token, element.task or 0) != self.own
            for element in self.now.of(submission)
        )

    # ------------------------------------------------------------------------------------------ one cell

    def _wanted(self, seen: Seen) -> tuple[str, float, str] | None:
        """What a job for this cell needs (dependency, memory, nodes to avoid), or None if there is to be none now."""
        own = seen.submission is not None and (seen.submission.token, seen.task) == self.own
        if seen.files.name == "done" or seen.hold is not None or (seen.live and not own):
            return None
        if seen.elsewhere is not None:
            return self._needs(seen, f"afterany:{seen.elsewhere.id}")
        if worked_on_here(seen):
            holder = seen.files.holder or {}
            self.report.words.append(f"{seen.label} is being worked on by process {holder['pid']} of {holder['host']}")
            return None
        lines = list(raw_lines(self.folder.run(seen.id) / "journal.jsonl"))
        asked_again = max((line["time"] for line in lines if line["event"] == "retry"), default=0.0)
        if seen.submission is None or seen.submission.time < asked_again:
            return self._needs(seen)
        kind = self._ending(seen, seen.submission, lines)
        return None if kind is None else self._again(seen, kind)

    def _ending(self, seen: Seen, submission: Submission, lines: list[dict[str, Any]]) -> str | None:
        """The kind of the end of the newest submission's attempt, "" for a good one; None while it is not certain.

        An attempt that left no last word gets one here.
        """
        run = self.folder.run(seen.id)
        last = next((one for one in reversed(claims(run)) if _of(one, submission, seen.task)), None)
        own = (submission.token, seen.task) == self.own
        end = next((line for line in reversed(lines) if line["event"] == "end" and last is not None
                    and line["token"] == last["token"]), None)  # fmt: skip
        if end is not None:
            if end["outcome"] == "stopped" and not own and self._terminal(submission, seen)[0] == "CANCELLED":
                return self._last_word(seen, "cancelled", SCANCELLED)
            return end.get("kind", "") if end["outcome"] != "done" else ""
        if last is None and any(line.get("token") == submission.token for line in lines if line["event"] == "end"):
            return next(line["kind"] for line in reversed(lines) if line.get("token") == submission.token)
        if self.own is not None and own:  # it had nothing to do: the run is another's, or held
            return ""
        first = self.looks.get(seen.id, time.time())
        if time.time() - first < SETTLE:
            self.doubts[seen.id] = first
            return None
        state, code = self._terminal(submission, seen)
        if last is None and state == "COMPLETED":
            return ""  # it left because the run was another's
        if last is None and not state:
            # cancelled while it waited, it is not even in accounting; but neither is what the controller has lost
            known = bool(self.now.of(submission)) or self._any_ended(submission)
            kind = "cancelled" if known else "lost"
        else:
            kind = failures.reason_of_end(state, code, self._printed(submission, seen))
        words = f"job {submission.job}_{seen.task} ended without a word ({state or 'gone from the queue'})"
        return self._last_word(seen, kind, words, last)

    def _last_word(self, seen: Seen, kind: str, words: str, last: Mapping[str, Any] | None = None) -> str:
        """Writes the end of an attempt in its place, and takes its claim away."""
        run, submission = self.folder.run(seen.id), seen.submission
        assert submission is not None
        token = last["token"] if last is not None else submission.token
        known = {"token": token, "kind": kind, "reason": words, "step": seen.files.step}
        append(run, "end", outcome="lost", **known)
        if failures.REASONS[kind].action == failures.HOLD and kind != "cancelled":
            write_json(run / "failure.json", {**known, "traceback": self._printed(submission, seen)})
        if last is not None:
            retire(run, token)
        return kind

    def _again(self, seen: Seen, kind: str) -> tuple[str, float, str] | None:
        """What the policy says about an attempt that ended so; None if nothing is to be tried."""
        if not kind:
            return self._needs(seen)
        if kind == "cancelled":
            self.folder.hold([seen.id], "cancel", f"{SCANCELLED}; crm retry {self.folder.name} starts it again")
            return None
        processes = self.asked.resources["nodes"] * self.asked.resources["tasks"]
        if not may_retry(self.folder.run(seen.id), kind, processes) or not self._ease(seen, kind, processes):
            self._give_up(seen, kind)
            return None
        self.report.submitted[seen.label] = failures.REASONS[kind].words
        return self._needs(seen)

    def _ease(self, seen: Seen, kind: str, processes: int) -> bool:
        """Writes what the next attempt does otherwise; False if nothing is left to be done otherwise."""
        run, action = self.folder.run(seen.id), failures.REASONS[kind].action
        assert seen.submission is not None
        if action == failures.HALVE:
            halve(run, processes)
        elif action == failures.MORE_MEMORY:
            had, most = seen.submission.resources["memory_gb"], self.asked.resources["max_memory_gb"]
            if had >= most:
                return False
            teach(run, {"memory_gb": min(most, had * failures.MEMORY_FACTOR)})
        elif action == failures.EXCLUDE:
            node = next((one["job"]["node"] for one in reversed(claims(run)) if one.get("job")), "")
            node = node or (seen.element.node if seen.element else "")
            teach(run, {"exclude": sorted({*retries(run).get("exclude", []), *([node] if node else [])})})
        return True

    def _give_up(self, seen: Seen, kind: str) -> None:
        """A run that nobody tries again says why in its folder."""
        run = self.folder.run(seen.id)
        if read_json(run / "failure.json") is None:
            lines = [line for line in raw_lines(run / "journal.jsonl") if line["event"] == "end"]
            reason = lines[-1].get("reason", "") if lines else ""
            words = f"{reason or kind}; tried as often as the policy allows ({failures.REASONS[kind].words})"
            write_json(run / "failure.json", {"kind": kind, "reason": words, "step": seen.files.step, "token": "",
                                              "traceback": ""})  # fmt: skip
            self.report.words.append(f"{seen.label} is given up: {words}")

    def _needs(self, seen: Seen, after: str = "") -> tuple[str, float, str]:
        learnt = retries(self.folder.run(seen.id))
        memory = learnt.get("memory_gb", self.asked.resources["memory_gb"])
        exclude = ",".join(part for part in (self.asked.resources["exclude"], *learnt.get("exclude", [])) if part)
        self.report.submitted.setdefault(seen.label, "")
        return after, memory, exclude

    # ------------------------------------------------------------------------------------------ what became of jobs

    def _terminal(self, submission: Submission, seen: Seen) -> tuple[str, str]:
        """The scheduler's last word on an element: state and exit code; "" where it has none."""
        element = self.now.elements.get(submission.token, {}).get(seen.task)
        found = self._accounted().get((submission.token, seen.task))
        if element is not None and element.state in FINISHED:
            return element.state, found[1] if found else ""
        return found or ("", "")

    def _accounted(self) -> dict[tuple[str, int], tuple[str, str]]:
        """What accounting says of the jobs of this sweep that are over, asked once; nothing where it is silent."""
        if self.ended is None:
            self.ended = {}
            try:
                kinds = ("cells", "smoke")
                tokens = [one.token for one in self.now.submissions if one.kind in kinds and one.state == "submitted"]
                for one in slurm.history(tokens):
                    if one.state in FINISHED:
                        self.ended[one.name, one.task or 0] = (one.state, one.exit)
            except slurm.Unreachable as error:
                self.report.words.append(str(error))
        return self.ended

    def _any_ended(self, submission: Submission) -> bool:
        return any(token == submission.token for token, _ in self._accounted())

    def _printed(self, submission: Submission, seen: Seen) -> str:
        """The end of what the job printed before its run's own log took over, and of that log."""
        name = f"{submission.job}_{seen.task}" if len(submission.cells) > 1 else submission.job
        paths = (self.folder.run(seen.id) / "log.txt", self.folder.jobs(submission.token) / f"{name}_0_log.out")
        return "".join(_tail(path) for path in paths)

    # ------------------------------------------------------------------------------------------ the whole

    def _broken(self) -> bool:
        """Holds what waits, if runs fail one after another with the same traceback."""
        found = {seen.id: read_json(self.folder.run(seen.id) / "failure.json") for seen in self.now.cells
                 if seen.files.name != "done"}  # fmt: skip
        failed = {id: failure for id, failure in found.items() if failure is not None}
        worst = failures.outbreak(failed, self.asked.resources["breaker"], self.folder.passed())
        if not worst:
            return False
        left = [seen for seen in self.now.cells if seen.files.name not in ("done", "failed") and seen.id not in worst
                and seen.hold is None and (not seen.live or _waits(seen.element))]  # fmt: skip
        if left:
            slurm.hold([seen.element.id for seen in left if seen.element is not None and _waits(seen.element)])
            first = self.asked.labels.get(worst[0], worst[0])
            why = f"{len(worst)} runs failed with the same traceback, {first} first: crm fails {self.folder.name}"
            self.folder.hold([seen.id for seen in left], "breaker", why)
            self.report.words.append(f"{why}; {len(left)} runs are held until crm release {self.folder.name}")
            self.report.submitted.clear()
        return True

    def _submit(self, todo: Mapping[tuple[str, float, str], Sequence[Seen]]) -> None:
        """One array for all that need the same, in parts where the scheduler takes no larger one.

        An array that is more than the scheduler takes for now is refused whole, so its halves are tried.
        """
        jobs: list[str] = []
        labels: list[str] = []
        queue = [(key, part) for key, cells in todo.items() for part in self._parts(cells)]
        asked_for = [seen.label for _, part in queue for seen in part]
        try:
            gate, job = self._smoke([seen for _, part in queue for seen in part]) if queue else ("", "")
            jobs += [job] if job else []
            before = ""
            while queue:
                (after, memory, exclude), part = queue.pop(0)
                wanted = {**self.asked.resources, "memory_gb": memory, "exclude": exclude}
                waits = [after, f"afterok:{job}" if job else "", before]
                one = new(self.folder, "cells", [seen.id for seen in part], gate, resources=wanted)
                try:
                    made = submit(self.folder, one, ",".join(text for text in waits if text), self.held)
                except Full:
                    if len(part) == 1:
                        raise
                    half = len(part) // 2
                    queue[:0] = [((after, memory, exclude), few) for few in (part[:half], part[half:])]
                    continue
                jobs.append(made.job)
                labels += [seen.label for seen in part]
                # the throttle is of one array: the next waits for this one
                before = f"afterany:{made.job}" if self.asked.resources["throttle"] else ""
        except (Full, Uncertain) as error:
            self.report.words.append(str(error))
        left = [label for label in asked_for if label not in labels]
        if left:
            self.report.unsubmitted = left
            self.report.words.append(
                f"{len(labels)} of {len(labels) + len(left)} runs were submitted; crm reconcile {self.folder.name} "
                "submits the rest, and so does every job of the sweep when it ends"
            )
        self.report.submitted = {label: why for label, why in self.report.submitted.items() if label in labels}
        if jobs:
            self._last_job(jobs)

    def _parts(self, cells: Sequence[Seen]) -> list[Sequence[Seen]]:
        most = slurm.limits().max_array
        return [cells[start : start + most] for start in range(0, len(cells), most)]

    def _smoke(self, cells: Sequence[Seen]) -> tuple[str, str]:
        """Token and job of the smoke test that these cells wait for; empty where all of them have passed one."""
        if not self.asked.smoke:
            return "", ""
        keys: dict[str, str] = {}
        probe = new(self.folder, "smoke", [])
        for seen in cells:
            key = smoke_key(read_config(self.folder.run(seen.id)), probe)
            if not (verdict(self.folder, key) or {}).get("passed"):
                keys.setdefault(key, seen.id)
        if not keys:
            return "", ""
        made = submit(self.folder, new(self.folder, "smoke", list(keys.values())))
        try:  # if it is killed without a verdict somebody must act, though nothing behind it ever starts
            submit(self.folder, new(self.folder, "reconcile", []), f"afternotok:{made.job}")
        except (Full, Uncertain, Refused) as error:
            self.report.words.append(str(error))
        return made.token, made.job

    def _last_job(self, jobs: Sequence[str]) -> None:
        """A small job behind all others, which looks once more."""
        try:
            submit(self.folder, new(self.folder, "reconcile", []), f"afterany:{':'.join(jobs)}")
        except (Full, Uncertain, Refused) as error:
            self.report.words.append(f"no last job: {error}")

    def _afterwards(self) -> None:
        """What is done with finished runs besides, when all are."""
        if not self.asked.afterwards or any(seen.files.name != "done" for seen in self.now.cells):
            return
        made = [one for one in self.now.submissions if one.kind == "afterwards" and one.time > self.asked.time]
        if not made:
            try:
                submit(self.folder, new(self.folder, "afterwards", []))
            except (Full, Uncertain) as error:
                self.report.words.append(str(error))


def _tail(path: Path, most: int = 8000) -> str:
    """The end of a log; nothing where there is none."""
    try:
        return path.read_bytes()[-most:].decode(errors="replace")
    except OSError:
        return ""


def _of(claim: Mapping[str, Any], submission: Submission, task: int) -> bool:
    job = claim.get("job") or {}
    return job.get("name") == submission.token and job.get("task") == task


def _waits(element: Element | None) -> bool:
    return element is not None and element.state in slurm.WAITING


def _settings(folder: SweepFolder, id: str) -> str:
    changes = difference(read_config(folder.run(id)), Config())
    return str(sorted((path, str(value)) for path, value in changes.items() if path != "seed"))
