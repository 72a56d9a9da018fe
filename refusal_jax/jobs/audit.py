"""Tells what happened to a checkpoint, and whether it still refuses.

  refusal-jax audit CANDIDATE --base=BASE                    # against the model that it is said to be made from
  refusal-jax audit CANDIDATE                                # alone, which sees much less
  refusal-jax audit CANDIDATE --base=BASE --level=weights    # files and weights only: no model is run
  refusal-jax audit CANDIDATE --base=BASE --out=DIR          # also writes audit.json, audit.sarif and audit.html
  refusal-jax audit CANDIDATE --base=BASE --out=DIR --sign=key.pem          # and a signed in-toto statement
  refusal-jax audit CANDIDATE --base=BASE --repair=DIR       # undoes a partial removal, from the candidate itself
  refusal-jax audit verify DIR/audit.intoto.json CANDIDATE --key=key.pub    # checks it against the files
  refusal-jax audit bench --out=DIR --workers=16             # tries the audit and other detectors on made checkpoints

CANDIDATE and BASE are folders, names on the hub (ORG/NAME or ORG/NAME@REVISION), GGUF files or folders of adapters.
There are two verdicts. The first says whether the weights were edited: not at all, harmlessly, so that refusal was
removed or added, otherwise, or in a way that cannot be told. The second says whether the candidate refuses: as the base
does, less, no more, or more. "Intact" is said only where an interval shows it; what was not looked at makes no verdict.

The lanes are, cheap first: files (other tools' records, hashes, chat template, tensors), weights (the difference to the
base, matrix by matrix, streamed), alone (traces that an edit leaves in the candidate itself), activations, and
behaviour (replies to harmful and harmless prompts). A lane that cannot run says why, and the others go on.

Exit codes: 0 intact or hardened, 10 edited but it refuses, 20 refusal is lost, 30 inconclusive, 40 broken files or a
broken template, 2 bad input. --fail_on=abliterated,uncensored makes all other verdicts 0.
"""

import contextlib
import pathlib
import sys

from absl import flags

from refusal_jax import hub
from refusal_jax.audit.audit import Audit, run_audit
from refusal_jax.audit.broken import BrokenCheckpoint
from refusal_jax.audit.evidence import Findings
from refusal_jax.audit.output.attestation import verified
from refusal_jax.audit.output.checkpoint_files import checkpoint_paths
from refusal_jax.audit.output.files import check_place, check_unchanged, fingerprints, write_outputs
from refusal_jax.audit.output.record import audit_record, opened
from refusal_jax.audit.output.sarif import sarif_log
from refusal_jax.audit.output.summary import text_of
from refusal_jax.audit.repair import repair
from refusal_jax.audit.settings import LANES, AuditSettings
from refusal_jax.audit.verdict import OVERALL, Verdict
from refusal_jax.errors import UserError, VerificationError, did_you_mean
from refusal_jax.files import local_path, to_json, write_atomically
from refusal_jax.jobs import devices
from refusal_jax.jobs.setting_flags import flags_of
from refusal_jax.jobs.verdict_codes import asked_verdicts, exit_code
from refusal_jax.terminal.screen import escaped

ACTIONS = {"": 1, "verify": 2, "bench": 0}
EXAMPLE = ". Example: refusal-jax audit DIR --base=ORG/NAME --out=audited."
ELSEWHERE = (
    "candidate",
    "dtype",
)  # settings that are no flags of their own: the first word, and a flag that all jobs share
STDOUT = "-"


SETTINGS = flags_of(AuditSettings(), but=ELSEWHERE)
LEVEL = flags.DEFINE_enum(
    "level", None, LANES, "The last lane to run, in place of --lanes: it and the cheaper ones are run."
)
OUT = flags.DEFINE_string(
    "out", None, "Folder for audit.json, audit.sarif and audit.html. Files of the same names are replaced."
)
JSON = flags.DEFINE_string(
    "json", None, "File for the audit as JSON, or - to print it in place of the text. --out writes it, too."
)
SARIF = flags.DEFINE_string("sarif", None, "File for the SARIF log, or - to print it in place of the text.")
FAIL_ON = flags.DEFINE_list(
    "fail_on",
    None,
    f"Verdicts that make the exit code other than 0, separated by commas, of {', '.join(OVERALL)}. Default: each verdict has its "
    "own exit code.",
)
REPLIES = flags.DEFINE_bool(
    "replies", False, "Also write what the models replied to OUT/completions, and show samples of it on the page."
)
STATEMENT = flags.DEFINE_bool(
    "statement",
    False,
    "Also write an unsigned in-toto statement to OUT, which other tools can sign. Every file is hashed.",
)
SIGN = flags.DEFINE_string(
    "sign", None, "Private key in PEM with which the statement is signed, as a DSSE envelope in OUT/audit.intoto.json."
)
REPAIR = flags.DEFINE_string(
    "repair",
    None,
    "New folder for the candidate with what was removed put back, as far as it is there; it needs the base.",
)
KEY = flags.DEFINE_string("key", None, "For `verify`: the public key in PEM of whoever signed.")
BASES = flags.DEFINE_list("bases", None, "For `bench`: the bases that checkpoints are made from. Default: all.")
PER_BASE = flags.DEFINE_integer("per_base", 0, "For `bench`: the number of checkpoints of each base; 0 makes all.")
WORKERS = flags.DEFINE_integer("workers", 0, "For `bench`: the number of processes; 0 is one for each core.")
SMALL = flags.DEFINE_bool("small", False, "For `bench`: a dozen checkpoints of the embedded model, without training.")
flags.adopt_module_key_flags(devices)


def main(words) -> int:
    action = words[0] if words and words[0] in ACTIONS else ""
    if action == "bench":
        return bench()
    with hub.session({}):  # a name on the hub is one commit from the first lane to the statement
        if action == "verify":
            return verify(words[1:])
        return show(words)


def show(words: list[str]) -> int:
    """Audits the candidate, prints and writes what was found, and returns the exit code."""
    asked, fail_on, out = asked_settings(words), asked_verdicts(FAIL_ON.value, OVERALL), path_of(OUT)
    if (SIGN.value or STATEMENT.value or REPLIES.value) and not out:
        raise UserError(f"--out is missing, the folder for statement and replies{EXAMPLE}")
    checkpoints = [asked.candidate, *filter(None, [asked.base])]
    if out:
        check_place(out, *checkpoints)
    before = fingerprints(*checkpoints) if STATEMENT.value or SIGN.value else {}
    found = audited(asked)
    check_unchanged(before)
    wanted = (JSON.value, lambda: audit_record(found)), (SARIF.value, lambda: sarif_log(found, opened(asked.candidate)))
    for place, make in wanted:
        if place == STDOUT:
            print(to_json(make()).decode(), end="")
        elif place:
            write_atomically(local_path(place), to_json(make()))
    if STDOUT not in (JSON.value, SARIF.value):
        print(text_of(found, colour=sys.stdout.isatty()), end="")
    if out:
        files = write_outputs(found, out, REPLIES.value, STATEMENT.value, path_of(SIGN))
        names = ", ".join(str(path.relative_to(out)) for path in files)
        print(f"Written to {out}: {names}", file=sys.stderr if STDOUT in (JSON.value, SARIF.value) else None)
    if REPAIR.value:
        print(repaired(found, local_path(REPAIR.value)))
    return exit_code(found.verdict.overall, found.verdict.exit_code, fail_on)


def audited(asked: AuditSettings) -> Audit:
    """Returns the audit; a broken candidate is a finding, which is written like any other. Raises UserError as `run_audit` does,
    and for files that are too broken to be named."""
    try:
        return run_audit(asked, devices.asked_mesh())
    except BrokenCheckpoint as error:
        with contextlib.suppress(UserError):
            checkpoint_paths(opened(asked.candidate))
            lanes = [Findings(lane, left_out="The candidate is broken.") for lane in asked.lanes]
            return Audit(
                asked, lanes, Verdict("unknown", "not_measured", "damaged", ["The candidate is damaged.", str(error)])
            )
        raise


def path_of(flag: flags.FlagHolder) -> pathlib.Path | None:
    """Returns the path that a flag names, None if it names none."""
    return local_path(flag.value) if flag.value else None


def repaired(found: Audit, out: pathlib.Path) -> str:
    """Writes the repaired candidate, and returns what was written. Raises VerificationError if it is no repair."""
    problems = repair(found, out)["verification"]["problems"]
    if problems:
        raise VerificationError(
            f"{out} is no repair of the candidate: {'; '.join(problems)}. The files are there, with the marker .unverified and "
            "all numbers in export.json."
        )
    return f"Repaired and verified: {out.resolve()}"


def asked_settings(words: list[str]) -> AuditSettings:
    """Returns the settings that the command asks for. Raises UserError for values that cannot be."""
    given = {name: flag.value for name, flag in SETTINGS.items()}
    if LEVEL.value and SETTINGS["lanes"].present:
        raise UserError("--level and --lanes both say which lanes run. Give one of them.")
    if LEVEL.value:
        given["lanes"] = LANES[: LANES.index(LEVEL.value) + 1]
    for lane in given["lanes"]:
        if lane not in LANES:
            raise UserError(
                f"--lanes={','.join(given['lanes'])}: there is no lane {lane!r}.{did_you_mean(lane, LANES)} They are "
                f"{', '.join(LANES)}."
            )
    return AuditSettings.of(given | {"candidate": words[0] if words else "", "dtype": devices.asked_dtype()})


def bench() -> int:
    """Runs the benchmark of detectors, and prints its page. Raises UserError as `main_bench` does."""
    from refusal_jax.audit.bench import PAGE, main_bench  # imported late, as it imports what trains

    out = path_of(OUT)
    if out is None:
        raise UserError("--out is missing, the folder of the benchmark, such as: refusal-jax audit bench --out=bench.")
    main_bench(out, BASES.value or (), PER_BASE.value, SETTINGS["seed"].value, WORKERS.value, SMALL.value)
    print((out / PAGE).read_text(encoding="utf-8"), end="")
    return 0


def verify(words: list[str]) -> int:
    """Verifies a signed statement against a checkpoint's files, and prints what it says."""
    if not words:
        raise UserError(
            "The signed statement is missing: refusal-jax audit verify audited/audit.intoto.json DIR --key=key.pub."
        )
    checkpoint = words[1] if words[1:] else ""
    statement = verified(local_path(words[0]), path_of(KEY), checkpoint, SETTINGS["base"].value)
    predicate = statement["predicate"]
    print(
        f"The signature is that of {KEY.value}, and all {len(statement['subject'])} files are those that were audited."
    )
    print(escaped(f"Verdict of {predicate.get('created')}: {predicate['verdict']['overall']}."))
    for sentence in predicate["verdict"]["sentences"]:
        print(escaped(str(sentence)))
    return 0
