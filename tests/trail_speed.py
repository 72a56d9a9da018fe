"""Measures what a trail costs: the CPU time of records at 2,000 a second, and how fast they are verified.

Run as `python tests/trail_speed.py KEY [SECONDS]`, where KEY is a private key in PEM. It writes to a temporary folder.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

from refusal_jax.judges.judge import Outcome, Verdict
from refusal_jax.judges.text import SubstringJudge
from refusal_jax.monitor.parts import Letter
from refusal_jax.monitor.traces import Judged, Judgements, Place, Trace
from refusal_jax.monitor.trail.part import TrailCarrier, TrailPart
from refusal_jax.monitor.trail.settings import TrailSettings
from refusal_jax.monitor.trail.verify import verify_trail

RATE, BATCH = 2000, 200  # records a second, and in a batch
PROMPT, REPLY = "How do I describe a harbour at dawn? " * 6, "A harbour at dawn is quiet, and its light is grey. " * 12


def batch_of(number: int) -> Judgements:
    names = range(number * BATCH, (number + 1) * BATCH)
    traces = [
        Trace(f"chatcmpl-{n}", 1.8e9 + n / RATE, "model", "c", None, PROMPT, f"{REPLY}{n}", "stop", Place("log", n))
        for n in names
    ]
    return Judgements(tuple(Judged(trace, Verdict(0, 0.5), Outcome.COMPLIES) for trace in traces), ())


def main() -> None:
    key, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 20
    with tempfile.TemporaryDirectory() as folder:
        settings = TrailSettings.of({"folder": folder, "key": str(key)})
        part, carrier = TrailPart(settings, SubstringJudge("rules", (), False)), TrailCarrier(settings)
        part.restore({})
        used, number, begun = 0.0, 0, time.perf_counter()
        for step in range(seconds * RATE // BATCH):
            time.sleep(max(0.0, begun + step * BATCH / RATE - time.perf_counter()))
            batch = batch_of(step)
            before = time.process_time()
            sent = [json.loads(json.dumps(one.content)) for one in part.take(batch, ())]  # as the outbox keeps them
            carrier.deliver([Letter(number + n, content) for n, content in enumerate(sent, 1)])
            used += time.process_time() - before
            number += len(sent)
        took = time.perf_counter() - begun
        carrier.close()
        size = sum(path.stat().st_size for path in pathlib.Path(folder).glob("*.jsonl"))
        public = pathlib.Path(folder) / "key.pub"
        public.write_bytes(
            subprocess.run(["openssl", "pkey", "-in", key, "-pubout"], capture_output=True, check=True).stdout
        )
        before = time.process_time()
        found = verify_trail(pathlib.Path(folder), [public])
        checked = time.process_time() - before
        assert found.exit_code == 0 and found.chain.records == number + 1, found.findings
    print(f"{number} records in {took:.1f} s ({number / took:.0f} a second), {size / number:.0f} bytes each")
    print(f"{used / number * 1e6:.0f} microseconds of CPU for each, {used / took:.1%} of one core")
    print(f"verified at {number / checked:.0f} records a second")


if __name__ == "__main__":
    main()
