"""Writes everything that a gate leaves in a folder."""

import pathlib

from refusal_jax.files import cannot_write, to_json, write_atomically
from refusal_jax.gate.gate import Gate
from refusal_jax.gate.output.junit import junit_xml
from refusal_jax.gate.output.markdown import markdown
from refusal_jax.gate.output.record import gate_record, replies_of
from refusal_jax.gate.output.sarif import sarif_log

RECORD, JUNIT, SARIF, MARKDOWN = "gate.json", "gate.junit.xml", "gate.sarif", "gate.md"


def write_outputs(
    gate: Gate, out: pathlib.Path, policy_file: pathlib.Path, replies: bool = False
) -> list[pathlib.Path]:
    """Writes the files of a gate, and returns their paths; files of the same names are replaced.

    policy_file: the policy, to whose lines the SARIF log points. replies: whether what the models replied is written, too. Raises
    UserError where a file cannot be written.
    """
    files = {
        RECORD: to_json(gate_record(gate)),
        JUNIT: junit_xml(gate),
        SARIF: to_json(sarif_log(gate, policy_file)),
        MARKDOWN: markdown(gate).encode("utf-8", "replace"),
    }
    if replies:
        files |= {f"replies/{role}.json": to_json(replies_of(gate, role)) for role in gate.judged}
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


def append_summary(gate: Gate, path: pathlib.Path) -> None:
    """Adds the Markdown summary to a file, as CI services collect them. Raises UserError if it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8", errors="replace") as file:
            file.write(markdown(gate))
    except OSError as error:
        raise cannot_write(path, error) from None
