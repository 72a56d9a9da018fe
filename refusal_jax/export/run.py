"""Runs one export from beginning to end: it is planned, written, verified and described before it appears under its
name."""

import dataclasses
import json
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.export import gguf, hf, lora
from refusal_jax.export.card import licence_files, write_card
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.export.provenance import base_model, write_provenance
from refusal_jax.export.staging import UNVERIFIED, check_target, staged, sync
from refusal_jax.export.tensor_edits import Edit, check_edit
from refusal_jax.export.verify import Sample, originals, run_beside, verify
from refusal_jax.files import to_json

FORMATS = ("hf", "lora", "gguf")
REPORT = "export.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """An export that is asked for. edit: what the weights are to do. study: prompts, chat template and measured
    effects. base: the base model's name on the hub, "" for what its folder tells. command: that makes the export again,
    for its card."""

    source: pathlib.Path
    target: pathlib.Path
    edit: Edit
    study: FinishedStudy
    form: str = "hf"
    tied: str = "untie"
    verify: bool = True
    base: str = ""
    command: str = ""


def export(request: Request) -> dict:
    """Writes the export and returns what its export.json says; "verification" is None where it was not asked for, and
    lists "problems" where it failed: then the folder has the marker `.unverified`.

    Raises UserError for anything wrong with what is asked, before anything is written.
    """
    check_target(request.source, request.target)
    checkpoint = Checkpoint.open(request.source)
    cfg, edit = checkpoint.cfg, request.edit
    check_edit(cfg, edit)
    plan, size = None, 0
    if request.form == "hf":
        plan = hf.Plan.of(checkpoint, edit, request.tied)
        size = plan.size
    elif request.form == "lora":
        lora.check_expressible(cfg, edit, request.tied)
    else:
        gguf.check_expressible(cfg, edit)
    sample = None
    if request.verify:
        chat = Chat.load(request.source, cfg.context_length, cfg.vocab_size, **request.study.template)
        sample = Sample.of(chat, request.study.prompts, request.study.harmless)
    start = time.monotonic()
    with staged(request.target, size) as folder, ThreadPoolExecutor(2) as beside:
        naming, synced = beside.submit(base_model, request.source, request.base), []

        def work() -> tuple[hf.Written, float]:
            def on_disk(path: pathlib.Path) -> None:  # the disk works while the processor does
                synced.append(beside.submit(sync, path))

            if plan is not None:
                written = plan.write(folder, on_disk)
            else:
                written = write_small(request, checkpoint, folder, lambda: naming.result()["name"])
            return written, time.monotonic() - start

        writing, streams, found = beside.submit(work), {}, None
        if sample and request.form != "gguf":  # which is written at once, and whose weights are the original's
            streams = originals(checkpoint, edit)
            run_beside(writing, list(streams.values()), sample, edit)
        written, seconds = writing.result()
        if sample:
            found = verify(checkpoint, folder, edit, written, sample, streams)
        base, took = naming.result(), {"write": round(seconds, 3), "verify": round(time.monotonic() - start, 3)}
        report = describe(request, checkpoint, written, base, found) | {"seconds": took}
        (folder / REPORT).write_bytes(to_json(report))
        write_card(folder, request.source, report, request.command)
        verified = found is not None and not found["problems"]
        if not verified:
            reasons = found["problems"] if found else ["verification was switched off"]
            (folder / UNVERIFIED).write_text("".join(f"{reason}\n" for reason in reasons), encoding="utf-8")
        kept = ("format", "edit", "direction", "base", "tied", "dequantised")
        record = {key: report[key] for key in kept if key in report} | {
            "verified": verified,
            "command": request.command,
        }
        write_provenance(folder, record, written.hashes)
        for done in synced:
            done.result()  # of a write that failed, the disk tells once
    return report


def write_small(request: Request, checkpoint: Checkpoint, folder: pathlib.Path, base: Callable[[], str]) -> hf.Written:
    """Writes an adapter or a control vector, and the licence. base: tells the base model's name."""
    if request.form == "lora":
        written = lora.write_lora(checkpoint, folder, request.edit, request.tied, base())
    else:
        written = gguf.write_gguf(checkpoint.cfg, folder, request.edit)
    for path in licence_files(request.source):
        shutil.copyfile(path, folder / path.name)
    return written


def describe(request: Request, checkpoint: Checkpoint, written: hf.Written, base: dict, found: dict | None) -> dict:
    """Returns the report of an export, in plain values. "dequantised" is in it where the checkpoint's weights are quantised."""
    direction = request.edit.direction
    report = {
        "format": request.form,
        "edit": request.edit.described(checkpoint.cfg),
        "direction": {"count": len(direction.raw_jd), "sha256": direction.sha256, "files": direction.files},
        "base": base,
        "tied": written.tied,
        "added_bytes": written.added_bytes,
        "edited_tensors": written.kinds,
        "kinds": dict(Counter(written.kinds.values()).most_common()),
        "largest_amplification": written.largest_amplification,
        "refusals": request.study.refusals(),
        "losses": request.study.losses,
        "verification": found,
    }
    if checkpoint.quantisation is not None:
        report["dequantised"] = checkpoint.quantisation.note
    return json.loads(to_json(report))
