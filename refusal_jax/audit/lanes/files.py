"""The lane "files": what the files of a checkpoint say, and how they differ from the base's, without a look at what weights do.

Facts, each there only if it was looked at:

named: what files say of how the checkpoint was made, a list of {source, strength, kind, says, bases}; strength is "verified",
"stated" or "weak", kind "removal", "addition", "merge", "adapter", "control_vector" or "edit". A claim never proves an edit.
contradiction: whether files say that refusal was removed while all tensors are the base's. beside: files that change the model
when they are used with it: adapters and control vectors.
base_claimed: names of models that the files give as its origin. base_named_otherwise: whether none of them is the base.
base_origin: "same" if the base's weight files are those that the hub has under its name, "other", or "not_checked".
comparable: whether the layers have the base's shapes. identical: whether all tensors hold the base's bytes. n_tensors: that both
hold. n_changed_tensors, changed_tensors: whose bytes differ. n_recast_tensors: with the base's values in another dtype.
n_uncompared_tensors: that are quantised in one of the two. compared: whether bytes were compared.
missing_tensors, extra_tensors, added_biases, reshaped_tensors: names. vocabulary: both sizes, if they differ. dtypes: counts by
"BASE to CANDIDATE". weights_sha256: one hash of all tensors, whatever files they are in.
config_changed: fields of the architecture that differ. storage: how the weights are quantised, "" if they are not.
template_changed: whether the template's text differs. template_alike: whether all probes are rendered as by the base's.
template_tampering: a list of the keys of `template.KINDS`, a hard sign but for "other_system_prompt", which is common.
template_broken: if it cannot render, though another one is asked for. template_diff: a text for people.
tokenizer_changed, generation_changed: bools. tokenizer_alike: whether all texts that were tried become the same tokens.
tokenizer_diff, generation_diff: lines for people. hidden_controls: settings of generation that change what is said, {name, value,
tokens, refusal}; with refusal, tokens are banned that refusals begin with.
"""

import dataclasses
import pathlib
from typing import Any

from refusal_jax.audit.broken import BrokenCheckpoint, finding_damage
from refusal_jax.audit.evidence import Evidence, Findings
from refusal_jax.audit.lane import Lane
from refusal_jax.audit.shipped.claims import claimed_bases, fetch_records, find_claims
from refusal_jax.audit.shipped.configs import compare_configs, own_code, storage
from refusal_jax.audit.shipped.generation import compare_settings, controls, settings_of
from refusal_jax.audit.shipped.origin import check_origin, named_otherwise, names_of
from refusal_jax.audit.shipped.reading import places, record_of, words
from refusal_jax.audit.shipped.template import KINDS, Template, compare_templates, difference, new_texts, templates_of
from refusal_jax.audit.shipped.tensors import compare_bytes, compare_names, in_words
from refusal_jax.audit.shipped.tokenizer import compare_tokenizers
from refusal_jax.audit.subject import Subject
from refusal_jax.audit.weights import StoredWeights
from refusal_jax.chat.prompts import PROBES
from refusal_jax.checkpoints.matrices import check_comparable
from refusal_jax.errors import UserError

PROMPTS = {"harmful_test": 8, "harmless_test": 4}  # how many of each the templates are tried on
BESIDE = ("adapter", "control_vector")


class Notes:
    """The evidence and the facts as they are found."""

    def __init__(self):
        self.evidence: list[Evidence] = []
        self.facts: dict[str, Any] = {}
        self.bytes_read = 0

    def add(self, statistic: str, value: float | int | str, meaning: str, where: str = "") -> None:
        """Adds a row of evidence."""
        self.evidence.append(Evidence(statistic, value, meaning, where=where))


def look(subject: Subject) -> Findings:
    """Returns what the files tell. Raises UserError for a checkpoint without files, BrokenCheckpoint for one whose template
    cannot render, or whose values are not finite."""
    folder = subject.candidate.folder
    if not isinstance(folder, pathlib.Path):
        raise UserError("The candidate is held in memory and has no files.")
    notes = Notes()
    _claims(subject, notes)
    _tensors(subject, notes)
    _configs(subject, notes)
    _texts(subject, notes)
    _contradictions(notes)
    return Findings("files", notes.evidence, notes.facts, bytes_read=notes.bytes_read)


def _claims(subject: Subject, notes: Notes) -> None:
    """Adds what the files say, and whether the base is what it is called."""
    candidate, base = subject.candidate, subject.base
    fetch_records(candidate.folder)
    folders = places(candidate.folder)
    names = [*names_of(candidate.name, candidate.folder), pathlib.PurePath(candidate.name).name, candidate.folder.name]
    names += [words(record_of(candidate.folder / "config.json").get("_name_or_path"))]
    found = find_claims(folders, [name for name in names if name], places(base.folder) if base else ())
    notes.facts["named"] = [one.record for one in found]
    for one in found:
        notes.add("claim", one.strength, one.says, one.source)
    if not found:
        notes.add("claim", "none", "No file says that the model was edited, which says nothing about whether it was.")
    notes.facts["beside"] = [one.source for one in found if one.kind in BESIDE]
    claimed = claimed_bases(folders, found)
    notes.facts["base_claimed"] = claimed
    if base is None:
        if claimed:
            notes.add(
                "claimed base",
                ", ".join(claimed[:6]),
                "The files name what the model was made from; give it as the base.",
            )
        return
    otherwise = named_otherwise(claimed, names_of(base.name, base.folder))
    if otherwise is not None:
        notes.facts["base_named_otherwise"] = otherwise
        state = (
            "and none of them is the base that was given" if otherwise else "and the base that was given is among them"
        )
        notes.add("claimed base", ", ".join(claimed[:6]), f"The candidate's files name what it was made from, {state}.")
    origin = check_origin(base.folder)
    notes.facts["base_origin"] = origin.state
    notes.add("origin of the base", origin.state, origin.says)


def _contradictions(notes: Notes) -> None:
    """Adds where what the files say and what they hold cannot both be so."""
    removals = [one for one in notes.facts["named"] if one["kind"] == "removal"]
    notes.facts["contradiction"] = bool(removals) and notes.facts.get("identical", False)
    if notes.facts["contradiction"]:
        notes.add(
            "contradiction",
            removals[0]["strength"],
            "The files say that refusal was removed, and the weights are those of the base: either this is not so, or the base "
            "that was given is itself such a model. Compare with the original.",
            removals[0]["source"],
        )


def _tensors(subject: Subject, notes: Notes) -> None:
    """Adds how the tensors differ from the base's."""
    ours, theirs = (subject.base.weights if subject.base else None), subject.candidate.weights
    if not isinstance(ours, StoredWeights) or not isinstance(theirs, StoredWeights):
        return
    names = compare_names(theirs.cfg, ours.files, theirs.files)
    facts: dict[str, Any] = {
        "n_tensors": len(names.common),
        "missing_tensors": list(names.missing),
        "extra_tensors": list(names.extra),
        "added_biases": list(names.biases),
        "reshaped_tensors": list(names.reshaped),
        "dtypes": {f"{before} to {after}": count for (before, after), count in names.dtypes.items()},
    }
    for statistic, found, meaning in (
        ("missing tensors", names.missing, "The candidate lacks tensors that the base holds."),
        ("extra tensors", names.extra, "The candidate holds tensors that the base does not."),
        ("added biases", names.biases, "Biases were added, which can add a direction to the residual stream."),
        ("tensors of another shape", names.reshaped, "These tensors have another shape than in the base."),
    ):
        if found:
            notes.add(statistic, len(found), meaning, in_words(found))
    if names.vocabulary:
        facts["vocabulary"] = list(names.vocabulary)
        meaning = f"The vocabulary was resized from {names.vocabulary[0]} to {names.vocabulary[1]} rows."
        notes.add("vocabulary", names.vocabulary[1], f"{meaning} Embeddings cannot be compared, and the layers can.")
    for (before, after), count in names.dtypes.items():
        notes.add("dtype", count, f"So many tensors are {after} where the base has {before}.")
    if names.renamed:
        notes.add("renamed tensors", names.renamed, "So many tensors have other names in the files than in the base's.")
    found = compare_bytes(ours.files, theirs.files, names)
    notes.bytes_read += found.bytes_read
    facts["compared"] = not found.left_out
    if found.left_out:
        notes.add("bytes", "not compared", found.left_out)
    else:
        facts |= _bytes(found, names, notes)
    notes.facts |= facts


def _bytes(found, names, notes: Notes) -> dict[str, Any]:
    """Adds which tensors hold other bytes than the base's, and returns the facts."""
    changed, total = len(found.changed), len(names.common)
    whole = not (names.missing or names.extra or names.reshaped)
    facts = {
        "identical": whole and not (changed or found.recast or found.uncompared),
        "n_changed_tensors": changed,
        "changed_tensors": list(found.changed),
        "n_recast_tensors": len(found.recast),
        "n_uncompared_tensors": len(found.uncompared),
    }
    if found.digest:
        facts["weights_sha256"] = found.digest
    if facts["identical"]:
        notes.add(
            "changed tensors",
            0,
            f"All {total} tensors are the base's, byte by byte: the weights are those of the base.",
        )
    elif not changed:
        same = total - len(found.uncompared)
        notes.add(
            "changed tensors",
            0,
            f"{same} of {total} tensors have the base's values, {len(found.recast)} in another dtype.",
        )
    else:
        meaning = f"{changed} of {total} tensors hold other values than in the base."
        notes.add("changed tensors", changed, meaning, in_words(found.changed))
    return facts


def _configs(subject: Subject, notes: Notes) -> None:
    """Adds how the configs differ, how weights are stored, and whether code lies beside them."""
    candidate, base = subject.candidate, subject.base
    notes.facts["storage"] = storage(candidate.folder)
    if notes.facts["storage"]:
        notes.add("storage", notes.facts["storage"], "The weights are quantised, and are dequantised as they are read.")
    code = own_code(candidate.folder)
    if code:
        notes.add(
            "own code",
            len(code),
            "The config names code of its own, which is not run here but by those who trust it.",
            ", ".join(code),
        )
    if base is None:
        return
    found = compare_configs(base.weights.cfg, candidate.weights.cfg)
    notes.facts["config_changed"] = [one.field for one in found]
    try:
        check_comparable(base.weights.cfg, candidate.weights.cfg)
        notes.facts["comparable"] = True
    except UserError as error:
        notes.facts["comparable"] = False
        notes.add("architecture", candidate.weights.cfg.family, str(error))
    for one in found:
        notes.add(
            "config", one.candidate, f"The {one.field} is {one.candidate}, and the base's is {one.base}.", one.field
        )


def _texts(subject: Subject, notes: Notes) -> None:
    """Adds how chat template, tokenizer and generation settings differ from the base's."""
    candidate, base = subject.candidate, subject.base
    try:
        with finding_damage():
            own = Template.load(candidate.folder)
    except BrokenCheckpoint:
        raise
    except UserError as error:
        own = None
        notes.add("chat template", "none", str(error))
    try:
        theirs = Template.load(base.folder) if base else None
    except UserError as error:
        theirs = None
        notes.add("chat template", "none of the base", str(error))
    prompts = _probes(subject)
    if own is not None:
        _template(subject, own, theirs, prompts, notes)
    _generation(subject, own.tokenizer if own else None, notes)
    if base is not None:
        loaded = (theirs.tokenizer, own.tokenizer) if own and theirs else None
        found = compare_tokenizers(base.folder, candidate.folder, loaded, [*PROBES, *prompts])
        if found.texts:
            notes.facts["tokenizer_alike"] = not found.texts[0]
        notes.facts |= {"tokenizer_changed": found.changed, "tokenizer_diff": list(found.lines)}
        for line in found.lines:
            notes.add("tokenizer", "changed", line)
        if not found.changed:
            notes.add("tokenizer", "same", "The tokenizer is the base's.")


def _probes(subject: Subject) -> list[str]:
    """Returns some of the audit's prompts; none where there are none."""
    try:
        return [prompt for name, count in PROMPTS.items() for prompt in subject.prompts.get(name, [])[:count]]
    except UserError:  # the lanes that need prompts say it
        return []


def _template(subject: Subject, own: Template, theirs: Template | None, prompts: list[str], notes: Notes) -> None:
    """Adds how the chat template differs from the base's, and what it does by itself."""
    try:
        found = compare_templates(own, theirs, prompts)
    except BrokenCheckpoint as error:
        if not subject.settings.chat_template:
            raise
        notes.facts["template_broken"] = True
        notes.add("chat template", "broken", str(error))
        return
    notes.facts["template_tampering"] = list(found.tampering)
    for kind, text in found.tampering.items():
        notes.add("template tampering", kind, _tampering(kind, text), own.origin)
    for note in found.notes:
        notes.add("chat template", "note", note)
    _other_templates(subject, own, theirs, prompts, notes)
    if theirs is None:
        if not found.tampering:
            notes.add("chat template", "unsuspicious", "Nothing in the template by itself speaks of tampering.")
        return
    changed = own.text != theirs.text
    notes.facts |= {"template_changed": changed, "template_alike": found.alike}
    if not changed:
        notes.add("chat template", "same", "The chat template is the base's.")
        return
    notes.facts["template_diff"] = difference(theirs.text, own.text)
    rendered = "the probes are rendered alike" if found.alike else "some probes are rendered otherwise"
    texts = new_texts(theirs.text, own.text)
    more = f" New texts in it: {'; '.join(f'“{text[:120]}”' for text in texts[:4])}." if texts else ""
    notes.add("chat template", "changed", f"The chat template is not the base's; {rendered}.{more}", own.origin)


def _other_templates(
    subject: Subject, own: Template, theirs: Template | None, prompts: list[str], notes: Notes
) -> None:
    """Adds templates beside the one that is used here, which other programs may take, and what they do."""
    known = {text.strip() for text in (templates_of(subject.base.folder).values() if subject.base else ())}
    known |= {own.text.strip()}
    for where, text in templates_of(subject.candidate.folder).items():
        if text.strip() in known:
            continue
        named = "," in where or "/" in where
        about = "for another use" if named else "which some programs take in place of the one that is used here"
        meaning = f"There is another chat template, {about}, and the base has none like it."
        notes.add("other template", "another text", meaning, where)
        try:
            found = compare_templates(dataclasses.replace(own, text=text, origin=where), theirs, prompts).tampering
        except BrokenCheckpoint:
            continue
        for kind, shown in found.items():
            if kind == "compliance" or not named:
                notes.facts["template_tampering"] = sorted({*notes.facts["template_tampering"], kind})
                notes.add("template tampering", kind, _tampering(kind, shown), where)


def _tampering(kind: str, text: str) -> str:
    return f"The chat template {KINDS[kind]}: “{' '.join(text.split())[:300]}”."


def _generation(subject: Subject, tokenizer: Any, notes: Notes) -> None:
    """Adds generation settings that change what is said, and how the settings differ from the base's."""
    settings = settings_of(subject.candidate.folder)
    base = settings_of(subject.base.folder) if subject.base else {}
    found = [one for one in controls(settings, tokenizer) if settings.get(one.name) != base.get(one.name)]
    notes.facts["hidden_controls"] = [one.record for one in found]
    for one in found:
        tokens = f", of the tokens {', '.join(map(repr, one.tokens[:8]))}" if one.tokens else ""
        meaning = f"The generation settings change what is said: {one.name} = {one.value}{tokens}."
        if one.refusal:
            meaning += " Among them are tokens that refusals begin with."
        notes.add("hidden control", one.name, f"{meaning} The lane 'behaviour' decodes without these settings.")
    if subject.base is not None:
        lines = compare_settings(base, settings)
        notes.facts |= {"generation_changed": bool(lines), "generation_diff": lines}
        for line in lines[:20]:
            notes.add("generation settings", "changed", line)


LANE = Lane("files", look)
