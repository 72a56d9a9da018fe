def write_report(run, verdicts):
    run.write_json("report.html", 1)
