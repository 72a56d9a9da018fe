"""The command `refusal-jax audit`: what it prints, writes and returns. The verdict is made up where the test is not about it."""

import json
import pathlib
import shutil

from commands import ROOT, command, forked_code

from refusal_jax import AuditSettings, demo_model_path

# Runs commands in one process, each with its output, under a verdict that is given.
COMMANDS = """
import contextlib, io, json, sys
from absl import flags
import refusal_jax.audit.audit as audit
from refusal_jax.audit.verdict import Verdict
from refusal_jax.jobs import main
done = []
for verdict, argv in json.loads(sys.argv[1]):
    made = Verdict("removed", "lost", verdict, ["It is made up."], (0.5, 0.4, 0.6))
    audit.judge, audit.LANES = (lambda settings, findings: made), audit.LANES[:1]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.run(argv)
    done.append([code, out.getvalue(), err.getvalue()])
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
print(json.dumps(done))
"""


def run(*commands, cwd=ROOT):
    """Tells what each of several commands `(verdict, words)` returns and prints."""
    asked = json.dumps([[verdict, ["audit", *map(str, words)]] for verdict, words in commands])
    done = forked_code(COMMANDS, asked, folder=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_verdicts_are_exit_codes_and_files(tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
        load_pem_private_key,
    )

    key, public, out = tmp_path / "key.pem", tmp_path / "key.pub", tmp_path / "out"
    key.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    of_key = load_pem_private_key(key.read_bytes(), None).public_key()
    public.write_bytes(of_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    done = run(
        ("abliterated", ["--level=files"]),
        ("intact", ["--level=files", "--json=-"]),
        ("edited", ["--level=files", "--fail_on=abliterated,uncensored", f"--sarif={tmp_path / 'x.sarif'}"]),
        ("hardened", ["--level=files", "--fail-on=hardened"]),
        ("inconclusive", ["--lanes=files", f"--out={out}", f"--sign={key}"]),
        ("intact", ["verify", out / "audit.intoto.json", f"--key={public}"]),
        ("intact", ["verify", out / "audit.statement.json", f"--key={public}"]),
        ("damaged", ["--level=files", "--sarif=-", f"--out={out}"]),
    )
    assert [code for code, _, _ in done] == [20, 0, 0, 10, 30, 0, 3, 40]
    assert done[0][1].startswith("It is made up.\n")
    record = json.loads(done[1][1])
    assert record["verdict"]["overall"] == "intact" and record["settings"]["lanes"] == ["files"]
    assert json.loads((tmp_path / "x.sarif").read_text())["version"] == "2.1.0"
    assert f"Written to {out}: audit.json, " in done[4][1]
    assert {path.name for path in out.iterdir()} == {
        *("audit.json", "audit.sarif", "audit.html", "audit.statement.json", "audit.intoto.json")
    }
    assert "files are those that were audited.\nVerdict of 2" in done[5][1] and ": inconclusive.\n" in done[5][1]
    assert "nobody has signed" in done[6][2]
    assert json.loads(done[7][1])["runs"][0]["invocations"][0]["exitCode"] == 40


def test_a_broken_candidate_is_a_finding(tmp_path):
    """It is written like any other, as the next step in continuous integration reads it."""
    broken = pathlib.Path(shutil.copytree(demo_model_path(), tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    gone = pathlib.Path(shutil.copytree(broken, tmp_path / "gone"))
    (gone / "more").symlink_to("nowhere")
    out = tmp_path / "out"
    done = run(
        ("intact", [broken, f"--out={out}", "--statement"]),
        ("intact", [broken, "--fail_on=abliterated"]),
        ("intact", [gone]),
    )
    assert [code for code, _, _ in done] == [40, 0, 40]
    assert done[0][1].startswith("The candidate is damaged.\n") and str(weights) in done[0][1].replace("\n", "")
    record, log = (json.loads((out / name).read_text()) for name in ("audit.json", "audit.sarif"))
    assert record["verdict"]["overall"] == "damaged" and {lane["left_out"] for lane in record["lanes"]} == {
        "The candidate is broken."
    }
    assert [result["ruleId"] for result in log["runs"][0]["results"]] == ["checkpoint-damaged"]
    assert (out / "audit.html").is_file() and (out / "audit.statement.json").is_file()
    assert "error:" in done[2][2] and not done[2][1]


def test_bad_input(tmp_path):
    inside = demo_model_path() / "audit"
    cases = {
        "there is no lane 'weigths'. Did you mean weights": ["--lanes=weigths"],
        "--level and --lanes both say which lanes run": ["--level=files", "--lanes=files"],
        "--level=all is not one of files": ["--level=all"],
        "there is no verdict 'abliterate'. Did you mean abliterated": ["--fail_on=abliterate"],
        "--out is missing, the folder for statement and replies": ["--sign=key.pem"],
        "lies in the folder of a checkpoint": [f"--out={inside}"],
        "The signed statement is missing": ["verify"],
        "--out is missing, the folder of the benchmark": ["bench"],
        "gone.json does not exist": ["verify", "gone.json", "--key=x"],
        "unexpected argument 'two'": ["one", "two"],
        "flag --margin=wide: could not convert": ["--margin=wide"],
        "Did you mean --max_new_tokens": ["--max-new-token=3"],
        "gone is not a folder": [tmp_path / "gone"],
        "A repair needs the base": ["--level=files", f"--repair={tmp_path / 'new'}"],
    }
    done = run(*(("intact", words) for words in cases.values()))
    for (code, _, err), message in zip(done, cases, strict=True):
        assert code == 2, (message, code, err)
        assert message in " ".join(err.split()), (message, err)
    assert not inside.exists()


def test_flags_are_the_settings():
    shown = command("audit", "--help")
    text = " ".join(shown.stdout.split())
    for one in AuditSettings().described():
        assert one.path in ("candidate", "dtype") or f"--{one.path} {one.meaning}." in text, one.path
    assert "--candidate" not in text and "--dtype" in text
