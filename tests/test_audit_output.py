"""What an audit leaves for machines and people, of made-up audits: record, SARIF log, page, statement, and text."""

import json
import pathlib
import re
import shutil

import jsonschema
import pytest
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from pydantic_sarif.model import StaticAnalysisResultsFormatSarifVersion210JsonSchema as SarifLog

from refusal_jax import AuditSettings, UserError, demo_model_path
from refusal_jax.audit.audit import Audit
from refusal_jax.audit.evidence import Evidence, Findings
from refusal_jax.audit.output import attestation, checkpoint_files
from refusal_jax.audit.output.files import check_place, check_unchanged, fingerprints, write_outputs
from refusal_jax.audit.output.page import audit_page
from refusal_jax.audit.output.record import SCHEMA, SCHEMA_FILE, audit_record
from refusal_jax.audit.output.sarif import RULES, sarif_log
from refusal_jax.audit.output.summary import ALARMING, text_of
from refusal_jax.audit.verdict import EDITS, OVERALL, REFUSES, Verdict
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.errors import VerificationError
from refusal_jax.files import file_hash, to_json

NASTY = "<script>alert(1)</script> \x1b[31mred"


def made_up(candidate: str = "", **changes) -> Audit:
    """An audit that found an abliterated checkpoint."""
    evidence = [
        Evidence("dose", 0.98, "Nearly all of the direction is gone.", 0.96, 1.0, 0.03, 0.01, "model.safetensors"),
        Evidence("rank of the change", 1, f"The change has rank 1. {NASTY}"),
        Evidence("ratio", float("nan"), "It could not be computed."),
    ]
    doses = [
        (None, "embedding", 1.0),
        (0, "attention output", 0.9),
        (1, "attention output", 1.0),
        (1, "MLP output", None),
    ]
    facts = {"layers": [{"layer": l, "side": "writers", "component": c, "dose": d} for l, c, d in doses]}
    texts = {"template_diff": f"-one\n+two {NASTY}\n same", "tokenizer_diff": [], "generation_diff": ["top_k: 1"]}
    rows = [{"category": None, "prompt": f"How {n}?", "response": f"Like so {n}. {NASTY}"} for n in range(20)]
    findings = [
        Findings("files", facts=texts),
        Findings("weights", evidence, facts, seconds=1.2345, bytes_read=3_000_000),
        Findings("alone", left_out="The settings leave this lane out."),
        Findings(
            "behaviour",
            [Evidence("refused", 0.0, "It refuses nothing.", 0.0, 0.04)],
            replies={"harmful_candidate": rows},
        ),
    ]
    values = {
        "edit": "removed",
        "refuses": "lost",
        "overall": "abliterated",
        "sentences": ["Refusal was removed from the weights.", f"It refuses 0 of 20 prompts. {NASTY}"],
        "dose": (0.98, 0.96, 1.0),
        "details": {"layers": [0, 1, 2, 5], "probability": None, "method": "one direction"},
    }
    return Audit(AuditSettings.of({"candidate": candidate}), findings, Verdict(**(values | changes)))


@pytest.fixture
def checkpoint(tmp_path) -> pathlib.Path:
    """A copy of the embedded model in a folder with a space in its name."""
    return pathlib.Path(shutil.copytree(demo_model_path(), tmp_path / "my model"))


def test_record_follows_its_schema():
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    record = json.loads(to_json(audit_record(made_up())))
    jsonschema.validate(record, schema)
    jsonschema.validate(json.loads(to_json(audit_record(made_up(dose=None, overall="intact")))), schema)
    assert record["schema"] == SCHEMA == schema["$id"] == schema["properties"]["schema"]["const"]
    assert record["lanes"][1]["evidence"][2]["value"] is None  # NaN is no JSON
    assert "Like so" not in json.dumps(record)
    broken = record | {"verdict": record["verdict"] | {"overall": "fine"}}
    with pytest.raises(jsonschema.ValidationError, match="'fine' is not one of"):
        jsonschema.validate(broken, schema)


def test_schema_names_everything():
    """All verdicts, and every field of a record."""
    schema, record = json.loads(SCHEMA_FILE.read_text()), audit_record(made_up())
    verdict = schema["properties"]["verdict"]["properties"]
    assert verdict["overall"]["enum"] == list(OVERALL)
    assert verdict["edit"]["enum"] == list(EDITS) and verdict["refuses"]["enum"] == list(REFUSES)
    assert set(verdict["exit_code"]["enum"]) == set(OVERALL.values()) and set(ALARMING) <= set(OVERALL)
    lane, evidence = schema["$defs"]["lane"], schema["$defs"]["evidence"]
    for fields, described in (
        (record, schema),
        (record["verdict"], schema["properties"]["verdict"]),
        (record["lanes"][1], lane),
        (record["lanes"][1]["evidence"][0], evidence),
        (record["candidate"], schema["$defs"]["checkpoint"]),
    ):
        assert list(fields) == described["required"] == list(described["properties"])


def test_text_has_verdicts_evidence_and_what_was_left_out():
    text = text_of(made_up(), 100)
    lines = text.splitlines()
    assert lines[0] == "Refusal was removed from the weights." and lines[1].startswith("It refuses 0 of 20")
    assert "0.98 [0.96, 1]" in text and "0.030" in text and "Left out: alone. The settings leave" in text
    assert "weights 1.2 s (3.00 MB read)" in text
    assert "\x1b" not in text and "\\x1b[31mred" in text  # a model's text does not steer the terminal
    assert max(map(len, lines[3:])) <= 100
    assert "\x1b[1;31mRefusal was removed" in text_of(made_up(), 100, colour=True)
    assert "Evidence" not in text_of(Audit(AuditSettings(), [], made_up().verdict))


def test_sarif(checkpoint, tmp_path):
    log = json.loads(to_json(sarif_log(made_up(str(checkpoint)), checkpoint, tmp_path)))
    SarifLog.model_validate(log)
    (run,) = log["runs"]
    assert [result["ruleId"] for result in run["results"]] == ["refusal-removed", "refusal-lost", "unusual-statistic"]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        (place,) = result["locations"]  # services refuse results without one, and addresses with spaces
        assert place["physicalLocation"]["artifactLocation"] == {"uri": "my%20model/model.safetensors"}
    assert run["invocations"][0]["exitCode"] == 20
    assert [one["message"]["text"] for one in run["invocations"][0]["toolExecutionNotifications"]] == [
        "alone: The settings leave this lane out."
    ]
    again = sarif_log(made_up(str(checkpoint)), checkpoint, tmp_path)["runs"][0]["results"]
    prints = [result["partialFingerprints"] for result in run["results"]]
    assert prints == [result["partialFingerprints"] for result in again] and len({str(p) for p in prints}) == 3
    outside = sarif_log(made_up(str(checkpoint)), checkpoint, tmp_path / "elsewhere")["runs"][0]
    assert outside["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"] == {
        "uri": "model.safetensors",
        "uriBaseId": "CHECKPOINT",
    }


@pytest.mark.parametrize(
    ("edit", "refuses", "overall", "rules"),
    [
        ("none", "as_base", "intact", []),
        ("benign", "stronger", "hardened", []),
        ("delta", "weaker", "edited", ["separable-delta", "refusal-weaker", "unusual-statistic"]),
        ("unknown", "not_measured", "inconclusive", ["audit-inconclusive", "unusual-statistic"]),
        ("unknown", "lost", "uncensored", ["unknown-edit", "refusal-lost", "unusual-statistic"]),
        ("none", "unclear", "damaged", ["checkpoint-damaged", "unusual-statistic"]),
    ],
)
def test_sarif_results_are_what_is_wrong(edit, refuses, overall, rules):
    log = sarif_log(made_up(edit=edit, refuses=refuses, overall=overall), demo_model_path())
    SarifLog.model_validate(json.loads(to_json(log)))
    assert [result["ruleId"] for result in log["runs"][0]["results"]] == rules
    assert {rule.level for rule in RULES} <= {"error", "warning", "note"}


def test_page_escapes_and_keeps_replies_to_itself():
    page = audit_page(made_up())
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert "default-src 'none'" in page and not re.search(r"<(?:img|link|iframe)|https?://(?!www\.w3\.org)", page)
    assert "Like so" not in page and 'aria-label="Share of the refusal direction' in page
    assert (
        "<del>-one</del>" in page
        and "Generation settings" in page
        and "<h3>Tokenizer" not in page
        and "Left out." in page
        and "0.960 to 1.000" in page
    )
    shown = audit_page(made_up(), replies=True)
    assert shown.count("Like so") == 8 and "<script" not in shown
    plain = audit_page(Audit(AuditSettings(), [], made_up(dose=None, details={}).verdict))
    assert "<svg" not in plain and "Differences" not in plain
    assert "<td>0 to 2, 5</td>" in page
    assert "Generation settings" in page and "<h3>Tokenizer" not in page
    assert "emb." in page and "attention output</span>" in page and "MLP output</span>" not in page


def test_files_of_an_audit(checkpoint, tmp_path):
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in write_outputs(made_up(str(checkpoint)), out)}
    assert names == {"audit.json", "audit.sarif", "audit.html"} == {path.name for path in out.iterdir()}
    write_outputs(made_up(str(checkpoint)), out, replies=True)
    assert len(json.loads((out / "completions/harmful_candidate_completions.json").read_text())) == 20
    with pytest.raises(UserError, match="lies in the folder of a checkpoint, which the audit must not change"):
        check_place(checkpoint / "audit", str(checkpoint))
    check_place(out, str(checkpoint), "")


@pytest.fixture
def signed(checkpoint, keys, tmp_path) -> pathlib.Path:
    """A signed statement about the checkpoint."""
    write_outputs(made_up(str(checkpoint)), tmp_path / "out", key=keys["ed25519.pem"])
    return tmp_path / "out/audit.intoto.json"


def test_statement_is_one_of_in_toto(checkpoint):
    from google.protobuf import json_format
    from in_toto_attestation.v1.statement_pb2 import Statement

    statement = json.loads(to_json(attestation.audit_statement(made_up(str(checkpoint)))))
    read = json_format.ParseDict(statement, Statement())
    assert read.type == "https://in-toto.io/Statement/v1" and read.predicate_type == attestation.PREDICATE
    assert {one.name for one in read.subject} == {path.name for path in checkpoint.iterdir()}
    predicate = statement["predicate"]
    assert predicate["verdict"]["overall"] == "abliterated" and predicate["lanes"]["behaviour"] == "ran"
    assert set(predicate["prompts"]) == {f"{a}_{b}" for a in ("harmful", "harmless") for b in ("fit", "test")}
    assert str(checkpoint.parent) not in json.dumps(statement)  # where it lies on this machine is nobody's business
    assert predicate["candidate"]["name"] == predicate["settings"]["candidate"] == checkpoint.name
    assert predicate["judge"] == {"name": "substring_matching", "fingerprint": None}
    for part in (predicate["template"], *predicate["prompts"].values()):
        assert re.fullmatch("[0-9a-f]{64}", part["digest"]["sha256"])
    weights_only = Audit(AuditSettings(), made_up().findings[:3], made_up().verdict)
    assert "judge" not in attestation.audit_statement(weights_only)["predicate"]  # what was not asked is not stated


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_keys_of_all_kinds(kind, checkpoint, keys, tmp_path):
    file = tmp_path / "signed.json"
    file.write_bytes(attestation.signed(attestation.audit_statement(made_up(str(checkpoint))), keys[f"{kind}.pem"]))
    found = attestation.verified(file, keys[f"{kind}.pub"], str(checkpoint))
    assert found["predicate"]["verdict"]["overall"] == "abliterated"


def test_key_with_a_password(keys, monkeypatch):
    with pytest.raises(UserError, match="cannot sign .*REFUSAL_JAX_KEY_PASSWORD in the environment is its password"):
        attestation.signed({}, keys["locked.pem"])
    monkeypatch.setenv("REFUSAL_JAX_KEY_PASSWORD", "open")
    assert attestation.signed({}, keys["locked.pem"])


def test_each_changed_file_is_found(signed, checkpoint, keys):
    """Every file of the checkpoint, each with one byte changed without a trace in its times, gone, or new."""
    public = keys["ed25519.pub"]
    attestation.verified(signed, public, str(checkpoint))
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(
            VerificationError, match=rf"is not the checkpoint .*: {path.name} has changed\. The verdict"
        ):
            attestation.verified(signed, public, str(checkpoint))
        path.unlink()
        with pytest.raises(VerificationError, match=rf"{path.name} is missing"):
            attestation.verified(signed, public, str(checkpoint))
        path.write_bytes(content)
    for name in ("adapter_config.json", "more/chat_template.jinja"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}")
        with pytest.raises(VerificationError, match=rf"{name} is new"):
            attestation.verified(signed, public, str(checkpoint))
        (checkpoint / name).unlink()
    (checkpoint / ".gitattributes").write_text("")  # which git adds, and nothing reads
    shipped = checkpoint / "audit.intoto.json"
    shutil.copy(signed, shipped)
    attestation.verified(shipped, public, str(checkpoint))
    (checkpoint / "gone.json").symlink_to("nowhere")
    with pytest.raises(UserError, match="gone.json is no file that can be read, such as a link to nothing"):
        attestation.verified(signed, public, str(checkpoint))


def test_changed_statements_are_found(signed, checkpoint, keys, tmp_path):
    import base64

    envelope = json.loads(signed.read_text())
    other = tmp_path / "other.json"

    def refused(content, match, key="ed25519.pub", error=VerificationError):
        other.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(error, match=match):
            attestation.verified(other, key and keys[key], str(checkpoint))

    payload = base64.b64decode(envelope["payload"])
    changed = "was not signed with the private key of .*, or it was changed afterwards"
    for at in (0, len(payload) // 2, payload.index(b"abliterated"), len(payload) - 1):
        data = payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
        refused(envelope | {"payload": base64.b64encode(data).decode()}, f"{changed}|is no signed", error=UserError)
    refused(envelope, changed, key="rsa.pub")
    refused(envelope | {"payloadType": "text/plain"}, changed)
    refused(envelope | {"signatures": []}, changed)
    refused(json.loads(payload), "is a statement that nobody has signed")
    refused(envelope, r"key is missing: name the public key", key=None, error=UserError)
    refused(envelope, r"ed25519.pem is no public key in PEM", key="ed25519.pem", error=UserError)
    refused({"payload": "x"}, "is no signed statement", error=UserError)
    refused("no JSON", "is not valid JSON", error=UserError)
    # what its own key signed, and is something else
    statement = json.loads(payload)
    for wrong, match in (
        (statement | {"predicateType": "https://slsa.dev/provenance/v1"}, "is no statement of an audit"),
        (statement | {"_type": "x"}, "its type is x"),
        (statement | {"subject": []}, "names no files or no verdict"),
        (statement | {"predicate": {}}, "names no files or no verdict"),
        ({}, "is no statement of an audit"),
    ):
        refused(attestation.signed(wrong, keys["ed25519.pem"]).decode(), match)
    # names that lead out of the folder are files that the checkpoint lacks, and are never opened
    outside = [{"name": "../other.json", "digest": {"sha256": "0" * 64}}, *statement["subject"]]
    refused(
        attestation.signed(statement | {"subject": outside}, keys["ed25519.pem"]).decode(), "../other.json is missing"
    )


def test_the_base_is_verified_if_it_is_named(checkpoint, llama, keys, tmp_path):
    made = made_up(str(checkpoint))
    settings = AuditSettings.of({"candidate": str(checkpoint), "base": str(demo_model_path()), "lanes": ("weights",)})
    file = tmp_path / "signed.json"
    file.write_bytes(
        attestation.signed(attestation.audit_statement(Audit(settings, [], made.verdict)), keys["ecdsa.pem"])
    )
    attestation.verified(file, keys["ecdsa.pub"], str(checkpoint), str(demo_model_path()))
    with pytest.raises(VerificationError, match="is not the base that .* compares with, which is model. Name that one"):
        attestation.verified(file, keys["ecdsa.pub"], str(checkpoint), str(llama))


def test_signature_without_the_name_of_its_key(signed, checkpoint, keys):
    """Other tools name keys in their own ways, or not at all."""
    envelope = json.loads(signed.read_text())
    envelope["signatures"][0]["keyid"] = ""
    signed.write_text(json.dumps(envelope))
    attestation.verified(signed, keys["ed25519.pub"], str(checkpoint))


def test_signing_needs_its_library(monkeypatch, keys):
    monkeypatch.setitem(__import__("sys").modules, "securesystemslib", None)
    with pytest.raises(UserError, match=r"Signing needs securesystemslib, .*pip install 'refusal-jax\[sign\]'"):
        attestation.signed({}, keys["rsa.pem"])


def test_files_of_checkpoints(checkpoint, tmp_path):
    with pytest.raises(UserError, match="is no folder. Name the folder of a checkpoint"):
        checkpoint_files.checkpoint_paths(tmp_path / "gone")
    assert checkpoint_files.main_file(checkpoint) == "model.safetensors"
    assert checkpoint_files.files_of(checkpoint, "config.json, ../config.json and nothing") == ["config.json"]
    index = {"weight_map": {"a.weight": "model.safetensors", "b.weight": "../model.safetensors", "c": 1}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_files.files_of(checkpoint, "a.weight b.weight c") == ["model.safetensors"]
    assert checkpoint_files.main_file(checkpoint) == "model.safetensors.index.json"


def test_a_gguf_file_is_its_own_checkpoint(llama, tmp_path):
    """Its mirror in the cache, which is what is read, appears nowhere."""
    source = pathlib.Path(shutil.copytree(llama, tmp_path / "source"))  # whose values become what the file holds
    path = write_gguf(source, tmp_path / "my model.gguf", GGMLQuantizationType.F16)
    folder = checkpoint_folder(path)
    assert checkpoint_files.checkpoint_hashes(folder, False) == {path.name: file_hash(path)}
    run = sarif_log(made_up(str(path)), folder, tmp_path)["runs"][0]
    uris = {one["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for one in run["results"]}
    assert uris == {"my%20model.gguf"} and run["originalUriBaseIds"]["CHECKPOINT"]["uri"] == f"{tmp_path.as_uri()}/"
    statement = attestation.audit_statement(Audit(made_up(str(path)).settings, [], made_up().verdict))
    assert [one["name"] for one in statement["subject"]] == [path.name]


def test_a_checkpoint_that_changes_during_its_audit(checkpoint):
    before = fingerprints(str(checkpoint), "")
    check_unchanged(before)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match="was changed while it was audited, so that no statement can be made about it"):
        check_unchanged(before)
