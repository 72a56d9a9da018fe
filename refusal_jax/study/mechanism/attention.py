"""Tells what the heads that write most along the direction read, also through the template's tokens: the paper's figure 6b."""

import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax.judges.behaviours import Behaviour
from refusal_jax.mechanism.attention import Reading, read_attention, read_batch, taps_of
from refusal_jax.mechanism.attention_summary import MEASURES, PAIRS, READ, pair_name, summary
from refusal_jax.mechanism.regions import ATTENDED
from refusal_jax.mechanism.suffixes import GROUPS, HARMFUL, RANDOM, SUFFIXED, Row, groups_in_words
from refusal_jax.models.hf_config import load_config
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.latent import Latent
from refusal_jax.models.weights import mixers_of
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.page import plain
from refusal_jax.report.summary import with_interval
from refusal_jax.runs.artifacts import (
    ATTENTION,
    ATTENTION_READ,
    ATTRIBUTION,
    DIRECTION,
    METADATA,
    SETUP,
    SUFFIXES,
)
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism.attribution import head_name
from refusal_jax.study.mechanism.shared import MechanismStudy
from refusal_jax.study.mechanism.suffixes import rows_of, without_rows

ARRAYS = ("attention", "along", "attention_two_hops", "along_two_hops", "source_attention", "source_along")


def no_head(of: Behaviour) -> str:
    """Returns that there is no head to look at, in words."""
    return (
        f"No head writes more than nothing along the direction for the {of.present} prompts, so there is no head whose reading "
        f"could explain their {of.name}. It may be written by MLPs; the section on attribution has all parts."
    )


def top_heads(found: dict) -> list[tuple[int, int]]:
    """Returns layer and number of the heads that attribution chose and that write more than nothing for harmful prompts."""
    return [(row["layer"], row["head"]) for row in found["heads"] if (row["written"][HARMFUL]["mean"] or 0) > 0]


def read_rows(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes what the top heads read of every prompt, and what follows from it."""
    heads = top_heads(study.run.read_json(ATTRIBUTION))
    if not heads:
        study.run.write_tensors(ATTENTION_READ, {})
        study.run.write_json(ATTENTION, {"heads": []})
        return
    rows, direction = rows_of(study), study.direction()
    found = read_attention(study.model, rows, heads, direction.raw_d, study.sizes.forward, "attention")
    groups = {
        group: jax.tree.map(lambda a, group=group: a[[row.group == group for row in rows]], found) for group in GROUPS
    }
    study.run.write_tensors(ATTENTION_READ, {"heads": np.asarray(heads, np.int32)} | arrays(groups))
    tokens = suffix_tokens(study, rows)
    study.run.write_json(ATTENTION, summary(groups, heads, len(tokens)) | {"suffix_texts": tokens})


def suffix_tokens(study: MechanismStudy, rows: Sequence[Row]) -> list[str]:
    """Returns the tokens of the suffix in words, or their numbers if prompts have different ones; [] if these are not of one
    length."""
    suffixes = {
        tuple(study.chat.prompt_ids(row.text)[row.suffix.start : row.suffix.stop])
        for row in rows
        if row.group == SUFFIXED
    }
    if len(suffixes) == 1:
        return study.chat.token_names(next(iter(suffixes)))
    lengths = {len(suffix) for suffix in suffixes}
    return [str(i + 1) for i in range(lengths.pop())] if len(lengths) == 1 else []


def arrays(groups: dict[str, Reading]) -> dict[str, np.ndarray]:
    """Returns the arrays of the stage's file, by group and name; the way through each template token only from the last token."""
    found = {
        f"{group}.{name}": np.asarray(getattr(of, name), np.float32) for group, of in groups.items() for name in ARRAYS
    }
    for group, of in groups.items():
        for name in ("attention_via", "along_via"):
            found[f"{group}.{name}"] = np.asarray(getattr(of, name), np.float32)[:, :, -1]
    return found


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the pass over the prompts of the suffix study, for `plan`."""
    work, settings = shapes.work, shapes.work.further
    prompts, heads = min(settings.suffixes.n_prompts, work.config.data.n_test), settings.attribution.heads

    def lower():
        inputs = *shapes.prompts(rows), shapes.edits(rows), shapes.array((rows, work.length), jnp.int32, "batch")
        unit, chosen = shapes.array((work.cfg.d_model,), jnp.float32), shapes.array((heads,), jnp.int32)
        return read_batch.lower(shapes.decoder, *inputs, unit, chosen, chosen, taps_of(work.positions))

    runs = math.ceil(len(GROUPS) * prompts / rows)
    return [Program("attention", lower, runs, rows, work.length, work.cfg.n_layers)]


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found = findings.run.read_json(ATTENTION)
    if not found["heads"]:
        return ["", f"Attention: {no_head(findings.behaviour)}"]
    names, words = ", ".join(map(head_name, found["heads"])), groups_in_words(findings.behaviour)
    out = ["", f"What the {len(found['heads'])} top heads that write along the direction read ({names}):"]
    for title, measure in TITLES.items():
        out.append(f"  {title}:")
        for group in shown_groups(found):
            means = found["together"][measure][group]
            out.append(
                f"    {words[group] + ':':<30}"
                + ", ".join(f"{place} {means[place]['mean']:.2f}".replace("-", "−") for place in READ)
            )
        for pair in PAIRS:
            changes = found["changes"][pair_name(pair)][measure]
            out.append(
                f"    {CHANGES[pair] + ':':<30}"
                + ", ".join(f"{place} {with_interval(changes[place], 2)}" for place in READ)
            )
    if one_token(findings):
        out.append(f"  {ONE_TOKEN}")
    return out


TITLES = {
    "Attention from the last token, over one hop": "attention",
    "Attention over one hop and two": "attention_two_hops",
    "Written along the direction, by the token that is read": "along",
    "Written along the direction, by where it came from": "along_two_hops",
}
CHANGES = {
    (HARMFUL, SUFFIXED): "change by the suffix",
    (HARMFUL, RANDOM): "change by random tokens",
    (RANDOM, SUFFIXED): "from random to the suffix",
}
ONE_TOKEN = (
    "The template puts a single token after the instruction, so the second hop is what earlier layers moved to that token "
    "itself."
)


def shown_groups(found: dict) -> list[str]:
    """Returns the groups that have prompts."""
    return [group for group in GROUPS if group in found["flow"]]


def one_token(findings: Findings) -> bool:
    """Returns whether the template puts a single token after the instruction."""
    return len(findings.run.read_json(ATTENTION)["tokens"]) == 1


def values(findings: Findings) -> dict:
    """Returns what the report shows: in tables of regions and tokens."""
    found = findings.run.read_json(ATTENTION)
    if not found["heads"]:
        return {"attention": found, "no_head": no_head(findings.behaviour)}
    return {
        "attention": found,
        "groups": shown_groups(found),
        "words": groups_in_words(findings.behaviour),
        "measures": {
            name: [place for place in places if present(found, name, place)] for name, (places, _) in MEASURES.items()
        },
        "titles": {measure: title for title, measure in TITLES.items()},
        "changes": {pair_name(pair): words for pair, words in CHANGES.items()},
        "head_name": head_name,
        "read": READ,
        "tokens": list(zip(token_texts(findings, found), found["tokens"], strict=True)),
        "one_token": ONE_TOKEN if one_token(findings) else "",
    }


def present(found: dict, measure: str, place: str) -> bool:
    """Returns whether anything came from a place in any group of prompts."""
    return any(row[place]["mean"] for row in found["together"][measure].values())


def token_texts(findings: Findings, found: dict) -> list[str]:
    """Returns the texts of the template's tokens after the instruction."""
    return [plain(token["text"]) for token in findings.setup["post_instruction_tokens"]][-len(found["tokens"]) :]


def pictures(findings: Findings) -> list:
    """Returns the figures of attention by head and by region, of what is written, of the suffix's tokens, and of the flows."""
    from refusal_jax.report.attention_figures import bars_figure, flow_figure  # imports matplotlib

    found = findings.run.read_json(ATTENTION)
    if not found["heads"]:
        return []
    groups, texts, names = shown_groups(found), token_texts(findings, found), [head_name(row) for row in found["heads"]]
    words = groups_in_words(findings.behaviour)
    panels = {
        f"to the {place}, over {hops}": of_heads(found, words, name, place)
        for place in READ
        for name, hops in HOPS.items()
    }
    aloud = "Attention of single heads from the last token to instruction and suffix"
    drawn = [bars_figure("attention-heads", aloud, names, panels, ["attention"] * len(panels), "layer . head")]
    for kind, (name, label, aloud) in LABELS.items():
        measures = kind, f"{kind}_two_hops"
        places = [p for p in MEASURES[kind][0] if any(present(found, measure, p) for measure in measures)]
        hops = zip(measures, HOPS.values(), strict=True)
        panels = {f"over {many}": of_places(found, words, measure, places) for measure, many in hops}
        drawn.append(bars_figure(name, aloud, places, panels, [label] * 2))
    if found["suffix_tokens"]:
        panels = {
            title: {words[group]: rows[measure] for group, rows in found["suffix_tokens"].items()}
            for measure, title in (("attention", "attention to it"), ("along", "written of it along the direction"))
        }
        aloud = "Attention to each token of the suffix, and what the top heads write of it"
        labels = [label for _, label, _ in LABELS.values()]
        places = [plain(text).strip() or "␣" for text in found["suffix_texts"]]
        drawn.append(bars_figure("attention-tokens", aloud, places, panels, labels, "token of the suffix", 1))
    for group in groups:
        name, flow = f"attention-flow-{group.replace('_', '-')}", found["flow"][group]
        aloud = f"Where the attention of the top heads goes, {words[group]} prompts"
        drawn.append(flow_figure(name, aloud, ATTENDED, texts, flow["direct"], flow["via"]))
    return drawn


HOPS = {"attention": "one hop", "attention_two_hops": "one hop and two"}
LABELS = {  # of each kind of measure, the picture's name, what it measures, and what a screen reader says
    "attention": ("attention-regions", "attention", "Attention of the top heads together, by region of the prompt"),
    "along": ("attention-written", "written", "What the top heads write along the direction, by where it came from"),
}


def of_heads(found: dict, words: dict[str, str], measure: str, place: str) -> dict[str, list[dict]]:
    """Returns a measure of each head at a place, by group in words."""
    return {words[group]: [row[measure][group][place] for row in found["heads"]] for group in shown_groups(found)}


def of_places(found: dict, words: dict[str, str], measure: str, places: Sequence[str]) -> dict[str, list[dict]]:
    """Returns a measure of all heads together at each place, by group in words."""
    return {
        words[group]: [found["together"][measure][group][place] for place in places] for group in shown_groups(found)
    }


def skipped(study: MechanismStudy) -> str:
    """Returns why heads' reading cannot be followed, "" if it can."""
    first, *others = mixers_of(load_config(study.folder))
    if others or (first != Attention() and not isinstance(first, Latent)):
        return (
            "Some layers of this model are no plain attention (gated, shared or recurrent), and values cannot be "
            "followed through those over two hops. The part `attribution` has what its heads write."
        )
    return without_rows(study)


STAGE = Stage(
    "attention",
    read_rows,
    reads=(SUFFIXES, SETUP, METADATA, DIRECTION, ATTRIBUTION),
    writes=(ATTENTION_READ, ATTENTION),
    skipped=skipped,
    programs=Group("attention", "forward", programs),
    about="Shows what these heads read: instruction, suffix or template, over one hop and two (figure 6b of the paper).",
    section=Section(
        pathlib.Path(__file__).with_name("attention.html.jinja"),
        {"attention": "Attention"},
        values,
        lines=lines,
        of_direction=True,
        needs=(ATTENTION, ATTENTION_READ),
        pictures=pictures,
    ),
)
