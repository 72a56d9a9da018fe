"""Writes a gate as JUnit XML, which CI services show as tests: one test for each limit, and one for the replies of each model.

A limit that is broken is a failure; one that cannot be told is an error, as services take a skipped test for a good one.
"""

import xml.etree.ElementTree as ET

from refusal_jax.gate.gate import Gate
from refusal_jax.gate.limits import FAIL, PASS
from refusal_jax.gate.verdict import BROKEN_ALONE
from refusal_jax.gate.words import decision_in_words, is_too_much, missing_in_words
from refusal_jax.report.page import plain

SUITE = "refusal-jax gate"


def junit_xml(gate: Gate) -> bytes:
    """Returns the document. Texts of servers and files are escaped, and signs that XML does not allow are replaced."""
    cases = [*(_limit(one) for one in gate.decisions), *(_replies(gate, role) for role in gate.judged)]
    if gate.verdict.overall == "broken":
        share = f"no prompt has a reply, or more than {BROKEN_ALONE:.0%} of the replies are broken"
        cases.append(_case("candidate", "candidate", "failure", "broken", f"The candidate is broken: {share}."))
    failures, errors = (sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error"))
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": str(errors)}
    seconds = {"time": f"{gate.seconds:.3f}"}
    root = ET.Element("testsuites", {"name": SUITE, **counts, **seconds})
    suite = ET.SubElement(root, "testsuite", {"name": SUITE, **counts, "skipped": "0", **seconds})
    properties = ET.SubElement(suite, "properties")
    for name, value in (
        ("verdict", gate.verdict.overall),
        ("exit_code", str(gate.verdict.exit_code)),
        ("candidate", gate.policy.candidate),
        ("reference", gate.policy.reference),
    ):
        ET.SubElement(properties, "property", {"name": name, "value": legal(value)})
    suite.extend(cases)
    said = [*gate.verdict.sentences, *gate.verdict.contradictions, *(power.sentence for power in gate.powers)]
    ET.SubElement(suite, "system-out").text = legal("\n".join(said))
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def legal(text: str) -> str:
    """Returns a text with what XML does not allow replaced: control characters, lone surrogates, two codes of nothing."""
    whole = plain(text).encode("utf-8", "replace").decode()
    return whole.translate({0xFFFE: "\N{REPLACEMENT CHARACTER}", 0xFFFF: "\N{REPLACEMENT CHARACTER}"})


def _case(group: str, name: str, kind: str = "", what: str = "", text: str = "") -> ET.Element:
    case = ET.Element("testcase", {"classname": legal(f"gate.{group}"), "name": legal(name), "time": "0"})
    if kind:
        ET.SubElement(case, kind, {"type": what, "message": legal(text)}).text = legal(text)
    return case


def _limit(one) -> ET.Element:
    kind = {PASS: "", FAIL: "failure"}.get(one.verdict, "error")
    case = _case(one.limit.set or "all", one.limit.id, kind, one.verdict, decision_in_words(one))
    if not kind:
        ET.SubElement(case, "system-out").text = legal(decision_in_words(one))
    return case


def _replies(gate: Gate, role: str) -> ET.Element:
    """Returns the test that a model replied to enough prompts."""
    missing, most = {role: gate.verdict.missing[role]}, gate.policy.most_missing
    text = " ".join(missing_in_words(missing, gate.judged, most, gate.judges[0].name))
    over = any(is_too_much(rate, most) for rate in missing[role].values())
    return _case("replies", role, "error" if over else "", "missing_replies", text)
